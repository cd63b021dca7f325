"""Multiplicative fusion loss as a module (step 4 of the method)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from m3er_fast import functional
from m3er_fast.reference import Activation, Reduction, Variant


class MultiplicativeFusionLoss(nn.Module):
    """Multiplicative fusion loss of several modalities' classifiers.

    The module form of :func:`m3er_fast.functional.fusion_loss`, whose documentation gives the formula and every
    argument; the weights become buffers, so that they follow the module to its device.

    Example:
        >>> loss = MultiplicativeFusionLoss(beta=2.0)
        >>> loss(torch.zeros(3, 8, 6), torch.zeros(8, dtype=torch.int64)).item()  # (M, B, C) logits, (B,) labels
        0.8958...
    """

    class_weight: Tensor | None
    modality_weight: Tensor | None
    available: Tensor | None

    def __init__(
        self,
        *,
        variant: Variant = "m3er",
        beta: float = 1.0,
        detach_weight: bool = True,
        activation: Activation = "softmax",
        class_weight: Tensor | None = None,
        modality_weight: Tensor | None = None,
        available: Tensor | None = None,
        margin: float | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        # Settings of one run, not something a checkpoint should bring back.
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.register_buffer("modality_weight", modality_weight, persistent=False)
        self.register_buffer("available", available, persistent=False)
        self.options: dict[str, Any] = {
            "variant": variant,
            "beta": beta,
            "detach_weight": detach_weight,
            "activation": activation,
            "margin": margin,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "backend": backend,
        }

    def forward(self, logits: Tensor, target: Tensor, available: Tensor | None = None) -> Tensor:
        """The loss of (M, B, C) ``logits``; ``available`` (B, M) replaces the mask given at construction.

        Raises:
            ValueError: as :func:`m3er_fast.functional.fusion_loss` does.
        """
        return functional.fusion_loss(
            logits,
            target,
            class_weight=self.class_weight,
            modality_weight=self.modality_weight,
            available=self.available if available is None else available,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
