"""Time and peak memory over sizes: batch, steps, classes, rows of a bank, neighbours, each beside its baseline.

    python benchmarks/scaling.py --out benchmarks/results/cpu-2-cores/scaling.json --plot docs/results/scaling.png \\
        --workers benchmarks/results/scoring-workers-cpu-2-cores.json

measures every curve (``--only loss-batch`` one of them) on the CPU and fits value = a · sizeᵇ, by least squares of the
logarithms. An exponent b of the whole curve hides where it bends: ``steps`` in the JSON has that between each size and
the next. ``--from JSON`` draws a run again. ``--workers JSON`` also draws what ``scoring_workers.py`` wrote: time a
shard, and memory, over the number of Ray's workers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from workloads import MOSEI_DIMS, PAPER_DIMS, Views

from m3er_fast import CCA, MemoryFusionNetwork, ModalityCheck, functional, reference

CPU = torch.device("cpu")
Step = Callable[[], Any]
_SECONDS = 0.7  # that a point may take, beyond a few calls


class Sweep(NamedTuple):
    """A size that is swept, and what gives each contestant's step at one size."""

    title: str
    size: str
    sizes: Sequence[int]
    steps: Callable[[int], dict[str, Step]]


def loss(batch: int, classes: int) -> dict[str, Step]:
    def by(function):
        def make(seed):
            logits = harness.draw(3, batch, classes, seed=seed).requires_grad_()
            return logits, torch.arange(batch) % classes

        inputs = harness.Rotation(make, 8 * 3 * batch * classes, CPU)

        def step():
            logits, target = inputs()
            return torch.autograd.grad(function(logits, target), logits)

        return step

    return {"ours": by(functional.fusion_loss), "eager": by(reference.fusion_loss)}


@functools.cache
def fitted_check() -> ModalityCheck:
    shared = harness.draw(4096, 30, seed=0)
    features = {
        name: shared @ harness.draw(30, d, seed=d) + harness.draw(4096, d, seed=1000 + d)
        for name, d in MOSEI_DIMS.items()
    }
    return ModalityCheck(MOSEI_DIMS, n_components=30).fit(features)


def gate(batch: int) -> dict[str, Step]:
    projections = fitted_check().projections_

    def make(seed):
        return [harness.draw(batch, d, seed=seed) for d in MOSEI_DIMS.values()]

    inputs = harness.Rotation(make, 4 * batch * sum(MOSEI_DIMS.values()), CPU)
    return {
        "ours": lambda: functional.gate_statistics(inputs(), projections),
        "eager, folded": lambda: reference.gate_statistics(inputs(), projections),
    }


def search(rows: int) -> dict[str, Step]:
    bank, query = harness.draw(rows, 300, seed=0), harness.draw(256, 300, seed=1)
    index = functional.neighbor_index(bank, "torch")

    def plain():
        return torch.addmm(bank.square().sum(dim=1), query, bank.mT, alpha=-2.0).topk(16, dim=1, largest=False)

    return {"ours": lambda: index.search(query, 16), "addmm + topk": plain}


def weights(k: int) -> dict[str, Step]:
    bank, partners, query = (
        harness.draw(10_000, 300, seed=0),
        harness.draw(10_000, 74, seed=1),
        harness.draw(500, 300, seed=2),
    )
    near = torch.randint(0, 10_000, (500, k), generator=torch.Generator().manual_seed(3))
    return {
        name: functools.partial(functional.local_least_squares, query, bank, partners, near, backend=backend)
        for name, backend in (("ours", "auto"), ("eager", "torch"))
    }


def scan(batch: int, steps: int) -> dict[str, Step]:
    views = Views(PAPER_DIMS, batch, steps)
    torch.manual_seed(0)
    network = MemoryFusionNetwork(PAPER_DIMS, 6)
    lengths = torch.full((batch,), steps)

    def make(seed):
        return [harness.draw(batch, steps, d, seed=seed) for d in PAPER_DIMS.values()]

    inputs = harness.Rotation(make, views.bytes, CPU)

    def by(function):
        def step():
            with torch.no_grad():
                return function(inputs(), lengths, network.scan_weights())

        return step

    return {"ours": by(functional.memory_scan), "eager": by(reference.memory_scan)}


