"""The statistics of utterance vectors that the modality check judges by, in one kernel.

Each program computes one part of the statistics of one block of samples. For a pair of modalities it projects both
sides by the folded matrices, block of features by block of features, and reduces the two projections to their
correlation and their likelihood ratio while they are still in registers. For a modality it computes the mean square of
the whitened features in the same way. Products are tf32x3: three passes of the matrix unit, which keep float32's
digits. Plain tf32 would change which samples pass near a threshold, and so would bf16x3 when features are nearly
collinear, since a whitener enlarges their rounding errors.

The code of each pair and each modality is compiled for its own number of features. Up to four modalities need one
launch. With more, one kernel would take minutes to compile: each pair and each modality then has a launch of its own.

Dimension legend: M modalities, B samples, d_m features of modality m, P pairs of modalities, k_p components of pair p,
r_m whitened directions of modality m; ROWS samples, FEATURES features and DIRECTIONS whitened directions of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3er_fast.kernels._device import capability
from m3er_fast.kernels._math import LARGEST
from m3er_fast.kernels._operators import operator, schema_of
from m3er_fast.kernels._specialization import TRITON_TYPE, Specialization
from m3er_fast.operands import CheckProjections, CheckStatistics, modality_pairs


@triton.constexpr_function
def width_of(size, most):
    """Return the columns of a tile for a number of directions or components: a power of two, up to ``most``."""
    # Matrix units multiply blocks of at least 16.
    return min(most, max(16, triton.next_power_of_2(size)))


@triton.jit
def _projected(
    x_ptr,  # (B, D), rows STRIDE apart
    center_ptr,  # (D,) float32
    matrix_ptr,  # (K, D) float32
    first_sample,  # 64 bits
    B,
    first_row,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    TRIANGULAR: tl.constexpr,  # whether the matrix is upper triangular: row k starts with k zeros
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return rows first_row.. of the matrix times ROWS centred samples: (ROWS, COLUMNS), zeros past the last row."""
    # One 64-bit address per program: offsets from it fit into 32 bits, which halves their registers.
    x_ptr += first_sample * STRIDE
    row = tl.arange(0, ROWS)
    inside = first_sample + row < B
    k = first_row + tl.arange(0, COLUMNS)
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    start = first_row // FEATURES * FEATURES if TRIANGULAR else 0
    for first in range(start, D, FEATURES):
        d = first + tl.arange(0, FEATURES)
        x = tl.load(x_ptr + (row[:, None] * STRIDE + d[None, :]), mask=inside[:, None] & (d < D)[None, :], other=0.0)
        x = x.to(tl.float32) - tl.load(center_ptr + d, mask=d < D, other=0.0)[None, :]
        matrix = tl.load(
            matrix_ptr + (k[None, :] * D + d[:, None]), mask=(k < K)[None, :] & (d < D)[:, None], other=0.0
        )
        result = tl.dot(x, matrix, result, input_precision="tf32x3")
    return result


@triton.jit
def _centered(x, weight_ptr, k, K: tl.constexpr):
    """Return the weighted components (ROWS, COLUMNS) without their mean over the K that there are."""
    if K == 1:  # fused into one instruction with the weight, the subtraction would leave the product's rounding
        return tl.zeros_like(x)
    inside = (k < K)[None, :]
    x = x * tl.load(weight_ptr + k, mask=k < K, other=0.0)[None, :]
    return tl.where(inside, x - (tl.sum(x, axis=1) / max(K, 1))[:, None], 0.0)


@triton.jit
def _unit(x, K: tl.constexpr):
    """Return the rows with a mean square of 1 over their K components; rows of zeros stay."""
    largest = tl.max(tl.abs(x), axis=1)
    x = x / tl.where(largest > 0, largest, 1.0)[:, None]
    rms = tl.sqrt(tl.sum(x * x, axis=1) / max(K, 1))
    return x / tl.where(rms > 0, rms, 1.0)[:, None]


