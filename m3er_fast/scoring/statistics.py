"""Fit at scale: what a model learns beside its network's weights, from a corpus that need not fit into memory.

The standardiser, the modality check and the proxy bank are learned in two passes over the shards:

1. moments of every feature, and how many utterances and paired frames each shard holds;
2. with the standardiser of the first pass: covariances of the utterance vectors, fold by fold; the utterances that the
   check is calibrated with; a uniform choice of frames for the bank.

What a pass learns of some shards merges with what it learns of others. Folds, calibration samples and bank are chosen
by the number that an utterance or a frame has in the whole corpus, which the first pass tells: whoever reads which
shard, the result is that of :meth:`m3er_fast.M3ERFusion.fit` for the whole corpus at once, but for the order in which
float64 sums are added up. A bank that is a *basis* is the exception: it is chosen by tournament, in other rounds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast.check import CheckStatistics, ModalityCheck
from m3er_fast.config import CheckConfig, M3ERConfig, ProxyConfig
from m3er_fast.corpus.base import CorpusError, order_modalities
from m3er_fast.corpus.parquet import features_from_table, modality_columns, shard_paths
from m3er_fast.fusion import M3ERFusion
from m3er_fast.inputs import check_input_dims
from m3er_fast.proxy import BankSample, ProxyGenerator
from m3er_fast.scoring.output import QuarantinedShard
from m3er_fast.standardize import StandardizedBatch, Standardizer

STATISTICS_FILE, DESCRIPTION_FILE = "statistics.safetensors", "statistics.json"

# What is merged in one place is bounded by this many partial results; it must not depend on the number of workers, or
# else the sums' last bits would.
_MOST_GROUPS = 256
# Utterances read at a time, and such batches learned from at a time: 512 of 20 frames and 410 features are 17 MB.
_READ_ROWS = 512
_BATCHES = 8


_Batch = tuple[dict[str, NDArray[np.float32]], NDArray[np.int64], NDArray[np.bool_]]  # features, lengths, available


class FitProgress(NamedTuple):
    """How far :func:`fit_statistics` is."""

    done: int  # groups of shards, those of the second pass after those of the first
    groups: int  # of both passes
    rows: int  # utterances seen so far


@dataclass(frozen=True)
class ModelStatistics:
    """What a model learns from a corpus beside its network's weights."""

    input_dims: dict[str, int]
    config: M3ERConfig  # of which ``check`` and ``proxy`` matter
    state: dict[str, Tensor]  # buffers of standardiser, check and bank, named as in the model's state_dict
    rows: int  # utterances learned from
    frames: int  # of them, frames with two valid modalities or more, which the bank was chosen from
    quarantined: tuple[QuarantinedShard, ...] = ()  # shards that could not be read

    def apply(self, model: M3ERFusion) -> M3ERFusion:
        """Put the statistics into a model, in place of what its ``fit`` learned; the network stays as it is.

        Raises:
            ValueError: the model has other modalities, or other settings of check or proxies.
        """
        if list(model.input_dims.items()) != list(self.input_dims.items()):
            raise ValueError(
                f"the statistics are of {self.input_dims}, but the model has {model.input_dims}: "
                "wanted the same modalities in the same order"
            )
        for part in ("check", "proxy"):
            wanted, found = getattr(model.config, part), getattr(self.config, part)
            if wanted != found:
                raise ValueError(f"the statistics were fitted with {part} = {found}, but the model has {wanted}")
        network = {name: value for name, value in model.state_dict().items() if not _is_statistic(name)}
        model.load_state_dict({**network, **self.state}, strict=True)
        return model

    def save(self, folder: str | Path) -> None:
        """Write ``statistics.safetensors`` and, when that is whole, ``statistics.json``."""
        from safetensors.torch import save

        from m3er_fast import __version__

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        settings = self.config.to_dict()
        description = {
            "library": "m3er-fast",
            "version": __version__,
            "input_dims": self.input_dims,
            "config": {part: settings[part] for part in ("check", "proxy")},
            "rows": self.rows,
            "frames": self.frames,
            "quarantined": [entry._asdict() for entry in self.quarantined],
        }
        state = {name: value.detach().contiguous() for name, value in self.state.items()}
        _write(path / STATISTICS_FILE, save(state))
        _write(path / DESCRIPTION_FILE, (json.dumps(description, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> ModelStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the folder holds no statistics that can be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder)
        for name in (DESCRIPTION_FILE, STATISTICS_FILE):
            if not (path / name).is_file():
                raise ValueError(f"{path} holds no statistics: it has no {name}; wanted what fit-stats wrote")
        try:
            found = json.loads((path / DESCRIPTION_FILE).read_bytes())
            return cls(
                input_dims=check_input_dims(found["input_dims"]),
                config=M3ERConfig.from_dict(found["config"]),
                state=load_file(path / STATISTICS_FILE),
                rows=int(found["rows"]),
                frames=int(found["frames"]),
                quarantined=tuple(QuarantinedShard(**entry) for entry in found["quarantined"]),
            )
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no statistics that can be read: {error}") from error


def fit_statistics(
    corpus: str | Path,
    config: M3ERConfig | None = None,
    *,
    input_dims: Mapping[str, int] | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    workers: int | None = None,
    progress: Callable[[FitProgress], None] | None = None,
) -> ModelStatistics:
    """Learn standardiser, modality check and proxy bank from a Parquet corpus, shard by shard.

    Of a corpus with splits the training split is read, of another one everything; labels are not looked at. Keep the
    utterances of a recording together: calibration goes by their order. A shard that cannot be read is left out and
    listed. Every row that is read counts: clean a corpus, or choose from it, before this.

    Args:
        corpus: a folder of Parquet files, or one file.
        config: ``check`` and ``proxy`` are what counts; None takes the defaults. ``proxy.max_bank`` bounds the bank,
            and with it the memory that all of this takes: None keeps every frame.
        input_dims: feature count of each modality, in order; None takes them from the corpus.
        engine: "local", in this process, or "ray". The result is the same.
        address: of a Ray cluster; None starts Ray on this machine.
        workers: of Ray; None takes one a CPU.
        progress: called after every group of shards.

    Raises:
        CorpusError: there is no corpus, no shard of it can be read, or only some shards have splits.
        ValueError: an argument is out of range, or the corpus has no training utterance.
        RuntimeError: the corpus changed while it was read, or workers of Ray died repeatedly.
    """
    config = M3ERConfig() if config is None else config
    shards = shard_paths(corpus)
    plan = _plan(shards, input_dims)
    if len(plan.input_dims) < 2:
        raise CorpusError(f"{corpus}: fusion needs two modalities or more, got {plan.input_dims}")
    size = -(-len(shards) // _MOST_GROUPS)
    groups = [shards[start : start + size] for start in range(0, len(shards), size)]
    run = _runner(engine, address, workers)
    seen = done = 0

    def report(rows: int) -> None:
        nonlocal seen, done
        seen, done = seen + rows, done + 1
        if progress is not None:
            progress(FitProgress(done, 2 * len(groups), seen))

    counted: list[_Counted] = []
    for part in run(_Count(plan), groups):
        counted.append(part)
        report(part.rows)
    standardizer = Standardizer(plan.input_dims)
    for part in counted:
        standardizer.merge(part.standardizer)
    total = sum(part.rows for part in counted)
    if not total:
        raise ValueError(f"{corpus}: there is no {'training ' if plan.has_splits else ''}utterance to fit to")

    tasks, rows, frames = [], 0, 0
    for group, part in zip(groups, counted, strict=True):
        readable = [shard for shard, count in zip(group, part.shards, strict=True) if count.reason is None]
        tasks.append(_Part(readable, rows, part.rows, frames, part.frames))
        rows, frames = rows + part.rows, frames + part.frames
    gather = _Gather(plan, standardizer, config.check, config.proxy, total)
    merged: _Gathered | None = None
    for found in run(gather, tasks):
        merged = found if merged is None else merged.merge(found, config.proxy)
        report(found.rows)
    assert merged is not None
    model = M3ERFusion(plan.input_dims, 1, config)
    model.standardizer.load_state_dict(standardizer.state_dict())
    merged.fit(model)
    quarantined = tuple(
        QuarantinedShard(shard.name, count.reason)
        for group, part in zip(groups, counted, strict=True)
        for shard, count in zip(group, part.shards, strict=True)
        if count.reason is not None
    )
    state = {name: value for name, value in model.state_dict().items() if _is_statistic(name)}
    return ModelStatistics(plan.input_dims, config, state, total, frames, quarantined)


def _is_statistic(name: str) -> bool:
    return name.split(".")[0] in ("standardizer", "modality_check", "proxy_generator")


def _runner(engine: str, address: str | None, workers: int | None) -> Callable[..., Iterable[Any]]:
    """What calls a function with one task after the other and gives the results in their order."""
    if engine == "local":
        return map
    if engine != "ray":
        raise ValueError(f"engine must be 'local' or 'ray', got {engine!r}")
    from m3er_fast.scoring.ray import ray_map

    return partial(ray_map, address=address, workers=workers)


class _Plan(NamedTuple):
    """What the footers of the shards say."""

    input_dims: dict[str, int]
    has_splits: bool


def _plan(shards: Sequence[Path], input_dims: Mapping[str, int] | None) -> _Plan:
    with ThreadPoolExecutor(8) as pool:  # most of the time is spent waiting for storage
        about = [found for found in pool.map(partial(_describe, input_dims=input_dims), shards) if found is not None]
    if not about:
        raise CorpusError(f"{shards[0].parent}: none of {len(shards)} shards can be read, such as {shards[0].name}")
    if len({has_splits for _, has_splits in about}) > 1:
        raise CorpusError(f"{shards[0].parent}: only some of the shards have splits")
    dims: dict[str, int] = {}
    for found, _ in about:
        dims = {**found, **dims}  # of two feature counts the first one holds: the other shard will be put aside
    names: Sequence[str] = list(input_dims or about[0][0])
    if input_dims is None and any(list(found) != names for found, _ in about):
        names = order_modalities(dims)
    return _Plan({name: dims[name] for name in names} if input_dims is None else dict(input_dims), about[0][1])


def _describe(shard: Path, input_dims: Mapping[str, int] | None) -> tuple[dict[str, int], bool] | None:
    """Feature counts of a shard and whether it has splits; None if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(shard) as file:
            schema = file.schema_arrow
            try:
                known = features_from_table(schema.empty_table(), input_dims)
            except CorpusError:  # lists of lists tell their width by their rows
                first = next(file.iter_batches(batch_size=1))
                known = features_from_table(pa.Table.from_batches([first]), input_dims)
    except (pa.ArrowException, OSError, UnicodeDecodeError, CorpusError, StopIteration):
        return None
    return {name: values.shape[2] for name, values in known.features.items()}, "split" in schema.names


def _read(shard: Path, plan: _Plan) -> Iterator[_Batch]:
    """The training utterances of a shard, a few at a time.

    Raises:
        CorpusError: the shard cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(shard, page_checksum_verification=True) as file:
            for part in file.iter_batches(batch_size=_READ_ROWS):
                table = pa.Table.from_batches([part])
                unknown = [name for name in modality_columns(table) if name not in plan.input_dims]
                if unknown:
                    raise CorpusError(f"holds modalities {unknown}, wanted some of {list(plan.input_dims)}")
                if plan.has_splits:
                    table = table.filter(pc.equal(table["split"], "train"))
                if table.num_rows:
                    batch = features_from_table(table, plan.input_dims)
                    yield batch.features, batch.lengths, batch.available
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"not readable as Parquet: {' '.join(str(error).split())}") from error


class _ShardCount(NamedTuple):
    rows: int
    frames: int  # with two valid modalities or more
    reason: str | None  # why the shard cannot be read


class _Counted(NamedTuple):
    """What the first pass learns of a group of shards."""

    shards: list[_ShardCount]
    standardizer: Standardizer

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def frames(self) -> int:
        return sum(shard.frames for shard in self.shards)


class _Count(NamedTuple):
    """The first pass."""

    plan: _Plan

    def __call__(self, shards: Sequence[Path]) -> _Counted:
        group = Standardizer(self.plan.input_dims)
        counts = []
        for shard in shards:
            own, rows, frames = Standardizer(self.plan.input_dims), 0, 0
            try:
                for batch in _read(shard, self.plan):
                    valid = own.partial_fit([batch])(*batch).frame_valid
                    rows += valid.shape[0]
                    frames += _paired_frames(valid)
            except ValueError as error:  # CorpusError among them; nothing of the shard counts
                counts.append(_ShardCount(0, 0, " ".join(str(error).split())))
                continue
            group.merge(own)
            counts.append(_ShardCount(rows, frames, None))
        return _Counted(counts, group)


class _Part(NamedTuple):
    """A group of shards and its place in the corpus."""

    shards: list[Path]
    first_row: int
    rows: int
    first_frame: int
    frames: int


class _Gathered(NamedTuple):
    """What the second pass learns of a group of shards."""

    check: CheckStatistics | None
    proxy: BankSample | ProxyGenerator | None  # the latter for a basis
    rows: int
    frames: int

    def merge(self, other: _Gathered, config: ProxyConfig | None) -> _Gathered:
        """Both together; ``other`` is of the shards that follow."""
        check, proxy = self.check, self.proxy
        if check is not None and other.check is not None:
            check = check.merge(other.check)
        if isinstance(proxy, BankSample) and isinstance(other.proxy, BankSample) and config is not None:
            proxy = BankSample.join([proxy, other.proxy], config.max_bank)
        elif isinstance(proxy, ProxyGenerator) and isinstance(other.proxy, ProxyGenerator):
            proxy = proxy.merge(other.proxy)
        return _Gathered(check, proxy, self.rows + other.rows, self.frames + other.frames)

    def fit(self, model: M3ERFusion) -> None:
        """Let the model's check and proxies learn from it."""
        if model.modality_check is not None and self.check is not None:
            model.modality_check.fit_statistics(self.check)
        if model.proxy_generator is not None and isinstance(self.proxy, BankSample):
            model.proxy_generator.fit_sample(self.proxy)
        elif isinstance(self.proxy, ProxyGenerator):
            model.proxy_generator = self.proxy


class _Gather(NamedTuple):
    """The second pass."""

    plan: _Plan
    standardizer: Standardizer
    check: CheckConfig | None
    proxy: ProxyConfig | None
    total: int

    def __call__(self, part: _Part) -> _Gathered:
        """Learn from a group of shards.

        Raises:
            RuntimeError: they hold something else than in the first pass.
        """
        merged = self._learn([], part)
        batches = chain.from_iterable(_read(shard, self.plan) for shard in part.shards)
        try:
            while some := [self.standardizer(*batch) for batch in islice(batches, _BATCHES)]:
                rest = part._replace(
                    first_row=part.first_row + merged.rows, first_frame=part.first_frame + merged.frames
                )
                merged = merged.merge(self._learn(some, rest), self.proxy)
        except CorpusError as error:
            raise RuntimeError(f"the corpus has changed while it was read: {error}") from error
        if (merged.rows, merged.frames) != (part.rows, part.frames):
            raise RuntimeError(
                f"the corpus has changed while it was read: {part.shards[0]} and the {len(part.shards) - 1} after it "
                f"gave {part.rows} utterances and {part.frames} frames, then {merged.rows} and {merged.frames}"
            )
        return merged

    def _learn(self, batches: Sequence[StandardizedBatch], part: _Part) -> _Gathered:
        check: CheckStatistics | None = None
        proxy: BankSample | ProxyGenerator | None = None
        if self.check is not None:
            judge = ModalityCheck(self.plan.input_dims, **vars(self.check))
            check = judge.statistics(batches, start=part.first_row, total=self.total)
        if self.proxy is not None:
            generator = ProxyGenerator(self.plan.input_dims, **vars(self.proxy))
            if self.proxy.bank == "basis":
                proxy = generator.fit_batches(lambda: batches)
            else:
                proxy = generator.sample(batches, start=part.first_frame)
        rows = sum(batch.lengths.shape[0] for batch in batches)
        return _Gathered(check, proxy, rows, sum(_paired_frames(batch.frame_valid) for batch in batches))


def _paired_frames(frame_valid: Tensor) -> int:
    """Frames that a bank can be made of; (B, T, M)."""
    return int((frame_valid.sum(dim=2) >= 2).sum())


def _write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, and give it its name when it is whole and on the disk."""
    partial_path = path.with_name(f"{path.name}.partial")
    try:
        with partial_path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    except BaseException:
        partial_path.unlink(missing_ok=True)
        raise
