"""The calls that are counted, by operation: sizes of the paper, and sizes at which a kernel changes its ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.speed import harness, work
from benchmarks.speed.workloads import MOSEI_DIMS, PAPER_DIMS, Views
from m3er_fast import MemoryFusionNetwork, ModalityCheck, functional


class Call(NamedTuple):
    """One call of an operation."""

    name: str
    unit: str  # what its instructions are divided by
    units: int
    least: work.Work
    step: Callable[[], Any]


def fusion_loss() -> Iterator[Call]:
    for batch, classes in ((256, 6), (4096, 6), (8192, 6), (16384, 6), (4096, 7), (64, 1024)):
        logits = harness.draw(3, batch, classes, seed=0).requires_grad_()
        target = torch.arange(batch) % classes
        yield Call(
            f"{batch} samples, {classes} classes",
            "logit",
            logits.numel(),
            work.fusion_loss(3, batch, classes, torch.float32),
            lambda x=logits, y=target: functional.fusion_loss(x, y, backend="triton"),
        )


def check_statistics() -> Iterator[Call]:
    k = work.COMPONENTS
    shared = harness.draw(2048, k, seed=0)
    features = {
        name: shared @ harness.draw(k, d, seed=d) + harness.draw(2048, d, seed=1000 + d)
        for name, d in MOSEI_DIMS.items()
    }
    projections = ModalityCheck(MOSEI_DIMS, n_components=k).fit(features).projections_
    dims = list(MOSEI_DIMS.values())
    for batch in (256, 2048):
        some = [x[:batch] for x in features.values()]
        yield Call(
            f"{batch} samples, 300/74/35 features, {k} components",
            "sample",
            batch,
            work.check_statistics(batch, dims, [k] * 3, dims, torch.float32),
            lambda some=some: functional.check_statistics(some, projections, backend="triton"),
        )


def sequence_statistics() -> Iterator[Call]:
    views = Views({"text": 300}, 32, 20)
    sequence, valid = harness.draw(32, 20, 300, seed=0), torch.ones(32, 20, dtype=torch.bool)
    yield Call(
        "32 sequences of 20 frames, 300 features",
        "frame",
        views.frames,
        work.sequence_statistics(views, torch.float32),
        lambda: functional.sequence_statistics(sequence, valid, backend="triton"),
    )


def local_lstsq() -> Iterator[Call]:
    queries, d, rows = 256, 300, 2000
    query, bank, targets = (harness.draw(n, d, seed=i) for i, n in enumerate((queries, rows, rows)))
    for k in (16, 32):
        near = torch.randint(0, rows, (queries, k), generator=torch.Generator().manual_seed(0))
        yield Call(
            f"{queries} queries, K={k}, 300 -> 300 features",
            "query",
            queries,
            work.local_least_squares(queries, k, d, d, torch.float32, torch.float32),
            lambda near=near: functional.local_least_squares(query, bank, targets, near, backend="triton"),
        )


def memory_scan() -> Iterator[Call]:
    views = Views(PAPER_DIMS, 16, 3)
    torch.manual_seed(0)
    weights = MemoryFusionNetwork(views.dims, 6, hidden=work.PAPER.hidden).scan_weights()
    features = [harness.draw(views.batch, views.steps, d, seed=d) for d in views.dims.values()]
    lengths = torch.full((views.batch,), views.steps)

    def forward():
        with torch.no_grad():
            functional.memory_scan(features, lengths, weights, backend="triton")

    def forward_and_backward():
        hidden, memory = functional.memory_scan(features, lengths, weights, backend="triton")
        (hidden.square().sum() + memory.sum()).backward()

    for name, step in (("forward", forward), ("forward and backward", forward_and_backward)):
        yield Call(
            f"{name}, B={views.batch}, T={views.steps}, 300/74/36 features",
            "step of a sample",
            views.frames,
            work.memory_scan(views, training=step is forward_and_backward),
            step,
        )


OPERATIONS: dict[str, Callable[[], Iterator[Call]]] = {
    function.__name__: function
    for function in (fusion_loss, check_statistics, sequence_statistics, local_lstsq, memory_scan)
}
