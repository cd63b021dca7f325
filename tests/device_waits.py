"""Counting, on any device, of the calls that would make the host wait for a GPU."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")


@contextlib.contextmanager
def counted_waits(monkeypatch):
    """Yield the list of calls that wait: numbers read by Python, shapes that depend on values, tensors of lists."""
    waits = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            if name in _WAITING or (
                name == "aten::index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1])
            ):
                waits.append(name)
            return func(*args, **(kwargs or {}))

    read, make = torch.Tensor.tolist, torch.tensor
    with monkeypatch.context() as patch, Counting():
        patch.setattr(torch.Tensor, "tolist", lambda self: waits.append("tolist") or read(self))
        patch.setattr(torch, "tensor", lambda *a, **k: waits.append("tensor") or make(*a, **k))
        yield waits
