"""Worker processes of this machine, each of which runs one task at a time.

A task that ends its process, as a damaged file may do to a decoder, is known: it is started once more in a new process,
and then reported as lost. The others are not affected.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from m3er_fast.execution.tasks import LostTask

_MOST_ATTEMPTS = 2

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[int, Result | LostTask]]:
    """Run tasks in worker processes, and yield (index, result) of each as it finishes.

    Closing the iterator, or an exception in it, ends the workers and abandons their tasks.

    Args:
        function: picklable, called with one task at a time.
        tasks: arguments of the calls.
        workers: number of processes.

    Raises:
        Exception: whatever the function raises.
    """
    waiting = deque((index, 1) for index in range(len(tasks)))
    # A pool of one process for each worker: when it breaks, it is known which task broke it.
    running: dict[Future[Result], tuple[int, int, ProcessPoolExecutor]] = {}
    pools = [_pool() for _ in range(min(workers, len(tasks)))]
    idle = list(pools)
    try:
        while waiting or running:
            while waiting and idle:
                index, attempt = waiting.popleft()
                pool = idle.pop()
                running[pool.submit(function, tasks[index])] = index, attempt, pool
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index, attempt, pool = running.pop(future)
                try:
                    result: Result | LostTask = future.result()
                except BrokenProcessPool:
                    pools.remove(pool)
                    pools.append(pool := _pool())
                    idle.append(pool)
                    if attempt < _MOST_ATTEMPTS:
                        waiting.appendleft((index, attempt + 1))
                        continue
                    result = LostTask(f"its process ended {_MOST_ATTEMPTS} times; was it out of memory?")
                else:
                    idle.append(pool)
                yield index, result
    finally:
        for pool in pools:
            _end(pool)


def _pool() -> ProcessPoolExecutor:
    # Forked processes would share the threads' locks of libraries that this process has used.
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare_worker)


def _prepare_worker() -> None:
    """Leave an interrupt of the terminal to the parent, which ends its workers, and end with it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())  # gone once it shuts down
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
