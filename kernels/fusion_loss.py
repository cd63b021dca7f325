"""Multiplicative fusion loss and class costs: value and gradient in one pass over the logits.

Four kernels share the work. Labels need one class per sample, and

* ``narrow`` keeps a sample's few classes in the registers of one thread, hundreds of samples a program;
* ``wide`` walks over blocks of classes with an online softmax, and over them again for the gradient.

Targets over classes, a margin and the class costs need every class: ``classes``. Yes/no questions are independent of
each other: ``questions``, one flat pass. Sums are taken program by program and then in a fixed order, never by atomics,
so that equal inputs give equal bits. A mean must know its divisor before it writes a gradient: for labels a first
kernel adds up their weights, or the one program that a small batch needs does.

Dimension legend: M modalities, B samples, C classes, ROWS samples and COLUMNS classes of a tile, PARTS partial sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3er_fast.kernels._fusion_math import (
    BOUND,
    bounded,
    columns_of,
    cost_and_slopes,
    exp,
    one_against_rest,
    tile_of,
)
from m3er_fast.kernels._launch import TRITON_TYPE, Specialization, Work

# Programs of the kernel that adds up label weights; their sums are read by every program of the main kernel.
_PARTS = 128
# Up to this many logits and samples one program does everything, in one launch: a second would take longer than that.
_SOLO_LOGITS = 2**18
_SOLO_SAMPLES = 8192
# Each program of the main kernel starts by reading those sums: more programs than this share blocks instead.
_MOST_PROGRAMS = 4096
# Nothing is compiled anew for a batch size, and a batch of one is not a constant.
_RUNTIME = ["B", "N", "blocks", "ignore_index"]


# --- What the kernels share ---


@triton.jit
def _labels(
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
def _label_weight(
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
        _, _, weight = _labels(target_ptr, class_weight_ptr, b, b < B, ignore_index, C, HAS_CLASS_WEIGHT)
        total += weight
    return tl.sum(total)


@triton.jit
def _mean_factor(total):
    """1 / total, and 1 where nothing counts: an empty mean is 0, not 0 / 0."""
    return 1.0 / tl.where(total > 0, total, 1.0)


@triton.jit
def _presence(
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
def _factors(modality_weight_ptr, M: tl.constexpr, HAS_MODALITY_WEIGHT: tl.constexpr):  # (M,) float32
    factor = ()
    for m in tl.static_range(M):
        if HAS_MODALITY_WEIGHT:
            factor = factor + (tl.load(modality_weight_ptr + m),)
        else:
            factor = factor + (tl.full([], 1.0, tl.float32),)
    return factor


@triton.jit
def _offsets(m: tl.constexpr, b, c, stride_m, stride_b, stride_c, C: tl.constexpr, DENSE: tl.constexpr):
    """Offsets (ROWS, COLUMNS) of samples b and classes c of modality m: int64, for a tensor may pass 2^31 elements."""
    first = tl.full([], m, tl.int64) * stride_m
    if DENSE:  # a compile-time row length shows the compiler how wide a load may be
        return first + (b[:, None] * C + c[None, :])
    return first + (b[:, None] * stride_b + c.to(tl.int64)[None, :] * stride_c)


@triton.jit
def _slopes(slope, rate, kept, own, top, rest):
    """Slope at the label's logit, and at another class's per power exp(x_j - top); zero where the logit is held.

    Among the others only the largest can have a power and be held.
    """
    slope = tl.where(kept, slope * rate, 0.0)
    return tl.where(tl.abs(own) == BOUND, 0.0, slope), tl.where(tl.abs(top) == BOUND, 0.0, slope / rest)


@triton.jit
def _zero_where_held(gradient, x):
    """A logit beyond the bound is held there: it has no gradient."""
    return tl.where(tl.abs(x.to(tl.float32)) > BOUND, 0.0, gradient)


# --- Labels, few classes ---


@triton.jit(do_not_specialize=_RUNTIME)
def fusion_loss_narrow_fwd_kernel(
    logits_ptr,  # (M, B, C) with any strides
    target_ptr,  # (B,) int64
    class_weight_ptr,  # (C,) float32
    modality_weight_ptr,  # (M,) float32
    available_ptr,  # (B, M) bool
    part_ptr,  # (PARTS,) float32, sums of label weights
    loss_ptr,  # (B,) for "none", else (programs,) partial sums, float32
    gradient_ptr,  # (M, B, C) contiguous
    B,
    blocks,
    stride_m,
    stride_b,
    stride_c,
    available_stride_b,
    available_stride_m,
    beta,
    ignore_index,
    M: tl.constexpr,
    C: tl.constexpr,
    VARIANT: tl.constexpr,
    DETACH: tl.constexpr,
    REDUCTION: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_MODALITY_WEIGHT: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
    DENSE: tl.constexpr,
    SOLO: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOG_COLUMNS: tl.constexpr,
):
    """Loss and gradient of labels over few classes, a sample a thread."""
    scale = 1.0
    if REDUCTION == "mean":
        if SOLO:
            scale = _mean_factor(
                _label_weight(target_ptr, class_weight_ptr, B, blocks, ignore_index, C, HAS_CLASS_WEIGHT, ROWS)
            )
        else:
            scale = _mean_factor(tl.sum(tl.load(part_ptr + tl.arange(0, PARTS))))
    factor = _factors(modality_weight_ptr, M, HAS_MODALITY_WEIGHT)
    c = tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        block = tl.program_id(0) + i * tl.num_programs(0)
        b = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = b < B
        mask = inside[:, None] & (c < C)[None, :]
        tiles = ()
        for m in tl.static_range(M):
            offsets = _offsets(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
            tiles = tiles + (tl.load(logits_ptr + offsets, mask=mask, other=0.0),)
        label, kept, weight = _labels(target_ptr, class_weight_ptr, b, inside, ignore_index, C, HAS_CLASS_WEIGHT)
        present, gamma = _presence(
            available_ptr, b, inside, available_stride_b, available_stride_m, beta, M, HAS_AVAILABLE
        )
        log_p, log_not_p, p, not_p = (), (), (), ()
        powers = ()  # M tuples of C: exp(x_j - max) of the other classes
        rests = ()  # their sums
        owns, tops = (), ()
        for m in tl.static_range(M):
            x = columns_of(tiles[m], ROWS, COLUMNS, LOG_COLUMNS)
            others = ()  # logits of the other classes, -inf for the label's
            top = tl.full([ROWS], -BOUND, tl.float32)
            own = tl.zeros([ROWS], tl.float32)
            for j in tl.static_range(C):
                value = bounded(x[j])
                if HAS_AVAILABLE:
                    value = tl.where(present[m], value, 0.0)
                own = tl.where(label == j, value, own)
                other = tl.where(label == j, -float("inf"), value)
                top = tl.maximum(top, other)
                others = others + (other,)
            power = ()
            rest = tl.zeros([ROWS], tl.float32)
            for j in tl.static_range(C):
                e = exp(others[j] - top)
                rest += e
                power = power + (e,)
            if C == 1:  # nothing to be told from: certain, but finite
                rest += 1e-37
            of_m = one_against_rest(own - top, rest)
            log_p, log_not_p = log_p + (of_m[0],), log_not_p + (of_m[1],)
            p, not_p = p + (of_m[2],), not_p + (of_m[3],)
            powers, rests = powers + (power,), rests + (rest,)
            owns, tops = owns + (own,), tops + (top,)
        cost, slopes = cost_and_slopes(log_p, log_not_p, p, not_p, present, factor, gamma, M, VARIANT, DETACH)
        rate = weight * scale
        loss = tl.where(kept, cost * rate, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + b, loss, mask=inside)
        else:
            sums += loss
        if GRADIENT:
            for m in tl.static_range(M):
                own_slope, other_slope = _slopes(slopes[m], rate, kept, owns[m], tops[m], rests[m])
                gradient = ()
                for j in tl.static_range(C):
                    slope = tl.where(label == j, own_slope, -other_slope * powers[m][j])
                    gradient = gradient + (tl.where(kept, slope, 0.0),)  # an ignored sample's powers may be NaN
                for _ in tl.static_range(COLUMNS - C):
                    gradient = gradient + (own_slope,)  # masked
                tile = tile_of(gradient, ROWS, COLUMNS, LOG_COLUMNS)
                offsets = tl.full([], m, tl.int64) * B * C + (b[:, None] * C + c[None, :])
                tl.store(gradient_ptr + offsets, tile.to(gradient_ptr.dtype.element_ty), mask=mask)
    if REDUCTION != "none":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))


# --- Labels, many classes ---


@triton.jit(do_not_specialize=_RUNTIME)
def fusion_loss_wide_fwd_kernel(
    logits_ptr,  # (M, B, C) with any strides
    target_ptr,  # (B,) int64
    class_weight_ptr,  # (C,) float32
    modality_weight_ptr,  # (M,) float32
    available_ptr,  # (B, M) bool
    part_ptr,  # (PARTS,) float32, sums of label weights
    loss_ptr,  # (B,) for "none", else (programs,) partial sums, float32
    gradient_ptr,  # (M, B, C) contiguous
    B,
    blocks,
    stride_m,
    stride_b,
    stride_c,
    available_stride_b,
    available_stride_m,
    beta,
    ignore_index,
    M: tl.constexpr,
    C: tl.constexpr,
    VARIANT: tl.constexpr,
    DETACH: tl.constexpr,
    REDUCTION: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_MODALITY_WEIGHT: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
    DENSE: tl.constexpr,
    SOLO: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Loss and gradient of labels over many classes, block by block of classes."""
    scale = 1.0
    if REDUCTION == "mean":
        if SOLO:
            scale = _mean_factor(
                _label_weight(target_ptr, class_weight_ptr, B, blocks, ignore_index, C, HAS_CLASS_WEIGHT, ROWS)
            )
        else:
            scale = _mean_factor(tl.sum(tl.load(part_ptr + tl.arange(0, PARTS))))
    factor = _factors(modality_weight_ptr, M, HAS_MODALITY_WEIGHT)
    sums = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        block = tl.program_id(0) + i * tl.num_programs(0)
        b = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = b < B
        label, kept, weight = _labels(target_ptr, class_weight_ptr, b, inside, ignore_index, C, HAS_CLASS_WEIGHT)
        present, gamma = _presence(
            available_ptr, b, inside, available_stride_b, available_stride_m, beta, M, HAS_AVAILABLE
        )
        log_p, log_not_p, p, not_p = (), (), (), ()
        owns, tops, rests = (), (), ()  # the label's logit; the largest other, and Σ exp(x_j - it) over the others
        for m in tl.static_range(M):
            top = tl.full([ROWS], -BOUND, tl.float32)
            rest = tl.zeros([ROWS], tl.float32)
            own = tl.zeros([ROWS], tl.float32)
            for start in range(0, C, COLUMNS):
                c = start + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (c < C)[None, :]
                offsets = _offsets(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
                # Read again for the gradient: worth keeping.
                x = bounded(tl.load(logits_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_last"))
                if HAS_AVAILABLE:
                    x = tl.where(present[m][:, None], x, 0.0)
                is_own = c[None, :] == label[:, None]
                own += tl.sum(tl.where(is_own, x, 0.0), axis=1)
                other = (c < C)[None, :] & (c[None, :] != label[:, None])
                higher = tl.maximum(top, tl.max(tl.where(other, x, -BOUND), axis=1))
                power = tl.where(other, exp(x - higher[:, None]), 0.0)
                rest = rest * exp(top - higher) + tl.sum(power, axis=1)
                top = higher
            of_m = one_against_rest(own - top, rest)
            log_p, log_not_p = log_p + (of_m[0],), log_not_p + (of_m[1],)
            p, not_p = p + (of_m[2],), not_p + (of_m[3],)
            owns, tops, rests = owns + (own,), tops + (top,), rests + (rest,)
        cost, slopes = cost_and_slopes(log_p, log_not_p, p, not_p, present, factor, gamma, M, VARIANT, DETACH)
        rate = weight * scale
        loss = tl.where(kept, cost * rate, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + b, loss, mask=inside)
        else:
            sums += loss
        if GRADIENT:
            for m in tl.static_range(M):
                own_slope, other_slope = _slopes(slopes[m], rate, kept, owns[m], tops[m], rests[m])
                for start in range(0, C, COLUMNS):
                    c = start + tl.arange(0, COLUMNS)
                    mask = inside[:, None] & (c < C)[None, :]
                    offsets = _offsets(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
                    x = bounded(tl.load(logits_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first"))
                    if HAS_AVAILABLE:
                        x = tl.where(present[m][:, None], x, 0.0)
                    # The label's own power may be infinite; it is not used.
                    power = exp(x - tops[m][:, None])
                    is_own = c[None, :] == label[:, None]
                    tile = tl.where(is_own, own_slope[:, None], -other_slope[:, None] * power)
                    tile = tl.where(kept[:, None], tile, 0.0)
                    offsets = tl.full([], m, tl.int64) * B * C + (b[:, None] * C + c[None, :])
                    tl.store(gradient_ptr + offsets, tile.to(gradient_ptr.dtype.element_ty), mask=mask)
    if REDUCTION != "none":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))


# --- Every class: targets over classes, a margin, class costs ---


@triton.jit
def _class_block(
    logits_ptr,  # (M, B, C) with any strides
    b,
    c,
    mask,
    stride_m,
    stride_b,
    stride_c,
    tops,
    top_classes,
    seconds,
    rests,
    present,
    factor,
    gamma,
    M: tl.constexpr,
    C: tl.constexpr,
    VARIANT: tl.constexpr,
    DETACH: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Costs of a block of classes; and for each modality their slopes, the raw logits and the sums a class leaves over.

    A class other than the likeliest leaves Σ_{j≠y} exp(x_j - top) = total - exp(x_y - top) ≥ 1: nothing cancels.
    """
    log_p, log_not_p, p, not_p = (), (), (), ()
    raws, lefts = (), ()
    here, factors = (), ()
    for m in tl.static_range(M):
        offsets = _offsets(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
        raw = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
        x = bounded(raw)
        if HAS_AVAILABLE:
            x = tl.where(present[m][:, None], x, 0.0)
        is_top = c[None, :] == top_classes[m][:, None]
        shifted = tl.where(mask, x - tops[m][:, None], 0.0)
        total = 1.0 + rests[m] * exp(seconds[m] - tops[m])
        # 1 where it is not used, so that nothing is divided by the 0 that it would be.
        left = tl.where(is_top | ~mask, 1.0, total[:, None] - exp(shifted))
        lead = tl.where(is_top, (tops[m] - seconds[m])[:, None], shifted)
        of_m = one_against_rest(lead, tl.where(is_top, rests[m][:, None], left))
        log_p, log_not_p = log_p + (of_m[0],), log_not_p + (of_m[1],)
        p, not_p = p + (of_m[2],), not_p + (of_m[3],)
        raws, lefts = raws + (raw,), lefts + (left,)
        here = here + (tl.broadcast_to(present[m][:, None], mask.shape),)
        factors = factors + (factor[m],)
    cost, slopes = cost_and_slopes(log_p, log_not_p, p, not_p, here, factors, gamma[:, None], M, VARIANT, DETACH)
    return cost, slopes, raws, lefts


@triton.jit
def _target_block(
    share_ptr,  # (B, C) float
    class_weight_ptr,  # (C,) float32
    b,
    c,
    mask,
    label,
    weight,
    C: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
):
    """What each class's cost counts for in the loss (ROWS, COLUMNS), before a mean."""
    if TARGET == "share":
        share = tl.load(share_ptr + (b[:, None] * C + c[None, :]), mask=mask, other=0.0).to(tl.float32)
        if HAS_CLASS_WEIGHT:
            share *= tl.load(class_weight_ptr + c, mask=c < C, other=0.0)[None, :]
        return share
    return tl.where((c[None, :] == label[:, None]) & mask, weight[:, None], 0.0)


@triton.jit(do_not_specialize=_RUNTIME)
def fusion_loss_classes_fwd_kernel(
    logits_ptr,  # (M, B, C) with any strides
    target_ptr,  # (B,) int64 labels, or (B, C) float shares
    class_weight_ptr,  # (C,) float32
    modality_weight_ptr,  # (M,) float32
    available_ptr,  # (B, M) bool
    part_ptr,  # (PARTS,) float32, sums of label weights
    loss_ptr,  # (B,) for "none", else (programs,) partial sums, float32
    cost_ptr,  # (B, C) float32
    gradient_ptr,  # (M, B, C) contiguous
    B,
    blocks,
    stride_m,
    stride_b,
    stride_c,
    available_stride_b,
    available_stride_m,
    beta,
    margin,
    ignore_index,
    M: tl.constexpr,
    C: tl.constexpr,
    TARGET: tl.constexpr,  # "label", "share", or "none": class costs only
    VARIANT: tl.constexpr,
    DETACH: tl.constexpr,
    REDUCTION: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_MODALITY_WEIGHT: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    DENSE: tl.constexpr,
    SOLO: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Loss and gradient where every class takes part, or the class costs alone."""
    scale = 1.0
    if REDUCTION == "mean":
        if TARGET == "share":
            scale = _mean_factor(B.to(tl.float32))
        elif SOLO:
            scale = _mean_factor(
                _label_weight(target_ptr, class_weight_ptr, B, blocks, ignore_index, C, HAS_CLASS_WEIGHT, ROWS)
            )
        else:
            scale = _mean_factor(tl.sum(tl.load(part_ptr + tl.arange(0, PARTS))))
    factor = _factors(modality_weight_ptr, M, HAS_MODALITY_WEIGHT)
    sums = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        block = tl.program_id(0) + i * tl.num_programs(0)
        b = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = b < B
        present, gamma = _presence(
            available_ptr, b, inside, available_stride_b, available_stride_m, beta, M, HAS_AVAILABLE
        )
        label = tl.zeros([ROWS], tl.int32)
        kept = inside
        weight = tl.full([ROWS], 1.0, tl.float32)
        if TARGET == "label":
            label, kept, weight = _labels(target_ptr, class_weight_ptr, b, inside, ignore_index, C, HAS_CLASS_WEIGHT)
        elif TARGET == "share" and HAS_MARGIN:
            largest = tl.full([ROWS], -float("inf"), tl.float32)
            for start in range(0, C, COLUMNS):
                c = start + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (c < C)[None, :]
                share = tl.load(target_ptr + (b[:, None] * C + c[None, :]), mask=mask, other=-float("inf"))
                high, at = tl.max(share.to(tl.float32), axis=1, return_indices=True)
                label = tl.where(high > largest, start + at, label).to(tl.int32)
                largest = tl.maximum(largest, high)

        tops, top_classes, seconds, rests = (), (), (), ()  # rests: Σ exp(x_j - second) over all classes but the top
        for m in tl.static_range(M):
            top = tl.full([ROWS], -float("inf"), tl.float32)
            top_class = tl.zeros([ROWS], tl.int32)
            second = tl.full([ROWS], -BOUND, tl.float32)
            rest = tl.zeros([ROWS], tl.float32)
            broken = tl.zeros([ROWS], tl.int32)  # by a NaN, which a maximum with its place may or may not pass on
            for start in range(0, C, COLUMNS):
                c = start + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (c < C)[None, :]
                offsets = _offsets(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
                x = bounded(tl.load(logits_ptr + offsets, mask=mask, other=0.0))
                if HAS_AVAILABLE:
                    x = tl.where(present[m][:, None], x, 0.0)
                broken = tl.maximum(broken, tl.max((x != x).to(tl.int32), axis=1))
                high, at = tl.max(tl.where((c < C)[None, :], x, -float("inf")), axis=1, return_indices=True)
                others = (c < C)[None, :] & (tl.arange(0, COLUMNS)[None, :] != at[:, None])
                loser = tl.minimum(top, high)
                higher = tl.maximum(second, tl.maximum(loser, tl.max(tl.where(others, x, -BOUND), axis=1)))
                power = tl.where(others, exp(x - higher[:, None]), 0.0)
                rest = rest * exp(second - higher) + exp(loser - higher) + tl.sum(power, axis=1)
                top_class = tl.where(high > top, start + at, top_class).to(tl.int32)
                top = tl.maximum(top, high)
                second = higher
            if C == 1:  # nothing to be told from: certain, but finite
                rest += 1e-37
            rest = tl.where(broken > 0, float("nan"), rest)
            tops, top_classes = tops + (top,), top_classes + (top_class,)
            seconds, rests = seconds + (second,), rests + (rest,)

        loss = tl.zeros([ROWS], tl.float32)
        own = tl.zeros([ROWS], tl.float32)
        best_other = tl.full([ROWS], float("inf"), tl.float32)
        of_top = ()  # M of (ROWS,): what the loss gains with z of the likeliest class
        of_rest = ()  # and of each other class, over the sum that class leaves
        for _ in tl.static_range(M):
            of_top = of_top + (tl.zeros([ROWS], tl.float32),)
            of_rest = of_rest + (tl.zeros([ROWS], tl.float32),)
        for start in range(0, C, COLUMNS):
            c = start + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (c < C)[None, :]
            cost, slopes, raws, lefts = _class_block(
                logits_ptr, b, c, mask, stride_m, stride_b, stride_c, tops, top_classes, seconds, rests, present,
                factor, gamma, M, C, VARIANT, DETACH, HAS_AVAILABLE, DENSE,
            )  # fmt: skip
            if TARGET == "none":
                tl.store(cost_ptr + (b[:, None] * C + c[None, :]), cost, mask=mask)
            else:
                counts = _target_block(
                    target_ptr, class_weight_ptr, b, c, mask, label, weight, C, TARGET, HAS_CLASS_WEIGHT
                )
                loss += tl.sum(tl.where(mask & (counts != 0), counts * cost, 0.0), axis=1)
                if HAS_MARGIN:
                    is_label = c[None, :] == label[:, None]
                    own += tl.sum(tl.where(is_label & mask, cost, 0.0), axis=1)
                    best_other = tl.minimum(
                        best_other, tl.min(tl.where(mask & (c[None, :] != label[:, None]), cost, float("inf")), axis=1)
                    )
                if GRADIENT:
                    next_top, next_rest = (), ()
                    for m in tl.static_range(M):
                        gain = tl.where(mask & (counts != 0), counts * slopes[m], 0.0)
                        is_top = c[None, :] == top_classes[m][:, None]
                        next_top = next_top + (of_top[m] + tl.sum(tl.where(is_top, gain, 0.0), axis=1),)
                        next_rest = next_rest + (of_rest[m] + tl.sum(tl.where(is_top, 0.0, gain / lefts[m]), axis=1),)
                    of_top, of_rest = next_top, next_rest
        if TARGET != "none":
            rate = tl.where(kept, scale, 0.0)
            if HAS_MARGIN:
                # A label out of range, whose weight is NaN, must show under a margin too.
                rate = tl.where((own + margin < best_other) & (weight == weight), 0.0, rate)
            loss = tl.where(rate != 0, loss * rate, 0.0)
            if REDUCTION == "none":
                tl.store(loss_ptr + b, loss, mask=inside)
            else:
                sums += loss
            if GRADIENT:
                for start in range(0, C, COLUMNS):
                    c = start + tl.arange(0, COLUMNS)
                    mask = inside[:, None] & (c < C)[None, :]
                    counts = _target_block(
                        target_ptr, class_weight_ptr, b, c, mask, label, weight, C, TARGET, HAS_CLASS_WEIGHT
                    )
                    cost, slopes, raws, lefts = _class_block(
                        logits_ptr, b, c, mask, stride_m, stride_b, stride_c, tops, top_classes, seconds, rests,
                        present, factor, gamma, M, C, VARIANT, DETACH, HAS_AVAILABLE, DENSE,
                    )  # fmt: skip
                    for m in tl.static_range(M):
                        gain = tl.where(counts != 0, counts * slopes[m], 0.0)
                        x = bounded(raws[m])
                        if HAS_AVAILABLE:
                            x = tl.where(present[m][:, None], x, 0.0)
                        from_rest = exp(x - tops[m][:, None]) * (of_rest[m][:, None] - gain / lefts[m])
                        from_top = exp(x - seconds[m][:, None]) * (of_top[m] / rests[m])[:, None]
                        is_top = c[None, :] == top_classes[m][:, None]
                        tile = tl.where(is_top, gain - of_rest[m][:, None], gain - from_rest - from_top)
                        tile = _zero_where_held(tl.where(rate[:, None] != 0, tile * rate[:, None], 0.0), raws[m])
                        offsets = tl.full([], m, tl.int64) * B * C + (b[:, None] * C + c[None, :])
                        tl.store(gradient_ptr + offsets, tile.to(gradient_ptr.dtype.element_ty), mask=mask)
    if TARGET != "none" and REDUCTION != "none":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))


# --- Yes/no questions ---


@triton.jit(do_not_specialize=_RUNTIME)
def fusion_loss_questions_fwd_kernel(
    logits_ptr,  # (M, B, C) with any strides
    target_ptr,  # (B,) int64 labels, or (B, C) int64 or float answers
    class_weight_ptr,  # (C,) float32
    modality_weight_ptr,  # (M,) float32
    available_ptr,  # (B, M) bool
    part_ptr,  # (PARTS,) float32, numbers of answers that count
    loss_ptr,  # (B, C) for "none", else (programs,) partial sums, float32
    gradient_ptr,  # (M, B, C) contiguous
    B,
    blocks,
    stride_m,
    stride_b,
    stride_c,
    available_stride_b,
    available_stride_m,
    beta,
    margin,
    ignore_index,
    M: tl.constexpr,
    C: tl.constexpr,
    TARGET: tl.constexpr,  # "label", "answer" or "share"
    VARIANT: tl.constexpr,
    DETACH: tl.constexpr,
    REDUCTION: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_MODALITY_WEIGHT: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    SOLO: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loss and gradient of B·C questions side by side, ROWS at a time; each is a class against its absence."""
    number = B.to(tl.int64) * C
    if EVEN:  # lets the compiler read across questions: no vector is cut by the end
        number = tl.multiple_of(number, 16)
    scale = 1.0
    if REDUCTION == "mean":
        if TARGET == "share":
            total = number.to(tl.float32)
        elif not SOLO:
            total = tl.sum(tl.load(part_ptr + tl.arange(0, PARTS)))
        elif TARGET == "label":
            total = _label_weight(target_ptr, class_weight_ptr, B, blocks, ignore_index, C, False, ROWS)
        else:
            total = _label_weight(target_ptr, class_weight_ptr, number, blocks, ignore_index, 2**31 - 1, False, ROWS)
        if TARGET == "label":
            total *= C
        scale = _mean_factor(total)
    factor = _factors(modality_weight_ptr, M, HAS_MODALITY_WEIGHT)
    sums = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        block = tl.program_id(0) + i * tl.num_programs(0)
        first = block.to(tl.int64) * ROWS
        q = first + tl.arange(0, ROWS)
        # 64-bit division once a program, 32-bit division once a question.
        ahead = (first % C).to(tl.int32) + tl.arange(0, ROWS)
        b = first // C + ahead // C
        c = ahead % C
        inside = q < number
        present, gamma = _presence(
            available_ptr, b, inside, available_stride_b, available_stride_m, beta, M, HAS_AVAILABLE
        )
        log_p, log_not_p, p, not_p = (), (), (), ()
        raws = ()
        one = tl.full([ROWS], 1.0, tl.float32)
        for m in tl.static_range(M):
            offsets = tl.full([], m, tl.int64) * stride_m
            if DENSE:
                offsets += q
            else:
                offsets += b * stride_b + c.to(tl.int64) * stride_c
            raw = tl.load(logits_ptr + offsets, mask=inside, other=0.0)
            x = bounded(raw)
            if HAS_AVAILABLE:
                x = tl.where(present[m], x, 0.0)
            of_m = one_against_rest(x, one)
            log_p, log_not_p = log_p + (of_m[0],), log_not_p + (of_m[1],)
            p, not_p = p + (of_m[2],), not_p + (of_m[3],)
            raws = raws + (raw,)
        if TARGET == "label":
            label, kept, weight = _labels(target_ptr, class_weight_ptr, b, inside, ignore_index, C, False)
            answer = tl.where(label == c, 1.0, 0.0)
        elif TARGET == "answer":
            # Out of range is anything but 0 and 1, as if there were two labels.
            label, kept, weight = _labels(target_ptr, class_weight_ptr, q, inside, ignore_index, 2, False)
            answer = label.to(tl.float32)
        else:
            answer = tl.load(target_ptr + q, mask=inside, other=0.0).to(tl.float32)
            kept, weight = inside, one
        if HAS_CLASS_WEIGHT:
            weight *= tl.load(class_weight_ptr + c, mask=inside, other=0.0)
        yes, yes_slopes = cost_and_slopes(log_p, log_not_p, p, not_p, present, factor, gamma, M, VARIANT, DETACH)
        no, no_slopes = cost_and_slopes(log_not_p, log_p, not_p, p, present, factor, gamma, M, VARIANT, DETACH)
        rate = tl.where(kept, weight * scale, 0.0)
        if HAS_MARGIN:
            right = tl.where(answer >= 0.5, yes, no)
            wrong = tl.where(answer >= 0.5, no, yes)
            rate = tl.where((right + margin < wrong) & (weight == weight), 0.0, rate)
        loss = tl.where(rate != 0, (answer * yes + (1.0 - answer) * no) * rate, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + q, loss, mask=inside)
        else:
            sums += loss
        if GRADIENT:
            for m in tl.static_range(M):
                slope = answer * yes_slopes[m] - (1.0 - answer) * no_slopes[m]
                gradient = _zero_where_held(tl.where(rate != 0, slope * rate, 0.0), raws[m])
                offsets = tl.full([], m, tl.int64) * B * C + q
                tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
    if REDUCTION != "none":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))


# --- Sums of label weights; the incoming gradient ---


@triton.jit(do_not_specialize=_RUNTIME)
def fusion_loss_weight_kernel(
    target_ptr,  # (N,) int64
    class_weight_ptr,  # (C,) float32
    part_ptr,  # (PARTS,) float32
    N,
    blocks,
    ignore_index,
    C: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weights of the labels that count, added up in PARTS parts."""
    total = _label_weight(target_ptr, class_weight_ptr, N, blocks, ignore_index, C, HAS_CLASS_WEIGHT, ROWS)
    tl.store(part_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=_RUNTIME)
def fusion_loss_bwd_kernel(
    gradient_ptr,  # (N,)
    incoming_ptr,  # ()
    N,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient times the incoming gradient, in place; where that is 1, as it is for the last loss, nothing is moved."""
    incoming = tl.load(incoming_ptr).to(tl.float32)
    if incoming != 1.0:
        number = N.to(tl.int64)
        if EVEN:
            number = tl.multiple_of(number, 16)
        i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        gradient = tl.load(gradient_ptr + i, mask=i < number, other=0.0).to(tl.float32)
        tl.store(gradient_ptr + i, (gradient * incoming).to(gradient_ptr.dtype.element_ty), mask=i < number)


# --- Launching ---


class Options(NamedTuple):
    """The settings of :func:`m3er_fast.functional.fusion_loss`."""

    variant: str
    beta: float
    detach_weight: bool
    activation: str
    margin: float | None
    ignore_index: int
    reduction: str


class Tile(NamedTuple):
    """Samples (or questions) and classes that a program holds at once, its warps, and registers a thread may take.

    Without a ceiling of its own choice the assembler spills a few registers to fit more programs on a multiprocessor.
    """

    rows: int
    columns: int
    warps: int
    registers: int


# Label weights that a program adds up at a time, and numbers of a gradient that one scales.
_FLAT = Tile(2048, 1, 4, 64)
Kind = Literal["narrow", "wide", "classes", "questions"]
_KERNELS: dict[Kind, Any] = {
    "narrow": fusion_loss_narrow_fwd_kernel,
    "wide": fusion_loss_wide_fwd_kernel,
    "classes": fusion_loss_classes_fwd_kernel,
    "questions": fusion_loss_questions_fwd_kernel,
}


def kind_of(modalities: int, classes: int, *, activation: str, every_class: bool) -> Kind:
    """Which kernel serves: every class takes part under a margin and with targets over classes."""
    if activation == "sigmoid":
        return "questions"
    if every_class:
        return "classes"
    # All logits of a sample, and as many powers of e, have to fit into the registers of one thread.
    return "narrow" if classes <= 16 and modalities * triton.next_power_of_2(classes) <= 64 else "wide"


def tile_for(kind: Kind, modalities: int, classes: int, *, solo: bool = False) -> Tile:
    """The table of tile sizes, by feature sizes only; ``solo`` where one program does all of a batch."""
    columns = triton.next_power_of_2(classes)
    held = modalities * columns
    if kind == "narrow":  # a sample a thread
        if not solo:
            return Tile(128, columns, 4, 96 if held <= 24 and classes % 2 == 0 else 128 if held <= 32 else 255)
        return Tile(512, columns, 16, 128) if held <= 32 else Tile(256, columns, 8, 255)
    if kind == "questions":
        return Tile(512, 1, 4, 168) if modalities <= 4 else Tile(256, 1, 4, 255)
    if kind == "wide":
        size, warps, registers = (1024, 4, 128) if modalities <= 4 else (512, 4, 168)
        if columns <= 128:  # several samples a program: their own numbers are many beside a row's
            registers = 168 if modalities <= 4 else 255
        if classes > 1024:
            size, warps, registers = (2048, 8, 128) if modalities <= 4 else (1024, 4, 168)
    else:  # "classes": four numbers for every logit of the tile are alive at once
        size, warps, registers = (
            (1024, 4, 255) if modalities <= 2 else (512, 8, 255) if modalities <= 4 else (256, 8, 255)
        )
    columns = min(columns, size)
    return Tile(size // columns, columns, warps, registers)


def _forward(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    options: Options,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of the logits (empty if not wanted); without a target the class costs instead."""
    modalities, batch, classes = logits.shape
    mode = _target_mode(target)
    result = logits.new_empty(_result_shape(logits, target, options), dtype=torch.float32)
    gradient = logits.new_empty(logits.shape if with_gradient else (0,), dtype=_gradient_dtype(logits))
    if not batch:
        return result.zero_(), gradient
    sigmoid = options.activation == "sigmoid"
    every_class = mode in ("none", "share") or options.margin is not None
    kind = kind_of(modalities, classes, activation=options.activation, every_class=every_class)
    summed = mode != "none" and options.reduction != "none"
    solo = summed and batch <= _SOLO_SAMPLES and logits.numel() <= _SOLO_LOGITS
    tile = tile_for(kind, modalities, classes, solo=solo and batch > 128)
    blocks = triton.cdiv(batch * classes if sigmoid else batch, tile.rows)
    programs = 1 if solo else min(blocks, _MOST_PROGRAMS)
    losses = result if not summed or solo else result.new_empty(programs)
    parts = result.new_empty(_PARTS if options.reduction == "mean" and not solo and mode in ("label", "answer") else 0)
    # What a kernel does not read it is given all the same: any tensor will do.
    labels = logits if target is None else target.contiguous()
    weights = logits if class_weight is None else class_weight.to(torch.float32).contiguous()
    factors = logits if modality_weight is None else modality_weight.to(torch.float32).contiguous()
    mask = logits if available is None else available
    constants = _constants(
        kind,
        tile,
        options,
        modalities,
        classes,
        mode=mode,
        has_class_weight=class_weight is not None,
        has_modality_weight=modality_weight is not None,
        has_available=available is not None,
        dense=logits.stride()[1:] == (classes, 1),
        even=batch * classes % 16 == 0,
        solo=solo,
        gradient=with_gradient,
    )
    outputs = [losses, result, gradient] if kind == "classes" else [losses, gradient]
    numbers: list[float] = [
        batch,
        triton.cdiv(blocks, programs),
        *logits.stride(),
        *mask.stride()[:2],
        float(options.beta),
    ]
    if kind in ("classes", "questions"):
        numbers.append(float(options.margin or 0.0))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(logits):
        if parts.numel():
            fusion_loss_weight_kernel[(_PARTS,)](
                labels,
                weights,
                parts,
                labels.numel(),
                triton.cdiv(labels.numel(), _PARTS * _FLAT.rows),
                options.ignore_index,
                **_weight_constants(classes, mode, has_class_weight=class_weight is not None and not sigmoid),
                **_compile_options(_FLAT),
            )
        _KERNELS[kind][(programs,)](
            logits,
            labels,
            weights,
            factors,
            mask,
            parts,
            *outputs,
            *numbers,
            options.ignore_index,
            **constants,
            **_compile_options(tile),
        )
    return losses.sum() if losses is not result else result, gradient


def _target_mode(target: Tensor | None) -> str:
    if target is None:
        return "none"
    return "share" if target.is_floating_point() else "label" if target.ndim == 1 else "answer"


def _result_shape(logits: Tensor, target: Tensor | None, options: Options) -> tuple[int, ...]:
    _, batch, classes = logits.shape
    if target is None:
        return (batch, classes)
    if options.reduction != "none":
        return ()
    return (batch, classes) if options.activation == "sigmoid" else (batch,)


def _gradient_dtype(logits: Tensor) -> torch.dtype:
    """The logits' own, but for float16: a mean's gradient is too small for it before the loss scale is applied."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _weight_constants(classes: int, mode: str, *, has_class_weight: bool) -> dict[str, Any]:
    # Answers are counted, whatever they are: the main kernel judges them.
    return {
        "C": 2**31 - 1 if mode == "answer" else classes,
        "HAS_CLASS_WEIGHT": has_class_weight,
        "ROWS": _FLAT.rows,
    }


def _constants(
    kind: Kind,
    tile: Tile,
    options: Options,
    modalities: int,
    classes: int,
    *,
    mode: str,
    has_class_weight: bool,
    has_modality_weight: bool,
    has_available: bool,
    dense: bool,
    even: bool,
    solo: bool,
    gradient: bool,
) -> dict[str, Any]:
    """Compile-time arguments of a kernel."""
    constants: dict[str, Any] = {
        "M": modalities,
        "C": classes,
        "VARIANT": options.variant,
        "DETACH": options.detach_weight,
        "REDUCTION": options.reduction,
        "HAS_CLASS_WEIGHT": has_class_weight,
        "HAS_MODALITY_WEIGHT": has_modality_weight,
        "HAS_AVAILABLE": has_available,
        "DENSE": dense,
        "SOLO": solo,
        "GRADIENT": gradient,
        "PARTS": _PARTS,
        "ROWS": tile.rows,
    }
    if kind != "questions":
        constants["COLUMNS"] = tile.columns
    if kind == "narrow":
        constants["LOG_COLUMNS"] = int(math.log2(tile.columns))
    if kind in ("classes", "questions"):
        constants |= {"TARGET": mode, "HAS_MARGIN": options.margin is not None}
    if kind == "questions":
        constants["EVEN"] = even
    return constants


def _compile_options(tile: Tile) -> dict[str, Any]:
    # One stage: loads are issued together as it is, and staging them through shared memory costs a barrier each.
    return {"num_warps": tile.warps, "maxnreg": tile.registers, "num_stages": 1, "enable_fp_fusion": True}


# --- The ops and their gradients ---


@torch.library.custom_op("m3er_fast::fusion_loss", mutates_args=())
def fusion_loss_op(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    variant: str,
    beta: float,
    detach_weight: bool,
    activation: str,
    margin: float | None,
    ignore_index: int,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient. Autocast changes nothing: logits of any type are computed in float32."""
    options = Options(variant, beta, detach_weight, activation, margin, ignore_index, reduction)
    return _forward(logits, target, class_weight, modality_weight, available, options, with_gradient=with_gradient)


@fusion_loss_op.register_fake
def _fusion_loss_fake(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    variant: str,
    beta: float,
    detach_weight: bool,
    activation: str,
    margin: float | None,
    ignore_index: int,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    options = Options(variant, beta, detach_weight, activation, margin, ignore_index, reduction)
    return (
        logits.new_empty(_result_shape(logits, target, options), dtype=torch.float32),
        logits.new_empty(logits.shape if with_gradient else (0,), dtype=_gradient_dtype(logits)),
    )


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.logits_dtype = inputs[0].dtype


def _fusion_loss_backward(ctx: Any, incoming: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if incoming is None:
        return (None,) * 13
    if torch.is_grad_enabled():
        raise RuntimeError("the operator m3er_fast::fusion_loss has no second derivative: use backend 'torch'")
    (gradient,) = ctx.saved_tensors  # (M, B, C), while the loss is (), (B,) or (B, C)
    scaled = gradient * (incoming[:, None] if incoming.ndim == 1 else incoming)
    return (scaled.to(ctx.logits_dtype), *[None] * 12)


fusion_loss_op.register_autograd(_fusion_loss_backward, setup_context=_save_gradient)


def loss_and_gradient(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    settings: Mapping[str, Any],
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The op without the dispatcher, which takes longer than the kernel on a small batch: loss, and gradient or (0,).

    Arguments are checked, and those of :func:`m3er_fast.functional.fusion_loss`; logits float16, bfloat16 or float32.
    """
    options = Options(**settings)
    return _forward(logits, target, class_weight, modality_weight, available, options, with_gradient=with_gradient)


def scale_(gradient: Tensor, incoming: Tensor) -> Tensor:
    """The gradient times a number (), in place; where that is 1, as it is for the last loss, nothing is moved."""
    number = gradient.numel()
    if number:
        with torch.cuda.device_of(gradient):
            fusion_loss_bwd_kernel[(triton.cdiv(number, _FLAT.rows),)](
                gradient, incoming, number, EVEN=number % 16 == 0, ROWS=_FLAT.rows, **_compile_options(_FLAT)
            )
    return gradient


def fusion_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    **settings: Any,
) -> Tensor:
    """The same by the op, for the compiler's graph."""
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    options = Options(**settings)
    loss: Tensor = fusion_loss_op(logits, target, class_weight, modality_weight, available, *options, with_gradient)[0]
    return loss


@torch.library.custom_op("m3er_fast::class_costs", mutates_args=())
def class_costs_op(logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float) -> Tensor:
    """Class costs (B, C)."""
    return _forward(logits, None, None, modality_weight, available, _cost_options(beta), with_gradient=False)[0]


@class_costs_op.register_fake
def _class_costs_fake(logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float) -> Tensor:
    return logits.new_empty(logits.shape[1:], dtype=torch.float32)


@torch.library.custom_op("m3er_fast::class_costs_backward", mutates_args=())
def class_costs_backward_op(
    incoming: Tensor, logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float
) -> Tensor:
    """Gradient of Σ_y incoming(y) c(y): that of a loss whose target is the incoming gradient."""
    gradient = _forward(logits, incoming, None, modality_weight, available, _cost_options(beta), with_gradient=True)[1]
    return gradient.to(logits.dtype)


@class_costs_backward_op.register_fake
def _class_costs_backward_fake(
    incoming: Tensor, logits: Tensor, modality_weight: Tensor | None, available: Tensor | None, beta: float
) -> Tensor:
    return logits.new_empty(logits.shape)


def _cost_options(beta: float) -> Options:
    return Options("original", beta, False, "softmax", None, -100, "sum")


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, modality_weight, available, beta = inputs
    ctx.save_for_backward(logits, modality_weight, available)
    ctx.beta = beta


def _class_costs_backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    logits, modality_weight, available = ctx.saved_tensors
    return class_costs_backward_op(incoming, logits, modality_weight, available, ctx.beta), None, None, None


class_costs_op.register_autograd(_class_costs_backward, setup_context=_save_logits)


def class_costs(logits: Tensor, *, beta: float, modality_weight: Tensor | None, available: Tensor | None) -> Tensor:
    """:func:`m3er_fast.functional.class_costs` of checked arguments, float16, bfloat16 or float32 logits."""
    costs: Tensor = class_costs_op(logits, modality_weight, available, beta)
    return costs


# --- What the ops must move and how their kernels are compiled ---


def work(modalities: int, batch: int, classes: int, dtype: torch.dtype, *, with_gradient: bool = True) -> Work:
    """The least that loss and gradient of labels must do: read logits and labels once, write the gradient once.

    About 30 operations a logit: two comparisons, an exponential, a sum, a product, and its share of the sample's own.
    """
    logits = modalities * batch * classes
    moved = logits * dtype.itemsize + batch * 8
    if with_gradient:
        moved += logits * torch.promote_types(dtype, torch.bfloat16).itemsize
    return Work(moved, 30 * logits)


def specializations() -> Iterator[Specialization]:
    """Every tile of the table, with the options that need most registers, and the plainest ones."""
    plain = Options("m3er", 1.0, True, "softmax", None, -100, "mean")
    heavy = plain._replace(variant="original", detach_weight=False)
    both = (torch.float32, torch.bfloat16)
    for modalities, classes in ((1, 1), (3, 6), (3, 7), (3, 16), (4, 16), (8, 8)):
        yield _specialization("narrow", modalities, classes, torch.float32, heavy, "label", full=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _specialization("narrow", 3, 6, dtype, plain, "label")
    for modalities, classes in ((3, 6), (8, 8)):
        yield _specialization("narrow", modalities, classes, torch.float32, heavy, "label", full=True, solo=True)
    few = [(modalities, classes) for modalities in (4, 8) for classes in (20, 30, 50, 100)]
    for modalities, classes in (*few, (8, 12), (3, 131072), (8, 131072)):
        yield _specialization("wide", modalities, classes, torch.float32, heavy, "label", full=True)
    for dtype in both:
        yield _specialization("wide", 3, 1024, dtype, plain, "label")
    yield _specialization("wide", 3, 1024, torch.float32, heavy, "label", full=True, solo=True)
    margin = heavy._replace(margin=0.1)
    for modalities, classes in ((1, 6), (3, 6), (4, 1024), (8, 1024)):
        yield _specialization("classes", modalities, classes, torch.float32, margin, "label", full=True)
    yield _specialization("classes", 3, 6, torch.float32, heavy._replace(reduction="sum"), "none")
    for modalities in (3, 4):
        yield _specialization("classes", modalities, 1024, torch.bfloat16, margin, "share", full=True)
    questions = margin._replace(activation="sigmoid")
    for mode in ("label", "answer", "share"):
        yield _specialization("questions", 3, 6, torch.float32, questions, mode, full=True)
    yield _specialization("questions", 8, 6, torch.float32, questions, "answer", full=True)
    yield _specialization("questions", 3, 6, torch.bfloat16, questions, "share")
    yield Specialization(
        "labels",
        fusion_loss_weight_kernel,
        {"target_ptr": "*i64", "class_weight_ptr": "*fp32", "part_ptr": "*fp32", "N": "i32"}
        | {"blocks": "i32", "ignore_index": "i32"},
        _weight_constants(6, "label", has_class_weight=False),
        frozenset({"target_ptr", "class_weight_ptr", "part_ptr"}),
        _compile_options(_FLAT),
    )
    for dtype in both:
        yield Specialization(
            f"{TRITON_TYPE[dtype]}",
            fusion_loss_bwd_kernel,
            {"gradient_ptr": f"*{TRITON_TYPE[dtype]}", "incoming_ptr": "*fp32", "N": "i32"},
            {"EVEN": True, "ROWS": _FLAT.rows},
            frozenset({"gradient_ptr", "incoming_ptr"}),
            _compile_options(_FLAT),
        )


def _specialization(
    kind: Kind,
    modalities: int,
    classes: int,
    dtype: torch.dtype,
    options: Options,
    mode: str,
    *,
    full: bool = False,
    solo: bool = False,
) -> Specialization:
    """A dense problem; ``full`` has every optional argument."""
    tile = tile_for(kind, modalities, classes, solo=solo)
    logits = TRITON_TYPE[dtype]
    pointers = {
        "logits_ptr": f"*{logits}",
        "target_ptr": "*fp32" if mode == "share" else "*i64",
        "class_weight_ptr": "*fp32",
        "modality_weight_ptr": "*fp32",
        "available_ptr": "*i1",
        "part_ptr": "*fp32",
        "loss_ptr": "*fp32",
    }
    if kind == "classes":
        pointers["cost_ptr"] = "*fp32"
    pointers["gradient_ptr"] = "*fp32" if dtype == torch.float16 else f"*{logits}"
    numbers = {"B": "i32", "blocks": "i32", "stride_m": "i32", "stride_b": "i32", "stride_c": "i32"}
    numbers |= {"available_stride_b": "i32", "available_stride_m": "i32", "beta": "fp32"}
    if kind in ("classes", "questions"):
        numbers["margin"] = "fp32"
    return Specialization(
        f"M={modalities} C={classes} {logits} {options.variant}{' ' + mode if mode != 'label' else ''}"
        f"{' full' if full else ''}{' solo' if solo else ''}",
        _KERNELS[kind],
        pointers | numbers | {"ignore_index": "i32"},
        _constants(
            kind,
            tile,
            options,
            modalities,
            classes,
            mode=mode,
            has_class_weight=full,
            has_modality_weight=full,
            has_available=full,
            dense=True,
            even=True,
            solo=solo,
            gradient=mode != "none",
        ),
        frozenset({*pointers, "stride_m"}),
        _compile_options(tile),
        # Rows of an odd number of classes start at any multiple of one element; and of many modalities, with every
        # class, a thread holds one logit each, for lack of registers.
        vectorized=kind == "questions" or (classes % 2 == 0 and not (kind == "classes" and modalities > 4)),
    )
