"""The epochs of a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from m3er_fast.fusion import M3ERFusion
from m3er_fast.training.data import Split, TrainingData
from m3er_fast.training.state import CHECKPOINT_FILE, TrainingState

_VALIDATION_BATCH = 512


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
    state: TrainingState, data: TrainingData, out: Path | None, progress: Callable[[EpochRecord], None] | None
) -> None:
    """Train until the state is finished, with a checkpoint in ``out`` and a call of ``progress`` after every epoch."""
    model = state.model
    settings = model.config.training
    while not state.finished():
        start = time.perf_counter()
        train_loss = _train_epoch(state, data.training)
        valid_loss = mean_loss(model.ablated(check=False, proxy=False), data.validation)
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


def _train_epoch(state: TrainingState, split: Split) -> float:
    """Train on every utterance of a split once, and return the mean loss per utterance."""
    model = state.model
    settings = model.config.training
    model.train()
    # Seeded per epoch, not carried over from the last one: a resumed training must draw the same numbers.
    torch.manual_seed(settings.seed * 1_000_003 + state.epoch)
    total = 0.0
    for features, lengths, available, target in split.shuffled(settings.batch_size, torch.default_generator):
        loss = model.loss(model(features, lengths, available), target)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), settings.gradient_norm)
        state.optimizer.step()
        total += loss.item() * len(lengths)
    return total / split.rows


@torch.no_grad()
def mean_loss(model: M3ERFusion, split: Split) -> float:
    """Return the mean loss per utterance of a split, in eval mode."""
    model.eval()
    total = 0.0
    for features, lengths, available, target in split.in_order(_VALIDATION_BATCH):
        total += model.loss(model(features, lengths, available), target).item() * len(lengths)
    return total / split.rows
