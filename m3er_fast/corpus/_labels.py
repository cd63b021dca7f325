"""Classes, ids and groups from the names and scores of published files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from m3er_fast.corpus.base import NO_LABEL, CorpusError

SENTIMENT = ("negative", "neutral", "positive")

# The texts of a missing value: blank, and what str() makes of None, NaN, NaT and pandas' NA. pandas.read_csv reads
# them as missing too.
_MISSING = frozenset(("", "nan", "none", "null", "na", "n/a", "#n/a", "<na>", "nat"))


def text_of(value: Any) -> str | None:
    """Return a text cell of an untrusted table, or None where it is missing.

    Bytes are UTF-8, or Latin-1 if they are not. None, NaN, NaT and pandas' NA are missing.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, float | np.floating) and math.isnan(value):
        return None
    if isinstance(value, bytes | bytearray):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin1")
    return str(value)


def label_name(value: Any) -> str | None:
    """Return the class that a cell of labels names, in lower case, or None for no label.

    This is the only place that reads the name of a label. Space around a name and its case do not count. Missing are
    blank cells, None, NaN, pandas' NA, and their texts: ``nan``, ``none``, ``null``, ``NA``, ``N/A``.
    """
    text = text_of(value)
    name = "" if text is None else text.strip().lower()
    return None if name in _MISSING else name


def classes_named(names: Iterable[str | None]) -> tuple[str, ...]:
    """Return the classes of label names: `SENTIMENT` if there are no others, else all in alphabetical order."""
    found = {name for name in names if name is not None}
    return SENTIMENT if found <= set(SENTIMENT) else tuple(sorted(found))


def class_indices(names: Iterable[str | None], classes: tuple[str, ...]) -> np.ndarray:
    """Return the position (N,) of each name among the classes, or −100 for None."""
    index: Mapping[str | None, int] = {name: position for position, name in enumerate(classes)}
    return np.array([index.get(name, NO_LABEL) for name in names], dtype=np.int64)


def ids_of(values: Any, rows: int, where: str) -> np.ndarray:
    """Return texts (N,) that name rows, such as ids.

    Raises:
        CorpusError: if there are not as many as rows, or one is missing.
    """
    texts = [text_of(value) for value in np.asarray(values, dtype=object).reshape(-1)]
    if len(texts) != rows:
        raise CorpusError(f"{where} has {len(texts)} entries, wanted {rows}")
    if None in texts:
        raise CorpusError(f"{where} has nothing in row {texts.index(None)}")
    return np.array(texts, dtype=object)


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
