"""The Ray runner: a pool of actors, each of which calls the function of one shard that the local runner calls too.

Ray Data hands out the *list* of shards, a row each; data are read and written by the actors themselves. What Ray does
about failures is not relied on. A shard may be scored twice, which gives the same bytes; an error of ours comes back as
a value and is raised here; and what came back is counted against the list: a shard whose worker died over and over goes
to quarantine instead of being dropped, or of killing workers for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.plan import Shard
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.shard import ScoringJob, ShardResult, score_shard

if TYPE_CHECKING:
    import pyarrow as pa

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

# Times that a task is begun before the death of its worker is blamed on it.
_ATTEMPTS = 3
# Tasks that Ray is told of one by one: each costs about 3 ms of the driver, and it holds them all.
_MOST_BLOCKS = 4096
_OBJECT_STORE_BYTES = 200 * 2**20  # the tables of tasks and results are small


def run_ray(
    job: ScoringJob,
    shards: Sequence[Shard],
    model: M3ERFusion,
    *,
    batch_frames: int,
    dtype: str,
    address: str | None = None,
    workers: int | None = None,
) -> Iterator[ShardResult]:
    """Score shards with Ray, and yield what became of each, in no particular order.

    Closing the iterator, or whatever is raised in it, ends the actors; the shards that they have at hand are dropped.

    Args:
        job: where to read from and to write to; every worker must reach both.
        shards: some of the plan's.
        model: sent to every worker once; where it is on CUDA, each gets a GPU.
        batch_frames: as the scorer of this machine resolved it.
        dtype: of the network.
        address: of a cluster, such as ``"auto"`` or ``"ray://head:10001"``; None starts Ray on this machine.
        workers: actors; None takes as many as there is room for.

    Raises:
        ImportError: Ray is missing.
        OSError: scores cannot be written.
        RuntimeError: a worker has another version, or Ray itself fails.
    """
    from m3er_fast import __version__

    device = next(model.parameters()).device.type
    content = pickle.dumps(model.to("cpu") if device != "cpu" else model)
    work = _ScoreShard(job, content, device, batch_frames, dtype, torch.get_num_threads(), __version__)
    for index, result in _run(work, shards, address=address, workers=workers, gpus=int(device == "cuda")):
        if isinstance(result, _Lost):
            result = ShardResult(shards[index].name, 0, 0, f"its worker died {_ATTEMPTS} times: out of memory?")
        yield result


def ray_map(
    function: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    *,
    address: str | None = None,
    workers: int | None = None,
) -> Iterator[_Result]:
    """Call a picklable function with every task in an actor pool, and yield the results in the order of the tasks.

    Raises:
        ImportError: Ray is missing.
        RuntimeError: a task lost its worker again and again; and whatever the function raises.
    """
    waiting: dict[int, Any] = {}
    following = 0
    results = _run(_Threaded(function, torch.get_num_threads()), tasks, address=address, workers=workers, gpus=0)
    for index, result in results:
        if isinstance(result, _Lost):
            raise RuntimeError(f"task {index} of {len(tasks)}: its worker died {_ATTEMPTS} times: out of memory?")
        waiting[index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


class _ScoreShard:
    """Scores a shard; the scorer is made where it is needed, once a worker."""

    def __init__(
        self, job: ScoringJob, model: bytes, device: str, batch_frames: int, dtype: str, threads: int, version: str
    ) -> None:
        self.job, self.model, self.device, self.batch_frames, self.dtype = job, model, device, batch_frames, dtype
        self.threads, self.version = threads, version
        self.scorer: Scorer | None = None

    def __call__(self, shard: Shard) -> ShardResult:
        if self.scorer is None:
            self.scorer = self._make_scorer()
        # An earlier attempt may have died after it was done.
        finished = self.job.output.finished(shard)
        if finished is not None:
            return ShardResult(shard.name, finished.rows, finished.errors)
        return score_shard(self.job, shard, self.scorer)

    def _make_scorer(self) -> Scorer:
        from m3er_fast import __version__

        if __version__ != self.version:
            raise RuntimeError(f"a worker has m3er-fast {__version__}, but this run is of {self.version}")
        # Another number of threads than the driver's may round otherwise; Ray sets one of its own.
        torch.set_num_threads(self.threads)
        model = pickle.loads(self.model)
        scorer = Scorer(model.to(self.device), batch_frames=self.batch_frames, dtype=self.dtype)  # type: ignore[arg-type]
        if scorer.signature != self.job.output.signature:
            raise RuntimeError("the model has changed on its way to a worker")
        return scorer


class _Threaded(NamedTuple):
    """A function that computes with as many threads as the driver does."""

    function: Callable[[Any], Any]
    threads: int

    def __call__(self, task: Any) -> Any:
        torch.set_num_threads(self.threads)
        return self.function(task)


class _Lost:
    """In place of the result of a task whose worker died each time."""


class _Actor:
    """What Ray Data makes one of in each actor: takes tables of one task, gives tables of one result."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __call__(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        try:
            result = pickle.dumps(self.work(pickle.loads(table["task"][0].as_py())))
            failed = False
        except Exception as error:
            result, failed = _dump_error(error), True
        return pa.table({"index": table["index"], "result": pa.array([result], pa.binary()), "failed": [failed]})


