"""Score generated corpora with Ray at 1, 2 and 4 workers of one thread on this machine, beside the local runner.

    python -m benchmarks.speed.scoring_workers --out results.json

generates two corpora in a temporary folder: *tiny*, with shards of one utterance, for which everything but scoring
takes the time, and *full*, with shards of ``--rows-per-shard`` utterances of up to 20 frames and 410 features. For each
run it reports

* ``first_s``: time until the first shard was done, with the start of the workers;
* ``per_shard_s``: time per shard, over all workers, once each could have finished one;
* ``utterances_per_second``: in the same time;
* ``peak_bytes``: peak memory of the process that starts the run and its workers together;
* ``peak_bytes_with_ray``: the same with Ray's own processes, among them idle workers that Ray starts ahead.

Memory is the sum of proportional set sizes, in which pages that several processes share, such as torch's code, count
once. It is read every 50 ms (only on Linux), in a separate run that is not timed. This process releases free memory
before that run. Ray is started once, before all runs.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
import torch

from benchmarks.speed import harness
from benchmarks.speed.scoring import CLASSES, make_model
from m3er_fast import M3ERFusion
from m3er_fast.corpus import generate_corpus, read_parquet
from m3er_fast.scoring import score
from m3er_fast.shards.plan import plan_shards

TINY_DIMS = {"text": 6, "audio": 5, "face": 4}


def make_tiny(folder, shards):
    """Generate a corpus of copies of one shard, and return a model for it."""
    generate_corpus(folder, utterances=200, rows_per_shard=200, input_dims=TINY_DIMS, steps=4)
    some = read_parquet(folder / "part-00000.parquet")
    model = M3ERFusion(some.input_dims, len(CLASSES), classes=CLASSES).eval()
    model.fit(some.features, lengths=some.lengths, available=some.available)
    (folder / "part-00000.parquet").unlink()
    generate_corpus(folder, utterances=1, rows_per_shard=1, input_dims=TINY_DIMS, steps=4)
    content = (folder / "part-00000.parquet").read_bytes()
    for shard in range(1, shards):
        (folder / f"part-{shard:05d}.parquet").write_bytes(content)
    return model


def measure(corpus, model, out, **options):
    """Return the times of one run, as the module lists them."""
    done = []

    def note(progress):
        if progress.done > len(done):
            done.append((time.perf_counter(), progress.rows))

    start = time.perf_counter()
    summary = score(corpus, model, out, progress=note, **options)
    apart = options.get("workers", 1)
    (begun, before), (last, rows) = done[apart - 1], done[-1]
    assert (len(done), summary.quarantined, summary.errors) == (summary.shards, (), 0)
    return {
        "first_s": done[0][0] - start,
        "per_shard_s": (last - begun) / (len(done) - apart),
        "utterances_per_second": (rows - before) / (last - begun),
    }


class PeakMemory:
    """The peak memory of this process and its children until `stop`."""

    def __init__(self):
        self.of_workers = self.of_all = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self):
        self._over.set()
        self._thread.join()

    def _watch(self):
        import psutil  # Ray's own copy, which is found once Ray is imported

        this = psutil.Process()
        while not self._over.wait(0.05):
            workers, others = this.memory_full_info().pss, 0
            for process in this.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
                    size = process.memory_full_info().pss
                    if "".join(process.cmdline()).startswith("ray::_Worker"):
                        workers += size
                    else:
                        others += size
            self.of_workers, self.of_all = max(self.of_workers, workers), max(self.of_all, workers + others)


def peak_memory(corpus, model, out, **options):
    """Return the bytes of one run until its last shard is done, as the module lists them."""
    harness.release_free_memory()
    peak = PeakMemory()

    def stop_at_last(progress):
        if progress.done == progress.shards:
            peak.stop()

    try:
        score(corpus, model, out, progress=stop_at_last, **options)
    finally:
        peak.stop()
    return {"peak_bytes": peak.of_workers, "peak_bytes_with_ray": peak.of_all}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny-shards", type=int, default=400)
    parser.add_argument("--full-shards", type=int, default=16)
    parser.add_argument("--rows-per-shard", type=int, default=1024)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3, help="of all runs in turn; medians are reported")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if min(options.tiny_shards, options.full_shards) <= max(options.workers):
        parser.error("--tiny-shards and --full-shards must be larger than every number of --workers")
    torch.set_num_threads(1)
    ray.init(
        address="local",
        num_cpus=max(options.workers),
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    runs = {"local": {}} | {f"ray, {n} workers": {"engine": "ray", "workers": n} for n in options.workers}
    found = {corpus: {name: [] for name in runs} for corpus in ("tiny", "full")}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        models = {"tiny": make_tiny(root / "tiny", options.tiny_shards)}
        generate_corpus(
            root / "full",
            utterances=options.full_shards * options.rows_per_shard,
            rows_per_shard=options.rows_per_shard,
        )
        models["full"] = make_model(plan_shards(root / "full"))
        for turn in range(options.rounds):
            for corpus, model in models.items():
                for name, how in runs.items():
                    out = root / f"scores-{corpus}-{turn}-{name}"
                    found[corpus][name].append(measure(root / corpus, model, out, **how))
        memory = {}
        if sys.platform == "linux":  # only there are proportional set sizes known
            memory = {
                corpus: {
                    name: peak_memory(root / corpus, model, root / f"memory-{corpus}-{name}", **how)
                    for name, how in runs.items()
                }
                for corpus, model in models.items()
            }
    ray.shutdown()
    result = {
        **harness.circumstances(),
        "threads_per_worker": 1,
        "ray": ray.__version__,
        "shards": {"tiny": options.tiny_shards, "full": options.full_shards},
        "utterances_per_shard": {"tiny": 1, "full": options.rows_per_shard},
        "medians": {
            corpus: {
                name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
                for name, rounds in runs_of.items()
            }
            for corpus, runs_of in found.items()
        },
        "memory": memory,
        "rounds": found,
    }
    harness.write_json(result, options.out)


if __name__ == "__main__":
    main()
