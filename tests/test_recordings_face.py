"""Features of the face: whose face it is, its pose, and pictures without one."""

import contextlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

pytest.importorskip("av")

from recording_files import tone, write_recording

from m3er_fast.recordings import face as module
from m3er_fast.recordings import model_files
from m3er_fast.recordings.face import FaceFeatures, choose_face
from m3er_fast.recordings.summary import problems
from m3er_fast.recordings.utterances import extract_recording

SMALL, LARGE = [0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]


def test_the_largest_face_comes_first_and_is_followed():
    boxes = np.array([SMALL, LARGE])
    assert choose_face(boxes, None) == 1
    assert choose_face(boxes, np.array([0.12, 0.1, 0.22, 0.2])) == 0
    assert choose_face(boxes[::-1], np.array([0.12, 0.1, 0.22, 0.2])) == 1
    assert choose_face(boxes, np.array([0.0, 0.8, 0.1, 0.9])) == 1  # lost: the largest again
    assert choose_face(np.array([[0.5, 0.5, 0.5, 0.5]]), np.array([0.5, 0.5, 0.5, 0.5])) == 0


@pytest.mark.parametrize("angles", [(0, 0, 0), (30, 0, 0), (0, -20, 0), (0, 0, 45), (25, -15, 10)])
def test_the_pose_is_that_of_the_rotation(angles):
    matrix = np.eye(4)
    yaw, pitch, roll = angles
    matrix[:3, :3] = Rotation.from_euler("ZYX", [roll, yaw, pitch], degrees=True).as_matrix()
    matrix[:3, 3] = [1, 2, -50]
    np.testing.assert_allclose(module._pose(matrix), [*angles, 1, 2, -50], atol=1e-9)


def landmarks(box):
    left, top, right, bottom = box
    return [SimpleNamespace(x=left, y=top), SimpleNamespace(x=right, y=bottom)]


def result(*boxes):
    shapes = [[SimpleNamespace(score=(k + 1) / 100, category_name=f"shape{k}") for k in range(52)] for _ in boxes]
    return SimpleNamespace(
        face_landmarks=[landmarks(box) for box in boxes],
        face_blendshapes=shapes,
        facial_transformation_matrixes=[np.eye(4) for _ in boxes],
    )


@pytest.fixture
def extractor(monkeypatch, tmp_path):
    """An extractor that finds what a test says, picture by picture."""
    model = tmp_path / "model.task"
    model.write_bytes(b"model")
    monkeypatch.setattr(module, "_mediapipe", lambda: SimpleNamespace(__version__="1"))

    def make(results, per_second=None):
        found = FaceFeatures(per_second, model)
        remaining = iter(results)

        @contextlib.contextmanager
        def landmarker():
            yield lambda time, pixels: next(remaining)

        monkeypatch.setattr(found, "_landmarker", landmarker)
        return found

    return make


def noted(found):
    """What the summary of a run notes."""
    return problems({"seconds_claimed": None, "face": found.report})


def test_pictures_without_a_face_are_nan_and_counted(extractor, tmp_path):
    path = write_recording(tmp_path / "a.mp4", times=[0, 0.1, 0.2, 0.5])
    found = extractor([result(), result(SMALL), result(SMALL, LARGE), result()]).extract(path)
    assert noted(found) == ["more than one face: the one that was largest first was followed"]
    np.testing.assert_allclose(found.times, [0, 0.1, 0.2, 0.5], atol=1e-3)
    assert found.values.shape == (4, FaceFeatures.dimension)
    assert np.isnan(found.values[[0, 3]]).all()
    np.testing.assert_allclose(found.values[1, 50:52], [0.52, 0], atol=1e-6)
    np.testing.assert_allclose(found.values[1:3, -1], 0.01, atol=1e-6)  # the first face is followed, not the larger
    assert found.report["without_face"] == 2
    assert found.report["faces"] == {"0": 2, "1": 1, "2": 1}
    assert found.report["names"][0] == "shape1"


