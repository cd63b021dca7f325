"""Implementations that compute gradients themselves, as nodes of autograd's graph.

Second derivatives are the reference's: only it consists of torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from m3er_fast import reference
from m3er_fast.operands import LossFactors, LossOptions, MemoryScanWeights


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast rounds nothing."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()  # which takes less time
    return torch.autocast(device.type, enabled=False)


# --- Multiplicative fusion loss: the gradient is computed in the forward pass ---


class OnePassLoss(Protocol):
    """A module that computes the loss of checked arguments and its gradient in one pass over the logits."""

    def loss_and_gradient(
        self, logits: Tensor, target: Tensor, factors: LossFactors, options: LossOptions, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor] | None:
        """The loss, and the gradient of the logits, which is empty if not wanted; None if they are too extreme."""

    def scale_(self, gradient: Tensor, incoming: Tensor) -> Tensor:
        """Multiply the gradient by a number (), in place."""


def fusion_loss(
    implementation: OnePassLoss,
    otherwise: Callable[[Tensor, Tensor, LossFactors, LossOptions], Tensor],
    logits: Tensor,
    target: Tensor,
    factors: LossFactors,
    options: LossOptions,
) -> Tensor:
    """The loss, differentiable in the logits; by ``otherwise`` where they are too extreme for the implementation."""
    trains = torch.is_grad_enabled() and logits.requires_grad
    found = implementation.loss_and_gradient(logits.detach(), target, factors, options, with_gradient=trains)
    if found is None:
        return otherwise(logits, target, factors, options)
    if not trains:
        return found[0]
    loss: Tensor = _FUSION_LOSS(logits, found, (implementation, target, factors, options))
    return loss


# Functions take their context in ``forward``: binding the arguments of a ``setup_context`` takes longer than a small
# loss. Transforms of torch.func, which need one, are refused by the implementations.


class _FusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, found: tuple[Tensor, Tensor], call: tuple[Any, ...]) -> Tensor:
        loss, gradient = found
        ctx.save_for_backward(gradient, logits)
        ctx.call = call
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
        gradient, logits = ctx.saved_tensors
        implementation, *call = ctx.call
        if torch.is_grad_enabled():  # the gradient itself may be differentiated
            _, pull_back, *_ = torch.func.vjp(lambda x: reference.fusion_loss_of(x, *call), logits)
            return pull_back(incoming)[0], None, None
        # A backward pass may run again, and the caller owns what the last one returned. Only when neither can happen
        # may the gradient be scaled where it lies.
        if incoming.ndim or gradient.dtype != logits.dtype or _backward_may_repeat() or _is_batched(incoming):
            scaled = gradient * (incoming[:, None] if incoming.ndim == 1 else incoming)
            return scaled.to(logits.dtype), None, None
        return implementation.scale_(gradient, incoming), None, None


# Transforms of torch.func are refused, so what ``Function.apply`` does for them, in a microsecond, is left out.
_FUSION_LOSS: Any = super(torch.autograd.Function, _FusionLoss).apply


def _is_batched(x: Tensor) -> bool:
    """Whether ``x`` stands for several gradients, as under ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x))


def _backward_may_repeat() -> bool:
    """Whether the running backward pass keeps its graph; assumed if this torch cannot tell."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is None or bool(keeps_graph())


# --- Memory scan: the forward pass keeps what the backward pass needs ---


class TwoPassScan(Protocol):
    """A module that scans checked arguments, forward and backward."""

    def memory_scan(
        self, features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, *, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and memory, without gradients."""

    def forward(
        self, features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, dropout: float
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Hidden states, memory, and what ``backward`` needs."""

    def backward(
        self,
        hidden_grad: Tensor,
        memory_grad: Tensor,
        features: Sequence[Tensor],
        lengths: Tensor,
        weights: MemoryScanWeights,
        dropout: float,
        blocks: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of the wanted features, and of every weight."""

    def release(self, blocks: Sequence[Tensor]) -> None:
        """Take back what ``forward`` returned for ``backward``, which runs no more."""


def memory_scan(
    implementation: TwoPassScan,
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    *,
    dropout: float,
    trains: bool,
) -> tuple[Tensor, Tensor]:
    """Scan, differentiably in features and weights if ``trains``."""
    if not trains:
        with without_autocast(torch.device("cpu")):
            return implementation.memory_scan(features, lengths, weights, dropout=dropout)
    tensors = [*features, *weights.tensors()]
    hidden, memory, *_ = _MemoryScan.apply(implementation, len(features), dropout, lengths, *tensors)  # type: ignore[no-untyped-call]
    return hidden, memory


def tracked_memory_scan(
    scan: Callable[..., tuple[Tensor, Tensor]], *arguments: Any, dropout: float, trains: bool
) -> tuple[Tensor, Tensor]:
    """Scan by torch's own operations, with autograd's share of each call only if ``trains``."""
    with without_autocast(torch.device("cpu")):
        if trains:
            return scan(*arguments, dropout=dropout)
        with torch.inference_mode():
            hidden, memory = scan(*arguments, dropout=dropout)
    return hidden.clone(), memory.clone()  # ordinary tensors, which a later gradient can use


class _MemoryScan(torch.autograd.Function):
    @staticmethod
    def forward(
        implementation: TwoPassScan, modalities: int, dropout: float, lengths: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        # Dropout's random state: the second derivative, which the reference computes, draws the same masks again.
        state = torch.get_rng_state()
        features, weights = tensors[:modalities], MemoryScanWeights.of(modalities, tensors[modalities:])
        with without_autocast(torch.device("cpu")):
            hidden, memory, blocks = implementation.forward(features, lengths, weights, dropout)
        return hidden, memory, state, *blocks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.implementation, ctx.modalities, ctx.dropout, lengths, *tensors = inputs
        hidden, memory, *kept = output
        ctx.tensors, ctx.shapes = len(tensors), (hidden.shape, memory.shape)
        ctx.save_for_backward(lengths, *tensors, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # autograd would make zeros for everything that is kept

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        lengths, *saved = ctx.saved_tensors
        tensors, (state, *blocks) = saved[: ctx.tensors], saved[ctx.tensors :]
        features, weights = tensors[: ctx.modalities], MemoryScanWeights.of(ctx.modalities, tensors[ctx.modalities :])
        hidden_grad, memory_grad = (
            weights.bias.new_zeros(shape) if grad is None else grad
            for grad, shape in zip(incoming, ctx.shapes, strict=False)
        )
        if torch.is_grad_enabled():  # the gradients themselves may be differentiated
            with torch.random.fork_rng(devices=()):
                torch.set_rng_state(state)
                grads = reference.memory_scan_gradients(
                    hidden_grad, memory_grad, features, lengths, weights, ctx.dropout
                )
        else:
            wanted = ctx.needs_input_grad[-ctx.tensors :][: ctx.modalities]
            with without_autocast(torch.device("cpu")):
                grads = ctx.implementation.backward(
                    hidden_grad, memory_grad, features, lengths, weights, ctx.dropout, blocks, wanted
                )
            if not _backward_may_repeat():
                ctx.implementation.release(blocks)
        return None, None, None, None, *grads
