"""The ``.pkl`` files of MMSA (MOSI, MOSEI, SIMS; aligned and unaligned).

Layout: ``{train, valid, test}`` -> ``{raw_text, audio, vision, id, text, text_bert, audio_lengths, vision_lengths,
annotations, classification_labels, regression_labels}`` with text (N, T, 768) and ids ``video$_$clip``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3er_fast.corpus._folds import Fold, on_one_axis, read_folds
from m3er_fast.corpus._labels import (
    SENTIMENT,
    class_indices,
    classes_named,
    ids_of,
    label_name,
    row_ids,
    sentiment_classes,
    video_of,
)
from m3er_fast.corpus._sequences import as_float32
from m3er_fast.corpus._unpickle import load_pickle
from m3er_fast.corpus.base import NO_LABEL, Corpus, CorpusError, concatenate, naming
from m3er_fast.corpus.files import decoding


def read(path: Path, *, steps: int | None = None, encoding: str = "latin1") -> Corpus:
    """Read an MMSA pickle.

    Aligned files keep their time axis. In unaligned files, the audio and vision frames of an utterance are averaged
    over equal parts, one per word (see ``steps``). The attention mask in ``text_bert`` marks padding words.
    Labels are the annotations (negative, neutral, positive, or any other names in the file, in lower case); without
    annotations, the classification labels 0, 1, 2 for negative, neutral, positive; without either, the sign of the
    regression labels. A label that is blank, None or NaN is no label. The group is the video.

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
    targets, classes = _targets(folds, path)
    with naming(path):
        parts = []
        for split, fold in folds.items():
            features, fields = fold
            rows = fold.rows
            ids = ids_of(fields["id"], rows, f"{path}: {split}: id") if fields.get("id") is not None else None
            names = row_ids(split, rows) if ids is None else ids
            _blank_text_padding(features, fields.get("text_bert"), f"{path}: {split}: text_bert")
            lengths: dict[str, np.ndarray] = {
                name: _lengths(fields[f"{name}_lengths"], features[name], names, f"{path}: {split}: {name}_lengths")
                for name in ("audio", "vision")
                if name in features and fields.get(f"{name}_lengths") is not None
            }
            merged, length, available = on_one_axis(features, lengths, steps)
            parts.append(
                Corpus(
                    ids=names,
                    features=merged,
                    lengths=length,
                    available=available,
                    target=targets.get(split),
                    classes=classes,
                    split=np.full(rows, split, dtype=object),
                    group=None if ids is None else np.array([video_of(name) for name in ids], dtype=object),
                )
            )
        return concatenate(parts)


def _blank_text_padding(features: dict[str, np.ndarray], text_bert: Any, where: str) -> None:
    """Zero the text frames that the attention mask marks as padding: BERT computes numbers for them too."""
    if "text" not in features or text_bert is None:
        return
    rows, steps = features["text"].shape[:2]
    tokens = as_float32(text_bert, where)
    if tokens.shape != (rows, 3, steps):
        raise CorpusError(f"{where} has shape {tokens.shape}, wanted ({rows}, 3, {steps}): ids, mask, segments")
    features["text"] = np.where(tokens[:, 1, :, None] != 0, features["text"], np.float32(0))


def _lengths(value: Any, sequences: np.ndarray, ids: np.ndarray, where: str) -> np.ndarray:
    lengths = as_float32(value, where).reshape(-1)
    rows, steps = sequences.shape[:2]
    if lengths.shape != (rows,):
        raise CorpusError(f"{where} has {len(lengths)} entries, wanted {rows}")
    wrong = ~((lengths >= 0) & (lengths <= steps) & (lengths == np.round(lengths)))
    if wrong.any():
        row = int(wrong.argmax())
        raise CorpusError(f"{where}: {lengths[row]:g} for {ids[row]!r}, wanted an integer in 0..{steps}")
    return lengths.astype(np.int64)


def _label_names(value: Any, rows: int, where: str) -> list[str | None]:
    names = [label_name(item) for item in np.asarray(value, dtype=object).reshape(-1)]
    if len(names) != rows:
        raise CorpusError(f"{where} has {len(names)} entries, wanted {rows}")
    return names


def _targets(folds: dict[str, Fold], path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the class indices of each split that has labels, and the class names."""
    for key in ("annotations", "classification_labels", "regression_labels"):
        given = {split: fold.fields[key] for split, fold in folds.items() if fold.fields.get(key) is not None}
        if given:
            break
    else:
        return {}, ()
    if key == "annotations":
        names = {
            split: _label_names(value, folds[split].rows, f"{path}: {split}: {key}") for split, value in given.items()
        }
        classes = classes_named(name for values in names.values() for name in values)
        return {split: class_indices(values, classes) for split, values in names.items()}, classes
    targets = {}
    for split, value in given.items():
        where = f"{path}: {split}: {key}"
        numbers = as_float32(value, where).reshape(-1)
        if len(numbers) != folds[split].rows:
            raise CorpusError(f"{where} has {len(numbers)} entries, wanted {folds[split].rows}")
        if key == "regression_labels":
            targets[split] = sentiment_classes(numbers, where)
            continue
        known = ~np.isnan(numbers)
        wrong = known & ~np.isin(numbers, (0, 1, 2))
        if wrong.any():
            row = int(wrong.argmax())
            raise CorpusError(f"{where}: {numbers[row]:g} in row {row}, wanted 0, 1 or 2 for {', '.join(SENTIMENT)}")
        targets[split] = np.where(known, numbers, NO_LABEL).astype(np.int64)
    return targets, SENTIMENT
