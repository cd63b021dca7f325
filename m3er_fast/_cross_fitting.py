"""Cross-fitting of the modality check: the folds of its training samples, and what is kept of a part of them.

Dimension legend: M modalities, n calibration samples, D_m features of an utterance vector.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._symptoms import SequenceSample
from m3er_fast.moments import PairwiseMoments

# Folds are made of whole blocks of neighbouring samples, because these often come from one recording: calibrated on
# recordings that the projections have seen, the check would reject every new one.
_FOLDS = 10
_BLOCKS = 64
# More calibration samples are not worth their cost: the standard error of a p-value of 0.05 is then below 0.0035.
_MAX_CALIBRATION = 4096


class CrossFitting:
    """The folds of the training samples, and which of the samples calibrate.

    Each fold is scored by projections learned from the other folds.

    Args:
        total: number of training samples.
    """

    folds: ClassVar[range] = range(_FOLDS)

    def __init__(self, total: int) -> None:
        self._total = total
        self._block_to_fold = np.random.default_rng(0).permutation(_BLOCKS) % _FOLDS
        # `choice` of a few among many takes neither the time nor the memory that a permutation of all would.
        self._calibrating = np.arange(total)
        if total > _MAX_CALIBRATION:
            self._calibrating = np.sort(np.random.default_rng(0).choice(total, _MAX_CALIBRATION, replace=False))

    def fold(self, numbers: NDArray[np.int64]) -> Tensor:
        """Return the fold (n,) of the samples with these numbers in the training data."""
        return torch.from_numpy(self._block_to_fold[numbers * _BLOCKS // max(self._total, 1)])

    def calibrates(self, numbers: NDArray[np.int64]) -> Tensor:
        """Return (n,) bool, whether the samples with these numbers calibrate."""
        return torch.from_numpy(np.isin(numbers, self._calibrating, assume_unique=True))


class CheckSample(NamedTuple):
    """A part of the training samples, reduced to what :meth:`m3er_fast.ModalityCheck.fit_collected` needs."""

    moments: dict[int, PairwiseMoments]  # of the utterance vectors, by fold; folds without a sample are left out
    vectors: list[Tensor]  # M of (n, D_m) float64: utterance vectors of the calibration samples
    available: Tensor  # (n, M) bool
    fold: Tensor  # (n,) int64
    sequences: list[SequenceSample]  # M; those of the calibration samples, or empty where they have no say

    def merge(self, other: CheckSample) -> CheckSample:
        """Return both parts as one; the samples of ``other`` must follow these. The result may share their memory."""
        moments = dict(self.moments)
        for fold, more in other.moments.items():
            moments[fold] = PairwiseMoments(more.widths, (moments[fold], more)) if fold in moments else more
        return CheckSample(
            moments,
            [torch.cat(both) for both in zip(self.vectors, other.vectors, strict=True)],
            torch.cat([self.available, other.available]),
            torch.cat([self.fold, other.fold]),
            [ours.merge(theirs) for ours, theirs in zip(self.sequences, other.sequences, strict=True)],
        )

    def total_moments(self, *, left_out: int | None = None) -> PairwiseMoments:
        """Return the moments of all folds, or of all but one."""
        widths = [vector.shape[1] for vector in self.vectors]
        return PairwiseMoments(widths, (self.moments[f] for f in sorted(self.moments) if f != left_out))
