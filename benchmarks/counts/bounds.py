"""From counts to the least time that a launch can take on a GPU.

A multiprocessor issues at most four instructions of warps per cycle, and finishes one wavefront of shared memory and
half a warp's special functions (2^x, logarithm, reciprocal, root). The busiest one runs at least its share of the
programs, rounded up, and at least the program with the most instructions, or wavefronts. The L2 cache, as if L1 caught
nothing, and DRAM serve all of them together. The largest of these times is the bound. Latencies, dependences and the
launch itself come on top; ptxas may fuse or drop some of the PTX.
"""

from __future__ import annotations

from typing import NamedTuple

ISSUES = 4  # instructions of warps per cycle and multiprocessor
# CUDA C++ programming guide, throughput of arithmetic instructions: 16 special functions per cycle on 8.0 and on 9.0.
SPECIAL_CYCLES = 2  # per instruction of a warp
SECTOR = 32  # bytes
# A100 whitepaper (2020), "L2 cache read bandwidth". NVIDIA states none for Hopper; its caches are at least as wide.
L2_BYTES = 5120  # per cycle


class Device(NamedTuple):
    """A GPU by its datasheet: dense rates, the SXM variant."""

    target: int  # generation, 80 for compute capability 8.0
    multiprocessors: int
    fp32_flops: float  # per second
    fp32_lanes: int  # of a multiprocessor
    tf32_flops: float
    bf16_flops: float
    dram: float  # bytes per second

    @property
    def clock(self) -> float:
        """Cycles per second at which the datasheet's fp32 rate holds: an FMA per lane and cycle."""
        return self.fp32_flops / (2 * self.fp32_lanes * self.multiprocessors)


DEVICES = {
    # NVIDIA A100 datasheet (2021), A100 80GB SXM; A100 whitepaper: 108 multiprocessors of 64 lanes.
    "A100": Device(80, 108, 19.5e12, 64, 156e12, 312e12, 2.039e12),
    # NVIDIA H100 datasheet (2024), H100 SXM, rates without sparsity; H100 whitepaper: 132 multiprocessors of 128 lanes.
    "H100": Device(90, 132, 67e12, 128, 494.5e12, 989.5e12, 3.35e12),
    # NVIDIA H200 datasheet (2024), H200 SXM: the H100's chip with faster memory.
    "H200": Device(90, 132, 67e12, 128, 494.5e12, 989.5e12, 4.8e12),
}


class Launch(NamedTuple):
    """Counts of one launch, of all its programs together."""

    kernel: str
    programs: int
    threads: int  # of a program
    instructions: int  # of warps
    special: int  # of them, special functions
    barriers: int
    load_sectors: int  # of 32 bytes, each once per instruction of a warp
    store_sectors: int
    distinct_sectors: int  # each once per launch and kind of access
    shared_wavefronts: int
    ideal_wavefronts: int  # without bank conflicts
    tf32_flops: int  # of tensor cores
    bf16_flops: int  # the same in bfloat16 and float16
    most_instructions: int  # of warps of one program
    most_wavefronts: int  # of one program


class Bound(NamedTuple):
    """The least time of a launch."""

    seconds: float
    resource: str  # what takes so long


def bound(launch: Launch, device: Device) -> Bound:
    """Return the least time that a launch can take on a device."""
    share = -(-launch.programs // device.multiprocessors) / launch.programs  # of the busiest multiprocessor
    moved = SECTOR * (launch.load_sectors + launch.store_sectors)
    alone = share * device.multiprocessors  # as if the whole device did the busiest one's share
    seconds = {
        "issue": max(share * launch.instructions, launch.most_instructions) / ISSUES / device.clock,
        "special functions": share * SPECIAL_CYCLES * launch.special / device.clock,
        "shared memory": max(share * launch.shared_wavefronts, launch.most_wavefronts) / device.clock,
        "tensor cores": alone * (launch.tf32_flops / device.tf32_flops + launch.bf16_flops / device.bf16_flops),
        "L2": moved / L2_BYTES / device.clock,
        "DRAM": SECTOR * launch.distinct_sectors / device.dram,
    }
    resource = max(seconds, key=seconds.__getitem__)
    return Bound(seconds[resource], resource)


def total(bounds: list[Bound]) -> Bound:
    """Return the bound of launches one after the other, and the resource of the longest."""
    return Bound(sum(b.seconds for b in bounds), max(bounds).resource)
