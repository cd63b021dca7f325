"""What decides the result of a training, as a record that a resumed run compares with its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3er_fast.config import M3ERConfig


class ResumeMismatchError(RuntimeError):
    """A run folder holds a training that was begun with another corpus or configuration, or is damaged."""


def run_fingerprint(config: M3ERConfig, data: dict[str, Any], statistics: str | None) -> dict[str, Any]:
    """Return everything that decides the result of a training run, by name: settings as they are, data as digests.

    Args:
        config: all settings.
        data: the fingerprint of the corpus.
        statistics: the digest of statistics that were fitted separately, or None.
    """
    return {**_flat(config.to_dict()), **data, "statistics": statistics}


def check_fingerprint(found: dict[str, Any], wanted: dict[str, Any], out: Path, epochs_done: int) -> None:
    """Raise a ResumeMismatchError that names the differences unless the run in ``out`` can become the one asked for."""
    if not isinstance(found, dict):
        raise TypeError("a fingerprint is a dict")  # of an earlier version; resuming_from says so
    if found == wanted or goes_on(found, wanted, epochs_done):
        return
    differing = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    # A part that only one of them has differs as a whole.
    differing = [name for name in differing if name.rpartition(".")[0] not in differing]
    differences = [
        f"other {name}" if _is_data(name) else f"{name} = {found.get(name)}, now {wanted.get(name)}"
        for name in differing
    ]
    more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
    raise ResumeMismatchError(
        f"{out} holds a training that differs: {'; '.join(differences[:5])}{more}. Give another folder, or begin anew "
        "(--no-resume)"
    )


def goes_on(found: dict[str, Any], wanted: dict[str, Any], epochs_done: int) -> bool:
    """Return whether a run has done so far what one of other epochs or another patience would have done."""
    differing = {name for name in {**wanted, **found} if found.get(name) != wanted.get(name)}
    if not differing <= {"training.epochs", "training.patience"}:
        return False
    if "training.epochs" in differing and wanted["training.schedule"] != "constant":  # it decides every learning rate
        return False
    before, now = (
        math.inf if one["training.patience"] is None else one["training.patience"] for one in (found, wanted)
    )
    return bool(now >= before and wanted["training.epochs"] >= epochs_done)


def array_digest(values: NDArray[Any]) -> str:
    """Return a digest of an array's bytes."""
    return _digest(np.ascontiguousarray(values).data)


def text_digest(texts: Iterable[str]) -> str:
    """Return a digest of some texts, none of which contains a line break."""
    return _digest("\n".join(texts).encode())


def _is_data(name: str) -> bool:
    """Whether a part of a fingerprint is a digest, which says nothing to a reader."""
    return name.startswith("features of ") or name in {
        *("utterances", "shards", "splits", "lengths", "availability", "labels", "statistics"),
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{prefix}{name}": "given", **_flat(value, f"{prefix}{name}.")}
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
