"""What is said in a recording that has no transcript, by speech recognition."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from m3er_fast.recordings.decoding import SAMPLE_RATE, Decoder, Sound, read_sound
from m3er_fast.recordings.word_vectors import sha256
from m3er_fast.recordings.words import Transcript, cues_of_segments

_WEIGHTS = "model.bin"
_STRETCH = 120 * SAMPLE_RATE  # samples that are transcribed at once
_CUT_WITHIN = 20 * SAMPLE_RATE  # samples at the end of a stretch in which it may be cut
_MOMENT = SAMPLE_RATE // 10
_LONGEST_GAP = 10 * SAMPLE_RATE
_FILES = (_WEIGHTS, "config.json", "tokenizer.json")


class SpeechRecogniser(Protocol):
    """What finds the words of a recording: a recogniser of your own needs two methods."""

    def describe(self) -> dict[str, Any]:
        """Return everything that the words depend on, as JSON."""

    def transcribe(self, recording: Path) -> Transcript:
        """Return the words of a recording with their times; none where nobody speaks.

        Raises:
            CorpusError: if the recording cannot be read.
        """


class WhisperRecogniser:
    """Words and their times by Whisper (Radford et al. 2023), as faster-whisper runs it.

    Sound without a voice, which faster-whisper's detector (Silero) finds, is left out first: Whisper invents words in
    silence and noise. The rest is transcribed two minutes at a time, cut where it is quietest, so that memory is
    bounded; and without sampling, on one thread of the CPU in float32, so that the same sound has the same words.

    Args:
        model: folder of a model that was converted for CTranslate2, or a size such as "small", which faster-whisper
            fetches once.
        language: its code, such as "en"; None lets a model of many languages find that of each recording.

    Raises:
        ImportError: if faster-whisper is missing.
        OSError: if the model can neither be found nor fetched.
        ValueError: if ``model`` is neither a folder of a model nor a size.
    """

    def __init__(self, model: str | Path, language: str | None = None) -> None:
        self._name, self._language = Path(model).name, language
        self._folder = _folder_of(model)
        self._sha256 = sha256(self._folder / _WEIGHTS)

    def describe(self) -> dict[str, Any]:
        """Return everything that the words depend on, as JSON."""
        return {
            "words": "faster-whisper",
            "version": _faster_whisper().__version__,
            "model": self._name,
            "sha256": self._sha256,
            "language": self._language,
        }

    def transcribe(self, recording: Path) -> Transcript:
        """Return the words of a recording with their times; none where nobody speaks.

        Raises:
            CorpusError: if the recording cannot be read.
            ValueError: if the model does not know the language.
        """
        model = _loaded(self._folder)
        if self._language is not None and self._language not in model.supported_languages:
            known = ", ".join(sorted(model.supported_languages))
            raise ValueError(f"language must be one that {self._name} knows ({known}), got {self._language!r}")
        language = self._language
        segments: list[dict[str, Any]] = []
        for start, sound in _stretches(read_sound(Decoder(recording, "audio"))):
            found, about = model.transcribe(
                sound,
                language=language,
                word_timestamps=True,
                vad_filter=True,
                temperature=0.0,
                condition_on_previous_text=False,
            )
            own = [_moved(segment, start) for segment in found]
            if own:
                language = about.language  # what is found where somebody speaks holds for the whole recording
            segments += own
        return Transcript(cues_of_segments(segments))


def _moved(segment: Any, start: float) -> dict[str, Any]:
    """Return a segment of a stretch that begins at ``start``, with its times in the recording."""

    def times(part: Any) -> dict[str, float]:
        return {"start": start + float(part.start), "end": start + float(part.end)}

    return {**times(segment), "words": [{"word": word.word, **times(word)} for word in segment.words or ()]}


def _stretches(pieces: Iterable[Sound]) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Yield the start and the samples of stretches of sound, which are cut where it is quietest.

    A short gap between pieces is silence. faster-whisper takes 64 bytes per sample: a whole recording would not do.
    """
    held: list[NDArray[np.float32]] = []
    start, count = 0.0, 0
    for piece in pieces:
        gap = round((piece.start - start) * SAMPLE_RATE) - count
        if not held or gap > _LONGEST_GAP:
            if count:
                yield start, np.concatenate(held)
            held, start, count, gap = [], piece.start, 0, 0
        samples = np.nan_to_num(piece.samples[max(0, -gap) :]).clip(-1, 1)
        held += [np.zeros(max(0, gap), np.float32), samples]
        count += max(0, gap) + len(samples)
        while count >= _STRETCH:
            sound = np.concatenate(held)
            moments = sound[_STRETCH - _CUT_WITHIN : _STRETCH].reshape(-1, _MOMENT)
            quietest = int(np.mean(moments**2, axis=1).argmin())
            cut = _STRETCH - _CUT_WITHIN + quietest * _MOMENT + _MOMENT // 2
            yield start, sound[:cut]
            held, start, count = [sound[cut:]], start + cut / SAMPLE_RATE, count - cut
    if count:
        yield start, np.concatenate(held)


def _folder_of(model: str | Path) -> Path:
    """Return the folder of a model, after fetching it if need be."""
    faster_whisper = _faster_whisper()
    folder = Path(model)
    if folder.is_dir():
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{model} is no folder of a Whisper model for CTranslate2: it lacks {', '.join(missing)}")
        return folder.absolute()
    sizes = faster_whisper.available_models()
    if str(model) not in sizes:
        raise ValueError(
            f"{model} is neither the folder of a Whisper model for CTranslate2 nor a size ({', '.join(sizes)})"
        )
    try:
        return Path(faster_whisper.download_model(str(model)))
    except Exception as error:  # of the Hub's client, or of what it is built on
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"the Whisper model {model} cannot be fetched ({reason}): name the folder of a model for CTranslate2, such "
            f"as a copy of https://huggingface.co/Systran/faster-whisper-{model}"
        ) from error


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path) -> Any:
    from tqdm import tqdm

    # It shows no progress, but makes a lock for all processes, about whose remains Python warns when a worker is ended.
    tqdm.set_lock(threading.RLock())
    # In float32 on any machine: the default depends on what its processor is quick at.
    return _faster_whisper().WhisperModel(str(folder), device="cpu", compute_type="float32", cpu_threads=1)


def _faster_whisper() -> Any:
    """Return the module ``faster_whisper``.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import faster_whisper
    except ImportError as error:
        raise ImportError("speech recognition needs faster-whisper: pip install 'm3er-fast[asr]'") from error
    return faster_whisper
