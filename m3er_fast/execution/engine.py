"""The engine that executes a job: this process, or Ray workers."""

from __future__ import annotations

from typing import Literal, TypeAlias

from m3er_fast._validation import check_choice

Engine: TypeAlias = Literal["local", "ray"]


def check_engine(engine: str, address: str | None, workers: int | None) -> None:
    """Check the arguments that choose an engine; nothing is started.

    Args:
        engine: one of :data:`Engine`.
        address: of a Ray cluster.
        workers: number of Ray workers.

    Raises:
        ImportError: ``engine`` is "ray", and Ray is missing.
        ValueError: an argument is out of range, or belongs to the other engine.
    """
    check_choice("engine", engine, Engine)
    if engine == "ray":
        # Here, because the command line shows its help without torch.
        from m3er_fast.execution.ray_pool import check_ray

        if not isinstance(address, str | None):
            raise ValueError(f"address must be a string such as 'HOST:PORT', or None, got {address!r}")
        check_ray(workers)
    elif (address, workers) != (None, None):
        raise ValueError(f"address and workers are for engine 'ray', got {address!r} and {workers!r} with 'local'")
