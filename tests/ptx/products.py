"""Matrix products of a warp, as tensor cores compute them.

Products of two inputs are exact. A block of them is added to the accumulator in fixed point: each term is cut off below
the 24 leading digits and one guard digit of the largest term, and the sum is cut off to float32. NVIDIA does not
document this; it is what measurements of its GPUs show (Fasi, Higham, Mikaitis and Pranesh, PeerJ Computer Science,
2021).
``exact`` sums in float64 and rounds once instead.

Dimensions: W warps, M = 16 rows, N columns, K products a sum. A warp's lane 4g + t holds rows g and g + 8.
"""

import numpy as np

from ptx.numerics import F32, F64, U16, U32, U64, from_bf16, from_f16, to_tf32

# Products that are added at once by a multiprocessor of sm_80 (mma) and of sm_90 (wgmma).
_MMA_BLOCK = {"tf32": 4, "bf16": 8, "f16": 8}
_WGMMA_BLOCK = {"tf32": 8, "bf16": 16, "f16": 16}


def mma(a, b, c, kind, exact=False):
    """The four registers of a · b + c, of m16n8.

    Args:
        a: registers of A: its halves of rows, then its halves of K. 4 of them, or 2 where K has one half.
        b: registers of B: 2 of them, or 1.
        c: 4 registers, float32.
        kind: "tf32", "bf16" or "f16".
        exact: sum in float64.
    """
    columns = np.concatenate([_elements(x, kind) for x in b], axis=-1).swapaxes(1, 2)
    total = _sum(_rows(a, kind), columns, _accumulator(c), _MMA_BLOCK[kind], exact)
    return _registers(total)


def wgmma(a, b, c, kind, exact=False):
    """The N / 2 registers of a · b + c, of the 16 rows of each warp of a group.

    Args:
        a: 4 registers of A as in ``mma``, or a matrix [W, M, K] from shared memory.
        b: matrix [W, K, N] from shared memory.
        c: N / 2 registers, float32.
        kind: "tf32", "bf16" or "f16".
        exact: sum in float64.
    """
    rows = a if isinstance(a, np.ndarray) else _rows(a, kind)
    return _registers(_sum(rows, b, _accumulator(c), _WGMMA_BLOCK[kind], exact))


def values(bits, kind):
    """float32 values of inputs: 32 bits of tf32, whose last 13 digits are ignored, or 16 bits of bf16 or f16."""
    if kind == "tf32":
        return to_tf32(bits, "rz").view(F32)
    return from_bf16(bits) if kind == "bf16" else from_f16(bits)


def _elements(register, kind):
    """A register of every lane as a part of a matrix [W, 8, 4 or 8]: lane 4g + t holds one or two columns of row g."""
    bits = np.ascontiguousarray(register, U32)
    return values(bits if kind == "tf32" else bits.view(U16), kind).reshape(len(bits) // 32, 8, -1)


def _rows(a, kind):
    """The matrix [W, 16, K] in registers."""
    parts = [_elements(x, kind) for x in a]
    return np.concatenate([np.concatenate(parts[half::2], axis=2) for half in (0, 1)], axis=1)


def _accumulator(c):
    """The matrix [W, 16, N] in registers: 2 columns of row g, the same of row g + 8, for every 8 columns."""
    c = np.stack([np.asarray(x, U32) for x in c]).view(F32)
    parts = c.reshape(len(c) // 4, 2, 2, -1, 8, 4)  # columns / 8, half of the rows, odd column, W, g, t
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(parts.shape[3], 16, -1)


def _registers(matrix):
    """Registers of a matrix [W, 16, N]: the inverse of ``_accumulator``."""
    warps, _, columns = matrix.shape
    parts = matrix.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(np.ascontiguousarray(parts).view(U32).reshape(columns // 2, warps * 32))


def _sum(a, b, c, block, exact):
    """a [W, 16, K] · b [W, K, N] + c [W, 16, N], float32."""
    a, b = a.astype(F64), b.astype(F64)
    if exact:
        return (a @ b + c).astype(F32)
    # [K, 16, N, W]: NumPy's inner loops run over the warps.
    a = np.ascontiguousarray(a.transpose(2, 1, 0))[:, :, None]
    b = np.ascontiguousarray(b.transpose(1, 2, 0))[:, None]
    c = c.transpose(1, 2, 0)
    for first in range(0, len(a), block):
        part = slice(first, first + block)
        c = _fixed_point_sum(np.concatenate([a[part] * b[part], c[None]]))
    return c.transpose(2, 0, 1)


def _fixed_point_sum(terms):
    """The sum of float64 terms over the first axis, float32."""
    largest = np.abs(terms).max(axis=0)
    power = (largest.view(U64) & U64(0x7FF << 52)).view(F64)  # of two, at most the largest term
    unit = np.maximum(power, 2.0**-125) * 2.0**-24
    total = np.trunc(terms / unit).sum(axis=0) * unit
    result = (total.view(U64) & ~U64(0x1FFFFFFF)).view(F64).astype(F32)  # without what float32 has no place for
    finite = np.isfinite(largest)
    return result if finite.all() else np.where(finite, result, terms.sum(axis=0).astype(F32))
