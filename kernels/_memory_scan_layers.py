"""What the memory scan's kernels share: a layer of one step, and dropout.

Dropout is drawn by a counter: whether a unit of a frame is dropped depends on the seed, the frame, the layer and the
unit only. The way back draws nothing: a unit that was dropped is one whose value is zero.

Dimension legend: N frames, SIZE numbers of a frame; ROWS frames and COLUMNS or OUT numbers of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Layers with a dropout of their own.
ATTENTION = tl.constexpr(0)
CANDIDATE = tl.constexpr(1)
GATES = tl.constexpr(2)
# Nothing is compiled anew for a batch size or a number of steps.
RUNTIME = ["B", "T", "slots", "N"]


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def tanh(x):
    """To 1e-7 absolute."""
    return 2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0


@triton.jit
def tile(ptr, row, start, mask, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of a matrix whose rows are STRIDE apart, from column ``start``; zeros where the mask is off."""
    offsets = row[:, None] * STRIDE + (start + tl.arange(0, COLUMNS))[None, :]
    return tl.load(ptr + offsets, mask=mask[:, None], other=0.0)


@triton.jit
def put(ptr, row, start, mask, value, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    offsets = row[:, None] * STRIDE + (start + tl.arange(0, COLUMNS))[None, :]
    tl.store(ptr + offsets, value, mask=mask[:, None])


@triton.jit
def bias(ptr, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A piece of a bias, the same in each row."""
    bias = tl.load(ptr + start + tl.arange(0, COLUMNS)).to(tl.float32)
    return tl.zeros([ROWS, COLUMNS], tl.float32) + bias[None, :]


@triton.jit
def add_product(
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
        x = tile(x_ptr, row, start, mask, STRIDE, CHUNK)
        k = start + tl.arange(0, CHUNK)
        weight = tl.load(weight_ptr + (k[:, None] * IN_STRIDE + tl.arange(0, OUT)[None, :] * OUT_STRIDE))
        total = tl.dot(x, weight.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def add_products(
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
        x = tile(x_ptr, row, start, mask, STRIDE, CHUNK)
        k = start + tl.arange(0, CHUNK)
        added = ()
        for i in tl.static_range(4):
            offsets = i * NEXT + k[:, None] + tl.arange(0, OUT)[None, :] * OUT_STRIDE
            weight = tl.load(weight_ptr + offsets).to(tl.float32)
            added = added + (tl.dot(x, weight, totals[i], input_precision=PRECISION),)
        totals = added
    return totals


@triton.jit
def kept(seed_ptr, row, start, dropout, LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of 1 / (1 - dropout), and of 0 for the units that are dropped."""
    nothing = tl.zeros([ROWS, COLUMNS], tl.int32)
    low, high = row.to(tl.int32)[:, None] + nothing, (row >> 32).to(tl.int32)[:, None] + nothing
    unit = (start + tl.arange(0, COLUMNS)).to(tl.int32)[None, :] + nothing
    draw, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, unit, nothing + LAYER)
    return tl.where(tl.uint_to_uniform_float(draw) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit(do_not_specialize=RUNTIME)
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
        tl.store(x_ptr + offsets, x * kept(seed_ptr, row, start, dropout, LAYER, ROWS, COLUMNS), mask=mask)
