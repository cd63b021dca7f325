"""The commands that take recordings: extract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from m3er_fast.cli.exit_codes import QUARANTINED
from m3er_fast.cli.options import AddressOption, EngineOption, interruptible
from m3er_fast.cli.progress import ProgressDisplay

if TYPE_CHECKING:
    from m3er_fast.recordings import ExtractProgress, FrameExtractor, Steps


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
        Literal["librosa", "none"], typer.Option(metavar="librosa|none", help="Features of the sound.")
    ] = "librosa",
    face: Annotated[
        Literal["mediapipe", "none"], typer.Option(metavar="mediapipe|none", help="Features of the face.")
    ] = "mediapipe",
    face_fps: Annotated[float, typer.Option(help="The most pictures per second that are looked at.")] = 10.0,
    face_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="face_landmarker.task.  [default: fetched once]")
    ] = None,
    steps: Annotated[
        str, typer.Option(metavar="words|SECONDS", help="What a step is: a word, or a number of seconds.")
    ] = "words",
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
    from m3er_fast.recordings import FaceFeatures, SoundFeatures, word_vectors
    from m3er_fast.recordings import extract as extract_recordings

    extractors: dict[str, FrameExtractor] = {}
    if audio != "none":
        extractors["audio"] = SoundFeatures()
    if face != "none":
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


def _steps(text: str) -> Steps:
    if text == "words":
        return "words"
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither words nor a number of seconds", param_hint="--steps") from None
