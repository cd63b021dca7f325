"""Damaged files of every format: each is read, or refused by one line, in bounded time and memory."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from fuzz_readers import FORMATS, NUMBERS

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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
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


def test_the_mutations_write_the_lengths_that_once_took_gigabytes():
    assert {2**28, 2**31 - 1, 2**32 - 1} <= set(NUMBERS)
