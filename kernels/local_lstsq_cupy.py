"""Local least squares by CuPy's batched solvers in float64: for any number of neighbours, and for comparison.

Tensors are exchanged by DLPack, without a copy, and CuPy works on torch's current stream. There are three solvers:
batched Cholesky of the normal equations; for a ridge too small for them, QR of the rows with the ridge below them; and
singular values for a ridge of 0, since the solution of least norm must not divide by rounding errors.

Dimension legend: Q queries, b queries of a block, n bank rows, d features, K neighbours, e_t features of target t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import torch
import torch.utils.dlpack
from cupyx.lapack import posv
from torch import Tensor

from m3er_fast.reference import SMALLEST_CHOLESKY_RIDGE

# Size of a block's neighbours in float64. About four copies of it are alive at a time.
_BLOCK_BYTES = 64 * 2**20


def local_least_squares(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, *, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    """Return proxies (Q, e_t) of every target and coefficients (Q, K), in at least float32, of checked CUDA tensors."""
    queries, k = neighbors.shape
    dtype = torch.promote_types(bank.dtype, torch.float32)
    coefficients = torch.empty((queries, k), dtype=dtype, device=query.device)
    proxies = [torch.empty((queries, target.shape[1]), dtype=dtype, device=query.device) for target in targets]
    block = max(1, _BLOCK_BYTES // (8 * (k + 1) * bank.shape[1]))
    for start in range(0, queries, block):
        part = slice(start, start + block)
        rows = neighbors[part]
        coefficients[part] = own = _coefficients(query[part], bank[rows], ridge, affine).to(dtype)
        for proxy, target in zip(proxies, targets, strict=True):
            torch.bmm(own[:, None, :], target[rows].to(dtype), out=proxy[part][:, None, :])
    return proxies, coefficients


def _coefficients(query: Tensor, rows: Tensor, ridge: float, affine: bool) -> Tensor:
    """Return the coefficients (b, K) in float64 of queries (b, d) from their neighbours (b, K, d)."""
    k = rows.shape[1]
    precision = torch.finfo(torch.promote_types(rows.dtype, torch.float32)).eps
    # A common scale of both sides does not change the coefficients, and keeps squares from overflowing.
    scale = rows.abs().amax(dim=(1, 2)).maximum(query.abs().amax(dim=1)).double().clamp(min=1e-300)
    usable = torch.isfinite(scale)
    scale = torch.where(usable, scale, 1.0)
    rows = torch.where(usable[:, None, None], rows, 0.0).double() / scale[:, None, None]
    query = torch.where(usable[:, None], query, 0.0).double() / scale[:, None]
    size = rows.square().sum(dim=(1, 2))
    if affine:
        center = rows.mean(dim=1)
        rows, query = rows - center[:, None, :], query - center
    penalty = (ridge * size / k).clamp(min=torch.finfo(torch.float64).tiny)
    stream = torch.cuda.current_stream(query.device)
    with cupy.cuda.Device(query.device.index), cupy.cuda.ExternalStream(stream.cuda_stream, query.device.index):
        v, f, mu = (cupy.from_dlpack(x.contiguous()) for x in (rows, query, penalty))
        if ridge >= SMALLEST_CHOLESKY_RIDGE:
            solution = _by_cholesky(v, f, mu)
        elif ridge > 0:
            solution = _by_qr(v, f, mu)
        else:
            solution = _by_singular_values(v, f, precision, cupy.sqrt(cupy.from_dlpack(size.contiguous())))
        a: Tensor = torch.utils.dlpack.from_dlpack(cupy.ascontiguousarray(solution))
    if affine:
        a = a + 1.0 / k
    return torch.where(usable[:, None], a, 0.0)


def _by_cholesky(v: Any, f: Any, mu: Any) -> Any:
    """Return argmin_a ‖f - Σ a_r v_r‖² + μ‖a‖² by the normal equations."""
    k = v.shape[1]
    gram = v @ v.transpose(0, 2, 1) + mu[:, None, None] * cupy.eye(k)
    return posv(gram, (v @ f[:, :, None])[:, :, 0])


def _by_qr(v: Any, f: Any, mu: Any) -> Any:
    """Return the same minimum from the rows with √μ·I below them, without squaring the condition number."""
    queries, k, features = v.shape
    augmented = cupy.zeros((queries, features + k, k))
    augmented[:, :features] = v.transpose(0, 2, 1)
    augmented[:, features:] = cupy.sqrt(mu)[:, None, None] * cupy.eye(k)
    q, r = cupy.linalg.qr(augmented)
    right = q[:, :features].transpose(0, 2, 1) @ f[:, :, None]
    return cupy.linalg.solve(r, right)[:, :, 0]


def _by_singular_values(v: Any, f: Any, precision: float, size: Any) -> Any:
    """Return the solution of least norm, without the directions that are rounding errors."""
    left, singular, right = cupy.linalg.svd(v, full_matrices=False)
    smallest = cupy.maximum(precision * singular.max(axis=1), cupy.finfo(cupy.float64).eps * size)
    significant = singular > max(v.shape[1:]) * smallest[:, None]
    inverse = cupy.where(significant, 1.0 / cupy.where(significant, singular, 1.0), 0.0)
    return (left @ (inverse[:, :, None] * (right @ f[:, :, None])))[:, :, 0]
