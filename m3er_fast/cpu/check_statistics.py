"""The check's two statistics on the CPU: few wide products, a block of samples at a time.

Dimension legend: B samples, n samples of a block, d_m features of modality m, P pairs of modalities, k_p components of
pair p, r_m whitened directions of modality m.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.operands import CheckProjections, CheckStatistics, modality_pairs, upcast

# docs/performance.md has the times of other sizes.
BLOCK_SAMPLES = 4096
# Two lengths whose product lies between these have not left float32, and neither have the squares in them.
_SAFE_LENGTHS = (1e-15, 1e15)
# Rows of a band of a triangular whitener: narrower bands skip more zeros, but multiply more slowly.
BAND_ROWS = 100


class _Factors(NamedTuple):
    """All that a modality's centred vectors are multiplied by."""

    matrix: Tensor  # (d_m, Σ k_p + rows of the first band): of its pairs one after the other, then of its whitener
    bias: Tensor  # (Σ k_p + rows,)
    sizes: list[int]  # the k_p, then those rows
    bands: list[tuple[int, Tensor]]  # the rest of the whitener: first column, (d_m - first, rows)


def check_statistics(features: Sequence[Tensor], projections: CheckProjections) -> CheckStatistics:
    """:func:`m3er_fast.functional.check_statistics` of checked arguments, none of which needs a gradient.

    A whitener is by far the largest matrix; fitted ones are triangular, and most of their zeros are left out. The
    other matrices of a modality are stacked upon its first band: wide products are the fast ones.
    """
    batch = features[0].shape[0]
    dtype = upcast(features[0][:0]).dtype
    pairs = modality_pairs(len(features))
    correlation = torch.empty((batch, len(pairs)), dtype=dtype)
    energy = torch.empty((batch, len(features)), dtype=dtype)
    likelihood = torch.empty_like(correlation)
    canonical = [s.to(dtype) for s in projections.canonical]
    weight = [w.to(dtype) for w in projections.weight]
    factors = [_factors(projections, m, pairs, dtype) for m in range(len(features))]
    for start in range(0, batch, BLOCK_SAMPLES):
        rows = slice(start, start + BLOCK_SAMPLES)
        projected: list[list[Tensor]] = [[] for _ in pairs]  # u, then v
        for m, x in enumerate(features):
            centered = x[rows].to(dtype) - projections.center[m].to(dtype)
            matrix, bias, sizes, bands = factors[m]
            *vectors, whitened = torch.split(torch.addmm(bias, centered, matrix), sizes, dim=1)
            for p, vector in zip((p for p, pair in enumerate(pairs) if m in pair), vectors, strict=True):
                projected[p].append(vector)
            square = _length(whitened).square_()
            for first, band in bands:
                square += _length(centered[:, first:] @ band).square_()
            energy[rows, m] = square / max(projections.whitener[m].shape[0], 1)
        for p, (u, v) in enumerate(projected):
            likelihood[rows, p] = _log_likelihood_ratio(_unit(u), _unit(v), canonical[p])
            correlation[rows, p] = _cosine(_centered(u * weight[p]), _centered(v * weight[p]))
    largest = torch.finfo(dtype).max
    energy.nan_to_num_(largest, largest)
    return CheckStatistics(correlation, energy, likelihood.nan_to_num_(-largest, -largest, -largest))


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=1)
    return length


def _centered(x: Tensor) -> Tensor:
    """The rows of an (n, k_p) matrix without their means, in place."""
    return x.sub_(x.mean(dim=1, keepdim=True)) if x.shape[1] else x


def _unit(x: Tensor) -> Tensor:
    """The rows of an (n, k_p) matrix with a mean square of 1; a row of zeros stays."""
    if not x.shape[1]:
        return x
    length = _length(x)[:, None]
    smallest, largest = length.aminmax() if len(x) else (1.0, 1.0)
    if not (smallest > _SAFE_LENGTHS[0] and largest < _SAFE_LENGTHS[1]):
        top = x.abs().amax(dim=1, keepdim=True)
        x = x / top.where(top > 0, 1.0)
        length = _length(x)[:, None]
        length = length.where(length > 0, 1.0)
    return x * (math.sqrt(x.shape[1]) / length)


def _log_likelihood_ratio(u: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """(n,) log p(u, v) - log p(u) - log p(v) of canonical coordinates (n, k_p) with canonical correlations (k_p,)."""
    rest = 1.0 - s.square()
    # s²u² - 2suv + s²v² over 2(1 - s²), as two products with a vector each.
    of_squares, of_product = s.square() / (2.0 * rest), s / rest
    ratio = (u * v) @ of_product
    ratio.sub_((u.square().addcmul_(v, v)) @ of_squares)
    return ratio.sub_(0.5 * rest.log().sum())


def _cosine(u: Tensor, v: Tensor) -> Tensor:
    """Cosine of the rows of two (n, k_p) matrices; 0 where it is undefined or not finite."""
    lengths = _length(u).mul_(_length(v))
    smallest, largest = lengths.aminmax()
    if smallest > _SAFE_LENGTHS[0] and largest < _SAFE_LENGTHS[1]:
        cosine = (u * v).sum(dim=1).div_(lengths)
    else:  # one by one no length overflows or vanishes before its time
        cosine = (F.normalize(u, dim=1, eps=0.0) * F.normalize(v, dim=1, eps=0.0)).sum(dim=1)
    return cosine.clamp_(-1.0, 1.0).nan_to_num_(0.0, 0.0, 0.0)


def _factors(projections: CheckProjections, m: int, pairs: list[tuple[int, int]], dtype: torch.dtype) -> _Factors:
    matrices, biases = [], []
    for p, (i, j) in enumerate(pairs):
        if m in (i, j):
            left = m == i
            matrices.append((projections.left if left else projections.right)[p].to(dtype))
            biases.append((projections.left_bias if left else projections.right_bias)[p].to(dtype))
    (_, first), *others = _bands(projections.whitener[m].to(dtype), triangular=projections.triangular)
    matrices.append(first)
    return _Factors(
        torch.cat(matrices).T,
        torch.cat([*biases, first.new_zeros(first.shape[0])]),
        [matrix.shape[0] for matrix in matrices],
        [(column, band.T) for column, band in others],
    )


def _bands(whitener: Tensor, *, triangular: bool) -> list[tuple[int, Tensor]]:
    """A whitener as bands of rows without their leading zero columns: (first column, (rows, d - first)) each."""
    rows = whitener.shape[0]
    bands = rows // BAND_ROWS
    if bands < 2 or not triangular:
        return [(0, whitener)]
    edges = [rows * band // bands for band in range(bands + 1)]
    return [(first, whitener[first:last, first:]) for first, last in itertools.pairwise(edges)]
