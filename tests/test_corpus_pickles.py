"""MMSA, MulT and IEMOCAP pickles, built in their published structure."""

import os

import numpy as np
import pytest
from corpus_fixtures import Hostile, iemocap_members, mmsa_fold, mult_fold, write_pickle

from m3er_fast.corpus import CorpusError, iemocap_pickle, mmsa_pickle, mult_pickle
from m3er_fast.corpus._labels import label_name

NEGATIVE, NEUTRAL, POSITIVE = range(3)


def read_mmsa(tmp_path, train, **folds):
    return mmsa_pickle.read(write_pickle(tmp_path / "m.pkl", {"train": train, "valid": mmsa_fold(seed=1), **folds}))


def test_mmsa_aligned_file(tmp_path):
    fold = mmsa_fold()
    corpus = read_mmsa(tmp_path, fold)
    assert corpus.input_dims == {"text": 6, "audio": 3, "vision": 2}
    assert corpus.ids.tolist() == ["vid0$_$0", "vid0$_$1", "vid1$_$0", "vid1$_$1"]
    assert corpus.group.tolist() == ["vid0", "vid0", "vid1", "vid1"]
    assert corpus.split.tolist() == ["train", "train", "valid", "valid"]
    assert corpus.classes == ("negative", "neutral", "positive")
    assert corpus.target.tolist() == [POSITIVE, NEGATIVE] * 2
    np.testing.assert_array_equal(corpus.features["audio"][:2], fold["audio"].astype(np.float32))


@pytest.mark.parametrize("missing", [(), ("annotations",), ("annotations", "classification_labels")])
def test_mmsa_label_fields_agree(tmp_path, missing):
    folds = [mmsa_fold(seed=seed, **dict.fromkeys(missing)) for seed in (0, 1)]
    corpus = read_mmsa(tmp_path, folds[0], valid=folds[1])
    assert corpus.target.tolist() == [POSITIVE, NEGATIVE] * 2
    assert corpus.classes == ("negative", "neutral", "positive")


def test_mmsa_annotations_of_other_names_are_the_classes(tmp_path):
    train, valid = mmsa_fold(annotations=["Sad", ""]), mmsa_fold(seed=1, annotations=["Happy", "Sad"])
    corpus = read_mmsa(tmp_path, train, valid=valid)
    assert corpus.classes == ("happy", "sad")
    assert corpus.target.tolist() == [1, -100, 0, 1]


MISSING = [None, np.nan, float("nan"), np.float32("nan"), "", "  ", b"", "nan", "NaN", "None", "null", "NA", "<NA>"]


@pytest.mark.parametrize("missing", MISSING, ids=repr)
def test_a_missing_annotation_is_no_label_and_no_class(tmp_path, missing):
    corpus = read_mmsa(tmp_path, mmsa_fold(annotations=np.array(["Positive", missing], dtype=object)))
    assert corpus.classes == ("negative", "neutral", "positive")
    assert corpus.target.tolist() == [POSITIVE, -100, POSITIVE, NEGATIVE]
    assert corpus.labelled.tolist() == [True, False, True, True]


def test_pandas_na_is_no_label():
    pandas = pytest.importorskip("pandas")
    column = pandas.array(["Sad ", None, "sad"], dtype="string")
    assert [label_name(value) for value in column] == ["sad", None, "sad"]
    assert label_name(pandas.NaT) is None


@pytest.mark.parametrize("spelled", ["Positive", "POSITIVE", " positive\n", b"Positive", np.str_("positive")], ids=repr)
def test_annotations_in_bytes_with_space_or_in_another_case_are_the_same_class(tmp_path, spelled):
    corpus = read_mmsa(tmp_path, mmsa_fold(annotations=[spelled, "Negative"]))
    assert corpus.target.tolist() == [POSITIVE, NEGATIVE] * 2


