"""Reading of untrusted pickles: NumPy arrays and plain builtins, nothing else.

A pickle is a program: it may call anything that `find_class` returns, and set the state of the results. `find_class`
therefore returns nothing of NumPy or Python itself, only stand-ins that check their arguments: a crafted dtype state
could otherwise make NumPy read bytes as object pointers.

Time and memory are bounded by the size of the file, whatever the program says. The memo is a dict, where that of
Python's C unpickler has as many entries as the largest index in the file. A length is read as far as the file goes.
Copies are counted. Lists that hold one list many times, at every level, would grow exponentially when they become an
array, and so would the time to hash such tuples: both are refused.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from m3er_fast.corpus.base import CorpusError
from m3er_fast.corpus.files import decoding

_DTYPE_NAME_KINDS = "biufcSUO"
_NDARRAY = object()  # stands for numpy.ndarray: an argument of _reconstruct, not callable
_NAMED_ONLY = object()  # stands for the classes that a pickle may name, as the default of a defaultdict, but not call
_NAMES = frozenset(("bool", "dict", "float", "int", "list", "str", "tuple"))
# One object may stand in several places, but arrays of a file's data are hardly larger than the file.
_MOST_SHARING, _SMALL_BYTES = 16, 2**26
_LONG_READ = 2**16
_MOST_EMPTY_ROWS = 2**20  # of an array of shape (n, 0), which takes no byte however large n is


class _RefusedError(Exception):
    """The pickle asks for something that is not admitted."""


def load_pickle(path: Path, *, encoding: str = "latin1") -> Any:
    """Load a pickle of NumPy arrays and plain builtins.

    Args:
        path: the file.
        encoding: how to decode byte strings of Python 2; arrays of Python 2 need ``"latin1"``.

    Raises:
        CorpusError: if the file asks for anything else, which the message names, or is not a complete pickle.
        OSError: if the file cannot be opened.
    """
    if not path.is_file():
        raise CorpusError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as stream, decoding(path, "not a readable pickle"):

        def read(count: int) -> bytes:
            # Asked for more bytes than there are, a file would allocate them all the same.
            return stream.read(count if count < _LONG_READ else min(count, size - stream.tell()))

        try:
            value = _Unpickler(read, stream.readline, size, encoding).load()
            _check_sharing(value, max(_MOST_SHARING * size, _SMALL_BYTES))
        except _RefusedError as error:
            raise CorpusError(
                f"{path}: the pickle asks for {error}, which is refused: only NumPy arrays and plain builtins are read"
            ) from error
    return value


class _Unpickler(pickle._Unpickler):
    """An unpickler that returns bound methods rather than functions: a pickle could set attributes of a function.

    It is Python's own in Python, and not in C: see the module. A file of IEMOCAP, 30,000 arrays, takes 0.25 s instead
    of 0.1 s, one of MMSA with few large arrays as long.
    """

    dispatch: ClassVar[Any] = dict(pickle._Unpickler.dispatch)

    def __init__(self, read: Callable[[int], bytes], readline: Callable[[], bytes], size: int, encoding: str) -> None:
        super().__init__(_Stream(read, readline), encoding=encoding)
        self._copied, self._size = 0, size

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__"):
            if name in _NAMES:
                return _NAMED_ONLY
            # "bytes": Python 3's empty bytes in protocol 2
            calls = {"bytes": self._empty_bytes, "complex": self._complex, "set": self._set}
            calls["frozenset"] = self._frozenset
            if name in calls:
                return calls[name]
        if module == "collections" and name in ("OrderedDict", "defaultdict"):
            return self._ordered_dict if name == "OrderedDict" else self._defaultdict
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

    def load_bytearray8(self) -> None:
        """Read a bytearray without allocating more than the file holds."""
        self.load_binbytes8()  # type: ignore[attr-defined]
        self.stack[-1] = bytearray(self.stack[-1])  # type: ignore[attr-defined]

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def count_copy(self, amount: int) -> None:
        """Count bytes or elements that are copied; each stands in an honest file once."""
        self._copied += amount
        if self._copied > 2 * self._size:
            raise _RefusedError("more copies of its data than the file has bytes")

    def _empty_bytes(self) -> bytes:
        return b""

    def _complex(self, real: float, imaginary: float) -> complex:
        return complex(real, imaginary)

    def _set(self, items: Collection[Any] = ()) -> set[Any]:
        self.count_copy(len(items))
        _check_keys(items)
        return set(items)

    def _frozenset(self, items: Collection[Any] = ()) -> frozenset[Any]:
        return frozenset(self._set(items))

    def _ordered_dict(self, items: Collection[Any] = ()) -> OrderedDict[Any, Any]:
        self.count_copy(len(items))
        _check_keys(key for key, _ in items)
        return OrderedDict(items)

    def _defaultdict(self, default: object = None) -> defaultdict[Any, Any]:
        return defaultdict()

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise _RefusedError(f"the codec {encoding!r}")
        self.count_copy(len(text))
        return text.encode("latin1")

    def _dtype(self, name: str, *_: Any) -> _PickledDtype:
        return _PickledDtype(name, self.count_copy)

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

    def __init__(self, name: str, count_copy: Callable[[int], None]) -> None:
        self.count_copy = count_copy
        self.dtype = np.dtype(name) if isinstance(name, str) else np.dtype("V")
        if self.dtype.kind not in _DTYPE_NAME_KINDS or self.dtype.hasobject != (self.dtype == np.dtype("O")):
            raise _RefusedError(f"the dtype {str(name)[:40]!r}" if isinstance(name, str) else "a dtype without a name")

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
    if not isinstance(shape, tuple) or not all(isinstance(size, int) for size in shape):
        raise _RefusedError("an array whose shape is not a tuple of integers")
    if min(shape, default=0) < 0:
        raise _RefusedError(f"an array of shape {shape}")
    count = math.prod(shape)
    if dtype.dtype.hasobject:
        if not isinstance(data, list) or len(data) != count:
            raise _RefusedError("an object array without its list of objects")
        dtype.count_copy(count)
        return shape, dtype.dtype, data
    if isinstance(data, str):  # a byte string of Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes) or len(data) != count * dtype.dtype.itemsize:
        raise _RefusedError("an array whose bytes do not fill its shape")
    if not data and max(shape, default=0) > _MOST_EMPTY_ROWS:
        raise _RefusedError(f"an array without a byte, of shape {shape}")
    dtype.count_copy(len(data))
    return shape, dtype.dtype, data


class _Stream:
    """The two functions of a file that an unpickler calls."""

    def __init__(self, read: Callable[[int], bytes], readline: Callable[[], bytes]) -> None:
        self.read, self.readline = read, readline


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys that hold containers: the time to hash a tuple that holds one tuple many times is exponential."""
    for key in keys:
        if isinstance(key, tuple | frozenset) and any(isinstance(item, tuple | frozenset) for item in key):
            raise _RefusedError("a key that holds tuples")


