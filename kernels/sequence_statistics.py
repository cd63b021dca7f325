"""The statistics of feature sequences in one kernel that reads each frame once.

A program takes one sample through its steps with all features in registers: the frame before, and the sums. Frames are
taken relative to the first valid one, so that sums of squares lose no digits to a common offset and a frozen sequence
has a variance of exactly zero.

Dimension legend: B samples, T time steps, d features; FEATURES numbers that a program holds, at least d.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3er_fast.kernels._math import LARGEST
from m3er_fast.kernels._operators import operator
from m3er_fast.kernels._specialization import TRITON_TYPE, Specialization
from m3er_fast.operands import SequenceStatistics


@triton.jit(do_not_specialize=["T"])
def sequence_statistics_fwd_kernel(
    x_ptr,  # (B, T, d) with any strides of samples and steps
    valid_ptr,  # (B, T) bool, contiguous
    mean_ptr,  # (B, d) float32
    variance_ptr,  # (B, d) float32
    change_ptr,  # (B, d) float32
    repeated_ptr,  # (B,) int64
    pair_ptr,  # (B,) int64
    T,
    stride_b,
    stride_t,
    D: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Sums over the frames of one sample."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, FEATURES)
    inside = d < D
    first = tl.zeros([FEATURES], tl.float32)
    before = tl.zeros([FEATURES], tl.float32)
    total = tl.zeros([FEATURES], tl.float32)
    squares = tl.zeros([FEATURES], tl.float32)
    changes = tl.zeros([FEATURES], tl.float32)
    # Tensors, which a loop may carry and the type checker follows.
    frames = tl.full([], 0, tl.int32)
    pairs = tl.full([], 0, tl.int32)
    repeated = tl.full([], 0, tl.int32)
    was_valid = tl.full([], 0, tl.int32)
    zero = tl.full([], 0, tl.int64)  # offsets may pass 2^31
    for t in range(T):
        valid = tl.load(valid_ptr + b * T + t).to(tl.int32)
        if valid != 0:
            x = tl.load(x_ptr + b * stride_b + (zero + t) * stride_t + d, mask=inside, other=0.0).to(tl.float32)
            first = tl.where(frames == 0, x, first)
            shifted = x - first
            total += shifted
            squares += shifted * shifted
            difference = tl.where(was_valid != 0, x - before, 0.0)
            changes += difference * difference
            pairs += was_valid
            is_equal = tl.max((difference != 0).to(tl.int32), axis=0) == 0
            repeated += tl.where(is_equal, was_valid, 0)
            frames += 1
            before = x
        was_valid = valid
    count = tl.maximum(frames, 1).to(tl.float32)
    shift = total / count
    mean = first + shift
    mean = tl.where(tl.abs(mean) <= LARGEST, mean, 0.0)
    variance = squares / count - shift * shift
    variance = tl.where(variance < 0.0, 0.0, tl.where(variance <= LARGEST, variance, LARGEST))
    change = changes / (2.0 * tl.maximum(pairs, 1).to(tl.float32))
    change = tl.where(change <= LARGEST, change, LARGEST)  # also for inf
    row = b * D + d
    tl.store(mean_ptr + row, mean, mask=inside)
    tl.store(variance_ptr + row, variance, mask=inside)
    tl.store(change_ptr + row, change, mask=inside)
    tl.store(repeated_ptr + b, repeated.to(tl.int64))
    tl.store(pair_ptr + b, pairs.to(tl.int64))


# --- Launching ---


def _constants(features: int) -> dict[str, Any]:
    return {"D": features, "FEATURES": max(32, triton.next_power_of_2(features))}


def _compile_options(features: int) -> dict[str, Any]:
    # About eight numbers of each sum per thread.
    warps = max(1, min(16, triton.next_power_of_2(features) // 256))
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def _forward(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, steps, features = x.shape
    mean, variance, change = (x.new_empty((batch, features), dtype=torch.float32) for _ in range(3))
    repeated, pairs = (x.new_empty(batch, dtype=torch.int64) for _ in range(2))
    if batch:
        x = x if x.stride(2) == 1 or features == 1 else x.contiguous()
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(x):
            sequence_statistics_fwd_kernel[(batch,)](
                x, valid.contiguous(), mean, variance, change, repeated, pairs, steps, x.stride(0), x.stride(1),
                **_constants(features), **_compile_options(features),
            )  # fmt: skip
    return mean, variance, change, repeated, pairs


# --- The op ---


sequence_statistics_op = operator("sequence_statistics")(_forward)


@sequence_statistics_op.register_fake
def _fake(x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    batch, _, features = x.shape
    moments = (x.new_empty((batch, features), dtype=torch.float32) for _ in range(3))
    return (*moments, *(x.new_empty(batch, dtype=torch.int64) for _ in range(2)))


def sequence_statistics(x: Tensor, valid: Tensor) -> SequenceStatistics:
    """:func:`m3er_fast.functional.sequence_statistics` of checked arguments, float16, bfloat16 or float32."""
    # Outside the compiler without the dispatcher, which takes longer than a small batch.
    compute: Any = sequence_statistics_op if torch.compiler.is_compiling() else _forward
    return SequenceStatistics(*compute(x, valid))


# --- How the kernel is compiled ---


def specializations() -> Iterator[Specialization]:
    """Yield the paper's feature counts in both precisions, and the largest."""
    for features in (300, 74, 36, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            pointers = {"x_ptr": f"*{TRITON_TYPE[dtype]}", "valid_ptr": "*i1", "mean_ptr": "*fp32"}
            pointers |= {"variance_ptr": "*fp32", "change_ptr": "*fp32", "repeated_ptr": "*i64", "pair_ptr": "*i64"}
            yield Specialization(
                f"d={features} {TRITON_TYPE[dtype]}",
                sequence_statistics_fwd_kernel,
                pointers | dict.fromkeys(("T", "stride_b", "stride_t"), "i32"),
                _constants(features),
                frozenset(pointers) - {"valid_ptr"},
                _compile_options(features),
                vectorized=False,  # few features per thread, each row at its own alignment
            )
