"""The results of ``m3er-fast bench`` on stdout: growing tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from m3er_fast.cli.bench import COLUMNS, BenchmarkResult
from m3er_fast.cli.progress import ProgressDisplay
from m3er_fast.cli.tables import is_terminal


class BenchmarkDisplay(ABC):
    """The display of a run: its results, group by group, and its progress; a context manager."""

    @staticmethod
    def for_stdout() -> BenchmarkDisplay:
        """Return tables if stdout is a terminal, else lines."""
        return _Tables() if is_terminal() else _Lines()

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def add(self, result: BenchmarkResult) -> None:
        """Show a result."""

    @abstractmethod
    def update(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` results are measured or left out."""


class _Tables(BenchmarkDisplay):
    """A table of the group being measured, which grows above a progress bar; tables of finished groups stay.

    It is drawn only between measurements: a drawing thread would be measured as well.
    """

    def __init__(self) -> None:
        self._group = ""
        self._table: Table | None = None
        self._bar = Progress(TextColumn("bench"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._task = self._bar.add_task("bench", total=None)
        self._live = Live(console=Console(), auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish_table()
        self._live.stop()

    def add(self, result: BenchmarkResult) -> None:
        if self._table is None or result.group != self._group:
            self._finish_table()
            self._group = result.group
            self._table = Table(title=Text(result.group), title_justify="left")
            self._table.add_column()
            for column in COLUMNS:
                self._table.add_column(column, justify="right")
        self._table.add_row(Text(result.contestant), *map(Text, result.cells))
        self._draw()

    def update(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        self._draw()

    def _draw(self) -> None:
        parts = [self._bar] if self._table is None else [self._table, self._bar]
        self._live.update(Group(*parts), refresh=True)

    def _finish_table(self) -> None:
        """Print the table once and for all, above the part that is redrawn."""
        if self._table is not None:
            table, self._table = self._table, None
            self._draw()
            self._live.console.print(table)


class _Lines(BenchmarkDisplay):
    """One line per result on stdout, and progress on stderr."""

    def __init__(self) -> None:
        self._group = ""
        self._progress = ProgressDisplay("bench", "results")

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def add(self, result: BenchmarkResult) -> None:
        if result.group != self._group:
            self._group = result.group
            print(f"\n{result.group}\n  {'':34}" + "".join(f"{column:>16}" for column in COLUMNS))
        print(f"  {result.contestant:34}" + "".join(f"{cell:>16}" for cell in result.cells), flush=True)

    def update(self, done: int, total: int) -> None:
        self._progress.update(done, total)
