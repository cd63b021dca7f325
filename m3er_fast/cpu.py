"""The busiest operations on the CPU: gradients worked out by hand, a cache-sized block of samples at a time.

``reference`` states what is computed; here it is computed in fewer passes over memory. The loss of a label uses that
its class y is a yes/no question of its own: with z = x_y - log Σ_{j≠y} exp(x_j),

    log p = -log(1 + exp(-z)),  log(1 - p) = -log(1 + exp(z)),  dz/dx_y = 1,  dz/dx_j = -exp(x_j) / Σ_{i≠y} exp(x_i),

so that a cost and its slopes dc/dz, one a modality, are all that a sample's gradient needs.

Dimension legend: M modalities, B samples, n samples of a block, C classes, d_m features of modality m, P pairs of
modalities, k_p components of a pair, r_m whitened directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast import reference
from m3er_fast.reference import GateProjections, Reduction, Variant, modality_pairs, upcast

# Logits of a block of the loss, and samples of a block of the check; docs/performance.md has the times of others.
_LOSS_BLOCK = 2**21
_GATE_BLOCK = 4096
_FEW_SAMPLES = 128  # of the check; of fewer the reference is as fast
# Products of two lengths between which neither they nor the squares in them can have left float32.
_SAFE_LENGTHS = (1e-15, 1e15)
# Rows of a band of a triangular whitener: narrower ones leave out more zeros, but multiply more slowly.
_BAND_ROWS = 100


# --- Multiplicative fusion loss of labels ---


class _Settings(NamedTuple):
    variant: Variant
    beta: float
    detach_weight: bool
    ignore_index: int
    reduction: Reduction


def loss_and_gradient(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    settings: Mapping[str, Any],
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of labels (B,) under softmax, without a margin, and the gradient of the logits; in at least float32.

    Arguments are checked, and those of :func:`m3er_fast.functional.fusion_loss`; the gradient is empty if not wanted.
    """
    chosen = _Settings(**{name: settings[name] for name in _Settings._fields})
    modalities, batch, classes = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    kept = target != chosen.ignore_index
    label = torch.where(kept, target, 0)
    rate = kept.to(dtype) if class_weight is None else kept * class_weight.to(dtype)[label]
    if chosen.reduction == "mean":
        total = rate.sum()
        rate /= torch.where(total > 0, total, 1.0)
    factor = logits.new_ones(modalities, dtype=dtype) if modality_weight is None else modality_weight.to(dtype)
    loss = torch.empty(batch, dtype=dtype)
    gradient = torch.empty(logits.shape if with_gradient else (0,), dtype=dtype)
    size = max(1, _LOSS_BLOCK // (modalities * classes))
    for start in range(0, batch, size):
        rows = slice(start, start + size)
        loss[rows] = _label_block(
            logits[:, rows],
            label[rows],
            kept[rows],
            rate[rows],
            factor,
            None if available is None else available[rows],
            chosen,
            gradient[:, rows] if with_gradient else None,
        )
    return loss if chosen.reduction == "none" else loss.sum(), gradient


def scale_(gradient: Tensor, incoming: Tensor) -> Tensor:
    """The gradient times a number (), in place; where that is 1, as it is for the last loss, nothing is moved."""
    return gradient if incoming == 1 else gradient.mul_(incoming)


def _label_block(
    logits: Tensor,
    label: Tensor,
    kept: Tensor,
    rate: Tensor,
    factor: Tensor,
    available: Tensor | None,
    settings: _Settings,
    gradient: Tensor | None,
) -> Tensor:
    """Loss (n,) of a block, its cost times ``rate``; its gradient is written to ``gradient`` (M, n, C)."""
    modalities, batch, classes = logits.shape
    # One class after the other: what is summed over a few classes then runs along whole vectors.
    x = torch.empty((classes, modalities, batch), dtype=rate.dtype)
    x.copy_(logits.permute(2, 0, 1))
    if available is not None:
        x.masked_fill_(~available.T, 0.0)
    lowest, highest = x.aminmax()
    bound = torch.finfo(x.dtype).max / 32
    if lowest < -bound or highest > bound:  # NaN is neither, and spreads by itself
        return _reference_block(logits, label, kept, rate, factor, available, settings, gradient)
    index = label.expand(1, modalities, batch)
    lead = x.gather(0, index)[0]
    if classes == 1:  # nothing to be told from: certain, and without a gradient
        if gradient is not None:
            gradient.copy_((lead * 0.0)[:, :, None])
        return (lead.sum(0) * 0.0).where(kept, 0.0)
    x.scatter_(0, index, -torch.inf)
    top = x.amax(0)
    x.sub_(top).exp_()
    rest = x.sum(0)
    lead.sub_(top)

    # p = own / (own + others), and z: every result below has full relative precision as p tends to 0 and to 1.
    own = lead.clamp(max=0.0).exp_()
    others = lead.neg().clamp_(max=0.0).exp_().mul_(rest)
    z = lead.sub_(rest.log())
    softplus = torch.minimum(own, others).div_(torch.maximum(own, others)).log1p_()  # log(1 + exp(-|z|))
    share = torch.add(own, others).reciprocal_()
    not_p = others.mul_(share)
    p = own.mul_(share)
    log_not_p = z.neg().clamp_(max=0.0).sub_(softplus) if settings.variant == "original" else z
    log_p = torch.clamp(z, max=0.0).sub_(softplus)
    cost, slope = _cost_and_slope(log_p, log_not_p, p, not_p, factor, available, settings)

    if gradient is not None:
        slope.mul_(rate)
        x.mul_(torch.div(slope, rest, out=rest).neg_())
        x.scatter_(0, index, slope[None])
        if not kept.all():  # what an ignored sample holds, NaN too, has no gradient
            x.masked_fill_(~kept, 0.0)
        gradient.permute(2, 0, 1).copy_(x)
    return cost.mul_(rate).where(kept, 0.0)


def _cost_and_slope(
    log_p: Tensor,
    log_not_p: Tensor,
    p: Tensor,
    not_p: Tensor,
    factor: Tensor,
    available: Tensor | None,
    settings: _Settings,
) -> tuple[Tensor, Tensor]:
    """Cost c = -Σ_m v_m w_m log p_m (n,) and dc/dz_m (M, n), of logarithms (M, n)."""
    modalities = log_p.shape[0]
    gamma: Tensor | float = settings.beta / max(modalities - 1, 1) if modalities > 1 else 0.0
    present = None
    if available is not None:
        present = available.T
        count = present.sum(0, dtype=log_p.dtype)
        gamma = torch.where(count > 1, settings.beta / (count - 1).clamp(min=1), 0.0)
    if settings.variant == "m3er":
        evidence = log_p
    else:
        evidence = log_not_p if settings.variant == "original" else log_p
        evidence = _sum_of_others(evidence if present is None else evidence.where(present, 0.0))
    weight = (evidence * gamma).exp_().mul_(factor[:, None])
    if present is not None:
        weight = weight.where(present, 0.0)
    term = weight * log_p
    slope = weight.mul_(not_p).neg_()
    if not settings.detach_weight:
        if settings.variant == "m3er":
            through_weight = not_p * (term * gamma)
        else:
            through_weight = _sum_of_others(term) * gamma * (p.neg() if settings.variant == "original" else not_p)
        slope.sub_(through_weight if present is None else through_weight.where(present, 0.0))
    return term.sum(0).neg_(), slope


def _sum_of_others(x: Tensor) -> Tensor:
    """(M, n): for each modality the sum over the others, added anew: total minus own would cancel."""
    return torch.stack([torch.cat([x[:m], x[m + 1 :]]).sum(0) for m in range(x.shape[0])])


def _reference_block(
    logits: Tensor,
    label: Tensor,
    kept: Tensor,
    rate: Tensor,
    factor: Tensor,
    available: Tensor | None,
    settings: _Settings,
    gradient: Tensor | None,
) -> Tensor:
    """The same where the reference would hold a logit back."""
    x = logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        cost = reference.fusion_loss(
            x,
            label,
            variant=settings.variant,
            beta=settings.beta,
            detach_weight=settings.detach_weight,
            modality_weight=factor,
            available=available,
            ignore_index=-1,
            reduction="none",
        )
    if gradient is not None:
        gradient.copy_(torch.autograd.grad(cost, x, rate)[0].where(kept[:, None], 0.0))
    return (cost.detach() * rate).where(kept, 0.0)


# --- Modality check ---


class _Factors(NamedTuple):
    """All that a modality's centred vectors are multiplied by."""

    matrix: Tensor  # (d_m, Σ k_p + rows of the first band): of its pairs one after the other, then of its whitener
    bias: Tensor  # (Σ k_p + rows,)
    sizes: list[int]  # the k_p, then those rows
    bands: list[tuple[int, Tensor]]  # the rest of the whitener: first column, (d_m - first, rows)


def gate_statistics(features: Sequence[Tensor], projections: GateProjections) -> tuple[Tensor, Tensor]:
    """:func:`m3er_fast.functional.gate_statistics` of checked arguments, none of which needs a gradient.

    A whitener is by far the largest matrix; fitted ones are triangular, and most of their zeros are left out. The
    other matrices of a modality are stacked upon its first band: wide products are the fast ones.
    """
    batch = features[0].shape[0]
    if batch < _FEW_SAMPLES:  # stacking the matrices would take longer than it saves
        return reference.gate_statistics(features, projections)
    dtype = upcast(features[0][:0]).dtype
    pairs = modality_pairs(len(features))
    correlation = torch.empty((batch, len(pairs)), dtype=dtype)
    energy = torch.empty((batch, len(features)), dtype=dtype)
    factors = [_factors(projections, m, pairs, dtype) for m in range(len(features))]
    for start in range(0, batch, _GATE_BLOCK):
        rows = slice(start, start + _GATE_BLOCK)
        projected: list[list[Tensor]] = [[] for _ in pairs]  # u, then v
        for m, x in enumerate(features):
            centered = x[rows].to(dtype) - projections.center[m].to(dtype)
            matrix, bias, sizes, bands = factors[m]
            *vectors, whitened = torch.split(torch.addmm(bias, centered, matrix), sizes, dim=1)
            for p, vector in zip((p for p, pair in enumerate(pairs) if m in pair), vectors, strict=True):
                projected[p].append(vector)
            square = _length(whitened).square_()
            for first, band in bands:
                square += _length(centered[:, first:] @ band).square_()
            energy[rows, m] = square / max(projections.whitener[m].shape[0], 1)
        for p, (u, v) in enumerate(projected):
            correlation[rows, p] = _cosine(u, v)
    largest = torch.finfo(dtype).max
    return correlation, energy.nan_to_num_(largest, largest)


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=1)
    return length