@pytest.mark.parametrize("missing", [np.nan, None])
@pytest.mark.parametrize("key", ["classification_labels", "regression_labels"])
def test_a_missing_number_is_no_label(tmp_path, key, missing):
    def fold(seed):
        kinds = ("annotations", "classification_labels", "regression_labels")
        return mmsa_fold(seed=seed, **dict.fromkeys(kinds)) | {key: np.array([2.0, missing], dtype=object)}

    corpus = read_mmsa(tmp_path, fold(0), valid=fold(1))
    assert corpus.target.tolist() == [POSITIVE, -100] * 2


def test_ids_in_bytes_are_texts_and_a_missing_one_is_named(tmp_path):
    corpus = read_mmsa(tmp_path, mmsa_fold(id=[b"vid0$_$0", np.bytes_(b"vid0$_$1")]))
    assert corpus.ids.tolist()[:2] == ["vid0$_$0", "vid0$_$1"]
    assert corpus.group.tolist()[:2] == ["vid0", "vid0"]
    with pytest.raises(CorpusError, match="train: id has nothing in row 1"):
        read_mmsa(tmp_path, mmsa_fold(id=["a", None]))


@pytest.mark.parametrize(
    "names", [("train", "dev", "eval"), ("TRAIN", "Validation", "TEST"), ("training", "val", "test")]
)
@pytest.mark.parametrize("reader", [mmsa_pickle, mult_pickle])
def test_the_usual_names_of_splits_are_keys(tmp_path, reader, names):
    folds = [mmsa_fold(seed=seed) if reader is mmsa_pickle else mult_fold(PAIRS, seed=seed) for seed in range(3)]
    corpus = reader.read(write_pickle(tmp_path / "m.pkl", dict(zip(names, folds, strict=True)) | {"note": 1}))
    assert corpus.split.tolist() == ["train"] * 2 + ["valid"] * 2 + ["test"] * 2
    with pytest.raises(CorpusError, match="several keys for train"):
        reader.read(write_pickle(tmp_path / "m.pkl", {"train": folds[0], "Training": folds[1]}))


def test_mmsa_without_labels(tmp_path):
    nothing = dict.fromkeys(("annotations", "classification_labels", "regression_labels"))
    corpus = read_mmsa(tmp_path, mmsa_fold(**nothing), valid=mmsa_fold(seed=1, **nothing))
    assert corpus.target is None


def test_mmsa_attention_mask_marks_padding_of_text(tmp_path):
    mask = np.ones((2, 3, 4))
    mask[0, 1, 2:] = 0
    fold = mmsa_fold(text_bert=mask)
    fold["audio"][0, 2:] = fold["vision"][0, 2:] = 0
    corpus = read_mmsa(tmp_path, fold)
    assert corpus.lengths.tolist() == [2, 4, 4, 4]
    assert not corpus.features["text"][0, 2:].any()


def test_mmsa_unaligned_frames_are_averaged_over_the_words(tmp_path):
    audio = np.zeros((2, 9, 1))
    audio[0, :6, 0] = [1, 3, 10, 20, 7, 9]
    audio[1, :2, 0] = [5, 6]
    mask = np.ones((2, 3, 4))
    mask[0, 1, 3:] = 0
    fold = mmsa_fold(text_bert=mask, audio=audio, audio_lengths=[6, 2], vision_lengths=[0, 4])
    valid = mmsa_fold(seed=1, audio=audio, audio_lengths=[9, 9])
    corpus = read_mmsa(tmp_path, fold, valid=valid)
    assert corpus.lengths.tolist() == [3, 4, 4, 4]
    np.testing.assert_allclose(corpus.features["audio"][0, :, 0], [2, 15, 8, 0])  # two frames per word
    np.testing.assert_allclose(corpus.features["audio"][1, :, 0], [5, 5, 6, 6])  # half a frame per word
    np.testing.assert_allclose(corpus.features["audio"][2, :, 0], [2, 15, 8, 0])  # ⌊9/4⌋: 2, 2, 2 and 3 frames
    assert corpus.available.tolist() == [[True, True, False], [True] * 3, [True] * 3, [True] * 3]


