"""Losses of one training by 1, 2 and 4 processes.

    python -m benchmarks.quality.training_processes OUT

trains on a generated corpus, with the same settings and seed each time, in processes of this machine that talk by
gloo. It writes OUT/training_processes.json and .png.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import distributed

from benchmarks.quality import common
from m3er_fast import M3ERConfig
from m3er_fast.config import TrainingConfig
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.training import train

PROCESSES = (1, 2, 4)
UTTERANCES = 1000
STYLES = {1: ("#000000", "-", 3.0), 2: ("#E69F00", "--", 2.0), 4: ("#0072B2", ":", 2.0)}
CONFIG = M3ERConfig(training=TrainingConfig(epochs=12, patience=None))
LOSSES = {"train_loss": "training", "valid_loss": "validation"}
MARKERS = {"train_loss": "o", "valid_loss": "s"}


def losses(processes):
    """Return the losses of every epoch."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_member, args=(processes, Path(folder)), nprocs=processes)
        return json.loads((Path(folder) / "history.json").read_text())


def _member(rank, processes, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "meeting"), processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    history = train(make_synthetic(UTTERANCES, seed=0), CONFIG).history
    if rank == 0:
        (folder / "history.json").write_text(json.dumps({name: history[name] for name in LOSSES}))
    distributed.barrier()


def largest_difference(results, processes):
    """Return the largest relative difference of a loss from that of one process."""
    return max(float(np.max(np.abs(np.divide(results[processes][name], results[1][name]) - 1))) for name in LOSSES)


def draw(results, path):
    """Draw the curves, and how far each is from that of one process."""
    figure = Figure(figsize=(9.5, 3.6), dpi=130, layout="constrained")
    curves, differences = figure.subplots(1, 2)
    for processes, history in results.items():
        color, line, width = STYLES[processes]
        epochs = np.arange(1, len(history["train_loss"]) + 1)
        for name, label in LOSSES.items():
            curves.plot(epochs, history[name], line, color=color, lw=width)
            if processes == 1:
                curves.annotate(label, (epochs[-4], history[name][-4]), (4, 8), textcoords="offset points")
            if processes > 1:
                gap = np.abs(np.divide(history[name], results[1][name]) - 1)
                differences.semilogy(epochs, np.maximum(gap, 1e-9), MARKERS[name], color=color, ms=4)
        curves.plot([], [], line, color=color, lw=width, label=f"{processes} process{'es' * (processes > 1)}")
    curves.legend(frameon=False)
    curves.set(xlabel="epoch", ylabel="loss", title="Loss of a training")
    for name, marker in MARKERS.items():
        differences.plot([], [], marker, color="0.4", ms=4, label=LOSSES[name])
    differences.legend(frameon=False, loc="upper left")
    differences.axhline(1e-5, color="0.5", lw=1, ls="--")
    differences.set(xlabel="epoch", title="Relative difference from one process", ylim=(5e-10, 1e-3))
    figure.savefig(path, metadata={"Software": None})


def main():
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    results = {processes: losses(processes) for processes in PROCESSES}
    common.write_results(out / "training_processes.json", {"utterances": UTTERANCES}, results=results)
    draw(results, out / "training_processes.png")
    for processes in PROCESSES[1:]:
        print(f"{processes} processes: within {largest_difference(results, processes):.1e} of one")


if __name__ == "__main__":
    main()
