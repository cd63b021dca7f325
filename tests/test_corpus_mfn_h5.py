"""MFN's .h5 files: padding, missing modalities, labels of every kind, hostile HDF5."""

import numpy as np
import pytest
from corpus_fixtures import assert_same, real_data

from m3er_fast.corpus import CorpusError
from m3er_fast.corpus.mfn_h5 import read

h5py = pytest.importorskip("h5py")

STEPS, DIMS = 5, {"text_{}_emb.h5": 4, "audio_{}.h5": 3, "video_{}.h5": 2}


def save(path, value, key="d1"):
    with h5py.File(path, "w") as file:
        file[key] = value


def write_split(folder, split, rows, labels, seed=0):
    rng = np.random.default_rng(seed)
    for pattern, dim in DIMS.items():
        save(folder / pattern.format(split), rng.standard_normal((rows, STEPS, dim)))
    save(folder / f"y_{split}.h5", labels)


@pytest.fixture
def folder(tmp_path):
    write_split(tmp_path, "train", 3, np.eye(3)[[0, 1, 2]])
    write_split(tmp_path, "test", 2, np.eye(3)[[2, 0]], seed=1)
    return tmp_path


def test_modalities_splits_and_one_hot_labels_are_read(folder):
    corpus = read(folder)
    assert corpus.input_dims == {"text": 4, "audio": 3, "video": 2}
    assert corpus.split.tolist() == ["train"] * 3 + ["test"] * 2
    assert corpus.classes == ("positive", "neutral", "negative")
    assert corpus.target.tolist() == [0, 1, 2, 2, 0]
    assert corpus.ids.tolist() == ["train_00000", "train_00001", "train_00002", "test_00000", "test_00001"]
    assert corpus.group is None
    with h5py.File(folder / "audio_test.h5") as file:
        np.testing.assert_array_equal(corpus.features["audio"][3:], file["d1"][()].astype(np.float32))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_becomes_right_padding_and_inner_zeros_stay(folder, side):
    frames = np.array([[1.0], [0.0], [2.0]])
    padding = np.zeros((2, 1))
    sequence = np.concatenate([padding, frames] if side == "left" else [frames, padding])
    for name, scale in (("text_train_emb", 1), ("audio_train", -1)):
        save(folder / f"{name}.h5", np.stack([scale * sequence, np.ones((5, 1)), np.zeros((5, 1))]))
    (folder / "video_train.h5").unlink()
    for file in folder.glob("*_test*"):
        file.unlink()
    corpus = read(folder)
    assert corpus.lengths.tolist() == [3, 5, 0]
    np.testing.assert_array_equal(corpus.features["text"][0, :, 0], [1, 0, 2, 0, 0])
    np.testing.assert_array_equal(corpus.features["audio"][0, :, 0], [-1, 0, -2, 0, 0])


def test_frames_that_are_zero_in_one_modality_only_are_no_padding(folder):
    audio = np.ones((3, STEPS, 3))
    audio[0, :2] = 0
    audio[1] = 0
    save(folder / "audio_train.h5", audio)
    corpus = read(folder)
    assert corpus.lengths.tolist() == [STEPS] * 5
    assert corpus.available[:, 1].tolist() == [True, False, True, True, True]
    np.testing.assert_array_equal(corpus.features["audio"][0, :, 0], [0, 0, 1, 1, 1])


def test_non_finite_frames_are_kept_and_are_no_padding(folder):
    audio = np.zeros((3, STEPS, 3))
    audio[:, 0], audio[:, -1, 1] = -np.inf, np.nan
    save(folder / "audio_train.h5", audio)
    save(folder / "text_train_emb.h5", np.zeros((3, STEPS, 4)))
    save(folder / "video_train.h5", np.zeros((3, STEPS, 2)))
    corpus = read(folder)
    assert corpus.lengths[:3].tolist() == [STEPS] * 3
    assert np.isneginf(corpus.features["audio"][:3, 0]).all()
    assert np.isnan(corpus.features["audio"][:3, -1, 1]).all()


