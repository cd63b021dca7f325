"""What parts of a model must do at least, where no kernel's file says it by itself; M = 3, the default sizes."""

from __future__ import annotations

import itertools

import torch
from workloads import Views

from m3er_fast.kernels import correlation_gate, fusion_loss, memory_scan
from m3er_fast.kernels._target import Work

CANDIDATE = 64
COMPONENTS = 30


def scan(views: Views, *, training: bool) -> Work:
    """The memory scan; a training step multiplies by each weight three times, by those of the features twice.

    Forward, for the weight's gradient and for that of what it was multiplied with, which of features nobody wants. It
    writes a gradient for each weight that it reads.
    """
    sizes = memory_scan.PAPER
    forward = memory_scan.work(views.batch, views.steps, list(views.dims.values()), sizes, CANDIDATE, torch.float32)
    if not training:
        return forward
    weights = forward.flops // (2 * views.frames)
    of_features = 4 * sizes.hidden * sum(views.dims.values())
    return Work(forward.bytes + 4 * weights, 3 * forward.flops - 2 * views.frames * of_features, forward.unit)


def model(views: Views, classes: int, *, training: bool) -> list[Work]:
    """A whole model: check, scan and, in training, the loss. Less than all of it: proxies and fusion are left out."""
    dims = list(views.dims.values())
    pairs = len(list(itertools.combinations(dims, 2)))
    components = [min(COMPONENTS, *dims)] * pairs
    works = [
        correlation_gate.work(views.batch, dims, components, dims, torch.float32),
        scan(views, training=training),
    ]
    if training:
        works.append(fusion_loss.work(len(dims), views.batch, classes, torch.float32))
    return works