def _cosine(u: Tensor, v: Tensor) -> Tensor:
    """Cosine of the rows of two (n, k_p) matrices; 0 where it is undefined or not finite."""
    lengths = _length(u).mul_(_length(v))
    smallest, largest = lengths.aminmax()
    if smallest > _SAFE_LENGTHS[0] and largest < _SAFE_LENGTHS[1]:
        cosine = (u * v).sum(dim=1).div_(lengths)
    else:  # one by one no length overflows or vanishes before its time
        cosine = (F.normalize(u, dim=1, eps=0.0) * F.normalize(v, dim=1, eps=0.0)).sum(dim=1)
    return cosine.clamp_(-1.0, 1.0).nan_to_num_(0.0, 0.0, 0.0)


def _factors(projections: GateProjections, m: int, pairs: list[tuple[int, int]], dtype: torch.dtype) -> _Factors:
    matrices, biases = [], []
    for p, (i, j) in enumerate(pairs):
        if m in (i, j):
            left = m == i
            matrices.append((projections.left if left else projections.right)[p].to(dtype))
            biases.append((projections.left_bias if left else projections.right_bias)[p].to(dtype))
    (_, first), *others = _bands(projections.whitener[m].to(dtype), triangular=projections.triangular)
    matrices.append(first)
    return _Factors(
        torch.cat(matrices).T,
        torch.cat([*biases, first.new_zeros(first.shape[0])]),
        [matrix.shape[0] for matrix in matrices],
        [(column, band.T) for column, band in others],
    )


def _bands(whitener: Tensor, *, triangular: bool) -> list[tuple[int, Tensor]]:
    """A whitener as bands of rows without their leading zero columns: (first column, (rows, d - first)) each."""
    rows = whitener.shape[0]
    bands = rows // _BAND_ROWS
    if bands < 2 or not triangular:
        return [(0, whitener)]
    edges = [rows * band // bands for band in range(bands + 1)]
    return [(first, whitener[first:last, first:]) for first, last in itertools.pairwise(edges)]
