"""The memory scan of few steps on the CPU: the reference's loop without the terms that are known to vanish.

All states start at zero. In the first step everything that multiplies them therefore vanishes: the share of h and r in
the gates, the share of the old cells in the attention and, through r, in û and γ2, and γ1 altogether. That is more than
half of a scan of one step. Where every sample has every frame, no state needs freezing.

NaN and inf in features have the effect that they have in the reference. In weights they show only in the products that
remain.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, h hidden size, u memory size,
g inner size of a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.operands import MemoryScanWeights, TwoLayers, side_by_side


def memory_scan(
    features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """:func:`m3er_fast.functional.memory_scan` for one step or more, features and weights of one dtype.

    Under the same seed it drops the units that the reference drops.
    """
    steps = features[0].shape[1]
    from_input = torch.stack(
        [F.linear(x, w, b) for x, w, b in zip(features, weights.input, weights.bias, strict=True)]
    )  # (M, B, T, 4h)
    hidden, cell, attended, memory = _first_step(from_input[:, :, 0], weights, dropout)
    frozen = bool(len(lengths)) and lengths.min().item() < steps
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
    unused = [x for x in (weights.recurrent, weights.feedback, *weights.retain) if x is not None and x.requires_grad]
    if steps == 1 and torch.is_grad_enabled() and unused:
        hidden, memory = _WithZeroGradients.apply(hidden, memory, *unused)  # type: ignore[no-untyped-call]
    return hidden, memory


def _first_step(gates: Tensor, weights: MemoryScanWeights, dropout: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states after gates (M, B, 4h): h, c (M, B, h), the nonzero half of r (B, Mh), and u (B, u)."""
    input_gate, forget_gate, cell_gate, output_gate = gates.chunk(4, dim=2)
    # Zero, or NaN: with infinite features the forget gate may be NaN where the others are not.
    forgotten = forget_gate.detach().clamp(0.0, 0.0)
    cell = torch.addcmul(forgotten, input_gate.sigmoid(), cell_gate.tanh())
    hidden = output_gate.sigmoid() * cell.tanh()
    new = side_by_side(cell)
    cells = new.shape[1]
    share = _columns(weights.attention, cells)(new, dropout).softmax(dim=1)
    attended = share[:, cells:] * new
    candidate = _columns(weights.candidate, cells)(attended, dropout).tanh()
    if dropout:  # advance the generator by what the reference draws for γ1
        F.dropout(attended.new_ones((len(attended), len(weights.retain.first_bias))), dropout)
    update = _columns(weights.update, cells)(attended, dropout).sigmoid()
    return hidden, cell, attended, update * candidate


def _columns(layers: TwoLayers, cells: int) -> TwoLayers:
    """The layers with only those columns of the first that meet the new cells."""
    return TwoLayers(layers.first.narrow(1, cells, cells), *layers[1:])


def _step(
    gates: Tensor,
    hidden: Tensor,
    cell: Tensor,
    attended: Tensor,
    memory: Tensor,
    weights: MemoryScanWeights,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next h, c, r and u; ``attended`` is r (B, 2Mh), or its second half (B, Mh) if the first is zero."""
    modalities, batch, size = hidden.shape
    gates = torch.baddbmm(gates, hidden, weights.recurrent.mT)
    if weights.feedback is not None:
        # (B, old|new, M, h) -> (M, B, old|new of the modality)
        halves = attended.shape[1] // (modalities * size)
        own = attended.view(batch, halves, modalities, size).permute(2, 0, 1, 3).flatten(2)
        gates = torch.baddbmm(gates, own, weights.feedback[:, :, -halves * size :].mT)
    input_gate, forget_gate, cell_gate, output_gate = gates.chunk(4, dim=2)
    new_cell = torch.addcmul(forget_gate.sigmoid() * cell, input_gate.sigmoid(), cell_gate.tanh())
    hidden = output_gate.sigmoid() * new_cell.tanh()
    both = torch.cat([side_by_side(cell), side_by_side(new_cell)], dim=1)
    attended = weights.attention(both, dropout).softmax(dim=1) * both
    candidate = weights.candidate(attended, dropout).tanh()
    context = torch.cat([attended, memory], dim=1)
    retain = weights.retain(context, dropout).sigmoid()
    update = weights.update(context, dropout).sigmoid()
    return hidden, new_cell, attended, torch.addcmul(retain * memory, update, candidate)


class _WithZeroGradients(torch.autograd.Function):
    """Give the weights that one step does not use a gradient of zeros."""

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
