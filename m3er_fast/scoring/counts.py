"""Counting scores that were written: by class, modality, part of the corpus and group.

Scores are read back some rows at a time, with their page checksums verified. The first 10,000 groups are counted by
name and all others together, so that memory is bounded for every corpus.

Dimension legend: N rows, M modalities, C classes, K = 5 + M counts of a row, G groups.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from m3er_fast._answer_counts import AnswerCounts
from m3er_fast.corpus.base import CorpusError
from m3er_fast.metrics import count_answers
from m3er_fast.scoring.columns import CALIBRATION_KEY, TASK_KEY, ScoreColumns
from m3er_fast.scoring.labels import before_calibration, targets
from m3er_fast.scoring.shard import ScoringJob
from m3er_fast.shards.plan import QuarantinedShard, Shard
from m3er_fast.shards.reader import read_groups

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_READ = 2**16
"""Rows of scores that are read at a time."""
MOST_GROUPS = 10_000
"""Groups that are counted by name."""
MOST_LISTED = 20
"""Errors of rows, and shards with unreadable groups, that are listed."""

_MOST_NAME_LENGTH, _MOST_MESSAGE_LENGTH = 200, 500
_MOST_SHARDS_PER_TASK = 32
_CONFIDENCE_BINS = 10

Counts: TypeAlias = NDArray[np.int64]
MapFunction: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Calls a function with every task, and yields the results in the order of the tasks."""


class RowCounts(NamedTuple):
    """The counts in an array of K along its first axis, by name. These are views: writing to them changes the array."""

    rows: Any
    scored: Any
    abstained: Any
    labelled: Any  # with a label, and scored
    right: Any  # of these, with the right class, or with every question answered correctly
    ineffectual: Any  # M of them

    @classmethod
    def view(cls, counts: Counts) -> RowCounts:
        """Name the counts of an array (K, ...)."""
        rows, scored, abstained, labelled, right = counts[:5]
        return cls(rows, scored, abstained, labelled, right, ineffectual=counts[5:])

    @staticmethod
    def size(columns: ScoreColumns) -> int:
        """Return K."""
        return 5 + len(columns.modalities)


class RowError(NamedTuple):
    """The error of a row that could not be scored."""

    shard: str
    row: int  # of the shard, from 0
    error: str


@dataclass
class ScoreCounts:
    """The counts of some consecutive shards."""

    columns: ScoreColumns
    total: Counts  # (K,)
    order: Counts  # (parts, K), by part of the corpus
    p_value_0: Counts  # (M,)
    reasons: list[Counter[str]]  # M, of the rows that each reason of a rejection occurs in
    probability: NDArray[np.float64]  # (C,) sums; this, and the next three, without utterances abstained from
    histogram: Counts  # of confidences
    confidence: float = 0.0  # sum
    predictions: Counter[str] = field(default_factory=Counter)
    groups: dict[str | None, Counts] = field(default_factory=dict)  # (K,) each; None: all groups beyond MOST_GROUPS
    answers: AnswerCounts | None = None
    """Beside the labels; None if there are none."""
    errors: list[RowError] = field(default_factory=list)
    unread_groups: list[QuarantinedShard] = field(default_factory=list)

    @classmethod
    def empty(cls, columns: ScoreColumns, edges: Counts) -> ScoreCounts:
        """Return the counts of no shard."""
        size = RowCounts.size(columns)
        return cls(
            columns=columns,
            total=np.zeros(size, np.int64),
            order=np.zeros((len(edges) - 1, size), np.int64),
            p_value_0=np.zeros(len(columns.modalities), np.int64),
            reasons=[Counter() for _ in columns.modalities],
            probability=np.zeros(len(columns.classes)),
            histogram=np.zeros(_CONFIDENCE_BINS, np.int64),
        )

    def merge(self, later: ScoreCounts) -> None:
        """Add the counts of the shards that follow."""
        self.total += later.total
        self.order += later.order
        self.p_value_0 += later.p_value_0
        self.reasons = [ours + theirs for ours, theirs in zip(self.reasons, later.reasons, strict=True)]
        self.probability += later.probability
        self.histogram += later.histogram
        self.confidence += later.confidence
        self.predictions += later.predictions
        for name, counts in later.groups.items():
            key = name if name in self.groups or len(self.groups) < MOST_GROUPS else None
            self.groups[key] = self.groups[key] + counts if key in self.groups else counts
        self.merge_answers(later.answers)
        self.errors = (self.errors + later.errors)[:MOST_LISTED]
        self.unread_groups = (self.unread_groups + later.unread_groups)[:MOST_LISTED]

    def merge_answers(self, later: AnswerCounts | None) -> None:
        """Add answers beside labels; those of another task than the first cannot be added, and are left out."""
        if self.answers is None:
            self.answers = later
        elif later is not None and later.task == self.answers.task:
            self.answers.merge(later)


