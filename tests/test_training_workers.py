"""Training by several processes: the losses of one, whatever the targets, and a run that goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from process_group import run_ranks

from m3er_fast import M3ERConfig, functional
from m3er_fast.config import LossConfig, NetworkConfig, TrainingConfig
from m3er_fast.corpus import write_parquet
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.distributed import DifferentRanksError
from m3er_fast.loss import mean_weight
from m3er_fast.training import StreamedCorpus, loop, train

DIMS = {"text": 6, "audio": 5, "face": 4}
NETWORK = NetworkConfig(hidden=8, memory=8, attention=(8, 8, 8), fusion=8, head=8)
BATCH = 16
TARGETS = ("labels", "balanced", "questions", "distributions")


def corpus_of(target):
    """A corpus whose last batch of an epoch has one utterance: with two processes one of them has none of it."""
    corpus = make_synthetic(100, input_dims=DIMS, num_classes=3, steps=3, latent_dim=3, difficulty=0.2, seed=1)
    labels = corpus.target.copy()
    train_rows = np.flatnonzero(corpus.split == "train")
    labels[train_rows[: (len(train_rows) - 1) % BATCH]] = -100  # utterances without a label are left out
    corpus = replace(corpus, target=labels)
    if target in ("questions", "distributions"):
        share = np.eye(3, dtype=np.float32)[np.maximum(labels, 0)]
        share[labels == -100] = np.nan
        corpus = replace(corpus, target=share, task="multi" if target == "questions" else "distribution")
    return corpus


def config_of(target, *, dropout=0.0, epochs=3):
    loss = LossConfig(activation="sigmoid" if target == "questions" else "softmax")
    training = TrainingConfig(
        epochs=epochs, patience=None, batch_size=BATCH, learning_rate=0.02, balance_classes=target == "balanced"
    )
    return M3ERConfig(network=replace(NETWORK, dropout=dropout), loss=loss, training=training)


class Killed(BaseException):
    """An exception that no handler of ``Exception`` catches, as a kill."""


def killed_in_epoch(number, corpus, config, out):
    """Train until all processes end in the middle of an epoch."""
    whole, calls = loop.mean_loss, []

    def ending(*args):
        calls.append(args)
        if len(calls) == number:
            raise Killed
        return whole(*args)

    loop.mean_loss = ending
    try:
        train(corpus, config, out=out)
    except Killed:
        return
    finally:
        loop.mean_loss = whole


def trained(rank, folder, *, targets):
    """The results of every kind of target, of dropout, and of a run that was ended and goes on."""
    found = {}
    for target in targets:
        found[target] = result_of(train(corpus_of(target), config_of(target)))
    found["streamed"] = result_of(train(StreamedCorpus(folder / "corpus", buffer=40), config_of("balanced")))
    corpus, config, calls = corpus_of("labels"), config_of("labels", dropout=0.3), []
    out = folder / "run" if rank == 0 else folder / "nothing"
    uninterrupted = train(corpus, config, out=out, progress=calls.append)
    again = train(corpus, config, out=out)
    killed_in_epoch(2, corpus, config, folder / "killed")
    resumed = train(corpus, config, out=folder / "killed", resumed=calls.append)
    for name, result in {"dropout": uninterrupted, "finished": again, "resumed": resumed}.items():
        found[name] = result_of(result)
    try:
        train(corpus, config.replace(training=replace(config.training, seed=rank)))
    except DifferentRanksError as error:
        found["other settings"] = str(error)
    found["calls"] = len(calls), calls[-1:]
    return found


def result_of(result):
    return {"history": result.history, "state": result.model.state_dict()}


def run_of(ranks, targets, folder):
    write_parquet(corpus_of("balanced"), folder / "corpus", rows_per_shard=25)
    return run_ranks(partial(trained, targets=targets), ranks, folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run_of(2, TARGETS, folder), folder


def assert_curves_of_one_process(found, target, corpus=None):
    wanted = train(corpus or corpus_of(target), config_of(target))
    for name in ("train_loss", "valid_loss"):
        np.testing.assert_allclose(found["history"][name], wanted.history[name], rtol=1e-5)
    for name, value in wanted.model.state_dict().items():
        if name.startswith(("network.", "calibration.")):  # learned in sums of other orders
            torch.testing.assert_close(found["state"][name], value, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(found["state"][name], value), name


def assert_same(first, second):
    assert first["history"] == second["history"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


@pytest.mark.parametrize("target", TARGETS)
def test_two_processes_have_the_losses_and_weights_of_one(two, target):
    ranks, _ = two
    assert_same(ranks[0][target], ranks[1][target])
    assert_curves_of_one_process(ranks[0][target], target)


def test_two_processes_that_stream_have_the_losses_and_weights_of_one(two):
    ranks, folder = two
    assert_same(ranks[0]["streamed"], ranks[1]["streamed"])
    assert_curves_of_one_process(ranks[0]["streamed"], "balanced", StreamedCorpus(folder / "corpus", buffer=40))


@pytest.mark.slow
def test_four_processes_have_the_losses_and_weights_of_one(tmp_path):
    ranks = run_of(4, ("balanced",), tmp_path)
    assert_same(ranks[0]["balanced"], ranks[3]["balanced"])
    assert_curves_of_one_process(ranks[0]["balanced"], "balanced")


def test_a_run_that_was_ended_goes_on_to_the_same_weights(two):
    for found in two[0]:
        assert_same(found["resumed"], found["dropout"])


def test_a_finished_run_is_read_by_the_first_process_and_given_to_the_others(two):
    for found in two[0]:
        assert_same(found["finished"], found["dropout"])


def test_the_first_process_alone_writes_and_tells(two):
    (first, second), folder = two
    assert (folder / "run" / "history.json").exists()
    assert not (folder / "nothing").exists()
    assert first["calls"] == (4, [1])  # three epochs, and once that one epoch was there
    assert second["calls"] == (0, [])


def test_processes_with_other_settings_are_one_error_everywhere(two):
    for found in two[0]:
        assert found["other settings"].startswith(
            "train: training.seed is 0 on rank 0, but 1 on rank 1: wanted the same"
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["labels", "labels as answers", "answers", "shares"])
def test_weighted_means_of_the_parts_add_up_to_that_of_the_batch(target, weighted):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, 3, generator=random)
    class_weight = torch.tensor([0.5, 1.0, 3.0]) if weighted else None
    activation = "sigmoid" if "answers" in target else "softmax"
    values = torch.randint(0, 3, (20,), generator=random)
    values[3:7] = -100
    if target == "answers":
        values = torch.randint(0, 2, (20, 3), generator=random)
        values[0, 0] = -100
    elif target == "shares":
        values = torch.rand(20, 3, generator=random).softmax(dim=1)

    def weighted_mean(rows):
        options = {"class_weight": class_weight, "activation": activation}
        mean = functional.fusion_loss(logits[:, rows], values[rows], **options)
        return float(mean) * mean_weight(values[rows], activation, class_weight)

    parts = [weighted_mean(slice(start, stop)) for start, stop in ((0, 3), (3, 7), (7, 7), (7, 20))]
    assert weighted_mean(slice(0, 20)) == pytest.approx(sum(parts), rel=1e-5)


# --- torchrun ---

PATIENCE = 240  # seconds


def torchrun(folder, name, *, restarts=0):
    """Start the command line in two processes."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += [f"--max-restarts={restarts}", "-m", "m3er_fast.cli"]
    return subprocess.Popen(
        [*launcher, "train", folder / "corpus", "--out", folder / name, "--config", folder / "config.json"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(launcher):
    try:
        out, err = launcher.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # and the launcher its workers
        raise
    assert launcher.returncode == 0, err
    return out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_a_killed_worker_again_and_the_run_goes_on_to_the_same_bytes(victim, tmp_path):
    write_parquet(corpus_of("labels"), tmp_path / "corpus")
    (tmp_path / "config.json").write_text(json.dumps(config_of("labels", dropout=0.3, epochs=60).to_dict()))
    assert finish(torchrun(tmp_path, "whole")).count("best of 60 epochs") == 1

    launcher, deadline = torchrun(tmp_path, "killed", restarts=1), time.monotonic() + PATIENCE
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = " ".join(path.read_text() for path in Path(f"/proc/{launcher.pid}/task").glob("*/children")).split()
    ranks = {rank_of(process): int(process) for process in children}
    os.kill(ranks[str(victim)], signal.SIGKILL)
    finish(launcher)
    for name in ("model.safetensors", "history.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def rank_of(process):
    """The rank that a process was started with, or None."""
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in variables if "=" in pair).get("RANK")
