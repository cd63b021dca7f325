"""The basis of the training frames' span: one linear map for each ordered pair of modalities.

Dimension legend: M modalities, d_m features of modality m, r basis rows of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._proxy_bank import PairedFrames
from m3er_fast._proxy_maps import MapBank
from m3er_fast.config import ProxyConfig
from m3er_fast.fitted_module import FittedModule

# Frames that compete for a place in the basis at a time; the winners of a round compete in the next.
_ROUND_FRAMES = 2**14


class PairRows(NamedTuple):
    """Paired frames of one source and one target."""

    source: NDArray[np.float64]  # (r, d_source)
    target: NDArray[np.float64]  # (r, d_target)
    seen: bool  # whether any frame held both; where all were zeros, there is no row

    def extended(self, more: PairRows) -> PairRows:
        """Return these rows, followed by others."""
        source, target = (np.concatenate(both) for both in zip(self[:2], more[:2], strict=True))
        return PairRows(source, target, self.seen or more.seen)

    def pivoted(self, limit: int | None = None) -> PairRows:
        """Return the rows that column-pivoted QR of the source chooses, at most ``limit``."""
        chosen = _pivots(self.source)[:limit]
        return PairRows(self.source[chosen], self.target[chosen], self.seen)


class BasisSample(NamedTuple):
    """The basis of some training frames, for each ordered pair (source, target)."""

    pairs: dict[tuple[int, int], PairRows]
    limit: int | None  # the most rows per pair

    def merge(self, other: BasisSample) -> BasisSample:
        """Return a basis chosen among the rows of both."""
        merged = {pair: rows.extended(other.pairs[pair]).pivoted(self.limit) for pair, rows in self.pairs.items()}
        return BasisSample(merged, self.limit)

    def consolidated(self) -> BasisSample:
        """Return this sample, which is always in one piece."""
        return self


class BasisBank(MapBank):
    """The kind of bank whose rows are a basis of the training frames' span, chosen by column-pivoted QR.

    The solution over a fixed basis is one affine map for all inputs, folded when the basis is learned. Its learned
    buffers beside those of :class:`MapBank` are the rows behind each map, ``basis_i_m`` (r, d_i) and ``image_i_m``
    (r, d_m).
    """

    keeps_frames = True

    # --- Learning ---

    def empty(self) -> dict[str, Tensor]:
        """Return the learned buffers as they are before ``fit``."""
        return {f"{name}_{i}_{m}": torch.zeros(0) for i, m in self._pairs for name in ("map", "bias", "basis", "image")}

    def collect(
        self, frames: Iterable[PairedFrames], dtype: torch.dtype, *, total: int | None, start: int, stop: int | None
    ) -> BasisSample:
        """Choose each pair's basis in rounds, so that only one round of frames is in memory at a time.

        The rows chosen in one round compete with the frames of the next: tournament pivoting (Demmel, Grigori, Gu and
        Xiang 2015). The numbers of the frames (``total``, ``start``, ``stop``) do not matter.
        """
        pairs = {
            (i, m): PairRows(np.zeros((0, self._dims[i])), np.zeros((0, self._dims[m])), seen=False)
            for i, m in self._pairs
        }
        for batch in frames:
            for (i, m), rows in pairs.items():
                both = batch.valid[:, i] & batch.valid[:, m]
                for begin in range(0, len(both), _ROUND_FRAMES):
                    part = slice(begin, begin + _ROUND_FRAMES)
                    source, target = (batch.features[x][part][both[part]].double().numpy() for x in (i, m))
                    rows = rows.extended(PairRows(source, target, seen=len(source) > 0))
                    if len(rows.source) > _ROUND_FRAMES:
                        rows = rows.pivoted()
                pairs[i, m] = rows
        limit = self._config.max_basis
        return BasisSample({pair: rows.pivoted(limit) for pair, rows in pairs.items()}, limit)

    def learn(self, generator: FittedModule, sample: BasisSample) -> None:
        """Make the sample the generator's basis."""
        for (i, m), rows in sample.pairs.items():
            matrix, bias = _fold(rows, self._config)
            values = {"map": matrix, "bias": bias, "basis": rows.source, "image": rows.target}
            generator.register_learned(**{f"{name}_{i}_{m}": torch.from_numpy(x) for name, x in values.items()})

    def merged(self, generator: FittedModule, other: FittedModule) -> BasisSample:
        """Return a basis chosen among the rows of two generators."""
        return self._learned_basis(generator).merge(self._learned_basis(other))

    def _learned_basis(self, generator: FittedModule) -> BasisSample:
        pairs = {}
        for i, m in self._pairs:
            matrix, source, target = (
                generator.learned(f"{name}_{i}_{m}").cpu().double().numpy() for name in ("map", "basis", "image")
            )
            pairs[i, m] = PairRows(source, target, seen=len(matrix) > 0)
        return BasisSample(pairs, self._config.max_basis)


def _pivots(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the rows that span all of them, as many as the numerical rank, the largest pivot first."""
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    from scipy.linalg import qr  # here: it takes a tenth as long to import as torch

    triangle, order = qr(rows.T, mode="r", pivoting=True)
    diagonal = np.abs(np.diagonal(triangle))
    # The frames are float32: what QR leaves below their precision is rounding, not another direction. The bound does
    # not grow with the number of frames, because each entry of the diagonal measures a single one.
    rank = int((diagonal > rows.shape[1] * np.finfo(np.float32).eps * diagonal[0]).sum())
    chosen: NDArray[np.int64] = order[:rank]
    return chosen


def _fold(rows: PairRows, config: ProxyConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the solution over a basis as one affine map, proxy = matrix @ f + bias; no rows for an unseen pair."""
    basis, image = rows.source, rows.target
    if not rows.seen:
        return np.zeros((0, basis.shape[1])), np.zeros(0)
    matrix, bias = np.zeros((image.shape[1], basis.shape[1])), np.zeros(image.shape[1])
    if not len(basis):  # all frames were zeros
        return matrix, bias
    gram = basis @ basis.T
    ridge = config.ridge or 0.0  # never None, which only a regression takes
    gram[np.diag_indices_from(gram)] += ridge * gram.trace() / len(basis)
    inverse = np.linalg.pinv(gram, hermitian=True)
    solve = inverse @ basis  # the coefficients are solve @ f
    if config.affine:  # the multiplier of Σ a = 1 adds its share along the inverse's row sums
        along = inverse.sum(axis=1) / inverse.sum()
        solve = solve - np.outer(along, solve.sum(axis=0))
        bias = image.T @ along
    return image.T @ solve, bias
