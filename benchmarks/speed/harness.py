"""How every benchmark measures: the rates of the machine, the time of an operation, its memory and its error.

A benchmark is a group of contestants on one workload, measured in one process. Ours comes first. Every other contestant
then takes turns with it, round by round, so that a busy moment of the machine affects both: its ratio to ours is the
median over these rounds. Each time is compared with the floor, too: the least bytes divided by the rate at which this
device copies, or the least operations divided by the rate at which it multiplies matrices, whichever takes longer. The
results also hold the peak memory of one call, and the distance of its result from the same computation in float64.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.speed.work import Work
from m3er_fast.cli.bench import COLUMNS

OURS, TEXTBOOK, COMPILED, REFERENCE = "ours", "textbook", "textbook, compiled", "reference"
# Inputs of this many bytes take turns, so that no cache holds them from one call to the next.
_ROTATED_BYTES = {"cpu": 2**27, "cuda": 2**28}
_MOST_COPIES = 64
GRAPHED_CALLS = 16
"""How many calls one graph holds, each with its own inputs."""
# A round takes about this long, so that waiting for the device once per round is negligible.
_ROUND_SECONDS = {"cpu": 0.025, "cuda": 0.02}
_ROUNDS = {"cpu": 15, "cuda": 20}
# A slow step has fewer rounds, but at least five, so that there are quartiles.
_SECONDS = 2.0
_LEAST_ROUNDS = 5
_MOST_CALLS = 2000  # in one round


def now() -> float:
    """Return the time in seconds once the device has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(step: Callable[[], Any], repeats: int = 5) -> float:
    """Return the shortest time of a few calls, after one that is not timed."""
    step()
    times = []
    for _ in range(repeats):
        start = now()
        step()
        times.append(now() - start)
    return min(times)


@dataclass(frozen=True)
class Rates:
    """The measured rates of a device: bytes per second copied (read and written), operations per second by unit."""

    copy: float
    flops: dict[str, float]

    @classmethod
    def measure(cls, device: torch.device) -> Rates:
        """Measure the rates with torch's own copy and matrix products."""
        large = device.type == "cuda"
        copy = cls._copies(torch.randn(2**28 if large else 2**26, device=device))
        flops = {
            "fp64": cls._products(device, torch.float64, large=large, tf32=False),
            "fp32": cls._products(device, torch.float32, large=large, tf32=False),
            "bf16": cls._products(device, torch.bfloat16, large=large, tf32=True),
        }
        if large:
            flops["tf32x3"] = cls._products(device, torch.float32, large=True, tf32=True) / 3
        else:
            flops["tf32x3"] = flops["fp32"]  # computed in float32
            # Some CPUs multiply bfloat16 more slowly than float32, which can represent it.
            flops["bf16"] = max(flops["bf16"], flops["fp32"])
        return cls(copy, flops)

    @staticmethod
    def _copies(source: torch.Tensor) -> float:
        target = torch.empty_like(source)
        return 2 * source.numel() * source.itemsize / best_seconds(lambda: target.copy_(source))

    @staticmethod
    def _products(device: torch.device, dtype: torch.dtype, *, large: bool, tf32: bool) -> float:
        size = 8192 if large else 1536
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            return 2 * size**3 / best_seconds(lambda: a @ b)
        finally:
            torch.set_float32_matmul_precision(before)

    def floor(self, *works: Work) -> float:
        """Return the least seconds that ``works`` take, one after the other."""
        return sum(max(work.bytes / self.copy, work.flops / self.flops[work.unit]) for work in works)


class Rotation:
    """Inputs that take turns and together exceed every cache; the first ones have seed 0."""

    def __init__(self, make: Callable[[int], Any], size: int, device: torch.device) -> None:
        copies = min(_MOST_COPIES, math.ceil(_ROTATED_BYTES[device.type] / max(size, 1)) + 1)
        self._inputs: Iterator[Any] = itertools.cycle([make(seed) for seed in range(copies)])

    def __call__(self) -> Any:
        return next(self._inputs)


