"""How every benchmark measures: what the machine can do at best, what an op must do at least, and the time between.

A benchmark is a group of contestants on one workload, run one after the other in one process. Of each the median is
kept; its share of the floor (the least bytes over the rate at which this device copies, or the least operations over
the rate at which it multiplies matrices, whichever takes longer) and its ratio to the others are taken in the same run.
Beside them stand the most memory that one call takes, and how far its result is from the same in float64.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from m3er_fast.cli.bench import COLUMNS

OURS = "ours"
# Inputs of this many bytes in turn, so that no device's cache holds them from one call to the next.
_ROTATED_BYTES = {"cpu": 2**27, "cuda": 2**28}
_MOST_COPIES = 64
GRAPHED_CALLS = 16
"""Calls in one graph, each with inputs of its own."""
# A round takes about this long, so that waiting for the device once a round costs nothing that shows.
_ROUND_SECONDS = {"cpu": 0.05, "cuda": 0.02}
_ROUNDS = {"cpu": 15, "cuda": 20}
# Of what takes long there are fewer rounds, and five at least, so that there are quartiles.
_SECONDS = 3.0
_LEAST_ROUNDS = 5


def now() -> float:
    """Seconds, when the device has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(step: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of a few calls, the first one apart."""
    step()
    times = []
    for _ in range(repeats):
        start = now()
        step()
        times.append(now() - start)
    return min(times)


@dataclass(frozen=True)
class Rates:
    """What a device does at best, measured: bytes a second copied (read and written), operations a second by unit."""

    copy: float
    flops: dict[str, float]

    @classmethod
    def measure(cls, device: torch.device) -> Rates:
        """By torch's own copy and matrix products."""
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
            # Some CPUs multiply bfloat16 slower than float32, which can hold it.
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

    def floor(self, *works: Any) -> float:
        """Seconds that ``works`` (``m3er_fast.kernels._target.Work``) take at least, one after the other."""
        return sum(max(work.bytes / self.copy, work.flops / self.flops[work.unit]) for work in works)


class Rotation:
    """Inputs in turn, of which together no cache holds all; the first ones are those of seed 0."""

    def __init__(self, make: Callable[[int], Any], size: int, device: torch.device) -> None:
        copies = min(_MOST_COPIES, math.ceil(_ROTATED_BYTES[device.type] / max(size, 1)) + 1)
        self._inputs: Iterator[Any] = itertools.cycle([make(seed) for seed in range(copies)])

    def __call__(self) -> Any:
        return next(self._inputs)


def graphed(step: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """``calls`` of ``step`` captured in one CUDA graph: what is left when launching costs nothing."""
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
    """``function`` by ``torch.compile``."""
    torch._dynamo.reset()
    return torch.compile(function)


def needs_gpu(contestant: str, device: torch.device) -> None:
    """Skip a contestant that runs on a GPU alone, elsewhere."""
    if device.type != "cuda":
        pytest.skip(f"{contestant} needs a GPU")


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def device_type(config: pytest.Config) -> str:
    """The kind of device that is measured, as the workloads are listed by."""
    return torch.device(config.getoption("--device")).type


def import_peer(name: str) -> Any:
    """A peer's module, or skip."""
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed")


def tensors(result: Any) -> list[torch.Tensor]:
    """Every tensor or array of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for part in result for tensor in tensors(part)]
    return [torch.as_tensor(result)]


def relative_error(found: Any, wanted: Any) -> float:
    """The largest difference of two results : the largest number of ``wanted``; of several tensors, the worst."""
    worst = 0.0
    for ours, oracle in zip(tensors(found), tensors(wanted), strict=True):
        ours, oracle = ours.detach().double().cpu(), oracle.detach().double().cpu()
        worst = max(worst, float((ours - oracle).abs().max() / oracle.abs().max()))
    return worst


def missed(found: Any, wanted: torch.Tensor) -> float:
    """The share of neighbours ``wanted`` (Q, K) that were not ``found``, in whatever order."""
    found = torch.as_tensor(found).cpu()
    return 1.0 - float((found[:, :, None] == wanted[:, None, :]).any(dim=1).double().mean())


# --- Memory ---


def peak_bytes(device: torch.device, step: Callable[[], Any]) -> int | None:
    """The most memory that a call of ``step`` holds beyond what was held before it.

    Of a GPU what torch allocated. Of a CPU the process's resident pages, whoever took them, torch, NumPy or a peer's
    own code: free memory is given back first, so that it counts again, and the kernel's high-water mark is set back.
    None where there is no such mark: it is Linux's.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    held = reset_resident_peak()
    if held is None:
        return None
    step()
    return max(0, resident_peak() - held)


def reset_resident_peak() -> int | None:
    """Give free memory back, begin a new high-water mark of this process, and return the bytes that it starts from.

    None where the system has no such mark.
    """
    try:
        give_free_memory_back()
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except (AttributeError, OSError):
        return None


def resident_peak() -> int:
    """The high-water mark that `reset_resident_peak` began."""
    return _resident("VmHWM")


def give_free_memory_back() -> None:
    """To the system, so that what the process holds is what it needs.

    Raises:
        AttributeError, OSError: this system's allocator cannot; that of Linux can.
    """
    if "pyarrow" in sys.modules:  # it has an allocator of its own
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(mark: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(mark))
    return 1024 * int(line.split()[1])


# --- What a GPU does meanwhile ---


def device_use(device: torch.device, step: Callable[[], Any], median: float) -> dict[str, Any]:
    """Of a GPU the ``idle_share`` of a call's time, and ``host_waits``, how often the call waits for it; else nothing.

    Tracing slows a call down, but not what the GPU does in it: what it was busy for is compared with ``median``, which
    was measured without.
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
    if spans:  # of a machine that cannot be traced there are none
        busy = 1e-6 * covered([(span.start, span.end) for span in spans])
        use["idle_share"] = max(0.0, 1.0 - busy / median)
    return use


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals, each from its first number to its second."""
    length, end = 0.0, -math.inf
    for first, last in sorted(spans):
        length += max(0.0, last - max(first, end))
        end = max(end, last)
    return length


# --- Time ---


def measure(benchmark: Any, device: torch.device, step: Callable[[], Any], calls: int = 1) -> float:
    """Median seconds of a call, in rounds of as many as fill a round; ``step`` makes several ``calls``."""
    once = best_seconds(step, 3)
    iterations = max(1, math.ceil(_ROUND_SECONDS[device.type] / max(once, 1e-7)))
    rounds = max(_LEAST_ROUNDS, min(_ROUNDS[device.type], int(_SECONDS / max(once, 1e-7))))
    benchmark.pedantic(step, rounds=rounds, iterations=min(iterations, 1000), warmup_rounds=1)
    return float(benchmark.stats.stats.median) / calls


def measure_once(benchmark: Any, device: torch.device, step: Callable[[], Any]) -> tuple[float, Any, int | None]:
    """Seconds, result and peak memory of a single call: of a contestant that takes minutes."""
    results = []
    peak = peak_bytes(device, lambda: results.append(benchmark.pedantic(step, rounds=1)))
    return float(benchmark.stats.stats.median), results[0], peak


# --- Results ---


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with ``ratios``: the time of every other contestant of its group : its own."""
    return [
        row
        | {
            "ratios": {
                other["contestant"]: other["median"] / row["median"]
                for other in rows
                if other["group"] == row["group"] and other is not row
            }
        }
        for row in rows
    ]


def cells(row: dict[str, Any], ours: float | None) -> tuple[str, ...]:
    """A row as text, in the order of ``COLUMNS``; what is not known is empty."""
    floor, moved, median = row.get("floor"), row.get("bytes"), row["median"]
    return (
        shown_seconds(median),
        "" if floor is None else f"{floor / median:.0%}",
        "" if moved is None else f"{moved / median / 1e9:.3g} GB/s",
        shown_bytes(row.get("peak_bytes")),
        "" if row.get("error") is None else f"{row['error']:.1e}" if row["error"] else "0",
        "" if ours is None else f"{median / ours:.2f}",
    )


def shown_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    unit, factor = next((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if seconds * f >= 1 or u == "µs")
    return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"


def shown_bytes(number: float | None) -> str:
    """Megabytes; empty for None."""
    return "" if number is None else f"{number / 1e6:.3g} MB" if number < 1e9 else f"{number / 1e9:.3g} GB"


def markdown(rows: Sequence[dict[str, Any]], where: str = "") -> list[str]:
    """The results as tables, a group each, in the order in which groups were first measured; with ``where`` behind."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        results = [row for row in rows if row["group"] == group]
        ours = next((row["median"] for row in results if row["contestant"] == OURS), None)
        lines += ["", f"**{group}**{where}", "", f"| | {' | '.join(COLUMNS)} |", "|---" + "|---:" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join((row['contestant'], *cells(row, ours)))} |" for row in results]
    return lines


def commit() -> str:
    """The commit that is measured: of the checkout, or what ``M3ER_COMMIT`` says of a copy of it."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or os.environ.get("M3ER_COMMIT", "unknown")


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def circumstances() -> dict[str, Any]:
    """What a script's JSON says beside its figures; pytest-benchmark's has the same in ``machine_info``."""
    return {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
    }


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """Print the result of a script and, if there is a path, keep it."""
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if path is not None:
        path.write_text(text)


def draw(*shape: int, seed: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal random numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
