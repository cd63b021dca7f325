"""The first loop of the memory scan and its way back: LSTMs, attention over their cells, and its feedback.

Dimension legend: M modalities, B samples, T time steps; H hidden size, A inner size of the attention, CELLS = 2MH: the
old cells of every modality, and then the new ones; ROWS samples of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3er_fast.kernels._memory_scan_layers import (
    ATTENTION,
    RUNTIME,
    add_product,
    add_products,
    bias,
    kept,
    put,
    sigmoid,
    tanh,
    tile,
)


@triton.jit(do_not_specialize=RUNTIME)
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
                    gates = gates + (tile(gates_ptr, gate_row, i * H + start, alive, 4 * H, H_PIECE),)
                gates = add_products(
                    gates, hidden_ptr + m * H, before, continued, recurrent_ptr + (m * 4 * H + start) * H,
                    M * H, H * H, H, H, 16, H_PIECE, PRECISION,
                )  # fmt: skip
                if FEEDBACK:
                    for part in range(2):
                        gates = add_products(
                            gates, attended_ptr + (part * M + m) * H, frame - B, continued,
                            feedback_ptr + (m * 4 * H + start) * 2 * H + part * H,
                            CELLS, 2 * H * H, 2 * H, H, 16, H_PIECE, PRECISION,
                        )  # fmt: skip
                enter, keep, value, show = sigmoid(gates[0]), sigmoid(gates[1]), tanh(gates[2]), sigmoid(gates[3])
                cell = keep * tile(cells_ptr, before, unit, continued, M * H, H_PIECE) + enter * value
                hidden = show * tanh(cell)
                put(cells_ptr, now, unit, alive, cell, M * H, H_PIECE)
                put(hidden_ptr, now, unit, alive, hidden, M * H, H_PIECE)
                put(last_ptr, b + m * B, start, t + 1 == length, hidden, H, H_PIECE)
                if KEEP:
                    put(gates_ptr, gate_row, start, alive, enter, 4 * H, H_PIECE)
                    put(gates_ptr, gate_row, H + start, alive, keep, 4 * H, H_PIECE)
                    put(gates_ptr, gate_row, 2 * H + start, alive, value, 4 * H, H_PIECE)
                    put(gates_ptr, gate_row, 3 * H + start, alive, show, 4 * H, H_PIECE)
        tl.debug_barrier()
        for start in range(0, A, A_PIECE):
            inner = bias(first_bias_ptr, start, ROWS, A_PIECE)
            inner = add_product(
                inner, cells_ptr, before, continued, first_ptr + start * CELLS,
                M * H, 1, CELLS, M * H, H_PIECE, A_PIECE, PRECISION,
            )  # fmt: skip
            inner = add_product(
                inner, cells_ptr, now, alive, first_ptr + start * CELLS + M * H,
                M * H, 1, CELLS, M * H, H_PIECE, A_PIECE, PRECISION,
            )  # fmt: skip
            inner = tl.maximum(inner, 0.0)
            if DROPOUT:
                inner *= kept(seed_ptr, frame, start, dropout, ATTENTION, ROWS, A_PIECE)
            put(inner_ptr, now, start, alive, inner, A, A_PIECE)
        tl.debug_barrier()
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, CELLS, H_PIECE):
            logits = add_product(
                bias(second_bias_ptr, start, ROWS, H_PIECE), inner_ptr, now, alive, second_ptr + start * A,
                A, 1, A, A, A_PIECE, H_PIECE, PRECISION,
            )  # fmt: skip
            put(share_ptr, now, start, alive, logits, CELLS, H_PIECE)
            higher = tl.maximum(top, tl.max(logits, axis=1))
            power = tl.exp2(1.4426950408889634 * (logits - higher[:, None]))
            total = total * tl.exp2(1.4426950408889634 * (top - higher)) + tl.sum(power, axis=1)
            top = higher
        tl.debug_barrier()
        for start in range(0, CELLS, H_PIECE):
            is_old = start < M * H
            logits = tile(share_ptr, now, start, alive, CELLS, H_PIECE)
            share = tl.exp2(1.4426950408889634 * (logits - top[:, None])) / total[:, None]
            cell = tile(
                cells_ptr, tl.where(is_old, before, now), start % (M * H), tl.where(is_old, continued, alive),
                M * H, H_PIECE,
            )  # fmt: skip
            put(attended_ptr, frame, start, alive, share * cell, CELLS, H_PIECE)
            if KEEP:
                put(share_ptr, now, start, alive, share, CELLS, H_PIECE)


@triton.jit(do_not_specialize=RUNTIME)
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
            grad = tile(attended_grad_ptr, frame, start, alive, CELLS, H_PIECE)
            if FEEDBACK:
                grad += tile(back_grad_ptr, b, start, alive, CELLS, H_PIECE)
            total += tl.sum(grad * tile(attended_ptr, frame, start, alive, CELLS, H_PIECE), axis=1)
        for start in range(0, CELLS, H_PIECE):
            grad = tile(attended_grad_ptr, frame, start, alive, CELLS, H_PIECE)
            if FEEDBACK:
                grad += tile(back_grad_ptr, b, start, alive, CELLS, H_PIECE)
            share = tile(share_ptr, frame, start, alive, CELLS, H_PIECE)
            product = grad * tile(attended_ptr, frame, start, alive, CELLS, H_PIECE)
            put(logits_grad_ptr, frame, start, alive, product - share * total[:, None], CELLS, H_PIECE)
            put(attended_grad_ptr, frame, start, alive, grad * share, CELLS, H_PIECE)
        tl.debug_barrier()
        for start in range(0, A, A_PIECE):
            grad = add_product(
                tl.zeros([ROWS, A_PIECE], tl.float32), logits_grad_ptr, frame, alive, second_ptr + start,
                CELLS, A, 1, CELLS, H_PIECE, A_PIECE, PRECISION,
            )  # fmt: skip
            inner = tile(inner_ptr, frame, start, alive, A, A_PIECE)
            put(inner_grad_ptr, frame, start, alive, tl.where(inner > 0, grad * scale, 0.0), A, A_PIECE)
        tl.debug_barrier()
        for m in range(M):
            gate_row = (b + m * B) * T + t
            for start in range(0, H, H_PIECE):
                unit = m * H + start
                old = add_product(
                    tile(attended_grad_ptr, frame, unit, alive, CELLS, H_PIECE), inner_grad_ptr, frame, alive,
                    first_ptr + unit, A, CELLS, 1, A, A_PIECE, H_PIECE, PRECISION,
                )  # fmt: skip
                grad = add_product(
                    tile(attended_grad_ptr, frame, M * H + unit, alive, CELLS, H_PIECE), inner_grad_ptr, frame, alive,
                    first_ptr + M * H + unit, A, CELLS, 1, A, A_PIECE, H_PIECE, PRECISION,
                )  # fmt: skip
                enter = tile(gates_ptr, gate_row, start, alive, 4 * H, H_PIECE)
                keep = tile(gates_ptr, gate_row, H + start, alive, 4 * H, H_PIECE)
                value = tile(gates_ptr, gate_row, 2 * H + start, alive, 4 * H, H_PIECE)
                show = tile(gates_ptr, gate_row, 3 * H + start, alive, 4 * H, H_PIECE)
                before = tile(cells_ptr, frame - B, unit, continued, M * H, H_PIECE)
                squashed = tanh(tile(cells_ptr, frame, unit, alive, M * H, H_PIECE))
                hidden = tile(hidden_grad_ptr, b + m * B, start, alive, H, H_PIECE)
                grad += tile(cell_grad_ptr, b, unit, alive, M * H, H_PIECE)
                grad += hidden * show * (1.0 - squashed * squashed)
                put(cell_grad_ptr, b, unit, alive, old + grad * keep, M * H, H_PIECE)
                column = m * 4 * H + start
                by_enter = grad * value * enter * (1.0 - enter)
                put(gates_grad_ptr, frame, column, alive, by_enter, 4 * M * H, H_PIECE)
                by_keep = grad * before * keep * (1.0 - keep)
                put(gates_grad_ptr, frame, H + column, alive, by_keep, 4 * M * H, H_PIECE)
                by_value = grad * enter * (1.0 - value * value)
                put(gates_grad_ptr, frame, 2 * H + column, alive, by_value, 4 * M * H, H_PIECE)
                by_show = hidden * squashed * show * (1.0 - show)
                put(gates_grad_ptr, frame, 3 * H + column, alive, by_show, 4 * M * H, H_PIECE)
        tl.debug_barrier()
        for m in range(M):
            for start in range(0, H, H_PIECE):
                grad = add_product(
                    tl.zeros([ROWS, H_PIECE], tl.float32), gates_grad_ptr + m * 4 * H, frame, alive,
                    recurrent_ptr + m * 4 * H * H + start, 4 * M * H, H, 1, 4 * H, H_PIECE, H_PIECE, PRECISION,
                )  # fmt: skip
                put(hidden_grad_ptr, b + m * B, start, alive, grad, H, H_PIECE)
                if FEEDBACK:
                    for part in range(2):
                        grad = add_product(
                            tl.zeros([ROWS, H_PIECE], tl.float32), gates_grad_ptr + m * 4 * H, frame, alive,
                            feedback_ptr + m * 8 * H * H + part * H + start,
                            4 * M * H, 2 * H, 1, 4 * H, H_PIECE, H_PIECE, PRECISION,
                        )  # fmt: skip
                        put(back_grad_ptr, b, (part * M + m) * H + start, alive, grad, CELLS, H_PIECE)
