"""The bank of neighbours: paired training frames; the ones nearest to a query regenerate its partner.

Dimension legend: M modalities, d_m features of modality m, n bank rows, Q queries, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast.config import ProxyConfig
from m3er_fast.fitted_module import FittedModule
from m3er_fast.functional import unchecked
from m3er_fast.neighbors import EXACT_ENGINES, NeighborIndex, measure_recall
from m3er_fast.standardize import StandardizedBatch


class PairedFrames(NamedTuple):
    """Training frames with two valid modalities or more."""

    features: list[Tensor]  # M of (n, d_m)
    valid: Tensor  # (n, M) bool


class _Proxies(NamedTuple):
    """Proxies of some frames, regenerated from one source."""

    target: int  # the modality m that they stand for
    frames: Tensor  # (Q,) int64, numbers of the frames
    values: Tensor  # (Q, d_m)


class BankSample(NamedTuple):
    """Training frames chosen for a bank, in the order of the data."""

    pieces: list[PairedFrames]  # not joined by :meth:`merge`: merging many samples must not copy frames each time
    seen: int  # number of frames that they were chosen from

    def merge(self, other: BankSample) -> BankSample:
        """Return both samples as one. The frames of ``other`` must follow these; memory is shared with both."""
        return BankSample([*self.pieces, *other.pieces], self.seen + other.seen)

    def consolidated(self) -> BankSample:
        """Return the same sample in one piece, which takes less memory and transport than many small ones."""
        return BankSample([self.joined()], self.seen)

    def joined(self) -> PairedFrames:
        """Return all frames as one record, without a copy if there is only one piece."""
        if len(self.pieces) == 1:
            return self.pieces[0]
        features = [torch.cat(columns) for columns in zip(*(piece.features for piece in self.pieces), strict=True)]
        return PairedFrames(features, torch.cat([piece.valid for piece in self.pieces]))


class NeighbourBank:
    """The kind of bank that keeps training frames and solves for each query over its ``k`` nearest ones.

    The learned buffers belong to the proxy generator: ``bank_m`` (n, d_m) for each modality; ``bank_valid`` (n, M) of 0
    and 1, because torch's ``AveragedModel`` cannot average booleans; ``recall`` (M,); and ``frames_seen``, the number
    of training frames that the bank was chosen from.
    """

    is_traceable = False
    needs_total = True
    keeps_frames = True
    first_buffer = "bank_0"

    def __init__(self, config: ProxyConfig, dims: Sequence[int]) -> None:
        self._config, self._dims = config, list(dims)
        self._ridge = config.ridge or 0.0  # never None, which only a regression takes
        self._prepared: _Prepared | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a copy prepares its own: FAISS indices cannot be copied

    @property
    def host_buffers(self) -> list[str]:
        """Names of the buffers that stay in host memory."""
        return [*self._names, "bank_valid"] if self._config.bank_on_host else []

    @property
    def _names(self) -> list[str]:
        return [f"bank_{m}" for m in range(len(self._dims))]

    # --- Learning ---

    def empty(self) -> dict[str, Tensor]:
        """Return the learned buffers as they are before ``fit``."""
        nothing = torch.zeros(0)
        return {
            **dict.fromkeys(self._names, nothing),
            "bank_valid": nothing.to(torch.uint8),
            "recall": torch.ones(len(self._dims), dtype=torch.float64),
            "frames_seen": torch.zeros((), dtype=torch.int64),
        }

    def collect(
        self, frames: Iterable[PairedFrames], dtype: torch.dtype, *, total: int | None, start: int, stop: int | None
    ) -> BankSample:
        """Keep those of the frames ``start`` to ``stop`` that are in the seeded choice of ``max_bank`` of ``total``."""
        if total is None or stop is None:
            raise ValueError("total: a bank of neighbours needs the number of frames to choose from, got None")
        chosen = choose_frames(total, self._config.max_bank)
        chosen = chosen[(chosen >= start) & (chosen < stop)] - start
        # Filled in place: joining batches would take twice the bank's memory.
        features = [torch.empty((len(chosen), dim), dtype=dtype) for dim in self._dims]
        kept = PairedFrames(features, torch.empty((len(chosen), len(self._dims)), dtype=torch.bool))
        filled = end = 0
        for batch in frames:
            begin, end = end, end + len(batch.valid)
            rows = torch.from_numpy(chosen[filled : np.searchsorted(chosen, end)] - begin)
            place = slice(filled, filled + len(rows))
            for column, new in zip((*kept.features, kept.valid), (*batch.features, batch.valid), strict=True):
                torch.index_select(new, 0, rows, out=column[place])
            filled += len(rows)
        return BankSample([kept], end)

    def learn(self, generator: FittedModule, sample: BankSample) -> None:
        """Make the sample the generator's bank, and measure the recall of an approximate engine on it."""
        bank = sample.joined()
        exact = torch.ones(len(self._dims), dtype=torch.float64)
        generator.register_learned(**dict(zip(self._names, bank.features, strict=True)), bank_valid=bank.valid)
        generator.register_learned(frames_seen=torch.tensor(sample.seen), recall=exact)
        if self._config.engine not in EXACT_ENGINES:
            found = [
                min((self._recall(generator, i, index) for index in indices), default=1.0)
                for i, indices in enumerate(self._prepare(generator))
            ]
            generator.register_learned(recall=torch.tensor(found, dtype=torch.float64))

    def _recall(self, generator: FittedModule, source: int, paired: _PairedIndex) -> float:
        return measure_recall(paired.lookup, generator.learned(f"bank_{source}"), paired.k, allowed=paired.allowed)

    def merged(self, generator: FittedModule, other: FittedModule) -> BankSample:
        """Return the banks of two generators as one sample, cut down to ``max_bank`` by a seeded uniform choice."""
        banks = [self._learned_bank(generator), self._learned_bank(other)]
        seen = [int(each.learned("frames_seen")) for each in (generator, other)]
        sizes, limit = [len(bank.valid) for bank in banks], self._config.max_bank
        if limit is not None and sum(sizes) > limit:
            # The share of each in a uniform choice from all data is hypergeometric; within each it is uniform.
            draw = np.random.default_rng(seen)
            first = int(draw.hypergeometric(seen[0], seen[1], limit))
            for place, (size, count) in enumerate(zip(sizes, (first, limit - first), strict=True)):
                rows = torch.from_numpy(np.sort(draw.choice(size, count, replace=False)))
                bank = banks[place]
                banks[place] = PairedFrames([column[rows] for column in bank.features], bank.valid[rows])
        return BankSample(banks, sum(seen))

    def _learned_bank(self, generator: FittedModule) -> PairedFrames:
        features = [generator.learned(name).cpu() for name in self._names]
        return PairedFrames(features, generator.learned("bank_valid").cpu().bool())

    # --- Regenerating ---

    def replace_lost(
        self, generator: FittedModule, batch: StandardizedBatch, effective: Tensor, lost: Tensor
    ) -> list[Tensor]:
        """Return M tensors (B, T, d_m): the batch's features, with proxies where ``lost`` (B, M).

        The frames of a source are searched once, and one solution serves all targets that are lost beside it.
        """
        frames = [x.flatten(0, 1) for x in batch.features]
        # (M, F): the frames that each modality is a source for, and those that each is lost in.
        usable = (effective[:, None] & batch.frame_valid).flatten(0, 1).T
        missing = lost[:, None].expand(batch.frame_valid.shape).flatten(0, 1).T
        # (M, M) frames of each source in which each target is lost, and (M,) frames in which any is: all that the host
        # has to know, at the price of waiting for the device once.
        pairs = (usable[:, None] & missing[None]).sum(dim=2)
        *frames_by_target, frames_by_source = torch.cat(
            [pairs, (usable & missing.any(dim=0)).sum(dim=1)[None]]
        ).tolist()
        totals = [torch.zeros_like(x) for x in frames]
        sources = torch.zeros(missing.shape, dtype=frames[0].dtype, device=frames[0].device)
        for i, size in enumerate(frames_by_source):
            targets = [m for m, count in enumerate(frames_by_target[i]) if count]
            if not targets:
                continue
            rows = torch.nonzero_static(usable[i] & missing.any(dim=0), size=size)[:, 0]
            for m, part, proxies in self._proxies(generator, frames[i], rows, i, targets):
                is_lost = missing[m][part]
                totals[m].index_add_(0, part, torch.where(is_lost[:, None], proxies, 0.0).to(totals[m].dtype))
                sources[m].index_add_(0, part, is_lost.to(sources.dtype))
        sources = sources.clamp(min=1)
        return [
            torch.where(lost[:, m, None, None], (total / sources[m][:, None]).view_as(x), x)
            for m, (total, x) in enumerate(zip(totals, batch.features, strict=True))
        ]

    def _proxies(
        self, generator: FittedModule, features: Tensor, frames: Tensor, source: int, targets: Sequence[int]
    ) -> Iterator[_Proxies]:
        """Yield proxies of ``targets`` for some frames of modality ``source``, within the memory budget.

        Args:
            generator: holds the learned buffers.
            features: (F, d_source), all frames.
            frames: (Q,) numbers of the frames to regenerate from.
            source: a modality.
            targets: other modalities.
        """
        dtype = generator.learned(f"bank_{source}").dtype
        for paired in self._prepare(generator)[source]:
            wanted = [m for m in paired.targets if m in targets]
            if not wanted:
                continue
            size = rows_within(self._config.memory_budget, 16 * (features.shape[1] + 2 * paired.k))
            for part in torch.split(frames, size):
                query = features[part].to(dtype)
                for rows, solved in self._solve(generator, paired, query, source, wanted):
                    for m, values in zip(wanted, solved, strict=True):
                        yield _Proxies(m, part[rows], values)

    def _solve(
        self, generator: FittedModule, paired: _PairedIndex, query: Tensor, source: int, targets: list[int]
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield the targets' proxies for queries (Q, d_source), a slice of the queries at a time."""
        bank = generator.learned(f"bank_{source}")
        partners = [generator.learned(f"bank_{m}") for m in targets]
        # The reference solution gathers and copies this much: neighbours in float64, partners in float32.
        bytes_per_query = paired.k * (24 * bank.shape[1] + 8 * sum(partner.shape[1] for partner in partners))
        size = rows_within(self._config.memory_budget, bytes_per_query)
        _, neighbors = paired.lookup.search(query, paired.k)
        for begin in range(0, query.shape[0], size):
            rows = slice(begin, begin + size)
            solved, _ = unchecked.local_least_squares(
                query[rows],
                *rows_on_device(query.device, bank, partners, neighbors[rows]),
                ridge=self._ridge,
                affine=self._config.affine,
            )
            yield rows, solved

    # --- Indices ---

    def _prepare(self, generator: FittedModule) -> list[list[_PairedIndex]]:
        """Return every modality's indices, made anew only when a buffer was replaced or written to."""
        banks, valid = [generator.learned(name) for name in self._names], generator.learned("bank_valid")
        # Tensors of inference mode count no writes; a load replaces them.
        versions = [(buffer, 0 if buffer.is_inference() else buffer._version) for buffer in (valid, *banks)]
        if self._prepared is None or not self._prepared.is_current(versions):
            indices = [self._index(bank, source, valid.bool()) for source, bank in enumerate(banks)]
            self._prepared = _Prepared(versions, indices)
        return self._prepared.indices

    def _index(self, bank: Tensor, source: int, valid: Tensor) -> list[_PairedIndex]:
        """Return an index of the source's bank for each set of rows that other modalities are paired with."""
        targets_by_rows: list[tuple[Tensor, list[int]]] = []
        for m in range(len(self._dims)):
            if m == source:
                continue
            both = valid[:, source] & valid[:, m]
            same = next((targets for rows, targets in targets_by_rows if torch.equal(rows, both)), None)
            if same is None:
                targets_by_rows.append((both, [m]))
            else:
                same.append(m)
        indices = []
        for both, targets in targets_by_rows:
            size = int(both.sum())
            if size:
                allowed = None if size == both.shape[0] else both
                lookup = unchecked.neighbor_index(
                    bank, self._config.engine, allowed=allowed, memory_budget=self._config.memory_budget // 2
                )
                indices.append(_PairedIndex(lookup, allowed, min(self._config.k, size), targets))
        return indices


class _PairedIndex(NamedTuple):
    """An index of a modality's bank, limited to the rows in which some other modalities are valid too."""

    lookup: NeighborIndex
    allowed: Tensor | None  # (n,) bool, those rows; None for all
    k: int
    targets: list[int]  # those other modalities


class _Prepared(NamedTuple):
    """The indices of every modality's bank, and the buffers that they were made from."""

    versions: list[tuple[Tensor, int]]
    indices: list[list[_PairedIndex]]

    def is_current(self, versions: list[tuple[Tensor, int]]) -> bool:
        """Return whether these are still the same buffers, unwritten since."""
        return all(a is b and x == y for (a, x), (b, y) in zip(self.versions, versions, strict=True))


def choose_frames(total: int, limit: int | None) -> NDArray[np.int64]:
    """Return ascending numbers of at most ``limit`` of ``total`` frames, a seeded uniform choice."""
    if limit is None or total <= limit:
        return np.arange(total)
    # For a few of many, this needs neither the time nor the memory of a permutation of all.
    return np.sort(np.random.default_rng(0).choice(total, limit, replace=False, shuffle=False))


def rows_within(memory_budget: int, bytes_per_row: int) -> int:
    """Return how many rows to process at a time: a quarter of the budget, and at least one."""
    return max(1, memory_budget // 4 // bytes_per_row)


def rows_on_device(
    device: torch.device, bank: Tensor, partners: list[Tensor], neighbors: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return bank, partners and neighbours for a solution on ``device``; from another device, only the rows needed."""
    if bank.device == device:
        return bank, partners, neighbors
    needed, places = torch.unique(neighbors.to(bank.device), return_inverse=True)
    return bank[needed].to(device), [partner[needed].to(device) for partner in partners], places.to(device)
