"""The generated parts of ``docs/performance.md`` and ``docs/measurements.md``, and their figures, from benchmark runs.

    python -m benchmarks.report RUN.json...

The report replaces everything between the markers of a part: the conclusions on the first page, every table on the
second. The same runs give the same bytes. A run is a file of ``pytest benchmarks --benchmark-only
--benchmark-json RUN.json``; it may hold only some of the benchmarks. Runs are kept apart: by device, threads or file.

Exit codes: 0 written; 2 a run or a page cannot be used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.report import goals
from benchmarks.speed.harness import COMPILED, OURS, TEXTBOOK, markdown, shown_rate, shown_seconds
from benchmarks.speed.operations import TITLES, current_operation, current_row, device_of

ROOT = Path(__file__).resolve().parents[2]
FIGURE_OVER_BATCH = "textbook-cpu.png"
NEVER_SLOWER = "In these runs it was never slower than the textbook, eager or compiled."

_RESULT_FIELDS = {"operation", "group", "contestant", "median", "ratios"}
_RUN_FIELDS = {
    "commit",
    "device",
    "kind",
    "threads",
    "cores",
    "copy_bytes_per_second",
    "operations_per_second",
    "packages",
}
# A contestant further from the oracle, such as an approximate index, is no baseline for an exact one.
SAME_ANSWER = 1e-2


class Run(NamedTuple):
    """The parts of one JSON of pytest-benchmark that are reported."""

    name: str  # of the file
    about: dict[str, Any]
    rows: list[dict[str, Any]]  # each with its "operation"; today's names, whatever the file has
    left_out: dict[str, dict[str, int]]  # operation -> reason -> results

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a JSON.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a run of these benchmarks; the message names the file and the reason.
        """
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            about = run["machine_info"]["m3er_fast"] | {"device": device_of(run["machine_info"])}
            rows = [current_row(result["extra_info"]) for result in run["benchmarks"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a run of these benchmarks ({type(error).__name__}: {error})") from error
        lacking = sorted({name for row in rows for name in _RESULT_FIELDS - row.keys()} | (_RUN_FIELDS - about.keys()))
        if lacking:
            raise ValueError(f"{path} is not a run of today's benchmarks: it lacks {', '.join(lacking)}")
        return cls(path.name, about, rows, _reasons(run))


def _reasons(run: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Count missing results by reason: skipped, failed, or not reached because the run was interrupted."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for operation, reasons in run.get("skipped", {}).items():
        found[current_operation(operation)].update({reason: len(tests) for reason, tests in reasons.items()})
    for operation, failed in run.get("failed", {}).items():
        found[current_operation(operation)].update(f"failed: {reason}" for reason in failed.values())
    for operation, tests in run.get("not_run", {}).items():
        found[current_operation(operation)]["not reached before the run ended"] = len(tests)
    return {operation: dict(reasons) for operation, reasons in found.items()}


def labels(runs: Sequence[Run]) -> list[str]:
    """Return what tells each run from the others: its threads, and where these differ its device or its file.

    Of devices that begin alike ("AMD EPYC, AVX2") only what follows is named.
    """
    devices = [run.about["device"].split(", ") for run in runs]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*devices, strict=False))
    common = len(list(shared))
    names = []
    for run, device in zip(runs, devices, strict=True):
        threads = run.about["threads"]
        name = f"{threads} thread{'s' * (threads > 1)}" if run.about["kind"] == "cpu" else run.about["kind"]
        names.append(", ".join([*device[common:], name]))
    repeated = {name for name, number in Counter(names).items() if number > 1}
    return [
        f"{name}, {Path(run.name).stem}" if name in repeated else name for name, run in zip(names, runs, strict=True)
    ]


def marker(part: str, edge: Literal["begin", "end"]) -> str:
    """Return the line before or after a generated part of a page."""
    return f"<!-- Written by python -m benchmarks.report: {part}, {edge} -->"


def generated(text: str, part: str, path: Path) -> str:
    """Return a generated part of the text of a page.

    Raises:
        ValueError: the page lacks a marker of this part or repeats one, or they are in the wrong order.
    """
    begin, end = marker(part, "begin"), marker(part, "end")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path}: wanted one line {begin!r} and one line {end!r} below it")
    return text.split(begin)[1].split(end)[0]


