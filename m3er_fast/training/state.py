"""The state of a training run and its checkpoint file: everything needed to resume after an interruption."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3er_fast.atomic_files import replacing
from m3er_fast.fusion import M3ERFusion
from m3er_fast.training.fingerprint import ResumeMismatchError, check_fingerprint
from m3er_fast.training.workers import Workers

CHECKPOINT_FILE = "checkpoint.pt"


@dataclass(frozen=True)
class EpochPosition:
    """What an interrupted epoch has done."""

    batches: int = 0
    loss: float = 0.0  # sum over its utterances
    rows: int = 0  # utterances
    random: Tensor | None = None  # states of torch's generators: of the CPU, and of the GPU that trains
    device_random: Tensor | None = None

    @classmethod
    def now(cls, batches: int, loss: float, rows: int, device: torch.device) -> EpochPosition:
        """Return this moment's position."""
        on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(batches, loss, rows, torch.get_rng_state(), on_gpu)

    def restore_random(self, device: torch.device) -> None:
        """Let torch draw the numbers that come next; at the start of an epoch they follow from its seed."""
        if self.random is not None:
            torch.set_rng_state(self.random)
        if self.device_random is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.device_random, device)


class TrainingState:
    """Model, optimizer, best weights and losses of a training run.

    Args:
        model: the model in training, on the device that trains.
        fingerprint: identifies the run; see `fingerprint.run_fingerprint`.
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
        self.position = EpochPosition()  # in the epoch that comes after those that are done

    @property
    def device(self) -> torch.device:
        """The device that trains."""
        return self.model.standardizer.count.device

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
        self.position = EpochPosition()
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
            "position": vars(self.position),
            "fingerprint": self.fingerprint,
        }
        # Through memory: torch's own writer hides the error of the file system.
        buffer = io.BytesIO()
        torch.save(values, buffer)
        with replacing(path) as partial:
            partial.write_bytes(buffer.getbuffer())

    def load(self, path: Path | None, workers: Workers) -> bool:
        """Continue from a checkpoint, if the first process has one, and return whether it has.

        Raises:
            ResumeMismatchError: if it belongs to another run or is damaged.
        """
        values = workers.from_first(lambda: None if path is None or not path.exists() else self._read(path))
        if values is None:
            return False
        with resuming_from(path or Path(CHECKPOINT_FILE)):
            self.model.network.load_state_dict(values["network"])
            self.optimizer.load_state_dict(values["optimizer"])
            self.best, self.best_epoch = values["best"], values["best_epoch"]
            self.train_loss, self.valid_loss = values["train_loss"], values["valid_loss"]
            self.position = EpochPosition(**values["position"])
        return True

    def _read(self, path: Path) -> dict[str, Any]:
        with resuming_from(path):
            # Loading copies to the model's device what belongs there; AdamW's count of steps stays where no one waits.
            values: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            check_fingerprint(values["fingerprint"], self.fingerprint, path.parent, len(values["train_loss"]))
        return values


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
