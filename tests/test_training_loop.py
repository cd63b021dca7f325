"""Schedules, going on from a finished run, and logs."""

import csv
import json
import math
import sys
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from m3er_fast import M3ERConfig
from m3er_fast.cli import main
from m3er_fast.config import NetworkConfig, TrainingConfig
from m3er_fast.corpus import write_parquet
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.training import CsvLog, EpochRecord, ResumeMismatchError, TensorBoardLog, train
from m3er_fast.training.schedule import learning_rate

DIMS = {"text": 6, "audio": 5, "face": 4}
NETWORK = NetworkConfig(hidden=4, memory=4, attention=(4, 4, 4), fusion=4, head=5, dropout=0.3)
CORPUS = make_synthetic(60, input_dims=DIMS, num_classes=3, steps=3, latent_dim=3, seed=1)


def settings(**changes):
    training = TrainingConfig(**{"epochs": 2, "batch_size": 16, "learning_rate": 0.02, "patience": None, **changes})
    return M3ERConfig(check=None, proxy=None, network=NETWORK, training=training)


def assert_same(first, second):
    assert json.dumps(first.history) == json.dumps(second.history)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


class Killed(BaseException):
    pass


def kill(_record):
    raise Killed


# --- learning rate ---


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_equals_that_of_torch_s_schedulers(schedule):
    """One step per epoch: torch's schedulers count whole steps."""
    warmup, epochs, rate = 4, 20, 0.3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-12, total_iters=warmup)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs - warmup)
    later = falling if schedule == "cosine" else constant
    together = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, later], milestones=[warmup])
    chosen = TrainingConfig(epochs=epochs, learning_rate=rate, warmup_epochs=warmup, schedule=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its deprecated argument
        for position in range(epochs):
            assert learning_rate(chosen, position) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
            optimizer.step()
            together.step()


def test_without_schedule_and_warm_up_the_learning_rate_is_the_setting_itself():
    assert {learning_rate(TrainingConfig(learning_rate=0.3), x) for x in (0.0, 0.5, 99.5)} == {0.3}


def test_every_step_has_the_rate_of_its_middle(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    train(CORPUS, settings(epochs=3, schedule="cosine", warmup_epochs=1))
    steps = len(rates) // 3
    middles = (np.arange(3 * steps) + 0.5) / steps
    falling = [0.02 * (1 + math.cos(math.pi * (x - 1) / 2)) / 2 for x in middles[steps:]]
    assert steps > 1
    assert rates == pytest.approx([*(0.02 * middles[:steps]), *falling])


def test_a_scheduled_training_interrupted_and_resumed_equals_an_uninterrupted_one(tmp_path):
    config = settings(epochs=4, schedule="cosine", warmup_epochs=1.5)
    with pytest.raises(Killed):
        train(CORPUS, config, out=tmp_path, progress=kill)
    assert_same(train(CORPUS, config, out=tmp_path), train(CORPUS, config))


# --- going on ---


@pytest.mark.parametrize("killed", [False, True])
def test_a_finished_run_goes_on_as_if_it_had_been_given_the_epochs_at_once(tmp_path, killed):
    train(CORPUS, settings(epochs=2), out=tmp_path)
    done, seen = [], []
    if killed:
        with pytest.raises(Killed):
            train(CORPUS, settings(epochs=5), out=tmp_path, progress=kill)
    result = train(
        CORPUS, settings(epochs=5), out=tmp_path, resumed=done.append, progress=lambda record: seen.append(record.epoch)
    )
    assert (done, seen) == (([3], [4, 5]) if killed else ([2], [3, 4, 5]))
    assert_same(result, train(CORPUS, settings(epochs=5)))
    assert_same(train(CORPUS, settings(epochs=5), out=tmp_path, progress=kill), result)


def test_a_run_that_lost_its_patience_goes_on_with_more(tmp_path):
    impatient = settings(epochs=9, patience=1, learning_rate=0.5)
    short = train(CORPUS, impatient, out=tmp_path)
    assert len(short.history["train_loss"]) < 9
    # More epochs alone change nothing but the record.
    more = impatient.replace(training=replace(impatient.training, epochs=12))
    assert_same(train(CORPUS, more, out=tmp_path, progress=kill), train(CORPUS, more))
    patient = more.replace(training=replace(more.training, patience=None))
    assert_same(train(CORPUS, patient, out=tmp_path), train(CORPUS, patient))


@pytest.mark.parametrize(
    ("first", "then", "difference"),
    [
        ({"epochs": 3}, {"epochs": 2}, "training.epochs = 3, now 2"),
        ({"patience": None}, {"patience": 1}, "training.patience = None, now 1"),
        ({"schedule": "cosine"}, {"schedule": "cosine", "epochs": 3}, "training.epochs = 2, now 3"),
        ({}, {"epochs": 3, "weight_decay": 0.1}, "training.epochs = 2, now 3; training.weight_decay = 0.0, now 0.1"),
    ],
)
def test_a_run_that_would_have_been_another_is_not_gone_on_with(tmp_path, first, then, difference):
    train(CORPUS, settings(**first), out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResumeMismatchError) as found:
        train(CORPUS, settings(**then), out=tmp_path)
    assert f"differs: {difference}. Give another folder, or begin anew (--no-resume)" in str(found.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_without_its_last_epoch_says_why_it_cannot_go_on(tmp_path):
    train(CORPUS, settings(), out=tmp_path)
    (tmp_path / "last_epoch.pt").unlink()
    with pytest.raises(ResumeMismatchError, match=r"last_epoch\.pt is missing\. Begin anew \(--no-resume\)"):
        train(CORPUS, settings(epochs=3), out=tmp_path)


# --- logs ---


def record(epoch, **changes):
    return EpochRecord(
        **{"epoch": epoch, "epochs": 9, "train_loss": 0.1 * epoch, "valid_loss": 1 / 3, "best": True, "seconds": 2.5}
        | changes
    )


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_every_epoch_once_through_interruptions_and_a_new_beginning(tmp_path):
    path = tmp_path / "new" / "log.csv"
    for epochs in ([1, 2, 3], [3, 4]):
        log = CsvLog(path)
        for epoch in epochs:
            log(record(epoch, best=epoch == 1))
    rows = rows_of(path)
    assert list(rows[0]) == ["epoch", "train_loss", "valid_loss", "best", "seconds"]
    assert [(int(row["epoch"]), int(row["best"])) for row in rows] == [(1, 1), (2, 0), (3, 0), (4, 0)]
    assert [float(row["train_loss"]) for row in rows] == [0.1 * epoch for epoch in (1, 2, 3, 4)]
    CsvLog(path)(record(1))
    assert [row["epoch"] for row in rows_of(path)] == ["1"]


def test_tensorboard_gets_the_losses_of_every_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path)
    for epoch in (1, 2):
        log(record(epoch))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train")] == [
        (1, pytest.approx(0.1)),
        (2, pytest.approx(0.2)),
    ]
    assert [event.value for event in events.Scalars("loss/valid")] == pytest.approx([1 / 3] * 2)


def test_without_tensorboard_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'm3er-fast\[log\]'"):
        TensorBoardLog(tmp_path)


# --- warnings ---


def test_a_modality_that_training_lacks_is_a_warning():
    available = CORPUS.available.copy()
    available[CORPUS.split == "train", 1] = False
    with pytest.warns(UserWarning, match="'audio'.*not one valid frame, so nothing is learned") as found:
        train(replace(CORPUS, available=available), settings())
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(CORPUS, settings())


# --- command line ---


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(CORPUS, folder)
    return folder


def run(capsys, *words):
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_settings_come_from_yaml_then_from_set_then_from_options(corpus_dir, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("network: {hidden: 4, memory: 4}\ntraining:\n  epochs: 1\n  patience: 7\n  seed: 3\n")
    words = ["--set", "training.patience=null", "--set", "loss.variant=original", "--set", "training.epochs=5"]
    out = tmp_path / "run"
    assert run(capsys, "train", corpus_dir, "--out", out, "--config", file, *words, "--epochs", "2")[0] == 0
    config = M3ERConfig.from_dict(json.loads((out / "config.json").read_text())["config"])
    assert (config.network.hidden, config.network.memory, config.loss.variant) == (4, 4, "original")
    assert (config.training.epochs, config.training.patience, config.training.seed) == (2, None, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("loss.betta=2", ["there is no setting 'loss.betta', did you mean loss.beta?", "--set"]),
        ("loss.beta=-1", ["beta must be", "--set"]),
        ("loss.beta", ["'loss.beta' is not NAME=VALUE"]),
    ],
)
def test_a_wrong_setting_is_one_line(change, words, corpus_dir, tmp_path, capsys):
    code, _, error = run(capsys, "train", corpus_dir, "--out", tmp_path / "run", "--set", change)
    assert code == 2
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_yaml_that_cannot_be_read_is_one_line(corpus_dir, tmp_path, capsys):
    file = tmp_path / "settings.yml"
    file.write_text("a: [1\nb: }")
    code, _, error = run(capsys, "train", corpus_dir, "--out", tmp_path / "run", "--config", file)
    assert (code, error.count("\n")) == (2, 1)
    assert f"{file} is not YAML" in error


def test_train_goes_on_and_says_when_the_best_epoch_is_the_last(corpus_dir, tmp_path, capsys):
    words = ["train", corpus_dir, "--out", tmp_path, "--set", "network.hidden=4", "--log", "csv"]
    code, out, _ = run(capsys, *words, "--epochs", "2", "--learning-rate", "0.003")
    assert code == 0
    assert "The best epoch is the last one: --epochs 4 goes on from here\n" in out
    code, _, error = run(capsys, *words, "--epochs", "4", "--learning-rate", "0.003")
    assert (code, error) == (0, f"train: {tmp_path} goes on after epoch 2\n")
    assert [row["epoch"] for row in rows_of(tmp_path / "log.csv")] == ["1", "2", "3", "4"]
    assert len(json.loads((tmp_path / "history.json").read_text())["train_loss"]) == 4
    code, _, error = run(capsys, *words, "--epochs", "1", "--learning-rate", "0.003")
    assert code == 4
    assert "training.epochs = 4, now 1" in error
    cosine = ["train", corpus_dir, "--out", tmp_path / "cosine", "--set", "training.schedule=cosine"]
    assert "--epochs 2 in another folder may do better\n" in run(capsys, *cosine, "--epochs", "1")[1]


def test_fit_stats_and_ablate_take_changes_of_settings(corpus_dir, tmp_path, capsys, monkeypatch):
    seen = []
    fake = types.SimpleNamespace(
        run_ablation=lambda _data, config, **_: seen.append(config) or types.SimpleNamespace(to_markdown=str)
    )
    monkeypatch.setitem(sys.modules, "m3er_fast.ablation", fake)
    assert run(capsys, "ablate", corpus_dir, "--out", tmp_path, "--set", "loss.beta=2")[0] == 0
    assert seen[0].loss.beta == 2
    stats = tmp_path / "statistics"
    assert run(capsys, "fit-stats", corpus_dir, "--out", stats, "--set", "check.alpha=0.2")[0] == 0
    from m3er_fast.scoring import ModelStatistics

    assert ModelStatistics.load(stats).check.alpha == 0.2
