"""The search for settings: what is drawn, kept, resumed and refused; and trials on Ray, of which some fail."""

import csv
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from m3er_fast import M3ERConfig
from m3er_fast.cli import main
from m3er_fast.config import TrainingConfig
from m3er_fast.corpus import write_parquet
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.training import ResumeMismatchError, SearchSpace, TrainingError, evaluate, train, tune, tuning
from m3er_fast.training.tuning import Trial

CONFIG = M3ERConfig(training=TrainingConfig(epochs=2))
SPACE = {"training.learning_rate": {"from": 1e-4, "to": 1e-1, "log": True}, "network.hidden": [4, 8]}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def corpus():
    return make_synthetic(80, input_dims={"text": 4, "audio": 3}, num_classes=2, steps=2, latent_dim=2)


# --- the space ---


def test_values_are_drawn_from_lists_and_ranges_alone():
    space = SearchSpace(
        {
            "network.hidden": [4, 8, 16],
            "training.batch_size": {"from": 10, "to": 12},
            "network.dropout": {"from": 0.1, "to": 0.6},
            "training.learning_rate": {"from": 1e-4, "to": 1e-2, "log": True},
            "loss.class_weight": [None, [1.0, 2.0]],
        },
        CONFIG,
    )
    drawn = [space.draw(number, 0) for number in range(1, 400)]
    assert {trial["network.hidden"] for trial in drawn} == {4, 8, 16}
    assert {trial["training.batch_size"] for trial in drawn} == {10, 11, 12}
    assert all(type(trial["training.batch_size"]) is int for trial in drawn)
    dropout = np.array([trial["network.dropout"] for trial in drawn])
    assert 0.1 <= dropout.min() < 0.13 < 0.57 < dropout.max() <= 0.6
    rate = np.log10([trial["training.learning_rate"] for trial in drawn])
    assert -4 <= rate.min() < -3.9 < -2.1 < rate.max() <= -2
    assert abs(rate.mean() + 3) < 0.1  # uniform in the logarithm
    for trial in drawn[:20]:
        CONFIG.with_settings(trial)


def test_a_trial_is_decided_by_seed_and_number_and_the_first_changes_nothing():
    space = SearchSpace(None, CONFIG)
    assert space.draw(0, 5) == {}
    assert space.draw(3, 5) == SearchSpace(None, CONFIG).draw(3, 5)
    assert space.draw(3, 5) != space.draw(4, 5)
    assert space.draw(3, 5) != space.draw(3, 6)
    assert list(space.draw(3, 5)) == space.names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the search space must map names of settings to values, got {}"),
        ({"network.hiden": [4]}, "there is no setting 'network.hiden', did you mean"),
        ({"network.hidden": [4, 0]}, "hidden must be"),
        (
            {"network.hidden": []},
            r"network.hidden must be a list of values, or have from, to and perhaps log, got \[\]",
        ),
        ({"network.hidden": 4}, "network.hidden must be a list of values"),
        ({"loss.variant": "m3er"}, "loss.variant must be a list of values"),
        ({"network.dropout": {"from": 0.1}}, "network.dropout must be a list of values"),
        ({"network.dropout": {"from": 0.1, "to": 0.2, "step": 1}}, "network.dropout must be a list of values"),
        ({"network.dropout": {"from": 0.5, "to": 0.2}}, "network.dropout: to must be a finite number ≥ 0.5, got 0.2"),
        ({"network.dropout": {"from": 0.5, "to": 1.5}}, r"dropout must lie in \[0, 1\), got 1.5"),
        ({"network.dropout": {"from": "0", "to": 0.5}}, "network.dropout: from must be a finite number"),
        ({"network.dropout": {"from": 0.0, "to": 0.5, "log": True}}, "from must be above 0 where log is true, got 0.0"),
        ({"network.dropout": {"from": 0.1, "to": 0.5, "log": 1}}, "network.dropout: log must be True or False, got 1"),
    ],
)
def test_a_space_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(values, CONFIG)


