"""The operations of M3ER as functions: arguments are checked, then the best implementation computes.

Every function takes ``backend`` (or ``engine``). "auto" chooses by the device, dtype and size of the tensors. An
explicit name is an order: it works or raises :class:`BackendUnavailableError`, and never falls back to something else.
"torch" is the plain PyTorch of :mod:`m3er_fast.reference`, on any device; "triton" is the fused kernel, for float16,
bfloat16 and float32 on CUDA.
"""

from m3er_fast.functional._check_statistics import check_statistics, gate_statistics
from m3er_fast.functional._dispatch import BackendUnavailableError
from m3er_fast.functional._local_lstsq import local_least_squares
from m3er_fast.functional._loss import class_costs, fusion_loss
from m3er_fast.functional._memory_scan import memory_scan
from m3er_fast.functional._neighbors import nearest_neighbors
from m3er_fast.functional._sequence_statistics import sequence_statistics
from m3er_fast.operands import CheckProjections, MemoryScanWeights

__all__ = [
    "BackendUnavailableError",
    "CheckProjections",
    "MemoryScanWeights",
    "check_statistics",
    "class_costs",
    "fusion_loss",
    "gate_statistics",
    "local_least_squares",
    "memory_scan",
    "nearest_neighbors",
    "sequence_statistics",
]
