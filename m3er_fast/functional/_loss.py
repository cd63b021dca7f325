"""The multiplicative fusion loss and the class costs: arguments are checked here, and then computed.

Dimension legend: M modalities, B samples, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Unpack, get_args

import torch
from torch import Tensor

from m3er_fast._settings import takes_keywords_of
from m3er_fast._validation import check_choice, check_device, check_number, check_vector
from m3er_fast.functional._dispatch import choose, in_transform
from m3er_fast.operands import Activation, LossFactors, LossKeywords, LossOptions, Reduction, Variant

_CHOICES = {"variant": get_args(Variant), "activation": get_args(Activation), "reduction": get_args(Reduction)}
_NUMBERS = ("beta", "margin")


@takes_keywords_of(LossOptions)
def fusion_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    modality_weight: Tensor | None = None,
    available: Tensor | None = None,
    backend: str = "auto",
    **options: Unpack[LossKeywords],
) -> Tensor:
    r"""Multiplicative fusion loss of several modalities' classifiers.

    With p_m the probability that modality m gives a class y, the class costs

        c(y) = -Σ_m v_m w_m(y) log p_m(y),    γ = β / (M_b - 1),

        w_m = Π_{j≠m} (1 - p_j)^γ   "original"     Liu et al. 2018 (arXiv 1805.11730)
        w_m = p_m^γ                 "m3er"         Mittal et al. 2020 (arXiv 1911.05659), the unbound index read as m
        w_m = Π_{j≠m} p_j^γ         "m3er_cross"   the same formula, its index read as every other modality

    where M_b counts the modalities available to the sample (M_b = 1: w = 1), and the loss is Σ_y t_y c(y) for a label
    or a distribution t. With ``activation="sigmoid"`` the C outputs are yes/no questions, each with the loss
    t·c(yes) + (1 - t)·c(no), where every answer has weights of its own probability. All is computed in log space:
    costs and gradients are finite for every finite logit.

    Args:
        logits: (M, B, C), float16, bfloat16, float32 or float64; half precision is computed in float32.
        target: (B,) integer labels, or (B, C): a floating distribution over classes ("softmax"), or answers in 0..1
            ("sigmoid"; integers may hold ``ignore_index``). A label under "sigmoid" answers yes to its own question
            and no to the others.
        variant: which weight w_m.
        beta: β ≥ 0, how strongly the weights tell modalities apart; 0 makes every weight 1.
        detach_weight: stop gradients at w, as Liu's authors do. Without it -p^γ log p falls as p falls below
            e^(-1/γ), so that a model starting there is trained away from the truth.
        activation: how logits become probabilities: "softmax" over the classes or an elementwise "sigmoid".
        class_weight: (C,) factors of the classes' costs.
        modality_weight: (M,) factors v_m of the modalities' terms.
        available: (B, M) bool, the modalities that take part; None for all. A sample without any has loss 0.
        margin: Liu's boosted training: a sample (or question) has no loss while c(y) + margin < c(y') for all
            y' ≠ y. For a distribution y is its likeliest class.
        ignore_index: integer target without a loss.
        reduction: "none" gives (B,) for "softmax" and (B, C) for "sigmoid"; "sum" adds these; "mean" divides the sum
            as torch's losses do: for labels by the class weights of the labels that count, for distributions by B,
            for questions by the number of questions that count. With nothing to count the mean is 0.
        backend: "auto", "torch" or "triton".

    Returns:
        The loss, in at least float32, differentiable in ``logits``.

    Raises:
        ValueError: naming the argument, what came and what was wanted. Label values are looked at on the CPU only,
            where that needs no synchronisation, or everywhere with ``M3ER_DEBUG=1`` in the environment. Unseen, a
            label out of range makes the kernel's loss NaN.
        BackendUnavailableError: if the backend asked for does not work here.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])  # two modalities, one sample, two classes
        >>> fusion_loss(logits, torch.tensor([0])).item()  # -p log p of either: 0.111792... + 0.346573...
        0.4583...
    """
    chosen = LossOptions(**options)
    factors = LossFactors(class_weight, modality_weight, available)
    _check_logits(logits)
    _check_options(options)
    check_device("the logits", logits, target=target)
    target = _checked_target(target, logits, chosen.activation)
    if not (class_weight is modality_weight is available is None):
        _check_factors(logits, factors)
    implementation = choose("fusion_loss", backend, logits, target, factors, chosen)
    compute = implementation.load()
    if implementation.name != "cpu":
        _check_values(target, logits, chosen)
    try:
        loss: Tensor = compute(logits, target, factors, chosen)
    except (IndexError, RuntimeError):
        # On the CPU the computation itself refuses a label out of range: with few samples, looking first would take as
        # long as three of its steps.
        _check_values(target, logits, chosen)
        raise
    return loss


def class_costs(
    logits: Tensor,
    *,
    variant: Variant = "original",
    beta: float = 1.0,
    modality_weight: Tensor | None = None,
    available: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cost c(y) of every class, whose argmin is the decision rule of Liu et al. 2018 (arXiv 1805.11730).

    Formula and arguments are those of :func:`fusion_loss` with softmax probabilities.

    Returns:
        (B, C) costs, in at least float32.

    Raises:
        ValueError: for bad arguments, and for any variant but "original": in the others a class that every modality
            calls impossible costs 0, less than the true one, so that their argmin decides nothing.
        BackendUnavailableError: if the backend asked for does not work here.
    """
    _check_logits(logits)
    options = LossOptions(variant, beta)
    _check_options(options._asdict())
    if variant != "original":
        raise ValueError(
            f"variant {variant!r} has no decision rule: an impossible class costs 0 in it; "
            "class_costs is defined for 'original', and predictions come from the fused head's probabilities"
        )
    factors = LossFactors(None, modality_weight, available)
    _check_factors(logits, factors)
    compute = choose("class_costs", backend, logits, None, factors, options).load()
    costs: Tensor = compute(logits, beta=beta, modality_weight=modality_weight, available=available)
    return costs


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 3 or not logits.shape[0] or not logits.shape[2] or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating of shape (M, B, C) with M, C ≥ 1, got {logits.dtype} of {tuple(logits.shape)}"
        )


