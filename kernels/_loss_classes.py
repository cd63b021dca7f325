"""The fusion loss where every class takes part: targets over classes, a margin, and the class costs.

Dimension legend: M modalities, B samples, C classes, ROWS samples and COLUMNS classes of a tile, PARTS partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3er_fast.kernels._loss_inputs import (
    RUNTIME,
    label_mean_factor,
    labels_of,
    mean_factor,
    modality_factors,
    offsets_of,
    presence,
)
from m3er_fast.kernels._loss_math import BOUND, bounded, cost_and_slopes, exp, one_against_rest, zero_where_held


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
        offsets = offsets_of(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
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


@triton.jit(do_not_specialize=RUNTIME)
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
            scale = mean_factor(B.to(tl.float32))
        else:
            scale = label_mean_factor(
                target_ptr, class_weight_ptr, part_ptr, B, blocks, ignore_index, C, HAS_CLASS_WEIGHT, SOLO, PARTS, ROWS
            )
    factor = modality_factors(modality_weight_ptr, M, HAS_MODALITY_WEIGHT)
    sums = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        block = tl.program_id(0) + i * tl.num_programs(0)
        b = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = b < B
        present, gamma = presence(
            available_ptr, b, inside, available_stride_b, available_stride_m, beta, M, HAS_AVAILABLE
        )
        label = tl.zeros([ROWS], tl.int32)
        kept = inside
        weight = tl.full([ROWS], 1.0, tl.float32)
        if TARGET == "label":
            label, kept, weight = labels_of(target_ptr, class_weight_ptr, b, inside, ignore_index, C, HAS_CLASS_WEIGHT)
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
                offsets = offsets_of(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
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
                        tile = zero_where_held(tl.where(rate[:, None] != 0, tile * rate[:, None], 0.0), raws[m])
                        offsets = tl.full([], m, tl.int64) * B * C + (b[:, None] * C + c[None, :])
                        tl.store(gradient_ptr + offsets, tile.to(gradient_ptr.dtype.element_ty), mask=mask)
    if TARGET != "none" and REDUCTION != "none":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))
