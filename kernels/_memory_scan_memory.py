"""The second loop of the memory scan and its way back: the gated memory.

Dimension legend: B samples, T time steps; U memory size, G inner size of the gates, CELLS columns of their weights that
stand before the memory's; ROWS samples of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3er_fast.kernels._memory_scan_layers import GATES, RUNTIME, add_product, bias, kept, put, sigmoid, tile


@triton.jit(do_not_specialize=RUNTIME)
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
            inner = add_product(
                tile(inner_ptr, frame, start, alive, 2 * G, G_PIECE), memory_ptr, before, continued,
                context_ptr + start * (CELLS + U) + CELLS, U, 1, CELLS + U, U, U_PIECE, G_PIECE, PRECISION,
            )  # fmt: skip
            inner = tl.maximum(inner, 0.0)
            if DROPOUT:
                inner *= kept(seed_ptr, frame, start, dropout, GATES, ROWS, G_PIECE)
            put(inner_ptr, frame, start, alive, inner, 2 * G, G_PIECE)
        tl.debug_barrier()
        for start in range(0, U, U_PIECE):
            retain = sigmoid(
                add_product(
                    bias(bias_ptr, start, ROWS, U_PIECE),
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
            update = sigmoid(
                add_product(
                    bias(bias_ptr, U + start, ROWS, U_PIECE),
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
            memory = retain * tile(memory_ptr, before, start, continued, U, U_PIECE)
            memory += update * tile(candidate_ptr, frame, start, alive, U, U_PIECE)
            put(memory_ptr, now, start, alive, memory, U, U_PIECE)
            put(last_ptr, b, start, t + 1 == length, memory, U, U_PIECE)
            if KEEP:
                put(gates_ptr, now, start, alive, retain, 2 * U, U_PIECE)
                put(gates_ptr, now, U + start, alive, update, 2 * U, U_PIECE)


@triton.jit(do_not_specialize=RUNTIME)
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
            grad = tile(memory_grad_ptr, b, start, alive, U, U_PIECE)
            retain = tile(gates_ptr, frame, start, alive, 2 * U, U_PIECE)
            update = tile(gates_ptr, frame, U + start, alive, 2 * U, U_PIECE)
            candidate = tile(candidate_ptr, frame, start, alive, U, U_PIECE)
            memory = tile(memory_ptr, frame - B, start, continued, U, U_PIECE)
            put(slope_ptr, frame, start, alive, grad * memory * retain * (1.0 - retain), 3 * U, U_PIECE)
            put(slope_ptr, frame, U + start, alive, grad * candidate * update * (1.0 - update), 3 * U, U_PIECE)
            put(slope_ptr, frame, 2 * U + start, alive, grad * update * (1.0 - candidate * candidate), 3 * U, U_PIECE)
        tl.debug_barrier()
        for start in range(0, 2 * G, G_PIECE):
            gate = start // G
            grad = add_product(
                tl.zeros([ROWS, G_PIECE], tl.float32), slope_ptr + gate * U, frame, alive,
                second_ptr + gate * U * G + start % G, 3 * U, G, 1, U, U_PIECE, G_PIECE, PRECISION,
            )  # fmt: skip
            inner = tile(inner_ptr, frame, start, alive, 2 * G, G_PIECE)
            put(inner_grad_ptr, frame, start, alive, tl.where(inner > 0, grad * scale, 0.0), 2 * G, G_PIECE)
        tl.debug_barrier()
        for start in range(0, U, U_PIECE):
            grad = tile(memory_grad_ptr, b, start, alive, U, U_PIECE)
            grad = add_product(
                grad * tile(gates_ptr, frame, start, alive, 2 * U, U_PIECE), inner_grad_ptr, frame, alive,
                context_ptr + CELLS + start, 2 * G, CELLS + U, 1, 2 * G, G_PIECE, U_PIECE, PRECISION,
            )  # fmt: skip
            put(memory_grad_ptr, b, start, alive, grad, U, U_PIECE)
