"""The layout that the pickles of MMSA and MulT share: ``{train, valid, test}`` -> modalities, aligned or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3er_fast.corpus._sequences import as_float32, equal_parts, right_pad, trim_padding
from m3er_fast.corpus.base import SPLITS, CorpusError, split_name

DEFAULT_STEPS = 50
MODALITIES = ("text", "audio", "vision")


class Fold(NamedTuple):
    """One split of a pickle."""

    features: dict[str, np.ndarray]  # modality -> (N, T_m, d_m) float32
    fields: dict[str, Any]  # the whole dict of the split

    @property
    def rows(self) -> int:
        """N, at least 1."""
        return len(next(iter(self.features.values())))


def read_folds(data: Any, path: Path) -> dict[str, Fold]:
    """Return the splits of a loaded pickle that hold an utterance, in the usual order."""
    given = _by_split(data, path) if isinstance(data, dict) else {}
    if not given:
        raise CorpusError(f"{path}: wanted a dict with the keys {', '.join(SPLITS)}, got {_summary(data)}")
    folds = {}
    for split in SPLITS:
        fields = given.get(split)
        if fields is None:
            continue
        if not isinstance(fields, dict) or not any(name in fields for name in MODALITIES):
            raise CorpusError(f"{path}: {split}: wanted a dict with {', '.join(MODALITIES)}, got {_summary(fields)}")
        features = _sequences(fields, path, split)
        if features:
            folds[split] = Fold(features, fields)
    if not folds:
        raise CorpusError(f"{path}: holds no utterance")
    return folds


def _by_split(data: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Return the members whose key is the name of a split; others, such as notes on the data, are left out."""
    given: dict[str, Any] = {}
    for key, value in data.items():
        try:
            split = split_name(key)
        except CorpusError:
            continue
        if split in given:
            raise CorpusError(f"{path}: has several keys for {split}: {_summary(data)}")
        given[split] = value
    return given


def _sequences(fields: Mapping[str, Any], path: Path, split: str) -> dict[str, np.ndarray]:
    """Return the modalities of a split as float32 (N, T_m, d_m), with the same N for all; none if it has no rows."""
    features: dict[str, np.ndarray] = {}
    for name in MODALITIES:
        if fields.get(name) is None:
            continue
        value = as_float32(fields[name], f"{path}: {split}: {name}")
        if value.ndim != 3 or 0 in value.shape[1:]:
            if not len(value):
                continue
            raise CorpusError(f"{path}: {split}: {name} has shape {value.shape}, wanted (N, T, d)")
        features[name] = value
    if len({len(value) for value in features.values()}) > 1:
        rows = {name: len(value) for name, value in features.items()}
        raise CorpusError(f"{path}: {split}: modalities differ in rows: {rows}")
    return features if features and len(next(iter(features.values()))) else {}


def on_one_axis(
    features: Mapping[str, np.ndarray], known_lengths: Mapping[str, np.ndarray], steps: int | None
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Bring all modalities of a split onto one time axis.

    Modalities with equal T and no lengths of their own are aligned already: only padding is trimmed. Otherwise the
    valid frames of each modality are cut into S equal parts and averaged over each part. S is ``steps`` if given, else
    the number of the utterance's text frames, else 50.

    Args:
        features: modality -> (N, T_m, d_m).
        known_lengths: modality -> (N,) leading valid frames, for modalities whose lengths the file states.
        steps: number of parts, or None for the number of text frames.

    Returns:
        The features (N, T, d_m), lengths (N,) and availability (N, M).
    """
    if steps is None and not known_lengths and len({value.shape[1] for value in features.values()}) == 1:
        return trim_padding(features)
    frames = {name: _valid_frames(value, known_lengths.get(name)) for name, value in features.items()}
    rows = len(next(iter(features.values())))
    available = np.array([[len(frames[name][row]) > 0 for name in features] for row in range(rows)])
    lengths = np.zeros(rows, dtype=np.int64)
    for row in range(rows):
        if available[row].any():
            words = len(frames["text"][row]) if steps is None and "text" in frames else 0
            lengths[row] = words or steps or DEFAULT_STEPS
    total = max(1, int(lengths.max()))
    resampled = {
        name: right_pad(
            [equal_parts(x, int(length)) if len(x) else x for x, length in zip(frames[name], lengths, strict=True)],
            total,
            value.shape[2],
        )
        for name, value in features.items()
    }
    return resampled, lengths, available


def _valid_frames(value: np.ndarray, lengths: np.ndarray | None) -> list[np.ndarray]:
    """Return the (L, d) valid frames of each row; a row of zeros has none."""
    if lengths is None:
        trimmed, lengths, _ = trim_padding({"": value})
        value = trimmed[""]
    return [
        sequence[:length] if (sequence[:length] != 0).any() else sequence[:0]
        for sequence, length in zip(value, lengths, strict=True)
    ]


def _summary(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(map(repr, list(value)[:8])) or 'none'}"
    return f"a {type(value).__name__}"
