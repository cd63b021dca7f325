"""Reading of untrusted HDF5 files: only hard links to plain data that the file itself stores.

A file may point outside itself (external and soft links, virtual datasets, external storage) and so make the reader
open other files, or it may declare a shape far larger than its data. Both are refused by name, before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from m3er_fast.corpus.base import CorpusError

# The highest compression ratio of Deflate, the strongest filter that HDF5 ships with.
_MAX_COMPRESSION = 1032


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open a file for `child` and `read_array`.

    Raises:
        CorpusError: if there is no such file, or it is not HDF5 or is truncated.
        ImportError: if h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading HDF5 files needs h5py: pip install 'm3er-fast[hdf5]'") from error
    if not path.is_file():
        raise CorpusError(f"{path}: no such file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


def _unreadable(path: Path, error: Exception) -> CorpusError:
    return CorpusError(f"{path}: not readable as HDF5: {' '.join(str(error).split())}")


def names_in(group: Any, path: Path) -> list[str]:
    """Return the names of a group's members, including every kind of link."""
    try:
        return list(group.keys())
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise _unreadable(path, error) from error


def child(group: Any, name: str, path: Path) -> Any:
    """Return the member ``name`` of a group, which must be stored in the file itself.

    Raises:
        CorpusError: if there is no such member, or it is a soft, external or user-defined link.
    """
    import h5py

    where = f"{group.name.rstrip('/')}/{name}"
    if name not in names_in(group, path):
        raise CorpusError(f"{path}: there is no {where}")
    try:
        link = group.get(name, getlink=True)
    except (TypeError, ValueError) as error:
        raise CorpusError(f"{path}: {where} is a user-defined link, which is refused") from error
    if isinstance(link, h5py.ExternalLink):
        raise CorpusError(f"{path}: {where} is an external link to {link.filename!r}, which is refused")
    if not isinstance(link, h5py.HardLink):
        raise CorpusError(f"{path}: {where} is a soft link to {link.path!r}, which is refused")
    try:
        return group[name]
    except (OSError, RuntimeError, KeyError) as error:
        raise _unreadable(path, error) from error


def group_at(parent: Any, name: str, path: Path) -> Any:
    """Return the group ``name`` of a group; see `child`."""
    import h5py

    found = child(parent, name, path)
    if not isinstance(found, h5py.Group):
        raise CorpusError(f"{path}: {found.name} is not a group")
    return found


def read_array(group: Any, name: str, path: Path) -> np.ndarray:
    """Read the dataset ``name`` of a group; see `child`.

    Raises:
        CorpusError: if it is not a dataset of numbers or strings, is virtual, is stored in another file, or declares a
            larger shape than its stored bytes could unpack to.
    """
    import h5py

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
        raise CorpusError(f"{path}: {dataset.name} is empty")
    declared = dataset.size * dataset.id.get_type().get_size()
    packed = dataset.id.get_create_plist().get_nfilters() > 0
    if declared > dataset.id.get_storage_size() * (_MAX_COMPRESSION if packed else 1):
        raise CorpusError(
            f"{path}: {dataset.name} declares shape {dataset.shape}, more than the "
            f"{dataset.id.get_storage_size()} bytes it stores can hold"
        )
    try:
        return np.asarray(dataset[()])
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        raise _unreadable(path, error) from error
