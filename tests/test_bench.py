"""``m3er-fast bench`` on a checkout with toy benchmarks and the project's own harness."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed.operations import TITLES
from m3er_fast.cli import bench, main
from m3er_fast.cli.bench import COLUMNS, BenchmarkResult, benchmark_files
from m3er_fast.cli.bench_display import BenchmarkDisplay

ROOT = Path(__file__).parents[1]

pytest.importorskip("pytest_benchmark")

TOY = """
import pytest
import torch

from benchmarks.speed import harness
from benchmarks.speed.work import Work


@pytest.mark.benchmark(timer=harness.now)
@pytest.mark.parametrize("contestant", ["ours", "slow", "gpu"])
def test_toy(benchmark, contest, device, contestant):
    if contestant == "gpu":
        harness.needs_gpu(contestant, device)
    benchmark.group = "a toy"
    x = torch.ones(1000)
    step = (lambda: x + x) if contestant == "ours" else (lambda: [x + x for _ in range(50)][-1])
    contest(contestant, step, [Work(8000, 1000)], error=lambda y: harness.relative_error(y, 2 * x))
"""
BROKEN = "\n\ndef test_broken(benchmark):\n    assert 1 == 2\n"
INTERRUPTED = """

def test_interrupted(benchmark):
    benchmark(int)
    raise KeyboardInterrupt


def test_never(benchmark):
    benchmark(int)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "tests" / "ptx", root / "tests" / "ptx")  # the options of conftest.py
    shutil.copytree(
        ROOT / "benchmarks", root / "benchmarks", ignore=shutil.ignore_patterns("test_*.py", "results", "__pycache__")
    )
    speed = root / "benchmarks" / "speed"
    (speed / "test_toy.py").write_text(TOY)
    (speed / "test_broken.py").write_text(TOY + BROKEN)
    (speed / "test_cut.py").write_text(TOY + BROKEN + INTERRUPTED)
    return root


