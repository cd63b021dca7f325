"""The memory scan: two loops over time in one kernel each, and everything between them one product over all steps.

The memory u never reaches the LSTMs, so that the recurrence falls into two parts. ``cells`` runs the LSTMs, with the
attention and its feedback, from the first step to the last, and leaves what was attended, r. From that torch's matrix
products make û and r's share of the inner layers of both γ, for all steps at once; ``memory`` then runs the memory
alone. The input's share of the gates is one product ahead of both. The way back is the reverse: two loops that leave
the gradients before each activation, from which the weights' gradients are again products over all steps.

A program takes ROWS samples through all steps, and a step is a few layers, one after the other. What a layer gives goes
to memory, where the way back wants it anyway, and where the next layer, behind a barrier, finds it in the cache: so
registers hold one tile of one layer, whatever the sizes are. Weights are read in every step, from the cache that all
programs share. Without gradients the states of two steps are kept, in turns.

Dot products are tf32x3, three passes of the matrix unit that keep float32's digits; of weights in half precision one
pass is exact enough, since tf32 holds them exactly. States and all that is kept are float32.

Dimension legend: M modalities, B samples, T time steps, N = T · B frames, step by step; H hidden size, U memory size,
A and G inner sizes of attention and gates, CELLS = 2MH: the old cells of every modality, and then the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m3er_fast.kernels._memory_scan_cells import memory_scan_cells_bwd_kernel, memory_scan_cells_fwd_kernel
from m3er_fast.kernels._memory_scan_layers import CANDIDATE, memory_scan_dropout_kernel
from m3er_fast.kernels._memory_scan_memory import memory_scan_memory_bwd_kernel, memory_scan_memory_fwd_kernel
from m3er_fast.kernels._target import TRITON_TYPE, Specialization, Work, capability
from m3er_fast.operands import arguments_of, reference_gradients, tensors_of
from m3er_fast.reference import MemoryScanWeights

# --- How they are launched ---


class Sizes(NamedTuple):
    """What the kernels are compiled for."""

    modalities: int
    hidden: int
    attention: int
    gates: int
    memory: int

    @classmethod
    def of(cls, weights: MemoryScanWeights) -> Sizes:
        """Of checked weights."""
        modalities, _, hidden = weights.recurrent.shape
        return cls(
            modalities, hidden, weights.attention[0].shape[0], weights.retain[0].shape[0], weights.candidate[2].shape[0]
        )

    @property
    def states(self) -> int:
        """MH."""
        return self.modalities * self.hidden

    @property
    def cells(self) -> int:
        """2MH."""
        return 2 * self.states


class Tile(NamedTuple):
    """Samples and warps of a program."""

    rows: int
    warps: int


# Matrix units multiply sixteen rows at least: few samples a program leave more multiprocessors work, many read the
# weights less often. Before Hopper the pieces of both factors wait in registers: more samples do not fit, and eight
# warps are needed for sixteen. None of these has been timed.
AMPERE, LATENCY, THROUGHPUT = Tile(16, 8), Tile(16, 4), Tile(32, 8)
_MOST_FOR_LATENCY = 2048  # samples: about as many programs as the largest GPUs hold at once


def tile_for(batch: int, generation: int) -> Tile:
    """The table of tiles, by generation of GPU (80, 90, ...) and number of samples."""
    if generation < 90:
        return AMPERE
    return LATENCY if batch <= _MOST_FOR_LATENCY else THROUGHPUT


def _piece(size: int, most: int) -> int:
    """The largest power of two that a size is a multiple of, up to ``most``."""
    return min(size & -size, most)


def _compile_options(tile: Tile) -> dict[str, Any]:
    # One stage: a load moved ahead by a step would overtake the store that it reads.
    return {"num_warps": tile.warps, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _cells_constants(sizes: Sizes, tile: Tile, dtype: torch.dtype, *, feedback: bool) -> dict[str, Any]:
    return {
        "M": sizes.modalities,
        "H": sizes.hidden,
        "A": sizes.attention,
        "H_PIECE": _piece(sizes.hidden, 32),
        "A_PIECE": _piece(sizes.attention, 64),
        "FEEDBACK": feedback,
        "PRECISION": _precision(dtype),
        "ROWS": tile.rows,
    }


def _memory_constants(sizes: Sizes, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "CELLS": sizes.cells,
        "U": sizes.memory,
        "G": sizes.gates,
        "U_PIECE": _piece(sizes.memory, 64),
        "G_PIECE": _piece(sizes.gates, 64),
        "PRECISION": _precision(dtype),
        "ROWS": tile.rows,
    }


# --- What is kept, and the products over all steps ---


class _Kept(NamedTuple):
    """Results of the layers, float32, in one piece of memory; all but the gates step by step."""

    hidden: Tensor  # (slots · B, MH)
    cells: Tensor  # (slots · B, MH)
    inner: Tensor  # (slots · B, A), of the attention
    memory: Tensor  # (slots · B, U)
    attended: Tensor  # (N, CELLS), r
    share: Tensor  # (slots · B, CELLS), the softmax
    retain_update: Tensor  # (slots · B, 2U), γ1 and γ2
    gates: Tensor  # (M · N, 4H), sample by sample
    context: Tensor  # (N, 2G), inner layers of both γ
    candidate: Tensor  # (N, U), û
    candidate_inner: Tensor  # (N, b)

    @classmethod
    def shapes(cls, frames: int, states: int, sizes: Sizes, candidate: int) -> list[tuple[int, int]]:
        """Of all steps' frames, and of those of the steps whose states are kept."""
        modalities, hidden, attention, gates, memory = sizes
        return [
            (states, sizes.states), (states, sizes.states), (states, attention), (states, memory),
            (frames, sizes.cells), (states, sizes.cells), (states, 2 * memory),
            (modalities * frames, 4 * hidden), (frames, 2 * gates), (frames, memory), (frames, candidate),
        ]  # fmt: skip

    @classmethod
    def of(cls, piece: Tensor, shapes: Sequence[tuple[int, int]]) -> _Kept:
        parts = piece.split([math.prod(shape) for shape in shapes])
        return cls(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


class _Merged(NamedTuple):
    """The gates' weights, of γ1 and then γ2, as the kernels take them."""

    context: Tensor  # (2G, CELLS + U)
    context_bias: Tensor  # (2G,)
    second: Tensor  # (2, U, G)
    second_bias: Tensor  # (2, U)

    @classmethod
    def of(cls, weights: MemoryScanWeights) -> _Merged:
        first, first_bias, second, second_bias = zip(weights.retain, weights.update, strict=True)
        return cls(torch.cat(first), torch.cat(first_bias), torch.stack(second), torch.stack(second_bias))


def _contiguous(weights: MemoryScanWeights) -> MemoryScanWeights:
    def one(value: Any) -> Any:
        return (
            value.contiguous() if isinstance(value, Tensor) else None if value is None else type(value)(map(one, value))
        )

    return MemoryScanWeights(*map(one, weights))


def _linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Put x · weightᵀ + bias into a float32 matrix, in the weight's precision."""
    if weight.dtype == out.dtype:
        return torch.addmm(bias, x, weight.mT, out=out)
    return out.copy_(torch.addmm(bias, x.to(weight.dtype), weight.mT))


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Product of matrices, or of a batch of them, in a precision."""
    return x.to(dtype) @ y.to(dtype)


def _scan(
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    dropout: float,
    seed: Tensor | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Last hidden states, memory, and what the way back needs (empty if not wanted)."""
    weights, sizes, dtype = _contiguous(weights), Sizes.of(weights), weights.recurrent.dtype
    batch, steps = features[0].shape[:2]
    hidden = lengths.new_zeros((sizes.modalities, batch, sizes.hidden), dtype=torch.float32)
    memory = lengths.new_zeros((batch, sizes.memory), dtype=torch.float32)
    if not batch or not steps:
        return hidden.to(dtype), memory.to(dtype), hidden.new_empty(0)
    slots = steps if keep else 2
    shapes = _Kept.shapes(batch * steps, batch * slots, sizes, weights.candidate[0].shape[0])
    piece = hidden.new_empty(sum(map(math.prod, shapes)))
    kept = _Kept.of(piece, shapes)
    if keep:  # products over all frames also meet those that are not valid: these must be finite
        piece[: sum(map(math.prod, shapes[:5]))] = 0.0
    merged = _Merged.of(weights)
    tile = tile_for(batch, capability(lengths))
    grid = (triton.cdiv(batch, tile.rows),)
    drawn = {"DROPOUT": dropout > 0, "KEEP": keep}
    # What a kernel does not read it is given all the same: any tensor will do.
    seed = lengths if seed is None else seed
    gates = kept.gates.view(sizes.modalities, batch * steps, 4 * sizes.hidden)
    with torch.autocast(lengths.device.type, enabled=False), torch.cuda.device_of(lengths):
        for m, (x, weight) in enumerate(zip(features, weights.input, strict=True)):
            _linear(gates[m], x.flatten(0, 1), weight, weights.bias[m])
        memory_scan_cells_fwd_kernel[grid](
            kept.gates,
            lengths,
            weights.recurrent,
            weights.recurrent if weights.feedback is None else weights.feedback,
            *weights.attention,
            seed,
            hidden,
            kept.hidden,
            kept.cells,
            kept.inner,
            kept.share,
            kept.attended,
            batch,
            steps,
            slots,
            dropout,
            **_cells_constants(sizes, tile, dtype, feedback=weights.feedback is not None),
            **drawn,
            **_compile_options(tile),
        )
        first, first_bias, second, second_bias = weights.candidate
        _linear(kept.candidate_inner, kept.attended, first, first_bias)
        if dropout:
            count, size = kept.candidate_inner.shape
            memory_scan_dropout_kernel[(triton.cdiv(count, _DROPOUT_ROWS),)](
                kept.candidate_inner,
                seed,
                count,
                dropout,
                **_dropout_constants(size, CANDIDATE.value),
                **_DROPOUT_OPTIONS,
            )
        else:
            kept.candidate_inner.relu_()
        _linear(kept.candidate, kept.candidate_inner, second, second_bias).tanh_()
        _linear(kept.context, kept.attended, merged.context[:, : sizes.cells], merged.context_bias)
        memory_scan_memory_fwd_kernel[grid](
            kept.candidate,
            kept.context,
            lengths,
            merged.context,
            merged.second,
            merged.second_bias,
            seed,
            memory,
            kept.retain_update,
            kept.memory,
            batch,
            steps,
            slots,
            dropout,
            **_memory_constants(sizes, tile, dtype),
            **drawn,
            **_compile_options(tile),
        )
    return hidden.to(dtype), memory.to(dtype), piece if keep else piece.new_empty(0)


_DROPOUT_ROWS = 16
_DROPOUT_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1}


