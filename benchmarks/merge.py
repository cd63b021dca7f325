"""From the parts of a run to one JSON: what the tests said, and the results of every benchmark that was measured.

    python benchmarks/merge.py OUT.json FOLDER PART...

The folder holds, of each part of the run in files by its name, pytest's exit code (``.code``), what tests said in
JUnit's form (``.xml``), and what benchmarks measured (``.json``, pytest-benchmark's). A part that was killed may have
written neither, and one that was interrupted has what it got to: the others keep their results, and the JSON says
which parts ended how.

Exit codes: 0 if that of every part is; else 1.
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
    """Of tests their number, how many were skipped, the seconds, and those that failed; None of a file cut short."""
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


def merged(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """One run of these parts in a folder, about the machine as its first benchmarks say, as the report reads it."""
    codes = {name: int((folder / f"{name}.code").read_text()) for name in parts}
    run: dict[str, Any] = {"exit_codes": codes, "tests": {}, "benchmarks": []}
    run |= {"skipped": {}, "failed": {}, "not_run": {}}
    for name in parts:
        if (folder / f"{name}.xml").exists():
            run["tests"][name] = tests_of(folder / f"{name}.xml")
        try:
            part = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or cut short
            continue
        run = {key: value for key, value in part.items() if key not in run} | run
        run["benchmarks"] += part["benchmarks"]
        run |= {key: run[key] | part[key] for key in ("skipped", "failed", "not_run")}
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge as the command line says; the exit code."""
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
        said = [f"exit code {code}"]
        said += [f"{tests['tests']} tests, {tests['skipped']} skipped", *tests["failed"]] if tests else []
        said += [f"{len(run['not_run'][name])} not run"] if name in run["not_run"] else []
        said += [f"{test}: {reason}" for test, reason in run["failed"].get(name, {}).items()]
        print(f"{name}: {'; '.join(said)}")
    return int(any(run["exit_codes"].values()))


if __name__ == "__main__":
    sys.exit(main())
