"""The check's statistics on the CPU: few wide products, and all pairs of modalities in the same calls.

Dimension legend: B samples, n samples of a block, M modalities, d_m features of modality m, P pairs of modalities, k_p
components of pair p, K the largest k_p, r_m whitened directions of modality m.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.operands import CheckProjections, CheckStatistics, modality_pairs, upcast

# A block's coordinates fit the cache. docs/performance.md has the times of other sizes.
BLOCK_SAMPLES = 512
# Fewer samples are multiplied by each matrix by itself: stacking the matrices must take less than it saves.
FEWEST_STACKED_SAMPLES = 128
# The squares of lengths between these, and the product of two such lengths, are far from the ends of float32.
_SAFE_LENGTHS = (1e-15, 1e15)
# Rows of a band of a triangular whitener: narrower bands skip more zeros, but multiply more slowly.
BAND_ROWS = 100


class _Components(NamedTuple):
    """Constants of every pair's components, zeros where a pair has fewer than K."""

    number: Tensor  # (P, 1) k_p, at least 1
    exists: Tensor | None  # (P, 1, K), 1 where there is a component; None: everywhere
    weight: Tensor  # (P, 1, K)
    of_distance: Tensor  # (P, 1, K) -s² / 2(1 - s²)
    of_product: Tensor  # (P, 1, K) s / (1 + s)
    constant: Tensor  # (P, 1) Σ -½ log(1 - s²)


def check_statistics(features: Sequence[Tensor], projections: CheckProjections) -> CheckStatistics:
    """:func:`m3er_fast.functional.check_statistics` of checked arguments, none of which needs a gradient."""
    batch, dtype = features[0].shape[0], upcast(features[0][:0]).dtype
    pairs = modality_pairs(len(features))
    center = [c.to(dtype) for c in projections.center]
    stacked = batch >= FEWEST_STACKED_SAMPLES
    factors = [_Factors(projections, m, dtype, stacked=stacked) for m in range(len(features))]
    components = _components(projections, dtype) if any(len(left) for left in projections.left) else None
    correlation, likelihood = (torch.zeros((len(pairs), batch), dtype=dtype) for _ in range(2))
    energy = torch.zeros((len(features), batch), dtype=dtype)
    for start in range(0, batch, BLOCK_SAMPLES):
        rows = slice(start, start + BLOCK_SAMPLES)
        sides: list[list[Tensor]] = [[] for _ in pairs]  # u, then v
        for m, x in enumerate(features):
            coordinates, whitened = factors[m].multiply(x[rows].to(dtype) - center[m])
            for p, vectors in zip((p for p, pair in enumerate(pairs) if m in pair), coordinates, strict=True):
                sides[p].append(vectors)
            for part in whitened:
                energy[m, rows] += torch.linalg.vector_norm(part, dim=1).square_()
        if components is not None:
            correlation[:, rows], likelihood[:, rows] = _compare(sides, components)
    ranks = energy.new_tensor([max(whitener.shape[0], 1) for whitener in projections.whitener])
    largest = torch.finfo(dtype).max
    return CheckStatistics(
        correlation.clamp_(-1.0, 1.0).nan_to_num_(0.0).T.contiguous(),
        energy.div_(ranks[:, None]).nan_to_num_(largest, largest).T.contiguous(),
        likelihood.nan_to_num_(-largest, -largest, -largest).T.contiguous(),
    )