def test_mmsa_modality_of_zeros_is_unavailable_whatever_its_length_says(tmp_path):
    fold = mmsa_fold(audio_lengths=[4, 4])
    fold["audio"][1] = 0
    corpus = read_mmsa(tmp_path, fold)
    assert corpus.available[:, 1].tolist() == [True, False, True, True]


def test_steps_cut_every_utterance_into_equal_parts(tmp_path):
    path = write_pickle(tmp_path / "m.pkl", {"train": mmsa_fold(steps=4)})
    text = mmsa_fold(steps=4)["text"]
    corpus = mmsa_pickle.read(path, steps=2)
    assert corpus.lengths.tolist() == [2, 2]
    np.testing.assert_allclose(corpus.features["text"], text.reshape(2, 2, 2, 6).mean(axis=2), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_lengths": [5, 1]}, "train: audio_lengths: 5 for 'vid0\\$_\\$0', wanted an integer in 0..4"),
        ({"audio_lengths": [1]}, "train: audio_lengths has 1 entries, wanted 2"),
        ({"vision": np.zeros((3, 4, 2))}, r"train: modalities differ in rows: .*'vision': 3"),
        ({"vision": np.zeros((2, 4))}, r"train: vision has shape \(2, 4\)"),
        ({"vision": "abc"}, "train: vision: not a rectangular array of numbers"),
        ({"vision": np.zeros((2, 4, 5))}, "'vision' has 5 features in one part and 2"),
        ({"text_bert": np.ones((2, 4))}, r"train: text_bert has shape \(2, 4\)"),
        ({"annotations": ["Positive"]}, "train: annotations has 1 entries, wanted 2"),
        ({"id": ["a"]}, "train: id has 1 entries, wanted 2"),
        ({"id": ["a", "a"]}, "'a' occurs 2 times"),
    ],
)
def test_mmsa_contradictions_are_named(tmp_path, changes, message):
    with pytest.raises(CorpusError, match=message) as caught:
        read_mmsa(tmp_path, mmsa_fold(**changes))
    assert str(tmp_path / "m.pkl") in str(caught.value)


def test_mmsa_label_out_of_range_is_named(tmp_path):
    nothing = {"annotations": None}
    with pytest.raises(CorpusError, match="train: classification_labels: 3 in row 1, wanted 0, 1 or 2"):
        read_mmsa(
            tmp_path,
            mmsa_fold(classification_labels=[0, 3], **nothing),
            valid=mmsa_fold(seed=1, **nothing),
        )


@pytest.mark.parametrize("module", [mmsa_pickle, mult_pickle, iemocap_pickle])
def test_hostile_pickles_are_refused_by_name(tmp_path, module):
    path = write_pickle(tmp_path / "m.pkl", {"train": {"text": Hostile(os.system, "true")}})
    with pytest.raises(CorpusError, match="system, which is refused"):
        module.read(path)


@pytest.mark.parametrize("module", [mmsa_pickle, mult_pickle])
@pytest.mark.parametrize(
    "value", [[1], {}, {"a": 1}, {"train": 3}, {"train": {"x": 1}}, {"train": {"text": np.zeros((0, 4, 3))}}]
)
def test_other_structures_are_refused(tmp_path, module, value):
    with pytest.raises(CorpusError, match=r"wanted a dict|holds no utterance"):
        module.read(write_pickle(tmp_path / "m.pkl", value))


PAIRS = np.eye(2)[np.array([[0, 1, 0, 1], [1, 0, 0, 0]])]  # (2, 4, 2): happy and angry; neutral


