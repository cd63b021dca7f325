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


class CanonicalDirections(NamedTuple):
    """The solution of CCA for a joint covariance."""

    x_rotations: NDArray[np.float64]  # (d_x, k)
    y_rotations: NDArray[np.float64]  # (d_y, k)
    correlations: NDArray[np.float64]  # (k,), descending, in [0, 1]
    x_rank: int
    y_rank: int


def whiten(covariance: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """Return W (d, r) with ``W.T @ (S + ridge · tr(S)/d · I) @ W = I`` on the r directions that S spans.

    The columns are eigenvectors of S over ``sqrt(eigenvalue + shrinkage)``, by ascending eigenvalue. Directions
    whose eigenvalue, before shrinkage, is at most 1e-13 of the largest are dropped: r is the numerical rank of S, and
    0 for a view that is constant.

    Args:
        covariance: (d, d) symmetric positive semi-definite S, float64.
        ridge: shrinkage in units of the mean variance tr(S)/d, non-negative.
    """
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    kept = eigenvalues > _RANK_CUTOFF * max(eigenvalues[-1], 0.0)
    shrinkage = ridge * covariance.trace() / len(covariance)
    whitening: NDArray[np.float64] = eigenvectors[:, kept] / np.sqrt(eigenvalues[kept] + shrinkage)
    return whitening


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
    left, correlations, right = np.linalg.svd(
        x_whitening.T @ covariance[:x_features, x_features:] @ y_whitening, full_matrices=False
    )
    x_rotations = x_whitening @ left[:, :k]
    y_rotations = y_whitening @ right[:k].T
    largest = np.abs(x_rotations).argmax(axis=0)
    orientation = np.where(x_rotations[largest, np.arange(k)] < 0, -1.0, 1.0)
    return CanonicalDirections(
        x_rotations * orientation, y_rotations * orientation, correlations[:k].clip(0.0, 1.0), x_rank, y_rank
    )
