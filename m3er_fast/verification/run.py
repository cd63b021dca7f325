"""Every implementation of every operation, run on this machine beside the reference in float64."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from m3er_fast.functional import BackendUnavailableError, unchecked
from m3er_fast.functional._dispatch import OPERATIONS, Implementation
from m3er_fast.neighbors import NeighborEngine
from m3er_fast.verification.check_statistics import CHECK_STATISTICS
from m3er_fast.verification.comparison import Difference, largest_difference
from m3er_fast.verification.local_lstsq import LOCAL_LEAST_SQUARES
from m3er_fast.verification.loss import CLASS_COSTS, FUSION_LOSS
from m3er_fast.verification.memory_scan import MEMORY_SCAN
from m3er_fast.verification.neighbors import NEAREST_NEIGHBORS
from m3er_fast.verification.operation import Case, Operation, Outputs, in_float64, moved
from m3er_fast.verification.sequence_statistics import SEQUENCE_STATISTICS

VERIFIED = (
    FUSION_LOSS,
    CLASS_COSTS,
    CHECK_STATISTICS,
    SEQUENCE_STATISTICS,
    NEAREST_NEIGHBORS,
    LOCAL_LEAST_SQUARES,
    MEMORY_SCAN,
)
"""Every operation that has several implementations."""

# Of one implementation: enough for a median, and little beside the cases.
_TIMED_SECONDS = 0.25
_FEWEST_TIMED, _MOST_TIMED = 3, 50


class Mistake(NamedTuple):
    """A case that an implementation gets wrong."""

    case: str
    place: str  # the output's element that is farthest off, such as "loss[3]", or what the implementation raised
    got: str
    wanted: str
    share: float  # of its tolerance


class Verdict(NamedTuple):
    """What one implementation did on one device."""

    operation: str
    implementation: str
    device: str
    cases: int = 0  # that it computed; those that it refuses are other implementations'
    left_out: int = 0  # for which there was no time
    share: float = 0.0  # the largest share of a tolerance; above 1 the implementation is wrong
    mistakes: tuple[Mistake, ...] = ()
    unavailable: str | None = None  # why it computes nothing here
    milliseconds: float | None = None  # of the typical size; None if it is not timed
    speedup: float | None = None  # over plain PyTorch on the same device


def verify(seconds: float = 60.0) -> Iterator[Verdict]:
    """Run every implementation on small hard inputs, on the CPU and on the current GPU, if there is one.

    Args:
        seconds: how long all may take. An implementation may take a third of what is left of them, the last one all; it
            leaves out the cases that it does not reach.

    Yields:
        One verdict after the other, as soon as it is known.
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    pairs = [(operation, device) for operation in VERIFIED for device in devices]
    candidates = [(pair, candidate) for pair in pairs for candidate in _candidates(*pair)]
    end = time.monotonic() + seconds
    wanted: dict[str, dict[str, Outputs]] = {operation.name: {} for operation in VERIFIED}
    eager: dict[tuple[str, str], float] = {}
    for number, ((operation, device), candidate) in enumerate(candidates):
        now = time.monotonic()
        deadline = now + (end - now) / (3 if number + 1 < len(candidates) else 1)
        with _quiet():
            verdict = _verify(operation, candidate, device, wanted[operation.name], deadline)
        if verdict.milliseconds is not None:
            if candidate.name == "torch":
                eager[operation.name, str(device)] = verdict.milliseconds
            verdict = verdict._replace(speedup=eager[operation.name, str(device)] / verdict.milliseconds)
        yield verdict


def _candidates(operation: Operation, device: torch.device) -> list[Implementation]:
    """The implementations to run on a device, plain PyTorch first: the others are timed against it."""
    elsewhere = ("cpu", "compiler") if device.type == "cuda" else ("cuda", None) if torch.cuda.is_available() else ()
    return [entry for entry in reversed(_implementations(operation.name)) if entry.device not in elsewhere]


def backend_names(operation: str) -> list[str]:
    """The back ends of an operation that may be requested by name, without "auto"."""
    return [entry.name for entry in reversed(_implementations(operation)) if entry.is_backend]


