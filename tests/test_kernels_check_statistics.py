"""The fast paths of the modality check's statistics, on the GPU and on the CPU, against NumPy in float64."""

import itertools

import numpy as np
import pytest
import torch

from m3er_fast import ModalityCheck
from m3er_fast.functional import BackendUnavailableError, CheckProjections, check_statistics

pytest.importorskip("triton")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

PAPER = (300, 74, 35)
# Relative error of an energy, and absolute error of a ρ of projections that hardly cancel.
CLOSE = 1e-5
# Error of a component in float32, relative to the root sum of squares of the products that it adds up.
ROUNDING = 2.0**-20


@pytest.fixture(params=["triton", "auto"])
def backend(request):
    """The kernel, and on the CPU also the path that "auto" takes there."""
    return request.param


def problem(seed, batch, dims, components, *, triangular=True, ranks=None, dtype=torch.float32):
    """Features, and projections whose matrices are as float32 holds them."""
    rng = np.random.default_rng(seed)
    ranks = dims if ranks is None else ranks
    pairs = list(itertools.combinations(range(len(dims)), 2))

    def matrix(rows, columns):
        return torch.from_numpy(rng.normal(size=(rows, columns)) / max(columns, 1) ** 0.5).float()

    projections = CheckProjections(
        center=[matrix(1, d)[0] for d in dims],
        left=[matrix(k, dims[i]) for (i, _), k in zip(pairs, components, strict=True)],
        left_bias=[matrix(1, k)[0] for k in components],
        right=[matrix(k, dims[j]) for (_, j), k in zip(pairs, components, strict=True)],
        right_bias=[matrix(1, k)[0] for k in components],
        whitener=[matrix(r, d).triu() if triangular else matrix(r, d) for r, d in zip(ranks, dims, strict=True)],
        weight=[torch.from_numpy(rng.uniform(0.2, 1.0, size=k)).float() for k in components],
        canonical=[torch.from_numpy(rng.uniform(0.0, 0.98, size=k)).float() for k in components],
        triangular=triangular,
    )
    return [torch.from_numpy(rng.normal(size=(batch, d))).to(dtype) for d in dims], projections


def oracle(features, projections):
    """ρ, energy and likelihood in NumPy, float64."""
    x = [f.double().cpu().numpy() - c.double().numpy() for f, c in zip(features, projections.center, strict=True)]
    correlation, likelihood = [], []
    for p, (i, j) in enumerate(itertools.combinations(range(len(x)), 2)):
        u = x[i] @ projections.left[p].double().numpy().T + projections.left_bias[p].double().numpy()
        v = x[j] @ projections.right[p].double().numpy().T + projections.right_bias[p].double().numpy()
        s, weight = projections.canonical[p].double().numpy(), projections.weight[p].double().numpy()
        likelihood.append(log_likelihood_ratio(u, v, s))
        u, v = (centered(side * weight) for side in (u, v))
        length = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
        defined = length > 0 if len(s) > 1 else np.zeros(len(u), dtype=bool)
        correlation.append(np.divide((u * v).sum(axis=1), length, out=np.zeros(len(u)), where=defined))
    energy = [
        ((f @ w.double().numpy().T) ** 2).sum(axis=1) / max(len(w), 1)
        for f, w in zip(x, projections.whitener, strict=True)
    ]
    of_pairs = (np.array(values).reshape(-1, len(x[0])).T for values in (correlation, likelihood))
    return next(of_pairs), np.array(energy).T, next(of_pairs)


