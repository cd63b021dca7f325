"""What an index of a bank promises, and what can be asked for.

Dimension legend: Q queries, k neighbours.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

NeighborEngine = Literal["auto", "torch", "faiss", "faiss-ivf", "faiss-hnsw"]
EXACT_ENGINES = ("auto", "torch", "faiss")

MEMORY_BUDGET = 256 * 2**20
"""Default bytes that a search may take beside its arguments and results."""


class FaissUnavailableError(RuntimeError):
    """FAISS is not installed or does not load."""


class NeighborIndex(Protocol):
    """A bank prepared for searches.

    Squared distances ascend, every row number is one of the bank's, and a query that is not finite gets distances of
    inf.
    """

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Squared distances (Q, k), ascending, and rows of the bank (Q, k), int64; k at most the rows allowed."""
        ...
