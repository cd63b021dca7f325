"""The statistics of feature sequences without padding, beside the textbook and the reference."""

import pytest
import torch

from benchmarks.speed import harness, textbook, work
from benchmarks.speed.workloads import SEQUENCES
from m3er_fast import functional, reference

GPU_CONTESTANTS = ("ours, graphed", "textbook, graphed")
CONTESTANTS = (harness.OURS, harness.TEXTBOOK, harness.COMPILED, harness.REFERENCE, *GPU_CONTESTANTS)
WITH_REFERENCE = ("B=32, T=20", "B=512, T=20", "B=8192, T=100")


def pytest_generate_tests(metafunc):
    cases = [
        (name, contestant)
        for name in SEQUENCES[harness.device_type(metafunc.config)]
        for contestant in CONTESTANTS
        if contestant != harness.REFERENCE or name in WITH_REFERENCE
    ]
    metafunc.parametrize(("workload", "contestant"), cases, ids=["-".join(case) for case in cases])


def moments(results):
    """Mean, variance and change of all modalities, from the results of each."""
    return tuple(torch.cat(parts, dim=1) for parts in list(zip(*results, strict=True))[:3])


@pytest.mark.benchmark(timer=harness.now)
def test_sequence_statistics(benchmark, contest, device, workload, contestant):
    if contestant in GPU_CONTESTANTS:
        harness.needs_gpu(contestant, device)
    views = SEQUENCES[device.type][workload]
    benchmark.group = f"sequences, {workload}, d={views.features}, without padding, fp32"
    valid = torch.ones(views.batch, views.steps, dtype=torch.bool, device=device)
    statistics = {
        harness.OURS: lambda x: functional.sequence_statistics(x, valid),
        harness.TEXTBOOK: textbook.sequence_statistics,
        harness.REFERENCE: lambda x: reference.sequence_statistics(x, valid),
    }[contestant.partition(",")[0]]

    def of_all(features):
        return [statistics(x) for x in features]

    run = harness.compiled(of_all) if contestant == harness.COMPILED else of_all

    def make(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.randn(views.batch, views.steps, d, device=device, generator=generator) for d in views.dims.values()
        ]

    inputs = harness.Rotation(make, views.bytes, device)

    def error(result):
        wanted = moments([textbook.sequence_statistics(x.double()) for x in make(0)])
        # One frame has neither a variance nor a change.
        compared = slice(0, 1 if views.steps == 1 else 3)
        return harness.relative_error(moments(result)[compared], wanted[compared])

    least = work.sequence_statistics(views, torch.float32)
    contest(contestant, lambda: run(inputs()), [least], error=error, samples=views.batch)
