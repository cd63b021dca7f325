"""The commands that take recordings: extract and predict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from m3er_fast.cli.exit_codes import QUARANTINED
from m3er_fast.cli.options import AddressOption, EngineOption, interruptible
from m3er_fast.cli.progress import ProgressDisplay

if TYPE_CHECKING:
    from m3er_fast.recordings import ExtractProgress, FrameExtractor, SpeechRecogniser, Steps
    from m3er_fast.recordings.prediction import PredictedUtterance


def extract(
    recordings: Annotated[
        Path, typer.Argument(metavar="RECORDINGS", help="Folder of videos and sound files, or one such file.")
    ],
    out: Annotated[Path, typer.Option(metavar="CORPUS", help="Folder for the corpus, one Parquet file per recording.")],
    words: Annotated[
        Path | None,
        typer.Option(
            metavar="VECTORS",
            help="Text file of word vectors such as GloVe's, or a folder with a static table.  [default: no text]",
        ),
    ] = None,
    audio: Annotated[
        Literal["librosa", "egemaps", "none"],
        typer.Option(metavar="librosa|egemaps|none", help="Features of the sound; egemaps by openSMILE."),
    ] = "librosa",
    face: Annotated[
        Literal["mediapipe", "none"], typer.Option(metavar="mediapipe|none", help="Features of the face.")
    ] = "mediapipe",
    face_fps: Annotated[float, typer.Option(help="Most pictures per second to look at.")] = 10.0,
    face_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="face_landmarker.task.  [default: fetched once]")
    ] = None,
    face_features: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Output of OpenFace or py-feat, instead of MediaPipe: a folder of CSV files with the names of the "
            "recordings, or the file of one recording.",
        ),
    ] = None,
    steps: Annotated[
        str, typer.Option(metavar="words|SECONDS", help="What a step is: a word, or a number of seconds.")
    ] = "words",
    align: Annotated[
        bool, typer.Option("--align", help="Find the times of English words that have none in the sound.")
    ] = False,
    asr: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Find the words of recordings without a transcript by Whisper: a model's folder, or a size.",
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="Language of the speech for --asr, such as en.  [default: found out]"),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="CSV of utterances: id, and recording, start, end, label, split, group if known."
        ),
    ] = None,
    transcripts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of transcripts.  [default: beside each recording]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in CORPUS; an empty folder starts a new one.")
    ] = False,
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes, or Ray workers.  [default: one, or as many as there is room for]"),
    ] = None,
) -> None:
    """Turn recordings into a corpus, ready for audit, train and score.

    A transcript has the name of its recording and ends with .TextGrid, .ctm, .csv, .json (Whisper), .vtt, .srt or
    .txt. Each of its cues is an utterance, unless --labels names them; without a transcript, take --steps 0.1.

    Recordings that cannot be read are listed in CORPUS/_quarantine.json and the others are extracted; the exit code is
    then 3. Faces and voices are personal data: people must have agreed to this use of their recordings.
    """
    from m3er_fast.recordings import (
        EgemapsFeatures,
        FaceFeatures,
        FaceFiles,
        ForcedAlignment,
        SoundFeatures,
        word_vectors,
    )
    from m3er_fast.recordings import extract as extract_recordings

    extractors: dict[str, FrameExtractor] = {}
    if audio == "librosa":
        extractors["audio"] = SoundFeatures()
    elif audio == "egemaps":
        extractors["audio"] = EgemapsFeatures()
        typer.echo(f"m3er-fast: openSMILE's licence: {EgemapsFeatures.licence}", err=True)
    if face_features is not None:
        extractors["face"] = FaceFiles(face_features, recordings if recordings.is_dir() else recordings.parent)
    elif face != "none":
        extractors["face"] = FaceFeatures(face_fps, face_model)
    encoder = None if words is None else word_vectors(words)
    with ProgressDisplay("extract", "recordings") as display, interruptible("the same command with --resume goes on"):

        def show(progress: ExtractProgress) -> None:
            note = f"{progress.seconds / 60:.1f} minutes of recordings, {progress.rate:.1f} times as fast as they play"
            display.update(progress.done, progress.recordings, note, seconds_left=progress.seconds_left)

        summary = extract_recordings(
            recordings,
            out,
            extractors,
            encoder=encoder,
            timer=ForcedAlignment() if align else None,
            recogniser=_recogniser(asr, language),
            labels=labels,
            transcripts=transcripts,
            steps=_steps(steps),
            resume=resume,
            engine=engine,
            address=address,
            workers=workers,
            progress=show,
        )
    resumed = f", {summary.resumed} of them by an earlier run" if summary.resumed else ""
    found = f"{summary.utterances} utterances of {summary.extracted} recordings{resumed}"
    print(f"{out}: {found}, in {summary.seconds:.1f} s; see {out / '_summary.html'}")
    if summary.quarantined:
        first = summary.quarantined[0]
        typer.echo(
            f"m3er-fast: {len(summary.quarantined)} are in quarantine, such as {first.shard}: {first.reason} "
            f"(all: {out / '_quarantine.json'})",
            err=True,
        )
        raise typer.Exit(QUARANTINED)


def predict(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Video or sound file, or a Parquet file of extracted features.")
    ],
    model: Annotated[Path, typer.Option(metavar="RUN", help="Folder written by train on an extracted corpus.")],
    words: Annotated[
        Path | None,
        typer.Option(
            metavar="VECTORS", help="The word vectors that the corpus was extracted with.  [default: no text]"
        ),
    ] = None,
    face_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="face_landmarker.task.  [default: fetched once]")
    ] = None,
    face_features: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Output of OpenFace or py-feat for FILE, if the model was trained with it."),
    ] = None,
    transcript: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Transcript.  [default: beside the recording]")
    ] = None,
    asr: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Find the words if there is no transcript, by Whisper: a model's folder, or a size.",
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="Language of the speech for --asr, such as en.  [default: found out]"),
    ] = None,
    window: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Score every so many seconds.  [default: each cue, or the whole]"),
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="File for the predictions over time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the emotions in one recording.

    Prints each utterance with its time, its probabilities, and the modalities that were trusted. Features are made as
    those of the model were; where that cannot be, the command says how they differ.

    A prediction is a guess about what is shown, not about what is felt.
    """
    from m3er_fast.corpus import read_parquet
    from m3er_fast.recordings.prediction import predict_recording, predict_utterances
    from m3er_fast.recordings.run import transcript_of
    from m3er_fast.recordings.words import read_transcript
    from m3er_fast.scoring import load_model

    loaded = load_model(model)
    is_recording = file.suffix != ".parquet"
    if is_recording:
        beside = transcript or transcript_of(file.with_suffix(""))
        found = predict_recording(
            loaded,
            file,
            words=words,
            face_model=face_model,
            face_features=face_features,
            transcript=None if beside is None else read_transcript(beside),
            recogniser=_recogniser(asr, language),
            window=window,
        )
    else:
        found = predict_utterances(loaded, read_parquet(file, input_dims=loaded.input_dims))
    if picture is not None:
        from m3er_fast.recordings.timeline import draw_timeline

        if not is_recording:
            raise typer.BadParameter("features have no time: name a recording", param_hint="--picture")
        draw_timeline(file, found, picture)
    if as_json:
        print(json.dumps([{**utterance._asdict(), "scores": vars(utterance.scores)} for utterance in found], indent=2))
    else:
        print(prediction_table(found))


