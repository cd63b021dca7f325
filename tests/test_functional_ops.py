"""The check's statistics, neighbours and local least squares against NumPy, scikit-learn and explicit solutions."""

import copy
import gc
import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from sklearn.manifold._locally_linear import barycenter_weights
from sklearn.neighbors import NearestNeighbors

from m3er_fast import reference
from m3er_fast.cpu import check_statistics as cpu_check
from m3er_fast.functional import (
    BackendUnavailableError,
    CheckProjections,
    check_statistics,
    gate_statistics,
    local_least_squares,
    nearest_neighbors,
)

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")


# --- the check's statistics ------------------------------------------------------------------------------------------

DIMS = (7, 4, 5)
PAIRS = [(0, 1), (0, 2), (1, 2)]


def fitted_views(seed=0, components=(3, 4, 2), dims=DIMS, ranks=(5, 4, 3)):
    """Means, pairs (matrices H (k, d) of both sides, canonical correlations, component weights), whiteners (r, d)."""
    rng = np.random.default_rng(seed)
    means = [rng.normal(size=d) for d in dims]
    pairs = [
        (*(rng.normal(size=(k, dims[m])) for m in pair), rng.uniform(0.3, 1.0, size=k))
        for pair, k in zip(PAIRS, components, strict=True)
    ]
    whiteners = [rng.normal(size=(r, d)) for r, d in zip(ranks, dims, strict=True)]
    pairs = [(left, right, rng.uniform(0.0, 0.95, size=len(weight)), weight) for left, right, weight in pairs]
    return means, pairs, whiteners


def fold(means, pairs, whiteners, dtype=torch.float64):
    """The same as projections; as the means are subtracted first, biases stay zero."""
    left, right, canonical, weight = ([torch.from_numpy(pair[part]).to(dtype) for pair in pairs] for part in range(4))
    zeros = [torch.zeros_like(s) for s in canonical]
    return CheckProjections(
        center=[torch.from_numpy(mean).to(dtype) for mean in means],
        left=left,
        left_bias=zeros,
        right=right,
        right_bias=zeros,
        whitener=[torch.from_numpy(whitener).to(dtype) for whitener in whiteners],
        weight=weight,
        canonical=canonical,
    )


def log_likelihood_ratio(u, v, canonical):
    """log p(u, v) - log p(u) - log p(v) of one sample, by the densities of scipy."""
    u, v = (x / np.sqrt(np.mean(x**2)) for x in (u, v))
    joint = np.block([[np.eye(len(u)), np.diag(canonical)], [np.diag(canonical), np.eye(len(u))]])
    together = multivariate_normal(cov=joint).logpdf(np.concatenate([u, v]))
    return together - norm.logpdf(u).sum() - norm.logpdf(v).sum()


def vectors(batch, seed=1, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(size=(batch, d))).to(dtype) for d in DIMS]


@pytest.fixture(params=["few samples", "many samples"])
def samples(request, monkeypatch):
    """Whether a batch counts as large: blocks (here of three) and bands (here of two rows)."""
    if request.param == "many samples":
        monkeypatch.setattr(cpu_check, "FEWEST_BANDED_SAMPLES", 0)
        monkeypatch.setattr(cpu_check, "BLOCK_SAMPLES", 3)
        monkeypatch.setattr(cpu_check, "BAND_ROWS", 2)


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_check_statistics_equal_numpy(batch, dtype, tolerance, backend):
    means, pairs, whiteners = fitted_views()
    features = vectors(batch, dtype=dtype)
    correlation, energy, likelihood = check_statistics(features, fold(means, pairs, whiteners, dtype), backend=backend)
    assert correlation.dtype == energy.dtype == likelihood.dtype == dtype
    centered = [x.double().numpy() - mean for x, mean in zip(features, means, strict=True)]
    for p, ((i, j), (left, right, canonical, weight)) in enumerate(zip(PAIRS, pairs, strict=True)):
        for b in range(batch):
            u, v = left @ centered[i][b], right @ centered[j][b]
            wanted = np.corrcoef(weight * u, weight * v)[0, 1]
            assert correlation[b, p].item() == pytest.approx(wanted, abs=tolerance)
            wanted = log_likelihood_ratio(u, v, canonical)
            assert likelihood[b, p].item() == pytest.approx(wanted, rel=20 * tolerance, abs=20 * tolerance)
    for m, whitener in enumerate(whiteners):
        wanted = ((centered[m] @ whitener.T) ** 2).mean(axis=1)
        np.testing.assert_allclose(energy[:, m].numpy(), wanted, rtol=tolerance)


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("ranks", [(5, 4, 3), (7, 4, 5), (6, 0, 1)])
def test_energy_of_triangular_whiteners_equals_numpy(ranks):
    means, pairs, whiteners = fitted_views(ranks=ranks)
    whiteners = [np.triu(whitener) for whitener in whiteners]
    features = vectors(8)
    dense = fold(means, pairs, whiteners)
    correlation, energy, _ = check_statistics(features, dense._replace(triangular=True))
    for m, whitener in enumerate(whiteners):
        wanted = (((features[m].numpy() - means[m]) @ whitener.T) ** 2).sum(axis=1) / max(ranks[m], 1)
        np.testing.assert_allclose(energy[:, m].numpy(), wanted, rtol=1e-12)
    torch.testing.assert_close(correlation, check_statistics(features, dense)[0], rtol=0, atol=1e-14)