def fit(rows: int) -> dict[str, Step]:
    x, y = harness.draw(rows, 300, seed=0), harness.draw(rows, 74, seed=1)

    def svd():
        a, b = x - x.mean(dim=0), y - y.mean(dim=0)
        values = [torch.linalg.eigh(part.mT @ part / (rows - 1)) for part in (a, b)]
        left, right = (vectors / spread.clamp(min=1e-6).sqrt() for spread, vectors in values)
        return torch.linalg.svd(left.mT @ (a.mT @ b / (rows - 1)) @ right, full_matrices=False)

    return {"ours": lambda: CCA(n_components=30).fit(x, y), "torch covariance + SVD": svd}


def powers(first: int, last: int, step: int = 1) -> list[int]:
    return [2**exponent for exponent in range(first, last + 1, step)]


SWEEPS = {
    "loss-batch": Sweep("loss and gradient, C = 6", "B, samples", powers(6, 18, 2), lambda n: loss(n, 6)),
    "loss-classes": Sweep("loss and gradient, B = 256", "C, classes", powers(2, 14, 2), lambda n: loss(256, n)),
    "gate-batch": Sweep("check, d = 300/74/35, k = 30", "B, samples", powers(4, 14, 2), gate),
    "search-rows": Sweep("16 nearest, d = 300, 256 queries", "n, rows of the bank", powers(9, 17, 2), search),
    "weights-neighbors": Sweep("local least squares, 500 queries", "K, neighbours", powers(2, 7), weights),
    "scan-batch": Sweep("memory scan forward, T = 20", "B, samples", powers(0, 10, 2), lambda n: scan(n, 20)),
    "scan-steps": Sweep("memory scan forward, B = 32", "T, steps", powers(0, 8, 2), lambda n: scan(32, n)),
    "cca-rows": Sweep("CCA fit, 300 and 74 features", "n, rows", powers(9, 17, 2), fit),
}


