"""When each word of a transcript is said, by forced alignment."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from m3er_fast.recordings.decoding import SAMPLE_RATE, sound_within
from m3er_fast.recordings.word_vectors import spellings
from m3er_fast.recordings.words import Cue, Transcript, Word

_FRAMES_PER_SECOND = 100  # of pocketsphinx


class WordTimer(Protocol):
    """What finds the times of words: a timer of your own needs two methods."""

    def describe(self) -> dict[str, Any]:
        """Return everything that the times depend on, as JSON."""

    def time(self, recording: Path, transcript: Transcript) -> Transcript:
        """Return the transcript with times for words that had none, where they are found."""


class ForcedAlignment:
    """Times of English words by pocketsphinx, whose model comes with it.

    Each cue without times of its words is aligned with its own stretch of the sound, in memory: a whole recording
    without cues takes 2 bytes per sample. A word that is not in the dictionary keeps no time, and neither does any word
    of a cue that cannot be aligned; :func:`~m3er_fast.recordings.words.with_times` spreads those.

    Raises:
        ImportError: if pocketsphinx is missing.
    """

    def __init__(self) -> None:
        _pocketsphinx()

    def describe(self) -> dict[str, Any]:
        """Return everything that the times depend on, as JSON."""
        return {"times": "pocketsphinx", "version": importlib.metadata.version("pocketsphinx")}

    def time(self, recording: Path, transcript: Transcript) -> Transcript:
        """Return the transcript with times for words that had none, where they are found.

        Raises:
            CorpusError: if the recording cannot be read.
        """
        if all(word.timed for word in transcript.words):
            return transcript
        # Without a model of language, which alignment does not use and which takes 0.2 s to load.
        decoder = _pocketsphinx().Decoder(samprate=SAMPLE_RATE, lm=None, loglevel="FATAL")
        cues = []
        for cue in transcript.cues:
            if all(word.timed for word in cue.words):
                cues.append(cue)
                continue
            start = cue.start if math.isfinite(cue.start) else 0.0
            end = cue.end if math.isfinite(cue.end) else math.inf
            samples = sound_within(recording, start, end)
            cues.append(Cue(cue.start, cue.end, tuple(_align(decoder, samples, start, cue.words))))
        return Transcript(tuple(cues))


def _align(decoder: Any, samples: NDArray[np.int16], start: float, words: Sequence[Word]) -> list[Word]:
    """Return words with the times at which they are found in samples that begin at ``start``."""
    spelled = [_spelling(decoder, word.text) for word in words]
    known = [number for number, text in enumerate(spelled) if text is not None]
    if not known or not len(samples):
        return list(words)
    timed = list(words)
    try:
        decoder.set_align_text(" ".join(str(spelled[number]) for number in known))
        decoder.start_utt()
        decoder.process_raw(samples.tobytes(), full_utt=True)
        decoder.end_utt()
        segments = [segment for segment in decoder.seg() or () if segment.word[0] not in "<[("]
    except RuntimeError:  # it finds no way through the sound
        return timed
    if len(segments) == len(known):
        for number, segment in zip(known, segments, strict=True):
            begin = start + segment.start_frame / _FRAMES_PER_SECOND
            end = start + (segment.end_frame + 1) / _FRAMES_PER_SECOND
            timed[number] = Word(words[number].text, begin, end)
    return timed


def _spelling(decoder: Any, word: str) -> str | None:
    """Return a word as the dictionary has it, or None if it has not."""
    return next((text for text in map(str.lower, spellings(word)) if decoder.lookup_word(text)), None)


def _pocketsphinx() -> Any:
    """Return the module ``pocketsphinx``.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import pocketsphinx
    except ImportError as error:
        raise ImportError("forced alignment needs pocketsphinx: pip install 'm3er-fast[align]'") from error
    return pocketsphinx