@triton.jit
def _log_likelihood_ratio(u, v, canonical_ptr, k, K: tl.constexpr):
    """Return Σ -½ log(1 - s²) - (s²u² - 2suv + s²v²) / 2(1 - s²) of the rows; LARGEST below zero if not finite.

    The rows are scaled to a mean square of 1. The three terms are computed as s²(u - v)² - 2s(1 - s)uv: near s = 1 they
    would cancel.
    """
    s = tl.load(canonical_ptr + k, mask=k < K, other=0.0)
    rest = (1.0 - s) * (1.0 + s)
    of_distance, of_product, constant = s * s / (2.0 * rest), s / (1.0 + s), 0.5 * tl.log(rest)
    u, v = _unit(u, K), _unit(v, K)
    distance = u - v
    odds = of_distance[None, :] * distance * distance - of_product[None, :] * u * v + constant[None, :]
    ratio = -tl.sum(odds, axis=1)
    # Past K there is NaN in a row that is not finite, which matters only without any component.
    return tl.where(tl.abs(ratio) <= LARGEST, ratio, -LARGEST if K else 0.0)


@triton.jit
def _cosine(u, v):
    """Return the cosine of the rows, and 0 where a row is zero or not finite.

    The rows are scaled by their largest entries, so their squares neither overflow nor vanish.
    """
    u_largest, v_largest = tl.max(tl.abs(u), axis=1), tl.max(tl.abs(v), axis=1)
    u = u / tl.where(u_largest > 0, u_largest, 1.0)[:, None]
    v = v / tl.where(v_largest > 0, v_largest, 1.0)[:, None]
    product = tl.sqrt(tl.sum(u * u, axis=1)) * tl.sqrt(tl.sum(v * v, axis=1))
    cosine = tl.sum(u * v, axis=1) / tl.where(product > 0, product, 1.0)
    defined = (product > 0) & (tl.abs(cosine) < 2.0)  # False for NaN
    return tl.where(defined, tl.minimum(tl.maximum(cosine, -1.0), 1.0), 0.0)


