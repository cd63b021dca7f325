"""The local runner: the devices of this machine, a thread each, which take the next shard as they finish one."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.plan import Shard
from m3er_fast.scoring.prefetch import Prefetch
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.shard import ScoringJob, ShardResult, score_shard


class _Begun(NamedTuple):
    """A shard that is being read."""

    shard: Shard
    tables: Prefetch[Any]


class _Stopped(BaseException):
    """The run is over: drop the shard at hand."""


def make_scorers(model: M3ERFusion, devices: Sequence[str] | None, batch_frames: int | str, dtype: str) -> list[Scorer]:
    """Give every device a scorer with a copy of the model; None is the device where the model is, with no copy."""
    if devices is None:
        return [Scorer(model, batch_frames=batch_frames, dtype=dtype)]  # type: ignore[arg-type]
    models = [copy.deepcopy(model).to(torch.device(device)) for device in devices]
    return [Scorer(one, batch_frames=batch_frames, dtype=dtype) for one in models]  # type: ignore[arg-type]


def run_local(job: ScoringJob, shards: Sequence[Shard], scorers: Sequence[Scorer]) -> Iterator[ShardResult | int]:
    """Score shards, and yield what became of each, and in between the number of rows after every table.

    Each scorer has a thread, and another one that reads ahead, across the ends of shards. Closing the iterator drops
    the shards that are not finished.
    """
    results: queue.Queue[ShardResult | int | BaseException | None] = queue.Queue()
    waiting, claim, stop = iter(shards), threading.Lock(), threading.Event()

    def next_shard() -> Shard | None:
        with claim:
            return next(waiting, None)

    def on_rows(rows: int) -> None:
        if stop.is_set():
            raise _Stopped
        results.put(rows)

    def begin(scorer: Scorer) -> _Begun | None:
        shard = None if stop.is_set() else next_shard()
        return None if shard is None else _Begun(shard, Prefetch(job.read(shard, scorer)))

    def work(scorer: Scorer) -> None:
        current = upcoming = None
        try:
            current = begin(scorer)
            while current is not None:
                upcoming = begin(scorer)  # is read while the current one is scored
                results.put(score_shard(job, current.shard, scorer, windows=current.tables, on_rows=on_rows))
                current, upcoming = upcoming, None
        except _Stopped:
            pass
        except BaseException as error:
            results.put(error)
        for begun in (current, upcoming):
            if begun is not None:
                begun.tables.close()
        results.put(None)

    threads = [threading.Thread(target=work, args=(scorer,), name="m3er-score", daemon=True) for scorer in scorers]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join()
