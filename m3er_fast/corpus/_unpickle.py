"""Reading of untrusted pickles: NumPy arrays and plain builtins, nothing else.

A pickle is a program: it may call anything that `find_class` returns, and set the state of the results. `find_class`
therefore returns nothing of NumPy itself, only stand-ins that check their arguments: a crafted dtype state could
otherwise make NumPy read bytes as object pointers.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from m3er_fast.corpus.base import CorpusError

_BUILTINS = {kind.__name__: kind for kind in (bool, complex, dict, float, frozenset, int, list, set, str, tuple)}
_COLLECTIONS = {"OrderedDict": OrderedDict, "defaultdict": defaultdict}
_DTYPE_NAME_KINDS = "biufcSUO"
_NDARRAY = object()  # stands for numpy.ndarray: an argument of _reconstruct, not callable


class _RefusedError(Exception):
    """The pickle asks for something that is not admitted."""


def load_pickle(path: Path, *, encoding: str = "latin1") -> Any:
    """Load a pickle of NumPy arrays and plain builtins.

    Args:
        path: the file.
        encoding: how to decode byte strings of Python 2; arrays of Python 2 need ``"latin1"``.

    Raises:
        CorpusError: if the file asks for anything else, which the message names, or is not a complete pickle.
    """
    if not path.is_file():
        raise CorpusError(f"{path}: no such file")
    with path.open("rb") as stream:
        try:
            return _Unpickler(stream, encoding=encoding).load()
        except _RefusedError as error:
            raise CorpusError(
                f"{path}: the pickle asks for {error}, which is refused: only NumPy arrays and plain builtins are read"
            ) from error
        except OSError:
            raise
        except Exception as error:  # a broken pickle program can fail in any way
            message = " ".join(str(error).split())
            raise CorpusError(f"{path}: not a readable pickle: {type(error).__name__}: {message}") from error


class _Unpickler(pickle.Unpickler):
    """An unpickler that returns bound methods rather than functions: a pickle could set attributes of a function."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__"):
            if name in _BUILTINS:
                return _BUILTINS[name]
            if name == "bytes":  # Python 3's empty bytes in protocol 2
                return self._empty_bytes
        if module == "collections" and name in _COLLECTIONS:
            return _COLLECTIONS[name]
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _NDARRAY if name == "ndarray" else self._dtype
        # NumPy 2 renamed numpy.core to numpy._core; a pickle has the name of its writer.
        numpy_functions: dict[tuple[str, str], Callable[..., Any]] = {
            ("multiarray", "_reconstruct"): self._reconstruct,
            ("multiarray", "scalar"): self._scalar,
            ("numeric", "_frombuffer"): self._frombuffer,
        }
        package, _, submodule = module.rpartition(".")
        if package in ("numpy.core", "numpy._core") and (submodule, name) in numpy_functions:
            return numpy_functions[submodule, name]
        raise _RefusedError(f"{module}.{name}")

    def _empty_bytes(self) -> bytes:
        return b""

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise _RefusedError(f"the codec {encoding!r}")
        return text.encode("latin1")

    def _dtype(self, name: str, *_: Any) -> _PickledDtype:
        return _PickledDtype(name)

    def _reconstruct(self, kind: object, shape: tuple[int, ...], _: Any) -> _PickledArray:
        if kind is not _NDARRAY or shape != (0,):
            raise _RefusedError("an array of an unknown kind")
        return np.empty((0,), np.int8).view(_PickledArray)

    def _scalar(self, dtype: _PickledDtype, data: bytes | str = b"") -> Any:
        return self._frombuffer(data, dtype, (), "C")[()]

    def _frombuffer(self, data: Any, dtype: _PickledDtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
        if dtype.dtype.hasobject:
            raise _RefusedError("objects in a byte buffer")
        shape, real_dtype, data = _checked(shape, dtype, bytes(data) if isinstance(data, bytearray) else data)
        return np.ndarray(shape, real_dtype, bytearray(data) or bytearray(1), order="F" if order == "F" else "C")


class _PickledDtype:
    """A dtype in a pickle: a name such as ``f8``, then a state, of which only the byte order is used."""

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(name) if isinstance(name, str) else np.dtype("V")
        if self.dtype.kind not in _DTYPE_NAME_KINDS or self.dtype.hasobject != (self.dtype == np.dtype("O")):
            raise _RefusedError(f"the dtype {name!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subarray, names, fields = state[1:5]
        if subarray is not None or names is not None or fields is not None:
            raise _RefusedError("a structured dtype")
        self.dtype = self.dtype.newbyteorder(order)


class _PickledArray(np.ndarray):
    """An array whose state is checked before it is set."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        shape, real_dtype, data = _checked(shape, dtype, data)
        checked: Any = (1, shape, real_dtype, bool(fortran), data)
        super().__setstate__(checked)


def _checked(shape: Any, dtype: Any, data: Any) -> tuple[tuple[int, ...], np.dtype, Any]:
    """Check that shape, dtype and content of an array fit each other, and return them."""
    if not isinstance(dtype, _PickledDtype):
        raise _RefusedError("an array without a dtype")
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise _RefusedError(f"an array of shape {shape!r}")
    count = math.prod(shape)
    if dtype.dtype.hasobject:
        if not isinstance(data, list) or len(data) != count:
            raise _RefusedError("an object array without its list of objects")
        return shape, dtype.dtype, data
    if isinstance(data, str):  # a byte string of Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes) or len(data) != count * dtype.dtype.itemsize:
        raise _RefusedError("an array whose bytes do not fill its shape")
    return shape, dtype.dtype, data
