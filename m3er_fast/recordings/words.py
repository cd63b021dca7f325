"""Words and when they are said: transcripts as other tools write them.

Times are seconds from the start of the recording.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m3er_fast.corpus.base import CorpusError, naming
from m3er_fast.corpus.files import decoding


class Word(NamedTuple):
    """A word, said within [start, end)."""

    text: str
    start: float
    """NaN where unknown."""
    end: float
    """NaN where unknown."""

    @property
    def timed(self) -> bool:
        """Whether it is known when the word is said."""
        return math.isfinite(self.start) and math.isfinite(self.end) and self.start < self.end


class Cue(NamedTuple):
    """A piece of a transcript with one time, such as a subtitle."""

    start: float
    end: float
    words: tuple[Word, ...]


@dataclass(frozen=True)
class Transcript:
    """The words of a recording."""

    cues: tuple[Cue, ...]
    """In the order of their times. A transcript without cues is one cue, of unknown end."""

    @property
    def words(self) -> tuple[Word, ...]:
        """All words."""
        return tuple(word for cue in self.cues for word in cue.words)


def read_transcript(path: str | Path) -> Transcript:
    """Read a transcript, in the format that the end of its name says.

    * ``.csv``: a header and the columns ``word`` (or ``text``), ``start`` and ``end``; times may be blank;
    * ``.vtt``, ``.srt``: subtitles; times within a line, as YouTube writes them, are times of words;
    * ``.TextGrid`` of Praat: the tier ``words``, or else the first one with intervals;
    * ``.ctm`` of NIST: file, channel, start, duration, word;
    * ``.json`` of Whisper and its relatives: ``segments``, with or without ``words``;
    * ``.txt``: words without times.

    Words are ordered by their times, and lose markup. What is no speech is left out: ``[music]``, ``(laughs)``, dashes.

    Raises:
        CorpusError: if the file cannot be read, or has another ending, or one of its times is no number.
        ImportError: if the library for the format is missing.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise CorpusError(f"{path} is no transcript: the name must end with {', '.join(_READERS)}")
    with naming(path), decoding(path, "not readable as a transcript"):
        cues = reader(path) if path.read_bytes().strip() else []
    cues = [cue for cue in cues if cue.words]
    return Transcript(tuple(sorted(cues, key=lambda cue: cue.start)))


def with_times(transcript: Transcript, seconds: float) -> Transcript:
    """Return the transcript with a time for every word.

    Neighbouring words without a time share the time between the words on either side of them, or else the limits of
    their cue, in proportion to their letters.

    Args:
        transcript: with or without times.
        seconds: duration of the recording, the limit of a cue without one.
    """
    cues = []
    for cue in transcript.cues:
        start = cue.start if math.isfinite(cue.start) else 0.0
        end = cue.end if math.isfinite(cue.end) else max(seconds, start)
        cues.append(Cue(start, end, tuple(_spread(cue.words, start, end))))
    return Transcript(tuple(cues))


def _spread(words: Sequence[Word], start: float, end: float) -> list[Word]:
    spread: list[Word] = []
    waiting: list[Word] = []

    def place(until: float) -> None:
        """Share the time from the last word to ``until`` among the words that wait."""
        begin = spread[-1].end if spread else start
        letters = sum(len(word.text) for word in waiting)
        length = max(0.0, until - begin) / max(1, letters)
        for word in waiting:
            begin, last = min(begin + length * len(word.text), max(begin, until)), begin
            spread.append(Word(word.text, last, begin))
        waiting.clear()

    for word in words:
        if word.timed:
            place(word.start)
            spread.append(word)
        else:
            waiting.append(word)
    place(end)
    return spread


def _ordered(words: Sequence[Word]) -> tuple[Word, ...]:
    """Return words by their starts; one without a time stays behind the word before it."""
    keyed, last = [], -math.inf
    for word in words:
        last = word.start if word.timed else last
        keyed.append((last, word))
    return tuple(word for _, word in sorted(keyed, key=lambda pair: pair[0]))


def _one_cue(words: Sequence[Word]) -> list[Cue]:
    """Return all words as one cue, which lasts from the first to the last if all have times."""
    words = _ordered(words)
    if words and all(word.timed for word in words):
        return [Cue(words[0].start, max(word.end for word in words), words)]
    return [Cue(math.nan, math.nan, words)]


_NO_SPEECH = re.compile(r"\[[^\]]*\]|\([^)]*\)|\{\\[^}]*\}|<[^>]*>")


def split_words(text: str) -> list[str]:
    """Return the words of a line of a transcript, without markup and without what is no speech."""
    parts = _NO_SPEECH.sub(" ", text).split()
    return [part for part in parts if any(character.isalnum() for character in part)]


def _read_csv(path: Path) -> list[Cue]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = [name.strip().lower() for name in rows.fieldnames or ()]
        rows.fieldnames = columns
        column = next((name for name in ("word", "text") if name in columns), None)
        if column is None:
            raise CorpusError(f"the columns must be word, start and end, got {', '.join(columns) or 'none'}")
        words = [
            Word(text, _seconds(row.get("start"), rows.line_num), _seconds(row.get("end"), rows.line_num))
            for row in rows
            for text in [" ".join(split_words(row[column] or ""))]
            if text
        ]
    return _one_cue(words)


