"""How many of the true neighbours an index finds."""

from __future__ import annotations

import torch
from torch import Tensor

from m3er_fast.neighbors.exact import search_exact
from m3er_fast.neighbors.index import NeighborIndex

# Rows of the bank that serve as queries.
_RECALL_QUERIES = 256


def measure_recall(index: NeighborIndex, bank: Tensor, k: int, *, allowed: Tensor | None = None) -> float:
    """Return the share of the k nearest neighbours that ``index`` finds, averaged over up to 256 rows of its bank.

    A row does not count as its own neighbour. A row as near as the k-th nearest counts as found: the choice among
    equally distant rows does not matter.
    """
    rows = torch.arange(bank.shape[0]) if allowed is None else allowed.nonzero()[:, 0].cpu()
    k = min(k, len(rows) - 1)
    if k < 1:
        return 1.0
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    chosen = rows[order[:_RECALL_QUERIES]].to(bank.device)
    query = bank[chosen]
    # The nearest one is the row itself or an equal one.
    farthest = search_exact(query, bank, k + 1, allowed=allowed)[0][:, -1:]
    _, found = index.search(query, k + 1)
    distances = (bank[found] - query[:, None, :]).square().sum(dim=2)
    hits = (distances <= farthest * (1 + 1e-5)).sum(dim=1) - 1
    return float(hits.clamp(min=0).double().mean()) / k
