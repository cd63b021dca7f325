"""How each kernel is compiled, so that it can be compiled without a GPU and without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

TRITON_TYPE = {
    torch.bool: "i1",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


@dataclass(frozen=True)
class Specialization:
    """One set of arguments that a kernel is compiled for: enough to compile it ahead of time, without a GPU."""

    label: str
    kernel: Any  # the triton.JITFunction
    types: Mapping[str, str | tuple[str, ...]]  # run-time argument -> Triton type: "*fp32", "i64", or a tuple of them
    constants: Mapping[str, Any]  # compile-time argument -> value
    aligned: frozenset[str] = frozenset()  # pointers and integers that are multiples of 16
    options: Mapping[str, Any] = field(default_factory=dict)  # num_warps, num_stages, enable_fp_fusion
    vectorized: bool = True  # whether its bulk loads can be wider than one element
    targets: tuple[int, ...] = (80, 90, 100)  # generations of GPU that this specialization is for
