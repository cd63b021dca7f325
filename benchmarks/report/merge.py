"""One JSON from the parts of a run: what was verified, the tests' outcome, and the results of every benchmark.

    python -m benchmarks.report.merge OUT.json FOLDER PART...

The folder holds files named after each part of the run: ``.code`` with pytest's exit code, ``.xml`` with the outcome of
tests in JUnit's format, ``.json`` with pytest-benchmark's results, and ``.info`` with what ``m3er-fast info --verify
--json`` printed. A part that was killed may lack all but the first; an interrupted part has fewer results. Neither
affects the other parts, and the JSON says how each part ended.

Exit codes: 0 if the exit code of every part is 0; else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def tests_of(path: Path) -> dict[str, Any] | None:
    """Return how many tests ran and were skipped, their seconds, and which failed; None for a truncated file."""
    try:
        suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    except (StopIteration, ElementTree.ParseError):
        return None
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "tests": int(suite.attrib["tests"]),
        "skipped": int(suite.attrib["skipped"]),
        "seconds": float(suite.attrib["time"]),
        "failed": failed,
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or truncated
        return None


def merged(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Return the parts in a folder as one run for the report; the first benchmarks describe the machine."""
    codes = {name: int((folder / f"{name}.code").read_text()) for name in parts}
    run: dict[str, Any] = {"exit_codes": codes, "tests": {}, "benchmarks": []}
    run |= {"skipped": {}, "failed": {}, "not_run": {}}
    for name in parts:
        if (folder / f"{name}.xml").exists():
            run["tests"][name] = tests_of(folder / f"{name}.xml")
        info = _read_json(folder / f"{name}.info")
        if info is not None:
            run["machine"] = info
        part = _read_json(folder / f"{name}.json")
        if part is None:
            continue
        run = {key: value for key, value in part.items() if key not in run} | run
        run["benchmarks"] += part["benchmarks"]
        run |= {key: run[key] | part[key] for key in ("skipped", "failed", "not_run")}
    return run


def _verified(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """Return how many implementations are right, and the first mistake of each that is wrong."""
    wrong = [verdict for verdict in verdicts if verdict["mistakes"]]
    right = sum(bool(verdict["cases"]) for verdict in verdicts) - len(wrong)
    said = [f"{right} implementations are right"] if verdicts else []
    for verdict in wrong:
        mistake = verdict["mistakes"][0]
        said.append(
            f"{verdict['operation']} by {verdict['implementation']} on {verdict['device']}, case {mistake['case']!r}: "
            f"{mistake['place']}: got {mistake['got']}, wanted {mistake['wanted']}"
        )
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("parts", nargs="+", metavar="PART")
    options = parser.parse_args(arguments)
    run = merged(options.folder, options.parts)
    options.out.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(run['benchmarks'])} results")
    for name, code in run["exit_codes"].items():
        tests = run["tests"].get(name)
        outcome = [f"exit code {code}"]
        outcome += [f"{tests['tests']} tests, {tests['skipped']} skipped", *tests["failed"]] if tests else []
        if name == "verification":
            outcome += _verified(run.get("machine", {}).get("verified", []))
        outcome += [f"{len(run['not_run'][name])} not run"] if name in run["not_run"] else []
        outcome += [f"{test}: {reason}" for test, reason in run["failed"].get(name, {}).items()]
        print(f"{name}: {'; '.join(outcome)}")
    return int(any(run["exit_codes"].values()))


if __name__ == "__main__":
    sys.exit(main())
