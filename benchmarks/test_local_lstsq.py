"""Local least squares beside scikit-learn's weights, CuPy, and plain PyTorch, eager and compiled.

Run with ``pytest benchmarks/test_local_lstsq.py --benchmark-only -s``. The contestants take turns; see
``harness.py``. scikit-learn computes weights alone; everyone else's time has the proxies in it as well. Nothing
is asserted about time.
"""

import numpy as np
import pytest
import torch
from harness import compiled, draw, in_turns, report, works
from sklearn.manifold._locally_linear import barycenter_weights

from m3er_fast import functional, reference

CPU_SIZES = [(1000, 16, 300, 74, torch.float32), (1000, 16, 74, 300, torch.float32), (1000, 64, 300, 74, torch.float32)]
GPU_SIZES = [
    (65536, 32, 300, 300, torch.bfloat16),
    (65536, 16, 300, 300, torch.float32),
    (16384, 64, 300, 300, torch.bfloat16),
]


@pytest.mark.parametrize("number", range(3))
def test_local_least_squares(benchmark, device, number):
    queries, k, features, e, dtype = (CPU_SIZES if device.type == "cpu" else GPU_SIZES)[number]
    rows = 10_000 if device.type == "cpu" else 1_000_000
    bank, partners = (
        draw(rows, features, seed=0, device=device, dtype=dtype),
        draw(rows, e, seed=2, device=device, dtype=dtype),
    )
    query = draw(queries, features, seed=1, device=device) + 0.1
    if device.type == "cpu":
        neighbors = functional.nearest_neighbors(query, bank, k)[1]
    else:  # which rows are gathered does not matter, that they lie apart does
        neighbors = torch.randint(0, rows, (queries, k), generator=torch.Generator().manual_seed(3)).to(device)

    def by(backend, **options):
        return lambda: functional.local_least_squares(query, bank, partners, neighbors, backend=backend, **options)

    contestants = {"ours": by("auto"), "ours, affine": by("auto", affine=True)}
    contestants["reference, affine"] = by("torch", affine=True)
    contestants["reference"] = by("torch")  # on a GPU: eager, by torch.linalg's batched Cholesky
    if device.type == "cpu":
        contestants["scikit-learn barycenter_weights"] = lambda: barycenter_weights(
            query.numpy(), bank.numpy(), neighbors.numpy(), reg=1e-3
        )
        assert_equal_weights(query[:3], bank, neighbors[:3])
    else:
        plain = compiled(reference.local_least_squares)
        contestants["reference, compiled"] = lambda: plain(query, bank, partners, neighbors)
        if works(by("cupy")):
            contestants["cupy"] = by("cupy")
    print(f"\n{queries} queries, K={k}, {features} -> {e}, {torch.get_num_threads()} threads", end="")
    ours = "ours, affine" if device.type == "cpu" else "ours"
    benchmark.extra_info["contestants"] = report(in_turns(contestants, rounds=15), ours)
    benchmark.pedantic(contestants[ours], rounds=1)


def assert_equal_weights(query, bank, neighbors):
    """Scikit-learn's weights are ours where the ridge is what it takes: reg·tr(D Dᵀ) of neighbours less the query."""
    theirs = barycenter_weights(query.numpy(), bank.numpy(), neighbors.numpy(), reg=1e-3)
    for q, near in enumerate(neighbors):
        rows = bank[near]
        ridge = float(1e-3 * (rows - query[q]).square().sum() / (rows.square().sum() / len(near)))
        _, ours = functional.local_least_squares(
            query[q : q + 1], bank, bank, neighbors[q : q + 1], ridge=ridge, affine=True
        )
        np.testing.assert_allclose(ours[0], theirs[q], rtol=1e-4, atol=1e-5)
