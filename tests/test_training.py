"""Training, resuming and evaluation, on corpora of a hundred utterances."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus_fixtures import make_corpus
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from m3er_fast import M3ERConfig, M3ERFusion, plots
from m3er_fast.config import LossConfig, NetworkConfig, TrainingConfig
from m3er_fast.corpus.splits import ensure_validation
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.training import ResumeMismatchError, TrainingError, class_weights, default_config, evaluate, train

DIMS = {"text": 6, "audio": 5, "face": 4}
NETWORK = NetworkConfig(hidden=8, memory=8, attention=(8, 8, 8), fusion=8, head=8)
PICTURES = {"history.png", "reliability.png"}
RUN_FILES = {"README.md", "config.json", "model.safetensors", "history.json", "last_epoch.pt"} | PICTURES


def synthetic(**changes):
    options = {"input_dims": DIMS, "num_classes": 3, "steps": 3, "latent_dim": 3, "difficulty": 0.2, "seed": 1}
    return make_synthetic(100, **{**options, **changes})


def settings(*, full=False, network=NETWORK, loss=None, **changes):
    """Settings of a small network, ``full`` with check and proxies, that learns in a few epochs."""
    training_settings = TrainingConfig(**{"epochs": 3, "batch_size": 16, "learning_rate": 0.02, **changes})
    config = M3ERConfig(network=network, loss=loss or LossConfig(), training=training_settings)
    return config if full else config.replace(check=None, proxy=None)


def assert_same_weights(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def assert_same_result(first, second):
    assert_same_weights(first.model, second.model)
    assert first.best_epoch == second.best_epoch
    assert json.dumps(first.history) == json.dumps(second.history)


class Killed(BaseException):
    """An exception that no handler of ``Exception`` catches, as a kill."""


def killed_after(epoch):
    def progress(record):
        if record.epoch == epoch:
            raise Killed

    return progress


def interrupted(corpus, config, out, epoch=1):
    with pytest.raises(Killed):
        train(corpus, config, out=out, progress=killed_after(epoch))


CORPUS = synthetic()
# With dropout: a resumed training must draw the same numbers as an uninterrupted one.
RESUMED = settings(full=True, epochs=4, network=replace(NETWORK, dropout=0.3))


@pytest.fixture(scope="module")
def trained():
    return train(CORPUS, settings(full=True, epochs=4))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("training") / "run"
    return train(CORPUS, RESUMED, out=out), out


# --- learning ---


def test_the_loss_falls_and_the_test_split_is_classified_far_better_than_by_the_majority():
    result = train(CORPUS, settings(epochs=6))
    assert result.history["train_loss"][-1] < 0.3 * result.history["train_loss"][0]
    test = CORPUS.subset("test")
    majority = np.bincount(test.target).max() / len(test)
    assert evaluate(result.model, test).report.accuracy >= majority + 0.25


@pytest.mark.parametrize("full", [False, True])
def test_the_weights_of_the_best_epoch_are_kept_by_an_independent_count_of_their_loss(full):
    text = np.where((CORPUS.split == "valid")[:, None, None], 10, 1).astype(np.float32) * CORPUS.features["text"]
    # Wrong labels there make the loss rise again as the model grows sure.
    target = np.where(CORPUS.split == "valid", (CORPUS.target + 1) % 3, CORPUS.target)
    corpus = replace(CORPUS, features={**CORPUS.features, "text": text}, target=target)
    config = settings(full=full, epochs=5, patience=None, calibrate=False, loss=LossConfig("m3er"))
    result = train(corpus, config)
    losses = result.history["valid_loss"]
    assert len(losses) == 5
    assert result.best_epoch == int(np.argmin(losses)) + 1 < 5  # else the last weights would do as well
    assert not result.model.training

    validation = corpus.subset("valid")
    assert evaluate(result.model, validation).effective.all() != full  # the check would object, but is off
    prediction = evaluate(result.model.ablated(check=False, proxy=False), validation)
    rows = np.arange(len(validation))
    fused = prediction.probabilities.astype(np.float64)[rows, validation.target]
    own = prediction.modality_probabilities.astype(np.float64)[:, rows, validation.target]
    gamma = 1 / (3 - 1)
    expected = (-(own**gamma) * np.log(own)).sum(axis=0).mean() - np.log(fused).mean()
    assert min(losses) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("patience", [1, 2])
def test_training_stops_after_patience_epochs_without_a_better_validation_loss(monkeypatch, patience):
    losses = [3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 0.5]
    expected = {1: [3.0, 2.0, 2.5], 2: [3.0, 2.0, 2.5, 1.0, 1.0, 1.5]}[patience]  # an equal loss is no better one
    given, loss = iter(losses), M3ERFusion.loss

    def scripted(model, *arguments):  # one batch holds the whole validation split
        return loss(model, *arguments) if model.training else torch.tensor(next(given))

    monkeypatch.setattr(M3ERFusion, "loss", scripted)
    records = []
    result = train(CORPUS, settings(epochs=len(losses), patience=patience), progress=records.append)
    assert result.history["valid_loss"] == expected
    assert result.best_epoch == expected.index(min(expected)) + 1
    assert [record.best for record in records] == [True, True, False, True, False, False][: len(expected)]
    assert [record.epoch for record in records] == list(range(1, len(expected) + 1))
    assert {record.epochs for record in records} == {len(losses)}


def test_every_epoch_sees_every_labelled_utterance_in_an_order_of_its_own(monkeypatch):
    orders, forward = [[]], M3ERFusion.forward

    def record(model, features, *arguments, **options):
        if model.training:
            orders[-1] += features["text"][:, 0, 0].tolist()
        return forward(model, features, *arguments, **options)

    target = np.where(np.arange(len(CORPUS)) % 5 == 0, -100, CORPUS.target)
    monkeypatch.setattr(M3ERFusion, "forward", record)
    train(replace(CORPUS, target=target), settings(epochs=3, patience=None), progress=lambda _: orders.append([]))
    assert orders.pop() == []
    numbers = CORPUS.features["text"][(CORPUS.split == "train") & (target != -100), 0, 0].tolist()
    assert len(set(numbers)) == len(numbers)  # one utterance each
    assert [sorted(order) for order in orders] == [sorted(numbers)] * 3
    assert len(set(map(tuple, orders))) == 3


def test_the_seed_decides_the_result():
    first, again, other = (train(CORPUS, settings(epochs=2, seed=seed)) for seed in (0, 0, 1))
    assert_same_result(first, again)
    assert other.history["train_loss"] != first.history["train_loss"]


def test_the_callers_random_state_is_neither_used_nor_changed():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        results.append(train(CORPUS, settings(full=True, epochs=1)))
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert_same_result(*results)


# --- resuming ---


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(uninterrupted, tmp_path, epoch):
    interrupted(CORPUS, RESUMED, tmp_path, epoch)
    seen = []
    result = train(CORPUS, RESUMED, out=tmp_path, progress=seen.append)
    assert [record.epoch for record in seen] == list(range(epoch + 1, 5))
    assert_same_result(result, uninterrupted[0])
    for name in ("history.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (uninterrupted[1] / name).read_bytes()


def test_killed_by_the_system_while_a_checkpoint_is_written_and_resumed_equals_uninterrupted(uninterrupted, tmp_path):
    script = f"""
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads({torch.get_num_threads()})
from test_training import CORPUS, RESUMED, train
rename, written = Path.replace, []
def replace(self, target):
    written.append(target)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.replace = replace
