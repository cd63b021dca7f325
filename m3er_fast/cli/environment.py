"""Versions, devices and packages of this machine, the back ends that work on it, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from m3er_fast import functional
from m3er_fast.functional import CheckProjections
from m3er_fast.functional._dispatch import OPERATIONS, backends
from m3er_fast.neighbors import NeighborEngine
from m3er_fast.network import MemoryFusionNetwork

# The modules to try, each with the extra that installs it, or None for a dependency of the base.
_PACKAGES = {
    "numpy": None,
    "sklearn": None,
    "safetensors": None,
    "triton": None,
    "pyarrow": "score",
    "typer": "score",
    "rich": "score",
    "h5py": "hdf5",
    "matplotlib": "plot",
    "faiss": "cpu",
    "cupy": "gpu",
    "ray": "ray",
}


class Finding(NamedTuple):
    """The result of one attempt."""

    name: str
    works: bool
    note: str  # version or description, or the reason why it does not work


def describe_environment() -> dict[str, list[Finding]]:
    """Try every version, device, package and back end, rather than only look it up.

    Returns:
        Findings under the headings "versions", "devices", "packages" and "backends".
    """
    from m3er_fast import __version__

    distributions = importlib.metadata.packages_distributions()
    return {
        "versions": [
            Finding("m3er-fast", True, __version__),
            Finding("python", True, f"{platform.python_version()} on {platform.platform()}"),
            Finding("torch", True, torch.__version__),
        ],
        "devices": [Finding("cpu", True, f"{torch.get_num_threads()} threads"), *_cuda_devices()],
        "packages": [_package(name, extra, distributions.get(name, ())) for name, extra in _PACKAGES.items()],
        "backends": [
            _backend(operation, example, name)
            for operation, example in _EXAMPLES.items()
            for name in _backend_names(operation)
        ],
    }


def _cuda_devices() -> list[Finding]:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [
            Finding(f"cuda:{index}", True, f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
            for index, device in enumerate(devices)
        ]
    if torch.version.cuda is None:
        return [Finding("cuda", False, f"torch {torch.__version__} is built without CUDA")]
    return [Finding("cuda", False, f"torch is built for CUDA {torch.version.cuda}, but finds no NVIDIA GPU or driver")]


def _package(module: str, extra: str | None, distributions: Sequence[str]) -> Finding:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(distributions)))
    if len(set(distributions)) > 1:  # for example faiss-cpu and faiss-gpu
        return Finding(module, False, f"{versions} share one folder and overwrite each other: keep only one of them")
    if not distributions and importlib.util.find_spec(module) is None:
        return Finding(module, False, "not installed" + (f": pip install 'm3er-fast[{extra}]'" if extra else ""))
    try:
        loaded = importlib.import_module(module)
        if module == "cupy":
            loaded.cuda.runtime.getDeviceCount()  # raises where there is no driver
    except Exception as error:  # a broken package may raise anything: faiss-gpu without CUDA raises RuntimeError
        return Finding(module, False, f"{versions} does not load: {_line(error)}")
    return Finding(module, True, versions)


def _backend_names(operation: str) -> Sequence[str]:
    """Return the back ends that may be requested for an operation, without "auto"."""
    if operation in OPERATIONS:
        return backends(operation)
    return [engine for engine in get_args(NeighborEngine) if engine != "auto"]


def _backend(operation: str, example: Callable[[str, str], Any], backend: str) -> Finding:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        example(backend, device)
    except Exception as error:  # the user wants to read the reason, whatever it is
        return Finding(f"{operation} {backend}", False, _line(error).removeprefix(f"{operation}: "))
    return Finding(f"{operation} {backend}", True, f"on {device}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- Each operation, called once on the smallest possible input ---


def _fusion_loss(backend: str, device: str) -> Tensor:
    target = torch.zeros(1, dtype=torch.int64, device=device)
    return functional.fusion_loss(torch.zeros(2, 1, 2, device=device), target, backend=backend)


def _class_costs(backend: str, device: str) -> Tensor:
    return functional.class_costs(torch.zeros(2, 1, 2, device=device), backend=backend)


def _check_statistics(backend: str, device: str) -> Any:
    vector, matrix = torch.zeros(1, device=device), torch.ones(1, 1, device=device)
    projections = CheckProjections(
        [vector] * 2, [matrix], [vector], [matrix], [vector], [matrix] * 2, [vector], [vector]
    )
    return functional.check_statistics([matrix] * 2, projections, backend=backend)


def _sequence_statistics(backend: str, device: str) -> Any:
    frames = torch.zeros(1, 1, 1, device=device)
    valid = torch.ones(1, 1, dtype=torch.bool, device=device)
    return functional.sequence_statistics(frames, valid, backend=backend)


def _nearest_neighbors(engine: str, device: str) -> Any:
    row = torch.zeros(1, 1, device=device)
    return functional.nearest_neighbors(row, row, 1, engine=engine)


def _local_least_squares(backend: str, device: str) -> Any:
    row = torch.zeros(1, 1, device=device)
    neighbor = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return functional.local_least_squares(row, row, row, neighbor, backend=backend)


def _memory_scan(backend: str, device: str) -> Any:
    weights = MemoryFusionNetwork({"a": 1, "b": 1}, 2).to(device).scan_weights()
    frames, lengths = torch.zeros(1, 1, 1, device=device), torch.ones(1, dtype=torch.int64, device=device)
    return functional.memory_scan([frames, frames], lengths, weights, backend=backend)


_EXAMPLES: dict[str, Callable[[str, str], Any]] = {
    "fusion_loss": _fusion_loss,
    "class_costs": _class_costs,
    "check_statistics": _check_statistics,
    "sequence_statistics": _sequence_statistics,
    "nearest_neighbors": _nearest_neighbors,
    "local_least_squares": _local_least_squares,
    "memory_scan": _memory_scan,
}
