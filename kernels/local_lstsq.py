"""Local least squares and what it carries over, from neighbour numbers to proxies in one kernel.

A program takes one query. Block of features by block of features it gathers its K neighbours, once, and adds up their
Gram matrix and its right-hand side; eliminates the system where it lies, in registers; and combines the neighbours'
partners in every target with the coefficients. Nothing between the neighbour numbers and the proxies reaches memory.

The ridge makes the system positive definite, so that elimination needs no pivoting: it is Cholesky's factorisation
without the roots, and with the rows above a pivot cleared as well, which leaves no second pass for a back substitution.
Rows and query are scaled by powers of two as they come, so that no square leaves float32 and no digit is lost.

Dimension legend: Q queries, K neighbours, d features, n bank rows, e_t features of target t; ROWS neighbours and
FEATURES features of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3er_fast.kernels._target import TRITON_TYPE, Specialization, Work

_LARGEST = tl.constexpr(3.4028234663852886e38)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _magnitude(x, inside):
    """The largest |x| of a tile; inf if an entry is not finite."""
    size = tl.abs(x)
    size = tl.where(inside, tl.where(size <= _LARGEST, size, float("inf")), 0.0)
    return tl.max(tl.max(size, axis=1), axis=0) if len(x.shape) == 2 else tl.max(size, axis=0)


@triton.jit
def _power_of_two(x):
    """A power of two close to a positive x; its reciprocal is finite, and multiplying by either loses nothing."""
    return tl.exp2(tl.minimum(tl.maximum(tl.floor(tl.log2(x)), -126.0), 126.0))


@triton.jit
def _eliminated(gram, right, k, K: tl.constexpr):
    """The solution of gram · a = right, for a positive definite matrix."""
    for j in range(0, K):
        at = k == j
        row = tl.sum(tl.where(at[:, None], gram, 0.0), axis=0)
        column = tl.sum(tl.where(at[None, :], gram, 0.0), axis=1)
        pivot = tl.sum(tl.where(at, row, 0.0), axis=0)
        own = tl.sum(tl.where(at, right, 0.0), axis=0)
        factor = tl.where(at, 0.0, column / tl.maximum(pivot, _TINY))
        gram -= factor[:, None] * row[None, :]
        right -= factor * own
    diagonal = tl.sum(tl.where(k[:, None] == k[None, :], gram, 0.0), axis=1)
    return right / tl.maximum(diagonal, _TINY)


@triton.jit(do_not_specialize=["query_stride"])
def local_lstsq_fwd_kernel(
    query_ptr,  # (Q, d), rows query_stride apart
    bank_ptr,  # (n, d), rows BANK_STRIDE apart
    target_ptrs,  # one or more of (n, e_t), rows TARGET_STRIDES apart
    neighbor_ptr,  # (Q, K) int64
    proxy_ptrs,  # as many of (Q, e_t) float32
    coefficient_ptr,  # (Q, K) float32
    query_stride,
    ridge,
    K: tl.constexpr,
    D: tl.constexpr,
    BANK_STRIDE: tl.constexpr,  # a compile-time row length shows the compiler how wide a load may be
    TARGETS: tl.constexpr,
    TARGET_DIMS: tl.constexpr,  # e_t
    TARGET_STRIDES: tl.constexpr,
    AFFINE: tl.constexpr,
    PRECISION: tl.constexpr,  # of the products of the Gram matrix
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Coefficients of one query, and its proxies."""
    q = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, ROWS)
    inside = k < K
    row = tl.load(neighbor_ptr + q * K + k, mask=inside, other=0)
    gram = tl.zeros([ROWS, ROWS], tl.float32)  # of the rows over row_scale
    right = tl.zeros([ROWS], tl.float32)  # times the query over query_scale
    size = tl.full([], 0.0, tl.float32)  # tr(G), before any centring
    row_largest = tl.full([], _TINY, tl.float32)
    query_largest = tl.full([], _TINY, tl.float32)
    row_scale = tl.full([], _TINY, tl.float32)
    query_scale = tl.full([], _TINY, tl.float32)
    for first in range(0, D, FEATURES):
        d = first + tl.arange(0, FEATURES)
        here = inside[:, None] & (d < D)[None, :]
        v = tl.load(bank_ptr + (row[:, None] * BANK_STRIDE + d[None, :]), mask=here, other=0.0).to(tl.float32)
        f = tl.load(query_ptr + q * query_stride + d, mask=d < D, other=0.0).to(tl.float32)
        row_largest = tl.maximum(row_largest, _magnitude(v, here))
        scale = _power_of_two(row_largest)
        shrink = row_scale / scale
        row_scale = scale
        v = v * (1.0 / scale)
        size = size * shrink * shrink + tl.sum(tl.sum(v * v, axis=1), axis=0)
        if AFFINE:
            center = tl.sum(v, axis=0) / K
            v = tl.where(here, v - center[None, :], 0.0)
            f = f - center * scale
        query_largest = tl.maximum(query_largest, _magnitude(f, d < D))
        scale = _power_of_two(query_largest)
        right = right * (shrink * (query_scale / scale)) + tl.sum(v * (f * (1.0 / scale))[None, :], axis=1)
        query_scale = scale
        gram = tl.dot(v, tl.trans(v), gram * (shrink * shrink), input_precision=PRECISION)
    # Of zeros alone the solution is zero, whatever the ridge.
    penalty = tl.maximum(ridge * size / K, 1e-30)
    gram += tl.where(k[:, None] == k[None, :], tl.where(inside, penalty, 1.0)[:, None], 0.0)
    a = _eliminated(gram, right, k, K)
    a = tl.where(inside, a, 0.0) * (query_scale / row_scale)
    if AFFINE:  # Σ b = 0 holds by itself but for rounding
        a = a - tl.sum(a, axis=0) / K + 1.0 / K
    largest = tl.maximum(row_largest, query_largest)  # inf where an entry was not finite
    a = tl.where(inside, tl.where(largest <= _LARGEST, a, 0.0), 0.0)
    tl.store(coefficient_ptr + q * K + k, a, mask=inside)
    for t in tl.static_range(TARGETS):
        for first in range(0, TARGET_DIMS[t], FEATURES):
            e = first + tl.arange(0, FEATURES)
            there = inside[:, None] & (e < TARGET_DIMS[t])[None, :]
            w = tl.load(target_ptrs[t] + (row[:, None] * TARGET_STRIDES[t] + e[None, :]), mask=there, other=0.0)
            proxy = tl.sum(a[:, None] * w.to(tl.float32), axis=0)
            tl.store(proxy_ptrs[t] + q * TARGET_DIMS[t] + e, proxy, mask=e < TARGET_DIMS[t])


