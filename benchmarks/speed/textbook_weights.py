"""The fitted parts of a model under the textbook's names: both then compute the same.

Dimension legend: M modalities, d features of a modality, h hidden size.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.speed import textbook
from m3er_fast import CCA, M3ERFusion, MemoryFusionNetwork


def textbook_names(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a `MemoryFusionNetwork`, or their gradients, under the textbook's names.

    The textbook has one matrix for features and feedback together, and names the second layer after the relu 2.
    """
    renamed = {}
    for name, value in values.items():
        if name.startswith("feedback."):
            continue
        if name.endswith("weight_ih") and (back := values.get(f"feedback.{name.split('.')[1]}.weight")) is not None:
            value = torch.cat([value, back], dim=1)
        renamed[re.sub(r"^(attention|candidate|retain|update|head)\.1\.", r"\1.2.", name)] = value
    return renamed


def textbook_network(network: MemoryFusionNetwork) -> textbook.Network:
    """Return the textbook's network with the weights of ``network``, which has the default sizes."""
    feedback = network.feedback is not None
    copy = textbook.Network(list(network.input_dims.values()), network.num_classes, feedback=feedback)
    copy.to(next(network.parameters())).load_state_dict(textbook_names(network.state_dict()))
    return copy


def textbook_model(model: M3ERFusion) -> textbook.Model:
    """Return the textbook's model with the standardisation and the weights of ``model``."""
    parts = range(len(model.input_dims))
    mean, scale = ([getattr(model.standardizer, f"{part}_{m}") for m in parts] for part in ("mean", "scale"))
    return textbook.Model(mean, scale, textbook_network(model.network))


def textbook_check(features: Mapping[str, Tensor], components: int, dtype: torch.dtype) -> textbook.CheckStatistics:
    """Return the textbook's statistics, fitted to utterance vectors (n, d) of each modality as a check fits its own."""
    views = list(features.values())
    device = views[0].device
    pairs = []
    for left, right in itertools.combinations(views, 2):
        cca = CCA(n_components=components).fit(left, right)
        parts = (cca.x_rotations_, cca.y_rotations_, cca.correlations_)
        x_rotations, y_rotations, correlations = (torch.as_tensor(part).to(device, dtype) for part in parts)
        pairs.append((x_rotations, y_rotations, correlations))
    mean = [x.double().mean(dim=0).to(dtype) for x in views]
    return textbook.CheckStatistics(mean, pairs, [_whitener(x).to(dtype) for x in views])


def _whitener(x: Tensor) -> Tensor:
    """Shrunk by a thousandth of the mean variance, as in the check and in CCA."""
    covariance = x.T.double().cov()
    covariance.diagonal().add_(1e-3 * covariance.diagonal().mean())
    return torch.linalg.inv(torch.linalg.cholesky(covariance)).T
