"""Calibration: a temperature that makes the fused head as sure as it is right.

Dimension legend: N samples, C classes.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from m3er_fast import functional
from m3er_fast.fitted_module import PreciseModule, ordinary_tensors
from m3er_fast.operands import Activation, upcast

LOWEST, HIGHEST = 0.01, 100.0
"""The range of temperatures. At either end probabilities are all but certain, or all but equal."""

_HALVINGS = 60  # of the range of log T, to less than a rounding error of float64
_IGNORED = -100


class TemperatureScaling(PreciseModule):
    """Divides logits by a temperature T; 1 until it is fitted.

    Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599). T > 1 makes a model less sure. The
    order of classes, and the side of 0.5 on which an answer lies, stay as they are.

    The temperature is a buffer. A state without one, as of an earlier version, loads as T = 1.
    """

    temperature: Tensor

    @ordinary_tensors()
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))

    @property
    def is_fitted(self) -> bool:
        """Whether the temperature differs from 1, at which probabilities stay as they are."""
        return self.temperature.item() != 1.0

    def forward(self, logits: Tensor) -> Tensor:
        """Return ``logits`` / T, in at least float32."""
        return upcast(logits) / self.temperature

    @torch.no_grad()
    def fit(self, logits: Tensor, target: Tensor, activation: Activation = "softmax") -> Self:
        """Set T to :func:`fit_temperature` of the arguments."""
        self.temperature.fill_(fit_temperature(logits, target, activation))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}temperature"
        value = state_dict.setdefault(name, torch.ones_like(self.temperature))
        if isinstance(value, Tensor) and (value.numel() != 1 or not 0.0 < value.item() < math.inf):
            error_messages = args[-1]
            error_messages.append(f"{name} must be one positive number, got {value.tolist()}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the temperature, for ``print(module)``."""
        return f"temperature={self.temperature.item():.4g}"


@torch.no_grad()
def fit_temperature(logits: Tensor, target: Tensor, activation: Activation = "softmax") -> float:
    r"""Return the temperature with the least negative log likelihood of labels that the model was not trained on.

    With a = 1/T and p = softmax(a·z) or sigmoid(a·z), the likelihood -Σ t log p is convex in a, and its derivative
    Σ (p - t)·z is 0 at the best T, which is found by halving the range of log T. To the n labels comes one that is not
    known, spread evenly over all samples: t becomes (n·t + u) / (n + 1), with u = 1/C for every class, or 1/2 for every
    question. It counts for little unless there are few labels, and where all of them are predicted right it keeps the
    model from being certain.

    Args:
        logits: (N, C), of the fused head.
        target: (N,) labels, or (N, C) distributions or answers to yes/no questions, as in the loss. Integers of -100
            are left out.
        activation: "softmax" over the classes or an elementwise "sigmoid".

    Returns:
        T, from 0.01 to 100; 1 if there is no label, or if all logits of a sample are equal, in every sample.

    Raises:
        ValueError: if shapes or labels do not fit, as for :func:`m3er_fast.functional.fusion_loss`, or a logit is not
            finite.

    Example:
        >>> logits = torch.tensor([[6.0, 0.0]] * 3 + [[0.0, 6.0]])  # 99.8 % sure, and right in 3 of 4
        >>> round(fit_temperature(logits.repeat(250, 1), torch.tensor([0] * 1000)), 2)
        5.47
    """
    if not bool(logits.isfinite().all()):
        raise ValueError("logits must be finite to fit a temperature, got NaN or infinity")
    functional.fusion_loss(logits[None], target, activation=activation)  # checks shapes and labels
    z, target = logits.double(), target.to(logits.device)
    if activation == "softmax":
        if target.ndim == 1:
            z, target = z[target != _IGNORED], target[target != _IGNORED]
        z = z - z.amax(dim=1, keepdim=True)
    t = torch.nn.functional.one_hot(target.clamp(min=0), z.shape[1]) if target.ndim == 1 else target
    t = t.double()
    if activation == "sigmoid":
        kept = (target != _IGNORED).view(len(z), -1).expand_as(z)
        z, t = z[kept][:, None], t[kept][:, None]
    if not z.numel() or not bool(z.any()):
        return 1.0
    unknown = 0.5 if activation == "sigmoid" else 1.0 / z.shape[1]
    t = (len(z) * t + unknown) / (len(z) + 1)
    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        scaled = z * math.exp(-middle)
        p = scaled.sigmoid() if activation == "sigmoid" else scaled.softmax(dim=1)
        too_sure = bool(((p - t) * z).sum() > 0)
        low, high = (middle, high) if too_sure else (low, middle)
    return math.exp((low + high) / 2)
