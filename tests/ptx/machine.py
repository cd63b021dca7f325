"""A GPU in NumPy: it runs the blocks of a program, one lane per thread, for many CTAs at once.

The lanes of a team run together. By default one team has all lanes of a chunk of the grid. Out of step there is a team
per warp, and each runs to the next barrier before the next one starts, so what a missing barrier should have kept apart
is out of order. Where lanes of a team part, those at the first block go first, on registers gathered for them.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ptx import products
from ptx.memory import Memory
from ptx.numerics import Approximations

U32, U64 = np.uint32, np.uint64
WARP = 32
GROUP = 128  # threads of a group of warps, which multiply together on sm_90
ORDERS = ("together", "ascending", "descending")
_MOST_LANES = 16384  # of a chunk
_ENDED = np.iinfo(np.int64).max  # in place of the block that a lane executes next


@dataclass(frozen=True)
class Options:
    """How launches run."""

    order: str = "together"  # of the warps between two barriers, one of ORDERS
    noise: int | None = None  # seed of the errors of approximate instructions; None: none
    races: bool = True  # whether to look for races
    exact_products: bool = False  # whether products are summed in float64, which is faster
    ends: int | None = None  # of the grid, how many CTAs run at either end; None: all run


def launch(program, grid, parameters, tensors, shared, options, counters=None):
    """Run a program over a grid.

    Args:
        program: a ``translator.Program``.
        grid: numbers of CTAs in x, y and z.
        parameters: integers with the bits of each parameter.
        tensors: the ``memory.Tensors`` that the parameters point to.
        shared: bytes of shared memory per CTA.
        options: an ``Options``.
        counters: what counts instructions and accesses, such as ``counters.Counters``.
    """
    work = _Launch(program, grid, parameters, tensors, shared, options, counters)
    total = int(np.prod(grid))
    at_once = max(1, _MOST_LANES // program.threads)
    with np.errstate(all="ignore"):
        for begin, end in _parts(total, options.ends):
            for first in range(begin, end, at_once):
                _Chunk(work, first, min(at_once, end - first)).run()


def _parts(total, ends):
    """The numbers of the CTAs that run, as ranges."""
    return [(0, total)] if ends is None or 2 * ends >= total else [(0, ends), (total - ends, total)]


@dataclass(frozen=True)
class _Launch:
    program: object
    grid: tuple
    parameters: list
    tensors: object
    shared: int
    options: Options
    counters: object


class _Chunk:
    """Some CTAs of a launch, from number ``first`` on, and what their lanes share."""

    def __init__(self, work, first, ctas):
        self.launch, self.program, self.options, self.counters = work, work.program, work.options, work.counters
        self.first, self.ctas, self.threads = first, ctas, work.program.threads
        unit = work.program.kernel.smallest_access
        findings, races = work.program.findings, work.options.races
        self.memory = Memory(work.tensors, findings, first, ctas, self.threads, work.shared, unit, races)
        self.approximations = Approximations(work.options.noise)
        if self.counters is not None:
            self.counters.start(ctas, self.threads)

    def run(self):
        teams = self._teams()
        while True:
            for team in teams:
                team.run()
            if all(team.has_ended for team in teams):
                return
            self._pass_barrier(teams)

    def _teams(self):
        lanes = np.arange(self.ctas * self.threads)
        if self.options.order == "together":
            return [_Team(self, lanes)]
        size = GROUP if self.program.has_groups else WARP
        teams = [_Team(self, lanes[lanes % self.threads // size == n]) for n in range(-(-self.threads // size))]
        return teams if self.options.order == "ascending" else teams[::-1]

    def _pass_barrier(self, teams):
        """Let every CTA with lanes at a barrier go on: all its lanes have run as far as they can."""
        place = np.empty(self.ctas * self.threads, np.int64)
        for team in teams:
            place[team.lanes.index] = team.places
        place = place.reshape(self.ctas, self.threads)
        last = np.where(place == _ENDED, -1, place).max(axis=1)
        arrived = np.flatnonzero(last >= 0)
        if (place[arrived] != last[arrived, None]).any():
            barriers = [code.block for code in self.program.codes if code.block.kind == "barrier"]
            at = next(block.end.at for block in barriers if block.next in place[arrived])
            self.program.findings.note("lanes of a CTA at different barriers, or at their end", at)
        self.memory.barrier(arrived)
        if self.counters is not None:
            self.counters.barriers += len(arrived)
        for team in teams:
            team.go_on()


class _Team:
    """Lanes that run together, each at its own place of the program."""

    def __init__(self, chunk, index):
        self._chunk = chunk
        self._codes = chunk.program.codes
        self.lanes = Lanes(chunk, index)
        zeros = {kind: np.zeros(len(index), kind) for kind in set(chunk.program.register_types)}
        self._registers = [zeros[kind] for kind in chunk.program.register_types]
        self._place = 0  # the block that all lanes execute next, or None where they differ
        self._places = None  # then the block of each lane
        self._waiting = np.zeros(len(index), bool)  # which lanes are at a barrier
        self._part = None  # the positions of some lanes, and these lanes

    @property
    def places(self):
        return np.full(len(self.lanes.index), self._place) if self._places is None else self._places

    @property
    def has_ended(self):
        return bool((self.places == _ENDED).all())

    def go_on(self):
        """Pass the barrier."""
        self._waiting[:] = False

    def run(self):
        """Run every lane to its next barrier or to its end."""
        while self._step_together() if self._places is None else self._step_apart():
            pass

    def _step_together(self):
        """Execute a block in all lanes. Return whether there is more to do."""
        if self._place == _ENDED or self._waiting.any():
            return False
        code = self._codes[self._place]
        taken = self._execute(code, self._registers, self.lanes)
        block = code.block
        if block.kind == "barrier":
            self._waiting[:] = True
        if block.kind == "switch":
            self._places = np.array(block.targets)[taken]
        elif taken is None or taken.all():
            self._place = self._destination(block)
        elif not taken.any():
            self._place = block.next
        else:
            self._places = np.where(taken, self._destination(block), block.next)
        return True

    def _step_apart(self):
        """Execute the first block at which lanes are, in these lanes. Return whether there is more to do."""
        candidates = np.where(self._waiting, _ENDED, self._places)
        place = candidates.min()
        if place == _ENDED:
            return False
        active = candidates == place
        if active.all():
            self._place, self._places = int(place), None
            return True
        code = self._codes[place]
        positions, lanes = self._some_lanes(active)
        registers = [None] * len(self._registers)
        for number in {*code.reads, *code.writes}:
            registers[number] = self._registers[number][positions]
        taken = self._execute(code, registers, lanes)
        for number in code.writes:
            self._registers[number] = self._registers[number].copy()
            self._registers[number][positions] = registers[number]
        block = code.block
        if block.kind == "switch":
            self._places[positions] = np.array(block.targets)[taken]
        else:
            destination = self._destination(block)
            self._places[positions] = destination if taken is None else np.where(taken, destination, block.next)
        self._waiting[positions] = block.kind == "barrier"
        return True

    def _some_lanes(self, active):
        positions = np.flatnonzero(active)
        if self._part is None or not np.array_equal(self._part[0], positions):
            self._part = positions, Lanes(self._chunk, self.lanes.index[positions])
        return self._part

    def _execute(self, code, registers, lanes):
        if self._chunk.counters is not None:
            self._chunk.counters.count_block(code.block, lanes.warps_of_ctas)
        return code.run(registers, lanes)

    @staticmethod
    def _destination(block):
        """Where lanes go that execute the end of a block."""
        return {"jump": block.target, "exit": _ENDED}.get(block.kind, block.next)


class Lanes:
    """The lanes that execute a block, and what its instructions ask of them."""

    def __init__(self, chunk, index):
        self._chunk, self._memory = chunk, chunk.memory
        self.index = index  # numbers of the lanes in the chunk: CTA · threads + thread
        self.approximations = chunk.approximations
        self._count = chunk.counters

    # -- registers that tell a lane where it is

    @cached_property
    def tid_x(self):
        return (self.index % self._chunk.threads).astype(U32)

    @cached_property
    def _cta(self):
        return self._chunk.first + self.index // self._chunk.threads

    @cached_property
    def ctaid_x(self):
        return (self._cta % self._chunk.launch.grid[0]).astype(U32)

    @cached_property
    def ctaid_y(self):
        return (self._cta // self._chunk.launch.grid[0] % self._chunk.launch.grid[1]).astype(U32)

    @cached_property
    def ctaid_z(self):
        return (self._cta // self._chunk.launch.grid[0] // self._chunk.launch.grid[1]).astype(U32)

    @cached_property
    def nctaid_x(self):
        return self.full(U32(self._chunk.launch.grid[0]))

    @cached_property
    def nctaid_y(self):
        return self.full(U32(self._chunk.launch.grid[1]))

    @cached_property
    def nctaid_z(self):
        return self.full(U32(self._chunk.launch.grid[2]))

    @cached_property
    def ntid_x(self):
        return self.full(U32(self._chunk.threads))

    @cached_property
    def laneid(self):
        return self.tid_x % U32(WARP)

    @cached_property
    def warpid(self):
        return self.tid_x // U32(WARP)

    # -- constants

    def full(self, value):
        return np.full(len(self.index), value)

    def parameter(self, number, kind):
        """A parameter of the launch, of which ``kind`` may take the low bits only."""
        bits = np.dtype(kind).itemsize * 8
        unsigned = self._chunk.launch.parameters[number] & (1 << bits) - 1
        return self.full(np.array(unsigned, f"u{bits // 8}").view(kind)[()])

    # -- memory

    def load_global(self, address, width, count, guard, at):
        return self._load(self._memory.load_global, "global", address, width, count, guard, at)

    def load_shared(self, address, width, count, guard, at):
        return self._load(self._memory.load_shared, "shared", address, width, count, guard, at)

    def store_global(self, address, values, width, guard, at):
        self._store(self._memory.store_global, "global", address, values, width, guard, at)

    def store_shared(self, address, values, width, guard, at):
        self._store(self._memory.store_shared, "shared", address, values, width, guard, at)

    def _load(self, load, space, address, width, count, guard, at):
        """Numbers of the lanes under the guard; zeros for the others."""
        if guard is None or guard.all():
            if self._count is not None:
                self._count.count_access(space, "load", address, self.index, width * count, at)
            return load(address, self.index, width, count, at)
        chosen = np.flatnonzero(guard)
        results = [np.zeros(len(self.index), f"u{width}") for _ in range(count)]
        if len(chosen):
            if self._count is not None:
                self._count.count_access(space, "load", address[chosen], self.index[chosen], width * count, at)
            for result, part in zip(results, load(address[chosen], self.index[chosen], width, count, at), strict=True):
                result[chosen] = part
        return results

    def _store(self, store, space, address, values, width, guard, at):
        index = self.index
        if guard is not None and not guard.all():
            chosen = np.flatnonzero(guard)
            if not len(chosen):
                return
            index, address, values = index[chosen], address[chosen], [x[chosen] for x in values]
        if self._count is not None:
            self._count.count_access(space, "store", address, index, width * len(values), at)
        store(address, values, index, width, at)

    def load_matrices(self, address, number, transposed, at):
        self.require_whole_warps(at)
        if self._count is not None:
            rows = np.flatnonzero(self.laneid < 8 * number)
            self._count.count_access("shared", "load", address[rows], self.index[rows], 16, at)
        return self._memory.ldmatrix(address, self.index, number, transposed, at)

    def store_matrices(self, address, values, transposed, at):
        self.require_whole_warps(at)
        if self._count is not None:
            rows = np.flatnonzero(self.laneid < 8 * len(values))
            self._count.count_access("shared", "store", address[rows], self.index[rows], 16, at)
        self._memory.stmatrix(address, values, self.index, transposed, at)

    def copy_async(self, to, source, size, source_bytes, guard, at):
        index = self.index
        if guard is not None and not guard.all():
            chosen = np.flatnonzero(guard)
            to, source, index = to[chosen], source[chosen], index[chosen]
            source_bytes = None if source_bytes is None else source_bytes[chosen]
        if not len(index):
            return
        if self._count is not None:
            read = slice(None) if source_bytes is None else source_bytes > 0
            self._count.count_access("global", "load", source[read], index[read], size, at)
            self._count.count_access("shared", "store", to, index, size, at)
        self._memory.copy_async(to, source, index, size, source_bytes, at)

    def commit_copies(self):
        self._memory.commit(self.index)

    def wait_for_copies(self, leave):
        self._memory.wait(self.index, leave)

    # -- warps

    @cached_property
    def warps(self):
        """Number of warps with a lane here."""
        return len(np.unique(self.index // WARP))

    @cached_property
    def warps_of_ctas(self):
        """The same of each CTA of the chunk."""
        warps = np.unique(self.index // WARP)
        return np.bincount(warps * WARP // self._chunk.threads, minlength=self._chunk.ctas)

    @cached_property
    def _are_whole_warps(self):
        return len(self.index) == self.warps * WARP

    def require_whole_warps(self, at):
        if not self._are_whole_warps:
            self._refuse(at, "a part of a warp executes what needs all of it")

    def _refuse(self, at, message):
        self._chunk.program.findings.refuse(at, message)

    def shuffle(self, mode, value, b, c, at):
        """The value of another lane of the warp: lane b, or a lane b away."""
        self.require_whole_warps(at)
        lane, bound = self.laneid, U32(c & 31)
        kept = U32(c >> 8 & 31)  # bits of the lane that stay, which divide a warp into segments
        first, last = lane & kept, lane & kept | bound & ~kept
        source = {"idx": first | b & ~kept, "bfly": lane ^ b, "up": lane - b, "down": lane + b}[mode]
        inside = source.astype(np.int32) >= last.astype(np.int32) if mode == "up" else source <= last
        source = np.where(inside, source, lane)
        warp_start = np.arange(len(lane)) & ~(WARP - 1)
        return value[warp_start + source]

    def reduce(self, operation, value, members, at):
        """The sum, minimum … over the warp."""
        self.require_whole_warps(at)
        if (~members).any():
            self._refuse(at, "a reduction of a part of a warp")
        function = {"add": np.add, "min": np.minimum, "max": np.maximum,
                    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[operation]  # fmt: skip
        return np.repeat(function.reduce(value.reshape(-1, WARP), axis=1, dtype=value.dtype), WARP)

    def multiply(self, a, b, c, kind, at):
        """a · b + c by every warp."""
        self.require_whole_warps(at)
        return products.mma(a, b, c, kind, exact=self._chunk.options.exact_products)

    def multiply_group(self, a, b, c, keep, kind, at):
        """a · b + c by every group of warps, with b and perhaps a in shared memory; without c where not ``keep``."""
        self.require_whole_warps(at)
        rows = a if isinstance(a, list) else self._rows_of_group(a, kind, at)
        columns = self._memory.matrix(b, self.index, 2 * len(c), kind, at)
        c = [np.where(keep, x, U32(0)) for x in c]
        return products.wgmma(rows, columns, c, kind, exact=self._chunk.options.exact_products)

    def _rows_of_group(self, descriptor, kind, at):
        """A matrix [W, 16, K] in shared memory: a quarter of the group's 64 rows per warp."""
        every = self._memory.matrix(descriptor, self.index, 64, kind, at).swapaxes(1, 2)
        quarter = self.warpid[::WARP] % U32(4)
        return every.reshape(len(every), 4, 16, -1)[np.arange(len(every)), quarter]
