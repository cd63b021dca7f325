"""The closed form of canonical correlation analysis, from the covariance of two views.

Dimension legend: n rows, d_x and d_y features of the two views, r_x and r_y their numerical ranks, k components.

    C_x = S_xx + ridge · tr(S_xx)/d_x · I       shrunk covariances; C_y alike
    W_xᵀ C_x W_x = I                            whitening on the directions that S_xx spans, W_x (d_x, r_x); W_y alike
    U diag(s) Vᵀ = W_xᵀ S_xy W_y                singular value decomposition, s in descending order
    A = W_x U[:, :k],  B = W_y V[:, :k]         rotations; Aᵀ C_x A = Bᵀ C_y B = I and Aᵀ S_xy B = diag(s)

Sources: Hotelling, "Relations between two sets of variates", Biometrika 28, 1936; the ridge is Vinod's, "Canonical
ridge and econometrics of joint production", Journal of Econometrics 4, 1976.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Eigenvalues of a covariance up to this share of the largest one count as rounding noise. Where the exact value is 0,
# accumulating in float64 left at most 5e-16 of the largest (up to 300 features, 10^6 rows, offsets of 10^6), and so did
# rounding collinear columns to float32. The bound of NumPy's matrix_rank, d · eps, is 7e-14 for d = 300. A direction
# that is kept has a standard deviation of at least 3e-7 of the largest.
_RANK_CUTOFF = 1e-13
# Smallest share of the trace by which every eigenvalue is far from that cutoff, and from the rounding of a factor.
_FULL_RANK = 1e-10
# Triangles up to this size are inverted as any matrix.
_SMALL_TRIANGLE = 64
# With this few columns a singular value decomposition takes no time; correlations above the root of this square keep 13
# digits when they are computed from it.
_SMALL_MATRIX, _SMALL_SQUARE = 128, 1e-3


class CanonicalDirections(NamedTuple):
    """The solution of CCA for a joint covariance."""

    x_rotations: NDArray[np.float64]  # (d_x, k)
    y_rotations: NDArray[np.float64]  # (d_y, k)
    correlations: NDArray[np.float64]  # (k,), descending, in [0, 1]
    x_rank: int
    y_rank: int


def whiten(covariance: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """Return W (d, r) with ``W.T @ (S + ridge · tr(S)/d · I) @ W = I`` on the r directions that S spans.

    Directions whose eigenvalue, before shrinkage, is at most 1e-13 of the largest are dropped: r is the numerical rank
    of S, and 0 for a view that is constant. The columns are eigenvectors of S over ``sqrt(eigenvalue + shrinkage)``,
    by ascending eigenvalue; where S is far from losing rank, they are those of an inverse Cholesky factor, in a fifth
    of the time.

    Args:
        covariance: (d, d) symmetric positive semi-definite S, float64.
        ridge: shrinkage in units of the mean variance tr(S)/d, non-negative.
    """
    shrinkage = ridge * covariance.trace() / len(covariance)
    identity = np.eye(len(covariance))
    try:
        # Has a factor only if every eigenvalue exceeds this share of their sum.
        np.linalg.cholesky(covariance - _FULL_RANK * covariance.trace() * identity)
    except np.linalg.LinAlgError:
        pass
    else:
        return _inverse_of_triangle(np.linalg.cholesky(covariance + shrinkage * identity)).T
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    kept = eigenvalues > _RANK_CUTOFF * max(eigenvalues[-1], 0.0)
    whitening: NDArray[np.float64] = eigenvectors[:, kept] / np.sqrt(eigenvalues[kept] + shrinkage)
    return whitening


def _inverse_of_triangle(factor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the inverse of a lower triangular matrix, by halves; NumPy has none for triangles."""
    size = len(factor)
    if size <= _SMALL_TRIANGLE:
        small: NDArray[np.float64] = np.linalg.inv(factor).astype(np.float64, copy=False)
        return small
    half = size // 2
    inverse = np.zeros_like(factor)
    inverse[:half, :half] = _inverse_of_triangle(factor[:half, :half])
    inverse[half:, half:] = _inverse_of_triangle(factor[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ factor[half:, :half] @ inverse[:half, :half]
    return inverse


def canonical_directions(
    covariance: NDArray[np.float64], x_features: int, *, n_components: int, ridge: float
) -> CanonicalDirections:
    """Solve CCA for the joint covariance of two views that lie side by side.

    The problem leaves the sign of each pair of directions open. It is chosen to make the entry of largest magnitude in
    the x direction positive.

    Args:
        covariance: (d_x + d_y, d_x + d_y) covariance of the rows ``[x, y]``, float64, such as ``Moments.covariance``.
        x_features: d_x.
        n_components: upper bound of the number of components; a view of smaller rank gives fewer.
        ridge: shrinkage of each view in units of its mean variance, non-negative.
    """
    x_whitening = whiten(covariance[:x_features, :x_features], ridge)
    y_whitening = whiten(covariance[x_features:, x_features:], ridge)
    x_rank, y_rank = x_whitening.shape[1], y_whitening.shape[1]
    k = min(n_components, x_rank, y_rank)
    left, correlations, right = _largest_singular(x_whitening.T @ covariance[:x_features, x_features:] @ y_whitening, k)
    x_rotations = x_whitening @ left
    y_rotations = y_whitening @ right
    largest = np.abs(x_rotations).argmax(axis=0)
    orientation = np.where(x_rotations[largest, np.arange(k)] < 0, -1.0, 1.0)
    return CanonicalDirections(
        x_rotations * orientation, y_rotations * orientation, correlations.clip(0.0, 1.0), x_rank, y_rank
    )


def _largest_singular(
    matrix: NDArray[np.float64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return left vectors (m, k), the k largest singular values, descending, and right vectors (n, k).

    Those of a large matrix come from the eigenvectors of its product with itself, in half the time, unless the k-th
    value is so small that its square has lost digits.
    """
    m, n = matrix.shape
    if m < n:
        right, values, left = _largest_singular(matrix.T, k)
        return left, values, right
    if n > _SMALL_MATRIX:
        squares, right = np.linalg.eigh(matrix.T @ matrix)
        squares, right = squares[: -k - 1 : -1], right[:, : -k - 1 : -1]
        if squares[-1] > _SMALL_SQUARE:
            values = np.sqrt(squares)
            return matrix @ right / values, values, right
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :k], values[:k], right[:k].T
