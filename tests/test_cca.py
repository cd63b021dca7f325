"""CCA and its moments, against a float64 oracle that computes differently (QR of the data, no covariance)."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from m3er_fast import cca as cca_module
from m3er_fast import moments as moments_module
from m3er_fast._canonical import canonical_directions, whiten
from m3er_fast.cca import CCA
from m3er_fast.moments import Moments, PairwiseMoments


@pytest.fixture
def gpu(device, monkeypatch):
    """The device of tensors that are computed where they are; without a GPU the CPU stands in, with the same code."""
    if device.type == "cpu":
        monkeypatch.setattr(cca_module, "_is_on_gpu", lambda view: isinstance(view, torch.Tensor))
    return device


@pytest.fixture(params=["array", "tensor on a GPU"])
def given(request, monkeypatch):
    """How a test passes its views: as arrays, or as tensors on a GPU, whose moments take several chunks here."""
    if request.param == "array":
        return lambda view: view
    gpu = request.getfixturevalue("gpu")
    # A chunk of real size would be 256 MiB.
    monkeypatch.setattr(moments_module, "_CHUNK_NUMBERS", 1000)
    return lambda view: torch.from_numpy(view).to(gpu) if isinstance(view, np.ndarray) else view


def correlated_views(n=200, d_x=7, d_y=5, shared=3, seed=0):
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, shared))
    X = latent @ rng.normal(size=(shared, d_x)) + rng.normal(size=(n, d_x))
    Y = latent @ rng.normal(size=(shared, d_y)) + rng.normal(size=(n, d_y))
    return X, Y


def oracle_correlations(X, Y, ridge):
    """Cosines of the angles between the column spaces of the centred views (Björck and Golub, 1973).

    The ridge is the usual augmentation by rows sqrt(shrinkage)·I, in rows of their own for each view.
    """
    bases = []
    for view in (X, Y):
        view = np.asarray(view, dtype=np.float64)
        centred = view - view[0]
        centred -= centred.mean(axis=0)
        _, s, vt = np.linalg.svd(centred, full_matrices=False)
        reduced = centred @ vt[s > 1e-6 * s[0]].T
        shrinkage = ridge * (s**2).sum() / view.shape[1]
        augmented = np.vstack([reduced, np.sqrt(shrinkage) * np.eye(reduced.shape[1])])
        bases.append(np.linalg.qr(augmented)[0][: len(view)])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


def views_of(case):
    X, Y = correlated_views()
    if case == "n < d":
        X, Y = correlated_views(n=6, d_x=20, d_y=9)
    elif case == "one feature":
        Y = Y[:, :1]
    elif case == "collinear columns":
        X = np.hstack([X, X[:, :2] @ np.ones((2, 3)), X[:, 2:3] * 4.0])
    elif case == "constant columns":
        X[:, 1] = 0.1
        Y[:, 4] = 1e6
    elif case == "scaled by 1e6":
        X = X * 1e6
    elif case == "scaled by 1e-6":
        Y = Y * 1e-6
    elif case == "scaled apart":
        X, Y = X * 1e6, Y * 1e-6
    elif case == "offset by 1e6":
        X, Y = X + 1e6, Y - 1e6
    elif case == "small spread on a large offset":
        X, Y = correlated_views(n=5000)
        X = X * 1e-6 + 1e6
    elif case == "all at once":
        X = 1e6 * np.hstack([X, X[:, :2] * 2.0, np.full((len(X), 1), 3.0)]) + 1e6
    elif case == "duplicated rows":
        X, Y = np.tile(X[:4], (9, 1)), np.tile(Y[:4], (9, 1))
    elif case == "float32":
        X, Y = X.astype(np.float32), Y.astype(np.float32)
    elif case == "integers":
        X = np.rint(10 * X).astype(np.int16)
    elif case == "several chunks":
        X, Y = correlated_views(n=5000)
    return X, Y


RANKS = {
    "plain": (7, 5),
    "n < d": (5, 5),
    "one feature": (7, 1),
    "collinear columns": (7, 5),
    "constant columns": (6, 4),
    "scaled by 1e6": (7, 5),
    "scaled by 1e-6": (7, 5),
    "scaled apart": (7, 5),
    "offset by 1e6": (7, 5),
    "small spread on a large offset": (7, 5),
    "all at once": (7, 5),
    "duplicated rows": (3, 3),
    "float32": (7, 5),
    "integers": (7, 5),
    "several chunks": (7, 5),
}


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("case", RANKS)
def test_correlations_and_ranks_equal_the_oracle(case, ridge, given):
    X, Y = views_of(case)
    cca = CCA(ridge=ridge).fit(given(X), given(Y))
    assert (cca.x_rank_, cca.y_rank_) == RANKS[case]
    assert cca.n_components_ == min(RANKS[case])
    assert cca.x_rotations_.shape == (X.shape[1], cca.n_components_)
    assert cca.y_rotations_.shape == (Y.shape[1], cca.n_components_)
    expected = oracle_correlations(X, Y, ridge)[: cca.n_components_]
    np.testing.assert_allclose(cca.correlations_, expected, rtol=0, atol=1e-10)
    assert np.all((cca.correlations_ >= 0) & (cca.correlations_ <= 1))


@pytest.mark.parametrize("case", RANKS)
def test_rotations_whiten_the_shrunk_views_and_diagonalise_their_cross_covariance(case, given):
    X, Y = views_of(case)
    cca = CCA(ridge=0.01).fit(given(X), given(Y))
    d_x = X.shape[1]
    # From the first row on: np.cov loses digits to an offset.
    covariance = np.cov(X.astype(np.float64) - X[0], Y.astype(np.float64) - Y[0], rowvar=False)
    blocks = covariance[:d_x, :d_x], covariance[d_x:, d_x:]
    for block, rotations in zip(blocks, (cca.x_rotations_, cca.y_rotations_), strict=True):
        shrunk = block + 0.01 * np.trace(block) / len(block) * np.eye(len(block))
        np.testing.assert_allclose(rotations.T @ shrunk @ rotations, np.eye(cca.n_components_), atol=1e-9)
    between = cca.x_rotations_.T @ covariance[:d_x, d_x:] @ cca.y_rotations_
    np.testing.assert_allclose(between, np.diag(cca.correlations_), atol=1e-9)


def float32_views_of(case, n=6000):
    X, Y = correlated_views(n=n, d_x=9, d_y=6)
    order = np.arange(n)[:, None]
    if case == "offset by 1000":
        X, Y = X + 1000, Y - 1000
    elif case == "tiny and huge":
        X, Y = X * 1e-20, Y * 1e15
    elif case == "columns of unlike scales":
        X, Y = X * np.logspace(-2, 2, 9), Y * np.logspace(2, -2, 6)
    elif case == "drifting":
        X, Y = X + order / 100, Y - order / 100
    elif case == "scales that grow after the first rows":
        X = np.where(order < 3000, X, 1e30 * X)
    elif case == "collinear columns":
        X = np.hstack([X, X[:, :2]])
    elif case == "collinear but for the first rows":
        X[2500:] = X[2500:, :1] * 1e5 + X[2500:]
    elif case == "a constant column":
        X[:, 3] = 0.1
    elif case == "a column that varies later":
        X[:2500, 3] = 0.1
    elif case == "a constant view":
        Y[:] = 0.1
    elif case == "nearly collinear columns":
        X += 30 * X[:, :1]
    elif case == "an outlier":
        X[5000] *= 1e4
    elif case == "zeros and ones":
        X, Y = X > 2, Y > 2
    return X.astype(np.float32), Y.astype(np.float32)


@pytest.mark.parametrize(
    ("case", "ranks"),
    {
        "plain": (9, 6),
        "offset by 1000": (9, 6),
        "tiny and huge": (9, 6),
        "columns of unlike scales": (9, 6),
        "drifting": (9, 6),
        "scales that grow after the first rows": None,
        "collinear columns": (9, 6),
        "collinear but for the first rows": (9, 6),
        "a constant column": (8, 6),
        "a column that varies later": (9, 6),
        "a constant view": (9, 0),
        "nearly collinear columns": (9, 6),
        "an outlier": None,
        "zeros and ones": (9, 6),
    }.items(),
)
def test_many_rows_of_float32_lose_at_most_a_millionth(case, ranks):
    X, Y = float32_views_of(case)
    cca, exact = (CCA(ridge=0.0).fit(*views) for views in ((X, Y), (X.astype(np.float64), Y.astype(np.float64))))
    assert (cca.x_rank_, cca.y_rank_) == (exact.x_rank_, exact.y_rank_)
    np.testing.assert_allclose(cca.correlations_, exact.correlations_, rtol=0, atol=1e-6)
    if ranks is not None:  # the oracle's rank has a cutoff of its own
        assert (cca.x_rank_, cca.y_rank_) == ranks
        expected = oracle_correlations(X, Y, 0.0)[: cca.n_components_]
        np.testing.assert_allclose(cca.correlations_, expected, rtol=0, atol=1e-6)
    for found, wanted in ((cca.x_mean_, X), (cca.y_mean_, Y)):
        wanted = wanted.astype(np.float64)
        tolerance = 1e-9 * wanted.std(axis=0) + 1e-15 * np.abs(wanted).mean(axis=0)
        assert np.all(np.abs(found - wanted.mean(axis=0)) <= tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_rows_of_a_tensor_lose_at_most_a_millionth(dtype):
    X, Y = (torch.from_numpy(view).to(dtype) for view in float32_views_of("plain"))
    expected = oracle_correlations(X.double().numpy(), Y.double().numpy(), 0.0)
    np.testing.assert_allclose(CCA(ridge=0.0).fit(X, Y).correlations_, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "offset by 1000", "drifting", "nearly collinear columns"])
@pytest.mark.parametrize("sizes", [[3000, 3000], [1, 5999], [2500, 10, 3490], [2048, 2049, 1903]], ids=str)
def test_streamed_float32_equals_fit_in_any_order(sizes, case):
    X, Y = float32_views_of(case)
    whole = CCA().fit(X.astype(np.float64), Y.astype(np.float64))
    cuts = np.cumsum(sizes)[:-1]
    parts = list(zip(np.split(X, cuts), np.split(Y, cuts), strict=True))
    streamed = CCA()
    for part in parts:
        streamed.partial_fit(*part)
    merged = CCA().partial_fit(*parts[-1])
    for part in parts[:-1]:
        merged.merge(CCA().partial_fit(*part))
    for cca in (streamed, merged):
        assert cca.n_samples_seen_ == len(X)
        np.testing.assert_allclose(cca.correlations_, whole.correlations_, rtol=0, atol=1e-6)
        np.testing.assert_allclose(cca.x_mean_, whole.x_mean_, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_late_row_that_is_not_finite_leaves_float32_moments_unchanged(value):
    rows = correlated_views(n=5000)[0].astype(np.float32)
    moments = Moments(7).update(rows, tolerance=1e-6)
    before = moments.scatter.copy()
    with pytest.raises(ValueError, match="not finite"):
        moments.update(np.where(np.arange(5000)[:, None] == 4000, value, rows).astype(np.float32), tolerance=1e-6)
    assert moments.count == 5000
    np.testing.assert_array_equal(moments.scatter, before)


def test_a_tolerance_changes_float32_rows_of_ordinary_condition_only():
    X, _ = float32_views_of("plain")
    Z, _ = float32_views_of("collinear columns")

    def scatters(rows):
        return [Moments(rows.shape[1]).update(rows, tolerance=tolerance).scatter for tolerance in (0.0, 2e-6)]

    for unchanged in (X.astype(np.float64), X[:2048], Z, (100 * X).astype(np.int32)):
        np.testing.assert_array_equal(*scatters(unchanged))
    exact, coarse = scatters(X)
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert np.abs(coarse - exact).max() > 0
    np.testing.assert_array_less(np.abs(coarse - exact), 3e-7 * scale)
    np.testing.assert_allclose(coarse.diagonal(), exact.diagonal(), rtol=1e-7)  # not float32's sums, but its centring
    constant = np.full((5000, 3), 0.1, np.float32)
    assert not Moments(3).update(constant, tolerance=2e-6).scatter.any()


@pytest.mark.parametrize("strength", [2.0, 0.0])
def test_large_views_equal_the_oracle(strength):
    """Where the largest correlations are found by themselves, and where these are too small for that."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(900, 341))
    basis = np.linalg.qr(draws - draws.mean(axis=0))[0]
    X, Y = basis[:, :170], basis[:, 170:]
    Y = Y + strength * X[:, :1] * np.ones(171)
    X, Y = X @ rng.normal(size=(170, 170)), Y @ rng.normal(size=(171, 171))
    for x, y in ((X, Y), (Y, X)):
        cca = CCA(n_components=1, ridge=0.0).fit(x, y)
        np.testing.assert_allclose(cca.correlations_, oracle_correlations(x, y, 0.0)[:1], rtol=0, atol=1e-9)
        u, v = cca.transform(x, y)
        assert np.corrcoef(u[:, 0], v[:, 0])[0, 1] == pytest.approx(cca.correlations_[0], abs=1e-9)