def graphed(step: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """Capture ``calls`` of ``step`` in one CUDA graph, whose replay has no cost of launching."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            step()
    return graph.replay


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` compiled by ``torch.compile``."""
    torch._dynamo.reset()
    return torch.compile(function)


def needs_gpu(contestant: str, device: torch.device) -> None:
    """Skip a contestant that needs a GPU where ``device`` is not one."""
    if device.type != "cuda":
        pytest.skip(f"{contestant} needs a GPU")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def device_type(config: pytest.Config) -> str:
    """Return the kind of device that is measured, a key of the workloads."""
    device = config.getoption("--device")
    if device.startswith("ptx"):
        raise pytest.UsageError(f"speed is measured on 'cpu' or 'cuda', got --device {device!r}: an emulator has none")
    return torch.device(device).type


def import_peer(name: str) -> Any:
    """Return the module of another library, or skip the test."""
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed")


def tensors(result: Any) -> list[torch.Tensor]:
    """Return every tensor or array of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for part in result for tensor in tensors(part)]
    return [torch.as_tensor(result)]


def relative_error(found: Any, wanted: Any) -> float:
    """Return the largest difference from ``wanted`` relative to its largest magnitude; the worst tensor counts."""
    worst = 0.0
    for ours, oracle in zip(tensors(found), tensors(wanted), strict=True):
        ours, oracle = ours.detach().double().cpu(), oracle.detach().double().cpu()
        worst = max(worst, float((ours - oracle).abs().max() / oracle.abs().max()))
    return worst


def missed(found: Any, wanted: torch.Tensor) -> float:
    """Return the share of the neighbours ``wanted`` (Q, K) that are missing from ``found``, in any order."""
    found = torch.as_tensor(found).cpu()
    return 1.0 - float((found[:, :, None] == wanted[:, None, :]).any(dim=1).double().mean())


# --- Memory ---


def peak_bytes(device: torch.device, step: Callable[[], Any]) -> int | None:
    """Return the peak memory of a call of ``step``, beyond the memory in use before it.

    On a GPU this is memory allocated by torch. On a CPU it is the resident pages of the process, whether torch, NumPy
    or another library took them: free memory is returned to the system first, so that its reuse counts, and the
    kernel's high-water mark is reset. None where the system has no such mark; only Linux has one.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = reset_resident_peak()
    if before is None:
        return None
    step()
    return max(0, resident_peak() - before)


def reset_resident_peak() -> int | None:
    """Release free memory, reset the high-water mark of this process, and return its resident bytes.

    None where the system has no such mark.
    """
    try:
        release_free_memory()
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except (AttributeError, OSError):
        return None


def resident_peak() -> int:
    """Return the high-water mark since `reset_resident_peak`."""
    return _resident("VmHWM")


def release_free_memory() -> None:
    """Return free memory to the system, so that the process holds only the memory that it needs.

    Raises:
        AttributeError, OSError: the allocator of this system cannot; Linux's can.
    """
    if "pyarrow" in sys.modules:  # has its own allocator
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(mark: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(mark))
    return 1024 * int(line.split()[1])


# --- Use of a GPU ---


def device_use(device: torch.device, step: Callable[[], Any], median: float) -> dict[str, Any]:
    """Return a GPU's ``idle_share`` of a call's time and ``host_waits``, how often the host waits; {} for a CPU.

    Tracing slows a call down, but not the kernels in it: their time is compared with ``median``, which was measured
    without tracing.
    """
    if device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    use: dict[str, Any] = {"host_waits": sum("synchronizing CUDA operation" in str(w.message) for w in caught)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    spans = [event.time_range for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if spans:  # some machines cannot be traced
        busy = 1e-6 * covered([(span.start, span.end) for span in spans])
        use["idle_share"] = max(0.0, 1.0 - busy / median)
    return use


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals, each given by its ends."""
    length, end = 0.0, -math.inf
    for first, last in sorted(spans):
        length += max(0.0, last - max(first, end))
        end = max(end, last)
    return length


# --- Time ---


class Spread(NamedTuple):
    """Median and quartiles of some rounds."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of two values or more."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    @property
    def relative(self) -> float:
        """The interquartile range relative to the median."""
        return (self.q3 - self.q1) / self.median


class Timing(NamedTuple):
    """The rounds of one contestant."""

    seconds: Spread  # per call
    ratio: Spread | None  # to ours, round by round
    rounds: int
    calls: int  # in each round


def measure(
    benchmark: Any,
    device: torch.device,
    step: Callable[[], Any],
    calls: int = 1,
    ours: tuple[Callable[[], Any], int] | None = None,
) -> Timing:
    """Time rounds of several calls each.

    Args:
        benchmark: the fixture of pytest-benchmark.
        device: on which the step computes.
        step: what is timed.
        calls: how many calls one ``step`` makes.
        ours: our step and its calls, whose rounds alternate with those of ``step``; None measures ``step`` alone.
    """
    once = best_seconds(step, 3)
    repeats = _repeats(device, once)
    turns: list[float] = []
    if ours is not None:
        our_step, our_calls = ours
        our_once = best_seconds(our_step, 1)
        our_repeats = _repeats(device, our_once)
        once += our_once

        def turn() -> None:
            start = now()
            for _ in range(our_repeats):
                our_step()
            turns.append((now() - start) / (our_repeats * our_calls))

    def run() -> None:
        for _ in range(repeats):
            step()

    rounds = max(_LEAST_ROUNDS, min(_ROUNDS[device.type], int(_SECONDS / max(once, 1e-7))))
    benchmark.pedantic(run, setup=None if ours is None else turn, rounds=rounds, warmup_rounds=1)
    seconds = [total / (repeats * calls) for total in benchmark.stats.stats.data]
    ratios = [theirs / mine for theirs, mine in zip(seconds, turns[-rounds:], strict=True)] if turns else None
    return Timing(Spread.of(seconds), ratios and Spread.of(ratios), rounds, repeats * calls)


def _repeats(device: torch.device, once: float) -> int:
    return min(_MOST_CALLS, math.ceil(_ROUND_SECONDS[device.type] / max(once, 1e-7)))


def measure_once(benchmark: Any, device: torch.device, step: Callable[[], Any]) -> tuple[float, Any, int | None]:
    """Return seconds, result and peak memory of a single call, for a contestant that takes minutes."""
    results = []
    peak = peak_bytes(device, lambda: results.append(benchmark.pedantic(step, rounds=1)))
    return float(benchmark.stats.stats.median), results[0], peak


# --- Results ---


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each row with its ``ratios``: the time of every other contestant of its group, divided by its own.

    Ratios to ours are those of rounds in turns, where there are such rounds.
    """

    def ratio(row: dict[str, Any], other: dict[str, Any]) -> float:
        if row["contestant"] == OURS and "time_to_ours" in other:
            return float(other["time_to_ours"]["median"])
        if other["contestant"] == OURS and "time_to_ours" in row:
            return 1.0 / float(row["time_to_ours"]["median"])
        return float(other["median"] / row["median"])

    return [
        row
        | {
            "ratios": {
                other["contestant"]: ratio(row, other)
                for other in rows
                if other["group"] == row["group"] and other is not row
            }
        }
        for row in rows
    ]


def time_to_ours(row: dict[str, Any], ours: dict[str, Any] | None) -> float | None:
    """Return the time of a row relative to ours, in turns where it was measured so; None if there is no ours."""
    if ours is None:
        return None
    return row["time_to_ours"]["median"] if "time_to_ours" in row else row["median"] / ours["median"]


def cells(row: dict[str, Any], ours: dict[str, Any] | None) -> tuple[str, ...]:
    """Return a row as text, in the order of ``COLUMNS``; unknown values are empty."""
    floor, moved, median, ratio = row.get("floor"), row.get("bytes"), row["median"], time_to_ours(row, ours)
    return (
        shown_seconds(median),
        f"{row['iqr']:.0%}" if "iqr" in row else "",
        str(row.get("rounds", "")),
        shown_rate(row),
        "" if floor is None else f"{floor / median:.0%}",
        "" if moved is None else f"{moved / median / 1e9:.3g} GB/s",
        shown_bytes(row.get("peak_bytes")),
        "" if row.get("error") is None else f"{row['error']:.1e}" if row["error"] else "0",
        "" if ratio is None else f"{ratio:.2f}",
    )


def shown_seconds(seconds: float) -> str:
    """Format seconds with three digits and a unit."""
    unit, factor = next((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if seconds * f >= 1 or u == "µs")
    return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"


def shown_rate(row: dict[str, Any]) -> str:
    """Format the samples per second of a row with three digits; empty where it has no samples."""
    if "samples" not in row:
        return ""
    rate = float(f"{row['samples'] / row['median']:.3g}")
    return f"{rate:,.12g}"


def shown_bytes(number: float | None) -> str:
    """Format bytes in MB or GB; empty for None."""
    return "" if number is None else f"{number / 1e6:.3g} MB" if number < 1e9 else f"{number / 1e9:.3g} GB"


def markdown(rows: Sequence[dict[str, Any]], where: str = "") -> list[str]:
    """Return one table per group as Markdown, in the order of measurement; ``where`` follows each heading."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        results = [row for row in rows if row["group"] == group]
        ours = next((row for row in results if row["contestant"] == OURS), None)
        lines += ["", f"**{group}**{where}", "", f"| | {' | '.join(COLUMNS)} |", "|---" + "|---:" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join((row['contestant'], *cells(row, ours)))} |" for row in results]
    return lines


def commit() -> str:
    """Return the commit that is measured: that of the checkout, or ``M3ER_COMMIT`` for a copy without git."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or os.environ.get("M3ER_COMMIT", "unknown")


def processor() -> str:
    """Return the name of the CPU, on Linux from /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def circumstances() -> dict[str, Any]:
    """Return the details that a script writes beside its results; pytest-benchmark has them in ``machine_info``."""
    return {
        "command": " ".join([os.path.relpath(sys.argv[0], Path(__file__).parents[2]), *sys.argv[1:]]),
        "commit": commit(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
    }


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """Print the result of a script and, if there is a path, write it there."""
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if path is not None:
        path.write_text(text)


def draw(*shape: int, seed: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return normal random numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
