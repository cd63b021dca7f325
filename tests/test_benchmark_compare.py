"""Comparing two benchmark runs by the ratios within each."""

import json
from pathlib import Path

import pytest

from benchmarks.report import compare

NOISE = (0.99, 1.0, 1.01)


def a_run(seconds, group="loss", noise=NOISE, device="cpu", threads=2, calls=1):
    """Return the JSON of contestants with these median seconds; ``noise`` gives their quartiles."""
    results = [
        {
            "name": "test_it",
            "extra_info": {"group": group, "contestant": name, "calls": calls if name.endswith("graphed") else 1},
            "stats": dict(zip(("q1", "median", "q3"), (median * x for x in noise), strict=True)),
        }
        for name, median in seconds.items()
    ]
    return {"machine_info": {"m3er_fast": {"device": device, "threads": threads}}, "benchmarks": results}


@pytest.fixture
def command(tmp_path):
    def run(before, after, *options):
        paths = tmp_path / "before.json", tmp_path / "after.json"
        for path, content in zip(paths, (before, after), strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return compare.main([*map(str, paths), *options])

    return run


def test_ours_slower_relative_to_its_baseline_is_exit_code_1(command, capsys):
    assert command(a_run({"ours": 1.0, "textbook": 3.0}), a_run({"ours": 1.5, "textbook": 3.0})) == 1
    assert "| loss | textbook | 3.00 (2.94 to 3.06) | 2.00 (1.96 to 2.04) | fallen |" in capsys.readouterr().out


def test_a_slower_machine_changes_no_ratio(command):
    assert command(a_run({"ours": 1.0, "textbook": 3.0}), a_run({"ours": 5.0, "textbook": 15.0})) == 0


def test_a_faster_ours_is_exit_code_0_and_reported(command, capsys):
    assert command(a_run({"ours": 1.0, "textbook": 3.0}), a_run({"ours": 0.5, "textbook": 3.0})) == 0
    assert "| risen |" in capsys.readouterr().out


def test_one_fallen_ratio_among_several_is_enough(command):
    before = a_run({"ours": 1.0, "textbook": 3.0, "compiled": 2.0})
    assert command(before, a_run({"ours": 1.0, "textbook": 3.0, "compiled": 1.0})) == 1


def test_within_the_noise_of_the_rounds_nothing_has_fallen(command):
    noisy = (0.8, 1.0, 1.2)
    before, after = {"ours": 1.0, "textbook": 3.0}, {"ours": 1.4, "textbook": 3.0}
    assert command(a_run(before, noise=noisy), a_run(after, noise=noisy)) == 0
    assert command(a_run(before), a_run(after)) == 1


def test_rounds_in_turns_count_more_than_two_times_that_were_measured_apart():
    run = a_run({"ours": 1.0, "textbook": 3.0})
    run["benchmarks"][1]["extra_info"]["time_to_ours"] = {"q1": 1.9, "median": 2.0, "q3": 2.1}
    assert compare.ratios(run)["loss", "textbook"] == (1.9, 2.0, 2.1)


def test_a_run_from_before_the_textbook_is_compared_by_todays_names(command, capsys):
    before = a_run(
        {"ours": 1.0, "eager": 3.0, "compiled": 2.0}, group="fusion loss and gradient, batch of 256, 6 classes, m3er"
    )
    after = a_run(
        {"ours": 1.0, "textbook": 1.0, "reference": 2.0}, group="fusion loss and gradient, 256 samples, 6 classes, m3er"
    )
    assert command(before, after) == 1
    lines = capsys.readouterr().out.splitlines()
    group = "fusion loss and gradient, 256 samples, 6 classes, m3er"
    assert f"| {group} | reference | 3.00 (2.94 to 3.06) | 2.00 (1.96 to 2.04) | fallen |" in lines
    assert f"| {group} | reference, compiled | | | not in AFTER |" in lines
    assert f"| {group} | textbook | | | not in BEFORE |" in lines


@pytest.mark.parametrize(("least", "code"), [("0.0", 1), ("0.1", 0)])
def test_a_small_loss_counts_only_with_a_smaller_least(command, least, code):
    assert (
        command(a_run({"ours": 1.0, "textbook": 3.0}), a_run({"ours": 1.08, "textbook": 3.0}), "--least", least) == code
    )


def test_the_range_of_a_ratio_comes_from_the_quartiles_of_both():
    run = a_run({"ours": 0.5})
    run["benchmarks"] += a_run({"textbook": 3.0}, noise=(0.5, 1.0, 2.0))["benchmarks"]
    ratio = compare.ratios(run)["loss", "textbook"]
    assert ratio == pytest.approx((1.5 / 0.505, 6.0, 6.0 / 0.495))


def test_a_result_of_several_calls_is_divided_by_their_number():
    ratio = compare.ratios(a_run({"ours": 1.0, "textbook, graphed": 32.0}, calls=16))["loss", "textbook, graphed"]
    assert ratio.median == pytest.approx(2.0)


def test_other_contestants_of_ours_are_no_baselines():
    run = a_run({"ours": 1.0, "ours, graphed": 0.5, "textbook": 3.0})
    assert list(compare.ratios(run)) == [("loss", "textbook")]


def test_a_ratio_in_only_one_run_is_reported_and_not_judged(command, capsys):
    before, after = a_run({"ours": 1.0, "textbook": 3.0}), a_run({"ours": 1.0, "textbook": 3.0})
    before["benchmarks"] += a_run({"ours": 1.0, "textbook": 9.0}, group="gone")["benchmarks"]
    assert command(before, after) == 0
    assert "| gone | textbook | | | not in AFTER |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            a_run({"ours": 1.0, "textbook": 3.0}),
            a_run({"ours": 1.0, "textbook": 3.0}, device="H200"),
            "device differs",
        ),
        (a_run({"ours": 1.0, "textbook": 3.0}), a_run({"ours": 1.0, "textbook": 3.0}, threads=1), "threads differs"),
        (a_run({"ours": 1.0, "textbook": 3.0}), a_run({"ours": 1.0}), "no group"),
        (a_run({"ours": 1.0, "textbook": 3.0}), "{", "not JSON"),
        (a_run({"ours": 1.0, "textbook": 3.0}), "[]", "no list of benchmarks"),
    ],
)
def test_incomparable_runs_are_exit_code_2_and_one_line(command, capsys, before, after, said):
    assert command(before, after) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_every_ratio_of_a_committed_run_falls_if_ours_is_made_ten_times_slower():
    text = (Path(compare.__file__).parents[1] / "results" / "cpu-2-cores" / "one-call.json").read_text()
    before, after = json.loads(text), json.loads(text)
    for result in after["benchmarks"]:
        if result["extra_info"]["contestant"] == "ours":
            result["stats"] |= {key: 10 * result["stats"][key] for key in ("q1", "median", "q3")}
        elif (in_turns := result["extra_info"].get("time_to_ours")) is not None:
            result["extra_info"]["time_to_ours"] = {key: value / 10 for key, value in in_turns.items()}
    lines, fallen = compare.compare(before, after)
    assert fallen
    assert len(lines) > 10
    assert all(line.endswith("| fallen |") for line in lines[2:])
    assert not compare.compare(before, before)[1]
