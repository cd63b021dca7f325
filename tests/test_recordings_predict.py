"""Predicting a recording: features made as the model's were, a table, JSON and a picture."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from recording_files import tone, write_recording
from recording_problems import Listener, QuickSound

from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.cli import main
from m3er_fast.corpus import SPLITS, read_parquet, write_parquet
from m3er_fast.corpus.base import CorpusError, concatenate
from m3er_fast.corpus.extraction import extraction_difference
from m3er_fast.recordings import extract, prediction, word_vectors
from m3er_fast.recordings.prediction import predict_recording, predict_utterances
from m3er_fast.scoring import score
from m3er_fast.training import StreamedCorpus


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "SoundFeatures", QuickSound)
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number in range(3):
        path = write_recording(folder / f"r{number}.mkv", sound=tone(1.0), times=np.arange(10) / 10)
        path.with_suffix(".vtt").write_text(
            "WEBVTT\n\n00:00.000 --> 00:00.500\nhello there\n\n00:00.500 --> 00:01.000\nthere hello\n"
        )
    (tmp_path / "vectors.txt").write_text("hello 1 2\nthere 3 4\n")
    return folder


@pytest.fixture
def corpus(recordings, tmp_path):
    encoder = word_vectors(tmp_path / "vectors.txt")
    extract(recordings, tmp_path / "corpus", {"audio": QuickSound()}, encoder=encoder)
    return read_parquet(tmp_path / "corpus")


@pytest.fixture
def model(corpus):
    torch.manual_seed(0)
    config = M3ERConfig(check=None, proxy=None)
    return M3ERFusion(corpus.input_dims, 2, config, classes=["calm", "angry"], extraction=corpus.extraction).eval()


def test_how_features_were_made_travels_from_corpus_to_model(corpus, model, tmp_path):
    wanted = {"features": "librosa", "version": "1", "scale": 1}
    assert corpus.extraction["steps"] == "words"
    assert corpus.extraction["modalities"]["audio"] == wanted
    assert corpus.extraction["modalities"]["text"]["dimension"] == 2
    write_parquet(corpus.select([0, 2]), tmp_path / "again")
    assert read_parquet(tmp_path / "again").extraction == corpus.extraction
    model.save_pretrained(tmp_path / "model")
    assert M3ERFusion.from_pretrained(tmp_path / "model").extraction == corpus.extraction


def test_parts_that_were_extracted_differently_are_no_corpus(corpus):
    with pytest.raises(CorpusError, match="extracted from recordings in different ways"):
        concatenate([corpus, replace(corpus, ids=corpus.ids + "x", extraction=None)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"steps": 0.1}, "steps are 0.1, wanted words"),
        ({"modalities": {"audio": {"version": "2", "rate": 100}}}, None),
        ({"modalities": {"audio": {"rate": 50}}}, "audio: rate is 50, wanted 100"),
        ({"modalities": {}}, None),
        ({"modalities": {"smell": {"features": "nose"}}}, "smell: features is nose, wanted None"),
    ],
)
def test_differences_are_named(change, message):
    wanted = {"steps": "words", "modalities": {"audio": {"version": "1", "rate": 100}}}
    assert extraction_difference(wanted, {**wanted, **change}) == message


def test_a_corpus_that_was_extracted_otherwise_is_not_scored(model, recordings, tmp_path):
    encoder = word_vectors(tmp_path / "vectors.txt")
    extract(recordings, tmp_path / "other", {"audio": QuickSound(scale=2)}, encoder=encoder)
    with pytest.raises(CorpusError, match="another way than those of the model: audio: scale is 2, wanted 1"):
        score(tmp_path / "other", model, tmp_path / "scores")


def test_a_recording_is_predicted_as_its_row_of_the_corpus(corpus, model, recordings, tmp_path):
    from m3er_fast.recordings import read_transcript

    found = predict_recording(
        model,
        recordings / "r0.mkv",
        words=tmp_path / "vectors.txt",
        transcript=read_transcript(recordings / "r0.vtt"),
    )
    assert [(part.id, part.start, part.end) for part in found] == [("r0_0000", 0, 0.5), ("r0_0001", 0.5, 1)]
    wanted = predict_utterances(model, corpus.select([0, 1]))
    for got, want in zip(found, wanted, strict=True):
        assert got.scores == want.scores
        assert got.available == {"text": True, "audio": True}


def test_words_of_a_recording_without_a_transcript_are_recognised(model, recordings, tmp_path):
    found = predict_recording(model, recordings / "r0.mkv", words=tmp_path / "vectors.txt", recogniser=Listener())
    assert [part.available for part in found] == [{"text": True, "audio": True}]


def test_windows_and_a_lost_modality(model, recordings):
    with pytest.raises(CorpusError, match="has no transcript"):
        predict_recording(model, recordings / "r0.mkv")
    model.extraction = {**model.extraction, "steps": 0.1}
    found = predict_recording(model, recordings / "r0.mkv", window=0.4)
    assert [(round(part.start, 3), round(part.end, 2)) for part in found] == [(0, 0.4), (0.4, 0.8), (0.8, 1.0)]
    assert found[0].available == {"text": False, "audio": True}
    with pytest.raises(ValueError, match="window must be a positive number of seconds, got 0"):
        predict_recording(model, recordings / "r0.mkv", window=0)


def test_features_from_elsewhere_or_made_otherwise_are_refused(model, recordings, tmp_path):
    (tmp_path / "others.txt").write_text("hello 1 2\nthere 3 5\n")
    with pytest.raises(ValueError, match=r"another way than the model's: text: file is others\.txt, wanted vec"):
        predict_recording(model, recordings / "r0.mkv", words=tmp_path / "others.txt")
    model.extraction["modalities"]["audio"]["features"] = "my own"
    with pytest.raises(ValueError, match="no extractor of this package makes audio, 'my own'"):
        predict_recording(model, recordings / "r0.mkv")
    model.extraction = None
    with pytest.raises(ValueError, match="trained on features from elsewhere"):
        predict_recording(model, recordings / "r0.mkv")


def test_the_command_prints_a_table_or_json_and_draws(model, recordings, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model.save_pretrained(tmp_path / "run")
    command = ["predict", str(recordings / "r0.mkv"), "--model", str(tmp_path / "run")]
    assert main([*command, "--words", str(tmp_path / "vectors.txt"), "--picture", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| Utterance | From | To | Prediction |")
    assert lines[2].startswith("| r0_0000 | 0.0 | 0.5 | ")
    assert len(lines) == 4
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["available"] == {"text": False, "audio": True}
    assert sum(found[0]["scores"]["probabilities"].values()) == pytest.approx(1)
    shard = tmp_path / "corpus" / "r1.mkv.parquet"
    assert main(["predict", str(shard), "--model", str(tmp_path / "run")]) == 0
    assert "| r1_0000 |" in capsys.readouterr().out
    assert main(["predict", str(shard), "--model", str(tmp_path / "run"), "--picture", "a.png"]) == 2
    assert "features have no time" in capsys.readouterr().err


def test_nothing_at_all_is_an_abstention(model):
    from m3er_fast.corpus.base import Corpus

    empty = Corpus(
        ids=np.array(["a"], dtype=object),
        features={"text": np.zeros((1, 1, 2), np.float32), "audio": np.zeros((1, 1, 1), np.float32)},
        lengths=np.zeros(1, np.int64),
        available=np.zeros((1, 2), dtype=bool),
        target=None,
        classes=(),
    )
    [part] = predict_utterances(model, empty)
    assert part.available == {"text": False, "audio": False}
    assert part.scores.abstained


def test_a_streamed_corpus_knows_how_its_features_were_made(recordings, tmp_path):
    table = tmp_path / "labels.csv"
    rows = [f"u{number},r{number},{number % 2},{split}\n" for number, split in enumerate(SPLITS)]
    table.write_text("id,recording,label,split\n" + "".join(rows))
    encoder = word_vectors(tmp_path / "vectors.txt")
    extract(recordings, tmp_path / "one", {"audio": QuickSound()}, encoder=encoder, labels=table)
    found = StreamedCorpus(tmp_path / "one").extraction
    assert found["modalities"]["audio"]["scale"] == 1
    assert found == read_parquet(tmp_path / "one").extraction
    extract(recordings, tmp_path / "two", {"audio": QuickSound(scale=2)}, encoder=encoder, labels=table)
    (tmp_path / "two" / "r2.mkv.parquet").replace(tmp_path / "one" / "r2.mkv.parquet")
    with pytest.raises(CorpusError, match="extracted from recordings in different ways"):
        StreamedCorpus(tmp_path / "one")
