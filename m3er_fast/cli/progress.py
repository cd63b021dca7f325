"""The progress of a command on stderr: a bar on a terminal, an occasional log line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LOG_SECONDS = 10.0


class ProgressDisplay:
    """The progress display of one command; a context manager.

    Args:
        label: name of the command, such as "score".
        unit: name of the units that are counted, such as "shards".
        log_seconds: minimum time between two log lines, and before the first.
    """

    def __init__(self, label: str, unit: str = "steps", *, log_seconds: float = _LOG_SECONDS) -> None:
        self.label = label
        self.unit = unit
        self.log_seconds = log_seconds
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._note = ""

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        # rich's own test would take FORCE_COLOR for a terminal.
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self.label, total=None, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, note: str | None = None, *, seconds_left: float | None = None) -> None:
        """Show that ``done`` of ``total`` units are done.

        Args:
            done: number of finished units.
            total: number of all units.
            note: text to show beside the numbers; None keeps the last one.
            seconds_left: estimated remaining time; None estimates it from the numbers, as if units took equal times.
        """
        if note is not None:
            self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=self._note)
            return
        elapsed = time.monotonic() - self._start
        left = elapsed * (total - done) / done if seconds_left is None and done else seconds_left
        parts = [f"{done} of {total} {self.unit}", "" if left is None else f"{left:.0f} s left", self._note]
        self._log(", ".join(part for part in parts if part))

    def say(self, message: str) -> None:
        """Show what the command is doing."""
        self._note = message
        if self._bar is not None:
            self._bar.update(self._task, note=message)
        else:
            self._log(message)

    def note(self, message: str) -> None:
        """Show a line that stays."""
        if self._bar is not None:
            self._bar.console.print(f"{self.label}: {message}", markup=False, highlight=False)
        else:
            print(f"{self.label}: {message}", file=sys.stderr, flush=True)

    def _log(self, message: str) -> None:
        now = time.monotonic()
        if now - self._last_line >= self.log_seconds:
            self._last_line = now
            print(f"{self.label}: {message}", file=sys.stderr, flush=True)
