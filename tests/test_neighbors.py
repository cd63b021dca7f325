"""The neighbour engines: their common contract, the recall of approximate ones, and refusals."""

import importlib.util
import math

import pytest
import torch

from m3er_fast.functional import BackendUnavailableError, nearest_neighbors
from m3er_fast.functional.unchecked import neighbor_index
from m3er_fast.neighbors import faiss, measure_recall
from m3er_fast.neighbors.exact import search_exact

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
ENGINES = ["torch", *(pytest.param(name, marks=needs_faiss) for name in ("faiss", "faiss-ivf", "faiss-hnsw"))]
APPROXIMATE = [pytest.param(name, marks=needs_faiss) for name in ("faiss-ivf", "faiss-hnsw")]


def clustered(rows, features=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(50, features, generator=torch.Generator().manual_seed(7))
    chosen = torch.randint(50, (rows,), generator=generator)
    return centers[chosen] + torch.randn(rows, features, generator=generator)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", [1, 2, 20, 3000])
def test_every_engine_names_k_rows_of_the_bank_in_order(engine, rows):
    bank, query = clustered(rows), clustered(30, seed=1)
    query[3, 2] = math.nan
    k = min(rows, 20)
    distances, found = nearest_neighbors(query, bank, 20, engine=engine)
    assert distances.shape == found.shape == (30, k)
    assert found.dtype == torch.int64
    assert int(found.min()) >= 0
    assert int(found.max()) < rows
    assert torch.equal(distances, distances.sort(dim=1).values)
    assert bool(distances[3].isinf().all())
    assert torch.equal(found[3], torch.arange(k))
    kept = torch.arange(30) != 3
    own = (bank[found] - query[:, None]).square().sum(dim=2)
    torch.testing.assert_close(distances[kept], own[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_keeps_to_the_rows_that_are_allowed(engine):
    bank, query = clustered(500), clustered(30, seed=1)
    allowed = torch.arange(500) % 3 == 1
    found = neighbor_index(bank, engine, allowed=allowed).search(query, 5)[1]
    assert bool(allowed[found].all())
    exact = search_exact(query, bank, 5, allowed=allowed)[1]
    assert (found == exact).double().mean() > 0.95


@needs_faiss
def test_too_few_rows_in_the_probed_lists_lead_to_an_exact_search():
    """All queries are near one list; the other rows are far, in lists that are not probed."""
    bank = torch.cat([torch.randn(40, 4), 1e3 + clustered(4000, 4)])
    index = neighbor_index(bank, "faiss-ivf")
    index._index.nprobe = 1
    distances, found = index.search(0.1 * torch.randn(5, 4), 60)
    assert int(found.min()) >= 0
    wanted = search_exact(0.0 * torch.randn(5, 4), bank, 60)[1]
    assert torch.equal(found[:, :40].sort().values, wanted[:, :40].sort().values)
    assert bool(distances.isfinite().all())


@pytest.mark.parametrize("engine", APPROXIMATE)
def test_approximate_engines_find_most_neighbours_and_recall_measures_how_many(engine):
    bank = clustered(8000)
    index = neighbor_index(bank, engine)
    recall = measure_recall(index, bank, 10)
    assert 0.8 < recall <= 1.0
    query = clustered(500, seed=2)
    found = index.search(query, 10)[1]
    exact = search_exact(query, bank, 10)[1]
    fresh = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)) / 5000
    assert abs(fresh - recall) < 0.05  # rows of the bank stand in for fresh queries


def test_the_recall_of_an_index_that_finds_half_is_one_half():
    bank = clustered(2000)

    class Half:
        def search(self, query, k):
            distances, rows = search_exact(query, bank, 1 + 2 * (k - 1))
            return distances[:, ::2], rows[:, ::2]  # the row itself, and every second of the others

    assert measure_recall(Half(), bank, 10) == pytest.approx(0.5, abs=0.01)
    assert measure_recall(neighbor_index(bank, "torch"), bank, 10) == 1.0
    assert measure_recall(neighbor_index(bank[:1], "torch"), bank[:1], 10) == 1.0
    repeated = bank[:3].repeat(100, 1)
    assert measure_recall(neighbor_index(repeated, "torch"), repeated, 10) == 1.0


def test_auto_never_looks_for_faiss(monkeypatch):
    monkeypatch.setattr(faiss, "import_faiss", lambda: pytest.fail("looked for faiss"))
    assert torch.equal(*(nearest_neighbors(clustered(9), clustered(50), 3, engine=e)[1] for e in ("auto", "torch")))


@needs_faiss
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_faiss_without_gpu_support_is_named(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    bank = clustered(9).as_subclass(OnGpu)
    with pytest.raises(BackendUnavailableError, match=r"engine 'faiss' does not work here: .*m3er-fast\[gpu\]"):
        neighbor_index(bank, "faiss")


@pytest.mark.gpu
@needs_faiss
@pytest.mark.parametrize("engine", ["faiss", "faiss-ivf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_faiss_on_the_gpu_finds_what_torch_finds(device, engine, dtype):
    if not hasattr(faiss.import_faiss(), "StandardGpuResources"):
        pytest.skip("the faiss installed here has no GPU support")
    bank, query = clustered(20_000).to(device, dtype), clustered(300, seed=1).to(device, dtype)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # FAISS must wait for the queue: products, then the bank
        busy = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            busy = busy @ busy / 64
        late = bank + 0 * busy[0, 0].nan_to_num(0.0).to(dtype)
        found = neighbor_index(late, engine).search(query, 10)[1]
    stream.synchronize()
    exact = search_exact(query.float(), bank.float(), 10)[1]
    assert (found[:, :1] == exact[:, :1]).double().mean() > (0.97 if engine == "faiss" else 0.9)


@pytest.mark.gpu
def test_a_bank_on_the_host_answers_queries_on_the_gpu(device):
    bank, query = clustered(9000), clustered(100, seed=1).to(device)
    distances, rows = search_exact(query, bank, 7)
    wanted = search_exact(query.cpu(), bank, 7)
    assert rows.device == query.device
    torch.testing.assert_close(distances.cpu(), wanted[0], rtol=1e-4, atol=1e-4)
