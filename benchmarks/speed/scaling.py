"""Time and peak memory over sizes: batch, steps, classes, rows of a bank, neighbours, each beside the textbook.

    python -m benchmarks.speed.scaling --out benchmarks/results/cpu-2-cores/scaling.json \\
        --plot docs/results/scaling.png --workers benchmarks/results/scoring-workers-cpu-2-cores.json

measures every curve (``--only loss-batch`` just one) on the CPU and fits value = a · sizeᵇ, by least squares of the
logarithms. The exponent b of the whole curve hides where it bends, so ``steps`` in the JSON holds the exponent between
each size and the next. ``--from JSON`` draws an earlier run. ``--workers JSON`` also draws a file of
``scoring_workers.py``: time per shard and memory over the number of Ray's workers.
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

import torch

from benchmarks.speed import harness, textbook
from benchmarks.speed.harness import OURS, TEXTBOOK
from benchmarks.speed.operations import current_contestant
from benchmarks.speed.textbook_weights import textbook_check, textbook_network
from benchmarks.speed.workloads import MOSEI_DIMS, PAPER_DIMS, Views
from m3er_fast import CCA, MemoryFusionNetwork, ModalityCheck, functional
from m3er_fast.functional import unchecked

CPU = torch.device("cpu")
Step = Callable[[], Any]
_SECONDS = 0.7  # for one point, beyond a few calls


class Sweep(NamedTuple):
    """A size that is swept."""

    title: str
    size: str
    sizes: Sequence[int]
    steps: Callable[[int], dict[str, Step]]  # from one size to the step of each contestant


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

    return {OURS: by(functional.fusion_loss), TEXTBOOK: by(textbook.fusion_loss)}


@functools.cache
def fitted_checks() -> tuple[ModalityCheck, textbook.CheckStatistics]:
    shared = harness.draw(4096, 30, seed=0)
    features = {
        name: shared @ harness.draw(30, d, seed=d) + harness.draw(4096, d, seed=1000 + d)
        for name, d in MOSEI_DIMS.items()
    }
    check = ModalityCheck(MOSEI_DIMS, n_components=30).fit(features)
    return check, textbook_check(features, 30, torch.float32)


def check(batch: int) -> dict[str, Step]:
    fitted, definition = fitted_checks()
    projections = fitted.projections_

    def make(seed):
        return [harness.draw(batch, d, seed=seed) for d in MOSEI_DIMS.values()]

    inputs = harness.Rotation(make, 4 * batch * sum(MOSEI_DIMS.values()), CPU)
    return {
        OURS: lambda: functional.check_statistics(inputs(), projections),
        TEXTBOOK: lambda: definition(inputs()),
    }


def search(rows: int) -> dict[str, Step]:
    bank, query = harness.draw(rows, 300, seed=0), harness.draw(256, 300, seed=1)
    index = unchecked.neighbor_index(bank, "torch")
    return {OURS: lambda: index.search(query, 16), TEXTBOOK: lambda: textbook.nearest(query, bank, 16)}


def weights(k: int) -> dict[str, Step]:
    bank, partners, query = (
        harness.draw(10_000, 300, seed=0),
        harness.draw(10_000, 74, seed=1),
        harness.draw(500, 300, seed=2),
    )
    near = torch.randint(0, 10_000, (500, k), generator=torch.Generator().manual_seed(3))
    return {
        name: functools.partial(module.local_least_squares, query, bank, partners, near, ridge=1e-3)
        for name, module in ((OURS, functional), (TEXTBOOK, textbook))
    }


def scan(batch: int, steps: int) -> dict[str, Step]:
    views = Views(PAPER_DIMS, batch, steps)
    torch.manual_seed(0)
    network = MemoryFusionNetwork(PAPER_DIMS, 6)
    written = textbook_network(network)
    lengths = torch.full((batch,), steps)

    def make(seed):
        return [harness.draw(batch, steps, d, seed=seed) for d in PAPER_DIMS.values()]

    inputs = harness.Rotation(make, views.bytes, CPU)

    return {
        OURS: torch.no_grad()(lambda: functional.memory_scan(inputs(), lengths, network.scan_weights())),
        TEXTBOOK: torch.no_grad()(lambda: written.scan(inputs())),
    }


def fit(rows: int) -> dict[str, Step]:
    x, y = harness.draw(rows, 300, seed=0), harness.draw(rows, 74, seed=1)
    return {OURS: lambda: CCA(n_components=30).fit(x, y), TEXTBOOK: lambda: textbook.cca(x, y, 30)}


def powers(first: int, last: int, step: int = 1) -> list[int]:
    return [2**exponent for exponent in range(first, last + 1, step)]


SWEEPS = {
    "loss-batch": Sweep("loss and gradient, C = 6", "B, samples", powers(6, 18, 2), lambda n: loss(n, 6)),
    "loss-classes": Sweep("loss and gradient, B = 256", "C, classes", powers(2, 14, 2), lambda n: loss(256, n)),
    "check-batch": Sweep("check, d = 300/74/35, k = 30", "B, samples", powers(4, 14, 2), check),
    "search-rows": Sweep("16 nearest, d = 300, 256 queries", "n, rows of the bank", powers(9, 17, 2), search),
    "weights-neighbors": Sweep("local least squares, 500 queries", "K, neighbours", powers(2, 7), weights),
    "scan-batch": Sweep("memory scan forward, T = 20", "B, samples", powers(0, 10, 2), lambda n: scan(n, 20)),
    "scan-steps": Sweep("memory scan forward, B = 32", "T, steps", powers(0, 8, 2), lambda n: scan(32, n)),
    "cca-rows": Sweep("CCA fit, 300 and 74 features", "n, rows", powers(9, 17, 2), fit),
}
# Names in runs that were measured before the sweep was renamed.
_FORMER_SWEEPS = {"gate-batch": "check-batch"}


def seconds_of(steps: dict[str, Step]) -> dict[str, float]:
    """Return each contestant's median seconds per call; they take turns, so that a busy moment affects all."""
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
    """Return b of value = a · sizeᵇ by least squares of the logarithms, and b between each size and the next.

    Raises:
        ValueError: if there are fewer than two sizes, or a size or value is not positive.
    """
    if len(sizes) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"an exponent needs at least two sizes and positive values, got {sizes} and {values}")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    slope, _ = statistics.linear_regression(x, y)
    pairs = zip(x[1:], x[:-1], y[1:], y[:-1], strict=True)
    return slope, [(y1 - y0) / (x1 - x0) for x1, x0, y1, y0 in pairs]


