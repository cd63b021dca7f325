"""The memory scan, forward and in a training step, beside the textbook, the reference, and the LSTMs alone.

"ours" is the kernels on CUDA and ``m3er_fast.cpu`` on the CPU. The time of the LSTMs is nearly a floor: a scan without
attention and memory. On the CPU two kinds of cases take minutes and are marked slow: compiling 20 steps, and the
largest size, which is called once. Contestants that would hold all activations of that size do not train on it.
"""

import functools

import pytest
import torch
from torch import nn

from benchmarks.speed import harness, work
from benchmarks.speed.textbook_weights import textbook_names, textbook_network
from benchmarks.speed.workloads import MEMORY_SCAN
from m3er_fast import MemoryFusionNetwork, functional, reference

HIDDEN = 32
# Compiled sizes of more than one step; the time to compile hardly depends on B.
COMPILED_STEPS = {"B=32, T=20"}
WITH_REFERENCE = {"B=32, T=20", "B=256, T=20", "B=8192, T=100"}
WITH_LSTMS = {"B=1, T=20", "B=32, T=20", "B=256, T=20", "B=4096, T=100"}
RECOMPUTE = 128
RECOMPUTED = f"ours, {RECOMPUTE} at a time"
REFERENCE_RECOMPUTED = f"reference, {RECOMPUTE} at a time"
LSTMS = "nn.LSTM"
GPU_CONTESTANTS = ("ours, graphed", "textbook, graphed")
CONTESTANTS = (
    *(harness.OURS, harness.TEXTBOOK, harness.COMPILED, harness.REFERENCE),
    *(LSTMS, RECOMPUTED, REFERENCE_RECOMPUTED, *GPU_CONTESTANTS),
)


def is_large(views, kind):
    return kind == "cpu" and views.frames > 2**17


def takes_part(contestant, name, views, way, kind):
    """Return whether a contestant is measured at this size."""
    bounded = way == "training step" and is_large(views, kind)
    if contestant == REFERENCE_RECOMPUTED:
        return bounded
    if contestant == RECOMPUTED:
        return way == "training step" and views.batch > RECOMPUTE and views.steps >= 20
    if contestant == harness.COMPILED:
        return views.steps == 1 or name in COMPILED_STEPS
    if contestant == harness.REFERENCE:
        return name in WITH_REFERENCE
    if contestant == LSTMS:
        return name in WITH_LSTMS
    return not bounded


def pytest_generate_tests(metafunc):
    kind = harness.device_type(metafunc.config)
    cases = [
        pytest.param(
            *(name, way, contestant),
            marks=[pytest.mark.slow]
            if is_large(views, kind) or (contestant == harness.COMPILED and views.steps > 1)
            else [],
            id=f"{name}-{way}-{contestant}",
        )
        for name, views in MEMORY_SCAN[kind].items()
        for way in (("forward", "training step") if views.feedback else ("forward",))
        for contestant in CONTESTANTS
        if takes_part(contestant, name, views, way, kind)
    ]
    metafunc.parametrize(("workload", "way", "contestant"), cases)


class LSTMs(nn.Module):
    """The last hidden states of one LSTM per modality."""

    def __init__(self, dims):
        super().__init__()
        self.parts = nn.ModuleList(nn.LSTM(dim, HIDDEN, batch_first=True) for dim in dims.values())

    def forward(self, features, _):
        return torch.stack([lstm(x)[1][0][0] for lstm, x in zip(self.parts, features, strict=True)]), features[0].sum()


class Scan(nn.Module):
    """The scan of a network with the paper's sizes."""

    def __init__(self, network, scan):
        super().__init__()
        self.network = network
        for unused in ("fusion", "head", "modality_heads"):
            delattr(network, unused)
        self.scan = scan

    def forward(self, features, lengths):
        return self.scan(features, lengths, self.network.scan_weights())


class TextbookScan(Scan):
    """The textbook's scan."""

    def __init__(self, network):
        super().__init__(network, network.scan)

    def forward(self, features, _):
        return self.scan(features)


