"""A model in several processes: fitting to shares of the data, one fitted state for all, and gradients of all.

Every function here is called by all processes of torch's default process group, in the same order. What fails in one
of them raises in all, so that none waits for another that has given up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from m3er_fast.check import ModalityCheck
from m3er_fast.inputs import Array, FeatureSource, iterate_batches
from m3er_fast.proxy import ProxyGenerator, count_paired
from m3er_fast.standardize import Standardizer

__all__ = [
    "DifferentRanksError",
    "OtherRankError",
    "agree",
    "broadcast_state",
    "check_same",
    "data_parallel",
    "fit_shares",
]

_PIECE_BYTES = 64 * 2**20  # sent at a time: a bank that stays in host memory must not be on the device as a whole

_Result = TypeVar("_Result")


class DifferentRanksError(ValueError):
    """The processes of a group hold models that differ where they must not."""


class OtherRankError(RuntimeError):
    """Another process of the group has failed, for the reason that the message gives."""


def data_parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wrap a model in ``DistributedDataParallel``, once all processes are known to hold buffers of the same sizes.

    ``DistributedDataParallel`` itself compares parameters only: where sizes of buffers differ, gloo ends the process.

    Args:
        model: an :class:`m3er_fast.M3ERFusion`, or a module that holds one.
        **options: arguments of ``DistributedDataParallel``, such as ``device_ids``.

    Raises:
        DifferentRanksError: if a buffer has another size elsewhere, naming it.
        RuntimeError: if there is no process group.
    """
    check_same(
        {name: tuple(buffer.shape) for name, buffer in model.named_buffers()},
        "data_parallel: {name} has shape {first} on rank 0, but {other} on rank {rank}: the ranks are fitted "
        "differently. Call broadcast_fitted() of the M3ERFusion on every rank first",
    )
    return DistributedDataParallel(model, **options)


def broadcast_state(parts: nn.Module, settings: Mapping[str, Any], src: int) -> None:
    """Load the state of one process's module, extra state included, into those of the others, whatever its sizes.

    Args:
        parts: a module whose buffers take the sizes of a loaded state.
        settings: what has to be the same everywhere, by name.
        src: rank of the process whose state is sent.

    Raises:
        DifferentRanksError: if the settings differ, naming the first one that does.
        ValueError: if there is no rank ``src``.
        RuntimeError: if there is no process group.
    """
    _check_group()
    ranks = dist.get_world_size()
    if not isinstance(src, int) or not 0 <= src < ranks:
        raise ValueError(f"src must be a rank from 0 to {ranks - 1}, got {src!r}")
    state = parts.state_dict()
    check_same(
        {**settings, **{f"dtype of {name}": value.dtype for name, value in state.items()}},
        "broadcast_fitted: {name} is {first} on rank 0, but {other} on rank {rank}: wanted the same on all ranks",
    )
    sizes = _gather({name: tuple(value.shape) for name, value in state.items()})[src]
    received = {name: _broadcast(state[name], size, src) for name, size in sizes.items()}
    if dist.get_rank() != src:
        parts.load_state_dict(received)


def fit_shares(
    standardizer: Standardizer,
    check: ModalityCheck | None,
    proxy: ProxyGenerator | None,
    features: FeatureSource,
    lengths: Array | None,
    available: Array | None,
) -> None:
    """Fit a standardiser everywhere, and check and proxies on rank 0, to the shares of all processes in their order.

    Arguments are those of :meth:`m3er_fast.M3ERFusion.fit`, of this process's share.

    Raises:
        OtherRankError: if another process has failed, saying why.
        RuntimeError: if there is no process group.
        ValueError: as ``fit`` does.
    """
    agree(lambda: standardizer.fit(features, lengths=lengths, available=available))
    first, *others = _gather(copy.deepcopy(standardizer).cpu())
    for other in others:
        first.merge(other)
    standardizer.load_state_dict(first.state_dict())

    def batches() -> Any:
        checked = iterate_batches(features, lengths, available, input_dims=standardizer.input_dims)
        return map(standardizer.standardize, checked)

    counts = _gather(agree(lambda: [(len(batch.lengths), count_paired(batch)) for batch in batches()]))
    rows, frames = zip(*((sum(n for n, _ in share), sum(n for _, n in share)) for share in counts), strict=True)
    rank = dist.get_rank()
    if check is not None:
        start = sum(rows[:rank])
        _fit_collected(check, lambda: check.collect(batches(), total=sum(rows), start=start))
    if proxy is not None:
        begin = sum(frames[:rank])
        stop = begin + frames[rank]
        _fit_collected(
            proxy, lambda: proxy.collect(batches(), total=sum(frames), start=begin, stop=stop).consolidated()
        )


def _fit_collected(step: ModalityCheck | ProxyGenerator, collect: Callable[[], Any]) -> None:
    """Fit a step on rank 0 to what all processes have collected."""
    part = agree(collect)
    is_first = dist.get_rank() == 0
    parts: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(part, parts)

    def fit() -> None:
        if parts is not None:
            merged = parts[0]
            for later in parts[1:]:
                merged = merged.merge(later)
            step.fit_collected(merged)

    agree(fit)


# --- what all processes do together ---


def _check_group() -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: start the processes with torchrun, and call "
            "torch.distributed.init_process_group in each of them first"
        )


def _gather(value: _Result) -> list[_Result]:
    """Return the values of all processes, in the order of their ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(function: Callable[[], _Result]) -> _Result:
    """Return what the function returns here, once it has succeeded everywhere.

    Raises:
        Exception: what the function raises here.
        OtherRankError: if it has failed elsewhere.
    """
    _check_group()
    result, own = None, None
    try:
        result = function()
    except Exception as error:  # whatever it is, the others must not wait
        own = error
    failures = _gather(None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise OtherRankError(f"rank {rank} has failed: {failure}")
    return result  # type: ignore[return-value]


def check_same(values: Mapping[str, Any], message: str) -> None:
    """Raise a DifferentRanksError on every rank unless all have the same values by the same names.

    Args:
        values: plain values, which are sent to all ranks.
        message: of the error, with fields for the first ``name`` that differs, what ``first`` (rank 0) and ``other``
            (of ``rank``) have.
    """
    _check_group()
    first, *others = _gather(dict(values))
    for rank, other in enumerate(others, start=1):
        for name in {**first, **other}:
            if first.get(name, "missing") != other.get(name, "missing"):
                got = {"first": first.get(name, "missing"), "other": other.get(name, "missing")}
                raise DifferentRanksError(message.format(name=name, rank=rank, **got))


def _broadcast(value: Tensor, size: tuple[int, ...], src: int) -> Tensor:
    """Return the tensor of rank ``src``, which is of this size, in host memory."""
    sends = dist.get_rank() == src
    host = value.detach().cpu().contiguous() if sends else torch.empty(size, dtype=value.dtype, device="cpu")
    on_device = dist.get_backend() == "nccl"
    # As bytes: not every library sends every dtype.
    for piece in torch.split(host.view(-1).view(torch.uint8), _PIECE_BYTES) if host.numel() else ():
        carried = piece.cuda() if on_device else piece
        dist.broadcast(carried, src)
        if on_device and not sends:
            piece.copy_(carried)
    return host
