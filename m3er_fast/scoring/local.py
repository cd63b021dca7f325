"""The local runner: each device of this machine takes the next shard when it has finished one."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch

from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.shard import ScoringJob, ShardResult, score_shards
from m3er_fast.shards.plan import Shard


def make_scorers(model: M3ERFusion, devices: Sequence[str] | None, batch_frames: int | str, dtype: str) -> list[Scorer]:
    """Return one scorer per device, each with a copy of the model; None is the model's own device, without a copy."""
    if devices is None:
        return [Scorer(model, batch_frames=batch_frames, dtype=dtype)]  # type: ignore[arg-type]
    models = [copy.deepcopy(model).to(torch.device(device)) for device in devices]
    return [Scorer(model, batch_frames=batch_frames, dtype=dtype) for model in models]  # type: ignore[arg-type]


def run_local(job: ScoringJob, shards: Sequence[Shard], scorers: Sequence[Scorer]) -> Iterator[ShardResult | int]:
    """Score shards, and yield the number of rows after each table and the result of each shard.

    Several scorers have a thread each, and share the torch threads. Closing the iterator drops unfinished shards.
    """
    if len(scorers) == 1:
        return score_shards(job, shards, scorers[0])
    return _score_in_threads(job, shards, scorers)


def _score_in_threads(
    job: ScoringJob, shards: Sequence[Shard], scorers: Sequence[Scorer]
) -> Iterator[ShardResult | int]:
    """Score shards with several scorers at the same time; a scorer that is free takes the next shard."""
    results: queue.Queue[ShardResult | int | BaseException | None] = queue.Queue()
    threads_each = max(1, torch.get_num_threads() // len(scorers))
    waiting, lock, stop = iter(shards), threading.Lock(), threading.Event()

    def next_shard() -> Shard | None:
        with lock:
            return None if stop.is_set() else next(waiting, None)

    def work(scorer: Scorer) -> None:
        try:
            with closing(score_shards(job, iter(next_shard, None), scorer, threads=threads_each)) as scored:  # type: ignore[type-var]
                for result in scored:
                    results.put(result)
                    if stop.is_set():
                        break
        except BaseException as error:
            results.put(error)
        results.put(None)

    threads = [threading.Thread(target=work, args=(scorer,), name="m3er-score", daemon=True) for scorer in scorers]
    try:
        for thread in threads:
            thread.start()
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
            if thread.ident is not None:  # it has been started
                thread.join()
