"""Training with early stopping, resumable after a kill with the same result, and evaluation of what was trained.

Dimension legend: N utterances, M modalities, T time steps, C classes.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast.atomic_files import replacing
from m3er_fast.config import M3ERConfig
from m3er_fast.corpus.base import NO_LABEL, Corpus
from m3er_fast.corpus.splits import ensure_validation
from m3er_fast.fitted_module import eval_mode
from m3er_fast.fitting.statistics import ModelStatistics
from m3er_fast.fusion import M3ERFusion
from m3er_fast.metrics import ClassificationReport, classification_report

CHECKPOINT_FILE = "checkpoint.pt"
HISTORY_FILE = "history.json"
HISTORY_PLOT = "history.png"


class ResumeMismatchError(RuntimeError):
    """A run folder holds a training that was begun with another corpus or configuration, or is damaged."""


class TrainingError(RuntimeError):
    """Training cannot go on, such as when the loss is no longer finite."""


class EpochRecord(NamedTuple):
    """What there is to say of one epoch."""

    epoch: int  # from 1
    epochs: int  # the most there will be
    train_loss: float
    valid_loss: float
    best: bool
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """A trained model and how it came to be."""

    model: M3ERFusion
    """In eval mode, with the weights of the best epoch."""
    history: dict[str, Any]
    """Per-epoch lists ``train_loss`` and ``valid_loss``, and the settings; what ``history.json`` holds."""
    best_epoch: int


@dataclass(frozen=True)
class Prediction:
    """What a model says of a corpus."""

    probabilities: NDArray[np.float32]  # (N, C)
    modality_probabilities: NDArray[np.float32]  # (M, N, C)
    effective: NDArray[np.bool_]  # (N, M)
    p_value: NDArray[np.float32]  # (N, M)
    abstained: NDArray[np.bool_]  # (N,)
    available: NDArray[np.bool_]  # (N, M), the modalities that had a valid frame and were known from training
    report: ClassificationReport | None
    """None where the corpus has no labels."""


def default_config(corpus: Corpus, statistics: ModelStatistics | None = None) -> M3ERConfig:
    """The default settings, with the activation that the corpus's task calls for.

    Those of check and proxies are the ones that ``statistics`` were fitted with, if there are any.
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
) -> TrainingResult:
    """Fit and train a model on the train split, stopping early on the loss of the validation split.

    The validation loss is measured without the check and the proxies: it is the network's own. Everything is drawn
    from ``config.training.seed``: the same corpus, configuration and thread count give the same model, whether or not
    training was interrupted. With ``out`` every epoch is written there as it ends, under a temporary name until it is
    on the disk, so that a killed training goes on from its last epoch.

    Args:
        corpus: with labels and splits; without a validation split one is carved out of train, by group.
        config: all settings; None takes :func:`default_config`.
        statistics: standardiser, check and proxies, learned from a larger corpus by
            :func:`m3er_fast.scoring.fit_statistics`; None learns them from the train split.
        out: the run folder, which receives config.json and model.safetensors (``save_pretrained``), history.json and,
            if matplotlib is there, history.png.
        resume: go on from what ``out`` holds; False begins anew.
        progress: called after every epoch.

    Raises:
        ValueError: if the corpus has no labels, no splits or no labelled training samples, or its task does not fit
            the configuration's activation; or ``statistics`` are of other modalities or settings.
        ResumeMismatchError: if ``out`` was begun with another corpus, configuration or other statistics, or what it
            holds is damaged.
        TrainingError: if the loss is no longer finite.
    """
    config = default_config(corpus, statistics) if config is None else config
    out = None if out is None else Path(out)
    _check_task(corpus, config)
    corpus = ensure_validation(corpus, seed=config.training.seed)
    training, validation = corpus.subset("train"), corpus.subset("valid")
    for name, part in (("train", training), ("valid", validation)):
        if not _labelled(part).any():
            raise ValueError(f"the {name} split has no labelled utterance")
    if config.training.balance_classes and config.loss.class_weight is None:
        config = config.replace(loss=replace(config.loss, class_weight=class_weights(training)))

    fingerprint = _fingerprint(corpus, config, statistics)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if resume and (out / HISTORY_FILE).exists() and not (out / CHECKPOINT_FILE).exists():
            return _finished(out, fingerprint)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.training.seed)
        model = M3ERFusion(corpus.input_dims, len(corpus.classes), config, classes=corpus.classes)
        if statistics is None:
            model.fit(training.features, training.lengths, training.available)
        else:
            statistics.apply(model)
        state = _State(model, fingerprint)
        if out is not None and resume and (out / CHECKPOINT_FILE).exists():
            state.load(out / CHECKPOINT_FILE)
        _run_epochs(state, model, training, validation, out, progress)
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


