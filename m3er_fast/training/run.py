"""`train`: from a corpus to a trained model, and to its run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m3er_fast.config import M3ERConfig
from m3er_fast.corpus.base import Corpus
from m3er_fast.execution.engine import Engine, check_engine
from m3er_fast.fitting.statistics import ModelStatistics
from m3er_fast.fusion import M3ERFusion
from m3er_fast.training.calibration import calibrate
from m3er_fast.training.data import MemoryData, TrainingData
from m3er_fast.training.device import find_device
from m3er_fast.training.fingerprint import run_fingerprint
from m3er_fast.training.loop import EpochRecord, run_epochs
from m3er_fast.training.output import find_checkpoint, is_finished, read_run, write_run
from m3er_fast.training.state import TrainingState
from m3er_fast.training.stream import StreamedCorpus
from m3er_fast.training.workers import current_workers


@dataclass(frozen=True)
class TrainingResult:
    """A trained model and its history."""

    model: M3ERFusion
    """In eval mode, on the CPU, with the weights of the best epoch."""
    history: dict[str, Any]
    """The content of ``history.json``: ``train_loss`` and ``valid_loss`` per epoch, and the settings."""
    best_epoch: int


def default_config(corpus: Corpus | StreamedCorpus, statistics: ModelStatistics | None = None) -> M3ERConfig:
    """Return the default settings, with the activation that the task of the corpus requires.

    With ``statistics``, the settings of the check and the proxies are those that they were fitted with.
    """
    config = M3ERConfig()
    if corpus.task == "multi":
        config = config.replace(loss=replace(config.loss, activation="sigmoid"))
    if statistics is not None:
        config = config.replace(check=statistics.check, proxy=statistics.proxy)
    return config


def train(
    corpus: Corpus | StreamedCorpus,
    config: M3ERConfig | None = None,
    *,
    statistics: ModelStatistics | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    device: str = "auto",
    engine: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    checkpoint_seconds: float = 300.0,
    progress: Callable[[EpochRecord], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> TrainingResult:
    """Fit and train a model on the train split, stopping early on the loss of the validation split.

    Then its probabilities are calibrated on the validation split, unless ``config.training.calibrate`` is off.
    The validation loss is the network's own: the check and the proxies are off. All randomness comes from
    ``config.training.seed``: the same corpus, configuration and number of threads give the same model, whether or not
    training was interrupted. With ``out``, a checkpoint is written there after every epoch and, in long epochs, every
    ``checkpoint_seconds``, under a temporary name until it is on the disk; a killed training resumes from the last one.

    Where torch has a process group, every process calls this with the same arguments, and each computes a part of every
    batch: the losses are those of one process, except for rounding, and for dropout, which each process draws by
    itself. The first process alone fits, reads and writes ``out``, and calls ``progress`` and ``resumed``.

    Args:
        corpus: with labels and splits; without a validation split, one is taken from train, by group. A corpus larger
            than memory is a :class:`StreamedCorpus`.
        config: all settings; None takes :func:`default_config`.
        statistics: standardiser, check and proxies, learned from a larger corpus by
            :func:`m3er_fast.scoring.fit_statistics`; None learns them from the train split.
        out: the run folder, which receives config.json and model.safetensors (``save_pretrained``), history.json and,
            if matplotlib is installed, history.png and reliability.png.
        resume: continue the run in ``out``, also a finished one if ``config`` now allows more epochs or more patience;
            False begins anew.
        device: "cpu", "cuda", "cuda:N", or "auto" for the first GPU if there is one. The network is trained there; the
            rest is fitted on the CPU, to the same result everywhere. A run may go on on another device.
        engine: "local" (this process, or those of its process group) or "ray", which trains in workers and starts them
            again from the checkpoint in ``out`` when one is lost. All of them must reach ``out``.
        address: of a Ray cluster; None starts Ray on this machine.
        workers: number of Ray workers; None uses as many as there is room for.
        checkpoint_seconds: the time between checkpoints within an epoch, which one process alone writes: those of a
            group write one after each epoch.
        progress: called after every epoch.
        resumed: called once with the number of epochs that an earlier run has done, if it has done any.

    Raises:
        ValueError: if the corpus has no labels, no splits or no labelled training samples, or its task does not fit
            the configuration's activation; ``statistics`` are of other modalities or settings; there is no such device;
            or the processes of a group differ in corpus or settings.
        ResumeMismatchError: if ``out`` was begun with another corpus, configuration or other statistics, naming what
            differs, or its files are damaged.
        TrainingError: if the loss is no longer finite.
        ImportError: engine is "ray", and Ray is missing.
        RuntimeError: Ray workers were lost repeatedly.
    """
    check_engine(engine, address, workers)
    if engine == "ray":
        from m3er_fast.training.ray import train_on_ray

        out = None if out is None else Path(out).absolute()
        result: TrainingResult = train_on_ray(
            partial(
                train,
                corpus,
                config,
                statistics=statistics,
                out=out,
                device=device,
                checkpoint_seconds=checkpoint_seconds,
            ),
            out=out,
            resume=resume,
            device=device,
            address=address,
            workers=workers,
            progress=progress,
            resumed=resumed,
        )
        return result
    config = default_config(corpus, statistics) if config is None else config
    group, on = current_workers(), find_device(device)
    out = group.first_only(None if out is None else Path(out))
    progress, resumed = group.first_only(progress), group.first_only(resumed)
    data = MemoryData(corpus, config.training.seed) if isinstance(corpus, Corpus) else corpus
    _check_task(data, config)
    if config.training.balance_classes and config.loss.class_weight is None:
        config = config.replace(loss=replace(config.loss, class_weight=data.class_weights()))

    fingerprint = run_fingerprint(config, data.fingerprint(), None if statistics is None else statistics.digest)
    group.check_same(fingerprint)
    finished = group.from_first(lambda: _finished(out, fingerprint) if resume else None)
    if finished is not None:
        if resumed is not None:
            resumed(len(finished.history["train_loss"]))
        return finished
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.training.seed)
        model = group.from_first(lambda: _fitted_model(data, config, statistics))
        state = TrainingState(model.to(on), fingerprint)
        checkpoint = find_checkpoint(out) if out is not None and resume else None
        if state.load(checkpoint, group) and resumed is not None:
            resumed(state.epoch)
        run_epochs(state, data, group, out, checkpoint_seconds, progress)
    model.network.load_state_dict(state.best)
    model.cpu().eval()
    if config.training.calibrate:
        calibrate(model, data.validation)
    history = state.history()
    if out is not None:
        write_run(out, model, history, data, statistics)
    return TrainingResult(model, history, state.best_epoch)


def _finished(out: Path | None, fingerprint: dict[str, Any]) -> TrainingResult | None:
    """Return the result that a run folder holds, if it is that of a finished training which does not go on."""
    found = read_run(out, fingerprint) if out is not None and is_finished(out) else None
    if found is None:
        return None
    model, history = found
    return TrainingResult(model, history, history["best_epoch"])


def _fitted_model(data: TrainingData, config: M3ERConfig, statistics: ModelStatistics | None) -> M3ERFusion:
    """Return a model that is trained no epoch yet."""
    model = M3ERFusion(data.input_dims, len(data.classes), config, classes=data.classes, extraction=data.extraction)
    if statistics is None:
        data.fit(model)
    else:
        statistics.apply(model)
    return model


def _check_task(data: TrainingData, config: M3ERConfig) -> None:
    """Raise a ValueError unless the labels of the corpus fit the loss's activation."""
    if data.task == "multi" and config.loss.activation != "sigmoid":
        raise ValueError(
            f"the corpus asks {len(data.classes)} yes/no questions: loss.activation must be 'sigmoid', "
            f"got {config.loss.activation!r}"
        )
