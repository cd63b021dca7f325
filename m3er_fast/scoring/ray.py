"""The Ray runner: workers on one machine or a cluster, each of which scores a shard at a time as the local runner does.

Ray starts the workers and carries messages of a few hundred bytes: shards go out, counts come back. Data are read and
written by the workers themselves. What Ray does about failures is not relied on: a worker that is lost is replaced and
its shard begun again, which gives the same bytes; a shard that has lost several goes to quarantine; what our own code
raises in a worker is raised here.

Workers are plain actors. Ray Data's pool of actors waits for ever for one that left with exit code 0
(ray-project/ray#62746), makes a lost shard a row that is missing, and takes seconds longer to start.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import logging
import pickle
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch

from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.shard import ScoringJob, ShardResult, score_shards
from m3er_fast.shards.plan import Shard

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_ATTEMPTS = 3  # times that a task is begun before the loss of its worker is blamed on it
_PATIENCE_S = 60.0  # for the first worker, before somebody is told
_CONNECT_S = 10.0
_GRACE_S = 10.0  # for a worker to drop what it has at hand
_OBJECT_STORE_BYTES = 100 * 2**20  # beside the model
_AHEAD = 4  # tasks a worker


def run_ray(
    job: ScoringJob,
    shards: Sequence[Shard],
    model: M3ERFusion,
    *,
    batch_frames: int,
    dtype: str,
    workers: int | None = None,
) -> Iterator[ShardResult]:
    """Score shards with Ray, and yield what became of each as they are finished.

    Where this process is not connected to Ray, it is started on this machine, and ends with the iterator. Closing the
    iterator, or whatever is raised in it, ends the workers; the shards that they have at hand are dropped.

    Args:
        job: where to read from and to write to; every worker must reach both.
        shards: some of the plan's.
        model: sent to every worker once; where it is on CUDA, each gets a GPU.
        batch_frames: as the scorer of this machine resolved it.
        dtype: of the network.
        workers: how many; None takes as many as there is room for.

    Raises:
        ImportError: Ray is missing.
        OSError: scores cannot be written.
        RuntimeError: no worker can be started, or it has another version.
    """
    device = next(model.parameters()).device.type
    work = _ScoreShard(job, model, device, batch_frames, dtype)
    for index, result in _run(work, shards, workers=workers, gpus=int(device == "cuda")):
        if isinstance(result, _Lost):
            result = ShardResult(shards[index].name, 0, 0, str(result))
        yield result


def ray_map(
    function: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    *,
    workers: int | None = None,
) -> Iterator[_Result]:
    """Call a picklable function with every task in workers of Ray, and yield the results in the order of the tasks.

    However long one task takes, few results of later ones are kept until it is their turn. Where this process is not
    connected to Ray, it is started on this machine, and ends with the iterator.

    Args:
        function: of one task.
        tasks: what to call it with.
        workers: how many; None takes as many as there is room for.

    Raises:
        ImportError: Ray is missing.
        RuntimeError: a task has lost several workers; and whatever the function raises.
        ValueError: ``workers`` is out of range.
    """
    early: dict[int, _Result] = {}
    following = 0
    for index, result in _run(_CallFunction(function), tasks, workers=workers, gpus=0, ahead=_AHEAD):
        if isinstance(result, _Lost):
            raise RuntimeError(f"task {index} of {len(tasks)}: {result}")
        early[index] = result
        while following in early:
            yield early.pop(following)
            following += 1


@contextlib.contextmanager
def ray_session(address: str | None, workers: int | None = None) -> Iterator[None]:
    """Ray for all that is called in the block.

    Args:
        address: of a cluster, as :func:`ray_cluster` takes it; None uses the connection that there is, or starts Ray
            on this machine.
        workers: that Ray on this machine is to have room for.

    Raises:
        ImportError: Ray is missing.
        ValueError: no cluster answers at ``address``, or ``workers`` is out of range.
    """
    ray = check_ray(workers)
    cpus = None if workers is None else workers * torch.get_num_threads()
    with _ray_here(ray, cpus, _OBJECT_STORE_BYTES) if address is None else ray_cluster(address):
        yield


def check_ray(workers: int | None = None) -> Any:
    """Return the package, if it is there; nothing is started.

    Raises:
        ImportError: Ray is missing.
        ValueError: ``workers`` is out of range.
    """
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers must be a positive int, got {workers!r}")
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine 'ray' needs Ray: pip install 'm3er-fast[ray]'") from error
    return ray


@contextlib.contextmanager
def ray_cluster(address: str) -> Iterator[None]:
    """A connection to a cluster, which ends with the block.

    Args:
        address: such as ``"10.0.0.1:6379"``, or ``"auto"`` for the cluster that this machine belongs to.

    Raises:
        ImportError: Ray is missing.
        ValueError: no cluster answers at ``address``, or this process is connected to one already.
    """
    ray = check_ray()
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:  # Ray itself would try for a quarter of an hour
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"address: nobody listens at {address!r}: {error}") from error
    if ray.is_initialized():
        raise ValueError(f"address must be None where this process is connected to Ray already, got {address!r}")
    try:
        _init(ray, address=address)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"address: no Ray cluster to be used answers at {address!r}: {_last_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


class _Work(Protocol):
    """What a worker does with a task, until it finds itself cancelled."""

    def __call__(self, task: Any, is_canceled: Callable[[], bool]) -> Any: ...


class _ScoreShard:
    """Scores a shard. It can be pickled; the scorer is made where it is needed, once a worker."""

    def __init__(self, job: ScoringJob, model: M3ERFusion, device: str, batch_frames: int, dtype: str) -> None:
        from m3er_fast import __version__

        self._job = job.without_shards()
        self._model = pickle.dumps(copy.deepcopy(model).to("cpu"))
        self._device, self._batch_frames, self._dtype = device, batch_frames, dtype
        self._version = __version__
        self._scorer: Scorer | None = None

    def __call__(self, task: Shard, is_canceled: Callable[[], bool]) -> ShardResult:
        if self._scorer is None:
            self._scorer = self._make_scorer()
        finished = self._job.output.finished(task)
        if finished is not None:  # a worker was lost after it had written them
            return ShardResult(task.name, finished.rows, finished.errors)
        with contextlib.closing(score_shards(self._job, [task], self._scorer)) as scored:  # type: ignore[type-var]
            for result in scored:
                if isinstance(result, ShardResult):
                    return result
                if is_canceled():
                    break
        raise RuntimeError("the run is over")

    def _make_scorer(self) -> Scorer:
        from m3er_fast import __version__

        if __version__ != self._version:
            raise RuntimeError(f"a worker has m3er-fast {__version__}, but this run is of {self._version}")
        model = pickle.loads(self._model).to(self._device)
        scorer = Scorer(model, batch_frames=self._batch_frames, dtype=self._dtype)  # type: ignore[arg-type]
        if scorer.signature != self._job.output.signature:
            raise RuntimeError("the model has changed on its way to a worker")
        return scorer


class _CallFunction:
    """Calls a function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, task: Any, is_canceled: Callable[[], bool]) -> Any:
        return self._function(task)


