"""The state of a training run and its checkpoint file: everything needed to resume after an interruption."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3er_fast.atomic_files import replacing
from m3er_fast.config import M3ERConfig
from m3er_fast.corpus.base import Corpus
from m3er_fast.evaluation import labels_of
from m3er_fast.fitting.statistics import ModelStatistics
from m3er_fast.fusion import M3ERFusion


class ResumeMismatchError(RuntimeError):
    """A run folder holds a training that was begun with another corpus or configuration, or is damaged."""


class TrainingState:
    """Model, optimizer, best weights and losses of a training run.

    Args:
        model: the model in training.
        fingerprint: identifies the run; see `run_fingerprint`.
    """

    def __init__(self, model: M3ERFusion, fingerprint: dict[str, Any]) -> None:
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
        """Number of epochs that are done."""
        return len(self.train_loss)

    def finished(self) -> bool:
        """Return whether all epochs are done, or patience is exhausted."""
        settings = self.model.config.training
        waited = self.epoch - self.best_epoch
        return self.epoch >= settings.epochs or (settings.patience is not None and waited >= settings.patience)

    def record(self, train_loss: float, valid_loss: float) -> bool:
        """Record the losses of an epoch, and return whether it is the best so far."""
        best = not self.valid_loss or valid_loss < min(self.valid_loss)
        self.train_loss.append(train_loss)
        self.valid_loss.append(valid_loss)
        if best:
            self.best, self.best_epoch = _copy(self.model.network.state_dict()), self.epoch
        return best

    def history(self) -> dict[str, Any]:
        """Return the content of ``history.json``."""
        return {
            "train_loss": self.train_loss,
            "valid_loss": self.valid_loss,
            "best_epoch": self.best_epoch,
            "config": self.model.config.to_dict(),
            "fingerprint": self.fingerprint,
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint, which replaces the last one once it is on the disk."""
        values = {
            "network": self.model.network.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "optimizer": self.optimizer.state_dict(),
            "train_loss": self.train_loss,
            "valid_loss": self.valid_loss,
            "fingerprint": self.fingerprint,
        }
        # Through memory: torch's own writer hides the error of the file system.
        buffer = io.BytesIO()
        torch.save(values, buffer)
        with replacing(path) as partial:
            partial.write_bytes(buffer.getbuffer())

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ResumeMismatchError: if it belongs to another run or is damaged.
        """
        with resuming_from(path):
            values = torch.load(path, weights_only=True)
            check_fingerprint(values["fingerprint"], self.fingerprint, path.parent)
            self.model.network.load_state_dict(values["network"])
            self.optimizer.load_state_dict(values["optimizer"])
            self.best, self.best_epoch = values["best"], values["best_epoch"]
            self.train_loss, self.valid_loss = values["train_loss"], values["valid_loss"]


def run_fingerprint(corpus: Corpus, config: M3ERConfig, statistics: ModelStatistics | None) -> dict[str, Any]:
    """Return everything that decides the result of a training run, by name: settings as they are, data as digests."""
    features = {f"features of {name}": _digest(np.ascontiguousarray(x).data) for name, x in corpus.features.items()}
    return {
        **_flat(config.to_dict()),
        "modalities": [f"{name} ({dim})" for name, dim in corpus.input_dims.items()],
        "classes": list(corpus.classes),
        "task": corpus.task,
        "utterances": _digest("\n".join(corpus.ids).encode()),
        "splits": _digest("\n".join([] if corpus.split is None else corpus.split).encode()),
        **features,
        "lengths": _digest(np.ascontiguousarray(corpus.lengths).data),
        "availability": _digest(np.ascontiguousarray(corpus.available).data),
        "labels": _digest(np.ascontiguousarray(labels_of(corpus)).data),
        "statistics": None if statistics is None else statistics.digest,
    }


def check_fingerprint(found: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    """Raise a ResumeMismatchError that names the differences unless the run in ``out`` is the one asked for."""
    if found == wanted:
        return
    if not isinstance(found, dict):
        raise TypeError("a fingerprint is a dict")  # of an earlier version; resuming_from says so
    differing = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    # A part that only one of them has differs as a whole.
    differing = [name for name in differing if name.rpartition(".")[0] not in differing]
    differences = [
        f"other {name}" if _is_data(name) else f"{name} = {found.get(name)}, now {wanted.get(name)}"
        for name in differing
    ]
    more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
    raise ResumeMismatchError(
        f"{out} holds a training that differs: {'; '.join(differences[:5])}{more}. Give another folder, or begin anew "
        "(--no-resume)"
    )


def _is_data(name: str) -> bool:
    """Whether a part of a fingerprint is a digest, which says nothing to a reader."""
    return name.startswith("features of ") or name in {
        *("utterances", "splits", "lengths", "availability", "labels", "statistics"),
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{prefix}{name}": "given", **_flat(value, f"{prefix}{name}.")}
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextmanager
def resuming_from(path: Path) -> Iterator[None]:
    """Turn any error of reading a damaged file into a ResumeMismatchError that names the file."""
    try:
        yield
    except (ResumeMismatchError, OSError):
        raise
    except Exception as error:  # the parsers of JSON and torch raise anything when a file is damaged
        raise ResumeMismatchError(
            f"{path} is damaged, or no training of this version wrote it ({type(error).__name__}): "
            "give another folder, or begin anew (--no-resume)"
        ) from error


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
