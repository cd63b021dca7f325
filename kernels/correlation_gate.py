"""Statistics of the modality check, and the mask of modalities that pass, in one kernel.

A program takes a block of samples. For each pair it projects both sides by the folded matrices, block of features by
block of features, and reduces the two projections to their cosine while they are still in registers; for each modality
it does the same with the whitener, to the mean square. Products are tf32x3, three passes of the matrix unit that keep
float32's digits: plain tf32 moves masks near a threshold.

Dimension legend: M modalities, B samples, d_m features of modality m, P = M(M-1)/2 pairs, k_p components of pair p,
r_m whitened directions of modality m; ROWS samples, FEATURES features and DIRECTIONS whitened directions of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3er_fast.kernels._launch import TRITON_TYPE, Specialization, Work

_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _centered(
    x_ptr,  # (B, D), rows STRIDE apart
    center_ptr,  # (D,) float32
    b,
    inside,
    first,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Features first.. of the samples (ROWS, FEATURES), less their mean; zeros beyond the last feature."""
    d = first + tl.arange(0, FEATURES)
    x = tl.load(x_ptr + (b[:, None] * STRIDE + d[None, :]), mask=inside[:, None] & (d < D)[None, :], other=0.0).to(
        tl.float32
    )
    return x - tl.load(center_ptr + d, mask=d < D, other=0.0)[None, :]


