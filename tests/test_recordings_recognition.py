"""Speech recognition: words and their times of recordings without a transcript, and none where nobody speaks."""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("av")

from recording_files import RATE, tone, write_recording
from recording_problems import Letters, Listener, Loudness

from m3er_fast.cli import main
from m3er_fast.corpus import read_parquet
from m3er_fast.recordings import WhisperRecogniser, extract, recognition
from m3er_fast.recordings.decoding import Sound
from m3er_fast.recordings.summary import render


@dataclass
class Word:
    word: str
    start: float
    end: float
    probability: float = 0.9


class WhisperModel:
    """Stands in for faster-whisper's: two words in the first second, and two segments, if the sound is loud."""

    supported_languages = ("en", "de")
    calls: ClassVar = []

    def __init__(self, folder, **options):
        assert options == {"device": "cpu", "compute_type": "float32", "cpu_threads": 1}

    def transcribe(self, sound, **options):
        assert sound.dtype == np.float32
        self.calls.append((len(sound), float(np.abs(sound).max()), options))
        return (segment for segment in self.segments() if np.abs(sound).max() > 0.01), SimpleNamespace(language="en")

    def segments(self):
        times = [np.float64(time) for time in (0.0, 0.25, 0.5, 0.75)]
        words = [Word(" Hello", times[0], times[1]), Word(" there.", times[1], times[2])]
        yield SimpleNamespace(start=0.0, end=0.5, words=words)
        yield SimpleNamespace(start=0.5, end=0.6, words=[Word(" [Music]", 0.5, 0.6)])
        yield SimpleNamespace(start=0.6, end=0.6, words=None)
        yield SimpleNamespace(start=0.5, end=0.75, words=[Word(" Hello", times[2], times[3])])


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The folder of a model, beside a stand-in of faster-whisper that cannot fetch one."""

    def no_network(name):
        raise ConnectionError("no route to the host\nand more lines")

    module = SimpleNamespace(
        __version__="1.2.1",
        WhisperModel=WhisperModel,
        available_models=lambda: ["tiny", "small"],
        download_model=no_network,
    )
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    monkeypatch.setattr(WhisperModel, "calls", [])
    recognition._loaded.cache_clear()
    folder = tmp_path / "whisper-tiny"
    folder.mkdir()
    for name in ("model.bin", "config.json", "tokenizer.json"):
        (folder / name).write_text(name)
    return folder


def said(transcript):
    return [[(word.text, word.start, word.end) for word in cue.words] for cue in transcript.cues]


def test_words_have_their_times_and_sound_without_a_voice_is_left_out(model, tmp_path):
    path = write_recording(tmp_path / "a.mkv", sound=tone(1.0), times=[0, 0.04], sound_start=0.5)
    found = WhisperRecogniser(model, "en").transcribe(path)
    assert said(found) == [[("Hello", 0.5, 0.75), ("there.", 0.75, 1.0)], [("Hello", 1.0, 1.25)]]
    assert all(type(word.start) is float for word in found.words)
    [(length, loudest, options)] = WhisperModel.calls
    assert length == RATE
    assert 0.2 < loudest < 1
    assert options["vad_filter"]
    assert options["word_timestamps"]
    assert options["language"] == "en"
    assert options["temperature"] == 0


def test_long_sound_is_cut_where_it_is_quiet_and_times_are_those_of_the_recording(model, tmp_path, monkeypatch):
    monkeypatch.setattr(recognition, "_STRETCH", 2 * RATE)
    monkeypatch.setattr(recognition, "_CUT_WITHIN", RATE)
    sound = tone(3.0)
    sound[int(1.3 * RATE) : int(1.4 * RATE)] = 0
    pieces = [Sound(1.0 + start / RATE, sound[start : start + 1000], start > 0) for start in range(0, len(sound), 1000)]
    pieces.append(Sound(5.0, tone(0.1), False))  # after a gap
    pieces.append(Sound(60.0, np.array([np.nan, 3], np.float32), False))
    found = list(recognition._stretches(pieces))
    assert [(round(start, 3), len(part) / RATE) for start, part in found[:2]] == [(1.0, 1.35), (2.35, 1.75)]
    np.testing.assert_array_equal(np.concatenate([part for _, part in found[:2]])[: len(sound)], sound)
    assert not found[1][1][len(sound) - len(found[0][1]) :].any()
    assert [round(start, 3) for start, _ in found[2:]] == [4.1, 60.0]
    np.testing.assert_array_equal(found[-1][1], [0, 1])
    words = WhisperRecogniser(model).transcribe(write_recording(tmp_path / "a.wav", sound=tone(3.0))).words
    assert len(words) == 6
    assert words[3].start > 1
    assert [options["language"] for _, _, options in WhisperModel.calls] == [None, "en"]


def test_silence_and_a_recording_without_sound_have_no_words(model, tmp_path):
    silent = write_recording(tmp_path / "a.wav", sound=np.zeros(RATE, np.float32))
    assert WhisperRecogniser(model).transcribe(silent).cues == ()
    pictures = write_recording(tmp_path / "b.mp4", times=[0, 0.04])
    assert WhisperRecogniser(model).transcribe(pictures).cues == ()
    assert len(WhisperModel.calls) == 1


def test_the_model_is_told_by_name_and_checksum(model):
    import hashlib

    assert WhisperRecogniser(model, "de").describe() == {
        "words": "faster-whisper",
        "version": "1.2.1",
        "model": "whisper-tiny",
        "sha256": hashlib.sha256(b"model.bin").hexdigest(),
        "language": "de",
    }


def test_what_is_no_model_is_one_line(model, tmp_path, monkeypatch):
    with pytest.raises(
        OSError, match=r"model tiny cannot be fetched \(no route to the host\): name the folder of a model"
    ):
        WhisperRecogniser("tiny")
    with pytest.raises(
        ValueError, match=r"huge is neither the folder of a Whisper model .* nor a size \(tiny, small\)"
    ):
        WhisperRecogniser("huge")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"whisper-tiny is no folder of a Whisper model .*: it lacks tokenizer\.json"):
        WhisperRecogniser(model)
    (model / "tokenizer.json").touch()
    path = write_recording(tmp_path / "a.wav", sound=tone(0.5))
    with pytest.raises(ValueError, match=re.escape("language must be one that whisper-tiny knows (de, en), got 'xx'")):
        WhisperRecogniser(model, "xx").transcribe(path)
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ImportError, match=r"speech recognition needs faster-whisper: pip install 'm3er-fast\[asr\]'"):
        WhisperRecogniser(model)


@pytest.fixture
def recordings(tmp_path):
    """A recording with speech, a silent one, and one with a transcript."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name, sound in (("loud", tone(1.0)), ("silent", np.zeros(RATE, np.float32)), ("written", tone(1.0))):
        write_recording(folder / f"{name}.wav", sound=sound)
    (folder / "written.csv").write_text("word,start,end\nwritten,0,0.5\n")
    return folder


