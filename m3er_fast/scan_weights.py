"""The memory scan's arguments as one list of tensors and back, and its gradients by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3er_fast import reference
from m3er_fast.reference import MemoryScanWeights


def tensors_of(weights: MemoryScanWeights) -> list[Tensor | None]:
    """All tensors of the weights, in their order."""
    parts = (weights.attention, weights.candidate, weights.retain, weights.update)
    return [*weights.input, weights.recurrent, weights.bias, weights.feedback, *(x for part in parts for x in part)]


def arguments_of(tensors: Sequence[Any], lengths: Tensor) -> tuple[list[Tensor], Tensor, MemoryScanWeights]:
    """Features, lengths and weights of the features' and then the weights' tensors."""
    modalities = (len(tensors) - 19) // 2
    features, inputs = list(tensors[:modalities]), list(tensors[modalities : 2 * modalities])
    recurrent, bias, feedback, *layers = tensors[2 * modalities :]
    parts = [tuple(layers[i : i + 4]) for i in range(0, 16, 4)]
    return features, lengths, MemoryScanWeights(inputs, recurrent, bias, feedback, *parts)


def reference_gradients(
    hidden_grad: Tensor, memory_grad: Tensor, lengths: Tensor, tensors: Sequence[Tensor | None], dropout: float = 0.0
) -> list[Tensor | None]:
    """Gradients of all features and weights, differentiable in their turn."""
    given = [x for x in tensors if x is not None]

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        each = iter(values)
        features, _, weights = arguments_of([None if x is None else next(each) for x in tensors], lengths)
        return reference.memory_scan(features, lengths, weights, dropout=dropout)

    _, pull_back, *_ = torch.func.vjp(scan, *given)
    grads = iter(pull_back((hidden_grad, memory_grad)))
    return [None if x is None else next(grads) for x in tensors]
