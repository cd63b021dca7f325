"""The emulator's memory: what it reads and writes, and that it reports every planted fault."""

import numpy as np
import pytest
from ptx.findings import Findings, RefusedError
from ptx.memory import Memory, Tensors

F32, U32, U64, S64 = np.float32, np.uint32, np.uint64, np.int64
LANES = np.arange(64)  # two warps, or two CTAs of one
WARP = LANES[:32]
AT = 0  # the one instruction


class Bench:
    """A chunk of CTAs with memory, and one tensor of 256 float32 numbers."""

    def __init__(self, ctas=1, threads=64, shared=1024, dtype=F32, first=0):
        self.data = np.arange(256 + 4, dtype=dtype)[first : first + 256]
        self.findings = Findings("kernel", ["the instruction"])
        self.tensors = Tensors(unit=self.data.itemsize)
        self.address = self.tensors.add(self.data.ctypes.data, self.data.nbytes, "x")
        self.memory = self.chunk(0, ctas, threads, shared)

    def chunk(self, first_cta, ctas=1, threads=64, shared=1024):
        return Memory(self.tensors, self.findings, first_cta, ctas, threads, shared, shared_unit=4)

    def places(self, numbers):
        """Addresses of elements of the tensor."""
        return self.address + np.asarray(numbers, S64).astype(U64) * U64(self.data.itemsize)

    @property
    def kinds(self):
        return self.findings.kinds()


@pytest.fixture
def bench():
    return Bench()


# --- global memory


@pytest.mark.parametrize("count", [1, 2, 4])
def test_global_loads_and_stores(bench, count):
    numbers = bench.memory.load_global(bench.places(LANES * count), LANES, 4, count, AT)
    for i, x in enumerate(numbers):
        np.testing.assert_array_equal(x.view(F32), LANES * count + i)
    bench.memory.store_global(bench.places(LANES * count), [x + U32(1) for x in numbers], LANES, 4, AT)
    wanted = np.arange(256, dtype=F32)
    wanted[: 64 * count] = np.nextafter(wanted[: 64 * count], F32(np.inf))
    np.testing.assert_array_equal(bench.data, wanted)
    assert not bench.findings


def test_a_tensor_need_not_begin_at_a_multiple_of_16_bytes():
    bench = Bench(first=3)
    (x,) = bench.memory.load_global(bench.places(LANES), LANES, 4, 1, AT)
    np.testing.assert_array_equal(x.view(F32), bench.data[:64])
    assert int(bench.address) % 4096 == bench.data.ctypes.data % 4096
    bench.memory.load_global(bench.places(LANES * 4), LANES, 4, 4, AT)
    assert bench.kinds == {"misaligned global access"}


@pytest.mark.parametrize(("element", "where"), [(256, "byte 1024 of 1024"), (-1, "byte -4 of 1024"), (1 << 35, "byte")])
@pytest.mark.parametrize("store", [False, True])
def test_an_access_out_of_bounds_is_noted_and_left_out(bench, element, where, store):
    elements = np.where(LANES == 5, element, LANES)
    before = bench.data.copy()
    if store:
        bench.memory.store_global(bench.places(elements), [np.full(64, 7, U32)], LANES, 4, AT)
        assert (bench.data.view(U32)[:64] == 7).sum() == 63
    else:
        (x,) = bench.memory.load_global(bench.places(elements), LANES, 4, 1, AT)
        np.testing.assert_array_equal(np.delete(x.view(F32), 5), np.delete(before[:64], 5))
        assert np.isnan(x.view(F32)[5])
    (report,) = bench.findings.report()
    assert report.startswith(f"kernel: global access out of bounds, {where}")
    assert report.endswith("(1 lanes), at: the instruction")


def test_the_last_bytes_of_a_wide_access_are_checked(bench):
    bench.memory.load_global(bench.places(np.where(LANES == 0, 252, 0)), LANES, 4, 4, AT)
    assert not bench.findings
    bench.memory.load_global(bench.places(np.where(LANES == 0, 254, 0)), LANES, 4, 2, AT)
    assert not bench.findings
    bench.data = bench.data[:255]
    bench.address = bench.tensors.add(bench.data.ctypes.data, bench.data.nbytes, "y")
    bench.memory.load_global(bench.places(np.where(LANES == 0, 254, 0)), LANES, 4, 2, AT)
    assert bench.kinds == {"global access out of bounds"}


def test_an_address_of_no_tensor_is_noted(bench):
    bench.memory.load_global(np.zeros(64, U64), LANES, 4, 1, AT)
    bench.memory.load_global(np.full(64, 1 << 60, U64), LANES, 4, 1, AT)
    assert bench.kinds == {"global access outside of all tensors"}
    assert "(128 lanes)" in bench.findings.report()[0]


