"""The first loop of the memory scan, forward and backward: LSTMs, attention over their cells, and its feedback.

Dimension legend: M modalities, B samples, T time steps; H hidden size, A inner size of the attention, CELLS = 2MH: the
old cells of every modality, then the new cells; ROWS samples of a program, COLUMNS of a product's tile at most, CHUNK
terms of a product at a time at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3er_fast.kernels._math import exp, sigmoid, tanh
from m3er_fast.kernels._memory_scan_layers import (
    ATTENTION,
    RUNTIME,
    add_product,
    dropout_mask,
    load_bias,
    load_tile,
    store_tile,
    tile_of,
)


@triton.jit(do_not_specialize=RUNTIME)
def memory_scan_cells_fwd_kernel(
    gates_ptr,  # (M, B, T, 4H), the input's share of the gates with biases; on return, if SAVE, the gates
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
    inner_ptr,  # (slots, B, A), the attention's inner layer after relu and dropout
    softmax_ptr,  # (slots, B, CELLS), the attention's softmax
    attended_ptr,  # (T, B, CELLS), r
    B,
    T,
    slots,  # steps whose states are stored: T, or 2 in turns if only the last step is wanted
    dropout,
    M: tl.constexpr,
    H: tl.constexpr,
    A: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    FEEDBACK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the LSTMs and the attention of ROWS samples, step by step."""
    CELLS: tl.constexpr = 2 * M * H
    H_TILE: tl.constexpr = tile_of(H, 32)
    GATE_TILE: tl.constexpr = tile_of(4 * H, COLUMNS)
    A_TILE: tl.constexpr = tile_of(A, COLUMNS)
    CELL_TILE: tl.constexpr = tile_of(CELLS, COLUMNS)
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
            for start in range(0, 4 * H, GATE_TILE):
                gates = add_product(
                    load_tile(gates_ptr, gate_row, start, alive, 4 * H, GATE_TILE),
                    hidden_ptr + m * H, before, continued, recurrent_ptr + (m * 4 * H + start) * H,
                    M * H, 1, H, H, GATE_TILE, CHUNK, PRECISION,
                )  # fmt: skip
                if FEEDBACK:
                    for part in range(2):
                        gates = add_product(
                            gates, attended_ptr + (part * M + m) * H, frame - B, continued,
                            feedback_ptr + (m * 4 * H + start) * 2 * H + part * H,
                            CELLS, 1, 2 * H, H, GATE_TILE, CHUNK, PRECISION,
                        )  # fmt: skip
                store_tile(gates_ptr, gate_row, start, alive, gates, 4 * H, GATE_TILE)
        tl.debug_barrier()
        for m in range(M):
            gate_row = (b + m * B) * T + t
            for start in range(0, H, H_TILE):
                unit = m * H + start
                input_gate = sigmoid(load_tile(gates_ptr, gate_row, start, alive, 4 * H, H_TILE))
                forget_gate = sigmoid(load_tile(gates_ptr, gate_row, H + start, alive, 4 * H, H_TILE))
                cell_gate = tanh(load_tile(gates_ptr, gate_row, 2 * H + start, alive, 4 * H, H_TILE))
                output_gate = sigmoid(load_tile(gates_ptr, gate_row, 3 * H + start, alive, 4 * H, H_TILE))
                cell = forget_gate * load_tile(cells_ptr, before, unit, continued, M * H, H_TILE)
                cell += input_gate * cell_gate
                hidden = output_gate * tanh(cell)
                store_tile(cells_ptr, now, unit, alive, cell, M * H, H_TILE)
                store_tile(hidden_ptr, now, unit, alive, hidden, M * H, H_TILE)
                store_tile(last_ptr, b + m * B, start, t + 1 == length, hidden, H, H_TILE)
                if SAVE:
                    store_tile(gates_ptr, gate_row, start, alive, input_gate, 4 * H, H_TILE)
                    store_tile(gates_ptr, gate_row, H + start, alive, forget_gate, 4 * H, H_TILE)
                    store_tile(gates_ptr, gate_row, 2 * H + start, alive, cell_gate, 4 * H, H_TILE)
                    store_tile(gates_ptr, gate_row, 3 * H + start, alive, output_gate, 4 * H, H_TILE)
        tl.debug_barrier()
        for start in range(0, A, A_TILE):
            inner = load_bias(first_bias_ptr, start, ROWS, A_TILE)
            inner = add_product(
                inner, cells_ptr, before, continued, first_ptr + start * CELLS,
                M * H, 1, CELLS, M * H, A_TILE, CHUNK, PRECISION,
            )  # fmt: skip
            inner = add_product(
                inner, cells_ptr, now, alive, first_ptr + start * CELLS + M * H,
                M * H, 1, CELLS, M * H, A_TILE, CHUNK, PRECISION,
            )  # fmt: skip
            inner = tl.maximum(inner, 0.0)
            if DROPOUT:
                inner *= dropout_mask(seed_ptr, frame, start, dropout, ATTENTION, ROWS, A_TILE)
            store_tile(inner_ptr, now, start, alive, inner, A, A_TILE)
        tl.debug_barrier()
        for start in range(0, CELLS, CELL_TILE):
            logits = add_product(
                load_bias(second_bias_ptr, start, ROWS, CELL_TILE), inner_ptr, now, alive, second_ptr + start * A,
                A, 1, A, A, CELL_TILE, CHUNK, PRECISION,
            )  # fmt: skip
            store_tile(softmax_ptr, now, start, alive, logits, CELLS, CELL_TILE)
        tl.debug_barrier()
        # Each column of the tiles by itself first: threads exchange one maximum and one sum.
        tops = tl.full([ROWS, H_TILE], -float("inf"), tl.float32)
        for start in range(0, CELLS, H_TILE):
            tops = tl.maximum(tops, load_tile(softmax_ptr, now, start, alive, CELLS, H_TILE))
        top = tl.max(tops, axis=1)
        powers = tl.zeros([ROWS, H_TILE], tl.float32)
        for start in range(0, CELLS, H_TILE):
            powers += exp(load_tile(softmax_ptr, now, start, alive, CELLS, H_TILE) - top[:, None])
        total = tl.sum(powers, axis=1)
        tl.debug_barrier()
        for start in range(0, CELLS, H_TILE):
            is_old = start < M * H
            logits = load_tile(softmax_ptr, now, start, alive, CELLS, H_TILE)
            softmax = exp(logits - top[:, None]) / total[:, None]
            cell = load_tile(
                cells_ptr, tl.where(is_old, before, now), start % (M * H), tl.where(is_old, continued, alive),
                M * H, H_TILE,
            )  # fmt: skip
            store_tile(attended_ptr, frame, start, alive, softmax * cell, CELLS, H_TILE)
            if SAVE:
                store_tile(softmax_ptr, now, start, alive, softmax, CELLS, H_TILE)


