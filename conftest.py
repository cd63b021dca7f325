"""The options that tests and benchmarks share; one call may run both."""

import pytest
import torch
from ptx import plugin as ptx_plugin


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="the device on which benchmarks measure and tests run kernels: 'cpu' (the default; Triton's interpreter), "
        "'cuda' or 'cuda:N' (only the tests that use a GPU are run), 'ptx' or 'ptx:90' (these tests, on the PTX that "
        "Triton compiles for sm_80 or sm_90, in an emulator on the CPU)",
    )
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    ptx_plugin.add_options(parser)


def device_of(config):
    """The device of the tests' tensors: compiled PTX runs on CPU tensors."""
    return torch.device("cpu" if ptx_plugin.target_of(config) else config.getoption("--device"))


@pytest.hookimpl(tryfirst=True)  # before the hooks that rely on the device
def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    device = config.getoption("--device")
    try:
        kind = device_of(config).type
    except RuntimeError as error:
        raise pytest.UsageError(f"--device must be 'cpu', 'cuda', 'cuda:N' or 'ptx', got {device!r}") from error
    if kind not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device must be 'cpu', 'cuda', 'cuda:N' or 'ptx', got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch finds no GPU here")
    ptx_plugin.start(config)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


@pytest.fixture(scope="session")
def device(request):
    """The device on which this run's kernels run and benchmarks measure."""
    return device_of(request.config)
