"""Options and fixtures of the benchmarks, and the table at their end."""

import importlib.metadata
import platform

import harness
import pytest
import torch

_ROWS = pytest.StashKey()
_RATES = pytest.StashKey()
_PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "faiss-cpu", "faiss-gpu", "cupy-cuda13x", "liger-kernel")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where to measure: 'cpu' (the default), 'cuda' or 'cuda:N'")


def pytest_configure(config):
    config.stash[_ROWS] = []
    if torch.device(config.getoption("--device")).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {config.getoption('--device')}: torch finds no GPU here")


@pytest.fixture(scope="session")
def device(request):
    """Where to measure."""
    return torch.device(request.config.getoption("--device"))


def _rates(config):
    if _RATES not in config.stash:
        config.stash[_RATES] = harness.Rates.measure(torch.device(config.getoption("--device")))
    return config.stash[_RATES]


@pytest.fixture
def contest(benchmark, device, request):
    """Measures one contestant of a group, beside the floor of the work if that is known."""

    def run(contestant, step, work=None):
        calls = 1
        if contestant.endswith("graphed"):
            calls = harness.GRAPHED_CALLS
            step = harness.graphed(step, calls)
        row = {"group": benchmark.group, "contestant": contestant, "calls": calls}
        if work is not None:
            row |= {"bytes": work.bytes, "flops": work.flops, "floor": _rates(request.config).floor(work)}
        row["median"] = harness.measure(benchmark, device, step, calls)
        benchmark.extra_info.update(row)
        request.config.stash[_ROWS].append(row)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device(config.getoption("--device"))
    rates = _rates(config)
    machine_info["m3er_fast"] = {
        "commit": harness.commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "copy_bytes_per_second": rates.copy,
        "operations_per_second": rates.flops,
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if rows:
        rates = _rates(config)
        products = ", ".join(f"{unit} {rate / 1e12:.3g}" for unit, rate in rates.flops.items())
        terminalreporter.section("results, as Markdown")
        terminalreporter.write_line(f"copy {rates.copy / 1e9:.3g} GB/s; products in TFLOP/s: {products}")
        for line in harness.markdown(rows):
            terminalreporter.write_line(line)
