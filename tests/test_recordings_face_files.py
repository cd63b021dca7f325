"""Features of the face from the files of OpenFace and py-feat: which rows, whose face, at which times."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av")

from recording_files import tone, write_recording
from recording_problems import Letters

from m3er_fast.cli import main
from m3er_fast.corpus import read_parquet
from m3er_fast.corpus.base import CorpusError
from m3er_fast.execution.run_folder import OutputMismatchError
from m3er_fast.recordings import FaceFiles, extract
from m3er_fast.recordings.prediction import extractors_of
from m3er_fast.recordings.summary import problems

TIMES = (0.0, 0.1, 0.35, 0.4)  # of the pictures of a recording: their rate varies
OPENFACE = "frame, face_id, timestamp, confidence, success, gaze_0_x, pose_Rx, x_0, p_scale, AU01_r, AU01_c"
PY_FEAT = "FaceRectX,FaceRectY,FaceRectWidth,FaceRectHeight,FaceScore,x_0,AU01,AU12,anger,frame,approx_time,FrameHeight"


def openface(*rows):
    """The text of a file: (frame, face, time, confidence, success, AU01) of each row."""
    lines = [f"{f}, {face}, {t}, {c}, {s}, 0.5, 0.25, 9, 9, {au}, 1" for f, face, t, c, s, au in rows]
    return "\n".join([OPENFACE, *lines, ""])


def py_feat(*rows):
    """The text of a file: (frame, left, size, score, AU01) of each row."""
    lines = [f"{left},0,{size},{size},{score},9,{au},0.5,0.25,{f},00:00,240" for f, left, size, score, au in rows]
    return "\n".join([PY_FEAT, *lines, ""])


@pytest.fixture
def video(tmp_path):
    return write_recording(tmp_path / "a.mkv", times=TIMES, sound=tone(0.5))


@pytest.fixture
def read(video, tmp_path):
    def read_text(text, **options):
        (tmp_path / "a.csv").write_text(text)
        return FaceFiles(tmp_path / "a.csv", **options).extract(video)

    return read_text


def test_openface_rows_are_at_their_times_and_bad_ones_are_nan(read):
    text = openface(
        (1, 0, 0, 0.98, 1, 1.5), (2, 0, 0.1, 0.98, 0, 2.5), (3, 0, 0.2, 0.7, 1, 3.5), (4, 0, 0.3, 0.9, 1, 4.5)
    )
    found = read(text)
    np.testing.assert_allclose(found.times, [0, 0.1, 0.2, 0.3])
    np.testing.assert_allclose(found.values[[0, 3]], [[0.5, 0.25, 1.5], [0.5, 0.25, 4.5]])
    assert np.isnan(found.values[1:3]).all()
    assert found.report == {
        "file": "a.csv",
        "pictures": 4,
        "without_face": 2,
        "faces": {"0": 2, "1": 2},
        "ends": 0.3,
    }
    assert np.isfinite(read(text, least_confidence=0.7).values[2]).all()


def test_of_several_faces_openface_saw_one_most(read):
    rows = [(n, face, n / 10, 0.9 if (n, face) != (1, 3) else 0.1, 1, face) for n in range(4) for face in (3, 7)]
    found = read(openface(*rows))
    np.testing.assert_allclose(found.values[:, 2], 7)
    assert found.report["followed"] == "face_id 7, which has the most valid rows (4)"
    assert found.report["faces"] == {"1": 1, "2": 3}
    report = {"seconds": 0.5, "seconds_claimed": 0.5, "face": found.report}
    assert "more than one face: face_id 7, which has the most valid rows (4) was followed" in problems(report)


def test_py_feat_rows_have_the_times_of_their_pictures(read):
    # The large face at the left goes on; where it is lost, the largest that is left is taken.
    found = read(
        py_feat(
            *[(0, 0, 100, 0.99, 1), (0, 300, 50, 0.99, 2)],
            *[(1, 300, 110, 0.99, 2), (1, 10, 90, 0.99, 1)],
            (2, 0, 100, 0.3, 1),
            *[(3, 300, 100, 0.99, 2), (3, "", "", "", "")],
        )
    )
    np.testing.assert_allclose(found.times, TIMES, atol=1e-3)
    np.testing.assert_allclose(found.values[[0, 1, 3], 0], [1, 1, 2])
    assert np.isnan(found.values[2]).all()
    assert found.report["faces"] == {"0": 1, "1": 1, "2": 2}
    assert found.report["without_face"] == 1


def test_names_and_units_are_told(tmp_path):
    (tmp_path / "a.csv").write_text(openface())
    assert FaceFiles(tmp_path / "a.csv").describe() == {
        "features": "openface",
        "names": ["gaze_0_x", "pose_Rx", "AU01_r"],
        "units": ["share of a vector of length 1", "radians", "intensity from 0 to 5"],
        "least_confidence": 0.75,
    }
    (tmp_path / "b.csv").write_text(py_feat())
    described = FaceFiles(tmp_path / "b.csv").describe()
    assert (described["features"], described["names"]) == ("py-feat", ["AU01", "AU12", "anger"])
    assert FaceFiles(tmp_path / "b.csv").dimension == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has the columns of an empty file: wanted OpenFace's (frame, timestamp"),
        ("word,start,end\n", "it has the columns word, start, end: wanted OpenFace's"),
        (OPENFACE + ", mood\n", "column 'mood' is unknown: wanted OpenFace's"),
        (PY_FEAT + ",AU1\n", "column 'AU1' is unknown: wanted py-feat's"),
        (OPENFACE + ", AU01_r\n", "column 'AU01_r' occurs twice"),
        ("frame,timestamp,confidence,success\n", "it has no feature: wanted OpenFace's"),
        (openface((1, 0, 0, 0.9, 1, "much")), "line 2: column 'AU01_r' must be a number, got 'much'"),
        (openface((1, 0, "", 0.9, 1, 2)), "column 'timestamp' must be finite"),
        (OPENFACE + "\n1, 0\n", "line 2: it has 2 cells, wanted 11"),
        (openface((90, 0, 3, 0.9, 1, 2)), "it goes on until 3.00 s, but a.mkv ends at 0.5"),
        (py_feat((4, 0, 9, 0.9, 1)), "it has a row for picture 4, but a.mkv has 4 pictures"),
        (py_feat((0.5, 0, 9, 0.9, 1)), "it has a row for picture 0.5, but a.mkv has 4 pictures"),
        ("\0\n", "a.csv"),
        ("frame,\xff", "a.csv"),
    ],
)
def test_bad_files_are_one_error(read, text, message):
    with pytest.raises(CorpusError, match=re.escape(message)) as error:
        read(text)
    assert "a.csv" in str(error.value)


def test_rows_without_any_picture_of_a_face_are_no_fault(read):
    assert read(openface()).values.shape == (0, 3)
    assert read(py_feat()).values.shape == (0, 3)


@pytest.fixture
def folder(tmp_path):
    """Three recordings in a folder, one of them sound alone, and files of features in another."""
    for name in ("a.mkv", "day/a.mkv"):
        path = tmp_path / "recordings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_recording(path, times=TIMES, sound=tone(0.5))
    write_recording(tmp_path / "recordings" / "voice.wav", sound=tone(0.5))
    for number, name in enumerate(["a.csv", "day/a.csv"], 1):
        path = tmp_path / "features" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(openface(*[(n, 0, n / 10, 0.9, 1, number) for n in range(5)]))
    return tmp_path / "recordings"


def test_each_recording_has_its_file_and_a_run_notices_another(folder, tmp_path):
    features, out = tmp_path / "features", tmp_path / "out"

    def run(**options):
        return extract(folder, out, {"face": FaceFiles(features, folder)}, steps=0.25, **options)

    assert run().quarantined == ()
    corpus = read_parquet(out)
    found = {name: corpus.features["face"][row, :, 2] for row, name in enumerate(corpus.ids) if corpus.available[row]}
    np.testing.assert_array_equal(found["a"], [1, 1])
    np.testing.assert_array_equal(found["day/a"], [2, 2])
    assert set(found) == {"a", "day/a"}
    (features / "a.csv").write_text(openface((1, 0, 0, 0.9, 1, 4)))
    with pytest.raises(OutputMismatchError, match="changed since, or the file of its features"):
        run(resume=True)


def test_what_is_missing_or_differs_is_in_quarantine_by_name(folder, tmp_path):
    (tmp_path / "features" / "day" / "a.csv").write_text(py_feat())
    (folder / "b.mkv").write_bytes((folder / "a.mkv").read_bytes())
    summary = extract(
        folder, tmp_path / "out", {"face": FaceFiles(tmp_path / "features", folder)}, encoder=Letters(), steps=0.25
    )
    reasons = dict(summary.quarantined)
    assert reasons["b.mkv"].endswith("features has no b.csv, the features of the face")
    assert "it is py-feat's, unlike the first file of face features, a.csv" in reasons["day/a.mkv"]
    assert summary.extracted == 2
    (tmp_path / "features" / "day" / "a.csv").write_text(OPENFACE.replace("pose_Rx", "pose_Tx") + "\n")
    reasons = dict(
        extract(folder, tmp_path / "o", {"face": FaceFiles(tmp_path / "features", folder)}, steps=1).quarantined
    )
    assert "it lacks pose_Rx and has pose_Tx besides, unlike the first file" in reasons["day/a.mkv"]


def test_one_file_is_of_one_recording(folder, tmp_path, capsys):
    file = tmp_path / "features" / "a.csv"
    command = ["extract", str(folder), "--out", str(tmp_path / "out"), "--audio", "none", "--steps", "0.25"]
    assert main([*command, "--face-features", str(file)]) == 2
    assert "a.csv would be of " in capsys.readouterr().err
    command[1] = str(folder / "a.mkv")
    assert main([*command, "--face-features", str(file)]) == 0
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["settings"]["modalities"]["face"]["units"][2] == "intensity from 0 to 5"
    command = ["extract", str(folder), "--out", str(tmp_path / "other"), "--face-features", str(tmp_path / "none")]
    assert main(command) == 2
    assert "none: wanted a folder of CSV files that OpenFace or py-feat wrote" in capsys.readouterr().err


def test_a_model_takes_only_features_of_its_kind(tmp_path):
    (tmp_path / "a.csv").write_text(openface())
    (tmp_path / "b.csv").write_text(py_feat())
    described = FaceFiles(tmp_path / "a.csv", least_confidence=0.5).describe()
    model = SimpleNamespace(extraction={"steps": "words", "modalities": {"face": described}})
    found = extractors_of(model, face_features=tmp_path / "a.csv")[0]["face"]
    assert found.describe() == described
    with pytest.raises(ValueError, match="the model's face features are those of openface: name the file"):
        extractors_of(model)
    with pytest.raises(ValueError, match="another way than the model's: face: features is py-feat, wanted openface"):
        extractors_of(model, face_features=tmp_path / "b.csv")
    mediapipe = {"features": "mediapipe", "version": "1", "sha256": "0", "per_second": 10, "width": 640}
    model.extraction["modalities"]["face"] = mediapipe
    with pytest.raises(ValueError, match="face: features is openface, wanted mediapipe"):
        extractors_of(model, face_features=tmp_path / "a.csv")


def test_confidence_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"least_confidence must be from 0 to 1, got 75"):
        FaceFiles(tmp_path, least_confidence=75)
