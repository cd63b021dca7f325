"""The study of losses trains as ``train`` does, goes on where it was, and writes what it measured."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import loss_study
from benchmarks.loss_study import LOSSES, SETTINGS, Setting, Sizes
from m3er_fast.metrics import classification_report
from m3er_fast.training import evaluate, train
from m3er_fast.training.data import MemoryData

TINY = Sizes(utterances=100, epochs=2)


@pytest.fixture(scope="module")
def clean():
    return loss_study.corpus_of(Setting(), 3, TINY, None)


def test_a_training_is_that_of_train(clean):
    setting = Setting({"head_weight": 0.5})
    model = loss_study.untrained(setting, "modified", 3, TINY, clean)
    epoch, weights = loss_study.chosen_epochs(model, MemoryData(clean, 3))["own"]
    assert loss_study.chosen_epochs(model, MemoryData(clean, 3), last_epoch=True)["own"][0] == TINY.epochs
    config = model.config.replace(training=replace(model.config.training, calibrate=False))
    result = train(clean, config)
    assert epoch == result.best_epoch
    for name, value in result.model.network.state_dict().items():
        assert torch.equal(weights[name], value), name
    prediction = evaluate(result.model, clean.subset("test"))
    model.network.load_state_dict(weights)
    found = loss_study.scores(model, clean.subset("test"))
    assert found["fused"] == pytest.approx(prediction.report.overall.f1, abs=1e-4)
    summed = np.log(prediction.modality_probabilities.astype(np.float64)).sum(axis=0)
    target = clean.subset("test").target
    report = classification_report(np.eye(4)[summed.argmax(axis=1)], target, clean.classes)
    assert found["sum"] == pytest.approx(report.overall.f1, abs=1e-4)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_lius_rule_takes_the_class_of_least_cost(clean, activation):
    setting = Setting({"activation": activation, "beta": 2.0})
    model = loss_study.untrained(setting, "modified", 3, TINY, clean)
    p = evaluate(model, clean).modality_probabilities.astype(np.float64)  # (M, N, C)
    weight = np.stack([np.delete(1 - p, m, axis=0).prod(axis=0) for m in range(3)])  # γ = 2 / (3 − 1)
    cost = -(weight * np.log(p)).sum(axis=0)
    assert np.array_equal(loss_study.decisions(model, clean)["liu"], cost.argmin(axis=1))


def test_label_noise_hits_its_share_of_train_and_validation_and_spares_the_test_split(clean):
    large = loss_study.corpus_of(Setting(), 0, Sizes(utterances=4000), None)
    changed = loss_study.with_label_noise(large, 0.4, 0).target != large.target
    assert not changed[large.split == "test"].any()
    for split in ("train", "valid"):
        assert changed[large.split == split].mean() == pytest.approx(0.4, abs=0.05)
    assert np.array_equal(loss_study.with_label_noise(clean, 0.0, 0).target, clean.target)


def test_gradient_shares_are_those_of_generalised_cross_entropy(clean):
    model = loss_study.untrained(Setting(), "modified", 3, TINY, clean)
    p = evaluate(model, clean).modality_probabilities.astype(np.float64)
    own = np.take_along_axis(p, clean.target[None, :, None], axis=2)[:, :, 0]
    size = np.sqrt(own) * 2 * (1 - own)  # Σ_c |∂(−p^γ log p)/∂x_c| with p^γ held: p^γ · 2 (1 − p), γ = 1/2
    wrong = np.arange(len(clean)) % 3 == 0
    found = loss_study.gradient_shares(model, clean, torch.from_numpy(wrong))
    assert found["mislabelled"]["gradient"] == pytest.approx(size[:, wrong].sum() / size.sum(), abs=1e-3)
    missed = p.argmax(axis=2) != clean.target
    assert found["missed"]["answers"] == pytest.approx(missed.mean(), abs=1e-4)
    assert found["missed"]["gradient"] == pytest.approx(size[missed].sum() / size.sum(), abs=1e-3)


def test_the_page_shows_the_results_that_are_kept():
    runs = loss_study.complete(json.loads(loss_study.RESULTS.read_text())["runs"])
    page = (loss_study.common.ROOT / "docs/which_loss.md").read_text(encoding="utf-8")
    assert "\n".join(loss_study.tables(runs)) in page


def test_the_study_goes_on_where_it_was_and_writes_page_and_figure(tmp_path):
    settings = {name: SETTINGS[name] for name in ("base", "noisy modalities, check in training", "label noise 40 %")}
    path, said = tmp_path / "runs.json", []
    assert loss_study.study(path, settings, 2, TINY, tmp_path, minutes=0, say=said.append) == []
    assert "again" in said[0]
    first = loss_study.study(path, settings, 1, TINY, tmp_path, say=said.append)
    assert len(first) == 2 * len(LOSSES) + 2
    more = loss_study.study(path, settings, 2, TINY, tmp_path, say=said.append)
    assert more[: len(first)] == first
    assert len(more) == 2 * len(first)
    assert json.loads(path.read_text())["runs"] == more

    assert loss_study.complete(more[:-1]) == first  # a seed that is not finished does not count
    f1 = loss_study.values(more, "base", "modified")
    assert f1.tolist() == [run["f1"]["own"]["test"]["fused"] for run in (more[1], more[1 + len(first)])]
    table = "\n".join(loss_study.loss_table(more, {"base": LOSSES}))
    assert f"{np.mean(f1):.3f} ± {np.std(f1, ddof=1):.3f}" in table
    begin, end = loss_study.MARKERS
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    loss_study.write_page(page, loss_study.tables(more))
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    loss_study.draw(more, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
