"""Every implementation of local least squares against NumPy in float64: the CPU's blocks, the kernel, and CuPy."""

import importlib
import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch

from m3er_fast import reference
from m3er_fast.functional import BackendUnavailableError, local_least_squares

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="cupy is not installed")

BACKENDS = [
    "torch",
    "auto",  # on the CPU, the blocks of cpu.local_lstsq
    pytest.param("triton", marks=needs_triton),
    pytest.param("cupy", marks=[pytest.mark.gpu, needs_cupy]),
]
# Largest error of a coefficient, relative to the largest coefficient of its query.
TOLERANCE = {"torch": 2e-6, "auto": 2e-6, "cupy": 1e-5}
# The kernel rounds the Gram matrix to float32, so its error grows with the matrix's condition number, as that of any
# Cholesky factorisation in float32 does: over a hundred seeds up to 3.4 times 2^-24 of it.
ROUNDING = 2.0**-21


def tolerance_of(backend, condition):
    """Tolerances (Q, 1) of the queries' coefficients, for systems of these condition numbers."""
    return ROUNDING * condition[:, None] if backend == "triton" else TOLERANCE[backend]


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def problem(queries=5, rows=90, d=12, e=(4,), k=5, seed=0):
    rng = np.random.default_rng(seed)
    neighbors = torch.from_numpy(np.stack([rng.choice(rows, k, replace=rows < k) for _ in range(queries)]))
    targets = [draw(rows, width, seed=seed + 3 + i) for i, width in enumerate(e)]
    return draw(queries, d, seed=seed + 1), draw(rows, d, seed=seed + 2), targets, neighbors


def oracle(query, bank, targets, neighbors, ridge, affine):
    """Proxies, coefficients, and the condition number of each query's normal equations.

    One dense least squares per query: rows augmented by sqrt(λ·tr(G)/K)·I; Σ a = 1 eliminated by a = 1/K + N b.
    """
    query, bank = query.double().cpu().numpy(), bank.double().cpu().numpy()
    targets = [target.double().cpu().numpy() for target in targets]
    coefficients, condition = [], []
    for f, row in zip(query, neighbors.cpu().numpy(), strict=True):
        v, k = bank[row], len(row)
        penalty = ridge * (v**2).sum() / k
        augmented = np.vstack([v.T, np.sqrt(penalty) * np.eye(k)])
        wanted = np.concatenate([f, np.zeros(k)])
        if affine:
            start = np.full(k, 1 / k)
            # Orthonormal vectors that each sum to 0: the complement of (1, ..., 1).
            null = np.linalg.svd(np.ones((1, k)))[2][1:].T
            augmented, wanted = augmented @ null, wanted - augmented @ start
            coefficients.append(start + null @ np.linalg.lstsq(augmented, wanted, rcond=None)[0])
        else:
            coefficients.append(np.linalg.lstsq(augmented, wanted, rcond=None)[0])
        # Neither rows of zeros nor a single coefficient that sums to 1 leave anything to solve. The Gram matrix of
        # centred rows sends (1, ..., 1) to zero, so the penalty is the smallest eigenvalue.
        eigenvalues = np.linalg.svd(augmented, compute_uv=False) ** 2
        smallest = penalty if affine else eigenvalues.min(initial=np.inf)
        condition.append(eigenvalues.max() / smallest if augmented.any() else 1.0)
    a = np.array(coefficients).reshape(len(query), neighbors.shape[1])
    proxies = [np.einsum("qk,qke->qe", a, target[neighbors.cpu().numpy()]) for target in targets]
    return proxies, a, np.array(condition)


