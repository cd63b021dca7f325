"""Arguments that several commands share, and reading them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from m3er_fast.corpus import SPLITS, Corpus, read_parquet, split_by_group
from m3er_fast.execution.engine import Engine

if TYPE_CHECKING:
    from m3er_fast.config import M3ERConfig
    from m3er_fast.scoring import ModelStatistics
    from m3er_fast.training import EpochRecord, StreamedCorpus

_Arguments = ParamSpec("_Arguments")

CorpusArgument = Annotated[
    Path, typer.Argument(metavar="CORPUS", help="Parquet corpus: the folder that convert wrote, or one file.")
]
LargeCorpusArgument = Annotated[
    str, typer.Argument(metavar="CORPUS", help="Folder of Parquet or Arrow files, one such file, or a URI.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="JSON or YAML file of settings, such as the config.json of a run."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Change a setting, such as loss.beta=2; may be given several times."
    ),
]
PaperOption = Annotated[bool, typer.Option("--paper", help="Use the settings of the paper instead of the defaults.")]
EngineOption = Annotated[
    Engine, typer.Option("--engine", metavar="local|ray", help="Run in this process, or in Ray workers.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="Address of a Ray cluster, or auto.  [default: Ray is started on this machine]",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Number of Ray workers.  [default: as many as there is room for]"),
]
EpochsOption = Annotated[int | None, typer.Option(help="Maximum number of epochs; overrides the settings.")]


class LogKind(StrEnum):
    """Where ``train`` also writes its epochs."""

    CSV = "csv"
    TENSORBOARD = "tensorboard"


LogOption = Annotated[
    list[LogKind] | None,
    typer.Option(
        "--log", metavar="csv|tensorboard", help="Also write every epoch to RUN/log.csv, or to RUN/tensorboard."
    ),
]
ResumeOption = Annotated[bool, typer.Option(help="Go on with an interrupted run, or begin anew.")]
# One by default: at the model's own sizes a second thread gains little on an idle machine, and spins most of the time
# on a busy one (an epoch on two cores, one of them taken: 0.8 s with one thread, 28 s with two).
ThreadsOption = Annotated[int, typer.Option(min=1, help="Number of CPU threads.")]

DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Device to train on; auto is a GPU if there is one."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", metavar="float32|bfloat16", help="Precision of training.  [default: float32]"),
]

StreamOption = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read CORPUS shard by shard in every epoch, or hold it in memory.  [default: by its size]",
        show_default=False,
    ),
]
BufferOption = Annotated[
    int | None,
    typer.Option("--buffer", min=1, help="Streamed utterances that are shuffled together.  [default: 256 MiB of them]"),
]


@contextmanager
def interruptible(way_on: str) -> Iterator[None]:
    """Let an interrupt of the block say how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(way_on) from error


def by_launched_workers(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Let the processes that ``torchrun`` has started run a command together; the first one alone prints."""

    @functools.wraps(command)
    def run(*args: _Arguments.args, **options: _Arguments.kwargs) -> None:
        from m3er_fast.training.workers import launched_workers

        with launched_workers():
            command(*args, **options)

    return run


def use_threads(number: int) -> None:
    """Compute with this number of CPU threads from now on."""
    import torch

    torch.set_num_threads(number)


def usable_devices(names: str | None) -> list[str]:
    """Return the devices named on the command line, each tried; None means every GPU, or else the CPU."""
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


def split_sizes(corpus: Corpus) -> str:
    """Return the number of utterances of each split, in words."""
    return ", ".join(f"{name} {len(corpus.subset(name))}" for name in SPLITS)


def read_for_training(path: Path) -> Corpus:
    """Read a corpus, make splits if it has none, and print which splits are made."""
    corpus = read_parquet(path)
    if corpus.split is None:
        corpus = split_by_group(corpus)
        print(f"{path} has no splits: split by group, {split_sizes(corpus)}")
    elif not (corpus.split == "valid").any():
        print(f"{path} has no validation split: one is taken from train, by group")
    return corpus


def open_for_training(path: Path, stream: bool | None, buffer: int | None) -> Corpus | StreamedCorpus:
    """Read a corpus, or prepare to stream it: if asked to, and without being asked if it outgrows memory."""
    from m3er_fast.training import StreamedCorpus, fits_into_memory

    if stream is None:
        stream = not fits_into_memory(path)
        if stream:
            print(f"{path} outgrows the memory of this machine: it is streamed")
    if buffer is not None and not stream:
        raise typer.BadParameter("the corpus is not streamed: give --stream too", param_hint="--buffer")
    return StreamedCorpus(path, buffer=buffer) if stream else read_for_training(path)


def training_settings(
    corpus: Corpus | StreamedCorpus,
    path: Path | None,
    paper: bool,
    changes: list[str] | None,
    statistics: ModelStatistics | None = None,
    **overrides: float | str | None,
) -> M3ERConfig:
    """Return the chosen settings, or the defaults for this corpus.

    Args:
        corpus: the corpus to train on.
        path: see :func:`chosen_settings`.
        paper: see :func:`chosen_settings`.
        changes: see :func:`change_settings`.
        statistics: fitted statistics, whose settings the defaults take over.
        overrides: settings of the training; None overrides nothing.
    """
    from m3er_fast.training import default_config

    config = chosen_settings(path, paper)
    if config is None:
        config = default_config(corpus, statistics)
    config = change_settings(config, changes)
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    return config.replace(training=replace(config.training, **given))


def chosen_settings(path: Path | None, paper: bool) -> M3ERConfig | None:
    """Return the settings of a file or of the paper, or None for the defaults."""
    if path is not None and paper:
        raise typer.BadParameter("--config and --paper exclude each other")
    if path is not None:
        return _read_config(path)
    if not paper:
        return None
    from m3er_fast.config import M3ERConfig

    return M3ERConfig.paper()


def change_settings(config: M3ERConfig, changes: list[str] | None) -> M3ERConfig:
    """Return the settings changed by words such as ``loss.beta=2``: a JSON value, or else text."""
    values: dict[str, Any] = {}
    for change in changes or []:
        name, equals, text = change.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{change!r} is not NAME=VALUE", param_hint="--set")
        try:
            values[name.strip()] = json.loads(text)
        except ValueError:
            values[name.strip()] = text
    try:
        return config.with_settings(values)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--set") from error


def logs_of(kinds: Sequence[LogKind] | None, out: Path) -> list[Callable[[EpochRecord], None]]:
    """Return the callbacks that write the epochs of the run in ``out``."""
    from m3er_fast.training import CsvLog, TensorBoardLog

    logs: list[Callable[[EpochRecord], None]] = []
    if LogKind.CSV in (kinds or []):
        logs.append(CsvLog(out / "log.csv"))
    if LogKind.TENSORBOARD in (kinds or []):
        logs.append(TensorBoardLog(out / "tensorboard"))
    return logs


def read_values(path: Path) -> dict[str, Any]:
    """Return what a JSON or YAML file holds by name."""
    values = _read_yaml(path) if path.suffix in (".yaml", ".yml") else _read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object of settings, got {type(values).__name__}")
    return values


def _read_config(path: Path) -> M3ERConfig:
    from m3er_fast.config import M3ERConfig

    values = read_values(path)
    values = values.get("config", values)  # a run's config.json holds the settings beside other fields
    try:
        return M3ERConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _read_yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyyaml: pip install 'm3er-fast[score]'") from error
    try:
        return yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
