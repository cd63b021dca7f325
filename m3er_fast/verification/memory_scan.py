"""Cases of the memory scan.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, h hidden size, u memory size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m3er_fast import reference
from m3er_fast.operands import MemoryScanWeights, TwoLayers
from m3er_fast.verification.operation import Case, Inputs, Operation, Outputs, gradients, largest_of, normal

# Hidden, memory and inner sizes, as every kernel takes them.
_SMALL = (16, 32, 16, 24, 16)
_PAPER = (32, 128, 128, 64, 64)
_OF_VALUES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
# Relative to the largest of a tensor.
_OF_GRADIENTS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def _problem(
    dims: Sequence[int],
    batch: int,
    steps: int,
    sizes: Sequence[int] = _SMALL,
    *,
    feedback: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Inputs with lengths from -1 to one above T; the weights shrink with a layer's size, so that none saturates."""
    h, u, attention, candidate, gates = sizes
    modalities, cells = len(dims), 2 * h * len(dims)
    seeds = iter(range(100))

    def weight(*shape: int) -> Tensor:
        return normal(*shape, seed=next(seeds), scale=shape[-1] ** -0.5).to(dtype)

    def layers(size: int, inner: int, out: int) -> TwoLayers:
        return TwoLayers(weight(inner, size), weight(inner), weight(out, inner), weight(out))

    weights = MemoryScanWeights(
        input=[weight(4 * h, d) for d in dims],
        recurrent=weight(modalities, 4 * h, h),
        bias=weight(modalities, 4 * h),
        feedback=weight(modalities, 4 * h, 2 * h) if feedback else None,
        attention=layers(cells, attention, cells),
        candidate=layers(cells, candidate, u),
        retain=layers(cells + u, gates, u),
        update=layers(cells + u, gates, u),
    )
    return {
        "features": [normal(batch, steps, d, seed=next(seeds)).to(dtype) for d in dims],
        "lengths": torch.arange(batch) * 3 % (steps + 3) - 1,
        "weights": weights,
        "trains": True,
        "second": False,
    }


def _cases() -> Iterator[Case]:
    yield Case("one step", _problem((3, 2), 2, 1) | {"lengths": torch.tensor([1, 1]), "trains": False})
    for feedback in (True, False):
        name = "feedback" if feedback else "no feedback"
        yield Case(f"{name}, trained", _problem((3, 5, 2), 5, 6, feedback=feedback))
        yield Case(f"{name}, scored", _problem((3, 5, 2), 5, 6, feedback=feedback) | {"trains": False})
    few = _problem((3, 2), 5, 2)
    yield Case("few steps, trained", few)
    yield Case("few steps, scored", few | {"trains": False})
    problem = _problem((3, 2), 5, 6)
    padded = _padded(problem["features"], problem["lengths"])
    yield Case("NaN in padding", problem | {"features": padded, "trains": False})
    yield Case("features of ±1e30", problem | {"features": [x * 1e30 for x in problem["features"]], "trains": False})
    yield Case("no sample", _problem((3, 2), 0, 3))
    yield Case("no valid step", problem | {"lengths": torch.zeros(5, dtype=torch.int64)})
    yield Case("33 samples of one step", _problem((3, 2), 33, 1))
    yield Case("one modality", _problem((3,), 5, 6))
    yield Case("sizes of the paper", _problem((30, 7, 11), 3, 6, _PAPER))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield Case(str(dtype).removeprefix("torch."), _problem((3, 2), 5, 6, dtype=dtype))
    yield Case("second derivative", _problem((3, 2), 3, 4) | {"second": True})


def _padded(features: Sequence[Tensor], lengths: Tensor) -> list[Tensor]:
    padding = torch.arange(features[0].shape[1]) >= lengths[:, None]
    return [x.masked_fill(padding[:, :, None], torch.nan) for x in features]


def _given(inputs: Inputs) -> tuple[list[Tensor], MemoryScanWeights, list[Tensor]]:
    """Features, weights, and all tensors, which need gradients if the scan trains."""
    tensors = [
        None if x is None else x.detach().requires_grad_(inputs["trains"])
        for x in (*inputs["features"], *inputs["weights"].tensors())
    ]
    modalities = len(inputs["features"])
    features = [x for x in tensors[:modalities] if x is not None]
    weights = MemoryScanWeights.of(modalities, tensors[modalities:])
    return features, weights, [x for x in tensors if x is not None]


def _outputs(scan: Callable[..., Any], inputs: Inputs) -> Outputs:
    features, weights, tensors = _given(inputs)
    hidden, memory = scan(features, inputs["lengths"], weights, dropout=0.0, trains=inputs["trains"])
    outputs = {"hidden": hidden, "memory": memory}
    if inputs["second"]:
        first = torch.autograd.grad(hidden.square().sum() + memory.sum(), tensors, create_graph=True)
        total = sum((x.square().sum() for x in first), torch.zeros((), device=hidden.device))
        found = torch.autograd.grad(total, tensors, materialize_grads=True)
    elif inputs["trains"]:
        found = gradients([hidden, memory], tensors)
    else:
        return outputs
    names = [f"features[{m}]" for m in range(len(features))] + _weight_names(weights)
    kind = "second derivative" if inputs["second"] else "gradient"
    return outputs | {f"{kind} of {name}": value for name, value in zip(names, found, strict=True)}


def _weight_names(weights: MemoryScanWeights) -> list[str]:
    """A name of each tensor of the weights that is there."""
    names = [f"input[{m}]" for m in range(len(weights.input))] + ["recurrent", "bias"]
    names += ["feedback"] if weights.feedback is not None else []
    layers = ("attention", "candidate", "retain", "update")
    return names + [f"{layer}.{field}" for layer in layers for field in TwoLayers._fields]


def _exact(features: Any, lengths: Tensor, weights: MemoryScanWeights, *, dropout: float, trains: bool) -> Any:
    return reference.memory_scan(features, lengths, weights, dropout=dropout)


def _tolerances(inputs: Inputs, wanted: Outputs, _implementation: str) -> dict[str, Tensor | float]:
    dtype = inputs["features"][0].dtype
    of_gradients = 1e-3 if inputs["second"] else _OF_GRADIENTS[dtype]
    return {
        name: _OF_VALUES[dtype] if name in ("hidden", "memory") else of_gradients * largest_of(value) + 1e-12
        for name, value in wanted.items()
    }


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    features, weights, tensors = _given(inputs)
    return features[0], features, weights, tensors, inputs["trains"]


MEMORY_SCAN = Operation(
    "memory_scan",
    _cases,
    lambda: _problem((300, 74, 35), 32, 20, _PAPER) | {"lengths": torch.full((32,), 20)},
    _arguments,
    _outputs,
    _exact,
    _tolerances,
)
