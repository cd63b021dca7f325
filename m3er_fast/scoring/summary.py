"""The summary of a run, counted from its folder of scores: what somebody looks at first the morning after.

``summary.json``, and ``summary.html``, a page of the same that needs nothing beside it, are written when every shard is
scored or in quarantine. All but the key ``run`` depends on the model and the corpus alone, so that a run that was
interrupted and resumed has the summary of one that was not.

Scores are read back some rows at a time, and their page checksums verified. Of groups the first 10,000 are counted by
name and all others together, so that memory is bounded whatever the corpus.

Dimension legend: N rows, M modalities, C classes, K = 3 + M columns of counts, G groups.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3er_fast.corpus.base import CorpusError
from m3er_fast.scoring.shard import ScoringJob
from m3er_fast.scoring.summary_page import render
from m3er_fast.shards.plan import QuarantinedShard, Shard
from m3er_fast.shards.reader import read_groups

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 2**16  # read at a time
_THREADS = 4
_MOST_SHARDS = 32  # that are counted in one go, of many
_MOST_GROUPS = 10_000
_MOST_NAME = 200  # characters of a group's name
_MOST_PROBLEMS, _MOST_MESSAGE = 20, 500  # are listed; characters of each
_MOST_PARTS, _LEAST_ROWS = 100, 50  # that the corpus is divided into; rows of each, or else its shares say little
_CONFIDENCE_BINS = 10

# Columns of counts; one a modality follows, of rows in which it was ineffectual.
_COLUMNS = ("rows", "scored", "abstained")
_SCORED, _ABSTAINED, _INEFFECTUAL = 1, 2, 3

Counts = NDArray[np.int64]
MapFunction = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Calls a function with every task, and yields the results in the order of the tasks."""


class RunRecord(NamedTuple):
    """What differs between runs that leave the same scores."""

    engine: str
    rows: int  # utterances that this run scored, not an earlier one
    seconds: float  # from the call to the last shard
    resumed: int  # shards that an earlier run had finished
    finished: str  # date and time, UTC


