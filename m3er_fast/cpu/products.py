"""Products of large matrices on the CPU by the faster of torch's two libraries.

Torch multiplies float32 matrices by MKL, which leaves AVX-512 unused on processors of other makers than its own.
oneDNN, which torch holds too, uses it on all: on an AMD EPYC a large product takes half the time, a small one more.

oneDNN compiles code for every shape that it meets, which takes as long as a large product. It therefore gets pieces of
few sizes, and MKL the rows that remain.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Operations of floating point from which oneDNN is faster: a call takes 10 µs.
FEWEST_OPERATIONS = 5_000_000
# Rows of the largest piece: new memory for larger results costs more than they take.
MOST_ROWS = 2560
# A gradient with fewer inputs or outputs is not worth the copies of its factors that oneDNN takes.
FEWEST_FEATURES = 48


def add_product_(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``total`` (n, o) += ``x`` (n, k) @ ``y`` (k, o)."""
    if not _is_large(x, y.shape[1]):
        return total.addmm_(x, y)
    weight = _dense(y.mT)
    for rows, is_large in _pieces(x, y.shape[1]):
        if is_large:
            total[rows].add_(_linear(x[rows], weight))
        else:
            total[rows].addmm_(x[rows], y)
    return total


def new_product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` (n, k) @ ``y`` (k, o), plus the bias (o,) of every row."""
    if not _is_large(x, y.shape[1]):
        return x @ y if bias is None else torch.addmm(bias, x, y)
    weight = _dense(y.mT)
    parts = [
        _linear(x[rows], weight, bias) if is_large else torch.nn.functional.linear(x[rows], weight, bias)
        for rows, is_large in _pieces(x, y.shape[1])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def matrix_product(x: Tensor, y: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out`` (n, o) = ``x`` (n, k) @ ``y`` (k, o), plus the bias (o,) of every row."""
    if not _is_large(x, y.shape[1]):
        return torch.mm(x, y, out=out) if bias is None else torch.addmm(bias, x, y, out=out)
    weight = _dense(y.mT)
    for rows, is_large in _pieces(x, y.shape[1]):
        if is_large:
            out[rows] = _linear(x[rows], weight, bias)
        else:
            out[rows] = torch.nn.functional.linear(x[rows], weight, bias)
    return out


def add_gradient_(total: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """``total`` (o, i) += ``grad`` (n, o)ᵀ @ ``x`` (n, i): the gradient of a linear layer's weight."""
    if min(total.shape) < FEWEST_FEATURES or not _is_large(x, grad.shape[1]):
        return total.addmm_(grad.mT, x)
    for rows, is_large in _pieces(x, grad.shape[1]):
        if is_large:
            factors = grad[rows].to_mkldnn(), x[rows].to_mkldnn()
            total.add_(torch.ops.aten.mkldnn_linear_backward_weights(*factors, total, False)[0])
        else:
            total.addmm_(grad[rows].mT, x[rows])
    return total


def add_products_(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Each matrix of ``total`` (M, n, o) += its ``x`` (M, n, k) @ ``y`` (M, k, o)."""
    if not _is_large(x[0], y.shape[2]):
        return total.baddbmm_(x, y)
    for matrices in zip(total, x, y, strict=True):
        add_product_(*matrices)
    return total


def matrix_products(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Each matrix of ``out`` (M, n, o) = its ``x`` (M, n, k) @ ``y`` (M, k, o)."""
    if not _is_large(x[0], y.shape[2]):
        return torch.bmm(x, y, out=out)
    for a, b, result in zip(x, y, out, strict=True):
        matrix_product(a, b, result)
    return out


def add_gradients_(total: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Each matrix of ``total`` (M, o, i) += its ``grad`` (M, n, o)ᵀ @ ``x`` (M, n, i)."""
    if not _is_large(x[0], grad.shape[2]):
        return total.baddbmm_(grad.mT, x)
    for matrices in zip(total, grad, x, strict=True):
        add_gradient_(*matrices)
    return total


def _is_large(x: Tensor, columns: int) -> bool:
    """Whether oneDNN is the faster one for the product of ``x`` (n, k) with a matrix of so many columns."""
    rows, inner = x.shape
    return 2 * rows * inner * columns >= FEWEST_OPERATIONS and x.dtype == torch.float32 and onednn_is_faster()


def _pieces(x: Tensor, columns: int) -> Iterator[tuple[slice, bool]]:
    """Pieces of the rows of ``x`` (n, k), and whether each is large: then it has a multiple of a power of two of rows.

    Only the first three binary digits of their number are not zero.
    """
    start, rows, inner = 0, *x.shape
    fewest = FEWEST_OPERATIONS / (2 * inner * columns)
    while start < rows:
        size = min(rows - start, MOST_ROWS)
        if size < fewest:
            yield slice(start, rows), False
            return
        zeros = max(size.bit_length() - 3, 0)
        size = size >> zeros << zeros
        yield slice(start, start + size), True
        start += size


def _dense(weight: Tensor) -> Tensor:
    """``weight`` without gaps, in the order of its rows or of its columns: oneDNN takes a slow path for all others."""
    return weight if weight.is_contiguous() or weight.mT.is_contiguous() else weight.contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor of AMD with AVX-512, and torch has oneDNN."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not onednn_is_callable():
        return False
    try:
        return "AuthenticAMD" in platform.processor() or "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def onednn_is_callable() -> bool:
    """Whether torch has oneDNN and the operators by which it is called here; they are the compiler's own."""
    calls = (torch.ops.mkldnn, "_linear_pointwise"), (torch.ops.aten, "mkldnn_linear_backward_weights")
    return torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
        hasattr(namespace, name) for namespace, name in calls
    )
