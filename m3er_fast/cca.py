"""Canonical correlation analysis as an estimator of scikit-learn, from streamed covariances.

:mod:`m3er_fast._canonical` holds the closed form, which needs no scikit-learn: importing that takes as long as torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_array, check_consistent_length
from sklearn.utils.validation import check_is_fitted, validate_data

from m3er_fast._canonical import canonical_directions
from m3er_fast._validation import check_number, check_positive_int
from m3er_fast.inputs import Array
from m3er_fast.moments import Moments

# What float32 products may change in the variance of any direction. Correlations lost at most a third of it.
_TOLERANCE = 2e-6

# Rows converted to float64 at a time in transform, for an array and for a tensor on a GPU.
_TRANSFORM_ROWS, _GPU_ROWS = 2**12, 2**16

_Rows = NDArray[Any] | torch.Tensor


class CCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]  # sklearn is untyped
    """Regularised canonical correlation analysis, exact and streamable.

    CCA finds the k pairs of directions in which two views of the same rows correlate most. It solves for them in closed
    form (formulas: :mod:`m3er_fast._canonical`), from float64 covariances that accumulate batch by batch and merge
    across workers. Rank-deficient views (collinear or constant columns, fewer rows than features) are ordinary input:
    directions without variance are dropped, and a view without any variance gives zero components.

    Views are NumPy arrays, anything that scikit-learn accepts as an array, or torch tensors on any device. Covariances
    and variates of tensors that share a GPU are computed on it. Other tensors are copied to the CPU, and so are the
    small matrices to be decomposed.

    Sums are float64. So are products, except where more than 2048 rows of float32 or less come at a time: those are
    multiplied in float32, chunk by chunk about a centre, unless that would cost a correlation more than about 1e-6, as
    where columns of a view are nearly collinear. The covariance is the unbiased one, over n - 1. The ridge acts on the
    views as they are: standardise features of unlike scales first.

    Args:
        n_components: upper bound of the components. ``n_components_`` = min(n_components, rank of X, rank of Y).
        ridge: shrinkage of each view's covariance in units of its mean variance: ridge · tr(S)/d is added to the
            diagonal. 0 is plain CCA on the directions that carry variance.

    Attributes:
        x_rotations_: (d_x, k) float64, centred X times this gives the canonical variates of X.
        y_rotations_: (d_y, k) float64, the same for Y.
        correlations_: (k,) float64 in [0, 1], descending: the singular values of the whitened cross-covariance. With
            ridge > 0 they solve the shrunk problem, and are lower than the sample correlations of the variates.
        n_components_: k.
        x_mean_: (d_x,) float64 mean of X.
        y_mean_: (d_y,) float64 mean of Y.
        x_rank_: numerical rank of the covariance of X.
        y_rank_: numerical rank of the covariance of Y.
        n_samples_seen_: rows seen by ``fit`` and by all later calls of ``partial_fit`` and ``merge``.
        n_features_in_: d_x.
        feature_names_in_: (d_x,) names of the columns of X, if it had names.

    Example:
        >>> import numpy as np
        >>> from m3er_fast.cca import CCA
        >>> rng = np.random.default_rng(0)
        >>> shared = rng.normal(size=(500, 2))
        >>> X = np.hstack([shared, rng.normal(size=(500, 3))])
        >>> Y = shared @ rng.normal(size=(2, 4))
        >>> cca = CCA(ridge=0.0).fit(X, Y)
        >>> cca.n_components_, cca.correlations_.round(3).tolist()
        (2, [1.0, 1.0])
    """

    def __init__(self, n_components: int = 100, ridge: float = 1e-3) -> None:
        self.n_components = n_components
        self.ridge = ridge

    def fit(self, X: Array, Y: Array) -> Self:
        """Learn the canonical directions of X (n, d_x) and Y (n, d_y) or (n,), forgetting what was seen before.

        Raises:
            ValueError: if a view is not a real, finite 2-D array (Y may be 1-D), the views differ in their numbers of
                rows, there are fewer than 2 rows, or a parameter is out of range.
        """
        self._check_parameters()
        x, y = self._validate(X, Y, reset=True, min_rows=2)
        return self._solve(Moments(x.shape[1] + y.shape[1]).update(x, y, tolerance=_TOLERANCE))

    def partial_fit(self, X: Array, Y: Array) -> Self:
        """Learn from further rows; any split of the rows gives the result of ``fit`` for all of them.

        One row is enough. Before the second one there is no variance, and hence no component.

        Raises:
            ValueError: as ``fit`` does, or if the number of features differs from earlier calls.
        """
        self._check_parameters()
        first = not hasattr(self, "_moments")
        x, y = self._validate(X, Y, reset=first, min_rows=1)
        moments = Moments(x.shape[1] + y.shape[1]) if first else self._moments
        return self._solve(moments.update(x, y, tolerance=_TOLERANCE))

    def merge(self, other: CCA) -> Self:
        """Add the rows that ``other`` was fitted to, and solve anew with this estimator's parameters.

        Raises:
            NotFittedError: if one of the two has not seen any rows.
            ValueError: if ``other`` is not a CCA, or their numbers of features differ.
        """
        self._check_parameters()
        if not isinstance(other, CCA):
            raise ValueError(f"other must be a CCA, got {type(other).__name__}")
        check_is_fitted(self)
        check_is_fitted(other)
        sizes = [(cca.x_mean_.size, cca.y_mean_.size) for cca in (self, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"cannot merge a CCA of (d_x, d_y) = {sizes[1]} features into one of {sizes[0]}")
        return self._solve(self._moments.merge(other._moments))

    def transform(self, X: Array, Y: Array | None = None) -> Any:
        """Project the centred views on the canonical directions.

        Args:
            X: (n, d_x) array or tensor.
            Y: (n, d_y) array or tensor, (n,) if d_y = 1, or None.

        Returns:
            The (n, k) variates of X, or a pair of the variates of X and of Y. They are computed in float64. A torch
            tensor gives a tensor of its own floating dtype and device, anything else a float64 array.

        Raises:
            NotFittedError: before any fit.
            ValueError: if a view is not a real, finite array with the number of features seen in ``fit``.
        """
        check_is_fitted(self)
        if Y is None:
            x = _checked("X", _to_compute(X)[0], functools.partial(validate_data, self, reset=False))
            return _project(x, self.x_mean_, self.x_rotations_, like=X)
        x, y = self._validate(X, Y, reset=False, min_rows=1)
        return _project(x, self.x_mean_, self.x_rotations_, like=X), _project(
            y, self.y_mean_, self.y_rotations_, like=Y
        )

    def fit_transform(self, X: Array, y: Array) -> Any:
        """Fit to both views and return the variates of both, as ``fit(X, Y).transform(X, Y)`` does.

        The second view is named y here and in ``score``, because scikit-learn passes it by that name.
        """
        return self.fit(X, y).transform(X, y)

    def score(self, X: Array, y: Array) -> float:
        """Return the mean Pearson correlation, in [-1, 1], between the variates of both views over the k components.

        On held-out rows it measures how well the directions generalise. A component in which a view does not vary
        counts as 0, and so does an estimator without components.

        Raises:
            NotFittedError: before any fit.
            ValueError: as ``transform`` does, or if there are fewer than 2 rows.
        """
        check_is_fitted(self)
        x, y = self._validate(X, y, reset=False, min_rows=2)
        # Pearson's correlation ignores the centre. Centred on its first row, a view that does not vary is exactly zero.
        u = _project(x, x[0], self.x_rotations_, like=None)
        v = _project(y, y[0], self.y_rotations_, like=None)
        u -= u.mean(axis=0)
        v -= v.mean(axis=0)
        spread = np.sqrt((u**2).sum(axis=0) * (v**2).sum(axis=0))
        correlation = np.divide((u * v).sum(axis=0), spread, out=np.zeros_like(spread), where=spread > 0)
        return float(correlation.sum()) / max(self.n_components_, 1)

    def _check_parameters(self) -> None:
        n_components, ridge = (
            value.item() if isinstance(value, np.generic) else value for value in (self.n_components, self.ridge)
        )
        check_positive_int("n_components", n_components)
        check_number("ridge", ridge, 0.0)

    def _validate(self, X: Any, Y: Any, *, reset: bool, min_rows: int) -> tuple[_Rows, _Rows]:
        """Return both views, checked, 2-D and in their own dtypes; ``reset`` makes X's size the one to expect.

        They are tensors if they are to be computed on a GPU, else arrays.
        """
        if Y is None:
            raise ValueError("CCA requires y to be passed, but the target y is None: it needs two views, X and Y")
        if np.isscalar(Y):
            raise ValueError(f"Expected 1D or 2D array for Y, got scalar {Y!r} instead")
        x, y = _to_compute(X, Y)
        x = _checked("X", x, functools.partial(validate_data, self, reset=reset, ensure_min_samples=min_rows))
        options = {"ensure_2d": False, "ensure_min_samples": min_rows, "input_name": "Y"}
        y = _checked("Y", y, functools.partial(check_array, **options))
        if y.ndim == 1:
            y = y[:, None]
        check_consistent_length(x, y)
        if not reset and y.shape[1] != self.y_mean_.size:
            raise ValueError(f"Y has {y.shape[1]} features, but CCA is expecting {self.y_mean_.size} features as input")
        return x, y

    def _solve(self, moments: Moments) -> Self:
        """Set everything learned from the joint moments of [X, Y]."""
        d_x = self.n_features_in_
        solution = canonical_directions(moments.covariance, d_x, n_components=self.n_components, ridge=self.ridge)
        self._moments = moments
        self.x_mean_, self.y_mean_ = moments.mean[:d_x].copy(), moments.mean[d_x:].copy()
        self.x_rotations_, self.y_rotations_, self.correlations_ = solution[:3]
        self.x_rank_, self.y_rank_ = solution.x_rank, solution.y_rank
        self.n_components_ = self.correlations_.size
        self.n_samples_seen_ = moments.count
        return self

    @property
    def _n_features_out(self) -> int:
        """The number of names that scikit-learn's ``get_feature_names_out`` gives."""
        return self.n_components_

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        return tags


