"""The fusion loss as one node of autograd's graph, its gradient made on the way forward.

``cpu`` and ``kernels.fusion_loss`` compute value and gradient in one pass over the logits. What is left of the
backward pass is a factor, the incoming gradient; and a second derivative, which only the reference has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from m3er_fast import reference


class FusionLossPass(Protocol):
    """A module that computes the loss of checked arguments."""

    def loss_and_gradient(
        self,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        modality_weight: Tensor | None,
        available: Tensor | None,
        settings: Mapping[str, Any],
        *,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the gradient of the logits, which is empty if not wanted."""

    def scale_(self, gradient: Tensor, incoming: Tensor) -> Tensor:
        """The gradient times a number (), in place."""


def fusion_loss(
    computed_by: FusionLossPass,
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None,
    modality_weight: Tensor | None,
    available: Tensor | None,
    **settings: Any,
) -> Tensor:
    """:func:`m3er_fast.functional.fusion_loss` of checked arguments, differentiable in the logits."""
    tensors = (logits, target, class_weight, modality_weight, available)
    if torch.is_grad_enabled() and logits.requires_grad:
        loss: Tensor = _FusionLoss.apply(*tensors, settings, computed_by)[0]  # type: ignore[no-untyped-call]
        return loss
    return computed_by.loss_and_gradient(*tensors, settings, with_gradient=False)[0]


class _FusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        *arguments, computed_by = inputs
        return computed_by.loss_and_gradient(*arguments, with_gradient=True)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.settings, ctx.computed_by = inputs
        ctx.save_for_backward(output[1], *tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if incoming is None:
            return (None,) * 7
        gradient, logits, *others = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself may be differentiated
            return (_reference_gradient(incoming, logits, others, ctx.settings), *[None] * 6)
        # A backward may run again, and what it has returned belongs to the caller: only the last is free to scale the
        # gradient where it lies.
        if incoming.ndim or gradient.dtype != logits.dtype or _backward_may_repeat() or _is_batched(incoming):
            scaled = gradient * (incoming[:, None] if incoming.ndim == 1 else incoming)
        else:
            scaled = ctx.computed_by.scale_(gradient, incoming)
        return (scaled.to(logits.dtype), *[None] * 6)


def _reference_gradient(incoming: Tensor, logits: Tensor, others: Sequence[Any], settings: Mapping[str, Any]) -> Tensor:
    target, class_weight, modality_weight, available = others
    weights: dict[str, Any] = {"class_weight": class_weight, "modality_weight": modality_weight, "available": available}
    _, pull_back, *_ = torch.func.vjp(lambda x: reference.fusion_loss(x, target, **weights, **settings), logits)
    gradient: Tensor = pull_back(incoming)[0]
    return gradient


def _is_batched(x: Tensor) -> bool:
    """Whether ``x`` stands for several gradients, as under ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x))


def _backward_may_repeat() -> bool:
    """Whether the running backward keeps its graph; if torch does not tell, it may."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or bool(tell())
