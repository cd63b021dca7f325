"""Corpus: the input that it refuses, selecting and concatenating."""

import subprocess
import sys

import numpy as np
import pytest
from corpus_fixtures import assert_same, make_corpus

from m3er_fast.corpus import Corpus, CorpusError, concatenate


def test_corpus_has_its_shape_as_properties():
    corpus = make_corpus(rows=6, steps=4)
    assert len(corpus) == 6
    assert corpus.steps == 4
    assert corpus.input_dims == {"text": 3, "audio": 2}
    assert corpus.modalities == ("text", "audio")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.array(list("abcdea"), dtype=object)}, "'a' occurs 2 times"),
        ({"ids": np.array([1, 2, 3, 4, 5, 6])}, "ids must be a one-dimensional array of strings, got int64"),
        ({"ids": np.array(["a", "b", "c", "d", "e", None], dtype=object)}, "ids must be strings, got None"),
        ({"features": {}}, "at least one modality"),
        ({"features": {"text": np.zeros((6, 4, 3))}}, "'text'.*float64"),
        ({"features": {"text": np.zeros((6, 0, 3), np.float32)}}, "'text'.*T, d ≥ 1"),
        ({"features": {"text": [1.0]}}, "'text'.*got list"),
        (
            {"features": {"text": np.zeros((6, 4, 3), np.float32), "audio": np.zeros((5, 4, 2), np.float32)}},
            r"'audio'.*\(6, 4, d\)",
        ),
        ({"lengths": np.array([1, 1, 1, 1, 1, 5])}, "0..4, got 5 for 'u5'"),
        ({"lengths": np.array([1, 1, 1, 1, 1, -1])}, "0..4, got -1 for 'u5'"),
        ({"lengths": np.ones(6)}, "lengths must be int64"),
        ({"available": np.ones((6, 3), dtype=bool)}, r"available must be bool of shape \(6, 2\)"),
        ({"target": np.array([0, 1, 2, 0, 0, 0])}, "'u2' is 2, wanted a class in 0..1"),
        ({"target": np.array([0, 1, -1, 0, 0, 0])}, "'u2' is -1"),
        ({"target": np.full((6, 2), 0.5, np.float32), "task": "multi"}, "'u0'.*answers of 0 or 1"),
        ({"target": np.full((6, 2), 0.4, np.float32), "task": "distribution"}, "'u0'.*sum to 1"),
        ({"target": np.full((6, 2), [np.nan, 1], np.float32), "task": "distribution"}, "'u0'.*sum to 1"),
        ({"target": np.full((6, 2), [np.nan, 1], np.float32), "task": "multi"}, "'u0'.*answers of 0 or 1"),
        ({"task": "regression"}, "task must be one of"),
        ({"classes": ("a", "a")}, "distinct names"),
        ({"split": np.array(["holdout"] * 6, dtype=object)}, "'holdout' is not a split, wanted train/training, valid"),
        ({"group": np.array(["a"] * 5, dtype=object)}, "group must have 6 rows, got 5"),
    ],
)
def test_inconsistent_corpus_is_refused_with_the_reason(changes, message):
    with pytest.raises(CorpusError, match=message):
        make_corpus(rows=6, steps=4, **changes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_allowed(value):
    features = {"text": np.full((6, 4, 3), value, np.float32), "audio": np.zeros((6, 4, 2), np.float32)}
    assert make_corpus(features=features).features["text"][0, 0, 0] == pytest.approx(value, nan_ok=True)


def test_missing_labels_and_empty_corpora_are_ordinary():
    assert make_corpus(target=np.array([0, 1, -100, -100, 0, 1])).target[2] == -100
    empty = make_corpus().select(np.zeros(6, dtype=bool))
    assert len(empty) == 0
    assert empty.input_dims == {"text": 3, "audio": 2}


def test_select_and_subset_keep_rows_together():
    corpus = make_corpus(rows=8)
    rows = np.array([6, 1])
    chosen = corpus.select(rows)
    assert chosen.ids.tolist() == ["u6", "u1"]
    np.testing.assert_array_equal(chosen.features["audio"], corpus.features["audio"][rows])
    np.testing.assert_array_equal(chosen.target, corpus.target[rows])
    assert corpus.subset("valid").ids.tolist() == ["u2", "u6"]
    with pytest.raises(CorpusError, match="no splits"):
        make_corpus(split=None).subset("train")
    with pytest.raises(CorpusError, match="'holdout' is not a split"):
        corpus.subset("holdout")


def test_concatenate_undoes_a_cut():
    corpus = make_corpus(rows=7)
    assert_same(concatenate([corpus.select(slice(0, 3)), corpus.select(slice(3, 7))]), corpus)


def test_concatenate_fills_missing_modalities_and_shorter_time_axes():
    first = make_corpus(rows=2, steps=2, dims=(("audio", 2), ("face", 1)))
    second = make_corpus(rows=3, steps=4, dims=(("text", 3), ("audio", 2)), ids=np.array(list("abc"), dtype=object))
    joined = concatenate([first, second])
    assert joined.modalities == ("text", "audio", "face")
    assert joined.available.tolist() == [[False, True, True]] * 2 + [[True, True, False]] * 3
    np.testing.assert_array_equal(joined.features["audio"][:2, :2], first.features["audio"])
    assert not joined.features["audio"][:2, 2:].any()
    assert not joined.features["text"][:2].any()


def test_concatenate_refuses_parts_that_do_not_fit():
    corpus = make_corpus()
    other = np.array([f"w{row}" for row in range(6)], dtype=object)
    with pytest.raises(CorpusError, match="differ in labels"):
        concatenate([corpus, make_corpus(ids=other, classes=("happy", "sad"))])
    with pytest.raises(CorpusError, match="'audio' has 2 features in one part and 5"):
        concatenate([corpus, make_corpus(ids=other, dims=(("text", 3), ("audio", 5)))])
    with pytest.raises(CorpusError, match="only some of the parts have splits"):
        concatenate([corpus, make_corpus(ids=other, split=None)])
    with pytest.raises(CorpusError, match="'u0' occurs 2 times"):
        concatenate([corpus, corpus])
    with pytest.raises(CorpusError, match="nothing to concatenate"):
        concatenate([])


def test_concatenate_marks_the_rows_of_an_unlabelled_part():
    unlabelled = make_corpus(rows=2, ids=np.array(["a", "b"], dtype=object), target=None, group=None)
    joined = concatenate([make_corpus(rows=2), unlabelled])
    assert joined.target.tolist() == [0, 1, -100, -100]
    assert joined.group.tolist() == ["v0", "v0", "a", "b"]


@pytest.mark.parametrize("task", ["multi", "distribution"])
def test_a_row_of_nan_is_no_label(task):
    answers = np.array([[0, 1], [np.nan, np.nan], [1, 0]], np.float32)
    ids = np.array(["a", "b"], dtype=object)
    labelled = make_corpus(rows=3, target=answers, task=task)
    joined = concatenate([labelled, make_corpus(rows=2, ids=ids, target=None, task=task)])
    np.testing.assert_array_equal(joined.target, np.concatenate([answers, np.full((2, 2), np.nan)]))
    assert joined.labelled.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train", "TRAIN", "training", " Train "]),
        ("valid", ["valid", "val", "dev", "Validation", "DEV"]),
        ("test", ["test", "Test", "eval", "evaluation"]),
    ],
)
def test_the_usual_names_of_a_split_are_read_in_any_case(split, names):
    corpus = make_corpus(rows=len(names), split=np.array(names, dtype=object))
    assert corpus.split.tolist() == [split] * len(names)
    assert all(len(corpus.subset(name)) == len(names) for name in names)


def test_importing_corpus_loads_no_file_library():
    # Where pandas is installed scikit-learn imports it, and it imports pyarrow.
    code = (
        "import sys; sys.modules['pandas'] = None; import m3er_fast.corpus;"
        "print([m for m in ('pyarrow', 'h5py') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_corpus_error_is_a_value_error():
    assert issubclass(CorpusError, ValueError)
    assert Corpus.__hash__ is object.__hash__