@pytest.mark.parametrize("smallest", [1.0, 1e-7, 1e-11, 1e-15])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_whiten_by_a_factor_and_by_eigenvectors(smallest, ridge):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(150, 150)))[0]
    eigenvalues = np.append(np.linspace(1.0, 2.0, 149), smallest)
    covariance = (basis * eigenvalues) @ basis.T
    W = whiten((covariance + covariance.T) / 2, ridge)
    assert W.shape == (150, 150 if smallest > 1e-13 else 149)
    expected = np.eye(W.shape[1])
    shrunk = covariance + ridge * np.trace(covariance) / 150 * np.eye(150)
    np.testing.assert_allclose(W.T @ shrunk @ W, expected, atol=1e-4 if smallest < 1e-9 else 1e-8)


def test_two_features_give_the_correlation_computed_by_hand():
    # x = (0, 1, 2), y = (0, 2, 1): variances 1 and 1, covariance 1/2.
    cca = CCA(ridge=0.0).fit([[0.0], [1.0], [2.0]], [0.0, 2.0, 1.0])
    np.testing.assert_allclose(cca.correlations_, [0.5], rtol=1e-14)
    np.testing.assert_allclose(cca.transform([[3.0]]), [[2.0]], rtol=1e-14)
    # A ridge of 1 doubles each variance, hence halves the correlation.
    np.testing.assert_allclose(CCA(ridge=1.0).fit([[0.0], [1.0], [2.0]], [0.0, 2.0, 1.0]).correlations_, [0.25])


