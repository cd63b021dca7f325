"""The ``.csd`` files of the CMU Multimodal SDK (HDF5): one file per feature set, frames with their time intervals.

Layout: ``/<root>/data/<id>/features`` (n, d) and ``/intervals`` (n, 2) in seconds, ``/<root>/metadata/<key>`` of one
JSON string. Ids are ``video``, or ``video[k]`` once aligned to utterances. One file holds the labels of the utterances.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3er_fast._validation import check_positive_int
from m3er_fast.corpus._hdf5 import group_at, names_in, open_hdf5, read_array
from m3er_fast.corpus._labels import SENTIMENT, sentiment_classes, video_of
from m3er_fast.corpus._sequences import as_float32, finite_mean, right_pad
from m3er_fast.corpus.base import Corpus, CorpusError, naming, order_modalities, split_name
from m3er_fast.corpus.files import visible_files

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")

_GUESSES = {
    "text": ("glove", "word", "bert", "text"),
    "audio": ("covarep", "opensmile", "audio", "acoustic"),
    "face": ("facet", "openface", "face", "visual"),
}
# The SDK's metadata template lacks a comma, so some files have these two keys fused into one.
_DIMENSION_KEYS = ("dimension names", "dimension namescomputational sequence version")
_PAUSE = b"sp"


class _Sequences:
    """An open ``.csd`` file. Entries are read on demand: whole feature sets exceed the memory of most machines."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        roots = names_in(file, path)
        if not roots:
            raise CorpusError(f"{path}: has no root group")
        self.name = roots[0]
        root = group_at(file, roots[0], path)
        self._data = group_at(root, "data", path)
        self.ids = dict.fromkeys(names_in(self._data, path))
        if not self.ids:
            raise CorpusError(f"{path}: /{self.name}/data is empty")
        self.dimension_names = _dimension_names(root, path)
        self._latest: tuple[str, tuple[np.ndarray, np.ndarray]] | None = None
        # An entry without a frame does not say how many features a frame has.
        first = next((features for name in self.ids if len(features := self.entry(name)[0])), None)
        if first is None:
            raise CorpusError(f"{path}: none of its {len(self.ids)} entries has a frame")
        self.holds_words = first.dtype.kind == "O"
        self.width = 1 if self.holds_words else first.shape[1]

    def entry(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return features, (n, d) float32 or (n,) bytes, and intervals (n, 2) in seconds, in order of time.

        An entry whose features or intervals are an empty array, of any shape, has no frame: n = 0.
        """
        # The utterances of a video follow each other: with the latest entry cached, each entry is read once.
        if self._latest is None or self._latest[0] != name:
            group = group_at(self._data, name, self.path)
            where = f"{self.path}: features of {name!r}"
            features, intervals = (read_array(group, part, self.path) for part in ("features", "intervals"))
            if not features.size or not intervals.size:
                self._latest = (name, (np.zeros((0, 0), np.float32), np.zeros((0, 2))))
                return self._latest[1]
            features = _check_features(features, where)
            if intervals.shape != (len(features), 2) or intervals.dtype.kind not in "iuf":
                raise CorpusError(
                    f"{self.path}: intervals of {name!r} have shape {intervals.shape}, wanted ({len(features)}, 2)"
                )
            order = np.argsort(intervals[:, 0], kind="stable")
            self._latest = (name, (features[order], intervals[order].astype(np.float64)))
        return self._latest[1]

    def numbers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return `entry`, which must have as many features as the first entry."""
        features, intervals = self.entry(name)
        if len(features) and features.shape[1:] != (self.width,):
            raise CorpusError(f"{self.path}: {name!r} has features {features.shape}, wanted (n, {self.width})")
        return features, intervals


def read(
    source: Path | Sequence[Path],
    *,
    modalities: Mapping[str, str] | None = None,
    max_steps: int = 50,
    folds: Mapping[str, Sequence[str]] | None = None,
) -> Corpus:
    """Read ``.csd`` files as utterances on the time axis of their words.

    An utterance is one row of the label file. Its steps are its words, without pauses: the intervals of the word file,
    or of the text vectors if there is no word file. In every modality, the frames that overlap a word are averaged, and
    a word without frames gets a zero row. An utterance without words is cut into ``max_steps`` equal parts. A longer
    utterance keeps its first ``max_steps`` words. A modality without frames in an utterance is unavailable there. The
    group is the video.

    Label columns are identified by their dimension names, or by their number if there are none. Seven columns are
    sentiment and the six emotions of MOSEI, six are the emotions: multi-label, present when > 0. One column is
    sentiment, whose sign is the class. A row with a NaN among the columns that are read has no label.

    Args:
        source: a folder of ``.csd`` files, or the files.
        modalities: root name or file stem -> modality, overriding the guess from the name (GloVe: text, COVAREP and
            openSMILE: audio, FACET and OpenFace: face); ``"words"`` and ``"labels"`` name those two files.
        max_steps: T, the longest time axis kept.
        folds: split, as `split_name` reads it, -> videos, such as the SDK's standard folds; videos in no fold are left
            out. None gives no splits.

    Raises:
        CorpusError: naming the file and the part that is refused, missing or contradictory.
        ValueError: if ``max_steps`` is not a positive int, or a fold is no split.
    """
    check_positive_int("max_steps", max_steps)
    if folds is not None:
        with naming("folds"):
            folds = _usual_names(folds)
    files = visible_files(source, "*.csd") if isinstance(source, Path) and source.is_dir() else _listed(source)
    if not files:
        raise CorpusError(f"{source}: holds no .csd file")
    with ExitStack() as stack:
        sequences: dict[str, _Sequences] = {}
        for file in files:
            opened = _Sequences(file, stack.enter_context(open_hdf5(file)))
            name = _modality(opened, modalities or {})
            if name in sequences:
                raise CorpusError(
                    f"{file}: looks like {name}, as does {sequences[name].path.name}: name both in modalities"
                )
            sequences[name] = opened
        labels = sequences.pop("labels", None)
        if labels is None:
            raise CorpusError(f"{source}: no file is named labels, so there are no utterances")
        if not sequences.keys() - {"words"}:
            raise CorpusError(f"{source}: holds labels but no features")
        return _corpus(labels, sequences, max_steps, folds)


def _usual_names(folds: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    usual: dict[str, list[str]] = {}
    for name, videos in folds.items():
        usual.setdefault(split_name(name), []).extend(videos)
    return usual


def _listed(source: Path | Sequence[Path]) -> list[Path]:
    return [source] if isinstance(source, Path) else [Path(file) for file in source]


def _corpus(
    labels: _Sequences,
    sequences: dict[str, _Sequences],
    max_steps: int,
    folds: Mapping[str, Sequence[str]] | None,
) -> Corpus:
    """Align the features of every utterance that the labels name."""
    words = sequences.pop("words", None)
    for source in sequences.values():
        if source.holds_words:
            raise CorpusError(f"{source.path}: holds strings, wanted numbers")
    names = order_modalities(sequences)
    utterances, values = _utterances(labels)
    split_of = {video: split for split, videos in (folds or {}).items() for video in videos}
    if folds is not None:
        kept = [row for row, utterance in enumerate(utterances) if utterance.video in split_of]
        utterances, values = [utterances[row] for row in kept], values[kept]
    if not utterances:
        raise CorpusError(f"{labels.path}: holds no utterance" + (" of any fold" if folds is not None else ""))
    rows = [_align(utterance, sequences, words, max_steps) for utterance in utterances]
    lengths = np.array([len(next(iter(row.values()))[0]) for row in rows], dtype=np.int64)
    target, classes, task = _target(labels, values)
    with naming(labels.path):
        return Corpus(
            ids=np.array([utterance.id for utterance in utterances], dtype=object),
            features={
                name: right_pad([row[name][0] for row in rows], int(lengths.max()), sequences[name].width)
                for name in names
            },
            lengths=lengths,
            available=np.array([[row[name][1] for name in names] for row in rows]),
            target=target,
            classes=classes,
            task=task,
            split=None if folds is None else np.array([split_of[u.video] for u in utterances], dtype=object),
            group=np.array([utterance.video for utterance in utterances], dtype=object),
        )


def _check_features(features: np.ndarray, where: str) -> np.ndarray:
    if features.dtype.kind in "OS":
        return np.array([x.encode() if isinstance(x, str) else bytes(x) for x in features.reshape(-1)], dtype=object)
    if features.ndim == 1:
        features = features[:, None]
    if features.ndim != 2 or not features.shape[1]:
        raise CorpusError(f"{where} have shape {features.shape}, wanted (n, d)")
    return as_float32(features, where)


def _dimension_names(root: Any, path: Path) -> tuple[str, ...] | None:
    """Return the column names in the metadata, or None if they are missing or cannot be read."""
    if "metadata" not in names_in(root, path):
        return None
    metadata = group_at(root, "metadata", path)
    for key in _DIMENSION_KEYS:
        if key in names_in(metadata, path):
            try:
                names = json.loads(read_array(metadata, key, path).reshape(-1)[0])
            except (json.JSONDecodeError, UnicodeDecodeError, IndexError, TypeError):
                continue
            if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return None


def _modality(sequences: _Sequences, given: Mapping[str, str]) -> str:
    for name in (sequences.name, sequences.path.stem):
        if name in given:
            return given[name]
    for name in (sequences.name.lower(), sequences.path.stem.lower()):
        if "label" in name:
            return "labels"
        if sequences.holds_words:
            return "words"
        for modality, hints in _GUESSES.items():
            if any(hint in name.replace("_", "").replace(" ", "") for hint in hints):
                return modality
    raise CorpusError(f"{sequences.path}: no modality is known by the name {sequences.name!r}: name it in modalities")


@dataclass(frozen=True)
class _Utterance:
    """One row of the label file: the ids to look up in the other files, and the time interval."""

    id: str
    video: str
    start: float
    end: float

    def entry_in(self, sequences: _Sequences) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the (features, intervals) of this utterance, or None if there are none."""
        read_entry = sequences.entry if sequences.holds_words else sequences.numbers
        if self.id in sequences.ids:  # aligned: the entry is the utterance, whatever clock its intervals use
            features, intervals = read_entry(self.id)
        elif self.video in sequences.ids:
            features, intervals = read_entry(self.video)
            spoken = _overlapping(intervals, self.start, self.end)
            features, intervals = features[spoken], intervals[spoken]
        else:
            return None
        return (features, intervals) if len(features) else None


def _utterances(labels: _Sequences) -> tuple[list[_Utterance], np.ndarray]:
    """Return the utterances and their label values (N, columns)."""
    utterances, values = [], []
    for name in labels.ids:
        value, intervals = labels.numbers(name)
        aligned = re.fullmatch(r".*\[\d+\]", name) is not None
        if aligned and len(value) > 1:
            raise CorpusError(f"{labels.path}: {name!r} has {len(value)} labels, wanted one for an utterance")
        values.append(value.reshape(-1, labels.width))
        for row, (start, end) in enumerate(intervals):
            utterances.append(
                _Utterance(name, video_of(name), start, end)
                if aligned
                else _Utterance(f"{name}[{row}]", name, start, end)
            )
    return utterances, np.concatenate(values)


def _overlapping(intervals: np.ndarray, start: float, end: float) -> np.ndarray:
    """Return a mask of the intervals that share time with [start, end), counting points inside it."""
    return (intervals[:, 0] < end) & ((intervals[:, 1] > start) | (intervals[:, 0] >= start))


def _align(
    utterance: _Utterance, sequences: Mapping[str, _Sequences], words: _Sequences | None, max_steps: int
) -> dict[str, tuple[np.ndarray, bool]]:
    """Return (frames (L, d), available) of each modality on the utterance's steps."""
    axis = _steps(utterance, words or sequences.get("text"), max_steps)
    aligned = {}
    for name, source in sequences.items():
        entry = utterance.entry_in(source)
        frames = np.zeros((len(axis), source.width), np.float32)
        if entry is not None:
            features, intervals = entry
            for step, (start, end) in enumerate(axis):
                chosen = features[_overlapping(intervals, start, end)]
                if len(chosen):
                    frames[step] = finite_mean(chosen)
        aligned[name] = (frames, entry is not None)
    return aligned


def _steps(utterance: _Utterance, reference: _Sequences | None, max_steps: int) -> np.ndarray:
    """Return the intervals (L, 2) of an utterance's steps."""
    entry = None if reference is None else utterance.entry_in(reference)
    if entry is not None:
        spoken, intervals = entry
        if spoken.dtype.kind == "O":
            intervals = intervals[[word != _PAUSE for word in spoken]]
        if len(intervals):
            return intervals[:max_steps]
    edges = np.linspace(utterance.start, utterance.end, max_steps + 1)
    return np.column_stack([edges[:-1], edges[1:]])


def _target(labels: _Sequences, values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Return target, class names and task."""
    if labels.width == 1:
        return sentiment_classes(values[:, 0], str(labels.path)), SENTIMENT, "single"
    names = tuple(name.strip().lower() for name in labels.dimension_names or ())
    if len(names) != labels.width:
        names = {7: ("sentiment", *EMOTIONS), 6: EMOTIONS}.get(labels.width, ())
    emotions = [column for column, name in enumerate(names) if name != "sentiment"]
    if not emotions:
        raise CorpusError(f"{labels.path}: labels have {labels.width} columns without names, wanted 1, 6 or 7")
    scores = values[:, emotions]
    target = np.where(np.isnan(scores).any(axis=1, keepdims=True), np.float32(np.nan), scores > 0)
    return target.astype(np.float32), tuple(names[column] for column in emotions), "multi"
