"""The fusion loss of labels under softmax: one class of each sample against all others.

``narrow`` keeps a sample's few classes in the registers of one thread, with hundreds of samples per program. ``wide``
passes over blocks of classes with an online softmax, and over them again for the gradient, unless there is only one
block: its powers stay in registers.

Dimension legend: M modalities, B samples, C classes, ROWS samples and COLUMNS classes of a tile, PARTS partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3er_fast.kernels._loss_inputs import (
    RUNTIME,
    label_mean_factor,
    labels_of,
    modality_factors,
    offsets_of,
    presence,
)
from m3er_fast.kernels._loss_math import BOUND, bounded, columns_of, cost_and_slopes, one_against_rest, tile_of
from m3er_fast.kernels._math import exp


@triton.jit
def _slopes(slope, rate, valid, own, top, rest):
    """Return the slope at the label's logit, and the slope per exp(x_j - top) at the logits of the other classes.

    A slope is zero where its logit is clamped. Among the other classes only the largest logit can be clamped and have a
    power that is not zero.
    """
    slope = tl.where(valid, slope * rate, 0.0)
    return tl.where(tl.abs(own) == BOUND, 0.0, slope), tl.where(tl.abs(top) == BOUND, 0.0, slope / rest)


@triton.jit(do_not_specialize=RUNTIME)
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
    LABELS: tl.constexpr,  # labels that each program adds up at a time, or 0
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOG_COLUMNS: tl.constexpr,
):
    """Compute loss and gradient of labels over few classes, one sample per thread."""
    scale = 1.0
    if REDUCTION == "mean":
        scale = label_mean_factor(
            target_ptr, class_weight_ptr, part_ptr, B, ignore_index, C, HAS_CLASS_WEIGHT, LABELS, PARTS
        )
    factor = modality_factors(modality_weight_ptr, M, HAS_MODALITY_WEIGHT)
    c = tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        block = tl.program_id(0) + i * tl.num_programs(0)
        b = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = b < B
        mask = inside[:, None] & (c < C)[None, :]
        tiles = ()
        for m in tl.static_range(M):
            offsets = offsets_of(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
            tiles = tiles + (tl.load(logits_ptr + offsets, mask=mask, other=0.0),)
        label, valid, weight = labels_of(target_ptr, class_weight_ptr, b, inside, ignore_index, C, HAS_CLASS_WEIGHT)
        present, gamma = presence(
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
            if C == 1:  # the only class is certain, but its logarithms must be finite
                rest += 1e-37
            chances = one_against_rest(own - top, rest)
            log_p, log_not_p = log_p + (chances[0],), log_not_p + (chances[1],)
            p, not_p = p + (chances[2],), not_p + (chances[3],)
            powers, rests = powers + (power,), rests + (rest,)
            owns, tops = owns + (own,), tops + (top,)
        cost, slopes = cost_and_slopes(log_p, log_not_p, p, not_p, present, factor, gamma, M, VARIANT, DETACH)
        rate = weight * scale
        loss = tl.where(valid, cost * rate, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + b, loss, mask=inside)
        else:
            sums += loss
        if GRADIENT:
            for m in tl.static_range(M):
                own_slope, other_slope = _slopes(slopes[m], rate, valid, owns[m], tops[m], rests[m])
                gradient = ()
                for j in tl.static_range(C):
                    slope = tl.where(label == j, own_slope, -other_slope * powers[m][j])
                    gradient = gradient + (tl.where(valid, slope, 0.0),)  # an ignored sample's powers may be NaN
                for _ in tl.static_range(COLUMNS - C):
                    gradient = gradient + (own_slope,)  # masked
                tile = tile_of(gradient, ROWS, COLUMNS, LOG_COLUMNS)
                offsets = tl.full([], m, tl.int64) * B * C + (b[:, None] * C + c[None, :])
                tl.store(gradient_ptr + offsets, tile.to(gradient_ptr.dtype.element_ty), mask=mask)
    if REDUCTION != "none":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))


@triton.jit
def _wide_block(
    logits_ptr,  # (M, B, C) with any strides
    m: tl.constexpr,
    b,
    start,
    inside,
    is_present,
    stride_m,
    stride_b,
    stride_c,
    C: tl.constexpr,
    HAS_AVAILABLE: tl.constexpr,
    DENSE: tl.constexpr,
    COLUMNS: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Return the classes (COLUMNS,) from ``start`` on, which of (ROWS, COLUMNS) there are, and modality m's logits."""
    c = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (c < C)[None, :]
    offsets = offsets_of(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
    x = bounded(tl.load(logits_ptr + offsets, mask=mask, other=0.0, eviction_policy=POLICY))
    if HAS_AVAILABLE:
        x = tl.where(is_present[:, None], x, 0.0)
    return c, mask, x


@triton.jit
def _online_softmax(x, c, label, own, top, rest, C: tl.constexpr):
    """Take a block of classes into the label's logit, the largest other one and the sum of the others' powers.

    Return these and the block's powers exp(x_j - top), 0 for the label's.
    """
    own += tl.sum(tl.where(c[None, :] == label[:, None], x, 0.0), axis=1)
    other = (c < C)[None, :] & (c[None, :] != label[:, None])
    higher = tl.maximum(top, tl.max(tl.where(other, x, -BOUND), axis=1))
    power = tl.where(other, exp(x - higher[:, None]), 0.0)
    return own, higher, rest * exp(top - higher) + tl.sum(power, axis=1), power


@triton.jit
def _store_gradient(
    gradient_ptr,  # (M, B, C) contiguous
    m: tl.constexpr,
    b,
    c,
    mask,
    B,
    label,
    valid,
    own_slope,
    other_slope,
    power,
    C: tl.constexpr,
):
    """Write the gradient of a block of classes, whose powers are exp(x_j - top)."""
    tile = tl.where(c[None, :] == label[:, None], own_slope[:, None], -other_slope[:, None] * power)
    tile = tl.where(valid[:, None], tile, 0.0)  # an ignored sample's powers may be NaN
    offsets = tl.full([], m, tl.int64) * B * C + (b[:, None] * C + c[None, :])
    tl.store(gradient_ptr + offsets, tile.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
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
    LABELS: tl.constexpr,  # labels that each program adds up at a time, or 0
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Loss and gradient of labels over many classes, block by block of classes."""
    scale = 1.0
    if REDUCTION == "mean":
        scale = label_mean_factor(
            target_ptr, class_weight_ptr, part_ptr, B, ignore_index, C, HAS_CLASS_WEIGHT, LABELS, PARTS
        )
    factor = modality_factors(modality_weight_ptr, M, HAS_MODALITY_WEIGHT)
    sums = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        block = tl.program_id(0) + i * tl.num_programs(0)
        b = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = b < B
        label, valid, weight = labels_of(target_ptr, class_weight_ptr, b, inside, ignore_index, C, HAS_CLASS_WEIGHT)
        present, gamma = presence(
            available_ptr, b, inside, available_stride_b, available_stride_m, beta, M, HAS_AVAILABLE
        )
        log_p, log_not_p, p, not_p = (), (), (), ()
        owns, tops, rests = (), (), ()  # the label's logit; the largest other, and Σ exp(x_j - it) over the others
        powers = ()  # of the only block
        for m in tl.static_range(M):
            top = tl.full([ROWS], -BOUND, tl.float32)
            rest = tl.zeros([ROWS], tl.float32)
            own = tl.zeros([ROWS], tl.float32)
            if C <= COLUMNS:
                c, mask, x = _wide_block(
                    logits_ptr, m, b, 0, inside, present[m], stride_m, stride_b, stride_c,
                    C, HAS_AVAILABLE, DENSE, COLUMNS, "evict_first",
                )  # fmt: skip
                own, top, rest, power = _online_softmax(x, c, label, own, top, rest, C)
                powers = powers + (power,)
            else:
                for start in range(0, C, COLUMNS):
                    c, mask, x = _wide_block(
                        logits_ptr, m, b, start, inside, present[m], stride_m, stride_b, stride_c,
                        C, HAS_AVAILABLE, DENSE, COLUMNS, "evict_last",  # the gradient's pass reads it again
                    )  # fmt: skip
                    own, top, rest, _ = _online_softmax(x, c, label, own, top, rest, C)
            chances = one_against_rest(own - top, rest)
            log_p, log_not_p = log_p + (chances[0],), log_not_p + (chances[1],)
            p, not_p = p + (chances[2],), not_p + (chances[3],)
            owns, tops, rests = owns + (own,), tops + (top,), rests + (rest,)
        cost, slopes = cost_and_slopes(log_p, log_not_p, p, not_p, present, factor, gamma, M, VARIANT, DETACH)
        rate = weight * scale
        loss = tl.where(valid, cost * rate, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + b, loss, mask=inside)
        else:
            sums += loss
        if GRADIENT:
            for m in tl.static_range(M):
                own_slope, other_slope = _slopes(slopes[m], rate, valid, owns[m], tops[m], rests[m])
                if C <= COLUMNS:
                    c = tl.arange(0, COLUMNS)
                    mask = inside[:, None] & (c < C)[None, :]
                    _store_gradient(gradient_ptr, m, b, c, mask, B, label, valid, own_slope, other_slope, powers[m], C)
                else:
                    for start in range(0, C, COLUMNS):
                        c, mask, x = _wide_block(
                            logits_ptr, m, b, start, inside, present[m], stride_m, stride_b, stride_c,
                            C, HAS_AVAILABLE, DENSE, COLUMNS, "evict_first",
                        )  # fmt: skip
                        # The label's own power may be infinite, but is not used.
                        power = exp(x - tops[m][:, None])
                        _store_gradient(gradient_ptr, m, b, c, mask, B, label, valid, own_slope, other_slope, power, C)
    if REDUCTION != "none":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))