@pytest.mark.usefixtures("samples")
def test_check_statistics_of_half_precision_are_those_of_the_rounded_features():
    projections = fold(*fitted_views(), torch.float32)
    half = [x.half() for x in vectors(4)]
    for got, wanted in zip(
        check_statistics(half, projections), check_statistics([x.float() for x in half], projections), strict=True
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("samples")
def test_bias_is_added_after_the_projection():
    projections = fold(*fitted_views())
    shift = [torch.linspace(-1, 1, len(bias), dtype=torch.float64) for bias in projections.left_bias]
    features = vectors(5)
    correlation, _, likelihood = check_statistics(features, projections._replace(left_bias=shift))
    x, y = features[0] - projections.center[0], features[2] - projections.center[2]
    u, v = x @ projections.left[1].T + shift[1], y @ projections.right[1].T
    for b in range(5):
        wanted = np.corrcoef(projections.weight[1] * u[b], projections.weight[1] * v[b])[0, 1]
        assert correlation[b, 1].item() == pytest.approx(wanted, abs=1e-12)
        wanted = log_likelihood_ratio(u[b].numpy(), v[b].numpy(), projections.canonical[1].numpy())
        assert likelihood[b, 1].item() == pytest.approx(wanted, abs=1e-10)


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("components", [0, 1])
def test_too_few_components_to_vary_count_as_not_correlated(components):
    projections = fold(*fitted_views(components=(components,) * 3))
    correlation, energy, likelihood = check_statistics(vectors(3), projections)
    assert torch.equal(correlation, torch.zeros(3, 3, dtype=torch.float64))
    assert (energy > 0).all()
    assert likelihood.any() == (components > 0)
    wanted = check_statistics(vectors(3), projections, backend="torch").likelihood
    torch.testing.assert_close(likelihood, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_pairs_may_differ_in_their_components(backend):
    found = check_statistics(vectors(5), fold(*fitted_views(components=(0, 4, 1))), backend=backend)
    alone = check_statistics(vectors(5), fold(*fitted_views(components=(0, 4, 1))), backend="torch")
    assert not found.correlation[:, ::2].any()
    assert not found.likelihood[:, 0].any()
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("canonical", [0.0, 0.999, 1 - 2**-20])
def test_likelihood_of_strongly_correlated_components_keeps_its_digits(backend, canonical):
    """1 - s² is down to 2e-6: terms of a million cancel where u and v agree."""
    projections = fold(*fitted_views(components=(4, 4, 4)), torch.float32)
    same = [torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.25, 1.0, 1.0, -1.0]])] * 2
    eye, zeros = torch.eye(4), torch.zeros(4)
    projections = CheckProjections(
        [zeros] * 2, [eye], [zeros], [eye], [zeros], [eye] * 2, [zeros + 1], [zeros + canonical]
    )
    found = check_statistics(same, projections, backend=backend).likelihood
    for b, x in enumerate(same[0].double().numpy()):
        wanted = log_likelihood_ratio(x, x, np.full(4, canonical, dtype=np.float32).astype(np.float64))
        assert found[b, 0].item() == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.usefixtures("samples")
