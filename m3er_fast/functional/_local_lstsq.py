"""Local least squares: arguments are checked here, and then solved.

Dimension legend: Q queries, n bank rows, d features, e features of a target, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from m3er_fast._validation import check_matrix, check_number
from m3er_fast.functional._dispatch import choose


@overload
def local_least_squares(
    query: Tensor,
    bank: Tensor,
    targets: Tensor,
    neighbors: Tensor,
    *,
    ridge: float = ...,
    affine: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def local_least_squares(
    query: Tensor,
    bank: Tensor,
    targets: Sequence[Tensor],
    neighbors: Tensor,
    *,
    ridge: float = ...,
    affine: bool = ...,
    backend: str = ...,
) -> tuple[list[Tensor], Tensor]: ...


def local_least_squares(
    query: Tensor,
    bank: Tensor,
    targets: Tensor | Sequence[Tensor],
    neighbors: Tensor,
    *,
    ridge: float = 1e-3,
    affine: bool = False,
    backend: str = "auto",
) -> tuple[Tensor | list[Tensor], Tensor]:
    """Proxies: each query rebuilt from its neighbours, and the same combination of their partners' rows.

    a = argmin_a ‖f - Σ_r a_r v_r‖² + λ·tr(G)/K·‖a‖², G = (v_r · v_s) over the K neighbours; proxy = Σ_r a_r w_r
    (the relaxed linear map of Mittal et al. 2020, arXiv 1911.05659; ``affine=True`` adds Σ_r a_r = 1, the weights of
    locally linear embedding). Solved in float64, by the kernel in float32.

    Args:
        query: (Q, d), the vectors f. One that is not finite gets coefficients of zero.
        bank: (n, d), the rows v_r.
        targets: (n, e), the rows w_r paired with them; or several such tensors, to which the same coefficients go.
        neighbors: (Q, K) int64 rows of the bank, K ≥ 1, as :func:`nearest_neighbors` gives them.
        ridge: λ ≥ 0. A ridge of 0 gives the minimum of least norm, so that collinear or repeated neighbours are safe.
        affine: whether the coefficients of a query sum to 1.
        backend: "auto", "torch", "triton" or "cupy". The Triton kernel takes up to 64 neighbours and a ridge of at
            least 1e-4; "auto" goes to plain PyTorch for the rest. CuPy, for CUDA tensors, takes any of both.

    Returns:
        proxies (Q, e), a list of them for several targets, and coefficients (Q, K), in at least float32.

    Raises:
        ValueError: naming the argument and its shape.
        BackendUnavailableError: if the backend asked for does not work here.
    """
    several = not isinstance(targets, Tensor)
    paired: list[Tensor] = [targets] if isinstance(targets, Tensor) else list(targets)
    _check_problem(query, bank, paired, neighbors)
    check_number("ridge", ridge, 0.0)
    proxies, coefficients = solve_local_least_squares(
        query, bank, paired, neighbors, ridge=ridge, affine=affine, backend=backend
    )
    return (proxies if several else proxies[0]), coefficients


def solve_local_least_squares(
    query: Tensor,
    bank: Tensor,
    targets: Sequence[Tensor],
    neighbors: Tensor,
    *,
    ridge: float,
    affine: bool,
    backend: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    """:func:`local_least_squares` of checked arguments and several targets."""
    solve = choose("local_least_squares", backend, query, bank, targets, neighbors, ridge).load()
    solved: tuple[list[Tensor], Tensor] = solve(query, bank, targets, neighbors, ridge=ridge, affine=affine)
    return solved


def _check_problem(query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor) -> None:
    if not targets:
        raise ValueError("targets is empty: wanted a tensor, or one or more of them")
    names = ["targets"] if len(targets) == 1 else [f"targets[{t}]" for t in range(len(targets))]
    for name, value in (("query", query), ("bank", bank), *zip(names, targets, strict=True)):
        check_matrix(name, value)
    if query.shape[1] != bank.shape[1]:
        raise ValueError(f"query has {query.shape[1]} features, but bank has {bank.shape[1]}")
    for name, target in zip(names, targets, strict=True):
        if target.shape[0] != bank.shape[0]:
            raise ValueError(f"{name} has {target.shape[0]} rows, but bank has {bank.shape[0]}: they must be paired")
    if neighbors.ndim != 2 or neighbors.shape[0] != query.shape[0] or not neighbors.shape[1]:
        raise ValueError(f"neighbors has shape {tuple(neighbors.shape)}, wanted ({query.shape[0]}, K) with K ≥ 1")
    if neighbors.dtype != torch.int64:
        raise ValueError(f"neighbors must be int64, got {neighbors.dtype}")
    if neighbors.numel() and neighbors.device.type == "cpu":
        low, high = map(int, neighbors.aminmax())
        if low < 0 or high >= bank.shape[0]:
            raise ValueError(f"neighbors must lie in 0..{bank.shape[0] - 1}, got values from {low} to {high}")