class _Lost(str):
    """In place of a result: why there is none."""


class _Worker:
    """What Ray makes an actor of."""

    def __init__(self, work: _Work, threads: int) -> None:
        self._work, self._threads = work, threads

    def ready(self) -> None:
        """Return once this worker runs."""

    def do(self, task: Any) -> bytes:
        """Return the pickled result; arrays that Ray carries would be read-only, and keep its store full."""
        import ray

        # Another number of threads than the driver's may round otherwise; Ray sets one of its own.
        torch.set_num_threads(self._threads)
        return pickle.dumps(self._work(task, ray.get_runtime_context().is_canceled))


def _run(
    work: _Work, tasks: Sequence[Any], *, workers: int | None, gpus: int, ahead: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (index, result) of every task as they are finished, :class:`_Lost` where there is no result.

    No task is begun that comes ``ahead`` a worker after one that is not finished; None is no limit.
    """
    ray = check_ray(workers)
    if not tasks:
        return
    cpus = 1 if gpus else torch.get_num_threads()
    sent = len(pickle.dumps(work))
    with _ray_here(ray, None if workers is None else workers * cpus, _OBJECT_STORE_BYTES + 2 * sent):
        workers = min(workers or _room(ray, cpus, gpus), len(tasks))
        pool = _Pool(ray, work, tasks, cpus, gpus, len(tasks) if ahead is None else ahead * workers)
        try:
            yield from pool.run(workers)
        finally:
            pool.close()


class _Pool:
    """Workers with one task each at a time, so that it is known what a worker was lost with."""

    def __init__(self, ray: Any, work: _Work, tasks: Sequence[Any], cpus: int, gpus: int, ahead: int) -> None:
        self._ray, self._tasks, self._ahead = ray, tasks, ahead
        self._needs = f"{gpus} GPU" if gpus else f"{cpus} CPUs (the threads of this process)"
        self._work, self._threads = ray.put(work), torch.get_num_threads()
        self._actor = ray.remote(_Worker).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")
        self._waiting = list(range(len(tasks)))  # a heap: those that were lost come first again
        self._attempts = [0] * len(tasks)
        # By what is waited for: a worker and its task, which is None while the worker starts.
        self._busy: dict[Any, tuple[Any, int | None]] = {}
        self._idle: list[Any] = []

    def run(self, workers: int) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of every task."""
        from ray.exceptions import RayError, RayTaskError

        undone, stillborn = len(self._tasks), 0
        for _ in range(workers):
            self._start()
        self._expect_a_worker()
        while undone:
            [ref], _ = self._ray.wait(list(self._busy))
            worker, index = self._busy.pop(ref)
            try:
                result = self._ray.get(ref)
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                self._ray.kill(worker)
                result = self._lost(index, error)
                stillborn = stillborn + 1 if index is None else 0
                if stillborn == _ATTEMPTS:
                    raise RuntimeError(f"no worker can be started: {_last_line(error)}") from error
                if self._waiting:
                    self._start()
            else:
                stillborn = 0
                self._idle.append(worker)
            self._give()
            if result is not None and index is not None:
                undone -= 1
                yield index, result if isinstance(result, _Lost) else pickle.loads(result)

    def close(self) -> None:
        """End all workers, after they had the time to drop what they have at hand."""
        working = [ref for ref, (_, index) in self._busy.items() if index is not None]
        for ref in working:
            self._ray.cancel(ref)
        if working:
            self._ray.wait(working, num_returns=len(working), timeout=_GRACE_S)
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)

    def _start(self) -> None:
        worker = self._actor.remote(self._work, self._threads)
        self._busy[worker.ready.remote()] = worker, None

    def _expect_a_worker(self) -> None:
        """Wait for the first; a cluster that grows may take minutes, one that is too small takes for ever."""
        ready, _ = self._ray.wait(list(self._busy), timeout=_PATIENCE_S)
        if not ready:
            warnings.warn(
                f"no worker has started in {_PATIENCE_S:.0f} s: is there a machine with {self._needs} free?",
                stacklevel=2,
            )

    def _give(self) -> None:
        """Give the workers that have nothing to do the tasks that may be begun; those that none waits for make room."""
        while self._idle and self._waiting:
            unfinished = min((index for _, index in self._busy.values() if index is not None), default=self._waiting[0])
            if self._waiting[0] >= unfinished + self._ahead:
                return
            worker, index = self._idle.pop(), heapq.heappop(self._waiting)
            self._busy[worker.do.remote(self._tasks[index])] = worker, index
        while self._idle:
            self._ray.kill(self._idle.pop())

    def _lost(self, index: int | None, error: Exception) -> _Lost | None:
        if index is None:
            return None
        self._attempts[index] += 1
        if self._attempts[index] < _ATTEMPTS:
            heapq.heappush(self._waiting, index)
            return None
        return _Lost(f"its worker was lost {_ATTEMPTS} times ({type(error).__name__}); was it out of memory?")


def _room(ray: Any, cpus: int, gpus: int) -> int:
    """How many workers there is room for."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(1, sum(int(had.get("GPU", 0)) if gpus else int(had.get("CPU", 0) // cpus) for had in machines))


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


@contextlib.contextmanager
def _ray_here(ray: Any, cpus: int | None, object_store_bytes: int) -> Iterator[None]:
    """The connection to Ray that there is, or Ray on this machine, which ends with the block."""
    if ray.is_initialized():
        yield
        return
    _init(ray, address="local", num_cpus=cpus, object_store_memory=object_store_bytes, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


def _init(ray: Any, **options: Any) -> None:
    with _handlers_kept(), warnings.catch_warnings():
        # Ray 2.54 tells every driver how later versions will treat workers without a GPU; ours need nothing of that.
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


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