def map_in_threads(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
    """Call a function with every task in a few threads, and yield the results in the order of the tasks."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > 2 * _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def write_summary(
    job: ScoringJob,
    rows: Mapping[str, int],
    quarantined: Sequence[QuarantinedShard],
    run: RunRecord,
    map_tasks: MapFunction = map_in_threads,
) -> None:
    """Count a folder of scores whose shards are all there, and write ``summary.json`` and ``summary.html`` to it.

    Args:
        job: the run's.
        rows: of every shard that has scores.
        quarantined: the other shards, in the order of the corpus.
        run: told as it is, with its rate.
        map_tasks: what counts shards; the result does not depend on it.

    Raises:
        CorpusError: scores cannot be read back.
        OSError: the summary cannot be written.
    """
    summary = summarize(job, rows, quarantined, map_tasks)
    summary["run"] = {**run._asdict(), "rows_per_second": _share(run.rows, run.seconds)}
    job.output.write_summary(summary, render(summary))


def summarize(
    job: ScoringJob,
    rows: Mapping[str, int],
    quarantined: Sequence[QuarantinedShard],
    map_tasks: MapFunction = map_in_threads,
) -> dict[str, Any]:
    """Return what ``summary.json`` holds, as docs/scoring.md lists it, without ``run``.

    Arguments are those of :func:`write_summary`.

    Raises:
        CorpusError: scores cannot be read back.
    """
    from m3er_fast import __version__

    shards = [shard for shard in job.plan.shards if shard.name in rows]
    starts = np.cumsum([0, *(rows[shard.name] for shard in shards)])
    edges = _part_edges(int(starts[-1]))
    names, found = _count_shards(job, shards, starts, edges, map_tasks)
    scored = found.total[_SCORED]
    order = {shard.name: index for index, shard in enumerate(job.plan.shards)}
    return {
        "version": __version__,
        "signature": job.output.signature,
        "utterances": {
            "rows": int(starts[-1]),
            "scored": int(scored),
            "errors": int(starts[-1] - scored),
            "abstained": int(found.total[_ABSTAINED]),
        },
        "shards": {"corpus": len(order), "scored": len(shards), "quarantined": len(quarantined)},
        "classes": [
            {
                "name": name,
                "predictions": found.predictions[name],
                "share": _share(found.predictions[name], scored),
                "mean_probability": _share(found.probability[c], scored),
            }
            for c, name in enumerate(names.classes)
        ],
        "confidence": {"mean": _share(found.confidence, scored), "histogram": found.histogram.tolist()},
        "modalities": [
            {
                "name": name,
                "ineffectual": int(found.total[_INEFFECTUAL + m]),
                "share": _share(found.total[_INEFFECTUAL + m], scored),
                "p_value_0": int(found.p_value_0[m]),
            }
            for m, name in enumerate(names.modalities)
        ],
        "order": [
            {**_place(shards, starts, int(edge)), **_counts(names, counts)}
            for edge, counts in zip(edges[:-1], found.order, strict=True)
        ],
        "groups": _groups(names, found),
        "quarantine": [entry._asdict() for entry in quarantined],
        "errors": [entry._asdict() for entry in found.errors],
    }


def _place(shards: Sequence[Shard], starts: Counts, row: int) -> dict[str, Any]:
    """Where a row of the whole corpus stands."""
    index = int(np.searchsorted(starts, row, side="right")) - 1
    return {"shard": shards[index].name, "row": row - int(starts[index])}


def _counts(names: _Names, counts: Counts) -> dict[str, Any]:
    values = counts.tolist()
    return {
        **dict(zip(_COLUMNS, values, strict=False)),
        "ineffectual": dict(zip(names.modalities, values[_INEFFECTUAL:], strict=True)),
    }


def _groups(names: _Names, found: _Found) -> dict[str, Any] | None:
    """Counts by group, or None where no shard has any."""
    if not found.groups and not found.unread_groups:
        return None
    others = found.groups.get(None)
    return {
        "named": [
            {"name": name, **_counts(names, counts)} for name, counts in found.groups.items() if name is not None
        ],
        "others": None if others is None else _counts(names, others),
        "rows_without": int(found.total[0]) - sum(int(counts[0]) for counts in found.groups.values()),
        "unreadable": [entry._asdict() for entry in found.unread_groups],
    }


def _share(part: float, whole: float) -> float | None:
    share = float(part / whole) if whole else math.nan
    return share if math.isfinite(share) else None


def _part_edges(rows: int) -> Counts:
    """(parts + 1,) first row of each part that the corpus is divided into, and the number of rows."""
    parts = min(max(rows // _LEAST_ROWS, 1), _MOST_PARTS) if rows else 0
    return np.arange(parts + 1) * rows // max(parts, 1)


class _Names(NamedTuple):
    """Classes and modalities, as the columns of scores name them."""

    classes: list[str]
    modalities: list[str]

    @classmethod
    def of(cls, schema: pa.Schema) -> _Names:
        """Take the columns by their order: by their names, a class cannot be told from a p-value."""
        first = next(index for index, name in enumerate(schema.names) if name.startswith("effective_"))
        modalities = (len(schema.names) - first - 2) // 3
        return cls(
            [name.removeprefix("p_") for name in schema.names[2:first]],
            [name.removeprefix("effective_") for name in schema.names[first : first + modalities]],
        )


class _RowError(NamedTuple):
    shard: str
    row: int  # of the shard, from 0
    error: str


@dataclass
class _Found:
    """What was counted in some shards."""

    total: Counts  # (K,)
    order: Counts  # (parts, K)
    p_value_0: Counts  # (M,)
    probability: NDArray[np.float64]  # (C,), sums
    histogram: Counts  # of confidences
    confidence: float = 0.0  # a sum
    predictions: Counter[str] = field(default_factory=Counter)
    groups: dict[str | None, Counts] = field(default_factory=dict)  # (K,) each; None: those there was no place for
    errors: list[_RowError] = field(default_factory=list)
    unread_groups: list[QuarantinedShard] = field(default_factory=list)

    @classmethod
    def nothing(cls, names: _Names, edges: Counts) -> _Found:
        columns = _INEFFECTUAL + len(names.modalities)
        return cls(
            total=np.zeros(columns, np.int64),
            order=np.zeros((len(edges) - 1, columns), np.int64),
            p_value_0=np.zeros(len(names.modalities), np.int64),
            probability=np.zeros(len(names.classes)),
            histogram=np.zeros(_CONFIDENCE_BINS, np.int64),
        )

    def add(self, later: _Found) -> None:
        """Add what was counted in the shards that follow."""
        self.total += later.total
        self.order += later.order
        self.p_value_0 += later.p_value_0
        self.probability += later.probability
        self.histogram += later.histogram
        self.confidence += later.confidence
        self.predictions += later.predictions
        for name, counts in later.groups.items():
            key = name if name in self.groups or len(self.groups) < _MOST_GROUPS else None
            self.groups[key] = self.groups[key] + counts if key in self.groups else counts
        self.errors = (self.errors + later.errors)[:_MOST_PROBLEMS]
        self.unread_groups = (self.unread_groups + later.unread_groups)[:_MOST_PROBLEMS]


def _count_shards(
    job: ScoringJob, shards: Sequence[Shard], starts: Counts, edges: Counts, map_tasks: MapFunction
) -> tuple[_Names, _Found]:
    size = min(max(len(shards) // 64, 1), _MOST_SHARDS)
    placed = [(shard, int(start)) for shard, start in zip(shards, starts[:-1], strict=True)]
    tasks = [placed[first : first + size] for first in range(0, len(placed), size)]
    names = _Names([], [])
    found = _Found.nothing(names, edges)
    # Added in order: rounding, and which groups are the first, must not depend on who was faster.
    results = map_tasks(_CountSome(job.without_shards(), edges), tasks)
    with closing(results):  # type: ignore[type-var]
        for its_names, its in results:
            if not names.classes:
                names, found = its_names, its
            else:
                found.add(its)
    return names, found


@dataclass(frozen=True)
class _CountSome:
    """Counts some shards that follow each other. It can be pickled."""

    job: ScoringJob
    edges: Counts

    def __call__(self, placed: Sequence[tuple[Shard, int]]) -> tuple[_Names, _Found]:
        counted = (_count_shard(self.job, shard, start, self.edges) for shard, start in placed)
        names, found = next(counted)
        for _, later in counted:
            found.add(later)
        return names, found


def _count_shard(job: ScoringJob, shard: Shard, start: int, edges: Counts) -> tuple[_Names, _Found]:
    """Count the scores of one shard, whose first row is the corpus's row ``start``."""
    import pyarrow as pa
    from pyarrow import parquet

    path = job.output.location.join(shard.output_name)
    try:
        with (
            job.output.location.filesystem.open_input_file(path) as source,
            parquet.ParquetFile(
                source, read_dictionary=["prediction"], pre_buffer=False, page_checksum_verification=True
            ) as file,
            closing(_Groups(job, shard)) as groups,
        ):
            names = _Names.of(file.schema_arrow)
            found = _Found.nothing(names, edges)
            row = 0
            wanted = [name for name in file.schema_arrow.names if name != "id" and not name.startswith("reliability_")]
            for batch in file.iter_batches(_ROWS, columns=wanted, use_threads=False):
                counts = _count_rows(found, names, batch)
                for error in np.flatnonzero(counts[_SCORED] == 0)[: _MOST_PROBLEMS - len(found.errors)]:
                    message = batch["error"][int(error)].as_py()
                    found.errors.append(_RowError(shard.name, row + int(error), message[:_MOST_MESSAGE]))
                _add_to_parts(found.order, edges, start + row, counts)
                groups.add(counts)
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path}: scores cannot be read back: {' '.join(str(error).split())}; if it stays so, delete the file and "
            "resume"
        ) from error
    found.groups = groups.counted()
    found.unread_groups = groups.problems
    return names, found


