"""The arithmetic of the multiplicative fusion loss inside a kernel, for one class against all others.

Under softmax, whether the class is y is a yes/no question: with z = x_y - log Σ_{j≠y} exp(x_j),

    log p = -log(1 + exp(-z)),  log(1 - p) = -log(1 + exp(z)),  dz/dx_y = 1,  dz/dx_j = -exp(x_j) / Σ_{i≠y} exp(x_i).

Softmax and sigmoid (z = x) therefore share everything from z on. The gradient of a sample's cost needs only one slope
dc/dz per modality. The arguments of a function have one shape, which may be any; tuples hold one tensor per modality.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3er_fast.kernels._math import LARGEST, exp

# Costs of up to eight modalities, of differences of up to twice this, must still add up to a finite float32.
BOUND = tl.constexpr(LARGEST.value / 32)


@triton.jit
def _smaller(x, y):
    """Return the minimum, and NaN where x or y is NaN, which the hardware's minimum is not by default."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger(x, y):
    """Return the maximum, and NaN where x or y is NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bounded(x):
    """Return ``x`` in float32, clamped to ±BOUND; NaN stays NaN."""
    return _smaller(_larger(x.to(tl.float32), -BOUND), BOUND)


@triton.jit
def zero_where_clamped(gradient, x):
    """Return the gradient, and zero where the logit lies beyond the bound that clamps it."""
    return tl.where(tl.abs(x.to(tl.float32)) > BOUND, 0.0, gradient)


@triton.jit
def one_against_rest(lead, rest):
    """Return log p, log(1 - p), p and 1 - p, each to full relative precision as p tends to 0 or to 1.

    ``lead`` is x_y - max_{j≠y} x_j and ``rest`` is Σ_{j≠y} exp(x_j - max) ≥ 1. For a sigmoid they are x and 1.
    """
    small = exp(-tl.abs(lead))
    own = tl.where(lead >= 0, 1.0, small)
    others = tl.where(lead >= 0, small, 1.0) * rest
    # Where log p or log(1 - p) contains z, it is beyond log 2: an absolute error of the logarithm is harmless.
    z = lead - 0.6931471805599453 * tl.log2(rest)
    # log(1 + exp(-|z|)) = 2 artanh(s), to the last bits however small s is: s is at most 1/3, and the first omitted
    # term of the series is below 1e-8 of the sum.
    less = _smaller(own, others)
    s = less / (2.0 * _larger(own, others) + less)
    s2 = s * s
    series = s2 * (1.0 / 15.0) + 1.0 / 13.0
    series = series * s2 + 1.0 / 11.0
    series = series * s2 + 1.0 / 9.0
    series = series * s2 + 1.0 / 7.0
    series = series * s2 + 1.0 / 5.0
    series = series * s2 + 1.0 / 3.0
    softplus = 2.0 * s * (s2 * series + 1.0)
    share = 1.0 / (own + others)
    return _smaller(z, 0.0) - softplus, -_larger(z, 0.0) - softplus, own * share, others * share


@triton.jit
def is_ahead(own, best_other, margin):
    """Return whether the cost of the target is below the best other one by more than the margin.

    What rounding cannot tell from a tie counts as one, so that an exact tie is never ahead.
    """
    return own + margin < best_other * (1.0 - 2.0**-20)


@triton.jit
def cost_and_slopes(
    log_p,
    log_not_p,
    p,
    not_p,
    present,
    factor,
    gamma,
    M: tl.constexpr,
    VARIANT: tl.constexpr,
    DETACH: tl.constexpr,
):
    """Return the cost c = -Σ_m v_m w_m log p_m of a class, and the tuple of its slopes dc/dz_m."""
    weighted = ()  # v_m w_m
    terms = ()  # v_m w_m log p_m
    cost = tl.zeros_like(log_p[0])
    for m in tl.static_range(M):
        if VARIANT == "m3er":
            evidence = log_p[m]
        else:
            # Summed anew for each modality: the total minus its own would cancel where that dominates.
            evidence = tl.zeros_like(log_p[m])
            for j in tl.static_range(M):
                if j != m:
                    if VARIANT == "original":
                        evidence += tl.where(present[j], log_not_p[j], 0.0)
                    else:
                        evidence += tl.where(present[j], log_p[j], 0.0)
        weight = tl.where(present[m], factor[m] * exp(gamma * evidence), 0.0)
        term = weight * log_p[m]
        weighted = weighted + (weight,)
        terms = terms + (term,)
        cost -= term
    slopes = ()
    for m in tl.static_range(M):
        slope = -weighted[m] * not_p[m]
        if not DETACH:
            if VARIANT == "m3er":
                slope -= gamma * terms[m] * not_p[m]
            else:
                total = tl.zeros_like(log_p[m])  # the terms that modality m's evidence weights
                for j in tl.static_range(M):
                    if j != m:
                        total += terms[j]
                if VARIANT == "original":
                    slope += tl.where(present[m], gamma * total * p[m], 0.0)
                else:
                    slope -= tl.where(present[m], gamma * total * not_p[m], 0.0)
        slopes = slopes + (slope,)
    return cost, slopes


@triton.jit
def columns_of(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOG_COLUMNS: tl.constexpr):
    """Return the columns of a (ROWS, COLUMNS) tile as a tuple of (ROWS,), of which each thread owns whole rows."""
    parts = (tile,)
    for level in tl.static_range(LOG_COLUMNS):
        halves = ()
        for i in tl.static_range(2**level):
            left, right = tl.split(tl.trans(tl.reshape(parts[i], [ROWS, 2, COLUMNS // 2**level // 2]), 0, 2, 1))
            halves = halves + (left, right)
        parts = halves
    columns = ()
    for i in tl.static_range(COLUMNS):
        columns = columns + (tl.reshape(parts[i], [ROWS]),)
    return columns


@triton.jit
def tile_of(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOG_COLUMNS: tl.constexpr):
    """Return the (ROWS, COLUMNS) tile of a tuple of columns: the inverse of ``columns_of``."""
    parts = ()
    for i in tl.static_range(COLUMNS):
        parts = parts + (tl.reshape(columns[i], [ROWS, 1]),)
    for level in tl.static_range(LOG_COLUMNS):
        pairs = ()
        for i in tl.static_range(COLUMNS // 2 // 2**level):
            joined = tl.trans(tl.join(parts[2 * i], parts[2 * i + 1]), 0, 2, 1)
            pairs = pairs + (tl.reshape(joined, [ROWS, 2 * 2**level]),)
        parts = pairs
    return parts[0]