def test_without_ridge_correlations_are_those_of_the_variates():
    X, Y = correlated_views()
    cca = CCA(ridge=0.0).fit(X, Y)
    U, V = cca.transform(X, Y)
    observed = [np.corrcoef(U[:, c], V[:, c])[0, 1] for c in range(cca.n_components_)]
    np.testing.assert_allclose(cca.correlations_, observed, atol=1e-12)
    assert cca.score(X, Y) == pytest.approx(np.mean(observed), abs=1e-12)
    np.testing.assert_allclose(np.cov(U, rowvar=False), np.eye(5), atol=1e-12)


def test_score_is_the_mean_correlation_on_held_out_rows():
    X, Y = correlated_views(n=300)
    cca = CCA(n_components=2).fit(X[:200], Y[:200])
    U = (X[200:] - X[:200].mean(axis=0)) @ cca.x_rotations_
    V = (Y[200:] - Y[:200].mean(axis=0)) @ cca.y_rotations_
    expected = np.mean([np.corrcoef(U[:, c], V[:, c])[0, 1] for c in range(2)])
    assert cca.score(X[200:], Y[200:]) == pytest.approx(expected, abs=1e-12)


def test_score_counts_a_component_without_variance_as_zero():
    X, Y = correlated_views()
    cca = CCA().fit(X, Y)
    assert cca.score(X, np.tile(Y[0], (len(Y), 1))) == 0.0


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6, 1e-300])
def test_constant_view_gives_no_components(constant):
    X, Y = correlated_views()
    cca = CCA().fit(X, np.full_like(Y, constant))
    assert (cca.n_components_, cca.x_rank_, cca.y_rank_) == (0, 7, 0)
    assert cca.x_rotations_.shape == (7, 0)
    assert cca.y_rotations_.shape == (5, 0)
    assert cca.transform(X).shape == (200, 0)
    assert cca.score(X, Y) == 0.0


