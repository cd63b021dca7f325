"""The fusion loss in which every class takes part: targets over classes, a margin, and the class costs.

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
from m3er_fast.kernels._loss_math import (
    BOUND,
    bounded,
    cost_and_slopes,
    is_ahead,
    one_against_rest,
    zero_where_clamped,
)
from m3er_fast.kernels._math import exp


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
    """Return the costs of a block of classes and, per modality, their slopes, raw logits and remaining sums.

    For a class y other than the likeliest the remaining sum is Σ_{j≠y} exp(x_j - top) = total - exp(x_y - top) ≥ 1:
    nothing cancels.
    """
    log_p, log_not_p, p, not_p = (), (), (), ()
    raws, remaining = (), ()
    is_present, factors = (), ()
    for m in tl.static_range(M):
        offsets = offsets_of(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
        raw = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
        x = bounded(raw)
        if HAS_AVAILABLE:
            x = tl.where(present[m][:, None], x, 0.0)
        is_top = c[None, :] == top_classes[m][:, None]
        shifted = tl.where(mask, x - tops[m][:, None], 0.0)
        total = 1.0 + rests[m] * exp(seconds[m] - tops[m])
        # For the likeliest class, which does not use it, 1: it would be 0, and is divided by.
        left = tl.where(is_top | ~mask, 1.0, total[:, None] - exp(shifted))
        lead = tl.where(is_top, (tops[m] - seconds[m])[:, None], shifted)
        chances = one_against_rest(lead, tl.where(is_top, rests[m][:, None], left))
        log_p, log_not_p = log_p + (chances[0],), log_not_p + (chances[1],)
        p, not_p = p + (chances[2],), not_p + (chances[3],)
        raws, remaining = raws + (raw,), remaining + (left,)
        is_present = is_present + (tl.broadcast_to(present[m][:, None], mask.shape),)
        factors = factors + (factor[m],)
    cost, slopes = cost_and_slopes(log_p, log_not_p, p, not_p, is_present, factors, gamma[:, None], M, VARIANT, DETACH)
    return cost, slopes, raws, remaining


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
    """Return the weights (ROWS, COLUMNS) of the classes' costs in the loss, before the division of a mean."""
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
    LABELS: tl.constexpr,  # labels that each program adds up at a time, or 0
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute loss and gradient, or the class costs alone, when every class takes part."""
    scale = 1.0
    if REDUCTION == "mean":
        if TARGET == "share":
            scale = mean_factor(B.to(tl.float32))
        else:
            scale = label_mean_factor(
                target_ptr, class_weight_ptr, part_ptr, B, ignore_index, C, HAS_CLASS_WEIGHT, LABELS, PARTS
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
        valid = inside
        weight = tl.full([ROWS], 1.0, tl.float32)
        if TARGET == "label":
            label, valid, weight = labels_of(target_ptr, class_weight_ptr, b, inside, ignore_index, C, HAS_CLASS_WEIGHT)
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
            has_nan = tl.zeros([ROWS], tl.int32)  # since a maximum with its index may or may not propagate NaN
            for start in range(0, C, COLUMNS):
                c = start + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (c < C)[None, :]
                offsets = offsets_of(m, b, c, stride_m, stride_b, stride_c, C, DENSE)
                x = bounded(tl.load(logits_ptr + offsets, mask=mask, other=0.0))
                if HAS_AVAILABLE:
                    x = tl.where(present[m][:, None], x, 0.0)
                has_nan = tl.maximum(has_nan, tl.max((x != x).to(tl.int32), axis=1))
                high, at = tl.max(tl.where((c < C)[None, :], x, -float("inf")), axis=1, return_indices=True)
                others = (c < C)[None, :] & (tl.arange(0, COLUMNS)[None, :] != at[:, None])
                loser = tl.minimum(top, high)
                higher = tl.maximum(second, tl.maximum(loser, tl.max(tl.where(others, x, -BOUND), axis=1)))
                power = tl.where(others, exp(x - higher[:, None]), 0.0)
                rest = rest * exp(second - higher) + exp(loser - higher) + tl.sum(power, axis=1)
                top_class = tl.where(high > top, start + at, top_class).to(tl.int32)
                top = tl.maximum(top, high)
                second = higher
            if C == 1:  # the only class is certain, but its logarithms must be finite
                rest += 1e-37
            rest = tl.where(has_nan > 0, float("nan"), rest)
            tops, top_classes = tops + (top,), top_classes + (top_class,)
            seconds, rests = seconds + (second,), rests + (rest,)

        loss = tl.zeros([ROWS], tl.float32)
        own = tl.zeros([ROWS], tl.float32)
        best_other = tl.full([ROWS], float("inf"), tl.float32)
        top_gain = ()  # M of (ROWS,): derivative of the loss by z of the likeliest class
        rest_gain = ()  # M of (ROWS,): Σ over the other classes of that derivative / the class's remaining sum
        for _ in tl.static_range(M):
            top_gain = top_gain + (tl.zeros([ROWS], tl.float32),)
            rest_gain = rest_gain + (tl.zeros([ROWS], tl.float32),)
        for start in range(0, C, COLUMNS):
            c = start + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (c < C)[None, :]
            cost, slopes, raws, remaining = _class_block(
                logits_ptr, b, c, mask, stride_m, stride_b, stride_c, tops, top_classes, seconds, rests, present,
                factor, gamma, M, C, VARIANT, DETACH, HAS_AVAILABLE, DENSE,
            )  # fmt: skip
            if TARGET == "none":
                tl.store(cost_ptr + (b[:, None] * C + c[None, :]), cost, mask=mask)
            else:
                share = _target_block(
                    target_ptr, class_weight_ptr, b, c, mask, label, weight, C, TARGET, HAS_CLASS_WEIGHT
                )
                loss += tl.sum(tl.where(mask & (share != 0), share * cost, 0.0), axis=1)
                if HAS_MARGIN:
                    is_label = c[None, :] == label[:, None]
                    own += tl.sum(tl.where(is_label & mask, cost, 0.0), axis=1)
                    best_other = tl.minimum(
                        best_other, tl.min(tl.where(mask & (c[None, :] != label[:, None]), cost, float("inf")), axis=1)
                    )
                if GRADIENT:
                    next_top, next_rest = (), ()
                    for m in tl.static_range(M):
                        gain = tl.where(mask & (share != 0), share * slopes[m], 0.0)
                        is_top = c[None, :] == top_classes[m][:, None]
                        next_top = next_top + (top_gain[m] + tl.sum(tl.where(is_top, gain, 0.0), axis=1),)
                        next_rest = next_rest + (
                            rest_gain[m] + tl.sum(tl.where(is_top, 0.0, gain / remaining[m]), axis=1),
                        )
                    top_gain, rest_gain = next_top, next_rest
        if TARGET != "none":
            rate = tl.where(valid, scale, 0.0)
            if HAS_MARGIN:
                # A margin must not hide a label out of range, whose weight is NaN.
                rate = tl.where(is_ahead(own, best_other, margin) & (weight == weight), 0.0, rate)
            loss = tl.where(rate != 0, loss * rate, 0.0)
            if REDUCTION == "none":
                tl.store(loss_ptr + b, loss, mask=inside)
            else:
                sums += loss
            if GRADIENT:
                for start in range(0, C, COLUMNS):
                    c = start + tl.arange(0, COLUMNS)
                    mask = inside[:, None] & (c < C)[None, :]
                    share = _target_block(
                        target_ptr, class_weight_ptr, b, c, mask, label, weight, C, TARGET, HAS_CLASS_WEIGHT
                    )
                    cost, slopes, raws, remaining = _class_block(
                        logits_ptr, b, c, mask, stride_m, stride_b, stride_c, tops, top_classes, seconds, rests,
                        present, factor, gamma, M, C, VARIANT, DETACH, HAS_AVAILABLE, DENSE,
                    )  # fmt: skip
                    for m in tl.static_range(M):
                        gain = tl.where(share != 0, share * slopes[m], 0.0)
                        x = bounded(raws[m])
                        if HAS_AVAILABLE:
                            x = tl.where(present[m][:, None], x, 0.0)
                        from_rest = exp(x - tops[m][:, None]) * (rest_gain[m][:, None] - gain / remaining[m])
                        from_top = exp(x - seconds[m][:, None]) * (top_gain[m] / rests[m])[:, None]
                        is_top = c[None, :] == top_classes[m][:, None]
                        tile = tl.where(is_top, gain - rest_gain[m][:, None], gain - from_rest - from_top)
                        tile = zero_where_clamped(tl.where(rate[:, None] != 0, tile * rate[:, None], 0.0), raws[m])
                        offsets = tl.full([], m, tl.int64) * B * C + (b[:, None] * C + c[None, :])
                        tl.store(gradient_ptr + offsets, tile.to(gradient_ptr.dtype.element_ty), mask=mask)
    if TARGET != "none" and REDUCTION != "none":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))
