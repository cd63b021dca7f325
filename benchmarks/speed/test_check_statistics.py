"""The statistics of the modality check, beside their definition and the reference, eager, compiled and graphed.

"eager" computes the definition; "eager, folded" is the reference, into whose matrices all constants are folded.
"""

import functools
import itertools

import pytest
import torch

from benchmarks.speed import harness, work
from benchmarks.speed.workloads import CHECK
from m3er_fast import CCA, ModalityCheck, functional, reference

GPU_CONTESTANTS = ("ours, graphed", "eager, graphed", "eager, folded, graphed")
CONTESTANTS = ("ours", "eager", "eager, folded", "compiled", *GPU_CONTESTANTS)


def pytest_generate_tests(metafunc):
    workloads = CHECK[harness.device_type(metafunc.config)]
    cases = [(name, contestant) for name in workloads for contestant in CONTESTANTS]
    metafunc.parametrize(("workload", "contestant"), cases, ids=["-".join(case) for case in cases])


class Definition:
    """The statistics of docs/method.md: centre, project; weight and correlate, or likelihood ratio; whiten, square."""

    def __init__(self, features, components, dtype):
        self.dtype = dtype
        self.mean = [x.double().mean(dim=0).to(dtype) for x in features]
        self.pairs = []
        for i, j in itertools.combinations(range(len(features)), 2):
            cca = CCA(n_components=components).fit(features[i], features[j])
            parts = (cca.x_rotations_, cca.y_rotations_, cca.correlations_)
            self.pairs.append((i, j, *(torch.as_tensor(part).to(features[0].device, dtype) for part in parts)))
        # Shrunk by a thousandth of the mean variance, as in the check and CCA.
        self.whitener = []
        for x in features:
            covariance = x.T.double().cov()
            covariance.diagonal().add_(1e-3 * covariance.diagonal().mean())
            factor = torch.linalg.cholesky(covariance)
            self.whitener.append(torch.linalg.inv(factor).T.to(dtype))

    def __call__(self, features):
        centered = [x.to(self.dtype) - mean for x, mean in zip(features, self.mean, strict=True)]
        correlation, likelihood = [], []
        for i, j, left, right, canonical in self.pairs:
            u, v = centered[i] @ left, centered[j] @ right
            likelihood.append(self._log_likelihood_ratio(u, v, canonical.clamp(max=0.999)))
            u, v = u * canonical.sqrt(), v * canonical.sqrt()
            u, v = u - u.mean(dim=1, keepdim=True), v - v.mean(dim=1, keepdim=True)
            correlation.append((u * v).sum(dim=1) / (u.norm(dim=1) * v.norm(dim=1)))
        energy = [(x @ whitener).square().mean(dim=1) for x, whitener in zip(centered, self.whitener, strict=True)]
        return torch.stack(correlation, dim=1), torch.stack(energy, dim=1), torch.stack(likelihood, dim=1)

    @staticmethod
    def _log_likelihood_ratio(u, v, canonical):
        u, v = (x / x.square().mean(dim=1, keepdim=True).sqrt() for x in (u, v))
        rest = 1.0 - canonical.square()
        explained = canonical.square() * (u.square() + v.square()) - 2.0 * canonical * u * v
        return -0.5 * (rest.log() + explained / rest).sum(dim=1)


@functools.cache
def fitted(dims, components, device):
    """Return the folded matrices, and the definition in float32 and float64, of the same training data."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4096, components, generator=generator)
    features = {
        name: (shared @ torch.randn(components, d, generator=generator) + torch.randn(4096, d, generator=generator)).to(
            device
        )
        for name, d in dims
    }
    check = ModalityCheck(dict(dims), n_components=components).fit(features).to(device)
    views = list(features.values())
    return check.projections_, *(Definition(views, components, dtype) for dtype in (torch.float32, torch.float64))


@pytest.mark.benchmark(timer=harness.now)
def test_check_statistics(benchmark, contest, device, workload, contestant):
    if contestant in GPU_CONTESTANTS:
        harness.needs_gpu(contestant, device)
    sizes = CHECK[device.type][workload]
    projections, definition, oracle = fitted(tuple(sizes.dims.items()), sizes.components, device)
    features = "/".join(map(str, sizes.dims.values()))
    dtype = harness.dtype_name(sizes.dtype)
    benchmark.group = f"check, {sizes.batch} samples, d={features}, k={sizes.components}, {dtype}"
    kind = contestant.removesuffix(", graphed")
    statistics = functional.check_statistics if kind == "ours" else reference.check_statistics
    if kind == "compiled":
        statistics = harness.compiled(statistics)

    def make(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.randn(sizes.batch, d, device=device, generator=generator).to(sizes.dtype) for d in sizes.dims.values()
        ]

    inputs = harness.Rotation(make, sizes.batch * sum(sizes.dims.values()) * sizes.dtype.itemsize, device)

    def step():
        return definition(inputs()) if kind == "eager" else statistics(inputs(), projections)

    ranks = [whitener.shape[0] for whitener in projections.whitener]
    pairs = len(projections.left)
    least = work.check_statistics(
        sizes.batch, list(sizes.dims.values()), [sizes.components] * pairs, ranks, sizes.dtype
    )
    contest(contestant, step, [least], error=lambda result: harness.relative_error(result, oracle(make(0))))
