"""The outcome of damaged and odd recordings, from the folder to the corpus: the table of docs/recordings.md."""

import ast
import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from recording_files import tone, write_recording
from recording_problems import Letters, Loudness, Times, contents

from m3er_fast.corpus import read_parquet
from m3er_fast.recordings import extract, word_vectors

TESTS = Path(__file__).parent
PICTURES = np.arange(75) / 25

# What comes, as docs/recordings.md has it -> the test that shows what happens, in test_recordings_<file>.py.
TABLE = {
    "a video without sound": "faults::test_a_video_without_sound_has_no_audio",
    "sound that ends before the pictures": "faults::test_steps_after_the_end_of_the_sound_are_nan",
    "no face": "face::test_a_video_without_a_face_and_a_recording_without_pictures",
    "two faces": "face::test_pictures_without_a_face_are_nan_and_counted",
    "a face that comes late": "face::test_a_face_that_comes_late_has_nan_steps_before",
    "a frame rate that varies": "decoding::test_pictures_of_a_variable_rate_have_the_times_they_show",
    "a telephone held upright": "decoding::test_a_turned_telephone_gives_upright_pictures",
    "a file that is cut off": "faults::test_a_file_that_is_cut_off_is_read_to_its_end_and_that_is_told",
    "damaged packets": "decoding::test_damaged_packets_are_counted_and_what_follows_is_decoded",
    "an MP4 file without its index (`moov`)": "decoding::test_a_missing_index_is_refused_by_name",
    "a file that is no recording": "faults::test_what_is_no_recording_is_in_quarantine",
    "an empty transcript": "faults::test_an_empty_transcript_gives_no_steps_and_is_told",
    "words out of order, or overlapping": "faults::test_words_out_of_order_are_sorted_and_may_overlap",
    "words beyond the end": "utterances::test_words_beyond_the_end_are_steps_without_frames",
    "a short line of word vectors": "faults::test_a_short_line_of_vectors_costs_the_recordings_with_its_word",
    "100 ms of sound": "sound::test_short_sounds_have_rows",
    "a silent hour": "run::test_a_silent_hour_takes_less_than_600_megabytes",
    "a run that is killed": "faults::test_killed_at_ten_moments_and_resumed_leaves_the_same_bytes",
    "neither MediaPipe's model nor network": "face::test_no_model_and_no_network_is_one_line_that_says_how",
}


