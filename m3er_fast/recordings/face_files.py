"""Features of the face that OpenFace or py-feat has written, one CSV file per recording.

Dimension legend: R rows of a file, N pictures, d features.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3er_fast.corpus.base import CorpusError, naming
from m3er_fast.corpus.files import decoding, is_hidden
from m3er_fast.recordings.decoding import Decoder, probe
from m3er_fast.recordings.face import choose_face
from m3er_fast.recordings.frames import Frames

_BEYOND_S = 0.5  # by which a row may lie after the end that a recording claims: headers round


class _Kind(NamedTuple):
    """The columns that a program writes."""

    needed: tuple[str, ...]
    units: Mapping[str, str]
    """Expression for the names of features -> their unit."""
    passed_over: str
    """Expression for the names of columns that are no feature."""
    wanted: str
    """The columns in words."""


_BOX = ("FaceRectX", "FaceRectY", "FaceRectWidth", "FaceRectHeight")

_KINDS = {
    "openface": _Kind(
        needed=("frame", "timestamp", "confidence", "success"),
        units={
            r"gaze_[01]_[xyz]": "share of a vector of length 1",
            r"gaze_angle_[xy]": "radians",
            r"pose_T[xyz]": "mm",
            r"pose_R[xyz]": "radians",
            r"AU\d\d_r": "intensity from 0 to 5",
        },
        passed_over=r"face_id|AU\d\d_c|(eye_lmk_)?[xyXYZ]_\d+|p_\w+",
        wanted="OpenFace's (frame, timestamp, confidence, success, AU.._r, pose_.., gaze_..)",
    ),
    "py-feat": _Kind(
        needed=("frame", "FaceScore", *_BOX),
        units={
            r"AU\d\d": "0 to 1",
            r"(?i:anger|contempt|disgust|fear|happiness|happy|neutral|sad|sadness|surprise)": "probability",
            r"valence|arousal": "-1 to 1",
            r"(brow|cheek|eye|jaw|mouth|nose|tongue)[A-Z]\w*|_neutral": "0 to 1",
            r"Pitch|Roll|Yaw|X|Y|Z": "as the version of py-feat has it",
            r"gaze_(pitch|yaw|angle)": "radians",
        },
        passed_over=r"Identity(_\d+)?|FrameHeight|FrameWidth|approx_time|input|(mesh_)?[xyz]_\d+",
        wanted="py-feat's (frame, FaceScore, FaceRect.., AU.., emotions)",
    ),
}

_ABOUT = (*dict.fromkeys(name for kind in _KINDS.values() for name in kind.needed), "face_id")  # tell what a row is


class FaceFiles:
    """Features of one face, as OpenFace or py-feat has written them.

    ``describe`` has their names and units. They are those columns of the file that tell expression, pose and gaze:

    * of OpenFace: ``AU.._r``, ``pose_..``, ``gaze_..``. Times are those of ``timestamp``. Of several faces, the
      ``face_id`` with the most valid rows is taken.
    * of py-feat: ``AU..``, emotions, ``Pitch``, ``Roll``, ``Yaw``, and blendshapes and gaze where there are any. A row
      has the time of the picture of the recording with the number ``frame``, because ``approx_time`` is in whole
      seconds. Of several faces in a picture the largest comes first, and is followed by overlap.

    Landmarks, presence of action units and identities are passed over. A row without ``success``, or with a confidence
    (``FaceScore``) below ``least_confidence``, is one of NaN.

    Args:
        path: a folder with one CSV file per recording, which has the recording's name; or a file, for one recording.
        recordings: the folder of the recordings: ``day/talk.mp4`` below it has ``day/talk.csv`` below ``path``. None
            looks for ``talk.csv`` in ``path``.
        least_confidence: from 0 to 1.

    Raises:
        CorpusError: if there is no file, or the first one is neither program's.
        ValueError: if ``least_confidence`` is out of range.
    """

    kinds = tuple(_KINDS)

    def __init__(
        self, path: str | Path, recordings: str | Path | None = None, *, least_confidence: float = 0.75
    ) -> None:
        if not 0 <= least_confidence <= 1:
            raise ValueError(f"least_confidence must be from 0 to 1, got {least_confidence!r}")
        self._path = Path(path).absolute()
        self._recordings = None if recordings is None else Path(recordings).absolute()
        self._least_confidence = least_confidence
        first = self._path
        if first.is_dir():
            files = (file for file in sorted(first.rglob("*.csv")) if not is_hidden(file.name))
            first = next(files, first)
        if not first.is_file():
            raise CorpusError(f"{path}: wanted a folder of CSV files that OpenFace or py-feat wrote, or one such file")
        self._first = first
        with _rows(first) as rows:
            self._kind, self._names = _kind_of(next(rows))
        self.dimension = len(self._names)

    def describe(self) -> dict[str, Any]:
        """Return everything that the features depend on but the files, as JSON."""
        return {
            "features": self._kind,
            "names": list(self._names),
            "units": [_unit(_KINDS[self._kind], name) for name in self._names],
            "least_confidence": self._least_confidence,
        }

    def file_of(self, recording: Path) -> Path | None:
        """Return the file of a recording, or None if there is none."""
        if self._path.is_file():
            return self._path
        name = recording.name if self._recordings is None else recording.absolute().relative_to(self._recordings)
        found = (self._path / name).with_suffix(".csv")
        return found if found.is_file() else None

    def extract(self, recording: Path) -> Frames | None:
        """Return the features of a recording; None if it has neither a file nor pictures.

        Raises:
            CorpusError: if it has pictures but no file, or the file cannot be read, has other columns than the first
                one, or goes on after the end of the recording.
        """
        header, file = probe(recording), self.file_of(recording)
        if file is None:
            if header.has_pictures:
                raise CorpusError(f"{self._path} has no {recording.stem}.csv, the features of the face")
            return None
        with naming(file):
            frames = self._read(file, recording)
            last = float(frames.times.max(initial=0.0))
            if header.seconds and last > header.seconds + _BEYOND_S:
                raise CorpusError(
                    f"it goes on until {last:.2f} s, but {recording.name} ends at {header.seconds:.2f} s: is it of "
                    "another recording, or one whose frame rate varies?"
                )
        frames.report["ends"] = round(last, 3)
        return frames

    def _read(self, file: Path, recording: Path) -> Frames:
        with _rows(file) as rows:
            columns = next(rows)
            kind, names = _kind_of(columns)
            if (kind, names) != (self._kind, self._names):
                other = f"it is {kind}'s" if kind != self._kind else f"it {_difference(names, self._names)}"
                raise CorpusError(f"{other}, unlike the first file of face features, {self._first.name}")
            table = _Table(columns, names, rows)
        if kind == "openface":
            return self._of_openface(table, file)
        return self._of_py_feat(table, file, recording)

    def _of_openface(self, table: _Table, file: Path) -> Frames:
        times = table["timestamp"]
        valid = (table["success"] == 1) & (table["confidence"] >= self._least_confidence)
        faces = table["face_id"] if "face_id" in table else np.zeros(len(times))
        seen = Counter(faces[valid].tolist())
        own = np.ones(len(times), bool)
        followed = None
        if len(seen) > 1:
            face, count = max(seen.items(), key=lambda item: (item[1], -item[0]))
            own = faces == face
            followed = f"face_id {face:.0f}, which has the most valid rows ({count})"
        if not np.isfinite(times).all():
            raise CorpusError("column 'timestamp' must be finite")
        values = np.where(valid[:, None], table.values, np.float32(np.nan))
        pictures = np.unique(table["frame"])
        per_picture = Counter(Counter(table["frame"][valid].tolist()).values())
        return Frames(times[own], values[own], _report(file, len(pictures), per_picture, followed))

    def _of_py_feat(self, table: _Table, file: Path, recording: Path) -> Frames:
        shown = np.array([time for time, _ in Decoder(recording, "video")])
        numbers = table["frame"]
        known = (numbers >= 0) & (numbers < len(shown)) & (numbers == np.floor(numbers))
        if not known.all():
            raise CorpusError(
                f"it has a row for picture {numbers[~known][0]:g}, but {recording.name} has {len(shown)} pictures"
            )
        valid = (table["FaceScore"] >= self._least_confidence) & np.isfinite(table.values).all(axis=1)
        left, top, width, height = (table[name] for name in _BOX)
        boxes = np.stack([left, top, left + width, top + height], axis=1)
        pictures = np.unique(numbers).astype(np.int64)
        values = np.full((len(pictures), self.dimension), np.nan, np.float32)
        per_picture: Counter[int] = Counter()
        box = None
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], pictures)
        for row, group in enumerate(np.split(order, starts[1:]) if len(pictures) else ()):
            rows = group[valid[group]]
            if not len(rows):
                continue
            per_picture[len(rows)] += 1
            chosen = rows[choose_face(boxes[rows], box)]
            box, values[row] = boxes[chosen], table.values[chosen]
        return Frames(shown[pictures], values, _report(file, len(pictures), per_picture, None))


class _Table:
    """The numbers of a file: R rows of the features, and of each other column that says what a row is."""

    def __init__(self, columns: Sequence[str], names: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
        about = [name for name in _ABOUT if name in columns]
        self._about = {name: number for number, name in enumerate(about)}
        places = [columns.index(name) for name in (*self._about, *names)]
        numbers = []
        for line, row in enumerate(rows, 2):
            if not row:
                continue
            with naming(f"line {line}"):
                if len(row) != len(columns):
                    raise CorpusError(f"it has {len(row)} cells, wanted {len(columns)}")
                numbers.append([_number(row[place], columns[place]) for place in places])
        self._numbers = np.array(numbers, dtype=np.float64).reshape(-1, len(places))

    @property
    def values(self) -> NDArray[np.float32]:
        """The features, (R, d)."""
        return self._numbers[:, len(self._about) :].astype(np.float32)

    def __contains__(self, name: str) -> bool:
        return name in self._about

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self._numbers[:, self._about[name]]


@contextmanager
def _rows(file: Path) -> Iterator[Iterator[list[str]]]:
    """Open a file, and yield its rows, of which the first has the names of its columns."""
    with (
        naming(file),
        decoding(file, "not readable as features of a face"),
        file.open(encoding="utf-8-sig", newline="") as text,
    ):
        rows = csv.reader(text, skipinitialspace=True)
        yield itertools.chain([[name.strip() for name in next(rows, [])]], rows)


def _kind_of(columns: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return which program writes these columns, and those of them that are features.

    Raises:
        CorpusError: if neither does.
    """
    for name, kind in _KINDS.items():
        if not set(kind.needed) <= set(columns):
            continue
        features = tuple(column for column in columns if _unit(kind, column) is not None)
        unknown = [
            column
            for column in columns
            if column not in (*features, *kind.needed) and not re.fullmatch(kind.passed_over, column)
        ]
        if unknown:
            raise CorpusError(f"column {unknown[0]!r} is unknown: wanted {kind.wanted}")
        twice = [column for column, count in Counter(columns).items() if count > 1]
        if twice:
            raise CorpusError(f"column {twice[0]!r} occurs twice")
        if not features:
            raise CorpusError(f"it has no feature: wanted {kind.wanted}")
        return name, features
    shown = ", ".join(columns[:8]) + (", …" if len(columns) > 8 else "")
    wanted = " or ".join(kind.wanted for kind in _KINDS.values())
    raise CorpusError(f"it has the columns {shown or 'of an empty file'}: wanted {wanted}")


