"""The commands that fit and train models: train, fit-stats, ablate and demo."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3er_fast.cli.exit_codes import QUARANTINED
from m3er_fast.cli.options import (
    AddressOption,
    BufferOption,
    ConfigOption,
    CorpusArgument,
    DeviceOption,
    EngineOption,
    EpochsOption,
    LargeCorpusArgument,
    LogOption,
    PaperOption,
    PrecisionOption,
    ResumeOption,
    SetOption,
    StreamOption,
    ThreadsOption,
    WorkersOption,
    by_launched_workers,
    change_settings,
    chosen_settings,
    interruptible,
    logs_of,
    open_for_training,
    read_for_training,
    read_values,
    training_settings,
    use_threads,
)
from m3er_fast.cli.progress import ProgressDisplay
from m3er_fast.cli.tables import is_terminal, print_markdown

if TYPE_CHECKING:
    from m3er_fast.ablation import AblationResult
    from m3er_fast.corpus import Corpus
    from m3er_fast.fusion import M3ERFusion
    from m3er_fast.metrics import ClassificationReport
    from m3er_fast.scoring import FitProgress
    from m3er_fast.training import EpochRecord, StreamedCorpus


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for table and figures.  [default: runs/demo, or runs/recordings]",
            show_default=False,
        ),
    ] = None,
    recordings: Annotated[
        bool, typer.Option("--recordings", help="Show the path from videos to emotions instead, on videos made here.")
    ] = False,
    face_model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="face_landmarker.task, for --recordings.  [default: fetched once]"),
    ] = None,
    threads: ThreadsOption = 1,
) -> None:
    """Show the whole method on a generated corpus.

    Some of its modalities are ineffectual. Fits, trains and scores, then prints the ablation table and draws the
    figures. It takes a few minutes on two cores. After an interruption, give the same command again.

    With --recordings, makes videos of a portrait that moves and a voice (of espeak-ng if it is installed, else of
    tones), extracts their features, trains, and predicts a video in which the face is hidden and the sound is lost at
    times. It is a toy: it shows that every step works, and nothing about people.
    """
    use_threads(threads)
    if recordings:
        _demonstrate_recordings(Path("runs/recordings") if out is None else out, face_model)
        return
    if face_model is not None:
        raise typer.BadParameter("it goes with --recordings", param_hint="--face-model")
    from m3er_fast.demo import run_demo

    out = Path("runs/demo") if out is None else out
    with ProgressDisplay("demo", "epochs") as display, interruptible("the same command goes on"):
        result = run_demo(out, progress=display.say, moved=display.update, resumed=display.note)
    _print_ablation(result, out)


def _demonstrate_recordings(out: Path, face_model: Path | None) -> None:
    from m3er_fast.cli.recording_commands import prediction_table
    from m3er_fast.recordings_demo import run_recordings_demo

    with ProgressDisplay("demo") as display:
        report, predicted = run_recordings_demo(out, face_model=face_model, progress=display.say, left_out=display.note)
    if report is not None:
        print_markdown(f"On the test split:\n\n{report.to_markdown()}\n")
    print(f"{out / 'story.mp4'}, drawn in {out / 'story.png'}:\n\n{prediction_table(predicted)}")


@by_launched_workers
def train(
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder for the model, its history and plots.")],
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Statistics fitted by fit-stats, used instead of fitting them to CORPUS."),
    ] = None,
    config: ConfigOption = None,
    paper: PaperOption = False,
    changes: SetOption = None,
    epochs: EpochsOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, shuffling and dropout.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Utterances per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of Adam.")] = None,
    log: LogOption = None,
    resume: ResumeOption = True,
    stream: StreamOption = None,
    buffer: BufferOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 1,
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Train a model, stopping early on the validation loss.

    The weights of the best epoch are kept. To resume interrupted training, give the same command again; with more
    --epochs, a finished one goes on.
    """
    from m3er_fast.scoring import ModelStatistics
    from m3er_fast.training import train as train_model

    use_threads(threads)
    statistics = None if stats is None else ModelStatistics.load(stats)
    data = open_for_training(corpus, stream, buffer)
    settings = training_settings(
        data,
        config,
        paper,
        changes,
        statistics,
        epochs=epochs,
        seed=seed,
        batch_size=batch_size,
        learning_rate=learning_rate,
        precision=precision,
    )
    logs = logs_of(log, out)
    way_on = "the same command goes on" if resume else "the same command without --no-resume goes on"
    with ProgressDisplay("train", "epochs") as display, interruptible(way_on):

        def show(record: EpochRecord) -> None:
            note = f"loss {record.train_loss:.4f}, validation {record.valid_loss:.4f}"
            display.update(record.epoch, record.epochs, note)
            for write in logs:
                write(record)

        result = train_model(
            data,
            settings,
            statistics=statistics,
            out=out,
            resume=resume,
            device=device,
            engine=engine,
            address=address,
            workers=workers,
            progress=show,
            resumed=lambda epochs: display.note(f"{out} goes on after epoch {epochs}"),
        )
    losses = result.history["valid_loss"]
    best = result.best_epoch
    print(f"{out}: best of {len(losses)} epochs is {best}, with a validation loss of {losses[best - 1]:.4f}")
    if best == settings.training.epochs:
        way_on = "goes on from here" if settings.training.schedule == "constant" else "in another folder may do better"
        print(f"The best epoch is the last one: --epochs {2 * best} {way_on}")
    report = _score_test_split(result.model, data)
    if report is not None:
        print_markdown(f"\nOn the test split:\n\n{report.to_markdown()}")


