"""The statistics of feature sequences on the CPU: few passes over the frames.

Frames are taken relative to the first one, so that sums of squares lose no digits to a common offset and a frozen
sequence has a variance of exactly zero.

Dimension legend: B samples, T time steps, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3er_fast.operands import SequenceStatistics, upcast

# Numbers of a block of samples, which fits the cache beside its differences.
BLOCK_NUMBERS = 2**18


def sequence_statistics(x: Tensor, valid: Tensor) -> SequenceStatistics:
    """:func:`m3er_fast.functional.sequence_statistics` of checked arguments, none of which needs a gradient."""
    batch, steps, features = x.shape
    size = max(1, BLOCK_NUMBERS // max(1, steps * features))
    blocks = [
        _of_block(upcast(x[start : start + size]), valid[start : start + size]) for start in range(0, batch, size)
    ]
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        return _of_block(upcast(x), valid)
    return SequenceStatistics(*map(torch.cat, zip(*blocks, strict=True)))


def _of_block(x: Tensor, valid: Tensor) -> SequenceStatistics:
    weight = valid.to(x.dtype)
    frames = weight.sum(dim=1).clamp_(min=1.0)[:, None]
    whole = bool(valid.all())
    first = x[:, 0] if whole else x.gather(1, valid.int().argmax(dim=1)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
    shifted = x - first[:, None]
    pair = valid[:, 1:] & valid[:, :-1]
    pairs = pair.sum(dim=1)
    difference = shifted[:, 1:] - shifted[:, :-1]
    if not whole:
        shifted.mul_(weight[:, :, None])
        difference.mul_(pair.to(x.dtype)[:, :, None])
    shift = shifted.sum(dim=1).div_(frames)
    variance = shifted.square_().sum(dim=1).div_(frames).addcmul_(shift, shift, value=-1.0).clamp_(min=0.0)
    square = difference.square_()
    repeated = ((square.sum(dim=2) == 0) & pair).sum(dim=1)
    change = square.sum(dim=1).div_(2.0 * pairs.clamp(min=1)[:, None])
    mean = shift.add_(first)
    return SequenceStatistics(
        mean if whole else mean.mul_(valid.any(dim=1)[:, None]), variance, change, repeated, pairs
    )