def assert_solves(device, query, bank, targets, neighbors, *, backend, ridge=1e-2, affine=False):
    moved = [x.to(device) for x in (query, bank, neighbors)]
    proxies, coefficients = local_least_squares(
        moved[0], moved[1], [x.to(device) for x in targets], moved[2], ridge=ridge, affine=affine, backend=backend
    )
    wanted_proxies, wanted, condition = oracle(query, bank, targets, neighbors, ridge, affine)
    scale = np.abs(wanted).max(axis=1, keepdims=True, initial=1e-30) * tolerance_of(backend, condition)
    np.testing.assert_allclose(coefficients.cpu().numpy() / scale, wanted / scale, rtol=0, atol=1)
    for proxy, target, got in zip(wanted_proxies, targets, proxies, strict=True):
        # The errors of K coefficients add up, times the size of the targets' rows.
        size = scale * target.double().norm(dim=1).max().numpy() * neighbors.shape[1]
        np.testing.assert_allclose(got.cpu().numpy() / size, proxy / size, rtol=0, atol=1)
        assert got.dtype == torch.float32
    return proxies, coefficients


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(("d", "k"), [(1, 1), (1, 4), (12, 5), (40, 16), (33, 17), (100, 32), (70, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_and_proxies_are_the_oracles(device, backend, d, k, ridge, affine):
    assert_solves(device, *problem(queries=3, d=d, e=(4, 37), k=k), backend=backend, ridge=ridge, affine=affine)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("case", ["rank 1", "duplicates", "zeros", "one row, 64 times", "nearly equal rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbors_without_full_rank_get_the_ridge_solution(device, backend, case, affine):
    query, bank, targets, neighbors = problem(k=8, d=20)
    if case == "rank 1":
        bank = bank[:1] * torch.linspace(-2, 2, len(bank))[:, None]
    elif case == "duplicates":
        neighbors[:, 4:] = neighbors[:, :4]
    elif case == "zeros":
        bank = torch.zeros_like(bank)
    elif case == "one row, 64 times":
        neighbors = neighbors[:, :1].expand(-1, 64)
    else:
        bank = bank[:1] + 1e-4 * bank
    proxies, coefficients = assert_solves(device, query, bank, targets, neighbors, backend=backend, affine=affine)
    assert bool(coefficients.isfinite().all())
    assert bool(proxies[0].isfinite().all())


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("what", ["both", "query", "bank"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_scale_is_special(device, backend, what, scale, affine):
    query, bank, targets, neighbors = problem()
    if what in ("both", "query"):
        query = query * scale
    if what in ("both", "bank"):
        bank = bank * scale
    if affine and what == "bank" and scale > 1:
        query = query * 0  # beside such rows it vanishes, and the oracle would show nothing but its own rounding
    _, coefficients = local_least_squares(
        *(x.to(device) for x in (query, bank, targets[0], neighbors)), ridge=1e-2, affine=affine, backend=backend
    )
    _, wanted, condition = oracle(query, bank, targets, neighbors, 1e-2, affine)
    size = np.abs(wanted).max(axis=1, keepdims=True) * tolerance_of(backend, condition)
    np.testing.assert_allclose(coefficients.cpu().numpy() / size, wanted / size, rtol=0, atol=1)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_neighbors_of_zeros_no_query_is_too_large(device, backend, scale, affine):
    query, bank, targets, neighbors = problem(k=8, d=20)
    assert_solves(device, query * scale, torch.zeros_like(bank), targets, neighbors, backend=backend, affine=affine)


@needs_triton
@pytest.mark.parametrize("affine", [False, True])
def test_a_power_of_two_that_the_hardware_rounds_down_changes_nothing(device, monkeypatch, affine):
    """The hardware's 2^x is off by up to 2^-22.5 of it, and flushes what is below 2^-126 to zero."""
    if device.type != "cpu":
        pytest.skip("only the interpreter's 2^x can be replaced")
    query, bank, targets, neighbors = problem(k=8, d=20)
    exact = np.exp2

    def hair_low(x):
        power = exact(x) * np.float32(1 - 2.0**-22.5)
        return np.where(power < np.finfo(np.float32).tiny, np.float32(0), power)

    monkeypatch.setattr(np, "exp2", hair_low)
    for rows in (bank, torch.zeros_like(bank)):
        assert_solves(device, query, rows, targets, neighbors, backend="triton", affine=affine)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_not_finite_gets_zeros_and_disturbs_no_other(device, backend, bad, affine):
    query, bank, targets, neighbors = (
        x.to(device) if isinstance(x, torch.Tensor) else [t.to(device) for t in x] for x in problem()
    )
    clean = local_least_squares(query, bank, targets, neighbors, affine=affine, backend=backend)
    query[2, 7] = bad
    bank[neighbors[4, 1], 3] = bad  # a bank that was never checked
    touched = (neighbors == neighbors[4, 1]).any(dim=1)
    touched[2] = True
    got = local_least_squares(query, bank, targets, neighbors, affine=affine, backend=backend)
    assert not got[1][touched].any()
    assert not got[0][0][touched].any()
    torch.testing.assert_close(got[1][~touched], clean[1][~touched], rtol=1e-6, atol=1e-7)
    assert bool((~touched).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_banks_in_half_precision_are_taken_as_they_are_rounded(device, backend, dtype, affine):
    query, bank, targets, neighbors = problem(d=70, e=(33,), k=16)
    bank, targets = bank.to(dtype), [target.to(dtype) for target in targets]
    assert_solves(device, query, bank, targets, neighbors, backend=backend, affine=affine)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_contiguous_are_read_in_place_or_copied(device, backend):
    query, bank, targets, neighbors = problem()
    wide = torch.cat([bank, targets[0]], dim=1)
    views = wide[:, :12], [wide[:, 12:]]
    assert_solves(device, query, *views, neighbors, backend=backend)
    assert_solves(
        device, query.T.contiguous().T, bank.T.contiguous().T, targets, neighbors.T.contiguous().T, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_query_and_several_targets(device, backend):
    query, bank, targets, neighbors = problem(e=(4, 1, 9))
    on = [x.to(device) for x in targets]
    proxies, coefficients = local_least_squares(
        query[:0].to(device), bank.to(device), on, neighbors[:0].to(device), backend=backend
    )
    assert [tuple(x.shape) for x in proxies] == [(0, 4), (0, 1), (0, 9)]
    assert coefficients.shape == (0, 5)
    together = local_least_squares(query.to(device), bank.to(device), on, neighbors.to(device), backend=backend)
    for target, proxy in zip(on, together[0], strict=True):
        alone = local_least_squares(query.to(device), bank.to(device), target, neighbors.to(device), backend=backend)
        torch.testing.assert_close(alone[0], proxy, rtol=1e-6, atol=1e-6)
        assert torch.equal(alone[1], together[1])


def test_blocks_of_the_cpu_do_not_change_the_result(monkeypatch):
    inputs = problem(queries=23)
    for ridge in (1e-2, 0.0):
        whole = local_least_squares(*inputs, ridge=ridge)
        with monkeypatch.context() as patch:
            patch.setattr("m3er_fast.cpu.local_lstsq._BLOCK_BYTES", 7 * 8 * 6 * 12)
            parts = local_least_squares(*inputs, ridge=ridge)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(parts[0][0], whole[0][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [1e-2, 1e-10, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_the_algebra_of_the_cupy_solvers_with_numpy_in_its_place(monkeypatch, ridge, affine, scale):
    """CuPy needs a GPU, but its solvers' algebra does not."""

    class Anywhere:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    cupy = types.ModuleType("cupy")
    cupy.__dict__.update({name: getattr(np, name) for name in np.__all__ if name != "test"})
    cupy.cuda = types.SimpleNamespace(Device=Anywhere, ExternalStream=Anywhere)
    lapack = types.ModuleType("cupyx.lapack")
    lapack.posv = lambda a, b: np.linalg.solve(a, b[..., None])[..., 0]
    for name, module in {"cupy": cupy, "cupyx": types.ModuleType("cupyx"), "cupyx.lapack": lapack}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.delitem(sys.modules, "m3er_fast.kernels.local_lstsq_cupy", raising=False)
    solver = importlib.import_module("m3er_fast.kernels.local_lstsq_cupy")
    monkeypatch.delitem(sys.modules, "m3er_fast.kernels.local_lstsq_cupy")
    query, bank, targets, neighbors = problem(d=20, k=9)
    neighbors[:, 5:] = neighbors[:, :4]
    got = solver.local_least_squares(query * scale, bank * scale, targets, neighbors, ridge=ridge, affine=affine)
    wanted = reference.local_least_squares(query, bank, targets[0], neighbors, ridge=ridge, affine=affine)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got[0][0], wanted[0], rtol=1e-5, atol=2e-5)


def test_gradients_are_those_of_the_reference():
    query, bank, targets, neighbors = problem()
    query.requires_grad_()
    got = torch.autograd.grad(local_least_squares(query, bank, targets[0], neighbors)[0].sum(), query)[0]
    wanted = torch.autograd.grad(reference.local_least_squares(query, bank, targets[0], neighbors)[0].sum(), query)[0]
    assert torch.equal(got, wanted)


def test_transforms_and_forward_mode_use_the_reference():
    query, bank, targets, neighbors = problem()

    def solve(f):
        return local_least_squares(f, bank, targets[0], neighbors, ridge=1e-2)[0]

    wanted = reference.local_least_squares(query, bank, targets[0], neighbors, ridge=1e-2)[0]
    both = torch.vmap(solve)(torch.stack([query, 2 * query]))
    torch.testing.assert_close(both[0], wanted)
    _, slope = torch.func.jvp(solve, (query,), (query,))
    torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-6)  # linear in the query


@needs_triton
def test_the_op_passes_torchs_own_checks(device):
    from m3er_fast.kernels.local_lstsq import local_lstsq_op

    query, bank, targets, neighbors = problem(queries=2, e=(4, 3))
    on = [target.to(device) for target in targets]
    torch.library.opcheck(local_lstsq_op, (query.to(device), bank.to(device), on, neighbors.to(device), 1e-2, True))


@needs_triton
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ridge": 0.0}, r"it needs a ridge of at least 0\.0001, got 0\.0"),
        ({"neighbors": torch.zeros(5, 65, dtype=torch.int64)}, "it takes up to 64 neighbours, got 65"),
        ({"bank": torch.zeros(90, 12).double()}, "it takes banks in float16, bfloat16 and float32"),
        ({"query": torch.zeros(5, 12).double()}, "it computes float16, bfloat16 and float32, got torch.float64"),
        ({"query": torch.zeros(5, 12).requires_grad_()}, "has no gradient"),
    ],
)
def test_the_kernel_asked_for_by_name_says_what_it_cannot_do(device, changes, reason):
    query, bank, targets, neighbors = problem()
    inputs = {"query": query, "bank": bank, "targets": targets[0], "neighbors": neighbors, **changes}
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with pytest.raises(BackendUnavailableError, match=reason):
        local_least_squares(**inputs, backend="triton")
    if "query" not in changes or not changes["query"].requires_grad:
        assert bool(local_least_squares(**inputs)[0].isfinite().all())  # left to itself it takes another way


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "targets is empty"),
        ([torch.zeros(90, 2), torch.zeros(89, 2)], r"targets\[1\] has 89 rows, but bank has 90"),
        ([torch.zeros(90, 2), torch.zeros(90)], r"targets\[1\] must be a floating matrix"),
    ],
)
def test_bad_targets_are_named(targets, message):
    query, bank, _, neighbors = problem()
    with pytest.raises(ValueError, match=message):
        local_least_squares(query, bank, targets, neighbors)
