"""Rate and memory of scoring a generated corpus on this machine, beside the model alone and reading alone.

    python -m benchmarks.speed.scoring --utterances 50000 --out results.json

generates the corpus in a temporary folder (``--corpus`` keeps or reuses one), fits a model to its first shard, and
measures in one process

* ``read``: reading all shards from the page cache as the scorer does, with page checksums verified and ignored, by one
  thread and by two;
* ``model``: the model alone on the scorer's batches in memory, one after the other with all threads, before and after
  every run;
* ``model_by_threads``: the same batches, one per thread at a time;
* ``score``: the whole run, and the peak memory of this process during it. ``ratio`` compares its rate with the mean of
  ``model`` before and after, ``ratio_by_threads`` with that of ``model_by_threads``.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.speed import harness
from m3er_fast import M3ERFusion
from m3er_fast.corpus import generate_corpus, read_parquet
from m3er_fast.corpus.parquet import decode_rows
from m3er_fast.execution.threads import map_in_order
from m3er_fast.scoring import Scorer, score
from m3er_fast.scoring.batching import plan_batches
from m3er_fast.shards.plan import plan_shards
from m3er_fast.shards.reader import read_windows

CLASSES = ("angry", "happy", "neutral", "sad")
MODELS = ("model", "model_by_threads")


def make_model(corpus):
    """Return a model with the default check and proxies, fitted to 2000 utterances; its network is not trained."""
    first = read_parquet(corpus.shards[0].path).select(slice(0, 2000))
    torch.manual_seed(0)
    model = M3ERFusion(first.input_dims, len(CLASSES), classes=CLASSES).eval()
    return model.fit(first.features, lengths=first.lengths, available=first.available)


def read_rate(plan, threads, verify):
    """Return the bytes of frames read per second; the threads share the shards."""
    read = [0] * threads

    def run(turn):
        for shard in plan.shards[turn::threads]:
            for table in read_windows(plan.corpus, shard, verify=verify):
                read[turn] += sum(table[name].nbytes for name in table.column_names if name not in ("id", "length"))

    start = time.perf_counter()
    workers = [threading.Thread(target=run, args=(turn,)) for turn in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(read) / (time.perf_counter() - start)


def ready_batches(plan, scorer, rows):
    """Return the scorer's batches of the first windows, with at least ``rows`` utterances, in memory."""
    batches, found = [], 0
    tables = (
        table for shard in plan.shards for table in read_windows(plan.corpus, shard, window_bytes=scorer.window_bytes)
    )
    for table in tables:
        decoded = decode_rows(table, scorer.model.input_dims)
        for batch in plan_batches(decoded.lengths, scorer.batch_frames):
            steps = int(decoded.lengths[batch].max())
            features = {name: torch.from_numpy(column.padded(batch, steps)) for name, column in decoded.columns.items()}
            batches.append((features, torch.from_numpy(decoded.lengths[batch])))
            found += len(batch)
        if found >= rows:
            break
    return batches


def run_model(model, batches, threads=None):
    """Return class probabilities of ready batches, one after the other or one per thread at a time."""

    def run(batch, _is_canceled):
        with torch.inference_mode():
            return model.probabilities(model(*batch))

    return list(map_in_order(run, batches, threads))


def model_rates(plan, scorer, rows):
    """Return utterances per second of the model alone on ready batches in memory, in the order of `MODELS`."""
    batches = ready_batches(plan, scorer, rows)
    rates = []
    for threads in (None, torch.get_num_threads()):
        run_model(scorer.model, batches[:2], threads)
        start = time.perf_counter()
        run_model(scorer.model, batches, threads)
        rates.append(sum(len(lengths) for _, lengths in batches) / (time.perf_counter() - start))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=50_000)
    parser.add_argument(
        "--corpus", type=Path, help="folder of the corpus: reused if it exists, else generated and kept"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of models and score in turn; medians are reported")
    parser.add_argument("--model-rows", type=int, default=16_384)
    parser.add_argument(
        "--skip-reading", action="store_true", help="for a corpus that does not fit into the page cache"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = options.corpus or Path(scratch) / "corpus"
        if not corpus.exists():
            generate_corpus(corpus, utterances=options.utterances)
        plan = plan_shards(corpus)
        scorer = Scorer(make_model(plan))
        result = {
            **harness.circumstances(),
            "threads": torch.get_num_threads(),
            "corpus_bytes": sum(shard.size for shard in plan.shards),
            "shards": len(plan.shards),
            "batch_frames": scorer.batch_frames,
        }
        if not options.skip_reading:
            read_rate(plan, 1, False)  # into the page cache
            result["read_bytes_per_second"] = {
                f"{threads} threads, checksums {'verified' if verify else 'ignored'}": max(
                    read_rate(plan, threads, verify) for _ in range(3)
                )
                for threads in (1, 2)
                for verify in (False, True)
            }
        peaks = []
        rates = {name: [] for name in (*MODELS, "score")}

        def time_model():
            for name, rate in zip(MODELS, model_rates(plan, scorer, options.model_rows), strict=True):
                rates[name].append(rate)

        time_model()
        for turn in range(options.rounds):
            out = Path(scratch) / f"scores-{turn}"
            is_marked = harness.reset_resident_peak() is not None
            summary = score(corpus, scorer.model, out)
            if is_marked:
                peaks.append(harness.resident_peak())
            rates["score"].append(summary.rows / summary.seconds)
            shutil.rmtree(out)
            time_model()
        # Over minutes the rate of the model itself drifts.
        beside = {name: [statistics.mean(pair) for pair in itertools.pairwise(rates[name])] for name in MODELS}
        ratio, by_threads = (
            statistics.median(s / m for s, m in zip(rates["score"], beside[name], strict=True)) for name in MODELS
        )
        result |= {
            "utterances": summary.rows,
            "errors": summary.errors,
            "seconds": summary.seconds,
            "rates": rates,
            "model_utterances_per_second": statistics.median(rates["model"]),
            "model_by_threads_utterances_per_second": statistics.median(rates["model_by_threads"]),
            "score_utterances_per_second": statistics.median(rates["score"]),
            "ratio": ratio,
            "ratio_by_threads": by_threads,
            "peak_rss_gib": max(peaks) / 2**30 if peaks else None,  # of this process during scoring
        }
    harness.write_json(result, options.out)


if __name__ == "__main__":
    main()
