"""The processes of one training: one alone, or a process group that shares every batch.

With a group, each process makes the same batches and computes a part of each, and gradients are those of the whole
batch. One process fits, reads checkpoints and writes; the others get what it has.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from m3er_fast.distributed import agree, check_same, data_parallel
from m3er_fast.fusion import M3ERFusion
from m3er_fast.loss import mean_weight
from m3er_fast.training.data import TrainingBatch

# The environment variables by which torchrun and other launchers tell processes of each other.
_LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

_Value = TypeVar("_Value")


class Workers:
    """What training asks of its processes; this class is the answer of a single one."""

    save_within_epochs = True
    """Whether one process may write a checkpoint while the others do something else."""

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """Return what ``make`` returns in the first process, which alone calls it.

        Raises:
            Exception: whatever it raises; in the other processes an ``OtherRankError``.
        """
        return make()

    def check_same(self, run: dict[str, Any]) -> None:
        """Raise a DifferentRanksError unless all processes train with the same corpus and settings."""

    def first_only(self, value: _Value) -> _Value | None:
        """Return the value in the first process, and None in the others."""
        return value

    def parallel(self, model: M3ERFusion) -> Callable[..., Any]:
        """Return the model as the callable whose gradients are those of all processes."""
        return model

    def parts(self, model: M3ERFusion, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Yield this process's part of each batch, possibly none of it."""
        return batches

    def turns(self, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Yield the batches that are this process's, each of which is one process's as a whole."""
        return batches

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the sum of the processes' losses."""
        loss.backward()  # type: ignore[no-untyped-call]

    def total(self, values: Tensor) -> Tensor:
        """Return the sums of float64 values over the processes."""
        return values


ALONE = Workers()


class GroupedWorkers(Workers):
    """The processes of torch's default process group."""

    save_within_epochs = False  # the others would have to send what they have added up, at the same moment

    def __init__(self) -> None:
        self._rank, self._count = dist.get_rank(), dist.get_world_size()
        self._parallel: DistributedDataParallel | None = None

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """Return what ``make`` returns in the first process, which alone calls it, and sends it to the others."""
        held: list[Any] = [agree(lambda: make() if self._rank == 0 else None)]
        dist.broadcast_object_list(held, src=0)
        value: _Value = held[0]
        return value

    def check_same(self, run: dict[str, Any]) -> None:
        """Raise a DifferentRanksError unless all processes train with the same corpus and settings."""
        check_same(
            run,
            "train: {name} is {first} on rank 0, but {other} on rank {rank}: wanted the same corpus and settings "
            "everywhere",
        )

    def first_only(self, value: _Value) -> _Value | None:
        """Return the value in the first process, and None in the others."""
        return value if self._rank == 0 else None

    def parallel(self, model: M3ERFusion) -> Callable[..., Any]:
        """Wrap the model in ``DistributedDataParallel``; what is fitted never changes and is not sent at each step."""
        if self._parallel is None or self._parallel.module is not model:
            with warnings.catch_warnings():  # torch 2.13 has another name for it
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self._parallel = data_parallel(model, broadcast_buffers=False)
        return self._parallel

    def parts(self, model: M3ERFusion, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Yield a run of each batch's utterances; the processes' runs differ in length by one at most.

        A part's mean loss divides by the part's own weight. Its share of the batch's mean loss is therefore its weight
        over that of the batch.
        """
        # The order of the batches is drawn, from the same numbers everywhere; dropout is to differ.
        if self._rank:
            torch.manual_seed(torch.initial_seed() + self._rank)
        settings = model.config.loss
        class_weight = None if settings.class_weight is None else torch.tensor(settings.class_weight)
        for batch in batches:
            rows = len(batch.lengths)
            part = slice(rows * self._rank // self._count, rows * (self._rank + 1) // self._count)
            mine = batch.map(itemgetter(part))
            own, whole = (mean_weight(x.target, settings.activation, class_weight) for x in (mine, batch))
            yield mine._replace(share=own / whole if whole else 0.0, elsewhere=rows - len(mine.lengths))

    def turns(self, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Yield every n-th batch."""
        return islice(batches, self._rank, None, self._count)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the sum of the losses; ``DistributedDataParallel`` takes their mean."""
        (loss * self._count).backward()  # type: ignore[no-untyped-call]

    def total(self, values: Tensor) -> Tensor:
        """Return the sums of float64 values over the processes."""
        dist.all_reduce(values)
        return values


def current_workers() -> Workers:
    """Return the processes of torch's process group, or this one alone."""
    return GroupedWorkers() if dist.is_available() and dist.is_initialized() else ALONE


@contextlib.contextmanager
def launched_workers() -> Iterator[None]:
    """Join the process group that ``torchrun`` has started this process for, if it has; the first one alone prints.

    Processes compute on the GPU of their ``$LOCAL_RANK``, if there is one, and talk by NCCL there.
    """
    if not dist.is_available() or dist.is_initialized() or not os.environ.keys() >= _LAUNCHED:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    # One for each start: in the store of torchrun 2.13, processes that are started again find their predecessors.
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        with contextlib.ExitStack() as stack:
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123  (a device, not a path)
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        dist.destroy_process_group()
