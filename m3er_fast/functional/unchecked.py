"""The operations for arguments that were checked already: how the model's own steps enter.

What :mod:`m3er_fast.functional` checks at its public door, a model has checked at its own.
"""

from m3er_fast.functional._check_statistics import compute_check_statistics as check_statistics
from m3er_fast.functional._local_lstsq import solve_local_least_squares as local_least_squares
from m3er_fast.functional._memory_scan import run_memory_scan as memory_scan
from m3er_fast.functional._neighbors import neighbor_index
from m3er_fast.functional._sequence_statistics import compute_sequence_statistics as sequence_statistics

__all__ = ["check_statistics", "local_least_squares", "memory_scan", "neighbor_index", "sequence_statistics"]
