"""Reading of untrusted HDF5 files: only hard links to plain data that the file itself stores.

A file may point outside itself (external and soft links, virtual datasets, external storage) and so make the reader
open other files, or it may declare a shape far larger than its data. Both are refused by name, before anything is read.
A damaged file makes h5py raise nearly anything, anywhere: every function here raises a `CorpusError` instead.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from m3er_fast.corpus.base import CorpusError
from m3er_fast.corpus.files import decoding

# The highest compression ratio of Deflate, the strongest filter that HDF5 ships with.
_MAX_COMPRESSION = 1032
_UNREADABLE = "not readable as HDF5"
# A global heap, in which HDF5 keeps strings: its signature and version, then its size, then its objects.
_HEAP, _HEAP_HEADER, _OBJECT_HEADER = b"GCOL\x01\0\0\0", 16, 16


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open a file for `child` and `read_array`.

    Raises:
        CorpusError: if there is no such file, or it is not HDF5 or is damaged.
        ImportError: if h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading HDF5 files needs h5py: pip install 'm3er-fast[hdf5]'") from error
    if not path.is_file():
        raise CorpusError(f"{path}: no such file")
    with decoding(path, _UNREADABLE):
        file = h5py.File(path, "r")
    try:
        yield file
    finally:
        with decoding(path, _UNREADABLE):
            file.close()


@lru_cache(maxsize=1024)  # a file may hold the words of thousands of videos
def _check_heaps(path: Path, size: int, _changed: int) -> None:
    """Refuse a file with a damaged heap of strings: HDF5 allocates what it claims, or never finishes reading it.

    HDF5 2.0 loops for ever where a heap has free space of size 0, and takes gigabytes where a heap claims them. The
    whole file is searched, so this is left to files whose strings are wanted.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_HEAP)
        while start >= 0:
            place = start + _HEAP_HEADER
            end = start + int.from_bytes(content[start + 8 : place], "little")
            if not place <= end <= size:
                raise CorpusError(f"{path}: {_UNREADABLE}: a heap of strings claims {end - start} bytes")
            while place + _OBJECT_HEADER <= end:
                number = int.from_bytes(content[place : place + 2], "little")
                claimed = int.from_bytes(content[place + 8 : place + 16], "little")
                # Free space has number 0, and its size counts its header.
                step = claimed if number == 0 else _OBJECT_HEADER + -(-claimed // 8) * 8
                if step < _OBJECT_HEADER or place + step > end:
                    raise CorpusError(f"{path}: {_UNREADABLE}: a heap of strings holds one of {claimed} bytes")
                place += step
            start = content.find(_HEAP, start + 1)


def names_in(group: Any, path: Path) -> list[str]:
    """Return the names of a group's members, including every kind of link."""
    with decoding(path, _UNREADABLE):
        return list(group.keys())


def child(group: Any, name: str, path: Path) -> Any:
    """Return the member ``name`` of a group, which must be stored in the file itself.

    Raises:
        CorpusError: if there is no such member, or it is a soft, external or user-defined link.
    """
    import h5py

    with decoding(path, _UNREADABLE):
        where = f"{group.name.rstrip('/')}/{name}"
        if name not in names_in(group, path):
            raise CorpusError(f"{path}: there is no {where}")
        try:
            link = group.get(name, getlink=True)
        except (TypeError, ValueError) as error:
            raise CorpusError(f"{path}: {where} is a user-defined link, which is refused") from error
        if isinstance(link, h5py.ExternalLink):
            raise CorpusError(f"{path}: {where} is an external link to {link.filename!r}, which is refused")
        if isinstance(link, h5py.SoftLink):
            raise CorpusError(f"{path}: {where} is a soft link to {link.path!r}, which is refused")
        return group[name]


def group_at(parent: Any, name: str, path: Path) -> Any:
    """Return the group ``name`` of a group; see `child`."""
    import h5py

    found = child(parent, name, path)
    if not isinstance(found, h5py.Group):
        raise CorpusError(f"{path}: {name} is not a group")
    return found


def read_array(group: Any, name: str, path: Path) -> np.ndarray:
    """Read the dataset ``name`` of a group; see `child`. One that declares no shape is an empty array.

    Raises:
        CorpusError: if it is not a dataset of numbers or strings, is virtual, is stored in another file, or declares a
            larger shape than its stored bytes could unpack to.
    """
    import h5py

    with decoding(path, _UNREADABLE):
        dataset = child(group, name, path)
        if not isinstance(dataset, h5py.Dataset):
            raise CorpusError(f"{path}: {dataset.name} is not a dataset")
        if dataset.is_virtual:
            raise CorpusError(f"{path}: {dataset.name} is a virtual dataset, which is refused")
        if dataset.external:
            raise CorpusError(f"{path}: {dataset.name} is stored in another file, {dataset.external[0][0]!r}: refused")
        if dataset.dtype.kind not in "biufS" and h5py.check_string_dtype(dataset.dtype) is None:
            raise CorpusError(f"{path}: {dataset.name} holds {dataset.dtype}, wanted numbers or strings")
        if dataset.shape is None:
            return np.zeros(0, np.float32)
        _check_size(dataset, path)
        if h5py.check_string_dtype(dataset.dtype) is not None and dataset.dtype.kind == "O":
            about = path.stat()
            _check_heaps(path, about.st_size, about.st_mtime_ns)
            _check_lengths(dataset, path)
        return np.asarray(dataset[()])


def _check_size(dataset: Any, path: Path) -> None:
    """Refuse a dataset, or a chunk of it, that declares more than the bytes of the file can unpack to."""
    size = path.stat().st_size
    stored = min(dataset.id.get_storage_size(), size)
    ratio = _MAX_COMPRESSION if dataset.id.get_create_plist().get_nfilters() else 1
    chunk = math.prod(dataset.chunks) if dataset.chunks and dataset.size else 0
    for elements, most, what in (
        (dataset.size, stored, f"shape {dataset.shape}"),
        (chunk, size, f"chunks of {dataset.chunks}"),
    ):
        if elements * dataset.id.get_type().get_size() > most * ratio:
            raise CorpusError(f"{path}: {dataset.name} declares {what}, more than the {most} bytes it stores can hold")


def _check_lengths(dataset: Any, path: Path) -> None:
    """Refuse strings that claim to be longer than the file: HDF5 allocates what they claim, up to 4 GiB each."""
    offset = dataset.id.get_offset()  # None unless all elements are in one place
    if offset is None or not dataset.size:
        return
    with path.open("rb") as stream:
        stream.seek(offset)
        stored = stream.read(16 * dataset.size)  # of each: length (4 bytes), address of a heap, number in it
    lengths = np.frombuffer(stored[: len(stored) // 16 * 16], "<u4")[::4]
    if lengths.max(initial=0) > path.stat().st_size:
        raise CorpusError(f"{path}: {dataset.name} holds a string that claims {lengths.max()} bytes")
