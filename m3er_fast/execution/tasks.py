"""What a pool of workers returns in place of a result."""

from __future__ import annotations

from typing import NamedTuple


class LostTask(NamedTuple):
    """Stands in for the result of a task that has lost several workers."""

    reason: str
