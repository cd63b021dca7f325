"""The restricted unpickler: NumPy arrays and plain builtins are loaded, everything else is refused by name."""

import bz2
import codecs
import gzip
import os
import pickle
import pickletools
import time
import tracemalloc
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
from corpus_fixtures import Hostile, write_pickle

from m3er_fast.corpus import CorpusError
from m3er_fast.corpus._unpickle import load_pickle

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(3, dtype=">i4"),
    np.array(["a", "bc"]),
    np.array([b"a", b"bc"]),
    np.array([True, False]),
    np.zeros((0, 3)),
    np.array(1.5),
    np.array([np.nan, -np.inf]),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_come_through_every_protocol(tmp_path, array, protocol):
    loaded = load_pickle(write_pickle(tmp_path / "a.pkl", {"x": array}, protocol))["x"]
    assert loaded.dtype == pickle.loads(pickle.dumps(array, protocol)).dtype
    np.testing.assert_array_equal(np.asarray(loaded), array)
    assert loaded.flags.writeable


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_builtins_and_scalars_come_through_every_protocol(tmp_path, protocol):
    value = {
        "list": [1, 2.5, None, True, "é", b"\xff", b"", 3j],
        "set": {1, 2},
        "frozen": frozenset({"a"}),
        "ordered": OrderedDict(a=1),
        "default": defaultdict(list, a=[1]),
        "scalar": np.float64(0.5),
        "integer": np.int32(-7),
    }
    loaded = load_pickle(write_pickle(tmp_path / "a.pkl", value, protocol))
    assert loaded == value
    assert loaded["scalar"].dtype == np.float64


def test_object_arrays_hold_what_is_itself_admitted(tmp_path):
    ragged = np.empty(2, dtype=object)
    ragged[0], ragged[1] = np.arange(3), ["x", None]
    loaded = load_pickle(write_pickle(tmp_path / "a.pkl", ragged))
    np.testing.assert_array_equal(np.asarray(loaded[0]), np.arange(3))
    assert loaded[1] == ["x", None]


# What Python 2 with NumPy 1.13 writes for {"a": array([1.5, -2.0])} in protocol 2, with numpy.core and byte strings.
PYTHON_2 = (
    b"\x80\x02}q\x01U\x01aq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01bq\x06"
    b"\x87q\x07Rq\x08(K\x01K\x02\x85q\tcnumpy\ndtype\nq\nU\x02f8q\x0bK\x00K\x01\x87q\x0cRq\r(K\x03U\x01<q\x0eNNNJ\xff\xff"
    b"\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb\x89U\x10\x00\x00\x00\x00\x00\x00\xf8?\x00\x00\x00\x00\x00\x00\x00\xc0q\x10tq"
    b"\x11bs."
)


@pytest.mark.parametrize("package", [b"numpy.core", b"numpy._core"])
def test_python_2_pickles_are_read_under_both_names_of_numpy(tmp_path, package):
    path = tmp_path / "a.pkl"
    path.write_bytes(PYTHON_2.replace(b"numpy.core", package))
    np.testing.assert_array_equal(np.asarray(load_pickle(path)["a"]), [1.5, -2.0])


def test_python_2_builtin_names_are_read(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02c__builtin__\nset\n]U\x01aa\x85R.")
    assert load_pickle(path) == {"a"}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Hostile(os.system, "true"), f"{os.system.__module__}.system"),
        (Hostile(eval, "1"), "(builtins|__builtin__).eval"),
        (Hostile(getattr, {}, "keys"), "(builtins|__builtin__).getattr"),
        (Hostile(np.load, "x.npy"), "numpy.load"),
        (Hostile(codecs.open, "x"), "codecs.open"),
        (Hostile(np.frombuffer, b"x"), "frombuffer"),
        (Path("x"), "pathlib"),
        (np.dtype([("a", "f4")]), "structured dtype|the dtype 'V4'"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "the dtype 'M8'"),
        (np.float64, "numpy.float64"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, value, name, protocol):
    path = write_pickle(tmp_path / "a.pkl", [1, {"x": value}], protocol)
    with pytest.raises(CorpusError, match=f"asks for .*({name}).*which is refused") as caught:
        load_pickle(path)
    assert str(path) in str(caught.value)


def test_nothing_is_run_before_it_is_refused(tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(CorpusError, match="refused"):
        load_pickle(write_pickle(tmp_path / "a.pkl", Hostile(os.system, f"touch {marker}")))
    assert not marker.exists()


def test_an_object_array_cannot_smuggle_a_call(tmp_path):
    array = np.empty(1, dtype=object)
    array[0] = Hostile(os.system, "true")
    with pytest.raises(CorpusError, match="system, which is refused"):
        load_pickle(write_pickle(tmp_path / "a.pkl", array))


def crafted(state, dtype=b"f8"):
    """An array pickle with a state of our own, in protocol 2."""
    head = PYTHON_2[: PYTHON_2.index(b"(K\x01K\x02")].replace(b"}q\x01U\x01aq\x02", b"")
    dtype_program = (
        b"cnumpy\ndtype\nU\x02" + dtype + b"K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return head + state.replace(b"DTYPE", dtype_program) + b"b."


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (crafted(b"(K\x01K\x02\x85DTYPE\x89U\x08" + bytes(8) + b"t"), "bytes do not fill its shape"),
        (crafted(b"(K\x01K\x01\x85DTYPE\x89U\x08" + bytes(8) + b"t", b"O8"), "an object array without its list"),
        (crafted(b"(K\x01J\xff\xff\xff\x7fK\x00\x86DTYPE\x89U\x00t"), r"an array without a byte, of shape \(21"),
        (crafted(b"(K\x01J\xff\xff\xff\xff\x85DTYPE\x89U\x00t"), r"an array of shape \(-1,\)"),
        (crafted(b"(K\x01K\x01\x85N\x89U\x08" + bytes(8) + b"t"), "an array without a dtype"),
        (b"\x80\x02cnumpy\nndarray\n(K\x02tR.", "TypeError"),
        (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\x00\x00\x00\x40\x85U\x01b\x87R.",
            "unknown kind",
        ),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "the codec 'rot13'"),
    ],
)
def test_crafted_array_states_are_refused(tmp_path, program, message):
    path = tmp_path / "a.pkl"
    path.write_bytes(program)
    pickletools.dis(program, out=(tmp_path / "dis").open("w"))  # the program itself is well formed
    with pytest.raises(CorpusError, match=message):
        load_pickle(path)


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(np.arange(1000))[:-50], b"\x80\x63."])
def test_broken_pickles_give_one_line(tmp_path, content):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="not a readable pickle") as caught:
        load_pickle(path)
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"a\.pkl: no such file"):
        load_pickle(tmp_path / "a.pkl")