def try_backend(operation: Operation, name: str) -> str | None:
    """Compute the smallest case by one back end; return why it refuses, or None if it computed something.

    Raises:
        Exception: whatever the back end raises.
    """
    [backend] = [x for x in _implementations(operation.name) if x.is_backend and x.name == name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = moved(next(iter(operation.cases())).inputs, device)
    reason = backend.refusal(*operation.arguments(inputs))
    if reason is None:
        operation.outputs(backend.load(), inputs)
    return reason


def _implementations(operation: str) -> Sequence[Implementation]:
    if operation in OPERATIONS:
        return OPERATIONS[operation]
    engines = [engine for engine in get_args(NeighborEngine) if engine != "auto"]
    return [
        Implementation(engine, "any", partial(_no_engine, engine), partial(_search_by, engine))
        for engine in reversed(engines)
    ]


# --- Engines of the neighbour search, as the dispatcher's other implementations ---


@lru_cache(maxsize=1)
def _index(bank: Tensor, engine: str) -> Any:
    return unchecked.neighbor_index(bank, engine)


def _no_engine(engine: str, _query: Tensor, bank: Tensor, differentiate: bool) -> str | None:
    if differentiate and engine != "torch":
        return "its distances have no gradients"
    try:
        _index(bank, engine)
    except BackendUnavailableError as error:
        return str(error.__cause__)
    return None


def _search_by(engine: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def search(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _index(bank, engine).search(query, k)
        return found

    return search


# --- One implementation ---


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence NumPy, by which Triton's interpreter computes: inputs that overflow are meant to."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _verify(
    operation: Operation, candidate: Implementation, device: torch.device, wanted: dict[str, Outputs], deadline: float
) -> Verdict:
    verdict = Verdict(operation.name, candidate.name, str(device))
    refusals: list[str] = []
    for case in operation.cases():
        if time.monotonic() > deadline:
            verdict = verdict._replace(left_out=verdict.left_out + 1)
            continue
        inputs = moved(case.inputs, device)
        reason = candidate.refusal(*operation.arguments(inputs))
        if reason is not None:
            refusals.append(reason)
            continue
        if case.name not in wanted:
            wanted[case.name] = operation.outputs(operation.definition, in_float64(case.inputs))
        found = _worst(operation, candidate, case, inputs, wanted[case.name])
        share = found.share if isinstance(found, Mistake) else found
        mistakes = (found,) if isinstance(found, Mistake) else ()
        verdict = verdict._replace(
            cases=verdict.cases + 1, share=max(verdict.share, share), mistakes=(*verdict.mistakes, *mistakes)
        )
    if not verdict.cases:
        return verdict._replace(unavailable=refusals[0] if refusals else "there was no time left")
    # Kernels for GPUs run on a CPU only in an interpreter, whose time says nothing.
    if not verdict.mistakes and not (candidate.device == "cuda" and device.type == "cpu"):
        verdict = verdict._replace(milliseconds=_milliseconds(operation, candidate, device))
    return verdict


def _worst(
    operation: Operation, candidate: Implementation, case: Case, inputs: dict[str, Any], wanted: Outputs
) -> Mistake | float:
    """The element that is farthest off if the case is wrong, else its share of the tolerance."""
    try:
        got = operation.outputs(candidate.load(), inputs)
    except Exception as error:  # whatever an implementation raises is its mistake
        return Mistake(case.name, type(error).__name__, " ".join(str(error).split()), "a result", torch.inf)
    tolerances = operation.tolerances(case.inputs, wanted, candidate.name)
    differences: list[Difference] = [
        largest_difference(name, got[name], value, tolerances[name]) for name, value in wanted.items()
    ]
    worst = max(differences, key=lambda difference: difference.share)
    if worst.share <= 1.0:
        return worst.share
    return Mistake(case.name, worst.place, worst.got, worst.wanted, worst.share)


def _milliseconds(operation: Operation, candidate: Implementation, device: torch.device) -> float | None:
    """The median time of the typical size, or None if the implementation refuses it."""
    inputs = moved(operation.typical(), device)
    if candidate.refusal(*operation.arguments(inputs)) is not None:
        return None
    compute = candidate.load()
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    operation.outputs(compute, inputs)  # compiles, and fills caches
    end = time.perf_counter() + _TIMED_SECONDS
    while len(times) < _FEWEST_TIMED or (len(times) < _MOST_TIMED and time.perf_counter() < end):
        synchronize()
        start = time.perf_counter()
        operation.outputs(compute, inputs)
        synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
