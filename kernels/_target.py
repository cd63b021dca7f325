"""Former place of :mod:`m3er_fast.kernels._device`."""

from m3er_fast.kernels._device import unavailable_reason

__all__ = ["unavailable_reason"]