def write_report(runs: Sequence[Run], page: Path, measurements: Path, figures: Path) -> None:
    """Write the figures and the generated parts of both pages.

    Raises:
        ValueError: a page lacks a marker or repeats one, they are in the wrong order, or no run has a result.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in (page, measurements)}
    wanted = [(page, "conclusions"), (measurements, "results")]
    for path, part in wanted:
        generated(texts[path], part, path)
    if not any(run.rows for run in runs):
        raise ValueError("no run has a result")
    drawn = draw(runs, figures)
    links = figure_links(drawn, measurements.parent)
    for (path, part), lines in zip(wanted, [conclusions(runs), results(runs, links)], strict=True):
        new = "\n".join([marker(part, "begin"), "", *lines, "", marker(part, "end")])
        old = marker(part, "begin") + generated(texts[path], part, path) + marker(part, "end")
        texts[path] = texts[path].replace(old, new)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def conclusions(runs: Sequence[Run]) -> list[str]:
    """Return the first page's conclusions: a line for each panel of the figure over B, and what is slower."""
    from benchmarks.report.panels import PANELS

    named = _on_cpu(runs)
    lines = [f"| {' | '.join(['', *(label for _, label in named)])} |", "|---" * (1 + len(named)) + "|"]
    for panel in PANELS:
        curves = [panel.curve(label, run.rows) for run, label in named]
        if any(curve.sizes for curve in curves):
            lines.append(f"| {' | '.join([panel.subject(curves), *map(panel.range_of, curves)])} |")
    return [*lines, "", "## When it is slower", "", *_slower_kinds(runs)]


def figure_links(drawn: Sequence[tuple[str, Path]], folder: Path) -> list[str]:
    """Return the figures as Markdown for a page in ``folder``."""
    return [f"![{title}]({Path(os.path.relpath(path, folder)).as_posix()})" for title, path in drawn]


