"""Whether this project has become slower relative to the baselines of its own run, from two JSONs of pytest-benchmark.

Seconds are never compared, because they depend on the machine and its other work. Compared are the ratios "time of the
baseline divided by our time" of every group and baseline, each with the range that the quartiles of the rounds give it.
A ratio has fallen if the whole range of the second run lies below that of the first by more than ``--least``.

    python -m benchmarks.report.compare BEFORE.json AFTER.json

Exit codes: 0 no ratio has fallen; 1 at least one has; 2 the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed.operations import current_row, device_of

OURS = "ours"
_QUARTILES = ("q1", "median", "q3")
# Two runs of one commit differ by more than their rounds do, by addresses and the other work of the machine.
LEAST = 0.1


class Ratio(NamedTuple):
    """Time of a baseline divided by our time, in one run."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, baseline: dict[str, Any], ours: dict[str, Any]) -> Ratio:
        """Return the ratio of two results: that of their rounds in turns, else of their quartiles.

        A result may time several calls as one.
        """
        if (in_turns := baseline["extra_info"].get("time_to_ours")) is not None:
            return cls(*(in_turns[key] for key in _QUARTILES))
        b, o = ([result["stats"][key] for key in _QUARTILES] for result in (baseline, ours))
        calls = ours["extra_info"].get("calls", 1) / baseline["extra_info"].get("calls", 1)
        return cls(calls * b[0] / o[2], calls * b[1] / o[1], calls * b[2] / o[0])

    def has_fallen_since(self, before: Ratio, least: float) -> bool:
        """Return whether this whole range lies below that one by more than the share ``least``."""
        return self.high < before.low * (1.0 - least)


def ratios(run: dict[str, Any]) -> dict[tuple[str, str], Ratio]:
    """Return the ratios of a run of pytest-benchmark, by group and baseline."""
    found = {}
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for result in run["benchmarks"]:
        info = current_row(result["extra_info"])
        if "contestant" in info:
            groups.setdefault(info["group"], {})[info["contestant"]] = result
    for group, contestants in groups.items():
        for name, result in contestants.items():
            if OURS in contestants and not name.startswith(OURS):
                found[group, name] = Ratio.of(result, contestants[OURS])
    return found


def compare(before: dict[str, Any], after: dict[str, Any], *, least: float = LEAST) -> tuple[list[str], bool]:
    """Return the lines of a Markdown table, and whether any ratio has fallen.

    Raises:
        ValueError: the runs have different devices or numbers of threads, or no group and baseline in common.
    """
    for key in ("device", "threads"):
        was, now = (_circumstances(run).get(key) for run in (before, after))
        if was != now:
            raise ValueError(f"{key} differs: {was!r} before, {now!r} after; ratios hold for one device")
    was, now = ratios(before), ratios(after)
    common = [key for key in was if key in now]
    if not common:
        raise ValueError("the two runs share no group that has ours and a baseline")
    lines = ["| | baseline | before | after | |", "|---|---|---|---|---|"]
    fallen = False
    for group, name in common:
        old, new = was[group, name], now[group, name]
        verdict = "fallen" if new.has_fallen_since(old, least) else "risen" if old.has_fallen_since(new, least) else ""
        fallen |= verdict == "fallen"
        lines.append(f"| {group} | {name} | {_shown(old)} | {_shown(new)} | {verdict} |")
    for title, only in (("not in AFTER", was.keys() - now.keys()), ("not in BEFORE", now.keys() - was.keys())):
        lines += [f"| {group} | {name} | | | {title} |" for group, name in sorted(only)]
    return lines, fallen


def _shown(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--least",
        type=float,
        default=LEAST,
        help="share that a ratio may lose before it has fallen (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not 0.0 <= options.least < 1.0:
        parser.error(f"--least must lie in [0, 1), got {options.least}")
    try:
        lines, fallen = compare(*map(_read, (options.before, options.after)), least=options.least)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(fallen)


def _circumstances(run: dict[str, Any]) -> dict[str, Any]:
    """Return the device and the number of threads of a run; nothing of one that does not say."""
    machine = run.get("machine_info", {})
    about = machine.get("m3er_fast")
    return {} if about is None else {"device": device_of(machine), "threads": about.get("threads")}


def _read(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(run, dict) or not isinstance(run.get("benchmarks"), list):
        raise ValueError(f"{path} is not a file of pytest --benchmark-json: it has no list of benchmarks")
    return run


if __name__ == "__main__":
    sys.exit(main())
