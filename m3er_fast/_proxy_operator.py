"""Proxies as an operator, one node of a compiled graph, for banks whose work depends on values.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from m3er_fast.standardize import StandardizedBatch


class Replacing(Protocol):
    """A generator of proxies."""

    def replace_lost(self, batch: StandardizedBatch, effective: Tensor, lost: Tensor) -> list[Tensor]:
        """Return M tensors (B, T, d_m), new ones: the batch's features, with proxies where ``lost`` (B, M)."""
        ...


# An operator takes tensors and numbers, no modules: a compiled graph knows a generator by its number. What the
# generator has learned is no part of the graph, which stays right when it learns anew.
_GENERATORS: WeakValueDictionary[int, Replacing] = WeakValueDictionary()
_numbers = itertools.count()


def numbered(generator: Replacing) -> int:
    """Return the number by which :func:`replace_lost` knows the generator, as long as it lives."""
    number = next(_numbers)
    _GENERATORS[number] = generator
    return number


@torch.library.custom_op("m3er_fast::replace_lost", mutates_args=())
def replace_lost(
    features: Sequence[Tensor],
    lengths: Tensor,
    available: Tensor,
    frame_valid: Tensor,
    effective: Tensor,
    lost: Tensor,
    generator: int,
) -> list[Tensor]:
    """The numbered generator's method of this name; without gradients."""
    batch = StandardizedBatch(list(features), lengths, available, frame_valid)
    return [x.contiguous() for x in _GENERATORS[generator].replace_lost(batch, effective, lost)]


@replace_lost.register_fake
def _(features: Sequence[Tensor], *_: Tensor | int) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in features]
