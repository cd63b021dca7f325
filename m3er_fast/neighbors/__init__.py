"""Nearest neighbours in the L2 norm: indices of a bank that are built once and searched often."""

from m3er_fast.neighbors.exact import ExactIndex
from m3er_fast.neighbors.index import (
    EXACT_ENGINES,
    MEMORY_BUDGET,
    FaissUnavailableError,
    NeighborEngine,
    NeighborIndex,
)
from m3er_fast.neighbors.recall import measure_recall

__all__ = [
    "EXACT_ENGINES",
    "MEMORY_BUDGET",
    "ExactIndex",
    "FaissUnavailableError",
    "NeighborEngine",
    "NeighborIndex",
    "measure_recall",
]
