"""The textbook: the shortest correct PyTorch that a user would write for each operation and for the whole model.

This is the contestant that goals and ratios count against, eager and compiled. It takes clean input only: no missing
modality, no padding, no labels to ignore, and no care for logits so extreme that a probability rounds to 0 or 1.
``textbook_weights.py`` gives these modules the weights of a fitted model.

Dimension legend: M modalities, B samples, T steps, C classes, d features of a modality, h hidden size, u memory size,
P pairs of modalities, k components of a pair, Q queries, K neighbours, n rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fusion_loss(
    logits: Tensor, target: Tensor, *, variant: str = "m3er", beta: float = 1.0, detach_weight: bool = True
) -> Tensor:
    """Mean multiplicative fusion loss of labels (B,) for logits (M, B, C), under softmax."""
    modalities = len(logits)
    log_p = logits.log_softmax(dim=-1).gather(-1, target.expand(modalities, -1)[..., None])[..., 0]
    if variant == "original":
        evidence = torch.log1p(-log_p.exp())
        evidence = evidence.sum(dim=0) - evidence
    elif variant == "m3er_cross":
        evidence = log_p.sum(dim=0) - log_p
    else:
        evidence = log_p
    weight = (beta / (modalities - 1) * (evidence.detach() if detach_weight else evidence)).exp()
    return -(weight * log_p).sum(dim=0).mean()


class CheckStatistics:
    """The statistics of docs/method.md, formula by formula: correlation, energy and log likelihood ratio.

    Args:
        mean: (d,) training mean of each modality.
        pairs: of each pair its rotations (d_i, k), (d_j, k) and its canonical correlations (k,).
        whitener: (d, r) of each modality.
    """

    def __init__(
        self, mean: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor, Tensor]], whitener: Sequence[Tensor]
    ) -> None:
        self.mean, self.pairs, self.whitener = mean, pairs, whitener

    def __call__(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, P), (B, M) and (B, P) for the utterance vectors (B, d) of each modality."""
        centered = [x - mean for x, mean in zip(features, self.mean, strict=True)]
        correlation, likelihood = [], []
        numbers = itertools.combinations(range(len(features)), 2)
        for (i, j), (left, right, canonical) in zip(numbers, self.pairs, strict=True):
            u, v = centered[i] @ left, centered[j] @ right
            likelihood.append(_log_likelihood_ratio(u, v, canonical.clamp(max=0.999)))
            u, v = u * canonical.sqrt(), v * canonical.sqrt()
            correlation.append(F.cosine_similarity(u - u.mean(1, keepdim=True), v - v.mean(1, keepdim=True)))
        energy = [(x @ whitener).square().mean(dim=1) for x, whitener in zip(centered, self.whitener, strict=True)]
        return torch.stack(correlation, dim=1), torch.stack(energy, dim=1), torch.stack(likelihood, dim=1)


def _log_likelihood_ratio(u: Tensor, v: Tensor, canonical: Tensor) -> Tensor:
    u, v = (x / x.square().mean(dim=1, keepdim=True).sqrt() for x in (u, v))
    rest = 1.0 - canonical.square()
    explained = canonical.square() * (u.square() + v.square()) - 2.0 * canonical * u * v
    return -0.5 * (rest.log() + explained / rest).sum(dim=1)


def sequence_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, variance and change (B, d) of frames (B, T, d), and the repeated frames (B,)."""
    difference = x.diff(dim=1)
    change = difference.square().sum(dim=1) / (2 * max(difference.shape[1], 1))
    repeated = (difference == 0).all(dim=2).sum(dim=1)
    return x.mean(dim=1), x.var(dim=1, correction=0), change, repeated


def local_least_squares(query: Tensor, bank: Tensor, target: Tensor, neighbors: Tensor, ridge: float) -> Tensor:
    """Proxies (Q, e) from the K neighbours (Q, K) of queries (Q, d) in a bank (n, d) with partners (n, e)."""
    rows = bank[neighbors]
    gram = rows @ rows.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += ridge * diagonal.mean(dim=1, keepdim=True)
    weight = torch.linalg.solve(gram, rows @ query[:, :, None])
    return (weight * target[neighbors]).sum(dim=1)


def nearest(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and row numbers (Q, k) of the nearest rows of a bank (n, d)."""
    found = torch.cdist(query, bank).topk(k, largest=False)
    return found.values, found.indices


