"""The multiplicative fusion loss (method step 4).

Dimension legend: M modalities, B samples, C classes.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast._settings import takes_keywords_of
from m3er_fast.operands import Activation, LossFactors, LossKeywords, LossOptions, Variant, upcast


def log_probabilities(
    logits: Tensor, available: Tensor | None = None, activation: Activation = "softmax"
) -> tuple[Tensor, Tensor]:
    """Log p and log(1 - p) of every class, each to full relative precision as p tends to 0 or to 1.

    log(1 - exp(log p)) would lose its digits there. With s = Σ_{j≠top} exp(x_j - x_top), the likeliest class has
    log p = -log(1 + s) and 1 - p = s / (1 + s), whose logarithm is log s - log(1 + s) where p > 1/2; everywhere else
    p ≤ 1/2, and log1p(-p) is exact enough.

    Args:
        logits: (M, B, C).
        available: (B, M) bool or None; an unavailable modality is treated as logits of zero, whatever it holds.
        activation: "softmax" over the classes or an elementwise "sigmoid".

    Returns:
        Two (M, B, C) tensors, finite for finite logits.
    """
    if available is not None:
        logits = torch.where(available.T[:, :, None], logits, 0.0)
    # Costs of up to eight modalities, of differences of up to twice this, must still add up to a finite number.
    bound = torch.finfo(logits.dtype).max / 32
    logits = logits.clamp(-bound, bound)
    if activation == "sigmoid":
        return F.logsigmoid(logits), F.logsigmoid(-logits)
    if logits.shape[-1] == 1:  # the only class is certain: no cost, no gradient
        return logits * 0.0, logits * 0.0 - bound
    top_value, top = logits.max(dim=-1, keepdim=True)
    is_top = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, top, True)
    shifted = logits - top_value
    exponentials = shifted.exp()
    rest = exponentials.masked_fill(is_top, 0.0).sum(dim=-1, keepdim=True)
    log_total = rest.log1p()
    log_rest = shifted.masked_fill(is_top, -torch.inf).logsumexp(dim=-1, keepdim=True)
    likely = is_top & (rest < 1.0)  # p > 1/2
    p = exponentials.masked_fill(likely, 0.0) / (1.0 + rest)
    log_not_p = torch.where(likely, log_rest - log_total, torch.log1p(-p))
    return shifted - log_total, log_not_p


def fusion_costs(
    log_p: Tensor,
    log_not_p: Tensor,
    *,
    variant: Variant,
    beta: float,
    detach_weight: bool,
    modality_weight: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    """Cost of every class: c(y) = -Σ_m v_m w_m(y) log p_m(y).

    The weight w_m is Π_{j≠m} (1 - p_j)^γ for "original" (Liu et al. 2018), p_m^γ for "m3er" and Π_{j≠m} p_j^γ for
    "m3er_cross"; γ = β / (M_b - 1), where M_b counts the modalities available to the sample, and w = 1 if M_b = 1.

    Args:
        log_p: (M, B, C), log p.
        log_not_p: (M, B, C), log(1 - p).
        variant: which weight.
        beta: β ≥ 0.
        detach_weight: whether gradients stop at w.
        modality_weight: (M,) factors v_m, or None for ones.
        available: (B, M) bool, or None for all available.

    Returns:
        (B, C) costs; 0 for a sample without modalities.
    """
    weight = fusion_weights(log_p, log_not_p, variant=variant, beta=beta, available=available)
    if detach_weight:
        weight = weight.detach()
    terms = weight * log_p if available is None else torch.where(available.T[:, :, None], weight * log_p, 0.0)
    return -(terms if modality_weight is None else modality_weight[:, None, None] * terms).sum(dim=0)


def fusion_weights(
    log_p: Tensor, log_not_p: Tensor, *, variant: Variant, beta: float, available: Tensor | None
) -> Tensor:
    """(M, B, C) weights w_m(y) of :func:`fusion_costs`, how far modality m is relied on for class y.

    A modality that is not available takes no part in the others' weights.
    """
    modalities, batch = log_p.shape[:2]
    if available is None:
        present = torch.ones((modalities, batch, 1), dtype=torch.bool, device=log_p.device)
    else:
        present = available.T[:, :, None]
    count = present.sum(dim=0, dtype=log_p.dtype)
    gamma = torch.where(count > 1, beta / (count - 1).clamp(min=1), 0.0)
    evidence = torch.where(present, log_not_p if variant == "original" else log_p, 0.0)
    if variant == "m3er":
        return (gamma * evidence).exp()
    # Summed anew for each modality: total minus own would cancel where one of them dominates.
    others = [sum((evidence[j] for j in range(modalities) if j != m), gamma * 0.0) for m in range(modalities)]
    return torch.stack([(gamma * log_weight).exp().expand(log_p.shape[1:]) for log_weight in others])


@takes_keywords_of(LossOptions)
def fusion_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    modality_weight: Tensor | None = None,
    available: Tensor | None = None,
    **options: Unpack[LossKeywords],
) -> Tensor:
    """Multiplicative fusion loss; :func:`m3er_fast.functional.fusion_loss` documents it."""
    factors = LossFactors(class_weight, modality_weight, available)
    return fusion_loss_of(logits, target, factors, LossOptions(**options))


def fusion_loss_of(logits: Tensor, target: Tensor, factors: LossFactors, options: LossOptions) -> Tensor:
    """The same, with its keywords as records."""
    log_p, log_not_p = log_probabilities(upcast(logits), factors.available, options.activation)
    costs = partial(
        fusion_costs,
        variant=options.variant,
        beta=options.beta,
        detach_weight=options.detach_weight,
        modality_weight=None if factors.modality_weight is None else factors.modality_weight.to(log_p),
        available=factors.available,
    )
    class_weight = None if factors.class_weight is None else factors.class_weight.to(log_p)
    if options.activation == "sigmoid":
        yes, no = costs(log_p, log_not_p), costs(log_not_p, log_p)
        loss, weight = _question_losses(yes, no, target, class_weight, options.margin, options.ignore_index)
    else:
        cost = costs(log_p, log_not_p)
        loss, weight = _label_losses(cost, target, class_weight, options.margin, options.ignore_index)
    if options.reduction == "none":
        return loss
    if options.reduction == "sum":
        return loss.sum()
    # An empty or wholly ignored batch has the mean 0, not 0/0: one such batch must not poison a training run.
    total = weight.sum()
    # Divided before the sum, which would overflow where the mean does not.
    return (loss / torch.where(total > 0, total, 1.0)).sum()


def class_costs(
    logits: Tensor,
    *,
    beta: float = 1.0,
    modality_weight: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """Liu's cost of every class; :func:`m3er_fast.functional.class_costs` documents it."""
    log_p, log_not_p = log_probabilities(upcast(logits), available)
    return fusion_costs(
        log_p,
        log_not_p,
        variant="original",
        beta=beta,
        detach_weight=False,
        modality_weight=None if modality_weight is None else modality_weight.to(log_p),
        available=available,
    )