def test_n_components_keeps_the_leading_ones():
    X, Y = correlated_views()
    whole, two = CCA().fit(X, Y), CCA(n_components=2).fit(X, Y)
    np.testing.assert_array_equal(two.correlations_, whole.correlations_[:2])
    np.testing.assert_array_equal(two.x_rotations_, whole.x_rotations_[:, :2])
    assert np.all(np.diff(whole.correlations_) <= 0)


def test_sign_makes_the_largest_entry_of_each_x_direction_positive():
    X, Y = correlated_views()
    for cca in (CCA().fit(X, Y), CCA().fit(-X, Y), CCA().fit(X[::-1], Y[::-1])):
        largest = np.abs(cca.x_rotations_).argmax(axis=0)
        assert np.all(cca.x_rotations_[largest, np.arange(5)] > 0)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [[200], [1] * 10 + [190], [67, 133], [3, 0, 197]], ids=str)
def test_streamed_and_merged_equal_fit_in_any_order(sizes, offset, given):
    X, Y = correlated_views()
    X += offset
    whole = CCA().fit(given(X), given(Y))
    cuts = np.cumsum(sizes)[:-1]
    parts = [(given(x), given(y)) for x, y in zip(np.split(X, cuts), np.split(Y, cuts), strict=True) if len(x)]
    streamed = CCA()
    for x, y in parts:
        assert streamed.partial_fit(x, y) is streamed
    forward, backward = ([CCA().partial_fit(x, y) for x, y in ordered] for ordered in (parts, parts[::-1]))
    results = [streamed]
    for first, *rest in (forward, backward):
        for other in rest:
            assert first.merge(other) is first
        results.append(first)
    for cca in results:
        assert cca.n_samples_seen_ == 200
        np.testing.assert_allclose(cca.correlations_, whole.correlations_, rtol=0, atol=1e-10)
        np.testing.assert_allclose(cca.x_rotations_, whole.x_rotations_, rtol=0, atol=1e-8)
        np.testing.assert_allclose(cca.y_rotations_, whole.y_rotations_, rtol=0, atol=1e-8)
        np.testing.assert_allclose(cca.x_mean_, whole.x_mean_, rtol=1e-14, atol=1e-14)


