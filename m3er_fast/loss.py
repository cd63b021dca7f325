"""The multiplicative fusion loss as a module (step 4 of the method)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from m3er_fast import functional
from m3er_fast._settings import takes_keywords_of
from m3er_fast.inputs import Array
from m3er_fast.operands import Activation, LossKeywords, LossOptions


class MultiplicativeFusionLoss(nn.Module):
    """Multiplicative fusion loss of several modalities' classifiers.

    The module form of :func:`m3er_fast.functional.fusion_loss`, which documents the formula and every argument. The
    weights become buffers, so that they follow the module to its device.

    Example:
        >>> loss = MultiplicativeFusionLoss(beta=2.0)
        >>> loss(torch.zeros(3, 8, 6), torch.zeros(8, dtype=torch.int64)).item()  # (M, B, C) logits, (B,) labels
        0.8958...
    """

    class_weight: Tensor | None
    modality_weight: Tensor | None
    available: Tensor | None

    @takes_keywords_of(LossOptions)
    def __init__(
        self,
        *,
        class_weight: Tensor | None = None,
        modality_weight: Tensor | None = None,
        available: Tensor | None = None,
        backend: str = "auto",
        **options: Unpack[LossKeywords],
    ) -> None:
        super().__init__()
        # Settings of one run: a checkpoint should not bring them back.
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.register_buffer("modality_weight", modality_weight, persistent=False)
        self.register_buffer("available", available, persistent=False)
        self.options = LossOptions(**options)
        self.backend = backend

    def forward(self, logits: Tensor, target: Array, available: Tensor | None = None) -> Tensor:
        """Return the loss of (M, B, C) ``logits``; ``available`` (B, M) replaces the mask given at construction.

        Raises:
            ValueError: as :func:`m3er_fast.functional.fusion_loss` does.
        """
        if not isinstance(logits, Tensor):
            raise ValueError(f"logits must be a tensor of shape (M, B, C), got {type(logits).__name__}")
        target = as_target(target, logits)
        return functional.fusion_loss(
            logits,
            target,
            class_weight=self.class_weight,
            modality_weight=self.modality_weight,
            available=self.available if available is None else available,
            backend=self.backend,
            **self.options._asdict(),
        )

    def extra_repr(self) -> str:
        """Return the settings, for ``print(module)``."""
        settings = {**self.options._asdict(), "backend": self.backend}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def mean_weight(target: Tensor, activation: Activation, class_weight: Tensor | None) -> float:
    """Return how much a batch's mean loss counts beside those of other batches.

    Means of the parts of a batch, each times its weight, add up to the batch's mean times its own weight. The weight is
    the number of targets other than -100; of labels without "sigmoid", each counts with the weight of its class.

    Args:
        target: (B,) labels or (B, C).
        activation: of the loss.
        class_weight: (C,) on the target's device, or None for ones.
    """
    if activation == "sigmoid":
        return float((target != -100).sum())
    if target.is_floating_point():
        return float(len(target))
    labels = target[target != -100]
    return float(len(labels) if class_weight is None else class_weight[labels].double().sum())


def as_target(target: Array, like: Tensor) -> Tensor:
    """Return a target as a tensor; an array or a list comes to the device of ``like``.

    Raises:
        ValueError: if it does not hold numbers.
    """
    if isinstance(target, Tensor):
        return target
    try:
        return torch.as_tensor(target, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"target must be a tensor, an array or a list of labels or probabilities, got {type(target).__name__}"
        ) from error
