"""The memory scan, forward and in a training step, beside the step-by-step loop, that compiled, and the LSTMs alone.

"ours" is the kernels on CUDA and ``cpu_scan`` on the CPU. The LSTMs are what a scan without attention and memory would
take: nearly a floor. On the CPU the sizes end where the loop takes seconds, and what is compiled ends where compiling
takes minutes.
"""

import functools

import harness
import pytest
import torch
from torch import nn

from m3er_fast import MemoryFusionNetwork, functional, reference

DIMS = {"text": 300, "audio": 74, "face": 36}
HIDDEN = 32
SIZES = [(batch, steps) for batch in (1, 32, 256, 4096) for steps in (1, 20, 100)]
MOST_FRAMES_ON_CPU = 2**17
MOST_COMPILED_STEPS = 20
RECOMPUTE = 128
CONTESTANTS = ("ours", "eager", "compiled", "nn.LSTM")
RECOMPUTED = f"ours, {RECOMPUTE} at a time"
GPU_CONTESTANTS = ("ours, graphed", "eager, graphed")


def pytest_generate_tests(metafunc):
    on_gpu = torch.device(metafunc.config.getoption("--device")).type == "cuda"
    cases = [
        (*size, way, contestant)
        for size in SIZES
        for way in ("forward", "training step")
        for contestant in (*CONTESTANTS, RECOMPUTED, *(GPU_CONTESTANTS if on_gpu else ()))
        if (on_gpu or size[0] * size[1] <= MOST_FRAMES_ON_CPU)
        and (contestant != "compiled" or size[1] <= MOST_COMPILED_STEPS)
        and (contestant != RECOMPUTED or (way == "training step" and size[0] > RECOMPUTE))
    ]
    ids = [f"B{batch}-T{steps}-{way}-{contestant}" for batch, steps, way, contestant in cases]
    metafunc.parametrize(("batch", "steps", "way", "contestant"), cases, ids=ids)


class LSTMs(nn.Module):
    """One LSTM a modality: the last hidden states."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.LSTM(dim, HIDDEN, batch_first=True) for dim in DIMS.values())

    def forward(self, features, _):
        return torch.stack([lstm(x)[1][0][0] for lstm, x in zip(self.parts, features, strict=True)]), features[0].sum()


class Scan(nn.Module):
    """The scan of a network with the paper's sizes."""

    def __init__(self, scan):
        super().__init__()
        self.network = MemoryFusionNetwork(DIMS, 6, hidden=HIDDEN)
        for unused in ("fusion", "head", "modality_heads"):
            delattr(self.network, unused)
        self.scan = scan

    def forward(self, features, lengths):
        return self.scan(features, lengths, self.network.scan_weights())


def peak_bytes(step):
    """The most memory that a call on the CPU holds at once, beyond what was held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.benchmark(timer=harness.now)
def test_scan(benchmark, contest, device, batch, steps, way, contestant):
    benchmark.group = f"memory scan, {way}, B={batch}, T={steps}, d=300/74/36, M=3, h=32, u=128"
    if contestant == "nn.LSTM":
        model = LSTMs().to(device)
    else:
        recompute = RECOMPUTE if contestant == RECOMPUTED else None
        ours = functools.partial(functional.memory_scan, recompute=recompute)
        model = Scan(ours if contestant.startswith("ours") else reference.memory_scan).to(device)
    run = harness.compiled(model) if contestant == "compiled" else model
    parameters = list(model.parameters())

    def make(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(batch, steps, dim, device=device, generator=generator) for dim in DIMS.values()]

    lengths = torch.full((batch,), steps, device=device)
    inputs = harness.Rotation(make, 4 * batch * steps * sum(DIMS.values()), device)

    def forward():
        with torch.no_grad():
            return run(inputs(), lengths)[0]

    def train():
        hidden, memory = run(inputs(), lengths)
        return torch.autograd.grad(hidden.sum() + memory.sum(), parameters)[0]

    step = forward if way == "forward" else train
    assert step().isfinite().all()
    work = None
    if device.type == "cuda" and way == "forward":
        from m3er_fast.kernels import memory_scan as kernels

        work = kernels.work(batch, steps, list(DIMS.values()), kernels.PAPER, 64, torch.float32)
    if device.type == "cpu":
        benchmark.extra_info["peak_bytes"] = peak_bytes(step)
    contest(contestant, step, work)