def count_scores(
    job: ScoringJob, shards: Sequence[Shard], starts: Counts, edges: Counts, map_tasks: MapFunction
) -> ScoreCounts:
    """Count the scores of shards.

    Args:
        job: the run's.
        shards: those that have scores, in the order of the corpus.
        starts: (shards + 1,) number of the first row of each shard, and the number of rows.
        edges: (parts + 1,) number of the first row of each part of the corpus, and the number of rows.
        map_tasks: calls a function for some shards at a time; the result does not depend on it.

    Raises:
        CorpusError: scores cannot be read back.
    """
    size = min(max(len(shards) // 64, 1), _MOST_SHARDS_PER_TASK)
    placed = [(shard, int(start)) for shard, start in zip(shards, starts[:-1], strict=True)]
    tasks = [placed[first : first + size] for first in range(0, len(placed), size)]
    whole: ScoreCounts | None = None
    # Merged in order: neither rounding nor the choice of the first groups may depend on which task was faster.
    results = map_tasks(_CountShards(job.without_shards(), edges), tasks)
    with closing(results):  # type: ignore[type-var]
        for part in results:
            if whole is None:
                whole = part
            else:
                whole.merge(part)
    return whole or ScoreCounts.empty(ScoreColumns((), ()), edges)


@dataclass(frozen=True)
class _CountShards:
    """Counts some consecutive shards. It can be pickled."""

    job: ScoringJob
    edges: Counts

    def __call__(self, placed: Sequence[tuple[Shard, int]]) -> ScoreCounts:
        parts = (_count_shard(self.job, shard, start, self.edges) for shard, start in placed)
        whole = next(parts)
        for part in parts:
            whole.merge(part)
        return whole


def _count_shard(job: ScoringJob, shard: Shard, start: int, edges: Counts) -> ScoreCounts:
    """Count the scores of one shard, whose first row is number ``start`` of the corpus."""
    import pyarrow as pa
    from pyarrow import parquet

    path = job.output.location.join(shard.output_name)
    try:
        with (
            job.output.location.filesystem.open_input_file(path) as source,
            parquet.ParquetFile(
                source, read_dictionary=["prediction"], pre_buffer=False, page_checksum_verification=True
            ) as file,
            closing(_GroupCounter(job, shard)) as groups,
        ):
            metadata = file.schema_arrow.metadata or {}
            found = ScoreCounts.empty(ScoreColumns.of_metadata(metadata), edges)
            task = metadata.get(TASK_KEY, b"").decode()
            calibration = json.loads(metadata.get(CALIBRATION_KEY, b"{}"))
            row = 0
            names = [name for name in file.schema_arrow.names if name != "id"]
            for batch in file.iter_batches(ROWS_PER_READ, columns=names, use_threads=False):
                counts = _count_rows(found, batch)
                if task:
                    _count_answers(found, batch, task, calibration, counts)
                for error in np.flatnonzero(RowCounts.view(counts).scored == 0)[: MOST_LISTED - len(found.errors)]:
                    message = batch["error"][int(error)].as_py()
                    found.errors.append(RowError(shard.name, row + int(error), message[:_MOST_MESSAGE_LENGTH]))
                _add_to_parts(found.order, edges, start + row, counts)
                groups.add(counts)
                row += batch.num_rows
    except (pa.ArrowException, CorpusError, OSError, ValueError) as error:
        raise CorpusError(
            f"{path}: scores cannot be read back: {' '.join(str(error).split())}; if this persists, delete the file "
            "and resume"
        ) from error
    found.groups = groups.by_name()
    found.unread_groups = groups.problems
    return found


def _count_rows(found: ScoreCounts, batch: pa.RecordBatch) -> Counts:
    """Return the counts (K, N) of each row, and add all that is summed over rows alone to ``found``."""
    import pyarrow as pa

    def values(name: str, null: bool | None = None) -> Any:
        column = batch[name] if null is None else batch[name].fill_null(null)
        return column.to_numpy(zero_copy_only=False)

    columns = found.columns
    counts = np.ones((len(found.total), batch.num_rows), np.int64)
    view = RowCounts.view(counts)
    view.scored[:] = batch["error"].is_null().to_numpy(zero_copy_only=False)
    view.labelled[:] = view.right[:] = 0
    view.abstained[:] = values("abstained", null=False)
    for m, name in enumerate(columns.modalities):
        view.ineffectual[m] = ~values(columns.effective(name), null=True)
        found.p_value_0[m] += np.count_nonzero(values(columns.p_value(name)) == 0)
        found.reasons[m] += _count_texts(batch[columns.reason(name)])
    found.total += counts.sum(axis=1)
    # An utterance that the model abstains from has the probabilities of a guess: they would hide those of the others.
    decided = (view.scored == 1) & (view.abstained == 0)
    probability = np.stack([values(columns.probability(name))[decided] for name in columns.classes])
    confidence = probability.max(axis=0)
    found.probability += probability.sum(axis=1, dtype=np.float64)
    found.confidence += float(confidence.sum(dtype=np.float64))
    found.histogram += np.histogram(confidence.clip(max=1), _CONFIDENCE_BINS, (0, 1))[0]
    found.predictions += _count_texts(batch["prediction"].filter(pa.array(decided)))
    return counts


def _count_answers(
    found: ScoreCounts, batch: pa.RecordBatch, task: str, calibration: Mapping[str, Any], counts: Counts
) -> None:
    """Count the answers of rows with labels, in ``found`` and in the counts (K, N) of each row."""
    view = RowCounts.view(counts)
    target, known = targets(batch, found.columns, task)
    known = known & (view.scored == 1)
    if not known.any():
        return
    names = found.columns.classes
    p = np.stack([batch[found.columns.probability(name)].to_numpy(zero_copy_only=False) for name in names], axis=1)
    p, target = p[known], target[known]
    before = before_calibration(p, calibration)
    found.merge_answers(count_answers(p, target, names, task=task, uncalibrated=before))
    view.labelled[:] = known
    if task == "multi":
        view.right[known] = ((p >= 0.5) == (target == 1)).all(axis=1)
    else:
        view.right[known] = p.argmax(axis=1) == (target if task == "single" else target.argmax(axis=1))
    found.total[3:5] += counts[3:5].sum(axis=1)


def _count_texts(column: pa.Array) -> Counter[str]:
    """Return how often each text occurs in a column; nulls do not count."""
    import pyarrow.compute as pc

    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(column.drop_null()).to_pylist()})


