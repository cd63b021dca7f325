"""The harness of the benchmarks, by two small groups; how long anything takes is not asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run printed, and its JSON."""
    pytest.importorskip("pytest_benchmark")
    out = tmp_path_factory.mktemp("benchmarks") / "run.json"
    selected = [
        "benchmarks/test_fusion_loss.py",
        "benchmarks/test_correlation_gate.py",
        "-k",
        "(256 or 32) and not compiled and not 8192",
    ]
    command = [sys.executable, "-m", "pytest", *selected, "-q", "-p", "no:cacheprovider", "--benchmark-only"]
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        [*command, f"--benchmark-json={out}"], cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


def test_a_run_has_ours_and_a_baseline_in_each_group(run):
    groups = {}
    for result in run[1]["benchmarks"]:
        groups.setdefault(result["extra_info"]["group"], set()).add(result["extra_info"]["contestant"])
    assert len(groups) >= 2
    assert all({"ours", "eager"} <= contestants for contestants in groups.values())


def test_every_result_says_what_it_must_do_at_least(run):
    rates = run[1]["machine_info"]["m3er_fast"]
    for result in run[1]["benchmarks"]:
        info = result["extra_info"]
        shortest = max(
            info["bytes"] / rates["copy_bytes_per_second"], info["flops"] / rates["operations_per_second"]["fp32"]
        )
        assert info["floor"] == pytest.approx(shortest)
        assert info["median"] > 0


def test_a_run_says_where_and_of_which_commit_it_is(run):
    about = run[1]["machine_info"]["m3er_fast"]
    assert about["device"]
    assert about["commit"]
    assert about["packages"]["torch"]


def test_a_run_ends_in_one_table_a_group(run):
    printed, content = run
    for group in {result["extra_info"]["group"] for result in content["benchmarks"]}:
        assert f"**{group}**" in printed