def test_a_misaligned_access_is_noted_and_left_out(bench):
    address = bench.places(LANES) + np.where(LANES < 2, 2, 0).astype(U64)
    (x,) = bench.memory.load_global(address, LANES, 4, 1, AT)
    assert bench.findings.report() == [
        "kernel: misaligned global access, 2 bytes past a multiple of 4 (2 lanes), at: the instruction"
    ]
    np.testing.assert_array_equal(x.view(F32)[2:], bench.data[2:64])


def test_one_instruction_reads_several_tensors(bench):
    other = np.arange(1000, 1064, dtype=F32)
    address = bench.tensors.add(other.ctypes.data, other.nbytes, "y")
    places = np.where(LANES % 2, bench.places(LANES), address + (LANES * 4).astype(U64))
    (x,) = bench.memory.load_global(places, LANES, 4, 1, AT)
    np.testing.assert_array_equal(x.view(F32), np.where(LANES % 2, LANES, 1000 + LANES))


def test_only_what_is_touched_of_a_large_tensor_is_held():
    import torch

    large = torch.empty(2**31 + 8, dtype=torch.bfloat16)
    large[:2], large[-2:] = torch.tensor([1, 2]), torch.tensor([3, 4])
    findings = Findings("kernel", ["the instruction"])
    tensors = Tensors()
    address = tensors.add(large.data_ptr(), large.nbytes, "large", unit=2)
    memory = Memory(tensors, findings, 0, 1, 32, 0)
    places = address + np.array([0, 2**31 + 7], U64) * U64(2)
    (x,) = memory.load_global(places, WARP[:2], 2, 1, AT)
    assert torch.from_numpy(x).view(torch.bfloat16).tolist() == [1, 4]
    memory.store_global(places, [x[::-1]], WARP[:2], 2, AT)
    assert large[[0, -1]].tolist() == [4, 1]
    assert not findings
    memory.load_global(address + np.array([2**31 + 8], U64) * U64(2), WARP[:1], 2, 1, AT)
    assert findings.kinds() == {"global access out of bounds"}


# --- races


def store(bench, elements, lanes, value=1, memory=None):
    (memory or bench.memory).store_global(bench.places(elements), [np.full(len(lanes), value, U32)], lanes, 4, AT)


def load(bench, elements, lanes, memory=None):
    (memory or bench.memory).load_global(bench.places(elements), lanes, 4, 1, AT)


def test_warps_race_unless_a_barrier_lies_between_them():
    for first, second, kind in (
        (store, load, "race: read after another's write"),
        (load, store, "race: write after another's read"),
        (store, lambda *a: store(*a, value=2), "race: write after another's write"),
    ):
        for barrier in (False, True):
            bench = Bench()
            first(bench, WARP, WARP)
            if barrier:
                bench.memory.barrier(np.array([0]))
            second(bench, WARP, WARP + 32)
            assert bench.kinds == (set() if barrier else {kind})


def test_a_warp_does_not_race_with_itself(bench):
    store(bench, WARP, WARP)
    load(bench, WARP[::-1], WARP)
    store(bench, WARP, WARP, value=2)
    assert not bench.findings


def test_the_same_value_again_is_no_race_unless_it_was_read(bench):
    store(bench, WARP, WARP)
    store(bench, WARP, WARP + 32)
    assert not bench.findings
    bench.memory.barrier(np.array([0]))
    load(bench, WARP, WARP)
    store(bench, WARP, WARP + 32)  # by chance the value that is there
    assert bench.kinds == {"race: write after another's read"}


def test_many_readers_of_a_place_are_remembered(bench):
    load(bench, np.zeros(64), LANES)  # both warps in one instruction
    store(bench, np.zeros(1), LANES[40:41])
    assert bench.kinds == {"race: write after another's read"}
    bench.findings.clear()
    load(bench, np.ones(1), LANES[:1])
    load(bench, np.ones(1), LANES[40:41])  # one after the other
    store(bench, np.ones(1), LANES[40:41])
    assert bench.kinds == {"race: write after another's read"}


def test_ctas_race_whatever_barriers_they_pass():
    bench = Bench(ctas=2, threads=32)
    store(bench, [3], LANES[:1])
    bench.memory.barrier(np.array([0, 1]))
    load(bench, [3], LANES[32:33])
    assert bench.kinds == {"race: read after another's write"}


def test_a_cta_that_reads_after_others_still_races_with_them():
    bench = Bench(ctas=2, threads=32)
    load(bench, [3], LANES[32:33])
    load(bench, [3], LANES[:1])
    bench.memory.barrier(np.array([0, 1]))
    store(bench, [3], LANES[:1])
    assert bench.kinds == {"race: write after another's read"}


def test_ctas_of_different_chunks_race():
    bench = Bench()
    store(bench, [3], LANES[:1])
    store(bench, [3], LANES[:1], value=2, memory=bench.chunk(first_cta=1))
    assert bench.kinds == {"race: write after another's write"}


