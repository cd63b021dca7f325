"""Scores of a model on a whole corpus: by split, class and group, clean and under corruptions.

Dimension legend: N utterances.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3er_fast.atomic_files import replacing
from m3er_fast.corpus.base import Corpus
from m3er_fast.corruption import KINDS, named, takes_groups
from m3er_fast.evaluation import Prediction, corrupt_corpus, evaluate, labels_of
from m3er_fast.evaluation_page import render
from m3er_fast.fusion import M3ERFusion
from m3er_fast.metrics import ClassificationReport, classification_report

WHOLE = "all"
"""The name of the only split of a corpus without splits."""

_MOST_GROUPS = 10  # of a split, in the Markdown


@dataclass(frozen=True)
class GroupScores:
    """The scores of the labelled utterances of one group."""

    name: str
    utterances: int
    f1: float
    mean_accuracy: float
    accuracy: float
    """Exact match, if the corpus asks several questions."""
    balanced_accuracy: float
    ece: float
    ece_by_chance: float


@dataclass(frozen=True)
class SplitScores:
    """The scores of the labelled utterances of one split."""

    split: str
    report: ClassificationReport
    abstained: float
    """Share of utterances in which no modality was effective; they count like all others."""
    groups: tuple[GroupScores, ...]
    """In the order of their names; empty if the corpus has no groups."""


@dataclass(frozen=True)
class Condition:
    """The scores under one corruption."""

    corruption: str | None
    """Its name; None: clean."""
    splits: tuple[SplitScores, ...]

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return self.corruption or "clean"


@dataclass(frozen=True)
class CorpusEvaluation:
    """The scores from `evaluate_corpus`, the clean ones first."""

    classes: tuple[str, ...]
    conditions: tuple[Condition, ...]
    left_out: dict[str, str]
    """Corruptions that this corpus does not allow, and why."""
    temperature: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        from m3er_fast import __version__

        return {
            "version": __version__,
            "classes": list(self.classes),
            "temperature": self.temperature,
            "seed": self.seed,
            "conditions": [
                {
                    "corruption": condition.corruption,
                    "splits": [
                        {
                            "split": scores.split,
                            "report": scores.report.to_dict(),
                            "abstained": scores.abstained,
                            "groups": [dataclasses.asdict(group) for group in scores.groups],
                        }
                        for scores in condition.splits
                    ],
                }
                for condition in self.conditions
            ],
            "left_out": self.left_out,
        }

    def to_markdown(self) -> str:
        """Return tables: all conditions and splits, and for each split its classes and worst groups, clean."""
        clean = self.conditions[0]
        parts = [self._overview()]
        for scores in clean.splits:
            parts += [f"Split {scores.split}, clean:", scores.report.to_markdown()]
            parts += [_groups_table(scores)] if scores.groups else []
        parts += [f"Left out: {name}, because {reason}." for name, reason in self.left_out.items()]
        return "\n\n".join(parts)

    def _overview(self) -> str:
        accuracy = self.conditions[0].splits[0].report.accuracy_name.capitalize()
        lines = [
            f"| Corruption | Split | Utterances | F1 | MA | {accuracy} | Balanced accuracy | ECE | ECE before |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for condition in self.conditions:
            for split, report in ((scores.split, scores.report) for scores in condition.splits):
                before = "–" if report.before_calibration is None else f"{report.before_calibration.ece:.3f}"
                lines.append(
                    f"| {condition.name} | {split} | {report.overall.support} | {report.overall.f1:.3f} | "
                    f"{report.overall.mean_accuracy:.1%} | {report.accuracy:.1%} | {report.balanced_accuracy:.1%} | "
                    f"{report.calibration.ece:.3f} | {before} |"
                )
        return "\n".join(lines)

    def write(self, folder: str | Path) -> None:
        """Write evaluation.json, evaluation.md and evaluation.html, and reliability.png if matplotlib is installed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = self.to_dict()
        for name, content in (
            ("evaluation.json", json.dumps(values, indent=2)),
            ("evaluation.md", self.to_markdown()),
            ("evaluation.html", render(values)),
        ):
            with replacing(folder / name) as partial:
                partial.write_text(content + "\n", encoding="utf-8")
        try:
            from m3er_fast.plots import plot_reliability
        except ImportError:  # the picture needs an extra; the other files hold the same numbers
            return
        last = {condition.name: condition.splits[-1].report.to_dict() for condition in self.conditions[:2]}
        plot_reliability(last, folder / "reliability.png")