def _recogniser(model: str | None, language: str | None) -> SpeechRecogniser | None:
    from m3er_fast.recordings import WhisperRecogniser

    if model is not None:
        return WhisperRecogniser(model, language)
    if language is not None:
        raise typer.BadParameter("it is that of the speech for --asr, which is not given", param_hint="--language")
    return None


def prediction_table(found: Sequence[PredictedUtterance]) -> str:
    """Return a line per utterance, as Markdown."""
    lines = [
        "| Utterance | From | To | Prediction | Probability | Trusted | Not trusted |",
        "|---|---:|---:|---|---:|---|---|",
    ]
    for utterance in found:
        scores = utterance.scores
        trusted = [name for name, effective in scores.effective.items() if effective]
        others = [
            f"{name} ({scores.reason[name] or 'unavailable'})"
            for name, effective in scores.effective.items()
            if not effective
        ]
        prediction = "abstained" if scores.abstained else scores.prediction
        cells = [
            utterance.id,
            f"{utterance.start:.1f}",
            f"{utterance.end:.1f}",
            prediction,
            f"{scores.probabilities[scores.prediction]:.2f}",
            ", ".join(trusted),
            ", ".join(others),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _steps(text: str) -> Steps:
    if text == "words":
        return "words"
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither words nor a number of seconds", param_hint="--steps") from None
