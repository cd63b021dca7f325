"""Whether two sets of features were made from recordings in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_MATTER = ("version",)  # of a library: features change with its settings and models, hardly with its version


def extraction_difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Return the first setting in which two extractions differ, in words; None if there is none.

    Args:
        wanted: how a model's features were made (``Corpus.extraction``).
        found: how others were made. A modality that they lack is no difference.
    """
    if wanted.get("steps") != found.get("steps"):
        return f"steps are {found.get('steps')}, wanted {wanted.get('steps')}"
    modalities = wanted.get("modalities", {})
    for modality, other in found.get("modalities", {}).items():
        own = modalities.get(modality, {})
        for key in sorted({*own, *other} - {*_NO_MATTER}):
            if own.get(key) != other.get(key):
                return f"{modality}: {key} is {other.get(key)}, wanted {own.get(key)}"
    return None
