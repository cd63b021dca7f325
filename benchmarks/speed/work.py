"""The least bytes and operations of each computation, from which its floor follows.

Dimension legend: M modalities, B samples, T steps, C classes, d features of a modality, k components, Q queries,
K neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from benchmarks.speed.workloads import Views

CANDIDATE = 64
COMPONENTS = 30


class Work(NamedTuple):
    """The least that an operation must do: its floor is the larger of bytes / bandwidth and flops / rate."""

    bytes: int  # each input read once, each output written once
    flops: int
    unit: Literal["fp64", "fp32", "tf32x3", "bf16"] = "fp32"  # the arithmetic unit whose rate bounds the flops


class ScanSizes(NamedTuple):
    """Sizes of a memory scan, except for its features."""

    modalities: int
    hidden: int  # of each modality's LSTM
    attention: int  # inner size
    gates: int  # inner size of both γ
    memory: int
    candidate: int  # inner size

    @property
    def states(self) -> int:
        """Numbers of all hidden states of a sample."""
        return self.modalities * self.hidden

    @property
    def cells(self) -> int:
        """Numbers of the old and the new cells of a sample."""
        return 2 * self.states


PAPER = ScanSizes(modalities=3, hidden=32, attention=128, gates=64, memory=128, candidate=CANDIDATE)


def fusion_loss(modalities: int, batch: int, classes: int, dtype: torch.dtype, *, with_gradient: bool = True) -> Work:
    """Return the least work of the loss of labels and its gradient: read logits and labels, write the gradient.

    About 30 operations per logit: two comparisons, an exponential, a sum, a product, and its share of the sample's own.
    """
    logits = modalities * batch * classes
    moved = logits * dtype.itemsize + batch * 8
    if with_gradient:
        moved += logits * torch.promote_types(dtype, torch.bfloat16).itemsize
    return Work(moved, 30 * logits)


def check_statistics(
    batch: int, dims: Sequence[int], components: Sequence[int], ranks: Sequence[int], dtype: torch.dtype
) -> Work:
    """Return the least work of the check's statistics: one product with each matrix; three statistics are written.

    Only half of a triangular whitener, such as a check fits, counts.

    Args:
        batch: B.
        dims: d of each modality.
        components: k of each pair of modalities.
        ranks: rows of each modality's whitener.
        dtype: of the features.
    """
    pairs = list(itertools.combinations(range(len(dims)), 2))
    numbers = sum(k * (dims[i] + dims[j]) for (i, j), k in zip(pairs, components, strict=True))
    numbers += sum(rank * (2 * dim - rank + 1) // 2 for dim, rank in zip(dims, ranks, strict=True))
    moved = batch * sum(dims) * dtype.itemsize + 4 * numbers + 4 * batch * (2 * len(pairs) + len(dims))
    return Work(moved, 2 * batch * numbers, "tf32x3")


def sequence_statistics(views: Views, dtype: torch.dtype) -> Work:
    """Return the least work of the moments of all modalities' sequences: read each frame once, write three moments.

    Seven operations per number: shift to the first frame, sum, square, sum; difference, square, sum.
    """
    modalities, features = len(views.dims), sum(views.dims.values())
    read = views.frames * (features * dtype.itemsize + modalities)
    written = views.batch * (3 * 4 * features + 2 * 8 * modalities)
    return Work(read + written, 7 * views.frames * features)


def local_least_squares(
    queries: int, neighbors: int, features: int, targets: int, bank_dtype: torch.dtype, target_dtype: torch.dtype
) -> Work:
    """Return the least work of Q proxies: gather each neighbour and its partners once, read queries, write proxies.

    Args:
        queries: Q.
        neighbors: K of each query.
        features: d of queries and bank.
        targets: features of all partners of a row together.
        bank_dtype: of the bank.
        target_dtype: of the partners.
    """
    k = neighbors
    gathered = k * (features * bank_dtype.itemsize + targets * target_dtype.itemsize)
    moved = gathered + 4 * features + 8 * k + 4 * (k + targets)
    gram, solve, combined = k * k * features, 2 * k**3 // 3 + 2 * k * k, 2 * k * targets
    return Work(queries * moved, queries * (gram + 2 * k * features + solve + combined), "tf32x3")


def memory_scan_forward(
    batch: int, steps: int, dims: Sequence[int], sizes: ScanSizes, dtype: torch.dtype, *, feedback: bool = True
) -> Work:
    """Return the least work of a forward scan: read features and weights, write the results; all products.

    Args:
        batch: B.
        steps: T.
        dims: d of each modality.
        sizes: of the scan.
        dtype: of features and weights.
        feedback: whether the attention's result enters the gates of the next step.
    """
    numbers = 4 * sizes.hidden * (sum(dims) + sizes.states * (3 if feedback else 1))
    numbers += 2 * sizes.cells * sizes.attention + sizes.candidate * (sizes.cells + sizes.memory)
    numbers += 2 * sizes.gates * (sizes.cells + 2 * sizes.memory)
    moved = numbers + batch * (steps * sum(dims) + sizes.states + sizes.memory)
    unit: Literal["tf32x3", "bf16"] = "tf32x3" if dtype == torch.float32 else "bf16"
    return Work(moved * dtype.itemsize + 8 * batch, 2 * numbers * batch * steps, unit)


def memory_scan(views: Views, *, training: bool) -> Work:
    """Return the least work of a memory scan of the default sizes in float32, M = 3.

    A training step multiplies by each weight three times: forward, for the gradient of the weight, and for the gradient
    of its input. Features need no gradient, so the weights that multiply them count twice. The step writes a gradient
    for each weight that it reads.
    """
    forward = memory_scan_forward(
        views.batch, views.steps, list(views.dims.values()), PAPER, torch.float32, feedback=views.feedback
    )
    if not training:
        return forward
    weights = forward.flops // (2 * views.frames)
    of_features = 4 * PAPER.hidden * sum(views.dims.values())
    return Work(forward.bytes + 4 * weights, 3 * forward.flops - 2 * views.frames * of_features, forward.unit)


def model(views: Views, classes: int, *, check: bool, training: bool) -> list[Work]:
    """Return the least work of a whole model: the scan, the check where there is one, and in training the loss.

    Proxies and fusion are left out, so the model must do more than this.
    """
    dims = list(views.dims.values())
    works = [memory_scan(views, training=training)]
    if check:
        components = [min(COMPONENTS, *pair) for pair in itertools.combinations(dims, 2)]
        works += [
            sequence_statistics(views, torch.float32),
            check_statistics(views.batch, dims, components, dims, torch.float32),
        ]
    if training:
        works.append(fusion_loss(len(dims), views.batch, classes, torch.float32))
    return works
