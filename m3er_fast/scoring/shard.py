"""Reading, scoring and writing shards: the part that every runner shares, so that all runners leave the same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from m3er_fast.corpus.base import CorpusError
from m3er_fast.execution.threads import map_in_order, torch_threads
from m3er_fast.fitted_module import eval_mode
from m3er_fast.scoring.output import OutputFolder
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.shards.page_cache import drop_from_page_cache
from m3er_fast.shards.plan import Location, Plan, Shard
from m3er_fast.shards.prefetch import Prefetch
from m3er_fast.shards.reader import read_windows

if TYPE_CHECKING:
    import pyarrow as pa


class ShardResult(NamedTuple):
    """The outcome of a shard. It is small and can be pickled."""

    name: str
    rows: int  # utterances written, including those with an error
    errors: int  # utterances that could not be scored
    reason: str | None = None  # why the shard belongs in quarantine; None if it was scored


@dataclass(frozen=True)
class ScoringJob:
    """Everything but the model that scoring a shard needs. It can be pickled."""

    plan: Plan
    output: OutputFolder
    verify: bool = True  # page checksums of the input
    keep_cached: bool = True  # leave the input in the page cache
    label_task: str | None = None  # of the labels beside the scores; None: the scores have none

    def without_shards(self) -> ScoringJob:
        """Return the job without its list of shards, which may be long: a worker gets its shards one by one."""
        return replace(self, plan=self.plan._replace(shards=()), output=replace(self.output, shards=()))


def read_tables(corpus: Location, shard: Shard, scorer: Scorer, *, verify: bool = True) -> Iterator[pa.Table]:
    """Read a shard in tables of the size that the scorer wants."""
    return read_windows(
        corpus,
        shard,
        window_bytes=scorer.window_bytes,
        verify=verify,
        extra_columns=[*scorer.model.input_dims, "label"],  # whatever their type is where there are no rows
        check=scorer.check_schema,
    )


class ScoredPart(NamedTuple):
    """The scores of some rows of a shard, or None at its end, with the error that ended it if there is one."""

    shard: Shard
    scores: pa.Table | None
    error: CorpusError | None = None


def score_shards(
    job: ScoringJob, shards: Iterable[Shard], scorer: Scorer, *, threads: int | None = None
) -> Iterator[int | ShardResult]:
    """Read, score and write shards one after the other.

    A shard may be scored again: the result is the same, and replaces the former one as a whole. Closing the iterator
    drops the shard that is being scored.

    Args:
        job: where to read from and write to.
        shards: some of the plan's. They are read before it is their turn to be scored.
        scorer: with the model.
        threads: as for :func:`score_parts`.

    Yields:
        The number of rows after each table, and a :class:`ShardResult` at the end of each shard.

    Raises:
        OSError: the scores cannot be written.
    """
    read = partial(read_tables, job.plan.corpus, verify=job.verify)
    with closing(score_parts(read, shards, scorer, threads=threads, label_task=job.label_task)) as all_parts:  # type: ignore[type-var]
        for shard, parts in itertools.groupby(all_parts, key=lambda part: part.shard):
            yield from _write_shard(job, shard, parts, scorer)


def score_parts(
    read: Callable[[Shard, Scorer], Iterator[pa.Table]],
    shards: Iterable[Shard],
    scorer: Scorer,
    *,
    threads: int | None = None,
    label_task: str | None = None,
) -> Iterator[ScoredPart]:
    """Yield the scores of shards in order, table by table, and a part without scores after each shard.

    A thread reads ahead, beyond the end of a shard. On the CPU several tables are scored at the same time.

    Args:
        read: returns the tables of a shard.
        shards: iterated over by the thread that reads.
        scorer: with the model, which is in eval mode meanwhile.
        threads: number of threads that score on the CPU, one table each; None uses as many as torch has.
        label_task: of the labels beside the scores; None: the scores have none.
    """
    failed: set[Shard] = set()

    def tables() -> Iterator[tuple[Shard, pa.Table | None, CorpusError | None]]:
        for shard in shards:
            error = None
            try:
                for table in read(shard, scorer):
                    yield shard, table, None
                    if shard in failed:
                        break
            except CorpusError as problem:
                error = problem
            yield shard, None, error

    def score(part: tuple[Shard, pa.Table | None, CorpusError | None], is_canceled: Callable[[], bool]) -> ScoredPart:
        shard, table, error = part
        if table is None:
            return ScoredPart(shard, None, error)
        try:
            return ScoredPart(shard, scorer.score(table, label_task=label_task, is_canceled=is_canceled))
        except CorpusError as problem:
            failed.add(shard)
            return ScoredPart(shard, None, problem)

    available = torch_threads()
    threads = threads or available
    if scorer.device.type != "cpu" or threads == available == 1:
        threads = None  # the calling thread computes
    with eval_mode(scorer.model), Prefetch(tables()) as ahead, closing(map_in_order(score, ahead, threads)) as parts:  # type: ignore[type-var]
        yield from parts


def _write_shard(
    job: ScoringJob, shard: Shard, parts: Iterator[ScoredPart], scorer: Scorer
) -> Iterator[int | ShardResult]:
    """Write the scores of one shard, and yield what :func:`score_shards` yields."""
    try:
        with job.output.writer(shard, scorer.schema_with(job.label_task)) as writer:
            for part in parts:
                if part.error is not None:
                    raise part.error
                if part.scores is not None:
                    writer.write(part.scores)
                    yield part.scores.num_rows
    except CorpusError as error:
        result = ShardResult(shard.name, 0, 0, " ".join(str(error).split()))
    else:
        result = ShardResult(shard.name, writer.rows, writer.errors)
    if not job.keep_cached:
        drop_from_page_cache(shard)
    yield result  # a Ray worker closes the iterator here
