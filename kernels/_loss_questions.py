"""The fusion loss of yes/no questions, which do not depend on each other: one flat pass.

Dimension legend: M modalities, B samples, C classes, ROWS questions of a block, PARTS partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3er_fast.kernels._loss_inputs import (
    RUNTIME,
    label_weight,
    labels_of,
    mean_factor,
    modality_factors,
    presence,
)
from m3er_fast.kernels._loss_math import bounded, cost_and_slopes, is_ahead, one_against_rest, zero_where_clamped


@triton.jit(do_not_specialize=RUNTIME)
def fusion_loss_questions_fwd_kernel(
    logits_ptr,  # (M, B, C) with any strides
    target_ptr,  # (B,) int64 labels, or (B, C) int64 or float answers
    class_weight_ptr,  # (C,) float32
    modality_weight_ptr,  # (M,) float32
    available_ptr,  # (B, M) bool
    part_ptr,  # (PARTS,) float32, numbers of answers that are not ignored
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
    LABELS: tl.constexpr,  # labels that each program adds up at a time, or 0
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute loss and gradient of B·C questions, ROWS at a time: is the class present or absent?"""
    number = B.to(tl.int64) * C
    if EVEN:  # the compiler may then load vectors: none reaches past the end
        number = tl.multiple_of(number, 16)
    scale = 1.0
    if REDUCTION == "mean":
        if TARGET == "share":
            total = number.to(tl.float32)
        elif not LABELS:
            total = tl.sum(tl.load(part_ptr + tl.arange(0, PARTS)))
        elif TARGET == "label":
            total = label_weight(target_ptr, class_weight_ptr, B, 0, 1, ignore_index, C, False, LABELS)
        else:
            total = label_weight(target_ptr, class_weight_ptr, number, 0, 1, ignore_index, 2**31 - 1, False, LABELS)
        if TARGET == "label":
            total *= C
        scale = mean_factor(total)
    factor = modality_factors(modality_weight_ptr, M, HAS_MODALITY_WEIGHT)
    sums = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        block = tl.program_id(0) + i * tl.num_programs(0)
        first = block.to(tl.int64) * ROWS
        q = first + tl.arange(0, ROWS)
        # One 64-bit division per block, and one 32-bit division per question.
        ahead = (first % C).to(tl.int32) + tl.arange(0, ROWS)
        b = first // C + ahead // C
        c = ahead % C
        inside = q < number
        present, gamma = presence(
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
            chances = one_against_rest(x, one)
            log_p, log_not_p = log_p + (chances[0],), log_not_p + (chances[1],)
            p, not_p = p + (chances[2],), not_p + (chances[3],)
            raws = raws + (raw,)
        if TARGET == "label":
            label, valid, weight = labels_of(target_ptr, class_weight_ptr, b, inside, ignore_index, C, False)
            answer = tl.where(label == c, 1.0, 0.0)
        elif TARGET == "answer":
            # As with labels of two classes, all but 0 and 1 is out of range.
            label, valid, weight = labels_of(target_ptr, class_weight_ptr, q, inside, ignore_index, 2, False)
            answer = label.to(tl.float32)
        else:
            answer = tl.load(target_ptr + q, mask=inside, other=0.0).to(tl.float32)
            valid, weight = inside, one
        if HAS_CLASS_WEIGHT:
            weight *= tl.load(class_weight_ptr + c, mask=inside, other=0.0)
        yes, yes_slopes = cost_and_slopes(log_p, log_not_p, p, not_p, present, factor, gamma, M, VARIANT, DETACH)
        no, no_slopes = cost_and_slopes(log_not_p, log_p, not_p, p, present, factor, gamma, M, VARIANT, DETACH)
        rate = tl.where(valid, weight * scale, 0.0)
        if HAS_MARGIN:
            right = tl.where(answer >= 0.5, yes, no)
            wrong = tl.where(answer >= 0.5, no, yes)
            rate = tl.where(is_ahead(right, wrong, margin) & (weight == weight), 0.0, rate)
        loss = tl.where(rate != 0, (answer * yes + (1.0 - answer) * no) * rate, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + q, loss, mask=inside)
        else:
            sums += loss
        if GRADIENT:
            for m in tl.static_range(M):
                slope = answer * yes_slopes[m] - (1.0 - answer) * no_slopes[m]
                gradient = zero_where_clamped(tl.where(rate != 0, slope * rate, 0.0), raws[m])
                offsets = tl.full([], m, tl.int64) * B * C + q
                tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
    if REDUCTION != "none":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))
