"""A scoring run: plan, check, let a runner score every shard, count, and mark the output as complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from m3er_fast.corpus.base import CorpusError, naming
from m3er_fast.execution.engine import Engine, check_engine
from m3er_fast.execution.ray_pool import check_ray, ray_cluster, ray_map
from m3er_fast.execution.run_folder import OutputMismatchError
from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.counts import MapFunction
from m3er_fast.scoring.local import make_scorers, run_local
from m3er_fast.scoring.output import OutputFolder
from m3er_fast.scoring.scorer import Precision, Scorer
from m3er_fast.scoring.shard import ScoringJob, ShardResult, read_tables, score_parts
from m3er_fast.scoring.summary import RunRecord, map_in_threads, write_summary
from m3er_fast.shards.page_cache import outgrows_page_cache
from m3er_fast.shards.plan import Checksum, Plan, QuarantinedShard, Shard, Source, locate, plan_shards
from m3er_fast.shards.reader import read_schema

if TYPE_CHECKING:
    import pyarrow as pa


_QUARANTINE_SECONDS = 1.0  # between two writes of the quarantine list, which is always written as a whole
_THREADS = 16  # looking for finished shards waits for storage, not for a core


class ScoreProgress(NamedTuple):
    """The progress of a run."""

    done: int  # shards, including those of an earlier run and those in quarantine
    shards: int
    rows: int  # utterances scored so far, including those of an earlier run
    rate: float  # utterances per second of this run
    seconds_left: float | None  # estimated from the bytes of the unfinished shards; None before the first is done


@dataclass(frozen=True)
class ScoreSummary:
    """The result of a run."""

    rows: int  # utterances with a row of scores, including those of an earlier run
    errors: int  # rows among them that could not be scored and say why
    shards: int  # files of the corpus
    resumed: int  # shards among them that an earlier run had finished
    quarantined: tuple[QuarantinedShard, ...]
    signature: str  # of the model
    seconds: float


def score(
    corpus: Source,
    model: M3ERFusion,
    out: Source,
    *,
    resume: bool = False,
    engine: Engine = "local",
    devices: Sequence[str] | None = None,
    batch_frames: int | Literal["auto"] = "auto",
    dtype: Precision = "float32",
    verify: bool = True,
    checksum: Checksum = "sampled",
    address: str | None = None,
    workers: int | None = None,
    progress: Callable[[ScoreProgress], None] | None = None,
) -> ScoreSummary:
    """Score a corpus, with or without labels, into a folder with one Parquet file per shard.

    A shard that cannot be read, or does not fit the model, is put in quarantine with the reason; the others are scored.
    A row that cannot be scored has an ``error``. Memory is bounded for shards of any size.

    Args:
        corpus: a folder of Parquet or Arrow IPC files, or one file: a local path, a URI, or a pair of a
            ``pyarrow.fs.FileSystem`` and a path.
        model: with a fitted check, if it has one.
        out: the folder to write to; :mod:`m3er_fast.scoring.output` lists its files.
        resume: continue an interrupted run in ``out``; an empty or missing folder starts a new one.
        engine: "local" (this process) or "ray"; both leave the same bytes.
        devices: such as ``["cuda:0", "cuda:1"]``, each with a copy of the model; None is the model's own device.
        batch_frames: as for :class:`Scorer`; "auto" keeps the number of a run that is resumed.
        dtype: as for :class:`Scorer`.
        verify: compare pages of Parquet with their checksums, where they have any.
        checksum: the part of each shard that is hashed, so that resuming with a changed shard is refused: size and both
            ends ("sampled"), or every byte ("full"), which reads the corpus once more.
        address: of a Ray cluster; None starts Ray on this machine.
        workers: number of Ray workers; None uses as many as there is room for.
        progress: called after every shard and, with the local engine, after every table of about 64 MiB.

    Raises:
        ValueError: there is no corpus, ``out`` is not empty and ``resume`` is False, the model fits no shard, or its
            check is not fitted.
        OutputMismatchError: ``out`` is to be resumed, but was made with another model, corpus, setting or version.
        OSError: ``out`` cannot be written to, for example for lack of space. Finished shards stay.
    """
    start = time.perf_counter()
    check_engine(engine, address, workers)
    if devices is not None and (isinstance(devices, str) or not devices):
        raise ValueError(f"devices must be a list of one or more, such as ['cpu'], or None, got {devices!r}")
    if engine == "ray":
        from m3er_fast.scoring.ray import run_ray

        if devices is not None and len(devices) > 1:
            raise ValueError(f"devices: each worker of engine 'ray' has one device, got {list(devices)}")
    plan = plan_shards(corpus, checksum)
    output = OutputFolder(locate(out), plan.shards, signature="", settings={})
    output.check(resume=resume)
    if batch_frames == "auto":
        batch_frames = _batch_frames_of(output) or "auto"
    scorers = make_scorers(model, devices, batch_frames, dtype)
    least = min(scorer.batch_frames for scorer in scorers)
    for scorer in scorers:
        scorer.batch_frames = least
    task = check_model_fits(plan, scorers[0])
    settings = {"batch_frames": least, "dtype": dtype, "checksum": checksum}
    output = replace(output, signature=scorers[0].signature, settings=settings)
    job = ScoringJob(plan, output, verify, keep_cached=not outgrows_page_cache(plan), label_task=task)
    # A cluster that does not answer is an error before anything is written.
    with nullcontext() if address is None else ray_cluster(address):
        output.begin(resume=resume)
        counter = RunCounter(job, progress)
        pending = counter.skip_finished()
        results: Iterator[ShardResult | int] = (
            run_local(job, pending, scorers)
            if engine == "local"
            else run_ray(job, pending, scorers[0].model, batch_frames=least, dtype=dtype, workers=workers)
        )
        try:
            with closing(results):  # type: ignore[type-var]
                for result in results:
                    counter.add(result)
        finally:  # an interrupted run leaves its complete quarantine list too
            counter.write_quarantine()
        counter.write_summary(engine, time.perf_counter() - start, _map_function(engine, workers))
        output.finish()
    return counter.summary(time.perf_counter() - start)


def iter_scores(
    corpus: Source, model: M3ERFusion, *, batch_frames: int | Literal["auto"] = "auto", verify: bool = True
) -> Iterator[pa.Table]:
    """Yield the scores of a corpus as Arrow tables, in order, without writing anything.

    The arguments are those of :func:`score`.

    Raises:
        CorpusError: a shard cannot be read; there is no quarantine here.
    """
    plan, scorer = plan_shards(corpus), Scorer(model, batch_frames=batch_frames)
    schemas = (read_schema(plan.corpus, shard) for shard in plan.shards)
    task = next((scorer.label_task(schema) for schema in schemas if schema is not None), None)
    read = partial(read_tables, plan.corpus, verify=verify)
    with closing(score_parts(read, plan.shards, scorer, label_task=task)) as parts:  # type: ignore[type-var]
        for part in parts:
            if part.error is not None:
                with naming(part.shard.name):
                    raise part.error
            if part.scores is not None:
                yield part.scores


class RunCounter:
    """Counts the rows, errors and quarantined shards of a run, and reports its progress; the same for every runner.

    Args:
        job: the run's.
        progress: called after every change.
    """

    def __init__(self, job: ScoringJob, progress: Callable[[ScoreProgress], None] | None = None) -> None:
        self._job, self._progress = job, progress
        self._sizes = {shard.name: shard.size for shard in job.plan.shards}
        self._order = {shard.name: index for index, shard in enumerate(job.plan.shards)}
        self._start = time.perf_counter()
        self._quarantine: list[QuarantinedShard] = []
        self._quarantine_written = (0, -_QUARANTINE_SECONDS)  # number of entries, and time
        self._shard_rows: dict[str, int] = {}
        self.done = self.resumed = self.rows = self.errors = 0
        self._own_rows = self._streamed_rows = self._bytes = self._all_bytes = 0

    def skip_finished(self) -> list[Shard]:
        """Count the shards that an earlier run finished, and return the others."""
        shards = self._job.plan.shards
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._job.output.finished, shards))
        pending = []
        for shard, finished in zip(shards, found, strict=True):
            if finished is None:
                pending.append(shard)
                continue
            self.done, self.resumed = self.done + 1, self.resumed + 1
            self.rows, self.errors = self.rows + finished.rows, self.errors + finished.errors
            self._shard_rows[shard.name] = finished.rows
        self._all_bytes = sum(shard.size for shard in pending)
        self._start = time.perf_counter()
        if self.resumed:
            self._report()
        return pending

    def add(self, result: ShardResult | int) -> None:
        """Count the result of a shard, or some rows of an unfinished one."""
        if isinstance(result, int):
            self._streamed_rows += result
        else:
            self.done += 1
            self.rows, self.errors = self.rows + result.rows, self.errors + result.errors
            self._own_rows += result.rows
            self._bytes += self._sizes[result.name]
            if result.reason is None:
                self._shard_rows[result.name] = result.rows
            else:
                self._quarantine.append(QuarantinedShard(result.name, result.reason))
        if time.perf_counter() - self._quarantine_written[1] >= _QUARANTINE_SECONDS:
            self.write_quarantine()
        self._report()

    @property
    def quarantined(self) -> list[QuarantinedShard]:
        """The shards in quarantine, in the order of the corpus."""
        return sorted(self._quarantine, key=lambda entry: self._order[entry.shard])

    def summary(self, seconds: float) -> ScoreSummary:
        """Return the counts of a finished run."""
        return ScoreSummary(
            rows=self.rows,
            errors=self.errors,
            shards=len(self._order),
            resumed=self.resumed,
            quarantined=tuple(self.quarantined),
            signature=self._job.output.signature,
            seconds=seconds,
        )

    def write_summary(self, engine: str, seconds: float, map_tasks: MapFunction) -> None:
        """Write the summary of a finished run."""
        finished = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        run = RunRecord(engine, self._own_rows, seconds, self.resumed, finished)
        write_summary(self._job, self._shard_rows, self.quarantined, run, map_tasks)

    def write_quarantine(self) -> None:
        """Write the quarantine list if it has grown since it was last written."""
        if len(self._quarantine) > self._quarantine_written[0]:
            self._job.output.quarantine(self.quarantined)
            self._quarantine_written = len(self._quarantine), time.perf_counter()

    def _report(self) -> None:
        if self._progress is None:
            return
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        left = elapsed * (self._all_bytes - self._bytes) / self._bytes if self._bytes else None
        own = max(self._own_rows, self._streamed_rows)
        rows = self.rows - self._own_rows + own
        self._progress(ScoreProgress(self.done, len(self._sizes), rows, own / elapsed, left))


def _map_function(engine: str, workers: int | None) -> MapFunction:
    """Return the map that counts the scores of a finished run: on the connected cluster, or else in threads.

    Starting Ray once more on this machine would take longer.
    """
    if engine == "ray" and check_ray(workers).is_initialized():
        return partial(ray_map, workers=workers)
    return map_in_threads


def check_model_fits(plan: Plan, scorer: Scorer) -> str | None:
    """Check that the model fits at least one shard: one that fits none is the wrong model.

    Stops at the first shard that fits. Shards whose schema cannot be read are skipped.

    Returns:
        The task of that shard's labels, or None if it has none: all scores have the same columns.

    Raises:
        CorpusError: of the first shard, if none fits.
    """
    misfit: CorpusError | None = None
    for shard in plan.shards:
        schema = read_schema(plan.corpus, shard)
        if schema is None:  # the run will put it in quarantine
            continue
        try:
            scorer.check_schema(schema)
        except CorpusError as error:
            misfit = misfit or CorpusError(f"{shard.path}: {error}")
        else:
            return scorer.label_task(schema)
    if misfit is not None:
        raise misfit
    return None


def _batch_frames_of(output: OutputFolder) -> int | None:
    """Return the number that an earlier run in this folder used, or None: other batches would round differently."""
    try:
        manifest: dict[str, Any] = output.manifest() or {}
    except OutputMismatchError:
        return None
    settings = manifest.get("settings")
    frames = settings.get("batch_frames") if isinstance(settings, dict) else None
    return frames if isinstance(frames, int) and frames > 0 else None
