"""Proxy feature vectors (step 2 of the method): a lost modality regenerated from the good ones.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, n bank rows, Q lost frames, k
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import scipy.linalg
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor

from m3er_fast.config import Bank, ProxyConfig
from m3er_fast.fitted_module import FittedModule
from m3er_fast.functional import unchecked
from m3er_fast.inputs import Features, FeatureSource, check_input_dims, check_mask, iterate_batches, prepare_batch
from m3er_fast.neighbors import EXACT_ENGINES, NeighborEngine, NeighborIndex, measure_recall
from m3er_fast.reliability import SIGNS, fit_reliability, reliability_of, signs_of
from m3er_fast.standardize import StandardizedBatch, clean_frames

# Rows of the span of which a basis is chosen at a time; the winners meet in the next round.
_BASIS_ROUND = 2**14
# Blocks of neighbouring rows that the bank is cut into to be tried on itself, and the most rows tried of each.
_HELD_OUT_BLOCKS = 4
_HELD_OUT_ROWS = 256


class ProxyResult(NamedTuple):
    """Features with proxies in place."""

    features: dict[str, Tensor]  # M of (B, T, d_m)
    abstained: Tensor  # (B,) bool, nothing to regenerate from: the sample is unchanged; or a proxy of it was refused


class ReplacedBatch(NamedTuple):
    """Features with proxies in place, in the modalities' order, and how far they can be trusted."""

    features: list[Tensor]  # M of (B, T, d_m)
    abstained: Tensor  # (B,) bool, as in ProxyResult
    reliability: Tensor  # (B, M), 1 for what is effective, in 0..1 for proxies; 0 for those of which nothing is known


