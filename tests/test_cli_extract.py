"""The command extract: its output, its exit codes, and what it says."""

import errno

import pytest

pytest.importorskip("av")

from recording_files import tone, write_recording
from recording_problems import Loudness

from m3er_fast import recordings as package
from m3er_fast.cli import main
from m3er_fast.corpus import read_parquet
from m3er_fast.execution.run_folder import RunFolder


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    """Two recordings with transcripts; the sound's features are quick ones."""
    monkeypatch.setattr(package, "SoundFeatures", Loudness)
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name in ("a", "b"):
        write_recording(folder / f"{name}.wav", sound=tone(0.5))
        (folder / f"{name}.txt").write_text("hello there")
    (tmp_path / "vectors.txt").write_text("hello 1 2\nthere 3 4\n")
    return folder


def extract(recordings, *options):
    """Run the command without a face, and return its exit code."""
    out = recordings.parent / "out"
    command = ["extract", recordings, "--out", out, "--words", recordings.parent / "vectors.txt", "--face", "none"]
    return main([str(word) for word in [*command, *options]])


def test_extract_prints_where_the_corpus_is(recordings, tmp_path, capsys):
    assert extract(recordings) == 0
    assert f"{tmp_path / 'out'}: 2 utterances of 2 recordings, in " in capsys.readouterr().out
    assert read_parquet(tmp_path / "out").input_dims == {"text": 2, "audio": 1}


def test_what_is_in_quarantine_is_exit_code_3_and_what_differs_4(recordings, tmp_path, capsys):
    (recordings / "b.wav").write_bytes(b"damaged")
    assert extract(recordings) == 3
    printed = capsys.readouterr()
    assert "1 utterances of 1 recordings" in printed.out
    assert "1 are in quarantine, such as b.wav: " in printed.err
    assert extract(recordings, "--resume") == 3
    assert "1 of them by an earlier run" in capsys.readouterr().out
    assert extract(recordings, "--resume", "--steps", "0.25") == 4
    assert "another setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "syllables"], "'syllables' is neither words nor a number of seconds"),
        (["--steps", "0"], "steps must be 'words' or a positive number of seconds, got 0.0"),
        (["--words", "none.txt"], "none.txt does not exist: wanted a text file of word vectors"),
        (["--labels", "none.csv"], "none.csv"),
        (["--audio", "opensmile"], "opensmile"),
        (["--face", "mediapipe", "--face-model", "none.task"], "none.task does not exist: wanted the file face_land"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(recordings, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("m3er_fast.recordings.face._mediapipe", lambda: None)
    assert extract(recordings, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_exit_code_5(recordings, capsys, monkeypatch):
    def full(self, name, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "write_json", full)
    assert extract(recordings) == 5


def test_an_interrupt_says_how_to_go_on(recordings, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "extract", interrupted)
    assert extract(recordings) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
