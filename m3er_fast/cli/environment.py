"""Versions, devices and packages of this machine, the back ends that work on it, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Sequence
from typing import NamedTuple

import torch

from m3er_fast.verification import VERIFIED, Operation, backend_names, try_backend

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
    """Try every device and package, rather than only look it up.

    Returns:
        Findings under the headings "versions", "devices" and "packages".
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
    }


def try_backends() -> list[Finding]:
    """Compute the smallest case of every operation by each back end that may be requested."""
    return [_backend(operation, name) for operation in VERIFIED for name in backend_names(operation.name)]


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


def _backend(operation: Operation, name: str) -> Finding:
    try:
        reason = try_backend(operation, name)
    except Exception as error:  # the user wants to read the reason, whatever it is
        reason = _line(error)
    note = f"on {'cuda' if torch.cuda.is_available() else 'cpu'}" if reason is None else reason
    return Finding(f"{operation.name} {name}", reason is None, note)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
