"""Constants and functions of float32 numbers that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)  # finite float32
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # positive normal float32
LOG2_E = tl.constexpr(1.4426950408889634)  # log2(e)


@triton.jit
def exp(x):
    """Return e^x by the hardware's 2^x: tl.exp spends three more instructions on subnormal results."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, with an absolute error of 1e-7."""
    return 2.0 / (1.0 + tl.exp2(x * (-2.0 * LOG2_E))) - 1.0