def _on_cpu(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Return the runs on a CPU, each with its label."""
    return [(run, label) for run, label in zip(runs, labels(runs), strict=True) if run.about["kind"] == "cpu"]


def _on_first_device(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Return the runs on the device of the first one, each with its label."""
    return [
        (run, label)
        for run, label in zip(runs, labels(runs), strict=True)
        if run.about["device"] == runs[0].about["device"]
    ]


def results(runs: Sequence[Run], links: Sequence[str]) -> list[str]:
    """Return the generated part of the second page.

    It has the runs, the figures, the goals, every result that is slower than the textbook's, and for each operation
    its ratios, then for the first run's device a table per group.
    """
    lines = [*_table_of_runs(runs), "", *(line for link in links for line in (link, ""))]
    lines += ["### Goals", "", *_table_of_goals(runs), "", "### Slower than the textbook", "", *_slower(runs), ""]
    for operation in _operations(runs):
        lines += [f"### {TITLES.get(operation, operation)}", "", *_table_of_ratios(runs, operation)]
        for run, label in _on_first_device(runs):
            lines += markdown([row for row in run.rows if row["operation"] == operation], f", {label}")
        lines += [""]
    lines += ["### Goals on a GPU", "", *_table_of_gpu_goals(runs)]
    return [*lines, *_table_of_device_use([row for run in runs for row in run.rows]), *_left_out(runs)]


def _operations(runs: Sequence[Run]) -> list[str]:
    """Return the operations that were measured, in the order of their list."""
    found = dict.fromkeys(row["operation"] for run in runs for row in run.rows)
    return [*(name for name in TITLES if name in found), *(name for name in found if name not in TITLES)]


def _table_of_runs(runs: Sequence[Run]) -> list[str]:
    lines = ["| Run | Device | Threads | Commit | torch | Copy | Products, GFLOP/s |", "|---|---|---|---|---|---|---|"]
    for run in runs:
        about = run.about
        products = ", ".join(f"{unit} {rate / 1e9:.3g}" for unit, rate in about["operations_per_second"].items())
        lines.append(
            f"| `{run.name}` | {about['device']} | {about['threads']} of {about['cores']} | `{about['commit'][:7]}` "
            f"| {about['packages']['torch']} | {about['copy_bytes_per_second'] / 1e9:.3g} GB/s | {products} |"
        )
    return lines


def _table_of_goals(runs: Sequence[Run]) -> list[str]:
    """Return the goals on a CPU, with those that they replace and the worst value of each run."""
    chosen = _on_cpu(runs)
    columns = [label for _, label in chosen]
    lines = [f"| {' | '.join(['', 'Goal before', 'Goal', *columns, ''])} |", "|---" * (4 + len(columns)) + "|"]
    unmeasured = []
    for goal in goals.CPU:
        values = [goal.worst(run.rows) for run, _ in chosen]
        if all(value is None for value in values):
            unmeasured.append(goal)
            continue
        shown = ["" if value is None else goal.shown(value) for value in values]
        cells = [goal.subject, goal.former, goal.wanted(), *shown, _verdict(goal, values)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *_unmeasured(unmeasured)]


def _unmeasured(of: Sequence[goals.Goal]) -> list[str]:
    """Return one sentence on the goals that no run measured."""
    if not of:
        return []
    return ["", f"Not measured by these runs: {'; '.join(f'{goal.subject} ({goal.wanted()})' for goal in of)}."]


def _table_of_gpu_goals(runs: Sequence[Run]) -> list[str]:
    on_gpu = [run for run in runs if run.about["kind"] == "cuda"]
    if not on_gpu:
        return [f"No run was on a GPU. `benchmarks/report/goals.py` has the {len(goals.GPU)} goals for one."]
    lines = ["| | Goal | Measured | |", "|---|---|---|---|"]
    unmeasured = []
    for goal in goals.GPU:
        values = [goal.worst(run.rows) for run in on_gpu]
        found = sorted(value for value in values if value is not None)
        if not found:
            unmeasured.append(goal)
            continue
        shown = " to ".join(dict.fromkeys(goal.shown(value) for value in (found[:1] + found[-1:])))
        lines.append(f"| {goal.subject} | {goal.wanted()} | {shown} | {_verdict(goal, values)} |")
    return [*lines, *_unmeasured(unmeasured)]


def _verdict(goal: goals.Goal, values: Iterable[float | None]) -> str:
    return "met" if all(goal.met(value) for value in values if value is not None) else "missed"


def _slower_kinds(runs: Sequence[Run]) -> list[str]:
    """Return a line per operation and contestant that was ever faster than ours: how often, and where it was most so.

    Results are counted over all runs.
    """
    beside: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for run, label in zip(runs, labels(runs), strict=True):
        for row in run.rows:
            if row["contestant"] in (TEXTBOOK, COMPILED) and row["ratios"].get(OURS):
                key = TITLES.get(row["operation"], row["operation"]), row["contestant"]
                beside[key].append((1.0 / row["ratios"][OURS], f"{row['group']}, {label}"))
    lines = ["| | Beside | Slower in | Worst, that time : ours | at |", "|---|---|---|---:|---|"]
    for (title, contestant), found in beside.items():
        slower = sum(ratio < 1.0 for ratio, _ in found)
        if slower:
            worst, at = min(found)
            lines.append(f"| {title} | {contestant} | {slower} of {len(found)} results | {worst:.2f} | {at} |")
    return lines if len(lines) > 2 else [NEVER_SLOWER]


def _slower(runs: Sequence[Run]) -> list[str]:
    """Return a table of the groups in which the textbook, eager or compiled, took less time than ours."""
    lines = ["| | | Beside | That time : ours (quartiles) |", "|---|---|---|---:|"]
    for run, label in zip(runs, labels(runs), strict=True):
        lines += [
            f"| {row['group']} | {label} | {row['contestant']} | {_shown_ratio(row, 1.0 / row['ratios'][OURS])} |"
            for row in run.rows
            if row["contestant"] in (TEXTBOOK, COMPILED) and row["ratios"].get(OURS, 0.0) > 1.0
        ]
    return lines if len(lines) > 2 else [NEVER_SLOWER]


def _table_of_ratios(runs: Sequence[Run], operation: str) -> list[str]:
    """Return a line per group and run of an operation: our time, and the others' times relative to ours."""
    lines = ["| | | ours | samples / s | textbook : ours | compiled : ours | others : ours |"]
    lines += ["|---|---|---:|---:|---:|---:|---|"]
    named = list(zip(runs, labels(runs), strict=True))
    groups = dict.fromkeys(row["group"] for run in runs for row in run.rows if row["operation"] == operation)
    for group in groups:
        first = group
        for run, label in named:
            rows = {row["contestant"]: row for row in run.rows if row["group"] == group}
            if (ours := rows.get(OURS)) is None:
                continue
            ratio_of = ours["ratios"]
            ratios = [
                _shown_ratio(rows[name], ratio_of[name]) if name in ratio_of else "" for name in (TEXTBOOK, COMPILED)
            ]
            others = [f"{ratio_of[name]:.2f} {name}" for name in rows if name not in (OURS, TEXTBOOK, COMPILED)]
            cells = [first, label, shown_seconds(ours["median"]), shown_rate(ours), *ratios, "; ".join(others)]
            lines.append(f"| {' | '.join(cells)} |")
            first = ""
    return lines


def _shown_ratio(row: dict[str, Any], ratio: float) -> str:
    """Return the time of a row divided by ours, with its quartiles where the two took turns."""
    if (spread := row.get("time_to_ours")) is None:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} ({spread['q1']:.2f} to {spread['q3']:.2f})"


