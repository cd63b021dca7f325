"""Training with early stopping, which resumes after an interruption with the same result.

Dimension legend: N utterances, C classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._training_state import (
    ResumeMismatchError,
    TrainingState,
    check_fingerprint,
    resuming_from,
    run_fingerprint,
)
from m3er_fast.atomic_files import replacing
from m3er_fast.config import M3ERConfig
from m3er_fast.corpus.base import Corpus
from m3er_fast.corpus.splits import ensure_validation
from m3er_fast.evaluation import Prediction, check_modalities, corpus_batches, evaluate, labelled, labels_of
from m3er_fast.fitting.statistics import ModelStatistics
from m3er_fast.fusion import M3ERFusion

__all__ = [
    "CHECKPOINT_FILE",
    "HISTORY_FILE",
    "HISTORY_PLOT",
    "EpochRecord",
    "Prediction",
    "ResumeMismatchError",
    "TrainingError",
    "TrainingResult",
    "check_modalities",
    "class_weights",
    "default_config",
    "evaluate",
    "train",
]

CHECKPOINT_FILE = "checkpoint.pt"
HISTORY_FILE = "history.json"
HISTORY_PLOT = "history.png"


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is no longer finite."""


class EpochRecord(NamedTuple):
    """The outcome of one epoch."""

    epoch: int  # from 1
    epochs: int  # the most there will be
    train_loss: float
    valid_loss: float
    best: bool
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """A trained model and its history."""

    model: M3ERFusion
    """In eval mode, with the weights of the best epoch."""
    history: dict[str, Any]
    """The content of ``history.json``: ``train_loss`` and ``valid_loss`` per epoch, and the settings."""
    best_epoch: int


def default_config(corpus: Corpus, statistics: ModelStatistics | None = None) -> M3ERConfig:
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
    corpus: Corpus,
    config: M3ERConfig | None = None,
    *,
    statistics: ModelStatistics | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: Callable[[EpochRecord], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> TrainingResult:
    """Fit and train a model on the train split, stopping early on the loss of the validation split.

    The validation loss is the network's own: the check and the proxies are off. All randomness comes from
    ``config.training.seed``: the same corpus, configuration and number of threads give the same model, whether or not
    training was interrupted. With ``out``, a checkpoint is written there after every epoch, under a temporary name
    until it is on the disk; a killed training resumes from its last epoch.

    Args:
        corpus: with labels and splits; without a validation split, one is taken from train, by group.
        config: all settings; None takes :func:`default_config`.
        statistics: standardiser, check and proxies, learned from a larger corpus by
            :func:`m3er_fast.scoring.fit_statistics`; None learns them from the train split.
        out: the run folder, which receives config.json and model.safetensors (``save_pretrained``), history.json and,
            if matplotlib is installed, history.png.
        resume: continue the run in ``out``; False begins anew.
        progress: called after every epoch.
        resumed: called once with the number of epochs that an earlier run has done, if it has done any.

    Raises:
        ValueError: if the corpus has no labels, no splits or no labelled training samples, or its task does not fit
            the configuration's activation; or ``statistics`` are of other modalities or settings.
        ResumeMismatchError: if ``out`` was begun with another corpus, configuration or other statistics, naming what
            differs, or its files are damaged.
        TrainingError: if the loss is no longer finite.
    """
    config = default_config(corpus, statistics) if config is None else config
    out = None if out is None else Path(out)
    _check_task(corpus, config)
    corpus = ensure_validation(corpus, seed=config.training.seed)
    training, validation = corpus.subset("train"), corpus.subset("valid")
    for name, part in (("train", training), ("valid", validation)):
        if not labelled(part).any():
            raise ValueError(f"the {name} split has no labelled utterance")
    if config.training.balance_classes and config.loss.class_weight is None:
        config = config.replace(loss=replace(config.loss, class_weight=class_weights(training)))

    fingerprint = run_fingerprint(corpus, config, statistics)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if resume and (out / HISTORY_FILE).exists() and not (out / CHECKPOINT_FILE).exists():
            result = _finished(out, fingerprint)
            if resumed is not None:
                resumed(len(result.history["train_loss"]))
            return result
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.training.seed)
        model = M3ERFusion(corpus.input_dims, len(corpus.classes), config, classes=corpus.classes)
        if statistics is None:
            longest = max(1, int(training.lengths.max()))
            features = {name: values[:, :longest] for name, values in training.features.items()}
            model.fit(features, lengths=training.lengths, available=training.available)
        else:
            statistics.apply(model)
        state = TrainingState(model, fingerprint)
        if out is not None and resume and (out / CHECKPOINT_FILE).exists():
            state.load(out / CHECKPOINT_FILE)
            if resumed is not None:
                resumed(state.epoch)
        _run_epochs(state, training, validation, out, progress)
    model.network.load_state_dict(state.best)
    model.eval()
    history = state.history()
    if out is not None:
        _save(model, out, training, validation, history, statistics)
        _write_plot(history, out / HISTORY_PLOT)
        with replacing(out / HISTORY_FILE) as partial:
            partial.write_text(json.dumps(history, indent=2) + "\n")
        (out / CHECKPOINT_FILE).unlink(missing_ok=True)
    return TrainingResult(model, history, state.best_epoch)


