"""The memory scan on the CPU step by step, under autograd: the reference's loop without what is known beforehand.

Before the first step all states are zero. So there what h and r add to the gates vanishes, what the cells before add to
the attention and, through r, to û and γ2, and γ1 altogether: more than half of a scan of one step. And where every
sample has every frame no state need be frozen.

What features hold, NaN and inf too, has the effect that it has in the reference; what weights hold shows only in the
products that stay.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, h hidden size, u memory size,
g inner size of a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.reference import MemoryScanWeights, side_by_side, two_layers


def memory_scan(
    features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """:func:`m3er_fast.functional.memory_scan` of at least one step, of features and weights of one type.

    Under one seed the units dropped are those that the reference drops.
    """
    steps = features[0].shape[1]
    from_input = torch.stack(
        [F.linear(x, w, b) for x, w, b in zip(features, weights.input, weights.bias, strict=True)]
    )  # (M, B, T, 4h)
    hidden, cell, attended, memory = _first_step(from_input[:, :, 0], weights, dropout)
    frozen = not bool((lengths >= steps).all())
    if frozen:
        alive = (lengths > 0)[:, None]
        hidden, cell, memory = (torch.where(alive, x, 0.0) for x in (hidden, cell, memory))
    for t in range(1, steps):
        new_hidden, new_cell, attended, new_memory = _step(
            from_input[:, :, t], hidden, cell, attended, memory, weights, dropout
        )
        if frozen:
            alive = (t < lengths)[:, None]
            new_hidden = torch.where(alive, new_hidden, hidden)
            new_cell = torch.where(alive, new_cell, cell)
            new_memory = torch.where(alive, new_memory, memory)
        hidden, cell, memory = new_hidden, new_cell, new_memory
    unseen = [x for x in (weights.recurrent, weights.feedback, *weights.retain) if x is not None and x.requires_grad]
    if steps == 1 and torch.is_grad_enabled() and unseen:
        hidden, memory = _OfZeroGradient.apply(hidden, memory, *unseen)  # type: ignore[no-untyped-call]
    return hidden, memory


def _first_step(gates: Tensor, weights: MemoryScanWeights, dropout: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of gates (M, B, 4h) the states: h, c (M, B, h), the half of r (B, Mh) that is not zero, and u (B, u)."""
    enter, keep, value, show = gates.chunk(4, dim=2)
    # Zero, or NaN: with infinite features the forget gate may be NaN where the others are not.
    forgotten = keep.detach().sigmoid().mul_(0.0)
    cell = torch.addcmul(forgotten, enter.sigmoid(), value.tanh())
    hidden = show.sigmoid() * cell.tanh()
    new = side_by_side(cell)
    cells = new.shape[1]
    share = two_layers(new, _columns(weights.attention, cells), dropout).softmax(dim=1)
    attended = share[:, cells:] * new
    candidate = two_layers(attended, _columns(weights.candidate, cells), dropout).tanh()
    if dropout:  # the generator moves on by what the reference draws for γ1
        F.dropout(attended.new_ones((len(attended), len(weights.retain[1]))), dropout)
    update = two_layers(attended, _columns(weights.update, cells), dropout).sigmoid()
    return hidden, cell, attended, update * candidate


def _columns(layers: tuple[Tensor, Tensor, Tensor, Tensor], cells: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two layers, of the first the columns that meet the new cells."""
    first, first_bias, second, second_bias = layers
    return first[:, cells : 2 * cells], first_bias, second, second_bias


def _step(
    gates: Tensor,
    hidden: Tensor,
    cell: Tensor,
    attended: Tensor,
    memory: Tensor,
    weights: MemoryScanWeights,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next h, c, r and u; r (B, 2Mh), or its second half (B, Mh) where the first one is zero."""
    modalities, batch, size = hidden.shape
    gates = torch.baddbmm(gates, hidden, weights.recurrent.mT)
    if weights.feedback is not None:
        # (B, old|new, M, h) -> (M, B, old|new of the modality)
        halves = attended.shape[1] // (modalities * size)
        own = attended.view(batch, halves, modalities, size).permute(2, 0, 1, 3).flatten(2)
        gates = torch.baddbmm(gates, own, weights.feedback[:, :, -halves * size :].mT)
    enter, keep, value, show = gates.chunk(4, dim=2)
    new_cell = torch.addcmul(keep.sigmoid() * cell, enter.sigmoid(), value.tanh())
    hidden = show.sigmoid() * new_cell.tanh()
    both = torch.cat([side_by_side(cell), side_by_side(new_cell)], dim=1)
    attended = two_layers(both, weights.attention, dropout).softmax(dim=1) * both
    candidate = two_layers(attended, weights.candidate, dropout).tanh()
    context = torch.cat([attended, memory], dim=1)
    retain = two_layers(context, weights.retain, dropout).sigmoid()
    update = two_layers(context, weights.update, dropout).sigmoid()
    return hidden, new_cell, attended, torch.addcmul(retain * memory, update, candidate)


class _OfZeroGradient(torch.autograd.Function):
    """The results, with weights they do not depend on: what one step leaves out has a gradient, of zeros."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, memory: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*weights)
        return hidden.view_as(hidden), memory.view_as(memory)

    @staticmethod
    def backward(ctx: Any, hidden_grad: Tensor, memory_grad: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # second derivatives are zeros too
            everything = torch.ones((), dtype=torch.bool)
            zeros = [x.masked_fill(everything, 0.0) for x in ctx.saved_tensors]
        else:
            zeros = [torch.zeros_like(x) for x in ctx.saved_tensors]
        return hidden_grad, memory_grad, *zeros
