"""The fusion loss of labels on the CPU: value and gradient in one pass, a cache-sized block of samples at a time.

The class y of a label is a yes/no question of its own: with z = x_y - log Σ_{j≠y} exp(x_j),

    log p = -log(1 + exp(-z)),  log(1 - p) = -log(1 + exp(z)),  dz/dx_y = 1,  dz/dx_j = -exp(x_j) / Σ_{i≠y} exp(x_i),

so a sample's gradient needs only its cost and one slope dc/dz per modality.

Dimension legend: M modalities, B samples, n samples of a block, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3er_fast.operands import LossFactors, LossOptions

# docs/performance.md has the times of other sizes.
_BLOCK_LOGITS = 2**21


def loss_and_gradient(
    logits: Tensor, target: Tensor, factors: LossFactors, options: LossOptions, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss of labels (B,) under softmax, without a margin, and the gradient of the logits; in at least float32.

    Arguments are checked ones of :func:`m3er_fast.functional.fusion_loss`. The gradient is empty if not wanted.
    """
    class_weight, modality_weight, available = factors
    modalities, batch, classes = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    kept = target != options.ignore_index
    label = torch.where(kept, target, 0)
    rate = kept.to(dtype) if class_weight is None else kept * class_weight.to(dtype)[label]
    if options.reduction == "mean":
        total = rate.sum()
        rate /= torch.where(total > 0, total, 1.0)
    factor = logits.new_ones(modalities, dtype=dtype) if modality_weight is None else modality_weight.to(dtype)
    loss = torch.empty(batch, dtype=dtype)
    gradient = torch.empty(logits.shape if with_gradient else (0,), dtype=dtype)
    size = max(1, _BLOCK_LOGITS // (modalities * classes))
    for start in range(0, batch, size):
        rows = slice(start, start + size)
        loss[rows] = _label_block(
            logits[:, rows],
            label[rows],
            kept[rows],
            rate[rows],
            factor,
            None if available is None else available[rows],
            options,
            gradient[:, rows] if with_gradient else None,
        )
    return loss if options.reduction == "none" else loss.sum(), gradient


def scale_(gradient: Tensor, incoming: Tensor) -> Tensor:
    """Multiply the gradient by a number (), in place; by 1, the usual incoming gradient, nothing moves."""
    return gradient if incoming == 1 else gradient.mul_(incoming)


def _label_block(
    logits: Tensor,
    label: Tensor,
    kept: Tensor,
    rate: Tensor,
    factor: Tensor,
    available: Tensor | None,
    options: LossOptions,
    gradient: Tensor | None,
) -> Tensor:
    """Loss (n,) of a block: its cost times ``rate``. Its gradient goes to ``gradient`` (M, n, C)."""
    modalities, batch, classes = logits.shape
    # Class by class, so that a sum over a few classes runs along whole vectors.
    x = torch.empty((classes, modalities, batch), dtype=rate.dtype)
    x.copy_(logits.permute(2, 0, 1))
    if available is not None:
        x.masked_fill_(~available.T, 0.0)
    # Beyond the bound, which keeps sums of costs finite, a logit counts as the bound and has no gradient.
    bound = torch.finfo(x.dtype).max / 32
    lowest, highest = x.aminmax()
    beyond = None if lowest >= -bound and highest <= bound else x.abs() > bound
    if beyond is not None:
        x.clamp_(-bound, bound)
    index = label.expand(1, modalities, batch)
    lead = x.gather(0, index)[0]
    if classes == 1:  # the only class is certain: no cost, no gradient
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
    log_not_p = z.neg().clamp_(max=0.0).sub_(softplus) if options.variant == "original" else z
    log_p = torch.clamp(z, max=0.0).sub_(softplus)
    cost, slope = _cost_and_slope(log_p, log_not_p, p, not_p, factor, available, options)

    if gradient is not None:
        slope.mul_(rate)
        x.mul_(torch.div(slope, rest, out=rest).neg_())
        x.scatter_(0, index, slope[None])
        if beyond is not None:
            x.masked_fill_(beyond, 0.0)
        if not kept.all():  # an ignored sample has no gradient, not even one of NaN
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
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Cost c = -Σ_m v_m w_m log p_m (n,) and dc/dz_m (M, n), of logarithms (M, n)."""
    modalities = log_p.shape[0]
    gamma: Tensor | float = options.beta / max(modalities - 1, 1) if modalities > 1 else 0.0
    present = None
    if available is not None:
        present = available.T
        count = present.sum(0, dtype=log_p.dtype)
        gamma = torch.where(count > 1, options.beta / (count - 1).clamp(min=1), 0.0)
    if options.variant == "m3er":
        evidence = log_p
    else:
        evidence = log_not_p if options.variant == "original" else log_p
        evidence = _sum_of_others(evidence if present is None else evidence.where(present, 0.0))
    weight = (evidence * gamma).exp_().mul_(factor[:, None])
    if present is not None:
        weight = weight.where(present, 0.0)
    term = weight * log_p
    slope = weight.mul_(not_p).neg_()
    if not options.detach_weight:
        if options.variant == "m3er":
            through_weight = not_p * (term * gamma)
        else:
            through_weight = _sum_of_others(term) * gamma * (p.neg() if options.variant == "original" else not_p)
        slope.sub_(through_weight if present is None else through_weight.where(present, 0.0))
    return term.sum(0).neg_(), slope


def _sum_of_others(x: Tensor) -> Tensor:
    """(M, n): each modality's sum over the others, added anew because total minus own would cancel."""
    return torch.stack([torch.cat([x[:m], x[m + 1 :]]).sum(0) for m in range(x.shape[0])])