def seconds_of(steps: dict[str, Step]) -> dict[str, float]:
    """Median seconds of a call of each; the contestants take turns, so that a busy moment hits both."""
    once = max(harness.best_seconds(step, 2) for step in steps.values())
    rounds = max(5, min(25, int(_SECONDS / once)))
    calls = max(1, min(200, int(_SECONDS / rounds / once)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = harness.now()
            for _ in range(calls):
                step()
            times[name].append((harness.now() - start) / calls)
    return {name: statistics.median(found) for name, found in times.items()}


def exponents(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, list[float]]:
    """b of value = a · sizeᵇ by least squares of the logarithms, and the same between each size and the next.

    Raises:
        ValueError: fewer than two sizes, or a size or value that is not positive.
    """
    if len(sizes) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"an exponent needs two sizes or more and positive values, got {sizes} and {values}")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    slope, _ = statistics.linear_regression(x, y)
    pairs = zip(x[1:], x[:-1], y[1:], y[:-1], strict=True)
    return slope, [(y1 - y0) / (x1 - x0) for x1, x0, y1, y0 in pairs]


def fitted(sizes: Sequence[float], curves: dict[str, list[float]]) -> dict[str, Any]:
    """Each curve with its exponents, as the JSON has them."""
    shown: dict[str, Any] = {}
    for quantity, values in curves.items():
        exponent, steps_between = exponents(sizes, values)
        shown[quantity] = {"values": values, "exponent": exponent, "steps": steps_between}
    return shown


def measure(sweep: Sweep) -> dict[str, Any]:
    """Seconds and bytes of each contestant at each size, with their exponents."""
    found: dict[str, dict[str, list[float]]] = {}
    for size in sweep.sizes:
        steps = sweep.steps(size)
        seconds = seconds_of(steps)
        for name, step in steps.items():
            curves = found.setdefault(name, {"seconds": [], "bytes": []})
            curves["seconds"].append(seconds[name])
            # A page at least: what is smaller came from pages that the process had.
            curves["bytes"].append(max(harness.peak_bytes(CPU, step) or 0, 4096))
    return {
        "title": sweep.title,
        "size": sweep.size,
        "sizes": list(sweep.sizes),
        "commit": harness.commit(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "contestants": {name: fitted(sweep.sizes, curves) for name, curves in found.items()},
    }


def over_workers(scored: dict[str, Any]) -> dict[str, Any]:
    """What ``scoring_workers.py`` wrote as a sweep: seconds a shard, over all workers, and their bytes.

    Raises:
        ValueError: there are fewer than two numbers of workers.
    """
    result: dict[str, Any] = {
        "title": f"a shard, scored by Ray on {scored['cores']} cores",
        "size": "workers of one thread",
        "contestants": {},
    }
    for corpus, runs in scored["medians"].items():
        # "ray, 4 workers"; the local runner is no point of this curve.
        names = {int(name.split()[1]): name for name in runs if name.startswith("ray")}
        result["sizes"] = sorted(names)
        curves = {"seconds": [runs[names[number]]["per_shard_s"] for number in result["sizes"]]}
        if held := scored["memory"].get(corpus):
            curves["bytes"] = [held[names[number]]["peak_bytes"] for number in result["sizes"]]
        utterances = scored["utterances_per_shard"][corpus]
        result["contestants"][f"{utterances:,} utterance{'s' * (utterances > 1)}"] = fitted(result["sizes"], curves)
    return result


def report(name: str, sweep: dict[str, Any]) -> None:
    """Print the exponents of a sweep's curves."""
    for contestant, shown in sweep["contestants"].items():
        for quantity, curve in shown.items():
            steps = " ".join(f"{step:.2f}" for step in curve["steps"])
            print(f"{name}, {contestant}, {quantity}: exponent {curve['exponent']:.2f} ({steps})", flush=True)


def draw(sweeps: Sequence[dict[str, Any]], path: Path) -> None:
    """The figure of some sweeps."""
    import figures

    def curves(sweep, quantity):
        return [
            figures.Curve(name, sweep["sizes"], shown[quantity]["values"], shown[quantity]["exponent"])
            for name, shown in sweep["contestants"].items()
            if quantity in shown
        ]

    panels = [(sweep["title"], sweep["size"], curves(sweep, "seconds"), curves(sweep, "bytes")) for sweep in sweeps]
    figures.scaling(panels, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and draw as the command line says; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SWEEPS, metavar="NAME", help=f"among {', '.join(SWEEPS)}")
    parser.add_argument("--out", type=Path, help="JSON file; curves that it has and that are not measured now stay")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--from", dest="source", type=Path, help="draw this JSON, and measure nothing")
    parser.add_argument("--workers", type=Path, help="JSON of scoring_workers.py, to be drawn as well")
    options = parser.parse_args(arguments)
    if options.source is not None:
        run = json.loads(options.source.read_text())
    else:
        kept = json.loads(options.out.read_text())["sweeps"] if options.out and options.out.exists() else {}
        run = {"sweeps": {}}
        for name in SWEEPS:
            if options.only is None or name in options.only:
                run["sweeps"][name] = measure(SWEEPS[name])
                report(name, run["sweeps"][name])
            elif name in kept:
                run["sweeps"][name] = kept[name]
        if options.out:
            options.out.write_text(json.dumps(run, indent=1) + "\n")
    sweeps = list(run["sweeps"].values())
    if options.workers:
        sweeps.append(over_workers(json.loads(options.workers.read_text())))
        report("workers", sweeps[-1])
    if options.plot:
        draw(sweeps, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