def _count_rows(found: _Found, names: _Names, batch: pa.RecordBatch) -> Counts:
    """Return counts (K, N) of each row, and add them, and what is summed over rows alone, to what was found."""
    import pyarrow.compute as pc

    counts = np.ones((len(found.total), batch.num_rows), np.int64)
    counts[_SCORED] = batch["error"].is_null().to_numpy(zero_copy_only=False)
    counts[_ABSTAINED] = batch["abstained"].fill_null(False).to_numpy(zero_copy_only=False)
    for m, name in enumerate(names.modalities):
        counts[_INEFFECTUAL + m] = ~batch[f"effective_{name}"].fill_null(True).to_numpy(zero_copy_only=False)
        found.p_value_0[m] += np.count_nonzero(batch[f"p_value_{name}"].to_numpy(zero_copy_only=False) == 0)
    found.total += counts.sum(axis=1)
    scored = counts[_SCORED] == 1
    probability = np.stack([batch[f"p_{name}"].to_numpy(zero_copy_only=False)[scored] for name in names.classes])
    confidence = probability.max(axis=0)
    found.probability += probability.sum(axis=1, dtype=np.float64)
    found.confidence += float(confidence.sum(dtype=np.float64))
    found.histogram += np.histogram(confidence.clip(max=1), _CONFIDENCE_BINS, (0, 1))[0]
    for entry in pc.value_counts(batch["prediction"].drop_null()).to_pylist():
        found.predictions[entry["values"]] += entry["counts"]
    return counts


