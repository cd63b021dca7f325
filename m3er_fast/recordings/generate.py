"""Recordings made here, of a portrait that moves and a voice: to try the whole path without any other file.

The voice is that of the program espeak-ng, or else of tones. The recordings are a toy: an "emotion" is a pitch, a pace,
some words and a way to move the head. They show that every step works, and nothing about people.
"""

from __future__ import annotations

import csv
import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from m3er_fast._validation import check_positive_int
from m3er_fast.recordings.decoding import SAMPLE_RATE
from m3er_fast.recordings.words import Word

PICTURES_PER_SECOND = 12
_SIZE = 224  # pixels of a side
_EYES, _EYE_SIZE = ((107, 99), (151, 101)), 11.0  # x and y in the portrait, and the reach of a lid
_VECTOR_DIMENSION = 16
_PROGRAM = "espeak-ng"

Voice: TypeAlias = Literal["espeak-ng", "tones"]
"""What says the words: the program espeak-ng, or a tone for each word."""


def voice_here() -> Voice:
    """Return the best voice that this machine has."""
    return "tones" if shutil.which(_PROGRAM) is None else "espeak-ng"


class Manner(NamedTuple):
    """How an emotion sounds and looks here."""

    hertz: float
    melody: float  # octaves by which the pitch rises and falls
    words_per_second: float
    level: float
    words: tuple[str, ...]
    turns_per_second: float  # of the head
    tilt: float  # degrees to either side
    sway: float  # pixels to either side
    nod: float  # pixels down


MANNERS = {
    "happy": Manner(230, 0.35, 4.0, 0.30, ("great", "love", "sun", "laugh", "win", "friend"), 1.1, 9, 4, 0),
    "sad": Manner(130, 0.05, 2.2, 0.12, ("lost", "alone", "rain", "cry", "gone", "tired"), 0.25, 2, 1, 12),
    "angry": Manner(180, 0.15, 3.4, 0.50, ("hate", "never", "stop", "wrong", "fight", "enough"), 2.6, 2, 9, 4),
    "calm": Manner(165, 0.10, 2.8, 0.20, ("slow", "lake", "rest", "quiet", "breathe", "still"), 0.15, 1, 1, 0),
}
"""Emotion -> its manner."""

_COMMON = ("we", "they", "there", "now", "then", "people", "house", "day", "think", "went", "saw", "again")


class SpokenUtterance(NamedTuple):
    """A part of a generated recording."""

    emotion: str
    words: tuple[Word, ...]
    start: float
    end: float