def _to_numpy(view: Any) -> Any:
    """Return a tensor as an array of its dtype (float32 for bfloat16, which NumPy lacks), anything else as it is."""
    if not isinstance(view, torch.Tensor):
        return view
    view = view.detach().cpu()
    return (view.float() if view.dtype == torch.bfloat16 else view).numpy()


def _is_on_gpu(view: Any) -> bool:
    """Return whether a view is a tensor on a device that has float64, other than the CPU."""
    return isinstance(view, torch.Tensor) and view.is_cuda


def _to_compute(*views: Any) -> list[Any]:
    """Return the views as tensors if they share a GPU, else as scikit-learn accepts them."""
    if all(_is_on_gpu(view) for view in views) and len({view.device for view in views}) == 1:
        return [view.detach() for view in views]
    return [_to_numpy(view) for view in views]


def _checked(name: str, view: Any, check: Callable[..., Any]) -> Any:
    """Return what scikit-learn's ``check`` returns for a view, or a tensor itself if it would pass the check."""
    if not isinstance(view, torch.Tensor):
        return check(view, dtype="numeric")
    # An array of the tensor's shape and dtype that takes no memory: the check needs everything but the numbers.
    dtype = torch.float32 if view.dtype == torch.bfloat16 else view.dtype
    stand_in = np.broadcast_to(torch.zeros((), dtype=dtype).numpy(), tuple(view.shape))
    check(stand_in, dtype="numeric", ensure_all_finite=False)
    extremes = torch.stack(view.aminmax()).tolist()  # NaN if there is one
    if not all(map(math.isfinite, extremes)):
        raise ValueError(f"Input {name} contains {'NaN' if math.isnan(extremes[0]) else 'infinity'}.")
    return view


def _project(view: _Rows, mean: _Rows, rotations: NDArray[np.float64], *, like: Any) -> Any:
    """Return ``(view - mean) @ rotations``, computed in float64, as a tensor like ``like`` if that is one."""
    if isinstance(view, torch.Tensor):
        center, matrix = (torch.as_tensor(part, dtype=torch.float64, device=view.device) for part in (mean, rotations))
        variates = torch.cat([(rows.double() - center) @ matrix for rows in torch.split(view, _GPU_ROWS)])
    else:
        result, offset = np.empty((len(view), rotations.shape[1])), np.asarray(mean, dtype=np.float64)
        for start in range(0, len(view), _TRANSFORM_ROWS):
            rows = slice(start, start + _TRANSFORM_ROWS)
            result[rows] = (view[rows] - offset) @ rotations
        variates = torch.from_numpy(result)
    if not isinstance(like, torch.Tensor):
        return variates.cpu().numpy()
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return variates.to(device=like.device, dtype=dtype)