@triton.jit
def _projected(
    x_ptr,  # (B, D), rows STRIDE apart
    center_ptr,  # (D,) float32
    matrix_ptr,  # (K, D) float32
    b,
    inside,
    first_row,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows first_row.. of the matrix times the centred samples: (ROWS, COLUMNS), zeros beyond the last row."""
    k = first_row + tl.arange(0, COLUMNS)
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, D, FEATURES):
        x = _centered(x_ptr, center_ptr, b, inside, first, D, STRIDE, FEATURES)
        d = first + tl.arange(0, FEATURES)
        matrix = tl.load(matrix_ptr + k[None, :] * D + d[:, None], mask=(k < K)[None, :] & (d < D)[:, None], other=0.0)
        result = tl.dot(x, matrix, result, input_precision="tf32x3")
    return result


@triton.jit
def _cosine(u, v):
    """Cosine of the rows; 0 where a row is zero or not finite. Scaled by their largest entries, squares never leave."""
    u_largest, v_largest = tl.max(tl.abs(u), axis=1), tl.max(tl.abs(v), axis=1)
    u = u / tl.where(u_largest > 0, u_largest, 1.0)[:, None]
    v = v / tl.where(v_largest > 0, v_largest, 1.0)[:, None]
    product = tl.sqrt(tl.sum(u * u, axis=1)) * tl.sqrt(tl.sum(v * v, axis=1))
    cosine = tl.sum(u * v, axis=1) / tl.where(product > 0, product, 1.0)
    defined = (product > 0) & (tl.abs(cosine) < 2.0)  # no NaN is below anything
    return tl.where(defined, tl.minimum(tl.maximum(cosine, -1.0), 1.0), 0.0)


@triton.jit
def correlation_gate_fwd_kernel(
    x_ptrs,  # M of (B, d_m), rows STRIDES apart
    center_ptrs,  # M of (d_m,) float32
    left_ptrs,  # P of (k_p, d_i) float32
    left_bias_ptrs,  # P of (k_p,) float32
    right_ptrs,  # P of (k_p, d_j) float32
    right_bias_ptrs,  # P of (k_p,) float32
    whitener_ptrs,  # M of (r_m, d_m) float32
    threshold_ptr,  # (P + 2M,) float32: of ρ, least energies, greatest energies
    available_ptr,  # (B, M) bool
    correlation_ptr,  # (B, P) float32
    energy_ptr,  # (B, M) float32
    effective_ptr,  # (B, M) bool
    B,
    available_stride_b,
    available_stride_m,
    M: tl.constexpr,
    P: tl.constexpr,
    FIRST: tl.constexpr,  # of each pair, the first modality,
    SECOND: tl.constexpr,  # and the second
    DIMS: tl.constexpr,  # d_m
    STRIDES: tl.constexpr,  # a compile-time row length shows the compiler how wide a load may be
    COMPONENTS: tl.constexpr,  # k_p
    RANKS: tl.constexpr,  # r_m
    HAS_THRESHOLDS: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
    ANY: tl.constexpr,  # the rule: one failing comparison is enough
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,  # components of a tile, at least every k_p
    DIRECTIONS: tl.constexpr,
):
    """ρ of every pair, energy of every modality, and which modalities are effective."""
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = b < B
    energies = ()
    for m in tl.static_range(M):
        total = tl.zeros([ROWS], tl.float32)
        for first in range(0, RANKS[m], DIRECTIONS):
            whitened = _projected(
                x_ptrs[m], center_ptrs[m], whitener_ptrs[m], b, inside, first,
                DIMS[m], STRIDES[m], RANKS[m], ROWS, FEATURES, DIRECTIONS,
            )  # fmt: skip
            total += tl.sum(whitened * whitened, axis=1)
        energy = total / max(RANKS[m], 1)
        energy = tl.where(energy <= _LARGEST, energy, _LARGEST)  # NaN and inf too
        tl.store(energy_ptr + b * M + m, energy, mask=inside)
        energies = energies + (energy,)
    correlations = ()
    k = tl.arange(0, COLUMNS)
    for p in tl.static_range(P):
        u = _projected(
            x_ptrs[FIRST[p]], center_ptrs[FIRST[p]], left_ptrs[p], b, inside, 0,
            DIMS[FIRST[p]], STRIDES[FIRST[p]], COMPONENTS[p], ROWS, FEATURES, COLUMNS,
        )  # fmt: skip
        u += tl.load(left_bias_ptrs[p] + k, mask=k < COMPONENTS[p], other=0.0)[None, :]
        v = _projected(
            x_ptrs[SECOND[p]], center_ptrs[SECOND[p]], right_ptrs[p], b, inside, 0,
            DIMS[SECOND[p]], STRIDES[SECOND[p]], COMPONENTS[p], ROWS, FEATURES, COLUMNS,
        )  # fmt: skip
        v += tl.load(right_bias_ptrs[p] + k, mask=k < COMPONENTS[p], other=0.0)[None, :]
        correlation = _cosine(u, v)
        tl.store(correlation_ptr + b * P + p, correlation, mask=inside)
        correlations = correlations + (correlation,)
    if HAS_THRESHOLDS:
        trusted = ()
        for m in tl.static_range(M):
            low, high = tl.load(threshold_ptr + P + m), tl.load(threshold_ptr + P + M + m)
            here = (energies[m] >= low) & (energies[m] <= high)
            if HAS_AVAILABLE:
                offsets = b * available_stride_b + m * available_stride_m
                here = here & tl.load(available_ptr + offsets, mask=inside, other=0).to(tl.int1)
            trusted = trusted + (here,)
        for m in tl.static_range(M):
            compared = tl.zeros([ROWS], tl.int32)
            passed = tl.zeros([ROWS], tl.int32)
            for p in tl.static_range(P):
                if FIRST[p] == m or SECOND[p] == m:
                    both = trusted[FIRST[p]] & trusted[SECOND[p]]
                    # Exactly 0 means undefined, which passes no threshold.
                    passes = (correlations[p] >= tl.load(threshold_ptr + p)) & (correlations[p] != 0)
                    compared += both.to(tl.int32)
                    passed += (both & passes).to(tl.int32)
            enough = (passed == compared) if ANY else (passed > 0) | (compared == 0)
            tl.store(effective_ptr + b * M + m, trusted[m] & enough, mask=inside)


# --- Launching ---


class Sizes(NamedTuple):
    """Feature sizes of a check: all that a kernel is compiled for."""

    dims: tuple[int, ...]  # d_m
    components: tuple[int, ...]  # k_p
    ranks: tuple[int, ...]  # r_m
    strides: tuple[int, ...]  # of a row of features


class Tile(NamedTuple):
    """Samples, features, components and whitened directions of a tile; warps, and loads in flight."""

    rows: int
    features: int
    columns: int
    directions: int
    warps: int
    stages: int


def tile_for(sizes: Sizes) -> Tile:
    """The table of tile sizes, by feature sizes only."""
    # Matrix units multiply blocks of at least 16.
    columns = max(16, triton.next_power_of_2(max((*sizes.components, 1))))
    directions = min(64, max(16, triton.next_power_of_2(max((*sizes.ranks, 1)))))
    # Two projections of a pair are alive at once.
    return Tile(64, 32, columns, directions, 8 if columns >= 128 else 4, 2)


def _constants(sizes: Sizes, *, has_thresholds: bool, has_available: bool, any_rule: bool) -> dict[str, Any]:
    modalities = len(sizes.dims)
    pairs = list(combinations(range(modalities), 2))
    tile = tile_for(sizes)
    return {
        "M": modalities,
        "P": len(pairs),
        "FIRST": tuple(i for i, _ in pairs),
        "SECOND": tuple(j for _, j in pairs),
        "DIMS": sizes.dims,
        "STRIDES": sizes.strides,
        "COMPONENTS": sizes.components,
        "RANKS": sizes.ranks,
        "HAS_THRESHOLDS": has_thresholds,
        "HAS_AVAILABLE": has_available,
        "ANY": any_rule,
        "ROWS": tile.rows,
        "FEATURES": tile.features,
        "COLUMNS": tile.columns,
        "DIRECTIONS": tile.directions,
    }


def _compile_options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _rows(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Features whose rows are contiguous: only those that are not are copied."""
    return tuple(x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in features)


def _matrices(values: Sequence[Tensor], nothing: Tensor) -> tuple[Tensor, ...]:
    """What a kernel reads of each pair or modality; of no pairs something that it does not read."""
    return tuple(value.to(torch.float32).contiguous() for value in values) or (nothing,)


def _forward(
    features: Sequence[Tensor],
    center: Sequence[Tensor],
    left: Sequence[Tensor],
    left_bias: Sequence[Tensor],
    right: Sequence[Tensor],
    right_bias: Sequence[Tensor],
    whitener: Sequence[Tensor],
    thresholds: Tensor | None,
    available: Tensor | None,
    any_rule: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, modalities, pairs = features[0].shape[0], len(features), len(left)
    first = features[0]
    correlation = first.new_empty((batch, pairs), dtype=torch.float32)
    energy = first.new_empty((batch, modalities), dtype=torch.float32)
    effective = first.new_empty((batch, modalities if thresholds is not None else 0), dtype=torch.bool)
    if not batch:
        return correlation, energy, effective
    rows = _rows(features)
    sizes = Sizes(
        tuple(x.shape[1] for x in rows),
        tuple(matrix.shape[0] for matrix in left),
        tuple(matrix.shape[0] for matrix in whitener),
        tuple(x.stride(0) for x in rows),
    )
    tile = tile_for(sizes)
    mask = effective if available is None else available
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(first):
        correlation_gate_fwd_kernel[(triton.cdiv(batch, tile.rows),)](
            rows,
            *(_matrices(values, energy) for values in (center, left, left_bias, right, right_bias, whitener)),
            energy if thresholds is None else thresholds.to(torch.float32).contiguous(),
            mask,
            correlation,
            energy,
            effective,
            batch,
            *mask.stride(),
            **_constants(
                sizes,
                has_thresholds=thresholds is not None,
                has_available=available is not None,
                any_rule=any_rule,
            ),
            **_compile_options(tile),
        )
    return correlation, energy, effective


# --- The op ---


@torch.library.custom_op("m3er_fast::correlation_gate", mutates_args=())
def correlation_gate_op(
    features: Sequence[Tensor],
    center: Sequence[Tensor],
    left: Sequence[Tensor],
    left_bias: Sequence[Tensor],
    right: Sequence[Tensor],
    right_bias: Sequence[Tensor],
    whitener: Sequence[Tensor],
    thresholds: Tensor | None,
    available: Tensor | None,
    any_rule: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlation, energy, and (with thresholds) the mask. Autocast changes nothing; there is no gradient."""
    return _forward(features, center, left, left_bias, right, right_bias, whitener, thresholds, available, any_rule)


@correlation_gate_op.register_fake
def _correlation_gate_fake(
    features: Sequence[Tensor],
    center: Sequence[Tensor],
    left: Sequence[Tensor],
    left_bias: Sequence[Tensor],
    right: Sequence[Tensor],
    right_bias: Sequence[Tensor],
    whitener: Sequence[Tensor],
    thresholds: Tensor | None,
    available: Tensor | None,
    any_rule: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    first, modalities = features[0], len(features)
    return (
        first.new_empty((first.shape[0], len(left)), dtype=torch.float32),
        first.new_empty((first.shape[0], modalities), dtype=torch.float32),
        first.new_empty((first.shape[0], modalities if thresholds is not None else 0), dtype=torch.bool),
    )


def correlation_gate(
    features: Sequence[Tensor],
    projections: tuple[Sequence[Tensor], ...],
    *,
    thresholds: Tensor | None = None,
    available: Tensor | None = None,
    any_rule: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlation (B, P), energy (B, M) and, with thresholds (P + 2M,), the mask (B, M), of checked arguments.

    ``projections`` are the six fields of :class:`m3er_fast.functional.GateProjections`; float16, bfloat16 or float32
    features.
    """
    center, left, left_bias, right, right_bias, whitener = projections
    # Outside the compiler without the dispatcher, which takes longer than a small batch.
    call: Any = correlation_gate_op if torch.compiler.is_compiling() else _forward
    result: tuple[Tensor, Tensor, Tensor] = call(
        list(features), center, left, left_bias, right, right_bias, whitener, thresholds, available, any_rule
    )
    return result


# --- What the op must move and how its kernel is compiled ---


def work(batch: int, sizes: Sizes, dtype: torch.dtype) -> Work:
    """The least to be done: read features and matrices once, write two statistics; one product with each matrix."""
    pairs = list(combinations(range(len(sizes.dims)), 2))
    numbers = sum(k * (sizes.dims[i] + sizes.dims[j]) for (i, j), k in zip(pairs, sizes.components, strict=True))
    numbers += sum(dim * rank for dim, rank in zip(sizes.dims, sizes.ranks, strict=True))
    moved = batch * sum(sizes.dims) * dtype.itemsize + 4 * numbers + 4 * batch * (len(pairs) + len(sizes.dims))
    return Work(moved, 2 * batch * numbers, "tf32x3")


def specializations() -> Iterator[Specialization]:
    """Every tile of the table, with and without the mask."""
    paper = Sizes((300, 74, 35), (30, 30, 30), (300, 74, 35), (300, 74, 35))
    for dtype in (torch.float32, torch.bfloat16):
        yield _specialization("300/74/35 k=30", paper, dtype, masked=False)
    yield _specialization("300/74/35 k=30", paper, torch.float32, masked=True)
    for k in (64, 128):
        yield _specialization(
            f"2048/256 k={k}", Sizes((2048, 256), (k,), (2048, 256), (2048, 256)), torch.float32, masked=True
        )
    four = Sizes((64,) * 4, (16,) * 6, (64,) * 4, (64,) * 4)
    yield _specialization("4 x 64 k=16", four, torch.float32, masked=True)


def _specialization(label: str, sizes: Sizes, dtype: torch.dtype, *, masked: bool) -> Specialization:
    modalities, pairs = len(sizes.dims), len(sizes.components)
    pointers: dict[str, str | tuple[str, ...]] = {
        "x_ptrs": (f"*{TRITON_TYPE[dtype]}",) * modalities,
        "center_ptrs": ("*fp32",) * modalities,
        **{f"{side}_ptrs": ("*fp32",) * pairs for side in ("left", "left_bias", "right", "right_bias")},
        "whitener_ptrs": ("*fp32",) * modalities,
        "threshold_ptr": "*fp32",
        "available_ptr": "*i1",
        "correlation_ptr": "*fp32",
        "energy_ptr": "*fp32",
        "effective_ptr": "*i1",
    }
    return Specialization(
        f"{label} {TRITON_TYPE[dtype]}{' mask' if masked else ''}",
        correlation_gate_fwd_kernel,
        pointers | {"B": "i32", "available_stride_b": "i32", "available_stride_m": "i32"},
        _constants(sizes, has_thresholds=masked, has_available=masked, any_rule=False),
        frozenset(pointers) - {"available_ptr"},
        _compile_options(tile_for(sizes)),
    )