def correlation_tolerance(features, projections):
    """Errors of ρ (B, P) that float32 may make: of each side's components, relative to their length once centred.

    Where a side's products cancel, or its components hardly differ, its direction is rounding: ρ can be any number.
    """
    x = [f.double().cpu().numpy() - c.double().numpy() for f, c in zip(features, projections.center, strict=True)]
    tolerance = np.zeros((len(x[0]), len(projections.left)))
    for p, pair in enumerate(itertools.combinations(range(len(x)), 2)):
        weight = projections.weight[p].double().numpy()
        for m, matrices, biases in zip(
            pair, (projections.left, projections.right), (projections.left_bias, projections.right_bias), strict=True
        ):
            matrix, bias = matrices[p].double().numpy(), biases[p].double().numpy()
            size = np.linalg.norm(np.sqrt(x[m] ** 2 @ (matrix**2).T + bias**2) * weight, axis=1)
            length = np.linalg.norm(centered((x[m] @ matrix.T + bias) * weight), axis=1)
            # Without two components ρ is zero by definition.
            tolerance[:, p] += ROUNDING * (size / length if len(weight) > 1 else 1.0)
    return tolerance


def centered(x):
    return x - x.mean(axis=1, keepdims=True) if x.shape[1] else x


def log_likelihood_ratio(u, v, s):
    """By determinants and quadratic forms of each component's covariance [[1, s], [s, 1]]."""
    u, v = (x / np.sqrt((x**2).mean(axis=1, keepdims=True)) if x.shape[1] else x for x in (u, v))
    covariance = np.moveaxis(np.array([[np.ones_like(s), s], [s, np.ones_like(s)]]), 2, 0)
    pair = np.stack([u, v], axis=2)
    quadratic = np.einsum("bki,kij,bkj->bk", pair, np.linalg.inv(covariance) - np.eye(2), pair)
    return -0.5 * (np.linalg.slogdet(covariance)[1] + quadratic).sum(axis=1)


def on(device, value):
    return [x.to(device) for x in value] if isinstance(value, list) else value


def moved(device, projections):
    return CheckProjections(*(on(device, value) for value in projections))


def assert_equals_oracle(device, features, projections, backend="triton"):
    correlation, energy, likelihood = check_statistics(
        on(device, features), moved(device, projections), backend=backend
    )
    assert correlation.dtype == energy.dtype == likelihood.dtype == torch.float32
    wanted_correlation, wanted_energy, wanted_likelihood = oracle(features, projections)
    tolerance = correlation_tolerance(features, projections)
    np.testing.assert_allclose(correlation.cpu().numpy() / tolerance, wanted_correlation / tolerance, rtol=0, atol=1)
    np.testing.assert_allclose(energy.cpu().numpy(), wanted_energy, rtol=CLOSE, atol=1e-30)
    # Divided by 1 - s², down to 0.04.
    np.testing.assert_allclose(likelihood.cpu().numpy(), wanted_likelihood, rtol=20 * CLOSE, atol=20 * CLOSE)


@pytest.mark.parametrize(
    ("dims", "components"),
    [
        (PAPER, (30, 30, 30)),
        ((1, 1), (1,)),
        ((7,), ()),
        ((33, 130), (128,)),
        ((2048, 5), (5,)),
        ((5, 6, 7, 8), (1, 2, 3, 4, 5, 6)),
        ((3, 4, 5, 6, 7), (2, 1, 3, 2, 1, 3, 2, 1, 3, 2)),
        ((3, 4, 5, 6, 7, 8, 9, 10), (2,) * 28),
    ],
)
@pytest.mark.parametrize(("triangular", "small"), [(True, True), (True, False), (False, False)])
def test_every_number_and_size_of_modalities(device, monkeypatch, dims, components, triangular, small):
    from m3er_fast.kernels import check_statistics as kernels

    if not small:
        monkeypatch.setattr(kernels, "_MOST_IN_SMALL_TILES", 0)
    # Two blocks of samples, the second one not full.
    features, projections = problem(0, 19 if small else 70, dims, components, triangular=triangular)
    assert_equals_oracle(device, features, projections)


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 1025, 4096, 9001])
def test_every_batch(device, backend, batch):
    if backend == "triton" and device.type == "cpu":
        batch = min(batch, 1025)  # only the CPU's own path has blocks of thousands
    features, projections = problem(1, batch, (40, 20, 9), (6, 5, 4))
    assert_equals_oracle(device, features, projections, backend)


