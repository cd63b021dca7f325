"""Maps over several threads, each of which computes with a single torch thread.

Within one batch of utterances, two torch threads wait for each other after every operation. With one batch each they do
not wait, and the scores of a batch do not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_thread_count_lock = threading.Lock()

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item, Callable[[], bool]], Result], items: Iterable[Item], threads: int | None
) -> Iterator[Result]:
    """Call a function with every item in several threads, and yield the results in the order of the items.

    At most ``threads`` + 1 items are taken before their results are: the extra one is ready for the thread that
    finishes first. Closing the iterator, or an exception in it, waits for the calls that are running.

    Args:
        function: called with an item, and with a function that returns whether the result is no longer needed.
        items: iterated over by the calling thread.
        threads: number of threads that compute, with one torch thread each; None computes in the calling thread, with
            all of its torch threads.
    """
    stopped = threading.Event()
    if threads is None:
        for item in items:
            yield function(item, stopped.is_set)
        return
    waiting: deque[Future[Result]] = deque()
    with _single_threaded_pool(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item, stopped.is_set))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            stopped.set()


def torch_threads() -> int:
    """Return the number of torch threads of the calling thread.

    A thread that asks torch for the first time adopts the process's number, which :func:`map_in_order` changes for a
    moment. This function waits for that moment to pass.
    """
    with _thread_count_lock:
        return torch.get_num_threads()


@contextmanager
def _single_threaded_pool(count: int) -> Iterator[ThreadPoolExecutor]:
    """Run a pool of threads in each of which torch computes with that thread alone."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # adopts the process's number, which would otherwise happen at the first computation
        torch.set_num_threads(1)
        started.wait()

    with ThreadPoolExecutor(count, "m3er-score") as pool:
        # The number that a thread sets applies to itself, and to every thread that first computes later.
        with _thread_count_lock:
            before = torch.get_num_threads()
            try:
                for _ in range(count):
                    pool.submit(start)
                started.wait()
            except BaseException:  # a thread could not be started, or an interrupt: the others must not wait
                started.abort()
                raise
            finally:
                torch.set_num_threads(before)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