def test_merge_leaves_the_other_estimator_alone():
    X, Y = correlated_views()
    first, second = CCA().fit(X[:90], Y[:90]), CCA().fit(X[90:], Y[90:])
    before = second.x_rotations_.copy()
    first.merge(second).merge(second)
    assert first.n_samples_seen_ == 90 + 2 * 110
    assert second.n_samples_seen_ == 110
    np.testing.assert_array_equal(second.partial_fit(X[:1], Y[:1]).n_samples_seen_, 111)
    np.testing.assert_array_equal(CCA().fit(X[90:], Y[90:]).x_rotations_, before)


def test_fit_forgets_earlier_rows():
    X, Y = correlated_views()
    again = CCA().fit(X[:50, :3] + 9.0, Y[:50, :2]).fit(X, Y)
    np.testing.assert_array_equal(again.x_rotations_, CCA().fit(X, Y).x_rotations_)


def test_one_row_streams_in_without_components_until_the_second_comes():
    X, Y = correlated_views()
    cca = CCA().partial_fit(X[:1], Y[:1])
    assert cca.n_components_ == 0
    assert cca.partial_fit(X[1:2], Y[1:2]).n_components_ == 1


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
def test_torch_views_give_torch_variates_of_their_dtype(dtype, tolerance):
    X, Y = (torch.from_numpy(view).to(dtype) for view in correlated_views())
    X.requires_grad_()
    cca = CCA().fit(X, Y)
    assert isinstance(cca.x_rotations_, np.ndarray)
    same = CCA().fit(X.detach().double().numpy(), Y.double().numpy())
    np.testing.assert_allclose(cca.correlations_, same.correlations_, atol=1e-12)
    U, V = cca.transform(X, Y)
    assert U.dtype == V.dtype == dtype
    expected = same.transform(X.detach().double().numpy(), Y.double().numpy())
    for variates, wanted in zip((U, V), expected, strict=True):
        torch.testing.assert_close(variates.double(), torch.from_numpy(wanted), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cca.transform(X), U)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-6),
        (torch.float16, 2e-3),
        (torch.bfloat16, 2e-2),
        (torch.int32, 1e-6),
    ],
)
def test_rows_on_a_gpu_stay_there(dtype, tolerance, gpu, monkeypatch):
    monkeypatch.setattr(cca_module, "_to_numpy", lambda view: pytest.fail("rows were copied to the CPU"))
    # More rows than transform projects at a time.
    X, Y = ((10 * torch.from_numpy(view)).to(gpu, dtype) for view in correlated_views(n=2**16 + 200))
    cca = CCA(ridge=0.0).fit(X[:150], Y[:150])
    U, V = cca.transform(X, Y)
    score = cca.score(X[150:], Y[150:])
    alone = cca.transform(X)
    both = CCA(ridge=0.0).fit_transform(X[:150], Y[:150])
    monkeypatch.undo()

    x, y = X.double().cpu().numpy(), Y.double().cpu().numpy()
    same = CCA(ridge=0.0).fit(x[:150], y[:150])
    np.testing.assert_allclose(cca.correlations_, same.correlations_, atol=1e-12)
    assert score == pytest.approx(same.score(x[150:], y[150:]), abs=1e-12)
    wanted_dtype = dtype if dtype.is_floating_point else torch.float32
    for found, wanted in zip((U, V), same.transform(x, y), strict=True):
        assert (found.dtype, found.device) == (wanted_dtype, X.device)
        np.testing.assert_allclose(found.double().cpu().numpy(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(alone, U)
    for found, wanted in zip(both, (U, V), strict=True):
        torch.testing.assert_close(found, wanted[:150])


def test_views_that_share_no_gpu_are_computed_on_the_cpu(gpu):
    X, Y = correlated_views()
    mixed = CCA().fit(torch.from_numpy(X).to(gpu), Y)
    np.testing.assert_array_equal(mixed.x_rotations_, CCA().fit(X, Y).x_rotations_)


def test_integer_tensors_give_variates_in_the_default_dtype():
    X = torch.arange(12).reshape(6, 2) ** 2
    assert CCA().fit(X, X[:, 0]).transform(X).dtype == torch.float32


def test_views_are_never_copied_to_float64_as_a_whole():
    X = np.random.default_rng(0).normal(size=(50_000, 40)).astype(np.float32)
    cca = CCA()
    tracemalloc.start()
    cca.fit(X, X[:, :20])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < X.nbytes  # the float64 copy alone would be twice that


def test_inputs_are_left_as_they_are():
    X, Y = correlated_views()
    before = X.copy(), Y.copy()
    CCA().fit(X, Y).transform(X, Y)
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(Y, before[1])


def with_entry(view, value):
    view = view.copy()
    view[3, 1] = value
    return view


X0, Y0 = correlated_views(n=20)


@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        (with_entry(X0, np.nan), Y0, "X contains NaN"),
        (with_entry(X0, -np.inf), Y0, "X contains infinity"),
        (X0, with_entry(Y0, np.nan), "Y contains NaN"),
        (torch.from_numpy(with_entry(X0, np.inf)), Y0, "X contains infinity"),
        (with_entry(X0, 1e300), Y0, "too large to be squared"),
        (X0[:19], Y0, r"inconsistent numbers of samples: \[19, 20\]"),
        (X0[:1], Y0[:1], "minimum of 2 is required"),
        (X0[:0], Y0[:0], "minimum of 2 is required"),
        (X0[0], Y0, "Expected 2D array, got 1D array"),
        (X0[:, :0], Y0, "0 feature"),
        (X0[None], Y0, "dim 3"),
        (X0, Y0[None], "dim 3"),
        (X0 * 1j, Y0, "Complex data not supported"),
        (X0, 3.0, "Expected 1D or 2D array for Y, got scalar 3.0"),
        (X0, [["a"]] * 20, "not compatible with arrays of bytes/strings"),
        (None, Y0, "Expected 2D array, got scalar array"),
        (X0, None, "it needs two views, X and Y"),
    ],
)
def test_bad_views_are_refused(X, Y, message, given):
    X, Y = given(X), given(Y)
    with pytest.raises(ValueError, match=message):
        CCA().fit(X, Y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_components": 0}, "n_components must be a positive int, got 0"),
        ({"n_components": 2.5}, "n_components must be a positive int, got 2.5"),
        ({"n_components": None}, "n_components must be a positive int, got None"),
        ({"n_components": np.int64(0)}, "n_components must be a positive int, got 0"),
        ({"n_components": True}, "n_components must be a positive int, got True"),
        ({"ridge": -1e-3}, "ridge must be a finite number ≥ 0, got -0.001"),
        ({"ridge": np.nan}, "ridge must be a finite number ≥ 0, got nan"),
        ({"ridge": np.inf}, "ridge must be a finite number ≥ 0, got inf"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_bad_parameters_are_refused_in_fit(parameters, message, method):
    with pytest.raises(ValueError, match=message):
        getattr(CCA(**parameters), method)(X0, Y0)


def test_parameters_may_be_numpy_numbers():
    given = CCA(n_components=np.int32(2), ridge=np.float32(0.5)).fit(X0, Y0)
    np.testing.assert_array_equal(given.x_rotations_, CCA(n_components=2, ridge=0.5).fit(X0, Y0).x_rotations_)


def test_refused_batch_leaves_a_streamed_fit_unchanged(given):
    cca = CCA().partial_fit(given(X0), given(Y0))
    for X, Y in [(with_entry(X0, np.nan), Y0), (with_entry(X0, 1e300), Y0), (X0[:, :6], Y0), (X0, Y0[:, :4])]:
        with pytest.raises(ValueError, match=r"NaN|too large|expecting"):
            cca.partial_fit(given(X), given(Y))
    X, Y = correlated_views(n=30, seed=1)
    resumed = cca.partial_fit(given(X), given(Y))
    whole = CCA().fit(given(np.vstack([X0, X])), given(np.vstack([Y0, Y])))
    assert resumed.n_samples_seen_ == 50
    np.testing.assert_allclose(resumed.correlations_, whole.correlations_, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cca: cca.transform(X0[:, :3]), "X has 3 features, but CCA is expecting 7"),
        (lambda cca: cca.transform(X0, Y0[:, :3]), "Y has 3 features, but CCA is expecting 5"),
        (lambda cca: cca.transform(with_entry(X0, np.nan)), "X contains NaN"),
        (lambda cca: cca.transform(X0, Y0[:5]), r"inconsistent numbers of samples: \[20, 5\]"),
        (lambda cca: cca.score(X0[:1], Y0[:1]), "minimum of 2 is required"),
        (lambda cca: cca.merge(CCA().fit(X0, Y0[:, 0])), r"\(7, 1\) features into one of \(7, 5\)"),
        (lambda cca: cca.merge(X0), "other must be a CCA, got ndarray"),
    ],
)
def test_bad_input_after_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(CCA().fit(X0, Y0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: CCA().transform(X0),
        lambda: CCA().score(X0, Y0),
        lambda: CCA().merge(CCA().fit(X0, Y0)),
        lambda: CCA().fit(X0, Y0).merge(CCA()),
    ],
)
def test_unfitted_estimator_raises(call):
    with pytest.raises(NotFittedError):
        call()


