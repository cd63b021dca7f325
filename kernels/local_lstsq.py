"""Local least squares: one kernel from the neighbours' row numbers to the proxies.

Each program solves one query. Block of features by block of features it gathers the K neighbours, once, and adds up
their Gram matrix and the right-hand side. It eliminates the system in registers and combines the neighbours' rows in
every target with the coefficients. Only coefficients and proxies are written to memory.

The ridge makes the system positive definite, so elimination needs no pivoting: it is Cholesky's factorisation without
the roots. The rows above a pivot are eliminated as well, which saves the back substitution. Rows and query are scaled
by powers of two as they are read, so squares stay within float32 and no digit is lost.

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

from m3er_fast.kernels._math import LARGEST, SMALLEST
from m3er_fast.kernels._operators import operator
from m3er_fast.kernels._specialization import TRITON_TYPE, Specialization


@triton.jit
def _magnitude(x, inside):
    """Return the largest |x| of a tile, and inf if an entry is not finite."""
    size = tl.abs(x)
    size = tl.where(inside, tl.where(size <= LARGEST, size, float("inf")), 0.0)
    return tl.max(tl.max(size, axis=1), axis=0) if len(x.shape) == 2 else tl.max(size, axis=0)


@triton.jit
def _power_of_two(x):
    """Return the largest power of two up to a positive normal x, at most 2^126, and its reciprocal.

    Both are exact, being made of an exponent's bits: the hardware's 2^x may be a hair low, and flush 2^-126 to zero.
    """
    exponent = tl.minimum(x.to(tl.int32, bitcast=True) >> 23, 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _eliminated(gram, right, k, K: tl.constexpr):
    """Return the solution a of gram · a = right for a positive definite matrix."""
    for j in range(0, K):
        at = k == j
        row = tl.sum(tl.where(at[:, None], gram, 0.0), axis=0)
        column = tl.sum(tl.where(at[None, :], gram, 0.0), axis=1)
        pivot = tl.sum(tl.where(at, row, 0.0), axis=0)
        own = tl.sum(tl.where(at, right, 0.0), axis=0)
        factor = tl.where(at, 0.0, column / tl.maximum(pivot, SMALLEST))
        gram -= factor[:, None] * row[None, :]
        right -= factor * own
    diagonal = tl.sum(tl.where(k[:, None] == k[None, :], gram, 0.0), axis=1)
    return right / tl.maximum(diagonal, SMALLEST)


@triton.jit(do_not_specialize=["query_stride"])
def local_lstsq_fwd_kernel(
    query_ptr,  # (Q, d), rows query_stride apart
    bank_ptr,  # (n, d), rows BANK_STRIDE apart
    target_ptrs,  # one or more of (n, e_t), rows TARGET_STRIDES apart
    neighbor_ptr,  # (Q, K) int64
    proxy_ptrs,  # of each target, (Q, e_t) float32
    coefficient_ptr,  # (Q, K) float32
    query_stride,
    ridge,
    K: tl.constexpr,
    D: tl.constexpr,
    BANK_STRIDE: tl.constexpr,  # from row lengths known at compile time the compiler sees how wide a load may be
    TARGETS: tl.constexpr,
    TARGET_DIMS: tl.constexpr,  # e_t
    TARGET_STRIDES: tl.constexpr,
    AFFINE: tl.constexpr,
    PRECISION: tl.constexpr,  # of the products of the Gram matrix
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Compute the coefficients and the proxies of one query."""
    q = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, ROWS)
    inside = k < K
    row = tl.load(neighbor_ptr + q * K + k, mask=inside, other=0)
    gram = tl.zeros([ROWS, ROWS], tl.float32)  # of rows / row_scale
    right = tl.zeros([ROWS], tl.float32)  # rows / row_scale · query / query_scale
    size = tl.full([], 0.0, tl.float32)  # tr(G), before any centring
    row_largest = tl.full([], SMALLEST, tl.float32)
    query_largest = tl.full([], SMALLEST, tl.float32)
    row_scale = tl.full([], SMALLEST, tl.float32)
    query_scale = tl.full([], SMALLEST, tl.float32)
    for first in range(0, D, FEATURES):
        d = first + tl.arange(0, FEATURES)
        here = inside[:, None] & (d < D)[None, :]
        v = tl.load(bank_ptr + (row[:, None] * BANK_STRIDE + d[None, :]), mask=here, other=0.0).to(tl.float32)
        f = tl.load(query_ptr + q * query_stride + d, mask=d < D, other=0.0).to(tl.float32)
        row_largest = tl.maximum(row_largest, _magnitude(v, here))
        scale, inverse = _power_of_two(row_largest)
        shrink = row_scale * inverse
        row_scale = scale
        v = v * inverse
        size = size * shrink * shrink + tl.sum(tl.sum(v * v, axis=1), axis=0)
        if AFFINE:
            center = tl.sum(v, axis=0) / K
            v = tl.where(here, v - center[None, :], 0.0)
            f = f - center * scale
        query_largest = tl.maximum(query_largest, _magnitude(f, d < D))
        scale, inverse = _power_of_two(query_largest)
        right = right * (shrink * (query_scale * inverse)) + tl.sum(v * (f * inverse)[None, :], axis=1)
        query_scale = scale
        gram = tl.dot(v, tl.trans(v), gram * (shrink * shrink), input_precision=PRECISION)
    # For rows of zeros alone the solution is zero, whatever the ridge.
    penalty = tl.maximum(ridge * size / K, 1e-30)
    gram += tl.where(k[:, None] == k[None, :], tl.where(inside, penalty, 1.0)[:, None], 0.0)
    a = _eliminated(gram, right, k, K)
    a = tl.where(inside, a, 0.0)
    if AFFINE:  # without rounding Σ b would be 0 already
        a = a - tl.sum(a, axis=0) / K
    # The ratio of the scales may overflow, as the solution then does, but for zeros.
    a = tl.where(a == 0.0, 0.0, a * (query_scale / row_scale))
    if AFFINE:
        a = a + 1.0 / K
    largest = tl.maximum(row_largest, query_largest)  # inf where an entry was not finite
    a = tl.where(inside, tl.where(largest <= LARGEST, a, 0.0), 0.0)
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
    """The sizes that the kernel is compiled for."""

    neighbors: int  # K
    features: int  # d
    bank_stride: int  # distance between rows of the bank
    target_features: tuple[int, ...]  # e_t
    target_strides: tuple[int, ...]


