"""Nearest neighbours: arguments are checked here, and then searched for.

Dimension legend: Q queries, n bank rows, d features, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3er_fast._validation import check_choice, check_matrix, check_positive_int
from m3er_fast.functional._dispatch import BackendUnavailableError, choose_index
from m3er_fast.neighbors import MEMORY_BUDGET, FaissUnavailableError, NeighborEngine, NeighborIndex


def nearest_neighbors(query: Tensor, bank: Tensor, k: int, *, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """Find the k rows of ``bank`` nearest to each query in the L2 norm.

    Args:
        query: (Q, d). A query that is not finite has no neighbours: distances inf, indices 0..k-1.
        bank: (n, d), n ≥ 1, finite.
        k: how many; more than n gives n.
        engine: "torch" (exact, bounded memory), "faiss" (exact, float32), "faiss-ivf" or "faiss-hnsw" (approximate, on
            an index that this call builds), or "auto", which is "torch" for every size and device. On CUDA tensors
            "faiss" and "faiss-ivf" need a FAISS with GPU support; "faiss-hnsw" computes on the CPU.

    Returns:
        Squared distances (Q, min(k, n)), ascending, in at least float32, and row indices of the same shape, int64.
        "torch" is exact up to the rounding of the distances themselves, on the CPU; on other devices rows whose
        distances agree to float32's precision of ‖q - c‖², c the bank's middle, may stand in for each other. Its
        distances have gradients, of queries and bank; those of FAISS have none.

    Raises:
        ValueError: naming the argument and its shape.
        BackendUnavailableError: if faiss is asked for and does not work here.
    """
    check_matrix("query", query)
    check_matrix("bank", bank)
    if query.shape[1] != bank.shape[1]:
        raise ValueError(f"query has {query.shape[1]} features, but bank has {bank.shape[1]}")
    if not bank.shape[0]:
        raise ValueError("bank is empty: wanted at least one row")
    if bank.device.type == "cpu" and not _all_finite(bank):
        raise ValueError("bank must be finite, got NaN or inf in it")
    check_positive_int("k", k)
    check_choice("engine", engine, NeighborEngine)
    return neighbor_index(bank, engine).search(query, min(k, bank.shape[0]))


def neighbor_index(
    bank: Tensor, engine: str, *, allowed: Tensor | None = None, memory_budget: int = MEMORY_BUDGET
) -> NeighborIndex:
    """A bank prepared for many searches, from checked arguments.

    Args:
        bank: (n, d), n ≥ 1, finite.
        engine: one of ``NeighborEngine``.
        allowed: (n,) bool, the rows that may be neighbours, at least one; None for all.
        memory_budget: bytes that a search may take beside arguments and results; only "torch" keeps to it.

    Raises:
        BackendUnavailableError: if FAISS is asked for and does not work here.
    """
    try:
        return choose_index(engine, bank)(bank, allowed, memory_budget)
    except FaissUnavailableError as error:
        raise BackendUnavailableError(f"nearest_neighbors: engine {engine!r} does not work here: {error}") from error


def _all_finite(matrix: Tensor) -> bool:
    """Whether a matrix holds no NaN or inf, in one pass: ``isfinite`` would write a mask as well."""
    low, high = matrix.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
