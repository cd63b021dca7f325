"""The CPU's scan of few steps against the reference's, both under autograd."""

import itertools

import pytest
import torch
from scan_problems import ODD_LENGTHS, detached, leaves, problem
from test_cpu_memory_scan import assert_equal

from m3er_fast import MemoryFusionNetwork, reference
from m3er_fast.cpu.memory_scan_short import memory_scan as short_scan
from m3er_fast.functional import memory_scan

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("dims", [(3,), (3, 5, 2), (2, 3, 1, 4, 2)])
def test_equals_the_reference(dims, feedback):
    for batch, steps, dropout in itertools.product((1, 7), (1, 2, 9), (0.0, 0.4)):
        features, weights = problem(dims, batch, steps, feedback=feedback)
        for lengths in (ODD_LENGTHS[:batch], torch.full((batch,), steps), torch.full((batch,), 0.5)):
            assert_equal(features, lengths, weights, dropout=dropout, ours=short_scan)


@pytest.mark.parametrize("steps", [1, 2])
def test_no_samples_give_no_states_and_gradients_of_zero(steps):
    features, weights = problem(batch=0, steps=steps)
    hidden, memory = short_scan(features, torch.zeros(0, dtype=torch.int64), weights)
    assert hidden.shape == (3, 0, 3)
    assert memory.shape == (0, 4)
    gradients = torch.autograd.grad(hidden.sum() + memory.sum(), leaves(features, weights))
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("steps", [1, 3])
def test_equals_the_reference_in_float32_at_the_sizes_of_the_paper(steps):
    features, weights = problem((30, 7, 11), 33, steps, dtype=torch.float32, sizes=(32, 128, 128, 64, 64))
    with torch.no_grad():
        for weight in leaves([], weights):
            weight.mul_(0.2)  # about what nn.Linear starts with
    lengths = torch.arange(33) % (steps + 1)
    assert_equal(features, lengths, weights, forward=1e-5, gradient=1e-4, ours=short_scan)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradcheck_and_second_derivatives_of_every_argument(steps, dropout):
    """No argument is unused, not even those whose gradient is zero."""
    features, weights = problem((2, 1), 3, steps, sizes=(2, 2, 3, 2, 2))
    arguments = leaves(features, weights)

    def scan(*_):
        torch.manual_seed(2)  # the same units dropped in every call
        return short_scan(features, torch.tensor([1, 0, 2]), weights, dropout=dropout)

    assert torch.autograd.gradcheck(scan, arguments, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(scan, arguments, check_batched_grad=False)


def test_dropout_leaves_the_generator_where_the_reference_does():
    features, weights = problem(steps=1)
    states = []
    for scan in (short_scan, reference.memory_scan):
        torch.manual_seed(3)
        scan(features, ODD_LENGTHS, weights, dropout=0.4)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("values", [(NAN, 0.0), (INF, 0.0), (INF, INF), (INF, -INF), (1e300, 1e300)])
def test_features_that_are_not_finite_give_what_they_give_in_the_reference(values, steps):
    for seed in range(20):  # the signs of the weights decide whether two infinite features make a gate NaN
        features, weights = problem((5, 2), steps=steps, seed=seed)
        features[0].data[4, 0, :2] = torch.tensor(values, dtype=torch.float64)
        got = short_scan(features, ODD_LENGTHS, weights)
        wanted = reference.memory_scan(features, ODD_LENGTHS, weights)
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, equal_nan=True)


def test_weights_that_meet_nothing_but_zeros_do_not_show():
    """The reference multiplies them: 0 times infinity is NaN."""
    features, weights = problem(steps=1)
    lengths = torch.ones(7, dtype=torch.int64)
    wanted = short_scan(features, lengths, weights)
    weights.recurrent.data.fill_(INF)
    weights.retain.first.data.fill_(NAN)
    for got, want in zip(short_scan(features, lengths, weights), wanted, strict=True):
        assert torch.equal(got, want)
    assert all(x.isnan().any() for x in reference.memory_scan(features, lengths, weights))
    gradients = torch.autograd.grad(sum(x.sum() for x in wanted), [weights.recurrent, *weights.retain])
    assert not any(x.any() for x in gradients)


def test_arguments_stay_as_they_were():
    features, weights = problem(steps=3)
    before = [x.detach().clone() for x in leaves(features, weights)]
    with torch.no_grad():
        memory_scan(features, ODD_LENGTHS, weights)
    sum(x.sum() for x in memory_scan(features, ODD_LENGTHS, weights)).backward()
    assert all(torch.equal(x, y) for x, y in zip(before, leaves(features, weights), strict=True))


@pytest.mark.parametrize("steps", [1, 3])
def test_functional_scans_few_steps_so_and_autocast_changes_nothing(steps):
    features, weights = problem(batch=5, steps=steps, dtype=torch.float32)
    lengths = torch.tensor([steps, 0, 1, steps, -1])
    wanted = reference.memory_scan(features, lengths, weights)
    with torch.autocast("cpu", torch.bfloat16):
        trained = memory_scan(features, lengths, weights)
    scored = memory_scan([x.detach() for x in features], lengths, detached(weights))
    for results in (trained, scored):
        for got, want in zip(results, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert trained[0].requires_grad
    assert not scored[0].requires_grad
    assert not scored[0].is_inference()


def test_a_training_step_of_one_frame_per_utterance_gives_every_parameter_a_gradient():
    network = MemoryFusionNetwork({"text": 4, "audio": 3}, 2, hidden=4, memory=6)
    output = network({"text": torch.randn(5, 1, 4), "audio": torch.randn(5, 1, 3)})
    (output.logits.sum() + output.modality_logits.sum()).backward()
    assert all(x.grad is not None for x in network.parameters())