def evaluate(
    model: M3ERFusion, corpus: Corpus, *, batch_size: int = 512, effective: NDArray[np.bool_] | None = None
) -> Prediction:
    """Classify a corpus in eval mode and, where it has labels, score the answers.

    Args:
        model: fitted, if it has a check.
        corpus: its modalities and, where it has labels, its classes must be those of the model, in the same order.
        batch_size: utterances a step.
        effective: (N, M) verdicts that replace the modality check's.

    Raises:
        ValueError: if the corpus is empty or does not fit the model, or ``effective`` has another shape.
        NotFittedError: if the model has a check that is not fitted.
    """
    check_modalities(model, corpus)
    if corpus.target is not None and corpus.classes != model.classes:
        raise ValueError(f"the corpus has the classes {corpus.classes}, but the model {model.classes}")
    if not len(corpus):
        raise ValueError("the corpus is empty: there is nothing to evaluate")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if effective is not None and effective.shape != corpus.available.shape:
        raise ValueError(f"effective must have shape {corpus.available.shape}, got {effective.shape}")
    parts = []
    with eval_mode(model), torch.no_grad():
        for rows, features, lengths, available in _batches(corpus, np.arange(len(corpus)), batch_size):
            verdict = None if effective is None else torch.from_numpy(effective[rows])
            output = model(features, lengths, available, effective=verdict)
            fused, own = model.probabilities(output), model.modality_probabilities(output)
            verdicts = (output.effective, output.p_value, output.abstained, output.available)
            parts.append([value.cpu().numpy() for value in (fused, own.transpose(0, 1), *verdicts)])
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    probabilities, by_modality, judged, p_value, abstained, present = columns
    report = None
    if corpus.target is not None and _labelled(corpus).any():
        report = classification_report(probabilities, corpus.target, corpus.classes, task=corpus.task)
    return Prediction(probabilities, by_modality.swapaxes(0, 1), judged, p_value, abstained, present, report)


def check_modalities(model: M3ERFusion, corpus: Corpus) -> None:
    """Raise a ValueError unless the corpus has the model's modalities, in the order of its (N, M) results."""
    if list(corpus.input_dims.items()) != list(model.input_dims.items()):
        raise ValueError(
            f"the corpus has the modalities {corpus.input_dims}, but the model {model.input_dims}: "
            "wanted the same, in the same order"
        )


def class_weights(corpus: Corpus) -> tuple[float, ...]:
    """N / (C · n_c) for each of the C classes that have n_c > 0 labels, and 1 for the others.

    Of yes/no answers and of shares, n_c is the sum.
    """
    target = _labels(corpus)
    classes = len(corpus.classes)
    count = np.bincount(target[target != NO_LABEL], minlength=classes) if target.ndim == 1 else target.sum(axis=0)
    present = count > 0
    weight = np.ones(classes)
    weight[present] = count.sum() / (present.sum() * count[present])
    return tuple(weight.tolist())


