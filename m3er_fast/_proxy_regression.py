"""Ridge regressions of every modality on every other: closed forms from streamed means and covariances.

Dimension legend: M modalities, d_m features of modality m, n paired frames, i the source and m the target of a map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._proxy_bank import PairedFrames
from m3er_fast._proxy_maps import MapBank
from m3er_fast.config import ProxyConfig
from m3er_fast.fitted_module import FittedModule
from m3er_fast.moments import Moments
from m3er_fast.operands import modality_pairs

# Ridges that cross-validation chooses from: eight per decade, over a wider range than any relation needs.
_RIDGES = np.logspace(-10, 6, 129)
# The frames are float32. A share of variance below its precision is rounding, not another direction or relation.
_ROUNDING = float(np.finfo(np.float32).eps) ** 2
# What a map may give for standardised features, which are at most 1e4: far below the largest float32 number.
_LARGEST_PROXY = 1e37


class RegressionSample(NamedTuple):
    """Moments of some training frames, for each pair of modalities side by side, over the frames that hold both."""

    pairs: list[Moments]  # in the order of modality_pairs

    def merge(self, other: RegressionSample) -> RegressionSample:
        """Return the moments of the frames of both."""
        both = zip(self.pairs, other.pairs, strict=True)
        return RegressionSample([Moments(len(a.scatter)).merge(a).merge(b) for a, b in both])

    def consolidated(self) -> RegressionSample:
        """Return this sample, which is always in one piece."""
        return self


class RidgeMap(NamedTuple):
    """An affine map, proxy = matrix @ f + bias, and the ridge that it was fitted with."""

    matrix: NDArray[np.float64]  # (d_m, d_i)
    bias: NDArray[np.float64]  # (d_m,)
    ridge: float


class RegressionBank(MapBank):
    """The kind of bank that holds one affine ridge regression for each ordered pair of modalities.

    Its learned buffers beside those of :class:`MapBank`: ``moments_i_j``, count, mean and scatter of a pair, from which
    ``merge`` and ``partial_fit`` go on, and ``ridge`` (M, M), the λ of source i and target m.
    """

    keeps_frames = False

    def __init__(self, config: ProxyConfig, dims: Sequence[int]) -> None:
        super().__init__(config, dims)
        self._unordered_pairs = modality_pairs(len(dims))

    # --- Learning ---

    def empty(self) -> dict[str, Tensor]:
        """Return the learned buffers as they are before ``fit``."""
        return {
            **{f"{name}_{i}_{m}": torch.zeros(0) for i, m in self._pairs for name in ("map", "bias")},
            **{f"moments_{i}_{j}": torch.zeros(0, dtype=torch.uint8) for i, j in self._unordered_pairs},
            "ridge": torch.zeros(len(self._dims), len(self._dims), dtype=torch.float64),
        }

    def collect(
        self, frames: Iterable[PairedFrames], dtype: torch.dtype, *, total: int | None, start: int, stop: int | None
    ) -> RegressionSample:
        """Accumulate each pair's moments; the numbers of the frames (``total``, ``start``, ``stop``) do not matter."""
        pairs = [Moments(self._dims[i] + self._dims[j]) for i, j in self._unordered_pairs]
        for batch in frames:
            for (i, j), moments in zip(self._unordered_pairs, pairs, strict=True):
                both = batch.valid[:, i] & batch.valid[:, j]
                moments.update(batch.features[i][both].numpy(), batch.features[j][both].numpy())
        return RegressionSample(pairs)

    def learn(self, generator: FittedModule, sample: RegressionSample) -> None:
        """Fit every map to the sample's moments."""
        ridges = torch.zeros(len(self._dims), len(self._dims), dtype=torch.float64)
        for (i, j), moments in zip(self._unordered_pairs, sample.pairs, strict=True):
            generator.register_learned(**{f"moments_{i}_{j}": _pack(moments)})
            views = {i: slice(self._dims[i]), j: slice(self._dims[i], None)}
            for source, target in ((i, j), (j, i)):
                found = fit_map(moments, views[source], views[target], self._config.ridge)
                ridges[source, target] = found.ridge
                generator.register_learned(
                    **{
                        f"map_{source}_{target}": torch.from_numpy(found.matrix),
                        f"bias_{source}_{target}": torch.from_numpy(found.bias),
                    }
                )
        generator.register_learned(ridge=ridges)

    def merged(self, generator: FittedModule, other: FittedModule) -> RegressionSample:
        """Return the moments of what both generators have learned."""
        return self._learned_moments(generator).merge(self._learned_moments(other))

    def _learned_moments(self, generator: FittedModule) -> RegressionSample:
        return RegressionSample(
            [
                _unpack(generator.learned(f"moments_{i}_{j}"), self._dims[i] + self._dims[j])
                for i, j in self._unordered_pairs
            ]
        )