def generate_recordings(
    folder: str | Path,
    *,
    recordings: int = 30,
    utterances: int = 6,
    voice: Voice = "tones",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write videos, their transcripts, a table of labels and a file of word vectors.

    ``labels.csv`` splits the recordings into train, valid and test, 3 : 1 : 1. The portrait is scikit-image's
    astronaut, in the public domain.

    Args:
        folder: to write to, created if need be.
        recordings: number of videos.
        utterances: in each of them.
        voice: that says the words.
        seed: seeds all random numbers.
        progress: called after every video with the number of those that are written, and of all.

    Raises:
        ImportError: scikit-image or PyAV is missing.
        OSError: the folder cannot be written to, or the voice does not speak.
        ValueError: a number is not a positive int.
    """
    check_positive_int("recordings", recordings)
    check_positive_int("utterances", utterances)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_vectors(folder / "vectors.txt", seed)
    rows = []
    for number in range(recordings):
        name = f"video_{number:03d}"
        split = ("train", "train", "train", "valid", "test")[number % 5]
        emotions = _emotions(utterances, (seed, number))
        spoken = write_video(folder / f"{name}.mp4", emotions, voice=voice, seed=(seed, number))
        rows += [
            (f"{name}_{part}", name, f"{said.start:.3f}", f"{said.end:.3f}", said.emotion, split)
            for part, said in enumerate(spoken)
        ]
        if progress is not None:
            progress(number + 1, recordings)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "recording", "start", "end", "label", "split"), *rows])


def write_video(
    path: Path,
    emotions: Sequence[str],
    *,
    voice: Voice = "tones",
    seed: Any = 0,
    hidden: Sequence[int] = (),
    noisy: Sequence[int] = (),
) -> list[SpokenUtterance]:
    """Write a video and, beside it, its transcript as Whisper writes it, and return what is said in it.

    Args:
        path: of the video.
        emotions: of the utterances, one after the other.
        voice: that says the words.
        seed: seeds all random numbers.
        hidden: utterances during which a box hides the face.
        noisy: utterances during which the sound is noise.

    Raises:
        OSError: the file cannot be written, or the voice does not speak.
    """
    generator = np.random.default_rng(seed)
    spoken, sounds, pictures = [], [], []
    start = 0.0
    for number, emotion in enumerate(emotions):
        words, sound = _speak(MANNERS[emotion], generator, start, voice)
        if number in noisy:
            sound = generator.normal(0, 0.3, len(sound)).astype(np.float32)
        end = start + len(sound) / SAMPLE_RATE
        spoken.append(SpokenUtterance(emotion, words, start, end))
        sounds.append(sound)
        pictures.append(_Movement(MANNERS[emotion], generator, start, hidden=number in hidden))
        start = end
    segments = [
        {
            "start": round(said.start, 3),
            "end": round(said.end, 3),
            "words": [{"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in said.words],
        }
        for said in spoken
    ]
    path.with_suffix(".json").write_text(json.dumps({"segments": segments}), encoding="utf-8")
    _encode(path, np.concatenate(sounds), spoken, pictures)
    return spoken


def write_vectors(path: Path, seed: int = 0) -> None:
    """Write vectors of all words: those of one emotion lie around a point of their own."""
    generator = np.random.default_rng((seed, 1))
    lines = []
    for words in (_COMMON, *(manner.words for manner in MANNERS.values())):
        middle = generator.normal(0, 1 if words is not _COMMON else 0, _VECTOR_DIMENSION)
        for word in words:
            vector = middle + generator.normal(0, 1, _VECTOR_DIMENSION)
            lines.append(f"{word} {' '.join(f'{value:.4f}' for value in vector)}\n")
    path.write_text("".join(lines), encoding="utf-8")


def _emotions(count: int, seed: Any) -> list[str]:
    return [str(name) for name in np.random.default_rng(seed).choice(list(MANNERS), count)]


def _speak(
    manner: Manner, generator: np.random.Generator, start: float, voice: Voice
) -> tuple[tuple[Word, ...], NDArray[np.float32]]:
    """Return words with their times, and their sound; the last fifth of a word's time is a pause."""
    count = int(generator.integers(5, 9))
    own = generator.random(count) < 0.5
    texts = [str(generator.choice(manner.words if mine else _COMMON)) for mine in own]
    words, sounds = [], []
    begin = start
    for number, text in enumerate(texts):
        if voice == "tones":
            sound = _tone(manner, generator, number)
        else:
            said = _said(text, manner, int(generator.integers(-1, 2)))
            sound = np.pad(said, (0, len(said) // 4))
        samples = len(sound)
        sounds.append(sound + generator.normal(0, 0.003, samples))
        words.append(Word(text, begin, begin + 0.8 * samples / SAMPLE_RATE))
        begin += samples / SAMPLE_RATE
    return tuple(words), np.concatenate(sounds).astype(np.float32)


def _tone(manner: Manner, generator: np.random.Generator, number: int) -> NDArray[np.float64]:
    """Return a tone with overtones in place of a word."""
    seconds = generator.uniform(0.8, 1.2) / manner.words_per_second
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    rise = manner.melody * np.sin(2 * np.pi * (0.5 * time + 0.37 * number)) + generator.normal(0, 0.03)
    phase = 2 * np.pi * np.cumsum(manner.hertz * 2**rise) / SAMPLE_RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 9))
    envelope = np.minimum(1, 8 * np.minimum(time / seconds, 1 - time / seconds)) * (time < 0.8 * seconds)
    sound: NDArray[np.float64] = manner.level / 2 * tone * envelope
    return sound


@functools.cache
def _said(text: str, manner: Manner, higher: int) -> NDArray[np.float64]:
    """Return a word as espeak-ng says it, a little higher or lower, without the silence around it."""
    from scipy.signal import resample_poly

    pitch = round((manner.hertz - 100) / 1.6) + 5 * higher  # of espeak-ng's 0 to 99
    command = [_PROGRAM, "-v", "en", "-p", str(pitch), "-s", str(round(60 * manner.words_per_second)), "--stdout", text]
    try:
        wave = subprocess.run(command, capture_output=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise OSError(f"{_PROGRAM} does not speak: {error.stderr.decode(errors='replace').strip()}") from error
    rate = int.from_bytes(wave[24:28], "little")  # the header has 44 bytes; its length is not that of a pipe's content
    samples = np.frombuffer(wave[44:], np.int16)
    if not samples.any():
        raise OSError(f"{_PROGRAM} says nothing for {text!r}")
    sound = resample_poly(samples.astype(np.float64), SAMPLE_RATE, rate)
    loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
    said: NDArray[np.float64] = sound[loud[0] : loud[-1] + 1] * (2 * manner.level / np.abs(sound).max())
    return said


class _Movement:
    """The portrait as it moves during an utterance."""

    def __init__(self, manner: Manner, generator: np.random.Generator, start: float, *, hidden: bool) -> None:
        self._manner, self._start, self._hidden = manner, start, hidden
        self._phase, self._strength = generator.uniform(0, 2 * np.pi), generator.uniform(0.7, 1.3)
        self._blink = start + generator.uniform(0.3, 1.5)

    def picture(self, time: float) -> NDArray[np.uint8]:
        """Return the portrait at a time: turned, moved, and with the lids down during a blink."""
        from scipy import ndimage

        if self._hidden:
            return np.full((_SIZE, _SIZE, 3), 96, dtype=np.uint8)
        manner, strength = self._manner, self._strength
        swing = strength * np.sin(2 * np.pi * manner.turns_per_second * (time - self._start) + self._phase)
        angle = np.deg2rad(manner.tilt * swing)
        y, x = (np.mgrid[:_SIZE, :_SIZE] - _SIZE / 2) * 256 / _SIZE
        across = np.cos(angle) * x + np.sin(angle) * y + 128 + manner.sway * swing
        down = -np.sin(angle) * x + np.cos(angle) * y + 128 - manner.nod * strength * (1 + 0.2 * swing)
        closed = max(0.0, 1 - abs(time - self._blink) / 0.15)
        for eye_x, eye_y in _EYES:
            near = np.exp(-(((across - eye_x) / _EYE_SIZE) ** 2) - ((down - eye_y) / 5.0) ** 2)
            down = down - 9 * closed * near  # the lid above comes down over the eye
        channels = [
            ndimage.map_coordinates(channel, (down, across), order=1, mode="nearest") for channel in _portrait()
        ]
        return np.stack(channels, axis=-1)


@functools.cache
def _portrait() -> list[NDArray[np.uint8]]:
    """Return red, green and blue of the portrait, 256 × 256 each."""
    try:
        from skimage.data import astronaut
    except ImportError as error:
        raise ImportError("generated recordings need scikit-image: pip install 'm3er-fast[extract]'") from error
    picture: NDArray[np.uint8] = astronaut()  # type: ignore[no-untyped-call]
    return list(np.moveaxis(picture[:256, 96:352], -1, 0))


def _encode(
    path: Path, sound: NDArray[np.float32], spoken: Sequence[SpokenUtterance], movements: Sequence[_Movement]
) -> None:
    import av

    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=PICTURES_PER_SECOND)
        video.width = video.height = _SIZE
        video.pix_fmt, video.bit_rate = "yuv420p", 600_000
        audio = container.add_stream("aac", rate=SAMPLE_RATE)
        audio.layout = "mono"
        for number in range(round(spoken[-1].end * PICTURES_PER_SECOND)):
            time = number / PICTURES_PER_SECOND
            current = next(index for index, said in enumerate(spoken) if time < said.end or said is spoken[-1])
            frame = av.VideoFrame.from_ndarray(movements[current].picture(time), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, PICTURES_PER_SECOND)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for first in range(0, len(sound), 1024):
            block = (np.clip(sound[first : first + 1024], -1, 1) * 32767).astype(np.int16)[None]
            piece = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = SAMPLE_RATE, first, Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))
