"""The one place that chooses which implementation computes an operation.

An operation lists its implementations in order of preference. ``backend="auto"`` takes the first one that is meant for
the tensors' device and does not refuse the arguments. An explicit name is an order: that implementation computes, or
:class:`BackendUnavailableError` says why it cannot. To add a back end, add its entry to ``OPERATIONS``.

Dimension legend: M modalities, B samples, T time steps, K neighbours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from m3er_fast import reference
from m3er_fast.functional import _autograd
from m3er_fast.neighbors import ExactIndex, NeighborIndex
from m3er_fast.operands import CheckProjections, LossFactors, LossOptions, MemoryScanWeights

# Looked up once: torch.compile does not trace the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SCANNED_DTYPES = (torch.float32, torch.float64)
_MOST_KERNEL_MODALITIES = 8
# Two wider projections do not fit into the registers of a program.
_MOST_KERNEL_COMPONENTS = 128
_MOST_KERNEL_NEIGHBORS = 64
# A program holds two frames and four sums of this many features.
_MOST_KERNEL_SEQUENCE_FEATURES = 4096
# float32 loses about 1e-6 of the trace of a Gram matrix of 64 neighbours: a smaller ridge would not stand out.
_SMALLEST_KERNEL_RIDGE = 1e-4

# Sizes from which an implementation for the CPU is the faster one; docs/performance.md and docs/memory_scan.md have the
# times.
FEWEST_TRAINED_STEPS = 4  # of the scan: reordering its weights costs three steps
FEWEST_SCORED_STEPS = 5
MANY_SAMPLES = 512  # whose products are large: for them two steps are enough


class BackendUnavailableError(RuntimeError):
    """An implementation was requested by name and does not work here."""


class Implementation(NamedTuple):
    """One way to compute an operation."""

    name: str
    device: Literal["cuda", "cpu", "compiler", "any"] | None  # where "auto" considers it; None: nowhere
    refusal: Callable[..., str | None]  # why it cannot compute the operation's arguments, or None
    load: Callable[[], Callable[..., Any]]  # imports and returns the function that computes
    is_backend: bool = True  # whether its name may be requested; else "auto" alone chooses it


def choose(operation: str, backend: str, tensor: Tensor, *arguments: Any) -> Implementation:
    """Return the implementation that computes ``operation`` for these arguments.

    Args:
        operation: a key of ``OPERATIONS``.
        backend: "auto" or a name.
        tensor: an argument whose device decides.
        arguments: the other arguments of the operation's refusals.

    Raises:
        ValueError: if the operation has no such back end.
        BackendUnavailableError: if the requested back end does not work here.
    """
    implementations = OPERATIONS[operation]
    if backend == "auto":
        device = "compiler" if torch.compiler.is_compiling() and not tensor.is_cuda else tensor.device.type
        for implementation in implementations:
            if implementation.device in (device, "any") and implementation.refusal(tensor, *arguments) is None:
                return implementation
    for implementation in implementations:
        if implementation.is_backend and implementation.name == backend:
            reason = implementation.refusal(tensor, *arguments)
            if reason is not None:
                raise BackendUnavailableError(f"{operation}: backend {backend!r} does not work here: {reason}")
            return implementation
    names = ", ".join(map(repr, ("auto", *backends(operation))))
    raise ValueError(f"backend must be one of {names}, got {backend!r}")


def backends(operation: str) -> list[str]:
    """Return the names by which the implementations of an operation may be requested."""
    return [entry.name for entry in reversed(OPERATIONS[operation]) if entry.is_backend]


def choose_index(engine: str, bank: Tensor) -> Callable[..., NeighborIndex]:
    """Return the kind of index that searches ``bank`` for a neighbour ``engine``, one of ``NeighborEngine``.

    "auto" is "torch" for every size and device. On a CPU that multiplies bfloat16 in hardware, "torch" is faster than
    FAISS's flat index for banks of 100,000 rows, and slower by 10 to 25 ms per thousand queries for 10,000 rows and
    fewer (docs/proxies.md). On a GPU it needs no other package, keeps to torch's stream and holds no second copy of
    the bank.
    """
    if engine in ("auto", "torch"):
        return ExactIndex
    from m3er_fast.neighbors import faiss

    if bank.is_cuda and engine != "faiss-hnsw":
        return partial(faiss.FaissGpuIndex, engine=engine)
    return partial(faiss.FaissIndex, engine=engine)


# --- Refusals ---


def in_transform() -> bool:
    """Whether a transform of torch.func runs, such as vmap, whose tensors have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _never(*_: Any) -> None:
    """Plain PyTorch computes everything."""


