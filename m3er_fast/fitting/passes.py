"""The two passes over a corpus that fit a model's parts shard by shard.

1. :class:`CountPass`: the moments of every feature, and the number of utterances and paired frames of each shard.
2. :class:`LearnPass`, which needs the standardiser of the first pass: the training samples of the check and of the
   proxies, each reduced to what fitting needs.

Each pass is a picklable function of a group of shards. The parts that it returns merge, and need no more memory for
more shards. Folds, calibration samples and bank are chosen by the number that an utterance or a frame has in the whole
corpus, which the first pass determines, so the result does not depend on which process read which shard.

A *paired* frame has two valid modalities or more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from m3er_fast.check import ModalityCheck
from m3er_fast.config import CheckConfig, ProxyConfig
from m3er_fast.corpus.base import CorpusError
from m3er_fast.fitting.training_rows import BATCH_FRAMES, TrainingReader, cut_batches
from m3er_fast.inputs import prepare_batch
from m3er_fast.proxy import BankSample, ProxyGenerator, count_paired
from m3er_fast.shards.plan import QuarantinedShard, Shard
from m3er_fast.standardize import StandardizedBatch, Standardizer, clean_frames

# --- first pass ---


@dataclass
class CountedShards:
    """The result of the first pass for some shards."""

    standardizer: Standardizer
    shards: list[Shard] = field(default_factory=list)  # readable ones
    rows: int = 0  # utterances
    frames: int = 0  # paired frames
    errors: int = 0  # utterances that cannot be read
    quarantined: list[QuarantinedShard] = field(default_factory=list)

    def merge(self, later: CountedShards) -> None:
        """Add the result for the shards that follow."""
        self.standardizer.merge(later.standardizer)
        self.shards += later.shards
        self.rows += later.rows
        self.frames += later.frames
        self.errors += later.errors
        self.quarantined += later.quarantined


class CountPass(NamedTuple):
    """The first pass."""

    reader: TrainingReader

    def __call__(self, shards: Sequence[Shard]) -> CountedShards:
        """Count a group of shards; a shard that cannot be read is put in quarantine as a whole."""
        counted = CountedShards(Standardizer(self.reader.input_dims))
        for shard in shards:
            try:
                counted.merge(self._count(shard))
            except CorpusError as error:
                counted.quarantined.append(QuarantinedShard(shard.name, " ".join(str(error).split())))
        return counted

    def _count(self, shard: Shard) -> CountedShards:
        counted = CountedShards(Standardizer(self.reader.input_dims), [shard])
        for rows in self.reader.read(shard):
            counted.errors += len(rows.problems)
            for batch in cut_batches(rows):
                counted.standardizer.partial_fit([batch])
                counted.rows += len(batch.lengths)
                counted.frames += count_paired(clean_frames(prepare_batch(*batch, input_dims=self.reader.input_dims)))
        return counted


# --- second pass ---


class ShardGroup(NamedTuple):
    """A group of shards and its position in the corpus."""

    shards: list[Shard]
    rows: range  # numbers of its utterances
    frames: range  # numbers of its paired frames


def number_groups(counted: Sequence[CountedShards]) -> list[ShardGroup]:
    """Return the groups of shards that the first pass has counted, with their positions in the corpus."""
    groups, row, frame = [], 0, 0
    for part in counted:
        groups.append(ShardGroup(part.shards, range(row, row + part.rows), range(frame, frame + part.frames)))
        row, frame = row + part.rows, frame + part.frames
    return groups


class LearnedPart(NamedTuple):
    """The result of the second pass for some consecutive utterances."""

    check: Any = None  # from ModalityCheck.collect; None without a check or utterances
    proxy: Any = None  # from ProxyGenerator.collect; None without proxies or utterances
    rows: int = 0
    frames: int = 0

    def merge(self, later: LearnedPart) -> LearnedPart:
        """Return both as one; ``later`` is of the utterances that follow."""
        return LearnedPart(
            check=_merged(self.check, later.check),
            proxy=_merged(self.proxy, later.proxy),
            rows=self.rows + later.rows,
            frames=self.frames + later.frames,
        )


def _merged(part: Any, later: Any) -> Any:
    return part.merge(later) if part is not None and later is not None else later if part is None else part


class LearnPass(NamedTuple):
    """The second pass."""

    reader: TrainingReader
    standardizer: Standardizer
    check: CheckConfig | None
    proxy: ProxyConfig | None
    rows: int  # of the whole corpus
    frames: int

    def __call__(self, group: ShardGroup) -> LearnedPart:
        """Learn from a group of shards.

        Raises:
            CorpusError: the content differs from that of the first pass.
        """
        try:
            learned = self._learn_group(group)
        except CorpusError as error:
            raise CorpusError(f"the corpus has changed while it was read: {error}") from error
        if isinstance(learned.proxy, BankSample):  # in one piece, which takes less memory than one per bundle
            learned = learned._replace(proxy=learned.proxy._replace(pieces=[learned.proxy.joined()]))
        return learned

    def state(self, learned: LearnedPart) -> dict[str, Tensor]:
        """Return the state of a model's parts, fitted to all that was learned."""
        parts: dict[str, nn.Module] = {"standardizer": self.standardizer}
        if self.check is not None:
            parts["modality_check"] = self._new_check(self.check).fit_collected(learned.check)
        if self.proxy is not None:
            parts["proxy_generator"] = self._new_proxies(self.proxy).fit_collected(learned.proxy)
        return dict(nn.ModuleDict(parts).state_dict())

    def _learn_group(self, group: ShardGroup) -> LearnedPart:
        learned = LearnedPart()
        for batches in self._bundles(group.shards):
            learned = learned.merge(self._learn(batches, group.rows[learned.rows :], group.frames[learned.frames :]))
        if (learned.rows, learned.frames) != (len(group.rows), len(group.frames)):
            raise CorpusError(f"{group.shards[0].name} and the {len(group.shards) - 1} after it hold less than before")
        return learned

    def _bundles(self, shards: Sequence[Shard]) -> Iterator[list[StandardizedBatch]]:
        """Yield batches, small ones several at a time, since merging the result of each would take longer."""
        bundle: list[StandardizedBatch] = []
        frames = 0
        for shard in shards:
            for rows in self.reader.read(shard):
                for batch in cut_batches(rows):
                    bundle.append(self.standardizer(*batch))
                    frames += bundle[-1].frame_valid.shape[0] * bundle[-1].frame_valid.shape[1]
                    if frames >= BATCH_FRAMES // 2:
                        yield bundle
                        bundle, frames = [], 0
        if bundle:
            yield bundle

    def _learn(self, batches: Sequence[StandardizedBatch], rows: range, frames: range) -> LearnedPart:
        """Learn from batches, which hold the first of the utterances and frames with these numbers."""
        row_count, frame_count = sum(len(batch.lengths) for batch in batches), sum(map(count_paired, batches))
        if row_count > len(rows) or frame_count > len(frames):
            raise CorpusError("a shard holds more than before")
        check = proxy = None
        if self.check is not None:
            check = self._new_check(self.check).collect(batches, start=rows.start, total=self.rows)
        if self.proxy is not None:
            proxy = self._new_proxies(self.proxy).collect(
                batches, start=frames.start, stop=frames.start + frame_count, total=self.frames
            )
        return LearnedPart(check, proxy, row_count, frame_count)

    def _new_check(self, config: CheckConfig) -> ModalityCheck:
        return ModalityCheck(self.reader.input_dims, **vars(config))

    def _new_proxies(self, config: ProxyConfig) -> ProxyGenerator:
        return ProxyGenerator(self.reader.input_dims, **vars(config))
