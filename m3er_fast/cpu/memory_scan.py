"""The memory scan on the CPU: few large products, short loops over time, and gradients worked out by hand.

The memory u never reaches the LSTMs. The steps therefore split into two loops, and everything between the loops is one
product over all steps at once:

* the input's share of the gates, for every frame;
* loop 1 over (h, c, r): each modality's gates by one product with [h ; r], the cells, the attention;
* û, and the share of r in the first layers of both γ, for every frame;
* loop 2 over the memory alone.

The backward pass runs in reverse. Its loops leave the gradients before each activation; from these the gradients of the
weights are again products over all steps. Only valid frames are touched: samples are sorted by length, and each step
takes the leading ones that are still alive. Working on one block of samples at a time bounds the memory and stays in
cache. With few steps none of this pays; :mod:`m3er_fast.cpu.memory_scan_short` computes those.

z and r are stored modality by modality, (old, new) of the first, then of the second, so that a modality's slice is
contiguous. The matrices that meet them are reordered once per call.

Dimension legend: M modalities, B samples, T time steps, n samples of a block, n_t those alive at step t, N = Σ n_t its
frames, d_m features of modality m, h hidden size, u memory size, s = 3h with feedback and h without, a, b and g inner
sizes of attention, candidate and gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.cpu.buffers import give_back, take, workspace
from m3er_fast.cpu.products import (
    add_gradient_,
    add_gradients_,
    add_product_,
    add_products_,
    matrix_product,
    matrix_products,
)
from m3er_fast.operands import MemoryScanWeights, TwoLayers

# Samples of a block: each step's products have so many rows. Rows of a piece of a block, which the cache holds.
BLOCK_SAMPLES = 512
PIECE_ROWS = 2048
# Numbers of a tensor from which its tanh takes longer than the four calls that replace it.
MANY_NUMBERS = 4096


def memory_scan(
    features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """:func:`m3er_fast.functional.memory_scan` without gradients, for the arguments that :func:`forward` takes.

    Under the same seed it drops the units that the reference drops.
    """
    results = _Results.zeros(features, weights)
    # Autograd takes a tenth of a small step. The results are filled in inference mode, but are not tensors of it.
    with torch.inference_mode():
        _scan(features, lengths, weights, dropout, results, keep=False)
    return results.hidden.transpose(0, 1), results.memory


def forward(
    features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, dropout: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Last hidden states (M, B, h), memory (B, u), and what :func:`backward` needs of each block of samples.

    Features and weights are of one dtype, float32 or float64, with one step or more and both γ's layers of one size.
    """
    results = _Results.zeros(features, weights)
    blocks = _scan(features, lengths, weights, dropout, results, keep=True)
    return results.hidden.transpose(0, 1), results.memory, blocks


# --- Which frames there are ---


class _Frames(NamedTuple):
    """N valid frames of a block, step after step; at each the samples still alive, by falling length."""

    samples: Tensor  # (n,) those alive at the first of these steps, as numbers in the batch
    counts: list[int]  # n_t of each step
    place: Tensor  # (N,) b · T + t, where they stand among the batch's frames
    go_on: int  # how many samples have frames after these; they come first
    last: Tensor  # (n - go_on,) the last row of each of the others
    before: Tensor | None  # (N - n,) the row one step before each row after the first step; None: in order from 0
    starts: bool  # whether these begin at the samples' first frames

    def previous(self, x: Tensor, earlier: Tensor | None) -> Tensor:
        """The row one step before each: (N, ...) with those that ``earlier`` steps left, else (N - n, ...) without."""
        inside = x[: len(x) - self.counts[0]] if self.before is None else x.index_select(0, self.before)
        return inside if earlier is None else torch.cat([earlier[: self.counts[0]], inside])

    def final(self, x: Tensor) -> Tensor:
        """The rows of the last step."""
        return x[len(x) - self.counts[-1] :]