def _label_losses(
    cost: Tensor, target: Tensor, class_weight: Tensor | None, margin: float | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss and weight (B,) of a label or a distribution over classes: Σ_y t_y c(y)."""
    if target.is_floating_point():
        share = target.to(cost)
        active = _margin_active(cost, share.argmax(dim=1), margin)
        weighted = share if class_weight is None else share * class_weight
        return (weighted * cost).sum(dim=1) * active, torch.ones_like(active)
    kept = target != ignore_index
    label = torch.where(kept, target, 0)
    weight = kept.to(cost) if class_weight is None else kept * class_weight[label]
    own = torch.where(kept, cost.gather(1, label[:, None])[:, 0], 0.0)
    return own * weight * _margin_active(cost, label, margin), weight


def _question_losses(
    yes: Tensor, no: Tensor, target: Tensor, class_weight: Tensor | None, margin: float | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss and weight (B, C) of C yes/no questions: t·c(yes) + (1 - t)·c(no)."""
    if target.is_floating_point():
        kept, answer = torch.ones_like(yes, dtype=torch.bool), target
    else:
        kept = target != ignore_index
        answer = torch.where(kept, target, 0)
        if target.ndim == 1:  # the label answers yes to its own question and no to the others
            kept, answer = kept[:, None].expand(yes.shape), F.one_hot(answer, yes.shape[1])
    answer = answer.to(yes)
    loss = answer * yes + (1.0 - answer) * no
    if margin is not None:
        says_yes = answer >= 0.5
        right, wrong = torch.where(says_yes, yes, no), torch.where(says_yes, no, yes)
        loss = loss * ~(right.detach() + margin < wrong.detach())
    if class_weight is not None:
        loss = loss * class_weight
    # As in torch's binary cross entropy the mean divides by the number of questions, not by their class weights.
    return torch.where(kept, loss, 0.0), kept.to(yes)


def _margin_active(cost: Tensor, label: Tensor, margin: float | None) -> Tensor:
    """(B,) 1 where the sample still has something to learn, 0 where c(y) + margin < c(y') for all other y'."""
    if margin is None:
        return cost.new_ones(cost.shape[0])
    cost = cost.detach()
    own = cost.gather(1, label[:, None])
    best_other = cost.scatter(1, label[:, None], torch.inf).amin(dim=1, keepdim=True)
    return (~(own + margin < best_other))[:, 0].to(cost)
