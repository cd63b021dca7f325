"""A run: plan, check, let a runner score every shard, keep count, and say when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from m3er_fast.corpus.base import CorpusError, naming
from m3er_fast.execution.engine import Engine, check_engine
from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.local import make_scorers, run_local
from m3er_fast.scoring.output import OutputFolder, OutputMismatchError, check_folder, read_manifest
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.shard import ScoringJob, ShardResult, read_tables, scored_parts
from m3er_fast.scoring.summary import MapFunction, RunRecord, map_in_threads, write_summary
from m3er_fast.shards.page_cache import outgrows_page_cache
from m3er_fast.shards.plan import Checksum, Location, Plan, QuarantinedShard, Shard, Source, locate, plan_shards
from m3er_fast.shards.reader import read_schema

if TYPE_CHECKING:
    import pyarrow as pa


_QUARANTINE_SECONDS = 1.0  # between two writings of the list, each of which is of the whole list
_THREADS = 16  # looking for finished shards waits for storage, not for a core


class ScoreProgress(NamedTuple):
    """How far a run is."""

    done: int  # shards, those of an earlier run and those in quarantine among them
    shards: int
    rows: int  # utterances scored so far, by an earlier run too
    rate: float  # utterances a second, by this run
    seconds_left: float | None  # by the bytes of the shards that are not done; None before the first is


@dataclass(frozen=True)
class ScoreSummary:
    """What a run left in its folder."""

    rows: int  # utterances with a row of scores, those of an earlier run among them
    errors: int  # of them, those that could not be scored: their row says why
    shards: int  # files of the corpus
    resumed: int  # of them, those that an earlier run had finished
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
    dtype: Literal["float32", "bfloat16"] = "float32",
    verify: bool = True,
    checksum: Checksum = "sampled",
    address: str | None = None,
    workers: int | None = None,
    progress: Callable[[ScoreProgress], None] | None = None,
) -> ScoreSummary:
    """Score a corpus, with or without labels, into a folder of Parquet files, one a shard.

    A shard that cannot be read, or does not fit the model, goes to the quarantine list with the reason, and the others
    are scored; a row that cannot be scored has an ``error``. Memory is bounded, however large a shard is.

    Args:
        corpus: a folder of Parquet or Arrow IPC files, or one file: a local path, a URI, or a pair of a
            ``pyarrow.fs.FileSystem`` and a path.
        model: with a fitted check, if it has one.
        out: the folder to write to; :mod:`m3er_fast.scoring.output` says what it will hold.
        resume: go on with what an interrupted run left in ``out``; an empty or missing folder just starts.
        engine: "local", in this process, or "ray"; both leave the same bytes.
        devices: such as ``["cuda:0", "cuda:1"]``, each with a copy of the model; None is where the model is.
        batch_frames: as :class:`Scorer` takes it; "auto" keeps the number of the run that is resumed.
        dtype: as :class:`Scorer` takes it.
        verify: compare pages of Parquet with their checksums, where they have any.
        checksum: what of each shard the run remembers, to refuse a resumption with another one: size and both ends
            ("sampled"), or every byte ("full"), for which the corpus is read once more.
        address: of a Ray cluster; None starts Ray on this machine.
        workers: of Ray; None takes as many as there is room for.
        progress: called after every shard and, of the local engine, after every table of about 64 MiB.

    Raises:
        ValueError: there is no corpus, ``out`` is not empty and ``resume`` is False, the model does not fit any
            shard, or its check is not fitted.
        OutputMismatchError: ``out`` is to be resumed, but was made with another model, corpus, setting or version.
        OSError: ``out`` cannot be written to, for example for lack of space. Finished shards stay.
    """
    start = time.perf_counter()
    check_engine(engine, address, workers)
    if devices is not None and (isinstance(devices, str) or not devices):
        raise ValueError(f"devices must be a list of one or more, such as ['cpu'], or None, got {devices!r}")
    if engine == "ray":
        from m3er_fast.scoring.ray import ray_cluster, run_ray

        if devices is not None and len(devices) > 1:
            raise ValueError(f"devices: with engine 'ray' each worker has one, got {list(devices)}")
    plan = plan_shards(corpus, checksum)
    location = locate(out)
    check_folder(location, resume=resume)
    if batch_frames == "auto":
        batch_frames = _batch_frames_of(location) or "auto"
    scorers = make_scorers(model, devices, batch_frames, dtype)
    least = min(scorer.batch_frames for scorer in scorers)
    for scorer in scorers:
        scorer.batch_frames = least
    check_model_fits(plan, scorers[0])
    settings = {"batch_frames": least, "dtype": dtype, "checksum": checksum}
    output = OutputFolder(location, plan.shards, scorers[0].signature, settings)
    job = ScoringJob(plan, output, verify, keep_cached=not outgrows_page_cache(plan))
    # A cluster that does not answer is known before anything is written.
    with nullcontext() if address is None else ray_cluster(address):
        output.begin(resume=resume)
        tally = Tally(job, progress)
        pending = tally.skip_finished()
        results: Iterator[ShardResult | int] = (
            run_local(job, pending, scorers)
            if engine == "local"
            else run_ray(job, pending, scorers[0].model, batch_frames=least, dtype=dtype, workers=workers)
        )
        try:
            with closing(results):  # type: ignore[type-var]
                for result in results:
                    tally.add(result)
        finally:  # an interrupted run too leaves the list of what it met
            tally.write_quarantine()
        tally.write_summary(engine, time.perf_counter() - start, _map_function(engine, workers))
        output.finish()
    return tally.summary(time.perf_counter() - start)


def iter_scores(
    corpus: Source, model: M3ERFusion, *, batch_frames: int | Literal["auto"] = "auto", verify: bool = True
) -> Iterator[pa.Table]:
    """Yield the scores of a corpus as Arrow tables, in order, and write nothing: for notebooks.

    Arguments are those of :func:`score`.

    Raises:
        CorpusError: a shard cannot be read; nothing is put in quarantine here.
    """
    plan, scorer = plan_shards(corpus), Scorer(model, batch_frames=batch_frames)
    with closing(scored_parts(partial(read_tables, plan.corpus, verify=verify), plan.shards, scorer)) as scored:  # type: ignore[type-var]
        for part in scored:
            if part.error is not None:
                with naming(part.shard.name):
                    raise part.error
            if part.scores is not None:
                yield part.scores


class Tally:
    """Keeps count of a run, whichever runner it has: rows, errors, quarantine and progress.

    Args:
        job: the run's.
        progress: told of every change.
    """

    def __init__(self, job: ScoringJob, progress: Callable[[ScoreProgress], None] | None = None) -> None:
        self._job, self._progress = job, progress
        self._sizes = {shard.name: shard.size for shard in job.plan.shards}
        self._order = {shard.name: index for index, shard in enumerate(job.plan.shards)}
        self._start = time.perf_counter()
        self._quarantine: list[QuarantinedShard] = []
        self._quarantine_told = (0, -_QUARANTINE_SECONDS)  # how many of them, and when
        self._shard_rows: dict[str, int] = {}
        self.done = self.resumed = self.rows = self.errors = 0
        self._own_rows = self._live_rows = self._bytes = self._all_bytes = 0

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
        """Count what became of a shard, or some rows of one that is not finished."""
        if isinstance(result, int):
            self._live_rows += result
        else:
            self.done += 1
            self.rows, self.errors = self.rows + result.rows, self.errors + result.errors
            self._own_rows += result.rows
            self._bytes += self._sizes[result.name]
            if result.reason is None:
                self._shard_rows[result.name] = result.rows
            else:
                self._quarantine.append(QuarantinedShard(result.name, result.reason))
        if time.perf_counter() - self._quarantine_told[1] >= _QUARANTINE_SECONDS:
            self.write_quarantine()
        self._report()

    @property
    def quarantined(self) -> list[QuarantinedShard]:
        """What could not be scored, in the order of the shards."""
        return sorted(self._quarantine, key=lambda entry: self._order[entry.shard])

    def summary(self, seconds: float) -> ScoreSummary:
        """Return the counts of a finished run."""
        listed = tuple(self.quarantined)
        return ScoreSummary(
            self.rows, self.errors, len(self._order), self.resumed, listed, self._job.output.signature, seconds
        )

    def write_summary(self, engine: str, seconds: float, map_tasks: MapFunction) -> None:
        """Write what the folder of a finished run is summarised by."""
        finished = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        run = RunRecord(engine, self._own_rows, seconds, self.resumed, finished)
        write_summary(self._job, self._shard_rows, self.quarantined, run, map_tasks)

    def write_quarantine(self) -> None:
        """Write the quarantine list, if there is more in it than was written."""
        if len(self._quarantine) > self._quarantine_told[0]:
            self._job.output.quarantine(self.quarantined)
            self._quarantine_told = len(self._quarantine), time.perf_counter()

    def _report(self) -> None:
        if self._progress is None:
            return
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        left = elapsed * (self._all_bytes - self._bytes) / self._bytes if self._bytes else None
        own = max(self._own_rows, self._live_rows)
        rows = self.rows - self._own_rows + own
        self._progress(ScoreProgress(self.done, len(self._sizes), rows, own / elapsed, left))


def _map_function(engine: str, workers: int | None) -> MapFunction:
    """What counts the scores of a finished run: the cluster that this process is connected to, or else threads.

    Starting Ray once more on this machine would take longer.
    """
    if engine == "ray":
        from m3er_fast.scoring.ray import check_ray, ray_map

        if check_ray(workers).is_initialized():
            return partial(ray_map, workers=workers)
    return map_in_threads


def check_model_fits(plan: Plan, scorer: Scorer) -> None:
    """Raise if every shard with a readable schema contradicts the model: then it is the wrong model, not a bad shard.

    Stops at the first shard that fits.
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
            return
    if misfit is not None:
        raise misfit


def _batch_frames_of(location: Location) -> int | None:
    """What an earlier run in this folder used: other batches would round otherwise."""
    try:
        manifest: dict[str, Any] = read_manifest(location) or {}
    except OutputMismatchError:
        return None
    settings = manifest.get("settings")
    frames = settings.get("batch_frames") if isinstance(settings, dict) else None
    return frames if isinstance(frames, int) and frames > 0 else None
