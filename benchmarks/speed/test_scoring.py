"""Scoring a corpus from files to files, beside the model alone on batches in memory, and reading alone.

Reading runs ahead and copies its batches to the device, as in scoring: it is as fast as the slower one of the two.
"""

import copy
import functools
import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed import harness, work

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow.parquet as pq

from benchmarks.speed.scoring import CLASSES, make_model, ready_batches, run_model
from benchmarks.speed.workloads import SCORED, Views
from m3er_fast.corpus import generate_corpus, read_parquet
from m3er_fast.corpus.parquet import decode_rows
from m3er_fast.scoring import Scorer, score
from m3er_fast.scoring.batching import plan_batches
from m3er_fast.shards.plan import plan_shards
from m3er_fast.shards.prefetch import Prefetch
from m3er_fast.shards.reader import read_windows

MODEL, THREADS, READING = "the model alone", "the model alone, one batch per thread", "reading alone"
COMPARED = 128  # utterances whose scores are compared with the model in float64


@functools.cache
def prepared(device):
    """Return a corpus in a folder that the process removes, a model fitted to it, and the first scores in float64."""
    folder = tempfile.TemporaryDirectory()
    corpus = Path(folder.name) / "corpus"
    generate_corpus(corpus, utterances=SCORED[device.type], rows_per_shard=SCORED[device.type] // 2)
    plan = plan_shards(corpus)
    model = make_model(plan).to(device)
    first = read_parquet(plan.shards[0].path).select(slice(0, COMPARED))
    features = {name: torch.from_numpy(x).double().to(device) for name, x in first.features.items()}
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()
        oracle = exact.probabilities(exact(features, torch.from_numpy(first.lengths).to(device)))
    return folder, model, oracle


def probabilities_in(out):
    """Return the first scores that a run wrote."""
    table = pq.read_table(sorted(out.glob("*.parquet"))[0]).slice(0, COMPARED)
    return np.stack([table[f"p_{name}"].to_numpy() for name in CLASSES], axis=1)


def read_alone(plan, scorer):
    """Copy every batch that the scorer would make to the device."""
    for shard in plan.shards:
        with Prefetch(read_windows(plan.corpus, shard, window_bytes=scorer.window_bytes)) as tables:
            for table in tables:
                rows = decode_rows(table, scorer.model.input_dims)
                for batch in plan_batches(rows.lengths, scorer.batch_frames):
                    scorer._stager.stage(rows, batch, scorer.model.input_dims)


@pytest.mark.benchmark(timer=harness.now)
@pytest.mark.parametrize("contestant", ["ours", MODEL, THREADS, READING])
def test_scoring(benchmark, contest, device, contestant):
    folder, model, oracle = prepared(device)
    corpus, runs = Path(folder.name) / "corpus", Path(folder.name) / "runs"
    samples = SCORED[device.type]
    benchmark.group = f"scoring, {samples} utterances of up to 20 frames"
    works = work.model(
        Views(model.input_dims, samples, 15), len(CLASSES), check=True, training=False
    )  # 15 frames on average
    if contestant == THREADS and device.type != "cpu":
        pytest.skip("scoring computes one batch at a time there")
    if contestant in (MODEL, THREADS):
        threads = torch.get_num_threads() if contestant == THREADS else None
        batches = [
            [{name: x.to(device) for name, x in features.items()}, lengths.to(device)]
            for features, lengths in ready_batches(plan_shards(corpus), Scorer(model), samples)
        ]
        contest(contestant, lambda: run_model(model, batches, threads), works, samples=samples)
        return
    if contestant == READING:
        plan, scorer = plan_shards(corpus), Scorer(model)
        contest(contestant, lambda: read_alone(plan, scorer), samples=samples)
        return
    numbers = itertools.count()

    def step():
        out = runs / str(next(numbers))
        score(corpus, model, out)
        shutil.rmtree(runs / str(int(out.name) - 1), ignore_errors=True)
        return out

    def error(out):
        return harness.relative_error(probabilities_in(out), oracle)

    contest(contestant, step, works, error=error, traced=True, samples=samples)
    shutil.rmtree(runs, ignore_errors=True)
