"""The exact search against brute force in float64: odd sizes, extremes, ties, its bounds and its memory."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from m3er_fast.neighbors import exact
from m3er_fast.neighbors.exact import search_exact


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(query, bank, k, allowed=None):
    """Squared distances (Q, k) by NumPy, in float64 and by differences."""
    query, bank = query.double().numpy(), bank.double().numpy()
    distances = np.stack([((bank - q) ** 2).sum(axis=1) for q in query]) if len(query) else np.zeros((0, len(bank)))
    if allowed is not None:
        distances[:, ~allowed.numpy()] = np.inf
    return np.sort(distances, axis=1)[:, :k]


def assert_exact(query, bank, k, *, rtol=2e-6, allowed=None, **options):
    """Assert that these are the k smallest distances, each of its row; the choice among equal rows is open."""
    distances, rows = search_exact(query, bank, k, allowed=allowed, **options)
    wanted = oracle(query, bank, k, allowed)
    np.testing.assert_allclose(distances.numpy(), wanted, rtol=rtol, atol=1e-30)
    own = ((bank[rows].double() - query[:, None].double()) ** 2).sum(dim=2)
    np.testing.assert_allclose(own.numpy(), wanted, rtol=rtol, atol=1e-30)
    assert all(len(set(row)) == k for row in rows.tolist())
    if allowed is not None:
        assert bool(allowed[rows].all())


# The default depends on the CPU and on the sizes.
BOTH = pytest.mark.parametrize("precisions", [(torch.bfloat16, torch.float32), (torch.float32,)])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("queries", "rows", "features", "k"),
    [(1, 1, 1, 1), (3, 2, 5, 2), (7, 33, 3, 33), (40, 4097, 17, 5), (9, 9000, 2, 16), (5, 5000, 64, 300), (0, 9, 4, 2)],
)
def test_it_is_brute_force(precisions, queries, rows, features, k, dtype):
    query, bank = draw(queries, features, seed=1).to(dtype), draw(rows, features).to(dtype)
    assert_exact(query, bank, k, rtol=2e-6 if dtype == torch.float32 else 1e-13, precisions=precisions)


@BOTH
@pytest.mark.parametrize("name", ["row", "query", "both", "many rows"])
@pytest.mark.parametrize("size", [1e4, 1e12, 1e18, 1e-30])
def test_outliers_change_nothing(precisions, name, size):
    query, bank = draw(20, 12, seed=1), draw(5000, 12)
    if name in ("row", "both"):
        bank[17] *= size
    if name in ("query", "both"):
        query[3] *= size
    if name == "many rows":
        bank[::7] *= size
    assert_exact(query, bank, 6, precisions=precisions)


@BOTH
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 3e17])
def test_no_scale_is_special(precisions, scale):
    query, bank = scale * draw(20, 12, seed=1).double(), scale * draw(5000, 12).double()
    assert_exact(query, bank, 6, rtol=1e-13, precisions=precisions)
    if scale > 1e-20:  # squares of the smallest scale underflow in float32
        assert_exact(query.float(), bank.float(), 6, precisions=precisions)


@BOTH
def test_rows_close_together_and_far_from_the_middle(precisions):
    """Clusters 1e-3 wide at a distance of 100: float32 products are off by as much as the distances differ."""
    centers = 100 * draw(30, 10)
    bank = centers.repeat_interleave(200, dim=0) + 1e-3 * draw(6000, 10, seed=1)
    query = centers + 1e-3 * draw(30, 10, seed=2)
    assert_exact(query, bank, 9, rtol=1e-4, precisions=precisions)


@BOTH
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_repeated_rows_cost_little_and_are_each_a_neighbor(precisions, share, monkeypatch):
    query, bank = draw(20, 12, seed=1), draw(20_000, 12)
    bank[torch.from_numpy(np.random.default_rng(0).random(20_000) < share)] = 0.5
    query[:5] = 0.5
    query[5:10] = 0.51
    measured = []
    measure = exact._measure

    def counting(candidates, *arguments):
        measured.append(len(candidates.row))
        return measure(candidates, *arguments)

    monkeypatch.setattr(exact, "_measure", counting)
    assert_exact(query, bank, 8, precisions=precisions)
    # Thousands of rows are as near as the eighth; only the best of each tile are measured.
    assert sum(measured) < 20 * 600


@BOTH
@pytest.mark.parametrize("kept", ["half", "few", "a tile without any"])
def test_only_allowed_rows_are_neighbors(precisions, kept):
    query, bank = draw(20, 12, seed=1), draw(9000, 12)
    allowed = torch.from_numpy(np.random.default_rng(0).random(9000) < 0.5)
    if kept == "few":
        allowed[:] = False
        allowed[[3, 8990, 5000]] = True
    elif kept == "a tile without any":
        allowed[:5000] = False
    assert_exact(query, bank, 3, allowed=allowed, precisions=precisions)
    query[0] = math.nan
    distances, rows = search_exact(query, bank, 3, allowed=allowed, precisions=precisions)
    assert bool(distances[0].isinf().all())
    assert torch.equal(rows[0], allowed.nonzero()[:3, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bank_in_half_precision_is_searched_as_it_is_rounded(dtype):
    query, bank = draw(20, 12, seed=1), draw(5000, 12).to(dtype)
    assert_exact(query, bank, 6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("with_gradient", ["query", "bank", "query and bank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_have_the_gradient_of_their_differences(dtype, with_gradient):
    query, bank = draw(6, 5, seed=1).to(dtype), draw(50, 5, seed=2).to(dtype)
    query[4, 2] = math.nan  # its distances are constants
    query.requires_grad_("query" in with_gradient)
    bank.requires_grad_("bank" in with_gradient)
    weight = draw(6, 3, seed=3)
    weight[4] = 0
    plain, rows = search_exact(query.detach(), bank.detach(), 3)
    distances, same_rows = search_exact(query, bank, 3)
    assert torch.equal(rows, same_rows)
    torch.testing.assert_close(distances.detach(), plain, rtol=1e-6, atol=0)
    (distances[:4] * weight[:4]).sum().add((distances[5] * weight[5]).sum()).backward()

    points, table = query.detach().double().nan_to_num().numpy(), bank.detach().double().numpy()
    slope = 2 * weight.double().numpy()[:, :, None] * (points[:, None] - table[rows.numpy()])
    of_bank = np.zeros_like(table)
    np.add.at(of_bank, rows.numpy(), -slope)
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    for tensor, wanted in ((query, slope.sum(axis=1)), (bank, of_bank)):
        if tensor.requires_grad:
            np.testing.assert_allclose(tensor.grad.double().numpy(), wanted, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("seed", range(8))
def test_the_bounds_hold(seed):
    """Rounded products are within their error for rows and queries of any size, near and far from the centre."""
    features = [1, 3, 17, 300][seed % 4]
    offset = [0.0, 100.0][seed // 4]
    query = draw(37, features, seed=seed) * 10 ** draw(37, 1, seed=seed + 1) + offset
    bank = draw(200, features, seed=seed + 2) * 10 ** draw(200, 1, seed=seed + 3) + offset
    center = bank.median(dim=0).values
    tile = exact._tile(bank, center, None, 0, 224)
    points, rows = query.double() - center.double(), bank.double() - center.double()
    wanted = 0.5 * rows.square().sum(dim=1) - points @ rows.mT
    for precision in (torch.bfloat16, torch.float32):
        values = exact._multiply(query - center, tile, precision)
        got, error = values.value[:, :200], values.error[:, None]
        assert bool((values.lower(got, error) <= wanted).all())
        assert bool((values.upper(got, error) >= wanted).all())
        limit = values.limit(wanted[:, 5])
        assert bool((got <= limit[:, None])[values.lower(got, error) <= wanted[:, 5:6]].all())
    assert bool(torch.isinf(values.value[:, 200:]).all())


def test_the_search_for_other_devices_is_exact_too():
    query, bank = draw(30, 12, seed=1), draw(9000, 12)
    allowed = torch.arange(9000) % 3 > 0
    for mask in (None, allowed):
        found = exact._search_by_topk(query, bank, 5, bank[::35].median(dim=0).values, mask, 1024)
        distances, _ = exact._measure(found, query, bank, 5, 2**20)
        np.testing.assert_allclose(distances.numpy(), oracle(query, bank, 5, mask), rtol=2e-6)


def test_the_search_for_other_devices_neither_waits_for_a_device_nor_mixes_devices():
    """Meta tensors have no values: reading one, or mixing in a CPU tensor, fails."""
    query, bank = torch.empty(3000, 12, device="meta"), torch.empty(9000, 12, device="meta")
    distances, rows = search_exact(query, bank, 7)
    assert distances.shape == rows.shape == (3000, 7)
    assert distances.device == rows.device == query.device


@pytest.mark.parametrize("budget", [1, 2**16, 2**20])
def test_the_memory_budget_does_not_change_the_result(budget):
    query, bank = draw(30, 12, seed=1), draw(3000, 12)
    assert_exact(query, bank, 5, memory_budget=budget)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of a process")
def test_the_search_keeps_to_its_memory_budget():
    script = """
