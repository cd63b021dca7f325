"""`Corpus`, the one form in which every data set reaches the model, whatever its file format.

Dimension legend: N utterances, M modalities, T time steps, d_m features of modality m, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NO_LABEL = -100
"""Class index of an utterance without a label: the default ``ignore_index`` of torch's losses."""

SPLITS = ("train", "valid", "test")
TASKS = ("single", "multi", "distribution")

SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test", "eval", "evaluation"),
}
"""Every spelling of each split, in lower case and the usual one first."""

# Text first, as in the published files and the slides; names keep the spelling of the files.
_USUAL_ORDER = ("text", "audio", "face", "video", "vision", "visual")


class CorpusError(ValueError):
    """Data that cannot be read or contradicts itself; the message is one line and names the file."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a name that a file gives may hold several lines


def split_name(value: object) -> str:
    """Return the split among `SPLITS` that a name stands for, in any case and with any space around it.

    ``train`` and ``training`` are train; ``valid``, ``val``, ``validation`` and ``dev`` are valid; ``test``, ``eval``
    and ``evaluation`` are test. This is the only place that reads the name of a split.

    Raises:
        CorpusError: if it is none of these.
    """
    name = value.strip().lower() if isinstance(value, str) else None
    for split, names in SPLIT_NAMES.items():
        if name in names:
            return split
    known = ", ".join("/".join(names) for names in SPLIT_NAMES.values())
    raise CorpusError(f"{value!r} is not a split, wanted {known}")


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Prefix a `CorpusError` with the name of the file, unless it has it already."""
    try:
        yield
    except CorpusError as error:
        if str(path) in str(error):
            raise
        raise CorpusError(f"{path}: {error}") from error