def evaluate_corpus(
    model: M3ERFusion,
    corpus: Corpus,
    *,
    corruptions: Sequence[str] = tuple(KINDS),
    splits: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> CorpusEvaluation:
    """Score a model on every split of a corpus, clean and under corruptions, with its check and proxies.

    Args:
        model: fitted, if it has a check.
        corpus: with labels, and with the model's modalities and classes.
        corruptions: kinds by name, as for :func:`m3er_fast.corruption.named`. The paper's is ``gaussian_noise``. One
            that needs groups is left out of a corpus without them.
        splits: those to score; None takes all that have labels.
        seed: decides which modalities of which utterances are corrupted, and how; the same for every corruption.
        progress: called with a line of text before every condition.

    Raises:
        ValueError: if the corpus does not fit the model, has no labels, or lacks a split that was asked for; or if
            there is no such corruption.
        NotFittedError: if the model has a check that is not fitted.
    """
    for name in corruptions:
        named(name, argument="corruptions")
    parts = _parts(corpus, splits)
    rows = np.sort(np.concatenate(list(parts.values())))
    kept = corpus.select(rows)
    parts = {name: np.searchsorted(rows, part) for name, part in parts.items()}
    needs_groups = [name for name in corruptions if corpus.group is None and takes_groups(named(name))]
    left_out = dict.fromkeys(needs_groups, "it needs groups, which the corpus does not have")
    conditions = []
    allowed: list[str | None] = [name for name in corruptions if name not in left_out]
    for kind in [None, *allowed]:
        if progress is not None:
            progress(f"scoring {len(kept)} utterances, {kind or 'clean'}")
        given = kept if kind is None else corrupt_corpus(model, kept, seed, corruption=kind)[0]
        prediction = evaluate(model, given)
        scores = tuple(_score_split(split, kept, prediction, part) for split, part in parts.items())
        conditions.append(Condition(kind, scores))
    return CorpusEvaluation(
        classes=corpus.classes,
        conditions=tuple(conditions),
        left_out=left_out,
        temperature=model.calibration.temperature.item(),
        seed=seed,
    )


def _parts(corpus: Corpus, wanted: Sequence[str] | None) -> dict[str, NDArray[np.int64]]:
    """Return the labelled rows of each split."""
    labels_of(corpus)
    if corpus.split is None:
        names, split = [WHOLE], np.full(len(corpus), WHOLE)
    else:
        split = corpus.split
        names = [name for name in ("train", "valid", "test") if (split == name).any()]
    missing = [name for name in wanted or () if name not in names]
    if missing:
        raise ValueError(f"splits: the corpus has {', '.join(names)}, but not {', '.join(missing)}")
    rows = {name: np.flatnonzero((split == name) & corpus.labelled) for name in (wanted or names)}
    found = {name: part for name, part in rows.items() if len(part)}
    if not found:
        raise ValueError("the corpus has no labelled utterance to score")
    return found


def _score_split(split: str, corpus: Corpus, prediction: Prediction, rows: NDArray[np.int64]) -> SplitScores:
    report = _report(corpus, prediction, rows)
    return SplitScores(
        split=split,
        report=report,
        abstained=float(prediction.abstained[rows].mean()),
        groups=tuple(_score_groups(corpus, prediction, rows)),
    )


def _score_groups(corpus: Corpus, prediction: Prediction, rows: NDArray[np.int64]) -> Iterator[GroupScores]:
    if corpus.group is None:
        return
    names, number = np.unique(corpus.group[rows].astype(str), return_inverse=True)
    order = np.argsort(number, kind="stable")
    for name, part in zip(names, np.split(rows[order], np.bincount(number).cumsum()[:-1]), strict=True):
        try:
            report = _report(corpus, prediction, part)
        except ValueError:  # no question has a yes
            continue
        yield GroupScores(
            name=str(name),
            utterances=len(part),
            f1=report.overall.f1,
            mean_accuracy=report.overall.mean_accuracy,
            accuracy=report.accuracy,
            balanced_accuracy=report.balanced_accuracy,
            ece=report.calibration.ece,
            ece_by_chance=report.calibration.ece_by_chance,
        )


def _report(corpus: Corpus, prediction: Prediction, rows: NDArray[np.int64]) -> ClassificationReport:
    before = prediction.uncalibrated
    return classification_report(
        prediction.probabilities[rows],
        labels_of(corpus)[rows],
        corpus.classes,
        task=corpus.task,
        uncalibrated=None if before is None else before[rows],
    )


def _groups_table(scores: SplitScores) -> str:
    worst = sorted(scores.groups, key=lambda group: (group.accuracy, group.name))[:_MOST_GROUPS]
    name = scores.report.accuracy_name.capitalize()
    lines = [f"| Group | Utterances | F1 | MA | {name} | ECE |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {group.name.replace('|', chr(92) + '|')} | {group.utterances} | {group.f1:.3f} | "
        f"{group.mean_accuracy:.1%} | {group.accuracy:.1%} | {group.ece:.3f} |"
        for group in worst
    ]
    rest = len(scores.groups) - len(worst)
    note = f"\n\nThe {len(worst)} groups with the lowest {scores.report.accuracy_name}; {rest} more." if rest else ""
    return "\n".join(lines) + note
