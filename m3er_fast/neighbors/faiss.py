"""Nearest neighbours by FAISS, on a CPU and on a GPU; the only file that imports FAISS.

Dimension legend: Q queries, n bank rows, d features, k neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3er_fast.neighbors.exact import search_exact
from m3er_fast.neighbors.index import FaissUnavailableError

# FAISS advises 4·√n inverted lists, and 39 rows or more to train each.
_LISTS_PER_ROOT = 4
_ROWS_PER_LIST = 39
# One list in this many is probed, and at least so many. The recall on a bank is measured, not promised.
_LISTS_PER_PROBE = 8
_LEAST_PROBED = 16
# Edges per node of the HNSW graph, and candidates in its construction and in a search.
_GRAPH_EDGES = 32
_CONSTRUCTION_CANDIDATES = 128
_SEARCH_CANDIDATES = 256


class FaissIndex:
    """An index of FAISS on the CPU, in float32: flat (exact), inverted lists, or a graph."""

    def __init__(self, bank: Tensor, allowed: Tensor | None, memory_budget: int, *, engine: str) -> None:
        faiss = import_faiss()
        self._bank, self._allowed = bank, allowed
        self._row_numbers = None if allowed is None else allowed.nonzero()[:, 0].to("cpu")
        rows = bank if self._row_numbers is None else bank[self._row_numbers.to(bank.device)]
        self._index = _faiss_index(faiss, engine, *rows.shape)
        vectors = rows.detach().to("cpu", torch.float32).contiguous().numpy()
        if not self._index.is_trained:
            self._index.train(vectors)
        self._index.add(vectors)

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return squared distances (Q, k), ascending, and the numbers of their rows (Q, k)."""
        finite = torch.isfinite(query).all(dim=1)
        points = torch.where(finite[:, None], query, 0.0).detach().to("cpu", torch.float32).contiguous()
        distances, rows = map(torch.from_numpy, self._index.search(points.numpy(), k))
        if self._row_numbers is not None:
            rows = torch.where(rows >= 0, self._row_numbers[rows.clamp(min=0)], rows)
        return _complete(query, distances.to(query.device), rows.to(query.device), self._bank, self._allowed)