def fit_map(moments: Moments, source: slice, target: slice, ridge: float | None) -> RidgeMap:
    """Return the ridge regression of some columns on others; no rows if there was no frame.

        W = argmin Σ ‖y - ȳ - W (x - x̄)‖² + λ·tr(S)/d·‖W‖²,   S = Σ (x - x̄)(x - x̄)ᵀ,

    over n paired frames. Directions in which the source does not vary are left out; λ = 0 is the solution of least
    norm.

    Args:
        moments: of source and target side by side.
        source: columns of the source x, d of them.
        target: columns of the target y.
        ridge: λ. With None it minimises the error of generalised cross-validation (Golub, Heath and Wahba,
            Technometrics 21, 1979), n·RSS(λ) / (n - 1 - tr H(λ))², over a grid.
    """
    scatter, mean_x, mean_y = moments.scatter, moments.mean[source], moments.mean[target]
    width, targets = len(mean_x), len(mean_y)
    if not moments.count:
        return RidgeMap(np.zeros((0, width)), np.zeros(0), 0.0)
    unit, spread = scatter[source, source].trace() / width, scatter[target, target].trace()
    if unit == 0.0:  # a constant source: the proxy is the target's mean
        return RidgeMap(np.zeros((targets, width)), mean_y, ridge or 0.0)
    eigenvalues, directions = np.linalg.eigh(scatter[source, source] / unit)
    varies = eigenvalues > _ROUNDING * eigenvalues[-1]
    eigenvalues, directions = eigenvalues[varies], directions[:, varies]
    along = directions.T @ (scatter[source, target] / unit)  # (r, targets)
    if ridge is None:
        explained = np.square(along / np.sqrt(spread / unit)).sum(axis=1) / eigenvalues if spread else 0.0 * eigenvalues
        ridge = _cross_validated(eigenvalues, explained, moments.count)
    matrix = (along / (eigenvalues[:, None] + ridge)).T @ directions.T
    largest = _LARGEST_PROXY / (1e4 * width)
    matrix = matrix.clip(-largest, largest)
    return RidgeMap(matrix, (mean_y - matrix @ mean_x).clip(-_LARGEST_PROXY, _LARGEST_PROXY), ridge)


def _cross_validated(eigenvalues: NDArray[np.float64], explained: NDArray[np.float64], count: int) -> float:
    """Return the ridge with the smallest error of generalised cross-validation.

    Args:
        eigenvalues: (r,) of the source's scatter, in units of its mean variance, positive.
        explained: (r,) share of the target's scatter that each direction explains without a ridge.
        count: n.
    """
    shrinkage = _RIDGES[:, None] / (eigenvalues + _RIDGES[:, None])  # 1 - the direction's share of tr H
    residual = max(1.0 - explained.sum(), _ROUNDING) + np.square(shrinkage) @ explained
    freedom = max(count - 1 - len(eigenvalues), 0) + shrinkage.sum(axis=1)
    return float(_RIDGES[np.argmin(residual / np.square(freedom))])


def _pack(moments: Moments) -> Tensor:
    """Return count, mean and the lower triangle of the scatter in one tensor.

    It holds the bytes of float64 numbers: moving a module to float32 must not round them, nor may torch's
    ``AveragedModel``, which rounds large integers to float32.
    """
    triangle = moments.scatter[np.tril_indices(len(moments.scatter))]
    return torch.from_numpy(np.concatenate([[float(moments.count)], moments.mean, triangle])).view(torch.uint8)


def _unpack(packed: Tensor, width: int) -> Moments:
    """Return the moments of :func:`_pack`."""
    values = packed.cpu().view(torch.float64).numpy()
    scatter = np.zeros((width, width))
    scatter[np.tril_indices(width)] = values[1 + width :]
    scatter += np.tril(scatter, -1).T
    return Moments.restored(int(values[0]), values[1 : 1 + width].copy(), scatter)
