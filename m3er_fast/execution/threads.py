"""Computing many items at a time, each in a thread that shares its work with no other.

Within one batch of utterances, two threads of torch wait for each other after every operation. With a batch each they
do not, and the scores of a batch do not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_usual_number_is_changed = threading.Lock()

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item, Callable[[], bool]], Result], items: Iterable[Item], threads: int | None
) -> Iterator[Result]:
    """Yield what the function makes of every item, in the order of the items.

    At most ``threads`` + 1 items are taken before their results are: the one that waits is there for the thread that is
    done first. Closing the iterator, or whatever is raised in it, waits for those that are being computed.

    Args:
        function: called with an item, and with a function that says whether its result is of use no more.
        items: taken by the thread that iterates.
        threads: that compute, with one thread of torch each; None is the one that iterates, with all that it has.
    """
    stopped = threading.Event()
    if threads is None:
        for item in items:
            yield function(item, stopped.is_set)
        return
    waiting: deque[Future[Result]] = deque()
    with _lone_threads(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item, stopped.is_set))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            stopped.set()


def usual_threads() -> int:
    """How many threads torch computes with here.

    A thread that asks torch for the first time takes the number for its own, which must not be while it is changed.
    """
    with _usual_number_is_changed:
        return torch.get_num_threads()


@contextmanager
def _lone_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool in each of whose threads torch computes with that thread alone."""
    begun = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # takes the usual number, which a thread would else do when it first computes
        torch.set_num_threads(1)
        begun.wait()

    with ThreadPoolExecutor(count, "m3er-score") as pool:
        # What a thread sets holds for itself, but also for all that first compute later.
        with _usual_number_is_changed:
            usual = torch.get_num_threads()
            try:
                for _ in range(count):
                    pool.submit(begin)
                begun.wait()
            except BaseException:  # one could not be started, or an interrupt: the others must not wait for it
                begun.abort()
                raise
            finally:
                torch.set_num_threads(usual)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
