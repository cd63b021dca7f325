"""The statistics of feature sequences: arguments are checked here, and then computed.

Dimension legend: B samples, T time steps, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3er_fast._validation import check_device
from m3er_fast.functional._autograd import without_autocast
from m3er_fast.functional._dispatch import choose
from m3er_fast.operands import SequenceStatistics


def sequence_statistics(x: Tensor, valid: Tensor, *, backend: str = "auto") -> SequenceStatistics:
    """Compute the moments of feature sequences that the modality check judges by, in one pass over the frames.

    Over the valid frames x_t of a sample, and over the pairs of consecutive frames that are both valid:

        mean = E x_t,   variance = E (x_t - mean)²,   change = ½ E (x_t - x_{t-1})²

    each feature by itself. White noise has change = variance; a smooth signal has less change, a frozen one none (the
    ratio is half of von Neumann's, 1941). Without a pair the change is 0.

    Args:
        x: (B, T, d), whatever it holds where not ``valid``; half precision is computed in float32.
        valid: (B, T) bool, the frames that count.
        backend: "auto", "torch" or "triton".

    Returns:
        mean, variance and change (B, d), the frames that equal the frame before (B,), and the pairs (B,). Moments that
        overflow, or are of frames that are not finite, are the largest number; such a mean is 0.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
        BackendUnavailableError: if the backend asked for does not work here.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0], [3.0]]])
        >>> found = sequence_statistics(x, torch.ones(1, 3, dtype=torch.bool))
        >>> found.change.item(), found.repeated.item(), found.pairs.item()
        (1.0, 1, 2)
    """
    if x.ndim != 3 or not x.is_floating_point() or not x.shape[1] or not x.shape[2]:
        raise ValueError(f"x must be floating of shape (B, T, d) with T, d ≥ 1, got {x.dtype} of {tuple(x.shape)}")
    if valid.shape != x.shape[:2] or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool of shape {tuple(x.shape[:2])}, got {valid.dtype} of {tuple(valid.shape)}")
    check_device("the sequences", x, valid=valid)
    return compute_sequence_statistics(x, valid, backend=backend)


def compute_sequence_statistics(x: Tensor, valid: Tensor, *, backend: str = "auto") -> SequenceStatistics:
    """:func:`sequence_statistics` of checked arguments."""
    compute = choose("sequence_statistics", backend, x, valid).load()
    with without_autocast(x.device):  # which would round products of the frames to 8 bits
        statistics: SequenceStatistics = compute(x, valid)
    return statistics
