"""Exact nearest neighbours in plain PyTorch: low-precision products exclude rows, differences decide.

Half the squared distance of a row b from a query q, less ½‖q‖², is ½‖b‖² - q·b. A matrix product computes it for a tile
of the bank and a block of queries, rounded, but with a bound E on the rounding error. The k-th smallest value so far,
plus E, is an upper bound on the k-th nearest row's value. A row whose value less E exceeds that bound is not a
neighbour. The few remaining rows are measured by their differences, in the precision of the data.

A product may therefore be as coarse as is fast. A CPU that multiplies bfloat16 in hardware is four times as fast in it
as in float32, and all but some two or three times k rows are excluded. Where a product leaves too many rows for a query
(rows that are repeated, or close together and far from the centre), it is taken again for that query in the next
precision. In float64, the last one, rows are excluded that are not better than k others to its last digits: the choice
among repeated rows does not matter.

A few queries of a small bank need fewer steps: the best rows of one product, and some to spare, are measured. The last
of them, less E, bounds all other rows. Queries for which it is not beyond the k-th nearest are searched again.

Dimension legend: Q queries, n bank rows, d features, k neighbours; W rows of a tile, in S sets of G rows; P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.neighbors.index import MEMORY_BUDGET
from m3er_fast.operands import upcast

# The most rows of a tile and queries of a block: their values in bfloat16 (16 MB) fit into the last-level cache.
_TILE_ROWS = 4096
_BLOCK_QUERIES = 2048
# Rows of a set; of each set only the smallest value is looked at first.
_SET_ROWS = 32
# The centre is computed from about this many rows of the bank, evenly spread.
_CENTER_ROWS = 16
# With a bank this small, a coarse product saves less time than measuring the rows that it leaves takes.
_SMALL_BANK = 2**14
# With this few queries, it saves less time than rounding the bank takes.
_FEW_QUERIES = 256
# A small bank and this few queries are searched by one product: with more, measuring rows to spare takes longer.
_FEWEST_QUERIES = 32
# Half squared norms of a tile, and norms of a query, between which float32 neither overflows nor underflows.
_SAFE_HALF = (1e-25, 1e34)
_SAFE_NORM = 1e17
# Bytes of differences that a CPU measures at a time: more would leave the cache, and the system would have to clear
# more memory.
_MEASURED_BYTES = 2**21
# Candidates beyond k where the best of a product are measured: its rounding may reorder near ties.
_SPARE_CANDIDATES = 8


class ExactIndex:
    """An index that is the bank itself, searched by :func:`search_exact`, or by one product where that is faster."""

    def __init__(self, bank: Tensor, allowed: Tensor | None, memory_budget: int) -> None:
        self._bank, self._allowed, self._memory_budget = bank, allowed, memory_budget
        self._is_spread = True  # until one product does not tell the nearest rows apart: they repeat, or lie far off

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return squared distances (Q, k), ascending, and the numbers of their rows (Q, k)."""
        if not (self._is_spread and _is_small(query, self._bank, k, self._memory_budget)):
            return search_exact(query, self._bank, k, allowed=self._allowed, memory_budget=self._memory_budget)
        distances, rows, is_proven = _search_at_once(query, self._bank, k, self._allowed)
        if not is_proven.all():
            rest = (~is_proven).nonzero()[:, 0]
            self._is_spread = 2 * len(rest) < len(query)
            distances[rest], rows[rest] = search_exact(
                query[rest], self._bank, k, allowed=self._allowed, memory_budget=self._memory_budget
            )
        return distances, rows