def _unit(kind: _Kind, column: str) -> str | None:
    """Return the unit of a feature, or None if a column is none."""
    return next((unit for pattern, unit in kind.units.items() if re.fullmatch(pattern, column)), None)


def _difference(found: Sequence[str], wanted: Sequence[str]) -> str:
    lacking = [name for name in wanted if name not in found]
    more = [name for name in found if name not in wanted]
    parts = [f"lacks {', '.join(lacking)}"] * bool(lacking) + [f"has {', '.join(more)} besides"] * bool(more)
    return " and ".join(parts) or "has them in another order"


def _number(cell: str, column: str) -> float:
    if not cell.strip():
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise CorpusError(f"column {column!r} must be a number, got {cell!r}") from None


def _report(file: Path, pictures: int, per_picture: Mapping[int, int], followed: str | None) -> dict[str, Any]:
    """Return what the summary tells.

    Args:
        file: that was read.
        pictures: number of those that it has rows of.
        per_picture: faces in a picture -> such pictures.
        followed: which of several faces was taken; None for the one that was largest first.
    """
    without = pictures - sum(per_picture.values())
    report: dict[str, Any] = {
        "file": file.name,
        "pictures": pictures,
        "without_face": without,
        "faces": {str(count): number for count, number in sorted({0: without, **per_picture}.items()) if number},
    }
    return report if followed is None else {**report, "followed": followed}