def _dropout_constants(size: int, layer: int) -> dict[str, Any]:
    return {"LAYER": layer, "SIZE": size, "COLUMNS": min(64, triton.next_power_of_2(size)), "ROWS": _DROPOUT_ROWS}


class _Slopes(NamedTuple):
    """Gradients before each activation, frame by frame; zero where a frame is not valid."""

    gates: Tensor  # (N, 4MH)
    inner: Tensor  # (N, A), of the attention
    logits: Tensor  # (N, CELLS), of its softmax
    candidate_inner: Tensor  # (N, b)
    candidate: Tensor  # (N, U)
    context: Tensor  # (N, 2G), of the inner layers of both γ
    retain: Tensor  # (N, U), of γ1
    update: Tensor  # (N, U), of γ2


def _slopes(
    hidden_grad: Tensor,
    memory_grad: Tensor,
    kept: _Kept,
    lengths: Tensor,
    weights: MemoryScanWeights,
    steps: int,
    dropout: float,
) -> _Slopes:
    """Both loops over time backwards, the memory's and then the cells'."""
    sizes, dtype, batch = Sizes.of(weights), weights.recurrent.dtype, lengths.shape[0]
    merged = _Merged.of(weights)
    tile = tile_for(batch, capability(lengths))
    grid = (triton.cdiv(batch, tile.rows),)
    scale = 1.0 / (1.0 - dropout)
    slope = kept.cells.new_zeros((batch * steps, 3 * sizes.memory))
    context, inner, logits = map(torch.zeros_like, (kept.context, kept.inner, kept.attended))
    gates = slope.new_zeros((batch * steps, 4 * sizes.states))
    # A backward pass may run again: what came in stays as it is.
    memory_state = memory_grad.to(torch.float32, copy=True).contiguous()
    hidden_state = hidden_grad.to(torch.float32, copy=True).contiguous()
    memory_scan_memory_bwd_kernel[grid](
        kept.candidate,
        kept.context,
        kept.retain_update,
        kept.memory,
        lengths,
        merged.context,
        merged.second,
        memory_state,
        slope,
        context,
        batch,
        steps,
        scale,
        **_memory_constants(sizes, tile, dtype),
        **_compile_options(tile),
    )
    retain, update, candidate = slope.split(sizes.memory, 1)
    candidate_inner = _product(candidate, weights.candidate[2], dtype).float()
    candidate_inner.mul_(scale).masked_fill_(kept.candidate_inner <= 0, 0.0)
    attended_grad = _product(context, merged.context[:, : sizes.cells], dtype).float()
    attended_grad += _product(candidate_inner, weights.candidate[0], dtype)
    memory_scan_cells_bwd_kernel[grid](
        kept.gates,
        kept.cells,
        kept.inner,
        kept.share,
        kept.attended,
        lengths,
        weights.recurrent,
        weights.recurrent if weights.feedback is None else weights.feedback,
        weights.attention[0],
        weights.attention[2],
        attended_grad,
        hidden_state,
        torch.zeros_like(kept.hidden[:batch]),
        torch.zeros_like(kept.attended[:batch]),
        gates,
        logits,
        inner,
        batch,
        steps,
        scale,
        **_cells_constants(sizes, tile, dtype, feedback=weights.feedback is not None),
        **_compile_options(tile),
    )
    return _Slopes(gates, inner, logits, candidate_inner, candidate, context, retain, update)


