"""How every benchmark measures: what the machine can do at best, what an op must do at least, and the time between.

A benchmark is a group of contestants on one workload, run one after the other in one process. Of each the median is
kept; its share of the floor (the least bytes over the rate at which this device copies, or the least operations over
the rate at which it multiplies matrices, whichever takes longer) and its ratio to ours are taken in the same run.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from m3er_fast.functional import BackendUnavailableError

OURS = "ours"
# Inputs of this many bytes in turn, so that no device's cache holds them from one call to the next.
_ROTATED_BYTES = {"cpu": 2**27, "cuda": 2**28}
_MOST_COPIES = 64
GRAPHED_CALLS = 16
"""Calls in one graph, each with inputs of its own."""
# A round takes about this long, so that waiting for the device once a round costs nothing that shows.
_ROUND_SECONDS = {"cpu": 0.05, "cuda": 0.02}
_ROUNDS = {"cpu": 15, "cuda": 20}


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
        flops = {"fp32": cls._products(device, torch.float32, large=large, tf32=False)}
        if large:
            flops["tf32x3"] = cls._products(device, torch.float32, large=True, tf32=True) / 3
            flops["bf16"] = cls._products(device, torch.bfloat16, large=True, tf32=True)
        else:
            flops["tf32x3"] = flops["bf16"] = flops["fp32"]  # computed in float32
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

    def floor(self, work: Any) -> float:
        """Seconds that ``work`` (``m3er_fast.kernels._launch.Work``) takes at least."""
        return max(work.bytes / self.copy, work.flops / self.flops[work.unit])


class Rotation:
    """Inputs in turn, of which together no cache holds all."""

    def __init__(self, make: Callable[[int], Any], size: int, device: torch.device) -> None:
        copies = min(_MOST_COPIES, math.ceil(_ROTATED_BYTES[device.type] / max(size, 1)) + 1)
        self._inputs: Iterator[Any] = itertools.cycle([make(seed) for seed in range(copies)])

    def __call__(self) -> Any:
        return next(self._inputs)


def graphed(step: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """``calls`` of ``step`` captured in one CUDA graph: what is left when launching costs nothing."""
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a GPU")
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


def measure(benchmark: Any, device: torch.device, step: Callable[[], Any], calls: int = 1) -> float:
    """Median seconds of a call, in rounds of as many as fill a round; ``step`` makes several ``calls``."""
    once = best_seconds(step, 3)
    iterations = max(1, math.ceil(_ROUND_SECONDS[device.type] / max(once, 1e-7)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    benchmark.pedantic(step, rounds=_ROUNDS[device.type], iterations=min(iterations, 1000), warmup_rounds=1)
    if device.type == "cuda":
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated(device) - held
    return float(benchmark.stats.stats.median) / calls


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The results as tables, a group each, in the order in which groups were first measured."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        results = [row for row in rows if row["group"] == group]
        ours = next((row["median"] for row in results if row["contestant"] == OURS), None)
        lines += ["", f"**{group}**", "", "| | time | share of floor | bytes / s | time : ours |"]
        lines.append("|---|---|---|---|---|")
        for row in results:
            floor, moved, median = row.get("floor"), row.get("bytes"), row["median"]
            cells = (
                row["contestant"],
                f"{median * 1e3:.3g} ms" if median >= 1e-3 else f"{median * 1e6:.3g} µs",
                "" if floor is None else f"{floor / median:.0%}",
                "" if moved is None else f"{moved / median / 1e9:.3g} GB/s",
                "" if ours is None else f"{median / ours:.2f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def commit() -> str:
    """The commit that is measured: of the checkout, or what ``M3ER_COMMIT`` says of a copy of it."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or os.environ.get("M3ER_COMMIT", "unknown")


# --- Contestants that take turns, so that a busy moment of the machine hits all of them ---


def draw(*shape: int, seed: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal random numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def in_turns(contestants: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = now()
            run()
            if turn:
                times[name].append(now() - start)
    return times


def report(times: dict[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """Print and return the medians, and the quartiles of the rounds' ratios to ours."""
    lines = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[ours], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        milliseconds = 1e3 * statistics.median(seconds)
        lines[name] = {"milliseconds": milliseconds, "ratio": ratio, "ratio_q1": low, "ratio_q3": high}
    print()
    for name, line in lines.items():
        print(f"  {name:34s} {line['milliseconds']:9.2f} ms {line['ratio']:7.2f}x")
    return lines


def works(step: Callable[[], Any]) -> bool:
    """Whether the contestant's backend works here; if not, the reason is printed."""
    try:
        step()
    except BackendUnavailableError as error:
        print(f"  left out: {error}")
        return False
    return True
