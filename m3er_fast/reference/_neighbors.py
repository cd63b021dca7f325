"""The neighbour search of the proxies (method step 2).

Dimension legend: Q queries, n bank rows, d features, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3er_fast.operands import upcast


def nearest_neighbors(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return squared L2 distances (Q, k), ascending, and indices (Q, k) of the k bank rows nearest to each query."""
    query, bank = upcast(query), upcast(bank)
    if not query.shape[0]:
        return query.new_zeros((0, k)), torch.zeros((0, k), dtype=torch.int64, device=query.device)
    # One query at a time, by differences: slow, but exact where ‖q‖² - 2qb + ‖b‖² cancels to noise.
    distances = torch.stack([(bank - row).square().sum(dim=1) for row in query])
    nearest = distances.topk(k, dim=1, largest=False, sorted=True)
    return nearest.values, nearest.indices
