"""Exact nearest neighbours in the L2 norm; the only file that imports FAISS.

Dimension legend: Q queries, n bank rows, d features, k neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3er_fast.reference import upcast

# Distances and candidates of one tile each stay below this many bytes: enough for large products, little beside a bank.
_TILE_BYTES = 32 * 2**20
# Candidates beyond k whose distances are computed again by differences: the products' rounding may reorder near ties.
_SPARE_CANDIDATES = 8
# About so many rows of the bank, evenly spread, say where its middle is.
_CENTER_ROWS = 256


class FaissUnavailableError(RuntimeError):
    """FAISS is not installed or does not load."""


def search_torch(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact search by tiles of matrix products, memory bounded; see ``functional.nearest_neighbors``.

    ‖q - b‖² = ‖q‖² - 2q·b + ‖b‖² cancels where neighbours are close and far from the origin, so the products are taken
    about the middle of the bank, and the best candidates are measured again by their differences.
    """
    dtype = torch.promote_types(upcast(query[:0]).dtype, bank.dtype)
    query, bank = query.to(dtype), bank.to(dtype)
    # The median of some rows: unlike the mean it neither overflows nor follows a single row that lies far out.
    center = bank[:: max(1, bank.shape[0] // _CENTER_ROWS)].median(dim=0).values
    rows = bank - center
    half_norms = 0.5 * rows.square().sum(dim=1)
    candidates = min(k + _SPARE_CANDIDATES, bank.shape[0])
    finite = torch.isfinite(query).all(dim=1)
    query = torch.where(finite[:, None], query, 0.0)
    tile = max(1, _TILE_BYTES // (max(bank.shape[0], candidates * bank.shape[1]) * dtype.itemsize))
    distances, indices = [], []
    for start in range(0, query.shape[0], tile):
        part = query[start : start + tile]
        scores = torch.addmm(half_norms, part - center, rows.mT, alpha=-1.0)  # half the squared distance, up to ‖q‖²/2
        nearest = scores.topk(candidates, dim=1, largest=False, sorted=False).indices
        exact = (bank[nearest] - part[:, None, :]).square().sum(dim=2)
        best = exact.topk(k, dim=1, largest=False, sorted=True)
        distances.append(best.values)
        indices.append(nearest.gather(1, best.indices))
    if not distances:
        return query.new_zeros((0, k)), torch.zeros((0, k), dtype=torch.int64, device=query.device)
    return _without_strays(torch.cat(distances), torch.cat(indices), finite)


def search_faiss(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact search by FAISS's flat index on the CPU, in float32; see ``functional.nearest_neighbors``."""
    faiss = import_faiss()
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.detach().to("cpu", torch.float32).contiguous().numpy())
    finite = torch.isfinite(query).all(dim=1)
    points = torch.where(finite[:, None], query, 0.0).detach().to("cpu", torch.float32).contiguous()
    distances, indices = index.search(points.numpy(), k)
    found = torch.from_numpy(distances).to(query.device), torch.from_numpy(indices).to(query.device)
    # Where the distance overflows FAISS gives no neighbour, by the index -1.
    return _without_strays(*found, finite & (found[1] >= 0).all(dim=1))


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        FaissUnavailableError: saying why it does not load. faiss-gpu raises RuntimeError rather than ImportError where
            its CUDA libraries are missing.
    """
    try:
        import faiss
    except ImportError as error:
        raise FaissUnavailableError("faiss is not installed: pip install 'm3er-fast[cpu]'") from error
    except (RuntimeError, OSError) as error:
        raise FaissUnavailableError(f"faiss is installed but does not load: {error}") from error
    return faiss


def _without_strays(distances: Tensor, indices: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Queries that are not finite get distances of inf to the first rows."""
    first = torch.arange(indices.shape[1], device=indices.device)
    return distances.where(finite[:, None], torch.inf), indices.where(finite[:, None], first)
