"""Callbacks of ``train(progress=...)`` that write every epoch for other programs.

Each writes an epoch once, also where a training was interrupted, goes on, or begins anew.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from m3er_fast.atomic_files import replacing
from m3er_fast.training.loop import EpochRecord

_FIELDS = ("epoch", "train_loss", "valid_loss", "best", "seconds")


class CsvLog:
    """A CSV file with a line for each epoch: ``epoch``, ``train_loss``, ``valid_loss``, ``best`` (0 or 1), ``seconds``.

    Args:
        path: the file; its lines before the first epoch that is written are kept, the others replaced.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, record: EpochRecord) -> None:
        """Write an epoch."""
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < record.epoch]
        rows.append({name: getattr(record, name) for name in _FIELDS} | {"best": int(record.best)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _FIELDS)
            writer.writeheader()
            writer.writerows(rows)


class TensorBoardLog:
    """Events for TensorBoard: ``loss/train``, ``loss/valid`` and ``seconds`` of each epoch.

    Args:
        folder: the folder of the events.

    Raises:
        ImportError: if tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils import tensorboard
        except ImportError as error:
            raise ImportError("writing events needs tensorboard: pip install 'm3er-fast[log]'") from error
        self.folder = Path(folder)
        self._make: Any = tensorboard.SummaryWriter
        self._writer: Any = None

    def __call__(self, record: EpochRecord) -> None:
        """Write an epoch."""
        if self._writer is None:  # TensorBoard then hides what an earlier run wrote of this epoch and later ones
            self._writer = self._make(str(self.folder), purge_step=record.epoch)
        self._writer.add_scalar("loss/train", record.train_loss, record.epoch)
        self._writer.add_scalar("loss/valid", record.valid_loss, record.epoch)
        self._writer.add_scalar("seconds", record.seconds, record.epoch)
        self._writer.flush()