def _check_options(options: Mapping[str, object]) -> None:
    """Check the given options alone: with few samples, checking all of them takes as long as a step of the loss."""
    for name, value in options.items():
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                check_choice(name, value, _CHOICES[name])
        elif name in _NUMBERS and not (name == "margin" and value is None):
            check_number(name, value, 0.0)


def _check_factors(logits: Tensor, factors: LossFactors) -> None:
    class_weight, modality_weight, available = factors
    modalities, batch, classes = logits.shape
    check_vector("class_weight", class_weight, classes)
    check_vector("modality_weight", modality_weight, modalities)
    if available is not None and (available.shape != (batch, modalities) or available.dtype != torch.bool):
        raise ValueError(
            f"available must be bool of shape ({batch}, {modalities}), "
            f"got {available.dtype} of {tuple(available.shape)}"
        )
    check_device("the logits", logits, **factors._asdict())


def _checked_target(target: Tensor, logits: Tensor, activation: str) -> Tensor:
    """``target``, in int64 if it holds integers: small integer types wrap around when compared with ignore_index."""
    _, batch, classes = logits.shape
    if target.dtype == torch.int64 and target.shape == (batch,):
        return target  # the usual labels
    by_label = target.ndim == 1
    shape = (batch,) if by_label else (batch, classes)
    if target.shape != shape or target.is_complex():
        raise ValueError(f"target has shape {tuple(target.shape)}, wanted ({batch},) labels or ({batch}, {classes})")
    integral = not target.is_floating_point()
    if by_label and (not integral or target.dtype == torch.bool):
        raise ValueError(f"target of shape ({batch},) must hold integer labels, got {target.dtype}")
    if not by_label and integral and activation == "softmax":
        raise ValueError(f"target of shape ({batch}, {classes}) must be a floating distribution, got {target.dtype}")
    return target.long() if integral and target.dtype != torch.int64 else target


def _check_values(target: Tensor, logits: Tensor, options: LossOptions) -> None:
    """Raise a ValueError if a label or an answer is out of range, where looking costs little."""
    if torch.compiler.is_compiling() or in_transform() or not target.numel():
        return
    if target.device.type != "cpu" and os.environ.get("M3ER_DEBUG", "0") in ("", "0"):
        return  # looking would wait for the device
    highest = logits.shape[2] - 1 if target.ndim == 1 else 1
    least, most = target.aminmax()
    if least.item() >= 0 and most.item() <= highest:
        return
    integral = not target.is_floating_point()
    values = target[target != options.ignore_index] if integral else target
    if values.numel() and not bool(((values >= 0) & (values <= highest)).all()):
        ignored = f" or {options.ignore_index}" if integral else ""
        raise ValueError(
            f"target must lie in 0..{highest}{ignored}, got values from {values.min().item()} to {values.max().item()}"
        ) from None
