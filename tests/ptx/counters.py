"""What a launch costs a GPU, counted while the emulator runs it: instructions, memory traffic, bank conflicts."""

import collections
from dataclasses import dataclass

import numpy as np

SECTOR = 32  # bytes that global memory moves at once
BANKS = 32  # of shared memory, four bytes wide
_WARP = 32


@dataclass
class Traffic:
    """Accesses to memory.

    Attributes:
        requests: instructions of warps.
        requested: bytes that their lanes asked for.
        moved: sectors of global memory, each once per request; or wavefronts of shared memory, one per cycle.
        ideal: the fewest that could move these bytes: 32 of them per sector; for shared memory 32 words per wavefront.
    """

    requests: int = 0
    requested: int = 0
    moved: int = 0
    ideal: int = 0

    def __add__(self, other):
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Counters:
    """Counts of all launches since it was made.

    Attributes:
        instructions: by opcode, how many warps executed it.
        barriers: how many CTAs passed one.
    """

    def __init__(self):
        self.instructions = collections.Counter()
        self.barriers = 0
        self._of_ctas = {"instructions": [], "wavefronts": []}  # an array per chunk of the grid
        self._traffic = collections.defaultdict(Traffic)
        self._touched = {"load": set(), "store": set()}

    def start(self, ctas, threads):
        """Some CTAs start, whose lanes are numbered from 0 on."""
        self._threads = threads
        for chunks in self._of_ctas.values():
            chunks.append(np.zeros(ctas, int))

    def count_block(self, block, warps_of_ctas):
        """Some warps of each CTA execute a block."""
        warps = int(warps_of_ctas.sum())
        self._of_ctas["instructions"][-1] += warps_of_ctas * (len(block.instructions) + (block.end is not None))
        for instruction in block.instructions:
            self.instructions[instruction.opcode] += warps
        if block.end is not None:
            self.instructions[block.end.opcode] += warps

    def count_access(self, space, kind, address, lanes, size, at):
        """Lanes access ``size`` bytes each: ``space`` is "global" or "shared", ``kind`` "load" or "store"."""
        requests = len(np.unique(lanes // _WARP))
        if space == "global":
            moved, ideal = _sectors(address, lanes, size)
            self._touched[kind].update(np.unique(address // np.uint64(SECTOR)).tolist())
        else:
            lane, cycles = _wavefronts(address, lanes, size)
            moved, ideal = int(cycles.sum()), len(cycles)
            np.add.at(self._of_ctas["wavefronts"][-1], lane // self._threads, cycles)
        self._traffic[space, kind, at] += Traffic(requests, len(lanes) * size, moved, ideal)

    def traffic(self, space, kind):
        """The traffic of all instructions."""
        return sum((t for (s, k, _), t in self._traffic.items() if (s, k) == (space, kind)), Traffic())

    def traffic_by_instruction(self, space, kind):
        """The same per instruction, by its number in the kernel; of one kernel only."""
        return {at: traffic for (s, k, at), traffic in self._traffic.items() if (s, k) == (space, kind)}

    def distinct_sectors(self, kind):
        """How many sectors of global memory were accessed at all."""
        return len(self._touched[kind])

    def of_busiest_cta(self, what):
        """The most "instructions" of warps, or "wavefronts", of a CTA."""
        return int(max(chunk.max() for chunk in self._of_ctas[what]))

    @property
    def warp_instructions(self):
        return self.instructions.total()


def _sectors(address, lanes, size):
    """Sectors that the warps' accesses move, and the fewest that could."""
    first, last = address // np.uint64(SECTOR), (address + np.uint64(size - 1)) // np.uint64(SECTOR)
    warp = lanes // _WARP
    sectors = np.stack([np.concatenate([warp, warp]), np.concatenate([first, last]).astype(np.int64)])
    return np.unique(sectors, axis=1).shape[1], -(-len(lanes) * size // SECTOR)


def _wavefronts(address, lanes, size):
    """The first lane, and the wavefronts, of each part of a warp that accesses at once: one wavefront would be ideal.

    A wavefront takes one word per bank. A warp whose lanes access 8 or 16 bytes does so in halves or quarters.
    """
    words = max(1, size // 4)
    part = lanes // (_WARP // words)
    word = (np.asarray(address, np.int64) // 4)[:, None] + np.arange(words)
    pairs = np.unique(np.stack([np.repeat(part, words), word.ravel()]), axis=1)
    bank, conflicts = np.unique(pairs[0] * BANKS + pairs[1] % BANKS, return_counts=True)
    part, first = np.unique(bank // BANKS, return_index=True)
    return part * (_WARP // words), np.maximum.reduceat(conflicts, first)