def _add_to_parts(order: Counts, edges: Counts, start: int, counts: Counts) -> None:
    """Add the counts of consecutive rows, of which the first is row ``start``, to the parts that they are in."""
    rows = counts.shape[1]
    if not rows:
        return
    first, last = np.searchsorted(edges, [start, start + rows - 1], side="right") - 1
    offsets = np.maximum(edges[first : last + 1] - start, 0)
    order[first : last + 1] += np.add.reduceat(counts, offsets, axis=1).T


class _Groups:
    """Counts by the groups that a shard of the corpus tells, read beside its scores."""

    def __init__(self, job: ScoringJob, shard: Shard) -> None:
        self._shard = shard
        self._columns = read_groups(job.plan.corpus, shard, verify=job.verify)
        self._waiting = np.zeros(0, np.int64)
        self._numbers: dict[str | None, int] = {}  # None: all that there is no place for
        self._counts: Counts | None = None  # (G, K)
        self._is_read = True
        self.problems: list[QuarantinedShard] = []

    def add(self, counts: Counts) -> None:
        """Add the counts of the next rows to their groups. Without groups, or if they cannot be read, to none."""
        if not self._is_read:
            return
        try:
            numbers = self._take(counts.shape[1])
        except CorpusError as error:
            self.problems = [QuarantinedShard(self._shard.name, str(error)[:_MOST_MESSAGE])]
            numbers = None
        if numbers is None:
            self._is_read, self._counts = False, None
            return
        known = numbers >= 0
        sums = [np.bincount(numbers[known], values[known], len(self._numbers)) for values in counts]
        grown = np.stack(sums, axis=1).astype(np.int64)
        if self._counts is not None:
            grown[: len(self._counts)] += self._counts
        self._counts = grown

    def counted(self) -> dict[str | None, Counts]:
        """Return (K,) counts by name; None is the name of what there was no place for."""
        if self._counts is None:
            return {}
        return {name: self._counts[number] for name, number in self._numbers.items() if self._counts[number, 0]}

    def close(self) -> None:
        """Close the corpus's file."""
        self._columns.close()

    def _take(self, rows: int) -> Counts | None:
        """(N,) numbers of the next rows' groups, -1 where there is none; None if there is no such column."""
        while len(self._waiting) < rows:
            names_and_rows = next(self._columns, None)
            if names_and_rows is None:
                if self._counts is None and not len(self._waiting):
                    return None
                raise CorpusError(f"column 'group' of {self._shard.name} has fewer rows than there are scores")
            self._waiting = np.concatenate([self._waiting, self._number(*names_and_rows)])
        taken, self._waiting = self._waiting[:rows], self._waiting[rows:]
        return taken

    def _number(self, names: Sequence[str | None], rows: Counts) -> Counts:
        numbers = [-1 if name is None else self._number_of(name[:_MOST_NAME]) for name in names]
        numbers.append(-1)  # where a null, whose index is -1, finds it
        return np.array(numbers)[rows]

    def _number_of(self, name: str) -> int:
        key = name if name in self._numbers or len(self._numbers) < _MOST_GROUPS else None
        return self._numbers.setdefault(key, len(self._numbers))
