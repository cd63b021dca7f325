"""Fixtures of the benchmarks, the tables at the end of a run, and the details that its JSON holds beside the times."""

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

from benchmarks.speed import harness

_ROWS = pytest.StashKey()
_OURS = pytest.StashKey()
_RATES = pytest.StashKey()
_SKIPPED = pytest.StashKey()
_FAILED = pytest.StashKey()
_NOT_RUN = pytest.StashKey()
_PACKAGES = (
    *("torch", "triton", "numpy", "scikit-learn", "scipy", "pyarrow", "faiss-cpu", "faiss-gpu", "cca-zoo"),
    *("cupy-cuda13x", "liger-kernel", "flashlib"),
)


def pytest_addoption(parser):
    parser.addoption("--roofline", type=Path, metavar="PNG", help="draw the results below the rates of the device")


def pytest_configure(config):
    config.stash[_ROWS] = []
    config.stash[_OURS] = ("", None)  # the group that is measured, and its step of ours
    config.stash[_SKIPPED] = {}
    config.stash[_FAILED] = {}
    config.stash[_NOT_RUN] = {}
    # A run ends with our tables. pytest-benchmark's own, with every minimum and outlier, are shown with -v.
    config.option.benchmark_quiet = True


def _operation(item):
    return item.path.stem.removeprefix("test_")


def _rates(config):
    if _RATES not in config.stash:
        config.stash[_RATES] = harness.Rates.measure(torch.device(config.getoption("--device")))
    return config.stash[_RATES]


@pytest.fixture
def contest(benchmark, device, request):
    """Measures one contestant of a group, beside the floor of its work and a float64 oracle where these are known."""

    def run(contestant, step, works=(), error=None, allowed=1e-2, once=False, traced=False, alone=False, **more):
        """Measure ``step``, in turns with ours of the same group.

        Args:
            contestant: its name; one that ends in "graphed" is captured in a CUDA graph.
            step: the call that is timed. Its first call has the inputs of seed 0.
            works: the least work that the step must do.
            error: returns the distance of a result from the oracle, for the inputs of seed 0.
            allowed: the largest such distance. With a larger one the contestant computes something else.
            once: time a single call, for steps that take minutes.
            traced: also record the share of the time for which a GPU is idle, and how often the host waits for it.
            alone: do not take turns with ours, because ours would compute something else just now.
            more: further entries of the result; ``samples`` is how many a call computes.
        """

        def error_of(result):
            if error is None:
                return {}
            found = error(result)
            assert found <= allowed
            return {"error": found}

        if benchmark.disabled:  # by --benchmark-disable, which only checks that everything runs
            error_of(benchmark.pedantic(step))
            return
        operation = _operation(request.node)
        row = {"operation": operation, "group": benchmark.group, "contestant": contestant, "calls": 1}
        if works:
            row |= {
                "bytes": sum(work.bytes for work in works),
                "flops": sum(work.flops for work in works),
                "unit": works[0].unit,
                "floor": _rates(request.config).floor(*works),
            }
        if once:
            row["median"], result, row["peak_bytes"] = harness.measure_once(benchmark, device, step)
            row |= error_of(result)
        else:
            row |= error_of(step())
            run = step
            if contestant.endswith("graphed"):
                row["calls"] = harness.GRAPHED_CALLS
                run = harness.graphed(step, harness.GRAPHED_CALLS)
            group, ours = request.config.stash[_OURS]
            beside = None if contestant == harness.OURS or alone or group != row["group"] else ours
            timing = harness.measure(benchmark, device, run, row["calls"], beside)
            if contestant == harness.OURS:
                request.config.stash[_OURS] = (row["group"], (run, row["calls"]))
            row |= {
                "median": timing.seconds.median,
                "iqr": timing.seconds.relative,
                "rounds": timing.rounds,
                "calls": timing.calls,
            }
            if timing.ratio is not None:
                row["time_to_ours"] = timing.ratio._asdict()
            row["peak_bytes"] = harness.peak_bytes(device, step)
        if traced:
            row |= harness.device_use(device, step, row["median"])
        if "floor" in row:
            row["share_of_floor"] = row["floor"] / row["median"]
        row |= more
        benchmark.extra_info.update(row)
        rows = request.config.stash[_ROWS]
        rows.append(row)
        ours = next((r for r in rows if (r["group"], r["contestant"]) == (row["group"], harness.OURS)), None)
        shown = {"group": row["group"], "contestant": contestant, "cells": harness.cells(row, ours)}
        request.node.user_properties.append(("m3er_fast", shown))

    return run


def pytest_collection_finish(session):
    not_run = session.config.stash[_NOT_RUN]
    for item in session.items:
        not_run.setdefault(_operation(item), []).append(item.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    operation, stash = _operation(item), item.config.stash
    if call.when == "teardown":  # an interrupted test does not reach it
        stash[_NOT_RUN][operation].remove(item.name)
    if report.failed:
        stash[_FAILED].setdefault(operation, {})[item.name] = str(call.excinfo.value).partition("\n")[0]
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        stash[_SKIPPED].setdefault(operation, {}).setdefault(reason, []).append(item.name)
    return report


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device(config.getoption("--device"))
    rates = _rates(config)
    machine_info["m3er_fast"] = {
        "commit": harness.commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else harness.processor(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "copy_bytes_per_second": rates.copy,
        "operations_per_second": rates.flops,
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def pytest_sessionfinish(session):
    path = session.config.getoption("--roofline")
    if path is None:
        return
    from benchmarks.report import figures
    from benchmarks.speed.operations import TITLES

    points = figures.points(session.config.stash[_ROWS], TITLES)
    if points:
        rates = _rates(session.config)
        figures.roofline(points, rates.copy, rates.flops, path)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    rows = {(row["group"], row["contestant"]): row for row in harness.with_ratios(config.stash[_ROWS])}
    # A benchmark that was interrupted was timed in part and has no row.
    output_json["benchmarks"] = [result for result in output_json["benchmarks"] if "group" in result["extra_info"]]
    for result in output_json["benchmarks"]:
        info = result["extra_info"]
        info.update(rows.get((info.get("group"), info.get("contestant")), {}))
        result["stats"].pop("data", None)  # every round: ten times the rest, and unused
    output_json["skipped"] = config.stash[_SKIPPED]
    output_json["failed"] = config.stash[_FAILED]
    # Left over where the run was interrupted.
    output_json["not_run"] = {operation: names for operation, names in config.stash[_NOT_RUN].items() if names}


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if rows:
        rates = _rates(config)
        products = ", ".join(f"{unit} {rate / 1e12:.3g}" for unit, rate in rates.flops.items())
        terminalreporter.section("results, as Markdown")
        terminalreporter.write_line(f"copy {rates.copy / 1e9:.3g} GB/s; products in TFLOP/s: {products}")
        for line in harness.markdown(rows):
            terminalreporter.write_line(line)
