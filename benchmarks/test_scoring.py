"""Scoring a small corpus from files to files, beside the model alone on the same batches in memory."""

import copy
import functools
import itertools
import shutil
import tempfile
from pathlib import Path

import harness
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import work
from scoring import CLASSES, make_model, ready_batches, run_model
from workloads import SCORED, Views

from m3er_fast.corpus import generate_corpus, read_parquet
from m3er_fast.scoring import Scorer, score
from m3er_fast.scoring.plan import plan_shards

COMPARED = 128  # utterances whose scores are compared with those of the model in float64


@functools.cache
def prepared(device):
    """A corpus in a folder that goes with the process, a model fitted to it, and the first scores in float64."""
    folder = tempfile.TemporaryDirectory()
    corpus = Path(folder.name) / "corpus"
    generate_corpus(corpus, utterances=SCORED, rows_per_shard=1024)
    model = make_model(plan_shards(corpus)).to(device)
    first = read_parquet(corpus).select(slice(0, COMPARED))
    features = {name: torch.from_numpy(x).double().to(device) for name, x in first.features.items()}
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()
        oracle = exact.probabilities(exact(features, torch.from_numpy(first.lengths).to(device)))
    return folder, model, oracle


def probabilities_in(out):
    """The first scores that a run wrote."""
    table = pq.read_table(sorted(out.glob("*.parquet"))[0]).slice(0, COMPARED)
    return np.stack([table[f"p_{name}"].to_numpy() for name in CLASSES], axis=1)


@pytest.mark.benchmark(timer=harness.now)
@pytest.mark.parametrize("contestant", ["ours", "the model alone"])
def test_scoring(benchmark, contest, device, contestant):
    folder, model, oracle = prepared(device)
    corpus, runs = Path(folder.name) / "corpus", Path(folder.name) / "runs"
    benchmark.group = f"scoring, {SCORED} utterances of up to 20 frames"
    works = work.model(Views(model.input_dims, SCORED, 15), len(CLASSES), training=False)  # 15 frames on average
    if contestant == "the model alone":
        batches = ready_batches(plan_shards(corpus), Scorer(model), SCORED)
        contest(contestant, lambda: run_model(model, batches), works, samples=SCORED)
        return
    numbers = itertools.count()

    def step():
        out = runs / str(next(numbers))
        score(corpus, model, out)
        shutil.rmtree(runs / str(int(out.name) - 1), ignore_errors=True)
        return out

    def error(out):
        return harness.relative_error(probabilities_in(out), oracle)

    contest(contestant, step, works, error=error, samples=SCORED)
    shutil.rmtree(runs, ignore_errors=True)
