"""Shards from input to output: what every runner does with each of them, so that all leave the same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from m3er_fast.corpus.base import CorpusError
from m3er_fast.execution.threads import map_in_order, usual_threads
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
    """What became of a shard; small, and it can be pickled."""

    name: str
    rows: int  # utterances written, those with an error among them
    errors: int  # utterances that could not be scored
    reason: str | None = None  # why the shard went to quarantine; None if it was scored


@dataclass(frozen=True)
class ScoringJob:
    """Everything but the model that scoring a shard needs; it can be pickled."""

    plan: Plan
    output: OutputFolder
    verify: bool = True  # page checksums of the input
    keep_cached: bool = True  # leave the input in the page cache

    def without_shards(self) -> ScoringJob:
        """The same for workers, who are told of some shards at a time: a list of a hundred thousand is sent to none."""
        return replace(self, plan=self.plan._replace(shards=()), output=replace(self.output, shards=()))


def read_tables(corpus: Location, shard: Shard, scorer: Scorer, *, verify: bool = True) -> Iterator[pa.Table]:
    """Read a shard in tables of the size that the scorer wants."""
    return read_windows(corpus, shard, window_bytes=scorer.window_bytes, verify=verify, check=scorer.check_schema)


class ScoredPart(NamedTuple):
    """Scores of some rows of a shard; None where it ends, with the error if that is why."""

    shard: Shard
    scores: pa.Table | None
    error: CorpusError | None = None


def score_shards(
    job: ScoringJob, shards: Iterable[Shard], scorer: Scorer, *, threads: int | None = None
) -> Iterator[int | ShardResult]:
    """Read, score and write shards one after the other.

    A shard may be done again: the result is the same, and replaces the former whole. Closing the iterator drops the
    shard at hand.

    Args:
        job: where to read from and to write to.
        shards: some of the plan's. They are taken, and read, before it is their turn.
        scorer: with the model.
        threads: as :func:`scored_parts` takes it.

    Yields:
        The number of rows after each table, and at the end of each shard what was written, or the reason why it belongs
        in quarantine.

    Raises:
        OSError: the scores cannot be written.
    """
    read = partial(read_tables, job.plan.corpus, verify=job.verify)
    with closing(scored_parts(read, shards, scorer, threads=threads)) as scored:  # type: ignore[type-var]
        for shard, parts in itertools.groupby(scored, key=lambda part: part.shard):
            yield from _write(job, shard, parts, scorer)


def scored_parts(
    read: Callable[[Shard, Scorer], Iterator[pa.Table]],
    shards: Iterable[Shard],
    scorer: Scorer,
    *,
    threads: int | None = None,
) -> Iterator[ScoredPart]:
    """Yield the scores of shards in order, table by table, and after each shard a part without scores.

    A thread reads ahead, across the ends of shards. On the CPU several tables are scored at a time.

    Args:
        read: the tables of a shard.
        shards: taken by the thread that reads.
        scorer: with the model, which is in eval mode meanwhile.
        threads: that score on the CPU, a table each; None takes as many as torch has.
    """
    dropped: set[Shard] = set()

    def tables() -> Iterator[tuple[Shard, pa.Table | None, CorpusError | None]]:
        for shard in shards:
            error = None
            try:
                for table in read(shard, scorer):
                    yield shard, table, None
                    if shard in dropped:
                        break
            except CorpusError as problem:
                error = problem
            yield shard, None, error

    def score(read: tuple[Shard, pa.Table | None, CorpusError | None], is_canceled: Callable[[], bool]) -> ScoredPart:
        shard, table, error = read
        if table is None:
            return ScoredPart(shard, None, error)
        try:
            return ScoredPart(shard, scorer.score(table, is_canceled=is_canceled))
        except CorpusError as problem:
            dropped.add(shard)
            return ScoredPart(shard, None, problem)

    usual = usual_threads()
    threads = threads or usual
    if scorer.device.type != "cpu" or threads == usual == 1:
        threads = None  # the one that iterates computes
    with eval_mode(scorer.model), Prefetch(tables()) as ahead, closing(map_in_order(score, ahead, threads)) as scored:  # type: ignore[type-var]
        yield from scored


def _write(job: ScoringJob, shard: Shard, parts: Iterator[ScoredPart], scorer: Scorer) -> Iterator[int | ShardResult]:
    """Write the scores of one shard, and yield as :func:`score_shards`."""
    try:
        with job.output.writer(shard, scorer.schema) as writer:
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
    yield result  # after which a worker of Ray asks for no more
