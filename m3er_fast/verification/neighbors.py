"""Cases of the nearest neighbours. The banks are so small that the approximate engines must find every neighbour.

Dimension legend: Q queries, n bank rows, d features, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from m3er_fast import reference
from m3er_fast.verification.operation import Case, Inputs, Operation, Outputs, gradients, normal

# Squared distances, relative to the largest squared norm of a query or a row.
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def _cases() -> Iterator[Case]:
    def case(name: str, query: Tensor, bank: Tensor, k: int, *, differentiate: bool = False) -> Case:
        return Case(name, {"query": query, "bank": bank, "k": k, "differentiate": differentiate})

    query, bank = normal(9, 7, seed=0), normal(60, 7, seed=1)
    yield case("one row", query[:1], bank[:1], 1)
    yield case("60 rows", query, bank, 5)
    yield case("200 rows of 33 features", normal(17, 33, seed=2), normal(200, 33, seed=3), 16)
    yield case("more neighbours than rows", query, bank[:3], 7)
    yield case("rows that repeat", query, bank[:6].repeat(10, 1), 9)
    yield case("rows of zeros", query, torch.zeros(60, 7), 4)
    yield case("no query", query[:0], bank, 5)
    yield case("any strides", query.T.contiguous().T, bank.T.contiguous().T, 5)
    bad = query.clone()
    bad[2, 3], bad[5], bad[7, 0] = torch.nan, torch.inf, -torch.inf
    yield case("queries with NaN and ±inf", bad, bank, 5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield case(str(dtype).removeprefix("torch."), query.to(dtype), bank.to(dtype), 5)
    yield case("gradients", query, bank, 5, differentiate=True)


def _outputs(search: Callable[..., Any], inputs: Inputs) -> Outputs:
    query, bank = inputs["query"], inputs["bank"]
    if inputs["differentiate"]:
        query, bank = (x.detach().requires_grad_() for x in (query, bank))
    distances, rows = search(query, bank, min(inputs["k"], len(bank)))
    if inputs["differentiate"]:
        of_query, of_bank = gradients([distances], [query, bank])
        return {"gradient of query": of_query, "gradient of bank": of_bank}
    # Which of several rows at the same distance is found does not matter: the distances of those found must be right.
    measured = (query[:, None].double() - bank[rows].double()).square().sum(dim=2)
    return {"distances": distances, "distances of the rows": torch.where(distances < torch.inf, measured, torch.inf)}


def _exact(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    finite = query.isfinite().all(dim=1, keepdim=True)
    distances, rows = reference.nearest_neighbors(query.where(finite, 0.0), bank, k)
    return distances.where(finite, torch.inf), rows


def _tolerances(inputs: Inputs, wanted: Outputs, _implementation: str) -> dict[str, Tensor | float]:
    norms = [inputs[name].double().nan_to_num(0.0, 0.0, 0.0).square().sum(dim=1) for name in ("query", "bank")]
    close = _CLOSE[inputs["query"].dtype] * float(torch.cat(norms).amax())
    return dict.fromkeys(wanted, close)


NEAREST_NEIGHBORS = Operation(
    "nearest_neighbors",
    _cases,
    lambda: {"query": normal(256, 300, seed=0), "bank": normal(5000, 300, seed=1), "k": 16, "differentiate": False},
    lambda inputs: (inputs["query"], inputs["bank"], inputs["differentiate"]),
    _outputs,
    _exact,
    _tolerances,
)
