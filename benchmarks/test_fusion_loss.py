"""The fusion loss, value and gradient, beside the same maths in plain PyTorch, compiled, graphed, and a peer."""

from typing import get_args

import harness
import pytest
import torch

from m3er_fast import functional, reference

# name -> modalities, samples, classes, type
WORKLOADS = {
    "batch of 256, 6 classes": (3, 256, 6, torch.float32),
    "8192 samples, 6 classes": (3, 8192, 6, torch.float32),
    "65536 samples, 6 classes": (3, 65536, 6, torch.float32),
    "4096 samples, 1000 classes": (3, 4096, 1000, torch.float32),
}
GPU_WORKLOADS = {
    "1M samples, 6 classes": (3, 2**20, 6, torch.float32),
    "1M samples, 6 classes, bf16": (3, 2**20, 6, torch.bfloat16),
    "65536 samples, 1024 classes, bf16": (3, 65536, 1024, torch.bfloat16),
    "2048 samples, 32768 classes, bf16": (3, 2048, 32768, torch.bfloat16),
    "512 samples, 131072 classes, bf16": (3, 512, 131072, torch.bfloat16),
}
CONTESTANTS = ("ours", "eager", "compiled")
GPU_CONTESTANTS = ("ours, graphed", "eager, graphed", "liger-kernel cross entropy")
# The variants differ in arithmetic only: one size tells.
COMPARED = "65536 samples, 6 classes"


def pytest_generate_tests(metafunc):
    on_gpu = torch.device(metafunc.config.getoption("--device")).type == "cuda"
    workloads = WORKLOADS | (GPU_WORKLOADS if on_gpu else {})
    contestants = CONTESTANTS + (GPU_CONTESTANTS if on_gpu else ())
    cases = [
        (name, sizes, variant, contestant)
        for name, sizes in workloads.items()
        for variant in (get_args(reference.Variant) if name == COMPARED else ("m3er",))
        for contestant in contestants
    ]
    ids = [f"{name}-{variant}-{contestant}" for name, _, variant, contestant in cases]
    metafunc.parametrize(("workload", "sizes", "variant", "contestant"), cases, ids=ids)


def loss_of(contestant, variant):
    def ours(logits, target):
        return functional.fusion_loss(logits, target, variant=variant)

    def eager(logits, target):
        return reference.fusion_loss(logits, target, variant=variant)

    if contestant == "compiled":
        return harness.compiled(eager)
    if contestant.startswith("liger"):
        # Plain cross entropy of every modality's logits: the same memory, less arithmetic. It writes the gradient over
        # the logits, which then are what the next turn of the rotation reads: other numbers, the same work.
        peer = pytest.importorskip("liger_kernel.transformers.cross_entropy").LigerCrossEntropyLoss()
        return lambda logits, target: peer(logits.flatten(0, 1), target.repeat(logits.shape[0]))
    return eager if contestant.startswith("eager") else ours


@pytest.mark.benchmark(timer=harness.now)
def test_loss_and_gradient(benchmark, contest, device, workload, sizes, variant, contestant):
    modalities, batch, classes, dtype = sizes
    benchmark.group = f"fusion loss and gradient, {workload}, {variant}"
    loss = loss_of(contestant, variant)
    size = modalities * batch * classes

    def make(seed):
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(modalities, batch, classes, device=device, generator=generator).to(dtype)
        return logits.requires_grad_(), torch.randint(0, classes, (batch,), device=device, generator=generator)

    inputs = harness.Rotation(make, 2 * size * dtype.itemsize, device)

    def step():
        logits, target = inputs()
        return torch.autograd.grad(loss(logits, target), logits)[0]

    assert step().isfinite().all()
    work = pytest.importorskip("m3er_fast.kernels.fusion_loss").work(modalities, batch, classes, dtype)
    contest(contestant, step, work)
