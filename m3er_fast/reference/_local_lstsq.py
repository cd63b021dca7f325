"""The local least squares of the proxies (method step 2).

Dimension legend: Q queries, n bank rows, d features, e target features, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from m3er_fast.operands import upcast

# With a smaller ridge, the normal equations lose the small singular values even in float64; the SVD keeps them.
SMALLEST_CHOLESKY_RIDGE = 1e-8


@overload
def local_least_squares(
    query: Tensor, bank: Tensor, targets: Tensor, neighbors: Tensor, *, ridge: float = ..., affine: bool = ...
) -> tuple[Tensor, Tensor]: ...


@overload
def local_least_squares(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, *, ridge: float = ..., affine: bool = ...
) -> tuple[list[Tensor], Tensor]: ...


def local_least_squares(
    query: Tensor,
    bank: Tensor,
    targets: Tensor | Sequence[Tensor],
    neighbors: Tensor,
    *,
    ridge: float = 1e-3,
    affine: bool = False,
) -> tuple[Tensor | list[Tensor], Tensor]:
    """Return proxies and coefficients; documented at :func:`m3er_fast.functional.local_least_squares`."""
    rows = upcast(bank)[neighbors]  # (Q, K, d)
    wanted = upcast(query)
    # A common scale of both sides does not change the coefficients; with it, squares never overflow.
    tiny = torch.finfo(rows.dtype).tiny
    scale = rows.abs().amax(dim=(1, 2)).maximum(wanted.abs().amax(dim=1)).clamp(min=tiny)
    usable = torch.isfinite(scale)
    scale = torch.where(usable, scale, 1.0)
    # Float64 inside: a Gram matrix squares the condition number, and neighbours are nearly collinear.
    rows64 = torch.where(usable[:, None, None], rows, 0.0).double() / scale[:, None, None]
    wanted64 = torch.where(usable[:, None], wanted, 0.0).double() / scale[:, None]
    size = rows64.square().sum(dim=(1, 2))  # tr(G)
    penalty = ridge * size / rows.shape[1]
    if affine:
        # With a = 1/K + b and Σ b = 0, the rows' mean drops out: b solves the same problem for centred rows, and
        # Σ b = 0 holds by itself, because a centred Gram matrix sends (1, ..., 1) to zero.
        center = rows64.mean(dim=1)
        rows64, wanted64 = rows64 - center[:, None, :], wanted64 - center
    if ridge < SMALLEST_CHOLESKY_RIDGE:
        coefficients = _svd_solution(rows64, wanted64, penalty, torch.finfo(rows.dtype).eps, size.sqrt())
    else:
        coefficients = _cholesky_solution(rows64, wanted64, penalty)
    if affine:
        coefficients = coefficients + 1.0 / rows.shape[1]
    coefficients = torch.where(usable[:, None], coefficients, 0.0).to(rows.dtype)
    if isinstance(targets, Tensor):
        return _combine(coefficients, targets, neighbors), coefficients
    return [_combine(coefficients, target, neighbors) for target in targets], coefficients


def _combine(coefficients: Tensor, target: Tensor, neighbors: Tensor) -> Tensor:
    """Return Σ_r a_r w_r, (Q, e)."""
    return (coefficients[:, None, :] @ upcast(target)[neighbors].to(coefficients.dtype))[:, 0]


def _cholesky_solution(rows: Tensor, wanted: Tensor, penalty: Tensor) -> Tensor:
    """Return argmin_a ‖f - Σ a_r v_r‖² + μ‖a‖² by the normal equations."""
    gram = rows @ rows.mT
    # A Gram matrix of zeros gets a positive ridge; its solution remains zero.
    penalty = penalty.clamp(min=torch.finfo(gram.dtype).tiny)
    gram = gram + penalty[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    right = rows @ wanted[:, :, None]
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))[:, :, 0]


def _svd_solution(rows: Tensor, wanted: Tensor, penalty: Tensor, precision: float, size: Tensor) -> Tensor:
    """Return the same minimum, of least norm where μ = 0, without the directions that are only rounding.

    These are the singular values below ``precision``, the data's, relative to the largest, or below the precision of
    this computation relative to ``size``, the norm of the rows before any centring.
    """
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    smallest = torch.maximum(precision * singular.amax(dim=1), torch.finfo(rows.dtype).eps * size)
    kept = singular > max(rows.shape[1:]) * smallest[:, None]
    filtered = torch.where(kept, singular / torch.where(kept, singular.square() + penalty[:, None], 1.0), 0.0)
    solution: Tensor = left @ (filtered[:, :, None] * (right @ wanted[:, :, None]))
    return solution[:, :, 0]