def _with_checked_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    def load_checked(unpickler: Any) -> None:
        _check_keys(unpickler.stack[keys])
        load(unpickler)

    return load_checked


# The positions of keys among the objects that an opcode takes from the stack.
for _opcode, _keys in (
    (pickle.SETITEM, slice(-2, -1)),
    (pickle.SETITEMS, slice(0, None, 2)),
    (pickle.DICT, slice(0, None, 2)),
    (pickle.ADDITEMS, slice(None)),
    (pickle.FROZENSET, slice(None)),
):
    _Unpickler.dispatch[_opcode[0]] = _with_checked_keys(_Unpickler.dispatch[_opcode[0]], _keys)


def _check_sharing(value: Any, most: int) -> None:
    """Refuse a value that takes more than ``most`` bytes once every object in it is written as often as it is held."""
    sizes: dict[int, float] = {}  # of every container that has been left; infinite while it is entered
    waiting = [value]
    while waiting:
        current = waiting[-1]
        held = _held_by(current)
        if held is None or sizes.get(id(current), math.inf) < math.inf:
            waiting.pop()
        elif id(current) not in sizes:
            sizes[id(current)] = math.inf
            for item in held:
                if sizes.get(id(item)) == math.inf:
                    raise _RefusedError("a list that holds itself")
                if _held_by(item) is not None and id(item) not in sizes:
                    waiting.append(item)
        else:
            total = sum(sizes[id(item)] if _held_by(item) is not None else _plain_bytes(item) for item in held)
            if total > most:
                raise _RefusedError("one list many times, at every level")
            sizes[id(waiting.pop())] = 8 + total


def _held_by(value: Any) -> Collection[Any] | None:
    """Return the objects that a container holds, or None for anything else."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, np.ndarray):
        return value.ravel().tolist() if value.dtype.hasobject else None
    return value if isinstance(value, list | tuple | set | frozenset) else None


def _plain_bytes(value: Any) -> int:
    return int(value.nbytes) if isinstance(value, np.ndarray) else len(value) if isinstance(value, str | bytes) else 8
