"""Cases of the fusion loss and of the class costs.

Dimension legend: M modalities, B samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from m3er_fast import reference
from m3er_fast.operands import Activation, LossFactors, LossOptions, Variant
from m3er_fast.verification.operation import Case, Inputs, Operation, Outputs, gradients, largest_of, normal, uniform

_VARIANTS: tuple[Variant, ...] = ("original", "m3er", "m3er_cross")
# Of a value, and of the gradient, which half precision rounds once; relative to the largest.
_OF_VALUES = {torch.float64: 1e-10, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-6}
_OF_GRADIENTS = {torch.float64: 1e-10, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# The gradient of costs adds up over the classes.
_OF_COST_GRADIENTS = _OF_GRADIENTS | {torch.float32: 1e-5}
# Beyond this, float32 holds no logit (see reference.log_probabilities).
_BOUND = torch.finfo(torch.float32).max / 32


def _loss_cases() -> Iterator[Case]:
    def case(name: str, logits: Tensor, target: Tensor, factors: LossFactors = _NO_FACTORS, **options: Any) -> Case:
        second = options.pop("second", False)
        inputs = {"logits": logits, "target": target, "factors": factors, "options": LossOptions(**options)}
        return Case(name, inputs | {"second": second})

    logits, labels = normal(3, 7, 5, seed=0, scale=3.0), torch.arange(7) % 5
    yield case("one sample", logits[:, :1], labels[:1])
    ignoring, factors = labels.masked_fill(torch.arange(7) % 3 == 1, -100), _factors(logits)
    shares, answers = uniform(7, 5, seed=1).softmax(1), uniform(7, 5, seed=2)
    for variant in _VARIANTS:
        for detach in (True, False):
            kind: dict[str, Any] = {"variant": variant, "detach_weight": detach}
            name = f"{variant}, weights {'detached' if detach else 'trained'}"
            yield case(f"{name}, ignored labels", logits, ignoring, factors, **kind)
    yield case("distributions", logits, shares, factors, variant="original", detach_weight=False)
    yield case("labels as questions", logits, ignoring, factors, activation="sigmoid", reduction="none")
    yield case("answers", logits, answers, factors, variant="original", activation="sigmoid", beta=0.5)
    yield case("a margin", logits, labels, factors, margin=0.3, reduction="sum", variant="original")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield case(str(dtype).removeprefix("torch."), logits.to(dtype), ignoring, factors)
    yield case("no sample", logits[:, :0], labels[:0])
    yield case("every label ignored", logits, torch.full((7,), -100))
    yield case("one modality", logits[:1], labels)
    yield case("one class", logits[:, :, :1], torch.zeros(7, dtype=torch.int64))
    yield case("700 classes", normal(2, 3, 700, seed=3), torch.tensor([0, 699, 400]))
    yield case("any strides", logits.transpose(0, 2).contiguous().transpose(0, 2), labels)
    yield case("a sample with NaN", _with(logits, {(1, 2, 3): torch.nan}), labels, reduction="none")
    infinite = _with(logits, {(0, 1, 2): torch.inf, (1, 3, 0): -torch.inf, (2, 5, 1): -torch.inf})
    signs: Tensor = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 4).view(-1, 2, 2).transpose(0, 1)
    activations: tuple[Activation, ...] = ("softmax", "sigmoid")
    for activation in activations:
        yield case(f"infinite logits, {activation}", infinite, labels, activation=activation, reduction="none")
        yield case(f"logits of ±1e30, {activation}", signs * 1e30, torch.arange(81) % 2, activation=activation)
    hidden = logits.masked_fill(~_available(logits).T[:, :, None], torch.nan)
    yield case("NaN where a modality is unavailable", hidden, labels, LossFactors(available=_available(logits)))
    yield case("second derivative", logits, ignoring, factors, detach_weight=False, second=True)


_NO_FACTORS = LossFactors()


def _available(logits: Tensor) -> Tensor:
    """Which modalities take part; in the first sample none does."""
    available = uniform(logits.shape[1], logits.shape[0], seed=4) < 0.7
    available[0] = False
    return available


def _factors(logits: Tensor) -> LossFactors:
    modalities, _, classes = logits.shape
    return LossFactors(
        uniform(classes, seed=5, low=0.2, high=3.0), uniform(modalities, seed=6, low=0.2, high=3.0), _available(logits)
    )


def _with(x: Tensor, values: Mapping[tuple[int, ...], float]) -> Tensor:
    changed = x.clone()
    for place, value in values.items():
        changed[place] = value
    return changed


def _loss_outputs(loss: Callable[..., Any], inputs: Inputs) -> Outputs:
    logits = inputs["logits"].detach().requires_grad_()
    value = loss(logits, inputs["target"], inputs["factors"], inputs["options"])
    if inputs["second"]:
        (first,) = torch.autograd.grad(value, logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits)
        return {"second derivative": second}
    (gradient,) = gradients([value], [logits])
    if value.ndim == 1:  # a sample whose loss is NaN has no defined gradient
        gradient = gradient.masked_fill(value.isnan()[:, None], 0.0)
    return {"loss": value, "gradient": gradient}


def _exact_loss(logits: Tensor, *arguments: Any) -> Tensor:
    return reference.fusion_loss_of(logits.clamp(-_BOUND, _BOUND), *arguments)


def _loss_tolerances(inputs: Inputs, wanted: Outputs, _implementation: str) -> dict[str, Tensor | float]:
    dtype = inputs["logits"].dtype
    of = {"loss": _OF_VALUES[dtype], "gradient": _OF_GRADIENTS[dtype], "second derivative": 1e-4}
    return {name: of[name] * max(largest_of(value), 1e-6) for name, value in wanted.items()}


FUSION_LOSS = Operation(
    "fusion_loss",
    _loss_cases,
    lambda: {
        "logits": normal(3, 256, 6, seed=0, scale=2.0),
        "target": torch.arange(256) % 6,
        "factors": _NO_FACTORS,
        "options": LossOptions(),
        "second": False,
    },
    lambda inputs: tuple(inputs[name] for name in ("logits", "target", "factors", "options")),
    _loss_outputs,
    _exact_loss,
    _loss_tolerances,
)


def _cost_cases() -> Iterator[Case]:
    def case(name: str, logits: Tensor, factors: LossFactors = _NO_FACTORS, beta: float = 1.0) -> Case:
        return Case(name, {"logits": logits, "factors": factors, "beta": beta})

    logits = normal(3, 7, 5, seed=0, scale=3.0)
    factors = _factors(logits)._replace(class_weight=None)
    yield case("one sample", logits[:, :1])
    yield case("weights, and modalities that are unavailable", logits, factors, 1.4)
    yield case("no sample", logits[:, :0])
    yield case("one modality", logits[:1])
    yield case("one class", logits[:, :, :1])
    yield case("700 classes", normal(2, 3, 700, seed=3))
    yield case("logits of ±1e30", logits.sign() * 1e30)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield case(str(dtype).removeprefix("torch."), logits.to(dtype), factors)


def _cost_outputs(costs: Callable[..., Any], inputs: Inputs) -> Outputs:
    logits = inputs["logits"].detach().requires_grad_()
    _, modality_weight, available = inputs["factors"]
    value = costs(logits, beta=inputs["beta"], modality_weight=modality_weight, available=available)
    (gradient,) = gradients([value], [logits])
    return {"costs": value, "gradient": gradient}


def _cost_tolerances(inputs: Inputs, wanted: Outputs, _implementation: str) -> dict[str, Tensor | float]:
    dtype = inputs["logits"].dtype
    of = {"costs": _OF_VALUES[dtype], "gradient": _OF_COST_GRADIENTS[dtype]}
    return {name: of[name] * max(largest_of(value), 1e-6) for name, value in wanted.items()}


CLASS_COSTS = Operation(
    "class_costs",
    _cost_cases,
    lambda: {"logits": normal(3, 256, 6, seed=0, scale=2.0), "factors": _NO_FACTORS, "beta": 1.0},
    lambda inputs: (inputs["logits"], None, inputs["factors"], LossOptions("original", inputs["beta"])),
    _cost_outputs,
    reference.class_costs,
    _cost_tolerances,
)