def fitted(sizes: Sequence[float], curves: dict[str, list[float]]) -> dict[str, Any]:
    """Return each curve with its exponents, as in the JSON."""
    shown: dict[str, Any] = {}
    for quantity, values in curves.items():
        exponent, steps_between = exponents(sizes, values)
        shown[quantity] = {"values": values, "exponent": exponent, "steps": steps_between}
    return shown


def measure(sweep: Sweep) -> dict[str, Any]:
    """Measure seconds and bytes of each contestant at each size, and fit their exponents."""
    found: dict[str, dict[str, list[float]]] = {}
    for size in sweep.sizes:
        steps = sweep.steps(size)
        seconds = seconds_of(steps)
        for name, step in steps.items():
            curves = found.setdefault(name, {"seconds": [], "bytes": []})
            curves["seconds"].append(seconds[name])
            # At least one page: a smaller number was served from pages that the process already had.
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
    """Return a file of ``scoring_workers.py`` as a sweep: seconds per shard, over all workers, and their bytes.

    Raises:
        ValueError: if there are fewer than two numbers of workers.
    """
    result: dict[str, Any] = {
        "title": f"one shard, scored by Ray on {scored['cores']} cores",
        "size": "workers of one thread",
        "contestants": {},
    }
    for corpus, runs in scored["medians"].items():
        # Names such as "ray, 4 workers"; the local runner is not on this curve.
        names = {int(name.split()[1]): name for name in runs if name.startswith("ray")}
        result["sizes"] = sorted(names)
        curves = {"seconds": [runs[names[number]]["per_shard_s"] for number in result["sizes"]]}
        if memory := scored["memory"].get(corpus):
            curves["bytes"] = [memory[names[number]]["peak_bytes"] for number in result["sizes"]]
        utterances = scored["utterances_per_shard"][corpus]
        result["contestants"][f"{utterances:,} utterance{'s' * (utterances > 1)}"] = fitted(result["sizes"], curves)
    return result


def read_sweeps(path: Path) -> dict[str, Any]:
    """Return the sweeps of an earlier run, by today's names."""
    sweeps = json.loads(path.read_text())["sweeps"]
    for sweep in sweeps.values():
        sweep["contestants"] = {current_contestant(name): curve for name, curve in sweep["contestants"].items()}
    return {_FORMER_SWEEPS.get(name, name): sweep for name, sweep in sweeps.items()}


def report(name: str, sweep: dict[str, Any]) -> None:
    """Print the exponents of a sweep's curves."""
    for contestant, shown in sweep["contestants"].items():
        for quantity, curve in shown.items():
            steps = " ".join(f"{step:.2f}" for step in curve["steps"])
            print(f"{name}, {contestant}, {quantity}: exponent {curve['exponent']:.2f} ({steps})", flush=True)


def draw(sweeps: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the figure of some sweeps."""
    from benchmarks.report import figures

    def curves(sweep, quantity):
        return [
            figures.Curve(name, sweep["sizes"], shown[quantity]["values"], shown[quantity]["exponent"])
            for name, shown in sweep["contestants"].items()
            if quantity in shown
        ]

    panels = [(sweep["title"], sweep["size"], curves(sweep, "seconds"), curves(sweep, "bytes")) for sweep in sweeps]
    figures.scaling(panels, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SWEEPS, metavar="NAME", help=f"some of {', '.join(SWEEPS)} (default: all)"
    )
    parser.add_argument("--out", type=Path, help="JSON file; its curves that are not measured now stay")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--from", dest="source", type=Path, help="draw this JSON and measure nothing")
    parser.add_argument("--workers", type=Path, help="JSON of scoring_workers.py to draw as well")
    options = parser.parse_args(arguments)
    if options.source is not None:
        run = {"sweeps": read_sweeps(options.source)}
    else:
        kept = read_sweeps(options.out) if options.out and options.out.exists() else {}
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