def _score_test_split(model: M3ERFusion, data: Corpus | StreamedCorpus) -> ClassificationReport | None:
    """Return the scores of a model on the test split, or None if it has no labelled utterance."""
    from m3er_fast.training import StreamedCorpus, evaluate

    if isinstance(data, StreamedCorpus):
        return data.report(model, split=data.test) if data.test.rows else None
    test = data.subset("test")
    return evaluate(model, test).report if len(test) else None


def tune(
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the trials and the best settings.")],
    trials: Annotated[int, typer.Option(min=1, help="Number of trainings; the first has the settings given.")] = 20,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes after which no trial is waited for.  [default: none]")
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON or YAML file of the settings to search, with the values to try."),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="f1|mean_accuracy|accuracy|balanced_accuracy", help="Score on the validation split.")
    ] = "f1",
    seed: Annotated[int, typer.Option(help="Seed of the settings that are tried.")] = 0,
    config: ConfigOption = None,
    paper: PaperOption = False,
    changes: SetOption = None,
    epochs: EpochsOption = None,
    resume: ResumeOption = True,
    stream: StreamOption = None,
    buffer: BufferOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 1,
    address: AddressOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time.  [default: as many as there is room for]")
    ] = None,
) -> None:
    """Search for the settings that suit a corpus, by Ray Tune.

    Draws settings at random, trains with each, and compares them on the validation split alone. DIR/best.json then
    holds the best ones, for train --config. After an interruption, give the same command again; with more --trials, a
    finished search goes on.
    """
    from m3er_fast.training import Trial
    from m3er_fast.training import tune as search

    use_threads(threads)
    data = open_for_training(corpus, stream, buffer)
    settings = training_settings(data, config, paper, changes, epochs=epochs, precision=precision)
    way_on = "the same command goes on" if resume else "the same command without --no-resume goes on"
    with ProgressDisplay("tune", "trials") as display, interruptible(way_on):
        done = 0

        def show(trial: Trial) -> None:
            nonlocal done
            done += 1
            score = f"failed: {trial.error}" if trial.score is None else f"{metric} {trial.score:.4f}"
            display.update(done, trials, f"trial {trial.number} {score}")

        def goes_on(found: int) -> None:
            nonlocal done
            done = found
            display.note(f"{out} goes on after {found} trials")

        result = search(
            data,
            settings,
            out=out,
            space=None if space is None else read_values(space),
            trials=trials,
            seconds=None if minutes is None else 60 * minutes,
            metric=metric,  # type: ignore[arg-type]
            seed=seed,
            resume=resume,
            device=device,
            address=address,
            workers=workers,
            progress=show,
            resumed=goes_on,
        )
    print_markdown(result.to_markdown())
    print(f"\nBest settings, of trial {result.best.number}: m3er-fast train {corpus} --config {out / 'best.json'}")
    if result.best.number == 0:
        print("No trial was better than the settings given.")


