"""Where the Triton kernels can run."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

# With TRITON_INTERPRET=1, which is read when a kernel is defined, kernels run on the CPU, slowly: for tests.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def capability(tensor: Tensor) -> int:
    """Return the generation of the tensor's GPU: 80 for compute capability 8.0; in the interpreter 90."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def unavailable_reason(tensor: Tensor) -> str | None:
    """Return why Triton kernels cannot run on the tensor's device, or None if they can."""
    if INTERPRETED:
        return None if tensor.device.type == "cpu" else f"TRITON_INTERPRET=1 runs on the CPU, not on {tensor.device}"
    if tensor.device.type != "cuda":
        return f"Triton kernels need CUDA tensors, got one on {tensor.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return f"Triton kernels need compute capability 8.0 or more, {tensor.device} has less"
    return None