def test_pickled_estimator_goes_on_and_a_clone_starts_anew():
    cca = CCA(n_components=3, ridge=0.1).fit(X0, Y0)
    restored = pickle.loads(pickle.dumps(cca))
    X, Y = correlated_views(n=30, seed=1)
    np.testing.assert_array_equal(restored.partial_fit(X, Y).x_rotations_, cca.partial_fit(X, Y).x_rotations_)
    copy = clone(cca)
    assert copy.get_params() == {"n_components": 3, "ridge": 0.1}
    assert not hasattr(copy, "x_rotations_")


def test_scikit_learn_estimator_contract():
    # Skipped by scikit-learn unless SCIPY_ARRAY_API is set; everything else applies and passes.
    results = check_estimator(CCA(), on_skip=None)
    assert {r["check_name"] for r in results if r["status"] != "passed"} <= {"check_array_api_input"}


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_whiten_spans_exactly_the_directions_with_variance(ridge):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(6, 4))
    covariance = factor @ factor.T
    W = whiten(covariance, ridge)
    assert W.shape == (6, 4)
    shrunk = covariance + ridge * np.trace(covariance) / 6 * np.eye(6)
    np.testing.assert_allclose(W.T @ shrunk @ W, np.eye(4), atol=1e-12)
    assert np.linalg.matrix_rank(np.hstack([W, factor])) == 4
    assert whiten(np.zeros((3, 3)), ridge).shape == (3, 0)