def test_tensors_that_overlap_share_their_races(bench):
    view = bench.data[10:20]
    address = bench.tensors.add(view.ctypes.data, view.nbytes, "view")
    store(bench, [13], LANES[:1])
    bench.memory.load_global(address + np.array([12], U64), LANES[40:41], 4, 1, AT)
    assert bench.kinds == {"race: read after another's write"}


def test_lanes_that_store_different_values_to_one_place_are_noted(bench):
    bench.memory.store_global(bench.places(np.zeros(32)), [np.full(32, 5, U32)], WARP, 4, AT)
    assert not bench.findings
    bench.memory.store_global(bench.places(np.zeros(32)), [WARP.astype(U32)], WARP, 4, AT)
    assert bench.kinds == {"race: different values to one place in one instruction"}


def test_races_can_be_left_unchecked(bench):
    memory = Memory(bench.tensors, bench.findings, 0, 1, 64, 1024, races=False)
    store(bench, [0], LANES[:1], memory=memory)
    load(bench, [0], LANES[40:41], memory=memory)
    assert not bench.findings


# --- shared memory


def words(n, start=0):
    return np.arange(start, start + n, dtype=U32)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shared_loads_and_stores_are_of_one_cta(count):
    bench = Bench(ctas=2, threads=32)
    places = words(64) % U32(32) * U32(4 * count)
    numbers = [words(64, 100 * i) for i in range(count)]
    bench.memory.store_shared(places, numbers, LANES, 4, AT)
    bench.memory.barrier(np.array([0, 1]))
    back = bench.memory.load_shared(places[::-1], LANES[::-1], 4, count, AT)
    for x, y in zip(back, numbers, strict=True):
        np.testing.assert_array_equal(x, y[::-1])
    assert not bench.findings


def test_a_shared_read_of_what_was_never_written_is_noted(bench):
    bench.memory.store_shared(words(32) * U32(4), [words(32)], WARP, 4, AT)
    bench.memory.load_shared(words(32) * U32(4) + U32(4), WARP, 4, 1, AT)
    assert bench.findings.report() == [
        "kernel: shared memory read that is never written (1 lanes), at: the instruction"
    ]


@pytest.mark.parametrize("address", [1024, 1022, 2**32 - 4])
def test_shared_accesses_are_checked_for_bounds_and_alignment(bench, address):
    places = np.where(WARP == 3, U32(address), words(32) * U32(4))
    bench.memory.store_shared(places, [words(32)], WARP, 4, AT)
    (x,) = bench.memory.load_shared(places, WARP, 4, 1, AT)
    assert bench.kinds <= {"shared access out of bounds", "misaligned shared access"}
    assert bench.findings
    np.testing.assert_array_equal(np.delete(x, 3), np.delete(words(32), 3))


