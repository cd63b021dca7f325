"""Proxy feature vectors (step 2 of the method): a lost modality regenerated from the good ones.

Dimension legend: M modalities, B samples, T time steps, F = B·T frames, d_m features of modality m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from m3er_fast._proxy_bank import BankSample, NeighbourBank, PairedFrames
from m3er_fast._proxy_basis import BasisBank, BasisSample
from m3er_fast._proxy_operator import numbered, replace_lost
from m3er_fast._proxy_regression import RegressionBank, RegressionSample
from m3er_fast._settings import takes_settings_of
from m3er_fast._validation import not_fitted
from m3er_fast.config import Bank, ProxyConfig
from m3er_fast.fitted_module import FittedModule, ordinary_tensors
from m3er_fast.inputs import Array, Features, FeatureSource, check_input_dims, check_mask, prepare_batch
from m3er_fast.standardize import StandardizedBatch, clean_batches, clean_frames

__all__ = [
    "BankSample",
    "BasisSample",
    "ProxyGenerator",
    "ProxyResult",
    "RegressionSample",
    "ReplacedBatch",
    "count_paired",
]


class ProxyResult(NamedTuple):
    """Features with proxies in place."""

    features: dict[str, Tensor]  # M of (B, T, d_m)
    abstained: Tensor  # (B,) bool, no modality to regenerate from: the sample is unchanged


class ReplacedBatch(NamedTuple):
    """Features with proxies in place, in the modalities' order."""

    features: list[Tensor]  # M of (B, T, d_m)
    abstained: Tensor  # (B,) bool, as in ProxyResult


class ProxyBank(Protocol):
    """A kind of bank: how it learns from training frames, and how it regenerates.

    What it learns is kept in the buffers of the generator that it is part of; a bank itself holds settings and caches.
    """

    is_traceable: bool  # whether torch can trace ``replace_lost``: no shape depends on values
    needs_total: bool  # whether ``collect`` needs the number of all training frames
    keeps_frames: bool  # whether training frames are among the learned buffers
    first_buffer: str  # name of a learned buffer that is a matrix as soon as the bank is fitted

    def __init__(self, config: ProxyConfig, dims: Sequence[int]) -> None: ...

    @property
    def host_buffers(self) -> Sequence[str]:
        """Names of the buffers that stay in host memory."""
        ...

    def empty(self) -> dict[str, Tensor]:
        """Return the learned buffers as they are before ``fit``, in the order of ``state_dict``."""
        ...

    def collect(
        self, frames: Iterable[PairedFrames], dtype: torch.dtype, *, total: int | None, start: int, stop: int | None
    ) -> Any:
        """Return the part of some training frames that :meth:`learn` needs, with ``merge`` and ``consolidated``."""
        ...

    def learn(self, generator: FittedModule, sample: Any) -> None:
        """Register the learned buffers of all collected parts, merged in the order of the data."""
        ...

    def merged(self, generator: FittedModule, other: FittedModule) -> Any:
        """Return what two generators have learned, as one part."""
        ...

    def replace_lost(
        self, generator: FittedModule, batch: StandardizedBatch, effective: Tensor, lost: Tensor
    ) -> list[Tensor]:
        """Return M tensors (B, T, d_m): the batch's features, with proxies where ``lost`` (B, M)."""
        ...


_BANKS: dict[Bank, type[ProxyBank]] = {
    "regression": RegressionBank,
    "neighbours": NeighbourBank,
    "basis": BasisBank,
}