def test_each_row_of_the_page_has_its_test():
    page = (TESTS.parent / "docs" / "recordings.md").read_text(encoding="utf-8")
    table = page.split("\n## What goes wrong\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", table, re.MULTILINE)[1:]  # the first is the head
    assert rows == list(TABLE)
    for test in TABLE.values():
        file, name = test.split("::")
        tree = ast.parse((TESTS / f"test_recordings_{file}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    return folder


def run(folder, extractors=None, **options):
    """Extract sound, or what is named, and return the corpus, the summary and its page as text."""
    out = folder.parent / "out"
    found = extract(folder, out, extractors or {"audio": Loudness()}, **options)
    corpus = read_parquet(out) if found.extracted else None
    page = html.unescape(re.sub(r"<[^>]+>", " ", (out / "_summary.html").read_text(encoding="utf-8")))
    return corpus, found, " ".join(page.split())


def test_a_video_without_sound_has_no_audio(folder):
    write_recording(folder / "a.mp4", times=PICTURES)
    write_recording(folder / "b.mkv", times=PICTURES, sound=tone(3.0))
    corpus, _, page = run(folder, {"audio": Loudness(), "face": Times()}, steps=0.5)
    assert corpus.available.tolist() == [[False, True], [True, True]]
    assert not corpus.features["audio"][0].any()
    assert np.isfinite(corpus.features["audio"][1]).all()
    assert np.isfinite(corpus.features["face"]).all()
    assert page.count("no sound") == 1


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_steps_after_the_end_of_the_sound_are_nan(folder, suffix):
    write_recording(folder / f"a{suffix}", times=PICTURES, sound=tone(1.0))
    corpus, _, page = run(folder, {"audio": Loudness(), "face": Times()}, steps=0.5)
    assert corpus.lengths.tolist() == [6]
    lost = np.isnan(corpus.features["audio"][0, :, 0])
    assert lost.tolist() == [False] * 2 + [lost[2]] + [True] * 3  # AAC pads its last packet
    np.testing.assert_allclose(corpus.features["face"][0, :, 0], 0.5 * np.arange(6) + 0.24, atol=0.021)
    assert re.search(r"the sound ends at 1\.\d s of 3\.0 s", page)
    assert "the pictures end" not in page


def test_a_file_that_is_cut_off_is_read_to_its_end_and_that_is_told(folder):
    path = write_recording(folder / "a.mkv", times=PICTURES, sound=tone(3.0))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    corpus, _, page = run(folder, {"audio": Loudness(), "face": Times()}, steps=0.5)
    assert 2 <= corpus.lengths[0] <= 4
    assert re.search(r"the sound ends at [12]\.\d s of 3\.0 s; the pictures end at [12]\.\d s of 3\.0 s", page)


def test_what_is_no_recording_is_in_quarantine(folder):
    write_recording(folder / "a.wav", sound=tone(0.5))
    (folder / "b.mp4").write_text("not a recording")
    (folder / "c.wav").write_bytes(b"")
    corpus, found, page = run(folder, steps=0.1)
    assert list(corpus.ids) == ["a"]
    assert [name for name, _ in found.quarantined] == ["b.mp4", "c.wav"]
    assert page.count("is no recording that FFmpeg reads, or it is cut off") == 2


def test_an_empty_transcript_gives_no_steps_and_is_told(folder):
    for name, words in (("a", ""), ("b", "hello there")):
        write_recording(folder / f"{name}.wav", sound=tone(0.5))
        (folder / f"{name}.txt").write_text(words)
    corpus, found, page = run(folder, encoder=Letters())
    assert found.quarantined == ()
    assert corpus.lengths.tolist() == [0, 2]
    assert corpus.available.tolist() == [[False, False], [True, True]]
    assert page.count("no words") == 1


def test_words_out_of_order_are_sorted_and_may_overlap(folder):
    write_recording(folder / "a.mkv", times=PICTURES, sound=tone(3.0))
    (folder / "a.csv").write_text("word,start,end\nlast,2,3\nat,0,1\nmid,0.5,2.5\n")
    corpus, _, _ = run(folder, {"face": Times()}, encoder=Letters())
    assert corpus.features["text"][0, :, 0].tolist() == [2, 3, 4]
    # A picture counts in both words that it lies in.
    means = [np.mean([time for time in PICTURES if start <= time < end]) for start, end in ((0, 1), (0.5, 2.5), (2, 3))]
    np.testing.assert_allclose(corpus.features["face"][0, :, 0], means, atol=1e-3)


def test_a_short_line_of_vectors_costs_the_recordings_with_its_word(folder):
    for name, words in (("a", "hello there"), ("b", "there there")):
        write_recording(folder / f"{name}.wav", sound=tone(0.5))
        (folder / f"{name}.txt").write_text(words)
    (folder / "vectors.vec").write_text("there 1 2 3\nhello 1 2\n")
    corpus, found, _ = run(folder, encoder=word_vectors(folder / "vectors.vec"))
    assert list(corpus.ids) == ["b"]
    [(name, reason)] = found.quarantined
    assert name == "a.wav"
    assert "the line of 'hello': it must have 3 values as the first line has, got 2" in reason


SCRIPT = """
import sys
from m3er_fast.recordings import extract
from recording_problems import Letters, Loudness

if __name__ == "__main__":
    workers = int(sys.argv[3])
    extract(sys.argv[1], sys.argv[2], {"audio": Loudness(wait=0.03)}, encoder=Letters(), resume=True, workers=workers)
"""


@pytest.mark.slow
def test_killed_at_ten_moments_and_resumed_leaves_the_same_bytes(folder, tmp_path):
    for number in range(40):
        write_recording(folder / f"{number:02d}.wav", sound=tone(0.2 + 0.01 * number))
        (folder / f"{number:02d}.txt").write_text("hello there")
    run(folder, encoder=Letters())
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    moments, killed, outs = random.Random(0), 0, set()
    for attempt in range(100):
        if killed == 10:
            break
        out = tmp_path / f"out-{attempt // 4}"
        outs.add(out)
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(folder), str(out), str(1 + attempt % 2)],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not (out / "_manifest.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 1.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait(60)
    assert killed == 10
    for out in outs:
        extract(folder, out, {"audio": Loudness(wait=0.03)}, encoder=Letters(), resume=True)
        assert contents(out) == contents(tmp_path / "out")
        assert json.loads((out / "_summary.json").read_text())["totals"]["utterances"] == 40