def test_a_video_without_a_face_and_a_recording_without_pictures(extractor, tmp_path):
    found = extractor([result()] * 2).extract(write_recording(tmp_path / "a.mp4", times=[0, 0.1]))
    assert found.values.shape == (2, FaceFeatures.dimension)
    assert np.isnan(found.values).all()
    assert noted(found) == ["no face"]
    assert extractor([]).extract(write_recording(tmp_path / "b.wav", sound=tone(0.1))) is None


def test_a_face_that_comes_late_has_nan_steps_before(extractor, tmp_path):
    path = write_recording(tmp_path / "a.mp4", times=np.arange(20) / 10)
    late = extractor([result()] * 8 + [result(SMALL)] * 12)
    found = extract_recording(path, {"face": late}, steps=0.5)
    assert found.corpus.available.tolist() == [[True]]
    lost = np.isnan(found.corpus.features["face"][0])
    assert lost.all(axis=1).tolist() == [True, False, False, False]  # the second step has faces from its middle on
    assert not lost[1:].any()
    assert found.report["missing_steps"] == {"face": 0.25}


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_bad_rates_are_named(extractor, rate):
    with pytest.raises(ValueError, match="per_second must be positive, got"):
        extractor([], rate)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("M3ER_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_is_fetched_once_and_checked(cache, monkeypatch):
    content = b"the model"
    model = model_files.ModelFile("a.task", "https://example.org/a.task", _digest(content), "MIT")
    fetched = []

    @contextlib.contextmanager
    def urlopen(address, timeout):
        fetched.append(address)
        yield SimpleNamespace(read=lambda: content)

    monkeypatch.setattr(model_files.urllib.request, "urlopen", urlopen)
    for _ in range(2):
        assert model_files.find(model).read_bytes() == content
    assert fetched == [model.address]
    (cache / "a.task").write_bytes(b"damaged")
    assert model_files.find(model).read_bytes() == content
    with pytest.raises(OSError, match=r"a\.task: what was fetched is another file than expected: download https"):
        model_files.find(model._replace(sha256="0" * 64))
    assert (cache / "a.task").read_bytes() == content


def test_no_model_and_no_network_is_one_line_that_says_how(cache, monkeypatch):
    def urlopen(address, timeout):
        raise model_files.urllib.error.URLError("no route to host")

    monkeypatch.setattr(model_files.urllib.request, "urlopen", urlopen)
    with pytest.raises(OSError, match=r"task cannot be fetched .*no route.*: download https.* by hand"):
        model_files.find(model_files.FACE_LANDMARKER)
    assert not cache.exists()


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none does not exist: wanted the file .*task, which is at https"):
        model_files.find(model_files.FACE_LANDMARKER, tmp_path / "none")


def _digest(content):
    import hashlib

    return hashlib.sha256(content).hexdigest()


MODEL = os.environ.get("M3ER_FAST_FACE_MODEL")


@pytest.mark.skipif(MODEL is None, reason="needs MediaPipe's model: set M3ER_FAST_FACE_MODEL to face_landmarker.task")
def test_a_real_face(tmp_path):
    pytest.importorskip("mediapipe")
    data = pytest.importorskip("skimage.data")
    portrait = data.astronaut()[:400]

    def picture(time):
        return np.ascontiguousarray(np.roll(portrait, round(20 * np.sin(3 * time)), axis=1))

    def late(time):
        return picture(time) if time >= 0.5 else np.zeros_like(portrait)

    times = np.arange(25) / 25
    found = FaceFeatures(10, MODEL).extract(
        write_recording(tmp_path / "a.mp4", times=np.arange(25) / 25, picture=picture)
    )
    assert found.report["faces"] == {"1": 10}
    assert np.isfinite(found.values).all()
    found = FaceFeatures(10, MODEL).extract(write_recording(tmp_path / "b.mp4", times=times, picture=late))
    assert np.isnan(found.values[:5]).all()
    assert np.isfinite(found.values[5:]).all()
