"""The audit counts the content and warns of every flaw; all numbers are known beforehand."""

import json

import numpy as np
import pytest
from corpus_fixtures import make_corpus

from m3er_fast.corpus import audit_corpus


def flawed():
    """Eight utterances of four steps, two modalities, with one flaw of every kind."""
    corpus = make_corpus(
        rows=8,
        lengths=np.array([4, 4, 0, 2, 4, 4, 2, 1]),
        target=np.array([0, 0, 1, -100, 0, 0, 1, 1]),
        classes=("sad", "happy", "angry"),
    )
    rng = np.random.default_rng(0)
    corpus.features["text"][:] = rng.standard_normal((8, 4, 3))
    corpus.features["audio"][:] = rng.standard_normal((8, 4, 2))
    corpus.features["text"][:, :, 1] = 7
    corpus.features["audio"][1, 0, 0] = -np.inf
    corpus.features["audio"][1, 1] = 0
    corpus.features["text"][0, 2:] = np.nan
    corpus.features["text"][4] = corpus.features["text"][5]
    corpus.features["audio"][4] = corpus.features["audio"][5]
    corpus.available[[3, 7], 1] = False
    return corpus


def test_counts_and_shares_of_a_flawed_corpus():
    report = audit_corpus(flawed())
    assert report.utterances == 8
    assert report.splits == {"train": 4, "valid": 2, "test": 2}
    assert report.length_quantiles == {"min": 0, "25%": 1.75, "median": 3, "75%": 4, "max": 4}
    assert report.empty == 1
    assert report.unlabelled == 1
    assert report.labels["train"] == {"sad": 4, "happy": 0, "angry": 0}
    assert report.labels["test"] == {"sad": 0, "happy": 1, "angry": 0}
    text, audio = report.modalities["text"], report.modalities["audio"]
    assert text.features == 3
    assert text.constant_features == ()  # the missing frames of utterance 0 are not 7
    assert audio.unavailable == {"train": 0, "valid": 0, "test": 1}
    assert text.non_finite == pytest.approx(2 * 3 / (21 * 3))  # 21 valid frames
    assert audio.non_finite == pytest.approx(1 / (18 * 2))  # less the 3 of utterances 3 and 7
    assert audio.zero_frames == pytest.approx(1 / 18)
    assert text.zero_frames == 0
    assert report.shared_groups == ("v1", "v3")
    assert report.duplicates == (("u4", "u5"),)


def test_groups_in_more_than_one_split_are_shared():
    split = np.array(["train", "train", "train", "test", "valid", "valid"], dtype=object)
    assert audit_corpus(make_corpus(rows=6, split=split)).shared_groups == ("v1",)


def test_constant_features_are_found_in_train():
    corpus = make_corpus(rows=8)
    corpus.features["text"][corpus.split == "train", :, 1] = 7
    assert audit_corpus(corpus).modalities["text"].constant_features == (1,)


def test_padding_and_unavailable_modalities_are_ignored():
    corpus = make_corpus(rows=8, steps=4, lengths=np.full(8, 2))
    for value in corpus.features.values():
        value[:, 2:] = np.nan
    corpus.features["audio"][3] = np.inf
    corpus.available[3, 1] = False
    report = audit_corpus(corpus)
    assert report.modalities["text"].non_finite == 0
    assert report.modalities["audio"].non_finite == 0


@pytest.mark.parametrize(
    "warning",
    [
        "1 utterances have no frame",
        "audio is missing throughout test",
        "text holds values that are not finite (9.52%)",
        "1 utterances have no label",
        "no utterance of train has the label happy, angry",
        "groups are in more than one split: v1",
        "1 sets of utterances have the same frames, such as u4 = u5",
    ],
)
def test_every_flaw_is_named_in_the_text(warning):
    assert warning in audit_corpus(flawed()).to_text()


def test_a_clean_corpus_has_no_warning():
    split = np.array(["train"] * 4 + ["valid"] * 2 + ["test"] * 2, dtype=object)
    report = audit_corpus(make_corpus(rows=8, split=split))
    assert report.warnings == ()
    assert report.to_text().endswith("nothing suspicious")


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"split": None}, "there are no splits"),
        ({"split": np.full(8, "train", dtype=object)}, "split valid is empty"),
        ({"target": None}, "8 utterances have no label"),
        ({"lengths": np.zeros(8, dtype=np.int64)}, "8 utterances have no frame"),
    ],
)
def test_missing_parts_give_a_warning(changes, warning):
    assert warning in audit_corpus(make_corpus(rows=8, **changes)).warnings


def test_answers_and_distributions_are_summed():
    target = np.array([[1, 0], [1, 1]] * 4, np.float32)
    report = audit_corpus(make_corpus(rows=8, target=target, task="multi", split=None))
    assert report.labels == {"all": {"sad": 8, "happy": 4}}


@pytest.mark.parametrize(
    "corpus", [flawed(), make_corpus().select(slice(0, 0)), make_corpus(available=np.zeros((6, 2), bool))]
)
def test_the_report_is_strict_json(corpus):
    report = audit_corpus(corpus)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["utterances"] == len(corpus)


def test_an_empty_corpus_gives_one_warning():
    assert audit_corpus(make_corpus().select(slice(0, 0))).warnings == ("the corpus is empty",)
