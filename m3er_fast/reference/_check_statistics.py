"""The statistics of utterance vectors that the modality check judges by (method step 1).

Dimension legend: M modalities, B samples, d_m features of modality m, P pairs of modalities, k components of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m3er_fast.operands import CheckProjections, CheckStatistics, modality_pairs, upcast


def check_statistics(features: Sequence[Tensor], projections: CheckProjections) -> CheckStatistics:
    """Statistics of pairs and modalities; :func:`m3er_fast.functional.check_statistics` documents them."""
    centered = [upcast(x) - c.to(upcast(x)) for x, c in zip(features, projections.center, strict=True)]
    batch, dtype = centered[0].shape[0], centered[0].dtype
    largest = torch.finfo(dtype).max
    correlation, likelihood = [], []
    for p, (i, j) in enumerate(modality_pairs(len(features))):
        u = F.linear(centered[i], projections.left[p].to(dtype), projections.left_bias[p].to(dtype))
        v = F.linear(centered[j], projections.right[p].to(dtype), projections.right_bias[p].to(dtype))
        correlation.append(_pearson(u * projections.weight[p].to(dtype), v * projections.weight[p].to(dtype)))
        s = projections.canonical[p].to(dtype)
        u, v = _unit(u), _unit(v)
        # s²u² - 2suv + s²v² as s²(u - v)² - 2s(1 - s)uv: near s = 1, where it is divided by little, nothing cancels.
        odds = s.square() * (u - v).square() / (2.0 * (1.0 - s) * (1.0 + s)) - s * u * v / (1.0 + s)
        ratio = -0.5 * (torch.log1p(-s) + torch.log1p(s)).sum() - odds.sum(dim=1)
        likelihood.append(ratio.nan_to_num(-largest, -largest, -largest))
    energy = []
    for x, whitener in zip(centered, projections.whitener, strict=True):
        whitened = F.linear(x, whitener.to(dtype))
        energy.append((whitened.square().sum(dim=1) / max(whitener.shape[0], 1)).nan_to_num(largest, largest))
    none = centered[0].new_zeros((batch, 0))
    return CheckStatistics(
        torch.stack(correlation, dim=1) if correlation else none,
        torch.stack(energy, dim=1),
        torch.stack(likelihood, dim=1) if likelihood else none,
    )


def _pearson(u: Tensor, v: Tensor) -> Tensor:
    """Pearson's correlation over the components of (B, k) u and v; 0 where it is undefined."""
    if not u.shape[1]:
        return u.new_zeros(u.shape[0])
    u, v = u - u.mean(dim=1, keepdim=True), v - v.mean(dim=1, keepdim=True)
    u_norm, v_norm = u.norm(dim=1), v.norm(dim=1)
    cosine = (u / u_norm[:, None] * (v / v_norm[:, None])).sum(dim=1).clamp(-1.0, 1.0)
    defined = (u_norm > 0) & (v_norm > 0) & torch.isfinite(cosine)
    return torch.where(defined, cosine, 0.0)


def _unit(x: Tensor) -> Tensor:
    """The rows of x (B, k) with a mean square of 1; a row of zeros stays."""
    if not x.shape[1]:
        return x
    largest = x.abs().amax(dim=1, keepdim=True)  # first, so that no square overflows
    x = x / torch.where(largest > 0, largest, 1.0)
    rms = x.square().mean(dim=1, keepdim=True).sqrt()
    return x / torch.where(rms > 0, rms, 1.0)