@dataclass(frozen=True, eq=False)
class Corpus:
    """Labelled or unlabelled utterances of M modalities on one time axis.

    Feature values may be non-finite, because the field's files hold NaN and −inf; they are not changed.

    Args:
        ids: (N,) distinct strings.
        features: modality -> (N, T, d_m) float32, right-padded with zeros; utterance vectors have T = 1.
        lengths: (N,) int64 in 0..T, the number of leading frames that are not padding.
        available: (N, M) bool in the order of ``features``; False where a modality is missing.
        target: None, or for task ``"single"`` (N,) int64 class indices with −100 for "no label", for ``"multi"``
            (N, C) float32 answers 0 or 1, for ``"distribution"`` (N, C) float32 rows that sum to 1. In these two, a
            row of NaN is "no label".
        classes: C class names, in the order of the target.
        task: ``"single"``, ``"multi"`` or ``"distribution"``.
        split: (N,) names of splits, as `split_name` reads them, or None. They are kept as ``"train"``, ``"valid"`` and
            ``"test"``.
        group: (N,) strings, the video or speaker that splits must not share, or None.
        extraction: how the features were made from recordings, as :func:`m3er_fast.recordings.extract` describes it;
            None for features from elsewhere.

    Raises:
        CorpusError: naming the argument, its value and what was wanted.
    """

    ids: np.ndarray
    features: dict[str, np.ndarray]
    lengths: np.ndarray
    available: np.ndarray
    target: np.ndarray | None
    classes: tuple[str, ...]
    task: str = "single"
    split: np.ndarray | None = None
    group: np.ndarray | None = None
    extraction: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_strings("ids", self.ids, None)
        rows = len(self.ids)
        names, counts = np.unique(self.ids.astype(object), return_counts=True)
        if rows and counts.max() > 1:
            raise CorpusError(f"ids must be distinct, but {names[counts.argmax()]!r} occurs {counts.max()} times")
        self._check_features(rows)
        if self.task not in TASKS:
            raise CorpusError(f"task must be one of {TASKS}, got {self.task!r}")
        if not isinstance(self.classes, tuple) or len(set(self.classes)) != len(self.classes):
            raise CorpusError(f"classes must be a tuple of distinct names, got {self.classes!r}")
        if self.target is not None:
            self._check_target(rows, self.target)
        if self.split is not None:
            _check_strings("split", self.split, rows)
            usual = {value: split_name(value) for value in np.unique(self.split.astype(object))}
            if any(value != name for value, name in usual.items()):
                split = np.array([usual[value] for value in self.split], dtype=object)
                object.__setattr__(self, "split", split)
        if self.group is not None:
            _check_strings("group", self.group, rows)

    def _check_features(self, rows: int) -> None:
        if not self.features:
            raise CorpusError("features must hold at least one modality")
        for name, value in self.features.items():
            if (
                not isinstance(value, np.ndarray)
                or value.dtype != np.float32
                or value.ndim != 3
                or 0 in value.shape[1:]
            ):
                raise CorpusError(
                    f"features[{name!r}] must be float32 of shape (N, T, d) with T, d ≥ 1, got {_describe(value)}"
                )
            if value.shape[:2] != (rows, self.steps):
                raise CorpusError(
                    f"features[{name!r}] must be of shape ({rows}, {self.steps}, d), got {_describe(value)}"
                )
        _check_array("lengths", self.lengths, np.int64, (rows,))
        wrong = (self.lengths < 0) | (self.lengths > self.steps)
        if wrong.any():
            row = int(wrong.argmax())
            raise CorpusError(f"lengths must lie in 0..{self.steps}, got {self.lengths[row]} for {self.ids[row]!r}")
        _check_array("available", self.available, np.bool_, (rows, len(self.features)))

    def _check_target(self, rows: int, target: np.ndarray) -> None:
        classes = len(self.classes)
        if self.task == "single":
            _check_array("target", target, np.int64, (rows,))
            wrong = (target != NO_LABEL) & ((target < 0) | (target >= classes))
            wanted = f"a class in 0..{classes - 1}, or {NO_LABEL} for no label"
        else:
            _check_array("target", target, np.float32, (rows, classes))
            if self.task == "multi":
                wrong = ((target != 0) & (target != 1)).any(axis=1)
                wanted = "answers of 0 or 1, or NaN throughout for no label"
            else:
                # Written so that NaN is wrong too.
                wrong = ~((target >= 0).all(axis=1) & (np.abs(target.sum(axis=1) - 1) < 1e-3))
                wanted = "probabilities that sum to 1, or NaN throughout for no label"
            wrong &= ~np.isnan(target).all(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise CorpusError(f"target of {self.ids[row]!r} is {target[row].tolist()}, wanted {wanted}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def input_dims(self) -> dict[str, int]:
        """Feature count of each modality, as the model takes it."""
        return {name: value.shape[2] for name, value in self.features.items()}

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modality names, in the order of the columns of ``available``."""
        return tuple(self.features)

    @property
    def steps(self) -> int:
        """T, the length of the padded time axis."""
        return int(next(iter(self.features.values())).shape[1])

    @property
    def labelled(self) -> np.ndarray:
        """(N,) bool: whether an utterance has a label."""
        if self.target is None:
            return np.zeros(len(self), dtype=bool)
        return np.asarray(self.target != NO_LABEL if self.task == "single" else ~np.isnan(self.target).all(axis=1))

    def select(self, rows: Any) -> Corpus:
        """Return the utterances at ``rows``: integer indices or a boolean mask."""
        return Corpus(
            ids=self.ids[rows],
            features={name: value[rows] for name, value in self.features.items()},
            lengths=self.lengths[rows],
            available=self.available[rows],
            target=None if self.target is None else self.target[rows],
            classes=self.classes,
            task=self.task,
            split=None if self.split is None else self.split[rows],
            group=None if self.group is None else self.group[rows],
            extraction=self.extraction,
        )

    def subset(self, split: str) -> Corpus:
        """Return the utterances of one split, possibly none.

        Raises:
            CorpusError: if the corpus has no splits, or ``split`` is not the name of one.
        """
        split = split_name(split)
        if self.split is None:
            raise CorpusError(f"this corpus has no splits, so no {split!r}: make them with split_by_group")
        return self.select(self.split == split)


def concatenate(corpora: Sequence[Corpus]) -> Corpus:
    """Join corpora of the same task and classes, one after the other.

    A modality that a part lacks is unavailable in its rows. Shorter time axes are padded with zeros. In a part without
    groups, every row becomes a group of its own. If the parts differ in modalities, the result has the usual order:
    text, audio, face.

    Raises:
        CorpusError: if the parts differ in task, classes, feature counts or extraction, or if only some have splits.
    """
    if not corpora:
        raise CorpusError("there is nothing to concatenate")
    first = corpora[0]
    names = list(dict.fromkeys(name for part in corpora for name in part.modalities))
    if any(part.modalities != first.modalities for part in corpora):
        names = order_modalities(names)
    dims: dict[str, int] = {}
    for part in corpora:
        if (part.task, part.classes) != (first.task, first.classes):
            raise CorpusError(f"parts differ in labels: {first.task} {first.classes} and {part.task} {part.classes}")
        for name, dim in part.input_dims.items():
            if dims.setdefault(name, dim) != dim:
                raise CorpusError(f"modality {name!r} has {dims[name]} features in one part and {dim} in another")
    if len({part.split is None for part in corpora}) > 1:
        raise CorpusError("only some of the parts have splits")
    if any(part.extraction != first.extraction for part in corpora):
        raise CorpusError("parts were extracted from recordings in different ways")
    steps = max(part.steps for part in corpora)
    rows = [len(part) for part in corpora]
    features = {name: np.zeros((sum(rows), steps, dims[name]), np.float32) for name in names}
    available = np.zeros((sum(rows), len(names)), dtype=bool)
    for part, start in zip(corpora, np.cumsum([0, *rows]), strict=False):
        stop = start + len(part)
        for column, name in enumerate(part.modalities):
            features[name][start:stop, : part.steps] = part.features[name]
            available[start:stop, names.index(name)] = part.available[:, column]
    return Corpus(
        ids=np.concatenate([part.ids.astype(object) for part in corpora]),
        features=features,
        lengths=np.concatenate([part.lengths for part in corpora]),
        available=available,
        target=_concatenate_targets(corpora),
        classes=first.classes,
        task=first.task,
        split=None if first.split is None else np.concatenate([np.asarray(p.split, object) for p in corpora]),
        group=None
        if all(part.group is None for part in corpora)
        else np.concatenate([(p.ids if p.group is None else p.group).astype(object) for p in corpora]),
        extraction=first.extraction,
    )


def order_modalities(names: Iterable[str]) -> list[str]:
    """Sort modality names in the field's order: text, audio, face (video, vision, visual), then all others by name."""
    known = {name: rank for rank, name in enumerate(_USUAL_ORDER)}
    return sorted(names, key=lambda name: (known.get(name, len(known)), name))


def _concatenate_targets(corpora: Sequence[Corpus]) -> np.ndarray | None:
    if all(part.target is None for part in corpora):
        return None
    return np.concatenate([unlabelled(part) if part.target is None else part.target for part in corpora])


def unlabelled(corpus: Corpus) -> np.ndarray:
    """Return a target that gives no utterance of a corpus a label."""
    if corpus.task == "single":
        return np.full(len(corpus), NO_LABEL)
    return np.full((len(corpus), len(corpus.classes)), np.nan, np.float32)


def _check_strings(name: str, value: Any, rows: int | None) -> None:
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "UO":
        raise CorpusError(f"{name} must be a one-dimensional array of strings, got {_describe(value)}")
    if rows is not None and len(value) != rows:
        raise CorpusError(f"{name} must have {rows} rows, got {len(value)}")
    if value.dtype.kind == "O":
        for item in value:
            if not isinstance(item, str):
                raise CorpusError(f"{name} must be strings, got {item!r}")


def _check_array(name: str, value: Any, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
        raise CorpusError(f"{name} must be {np.dtype(dtype)} of shape {shape}, got {_describe(value)}")


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
