"""The generated part of the performance page, and the goals that it lists."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
import goals
import harness
import report
import scaling

GROUP = "fusion loss and gradient, 65536 samples, 6 classes, m3er"


def a_run(seconds, group=GROUP, kind="cpu", error=1e-7, **more):
    """What a run writes of contestants with these median seconds."""
    rows = [
        {
            "operation": "fusion_loss",
            "group": group,
            "contestant": name,
            "median": median,
            "bytes": 8_000_000,
            "flops": 30_000_000,
            "floor": 1e-3,
            "share_of_floor": 1e-3 / median,
            "peak_bytes": 5_000_000,
            "error": error,
            "ratios": {other: time / median for other, time in seconds.items() if other != name},
        }
        for name, median in seconds.items()
    ]
    about = {
        "commit": "0123456789abcdef",
        "device": "A device",
        "kind": kind,
        "threads": 2,
        "cores": 4,
        "copy_bytes_per_second": 8e9,
        "operations_per_second": {"fp32": 2e11, "fp64": 5e10},
        "packages": {"torch": "2.13.0"},
    }
    return {
        "machine_info": {"m3er_fast": about},
        "benchmarks": [{"extra_info": row} for row in rows],
        "skipped": {"fusion_loss": {"liger-kernel cross entropy needs a GPU": ["test_a", "test_b"]}},
    } | more


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "performance.md"
    file.write_text(f"# Before\n\n{report.BEGIN}\nold\n{report.END}\n\n# After\n")
    return file


@pytest.fixture
def command(tmp_path, page):
    """Reports runs on the page: the exit code."""

    def run(*runs):
        paths = []
        for number, content in enumerate(runs):
            paths.append(tmp_path / f"{number}.json")
            paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
        return report.main([*map(str, paths), "--page", str(page), "--figures", str(tmp_path / "results")])

    return run


def test_only_what_stands_between_the_markers_is_written_anew(command, page):
    assert command(a_run({"ours": 0.01, "eager": 0.04})) == 0
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\n\n# After\n")
    assert "old" not in text


def test_reporting_the_same_runs_again_changes_no_byte(command, page, tmp_path):
    run = a_run({"ours": 0.01, "eager": 0.04})
    command(run)
    first = {path.name: path.read_bytes() for path in [page, *(tmp_path / "results").iterdir()]}
    command(run)
    assert {path.name: path.read_bytes() for path in [page, *(tmp_path / "results").iterdir()]} == first
    assert len(first) == 3


def test_a_result_is_a_line_with_time_share_memory_error_and_ratio(command, page):
    command(a_run({"ours": 0.01, "eager": 0.04}))
    assert "| ours | 10 ms | 10% | 0.8 GB/s | 5 MB | 1.0e-07 | 1.00 |" in page.read_text()
    assert "| eager | 40 ms | 2% | 0.2 GB/s | 5 MB | 1.0e-07 | 4.00 |" in page.read_text()


def test_a_goal_is_met_missed_or_not_measured(command, page):
    command(a_run({"ours": 0.01, "eager": 0.04, "compiled": 0.011}))
    text = page.read_text()
    assert "| loss and gradient, 65536 × 6 | ≥ 3.00 × eager | 4.00 × | met |" in text
    assert "| loss and gradient, 65536 × 6 | ≥ 1.20 × compiled | 1.10 × | missed |" in text
    assert "| check, 8192 samples, k = 30 | ≥ 1.70 × eager |  | not measured |" in text


def test_a_goal_of_a_gpu_is_not_measured_by_a_cpu(command, page):
    group = "fusion loss and gradient, 1M samples, 6 classes, m3er"
    command(a_run({"ours": 0.01, "eager": 0.1}, group))
    assert "| loss and gradient, 1M × 6 | ≥ 6.00 × eager |  | not measured |" in page.read_text()
    command(a_run({"ours": 0.01, "eager": 0.1}, group, kind="cuda"))
    assert "| loss and gradient, 1M × 6 | ≥ 6.00 × eager | 10.00 × | met |" in page.read_text()


def test_of_several_runs_all_must_meet_a_goal(command, page):
    command(a_run({"ours": 0.01, "eager": 0.04}), a_run({"ours": 0.01, "eager": 0.02}))
    assert "| ≥ 3.00 × eager | 2.00 × to 4.00 × | missed |" in page.read_text()


def test_of_several_groups_the_worst_counts():
    rows = [
        {"contestant": "ours", "group": group, "ratios": {"eager": ratio}, "error": error}
        for group, ratio, error in (("scan, B=1", 3.0, 1e-7), ("scan, B=2", 0.5, 1e-3), ("other", 0.1, 1.0))
    ]
    assert goals.Goal("", "cpu", "scan", "ratio", 1.0, "eager").worst(rows) == 0.5
    assert goals.Goal("", "cpu", "scan", "error", 1e-5).worst(rows) == 1e-3


def test_an_error_and_a_time_are_met_below_their_limit():
    for quantity in ("error", "seconds"):
        goal = goals.Goal("", "cpu", "", quantity, 1e-3)
        assert goal.met(1e-4)
        assert not goal.met(1e-2)


def test_what_was_left_out_has_its_reason(command, page):
    command(a_run({"ours": 0.01}))
    assert "| Fusion loss and gradient | liger-kernel cross entropy needs a GPU | 2 |" in page.read_text()


def test_an_inexact_contestant_is_no_baseline_of_the_bars():
    rows = [
        {"group": "g", "contestant": name, "median": median, "error": error}
        for name, median, error in (("ours", 1.0, 0.0), ("exact", 3.0, 0.0), ("index", 0.1, 0.2), ("other", 0.1, None))
    ]
    assert report._best_baseline(rows[0], rows) == ("exact", 3.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not what these benchmarks write"),
        ({"benchmarks": []}, "machine_info"),
        (a_run({}), "no run has a result"),
        (a_run({}, benchmarks=[{"extra_info": {"group": "g"}}]), "lacks contestant, median, operation, ratios"),
    ],
)
def test_a_run_that_cannot_be_used_is_one_line_and_exit_code_2(content, words, command, page, capsys):
    before = page.read_text()
    assert command(content) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert page.read_text() == before


def test_a_page_without_markers_is_left_alone(command, page, capsys):
    page.write_text("# Mine\n")
    assert command(a_run({"ours": 0.01})) == 2
    assert "wanted one line" in capsys.readouterr().err
    assert page.read_text() == "# Mine\n"


def test_the_exponent_is_that_of_a_power_and_bends_show_between_sizes():

    sizes = [1, 2, 4, 8]
    exponent, steps = scaling.exponents(sizes, [3.0 * size**1.5 for size in sizes])
    assert exponent == pytest.approx(1.5)
    assert steps == pytest.approx([1.5] * 3)
    assert scaling.exponents(sizes, [1, 1, 2, 4])[1] == pytest.approx([0, 1, 1])
    with pytest.raises(ValueError, match="positive"):
        scaling.exponents(sizes, [1, 1, 0, 1])


def test_peak_memory_is_what_a_call_holds_at_once_whoever_allocates():

    def step():
        return torch.ones(2**22), np.ones(2**21)  # 16 MiB each

    step()  # as a benchmark has, before memory is measured: what is loaded once is loaded by then
    held = harness.peak_bytes(torch.device("cpu"), step)
    if held is None:
        pytest.skip("this system has no high-water mark")
    assert held == pytest.approx(2**25, rel=0.05)


def test_peak_memory_is_not_the_sum_of_what_a_call_holds_in_turn():

    held = harness.peak_bytes(torch.device("cpu"), lambda: [float(torch.ones(2**24).sum()) for _ in range(8)])
    if held is None:
        pytest.skip("this system has no high-water mark")
    assert held < 3 * 2**26  # of eight; an allocator may keep one and take another


def test_the_relative_error_is_of_the_worst_tensor():

    wanted = [torch.tensor([1.0, -4.0]), torch.tensor([10.0])]
    assert harness.relative_error(wanted, wanted) == 0.0
    assert harness.relative_error([torch.tensor([1.0, -3.0]), torch.tensor([11.0])], wanted) == pytest.approx(0.25)


def test_missed_neighbours_are_counted_in_whatever_order():

    wanted = torch.tensor([[0, 1], [2, 3]])
    assert harness.missed(torch.tensor([[1, 0], [3, 2]]), wanted) == 0.0
    assert harness.missed(torch.tensor([[1, 9], [3, 2]]), wanted) == 0.25
