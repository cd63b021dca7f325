"""What every kernel file needs around its kernels: where they can run, what they move, and how they are compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

# Under TRITON_INTERPRET=1, read when a kernel is defined, kernels run on the CPU, slowly: for tests.
INTERPRETED = bool(triton.knobs.runtime.interpret)

TRITON_TYPE = {
    torch.bool: "i1",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


class Work(NamedTuple):
    """What an op must at least do: its floor is the larger of bytes / bandwidth and flops / rate."""

    bytes: int  # each input read once, each output written once
    flops: int
    unit: Literal["fp64", "fp32", "tf32x3", "bf16"] = "fp32"  # the arithmetic unit whose rate bounds the flops


@dataclass(frozen=True)
class Specialization:
    """One way in which a kernel gets compiled: enough to compile it ahead of time, on a machine without a GPU."""

    label: str
    kernel: Any  # the triton.JITFunction
    types: Mapping[str, str | tuple[str, ...]]  # run-time argument -> Triton type: "*fp32", "i64", or a tuple of them
    constants: Mapping[str, Any]  # compile-time argument -> value
    aligned: frozenset[str] = frozenset()  # pointers and integers that are multiples of 16
    options: Mapping[str, Any] = field(default_factory=dict)  # num_warps, num_stages, enable_fp_fusion
    vectorized: bool = True  # whether its bulk loads can be wider than one element
    targets: tuple[int, ...] = (80, 90, 100)  # generations of GPU that are given this one


def capability(tensor: Tensor) -> int:
    """Generation of the tensor's GPU: 80 for compute capability 8.0; under the interpreter 90."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def unavailable_reason(tensor: Tensor) -> str | None:
    """Why Triton kernels cannot run where ``tensor`` is, or None if they can."""
    if INTERPRETED:
        return None if tensor.device.type == "cpu" else f"TRITON_INTERPRET=1 runs on the CPU, not on {tensor.device}"
    if tensor.device.type != "cuda":
        return f"Triton kernels need CUDA tensors, got one on {tensor.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return f"Triton kernels need compute capability 8.0 or more, {tensor.device} has less"
    return None
