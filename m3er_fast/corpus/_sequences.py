"""Helpers for readers of padded or unaligned sequences: cast, trim, resample.

Dimension legend: N utterances, T time steps, d features, L frames of an utterance, S parts that it is cut into.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3er_fast.corpus.base import CorpusError


def as_float32(value: Any, where: str) -> np.ndarray:
    """Return real numbers of any dtype as float32; numbers beyond its range become ±inf.

    Args:
        value: the numbers.
        where: their name in the error message.

    Raises:
        CorpusError: if ``value`` is not an array of real numbers.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biufc":
            array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: lists nested too deep
        raise CorpusError(f"{where}: not a rectangular array of numbers") from error
    if array.dtype.kind == "c":
        raise CorpusError(f"{where}: holds complex numbers, wanted real ones")
    with np.errstate(over="ignore", invalid="ignore"):  # invalid: a signalling NaN
        return np.ascontiguousarray(array, dtype=np.float32)


def trim_padding(
    features: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Turn zero padding on either side into right padding with lengths.

    A frame counts as zero if it is zero in every modality. Frames before the first and after the last non-zero frame
    are padding; zero frames between them stay (a lost face track, an unknown word). Both ends are examined, because
    published files of one family are padded on different sides. A modality that is zero throughout an utterance holds
    no measurement and is unavailable.

    Args:
        features: modality -> (N, T, d_m), on one time axis.

    Returns:
        The features shifted to the left, lengths (N,) int64 and availability (N, M) bool.
    """
    filled = np.stack([np.any(value != 0, axis=2) for value in features.values()])  # (M, N, T)
    frames: np.ndarray = np.any(filled, axis=0)
    steps = frames.shape[1]
    start = frames.argmax(axis=1)
    stop = steps - frames[:, ::-1].argmax(axis=1)
    lengths = np.where(frames.any(axis=1), stop - start, 0).astype(np.int64)
    time = np.arange(steps)
    source = np.minimum(start[:, None] + time, steps - 1)[:, :, None]
    inside = (time < lengths[:, None])[:, :, None]
    shifted = {
        name: np.where(inside, np.take_along_axis(value, source, axis=1), np.float32(0))
        for name, value in features.items()
    }
    return shifted, lengths, np.ascontiguousarray(np.any(filled, axis=2).T)


def right_pad(sequences: Sequence[np.ndarray], steps: int, features: int) -> np.ndarray:
    """Stack (L, d) sequences of L ≤ ``steps`` frames as (N, steps, d) float32, zeros on the right."""
    padded = np.zeros((len(sequences), steps, features), np.float32)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return padded


def equal_parts(frames: np.ndarray, steps: int) -> np.ndarray:
    """Average (L, d) frames over ``steps`` parts of equal duration, giving (steps, d).

    Part s covers frames ⌊sL/S⌋ up to ⌊(s+1)L/S⌋. If there are fewer frames than parts, frames repeat. L ≥ 1.
    """
    length = len(frames)
    edges = np.arange(steps + 1) * length // steps
    return np.stack([finite_mean(frames[start : max(stop, start + 1)]) for start, stop in itertools.pairwise(edges)])


def finite_mean(frames: np.ndarray) -> np.ndarray:
    """Average (L, d) frames over their finite entries; an entry that is finite in no frame is NaN."""
    if len(frames) == 1:
        return np.asarray(frames[0])
    finite = np.isfinite(frames)
    count = finite.sum(axis=0)
    total = np.where(finite, frames, 0).sum(axis=0, dtype=np.float64)
    mean = np.full(count.shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return mean
