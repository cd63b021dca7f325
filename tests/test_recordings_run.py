"""A run over recordings: what is written, what is left out, and how it goes on after it was stopped."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import wave
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from recording_files import RATE, tone, write_recording
from recording_problems import Letters, Loudness, contents

from m3er_fast.corpus import read_parquet
from m3er_fast.corpus.base import CorpusError
from m3er_fast.execution.run_folder import OutputMismatchError
from m3er_fast.recordings import SoundFeatures, extract

EXTRACTORS = {"audio": Loudness()}


@pytest.fixture
def recordings(tmp_path):
    """Four recordings with transcripts, one of them in a folder of its own, and files that are none."""
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["a", "b", "c", "more/d"]):
        write_recording(folder / f"{name}.wav", sound=tone(0.5 + 0.1 * number))
        (folder / f"{name}.csv").write_text("word,start,end\nhello,0,0.2\nthere,0.2,0.5\n")
    (folder / "notes.txt").write_text("no recording")
    (folder / "._a.wav").write_bytes(b"of another system")
    return folder


def run(recordings, out, **options):
    options = {"encoder": Letters(), **options}
    return extract(recordings, out, options.pop("extractors", EXTRACTORS), **options)


def test_recordings_become_a_corpus(recordings, tmp_path):
    summary = run(recordings, tmp_path / "out")
    assert (summary.recordings, summary.utterances, summary.quarantined, summary.resumed) == (4, 4, (), 0)
    corpus = read_parquet(tmp_path / "out")
    assert sorted(corpus.ids) == ["a", "b", "c", "more/d"]
    assert sorted(corpus.group) == ["a", "b", "c", "more/d"]
    assert corpus.input_dims == {"text": 1, "audio": 1}
    np.testing.assert_array_equal(corpus.features["text"][..., 0], [[5, 5]] * 4)
    assert np.isfinite(corpus.features["audio"]).all()
    assert corpus.target is None
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert not (tmp_path / "out" / "_quarantine.json").exists()
    report = json.loads((tmp_path / "out" / "_summary.json").read_text())
    assert report["totals"]["seconds"] == pytest.approx(2.6, abs=0.01)
    assert report["recordings"]["a.wav"]["transcript"] == "a.csv"
    assert "<h1>Recordings</h1>" in (tmp_path / "out" / "_summary.html").read_text()


def test_several_processes_leave_the_same_bytes(recordings, tmp_path):
    run(recordings, tmp_path / "one")
    run(recordings, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_labels_choose_the_parts_and_name_the_classes(recordings, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(
        "id,recording,start,end,label,split,group\n"
        "x,a.wav,0,0.2,Happy,train,anna\ny,a.wav,0.2,,sad,dev,anna\nz,more/d,,,,test,\n"
    )
    summary = run(recordings, tmp_path / "out", labels=table)
    assert summary.recordings == 2
    corpus = read_parquet(tmp_path / "out")
    assert list(corpus.ids) == ["x", "y", "z"]
    assert corpus.classes == ("happy", "sad")
    assert corpus.target.tolist() == [0, 1, -100]
    assert list(corpus.split) == ["train", "valid", "test"]
    assert list(corpus.group) == ["anna", "anna", "more/d"]
    assert corpus.lengths.tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name\na\n", "there must be a column 'id', got name"),
        ("id,start\na,soon\n", "line 2: column 'start' must be a number of seconds, got 'soon'"),
        ("id,start,end\na,2,1\n", "line 2: the start must be before the end, got 2.0 and 1.0"),
        ("id\n\n,\n", "column 'id' is blank"),
        ("id,recording\nx,a\nx,b\n", "line 3: id 'x' occurs twice"),
        ("id,split\na,train\nb,\n", "some rows have a split and some have none"),
        ("id,split\na,later\n", "line 2: 'later' is not a split"),
        ("id\nq\nr\n", "the labels name none of its recordings, but q, r"),
    ],
)
def test_bad_labels_are_refused_by_line(recordings, tmp_path, table, message):
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(CorpusError, match=message):
        run(recordings, tmp_path / "out", labels=tmp_path / "labels.csv")
    assert not (tmp_path / "out").exists()


def test_labels_of_a_recording_that_is_not_there_are_in_quarantine(recordings, tmp_path):
    (tmp_path / "labels.csv").write_text("id\na\ngone\n")
    summary = run(recordings, tmp_path / "out", labels=tmp_path / "labels.csv")
    assert summary.quarantined == (("gone", "the labels name it, but there is no such recording"),)


def test_recordings_that_cannot_be_read_are_in_quarantine_and_tried_again(recordings, tmp_path):
    whole = (recordings / "b.wav").read_bytes()
    (recordings / "b.wav").write_bytes(b"damaged")
    (recordings / "c.csv").write_text("token\nhello\n")
    (recordings / "more" / "d.csv").unlink()
    summary = run(recordings, tmp_path / "out")
    reasons = dict(summary.quarantined)
    assert sorted(reasons) == ["b.wav", "c.wav", "more/d.wav"]
    assert "is no recording that FFmpeg reads" in reasons["b.wav"]
    assert "columns must be word, start and end" in reasons["c.wav"]
    assert "has no transcript" in reasons["more/d.wav"]
    assert json.loads((tmp_path / "out" / "_quarantine.json").read_text())[0]["shard"] == "b.wav"
    assert list(read_parquet(tmp_path / "out").ids) == ["a"]
    (recordings / "b.wav").write_bytes(whole)
    summary = run(recordings, tmp_path / "out", resume=True)
    assert summary.resumed == 1
    assert len(summary.quarantined) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_recording_that_ends_its_process_is_in_quarantine_and_no_other(recordings, tmp_path, workers):
    summary = run(recordings, tmp_path / "out", extractors={"audio": Loudness(ends_process="b")}, workers=workers)
    [(name, reason)] = summary.quarantined
    assert name == "b.wav"
    assert "its process ended 2 times" in reason
    assert summary.utterances == 3


def test_a_run_is_resumed_and_leaves_the_same_bytes(recordings, tmp_path):
    run(recordings, tmp_path / "whole")
    out = tmp_path / "out"
    run(recordings, out)
    (out / "b.wav.parquet").unlink()
    (out / "c.wav.parquet").write_bytes(b"half")
    (out / "_SUCCESS").unlink()
    (out / ".x.partial").write_bytes(b"left behind")
    told = []
    summary = run(recordings, out, resume=True, progress=told.append)
    assert summary.resumed == 2
    assert contents(out) == contents(tmp_path / "whole")
    assert [progress.done for progress in told] == [2, 3, 4]
    assert told[-1].seconds_left == 0


def test_what_differs_is_said_on_resume(recordings, tmp_path):
    out = tmp_path / "out"
    run(recordings, out)
    with pytest.raises(ValueError, match="is not empty: resume the run"):
        run(recordings, out)
    with pytest.raises(OutputMismatchError, match="another setting"):
        run(recordings, out, resume=True, steps=0.1)
    with pytest.raises(OutputMismatchError, match="another setting"):
        run(recordings, out, resume=True, extractors={"audio": Loudness(scale=2)})
    (recordings / "a.csv").write_text("word,start,end\nother,0,0.2\n")
    with pytest.raises(OutputMismatchError, match=r"a\.wav or its transcript has changed since"):
        run(recordings, out, resume=True)
    (recordings / "a.wav").unlink()
    with pytest.raises(OutputMismatchError, match="another set of recordings"):
        run(recordings, out, resume=True)


def test_no_recordings_and_two_of_one_name(tmp_path):
    with pytest.raises(CorpusError, match="no such file or folder"):
        run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(CorpusError, match=r"holds no recording, such as a \.mp4 or \.wav file"):
        run(tmp_path, tmp_path / "out")
    for suffix in (".wav", ".mkv"):
        write_recording(tmp_path / f"a{suffix}", sound=tone(0.1))
    with pytest.raises(CorpusError, match="are recordings of the same name"):
        run(tmp_path, tmp_path / "out")
    assert run(tmp_path / "a.wav", tmp_path / "out", steps=0.1).recordings == 1  # one file may have any neighbours


def test_an_extractor_that_cannot_be_sent_to_a_worker_is_said_before_anything_is_written(recordings, tmp_path):
    class Local(Loudness):
        pass

    with pytest.raises(ValueError, match="extractors and encoder must be sent to other processes, but"):
        run(recordings, tmp_path / "out", extractors={"audio": Local()})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["engine", "workers", "steps"])
def test_bad_arguments_are_named(recordings, tmp_path, name):
    with pytest.raises(ValueError, match=name):
        run(recordings, tmp_path / "out", **{name: {"engine": "spark", "workers": 0, "steps": -1}[name]})
    assert not (tmp_path / "out").exists()


SCRIPT = """
    import sys
    from m3er_fast.recordings import extract
    from recording_problems import Letters, Loudness

    if __name__ == "__main__":
        extract(sys.argv[1], sys.argv[2], {"audio": Loudness(wait=0.15)}, encoder=Letters(), resume=True)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(recordings, tmp_path, kind):
    """Killed after each shard in turn; the workers end with it."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root.parent}{os.pathsep}{root}"}
    out, moments = tmp_path / "out", 0
    while not (out / "_SUCCESS").exists():
        process = subprocess.Popen(
            [sys.executable, str(script), str(recordings), str(out)], env=environment, stderr=subprocess.DEVNULL
        )
        done = len(list(out.glob("*.parquet")))
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(out.glob("*.parquet"))) == done:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(kind)
        process.wait(60)
        moments += 1
        assert moments < 10
    assert moments >= 2
    run(recordings, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_ray_leaves_the_same_bytes(recordings, tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("librosa")
    extractors = {"audio": SoundFeatures()}  # workers of Ray do not find the modules of the tests
    for engine in ("local", "ray"):
        extract(recordings, tmp_path / engine, extractors, steps=0.1, engine=engine, workers=2)
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")


HOUR = """
    import sys
    from pathlib import Path
    from m3er_fast.recordings import SoundFeatures, extract_recording

    steps = extract_recording(sys.argv[1], {"audio": SoundFeatures()}, steps=0.1).corpus.steps
    status = Path("/proc/self/status").read_text()  # not ru_maxrss, which a child process inherits
    print(steps, status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_silent_hour_takes_less_than_600_megabytes(tmp_path):
    pytest.importorskip("librosa")
    with wave.open(str(tmp_path / "hour.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        for _ in range(60):
            file.writeframes(bytes(2 * 60 * RATE))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(HOUR), str(tmp_path / "hour.wav")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    steps, kibibytes = map(int, done.stdout.split())
    assert steps == 36_000
    assert kibibytes * 1024 < 600e6
