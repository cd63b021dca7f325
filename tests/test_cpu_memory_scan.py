"""The memory scan's CPU path against the reference's step-by-step loop under autograd."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scan_problems import ODD_LENGTHS, detached, leaves, problem

from m3er_fast import reference
from m3er_fast.cpu import buffers
from m3er_fast.cpu import memory_scan as cpu
from m3er_fast.functional import MemoryScanWeights, _dispatch, memory_scan, unchecked


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Every scan on the CPU takes this implementation, in several blocks, and each block in several pieces."""
    monkeypatch.setattr(cpu, "BLOCK_SAMPLES", 3)
    monkeypatch.setattr(cpu, "PIECE_ROWS", 7)
    monkeypatch.setattr(cpu, "MANY_NUMBERS", 20)
    monkeypatch.setattr(_dispatch, "FEWEST_TRAINED_STEPS", 0)
    monkeypatch.setattr(_dispatch, "FEWEST_SCORED_STEPS", 0)


def assert_equal(features, lengths, weights, *, dropout=0.0, forward=1e-12, gradient=1e-9, ours=unchecked.memory_scan):
    """Results, with and without a graph, and every gradient; ``gradient`` relative to the largest of a tensor."""
    runs = []
    for scan in (ours, reference.memory_scan):
        torch.manual_seed(5)
        results = scan(features, lengths, weights, dropout=dropout)
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
        gradients = torch.autograd.grad(results, leaves(features, weights), incoming, materialize_grads=True)
        torch.manual_seed(5)
        with torch.no_grad():
            again = scan(features, lengths, weights, dropout=dropout)
        runs.append((results, again, gradients))
    (ours, ours_again, our_gradients), (wanted, _, gradients) = runs
    for results in (ours, ours_again):
        for got, want in zip(results, wanted, strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0, atol=forward)
    for got, want in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=gradient * max(want.abs().max().item(), 1e-6))


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("dims", [(3,), (2, 3), (3, 5, 2), (4, 1, 3, 2), (2, 3, 1, 4, 2)])
def test_equals_the_reference(dims, feedback):
    for batch, steps, dropout in itertools.product((1, 7), (1, 2, 9), (0.0, 0.4)):
        features, weights = problem(dims, batch, steps, feedback=feedback)
        for lengths in (ODD_LENGTHS[:batch], torch.full((batch,), steps)):
            assert_equal(features, lengths, weights, dropout=dropout)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 33])
