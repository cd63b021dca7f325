"""The harness of the benchmarks on two small groups; no test asserts a time."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed import work

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory, benchmark_environment):
    """The output of a run, and its JSON."""
    pytest.importorskip("pytest_benchmark")
    out = tmp_path_factory.mktemp("benchmarks") / "run.json"
    loss, check = "test_fusion_loss.py::test_loss_and_gradient", "test_check_statistics.py::test_check_statistics"
    selected = [
        f"benchmarks/speed/{name}[{case}]"
        for name, cases in (
            (loss, ("256 samples, 6 classes-m3er-ours", "256 samples, 6 classes-m3er-textbook")),
            (check, ("CMU-MOSEI, B=32-ours", "CMU-MOSEI, B=32-textbook")),
        )
        for case in cases
    ]
    command = [sys.executable, "-m", "pytest", *selected, "-q", "-p", "no:cacheprovider", "--benchmark-only"]
    done = subprocess.run(
        [*command, f"--benchmark-json={out}"],
        cwd=_ROOT,
        env=benchmark_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


def test_a_run_has_ours_and_the_textbook_in_each_group(run):
    groups = {}
    for result in run[1]["benchmarks"]:
        groups.setdefault(result["extra_info"]["group"], set()).add(result["extra_info"]["contestant"])
    assert list(groups.values()) == [{"ours", "textbook"}] * 2


def test_every_result_has_the_floor_of_its_work(run):
    rates = run[1]["machine_info"]["m3er_fast"]
    for result in run[1]["benchmarks"]:
        info = result["extra_info"]
        shortest = max(
            info["bytes"] / rates["copy_bytes_per_second"], info["flops"] / rates["operations_per_second"]["fp32"]
        )
        assert info["floor"] == pytest.approx(shortest)
        assert info["median"] > 0


def test_every_result_has_its_samples_rounds_and_spread(run):
    for result in run[1]["benchmarks"]:
        info = result["extra_info"]
        assert info["samples"] in (256, 32)
        assert info["rounds"] == result["stats"]["rounds"] >= 5
        assert info["iqr"] >= 0
        # The rounds of pytest-benchmark are of several calls.
        assert info["median"] == pytest.approx(result["stats"]["median"] / info["calls"])


def test_the_textbook_takes_turns_with_ours_and_its_ratio_is_that_of_these_rounds(run):
    infos = {(r["extra_info"]["group"], r["extra_info"]["contestant"]): r["extra_info"] for r in run[1]["benchmarks"]}
    for (group, contestant), info in infos.items():
        if contestant == "textbook":
            in_turns = info["time_to_ours"]
            assert 0 < in_turns["q1"] <= in_turns["median"] <= in_turns["q3"]
            assert infos[group, "ours"]["ratios"] == {"textbook": in_turns["median"]}
            assert info["ratios"] == {"ours": pytest.approx(1 / in_turns["median"])}
        else:
            assert "time_to_ours" not in info


def test_a_run_records_its_device_and_commit(run):
    about = run[1]["machine_info"]["m3er_fast"]
    assert about["kind"] == "cpu"
    assert about["device"] in Path("/proc/cpuinfo").read_text() or about["device"] in (platform.processor(), "cpu")
    # The package's version need not say which build it is.
    assert about["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert about["commit"] == head.stdout.strip()


def test_a_run_ends_with_one_table_per_group(run):
    printed, content = run
    for group in {result["extra_info"]["group"] for result in content["benchmarks"]}:
        assert f"**{group}**" in printed


def test_the_least_work_is_what_must_be_moved_and_multiplied():
    # 65536 queries of 32 neighbours each, 300 features in and out, in bfloat16.
    local = work.local_least_squares(65536, 32, 300, 300, torch.bfloat16, torch.bfloat16)
    gathered = 65536 * 32 * (300 + 300) * 2
    assert gathered < local.bytes < 1.1 * gathered
    assert local.flops > 65536 * 32 * 32 * 300
    # Two modalities of 5 and 4 features, 3 components, triangular whiteners of 15 and 10 numbers.
    check = work.check_statistics(7, (5, 4), (3,), (5, 4), torch.float32)
    numbers = 3 * (5 + 4) + 15 + 10
    assert check.bytes == 7 * 9 * 4 + numbers * 4 + 7 * 4 * (2 * 1 + 2)  # ρ and the likelihood ratio, two energies
    assert check.flops == 2 * 7 * numbers
    # Logits are read and a gradient written, each 3 × 16 × 6 numbers; labels are of 8 bytes.
    assert work.fusion_loss(3, 16, 6, torch.float32).bytes == 2 * 3 * 16 * 6 * 4 + 16 * 8
    assert work.fusion_loss(3, 16, 6, torch.float32, with_gradient=False).bytes == 3 * 16 * 6 * 4 + 16 * 8
