"""Scores of a classifier as the paper's Table 2 reports them, with support, and the helpers that a report needs.

Dimension legend: N samples, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._answer_counts import AnswerCounts, Reliability
from m3er_fast._validation import check_choice
from m3er_fast.inputs import Array

__all__ = [
    "ClassScores",
    "ClassificationReport",
    "Reliability",
    "auroc",
    "classification_report",
    "count_answers",
    "mean_std",
]

IGNORE_INDEX = -100
TASKS = ("single", "multi", "distribution")
ROUNDING = 1e-2  # how far a row of half-precision probabilities may sum away from one


@dataclass(frozen=True)
class ClassScores:
    """One pair of columns of Table 2: the scores of one class against the rest, or of "Overall"."""

    name: str
    support: int
    """Number of samples of the class; for "Overall", of all samples."""
    f1: float
    """F1 of "this class" against "not this class", 2·TP / (2·TP + FP + FN); 0 if the class neither occurs nor is
    predicted."""
    mean_accuracy: float
    """Table 2's MA: (TP + TN) / N, the share of correct answers to "is it this class?"."""


@dataclass(frozen=True)
class ClassificationReport:
    """The scores from `classification_report`; every number is finite."""

    task: str
    per_class: tuple[ClassScores, ...]
    overall: ClassScores
    """Unweighted mean of ``per_class`` over the classes that occur in the target."""
    accuracy: float
    """Share of samples with the correct class; in task "multi", with every question answered correctly."""
    balanced_accuracy: float
    """Mean recall over the classes that occur. In task "multi", the mean of (recall of "yes" + recall of "no") / 2 over
    them, which CMU-MOSEI calls weighted accuracy."""
    confusion: tuple[tuple[int, ...], ...] | None
    """A row per true class and a column per predicted class; None in task "multi"."""
    cross_entropy: float | None
    """Mean of −Σ t·log p in nats, with p at least the smallest normal float32; None unless task is "distribution"."""
    jensen_shannon: float | None
    """Mean Jensen-Shannon divergence in nats, 0 to log 2; None unless task is "distribution"."""

    calibration: Reliability
    """How far the confidence of the answers can be believed."""
    before_calibration: Reliability | None
    """The same of the probabilities before calibration; None if they were not given."""

    @property
    def accuracy_name(self) -> str:
        """What ``accuracy`` is called: "exact match" if it wants several questions answered correctly at once."""
        return "exact match" if self.task == "multi" else "accuracy"

    @classmethod
    def of_counts(cls, counts: AnswerCounts) -> ClassificationReport:
        """Return the scores that follow from counts.

        Raises:
            ValueError: if there is no sample, or no class that occurs.
        """
        if not counts.rows:
            raise ValueError("there must be at least one sample with a label to score")
        n, is_multi = counts.rows, counts.task == "multi"
        hits, support, answered = counts.hits, counts.support, counts.answered
        occurs = support > 0
        if not occurs.any():
            raise ValueError("target must hold at least one class to score, but no class occurs in it")
        # Counted here, not by scikit-learn: it reads answers of shape (N, 1) as labels of two classes, warns of a
        # confusion matrix of one class, and has no MA.
        f1 = 2 * hits / (support + answered).clip(min=1)
        rejected = n - support - answered + hits  # neither of the class nor predicted to be
        mean_accuracy = (hits + rejected) / n
        recall = hits / support.clip(min=1)
        if is_multi:
            negatives = n - support
            recall = np.where(negatives > 0, (recall + rejected / negatives.clip(min=1)) / 2, recall)
        per_class = zip(counts.classes, support, f1, mean_accuracy, strict=True)
        is_distribution = counts.task == "distribution"
        return cls(
            task=counts.task,
            per_class=tuple(ClassScores(name, int(s), float(f), float(ma)) for name, s, f, ma in per_class),
            overall=ClassScores("Overall", n, float(f1[occurs].mean()), float(mean_accuracy[occurs].mean())),
            accuracy=counts.exact / n,
            balanced_accuracy=float(recall[occurs].mean()),
            confusion=None if is_multi else tuple(tuple(row) for row in counts.confusion.tolist()),
            cross_entropy=counts.cross_entropy / n if is_distribution else None,
            jensen_shannon=counts.jensen_shannon / n if is_distribution else None,
            calibration=counts.bins.reliability(),
            before_calibration=None if counts.uncalibrated is None else counts.uncalibrated.reliability(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers, ready for JSON.

        ``accuracy`` has the key "exact_match" in task "multi".
        """
        report: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {self.accuracy_name.replace(" ", "_") if key == "accuracy" else key: v for key, v in report.items()}

    def to_markdown(self) -> str:
        """Return a table in Table 2's number formats, a row per class and one for "Overall", and other scores below."""
        lines = ["| Class | Support | F1 | MA |", "|---|---:|---:|---:|"]
        lines += [
            f"| {row.name.replace('|', chr(92) + '|')} | {row.support} | {row.f1:.3f} | {row.mean_accuracy:.1%} |"
            for row in (*self.per_class, self.overall)
        ]
        further = [f"{self.accuracy_name.capitalize()} {self.accuracy:.1%}"]
        further.append(f"balanced accuracy {self.balanced_accuracy:.1%}")
        before = "" if self.before_calibration is None else f" ({self.before_calibration.ece:.3f} before calibration)"
        further.append(f"ECE {self.calibration.ece:.3f}{before}")
        if self.cross_entropy is not None:
            further.append(f"cross entropy {self.cross_entropy:.3f} nats")
        if self.jensen_shannon is not None:
            further.append(f"Jensen-Shannon divergence {self.jensen_shannon:.3f} nats")
        return "\n".join([*lines, "", ", ".join(further) + "."])


def classification_report(
    probabilities: Array,
    target: Array,
    classes: Sequence[str],
    *,
    task: str | None = None,
    uncalibrated: Array | None = None,
) -> ClassificationReport:
    """Score predictions: F1, MA and support of each class, means over classes, accuracy, divergences and calibration.

    Table 2 prints F1 and MA of every class without defining them. Here both score the question "is it this class?",
    asked of all N samples: F1 of the answer "yes", and MA = (TP + TN) / N. MA is therefore not recall, whose mean over
    classes is reported as balanced accuracy. A rare class has a high MA whatever is predicted: read it beside the
    support. If every sample has one label and every class occurs, the overall MA is 1 − 2·(1 − accuracy) / C.

    A class that does not occur in the target has support 0, keeps its row, and is left out of every mean over classes.

    Args:
        probabilities: (N, C) tensor or array in [0, 1]. In task "multi" each column is the probability of "yes", and
            0.5 or more means yes. Otherwise the largest entry of a row is the prediction, the first one in a tie.
        target: (N,) integers in 0..C−1, where −100 leaves the sample out (task "single"); (N, C) zeros and ones
            ("multi"); or (N, C) rows that sum to one, whose largest entry is the true class ("distribution").
        classes: the C class names in the order of the columns.
        task: "single", "multi" or "distribution". None infers it from the target: one dimension is "single", zeros and
            ones alone are "multi", anything else is "distribution". Name the task if distributions may all be one-hot.
        uncalibrated: (N, C) probabilities before calibration, whose reliability is reported beside the other.

    Raises:
        ValueError: if there is no sample or no class to score, if shapes, ranges or class names are wrong, or if a
            value is not finite.

    Example:
        >>> report = classification_report([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 1, 1], ["no", "yes"])
        >>> report.per_class[1]
        ClassScores(name='yes', support=2, f1=0.6666666666666666, mean_accuracy=0.6666666666666666)
    """
    counts = count_answers(probabilities, target, classes, task=task, uncalibrated=uncalibrated)
    if not counts.rows:
        raise ValueError(f"target must label at least one sample to score, but every label is {IGNORE_INDEX}")
    return ClassificationReport.of_counts(counts)


def count_answers(
    probabilities: Array,
    target: Array,
    classes: Sequence[str],
    *,
    task: str | None = None,
    uncalibrated: Array | None = None,
) -> AnswerCounts:
    """Return the counts behind :func:`classification_report`, which checks its arguments here.

    Counts of several calls with the same classes and task add up by ``merge``.
    """
    names = _check_classes(classes)
    p, t = _check_probabilities("probabilities", probabilities, len(names)), _as_array(target)
    if len(p) == 0:
        raise ValueError("probabilities must hold at least one sample to score, got none")
    before = None if uncalibrated is None else _check_probabilities("uncalibrated", uncalibrated, len(names))
    if before is not None and before.shape != p.shape:
        raise ValueError(f"uncalibrated must have the shape of probabilities, {p.shape}, got {before.shape}")
    task = _infer_task(t) if task is None else task
    check_choice("task", task, TASKS)
    if task == "single":
        t = _check_labels(t, len(p), len(names))
        kept = t != IGNORE_INDEX
        p, t, before = p[kept], t[kept], None if before is None else before[kept]
    else:
        t = _check_rows(t, p.shape, task)
    return AnswerCounts(task, names).add(p, t, before)


def auroc(scores: Any, positives: Any) -> float:
    """Return the area under the ROC curve: the chance that a positive scores above a negative, a tie counting half.

    Args:
        scores: (N,) real numbers or ±inf; only their order counts.
        positives: (N,) booleans.

    Raises:
        ValueError: if the shapes differ, a score is NaN, or there are no positives or no negatives.
    """
    from sklearn.metrics import roc_auc_score

    s, positive = _as_array(scores), _as_array(positives)
    if s.ndim != 1 or positive.shape != s.shape or positive.dtype != np.bool_:
        raise ValueError(
            f"scores (N,) and boolean positives (N,) must agree, got {s.shape} and {positive.dtype} {positive.shape}"
        )
    if np.isnan(s).any():
        raise ValueError("scores must not be NaN")
    if positive.all() or not positive.any():
        raise ValueError(f"positives must hold both True and False, got {int(positive.sum())} True of {len(positive)}")
    ranks = np.unique(s, return_inverse=True)[1]  # scikit-learn refuses infinite scores; ranks are finite
    return float(roc_auc_score(positive, ranks))


def mean_std(values: Iterable[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (ddof = 1), which is None for a single value.

    Raises:
        ValueError: if there is no value or one is not finite.
    """
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values must be one or more finite numbers, got {array.tolist()}")
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None


def _as_array(value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # NumPy has no bfloat16
    return np.asarray(value)


def _check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(classes)
    if not names or isinstance(classes, str) or len(set(names)) != len(names):
        raise ValueError(f"classes must be one or more distinct names, got {classes!r}")
    return names


def _check_probabilities(name: str, probabilities: Array, num_classes: int) -> NDArray[np.float64]:
    p = _as_array(probabilities)
    if p.ndim != 2 or p.shape[1] != num_classes or p.dtype.kind != "f":
        raise ValueError(f"{name} must be floats of shape (N, {num_classes}), got {p.dtype} of shape {p.shape}")
    if not ((p >= 0) & (p <= 1 + ROUNDING)).all():
        raise ValueError(f"{name} must be finite and lie in [0, 1]: logits need a softmax or sigmoid first")
    return p.astype(np.float64)


def _infer_task(target: NDArray[Any]) -> str:
    if target.ndim == 1:
        return "single"
    return "multi" if np.isin(target, (0, 1)).all() else "distribution"


def _check_labels(target: NDArray[Any], count: int, num_classes: int) -> NDArray[np.int64]:
    if target.shape != (count,) or target.dtype.kind not in "iu":
        raise ValueError(f"target must be integers of shape ({count},), got {target.dtype} of shape {target.shape}")
    unknown = (target != IGNORE_INDEX) & ((target < 0) | (target >= num_classes))
    if unknown.any():
        raise ValueError(f"target must lie in 0..{num_classes - 1} or be {IGNORE_INDEX}, got {int(target[unknown][0])}")
    return target.astype(np.int64)


def _check_rows(target: NDArray[Any], shape: tuple[int, ...], task: str) -> NDArray[np.float64]:
    if target.shape != shape or target.dtype.kind not in "biuf":
        raise ValueError(f"target must be numbers of shape {shape}, got {target.dtype} of shape {target.shape}")
    rows = target.astype(np.float64)
    if task == "multi":
        if not np.isin(rows, (0, 1)).all():
            raise ValueError("target of task 'multi' must hold 0 and 1 only")
    elif not np.isfinite(rows).all() or (rows < 0).any() or (abs(rows.sum(axis=1) - 1) > ROUNDING).any():
        raise ValueError("target of task 'distribution' must be finite, not negative, and sum to one in every row")
    return rows
