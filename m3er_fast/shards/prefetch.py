"""An iterator that a thread runs ahead, so that reading and computing overlap."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item], Iterator[Item]):
    """Iterates over a source in a separate thread, at most ``depth`` items ahead.

    An exception of the source is raised in place of its next item. Close the iterator if it is not read to its end.

    Args:
        source: iterated over by the thread as soon as this object is constructed.
        depth: items that may wait to be consumed.
    """

    def __init__(self, source: Iterable[Item], depth: int = 1) -> None:
        self._ready: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(source,), name="m3er-prefetch", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # an interrupt while it starts: the caller has no object to close
            self._stopped.set()
            raise

    def __next__(self) -> Item:
        if self._stopped.is_set():
            raise StopIteration
        is_item, value = self._ready.get()
        if is_item:
            return value  # type: ignore[return-value]
        self._stopped.set()
        self._thread.join()
        if value is not None:
            raise value  # type: ignore[misc]
        raise StopIteration

    def close(self) -> None:
        """Stop reading, and wait until the thread has ended."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, source: Iterable[Item]) -> None:
        last: BaseException | None = None
        try:
            for item in source:
                if not self._put((True, item)):
                    break
        except BaseException as error:
            last = error
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        self._put((False, last))

    def _put(self, entry: tuple[bool, Item | BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