def search_exact(
    query: Tensor,
    bank: Tensor,
    k: int,
    *,
    allowed: Tensor | None = None,
    memory_budget: int = MEMORY_BUDGET,
    precisions: Sequence[torch.dtype] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return squared distances (Q, k), ascending, and rows (Q, k) of the bank; see ``functional.nearest_neighbors``.

    The bank may be on another device than the queries; it is then copied tile by tile.

    Args:
        query: (Q, d). One that is not finite gets distances of inf to the first rows.
        bank: (n, d), finite.
        k: at most the number of rows that are allowed.
        allowed: (n,) bool, on the bank's device: the rows that may be neighbours; None for all.
        memory_budget: bytes to take beside arguments and results, unless one query and 32 rows need more.
        precisions: precisions of the products on a CPU, coarsest first; the result is the same for all. None chooses
            the fastest for this CPU and these sizes.

    The distances have gradients if the arguments have. All differences are then in memory, beyond the budget.
    """
    with torch.no_grad():
        distances, rows = _search_exact(query, bank, k, allowed, memory_budget, precisions)
    if torch.is_grad_enabled() and (query.requires_grad or bank.requires_grad):
        neighbor = bank[rows.to(bank.device)].to(distances)
        difference = torch.where(distances[:, :, None] < torch.inf, query[:, None, :].to(distances) - neighbor, 0.0)
        distances = torch.where(distances < torch.inf, difference.square().sum(dim=2), distances)
    return distances, rows


def _search_exact(
    query: Tensor,
    bank: Tensor,
    k: int,
    allowed: Tensor | None,
    memory_budget: int,
    precisions: Sequence[torch.dtype] | None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(upcast(query[:0]).dtype, upcast(bank[:0]).dtype)
    query = query.to(dtype)
    finite = torch.isfinite(query).all(dim=1)
    query = torch.where(finite[:, None], query, 0.0)
    # The median of some rows: unlike the mean it neither overflows nor follows a single distant row.
    center = bank[:: max(1, bank.shape[0] // _CENTER_ROWS)].to(query).median(dim=0).values
    # A quarter of the budget for a block's values and their comparisons, a third for the copies of a tile.
    width = min(_TILE_ROWS, max(_SET_ROWS, memory_budget // (64 * bank.shape[1]) // _SET_ROWS * _SET_ROWS))
    block = min(_BLOCK_QUERIES, max(1, memory_budget // (32 * width)))
    distances = query.new_empty((query.shape[0], k))
    rows = torch.empty((query.shape[0], k), dtype=torch.int64, device=query.device)
    for start in range(0, query.shape[0], block):
        part = slice(start, start + block)
        if query.device.type == "cpu":
            candidates = _search_by_bounds(query[part], bank, k, center, allowed, width, precisions)
        else:
            candidates = _search_by_topk(query[part], bank, k, center, allowed, width)
        distances[part], rows[part] = _measure(candidates, query[part], bank, k, memory_budget)
    first = torch.arange(k, device=query.device) if allowed is None else allowed.nonzero()[:k, 0].to(query.device)
    return distances.where(finite[:, None], torch.inf), rows.where(finite[:, None], first)


def _is_small(query: Tensor, bank: Tensor, k: int, memory_budget: int) -> bool:
    """Whether :func:`_search_at_once` is made for this problem, and takes no more memory than it may."""
    taken = 4 * (query.shape[0] * bank.shape[0] + 2 * query.numel() * (k + _SPARE_CANDIDATES))
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or bank.requires_grad)
    return (
        query.dtype == bank.dtype == torch.float32
        and query.device.type == bank.device.type == "cpu"
        and 0 < query.shape[0] <= _FEWEST_QUERIES
        and bank.shape[0] <= _SMALL_BANK
        and taken <= memory_budget
        and not needs_gradient
    )


def _search_at_once(query: Tensor, bank: Tensor, k: int, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return squared distances (Q, k), rows (Q, k), and for which queries (Q,) no other row can be nearer.

    The product is about zero: of a bank far from it, the bounds prove nothing; nor of a query that is not finite.
    """
    norm, query_norm = torch.linalg.vector_norm(bank, dim=1), torch.linalg.vector_norm(query, dim=1)
    value = torch.addmm(norm.square().mul_(0.5), query, bank.mT, alpha=-1.0)
    if allowed is not None:
        value.masked_fill_(~allowed, torch.inf)
    candidates = min(k + _SPARE_CANDIDATES, bank.shape[0])
    best = value.topk(candidates, dim=1, largest=False, sorted=True)
    difference = bank.index_select(0, best.indices.flatten()).view(len(query), candidates, -1)
    squares = difference.sub_(query[:, None]).square_().sum(dim=2)
    if allowed is not None:
        squares.masked_fill_(best.values == torch.inf, torch.inf)
    nearest = squares.topk(k, dim=1, largest=False, sorted=True)
    rows = best.indices.gather(1, nearest.indices)
    # Twice the bound of a float32 sum of products, for the rounding of the distances that it is compared with as well.
    reach = (query_norm + norm.amax()).square_()
    error = 2 * (query.shape[1] + 16) * torch.finfo(torch.float32).eps * reach
    beyond = best.values[:, -1] + 0.5 * query_norm.square() - error
    is_proven = (beyond >= 0.5 * nearest.values[:, -1]) | (candidates == bank.shape[0])
    return nearest.values, rows, is_proven & (reach > _SAFE_HALF[0]) & (reach < _SAFE_HALF[1])


class _Candidates(NamedTuple):
    """Rows that may be neighbours: pairs of a query and a row."""

    query: Tensor  # (P,) int64
    row: Tensor  # (P,) int64
    rank: Tensor  # (P,) int64, 0, 1, 2, ... over the rows of a query
    most: int  # rows of the query that has most


def _measure(candidates: _Candidates, query: Tensor, bank: Tensor, k: int, memory_budget: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest of each query's candidates, by differences."""
    distances = query.new_full((query.shape[0], candidates.most), torch.inf)
    rows = torch.zeros(distances.shape, dtype=torch.int64, device=query.device)
    size = memory_budget // 8
    if query.device.type == "cpu":
        size = min(size, _MEASURED_BYTES)
    chunk = max(1, size // (query.itemsize * query.shape[1]))
    # The same memory serves all chunks: the system has to clear memory that is freed and allocated anew.
    points, difference = query.new_empty((2, min(chunk, len(candidates.row)), query.shape[1]))
    for begin in range(0, candidates.row.shape[0], chunk):
        q, row, rank = (x[begin : begin + chunk] for x in candidates[:3])
        squares = difference[: len(q)]
        # index_select takes half the time of indexing.
        if bank.dtype == query.dtype and bank.device == query.device:
            torch.index_select(bank, 0, row, out=squares)
        else:
            squares.copy_(bank.index_select(0, row.to(bank.device)))
        squares.sub_(torch.index_select(query, 0, q, out=points[: len(q)]))
        distances[q, rank] = squares.square_().sum(dim=1)
        rows[q, rank] = row
    best = distances.topk(k, dim=1, largest=False, sorted=True)
    return best.values, rows.gather(1, best.indices)


# --- On a CPU: by bounds ---


class _Tile(NamedTuple):
    """Rows of the bank, centred; zeros fill up the last set."""

    rows: Tensor  # (W, d)
    half: Tensor  # (W,) ½‖b‖²
    allowed: Tensor  # (W,) bool, whether a row may be a neighbour
    start: int  # number of the first row in the bank


class _Values(NamedTuple):
    """The values ½‖b‖² - q·b of a tile's rows for some queries, up to ``error`` and ``unit`` · |value|."""

    value: Tensor  # (Q, W), less ``offset``; inf for rows that may not be neighbours
    offset: Tensor  # () float64, a common part of ½‖b‖²: without it the rest keeps more digits
    error: Tensor  # (Q,) float64
    unit: float  # relative error of a stored value

    def upper(self, value: Tensor, error: Tensor) -> Tensor:
        """Return upper bounds, float64, on the exact values."""
        value = value.double()
        return value + self.unit * value.abs() + error + self.offset

    def lower(self, value: Tensor, error: Tensor) -> Tensor:
        """Return lower bounds, float64, on the exact values."""
        value = value.double()
        return value - self.unit * value.abs() - error + self.offset

    def limit(self, bound: Tensor) -> Tensor:
        """Return each query's largest value (Q,) whose lower bound does not exceed ``bound``, or slightly more."""
        exact = bound - self.offset + self.error
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
    query: Tensor,
    bank: Tensor,
    k: int,
    center: Tensor,
    allowed: Tensor | None,
    width: int,
    precisions: Sequence[torch.dtype] | None = None,
) -> _Candidates:
    """Return all rows that may be among the k nearest, by the bounds of the products."""
    if precisions is None:
        precisions = _fast_precisions()
        if bank.shape[0] <= _SMALL_BANK or query.shape[0] <= _FEW_QUERIES:
            precisions = precisions[-1:]
    centered = query - center
    is_far = centered.norm(dim=1) > _SAFE_NORM
    near, far = (~is_far).nonzero()[:, 0], is_far.nonzero()[:, 0]
    most = 2 * k + _SET_ROWS  # a product that leaves more sets or rows of a tile was too coarse
    # Upper bounds on k rows of each query, ascending. The rows behind them are always among the hits.
    bounds = torch.full((query.shape[0], k), torch.inf, dtype=torch.float64)
    hits = []
    for start in range(0, bank.shape[0], width):
        tile = _tile(bank, center, allowed, start, width)
        high = float(tile.half.amax())
        remaining, unsafe = near, [far]
        if not (high == 0 or _SAFE_HALF[0] <= high <= _SAFE_HALF[1]):
            remaining, unsafe = near[:0], [near, far]
        for precision in precisions:
            if remaining.numel():
                bounds[remaining], found, crowded = _select_by_bounds(
                    _multiply(centered[remaining], tile, precision), bounds[remaining], most
                )
                hits.append(_Hits(remaining[found.query], found.row + start, found.lower))
                if 2 * int(crowded.sum()) > crowded.numel():
                    precisions = precisions[-1:]  # the others are too coarse for this bank
                remaining = remaining[crowded]
        rest = torch.cat([*unsafe, remaining])
        if rest.numel():
            bounds[rest], found = _select_in_float64(query[rest], bank, tile, center, bounds[rest], most)
            hits.append(_Hits(rest[found.query], found.row + start, found.lower))
    together = _Hits(*(torch.cat(parts) for parts in zip(*hits, strict=True)))
    kept = together.lower <= bounds[:, -1][together.query]
    q, row = together.query[kept], together.row[kept]
    order = q.argsort(stable=True)
    q, count = q[order], torch.bincount(q, minlength=query.shape[0])
    rank = torch.arange(q.shape[0]) - (count.cumsum(0) - count)[q]
    return _Candidates(q, row[order], rank, int(count.max()))


@cache
def _fast_precisions() -> tuple[torch.dtype, ...]:
    """Return the precisions of products, coarsest first: bfloat16 only where the CPU multiplies it in hardware."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    in_hardware = known.get("avx512_bf16") or known.get("amx_bf16")
    return (torch.bfloat16, torch.float32) if in_hardware else (torch.float32,)


def _tile(bank: Tensor, center: Tensor, allowed: Tensor | None, start: int, width: int) -> _Tile:
    rows = bank[start : start + width].to(center) - center
    is_allowed = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    if allowed is not None:
        is_allowed = allowed[start : start + width].to(rows.device)
        rows = torch.where(is_allowed[:, None], rows, 0.0)
    missing = -rows.shape[0] % _SET_ROWS
    if missing:
        rows, is_allowed = F.pad(rows, (0, 0, 0, missing)), F.pad(is_allowed, (0, missing))
    return _Tile(rows, torch.linalg.vector_norm(rows, dim=1).square_().mul_(0.5), is_allowed, start)


def _multiply(query: Tensor, tile: _Tile, precision: torch.dtype) -> _Values:
    """Return the tile's values for centred queries, by a product in ``precision`` that is summed in float32."""
    rows, points = tile.rows.to(precision), query.to(precision)
    offset = tile.half.mean()
    bias = (tile.half - offset).to(precision)
    negated = points.neg()
    if precision == torch.bfloat16:
        negated = F.pad(negated, (0, 0, 0, _padded_size(len(points)) - len(points)))
    value = F.linear(negated, rows, torch.where(tile.allowed, bias, torch.inf))[: len(points)]
    # |q·b - q'·b'| ≤ ‖q‖ ‖b - b'‖ + ‖q - q'‖ ‖b'‖ for the rounded q' and b', by the actual rounding.
    norm, row_norm = query.norm(dim=1).double(), rows.float().norm(dim=1).amax().double()
    if precision == query.dtype:
        row_error, point_error, bias_error = (norm.new_zeros(()) for _ in range(3))
    else:
        row_error = (rows.to(query) - tile.rows).norm(dim=1).amax().double()
        point_error = (points.to(query) - query).norm(dim=1).double()
        bias_error = (bias.to(query) - (tile.half - offset)).abs().amax().double()
    # The rounding of a float32 sum of d products, of the centring, and of ½‖b‖² itself.
    summing = (query.shape[1] + 16) * torch.finfo(torch.float32).eps * (norm + row_norm).square()
    error = norm * row_error + point_error * row_norm + bias_error + summing
    return _Values(value, offset.double(), error, 1.01 * torch.finfo(precision).eps / 2)


def _padded_size(queries: int) -> int:
    """Return the next of few numbers of queries, at most half as many again: 16, 24, 32, 48, 64, ...

    oneDNN compiles a program for each size of a bfloat16 product. That took longer (2 ms) than the product of a few
    hundred queries, and the last 1024 programs stay in memory, 0.5 MiB each.
    """
    power = 1 << max(4, (queries - 1).bit_length())
    return power * 3 // 4 if 16 < queries <= power * 3 // 4 else power


def _select_by_bounds(values: _Values, bounds: Tensor, most: int) -> tuple[Tensor, _Hits, Tensor]:
    """Return ``bounds`` lowered by a tile's values, the hits, and the queries with too many, ``crowded`` (Q,).

    Crowded queries have no hits, and their bounds stay as they were.
    """
    queries, width = values.value.shape
    sets = next((width // size for size in (_SET_ROWS, 8, 2) if width // size >= 2 * most), width)
    grouped = values.value.view(queries, width // sets, sets)  # rows s, sets + s, 2·sets + s, ... are a set
    smallest = grouped.amin(dim=1)
    best = smallest.topk(min(bounds.shape[1], sets), dim=1, largest=False, sorted=False).values
    lowered = _smallest_of(bounds, values.upper(best, values.error[:, None]))
    limit = values.limit(lowered[:, -1])
    near = smallest <= limit[:, None]
    crowded = near.sum(dim=1) > most
    q, s = (near & ~crowded[:, None]).nonzero(as_tuple=True)
    members = grouped[q, :, s]
    pair, member = ((members <= limit[q][:, None]) & (members < torch.inf)).nonzero(as_tuple=True)
    q, row = q[pair], member * sets + s[pair]
    lower = values.lower(members[pair, member], values.error[q])
    return torch.where(crowded[:, None], bounds, lowered), _Hits(q, row, lower), crowded


def _select_in_float64(
    query: Tensor, bank: Tensor, tile: _Tile, center: Tensor, bounds: Tensor, most: int
) -> tuple[Tensor, _Hits]:
    """Return ``bounds`` lowered by a tile's values in float64, and its ``most`` best rows where they are better.

    Repetitions of the rows that the bounds come from are not better.
    """
    rows = bank[tile.start : tile.start + tile.rows.shape[0]].double() - center.double()
    points = query.double() - center.double()
    allowed = tile.allowed[: rows.shape[0]]
    value = torch.addmm(0.5 * rows.square().sum(dim=1), points, rows.mT, alpha=-1.0)
    largest = torch.finfo(value.dtype).max
    value = torch.where(allowed, value.nan_to_num(largest, largest, -largest), torch.inf)
    reach = points.norm(dim=1) + torch.where(allowed, rows.norm(dim=1), 0.0).amax()
    error = ((rows.shape[1] + 16) * torch.finfo(value.dtype).eps * reach.square()).nan_to_num(largest, largest)[:, None]
    best = value.topk(min(most, value.shape[1]), dim=1, largest=False, sorted=False)
    better = (best.values < bounds[:, -1:] - error) & (best.values < torch.inf)
    q, rank = better.nonzero(as_tuple=True)
    upper = torch.where(better, best.values + error, torch.inf)
    return _smallest_of(bounds, upper), _Hits(q, best.indices[q, rank], best.values[q, rank] - error[q, 0])


def _smallest_of(bounds: Tensor, more: Tensor) -> Tensor:
    """Return the smallest entries of both, as many as ``bounds`` has, ascending."""
    return torch.cat([bounds, more], dim=1).topk(bounds.shape[1], dim=1, largest=False, sorted=True).values


# --- On a GPU: by spare candidates ---


def _search_by_topk(
    query: Tensor, bank: Tensor, k: int, center: Tensor, allowed: Tensor | None, width: int
) -> _Candidates:
    """Return the best k rows by products, and some to spare, without waiting for the device."""
    centered = query - center
    candidates = min(k + _SPARE_CANDIDATES, bank.shape[0])
    best = centered.new_full((query.shape[0], candidates), torch.inf)
    rows = torch.zeros(best.shape, dtype=torch.int64, device=query.device)
    for start in range(0, bank.shape[0], width):
        tile = _tile(bank, center, allowed, start, width)
        half = torch.where(tile.allowed, tile.half, torch.inf)
        values = torch.addmm(half, centered, tile.rows.mT, alpha=-1.0)
        new = values.topk(min(candidates, values.shape[1]), dim=1, largest=False, sorted=False)
        together = torch.cat([best, new.values], dim=1)
        best, place = together.topk(candidates, dim=1, largest=False, sorted=False)
        rows = torch.cat([rows, new.indices + start], dim=1).gather(1, place)
    q = torch.arange(query.shape[0], device=query.device)[:, None].expand(rows.shape)
    rank = torch.arange(candidates, device=query.device).expand(rows.shape)
    return _Candidates(q.flatten(), rows.flatten(), rank.flatten(), candidates)
