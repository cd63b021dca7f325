"""Decoding of recordings: sound and pictures, each with its time, as far as the file is whole.

A time is in seconds from the start of the container, by the presentation timestamps of the file. A frame's number over
a frame rate is no time: it is seconds off where the rate varies.

A packet that cannot be decoded is counted and left out, and what follows it is decoded still. Memory does not grow with
the length of a recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3er_fast.corpus.base import CorpusError

SAMPLE_RATE = 16_000
"""Samples per second of all sound after decoding."""

_MOST_ERRORS_IN_A_ROW = 1000
_JUMP_S = 0.05  # a longer gap between two pieces of sound is kept as a gap; shorter ones are rounding of timestamps


class Probe(NamedTuple):
    """What the header of a recording says."""

    seconds: float | None
    """The duration that the container claims; None where it claims none."""
    has_sound: bool
    has_pictures: bool


class Sound(NamedTuple):
    """Consecutive samples of one channel."""

    start: float
    """Seconds."""
    samples: NDArray[np.float32]
    """(n,) at :data:`SAMPLE_RATE`."""
    continues: bool
    """Whether it follows the piece before it without a gap."""


class Picture(NamedTuple):
    """One picture, as a viewer would see it."""

    time: float
    """Seconds."""
    pixels: NDArray[np.uint8]
    """(height, width, 3), red, green and blue."""


def probe(path: str | Path) -> Probe:
    """Return what the header of a recording says.

    Raises:
        CorpusError: if the file is no recording, or has neither sound nor pictures.
    """
    with _opened(path) as container:
        found = Probe(
            container.duration / _av().time_base if container.duration else None,
            _stream(container, "audio") is not None,
            _stream(container, "video") is not None,
        )
    if not (found.has_sound or found.has_pictures):
        raise CorpusError(f"{path} has neither sound nor pictures")
    return found


class Decoder:
    """The frames of a recording's first stream of a kind, once, in order.

    Attributes:
        damaged: packets so far that could not be decoded.
        end: the latest time so far at which a decoded frame ended, in seconds.

    Args:
        path: of the recording.
        kind: "audio" or "video".
    """

    def __init__(self, path: str | Path, kind: Literal["audio", "video"]) -> None:
        self._path, self._kind = path, kind
        self.damaged = 0
        self.end = 0.0

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        """Yield the time and the frame of PyAV; nothing where there is no such stream.

        Raises:
            CorpusError: if the file is no recording.
        """
        with _opened(self._path) as container:
            stream = _stream(container, self._kind)
            if stream is None:
                return
            stream.thread_type = "NONE"  # with threads, one damaged packet takes its neighbours with it
            start = (container.start_time or 0) / _av().time_base
            for packet in self._packets(container, stream):
                for frame in self._decoded(packet):
                    if frame.time is None:  # it cannot be placed
                        self.damaged += 1
                        continue
                    time = frame.time - start
                    self.end = max(self.end, time + _duration(frame, stream))
                    yield time, frame

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield packets; a position that cannot be read is passed over, as far as the format knows where to go on."""
        errors_in_a_row = 0
        while errors_in_a_row < _MOST_ERRORS_IN_A_ROW:
            try:
                for packet in container.demux(stream):
                    errors_in_a_row = 0
                    yield packet
            except _av().error.EOFError:
                return
            except _av().error.FFmpegError:
                self.damaged += 1
                errors_in_a_row += 1
            else:
                return

    def _decoded(self, packet: Any) -> list[Any]:
        try:
            return list(packet.decode())
        except _av().error.EOFError:
            return []
        except _av().error.FFmpegError:
            self.damaged += 1
            return []


def read_sound(decoder: Decoder) -> Iterator[Sound]:
    """Yield the sound of a recording, mixed to one channel at :data:`SAMPLE_RATE`, in pieces of a packet or so."""
    av = _av()
    resampler = None
    expected = math.nan  # time at which the next piece starts if it follows the last one
    for time, frame in decoder:
        jumps = not abs(time - expected) <= _JUMP_S
        if resampler is None or jumps:
            resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
            start, count = time, 0  # where this run of pieces starts, and its samples so far
        expected = time + frame.samples / frame.sample_rate
        frame.pts = None  # the resampler refuses frames whose timestamps are a little off; they were read above
        try:
            pieces = [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]
        except av.error.FFmpegError:  # a damaged header may claim any rate and any number of channels
            decoder.damaged += 1
            resampler = None
            continue
        samples = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
        yield Sound(start + count / SAMPLE_RATE, samples, continues=count > 0)
        count += len(samples)


def sound_within(recording: str | Path, start: float, end: float) -> NDArray[np.int16]:
    """Return the samples from ``start`` to ``end``, at :data:`SAMPLE_RATE`; what the recording lacks is silence.

    Raises:
        CorpusError: if the file is no recording.
    """
    pieces, count = [np.empty(0, np.int16)], 0
    for piece in read_sound(Decoder(recording, "audio")):
        if piece.start >= end:
            break
        place = round((piece.start - start) * SAMPLE_RATE)
        stop = len(piece.samples) if math.isinf(end) else round((end - piece.start) * SAMPLE_RATE)
        part = piece.samples[max(0, count - place) : max(0, stop)]
        if not len(part):
            continue
        silence = np.zeros(max(0, place - count), np.int16)
        pieces += [silence, (np.nan_to_num(part).clip(-1, 1) * 32767).astype(np.int16)]
        count += len(silence) + len(part)
    return np.concatenate(pieces)


def read_pictures(decoder: Decoder, *, per_second: float | None, width: int) -> Iterator[Picture]:
    """Yield the pictures of a recording, upright.

    Args:
        decoder: of its pictures.
        per_second: the most pictures per second; None yields all.
        width: the most pixels in a row; larger pictures are made smaller, in proportion.
    """
    last = None
    for time, frame in decoder:
        if per_second is not None:
            # The first picture of each interval; timestamps are rounded, so that one may seem to be a little early.
            interval = math.floor(time * per_second + 0.05)
            if interval == last:
                continue
            last = interval
        scale = min(1.0, width / frame.width)
        size = {"width": max(2, round(frame.width * scale)), "height": max(2, round(frame.height * scale))}
        pixels = frame.reformat(**size, format="rgb24").to_ndarray()
        quarters = round(frame.rotation / 90) % 4
        yield Picture(time, np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels)


def _opened(path: str | Path) -> Any:
    av = _av()
    try:
        return av.open(str(path), metadata_errors="replace")
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except av.error.FFmpegError as error:
        raise CorpusError(f"{path} is no recording that FFmpeg reads, or it is cut off: {error.strerror}") from error


def _stream(container: Any, kind: str) -> Any:
    """Return the first stream of a kind that is not the cover of an album, or None."""
    av = _av()
    for stream in container.streams:
        if stream.type == kind and not (stream.disposition & av.stream.Disposition.attached_pic):
            return stream
    return None


def _duration(frame: Any, stream: Any) -> float:
    if stream.type == "audio":
        return float(frame.samples / frame.sample_rate)
    return float(frame.duration * frame.time_base) if frame.duration else 0.0


def _av() -> Any:
    """Return the module ``av``, which does not write to the terminal.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import av
        import av.logging
    except ImportError as error:
        raise ImportError("reading recordings needs PyAV: pip install 'm3er-fast[extract]'") from error
    av.logging.set_level(av.logging.PANIC)
    return av