def test_canonical_directions_of_a_joint_covariance_are_those_of_fit():
    cca = CCA(n_components=2).fit(X0, Y0)
    solution = canonical_directions(np.cov(X0, Y0, rowvar=False), 7, n_components=2, ridge=1e-3)
    np.testing.assert_allclose(solution.x_rotations, cca.x_rotations_, atol=1e-12)
    np.testing.assert_allclose(solution.y_rotations, cca.y_rotations_, atol=1e-12)
    assert (solution.x_rank, solution.y_rank) == (7, 5)


@pytest.mark.parametrize("order", ["drawn", "drifting", "one row apart"])
@pytest.mark.parametrize("offset", [0, 10**6, -(10**12)])
def test_moments_equal_exact_integer_arithmetic(offset, order, given):
    spread = np.array([1, 1000, 10, 0])
    whole = np.rint(np.random.default_rng(0).normal(size=(5000, 4)) * 1000).astype(np.int64) * spread + offset
    if order == "drifting":  # a chunk's mean is far from those before it
        whole = np.sort(whole, axis=0)
    elif order == "one row apart":  # alone in its chunk, far from the mean of the others
        whole = np.concatenate([whole[:4096], whole[:1] + 10**7 * spread])
    exact = whole.astype(object)
    n, total = len(exact), exact.sum(axis=0)
    covariance = ((n * (exact.T @ exact) - np.outer(total, total)) / (n * (n - 1))).astype(np.float64)
    rows = whole.astype(np.float64)
    moments = Moments(4).update(given(rows[:, :3]), given(rows[:, 3:]))
    assert moments.count == n
    mean, scale = (total / n).astype(np.float64), np.sqrt(np.diag(covariance))
    np.testing.assert_array_less(np.abs(moments.mean - mean), 1e-15 * (np.abs(mean) + scale) + 1e-300)
    np.testing.assert_array_less(np.abs(moments.covariance - covariance), 1e-14 * np.outer(scale, scale) + 1e-300)
    assert not moments.covariance[3].any()


