"""The neighbour engines beside the textbook, scikit-learn and flashlib.

The error is the share of true neighbours, from a search in float64, that were missed.
"""

import functools

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from benchmarks.speed import harness, textbook
from benchmarks.speed.work import Work
from benchmarks.speed.workloads import NEIGHBORS
from m3er_fast import functional
from m3er_fast.functional import unchecked

CONTESTANTS = (
    harness.OURS,
    harness.TEXTBOOK,
    "scikit-learn brute",
    "faiss flat (index and search)",
    "faiss flat (search alone)",
    "flashlib",
)
ENGINES = ("faiss-ivf", "faiss-hnsw")


def pytest_generate_tests(metafunc):
    if "workload" in metafunc.fixturenames:
        workloads = NEIGHBORS[harness.device_type(metafunc.config)]
        cases = [(name, contestant) for name in workloads for contestant in CONTESTANTS]
        metafunc.parametrize(("workload", "contestant"), cases, ids=["-".join(case) for case in cases])


def search_of(contestant, bank, device, k):
    """Return a contestant's search of ``bank``; an index whose time does not count is built here."""
    if contestant == harness.TEXTBOOK:
        return lambda query: textbook.nearest(query, bank, k)[1]
    if contestant.startswith("scikit-learn"):
        if device.type != "cpu":
            pytest.skip("scikit-learn runs on the CPU")
        return lambda query: (
            NearestNeighbors(n_neighbors=k, algorithm="brute")
            .fit(bank.numpy())
            .kneighbors(query.numpy(), return_distance=False)
        )
    if contestant == "flashlib":
        harness.needs_gpu(contestant, device)
        peer = harness.import_peer("flashlib")
        return lambda query: peer.flash_knn(query, bank, k, return_distances=False)
    engine = "faiss" if contestant.startswith("faiss") else "torch"
    try:
        index = unchecked.neighbor_index(bank, engine)
    except functional.BackendUnavailableError as error:
        pytest.skip(str(error))
    if contestant.endswith("(search alone)"):
        return lambda query: index.search(query, k)[1]
    return lambda query: functional.nearest_neighbors(query, bank, k, engine=engine)[1]


def make(sizes, device):
    bank = harness.draw(sizes.rows, sizes.features, seed=0, device=device)
    return bank, lambda seed: harness.draw(sizes.queries, sizes.features, seed=1 + seed, device=device) + 0.1


@functools.lru_cache(maxsize=1)
def oracle(sizes, device):
    """Return the neighbours by every distance in float64, some queries at a time."""
    bank, queries = make(sizes, device)
    bank = bank.double()
    squares = bank.square().sum(dim=1)
    parts = [
        torch.addmm(squares, part.double(), bank.mT, alpha=-2.0).topk(sizes.k, dim=1, largest=False)[1]
        for part in queries(0).split(250)
    ]
    return torch.cat(parts).cpu()


@pytest.mark.benchmark(timer=harness.now)
def test_exact_search(benchmark, contest, device, workload, contestant):
    sizes = NEIGHBORS[device.type][workload]
    benchmark.group = f"{sizes.k} nearest of {sizes.rows} x {sizes.features}, {sizes.queries} queries"
    bank, queries = make(sizes, device)
    search = search_of(contestant, bank, device, sizes.k)
    # The bank stays the same, as in use; the banks that matter exceed every cache. Each call has other queries.
    inputs = harness.Rotation(queries, 2**24, device)
    # All distances in the fastest precision: only near rows need a more exact distance.
    moved = 4 * sizes.features * (sizes.rows + sizes.queries) + 12 * sizes.queries * sizes.k
    work = Work(moved, 2 * sizes.queries * sizes.rows * sizes.features, "bf16")
    contest(
        contestant,
        lambda: search(inputs()),
        [work],
        error=lambda found: harness.missed(found, oracle(sizes, device)),
        samples=sizes.queries,
    )


@functools.lru_cache(maxsize=1)
def clustered():
    """Return bank and queries, noisy views of 32 latent numbers, whose neighbours an index finds in part."""
    mix = harness.draw(32, 300, seed=2)
    return [
        harness.draw(n, 32, seed=seed) @ mix + 5 * harness.draw(n, 300, seed=seed + 9)
        for n, seed in ((50_000, 0), (1000, 1))
    ]


@pytest.mark.benchmark(timer=harness.now)
@pytest.mark.parametrize("contestant", [harness.OURS, *ENGINES])
def test_approximate_search(benchmark, contest, device, contestant):
    if device.type != "cpu":
        pytest.skip("approximate engines are measured on the CPU")
    benchmark.group = "16 nearest of 50000 x 300 by a prebuilt index, 1000 queries"
    bank, query = clustered()
    start = harness.now()
    try:
        index = unchecked.neighbor_index(bank, "torch" if contestant == harness.OURS else contestant)
    except functional.BackendUnavailableError as error:
        pytest.skip(str(error))
    built = harness.now() - start
    wanted = unchecked.neighbor_index(bank.double(), "torch").search(query.double(), 16)[1]
    contest(
        contestant,
        lambda: index.search(query, 16)[1],
        error=lambda found: harness.missed(found, wanted),
        allowed=0.3,
        samples=len(query),
        build_seconds=built,
    )
