"""Count what the kernels of a call cost, in the emulator, and bound their time on three GPUs from below.

    python -m benchmarks.counts [OPERATION ...] [--out FILE] [--page docs/counts.md]

needs no GPU. It compiles for sm_80 and sm_90. Nothing here is a measured time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.counts.bounds import DEVICES, SECTOR, Launch, bound, total

ROOT = Path(__file__).parents[2]
TARGETS = sorted({device.target for device in DEVICES.values()})
OPERATIONS = ("fusion_loss", "check_statistics", "sequence_statistics", "local_lstsq", "memory_scan")
MARKER = "<!-- Written by python -m benchmarks.counts: {} -->"


def counted_here(target: int, operations: list[str]) -> list[dict[str, Any]]:
    """Return the counts of the operations' calls on one generation, in this process from now on."""
    from benchmarks.counts.calls import OPERATIONS as CALLS
    from benchmarks.counts.counting import CountingDriver

    driver = CountingDriver(target)
    driver.take_the_place_of_a_gpu()
    return [
        {
            "operation": operation,
            "call": call.name,
            "target": target,
            "unit": call.unit,
            "units": call.units,
            "ideal_bytes": call.least.bytes,
            "launches": [launch._asdict() for launch in driver.count(call.step)],
        }
        for operation in operations
        for call in CALLS[operation]()
    ]


def counted(target: int, operations: list[str]) -> list[dict[str, Any]]:
    """Return the same from a process of its own: a kernel is compiled for one generation per process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.counts", *operations, "--target", str(target)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def with_bounds(row: dict[str, Any]) -> dict[str, Any]:
    """Return a call's counts and the least time of its launches on each device of its generation."""
    launches = [Launch(**launch) for launch in row["launches"]]
    bounds = {
        name: total([bound(launch, device) for launch in launches])._asdict()
        for name, device in DEVICES.items()
        if device.target == row["target"]
    }
    return row | {"bounds": bounds}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the calls as a table of Markdown."""
    heads = ("Call", "sm", "Launches", "Programs", "Thread instructions", "Sectors / ideal", "Distinct / ideal")
    heads += ("Wavefronts / ideal", "Barriers", "Least µs, by")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        launches = [Launch(**launch) for launch in row["launches"]]
        moved = SECTOR * sum(launch.load_sectors + launch.store_sectors for launch in launches)
        distinct = SECTOR * sum(launch.distinct_sectors for launch in launches)
        wavefronts, ideal = (sum(launch[i] for launch in launches) for i in (9, 10))
        threads = 32 * sum(launch.instructions for launch in launches)
        least = ", ".join(f"{name} {1e6 * b['seconds']:.2f} ({b['resource']})" for name, b in row["bounds"].items())
        cells = [
            f"`{row['operation']}`, {row['call']}",
            row["target"],
            len(launches),
            ", ".join(str(launch.programs) for launch in launches),
            f"{threads / row['units']:,.0f} per {row['unit']}",
            f"{moved / row['ideal_bytes']:.2f}",
            f"{distinct / row['ideal_bytes']:.2f}",
            f"{wavefronts / ideal:.2f}" if ideal else "",
            ", ".join(f"{launch.barriers / launch.programs:.0f}" for launch in launches),
            least,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def write_page(path: Path, lines: list[str]) -> None:
    """Replace what is between the page's two markers."""
    begin, end = MARKER.format("begin"), MARKER.format("end")
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} lacks the lines {begin!r} and {end!r}")
    path.write_text("\n".join([before + begin, "", *lines, "", end + after]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(OPERATIONS)}; default: all")
    parser.add_argument("--out", type=Path, help="write all counts as JSON")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    parser.add_argument("--target", type=int, choices=TARGETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := {*arguments.operations} - {*OPERATIONS}:
        parser.error(f"OPERATION must be of {', '.join(OPERATIONS)}, got {', '.join(sorted(unknown))}")
    operations = arguments.operations or list(OPERATIONS)
    if arguments.target:
        json.dump(counted_here(arguments.target, operations), sys.stdout)
        return
    rows = [with_bounds(row) for target in TARGETS for row in counted(target, operations)]
    rows.sort(key=lambda row: operations.index(row["operation"]))
    print("Counted in the emulator, not timed on a GPU.\n", *table(rows), sep="\n")
    if arguments.out:
        content = {
            "what": "counted in the emulator, not timed on a GPU",
            "triton": importlib.metadata.version("triton"),
            "devices": {name: device._asdict() | {"clock": device.clock} for name, device in DEVICES.items()},
            "calls": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        write_page(arguments.page, table(rows))


if __name__ == "__main__":
    main()
