"""Mean and covariance of streamed rows: exact merging, float64 sums, one pass.

Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American Statistician 37, 1983.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast.operands import modality_pairs

# Rows converted to float64 at a time: 2048 x 374 is 6 MB, still in cache, and within 2 % of the fastest size measured.
_CHUNK_ROWS = 2048
# Relative error of a float32 sum of squares that is expected at the least. 20,000 rows in chunks had 2e-8 to 4e-8 where
# values are spread, and 8e-7 where columns are 0 or 1, which repeats the same rounding.
_FLOAT32_ERROR = 3e-9
# Standard deviations up to this one, and from its inverse on, have squares that float32 holds.
_SAFE_DEVIATION = 1e9
# One row in this many gives a chunk's centre, and the scale of columns.
_CENTER_STEP = 16
# Numbers of a tensor converted at a time: 256 MiB, enough rows to keep a GPU busy between two transfers of sums.
_CHUNK_NUMBERS = 2**25


class Moments:
    """Count, mean and scatter of the rows seen so far, accumulated in float64.

    Two accumulators over disjoint rows merge into one over all of them. Data may therefore come in any number of
    batches, in any order, from any number of workers. Means are stored relative to one of the rows: an offset, however
    large, costs no digits, and a constant column has a scatter of exactly zero.

    Args:
        n_features: number of columns d.

    Attributes:
        count: rows seen.
        scatter: (d, d) float64 sum over rows of ``outer(row - mean, row - mean)``.
    """

    def __init__(self, n_features: int) -> None:
        self.count = 0
        self.scatter: NDArray[np.float64] = np.zeros((n_features, n_features))
        self._origin: NDArray[np.float64] = np.zeros(n_features)  # one of the rows seen
        self._shift: NDArray[np.float64] = np.zeros(n_features)  # mean - origin

    @classmethod
    def restored(cls, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> Self:
        """Return the moments with these attributes, such as were stored; the arrays are not copied."""
        moments = cls(len(mean))
        moments.count, moments.scatter, moments._origin = count, scatter, mean
        return moments

    @property
    def mean(self) -> NDArray[np.float64]:
        """(d,) mean of the rows; zeros before the first one."""
        return self._origin + self._shift

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(d, d) unbiased covariance, ``scatter / (count - 1)``; zeros before the second row."""
        return self.scatter / max(self.count - 1, 1)

    def update(self, *views: NDArray[Any] | Tensor, tolerance: float = 0.0) -> Self:
        """Add rows.

        Args:
            *views: one or more real (n, d_i) arrays with Σ d_i = d, read side by side as the columns of one (n, d)
                array; n may be 0. Or tensors on one device that has float64, where their sums are computed. Rows are
                converted to float64 chunk by chunk, never as a whole.
            tolerance: rounding of the whitened covariance of each view that is allowed for; 0 for none beyond
                float64's. Arrays of float32 or less are then centred in float64, multiplied in float32 within a
                chunk, which takes half the time, and added up in float64, unless that rounding exceeds the tolerance.

        Raises:
            ValueError: if the shapes do not fit, or a value is not finite or too large to be squared in float64. The
                accumulator is then unchanged.
        """
        shapes = [tuple(view.shape) for view in views]
        wanted = len(self.scatter)
        if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes) or sum(d for _, d in shapes) != wanted:
            raise ValueError(f"wanted (n, d_i) arrays with {wanted} columns in all, got shapes {shapes}")
        tensors = [view for view in views if isinstance(view, Tensor)]
        if tensors:
            added, size = Moments(wanted), max(1, _CHUNK_NUMBERS // max(1, wanted))
            for start in range(0, shapes[0][0], size):
                part = torch.cat([view[start : start + size].detach().double() for view in tensors], dim=1)
                added.merge(_moments_of_tensor(part))
            return self.merge(added)
        arrays = [view for view in views if not isinstance(view, Tensor)]
        is_coarse = tolerance > 0 and all(view.dtype.kind == "f" and view.itemsize <= 4 for view in arrays)
        if not is_coarse or shapes[0][0] <= _CHUNK_ROWS:
            return self.merge(_sum_in_float64(arrays))
        # The first rows show whether it is worth trying the others.
        first, others = ([view[part] for view in arrays] for part in (slice(_CHUNK_ROWS), slice(_CHUNK_ROWS, None)))
        widths = [d for _, d in shapes]
        coarse, error = _sum_in_float32(first)
        if _is_within(tolerance, self._joined(coarse).scatter, np.zeros(wanted), widths):
            more, more_error = _sum_in_float32(others)
            together = self._joined(coarse.merge(more))
            if _is_within(tolerance, together.scatter, error + more_error, widths):
                return self.merge(coarse)
        return self.merge(_sum_in_float64(arrays))

    def merge(self, other: Moments) -> Self:
        """Add the rows that ``other`` has seen; ``other`` stays unchanged.

        Raises:
            ValueError: if ``other`` has another number of features, or the sums overflow float64. This accumulator is
                then unchanged.
        """
        ours, theirs = len(self.scatter), len(other.scatter)
        if theirs != ours:
            raise ValueError(f"cannot merge moments of {theirs} features into moments of {ours}")
        if other.count == 0:
            return self
        count = self.count + other.count
        origin = self._origin if self.count else other._origin
        with np.errstate(over="ignore", invalid="ignore"):
            difference = (other._origin - origin) + (other._shift - self._shift)
            # In one array: memory that is allocated anew has to be cleared by the system.
            scatter = np.outer(difference, difference)
            scatter *= self.count * other.count / count
            scatter += self.scatter
            scatter += other.scatter
        # The diagonal holds sums of squares: an entry that is not finite, or too large to square, shows in the trace.
        if not np.isfinite(scatter.trace()):
            raise ValueError("the rows hold values that are not finite or too large to be squared in float64")
        self.count, self.scatter, self._origin = count, scatter, origin
        self._shift = self._shift + difference * (other.count / count)
        return self

    def _joined(self, other: Moments) -> Moments:
        """Return the moments of both; this accumulator stays unchanged."""
        return Moments(len(self.scatter)).merge(self).merge(other)


class PairwiseMoments:
    """Moments of several views of the same rows, any of which may be absent from a row.

    Args:
        widths: number of columns of each view.
        parts: moments of disjoint rows to start from; they stay unchanged.

    Attributes:
        own: moments of each view alone, over the rows that have it.
        joint: moments of each pair of views side by side, over the rows that have both; in the order of
            :func:`m3er_fast.operands.modality_pairs`.
    """

    def __init__(self, widths: Sequence[int], parts: Iterable[PairwiseMoments] = ()) -> None:
        self.widths = list(widths)
        self._pairs = modality_pairs(len(self.widths))
        self.own = [Moments(width) for width in self.widths]
        self.joint = [Moments(self.widths[i] + self.widths[j]) for i, j in self._pairs]
        for part in parts:
            for moments, more in zip((*self.own, *self.joint), (*part.own, *part.joint), strict=True):
                moments.merge(more)

    def update(self, views: Sequence[NDArray[Any]], present: NDArray[np.bool_]) -> None:
        """Add rows.

        Args:
            views: one real (n, width) array per view.
            present: (n, views) which rows have which view.

        Raises:
            ValueError: as :meth:`Moments.update` does.
        """
        for view, has_view, own in zip(views, present.T, self.own, strict=True):
            own.update(view[has_view])
        for (i, j), joint in zip(self._pairs, self.joint, strict=True):
            has_both = present[:, i] & present[:, j]
            joint.update(views[i][has_both], views[j][has_both])


def _sum_in_float64(views: Sequence[NDArray[Any]]) -> Moments:
    result = Moments(sum(view.shape[1] for view in views))
    for start in range(0, len(views[0]), _CHUNK_ROWS):
        chunk = [view[start : start + _CHUNK_ROWS] for view in views]
        result.merge(_moments_of(np.concatenate(chunk, axis=1, dtype=np.float64)))
    return result


def _moments_of(rows: NDArray[np.float64]) -> Moments:
    """Return the moments of a few rows, which are overwritten."""
    result = Moments(rows.shape[1])
    result.count = len(rows)
    result._origin = rows[0].copy()
    with np.errstate(over="ignore", invalid="ignore"):
        rows -= result._origin
        result._shift = rows.mean(axis=0)
        rows -= result._shift
        result.scatter = rows.T @ rows  # NumPy sees the product with itself and calls syrk: half the work of a GEMM
    return result


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def _sum_in_float32(views: Sequence[NDArray[Any]]) -> tuple[Moments, NDArray[np.float64]]:
    """Return the moments of one row or more by float32 products of chunks, and the errors of its sums of squares (d,).

    The sums of squares are known in float64 as well, and are the diagonal of the scatter.
    """
    count, d = len(views[0]), sum(view.shape[1] for view in views)
    some = np.concatenate([view[:_CHUNK_ROWS:_CENTER_STEP] for view in views], axis=1, dtype=np.float64)
    deviation = some.std(axis=0)
    usual = (deviation == 0) | ((deviation > 1 / _SAFE_DEVIATION) & (deviation < _SAFE_DEVIATION))
    # Powers of two, by which columns are divided where their squares might not be float32's.
    unit = None if usual.all() else np.ldexp(1.0, np.frexp(deviation)[1])
    scatter, squares = np.zeros((d, d)), np.zeros(d)
    centers, rests, counts = [], [], []
    # The same memory serves all chunks: the system has to clear memory that is freed and allocated anew.
    wide, narrow = (np.empty((min(count, _CHUNK_ROWS), d), dtype) for dtype in (np.float64, np.float32))
    for start in range(0, count, _CHUNK_ROWS):
        rows, rounded = wide[: count - start], narrow[: count - start]
        np.concatenate([view[start : start + _CHUNK_ROWS] for view in views], axis=1, out=rows)
        # About a number of float32 differences are exact, and those of a constant column 0.
        centers.append(rows[::_CENTER_STEP].mean(axis=0).astype(np.float32).astype(np.float64))
        rows -= centers[-1]
        rests.append(rows.mean(axis=0))
        counts.append(len(rows))
        squares += np.einsum("ij,ij->j", rows, rows)
        if unit is not None:
            rows /= unit
        np.copyto(rounded, rows, casting="same_kind")
        scatter += rounded.T @ rounded
    if unit is not None:
        scatter *= np.outer(unit, unit)
    error = scatter.diagonal() - squares
    np.fill_diagonal(scatter, squares)
    # From each chunk's own centre to the mean of all.
    weight, rest = np.array(counts)[:, None], np.array(rests)
    offset = (np.array(centers) - centers[0]) + rest
    result = Moments(d)
    result.count, result._origin = count, centers[0]
    result._shift = (weight * offset).sum(axis=0) / count
    spread = np.sqrt(weight) * (offset - result._shift)
    rest *= np.sqrt(weight)
    result.scatter = scatter + (spread.T @ spread - rest.T @ rest)
    return result, error


def _is_within(
    tolerance: float, scatter: NDArray[np.float64], error: NDArray[np.float64], widths: Sequence[int]
) -> bool:
    """Return whether rounding of the sums changes no direction's variance by more than a share of ``tolerance``.

    The errors of the diagonal (d,), at least ``_FLOAT32_ERROR``, stand for those of all sums: for each view
    ``diag(|error|) ≼ tolerance · S`` must hold, which is so if S - diag(|error|) / tolerance has a Cholesky factor.
    """
    variance = scatter.diagonal()
    least = np.maximum(np.abs(error), _FLOAT32_ERROR * variance) / tolerance
    if not np.isfinite(least).all():
        return False
    start = 0
    for width in widths:
        varying = start + np.flatnonzero(variance[start : start + width] > 0)
        start += width
        own = scatter[np.ix_(varying, varying)]
        own[np.diag_indices_from(own)] -= least[varying]
        try:
            np.linalg.cholesky(own)
        except np.linalg.LinAlgError:
            return False
    return True


def _moments_of_tensor(rows: Tensor) -> Moments:
    """Return the moments of a few rows, which are overwritten, computed on their device."""
    origin = rows[0].clone()
    rows -= origin
    shift = rows.mean(dim=0)
    rows -= shift
    sums = torch.cat([rows.mT @ rows, origin[None], shift[None]]).cpu().numpy()
    result = Moments(rows.shape[1])
    result.count = len(rows)
    result.scatter, result._origin, result._shift = sums[:-2], sums[-2], sums[-1]
    return result
