"""An epoch of training streamed from shards beside one in memory: utterances per second, and the most memory.

    python -m benchmarks.speed.streamed_training [--utterances N] [--only streamed|memory]

generates a labelled corpus (33 kB for each utterance) and trains the default network for one epoch on its train split,
each way in a process of its own. It prints a Markdown table. A million utterances take 33 GB of disk.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch

from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.corpus import generate_corpus, read_parquet
from m3er_fast.training import StreamedCorpus
from m3er_fast.training.data import MemoryData
from m3er_fast.training.loop import train_epoch
from m3er_fast.training.state import TrainingState

WAYS = {
    "memory": lambda folder: MemoryData(read_parquet(folder, splits=("train", "valid")), seed=0),
    "streamed": StreamedCorpus,
}


def measure(way, folder):
    """Return utterances, utterances per second, and the most memory in GiB."""
    torch.set_num_threads(1)
    data = WAYS[way](folder)
    torch.manual_seed(0)
    model = M3ERFusion(data.input_dims, len(data.classes), M3ERConfig(check=None, proxy=None))
    start = time.perf_counter()
    train_epoch(TrainingState(model, {}), data.training)
    seconds = time.perf_counter() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return data.training.rows, data.training.rows / seconds, most


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=50_000)
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--folder", type=Path, help="for the corpus (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        generate_corpus(folder, utterances=options.utterances, num_classes=4)
        print("| Training | Utterances | Utterances per second | Peak memory |\n|---|---:|---:|---:|")
        for way in WAYS:
            if options.only not in (None, way):
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows, rate, most = pool.apply(measure, (way, folder))
            print(f"| {way} | {rows} | {rate:.0f} | {most:.2f} GiB |", flush=True)


if __name__ == "__main__":
    main()
