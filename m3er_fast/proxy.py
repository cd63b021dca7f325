"""Proxy feature vectors (step 2 of the method): a lost modality regenerated from the good ones.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, n bank rows, Q lost frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import scipy.linalg
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor

from m3er_fast import functional
from m3er_fast.config import Bank, Engine, ProxyConfig
from m3er_fast.inputs import Features, FeatureSource, check_input_dims, iterate_batches, prepare_batch
from m3er_fast.standardize import StandardizedBatch, clean_frames
from m3er_fast.state import FittedModule

# Frames solved at a time: their gathered neighbours (16 of 300 features in float64) then take some 80 MB.
_CHUNK_FRAMES = 2048


class ProxyResult(NamedTuple):
    """Features with proxies in place."""

    features: dict[str, Tensor]  # M of (B, T, d_m)
    abstained: Tensor  # (B,) bool, no effective modality to regenerate from: the sample is unchanged


class ProxyGenerator(FittedModule):
    """Regenerates ineffectual modalities from the effective ones, frame by frame.

    A proxy of modality m is the mean over the sample's effective modalities i of

        p_{m|i} = Σ_r a_r w_r,   a = argmin ‖f_i - Σ_r a_r v_r‖² + λ·tr(G)/K·‖a‖²,

    where (v_r, w_r) are paired training frames of modalities i and m, and G is the Gram matrix of the v_r: the linear
    map that sends v_r to w_r, applied to f_i (Mittal et al. 2020, arXiv 1911.05659). With ``bank="neighbours"`` the
    rows are the ``k`` training frames nearest to f_i in the L2 norm. With ``bank="basis"`` they are a basis of the
    training frames' span, chosen by column-pivoted QR; that map is one matrix for all inputs and is folded at ``fit``.

    A frame without a valid effective source, and a modality that was never seen beside one, becomes zeros, the mean
    of standardised features. A sample without any effective modality is left as it is and reported as abstained.

    Args:
        input_dims: feature count d_m of each modality, in order; at least two.
        bank: "neighbours" or "basis".
        k: neighbours a frame; more than the bank has means all.
        ridge: λ ≥ 0; 0 takes the solution of least norm.
        affine: constrain the coefficients to sum to 1.
        max_bank: the most training frames to keep, a seeded uniform choice; None keeps all.
        max_basis: the most basis rows; None takes the numerical rank.
        engine: of :func:`m3er_fast.functional.nearest_neighbors`.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        input_dims: Mapping[str, int],
        bank: Bank = "neighbours",
        k: int = 16,
        ridge: float = 1e-2,
        affine: bool = False,
        max_bank: int | None = None,
        max_basis: int | None = None,
        engine: Engine = "auto",
    ) -> None:
        super().__init__()
        self.input_dims = check_input_dims(input_dims)
        if len(self.input_dims) < 2:
            raise ValueError(f"input_dims: proxies need two modalities or more, got {self.input_dims}")
        self.config = ProxyConfig(bank, k, ridge, affine, max_bank, max_basis, engine)
        modalities = range(len(self.input_dims))
        nothing = torch.zeros(0)
        if bank == "neighbours":
            self.register_learned(**{f"bank_{m}": nothing for m in modalities}, bank_valid=nothing.bool())
        else:
            for i, m in self._directions():
                self.register_learned(**{f"map_{i}_{m}": nothing, f"bias_{i}_{m}": nothing})

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` was called, or a fitted state loaded."""
        return self._first_buffer.ndim == 2

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
        """:meth:`fit` from standardised batches."""
        rows, valid = self._collect(batches())
        if self.config.bank == "neighbours":
            self.register_learned(**{f"bank_{m}": bank for m, bank in enumerate(rows)}, bank_valid=valid)
            return self
        for i, m in self._directions():
            both = valid[:, i] & valid[:, m]
            matrix, bias = self._fold(rows[i][both].double().numpy(), rows[m][both].double().numpy())
            self.register_learned(**{f"map_{i}_{m}": torch.from_numpy(matrix), f"bias_{i}_{m}": torch.from_numpy(bias)})
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
        batch = clean_frames(prepare_batch(features, lengths, available, input_dims=self.input_dims))
        mask = torch.as_tensor(effective)
        if mask.dtype != torch.bool or mask.shape != batch.available.shape:
            raise ValueError(
                f"effective must be booleans of shape {tuple(batch.available.shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        replaced, abstained = self.proxy_batch(batch, mask.to(batch.available.device) & batch.available)
        return ProxyResult(dict(zip(self.input_dims, replaced, strict=True)), abstained)

    def forward(self, features: Features, effective: Any, lengths: Any = None, available: Any = None) -> ProxyResult:
        """The same as :meth:`proxy`."""
        return self.proxy(features, effective, lengths, available)

    def proxy_batch(self, batch: StandardizedBatch, effective: Tensor) -> tuple[list[Tensor], Tensor]:
        """:meth:`proxy` on a batch that is cleaned already: M features and ``abstained``."""
        if not self.is_fitted:
            raise NotFittedError("this ProxyGenerator is not fitted: call fit with clean training data first")
        abstained = ~effective.any(dim=1)
        replaced = []
        for m, x in enumerate(batch.features):
            lost = ~effective[:, m] & ~abstained
            proxies = self._regenerate(batch, effective, lost, m)
            replaced.append(torch.where(lost[:, None, None], proxies, x))
        return replaced, abstained

    # --- fitting ---

    def _directions(self) -> list[tuple[int, int]]:
        """Ordered pairs (source, target)."""
        modalities = range(len(self.input_dims))
        return [(i, m) for i in modalities for m in modalities if i != m]

    def _collect(self, batches: Iterable[StandardizedBatch]) -> tuple[list[Tensor], Tensor]:
        """Frames with two valid modalities or more: M tensors (n, d_m) and the (n, M) mask of what is valid."""
        generator = torch.Generator().manual_seed(0)
        dtype = self._first_buffer.dtype
        limit = self.config.max_bank
        empty = [torch.zeros((0, dim), dtype=dtype) for dim in self.input_dims.values()]
        empty += [torch.zeros((0, len(self.input_dims)), dtype=torch.bool), torch.zeros(0, dtype=torch.float64)]
        parts = [empty]
        for batch in batches:
            paired = batch.frame_valid.sum(dim=2) >= 2
            frames = [x[paired].to("cpu", dtype) for x in batch.features]
            # Each frame draws a number, and the smallest stay: a uniform choice, however the data is cut into batches.
            draws = torch.rand(frames[0].shape[0], dtype=torch.float64, generator=generator)
            parts.append([*frames, batch.frame_valid[paired].cpu(), draws])
            if limit is not None and sum(part[-1].shape[0] for part in parts) > 2 * limit:
                parts = [_smallest_draws(parts, limit)]
        kept = _smallest_draws(parts, limit)
        return kept[:-2], kept[-2]

    def _fold(self, source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        """The basis solve as one affine map: proxy = matrix @ f + bias; without paired frames it has no rows."""
        if not len(source):
            return np.zeros((0, source.shape[1])), np.zeros(0)
        matrix, bias = np.zeros((target.shape[1], source.shape[1])), np.zeros(target.shape[1])
        triangle, order = scipy.linalg.qr(source.T, mode="r", pivoting=True)
        diagonal = np.abs(np.diagonal(triangle))
        # The frames are float32: what QR leaves below their precision is rounding, not another direction. It does not
        # grow with the number of frames, since the diagonal measures single ones.
        rank = int((diagonal > source.shape[1] * np.finfo(np.float32).eps * diagonal[0]).sum())
        chosen = order[: min(rank, self.config.max_basis or rank)]
        if not len(chosen):
            return matrix, bias
        basis, images = source[chosen], target[chosen]
        gram = basis @ basis.T
        gram[np.diag_indices_from(gram)] += self.config.ridge * gram.trace() / len(chosen)
        inverse = np.linalg.pinv(gram, hermitian=True)
        solve = inverse @ basis  # coefficients of f
        if self.config.affine:  # the multiplier of Σ a = 1 adds its share along the inverse's row sums
            along = inverse.sum(axis=1) / inverse.sum()
            solve = solve - np.outer(along, solve.sum(axis=0))
            bias = images.T @ along
        return images.T @ solve, bias

    # --- regenerating ---

    def _regenerate(self, batch: StandardizedBatch, effective: Tensor, lost: Tensor, m: int) -> Tensor:
        """(B, T, d_m): the proxies of modality m where it is lost, zeros elsewhere."""
        x = batch.features[m]
        total = torch.zeros_like(x)
        sources = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        for i in range(len(self.input_dims)):
            if i == m:
                continue
            wanted = (lost & effective[:, i])[:, None] & batch.frame_valid[:, :, i]
            proxies = self._map(batch.features[i][wanted], i, m)
            if proxies is None:  # never seen together in training
                continue
            total[wanted] += proxies.to(x.dtype)
            sources += wanted
        return total / sources.clamp(min=1)[:, :, None]

    def _map(self, frames: Tensor, i: int, m: int) -> Tensor | None:
        """Proxies (Q, d_m) of modality m for frames (Q, d_i) of modality i, or None without any paired frame."""
        if self.config.bank == "basis":
            matrix, bias = self.learned(f"map_{i}_{m}"), self.learned(f"bias_{i}_{m}")
            if not matrix.shape[0]:
                return None
            return torch.addmm(bias, frames.to(matrix.dtype), matrix.mT)
        both = self.learned("bank_valid")[:, i] & self.learned("bank_valid")[:, m]
        source, target = self.learned(f"bank_{i}"), self.learned(f"bank_{m}")
        if not bool(both.all()):
            source, target = source[both], target[both]
        if not source.shape[0]:
            return None
        frames = frames.to(source.dtype)
        proxies = [frames.new_zeros((0, target.shape[1]))]
        for start in range(0, frames.shape[0], _CHUNK_FRAMES):
            part = frames[start : start + _CHUNK_FRAMES]
            _, neighbors = functional.nearest_neighbors(part, source, self.config.k, engine=self.config.engine)
            proxies.append(
                functional.local_least_squares(
                    part, source, target, neighbors, ridge=self.config.ridge, affine=self.config.affine
                )[0]
            )
        return torch.cat(proxies)

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return f"{self.input_dims}, {self.config}, fitted={self.is_fitted}"


def _smallest_draws(parts: list[list[Tensor]], limit: int | None) -> list[Tensor]:
    """The parts joined, cut down to the ``limit`` rows whose last column is smallest, in their order."""
    joined = [torch.cat(columns) for columns in zip(*parts, strict=True)]
    if limit is None or joined[-1].shape[0] <= limit:
        return joined
    chosen = joined[-1].argsort()[:limit].sort().values
    return [column[chosen] for column in joined]
