"""The epochs of a training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m3er_fast.fusion import M3ERFusion
from m3er_fast.training.data import Split, TrainingBatch, TrainingData
from m3er_fast.training.device import batches_on, computing_in
from m3er_fast.training.schedule import set_learning_rate
from m3er_fast.training.state import CHECKPOINT_FILE, EpochPosition, TrainingState
from m3er_fast.training.workers import ALONE, Workers

VALIDATION_BATCH = 512


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is no longer finite."""


class EpochRecord(NamedTuple):
    """The outcome of one epoch."""

    epoch: int  # from 1
    epochs: int  # the most there will be
    train_loss: float
    valid_loss: float
    best: bool
    seconds: float


def run_epochs(
    state: TrainingState,
    data: TrainingData,
    workers: Workers,
    out: Path | None,
    checkpoint_seconds: float,
    progress: Callable[[EpochRecord], None] | None,
) -> None:
    """Train until the state is finished, with a call of ``progress`` after every epoch.

    A checkpoint is written to ``out`` after every epoch, and within an epoch every ``checkpoint_seconds``.
    """
    model = state.model
    settings = model.config.training
    while not state.finished():
        start = time.perf_counter()
        train_loss = train_epoch(state, data.training, workers, out, checkpoint_seconds)
        valid_loss = mean_loss(model.ablated(check=False, proxy=False), data.validation, workers)
        if not np.isfinite(train_loss + valid_loss):
            raise TrainingError(
                f"the loss is {train_loss} in training and {valid_loss} in validation after epoch {state.epoch + 1}: "
                f"lower learning_rate ({settings.learning_rate}) or set gradient_norm"
            )
        best = state.record(train_loss, valid_loss)
        if out is not None:
            state.save(out / CHECKPOINT_FILE)
        if progress is not None:
            seconds = time.perf_counter() - start
            progress(EpochRecord(state.epoch, settings.epochs, train_loss, valid_loss, best, seconds))


def train_epoch(
    state: TrainingState,
    split: Split,
    workers: Workers = ALONE,
    out: Path | None = None,
    checkpoint_seconds: float = np.inf,
) -> float:
    """Train on every utterance of a split once, from the state's position on, and return the mean loss of all."""
    model = state.model
    settings = model.config.training
    model.train()
    # Seeded per epoch, not carried over from the last one: a resumed training must draw the same numbers.
    torch.manual_seed(settings.seed * 1_000_003 + state.epoch)
    steps = math.ceil(split.rows / settings.batch_size)
    done = state.position.batches
    batches = split.shuffled(settings.batch_size, torch.default_generator, start=done)
    state.position.restore_random(state.device)
    begun = workers.first_only(state.position) or EpochPosition()
    total = LossSum(state.device, workers, begun.loss, begun.rows)
    forward = workers.parallel(model)
    saved = time.monotonic()
    for batch in batches_on(state.device, workers.parts(model, batches)):
        set_learning_rate(state.optimizer, settings, state.epoch + (done + 0.5) / steps)
        loss = _loss(model, batch, forward) * batch.share
        state.optimizer.zero_grad(set_to_none=True)
        workers.backward(loss)
        if settings.gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), settings.gradient_norm)
        state.optimizer.step()
        total.add(loss, batch)
        done += 1
        if out is not None and workers.save_within_epochs and time.monotonic() - saved >= checkpoint_seconds:
            state.position = EpochPosition.now(done, total.total.item(), total.rows, state.device)
            state.save(out / CHECKPOINT_FILE)
            saved = time.monotonic()
    return total.mean()


@torch.no_grad()
def mean_loss(model: M3ERFusion, split: Split, workers: Workers = ALONE) -> float:
    """Return the mean loss per utterance of a split, in eval mode."""
    model.eval()
    device = model.standardizer.count.device
    total = LossSum(device, workers)
    for batch in batches_on(device, workers.turns(split.in_order(VALIDATION_BATCH))):
        total.add(_loss(model, batch, model), batch)
    return total.mean()


class LossSum:
    """A sum of losses on their device: reading each would make the host wait for it.

    Args:
        device: of the losses.
        workers: the processes whose losses are added up.
        total: the sum so far.
        rows: the number of utterances so far.
    """

    def __init__(self, device: torch.device, workers: Workers, total: float = 0.0, rows: int = 0) -> None:
        self.total = torch.full((), total, dtype=torch.float64, device=device)
        self.rows = rows
        self._workers = workers

    def add(self, loss: Tensor, batch: TrainingBatch) -> None:
        """Add the mean loss of a batch, or this process's share of it."""
        self.total += loss.detach().double() * batch.rows
        self.rows += len(batch.lengths)

    def mean(self) -> float:
        """Return the mean loss per utterance of all processes, for which the host waits."""
        sums = torch.stack([self.total, torch.full_like(self.total, self.rows)])
        total, rows = self._workers.total(sums)
        return float((total / rows).item())


def _loss(model: M3ERFusion, batch: TrainingBatch, forward: Callable[..., Any]) -> Tensor:
    with computing_in(model.config.training.precision, batch.lengths.device):
        return model.loss(forward(batch.features, batch.lengths, batch.available), batch.target)
