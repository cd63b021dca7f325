"""Scoring a corpus from files to files, beside the model alone on batches in memory, and reading alone.

Reading goes ahead and its batches go to the device as they do in scoring: the slower of storage and the way there.
"""

import copy
import functools
import itertools
import shutil
import tempfile
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
import work

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow.parquet as pq
from scoring import CLASSES, make_model, ready_batches, run_model
from workloads import SCORED, Views

from m3er_fast.corpus import generate_corpus, read_parquet
from m3er_fast.corpus.parquet import decode_rows
from m3er_fast.scoring import Scorer, score
from m3er_fast.scoring.batching import plan_batches
from m3er_fast.shards.plan import plan_shards
from m3er_fast.shards.prefetch import Prefetch
from m3er_fast.shards.reader import read_windows

MODEL, THREADS, READING = "the model alone", "the model alone, a batch a thread", "reading alone"
COMPARED = 128  # utterances whose scores are compared with those of the model in float64


@functools.cache
def prepared(device):
    """A corpus in a folder that goes with the process, a model fitted to it, and the first scores in float64."""
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
    """The first scores that a run wrote."""
    table = pq.read_table(sorted(out.glob("*.parquet"))[0]).slice(0, COMPARED)
    return np.stack([table[f"p_{name}"].to_numpy() for name in CLASSES], axis=1)


def read_alone(plan, scorer):
    """Every batch that the scorer would make, on the device."""
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
    works = work.model(Views(model.input_dims, samples, 15), len(CLASSES), training=False)  # 15 frames on average
    if contestant == THREADS and device.type != "cpu":
        pytest.skip("scoring computes batches one after the other there")
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
