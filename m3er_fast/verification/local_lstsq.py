"""Cases of the local least squares.

Dimension legend: Q queries, n bank rows, d features, e features of a target, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m3er_fast import reference
from m3er_fast.verification.operation import Case, Inputs, Operation, Outputs, gradients, largest_of, normal, uniform

# Of a coefficient, relative to the largest of its query. The kernel solves in float32, CuPy in its own order.
_CLOSE = {"triton": 1e-3, "cupy": 1e-5}
_CLOSEST = 2e-6


def _problem(queries: int, rows: int, d: int, e: Sequence[int], k: int) -> dict[str, Any]:
    return {
        "query": normal(queries, d, seed=1),
        "bank": normal(rows, d, seed=2),
        "targets": [normal(rows, width, seed=3 + width) for width in e],
        "neighbors": uniform(queries, rows, seed=4).argsort(dim=1)[:, :k],
        "ridge": 1e-2,
        "affine": False,
        "differentiate": False,
    }


def _cases() -> Iterator[Case]:
    problem = _problem(5, 90, 12, (4,), 8)
    query, bank, neighbors = problem["query"], problem["bank"], problem["neighbors"]
    yield Case("one query, one neighbour", _problem(1, 1, 1, (1,), 1))
    for d, k in ((12, 5), (1, 4), (33, 17)):
        for affine in (False, True):
            name = f"{k} neighbours of {d} features{', affine' if affine else ''}"
            yield Case(name, _problem(3, 90, d, (4, 37), k) | {"affine": affine})
    yield Case("64 neighbours", _problem(2, 90, 70, (3,), 64))
    for affine in (False, True):
        of = {"affine": affine}
        suffix = ", affine" if affine else ""
        yield Case(f"neighbours of zeros{suffix}", problem | {"bank": torch.zeros_like(bank)} | of)
        yield Case(f"neighbours that repeat{suffix}", problem | {"neighbors": neighbors[:, :1].expand(-1, 8)} | of)
        yield Case(
            f"neighbours on a line{suffix}", problem | {"bank": bank[:1] * torch.linspace(-2, 2, 90)[:, None]} | of
        )
        yield Case(f"rows and queries of 1e30{suffix}", problem | {"query": query * 1e30, "bank": bank * 1e30} | of)
    bad = query.clone()
    bad[1, 3], bad[2], bad[4, 0] = torch.nan, torch.inf, -torch.inf
    yield Case("queries with NaN and ±inf", problem | {"query": bad})
    yield Case("no query", problem | {"query": query[:0], "neighbors": neighbors[:0]})
    yield Case("any strides", problem | {"query": query.T.contiguous().T, "bank": bank.T.contiguous().T})
    yield Case("no ridge", problem | {"ridge": 0.0})
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        held = {"query": query.to(dtype), "bank": bank.to(dtype), "targets": [problem["targets"][0].to(dtype)]}
        yield Case(str(dtype).removeprefix("torch."), problem | held)
    yield Case("gradients", problem | {"differentiate": True})


def _given(inputs: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    query, bank, *targets = (
        x.detach().requires_grad_(inputs["differentiate"])
        for x in (inputs["query"], inputs["bank"], *inputs["targets"])
    )
    return query, bank, targets


def _outputs(solve: Callable[..., Any], inputs: Inputs) -> Outputs:
    query, bank, targets = _given(inputs)
    proxies, coefficients = solve(
        query, bank, targets, inputs["neighbors"], ridge=inputs["ridge"], affine=inputs["affine"]
    )
    if inputs["differentiate"]:
        names = ("query", "bank", *(f"targets[{t}]" for t in range(len(targets))))
        grads = gradients([*proxies, coefficients], [query, bank, *targets])
        return {f"gradient of {name}": gradient for name, gradient in zip(names, grads, strict=True)}
    return {"coefficients": coefficients} | {f"proxies[{t}]": proxy for t, proxy in enumerate(proxies)}


def _tolerances(inputs: Inputs, wanted: Outputs, implementation: str) -> dict[str, Tensor | float]:
    close = _CLOSE.get(implementation, _CLOSEST)
    if inputs["differentiate"]:
        return {name: 1e-4 * largest_of(value) for name, value in wanted.items()}
    scale = wanted["coefficients"].abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    tolerances: dict[str, Tensor | float] = {"coefficients": close * scale}
    for t, target in enumerate(inputs["targets"]):
        # The errors of K coefficients add up, times the size of the targets' rows.
        norm = float(target.double().norm(dim=1).max())
        tolerances[f"proxies[{t}]"] = close * scale * norm * inputs["neighbors"].shape[1]
    return tolerances


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    return *_given(inputs), inputs["neighbors"], inputs["ridge"]


LOCAL_LEAST_SQUARES = Operation(
    "local_least_squares",
    _cases,
    lambda: _problem(256, 5000, 300, (74,), 16),
    _arguments,
    _outputs,
    reference.local_least_squares,
    _tolerances,
)
