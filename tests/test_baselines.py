"""The baselines beside scikit-learn, nn.LSTMCell and torch's own losses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn import functional as F

from m3er_fast import M3ERConfig, M3ERFusion, ablation, baselines
from m3er_fast.baselines import Branches, fit_baselines, fit_logistic, train_branches, utterances_of
from m3er_fast.config import LossConfig, NetworkConfig, TrainingConfig
from m3er_fast.corpus.synthetic import make_synthetic

DIMS = {"text": 6, "audio": 5, "face": 4}
NETWORK = NetworkConfig(hidden=4, memory=4, attention=(4, 4, 4), fusion=4, head=5)
CONFIG = M3ERConfig(network=NETWORK, training=TrainingConfig(epochs=3, batch_size=16, learning_rate=0.02, seed=5))
LABELS = [
    "Logistic regression",
    *(f"Logistic regression, {name} alone" for name in DIMS),
    "Late fusion: an LSTM per modality",
    "Early concatenation: one LSTM",
]


def make(task="single", count=120):
    corpus = make_synthetic(
        count, input_dims=DIMS, num_classes=3, steps=4, latent_dim=3, difficulty=0.3, seed=1, task=task
    )
    available = np.random.default_rng(0).random((count, 3)) < 0.9
    available[:2] = False  # an utterance without anything
    return replace(corpus, available=available)


def fitted(corpus, config=CONFIG):
    model = M3ERFusion(DIMS, 3, config.replace(check=None, proxy=None), classes=corpus.classes)
    training = corpus.subset("train")
    return model.fit(training.features, lengths=training.lengths, available=training.available)


CORPUS = make()
MODEL = fitted(CORPUS)
PARTS = {split: utterances_of(MODEL, CORPUS.subset(split)) for split in ("train", "valid", "test")}


def branches(groups, config=CONFIG):
    torch.manual_seed(0)
    return Branches(DIMS.values(), groups, 3, config)


# --- logistic regression ---


def means(corpus):
    """Mean valid frames in units of the train split, by NumPy in float64; zeros for a modality that is missing."""
    training = CORPUS.subset("train")
    columns = []
    for m, (name, values) in enumerate(corpus.features.items()):
        frames = np.concatenate(
            [
                x[:n]
                for x, n, a in zip(training.features[name], training.lengths, training.available[:, m], strict=True)
                if a
            ]
        ).astype(np.float64)
        rows = [
            (x[:n].astype(np.float64).mean(axis=0) - frames.mean(axis=0)) / frames.std(axis=0) if a and n else 0 * x[0]
            for x, n, a in zip(values, corpus.lengths, corpus.available[:, m], strict=True)
        ]
        columns.append(np.array(rows))
    return columns


@pytest.mark.parametrize("columns", [range(3), range(1, 2)], ids=["all", "audio"])
def test_logistic_regression_is_scikit_learn_s_with_the_c_of_the_least_validation_loss(columns):
    x = {split: np.hstack([means(CORPUS.subset(split))[m] for m in columns]) for split in PARTS}
    center, scale = x["train"].mean(axis=0), x["train"].std(axis=0)
    y = {split: CORPUS.subset(split).target for split in PARTS}
    fits = [
        LogisticRegression(C=c, max_iter=1000).fit((x["train"] - center) / scale, y["train"])
        for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    ]
    losses = [log_loss(y["valid"], fit.predict_proba((x["valid"] - center) / scale), labels=range(3)) for fit in fits]
    expected = fits[int(np.argmin(losses))].predict_proba((x["test"] - center) / scale)
    assert np.argmin(losses) > 0
    found = fit_logistic(CONFIG, CORPUS, columns, PARTS["train"], PARTS["valid"])(PARTS["test"])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_every_question_has_a_regression_of_its_own():
    corpus = make("multi")
    model = fitted(corpus, CONFIG.replace(loss=LossConfig(activation="sigmoid")))
    training = utterances_of(model, corpus.subset("train"))
    answer = fit_logistic(CONFIG, corpus, range(3), training, training)(training)
    x = baselines.mean_frames(training, range(3))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    for c in range(3):  # fitted and chosen on the same utterances: the least regularisation has the least loss
        regression = LogisticRegression(C=1.0, max_iter=1000).fit(x, training.target[:, c].numpy())
        np.testing.assert_allclose(answer[:, c], regression.predict_proba(x)[:, 1], atol=1e-4)


def test_a_distribution_weighs_its_classes_and_so_do_the_settings():
    corpus = replace(CORPUS, task="distribution", target=np.eye(3, dtype=np.float32)[CORPUS.target])
    parts = {split: utterances_of(MODEL, corpus.subset(split)) for split in PARTS}
    weighted = CONFIG.replace(loss=LossConfig(class_weight=(1.0, 2.0, 0.5)))
    single = fit_logistic(weighted, CORPUS, range(3), PARTS["train"], PARTS["valid"])(PARTS["test"])
    shares = fit_logistic(weighted, corpus, range(3), parts["train"], parts["valid"])(parts["test"])
    plain = fit_logistic(CONFIG, CORPUS, range(3), PARTS["train"], PARTS["valid"])(PARTS["test"])
    np.testing.assert_allclose(shares, single, atol=1e-12)
    assert (single[:, 1] > plain[:, 1]).mean() > 0.9


@pytest.mark.parametrize("kept", [[0], [0, 2]])
def test_a_class_that_training_lacks_has_probability_zero(kept):
    known = torch.isin(PARTS["train"].target, torch.tensor(kept))
    answer = fit_logistic(CONFIG, CORPUS, range(3), PARTS["train"].select(known), PARTS["valid"])(PARTS["test"])
    assert (np.delete(answer, kept, axis=1) == 0).all()
    np.testing.assert_allclose(answer.sum(axis=1), 1)


# --- LSTMs ---


def by_cells(network, utterances, row, group):
    """Logits of a head for one utterance, frame by frame with nn.LSTMCell."""
    lstm, head = network.lstms[group], network.heads[group]
    cell = torch.nn.LSTMCell(lstm.input_size, lstm.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    x = torch.cat([utterances.features[m] for m in network.groups[group]], dim=2)[row]
    state = None
    for t in range(int(utterances.lengths[row])):
        state = cell(x[t], state)
    inner, out = head[0], head[3]
    return out(torch.relu(inner(state[0])))


@pytest.mark.parametrize("groups", [[[0], [1], [2]], [[0, 1, 2]]], ids=["late", "early"])
def test_the_answer_is_the_mean_of_the_heads_whose_modality_is_there(groups):
    network, utterances = branches(groups), PARTS["test"]
    found = network.probabilities(utterances)
    with torch.no_grad():
        for row in range(len(found)):
            p = [by_cells(network, utterances, row, g).softmax(dim=0).double().numpy() for g in range(len(groups))]
            there = [bool(utterances.available[row, group].any()) for group in groups]
            kept = [one for one, known in zip(p, there, strict=True) if known or not any(there)]
            np.testing.assert_allclose(found[row], np.mean(kept, axis=0), atol=1e-6)


def test_early_concatenation_is_as_wide_as_the_lstms_of_late_fusion_together():
    late, early = branches([[0], [1], [2]]), branches([[0, 1, 2]])
    assert sum(lstm.hidden_size for lstm in late.lstms) == early.lstms[0].hidden_size == 3 * NETWORK.hidden


@pytest.mark.parametrize("weight", [None, (1.0, 2.0, 0.5)])
def test_the_loss_is_the_sum_of_the_cross_entropies_of_the_heads(weight):
    network = branches([[0], [1], [2]], CONFIG.replace(loss=LossConfig(class_weight=weight)))
    rows = PARTS["train"].available.all(dim=1)
    part = PARTS["train"].select(rows)
    weights = None if weight is None else torch.tensor(weight)
    expected = sum(F.cross_entropy(logits, part.target, weight=weights) for logits in network(part))
    assert network.loss(part).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_weights_of_the_best_epoch_are_kept_and_patience_ends_the_training(monkeypatch):
    losses, states = iter([3.0, 1.0, 2.0, 1.0, 5.0, 0.0]), []

    def next_loss(network, _utterances):
        states.append({name: value.clone() for name, value in network.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(baselines, "mean_loss", next_loss)
    network = branches([[0, 1, 2]], CONFIG.replace(training=replace(CONFIG.training, epochs=6, patience=3)))
    train_branches(network, PARTS["train"], PARTS["valid"])
    assert len(states) == 5
    for name, value in network.state_dict().items():
        assert torch.equal(value, states[1][name])
        assert not torch.equal(value, states[4][name])


def test_training_lowers_the_loss_below_that_of_guessing():
    network = branches([[0, 1, 2]], CONFIG.replace(training=replace(CONFIG.training, epochs=15)))
    train_branches(network, PARTS["train"], PARTS["valid"])
    p = network.probabilities(PARTS["test"])
    assert log_loss(PARTS["test"].target, p, labels=range(3)) < 0.8 * np.log(3)


# --- all of them ---


@pytest.mark.parametrize("task", ["single", "multi", "distribution"])
def test_every_task_has_every_baseline(task):
    corpus = make(task)
    activation = "sigmoid" if task == "multi" else "softmax"
    model = fitted(corpus, CONFIG.replace(loss=LossConfig(activation=activation)))
    found = fit_baselines(model, corpus)
    assert [baseline.label for baseline in found] == LABELS
    assert [baseline.fuses for baseline in found] == [True, False, False, False, True, True]
    test = utterances_of(model, corpus.subset("test"))
    for baseline in found:
        p = baseline.probabilities(test)
        assert p.shape == (len(test.lengths), 3)
        assert (p >= 0).all()
        assert (p <= 1).all()
        if task != "multi":
            np.testing.assert_allclose(p.sum(axis=1), 1)


def test_the_seed_decides_the_networks_and_the_caller_s_random_state_stays():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    test = PARTS["test"]
    first, again = (fit_baselines(MODEL, CORPUS)[-1].probabilities(test) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other = fitted(CORPUS, CONFIG.replace(training=replace(CONFIG.training, seed=6)))
    np.testing.assert_array_equal(first, again)
    assert (fit_baselines(other, CORPUS)[-1].probabilities(test) != first).any()


def test_trained_networks_are_taken_from_their_folder(tmp_path, monkeypatch):
    first = [baseline.probabilities(PARTS["test"]) for baseline in fit_baselines(MODEL, CORPUS, folder=tmp_path)]
    monkeypatch.setattr(baselines, "train_branches", lambda *_: pytest.fail("trained again"))
    again = [baseline.probabilities(PARTS["test"]) for baseline in fit_baselines(MODEL, CORPUS, folder=tmp_path)]
    np.testing.assert_array_equal(again, first)


def test_the_table_has_the_baselines_below_the_rows_on_the_same_utterances(tmp_path):
    result = ablation.run_ablation(CORPUS, CONFIG, seeds=1, out=tmp_path)
    clean = [(False, label) for label in LABELS]
    corrupted = [(True, label) for label in (LABELS[0], *LABELS[4:])]
    assert [(row.ineffectual, row.label) for row in result.baselines] == clean + corrupted
    rows = [(row.ineffectual, row.label) for row in result.rows]
    order = [row for row in rows if not row[0]] + clean + [row for row in rows if row[0]] + corrupted
    assert [(row.ineffectual, row.label) for row in result.all_rows] == order
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").split("\n\n")[0].splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == [label for _, label in order]
    assert [row["label"] for row in result.to_dict()["baselines"]] == [label for _, label in clean + corrupted]

    without = ablation.run_ablation(CORPUS, CONFIG, seeds=1, baselines=False)
    assert without.baselines == ()
    assert without.rows == result.rows


def test_the_table_scores_the_answers_to_clean_and_to_corrupted_utterances():
    result = ablation.run_ablation(CORPUS, CONFIG, seeds=1)
    model = ablation.train(CORPUS, CONFIG).model
    test = CORPUS.subset("test")
    noisy, _ = ablation.corrupt_corpus(model, test, CONFIG.training.seed)
    for baseline in fit_baselines(model, CORPUS):
        rows = {row.ineffectual: row for row in result.baselines if row.label == baseline.label}
        for ineffectual, row in rows.items():
            p = baseline.probabilities(utterances_of(model, noisy if ineffectual else test))
            assert row.reports[0].accuracy == pytest.approx((p.argmax(axis=1) == test.target).mean())