@pytest.mark.parametrize("triangular", [True, False])
def test_wide_whiteners_and_lower_ranks(device, backend, triangular):
    features, projections = problem(
        2, 4097 if backend == "auto" else 65, (260, 90), (17,), triangular=triangular, ranks=(201, 70)
    )
    assert_equals_oracle(device, features, projections, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_computed_in_float32(device, backend, dtype):
    features, projections = problem(3, 5000 if backend == "auto" else 70, (40, 21, 9), (6, 5, 4), dtype=dtype)
    assert_equals_oracle(device, features, projections, backend)


def test_strided_features_need_no_copy(device, backend):
    features, projections = problem(4, 5000 if backend == "auto" else 70, (40, 21), (6,))
    wide = [torch.cat([x, torch.full_like(x, torch.nan)], dim=1).to(device)[:, : x.shape[1]] for x in features]
    steps = [x.repeat_interleave(2, dim=1).to(device)[:, ::2] for x in features]
    columns = [x.T.contiguous().to(device).T for x in features]
    for strided in (wide, steps, columns):
        assert_equals_oracle(device, strided, projections, backend)


def test_statistics_that_are_undefined_or_overflow_are_finite(device, backend):
    batch = 4100 if backend == "auto" else 70
    features, projections = problem(5, batch, (12, 9, 6), (4, 0, 3), ranks=(12, 0, 6))
    projections.left_bias[0].zero_()
    features[0][1] = projections.center[0]
    features[1][2] = torch.nan
    features[2][3] = torch.inf
    features[0][4] = 3e38
    correlation, energy, likelihood = check_statistics(
        on(device, features), moved(device, projections), backend=backend
    )
    assert correlation.isfinite().all()
    assert (correlation.abs() <= 1).all()
    assert energy.isfinite().all()
    assert likelihood.isfinite().all()
    assert not likelihood[:, 1].any()
    assert likelihood[2, 0] < -1e38
    assert (likelihood[2:4, 2] < -1e38).all()
    assert correlation[1, 0] == 0  # a sample at the mean does not vary
    assert not correlation[:, 1].any()  # nor does a pair without components
    assert not correlation[2, 0]
    assert not correlation[2:4, 2].any()
    assert not energy[:, 1].any()
    assert energy[3, 2] > 1e38
    assert energy[4, 0] > 1e38
    fine = [0, 5, 6, batch - 1]
    wanted = oracle([x[fine] for x in features], projections)
    np.testing.assert_allclose(correlation[fine].cpu().numpy(), wanted[0], rtol=0, atol=CLOSE)
    np.testing.assert_allclose(energy[fine].cpu().numpy(), wanted[1], rtol=CLOSE)
    np.testing.assert_allclose(likelihood[fine].cpu().numpy(), wanted[2], rtol=20 * CLOSE, atol=20 * CLOSE)


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e18])
def test_a_cosine_does_not_see_scale(device, backend, scale):
    features, projections = problem(6, 4100 if backend == "auto" else 70, (12, 9), (4,))
    projections = projections._replace(center=[c * scale for c in projections.center], left_bias=[torch.zeros(4)])
    projections = projections._replace(right_bias=[torch.zeros(4)])
    assert_equals_oracle(device, [x * scale for x in features], projections, backend)


def test_an_empty_batch(device, backend):
    features, projections = problem(7, 0, (12, 9), (4,))
    correlation, energy, likelihood = check_statistics(
        on(device, features), moved(device, projections), backend=backend
    )
    assert (correlation.shape, energy.shape, likelihood.shape) == ((0, 1), (0, 2), (0, 1))


