"""The statistics of the modality check, beside the definition step by step, the same folded, compiled and graphed."""

import itertools

import harness
import pytest
import torch

from m3er_fast import CCA, ModalityCheck, functional, reference

DIMS = {"text": 300, "audio": 74, "face": 35}
COMPONENTS = 30
CONTESTANTS = ("ours", "eager", "eager, folded", "compiled")
GPU_CONTESTANTS = ("ours, graphed", "eager, graphed", "eager, folded, graphed")


def pytest_generate_tests(metafunc):
    on_gpu = torch.device(metafunc.config.getoption("--device")).type == "cuda"
    metafunc.parametrize("contestant", CONTESTANTS + (GPU_CONTESTANTS if on_gpu else ()))
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if on_gpu else {})
    metafunc.parametrize("dtype", dtypes.values(), ids=dtypes)
    metafunc.parametrize("batch", [32, 8192, *([65536] if on_gpu else [])])


class Definition:
    """ρ and energy as the method reads: centre, project, weigh, correlate over components; whiten, square."""

    def __init__(self, features, device):
        self.mean = [x.mean(dim=0).to(device) for x in features]
        self.pairs = []
        for i, j in itertools.combinations(range(len(features)), 2):
            cca = CCA(n_components=COMPONENTS).fit(features[i], features[j])
            parts = (cca.x_rotations_, cca.y_rotations_, cca.correlations_)
            self.pairs.append((i, j, *(torch.as_tensor(part).float().to(device) for part in parts)))
        # Shrunk as the check and CCA shrink, by a thousandth of the mean variance.
        self.whitener = []
        for x in features:
            covariance = x.T.double().cov()
            covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
            factor = torch.linalg.cholesky(covariance)
            self.whitener.append(torch.linalg.inv(factor).T.float().to(device))

    def __call__(self, features):
        centered = [x.float() - mean for x, mean in zip(features, self.mean, strict=True)]
        correlation = []
        for i, j, left, right, canonical in self.pairs:
            u, v = centered[i] @ left * canonical.sqrt(), centered[j] @ right * canonical.sqrt()
            u, v = u - u.mean(dim=1, keepdim=True), v - v.mean(dim=1, keepdim=True)
            correlation.append((u * v).sum(dim=1) / (u.norm(dim=1) * v.norm(dim=1)))
        energy = [(x @ whitener).square().mean(dim=1) for x, whitener in zip(centered, self.whitener, strict=True)]
        return torch.stack(correlation, dim=1), torch.stack(energy, dim=1)


@pytest.fixture(scope="module")
def fitted(device):
    """The folded matrices, and the definition, of the same training data."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4096, COMPONENTS, generator=generator)
    features = {
        name: shared @ torch.randn(COMPONENTS, d, generator=generator) + torch.randn(4096, d, generator=generator)
        for name, d in DIMS.items()
    }
    check = ModalityCheck(DIMS, n_components=COMPONENTS).fit(features).to(device)
    definition = Definition(list(features.values()), device)
    sample = [x[:100].to(device) for x in features.values()]
    folded = functional.gate_statistics(sample, check.projections_)
    for ours, defined in zip(folded, definition(sample), strict=True):
        torch.testing.assert_close(ours, defined, rtol=1e-3, atol=1e-3)
    return check.projections_, definition


@pytest.mark.benchmark(timer=harness.now)
def test_gate(benchmark, contest, device, fitted, batch, dtype, contestant):
    projections, definition = fitted
    benchmark.group = f"gate, {batch} samples, d=300/74/35, k=30, {str(dtype).removeprefix('torch.')}"
    kind = contestant.removesuffix(", graphed")
    statistics = functional.gate_statistics if kind == "ours" else reference.gate_statistics
    if kind == "compiled":
        statistics = harness.compiled(statistics)

    def make(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(batch, d, device=device, generator=generator).to(dtype) for d in DIMS.values()]

    inputs = harness.Rotation(make, batch * sum(DIMS.values()) * dtype.itemsize, device)

    def step():
        return definition(inputs()) if kind == "eager" else statistics(inputs(), projections)

    assert all(value.isfinite().all() for value in step())
    kernels = pytest.importorskip("m3er_fast.kernels.correlation_gate")
    ranks = [whitener.shape[0] for whitener in projections.whitener]
    work = kernels.work(batch, list(DIMS.values()), [COMPONENTS] * 3, ranks, dtype)
    contest(contestant, step, work)