@pytest.fixture(scope="module")
def run(checkout, benchmark_environment):
    """A function that runs the command in a process of its own, because pytest runs in this one."""

    def run(*arguments):
        command = [sys.executable, "-m", "m3er_fast.cli", "bench", *map(str, arguments)]
        command += ["--benchmarks", str(checkout / "benchmarks")]
        return subprocess.run(
            command, env=benchmark_environment, cwd=checkout, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture(scope="module")
def toy(run, checkout):
    pytest.importorskip("matplotlib")
    done = run("toy", "--out", checkout / "new" / "run.json", "--plot", checkout / "roofline.png")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_every_result_is_a_line_below_its_group(toy):
    lines = toy.stdout.splitlines()
    assert lines[1] == "a toy"
    assert [line.split()[0] for line in lines[3:5]] == ["ours", "slow"]
    assert lines[3].split()[-1] == "1.00"
    assert float(lines[4].split()[-1]) > 1
    assert lines[-2] == "1 left out: gpu needs a GPU"
    assert lines[-1].startswith("2 results, ")
    assert "\x1b" not in toy.stdout


def test_the_written_run_has_the_results_and_the_reasons_for_leaving_others_out(toy, checkout):
    run = json.loads((checkout / "new" / "run.json").read_text())
    info = {result["extra_info"]["contestant"]: result["extra_info"] for result in run["benchmarks"]}
    assert set(info) == {"ours", "slow"}
    assert info["ours"]["ratios"]["slow"] == info["slow"]["time_to_ours"]["median"]  # of rounds in turns
    assert info["ours"]["error"] == 0.0
    assert info["ours"]["share_of_floor"] == pytest.approx(info["ours"]["floor"] / info["ours"]["median"])
    assert run["skipped"] == {"toy": {"gpu needs a GPU": ["test_toy[gpu]"]}}


def test_the_roofline_is_a_picture_and_no_partial_file_stays(toy, checkout):
    assert (checkout / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert not list(checkout.rglob("*.partial"))


def test_a_benchmark_that_fails_is_exit_code_1_and_named(run, checkout):
    done = run("broken", "--out", checkout / "broken.json")
    assert done.returncode == 1
    assert "1 failed, such as benchmarks/speed/test_broken.py::test_broken: assert 1 == 2" in done.stderr
    assert len(json.loads((checkout / "broken.json").read_text())["benchmarks"]) == 2


def test_an_interrupted_run_of_pytest_keeps_its_results_and_lists_the_missing_ones(checkout, benchmark_environment):
    command = [sys.executable, "-m", "pytest", "benchmarks/speed/test_cut.py", "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-only", "--benchmark-json=cut.json"]
    done = subprocess.run(command, env=benchmark_environment, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    run = json.loads((checkout / "cut.json").read_text())
    assert [result["extra_info"]["contestant"] for result in run["benchmarks"]] == ["ours", "slow"]
    assert run["skipped"] == {"cut": {"gpu needs a GPU": ["test_toy[gpu]"]}}
    assert run["failed"] == {"cut": {"test_broken": "assert 1 == 2"}}
    assert run["not_run"] == {"cut": ["test_interrupted", "test_never"]}


def test_the_benchmarks_of_this_checkout_go_by_their_operation():
    files = benchmark_files()
    assert set(files) == set(TITLES)
    assert all(path.is_file() for path in files.values())


def test_the_benchmarks_of_the_current_checkout_are_found_from_a_package_that_is_installed_elsewhere(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "m3er_fast" / "cli" / "bench.py"))
    for place in (ROOT, ROOT / "docs"):
        monkeypatch.chdir(place)
        assert set(benchmark_files()) == set(TITLES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"site-packages/benchmarks and .*/benchmarks: no benchmarks here"):
        benchmark_files()


def a_result(group, contestant, time):
    return BenchmarkResult("toy", group, contestant, (time, *[""] * (len(COLUMNS) - 1)))


def make_stdout_a_terminal(monkeypatch):
    """Replace stdout. Call it in the test: pytest restores its own stdout between a fixture and its test."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    return terminal


def test_a_terminal_shows_a_row_with_each_result_and_the_bar_with_each_measurement(monkeypatch):
    terminal = make_stdout_a_terminal(monkeypatch)
    with BenchmarkDisplay.for_stdout() as display:
        display.add(a_result("a group", "ours", "1.23 ms"))
        first = terminal.getvalue()
        assert "a group" in first
        assert "1.23 ms" in first
        display.update(1, 4)
        assert "1/4" in terminal.getvalue().removeprefix(first)
        display.add(a_result("a group", "slow", "4.56 ms"))
        added = terminal.getvalue().removeprefix(first)
        assert "1.23 ms" in added  # the whole table is drawn anew
        assert "4.56 ms" in added


def test_each_group_leaves_one_table_on_a_terminal(monkeypatch):
    terminal = make_stdout_a_terminal(monkeypatch)
    with BenchmarkDisplay.for_stdout() as display:
        for number, (group, contestant) in enumerate([("one", "ours"), ("one", "slow"), ("two", "ours")]):
            display.add(a_result(group, contestant, f"{number} ms"))
            display.update(number + 1, 3)
    lines = on_screen(terminal.getvalue())
    assert [lines.count(title) for title in ("one", "two")] == [1, 1]
    shown = [line for line in lines if line.startswith("│ ours") or line.startswith("│ slow")]
    assert [line.split("│")[2].strip() for line in shown] == ["0 ms", "1 ms", "2 ms"]
    assert not any("3/3" in line for line in lines)


def test_results_before_an_interrupt_stay_on_a_terminal(monkeypatch):
    terminal = make_stdout_a_terminal(monkeypatch)
    with contextlib.suppress(KeyboardInterrupt), BenchmarkDisplay.for_stdout() as display:
        display.add(a_result("a group", "ours", "1.23 ms"))
        raise KeyboardInterrupt
    assert sum("1.23 ms" in line for line in on_screen(terminal.getvalue())) == 1


def on_screen(written):
    """Return the lines on a terminal to which this was written; cursor movements and erasures are applied."""
    lines, row = [""], 0
    for text, code in re.findall(r"([^\x1b\r\n]+)|(\r|\n|\x1b\[\??\d*[A-Za-z])", re.sub(r"\x1b\[[\d;]*m", "", written)):
        if code == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif code == "\x1b[2K":
            lines[row] = ""
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        else:
            assert code in ("", "\r", "\x1b[?25l", "\x1b[?25h")
            lines[row] += text
    return [line.rstrip() for line in lines]


def test_the_command_draws_tables_on_a_terminal(checkout, benchmark_environment):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "m3er_fast.cli", "bench", "toy", "--benchmarks", str(checkout / "benchmarks")]
    environment = benchmark_environment | {"TERM": "xterm", "COLUMNS": "140", "LINES": "40"}
    with subprocess.Popen(command, env=environment, cwd=checkout, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 4096):
                written += part
        except OSError:  # Linux reports in this way that the other end is closed
            pass
        assert process.wait() == 0, process.stderr.read()
    os.close(ours)
    lines = on_screen(written.decode())
    assert lines.count("a toy") == 1
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["ours", "slow"]
    assert lines[-2].startswith("2 results")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such"], "no benchmark is called no_such; there are cca, check_statistics"),
        (["cca", "--device", "nonsense"], "cannot be used"),
        (["--benchmarks", "elsewhere"], "elsewhere: no benchmarks here; the benchmarks are in a checkout"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
