"""Forced alignment: times go to the right words, and what cannot be aligned keeps none."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av")

from recording_files import RATE, tone, write_recording

from m3er_fast.recordings import speech
from m3er_fast.recordings.decoding import sound_within
from m3er_fast.recordings.speech import ForcedAlignment
from m3er_fast.recordings.words import Cue, Transcript, Word, read_transcript

DICTIONARY = {"hello", "there", "mr."}


class Aligner:
    """Stands in for pocketsphinx: each word gets an equal part of the sound, after a silence."""

    def __init__(self, samprate, lm, loglevel):
        self.heard = []

    def lookup_word(self, word):
        return "x" if word in DICTIONARY else None

    def set_align_text(self, text):
        self.words = text.split()

    def start_utt(self):
        pass

    def process_raw(self, raw, full_utt):
        self.frames = len(raw) // 2 // (RATE // 100)
        if self.frames < 10:
            raise RuntimeError("no way through the sound")

    def end_utt(self):
        pass

    def seg(self):
        length = self.frames // (len(self.words) + 1)
        yield SimpleNamespace(word="<sil>", start_frame=0, end_frame=length - 1)
        for number, word in enumerate(self.words, 1):
            yield SimpleNamespace(word=word, start_frame=number * length, end_frame=(number + 1) * length - 1)


@pytest.fixture
def timer(monkeypatch):
    monkeypatch.setattr(speech, "_pocketsphinx", lambda: SimpleNamespace(Decoder=Aligner))
    return ForcedAlignment()


def cue(start, end, *texts):
    return Cue(start, end, tuple(Word(text, math.nan, math.nan) for text in texts))


def said(transcript):
    return [
        (word.text, round(word.start, 3), round(word.end, 3)) if word.timed else word.text for word in transcript.words
    ]


def test_words_get_the_times_at_which_they_are_found(timer, tmp_path):
    path = write_recording(tmp_path / "a.wav", sound=tone(3.0))
    found = timer.time(path, Transcript((cue(0.0, 1.2, "Hello,", "there"), cue(1.5, 2.1, "Mr.", "Qwrt", "there"))))
    assert said(found) == [
        ("Hello,", 0.4, 0.8),
        ("there", 0.8, 1.2),
        ("Mr.", 1.7, 1.9),
        "Qwrt",
        ("there", 1.9, 2.1),
    ]


def test_words_with_times_keep_them_and_what_cannot_be_aligned_has_none(timer, tmp_path):
    path = write_recording(tmp_path / "a.wav", sound=tone(1.0))
    timed = Cue(0.0, 0.5, (Word("hello", 0.1, 0.2),))
    short, unknown = cue(0.5, 0.55, "hello"), cue(0.5, 1.0, "qwrt")
    found = timer.time(path, Transcript((timed, short, unknown)))
    assert said(found) == [("hello", 0.1, 0.2), "hello", "qwrt"]
    silent = write_recording(tmp_path / "b.mp4", times=[0, 0.04])
    assert said(timer.time(silent, Transcript((cue(0.0, 1.0, "hello"),)))) == ["hello"]


def test_a_transcript_without_cues_is_aligned_with_the_whole(timer, tmp_path):
    path = write_recording(tmp_path / "a.wav", sound=tone(0.9))
    assert said(timer.time(path, Transcript((cue(math.nan, math.nan, "hello", "there"),)))) == [
        ("hello", 0.3, 0.6),
        ("there", 0.6, 0.9),
    ]


def test_sound_keeps_its_time(tmp_path):
    samples = tone(1.0)
    path = write_recording(tmp_path / "a.mkv", sound=samples, times=[0, 0.04], sound_start=0.5)
    found = sound_within(path, 0.25, 1.0)
    assert len(found) == 0.75 * RATE
    assert not found[: RATE // 4].any()
    np.testing.assert_allclose(found[RATE // 4 :] / 32767, samples[: RATE // 2], atol=2e-4)
    assert len(sound_within(path, 1.25, math.inf)) == RATE // 4
    assert not len(sound_within(path, 5.0, 6.0))


SPEECH = os.environ.get("M3ER_FAST_SPEECH")


@pytest.mark.skipif(SPEECH is None, reason="needs read speech: set M3ER_FAST_SPEECH to a .wav with its .txt beside it")
def test_every_word_of_real_speech_is_found():
    pytest.importorskip("pocketsphinx")
    path = Path(SPEECH)
    words = ForcedAlignment().time(path, read_transcript(path.with_suffix(".txt"))).words
    assert all(word.timed for word in words)
    starts = [word.start for word in words]
    assert starts == sorted(starts)
