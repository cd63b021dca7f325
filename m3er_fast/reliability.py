"""How far a proxy can be trusted, by what is known where its original is not: the fit, and the distance to the bank.

A proxy p of w has the signs s = (1, ε, δ): ε = ‖f - f̂‖ / ‖f‖, the relative residual of its source f rebuilt from the
neighbours, and δ = ‖f - v_1‖ / ‖f‖, the distance to the nearest of them; both held to 0..2. Its reliability is
α = c·s, held to 0..1, with the c that minimises Σ ‖w - α p‖² over held-out pairs: the factor by which a proxy should be
shrunk towards the mean of standardised features. 1: the proxy is as good as its direction gets; 0: the mean is better.

Dimension legend: Q frames, d features of the source, e of the target.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SIGNS = 3
_LARGEST_SIGN = 2.0


def signs_of(query: Tensor, rebuilt: Tensor, nearest: Tensor) -> Tensor:
    """Signs (Q, 3) of queries (Q, d), what they were rebuilt as (Q, d), and squared distances (Q,) to the nearest row.

    The frame of zeros, which no vector resembles in relation to its size, has the largest signs.
    """
    query = query.to(rebuilt.dtype)
    size = torch.linalg.vector_norm(query, dim=1)
    ratios = [torch.linalg.vector_norm(query - rebuilt, dim=1) / size, nearest.to(size.dtype).sqrt() / size]
    bounded = [ratio.nan_to_num(nan=_LARGEST_SIGN).clamp(max=_LARGEST_SIGN) for ratio in ratios]
    return torch.stack([torch.ones_like(size), *bounded], dim=1)


def fit_reliability(held_out: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Weights c (3,) from held-out signs (Q, 3), proxies (Q, e) and originals (Q, e), in any number of parts.

    Least squares of least norm, so that signs which do not vary are no matter. Without any pair all weights are zero:
    of a direction nobody has tried, nothing is trusted.
    """
    gram = torch.zeros(SIGNS, SIGNS, dtype=torch.float64)
    moment = torch.zeros(SIGNS, dtype=torch.float64)
    for signs, proxies, originals in held_out:
        s, p, w = (x.to("cpu", torch.float64) for x in (signs, proxies, originals))
        gram += s.mT @ (s * p.square().sum(dim=1, keepdim=True))
        moment += s.mT @ (p * w).sum(dim=1)
    weights: Tensor = torch.linalg.pinv(gram, hermitian=True) @ moment
    return weights


def reliability_of(signs: Tensor, weights: Tensor) -> Tensor:
    """α (Q,) in 0..1 from signs (Q, 3) and weights (3,)."""
    return (signs @ weights.to(signs.dtype)).clamp(0.0, 1.0)