def _add_to_parts(order: Counts, edges: Counts, start: int, counts: Counts) -> None:
    """Add the counts of consecutive rows, the first of which has the number ``start``, to their parts."""
    rows = counts.shape[1]
    if not rows:
        return
    first, last = np.searchsorted(edges, [start, start + rows - 1], side="right") - 1
    offsets = np.maximum(edges[first : last + 1] - start, 0)
    order[first : last + 1] += np.add.reduceat(counts, offsets, axis=1).T


class _GroupCounter:
    """Counts rows by the groups of a shard of the corpus, which are read alongside its scores."""

    def __init__(self, job: ScoringJob, shard: Shard) -> None:
        self._shard = shard
        self._columns = read_groups(job.plan.corpus, shard, verify=job.verify)
        self._waiting = np.zeros(0, np.int64)
        self._numbers: dict[str | None, int] = {}  # None: all groups beyond MOST_GROUPS
        self._counts: Counts | None = None  # (G, K)
        self._is_readable = True
        self.problems: list[QuarantinedShard] = []

    def add(self, counts: Counts) -> None:
        """Add the counts of the next rows to their groups; do nothing if there are no groups, or unreadable ones."""
        if not self._is_readable:
            return
        try:
            numbers = self._next_numbers(counts.shape[1])
        except CorpusError as error:
            self.problems = [QuarantinedShard(self._shard.name, str(error)[:_MOST_MESSAGE_LENGTH])]
            numbers = None
        if numbers is None:
            self._is_readable, self._counts = False, None
            return
        has_group = numbers >= 0
        sums = [np.bincount(numbers[has_group], values[has_group], len(self._numbers)) for values in counts]
        grown = np.stack(sums, axis=1).astype(np.int64)
        if self._counts is not None:
            grown[: len(self._counts)] += self._counts
        self._counts = grown

    def by_name(self) -> dict[str | None, Counts]:
        """Return (K,) counts by name; None is the name of all groups beyond MOST_GROUPS."""
        if self._counts is None:
            return {}
        return {
            name: self._counts[number]
            for name, number in self._numbers.items()
            if RowCounts.view(self._counts[number]).rows
        }

    def close(self) -> None:
        """Close the corpus's file."""
        self._columns.close()

    def _next_numbers(self, rows: int) -> Counts | None:
        """Return the (N,) numbers of the next rows' groups, -1 where there is none; None if there is no such column."""
        while len(self._waiting) < rows:
            names_and_rows = next(self._columns, None)
            if names_and_rows is None:
                if self._counts is None and not len(self._waiting):
                    return None
                raise CorpusError(f"column 'group' of {self._shard.name} has fewer rows than there are scores")
            self._waiting = np.concatenate([self._waiting, self._number(*names_and_rows)])
        numbers, self._waiting = self._waiting[:rows], self._waiting[rows:]
        return numbers

    def _number(self, names: Sequence[str | None], rows: Counts) -> Counts:
        numbers = [-1 if name is None else self._number_of(name[:_MOST_NAME_LENGTH]) for name in names]
        numbers.append(-1)  # where -1, the index of a null, points to
        return np.array(numbers)[rows]

    def _number_of(self, name: str) -> int:
        key = name if name in self._numbers or len(self._numbers) < MOST_GROUPS else None
        return self._numbers.setdefault(key, len(self._numbers))
