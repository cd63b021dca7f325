"""Local least squares on the CPU: the normal equations in float64, a cache-sized block of queries at a time.

The neighbours of a block are converted to float64 once, in cache. Squares of float32 numbers neither overflow nor
underflow there, so nothing needs scaling. The Gram matrix and the right-hand side come from one product of
[v_1 .. v_K] with [v_1 .. v_K, f].

Dimension legend: Q queries, b queries of a block, n bank rows, d features, e features of a target, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3er_fast.operands import upcast

# Neighbours of a block in float64: 100 queries with 16 neighbours of 300 features each.
_BLOCK_BYTES = 4 * 2**20


def local_least_squares(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, *, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    """Proxies of every target, and coefficients; :func:`m3er_fast.functional.local_least_squares` documents it.

    Queries and rows are in at most float32, and the ridge is large enough for Cholesky's factorisation.
    """
    dtype = upcast(bank[:0]).dtype
    queries, k = neighbors.shape
    coefficients = torch.empty((queries, k), dtype=dtype)
    proxies = [torch.empty((queries, target.shape[1]), dtype=dtype) for target in targets]
    block = max(1, _BLOCK_BYTES // (8 * (k + 1) * bank.shape[1]))
    for start in range(0, queries, block):
        part = slice(start, start + block)
        rows = neighbors[part]
        coefficients[part] = own = _coefficients(query[part], bank, rows, ridge, affine).to(dtype)
        for proxy, target in zip(proxies, targets, strict=True):
            partners = target.index_select(0, rows.flatten()).to(dtype).view(*rows.shape, target.shape[1])
            torch.bmm(own[:, None, :], partners, out=proxy[part][:, None, :])
    return proxies, coefficients


def _coefficients(query: Tensor, bank: Tensor, neighbors: Tensor, ridge: float, affine: bool) -> Tensor:
    """(b, K) coefficients in float64."""
    queries, k = neighbors.shape
    together = torch.empty((queries, k + 1, bank.shape[1]), dtype=torch.float64)
    together[:, :k] = bank.index_select(0, neighbors.flatten()).view(queries, k, -1)
    together[:, k] = query
    rows = together[:, :k]
    if affine:
        center = rows.mean(dim=1, keepdim=True)
        together -= center
    products = rows @ together.mT
    gram, right = products[:, :, :k], products[:, :, k:]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    usable = torch.isfinite(products.sum(dim=(1, 2)))
    if not bool(usable.all()):
        products[~usable] = 0.0
    size = diagonal.sum(dim=1)
    if affine:  # the ridge goes by the rows as they were
        size += k * center.square().sum(dim=(1, 2)).where(usable, 0.0)
    # A Gram matrix of zeros gets a positive ridge, which does not change its zero solution.
    diagonal += (ridge / k * size).clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    solution = torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram).L)[:, :, 0]
    if affine:
        solution += 1.0 / k
    return solution if bool(usable.all()) else solution.where(usable[:, None], 0.0)