def test_a_run_takes_transcripts_first_and_says_where_words_are_from(recordings, tmp_path):
    out = tmp_path / "out"
    extract(recordings, out, {"audio": Loudness()}, encoder=Letters(), recogniser=Listener())
    corpus = read_parquet(out)
    words = {name: corpus.features["text"][row, : corpus.lengths[row], 0] for row, name in enumerate(corpus.ids)}
    available = dict(zip(corpus.ids, corpus.available[:, list(corpus.features).index("text")], strict=True))
    assert available == {"loud": True, "silent": False, "written": True}
    np.testing.assert_array_equal(words["loud"], [5, 6])
    np.testing.assert_array_equal(words["written"], [7])
    assert json.loads((out / "_manifest.json").read_text())["settings"]["recognised_words"] == {"words": "loud"}
    summary = json.loads((out / "_summary.json").read_text())
    found = {name: report["words_from"] for name, report in summary["recordings"].items()}
    assert found == {"loud.wav": "asr", "silent.wav": "asr", "written.wav": "transcript"}
    assert "speech recognition" in render(summary)


def test_the_command_says_what_is_wrong(model, recordings, tmp_path, capsys):
    command = ["extract", str(recordings), "--out", str(tmp_path / "out"), "--audio", "none", "--face", "none"]
    assert main([*command, "--language", "en"]) == 2
    assert "it is that of the speech for --asr" in capsys.readouterr().err
    assert main([*command, "--asr", "tiny"]) != 0
    error = capsys.readouterr().err
    assert "the Whisper model tiny cannot be fetched" in error
    assert len(error.splitlines()) == 1


WHISPER, SPEECH = os.environ.get("M3ER_FAST_WHISPER"), os.environ.get("M3ER_FAST_SPEECH")


@pytest.mark.skipif(
    WHISPER is None, reason="needs a Whisper model: set M3ER_FAST_WHISPER to its folder for CTranslate2"
)
def test_a_real_model_hears_nothing_in_silence_and_noise(tmp_path):
    pytest.importorskip("faster_whisper")
    noise = np.random.default_rng(0).normal(0, 0.01, 5 * RATE).astype(np.float32)
    for name, sound in (("silence", np.zeros(5 * RATE, np.float32)), ("noise", noise)):
        path = write_recording(tmp_path / f"{name}.wav", sound=sound)
        assert WhisperRecogniser(WHISPER, "en").transcribe(path).words == ()


@pytest.mark.skipif(
    WHISPER is None or SPEECH is None,
    reason="needs a Whisper model and read speech: set M3ER_FAST_WHISPER to its folder for CTranslate2, and "
    "M3ER_FAST_SPEECH to a .wav with its .txt beside it",
)
def test_a_real_model_hears_what_is_read():
    pytest.importorskip("faster_whisper")
    words = WhisperRecogniser(WHISPER, "en").transcribe(Path(SPEECH)).words
    heard = [re.sub(r"\W", "", word.text).lower() for word in words]
    read = Path(SPEECH).with_suffix(".txt").read_text().lower().split()
    assert len(set(heard) & set(read)) > 0.7 * len(set(read))
    assert all(word.timed for word in words)
    starts = [word.start for word in words]
    assert starts == sorted(starts)