def _gradients(
    hidden_grad: Tensor,
    memory_grad: Tensor,
    piece: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    dropout: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of features (empty where not wanted) and weights, in the order of :func:`scan_weights.tensors_of`."""
    given = [*features, *(x for x in tensors_of(weights) if x is not None)]
    batch, steps = features[0].shape[:2]
    if not batch or not steps:
        return [torch.zeros_like(x) for x in given]
    weights, sizes, frames = _contiguous(weights), Sizes.of(weights), batch * steps
    kept = _Kept.of(piece, _Kept.shapes(frames, frames, sizes, weights.candidate[0].shape[0]))
    with torch.autocast(piece.device.type, enabled=False), torch.cuda.device_of(piece):
        slopes = _slopes(hidden_grad, memory_grad, kept, lengths, weights, steps, dropout)
        return _products_over_frames(slopes, kept, features, lengths, weights, wanted)


def _products_over_frames(
    slopes: _Slopes,
    kept: _Kept,
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients as :func:`_gradients` gives them: slopes times what a layer was given, summed over all frames."""
    sizes, dtype = Sizes.of(weights), weights.recurrent.dtype
    modalities, size = sizes.modalities, sizes.hidden
    batch, steps = features[0].shape[:2]
    before = batch * steps - batch  # frames that have a next step; their states meet the slopes of that

    def of_weight(slope: Tensor, x: Tensor) -> Tensor:
        return _product(slope.mT, x, dtype)

    def of_bias(slope: Tensor) -> Tensor:
        return slope.sum(0).to(dtype)

    by_modality = slopes.gates.unflatten(1, (modalities, -1)).transpose(0, 1)  # (M, N, 4H)
    later = by_modality[:, batch:]
    recurrent = of_weight(later, kept.hidden[:before].unflatten(1, (modalities, size)).transpose(0, 1))
    feedback = []
    if weights.feedback is not None:
        attended = kept.attended[:before].unflatten(1, (2, modalities, size)).permute(1, 2, 0, 3)
        feedback = [torch.cat([of_weight(later, r) for r in attended], 2)]
    alive = torch.arange(steps, device=lengths.device)[:, None] < lengths
    of_inputs, of_features = [], []
    for x, weight, slope, is_wanted in zip(features, weights.input, by_modality, wanted, strict=True):
        # Padding may hold anything.
        valid = torch.where(alive[:, :, None], x.transpose(0, 1), x.new_zeros(())).reshape(batch * steps, -1)
        of_inputs.append(of_weight(slope, valid))
        of_feature = _product(slope, weight, dtype).view(steps, batch, -1).transpose(0, 1) if is_wanted else None
        of_features.append(x.new_empty(0) if of_feature is None else of_feature.contiguous())
    cells = [of_weight(slopes.inner[batch:], kept.cells[:before]), of_weight(slopes.inner, kept.cells)]
    of_gates = []
    for inner_slope, slope, inner in zip(
        slopes.context.split(sizes.gates, 1),
        (slopes.retain, slopes.update),
        kept.context.split(sizes.gates, 1),
        strict=True,
    ):
        first = [of_weight(inner_slope, kept.attended), of_weight(inner_slope[batch:], kept.memory[:before])]
        of_gates += [torch.cat(first, 1), of_bias(inner_slope), of_weight(slope, inner), of_bias(slope)]
    return [
        *of_features,
        *of_inputs,
        recurrent,
        of_bias(slopes.gates).view(modalities, -1),
        *feedback,
        torch.cat(cells, 1),
        of_bias(slopes.inner),
        of_weight(slopes.logits, kept.inner),
        of_bias(slopes.logits),
        of_weight(slopes.candidate_inner, kept.attended),
        of_bias(slopes.candidate_inner),
        of_weight(slopes.candidate, kept.candidate_inner),
        of_bias(slopes.candidate),
        *of_gates,
    ]


# --- The ops and their gradients ---


@torch.library.custom_op("m3er_fast::memory_scan", mutates_args=())
def memory_scan_op(
    features: Sequence[Tensor],
    lengths: Tensor,
    inputs: Sequence[Tensor],
    recurrent: Tensor,
    bias: Tensor,
    feedback: Tensor | None,
    layers: Sequence[Tensor],
    dropout: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Last hidden states, memory, and what the way back needs. Autocast changes nothing.

    ``layers`` are the four tensors of each two-layer part, one after the other; ``lengths`` int64 in 0..T.
    """
    _, _, weights = arguments_of([*features, *inputs, recurrent, bias, feedback, *layers], lengths)
    return _scan(features, lengths, weights, dropout, seed, keep=keep)


@memory_scan_op.register_fake
def _memory_scan_fake(
    features: Sequence[Tensor],
    lengths: Tensor,
    inputs: Sequence[Tensor],
    recurrent: Tensor,
    bias: Tensor,
    feedback: Tensor | None,
    layers: Sequence[Tensor],
    dropout: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, weights = arguments_of([*features, *inputs, recurrent, bias, feedback, *layers], lengths)
    sizes = Sizes.of(weights)
    batch, steps = features[0].shape[:2]
    shapes = _Kept.shapes(batch * steps, batch * steps, sizes, weights.candidate[0].shape[0])
    return (
        recurrent.new_empty((sizes.modalities, batch, sizes.hidden)),
        recurrent.new_empty((batch, sizes.memory)),
        recurrent.new_empty(sum(rows * columns for rows, columns in shapes) if keep else 0, dtype=torch.float32),
    )


@torch.library.custom_op("m3er_fast::memory_scan_backward", mutates_args=())
def memory_scan_backward_op(
    hidden_grad: Tensor,
    memory_grad: Tensor,
    kept: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor,
    inputs: Sequence[Tensor],
    recurrent: Tensor,
    bias: Tensor,
    feedback: Tensor | None,
    layers: Sequence[Tensor],
    dropout: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the features, (0,) where not wanted, and of all weights that there are."""
    _, _, weights = arguments_of([*features, *inputs, recurrent, bias, feedback, *layers], lengths)
    return _gradients(hidden_grad, memory_grad, kept, features, lengths, weights, dropout, wanted)


@memory_scan_backward_op.register_fake
def _memory_scan_backward_fake(
    hidden_grad: Tensor,
    memory_grad: Tensor,
    kept: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor,
    inputs: Sequence[Tensor],
    recurrent: Tensor,
    bias: Tensor,
    feedback: Tensor | None,
    layers: Sequence[Tensor],
    dropout: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    of_features = [x.new_empty(x.shape if is_wanted else (0,)) for x, is_wanted in zip(features, wanted, strict=True)]
    weights = [*inputs, recurrent, bias, *([] if feedback is None else [feedback]), *layers]
    return of_features + [x.new_empty(x.shape) for x in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, lengths, weights, recurrent, bias, feedback, layers, ctx.dropout, _, _ = inputs
    ctx.modalities = len(features)
    ctx.wanted = [x.requires_grad for x in features]
    ctx.save_for_backward(output[2], lengths, *features, *weights, recurrent, bias, feedback, *layers)
    ctx.mark_non_differentiable(output[2])


def _memory_scan_backward(ctx: Any, hidden_grad: Tensor, memory_grad: Tensor, _: Any) -> tuple[Any, ...]:
    kept, lengths, *tensors = ctx.saved_tensors
    modalities = ctx.modalities
    if torch.is_grad_enabled():  # the gradients may be differentiated in their turn
        if ctx.dropout:
            raise RuntimeError(
                "the operator m3er_fast::memory_scan has no second derivative with dropout: use backend 'torch'"
            )
        found = reference_gradients(hidden_grad, memory_grad, lengths, tensors)
    else:
        features, inputs = tensors[:modalities], tensors[modalities : 2 * modalities]
        recurrent, bias, feedback, *layers = tensors[2 * modalities :]
        each = iter(
            memory_scan_backward_op(
                hidden_grad,
                memory_grad,
                kept,
                features,
                lengths,
                inputs,
                recurrent,
                bias,
                feedback,
                layers,
                ctx.dropout,
                ctx.wanted,
            )
        )
        found = [None if x is None else next(each) for x in tensors]
    of_features = [x if is_wanted else None for x, is_wanted in zip(found, ctx.wanted, strict=False)]
    of_inputs, (recurrent, bias, feedback, *layers) = found[modalities : 2 * modalities], found[2 * modalities :]
    return of_features, None, of_inputs, recurrent, bias, feedback, layers, None, None, None


memory_scan_op.register_autograd(_memory_scan_backward, setup_context=_save)


def memory_scan(
    features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """:func:`m3er_fast.functional.memory_scan` of checked arguments of one type, sizes multiples of 16.

    What dropout drops depends on torch's random state, as the reference's does, but the units are others.
    """
    steps = features[0].shape[1]
    lengths = (lengths.ceil() if lengths.is_floating_point() else lengths).long().clamp(0, steps).contiguous()
    seed = torch.randint(2**62, (1,), device=lengths.device) if dropout else None
    tensors = [*features, *tensors_of(weights)]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not keep and not torch.compiler.is_compiling():  # without the dispatcher, which takes longer than a few steps
        return _scan(features, lengths, weights, dropout, seed, keep=False)[:2]
    layers = [x for part in (weights.attention, weights.candidate, weights.retain, weights.update) for x in part]
    hidden, memory, _ = memory_scan_op(
        list(features), lengths, list(weights.input), weights.recurrent, weights.bias, weights.feedback, layers,
        dropout, seed, keep,
    )  # fmt: skip
    return hidden, memory


# --- What the op must do and how its kernels are compiled ---


def work(
    batch: int,
    steps: int,
    dims: Sequence[int],
    sizes: Sizes,
    candidate: int,
    dtype: torch.dtype,
    *,
    feedback: bool = True,
) -> Work:
    """The least that a forward scan must do: read features and weights once, write the results; all products."""
    numbers = 4 * sizes.hidden * (sum(dims) + sizes.states * (3 if feedback else 1))
    numbers += 2 * sizes.cells * sizes.attention + candidate * (sizes.cells + sizes.memory)
    numbers += 2 * sizes.gates * (sizes.cells + 2 * sizes.memory)
    moved = numbers + batch * (steps * sum(dims) + sizes.states + sizes.memory)
    unit: Any = "tf32x3" if dtype == torch.float32 else "bf16"
    return Work(moved * dtype.itemsize + 8 * batch, 2 * numbers * batch * steps, unit)


PAPER = Sizes(3, 32, 128, 64, 128)


def specializations() -> Iterator[Specialization]:
    """Every tile at the default sizes in each precision; larger and the smallest sizes."""
    hopper = (90, 100)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _of_sizes(PAPER, AMPERE, dtype, (80,))
        yield from _of_sizes(PAPER, LATENCY, dtype, hopper)
        yield from _of_sizes(PAPER, THROUGHPUT, dtype, hopper)
    large = Sizes(5, 64, 256, 256, 256)
    yield from _of_sizes(large, AMPERE, torch.float32, (80,))
    yield from _of_sizes(large, THROUGHPUT, torch.float32, hopper)
    small = Sizes(2, 16, 16, 16, 16)
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
    drawn = {"DROPOUT": True, "KEEP": True}
    weights = ("recurrent_ptr", "feedback_ptr", "first_ptr", "first_bias_ptr", "second_ptr", "second_bias_ptr")
    weights += ("context_ptr", "bias_ptr")
    for kernel, constants in (
        (memory_scan_cells_fwd_kernel, cells | drawn),
        (memory_scan_memory_fwd_kernel, memory | drawn),
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
        # Tiles of sixteen by sixteen leave each of eight warps' threads one number.
        vectorized = sizes.hidden > 16 or tile.warps < 8
        options = _compile_options(tile)
        yield Specialization(label, kernel, types, constants, pointers, options, vectorized=vectorized, targets=targets)
