"""Global and shared memory of a launch, every access checked.

A tensor has a range of addresses of its own, far from all others, so an address that strays from it points nowhere. A
bad access is noted and left out: its load gives ``POISON``, and the launch goes on.

Races: every place remembers who wrote and who read it last, as one number for CTA, number of barriers passed, and warp.
Two accesses of a place, one of them a write, are in order if one warp made both, or if a barrier of their CTA lies
between them. Any two CTAs are out of order. Two writes of one value are no race.
"""

import ctypes
from dataclasses import dataclass, field

import numpy as np

from ptx.products import values

U8, U32, U64, S64 = np.uint8, np.uint32, np.uint64, np.int64
POISON = 0xFF  # every byte of what cannot be read: NaN, or -1
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _views(data):
    """The same bytes as numbers of every width."""
    return {width: data.view(kind) for width, kind in _UNSIGNED.items()}


def _poison(width, count, lanes):
    return np.frombuffer(bytes([POISON]) * (width * count * lanes), _UNSIGNED[width]).reshape(count, lanes).copy()


def _consecutive(first, count):
    """Places [count, L] of numbers that follow each other, from ``first`` [L] on."""
    return first if count == 1 else first + np.arange(count)[:, None]


# --- races ------------------------------------------------------------------------------------------------------------

# Who: CTA + 1, barriers passed, warp. A CTA's barriers and its warps are the low bits.
_CTA_BITS, _BARRIER_BITS = 34, 6
_SEVERAL_WARPS = 63  # in place of the warp
_NOBODY, _IN_FLIGHT, _SEVERAL_CTAS = 0, -1, -2  # in place of the whole


class _History:
    """Who wrote and who read each unit of memory last. Units are [n, L], or [L]; who accesses them is [L]."""

    def __init__(self, units):
        self.writer = np.zeros(units, S64)  # zeros: the system gives memory only to what is touched
        self.reader = np.zeros(units, S64)
        self.written = self.read = False

    def note_read(self, units, who):
        """Remember a read."""
        self.read = True
        before = self.reader[units]
        if (before == _SEVERAL_CTAS).all():
            return
        self.reader[units] = who
        several = _unordered(before, who) | (self.reader[units] != who)
        if several.any():
            units, before, who = units[several], before[several], np.broadcast_to(who, units.shape)[several]
            ctas = _other_cta(before, who) | _other_cta(self.reader[units], who)
            self.reader[units] = who | _SEVERAL_WARPS
            self.reader[units[ctas]] = _SEVERAL_CTAS

    def note_write(self, units, who, changed):
        """Remember a write. Return which lanes raced with a read and which with a write.

        ``changed``: which lanes write another value than the place has; True: all. Warps that hold copies of the same
        numbers may all store them.
        """
        after_read = _lanes(_unordered(self.reader[units], who)) if self.read else False
        after_write = False
        if self.written:
            writer = self.writer[units]
            after_write = _lanes(_unordered(writer, who) & (changed | (writer == _IN_FLIGHT)))
        self.writer[units] = who
        self.written = True
        return after_read, after_write


def _unordered(last, who):
    """Whether an access of ``last`` and one of ``who`` are in no order: of several warps or CTAs, with no barrier."""
    differing = last ^ who
    in_order = (differing >> _BARRIER_BITS != 0) & (differing >> _CTA_BITS == 0)
    return ~in_order & (differing != 0) & (last != _NOBODY)


def _other_cta(last, who):
    return ((last ^ who) >> _CTA_BITS != 0) & (last != _NOBODY)


def _lanes(found):
    """Which lanes are found in [n, L] or [L]."""
    return found.any(axis=0) if found.ndim > 1 else found


# --- tensors ----------------------------------------------------------------------------------------------------------


@dataclass
class _Tensor:
    name: str
    pointer: int
    size: int
    unit: int  # of its races, in bytes
    base: int  # address that the kernel sees
    views: dict
    padding: int  # bytes of the views before the tensor: they begin at a multiple of 16
    history: _History | None = field(default=None, repr=False)
    history_padding: int = 0  # bytes of the history before the tensor


