"""The weights of layers that are computed together with others, not by their own ``forward``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from m3er_fast._warnings import warn_user

# Hooks before a layer's forward that only set its weight anew from the parameters that are trained.
_SETS_WEIGHT = (BasePruningMethod, SpectralNorm, WeightNorm)


def plain_tensors(
    name: str, layers: Iterable[nn.Module], kind: type[nn.Module], tensors: tuple[str, ...]
) -> list[list[Any]]:
    """Return the tensors of plain layers: what a call of each layer would compute with.

    Parametrisations see to that themselves; pruning, and the older weight norm and spectral norm, do before a call.

    Args:
        name: the name of the list of layers, for the error.
        layers: the layers.
        kind: the class whose ``forward`` the weights stand for.
        tensors: the names of all parameters of such a layer; the result has a list of them for each layer.

    Raises:
        ValueError: a layer computes something else, as a quantised or wrapped one does.

    Warns:
        UserWarning: a layer has other hooks, which are not called.
    """
    found = []
    for number, layer in enumerate(layers):
        if type(layer).forward is not kind.forward or "forward" in layer.__dict__:
            what = "with another forward" if isinstance(layer, kind) else f"({type(layer).__module__})"
            raise ValueError(
                f"layer {name}.{number} is a {type(layer).__name__} {what}, wanted a plain {kind.__name__}: "
                "its weights are read, and its forward is never called; quantise or wrap other layers, or use "
                "torch.nn.utils.parametrize"
            )
        if layer._forward_hooks or layer._forward_pre_hooks:
            _call_hooks(f"layer {name}.{number}", layer)
        # Plain parameters are found without torch's search for attributes, which takes ten times as long.
        parameters = layer._parameters
        is_plain = (*parameters,) == tensors
        found.append([*parameters.values()] if is_plain else [getattr(layer, tensor) for tensor in tensors])
    return found


def _call_hooks(name: str, layer: nn.Module) -> None:
    """Call the hooks that set the layer's weight, and warn of others."""
    hooks = list(layer._forward_pre_hooks.values())
    for hook in hooks:
        if isinstance(hook, _SETS_WEIGHT):
            hook(layer, ())
    if layer._forward_hooks or not all(isinstance(hook, _SETS_WEIGHT) for hook in hooks):
        warn_user(f"{name} has hooks that are not called: its weights are read, and its forward is never called")
