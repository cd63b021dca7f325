"""Fitting a CCA, beside the textbook, in the precision of the rows and in float64, scikit-learn and cca-zoo.

On a GPU the rows lie in its memory. Ours computes their covariance there and decomposes it on the CPU; the textbook
stays on the GPU.
"""

import functools

import numpy as np
import pytest
import torch
from sklearn import cross_decomposition

from benchmarks.speed import harness, textbook
from benchmarks.speed.work import Work
from benchmarks.speed.workloads import CCA_FITS
from m3er_fast import CCA

IN_FLOAT64 = "textbook, float64"  # whatever the precision of the rows
CONTESTANTS = (harness.OURS, harness.TEXTBOOK, IN_FLOAT64, "cca-zoo CCA", "scikit-learn CCA")
# scikit-learn iterates for each component, up to its default cap of 500 iterations: minutes at the first size.
SLOW = "scikit-learn CCA"
ON_CPU = ("cca-zoo CCA", SLOW)
COMPARED = "20,000 rows of 300 and 74"


def pytest_generate_tests(metafunc):
    cases = [
        (name, contestant)
        for name, pair in CCA_FITS[harness.device_type(metafunc.config)].items()
        for contestant in CONTESTANTS
        if not (contestant == SLOW and name != COMPARED)
        and not (contestant == IN_FLOAT64 and pair.dtype == torch.float64)
    ]
    metafunc.parametrize(("workload", "contestant"), cases, ids=["-".join(case) for case in cases])


@functools.lru_cache(maxsize=1)
def views(pair, device):
    """Return two noisy views of latent numbers of different strengths, one per component."""
    latent = harness.draw(pair.rows, pair.components, seed=0) * torch.linspace(0.2, 2.0, pair.components)
    return [
        (latent @ harness.draw(pair.components, d, seed=seed))
        .add_(harness.draw(pair.rows, d, seed=seed + 2), alpha=3)
        .to(device, pair.dtype)
        for seed, d in enumerate((pair.x_features, pair.y_features), start=1)
    ]


@functools.lru_cache(maxsize=1)
def oracle(pair, device):
    """Return canonical correlations from two QR decompositions in float64, without a covariance."""
    bases = [torch.linalg.qr(x - x.mean(dim=0))[0] for x in (view.double() for view in views(pair, device))]
    return torch.linalg.svdvals(bases[0].T @ bases[1])[: pair.components]


def correlations_of_variates(u, v):
    """Return the correlation of each pair of columns, the largest first."""
    u, v = (np.asarray(part, dtype=np.float64) for part in (u, v))
    u, v = u - u.mean(axis=0), v - v.mean(axis=0)
    return np.sort((u * v).sum(axis=0) / np.sqrt((u**2).sum(axis=0) * (v**2).sum(axis=0)))[::-1].copy()


def fit_of(contestant, k):
    """Return two functions of a contestant: fit two views; and the canonical correlations of that fit."""
    if contestant == "ours":
        return lambda x, y: CCA(n_components=k, ridge=0.0).fit(x, y), lambda cca, *_: cca.correlations_
    if contestant == harness.TEXTBOOK:
        return lambda x, y: textbook.cca(x, y, k), lambda fitted, *_: fitted[2]
    if contestant == IN_FLOAT64:
        return lambda x, y: textbook.cca(x.double(), y.double(), k), lambda fitted, *_: fitted[2]
    if contestant == "cca-zoo CCA":
        peer = harness.import_peer("cca_zoo.linear")
        return (
            lambda x, y: peer.CCA(n_components=k).fit([x.numpy(), y.numpy()]),
            lambda cca, x, y: correlations_of_variates(*cca.transform([x.numpy(), y.numpy()])),
        )
    return (
        lambda x, y: cross_decomposition.CCA(n_components=k).fit(x.numpy(), y.numpy()),
        lambda cca, x, y: correlations_of_variates(*cca.transform(x.numpy(), y.numpy())),
    )


@pytest.mark.benchmark(timer=harness.now)
def test_fit(benchmark, contest, device, workload, contestant):
    if contestant in ON_CPU and device.type != "cpu":
        pytest.skip(f"{contestant} runs on the CPU")
    pair = CCA_FITS[device.type][workload]
    benchmark.group = f"CCA fit, {workload}, k={pair.components}"
    fit, correlations = fit_of(contestant, pair.components)
    features = pair.x_features + pair.y_features
    size = pair.rows * features * pair.dtype.itemsize
    # Several copies of the same numbers, so that no cache holds them.
    inputs = harness.Rotation(lambda _: [x.clone() for x in views(pair, device)], size, device)
    # The covariance is symmetric, so half of its products count. On a GPU three products in tf32 could replace each.
    unit = "fp64" if device.type == "cpu" else "tf32x3"
    work = Work(size, pair.rows * features * (features + 1), unit)
    contest(
        contestant,
        lambda: fit(*inputs()),
        [work],
        error=lambda fitted: harness.relative_error(correlations(fitted, *views(pair, device)), oracle(pair, device)),
        once=contestant == SLOW,
        samples=pair.rows,
    )
