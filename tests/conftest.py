"""Settings of every test run, on the CPU and on a GPU."""

import contextlib
import os
import pathlib
import signal

import pytest
import torch
from ptx.plugin import target_of

# The tests' tensors are tiny. On a busy machine a second thread mostly spins, and the suite takes ten times as long.
torch.set_num_threads(1)

# A suite that a script starts in the background ignores Ctrl-C, and so would the programs that tests start to
# interrupt them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, not the interpreter")
    config.addinivalue_line("markers", "large: takes most of a GPU's memory")
    if config.getoption("--device") == "cpu":
        # Triton reads it when a kernel is defined; no test has imported one yet.
        os.environ["TRITON_INTERPRET"] = "1"
        return
    with contextlib.suppress(ImportError):
        import hypothesis

        # Each example is compiled for seconds, which is too long for shrinking it.
        hypothesis.settings.register_profile("gpu", phases=(hypothesis.Phase.generate,))
        hypothesis.settings.load_profile("gpu")


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Make ``new_empty`` return NaN, which shows the elements that a kernel leaves unwritten."""
    plain = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        result = plain(self, *args, **kwargs)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(scope="session")
def benchmark_environment():
    """Environment variables of a measuring process: it finds this checkout, and is no worker of pytest-xdist."""
    root = str(pathlib.Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # In a worker of pytest-xdist, pytest-benchmark measures nothing.
    return {name: value for name, value in os.environ.items() if "XDIST" not in name} | {"PYTHONPATH": path}


def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device")
    if device == "cpu" or target_of(config):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: run with --device cuda"))
    if device == "cpu":
        return
    kept = [item for item in items if item.get_closest_marker("gpu") or "device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