def fit_stats(
    corpus: LargeCorpusArgument,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the statistics; an older one is replaced.")],
    config: ConfigOption = None,
    paper: PaperOption = False,
    changes: SetOption = None,
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Fit a model's statistics to a corpus that need not fit into memory.

    Fits standardiser, modality check and proxy bank to the training split, or to everything where there are no splits.
    Labels are not needed. Then run train --stats FILE. Shards that cannot be read are left out; the exit code is then
    3.
    """
    from m3er_fast.config import M3ERConfig
    from m3er_fast.scoring import fit_statistics

    settings = chosen_settings(config, paper)
    if changes:
        settings = change_settings(settings or M3ERConfig(), changes)
    if out.is_dir():
        raise typer.BadParameter(f"{out} is a folder, wanted a file to write", param_hint="--out")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # a folder that cannot be written to fails now, not after hours
    with ProgressDisplay("fit-stats", "groups of shards") as display:

        def show(progress: FitProgress) -> None:
            display.update(progress.done, progress.groups, f"{progress.rows} utterances read")

        statistics = fit_statistics(
            corpus,
            settings,
            engine=engine,
            address=address,
            workers=workers,
            progress=show,
        )
    statistics.save(out)
    print(f"{out}: learned from {statistics.rows} utterances with {statistics.frames} paired frames")
    for shard, reason in statistics.quarantined:
        typer.echo(f"m3er-fast: {shard} was left out: {reason.removeprefix(f'{shard}: ')}", err=True)
    if statistics.errors:
        typer.echo(f"m3er-fast: {statistics.errors} utterances that cannot be read were left out", err=True)
    if statistics.quarantined or statistics.errors:
        raise typer.Exit(QUARANTINED)


def ablate(
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for table and figures.")],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model, for mean ± standard deviation.")] = 5,
    config: ConfigOption = None,
    paper: PaperOption = False,
    changes: SetOption = None,
    epochs: EpochsOption = None,
    corruption: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Corruption of the test split, such as freeze or gain:mild.  [default: the paper's, gaussian_noise]",
            show_default=False,
        ),
    ] = "gaussian_noise",
    baselines: Annotated[bool, typer.Option(help="Train simpler models beside M3ER, or leave them out.")] = True,
    resume: ResumeOption = True,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Measure the contribution of each step of the method.

    Trains on this corpus with and without each step, and simpler models beside it. Prints the paper's Table 2, mean ±
    standard deviation. After an interruption, give the same command again.
    """
    from m3er_fast.ablation import run_ablation
    from m3er_fast.corruption import named

    try:
        named(corruption, argument="NAME")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--corruption") from error
    use_threads(threads)
    data = read_for_training(corpus)
    settings = training_settings(data, config, paper, changes, epochs=epochs, precision=precision)
    way_on = "the same command goes on" if resume else "the same command without --no-resume goes on"
    with ProgressDisplay("ablate", "epochs") as display, interruptible(way_on):
        result = run_ablation(
            data,
            settings,
            seeds=seeds,
            out=out,
            corruption=corruption,
            baselines=baselines,
            resume=resume,
            device=device,
            progress=display.say,
            moved=display.update,
            resumed=lambda done: display.note(f"{out} goes on: {done}"),
        )
    _print_ablation(result, out)


def _print_ablation(result: AblationResult, out: Path) -> None:
    # A class takes two columns, for which a terminal has no room; the file has them.
    print_markdown(result.overview() if is_terminal() else result.to_markdown())
    print(f"\nTables, by class too, and figures: {out}")
