"""The fusion loss of labels on the CPU: value and gradient in one pass, from few exponentials.

With e = exp(x_y) of the label's class y, and r = Σ_{j≠y} exp(x_j) of all others,

    p = e / (e + r),    1 - p = r / (e + r),    -log p = log(1 + r/e),    -log(1 - p) = log(1 + e/r)

have full relative precision as p tends to 0 and to 1: r is added up without e. A cost c changes with z = log(e/r) by
dc/dz = -(1 - p) a, where a is the weight unless gradients pass through the weights. Its gradient is then

    dc/dx_j = a exp(x_j) / (e + r)  for j ≠ y,    dc/dx_y = -a r / (e + r).

Dimension legend: M modalities, B samples, C classes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from m3er_fast.operands import LossFactors, LossOptions, upcast

# From this many rows on, M·B, labels' entries are addressed by their place in memory.
MANY_ROWS = 8192
# Exponentials of logits within these, and their quotients, are far from the ends of their type.
_MODERATE = {torch.float32: 29.0, torch.float64: 236.0}


def loss_and_gradient(
    logits: Tensor, target: Tensor, factors: LossFactors, options: LossOptions, *, with_gradient: bool
) -> tuple[Tensor, Tensor] | None:
    """Loss of labels (B,) under softmax, without a margin, and the gradient of the logits; in at least float32.

    Arguments are checked ones of :func:`m3er_fast.functional.fusion_loss`, of at least one sample and two classes. The
    gradient is empty if not wanted.

    Returns:
        None if a logit is not finite, or if e/r or r/e comes near the largest number.
    """
    class_weight, modality_weight, available = factors
    modalities = logits.shape[0]
    x = upcast(logits)
    label, rate = _label_and_rate(target, class_weight, options, x.dtype)
    index = _index(label, x)
    minus_gamma = _number(-options.beta / (modalities - 1) if modalities > 1 else 0.0, x.dtype)
    present = None
    if available is not None and not bool(available.all()):
        present = available.T[:, :, None]
        x = x.where(present, 0.0)
        count = present.sum(dim=0, keepdim=True, dtype=x.dtype)
        minus_gamma = torch.where(count > 1, -options.beta / (count - 1).clamp(min=1), 0.0)
    found = _exponentials(x, index)
    if found is None:
        return None
    others, own, rest = found

    surprise = torch.div(rest, own).log1p_()  # -log p
    if options.variant == "m3er":
        evidence = surprise
    else:
        evidence = surprise if options.variant == "m3er_cross" else torch.div(own, rest).log1p_()
        evidence = _sum_of_others(evidence if present is None else evidence * present)
    # Every result is proportional to the weights: what multiplies it may as well multiply them.
    weight = (evidence * minus_gamma).exp_().mul_(rate)
    if modality_weight is not None:
        weight.mul_(modality_weight[:, None, None])
    if present is not None:
        weight.mul_(present)
    term = weight * surprise
    loss = term.sum(dim=(0, 2)) if options.reduction == "none" else term.sum()
    if not with_gradient:
        return loss, x.new_empty(0)

    if not options.detach_weight:
        through_weight = (term if options.variant == "m3er" else _sum_of_others(term)) * minus_gamma
        if options.variant == "original":
            through_weight.mul_(own / rest).neg_()
        weight.add_(through_weight if present is None else through_weight * present)
    weight.div_(own.add_(rest))
    return loss, _put_(others, index, rest.neg_()).mul_(weight)


def scale_(gradient: Tensor, incoming: Tensor) -> Tensor:
    """Multiply the gradient by a number (), in place; by 1, the usual incoming gradient, nothing moves."""
    return gradient if incoming.item() == 1.0 else gradient.mul_(incoming)


@lru_cache(maxsize=1024)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor (), never to be changed: multiplying by one is faster than by a number of Python's."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def _label_and_rate(
    target: Tensor, class_weight: Tensor | None, options: LossOptions, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The labels (B,), 0 where ignored, and what the cost of each sample counts, () or (1, B, 1)."""
    if class_weight is None and options.ignore_index < 0 and target.min().item() >= 0:  # the usual case
        return target, _number(1.0 / target.shape[0] if options.reduction == "mean" else 1.0, dtype)
    kept = target != options.ignore_index
    label = torch.where(kept, target, 0)
    rate = kept.to(dtype) if class_weight is None else kept * class_weight.to(dtype)[label]
    if options.reduction == "mean":
        total = rate.sum()
        rate /= torch.where(total > 0, total, 1.0)
    return label, rate[None, :, None]


def _exponentials(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Exponentials (M, B, C) of the logits with 0 in place of the label's own; that (M, B, 1); the others' sum.

    ``index`` is the result of :func:`_index`.

    All three may be multiplied by one number in each row, the exponential of its largest logit. Where quotients of them
    may overflow there are none.
    """
    lowest, highest = x.aminmax()
    limit = _MODERATE[x.dtype]
    is_moderate = lowest.item() >= -limit and highest.item() <= limit
    if is_moderate:
        exponentials = x.exp()
    else:
        largest = torch.finfo(x.dtype).max
        top = x.amax(dim=2, keepdim=True)
        if not top.abs().max().item() <= largest / 32:  # nor NaN: beyond, the reference has rules of its own
            return None
        exponentials = x.sub(top).exp_()
    if index.ndim == 3:
        own = exponentials.gather(2, index)
        rest = exponentials.scatter_(2, index, 0.0).sum(dim=2, keepdim=True)
    else:
        exponentials = exponentials.contiguous()
        own = exponentials.view(-1).index_select(0, index)
        _put_(exponentials, index, torch.zeros_like(own))
        own = own.view(*x.shape[:2], 1)
        rest = exponentials @ x.new_ones((x.shape[2], 1))  # a sum over few classes takes several times as long
    if not is_moderate and min(own.min().item(), rest.min().item()) < largest**-0.8:
        return None
    return exponentials, own, rest


def _index(label: Tensor, x: Tensor) -> Tensor:
    """Return where the labels (B,) have their entries in logits (M, B, C).

    Few samples get their class (M, B, 1). Many get their place (M·B,) among all entries, since torch copies from and to
    the places of a vector in a quarter of the time.

    Raises:
        IndexError: with many samples, a label is out of range. With few, looking up the class raises it.
    """
    modalities, batch, classes = x.shape
    if modalities * batch < MANY_ROWS:
        # One call where view and expand are two.
        return label.as_strided((modalities, batch, 1), (0, label.stride(0), 1))
    least, most = label.aminmax()
    if least.item() < 0 or most.item() >= classes:
        raise IndexError("a label is out of range")
    first = torch.arange(0, x.numel(), classes, device=x.device).view(modalities, batch)
    return first.add_(label).view(-1)


def _put_(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Set the entries of the labels in ``x`` (M, B, C), in place."""
    if index.ndim == 3:
        return x.scatter_(2, index, values)
    x.view(-1).scatter_(0, index, values.view(-1))
    return x


def _sum_of_others(x: Tensor) -> Tensor:
    """(M, B, 1): each modality's sum over the others, added anew because total minus own would cancel."""
    if len(x) == 1:
        return torch.zeros_like(x)
    total = x.roll(1, 0)
    for distance in range(2, len(x)):
        total += x.roll(distance, 0)
    return total
