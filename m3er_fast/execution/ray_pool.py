"""A pool of Ray workers that run tasks, on this machine or on a cluster.

Ray starts the workers and carries small messages: tasks go out, results come back. Failures are handled here and not
by Ray. A lost worker is replaced and its task started again. A task that loses several workers is reported as lost. An
exception that a task raises in a worker is raised in this process.

Workers are plain actors. Ray Data's pool of actors waits forever for an actor that exited with code 0
(ray-project/ray#62746), turns a lost task into a missing row, and takes seconds longer to start.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import pickle
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from m3er_fast._validation import check_positive_int
from m3er_fast.execution.tasks import LostTask

WARN_AFTER_S = 60.0
"""Seconds without a single running worker after which a warning is issued."""

_MAX_ATTEMPTS = 3  # of a task before the loss of its workers is blamed on it; of starting a worker
_CONNECT_TIMEOUT_S = 10.0
_CANCEL_TIMEOUT_S = 10.0  # for a worker to abandon its current task
_OBJECT_STORE_BYTES = 100 * 2**20  # in addition to the pickled function
_TASKS_AHEAD_PER_WORKER = 4  # limit of ray_map, which keeps results until it is their turn

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class WorkerFunction(Protocol):
    """A picklable function that runs a task, and may stop early once it is cancelled."""

    def __call__(self, task: Any, is_canceled: Callable[[], bool]) -> Any:
        """Return the result of a task; ``is_canceled`` says whether it is no longer needed."""


def ray_map(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], *, workers: int | None = None
) -> Iterator[_Result]:
    """Call a picklable function with every task in Ray workers, and yield the results in the order of the tasks.

    Few results are held back, however long one task takes. Ray is started on this machine if this process is not
    connected to it, and stopped when the iterator ends.

    Args:
        function: called with one task at a time.
        tasks: arguments of the calls.
        workers: number of workers; None uses as many as there is room for.

    Raises:
        ImportError: Ray is missing.
        RuntimeError: a task has lost several workers.
        ValueError: ``workers`` is out of range.
        Exception: whatever the function raises.
    """
    early: dict[int, _Result] = {}
    next_index = 0
    results = run_tasks(_IgnoringCancellation(function), tasks, workers=workers, tasks_ahead=_TASKS_AHEAD_PER_WORKER)
    for index, result in results:
        if isinstance(result, LostTask):
            raise RuntimeError(f"task {index} of {len(tasks)}: {result.reason}")
        early[index] = result
        while next_index in early:
            yield early.pop(next_index)
            next_index += 1


def run_tasks(
    function: WorkerFunction,
    tasks: Sequence[Any],
    *,
    workers: int | None = None,
    gpus_per_worker: int = 0,
    tasks_ahead: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run tasks in Ray workers, and yield (index, result) of each as it finishes.

    A result is a :class:`LostTask` if the task has lost several workers. Ray is started on this machine if this process
    is not connected to it, and stopped when the iterator ends. Closing the iterator, or an exception in it, ends the
    workers and abandons their tasks.

    Args:
        function: pickled and sent to every worker once.
        tasks: arguments of the calls.
        workers: number of workers; None uses as many as there is room for.
        gpus_per_worker: GPUs that each worker reserves. A worker without a GPU reserves as many CPUs as this process
            has torch threads.
        tasks_ahead: a task is not started while one that is at least this many times ``workers`` before it is
            unfinished; None is no limit.

    Raises:
        ImportError: Ray is missing.
        RuntimeError: no worker can be started.
        ValueError: ``workers`` is out of range.
        Exception: whatever the function raises.
    """
    ray = check_ray(workers)
    if not tasks:
        return
    cpus = 1 if gpus_per_worker else torch.get_num_threads()
    function_bytes = len(pickle.dumps(function))
    total_cpus = None if workers is None else workers * cpus
    with _connection(ray, total_cpus, _OBJECT_STORE_BYTES + 2 * function_bytes):
        workers = min(workers or count_possible_workers(ray, cpus, gpus_per_worker), len(tasks))
        limit = len(tasks) if tasks_ahead is None else tasks_ahead * workers
        pool = _Pool(ray, function, tasks, cpus, gpus_per_worker, limit)
        try:
            yield from pool.run(workers)
        finally:
            pool.close()