def _untraceable(tensors: Iterable[Tensor | None]) -> str | None:
    """Why only torch's own operations can compute these tensors."""
    if torch.compiler.is_compiling():
        return None
    if in_transform():
        return "it knows no transforms of torch.func"
    # Outside of ``dual_level`` no tensor need be looked at.
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        for x in tensors
    ):
        return "it has no forward-mode derivative"
    return None


def _differentiable(tensors: Iterable[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:  # a generator would take longer than the loop
            if x is not None and x.requires_grad:
                return True
    return False


def _no_kernel(tensor: Tensor, modalities: int = 1) -> str | None:
    """Why no Triton kernel runs on this tensor, whatever the operation."""
    if tensor.dtype not in _KERNEL_DTYPES:
        return f"it computes float16, bfloat16 and float32, got {tensor.dtype}"
    if modalities > _MOST_KERNEL_MODALITIES:
        return f"it takes up to {_MOST_KERNEL_MODALITIES} modalities, got {modalities}"
    if not _HAS_TRITON:
        return "triton is not installed: pip install triton (Linux only)"
    from m3er_fast.kernels._device import unavailable_reason

    return unavailable_reason(tensor)


def _no_one_pass_loss(logits: Tensor, target: Tensor | None, factors: LossFactors) -> str | None:
    others = (target, factors.class_weight, factors.modality_weight)
    if _differentiable(others):
        return "it has a gradient of the logits only"
    return _untraceable((logits, *others))


def _no_loss_kernel(logits: Tensor, target: Tensor | None, factors: LossFactors, _options: LossOptions) -> str | None:
    return _no_one_pass_loss(logits, target, factors) or _no_kernel(logits, logits.shape[0])


def _no_cpu_loss(logits: Tensor, target: Tensor, factors: LossFactors, options: LossOptions) -> str | None:
    if options.margin is not None or options.activation != "softmax" or target.ndim != 1:
        return "it computes labels under softmax, without a margin"
    if not logits.shape[1] or logits.shape[2] == 1:
        return "it computes one sample or more, of two classes or more"
    return _no_one_pass_loss(logits, target, factors)


def _no_fused_check(features: Sequence[Tensor]) -> str | None:
    if _differentiable(features):
        return "it has no gradient: detach the features or use 'torch'"
    return _untraceable(features)


def _no_check_kernel(first: Tensor, features: Sequence[Tensor], projections: CheckProjections) -> str | None:
    if any(matrix.shape[0] > _MOST_KERNEL_COMPONENTS for matrix in projections.left):
        return f"it takes up to {_MOST_KERNEL_COMPONENTS} components"
    return _no_fused_check(features) or _no_kernel(first, len(features))


def _no_cpu_check(first: Tensor, features: Sequence[Tensor], _projections: CheckProjections) -> str | None:
    if not first.shape[0]:
        return "it computes one sample or more"
    return _no_fused_check(features)


def _no_cpu_sequence(x: Tensor, valid: Tensor) -> str | None:
    return _no_fused_check([x])


def _no_sequence_kernel(x: Tensor, valid: Tensor) -> str | None:
    if x.shape[2] > _MOST_KERNEL_SEQUENCE_FEATURES:
        return f"it takes up to {_MOST_KERNEL_SEQUENCE_FEATURES} features, got {x.shape[2]}"
    return _no_fused_check([x]) or _no_kernel(x)


def _no_fused_lstsq(query: Tensor, bank: Tensor, targets: Sequence[Tensor]) -> str | None:
    if _differentiable((query, bank, *targets)):
        return "it has no gradient: detach the tensors or use 'torch'"
    return _untraceable((query, bank, *targets))


def _no_lstsq_kernel(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, ridge: float
) -> str | None:
    fused = _no_fused_lstsq(query, bank, targets)
    if fused is not None:
        return fused
    if any(x.dtype not in _KERNEL_DTYPES for x in (bank, *targets)):
        return f"it takes banks in float16, bfloat16 and float32, got {[x.dtype for x in (bank, *targets)]}"
    if len({target.dtype for target in targets}) > 1:
        return f"it takes targets of one dtype, got {[target.dtype for target in targets]}"
    if neighbors.shape[1] > _MOST_KERNEL_NEIGHBORS:
        return f"it takes up to {_MOST_KERNEL_NEIGHBORS} neighbours, got {neighbors.shape[1]}"
    if ridge < _SMALLEST_KERNEL_RIDGE:
        return f"in float32 it needs a ridge of at least {_SMALLEST_KERNEL_RIDGE}, got {ridge}"
    return _no_kernel(query)


def _no_cpu_lstsq(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], _neighbors: Tensor, ridge: float
) -> str | None:
    if ridge < reference.SMALLEST_CHOLESKY_RIDGE:
        return f"it needs a ridge of at least {reference.SMALLEST_CHOLESKY_RIDGE}, got {ridge}"
    if torch.float64 in (query.dtype, bank.dtype):
        return "it does not scale float64, whose squares may overflow"
    return _no_fused_lstsq(query, bank, targets)


def _no_cupy(query: Tensor, bank: Tensor, targets: Sequence[Tensor], _neighbors: Tensor, _ridge: float) -> str | None:
    if _differentiable((query, bank, *targets)):
        return "it has no gradient: detach the tensors or use 'torch'"
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed: pip install 'm3er-fast[gpu]'"
    if not query.is_cuda:
        return f"it computes on CUDA tensors, got one on {query.device}"
    try:
        import m3er_fast.kernels.local_lstsq_cupy  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"cupy is installed but does not load: {error}"
    return None


def _no_scan_kernel(
    first: Tensor, features: Sequence[Tensor], weights: MemoryScanWeights, tensors: Sequence[Tensor], _trains: bool
) -> str | None:
    untraceable = _untraceable(tensors)
    if untraceable is not None:
        return untraceable
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1:
        return f"it takes features and weights of one type, got {', '.join(sorted(map(str, dtypes)))}"
    inner = weights.retain.first.shape[0], weights.update.first.shape[0]
    if weights.retain.first.shape != weights.update.first.shape:
        return f"it takes γ of one size, got {inner[0]} and {inner[1]}"
    sizes = {
        "hidden": weights.recurrent.shape[2],
        "memory": weights.candidate.second.shape[0],
        "attention": weights.attention.first.shape[0],
        "γ": inner[0],
    }
    for name, size in sizes.items():
        if size % 16 or not size:
            return f"it takes sizes that are multiples of 16, got {size} for {name}"
    return _no_kernel(first, len(features))


def _no_cpu_scan(
    first: Tensor, _features: Sequence[Tensor], weights: MemoryScanWeights, tensors: Sequence[Tensor], _trains: bool
) -> str | None:
    dtype, wanted = weights.recurrent.dtype, "it takes features and weights of one type, float32 or float64"
    if dtype not in _SCANNED_DTYPES:
        return wanted
    for x in tensors:  # a generator would take longer than the loop
        if x.dtype != dtype:
            return wanted
    if weights.retain.first.shape != weights.update.first.shape:
        return "it takes γ of one size"
    if not first.shape[1]:
        return "it takes one step or more"
    return _untraceable(tensors)


def _no_long_scan(
    first: Tensor, features: Sequence[Tensor], weights: MemoryScanWeights, tensors: Sequence[Tensor], trains: bool
) -> str | None:
    batch, steps = first.shape[:2]
    fewest = FEWEST_TRAINED_STEPS if trains else FEWEST_SCORED_STEPS
    if steps < (min(fewest, 2) if batch >= MANY_SAMPLES else fewest):
        return "the short scan is faster with few steps"
    return _no_cpu_scan(first, features, weights, tensors, trains)


def _no_scan_operator(
    first: Tensor, features: Sequence[Tensor], weights: MemoryScanWeights, tensors: Sequence[Tensor], trains: bool
) -> str | None:
    if trains or torch.compiler.is_exporting():
        return "it has no gradient, and an exported program consists of torch's own operations"
    return _no_cpu_scan(first, features, weights, tensors, trains)


# --- Loaders: an optional dependency is imported only where its implementation is chosen ---


def _load_loss_kernel() -> Callable[..., Any]:
    from m3er_fast.kernels import loss

    if torch.compiler.is_compiling():
        return loss.fusion_loss
    return partial(_autograd.fusion_loss, loss, reference.fusion_loss_of)


@cache
def _load_cpu_loss() -> Callable[..., Any]:
    from m3er_fast.cpu import loss

    return partial(_autograd.fusion_loss, loss, reference.fusion_loss_of)


def _load_costs_kernel() -> Callable[..., Any]:
    from m3er_fast.kernels import loss

    return loss.class_costs


def _load_check_kernel() -> Callable[..., Any]:
    from m3er_fast.kernels import check_statistics

    return check_statistics.check_statistics


@cache
def _load_cpu_check() -> Callable[..., Any]:
    from m3er_fast.cpu import check_statistics

    return check_statistics.check_statistics


def _load_sequence_kernel() -> Callable[..., Any]:
    from m3er_fast.kernels import sequence_statistics

    return sequence_statistics.sequence_statistics


@cache
def _load_cpu_sequence() -> Callable[..., Any]:
    from m3er_fast.cpu import sequence_statistics

    return sequence_statistics.sequence_statistics


def _load_lstsq_kernel() -> Callable[..., Any]:
    from m3er_fast.kernels import local_lstsq

    return local_lstsq.local_least_squares


def _load_cupy() -> Callable[..., Any]:
    from m3er_fast.kernels import local_lstsq_cupy

    return local_lstsq_cupy.local_least_squares


@cache
def _load_cpu_lstsq() -> Callable[..., Any]:
    from m3er_fast.cpu import local_lstsq

    return local_lstsq.local_least_squares


def _load_scan_kernel() -> Callable[..., Any]:
    from m3er_fast.kernels import memory_scan

    return memory_scan.memory_scan


@cache
def _load_cpu_scan() -> Callable[..., Any]:
    from m3er_fast.cpu import memory_scan

    return partial(_autograd.memory_scan, memory_scan)


@cache
def _load_short_cpu_scan() -> Callable[..., Any]:
    from m3er_fast.cpu import memory_scan_short

    return partial(_autograd.tracked_memory_scan, memory_scan_short.memory_scan)


def _load_scan_operator() -> Callable[..., Any]:
    def scan(
        features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, *, dropout: float, trains: bool
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _cpu_memory_scan(features, lengths, weights.tensors(), dropout)
        return result

    return scan


@torch.library.custom_op("m3er_fast::cpu_memory_scan", mutates_args=())
def _cpu_memory_scan(
    features: Sequence[Tensor], lengths: Tensor, weights: Sequence[Tensor | None], dropout: float
) -> tuple[Tensor, Tensor]:
    """The scan without gradients as one node of a compiled graph, for any number of samples and steps.

    Its implementation is chosen when it runs, as it is without a compiler.
    """
    each = MemoryScanWeights.of(len(features), weights)
    tensors = [x for x in (*features, *weights) if x is not None]
    scan = choose("memory_scan", "auto", features[0], features, each, tensors, False).load()
    hidden, memory = scan(features, lengths, each, dropout=dropout, trains=False)
    return hidden.contiguous(), memory.contiguous()


@_cpu_memory_scan.register_fake
def _(
    features: Sequence[Tensor], lengths: Tensor, weights: Sequence[Tensor | None], dropout: float
) -> tuple[Tensor, Tensor]:
    each, batch = MemoryScanWeights.of(len(features), weights), features[0].shape[0]
    modalities, _, size = each.recurrent.shape
    memory = each.candidate.second.shape[0]
    return each.recurrent.new_empty((modalities, batch, size)), each.recurrent.new_empty((batch, memory))


def _load_reference_scan() -> Callable[..., Any]:
    def scan(*arguments: Any, dropout: float, trains: bool) -> tuple[Tensor, Tensor]:
        return reference.memory_scan(*arguments, dropout=dropout)

    return scan


OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    "fusion_loss": (
        Implementation("triton", "cuda", _no_loss_kernel, _load_loss_kernel),
        Implementation("cpu", "cpu", _no_cpu_loss, _load_cpu_loss, is_backend=False),
        Implementation("torch", "any", _never, lambda: reference.fusion_loss_of),
    ),
    "class_costs": (
        Implementation("triton", "cuda", _no_loss_kernel, _load_costs_kernel),
        Implementation("torch", "any", _never, lambda: reference.class_costs),
    ),
    "check_statistics": (
        Implementation("triton", "cuda", _no_check_kernel, _load_check_kernel),
        Implementation("cpu", "cpu", _no_cpu_check, _load_cpu_check, is_backend=False),
        Implementation("torch", "any", _never, lambda: reference.check_statistics),
    ),
    "sequence_statistics": (
        Implementation("triton", "cuda", _no_sequence_kernel, _load_sequence_kernel),
        Implementation("cpu", "cpu", _no_cpu_sequence, _load_cpu_sequence, is_backend=False),
        Implementation("torch", "any", _never, lambda: reference.sequence_statistics),
    ),
    "local_least_squares": (
        Implementation("cupy", None, _no_cupy, _load_cupy),
        Implementation("triton", "cuda", _no_lstsq_kernel, _load_lstsq_kernel),
        Implementation("cpu", "cpu", _no_cpu_lstsq, _load_cpu_lstsq, is_backend=False),
        Implementation("torch", "any", _never, lambda: reference.local_least_squares),
    ),
    "memory_scan": (
        Implementation("triton", "cuda", _no_scan_kernel, _load_scan_kernel),
        Implementation("cpu", "cpu", _no_long_scan, _load_cpu_scan, is_backend=False),
        Implementation("cpu, few steps", "cpu", _no_cpu_scan, _load_short_cpu_scan, is_backend=False),
        Implementation("operator", "compiler", _no_scan_operator, _load_scan_operator, is_backend=False),
        Implementation("torch", "any", _never, _load_reference_scan),
    ),
}
"""Every operation that has more than one implementation, each with its implementations, the preferred ones first."""