class FaissGpuIndex:
    """An index of FAISS on the bank's GPU, on torch's current stream: flat, without a copy, or inverted lists.

    Inverted lists, in float32, are spread over all GPUs that FAISS sees. A flat bank in half precision is searched in
    half precision.
    """

    def __init__(self, bank: Tensor, allowed: Tensor | None, memory_budget: int, *, engine: str) -> None:
        faiss = import_faiss()
        if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
            raise FaissUnavailableError("the faiss installed here has no GPU support: pip install 'm3er-fast[gpu]'")
        self._bank, self._allowed = bank, allowed
        self._row_numbers = None if allowed is None else allowed.nonzero()[:, 0]
        self._rows = (bank if self._row_numbers is None else bank[self._row_numbers]).contiguous()
        self._lists = None
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(memory_budget)
        if engine == "faiss-ivf":
            index = _faiss_index(faiss, engine, *self._rows.shape)
            vectors = self._rows.detach().to("cpu", torch.float32).numpy()
            index.train(vectors)
            index.add(vectors)
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            self._lists = faiss.index_cpu_to_all_gpus(index, co=options)
            self._rows = self._rows[:0]

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return squared distances (Q, k), ascending, and the numbers of their rows (Q, k)."""
        finite = torch.isfinite(query).all(dim=1)
        points = torch.where(finite[:, None], query, 0.0).detach()
        if self._lists is None:
            distances, rows = self._search_flat(points, k)
        else:
            found = self._lists.search(points.to("cpu", torch.float32).contiguous().numpy(), k)
            distances, rows = (torch.from_numpy(x).to(query.device) for x in found)
        if self._row_numbers is not None:
            rows = torch.where(rows >= 0, self._row_numbers[rows.clamp(min=0)], rows)
        return _complete(query, distances, rows, self._bank, self._allowed)

    def _search_flat(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        faiss = import_faiss()
        types = {
            torch.float32: (faiss.DistanceDataType_F32, faiss.cast_integer_to_float_ptr),
            torch.float16: (faiss.DistanceDataType_F16, faiss.cast_integer_to_void_ptr),
            torch.bfloat16: (faiss.DistanceDataType_BF16, faiss.cast_integer_to_void_ptr),
        }
        vectors = self._rows if self._rows.dtype in types else self._rows.float()
        query = query.to(vectors.dtype).contiguous()
        distances = torch.empty((query.shape[0], k), device=query.device)
        rows = torch.empty((query.shape[0], k), dtype=torch.int64, device=query.device)
        if not query.shape[0]:
            return distances, rows
        kind, pointer = types[vectors.dtype]
        arguments = faiss.GpuDistanceParams()
        arguments.metric = faiss.METRIC_L2
        arguments.k, arguments.dims = k, query.shape[1]
        arguments.vectors, arguments.vectorType, arguments.numVectors = pointer(vectors.data_ptr()), kind, len(vectors)
        arguments.queries, arguments.queryType, arguments.numQueries = pointer(query.data_ptr()), kind, len(query)
        arguments.outDistances = faiss.cast_integer_to_float_ptr(distances.data_ptr())
        arguments.outIndices = faiss.cast_integer_to_idx_t_ptr(rows.data_ptr())
        arguments.outIndicesType = faiss.IndicesDataType_I64
        arguments.device = query.device.index
        # On its own stream, FAISS would read before torch has written.
        stream = torch.cuda.current_stream(query.device).cuda_stream
        self._resources.setDefaultStream(query.device.index, faiss.cast_integer_to_cudastream_t(stream))
        faiss.bfKnn(self._resources, arguments)
        return distances, rows


def _faiss_index(faiss: Any, engine: str, rows: int, features: int) -> Any:
    if engine == "faiss-ivf":
        lists = max(1, min(round(_LISTS_PER_ROOT * rows**0.5), rows // _ROWS_PER_LIST))
        index = faiss.index_factory(features, f"IVF{lists},Flat")
        index.cp.min_points_per_centroid = 1  # fewer rows than a list's make one list: nothing to warn of
        index.nprobe = min(lists, max(_LEAST_PROBED, lists // _LISTS_PER_PROBE))
        return index
    if engine == "faiss-hnsw":
        index = faiss.IndexHNSWFlat(features, _GRAPH_EDGES)
        index.hnsw.efConstruction, index.hnsw.efSearch = _CONSTRUCTION_CANDIDATES, _SEARCH_CANDIDATES
        return index
    return faiss.IndexFlatL2(features)


def _complete(
    query: Tensor, distances: Tensor, rows: Tensor, bank: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return FAISS's result, with an exact search for queries with fewer than k rows; the missing ones are −1."""
    distances = distances.to(torch.promote_types(torch.promote_types(query.dtype, bank.dtype), torch.float32))
    short = ((rows < 0).any(dim=1) | ~torch.isfinite(query).all(dim=1)).nonzero()[:, 0]
    if short.numel():
        exact = search_exact(query[short], bank, rows.shape[1], allowed=allowed)
        distances[short], rows[short] = exact
    return distances, rows


def import_faiss() -> Any:
    """Return the module faiss.

    Raises:
        FaissUnavailableError: if it does not load, with the reason. faiss-gpu raises RuntimeError rather than
            ImportError if its CUDA libraries are missing.
    """
    try:
        import faiss
    except ImportError as error:
        raise FaissUnavailableError("faiss is not installed: pip install 'm3er-fast[cpu]'") from error
    except (RuntimeError, OSError) as error:
        raise FaissUnavailableError(f"faiss is installed but does not load: {error}") from error
    return faiss
