"""Features of sound: what is known of tones, noise and silence, and that no block's end is seen in them."""

import importlib.metadata

import numpy as np
import pytest

librosa = pytest.importorskip("librosa")
pytest.importorskip("av")

from recording_files import RATE, tone, write_recording  # noqa: E402

from m3er_fast.recordings import sound as module  # noqa: E402
from m3er_fast.recordings.decoding import Sound  # noqa: E402
from m3er_fast.recordings.sound import NAMES, SoundFeatures  # noqa: E402


def features(samples, pieces=1, start=0.0):
    """Return the times and features of samples that come in pieces."""
    parts = np.array_split(samples, pieces)
    begins = start + np.concatenate([[0], np.cumsum([len(part) for part in parts])]) / RATE
    blocks = list(module._blocks(Sound(begins[i], part, i > 0) for i, part in enumerate(parts)))
    times = np.concatenate([begin + np.arange(len(block)) / 100 for begin, block in blocks])
    return times, np.concatenate([block for _, block in blocks])


def column(values, name):
    return values[:, NAMES.index(name)]


@pytest.mark.parametrize("hertz", [80.0, 200.0, 333.0])
def test_pitch_and_level_of_a_voice(hertz):
    times, values = features(tone(1.0, hertz))
    assert values.shape == (100, len(NAMES))
    np.testing.assert_allclose(times, np.arange(100) / 100)
    middle = values[10:-10]
    np.testing.assert_allclose(column(middle, "f0_hz"), hertz, rtol=0.01)
    assert (column(middle, "voiced") == 1).all()
    assert column(middle, "harmonicity_db").min() > 15
    power = 10 * np.log10(np.mean(tone(1.0, hertz).astype(np.float64) ** 2))
    np.testing.assert_allclose(column(middle, "level_db"), power, atol=1)


def test_noise_and_silence_have_no_pitch():
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    _, values = features(noise)
    assert column(values, "voiced").mean() < 0.02
    assert (column(values, "f0_hz")[column(values, "voiced") == 0] == 0).all()
    np.testing.assert_allclose(column(values, "centroid_hz")[5:-5].mean(), 4000, rtol=0.05)
    np.testing.assert_allclose(column(values, "zero_crossings")[5:-5].mean(), 0.5, rtol=0.05)
    _, silent = features(np.zeros(RATE, np.float32))
    assert np.isfinite(silent).all()
    np.testing.assert_allclose(column(silent, "level_db"), -100, rtol=1e-6)
    assert (column(silent, "voiced") == 0).all()
    assert (column(silent, "flux") == 0).all()


def test_cepstra_are_those_of_librosa_over_the_whole():
    samples = tone(1.0) + np.random.default_rng(0).normal(0, 0.05, RATE).astype(np.float32)
    _, values = features(samples)
    power = librosa.feature.melspectrogram(
        y=samples, sr=RATE, n_fft=512, hop_length=160, win_length=400, n_mels=40, pad_mode="constant"
    )
    wanted = librosa.feature.mfcc(S=librosa.power_to_db(power, top_db=None), n_mfcc=13)[1:].T
    np.testing.assert_allclose(values[:, :12], wanted[:100], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("pieces", [1, 7, 500])
@pytest.mark.parametrize("block", [1, 13])
def test_no_end_of_a_block_or_piece_is_seen(monkeypatch, block, pieces):
    generator = np.random.default_rng(0)
    samples = tone(0.6) + generator.normal(0, 0.05, round(0.6 * RATE)).astype(np.float32)
    samples = samples[:-77]  # the last frame's step is not whole
    times, whole = features(samples)
    assert len(whole) == 60
    monkeypatch.setattr(module, "_BLOCK", block)
    again, values = features(samples, pieces)
    np.testing.assert_allclose(again, times, atol=1e-9)
    np.testing.assert_allclose(values, whole, rtol=1e-4, atol=1e-3)


def test_a_gap_has_no_rows():
    first, second = tone(0.5), tone(0.25)
    blocks = list(module._blocks(iter([Sound(0.0, first, False), Sound(2.0, second, False)])))
    assert [(begin, len(block)) for begin, block in blocks] == [(0.0, 50), (2.0, 25)]
    np.testing.assert_allclose(blocks[1][1], features(second)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("samples", "rows"), [(1, 1), (160, 1), (161, 2), (1600, 10)])
def test_short_sounds_have_rows(samples, rows):
    _, values = features(tone(1.0)[:samples])
    assert values.shape == (rows, len(NAMES))
    assert np.isfinite(values).all()


def test_samples_that_are_not_finite_spoil_the_rows_that_see_them():
    samples = tone(1.0)
    samples[8000] = np.nan
    samples[8001] = np.inf
    _, values = features(samples)
    lost = ~np.isfinite(values).all(axis=1)
    assert lost[50]
    assert lost.sum() <= 8
    np.testing.assert_allclose(values[:46], features(tone(1.0))[1][:46], rtol=1e-4, atol=1e-3)


def test_a_hum_in_the_pauses_and_a_drift_are_no_voice(tmp_path):
    hum = tone(3.0, 100.0, level=0.01)
    samples = hum.copy()
    samples[RATE : 2 * RATE] += tone(1.0)
    found = SoundFeatures().extract(write_recording(tmp_path / "a.wav", sound=samples))
    voiced = column(found.values, "voiced")
    assert voiced[105:195].all()
    assert not voiced[:95].any()
    assert not voiced[205:].any()
    assert (column(found.values, "f0_hz") > 0).tolist() == (voiced == 1).tolist()
    alone = SoundFeatures().extract(write_recording(tmp_path / "b.wav", sound=hum))
    assert column(alone.values, "voiced")[10:-10].all()
    np.testing.assert_allclose(column(alone.values, "f0_hz")[10:-10], 100, rtol=0.01)
    drift = np.linspace(0, 0.5, RATE, dtype=np.float32)  # correlates with itself, but for its mean
    noise = np.random.default_rng(0).normal(0, 0.05, RATE).astype(np.float32)
    found = SoundFeatures().extract(write_recording(tmp_path / "c.wav", sound=drift + noise))
    assert column(found.values, "voiced")[10:-10].mean() < 0.05


def test_a_recording(tmp_path):
    found = SoundFeatures().extract(write_recording(tmp_path / "a.wav", sound=tone(0.5)))
    assert found.values.shape == (50, SoundFeatures.dimension)
    assert found.report == {"seconds": 0.5, "damaged_packets": 0}
    assert SoundFeatures().extract(write_recording(tmp_path / "b.mp4", times=[0, 0.04])) is None
    assert SoundFeatures().describe()["names"] == list(NAMES)
    assert SoundFeatures().describe()["version"] == librosa.__version__


def test_without_librosa_the_error_says_what_to_install(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"features of sound need librosa: pip install 'm3er-fast\[extract\]'"):
        SoundFeatures().describe()
