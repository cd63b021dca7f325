"""Features of the face, by MediaPipe.

Dimension legend: N pictures, F faces.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3er_fast.recordings.decoding import Decoder, probe, read_pictures
from m3er_fast.recordings.frames import Frames
from m3er_fast.recordings.model_files import FACE_LANDMARKER, find
from m3er_fast.recordings.word_vectors import sha256

_WIDTH = 640  # pixels: a larger picture takes longer and finds no more of a face that talks to the camera
_MOST_FACES = 3
_SAME_FACE = 0.1  # the least intersection over union of a face with the same face in the picture before
_BLENDSHAPES = 51  # the first of 52, "_neutral", is a remainder
_POSE = ("yaw_degrees", "pitch_degrees", "roll_degrees", "x_cm", "y_cm", "z_cm", "area")


class FaceFeatures:
    """Expression, pose and place of one face, by MediaPipe's FaceLandmarker.

    A row per picture: 51 blendshapes from 0 to 1, named as Apple's ARKit names them (they are not the action units of
    FACET or OpenFace); ``yaw``, ``pitch`` and ``roll`` of the head in degrees; its place before the camera in
    centimetres; and the share of the picture that its landmarks cover.

    The largest face comes first. It is followed from picture to picture by overlap; where it is lost, the largest face
    is taken again. A picture without a face is a row of NaN.

    Args:
        per_second: the most pictures per second that are looked at; None looks at all.
        model: path of ``face_landmarker.task``; None fetches it once.

    Raises:
        ImportError: if MediaPipe is missing.
        OSError: if the model can neither be found nor fetched.
    """

    dimension = _BLENDSHAPES + len(_POSE)

    def __init__(self, per_second: float | None = 10.0, model: str | Path | None = None) -> None:
        _mediapipe()
        if per_second is not None and not (math.isfinite(per_second) and per_second > 0):
            raise ValueError(f"per_second must be positive, got {per_second!r}")
        self._per_second = per_second
        self._model = find(FACE_LANDMARKER, model)

    def describe(self) -> dict[str, Any]:
        """Return everything that the features depend on, as JSON."""
        return {
            "features": "mediapipe",
            "version": _mediapipe().__version__,
            "sha256": sha256(self._model),
            "per_second": self._per_second,
            "width": _WIDTH,
        }

    def extract(self, recording: Path) -> Frames | None:
        """Return the features of a recording; None if it has no pictures.

        Raises:
            CorpusError: if it cannot be read.
        """
        if not probe(recording).has_pictures:
            return None
        decoder = Decoder(recording, "video")
        times: list[float] = []
        rows: list[NDArray[np.float32] | None] = []
        faces_seen: dict[int, int] = {}
        names: Sequence[str] = ()
        with _silenced(), self._landmarker() as detect:
            box = None
            for picture in read_pictures(decoder, per_second=self._per_second, width=_WIDTH):
                found = detect(picture.time, picture.pixels)
                faces_seen[len(found.face_landmarks)] = faces_seen.get(len(found.face_landmarks), 0) + 1
                times.append(picture.time)
                if not found.face_landmarks:
                    rows.append(None)
                    continue
                boxes = _boxes(found.face_landmarks)
                chosen = choose_face(boxes, box)
                box = boxes[chosen]
                shapes = found.face_blendshapes[chosen][-_BLENDSHAPES:]
                names = [shape.category_name for shape in shapes]
                pose = _pose(np.asarray(found.facial_transformation_matrixes[chosen]))
                rows.append(np.array([*(shape.score for shape in shapes), *pose, _area(box)], dtype=np.float32))
        if not times:
            return None
        values = np.full((len(rows), self.dimension), np.nan, dtype=np.float32)
        for number, row in enumerate(rows):
            if row is not None:
                values[number] = row
        report = {
            "seconds": round(decoder.end, 3),
            "damaged_packets": decoder.damaged,
            "pictures": len(rows),
            "without_face": faces_seen.get(0, 0),
            "faces": {str(count): number for count, number in sorted(faces_seen.items())},
            "names": [*names, *_POSE],
        }
        return Frames(np.array(times), values, report)

    @contextmanager
    def _landmarker(self) -> Iterator[Any]:
        """Yield a function of time and picture. Each recording has one of its own: its timestamps must rise."""
        mediapipe = _mediapipe()
        vision = mediapipe.tasks.vision
        options = vision.FaceLandmarkerOptions(
            base_options=mediapipe.tasks.BaseOptions(model_asset_path=str(self._model)),
            running_mode=vision.RunningMode.VIDEO,
            num_faces=_MOST_FACES,
            output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
        )
        last = -1
        with vision.FaceLandmarker.create_from_options(options) as landmarker:

            def detect(time: float, pixels: NDArray[np.uint8]) -> Any:
                nonlocal last
                last = max(round(time * 1000), last + 1)
                image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels)
                return landmarker.detect_for_video(image, last)

            yield detect


@contextmanager
def _silenced() -> Iterator[None]:
    """Drop what is written to the standard error: MediaPipe's own notes, which no setting turns off."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nothing)
        os.close(kept)


def choose_face(boxes: NDArray[np.float64], before: NDArray[np.float64] | None) -> int:
    """Return which of F faces is the one that is followed.

    Args:
        boxes: (F, 4) left, top, right, bottom, with F ≥ 1.
        before: the box of the face in the picture before, or None.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    if before is None:
        return int(areas.argmax())
    overlap = np.minimum(boxes[:, 2:], before[2:]) - np.maximum(boxes[:, :2], before[:2])
    shared = np.prod(overlap.clip(min=0), axis=1)
    union = areas + np.prod(before[2:] - before[:2]) - shared
    same = shared / np.maximum(union, 1e-12)
    return int(same.argmax() if same.max() >= _SAME_FACE else areas.argmax())


def _boxes(faces: Sequence[Any]) -> NDArray[np.float64]:
    points = [np.array([(point.x, point.y) for point in face]) for face in faces]
    return np.array([np.concatenate([corners.min(axis=0), corners.max(axis=0)]) for corners in points])


def _area(box: NDArray[np.float64]) -> float:
    return float(np.prod(box[2:] - box[:2]))


def _pose(matrix: NDArray[np.float64]) -> tuple[float, ...]:
    """Return yaw, pitch and roll in degrees, and the place, of a 4 × 4 matrix that puts a face before the camera."""
    turn = matrix[:3, :3]
    yaw = math.atan2(-turn[2, 0], math.hypot(turn[2, 1], turn[2, 2]))
    pitch, roll = math.atan2(turn[2, 1], turn[2, 2]), math.atan2(turn[1, 0], turn[0, 0])
    return math.degrees(yaw), math.degrees(pitch), math.degrees(roll), *matrix[:3, 3].tolist()


def _mediapipe() -> Any:
    """Return the module ``mediapipe``.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import mediapipe
    except ImportError as error:
        raise ImportError("features of the face need MediaPipe: pip install 'm3er-fast[extract]'") from error
    return mediapipe
