"""Files that others wrote: which of a folder are read, and one error for whatever their decoders raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

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


_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_SAMPLE_BYTES = 1024
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "ZIP"}
_OTHER_FORMATS = {b"\x89HDF\r\n\x1a\n": "HDF5", b"PAR1": "Parquet", b"ARROW1": "Arrow IPC"}


def foreign_content(path: str | Path, wanted: str = "") -> str | None:
    """Return what a file is instead of the data that its name promises, and what to do; None if nothing is known.

    Args:
        path: of the file.
        wanted: a text that names the format it should have.
    """
    file = Path(path)
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        head = stream.read(_SAMPLE_BYTES)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs."):
        return "it is a Git LFS pointer, not the data: fetch them with git lfs pull"
    if b"/annex/objects/" in head:
        return "it is a git-annex pointer, not the data: fetch them with git annex get"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page (HTML), not the data: its address leads to a page about the file"
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return f"it is compressed ({name}): unpack it first"
    for magic, name in _OTHER_FORMATS.items():
        if head.startswith(magic) and name not in wanted:
            return f"it holds data in another format, {name}"
    return None


def corpus_files(folder: Path, pattern: str) -> list[Path]:
    """Return the visible files of a folder, and of the folders in it that Hive would read, such as ``split=train``."""
    inner = [path for path in visible_files(folder, "*=*") if path.is_dir()]
    own = [path for path in visible_files(folder, pattern) if not path.is_dir()]
    return own + [file for path in inner for file in corpus_files(path, pattern)]


def hive_values(path: str) -> dict[str, str | None]:
    """Return the values of columns that the folders of a path name, such as ``split=train/part.parquet``."""
    values: dict[str, str | None] = {}
    for folder in path.split("/")[:-1]:
        key, separator, value = folder.partition("=")
        if separator:
            values[unquote(key)] = None if value == _HIVE_NULL else unquote(value)
    return values


@contextmanager
def decoding(name: str | Path, what: str) -> Iterator[None]:
    """Turn everything that decoding an untrusted file raises into a `CorpusError` that names the file.

    h5py, pyarrow and a pickle raise nearly anything for a damaged file: RuntimeError, AttributeError, KeyError,
    UnicodeDecodeError, OverflowError, MemoryError. A `CorpusError` stays as it is, and so does an ImportError: the
    package that would read the file is missing.

    Args:
        name: of the file; if it is a path, a web page or a pointer in place of the data is recognised.
        what: the problem, such as "not readable as Parquet", for the message.
    """
    try:
        yield
    except (CorpusError, ImportError):
        raise
    except Exception as error:
        raise CorpusError(f"{name}: {what}: {foreign_content(name, what) or one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the message of an exception as one line, with its type unless the message says enough."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    text = " ".join(str(error).split())
    says_enough = isinstance(error, OSError | ValueError) and not isinstance(error, UnicodeError)
    return text if text and says_enough else f"{type(error).__name__}: {text}".rstrip(": ")
