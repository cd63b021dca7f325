"""The whole model: a training step with Adam, and inference, with and without check and proxies.

The textbook has neither check nor proxies, so it stands beside training and beside inference without them. Inference
with both is compared with itself: a batch whose every third utterance has lost a modality, beside the same batch clean.
"reference" is the same model with every operation in plain PyTorch: the reference's scan, statistics, local least
squares and loss, and a search by one product and top-k.
"""

import contextlib
import copy
import functools
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks.speed import harness, work
from benchmarks.speed.textbook_weights import textbook_model, textbook_names
from benchmarks.speed.workloads import MODELS
from m3er_fast import M3ERConfig, M3ERFusion, functional
from m3er_fast.functional import unchecked
from m3er_fast.neighbors import exact

CLASSES = 6
# The proxies come from so many training frames.
BANK_FRAMES = 40_000
TRAINING, BARE, CHECKED = "training step with Adam", "inference", "inference with check and proxies"
LOST = "ours, a third lost"
LOST_NEIGHBOURS = "ours, a third lost, neighbours"
RECORDED = "ours, recorded"
CONTESTANTS = {
    TRAINING: (harness.OURS, harness.TEXTBOOK, harness.COMPILED, harness.REFERENCE),
    BARE: (harness.OURS, harness.TEXTBOOK, harness.COMPILED, harness.REFERENCE),
    CHECKED: (harness.OURS, LOST, LOST_NEIGHBOURS, harness.REFERENCE, RECORDED),
}
GPU_CONTESTANTS = (RECORDED,)
WITH_REFERENCE = ("CMU-MOSEI, B=32", "CMU-MOSEI, B=256", "IEMOCAP, B=32")
# Searching 40,000 frames takes up to a second.
WITH_NEIGHBOURS = ("CMU-MOSEI, B=1", "CMU-MOSEI, B=32")
# Compiled sizes of more than one step; the time to compile hardly depends on B.
COMPILED_STEPS = ("CMU-MOSEI, B=32",)
# The operations that a model calls, each with its module.
OPERATIONS = (
    (functional, "fusion_loss"),
    (unchecked, "check_statistics"),
    (unchecked, "sequence_statistics"),
    (unchecked, "local_least_squares"),
    (unchecked, "memory_scan"),
)


def takes_part(contestant, name, views):
    if contestant == harness.REFERENCE:
        return name in WITH_REFERENCE
    if contestant == harness.COMPILED:
        return views.steps == 1 or name in COMPILED_STEPS
    return contestant != LOST_NEIGHBOURS or name in WITH_NEIGHBOURS


def pytest_generate_tests(metafunc):
    cases = [
        pytest.param(
            *(workload, way, contestant),
            marks=[pytest.mark.slow] if contestant == harness.COMPILED and views.steps > 1 else [],
            id=f"{workload}-{way}-{contestant}",
        )
        for workload, views in MODELS[harness.device_type(metafunc.config)].items()
        for way, contestants in CONTESTANTS.items()
        for contestant in contestants
        if takes_part(contestant, workload, views)
    ]
    metafunc.parametrize(("workload", "way", "contestant"), cases)


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


@functools.lru_cache(maxsize=2)
def fitted(dims, steps, device, bank):
    """Return a model that was fitted to as many utterances as fill the bank; ``bank`` None is the default kind."""
    views = next(v for v in MODELS[device.type].values() if tuple(v.dims.items()) == dims and v.steps == steps)
    config = M3ERConfig()
    if bank is not None:
        config = config.replace(proxy=replace(config.proxy, bank=bank))
    torch.manual_seed(0)
    model = M3ERFusion(views.dims, CLASSES, config).to(device)
    return model.fit(draw(views, 0, device, batch=math.ceil(BANK_FRAMES / steps)))


def model_of(workload, way, device, bank=None):
    """Return a model of ours for a way of using it, with weights of its own."""
    views = MODELS[device.type][workload]
    model = copy.deepcopy(fitted(tuple(views.dims.items()), views.steps, device, bank))
    if way == BARE:
        model = model.ablated(check=False, proxy=False)
    return model.train(way == TRAINING)


def available_of(views, device):
    """Return the available modalities: every third utterance has lost one, audio first."""
    available = torch.ones(views.batch, len(views.dims), dtype=torch.bool, device=device)
    lost = torch.arange(0, views.batch, 3)
    available[lost, (1 + lost // 3) % len(views.dims)] = False
    return available


def training_step(module, loss_of, views, device):
    """Return a step of Adam on a batch; the step returns the gradients by which it moved the weights."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters)
    target = torch.arange(views.batch, device=device) % CLASSES

    def step(features):
        optimizer.zero_grad()
        loss_of(features, target).backward()
        optimizer.step()
        return [p.grad for p in parameters]

    return step


def step_of(contestant, model, way, views, device):
    """Return what is timed: a function of the features of a batch."""
    if contestant.startswith(harness.TEXTBOOK):
        written = textbook_model(model).to(device)
        wrap = harness.compiled if contestant == harness.COMPILED else lambda function: function
        if way == TRAINING:
            loss = wrap(written.loss)
            return training_step(written, lambda x, target: loss(list(x.values()), target), views, device)
        forward = wrap(written)
        return torch.no_grad()(lambda features: forward(list(features.values()))[0])
    if way == TRAINING:
        return training_step(model, lambda x, target: model.loss(model(x), target), views, device)
    available = available_of(views, device) if contestant.startswith(LOST) else None
    run = model.compile_for_inference(views.batch, views.steps) if contestant == RECORDED else model
    return torch.no_grad()(lambda features: run(features, available=available).logits)


def comparable(contestant, way, result, model):
    """Return a result in the form of the textbook's."""
    if way != TRAINING or contestant.startswith(harness.TEXTBOOK):
        return result
    names = (name.removeprefix("network.") for name, p in model.named_parameters() if p.requires_grad)
    return list(textbook_names(dict(zip(names, result, strict=True))).values())


@functools.lru_cache(maxsize=1)
def oracle(workload, way, lost, device, bank):
    """Return the result in float64 by the reference operations; fitted parts keep their precision."""
    views = MODELS[device.type][workload]
    model = model_of(workload, way, device, bank).double()
    features = {name: x.double() for name, x in draw(views, 1, device).items()}
    contestant = LOST if lost else harness.OURS
    with plain_operations():
        return comparable(contestant, way, step_of(contestant, model, way, views, device)(features), model)


@pytest.mark.benchmark(timer=harness.now)
def test_model(benchmark, contest, device, workload, way, contestant):
    if contestant in GPU_CONTESTANTS:
        harness.needs_gpu(contestant, device)
    views = MODELS[device.type][workload]
    bank = "neighbours" if contestant == LOST_NEIGHBOURS else None
    benchmark.group = f"{way}, {workload}, T={views.steps}, d={views.features}"
    model = model_of(workload, way, device, bank)
    inputs = harness.Rotation(lambda seed: draw(views, 1 + seed, device), views.bytes, device)
    step = step_of(contestant, model, way, views, device)
    wanted = oracle(workload, way, contestant.startswith(LOST), device, bank)
    is_reference = contestant == harness.REFERENCE
    with plain_operations() if is_reference else contextlib.nullcontext():
        contest(
            contestant,
            lambda: step(inputs()),
            work.model(views, CLASSES, check=way == CHECKED, training=way == TRAINING),
            error=lambda result: harness.relative_error(comparable(contestant, way, result, model), wanted),
            traced=True,
            alone=is_reference,
            samples=views.batch,
        )
