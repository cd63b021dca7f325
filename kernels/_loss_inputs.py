"""What the kernels of the fusion loss read beside logits: labels, weights and modalities; and where logits lie.

Dimension legend: M modalities, B samples, C classes, ROWS samples and COLUMNS classes of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Nothing is compiled anew for a batch size, and a batch of one is not a constant.
RUNTIME = ["B", "N", "blocks", "ignore_index"]


@triton.jit
def labels_of(
    target_ptr,  # (B,) int64
    class_weight_ptr,  # (C,) float32
    b,
    inside,
    ignore_index,
    C: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
):
    """Labels (int32), whether each counts, and its weight. A label out of range weighs NaN: the loss must show it."""
    target = tl.load(target_ptr + b, mask=inside, other=0)
    kept = inside & (target != ignore_index)
    known = (target >= 0) & (target < C)
    label = tl.where(known, target, 0).to(tl.int32)
    if HAS_CLASS_WEIGHT:
        weight = tl.load(class_weight_ptr + label, mask=kept, other=0.0)
    else:
        weight = tl.full(b.shape, 1.0, tl.float32)
    return label, kept, tl.where(kept, tl.where(known, weight, float("nan")), 0.0)


@triton.jit
def label_weight(
    target_ptr,  # (B,) int64
    class_weight_ptr,  # (C,) float32
    B,
    blocks,
    ignore_index,
    C: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weights of this program's labels, added up: blocks pid, pid + programs, ... of ROWS labels."""
    total = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        block = tl.program_id(0) + i * tl.num_programs(0)
        b = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        _, _, weight = labels_of(target_ptr, class_weight_ptr, b, b < B, ignore_index, C, HAS_CLASS_WEIGHT)
        total += weight
    return tl.sum(total)


@triton.jit
def mean_factor(total):
    """1 / total, and 1 where nothing counts: an empty mean is 0, not 0 / 0."""
    return 1.0 / tl.where(total > 0, total, 1.0)


@triton.jit
def label_mean_factor(
    target_ptr,  # (B,) int64
    class_weight_ptr,  # (C,) float32
    part_ptr,  # (PARTS,) float32, sums of label weights
    B,
    blocks,
    ignore_index,
    C: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    SOLO: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """1 / the weights of all labels: a program that is alone adds them up, else a kernel before it has, in parts."""
    if SOLO:
        total = label_weight(target_ptr, class_weight_ptr, B, blocks, ignore_index, C, HAS_CLASS_WEIGHT, ROWS)
    else:
        total = tl.sum(tl.load(part_ptr + tl.arange(0, PARTS)))
    return mean_factor(total)


@triton.jit
def presence(
    available_ptr,  # (B, M) bool
    b,
    inside,
    available_stride_b,
    available_stride_m,
    beta,
    M: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
):
    """Which modalities each sample has, and γ = β / (their number - 1)."""
    present = ()
    count = tl.zeros(b.shape, tl.float32)
    for m in tl.static_range(M):
        if HAS_AVAILABLE:
            here = tl.load(available_ptr + b * available_stride_b + m * available_stride_m, mask=inside, other=0).to(
                tl.int1
            )
        else:
            here = tl.full(b.shape, 1, tl.int1)
        present = present + (here,)
        count += here.to(tl.float32)
    return present, tl.where(count > 1, beta / tl.maximum(count - 1, 1.0), 0.0)


@triton.jit
def modality_factors(modality_weight_ptr, M: tl.constexpr, HAS_MODALITY_WEIGHT: tl.constexpr):  # (M,) float32
    factor = ()
    for m in tl.static_range(M):
        if HAS_MODALITY_WEIGHT:
            factor = factor + (tl.load(modality_weight_ptr + m),)
        else:
            factor = factor + (tl.full([], 1.0, tl.float32),)
    return factor


@triton.jit
def offsets_of(m: tl.constexpr, b, c, stride_m, stride_b, stride_c, C: tl.constexpr, DENSE: tl.constexpr):
    """Offsets (ROWS, COLUMNS) of samples b and classes c of modality m: int64, for a tensor may pass 2^31 elements."""
    first = tl.full([], m, tl.int64) * stride_m
    if DENSE:  # a compile-time row length shows the compiler how wide a load may be
        return first + (b[:, None] * C + c[None, :])
    return first + (b[:, None] * stride_b + c.to(tl.int64)[None, :] * stride_c)
