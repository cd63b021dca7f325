"""What it takes to verify an operation: small hard inputs, its definition, and how far a result may be off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = Mapping[str, Any]
"""Arguments of an operation by name: tensors, records of them, and options."""

Outputs = dict[str, Tensor]
"""Results and gradients by name."""


class Case(NamedTuple):
    """One input of an operation."""

    name: str
    inputs: Inputs  # on the CPU


class Operation(NamedTuple):
    """An operation as it is verified."""

    name: str
    cases: Callable[[], Iterable[Case]]  # the first is small, and one that every implementation takes
    typical: Callable[[], Inputs]  # of the size at which it is timed
    arguments: Callable[[Inputs], tuple[Any, ...]]  # of the dispatcher's choice, the tensor that decides first
    outputs: Callable[[Callable[..., Any], Inputs], Outputs]  # of a function that computes the operation
    definition: Callable[..., Any]  # such a function: the reference
    tolerances: Callable[[Inputs, Outputs, str], Mapping[str, Tensor | float]]  # of each output, by implementation


def moved(inputs: Inputs, device: torch.device) -> dict[str, Any]:
    """The same inputs on a device."""
    on_device: dict[str, Any] = pytree.tree_map_only(Tensor, lambda x: x.to(device), dict(inputs))
    return on_device


def in_float64(inputs: Inputs) -> dict[str, Any]:
    """The same numbers in float64, for the definition."""
    wide: dict[str, Any] = pytree.tree_map_only(
        Tensor, lambda x: x.double() if x.is_floating_point() else x, dict(inputs)
    )
    return wide


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Random numbers (float32), the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def uniform(*shape: int, seed: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Random numbers (float32) between two bounds."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def as_float32_holds_it(x: Tensor) -> Tensor:
    """``x``, held at float32's largest numbers: where float64 has more, every implementation has these."""
    largest = torch.finfo(torch.float32).max
    return x.clamp(-largest, largest)


def largest_of(x: Tensor) -> float:
    """The largest absolute value of ``x`` that is finite; 0 of an empty tensor."""
    return float(x.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if x.numel() else 0.0


def gradients(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a sum of the results with uneven factors, so that no element's share vanishes in another's."""
    factors = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in results]
    return torch.autograd.grad(results, leaves, factors, materialize_grads=True)