def _seconds(value: Any, line: int) -> float:
    """Return a time, NaN where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise CorpusError(f"line {line}: a time must be a number of seconds, got {value!r}") from None


_INLINE_TIME = re.compile(r"<(?:(\d+):)?(\d{1,2}):(\d{1,2}[.,]\d+)>")


def _read_subtitles(path: Path) -> list[Cue]:
    try:
        import webvtt
    except ImportError as error:
        raise ImportError("subtitles need webvtt-py: pip install 'm3er-fast[extract]'") from error
    read = webvtt.read if path.suffix.lower() == ".vtt" else webvtt.from_srt
    cues: list[Cue] = []
    shown = last = ""  # the last lines of the caption before and of all so far
    for caption in read(str(path)).captions:
        start = caption.start_in_seconds + caption.start_time.milliseconds / 1000
        end = caption.end_in_seconds + caption.end_time.milliseconds / 1000
        words: list[Word] = []
        for line in caption.raw_text.splitlines():
            text = " ".join(split_words(line))
            # Captions that roll show each line again in the caption after it.
            if text and text != shown:
                words.extend(_timed_line(line, start, end))
                last = text
        shown = last
        cues.append(Cue(start, end, tuple(words)))
    return cues


def _timed_line(line: str, start: float, end: float) -> list[Word]:
    """Return the words of a line, with times if it has times within it."""
    parts = _INLINE_TIME.split(line)  # text, then hours, minutes, seconds, text, and so on
    if len(parts) == 1:
        return [Word(text, math.nan, math.nan) for text in split_words(line)]
    starts = [start]
    for hours, minutes, seconds in zip(parts[1::4], parts[2::4], parts[3::4], strict=True):
        starts.append(3600 * int(hours or 0) + 60 * int(minutes) + float(seconds.replace(",", ".")))
    pieces = [(split_words(text), begin) for text, begin in zip(parts[::4], starts, strict=True)]
    words: list[Word] = []
    for (texts, begin), until in zip(pieces, [*starts[1:], end], strict=True):
        words.extend(_spread([Word(text, math.nan, math.nan) for text in texts], begin, until))
    return words


def _read_textgrid(path: Path) -> list[Cue]:
    try:
        from praatio import textgrid
        from praatio.data_classes.interval_tier import IntervalTier
    except ImportError as error:
        raise ImportError("TextGrid files need praatio: pip install 'm3er-fast[extract]'") from error
    grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False)
    tiers = [grid.getTier(name) for name in grid.tierNames]
    tiers = [tier for tier in tiers if isinstance(tier, IntervalTier)]
    if not tiers:
        raise CorpusError("it has no tier with intervals")
    tier = next((tier for tier in tiers if tier.name.strip().lower() in ("words", "word")), tiers[0])
    words = []
    for start, end, label in tier.entries:
        texts = split_words(label)
        words.extend(_spread([Word(text, math.nan, math.nan) for text in texts], float(start), float(end)))
    return _one_cue(words)


def _read_ctm(path: Path) -> list[Cue]:
    words = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        fields = line.split()
        if not fields or line.startswith(";;"):
            continue
        if len(fields) < 5:
            raise CorpusError(f"line {number}: wanted file, channel, start, duration and word, got {line!r}")
        start, duration = _seconds(fields[2], number), _seconds(fields[3], number)
        words += [Word(text, start, start + duration) for text in split_words(fields[4])]
    return _one_cue(words)


def _read_whisper(path: Path) -> list[Cue]:
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    segments = found.get("segments") if isinstance(found, dict) else None
    if not isinstance(segments, list):
        raise CorpusError("it must be an object with a list 'segments', as Whisper writes it")
    return list(cues_of_segments(segments))


def cues_of_segments(segments: Iterable[Mapping[str, Any]]) -> tuple[Cue, ...]:
    """Return the cues of segments as Whisper has them: ``start``, ``end``, and ``words`` or ``text``.

    A segment without words is left out.

    Raises:
        CorpusError: if one of the times is no number.
    """
    cues = []
    for number, segment in enumerate(segments, 1):
        start, end = _seconds(segment.get("start"), number), _seconds(segment.get("end"), number)
        timed = segment.get("words") or [{"word": text} for text in split_words(segment.get("text", ""))]
        words = [
            Word(text, _seconds(word.get("start"), number), _seconds(word.get("end"), number))
            for word in timed
            for text in [" ".join(split_words(str(word.get("word", ""))))]
            if text
        ]
        if words:
            cues.append(Cue(start, end, _ordered(words)))
    return tuple(cues)


def _read_text(path: Path) -> list[Cue]:
    texts = split_words(path.read_text(encoding="utf-8-sig"))
    return _one_cue([Word(text, math.nan, math.nan) for text in texts])


_READERS: dict[str, Callable[[Path], list[Cue]]] = {
    ".textgrid": _read_textgrid,
    ".ctm": _read_ctm,
    ".csv": _read_csv,
    ".json": _read_whisper,
    ".vtt": _read_subtitles,
    ".srt": _read_subtitles,
    ".txt": _read_text,
}
TRANSCRIPT_SUFFIXES = tuple(_READERS)
"""Endings of transcripts, in lower case; those that have times of words come first."""
