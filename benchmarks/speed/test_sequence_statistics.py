"""The statistics of feature sequences, beside the shortest correct PyTorch: masked mean, variance and difference."""

import pytest
import torch

from benchmarks.speed import harness, work
from benchmarks.speed.workloads import SEQUENCES
from m3er_fast import functional, reference

GPU_CONTESTANTS = ("ours, graphed", "eager, graphed")
CONTESTANTS = ("ours", "eager", "reference", "compiled", *GPU_CONTESTANTS)


def pytest_generate_tests(metafunc):
    workloads = SEQUENCES[harness.device_type(metafunc.config)]
    cases = [(name, contestant) for name in workloads for contestant in CONTESTANTS]
    metafunc.parametrize(("workload", "contestant"), cases, ids=["-".join(case) for case in cases])


def textbook(x, valid):
    """Mean, variance and change of masked frames, as docs/method.md defines them."""
    mask, pair = valid[:, :, None], (valid[:, 1:] & valid[:, :-1])[:, :, None]
    frames, pairs = mask.sum(dim=1).clamp(min=1), pair.sum(dim=1).clamp(min=1)
    mean = x.where(mask, 0.0).sum(dim=1) / frames
    variance = (x - mean[:, None]).square().where(mask, 0.0).sum(dim=1) / frames
    difference = x.diff(dim=1).where(pair, 0.0)
    repeated = ((difference == 0).all(dim=2, keepdim=True) & pair).sum(dim=(1, 2))
    return mean, variance, difference.square().sum(dim=1) / (2 * pairs), repeated, pair.sum(dim=(1, 2))


def moments(results):
    """Mean, variance and change of all modalities, from the results of each."""
    return tuple(torch.cat(parts, dim=1) for parts in list(zip(*results, strict=True))[:3])


@pytest.mark.benchmark(timer=harness.now)
def test_sequence_statistics(benchmark, contest, device, workload, contestant):
    if contestant in GPU_CONTESTANTS:
        harness.needs_gpu(contestant, device)
    views = SEQUENCES[device.type][workload]
    benchmark.group = f"sequences, {workload}, d={'/'.join(map(str, views.dims.values()))}, fp32"
    kind = contestant.removesuffix(", graphed")
    statistics = {"ours": functional.sequence_statistics, "eager": textbook}.get(kind, reference.sequence_statistics)
    if kind == "compiled":
        statistics = harness.compiled(statistics)

    def make(seed):
        generator = torch.Generator(device).manual_seed(seed)
        x = [torch.randn(views.batch, views.steps, d, device=device, generator=generator) for d in views.dims.values()]
        least = (views.steps + 1) // 2
        lengths = torch.randint(least, views.steps + 1, (views.batch, 1), device=device, generator=generator)
        return x, torch.arange(views.steps, device=device) < lengths

    inputs = harness.Rotation(make, views.bytes, device)

    def step():
        features, valid = inputs()
        return [statistics(x, valid) for x in features]

    def error(result):
        features, valid = make(0)
        wanted = moments([textbook(x.double(), valid) for x in features])
        return harness.relative_error(moments(result), wanted)

    contest(contestant, step, [work.sequence_statistics(views, torch.float32)], error=error)
