"""The memory scan with its activations computed again on the way back: the same numbers in less memory."""

import threading

import pytest
import torch

from m3er_fast import M3ERConfig, M3ERFusion, MemoryFusionNetwork, functional
from m3er_fast.config import NetworkConfig
from m3er_fast.cpu import buffers
from m3er_fast.functional import unchecked

DIMS = {"text": 5, "audio": 3, "face": 4}
BATCH = 7


def problem(steps, batch=BATCH, dtype=torch.float64):
    """Network, features that need gradients, and lengths from 0 to T."""
    torch.manual_seed(0)
    network = MemoryFusionNetwork(DIMS, 3, hidden=4, memory=6, attention=(5, 6, 7)).to(dtype)
    features = [torch.randn(batch, steps, dim, dtype=dtype, requires_grad=True) for dim in DIMS.values()]
    return network, features, torch.arange(batch) * 7 % (steps + 1)


def scan(network, features, lengths, **options):
    """Results and every gradient, by one seed."""
    torch.manual_seed(1)
    hidden, memory = functional.memory_scan(features, lengths, network.scan_weights(), **options)
    wanted = [*features, *(x for name, x in network.named_parameters() if name.split(".")[0] in SCANNED)]
    return hidden, memory, *torch.autograd.grad(hidden.square().sum() + memory.sum(), wanted)


SCANNED = ("lstms", "attention", "candidate", "retain", "update", "feedback")


def assert_same(found, expected):
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 9])  # the loop has few steps, the rearranged scan many
@pytest.mark.parametrize("recompute", [1, 3, BATCH, 100])
def test_results_and_gradients_are_those_of_the_reference(steps, recompute):
    given = problem(steps)
    assert_same(scan(*given, recompute=recompute), scan(*given, backend="torch"))


def test_an_eighth_of_the_samples_at_a_time_takes_much_less_memory(held_bytes):
    given = problem(60, batch=64)
    everything = held_bytes(lambda: scan(*given))
    assert held_bytes(lambda: scan(*given, recompute=8)) < everything / 3


@pytest.fixture
def held_bytes(monkeypatch):
    """The most memory that a call holds at once, beyond what was held before."""

    def measure(call):
        monkeypatch.setattr(buffers, "_ready", [])  # what earlier calls left would not count
        monkeypatch.setattr(buffers, "_of_thread", threading.local())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        held = peak = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        assert peak
        return peak

    return measure


@pytest.mark.parametrize("steps", [4, 9])
def test_dropout_drops_the_same_on_the_way_back(steps):
    """Numerical derivatives of what one seed gives are the gradients only if both ways drop the same units."""
    network, features, lengths = problem(steps, batch=4)

    def result(*values):
        torch.manual_seed(1)
        hidden, memory = functional.memory_scan(values, lengths, network.scan_weights(), dropout=0.5, recompute=2)
        return hidden.sum() + memory.sum()

    assert torch.autograd.gradcheck(result, features)
    whole = scan(network, features, lengths, dropout=0.5, backend="torch")
    assert_same(scan(network, features, lengths, dropout=0.5, recompute=4), whole)  # all at a time
    assert not torch.equal(scan(network, features, lengths, dropout=0.5, recompute=2)[1], whole[1])


def test_second_derivatives():
    network, features, lengths = problem(9, batch=3)

    def result(*values):
        return functional.memory_scan(values, lengths, network.scan_weights(), recompute=2)[1].sum()

    assert torch.autograd.gradgradcheck(result, features, fast_mode=True)


def test_nothing_is_computed_again_where_nothing_needs_a_gradient(monkeypatch):
    network, features, lengths = problem(9)
    with torch.no_grad():
        expected = functional.memory_scan(features, lengths, network.scan_weights())
        monkeypatch.setattr("m3er_fast.functional._memory_scan.checkpoint", None)
        found = functional.memory_scan(features, lengths, network.scan_weights(), recompute=2)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("batch", "steps"), [(0, 9), (0, 0), (3, 0)])
def test_nothing_to_scan(batch, steps):
    network, features, lengths = problem(steps, batch)
    hidden, memory = functional.memory_scan(features, lengths, network.scan_weights(), recompute=2)
    assert hidden.shape == (3, batch, 4)
    assert memory.shape == (batch, 6)
    assert not hidden.any()
    assert not memory.any()


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2"])
def test_bad_numbers_are_named(value):
    network, features, lengths = problem(2)
    with pytest.raises(ValueError, match="recompute must be a positive int or None, got"):
        functional.memory_scan(features, lengths, network.scan_weights(), recompute=value)


def test_transforms_hold_everything():
    network, features, lengths = problem(9)

    def total(first, recompute=None):
        given = [first, *features[1:]]
        return functional.memory_scan(given, lengths, network.scan_weights(), recompute=recompute)[1].sum()

    assert_same([torch.func.grad(total)(features[0], 2)], [torch.func.grad(total)(features[0])])


def test_compiles_in_one_graph():
    network, features, lengths = problem(3, dtype=torch.float32)

    def total(*values):
        return functional.memory_scan(values, lengths, network.scan_weights(), recompute=3)[1].square().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*features), features)
    for got, want in zip(found, torch.autograd.grad(total(*features), features), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_whole_model_trains_with_it_by_its_configuration(monkeypatch):
    """Loss and gradients are those of the model without; the setting reaches the scan, through JSON too."""
    features = {name: torch.randn(BATCH, 9, dim) for name, dim in DIMS.items()}
    target = torch.arange(BATCH) % 3
    results, seen, scan_all = [], [], unchecked.memory_scan

    def seen_scan(*given, **options):
        seen.append(options["recompute"])
        return scan_all(*given, **options)

    monkeypatch.setattr(unchecked, "memory_scan", seen_scan)
    for recompute in (None, 2):
        torch.manual_seed(0)
        config = M3ERConfig.from_dict(M3ERConfig(network=NetworkConfig(recompute=recompute)).to_dict())
        model = M3ERFusion(DIMS, 3, config=config).train()
        loss = model.loss(model(features), target)
        results.append([loss, *torch.autograd.grad(loss, list(model.network.parameters()))])
    assert seen == [None, 2]
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
