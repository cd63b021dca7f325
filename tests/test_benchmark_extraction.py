"""The measurement of extraction: its table is that of the page, and its figures are of what it measures."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from recording_files import tone, write_recording

from benchmarks.speed import extraction
from m3er_fast.recordings.decoding import Decoder, read_pictures

ROOT = Path(__file__).parents[1]


def test_the_table_of_the_page_is_that_of_the_results():
    result = json.loads((ROOT / "benchmarks" / "results" / "extraction-cpu-2-cores.json").read_text())
    page = (ROOT / "docs" / "recordings_features.md").read_text(encoding="utf-8")
    assert f"\n{extraction.table(result)}\n" in page


def test_seconds_are_of_all_recordings_and_times_of_the_cpu(tmp_path, monkeypatch):
    files = [write_recording(tmp_path / f"{name}.wav", sound=tone(1.0)) for name in "ab"]
    clock = iter([0, 1, 10, 12, 20, 26])
    monkeypatch.setattr(extraction.time, "process_time", lambda: next(clock))
    found = extraction.measured(lambda path: np.array([[1.0, np.nan], [2, 3]]), files, rounds=3)
    assert found == {
        "seconds": 2.0,
        "times_real_time": 1.0,
        "frames": 4,
        "features": 2,
        "missing": 0.5,
        "cpu_seconds": [1, 2, 6],
    }


def test_a_clip_is_repeated_in_larger_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "VIDEO_SECONDS", 1)
    clip = write_recording(tmp_path / "a.mp4", times=np.arange(5) / 10)
    large = extraction.enlarge(clip, tmp_path / "b.mp4", (160, 90))
    pictures = list(read_pictures(Decoder(large, "video"), per_second=None, width=640))
    np.testing.assert_allclose([picture.time for picture in pictures], np.arange(10) / 10, atol=1e-3)
    pixels = pictures[4].pixels
    assert pixels.shape == (90, 160, 3)
    assert abs(int(pixels[45, 80].mean()) - 4) < 4  # grey at 0.4 s
    assert pixels[:, :15].max() < 20  # 64 × 48 is 120 × 90 in the middle
