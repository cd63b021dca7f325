"""From a recording to utterances of a corpus: which parts of it, which steps of each, and the features of each step.

Dimension legend: N utterances, T steps, d features.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from m3er_fast.corpus._labels import class_indices
from m3er_fast.corpus.base import Corpus, CorpusError
from m3er_fast.recordings.decoding import probe
from m3er_fast.recordings.frames import FrameExtractor, Frames, means_within
from m3er_fast.recordings.word_vectors import WordEncoder
from m3er_fast.recordings.words import Transcript, Word, with_times

Steps: TypeAlias = float | Literal["words"]
"""What a step is: a word, or a number of seconds."""

_MOST_STEPS = 2**20  # in one utterance: a step of a microsecond is a slip


class Utterance(NamedTuple):
    """A part of a recording."""

    id: str
    start: float
    """Seconds."""
    end: float
    """Seconds; infinity is the end of the recording."""
    label: str | None = None
    """Name of a class; None without a label."""
    split: str | None = None
    group: str | None = None
    """What splits must not share; None is the recording."""


@dataclass(frozen=True)
class Extracted:
    """The utterances of a recording."""

    corpus: Corpus
    utterances: tuple[Utterance, ...]
    report: dict[str, Any]
    """Seconds, faces, unknown words and the like, for the summary of a run; JSON."""


def extract_recording(
    recording: str | Path,
    extractors: Mapping[str, FrameExtractor],
    *,
    encoder: WordEncoder | None = None,
    transcript: Transcript | None = None,
    utterances: Sequence[Utterance] | None = None,
    steps: Steps = "words",
    name: str | None = None,
    classes: Sequence[str] = (),
) -> Extracted:
    """Return the features of the utterances of a recording.

    A step is a word, or a stretch of ``steps`` seconds, of which the last of an utterance may be shorter. Its features
    are the means of the frames whose times lie in it; those of the text are the mean of the words whose middles do. A
    step without a frame is a row of NaN. A modality is unavailable in an utterance where no step has one.

    Args:
        recording: a video or a sound file.
        extractors: modality -> its extractor.
        encoder: for the modality ``text``, which comes first; None leaves it out.
        transcript: words, whose missing times are filled in by :func:`with_times`.
        utterances: parts of the recording; None takes each cue of the transcript, or else the whole recording.
        steps: "words", or seconds.
        name: of the recording, from which ids and groups are made; None takes the name of the file.
        classes: of the labels; without any, the corpus has no labels.

    Raises:
        CorpusError: if the recording cannot be read, or words are wanted and there are none.
        ValueError: if ``steps`` is neither, or there is nothing to extract.
    """
    path = Path(recording)
    check_steps(steps)
    if not extractors and encoder is None:
        raise ValueError("there is nothing to extract: extractors is empty, and encoder is None")
    header = probe(path)
    found = {modality: extractor.extract(path) for modality, extractor in extractors.items()}
    seconds = _duration(header.seconds, [frames for frames in found.values() if frames is not None])
    if transcript is not None:
        untimed = sum(not word.timed for word in transcript.words)
        transcript = with_times(transcript, seconds)
    elif steps == "words":
        raise CorpusError(f"{path} has no transcript: name one, or take steps of a number of seconds")
    name = path.stem if name is None else name
    if utterances is None:
        utterances = _utterances_of(name, transcript, seconds)
    utterances = [part if math.isfinite(part.end) else part._replace(end=seconds) for part in utterances]
    words = () if transcript is None else tuple(sorted(transcript.words, key=lambda word: word.start))
    spans = [_steps_of(utterance, words, steps) for utterance in utterances]
    means = {
        modality: None if frames is None else means_within(frames, _all(spans)) for modality, frames in found.items()
    }
    report: dict[str, Any] = {
        "seconds_claimed": header.seconds,
        "seconds": round(seconds, 3),
        **{modality: None if frames is None else frames.report for modality, frames in found.items()},
    }
    if encoder is not None:
        vectors = encoder.encode([word.text for word in words])
        unknown = int(np.isnan(vectors).any(axis=1).sum())
        report["text"] = {"words": len(words), "unknown": unknown, "without_time": untimed if transcript else 0}
        means = {"text": _text_of(utterances, spans, words, vectors, steps), **means}
    dimensions = {} if encoder is None else {"text": encoder.dimension}
    dimensions |= {modality: extractor.dimension for modality, extractor in extractors.items()}
    corpus = _corpus(name, utterances, spans, means, dimensions, tuple(classes))
    report["missing_steps"] = _missing(corpus)
    return Extracted(corpus, tuple(utterances), report)


def check_steps(steps: Steps) -> None:
    """Raise a ValueError unless ``steps`` is "words" or a positive number of seconds."""
    number = isinstance(steps, int | float) and not isinstance(steps, bool)
    if steps != "words" and not (number and math.isfinite(steps) and steps > 0):
        raise ValueError(f"steps must be 'words' or a positive number of seconds, got {steps!r}")


def _duration(claimed: float | None, found: Sequence[Frames]) -> float:
    """Return what was decoded, or else what the container claims, in seconds."""
    decoded = max((frames.report.get("seconds", 0.0) for frames in found), default=0.0)
    return float(decoded or claimed or 0.0)


def _utterances_of(name: str, transcript: Transcript | None, seconds: float) -> list[Utterance]:
    if transcript is None or len(transcript.cues) < 2:
        return [Utterance(name, 0.0, seconds)]
    return [
        Utterance(f"{name}_{number:04d}", cue.start, cue.end)
        for number, cue in enumerate(transcript.cues)
        if cue.start < cue.end
    ]


def _steps_of(utterance: Utterance, words: Sequence[Word], steps: Steps) -> NDArray[np.float64]:
    """Return the (T, 2) starts and ends of an utterance's steps."""
    if steps == "words":
        own = [words[number][1:] for number in _words_of(utterance, words)]
        return np.array(own, dtype=np.float64).reshape(-1, 2)
    count = math.ceil((utterance.end - utterance.start) / steps * (1 - 1e-9))
    if count > _MOST_STEPS:
        raise CorpusError(f"utterance {utterance.id} would have {count} steps of {steps} s, at most {_MOST_STEPS} fit")
    edges = np.minimum(utterance.start + steps * np.arange(count + 1), utterance.end)
    return np.stack([edges[:-1], edges[1:]], axis=1)


