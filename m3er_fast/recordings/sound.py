"""Features of sound, 100 rows per second: what COVAREP's users know, by a library with a permissive licence.

Dimension legend: n samples, N frames.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from m3er_fast.recordings.decoding import SAMPLE_RATE, Decoder, Sound, read_sound
from m3er_fast.recordings.frames import Frames
from m3er_fast.recordings.model_files import cache_folder

HOP = SAMPLE_RATE // 100  # 10 ms
_SPECTRUM = 512  # samples of a Fourier transform, of which a window of 25 ms is seen
_WINDOW = SAMPLE_RATE // 40
_PITCH = 1024  # samples in which a period is looked for: four of the longest
_LOWEST_HZ, _HIGHEST_HZ = 62.5, 500.0
_VOICED = 0.45  # the least correlation of a voiced frame with itself one period later: Boersma 1993's threshold
_SILENT_DB = -60.0  # below full scale; what is quieter is never voiced
# What is so far below the loud parts of its recording is not voiced: hum in the pauses correlates with itself, too. On
# read speech, frames then agree with Praat's, whose threshold of silence is relative as well
# (docs/recordings_features.md).
_QUIET_DB = -20.0
_LOUD_PERCENTILE = 95  # not the maximum, which may be a door
_BLOCK = 1000  # frames that are computed at once, 10 s: a minute took 1.25 times as long, and 0.13 GB more
_MARGIN = _PITCH // 2 + HOP  # samples that a frame sees on either side, with the frame before it for the flux

NAMES = (
    *(f"mfcc_{number}" for number in range(1, 13)),
    "f0_hz",
    "voiced",
    "harmonicity_db",
    "level_db",
    "zero_crossings",
    "centroid_hz",
    "rolloff_hz",
    "flatness",
    "flux",
)


class SoundFeatures:
    """Pitch, voicing, level and spectrum of the sound of a recording, by librosa.

    A row describes the 25 ms (pitch, voicing and harmonicity: 64 ms) around its time; rows are 10 ms apart.

    * ``mfcc_1`` to ``mfcc_12``: mel frequency cepstral coefficients, of 40 bands in dB;
    * ``f0_hz``: fundamental frequency by YIN (de Cheveigné and Kawahara 2002), 62.5 to 500 Hz; 0 where unvoiced;
    * ``voiced``: 1 or 0: whether r (below) is above 0.45, and the level is above −60 dB and less than 20 dB below that
      of the loud parts of the recording (the 95th percentile);
    * ``harmonicity_db``: 10 log₁₀(r / (1 − r)), with r the correlation of the frame, less its mean, with itself one
      period later;
    * ``level_db``: mean power, in dB of full scale, at least −100;
    * ``zero_crossings``: per sample;
    * ``centroid_hz``, ``rolloff_hz`` (85 % of the power), ``flatness``: of the spectrum;
    * ``flux``: distance between the spectra of this frame and the one before, each of length 1.

    A row is NaN where a sample that it sees is not finite. There is no row where the recording has a gap.
    """

    dimension = len(NAMES)

    def describe(self) -> dict[str, Any]:
        """Return everything that the features depend on, as JSON."""
        return {
            "features": "librosa",
            "version": _version(),
            "names": list(NAMES),
            "hop_s": HOP / SAMPLE_RATE,
            "voiced": {"correlation": _VOICED, "silent_db": _SILENT_DB, "quiet_db": _QUIET_DB},
        }

    def extract(self, recording: Path) -> Frames | None:
        """Return the features of a recording; None if it has no sound.

        Raises:
            CorpusError: if it cannot be read.
            ImportError: if a library is missing.
        """
        decoder = Decoder(recording, "audio")
        times, values = [], []
        for start, block in _blocks(read_sound(decoder)):
            values.append(block)
            times.append(start + np.arange(len(block)) * (HOP / SAMPLE_RATE))
        if not values:
            return None
        report = {"seconds": round(decoder.end, 3), "damaged_packets": decoder.damaged}
        return Frames(np.concatenate(times), _without_quiet_pitch(np.concatenate(values)), report)


def _blocks(pieces: Iterator[Sound]) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Yield the time of the first frame and the features of consecutive frames, 10 s or less at a time.

    Each frame sees the same samples wherever a block ends: blocks overlap by what a frame sees on either side. Before
    and after a run of pieces without a gap is silence.
    """
    held: list[NDArray[np.float32]] = []
    count, start = 0, 0.0  # samples held, and the time of the first frame that is still to come

    def take(frames: int, *, last: bool) -> NDArray[np.float32]:
        """Return the features of the next frames, and hold what the frames after them see."""
        nonlocal held, count, start
        samples = np.concatenate(held)
        seen = 2 * _MARGIN + (frames - 1) * HOP
        block = _features(np.pad(samples, (0, max(0, seen - len(samples))))[:seen])
        held = [] if last else [samples[frames * HOP :]]
        count = 0 if last else len(held[0])
        start += frames * HOP / SAMPLE_RATE
        return block

    for piece in pieces:
        if count and not piece.continues:
            yield start, take(-(-(count - _MARGIN) // HOP), last=True)
        if not count:
            held, count, start = [np.zeros(_MARGIN, np.float32)], _MARGIN, piece.start
        held.append(piece.samples)
        count += len(piece.samples)
        while count >= 2 * _MARGIN + _BLOCK * HOP:
            yield start, take(_BLOCK, last=False)
    if count > _MARGIN:
        yield start, take(-(-(count - _MARGIN) // HOP), last=True)


def _without_quiet_pitch(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Make those rows of a recording unvoiced, in place, that are quiet beside its loud parts."""
    level = values[:, NAMES.index("level_db")]
    known = level[~np.isnan(level)]
    if len(known):
        loud = float(np.percentile(known, _LOUD_PERCENTILE))
        quiet = level <= max(_SILENT_DB, loud + _QUIET_DB)
        for name in ("f0_hz", "voiced"):
            values[quiet, NAMES.index(name)] = 0
    return values


def _features(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the features of the frames whose middles are ``_MARGIN``, ``_MARGIN + HOP``, … samples in."""
    librosa = _librosa()
    frames = (len(samples) - 2 * _MARGIN) // HOP + 1
    finite = np.isfinite(samples)
    samples = np.where(finite, samples, np.float32(0))

    def around(values: NDArray[Any], length: int, before: int = 0) -> NDArray[Any]:
        """Return what a window of ``length`` around each frame sees, and around ``before`` frames before the first."""
        first = _MARGIN - before * HOP - length // 2
        return values[first : first + length + (frames + before - 1) * HOP]

    def windows(values: NDArray[Any], length: int) -> NDArray[Any]:
        return np.lib.stride_tricks.sliding_window_view(around(values, length), length)[::HOP]

    spectrum = np.abs(
        librosa.stft(
            around(samples, _SPECTRUM, before=1), n_fft=_SPECTRUM, hop_length=HOP, win_length=_WINDOW, center=False
        )
    )
    direction = librosa.util.normalize(spectrum, norm=2, axis=0)
    flux = np.linalg.norm(np.diff(direction, axis=1), axis=0)
    spectrum = spectrum[:, 1:]
    bands = librosa.feature.melspectrogram(S=spectrum**2, sr=SAMPLE_RATE, n_mels=40)
    decibels = librosa.power_to_db(bands, top_db=None)  # relative to nothing of the block, which ends anywhere
    seen = windows(samples, _WINDOW)
    level = 10 * np.log10(np.mean(seen**2, axis=1) + 1e-10)
    pitch, correlation = _pitch(around(samples, _PITCH), windows(samples, _PITCH))
    voiced = correlation > _VOICED
    features = np.column_stack(
        [
            librosa.feature.mfcc(S=decibels, n_mfcc=13)[1:].T,
            np.where(voiced, pitch, 0),
            voiced,
            10 * np.log10(correlation / (1 - correlation)),
            level,
            np.mean(np.signbit(seen[:, 1:]) != np.signbit(seen[:, :-1]), axis=1),
            librosa.feature.spectral_centroid(S=spectrum, sr=SAMPLE_RATE)[0],
            librosa.feature.spectral_rolloff(S=spectrum, sr=SAMPLE_RATE)[0],
            librosa.feature.spectral_flatness(S=spectrum)[0],
            flux,
        ]
    ).astype(np.float32)
    features[~windows(finite, _PITCH).all(axis=1)] = np.nan
    return features


def _pitch(samples: NDArray[np.float32], windows: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return each frame's fundamental frequency, and its correlation with itself one period later, within (0, 1)."""
    pitch = _librosa().yin(
        samples,
        fmin=_LOWEST_HZ,
        fmax=_HIGHEST_HZ,
        sr=SAMPLE_RATE,
        frame_length=_PITCH,
        hop_length=HOP,
        center=False,
    )
    longest = int(SAMPLE_RATE / _LOWEST_HZ) + 1
    here = np.arange(_PITCH - longest)
    later = here + np.round(SAMPLE_RATE / pitch).astype(np.int64).clip(1, longest)[:, None]
    one = _centred(windows[:, here])
    other = _centred(np.take_along_axis(windows, later, axis=1))
    power = np.sqrt(np.sum(one**2, axis=1) * np.sum(other**2, axis=1))
    correlation = np.sum(one * other, axis=1) / np.maximum(power, 1e-10)
    return pitch, correlation.clip(1e-3, 1 - 1e-4)


def _centred(values: NDArray[np.float32]) -> NDArray[np.float32]:
    centred: NDArray[np.float32] = values - values.mean(axis=1, keepdims=True)
    return centred


_MISSING = "features of sound need librosa: pip install 'm3er-fast[extract]'"


def _version() -> str:
    """Return the version of librosa without loading it, for which the process that starts workers has no use.

    Raises:
        ImportError: if it is missing.
    """
    try:
        return importlib.metadata.version("librosa")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(_MISSING) from error


@functools.cache
def _librosa() -> Any:
    """Return the module ``librosa``, one process after the other.

    The first import compiles functions for some seconds and keeps them on the disk. Two processes that do so at once
    leave a mixture of both on the disk, which ends every later process that calls them.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import librosa
    except ImportError as error:
        raise ImportError(_MISSING) from error
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "librosa.lock"):
        for function in (librosa.stft, librosa.yin, librosa.feature.mfcc, librosa.util.normalize):
            callable(function)  # librosa loads and compiles a module when a name of it is first asked for
    return librosa