def test_likelihood_and_correlation_do_not_see_level():
    projections = fold(*fitted_views())
    features = [x + 1.0 for x in vectors(6)]
    louder = [c + 8.0 * (x - c) for x, c in zip(features, projections.center, strict=True)]
    plain, scaled = check_statistics(features, projections), check_statistics(louder, projections)
    torch.testing.assert_close(scaled.correlation, plain.correlation, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled.likelihood, plain.likelihood, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled.energy, 64 * plain.energy, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("change", ["in place", "replaced", "copied", "converted", "in inference mode"])
def test_changed_projections_are_read_anew(change):
    """What the CPU computes from projections once holds as long as they do."""
    projections, features = fold(*fitted_views()), vectors(4)
    with torch.inference_mode(change == "in inference mode"):
        if change == "in inference mode":
            projections = fold(*fitted_views())
        check_statistics(features, projections)
        if change == "copied":
            projections = copy.deepcopy(projections)
        if change == "replaced":
            matrices = [*projections.whitener[:1], 3.0 * projections.whitener[1], *projections.whitener[2:]]
            projections = projections._replace(whitener=matrices)
        elif change == "converted":
            features = [x.float() for x in features]
        else:
            projections.whitener[1].mul_(3.0)
            projections.center[0].add_(1.0)
        found = check_statistics(features, projections)
    wanted = check_statistics(features, projections, backend="torch")
    tolerance = 2e-5 if change == "converted" else 1e-12
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_what_is_known_of_projections_goes_with_them():
    projections = fold(*fitted_views())
    check_statistics(vectors(4), projections)
    known = len(cpu_check._known)
    del projections
    gc.collect()
    assert len(cpu_check._known) < known


def test_gate_statistics_are_the_first_two():
    projections = fold(*fitted_views())
    found, (correlation, energy) = check_statistics(vectors(4), projections), gate_statistics(vectors(4), projections)
    assert torch.equal(correlation, found.correlation)
    assert torch.equal(energy, found.energy)


@pytest.mark.usefixtures("samples")
def test_a_gradient_of_the_likelihood_is_that_of_finite_differences():
    projections = fold(*fitted_views())
    inputs = tuple(x.requires_grad_() for x in vectors(3))
    torch.autograd.gradcheck(lambda *x: tuple(check_statistics(x, projections)), inputs)


@pytest.mark.usefixtures("samples")
def test_a_sample_at_the_training_mean_counts_as_not_correlated():
    means, pairs, whiteners = fitted_views()
    features = [torch.from_numpy(mean)[None] for mean in means]
    correlation, energy, likelihood = check_statistics(features, fold(means, pairs, whiteners))
    assert not correlation.any()
    assert not energy.any()
    for p, (*_, canonical, _) in enumerate(pairs):  # u = v = 0
        assert likelihood[0, p].item() == pytest.approx(-0.5 * np.log(1 - canonical**2).sum(), abs=1e-12)


@pytest.mark.usefixtures("samples")
def test_a_modality_without_whitened_directions_has_no_energy():
    _, energy, _ = check_statistics(vectors(3), fold(*fitted_views(ranks=(0, 4, 3))))
    assert not energy[:, 0].any()
    assert (energy[:, 1:] > 0).all()


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("value", [1e15, 1e25, 3e38, math.inf, -math.inf, math.nan])
def test_check_statistics_are_finite_whatever_a_modality_holds(value):
    features = vectors(4, dtype=torch.float32)
    clean = check_statistics(features, fold(*fitted_views(), torch.float32))
    features[1] = torch.full_like(features[1], value)
    correlation, energy, likelihood = check_statistics(features, fold(*fitted_views(), torch.float32))
    assert torch.isfinite(correlation).all()
    assert torch.isfinite(likelihood).all()
    if not math.isfinite(value):
        assert (likelihood[:, ::2] < -1e38).all()
        assert not correlation[:, ::2].any()
    assert (correlation.abs() <= 1).all()
    assert torch.isfinite(energy).all()
    assert (energy[:, 1] > 1e20).all()
    assert torch.equal(correlation[:, 1], clean[0][:, 1])  # the pair without that modality
    assert torch.equal(likelihood[:, 1], clean[2][:, 1])
    assert torch.equal(energy[:, ::2], clean[1][:, ::2])


@pytest.mark.usefixtures("samples")
def test_check_statistics_of_an_empty_batch():
    correlation, energy, likelihood = check_statistics(vectors(0), fold(*fitted_views()))
    assert correlation.shape == likelihood.shape == (0, 3)
    assert energy.shape == (0, 3)


@pytest.mark.usefixtures("samples")
def test_one_modality_has_energy_and_no_pair():
    projections = fold(*fitted_views())
    alone = CheckProjections(projections.center[:1], [], [], [], [], projections.whitener[:1], [], [])
    correlation, energy, likelihood = check_statistics(vectors(4)[:1], alone)
    assert correlation.shape == likelihood.shape == (4, 0)
    torch.testing.assert_close(energy[:, 0], check_statistics(vectors(4), projections)[1][:, 0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (vectors(3)[:2], r"features: got 2 modalities, wanted 3"),
        ([*vectors(3)[:2], torch.zeros(3, 9)], r"features\[2\] has shape \(3, 9\), wanted \(3, 5\)"),
        ([*vectors(3)[:2], torch.zeros(2, 5)], r"features\[2\] has shape \(2, 5\), wanted \(3, 5\)"),
        ([torch.zeros(3, 1, 7), *vectors(3)[1:]], r"features\[0\] has shape \(3, 1, 7\), wanted \(3, 7\)"),
    ],
)
def test_check_statistics_name_the_modality_that_does_not_fit(features, message):
    with pytest.raises(ValueError, match=message):
        check_statistics(features, fold(*fitted_views()))


# --- nearest neighbours -----------------------------------------------------------------------------------------------


def search_problem(queries=40, rows=300, d=12, offset=0.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query, bank = torch.randn(queries, d, generator=generator), torch.randn(rows, d, generator=generator)
    return (query + offset).to(dtype), (bank + offset).to(dtype)


def assert_nearest(query, bank, k, *, rtol, **options):
    distances, indices = nearest_neighbors(query, bank, k, **options)
    search = NearestNeighbors(n_neighbors=min(k, len(bank)), algorithm="brute").fit(bank.double().numpy())
    wanted, rows = search.kneighbors(query.double().numpy())
    # By its differences: scikit-learn's own distances cancel far from the origin.
    wanted = ((query.double().numpy()[:, None] - bank.double().numpy()[rows]) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances.numpy(), wanted, rtol=rtol, atol=1e-30)
    np.testing.assert_array_equal(indices.numpy(), rows)
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("k", [1, 5, 300, 1000])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_neighbors_equal_scikit_learn(k, dtype, rtol):
    assert_nearest(*search_problem(dtype=dtype), k, rtol=rtol)


@pytest.mark.parametrize("engine", ["torch", pytest.param("faiss", marks=needs_faiss)])
def test_every_engine_equals_scikit_learn(engine):
    assert_nearest(*search_problem(), 7, rtol=1e-5, engine=engine)


def test_neighbors_are_exact_far_from_the_origin():
    """In float32 ‖q‖² - 2qb + ‖b‖² alone has an error of about 100 here, and the distances are about 10."""
    assert_nearest(*search_problem(offset=1e4), 7, rtol=1e-5)


@pytest.mark.parametrize("outlier", [1e4, 1e8])
def test_neighbors_are_exact_beside_a_row_that_lies_far_out(outlier):
    query, bank = search_problem()
    bank[17] = outlier
    assert_nearest(query, bank, 7, rtol=1e-5)


def test_near_ties_that_products_cannot_tell_apart_are_put_in_order_by_differences():
    """Groups of six rows 0.1 apart and 3000 from the middle: float32 products are off by more than 1."""
    centers, jitter = search_problem(queries=50, rows=300)
    bank = 1e3 * centers.repeat_interleave(6, dim=0) + 0.03 * jitter
    assert_nearest(1e3 * centers, bank, 2, rtol=1e-2)  # rounding the rows to float32 is all that is lost


def test_neighbors_of_mixed_precision_are_exact_in_the_higher_one():
    query, bank = search_problem(offset=3.0)
    assert_nearest(query.double() / 3, bank, 7, rtol=1e-13)


def test_the_reference_agrees():
    query, bank = search_problem()
    distances, indices = nearest_neighbors(query, bank, 6)
    wanted, rows = reference.nearest_neighbors(query, bank, 6)
    assert torch.equal(indices, rows)
    torch.testing.assert_close(distances, wanted, rtol=1e-6, atol=0)
    assert [tuple(x.shape) for x in reference.nearest_neighbors(query[:0], bank, 6)] == [(0, 6), (0, 6)]


@pytest.mark.parametrize("engine", ["torch", pytest.param("faiss", marks=needs_faiss)])
def test_duplicated_rows_are_each_a_neighbor(engine):
    _, bank = search_problem(rows=20)
    bank[10:] = bank[:10]
    distances, indices = nearest_neighbors(bank[:3], bank, 4, engine=engine)
    assert not distances[:, :2].any()
    assert torch.equal(indices[:, :2].sort(dim=1).values, torch.tensor([[0, 10], [1, 11], [2, 12]]))
    torch.testing.assert_close(distances[:, 2], distances[:, 3])
    assert torch.equal((indices[:, 2] - indices[:, 3]).abs(), torch.full((3,), 10))


@pytest.mark.parametrize("engine", ["torch", pytest.param("faiss", marks=needs_faiss)])
def test_a_query_that_is_not_finite_has_no_neighbors_and_disturbs_no_other(engine):
    query, bank = search_problem(queries=6)
    wanted = nearest_neighbors(query, bank, 4, engine=engine)
    for row, value in ((0, math.nan), (2, math.inf), (5, -math.inf)):
        query[row, 3] = value
    distances, indices = nearest_neighbors(query, bank, 4, engine=engine)
    assert torch.equal(distances[[0, 2, 5]], torch.full((3, 4), math.inf))
    assert torch.equal(indices[[0, 2, 5]], torch.arange(4).expand(3, -1))
    assert torch.equal(indices[[1, 3, 4]], wanted[1][[1, 3, 4]])
    torch.testing.assert_close(distances[[1, 3, 4]], wanted[0][[1, 3, 4]])


@pytest.mark.parametrize("engine", ["torch", pytest.param("faiss", marks=needs_faiss)])
@pytest.mark.parametrize("scale", [1e25, 3e38])
def test_distances_that_overflow_are_infinite_and_their_indices_valid(engine, scale):
    query, bank = search_problem(queries=3)
    distances, indices = nearest_neighbors(torch.full_like(query, scale), bank, 4, engine=engine)
    assert torch.equal(distances, torch.full((3, 4), math.inf))
    assert ((indices >= 0) & (indices < len(bank))).all()
    if engine == "torch":
        assert not nearest_neighbors(query, bank.sign() * 1e38, 4)[0].isnan().any()


@pytest.mark.parametrize("engine", ["torch", pytest.param("faiss", marks=needs_faiss)])
def test_no_query_gives_empty_results(engine):
    distances, indices = nearest_neighbors(torch.zeros(0, 12), search_problem()[1], 4, engine=engine)
    assert distances.shape == indices.shape == (0, 4)
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_neighbors_in_half_precision_are_those_of_the_rounded_rows(dtype):
    query, bank = search_problem(dtype=dtype)
    got, wanted = nearest_neighbors(query, bank, 5), nearest_neighbors(query.float(), bank.float(), 5)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(3)}, r"query must be a floating matrix .*\(3,\)"),
        ({"query": torch.zeros(3, 4, dtype=torch.int64)}, r"query must be a floating matrix .*int64.*\(3, 4\)"),
        ({"bank": torch.zeros(3, 4, 1)}, r"bank must be a floating matrix .*\(3, 4, 1\)"),
        ({"query": torch.zeros(3, 0), "bank": torch.zeros(3, 0)}, r"query .*at least one column.*\(3, 0\)"),
        ({"bank": torch.zeros(3, 5)}, r"query has 4 features, but bank has 5"),
        ({"bank": torch.zeros(0, 4)}, r"bank is empty"),
        ({"bank": torch.full((3, 4), math.nan)}, r"bank must be finite"),
        ({"k": 0}, r"k must be a positive int, got 0"),
        ({"k": 2.0}, r"k must be a positive int, got 2\.0"),
        (
            {"engine": "annoy"},
            r"engine must be one of 'auto', 'torch', 'faiss', 'faiss-ivf', 'faiss-hnsw', got 'annoy'",
        ),
    ],
)
def test_neighbors_name_bad_arguments(changes, message):
    arguments = {"query": torch.zeros(3, 4), "bank": torch.zeros(3, 4), "k": 2, **changes}
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(**arguments)


