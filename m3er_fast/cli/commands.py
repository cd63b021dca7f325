"""The commands: their arguments, and what they print. Needs typer and rich; :mod:`m3er_fast.cli` is the way in.

Results go to stdout, progress and warnings to stderr.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from m3er_fast.cli.progress import ProgressDisplay
from m3er_fast.config import M3ERConfig
from m3er_fast.corpus import FORMATS, SPLITS, Corpus, read_parquet, split_by_group

if TYPE_CHECKING:
    from m3er_fast.ablation import AblationResult
    from m3er_fast.fusion import M3ERFusion
    from m3er_fast.scoring import FitProgress, ModelStatistics, ScoreProgress
    from m3er_fast.training import EpochRecord

# Plain help: rich's boxes break option names over lines on a narrow terminal.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

CorpusArgument = Annotated[
    Path, typer.Argument(metavar="CORPUS", help="Parquet corpus: the folder that convert wrote, or one file.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="JSON file of settings, such as the config.json of a run."),
]
PaperOption = Annotated[bool, typer.Option("--paper", help="Use the settings of the paper instead of the defaults.")]
EngineOption = Annotated[
    str, typer.Option("--engine", metavar="local|ray", help="What runs it: this process, or workers of Ray.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", help="Of a Ray cluster, such as auto or HOST:PORT.  [default: Ray is started on this machine]"
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Of Ray.  [default: as many as there is room for]")
]
EpochsOption = Annotated[int | None, typer.Option(help="The most epochs; overrides the settings.")]
# One by default: at the model's own sizes a second thread gains little on an idle machine, and spins for most of the
# time on a busy one (an epoch on two cores, one of them taken: 0.8 s with one thread, 28 s with two).
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads to train with.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from m3er_fast import __version__

        print(f"m3er-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Multimodal emotion recognition that survives a lost modality (M3ER).

    Exit codes: 0 complete; 1 internal error; 2 usage or configuration; 3 finished, with something quarantined; 4 what
    is being resumed was made by something else; 5 disk full; 130 interrupted.
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for table and figures.")] = Path("runs/demo"),
    threads: ThreadsOption = 1,
) -> None:
    """Show the whole method on a generated corpus.

    Its modalities are partly ineffectual. Fits, trains and scores, then prints the ablation table and draws the
    figures: a few minutes on two cores.
    """
    from m3er_fast.demo import run_demo

    _use_threads(threads)
    with ProgressDisplay("demo") as display:
        result = run_demo(out, progress=display.say)
    _print_ablation(result, out)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="File or folder to read.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")],
    out: Annotated[Path, typer.Option(metavar="CORPUS", help="Folder to write the corpus to.")],
    resplit: Annotated[bool, typer.Option("--resplit", help="Split anew, whatever splits the source has.")] = False,
) -> None:
    """Convert a published feature file to a Parquet corpus.

    A source without splits is split 7:1:2, so that no video or speaker is in two of them.
    """
    from m3er_fast.corpus import convert

    corpus = convert(source, format, out, resplit=resplit)
    dims = ", ".join(f"{name} {dim}" for name, dim in corpus.input_dims.items())
    print(
        f"{out}: {len(corpus)} utterances of at most {corpus.steps} frames ({_split_sizes(corpus)}); features: {dims}"
    )


@app.command()
def train(
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder for the model, its history and plots.")],
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What fit-stats learned; it is used in place of what CORPUS would teach."),
    ] = None,
    config: ConfigOption = None,
    paper: PaperOption = False,
    epochs: EpochsOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, shuffling and dropout.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Utterances a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of Adam.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with what RUN holds, or begin anew.")] = True,
    threads: ThreadsOption = 1,
) -> None:
    """Train a model, stopping early on the validation loss.

    The weights of the best epoch are kept. Interrupted training goes on where it was when the same command is given
    again.
    """
    from m3er_fast.training import evaluate
    from m3er_fast.training import train as train_model

    _use_threads(threads)
    statistics = None if stats is None else _load_statistics(stats)
    data = _read_for_training(corpus)
    settings = _settings(
        data, config, paper, statistics, epochs=epochs, seed=seed, batch_size=batch_size, learning_rate=learning_rate
    )
    with ProgressDisplay("train", "epochs") as display:

        def show(record: EpochRecord) -> None:
            note = f"loss {record.train_loss:.4f}, validation {record.valid_loss:.4f}"
            display.update(record.epoch, record.epochs, note)

        result = train_model(data, settings, statistics=statistics, out=out, resume=resume, progress=show)
    losses = result.history["valid_loss"]
    best = result.best_epoch
    print(f"{out}: best of {len(losses)} epochs is {best}, with a validation loss of {losses[best - 1]:.4f}")
    test = data.subset("test")
    report = evaluate(result.model, test).report if len(test) else None
    if report is not None:
        print(f"\nOn the test split:\n\n{report.to_markdown()}")


@app.command()
def score(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Folder of Parquet or Arrow files, or one, or URI.")],
    model: Annotated[Path, typer.Option(metavar="RUN", help="What train wrote, or any folder of save_pretrained.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI for the scores, one Parquet file a shard.")],
    engine: EngineOption = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what DIR holds; an empty DIR just starts.")] = (
        False
    ),
    batch_frames: Annotated[
        str, typer.Option(metavar="auto|N", help="Frames that go through the model at a time.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="Of the network; bfloat16 on CUDA only.")] = (
        "float32"
    ),
    device: Annotated[
        str | None,
        typer.Option(help="Such as cpu or cuda:1, or several with commas.  [default: every GPU, or else cpu]"),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare pages with their checksums, where CORPUS has any.")] = True,
    checksum: Annotated[
        str,
        typer.Option(metavar="sampled|full", help="What tells a changed shard on --resume: its ends, or every byte."),
    ] = "sampled",
    address: AddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Score a corpus, with or without labels.

    Writes class probabilities, effective modalities and p-values of every utterance. Shards that cannot be read are
    listed in DIR/quarantine.json and the others scored; the exit code is then 3.
    """
    from m3er_fast.cli import QUARANTINED
    from m3er_fast.scoring import load_model
    from m3er_fast.scoring import score as score_corpus
    from m3er_fast.shards.plan import locate

    _check_engine(engine)
    if batch_frames != "auto" and not (batch_frames.isdecimal() and int(batch_frames)):
        raise typer.BadParameter(f"{batch_frames!r} is neither auto nor a positive number", param_hint="--batch-frames")
    loaded, devices = load_model(model), _devices(device)
    if engine == "ray" and device is None:
        devices = devices[:1]  # each worker has one of its own
    with ProgressDisplay("score", "shards") as display:

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
            dtype=dtype,  # type: ignore[arg-type]  # which score checks
            verify=verify,
            checksum=checksum,  # type: ignore[arg-type]
            engine=engine,  # type: ignore[arg-type]
            address=address,
            workers=workers,
            progress=show,
        )
    resumed = f", {summary.resumed} of them by an earlier run" if summary.resumed else ""
    scored = summary.shards - len(summary.quarantined)
    took = f"{summary.rows} utterances in {scored} shards{resumed}, in {summary.seconds:.1f} s"
    folder = str(locate(out))
    print(f"{folder}: {took}; see {folder.rstrip('/')}/summary.html")
    if summary.quarantined:
        first = summary.quarantined[0]
        typer.echo(
            f"m3er-fast: {len(summary.quarantined)} of {summary.shards} shards are in quarantine, such as "
            f"{first.shard}: {first.reason} (all: {folder.rstrip('/')}/quarantine.json)",
            err=True,
        )
    if summary.errors:
        typer.echo(f"m3er-fast: {summary.errors} utterances could not be scored: see their column error", err=True)
    if summary.quarantined or summary.errors:
        raise typer.Exit(QUARANTINED)


