"""The ``.h5`` files of MFN (Zadeh et al., AAAI 2018): one file per modality and split.

Layout: ``{audio,video}_{train,valid,test}.h5``, ``text_{split}_emb.h5`` of (N, T, d) and ``y_{split}.h5``, under the
key ``d1``; or, in older files, ``X_{split}.h5`` of (N, T, 325) = text 300 | audio 5 | face 20 under the key ``data``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from m3er_fast.corpus._hdf5 import names_in, open_hdf5, read_array
from m3er_fast.corpus._labels import SENTIMENT, row_ids, sentiment_classes
from m3er_fast.corpus._sequences import as_float32, trim_padding
from m3er_fast.corpus.base import SPLIT_NAMES, SPLITS, Corpus, CorpusError, concatenate, naming

_FILES = {"text": "text_{}_emb.h5", "audio": "audio_{}.h5", "video": "video_{}.h5"}
_JOINT_COLUMNS = {"text": slice(0, 300), "audio": slice(300, 305), "face": slice(305, 325)}
_YOUTUBE = ("positive", "neutral", "negative")
_MOSEI = ("anger", "disgust", "fear", "happy", "sad", "surprise")
# MMMO's scores run from 1 upwards; published results call a review positive above 3.5.
_MMMO_MIDDLE = 3.5


def read(path: Path) -> Corpus:
    """Read a folder of MFN's ``.h5`` files.

    A split may lack its labels, or the file of a modality, which is then unavailable there. The files do not name
    utterances: ids are ``<split>_<row>``, and there are no groups. Zero frames at either end of an utterance are
    padding: the published YouTube files are padded on the right, other files on the left.

    Labels, by the shape of y:
        (N, 3) one-hot: positive, neutral, negative (YouTube).
        (N, C) one-hot: classes named ``class_0`` and so on.
        (N, 6) otherwise: anger, disgust, fear, happy, sad, surprise, present when > 0, multi-label (MOSEI).
        (N,) or (N, 1) with negative values: sentiment by sign: negative, neutral, positive (MOSI).
        (N,) or (N, 1) without: sentiment, positive above 3.5 (MMMO).
        (N, C) otherwise: C yes-or-no questions, "above the median of its training scores" (POM's 17 traits, whose
        scales differ), multi-label.

    Raises:
        CorpusError: naming the file that is unreadable, contradicts another file or holds labels of an unknown kind.
    """
    if not path.is_dir():
        raise CorpusError(f"{path}: not a folder of .h5 files")
    features = {split: _features(path, split) for split in SPLITS}
    labels = {
        split: _labels(file, value)
        for split, value in features.items()
        if value and (file := _find(path, "y_{}.h5", split)) is not None
    }
    targets, classes, task = _targets(path, labels)
    if not any(features.values()):
        raise CorpusError(
            f"{path}: holds none of audio_<split>.h5, video_<split>.h5, text_<split>_emb.h5, X_<split>.h5"
        )
    with naming(path):
        return concatenate(
            [_part(split, given, targets.get(split), classes, task) for split, given in features.items() if given]
        )


def _part(
    split: str, features: dict[str, np.ndarray], target: np.ndarray | None, classes: tuple[str, ...], task: str
) -> Corpus:
    trimmed, lengths, available = trim_padding(features)
    rows = len(lengths)
    return Corpus(
        ids=row_ids(split, rows),
        features=trimmed,
        lengths=lengths,
        available=available,
        target=target,
        classes=classes,
        task=task,
        split=np.full(rows, split, dtype=object),
    )


def _features(folder: Path, split: str) -> dict[str, np.ndarray]:
    """Return the modalities of a split; none if it has no files."""
    joint = _find(folder, "X_{}.h5", split)
    if joint is not None:
        value = _sequences(joint)
        if value.shape[2] != 325:
            raise CorpusError(f"{joint}: has {value.shape[2]} features, wanted 325 = text 300, audio 5, face 20")
        return {name: np.ascontiguousarray(value[:, :, columns]) for name, columns in _JOINT_COLUMNS.items()}
    found = {name: _find(folder, pattern, split) for name, pattern in _FILES.items()}
    files = {name: file for name, file in found.items() if file is not None}
    given = {name: _sequences(file) for name, file in files.items()}
    for name, value in given.items():
        first = next(iter(given))
        if value.shape[:2] != given[first].shape[:2]:
            raise CorpusError(
                f"{files[name]}: has {value.shape[0]} rows of {value.shape[1]} steps, but {files[first].name} has "
                f"{given[first].shape[0]} of {given[first].shape[1]}"
            )
    return given


def _find(folder: Path, pattern: str, split: str) -> Path | None:
    """Return the file of a split under any spelling of its name, or None."""
    return next((file for name in SPLIT_NAMES[split] if (file := folder / pattern.format(name)).exists()), None)


def _sequences(file: Path) -> np.ndarray:
    value = as_float32(_read(file), str(file))
    if value.ndim != 3 or 0 in value.shape[1:]:
        raise CorpusError(f"{file}: has shape {value.shape}, wanted (N, T, d)")
    return value


def _labels(file: Path, features: dict[str, np.ndarray]) -> np.ndarray:
    """Return the labels of a split as finite float32 (N, C)."""
    value = as_float32(_read(file), str(file))
    rows = len(next(iter(features.values())))
    if value.ndim not in (1, 2) or len(value) != rows or 0 in value.shape[1:]:
        raise CorpusError(f"{file}: has shape {value.shape}, wanted ({rows},) or ({rows}, C)")
    if not np.isfinite(value).all():
        raise CorpusError(f"{file}: row {int((~np.isfinite(value.reshape(rows, -1))).any(1).argmax())} is not finite")
    return value.reshape(rows, -1)


def _read(file: Path) -> np.ndarray:
    with open_hdf5(file) as opened:
        return read_array(opened, "d1" if "d1" in names_in(opened, file) else "data", file)


def _targets(folder: Path, labels: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], tuple[str, ...], str]:
    """Return the target of each split, the class names and the task."""
    if not labels:
        return {}, (), "single"
    if len({value.shape[1] for value in labels.values()}) > 1:
        raise CorpusError(f"{folder}: y files differ in width: { ({k: v.shape[1] for k, v in labels.items()}) }")
    everything = np.concatenate(list(labels.values()))
    width = everything.shape[1]
    if width > 1 and np.isin(everything, (0, 1)).all() and (everything.sum(axis=1) == 1).all():
        names = _YOUTUBE if width == 3 else tuple(f"class_{index}" for index in range(width))
        return {split: value.argmax(axis=1) for split, value in labels.items()}, names, "single"
    if width == len(_MOSEI):
        return {split: (value > 0).astype(np.float32) for split, value in labels.items()}, _MOSEI, "multi"
    if width > 1:
        if "train" not in labels:
            raise CorpusError(f"{folder}: scores of {width} traits need y_train.h5, whose medians are the thresholds")
        middle = np.median(labels["train"], axis=0)
        names = tuple(f"trait_{index}" for index in range(width))
        return {split: (value > middle).astype(np.float32) for split, value in labels.items()}, names, "multi"
    if everything.min() < 0:
        return {split: sentiment_classes(v[:, 0], str(folder)) for split, v in labels.items()}, SENTIMENT, "single"
    if not everything.min() <= _MMMO_MIDDLE < everything.max():
        raise CorpusError(
            f"{folder}: scores in y run from {everything.min():g} to {everything.max():g}, neither signed sentiment "
            f"nor on both sides of {_MMMO_MIDDLE}, so they give no classes"
        )
    return (
        {split: (value[:, 0] > _MMMO_MIDDLE).astype(np.int64) for split, value in labels.items()},
        ("negative", "positive"),
        "single",
    )
