"""`evaluate`: the scores by split, class and group, against scikit-learn, and the page that shows them."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from typer.testing import CliRunner

from m3er_fast import M3ERConfig
from m3er_fast.cli.commands import app
from m3er_fast.config import LossConfig, TrainingConfig
from m3er_fast.corpus import write_parquet
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.corpus_evaluation import evaluate_corpus
from m3er_fast.evaluation_page import render
from m3er_fast.training import evaluate, train

CORPUS = make_synthetic(240, steps=3, seed=0)
CONFIG = M3ERConfig(training=TrainingConfig(epochs=4, learning_rate=0.01))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "model"
    return out, train(CORPUS, CONFIG, out=out).model


@pytest.fixture(scope="module")
def evaluation(run):
    return evaluate_corpus(run[1], CORPUS, corruptions=["gaussian_noise", "silence:mild"])


def test_every_condition_and_split_is_scored(evaluation):
    assert [condition.name for condition in evaluation.conditions] == ["clean", "gaussian_noise", "silence:mild"]
    for condition in evaluation.conditions:
        assert [scores.split for scores in condition.splits] == ["train", "valid", "test"]
        for scores in condition.splits:
            assert scores.report.overall.support == (CORPUS.split == scores.split).sum()
    assert evaluation.left_out == {}


def test_scores_are_those_of_the_rows_of_the_split_and_of_its_groups(run, evaluation):
    answer = evaluate(run[1], CORPUS).probabilities.argmax(axis=1)
    for scores in evaluation.conditions[0].splits:
        rows = CORPUS.split == scores.split
        truth, predicted = CORPUS.target[rows], answer[rows]
        assert scores.report.accuracy == pytest.approx(accuracy_score(truth, predicted))
        np.testing.assert_array_equal(scores.report.confusion, confusion_matrix(truth, predicted, labels=range(4)))
        assert [group.name for group in scores.groups] == sorted(set(CORPUS.group[rows].astype(str)))
        for group in scores.groups:
            part = rows & (CORPUS.group == group.name)
            occurring = np.unique(CORPUS.target[part])
            f1 = f1_score(CORPUS.target[part], answer[part], labels=occurring, average="macro", zero_division=0)
            assert (group.utterances, group.accuracy) == (
                part.sum(),
                pytest.approx(accuracy_score(CORPUS.target[part], answer[part])),
            )
            assert group.f1 == pytest.approx(f1)


def test_only_labelled_utterances_and_the_splits_asked_for_count(run):
    target = CORPUS.target.copy()
    target[np.flatnonzero(CORPUS.split == "test")[::2]] = -100
    corpus = replace(CORPUS, target=target)
    found = evaluate_corpus(run[1], corpus, corruptions=[], splits=["test"]).conditions
    (scores,) = found[0].splits
    assert scores.report.overall.support == ((CORPUS.split == "test") & (target >= 0)).sum()
    whole = replace(CORPUS, split=None)
    (scores,) = evaluate_corpus(run[1], whole, corruptions=[]).conditions[0].splits
    assert (scores.split, scores.report.overall.support) == ("all", 240)


def test_corruptions_that_need_groups_are_left_out_of_a_corpus_without_them(run):
    corpus = replace(CORPUS, group=None)
    found = evaluate_corpus(run[1], corpus, corruptions=["wrong_face", "silence"], splits=["test"])
    assert [condition.name for condition in found.conditions] == ["clean", "silence"]
    assert list(found.left_out) == ["wrong_face"]
    assert found.conditions[0].splits[0].groups == ()
    assert "Left out: wrong_face" in found.to_markdown()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"target": None}, {}, "has no labels"),
        ({"target": np.full(240, -100)}, {}, "no labelled utterance"),
        ({}, {"splits": ["dev"]}, "the corpus has train, valid, test, but not dev"),
        ({}, {"corruptions": ["rust"]}, "corruptions must be one of"),
        ({"classes": ("a", "b", "c", "d")}, {}, "but the model"),
    ],
)
def test_what_cannot_be_scored_is_refused(run, changes, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_corpus(run[1], replace(CORPUS, **changes), **options)


def test_several_questions_have_exact_matches_and_no_confusion_matrix(tmp_path):
    answers = np.eye(4, dtype=np.float32)[CORPUS.target]
    corpus = replace(CORPUS, target=answers, task="multi")
    model = train(corpus, CONFIG.replace(loss=LossConfig(activation="sigmoid"))).model
    found = evaluate_corpus(model, corpus, corruptions=["silence"])
    assert "| Exact match |" in found.to_markdown()
    assert "Accuracy" not in found.to_markdown().replace("Balanced accuracy", "")
    text = render(found.to_dict())
    assert "Exact match" in text
    assert "Confusion matrix" not in text


class Tags(HTMLParser):
    """Checks that tags close in order, and collects what may load or run something."""

    def __init__(self):
        super().__init__()
        self.open, self.active = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "rect", "path", "br"):
            self.open.append(tag)
        if tag in ("script", "img", "link", "iframe", "object") or {"src", "href"} & {name for name, _ in attributes}:
            self.active.append(tag)
        self.active += [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag


def test_the_page_is_whole_shows_every_number_and_loads_nothing(evaluation):
    text = render(evaluation.to_dict())
    tags = Tags()
    tags.feed(text)
    assert (tags.open, tags.active) == ([], [])
    report = evaluation.conditions[0].splits[-1].report
    for number in (report.calibration.ece, report.before_calibration.ece, report.overall.f1):
        assert f"{number:.3f}" in text
    assert text.count("Confusion matrix") == 4  # every split clean, the last one corrupted
    assert text.count('class="bar"') == sum(
        sum(n > 0 for n in scores.report.calibration.answers)
        for scores in (*evaluation.conditions[0].splits, evaluation.conditions[1].splits[-1])
    )


def test_names_from_files_are_shown_as_text(run):
    named = "<script>alert(1)</script>"
    corpus = replace(CORPUS, group=np.where(np.arange(240) % 2, named, "a|b").astype(object))
    found = evaluate_corpus(run[1], corpus, corruptions=[], splits=["test"])
    assert "<script" not in render(found.to_dict())
    assert "a\\|b" in found.to_markdown()


def test_the_command_prints_the_tables_and_writes_every_file(run, tmp_path):
    write_parquet(CORPUS, tmp_path / "corpus")
    arguments = ["evaluate", str(tmp_path / "corpus"), "--model", str(run[0]), "--corruption", "gaussian_noise"]
    result = CliRunner().invoke(app, [*arguments, "--split", "valid,test", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^\| (clean|gaussian_noise) \| (\w+) \|", result.output, re.MULTILINE)
    assert rows == [("clean", "valid"), ("clean", "test"), ("gaussian_noise", "valid"), ("gaussian_noise", "test")]
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [condition["corruption"] for condition in found["conditions"]] == [None, "gaussian_noise"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"evaluation.html", "evaluation.md"}
    wrong = CliRunner().invoke(app, [*arguments[:-1], "rust"])
    assert wrong.exit_code == 2
