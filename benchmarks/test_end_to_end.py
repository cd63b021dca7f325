"""The whole model: a training step, and inference with and without lost modalities, beside the reference operations.

"reference" is the same model with every operation in plain PyTorch: the loop over steps, the gate without a kernel,
the exact search by products and top-k, one dense solve for all proxies, the loss by autograd.
"""

import contextlib
import functools
from unittest import mock

import harness
import pytest
import torch

from m3er_fast import M3ERFusion, functional, neighbors

# name: feature counts, B, T
WORKLOADS = {
    "tiny": ({"text": 32, "audio": 16, "face": 8}, 8, 4),
    "CMU-MOSEI": ({"text": 300, "audio": 74, "face": 35}, 64, 20),
    "paper": ({"text": 300, "audio": 74, "face": 36}, 256, 20),
    "embeddings": ({"text": 768, "audio": 1024, "face": 512}, 256, 1),
}
CLASSES = 6
# Of more frames a round of the reference's proxies takes seconds on the CPU.
MOST_LOST_FRAMES_ON_CPU = 2000
# Utterances that standardiser, check and bank are fitted to.
FITTED = 512
CONTESTANTS = ("ours", "reference")
GPU_CONTESTANTS = ("ours, recorded",)
# The operations that a model calls, and the argument that asks for plain PyTorch.
OPERATIONS = {
    "fusion_loss": {"backend": "torch"},
    "gate_statistics": {"backend": "torch"},
    "local_least_squares": {"backend": "torch"},
    "memory_scan": {"backend": "torch"},
}


def pytest_generate_tests(metafunc):
    on_gpu = torch.device(metafunc.config.getoption("--device")).type == "cuda"
    cases = [
        (workload, way, contestant)
        for workload in WORKLOADS
        for way in ("training step", "inference", "inference, a third lost")
        for contestant in CONTESTANTS + (GPU_CONTESTANTS if on_gpu and way != "training step" else ())
        if on_gpu
        or contestant == "ours"
        or not way.endswith("lost")
        or WORKLOADS[workload][1] * WORKLOADS[workload][2] <= MOST_LOST_FRAMES_ON_CPU
    ]
    metafunc.parametrize(("workload", "way", "contestant"), cases, ids=["-".join(case) for case in cases])


def by_products(query, bank, k, *, allowed=None, **_):
    """The k nearest rows of a bank, by one product and top-k."""
    squares = bank.square().sum(dim=1) - 2 * query @ bank.T
    if allowed is not None:
        squares = squares.masked_fill(~allowed, torch.inf)
    found = squares.topk(k, dim=1, largest=False)
    return found.values + query.square().sum(dim=1, keepdim=True), found.indices


@contextlib.contextmanager
def plain_operations():
    """Every operation by its reference."""
    with contextlib.ExitStack() as stack:
        for name, arguments in OPERATIONS.items():
            plain = functools.partial(getattr(functional, name), **arguments)
            stack.enter_context(mock.patch.object(functional, name, plain))
        stack.enter_context(mock.patch.object(neighbors, "search_exact", by_products))
        yield


def views(dims, batch, steps, seed, device):
    """Modalities that partly say the same: maps of one latent, and noise; the maps are the same for every seed."""
    latent = harness.draw(batch, steps, 16, seed=seed, device=device)
    return {
        name: latent @ harness.draw(16, dim, seed=1000 + dim, device=device)
        + harness.draw(batch, steps, dim, seed=2000 + seed * 7 + dim, device=device)
        for name, dim in dims.items()
    }


@functools.cache
def fitted(workload, device):
    dims, _, steps = WORKLOADS[workload]
    torch.manual_seed(0)
    return M3ERFusion(dims, CLASSES).to(device).fit(views(dims, FITTED, steps, 0, device))


@pytest.mark.benchmark(timer=harness.now)
def test_model(benchmark, contest, device, workload, way, contestant):
    dims, batch, steps = WORKLOADS[workload]
    benchmark.group = f"{way}, {workload}: B={batch}, T={steps}, d={'/'.join(map(str, dims.values()))}"
    model = fitted(workload, device).train(way == "training step")
    target = torch.arange(batch, device=device) % CLASSES
    effective = torch.ones(batch, len(dims), dtype=torch.bool, device=device)
    if way.endswith("lost"):  # one of the three modalities in each sample
        effective[torch.arange(batch), torch.arange(batch) % len(dims)] = False
    available = effective if way.endswith("lost") else None
    size = 4 * batch * steps * sum(dims.values())
    inputs = harness.Rotation(lambda seed: views(dims, batch, steps, 1 + seed, device), size, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    run = model.compile_for_inference(batch, steps) if contestant.endswith("recorded") else model

    def train():
        return torch.autograd.grad(model.loss(model(inputs()), target), parameters)[0]

    def infer():
        with torch.no_grad():
            return run(inputs(), available=available).logits

    step = train if way == "training step" else infer
    with plain_operations() if contestant == "reference" else contextlib.nullcontext():
        model.proxy_generator._prepared = None  # its search is that of the contestant
        assert step().isfinite().all()
        benchmark.extra_info["samples"] = batch
        contest(contestant, step)
