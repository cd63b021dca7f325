"""Statistics of the modality check, and the mask of modalities that pass, in one kernel.

A program takes a block of samples. For each pair it projects both sides by the folded matrices, block of features by
block of features, and reduces the two projections to their cosine while they are still in registers; for each modality
it does the same with the whitener, to the mean square. Products are tf32x3, three passes of the matrix unit that keep
float32's digits: plain tf32 moves masks near a threshold, and so would bf16x3 where features are nearly collinear, for
a whitener enlarges what rounding leaves of them.

Every pair and modality is code of its own, as wide as its features. Up to four modalities are one launch; of more, for
which that would take minutes to compile, each pair and each modality is a launch, and the mask another.

Dimension legend: M modalities, B samples, d_m features of modality m, P pairs of modalities, k_p components of pair p,
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

from m3er_fast.kernels._target import TRITON_TYPE, Specialization, Work, capability

_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _projected(
    x_ptr,  # (B, D), rows STRIDE apart
    center_ptr,  # (D,) float32
    matrix_ptr,  # (K, D) float32
    B,
    first_row,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    TRIANGULAR: tl.constexpr,  # the matrix has no row's columns before the row's own number
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows first_row.. of the matrix times this program's centred samples: (ROWS, COLUMNS), zeros beyond the last."""
    # One 64-bit address a program; what is added to it fits into 32 bits, and half the registers.
    x_ptr += tl.program_id(0).to(tl.int64) * ROWS * STRIDE
    row = tl.arange(0, ROWS)
    inside = row < B - tl.program_id(0) * ROWS
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
def _store_effective(
    effective_ptr,  # (B, M) bool
    threshold_ptr,  # (P + 2M,) float32: of ρ, least energies, greatest energies
    available_ptr,  # (B, M) bool
    correlations,  # P of (ROWS,)
    energies,  # M of (ROWS,)
    b,
    inside,
    available_stride_b,
    available_stride_m,
    M: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
    ANY: tl.constexpr,
):
    """The mask of the samples: trusted by energy, and in agreement with every other trusted modality, or with any."""
    P: tl.constexpr = len(FIRST)
    trusted = ()
    for m in tl.static_range(M):
        low, high = tl.load(threshold_ptr + P + m), tl.load(threshold_ptr + P + M + m)
        here = (energies[m] >= low) & (energies[m] <= high)
        if HAS_AVAILABLE:
            offsets = b * available_stride_b + m * available_stride_m
            here = here & tl.load(available_ptr + offsets, mask=inside, other=0).to(tl.int1)
        trusted = trusted + (here,)
    for m in tl.static_range(M):
        compared = tl.zeros(b.shape, tl.int32)
        passed = tl.zeros(b.shape, tl.int32)
        for p in tl.static_range(P):
            if FIRST[p] == m or SECOND[p] == m:
                both = trusted[FIRST[p]] & trusted[SECOND[p]]
                # Exactly 0 means undefined, which passes no threshold.
                passes = (correlations[p] >= tl.load(threshold_ptr + p)) & (correlations[p] != 0)
                compared += both.to(tl.int32)
                passed += (both & passes).to(tl.int32)
        enough = (passed == compared) if ANY else (passed > 0) | (compared == 0)
        tl.store(effective_ptr + b * M + m, trusted[m] & enough, mask=inside)


