"""Cases of the statistics of feature sequences.

Dimension legend: B samples, T time steps, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from m3er_fast import reference
from m3er_fast.operands import SequenceStatistics, upcast
from m3er_fast.verification.operation import (
    Case,
    Inputs,
    Operation,
    Outputs,
    as_float32_holds_it,
    gradients,
    largest_of,
    normal,
    uniform,
)

_CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}


def _problem(batch: int, steps: int, features: int) -> tuple[Tensor, Tensor]:
    """Sequences with holes; the first sample has no valid frame, the second has one, the third repeats a frame."""
    x, valid = normal(batch, steps, features, seed=features), uniform(batch, steps, seed=steps) < 0.7
    valid[:1], valid[1:2] = False, torch.arange(steps) == steps // 2
    x[2:3, steps // 2 :] = x[2:3, steps // 2, None]
    return x, valid


def _cases() -> Iterator[Case]:
    def case(name: str, x: Tensor, valid: Tensor, *, differentiate: bool = False) -> Case:
        return Case(name, {"x": x, "valid": valid, "differentiate": differentiate})

    x, valid = _problem(5, 9, 7)
    yield case("one frame", x[4:, :1], valid[4:, :1] | True)
    yield case("holes, and samples with no frame and with one", x, valid)
    yield case("33 features, every frame valid", *(_problem(6, 12, 33)[0], torch.ones(6, 12, dtype=torch.bool)))
    yield case("1025 features", *_problem(3, 4, 1025))
    yield case("one step", *_problem(4, 1, 3))
    yield case("no sample", x[:0], valid[:0])
    yield case("any strides", x.permute(2, 1, 0).contiguous().permute(2, 1, 0), valid.T.contiguous().T)
    yield case("small changes beside a large offset", 1e4 + x * torch.logspace(-2, -1, 7), valid)
    yield case("frames that never change", x[:, :1].expand(5, 9, 7) / 3, valid)
    yield case("NaN and inf where no frame is valid", _padded(x, valid), valid)
    yield case("NaN, ±inf and 1e30 in valid frames", _damaged(x), valid | True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield case(str(dtype).removeprefix("torch."), x.to(dtype), valid)
    yield case("gradients", x, valid, differentiate=True)


def _padded(x: Tensor, valid: Tensor) -> Tensor:
    held = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(x.shape[2])[: x.shape[2]]
    return torch.where(valid[:, :, None], x, held)


def _damaged(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 3, 1], x[1, 8], x[3, 0, 0] = torch.nan, torch.inf, -torch.inf
    x[4] = x[4].sign() * 1e30
    return x


def _outputs(statistics: Callable[..., Any], inputs: Inputs) -> Outputs:
    x = inputs["x"].detach().requires_grad_(inputs["differentiate"])
    found: SequenceStatistics = statistics(x, inputs["valid"])
    if inputs["differentiate"]:
        return {"gradient": gradients(found[:3], [x])[0]}
    return found._asdict()


def _exact(x: Tensor, valid: Tensor) -> SequenceStatistics:
    mean, variance, change, *counts = reference.sequence_statistics(x, valid)
    return SequenceStatistics(mean, as_float32_holds_it(variance), as_float32_holds_it(change), *counts)


def _tolerances(inputs: Inputs, wanted: Outputs, _implementation: str) -> dict[str, Tensor | float]:
    close = _CLOSE[upcast(inputs["x"][:0]).dtype]
    if inputs["differentiate"]:
        return {"gradient": 10 * close * largest_of(wanted["gradient"])}
    return {
        "mean": close * max(largest_of(torch.where(inputs["valid"][:, :, None], inputs["x"], 0.0)), 1e-30),
        "variance": close * wanted["variance"] + 1e-12,
        "change": close * wanted["change"] + 1e-12,
        "repeated": 0.0,
        "pairs": 0.0,
    }


def _typical() -> Inputs:
    return {"x": normal(64, 20, 300, seed=0), "valid": uniform(64, 20, seed=1) < 0.9, "differentiate": False}


SEQUENCE_STATISTICS = Operation(
    "sequence_statistics",
    _cases,
    _typical,
    lambda inputs: (inputs["x"].detach().requires_grad_(inputs["differentiate"]), inputs["valid"]),
    _outputs,
    _exact,
    _tolerances,
)
