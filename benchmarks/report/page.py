"""The generated part of ``docs/performance.md`` and its figures, from JSONs of benchmark runs.

    python -m benchmarks.report RUN.json...

The report replaces everything between the two markers of the page; the same runs give the same bytes. A run is a file
of ``pytest benchmarks --benchmark-only --benchmark-json RUN.json``; it may hold only some of the benchmarks.

Exit codes: 0 written; 2 a run or the page cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import goals
from benchmarks.speed.harness import OURS, markdown
from benchmarks.speed.operations import TITLES, current_operation, current_row

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- Written by python -m benchmarks.report: begin -->"
END = "<!-- Written by python -m benchmarks.report: end -->"

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
            about = run["machine_info"]["m3er_fast"]
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


def write_report(runs: Sequence[Run], page: Path, figures: Path) -> None:
    """Write the figures and the part of the page between its markers.

    Raises:
        ValueError: the page lacks a marker or repeats one, the markers are in the wrong order, or no run has a result.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page}: wanted one line {BEGIN!r} and one line {END!r} below it")
    if not any(run.rows for run in runs):
        raise ValueError("no run has a result")
    drawn = draw(runs, figures)
    links = [f"![{title}]({Path(os.path.relpath(path, page.parent)).as_posix()})" for title, path in drawn]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text("\n".join([f"{before}{BEGIN}", "", *report(runs, links), "", f"{END}{after}"]), encoding="utf-8")


def report(runs: Sequence[Run], figures: Sequence[str] = ()) -> list[str]:
    """Return the generated part as lines of Markdown."""
    rows = [row for run in runs for row in run.rows]
    several_devices = len({run.about["device"] for run in runs}) > 1
    lines = [*_table_of_runs(runs), "", "### Goals", "", *_table_of_goals(runs, goals.CPU)]
    lines += ["", "On a GPU:", "", *_table_of_goals(runs, goals.GPU)]
    for figure in figures:
        lines += ["", figure]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        lines += ["", f"### {TITLES.get(operation, operation)}"]
        for run in runs:
            found = [row for row in run.rows if row["operation"] == operation]
            if found:
                lines += markdown(found, f", {run.about['device']}" if several_devices else "")
    lines += _table_of_device_use(rows)
    return lines + _left_out(runs)


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


def _table_of_goals(runs: Sequence[Run], wanted: Iterable[goals.Goal]) -> list[str]:
    lines = ["| | Goal | Measured | |", "|---|---|---|---|"]
    for goal in wanted:
        values = [goal.worst(run.rows) for run in runs if run.about["kind"] == goal.kind]
        found = sorted(value for value in values if value is not None)
        shown = " to ".join(dict.fromkeys(goal.shown(value) for value in (found[:1] + found[-1:])))
        verdict = "not measured" if not found else "met" if all(map(goal.met, found)) else "missed"
        lines.append(f"| {goal.subject} | {goal.wanted()} | {shown} | {verdict} |")
    return lines


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
    """Draw the figures of the first run's device; return the title and the file of each."""
    from benchmarks.report import figures

    about = runs[0].about
    rows = [row for run in runs if run.about["device"] == about["device"] for row in run.rows]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    points = figures.points(rows, TITLES)
    if points:
        path = folder / f"roofline-{about['kind']}.png"
        figures.roofline(points, about["copy_bytes_per_second"], about["operations_per_second"], path)
        drawn.append(("Operations per second over operations per byte, below the rates of the device", path))
    bars = [(row["group"], *best) for row in rows if row["contestant"] == OURS and (best := best_baseline(row, rows))]
    if bars:
        path = folder / f"ratios-{about['kind']}.png"
        figures.ratios(bars, path)
        drawn.append(("Time of the fastest baseline divided by our time, per group", path))
    return drawn


def best_baseline(ours: dict[str, Any], rows: Iterable[dict[str, Any]]) -> tuple[str, float] | None:
    """Return the fastest other contestant with the same answer, and its time divided by ours."""
    others = [
        (row["median"] / ours["median"], row["contestant"])
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
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "results", help="folder for the figures")
    options = parser.parse_args(arguments)
    try:
        write_report([Run.read(path) for path in options.runs], options.page, options.figures)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
