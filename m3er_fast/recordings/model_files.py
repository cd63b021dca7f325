"""Models that extractors need and that no package brings: found on this machine, or fetched once and checked."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from m3er_fast.atomic_files import replacing
from m3er_fast.recordings.word_vectors import sha256


class ModelFile(NamedTuple):
    """A file at a fixed address, with its content's checksum."""

    name: str
    address: str
    sha256: str
    licence: str


FACE_LANDMARKER = ModelFile(
    "face_landmarker.task",
    "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
    "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
    "Apache-2.0",
)

_TIMEOUT_S = 30.0


def cache_folder() -> Path:
    """Return the folder for what later runs use again: ``$M3ER_FAST_CACHE``, or ``m3er-fast`` in the user's caches."""
    own = os.environ.get("M3ER_FAST_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3er-fast"


def find(model: ModelFile, path: str | Path | None = None) -> Path:
    """Return where a model lies, after fetching it if need be.

    Args:
        model: which one.
        path: where the user has it; None looks into :func:`cache_folder`, and then fetches it there.

    Raises:
        ValueError: if there is no file at ``path``.
        OSError: if it cannot be fetched, or what was fetched is something else; the message says what to do.
    """
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist: wanted the file {model.name}, which is at {model.address}")
        return Path(path)
    kept = cache_folder() / model.name
    if kept.is_file() and sha256(kept) == model.sha256:
        return kept
    by_hand = f"download {model.address} by hand and name the file"
    try:
        with urllib.request.urlopen(model.address, timeout=_TIMEOUT_S) as answer:
            content = answer.read()
    except (OSError, urllib.error.URLError) as error:
        raise OSError(f"{model.name} cannot be fetched ({error}): {by_hand}") from error
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as partial:
        partial.write_bytes(content)
        if sha256(partial) != model.sha256:
            raise OSError(f"{model.name}: what was fetched is another file than expected: {by_hand}")
    return kept
