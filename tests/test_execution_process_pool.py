"""Worker processes: results, faults that end a process, and workers that end with their parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from m3er_fast.execution.process_pool import run_in_processes
from m3er_fast.execution.tasks import LostTask


def double(number):
    return 2 * number


def end_or_double(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return 2 * number


def refuse(number):
    raise ValueError(f"not {number}")


@pytest.mark.parametrize("workers", [1, 3])
def test_results_of_all_tasks(workers):
    assert dict(run_in_processes(double, range(5), workers)) == {0: 0, 1: 2, 2: 4, 3: 6, 4: 8}
    assert list(run_in_processes(double, [], workers)) == []


def test_a_task_that_ends_its_process_is_lost_and_no_other():
    results = dict(run_in_processes(end_or_double, range(6), 2))
    assert isinstance(results.pop(3), LostTask)
    assert results == {0: 0, 1: 2, 2: 4, 4: 8, 5: 10}


def test_an_exception_is_raised_here():
    with pytest.raises(ValueError, match="not 7"):
        list(run_in_processes(refuse, [7], 1))


PROGRAM = """
    import os, sys, time
    from m3er_fast.execution.process_pool import run_in_processes

    def wait(path):
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)

    if __name__ == "__main__":
        list(run_in_processes(wait, sys.argv[1:], 2))
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path, kind):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    notes = [tmp_path / "one", tmp_path / "two"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, str(program), *map(str, notes)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: all(note.exists() and note.read_text() for note in notes))
        workers = [int(note.read_text()) for note in notes]
        process.send_signal(kind)
        process.wait(60)
        wait_for(lambda: not any(map(is_running, workers)))
    finally:
        process.kill()


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