class Tensors:
    """The tensors of a launch, each with a range of addresses of its own."""

    _RANGE_BITS = 40  # a tensor lies in the middle of its range, so that what strays is still known to be its

    def __init__(self, unit=1):
        self.unit = unit
        self._tensors = []

    def add(self, pointer, size, name, unit=None):
        """Add ``size`` bytes from ``pointer`` on; return the address that the kernel gets for them.

        The address has the last 12 bits of the pointer. ``unit``: bytes of the smallest access, 1, 2 or 4.
        """
        padding = pointer % 16
        data = np.zeros(0, U8)
        if size:
            length = -(-(padding + size) // 16) * 16  # what lies beyond the tensor is in its views, but never touched
            data = np.frombuffer((ctypes.c_uint8 * length).from_address(pointer - padding), U8)
        middle = (1 << self._RANGE_BITS - 1) + pointer % 4096
        base = (len(self._tensors) + 1 << self._RANGE_BITS) + middle
        self._tensors.append(_Tensor(name, pointer, size, unit or self.unit, base, _views(data), padding))
        return U64(base)

    def of(self, address):
        """The tensor in whose range an address is, or None."""
        number = int(address) >> self._RANGE_BITS
        return self._tensors[number - 1] if 1 <= number <= len(self._tensors) else None

    def history(self, tensor):
        """History of a tensor; tensors that overlap share one."""
        if tensor.history is None:
            group, end = [], 0
            for other in sorted(self._tensors, key=lambda t: t.pointer):
                if other.pointer >= end:
                    if tensor in group:
                        break
                    group = []
                group.append(other)
                end = max(end, other.pointer + other.size)
            begin, end = group[0].pointer // 16 * 16, max(t.pointer + t.size for t in group)
            unit = min(t.unit for t in group)
            history = _History((end - begin) // unit + 1)
            for other in group:
                other.unit, other.history, other.history_padding = unit, history, other.pointer - begin
        return tensor.history


# --- what the lanes of a chunk see ------------------------------------------------------------------------------------


class Memory:
    """Memory as a chunk of the grid sees it: ``ctas`` CTAs from ``first_cta`` on, of ``threads`` threads each.

    ``lanes`` are numbers of lanes in the chunk, CTA · threads + thread; every other array of a call has one entry for
    each of them. ``at`` is the number of the instruction, for findings.
    """

    def __init__(self, tensors, findings, first_cta, ctas, threads, shared, shared_unit=1, races=True):
        self._tensors, self._findings, self._races = tensors, findings, races
        lane = np.arange(ctas * threads)
        cta = lane // threads
        self._who = (first_cta + 1 + cta << _CTA_BITS) | (lane % threads // 32)
        self._whos = self._who.reshape(ctas, threads)
        self._shared_size, self._unit = shared, shared_unit
        stride = shared // 16 * 16 + 16
        self._shared = _views(np.full(ctas * stride, POISON, U8))
        self._shared_base = cta * stride
        self._shared_history = _History(ctas * stride // shared_unit)
        self._groups = np.zeros(ctas * threads, S64)  # asynchronous copies that a lane has committed, in groups
        self._copies = []

    def barrier(self, ctas):
        """All warps of the CTAs have arrived."""
        self._whos[ctas] += 1 << _BARRIER_BITS

    # -- global memory

    def load_global(self, address, lanes, width, count, at):
        """Load ``count`` numbers of ``width`` bytes per lane."""
        numbers = None
        for part, tensor, offset in self._located(address, width * count, width * count, at):
            if self._races:
                self._global_read(tensor, offset, width * count, lanes[part], at)
            places = _consecutive((offset + tensor.padding) // width, count)
            numbers = self._loaded(tensor.views[width][places], part, len(lanes), numbers)
        return list(_poison(width, count, len(lanes)) if numbers is None else numbers)

    @staticmethod
    def _loaded(numbers, part, lanes, others=None):
        """Numbers [count, L] of a part of the lanes among those of the others, or among poison."""
        numbers = numbers if numbers.ndim > 1 else numbers[None]
        if isinstance(part, slice):
            return numbers
        others = _poison(numbers.itemsize, len(numbers), lanes) if others is None else others
        others[:, part] = numbers
        return others

    def store_global(self, address, numbers, lanes, width, at):
        """Store numbers of ``width`` bytes."""
        size = width * len(numbers)
        for part, tensor, offset in self._located(address, size, size, at):
            places = _consecutive((offset + tensor.padding) // width, len(numbers))
            changed = self._store(tensor.views[width], places, numbers, part, tensor.name, at)
            if self._races:
                self._global_write(tensor, offset, size, lanes[part], changed, at)

    def _store(self, view, places, numbers, part, where, at):
        """Store numbers. Return which lanes changed a place."""
        numbers = np.stack([np.broadcast_to(x, np.shape(numbers[0]))[part] for x in numbers]).astype(view.dtype)
        numbers = numbers.reshape(places.shape)
        changed = _lanes(view[places] != numbers)
        view[places] = numbers
        lost = _lanes(view[places] != numbers)
        self._findings.note("race: different values to one place in one instruction", at, lost.sum(), where)
        return changed

    def _located(self, address, size, alignment, at):
        """Yield which lanes access which tensor, and where, for all good accesses; note the bad ones."""
        if not len(address):
            return
        tensor = self._tensors.of(address[0])
        if tensor is not None and tensor.size >= size:
            offset = address - U64(tensor.base)
            if (offset <= U64(tensor.size - size)).all() and not (address & U64(alignment - 1)).any():
                yield slice(None), tensor, offset.astype(S64)
                return
        misaligned = (address & U64(alignment - 1)) != 0
        if misaligned.any():
            detail = f"{int(address[misaligned][0]) % alignment} bytes past a multiple of {alignment}"
            self._findings.note("misaligned global access", at, misaligned.sum(), detail)
        ranges = address >> U64(Tensors._RANGE_BITS)
        for number in np.unique(ranges):
            part = np.flatnonzero((ranges == number) & ~misaligned)
            tensor = self._tensors.of(number << U64(Tensors._RANGE_BITS))
            if tensor is None:
                self._findings.note("global access outside of all tensors", at, len(part))
                continue
            offset = address[part].astype(S64) - tensor.base
            inside = (offset >= 0) & (offset <= tensor.size - size)
            if not inside.all():
                detail = f"byte {offset[~inside][0]} of {tensor.size} bytes of {tensor.name}"
                self._findings.note("global access out of bounds", at, (~inside).sum(), detail)
            if inside.any():
                yield part[inside], tensor, offset[inside]

    def _global_units(self, tensor, offset, size):
        history = self._tensors.history(tensor)
        first = (offset + tensor.history_padding) // tensor.unit
        return history, _consecutive(first, max(1, size // tensor.unit))

    def _global_read(self, tensor, offset, size, lanes, at):
        history, units = self._global_units(tensor, offset, size)
        who = self._who[lanes]
        history.note_read(units, who)
        if history.written:
            self._note_race("read after another's write", _unordered(history.writer[units], who), tensor.name, at)

    def _global_write(self, tensor, offset, size, lanes, changed, at):
        history, units = self._global_units(tensor, offset, size)
        self._note_write(history, units, self._who[lanes], changed, tensor.name, at)

    def _note_write(self, history, units, who, changed, where, at):
        after_read, after_write = history.note_write(units, who, changed)
        self._note_race("write after another's read", after_read, where, at)
        self._note_race("write after another's write", after_write, where, at)

    def _note_race(self, what, raced, where, at):
        if np.any(raced):
            self._findings.note(f"race: {what}", at, _lanes(raced).sum(), where)

    # -- shared memory

    def load_shared(self, address, lanes, width, count, at):
        """Load ``count`` numbers of ``width`` bytes per lane."""
        part, place = self._shared_place(address, lanes, width * count, at)
        self._shared_read(place, width * count, lanes[part], at)
        return list(self._loaded(self._shared[width][_consecutive(place // width, count)], part, len(lanes)))

    def store_shared(self, address, numbers, lanes, width, at):
        """Store numbers of ``width`` bytes."""
        part, place = self._shared_place(address, lanes, width * len(numbers), at)
        places = _consecutive(place // width, len(numbers))
        changed = self._store(self._shared[width], places, numbers, part, "shared", at)
        self._shared_write(place, width * len(numbers), lanes[part], changed, at)

    def _shared_place(self, address, lanes, size, at):
        """Which accesses are good, and their places in the chunk's shared memory; the bad ones are noted."""
        address = address.astype(S64)
        misaligned = (address & size - 1) != 0 if size & size - 1 == 0 else address % size != 0
        outside = address > self._shared_size - size
        bad = misaligned | outside
        if not bad.any():
            return slice(None), address + self._shared_base[lanes]
        if misaligned.any():
            detail = f"{address[misaligned][0]}, of {size} bytes"
            self._findings.note("misaligned shared access", at, misaligned.sum(), detail)
        if outside.any():
            detail = f"byte {address[outside][0]} of {self._shared_size}"
            self._findings.note("shared access out of bounds", at, outside.sum(), detail)
        part = np.flatnonzero(~bad)
        return part, address[part] + self._shared_base[lanes[part]]

    def _shared_units(self, place, size):
        return _consecutive(place // self._unit, max(1, size // self._unit))

    def _shared_read(self, place, size, lanes, at):
        history, who, units = self._shared_history, self._who[lanes], self._shared_units(place, size)
        writer = history.writer[units]
        if (writer <= 0).any():
            for state, kind in ((_NOBODY, "never written"), (_IN_FLIGHT, "still being copied")):
                self._findings.note(f"shared memory read that is {kind}", at, _lanes(writer == state).sum())
        if self._races:
            history.note_read(units, who)
            raced = _unordered(writer, who) & (writer != _IN_FLIGHT)
            self._note_race("read after another's write", raced, "shared", at)

    def _shared_write(self, place, size, lanes, changed, at):
        units = self._shared_units(place, size)
        if self._races:
            self._note_write(self._shared_history, units, self._who[lanes], changed, "shared", at)
        else:
            self._shared_history.writer[units] = self._who[lanes]

    def ldmatrix(self, address, lanes, number, transposed, at):
        """Load matrices of 8 rows of 16 bytes; lane 8i + r of a warp has the address of row r of matrix i."""
        rows = address.reshape(-1, 32)[:, : 8 * number].reshape(-1)
        row_lanes = lanes.reshape(-1, 32)[:, : 8 * number].reshape(-1)
        words = np.stack(self.load_shared(rows, row_lanes, 4, 4, at), axis=-1).reshape(-1, number, 8, 4)
        return [_fragment(words[:, i], transposed) for i in range(number)]

    def stmatrix(self, address, registers, lanes, transposed, at):
        """Store matrices: the inverse of ``ldmatrix``."""
        rows, row_lanes = address.reshape(-1, 32), lanes.reshape(-1, 32)
        for i, register in enumerate(registers):
            words = _fragment(register.reshape(-1, 8, 4), transposed).reshape(-1, 4)
            part = slice(8 * i, 8 * i + 8)
            self.store_shared(rows[:, part].reshape(-1), list(words.T), row_lanes[:, part].reshape(-1), 4, at)

    def matrix(self, descriptor, lanes, rows, kind, at):
        """Load the matrix that a descriptor of wgmma names, 32 bytes of each of its rows, as float32 [W, K, rows].

        Each warp loads all of it. Only matrices with K beside K, and with swizzled rows, are known.
        """
        descriptor = descriptor.reshape(-1, 32)[:, :1, None]
        start, stride = ((descriptor >> U64(bit) & U64(0x3FFF)).astype(S64) * 16 for bit in (0, 32))
        swizzle = int(descriptor[0, 0, 0] >> U64(62))
        if not swizzle:
            self._findings.refuse(at, "a matrix without swizzle")
        width = 4 if kind == "tf32" else 2
        row, byte = np.arange(rows)[:, None], np.arange(0, 32, width)
        place = start + row // 8 * stride + row % 8 * (256 >> swizzle) + byte
        place ^= (place >> 7 & (16 >> swizzle) - 1) << 4  # 16-byte columns are exchanged by the number of the row
        all_lanes = np.repeat(lanes[::32], rows * len(byte))
        (bits,) = self.load_shared(place.reshape(-1), all_lanes, width, 1, at)
        return values(bits, kind).reshape(place.shape).swapaxes(1, 2)

    # -- asynchronous copies

    def copy_async(self, shared_address, global_address, lanes, size, source_bytes, at):
        """Begin to copy ``size`` bytes per lane. Those past ``source_bytes`` (None: all are copied) become zero."""
        part, place = self._shared_place(shared_address, lanes, size, at)
        lanes, global_address = lanes[part], global_address[part]
        source_bytes = np.broadcast_to(size if source_bytes is None else source_bytes, shared_address.shape)[part]
        payload = np.zeros((len(lanes), size), U8)
        for number in np.unique(source_bytes[source_bytes > 0]):
            chosen = np.flatnonzero(source_bytes == number)
            for within, tensor, offset in self._located(global_address[chosen], int(number), size, at):
                copied = chosen[within]
                if self._races:
                    self._global_read(tensor, offset, int(number), lanes[copied], at)
                bytes_ = np.arange(number, dtype=S64)
                payload[copied[:, None], bytes_] = tensor.views[1][(offset + tensor.padding)[:, None] + bytes_]
        self._shared_write(place, size, lanes, True, at)
        self._shared_history.writer[self._shared_units(place, size)] = _IN_FLIGHT
        self._copies.append((lanes, self._groups[lanes], place, payload))

    def commit(self, lanes):
        """Close the lanes' groups of copies."""
        self._groups[lanes] += 1

    def wait(self, lanes, leave):
        """Finish all but the last ``leave`` groups of the lanes."""
        finished_groups = np.zeros(len(self._groups), S64)
        finished_groups[lanes] = np.maximum(self._groups[lanes] - leave, 0)
        copies, self._copies = self._copies, []
        for owners, group, place, payload in copies:
            done = group < finished_groups[owners]
            self._shared[1][place[done, None] + np.arange(payload.shape[1])] = payload[done]
            self._shared_history.writer[self._shared_units(place[done], payload.shape[1])] = self._who[owners[done]]
            if not done.all():
                self._copies.append((owners[~done], group[~done], place[~done], payload[~done]))


def _fragment(words, transposed):
    """Matrices [W, 8 rows, 4 words] as a register: lane 4r + c holds word c of row r, or of column r."""
    words = np.ascontiguousarray(words)
    if transposed:
        words = np.ascontiguousarray(words.view(np.uint16).swapaxes(1, 2)).view(U32)
    return words.reshape(-1)
