"""Exact nearest neighbours in plain PyTorch: products in low precision rule rows out, differences decide.

Half the squared distance of a row b from a query q, less ½‖q‖², is ½‖b‖² - q·b. A matrix product gives it for a tile of
the bank and a block of queries, rounded, but with a bound E on what rounding can have done. The k-th smallest value so
far, plus E, bounds the k-th nearest from above, and a row whose value less E lies above that bound is none of them. The
few that are left are measured by their differences, in the precision of the data.

So a product may be as coarse as is fast. A CPU that multiplies bfloat16 in hardware does so four times as fast as
float32, and rules out all but some two or three times k rows. Where a product leaves too many for a query (rows that
are close together and far from the middle, or repeated ones), it is taken again for that query in the next precision.
In float64, the last one, rows that are no better than k others to its last digits are left out: of repeated rows it
does not matter which are named.

Dimension legend: Q queries, n bank rows, d features, k neighbours; W rows of a tile, in S sets of G rows.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.neighbors.index import MEMORY_BUDGET
from m3er_fast.operands import upcast

# Rows of a tile and queries of a block at most: their values in bfloat16 (16 MB) stay in reach of the last-level cache.
_TILE_ROWS = 4096
_BLOCK_QUERIES = 2048
# Rows of a set, of which only the smallest value is looked at first.
_SET_ROWS = 32
# About so many rows of the bank, evenly spread, say where its middle is.
_CENTER_ROWS = 16
# Of so few rows a coarse product saves less time than measuring the rows that it leaves costs.
_SMALL_BANK = 2**14
# For so few queries it saves less than rounding the bank costs.
_FEW_QUERIES = 256
# Half squared norms of a tile, and norms of a query, between which float32 neither overflows nor underflows.
_SAFE_HALF = (1e-25, 1e34)
_SAFE_NORM = 1e17
# Differences that a CPU measures at a time: more leave the cache, and are memory that the system has to clear.
_MEASURED_BYTES = 2**21
# Candidates beyond k where there are no bounds: the products' rounding may reorder near ties.
_SPARE_CANDIDATES = 8


class ExactIndex:
    """The bank itself, searched by :func:`search_exact`."""

    def __init__(self, bank: Tensor, allowed: Tensor | None, memory_budget: int) -> None:
        self._bank, self._allowed, self._memory_budget = bank, allowed, memory_budget

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return search_exact(query, self._bank, k, allowed=self._allowed, memory_budget=self._memory_budget)


def search_exact(
    query: Tensor, bank: Tensor, k: int, *, allowed: Tensor | None = None, memory_budget: int = MEMORY_BUDGET
) -> tuple[Tensor, Tensor]:
    """Squared distances (Q, k) ascending and rows (Q, k) of the bank; see ``functional.nearest_neighbors``.

    The bank may lie on another device than the queries; it is then brought over tile by tile.

    Args:
        query: (Q, d). One that is not finite gets distances of inf to the first rows.
        bank: (n, d), finite.
        k: at most the number of rows that are allowed.
        allowed: (n,) bool, on the bank's device: the rows that may be neighbours; None for all.
        memory_budget: bytes to keep to beside arguments and results, where one query and 32 rows do not need more.

    The distances have gradients where the arguments have; for these all differences are held, beyond the budget.
    """
    with torch.no_grad():
        distances, rows = _search_exact(query, bank, k, allowed, memory_budget)
    if torch.is_grad_enabled() and (query.requires_grad or bank.requires_grad):
        neighbor = bank[rows.to(bank.device)].to(distances)
        difference = torch.where(distances[:, :, None] < torch.inf, query[:, None, :].to(distances) - neighbor, 0.0)
        distances = torch.where(distances < torch.inf, difference.square().sum(dim=2), distances)
    return distances, rows


def _search_exact(
    query: Tensor, bank: Tensor, k: int, allowed: Tensor | None, memory_budget: int
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(upcast(query[:0]).dtype, upcast(bank[:0]).dtype)
    query = query.to(dtype)
    finite = torch.isfinite(query).all(dim=1)
    query = torch.where(finite[:, None], query, 0.0)
    # The median of some rows: unlike the mean it neither overflows nor follows a single row that lies far out.
    center = bank[:: max(1, bank.shape[0] // _CENTER_ROWS)].to(query).median(dim=0).values
    # A quarter for the values of a block and what is compared with them, a third for the copies of a tile.
    width = min(_TILE_ROWS, max(_SET_ROWS, memory_budget // (64 * bank.shape[1]) // _SET_ROWS * _SET_ROWS))
    block = min(_BLOCK_QUERIES, max(1, memory_budget // (32 * width)))
    search = _search_by_bounds if query.device.type == "cpu" else _search_by_topk
    distances = query.new_empty((query.shape[0], k))
    rows = torch.empty((query.shape[0], k), dtype=torch.int64, device=query.device)
    for start in range(0, query.shape[0], block):
        part = slice(start, start + block)
        candidates = search(query[part], bank, k, center, allowed, width)
        distances[part], rows[part] = _nearest_of(candidates, query[part], bank, k, memory_budget)
    first = torch.arange(k, device=query.device) if allowed is None else allowed.nonzero()[:k, 0].to(query.device)
    return distances.where(finite[:, None], torch.inf), rows.where(finite[:, None], first)


class _Candidates(NamedTuple):
    """Rows that may be neighbours: pairs of a query and a row."""

    query: Tensor  # (P,) int64
    row: Tensor  # (P,) int64
    place: Tensor  # (P,) int64, numbers of a query's rows
    most: int  # of any query's rows


def _nearest_of(
    candidates: _Candidates, query: Tensor, bank: Tensor, k: int, memory_budget: int
) -> tuple[Tensor, Tensor]:
    """The k nearest of each query's candidates, by differences."""
    distances = query.new_full((query.shape[0], candidates.most), torch.inf)
    rows = torch.zeros(distances.shape, dtype=torch.int64, device=query.device)
    size = memory_budget // 8
    if query.device.type == "cpu":
        size = min(size, _MEASURED_BYTES)
    chunk = max(1, size // (query.itemsize * query.shape[1]))
    # Two pieces of memory for all chunks: what is freed and taken anew has to be cleared by the system each time.
    points, difference = query.new_empty((2, min(chunk, len(candidates.row)), query.shape[1]))
    for begin in range(0, candidates.row.shape[0], chunk):
        q, row, at = (x[begin : begin + chunk] for x in candidates[:3])
        here = difference[: len(q)]
        # index_select takes half the time of indexing.
        if bank.dtype == query.dtype and bank.device == query.device:
            torch.index_select(bank, 0, row, out=here)
        else:
            here.copy_(bank.index_select(0, row.to(bank.device)))
        here.sub_(torch.index_select(query, 0, q, out=points[: len(q)]))
        distances[q, at] = here.square_().sum(dim=1)
        rows[q, at] = row
    best = distances.topk(k, dim=1, largest=False, sorted=True)
    return best.values, rows.gather(1, best.indices)


# --- CPU: by bounds ---


class _Tile(NamedTuple):
    """Rows of the bank about its middle; the last set of them is filled up with zeros."""

    rows: Tensor  # (W, d)
    half: Tensor  # (W,) ½‖b‖²
    kept: Tensor  # (W,) bool, False for what may not be a neighbour
    start: int  # the first row's place in the bank


class _Values(NamedTuple):
    """½‖b‖² - q·b of a tile's rows for some queries, up to ``error``, and ``unit`` of what stands in ``value``."""

    value: Tensor  # (Q, W), less ``level``; inf for rows that may not be neighbours
    level: Tensor  # () float64, a common part of ½‖b‖²: without it the rest keeps more digits
    error: Tensor  # (Q,) float64
    unit: float

    def upper(self, value: Tensor, error: Tensor) -> Tensor:
        """Upper bounds, float64, on what ``value`` stands for."""
        value = value.double()
        return value + self.unit * value.abs() + error + self.level

    def lower(self, value: Tensor, error: Tensor) -> Tensor:
        """Lower bounds, float64, on what ``value`` stands for."""
        value = value.double()
        return value - self.unit * value.abs() - error + self.level

    def limit(self, bound: Tensor) -> Tensor:
        """The greatest value of each query (Q,) whose lower bound does not exceed ``bound``, or a little more."""
        exact = bound - self.level + self.error
        exact = exact / (1.0 - self.unit * exact.sign())
        rounded = exact.to(self.value.dtype)
        above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
        return torch.where(rounded.double() < exact, above, rounded)


class _Hits(NamedTuple):
    """Candidates of a tile: pairs of a query and a row, with a lower bound on the row's value."""

    query: Tensor  # (P,) int64
    row: Tensor  # (P,) int64
    lower: Tensor  # (P,) float64


def _search_by_bounds(
    query: Tensor, bank: Tensor, k: int, center: Tensor, allowed: Tensor | None, width: int
) -> _Candidates:
    """All rows that may be among the k nearest, by the bounds of the products."""
    centered = query - center
    far = centered.norm(dim=1) > _SAFE_NORM
    near, far = (~far).nonzero()[:, 0], far.nonzero()[:, 0]
    most = 2 * k + _SET_ROWS  # more sets or rows of a tile than that are more than a product should leave
    # Upper bounds on k rows of each query. The rows behind them are always among the hits.
    least = torch.full((query.shape[0], k), torch.inf, dtype=torch.float64)
    precisions = _product_precisions()
    if bank.shape[0] <= _SMALL_BANK or query.shape[0] <= _FEW_QUERIES:
        precisions = precisions[-1:]
    hits = []
    for start in range(0, bank.shape[0], width):
        tile = _tile(bank, center, allowed, start, width)
        high = float(tile.half.amax())
        left, crowded = near, [far]
        if not (high == 0 or _SAFE_HALF[0] <= high <= _SAFE_HALF[1]):
            left, crowded = near[:0], [near, far]
        for precision in precisions:
            if left.numel():
                least[left], found, full = _sift(_multiply(centered[left], tile, precision), least[left], most)
                hits.append(_Hits(left[found.query], found.row + start, found.lower))
                if 2 * int(full.sum()) > full.numel():
                    precisions = precisions[-1:]  # too coarse for this bank
                left = left[full]
        rest = torch.cat([*crowded, left])
        if rest.numel():
            least[rest], found = _pick(query[rest], bank, tile, center, least[rest], most)
            hits.append(_Hits(rest[found.query], found.row + start, found.lower))
    together = _Hits(*(torch.cat(parts) for parts in zip(*hits, strict=True)))
    kept = together.lower <= least[:, -1][together.query]
    q, row = together.query[kept], together.row[kept]
    order = q.argsort(stable=True)
    q, count = q[order], torch.bincount(q, minlength=query.shape[0])
    place = torch.arange(q.shape[0]) - (count.cumsum(0) - count)[q]
    return _Candidates(q, row[order], place, int(count.max()))


@cache
def _product_precisions() -> tuple[torch.dtype, ...]:
    """In which precisions products are tried: bfloat16 only where the CPU multiplies it in hardware."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    in_hardware = known.get("avx512_bf16") or known.get("amx_bf16")
    return (torch.bfloat16, torch.float32) if in_hardware else (torch.float32,)


def _tile(bank: Tensor, center: Tensor, allowed: Tensor | None, start: int, width: int) -> _Tile:
    rows = bank[start : start + width].to(center) - center
    kept = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    if allowed is not None:
        kept = allowed[start : start + width].to(rows.device)
        rows = torch.where(kept[:, None], rows, 0.0)
    missing = -rows.shape[0] % _SET_ROWS
    if missing:
        rows, kept = F.pad(rows, (0, 0, 0, missing)), F.pad(kept, (0, missing))
    return _Tile(rows, torch.linalg.vector_norm(rows, dim=1).square_().mul_(0.5), kept, start)


def _multiply(query: Tensor, tile: _Tile, precision: torch.dtype) -> _Values:
    """The tile's values for centred queries, by a product in ``precision`` that adds up in float32."""
    rows, points = tile.rows.to(precision), query.to(precision)
    level = tile.half.mean()
    bias = (tile.half - level).to(precision)
    against = points.neg()
    if precision == torch.bfloat16:
        against = F.pad(against, (0, 0, 0, _shared_size(len(points)) - len(points)))
    value = F.linear(against, rows, torch.where(tile.kept, bias, torch.inf))[: len(points)]
    # |q·b - q'·b'| ≤ ‖q‖ ‖b - b'‖ + ‖q - q'‖ ‖b'‖ for the rounded q' and b', by what rounding really did.
    norm, row_norm = query.norm(dim=1).double(), rows.float().norm(dim=1).amax().double()
    if precision == query.dtype:
        row_error, point_error, bias_error = (norm.new_zeros(()) for _ in range(3))
    else:
        row_error = (rows.to(query) - tile.rows).norm(dim=1).amax().double()
        point_error = (points.to(query) - query).norm(dim=1).double()
        bias_error = (bias.to(query) - (tile.half - level)).abs().amax().double()
    # And what adding d products up in float32, the centring, and ½‖b‖² itself may have lost.
    lost = (query.shape[1] + 16) * torch.finfo(torch.float32).eps * (norm + row_norm).square()
    error = norm * row_error + point_error * row_norm + bias_error + lost
    return _Values(value, level.double(), error, 1.01 * torch.finfo(precision).eps / 2)


def _shared_size(queries: int) -> int:
    """The next of few numbers of queries, by at most a half larger: 16, 24, 32, 48, 64, ...

    oneDNN makes a program for each size of a product in bfloat16, which took longer (2 ms) than the product of a few
    hundred queries, and keeps the last 1024 of them, in 0.5 MiB each.
    """
    power = 1 << max(4, (queries - 1).bit_length())
    return power * 3 // 4 if 16 < queries <= power * 3 // 4 else power


def _sift(values: _Values, least: Tensor, most: int) -> tuple[Tensor, _Hits, Tensor]:
    """Hits of a tile, and ``least`` with its values; queries that are left with too many are ``full``, without hits."""
    queries, width = values.value.shape
    sets = next((width // size for size in (_SET_ROWS, 8, 2) if width // size >= 2 * most), width)
    grouped = values.value.view(queries, width // sets, sets)  # rows s, sets + s, 2·sets + s, ... are a set
    smallest = grouped.amin(dim=1)
    best = smallest.topk(min(least.shape[1], sets), dim=1, largest=False, sorted=False).values
    lowered = _merge(least, values.upper(best, values.error[:, None]))
    limit = values.limit(lowered[:, -1])
    near = smallest <= limit[:, None]
    full = near.sum(dim=1) > most
    q, s = (near & ~full[:, None]).nonzero(as_tuple=True)
    members = grouped[q, :, s]
    pair, member = ((members <= limit[q][:, None]) & (members < torch.inf)).nonzero(as_tuple=True)
    q, row = q[pair], member * sets + s[pair]
    lower = values.lower(members[pair, member], values.error[q])
    return torch.where(full[:, None], least, lowered), _Hits(q, row, lower), full


def _pick(query: Tensor, bank: Tensor, tile: _Tile, center: Tensor, least: Tensor, most: int) -> tuple[Tensor, _Hits]:
    """The ``most`` best rows of a tile in float64, where they are better than ``least``: repeated rows are not."""
    rows = bank[tile.start : tile.start + tile.rows.shape[0]].double() - center.double()
    points = query.double() - center.double()
    kept = tile.kept[: rows.shape[0]]
    value = torch.addmm(0.5 * rows.square().sum(dim=1), points, rows.mT, alpha=-1.0)
    largest = torch.finfo(value.dtype).max
    value = torch.where(kept, value.nan_to_num(largest, largest, -largest), torch.inf)
    reach = points.norm(dim=1) + torch.where(kept, rows.norm(dim=1), 0.0).amax()
    error = ((rows.shape[1] + 16) * torch.finfo(value.dtype).eps * reach.square()).nan_to_num(largest, largest)[:, None]
    best = value.topk(min(most, value.shape[1]), dim=1, largest=False, sorted=False)
    better = (best.values < least[:, -1:] - error) & (best.values < torch.inf)
    q, place = better.nonzero(as_tuple=True)
    upper = torch.where(better, best.values + error, torch.inf)
    return _merge(least, upper), _Hits(q, best.indices[q, place], best.values[q, place] - error[q, 0])


def _merge(least: Tensor, more: Tensor) -> Tensor:
    """The smallest of both, as many as ``least`` has, ascending."""
    return torch.cat([least, more], dim=1).topk(least.shape[1], dim=1, largest=False, sorted=True).values


# --- GPU: by spare candidates ---


def _search_by_topk(
    query: Tensor, bank: Tensor, k: int, center: Tensor, allowed: Tensor | None, width: int
) -> _Candidates:
    """The best k rows by products, and some to spare, without waiting for the device."""
    centered = query - center
    candidates = min(k + _SPARE_CANDIDATES, bank.shape[0])
    best = centered.new_full((query.shape[0], candidates), torch.inf)
    rows = torch.zeros(best.shape, dtype=torch.int64, device=query.device)
    for start in range(0, bank.shape[0], width):
        tile = _tile(bank, center, allowed, start, width)
        half = torch.where(tile.kept, tile.half, torch.inf)
        values = torch.addmm(half, centered, tile.rows.mT, alpha=-1.0)
        new = values.topk(min(candidates, values.shape[1]), dim=1, largest=False, sorted=False)
        together = torch.cat([best, new.values], dim=1)
        best, place = together.topk(candidates, dim=1, largest=False, sorted=False)
        rows = torch.cat([rows, new.indices + start], dim=1).gather(1, place)
    q = torch.arange(query.shape[0], device=query.device)[:, None].expand(rows.shape)
    place = torch.arange(candidates, device=query.device).expand(rows.shape)
    return _Candidates(q.flatten(), rows.flatten(), place.flatten(), candidates)
