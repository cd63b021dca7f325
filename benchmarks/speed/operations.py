"""The operations that are measured: the one list from which the report, the GPU run and their tests take theirs.

    python -m benchmarks.speed.operations

prints the name and the share of each operation that a GPU run measures, one per line, as ``gpu.sh`` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Operation(NamedTuple):
    """One file of benchmarks."""

    name: str  # that of the file test_NAME.py, on the command line and in a run's JSON
    title: str  # heading in the report
    gpu_share: int  # of a GPU run's time, relative to the others; 0: not measured there


OPERATIONS = (
    Operation("fusion_loss", "Fusion loss and gradient", 4),
    Operation("check_statistics", "Statistics of the check", 3),
    Operation("sequence_statistics", "Statistics of sequences", 2),
    Operation("cca", "CCA", 2),
    Operation("neighbors", "Nearest neighbours", 3),
    Operation("local_lstsq", "Local least squares", 3),
    Operation("memory_scan", "Memory scan", 6),
    Operation("end_to_end", "The whole model", 4),
    Operation("reading", "Reading", 0),
    Operation("scoring", "Scoring", 2),
)
TITLES = {operation.name: operation.title for operation in OPERATIONS}

# Names in runs that were measured before the rename.
_FORMER_OPERATIONS = {"correlation_gate": "check_statistics"}
_FORMER_GROUPS = {  # by their beginnings
    "gate, ": "check, ",
    "16 nearest of 50000 x 300 by an index that is given, ": "16 nearest of 50000 x 300 by a prebuilt index, ",
    "fusion loss and gradient, batch of 256, 6 classes": "fusion loss and gradient, 256 samples, 6 classes",
}
_FORMER_CONTESTANTS = {
    "the model alone, a batch a thread": "the model alone, one batch per thread",
    "torch covariance + SVD": "textbook",
    "torch covariance + SVD, float64": "textbook, float64",
}
# "eager" and "compiled" named the reference, but for the operations whose "eager" was a textbook's.
_EAGER_WAS_TEXTBOOK = ("check_statistics", "sequence_statistics")


def current_operation(name: str) -> str:
    """Return today's name of an operation in a run's JSON."""
    return _FORMER_OPERATIONS.get(name, name)


def current_group(group: str) -> str:
    """Return today's name of a group in a run's JSON."""
    for former, current in _FORMER_GROUPS.items():
        if group.startswith(former):
            return current + group.removeprefix(former)
    return group


def current_contestant(name: str, operation: str = "") -> str:
    """Return today's name of a contestant of an operation, by today's name, in a run's JSON."""
    kind, comma, rest = name.partition(", ")
    match kind:
        case "eager" if rest.startswith("folded"):
            return "reference" + rest.removeprefix("folded")
        case "eager":
            return ("textbook" if operation in _EAGER_WAS_TEXTBOOK else "reference") + comma + rest
        case "compiled":
            return "reference, compiled" + comma + rest
    return _FORMER_CONTESTANTS.get(name, name)


def current_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a result of a run's JSON with today's names."""
    named = dict(row)
    if "operation" in row:
        named["operation"] = current_operation(row["operation"])
    if "group" in row:
        named["group"] = current_group(row["group"])
    operation = named.get("operation", "")
    if "contestant" in row:
        named["contestant"] = current_contestant(row["contestant"], operation)
    if "ratios" in row:
        named["ratios"] = {current_contestant(name, operation): ratio for name, ratio in row["ratios"].items()}
    return named


def device_of(machine_info: Mapping[str, Any]) -> str:
    """Return the device of a run's JSON; a CPU with the vectors that it has, by which those of one name differ."""
    about = machine_info["m3er_fast"]
    device: str = about.get("device", "an unknown device")
    flags = machine_info.get("cpu", {}).get("flags", ())
    if about.get("kind", "cpu") == "cpu":
        for flag, vectors in (("avx512f", "AVX-512"), ("avx2", "AVX2")):
            if flag in flags:
                return f"{device}, {vectors}"
    return device


if __name__ == "__main__":
    for operation in OPERATIONS:
        if operation.gpu_share:
            print(operation.name, operation.gpu_share)
