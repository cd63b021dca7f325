"""The neighbour engines beside scikit-learn, and beside the plain product and top-k in torch.

Run with ``pytest benchmarks/test_neighbors.py --benchmark-only -s``. The contenders take turns, so that a busy moment
of the machine hits all of them; what is printed is each one's median and the median of its time divided by ours in the
same turn. Nothing is asserted about time.
"""

import statistics
import time

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from m3er_fast import functional

ROUNDS = 7


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product_and_topk(query, bank, k):
    scores = torch.addmm(bank.square().sum(dim=1), query, bank.mT, alpha=-2.0)
    return scores.topk(k, dim=1, largest=False)[1]


def in_turns(contenders, rounds=ROUNDS):
    """Seconds of every contender in every round, after one that warms up."""
    times = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def report(times, ours):
    own = times[ours]
    lines = {
        name: (statistics.median(t), statistics.median(a / b for a, b in zip(t, own, strict=True)))
        for name, t in times.items()
    }
    print()
    for name, (median, ratio) in lines.items():
        print(f"  {name:34s} {1e3 * median:9.1f} ms {ratio:7.2f}x")
    return {name: {"milliseconds": 1e3 * median, "ratio": ratio} for name, (median, ratio) in lines.items()}


@pytest.mark.parametrize(
    ("rows", "features", "queries", "k"),
    [
        (100_000, 300, 1000, 16),
        (1000, 300, 1000, 16),
        (10_000, 300, 1000, 16),
        (100_000, 74, 1000, 16),
        (100_000, 300, 32, 16),
        (100_000, 300, 1000, 64),
        (1_000_000, 74, 1000, 16),
    ],
)
def test_exact_engines(benchmark, rows, features, queries, k):
    bank, query = draw(rows, features, seed=0), draw(queries, features, seed=1) + 0.1
    contenders = {
        "torch (ours)": lambda: functional.nearest_neighbors(query, bank, k, engine="torch")[1],
        "torch addmm + topk": lambda: product_and_topk(query, bank, k),
        "scikit-learn brute": lambda: (
            NearestNeighbors(n_neighbors=k, algorithm="brute")
            .fit(bank.numpy())
            .kneighbors(query.numpy(), return_distance=False)
        ),
    }
    try:
        functional.nearest_neighbors(query[:1], bank[:1], 1, engine="faiss")
    except functional.BackendUnavailableError:
        pass
    else:
        contenders["faiss-cpu flat (index and search)"] = lambda: functional.nearest_neighbors(
            query, bank, k, engine="faiss"
        )[1]
        index = functional.neighbor_index(bank, "faiss")
        contenders["faiss-cpu flat (search alone)"] = lambda: index.search(query, k)[1]
    found = {name: torch.as_tensor(run()) for name, run in contenders.items()}
    for name, rows_found in found.items():
        agreement = (rows_found == found["torch (ours)"]).double().mean()
        assert agreement > 0.999, f"{name} found other neighbours"  # rounding may swap near ties
    print(f"\n{k} nearest of {rows} x {features}, {queries} queries, {torch.get_num_threads()} threads", end="")
    benchmark.extra_info["contenders"] = report(in_turns(contenders), "torch (ours)")
    benchmark.pedantic(contenders["torch (ours)"], rounds=1)
