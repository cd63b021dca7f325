"""Random problems of the multiplicative fusion loss."""

import numpy as np
import torch


def problem(
    seed, modalities, batch, classes, activation, target_kind, *, weighted=True, masked=True, ignoring=True, scale=2.0
):
    """Logits, target and factors of fusion_loss in float64; the weights and the mask only if asked for.

    The targets are labels ("hard"), distributions or soft answers ("soft"), or answers of 0 and 1 ("answer").
    """
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(scale=scale, size=(modalities, batch, classes)))
    if target_kind == "soft" and activation == "softmax":
        target = torch.from_numpy(rng.dirichlet(np.ones(classes), size=batch))
    elif target_kind == "soft":
        target = torch.from_numpy(rng.uniform(size=(batch, classes)))
    else:
        highest, shape = (2, (batch, classes)) if target_kind == "answer" else (classes, batch)
        target = torch.from_numpy(rng.integers(0, highest, size=shape))
        if ignoring:
            target[torch.from_numpy(rng.uniform(size=shape) < 0.3)] = -100
    factors = {}
    if weighted:
        factors["class_weight"] = torch.from_numpy(rng.uniform(0.2, 3.0, size=classes))
        factors["modality_weight"] = torch.from_numpy(rng.uniform(0.2, 3.0, size=modalities))
    if masked:
        factors["available"] = torch.from_numpy(rng.uniform(size=(batch, modalities)) < 0.7)
    return logits, target, factors