def test_a_modality_without_a_file_in_a_split_is_unavailable_there(folder):
    (folder / "text_train_emb.h5").unlink()
    corpus = read(folder)
    assert corpus.modalities == ("text", "audio", "video")
    assert corpus.available.tolist() == [[False, True, True]] * 3 + [[True] * 3] * 2
    assert not corpus.features["text"][:3].any()


def test_a_split_without_labels_has_none(folder):
    (folder / "y_test.h5").unlink()
    assert read(folder).target.tolist() == [0, 1, 2, -100, -100]


def test_the_older_joint_file_is_taken_apart(tmp_path):
    joint = np.random.default_rng(0).standard_normal((2, 3, 325))
    save(tmp_path / "X_train.h5", joint, key="data")
    save(tmp_path / "y_train.h5", np.array([-1.2, 0.4]), key="data")
    corpus = read(tmp_path)
    assert corpus.input_dims == {"text": 300, "audio": 5, "face": 20}
    np.testing.assert_array_equal(corpus.features["audio"], joint[:, :, 300:305].astype(np.float32))
    np.testing.assert_array_equal(corpus.features["face"], joint[:, :, 305:].astype(np.float32))
    assert corpus.classes == ("negative", "neutral", "positive")
    assert corpus.target.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("labels", "classes", "task", "target"),
    [
        (np.array([-3, 0, 0.2]), ("negative", "neutral", "positive"), "single", [0, 1, 2]),
        (np.array([[1.0], [3.5], [3.6]]), ("negative", "positive"), "single", [0, 0, 1]),
        (np.eye(4)[[3, 0, 1]], ("class_0", "class_1", "class_2", "class_3"), "single", [3, 0, 1]),
        (
            np.array([[0, 0.3, 0, 3, 0, 0], [0] * 6, [1, 0, 0, 0, 0, 0.6]]),
            ("anger", "disgust", "fear", "happy", "sad", "surprise"),
            "multi",
            [[0, 1, 0, 1, 0, 0], [0] * 6, [1, 0, 0, 0, 0, 1]],
        ),
        (np.array([[1, 7], [2, 7], [3, 1]]), ("trait_0", "trait_1"), "multi", [[0, 0], [0, 0], [1, 0]]),
    ],
)
def test_labels_become_classes_as_documented(tmp_path, labels, classes, task, target):
    write_split(tmp_path, "train", 3, labels)
    corpus = read(tmp_path)
    assert corpus.classes == classes
    assert corpus.task == task
    assert corpus.target.tolist() == target


def test_files_of_a_split_may_have_any_of_its_usual_names(folder):
    wanted = read(folder)
    for file in list(folder.glob("*train*")):
        file.rename(file.with_name(file.name.replace("train", "training")))
    assert_same(read(folder), wanted)


def test_traits_are_divided_by_the_medians_of_train(tmp_path):
    write_split(tmp_path, "train", 4, np.array([[1, 4], [2, 5], [3, 6], [4, 7]]))
    write_split(tmp_path, "test", 1, np.array([[2.6, 5.4]]))
    assert read(tmp_path).target[-1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.0, 1, 1]), "run from 0 to 1, neither signed sentiment nor"),
        (np.array([1.0, np.nan, 5]), r"y_train\.h5: row 1 is not finite"),
        (np.eye(3)[:2], r"y_train\.h5: has shape \(2, 3\), wanted \(3,\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, message):
    write_split(tmp_path, "train", 3, labels)
    with pytest.raises(CorpusError, match=message):
        read(tmp_path)


def test_contradictory_files_are_refused_by_name(folder, tmp_path):
    save(folder / "audio_train.h5", np.zeros((2, STEPS, 3)))
    with pytest.raises(CorpusError, match=r"audio_train\.h5: has 2 rows of 5 steps, but text_train_emb\.h5 has 3 of 5"):
        read(folder)
    save(folder / "audio_train.h5", np.zeros((3, 3)))
    with pytest.raises(CorpusError, match=r"audio_train\.h5: has shape \(3, 3\)"):
        read(folder)
    save(folder / "audio_train.h5", np.zeros((3, STEPS, 7)))
    with pytest.raises(CorpusError, match="'audio' has 7 features in one part and 3"):
        read(folder)


def hostile_external_link(path):
    save(path.with_name("secret.h5"), np.zeros((3, STEPS, 3)))
    with h5py.File(path, "w") as file:
        file["d1"] = h5py.ExternalLink("secret.h5", "/d1")


def hostile_soft_link(path):
    with h5py.File(path, "w") as file:
        file["other"] = np.zeros((3, STEPS, 3))
        file["d1"] = h5py.SoftLink("/other")


def hostile_virtual_dataset(path):
    save(path.with_name("secret.h5"), np.zeros((3, STEPS, 3)))
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout(shape=(3, STEPS, 3), dtype="f8")
        layout[:] = h5py.VirtualSource("secret.h5", "d1", shape=(3, STEPS, 3))
        file.create_virtual_dataset("d1", layout)


def hostile_external_storage(path):
    path.with_name("raw.bin").write_bytes(bytes(8 * 3 * STEPS * 3))
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "d1", (3, STEPS, 3), "f8", external=[(str(path.with_name("raw.bin")), 0, 8 * 3 * STEPS * 3)]
        )


