"""Damaged files of every format: each is read, or refused by one line, in bounded time and memory."""

import collections
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from fuzz_readers import FORMATS, NUMBERS

from m3er_fast import corpus

pytest.importorskip("pyarrow")
pytest.importorskip("h5py")

HERE = Path(__file__).parent
MOST_SECONDS = 10.0  # of one mutation, on a busy machine
MOST_KIB = 300 * 2**10  # growth of the process: the files have a few kilobytes


class Found(NamedTuple):
    outcomes: collections.Counter
    foreign: dict  # number of the mutation -> exception
    crashes: list  # numbers of mutations that ended the process
    seconds: float
    kib: int


def fuzz(name, count):
    """Read the mutations of a format; after one that ends the process, go on with the next."""
    outcomes, foreign, crashes, seconds, kib, number = collections.Counter(), {}, [], 0.0, 0, 0
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    while number < count:
        command = [sys.executable, str(HERE / "fuzz_readers.py"), name, str(number), str(count - number)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert lines, result.stderr
        for line in lines:
            if "outcome" in line:
                known = line["outcome"] in ("read", "refused")
                outcomes[line["outcome"] if known else "foreign"] += 1
                if not known:
                    foreign[line["number"]] = line["outcome"]
                seconds, kib = max(seconds, line["seconds"]), max(kib, line["kib"])
        number = lines[-1]["number"] + 1
        if "outcome" not in lines[-1]:
            crashes.append(lines[-1]["number"])
    return Found(outcomes, foreign, crashes, seconds, kib)


def check(name, count):
    found = fuzz(name, count)
    print(f"{name}: {count} mutations, {dict(found.outcomes)}, slowest {found.seconds} s, {found.kib // 1024} MiB more")
    assert found.foreign == {}
    assert found.crashes == []
    assert sum(found.outcomes.values()) == count
    assert found.outcomes["refused"] > count / 10
    assert found.seconds < MOST_SECONDS
    assert found.kib < MOST_KIB


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused_by_one_line(name):
    check(name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files_are_read_or_refused_by_one_line(name):
    check(name, 600)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("level_histogram.parquet", "its footer has a histogram of levels"),
        ("byte_sizes_of_floats.parquet", "its footer has sizes of texts in a column of FLOAT"),
    ],
)
def test_what_coverage_guided_fuzzing_found_is_refused(file, message):
    """In a process of its own: pyarrow 26 aborts it."""
    code = "import sys, fuzz_readers; fuzz_readers.read_shard(None, __import__('pathlib').Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, "-c", code, str(HERE / "damaged" / file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert f"CorpusError: {file}: {message}" in result.stderr
    assert result.returncode == 1


@pytest.mark.parametrize("name", [name for name in FORMATS if name.endswith("pkl")])
def test_a_pickle_that_asks_for_a_name_of_several_lines_is_refused_by_one(name, tmp_path):
    """Found by coverage-guided fuzzing, as was the next."""
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.")
    problem = refusal(corpus.FORMATS[name], path)
    assert len(problem.splitlines()) == 1
    assert problem.startswith(f"{path}: the pickle asks for a b")


def test_a_label_of_several_lines_is_refused_by_one(tmp_path):
    FORMATS["utterance-csv"][0](tmp_path)
    index = tmp_path / "train_index.csv"
    index.write_text(index.read_text().replace(",1\n", ',"a\nb"\n'))
    problem = refusal(corpus.FORMATS["utterance-csv"], tmp_path)
    assert "the label in row 2 is a b" in problem
    assert len(problem.splitlines()) == 1


def ragged():
    array = np.empty(2, dtype=object)
    array[0], array[1] = np.arange(3), "x"
    return array


ODD = [
    None, 3, -1.5, "x", b"x", [], {}, (), [None], [[]], [[1], [2, 3]], {"a": 1}, {1: {2: 3}}, {3},
    10**400, [10**400] * 4,
    np.zeros(()), np.zeros((0, 3, 2)), np.zeros((4, 0, 2)), np.zeros((4, 3, 2, 1)), np.zeros((10**9, 0)), ragged(),
    np.array(["x"] * 4), np.array([1 + 2j] * 4), np.full((4, 3, 2), np.nan), [[[1, None]] * 3] * 4, True, [{}] * 4,
]  # fmt: skip


def with_odd_parts(value):
    """Yield copies of nested dicts, lists and tuples in which one part is odd."""
    yield from ODD
    if isinstance(value, dict):
        for key in value:
            for part in with_odd_parts(value[key]):
                yield {**value, key: part}
            yield {name: part for name, part in value.items() if name != key}
            yield {(key, 1) if name == key else name: part for name, part in value.items()}
    elif isinstance(value, tuple) or (isinstance(value, list) and len(value) < 5 and not isinstance(value[0], str)):
        for index in range(len(value)):
            for part in with_odd_parts(value[index]):
                yield type(value)((*value[:index], part, *value[index + 1 :]))


def refusal(read, path):
    """Return the message of the library's own error, or None if the file is read."""
    try:
        read(path)
    except corpus.CorpusError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [name for name in FORMATS if name.endswith("pkl")])
def test_a_pickle_with_an_odd_part_is_read_or_refused_by_one_line(name, tmp_path):
    FORMATS[name][0](tmp_path)
    value = pickle.loads((tmp_path / "4.pkl").read_bytes())
    if isinstance(value, dict):
        value = {"train": value["train"], "test": value["test"]}
    path, refused, count = tmp_path / "odd.pkl", 0, 0
    for odd in with_odd_parts(value):
        path.write_bytes(pickle.dumps(odd, 4))
        count += 1
        problem = refusal(corpus.FORMATS[name], path)
        if problem is not None:
            refused += 1
            assert "\n" not in problem
            assert str(path) in problem
            assert len(problem) < 1000
    assert count > 300
    assert refused > count / 2


def test_the_mutations_write_the_lengths_that_once_took_gigabytes():
    assert {2**28, 2**31 - 1, 2**32 - 1} <= set(NUMBERS)
