"""Features of sound by openSMILE: the low-level descriptors of eGeMAPS, 100 rows per second.

Dimension legend: n samples, N rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3er_fast.recordings.decoding import SAMPLE_RATE, Decoder, Sound, read_sound
from m3er_fast.recordings.frames import Frames

_HOP = SAMPLE_RATE // 100  # 10 ms
_WINDOW = 6 * _HOP  # samples that a row sees from its start: pitch 60 ms, spectra 20 ms
_MIDDLE_S = 0.01  # of the 20 ms of the spectra
_BLOCK = 6000  # rows that are computed at once: a minute
_MARGIN = 200  # rows on either side whose sound is seen too. Half a second is enough for the same values on speech
_LOUDEST = 32767 / 32768  # openSMILE computes with 16 bits, and wraps what is louder round to the other sign


class EgemapsFeatures:
    """The 25 low-level descriptors of eGeMAPS (Eyben et al. 2016), version 2, by openSMILE.

    Loudness, spectral shape, 4 cepstral coefficients, pitch (semitones above 27.5 Hz), jitter, shimmer, harmonicity and
    three formants, named as openSMILE names them. What only a voice has is 0 elsewhere. A row describes the 20 ms
    around its time, but pitch, jitter, shimmer and harmonicity the 60 ms that begin with them.

    A row is NaN where a sample that it sees is not finite. There is no row where the recording has a gap.

    openSMILE is under a licence of its own, which allows research but no commercial use: :attr:`licence`.

    Raises:
        ImportError: if opensmile is missing.
    """

    dimension = 25
    licence = "audEERING Research License Agreement: no commercial use"

    def __init__(self) -> None:
        _smile()

    def describe(self) -> dict[str, Any]:
        """Return everything that the features depend on, as JSON."""
        import opensmile

        return {
            "features": "egemaps",
            "version": opensmile.__version__,
            "licence": self.licence,
            "names": list(_smile().feature_names),
            "hop_s": _HOP / SAMPLE_RATE,
        }

    def extract(self, recording: Path) -> Frames | None:
        """Return the features of a recording; None if it has no sound.

        Raises:
            CorpusError: if it cannot be read.
        """
        decoder = Decoder(recording, "audio")
        times: list[NDArray[Any]] = [np.empty(0)]
        values = [np.empty((0, self.dimension), np.float32)]
        for start, block in _blocks(read_sound(decoder)):
            times.append(start + _MIDDLE_S + np.arange(len(block)) * (_HOP / SAMPLE_RATE))
            values.append(block)
        if not decoder.end:
            return None
        report = {"seconds": round(decoder.end, 3), "damaged_packets": decoder.damaged}
        return Frames(np.concatenate(times), np.concatenate(values), report)


def _blocks(pieces: Iterator[Sound]) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Yield the start of the first row and the features of consecutive rows, a minute or so at a time.

    A run of pieces without a gap has the rows that openSMILE finds in all of it at once: what is held of it begins
    ``_MARGIN`` rows before the next row, and goes on for as many after the last one.
    """
    held: list[NDArray[np.float32]] = []
    count, start, margin = 0, 0.0, 0  # samples held, the time of the first, and the rows of them that are out already
    for piece in pieces:
        if not piece.continues:
            if count >= _WINDOW:
                yield start + margin * _HOP / SAMPLE_RATE, _features(np.concatenate(held))[margin:]
            held, count, start, margin = [], 0, piece.start, 0
        held.append(piece.samples)
        count += len(piece.samples)
        while count >= (margin + _BLOCK + _MARGIN) * _HOP + _WINDOW:
            samples, end = np.concatenate(held), margin + _BLOCK
            seen = samples[: (end + _MARGIN) * _HOP + _WINDOW]
            yield start + margin * _HOP / SAMPLE_RATE, _features(seen)[margin:end]
            held, start = [samples[(end - _MARGIN) * _HOP :]], start + (end - _MARGIN) * _HOP / SAMPLE_RATE
            count, margin = len(held[0]), _MARGIN
    if count >= _WINDOW:
        yield start + margin * _HOP / SAMPLE_RATE, _features(np.concatenate(held))[margin:]


def _features(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (N, 25) features of (n,) samples, n ≥ ``_WINDOW``."""
    finite = np.isfinite(samples)
    sound = np.where(finite, samples, np.float32(0)).clip(-1, _LOUDEST)
    found: NDArray[np.float32] = _smile().process_signal(sound, SAMPLE_RATE).to_numpy(dtype=np.float32)
    if not finite.all():
        lost = np.concatenate([np.zeros(_HOP, bool), ~finite, np.zeros(_HOP + _WINDOW, bool)])
        # openSMILE smooths each row with its neighbours, so that a row sees their windows too.
        seen = np.lib.stride_tricks.sliding_window_view(lost, _WINDOW + 2 * _HOP)[::_HOP]
        found[seen[: len(found)].any(axis=1)] = np.nan
    return found


@functools.cache
def _smile() -> Any:
    """Return the extractor of opensmile.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import opensmile
    except ImportError as error:
        raise ImportError("eGeMAPS needs opensmile: pip install 'm3er-fast[opensmile]'") from error
    return opensmile.Smile(
        feature_set=opensmile.FeatureSet.eGeMAPSv02, feature_level=opensmile.FeatureLevel.LowLevelDescriptors
    )
