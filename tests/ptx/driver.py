"""A driver of Triton without a GPU: a launch compiles as for a GPU of a given generation, and runs in the emulator.

Everything before the launch is Triton's own: specialisation, options, ptxas, the limit of shared memory. Tensors are
CPU tensors.
"""

import ctypes
import pathlib

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from ptx import machine
from ptx.memory import Tensors
from ptx.translator import Program

# Bytes of shared memory that a CTA may have (CUDA C++ programming guide, technical specifications).
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}
_MOST_THREADS = 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_FLOATS = {"fp32": (np.float32, np.uint32), "f32": (np.float32, np.uint32), "fp64": (np.float64, np.uint64)}


class EmulatedDriver(DriverBase):
    """A GPU of compute capability ``target`` (80 for 8.0).

    Attributes:
        options: how launches run.
        counters: what counts them, or None.
        launches: by name of the kernel, how many there were.
        programs: every kernel that was compiled.
    """

    def __init__(self, target, options=None):
        super().__init__()
        self.target = target
        self.options = options or machine.Options()
        self.counters = None
        self.launches, self.programs = {}, []
        self.utils = _Utilities(target)
        self.launcher_cls = self._launcher

    def _launcher(self, source, metadata):
        program = Program(_ptx_of(metadata))
        self.programs.append(program)
        return _Launcher(self, program, list(source.signature.values()), metadata.shared)

    def take_the_place_of_a_gpu(self):
        """Make Triton and this project's kernels run CPU tensors here, from now on in this process.

        It must not interpret kernels: TRITON_INTERPRET is read when a kernel is defined.
        """
        from m3er_fast.kernels import _device

        _keep_freed_memory()
        triton.runtime.driver.set_active(self)
        _device.unavailable_reason = lambda tensor: (
            None if tensor.device.type == "cpu" else f"the emulator runs on the CPU, not on {tensor.device}"
        )
        torch.cuda.get_device_capability = self.get_device_capability

    def take_findings(self):
        """What was found wrong since the last call, one line each."""
        found = [line for program in self.programs for line in program.findings.report()]
        for program in self.programs:
            program.findings.clear()
        return found

    # -- what Triton asks of a driver

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", self.target, machine.WARP)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.target, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        raise NotImplementedError("the emulator measures no time")


def _keep_freed_memory():
    """Tell glibc to keep the memory of NumPy's temporaries for the next ones.

    By default it returns each to the system, and a chunk of many lanes then takes three times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, number in ((_M_MMAP_THRESHOLD, 1 << 25), (_M_TRIM_THRESHOLD, 1 << 30)):
            mallopt(parameter, number)


class _Utilities:
    def __init__(self, target):
        self._target = target

    def get_device_properties(self, device):
        return {"max_shared_mem": MOST_SHARED[self._target], "warpSize": machine.WARP}

    def load_binary(self, name, binary, shared, device):
        """Module, function, registers, spills, most threads. The launcher has the program already."""
        return name, name, 0, 0, _MOST_THREADS


def _ptx_of(metadata):
    """The text that Triton compiled, from its cache."""
    files = get_cache_manager(metadata.hash).get_group(f"{metadata.name[:150]}.json")
    return pathlib.Path(next(path for name, path in files.items() if name.endswith(".ptx"))).read_text()


class _Launcher:
    """Launches one compiled kernel."""

    def __init__(self, driver, program, signature, shared):
        self._driver, self._program, self._signature, self._shared = driver, program, signature, shared

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        program, driver = self._program, self._driver
        tensors = Tensors()
        parameters = [_bits(kind, value, tensors) for kind, value in _passed(self._signature, arguments)]
        # The last parameters are buffers that no kernel of this project uses.
        parameters += [0] * (len(program.kernel.parameters) - len(parameters))
        driver.launches[program.name] = driver.launches.get(program.name, 0) + 1
        machine.launch(program, (x, y, z), parameters, tensors, self._shared, driver.options, driver.counters)


def _passed(signature, arguments):
    """Type and value of every argument that is no constant, those of tuples one by one."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _passed(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _bits(kind, value, tensors):
    """The bits of an argument as a kernel gets them."""
    if kind.startswith("*"):
        name, unit = f"{value.dtype} {tuple(value.shape)}", min(4, value.element_size())
        return int(tensors.add(value.data_ptr(), _extent(value), name, unit))
    if kind in _FLOATS:
        number, unsigned = _FLOATS[kind]
        return int(number(value).view(unsigned))
    return int(value) & (1 << int(kind[1:])) - 1


def _extent(tensor):
    """Bytes from a tensor's first element to the end of its last one."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