def test_mult_iemocap_pairs_are_yes_no_questions(tmp_path):
    path = write_pickle(tmp_path / "m.pkl", {"train": mult_fold(PAIRS), "test": mult_fold(PAIRS, seed=1)})
    corpus = mult_pickle.read(path)
    assert corpus.task == "multi"
    assert corpus.classes == ("neutral", "happy", "sad", "angry")
    assert corpus.target.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]] * 2
    assert corpus.ids.tolist() == ["train_00000", "train_00001", "test_00000", "test_00001"]
    assert corpus.group is None


def test_mult_left_padding_becomes_right_padding(tmp_path):
    fold = mult_fold(PAIRS)
    for name in ("text", "audio", "vision"):
        fold[name][0, :2] = 0
    fold["audio"][1, 1] = 0
    fold["audio"][1, 2, 0] = -np.inf
    corpus = mult_pickle.read(write_pickle(tmp_path / "m.pkl", {"train": fold}))
    assert corpus.lengths.tolist() == [2, 4]
    np.testing.assert_array_equal(corpus.features["text"][0, :2], fold["text"][0, 2:].astype(np.float32))
    np.testing.assert_array_equal(corpus.features["audio"][1], fold["audio"][1].astype(np.float32))


def test_mult_sentiment_scores_take_their_sign(tmp_path):
    scores = np.array([-0.2, 0, 3])
    ids = np.array([["vid_1", "0.5", "2"], ["vid_1", "2", "3"], ["w", "0", "1"]], dtype=object)
    fold = mult_fold(scores[:, None, None], rows=3, id=ids)
    corpus = mult_pickle.read(write_pickle(tmp_path / "m.pkl", {"train": fold}))
    assert corpus.classes == ("negative", "neutral", "positive")
    assert corpus.target.tolist() == [NEGATIVE, NEUTRAL, POSITIVE]
    assert corpus.ids.tolist() == ["vid_1_0.5_2", "vid_1_2_3", "w_0_1"]
    assert corpus.group.tolist() == ["vid_1", "vid_1", "w"]


def test_mult_ids_of_one_column_and_missing_scores(tmp_path):
    fold = mult_fold([[-1.0], [np.nan]], id=np.array([["v[3]"], ["v[4]"]]))
    corpus = mult_pickle.read(write_pickle(tmp_path / "m.pkl", {"train": fold}))
    assert corpus.ids.tolist() == ["v[3]", "v[4]"]
    assert corpus.group.tolist() == ["v", "v"]
    assert corpus.target.tolist() == [NEGATIVE, -100]


def test_mult_unaligned_frames_are_averaged_over_the_words(tmp_path):
    fold = mult_fold(PAIRS, audio_steps=10)
    fold["text"][0, :2] = 0  # two words, on the right
    fold["audio"][0, :6] = 0  # four frames, on the right
    fold["vision"][0] = 0
    corpus = mult_pickle.read(write_pickle(tmp_path / "m.pkl", {"train": fold}))
    assert corpus.lengths.tolist() == [2, 4]
    assert corpus.available.tolist() == [[True, True, False], [True] * 3]
    expected = fold["audio"][0, 6:].reshape(2, 2, 2).mean(axis=1)
    np.testing.assert_allclose(corpus.features["audio"][0, :2], expected, rtol=1e-6)


def test_a_mult_row_of_nan_has_no_label(tmp_path):
    pairs = PAIRS.copy()
    pairs[1] = np.nan
    corpus = mult_pickle.read(write_pickle(tmp_path / "m.pkl", {"train": mult_fold(pairs)}))
    np.testing.assert_array_equal(corpus.target, [[0, 1, 0, 1], [np.nan] * 4])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 4, 2)), r"'train_00000', wanted four pairs \(no, yes\)"),
        (np.zeros((2, 3)), r"labels has shape \(2, 3\)"),
        (np.array([0.0, 1.0]), "every label is 0 or 1"),
    ],
)
def test_mult_labels_of_no_known_kind_are_refused(tmp_path, labels, message):
    with pytest.raises(CorpusError, match=message):
        mult_pickle.read(write_pickle(tmp_path / "m.pkl", {"train": mult_fold(labels)}))


