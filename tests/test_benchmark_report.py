"""Reports of benchmark runs: the generated part of the performance page, goals, curves, and merging parts of a run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from benchmarks.report import figures, goals, merge, panels
from benchmarks.report import page as report
from benchmarks.speed import harness, operations, scaling
from benchmarks.speed.workloads import BATCHES

QUARTILES = {"q1": 0.99, "median": 1.0, "q3": 1.01}
GROUP = "fusion loss and gradient, 65536 samples, 6 classes, m3er"


def a_run(seconds, group=GROUP, kind="cpu", error=1e-7, threads=2, samples=65536, **more):
    """Return the JSON of a run whose contestants have these median seconds; its first took turns with the others."""
    ours = next(iter(seconds.values()), None)
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
            "samples": samples,
            "rounds": 15,
            "iqr": 0.02,
            "ratios": {other: time / median for other, time in seconds.items() if other != name},
        }
        | ({} if median == ours else {"time_to_ours": {q: f * median / ours for q, f in QUARTILES.items()}})
        for name, median in seconds.items()
    ]
    about = {
        "commit": "0123456789abcdef",
        "device": "A device",
        "kind": kind,
        "threads": threads,
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


def empty_part(name):
    return f"{report.marker(name, 'begin')}\nold\n{report.marker(name, 'end')}"


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "performance.md"
    file.write_text(f"# Before\n\n{empty_part('conclusions')}\n\n# After\n")
    return file


@pytest.fixture
def measurements(tmp_path):
    file = tmp_path / "measurements.md"
    file.write_text(f"# All\n\n{empty_part('results')}\n")
    return file


@pytest.fixture
def command(tmp_path, page, measurements):
    """Reports runs on the two pages and returns the exit code."""

    def run(*runs):
        paths = []
        for number, content in enumerate(runs):
            paths.append(tmp_path / f"{number}.json")
            paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
        pages = ["--page", page, "--measurements", measurements, "--figures", tmp_path / "results"]
        return report.main([*map(str, paths), *map(str, pages)])

    return run


def test_only_the_parts_between_the_markers_are_replaced(command, page, measurements):
    assert command(a_run({"ours": 0.01, "textbook": 0.04})) == 0
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{report.marker('conclusions', 'begin')}\n")
    assert text.endswith(f"{report.marker('conclusions', 'end')}\n\n# After\n")
    assert "old" not in text
    text = measurements.read_text()
    assert text.startswith(f"# All\n\n{report.marker('results', 'begin')}\n")
    assert text.endswith(f"{report.marker('results', 'end')}\n")
    assert "old" not in text


def test_reporting_the_same_runs_again_changes_no_byte(command, page, measurements, tmp_path):
    run = a_run({"ours": 0.01, "textbook": 0.04})
    command(run)
    first = {path.name: path.read_bytes() for path in [page, measurements, *(tmp_path / "results").iterdir()]}
    command(run)
    assert {path.name: path.read_bytes() for path in [page, measurements, *(tmp_path / "results").iterdir()]} == first
    assert len(first) == 5


def test_a_result_is_a_line_with_time_spread_rate_share_memory_error_and_ratio(command, measurements):
    command(a_run({"ours": 0.01, "textbook": 0.04}))
    text = measurements.read_text()
    assert f"**{GROUP}**, 2 threads" in text
    assert "| ours | 10 ms | 2% | 15 | 6,550,000 | 10% | 0.8 GB/s | 5 MB | 1.0e-07 | 1.00 |" in text
    assert "| textbook | 40 ms | 2% | 15 | 1,640,000 | 2% | 0.2 GB/s | 5 MB | 1.0e-07 | 4.00 |" in text


def test_a_group_is_a_line_per_run_with_the_ratios_to_ours_and_their_quartiles(command, measurements):
    times = {"ours": 0.01, "textbook": 0.04, "textbook, compiled": 0.02, "reference": 0.05}
    command(a_run(times, threads=1), a_run(times | {"textbook": 0.03}))
    lines = measurements.read_text().splitlines()
    rest = "6,550,000 | 4.00 (3.96 to 4.04) | 2.00 (1.98 to 2.02) | 5.00 reference |"
    at = lines.index(f"| {GROUP} | 1 thread | 10 ms | {rest}")
    assert lines[at + 1] == f"|  | 2 threads | 10 ms | {rest.replace('4.00 (3.96 to 4.04)', '3.00 (2.97 to 3.03)')}"


def test_groups_in_which_the_textbook_is_faster_are_listed(command, page, measurements):
    command(a_run({"ours": 0.01, "textbook": 0.008, "textbook, compiled": 0.02}))
    section = measurements.read_text().partition("### Slower than the textbook")[2].partition("\n### ")[0]
    assert f"| {GROUP} | 2 threads | textbook | 0.80 (0.79 to 0.81) |" in section
    assert "compiled |" not in section
    command(a_run({"ours": 0.01, "textbook": 0.02, "reference": 0.005}))
    for path in (page, measurements):
        assert "In these runs it was never slower than the textbook, eager or compiled." in path.read_text()


def test_operations_in_which_the_textbook_is_faster_are_counted_with_the_worst_of_them(command, page):
    times = {"ours": 0.01, "textbook": 0.008, "textbook, compiled": 0.02}
    command(a_run(times, threads=1), a_run(times | {"textbook": 0.005}), a_run(times | {"textbook": 0.03}, threads=4))
    section = page.read_text().partition("## When it is slower")[2].partition("-->")[0]
    assert f"| Fusion loss and gradient | textbook | 2 of 3 results | 0.50 | {GROUP}, 2 threads |" in section
    assert "compiled |" not in section


def test_runs_of_one_device_are_told_apart(tmp_path):
    def run(name, threads=2, device="A device"):
        path = tmp_path / name
        content = a_run({"ours": 0.01}, threads=threads)
        content["machine_info"]["m3er_fast"]["device"] = device
        path.write_text(json.dumps(content))
        return report.Run.read(path)

    assert report.labels([run("a.json")]) == ["2 threads"]
    assert report.labels([run("a.json", 1), run("b.json")]) == ["1 thread", "2 threads"]
    assert report.labels([run("a.json"), run("b.json")]) == ["2 threads, a", "2 threads, b"]
    assert report.labels([run("a.json"), run("b.json", 2, "Other")]) == ["A device, 2 threads", "Other, 2 threads"]
    of_one_name = run("a.json", 1, "A, AVX2"), run("b.json", 1, "A, AVX-512"), run("c.json", 2, "A, AVX-512")
    assert report.labels(of_one_name) == ["AVX2, 1 thread", "AVX-512, 1 thread", "AVX-512, 2 threads"]


def test_the_figures_of_several_runs_on_one_device_show_each_run_by_itself(command, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "ratios", lambda bars, path: drawn.setdefault(path.stem, bars))
    monkeypatch.setattr(figures, "roofline", lambda points, copy, rates, path: drawn.setdefault(path.stem, points))
    first, second = a_run({"ours": 0.01, "textbook": 0.04}, threads=1), a_run({"ours": 0.01, "textbook": 0.02})
    assert command(first, second) == 0
    assert drawn["ratios-cpu-1-thread"] == [(GROUP, "textbook", pytest.approx(4.0))]
    assert drawn["ratios-cpu-2-threads"] == [(GROUP, "textbook", pytest.approx(2.0))]
    for threads, slowest in (("1-thread", 0.04), ("2-threads", 0.02)):
        assert [point.seconds for point in drawn[f"roofline-cpu-{threads}"]] == [0.01, slowest]


def test_only_the_first_device_has_figures_and_tables_of_its_own(command, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "ratios", lambda bars, path: drawn.append(path.stem))
    monkeypatch.setattr(figures, "roofline", lambda points, copy, rates, path: drawn.append(path.stem))
    runs = [a_run({"ours": 0.01, "textbook": 0.04}, threads=threads) for threads in (1, 2, 2)]
    runs[2]["machine_info"]["m3er_fast"]["device"] = "Other"
    assert command(*runs) == 0
    assert len(drawn) == 4
    assert not any("other" in name for name in drawn)


def test_the_conclusions_give_the_range_over_the_batch_and_where_it_is_worst():
    curves = [figures.RatioCurve(f"{n} threads", [1, 8], [0, 0], [float(n), 0.5 * n], [9, 9]) for n in (1, 2)]
    curves.append(figures.RatioCurve("3 threads", [], [], [], []))
    first, last = panels.PANELS[0], panels.PANELS[-1]
    assert first.subject(curves) == "Loss and gradient, C = 6, B = 1 to 8"
    assert list(map(first.range_of, curves)) == ["0.50 (B = 8) to 1.00", "1.00 (B = 8) to 2.00", ""]
    assert last.subject(curves).endswith(" lacking a modality, B = 1 to 8: that time : clean")
    assert list(map(last.range_of, curves)) == ["1.00 to 2.00 (B = 8)", "0.50 to 1.00 (B = 8)", ""]


@pytest.mark.parametrize(
    ("kind", "flags", "device"),
    [
        ("cpu", ["avx", "avx2", "avx512f"], "A, AVX-512"),
        ("cpu", ["avx", "avx2"], "A, AVX2"),
        ("cpu", ["neon"], "A"),
        ("cuda", ["avx2"], "A"),
    ],
)
def test_processors_of_one_name_are_told_apart_by_their_vectors(tmp_path, kind, flags, device):
    content = a_run({"ours": 0.01})
    content["machine_info"]["m3er_fast"] |= {"device": "A", "kind": kind}
    content["machine_info"]["cpu"] = {"flags": flags}
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert report.Run.read(tmp_path / "run.json").about["device"] == device


def test_the_figure_over_the_batch_has_one_curve_per_run_and_only_the_textbooks_ratios(command, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "over_batch", lambda shown, path: drawn.append(shown))

    def sizes(threads, ratio):
        runs = [
            a_run({"ours": 1.0, "textbook": ratio * size, "reference": 9.0}, threads=threads, samples=size, group=group)
            for size, group in ((64, "64 samples"), (1, "1 sample"))
            for group in [f"fusion loss and gradient, {group}, 6 classes, m3er"]
        ]
        return runs[0] | {"benchmarks": [result for run in runs for result in run["benchmarks"]]}

    assert command(sizes(1, 2.0), sizes(2, 3.0)) == 0
    [[(title, least, curves), *others]] = drawn
    assert title == "Loss and gradient, C = 6"
    assert least == 1.0
    assert [(curve.label, curve.sizes, curve.median) for curve in curves] == [
        ("1 thread", [1, 64], [2.0, 128.0]),
        ("2 threads", [1, 64], [3.0, 192.0]),
    ]
    assert all(not curves for _, _, curves in others)


def test_a_third_lost_is_drawn_as_the_time_of_the_clean_batch_relative_to_its_own():
    panel = panels.PANELS[-1]
    row = {"contestant": "ours, a third lost", "group": "inference with check and proxies, CMU-MOSEI, B=8, T=20"}
    row |= {"samples": 8, "time_to_ours": {"q1": 2.0, "median": 4.0, "q3": 5.0}}
    assert panel.curve("1 thread", [row]) == ("1 thread", [8], [0.2], [0.25], [0.5])


@pytest.mark.parametrize(
    ("group", "kind", "sizes"),
    [
        ("inference, CMU-MOSI, B=32, T=50", "inference, CMU-MOSI", ["B=32", "T=50"]),
        ("check, 1 sample, float32", "check", ["1 sample", "float32"]),
        ("check", "check", []),
        ("64 samples", "64 samples", []),
    ],
)
def test_the_kind_of_work_is_what_stands_before_the_first_number(group, kind, sizes):
    assert figures.split_group(group) == (kind, sizes)


def test_ratios_have_a_line_per_kind_of_work_with_its_ends_told(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    rows = [("check, 1 sample, k=30", "textbook", 0.5), ("check, 8 samples, k=30", "textbook", 2.0)]
    figures.ratios([*rows, ("check, 4 samples, k=30", "textbook", 1.0), ("loss, 1 sample", "other", 3.0)], tmp_path)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["check (3)", "loss (1)"]
    assert [note.get_text() for note in axes.texts] == ["0.50  1 sample\n2.00  8 samples", "3.00  1 sample  other"]
    with pytest.raises(ValueError, match="no group has ours"):
        figures.ratios([], tmp_path)


def test_points_below_the_line_are_drawn_as_such(tmp_path):
    curve = figures.RatioCurve("1 thread", [1, 8, 64], [0.4, 0.9, 2.0], [0.5, 1.0, 2.0], [0.6, 1.1, 2.0])
    figures.over_batch([("loss", 1.0, [curve]), ("none", 1.0, [])], tmp_path / "over_batch.png")
    assert (tmp_path / "over_batch.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no result beside the textbook"):
        figures.over_batch([("none", 1.0, [])], tmp_path / "nothing.png")


def test_a_goal_is_met_missed_or_not_measured(command, measurements):
    command(a_run({"ours": 0.01, "textbook": 0.04, "textbook, compiled": 0.009}))
    text = measurements.read_text()
    before = "≥ 3 × the reference"
    assert f"| loss and gradient, 65536 × 6 | {before} | ≥ 3.00 × textbook | 4.00 × | met |" in text
    assert "| ≥ 1.00 × textbook, compiled | 0.90 × | missed |" in text
    assert "| statistics of sequences" not in text
    (sentence,) = (line for line in text.splitlines() if line.startswith("Not measured by these runs: "))
    assert "statistics of sequences, any size (≥ 1.00 × textbook); " in sentence


def test_a_run_on_a_cpu_does_not_measure_the_goals_of_a_gpu(command, measurements):
    group = "fusion loss and gradient, 1M samples, 6 classes, m3er"
    command(a_run({"ours": 0.01, "textbook": 0.1}, group))
    section = measurements.read_text().partition("### Goals on a GPU\n\n")[2]
    assert section.startswith("No run was on a GPU. ")
    command(a_run({"ours": 0.01, "textbook": 0.1}, group, kind="cuda"))
    section = measurements.read_text().partition("### Goals on a GPU\n\n")[2]
    assert "| loss and gradient, 1M × 6 | ≥ 6.00 × textbook | 10.00 × | met |" in section
    assert "check, 65536 samples, k = 30 (≥ 5.00 × textbook); " in section


def test_a_goal_is_met_only_if_every_run_meets_it(command, measurements):
    command(a_run({"ours": 0.01, "textbook": 0.04}), a_run({"ours": 0.01, "textbook": 0.02}))
    assert "| ≥ 3.00 × textbook | 4.00 × | 2.00 × | missed |" in measurements.read_text()


def test_the_reference_counts_for_no_goal():
    assert not {goal.baseline for goal in (*goals.CPU, *goals.GPU)} & {"reference", "reference, compiled"}


def test_a_slowdown_is_the_time_of_a_contestant_relative_to_its_baseline():
    goal = goals.Goal("", "cpu", "", "slowdown", 2.0, "ours", "ours, a third lost")
    row = {"contestant": "ours, a third lost", "group": "inference", "ratios": {"ours": 0.4}}
    assert goal.worst([row]) == pytest.approx(2.5)
    assert not goal.met(2.5)
    assert goal.met(2.0)
    assert goal.wanted() == "≤ 2.00 × ours"


def test_the_worst_of_several_groups_decides_a_goal():
    rows = [
        {"contestant": "ours", "group": group, "ratios": {"textbook": ratio}, "error": error}
        for group, ratio, error in (("scan, B=1", 3.0, 1e-7), ("scan, B=2", 0.5, 1e-3), ("other", 0.1, 1.0))
    ]
    assert goals.Goal("", "cpu", "scan", "ratio", 1.0, "textbook").worst(rows) == 0.5
    assert goals.Goal("", "cpu", "scan", "error", 1e-5).worst(rows) == 1e-3


def test_an_error_and_a_time_are_met_below_their_limit():
    for quantity in ("error", "seconds"):
        goal = goals.Goal("", "cpu", "", quantity, 1e-3)
        assert goal.met(1e-4)
        assert not goal.met(1e-2)


def test_results_that_were_left_out_are_counted_by_reason(command, measurements):
    command(a_run({"ours": 0.01}))
    assert "| Fusion loss and gradient | liger-kernel cross entropy needs a GPU | 2 |" in measurements.read_text()


def test_an_inexact_contestant_is_no_baseline_in_the_figure():
    rows = harness.with_ratios(
        [
            {"group": "g", "contestant": name, "median": median, "error": error}
            for name, median, error in (
                *(("ours", 1.0, 0.0), ("exact", 3.0, 0.0)),
                *(("index", 0.1, 0.2), ("other", 0.1, None)),
            )
        ]
    )
    assert report.best_baseline(rows[0], rows) == ("exact", 3.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a run of these benchmarks"),
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


def test_peak_memory_counts_all_that_a_call_holds_at_once_in_torch_and_numpy():

    def step():
        # 64 MiB each: the 2 MiB that a process may take or release meanwhile are negligible.
        return torch.ones(2**24), np.ones(2**23)

    step()  # as in a benchmark before memory is measured: everything that is loaded once is loaded now
    held = harness.peak_bytes(torch.device("cpu"), step)
    if held is None:
        pytest.skip("this system has no high-water mark")
    assert held == pytest.approx(2**27, rel=0.05)


def test_peak_memory_is_not_the_sum_of_successive_allocations():

    held = harness.peak_bytes(torch.device("cpu"), lambda: [float(torch.ones(2**24).sum()) for _ in range(8)])
    if held is None:
        pytest.skip("this system has no high-water mark")
    assert held < 3 * 2**26  # instead of eight; an allocator may keep one block and take another


def test_the_relative_error_is_of_the_worst_tensor():

    wanted = [torch.tensor([1.0, -4.0]), torch.tensor([10.0])]
    assert harness.relative_error(wanted, wanted) == 0.0
    assert harness.relative_error([torch.tensor([1.0, -3.0]), torch.tensor([11.0])], wanted) == pytest.approx(0.25)


def test_missed_neighbours_are_counted_in_any_order():

    wanted = torch.tensor([[0, 1], [2, 3]])
    assert harness.missed(torch.tensor([[1, 0], [3, 2]]), wanted) == 0.0
    assert harness.missed(torch.tensor([[1, 9], [3, 2]]), wanted) == 0.25


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_scoring_run_becomes_curves_over_workers_without_the_local_runner(with_memory, tmp_path):
    runs = {"local": 9.0, "ray, 4 workers": 2.0, "ray, 1 workers": 4.0, "ray, 2 workers": 2.0}
    medians = {"full": {name: {"first_s": 7.0, "per_shard_s": seconds} for name, seconds in runs.items()}}
    held = {"local": 1, "ray, 4 workers": 400, "ray, 1 workers": 100, "ray, 2 workers": 200}
    memory = {"full": {name: {"peak_bytes": bytes_, "peak_bytes_with_ray": 999} for name, bytes_ in held.items()}}
    scored = {"cores": 2, "medians": medians, "utterances_per_shard": {"full": 1024}}
    sweep = scaling.over_workers(
        scored | {"memory": memory if with_memory else {}}
    )  # systems other than Linux have no memory
    assert sweep["sizes"] == [1, 2, 4]
    [(name, shown)] = sweep["contestants"].items()
    assert name == "1,024 utterances"
    assert shown["seconds"] == {"values": [4.0, 2.0, 2.0], "exponent": pytest.approx(-0.5), "steps": [-1.0, 0.0]}
    if with_memory:
        assert shown["bytes"] == {
            "values": [100, 200, 400],
            "exponent": pytest.approx(1),
            "steps": pytest.approx([1, 1]),
        }
    else:
        assert "bytes" not in shown
    scaling.draw([sweep], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_runs_are_drawn_in_one_figure(tmp_path, capsys):
    results = Path(scaling.__file__).parents[1] / "results"
    arguments = ["--from", results / "cpu-2-cores" / "scaling.json", "--plot", tmp_path / "scaling.png"]
    arguments += ["--workers", results / "scoring-workers-cpu-2-cores.json"]
    assert scaling.main(list(map(str, arguments))) == 0
    assert capsys.readouterr().out.count("exponent") == 4  # time and memory of two kinds of shards
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        ([], 0.0),
        ([(1.0, 3.0)], 2.0),
        ([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0)], 4.0),  # two streams at a time, in any order
        ([(0.0, 10.0), (1.0, 2.0), (9.0, 10.0)], 10.0),
    ],
)
def test_a_gpu_is_busy_while_any_of_its_streams_is(spans, length):
    assert harness.covered(spans) == length


def test_the_use_of_the_device_is_not_traced_on_a_cpu():
    assert harness.device_use(torch.device("cpu"), lambda: pytest.fail("called"), 1.0) == {}


def test_failed_and_unreached_benchmarks_are_left_out_with_their_reason(command, measurements):
    failed = {"memory_scan": {"test_a": "wrong by | 1", "test_b": "wrong by | 1"}}
    assert command(a_run({"ours": 1.0}, failed=failed, not_run={"cca": ["test_c"]})) == 0
    assert "| Memory scan | failed: wrong by \\| 1 | 2 |" in measurements.read_text()
    assert "| CCA | not reached before the run ended | 1 |" in measurements.read_text()


def test_idle_gpus_have_a_table_and_a_goal(command, measurements):
    group = "scoring, 32768 utterances of up to 20 frames"
    run = a_run({"ours": 1.0, "reading alone": 0.9}, group=group, kind="cuda")
    run["benchmarks"][0]["extra_info"] |= {"idle_share": 0.07, "host_waits": 3}
    assert command(run) == 0
    text = measurements.read_text()
    assert f"| {group} | ours | 7% | 3 |" in text
    assert "| scoring, the GPU | ≤ 10% idle | 7% idle | met |" in text
    assert "| scoring, beside its reading alone | ≥ 0.80 × reading alone | 0.90 × | met |" in text


# --- The list of operations ---


def test_the_list_of_operations_has_the_benchmarks_that_there_are():
    files = Path(operations.__file__).parent.glob("test_*.py")
    assert sorted(operations.TITLES) == sorted(path.stem.removeprefix("test_") for path in files)


def test_the_list_of_operations_gives_the_gpu_run_its_shares():
    command = [sys.executable, "-m", "benchmarks.speed.operations"]
    printed = subprocess.run(
        command, cwd=Path(operations.__file__).parents[2], capture_output=True, check=True, text=True
    )
    lines = [f"{operation.name} {operation.gpu_share}" for operation in operations.OPERATIONS if operation.gpu_share]
    assert printed.stdout.splitlines() == lines
    assert "reading" not in printed.stdout  # measured on the CPU alone


@pytest.mark.parametrize(
    ("operation", "former", "current"),
    [
        ("fusion_loss", "eager", "reference"),
        ("fusion_loss", "eager, graphed", "reference, graphed"),
        ("memory_scan", "compiled", "reference, compiled"),
        ("memory_scan", "eager, 128 at a time", "reference, 128 at a time"),
        ("check_statistics", "eager", "textbook"),  # it computed the definition, formula by formula
        ("check_statistics", "eager, folded, graphed", "reference, graphed"),
        ("cca", "torch covariance + SVD, float64", "textbook, float64"),
        *((operation, name, name) for operation in ("cca", "fusion_loss") for name in ("ours", "textbook, compiled")),
    ],
)
def test_a_contestant_from_before_the_textbook_has_the_name_of_today(operation, former, current):
    row = {"operation": operation, "contestant": "ours", "ratios": {former: 2.0}}
    assert operations.current_row(row)["ratios"] == {current: 2.0}
    assert operations.current_row(row | {"contestant": former})["contestant"] == current


@pytest.mark.parametrize("name", ["one-call.json", "one-call-intel-xeon.json"])
def test_a_committed_run_is_read_with_the_names_of_today(name):
    run = report.Run.read(report.ROOT / "benchmarks" / "results" / "cpu-2-cores" / name)
    assert {row["operation"] for row in run.rows} | set(run.left_out) <= set(operations.TITLES)
    assert not any(row["group"].startswith("gate") for row in run.rows)
    assert {other for row in run.rows for other in row["ratios"]} <= {row["contestant"] for row in run.rows}


COMMITTED = [  # the runs of the pages
    f"{folder}/{threads}.json"
    for folder in ("cpu-2-cores", "cpu-2-cores-avx2")
    for threads in ("one-thread", "two-threads")
]


@pytest.fixture(scope="module")
def committed_runs():
    return [report.Run.read(report.ROOT / "benchmarks" / "results" / name) for name in COMMITTED]


def test_the_generated_parts_of_the_pages_are_those_of_their_committed_runs(committed_runs):
    docs = report.ROOT / "docs"
    texts = {name: (docs / name).read_text(encoding="utf-8") for name in ("performance.md", "measurements.md")}

    def lines(name, part):
        return report.generated(texts[name], part, docs / name).strip().splitlines()

    assert lines("performance.md", "conclusions") == report.conclusions(committed_runs)
    links = [line for line in lines("measurements.md", "results") if line.startswith("![")]
    assert lines("measurements.md", "results") == report.results(committed_runs, links)


def test_every_panel_has_a_point_at_every_batch_that_people_use(committed_runs):
    for panel in panels.PANELS:
        for run in committed_runs:
            assert set(BATCHES) <= set(panel.curve("", run.rows).sizes), panel.title


# --- Parts of a run ---


@pytest.fixture
def parts(tmp_path):
    """Writes the files of each part, then merges them and returns the exit code and the JSON."""

    class Parts:
        names = ()

        def add(self, name, code, **files):
            self.names = (*self.names, name)
            for kind, text in {"code": str(code), **files}.items():
                (tmp_path / f"{name}.{kind}").write_text(text)

        def merge(self):
            code = merge.main([str(tmp_path / "out"), str(tmp_path), *self.names])
            return code, json.loads((tmp_path / "out").read_text())

    return Parts()


def a_part(operation, **more):
    run = a_run({"ours": 0.01, "textbook": 0.04}, group=operation)
    return json.dumps(run | {"skipped": {operation: {"a reason": ["a"]}}, "failed": {}, "not_run": {}} | more)


JUNIT = """<?xml version="1.0"?><testsuites><testsuite errors="0" failures="1" skipped="2" tests="3" time="4.5">
<testcase classname="tests.a" name="good"/><testcase classname="tests.a" name="bad"><failure/></testcase>
</testsuite></testsuites>"""


def test_successful_parts_become_one_run_that_can_be_reported(parts, command):
    parts.add("loss", 0, json=a_part("loss"))
    parts.add("scan", 0, json=a_part("scan"))
    code, run = parts.merge()
    assert code == 0
    assert run["exit_codes"] == {"loss": 0, "scan": 0}
    assert [result["extra_info"]["group"] for result in run["benchmarks"]] == ["loss", "loss", "scan", "scan"]
    assert set(run["skipped"]) == {"loss", "scan"}
    assert command(run) == 0


def test_what_was_verified_is_kept_and_a_wrong_result_is_named(parts, capsys):
    mistake = {"case": "one sample", "place": "loss[0]", "got": "1", "wanted": "2", "share": None}
    verdict = {"operation": "class_costs", "implementation": "triton", "device": "cuda:0"}
    verified = [
        verdict | {"cases": 3, "mistakes": [mistake]},
        verdict | {"operation": "fusion_loss", "cases": 5, "mistakes": []},
        verdict | {"implementation": "cupy", "cases": 0, "mistakes": []},
    ]
    info = {"versions": [{"name": "torch"}], "verified": verified}
    parts.add("verification", 1, info=json.dumps(info))
    parts.add("loss", 0, json=a_part("loss"))
    code, run = parts.merge()
    assert code == 1
    assert run["machine"] == info
    assert capsys.readouterr().out.splitlines()[1] == (
        "verification: exit code 1; 1 implementations are right; "
        "class_costs by triton on cuda:0, case 'one sample': loss[0]: got 1, wanted 2"
    )


def test_a_killed_verification_leaves_the_rest(parts, capsys):
    parts.add("verification", 124, info='{"versi')
    parts.add("loss", 0, json=a_part("loss"))
    code, run = parts.merge()
    assert code == 1
    assert "machine" not in run
    assert capsys.readouterr().out.splitlines()[1:] == ["verification: exit code 124", "loss: exit code 0"]


def test_a_killed_or_truncated_part_leaves_the_others_complete(parts, capsys):
    parts.add("tests", 1, xml=JUNIT)
    parts.add("large", 137, xml="<testsui")
    parts.add("loss", 124, json=a_part("loss", not_run={"loss": ["test_b", "test_c"]}))
    parts.add("gate", 137, json='{"benchm')
    parts.add("scan", 1, json=a_part("scan", failed={"scan": {"test_d": "wrong by 1"}}))
    code, run = parts.merge()
    assert code == 1
    assert run["exit_codes"] == {"tests": 1, "large": 137, "loss": 124, "gate": 137, "scan": 1}
    assert run["tests"] == {
        "tests": {"tests": 3, "skipped": 2, "seconds": 4.5, "failed": ["tests.a::bad"]},
        "large": None,
    }
    assert len(run["benchmarks"]) == 4
    assert run["not_run"] == {"loss": ["test_b", "test_c"]}
    assert run["failed"] == {"scan": {"test_d": "wrong by 1"}}
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == [
        "tests: exit code 1; 3 tests, 2 skipped; tests.a::bad",
        "large: exit code 137",
        "loss: exit code 124; 2 not run",
        "gate: exit code 137",
        "scan: exit code 1; test_d: wrong by 1",
    ]