def _words_of(utterance: Utterance, words: Sequence[Word]) -> range:
    """Return which of the words, which are in the order of their starts, begin in an utterance."""
    first, last = (bisect.bisect_left(words, time, key=lambda word: word.start) for time in utterance[1:3])
    return range(first, last)


def _text_of(
    utterances: Sequence[Utterance],
    spans: Sequence[NDArray[np.float64]],
    words: Sequence[Word],
    vectors: NDArray[np.float32],
    steps: Steps,
) -> NDArray[np.float32]:
    """Return the features of the text in all steps: those of its word, or the mean of the words in it."""
    if steps == "words":
        return vectors[[number for utterance in utterances for number in _words_of(utterance, words)]]
    middles = np.array([(word.start + word.end) / 2 for word in words], dtype=np.float64)
    return means_within(Frames(middles, vectors), _all(spans))


def _all(spans: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([np.empty((0, 2)), *spans])


def _corpus(
    group: str,
    utterances: Sequence[Utterance],
    spans: Sequence[NDArray[np.float64]],
    means: Mapping[str, NDArray[np.float32] | None],
    dimensions: Mapping[str, int],
    classes: tuple[str, ...],
) -> Corpus:
    rows, steps = len(utterances), max((len(span) for span in spans), default=0)
    lengths = np.array([len(span) for span in spans], dtype=np.int64)
    shape = (rows, max(steps, 1))
    features = {name: np.zeros((*shape, dimension), dtype=np.float32) for name, dimension in dimensions.items()}
    available = np.zeros((rows, len(dimensions)), dtype=bool)
    for column, (name, values) in enumerate(features.items()):
        of_steps = means[name]
        if of_steps is None:
            continue
        for row, part in enumerate(np.split(of_steps, np.cumsum(lengths)[:-1])):
            available[row, column] = np.isfinite(part).any()
            if available[row, column]:
                values[row, : len(part)] = part
    return Corpus(
        ids=np.array([utterance.id for utterance in utterances], dtype=object),
        features=features,
        lengths=lengths,
        available=available,
        target=class_indices([utterance.label for utterance in utterances], classes) if classes else None,
        classes=classes,
        split=_strings([utterance.split for utterance in utterances]),
        group=np.array([utterance.group or group for utterance in utterances], dtype=object),
    )


def _strings(values: Sequence[str | None]) -> NDArray[Any] | None:
    return np.array(values, dtype=object) if values and all(value is not None for value in values) else None


def _missing(corpus: Corpus) -> dict[str, float | None]:
    """Return the share of steps without a frame, per modality; None where it is unavailable throughout."""
    real = np.arange(corpus.steps) < corpus.lengths[:, None]
    shares: dict[str, float | None] = {}
    for column, (name, values) in enumerate(corpus.features.items()):
        if not corpus.available[:, column].any():
            shares[name] = None
            continue
        lost = np.isnan(values).any(axis=2) | ~corpus.available[:, column, None]
        shares[name] = round(float((lost & real).sum() / real.sum()), 4)
    return shares
