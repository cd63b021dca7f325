"""The check's statistics on the CPU: few wide products, and all pairs of modalities in the same calls.

Dimension legend: B samples, n samples of a block, M modalities, d_m features of modality m, P pairs of modalities, k_p
components of pair p, K the largest k_p, r_m whitened directions of modality m.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from m3er_fast.cpu.products import new_product
from m3er_fast.operands import CheckProjections, CheckStatistics, modality_pairs, upcast

# A block's coordinates fit the cache.
BLOCK_SAMPLES = 512
# Fewer samples are multiplied by whole whiteners: leaving out zeros must take less than it saves.
FEWEST_BANDED_SAMPLES = 128
# The squares of lengths between these, and the product of two such lengths, are far from the ends of float32.
_SAFE_LENGTHS = (1e-15, 1e15)
# Rows of a band of a triangular whitener: narrower bands skip more zeros, but multiply more slowly.
BAND_ROWS = 100


class _Factors(NamedTuple):
    """What multiplies a modality's vectors: the matrices of its pairs, side by side, and its whitener.

    A whitener is by far the largest matrix. Fitted ones are triangular, and with many samples most of their zeros are
    left out; its first band then stands beside the other matrices, because wide products are the fast ones.
    """

    center: Tensor  # (d_m,)
    matrix: Tensor  # (d_m, Σ k_p), or (d_m, Σ k_p + r)
    bias: Tensor  # for each column of the matrix
    sizes: list[int]  # k_p of each pair of the modality, and r
    bands: list[tuple[int, Tensor]]  # (first column, (d_m - column, r)) of each other band of the whitener


class _Components(NamedTuple):
    """Constants of every pair's components, zeros where a pair has fewer than K."""

    number: Tensor  # (P, 1) k_p, at least 1
    root: Tensor  # (P, 1) its square root
    exists: Tensor | None  # (P, 1, K), 1 where there is a component; None: everywhere
    weight: Tensor  # (P, 1, K)
    of_distance: Tensor  # (P, 1, K) -s² / 2(1 - s²)
    of_product: Tensor  # (P, 1, K) s / (1 + s)
    constant: Tensor  # (P, 1) Σ -½ log(1 - s²)


class _Constants(NamedTuple):
    """All that follows from projections alone."""

    factors: list[_Factors]  # of each modality
    components: _Components | None  # None: no pair has any
    ranks: Tensor  # (M, 1), the rows of each whitener, at least 1


def check_statistics(features: Sequence[Tensor], projections: CheckProjections) -> CheckStatistics:
    """:func:`m3er_fast.functional.check_statistics` of checked arguments, none of which needs a gradient."""
    batch, dtype = features[0].shape[0], upcast(features[0][:0]).dtype
    constants = _constants(projections, dtype, banded=batch >= FEWEST_BANDED_SAMPLES)
    if batch <= BLOCK_SAMPLES:
        correlation, energy, likelihood = _block([upcast(x) for x in features], constants)
    else:
        blocks = zip(*(torch.split(x, BLOCK_SAMPLES) for x in features), strict=True)
        found = [_block([upcast(x) for x in block], constants) for block in blocks]
        correlation, energy, likelihood = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    largest = torch.finfo(dtype).max
    return CheckStatistics(
        correlation.clamp_(-1.0, 1.0).nan_to_num_(0.0).T.contiguous(),
        energy.div_(constants.ranks).nan_to_num_(largest, largest).T.contiguous(),
        likelihood.nan_to_num_(-largest, -largest, -largest).T.contiguous(),
    )