class _State:
    """Everything an interrupted training needs to go on as if nothing had happened."""

    def __init__(self, model: M3ERFusion, fingerprint: str) -> None:
        settings = model.config.training
        self.model = model
        self.fingerprint = fingerprint
        self.optimizer = torch.optim.AdamW(
            model.network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.best = _copy(model.network.state_dict())
        self.best_epoch = 0
        self.train_loss: list[float] = []
        self.valid_loss: list[float] = []

    @property
    def epoch(self) -> int:
        return len(self.train_loss)

    def finished(self) -> bool:
        settings = self.model.config.training
        waited = self.epoch - self.best_epoch
        return self.epoch >= settings.epochs or (settings.patience is not None and waited >= settings.patience)

    def record(self, train_loss: float, valid_loss: float) -> bool:
        """Take note of an epoch; whether it is the best so far."""
        best = not self.valid_loss or valid_loss < min(self.valid_loss)
        self.train_loss.append(train_loss)
        self.valid_loss.append(valid_loss)
        if best:
            self.best, self.best_epoch = _copy(self.model.network.state_dict()), self.epoch
        return best

    def history(self) -> dict[str, Any]:
        return {
            "train_loss": self.train_loss,
            "valid_loss": self.valid_loss,
            "best_epoch": self.best_epoch,
            "config": self.model.config.to_dict(),
            "fingerprint": self.fingerprint,
        }

    def save(self, path: Path) -> None:
        values = {
            "network": self.model.network.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "optimizer": self.optimizer.state_dict(),
            "train_loss": self.train_loss,
            "valid_loss": self.valid_loss,
            "fingerprint": self.fingerprint,
        }
        # Through memory: torch's own writer hides what the disk said.
        buffer = io.BytesIO()
        torch.save(values, buffer)
        with replacing(path) as partial:
            partial.write_bytes(buffer.getbuffer())

    def load(self, path: Path) -> None:
        with _resuming(path):
            values = torch.load(path, weights_only=True)
            _check_fingerprint(values["fingerprint"], self.fingerprint, path.parent)
            self.model.network.load_state_dict(values["network"])
            self.optimizer.load_state_dict(values["optimizer"])
            self.best, self.best_epoch = values["best"], values["best_epoch"]
            self.train_loss, self.valid_loss = values["train_loss"], values["valid_loss"]


def _run_epochs(
    state: _State,
    model: M3ERFusion,
    training: Corpus,
    validation: Corpus,
    out: Path | None,
    progress: Callable[[EpochRecord], None] | None,
) -> None:
    settings = model.config.training
    rows = np.flatnonzero(_labelled(training))
    while not state.finished():
        start = time.perf_counter()
        # Seeded by the epoch, not carried over from the last one, so that a resumed training draws the same.
        torch.manual_seed(settings.seed * 1_000_003 + state.epoch)
        order = rows[torch.randperm(len(rows)).numpy()]
        train_loss = _train_epoch(state, model, training, order)
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


def _train_epoch(state: _State, model: M3ERFusion, corpus: Corpus, order: NDArray[np.int64]) -> float:
    settings = model.config.training
    model.train()
    total = 0.0
    for rows, features, lengths, available in _batches(corpus, order, settings.batch_size):
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
    order = np.flatnonzero(_labelled(corpus))
    model.eval()
    total = 0.0
    for rows, features, lengths, available in _batches(corpus, order, 512):
        total += model.loss(model(features, lengths, available), _target(corpus, rows)).item() * len(rows)
    return total / len(order)


def _batches(
    corpus: Corpus, order: NDArray[np.int64], size: int
) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor], Tensor, Tensor]]:
    """Rows, features cut to the longest of the batch, lengths and available."""
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        lengths = corpus.lengths[rows]
        steps = max(int(lengths.max()), 1)
        features = {name: torch.from_numpy(values[rows, :steps]) for name, values in corpus.features.items()}
        yield rows, features, torch.from_numpy(lengths), torch.from_numpy(corpus.available[rows])


