"""Local least squares beside scikit-learn's weights and the plain batched Cholesky of the reference.

Run with ``pytest benchmarks/test_local_lstsq.py --benchmark-only -s``. The contenders take turns; see
``test_neighbors.py``. scikit-learn computes weights alone; ours and the reference's time has the proxies in it as well.
Nothing is asserted about time.
"""

import numpy as np
import pytest
import torch
from sklearn.manifold._locally_linear import barycenter_weights
from test_neighbors import draw, in_turns, report

from m3er_fast import functional, reference


@pytest.mark.parametrize(("queries", "k", "features"), [(1000, 16, 300), (1000, 16, 74), (1000, 64, 300)])
def test_local_least_squares(benchmark, queries, k, features):
    bank, query = draw(10_000, features, seed=0), draw(queries, features, seed=1) + 0.1
    partners = draw(10_000, 74, seed=2)
    _, neighbors = functional.nearest_neighbors(query, bank, k)
    reg = 1e-3
    contenders = {
        "blocks, affine (ours)": lambda: functional.local_least_squares(query, bank, partners, neighbors, affine=True),
        "blocks (ours)": lambda: functional.local_least_squares(query, bank, partners, neighbors),
        "reference, affine": lambda: reference.local_least_squares(query, bank, partners, neighbors, affine=True),
        "scikit-learn barycenter_weights": lambda: barycenter_weights(
            query.numpy(), bank.numpy(), neighbors.numpy(), reg=reg
        ),
    }
    # The same weights, each query's ridge being what scikit-learn takes: reg·tr(D Dᵀ) of neighbours less the query.
    theirs = barycenter_weights(query.numpy(), bank.numpy(), neighbors.numpy(), reg=reg)
    for q in range(3):
        rows = bank[neighbors[q]]
        ridge = float(reg * (rows - query[q]).square().sum() / (rows.square().sum() / k))
        ours = functional.local_least_squares(
            query[q : q + 1], bank, partners, neighbors[q : q + 1], ridge=ridge, affine=True
        )[1]
        np.testing.assert_allclose(ours[0], theirs[q], rtol=1e-4, atol=1e-5)
    print(f"\n{queries} queries, K={k}, {features} features, {torch.get_num_threads()} threads", end="")
    benchmark.extra_info["contenders"] = report(in_turns(contenders, rounds=15), "blocks, affine (ours)")
    benchmark.pedantic(contenders["blocks, affine (ours)"], rounds=1)
