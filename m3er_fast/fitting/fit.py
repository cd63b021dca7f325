"""Fitting at scale: the standardiser, check and proxies of a corpus that need not fit into memory.

They are fitted in two passes over the shards (:mod:`m3er_fast.fitting.passes`). The result is that of
:meth:`m3er_fast.M3ERFusion.fit` for the whole corpus at once, except for the order in which float64 sums are added up.
The bank "basis" is the exception: its rows are chosen by a tournament with other rounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from m3er_fast.config import M3ERConfig, ProxyConfig
from m3er_fast.execution.engine import Engine, check_engine
from m3er_fast.execution.ray_pool import ray_map, ray_session
from m3er_fast.fitting.passes import CountPass, LearnedPart, LearnPass, number_groups
from m3er_fast.fitting.statistics import ModelStatistics
from m3er_fast.fitting.training_rows import TrainingReader, make_reader
from m3er_fast.shards.plan import Plan, Source, plan_shards
from m3er_fast.standardize import Standardizer

MOST_GROUPS = 256
"""Groups that shards are read and merged in. It is independent of the number of workers, since the last bits of sums
depend on it."""

LARGE_BANK_BYTES = 2**30
"""Size above which a bank of unlimited size causes a warning."""


class FitProgress(NamedTuple):
    """The progress of :func:`fit_statistics`."""

    done: int  # groups of shards, counted over both passes
    groups: int  # of both passes
    rows: int  # utterances read so far by both passes


def fit_statistics(
    corpus: Source,
    config: M3ERConfig | None = None,
    *,
    input_dims: Mapping[str, int] | None = None,
    engine: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    progress: Callable[[FitProgress], None] | None = None,
) -> ModelStatistics:
    """Fit the standardiser, modality check and proxies to a corpus, shard by shard.

    If the corpus has splits, its training split is read, otherwise all of it; labels are ignored. Keep the utterances
    of a recording together: calibration depends on their order. A shard that cannot be read is left out and listed. A
    row that cannot be read is left out and counted.

    Args:
        corpus: a folder of Parquet or Arrow IPC files, or one file: a local path, a URI, or a pair of a
            ``pyarrow.fs.FileSystem`` and a path.
        config: its ``check`` and ``proxy`` are used; None is the defaults. With ``proxy.bank="neighbours"`` memory
            grows with the bank, which ``proxy.max_bank`` limits.
        input_dims: feature count of each modality, in order; None reads them from the corpus.
        engine: "local" (this process) or "ray". The result is the same.
        address: of a Ray cluster; None starts Ray on this machine.
        workers: number of Ray workers; None uses as many as there is room for.
        progress: called after every group of shards.

    Raises:
        CorpusError: there is no corpus, none of its shards can be read, only some shards have splits, or the corpus
            changed while it was read.
        ValueError: an argument is out of range, or the corpus has no training utterance.
        ImportError: engine is "ray", and Ray is missing.
        RuntimeError: Ray workers were lost repeatedly.
    """
    check_engine(engine, address, workers)
    if config is None:
        config = M3ERConfig()
    plan = plan_shards(corpus)
    reader = make_reader(plan, input_dims)
    with _map_in(engine, address, workers) as map_tasks:
        return _fit(plan, reader, config, map_tasks, progress)


def _fit(
    plan: Plan,
    reader: TrainingReader,
    config: M3ERConfig,
    map_tasks: Callable[..., Iterable[Any]],
    progress: Callable[[FitProgress], None] | None,
) -> ModelStatistics:
    """Run both passes; ``map_tasks`` calls a function with every task and yields the results in order."""
    size = -(-len(plan.shards) // MOST_GROUPS)
    groups = [plan.shards[start : start + size] for start in range(0, len(plan.shards), size)]
    needs_second_pass = config.check is not None or config.proxy is not None
    report = _ProgressReporter(progress, len(groups) * (2 if needs_second_pass else 1))

    standardizer, counted = Standardizer(reader.input_dims), []
    for part in map_tasks(CountPass(reader), groups):
        standardizer.merge(part.standardizer)
        counted.append(part)
        report(part.rows)
    rows, frames = sum(part.rows for part in counted), sum(part.frames for part in counted)
    quarantined = tuple(entry for part in counted for entry in part.quarantined)
    if not rows:
        why = f"; {quarantined[0].reason}" if quarantined else ""
        raise ValueError(f"{plan.corpus}: no {'training ' if reader.has_splits else ''}utterance to fit to{why}")
    _warn_of_large_bank(config.proxy, frames, reader.input_dims)

    learn, learned = LearnPass(reader, standardizer, config.check, config.proxy, rows, frames), LearnedPart()
    for found in map_tasks(learn, number_groups(counted)) if needs_second_pass else ():
        learned = learned.merge(found)
        report(found.rows)
    return ModelStatistics(
        input_dims=reader.input_dims,
        check=config.check,
        proxy=config.proxy,
        state=learn.state(learned),
        rows=rows,
        frames=frames,
        errors=sum(part.errors for part in counted),
        quarantined=quarantined,
    )


def _warn_of_large_bank(proxy: ProxyConfig | None, frames: int, input_dims: Mapping[str, int]) -> None:
    if proxy is None or proxy.bank != "neighbours" or proxy.max_bank is not None:
        return
    size = 4 * frames * sum(input_dims.values())
    if size > LARGE_BANK_BYTES:
        warnings.warn(
            f"the bank will hold all {frames} frames, {size / 2**30:.1f} GiB: set proxy.max_bank to limit it",
            stacklevel=4,
        )


class _ProgressReporter:
    """Counts groups of shards and utterances, and calls ``progress``."""

    def __init__(self, progress: Callable[[FitProgress], None] | None, groups: int) -> None:
        self._progress, self._groups = progress, groups
        self._done = self._rows = 0

    def __call__(self, rows: int) -> None:
        self._done, self._rows = self._done + 1, self._rows + rows
        if self._progress is not None:
            self._progress(FitProgress(self._done, self._groups, self._rows))


@contextmanager
def _map_in(engine: Engine, address: str | None, workers: int | None) -> Iterator[Callable[..., Iterable[Any]]]:
    """Give a map that calls a function with every task in an engine, and yields the results in order."""
    if engine == "local":
        yield map
        return
    with ray_session(address, workers):
        yield partial(ray_map, workers=workers)
