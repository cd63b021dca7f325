"""The statistics of the modality check, beside the textbook, eager, compiled and graphed, and the reference.

The textbook computes the definition; constants are folded into the matrices of the reference.
"""

import functools

import pytest
import torch

from benchmarks.speed import harness, work
from benchmarks.speed.textbook_weights import textbook_check
from benchmarks.speed.workloads import CHECK
from m3er_fast import ModalityCheck, functional, reference

GPU_CONTESTANTS = ("ours, graphed", "textbook, graphed")
CONTESTANTS = (harness.OURS, harness.TEXTBOOK, harness.COMPILED, harness.REFERENCE, *GPU_CONTESTANTS)
WITH_REFERENCE = ("CMU-MOSEI, B=32", "8192 samples", "2048 samples of embeddings")
FITTED = 4096  # samples


def takes_part(contestant, name, device):
    return contestant != harness.REFERENCE or device == "cuda" or name in WITH_REFERENCE


def pytest_generate_tests(metafunc):
    device = harness.device_type(metafunc.config)
    cases = [
        (name, contestant)
        for name in CHECK[device]
        for contestant in CONTESTANTS
        if takes_part(contestant, name, device)
    ]
    metafunc.parametrize(("workload", "contestant"), cases, ids=["-".join(case) for case in cases])


@functools.lru_cache(maxsize=1)
def fitted(dims, components, device):
    """Return the folded matrices, and the textbook in float32 and float64, of the same training data."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(FITTED, components, generator=generator)
    features = {}
    for name, d in dims:
        mixed = shared @ torch.randn(components, d, generator=generator)
        features[name] = (mixed + torch.randn(FITTED, d, generator=generator)).to(device)
    check = ModalityCheck(dict(dims), n_components=components).fit(features).to(device)
    return check.projections_, *(
        textbook_check(features, components, dtype) for dtype in (torch.float32, torch.float64)
    )


@pytest.mark.benchmark(timer=harness.now)
def test_check_statistics(benchmark, contest, device, workload, contestant):
    if contestant in GPU_CONTESTANTS:
        harness.needs_gpu(contestant, device)
    sizes = CHECK[device.type][workload]
    projections, definition, oracle = fitted(tuple(sizes.dims.items()), sizes.components, device)
    features = "/".join(map(str, sizes.dims.values()))
    dtype = harness.dtype_name(sizes.dtype)
    samples = f"{sizes.batch} sample{'s' * (sizes.batch > 1)}"
    benchmark.group = f"check, {samples}, d={features}, k={sizes.components}, {dtype}"
    statistics = {
        harness.OURS: lambda x: functional.check_statistics(x, projections),
        harness.TEXTBOOK: lambda x: definition([part.float() for part in x]),
        harness.REFERENCE: lambda x: reference.check_statistics(x, projections),
    }[contestant.partition(",")[0]]
    if contestant == harness.COMPILED:
        statistics = harness.compiled(statistics)

    def make(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.randn(sizes.batch, d, device=device, generator=generator).to(sizes.dtype) for d in sizes.dims.values()
        ]

    inputs = harness.Rotation(make, sizes.batch * sum(sizes.dims.values()) * sizes.dtype.itemsize, device)
    ranks = [whitener.shape[0] for whitener in projections.whitener]
    components = [len(canonical) for canonical in projections.canonical]
    contest(
        contestant,
        lambda: statistics(inputs()),
        [work.check_statistics(sizes.batch, list(sizes.dims.values()), components, ranks, sizes.dtype)],
        error=lambda result: harness.relative_error(result, oracle([x.double() for x in make(0)])),
        samples=sizes.batch,
    )
