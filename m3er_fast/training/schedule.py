"""The learning rate over a training: warm-up, then constant or falling as a cosine."""

from __future__ import annotations

import math

import torch

from m3er_fast.config import TrainingConfig


def learning_rate(settings: TrainingConfig, position: float) -> float:
    """Return the learning rate at a moment of the training.

    With the warm-up w and E epochs, at x epochs from the start:

        rate(x) = learning_rate · min(1, x / w) · d(x)
        d(x) = 1, or for the cosine (1 + cos(π · max(0, x - w) / (E - w))) / 2

    Being a function of the moment, it needs no state: a resumed training has the rates of an uninterrupted one.

    Args:
        settings: of the training.
        position: x, in epochs.
    """
    warmup = settings.warmup_epochs
    rate = settings.learning_rate * (min(1.0, position / warmup) if warmup else 1.0)
    if settings.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * max(0.0, position - warmup) / (settings.epochs - warmup))) / 2
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: TrainingConfig, position: float) -> None:
    """Give an optimiser the learning rate of a moment of the training."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, position)
