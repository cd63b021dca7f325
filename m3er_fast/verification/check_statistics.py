"""Cases of the statistics of the modality check.

Dimension legend: B samples, d_m features of modality m, k_p canonical components of pair p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m3er_fast import reference
from m3er_fast.operands import CheckProjections, CheckStatistics, modality_pairs, upcast
from m3er_fast.verification.operation import (
    Case,
    Inputs,
    Operation,
    Outputs,
    as_float32_holds_it,
    gradients,
    normal,
    uniform,
)

# Of a correlation, and relative of an energy.
_CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Likelihoods are divided by 1 - s², down to 0.04.
_LIKELIHOOD = 20.0


def _projections(
    dims: Sequence[int], components: Sequence[int], ranks: Sequence[int] | None = None, *, triangular: bool = True
) -> CheckProjections:
    def matrix(rows: int, columns: int, seed: int) -> Tensor:
        return normal(rows, columns, seed=seed, scale=max(columns, 1) ** -0.5)

    pairs = list(zip(modality_pairs(len(dims)), components, strict=True))
    whiteners = [matrix(r, d, 50 + r) for r, d in zip(ranks or dims, dims, strict=True)]
    return CheckProjections(
        center=[matrix(1, d, d)[0] for d in dims],
        left=[matrix(k, dims[i], 10 + i + k) for (i, _), k in pairs],
        left_bias=[normal(k, seed=20 + k) for k in components],
        right=[matrix(k, dims[j], 30 + j + k) for (_, j), k in pairs],
        right_bias=[normal(k, seed=40 + k) for k in components],
        whitener=[whitener.triu() if triangular else whitener for whitener in whiteners],
        weight=[uniform(k, seed=60 + k, low=0.2) for k in components],
        canonical=[uniform(k, seed=70 + k, high=0.98) for k in components],
        triangular=triangular,
    )


def _cases() -> Iterator[Case]:
    def case(name: str, features: Sequence[Tensor], projections: CheckProjections, **more: Any) -> Case:
        inputs = {"features": list(features), "projections": projections, "differentiate": False} | more
        return Case(name, inputs)

    dims, components = (33, 9, 5), (6, 0, 3)
    features = [normal(67, d, seed=100 + d) for d in dims]
    triangular, dense = _projections(dims, components), _projections(dims, components, (20, 0, 7), triangular=False)
    yield case("one sample", [x[:1] for x in features], triangular)
    yield case("triangular whiteners", features, triangular)
    yield case("whiteners of lower rank", features, dense)
    yield case("no sample", [x[:0] for x in features], triangular)
    yield case("one modality", features[:1], _projections(dims[:1], ()))
    yield case("one component", features[:2], _projections(dims[:2], (1,)))
    yield case("any strides", [x.T.contiguous().T for x in features], triangular)
    yield case("features of 1e15", [x * 1e15 for x in features], triangular)
    bad = [x.clone() for x in features]
    bad[0][1], bad[1][2, 3], bad[2][3], bad[2][4, 0] = triangular.center[0], torch.nan, torch.inf, -torch.inf
    bad[1][66] = torch.nan
    yield case("NaN, ±inf and a sample at the mean", bad, _unbiased(triangular))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield case(str(dtype).removeprefix("torch."), [x.to(dtype) for x in features], triangular)
    yield case("gradients", features, dense, differentiate=True)


def _unbiased(projections: CheckProjections) -> CheckProjections:
    left, right = ([torch.zeros_like(x) for x in biases] for biases in (projections.left_bias, projections.right_bias))
    return projections._replace(left_bias=left, right_bias=right)


def _outputs(statistics: Callable[..., Any], inputs: Inputs) -> Outputs:
    features = [x.detach().requires_grad_(inputs["differentiate"]) for x in inputs["features"]]
    found: CheckStatistics = statistics(features, inputs["projections"])
    if not inputs["differentiate"]:
        return found._asdict()
    grads = gradients(found, features)
    return {f"gradient of features[{m}]": gradient for m, gradient in enumerate(grads)}


def _exact(features: Sequence[Tensor], projections: CheckProjections) -> CheckStatistics:
    return CheckStatistics(*map(as_float32_holds_it, reference.check_statistics(features, projections)))


def _tolerances(inputs: Inputs, wanted: Outputs, _implementation: str) -> dict[str, Tensor | float]:
    close = _CLOSE[upcast(inputs["features"][0][:0]).dtype]
    if inputs["differentiate"]:
        return {name: 10 * _LIKELIHOOD * close * value.abs().max() for name, value in wanted.items()}
    likelihood = wanted["likelihood"].abs()
    return {
        "correlation": close,
        "energy": close * wanted["energy"] + 1e-30,
        "likelihood": _LIKELIHOOD * close * (1.0 + likelihood),
    }


def _typical() -> Inputs:
    dims = (300, 74, 35)
    return {
        "features": [normal(256, d, seed=d) for d in dims],
        "projections": _projections(dims, (30, 30, 30)),
        "differentiate": False,
    }


CHECK_STATISTICS = Operation(
    "check_statistics",
    _cases,
    _typical,
    lambda inputs: (
        inputs["features"][0].detach().requires_grad_(inputs["differentiate"]),
        [x.detach().requires_grad_(inputs["differentiate"]) for x in inputs["features"]],
        inputs["projections"],
    ),
    _outputs,
    _exact,
    _tolerances,
)