# Neither batch sizes, within those of a tile, nor the index of a pair cause a recompilation.
@triton.jit(do_not_specialize=["B", "first_pair", "first_modality", "correlation_stride", "energy_stride"])
def check_statistics_fwd_kernel(
    x_ptrs,  # M of (B, d_m), rows STRIDES apart
    center_ptrs,  # M of (d_m,) float32
    left_ptrs,  # P of (k_p, d_i) float32
    left_bias_ptrs,  # P of (k_p,) float32
    right_ptrs,  # P of (k_p, d_j) float32
    right_bias_ptrs,  # P of (k_p,) float32
    whitener_ptrs,  # M of (r_m, d_m) float32
    weight_ptrs,  # P of (k_p,) float32
    canonical_ptrs,  # P of (k_p,) float32
    correlation_ptr,  # (B, all pairs) float32
    energy_ptr,  # (B, all modalities) float32
    likelihood_ptr,  # (B, all pairs) float32
    B,
    first_pair,  # index of this launch's first pair among all
    first_modality,  # index of its first modality among all
    correlation_stride,
    energy_stride,
    DIMS: tl.constexpr,  # M of d_m
    STRIDES: tl.constexpr,  # from row lengths known at compile time the compiler sees how wide a load may be
    RANKS: tl.constexpr,  # M of r_m; empty: no energies
    FIRST: tl.constexpr,  # each pair's first modality
    SECOND: tl.constexpr,  # each pair's second modality
    COMPONENTS: tl.constexpr,  # P of k_p
    TRIANGULAR: tl.constexpr,  # whether whiteners are upper triangular
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,  # components of a tile, at least every k_p
    DIRECTIONS: tl.constexpr,
):
    """Compute the energy of a modality, or ρ and the likelihood ratio of a pair, for ROWS samples."""
    # All parts of a block of samples are neighbours, which read its features while the L2 cache has them.
    parts: tl.constexpr = len(RANKS) + len(FIRST)
    part, first_sample = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64) * ROWS
    b = first_sample + tl.arange(0, ROWS)
    inside = b < B
    for m in tl.static_range(len(RANKS)):
        if part == m:
            width: tl.constexpr = width_of(RANKS[m], DIRECTIONS)
            total = tl.zeros([ROWS], tl.float32)
            for first in range(0, RANKS[m], width):
                whitened = _projected(
                    x_ptrs[m], center_ptrs[m], whitener_ptrs[m], first_sample, B, first,
                    DIMS[m], STRIDES[m], RANKS[m], TRIANGULAR, ROWS, FEATURES, width,
                )  # fmt: skip
                total += tl.sum(whitened * whitened, axis=1)
            energy = total / max(RANKS[m], 1)
            energy = tl.where(energy <= LARGEST, energy, LARGEST)  # also for NaN and inf
            tl.store(energy_ptr + b * energy_stride + (first_modality + m), energy, mask=inside)
    k = tl.arange(0, COLUMNS)
    for p in tl.static_range(len(FIRST)):
        if part == len(RANKS) + p:
            u = _projected(
                x_ptrs[FIRST[p]], center_ptrs[FIRST[p]], left_ptrs[p], first_sample, B, 0,
                DIMS[FIRST[p]], STRIDES[FIRST[p]], COMPONENTS[p], False, ROWS, FEATURES, COLUMNS,
            )  # fmt: skip
            u += tl.load(left_bias_ptrs[p] + k, mask=k < COMPONENTS[p], other=0.0)[None, :]
            v = _projected(
                x_ptrs[SECOND[p]], center_ptrs[SECOND[p]], right_ptrs[p], first_sample, B, 0,
                DIMS[SECOND[p]], STRIDES[SECOND[p]], COMPONENTS[p], False, ROWS, FEATURES, COLUMNS,
            )  # fmt: skip
            v += tl.load(right_bias_ptrs[p] + k, mask=k < COMPONENTS[p], other=0.0)[None, :]
            likelihood = _log_likelihood_ratio(u, v, canonical_ptrs[p], k, COMPONENTS[p])
            tl.store(likelihood_ptr + b * correlation_stride + (first_pair + p), likelihood, mask=inside)
            correlation = _cosine(
                _centered(u, weight_ptrs[p], k, COMPONENTS[p]), _centered(v, weight_ptrs[p], k, COMPONENTS[p])
            )
            tl.store(correlation_ptr + b * correlation_stride + (first_pair + p), correlation, mask=inside)


# --- Launching ---


class Part(NamedTuple):
    """The modalities and pairs that one launch computes: all that the kernel is compiled for, beside dtypes."""

    dims: tuple[int, ...]  # d_m
    strides: tuple[int, ...]  # distance between rows of features
    ranks: tuple[int, ...]  # r_m; empty: no energies
    pairs: tuple[tuple[int, int], ...]  # each pair's modalities, as indices into ``dims``
    components: tuple[int, ...]  # k_p
    triangular: bool  # whether the whiteners are upper triangular


class Tile(NamedTuple):
    """Samples, features, components and whitened directions of a tile; warps, and loads in flight."""

    rows: int
    features: int
    columns: int
    directions: int
    warps: int
    stages: int


# More modalities than this need a launch per modality and per pair.
_MOST_AT_ONCE = 4
# Up to this many samples a tile has 16 of them, beyond 64. Large tiles take less than 60 % of the instructions per
# sample and read the matrices less often, but a small batch has too few of them for the multiprocessors of a GPU.
_MOST_IN_SMALL_TILES = 1024


def tile_for(part: Part, batch: int, capability: int) -> Tile:
    """Return the tile for a launch on one generation of GPU (80, 90, ...)."""
    rows, most = (16, 128) if batch <= _MOST_IN_SMALL_TILES else (64, 64)
    columns = width_of(max((*part.components, 1)), 2**20)
    directions = width_of(max((*part.ranks, 1)), most)
    # Both projections of a pair are alive at once; Blackwell's compiler needs more registers for them.
    warps = (16 if capability >= 100 else 8) if columns >= 128 else 4
    return Tile(rows, 32, columns, directions, warps, 2)