@contextlib.contextmanager
def ray_session(address: str | None, workers: int | None = None) -> Iterator[None]:
    """Keep a connection to Ray open for the block, so that every call in it uses the same Ray.

    Args:
        address: of a cluster, as for :func:`ray_cluster`; None uses the existing connection, or starts Ray on this
            machine.
        workers: number of workers that Ray on this machine must have room for.

    Raises:
        ImportError: Ray is missing.
        ValueError: no cluster answers at ``address``, or ``workers`` is out of range.
    """
    ray = check_ray(workers)
    cpus = None if workers is None else workers * torch.get_num_threads()
    with _connection(ray, cpus, _OBJECT_STORE_BYTES) if address is None else ray_cluster(address):
        yield


@contextlib.contextmanager
def ray_cluster(address: str) -> Iterator[None]:
    """Connect to a cluster for the block.

    Args:
        address: such as ``"10.0.0.1:6379"``, or ``"auto"`` for the cluster that this machine belongs to.

    Raises:
        ImportError: Ray is missing.
        ValueError: no cluster answers at ``address``, or this process is already connected to one.
    """
    ray = check_ray()
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:  # Ray itself would try for a quarter of an hour
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"address: nothing listens at {address!r}: {error}") from error
    if ray.is_initialized():
        raise ValueError(f"address must be None if this process is already connected to Ray, got {address!r}")
    try:
        _init(ray, address=address)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"address: no usable Ray cluster answers at {address!r}: {_last_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_ray(workers: int | None = None) -> Any:
    """Return the module ``ray`` without starting anything.

    Raises:
        ImportError: Ray is missing.
        ValueError: ``workers`` is out of range.
    """
    if workers is not None:
        check_positive_int("workers", workers)
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine 'ray' needs Ray: pip install 'm3er-fast[ray]'") from error
    return ray


class _IgnoringCancellation(NamedTuple):
    """Makes a :class:`WorkerFunction` of a function of one task."""

    function: Callable[[Any], Any]

    def __call__(self, task: Any, is_canceled: Callable[[], bool]) -> Any:
        return self.function(task)


class _Worker:
    """The actor class."""

    def __init__(self, function: WorkerFunction, threads: int) -> None:
        self._function, self._threads = function, threads

    def ready(self) -> None:
        """Return once this worker runs."""

    def run(self, task: Any) -> bytes:
        """Return the pickled result: arrays that Ray carries would be read-only, and would keep its store full."""
        import ray

        # Another number of threads than in the driver may round differently; Ray sets its own.
        torch.set_num_threads(self._threads)
        return pickle.dumps(self._function(task, ray.get_runtime_context().is_canceled))


