"""CMU Multimodal SDK files: words are the time axis; all other frames are averaged over them."""

import numpy as np
import pytest
from corpus_fixtures import save_csd

from m3er_fast.corpus import CorpusError
from m3er_fast.corpus.csd import EMOTIONS, read

h5py = pytest.importorskip("h5py")


# Two utterances of video "v": 0-2 s with two words and a pause, 2-4 s with one word; one of "w" without any word.
WORDS = {"v": (np.array([[b"so"], [b"sp"], [b"good"], [b"yes"]]), [[0, 0.5], [0.5, 1.0], [1.0, 2.0], [2.0, 4.0]])}
GLOVE = {"v": (np.array([[1.0, 1], [0, 0], [2, 2], [3, 3]]), [[0, 0.5], [0.5, 1.0], [1.0, 2.0], [2.0, 4.0]])}
AUDIO = {
    "v": (np.array([[1.0], [3], [100], [7], [-np.inf]]), [[0, 0.25], [0.25, 0.5], [0.5, 1.0], [1.0, 1.5], [1.5, 2.0]]),
    "w": (np.array([[5.0], [9]]), [[0, 1], [1, 2]]),
}
LABELS = {
    "v": (np.array([[1.0, 0.4, 0, 0, 0, 3, 0], [-2, 0, 0, 0, 0, 0, 0]]), [[0, 2], [2, 4]]),
    "w": (np.array([[0.0, 0, 1, 0, 0, 0, 0]]), [[0, 2]]),
}
NAMES = ["sentiment", "happy", "sad", "anger", "surprise", "disgust", "fear"]


@pytest.fixture
def folder(tmp_path):
    save_csd(tmp_path, "words", "words", WORDS)
    save_csd(tmp_path, "glove", "glove_vectors", GLOVE)
    save_csd(tmp_path, "covarep", "COVAREP", AUDIO)
    save_csd(tmp_path, "all_labels", "All Labels", LABELS, {"dimension names": NAMES})
    return tmp_path


