"""The multiplicative fusion loss as a module (step 4 of the method)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from m3er_fast import functional
from m3er_fast._settings import takes_keywords_of
from m3er_fast.operands import LossKeywords, LossOptions


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

    def forward(self, logits: Tensor, target: Any, available: Tensor | None = None) -> Tensor:
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


def as_target(target: Any, like: Tensor) -> Tensor:
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
