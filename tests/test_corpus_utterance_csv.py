"""Utterance CSV: rows aligned across modalities, labels that agree, one clear error otherwise."""

import numpy as np
import pytest
from corpus_fixtures import real_data

from m3er_fast.corpus import CorpusError
from m3er_fast.corpus.utterance_csv import read

AUDIO = [["1.5", "-2.0", "1"], ["0.25", "nan", "0"], ["-inf", "4e40", "1"]]
TEXT = [["7", "8", "9", "1"], ["0", "0", "0", "0"], ["1", "2", "3", "1"]]


def write(path, rows):
    path.write_text("".join(",".join(f'"{item}"' for item in row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "audio_train.csv", AUDIO)
    write(tmp_path / "text_train.csv", TEXT)
    write(tmp_path / "audio_test.csv", AUDIO[:2])
    index = 'id,transcript,label\nvid-a_1,"HELLO, YOU",1\nvid-a_2,NO,0\nv_b_10,,1\n'
    (tmp_path / "train_index.csv").write_text(index, encoding="utf-8")
    return tmp_path


def test_features_labels_ids_and_groups_are_read(folder):
    corpus = read(folder)
    assert corpus.input_dims == {"text": 3, "audio": 2}
    assert corpus.ids.tolist() == ["vid-a_1", "vid-a_2", "v_b_10", "test_00000", "test_00001"]
    assert corpus.group.tolist() == ["vid-a", "vid-a", "v_b", "test_00000", "test_00001"]
    assert corpus.split.tolist() == ["train"] * 3 + ["test"] * 2
    assert corpus.classes == ("negative", "positive")
    assert corpus.target.tolist() == [1, 0, 1, 1, 0]
    assert corpus.lengths.tolist() == [1] * 5
    np.testing.assert_array_equal(corpus.features["text"][0, 0], [7, 8, 9])


def test_non_finite_values_are_kept(folder):
    audio = read(folder).features["audio"][:3, 0]
    np.testing.assert_array_equal(audio, np.array([[1.5, -2], [0.25, np.nan], [-np.inf, np.inf]], np.float32))


def test_a_modality_without_a_file_in_a_split_is_unavailable_there(folder):
    assert read(folder).available.tolist() == [[True, True]] * 3 + [[False, True]] * 2


@pytest.mark.parametrize("name", ["val", "dev", "validation"])
def test_files_of_a_split_may_have_any_of_its_usual_names(folder, name):
    write(folder / f"audio_{name}.csv", AUDIO[:1])
    (folder / f"{name}_index.csv").write_text("id,transcript,label\nw_1,x,1\n", encoding="utf-8")
    corpus = read(folder)
    assert corpus.ids[corpus.split == "valid"].tolist() == ["w_1"]
    write(folder / "audio_valid.csv", AUDIO[:1])
    with pytest.raises(CorpusError, match=r"is audio of valid, as is audio_.*\.csv"):
        read(folder)


def test_hidden_files_beside_the_data_are_not_read(folder):
    (folder / "._audio_train.csv").write_bytes(b"\0\5\x16\7")
    (folder / "_audio_test.csv").write_bytes(b"x")
    assert read(folder).modalities == ("text", "audio")


def test_more_classes_are_numbered(tmp_path):
    write(tmp_path / "audio_train.csv", [["1", "0"], ["2", "2"]])
    assert read(tmp_path).classes == ("class_0", "class_1", "class_2")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("audio_train.csv", "", r"audio_train\.csv: is empty"),
        ("audio_train.csv", "1,2,1\n1,1\n3,4,1\n", r"audio_train\.csv: .*column.* changed from 3 to 2 at row 2"),
        ("audio_train.csv", "1,2,1\nx,2,0\n3,4,1\n", r"audio_train\.csv: could not convert string 'x'"),
        ("audio_train.csv", "1\n0\n1\n", r"audio_train\.csv: has one column"),
        ("audio_train.csv", "1,2,1\n1,1,0\n", r"audio_train\.csv: has 2 rows, but text_train\.csv has 3"),
        ("audio_train.csv", "1,2,1\n1,1,1\n3,4,0\n", r"audio_train\.csv: the label in row 2 .*not aligned"),
        ("text_train.csv", "1,2,1\n1,1,0.5\n3,4,1\n", r"text_train\.csv: the label in row 2 is 0\.5"),
        ("text_train.csv", "1,2,1\n1,1,nan\n3,4,1\n", r"text_train\.csv: the label in row 2 is nan"),
        ("text_train.csv", "1,2,1\n1,1,-1\n3,4,1\n", r"text_train\.csv: the label in row 2 is -1"),
        ("text_train.csv", "1,2,1\n1,1,1e18\n3,4,1\n", r"text_train\.csv: the label in row 2 is 1e\+18"),
        ("train_index.csv", "id,transcript,label\na,x,1\n", r"train_index\.csv: has 1 rows .* features have 3"),
        ("train_index.csv", "id,label\na,1\nb,1\nc,1\n", r"train_index\.csv: the label in row 2 is 1, .*not aligned"),
        ("train_index.csv", "name,label\na,1\nb,0\nc,1\n", r"train_index\.csv: row 1 has no id"),
        ("train_index.csv", "id,label\na,1\na,0\nc,1\n", r"'a' occurs 2 times"),
        ("audio_test.csv", "1,2,3,1\n", r"'audio' has 2 features in one part and 3"),
    ],
)
def test_contradictory_files_give_one_line_that_names_them(folder, file, content, message):
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_without_csv_files_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"holds no <modality>_<split>\.csv"):
        read(tmp_path)
    with pytest.raises(CorpusError, match="not a folder"):
        read(tmp_path / "absent")


def test_the_real_mosi_files():
    corpus = read(real_data("mosi_utterance"))
    assert corpus.input_dims == {"text": 100, "audio": 73, "video": 100}
    assert [len(corpus.subset(split)) for split in ("train", "valid", "test")] == [1447, 0, 752]
    assert corpus.available.all()
    assert corpus.ids[0] == "1DmNV9C1hbY_10"
    assert corpus.group[0] == "1DmNV9C1hbY"
    assert np.bincount(corpus.subset("test").target).tolist() == [285, 467]
    # The first and last number of the first line of audio_train.csv's features, as written there.
    assert corpus.features["audio"][0, 0, 0] == np.float32(174.95)
