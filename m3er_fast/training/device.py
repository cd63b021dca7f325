"""The device that trains, and how batches reach it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from m3er_fast.config import Precision
from m3er_fast.training.data import TrainingBatch

_AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16}


def find_device(name: str) -> torch.device:
    """Return the device of a name: "cpu", "cuda", "cuda:N", or "auto" for the first GPU if there is one.

    Raises:
        ValueError: if it is no such name, or there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(name, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch finds {torch.cuda.device_count()} GPUs here")
    return device


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a model's layers compute in a precision; what must not be rounded is not."""
    dtype = _AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def batches_on(device: torch.device, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
    """Yield batches on a device. To a GPU, the next one is copied while one is used, and the host waits for neither."""
    return _copied_ahead(device, batches) if device.type == "cuda" else batches


def _copied_ahead(device: torch.device, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead = None
    for batch in batches:
        with torch.cuda.stream(copying):
            # torch keeps a pinned tensor until the copies from it are done.
            copied = batch.map(lambda x: x.pin_memory().to(device, non_blocking=True))
        following = copied, copying.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = following
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: TrainingBatch, copied: torch.cuda.Event, device: torch.device) -> TrainingBatch:
    """Let the computing stream wait for a copy, and torch know that it uses the memory."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)

    def use(x: Tensor) -> Tensor:
        x.record_stream(computing)
        return x

    return batch.map(use)
