"""`m3er-fast bench`, on a checkout whose only benchmark is a toy, with the project's own harness."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m3er_fast.bench import benchmark_files
from m3er_fast.cli import main

ROOT = Path(__file__).parents[1]

pytest.importorskip("pytest_benchmark")

TOY = """
import harness
import pytest
import torch
from m3er_fast.kernels._launch import Work


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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "conftest.py", root)
    (root / "benchmarks").mkdir()
    for file in (ROOT / "benchmarks").glob("*.py"):
        if not file.name.startswith("test_"):
            shutil.copy(file, root / "benchmarks")
    (root / "benchmarks" / "test_toy.py").write_text(TOY)
    (root / "benchmarks" / "test_broken.py").write_text(TOY + BROKEN)
    return root


@pytest.fixture(scope="module")
def run(checkout, benchmark_environment):
    """The command in a process of its own, for pytest runs in this one."""

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
    assert lines[-1].startswith("2 results, ")


def test_the_run_is_written_with_the_reasons_of_what_was_left_out(toy, checkout):
    run = json.loads((checkout / "new" / "run.json").read_text())
    info = {result["extra_info"]["contestant"]: result["extra_info"] for result in run["benchmarks"]}
    assert set(info) == {"ours", "slow"}
    assert info["ours"]["ratios"]["slow"] == pytest.approx(info["slow"]["median"] / info["ours"]["median"])
    assert info["ours"]["error"] == 0.0
    assert info["ours"]["share_of_floor"] == pytest.approx(info["ours"]["floor"] / info["ours"]["median"])
    assert run["skipped"] == {"toy": {"gpu needs a GPU": ["test_toy[gpu]"]}}


def test_the_roofline_is_a_picture_and_nothing_half_written_stays(toy, checkout):
    assert (checkout / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert not list(checkout.rglob("*.partial"))


def test_a_benchmark_that_fails_is_exit_code_1_and_named(run, checkout):
    done = run("broken", "--out", checkout / "broken.json")
    assert done.returncode == 1
    assert "1 failed, such as benchmarks/test_broken.py::test_broken: assert 1 == 2" in done.stderr
    assert len(json.loads((checkout / "broken.json").read_text())["benchmarks"]) == 2


def test_the_benchmarks_of_this_checkout_go_by_their_operation():
    files = benchmark_files()
    assert {"fusion_loss", "memory_scan", "cca", "reading", "scoring"} <= set(files)
    assert all(path.is_file() for path in files.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such"], "no benchmark is called no_such; there are cca, correlation_gate"),
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