# --- Launching ---


class Sizes(NamedTuple):
    """All that the kernel is compiled for, beside dtypes."""

    neighbors: int  # K
    features: int  # d
    bank_stride: int  # of a row
    target_features: tuple[int, ...]  # e_t
    target_strides: tuple[int, ...]


class Tile(NamedTuple):
    """Neighbours and features of a tile, and warps."""

    rows: int
    features: int
    warps: int


def tile_for(sizes: Sizes) -> Tile:
    """The table of tile sizes, by K. With 64 features of 16 or 32 rows a thread would need up to 255 registers."""
    if sizes.neighbors <= 16:
        return Tile(16, 32, 1)  # matrix units multiply blocks of at least 16
    return Tile(32, 32, 2) if sizes.neighbors <= 32 else Tile(64, 32, 8)


def _constants(sizes: Sizes, dtype: torch.dtype, *, affine: bool) -> dict[str, Any]:
    tile = tile_for(sizes)
    # Half precision scaled by a power of two fits the digits of tf32; centred it does not.
    exact = dtype is torch.bfloat16 and not affine
    return {
        "K": sizes.neighbors,
        "D": sizes.features,
        "BANK_STRIDE": sizes.bank_stride,
        "TARGETS": len(sizes.target_features),
        "TARGET_DIMS": sizes.target_features,
        "TARGET_STRIDES": sizes.target_strides,
        "AFFINE": affine,
        "PRECISION": "tf32" if exact else "tf32x3",
        "ROWS": tile.rows,
        "FEATURES": tile.features,
    }


def _compile_options(tile: Tile) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": 2, "enable_fp_fusion": True}
    # Left alone the assembler stops at 128 registers on some targets, and spills.
    return options | {"maxnreg": {16: 168, 32: 180, 64: 232}[tile.rows]}


