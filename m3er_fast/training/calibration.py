"""Calibrating a trained model on the split that it was not trained on."""

from __future__ import annotations

import torch

from m3er_fast.fitted_module import eval_mode
from m3er_fast.fusion import M3ERFusion
from m3er_fast.training.data import Split

_BATCH = 512


def calibrate(model: M3ERFusion, validation: Split) -> None:
    """Fit a model's temperature to its answers on the validation split, as users get them: check and proxies are on."""
    logits, targets = [], []
    with eval_mode(model), torch.no_grad():
        for batch in validation.in_order(_BATCH):
            logits.append(model(batch.features, batch.lengths, batch.available).logits)
            targets.append(batch.target)
    model.fit_temperature(torch.cat(logits), torch.cat(targets))
