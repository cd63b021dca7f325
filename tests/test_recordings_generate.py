"""Recordings made here, and the demonstration on them."""

import csv
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("skimage")

from recording_problems import QuickSound

from m3er_fast import M3ERConfig, TrainingConfig
from m3er_fast.cli import main
from m3er_fast.corpus import read_parquet
from m3er_fast.recordings import generate, read_transcript
from m3er_fast.recordings.decoding import SAMPLE_RATE, Decoder, probe, read_pictures, read_sound
from m3er_fast.recordings.generate import MANNERS, generate_recordings, write_video


def test_a_video_holds_what_its_transcript_says(tmp_path):
    path = tmp_path / "a.mp4"
    spoken = write_video(path, ["happy", "sad", "calm"], seed=1, hidden=[1], noisy=[2])
    transcript = read_transcript(tmp_path / "a.json")
    assert [tuple(word.text for word in said.words) for said in spoken] == [
        tuple(word.text for word in cue.words) for cue in transcript.cues
    ]
    assert all(word.timed for word in transcript.words)
    assert probe(path).seconds == pytest.approx(spoken[-1].end, abs=0.3)
    pictures = list(read_pictures(Decoder(path, "video"), per_second=None, width=640))
    hidden = [picture for picture in pictures if spoken[1].start + 0.1 <= picture.time < spoken[1].end - 0.1]
    assert max(picture.pixels.std() for picture in hidden) < 5 < min(p.pixels.std() for p in pictures[:5])
    samples = np.concatenate([piece.samples for piece in read_sound(Decoder(path, "audio"))])
    pauses = [np.abs(samples[round((word.end + 0.02) * 16000) :][:200]).max() for word in spoken[0].words[:-1]]
    assert max(pauses) < 0.1 < np.abs(samples[round(spoken[2].start * 16000) + 2000 :]).max()


def test_a_folder_of_recordings_is_reproducible(tmp_path):
    told = []
    for name in ("one", "two"):
        generate_recordings(tmp_path / name, recordings=2, utterances=2, seed=3, progress=lambda *x: told.append(x))
    assert told == [(1, 2), (2, 2)] * 2
    for name in ("labels.csv", "vectors.txt", "video_000.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with (tmp_path / "one" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert {row["label"] for row in rows} <= set(MANNERS)
    with pytest.raises(ValueError, match="recordings must be a positive int"):
        generate_recordings(tmp_path / "three", recordings=0)


@pytest.mark.parametrize(
    ("code", "words"), [(1, "espeak-ng does not speak: no voice en"), (0, "espeak-ng says nothing for '")]
)
def test_a_voice_that_does_not_speak_is_one_line(tmp_path, monkeypatch, code, words):
    program = tmp_path / "espeak-ng"
    program.write_text(f"#!/bin/sh\necho no voice en >&2\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert generate.voice_here() == "espeak-ng"
    generate._said.cache_clear()
    with pytest.raises(OSError, match=words):
        write_video(tmp_path / "a.mp4", ["happy"], voice="espeak-ng")
    monkeypatch.setenv("PATH", "")
    assert generate.voice_here() == "tones"


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the program espeak-ng")
def test_words_are_spoken_by_espeak_ng(tmp_path):
    spoken = write_video(tmp_path / "a.mp4", ["happy", "sad"], voice="espeak-ng", seed=1)
    samples = np.concatenate([piece.samples for piece in read_sound(Decoder(tmp_path / "a.mp4", "audio"))])

    def part(start, end):
        return samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]

    for said in spoken:
        for word in said.words:
            assert np.abs(part(word.start, word.end)).max() > 0.1
        pauses = [np.abs(part(a.end + 0.02, b.start - 0.02)).max() for a, b in pairwise(said.words)]
        assert max(pauses) < 0.05


def test_the_demonstration_without_a_face(tmp_path, monkeypatch, capsys):
    """As on a machine without MediaPipe's model and without network; sound and training are quick ones."""
    from m3er_fast import recordings_demo
    from m3er_fast.recordings import prediction

    def no_face(*arguments, **options):
        raise OSError("face_landmarker.task cannot be fetched")

    monkeypatch.setattr(recordings_demo, "FaceFeatures", no_face)
    monkeypatch.setattr(recordings_demo, "SoundFeatures", QuickSound)
    monkeypatch.setattr(prediction, "SoundFeatures", QuickSound)
    made, trained = recordings_demo.generate_recordings, recordings_demo.train
    monkeypatch.setattr(
        recordings_demo, "generate_recordings", lambda out, recordings, voice: made(out, recordings=5, voice=voice)
    )
    monkeypatch.setattr(recordings_demo, "voice_here", lambda: "tones")
    config = M3ERConfig(training=TrainingConfig(epochs=2))
    monkeypatch.setattr(recordings_demo, "train", lambda corpus, out: trained(corpus, config, out=out))
    out = tmp_path / "out"
    assert main(["demo", "--recordings", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "the face is left out: face_landmarker.task cannot be fetched" in printed.err
    assert "On the test split:" in printed.out
    assert printed.out.count("| story_") == 8
    assert read_parquet(out / "corpus").input_dims.keys() == {"text", "audio"}
    assert (out / "story.png").exists()
    assert (out / "scores" / "_SUCCESS").exists()
    assert main(["demo", "--recordings", "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