def _block(features: Sequence[Tensor], constants: _Constants) -> tuple[Tensor, Tensor, Tensor]:
    """ρ (P, n), squared lengths of the whitened vectors (M, n), and log likelihood ratios (P, n); NaN if undefined."""
    pairs = modality_pairs(len(features))
    sides: list[list[Tensor]] = [[] for _ in pairs]  # u, then v
    energy = []
    for m, (x, factors) in enumerate(zip(features, constants.factors, strict=True)):
        x = x - factors.center
        parts = torch.split(new_product(x, factors.matrix, factors.bias), factors.sizes, dim=1)
        own = [p for p, pair in enumerate(pairs) if m in pair]
        for p, vectors in zip(own, parts, strict=False):
            sides[p].append(vectors)
        whitened = [
            *parts[len(own) :],
            *(new_product(x[:, column:] if column else x, band) for column, band in factors.bands),
        ]
        first, *others = (torch.linalg.vector_norm(part, dim=1).square_() for part in whitened)
        energy.append(sum(others, first))
    if constants.components is None:
        correlation, likelihood = (energy[0].new_zeros((len(pairs), len(energy[0]))) for _ in range(2))
    else:
        correlation, likelihood = _compare(sides, constants.components)
    return correlation, torch.stack(energy), likelihood


class _Known(NamedTuple):
    """Constants, and the tensors that they were computed from as those were."""

    others: list[Tensor]  # all but the first center, which the entry must not keep alive
    versions: list[int]
    constants: dict[tuple[torch.dtype, bool], _Constants]


# By the first center of the projections.
_known: MutableMapping[Tensor, _Known] = WeakIdKeyDictionary()


def _constants(projections: CheckProjections, dtype: torch.dtype, *, banded: bool) -> _Constants:
    """The constants of ``projections``, computed once unless a tensor is replaced or changed in place."""
    first, *others = itertools.chain.from_iterable(projections[:-1])
    banded = banded and projections.triangular
    if first.is_inference() or any(map(torch.is_inference, others)):  # changes of these leave no trace
        return _constants_of(projections, dtype, banded=banded)
    versions = [first._version, *(tensor._version for tensor in others)]
    known = _known.get(first)
    if known is None or known.versions != versions or any(map(operator.is_not, known.others, others)):
        known = _known[first] = _Known(others, versions, {})
    if (dtype, banded) not in known.constants:
        with torch.no_grad():
            known.constants[dtype, banded] = _constants_of(projections, dtype, banded=banded)
    return known.constants[dtype, banded]


def _constants_of(projections: CheckProjections, dtype: torch.dtype, *, banded: bool) -> _Constants:
    modalities = len(projections.center)
    ranks = [[max(whitener.shape[0], 1)] for whitener in projections.whitener]
    return _Constants(
        [_factors(projections, m, dtype, banded=banded) for m in range(modalities)],
        _components(projections, dtype) if any(len(left) for left in projections.left) else None,
        torch.tensor(ranks, dtype=dtype, device="cpu"),
    )


def _factors(projections: CheckProjections, m: int, dtype: torch.dtype, *, banded: bool) -> _Factors:
    matrices, biases = [], []
    for p, pair in enumerate(modality_pairs(len(projections.center))):
        if m in pair:
            left = m == pair[0]
            matrices.append((projections.left if left else projections.right)[p].to(dtype))
            biases.append((projections.left_bias if left else projections.right_bias)[p].to(dtype))
    bands = _bands(projections.whitener[m].to(dtype), triangular=banded)
    if banded or not matrices:
        _, first = bands.pop(0)
        matrices.append(first)
        biases.append(first.new_zeros(len(first)))
    return _Factors(
        projections.center[m].detach().to(dtype),  # not the very tensor, which would keep an entry for ever
        torch.cat(matrices).T,
        torch.cat(biases),
        [len(matrix) for matrix in matrices],
        [(column, band.T) for column, band in bands],
    )


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
    number = count.clamp(min=1.0)
    rest = (1.0 - s) * (1.0 + s)  # 1 - s², with all of its digits near s = 1
    return _Components(
        number=number,
        root=number.sqrt(),
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
    u, v = (unit * (components.root / length)[..., None]).unbind()
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
    if smallest.item() > _SAFE_LENGTHS[0] and largest.item() < _SAFE_LENGTHS[1]:
        return x, length
    top = x.abs().amax(dim=-1, keepdim=True)
    power = top / (2.0 * torch.frexp(top).mantissa)
    x = x / power.where(power.isfinite(), 1.0)  # not finite: of zeros, or of what is not finite itself
    length = torch.linalg.vector_norm(x, dim=-1)
    return x, length.where(length != 0, 1.0)
