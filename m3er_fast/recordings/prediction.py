"""Predicting the emotions in a recording, with a model of features that were extracted in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3er_fast.corpus.base import Corpus, CorpusError
from m3er_fast.corpus.extraction import extraction_difference
from m3er_fast.fusion import M3ERFusion
from m3er_fast.recordings.decoding import probe
from m3er_fast.recordings.egemaps import EgemapsFeatures
from m3er_fast.recordings.face import FaceFeatures
from m3er_fast.recordings.face_files import FaceFiles
from m3er_fast.recordings.frames import FrameExtractor
from m3er_fast.recordings.recognition import SpeechRecogniser
from m3er_fast.recordings.run import describe
from m3er_fast.recordings.sound import SoundFeatures
from m3er_fast.recordings.speech import ForcedAlignment
from m3er_fast.recordings.utterances import Utterance, extract_recording
from m3er_fast.recordings.word_vectors import WordEncoder, word_vectors
from m3er_fast.recordings.words import Transcript
from m3er_fast.scoring.utterance import UtteranceScores, predict


class PredictedUtterance(NamedTuple):
    """A part of a recording and what the model says of it."""

    id: str
    start: float
    """Seconds."""
    end: float
    available: dict[str, bool]
    """By modality: whether the part has any of it."""
    scores: UtteranceScores


def predict_recording(
    model: M3ERFusion,
    recording: str | Path,
    *,
    words: str | Path | None = None,
    face_model: str | Path | None = None,
    face_features: str | Path | None = None,
    transcript: Transcript | None = None,
    recogniser: SpeechRecogniser | None = None,
    window: float | None = None,
) -> list[PredictedUtterance]:
    """Extract the features of a recording as the model's were, and score each utterance.

    An utterance is a cue of the transcript, or else the whole recording; with ``window``, every so many seconds.

    Args:
        model: trained on a corpus that :func:`~m3er_fast.recordings.extract` made.
        recording: a video or a sound file.
        words: the file of word vectors that the model's text was made with; None leaves text out, as a lost modality.
        face_model: path of MediaPipe's model; None fetches it once.
        face_features: what OpenFace or py-feat wrote, if the model's features of the face are of that kind:
            :class:`~m3er_fast.recordings.FaceFiles`.
        transcript: of the recording.
        recogniser: of its words, if there is no transcript.
        window: seconds.

    Raises:
        CorpusError: if the recording cannot be read, or the model's steps are words and there is no transcript.
        ValueError: if the model was trained on features from elsewhere, or those of this recording would be made in
            another way, naming how.
    """
    extractors, encoder = extractors_of(model, words, face_model, face_features)
    if window is not None and not window > 0:
        raise ValueError(f"window must be a positive number of seconds, got {window!r}")
    extraction = model.extraction or {}
    if transcript is not None and "word_times" in extraction:
        transcript = ForcedAlignment().time(Path(recording), transcript)
    if transcript is None and recogniser is not None:
        transcript = recogniser.transcribe(Path(recording))
    extracted = extract_recording(
        recording,
        extractors,
        encoder=encoder,
        transcript=transcript,
        utterances=None if window is None else _windows(Path(recording), window),
        steps=extraction["steps"],
    )
    spans = [(utterance.start, utterance.end) for utterance in extracted.utterances]
    return predict_utterances(model, extracted.corpus, spans)


def predict_utterances(
    model: M3ERFusion, corpus: Corpus, spans: Sequence[tuple[float, float]] | None = None
) -> list[PredictedUtterance]:
    """Score each utterance of a corpus; ``spans`` are their times in a recording.

    Raises:
        ValueError: if the corpus has other modalities than the model, or other feature counts.
    """
    found = []
    for row, name in enumerate(corpus.ids):
        length = int(corpus.lengths[row])
        features = {
            modality: values[row : row + 1, :length]
            for column, (modality, values) in enumerate(corpus.features.items())
            if corpus.available[row, column]
        }
        available = {modality: modality in features for modality in model.input_dims}
        if not features:  # the model's word on nothing at all: it abstains
            features = {name: np.zeros((1, 0, dim), np.float32) for name, dim in model.input_dims.items()}
        start, end = (0.0, 0.0) if spans is None else spans[row]
        found.append(PredictedUtterance(str(name), start, end, available, predict(model, features)))
    return found


def extractors_of(
    model: M3ERFusion,
    words: str | Path | None = None,
    face_model: str | Path | None = None,
    face_features: str | Path | None = None,
) -> tuple[dict[str, FrameExtractor], WordEncoder | None]:
    """Return the extractors that make features as the model's were made.

    Args:
        model: as for :func:`predict_recording`.
        words: as for :func:`predict_recording`.
        face_model: as for :func:`predict_recording`.
        face_features: as for :func:`predict_recording`.

    Raises:
        ValueError: as for :func:`predict_recording`.
    """
    if model.extraction is None:
        raise ValueError(
            "this model was trained on features from elsewhere, which recordings do not have: train one on a corpus "
            "that m3er-fast extract made"
        )
    settings: dict[str, dict[str, Any]] = model.extraction["modalities"]
    extractors: dict[str, FrameExtractor] = {}
    for modality, description in settings.items():
        kind = description.get("features")
        if kind == "librosa":
            extractors[modality] = SoundFeatures()
        elif kind == "egemaps":
            extractors[modality] = EgemapsFeatures()
        elif kind in ("mediapipe", *FaceFiles.kinds) and face_features is not None:
            least = description.get("least_confidence", 0.0)
            extractors[modality] = FaceFiles(face_features, least_confidence=least)
        elif kind in FaceFiles.kinds:
            raise ValueError(
                f"the model's {modality} features are those of {kind}: name the file that it wrote of this recording "
                "(face_features, --face-features)"
            )
        elif kind == "mediapipe":
            extractors[modality] = FaceFeatures(description["per_second"], face_model)
        elif modality != "text":
            raise ValueError(f"no extractor of this package makes {modality}, {kind!r}: extract a corpus with your own")
    encoder = None if words is None else word_vectors(words)
    difference = extraction_difference(model.extraction, describe(extractors, encoder, model.extraction["steps"]))
    if difference is not None:
        raise ValueError(f"features would be made in another way than the model's: {difference}")
    return extractors, encoder


def _windows(recording: Path, window: float) -> list[Utterance]:
    seconds = probe(recording).seconds
    if not seconds:
        raise CorpusError(f"{recording} does not say how long it is, so it cannot be cut into windows")
    # The last window is half as long or longer.
    starts = window * np.arange(max(1, round(seconds / window + 1e-9)))
    ends = [*starts[1:], np.inf]
    return [
        Utterance(f"{recording.stem}_{number:04d}", float(start), float(end))
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
