"""The memory scan, forward and in a training step, beside the step-by-step loop, that compiled, and the LSTMs alone.

"ours" is the kernels on CUDA and ``cpu_scan`` on the CPU. The LSTMs are what a scan without attention and memory would
take: nearly a floor. On the CPU the sizes end where the loop takes seconds, and what is compiled ends where compiling
takes minutes.
"""

import functools

import harness
import pytest
import torch
import work
from torch import nn
from workloads import MEMORY_SCAN

from m3er_fast import MemoryFusionNetwork, functional, reference

HIDDEN = 32
MOST_COMPILED_STEPS = 1
RECOMPUTE = 128
RECOMPUTED = f"ours, {RECOMPUTE} at a time"
GPU_CONTESTANTS = ("ours, graphed", "eager, graphed")
CONTESTANTS = ("ours", "eager", "compiled", "nn.LSTM", RECOMPUTED, *GPU_CONTESTANTS)


def pytest_generate_tests(metafunc):
    cases = [
        (name, way, contestant)
        for name, views in MEMORY_SCAN[harness.device_type(metafunc.config)].items()
        for way in ("forward", "training step")
        for contestant in CONTESTANTS
        if contestant != "compiled" or views.steps <= MOST_COMPILED_STEPS
        if contestant != RECOMPUTED or (way == "training step" and views.batch > RECOMPUTE)
    ]
    metafunc.parametrize(("workload", "way", "contestant"), cases, ids=["-".join(case) for case in cases])


class LSTMs(nn.Module):
    """One LSTM a modality: the last hidden states."""

    def __init__(self, dims):
        super().__init__()
        self.parts = nn.ModuleList(nn.LSTM(dim, HIDDEN, batch_first=True) for dim in dims.values())

    def forward(self, features, _):
        return torch.stack([lstm(x)[1][0][0] for lstm, x in zip(self.parts, features, strict=True)]), features[0].sum()


class Scan(nn.Module):
    """The scan of a network with the paper's sizes."""

    def __init__(self, dims, scan):
        super().__init__()
        self.network = MemoryFusionNetwork(dims, 6, hidden=HIDDEN)
        for unused in ("fusion", "head", "modality_heads"):
            delattr(self.network, unused)
        self.scan = scan

    def forward(self, features, lengths):
        return self.scan(features, lengths, self.network.scan_weights())


def model_of(contestant, dims):
    """The contestant's module; all that scan have the same weights."""
    torch.manual_seed(0)
    if contestant == "nn.LSTM":
        return LSTMs(dims)
    if not contestant.startswith("ours"):
        return Scan(dims, reference.memory_scan)
    recompute = RECOMPUTE if contestant == RECOMPUTED else None
    return Scan(dims, functools.partial(functional.memory_scan, recompute=recompute))


def make(views, device, seed, dtype=torch.float32):
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(views.batch, views.steps, dim, device=device, generator=generator).to(dtype)
        for dim in views.dims.values()
    ]


def result_of(run, parameters, features, lengths, way):
    """What is timed: the scan's two results, or the gradient of all parameters."""
    if way == "forward":
        with torch.no_grad():
            return run(features, lengths)
    hidden, memory = run(features, lengths)
    return torch.autograd.grad(hidden.sum() + memory.sum(), parameters)


# A dictionary is no key: the workload's name is.
@functools.lru_cache(maxsize=1)
def oracle(workload, way, device):
    views = MEMORY_SCAN[device.type][workload]
    model = model_of("eager", views.dims).to(device).double()
    lengths = torch.full((views.batch,), views.steps, device=device)
    return result_of(model, list(model.parameters()), make(views, device, 0, torch.float64), lengths, way)


@pytest.mark.benchmark(timer=harness.now)
def test_scan(benchmark, contest, device, workload, way, contestant):
    if contestant in GPU_CONTESTANTS:
        harness.needs_gpu(contestant, device)
    views = MEMORY_SCAN[device.type][workload]
    features = "/".join(map(str, views.dims.values()))
    benchmark.group = f"memory scan, {way}, B={views.batch}, T={views.steps}, d={features}, M=3, h=32, u=128"
    model = model_of(contestant, views.dims).to(device)
    run = harness.compiled(model) if contestant == "compiled" else model
    parameters = list(model.parameters())
    lengths = torch.full((views.batch,), views.steps, device=device)
    inputs = harness.Rotation(functools.partial(make, views, device), views.bytes, device)

    def error(result):
        return harness.relative_error(result, oracle(workload, way, device))

    lstms = contestant == "nn.LSTM"
    contest(
        contestant,
        lambda: result_of(run, parameters, inputs(), lengths, way),
        [] if lstms else [work.scan(views, training=way != "forward")],
        error=None if lstms else error,
    )