class Tile(NamedTuple):
    """Neighbours and features of a tile, and warps."""

    rows: int
    features: int
    warps: int


def tile_for(sizes: Sizes) -> Tile:
    """Return the tile for K neighbours.

    With 64 features and 16 or 32 neighbours a thread would need up to 255 registers.
    """
    if sizes.neighbors <= 16:
        return Tile(16, 32, 1)  # matrix units multiply blocks of at least 16
    return Tile(32, 32, 2) if sizes.neighbors <= 32 else Tile(64, 32, 8)


def _constants(sizes: Sizes, dtype: torch.dtype, *, affine: bool) -> dict[str, Any]:
    tile = tile_for(sizes)
    # bfloat16 scaled by a power of two fits into tf32's digits. Centred rows do not.
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
    # Without a ceiling of its own the assembler stops at 128 registers for some targets, and spills.
    return options | {"maxnreg": {16: 168, 32: 180, 64: 232}[tile.rows]}


def _by_rows(matrix: Tensor) -> Tensor:
    """Return the matrix, copied only if its rows are not contiguous."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _forward(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    proxies, coefficients = _outputs(query, targets, neighbors)
    count, k = neighbors.shape
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
    # Triton launches on the current device, which need not be the tensors' device.
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


def _outputs(query: Tensor, targets: Sequence[Tensor], neighbors: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return empty tensors for the proxies (Q, e_t) of every target and the coefficients (Q, K)."""
    count, k = neighbors.shape
    proxies = [query.new_empty((count, target.shape[1]), dtype=torch.float32) for target in targets]
    return proxies, query.new_empty((count, k), dtype=torch.float32)


# --- The operator ---


@operator("local_lstsq")
def local_lstsq_op(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    """Return the proxies of every target, and the coefficients. Autocast changes nothing; there is no gradient."""
    return _forward(query, bank, targets, neighbors, ridge, affine)


@local_lstsq_op.register_fake
def _local_lstsq_fake(
    query: Tensor, _: Tensor, targets: Sequence[Tensor], neighbors: Tensor, *__: Any
) -> tuple[list[Tensor], Tensor]:
    return _outputs(query, targets, neighbors)


def local_least_squares(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, *, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    """Return proxies (Q, e_t) of every target and coefficients (Q, K), float32, of checked arguments.

    Args:
        query: (Q, d), float16, bfloat16 or float32.
        bank: (n, d), of these dtypes.
        targets: one or more of (n, e_t), of these dtypes, all of the same one.
        neighbors: (Q, K) int64, K ≤ 64.
        ridge: at least 1e-4: float32 rounds a smaller one away.
        affine: whether the coefficients of a query sum to 1.
    """
    # The operator's dispatcher takes longer than a small batch.
    call: Any = local_lstsq_op if torch.compiler.is_compiling() else _forward
    result: tuple[list[Tensor], Tensor] = call(query, bank, list(targets), neighbors, ridge, affine)
    return result


# --- How the kernel is compiled ---


def specializations() -> Iterator[Specialization]:
    """Yield every tile of the table, with banks in two precisions, and the longest rows."""
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
