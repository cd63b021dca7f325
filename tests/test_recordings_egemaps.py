"""eGeMAPS: rows at their times, the same wherever a block ends, and those of openSMILE."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av")

from recording_files import RATE, tone, write_recording

from m3er_fast.cli import main
from m3er_fast.corpus import read_parquet
from m3er_fast.recordings import egemaps
from m3er_fast.recordings.decoding import Sound
from m3er_fast.recordings.egemaps import EgemapsFeatures
from m3er_fast.recordings.prediction import extractors_of


class Smile:
    """Stands in for openSMILE: the number of rows is its own, a row tells the loudest sample of its first 20 ms."""

    feature_names = tuple(f"feature_{number}" for number in range(25))

    def process_signal(self, samples, rate):
        assert rate == RATE
        assert np.abs(samples).max() <= 1
        rows = (len(samples) - 960) // 160 + 2
        peaks = [samples[160 * row : 160 * row + 320].max() for row in range(rows)]
        table = np.repeat(np.array(peaks, np.float32)[:, None], 25, axis=1)
        return SimpleNamespace(to_numpy=lambda dtype: table.astype(dtype))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(egemaps, "_smile", Smile)


def features(samples, pieces=1, start=0.0):
    """Return the starts of rows and the features of samples that come in pieces without a gap."""
    parts = np.array_split(samples, pieces)
    begins = start + np.concatenate([[0], np.cumsum([len(part) for part in parts])]) / RATE
    blocks = list(egemaps._blocks(Sound(begins[i], part, i > 0) for i, part in enumerate(parts)))
    starts = np.concatenate([begin + np.arange(len(block)) / 100 for begin, block in blocks])
    return starts, np.concatenate([block for _, block in blocks])


@pytest.mark.parametrize("pieces", [1, 7, 500])
def test_rows_do_not_depend_on_blocks(stand_in, monkeypatch, pieces):
    samples = np.random.default_rng(0).normal(0, 0.1, 5 * RATE + 77).astype(np.float32)
    whole = Smile().process_signal(samples, RATE).to_numpy(np.float32)
    monkeypatch.setattr(egemaps, "_BLOCK", 60)
    monkeypatch.setattr(egemaps, "_MARGIN", 5)
    starts, values = features(samples, pieces, start=2.0)
    np.testing.assert_array_equal(values, whole)
    np.testing.assert_allclose(starts, 2 + np.arange(len(whole)) / 100)


def test_a_gap_has_no_rows_and_a_moment_is_too_short(stand_in):
    one, two, three = np.full(1600, 0.1), np.full(100, 0.2), np.full(1600, 0.3)
    pieces = [Sound(0.0, one, False), Sound(1.0, two, False), Sound(2.0, three, False)]
    found = list(egemaps._blocks(iter(pieces)))
    assert [(start, len(block), round(float(block[0, 0]), 3)) for start, block in found] == [(0, 6, 0.1), (2, 6, 0.3)]


def test_loud_sound_is_cut_off_and_a_lost_sample_loses_the_rows_that_see_it(stand_in):
    samples = np.full(RATE, 3.0, np.float32)
    samples[8000] = np.nan
    _, values = features(samples)
    lost = np.isnan(values).any(axis=1)
    assert values[~lost].max() < 1
    # Its row begins with 0.5 s; the first that sees it began 50 ms before, and each is smoothed with its neighbours.
    assert np.flatnonzero(lost).tolist() == list(range(44, 52))


def test_a_recording_has_times_and_one_without_sound_nothing(stand_in, tmp_path):
    found = EgemapsFeatures().extract(write_recording(tmp_path / "a.wav", sound=tone(1.0)))
    np.testing.assert_allclose(found.times, 0.01 + np.arange(96) / 100)
    assert found.report == {"seconds": 1.0, "damaged_packets": 0}
    assert EgemapsFeatures().extract(write_recording(tmp_path / "b.mp4", times=[0, 0.04])) is None
    short = EgemapsFeatures().extract(write_recording(tmp_path / "c.wav", sound=tone(0.05)))
    assert short.values.shape == (0, 25)


def test_without_opensmile_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opensmile", None)
    egemaps._smile.cache_clear()
    with pytest.raises(ImportError, match=r"eGeMAPS needs opensmile: pip install 'm3er-fast\[opensmile\]'"):
        EgemapsFeatures()


def test_a_run_names_the_licence(tmp_path, capsys):
    pytest.importorskip("opensmile")
    write_recording(tmp_path / "in.wav", sound=tone(1.0))
    command = ["extract", str(tmp_path / "in.wav"), "--out", str(tmp_path / "out"), "--audio", "egemaps"]
    assert main([*command, "--face", "none", "--steps", "0.1"]) == 0
    assert "openSMILE's licence: audEERING Research License Agreement: no commercial use" in capsys.readouterr().err
    described = json.loads((tmp_path / "out" / "_manifest.json").read_text())["settings"]["modalities"]["audio"]
    assert described["licence"].startswith("audEERING Research License Agreement")
    assert described["names"][0] == "Loudness_sma3"
    assert len(described["names"]) == EgemapsFeatures.dimension
    corpus = read_parquet(tmp_path / "out")
    assert corpus.features["audio"].shape == (1, 10, 25)
    pitch = corpus.features["audio"][0, 2:-2, described["names"].index("F0semitoneFrom27.5Hz_sma3nz")]
    np.testing.assert_allclose(pitch, 12 * np.log2(200 / 27.5), atol=0.2)
    model = SimpleNamespace(extraction=corpus.extraction)
    assert isinstance(extractors_of(model)[0]["audio"], EgemapsFeatures)
    corpus.extraction["modalities"]["audio"]["hop_s"] = 0.02
    with pytest.raises(ValueError, match=r"audio: hop_s is 0\.01, wanted 0\.02"):
        extractors_of(model)


def test_rows_are_those_of_opensmile_over_the_whole(monkeypatch):
    opensmile = pytest.importorskip("opensmile")
    generator = np.random.default_rng(0)
    voice = np.concatenate([tone(0.7, hertz) for hertz in (110, 150, 220, 180, 130, 240, 90, 160)])
    voice[RATE : 2 * RATE] = 0
    samples = voice + generator.normal(0, 0.01, len(voice)).astype(np.float32)
    smile = opensmile.Smile(
        feature_set=opensmile.FeatureSet.eGeMAPSv02, feature_level=opensmile.FeatureLevel.LowLevelDescriptors
    )
    wanted = smile.process_signal(samples, RATE)
    monkeypatch.setattr(egemaps, "_BLOCK", 150)
    monkeypatch.setattr(egemaps, "_MARGIN", 50)
    starts, values = features(samples, pieces=20)
    np.testing.assert_array_equal(values, wanted.to_numpy())
    np.testing.assert_allclose(starts, wanted.index.get_level_values("start").total_seconds(), atol=1e-6)
