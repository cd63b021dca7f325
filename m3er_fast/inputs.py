"""The one place that checks users' features and turns them into tensors.

Dimension legend: M modalities, B batch, T time steps, d_m features of modality m.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._validation import check_positive_int

Array: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]
"""A tensor, a NumPy array, or nested sequences of numbers or truth values."""

Features: TypeAlias = Mapping[str, Array | None]
"""A mapping from modality name to a (B, T, d_m) or (B, d_m) tensor or array; missing or None means unavailable."""

FeatureSource: TypeAlias = Features | Iterable[Any]
"""One mapping, or a re-iterable source of batches: mappings or (mapping, lengths, available) tuples."""


class FeatureBatch(NamedTuple):
    """A checked batch: a tensor for every modality, with zeros in padding and where the modality is unavailable."""

    features: list[Tensor]  # M of (B, T, d_m), one floating dtype and device
    lengths: Tensor  # (B,) int64, valid leading frames of each sample
    available: Tensor  # (B, M) bool, False for absent modalities and samples without frames
    is_complete: bool = False  # known without a look at any value: every sample has every frame of every modality

    @property
    def frame_mask(self) -> Tensor:
        """(B, T) bool, True on the leading ``lengths`` frames."""
        steps = torch.arange(self.features[0].shape[1], device=self.lengths.device)
        return steps < self.lengths[:, None]


def check_input_dims(input_dims: Mapping[str, int]) -> dict[str, int]:
    """Return ``input_dims`` as a plain dict of positive ints.

    Raises:
        ValueError: if a name is not a non-empty string without dots, or a count is not a positive int.
    """
    if not isinstance(input_dims, Mapping) or not input_dims:
        raise ValueError(f"input_dims must map modality names to feature counts, got {input_dims!r}")
    for name, dim in input_dims.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"input_dims: a modality name must be a non-empty string without dots, got {name!r}")
        size: Any = dim
        check_positive_int(f"input_dims[{name!r}]", size.item() if isinstance(size, np.integer) else size)
    return {name: int(dim) for name, dim in input_dims.items()}


def prepare_batch(
    features: Features, lengths: Array | None = None, available: Array | None = None, *, input_dims: Mapping[str, int]
) -> FeatureBatch:
    """Check one batch of features against ``input_dims`` and return it in canonical form.

    Args:
        features: mapping from modality name to a (B, T, d_m) or (B, d_m) floating tensor or array. A modality that is
            missing or None is unavailable for the whole batch.
        lengths: (B,) integers in 0..T, the number of leading frames that are valid; None means all T.
        available: (B, M) booleans in the order of ``input_dims``; None means every modality given.
        input_dims: feature count of each modality.

    Raises:
        ValueError: naming the modality or argument, the shape got and the shape wanted.
    """
    if not isinstance(features, Mapping):
        raise ValueError(f"features must map modality names to tensors, got {type(features).__name__}")
    for name in features:
        if name not in input_dims:
            raise ValueError(f"features: unknown modality {name!r}; this model knows {list(input_dims)}")
    given: dict[str, Tensor] = {}
    for name, dim in input_dims.items():
        if (value := features.get(name)) is not None:
            given[name] = _as_sequence(name, value, dim)
    if not given:
        raise ValueError(f"features: none of the modalities {list(input_dims)} was given")
    first_name, first = next(iter(given.items()))
    batch, steps, _ = first.shape
    dtype, device = first.dtype, first.device
    for name, x in given.items():
        if x.shape[0] != batch or x.shape[1] != steps:
            raise ValueError(
                f"features[{name!r}] has shape {tuple(x.shape)}, but features[{first_name!r}] has "
                f"{tuple(first.shape)}: wanted ({batch}, {steps}, {input_dims[name]})"
            )
        if x.device != device:
            raise ValueError(f"features[{name!r}] is on {x.device}, but features[{first_name!r}] is on {device}")
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    length = check_lengths(lengths, batch, steps, device)
    # Filled on the device: a tensor made of a list would make the host wait for it.
    present = torch.ones((batch, len(input_dims)), dtype=torch.bool, device=device)
    tensors = []
    for m, (name, dim) in enumerate(input_dims.items()):
        if name in given:
            x = given[name]
            tensors.append(x if x.dtype == dtype else x.to(dtype))
        else:
            present[:, m] = False
            tensors.append(first.new_zeros((batch, steps, dim), dtype=dtype))
    if lengths is None and available is None:
        return FeatureBatch(tensors, length, present, is_complete=len(given) == len(input_dims))
    if available is not None:
        present = present & check_mask("available", available, present.shape, device)
    if lengths is not None:
        present = present & (length > 0)[:, None]
    result = FeatureBatch(tensors, length, present)
    # Padding and unavailable modalities may hold anything, NaN included, which must not reach any arithmetic.
    mask = result.frame_mask[:, :, None]
    return result._replace(features=[x.where(mask & present[:, m, None, None], 0.0) for m, x in enumerate(tensors)])


def iterate_batches(
    source: FeatureSource,
    lengths: Array | None = None,
    available: Array | None = None,
    *,
    input_dims: Mapping[str, int],
    batch_size: int = 4096,
) -> Iterator[FeatureBatch]:
    """Yield checked batches from one mapping, cut into ``batch_size`` rows, or from an iterable of batches.

    Raises:
        ValueError: if ``lengths`` or ``available`` are given beside an iterable (they belong inside its batches), or if
            the iterable is a one-shot iterator: fitting reads the data more than once.
    """
    if isinstance(source, Mapping):
        whole = prepare_batch(source, lengths, available, input_dims=input_dims)
        for start in range(0, whole.lengths.shape[0], batch_size):
            stop = start + batch_size
            yield FeatureBatch(
                [x[start:stop] for x in whole.features], whole.lengths[start:stop], whole.available[start:stop]
            )
        return
    if lengths is not None or available is not None:
        raise ValueError("lengths and available must come inside each batch, as (features, lengths, available)")
    if not isinstance(source, Iterable):
        raise ValueError(f"features must be a mapping or an iterable of batches, got {type(source).__name__}")
    if isinstance(source, Iterator):
        raise ValueError(
            "features is a one-shot iterator, but fitting reads it more than once: pass a list or a DataLoader"
        )
    for item in source:
        if isinstance(item, Mapping):
            yield prepare_batch(item, input_dims=input_dims)
        elif isinstance(item, Sequence) and len(item) in (1, 3):
            yield prepare_batch(*item, input_dims=input_dims)
        elif isinstance(item, Sequence) and len(item) == 2:  # what a loader of labelled data gives
            raise ValueError(
                "a batch of two may be (features, labels), and fitting takes no labels: wanted features alone, or "
                "(features, lengths, available), either of which may be None"
            )
        else:
            raise ValueError(f"a batch must be a mapping or (features, lengths, available), got {type(item).__name__}")


def _as_sequence(name: str, value: Any, dim: int) -> Tensor:
    """Return the modality as a floating (B, T, dim) tensor."""
    # The usual case needs no conversion, and no name for an error.
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.is_nested
    tensor: Tensor = value if is_plain else _as_tensor(f"features[{name!r}]", value)
    if not tensor.is_floating_point():
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"features[{name!r}] must hold real numbers, got {tensor.dtype}")
        tensor = tensor.to(torch.get_default_dtype())
    shape = tensor.shape
    if len(shape) == 2:
        tensor = tensor[:, None, :]
    if tensor.ndim != 3 or shape[-1] != dim or tensor.shape[1] == 0:
        raise ValueError(f"features[{name!r}] has shape {tuple(shape)}, wanted (B, T, {dim}) with T ≥ 1, or (B, {dim})")
    return tensor


def _as_tensor(name: str, value: Any) -> Tensor:
    """Return a tensor, array or sequence of numbers as a tensor, which shares its memory if torch can."""
    refuse_sparse(name, value)
    if isinstance(value, Tensor):
        return value
    got = type(value).__name__
    if isinstance(value, np.ndarray):
        got = f"an array of {value.dtype}"
        if not value.dtype.isnative or min(value.strides, default=0) < 0:  # such as x[::-1]
            value = value.astype(value.dtype.newbyteorder("="), order="C")
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor or a numeric array, got {got}") from error


def refuse_sparse(name: str, value: Any) -> None:
    """Raise a ValueError for a sparse or nested tensor of torch, or a sparse array of SciPy, which says what to do."""
    if isinstance(value, Tensor):
        if value.is_nested:
            raise ValueError(f"{name} is a nested tensor, wanted a padded one and lengths: value.to_padded_tensor(0.0)")
        if value.layout is not torch.strided:
            raise ValueError(f"{name} is sparse ({value.layout}), wanted a dense tensor: value.to_dense()")
    elif hasattr(value, "toarray"):
        raise ValueError(f"{name} is sparse (a {type(value).__name__}), wanted a dense array: value.toarray()")


def check_lengths(lengths: Array | None, batch: int, steps: int, device: torch.device) -> Tensor:
    """Return (B,) lengths in 0..T as int64 on ``device``; None stands for all T.

    Raises:
        ValueError: if they are not integers of shape (B,), or out of range (looked at on the CPU only).
    """
    if lengths is None:
        return torch.full((batch,), steps, dtype=torch.int64, device=device)
    length = _as_tensor("lengths", lengths)
    if length.is_floating_point() or length.is_complex() or length.dtype == torch.bool or length.shape != (batch,):
        raise ValueError(
            f"lengths must be integers of shape ({batch},), got {length.dtype} of shape {tuple(length.shape)}"
        )
    # Values are checked where that is free: on a GPU the host would have to wait for the device.
    if length.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = int(length.min()), int(length.max())
        if low < 0 or high > steps:
            raise ValueError(f"lengths must lie in 0..{steps}, got values from {low} to {high}")
    return length.to(device=device, dtype=torch.int64).clamp(0, steps)


def check_mask(name: str, mask: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return a boolean mask of ``shape`` (B, M) on ``device``.

    Raises:
        ValueError: if it is no boolean mask of that shape; ``name`` is its name in the message.
    """
    tensor = _as_tensor(name, mask)
    if tensor.dtype != torch.bool or tensor.shape != tuple(shape):
        raise ValueError(
            f"{name} must be booleans of shape {tuple(shape)}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return tensor.to(device)