import torch
from m3er_fast.neighbors.exact import search_exact
torch.set_num_threads(1)
bank, query = torch.randn(60_000, 300), torch.randn(3000, 300)
search_exact(query[:64], bank[:5000], 16)  # libraries are set up once
def peak():  # not ru_maxrss, which a child process inherits
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
search_exact(query, bank, 16, memory_budget=64 * 2**20)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 2**20 < int(done.stdout) < 64 * 2**20


def test_products_have_few_sizes_hardly_larger_than_the_queries():
    sizes = {queries: exact._padded_size(queries) for queries in range(1, exact._BLOCK_QUERIES + 1)}
    assert len(set(sizes.values())) == 15
    assert all(queries <= size <= max(16, 1.5 * queries) for queries, size in sizes.items())
    assert sizes[exact._BLOCK_QUERIES] == exact._BLOCK_QUERIES


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process")
def test_memory_does_not_grow_with_every_number_of_queries():
    script = """
import torch
from m3er_fast.neighbors import exact
torch.set_num_threads(1)
bank, query = torch.randn(5000, 32), torch.randn(600, 32)
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
def search_all(numbers):
    for number in numbers:
        exact.search_exact(query[:number], bank, 4, precisions=(torch.bfloat16, torch.float32))
search_all([600, *range(1, 601, 20)])
before = resident()
search_all(range(1, 601, 2))
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 2**20


def assert_index_exact(query, bank, k, allowed=None):
    """As :func:`assert_exact`, for two searches of an index, which may learn from the first."""
    index = exact.ExactIndex(bank, allowed, exact.MEMORY_BUDGET)
    for _ in range(2):
        distances, rows = index.search(query, k)
        wanted = oracle(query, bank, k, allowed)
        np.testing.assert_allclose(distances.numpy(), wanted, rtol=2e-6, atol=1e-30)
        own = ((bank[rows].double() - query[:, None].double()) ** 2).sum(dim=2)
        np.testing.assert_allclose(own.numpy(), wanted, rtol=2e-6, atol=1e-30)
        assert all(len(set(row)) == k for row in rows.tolist())


@pytest.mark.parametrize(
    ("queries", "rows", "features", "k"),
    [
        (1, 1, 1, 1),
        (3, 2, 5, 2),
        (7, 33, 3, 33),
        (32, 4097, 17, 5),
        (9, 9000, 2, 16),
        (5, 5000, 64, 300),
        (4, 20, 3, 16),
    ],
)
def test_an_index_of_a_small_bank_is_brute_force(queries, rows, features, k):
    assert_index_exact(draw(queries, features, seed=1), draw(rows, features), k)


@pytest.mark.parametrize("case", ["repeated", "nearly repeated", "far", "tiny", "huge", "an outlier", "a far query"])
def test_a_small_bank_that_one_product_does_not_tell_apart_is_searched_exactly(case):
    query, bank = draw(9, 12, seed=1), draw(2000, 12)
    if case == "repeated":
        bank = bank[:40].repeat(50, 1)
    elif case == "nearly repeated":
        bank = bank[:40].repeat(50, 1) + 1e-5 * bank
    elif case == "far":
        query, bank = query + 1000, bank + 1000
    elif case == "tiny":
        query, bank = query * 1e-25, bank * 1e-25
        query[0] *= 1e20
    elif case == "huge":
        query, bank = query * 1e17, bank * 1e17
    elif case == "an outlier":
        bank[7] *= 1e15
    elif case == "a far query":
        query[3] *= 1e15
    assert_index_exact(query, bank, 16)


def test_a_small_bank_has_rows_that_are_not_allowed():
    query, bank = draw(9, 12, seed=1), draw(2000, 12)
    allowed = torch.zeros(2000, dtype=torch.bool)
    allowed[::100] = True  # 20 rows, fewer than are measured
    assert_index_exact(query, bank, 16, allowed)
    rows = exact.ExactIndex(bank, allowed, exact.MEMORY_BUDGET).search(query, 20)[1]
    assert bool(allowed[rows].all())


def test_queries_of_a_small_bank_that_are_not_finite_have_no_neighbours():
    query, bank = draw(4, 12, seed=1), draw(2000, 12)
    query[1, 3], query[2] = torch.nan, torch.inf
    distances, rows = exact.ExactIndex(bank, None, exact.MEMORY_BUDGET).search(query, 5)
    np.testing.assert_allclose(distances[::3].numpy(), oracle(query[::3], bank, 5), rtol=2e-6)
    assert bool((distances[1:3] == torch.inf).all())
    assert rows[1:3].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_distances_of_a_small_bank_have_gradients():
    query, bank = draw(4, 12, seed=1).requires_grad_(), draw(2000, 12)
    distances, rows = exact.ExactIndex(bank, None, exact.MEMORY_BUDGET).search(query, 5)
    distances.sum().backward()
    np.testing.assert_allclose(query.grad, 2 * (query.detach()[:, None] - bank[rows]).sum(dim=1), rtol=1e-5)
