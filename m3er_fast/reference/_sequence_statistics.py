"""The statistics of feature sequences that the modality check judges by (method step 1).

Dimension legend: B samples, T time steps, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3er_fast.operands import SequenceStatistics, upcast


def sequence_statistics(x: Tensor, valid: Tensor) -> SequenceStatistics:
    """Moments of frames and of their changes; :func:`m3er_fast.functional.sequence_statistics` documents them."""
    x = upcast(x)
    pair = valid[:, 1:] & valid[:, :-1]
    mean = _mean(x, valid)
    variance = _mean((x - mean[:, None]).square(), valid)
    difference = x[:, 1:] - x[:, :-1]
    change = _mean(difference.square(), pair) / 2
    repeated = ((difference == 0).all(dim=2) & pair).sum(dim=1)
    return SequenceStatistics(mean, variance, change, repeated, pair.sum(dim=1))


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of x (B, T, d) over the steps where ``valid`` (B, T); 0 where there is none."""
    total = torch.where(valid[:, :, None], x, 0.0).sum(dim=1)
    return total / valid.sum(dim=1).clamp(min=1)[:, None]
