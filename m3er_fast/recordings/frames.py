"""Frames of features with their times, and their means within steps.

Dimension legend: N frames, S steps, d features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Frames:
    """What an extractor finds in a recording: a row of features for each of N moments.

    Args:
        times: (N,) seconds from the start of the recording, the middle of what the row describes, in any order.
        values: (N, d) float32. A row that is not finite holds nothing, such as a picture without a face.
        report: numbers for the summary of a run, such as how many pictures had no face; JSON.
    """

    times: NDArray[np.float64]
    values: NDArray[np.float32]
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.times.shape != self.values.shape[:1]:
            raise ValueError(
                f"times and values must be of shapes (N,) and (N, d), got {self.times.shape} and {self.values.shape}"
            )
        if not np.isfinite(self.times).all():
            raise ValueError("times must be finite")


class FrameExtractor(Protocol):
    """What finds the features of one modality in a recording: an extractor of your own needs two methods.

    Attributes:
        dimension: d.
    """

    dimension: int

    def describe(self) -> dict[str, Any]:
        """Return everything that the features depend on, as JSON: name, version, settings, checksum of a model."""

    def extract(self, recording: Path) -> Frames | None:
        """Return the features of a recording; None if it has nothing of this modality.

        Raises:
            CorpusError: if it cannot be read.
        """


@runtime_checkable
class ReadsFiles(Protocol):
    """An extractor that reads a further file for each recording: if that changes, so do the features."""

    def file_of(self, recording: Path) -> Path | None:
        """Return the file that is read for a recording, or None."""


def means_within(frames: Frames, spans: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the mean of the frames within each of S spans of time.

    A frame is within a span if ``start ≤ time < end``. Spans may overlap and come in any order, and so may frames. The
    cost is O(N log N + S log N), and that of adding up each span's frames once.

    Args:
        frames: N frames; rows that are not finite are left out.
        spans: (S, 2), start and end in seconds.

    Returns:
        (S, d) float32. The row of a span without a frame is NaN: never zeros, which would be a measurement.
    """
    known = np.flatnonzero(np.isfinite(frames.values).all(axis=1))
    order = known[np.argsort(frames.times[known], kind="stable")]
    first, last = np.searchsorted(frames.times[order], spans.T, side="left")
    found = last > first
    means = np.full((len(spans), frames.values.shape[1]), np.nan, dtype=np.float32)
    if found.any():
        # Each span is added up by itself: differences of running sums would lose small values behind large ones.
        # reduceat adds up from each index to the next; a row beyond the last lets a span end there.
        ends = np.stack([first[found], last[found]], axis=1).reshape(-1)
        values = np.zeros((len(order) + 1, frames.values.shape[1]), dtype=np.float32)
        np.take(frames.values, order, axis=0, out=values[:-1])
        sums = np.add.reduceat(values, ends, axis=0, dtype=np.float64)[::2]
        means[found] = sums / (last - first)[found, None]
    return means
