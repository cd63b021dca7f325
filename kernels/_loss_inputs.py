"""Inputs of the fusion loss's kernels beside the logits (labels, weights, modalities), and the logits' offsets.

Dimension legend: M modalities, B samples, C classes, ROWS samples and COLUMNS classes of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Batch sizes cause no recompilation, and a batch of one is not a constant.
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
    """Return the labels (int32), which of them are not ignored, and their weights.

    The weight of a label out of range is NaN, and so is its loss.
    """
    target = tl.load(target_ptr + b, mask=inside, other=0)
    valid = inside & (target != ignore_index)
    known = (target >= 0) & (target < C)
    label = tl.where(known, target, 0).to(tl.int32)
    if HAS_CLASS_WEIGHT:
        weight = tl.load(class_weight_ptr + label, mask=valid, other=0.0)
    else:
        weight = tl.full(b.shape, 1.0, tl.float32)
    return label, valid, tl.where(valid, tl.where(known, weight, float("nan")), 0.0)


@triton.jit
def label_weight(
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (C,) float32
    N,
    first,
    step,
    ignore_index,
    C: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    LABELS: tl.constexpr,
):
    """Add up the weights of the labels in blocks ``first``, ``first + step``, ... of LABELS labels."""
    total = tl.zeros([LABELS], tl.float32)
    whole = (N // LABELS).to(tl.int32)
    every = tl.full([LABELS], 1, tl.int1)  # with a mask, a load of two labels would be two loads of the same sectors
    for block in range(first, whole, step):
        b = tl.full([], 1, tl.int64) * block * LABELS + tl.arange(0, LABELS)
        total += labels_of(target_ptr, class_weight_ptr, b, every, ignore_index, C, HAS_CLASS_WEIGHT)[2]
    if N % LABELS != 0 and whole % step == first:
        b = tl.full([], 1, tl.int64) * whole * LABELS + tl.arange(0, LABELS)
        total += labels_of(target_ptr, class_weight_ptr, b, b < N, ignore_index, C, HAS_CLASS_WEIGHT)[2]
    return tl.sum(total)


@triton.jit
def mean_factor(total):
    """Return 1 / total, and 1 for a total of 0: an empty mean is 0, not 0 / 0."""
    return 1.0 / tl.where(total > 0, total, 1.0)


@triton.jit
def label_mean_factor(
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (C,) float32
    part_ptr,  # (PARTS,) float32, sums of label weights
    N,
    ignore_index,
    C: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    LABELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return 1 / the sum of all labels' weights.

    With few labels every program adds them all up, LABELS at a time. With LABELS = 0 an earlier kernel has added them
    up, in parts.
    """
    if LABELS:
        total = label_weight(target_ptr, class_weight_ptr, N, 0, 1, ignore_index, C, HAS_CLASS_WEIGHT, LABELS)
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
    """Return the tuple of each modality's availability in the samples, and γ = β / (number of modalities - 1)."""
    present = ()
    count = tl.zeros(b.shape, tl.float32)
    for m in tl.static_range(M):
        if HAS_AVAILABLE:
            pointers = available_ptr + b * available_stride_b + m * available_stride_m
            is_present = tl.load(pointers, mask=inside, other=0).to(tl.int1)
        else:
            is_present = tl.full(b.shape, 1, tl.int1)
        present = present + (is_present,)
        count += is_present.to(tl.float32)
    return present, tl.where(count > 1, beta / tl.maximum(count - 1, 1.0), 0.0)


@triton.jit
def modality_factors(modality_weight_ptr, M: tl.constexpr, HAS_MODALITY_WEIGHT: tl.constexpr):  # (M,) float32
    """Return the tuple of the modalities' factors v_m."""
    factor = ()
    for m in tl.static_range(M):
        if HAS_MODALITY_WEIGHT:
            factor = factor + (tl.load(modality_weight_ptr + m),)
        else:
            factor = factor + (tl.full([], 1.0, tl.float32),)
    return factor


@triton.jit
def offsets_of(m: tl.constexpr, b, c, stride_m, stride_b, stride_c, C: tl.constexpr, DENSE: tl.constexpr):
    """Return the offsets (ROWS, COLUMNS) of modality m's logits: int64, since a tensor may pass 2^31 elements."""
    first = tl.full([], m, tl.int64) * stride_m
    if DENSE:  # from a row length known at compile time the compiler sees how wide a load may be
        return first + (b[:, None] * C + c[None, :])
    return first + (b[:, None] * stride_b + c.to(tl.int64)[None, :] * stride_c)
