"""The command that scores a corpus: score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3er_fast.cli.exit_codes import QUARANTINED
from m3er_fast.cli.options import (
    AddressOption,
    EngineOption,
    LargeCorpusArgument,
    WorkersOption,
    interruptible,
    usable_devices,
)
from m3er_fast.cli.progress import ProgressDisplay

if TYPE_CHECKING:
    from m3er_fast.scoring import ScoreProgress


def score(
    corpus: LargeCorpusArgument,
    model: Annotated[Path, typer.Option(metavar="RUN", help="Folder written by train or by save_pretrained.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI for the scores, one Parquet file per shard.")],
    engine: EngineOption = "local",
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in DIR; an empty DIR starts a new one.")
    ] = False,
    batch_frames: Annotated[str, typer.Option(metavar="auto|N", help="Frames per batch, padding included.")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16", help="Dtype of the network; bfloat16 on CUDA only.")
    ] = "float32",
    device: Annotated[
        str | None,
        typer.Option(help="Device such as cpu or cuda:1, or several with commas.  [default: every GPU, or else cpu]"),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare pages with their checksums, where CORPUS has any.")] = True,
    checksum: Annotated[
        str,
        typer.Option(
            metavar="sampled|full", help="How --resume detects a changed shard: by size and ends, or by every byte."
        ),
    ] = "sampled",
    address: AddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Score a corpus, with or without labels.

    Writes class probabilities, effective modalities and p-values of every utterance. Shards that cannot be read are
    listed in DIR/_quarantine.json and the others are scored; the exit code is then 3.
    """
    from m3er_fast.scoring import load_model
    from m3er_fast.scoring import score as score_corpus
    from m3er_fast.shards.plan import locate

    if batch_frames != "auto" and not (batch_frames.isdecimal() and int(batch_frames)):
        raise typer.BadParameter(f"{batch_frames!r} is neither auto nor a positive number", param_hint="--batch-frames")
    loaded, devices = load_model(model), usable_devices(device)
    if engine == "ray" and device is None:
        devices = devices[:1]  # each worker has a device of its own
    with ProgressDisplay("score", "shards") as display, interruptible("the same command with --resume goes on"):

        def show(progress: ScoreProgress) -> None:
            note = f"{progress.rows} utterances, {progress.rate:.0f}/s"
            display.update(progress.done, progress.shards, note, seconds_left=progress.seconds_left)

        summary = score_corpus(
            corpus,
            loaded,
            out,
            resume=resume,
            devices=devices,
            batch_frames="auto" if batch_frames == "auto" else int(batch_frames),
            dtype=dtype,  # type: ignore[arg-type]  # score checks it
            verify=verify,
            checksum=checksum,  # type: ignore[arg-type]  # score checks it
            engine=engine,
            address=address,
            workers=workers,
            progress=show,
        )
    resumed = f", {summary.resumed} of them by an earlier run" if summary.resumed else ""
    scored = summary.shards - len(summary.quarantined)
    took = f"{summary.rows} utterances in {scored} shards{resumed}, in {summary.seconds:.1f} s"
    folder = str(locate(out))
    print(f"{folder}: {took}; see {folder.rstrip('/')}/_summary.html")
    if summary.quarantined:
        first = summary.quarantined[0]
        typer.echo(
            f"m3er-fast: {len(summary.quarantined)} of {summary.shards} shards are in quarantine, such as "
            f"{first.shard}: {first.reason} (all: {folder.rstrip('/')}/_quarantine.json)",
            err=True,
        )
    if summary.errors:
        typer.echo(f"m3er-fast: {summary.errors} utterances could not be scored: see their column error", err=True)
    if summary.quarantined or summary.errors:
        raise typer.Exit(QUARANTINED)