def class_weights(corpus: Corpus) -> tuple[float, ...]:
    """Return N / (C · n_c) for each of the C classes that have n_c > 0 labels, and 1 for the others.

    For yes/no answers and for distributions, n_c is the sum of the target's column.
    """
    target = labels_of(corpus)
    classes = len(corpus.classes)
    target = target[labelled(corpus)]
    count = np.bincount(target, minlength=classes) if target.ndim == 1 else target.sum(axis=0)
    present = count > 0
    weight = np.ones(classes)
    weight[present] = count.sum() / (present.sum() * count[present])
    return tuple(weight.tolist())


def _run_epochs(
    state: TrainingState,
    training: Corpus,
    validation: Corpus,
    out: Path | None,
    progress: Callable[[EpochRecord], None] | None,
) -> None:
    """Train until the state is finished, with a checkpoint in ``out`` and a call of ``progress`` after every epoch."""
    model = state.model
    settings = model.config.training
    rows = np.flatnonzero(labelled(training))
    while not state.finished():
        start = time.perf_counter()
        # Seeded per epoch, not carried over from the last one: a resumed training must draw the same numbers.
        torch.manual_seed(settings.seed * 1_000_003 + state.epoch)
        order = rows[torch.randperm(len(rows)).numpy()]
        train_loss = _train_epoch(state, training, order)
        valid_loss = _mean_loss(model.ablated(check=False, proxy=False), validation)
        if not np.isfinite(train_loss + valid_loss):
            raise TrainingError(
                f"the loss is {train_loss} in training and {valid_loss} in validation after epoch {state.epoch + 1}: "
                f"lower learning_rate ({settings.learning_rate}) or set gradient_norm"
            )
        best = state.record(train_loss, valid_loss)
        if out is not None:
            state.save(out / CHECKPOINT_FILE)
        if progress is not None:
            seconds = time.perf_counter() - start
            progress(EpochRecord(state.epoch, settings.epochs, train_loss, valid_loss, best, seconds))


def _train_epoch(state: TrainingState, corpus: Corpus, order: NDArray[np.int64]) -> float:
    """Train on every row of ``order`` once, and return the mean loss per utterance."""
    model = state.model
    settings = model.config.training
    model.train()
    total = 0.0
    for rows, features, lengths, available in corpus_batches(corpus, order, settings.batch_size):
        loss = model.loss(model(features, lengths, available), _target(corpus, rows))
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), settings.gradient_norm)
        state.optimizer.step()
        total += loss.item() * len(rows)
    return total / len(order)


@torch.no_grad()
def _mean_loss(model: M3ERFusion, corpus: Corpus) -> float:
    """Return the mean loss per labelled utterance, in eval mode."""
    order = np.flatnonzero(labelled(corpus))
    model.eval()
    total = 0.0
    for rows, features, lengths, available in corpus_batches(corpus, order, 512):
        total += model.loss(model(features, lengths, available), _target(corpus, rows)).item() * len(rows)
    return total / len(order)


def _target(corpus: Corpus, rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(labels_of(corpus)[rows])


def _check_task(corpus: Corpus, config: M3ERConfig) -> None:
    """Raise a ValueError unless the corpus has labels that fit the loss's activation."""
    labels_of(corpus)
    if corpus.task == "multi" and config.loss.activation != "sigmoid":
        raise ValueError(
            f"the corpus asks {len(corpus.classes)} yes/no questions: loss.activation must be 'sigmoid', "
            f"got {config.loss.activation!r}"
        )


def _finished(out: Path, fingerprint: dict[str, Any]) -> TrainingResult:
    """Load the result of a finished run."""
    with resuming_from(out / HISTORY_FILE):
        history = json.loads((out / HISTORY_FILE).read_text())
        check_fingerprint(history["fingerprint"], fingerprint, out)
        best_epoch = history["best_epoch"]
    return TrainingResult(M3ERFusion.from_pretrained(out), history, best_epoch)


def _save(
    model: M3ERFusion,
    out: Path,
    training: Corpus,
    validation: Corpus,
    history: dict[str, Any],
    statistics: ModelStatistics | None,
) -> None:
    """Save the model with a card that describes its training data and its scores on the validation split."""
    (out / "README.md").unlink(missing_ok=True)  # save_pretrained keeps the card of an earlier training
    best = history["best_epoch"]
    data = (
        f"{len(training)} utterances of at most {training.steps} frames; {len(validation)} others were held out to "
        f"choose the epoch. Best epoch: {best} of {len(history['valid_loss'])}, with a validation loss of "
        f"{history['valid_loss'][best - 1]:.4f}."
    )
    if statistics is not None:
        data += f" Standardiser, modality check and proxies were fitted separately, to {statistics.rows} utterances."
    report = evaluate(model, validation).report
    metrics = (
        None
        if report is None
        else (
            "On the validation split, with modality check and proxies on. The epoch was chosen on this split, so the "
            f"scores are optimistic:\n\n{report.to_markdown()}"
        )
    )
    model.save_pretrained(out, model_card_kwargs={"data": data, "metrics": metrics})


def _write_plot(history: dict[str, Any], path: Path) -> None:
    try:
        from m3er_fast.plots import plot_history
    except ImportError:  # the picture needs an extra; history.json holds the same numbers
        return
    plot_history(history, path)
