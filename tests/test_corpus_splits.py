"""Splits never share a group, and come as close to the fractions as groups allow."""

import dataclasses

import numpy as np
import pytest
from corpus_fixtures import make_corpus

from m3er_fast.corpus import SPLITS, audit_corpus, convert, ensure_validation, split_by_group


def grouped(sizes, seed=0, **changes):
    rows = sum(sizes)
    group = np.repeat([f"v{index}" for index in range(len(sizes))], sizes).astype(object)
    target = np.random.default_rng(seed).integers(0, 2, rows)
    return make_corpus(rows=rows, group=group, target=target, split=None, **changes)


def shares(corpus):
    return [float(np.mean(corpus.split == name)) for name in ("train", "valid", "test")]


def test_no_group_is_shared_and_fractions_are_met():
    sizes = np.random.default_rng(1).integers(1, 20, 60).tolist()
    corpus = split_by_group(grouped(sizes))
    assert audit_corpus(corpus).shared_groups == ()
    np.testing.assert_allclose(shares(corpus), (0.7, 0.1, 0.2), atol=0.01)


def test_large_groups_are_assigned_first():
    corpus = dataclasses.replace(grouped([1] * 20 + [20]), target=None)
    corpus = split_by_group(corpus, fractions=(0.5, 0.0, 0.5))
    assert shares(corpus) == [0.5, 0.0, 0.5]


def test_labels_keep_their_shares():
    corpus = grouped([1] * 400)
    corpus.target[:] = np.arange(400) % 10 == 0
    split = split_by_group(corpus)
    for name in ("train", "valid", "test"):
        assert np.mean(split.target[split.split == name]) == pytest.approx(0.1, abs=0.02)


def test_rows_without_groups_are_split_one_by_one():
    corpus = split_by_group(make_corpus(rows=100, group=None, split=None))
    np.testing.assert_allclose(shares(corpus), (0.7, 0.1, 0.2), atol=0.011)


def test_same_seed_same_split_other_seed_other_split():
    corpus = grouped([1] * 50)
    first, again, other = (split_by_group(corpus, seed=seed).split for seed in (3, 3, 4))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_every_split_gets_a_group_when_there_are_just_enough():
    assert sorted(set(split_by_group(grouped([50, 30, 20])).split)) == ["test", "train", "valid"]


def test_a_fraction_of_zero_leaves_its_split_empty():
    corpus = split_by_group(grouped([3] * 20), fractions=(0.8, 0.0, 0.2))
    assert "valid" not in set(corpus.split)


@pytest.mark.parametrize("labels", [{"task": "multi"}, {"task": "distribution"}, {"target": None}])
def test_every_kind_of_target_can_be_split(labels):
    target = np.eye(2, dtype=np.float32)[np.arange(40) % 2]
    corpus = make_corpus(rows=40, **{"target": target, **labels})
    np.testing.assert_allclose(shares(split_by_group(corpus)), (0.7, 0.1, 0.2), atol=0.03)


def test_unlabelled_rows_are_split_too():
    corpus = make_corpus(rows=40, target=np.full(40, -100))
    np.testing.assert_allclose(shares(split_by_group(corpus)), (0.7, 0.1, 0.2), atol=0.03)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.5, 0.5), (1.2, -0.2, 0.0), (float("nan"), 0.5, 0.5)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions must be three"):
        split_by_group(make_corpus(), fractions=fractions)


def test_fewer_groups_than_splits_are_refused():
    with pytest.raises(ValueError, match=r"cannot make 3 splits.*2 groups"):
        split_by_group(grouped([5, 5]))


def test_validation_is_taken_from_train_by_group():
    corpus = make_corpus(rows=80)
    split = np.array(["train"] * 60 + ["test"] * 20, dtype=object)
    held = ensure_validation(make_corpus(rows=80, split=split), fraction=0.2)
    assert (held.split == "test").tolist() == (split == "test").tolist()
    assert np.mean(held.split[:60] == "valid") == pytest.approx(0.2, abs=0.02)
    assert audit_corpus(held).shared_groups == ()
    assert ensure_validation(corpus) is corpus


def test_validation_needs_splits_a_fraction_and_two_groups():
    with pytest.raises(ValueError, match="no splits"):
        ensure_validation(make_corpus(split=None))
    with pytest.raises(ValueError, match="strictly between 0 and 1, got 1"):
        ensure_validation(make_corpus(), fraction=1)
    alone = make_corpus(split=np.full(6, "train", dtype=object), group=np.full(6, "v", dtype=object))
    with pytest.raises(ValueError, match="there are 1 groups"):
        ensure_validation(alone)


def test_splitting_nothing_gives_nothing():
    assert len(split_by_group(make_corpus().select(slice(0, 0)))) == 0


def test_convert_keeps_published_splits_unless_resplit(tmp_path):
    rng = np.random.default_rng(0)
    for split, rows in (("train", 30), ("test", 12)):
        for name in ("text", "audio"):
            table = np.column_stack([rng.normal(size=(rows, 3)), np.arange(rows) % 2])
            np.savetxt(tmp_path / f"{name}_{split}.csv", table, delimiter=",")
    published = convert(tmp_path, "utterance-csv", tmp_path / "published")
    fresh = convert(tmp_path, "utterance-csv", tmp_path / "fresh", resplit=True)
    assert {name: int((published.split == name).sum()) for name in SPLITS} == {"train": 30, "valid": 0, "test": 12}
    assert all((fresh.split == name).any() for name in SPLITS)
    assert list(fresh.ids) == list(published.ids)