def _labels(corpus: Corpus) -> NDArray[Any]:
    if corpus.target is None:
        raise ValueError("the corpus has no labels")
    return corpus.target


def _target(corpus: Corpus, rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(_labels(corpus)[rows])


def _labelled(corpus: Corpus) -> NDArray[np.bool_]:
    """(N,) whether an utterance has a label."""
    target = _labels(corpus)
    return target != NO_LABEL if corpus.task == "single" else np.ones(len(target), dtype=bool)


def _check_task(corpus: Corpus, config: M3ERConfig) -> None:
    _labels(corpus)
    if corpus.task == "multi" and config.loss.activation != "sigmoid":
        raise ValueError(
            f"the corpus asks {len(corpus.classes)} yes/no questions: loss.activation must be 'sigmoid', "
            f"got {config.loss.activation!r}"
        )


def _fingerprint(corpus: Corpus, config: M3ERConfig, statistics: ModelStatistics | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([config.to_dict(), corpus.input_dims, corpus.classes, corpus.task]).encode())
    digest.update("\n".join(corpus.ids).encode())
    digest.update("\n".join([] if corpus.split is None else corpus.split).encode())
    for values in (*corpus.features.values(), corpus.lengths, corpus.available, _labels(corpus)):
        digest.update(np.ascontiguousarray(values).data)
    if statistics is not None:
        digest.update(statistics.digest.encode())
    return digest.hexdigest()


def _check_fingerprint(found: str, wanted: str, out: Path) -> None:
    if found != wanted:
        raise ResumeMismatchError(
            f"{out} holds a training with another corpus or configuration, or other statistics: "
            "give another folder, or begin anew"
        )


def _finished(out: Path, fingerprint: str) -> TrainingResult:
    with _resuming(out / HISTORY_FILE):
        history = json.loads((out / HISTORY_FILE).read_text())
        _check_fingerprint(history["fingerprint"], fingerprint, out)
        best_epoch = history["best_epoch"]
    return TrainingResult(M3ERFusion.from_pretrained(out), history, best_epoch)


@contextmanager
def _resuming(path: Path) -> Iterator[None]:
    """Name the file that a training cannot be resumed from."""
    try:
        yield
    except (ResumeMismatchError, OSError):
        raise
    except Exception as error:  # whatever a damaged file makes the parsers of JSON and torch say
        raise ResumeMismatchError(
            f"{path} is damaged, or no training wrote it ({type(error).__name__}): give another folder, or begin anew"
        ) from error


def _save(
    model: M3ERFusion,
    out: Path,
    training: Corpus,
    validation: Corpus,
    history: dict[str, Any],
    statistics: ModelStatistics | None,
) -> None:
    """Save the model with a card that tells what it was trained on and how it did on the validation split."""
    (out / "README.md").unlink(missing_ok=True)  # save_pretrained keeps the card of an earlier training
    best = history["best_epoch"]
    data = (
        f"{len(training)} utterances of at most {training.steps} frames; {len(validation)} others were held out to "
        f"choose the epoch. Best epoch: {best} of {len(history['valid_loss'])}, with a validation loss of "
        f"{history['valid_loss'][best - 1]:.4f}."
    )
    if statistics is not None:
        data += f" Standardiser, modality check and proxies were fitted to {statistics.rows} utterances by themselves."
    report = evaluate(model, validation).report
    metrics = (
        None
        if report is None
        else (
            "On the validation split, which chose the epoch and so flatters; modality check and proxies at work:\n\n"
            f"{report.to_markdown()}"
        )
    )
    model.save_pretrained(out, model_card_kwargs={"data": data, "metrics": metrics})


def _write_plot(history: dict[str, Any], path: Path) -> None:
    try:
        from m3er_fast.plots import plot_history
    except ImportError:  # the picture is an extra; history.json holds the same
        return
    plot_history(history, path)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