def hostile_shape(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("d1", (10**9, 10**6, 3), "f8", chunks=(1, 10, 3), compression="gzip")


def hostile_objects(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("d1", (3,), dtype=h5py.ref_dtype)


def hostile_group(path):
    with h5py.File(path, "w") as file:
        file.create_group("d1")


def hostile_key(path):
    save(path, np.zeros(3), key="something")


def hostile_truncation(path):
    save(path, np.zeros((3, STEPS, 3)))
    path.write_bytes(path.read_bytes()[:-100])


def hostile_text(path):
    path.write_bytes(b"not HDF5")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hostile_external_link, "external link to 'secret.h5', which is refused"),
        (hostile_soft_link, "soft link to '/other', which is refused"),
        (hostile_virtual_dataset, "/d1 is a virtual dataset, which is refused"),
        (hostile_external_storage, "stored in another file, .*raw.bin.*refused"),
        (hostile_shape, r"declares shape \(1000000000, 1000000, 3\), more than the"),
        (hostile_objects, "/d1 holds object, wanted numbers or strings"),
        (hostile_group, "/d1 is not a dataset"),
        (hostile_key, "there is no /data"),
        (hostile_truncation, "not readable as HDF5"),
        (hostile_text, "not readable as HDF5"),
    ],
)
def test_hostile_or_broken_hdf5_is_refused_by_name(folder, make, message):
    file = folder / "audio_train.h5"
    file.unlink()
    make(file)
    with pytest.raises(CorpusError, match=message) as caught:
        read(folder)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_compressed_files_are_read(folder):
    value = np.zeros((3, STEPS, 3))
    value[:, 0] = 1
    with h5py.File(folder / "audio_train.h5", "w") as file:
        file.create_dataset("d1", data=value, compression="gzip", compression_opts=9)
    np.testing.assert_array_equal(read(folder).features["audio"][:3], value)


def test_a_folder_without_h5_files_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="holds none of"):
        read(tmp_path)
    with pytest.raises(CorpusError, match="not a folder"):
        read(tmp_path / "absent")


def test_the_real_youtube_files():
    folder = real_data("youtube_sequences")
    corpus = read(folder)
    assert corpus.input_dims == {"text": 300, "audio": 74, "video": 36}
    assert [len(corpus.subset(split)) for split in ("train", "valid", "test")] == [173, 36, 60]
    assert not corpus.subset("train").available[:, 0].any()
    assert np.bincount(corpus.subset("train").target).tolist() == [72, 43, 58]
    # Every valid frame of the file is kept: trimming moves rows, it loses none.
    for name, file in (("text", "text_test_emb"), ("audio", "audio_test"), ("video", "video_test")):
        with h5py.File(folder / f"{file}.h5") as stored:
            total = np.abs(stored["d1"][()]).sum(axis=(1, 2))
        kept = np.abs(corpus.subset("test").features[name]).sum(axis=(1, 2), dtype=np.float64)
        np.testing.assert_allclose(kept, total, rtol=1e-5)