def test_utterances_are_the_rows_of_the_labels(folder):
    corpus = read(folder)
    assert corpus.ids.tolist() == ["v[0]", "v[1]", "w[0]"]
    assert corpus.group.tolist() == ["v", "v", "w"]
    assert corpus.task == "multi"
    assert corpus.classes == EMOTIONS == ("happy", "sad", "anger", "surprise", "disgust", "fear")
    assert corpus.target.tolist() == [[1, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert corpus.split is None


def test_frames_are_averaged_over_words_without_pauses(folder):
    corpus = read(folder, max_steps=2)
    assert corpus.modalities == ("text", "audio")
    assert corpus.lengths.tolist() == [2, 1, 2]
    np.testing.assert_array_equal(corpus.features["text"][0], [[1, 1], [2, 2]])
    # "so" covers the frames 1 and 3; "good" covers 7 and −inf, of which 7 alone counts; the pause's 100 is gone.
    np.testing.assert_array_equal(corpus.features["audio"][0, :, 0], [2, 7])


def test_a_modality_without_frames_is_unavailable_and_a_wordless_utterance_is_cut_evenly(folder):
    corpus = read(folder, max_steps=2)
    assert corpus.available.tolist() == [[True, True], [True, False], [False, True]]
    np.testing.assert_array_equal(corpus.features["audio"][2, :, 0], [5, 9])


def test_a_word_without_frames_of_a_modality_gets_zeros(folder):
    save_csd(folder, "facet", "FACET 4.2", {"v": (np.array([[4.0]]), [[1.2, 1.3]])})
    corpus = read(folder)
    assert corpus.modalities == ("text", "audio", "face")
    np.testing.assert_array_equal(corpus.features["face"][0, :2, 0], [0, 4])


def test_an_entry_that_is_not_finite_in_any_frame_is_nan(folder):
    save_csd(folder, "covarep", "COVAREP", {"v": (np.array([[-np.inf], [np.nan]]), [[0, 0.2], [0.2, 0.4]])})
    assert np.isnan(read(folder).features["audio"][0, 0, 0])


def test_without_a_word_file_the_text_sets_the_time_axis(folder):
    (folder / "words.csd").unlink()
    corpus = read(folder)
    assert corpus.lengths.tolist() == [3, 1, 50]
    np.testing.assert_array_equal(corpus.features["audio"][0, :3, 0], [2, 100, 7])


def test_longer_utterances_keep_their_first_words(folder):
    corpus = read(folder, max_steps=1)
    assert corpus.lengths.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(corpus.features["text"][0], [[1, 1]])
    with pytest.raises(ValueError, match="max_steps must be a positive int, got 0"):
        read(folder, max_steps=0)


def test_frames_out_of_order_are_sorted_by_time(folder):
    features, intervals = AUDIO["v"]
    save_csd(folder, "covarep", "COVAREP", {"v": (features[::-1], intervals[::-1])})
    np.testing.assert_array_equal(read(folder, max_steps=2).features["audio"][0, :, 0], [2, 7])


def test_aligned_files_name_the_utterance_themselves(tmp_path):
    axis = [[0, 1], [1, 2]]
    save_csd(
        tmp_path, "glove", "glove", {"v[0]": (np.array([[1.0], [2.0]]), axis), "v[7]": (np.array([[3.0], [4]]), axis)}
    )
    save_csd(tmp_path, "openface", "OpenFace_2", {"v[0]": (np.array([[5.0], [6.0]]), axis)})
    labels = {"v[0]": (np.array([[-1.5]]), [[10, 12]]), "v[7]": (np.array([[0.0]]), [[20, 22]])}
    save_csd(tmp_path, "labels", "Opinion Segment Labels", labels)
    corpus = read(tmp_path)
    assert corpus.ids.tolist() == ["v[0]", "v[7]"]
    assert corpus.group.tolist() == ["v", "v"]
    assert corpus.modalities == ("text", "face")
    np.testing.assert_array_equal(corpus.features["face"][:, :, 0], [[5, 6], [0, 0]])
    assert corpus.available.tolist() == [[True, True], [True, False]]
    assert corpus.classes == ("negative", "neutral", "positive")
    assert corpus.target.tolist() == [0, 1]


@pytest.mark.parametrize("missing", [np.full(7, np.nan), [1, 0, np.nan, 0, 0, 0, 0]])
def test_a_row_with_nan_among_its_emotions_has_no_label(folder, missing):
    values = LABELS["v"][0].copy()
    values[1] = missing
    save_csd(folder, "all_labels", "All Labels", {**LABELS, "v": (values, LABELS["v"][1])}, {"dimension names": NAMES})
    corpus = read(folder)
    np.testing.assert_array_equal(corpus.target, [[1, 0, 0, 0, 1, 0], [np.nan] * 6, [0, 1, 0, 0, 0, 0]])
    assert corpus.labelled.tolist() == [True, False, True]


def test_nan_in_a_column_that_is_not_read_is_no_matter(folder):
    values = LABELS["v"][0].copy()
    values[:, 0] = np.nan  # sentiment
    save_csd(folder, "all_labels", "All Labels", {**LABELS, "v": (values, LABELS["v"][1])}, {"dimension names": NAMES})
    assert read(folder).labelled.all()


NOTHING = [np.array([]), np.zeros((0, 1)), np.zeros((0, 7)), None]


@pytest.mark.parametrize("nothing", NOTHING, ids=["array([])", "(0, 1)", "(0, 7)", "Empty"])
@pytest.mark.parametrize("part", ["features", "intervals"])
@pytest.mark.parametrize("first", [True, False])
def test_a_video_without_features_has_none_and_the_others_have_theirs(folder, nothing, part, first):
    nothing = h5py.Empty("f8") if nothing is None else nothing
    with h5py.File(folder / "covarep.csd", "a") as file:
        name = "v" if first else "w"
        del file[f"COVAREP/data/{name}/{part}"]
        file[f"COVAREP/data/{name}/{part}"] = nothing
    corpus = read(folder, max_steps=2)
    assert corpus.input_dims == {"text": 2, "audio": 1}
    assert corpus.available[:, 1].tolist() == ([False, False, True] if first else [True, False, False])
    kept = corpus.features["audio"][2 if first else 0, :, 0]
    np.testing.assert_array_equal(kept, [5, 9] if first else [2, 7])
    assert not corpus.features["audio"][0 if first else 2].any()


def test_a_video_without_labels_has_no_utterance(folder):
    save_csd(
        folder, "all_labels", "All Labels", {**LABELS, "a": (np.array([]), np.array([]))}, {"dimension names": NAMES}
    )
    assert read(folder).ids.tolist() == ["v[0]", "v[1]", "w[0]"]


def test_a_file_without_any_frame_says_so(folder):
    save_csd(folder, "covarep", "COVAREP", {"v": (np.zeros((0, 10**9)), np.zeros((0, 2))), "w": (np.array([]), [])})
    with pytest.raises(CorpusError, match=r"covarep\.csd: none of its 2 entries has a frame"):
        read(folder)


def test_hidden_files_beside_the_data_are_not_read(folder):
    (folder / "._covarep.csd").write_bytes(b"\0\5\x16\7")
    (folder / "_labels.csd").write_bytes(b"")
    assert read(folder).modalities == ("text", "audio")


@pytest.mark.parametrize("key", ["dimension names", "dimension namescomputational sequence version"])
def test_dimension_names_order_the_classes_even_under_the_fused_key(folder, key):
    names = ["sentiment", *reversed(NAMES[1:])]
    save_csd(folder, "all_labels", "All Labels", LABELS, {key: names})
    assert read(folder).classes == tuple(names[1:])


@pytest.mark.parametrize("metadata", [{}, {"dimension names": None}, {"dimension names": ["a"]}])
def test_seven_columns_without_usable_names_are_moseis(folder, metadata):
    save_csd(folder, "all_labels", "All Labels", LABELS, metadata)
    assert read(folder).classes == EMOTIONS


def test_folds_split_videos_and_leave_out_the_others(folder):
    corpus = read(folder, folds={"train": ["w"], "test": []})
    assert corpus.ids.tolist() == ["w[0]"]
    assert corpus.split.tolist() == ["train"]
    assert read(folder, folds={"dev": ["w"], "Train": ["v"]}).split.tolist() == ["train", "train", "valid"]
    with pytest.raises(ValueError, match="folds: 'holdout' is not a split"):
        read(folder, folds={"holdout": ["w"]})
    with pytest.raises(CorpusError, match="holds no utterance of any fold"):
        read(folder, folds={"train": ["x"]})


def test_modalities_can_be_named(folder):
    save_csd(folder, "strange", "strange", AUDIO)
    with pytest.raises(CorpusError, match=r"strange\.csd: no modality is known by the name 'strange'"):
        read(folder)
    assert read(folder, modalities={"strange": "breath"}).modalities == ("text", "audio", "breath")
    with pytest.raises(CorpusError, match=r"strange\.csd: looks like audio, as does covarep\.csd"):
        read(folder, modalities={"strange": "audio"})


def test_files_can_be_listed(folder):
    files = [folder / "glove.csd", folder / "all_labels.csd"]
    assert read(files).modalities == ("text",)


@pytest.mark.parametrize(
    ("file", "root", "entries", "message"),
    [
        (
            "covarep",
            "COVAREP",
            {"v": (np.zeros((2, 1)), [[0, 1]])},
            r"covarep\.csd: intervals of 'v' have shape \(1, 2\)",
        ),
        ("covarep", "COVAREP", {"v": (np.zeros((1, 1, 1)), [[0, 1]])}, r"covarep\.csd: features of 'v' have shape"),
        (
            "covarep",
            "COVAREP",
            {"a": (np.zeros((1, 2)), [[0, 1]]), "v": (np.zeros((1, 3)), [[0, 1]])},
            r"covarep\.csd: 'v' has features \(1, 3\), wanted \(n, 2\)",
        ),
        ("covarep", "COVAREP", {}, r"covarep\.csd: there is no /COVAREP/data"),
        ("all_labels", "labels", {"v": (np.zeros((1, 3)), [[0, 1]])}, r"all_labels\.csd: labels have 3 columns"),
        ("all_labels", "labels", {"v[0]": (np.zeros((2, 1)), [[0, 1]] * 2)}, r"all_labels\.csd: 'v\[0\]' has 2 labels"),
    ],
)
def test_contradictory_files_are_refused_by_name(folder, file, root, entries, message):
    save_csd(folder, file, root, entries)
    with pytest.raises(CorpusError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_links_to_other_files_are_refused_by_name(folder):
    with h5py.File(folder / "covarep.csd", "r+") as file:
        del file["COVAREP/data/w"]
        file["COVAREP/data/w"] = h5py.ExternalLink("secret.h5", "/")
    with pytest.raises(CorpusError, match=r"covarep\.csd: /COVAREP/data/w is an external link to 'secret\.h5'"):
        read(folder)


@pytest.mark.parametrize("claimed", [0, 2**40])
def test_a_damaged_heap_of_strings_is_refused_in_a_file_of_any_size(folder, claimed):
    labels = folder / "all_labels.csd"
    content = labels.read_bytes()
    heap = content.index(b"GCOL")
    labels.write_bytes(content[: heap + 8] + claimed.to_bytes(8, "little") + content[heap + 16 :])
    with labels.open("r+b") as file:
        file.truncate(2**30 + 2**20)  # with a hole, which takes no space
    with pytest.raises(CorpusError, match=f"all_labels.csd: .* a heap of strings claims {claimed} bytes"):
        read(folder)


def test_missing_parts_are_named(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CorpusError, match=r"holds no \.csd file"):
        read(empty)
    with pytest.raises(CorpusError, match=r"absent\.csd: no such file"):
        read(empty / "absent.csd")
    with pytest.raises(CorpusError, match="holds labels but no features"):
        read([folder / "all_labels.csd", folder / "words.csd"])
    (folder / "all_labels.csd").unlink()
    with pytest.raises(CorpusError, match="no file is named labels"):
        read(folder)