# --- what is kept, without Ray ---


@pytest.fixture
def ran(monkeypatch):
    """The numbers of the trials that were run, by a stand-in whose scores are given by number."""
    numbers, scores = [], {0: 0.5, 1: 0.7, 2: None, 3: 0.7}

    def run(_corpus, _config, space, missing, _seconds, _metric, seed, *_):
        for number in missing:
            numbers.append(number)
            score = scores[number]
            if isinstance(score, BaseException):
                raise score
            yield Trial(number, space.draw(number, seed), score, 2, 1.5, "" if score else "ValueError: too hot")

    monkeypatch.setattr(tuning, "_run", run)
    return numbers, scores


def test_the_best_settings_are_a_file_for_train(ran, corpus, tmp_path):
    seen = []
    result = tune(corpus, CONFIG, out=tmp_path, space=SPACE, trials=4, progress=seen.append)
    assert [trial.number for trial in seen] == [0, 1, 2, 3]
    assert result.best.number == 1  # the first of two
    assert result.config == CONFIG.with_settings(result.trials[1].settings)
    best = json.loads((tmp_path / "best.json").read_text())
    assert M3ERConfig.from_dict(best) == result.config
    rows = list(csv.reader((tmp_path / "trials.csv").open(newline="")))
    assert rows[0] == ["trial", "f1", "epochs", "seconds", *SPACE, "error"]
    assert [row[:2] for row in rows[1:]] == [["0", "0.5"], ["1", "0.7"], ["2", ""], ["3", "0.7"]]
    assert rows[3][-1] == "ValueError: too hot"
    lines = result.to_markdown().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1", "| 3", "| 0", "| 2"]
    assert lines[-1].startswith("| 2 | failed |")


def test_an_interrupted_search_keeps_its_trials_and_goes_on_with_more(ran, corpus, tmp_path):
    numbers, scores = ran
    scores[2] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tune(corpus, CONFIG, out=tmp_path, space=SPACE, trials=3)
    assert json.loads((tmp_path / "best.json").read_text())["network"]["hidden"] in (4, 8)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"number": 2, "sett')  # the power failed
    numbers.clear()
    scores[2], told = 0.9, []
    result = tune(corpus, CONFIG, out=tmp_path, space=SPACE, trials=4, resumed=told.append)
    assert (numbers, told, result.best.number) == ([2, 3], [2], 2)
    numbers.clear()
    assert tune(corpus, CONFIG, out=tmp_path, space=SPACE, trials=4).trials == result.trials
    assert tune(corpus, CONFIG, out=tmp_path, space=SPACE, trials=2).best.number == 1
    assert numbers == []
    tune(corpus, CONFIG, out=tmp_path, space=SPACE, trials=2, resume=False)
    assert numbers == [0, 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"space": {"network.hidden": [4]}}, "space = "),
        ({"metric": "accuracy"}, "metric = f1, now accuracy"),
        ({"seed": 1}, "search seed = 0, now 1"),
        ({"config": CONFIG.with_settings({"training.epochs": 3})}, "training.epochs = 2, now 3"),
    ],
)
def test_another_search_is_not_gone_on_with(ran, corpus, tmp_path, change, named):
    asked = {"config": CONFIG, "space": SPACE, "trials": 2}
    tune(corpus, out=tmp_path, **asked)
    with pytest.raises(ResumeMismatchError, match=named):
        tune(corpus, out=tmp_path, **{**asked, **change})
    with pytest.raises(ResumeMismatchError, match="other features of text"):
        tune(
            make_synthetic(80, input_dims={"text": 4, "audio": 3}, num_classes=2, steps=2, seed=9),
            out=tmp_path,
            **asked,
        )
    (tmp_path / "trials.jsonl").write_text("not JSON\n")
    with pytest.raises(ResumeMismatchError, match=r"trials.jsonl is damaged"):
        tune(corpus, out=tmp_path, **asked)


