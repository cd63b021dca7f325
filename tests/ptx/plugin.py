"""``pytest --device ptx``: the tests of kernels on compiled PTX, in the emulator.

Every finding fails the test whose launch it was. The end of the run tells which kernels were launched and how much of
each tolerance was used.
"""

import collections
import importlib.util
import os

import numpy as np
import pytest
import torch

TARGETS = (80, 90)
_PROPERTY = "ptx"  # of a test's report, which also brings it from a worker of pytest-xdist


def target_of(config):
    """The generation of GPU whose PTX ``--device`` asks for, or None."""
    kind, _, target = config.getoption("--device").partition(":")
    if kind != "ptx":
        return None
    targets = {"": TARGETS[0], **{str(t): t for t in TARGETS}}
    if target not in targets:
        raise pytest.UsageError(f"--device must be 'ptx', 'ptx:80' or 'ptx:90', got '{kind}:{target}'")
    return targets[target]


def add_options(parser):
    group = parser.getgroup("compiled PTX (--device ptx)")
    group.addoption(
        "--ptx-order",
        choices=("together", "ascending", "descending"),
        default="together",
        help="the order of the warps between two barriers: together (the default, and the fastest), or one after the "
        "other, which shows where a barrier is missing",
    )
    group.addoption(
        "--ptx-noise",
        type=int,
        metavar="SEED",
        help="err in approximate instructions by up to their documented bounds",
    )


def start(config):
    """Emulate a GPU for this session, if it asks for one."""
    target = target_of(config)
    if target is not None:
        os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when a kernel is defined; none has been yet
        config.pluginmanager.register(Emulation(target, config.option.ptx_order, config.option.ptx_noise))


class Emulation:
    """Runs the session's launches in the emulator."""

    def __init__(self, target, order, noise):
        if importlib.util.find_spec("triton") is None:
            raise pytest.UsageError("--device ptx: triton is not installed")
        from ptx import driver, machine

        self.driver = driver.EmulatedDriver(target, machine.Options(order, noise))
        self._title = f"compiled PTX for sm_{target}, warps {order}" + (f", noise {noise}" if noise is not None else "")
        self._share = 0.0  # largest share of a tolerance that the running test has used

    def pytest_collection_finish(self):
        self.driver.take_the_place_of_a_gpu()
        _watch_tolerances(self)

    def use(self, share):
        self._share = max(self._share, share)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self._share = 0.0
        before = collections.Counter(self.driver.launches)
        try:
            result = yield
        finally:
            findings = self.driver.take_findings()
            launches = dict(collections.Counter(self.driver.launches) - before)
            item.user_properties.append((_PROPERTY, (launches, self._share, findings)))
        if findings:
            pytest.fail("found in compiled kernels:\n" + "\n".join(findings), pytrace=False)
        return result

    def pytest_terminal_summary(self, terminalreporter):
        tests = [
            (report.nodeid, dict(report.user_properties)[_PROPERTY])
            for outcome in ("passed", "failed", "xfailed", "xpassed")
            for report in terminalreporter.stats.get(outcome, ())
            if report.when == "call" and _PROPERTY in dict(report.user_properties)
        ]
        launching = [(name, property_) for name, property_ in tests if property_[0]]
        launches, shares, findings = collections.Counter(), collections.Counter(), set()
        for name, (launched, share, found) in launching:
            launches.update(launched)
            test = name.split("[")[0].split("::", 1)[-1]
            shares[test] = max(shares[test], share)
            findings.update(found)
        line = terminalreporter.write_line
        terminalreporter.section(self._title)
        line(f"{len(launching)} of {len(tests)} tests launched kernels, {launches.total()} launches:")
        for kernel, number in sorted(launches.items()):
            line(f"  {number:6d} {kernel}")
        line("largest share of a tolerance that each test used, of those with one:")
        for test, share in shares.most_common():
            if share > 0:
                line(f"  {share:6.3f} {test}")
        line(f"findings: {len(findings) or 'none'}")
        for finding in sorted(findings):
            line(f"  {finding}")


def _watch_tolerances(emulation):
    """Make the comparisons of torch and NumPy tell how much of their tolerance they use."""
    close, allclose = torch.testing.assert_close, np.testing.assert_allclose

    def assert_close(actual, expected, *args, rtol=None, atol=None, **kwargs):
        if rtol is not None and isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
            emulation.use(_share(actual.detach().double().cpu(), expected.detach().double().cpu(), rtol, atol))
        return close(actual, expected, *args, rtol=rtol, atol=atol, **kwargs)

    def assert_allclose(actual, desired, rtol=1e-7, atol=0, *args, **kwargs):
        emulation.use(_share(np.asarray(actual, float), np.asarray(desired, float), rtol, atol))
        return allclose(actual, desired, rtol, atol, *args, **kwargs)

    torch.testing.assert_close, np.testing.assert_allclose = assert_close, assert_allclose


def _share(actual, expected, rtol, atol):
    """The largest error as a share of the tolerance, among finite numbers."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(actual - expected)
        used = np.where(error > 0, error / (atol + rtol * np.abs(expected)), 0.0)
    return float(np.max(used, where=np.isfinite(used), initial=0.0))
