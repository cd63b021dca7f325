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

Dropout is drawn by a counter: whether a unit of a frame is dropped depends on the seed, the frame, the layer and the
unit only. The way back draws nothing: a unit that was dropped is one whose value is zero.

Dimension legend: M modalities, B samples, T time steps, N = T · B frames, step by step; H hidden size, U memory size,
A and G inner sizes of attention and gates, CELLS = 2MH: the old cells of every modality, and then the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3er_fast.kernels._launch import TRITON_TYPE, Specialization, Work, capability
from m3er_fast.reference import MemoryScanWeights
from m3er_fast.scan_weights import arguments_of, reference_gradients, tensors_of

# Layers with a dropout of their own.
_ATTENTION = tl.constexpr(0)
_CANDIDATE = tl.constexpr(1)
_GATES = tl.constexpr(2)
# Nothing is compiled anew for a batch size or a number of steps.
_RUNTIME = ["B", "T", "slots", "N"]


# --- What the kernels share ---


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def _tanh(x):
    """To 1e-7 absolute."""
    return 2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0


@triton.jit
def _tile(ptr, row, start, mask, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of a matrix whose rows are STRIDE apart, from column ``start``; zeros where the mask is off."""
    offsets = row[:, None] * STRIDE + (start + tl.arange(0, COLUMNS))[None, :]
    return tl.load(ptr + offsets, mask=mask[:, None], other=0.0)


@triton.jit
def _put(ptr, row, start, mask, value, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    offsets = row[:, None] * STRIDE + (start + tl.arange(0, COLUMNS))[None, :]
    tl.store(ptr + offsets, value, mask=mask[:, None])


@triton.jit
def _bias(ptr, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A piece of a bias, the same in each row."""
    bias = tl.load(ptr + start + tl.arange(0, COLUMNS)).to(tl.float32)
    return tl.zeros([ROWS, COLUMNS], tl.float32) + bias[None, :]


@triton.jit
def _add_product(
    total,  # (ROWS, OUT)
    x_ptr,  # rows STRIDE apart, SIZE of their columns
    row,
    mask,
    weight_ptr,  # SIZE · OUT numbers, IN_STRIDE apart along what is summed over and OUT_STRIDE along the other
    STRIDE: tl.constexpr,
    IN_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total`` + x · weight."""
    for start in range(0, SIZE, CHUNK):
        x = _tile(x_ptr, row, start, mask, STRIDE, CHUNK)
        k = start + tl.arange(0, CHUNK)
        weight = tl.load(weight_ptr + (k[:, None] * IN_STRIDE + tl.arange(0, OUT)[None, :] * OUT_STRIDE))
        total = tl.dot(x, weight.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _add_products(
    totals,  # four of (ROWS, OUT)
    x_ptr,
    row,
    mask,
    weight_ptr,  # of the first; that of each other starts NEXT later
    STRIDE: tl.constexpr,
    NEXT: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same for the four gates of an LSTM: one x, four weights."""
    for start in range(0, SIZE, CHUNK):
        x = _tile(x_ptr, row, start, mask, STRIDE, CHUNK)
        k = start + tl.arange(0, CHUNK)
        added = ()
        for i in tl.static_range(4):
            offsets = i * NEXT + k[:, None] + tl.arange(0, OUT)[None, :] * OUT_STRIDE
            weight = tl.load(weight_ptr + offsets).to(tl.float32)
            added = added + (tl.dot(x, weight, totals[i], input_precision=PRECISION),)
        totals = added
    return totals


@triton.jit
def _kept(seed_ptr, row, start, dropout, LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of 1 / (1 - dropout), and of 0 for the units that are dropped."""
    nothing = tl.zeros([ROWS, COLUMNS], tl.int32)
    low, high = row.to(tl.int32)[:, None] + nothing, (row >> 32).to(tl.int32)[:, None] + nothing
    unit = (start + tl.arange(0, COLUMNS)).to(tl.int32)[None, :] + nothing
    draw, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, unit, nothing + LAYER)
    return tl.where(tl.uint_to_uniform_float(draw) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit(do_not_specialize=_RUNTIME)
def memory_scan_dropout_kernel(
    x_ptr,  # (N, SIZE), the inner layer of û: before its relu, then after dropout
    seed_ptr,
    N,
    dropout,
    LAYER: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Relu and dropout of ROWS frames, in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for start in range(0, SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < N)[:, None] & (column < SIZE)[None, :]
        offsets = row[:, None] * SIZE + column[None, :]
        x = tl.maximum(tl.load(x_ptr + offsets, mask=mask, other=0.0), 0.0)
        tl.store(x_ptr + offsets, x * _kept(seed_ptr, row, start, dropout, LAYER, ROWS, COLUMNS), mask=mask)


# --- Forward ---


@triton.jit(do_not_specialize=_RUNTIME)
def memory_scan_cells_fwd_kernel(
    gates_ptr,  # (M, B, T, 4H), the input's share of the gates, biases included; if KEEP then the gates themselves
    length_ptr,  # (B,) int64
    recurrent_ptr,  # (M, 4H, H)
    feedback_ptr,  # (M, 4H, 2H)
    first_ptr,  # (A, CELLS)
    first_bias_ptr,  # (A,)
    second_ptr,  # (CELLS, A)
    second_bias_ptr,  # (CELLS,)
    seed_ptr,  # (1,) int64
    last_ptr,  # (M, B, H), the last hidden states
    hidden_ptr,  # (slots, B, MH)
    cells_ptr,  # (slots, B, MH)
    inner_ptr,  # (slots, B, A), of the attention, after relu and dropout
    share_ptr,  # (slots, B, CELLS), the softmax
    attended_ptr,  # (T, B, CELLS), r
    B,
    T,
    slots,  # T, or 2 where only the last step is wanted
    dropout,
    M: tl.constexpr,
    H: tl.constexpr,
    A: tl.constexpr,
    H_PIECE: tl.constexpr,
    A_PIECE: tl.constexpr,
    FEEDBACK: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """LSTMs and attention of ROWS samples, step by step."""
    CELLS: tl.constexpr = 2 * M * H
    batch = tl.full([], 0, tl.int64) + B  # offsets may pass 2^31
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    length = tl.minimum(tl.load(length_ptr + b, mask=b < B, other=0), T).to(tl.int32)
    for t in range(tl.max(length, axis=0)):
        alive = t < length
        continued = alive & (t > 0)
        frame = b + t * batch
        now = b + (t % slots) * batch
        before = b + ((t + slots - 1) % slots) * batch
        tl.debug_barrier()
        for m in range(M):
            gate_row = (b + m * B) * T + t
            for start in range(0, H, H_PIECE):
                unit = m * H + start
                gates = ()
                for i in tl.static_range(4):  # input, forget, cell, output
                    gates = gates + (_tile(gates_ptr, gate_row, i * H + start, alive, 4 * H, H_PIECE),)
                gates = _add_products(
                    gates, hidden_ptr + m * H, before, continued, recurrent_ptr + (m * 4 * H + start) * H,
                    M * H, H * H, H, H, 16, H_PIECE, PRECISION,
                )  # fmt: skip
                if FEEDBACK:
                    for part in range(2):
                        gates = _add_products(
                            gates, attended_ptr + (part * M + m) * H, frame - B, continued,
                            feedback_ptr + (m * 4 * H + start) * 2 * H + part * H,
                            CELLS, 2 * H * H, 2 * H, H, 16, H_PIECE, PRECISION,
                        )  # fmt: skip
                enter, keep, value, show = _sigmoid(gates[0]), _sigmoid(gates[1]), _tanh(gates[2]), _sigmoid(gates[3])
                cell = keep * _tile(cells_ptr, before, unit, continued, M * H, H_PIECE) + enter * value
                hidden = show * _tanh(cell)
                _put(cells_ptr, now, unit, alive, cell, M * H, H_PIECE)
                _put(hidden_ptr, now, unit, alive, hidden, M * H, H_PIECE)
                _put(last_ptr, b + m * B, start, t + 1 == length, hidden, H, H_PIECE)
                if KEEP:
                    _put(gates_ptr, gate_row, start, alive, enter, 4 * H, H_PIECE)
                    _put(gates_ptr, gate_row, H + start, alive, keep, 4 * H, H_PIECE)
                    _put(gates_ptr, gate_row, 2 * H + start, alive, value, 4 * H, H_PIECE)
                    _put(gates_ptr, gate_row, 3 * H + start, alive, show, 4 * H, H_PIECE)
        tl.debug_barrier()
        for start in range(0, A, A_PIECE):
            inner = _bias(first_bias_ptr, start, ROWS, A_PIECE)
            inner = _add_product(
                inner, cells_ptr, before, continued, first_ptr + start * CELLS,
                M * H, 1, CELLS, M * H, H_PIECE, A_PIECE, PRECISION,
            )  # fmt: skip
            inner = _add_product(
                inner, cells_ptr, now, alive, first_ptr + start * CELLS + M * H,
                M * H, 1, CELLS, M * H, H_PIECE, A_PIECE, PRECISION,
            )  # fmt: skip
            inner = tl.maximum(inner, 0.0)
            if DROPOUT:
                inner *= _kept(seed_ptr, frame, start, dropout, _ATTENTION, ROWS, A_PIECE)
            _put(inner_ptr, now, start, alive, inner, A, A_PIECE)
        tl.debug_barrier()
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, CELLS, H_PIECE):
            logits = _add_product(
                _bias(second_bias_ptr, start, ROWS, H_PIECE), inner_ptr, now, alive, second_ptr + start * A,
                A, 1, A, A, A_PIECE, H_PIECE, PRECISION,
            )  # fmt: skip
            _put(share_ptr, now, start, alive, logits, CELLS, H_PIECE)
            higher = tl.maximum(top, tl.max(logits, axis=1))
            power = tl.exp2(1.4426950408889634 * (logits - higher[:, None]))
            total = total * tl.exp2(1.4426950408889634 * (top - higher)) + tl.sum(power, axis=1)
            top = higher
        tl.debug_barrier()
        for start in range(0, CELLS, H_PIECE):
            is_old = start < M * H
            logits = _tile(share_ptr, now, start, alive, CELLS, H_PIECE)
            share = tl.exp2(1.4426950408889634 * (logits - top[:, None])) / total[:, None]
            cell = _tile(
                cells_ptr, tl.where(is_old, before, now), start % (M * H), tl.where(is_old, continued, alive),
                M * H, H_PIECE,
            )  # fmt: skip
            _put(attended_ptr, frame, start, alive, share * cell, CELLS, H_PIECE)
            if KEEP:
                _put(share_ptr, now, start, alive, share, CELLS, H_PIECE)


@triton.jit(do_not_specialize=_RUNTIME)
def memory_scan_memory_fwd_kernel(
    candidate_ptr,  # (T, B, U), û
    inner_ptr,  # (T, B, 2G), r's share of the inner layers of γ1 and γ2, biases included; then these, after dropout
    length_ptr,  # (B,) int64
    context_ptr,  # (2G, CELLS + U), of whose columns the last U are read
    second_ptr,  # (2, U, G)
    bias_ptr,  # (2, U)
    seed_ptr,  # (1,) int64
    last_ptr,  # (B, U), the last memory
    gates_ptr,  # (slots, B, 2U), γ1 and γ2
    memory_ptr,  # (slots, B, U)
    B,
    T,
    slots,
    dropout,
    CELLS: tl.constexpr,
    U: tl.constexpr,
    G: tl.constexpr,
    U_PIECE: tl.constexpr,
    G_PIECE: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gated memory of ROWS samples, step by step."""
    batch = tl.full([], 0, tl.int64) + B  # offsets may pass 2^31
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    length = tl.minimum(tl.load(length_ptr + b, mask=b < B, other=0), T).to(tl.int32)
    for t in range(tl.max(length, axis=0)):
        alive = t < length
        continued = alive & (t > 0)
        frame = b + t * batch
        now = b + (t % slots) * batch
        before = b + ((t + slots - 1) % slots) * batch
        tl.debug_barrier()
        for start in range(0, 2 * G, G_PIECE):
            inner = _add_product(
                _tile(inner_ptr, frame, start, alive, 2 * G, G_PIECE), memory_ptr, before, continued,
                context_ptr + start * (CELLS + U) + CELLS, U, 1, CELLS + U, U, U_PIECE, G_PIECE, PRECISION,
            )  # fmt: skip
            inner = tl.maximum(inner, 0.0)
            if DROPOUT:
                inner *= _kept(seed_ptr, frame, start, dropout, _GATES, ROWS, G_PIECE)
            _put(inner_ptr, frame, start, alive, inner, 2 * G, G_PIECE)
        tl.debug_barrier()
        for start in range(0, U, U_PIECE):
            retain = _sigmoid(
                _add_product(
                    _bias(bias_ptr, start, ROWS, U_PIECE),
                    inner_ptr,
                    frame,
                    alive,
                    second_ptr + start * G,
                    2 * G,
                    1,
                    G,
                    G,
                    G_PIECE,
                    U_PIECE,
                    PRECISION,
                )
            )
            update = _sigmoid(
                _add_product(
                    _bias(bias_ptr, U + start, ROWS, U_PIECE),
                    inner_ptr + G,
                    frame,
                    alive,
                    second_ptr + (U + start) * G,
                    2 * G,
                    1,
                    G,
                    G,
                    G_PIECE,
                    U_PIECE,
                    PRECISION,
                )
            )
            memory = retain * _tile(memory_ptr, before, start, continued, U, U_PIECE)
            memory += update * _tile(candidate_ptr, frame, start, alive, U, U_PIECE)
            _put(memory_ptr, now, start, alive, memory, U, U_PIECE)
            _put(last_ptr, b, start, t + 1 == length, memory, U, U_PIECE)
            if KEEP:
                _put(gates_ptr, now, start, alive, retain, 2 * U, U_PIECE)
                _put(gates_ptr, now, U + start, alive, update, 2 * U, U_PIECE)


# --- Backward ---


@triton.jit(do_not_specialize=_RUNTIME)
def memory_scan_memory_bwd_kernel(
    candidate_ptr,  # (T, B, U), û
    inner_ptr,  # (T, B, 2G), inner layers of γ1 and γ2, after dropout
    gates_ptr,  # (T, B, 2U), γ1 and γ2
    memory_ptr,  # (T, B, U)
    length_ptr,  # (B,) int64
    context_ptr,  # (2G, CELLS + U), of whose columns the last U are read
    second_ptr,  # (2, U, G)
    memory_grad_ptr,  # (B, U), of the last memory; then of each step's
    slope_ptr,  # (T, B, 3U), before the activations of γ1, γ2 and û
    inner_grad_ptr,  # (T, B, 2G), before the relu of the inner layers
    B,
    T,
    scale,  # 1 / (1 - dropout)
    CELLS: tl.constexpr,
    U: tl.constexpr,
    G: tl.constexpr,
    U_PIECE: tl.constexpr,
    G_PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``memory`` backwards."""
    batch = tl.full([], 0, tl.int64) + B  # offsets may pass 2^31
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    length = tl.minimum(tl.load(length_ptr + b, mask=b < B, other=0), T).to(tl.int32)
    steps = tl.max(length, axis=0)
    for i in range(steps):
        t = steps - 1 - i
        alive = t < length
        continued = alive & (t > 0)
        frame = b + t * batch
        tl.debug_barrier()
        for start in range(0, U, U_PIECE):
            grad = _tile(memory_grad_ptr, b, start, alive, U, U_PIECE)
            retain = _tile(gates_ptr, frame, start, alive, 2 * U, U_PIECE)
            update = _tile(gates_ptr, frame, U + start, alive, 2 * U, U_PIECE)
            candidate = _tile(candidate_ptr, frame, start, alive, U, U_PIECE)
            memory = _tile(memory_ptr, frame - B, start, continued, U, U_PIECE)
            _put(slope_ptr, frame, start, alive, grad * memory * retain * (1.0 - retain), 3 * U, U_PIECE)
            _put(slope_ptr, frame, U + start, alive, grad * candidate * update * (1.0 - update), 3 * U, U_PIECE)
            _put(slope_ptr, frame, 2 * U + start, alive, grad * update * (1.0 - candidate * candidate), 3 * U, U_PIECE)
        tl.debug_barrier()
        for start in range(0, 2 * G, G_PIECE):
            gate = start // G
            grad = _add_product(
                tl.zeros([ROWS, G_PIECE], tl.float32), slope_ptr + gate * U, frame, alive,
                second_ptr + gate * U * G + start % G, 3 * U, G, 1, U, U_PIECE, G_PIECE, PRECISION,
            )  # fmt: skip
            inner = _tile(inner_ptr, frame, start, alive, 2 * G, G_PIECE)
            _put(inner_grad_ptr, frame, start, alive, tl.where(inner > 0, grad * scale, 0.0), 2 * G, G_PIECE)
        tl.debug_barrier()
        for start in range(0, U, U_PIECE):
            grad = _tile(memory_grad_ptr, b, start, alive, U, U_PIECE)
            grad = _add_product(
                grad * _tile(gates_ptr, frame, start, alive, 2 * U, U_PIECE), inner_grad_ptr, frame, alive,
                context_ptr + CELLS + start, 2 * G, CELLS + U, 1, 2 * G, G_PIECE, U_PIECE, PRECISION,
            )  # fmt: skip
            _put(memory_grad_ptr, b, start, alive, grad, U, U_PIECE)


@triton.jit(do_not_specialize=_RUNTIME)
def memory_scan_cells_bwd_kernel(
    gates_ptr,  # (M, B, T, 4H), activated
    cells_ptr,  # (T, B, MH)
    inner_ptr,  # (T, B, A), of the attention, after relu and dropout
    share_ptr,  # (T, B, CELLS), the softmax
    attended_ptr,  # (T, B, CELLS), r
    length_ptr,  # (B,) int64
    recurrent_ptr,  # (M, 4H, H)
    feedback_ptr,  # (M, 4H, 2H)
    first_ptr,  # (A, CELLS)
    second_ptr,  # (CELLS, A)
    attended_grad_ptr,  # (T, B, CELLS), of r by way of û and γ; then of z by way of r alone
    hidden_grad_ptr,  # (M, B, H), of the last hidden states; then of each step's
    cell_grad_ptr,  # (B, MH), zeros; then of each step's cells
    back_grad_ptr,  # (B, CELLS), zeros; then of r by way of the feedback
    gates_grad_ptr,  # (T, B, 4MH), before the gates' activations
    logits_grad_ptr,  # (T, B, CELLS), before the softmax
    inner_grad_ptr,  # (T, B, A), before the relu
    B,
    T,
    scale,  # 1 / (1 - dropout)
    M: tl.constexpr,
    H: tl.constexpr,
    A: tl.constexpr,
    H_PIECE: tl.constexpr,
    A_PIECE: tl.constexpr,
    FEEDBACK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``cells`` backwards."""
    CELLS: tl.constexpr = 2 * M * H
    batch = tl.full([], 0, tl.int64) + B  # offsets may pass 2^31
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    length = tl.minimum(tl.load(length_ptr + b, mask=b < B, other=0), T).to(tl.int32)
    steps = tl.max(length, axis=0)
    for i in range(steps):
        t = steps - 1 - i
        alive = t < length
        continued = alive & (t > 0)
        frame = b + t * batch
        tl.debug_barrier()
        # r = p ⊙ z with p the softmax: what comes back to its logits is q - p Σ q, q = dr ⊙ r.
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, CELLS, H_PIECE):
            grad = _tile(attended_grad_ptr, frame, start, alive, CELLS, H_PIECE)
            if FEEDBACK:
                grad += _tile(back_grad_ptr, b, start, alive, CELLS, H_PIECE)
            total += tl.sum(grad * _tile(attended_ptr, frame, start, alive, CELLS, H_PIECE), axis=1)
        for start in range(0, CELLS, H_PIECE):
            grad = _tile(attended_grad_ptr, frame, start, alive, CELLS, H_PIECE)
            if FEEDBACK:
                grad += _tile(back_grad_ptr, b, start, alive, CELLS, H_PIECE)
            share = _tile(share_ptr, frame, start, alive, CELLS, H_PIECE)
            product = grad * _tile(attended_ptr, frame, start, alive, CELLS, H_PIECE)
            _put(logits_grad_ptr, frame, start, alive, product - share * total[:, None], CELLS, H_PIECE)
            _put(attended_grad_ptr, frame, start, alive, grad * share, CELLS, H_PIECE)
        tl.debug_barrier()
        for start in range(0, A, A_PIECE):
            grad = _add_product(
                tl.zeros([ROWS, A_PIECE], tl.float32), logits_grad_ptr, frame, alive, second_ptr + start,
                CELLS, A, 1, CELLS, H_PIECE, A_PIECE, PRECISION,
            )  # fmt: skip
            inner = _tile(inner_ptr, frame, start, alive, A, A_PIECE)
            _put(inner_grad_ptr, frame, start, alive, tl.where(inner > 0, grad * scale, 0.0), A, A_PIECE)
        tl.debug_barrier()
        for m in range(M):
            gate_row = (b + m * B) * T + t
            for start in range(0, H, H_PIECE):
                unit = m * H + start
                old = _add_product(
                    _tile(attended_grad_ptr, frame, unit, alive, CELLS, H_PIECE), inner_grad_ptr, frame, alive,
                    first_ptr + unit, A, CELLS, 1, A, A_PIECE, H_PIECE, PRECISION,
                )  # fmt: skip
                grad = _add_product(
                    _tile(attended_grad_ptr, frame, M * H + unit, alive, CELLS, H_PIECE), inner_grad_ptr, frame, alive,
                    first_ptr + M * H + unit, A, CELLS, 1, A, A_PIECE, H_PIECE, PRECISION,
                )  # fmt: skip
                enter = _tile(gates_ptr, gate_row, start, alive, 4 * H, H_PIECE)
                keep = _tile(gates_ptr, gate_row, H + start, alive, 4 * H, H_PIECE)
                value = _tile(gates_ptr, gate_row, 2 * H + start, alive, 4 * H, H_PIECE)
                show = _tile(gates_ptr, gate_row, 3 * H + start, alive, 4 * H, H_PIECE)
                before = _tile(cells_ptr, frame - B, unit, continued, M * H, H_PIECE)
                squashed = _tanh(_tile(cells_ptr, frame, unit, alive, M * H, H_PIECE))
                hidden = _tile(hidden_grad_ptr, b + m * B, start, alive, H, H_PIECE)
                grad += _tile(cell_grad_ptr, b, unit, alive, M * H, H_PIECE)
                grad += hidden * show * (1.0 - squashed * squashed)
                _put(cell_grad_ptr, b, unit, alive, old + grad * keep, M * H, H_PIECE)
                column = m * 4 * H + start
                by_enter = grad * value * enter * (1.0 - enter)
                _put(gates_grad_ptr, frame, column, alive, by_enter, 4 * M * H, H_PIECE)
                by_keep = grad * before * keep * (1.0 - keep)
                _put(gates_grad_ptr, frame, H + column, alive, by_keep, 4 * M * H, H_PIECE)
                by_value = grad * enter * (1.0 - value * value)
                _put(gates_grad_ptr, frame, 2 * H + column, alive, by_value, 4 * M * H, H_PIECE)
                by_show = hidden * squashed * show * (1.0 - show)
                _put(gates_grad_ptr, frame, 3 * H + column, alive, by_show, 4 * M * H, H_PIECE)
        tl.debug_barrier()
        for m in range(M):
            for start in range(0, H, H_PIECE):
                grad = _add_product(
                    tl.zeros([ROWS, H_PIECE], tl.float32), gates_grad_ptr + m * 4 * H, frame, alive,
                    recurrent_ptr + m * 4 * H * H + start, 4 * M * H, H, 1, 4 * H, H_PIECE, H_PIECE, PRECISION,
                )  # fmt: skip
                _put(hidden_grad_ptr, b + m * B, start, alive, grad, H, H_PIECE)
                if FEEDBACK:
                    for part in range(2):
                        grad = _add_product(
                            tl.zeros([ROWS, H_PIECE], tl.float32), gates_grad_ptr + m * 4 * H, frame, alive,
                            feedback_ptr + m * 8 * H * H + part * H + start,
                            4 * M * H, 2 * H, 1, 4 * H, H_PIECE, H_PIECE, PRECISION,
                        )  # fmt: skip
                        _put(back_grad_ptr, b, (part * M + m) * H + start, alive, grad, CELLS, H_PIECE)


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
                **_dropout_constants(size, _CANDIDATE.value),
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
    weights, sizes, dtype = _contiguous(weights), Sizes.of(weights), weights.recurrent.dtype
    batch, steps = features[0].shape[:2]
    if not batch or not steps:
        return [torch.zeros_like(x) for x in given]
    frames, modalities, size = batch * steps, sizes.modalities, sizes.hidden
    kept = _Kept.of(piece, _Kept.shapes(frames, frames, sizes, weights.candidate[0].shape[0]))
    merged = _Merged.of(weights)
    tile = tile_for(batch, capability(lengths))
    grid = (triton.cdiv(batch, tile.rows),)
    scale = 1.0 / (1.0 - dropout)
    # Frames that are not valid have no gradient.
    slope, inner_grad = piece.new_zeros((frames, 3 * sizes.memory)), torch.zeros_like(kept.context)
    gates_grad = piece.new_zeros((frames, 4 * sizes.states))
    logits_grad, attention_grad = torch.zeros_like(kept.attended), torch.zeros_like(kept.inner)
    # A backward pass may run again: what came in stays as it is.
    memory_state = memory_grad.to(torch.float32, copy=True).contiguous()
    hidden_state = hidden_grad.to(torch.float32, copy=True).contiguous()
    with torch.autocast(piece.device.type, enabled=False), torch.cuda.device_of(piece):
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
            inner_grad,
            batch,
            steps,
            scale,
            **_memory_constants(sizes, tile, dtype),
            **_compile_options(tile),
        )
        of_retain, of_update, of_candidate = slope.split(sizes.memory, 1)
        candidate_grad = _product(of_candidate, weights.candidate[2], dtype).float()
        candidate_grad.mul_(scale).masked_fill_(kept.candidate_inner <= 0, 0.0)
        attended_grad = _product(inner_grad, merged.context[:, : sizes.cells], dtype).float()
        attended_grad += _product(candidate_grad, weights.candidate[0], dtype)
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
            gates_grad,
            logits_grad,
            attention_grad,
            batch,
            steps,
            scale,
            **_cells_constants(sizes, tile, dtype, feedback=weights.feedback is not None),
            **_compile_options(tile),
        )

        def layer(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return _product(grad.mT, x, dtype), grad.sum(0).to(dtype)

        by_modality = gates_grad.unflatten(1, (modalities, -1)).transpose(0, 1)  # (M, N, 4H)
        later = by_modality[:, batch:].mT
        hidden = kept.hidden[: frames - batch].unflatten(1, (modalities, size)).transpose(0, 1)
        attended = kept.attended[: frames - batch].unflatten(1, (2, modalities, size)).permute(1, 2, 0, 3)
        recurrent = _product(later, hidden, dtype)
        feedback = [] if weights.feedback is None else [torch.cat([_product(later, r, dtype) for r in attended], 2)]
        alive = torch.arange(steps, device=lengths.device)[:, None] < lengths
        of_inputs, of_features = [], []
        for x, weight, grad, is_wanted in zip(features, weights.input, by_modality, wanted, strict=True):
            # Padding may hold anything.
            valid = torch.where(alive[:, :, None], x.transpose(0, 1), x.new_zeros(())).reshape(frames, -1)
            of_inputs.append(_product(grad.mT, valid, dtype))
            of_feature = _product(grad, weight, dtype).view(steps, batch, -1).transpose(0, 1) if is_wanted else None
            of_features.append(x.new_empty(0) if of_feature is None else of_feature.contiguous())
        cells = torch.cat(
            [
                _product(attention_grad[batch:].mT, kept.cells[: frames - batch], dtype),
                _product(attention_grad.mT, kept.cells, dtype),
            ],
            1,
        )
        parts = []
        for grad, of_second, inner in zip(
            inner_grad.split(sizes.gates, 1), (of_retain, of_update), kept.context.split(sizes.gates, 1), strict=True
        ):
            of_memory = _product(grad[batch:].mT, kept.memory[: frames - batch], dtype)
            of_first = torch.cat([_product(grad.mT, kept.attended, dtype), of_memory], 1)
            parts += [of_first, grad.sum(0).to(dtype), *layer(of_second, inner)]
        return [
            *of_features,
            *of_inputs,
            recurrent,
            gates_grad.sum(0).view(modalities, -1).to(dtype),
            *feedback,
            cells,
            attention_grad.sum(0).to(dtype),
            *layer(logits_grad, kept.inner),
            *layer(candidate_grad, kept.attended),
            *layer(of_candidate, kept.candidate_inner),
            *parts,
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
        _dropout_constants(64, _CANDIDATE.value),
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
