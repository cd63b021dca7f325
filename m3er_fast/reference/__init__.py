"""Every operation of M3ER in plain PyTorch: the definition, and the yardstick of every faster implementation.

The functions assume checked arguments (:mod:`m3er_fast.functional` checks them) and take any floating dtype; half
precision is computed in float32. Gradients are autograd's.
"""

from m3er_fast.operands import CheckProjections, MemoryScanWeights
from m3er_fast.reference._check_statistics import check_statistics
from m3er_fast.reference._local_lstsq import SMALLEST_CHOLESKY_RIDGE, local_least_squares
from m3er_fast.reference._loss import (
    class_costs,
    fusion_costs,
    fusion_loss,
    fusion_loss_of,
    fusion_weights,
    log_probabilities,
)
from m3er_fast.reference._memory_scan import memory_scan, memory_scan_gradients
from m3er_fast.reference._neighbors import nearest_neighbors
from m3er_fast.reference._sequence_statistics import sequence_statistics

__all__ = [
    "SMALLEST_CHOLESKY_RIDGE",
    "CheckProjections",
    "MemoryScanWeights",
    "check_statistics",
    "class_costs",
    "fusion_costs",
    "fusion_loss",
    "fusion_loss_of",
    "fusion_weights",
    "local_least_squares",
    "log_probabilities",
    "memory_scan",
    "memory_scan_gradients",
    "nearest_neighbors",
    "sequence_statistics",
]
