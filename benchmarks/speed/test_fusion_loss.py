"""The fusion loss and its gradient, beside the textbook, eager, compiled and graphed, the reference, and a library."""

import functools
from typing import get_args

import pytest
import torch

from benchmarks.speed import harness, textbook, work
from benchmarks.speed.workloads import LOSS
from m3er_fast import functional, reference
from m3er_fast.operands import Variant

GPU_CONTESTANTS = ("ours, graphed", "textbook, graphed", "liger-kernel cross entropy")
CONTESTANTS = (harness.OURS, harness.TEXTBOOK, harness.COMPILED, harness.REFERENCE, *GPU_CONTESTANTS)
# The variants differ only in arithmetic, so one size is enough.
COMPARED = "65536 samples, 6 classes"
WITH_REFERENCE = ("256 samples, 6 classes", "8192 samples, 6 classes", COMPARED, "4096 samples, 1000 classes")


def takes_part(contestant, name):
    return contestant != harness.REFERENCE or name in WITH_REFERENCE


def pytest_generate_tests(metafunc):
    workloads = LOSS[harness.device_type(metafunc.config)]
    cases = [
        (name, variant, contestant)
        for name in workloads
        for variant in (get_args(Variant) if name == COMPARED else ("m3er",))
        for contestant in CONTESTANTS
        if takes_part(contestant, name)
    ]
    metafunc.parametrize(("workload", "variant", "contestant"), cases, ids=["-".join(case) for case in cases])


def loss_of(contestant, variant, dtype=torch.float32):
    if contestant.startswith("liger"):
        # Plain cross entropy of every modality's logits: the same memory, less arithmetic. It overwrites the logits
        # with the gradient, so the next turn of the rotation reads other numbers, but does the same work.
        peer = harness.import_peer("liger_kernel.transformers.cross_entropy").LigerCrossEntropyLoss()
        return lambda logits, target: peer(logits.flatten(0, 1), target.repeat(logits.shape[0]))
    kind = contestant.partition(",")[0]
    module = {harness.OURS: functional, harness.TEXTBOOK: textbook, harness.REFERENCE: reference}[kind]
    loss = functools.partial(module.fusion_loss, variant=variant)
    if kind == harness.TEXTBOOK and dtype != torch.float32:  # in half precision it would lose most digits of a weight
        loss = functools.partial(in_float32, loss)
    return harness.compiled(loss) if contestant == harness.COMPILED else loss


def in_float32(loss, logits, target):
    return loss(logits.float(), target)


def make(sizes, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    shape = (sizes.modalities, sizes.batch, sizes.classes)
    logits = torch.randn(shape, device=device, generator=generator).to(sizes.dtype)
    return logits.requires_grad_(), torch.randint(0, sizes.classes, (sizes.batch,), device=device, generator=generator)


def gradient(loss, logits, target):
    return torch.autograd.grad(loss(logits, target), logits)[0]


@functools.lru_cache(maxsize=1)
def oracle(sizes, device, variant):
    logits, target = make(sizes, device, 0)
    return gradient(loss_of(harness.REFERENCE, variant), logits.detach().double().requires_grad_(), target)


@pytest.mark.benchmark(timer=harness.now)
def test_loss_and_gradient(benchmark, contest, device, workload, variant, contestant):
    if contestant in GPU_CONTESTANTS:
        harness.needs_gpu(contestant, device)
    sizes = LOSS[device.type][workload]
    benchmark.group = f"fusion loss and gradient, {workload}, {variant}"
    loss = loss_of(contestant, variant, sizes.dtype)
    size = 2 * sizes.modalities * sizes.batch * sizes.classes * sizes.dtype.itemsize
    inputs = harness.Rotation(functools.partial(make, sizes, device), size, device)

    def error(result):
        return harness.relative_error(result, oracle(sizes, device, variant))

    contest(
        contestant,
        lambda: gradient(loss, *inputs()),
        [work.fusion_loss(*sizes)],
        error=None if contestant.startswith("liger") else error,
        samples=sizes.batch,
    )
