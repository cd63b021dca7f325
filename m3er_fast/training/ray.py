"""Training by Ray Train: workers on one machine or a cluster form a process group, started again when one is lost."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from m3er_fast.distributed import OtherRankError
from m3er_fast.execution.ray_pool import check_ray, count_possible_workers, ray_session
from m3er_fast.training.fingerprint import ResumeMismatchError
from m3er_fast.training.loop import TrainingError

_MOST_RESTARTS = 8  # of all workers; each goes on from the last epoch
_POLL_SECONDS = 0.5  # between two looks at what the workers have told

# Errors of the data and the settings, which another start would only repeat.
_LASTING = (ValueError, ResumeMismatchError, TrainingError)


def train_on_ray(
    train: Callable[..., Any],
    *,
    out: Path | None,
    resume: bool,
    device: str,
    address: str | None,
    workers: int | None,
    progress: Callable[[Any], None] | None,
    resumed: Callable[[int], None] | None,
) -> Any:
    """Call ``train`` in every worker of a process group, and return what it returns.

    When a worker is lost, Ray Train ends the others and starts all of them anew, and they go on from the checkpoint in
    ``out``. Without ``out``, they begin again.

    Args:
        train: picklable; called with ``resume``, ``progress`` and ``resumed``.
        out: the run folder, which all workers reach.
        resume: whether to continue an earlier run.
        device: as of ``train``; with GPUs, each worker has one.
        address: of a cluster; None starts Ray on this machine.
        workers: number of workers; None uses as many as there is room for.
        progress: called in this process.
        resumed: called in this process.

    Raises:
        ImportError: Ray is missing.
        RuntimeError: workers were lost too often.
        Exception: whatever ``train`` raises because of its arguments.
    """
    ray = check_ray(workers)
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:  # Ray Train needs more than Ray
        raise ImportError(f"training on Ray needs more ({error}): pip install 'm3er-fast[ray]'") from error
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    threads = torch.get_num_threads()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    # Ray Train keeps notes of its own, which all workers must reach as well.
    with ray_session(address, workers), tempfile.TemporaryDirectory(prefix=".ray-", dir=out) as notes:
        gpus = int(device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0))
        # On this machine, which is lost last.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        told = ray.remote(_Told).options(num_cpus=0, scheduling_strategy=here).remote()
        trainer = TorchTrainer(
            _train_in_worker,
            train_loop_config={"train": ray.put(train), "told": told, "threads": threads, "resume": resume},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers or count_possible_workers(ray, threads, gpus),
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": 1 if gpus else threads, "GPU": gpus},
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(storage_path=notes, failure_config=FailureConfig(max_failures=_MOST_RESTARTS)),
        )
        lost = None
        with _passed_on(ray, told, {"progress": progress, "resumed": resumed}):
            try:
                trainer.fit()
            except (TrainingFailedError, RayError) as error:
                lost = error
        result, failure = ray.get(told.outcome.remote())
    if failure is not None:
        raise failure
    if lost is not None:
        raise RuntimeError(f"the workers were lost {_MOST_RESTARTS + 1} times: {lost}") from lost
    return result


class _Told:
    """An actor that keeps what the workers tell, until the driver asks."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._result: Any = None
        self._failure: Exception | None = None

    def tell(self, name: str, value: Any) -> None:
        """Keep an argument of a callback, which has this name."""
        self._events.append((name, value))

    def since(self, number: int) -> list[tuple[str, Any]]:
        """Return all events but the first ``number``."""
        return self._events[number:]

    def finish(self, result: Any) -> None:
        """Keep the result."""
        self._result = result

    def fail(self, failure: Exception) -> None:
        """Keep the error that ended the training."""
        self._failure = failure

    def outcome(self) -> tuple[Any, Exception | None]:
        """Return result and error."""
        return self._result, self._failure


def _train_in_worker(given: dict[str, Any]) -> None:
    import ray

    torch.set_num_threads(given["threads"])
    told, train = given["told"], ray.get(given["train"])
    has_begun = bool(ray.get(told.since.remote(0)))  # by workers that were lost
    calls: dict[str, Any] = {
        name: lambda value, name=name: ray.get(told.tell.remote(name, value)) for name in ("progress", "resumed")
    }
    try:
        result = train(resume=given["resume"] or has_begun, **calls)
    except OtherRankError:
        return  # the other one tells
    except _LASTING as error:
        ray.get(told.fail.remote(error))
        return
    if dist.get_rank() == 0:
        ray.get(told.finish.remote(result))


@contextmanager
def _passed_on(ray: Any, told: Any, callbacks: dict[str, Callable[[Any], None] | None]) -> Iterator[None]:
    """Call the callbacks with what the workers tell during the block, in a thread."""
    over = threading.Event()

    def pass_on() -> None:
        seen, is_last = 0, False
        while not is_last:
            is_last = over.wait(_POLL_SECONDS)
            events = ray.get(told.since.remote(seen))
            seen += len(events)
            for name, value in events:
                callback = callbacks[name]
                if callback is not None:
                    callback(value)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
