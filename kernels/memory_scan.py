"""The memory scan: two loops over time in one kernel each, and one product over all steps for everything between them.

The memory u never reaches the LSTMs, so the recurrence splits into two loops. ``cells`` runs the LSTMs, the attention
and its feedback from the first step to the last, and stores the attended cells r. From r, torch's matrix products
compute û and r's share of the inner layers of both γ, for all steps at once. ``memory`` then runs the memory alone. The
input's share of the gates is one product before both loops. The backward pass runs in reverse: two loops store the
gradients before each activation, and from these the weights' gradients are again products over all steps.

A program takes ROWS samples through all steps. A step is a few layers, one after the other. The output of a layer goes
to memory, where the backward pass needs it anyway; the next layer, behind a barrier, finds it in the cache. Registers
therefore hold one tile of one layer, whatever the sizes are. Weights are read in every step, from the cache that all
programs share. Without gradients only the states of two steps are stored, in turns.

Dot products are tf32x3: three passes of the matrix unit, which keep float32's digits. One pass is exact enough for
weights in half precision, which tf32 holds exactly. States and everything stored for the backward pass are float32.

Dimension legend: M modalities, B samples, T time steps, N = T · B frames, ordered by step; H hidden size, U memory
size, A, b and G inner sizes of attention, candidate and gates, CELLS = 2MH: the old cells of every modality, then the
new cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m3er_fast import reference
from m3er_fast.kernels._device import capability
from m3er_fast.kernels._memory_scan_cells import memory_scan_cells_bwd_kernel, memory_scan_cells_fwd_kernel
from m3er_fast.kernels._memory_scan_layers import CANDIDATE, memory_scan_dropout_kernel
from m3er_fast.kernels._memory_scan_memory import memory_scan_memory_bwd_kernel, memory_scan_memory_fwd_kernel
from m3er_fast.kernels._operators import operator, schema_of
from m3er_fast.kernels._specialization import TRITON_TYPE, Specialization
from m3er_fast.operands import MemoryScanWeights, TwoLayers

# --- Sizes and tiles ---


class Sizes(NamedTuple):
    """Sizes of the layers."""

    modalities: int
    hidden: int
    attention: int
    candidate: int
    gates: int
    memory: int

    @classmethod
    def of(cls, weights: MemoryScanWeights) -> Sizes:
        """Return the sizes of checked weights."""
        modalities, _, hidden = weights.recurrent.shape
        return cls(
            modalities,
            hidden,
            attention=weights.attention.first.shape[0],
            candidate=weights.candidate.first.shape[0],
            gates=weights.retain.first.shape[0],
            memory=weights.candidate.second.shape[0],
        )

    @property
    def states(self) -> int:
        """Number of hidden units of all modalities, MH."""
        return self.modalities * self.hidden

    @property
    def cells(self) -> int:
        """Number of old and new cells, 2MH."""
        return 2 * self.states


class Tile(NamedTuple):
    """Samples and warps of a program."""

    rows: int
    warps: int


# Matrix units multiply at least 16 rows. With few samples per program, more multiprocessors have work; with many, the
# weights are read less often. Before Hopper the parts of both tf32x3 factors wait in registers: more than 16 samples do
# not fit, and these need eight warps. None of the tiles has been timed.
AMPERE, LATENCY, THROUGHPUT = Tile(16, 8), Tile(16, 4), Tile(32, 8)
MOST_FOR_LATENCY = 2048  # samples: their programs are about as many as the largest GPUs hold at once


def tile_for(batch: int, generation: int) -> Tile:
    """Return the tile for a number of samples on a generation of GPU (80, 90, ...)."""
    if generation < 90:
        return AMPERE
    return LATENCY if batch <= MOST_FOR_LATENCY else THROUGHPUT


def _compile_options(tile: Tile) -> dict[str, Any]:
    # One stage: a load prefetched one step ahead would overtake the store that it reads.
    return {"num_warps": tile.warps, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _product_constants(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    # Larger tiles of a product need fewer conversions of layouts; but the parts of tf32x3 have to fit into registers.
    return {
        "COLUMNS": 2048 // tile.rows,
        "CHUNK": 8 * tile.warps,
        "PRECISION": _precision(dtype),
        "ROWS": tile.rows,
    }


def _cells_constants(sizes: Sizes, tile: Tile, dtype: torch.dtype, *, feedback: bool) -> dict[str, Any]:
    widths = {"M": sizes.modalities, "H": sizes.hidden, "A": sizes.attention}
    return widths | {"FEEDBACK": feedback} | _product_constants(tile, dtype)


def _memory_constants(sizes: Sizes, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    return {"CELLS": sizes.cells, "U": sizes.memory, "G": sizes.gates} | _product_constants(tile, dtype)


# --- Forward pass ---


class _Activations(NamedTuple):
    """Outputs of the layers in one float32 buffer, ordered by step unless noted.

    A slot is a step whose states are stored: every step if the activations are saved, else the last two in turns.
    """

    hidden: Tensor  # (slots · B, MH)
    cells: Tensor  # (slots · B, MH)
    inner: Tensor  # (slots · B, A), the attention's inner layer
    memory: Tensor  # (slots · B, U)
    attended: Tensor  # (N, CELLS), r
    softmax: Tensor  # (slots · B, CELLS), of the attention
    retain_update: Tensor  # (slots · B, 2U), γ1 and γ2
    gates: Tensor  # (M · N, 4H), ordered by sample
    context: Tensor  # (N, 2G), inner layers of both γ
    candidate: Tensor  # (N, U), û
    candidate_inner: Tensor  # (N, b)

    @classmethod
    def shapes(cls, batch: int, steps: int, slots: int, sizes: Sizes) -> dict[str, tuple[int, int]]:
        """Return the shape of every field."""
        frames, states = batch * steps, batch * slots
        return {
            "hidden": (states, sizes.states),
            "cells": (states, sizes.states),
            "inner": (states, sizes.attention),
            "memory": (states, sizes.memory),
            "attended": (frames, sizes.cells),
            "softmax": (states, sizes.cells),
            "retain_update": (states, 2 * sizes.memory),
            "gates": (sizes.modalities * frames, 4 * sizes.hidden),
            "context": (frames, 2 * sizes.gates),
            "candidate": (frames, sizes.memory),
            "candidate_inner": (frames, sizes.candidate),
        }

    @classmethod
    def of(cls, buffer: Tensor, shapes: Mapping[str, tuple[int, int]]) -> _Activations:
        """Return the parts of the buffer."""
        parts = buffer.split([math.prod(shape) for shape in shapes.values()])
        return cls(**{name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)})


class _MemoryGates(NamedTuple):
    """Weights of γ1 and γ2, joined in this order as the kernels read them."""

    context: Tensor  # (2G, CELLS + U)
    context_bias: Tensor  # (2G,)
    second: Tensor  # (2, U, G)
    second_bias: Tensor  # (2, U)

    @classmethod
    def of(cls, weights: MemoryScanWeights) -> _MemoryGates:
        """Return the joined weights."""
        gates = (weights.retain, weights.update)
        return cls(
            context=torch.cat([gate.first for gate in gates]),
            context_bias=torch.cat([gate.first_bias for gate in gates]),
            second=torch.stack([gate.second for gate in gates]),
            second_bias=torch.stack([gate.second_bias for gate in gates]),
        )


def _contiguous(weights: MemoryScanWeights) -> MemoryScanWeights:
    return MemoryScanWeights.of(len(weights.input), [x if x is None else x.contiguous() for x in weights.tensors()])


def _linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Write x · weightᵀ + bias, computed in the weight's precision, into a float32 matrix."""
    if weight.dtype == out.dtype:
        return torch.addmm(bias, x, weight.mT, out=out)
    return out.copy_(torch.addmm(bias, x.to(weight.dtype), weight.mT))


