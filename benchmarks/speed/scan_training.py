"""Training with the fast memory scan beside training with the reference: five seeds, two corpora, and the time.

    python -m benchmarks.speed.scan_training [--only generated|YouTube]

trains the default network on the generated corpus and, if $M3ER_DATA or shared/data has it, on YouTube (split anew),
once with the reference and once with the implementation that "auto" chooses. It prints the best validation losses and
the seconds as a Markdown table.
"""

import argparse
import functools
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

from benchmarks.quality import common
from m3er_fast import M3ERConfig
from m3er_fast.corpus.convert import read
from m3er_fast.corpus.splits import split_by_group
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.functional import unchecked
from m3er_fast.training import train


def corpora(root):
    yield "generated", make_synthetic(), 20
    if (root / "youtube_sequences").is_dir():
        yield "YouTube", split_by_group(read(root / "youtube_sequences", "mfn-h5")), 100


def best_losses(corpus, epochs, seeds):
    losses = []
    start = time.perf_counter()
    for seed in range(seeds):
        config = M3ERConfig()
        config = config.replace(training=replace(config.training, epochs=epochs, seed=seed))
        losses.append(min(train(corpus, config).history["valid_loss"]))
    return np.array(losses), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=("generated", "YouTube"))
    common.add_data_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| Corpus | Scan | Best validation loss per seed | Mean ± deviation | Seconds |\n|---|---|---|---|---:|")
    for name, corpus, epochs in corpora(options.data):
        if options.only not in (None, name):
            continue
        for label, backend in (("reference", "torch"), ("auto", "auto")):
            scan = functools.partial(unchecked.memory_scan, backend=backend)
            with mock.patch.object(unchecked, "memory_scan", scan):
                losses, seconds = best_losses(corpus, epochs, options.seeds)
            each = ", ".join(f"{loss:.4f}" for loss in losses)
            deviation = losses.std(ddof=1) if len(losses) > 1 else 0.0
            print(f"| {name} | {label} | {each} | {losses.mean():.4f} ± {deviation:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