def _constants(part: Part, tile: Tile) -> dict[str, Any]:
    return {
        "DIMS": part.dims,
        "STRIDES": part.strides,
        "RANKS": part.ranks,
        "FIRST": tuple(i for i, _ in part.pairs),
        "SECOND": tuple(j for _, j in part.pairs),
        "COMPONENTS": part.components,
        "TRIANGULAR": part.triangular,
        "ROWS": tile.rows,
        "FEATURES": tile.features,
        "COLUMNS": tile.columns,
        "DIRECTIONS": tile.directions,
    }


def _compile_options(tile: Tile) -> dict[str, Any]:
    # Without the ceiling the assembler spills a few registers to fit more programs on a multiprocessor.
    return {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": 255, "enable_fp_fusion": True}


def _rows(x: Tensor) -> Tensor:
    """Return the features, copied only if their rows are not contiguous or too far apart for 32-bit offsets."""
    return x if (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(0) < 2**24 else x.contiguous()


def _prepared(projections: CheckProjections) -> CheckProjections:
    """Return the projections as the kernel reads them: float32, contiguous."""
    matrices: dict[str, Any] = projections._asdict()
    triangular = matrices.pop("triangular")
    ready = {name: [x.to(torch.float32).contiguous() for x in values] for name, values in matrices.items()}
    return CheckProjections(**ready, triangular=triangular)


def _launch(
    features: Sequence[Tensor],
    projections: CheckProjections,
    statistics: CheckStatistics,
    modalities: Sequence[int],
    pairs: Sequence[int],
    *,
    energies: bool = True,
) -> None:
    """Write the statistics of some of the modalities and pairs."""
    all_pairs = modality_pairs(len(features))
    correlation, energy, likelihood = statistics
    place = {m: i for i, m in enumerate(modalities)}
    part = Part(
        tuple(features[m].shape[1] for m in modalities),
        tuple(features[m].stride(0) for m in modalities),
        tuple(projections.whitener[m].shape[0] for m in modalities) if energies else (),
        tuple((place[i], place[j]) for i, j in (all_pairs[p] for p in pairs)),
        tuple(projections.left[p].shape[0] for p in pairs),
        projections.triangular,
    )
    batch = energy.shape[0]
    tile = tile_for(part, batch, capability(energy))
    # Every argument of the kernel needs a tensor. The energies stand in for those that it does not read.
    unread = (energy,)
    sides = (projections.left, projections.left_bias, projections.right, projections.right_bias)
    check_statistics_fwd_kernel[(triton.cdiv(batch, tile.rows) * (len(part.ranks) + len(part.pairs)),)](
        tuple(features[m] for m in modalities),
        tuple(projections.center[m] for m in modalities),
        *(tuple(side[p] for p in pairs) or unread for side in sides),
        tuple(projections.whitener[m] for m in modalities) if energies else unread,
        *(tuple(values[p] for p in pairs) or unread for values in (projections.weight, projections.canonical)),
        correlation,
        energy,
        likelihood,
        batch,
        pairs[0] if pairs else 0,
        modalities[0],
        correlation.stride(0),
        energy.stride(0),
        **_constants(part, tile),
        **_compile_options(tile),
    )


def _forward(features: Sequence[Tensor], projections: CheckProjections) -> CheckStatistics:
    statistics = _outputs(features, projections)
    batch, modalities = statistics.energy.shape
    if not batch:
        return statistics
    arguments = ([_rows(x) for x in features], _prepared(projections), statistics)
    # Triton launches on the current device, which need not be the tensors' device.
    with torch.cuda.device_of(statistics.energy):
        if modalities <= _MOST_AT_ONCE:
            _launch(*arguments, range(modalities), range(len(projections.left)))
            return statistics
        for m in range(modalities):
            _launch(*arguments, (m,), ())
        for p, pair in enumerate(modality_pairs(modalities)):
            _launch(*arguments, pair, (p,), energies=False)
    return statistics


def _outputs(features: Sequence[Tensor], projections: CheckProjections) -> CheckStatistics:
    """Return empty tensors for the statistics."""
    first, batch, pairs = features[0], features[0].shape[0], len(projections.left)
    return CheckStatistics(
        *(first.new_empty((batch, count), dtype=torch.float32) for count in (pairs, len(features), pairs))
    )


# --- The operator ---


def _check_statistics(features: Sequence[Tensor], *projections: Any) -> tuple[Tensor, ...]:
    return _forward(features, CheckProjections(*projections))


def _check_statistics_fake(features: Sequence[Tensor], *projections: Any) -> tuple[Tensor, ...]:
    return _outputs(features, CheckProjections(*projections))


# Autocast changes nothing, and there is no gradient.
check_statistics_op = operator(
    "check_statistics",
    schema=f"(Tensor[] features, {schema_of(CheckProjections)}) -> (Tensor, Tensor, Tensor)",
)(_check_statistics)
check_statistics_op.register_fake(_check_statistics_fake)


def check_statistics(features: Sequence[Tensor], projections: CheckProjections) -> CheckStatistics:
    """Return the statistics of checked arguments.

    The features are float16, bfloat16 or float32; :func:`m3er_fast.functional.check_statistics` documents the rest.
    """
    if not torch.compiler.is_compiling():  # the operator's dispatcher takes longer than a small batch
        return _forward(features, projections)
    return CheckStatistics(*check_statistics_op(list(features), *projections))


# --- How the kernel is compiled ---


def specializations() -> Iterator[Specialization]:
    """Yield every tile of the table, all parts in one launch."""
    paper, wide = _whole((300, 74, 35), 30), (2048, 256)
    small, large = _MOST_IN_SMALL_TILES, _MOST_IN_SMALL_TILES + 1
    for targets in ((80,), (90,), (100,)):
        for batch in (small, large):
            for dtype in (torch.float32, torch.bfloat16):
                yield _specialization("300/74/35 k=30", paper, batch, dtype, targets)
            yield _specialization("2048/256 k=128", _whole(wide, 128), batch, torch.float32, targets)
        yield _specialization("2048/256 k=64", _whole(wide, 64), large, torch.float32, targets)
        yield _specialization("4 x 64 k=16", _whole((64,) * 4, 16), large, torch.float32, targets)


def _whole(dims: tuple[int, ...], k: int) -> Part:
    """Return the part with all pairs and energies of modalities whose rows are dense."""
    pairs = tuple(modality_pairs(len(dims)))
    return Part(dims, dims, dims, pairs, (k,) * len(pairs), True)


def _specialization(label: str, part: Part, batch: int, dtype: torch.dtype, targets: tuple[int, ...]) -> Specialization:
    modalities, pairs = len(part.dims), max(len(part.pairs), 1)
    pointers: dict[str, str | tuple[str, ...]] = {
        "x_ptrs": (f"*{TRITON_TYPE[dtype]}",) * modalities,
        "center_ptrs": ("*fp32",) * modalities,
        **{f"{side}_ptrs": ("*fp32",) * pairs for side in ("left", "left_bias", "right", "right_bias")},
        "whitener_ptrs": ("*fp32",) * max(len(part.ranks), 1),
        **{f"{name}_ptrs": ("*fp32",) * pairs for name in ("weight", "canonical")},
        **{f"{name}_ptr": "*fp32" for name in CheckStatistics._fields},
    }
    numbers = ("B", "first_pair", "first_modality", "correlation_stride", "energy_stride")
    tile = tile_for(part, batch, targets[0])
    return Specialization(
        f"{label} {TRITON_TYPE[dtype]} rows={tile.rows}",
        check_statistics_fwd_kernel,
        pointers | dict.fromkeys(numbers, "i32"),
        _constants(part, tile),
        frozenset(pointers),
        _compile_options(tile),
        targets=targets,
    )