@triton.jit(do_not_specialize=RUNTIME)
def memory_scan_cells_bwd_kernel(
    gates_ptr,  # (M, B, T, 4H), activated
    cells_ptr,  # (T, B, MH)
    inner_ptr,  # (T, B, A), the attention's inner layer after relu and dropout
    softmax_ptr,  # (T, B, CELLS), the attention's softmax
    attended_ptr,  # (T, B, CELLS), r
    length_ptr,  # (B,) int64
    recurrent_ptr,  # (M, 4H, H)
    feedback_ptr,  # (M, 4H, 2H)
    first_ptr,  # (A, CELLS)
    second_ptr,  # (CELLS, A)
    attended_grad_ptr,  # (T, B, CELLS), gradient of r through û and γ; then of z, all cells
    hidden_grad_ptr,  # (M, B, H), gradient of the last hidden states; then of each step's hidden states
    cell_grad_ptr,  # (B, MH), zeros; then the gradient of each step's cells
    feedback_grad_ptr,  # (M, B, 2H), zeros; then the gradient of r through the feedback
    gates_grad_ptr,  # (T, B, 4MH), gradient before the gates' activations
    logits_grad_ptr,  # (T, B, CELLS), gradient before the softmax
    inner_grad_ptr,  # (T, B, A), gradient before the relu
    B,
    T,
    scale,  # 1 / (1 - dropout)
    M: tl.constexpr,
    H: tl.constexpr,
    A: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    FEEDBACK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the gradients of the first loop for ROWS samples, from the last step to the first."""
    CELLS: tl.constexpr = 2 * M * H
    H_TILE: tl.constexpr = tile_of(H, 32)
    FEEDBACK_TILE: tl.constexpr = tile_of(2 * H, COLUMNS)
    A_TILE: tl.constexpr = tile_of(A, COLUMNS)
    CELL_TILE: tl.constexpr = tile_of(CELLS, COLUMNS)
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
        # r = p ⊙ z with the softmax p: the gradient of its logits is q - p Σ q, with q = dr ⊙ r.
        totals = tl.zeros([ROWS, H_TILE], tl.float32)
        for start in range(0, CELLS, H_TILE):
            grad = load_tile(attended_grad_ptr, frame, start, alive, CELLS, H_TILE)
            if FEEDBACK:
                m = start % (M * H) // H
                column = start // (M * H) * H + start % H
                grad += load_tile(feedback_grad_ptr, b + m * B, column, alive, 2 * H, H_TILE)
            totals += grad * load_tile(attended_ptr, frame, start, alive, CELLS, H_TILE)
        total = tl.sum(totals, axis=1)
        for start in range(0, CELLS, H_TILE):
            grad = load_tile(attended_grad_ptr, frame, start, alive, CELLS, H_TILE)
            if FEEDBACK:
                m = start % (M * H) // H
                column = start // (M * H) * H + start % H
                grad += load_tile(feedback_grad_ptr, b + m * B, column, alive, 2 * H, H_TILE)
            softmax = load_tile(softmax_ptr, frame, start, alive, CELLS, H_TILE)
            product = grad * load_tile(attended_ptr, frame, start, alive, CELLS, H_TILE)
            store_tile(logits_grad_ptr, frame, start, alive, product - softmax * total[:, None], CELLS, H_TILE)
            store_tile(attended_grad_ptr, frame, start, alive, grad * softmax, CELLS, H_TILE)
        tl.debug_barrier()
        for start in range(0, A, A_TILE):
            grad = add_product(
                tl.zeros([ROWS, A_TILE], tl.float32), logits_grad_ptr, frame, alive, second_ptr + start,
                CELLS, A, 1, CELLS, A_TILE, CHUNK, PRECISION,
            )  # fmt: skip
            inner = load_tile(inner_ptr, frame, start, alive, A, A_TILE)
            store_tile(inner_grad_ptr, frame, start, alive, tl.where(inner > 0, grad * scale, 0.0), A, A_TILE)
        tl.debug_barrier()
        for start in range(0, CELLS, CELL_TILE):
            grad = add_product(
                load_tile(attended_grad_ptr, frame, start, alive, CELLS, CELL_TILE), inner_grad_ptr, frame, alive,
                first_ptr + start, A, CELLS, 1, A, CELL_TILE, CHUNK, PRECISION,
            )  # fmt: skip
            store_tile(attended_grad_ptr, frame, start, alive, grad, CELLS, CELL_TILE)
        tl.debug_barrier()
        for m in range(M):
            gate_row = (b + m * B) * T + t
            for start in range(0, H, H_TILE):
                unit = m * H + start
                old = load_tile(attended_grad_ptr, frame, unit, alive, CELLS, H_TILE)
                grad = load_tile(attended_grad_ptr, frame, M * H + unit, alive, CELLS, H_TILE)
                input_gate = load_tile(gates_ptr, gate_row, start, alive, 4 * H, H_TILE)
                forget_gate = load_tile(gates_ptr, gate_row, H + start, alive, 4 * H, H_TILE)
                cell_gate = load_tile(gates_ptr, gate_row, 2 * H + start, alive, 4 * H, H_TILE)
                output_gate = load_tile(gates_ptr, gate_row, 3 * H + start, alive, 4 * H, H_TILE)
                before = load_tile(cells_ptr, frame - B, unit, continued, M * H, H_TILE)
                squashed = tanh(load_tile(cells_ptr, frame, unit, alive, M * H, H_TILE))
                hidden_grad = load_tile(hidden_grad_ptr, b + m * B, start, alive, H, H_TILE)
                grad += load_tile(cell_grad_ptr, b, unit, alive, M * H, H_TILE)
                grad += hidden_grad * output_gate * (1.0 - squashed * squashed)
                store_tile(cell_grad_ptr, b, unit, alive, old + grad * forget_gate, M * H, H_TILE)
                column = m * 4 * H + start
                input_gate_grad = grad * cell_gate * input_gate * (1.0 - input_gate)
                store_tile(gates_grad_ptr, frame, column, alive, input_gate_grad, 4 * M * H, H_TILE)
                forget_gate_grad = grad * before * forget_gate * (1.0 - forget_gate)
                store_tile(gates_grad_ptr, frame, H + column, alive, forget_gate_grad, 4 * M * H, H_TILE)
                cell_gate_grad = grad * input_gate * (1.0 - cell_gate * cell_gate)
                store_tile(gates_grad_ptr, frame, 2 * H + column, alive, cell_gate_grad, 4 * M * H, H_TILE)
                output_gate_grad = hidden_grad * squashed * output_gate * (1.0 - output_gate)
                store_tile(gates_grad_ptr, frame, 3 * H + column, alive, output_gate_grad, 4 * M * H, H_TILE)
        tl.debug_barrier()
        for m in range(M):
            for start in range(0, H, H_TILE):
                grad = add_product(
                    tl.zeros([ROWS, H_TILE], tl.float32), gates_grad_ptr + m * 4 * H, frame, alive,
                    recurrent_ptr + m * 4 * H * H + start, 4 * M * H, H, 1, 4 * H, H_TILE, CHUNK, PRECISION,
                )  # fmt: skip
                store_tile(hidden_grad_ptr, b + m * B, start, alive, grad, H, H_TILE)
            if FEEDBACK:
                for start in range(0, 2 * H, FEEDBACK_TILE):
                    grad = add_product(
                        tl.zeros([ROWS, FEEDBACK_TILE], tl.float32), gates_grad_ptr + m * 4 * H, frame, alive,
                        feedback_ptr + m * 8 * H * H + start,
                        4 * M * H, 2 * H, 1, 4 * H, FEEDBACK_TILE, CHUNK, PRECISION,
                    )  # fmt: skip
                    store_tile(feedback_grad_ptr, b + m * B, start, alive, grad, 2 * H, FEEDBACK_TILE)
