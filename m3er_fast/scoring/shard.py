"""One shard from input to output: what every runner does with each of them, so that all leave the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from m3er_fast.corpus.base import CorpusError
from m3er_fast.scoring.output import OutputFolder
from m3er_fast.scoring.page_cache import drop_from_page_cache
from m3er_fast.scoring.plan import Plan, Shard
from m3er_fast.scoring.prefetch import Prefetch
from m3er_fast.scoring.reader import read_windows
from m3er_fast.scoring.scorer import Scorer

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

    def read(self, shard: Shard, scorer: Scorer) -> Iterator[pa.Table]:
        """Read a shard in tables of the size that the scorer wants."""
        return read_windows(
            self.plan.corpus,
            shard,
            window_bytes=scorer.window_bytes,
            verify=self.verify,
            check=scorer.check_schema,
        )


def score_shard(
    job: ScoringJob, shard: Shard, scorer: Scorer, *, windows: Prefetch[pa.Table] | None = None
) -> Iterator[int | ShardResult]:
    """Read, score and write one shard. It may be done again: the result is the same, and replaces the former whole.

    Closing the iterator drops the shard.

    Args:
        job: where to read from and to write to.
        shard: one of the plan's.
        scorer: with the model.
        windows: the shard's tables, if somebody has begun to read them already.

    Yields:
        The number of rows after each table, and in the end what was written, or the reason why the shard belongs in
        quarantine.

    Raises:
        OSError: the scores cannot be written.
    """
    with windows or Prefetch(job.read(shard, scorer)) as tables:
        try:
            with job.output.writer(shard, scorer.schema) as writer:
                for table in tables:
                    writer.write(scorer.score(table))
                    yield table.num_rows
        except CorpusError as error:
            result = ShardResult(shard.name, 0, 0, " ".join(str(error).split()))
        else:
            result = ShardResult(shard.name, writer.rows, writer.errors)
    if not job.keep_cached:
        drop_from_page_cache(shard)
    yield result
