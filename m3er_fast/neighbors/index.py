"""The interface of an index, and the engines that build one.

Dimension legend: Q queries, k neighbours.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

NeighborEngine = Literal["auto", "torch", "faiss", "faiss-ivf", "faiss-hnsw"]
"""Engines by name."""

EXACT_ENGINES: tuple[NeighborEngine, ...] = ("auto", "torch", "faiss")
"""Engines that find every neighbour; the others find most."""

MEMORY_BUDGET = 256 * 2**20
"""Bytes that a search may take beside its arguments and results, by default."""


class FaissUnavailableError(RuntimeError):
    """FAISS is not installed or does not load."""


class NeighborIndex(Protocol):
    """A bank prepared for searches."""

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return squared distances (Q, k), ascending, and the numbers of their rows (Q, k), int64.

        A query that is not finite gets distances of inf and some of the rows. ``k`` must not exceed the number of rows
        that may be neighbours.
        """
        ...
