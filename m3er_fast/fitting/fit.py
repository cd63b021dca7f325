"""Fit at scale: standardiser, check and proxy bank of a corpus that need not fit into memory.

They are learned in two passes over the shards:

1. moments of every feature, and how many utterances and paired frames each shard holds;
2. with the standardiser of the first pass: covariances of the utterance vectors, fold by fold; the utterances that the
   check is calibrated with; a uniform choice of frames for the bank.

What a pass learns of some shards merges with what it learns of others, and takes no more memory the more they are.
Folds, calibration samples and bank are chosen by the number that an utterance or a frame has in the whole corpus, which
the first pass tells. So the result is that of :meth:`m3er_fast.M3ERFusion.fit` for the whole corpus at once, but for
the order in which float64 sums are added up, and does not depend on who reads which shard. A bank that is a *basis* is
the exception: it is chosen by tournament, in other rounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, NamedTuple

from torch import Tensor, nn

from m3er_fast.check import CheckStatistics, ModalityCheck
from m3er_fast.config import CheckConfig, M3ERConfig, ProxyConfig
from m3er_fast.corpus.base import CorpusError
from m3er_fast.execution.engine import Engine, check_engine
from m3er_fast.fitting.statistics import ModelStatistics
from m3er_fast.fitting.training_rows import BATCH_FRAMES, TrainingReader, cut_batches, make_reader
from m3er_fast.inputs import prepare_batch
from m3er_fast.proxy import BankSample, ProxyGenerator, count_paired
from m3er_fast.shards.plan import Plan, QuarantinedShard, Shard, Source, plan_shards
from m3er_fast.standardize import StandardizedBatch, Standardizer, clean_frames

DEFAULT_MAX_BANK = 2**15
"""Frames of the bank where no settings are given: 54 MB of 410 features, however large the corpus is."""

# Shards are read, and what is learned of them merged, in this many groups or fewer. It must not depend on the number of
# workers, or else the sums' last bits would.
_MOST_GROUPS = 256
_LARGE_BANK = 2**30  # bytes; of a larger one, if nobody has set its size, a warning tells


class FitProgress(NamedTuple):
    """How far :func:`fit_statistics` is."""

    done: int  # groups of shards, those of the second pass after those of the first
    groups: int  # of both passes
    rows: int  # utterances read so far, by both


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
    """Learn standardiser, modality check and proxy bank from a corpus, shard by shard.

    Of a corpus with splits the training split is read, of another one everything; labels are not looked at. Keep the
    utterances of a recording together: calibration goes by their order. A shard that cannot be read is left out and
    listed, a row that cannot be read is left out and counted.

    Args:
        corpus: a folder of Parquet or Arrow IPC files, or one file: a local path, a URI, or a pair of a
            ``pyarrow.fs.FileSystem`` and a path.
        config: of which ``check`` and ``proxy`` count; None takes the defaults, with a
            ``proxy.max_bank`` of 32,768. The bank is what memory grows with: a ``max_bank`` of None keeps every frame.
        input_dims: feature count of each modality, in order; None takes them from the corpus.
        engine: "local", in this process, or "ray". The result is the same.
        address: of a Ray cluster; None starts Ray on this machine.
        workers: of Ray; None takes as many as there is room for.
        progress: called after every group of shards.

    Raises:
        CorpusError: there is no corpus, no shard of it can be read, only some shards have splits, or the corpus changed
            while it was read.
        ValueError: an argument is out of range, or the corpus has no training utterance.
        ImportError: engine is "ray", and Ray is missing.
        RuntimeError: workers of Ray died repeatedly.
    """
    check_engine(engine, address, workers)
    if config is None:
        config = M3ERConfig(proxy=ProxyConfig(max_bank=DEFAULT_MAX_BANK))
    plan = plan_shards(corpus)
    reader = make_reader(plan, input_dims)
    with _runner(engine, address, workers) as run:
        return _fit(plan, reader, config, run, progress)


def _fit(
    plan: Plan,
    reader: TrainingReader,
    config: M3ERConfig,
    run: Callable[..., Iterable[Any]],
    progress: Callable[[FitProgress], None] | None,
) -> ModelStatistics:
    """Both passes; ``run`` calls a function with one task after the other and gives the results in their order."""
    size = -(-len(plan.shards) // _MOST_GROUPS)
    groups = [plan.shards[start : start + size] for start in range(0, len(plan.shards), size)]
    needs_both = config.check is not None or config.proxy is not None
    report = _Reporter(progress, len(groups) * (2 if needs_both else 1))

    standardizer, counted = Standardizer(reader.input_dims), []
    for part in run(_Count(reader), groups):
        standardizer.merge(part.standardizer)
        counted.append(part)
        report(part.rows)
    rows, frames = sum(part.rows for part in counted), sum(part.frames for part in counted)
    quarantined = tuple(entry for part in counted for entry in part.quarantined)
    if not rows:
        why = f"; {quarantined[0].reason}" if quarantined else ""
        raise ValueError(f"{plan.corpus}: no {'training ' if reader.has_splits else ''}utterance to fit to{why}")

    if config.proxy is not None and config.proxy.bank == "neighbours" and config.proxy.max_bank is None:
        size = 4 * frames * sum(reader.input_dims.values())
        if size > _LARGE_BANK:
            warnings.warn(
                f"the bank will hold all {frames} frames, {size / 2**30:.1f} GiB: proxy.max_bank bounds it",
                stacklevel=2,
            )
    learn, learned = _Learn(reader, standardizer, config.check, config.proxy, rows, frames), _Learned(None, [], 0, 0)
    for found in run(learn, _tasks(counted)) if needs_both else ():
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


class _Reporter:
    """Counts groups of shards and rows, and tells."""

    def __init__(self, progress: Callable[[FitProgress], None] | None, groups: int) -> None:
        self._progress, self._groups = progress, groups
        self._done = self._rows = 0

    def __call__(self, rows: int) -> None:
        self._done, self._rows = self._done + 1, self._rows + rows
        if self._progress is not None:
            self._progress(FitProgress(self._done, self._groups, self._rows))


@contextmanager
def _runner(engine: str, address: str | None, workers: int | None) -> Iterator[Callable[..., Iterable[Any]]]:
    """What calls a function with one task after the other and gives the results in their order."""
    if engine == "local":
        yield map
        return
    from m3er_fast.scoring.ray import ray_map, ray_session

    with ray_session(address, workers):
        yield partial(ray_map, workers=workers)


# --- first pass ---


class _Counted(NamedTuple):
    """What the first pass learns of a group of shards."""

    standardizer: Standardizer
    shards: list[Shard]  # those that can be read
    rows: int  # utterances
    frames: int  # with two valid modalities or more
    errors: int  # utterances that cannot be read
    quarantined: list[QuarantinedShard]


class _Count(NamedTuple):
    """The first pass."""

    reader: TrainingReader

    def __call__(self, shards: Sequence[Shard]) -> _Counted:
        whole = _Counted(Standardizer(self.reader.input_dims), [], 0, 0, 0, [])
        for shard in shards:
            try:
                own = self._count(shard)
            except CorpusError as error:  # nothing of the shard counts
                whole.quarantined.append(QuarantinedShard(shard.name, " ".join(str(error).split())))
                continue
            whole.standardizer.merge(own.standardizer)
            whole.shards.append(shard)
            whole = whole._replace(
                rows=whole.rows + own.rows, frames=whole.frames + own.frames, errors=whole.errors + own.errors
            )
        return whole

    def _count(self, shard: Shard) -> _Counted:
        standardizer = Standardizer(self.reader.input_dims)
        rows = frames = errors = 0
        for some in self.reader.read(shard):
            errors += len(some.problems)
            for batch in cut_batches(some):
                standardizer.partial_fit([batch])
                rows += len(batch.lengths)
                frames += count_paired(clean_frames(prepare_batch(*batch, input_dims=self.reader.input_dims)))
        return _Counted(standardizer, [shard], rows, frames, errors, [])


# --- second pass ---


class _Task(NamedTuple):
    """A group of shards and its place in the corpus."""

    shards: list[Shard]
    rows: range  # numbers of its utterances
    frames: range  # numbers of its frames with two valid modalities or more


def _tasks(counted: Sequence[_Counted]) -> list[_Task]:
    tasks, rows, frames = [], 0, 0
    for part in counted:
        tasks.append(_Task(part.shards, range(rows, rows + part.rows), range(frames, frames + part.frames)))
        rows, frames = rows + part.rows, frames + part.frames
    return tasks


class _Learned(NamedTuple):
    """What the second pass learns of some utterances."""

    check: CheckStatistics | None
    banks: list[Any]  # of BankSample, or one ProxyGenerator with a basis
    rows: int
    frames: int

    def merge(self, other: _Learned) -> _Learned:
        """Both together; ``other`` is of the utterances that follow."""
        checks = [part.check for part in (self, other) if part.check is not None]
        check = reduce(CheckStatistics.merge, checks) if checks else None
        banks = [*self.banks, *other.banks]
        if banks and isinstance(banks[0], ProxyGenerator):
            banks = [reduce(ProxyGenerator.merge, banks)]
        return _Learned(check, banks, self.rows + other.rows, self.frames + other.frames)


class _Learn(NamedTuple):
    """The second pass."""

    reader: TrainingReader
    standardizer: Standardizer
    check: CheckConfig | None
    proxy: ProxyConfig | None
    rows: int  # of the whole corpus
    frames: int

    def __call__(self, task: _Task) -> _Learned:
        """Learn from a group of shards.

        Raises:
            CorpusError: they hold something else than in the first pass.
        """
        try:
            learned = self._learn_all(task)
        except CorpusError as error:
            raise CorpusError(f"the corpus has changed while it was read: {error}") from error
        if learned.banks and isinstance(learned.banks[0], BankSample):
            learned = learned._replace(banks=[BankSample.join(learned.banks)])
        return learned

    def _learn_all(self, task: _Task) -> _Learned:
        learned = _Learned(None, [], 0, 0)
        for batches in self._bundles(task.shards):
            learned = learned.merge(self._learn(batches, task.rows[learned.rows :], task.frames[learned.frames :]))
        if (learned.rows, learned.frames) != (len(task.rows), len(task.frames)):
            raise CorpusError(f"{task.shards[0].name} and the {len(task.shards) - 1} after it hold less than before")
        return learned

    def _bundles(self, shards: Sequence[Shard]) -> Iterator[list[StandardizedBatch]]:
        """Batches, several at a time where they are small: what is learned at a time is worth being merged."""
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

    def _learn(self, batches: Sequence[StandardizedBatch], rows: range, frames: range) -> _Learned:
        """Learn from batches; they are the first of the utterances and frames of these numbers."""
        own_rows, own_frames = sum(len(batch.lengths) for batch in batches), sum(map(count_paired, batches))
        if own_rows > len(rows) or own_frames > len(frames):
            raise CorpusError("a shard holds more than before")
        check: CheckStatistics | None = None
        banks: list[BankSample | ProxyGenerator] = []
        if self.check is not None:
            check = self._new_check(self.check).statistics(batches, start=rows.start, total=self.rows)
        if self.proxy is not None and self.proxy.bank == "basis":
            banks.append(self._new_proxies(self.proxy).fit_batches(lambda: batches))
        elif self.proxy is not None:
            sample = self._new_proxies(self.proxy).sample
            banks.append(sample(batches, start=frames.start, stop=frames.start + own_frames, total=self.frames))
        return _Learned(check, banks, own_rows, own_frames)

    def state(self, learned: _Learned) -> dict[str, Tensor]:
        """Return the state of a model's parts that have learned all of it."""
        parts: dict[str, nn.Module] = {"standardizer": self.standardizer}
        if self.check is not None and learned.check is not None:
            parts["modality_check"] = self._new_check(self.check).fit_statistics(learned.check)
        if self.proxy is not None:
            bank = learned.banks[0]
            if isinstance(bank, BankSample):
                bank = self._new_proxies(self.proxy).fit_sample(BankSample.join(learned.banks))
            parts["proxy_generator"] = bank
        return dict(nn.ModuleDict(parts).state_dict())

    def _new_check(self, config: CheckConfig) -> ModalityCheck:
        return ModalityCheck(self.reader.input_dims, **vars(config))

    def _new_proxies(self, config: ProxyConfig) -> ProxyGenerator:
        return ProxyGenerator(self.reader.input_dims, **vars(config))