def test_equals_the_reference_in_float32_at_the_sizes_of_the_paper(batch, feedback):
    sizes = (32, 128, 128, 64, 64)
    features, weights = problem((30, 7, 11), batch, 21, feedback=feedback, dtype=torch.float32, sizes=sizes)
    with torch.no_grad():
        for weight in leaves([], weights):
            weight.mul_(0.2)  # about what nn.Linear starts with
    lengths = torch.arange(batch) * 5 % 24
    assert_equal(features, lengths, weights, forward=1e-5, gradient=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("feedback", [False, True])
def test_gradcheck_of_every_argument(feedback, dropout):
    features, weights = problem((2, 1), 3, 3, feedback=feedback, sizes=(2, 2, 3, 2, 2))
    arguments = leaves(features, weights)

    def scan(*_):
        torch.manual_seed(2)  # the same units dropped in every call
        return unchecked.memory_scan(features, torch.tensor([3, 1, 2]), weights, dropout=dropout)

    assert torch.autograd.gradcheck(scan, arguments, check_batched_grad=False)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_second_derivatives_are_the_references(dropout):
    features, weights = problem((2, 1), 3, 4, sizes=(2, 2, 3, 2, 2))
    arguments, lengths = leaves(features, weights), torch.tensor([4, 1, 2])
    second = []
    for scan in (unchecked.memory_scan, reference.memory_scan):
        torch.manual_seed(3)
        hidden, memory = scan(features, lengths, weights, dropout=dropout)
        first = torch.autograd.grad(hidden.square().sum() + memory.sum(), arguments, create_graph=True)
        state = torch.get_rng_state()
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), arguments))
        assert torch.equal(state, torch.get_rng_state())
    for got, want in zip(*second, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_gradients_of_one_result_alone_and_of_none():
    features, weights = problem()
    for which in (0, 1):
        got, want = (
            torch.autograd.grad(scan(features, ODD_LENGTHS, weights)[which].sum(), leaves(features, weights))
            if which == 1
            else torch.autograd.grad(
                scan(features, ODD_LENGTHS, weights)[which].sum(), [*features, weights.recurrent, weights.bias]
            )
            for scan in (unchecked.memory_scan, reference.memory_scan)
        )
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    lengths = torch.zeros(7, dtype=torch.int64)
    results = unchecked.memory_scan(features, lengths, weights)
    assert not any(x.any() for x in results)
    gradients = torch.autograd.grad(sum(x.sum() for x in results), leaves(features, weights))
    assert not any(g.any() for g in gradients)


def test_a_backward_pass_can_run_twice():
    features, weights = problem()
    total = sum(x.sum() for x in unchecked.memory_scan(features, ODD_LENGTHS, weights))
    first = torch.autograd.grad(total, leaves(features, weights), retain_graph=True)
    second = torch.autograd.grad(total, leaves(features, weights))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_arguments_stay_as_they_were():
    """Most of the arithmetic is in place: never in what was given, of which one row or one modality needs no copy."""
    for dims, batch, steps in (((3,), 1, 1), ((3,), 1, 4), ((3, 2), 5, 4)):
        features, weights = problem(dims, batch, steps)
        before = [x.detach().clone() for x in leaves(features, weights)]
        lengths = torch.full((batch,), steps)
        with torch.no_grad():
            unchecked.memory_scan(features, lengths, weights)
        sum(x.sum() for x in unchecked.memory_scan(features, lengths, weights)).backward()
        assert all(torch.equal(x, y) for x, y in zip(before, leaves(features, weights), strict=True))


def test_memory_orders():
    features, weights = problem()
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in features]
    wide = [torch.cat([x.detach(), x.detach()], 2)[:, :, ::2].requires_grad_() for x in features]
    assert not any(x.is_contiguous() for x in turned)
    assert_equal(turned, ODD_LENGTHS, weights)
    assert_equal(wide, ODD_LENGTHS, weights)
    alike = [x.detach()[:1].expand(7, -1, -1).requires_grad_() for x in features]
    assert_equal(alike, ODD_LENGTHS, weights)
    recurrent = weights.recurrent.detach().mT.contiguous().mT.requires_grad_()
    assert_equal(features, ODD_LENGTHS, weights._replace(recurrent=recurrent))


def test_what_padding_holds_never_matters():
    features, weights = problem()
    padding = (torch.arange(9) >= ODD_LENGTHS[:, None])[:, :, None]
    wanted = unchecked.memory_scan(features, ODD_LENGTHS, weights)
    held = [x.detach().masked_fill(padding, float("nan")) for x in features]
    got = unchecked.memory_scan(held, ODD_LENGTHS, weights)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    gradients = torch.autograd.grad(sum(x.sum() for x in got), leaves([], weights))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_one_sample_holds_stays_with_it(value):
    features, weights = problem()
    wanted = unchecked.memory_scan(features, ODD_LENGTHS, weights)
    features[0].data[4, 2] = value
    got = unchecked.memory_scan(features, ODD_LENGTHS, weights)
    same = reference.memory_scan(features, ODD_LENGTHS, weights)
    others = torch.arange(7) != 4
    torch.testing.assert_close(got[0][:, others], wanted[0][:, others], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1][others], wanted[1][others], rtol=0, atol=1e-12)
    for ours, theirs in zip(got, same, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, equal_nan=True)


def test_scans_that_it_refuses_are_the_references():
    features, weights = problem((2, 3), 3, 4, dtype=torch.float32)
    plain, fixed = [x.detach() for x in features], detached(weights)
    # γ layers of two sizes, and bfloat16 features and weights: a result all the same.
    uneven = fixed._replace(
        update=detached(problem((2, 3), 3, 4, dtype=torch.float32, sizes=(3, 4, 5, 6, 9))[1]).update
    )
    half = [x.bfloat16() for x in plain]
    low = MemoryScanWeights.of(2, [x.bfloat16() for x in fixed.tensors()])
    for x, w in ((plain, uneven), (half, low)):
        got, want = memory_scan(x, torch.full((3,), 4), w), reference.memory_scan(x, torch.full((3,), 4), w)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    empty = [x[:, :0] for x in plain]
    assert not any(x.any() for x in memory_scan(empty, torch.zeros(3, dtype=torch.int64), fixed))


