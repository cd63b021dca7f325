"""The whole path from recordings to emotions, on recordings that it makes: a toy that shows that every step works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from m3er_fast.corpus import read_parquet
from m3er_fast.evaluation import evaluate
from m3er_fast.metrics import ClassificationReport
from m3er_fast.recordings import (
    FaceFeatures,
    FrameExtractor,
    SoundFeatures,
    extract,
    read_transcript,
    word_vectors,
)
from m3er_fast.recordings.generate import generate_recordings, voice_here, write_video
from m3er_fast.recordings.prediction import PredictedUtterance, predict_recording
from m3er_fast.recordings.timeline import draw_timeline
from m3er_fast.scoring import score
from m3er_fast.training import train

# A recording of its own: in the second and sixth utterance the face is hidden, in the fourth and sixth the sound lost.
_STORY = ("happy", "happy", "sad", "sad", "angry", "calm", "happy", "angry")
_HIDDEN, _NOISY = (1, 5), (3, 5)


def run_recordings_demo(
    out: Path,
    *,
    face_model: Path | None = None,
    recordings: int = 30,
    progress: Callable[[str], None] | None = None,
    left_out: Callable[[str], None] | None = None,
) -> tuple[ClassificationReport | None, list[PredictedUtterance]]:
    """Make recordings, extract their features, train and score a model, and predict another recording.

    ``out`` receives the recordings (recordings/), the corpus (corpus/), a trained model (model/), its scores (scores/)
    and the predictions of a recording in which a modality is lost at times (story.mp4, story.png).

    The words are said by espeak-ng if it is installed, or else there is a tone for each. Where MediaPipe's model can
    neither be found nor fetched, the face is left out.

    Args:
        out: a folder that is empty or does not exist yet.
        face_model: path of MediaPipe's model; None fetches it once.
        recordings: number of videos to make.
        progress: called with a line of text at every stage.
        left_out: called with a line of text if the face is left out.

    Returns:
        The scores of the test split, and the predictions.

    Raises:
        ImportError: a package of the extra ``extract`` is missing.
        ValueError: ``out`` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give another folder with --out, or remove it")
    say = progress or (lambda line: None)
    made = out / "recordings"
    voice = voice_here()
    say(f"making {recordings} recordings, with the voice of {voice}")
    generate_recordings(made, recordings=recordings, voice=voice)
    extractors: dict[str, FrameExtractor] = {"audio": SoundFeatures()}
    try:
        extractors["face"] = FaceFeatures(model=face_model)
    except OSError as error:
        if left_out is not None:
            left_out(f"the face is left out: {error}")
    vectors = made / "vectors.txt"
    say("extracting sound, face and words")
    extract(made, out / "corpus", extractors, encoder=word_vectors(vectors), labels=made / "labels.csv", workers=2)
    corpus = read_parquet(out / "corpus")
    say("training a model and scoring the corpus with it")
    model = train(corpus, out=out / "model").model
    score(out / "corpus", model, out / "scores")
    say("predicting a recording in which the face is hidden and the sound is lost at times")
    story = out / "story.mp4"
    write_video(story, _STORY, voice=voice, seed=99, hidden=_HIDDEN, noisy=_NOISY)
    predicted = predict_recording(
        model, story, words=vectors, face_model=face_model, transcript=read_transcript(story.with_suffix(".json"))
    )
    draw_timeline(story, predicted, out / "story.png")
    return evaluate(model, corpus.subset("test")).report, predicted
