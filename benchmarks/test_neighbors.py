"""The neighbour engines beside scikit-learn, and beside the plain product and top-k in torch.

Run with ``pytest benchmarks/test_neighbors.py --benchmark-only -s``. The contestants take turns, so that a busy moment
of the machine hits all of them; what is printed is each one's median and the median of its time divided by ours in the
same turn. Nothing is asserted about time.
"""

import pytest
import torch
from harness import draw, in_turns, now, report, works
from sklearn.neighbors import NearestNeighbors

from m3er_fast import functional

CPU_SIZES = [
    (100_000, 300, 1000, 16),
    (1000, 300, 1000, 16),
    (10_000, 300, 1000, 16),
    (100_000, 74, 1000, 16),
    (100_000, 300, 32, 16),
    (100_000, 300, 1000, 64),
    (512, 1024, 256, 16),
]
GPU_SIZES = [(1_000_000, 768, 16384, 16), (100_000, 300, 16384, 16)]


def product_and_topk(query, bank, k):
    scores = torch.addmm(bank.square().sum(dim=1), query, bank.mT, alpha=-2.0)
    return scores.topk(k, dim=1, largest=False)[1]


@pytest.mark.parametrize("number", range(len(CPU_SIZES)))
def test_exact_engines(benchmark, device, number):
    sizes = CPU_SIZES if device.type == "cpu" else GPU_SIZES
    if number >= len(sizes):
        pytest.skip("fewer sizes on this device")
    rows, features, queries, k = sizes[number]
    bank, query = draw(rows, features, seed=0, device=device), draw(queries, features, seed=1, device=device) + 0.1

    def by(engine, **options):
        return lambda: functional.nearest_neighbors(query, bank, k, engine=engine, **options)[1]

    contestants = {"torch (ours)": by("torch")}
    if device.type == "cpu":
        contestants["torch addmm + topk"] = lambda: product_and_topk(query, bank, k)
        contestants["scikit-learn brute"] = lambda: (
            NearestNeighbors(n_neighbors=k, algorithm="brute")
            .fit(bank.numpy())
            .kneighbors(query.numpy(), return_distance=False)
        )
    if works(by("faiss")):
        contestants["faiss flat (index and search)"] = by("faiss")
        index = functional.neighbor_index(bank, "faiss")
        contestants["faiss flat (search alone)"] = lambda: index.search(query, k)[1]
    found = {name: torch.as_tensor(run()).cpu() for name, run in contestants.items()}
    for name, rows_found in found.items():
        agreement = (rows_found == found["torch (ours)"]).double().mean()
        assert agreement > 0.999, f"{name} found other neighbours"  # rounding may swap near ties
    print(f"\n{k} nearest of {rows} x {features}, {queries} queries, {torch.get_num_threads()} threads", end="")
    benchmark.extra_info["contestants"] = report(in_turns(contestants), "torch (ours)")
    benchmark.pedantic(contestants["torch (ours)"], rounds=1)


@pytest.mark.parametrize("engine", ["faiss-ivf", "faiss-hnsw"])
def test_approximate_engines(benchmark, device, engine):
    if device.type != "cpu":
        pytest.skip("measured on the CPU")
    # Views of 32 latent numbers with as much noise: neighbours that an index can find, and cannot quite.
    features, k = 300, 16
    mix = draw(32, features, seed=2)
    bank, query = (draw(n, 32, seed=s) @ mix + 5 * draw(n, features, seed=s + 9) for n, s in ((50_000, 0), (1000, 1)))
    start = now()
    try:
        index = functional.neighbor_index(bank, engine)
    except functional.BackendUnavailableError as error:
        pytest.skip(str(error))
    built = now() - start
    exact = functional.neighbor_index(bank, "torch")
    wanted, found = exact.search(query, k)[1], index.search(query, k)[1]
    recall = sum(len(set(a) & set(b)) for a, b in zip(wanted.tolist(), found.tolist(), strict=True)) / wanted.numel()
    print(f"\n{engine}: 50000 x 300, 1000 queries: built in {built:.1f} s, recall {recall:.3f}", end="")
    contestants = {"torch (ours)": lambda: exact.search(query, k), engine: lambda: index.search(query, k)}
    benchmark.extra_info["contestants"] = report(in_turns(contestants), "torch (ours)")
    benchmark.extra_info |= {"recall": recall, "build_seconds": built}
    benchmark.pedantic(contestants[engine], rounds=1)
