"""The typed records that every layer passes on: options, weights and projections of the operations.

Dimension legend: M modalities, B samples, C classes, d_m features of modality m, P pairs of modalities, k_p canonical
components of pair p, r_m whitened directions of modality m, h hidden size, u memory size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, islice
from typing import Any, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDE = (torch.float32, torch.float64)

Variant = Literal["original", "m3er", "m3er_cross"]
Activation = Literal["softmax", "sigmoid"]
Reduction = Literal["none", "mean", "sum"]


def upcast(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x if x.dtype in _WIDE else x.to(torch.promote_types(x.dtype, torch.float32))


def modality_pairs(modalities: int) -> list[tuple[int, int]]:
    """The unordered pairs in the order of every (B, P) result: (0, 1), (0, 2), ..., (1, 2), ..."""
    return list(combinations(range(modalities), 2))


# --- Multiplicative fusion loss ---


class LossKeywords(TypedDict, total=False):
    """The fields of :class:`LossOptions` as keywords, for type checkers."""

    variant: Variant
    beta: float
    detach_weight: bool
    activation: Activation
    margin: float | None
    ignore_index: int
    reduction: Reduction


class LossOptions(NamedTuple):
    """The options of :func:`m3er_fast.functional.fusion_loss`, which documents them."""

    variant: Variant = "m3er"
    beta: float = 1.0
    detach_weight: bool = True
    activation: Activation = "softmax"
    margin: float | None = None
    ignore_index: int = -100
    reduction: Reduction = "mean"


class LossFactors(NamedTuple):
    """The optional tensors of :func:`m3er_fast.functional.fusion_loss`, which documents them."""

    class_weight: Tensor | None = None  # (C,)
    modality_weight: Tensor | None = None  # (M,)
    available: Tensor | None = None  # (B, M) bool


# --- Modality check ---


class CheckProjections(NamedTuple):
    """The fitted matrices of a modality check.

    A pair's projections give the canonical coordinates u and v, of unit variance in training, from centred vectors.
    """

    center: list[Tensor]  # M of (d_m,), subtracted first: a large common offset would otherwise cancel late
    left: list[Tensor]  # P of (k_p, d_i)
    left_bias: list[Tensor]  # P of (k_p,)
    right: list[Tensor]  # P of (k_p, d_j)
    right_bias: list[Tensor]  # P of (k_p,)
    whitener: list[Tensor]  # M of (r_m, d_m)
    weight: list[Tensor]  # P of (k_p,), factors of both coordinates before ρ is taken over the components
    canonical: list[Tensor]  # P of (k_p,), canonical correlations s, in [0, 1)
    triangular: bool = False  # whether every whitener is upper triangular, which halves the work


class CheckStatistics(NamedTuple):
    """The statistics of utterance vectors that the modality check measures; every entry is finite."""

    correlation: Tensor  # (B, P), ρ of each pair
    energy: Tensor  # (B, M), mean squared whitened coordinate
    likelihood: Tensor  # (B, P), log likelihood ratio of "these two belong together"


class SequenceStatistics(NamedTuple):
    """The moments of feature sequences that the modality check measures; every entry is finite."""

    mean: Tensor  # (B, d), over the valid frames
    variance: Tensor  # (B, d), about this mean
    change: Tensor  # (B, d), half the mean squared difference of consecutive valid frames
    repeated: Tensor  # (B,) int64, frames that equal the frame before
    pairs: Tensor  # (B,) int64, pairs of consecutive valid frames


# --- Memory scan ---


class TwoLayers(NamedTuple):
    """Two linear layers with a relu and dropout between them."""

    first: Tensor  # (inner, in)
    first_bias: Tensor  # (inner,)
    second: Tensor  # (out, inner)
    second_bias: Tensor  # (out,)

    def __call__(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """The second layer's output for ``x`` (..., in); ``dropout`` is the probability of dropping an inner unit."""
        inner = F.linear(x, self.first, self.first_bias).relu()
        if dropout:
            inner = F.dropout(inner, dropout)
        return F.linear(inner, self.second, self.second_bias)


class MemoryScanWeights(NamedTuple):
    """Weights of the recurrent core; LSTM gates in torch's order (input, forget, cell, output).

    Each two-layer part is (first weight, first bias, second weight, second bias), with a relu and dropout between.
    """

    input: list[Tensor]  # M of (4h, d_m)
    recurrent: Tensor  # (M, 4h, h)
    bias: Tensor  # (M, 4h)
    feedback: Tensor | None  # (M, 4h, 2h) or None: the plain memory fusion network
    attention: TwoLayers  # 2hM -> a -> 2hM
    candidate: TwoLayers  # 2hM -> b -> u
    retain: TwoLayers  # 2hM + u -> g -> u
    update: TwoLayers  # 2hM + u -> g -> u

    @property
    def layers(self) -> list[TwoLayers]:
        """The two-layer parts, in order."""
        return [self.attention, self.candidate, self.retain, self.update]

    def tensors(self) -> list[Tensor | None]:
        """Every tensor, in order; None in place of an absent feedback."""
        return [
            *self.input,
            self.recurrent,
            self.bias,
            self.feedback,
            *self.attention,
            *self.candidate,
            *self.retain,
            *self.update,
        ]

    @classmethod
    def of(cls, modalities: int, tensors: Iterable[Any]) -> MemoryScanWeights:
        """The weights whose :meth:`tensors` are given."""
        each = iter(tensors)
        inputs = list(islice(each, modalities))
        return cls(inputs, next(each), next(each), next(each), *(_two_layers(each) for _ in range(4)))


def _two_layers(tensors: Iterator[Any]) -> TwoLayers:
    return TwoLayers(*islice(tensors, len(TwoLayers._fields)))


def side_by_side(state: Tensor) -> Tensor:
    """A state of every modality, (M, B, h), as (B, M·h)."""
    return state.transpose(0, 1).flatten(1)
