"""Classes and groups from the scores and ids of published files."""

from __future__ import annotations

import re

import numpy as np

from m3er_fast.corpus.base import NO_LABEL, CorpusError

SENTIMENT = ("negative", "neutral", "positive")


def sentiment_classes(scores: np.ndarray, where: str) -> np.ndarray:
    """Return the sign of (N,) scores as an index into `SENTIMENT`; a NaN score is no label.

    Raises:
        CorpusError: if every score is 0 or 1: these are two classes rather than signed sentiment.
    """
    known = scores[~np.isnan(scores)]
    if known.size and np.isin(known, (0, 1)).all() and (known == 1).any() and (known == 0).any():
        raise CorpusError(f"{where}: every label is 0 or 1, not a signed sentiment score whose sign could be its class")
    return np.where(np.isnan(scores), NO_LABEL, np.sign(np.nan_to_num(scores)) + 1).astype(np.int64)


def video_of(utterance: str) -> str:
    """Return the video part of an id ``video$_$clip``, ``video[k]`` or ``video_k``; any other id is returned whole."""
    video, separator, _ = utterance.partition("$_$")
    return video if separator else re.sub(r"(?:\[\d+\]|_\d+)$", "", utterance)


def row_ids(split: str, rows: int) -> np.ndarray:
    """Return ids for the rows of a file without ids."""
    return np.array([f"{split}_{row:05d}" for row in range(rows)], dtype=object)
