"""A driver that counts each launch by itself."""

from __future__ import annotations

import re

from ptx.counters import Counters
from ptx.driver import EmulatedDriver
from ptx.machine import Options

from benchmarks.counts.bounds import Launch

_SPECIAL = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "div")


class CountingDriver(EmulatedDriver):
    """The emulated GPU, which notes the counts of every launch in ``counted``."""

    def __init__(self, target):
        super().__init__(target, Options(races=False, exact_products=True))
        self.counted = []

    def _launcher(self, source, metadata):
        launch = super()._launcher(source, metadata)
        program = self.programs[-1]

        def counted(x, y, z, *arguments):
            self.counters = Counters()
            launch(x, y, z, *arguments)
            self.counted.append(summary(program.name, x * y * z, program.threads, self.counters))

        return counted

    def count(self, step):
        """The launches of a call."""
        self.counted.clear()
        step()
        return list(self.counted)


def summary(kernel, programs, threads, counters):
    """The counts of a launch as numbers."""
    loads, stores = (counters.traffic("global", kind) for kind in ("load", "store"))
    shared = counters.traffic("shared", "load") + counters.traffic("shared", "store")
    flops = {"tf32": 0, "bf16": 0}
    for opcode, warps in counters.instructions.items():
        if opcode.startswith(("mma.", "wgmma.mma_async.")):
            flops["tf32" if "tf32" in opcode else "bf16"] += warps * _flops(opcode)
    return Launch(
        kernel=kernel,
        programs=programs,
        threads=threads,
        instructions=counters.warp_instructions,
        special=sum(warps for opcode, warps in counters.instructions.items() if opcode.split(".")[0] in _SPECIAL),
        barriers=counters.barriers,
        load_sectors=loads.moved,
        store_sectors=stores.moved,
        distinct_sectors=sum(counters.distinct_sectors(kind) for kind in ("load", "store")),
        shared_wavefronts=shared.moved,
        ideal_wavefronts=shared.ideal,
        tf32_flops=flops["tf32"],
        bf16_flops=flops["bf16"],
        most_instructions=counters.of_busiest_cta("instructions"),
        most_wavefronts=counters.of_busiest_cta("wavefronts"),
    )


def _flops(opcode):
    """Operations of a product per warp that takes part: four share a wgmma."""
    m, n, k = map(int, re.search(r"m(\d+)n(\d+)k(\d+)", opcode).groups())
    return 2 * m * n * k // (4 if opcode.startswith("wgmma") else 1)
