"""Run the benchmarks of a checkout with pytest-benchmark, and pass on each result as soon as it is available."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class BenchmarkResult(NamedTuple):
    """One result, or the reason why there is none."""

    operation: str
    group: str  # empty without a result
    contestant: str  # without a result, the test's name
    cells: tuple[str, ...]  # in the order of `COLUMNS`; without a result, only the reason
    left_out: bool = False


COLUMNS = (
    *("time", "IQR", "rounds", "samples / s"),
    *("share of floor", "bytes / s", "peak memory", "error", "time : ours"),
)


class BenchmarkError(RuntimeError):
    """A benchmark failed; it is broken, not slow."""


def benchmark_files(folder: Path | None = None) -> dict[str, Path]:
    """Return the benchmarks of a checkout by name, such as "fusion_loss".

    Args:
        folder: the folder ``benchmarks`` of a checkout; None means the one beside this package or, if it is installed
            elsewhere, the one in the current folder or a folder above it.

    Raises:
        ValueError: if the folder holds no benchmarks.
    """
    checkouts = (Path(__file__).resolve().parents[2], Path.cwd(), *Path.cwd().parents)
    folders = [checkout / "benchmarks" for checkout in checkouts] if folder is None else [folder]
    for found in folders:
        files = {path.stem.removeprefix("test_"): path for path in sorted(found.glob("speed/test_*.py"))}
        if files and (found / "speed" / "harness.py").is_file():
            return files
    places = folders[0] if folder is not None else f"{folders[0]} and {folders[1]}"
    wanted = "the benchmarks are in a checkout of the project, not in the wheel: --benchmarks CHECKOUT/benchmarks"
    raise ValueError(f"{places}: no benchmarks here; {wanted}")


def run_benchmarks(
    files: Sequence[Path],
    *,
    device: str = "cpu",
    out: Path | None = None,
    plot: Path | None = None,
    show: Callable[[BenchmarkResult], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Measure, and return the number of results.

    Args:
        files: one or more values of `benchmark_files`.
        device: the device to measure on.
        out: JSON file of pytest-benchmark, which ``benchmarks.report`` and its ``compare`` read.
        plot: PNG file for the roofline.
        show: called with every result.
        progress: called with the number of results measured or left out so far, and the number of all.

    Raises:
        ImportError: if pytest, pytest-benchmark or, for ``plot``, matplotlib is missing.
        ValueError: if there was nothing to measure on this device.
        BenchmarkError: if some benchmarks failed; the results of the others are written.
        KeyboardInterrupt: if the run was interrupted; nothing is written.
    """
    try:
        import pytest
        import pytest_benchmark  # noqa: F401  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("measuring needs pytest and pytest-benchmark: pip install 'm3er-fast[bench]'") from error
    if plot is not None:
        import m3er_fast.plots  # noqa: F401  # says which extra is missing

    written = [(path, path.with_name(f"{path.name}.partial")) for path in (out, plot) if path is not None]
    arguments = [*map(str, files), f"--rootdir={files[0].parents[2]}", f"--device={device}", "--benchmark-only"]
    # Capturing would swallow our own output.
    arguments += ["-p", "no:cacheprovider", "--capture=no", "--override-ini=addopts="]
    for (path, partial), option in zip(
        written, [name for name, path in (("benchmark-json", out), ("roofline", plot)) if path is not None], strict=True
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments.append(f"--{option}={partial}")
    listener = _Listener(show, progress)
    try:
        code = pytest.main(arguments, plugins=[listener, _without_report()])
        if code == pytest.ExitCode.USAGE_ERROR:  # pytest has printed the reason on stderr
            raise BenchmarkError("pytest did not start")
        if code == pytest.ExitCode.INTERRUPTED and not listener.failures:
            raise KeyboardInterrupt
        if not listener.results and not listener.failures:
            raise ValueError(f"there was nothing to measure on {device!r}: all {listener.total} were left out")
        missing = [path for path, partial in written if not partial.is_file() or not partial.stat().st_size]
        for path, partial in written:
            if path not in missing:
                partial.replace(path)
        if missing and not listener.failures:
            raise ValueError(f"{missing[0]}: not written, because no result has the numbers for it")
    finally:
        for _, partial in written:
            partial.unlink(missing_ok=True)
    if listener.failures:
        name, reason = listener.failures[0]
        raise BenchmarkError(f"{len(listener.failures)} failed, such as {name}: {reason}")
    return listener.results


def _without_report() -> Any:
    """Return a plugin that discards pytest's own report.

    Without any reporter (``-p no:terminal``) pytest 8 and 9.0 cannot explain a failed assertion.
    """
    import pytest
    from _pytest.terminal import TerminalReporter

    class WithoutReport:
        @pytest.hookimpl(trylast=True)  # after pytest has registered its reporter
        def pytest_configure(self, config: pytest.Config) -> None:
            config.pluginmanager.unregister(name="terminalreporter")
            config.pluginmanager.register(TerminalReporter(config, io.StringIO()), "terminalreporter")

    return WithoutReport()


class _Listener:
    """A pytest plugin that passes on the results which the benchmarks' ``contest`` fixture attaches to each test."""

    def __init__(
        self, show: Callable[[BenchmarkResult], None] | None, progress: Callable[[int, int], None] | None
    ) -> None:
        self.show = show
        self.progress = progress
        self.total = self.done = self.results = 0
        self.failures: list[tuple[str, str]] = []

    def pytest_collection_finish(self, session: Any) -> None:
        self.total = len(session.items)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append((report.nodeid, _last_line(report.longreprtext)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        operation, _, test = report.nodeid.partition("::")
        operation = Path(operation).stem.removeprefix("test_")
        if report.failed:
            self.failures.append((report.nodeid, _last_line(report.longreprtext)))
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self._show(BenchmarkResult(operation, "", test, (reason,), left_out=True))
        elif report.when == "call":
            for name, row in report.user_properties:
                if name == "m3er_fast":
                    self.results += 1
                    self._show(BenchmarkResult(operation, row["group"], row["contestant"], tuple(row["cells"])))
        if report.when == "teardown":
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _show(self, result: BenchmarkResult) -> None:
        if self.show is not None:
            self.show(result)


def _last_line(text: str) -> str:
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E ")]
    return lines[0] if lines else text.strip().splitlines()[-1] if text.strip() else "no reason given"