def test_a_search_without_a_score_is_an_error_that_tells_why(ran, corpus, tmp_path):
    ran[1].update({0: None, 1: None})
    with pytest.raises(TrainingError, match="not one of 2 trials has a score: ValueError: too hot"):
        tune(corpus, CONFIG, out=tmp_path, space=SPACE, trials=2)
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": 0}, "trials must be"),
        ({"seconds": 0}, "seconds must be a finite number > 0, got 0"),
        ({"metric": "recall"}, "metric must be"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_arguments_are_refused_by_name(ran, corpus, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        tune(corpus, CONFIG, out=tmp_path, **arguments)


def test_the_command_prints_the_trials_and_how_to_train(ran, corpus, tmp_path, capsys):
    write_parquet(corpus, tmp_path / "corpus")
    (tmp_path / "space.yaml").write_text("network.hidden: [4, 8]\n")
    words = ["tune", tmp_path / "corpus", "--out", tmp_path / "out", "--trials", 2, "--epochs", 2]
    assert main([str(word) for word in [*words, "--space", tmp_path / "space.yaml", "--minutes", 1]]) == 0
    shown = capsys.readouterr().out
    assert "| Trial | Validation f1 |" in shown
    assert f"--config {tmp_path / 'out' / 'best.json'}" in shown
    assert main([str(word) for word in [*words, "--space", tmp_path / "space.yaml", "--seed", 3]]) == 4
    (tmp_path / "space.yaml").write_text("network.hiden: [4, 8]\n")
    assert main([str(word) for word in [*words, "--space", tmp_path / "space.yaml"]]) == 2
    assert "did you mean" in capsys.readouterr().err


# --- on Ray ---


@pytest.fixture
def ray_folder(monkeypatch):
    """Ray's own folder, whose path is short, since some of its files are sockets; it marks this test's processes."""
    pytest.importorskip("ray.tune", reason="needs Ray Tune: pip install 'm3er-fast[ray]'")
    folder = tempfile.mkdtemp(prefix="m3er")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_TMPDIR", folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_folder")
def test_trials_on_ray_have_the_scores_of_train_and_one_that_fails_ends_nothing(corpus, tmp_path):
    # A gradient that is not clipped, at a learning rate of 1e30, gives a loss that is not finite.
    space = {"training.learning_rate": [1e-3, 1e30], "training.gradient_norm": [None]}
    result = tune(corpus, CONFIG, out=tmp_path, space=space, trials=6, workers=2)
    assert len(result.trials) == 6
    rates = {trial.number: trial.settings.get("training.learning_rate") for trial in result.trials}
    assert {1e-3, 1e30} <= set(rates.values())
    for trial in result.trials:
        if rates[trial.number] == 1e30:
            assert trial.score is None
            assert trial.error.startswith("TrainingError: the loss is")
        else:
            model = train(corpus, CONFIG.with_settings(trial.settings)).model
            valid = evaluate(model, corpus.subset("valid")).report
            assert trial.score == valid.overall.f1
            assert trial.epochs == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_trial_whose_process_is_lost_each_time_is_told_and_the_others_go_on(corpus, tmp_path, ray_folder):
    over, killed = threading.Event(), set()

    def kill_the_first_two():
        while not over.wait(0.05) and len(killed) < 2:
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    ours = ray_folder in (process / "environ").read_text()
                    if ours and b"ray::ImplicitFunc" in (process / "cmdline").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.add(process.name)
                except OSError:
                    continue  # it has ended, or is another user's

    killer = threading.Thread(target=kill_the_first_two)
    killer.start()
    try:
        result = tune(corpus, CONFIG, out=tmp_path, space=SPACE, trials=3, workers=1)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2
    (lost,) = [trial for trial in result.trials if trial.score is None]
    assert lost.error == "its process was lost; out of memory?"
    assert len(result.trials) == 3