@takes_settings_of(ProxyConfig)
class ProxyGenerator(FittedModule):
    """Regenerates ineffectual modalities from the effective ones, frame by frame.

    A proxy of modality m is the mean of p_{m|i} over the sample's effective modalities i, each a linear map of the
    frame f_i that is learned from paired training frames (v, w) of modalities i and m, the paper's "any linear
    transformation" (Mittal et al. 2020, arXiv 1911.05659). With ``bank="regression"`` it is one affine map for all
    inputs, the ridge regression of w on v:

        p_{m|i} = w̄ + W (f_i - v̄),   W = argmin Σ ‖w - w̄ - W (v - v̄)‖² + λ·tr(S)/d_i·‖W‖²,   S = Σ (v - v̄)(v - v̄)ᵀ.

    The other banks hold frames, and send some v_r to their partners w_r:

        p_{m|i} = Σ_r a_r w_r,   a = argmin ‖f_i - Σ_r a_r v_r‖² + λ·tr(G)/K·‖a‖²,

    where G is the Gram matrix of the v_r. With ``bank="neighbours"`` they are the ``k`` training frames nearest to f_i
    in the L2 norm. With ``bank="basis"`` they are a basis of the training frames' span, chosen by column-pivoted QR;
    that map, too, is one matrix for all inputs and is folded at ``fit``.

    A frame without a valid effective source, and a modality that was never seen beside one, becomes zeros, the mean
    of standardised features. A sample without any effective modality is left as it is and reported as abstained.

    Training data may be learned in parts, for example by several workers: :meth:`collect` for each part, ``merge`` of
    the parts in the order of the data, and :meth:`fit_collected`.

    Args:
        input_dims: feature count d_m of each modality, in order; at least two.
        {settings}

    Attributes:
        recall: (M,) buffer of a bank of neighbours, the share of a modality's nearest frames that the engine finds; 1
            for exact engines.
        ridge: (M, M) buffer of a regression, the λ of source i and target m.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    @ordinary_tensors()
    def __init__(self, input_dims: Mapping[str, int], *settings: Any, **named_settings: Any) -> None:
        super().__init__()
        self.input_dims = check_input_dims(input_dims)
        if len(self.input_dims) < 2:
            raise ValueError(f"input_dims: proxies need two modalities or more, got {self.input_dims}")
        self.config = ProxyConfig(*settings, **named_settings)
        self._bank = _BANKS[self.config.bank](self.config, list(self.input_dims.values()))
        self.register_learned(**self._bank.empty())
        self._number = numbered(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = numbered(self)  # a copy's own

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` was called, or a fitted state loaded."""
        return self._first_buffer.ndim == 2

    @property
    def keeps_frames(self) -> bool:
        """Whether what ``fit`` learns holds training frames, which a saved model then shares."""
        return self._bank.keeps_frames

    @property
    def _first_buffer(self) -> Tensor:
        return self.learned(self._bank.first_buffer)

    # --- Learning ---

    def fit(self, features: FeatureSource, *, lengths: Array | None = None, available: Array | None = None) -> Self:
        """Learn the bank from the paired frames of clean training data.

        Args:
            features: mapping from modality to (N, T, d_m) or (N, d_m), or a re-iterable of such batches.
            lengths: (N,) valid leading frames.
            available: (N, M) bool.

        Raises:
            ValueError: for bad input.

        Warns:
            UserWarning: as :meth:`m3er_fast.Standardizer.fit` does.
        """
        batches, watch = clean_batches(self.input_dims, features, lengths, available)
        self.fit_batches(batches)
        watch.warn()
        return self

    def fit_batches(self, batches: Callable[[], Iterable[StandardizedBatch]]) -> Self:
        """Learn as :meth:`fit` does from standardised batches, one at a time; a bank of neighbours reads them twice."""
        total = sum(map(count_paired, batches())) if self._bank.needs_total else None
        return self.fit_collected(self.collect(batches(), total=total))

    def collect(
        self, batches: Iterable[StandardizedBatch], *, total: int | None, start: int = 0, stop: int | None = None
    ) -> Any:
        """Return the part of some training data that the bank is learned from.

        Only frames with two valid modalities or more count, as in :func:`count_paired`. A bank of neighbours takes
        frames by their numbers alone, however the data is cut into batches or shared among workers.

        Args:
            batches: standardised samples that follow each other in the training data.
            total: frames of the whole training data, of which ``max_bank`` are kept, a seeded uniform choice. Only a
                bank of neighbours needs it.
            start: number of the first frame of ``batches`` among them.
            stop: number after the last frame of ``batches``; None is ``total``.

        Returns:
            A :class:`RegressionSample`, :class:`BankSample` or :class:`BasisSample`. ``part.merge(other)`` joins it
            with the part that follows; ``part.consolidated()`` is the same in one piece, for storage and transport.

        Raises:
            ValueError: if ``batches`` hold another number of frames, or ``total`` is missing.
        """
        stop = total if stop is None else stop
        frames = self._paired_frames(batches, None if stop is None else stop - start)
        return self._bank.collect(frames, self._first_buffer.dtype, total=total, start=start, stop=stop)

    def fit_collected(self, part: Any) -> Self:
        """Learn as :meth:`fit` does from the parts that :meth:`collect` returned for all data, merged in its order."""
        self._bank.learn(self, part)
        return self

    def partial_fit(
        self, features: FeatureSource, *, lengths: Array | None = None, available: Array | None = None
    ) -> Self:
        """Add clean training data to what was learned; arguments as in :meth:`fit`."""
        if not self.is_fitted:
            return self.fit(features, lengths=lengths, available=available)
        more = ProxyGenerator(self.input_dims, **vars(self.config)).to(self._first_buffer.dtype)
        return self.merge(more.fit(features, lengths=lengths, available=available))

    def merge(self, other: ProxyGenerator) -> Self:
        """Add what another generator with the same settings has learned from other data.

        If both banks hold more than ``max_bank`` frames, a seeded uniform choice from all frames that either has seen
        remains. A basis is chosen anew among the rows of both.

        Raises:
            NotFittedError: if either is not fitted.
            ValueError: if their settings differ.
        """
        for generator in (self, other):
            generator._check_fitted()
        if (other.config, other.input_dims) != (self.config, self.input_dims):
            raise ValueError(f"merge: other has {other.extra_repr()}, wanted {self.extra_repr()}")
        return self.fit_collected(self._bank.merged(self, other))

    def _paired_frames(self, batches: Iterable[StandardizedBatch], expected: int | None) -> Iterator[PairedFrames]:
        """Yield the frames of each batch that have two valid modalities or more, on the host."""
        dtype, count = self._first_buffer.dtype, 0
        for batch in batches:
            paired = batch.frame_valid.sum(dim=2) >= 2
            frames = PairedFrames([x[paired].to("cpu", dtype) for x in batch.features], batch.frame_valid[paired].cpu())
            count += len(frames.valid)
            yield frames
        if expected is not None and count != expected:
            raise ValueError(f"features gave {expected} frames when read first, {count} when read again")

    # --- Regenerating ---

    def proxy(
        self, features: Features, effective: Any, lengths: Array | None = None, available: Array | None = None
    ) -> ProxyResult:
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
        batch = clean_frames(prepare_batch(features, lengths, available, input_dims=self.input_dims))
        mask = check_mask("effective", effective, batch.available.shape, batch.available.device)
        replaced = self.proxy_batch(batch, mask & batch.available)
        return ProxyResult(dict(zip(self.input_dims, replaced.features, strict=True)), replaced.abstained)

    def forward(
        self, features: Features, effective: Any, lengths: Array | None = None, available: Array | None = None
    ) -> ProxyResult:
        """Replace the modalities of each sample that are not effective; the same as :meth:`proxy`."""
        return self.proxy(features, effective, lengths, available)

    def proxy_batch(self, batch: StandardizedBatch, effective: Tensor) -> ReplacedBatch:
        """Replace as :meth:`proxy` does in a batch that is cleaned already."""
        self._check_fitted()
        abstained = ~effective.any(dim=1)
        lost = ~effective & ~abstained[:, None]
        if torch.compiler.is_compiling() and not self._bank.is_traceable:
            if torch.compiler.is_exporting():
                raise ValueError(
                    f"proxies of bank={self.config.bank!r} cannot be exported, because their search depends on values: "
                    "wanted bank='regression' or 'basis', or a model without proxies: model.ablated(proxy=False)"
                )
            return ReplacedBatch(replace_lost(*batch[:4], effective, lost, self._number), abstained)
        return ReplacedBatch(self.replace_lost(batch, effective, lost), abstained)

    def replace_lost(self, batch: StandardizedBatch, effective: Tensor, lost: Tensor) -> list[Tensor]:
        """Return M tensors (B, T, d_m): the batch's features, with proxies where ``lost`` (B, M)."""
        return self._bank.replace_lost(self, batch, effective, lost)

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise not_fitted("this ProxyGenerator is not fitted: call fit with clean training data first")

    # --- The module ---

    @ordinary_tensors()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        host = {name: self._buffers.pop(name) for name in self._bank.host_buffers}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(host)
        for name, buffer in host.items():
            if buffer is not None and buffer.is_floating_point():
                # Only the dtype of fn's result counts: not even for a moment may the bank be on the device.
                dtype = torch.promote_types(fn(buffer[:0]).dtype, torch.float32)
                self._buffers[name] = buffer.to("cpu", dtype)
        return self

    def extra_repr(self) -> str:
        """Return the settings, for ``print(module)``."""
        return f"{self.input_dims}, {self.config}, fitted={self.is_fitted}"


def count_paired(batch: StandardizedBatch) -> int:
    """Return the number of frames that a bank can learn from: those with two valid modalities or more."""
    return int((batch.frame_valid.sum(dim=2) >= 2).sum())