def test_a_wrong_encoding_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02U\x01\xe9.")
    assert load_pickle(path) == "é"
    with pytest.raises(CorpusError, match="UnicodeDecodeError"):
        load_pickle(path, encoding="ascii")


def peak_bytes(path):
    """Return the most memory that reading a pickle takes at a time, and the error that it ends in, if any."""
    error = None
    tracemalloc.start()
    try:
        load_pickle(path)
    except CorpusError as problem:
        error = problem
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, error


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02}r" + (0x0FFFFFFF).to_bytes(4, "little") + b".",  # a memo index
        b"}p268435455\n.",
        b"\x80\x04B" + (2**32 - 1).to_bytes(4, "little") + b"x.",  # lengths
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
        b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"].",
        b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"\1.",
    ],
    ids=["memo", "memo in text", "bytes", "long bytes", "text", "bytearray", "frame", "integer"],
)
def test_a_number_in_a_file_of_a_few_bytes_allocates_no_more_than_a_few(tmp_path, program):
    path = tmp_path / "a.pkl"
    path.write_bytes(program)
    assert peak_bytes(path)[0] < 10**6


def doubled(start, times=60):
    """A program that puts an object twice into a container of its own, again and again."""
    return start + b"2\x86" * times


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (doubled(b"\x80\x02K\x01") + b".", "one list many times"),
        (doubled(b"\x80\x02}(K\x01") + b"K\x01u.", "a key that holds tuples"),
        (doubled(b"\x80\x02}K\x01") + b"K\x01s.", "a key that holds tuples"),
        (b"\x80\x04\x8f(" + doubled(b"K\x01") + b"\x90.", "a key that holds tuples"),
        (b"\x80\x04(" + doubled(b"K\x01") + b"\x91.", "a key that holds tuples"),
        (b"\x80\x02(" + doubled(b"K\x01") + b"K\x01d.", "a key that holds tuples"),
        (b"\x80\x02]q\x00h\x00a.", "a list that holds itself"),
        # One list of 1000 numbers, and set(list) 1000 times.
        (b"\x80\x02](" + b"K\x01" * 1000 + b"eq\x00" + b"cbuiltins\nset\nh\x00\x85R" * 1000 + b".", "more copies"),
        # One byte string of 10 kB, encoded 1000 times.
        (
            b"\x80\x02X\x10\x27\0\0"
            + b"x" * 10000
            + b"q\0X\6\0\0\0latin1q\1"
            + b"c_codecs\nencode\nh\0h\1\x86R" * 1000
            + b".",
            "more copies",
        ),
        (b"\x80\x02cbuiltins\nstr\n](K\1e\x85R.", "TypeError"),  # classes may be named but not called
        (b"\x80\x02cbuiltins\nlist\nX\1\0\0\0x\x85R.", "TypeError"),
    ],
)
def test_programs_that_grow_beyond_their_size_are_refused(tmp_path, program, message):
    path = tmp_path / "a.pkl"
    path.write_bytes(program)
    start = time.perf_counter()
    peak, error = peak_bytes(path)
    assert message in str(error)
    assert str(path) in str(error)
    assert peak < 3 * 10**7
    assert time.perf_counter() - start < 5


def test_an_array_that_stands_in_two_places_is_read(tmp_path):
    array = np.arange(1000.0)
    loaded = load_pickle(write_pickle(tmp_path / "a.pkl", {"a": [array] * 3, "b": array}))
    assert loaded["a"][2] is loaded["b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "it is a Git LFS pointer.*git lfs pull",
        ),
        (b"/annex/objects/SHA256E-s9--0.pkl\n", "it is a git-annex pointer.*git annex get"),
        (b"\n<!DOCTYPE html><html></html>", r"it is a web page \(HTML\), not the data"),
        (b"<HTML><body>404</body>", r"it is a web page \(HTML\), not the data"),
        (gzip.compress(pickle.dumps({}), mtime=0), r"it is compressed \(gzip\): unpack it first"),
        (bz2.compress(pickle.dumps({})), r"it is compressed \(bzip2\)"),
        (b"PK\x03\x04", r"it is compressed \(ZIP\)"),
        (b"\x89HDF\r\n\x1a\n", "it holds data in another format, HDF5"),
        (b"", "it is empty"),
    ],
)
def test_other_content_under_the_name_of_a_pickle_is_recognised(tmp_path, content, message):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=rf"a\.pkl: not a readable pickle: {message}"):
        load_pickle(path)