def test_moments_of_no_rows_and_of_one_row_have_no_variance(given):
    moments = Moments(2).update(given(np.empty((0, 2))))
    assert moments.count == 0
    assert not moments.update(given(np.array([[3.0, -4.0]]))).covariance.any()
    np.testing.assert_array_equal(moments.mean, [3.0, -4.0])


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ((np.zeros((5, 2)),), r"3 columns in all, got shapes \[\(5, 2\)\]"),
        ((np.zeros((5, 2)), np.zeros((4, 1))), "got shapes"),
        ((np.zeros(3),), "got shapes"),
        ((np.full((5, 3), np.nan),), "not finite"),
        ((np.full((5, 3), np.inf),), "not finite"),
        ((np.array([[-1e300] * 3, [1e300] * 3]),), "too large"),
        ((np.array([[1e300] * 3]),), "too large"),
        ((np.array([[np.nan] * 3]),), "not finite"),
    ],
)
def test_moments_refuse_bad_rows_and_stay_unchanged(views, message, given):
    moments = Moments(3).update(given(np.eye(3)))
    with pytest.raises(ValueError, match=message):
        moments.update(*map(given, views))
    assert moments.count == 3
    np.testing.assert_allclose(moments.mean, np.full(3, 1 / 3))


@pytest.mark.parametrize("parts", [1, 3])
def test_pairwise_moments_are_those_of_each_view_and_of_each_pair_where_both_are_there(parts):
    rng = np.random.default_rng(0)
    views, present = [rng.normal(size=(90, width)) for width in (4, 3, 2)], rng.random((90, 3)) < 0.7
    summed = []
    for rows in np.array_split(np.arange(90), parts):
        summed.append(PairwiseMoments([4, 3, 2]))
        summed[-1].update([view[rows] for view in views], present[rows])
    moments = PairwiseMoments([4, 3, 2], summed)
    own = [Moments(view.shape[1]).update(view[there]) for view, there in zip(views, present.T, strict=True)]
    both = {pair: present[:, list(pair)].all(axis=1) for pair in [(0, 1), (0, 2), (1, 2)]}
    joint = [
        Moments(w).update(views[i][b], views[j][b]) for w, ((i, j), b) in zip((7, 6, 5), both.items(), strict=True)
    ]
    for found, wanted in zip([*moments.own, *moments.joint], [*own, *joint], strict=True):
        assert found.count == wanted.count
        np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found.covariance, wanted.covariance, rtol=1e-12, atol=1e-14)
    assert summed[0].own[0].count == present[: -(-90 // parts), 0].sum()  # the parts are left as they are


def test_moments_of_other_sizes_do_not_merge():
    with pytest.raises(ValueError, match="moments of 2 features into moments of 3"):
        Moments(3).merge(Moments(2))