def _dump_error(error: Exception) -> bytes:
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # whatever its class demands
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content


def _run(
    work: Callable[[Any], Any], tasks: Sequence[Any], *, address: str | None, workers: int | None, gpus: int
) -> Iterator[tuple[int, Any]]:
    """Yield (index, result) of every task, :class:`_Lost` where there is none."""
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers must be a positive int, got {workers!r}")
    if not tasks:
        return
    ray = _import_ray()
    cpus = 1 if gpus else torch.get_num_threads()
    with _connected(ray, address, workers, cpus, len(pickle.dumps(work))):
        if workers is None:
            resources = ray.cluster_resources()
            workers = max(1, int(resources.get("GPU", 0) if gpus else resources.get("CPU", 1) // cpus))
        pending = set(range(len(tasks)))
        a_block = -(-len(tasks) // _MOST_BLOCKS)
        while pending:
            for index, result in _attempt(
                work, tasks, sorted(pending), a_block, min(workers, len(pending)), cpus, gpus
            ):
                pending.discard(index)
                yield index, result
            if a_block == 1:
                break
            a_block = 1  # those that shared a block with one that kills workers may be all right
        for index in sorted(pending):
            yield index, _Lost()


def _attempt(
    work: Callable[[Any], Any],
    tasks: Sequence[Any],
    chosen: Sequence[int],
    a_block: int,
    workers: int,
    cpus: int,
    gpus: int,
) -> Iterator[tuple[int, Any]]:
    """Yield (index, result) of the chosen tasks that have one."""
    import pyarrow as pa
    import ray.data

    blocks = [
        pa.table({"index": part, "task": pa.array([pickle.dumps(tasks[index]) for index in part], pa.binary())})
        for part in (chosen[start : start + a_block] for start in range(0, len(chosen), a_block))
    ]
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.max_errored_blocks
    # Errors of ours are values, so an errored block is a dead worker's: the others go on, and it is counted as missing.
    context.enable_progress_bars, context.max_errored_blocks = False, -1
    try:
        results = ray.data.from_arrow(blocks).map_batches(
            _Actor,
            fn_constructor_args=(work,),
            batch_size=1,
            batch_format="pyarrow",  # pandas would turn a fixed-size list into objects
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=_ATTEMPTS - 1,
        )
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for index, content, failed in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
                result = pickle.loads(content)
                if failed:
                    raise result
                yield index, result
    finally:
        context.enable_progress_bars, context.max_errored_blocks = before


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray needs Ray: pip install 'm3er-fast[ray]'") from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str | None, workers: int | None, cpus: int, sent: int) -> Iterator[None]:
    """A connection to Ray: the one that there is, or a new one, which ends with the block."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {
            "address": "local",
            "num_cpus": None if workers is None else workers * cpus,
            "object_store_memory": _OBJECT_STORE_BYTES + 2 * sent,
            "include_dashboard": False,
        }
    with _handlers_kept(), _quiet():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, which is the command line's to answer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's own processes log to files of their own; on this one's stderr they would only repeat what is handled."""
    name = "RAY_BACKEND_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "fatal")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