def _by_rows(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows; only one that has none is copied."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _forward(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    count, k = neighbors.shape
    coefficients = query.new_empty((count, k), dtype=torch.float32)
    proxies = [query.new_empty((count, target.shape[1]), dtype=torch.float32) for target in targets]
    if not count:
        return proxies, coefficients
    query, bank, targets = _by_rows(query), _by_rows(bank), [_by_rows(target) for target in targets]
    sizes = Sizes(
        k,
        bank.shape[1],
        bank.stride(0),
        tuple(target.shape[1] for target in targets),
        tuple(target.stride(0) for target in targets),
    )
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        local_lstsq_fwd_kernel[(count,)](
            query,
            bank,
            tuple(targets),
            neighbors.contiguous(),
            tuple(proxies),
            coefficients,
            query.stride(0),
            ridge,
            **_constants(sizes, bank.dtype, affine=affine),
            **_compile_options(tile_for(sizes)),
        )
    return proxies, coefficients


# --- The op ---


@torch.library.custom_op("m3er_fast::local_lstsq", mutates_args=())
def local_lstsq_op(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    """Proxies of every target, and coefficients. Autocast changes nothing; there is no gradient."""
    return _forward(query, bank, targets, neighbors, ridge, affine)


@local_lstsq_op.register_fake
def _local_lstsq_fake(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    count, k = neighbors.shape
    proxies = [query.new_empty((count, target.shape[1]), dtype=torch.float32) for target in targets]
    return proxies, query.new_empty((count, k), dtype=torch.float32)


def local_lstsq(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, *, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    """Proxies (Q, e_t) of every target and coefficients (Q, K), float32, of checked arguments.

    Args:
        query: (Q, d), float16, bfloat16 or float32.
        bank: (n, d), likewise.
        targets: one or more of (n, e_t), likewise, all of one dtype.
        neighbors: (Q, K) int64, K ≤ 64.
        ridge: large enough to stand out of float32's rounding: at least 1e-4.
        affine: whether the coefficients of a query sum to 1.
    """
    # Outside the compiler without the dispatcher, which takes longer than a small batch.
    call: Any = local_lstsq_op if torch.compiler.is_compiling() else _forward
    result: tuple[list[Tensor], Tensor] = call(query, bank, list(targets), neighbors, ridge, affine)
    return result


# --- What the op must move and how its kernel is compiled ---


def work(queries: int, sizes: Sizes, bank_dtype: torch.dtype, target_dtype: torch.dtype) -> Work:
    """The least to be done: gather each neighbour and its partners once, read queries and numbers, write proxies."""
    targets, k = sum(sizes.target_features), sizes.neighbors
    gathered = k * (sizes.features * bank_dtype.itemsize + targets * target_dtype.itemsize)
    moved = gathered + 4 * sizes.features + 8 * k + 4 * (k + targets)
    gram, solve, combined = k * k * sizes.features, 2 * k**3 // 3 + 2 * k * k, 2 * k * targets
    return Work(queries * moved, queries * (gram + 2 * k * sizes.features + solve + combined), "tf32x3")


def specializations() -> Iterator[Specialization]:
    """Every tile of the table, in both precisions of the bank, and the largest rows."""
    for k in (16, 32, 64):
        for dtype in (torch.float32, torch.bfloat16):
            yield _specialization(k, 300, (300,), dtype, affine=False)
        yield _specialization(k, 300, (74, 36), torch.float32, affine=True)
    yield _specialization(10, 300, (300,), torch.bfloat16, affine=True)
    yield _specialization(64, 2048, (2048,), torch.float32, affine=True)
    yield _specialization(64, 2048, (2048,), torch.bfloat16, affine=False)


def _specialization(k: int, d: int, e: tuple[int, ...], dtype: torch.dtype, *, affine: bool) -> Specialization:
    sizes = Sizes(k, d, d, e, e)
    stored = f"*{TRITON_TYPE[dtype]}"
    pointers: dict[str, str | tuple[str, ...]] = {
        "query_ptr": "*fp32",
        "bank_ptr": stored,
        "target_ptrs": (stored,) * len(e),
        "neighbor_ptr": "*i64",
        "proxy_ptrs": ("*fp32",) * len(e),
        "coefficient_ptr": "*fp32",
    }
    return Specialization(
        f"K={k} {d}->{'/'.join(map(str, e))} {TRITON_TYPE[dtype]}{' affine' if affine else ''}",
        local_lstsq_fwd_kernel,
        pointers | {"query_stride": "i64", "ridge": "fp32"},
        _constants(sizes, dtype, affine=affine),
        frozenset(pointers),
        _compile_options(tile_for(sizes)),
    )
