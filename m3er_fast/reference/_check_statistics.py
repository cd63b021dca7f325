"""The two statistics of the modality check (method step 1).

Dimension legend: M modalities, B samples, d_m features of modality m, P pairs of modalities, k components of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.operands import CheckProjections, modality_pairs, upcast


def check_statistics(features: Sequence[Tensor], projections: CheckProjections) -> tuple[Tensor, Tensor]:
    """Correlation per pair and energy per modality; :func:`m3er_fast.functional.check_statistics` documents it."""
    centered = [upcast(x) - c.to(upcast(x)) for x, c in zip(features, projections.center, strict=True)]
    correlation = []
    for p, (i, j) in enumerate(modality_pairs(len(features))):
        x, y = centered[i], centered[j]
        u = F.linear(x, projections.left[p].to(x), projections.left_bias[p].to(x))
        v = F.linear(y, projections.right[p].to(y), projections.right_bias[p].to(y))
        u_norm, v_norm = u.norm(dim=1), v.norm(dim=1)
        cosine = (u / u_norm[:, None] * (v / v_norm[:, None])).sum(dim=1).clamp(-1.0, 1.0)
        defined = (u_norm > 0) & (v_norm > 0) & torch.isfinite(cosine)
        correlation.append(torch.where(defined, cosine, 0.0))
    energy = []
    for x, whitener in zip(centered, projections.whitener, strict=True):
        whitened = F.linear(x, whitener.to(x))
        largest = torch.finfo(x.dtype).max
        energy.append((whitened.square().sum(dim=1) / max(whitener.shape[0], 1)).nan_to_num(largest, largest))
    batch = centered[0].shape[0]
    stacked = torch.stack(correlation, dim=1) if correlation else centered[0].new_zeros((batch, 0))
    return stacked, torch.stack(energy, dim=1)
