"""Exact nearest neighbours in the L2 norm; the only file that imports FAISS.

Dimension legend: Q queries, n bank rows, d features, k neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3er_fast.reference import upcast

# Distances of one tile stay below this many bytes: enough for large products, little beside the bank itself.
_TILE_BYTES = 32 * 2**20
# Candidates beyond k whose distances are computed again by differences: the products' rounding may reorder near ties.
_SPARE_CANDIDATES = 8


class FaissUnavailableError(RuntimeError):
    """FAISS is not installed or does not load."""


def search_torch(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact search by tiles of matrix products, memory bounded; see ``functional.nearest_neighbors``.

    ‖q - b‖² = ‖q‖² - 2q·b + ‖b‖² cancels where neighbours are close and far from the origin, so the bank's mean is
    taken off first, and the best candidates are measured again by their differences.
    """
    query, bank = upcast(query), upcast(bank)
    dtype = torch.promote_types(query.dtype, bank.dtype)
    center = bank.mean(dim=0)
    rows = (bank - center).to(dtype)
    half_norms = 0.5 * rows.square().sum(dim=1)
    candidates = min(k + _SPARE_CANDIDATES, bank.shape[0])
    finite = torch.isfinite(query).all(dim=1)
    points = torch.where(finite[:, None], query - center, 0.0).to(dtype)
    tile = max(1, _TILE_BYTES // (bank.shape[0] * dtype.itemsize))
    distances, indices = [], []
    for start in range(0, points.shape[0], tile):
        part = points[start : start + tile]
        scores = torch.addmm(half_norms, part, rows.mT, alpha=-1.0)  # half the squared distance, up to ‖q‖²/2
        nearest = scores.topk(candidates, dim=1, largest=False, sorted=False).indices
        exact = (rows[nearest] - part[:, None, :]).square().sum(dim=2)
        best = exact.topk(k, dim=1, largest=False, sorted=True)
        distances.append(best.values)
        indices.append(nearest.gather(1, best.indices))
    if not distances:
        return points.new_zeros((0, k)), torch.zeros((0, k), dtype=torch.int64, device=query.device)
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
    return _without_strays(*found, finite)


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
