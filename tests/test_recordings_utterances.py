"""From recordings to utterances, with extractors whose features say when they were."""

import math

import numpy as np
import pytest

pytest.importorskip("av")

from recording_files import tone, write_recording
from recording_problems import Letters

from m3er_fast.corpus.base import CorpusError
from m3er_fast.recordings.frames import Frames
from m3er_fast.recordings.utterances import Utterance, extract_recording
from m3er_fast.recordings.words import Cue, Transcript, Word


class Clock:
    """Features that are the time, twice, ten per second; NaN within ``lost``."""

    dimension = 2

    def __init__(self, end=3.0, lost=(), nothing=False):
        self.end, self.lost, self.nothing = end, lost, nothing

    def describe(self):
        return {"features": "clock"}

    def extract(self, recording):
        assert recording.exists()
        if self.nothing:
            return None
        times = np.arange(round(self.end * 10)) / 10 + 0.05
        values = np.stack([times, times], axis=1).astype(np.float32)
        for start, end in self.lost:
            values[(times >= start) & (times < end)] = np.nan
        return Frames(times, values, {"seconds": self.end})


@pytest.fixture
def recording(tmp_path):
    return write_recording(tmp_path / "talk.wav", sound=tone(3.0))


def cue(start, end, *words):
    return Cue(start, end, tuple(Word(*word) for word in words))


TALK = Transcript(
    (
        cue(0.0, 1.0, ("hello", 0.0, 0.5), ("I", 0.5, 1.0)),
        cue(1.0, 3.0, ("am", 1.0, 1.2), ("here", 2.0, 3.0), ("now", 2.5, 3.0)),
    )
)


def test_a_step_is_a_word_and_an_utterance_a_cue(recording):
    found = extract_recording(recording, {"audio": Clock()}, encoder=Letters(), transcript=TALK)
    corpus = found.corpus
    assert list(corpus.ids) == ["talk_0000", "talk_0001"]
    assert list(corpus.group) == ["talk", "talk"]
    assert list(corpus.features) == ["text", "audio"]
    np.testing.assert_array_equal(corpus.lengths, [2, 3])
    np.testing.assert_allclose(corpus.features["text"][..., 0], [[5, np.nan, 0], [2, 4, 3]])
    np.testing.assert_allclose(corpus.features["audio"][..., 1], [[0.25, 0.75, 0], [1.1, 2.5, 2.75]], atol=1e-6)
    assert corpus.available.all()
    assert found.report["text"] == {"words": 5, "unknown": 1, "without_time": 0}
    assert found.report["missing_steps"] == {"text": 0.2, "audio": 0.0}


def test_steps_of_seconds_need_no_words(recording):
    corpus = extract_recording(recording, {"audio": Clock()}, steps=0.7).corpus
    assert list(corpus.ids) == ["talk"]
    np.testing.assert_array_equal(corpus.lengths, [5])
    np.testing.assert_allclose(corpus.features["audio"][0, :, 0], [0.35, 1.05, 1.75, 2.45, 2.9], atol=1e-6)


def test_steps_that_divide_the_recording_are_no_more_than_that(recording):
    assert extract_recording(recording, {"audio": Clock()}, steps=0.1).corpus.lengths.tolist() == [30]


def test_words_within_steps_of_seconds_are_averaged(recording):
    corpus = extract_recording(recording, {"audio": Clock()}, encoder=Letters(), transcript=TALK, steps=1.0).corpus
    np.testing.assert_allclose(corpus.features["text"][..., 0], [[5, 0], [2, 3.5]])


def test_a_step_without_a_frame_is_nan_and_a_modality_without_any_is_unavailable(recording):
    extractors = {"audio": Clock(lost=[(1.0, 2.5)]), "face": Clock(nothing=True)}
    parts = [Utterance("a", 0, 3), Utterance("b", 1, 2.4)]
    corpus = extract_recording(recording, extractors, utterances=parts, steps=1.0).corpus
    assert np.isnan(corpus.features["audio"][0, 1]).all()
    assert not np.isnan(corpus.features["audio"][0, [0, 2]]).any()
    np.testing.assert_array_equal(corpus.available, [[True, False], [False, False]])
    assert not corpus.features["face"].any()
    assert not corpus.features["audio"][1].any()
    np.testing.assert_array_equal(corpus.lengths, [3, 2])


def test_words_beyond_the_end_are_steps_without_frames(recording):
    late = Transcript((cue(0.0, 9.0, ("here", 0.0, 1.0), ("gone", 8.0, 9.0)),))
    corpus = extract_recording(recording, {"audio": Clock()}, encoder=Letters(), transcript=late).corpus
    assert corpus.lengths.tolist() == [1]  # the utterance is the recording, which is over by then
    parts = [Utterance("a", 0, 9)]
    corpus = extract_recording(
        recording, {"audio": Clock()}, encoder=Letters(), transcript=late, utterances=parts
    ).corpus
    assert np.isnan(corpus.features["audio"][0, 1]).all()
    assert corpus.features["text"][0, 1, 0] == 4


def test_words_without_times_share_the_recording_and_are_counted(recording):
    words = Transcript((cue(math.nan, math.nan, ("one", math.nan, math.nan), ("two", math.nan, math.nan)),))
    found = extract_recording(recording, {"audio": Clock()}, encoder=Letters(), transcript=words)
    np.testing.assert_allclose(found.corpus.features["audio"][0, :, 0], [0.75, 2.25], atol=1e-6)
    assert found.report["text"]["without_time"] == 2


def test_utterances_keep_their_split_and_may_be_without_words(recording):
    parts = [Utterance("a", 0, 1, "happy", "train"), Utterance("b", 1.3, 1.9, None, "test")]
    found = extract_recording(recording, {"audio": Clock()}, encoder=Letters(), transcript=TALK, utterances=parts)
    assert list(found.corpus.split) == ["train", "test"]
    assert found.corpus.lengths.tolist() == [2, 0]
    assert found.utterances == tuple(parts)
    assert not found.corpus.available[1].any()


def test_an_empty_transcript_gives_an_utterance_without_steps(recording):
    found = extract_recording(recording, {"audio": Clock()}, encoder=Letters(), transcript=Transcript(()))
    assert found.corpus.lengths.tolist() == [0]
    assert not found.corpus.available.any()


@pytest.mark.parametrize("steps", [0, -1.0, math.nan, math.inf, True, "seconds", None])
def test_bad_steps_are_named(recording, steps):
    with pytest.raises(ValueError, match=r"steps must be 'words' or a positive number of seconds, got"):
        extract_recording(recording, {"audio": Clock()}, steps=steps)


def test_what_cannot_be_done_is_said(recording, tmp_path):
    with pytest.raises(ValueError, match="nothing to extract"):
        extract_recording(recording, {})
    with pytest.raises(CorpusError, match=r"talk\.wav has no transcript: name one, or take steps of"):
        extract_recording(recording, {"audio": Clock()})
    with pytest.raises(CorpusError, match=r"would have \d+ steps"):
        extract_recording(recording, {"audio": Clock()}, steps=1e-9)
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    with pytest.raises(CorpusError, match=r"bad\.mp4 is no recording"):
        extract_recording(tmp_path / "bad.mp4", {"audio": Clock()}, steps=1.0)
