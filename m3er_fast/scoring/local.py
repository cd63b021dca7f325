"""The local runner: the devices of this machine, each of which takes the next shard as it finishes one."""

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
    """Give every device a scorer with a copy of the model; None is the device where the model is, with no copy."""
    if devices is None:
        return [Scorer(model, batch_frames=batch_frames, dtype=dtype)]  # type: ignore[arg-type]
    models = [copy.deepcopy(model).to(torch.device(device)) for device in devices]
    return [Scorer(one, batch_frames=batch_frames, dtype=dtype) for one in models]  # type: ignore[arg-type]


def run_local(job: ScoringJob, shards: Sequence[Shard], scorers: Sequence[Scorer]) -> Iterator[ShardResult | int]:
    """Score shards, and yield what became of each, and in between the number of rows after every table.

    Several scorers have a thread each, and share the threads of torch. Closing the iterator drops the shards that are
    not finished.
    """
    if len(scorers) == 1:
        return score_shards(job, shards, scorers[0])
    return _score_in_threads(job, shards, scorers)


def _score_in_threads(
    job: ScoringJob, shards: Sequence[Shard], scorers: Sequence[Scorer]
) -> Iterator[ShardResult | int]:
    """Score shards with several scorers at a time, in the order in which they become free."""
    results: queue.Queue[ShardResult | int | BaseException | None] = queue.Queue()
    shared = max(1, torch.get_num_threads() // len(scorers))
    waiting, claim, stop = iter(shards), threading.Lock(), threading.Event()

    def next_shard() -> Shard | None:
        with claim:
            return None if stop.is_set() else next(waiting, None)

    def work(scorer: Scorer) -> None:
        try:
            with closing(score_shards(job, iter(next_shard, None), scorer, threads=shared)) as scored:  # type: ignore[type-var]
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
            if thread.ident is not None:  # it was started
                thread.join()