@pytest.mark.parametrize("barrier", [False, True])
def test_warps_race_in_shared_memory(barrier):
    bench = Bench()
    bench.memory.store_shared(words(32) * U32(4), [words(32)], WARP, 4, AT)
    if barrier:
        bench.memory.barrier(np.array([0]))
    bench.memory.load_shared(words(32) * U32(4), WARP + 32, 4, 1, AT)
    assert bench.kinds == (set() if barrier else {"race: read after another's write"})


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_eight_rows(bench, transposed):
    """By the tables of the PTX manual: lane 4r + c holds elements 2c and 2c + 1 of row r, or of column r."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    rows = (words(32) * U32(16))[np.random.default_rng(0).permutation(32)]  # anywhere
    registers = []
    for matrix in matrices:
        source = matrix.T if transposed else matrix
        registers.append(
            np.array(
                [int(source[i // 4, i % 4 * 2]) | int(source[i // 4, i % 4 * 2 + 1]) << 16 for i in range(32)], U32
            )
        )
    bench.memory.stmatrix(rows, registers, WARP, transposed, AT)
    for i, matrix in enumerate(matrices):
        for r in range(8):
            row = bench.memory.load_shared(np.full(1, rows[8 * i + r], U32), WARP[:1], 4, 4, AT)
            np.testing.assert_array_equal(np.concatenate(row).view(np.uint16), matrix[r])
    back = bench.memory.ldmatrix(rows, WARP, 4, transposed, AT)
    np.testing.assert_array_equal(np.stack(back), np.stack(registers))
    assert not bench.findings


@pytest.mark.parametrize(("mode", "row_bytes"), [(1, 128), (2, 64), (3, 32)])
@pytest.mark.parametrize("kind", ["tf32", "bf16"])
def test_matrices_of_wgmma_are_swizzled(mode, row_bytes, kind):
    """Elements lie where 16-byte columns are exchanged by the row: of 8 rows of 128 bytes, 64 or 32."""
    bench = Bench(threads=128, shared=2048)
    width = 4 if kind == "tf32" else 2
    rows, k = 16, 32 // width
    matrix = np.random.default_rng(0).integers(-8, 8, (rows, k)).astype(F32)
    shared = np.zeros(2048, np.uint8)
    for i in range(rows):
        for j in range(k):
            byte = i * row_bytes + j * width
            line, column = byte // 128, byte % 128 // 16
            column ^= line % 8 if mode == 1 else line % 4 if mode == 2 else line % 2
            place = line * 128 + column * 16 + byte % 16
            bits = matrix[i, j : j + 1].view(np.uint8)
            shared[place : place + width] = bits[4 - width :]
    lanes = np.arange(128)
    bench.memory.store_shared(words(128) * U32(16), list(shared.view(U32).reshape(128, 4).T), lanes, 4, AT)
    bench.memory.barrier(np.array([0]))
    descriptor = np.full(128, mode << 62 | (8 * row_bytes >> 4) << 32, U64)
    got = bench.memory.matrix(descriptor, lanes, rows, kind, AT)
    assert got.shape == (4, k, rows)
    for warp in got:
        np.testing.assert_array_equal(warp, matrix.T)
    assert not bench.findings
    with pytest.raises(RefusedError, match="kernel: a matrix without swizzle, at: the instruction"):
        bench.memory.matrix(np.zeros(128, U64), lanes, rows, kind, AT)


# --- asynchronous copies


def copy(bench, lanes=WARP, size=16, source_bytes=None, shift=0):
    shared = (lanes % 32 * 16).astype(U32)
    bench.memory.copy_async(shared, bench.places(lanes % 32 * 4 + shift), lanes, size, source_bytes, AT)
    return shared


def test_a_copy_arrives_when_its_group_has_been_waited_for(bench):
    shared = copy(bench)
    bench.memory.commit(WARP)
    bench.memory.wait(WARP, 0)
    got = bench.memory.load_shared(shared, WARP, 4, 4, AT)
    np.testing.assert_array_equal(np.stack(got, 1).reshape(-1).view(F32), bench.data[:128])
    assert not bench.findings


@pytest.mark.parametrize("leave", [0, 1, 2])
def test_a_wait_leaves_the_last_groups(bench, leave):
    shared = copy(bench)
    bench.memory.commit(WARP)
    bench.memory.commit(WARP)
    bench.memory.wait(WARP, leave)
    bench.memory.load_shared(shared, WARP, 4, 1, AT)
    assert bench.kinds == (set() if leave < 2 else {"shared memory read that is still being copied"})


def test_a_copy_that_was_not_committed_is_not_waited_for(bench):
    shared = copy(bench)
    bench.memory.wait(WARP, 0)
    bench.memory.load_shared(shared, WARP, 4, 1, AT)
    assert bench.kinds == {"shared memory read that is still being copied"}


def test_other_warps_need_a_barrier_after_the_wait(bench):
    shared = copy(bench)
    bench.memory.commit(LANES)
    bench.memory.wait(LANES, 0)
    bench.memory.load_shared(shared, WARP + 32, 4, 1, AT)
    assert bench.kinds == {"race: read after another's write"}
    bench.findings.clear()
    bench.memory.barrier(np.array([0]))
    bench.memory.load_shared(shared, WARP + 32, 4, 1, AT)
    assert not bench.findings


def test_the_rest_of_a_partial_copy_is_zero(bench):
    shared = copy(bench, source_bytes=np.where(WARP % 2, 8, 0), shift=128)
    bench.memory.commit(WARP)
    bench.memory.wait(WARP, 0)
    got = np.stack(bench.memory.load_shared(shared, WARP, 4, 4, AT), 1).view(F32)
    wanted = bench.data[128:256].reshape(32, 4).copy()
    wanted[:, 2:], wanted[::2] = 0, 0
    np.testing.assert_array_equal(got, wanted)
    assert not bench.findings


def test_a_copy_without_source_bytes_needs_no_tensor(bench):
    bench.memory.copy_async(words(32) * U32(16), np.zeros(32, U64), WARP, 16, np.zeros(32, U32), AT)
    assert not bench.findings
    bench.memory.commit(WARP)
    bench.memory.wait(WARP, 0)
    copy(bench, shift=252)
    assert bench.kinds == {"global access out of bounds"}


def test_a_copy_over_what_others_read_is_a_race(bench):
    bench.memory.store_shared(words(32) * U32(16), [words(32)] * 4, WARP, 4, AT)
    bench.memory.barrier(np.array([0]))
    bench.memory.load_shared(words(32) * U32(16), WARP, 4, 1, AT)
    copy(bench, lanes=WARP + 32)
    assert bench.kinds == {"race: write after another's read"}