class _Pool:
    """Workers that run one task each at a time, so that the task of a lost worker is known."""

    def __init__(
        self, ray: Any, function: WorkerFunction, tasks: Sequence[Any], cpus: int, gpus: int, tasks_ahead: int
    ) -> None:
        self._ray, self._tasks, self._tasks_ahead = ray, tasks, tasks_ahead
        self._needs = f"{gpus} GPU" if gpus else f"{cpus} CPUs (the threads of this process)"
        self._function, self._threads = ray.put(function), torch.get_num_threads()
        self._actor = ray.remote(_Worker).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")
        self._waiting = list(range(len(tasks)))  # a heap, so that lost tasks come first again
        self._attempts = [0] * len(tasks)
        # Pending call -> its worker and its task; the task is None while the worker starts.
        self._busy: dict[Any, tuple[Any, int | None]] = {}
        self._idle: list[Any] = []

    def run(self, workers: int) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of every task."""
        from ray.exceptions import RayError, RayTaskError

        unfinished, failed_starts = len(self._tasks), 0
        for _ in range(workers):
            self._start_worker()
        self._warn_if_none_starts()
        while unfinished:
            [call], _ = self._ray.wait(list(self._busy))
            worker, index = self._busy.pop(call)
            try:
                result = self._ray.get(call)
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                self._ray.kill(worker)
                result = self._retry(index, error)
                failed_starts = failed_starts + 1 if index is None else 0
                if failed_starts == _MAX_ATTEMPTS:
                    raise RuntimeError(f"no worker can be started: {_last_line(error)}") from error
                if self._waiting:
                    self._start_worker()
            else:
                failed_starts = 0
                self._idle.append(worker)
            self._assign_tasks()
            if result is not None and index is not None:
                unfinished -= 1
                yield index, result if isinstance(result, LostTask) else pickle.loads(result)

    def close(self) -> None:
        """End all workers, after giving them time to abandon their tasks."""
        working = [call for call, (_, index) in self._busy.items() if index is not None]
        for call in working:
            self._ray.cancel(call)
        if working:
            self._ray.wait(working, num_returns=len(working), timeout=_CANCEL_TIMEOUT_S)
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)

    def _start_worker(self) -> None:
        worker = self._actor.remote(self._function, self._threads)
        self._busy[worker.ready.remote()] = worker, None

    def _warn_if_none_starts(self) -> None:
        """Wait for the first worker: a cluster that grows may take minutes, one that is too small never has room."""
        ready, _ = self._ray.wait(list(self._busy), timeout=WARN_AFTER_S)
        if not ready:
            warnings.warn(
                f"no worker has started in {WARN_AFTER_S:.0f} s: is there a machine with {self._needs} free?",
                stacklevel=2,
            )

    def _assign_tasks(self) -> None:
        """Give idle workers the tasks that may start now, and end the workers for which no task is waiting."""
        while self._idle and self._waiting:
            running = (index for _, index in self._busy.values() if index is not None)
            first_unfinished = min(running, default=self._waiting[0])
            if self._waiting[0] >= first_unfinished + self._tasks_ahead:
                return
            worker, index = self._idle.pop(), heapq.heappop(self._waiting)
            self._busy[worker.run.remote(self._tasks[index])] = worker, index
        while self._idle:
            self._ray.kill(self._idle.pop())

    def _retry(self, index: int | None, error: Exception) -> LostTask | None:
        """Queue the task of a lost worker again, or return what stands in for its result after the last attempt."""
        if index is None:
            return None
        self._attempts[index] += 1
        if self._attempts[index] < _MAX_ATTEMPTS:
            heapq.heappush(self._waiting, index)
            return None
        return LostTask(f"its worker was lost {_MAX_ATTEMPTS} times ({type(error).__name__}); was it out of memory?")


def count_possible_workers(ray: Any, cpus: int, gpus: int) -> int:
    """Return the number of workers that the connected machines have room for, at least 1."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    counts = (int(machine.get("GPU", 0)) if gpus else int(machine.get("CPU", 0) // cpus) for machine in machines)
    return max(1, sum(counts))


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


@contextlib.contextmanager
def _connection(ray: Any, cpus: int | None, object_store_bytes: int) -> Iterator[None]:
    """Use the existing connection to Ray, or start Ray on this machine for the block."""
    if ray.is_initialized():
        yield
        return
    _init(ray, address="local", num_cpus=cpus, object_store_memory=object_store_bytes, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


def _init(ray: Any, **options: Any) -> None:
    with _sigterm_handler_kept(), warnings.catch_warnings():
        # Ray 2.54 announces to every driver how later versions treat workers without a GPU; ours are not affected.
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


@contextlib.contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM after the block: Ray replaces the command line's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
