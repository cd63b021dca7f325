"""An audit of a corpus: its content, and everything suspicious in it. It needs no model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from m3er_fast.corpus.base import SPLITS, Corpus

_NO_SPLIT = "all"


@dataclass(frozen=True)
class ModalityAudit:
    """Counts and shares of one modality; shares lie in 0..1, and a share of nothing is NaN."""

    features: int
    unavailable: dict[str, float]  # split -> share of its utterances
    non_finite: float  # share of the values in valid frames
    zero_frames: float  # share of the valid frames that are zero throughout
    constant_features: tuple[int, ...]  # features with one value in all valid frames of train


@dataclass(frozen=True)
class AuditReport:
    """The result of `audit_corpus`; ``warnings`` lists in words everything suspicious."""

    utterances: int
    splits: dict[str, int]  # split -> utterances; "all" if the corpus has none
    task: str
    steps: int
    length_quantiles: dict[str, float]  # min, 25 %, median, 75 %, max, in frames
    empty: int  # utterances of length 0
    modalities: dict[str, ModalityAudit]
    labels: dict[str, dict[str, float]]  # split -> class -> utterances (or the sum of answers or probabilities)
    unlabelled: int
    shared_groups: tuple[str, ...]  # groups in more than one split
    duplicates: tuple[tuple[str, ...], ...]  # ids of utterances with equal frames
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values; an undefined share is None."""
        plain: dict[str, Any] = _jsonable(asdict(self))
        return plain

    def to_text(self) -> str:
        """Return the report as lines to print."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.utterances} utterances: " + ", ".join(f"{count} {name}" for name, count in self.splits.items())
        quantiles = ", ".join(f"{name} {value:g}" for name, value in self.length_quantiles.items())
        yield f"lengths of at most {self.steps} frames: {quantiles}; {self.empty} empty"
        for name, audit in self.modalities.items():
            missing = ", ".join(f"{share:.1%} of {split}" for split, share in audit.unavailable.items())
            yield (
                f"{name}: {audit.features} features, unavailable in {missing}; {audit.non_finite:.2%} of values not "
                f"finite, {audit.zero_frames:.1%} of frames zero, {len(audit.constant_features)} features constant"
            )
        for split, counts in self.labels.items():
            yield f"labels of {split} ({self.task}): " + ", ".join(f"{n} {count:g}" for n, count in counts.items())
        yield from (f"warning: {warning}" for warning in self.warnings)
        if not self.warnings:
            yield "nothing suspicious"


def audit_corpus(corpus: Corpus) -> AuditReport:
    """Count the content of a corpus and list everything suspicious in it.

    Args:
        corpus: any corpus, with or without labels, splits and groups.
    """
    split = np.full(len(corpus), _NO_SPLIT, dtype=object) if corpus.split is None else corpus.split
    masks = {name: split == name for name in (*SPLITS, _NO_SPLIT) if (split == name).any()}
    fitting = masks.get("train", np.ones(len(corpus), dtype=bool))
    modalities = {name: _audit_modality(corpus, name, masks, fitting) for name in corpus.modalities}
    labels = {name: _label_counts(corpus, mask) for name, mask in masks.items()} if corpus.target is not None else {}
    quantiles = np.quantile(corpus.lengths, (0, 0.25, 0.5, 0.75, 1)) if len(corpus) else np.zeros(5)
    report = AuditReport(
        utterances=len(corpus),
        splits={name: int(mask.sum()) for name, mask in masks.items()},
        task=corpus.task,
        steps=corpus.steps,
        length_quantiles=dict(zip(("min", "25%", "median", "75%", "max"), map(float, quantiles), strict=True)),
        empty=int((corpus.lengths == 0).sum()),
        modalities=modalities,
        labels=labels,
        unlabelled=int((~corpus.labelled).sum()),
        shared_groups=_shared_groups(corpus, masks),
        duplicates=_duplicates(corpus),
        warnings=(),
    )
    return AuditReport(**{**report.__dict__, "warnings": tuple(_warnings(report))})


def _audit_modality(corpus: Corpus, name: str, masks: dict[str, np.ndarray], fitting: np.ndarray) -> ModalityAudit:
    present = corpus.available[:, corpus.modalities.index(name)]
    valid = (np.arange(corpus.steps) < corpus.lengths[:, None]) & present[:, None]
    value = corpus.features[name]
    frames = value[valid]  # (frames, d)
    trained = value[valid & fitting[:, None]]
    constant = np.flatnonzero((trained == trained[:1]).all(axis=0)) if len(trained) > 1 else np.zeros(0, dtype=int)
    return ModalityAudit(
        features=value.shape[2],
        unavailable={split: _share((~present)[mask]) for split, mask in masks.items()},
        non_finite=_share(~np.isfinite(frames)),
        zero_frames=_share((frames == 0).all(axis=1)),
        constant_features=tuple(constant.tolist()),
    )


def _share(mask: np.ndarray) -> float:
    return float(mask.mean()) if mask.size else math.nan


def _label_counts(corpus: Corpus, mask: np.ndarray) -> dict[str, float]:
    if corpus.target is None:
        return {}
    target = corpus.target[mask & corpus.labelled]
    if corpus.task == "single":
        counts = np.bincount(target, minlength=len(corpus.classes))
    else:
        counts = target.sum(axis=0, dtype=np.float64)
    return dict(zip(corpus.classes, map(float, counts), strict=True))


def _shared_groups(corpus: Corpus, masks: dict[str, np.ndarray]) -> tuple[str, ...]:
    if corpus.group is None:
        return ()
    seen = [set(corpus.group[mask]) for mask in masks.values()]
    return tuple(sorted(group for group in set().union(*seen) if sum(group in names for names in seen) > 1))


def _duplicates(corpus: Corpus) -> tuple[tuple[str, ...], ...]:
    """Return the ids of utterances whose valid frames are equal in every modality, except empty utterances."""
    found: dict[bytes, list[str]] = {}
    for row in np.flatnonzero(corpus.lengths > 0):
        digest = hashlib.blake2b(corpus.available[row].tobytes(), digest_size=16)
        for column, value in enumerate(corpus.features.values()):
            if corpus.available[row, column]:
                digest.update(value[row, : corpus.lengths[row]].tobytes())
        if corpus.available[row].any():
            found.setdefault(digest.digest(), []).append(str(corpus.ids[row]))
    return tuple(tuple(ids) for ids in found.values() if len(ids) > 1)


def _warnings(report: AuditReport) -> Iterator[str]:
    if not report.utterances:
        yield "the corpus is empty"
        return
    if _NO_SPLIT in report.splits:
        yield "there are no splits"
    else:
        for split in SPLITS:
            if split not in report.splits:
                yield f"split {split} is empty"
    if report.empty:
        yield f"{report.empty} utterances have no frame"
    for name, audit in report.modalities.items():
        for split, share in audit.unavailable.items():
            if share == 1:
                yield f"{name} is missing throughout {split}"
            elif share > 0.5:
                yield f"{name} is unavailable in {share:.0%} of {split}"
        if audit.non_finite > 0:
            yield f"{name} holds values that are not finite ({audit.non_finite:.2%})"
        if audit.zero_frames > 0.5:
            yield f"{audit.zero_frames:.0%} of the frames of {name} are zero"
        if audit.constant_features:
            yield f"{len(audit.constant_features)} of {audit.features} features of {name} are constant"
    if report.unlabelled:
        yield f"{report.unlabelled} utterances have no label"
    for split, counts in report.labels.items():
        absent = [name for name, count in counts.items() if count == 0]
        if absent:
            yield f"no utterance of {split} has the label {', '.join(absent)}"
    if report.shared_groups:
        shown = ", ".join(report.shared_groups[:5]) + (", ..." if len(report.shared_groups) > 5 else "")
        yield f"{len(report.shared_groups)} groups are in more than one split: {shown}"
    if report.duplicates:
        shown = " = ".join(report.duplicates[0][:3])
        yield f"{len(report.duplicates)} sets of utterances have the same frames, such as {shown}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
