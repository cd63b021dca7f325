"""Files that others wrote: which of a folder are read, and one error for whatever their decoders raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m3er_fast.corpus.base import CorpusError


def is_hidden(name: str) -> bool:
    """Return whether a file is left out of every listing: its name begins with ``.`` or ``_``.

    macOS puts ``._part.parquet`` beside each file on a foreign disk, and Spark puts ``_metadata`` beside its parts.
    pyarrow, pandas, polars and Hugging Face datasets leave the same names out.
    """
    return name.startswith((".", "_"))


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder that match a pattern, sorted by name, without the hidden ones."""
    return [path for path in sorted(folder.glob(pattern)) if not is_hidden(path.name)]


@contextmanager
def decoding(name: str | Path, what: str) -> Iterator[None]:
    """Turn everything that decoding an untrusted file raises into a `CorpusError` that names the file.

    h5py, pyarrow and a pickle raise nearly anything for a damaged file: RuntimeError, AttributeError, KeyError,
    UnicodeDecodeError, OverflowError, MemoryError. A `CorpusError` stays as it is, and so does an ImportError: the
    package that would read the file is missing.

    Args:
        name: of the file.
        what: the problem, such as "not readable as Parquet", for the message.
    """
    try:
        yield
    except (CorpusError, ImportError):
        raise
    except Exception as error:
        raise CorpusError(f"{name}: {what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the message of an exception as one line; its type where it has no message or says too little."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, UnicodeDecodeError):
        return f"it holds text that is not UTF-8: {error.object[:40]!r}"
    return text if text and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}".rstrip(": ")
