"""Memory that is used again from call to call.

The allocator returns pieces of some megabytes to the system, and getting them back costs a page fault per 4 KiB: up to
a third of the time of what is computed in them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes of each workspace of a thread, and of all that lies ready for the next training step.
MOST_WORKSPACE_BYTES = 2**25
MOST_READY_BYTES = 2**27

_of_thread = threading.local()
_ready: list[torch.UntypedStorage] = []
_lock = threading.Lock()


def workspace(number: int, dtype: torch.dtype, name: str = "memory") -> Tensor:
    """Memory for ``number`` numbers. The next call with this name on this thread overwrites it."""
    if number * dtype.itemsize > MOST_WORKSPACE_BYTES:
        return torch.empty(number, dtype=dtype)
    # Views of an inference tensor take half the time, but outside inference mode they may not be written to.
    kind = dtype, torch.is_inference_mode_enabled()
    current, flat = getattr(_of_thread, name, (None, torch.empty(0)))
    if current != kind or len(flat) < number:
        flat = torch.empty(number, dtype=dtype)
        setattr(_of_thread, name, (kind, flat))
    return flat[:number]


def take(number: int, dtype: torch.dtype) -> Tensor:
    """Memory for ``number`` numbers, the caller's own until it is given back or forgotten."""
    wanted = number * dtype.itemsize
    with _lock:
        for place, storage in enumerate(_ready):
            if wanted <= storage.nbytes() <= 2 * wanted:
                return torch.empty(0, dtype=dtype).set_(_ready.pop(place), 0, (number,), (1,))
    return torch.empty(number, dtype=dtype)


def give_back(memory: Sequence[Tensor]) -> None:
    """Keep memory that nobody reads any more for the next that take some; the oldest is forgotten first."""
    with _lock:
        _ready.extend(x.untyped_storage() for x in memory)
        while sum(storage.nbytes() for storage in _ready) > MOST_READY_BYTES:
            del _ready[0]
