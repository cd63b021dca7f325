"""The recurrent core of the classification network (method step 3).

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, h hidden size, u memory size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from m3er_fast.operands import MemoryScanWeights

_State = tuple[Tensor, Tensor, Tensor, Tensor]
"""h and c (M, B, h), u (B, u) and r (B, 2Mh), the old cells' half first."""


def memory_scan(
    features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Last hidden states (M, B, h) and memory (B, u); :func:`m3er_fast.functional.memory_scan` documents it."""
    batch, steps = features[0].shape[:2]
    modalities, _, size = weights.recurrent.shape
    # The input's share of the gates does not depend on the state: one large product over all steps.
    from_input = torch.stack(
        [F.linear(x, w, b) for x, w, b in zip(features, weights.input, weights.bias, strict=True)]
    )  # (M, B, T, 4h)
    hidden = from_input.new_zeros((modalities, batch, size))
    memory = from_input.new_zeros((batch, weights.candidate.second.shape[0]))
    state: _State = (hidden, torch.zeros_like(hidden), memory, from_input.new_zeros((batch, 2 * modalities * size)))

    def step(state: _State, frame: tuple[Tensor, Any]) -> tuple[_State, tuple[()]]:
        from_input, t = frame
        *new, attended = _step(state, from_input, weights, dropout)
        alive = (t < lengths)[:, None]
        hidden, cell, memory = (torch.where(alive, x, old) for x, old in zip(new, state[:3], strict=True))
        return (hidden, cell, memory, attended), ()

    if torch.compiler.is_exporting():  # a loop that is written out has one number of steps
        state, _ = scan(step, state, (from_input.movedim(2, 0), torch.arange(steps, device=lengths.device)))
    else:
        for t in range(steps):
            state, _ = step(state, (from_input[:, :, t], t))
    hidden, _, memory, _ = state
    return hidden, memory


def _step(state: _State, from_input: Tensor, weights: MemoryScanWeights, dropout: float) -> _State:
    """The state after a step, whose input has the share ``from_input`` (M, B, 4h) in the gates."""
    hidden, cell, memory, attended = state
    modalities, batch, size = hidden.shape
    gates = from_input + hidden @ weights.recurrent.mT
    if weights.feedback is not None:
        # (B, old|new, M, h) -> (M, B, old|new of the modality)
        own = attended.view(batch, 2, modalities, size).permute(2, 0, 1, 3).reshape(modalities, batch, 2 * size)
        gates = gates + own @ weights.feedback.mT
    input_gate, forget_gate, cell_gate, output_gate = gates.chunk(4, dim=2)
    new_cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * cell_gate.tanh()
    hidden = output_gate.sigmoid() * new_cell.tanh()
    both = torch.cat([*cell, *new_cell], dim=1)  # z_t, (B, 2Mh)
    attended = weights.attention(both, dropout).softmax(dim=1) * both
    candidate = weights.candidate(attended, dropout).tanh()
    context = torch.cat([attended, memory], dim=1)
    retain = weights.retain(context, dropout).sigmoid()
    update = weights.update(context, dropout).sigmoid()
    return hidden, new_cell, retain * memory + update * candidate, attended


def memory_scan_gradients(
    hidden_grad: Tensor,
    memory_grad: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    dropout: float = 0.0,
) -> list[Tensor | None]:
    """Gradients of the features and of every weight, in the order of ``weights.tensors()``.

    They are differentiable themselves: the second derivative of every implementation.
    """
    tensors = [*features, *weights.tensors()]

    def scan(*present: Tensor) -> tuple[Tensor, Tensor]:
        each = iter(present)
        values: list[Any] = [None if x is None else next(each) for x in tensors]
        inputs = values[: len(features)]
        return memory_scan(
            inputs, lengths, MemoryScanWeights.of(len(features), values[len(features) :]), dropout=dropout
        )

    _, pull_back, *_ = torch.func.vjp(scan, *(x for x in tensors if x is not None))
    grads = iter(pull_back((hidden_grad, memory_grad)))
    return [None if x is None else next(grads) for x in tensors]
