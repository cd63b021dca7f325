"""Counts of right and wrong answers, from which every score of a classifier follows.

Counts of parts of a corpus add up to those of the whole, so that no part need be kept.

Dimension legend: N samples, C classes, B bins of confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Bins of confidence, of equal width, as Guo et al. 2017 have them."""


@dataclass(frozen=True)
class Reliability:
    """How far confidence can be believed: the numbers of a reliability diagram.

    An answer's confidence is the probability of the predicted class or, of a yes/no question, that of the answer given.
    Bin i of the 15 holds confidences in (i/15, (i+1)/15], where i counts from 0.
    """

    ece: float
    """Expected calibration error, Σ n_i/n · abs(accuracy_i − confidence_i) over bins of n_i answers (Guo et al. 2017,
    arXiv 1706.04599)."""
    ece_by_chance: float
    """Error expected of as many answers whose confidences are exactly right, by the normal approximation in every bin:
    sqrt(2/π) · Σ_i sqrt(Σ c·(1 − c)) / n, over confidences c. An ``ece`` no larger than this shows no error."""
    mean_confidence: float
    answers: tuple[int, ...]
    """Answers per bin."""
    confidence: tuple[float | None, ...]
    """Mean confidence per bin; None in an empty bin."""
    accuracy: tuple[float | None, ...]
    """Share of right answers per bin; None in an empty bin."""


class ConfidenceBins:
    """Sums over the answers in every bin of confidence."""

    def __init__(self) -> None:
        self._sums = np.zeros((4, BINS))  # answers, confidence c, right answers, c · (1 - c)

    def add(self, confidence: NDArray[np.float64], is_right: NDArray[np.bool_]) -> None:
        """Count answers, given their confidences and whether each is right, in arrays of one shape."""
        c = confidence.ravel().clip(0, 1)
        bins = (np.ceil(c * BINS) - 1).clip(0).astype(np.int64)
        for sums, weights in zip(self._sums, (None, c, is_right.ravel(), c * (1 - c)), strict=True):
            sums += np.bincount(bins, weights, BINS)

    def merge(self, other: ConfidenceBins) -> None:
        """Add the answers of others."""
        self._sums += other._sums

    def reliability(self) -> Reliability:
        """Return what the bins say; there must be an answer."""
        answers, confidence, right, variance = self._sums
        total = answers.sum()

        def means(sums: NDArray[np.float64]) -> tuple[float | None, ...]:
            return tuple(float(s / n) if n else None for s, n in zip(sums, answers, strict=True))

        return Reliability(
            ece=float(abs(right - confidence).sum() / total),
            ece_by_chance=float(math.sqrt(2 / math.pi) * np.sqrt(variance).sum() / total),
            mean_confidence=float(confidence.sum() / total),
            answers=tuple(int(n) for n in answers),
            confidence=means(confidence),
            accuracy=means(right),
        )


@dataclass
class AnswerCounts:
    """Counts of the answers to some samples."""

    task: str
    classes: tuple[str, ...]
    rows: int = 0
    exact: int = 0
    """Samples with the correct class, or with every question answered correctly."""
    hits: NDArray[np.int64] = field(init=False)  # (C,), samples of a class that were predicted to be of it
    support: NDArray[np.int64] = field(init=False)  # (C,), samples of a class
    answered: NDArray[np.int64] = field(init=False)  # (C,), samples that were predicted to be of a class
    confusion: NDArray[np.int64] = field(init=False)  # (C, C), true class × predicted class; zeros for questions
    bins: ConfidenceBins = field(default_factory=ConfidenceBins)
    uncalibrated: ConfidenceBins | None = None
    cross_entropy: float = 0.0
    jensen_shannon: float = 0.0

    def __post_init__(self) -> None:
        classes = len(self.classes)
        self.hits, self.support, self.answered = (np.zeros(classes, np.int64) for _ in range(3))
        self.confusion = np.zeros((classes, classes), np.int64)

    def add(
        self, p: NDArray[np.float64], target: NDArray[Any], uncalibrated: NDArray[np.float64] | None = None
    ) -> Self:
        """Count samples, whose values are checked already.

        Args:
            p: (N, C) probabilities.
            target: (N,) labels, or (N, C) answers or distributions, for each of the N samples.
            uncalibrated: (N, C) probabilities before calibration.
        """
        if self.task == "multi":
            truth, answer = target == 1, p >= 0.5
        else:
            identity = np.eye(len(self.classes), dtype=bool)
            labels = target if target.ndim == 1 else target.argmax(axis=1)
            truth, answer = identity[labels], identity[p.argmax(axis=1)]
            self.confusion += truth.T.astype(np.int64) @ answer.astype(np.int64)
        is_right = (truth == answer).all(axis=1)
        self.rows += len(p)
        self.exact += int(is_right.sum())
        self.hits += (truth & answer).sum(axis=0)
        self.support += truth.sum(axis=0)
        self.answered += answer.sum(axis=0)
        self._add_confidence(self.bins, p, truth)
        if uncalibrated is not None:
            self.uncalibrated = self.uncalibrated or ConfidenceBins()
            self._add_confidence(self.uncalibrated, uncalibrated, truth)
        if self.task == "distribution":
            self.cross_entropy += _cross_entropy(p, target)
            self.jensen_shannon += _jensen_shannon(p, target)
        return self

    def merge(self, other: AnswerCounts) -> None:
        """Add the counts of other samples, of the same task and classes."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(theirs, ConfidenceBins):
                if mine is None:
                    setattr(self, one.name, mine := ConfidenceBins())
                mine.merge(theirs)
            elif isinstance(theirs, int | float | np.ndarray):
                setattr(self, one.name, mine + theirs)

    def _add_confidence(self, bins: ConfidenceBins, p: NDArray[np.float64], truth: NDArray[np.bool_]) -> None:
        if self.task == "multi":
            bins.add(np.maximum(p, 1 - p), truth == (p >= 0.5))
        else:
            best = p.argmax(axis=1)
            bins.add(p.max(axis=1), truth[np.arange(len(p)), best])


def _cross_entropy(p: NDArray[np.float64], t: NDArray[np.float64]) -> float:
    floor = float(np.finfo(np.float32).tiny)
    return float(-(t * np.log(p.clip(min=floor))).sum())


def _jensen_shannon(p: NDArray[np.float64], t: NDArray[np.float64]) -> float:
    from scipy.special import rel_entr

    middle = (p + t) / 2
    return float((rel_entr(p, middle) + rel_entr(t, middle)).sum() / 2)
