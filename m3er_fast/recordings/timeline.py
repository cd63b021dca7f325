"""The picture of a recording's predictions over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3er_fast.plots import Timeline, plot_timeline
from m3er_fast.recordings.decoding import SAMPLE_RATE, Decoder, probe, read_pictures, read_sound
from m3er_fast.recordings.prediction import PredictedUtterance

_POINTS = 1000  # of the sound's level
_PICTURES = 7  # squares that fit beside each other
_WIDTH = 160  # pixels of a picture


def draw_timeline(recording: str | Path, predicted: Sequence[PredictedUtterance], path: str | Path) -> None:
    """Draw what a model says of a recording: :func:`m3er_fast.plots.plot_timeline`.

    Args:
        recording: a video or a sound file.
        predicted: its utterances.
        path: the PNG file to write.

    Raises:
        CorpusError: if the recording cannot be read.
        ImportError: if matplotlib is missing.
        ValueError: if there is no utterance.
    """
    first = predicted[0].scores if predicted else None
    classes = () if first is None else tuple(first.probabilities)
    modalities = () if first is None else tuple(first.effective)
    start = min((utterance.start for utterance in predicted), default=0.0)
    end = max((utterance.end for utterance in predicted), default=0.0)
    trusted = [
        [float(part.scores.effective[name]) if part.available[name] else np.nan for name in modalities]
        for part in predicted
    ]
    plot_timeline(
        Timeline(
            title=Path(recording).name,
            spans=np.array([(part.start, part.end) for part in predicted]).reshape(-1, 2),
            classes=classes,
            probabilities=np.array([list(part.scores.probabilities.values()) for part in predicted]),
            modalities=modalities,
            trusted=np.array(trusted),
            abstained=np.array([part.scores.abstained for part in predicted], dtype=bool),
            level=_level(Path(recording), start, end),
            pictures=_pictures(Path(recording), start, end),
        ),
        Path(path),
    )


def _level(recording: Path, start: float, end: float) -> NDArray[np.float64]:
    """Return times and the largest sample around each, (2, K)."""
    width = max(end - start, 1e-9) / _POINTS
    level = np.full(_POINTS, np.nan)
    for piece in read_sound(Decoder(recording, "audio")):
        times = piece.start + np.arange(len(piece.samples)) / SAMPLE_RATE
        bins = np.floor((times - start) / width).astype(np.int64)
        inside = (bins >= 0) & (bins < _POINTS)
        np.fmax.at(level, bins[inside], np.abs(piece.samples[inside]))
    if np.isnan(level).all():
        return np.empty((2, 0))
    return np.stack([start + (np.arange(_POINTS) + 0.5) * width, level])


def _pictures(recording: Path, start: float, end: float) -> list[tuple[float, NDArray[np.uint8]]]:
    """Return pictures at times that are equally far apart."""
    if not probe(recording).has_pictures or end <= start:
        return []
    found: list[tuple[float, NDArray[np.uint8]]] = []
    due = step = 0.0
    for picture in read_pictures(Decoder(recording, "video"), per_second=None, width=_WIDTH):
        if not step:
            height, width, _ = picture.pixels.shape
            step = (end - start) / max(1, round(_PICTURES * height / width))
            due = start + step / 2
        if due <= picture.time and due < end:
            found.append((due, picture.pixels))
            due += step
    return found