@pytest.mark.parametrize("failure", [ImportError("none"), RuntimeError("libcudart is missing")])
def test_faiss_asked_for_never_falls_back(monkeypatch, failure):
    real_import = __import__

    def refusing(name, *args, **kwargs):
        if name == "faiss":
            raise failure
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", refusing)
    reason = "m3er-fast\\[cpu\\]" if isinstance(failure, ImportError) else "libcudart is missing"
    with pytest.raises(BackendUnavailableError, match=f"engine 'faiss'.*{reason}"):
        nearest_neighbors(torch.zeros(1, 2), torch.zeros(3, 2), 1, engine="faiss")


# --- local least squares ----------------------------------------------------------------------------------------------


def solve_problem(queries=9, rows=30, d=6, e=4, k=5, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    query, bank, targets = (torch.from_numpy(rng.normal(size=size)) for size in ((queries, d), (rows, d), (rows, e)))
    neighbors = torch.from_numpy(np.stack([rng.choice(rows, k, replace=False) for _ in range(queries)]))
    return query.to(dtype), bank.to(dtype), targets.to(dtype), neighbors


def explicit_coefficients(f, rows, ridge, affine):
    """One query in float64: the normal equations as they are written, or the KKT system of the constrained problem."""
    k = len(rows)
    gram = rows @ rows.T
    system = gram + ridge * np.trace(gram) / k * np.eye(k)
    if not affine:
        return np.linalg.solve(system, rows @ f)
    kkt = np.block([[2 * system, np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
    return np.linalg.solve(kkt, np.append(2 * rows @ f, 1.0))[:k]


def assert_solves(query, bank, targets, neighbors, *, ridge, affine, rtol):
    proxies, coefficients = local_least_squares(query, bank, targets, neighbors, ridge=ridge, affine=affine)
    rows = bank.double().numpy()[neighbors.numpy()]
    wanted = np.stack(
        [explicit_coefficients(f, r, ridge, affine) for f, r in zip(query.double().numpy(), rows, strict=True)]
    )
    scale = np.abs(wanted).max(axis=1, keepdims=True)
    np.testing.assert_allclose(coefficients.numpy() / scale, wanted / scale, rtol=rtol, atol=rtol)
    rebuilt = np.einsum("qk,qke->qe", wanted, targets.double().numpy()[neighbors.numpy()])
    np.testing.assert_allclose(proxies.numpy() / scale, rebuilt / scale, rtol=10 * rtol, atol=10 * rtol)
    assert proxies.dtype == coefficients.dtype == query.dtype


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize(("d", "k"), [(6, 5), (3, 8), (1, 1), (5, 5)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_coefficients_and_proxies_equal_the_explicit_solution(d, k, ridge, affine, dtype, rtol):
    assert_solves(*solve_problem(d=d, k=k, dtype=dtype), ridge=ridge, affine=affine, rtol=rtol)


def test_without_ridge_it_is_least_squares():
    query, bank, targets, neighbors = solve_problem(d=9, k=5)
    _, coefficients = local_least_squares(query, bank, targets, neighbors, ridge=0.0)
    for f, rows, got in zip(query, bank[neighbors], coefficients, strict=True):
        np.testing.assert_allclose(got.numpy(), np.linalg.lstsq(rows.T.numpy(), f.numpy())[0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", ["more than features", "duplicated", "collinear", "zero"])
def test_without_ridge_rank_deficient_neighbors_get_the_solution_of_least_norm(rows, dtype):
    query, bank, targets, neighbors = solve_problem(d=4 if rows == "more than features" else 12, k=7, dtype=dtype)
    if rows == "duplicated":
        neighbors[:, 4:] = neighbors[:, :3]
    elif rows == "collinear":
        bank[:] = bank[:3].repeat(10, 1) * torch.arange(1, 31, dtype=dtype)[:, None]
    elif rows == "zero":
        bank[:] = 0
    _, coefficients = local_least_squares(query, bank, targets, neighbors, ridge=0.0)
    precision = torch.finfo(dtype).eps
    for f, chosen, got in zip(query, bank[neighbors], coefficients, strict=True):
        wanted = np.linalg.pinv(chosen.double().numpy().T, rcond=20 * precision) @ f.double().numpy()
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-8 if dtype == torch.float64 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("ridge", [0.0, 1e-12, 1e-9, 1e-8, 1e-3])
@pytest.mark.parametrize("affine", [False, True])
def test_identical_neighbors_share_alike(ridge, affine):
    query, bank, targets, neighbors = solve_problem(k=7)
    bank[:] = 3.3 + bank[:1]
    _, coefficients = local_least_squares(query, bank, targets, neighbors, ridge=ridge, affine=affine)
    v = bank[0]
    share = 1 / 7 * torch.ones(9).double() if affine else query @ v / (v @ v) / (7 + ridge)
    torch.testing.assert_close(coefficients, share[:, None].expand(-1, 7), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 1e-10, 1e-3])
def test_affine_coefficients_are_the_least_squares_ones_among_those_that_sum_to_one(ridge):
    query, bank, targets, neighbors = solve_problem(d=9, k=5)
    _, coefficients = local_least_squares(query, bank, targets, neighbors, ridge=ridge, affine=True)
    torch.testing.assert_close(coefficients.sum(dim=1), torch.ones(9).double(), rtol=1e-12, atol=0)
    if ridge < 1e-3:
        wanted = np.stack(
            [
                explicit_coefficients(f, r, ridge, True)
                for f, r in zip(query.numpy(), bank[neighbors].numpy(), strict=True)
            ]
        )
        np.testing.assert_allclose(coefficients.numpy(), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize("distance", [1e3, 1e9, 1e15])
@pytest.mark.parametrize("affine", [False, True])
def test_a_query_far_from_its_neighbors_is_solved_too(distance, affine, ridge):
    query, bank, targets, neighbors = solve_problem(d=9, k=5)
    _, near = local_least_squares(query, bank, targets, neighbors, ridge=ridge, affine=affine)
    _, at_zero = local_least_squares(0 * query, bank, targets, neighbors, ridge=ridge, affine=affine)
    _, far = local_least_squares(query * distance, bank, targets, neighbors, ridge=ridge, affine=affine)
    slope = near - at_zero  # the solution is an affine function of the query
    torch.testing.assert_close((far - at_zero) / distance, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_neighbors_of_zeros_give_the_mean_or_nothing(ridge, affine):
    query, bank, targets, neighbors = solve_problem(k=4)
    proxies, coefficients = local_least_squares(query, 0 * bank, targets, neighbors, ridge=ridge, affine=affine)
    share = 0.25 if affine else 0.0
    assert torch.equal(coefficients, torch.full((9, 4), share, dtype=torch.float64))
    torch.testing.assert_close(proxies, share * targets[neighbors].sum(dim=1))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_coefficients_do_not_depend_on_scale_even_where_squares_leave_float32(ridge, affine, scale):
    query, bank, targets, neighbors = solve_problem(d=9, dtype=torch.float32)
    wanted = local_least_squares(query, bank, targets, neighbors, ridge=ridge, affine=affine)
    got = local_least_squares(query * scale, bank * scale, targets, neighbors, ridge=ridge, affine=affine)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_affine_coefficients_are_scikit_learns_barycenter_weights():
    """Theirs shrinks by reg·tr(D Dᵀ) of the neighbours seen from the query, ours by ridge·tr(G)/K as they are."""
    query, bank, targets, neighbors = solve_problem(queries=1, d=6, k=5)
    rows = bank[neighbors[0]]
    reg = 1e-2
    ridge = reg * (rows - query).square().sum() / (rows.square().sum() / 5)
    _, coefficients = local_least_squares(query, bank, targets, neighbors, ridge=ridge.item(), affine=True)
    wanted = barycenter_weights(query.numpy(), bank.numpy(), neighbors.numpy(), reg=reg)
    np.testing.assert_allclose(coefficients.numpy(), wanted, rtol=1e-8)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_query_that_is_not_finite_gets_coefficients_of_zero(ridge, affine):
    query, bank, targets, neighbors = solve_problem()
    wanted = local_least_squares(query, bank, targets, neighbors, ridge=ridge, affine=affine)
    query[2, 1], query[5, 0] = math.nan, -math.inf
    got = local_least_squares(query, bank, targets, neighbors, ridge=ridge, affine=affine)
    for ours, theirs in zip(got, wanted, strict=True):
        theirs[[2, 5]] = 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_no_query_gives_no_proxy(ridge, affine):
    query, bank, targets, neighbors = solve_problem()
    proxies, coefficients = local_least_squares(query[:0], bank, targets, neighbors[:0], ridge=ridge, affine=affine)
    assert proxies.shape == (0, 4)
    assert coefficients.shape == (0, 5)


def test_a_linear_relation_is_carried_over():
    """Targets that are a linear map of the bank: the proxies are the same map of the queries."""
    query, bank, _, neighbors = solve_problem(d=3, k=8)
    relation = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    proxies, _ = local_least_squares(query, bank, bank @ relation, neighbors, ridge=0.0)
    torch.testing.assert_close(proxies, query @ relation, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(dtype):
    *matrices, neighbors = solve_problem(dtype=dtype)
    got = local_least_squares(*matrices, neighbors)
    wanted = local_least_squares(*[x.float() for x in matrices], neighbors)
    assert got[0].dtype == torch.float32
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2)}, r"query must be a floating matrix .*\(2,\)"),
        ({"targets": torch.zeros(5, 2, dtype=torch.int32)}, r"targets must be a floating matrix .*int32"),
        ({"bank": torch.zeros(5, 4)}, r"query has 3 features, but bank has 4"),
        ({"targets": torch.zeros(4, 2)}, r"targets has 4 rows, but bank has 5"),
        ({"neighbors": torch.zeros(3, 2, dtype=torch.int64)}, r"neighbors has shape \(3, 2\), wanted \(2, K\)"),
        ({"neighbors": torch.zeros(2, 0, dtype=torch.int64)}, r"neighbors has shape \(2, 0\), wanted \(2, K\)"),
        ({"neighbors": torch.zeros(2, 2)}, r"neighbors must be int64, got torch.float32"),
        ({"neighbors": torch.tensor([[0, 5], [0, 1]])}, r"neighbors must lie in 0\.\.4, got values from 0 to 5"),
        ({"neighbors": torch.tensor([[0, -1], [0, 1]])}, r"neighbors must lie in 0\.\.4, got values from -1 to 1"),
        ({"ridge": -1e-3}, r"ridge must be a finite number ≥ 0, got -0\.001"),
        ({"ridge": math.inf}, r"ridge must be a finite number ≥ 0, got inf"),
        ({"backend": "numpy"}, r"backend must be one of 'auto', 'torch', 'triton', 'cupy', got 'numpy'"),
    ],
)
def test_local_least_squares_names_bad_arguments(changes, message):
    arguments = {
        "query": torch.zeros(2, 3),
        "bank": torch.zeros(5, 3),
        "targets": torch.zeros(5, 2),
        "neighbors": torch.zeros(2, 2, dtype=torch.int64),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        local_least_squares(**arguments)


@pytest.mark.parametrize("backend", ["triton", "cupy"])
def test_a_solver_asked_for_by_name_never_falls_back(backend):
    with pytest.raises(BackendUnavailableError, match=rf"local_least_squares.*{backend}"):
        local_least_squares(*solve_problem(), backend=backend)


def test_check_statistics_asked_of_a_kernel_never_fall_back():
    with pytest.raises(BackendUnavailableError, match=r"check_statistics.*triton"):
        check_statistics(vectors(2), fold(*fitted_views()), backend="triton")
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'torch', 'triton', got 'cupy'"):
        check_statistics(vectors(2), fold(*fitted_views()), backend="cupy")