@pytest.mark.parametrize("variant", [9, 10, 12])
def test_iemocap_variants(tmp_path, variant):
    members = iemocap_members(variant)
    corpus = iemocap_pickle.read(write_pickle(tmp_path / "i.pkl", members, protocol=2))
    assert corpus.classes == ("happy", "sad", "neutral", "angry", "excited", "frustrated")
    assert corpus.target.tolist() == [0, 5, 2, 1, 3, 4]
    assert corpus.group.tolist() == ["Ses01F_a"] * 2 + ["Ses02M_b"] + ["Ses05F_c"] * 3
    assert corpus.split.tolist() == ["train"] * 2 + ["valid" if variant == 10 else "train"] + ["test"] * 3
    assert corpus.input_dims == ({"text": 4} if variant == 10 else {"text": 4, "audio": 3, "visual": 2})
    assert corpus.lengths.tolist() == [1] * 6
    assert corpus.ids[0] == ("Ses01F_a_000" if variant == 10 else "Ses01F_a_F000")
    first = members[3]["Ses01F_a"][0] if variant == 9 else None
    if first is not None:
        np.testing.assert_array_equal(corpus.features["text"][0, 0], first)
    else:
        layers = members[2:6] if variant == 10 else members[3:7]
        mean = np.mean([layer["Ses05F_c"][2] for layer in layers], axis=0)
        np.testing.assert_allclose(corpus.features["text"][5, 0], mean, rtol=1e-6)


@pytest.mark.parametrize("size", [0, 8, 11, 13])
def test_iemocap_tuples_of_other_lengths_are_refused(tmp_path, size):
    with pytest.raises(CorpusError, match=f"wanted a tuple of 9, 10, 12 members, got {size} members"):
        iemocap_pickle.read(write_pickle(tmp_path / "i.pkl", tuple({} for _ in range(size))))


def test_melds_tuple_says_that_it_is_melds(tmp_path):
    ids, speakers, labels, text, audio, _, sentences, train, test = iemocap_members()
    meld = (ids, speakers, labels, text, audio, sentences, train, test, labels)
    with pytest.raises(CorpusError, match="this is MELD's tuple of 9 members"):
        iemocap_pickle.read(write_pickle(tmp_path / "i.pkl", meld))


def test_iemocap_contradictions_are_named(tmp_path):
    def read(change):
        members = list(iemocap_members())
        change(members)
        iemocap_pickle.read(write_pickle(tmp_path / "i.pkl", tuple(members)))

    with pytest.raises(CorpusError, match=r"labels of 'Ses02M_b' are \[6.0\], wanted classes in 0..5"):
        read(lambda members: members[2].update(Ses02M_b=[6]))
    with pytest.raises(CorpusError, match="audio has nothing for dialogue 'Ses02M_b'"):
        read(lambda members: members[4].pop("Ses02M_b"))
    with pytest.raises(CorpusError, match=r"text of 'Ses01F_a' has shape \(1, 4\), wanted \(2, d\)"):
        read(lambda members: members[3]["Ses01F_a"].pop())
    with pytest.raises(CorpusError, match=r"text of 'Ses02M_b' has shape \(1, 5\), wanted \(1, 4\)"):
        read(lambda members: members[3].update(Ses02M_b=[np.zeros(5)]))
    with pytest.raises(CorpusError, match="dialogue 'Ses01F_a' has 2 labels but 1 ids"):
        read(lambda members: members[0]["Ses01F_a"].pop())
    with pytest.raises(CorpusError, match="member audio is a list, wanted a dict"):
        read(lambda members: members.__setitem__(4, []))
    with pytest.raises(CorpusError, match="splits name no dialogue"):
        read(lambda members: (members[7].clear(), members[8].clear()))
