"""Labels beside scores, and the same metrics in the run summary, counted without holding the corpus."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from scoring_problems import edit_shard, fitted_model, make_corpus, probabilities, read_scores, with_column

from m3er_fast import M3ERConfig
from m3er_fast.config import LossConfig
from m3er_fast.corpus import write_parquet
from m3er_fast.metrics import classification_report
from m3er_fast.scoring import score

CORPUS = make_corpus(120)
SIGMOID = M3ERConfig(loss=LossConfig(activation="sigmoid"))


def run(corpus, tmp_path, *, config=None, temperature=2.0, edit=None):
    """Score a corpus of three shards, and return the model, the scores and the summary."""
    folder = tmp_path / "corpus"
    write_parquet(corpus, folder, rows_per_shard=50)
    for path in folder.glob("*.parquet") if edit else ():
        edit_shard(path, edit)
    model = fitted_model(CORPUS, config)
    model.calibration.temperature.fill_(temperature)
    score(folder, model, tmp_path / "out")
    return model, read_scores(tmp_path / "out"), json.loads((tmp_path / "out" / "_summary.json").read_text())


def assert_same_report(found, wanted):
    for name in ("accuracy", "exact_match", "balanced_accuracy", "per_class", "overall", "confusion", "task"):
        assert found.get(name) == wanted.get(name), name
    for name in ("calibration", "before_calibration"):
        assert (found[name] is None) == (wanted[name] is None)
        if wanted[name]:
            assert found[name]["ece"] == pytest.approx(wanted[name]["ece"], abs=1e-5)


def test_a_label_stands_beside_its_scores_and_the_summary_has_the_report(tmp_path):
    target = CORPUS.target.copy()
    target[::7] = -100
    corpus = CORPUS.select(np.arange(120))
    corpus.target[:] = target
    model, scores, summary = run(corpus, tmp_path)
    wanted = [None if label < 0 else corpus.classes[label] for label in target]
    assert scores["label"].to_pylist() == wanted
    with torch.no_grad():
        before = model.predict_proba(corpus.features, corpus.lengths, corpus.available, calibrate=False)
    report = classification_report(probabilities(scores, corpus), target, corpus.classes, uncalibrated=before)
    assert_same_report(summary["report"], report.to_dict())
    known = sum(part["labelled"] for part in summary["order"])
    right = sum(part["right"] for part in summary["order"])
    assert (known, right / known) == ((target >= 0).sum(), pytest.approx(report.accuracy))
    groups = summary["groups"]["named"]
    assert sum(group["labelled"] for group in groups) == known
    page = (tmp_path / "out" / "_summary.html").read_text()
    assert "Beside the labels" in page
    assert "Confusion matrix" in page


@pytest.mark.parametrize(("config", "task"), [(None, "distribution"), (SIGMOID, "multi")])
def test_lists_of_labels_have_a_column_per_class(tmp_path, config, task):
    rng = np.random.default_rng(0)
    target = rng.dirichlet(np.ones(3), 120) if task == "distribution" else rng.integers(0, 2, (120, 3))
    target = target.astype(np.float32)
    target[::5] = np.nan
    corpus = CORPUS.__class__(**{**vars(CORPUS), "target": target, "task": task})
    _, scores, summary = run(corpus, tmp_path, config=config, temperature=1.0)
    found = np.stack([scores[f"label_{name}"].to_numpy() for name in corpus.classes], axis=1)
    np.testing.assert_array_equal(found, target)
    known = corpus.labelled
    report = classification_report(probabilities(scores, corpus)[known], target[known], corpus.classes, task=task)
    assert_same_report(summary["report"], report.to_dict())


@pytest.mark.parametrize(
    "edit",
    [
        lambda table: table.drop_columns(["label"]),
        lambda table: with_column(table, "label", pa.nulls(len(table))),
        lambda table: with_column(table, "label", pa.array([7] * len(table))),
        lambda table: with_column(table, "label", pa.array([-5] * len(table))),
        lambda table: with_column(table, "label", pa.array(["x" * 5000] * len(table)).dictionary_encode()),
        lambda table: with_column(table, "label", pa.array(["bored"] * len(table))),
        lambda table: with_column(table, "label", pa.array(["x" * 5000] * len(table))),
        lambda table: with_column(table, "label", pa.array([0.5] * len(table))),
        lambda table: with_column(table, "label", pa.array([[1.0, 2.0]] * len(table))),
        lambda table: with_column(table, "label", pa.array([{"a": 1}] * len(table))),
        lambda table: table.replace_schema_metadata({b"m3er_fast.classes": b'["x", "y", "z"]'}),
    ],
    ids=[
        "none",
        "nulls",
        "too high",
        "negative",
        "long in a dictionary",
        "unknown name",
        "long",
        "numbers",
        "lists",
        "structs",
        "other classes",
    ],
)
def test_labels_that_cannot_be_used_change_no_score(tmp_path, edit):
    _, scores, summary = run(CORPUS, tmp_path, edit=edit)
    plain = tmp_path / "plain"
    plain.mkdir()
    _, wanted, _ = run(CORPUS, plain, edit=lambda table: table.drop_columns(["label"]))
    labels = [name for name in scores.column_names if name.startswith("label")]
    assert all(scores[name].null_count == 120 for name in labels)
    assert scores.drop_columns(labels).equals(wanted)
    assert summary["report"] is None
    assert summary["utterances"]["scored"] == 120
    assert "labelled" not in summary["order"][0]


def test_names_of_classes_are_read_in_any_order_and_as_a_dictionary(tmp_path):
    def edit(table):
        names = pa.array([CORPUS.classes[label] for label in table["label"].to_pylist()]).dictionary_encode()
        return with_column(table, "label", names).replace_schema_metadata(None)

    _, scores, summary = run(CORPUS, tmp_path, edit=edit)
    assert scores["label"].to_pylist() == [CORPUS.classes[label] for label in CORPUS.target]
    assert summary["report"]["overall"]["support"] == 120


def test_all_shards_have_the_columns_of_the_first(tmp_path):
    folder = tmp_path / "corpus"
    write_parquet(CORPUS, folder, rows_per_shard=50)
    first, second, _ = sorted(folder.glob("*.parquet"))
    edit_shard(second, lambda table: table.drop_columns(["label"]))
    model = fitted_model(CORPUS)
    score(folder, model, tmp_path / "some")
    labels = read_scores(tmp_path / "some")["label"].to_pylist()
    assert [label is None for label in labels] == [50 <= row < 100 for row in range(120)]
    edit_shard(first, lambda table: table.drop_columns(["label"]))
    score(folder, model, tmp_path / "none")
    assert "label" not in read_scores(tmp_path / "none").column_names