def _forward(
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    dropout: float,
    seed: Tensor | None,
    *,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last hidden states, the memory and the activations, which are empty without ``save``."""
    weights, sizes, dtype = _contiguous(weights), Sizes.of(weights), weights.recurrent.dtype
    batch, steps = features[0].shape[:2]
    hidden = lengths.new_zeros((sizes.modalities, batch, sizes.hidden), dtype=torch.float32)
    memory = lengths.new_zeros((batch, sizes.memory), dtype=torch.float32)
    if not batch or not steps:
        return hidden.to(dtype), memory.to(dtype), hidden.new_empty(0)
    slots = steps if save else 2
    shapes = _Activations.shapes(batch, steps, slots, sizes)
    buffer = hidden.new_empty(sum(map(math.prod, shapes.values())))
    activations = _Activations.of(buffer, shapes)
    if save:
        # The backward pass multiplies these for all frames, also for those that are not valid: they must be finite.
        torch._foreach_zero_(
            [activations.hidden, activations.cells, activations.inner, activations.memory, activations.attended]
        )
    joined = _MemoryGates.of(weights)
    tile = tile_for(batch, capability(lengths))
    grid = (triton.cdiv(batch, tile.rows),)
    flags = {"DROPOUT": dropout > 0, "SAVE": save}
    # Every argument of a kernel needs a tensor. Other tensors stand in for those that it does not read.
    seed = lengths if seed is None else seed
    gates = activations.gates.view(sizes.modalities, batch * steps, 4 * sizes.hidden)
    with torch.autocast(lengths.device.type, enabled=False), torch.cuda.device_of(lengths):
        for m, (x, weight) in enumerate(zip(features, weights.input, strict=True)):
            _linear(gates[m], x.flatten(0, 1), weight, weights.bias[m])
        memory_scan_cells_fwd_kernel[grid](
            activations.gates,
            lengths,
            weights.recurrent,
            weights.recurrent if weights.feedback is None else weights.feedback,
            *weights.attention,
            seed,
            hidden,
            activations.hidden,
            activations.cells,
            activations.inner,
            activations.softmax,
            activations.attended,
            batch,
            steps,
            slots,
            dropout,
            **_cells_constants(sizes, tile, dtype, feedback=weights.feedback is not None),
            **flags,
            **_compile_options(tile),
        )
        first, first_bias, second, second_bias = weights.candidate
        _linear(activations.candidate_inner, activations.attended, first, first_bias)
        if dropout:
            relu_dropout_(activations.candidate_inner, seed, dropout, CANDIDATE.value)
        else:
            activations.candidate_inner.relu_()
        _linear(activations.candidate, activations.candidate_inner, second, second_bias).tanh_()
        _linear(activations.context, activations.attended, joined.context[:, : sizes.cells], joined.context_bias)
        memory_scan_memory_fwd_kernel[grid](
            activations.candidate,
            activations.context,
            lengths,
            joined.context,
            joined.second,
            joined.second_bias,
            seed,
            memory,
            activations.retain_update,
            activations.memory,
            batch,
            steps,
            slots,
            dropout,
            **_memory_constants(sizes, tile, dtype),
            **flags,
            **_compile_options(tile),
        )
    return hidden.to(dtype), memory.to(dtype), buffer if save else buffer.new_empty(0)


_DROPOUT_ROWS = 16
_DROPOUT_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1}


def _dropout_constants(size: int, layer: int) -> dict[str, Any]:
    return {"LAYER": layer, "SIZE": size, "COLUMNS": min(64, triton.next_power_of_2(size)), "ROWS": _DROPOUT_ROWS}


def relu_dropout_(x: Tensor, seed: Tensor, dropout: float, layer: int) -> None:
    """Apply relu and dropout to a layer's values (N, size), in place."""
    count, size = x.shape
    memory_scan_dropout_kernel[(triton.cdiv(count, _DROPOUT_ROWS),)](
        x, seed, count, dropout, **_dropout_constants(size, layer), **_DROPOUT_OPTIONS
    )


# --- Backward pass ---


class _PreactivationGradients(NamedTuple):
    """Gradients before each activation, frame by frame; zero for frames that are not valid."""

    gates: Tensor  # (N, 4MH)
    inner: Tensor  # (N, A), the attention's inner layer
    logits: Tensor  # (N, CELLS), of the attention's softmax
    candidate_inner: Tensor  # (N, b)
    candidate: Tensor  # (N, U)
    context: Tensor  # (N, 2G), inner layers of both γ
    retain: Tensor  # (N, U), γ1
    update: Tensor  # (N, U), γ2


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of matrices, or of batches of them, in a precision."""
    return x.to(dtype) @ y.to(dtype)


def _preactivation_gradients(
    hidden_grad: Tensor,
    memory_grad: Tensor,
    activations: _Activations,
    lengths: Tensor,
    weights: MemoryScanWeights,
    steps: int,
    dropout: float,
) -> _PreactivationGradients:
    """Run both loops over time backward, the memory's and then the cells'."""
    sizes, dtype, batch = Sizes.of(weights), weights.recurrent.dtype, lengths.shape[0]
    joined = _MemoryGates.of(weights)
    tile = tile_for(batch, capability(lengths))
    grid = (triton.cdiv(batch, tile.rows),)
    scale = 1.0 / (1.0 - dropout)
    of_memory = activations.cells.new_zeros((batch * steps, 3 * sizes.memory))
    context, inner, logits = map(torch.zeros_like, (activations.context, activations.inner, activations.attended))
    gates = of_memory.new_zeros((batch * steps, 4 * sizes.states))
    # A backward pass may run again: its incoming gradients are copied before the kernels overwrite them.
    memory_state = memory_grad.to(torch.float32, copy=True).contiguous()
    hidden_state = hidden_grad.to(torch.float32, copy=True).contiguous()
    memory_scan_memory_bwd_kernel[grid](
        activations.candidate,
        activations.context,
        activations.retain_update,
        activations.memory,
        lengths,
        joined.context,
        joined.second,
        memory_state,
        of_memory,
        context,
        batch,
        steps,
        scale,
        **_memory_constants(sizes, tile, dtype),
        **_compile_options(tile),
    )
    retain, update, candidate = of_memory.split(sizes.memory, 1)
    candidate_inner = _product(candidate, weights.candidate.second, dtype).float()
    candidate_inner.mul_(scale).masked_fill_(activations.candidate_inner <= 0, 0.0)
    attended_grad = _product(context, joined.context[:, : sizes.cells], dtype).float()
    attended_grad += _product(candidate_inner, weights.candidate.first, dtype)
    memory_scan_cells_bwd_kernel[grid](
        activations.gates,
        activations.cells,
        activations.inner,
        activations.softmax,
        activations.attended,
        lengths,
        weights.recurrent,
        weights.recurrent if weights.feedback is None else weights.feedback,
        weights.attention.first,
        weights.attention.second,
        attended_grad,
        hidden_state,
        torch.zeros_like(activations.hidden[:batch]),
        torch.zeros_like(activations.attended[:batch]),
        gates,
        logits,
        inner,
        batch,
        steps,
        scale,
        **_cells_constants(sizes, tile, dtype, feedback=weights.feedback is not None),
        **_compile_options(tile),
    )
    return _PreactivationGradients(gates, inner, logits, candidate_inner, candidate, context, retain, update)


def _backward(
    hidden_grad: Tensor,
    memory_grad: Tensor,
    buffer: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    dropout: float,
    wanted: Sequence[bool],
) -> tuple[list[Tensor], MemoryScanWeights]:
    """Return the gradients of the features, empty where not wanted, and of the weights."""
    batch, steps = features[0].shape[:2]
    if not batch or not steps:
        zeros = [x if x is None else torch.zeros_like(x) for x in weights.tensors()]
        return [torch.zeros_like(x) for x in features], MemoryScanWeights.of(len(features), zeros)
    weights = _contiguous(weights)
    activations = _Activations.of(buffer, _Activations.shapes(batch, steps, steps, Sizes.of(weights)))
    with torch.autocast(buffer.device.type, enabled=False), torch.cuda.device_of(buffer):
        grads = _preactivation_gradients(hidden_grad, memory_grad, activations, lengths, weights, steps, dropout)
        return _products_over_frames(grads, activations, features, lengths, weights, wanted)


def _products_over_frames(
    grads: _PreactivationGradients,
    activations: _Activations,
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    wanted: Sequence[bool],
) -> tuple[list[Tensor], MemoryScanWeights]:
    """Return the results of :func:`_backward`: gradients times the inputs of a layer, summed over all frames."""
    sizes, dtype = Sizes.of(weights), weights.recurrent.dtype
    modalities, size = sizes.modalities, sizes.hidden
    batch, steps = features[0].shape[:2]
    before = batch * steps - batch  # frames with a next step, whose gradients their states are multiplied by

    def of_weight(grad: Tensor, x: Tensor) -> Tensor:
        return _product(grad.mT, x, dtype)

    def of_bias(grad: Tensor) -> Tensor:
        return grad.sum(0).to(dtype)

    def of_memory_gate(inner_grad: Tensor, grad: Tensor, inner: Tensor) -> TwoLayers:
        first = [
            of_weight(inner_grad, activations.attended),
            of_weight(inner_grad[batch:], activations.memory[:before]),
        ]
        return TwoLayers(torch.cat(first, 1), of_bias(inner_grad), of_weight(grad, inner), of_bias(grad))

    by_modality = grads.gates.unflatten(1, (modalities, -1)).transpose(0, 1)  # (M, N, 4H)
    later = by_modality[:, batch:]
    recurrent = of_weight(later, activations.hidden[:before].unflatten(1, (modalities, size)).transpose(0, 1))
    feedback = None
    if weights.feedback is not None:
        attended = activations.attended[:before].unflatten(1, (2, modalities, size)).permute(1, 2, 0, 3)
        feedback = torch.cat([of_weight(later, r) for r in attended], 2)
    alive = torch.arange(steps, device=lengths.device)[:, None] < lengths
    of_inputs, of_features = [], []
    for x, weight, grad, is_wanted in zip(features, weights.input, by_modality, wanted, strict=True):
        # Padding may hold anything, NaN too.
        valid = torch.where(alive[:, :, None], x.transpose(0, 1), x.new_zeros(())).reshape(batch * steps, -1)
        of_inputs.append(of_weight(grad, valid))
        of_feature = _product(grad, weight, dtype).view(steps, batch, -1).transpose(0, 1) if is_wanted else None
        of_features.append(x.new_empty(0) if of_feature is None else of_feature.contiguous())
    cells = [of_weight(grads.inner[batch:], activations.cells[:before]), of_weight(grads.inner, activations.cells)]
    retain_inner, update_inner = activations.context.split(sizes.gates, 1)
    retain_inner_grad, update_inner_grad = grads.context.split(sizes.gates, 1)
    return of_features, MemoryScanWeights(
        input=of_inputs,
        recurrent=recurrent,
        bias=of_bias(grads.gates).view(modalities, -1),
        feedback=feedback,
        attention=TwoLayers(
            torch.cat(cells, 1),
            of_bias(grads.inner),
            of_weight(grads.logits, activations.inner),
            of_bias(grads.logits),
        ),
        candidate=TwoLayers(
            of_weight(grads.candidate_inner, activations.attended),
            of_bias(grads.candidate_inner),
            of_weight(grads.candidate, activations.candidate_inner),
            of_bias(grads.candidate),
        ),
        retain=of_memory_gate(retain_inner_grad, grads.retain, retain_inner),
        update=of_memory_gate(update_inner_grad, grads.update, update_inner),
    )


# --- The operators and their gradients ---


def _weights(arguments: Sequence[Any]) -> MemoryScanWeights:
    """Return the weights from an operator's arguments, which have lists in place of :class:`TwoLayers`."""
    weights = MemoryScanWeights(*arguments)
    return MemoryScanWeights.of(len(weights.input), weights.tensors())


def _arguments(weights: MemoryScanWeights) -> list[Any]:
    """Return the weights as an operator's arguments: the inverse of :func:`_weights`."""
    return [list(value) if isinstance(value, TwoLayers) else value for value in weights]


def _present(weights: MemoryScanWeights) -> list[Tensor]:
    return [x for x in weights.tensors() if x is not None]


def _memory_scan(features: Sequence[Tensor], lengths: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *weights, dropout, seed, save = arguments
    return _forward(features, lengths, _weights(weights), dropout, seed, save=save)


def _memory_scan_fake(features: Sequence[Tensor], lengths: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *weights, _, _, save = arguments
    recurrent, sizes = _weights(weights).recurrent, Sizes.of(_weights(weights))
    batch, steps = features[0].shape[:2]
    shapes = _Activations.shapes(batch, steps, steps, sizes)
    return (
        recurrent.new_empty((sizes.modalities, batch, sizes.hidden)),
        recurrent.new_empty((batch, sizes.memory)),
        recurrent.new_empty(sum(a * b for a, b in shapes.values()) if save else 0, dtype=torch.float32),
    )


def _memory_scan_backward(
    hidden_grad: Tensor,
    memory_grad: Tensor,
    buffer: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor,
    *arguments: Any,
) -> list[Tensor]:
    *weights, dropout, wanted = arguments
    of_features, of_weights = _backward(
        hidden_grad, memory_grad, buffer, features, lengths, _weights(weights), dropout, wanted
    )
    return [*of_features, *_present(of_weights)]


def _memory_scan_backward_fake(
    _: Tensor, __: Tensor, ___: Tensor, features: Sequence[Tensor], ____: Tensor, *arguments: Any
) -> list[Tensor]:
    *weights, _, wanted = arguments
    of_features = [x.new_empty(x.shape if is_wanted else (0,)) for x, is_wanted in zip(features, wanted, strict=True)]
    return of_features + [x.new_empty(x.shape) for x in _present(_weights(weights))]


_INPUTS = f"Tensor[] features, Tensor lengths, {schema_of(MemoryScanWeights)}, float dropout"

# Autocast changes nothing; ``lengths`` are int64 in 0..T.
memory_scan_op = operator(
    "memory_scan",
    schema=f"({_INPUTS}, Tensor? seed, bool save) -> (Tensor, Tensor, Tensor)",
)(_memory_scan)
memory_scan_op.register_fake(_memory_scan_fake)
memory_scan_backward_op = operator(
    "memory_scan_backward",
    schema=f"(Tensor hidden_grad, Tensor memory_grad, Tensor activations, {_INPUTS}, bool[] wanted) -> Tensor[]",
)(_memory_scan_backward)
memory_scan_backward_op.register_fake(_memory_scan_backward_fake)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, lengths, *weights, ctx.dropout, _, _ = inputs
    _, _, activations = output
    ctx.modalities = len(features)
    ctx.wanted = [x.requires_grad for x in features]
    ctx.save_for_backward(activations, lengths, *features, *_weights(weights).tensors())
    ctx.mark_non_differentiable(activations)


def _gradients_of_inputs(ctx: Any, hidden_grad: Tensor, memory_grad: Tensor, _: Any) -> tuple[Any, ...]:
    activations, lengths, *tensors = ctx.saved_tensors
    features, weights = tensors[: ctx.modalities], MemoryScanWeights.of(ctx.modalities, tensors[ctx.modalities :])
    if torch.is_grad_enabled():  # the gradients themselves may be differentiated
        if ctx.dropout:
            raise RuntimeError(
                "the operator m3er_fast::memory_scan has no second derivative with dropout: use backend 'torch'"
            )
        grads = reference.memory_scan_gradients(hidden_grad, memory_grad, features, lengths, weights)
    else:
        found = iter(
            memory_scan_backward_op(
                hidden_grad, memory_grad, activations, features, lengths, *_arguments(weights), ctx.dropout, ctx.wanted
            )
        )
        grads = [None if x is None else next(found) for x in tensors]
    of_features = [
        grad if is_wanted else None for grad, is_wanted in zip(grads[: ctx.modalities], ctx.wanted, strict=True)
    ]
    of_weights = MemoryScanWeights.of(ctx.modalities, grads[ctx.modalities :])
    return of_features, None, *_arguments(of_weights), None, None, None


memory_scan_op.register_autograd(_gradients_of_inputs, setup_context=_save_for_backward)


def memory_scan(
    features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, *, dropout: float, trains: bool
) -> tuple[Tensor, Tensor]:
    """Return the last hidden states and the memory; only if ``trains``, activations for gradients are saved.

    :func:`m3er_fast.functional.memory_scan` documents the arguments. They are checked and of one dtype, and their sizes
    are multiples of 16. Torch's random state decides which units are dropped; the reference drops other ones.
    """
    steps = features[0].shape[1]
    lengths = lengths.long().clamp(0, steps).contiguous()
    seed = torch.randint(2**62, (1,), device=lengths.device) if dropout else None
    if not trains and not torch.compiler.is_compiling():  # the operator's dispatcher takes longer than a few steps
        return _forward(features, lengths, weights, dropout, seed, save=False)[:2]
    hidden, memory, _ = memory_scan_op(list(features), lengths, *_arguments(weights), dropout, seed, trains)
    return hidden, memory


# --- How the kernels are compiled ---

PAPER = Sizes(modalities=3, hidden=32, attention=128, candidate=64, gates=64, memory=128)


def specializations() -> Iterator[Specialization]:
    """Yield every tile at the default sizes in each precision, at larger sizes, and at the smallest."""
    hopper = (90, 100)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _of_sizes(PAPER, AMPERE, dtype, (80,))
        yield from _of_sizes(PAPER, LATENCY, dtype, hopper)
        yield from _of_sizes(PAPER, THROUGHPUT, dtype, hopper)
    large = Sizes(modalities=5, hidden=64, attention=256, candidate=256, gates=256, memory=256)
    yield from _of_sizes(large, AMPERE, torch.float32, (80,))
    yield from _of_sizes(large, THROUGHPUT, torch.float32, hopper)
    small = Sizes(modalities=2, hidden=16, attention=16, candidate=16, gates=16, memory=16)
    yield from _of_sizes(small, AMPERE, torch.float32, (80,))
    yield from _of_sizes(small, LATENCY, torch.float32, hopper)
    yield Specialization(
        "64",
        memory_scan_dropout_kernel,
        {"x_ptr": "*fp32", "seed_ptr": "*i64", "N": "i32", "dropout": "fp32"},
        _dropout_constants(64, CANDIDATE.value),
        frozenset({"x_ptr", "seed_ptr"}),
        _DROPOUT_OPTIONS,
    )


def _of_sizes(sizes: Sizes, tile: Tile, dtype: torch.dtype, targets: tuple[int, ...]) -> Iterator[Specialization]:
    weight = f"*{TRITON_TYPE[dtype]}"
    label = (
        f"M={sizes.modalities} h={sizes.hidden} a={sizes.attention} g={sizes.gates} u={sizes.memory} "
        f"{TRITON_TYPE[dtype]} rows={tile.rows}"
    )
    cells = _cells_constants(sizes, tile, dtype, feedback=True)
    memory = _memory_constants(sizes, tile, dtype)
    flags = {"DROPOUT": True, "SAVE": True}
    weights = ("recurrent_ptr", "feedback_ptr", "first_ptr", "first_bias_ptr", "second_ptr", "second_bias_ptr")
    weights += ("context_ptr", "bias_ptr")
    for kernel, constants in (
        (memory_scan_cells_fwd_kernel, cells | flags),
        (memory_scan_memory_fwd_kernel, memory | flags),
        (memory_scan_memory_bwd_kernel, memory),
        (memory_scan_cells_bwd_kernel, cells),
    ):
        types: dict[str, str] = {}
        for name in kernel.arg_names:
            if name.endswith("_ptr"):
                is_integer = name in ("length_ptr", "seed_ptr")
                types[name] = "*i64" if is_integer else weight if name in weights else "*fp32"
            elif name not in constants:
                types[name] = "fp32" if name in ("dropout", "scale") else "i32"
        pointers = frozenset(name for name in types if name.endswith("_ptr"))
        # In a tile of 16 by 16 each thread of eight warps holds one number.
        vectorized = sizes.hidden > 16 or tile.warps < 8
        options = _compile_options(tile)
        yield Specialization(label, kernel, types, constants, pointers, options, vectorized=vectorized, targets=targets)
