"""The second loop of the memory scan, forward and backward: the gated memory.

Dimension legend: B samples, T time steps; U memory size, G inner size of the gates, CELLS columns of their weights
before the memory's columns; ROWS samples of a program, COLUMNS of a product's tile at most, CHUNK terms of a product
at a time at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3er_fast.kernels._math import sigmoid
from m3er_fast.kernels._memory_scan_layers import (
    GATES,
    RUNTIME,
    add_product,
    dropout_mask,
    load_bias,
    load_tile,
    store_tile,
    tile_of,
)


@triton.jit(do_not_specialize=RUNTIME)
def memory_scan_memory_fwd_kernel(
    candidate_ptr,  # (T, B, U), û
    inner_ptr,  # (T, B, 2G), r's share of the inner layers of γ1 and γ2 with biases; on return, these after dropout
    length_ptr,  # (B,) int64
    context_ptr,  # (2G, CELLS + U); only the last U columns are read
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
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the gated memory of ROWS samples, step by step."""
    U_TILE: tl.constexpr = tile_of(U, COLUMNS)
    G_TILE: tl.constexpr = tile_of(2 * G, COLUMNS)
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
        for start in range(0, 2 * G, G_TILE):
            inner = add_product(
                load_tile(inner_ptr, frame, start, alive, 2 * G, G_TILE), memory_ptr, before, continued,
                context_ptr + start * (CELLS + U) + CELLS, U, 1, CELLS + U, U, G_TILE, CHUNK, PRECISION,
            )  # fmt: skip
            inner = tl.maximum(inner, 0.0)
            if DROPOUT:
                inner *= dropout_mask(seed_ptr, frame, start, dropout, GATES, ROWS, G_TILE)
            store_tile(inner_ptr, frame, start, alive, inner, 2 * G, G_TILE)
        tl.debug_barrier()
        for start in range(0, U, U_TILE):
            retain = sigmoid(
                add_product(
                    load_bias(bias_ptr, start, ROWS, U_TILE),
                    inner_ptr,
                    frame,
                    alive,
                    second_ptr + start * G,
                    2 * G,
                    1,
                    G,
                    G,
                    U_TILE,
                    CHUNK,
                    PRECISION,
                )
            )
            update = sigmoid(
                add_product(
                    load_bias(bias_ptr, U + start, ROWS, U_TILE),
                    inner_ptr + G,
                    frame,
                    alive,
                    second_ptr + (U + start) * G,
                    2 * G,
                    1,
                    G,
                    G,
                    U_TILE,
                    CHUNK,
                    PRECISION,
                )
            )
            memory = retain * load_tile(memory_ptr, before, start, continued, U, U_TILE)
            memory += update * load_tile(candidate_ptr, frame, start, alive, U, U_TILE)
            store_tile(memory_ptr, now, start, alive, memory, U, U_TILE)
            store_tile(last_ptr, b, start, t + 1 == length, memory, U, U_TILE)
            if SAVE:
                store_tile(gates_ptr, now, start, alive, retain, 2 * U, U_TILE)
                store_tile(gates_ptr, now, U + start, alive, update, 2 * U, U_TILE)


@triton.jit(do_not_specialize=RUNTIME)
def memory_scan_memory_bwd_kernel(
    candidate_ptr,  # (T, B, U), û
    inner_ptr,  # (T, B, 2G), inner layers of γ1 and γ2, after dropout
    gates_ptr,  # (T, B, 2U), γ1 and γ2
    memory_ptr,  # (T, B, U)
    length_ptr,  # (B,) int64
    context_ptr,  # (2G, CELLS + U); only the last U columns are read
    second_ptr,  # (2, U, G)
    memory_grad_ptr,  # (B, U), gradient of the last memory; then of each step's memory
    logits_grad_ptr,  # (T, B, 3U), gradients before the activations of γ1, γ2 and û
    inner_grad_ptr,  # (T, B, 2G), gradient before the relu of the inner layers
    B,
    T,
    scale,  # 1 / (1 - dropout)
    CELLS: tl.constexpr,
    U: tl.constexpr,
    G: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the gradients of the second loop for ROWS samples, from the last step to the first."""
    U_TILE: tl.constexpr = tile_of(U, COLUMNS)
    G_TILE: tl.constexpr = tile_of(G, COLUMNS)
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
        for start in range(0, U, U_TILE):
            grad = load_tile(memory_grad_ptr, b, start, alive, U, U_TILE)
            retain = load_tile(gates_ptr, frame, start, alive, 2 * U, U_TILE)
            update = load_tile(gates_ptr, frame, U + start, alive, 2 * U, U_TILE)
            candidate = load_tile(candidate_ptr, frame, start, alive, U, U_TILE)
            memory = load_tile(memory_ptr, frame - B, start, continued, U, U_TILE)
            retain_grad = grad * memory * retain * (1.0 - retain)
            store_tile(logits_grad_ptr, frame, start, alive, retain_grad, 3 * U, U_TILE)
            update_grad = grad * candidate * update * (1.0 - update)
            store_tile(logits_grad_ptr, frame, U + start, alive, update_grad, 3 * U, U_TILE)
            candidate_grad = grad * update * (1.0 - candidate * candidate)
            store_tile(logits_grad_ptr, frame, 2 * U + start, alive, candidate_grad, 3 * U, U_TILE)
        tl.debug_barrier()
        for start in range(0, 2 * G, G_TILE):
            gate = start // G
            grad = add_product(
                tl.zeros([ROWS, G_TILE], tl.float32), logits_grad_ptr + gate * U, frame, alive,
                second_ptr + gate * U * G + start % G, 3 * U, G, 1, U, G_TILE, CHUNK, PRECISION,
            )  # fmt: skip
            inner = load_tile(inner_ptr, frame, start, alive, 2 * G, G_TILE)
            store_tile(inner_grad_ptr, frame, start, alive, tl.where(inner > 0, grad * scale, 0.0), 2 * G, G_TILE)
        tl.debug_barrier()
        for start in range(0, U, U_TILE):
            grad = load_tile(memory_grad_ptr, b, start, alive, U, U_TILE)
            grad = add_product(
                grad * load_tile(gates_ptr, frame, start, alive, 2 * U, U_TILE), inner_grad_ptr, frame, alive,
                context_ptr + CELLS + start, 2 * G, CELLS + U, 1, 2 * G, U_TILE, CHUNK, PRECISION,
            )  # fmt: skip
            store_tile(memory_grad_ptr, b, start, alive, grad, U, U_TILE)
