"""Local least squares beside the textbook, eager and compiled, the reference, scikit-learn's weights and CuPy.

scikit-learn computes only the weights; the times of the others include the proxies. Its ridge is defined differently,
so its weights are compared with its own in float64.
"""

import functools
import itertools

import pytest
import torch
from sklearn.manifold._locally_linear import barycenter_weights

from benchmarks.speed import harness, textbook, work
from benchmarks.speed.workloads import LOCAL_LSTSQ
from m3er_fast import functional

RIDGE = 1e-3
COMPARED = 64  # queries whose weights, or the textbook's proxies, are compared with the oracle's
CONTESTANTS = (
    *(harness.OURS, "ours, affine", harness.TEXTBOOK, harness.COMPILED, harness.REFERENCE),
    *("cupy", "scikit-learn barycenter_weights"),
)


def pytest_generate_tests(metafunc):
    workloads = LOCAL_LSTSQ[harness.device_type(metafunc.config)]
    cases = [(name, contestant) for name in workloads for contestant in CONTESTANTS]
    metafunc.parametrize(("workload", "contestant"), cases, ids=["-".join(case) for case in cases])


@functools.lru_cache(maxsize=1)
def inputs_of(sizes, device):
    """Return bank, partners, and several sets of queries with their neighbours."""
    rows = 10_000 if device.type == "cpu" else 1_000_000
    bank = harness.draw(rows, sizes.features, seed=0, device=device, dtype=sizes.dtype)
    partners = harness.draw(rows, sizes.partner_features, seed=2, device=device, dtype=sizes.dtype)

    def make(seed):
        query = harness.draw(sizes.queries, sizes.features, seed=100 + seed, device=device) + 0.1
        if device.type == "cpu":
            return query, functional.nearest_neighbors(query, bank, sizes.k)[1]
        # It does not matter which rows are gathered, only that they lie apart.
        generator = torch.Generator().manual_seed(seed)
        return query, torch.randint(0, rows, (sizes.queries, sizes.k), generator=generator).to(device)

    # A set gathers at least 5 MB of rows, so a few sets exceed the cache.
    return bank, partners, [make(seed) for seed in range(4)]


def solution_of(contestant, bank, partners, device):
    """Return a contestant's function from queries and their neighbours to proxies and weights."""
    affine = {"affine": contestant.endswith("affine")}
    if contestant.startswith("scikit-learn"):
        if device.type != "cpu":
            pytest.skip("scikit-learn runs on the CPU")
        rows = bank.numpy()
        return lambda query, near: barycenter_weights(query.numpy(), rows, near.numpy(), reg=RIDGE)
    if contestant.startswith(harness.TEXTBOOK):
        plain = textbook.local_least_squares
        run = harness.compiled(plain) if contestant == harness.COMPILED else plain
        bank, partners = bank.float(), partners.float()
        return lambda query, near: run(query, bank, partners, near, RIDGE)
    backends = {harness.OURS: "auto", harness.REFERENCE: "torch", "cupy": "cupy"}
    backend = backends[contestant.removesuffix(", affine")]

    def solve(query, near):
        return functional.local_least_squares(query, bank, partners, near, ridge=RIDGE, backend=backend, **affine)

    return solve


@functools.lru_cache(maxsize=2)
def oracle(sizes, device, affine):
    """Return weights of the first queries by QR in float64 of neighbours and ridge, without a Gram matrix.

    Weights that sum to 1 are a = 1/K + N b, where the columns of N span the vectors that sum to 0; b solves the same
    kind of problem.
    """
    bank, _, ((query, near), *_) = inputs_of(sizes, device)
    rows, query = bank[near[:COMPARED]].double().cpu().mT, query[:COMPARED].double().cpu()  # (Q, d, K), (Q, d)
    penalty = RIDGE * rows.square().sum(dim=(1, 2)) / sizes.k
    mean = 1.0 / sizes.k if affine else 0.0
    basis = torch.eye(sizes.k, dtype=torch.float64)
    if affine:
        basis = torch.linalg.qr(torch.cat([torch.ones(sizes.k, 1), basis], dim=1).double())[0][:, 1:]
    ridge = penalty.sqrt()[:, None, None] * torch.eye(basis.shape[1], dtype=torch.float64)
    wanted = torch.cat([query - mean * rows.sum(dim=2), torch.zeros(len(query), basis.shape[1])], dim=1)
    solution = torch.linalg.lstsq(torch.cat([rows @ basis, ridge], dim=1), wanted[:, :, None]).solution
    return (basis @ solution)[:, :, 0] + mean


def error_of(contestant, sizes, device):
    """Return a function of a contestant's result: the distance of its weights, or proxies, from the oracle's."""
    if contestant.startswith("scikit-learn"):
        bank, _, ((query, near), *_) = inputs_of(sizes, device)
        wanted = barycenter_weights(query.double().numpy(), bank.double().numpy(), near.numpy(), reg=RIDGE)
        return lambda weights: harness.relative_error(weights, wanted)
    wanted = oracle(sizes, device, contestant.endswith("affine"))
    if contestant.startswith(harness.TEXTBOOK):  # it returns the proxies alone
        _, partners, ((_, near), *_) = inputs_of(sizes, device)
        proxies = (wanted[:, None, :] @ partners[near[:COMPARED]].double().cpu())[:, 0]
        return lambda result: harness.relative_error(result[:COMPARED], proxies)
    return lambda result: harness.relative_error(result[1][:COMPARED], wanted)


@pytest.mark.benchmark(timer=harness.now)
def test_local_least_squares(benchmark, contest, device, workload, contestant):
    if contestant == "cupy":
        harness.needs_gpu(contestant, device)
    sizes = LOCAL_LSTSQ[device.type][workload]
    benchmark.group = (
        f"local least squares, {sizes.queries} queries, K={sizes.k}, {sizes.features} -> {sizes.partner_features}, "
        f"{harness.dtype_name(sizes.dtype)}"
    )
    bank, partners, queries = inputs_of(sizes, device)
    try:
        solve = solution_of(contestant, bank, partners, device)
        solve(*queries[0])
    except functional.BackendUnavailableError as error:
        pytest.skip(str(error))
    inputs = itertools.cycle(queries)
    least = work.local_least_squares(
        sizes.queries, sizes.k, sizes.features, sizes.partner_features, sizes.dtype, sizes.dtype
    )
    error = error_of(contestant, sizes, device)
    contest(contestant, lambda: solve(*next(inputs)), [least], error=error, samples=sizes.queries)
