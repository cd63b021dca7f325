"""Parts of the memory scan's kernels: the layers of one step, and dropout.

Dropout has a counter-based generator: whether a unit is dropped depends on the seed, the frame, the layer and the unit
only. The backward pass draws zeros: a dropped unit is one whose value is zero.

Dimension legend: N frames, SIZE numbers of a frame; ROWS frames and COLUMNS or OUT numbers of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers of the layers with dropout, which draw different random numbers.
ATTENTION = tl.constexpr(0)
CANDIDATE = tl.constexpr(1)
GATES = tl.constexpr(2)
# Neither batch sizes nor numbers of steps cause a recompilation.
RUNTIME = ["B", "T", "slots", "N"]


@triton.constexpr_function
def tile_of(size, most):
    """Return the largest power of two, up to ``most``, that divides the size."""
    return min(size & -size, most)


@triton.jit
def load_tile(ptr, row, start, mask, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Load (ROWS, COLUMNS) from column ``start`` of a matrix with rows STRIDE apart; zeros where the mask is off."""
    offsets = row[:, None] * STRIDE + (start + tl.arange(0, COLUMNS))[None, :]
    return tl.load(ptr + offsets, mask=mask[:, None], other=0.0)


@triton.jit
def store_tile(ptr, row, start, mask, value, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Store (ROWS, COLUMNS) from column ``start`` of a matrix with rows STRIDE apart, where the mask is on."""
    offsets = row[:, None] * STRIDE + (start + tl.arange(0, COLUMNS))[None, :]
    tl.store(ptr + offsets, value, mask=mask[:, None])


@triton.jit
def load_bias(ptr, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load COLUMNS numbers of a bias, repeated in each row."""
    bias = tl.load(ptr + start + tl.arange(0, COLUMNS)).to(tl.float32)
    return tl.zeros([ROWS, COLUMNS], tl.float32) + bias[None, :]


@triton.jit
def add_product(
    total,  # (ROWS, OUT)
    x_ptr,  # rows STRIDE apart, SIZE of their columns
    row,
    mask,
    weight_ptr,  # (SIZE, OUT) with strides IN_STRIDE and OUT_STRIDE
    STRIDE: tl.constexpr,
    IN_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return ``total`` + x · weight, of which at most CHUNK columns of x are multiplied at a time."""
    TILE: tl.constexpr = tile_of(SIZE, CHUNK)
    for start in range(0, SIZE, TILE):
        x = load_tile(x_ptr, row, start, mask, STRIDE, TILE)
        k = start + tl.arange(0, TILE)
        weight = tl.load(weight_ptr + (k[:, None] * IN_STRIDE + tl.arange(0, OUT)[None, :] * OUT_STRIDE))
        total = tl.dot(x, weight.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def dropout_mask(seed_ptr, row, start, dropout, LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return (ROWS, COLUMNS) of 0 for the units that are dropped, and of 1 / (1 - dropout) for the others."""
    zeros = tl.zeros([ROWS, COLUMNS], tl.int32)
    low, high = row.to(tl.int32)[:, None] + zeros, (row >> 32).to(tl.int32)[:, None] + zeros
    unit = (start + tl.arange(0, COLUMNS)).to(tl.int32)[None, :] + zeros
    draw, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, unit, zeros + LAYER)
    return tl.where(tl.uint_to_uniform_float(draw) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit(do_not_specialize=RUNTIME)
def memory_scan_dropout_kernel(
    x_ptr,  # (N, SIZE), the inner layer of û: before relu, and on return after relu and dropout
    seed_ptr,
    N,
    dropout,
    LAYER: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Apply relu and dropout to ROWS frames, in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for start in range(0, SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < N)[:, None] & (column < SIZE)[None, :]
        offsets = row[:, None] * SIZE + column[None, :]
        x = tl.maximum(tl.load(x_ptr + offsets, mask=mask, other=0.0), 0.0)
        tl.store(x_ptr + offsets, x * dropout_mask(seed_ptr, row, start, dropout, LAYER, ROWS, COLUMNS), mask=mask)
