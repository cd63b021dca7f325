"""The Ray runner: workers on one machine or a cluster, each of which scores one shard at a time.

Workers read and write the data themselves. A worker scores a shard as the local runner does, so every runner leaves the
same bytes, and so does a shard that was started again after its worker was lost. A shard that loses several workers
goes to quarantine.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from m3er_fast.execution.ray_pool import run_tasks
from m3er_fast.execution.tasks import LostTask
from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.shard import ScoringJob, ShardResult, score_shards
from m3er_fast.shards.plan import Shard


def run_ray(
    job: ScoringJob,
    shards: Sequence[Shard],
    model: M3ERFusion,
    *,
    batch_frames: int,
    dtype: str,
    workers: int | None = None,
) -> Iterator[ShardResult]:
    """Score shards with Ray, and yield the result of each as it finishes.

    Ray is started on this machine if this process is not connected to it, and stopped when the iterator ends. Closing
    the iterator, or an exception in it, ends the workers; the shards that they are scoring are dropped.

    Args:
        job: where to read from and write to; every worker must reach both.
        shards: some of the plan's.
        model: sent to every worker once. If it is on CUDA, each worker gets a GPU.
        batch_frames: as resolved by the scorer of this machine.
        dtype: of the network.
        workers: number of workers; None uses as many as there is room for.

    Raises:
        ImportError: Ray is missing.
        OSError: scores cannot be written.
        RuntimeError: no worker can be started, or a worker has another version of m3er-fast.
    """
    device = next(model.parameters()).device.type
    score_shard = _ScoreShard(job, model, device, batch_frames, dtype)
    for index, result in run_tasks(score_shard, shards, workers=workers, gpus_per_worker=int(device == "cuda")):
        if isinstance(result, LostTask):
            result = ShardResult(shards[index].name, 0, 0, result.reason)
        yield result


class _ScoreShard:
    """Scores a shard in a worker. It can be pickled; each worker makes its scorer once."""

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
        if finished is not None:  # a worker wrote these scores before it was lost
            return ShardResult(task.name, finished.rows, finished.errors)
        with closing(score_shards(self._job, [task], self._scorer)) as results:  # type: ignore[type-var]
            for result in results:
                if isinstance(result, ShardResult):
                    return result
                if is_canceled():
                    break
        raise RuntimeError("the run is over")

    def _make_scorer(self) -> Scorer:
        from m3er_fast import __version__

        if __version__ != self._version:
            raise RuntimeError(f"a worker has m3er-fast {__version__}, but this run needs {self._version}")
        model = pickle.loads(self._model).to(self._device)
        scorer = Scorer(model, batch_frames=self._batch_frames, dtype=self._dtype)  # type: ignore[arg-type]
        if scorer.signature != self._job.output.signature:
            raise RuntimeError("the model that reached a worker is not the one that was sent")
        return scorer