def _pieces(lengths: Tensor, steps: int) -> Iterator[_Frames]:
    """Blocks of samples of similar length, each in pieces of some steps."""
    length = lengths.clamp(0, steps).ceil().long()
    order = torch.arange(len(length))
    if len(length) and int(length.min()) < max(steps, 1):
        length, order = length.sort(descending=True, stable=True)
        alive = int((length > 0).sum())
        length, order = length[:alive], order[:alive]
    for samples, own in zip(torch.split(order, BLOCK_SAMPLES), torch.split(length, BLOCK_SAMPLES), strict=True):
        start, alive = 0, len(samples)
        while alive:
            stop = min(start + max(1, PIECE_ROWS // alive), int(own[0]))
            frames = _frames(samples[:alive], own[:alive], start, stop, steps)
            yield frames
            start, alive = stop, frames.go_on


def _frames(samples: Tensor, length: Tensor, start: int, stop: int, steps: int) -> _Frames:
    """Frames start..stop of samples that all have the first of these."""
    number = len(samples)
    go_on = int((length > stop).sum())
    time = torch.arange(start, stop)
    if int(length[-1]) >= stop:
        place = (samples * steps + time[:, None]).flatten()
        first_of_last = (stop - start - 1) * number
        last = torch.arange(first_of_last + go_on, first_of_last + number)
        return _Frames(samples, [number] * (stop - start), place, go_on, last, None, start == 0)
    alive_at = length > time[:, None]
    count = alive_at.sum(1)
    begins = count.cumsum(0) - count  # row at which each step begins
    t, b = alive_at.nonzero(as_tuple=True)
    before = begins[t[number:] - 1] + b[number:]
    last = begins[length[go_on:].clamp(max=stop) - start - 1] + torch.arange(go_on, number)
    return _Frames(samples, count.tolist(), samples[b] * steps + start + t, go_on, last, before, start == 0)


# --- Weights as the loops take them ---


class _Merged(NamedTuple):
    """Weights grouped by product; those that meet z or r are ordered as these are, modality by modality."""

    state: Tensor  # (M, s, 4h), of [h ; r]
    attention: TwoLayers  # 2hM -> a -> 2hM
    candidate: TwoLayers  # 2hM -> b -> u
    context: Tensor  # (2g, 2hM), the first layers of both γ, columns of r
    memory: Tensor  # (2g, u), columns of u
    context_bias: Tensor  # (2g,)
    gates: Tensor  # (2, g, u), their second layers
    gates_bias: Tensor  # (2, 1, u)

    @classmethod
    def of(cls, weights: MemoryScanWeights) -> _Merged:
        cells = weights.candidate.first.shape[1]
        modalities = weights.recurrent.shape[0]
        retain, update, attention = weights.retain, weights.update, weights.attention
        context = torch.cat([retain.first, update.first])
        state = weights.recurrent if weights.feedback is None else torch.cat([weights.recurrent, weights.feedback], 2)
        return cls(
            state=_doubled_cell_gate(state).mT,
            attention=TwoLayers(
                _swap(attention.first, 1, 2, modalities),
                attention.first_bias,
                _swap(attention.second, 0, 2, modalities),
                _swap(attention.second_bias, 0, 2, modalities),
            ),
            candidate=weights.candidate._replace(first=_swap(weights.candidate.first, 1, 2, modalities)),
            context=_swap(context[:, :cells], 1, 2, modalities),
            memory=context[:, cells:],
            context_bias=torch.cat([retain.first_bias, update.first_bias]),
            gates=torch.stack([retain.second.mT, update.second.mT]),
            gates_bias=torch.stack([retain.second_bias, update.second_bias])[:, None],
        )


def _doubled_cell_gate(x: Tensor) -> Tensor:
    """A copy of the gates' weights (M, 4h, ...), those of the cell gate doubled: its tanh is a sigmoid of 2x."""
    x = x.clone()
    _, _, cell_gate, _ = x.chunk(4, 1)
    cell_gate.mul_(2.0)
    return x


def _zeros_like(merged: _Merged) -> _Merged:
    def zeros(value: Any) -> Any:
        return torch.zeros_like(value) if isinstance(value, Tensor) else TwoLayers(*map(torch.zeros_like, value))

    return _Merged(*map(zeros, merged))


def _swap(x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
    """``x`` with its ``dim`` of (outer, inner, rest) entries in the order (inner, outer, rest)."""
    return torch.unflatten(x, dim, (outer, inner, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)


def _unmerged(grads: _Merged, inputs: list[Tensor], bias: Tensor) -> MemoryScanWeights:
    """The gradients in the layout of the weights."""
    modalities, size = bias.shape[0], bias.shape[1] // 4
    recurrent, feedback = grads.state.mT[:, :, :size], grads.state.mT[:, :, size:]
    attention = grads.attention
    context = torch.cat([_swap(grads.context, 1, modalities, 2), grads.memory], 1)
    retain, update = (
        TwoLayers(*parts)
        for parts in zip(
            context.chunk(2), grads.context_bias.chunk(2), grads.gates.mT, grads.gates_bias[:, 0], strict=True
        )
    )
    return MemoryScanWeights(
        inputs,
        recurrent,
        bias,
        feedback if feedback.shape[2] else None,
        TwoLayers(
            _swap(attention.first, 1, modalities, 2),
            attention.first_bias,
            _swap(attention.second, 0, modalities, 2),
            _swap(attention.second_bias, 0, modalities, 2),
        ),
        grads.candidate._replace(first=_swap(grads.candidate.first, 1, modalities, 2)),
        retain,
        update,
    )


# --- Forward ---


def _views(flat: Tensor, number: int, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views (N, *shape) of one piece of memory."""
    parts = flat.split_with_sizes([number * math.prod(shape) for shape in shapes])
    return [part.view(number, *shape) for part, shape in zip(parts, shapes, strict=True)]


class _Kept(NamedTuple):
    """What the way back needs of a block, in one piece of memory."""

    gates: Tensor  # (N, M, 4h): input, forget, cell, output, activated
    cells: Tensor  # z: (N, M, 2h), old and new
    inner: Tensor  # (N, a) of the attention, after its relu and dropout
    attention: Tensor  # (N, M, 2h), after the softmax
    state: Tensor  # (N, M, 3h): h and r
    candidate_inner: Tensor  # (N, b)
    candidate: Tensor  # û: (N, u)
    context: Tensor  # (N, 2g), inner layers of both γ
    retain_update: Tensor  # (N, 2, u): γ1 and γ2
    memory: Tensor  # (N, u)

    @classmethod
    def of(cls, flat: Tensor | None, number: int, weights: MemoryScanWeights, *, keep: bool = True) -> _Kept:
        """Of memory that ``flat`` is, or of new memory, or without ``keep`` of what the next piece overwrites."""
        modalities, _, size = weights.recurrent.shape
        memory, candidate = weights.candidate.second.shape
        attention, context = weights.attention.first.shape[0], 2 * weights.retain.first.shape[0]
        shapes = [
            (modalities, 4 * size), (modalities, 2 * size), (attention,), (modalities, 2 * size),
            (modalities, 3 * size), (candidate,), (memory,), (context,), (2, memory), (memory,),
        ]  # fmt: skip
        total = number * sum(map(math.prod, shapes))
        if flat is None:
            flat = take(total, weights.bias.dtype) if keep else workspace(total, weights.bias.dtype)
        return cls(*_views(flat, number, shapes))

    @property
    def flat(self) -> Tensor:
        """The memory itself."""
        return self.gates._base  # type: ignore[return-value]


class _Masks(NamedTuple):
    """0 or 1 / (1 - dropout) for each inner unit of a block's frames."""

    attention: Tensor  # (N, a)
    candidate: Tensor  # (N, b)
    context: Tensor  # (N, 2g)


class _Carry(NamedTuple):
    """The last step's states, of the samples alive then."""

    cells: Tensor  # (n, M, h)
    state: Tensor  # (M, n, s)
    memory: Tensor  # (n, u)


class _Results(NamedTuple):
    """What the last valid step of each sample leaves; zero for a sample without one."""

    hidden: Tensor  # (B, M, h)
    memory: Tensor  # (B, u)

    @classmethod
    def zeros(cls, features: Sequence[Tensor], weights: MemoryScanWeights) -> _Results:
        batch = len(features[0])
        modalities, _, size = weights.recurrent.shape
        new_zeros = weights.bias.new_zeros
        return cls(new_zeros((batch, modalities, size)), new_zeros((batch, weights.candidate.second.shape[0])))


def _scan(
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    dropout: float,
    results: _Results,
    *,
    keep: bool,
) -> list[Tensor]:
    """Fill ``results``; what the way back needs of each block, if it is to be kept."""
    batch, steps = features[0].shape[:2]
    size = weights.recurrent.shape[2]
    merged = _Merged.of(weights)
    drawn = _draw_masks(weights, batch, steps, dropout) if dropout else None
    blocks = []
    carry = None
    flat = [x.flatten(0, 1) for x in features]
    for frames in _pieces(lengths, steps):
        masks = None if drawn is None else _Masks(*(mask.index_select(0, frames.place) for mask in drawn))
        carry = None if frames.starts else carry
        block, carry = _forward_block(frames, flat, weights, merged, masks, carry, keep=keep)
        ended = frames.samples[frames.go_on :]
        results.hidden.index_copy_(0, ended, block.state[:, :, :size].index_select(0, frames.last))
        results.memory.index_copy_(0, ended, block.memory.index_select(0, frames.last))
        if keep:
            blocks.append(block.flat)
        elif frames.go_on:
            carry = _Carry(*(x.clone() for x in carry))  # the next piece has the same memory
    return blocks


def _draw_masks(weights: MemoryScanWeights, batch: int, steps: int, dropout: float) -> _Masks:
    """Masks of all B · T frames, drawn in the reference's order: step by step, layer by layer."""
    ones = [part.first.new_ones((batch, part.first.shape[0])) for part in weights.layers]
    each = zip(*[[F.dropout(one, dropout) for one in ones] for _ in range(steps)], strict=True)
    attention, candidate, retain, update = (torch.stack(masks, 1).flatten(0, 1) for masks in each)
    return _Masks(attention, candidate, torch.cat([retain, update], 1))


def _forward_block(
    frames: _Frames,
    features: Sequence[Tensor],
    weights: MemoryScanWeights,
    merged: _Merged,
    masks: _Masks | None,
    carry: _Carry | None,
    *,
    keep: bool,
) -> tuple[_Kept, _Carry]:
    kept = _Kept.of(None, len(frames.place), weights, keep=keep)
    size = weights.recurrent.shape[2]
    kept.gates.copy_(weights.bias)
    for m, (x, w) in enumerate(zip(_rows(features, frames), weights.input, strict=True)):
        add_product_(kept.gates[:, m], x, w.mT)
    kept.gates[:, :, 2 * size : 3 * size].mul_(2.0)
    cells, state = _forward_cells(kept, frames.counts, merged, None if masks is None else masks.attention, carry)
    attended = kept.state[:, :, size:].flatten(1)
    first, first_bias, second, second_bias = merged.candidate
    matrix_product(attended, first.mT, kept.candidate_inner, first_bias)
    _activated(kept.candidate_inner, None if masks is None else masks.candidate)
    matrix_product(kept.candidate_inner, second.mT, kept.candidate, second_bias)
    _tanh(kept.candidate, out=kept.candidate)
    matrix_product(attended, merged.context.mT, kept.context, merged.context_bias)
    memory = _forward_memory(kept, frames.counts, merged, None if masks is None else masks.context, carry)
    return kept, _Carry(cells, state, memory)


def _rows(features: Sequence[Tensor], frames: _Frames) -> Iterator[Tensor]:
    """(N, d_m) of each modality in turn, of (B · T, d_m): a block's valid frames."""
    for x in features:
        shape = len(frames.place), x.shape[1]
        yield torch.index_select(x, 0, frames.place, out=workspace(math.prod(shape), x.dtype, "rows").view(shape))


def _activated(x: Tensor, mask: Tensor | None) -> Tensor:
    """Relu and dropout, in place."""
    x.relu_()
    return x if mask is None else x.mul_(mask)


def _by_step(counts: list[int], rows: Sequence[Tensor | None], columns: Sequence[Tensor] = ()) -> list[tuple[Any, ...]]:
    """The views of each step: of tensors (N, ...) or None, then of tensors (any, N, ...).

    All at once: making them one by one would take as long as the arithmetic of a small batch.
    """
    absent = [None] * len(counts)
    split = [absent if x is None else x.split_with_sizes(counts) for x in rows]
    return list(zip(*split, *(x.split_with_sizes(counts, 1) for x in columns), strict=True))


def _forward_cells(
    kept: _Kept, counts: list[int], merged: _Merged, mask: Tensor | None, carry: _Carry | None
) -> tuple[Tensor, Tensor]:
    """Loop 1, which finds the input's share in ``kept.gates``, the cell gate's doubled. The last cells, and [h ; r]."""
    gates, cells, inner, attention, state = kept.gates, kept.cells, kept.inner, kept.attention, kept.state
    size = gates.shape[2] // 4
    first, first_bias, second, second_bias = merged.attention
    first, second = first.mT, second.mT
    old, new = cells.chunk(2, 2)
    read = state[:, :, : merged.state.shape[1]].transpose(0, 1)
    of_cells = [*gates.chunk(4, 2), gates, old, new, cells, cells.flatten(1)]
    of_attention = [inner, mask, attention, attention.flatten(1), state[:, :, :size], state[:, :, size:]]
    # Biases of all steps at once: addmm would copy them in every step, a call more each.
    inner.copy_(first_bias)
    attention.flatten(1).copy_(second_bias)
    by_step = _by_step(counts, [*of_cells, *of_attention], [gates.transpose(0, 1), read])
    cell = None if carry is None else carry.cells
    seen = None if carry is None else carry.state
    for (input_gate, forget_gate, cell_gate, output_gate, all_gates, before, cell_now, both, flat, layer, dropped,
         share, softmax, h, r, gates_of_modality, now) in by_step:  # fmt: skip
        if cell is None or seen is None:
            before.zero_()
        else:
            if len(cell) > len(before):
                cell, seen = cell[: len(before)], seen[:, : len(before)]
            before.copy_(cell)
            add_products_(gates_of_modality, seen, merged.state)
        all_gates.sigmoid_()
        # With s = sigmoid(2x), tanh(x) = 2s - 1: the sigmoid of torch is several times as fast as its tanh.
        torch.mul(forget_gate, before, out=cell_now).addcmul_(input_gate, cell_gate, value=2.0).sub_(input_gate)
        _tanh(cell_now, h).mul_(output_gate)
        _activated(add_product_(layer, flat, first), dropped)
        torch.softmax(add_product_(softmax, layer, second), 1, out=softmax)
        torch.mul(share, both, out=r)
        cell, seen = cell_now, now
    return cell_now, now


def _forward_memory(
    kept: _Kept, counts: list[int], merged: _Merged, mask: Tensor | None, carry: _Carry | None
) -> Tensor:
    """Loop 2, which finds r's share in ``kept.context``. The last memory."""
    context, gates, memory = kept.context, kept.retain_update, kept.memory
    gates.copy_(merged.gates_bias[:, 0])
    retain, update = gates.unbind(1)
    by_step = _by_step(
        counts,
        [context, mask, gates, retain, update, kept.candidate, memory],
        [torch.unflatten(context, 1, (2, -1)).transpose(0, 1), gates.transpose(0, 1)],
    )
    before: Tensor | None = None if carry is None else carry.memory
    for layer, dropped, gate, retain_gate, update_gate, proposed, now, layers, both in by_step:
        if before is not None:
            before = before[: len(now)]
            add_product_(layer, before, merged.memory.mT)
        _activated(layer, dropped)
        add_products_(both, layers, merged.gates)
        gate.sigmoid_()
        torch.mul(update_gate, proposed, out=now)
        if before is not None:
            now.addcmul_(retain_gate, before)
        before = now
    return memory[len(memory) - counts[-1] :]


def _tanh(x: Tensor, out: Tensor) -> Tensor:
    """Tanh: where it takes longer than its call, by the sigmoid, to a few 1e-8 in float32."""
    if x.numel() < MANY_NUMBERS:
        return torch.tanh(x, out=out)
    return torch.mul(x, 2.0, out=out).sigmoid_().mul_(2.0).sub_(1.0)


# --- Backward ---

release = give_back
"""Take back the blocks of :func:`forward`, which nobody will read again."""


def backward(
    hidden_grad: Tensor,
    memory_grad: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    dropout: float,
    blocks: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the features where they are ``wanted``, and of the weights in the order of their ``tensors()``."""
    steps = features[0].shape[1]
    merged = _Merged.of(weights)
    of_features = [
        x.new_zeros((x.shape[0] * steps, x.shape[2])) if w else None for x, w in zip(features, wanted, strict=True)
    ]
    of_inputs = [torch.zeros_like(w) for w in weights.input]
    of_bias = torch.zeros_like(weights.bias)
    of_merged = _zeros_like(merged)
    flat = [x.flatten(0, 1) for x in features]
    pieces = list(_pieces(lengths, steps))
    all_kept = [_Kept.of(block, len(frames.place), weights) for frames, block in zip(pieces, blocks, strict=True)]
    carry = None
    for number, (frames, kept) in reversed(list(enumerate(zip(pieces, all_kept, strict=True)))):
        earlier = None if frames.starts else _last_states(pieces[number - 1], all_kept[number - 1], merged)
        carry = _incoming(frames, hidden_grad, memory_grad, merged, carry)
        of_gates = _backward_block(carry, frames, kept, earlier, merged, of_merged, 1.0 / (1.0 - dropout))
        of_bias += of_gates.sum(0)
        for m, x in enumerate(_rows(flat, frames)):
            add_gradient_(of_inputs[m], of_gates[:, m], x)
            of_feature = of_features[m]
            if of_feature is not None:
                of_feature.index_copy_(0, frames.place, of_gates[:, m] @ weights.input[m])
    shaped = [g if g is None else g.view(x.shape) for g, x in zip(of_features, features, strict=True)]
    return [*shaped, *_unmerged(of_merged, of_inputs, of_bias).tensors()]


def _last_states(frames: _Frames, kept: _Kept, merged: _Merged) -> _Carry:
    """The states after a piece's last step."""
    _, cells = frames.final(kept.cells).chunk(2, 2)
    state = frames.final(kept.state)[:, :, : merged.state.shape[1]]
    return _Carry(cells, state.transpose(0, 1), frames.final(kept.memory))


def _incoming(
    frames: _Frames, hidden_grad: Tensor, memory_grad: Tensor, merged: _Merged, later: _Carry | None
) -> _Carry:
    """The gradients of the states after a piece's last step, of all its samples."""
    hidden = hidden_grad.index_select(1, frames.samples)
    modalities, number, size = hidden.shape
    state = hidden.new_zeros((modalities, number, merged.state.shape[1]))
    state[:, :, :size] = hidden
    carry = _Carry(hidden.new_zeros((number, modalities, size)), state, memory_grad.index_select(0, frames.samples))
    if later is not None and frames.go_on:
        carry.cells[: frames.go_on] = later.cells
        carry.state[:, : frames.go_on] = later.state
        carry.memory[: frames.go_on] = later.memory
    return carry


def _backward_block(
    carry: _Carry,
    frames: _Frames,
    kept: _Kept,
    earlier: _Carry | None,
    merged: _Merged,
    total: _Merged,
    scale: float,
) -> Tensor:
    """Gradient (N, M, 4h) before the gates' activations.

    ``carry`` has the gradients of the last states, and gets those of the ``earlier`` ones. What the merged weights get
    is added to ``total``; ``scale`` is what a unit that is not dropped is multiplied by.
    """
    size = carry.cells.shape[2]
    slopes = _Slopes.of(kept)
    attended = slopes.attended.copy_(kept.state[:, :, size:]).flatten(1)

    before = frames.previous(kept.memory, None if earlier is None else earlier.memory)
    context = _backward_memory(carry.memory, frames, kept, before, slopes, merged, scale)
    continued = slice(len(kept.memory) - len(before), None)  # the rows that have one before
    gates, candidate = slopes.memory[:, :2], slopes.memory[:, 2]
    attended_grad = matrix_product(context, merged.context, slopes.attended_grad.flatten(1))
    add_gradient_(total.context, context, attended)
    add_gradient_(total.memory, context[continued], before)
    total.context_bias.add_(context.sum(0))
    inner = torch.unflatten(kept.context, 1, (2, -1))
    add_gradients_(total.gates, inner.transpose(0, 1), gates.transpose(0, 1))
    total.gates_bias.add_(gates.sum(0)[:, None])

    _add_product(total.candidate.second, total.candidate.second_bias, candidate, kept.candidate_inner)
    inner = matrix_product(candidate, merged.candidate.second, torch.empty_like(kept.candidate_inner))
    inner.mul_(_inner_slope(kept.candidate_inner, scale))
    _add_product(total.candidate.first, total.candidate.first_bias, inner, attended)
    add_product_(attended_grad, inner, merged.candidate.first)

    logits, inner = _backward_cells(carry, frames, kept, slopes, merged, scale)
    of_gates = slopes.gates
    _add_product(total.attention.second, total.attention.second_bias, logits, kept.inner)
    _add_product(total.attention.first, total.attention.first_bias, inner, kept.cells.flatten(1))
    read = merged.state.shape[1]
    before = frames.previous(kept.state[:, :, :read], None if earlier is None else earlier.state.transpose(0, 1))
    add_gradients_(total.state, before.transpose(0, 1), of_gates[continued].transpose(0, 1))
    return of_gates


def _add_product(weight_total: Tensor, bias_total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add the gradients of a linear layer's weight and bias, for the gradient of its output and its input ``x``."""
    add_gradient_(weight_total, grad, x)
    bias_total.add_(grad.sum(0))


def _inner_slope(inner: Tensor, scale: float) -> Tensor:
    """Slope of relu and dropout together, from their output: ``scale`` where that is positive, else 0."""
    slope = inner.sign()
    return slope if scale == 1.0 else slope.mul_(scale)


class _Slopes(NamedTuple):
    """The factors of the backward pass, and then the gradients themselves, in memory that the next block reuses."""

    memory: Tensor  # (N, 3, u): from du to before the activations of γ1, γ2 and û
    context: Tensor  # (N, 2g), before the relu of the γ's inner layers
    gates: Tensor  # (N, M, 4h): from dc, and for the output gate dh, to before the gates' activations
    to_cell: Tensor  # (N, M, h): from dh to dc
    logits: Tensor  # (N, M, 2h), before the softmax
    inner: Tensor  # (N, a), before the attention's relu
    attended: Tensor  # r: (N, M, 2h)
    attended_grad: Tensor  # (N, M, 2h)

    @classmethod
    def of(cls, kept: _Kept) -> _Slopes:
        gates, cells, inner, *_, context, _, memory = kept
        shapes = [
            (3, memory.shape[1]), context.shape[1:], gates.shape[1:], (gates.shape[1], gates.shape[2] // 4),
            cells.shape[1:], inner.shape[1:], cells.shape[1:], cells.shape[1:],
        ]  # fmt: skip
        flat = workspace(len(gates) * sum(map(math.prod, shapes)), gates.dtype)
        return cls(*_views(flat, len(gates), shapes))


def _backward_memory(
    memory_grad: Tensor,
    frames: _Frames,
    kept: _Kept,
    before: Tensor,
    slopes: _Slopes,
    merged: _Merged,
    scale: float,
) -> Tensor:
    """Loop 2 backwards, on ``slopes.memory``. The gradient before the relu of the γ's inner layers (N, 2g)."""
    counts = frames.counts
    retain, update = kept.retain_update.unbind(1)
    by_retain, by_update, by_candidate = slopes.memory.unbind(1)
    first = len(retain) - len(before)
    by_retain[:first] = 0.0
    _sigmoid_slope(retain[first:], by_retain[first:]).mul_(before)
    _sigmoid_slope(update, by_update).mul_(kept.candidate)
    _tanh_slope(kept.candidate, by_candidate).mul_(update)
    inner_slope = _inner_slope(kept.context, scale)
    by_step = _by_step(counts, [slopes.memory, retain, slopes.context, inner_slope])
    for step in reversed(range(len(counts))):
        grads, retain_gate, inner, slope = by_step[step]
        now = memory_grad[: len(grads)]  # of samples that end here: the incoming gradient
        grads.mul_(now[:, None])
        layers = torch.unflatten(inner, 1, (2, -1)).transpose(0, 1)
        matrix_products(grads[:, :2].transpose(0, 1), merged.gates.mT, layers)
        inner.mul_(slope)
        if step or not frames.starts:
            add_product_(now.mul_(retain_gate), inner, merged.memory)
    return slopes.context


def _backward_cells(
    carry: _Carry, frames: _Frames, kept: _Kept, slopes: _Slopes, merged: _Merged, scale: float
) -> tuple[Tensor, Tensor]:
    """Loop 1 backwards, on ``slopes.gates``. The gradients before the softmax (N, 2hM) and its inner layer's relu."""
    size = carry.cells.shape[2]
    read = merged.state.shape[1]
    counts = frames.counts
    input_gate, forget_gate, cell_gate, output_gate = kept.gates.chunk(4, 2)
    old, new = kept.cells.chunk(2, 2)
    to_input, to_forget, to_cell_gate, to_output = slopes.gates.chunk(4, 2)
    squashed = _tanh(new, out=slopes.to_cell)
    _sigmoid_slope(output_gate, to_output).mul_(squashed)
    to_cell = _tanh_slope(squashed, slopes.to_cell).mul_(output_gate)
    _sigmoid_slope(input_gate, to_input).mul_(torch.mul(cell_gate, 2.0).sub_(1.0))
    _sigmoid_slope(forget_gate, to_forget).mul_(old)
    _sigmoid_slope(cell_gate, to_cell_gate).mul_(input_gate).mul_(2.0)
    cell_grad, state_grad = carry.cells, carry.state.transpose(0, 1)
    second, first = merged.attention.second, merged.attention.first
    inner_slope = _inner_slope(kept.inner, scale)
    of_attention = [slopes.attended_grad, slopes.attended, kept.attention.flatten(1)]
    of_layers = [slopes.logits.flatten(1), slopes.inner, inner_slope]
    by_step = _by_step(counts, [*of_attention, slopes.gates, to_cell, forget_gate, *of_layers])
    for step in reversed(range(len(counts))):
        dr, r, share, grads, through_h, forget, logits, inner, slope = by_step[step]
        alive = len(r)
        dh, dc = state_grad[:alive, :, :size], cell_grad[:alive]
        if read > size:
            dr.add_(state_grad[:alive, :, size:])
        # r = p ⊙ z with p the softmax: the gradient of its logits is q - p Σ q, q = dr ⊙ r.
        product = (dr * r).flatten(1)
        torch.addcmul(product, share, product.sum(1, keepdim=True), value=-1, out=logits)
        matrix_product(logits, second, inner).mul_(slope)
        dz = add_product_(dr.flatten(1).mul_(share), inner, first).view_as(r)
        dc.add_(dz[:, :, size:]).addcmul_(dh, through_h)
        by_gate = torch.unflatten(grads, 2, (4, size))
        by_gate[:, :, :3].mul_(dc[:, :, None])
        by_gate[:, :, 3].mul_(dh)
        torch.addcmul(dz[:, :, :size], dc, forget, out=dc)
        if step or not frames.starts:
            matrix_products(grads.transpose(0, 1), merged.state.mT, state_grad[:alive].transpose(0, 1))
    to_cell_gate.mul_(2.0)  # the loop had the gradients of 2x
    return slopes.logits.flatten(1), slopes.inner


def _sigmoid_slope(y: Tensor, out: Tensor) -> Tensor:
    """dy/dx of y = sigmoid(x)."""
    return torch.addcmul(y, y, y, value=-1, out=out)


def _tanh_slope(y: Tensor, out: Tensor) -> Tensor:
    """dy/dx of y = tanh(x)."""
    return torch.mul(y, y, out=out).neg_().add_(1.0)