class _Factors:
    """The matrices that multiply a modality's centred vectors: those of its pairs, and its whitener.

    A whitener is by far the largest. Fitted ones are triangular, and most of their zeros are left out. With many
    samples the other matrices are stacked upon its first band: wide products are the fast ones.
    """

    def __init__(self, projections: CheckProjections, m: int, dtype: torch.dtype, *, stacked: bool) -> None:
        self._matrices: list[Tensor] = []  # (columns, d_m)
        self._biases: list[Tensor] = []
        for p, (i, j) in enumerate(modality_pairs(len(projections.center))):
            if m in (i, j):
                left = m == i
                self._matrices.append((projections.left if left else projections.right)[p].to(dtype))
                self._biases.append((projections.left_bias if left else projections.right_bias)[p].to(dtype))
        bands = _bands(projections.whitener[m].to(dtype), triangular=projections.triangular and stacked)
        self._bands = [(column, band.T) for column, band in bands]
        self._stack: tuple[Tensor, Tensor] | None = None
        if stacked:
            first = bands[0][1]
            self._bands = self._bands[1:]
            self._matrices.append(first)
            bias = torch.cat([*self._biases, first.new_zeros(first.shape[0])])
            self._stack = torch.cat(self._matrices).T, bias

    def multiply(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the canonical coordinates (n, k_p) of the modality's pairs, and the parts of its whitened vectors."""
        whitened = [x[:, column:] @ band for column, band in self._bands]
        if self._stack is None:
            pairs = zip(self._biases, self._matrices, strict=True)
            return [torch.addmm(bias, x, matrix.T) for bias, matrix in pairs], whitened
        matrix, bias = self._stack
        *coordinates, first = torch.split(
            torch.addmm(bias, x, matrix), [part.shape[0] for part in self._matrices], dim=1
        )
        return coordinates, [first, *whitened]


def _bands(whitener: Tensor, *, triangular: bool) -> list[tuple[int, Tensor]]:
    """A whitener as bands of rows without their leading zero columns: (first column, (rows, d - first)) each."""
    rows = whitener.shape[0]
    bands = rows // BAND_ROWS
    if bands < 2 or not triangular:
        return [(0, whitener)]
    edges = [rows * band // bands for band in range(bands + 1)]
    return [(first, whitener[first:last, first:]) for first, last in itertools.pairwise(edges)]


def _components(projections: CheckProjections, dtype: torch.dtype) -> _Components:
    counts = [left.shape[0] for left in projections.left]
    weight = _stack([w.to(dtype) for w in projections.weight], max(counts))[:, None]
    s = _stack([s.to(dtype) for s in projections.canonical], max(counts))[:, None]
    count = weight.new_tensor(counts)[:, None]
    rest = (1.0 - s) * (1.0 + s)  # 1 - s², with all of its digits near s = 1
    return _Components(
        number=count.clamp(min=1.0),
        exists=None if min(counts) == max(counts) else (torch.arange(max(counts)) < count[:, :, None]).to(dtype),
        weight=weight,
        of_distance=s.square().div_(rest).mul_(-0.5),
        of_product=s / (1.0 + s),
        constant=rest.log().sum(dim=2).mul_(-0.5),
    )


def _compare(sides: list[list[Tensor]], components: _Components) -> tuple[Tensor, Tensor]:
    """Return ρ and the log likelihood ratio of every pair, (P, n) each; NaN where undefined.

    The exponent (s²u² - 2suv + s²v²) / 2(1 - s²) is computed as s²(u - v)² / 2(1 - s²) - uv s/(1 + s): near s = 1 the
    three terms would cancel.
    """
    x = _stack([vectors[side] for side in (0, 1) for vectors in sides], components.weight.shape[2])
    x = x.view(2, len(sides), *x.shape[1:])
    weighted = x * components.weight
    mean = weighted.sum(dim=3).div_(components.number)[..., None]
    weighted.sub_(mean if components.exists is None else mean * components.exists)
    unit, length = _safe(x)
    unit = unit * (components.number.sqrt() / length)[..., None]
    u, v = unit.unbind()
    product = (u * v).mul_(components.of_product)
    likelihood = (u - v).square_().mul_(components.of_distance).add_(product).sum(dim=2).add_(components.constant)
    weighted, length = _safe(weighted)
    correlation = (weighted[0] * weighted[1]).sum(dim=2).div_(length[0] * length[1])
    return correlation, likelihood


def _stack(parts: list[Tensor], columns: int) -> Tensor:
    """Parts (..., k) as one tensor (parts, ..., columns), with zeros after the k of each."""
    return torch.stack([x if x.shape[-1] == columns else F.pad(x, (0, columns - x.shape[-1])) for x in parts])


def _safe(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., K), and their lengths, 1 for zeros; scaled if their squares might overflow or vanish.

    Scaling is by powers of two, which changes no digit: no vector's result depends on its neighbours.
    """
    length = torch.linalg.vector_norm(x, dim=-1)
    smallest, largest = length.aminmax()
    if smallest > _SAFE_LENGTHS[0] and largest < _SAFE_LENGTHS[1]:
        return x, length
    top = x.abs().amax(dim=-1, keepdim=True)
    power = top / (2.0 * torch.frexp(top).mantissa)
    x = x / power.where(power.isfinite(), 1.0)  # not finite: of zeros, or of what is not finite itself
    length = torch.linalg.vector_norm(x, dim=-1)
    return x, length.where(length != 0, 1.0)
