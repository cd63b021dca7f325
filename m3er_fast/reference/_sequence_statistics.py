"""The statistics of feature sequences that the modality check judges by (method step 1).

Dimension legend: B samples, T time steps, d features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.operands import SequenceStatistics, upcast


def sequence_statistics(x: Tensor, valid: Tensor) -> SequenceStatistics:
    """Moments of frames and of their changes; :func:`m3er_fast.functional.sequence_statistics` documents them."""
    x = torch.where(valid[:, :, None], upcast(x), 0.0)  # first: NaN times 0 is NaN, in a gradient too
    pair = valid & (_previous(valid[:, :, None].to(x.dtype))[:, :, 0] > 0)  # inductor pads no booleans
    # A common offset costs no digits of what is relative to the first valid frame, and a frozen sequence does not vary.
    origin = x.detach().gather(1, valid.int().argmax(dim=1)[:, None, None].expand(-1, 1, x.shape[2]))
    shifted = x - origin
    shift = _mean(shifted, valid)
    variance = _mean((shifted - shift[:, None]).square(), valid)
    difference = x - _previous(x)
    change = _mean(difference.square(), pair) / 2
    repeated = ((difference == 0).all(dim=2) & pair).sum(dim=1)
    largest = torch.finfo(x.dtype).max
    mean = (origin[:, 0] + shift).nan_to_num(0.0, 0.0, 0.0)
    return SequenceStatistics(mean, variance.nan_to_num(largest), change.nan_to_num(largest), repeated, pair.sum(dim=1))


def _previous(x: Tensor) -> Tensor:
    """The frame before each of x (B, T, d); zeros before the first."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of x (B, T, d) over the steps where ``valid`` (B, T); 0 where there is none."""
    total = torch.where(valid[:, :, None], x, 0.0).sum(dim=1)
    return total / valid.sum(dim=1).clamp(min=1)[:, None]
