"""The pickles of IEMOCAP's raw features used in conversational emotion recognition: a tuple of dicts per dialogue.

Layout, by the number of members: 9 (DialogueRNN), 10 (COSMIC: four RoBERTa layers, text only) or 12 (RoBERTa layers,
audio and visual). Frames are utterances: one vector each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3er_fast.corpus._sequences import as_float32
from m3er_fast.corpus._unpickle import load_pickle
from m3er_fast.corpus.base import Corpus, CorpusError, naming
from m3er_fast.corpus.files import decoding

CLASSES = ("happy", "sad", "neutral", "angry", "excited", "frustrated")

_TEXT_LAYERS = ("text", "roberta2", "roberta3", "roberta4")
_LAYOUTS = {
    9: ("ids", "speakers", "labels", "text", "audio", "visual", "sentences", "train", "test"),
    10: ("speakers", "labels", *_TEXT_LAYERS, "sentences", "train", "test", "valid"),
    12: ("ids", "speakers", "labels", *_TEXT_LAYERS, "audio", "visual", "sentences", "train", "test"),
}


def read(path: Path, *, encoding: str = "latin1") -> Corpus:
    """Read an IEMOCAP raw-features pickle of 9, 10 or 12 members.

    T = 1. The four RoBERTa layers of the longer variants are averaged, as in COSMIC. The group is the dialogue. Only
    dialogues in one of the file's splits are read.

    Args:
        path: the pickle.
        encoding: see `load_pickle`; the published files were written by Python 2.

    Raises:
        CorpusError: naming the file and the part that is refused, missing or contradictory.
    """
    data = load_pickle(path, encoding=encoding)
    with decoding(path, "its parts are not of the wanted kinds"):
        return _read(data, path)


def _read(data: Any, path: Path) -> Corpus:
    if not isinstance(data, tuple | list) or len(data) not in _LAYOUTS:
        found = f"{len(data)} members" if isinstance(data, tuple | list) else f"a {type(data).__name__}"
        raise CorpusError(f"{path}: wanted a tuple of {', '.join(map(str, _LAYOUTS))} members, got {found}")
    if len(data) == 9 and isinstance(data[6], set | list) and isinstance(data[8], dict):
        raise CorpusError(
            f"{path}: this is MELD's tuple of 9 members, in which the splits come before the last member, and whose "
            "classes are others: it is not read. Wanted IEMOCAP's"
        )
    members = dict(zip(_LAYOUTS[len(data)], data, strict=True))
    for name, value in members.items():
        wanted = (set, frozenset, list, tuple, np.ndarray) if name in ("train", "valid", "test") else (dict,)
        if not isinstance(value, wanted):
            raise CorpusError(f"{path}: member {name} is a {type(value).__name__}, wanted a {wanted[0].__name__}")
    dialogues = [
        (split, dialogue)
        for split in ("train", "valid", "test")
        # Sorted: the published splits are sets, and their order differs from run to run.
        for dialogue in sorted(map(str, members.get(split, ())))
    ]
    if not dialogues:
        raise CorpusError(f"{path}: its splits name no dialogue")
    labels = [_labels(members, dialogue, path) for _, dialogue in dialogues]
    counts = [len(label) for label in labels]
    features = {}
    for name in ("text", "audio", "visual"):
        layers = _TEXT_LAYERS if name == "text" and "roberta2" in members else (name,)
        if name in members:
            stacked = np.stack([_vectors(members, layer, dialogues, counts, path) for layer in layers])
            features[name] = np.asarray(stacked.mean(axis=0))[:, None]
    rows = sum(counts)
    with naming(path):
        return Corpus(
            ids=np.concatenate(
                [_ids(members, d, count, path) for (_, d), count in zip(dialogues, counts, strict=True)]
            ),
            features=features,
            lengths=np.ones(rows, dtype=np.int64),
            available=np.ones((rows, len(features)), dtype=bool),
            target=np.concatenate(labels),
            classes=CLASSES,
            split=np.repeat(np.array([split for split, _ in dialogues], dtype=object), counts),
            group=np.repeat(np.array([dialogue for _, dialogue in dialogues], dtype=object), counts),
        )


def _entry(members: dict[str, Any], name: str, dialogue: str, path: Path) -> Any:
    try:
        return members[name][dialogue]
    except KeyError:
        raise CorpusError(f"{path}: {name} has nothing for dialogue {dialogue!r}") from None


def _labels(members: dict[str, Any], dialogue: str, path: Path) -> np.ndarray:
    labels = as_float32(_entry(members, "labels", dialogue, path), f"{path}: labels of {dialogue!r}")
    if labels.ndim != 1 or not np.isin(labels, range(len(CLASSES))).all():
        raise CorpusError(
            f"{path}: labels of {dialogue!r} are {labels.tolist()}, wanted classes in 0..{len(CLASSES) - 1}"
        )
    return labels.astype(np.int64)


def _ids(members: dict[str, Any], dialogue: str, count: int, path: Path) -> np.ndarray:
    if "ids" not in members:
        return np.array([f"{dialogue}_{turn:03d}" for turn in range(count)], dtype=object)
    ids = np.array([str(name) for name in _entry(members, "ids", dialogue, path)], dtype=object)
    if len(ids) != count:
        raise CorpusError(f"{path}: dialogue {dialogue!r} has {count} labels but {len(ids)} ids")
    return ids


def _vectors(
    members: dict[str, Any], name: str, dialogues: list[tuple[str, str]], counts: list[int], path: Path
) -> np.ndarray:
    """Return the vectors of all utterances as float32 (N, d)."""
    blocks: list[np.ndarray] = []
    for (_, dialogue), count in zip(dialogues, counts, strict=True):
        block = as_float32(list(_entry(members, name, dialogue, path)), f"{path}: {name} of {dialogue!r}")
        if count == 0:
            continue
        if block.ndim != 2 or len(block) != count or (blocks and block.shape[1] != blocks[0].shape[1]):
            wanted = blocks[0].shape[1] if blocks else "d"
            raise CorpusError(f"{path}: {name} of {dialogue!r} has shape {block.shape}, wanted ({count}, {wanted})")
        blocks.append(block)
    if not blocks:
        raise CorpusError(f"{path}: holds no utterance")
    return np.concatenate(blocks)