@app.command()
def fit_stats(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Folder of Parquet or Arrow files, or one, or URI.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for what was learned; is replaced.")],
    config: ConfigOption = None,
    paper: PaperOption = False,
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Fit a model's statistics to a corpus that need not fit into memory.

    Learns standardiser, modality check and proxy bank from the training split, or from everything where there are no
    splits; labels are not needed. Then: train --stats FILE. Shards that cannot be read are left out; the exit code is
    then 3.
    """
    from m3er_fast.cli import QUARANTINED
    from m3er_fast.scoring import fit_statistics

    _check_engine(engine)
    if out.is_dir():
        raise typer.BadParameter(f"{out} is a folder, wanted a file to write", param_hint="--out")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # where nothing can be written it is said now, not after hours
    with ProgressDisplay("fit-stats", "groups of shards") as display:

        def show(progress: FitProgress) -> None:
            display.update(progress.done, progress.groups, f"{progress.rows} utterances read")

        statistics = fit_statistics(
            corpus,
            _named_settings(config, paper),
            engine=engine,  # type: ignore[arg-type]
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


@app.command()
def generate(
    out: Annotated[Path, typer.Option(metavar="CORPUS", help="Folder to write the corpus to.")],
    utterances: Annotated[int, typer.Option(min=1, help="Utterances of all shards.")] = 100_000,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Utterances a shard.")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Frames of the padded time axis.")] = 20,
    features: Annotated[str, typer.Option(metavar="NAME=D,...", help="Features of each modality.")] = (
        "text=300,audio=74,face=36"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
) -> None:
    """Generate a corpus of any size, without labels.

    For measuring how fast this machine scores. Takes the memory of one shard.
    """
    from m3er_fast.corpus import generate_corpus

    dims = {}
    for part in features.split(","):
        name, _, number = part.partition("=")
        if not name.strip() or not number.strip().isdecimal() or not int(number):
            raise typer.BadParameter(f"{part!r} is not NAME=D", param_hint="--features")
        dims[name.strip()] = int(number)
    with ProgressDisplay("generate", "shards") as display:
        paths = generate_corpus(
            out,
            utterances=utterances,
            rows_per_shard=rows_per_shard,
            input_dims=dims,
            steps=steps,
            seed=seed,
            progress=display.update,
        )
    print(f"{out}: {utterances} utterances in {len(paths)} shards")


@app.command()
def ablate(
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for table and figures.")],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model, for mean ± standard deviation.")] = 5,
    config: ConfigOption = None,
    paper: PaperOption = False,
    epochs: EpochsOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Measure what each step of the method brings.

    Trains on this corpus with and without each step and prints the paper's Table 2, mean ± standard deviation.
    """
    from m3er_fast.ablation import run_ablation

    _use_threads(threads)
    data = _read_for_training(corpus)
    settings = _settings(data, config, paper, epochs=epochs)
    with ProgressDisplay("ablate") as display:
        result = run_ablation(data, settings, seeds=seeds, out=out, progress=display.say)
    _print_ablation(result, out)


@app.command()
def audit(
    corpus: CorpusArgument,
    model: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Model whose check says how much looks ineffectual.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Report what is wrong with a corpus.

    Lengths, non-finite, constant or missing modalities, labels, splits that share a group and duplicates. With a
    model, of the modalities that the model knows, and how much of each its check suspects to be ineffectual.
    """
    from m3er_fast.corpus import audit_corpus
    from m3er_fast.scoring import load_model

    judge = None if model is None else load_model(model)
    data = read_parquet(corpus, input_dims=None if judge is None else judge.input_dims)
    report = audit_corpus(data)
    shares = {} if judge is None else _ineffectual_shares(judge, data)
    if as_json:
        print(json.dumps({**report.to_dict(), "ineffectual": shares} if judge else report.to_dict(), indent=2))
        return
    print(report.to_text())
    for name, share in shares.items():
        print(
            f"{name}: {'never available' if share is None else f'{share:.1%} of what is available looks ineffectual'}"
        )


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAMES]...", help="Operations, such as fusion_loss.  [default: all]")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to measure: cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path | None, typer.Option(metavar="JSON", help="File for the run, as pytest-benchmark's.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="File for the roofline.")] = None,
    benchmarks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder benchmarks of a checkout.  [default: that of this package]"),
    ] = None,
) -> None:
    """Measure the throughput of operations beside the libraries they are compared with.

    Needs a checkout of the project: the wheel has no benchmarks. Every result is shown as soon as it is there, in a
    table on a terminal and as a line elsewhere. All of it takes a quarter of an hour on two cores.
    """
    from m3er_fast.cli.bench import BenchmarkResult, benchmark_files, run_benchmarks
    from m3er_fast.cli.bench_display import BenchmarkDisplay

    files = benchmark_files(benchmarks)
    unknown = [name for name in names or () if name not in files]
    if unknown:
        raise typer.BadParameter(
            f"no benchmark is called {', '.join(unknown)}; there are {', '.join(files)}", param_hint="NAMES"
        )
    [chosen] = _devices(device)[:1]
    left_out: Counter[str] = Counter()

    def show(result: BenchmarkResult) -> None:
        if result.left_out:
            left_out.update(result.cells)
        else:
            display.add(result)

    with BenchmarkDisplay.for_stdout() as display:
        number = run_benchmarks(
            [files[name] for name in names or files],
            device=chosen,
            out=out,
            plot=plot,
            show=show,
            progress=display.update,
        )
    print()
    for reason, results in left_out.items():
        print(f"{results} left out: {reason}")
    written = "".join(f", {path}" for path in (out, plot) if path is not None)
    print(f"{number} results{written}")


@app.command()
def info() -> None:
    """Show what works on this machine.

    Versions, devices, packages and back-ends, each tried, and why those that do not work do not.
    """
    from m3er_fast.cli.environment import describe_environment

    console = Console(soft_wrap=True, highlight=False)
    for heading, findings in describe_environment().items():
        console.print(Text(heading, "bold"))
        for name, works, note in findings:
            verdict = Text("works  ", "green") if works else Text("no     ", "yellow")
            console.print(Text.assemble(f"  {name:<30}", verdict, note))


def _read_for_training(path: Path) -> Corpus:
    """Read a corpus, with splits made where it has none, and say what was or will be made."""
    corpus = read_parquet(path)
    if corpus.split is None:
        corpus = split_by_group(corpus)
        print(f"{path} has no splits: split by group, {_split_sizes(corpus)}")
    elif not (corpus.split == "valid").any():
        print(f"{path} has no validation split: one is taken from train, by group")
    return corpus


def _use_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def _split_sizes(corpus: Corpus) -> str:
    return ", ".join(f"{name} {len(corpus.subset(name))}" for name in SPLITS)


def _settings(
    corpus: Corpus,
    path: Path | None,
    paper: bool,
    statistics: ModelStatistics | None = None,
    **overrides: float | None,
) -> M3ERConfig:
    """The settings of a file, of the paper, or the defaults for this corpus, with overrides of the training's."""
    from m3er_fast.training import default_config

    config = _named_settings(path, paper)
    if config is None:
        config = default_config(corpus, statistics)
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    return config.replace(training=replace(config.training, **given))


def _named_settings(path: Path | None, paper: bool) -> M3ERConfig | None:
    """The settings of a file or of the paper, or None for the defaults."""
    if path is not None and paper:
        raise typer.BadParameter("--config and --paper exclude each other")
    if path is not None:
        return _read_config(path)
    return M3ERConfig.paper() if paper else None


def _load_statistics(path: Path) -> ModelStatistics:
    from m3er_fast.scoring import ModelStatistics

    return ModelStatistics.load(path)


def _read_config(path: Path) -> M3ERConfig:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object of settings, got {type(values).__name__}")
    values = values.get("config", values)  # a run's config.json holds the settings among other things
    try:
        return M3ERConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_engine(engine: str) -> None:
    if engine not in ("local", "ray"):
        raise typer.BadParameter(f"{engine!r} is neither local nor ray", param_hint="--engine")


def _devices(names: str | None) -> list[str]:
    """The devices named on the command line, each tried."""
    import torch

    if names is None:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    devices = [name.strip() for name in names.split(",")]
    for name in devices:
        try:
            torch.empty(0, device=name)
        except (AssertionError, RuntimeError) as error:  # AssertionError: torch is built without CUDA
            raise typer.BadParameter(f"{name!r} cannot be used: {error}", param_hint="--device") from error
    return devices


def _ineffectual_shares(model: M3ERFusion, corpus: Corpus) -> dict[str, float | None]:
    """Share of each modality's available utterances that the model's check calls ineffectual; None without any."""
    from m3er_fast.training import evaluate

    if not len(corpus):
        return dict.fromkeys(model.input_dims)
    effective = evaluate(model, replace(corpus, target=None)).effective
    return {
        name: float((~effective[present, m]).mean()) if (present := corpus.available[:, m]).any() else None
        for m, name in enumerate(model.input_dims)
    }


def _print_ablation(result: AblationResult, out: Path) -> None:
    print(f"{result.to_markdown()}\n\nTable and figures: {out}")