class ProxyGenerator(FittedModule):
    """Regenerates ineffectual modalities from the effective ones, frame by frame.

    A proxy of modality m is the mean over the sample's effective modalities i of

        p_{m|i} = Σ_r a_r w_r,   a = argmin ‖f_i - Σ_r a_r v_r‖² + λ·tr(G)/K·‖a‖²,

    where (v_r, w_r) are paired training frames of modalities i and m, and G is the Gram matrix of the v_r: the linear
    map that sends v_r to w_r, applied to f_i (Mittal et al. 2020, arXiv 1911.05659). With ``bank="neighbours"`` the
    rows are the ``k`` training frames nearest to f_i in the L2 norm. With ``bank="basis"`` they are a basis of the
    training frames' span, chosen by column-pivoted QR; that map is one matrix for all inputs and is folded at ``fit``.

    With ``reliability`` each proxy p comes with how far it can be trusted: the α in 0..1 of which α·p is best by what
    the residual of the fit and the distance to the bank say, as held-out frames of the bank related them to the error
    at ``fit`` (:mod:`m3er_fast.reliability`). A modality's is the mean over the sample's frames.

    A frame without a valid effective source, and a modality that was never seen beside one, becomes zeros, the mean
    of standardised features. A sample without any effective modality is left as it is and reported as abstained.

    Args:
        input_dims: feature count d_m of each modality, in order; at least two.
        bank: "neighbours" or "basis".
        k: neighbours a frame; more than the bank has means all.
        ridge: λ ≥ 0; 0 takes the solution of least norm. The default is what served weakly related modalities best
            (docs/proxies.md); where they are linear maps of each other take 1e-6 or less.
        affine: constrain the coefficients to sum to 1.
        max_bank: the most training frames to keep, a seeded uniform choice; None keeps all.
        max_basis: the most basis rows; None takes the numerical rank.
        engine: of :func:`m3er_fast.functional.nearest_neighbors`. What an approximate one finds is measured at ``fit``.
        memory_budget: bytes to be taken at a time beside bank, features and results.
        bank_on_host: keep the bank in host memory wherever the module goes: for banks larger than the device's. Tiles
            of it are brought over for the search, and the neighbours' rows for the solution.
        reliability: "off": 0 for every proxy; "report": estimated; "weigh": each proxy is multiplied by it too, which
            shrinks it towards the mean of standardised features. On no corpus did that help (docs/proxies.md).
        min_reliability: refuse the proxy of a sample's modality below this: the modality is left out, zeros in its
            place, and the sample counts as abstained. One that training never saw beside another is left out anyway.

    Attributes:
        recall: (M,) buffer, the share of a modality's nearest frames that the engine finds; 1 for exact engines.
        reliability_weights: (M, M, 3) buffer, for source i and target m what α is made of; with ``reliability`` alone.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    recall: Tensor
    frames_seen: Tensor
    reliability_weights: Tensor

    def __init__(
        self,
        input_dims: Mapping[str, int],
        bank: Bank = "neighbours",
        k: int = 16,
        ridge: float = 0.3,
        affine: bool = False,
        max_bank: int | None = None,
        max_basis: int | None = None,
        engine: NeighborEngine = "auto",
        memory_budget: int = 256 * 2**20,
        bank_on_host: bool = False,
    ) -> None:
        super().__init__()
        self.input_dims = check_input_dims(input_dims)
        if len(self.input_dims) < 2:
            raise ValueError(f"input_dims: proxies need two modalities or more, got {self.input_dims}")
        self.config = ProxyConfig(
            bank,
            k,
            ridge,
            affine,
            max_bank,
            max_basis,
            engine,
            memory_budget=memory_budget,
            bank_on_host=bank_on_host,
        )
        modalities = range(len(self.input_dims))
        nothing = torch.zeros(0)
        self._prepared: _Prepared | None = None
        if bank == "neighbours":
            self.register_learned(**{f"bank_{m}": nothing for m in modalities}, bank_valid=nothing.bool())
            self.register_learned(recall=torch.ones(len(modalities), dtype=torch.float64))
            # Frames of the training data, of which the bank is a uniform choice.
            self.register_learned(frames_seen=torch.zeros((), dtype=torch.int64))
            if self._is_reliability_wanted:
                self.register_learned(reliability_weights=torch.zeros(len(modalities), len(modalities), SIGNS))
        else:
            for i, m in self._directions():
                self.register_learned(**{f"{name}_{i}_{m}": nothing for name in ("map", "bias", "basis", "image")})

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` was called, or a fitted state loaded."""
        return self._first_buffer.ndim == 2

    @property
    def _is_reliability_wanted(self) -> bool:
        return False

    @property
    def _first_buffer(self) -> Tensor:
        return self.learned("bank_0" if self.config.bank == "neighbours" else "map_0_1")

    def fit(self, features: FeatureSource, lengths: Any = None, available: Any = None) -> Self:
        """Collect the bank of paired frames from clean training data.

        Args:
            features: mapping from modality to (N, T, d_m) or (N, d_m), or a re-iterable of such batches.
            lengths: (N,) valid leading frames.
            available: (N, M) bool.

        Raises:
            ValueError: for bad input.
        """
        return self.fit_batches(
            lambda: map(clean_frames, iterate_batches(features, lengths, available, input_dims=self.input_dims))
        )

    def fit_batches(self, batches: Callable[[], Iterable[StandardizedBatch]]) -> Self:
        """:meth:`fit` from standardised batches, held one at a time; for a bank of neighbours they are read twice."""
        if self.config.bank == "basis":
            self._fit_basis(batches())
            return self
        total = sum(map(count_paired, batches()))
        return self.fit_sample(self.sample(batches(), total=total))

    def sample(
        self, batches: Iterable[StandardizedBatch], *, total: int, start: int = 0, stop: int | None = None
    ) -> BankSample:
        """What ``fit`` takes from some of the training data into the bank; what it takes from the rest can be joined.

        Frames are counted that have two valid modalities or more, as :func:`count_paired` does. Which of them are
        taken depends on their numbers alone, not on how the data is cut into batches or shared among workers.

        Args:
            batches: standardised samples that follow each other in the training data.
            total: frames of the whole training data, of which ``max_bank`` are taken, a seeded uniform choice.
            start: number of the first frame of ``batches`` among them.
            stop: number of the frame that follows the last one; None is ``total``.

        Raises:
            ValueError: if ``batches`` hold another number of frames, or the bank is a basis, which is no choice of
                frames by chance.
        """
        if self.config.bank != "neighbours":
            raise ValueError(f"sample: wanted bank='neighbours', got {self.config.bank!r}")
        stop = total if stop is None else stop
        chosen = _choose(total, self.config.max_bank)
        chosen = chosen[(chosen >= start) & (chosen < stop)] - start
        # Written in its place: joined from batches the bank would take twice its size.
        bank = self._empty_bank(len(chosen))
        filled = end = 0
        for rows in self._paired(batches):
            begin, end = end, end + rows[0].shape[0]
            here = torch.from_numpy(chosen[filled : np.searchsorted(chosen, end)] - begin)
            for whole, part in zip(bank, rows, strict=True):
                torch.index_select(part, 0, here, out=whole[filled : filled + len(here)])
            filled += len(here)
        if end != stop - start:
            raise ValueError(f"features gave {stop - start} frames when read first, {end} when read again")
        return BankSample(bank, end)

    def fit_sample(self, sample: BankSample) -> Self:
        """:meth:`fit` from what :meth:`sample` gave for all of the training data, joined in its order."""
        self._learn_bank(sample.rows[:-1], sample.rows[-1], sample.seen)
        return self

    def partial_fit(self, features: FeatureSource, lengths: Any = None, available: Any = None) -> Self:
        """Add clean training data to what was learned; arguments as in :meth:`fit`."""
        if not self.is_fitted:
            return self.fit(features, lengths, available)
        more = ProxyGenerator(self.input_dims, **vars(self.config)).to(self._first_buffer.dtype)
        return self.merge(more.fit(features, lengths, available))

    def merge(self, other: ProxyGenerator) -> Self:
        """Add what another generator with the same settings learned from other data, such as another worker's.

        Beyond ``max_bank`` the frames that stay are a seeded uniform choice from all data that either has seen. A basis
        is chosen anew among the rows of both.

        Raises:
            NotFittedError: if either is not fitted.
            ValueError: if their settings differ.
        """
        for generator in (self, other):
            generator._check_fitted()
        if (other.config, other.input_dims) != (self.config, self.input_dims):
            raise ValueError(f"merge: other has {other.extra_repr()}, wanted {self.extra_repr()}")
        if self.config.bank == "basis":
            for i, m in self._directions():
                source, target = (
                    torch.cat([self.learned(name).cpu(), other.learned(name).cpu()]).double().numpy()
                    for name in (f"basis_{i}_{m}", f"image_{i}_{m}")
                )
                self._learn_basis(i, m, source, target)
            return self
        columns = [f"bank_{m}" for m in range(len(self.input_dims))] + ["bank_valid"]
        sizes = [self.learned("bank_valid").shape[0], other.learned("bank_valid").shape[0]]
        chosen = [torch.arange(size) for size in sizes]
        seen = [int(self.frames_seen), int(other.frames_seen)]
        if self.config.max_bank is not None and sum(sizes) > self.config.max_bank:
            # How many of a uniform choice from all data come from each: hypergeometric. Which: uniform.
            draw = np.random.default_rng(seen)
            ours = int(draw.hypergeometric(seen[0], seen[1], self.config.max_bank))
            chosen = [
                torch.from_numpy(np.sort(draw.choice(size, take, replace=False)))
                for size, take in zip(sizes, (ours, self.config.max_bank - ours), strict=True)
            ]
        joined = [
            torch.cat([self.learned(name).cpu()[chosen[0]], other.learned(name).cpu()[chosen[1]]]) for name in columns
        ]
        self._learn_bank(joined[:-1], joined[-1], sum(seen))
        return self

    def proxy(self, features: Features, effective: Any, lengths: Any = None, available: Any = None) -> ProxyResult:
        """Replace the modalities of each sample that are not effective.

        Args:
            features: mapping from modality to a (B, T, d_m) or (B, d_m) tensor, in the units that ``fit`` saw; missing
                or None: unavailable, hence regenerated.
            effective: (B, M) bool, the modalities to trust; an unavailable one is never trusted.
            lengths: (B,) valid leading frames.
            available: (B, M) bool.

        Returns:
            The features, every modality as (B, T, d_m) with zeros in padding, and ``abstained`` (B,).

        Raises:
            NotFittedError: before ``fit``.
            ValueError: naming the argument, what came and what was wanted.
        """
        replaced, abstained, _ = self._checked(features, effective, lengths, available)
        return ProxyResult(dict(zip(self.input_dims, replaced, strict=True)), abstained)

    def reliability(self, features: Features, effective: Any, lengths: Any = None, available: Any = None) -> Tensor:
        """How far the proxies that :meth:`proxy` gives for the same arguments can be trusted: (B, M).

        1 for what is effective, in 0..1 for proxies; 0 for those of which nothing is known, and where abstained. In
        ``M3EROutput`` it stands beside the answer.

        Raises:
            ValueError: if it is not estimated, ``reliability="off"``; or as :meth:`proxy`.
        """
        if not self._is_reliability_wanted:
            raise ValueError("reliability is not estimated: make this ProxyGenerator with reliability='report'")
        return self._checked(features, effective, lengths, available).reliability

    def _checked(self, features: Features, effective: Any, lengths: Any, available: Any) -> ReplacedBatch:
        batch = clean_frames(prepare_batch(features, lengths, available, input_dims=self.input_dims))
        mask = check_mask("effective", effective, batch.available.shape, batch.available.device)
        return self.proxy_batch(batch, mask & batch.available)

    def forward(self, features: Features, effective: Any, lengths: Any = None, available: Any = None) -> ProxyResult:
        """The same as :meth:`proxy`."""
        return self.proxy(features, effective, lengths, available)

    def proxy_batch(self, batch: StandardizedBatch, effective: Tensor) -> ReplacedBatch:
        """:meth:`proxy` on a batch that is cleaned already."""
        self._check_fitted()
        abstained = ~effective.any(dim=1)
        lost = ~effective & ~abstained[:, None]
        proxies, reliability = self._regenerate(batch, effective, lost)
        if False:
            refused = lost & (reliability < self.config.min_reliability) & self.learned("bank_valid").any(dim=0)
            proxies = [proxy.masked_fill(refused[:, m, None, None], 0.0) for m, proxy in enumerate(proxies)]
            abstained = abstained | refused.any(dim=1)
        replaced = [
            torch.where(lost[:, m, None, None], proxy, x)
            for m, (proxy, x) in enumerate(zip(proxies, batch.features, strict=True))
        ]
        return ReplacedBatch(replaced, abstained, reliability)

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise NotFittedError("this ProxyGenerator is not fitted: call fit with clean training data first")

    # --- fitting ---

    def _directions(self) -> list[tuple[int, int]]:
        """Ordered pairs (source, target)."""
        modalities = range(len(self.input_dims))
        return [(i, m) for i in modalities for m in modalities if i != m]

    def _paired(self, batches: Iterable[StandardizedBatch]) -> Iterator[list[Tensor]]:
        """Frames with two valid modalities or more: M tensors (n, d_m) and the (n, M) mask of what is valid."""
        dtype = self._first_buffer.dtype
        for batch in batches:
            paired = batch.frame_valid.sum(dim=2) >= 2
            yield [x[paired].to("cpu", dtype) for x in batch.features] + [batch.frame_valid[paired].cpu()]

    def _empty_bank(self, size: int) -> list[Tensor]:
        bank = [torch.empty((size, dim), dtype=self._first_buffer.dtype) for dim in self.input_dims.values()]
        return [*bank, torch.empty((size, len(self.input_dims)), dtype=torch.bool)]

    def _learn_bank(self, rows: list[Tensor], valid: Tensor, seen: int) -> None:
        self.register_learned(**{f"bank_{m}": bank for m, bank in enumerate(rows)}, bank_valid=valid)
        self.register_learned(frames_seen=torch.tensor(seen), recall=torch.ones(len(rows), dtype=torch.float64))
        if self.config.engine not in EXACT_ENGINES:
            found = [
                min((self._recall_of(i, part) for part in parts), default=1.0)
                for i, parts in enumerate(self._prepare().parts)
            ]
            self.register_learned(recall=torch.tensor(found, dtype=torch.float64))
        if self._is_reliability_wanted:
            self.register_learned(reliability_weights=self._calibrated())

    def _recall_of(self, i: int, part: _BankPart) -> float:
        return measure_recall(part.lookup, self.learned(f"bank_{i}"), part.k, allowed=part.allowed)

    def _calibrated(self) -> Tensor:
        """Weights (M, M, 3) of reliability, from frames of the bank that are regenerated without their own block of it.

        Whole blocks are held out, since a frame's neighbours in time would otherwise answer for it.
        """
        banks = [self.learned(f"bank_{m}") for m in range(len(self.input_dims))]
        weights = banks[0].new_zeros((len(banks), len(banks), SIGNS), dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(banks[0].shape[0])
        block = rows * _HELD_OUT_BLOCKS // max(1, len(rows))
        for i, bank in enumerate(banks):
            for both, targets in self._pairings(i):
                tried: list[tuple[Tensor, list[Tensor], list[Tensor]]] = []
                for held in range(_HELD_OUT_BLOCKS):
                    inside = (block == held).to(both.device)
                    asked, allowed = (both & inside).nonzero()[:, 0], both & ~inside
                    k = min(self.config.k, int(allowed.sum()))
                    if k and len(asked):
                        chosen = asked[torch.randperm(len(asked), generator=generator)[:_HELD_OUT_ROWS].to(both.device)]
                        index = unchecked.neighbor_index(
                            bank, "torch", allowed=allowed, memory_budget=self.config.memory_budget // 2
                        )
                        for here, proxies, signs in self._solved(index, k, bank[chosen], i, targets):
                            tried.append((signs, proxies, [banks[m][chosen[here]] for m in targets]))
                for place, m in enumerate(targets):
                    weights[i, m] = fit_reliability(
                        (signs, proxies[place], wanted[place]) for signs, proxies, wanted in tried
                    )
        return weights

    def _fit_basis(self, batches: Iterable[StandardizedBatch]) -> None:
        """Choose each direction's basis in rounds, so that no more than a round of frames is held at a time.

        The rows that column-pivoted QR chooses from one round meet those of the next: tournament pivoting
        (Demmel, Grigori, Gu and Xiang 2015).
        """
        pools: dict[tuple[int, int], list[Any]] = {
            (i, m): [np.zeros((0, dim)) for dim in (self._dim(i), self._dim(m))] for i, m in self._directions()
        }
        for rows in self._paired(batches):
            for (i, m), pool in pools.items():
                both = rows[-1][:, i] & rows[-1][:, m]
                for begin in range(0, rows[0].shape[0], _BASIS_ROUND):
                    part = slice(begin, begin + _BASIS_ROUND)
                    new = [rows[x][part][both[part]].double().numpy() for x in (i, m)]
                    pool[:] = [np.concatenate(x) for x in zip(pool, new, strict=True)]
                    if len(pool[0]) > _BASIS_ROUND:
                        chosen = _pivots(pool[0])
                        pool[:] = [x[chosen] for x in pool]
        for (i, m), (source, target) in pools.items():
            self._learn_basis(i, m, source, target)

    def _dim(self, m: int) -> int:
        return list(self.input_dims.values())[m]

    def _learn_basis(self, i: int, m: int, source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> None:
        chosen = _pivots(source)[: self.config.max_basis]
        matrix, bias = self._fold(source[chosen], target[chosen], seen=len(source) > 0)
        learned = {"map": matrix, "bias": bias, "basis": source[chosen], "image": target[chosen]}
        self.register_learned(**{f"{name}_{i}_{m}": torch.from_numpy(value) for name, value in learned.items()})

    def _fold(self, basis: np.ndarray[Any, Any], images: np.ndarray[Any, Any], *, seen: bool) -> tuple[Any, Any]:
        """The basis solve as one affine map: proxy = matrix @ f + bias; if nothing was ever seen it has no rows."""
        if not seen:
            return np.zeros((0, basis.shape[1])), np.zeros(0)
        matrix, bias = np.zeros((images.shape[1], basis.shape[1])), np.zeros(images.shape[1])
        if not len(basis):  # nothing but zeros was seen
            return matrix, bias
        gram = basis @ basis.T
        gram[np.diag_indices_from(gram)] += self.config.ridge * gram.trace() / len(basis)
        inverse = np.linalg.pinv(gram, hermitian=True)
        solve = inverse @ basis  # coefficients of f
        if self.config.affine:  # the multiplier of Σ a = 1 adds its share along the inverse's row sums
            along = inverse.sum(axis=1) / inverse.sum()
            solve = solve - np.outer(along, solve.sum(axis=0))
            bias = images.T @ along
        return images.T @ solve, bias

    # --- the bank, prepared for searches ---

    def _prepare(self) -> _Prepared:
        """Every modality's indices, made anew only when a buffer was replaced or written to."""
        valid = self.learned("bank_valid")
        banks = [self.learned(f"bank_{m}") for m in range(len(self.input_dims))]
        state = [(buffer, buffer._version) for buffer in (valid, *banks)]
        if self._prepared is None or not self._prepared.holds(state):
            self._prepared = _Prepared(state, [self._parts(i, bank) for i, bank in enumerate(banks)])
        return self._prepared

    def _pairings(self, i: int) -> list[tuple[Tensor, list[int]]]:
        """The sets of rows in which modality i and some of the others are valid, each with those others."""
        valid = self.learned("bank_valid")
        found: list[tuple[Tensor, list[int]]] = []
        for m in range(len(self.input_dims)):
            if m == i:
                continue
            both = valid[:, i] & valid[:, m]
            same = next((targets for rows, targets in found if torch.equal(rows, both)), None)
            if same is None:
                found.append((both, [m]))
            else:
                same.append(m)
        return found

    def _parts(self, i: int, bank: Tensor) -> list[_BankPart]:
        """The bank of modality i, once for each set of rows that some of the others are paired with."""
        parts = []
        for both, targets in self._pairings(i):
            size = int(both.sum())
            if size:
                allowed = None if size == both.shape[0] else both
                index = unchecked.neighbor_index(
                    bank, self.config.engine, allowed=allowed, memory_budget=self.config.memory_budget // 2
                )
                parts.append(_BankPart(index, allowed, min(self.config.k, size), tuple(targets)))
        return parts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a copy makes its own: FAISS's cannot be copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.config.bank_on_host:
            return super()._apply(fn, recurse)
        # Only the dtype of what fn gives counts for the bank; not even for a moment may it be on the device.
        banks = {name: self._buffers.pop(name) for name in list(self._buffers) if name.startswith("bank_")}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(banks)
        for name, bank in banks.items():
            if bank is not None and bank.is_floating_point():
                dtype = torch.promote_types(fn(bank[:0]).dtype, torch.float32)
                self._buffers[name] = bank.to("cpu", dtype)
        return self

    # --- regenerating ---

    def _regenerate(self, batch: StandardizedBatch, effective: Tensor, lost: Tensor) -> tuple[list[Tensor], Tensor]:
        """M tensors (B, T, d_m): the proxies where a modality is lost, and what is not to be looked at elsewhere.

        Beside them reliability (B, M).
        """
        frames = [x.flatten(0, 1) for x in batch.features]
        # (M, B·T): the frames that each modality is a source for, and those that each is lost in.
        usable = (effective[:, None] & batch.frame_valid).flatten(0, 1).T
        missing = lost[:, None].expand(batch.frame_valid.shape).flatten(0, 1).T
        # How many frames every modality is asked for, by each other one: all that the host has to know.
        pairs = (usable[:, None] & missing[None]).sum(dim=2)
        asked, any_asked = self._counts(pairs, (usable & missing.any(dim=0)).sum(dim=1))
        totals = [torch.zeros_like(x) for x in frames]
        sources = torch.zeros(missing.shape, dtype=frames[0].dtype, device=frames[0].device)
        trusted = torch.zeros_like(sources)
        for i, count in enumerate(any_asked):
            targets = [m for m, number in enumerate(asked[i]) if number]
            if not targets:
                continue
            rows = torch.nonzero_static(usable[i] & missing.any(dim=0), size=count)[:, 0]
            for m, part, proxies, trust in self._proxies(frames[i], rows, i, targets):
                here = missing[m][part]
                if trust is not None:
                    trusted[m].index_add_(0, part, torch.where(here, trust, 0.0).to(trusted.dtype))
                    if self.config.reliability == "weigh":
                        proxies = proxies * trust[:, None]
                totals[m].index_add_(0, part, torch.where(here[:, None], proxies, 0.0).to(totals[m].dtype))
                sources[m].index_add_(0, part, here.to(sources.dtype))
        sources = sources.clamp(min=1)
        means = [
            (total / sources[m][:, None]).view_as(x)
            for m, (total, x) in enumerate(zip(totals, batch.features, strict=True))
        ]
        # The mean over the frames that some effective modality speaks in; in the others there is nothing to regenerate.
        shape = batch.frame_valid.shape[:2]
        spoken = usable.any(dim=0).view(shape).sum(dim=1)
        mean = (trusted / sources).view(len(trusted), *shape).sum(dim=2) / spoken.clamp(min=1)
        return means, torch.where(effective, 1.0, mean.T)

    @staticmethod
    def _counts(pairs: Tensor, rows: Tensor) -> tuple[list[list[int]], list[int]]:
        """Both on the host, at the price of waiting for the device once."""
        *asked, counts = torch.cat([pairs, rows[None]]).tolist()
        return asked, counts

    def _proxies(
        self, frames: Tensor, rows: Tensor, i: int, targets: list[int]
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """Proxies (Q, d_m) of some frames of modality i, as (m, rows, proxies, reliability (Q,) or None).

        No more at a time than the budget.
        """
        if self.config.bank == "basis":
            for m in targets:
                matrix, bias = self.learned(f"map_{i}_{m}"), self.learned(f"bias_{i}_{m}")
                if matrix.shape[0]:
                    size = self._chunk(2 * 8 * sum(matrix.shape))
                    for part in torch.split(rows, size):
                        yield m, part, torch.addmm(bias, frames[part].to(matrix.dtype), matrix.mT), None
            return
        dtype = self.learned(f"bank_{i}").dtype
        for searched in self._prepare().parts[i]:
            wanted = [m for m in searched.targets if m in targets]
            if not wanted:
                continue
            for several in torch.split(rows, self._chunk(16 * (frames.shape[1] + 2 * searched.k))):
                query = frames[several].to(dtype)
                for here, solved, signs in self._solved(searched.lookup, searched.k, query, i, wanted):
                    for m, proxies in zip(wanted, solved, strict=True):
                        trust = None
                        if self._is_reliability_wanted:
                            trust = reliability_of(signs, self.reliability_weights[i, m])
                        yield m, several[here], proxies, trust

    def _solved(
        self, index: NeighborIndex, k: int, query: Tensor, i: int, targets: list[int]
    ) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
        """Proxies of all targets for queries (Q, d_i), and the signs (Q, 3) of their reliability, a slice at a time."""
        bank = self.learned(f"bank_{i}")
        partners = [self.learned(f"bank_{m}") for m in targets]
        if self._is_reliability_wanted:
            partners.append(bank)  # the query itself, rebuilt by the same coefficients
        # What the solution in plain PyTorch gathers and copies: neighbours in float64, partners in float32.
        size = self._chunk(k * (24 * bank.shape[1] + 8 * sum(partner.shape[1] for partner in partners)))
        distances, neighbors = index.search(query, k)
        for begin in range(0, query.shape[0], size):
            here = slice(begin, begin + size)
            solved, _ = unchecked.local_least_squares(
                query[here],
                *_on_device(query.device, bank, partners, neighbors[here]),
                ridge=self.config.ridge,
                affine=self.config.affine,
            )
            signs = query.new_zeros((0, SIGNS))
            if self._is_reliability_wanted:
                signs = signs_of(query[here], solved.pop(), distances[here, 0])
            yield here, solved, signs

    def _chunk(self, bytes_per_frame: int) -> int:
        return max(1, self.config.memory_budget // 4 // bytes_per_frame)

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return f"{self.input_dims}, {self.config}, fitted={self.is_fitted}"


class BankSample(NamedTuple):
    """Frames that become a bank, from :meth:`ProxyGenerator.sample`."""

    rows: list[Tensor]  # M of (n, d_m), and the (n, M) mask of what is valid
    seen: int  # frames that they were chosen from

    @staticmethod
    def join(samples: Sequence[BankSample]) -> BankSample:
        """All together, in their order."""
        rows = [torch.cat(columns) for columns in zip(*(sample.rows for sample in samples), strict=True)]
        return BankSample(rows, sum(sample.seen for sample in samples))


def count_paired(batch: StandardizedBatch) -> int:
    """Frames that a bank can be made of: those with two valid modalities or more."""
    return int((batch.frame_valid.sum(dim=2) >= 2).sum())


class _BankPart(NamedTuple):
    """A modality's bank, cut down to the rows in which some other modalities are valid too."""

    lookup: NeighborIndex
    allowed: Tensor | None  # (n,) bool, the rows; None for all
    k: int
    targets: tuple[int, ...]  # those other modalities


class _Prepared(NamedTuple):
    """Indices of every modality's bank, and the buffers that they were made from."""

    state: list[tuple[Tensor, int]]
    parts: list[list[_BankPart]]

    def holds(self, state: list[tuple[Tensor, int]]) -> bool:
        """Whether these are still the same buffers, and unwritten."""
        return all(a is b and x == y for (a, x), (b, y) in zip(self.state, state, strict=True))


def _on_device(
    device: torch.device, bank: Tensor, partners: list[Tensor], neighbors: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Bank, partners and neighbours for a solution on ``device``: of a bank elsewhere only the rows that are named."""
    if bank.device == device:
        return bank, partners, neighbors
    named, places = torch.unique(neighbors.to(bank.device), return_inverse=True)
    return bank[named].to(device), [partner[named].to(device) for partner in partners], places.to(device)


def _pivots(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows that span all of them, as many as the numerical rank, the most telling first: column-pivoted QR."""
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    triangle, order = scipy.linalg.qr(rows.T, mode="r", pivoting=True)
    diagonal = np.abs(np.diagonal(triangle))
    # The frames are float32: what QR leaves below their precision is rounding, not another direction. It does not
    # grow with the number of frames, since the diagonal measures single ones.
    rank = int((diagonal > rows.shape[1] * np.finfo(np.float32).eps * diagonal[0]).sum())
    chosen: np.ndarray[Any, Any] = order[:rank]
    return chosen


def _choose(total: int, limit: int | None) -> np.ndarray[Any, Any]:
    """Ascending numbers of a seeded uniform choice of at most ``limit`` of ``total`` frames."""
    if limit is None or total <= limit:
        return np.arange(total)
    # Of a few among many this takes neither the time nor the memory that a permutation of all would.
    return np.sort(np.random.default_rng(0).choice(total, limit, replace=False, shuffle=False))
