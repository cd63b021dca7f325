"""The ``.pkl`` files of MulT and MultiBench (MOSI, MOSEI, IEMOCAP; aligned and unaligned).

Layout: ``{train, valid, test}`` -> ``{text, audio, vision, labels, id?}`` of left-padded (N, T, d) sequences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3er_fast.corpus._folds import on_one_axis, read_folds
from m3er_fast.corpus._labels import SENTIMENT, ids_of, row_ids, sentiment_classes, video_of
from m3er_fast.corpus._sequences import as_float32
from m3er_fast.corpus._unpickle import load_pickle
from m3er_fast.corpus.base import Corpus, CorpusError, concatenate, naming
from m3er_fast.corpus.files import decoding

IEMOCAP = ("neutral", "happy", "sad", "angry")


def read(path: Path, *, steps: int | None = None, encoding: str = "latin1") -> Corpus:
    """Read a MulT or MultiBench pickle.

    Zero padding becomes right padding with lengths. In unaligned files, the audio and vision frames of an utterance are
    averaged over equal parts, one per word (see ``steps``).

    The shape of the labels decides their meaning. (N, 4, 2) pairs of (no, yes) are IEMOCAP's neutral, happy, sad and
    angry, multi-label. (N, 1, 1), (N, 1) or (N,) scores are sentiment, whose sign is the class: negative, neutral,
    positive.

    An ``id`` of shape (N, 3) is (video, start, end); any other ``id`` is the name of the utterance. The group is the
    video.

    Args:
        path: the pickle.
        steps: cut every utterance into this many equal parts instead.
        encoding: see `load_pickle`.

    Raises:
        CorpusError: naming the file and the part that is refused, missing or contradictory.
    """
    data = load_pickle(path, encoding=encoding)
    with decoding(path, "its parts are not of the wanted kinds"):
        return _read(data, path, steps)


def _read(data: Any, path: Path, steps: int | None) -> Corpus:
    folds = read_folds(data, path)
    with naming(path):
        parts = []
        for split, fold in folds.items():
            merged, lengths, available = on_one_axis(fold.features, {}, steps)
            ids, group = _names(fold.fields.get("id"), split, fold.rows, path)
            target, classes, task = _target(fold.fields.get("labels"), ids, f"{path}: {split}: labels")
            parts.append(
                Corpus(
                    ids=ids,
                    features=merged,
                    lengths=lengths,
                    available=available,
                    target=target,
                    classes=classes,
                    task=task,
                    split=np.full(fold.rows, split, dtype=object),
                    group=group,
                )
            )
        return concatenate(parts)


def _names(value: Any, split: str, rows: int, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return ids and groups (N,)."""
    if value is None:
        return row_ids(split, rows), None
    table = np.asarray(value, dtype=object)
    if table.ndim == 0 or len(table) != rows:
        raise CorpusError(f"{path}: {split}: id has shape {table.shape}, wanted ({rows},) or ({rows}, 3)")
    table = table.reshape(rows, -1)
    texts = ids_of(table, table.size, f"{path}: {split}: id").reshape(table.shape)
    ids = np.array(["_".join(row) for row in texts], dtype=object)
    # If start and end have columns of their own, the first column is the video.
    videos = [row[0] if len(row) > 1 else video_of(row[0]) for row in texts]
    return ids, np.array(videos, dtype=object)


def _target(value: Any, ids: np.ndarray, where: str) -> tuple[np.ndarray | None, tuple[str, ...], str]:
    """Return target, class names and task of a split."""
    if value is None:
        return None, (), "single"
    rows = len(ids)
    labels = as_float32(value, where)
    if labels.shape == (rows, len(IEMOCAP), 2):
        known = ~np.isnan(labels).any(axis=(1, 2))
        wrong = known & ~((np.isin(labels, (0, 1))).all(axis=(1, 2)) & (labels.sum(axis=2) == 1).all(axis=1))
        if wrong.any():
            row = int(wrong.argmax())
            raise CorpusError(f"{where}: {labels[row].tolist()} for {ids[row]!r}, wanted four pairs (no, yes)")
        return np.where(known[:, None], labels[:, :, 1], np.float32(np.nan)), IEMOCAP, "multi"
    if labels.shape in ((rows,), (rows, 1), (rows, 1, 1)):
        return sentiment_classes(labels.reshape(rows), where), SENTIMENT, "single"
    raise CorpusError(
        f"{where} has shape {labels.shape}, wanted ({rows}, 4, 2), ({rows}, 1, 1), ({rows}, 1) or ({rows},)"
    )
