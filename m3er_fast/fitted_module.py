"""Base classes of modules whose ``fit`` learns buffers, and contexts: of ordinary tensors, and of eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make ordinary tensors in the block, under ``torch.inference_mode`` too, so that they serve everywhere later."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class LastingModule(nn.Module):
    """A module whose tensors stay ordinary ones when it is moved, cast or copied under ``torch.inference_mode``."""

    @ordinary_tensors()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    @ordinary_tensors()
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        result.__setstate__({name: copy.deepcopy(value, memo) for name, value in state.items()})  # type: ignore[no-untyped-call]
        return result


class PreciseModule(LastingModule):
    """A module whose floating tensors move between devices and widen, but never get narrower than float32.

    ``.half()`` and ``.bfloat16()`` leave learned state as it is. They would round a mean of 1000 by more than a spread
    of 1, and scores rounded that coarsely no longer rank as the learned ones do.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.is_floating_point() and result.dtype != torch.promote_types(result.dtype, torch.float32):
                return tensor.to(result.device)
            return result

        super()._apply(keep_precision, recurse)
        return self

    def learned(self, name: str) -> Tensor:
        """Return the learned buffer of that name, without torch's search for attributes."""
        value = self._buffers[name]
        if value is None:
            raise RuntimeError(f"buffer {name!r} is not registered")
        return value


class FittedModule(PreciseModule):
    """A module whose learned buffers take their sizes from a loaded state dict.

    Buffers are registered empty: every instance has the same keys, and a strict load still refuses a state that lacks
    one. As buffers they follow ``.to()``, ``state_dict`` and DDP.
    """

    @ordinary_tensors()
    def register_learned(self, **values: Tensor) -> None:
        """Register learned buffers, or replace existing ones, whose devices and dtypes are kept."""
        for name, value in values.items():
            current = self._buffers.get(name)
            value = value.detach().clone() if current is None or value.is_inference() else value.detach()
            self.register_buffer(name, value if current is None else value.to(current))

    @ordinary_tensors()
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self._buffers.items():
            value = state_dict.get(prefix + name)
            if (
                buffer is not None
                and isinstance(value, Tensor)
                and (value.shape != buffer.shape or buffer.is_inference())
            ):
                self._buffers[name] = buffer.new_empty(value.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@ordinary_tensors()
def size_learned(model: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Give the learned buffers in a model the sizes of a state that is going to be loaded.

    Args:
        model: a model, or a module that holds one.
        sizes: names of ``model.state_dict()`` with tensors, or with sizes. Other names are passed over.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, FittedModule):
            for name, buffer in module._buffers.items():
                found = sizes.get(f"{prefix}.{name}" if prefix else name)
                size = found.shape if isinstance(found, Tensor) else found
                if buffer is not None and size is not None and tuple(size) != tuple(buffer.shape):
                    module._buffers[name] = buffer.new_zeros(tuple(size))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode; afterwards its modules are in the modes that they had before."""
    in_training = [module for module in model.modules() if module.training]
    if in_training:
        model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
