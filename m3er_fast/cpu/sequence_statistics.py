"""The statistics of feature sequences on the CPU: few passes over the frames, a block of samples at a time.

Frames are taken relative to the first valid one: sums of squares then lose no digits to a common offset, and a frozen
sequence has a variance of exactly zero. At worst, beside a first frame that is unlike all others, a variance has T
times the rounding error of its squares.

Dimension legend: B samples, n samples of a block, T time steps, d features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3er_fast.operands import SequenceStatistics, upcast

# Numbers of a block, which fits the cache beside its differences.
BLOCK_NUMBERS = 2**17


def sequence_statistics(x: Tensor, valid: Tensor) -> SequenceStatistics:
    """:func:`m3er_fast.functional.sequence_statistics` of checked arguments, none of which needs a gradient."""
    valid = valid.contiguous()  # as the weights then are, which multiply frames
    steps, dtype = x.shape[1], upcast(x[:0]).dtype
    if steps > 1 and bool(valid.all()):
        pair, pairs = valid[:, 1:], torch.full_like(valid[:, 0], steps - 1, dtype=torch.int64)
        weight = torch.full_like(valid, 1 / steps, dtype=dtype)
        pair_weight = torch.full_like(pair, 0.5 / (steps - 1), dtype=dtype)
    else:
        pair = valid[:, 1:] & valid[:, :-1]
        pairs = pair.sum(dim=1)
        if steps == 1:
            return _single_frames(upcast(x[:, 0]), valid, pairs)
        weight = valid.to(dtype)
        weight.div_(weight.sum(dim=1, keepdim=True).clamp_(min=1.0))
        pair_weight = pair.to(dtype).div_(pairs.clamp(min=1)[:, None] * 2)
    found = _moments(x, valid, pair, weight, pair_weight)
    # The weights of invalid frames are zeros, which do not silence NaN and inf. Masks do, but take longer.
    if not math.isfinite(found[0].sum().item()):
        found = _moments(x.masked_fill(~valid[:, :, None], 0.0), valid, pair, weight, pair_weight)
        largest = torch.finfo(dtype).max
        found[0][0].nan_to_num_(0.0, 0.0, 0.0)
        found[0][1:].nan_to_num_(largest)
    (mean, variance, change), repeated = found
    return SequenceStatistics(mean, variance, change, repeated, pairs)


def _single_frames(x: Tensor, valid: Tensor, pairs: Tensor) -> SequenceStatistics:
    mean = x.clone() if bool(valid.all()) else x.where(valid, 0.0)
    return SequenceStatistics(mean, torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros_like(pairs), pairs)


def _moments(x: Tensor, valid: Tensor, pair: Tensor, weight: Tensor, pair_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, variance and change (3, B, d), and the repeated frames (B,).

    Args:
        x: (B, T, d).
        valid: (B, T) bool.
        pair: (B, T - 1) bool, whether the frame and the next one are valid.
        weight: (B, T), of each frame in a mean.
        pair_weight: (B, T - 1), of each squared difference in the change.
    """
    batch, steps, features = x.shape
    moments = weight.new_empty((3, batch, features))
    repeated = torch.zeros_like(pair[:, 0], dtype=torch.int64)
    first = x[:, :1]
    if not bool(valid[:, 0].all()):
        first = x.gather(1, valid.int().argmax(dim=1)[:, None, None].expand(-1, 1, features))
        # Of a sample without a valid frame, which has a mean of zero.
        first = first.where(valid.any(dim=1)[:, None, None], 0.0)
    size = max(1, BLOCK_NUMBERS // (steps * features))
    for start in range(0, batch, size):
        rows = slice(start, start + size)
        block, origin = upcast(x[rows]), upcast(first[rows])
        mean, variance, change = moments[:, rows, None].unbind()
        shifted = block - origin
        torch.bmm(weight[rows, None], shifted, out=mean)
        torch.bmm(weight[rows, None], shifted.square_(), out=variance)
        variance.addcmul_(mean, mean, value=-1.0).clamp_(min=0.0)
        mean.add_(origin)
        squares = (block[:, 1:] - block[:, :-1]).square_()
        torch.bmm(pair_weight[rows, None], squares, out=change)
        # Squares may vanish where differences do not.
        maybe = (squares.sum(dim=2) == 0.0).logical_and_(pair[rows])
        if bool(maybe.any()):
            b, t = maybe.nonzero(as_tuple=True)
            maybe[b, t] = (block[b, t] == block[b, t + 1]).all(dim=1)
            torch.sum(maybe, dim=1, out=repeated[rows])
    return moments, repeated