def test_autocast_leaves_the_precision_alone():
    features, weights = problem((2, 3), 3, 4, dtype=torch.float32)
    wanted = unchecked.memory_scan(features, torch.full((3,), 4), weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = unchecked.memory_scan(features, torch.full((3,), 4), weights)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_transforms_and_forward_mode_are_the_references():
    """The gradients worked out by hand know neither."""
    features, weights = problem(batch=3)
    weights, (first, *others) = detached(weights), [x.detach() for x in features]
    lengths, direction = torch.tensor([9, 4, 0]), torch.ones_like(first)

    def scan(x, core=memory_scan):
        return core([x, *others], lengths, weights)[1].square().sum()

    needing = first.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(scan(needing, reference.memory_scan), needing)
    torch.testing.assert_close(torch.func.grad(scan)(first), wanted)
    _, slope = torch.func.jvp(scan, (first,), (direction,))
    torch.testing.assert_close(slope, wanted.sum())
    with torch.autograd.forward_ad.dual_level():
        moved = scan(torch.autograd.forward_ad.make_dual(first, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(moved).tangent, slope)
        moving = weights._replace(bias=torch.autograd.forward_ad.make_dual(weights.bias, weights.bias))
        memory = memory_scan([first, *others], lengths, moving)[1]
        assert torch.autograd.forward_ad.unpack_dual(memory).tangent.any()


def test_results_are_never_in_the_working_memory_that_the_next_call_overwrites(monkeypatch):
    features, weights = problem((2, 3), 3, 9)
    plain, fixed, lengths = [x.detach() for x in features], detached(weights), torch.full((3,), 9)
    wanted = reference.memory_scan(plain, lengths, fixed)
    first = unchecked.memory_scan(plain, lengths, fixed)
    unchecked.memory_scan([-x for x in plain], lengths, fixed)
    sum(x.sum() for x in unchecked.memory_scan(features, lengths, weights)).backward()
    single = [x.float() for x in plain], detached(problem((2, 3), 3, 9, dtype=torch.float32)[1])
    unchecked.memory_scan(single[0], lengths, single[1])
    for got, want in zip(first, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    monkeypatch.setattr(buffers, "MOST_WORKSPACE_BYTES", 0)
    for got, want in zip(unchecked.memory_scan(plain, lengths, fixed), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_memory_that_a_backward_pass_may_read_again_is_not_used_by_the_next_scan(monkeypatch):
    monkeypatch.setattr(buffers, "_ready", [])
    features, weights = problem()
    arguments = leaves(features, weights)

    def total(scale):
        return sum(x.sum() for x in unchecked.memory_scan([scale * x for x in features], ODD_LENGTHS, weights))

    wanted = torch.autograd.grad(total(1.0), arguments)
    assert buffers._ready
    kept = total(1.0)
    for _ in range(2):
        got = torch.autograd.grad(kept, arguments, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        torch.autograd.grad(total(-2.0), arguments)
    monkeypatch.setattr(buffers, "MOST_READY_BYTES", 0)
    torch.autograd.grad(kept, arguments)
    assert not buffers._ready


def test_threads_scan_at_the_same_time():
    features, weights = problem(steps=40)
    lengths = torch.arange(7) * 6
    cases = [[x.detach() * scale for x in features] for scale in (1.0, -1.0, 0.5, 2.0)]
    wanted = [reference.memory_scan(x, lengths, weights) for x in cases]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: unchecked.memory_scan(cases[i % 4], lengths, detached(weights)), range(40)))
    for i, results in enumerate(got):
        for ours, want in zip(results, wanted[i % 4], strict=True):
            torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 9])
def test_what_no_gradient_was_asked_of_can_be_used_where_one_is(steps, monkeypatch):
    monkeypatch.setattr(_dispatch, "FEWEST_SCORED_STEPS", 5)
    features, weights = problem((2, 3), 3, steps)
    lengths = torch.tensor([steps, 1, 0])
    with torch.no_grad():
        results = memory_scan(features, lengths, weights)
    for got, want in zip(results, reference.memory_scan(features, lengths, weights), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        scale = torch.ones_like(got, requires_grad=True)
        (gradient,) = torch.autograd.grad((scale * got).sum(), scale)
        torch.testing.assert_close(gradient, got)
