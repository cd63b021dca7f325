"""The options that tests and benchmarks share, so that one call may run both."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="'cpu' (the default), 'cuda' or 'cuda:N': where benchmarks measure, and where tests run kernels ('cpu': "
        "in Triton's interpreter; on a GPU only the tests that use it are run)",
    )
    parser.addoption("--slow", action="store_true", help="also run what takes minutes")


@pytest.hookimpl(tryfirst=True)  # the others take the device for a good one
def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    device = config.getoption("--device")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise pytest.UsageError(f"--device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if kind not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch finds no GPU here")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


@pytest.fixture(scope="session")
def device(request):
    """Where kernels run, and where benchmarks measure, in this run."""
    return torch.device(request.config.getoption("--device"))