def _table_of_device_use(rows: Sequence[dict[str, Any]]) -> list[str]:
    traced = [row for row in rows if "host_waits" in row]
    if not traced:
        return []
    lines = ["", "### Idle GPU", "", "| | | GPU idle | Host waits |", "|---|---|---:|---:|"]
    for row in traced:
        idle = f"{row['idle_share']:.0%}" if "idle_share" in row else ""
        lines.append(f"| {row['group']} | {row['contestant']} | {idle} | {row['host_waits']} |")
    return lines


def _left_out(runs: Sequence[Run]) -> list[str]:
    reasons: dict[tuple[str, str], int] = {}
    for run in runs:
        for operation, found in run.left_out.items():
            for reason, number in found.items():
                key = TITLES.get(operation, operation), reason
                reasons[key] = reasons.get(key, 0) + number
    if not reasons:
        return []
    lines = ["", "### Left out", "", "| | Reason | Results |", "|---|---|---:|"]
    for (operation, reason), number in reasons.items():
        escaped = reason.replace("|", "\\|")
        lines.append(f"| {operation} | {escaped} | {number} |")
    return lines


def draw(runs: Sequence[Run], folder: Path) -> list[tuple[str, Path]]:
    """Draw the ratios over B of all runs on a CPU, and the figures of each run on the first one's device.

    Returns:
        Title and file of each figure.
    """
    from benchmarks.report import figures
    from benchmarks.report.panels import PANELS

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    panels = [
        (panel.title, panel.least, [c for run, label in _on_cpu(runs) if (c := panel.curve(label, run.rows)).sizes])
        for panel in PANELS
    ]
    if any(curves for _, _, curves in panels):
        path = folder / FIGURE_OVER_BATCH
        figures.over_batch(panels, path)
        drawn.append(("Time of the textbook divided by our time, over the samples of a batch", path))
    for run, label in _on_first_device(runs):
        name = f"{run.about['kind']}-{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}"
        bars = [
            (row["group"], *best)
            for row in run.rows
            if row["contestant"] == OURS and (best := best_baseline(row, run.rows))
        ]
        if bars:
            path = folder / f"ratios-{name}.png"
            figures.ratios(bars, path)
            drawn.append((f"Time of the fastest baseline divided by our time, per group, {label}", path))
        points = figures.points(run.rows, TITLES)
        if points:
            path = folder / f"roofline-{name}.png"
            figures.roofline(points, run.about["copy_bytes_per_second"], run.about["operations_per_second"], path)
            drawn.append(
                (f"Operations per second over operations per byte, below the rates of the device, {label}", path)
            )
    return drawn


def best_baseline(ours: dict[str, Any], rows: Iterable[dict[str, Any]]) -> tuple[str, float] | None:
    """Return the fastest other contestant of a run with the same answer, and its time divided by ours."""
    others = [
        (ours["ratios"][row["contestant"]], row["contestant"])
        for row in rows
        if row["group"] == ours["group"]
        and not row["contestant"].startswith(OURS)
        and row.get("error") is not None
        and row["error"] <= SAME_ANSWER
    ]
    if not others:
        return None
    ratio, name = min(others)
    return name, ratio


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--measurements", type=Path, default=ROOT / "docs" / "measurements.md")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "results", help="folder for the figures")
    options = parser.parse_args(arguments)
    try:
        runs = [Run.read(path) for path in options.runs]
        write_report(runs, options.page, options.measurements, options.figures)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
