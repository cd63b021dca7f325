"""The whole model: a training step, and inference with and without lost modalities, beside the reference operations.

"reference" is the same model with every operation in plain PyTorch: the reference's scan, check statistics, local least
squares and loss, and a search by one product and top-k.
"""

import contextlib
import copy
import functools
from unittest import mock

import pytest
import torch

from benchmarks.speed import harness, work
from benchmarks.speed.workloads import MODELS
from m3er_fast import M3ERFusion, functional
from m3er_fast.functional import unchecked
from m3er_fast.neighbors import exact

CLASSES = 6
# With more frames, a round of the reference's proxies takes seconds on the CPU.
MOST_LOST_FRAMES_ON_CPU = 2000
# Utterances to which standardiser, check and bank are fitted.
FITTED = 512
GPU_CONTESTANTS = ("ours, recorded",)
CONTESTANTS = ("ours", "reference", *GPU_CONTESTANTS)
# The operations that a model calls, each with its module.
OPERATIONS = (
    (functional, "fusion_loss"),
    (unchecked, "check_statistics"),
    (unchecked, "local_least_squares"),
    (unchecked, "memory_scan"),
)


def pytest_generate_tests(metafunc):
    device = harness.device_type(metafunc.config)
    cases = [
        (workload, way, contestant)
        for workload, views in MODELS[device].items()
        for way in ("training step", "inference", "inference, a third lost")
        for contestant in CONTESTANTS
        if not (contestant == "ours, recorded" and way == "training step")
        and not (contestant == "reference" and way.endswith("lost") and too_many_frames(views, device))
    ]
    metafunc.parametrize(("workload", "way", "contestant"), cases, ids=["-".join(case) for case in cases])


def too_many_frames(views, device):
    return device == "cpu" and views.frames > MOST_LOST_FRAMES_ON_CPU


def by_products(query, bank, k, *, allowed=None, **_):
    """Return the k nearest rows of a bank by one product and top-k."""
    squares = bank.square().sum(dim=1) - 2 * query @ bank.T
    if allowed is not None:
        squares = squares.masked_fill(~allowed, torch.inf)
    found = squares.topk(k, dim=1, largest=False)
    return found.values + query.square().sum(dim=1, keepdim=True), found.indices


@contextlib.contextmanager
def plain_operations():
    """Compute every operation by its reference."""
    with contextlib.ExitStack() as stack:
        for module, name in OPERATIONS:
            plain = functools.partial(getattr(module, name), backend="torch")
            stack.enter_context(mock.patch.object(module, name, plain))
        stack.enter_context(mock.patch.object(exact, "search_exact", by_products))
        yield


def draw(views, seed, device, batch=None):
    """Return related modalities: noisy linear maps of one latent vector, with the same maps for every seed."""
    frames = batch or views.batch, views.steps
    latent = harness.draw(*frames, 16, seed=seed, device=device)
    return {
        name: latent @ harness.draw(16, dim, seed=1000 + dim, device=device)
        + harness.draw(*frames, dim, seed=2000 + seed * 7 + dim, device=device)
        for name, dim in views.dims.items()
    }


@functools.cache
def fitted(workload, device):
    views = MODELS[device.type][workload]
    torch.manual_seed(0)
    return M3ERFusion(views.dims, CLASSES).to(device).fit(draw(views, 0, device, batch=FITTED))


def available_of(views, way, device):
    """Return the available modalities, one of which each sample has lost; None if nothing is lost."""
    if not way.endswith("lost"):
        return None
    available = torch.ones(views.batch, len(views.dims), dtype=torch.bool, device=device)
    available[torch.arange(views.batch), torch.arange(views.batch) % len(views.dims)] = False
    return available


def result_of(run, model, features, available, way):
    """Compute the result that is timed: the logits, or the gradient of all parameters."""
    if way == "training step":
        first = next(iter(features.values()))
        target = torch.arange(len(first), device=first.device) % CLASSES
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(model.loss(model(features), target), parameters)
    with torch.no_grad():
        return run(features, available=available).logits


@functools.lru_cache(maxsize=1)
def oracle(workload, way, device):
    """Return the result in float64 by the reference operations; features and fitted parts keep their precision."""
    views = MODELS[device.type][workload]
    model = copy.deepcopy(fitted(workload, device)).double().train(way == "training step")
    features = {name: x.double() for name, x in draw(views, 1, device).items()}
    with plain_operations():
        return result_of(model, model, features, available_of(views, way, device), way)


@pytest.mark.benchmark(timer=harness.now)
def test_model(benchmark, contest, device, workload, way, contestant):
    if contestant in GPU_CONTESTANTS:
        harness.needs_gpu(contestant, device)
    views = MODELS[device.type][workload]
    features = "/".join(map(str, views.dims.values()))
    benchmark.group = f"{way}, {workload}: B={views.batch}, T={views.steps}, d={features}"
    model = fitted(workload, device).train(way == "training step")
    available = available_of(views, way, device)
    inputs = harness.Rotation(lambda seed: draw(views, 1 + seed, device), views.bytes, device)
    run = model.compile_for_inference(views.batch, views.steps) if contestant.endswith("recorded") else model
    wanted = oracle(workload, way, device)
    with plain_operations() if contestant == "reference" else contextlib.nullcontext():
        contest(
            contestant,
            lambda: result_of(run, model, inputs(), available, way),
            work.model(views, CLASSES, training=way == "training step"),
            error=lambda result: harness.relative_error(result, wanted),
            traced=True,
            samples=views.batch,
        )