def cca(x: Tensor, y: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations (d, k) of two views (n, d) and their canonical correlations (k,): covariance, whitening, one SVD."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    left, right = _whitener(x), _whitener(y)
    u, correlations, v = torch.linalg.svd(left.T @ (x.T @ y / (len(x) - 1)) @ right, full_matrices=False)
    return left @ u[:, :components], right @ v[:components].T, correlations[:components]


def _whitener(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x.T @ x / (len(x) - 1))
    return vectors / values.sqrt()


class Network(nn.Module):
    """The classification network, step by step: LSTM cells with feedback, attention, a gated memory, fusion, heads.

    Args:
        dims: d of each modality.
        classes: C.
        feedback: whether the attended cells enter the LSTMs' next step.
    """

    def __init__(self, dims: Sequence[int], classes: int, *, feedback: bool = True) -> None:
        super().__init__()
        hidden, memory, fusion, modalities = 32, 128, 32, len(dims)
        cells = 2 * hidden * modalities
        self.hidden, self.memory = hidden, memory
        self.lstms = nn.ModuleList(nn.LSTMCell(dim + 2 * hidden * feedback, hidden) for dim in dims)
        self.feedback = feedback
        self.attention = _two_layers(cells, 128, cells)
        self.candidate = _two_layers(cells, 64, memory)
        self.retain = _two_layers(cells + memory, 64, memory)
        self.update = _two_layers(cells + memory, 64, memory)
        self.fusion = nn.ModuleList(nn.Linear(hidden, fusion) for _ in dims)
        self.head = _two_layers(fusion + memory, 64, classes)
        self.modality_heads = nn.ModuleList(nn.Linear(hidden, classes) for _ in dims)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits (B, C), and those of each modality's own head (M, B, C), for sequences (B, T, d)."""
        hidden, memory = self.scan(features)
        fused = torch.stack([layer(h) for layer, h in zip(self.fusion, hidden, strict=True)]).prod(dim=0)
        own = torch.stack([head(h) for head, h in zip(self.modality_heads, hidden, strict=True)])
        return self.head(torch.cat([fused, memory], dim=1)), own

    def scan(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the last hidden states, M of (B, h), and the memory (B, u)."""
        batch, steps = features[0].shape[:2]
        zeros = features[0].new_zeros(batch, self.hidden)
        hidden, cell = [zeros] * len(features), [zeros] * len(features)
        memory = features[0].new_zeros(batch, self.memory)
        attended = features[0].new_zeros(batch, 2 * len(features) * self.hidden)
        for t in range(steps):
            inputs = [x[:, t] for x in features]
            if self.feedback:
                own = attended.unflatten(1, (2, -1, self.hidden)).transpose(1, 2).flatten(2).unbind(dim=1)
                inputs = [torch.cat(pair, dim=1) for pair in zip(inputs, own, strict=True)]
            old = cell
            states = [lstm(x, (h, c)) for lstm, x, h, c in zip(self.lstms, inputs, hidden, cell, strict=True)]
            hidden, cell = [h for h, _ in states], [c for _, c in states]
            both = torch.cat([*old, *cell], dim=1)
            attended = self.attention(both).softmax(dim=1) * both
            context = torch.cat([attended, memory], dim=1)
            candidate = self.candidate(attended).tanh()
            memory = self.retain(context).sigmoid() * memory + self.update(context).sigmoid() * candidate
        return hidden, memory


class Model(nn.Module):
    """Standardised features and the network, with the training loss; no check and no proxies.

    Args:
        mean, scale: (d,) of each modality.
        network: what classifies.
    """

    def __init__(self, mean: Sequence[Tensor], scale: Sequence[Tensor], network: Network) -> None:
        super().__init__()
        self.mean, self.scale, self.network = mean, scale, network

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the network returns."""
        return self.network(
            [(x - mean) / scale for x, mean, scale in zip(features, self.mean, self.scale, strict=True)]
        )

    def loss(self, features: Sequence[Tensor], target: Tensor) -> Tensor:
        """Return the fusion loss of the modality heads + the cross entropy of the fused head."""
        logits, own = self(features)
        return fusion_loss(own, target, variant="original") + F.cross_entropy(logits, target)


def _two_layers(size: int, inner: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, inner), nn.ReLU(), nn.Linear(inner, out))