# Nothing is compiled anew for a batch size or for the place of a pair.
@triton.jit(do_not_specialize=["B", "first_pair", "first_modality", "correlation_stride", "energy_stride"])
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
    correlation_ptr,  # (B, pairs in all) float32
    energy_ptr,  # (B, modalities in all) float32
    effective_ptr,  # (B, M) bool
    B,
    first_pair,  # where this launch's first pair,
    first_modality,  # and its first modality, stand among all
    correlation_stride,
    energy_stride,
    available_stride_b,
    available_stride_m,
    DIMS: tl.constexpr,  # M of d_m
    STRIDES: tl.constexpr,  # a compile-time row length shows the compiler how wide a load may be
    RANKS: tl.constexpr,  # M of r_m; none: no energies
    FIRST: tl.constexpr,  # of each pair, the first modality,
    SECOND: tl.constexpr,  # and the second
    COMPONENTS: tl.constexpr,  # P of k_p
    TRIANGULAR: tl.constexpr,  # whether whiteners are upper triangular
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
    for m in tl.static_range(len(RANKS)):
        total = tl.zeros([ROWS], tl.float32)
        for first in range(0, RANKS[m], DIRECTIONS):
            whitened = _projected(
                x_ptrs[m], center_ptrs[m], whitener_ptrs[m], B, first,
                DIMS[m], STRIDES[m], RANKS[m], TRIANGULAR, ROWS, FEATURES, DIRECTIONS,
            )  # fmt: skip
            total += tl.sum(whitened * whitened, axis=1)
        energy = total / max(RANKS[m], 1)
        energy = tl.where(energy <= _LARGEST, energy, _LARGEST)  # NaN and inf too
        tl.store(energy_ptr + b * energy_stride + (first_modality + m), energy, mask=inside)
        energies = energies + (energy,)
    correlations = ()
    k = tl.arange(0, COLUMNS)
    for p in tl.static_range(len(FIRST)):
        u = _projected(
            x_ptrs[FIRST[p]], center_ptrs[FIRST[p]], left_ptrs[p], B, 0,
            DIMS[FIRST[p]], STRIDES[FIRST[p]], COMPONENTS[p], False, ROWS, FEATURES, COLUMNS,
        )  # fmt: skip
        u += tl.load(left_bias_ptrs[p] + k, mask=k < COMPONENTS[p], other=0.0)[None, :]
        v = _projected(
            x_ptrs[SECOND[p]], center_ptrs[SECOND[p]], right_ptrs[p], B, 0,
            DIMS[SECOND[p]], STRIDES[SECOND[p]], COMPONENTS[p], False, ROWS, FEATURES, COLUMNS,
        )  # fmt: skip
        v += tl.load(right_bias_ptrs[p] + k, mask=k < COMPONENTS[p], other=0.0)[None, :]
        correlation = _cosine(u, v)
        tl.store(correlation_ptr + b * correlation_stride + (first_pair + p), correlation, mask=inside)
        correlations = correlations + (correlation,)
    if HAS_THRESHOLDS:
        _store_effective(
            effective_ptr, threshold_ptr, available_ptr, correlations, energies, b, inside,
            available_stride_b, available_stride_m, len(DIMS), FIRST, SECOND, HAS_AVAILABLE, ANY,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B"])
def correlation_gate_mask_kernel(
    threshold_ptr,  # (P + 2M,) float32
    available_ptr,  # (B, M) bool
    correlation_ptr,  # (B, P) float32
    energy_ptr,  # (B, M) float32
    effective_ptr,  # (B, M) bool
    B,
    available_stride_b,
    available_stride_m,
    M: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
    ANY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which modalities are effective, of statistics that several launches have left."""
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = b < B
    correlations, energies = (), ()
    for p in tl.static_range(len(FIRST)):
        correlations = correlations + (tl.load(correlation_ptr + b * len(FIRST) + p, mask=inside, other=0.0),)
    for m in tl.static_range(M):
        energies = energies + (tl.load(energy_ptr + b * M + m, mask=inside, other=0.0),)
    _store_effective(
        effective_ptr, threshold_ptr, available_ptr, correlations, energies, b, inside,
        available_stride_b, available_stride_m, M, FIRST, SECOND, HAS_AVAILABLE, ANY,
    )  # fmt: skip


# --- Launching ---


class Part(NamedTuple):
    """What one launch computes: some modalities' energies and some pairs, all that a kernel is compiled for."""

    dims: tuple[int, ...]  # d_m
    strides: tuple[int, ...]  # of a row of features
    ranks: tuple[int, ...]  # r_m; empty: no energies
    pairs: tuple[tuple[int, int], ...]  # numbers of two of these modalities
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


# More modalities than this are launched one by one, and pair by pair.
_MOST_AT_ONCE = 4
_MASK_ROWS = 128


def tile_for(part: Part, capability: int) -> Tile:
    """The table of tile sizes, by feature sizes and generation of GPU (80, 90, ...) only."""
    # Matrix units multiply blocks of at least 16.
    columns = max(16, triton.next_power_of_2(max((*part.components, 1))))
    directions = min(64, max(16, triton.next_power_of_2(max((*part.ranks, 1)))))
    # Before Hopper the pieces of both factors wait in registers: half as many features fit.
    features, stages = (32, 2) if capability >= 90 else (16, 3)
    # Two projections of a pair are alive at once.
    return Tile(64, features, columns, directions, 8 if columns >= 128 else 4, stages)


def _constants(part: Part, tile: Tile, *, has_thresholds: bool, has_available: bool, any_rule: bool) -> dict[str, Any]:
    return {
        "DIMS": part.dims,
        "STRIDES": part.strides,
        "RANKS": part.ranks,
        "FIRST": tuple(i for i, _ in part.pairs),
        "SECOND": tuple(j for _, j in part.pairs),
        "COMPONENTS": part.components,
        "TRIANGULAR": part.triangular,
        "HAS_THRESHOLDS": has_thresholds,
        "HAS_AVAILABLE": has_available,
        "ANY": any_rule,
        "ROWS": tile.rows,
        "FEATURES": tile.features,
        "COLUMNS": tile.columns,
        "DIRECTIONS": tile.directions,
    }


def _compile_options(tile: Tile) -> dict[str, Any]:
    # Without a ceiling of its own choice the assembler spills a few registers to fit more programs on a multiprocessor.
    return {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": 255, "enable_fp_fusion": True}


def _rows(x: Tensor) -> Tensor:
    """Features whose rows are contiguous and at a distance that 32 bits can address: only others are copied."""
    return x if (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(0) < 2**24 else x.contiguous()


def _matrices(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.to(torch.float32).contiguous() for value in values]


class _Call(NamedTuple):
    """The arguments of a call, as kernels take them."""

    rows: list[Tensor]
    center: list[Tensor]
    left: list[Tensor]
    left_bias: list[Tensor]
    right: list[Tensor]
    right_bias: list[Tensor]
    whitener: list[Tensor]
    triangular: bool
    thresholds: Tensor | None
    available: Tensor | None
    any_rule: bool
    correlation: Tensor
    energy: Tensor
    effective: Tensor

    def launch(self, modalities: Sequence[int], pairs: Sequence[int], *, energies: bool, mask: bool) -> None:
        """Statistics of some modalities and pairs, numbered among all; with the mask only if they are all."""
        of_pair = list(combinations(range(len(self.rows)), 2))
        place = {m: i for i, m in enumerate(modalities)}
        part = Part(
            tuple(self.rows[m].shape[1] for m in modalities),
            tuple(self.rows[m].stride(0) for m in modalities),
            tuple(self.whitener[m].shape[0] for m in modalities) if energies else (),
            tuple((place[i], place[j]) for i, j in (of_pair[p] for p in pairs)),
            tuple(self.left[p].shape[0] for p in pairs),
            self.triangular,
        )
        tile = tile_for(part, capability(self.energy))
        # What a kernel does not read it is given all the same: any tensor will do.
        available = self.effective if self.available is None else self.available
        nothing = (self.energy,)
        correlation_gate_fwd_kernel[(triton.cdiv(self.energy.shape[0], tile.rows),)](
            tuple(self.rows[m] for m in modalities),
            tuple(self.center[m] for m in modalities),
            *(
                tuple(side[p] for p in pairs) or nothing
                for side in (self.left, self.left_bias, self.right, self.right_bias)
            ),
            tuple(self.whitener[m] for m in modalities) if energies else nothing,
            self.energy if self.thresholds is None else self.thresholds,
            available,
            self.correlation,
            self.energy,
            self.effective,
            self.energy.shape[0],
            pairs[0] if pairs else 0,
            modalities[0],
            self.correlation.stride(0),
            self.energy.stride(0),
            *available.stride(),
            **_constants(
                part,
                tile,
                has_thresholds=mask,
                has_available=self.available is not None,
                any_rule=self.any_rule,
            ),
            **_compile_options(tile),
        )

    def launch_mask(self) -> None:
        batch, modalities = self.energy.shape
        pairs = list(combinations(range(modalities), 2))
        available = self.effective if self.available is None else self.available
        correlation_gate_mask_kernel[(triton.cdiv(batch, _MASK_ROWS),)](
            self.thresholds,
            available,
            self.correlation,
            self.energy,
            self.effective,
            batch,
            *available.stride(),
            **_mask_constants(modalities, pairs, has_available=self.available is not None, any_rule=self.any_rule),
            **_MASK_OPTIONS,
        )


_MASK_OPTIONS: dict[str, Any] = {"num_warps": 4, "maxnreg": 255, "enable_fp_fusion": True}


def _mask_constants(
    modalities: int, pairs: Sequence[tuple[int, int]], *, has_available: bool, any_rule: bool
) -> dict[str, Any]:
    return {
        "M": modalities,
        "FIRST": tuple(i for i, _ in pairs),
        "SECOND": tuple(j for _, j in pairs),
        "HAS_AVAILABLE": has_available,
        "ANY": any_rule,
        "ROWS": _MASK_ROWS,
    }


def _forward(
    features: Sequence[Tensor],
    center: Sequence[Tensor],
    left: Sequence[Tensor],
    left_bias: Sequence[Tensor],
    right: Sequence[Tensor],
    right_bias: Sequence[Tensor],
    whitener: Sequence[Tensor],
    triangular: bool,
    thresholds: Tensor | None,
    available: Tensor | None,
    any_rule: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, modalities, pairs = features[0].shape[0], len(features), len(left)
    masked = thresholds is not None
    correlation = features[0].new_empty((batch, pairs), dtype=torch.float32)
    energy = features[0].new_empty((batch, modalities), dtype=torch.float32)
    effective = features[0].new_empty((batch, modalities if masked else 0), dtype=torch.bool)
    if not batch:
        return correlation, energy, effective
    thresholds = None if thresholds is None else thresholds.to(torch.float32).contiguous()
    call = _Call(
        [_rows(x) for x in features],
        _matrices(center),
        _matrices(left),
        _matrices(left_bias),
        _matrices(right),
        _matrices(right_bias),
        _matrices(whitener),
        triangular,
        thresholds,
        available,
        any_rule,
        correlation,
        energy,
        effective,
    )
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(energy):
        if modalities <= _MOST_AT_ONCE:
            call.launch(range(modalities), range(pairs), energies=True, mask=masked)
            return correlation, energy, effective
        for m in range(modalities):
            call.launch((m,), (), energies=True, mask=False)
        for p, pair in enumerate(combinations(range(modalities), 2)):
            call.launch(pair, (p,), energies=False, mask=False)
        if masked:
            call.launch_mask()
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
    triangular: bool,
    thresholds: Tensor | None,
    available: Tensor | None,
    any_rule: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlation, energy, and (with thresholds) the mask. Autocast changes nothing; there is no gradient."""
    matrices = (center, left, left_bias, right, right_bias, whitener)
    return _forward(features, *matrices, triangular, thresholds, available, any_rule)


@correlation_gate_op.register_fake
def _correlation_gate_fake(
    features: Sequence[Tensor],
    center: Sequence[Tensor],
    left: Sequence[Tensor],
    left_bias: Sequence[Tensor],
    right: Sequence[Tensor],
    right_bias: Sequence[Tensor],
    whitener: Sequence[Tensor],
    triangular: bool,
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
    center: Sequence[Tensor],
    left: Sequence[Tensor],
    left_bias: Sequence[Tensor],
    right: Sequence[Tensor],
    right_bias: Sequence[Tensor],
    whitener: Sequence[Tensor],
    triangular: bool,
    *,
    thresholds: Tensor | None = None,
    available: Tensor | None = None,
    any_rule: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlation (B, P), energy (B, M) and, with thresholds (P + 2M,), the mask (B, M), of checked arguments.

    What follows the features, float16, bfloat16 or float32, are :class:`m3er_fast.functional.GateProjections`.
    """
    # Outside the compiler without the dispatcher, which takes longer than a small batch.
    call: Any = correlation_gate_op if torch.compiler.is_compiling() else _forward
    matrices = (center, left, left_bias, right, right_bias, whitener)
    result: tuple[Tensor, Tensor, Tensor] = call(list(features), *matrices, triangular, thresholds, available, any_rule)
    return result


# --- What the op must move and how its kernels are compiled ---


def work(batch: int, dims: Sequence[int], components: Sequence[int], ranks: Sequence[int], dtype: torch.dtype) -> Work:
    """The least to be done: read features and matrices once, write two statistics; one product with each matrix.

    Of a triangular whitener, as a check fits it, half is work.
    """
    pairs = list(combinations(range(len(dims)), 2))
    numbers = sum(k * (dims[i] + dims[j]) for (i, j), k in zip(pairs, components, strict=True))
    numbers += sum(rank * (2 * dim - rank + 1) // 2 for dim, rank in zip(dims, ranks, strict=True))
    moved = batch * sum(dims) * dtype.itemsize + 4 * numbers + 4 * batch * (len(pairs) + len(dims))
    return Work(moved, 2 * batch * numbers, "tf32x3")


def specializations() -> Iterator[Specialization]:
    """Every tile of the table, with and without the mask."""
    paper = _whole((300, 74, 35), 30)
    for targets in ((80,), (90, 100)):
        for dtype in (torch.float32, torch.bfloat16):
            yield _specialization("300/74/35 k=30", paper, dtype, targets, masked=False)
        yield _specialization("300/74/35 k=30", paper, torch.float32, targets, masked=True)
        yield _specialization("4 x 64 k=16", _whole((64,) * 4, 16), torch.float32, targets, masked=True)
        for k in (64, 128):
            part = _whole((2048, 256), k)
            yield _specialization(f"2048/256 k={k}", part, torch.float32, targets, masked=True)
            pair = part._replace(ranks=())
            yield _specialization(f"2048/256 k={k} pair", pair, torch.float32, targets, masked=False)
        single = Part((2048,), (2048,), (2048,), (), (), True)
        yield _specialization("2048", single, torch.float32, targets, masked=False)
    pairs = list(combinations(range(8), 2))
    yield Specialization(
        "M=8",
        correlation_gate_mask_kernel,
        {"threshold_ptr": "*fp32", "available_ptr": "*i1", "correlation_ptr": "*fp32", "energy_ptr": "*fp32"}
        | {"effective_ptr": "*i1", "B": "i32", "available_stride_b": "i32", "available_stride_m": "i32"},
        _mask_constants(8, pairs, has_available=True, any_rule=False),
        frozenset({"threshold_ptr", "correlation_ptr", "energy_ptr", "effective_ptr"}),
        _MASK_OPTIONS,
        vectorized=False,  # a row of statistics is as short as there are modalities
    )


def _whole(dims: tuple[int, ...], k: int) -> Part:
    """All pairs and energies of modalities whose rows are dense."""
    pairs = tuple(combinations(range(len(dims)), 2))
    return Part(dims, dims, dims, pairs, (k,) * len(pairs), True)


def _specialization(
    label: str, part: Part, dtype: torch.dtype, targets: tuple[int, ...], *, masked: bool
) -> Specialization:
    modalities, pairs = len(part.dims), max(len(part.pairs), 1)
    pointers: dict[str, str | tuple[str, ...]] = {
        "x_ptrs": (f"*{TRITON_TYPE[dtype]}",) * modalities,
        "center_ptrs": ("*fp32",) * modalities,
        **{f"{side}_ptrs": ("*fp32",) * pairs for side in ("left", "left_bias", "right", "right_bias")},
        "whitener_ptrs": ("*fp32",) * max(len(part.ranks), 1),
        "threshold_ptr": "*fp32",
        "available_ptr": "*i1",
        "correlation_ptr": "*fp32",
        "energy_ptr": "*fp32",
        "effective_ptr": "*i1",
    }
    numbers = ("B", "first_pair", "first_modality", "correlation_stride", "energy_stride")
    numbers += ("available_stride_b", "available_stride_m")
    tile = tile_for(part, targets[0])
    return Specialization(
        f"{label} {TRITON_TYPE[dtype]}{' mask' if masked else ''}",
        correlation_gate_fwd_kernel,
        pointers | dict.fromkeys(numbers, "i32"),
        _constants(part, tile, has_thresholds=masked, has_available=masked, any_rule=False),
        frozenset(pointers) - {"available_ptr"},
        _compile_options(tile),
        targets=targets,
    )