def test_a_fitted_check_near_collinear_features(device, backend):
    """A whitener enlarges rounding errors most there: the kernel's products must keep float32's digits."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(600, 12, generator=generator)
    features = {
        name: shared @ torch.randn(12, d, generator=generator) + 0.05 * torch.randn(600, d, generator=generator)
        for name, d in (("a", 48), ("b", 40))
    }
    check = ModalityCheck({"a": 48, "b": 40}, n_components=8).fit(features)
    sample = [x[:200] for x in features.values()]
    assert_equals_oracle(device, sample, check.projections_, backend)


@pytest.mark.usefixtures("poisoned_outputs")
def test_every_element_of_the_outputs_is_written(device):
    for dims in ((9, 7, 5), (4, 3, 5, 6, 2)):
        pairs = len(dims) * (len(dims) - 1) // 2
        features, projections = problem(8, 67, dims, (3,) * pairs)
        assert_equals_oracle(device, features, projections)


def test_opcheck(device):
    from m3er_fast.kernels import check_statistics as kernels

    for modalities in (1, 3):
        pairs = modalities * (modalities - 1) // 2
        features, projections = problem(9, 5, (7, 6, 5)[:modalities], (3,) * pairs)
        arguments = (on(device, features), *moved(device, projections))
        torch.library.opcheck(kernels.check_statistics_op, arguments)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compiles_in_one_graph_and_exports(device, backend):
    features, projections = problem(10, 6, (7, 6, 5), (3, 3, 3))
    projections = moved(device, projections)

    class Check(torch.nn.Module):
        def forward(self, a, b, c):
            correlation, energy, likelihood = check_statistics([a.sin(), b, c], projections, backend=backend)
            return correlation.sum(dim=1) + energy.sum(dim=1) + likelihood.sum(dim=1)

    inputs = on(device, features)
    wanted = Check()(*inputs)
    compiled = torch.compile(Check(), fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(*inputs), wanted, rtol=1e-5, atol=1e-6)
    exported = torch.export.export(Check(), tuple(inputs)).module()
    torch.testing.assert_close(exported(*inputs), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(device, backend, dtype):
    features, projections = problem(11, 5000 if backend == "auto" else 8, (7, 6), (3,))
    features, projections = on(device, features), moved(device, projections)
    plain = check_statistics(features, projections, backend=backend)
    with torch.autocast(device.type, dtype=dtype):
        for got, wanted in zip(check_statistics(features, projections, backend=backend), plain, strict=True):
            assert torch.equal(got, wanted)


def test_a_gradient_is_the_torch_path(device):
    features, projections = problem(12, 4100, (7, 6), (3,))
    features = [x.to(device).requires_grad_() for x in features]
    projections = moved(device, projections)
    with pytest.raises(
        BackendUnavailableError, match=r"check_statistics: backend 'triton' .*it has no gradient: detach"
    ):
        check_statistics(features, projections, backend="triton")
    correlation, energy, likelihood = check_statistics(features, projections)
    found = torch.autograd.grad(correlation.sum() + energy.sum() + likelihood.sum(), features)
    wanted = sum(value.sum() for value in check_statistics(features, projections, backend="torch"))
    for got, right in zip(found, torch.autograd.grad(wanted, features), strict=True):
        torch.testing.assert_close(got, right)
        assert got.any()
    with torch.no_grad():
        assert check_statistics(features, projections, backend="triton")[0].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": []}, r"features: got 0 modalities, wanted 2"),
        ({"features": [torch.zeros(3, 7), torch.zeros(3, 6).double()]}, r"features\[1\] is torch.float64, wanted"),
        ({"features": [torch.zeros(3, 7), torch.zeros(3, 6, device="meta")]}, r"features\[1\] is on meta, wanted cpu"),
        ({"backend": "cuda"}, r"backend must be one of 'auto', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    features, projections = problem(13, 3, (7, 6), (3,))
    with pytest.raises(ValueError, match=message):
        check_statistics(**{"features": features, "projections": projections, **changes})


def test_no_modality_at_all_is_refused():
    nothing = CheckProjections([], [], [], [], [], [], [], [])
    with pytest.raises(ValueError, match="features is empty"):
        check_statistics([], nothing)


def test_more_modalities_than_the_kernel_takes(device):
    features, projections = problem(14, 4, (2,) * 9, (1,) * 36)
    features, projections = on(device, features), moved(device, projections)
    with pytest.raises(BackendUnavailableError, match="up to 8 modalities, got 9"):
        check_statistics(features, projections, backend="triton")
    assert check_statistics(features, projections)[0].shape == (4, 36)
