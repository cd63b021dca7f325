"""The statistics of the modality check, beside the same maths in plain PyTorch, compiled and graphed."""

import harness
import pytest
import torch

from m3er_fast import ModalityCheck, functional, reference

DIMS = {"text": 300, "audio": 74, "face": 35}
COMPONENTS = 30
CONTESTANTS = ("ours", "eager", "compiled")
GPU_CONTESTANTS = ("ours, graphed", "eager, graphed")


def pytest_generate_tests(metafunc):
    on_gpu = torch.device(metafunc.config.getoption("--device")).type == "cuda"
    metafunc.parametrize("contestant", CONTESTANTS + (GPU_CONTESTANTS if on_gpu else ()))
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if on_gpu else {})
    metafunc.parametrize("dtype", dtypes.values(), ids=dtypes)
    metafunc.parametrize("batch", [32, 8192, *([65536] if on_gpu else [])])


@pytest.fixture(scope="module")
def projections(device):
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4096, COMPONENTS, generator=generator)
    features = {
        name: shared @ torch.randn(COMPONENTS, d, generator=generator) + torch.randn(4096, d, generator=generator)
        for name, d in DIMS.items()
    }
    return ModalityCheck(DIMS, n_components=COMPONENTS).fit(features).to(device).projections_


@pytest.mark.benchmark(timer=harness.now)
def test_gate(benchmark, contest, device, projections, batch, dtype, contestant):
    benchmark.group = f"gate, {batch} samples, d=300/74/35, k=30, {str(dtype).removeprefix('torch.')}"
    statistics = functional.gate_statistics if contestant.startswith("ours") else reference.gate_statistics
    if contestant == "compiled":
        statistics = harness.compiled(statistics)

    def make(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(batch, d, device=device, generator=generator).to(dtype) for d in DIMS.values()]

    inputs = harness.Rotation(make, batch * sum(DIMS.values()) * dtype.itemsize, device)

    def step():
        return statistics(inputs(), projections)

    assert all(value.isfinite().all() for value in step())
    kernels = pytest.importorskip("m3er_fast.kernels.correlation_gate")
    ranks = [whitener.shape[0] for whitener in projections.whitener]
    work = kernels.work(batch, list(DIMS.values()), [COMPONENTS] * 3, ranks, dtype)
    contest(contestant, harness.graphed(step) if contestant.endswith("graphed") else step, work)
