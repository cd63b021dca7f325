"""What runs: this process, or workers of Ray."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Engine: TypeAlias = Literal["local", "ray"]


def check_engine(engine: str, address: str | None, workers: int | None) -> None:
    """Raise if what was asked for cannot run; nothing is started.

    Args:
        engine: one of :data:`Engine`.
        address: of a Ray cluster.
        workers: of Ray.

    Raises:
        ImportError: Ray is wanted and missing.
        ValueError: an argument is out of range, or is for the other engine.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be 'local' or 'ray', got {engine!r}")
    if engine == "ray":
        from m3er_fast.scoring.ray import check_ray

        if not isinstance(address, str | None):
            raise ValueError(f"address must be a string such as 'HOST:PORT', or None, got {address!r}")
        check_ray(workers)
    elif (address, workers) != (None, None):
        raise ValueError(f"address and workers are for engine 'ray', got {address!r} and {workers!r} with 'local'")
