"""The local runner: the devices of this machine, a thread each, which take the next shard as they finish one."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.plan import Shard
from m3er_fast.scoring.prefetch import Prefetch
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.shard import ScoringJob, ShardResult, score_shard


class _Stopped(BaseException):
    """The run is over: drop the shard at hand."""


def make_scorers(
    model: M3ERFusion, devices: Sequence[str] | None, batch_frames: int | str, dtype: str
) -> list[Scorer]:
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

    def work(scorer: Scorer) -> None:
        with ExitStack() as opened:

            def begin() -> tuple[Shard, Prefetch[object]] | None:
                shard = None if stop.is_set() else next_shard()
                return None if shard is None else (shard, opened.enter_context(Prefetch(job.read(shard, scorer))))

            try:
                current = begin()
                while current is not None and not stop.is_set():
                    upcoming = begin()  # is read while the current one is scored
                    shard, tables = current
                    results.put(score_shard(job, shard, scorer, windows=tables, on_rows=on_rows))  # type: ignore[arg-type]
                    current = upcoming
            except _Stopped:
                pass
            except BaseException as error:
                results.put(error)
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