train(CORPUS, RESUMED, out=Path(sys.argv[1]))
"""
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", ".checkpoint.pt.partial"}
    seen = []
    result = train(CORPUS, RESUMED, out=tmp_path, progress=seen.append)
    assert [record.epoch for record in seen] == [3, 4]
    assert_same_result(result, uninterrupted[0])
    assert {path.name for path in tmp_path.iterdir()} == RUN_FILES


def test_killed_while_the_result_is_written_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch):
    def fail(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(plots, "plot_history", fail)
        with pytest.raises(Killed):
            train(CORPUS, RESUMED, out=tmp_path)
    assert_same_result(train(CORPUS, RESUMED, out=tmp_path), uninterrupted[0])
    assert {path.name for path in tmp_path.iterdir()} == RUN_FILES


def test_resuming_a_finished_run_returns_it_without_fitting_or_training(uninterrupted, monkeypatch):
    first, out = uninterrupted

    def fail(*_, **__):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(M3ERFusion, "fit", fail)
    monkeypatch.setattr(M3ERFusion, "forward", fail)
    again = train(CORPUS, RESUMED, out=out, progress=fail)
    assert_same_result(again, first)
    assert not again.model.training


def changed_features(corpus):
    text = corpus.features["text"].copy()
    text[0, 0, 0] += 1
    return replace(corpus, features={**corpus.features, "text": text})


OTHERS = {  # what differs, as the error names it
    "other features of text": lambda corpus, config: (changed_features(corpus), config),
    "other availability": lambda corpus, config: (replace(corpus, available=np.zeros_like(corpus.available)), config),
    "other labels": lambda corpus, config: (replace(corpus, target=np.roll(corpus.target, 1)), config),
    "other splits": lambda corpus, config: (replace(corpus, split=np.roll(corpus.split, 1)), config),
    "classes = ['angry', 'happy', 'neutral'], now ['neutral', 'happy', 'angry']": lambda corpus, config: (
        replace(corpus, classes=corpus.classes[::-1]),
        config,
    ),
    "training.learning_rate = 0.02, now 0.01": lambda corpus, config: (corpus, settings(epochs=2, learning_rate=0.01)),
    "training.seed = 0, now 1": lambda corpus, config: (corpus, settings(epochs=2, seed=1)),
}


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_begun_with_something_else_is_not_resumed(tmp_path, finished):
    config = settings(epochs=2)
    if finished:
        train(CORPUS, config, out=tmp_path)
    else:
        interrupted(CORPUS, config, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for difference, other in OTHERS.items():
        with pytest.raises(ResumeMismatchError) as found:
            train(*other(CORPUS, config), out=tmp_path)
        assert str(found.value) == (
            f"{tmp_path} holds a training that differs: {difference}. Give another folder, or begin anew (--no-resume)"
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_many_differences_are_cut_and_none_is_hidden(tmp_path):
    interrupted(CORPUS, settings(epochs=2), tmp_path)
    with pytest.raises(ResumeMismatchError, match=r", and 1 more\. Give another folder") as found:
        train(changed_features(CORPUS), settings(full=True, epochs=3, seed=2, loss=LossConfig(beta=2.0)), out=tmp_path)
    assert "check = None, now given; proxy = None, now given; loss.beta = 1.0, now 2.0;" in str(found.value)


def test_a_resumed_training_says_how_many_epochs_were_done(tmp_path):
    done = []
    interrupted(CORPUS, settings(epochs=3), tmp_path, epoch=2)
    train(CORPUS, settings(epochs=3), out=tmp_path, resumed=done.append)
    train(CORPUS, settings(epochs=3), out=tmp_path, resumed=done.append)
    train(CORPUS, settings(epochs=3), out=tmp_path, resume=False, resumed=done.append)
    assert done == [2, 3]


@pytest.mark.parametrize("content", [b"", b"half", b"PK\x03\x04half", b"{}", b"[]", b"{half"])
@pytest.mark.parametrize("name", ["history.json", "checkpoint.pt"])
def test_a_damaged_run_is_one_error_that_names_the_file_and_can_be_begun_anew(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ResumeMismatchError, match=rf"{re.escape(str(tmp_path / name))} is damaged, or no training"):
        train(CORPUS, settings(epochs=1), out=tmp_path)
    assert (tmp_path / name).read_bytes() == content
    train(CORPUS, settings(epochs=1), out=str(tmp_path), resume=False)
    assert {path.name for path in tmp_path.iterdir()} == RUN_FILES


@pytest.mark.parametrize("finished", [True, False])
def test_without_resume_training_begins_anew(tmp_path, finished):
    if finished:
        train(CORPUS, settings(epochs=2, seed=1), out=tmp_path)
    else:
        interrupted(CORPUS, settings(epochs=2, seed=1), tmp_path)
    seen = []
    result = train(CORPUS, settings(epochs=2), out=tmp_path, resume=False, progress=seen.append)
    assert [record.epoch for record in seen] == [1, 2]
    assert_same_result(result, train(CORPUS, settings(epochs=2)))
    assert_same_result(result, train(CORPUS, settings(epochs=2), out=tmp_path))


# --- the run folder ---


def test_the_run_folder_holds_the_model_and_its_history_and_nothing_else(uninterrupted):
    result, out = uninterrupted
    assert {path.name for path in out.iterdir()} == RUN_FILES
    history = json.loads((out / "history.json").read_text())
    assert history == json.loads(json.dumps(result.history))
    assert len(history["train_loss"]) == len(history["valid_loss"]) == 4
    assert history["best_epoch"] == result.best_epoch == int(np.argmin(history["valid_loss"])) + 1
    assert M3ERConfig.from_dict(history["config"]) == RESUMED == result.model.config
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_saved_model_predicts_the_same_as_the_returned_one(uninterrupted):
    result, out = uninterrupted
    loaded = M3ERFusion.from_pretrained(out)
    assert_same_weights(loaded, result.model)
    assert loaded.classes == CORPUS.classes
    ours, theirs = (evaluate(model, CORPUS) for model in (loaded, result.model))
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
    np.testing.assert_array_equal(ours.p_value, theirs.p_value)


def test_without_matplotlib_the_pictures_alone_are_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "m3er_fast.plots", None)
    train(CORPUS, settings(epochs=1), out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == RUN_FILES - PICTURES


@pytest.mark.parametrize("call", [(Path, "replace"), (os, "fsync")])
def test_a_failed_write_leaves_no_temporary_file(call, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*call, fail)
    with pytest.raises(OSError, match="No space left"):
        train(CORPUS, settings(epochs=1), out=tmp_path)
    assert not list(tmp_path.iterdir())


# --- labels and classes ---


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("task", ["single", "multi", "distribution"])
def test_every_task_trains_under_the_activations_that_fit_it(task, activation):
    if task == "multi" and activation == "softmax":
        with pytest.raises(ValueError, match=r"3 yes/no questions: loss\.activation must be 'sigmoid', got 'softmax'"):
            train(synthetic(task=task), settings())
        return
    corpus = synthetic(task=task)
    result = train(corpus, settings(loss=LossConfig(activation=activation)))
    losses = result.history["train_loss"]
    assert losses[-1] < losses[0]
    prediction = evaluate(result.model, corpus)
    total = prediction.probabilities.sum(axis=1)
    assert np.allclose(total, 1, atol=1e-5) == (activation == "softmax")
    assert prediction.report.task == task


@pytest.mark.parametrize(("task", "activation"), [("single", "softmax"), ("multi", "sigmoid")])
def test_the_default_settings_have_the_activation_of_the_task(task, activation):
    assert default_config(synthetic(task=task)).loss.activation == activation


def test_class_weights_follow_from_hand_computed_counts():
    labels = np.array([0] * 6 + [2] * 2 + [-100] * 4)
    assert class_weights(make_corpus(12, target=labels, classes=("a", "b", "c"))) == (8 / 12, 1.0, 8 / 4)
    answers = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 0]], np.float32)
    several = make_corpus(3, target=answers, classes=("a", "b", "c"), task="multi")
    assert class_weights(several) == pytest.approx((4 / 6, 1.0, 4 / 2))
    shares = np.array([[0.5, 0.5], [0.25, 0.75]], np.float32)
    assert class_weights(make_corpus(2, target=shares, task="distribution")) == pytest.approx((2 / 1.5, 2 / 2.5))
    assert class_weights(make_corpus(2, target=np.zeros((2, 2), np.float32), task="multi")) == (1.0, 1.0)


def test_balanced_training_uses_the_class_weights_of_the_train_split():
    balanced = train(CORPUS, settings(epochs=1, balance_classes=True))
    count = np.bincount(CORPUS.target[CORPUS.split == "train"])
    expected = count.sum() / (3 * count)
    assert balanced.model.config.loss.class_weight == pytest.approx(expected)
    given = train(CORPUS, settings(epochs=1, loss=LossConfig(class_weight=tuple(expected))))
    assert balanced.history["train_loss"] == given.history["train_loss"]
    kept = LossConfig(class_weight=(1.0, 2.0, 3.0))
    assert train(CORPUS, settings(epochs=1, balance_classes=True, loss=kept)).model.config.loss == kept


@pytest.mark.parametrize("absent_everywhere", [True, False])
def test_a_class_without_training_samples_has_weight_one_and_trains_finite(absent_everywhere):
    target = CORPUS.target.copy()
    target[(target == 2) & (absent_everywhere | (CORPUS.split == "train"))] = 1
    corpus = replace(CORPUS, target=target)
    result = train(corpus, settings(balance_classes=True))
    assert result.model.config.loss.class_weight[2] == 1.0
    assert np.isfinite(result.history["train_loss"] + result.history["valid_loss"]).all()
    assert np.isfinite(evaluate(result.model, corpus).probabilities).all()


def test_an_utterance_without_a_label_adds_nothing_to_the_loss():
    # Without frames it adds nothing to the standardiser either, so both corpora must give the same training.
    silent = np.arange(len(CORPUS)) % 5 == 0
    lengths, target = CORPUS.lengths.copy(), CORPUS.target.copy()
    lengths[silent], target[silent] = 0, -100
    with_silent = replace(CORPUS, lengths=lengths, target=target)
    without = train(with_silent.select(~silent), settings())
    result = train(with_silent, settings())
    for name in ("train_loss", "valid_loss"):
        assert result.history[name] == pytest.approx(without.history[name], rel=1e-5)


@pytest.mark.parametrize(
    ("unlabelled", "message"),
    [
        (["train"], "the train split has no labelled utterance"),
        (["valid"], "the valid split has no labelled utterance"),
        (["train", "valid", "test"], "the train split has no labelled utterance"),
    ],
)
def test_a_split_without_any_label_is_an_error(unlabelled, message):
    target = np.where(np.isin(CORPUS.split.astype(str), unlabelled), -100, CORPUS.target)
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(replace(CORPUS, target=target), settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, "the corpus has no labels"),
        ({"split": None}, "the corpus has no splits: make them with split_by_group"),
        ({"split": np.full(len(CORPUS), "test", dtype=object)}, "the train split has no labelled utterance"),
    ],
)
def test_a_corpus_that_cannot_be_trained_on_is_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(replace(CORPUS, **changes), settings(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_validation_split_is_taken_from_train_by_group():
    corpus = replace(CORPUS, split=np.where(CORPUS.split == "valid", "train", CORPUS.split))
    carved = ensure_validation(corpus, seed=0)
    assert not set(carved.subset("valid").group) & set(carved.subset("train").group)
    assert_same_result(train(corpus, settings(epochs=2)), train(carved, settings(epochs=2)))


# --- hard input ---


def with_non_finite(corpus):
    features = {name: values.copy() for name, values in corpus.features.items()}
    features["text"][::4] = np.nan
    features["audio"][1::3, :, 0] = -np.inf
    features["face"][:, :, 1] = np.inf
    return replace(corpus, features=features)


def without_audio_in_training(corpus):
    available = corpus.available.copy()
    available[corpus.split == "train", 1] = False
    return replace(corpus, available=available)


def with_empty_utterances(corpus):
    lengths = corpus.lengths.copy()
    lengths[::6] = 0
    return replace(corpus, lengths=lengths)


def with_huge_values(corpus):
    return replace(corpus, features={name: values * np.float32(1e30) for name, values in corpus.features.items()})


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "change", [with_non_finite, without_audio_in_training, with_empty_utterances, with_huge_values]
)
def test_hard_input_trains_and_predicts_finite(change, full):
    corpus = change(CORPUS)
    result = train(corpus, settings(full=full, epochs=2))
    assert np.isfinite(result.history["train_loss"] + result.history["valid_loss"]).all()
    prediction = evaluate(result.model, corpus)
    assert np.isfinite(prediction.probabilities).all()
    assert np.isfinite(prediction.modality_probabilities).all()


@pytest.mark.parametrize("size", [1, len(CORPUS.subset("train")) - 1, len(CORPUS.subset("train")), 10_000])
def test_every_batch_size_trains_finite(size):
    result = train(CORPUS, settings(epochs=1, batch_size=size))
    assert np.isfinite(result.history["train_loss"] + result.history["valid_loss"]).all()


def test_the_training_loss_is_the_mean_over_utterances_whatever_the_batches():
    """With a learning rate of next to nothing every batch sees the initial weights."""
    rows = len(CORPUS.subset("train"))
    losses = [
        train(CORPUS, settings(epochs=1, batch_size=size, learning_rate=1e-12)).history["train_loss"][0]
        for size in (rows, rows - 1, 7)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("gradient_norm", [None, 1.0])
def test_a_loss_that_is_not_finite_ends_training_with_advice(tmp_path, gradient_norm):
    config = settings(epochs=2, learning_rate=1e30, gradient_norm=gradient_norm)
    with pytest.raises(TrainingError, match=r"^the loss is nan .* after epoch 1: lower learning_rate \(1e\+30\)"):
        train(CORPUS, config, out=tmp_path)
    assert not list(tmp_path.iterdir())


# --- evaluation ---


def test_evaluation_returns_the_answers_of_the_model(trained):
    corpus = with_non_finite(CORPUS.subset("test"))
    prediction = evaluate(trained.model, corpus, batch_size=8)
    features = {name: torch.from_numpy(values) for name, values in corpus.features.items()}
    with torch.no_grad():
        output = trained.model.eval()(features, corpus.lengths, corpus.available)
    np.testing.assert_allclose(
        prediction.probabilities, trained.model.predict_proba(features, corpus.lengths, corpus.available), atol=1e-6
    )
    np.testing.assert_allclose(prediction.modality_probabilities, output.modality_logits.softmax(dim=2), atol=1e-6)
    for name in ("effective", "abstained", "available"):
        np.testing.assert_array_equal(getattr(prediction, name), getattr(output, name))
    np.testing.assert_allclose(prediction.p_value, output.p_value, atol=1e-6)
    np.testing.assert_array_equal(prediction.reason, output.reason)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_batch_size_does_not_change_an_answer(trained, size):
    whole, cut = evaluate(trained.model, CORPUS), evaluate(trained.model, CORPUS, batch_size=size)
    np.testing.assert_allclose(cut.probabilities, whole.probabilities, atol=1e-6)
    np.testing.assert_allclose(cut.modality_probabilities, whole.modality_probabilities, atol=1e-6)
    np.testing.assert_array_equal(cut.effective, whole.effective)
    # The probabilities differ by rounding, and so do the sums over them.
    rounded = dict.fromkeys(("calibration", "before_calibration"))
    assert replace(cut.report, **rounded) == replace(whole.report, **rounded)
    for name in rounded:
        assert getattr(cut.report, name).answers == getattr(whole.report, name).answers
        assert getattr(cut.report, name).ece == pytest.approx(getattr(whole.report, name).ece, abs=1e-6)


def test_the_report_agrees_with_scikit_learn_on_the_labelled_utterances(trained):
    target = CORPUS.target.copy()
    target[::3] = -100
    prediction = evaluate(trained.model, replace(CORPUS, target=target))
    labelled, answer = target != -100, prediction.probabilities.argmax(axis=1)
    assert prediction.report.accuracy == pytest.approx(accuracy_score(target[labelled], answer[labelled]))
    assert prediction.report.balanced_accuracy == pytest.approx(
        balanced_accuracy_score(target[labelled], answer[labelled])
    )


@pytest.mark.parametrize("target", [None, np.full(len(CORPUS), -100)])
def test_without_labels_there_is_no_report(trained, target):
    prediction = evaluate(trained.model, replace(CORPUS, target=target))
    assert prediction.report is None
    np.testing.assert_array_equal(prediction.probabilities, evaluate(trained.model, CORPUS).probabilities)


def test_verdicts_from_elsewhere_replace_the_checks(trained):
    verdict = np.ones((len(CORPUS), 3), dtype=bool)
    verdict[::2, 1] = False
    prediction = evaluate(trained.model, CORPUS, batch_size=16, effective=verdict)
    np.testing.assert_array_equal(prediction.effective, verdict)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_leaves_the_mode_of_the_model_alone(trained, mode):
    model = trained.model.train(mode)
    try:
        evaluate(model, CORPUS)
        assert {module.training for module in model.modules()} == {mode}
    finally:
        model.eval()


def test_evaluation_restores_the_mode_of_every_module(trained):
    model = copy.deepcopy(trained.model).train()
    model.network.lstms.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, CORPUS)
    assert [module.training for module in model.modules()] == modes


def test_evaluation_that_fails_leaves_the_mode_of_the_model_alone():
    unfitted = M3ERFusion(DIMS, 3, settings(full=True), classes=CORPUS.classes).train()
    with pytest.raises(NotFittedError):
        evaluate(unfitted, CORPUS)
    assert unfitted.training


def without_audio(corpus):
    features = {name: values for name, values in corpus.features.items() if name != "audio"}
    return replace(corpus, features=features, available=corpus.available[:, [0, 2]])


def reordered(corpus):
    features = {name: corpus.features[name] for name in ("face", "audio", "text")}
    return replace(corpus, features=features, available=corpus.available[:, ::-1])


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        (CORPUS.select(np.zeros(len(CORPUS), dtype=bool)), {}, "the corpus is empty"),
        (without_audio(CORPUS), {}, r"the corpus has the modalities \{'text': 6, 'face': 4\}, but the model \{'text'"),
        (reordered(CORPUS), {}, r"the corpus has the modalities \{'face'.*wanted the same, in the same order"),
        (synthetic(input_dims={**DIMS, "text": 7}), {}, r"modalities \{'text': 7"),
        (replace(CORPUS, classes=("x", "y", "z")), {}, r"the corpus has the classes \('x', 'y', 'z'\), but the model"),
        (CORPUS, {"batch_size": 0}, "batch_size must be a positive int, got 0"),
        (CORPUS, {"effective": np.ones((101, 3), dtype=bool)}, r"shape \(100, 3\), got \(101, 3\)"),
    ],
)
def test_a_corpus_that_does_not_fit_the_model_is_an_error(trained, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(trained.model, corpus, **options)
