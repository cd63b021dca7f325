"""Throughput of the plain PyTorch path on this machine, beside the libraries it is compared with.

Run with ``pytest benchmarks --benchmark-only``; sizes are those of the goals for two CPU cores. Nothing is asserted
about time: the report is read, and ratios within one run are what counts.
"""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from m3er_fast import CCA, functional


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.benchmark(group="CCA fit, n=20000, 300 x 74, k=30")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cca(benchmark, dtype):
    x, y = draw(20000, 300).numpy().astype(dtype), draw(20000, 74).numpy().astype(dtype)
    assert benchmark(CCA(n_components=30).fit, x, y).n_components_ == 30


@pytest.mark.benchmark(group="16 nearest of 100000 x 300, 1000 queries")
@pytest.mark.parametrize("engine", ["torch", "faiss", "scikit-learn"])
def test_nearest_neighbors(benchmark, engine):
    bank, query = draw(100_000, 300), draw(1000, 300) + 0.1
    if engine == "scikit-learn":
        index = NearestNeighbors(n_neighbors=16, algorithm="brute").fit(bank.numpy())
        found = benchmark(index.kneighbors, query.numpy())[1]
    else:
        if engine == "faiss":
            pytest.importorskip("faiss")
        found = benchmark(functional.nearest_neighbors, query, bank, 16, engine=engine)[1]
    assert found.shape == (1000, 16)


@pytest.mark.benchmark(group="local least squares, 1000 queries, K=16, d=300")
@pytest.mark.parametrize("affine", [False, True])
def test_local_least_squares(benchmark, affine):
    bank, query = draw(10_000, 300), draw(1000, 300) + 0.1
    _, neighbors = functional.nearest_neighbors(query, bank, 16)
    proxies, _ = benchmark(functional.local_least_squares, query, bank, bank, neighbors, affine=affine)
    assert proxies.isfinite().all()