def model_of(contestant, views):
    """Return the contestant's module; every scan has the same weights."""
    torch.manual_seed(0)
    if contestant == LSTMS:
        return LSTMs(views.dims)
    network = MemoryFusionNetwork(views.dims, 6, hidden=HIDDEN, feedback=views.feedback)
    if contestant.startswith(harness.TEXTBOOK):
        return TextbookScan(textbook_network(network))
    if contestant == REFERENCE_RECOMPUTED:
        return Scan(network, functools.partial(functional.memory_scan, recompute=RECOMPUTE, backend="torch"))
    if contestant == harness.REFERENCE:
        return Scan(network, reference.memory_scan)
    recompute = RECOMPUTE if contestant == RECOMPUTED else None
    return Scan(network, functools.partial(functional.memory_scan, recompute=recompute))


def make(views, device, seed, dtype=torch.float32):
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(views.batch, views.steps, dim, device=device, generator=generator).to(dtype)
        for dim in views.dims.values()
    ]


def result_of(run, parameters, features, lengths, way):
    """Compute the result that is timed: the scan's two outputs, or the gradient of all parameters."""
    if way == "forward":
        with torch.no_grad():
            return run(features, lengths)
    hidden, memory = run(features, lengths)  # the textbook's hidden states are one tensor per modality
    states = hidden.sum() if isinstance(hidden, torch.Tensor) else sum(h.sum() for h in hidden)
    return torch.autograd.grad(states + memory.sum(), parameters)


def comparable(contestant, model, way, result):
    """Return a result in the form of the textbook's."""
    if way == "forward":
        return [*result[0], result[1]]
    if contestant.startswith(harness.TEXTBOOK):
        return result
    names = [name.removeprefix("network.") for name, _ in model.named_parameters()]
    return list(textbook_names(dict(zip(names, result, strict=True))).values())


# By name, because the dictionary in a workload is not hashable.
@functools.lru_cache(maxsize=1)
def oracle(workload, way, device):
    views = MEMORY_SCAN[device.type][workload]
    model = model_of(harness.REFERENCE, views).to(device).double()
    lengths = torch.full((views.batch,), views.steps, device=device)
    result = result_of(model, list(model.parameters()), make(views, device, 0, torch.float64), lengths, way)
    return comparable(harness.REFERENCE, model, way, result)


@pytest.mark.benchmark(timer=harness.now)
def test_scan(benchmark, contest, device, workload, way, contestant):
    if contestant in GPU_CONTESTANTS:
        harness.needs_gpu(contestant, device)
    views = MEMORY_SCAN[device.type][workload]
    sizes = f"B={views.batch}, T={views.steps}, d={views.features}, M=3, h=32, u=128"
    benchmark.group = f"memory scan, {way}, {sizes}{'' if views.feedback else ', no feedback'}"
    model = model_of(contestant, views).to(device)
    run = harness.compiled(model) if contestant == harness.COMPILED else model
    parameters = list(model.parameters())
    lengths = torch.full((views.batch,), views.steps, device=device)
    inputs = harness.Rotation(functools.partial(make, views, device), views.bytes, device)

    def error(result):
        return harness.relative_error(comparable(contestant, model, way, result), oracle(workload, way, device))

    def step():
        return result_of(run, parameters, inputs(), lengths, way)

    more = {}
    if contestant == harness.COMPILED:
        start = harness.now()
        result_of(run, parameters, make(views, device, 0), lengths, way)
        more["compile_seconds"] = harness.now() - start
    lstms, large = contestant == LSTMS, is_large(views, device.type)
    contest(
        contestant,
        step,
        [] if lstms else [work.memory_scan(views, training=way != "forward")],
        # The oracle of the largest size would need 10 GB; smaller sizes show that all compute the same.
        error=None if lstms or large else error,
        once=large,
        samples=views.batch,
        **more,
    )
