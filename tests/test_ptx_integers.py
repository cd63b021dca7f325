"""Integer instructions of the PTX emulator against Python's integers."""

import numpy as np
import pytest
from ptx import integers

RANDOM = np.random.default_rng(0)
TYPES = (np.uint32, np.int32, np.uint64, np.int64)


def numbers(kind, size=300):
    """Random bits of random length, and the ends of the range."""
    info = np.iinfo(kind)
    drawn = RANDOM.integers(info.min, info.max, size, dtype=kind, endpoint=True)
    drawn >>= RANDOM.integers(0, info.bits, size).astype(kind)
    return np.concatenate([drawn, np.array([0, 1, info.max, info.min, info.max - 1], kind)])


def pairs(kind):
    return numbers(kind), RANDOM.permutation(numbers(kind))


def wrapped(value, kind):
    bits = np.iinfo(kind).bits
    value %= 1 << bits
    return value - (1 << bits) if value > np.iinfo(kind).max else value


@pytest.mark.parametrize("kind", TYPES)
def test_high_products(kind):
    a, b = pairs(kind)
    wanted = [int(x) * int(y) >> np.iinfo(kind).bits for x, y in zip(a, b, strict=True)]
    assert integers.high_product(a, b).tolist() == wanted


@pytest.mark.parametrize("kind", TYPES)
def test_shifts_past_the_end(kind):
    a, bits = numbers(kind), np.iinfo(kind).bits
    distance = RANDOM.integers(0, bits + 9, len(a)).astype(np.uint32)
    both = list(zip(a.tolist(), distance.tolist(), strict=True))
    assert integers.shift_left(a, distance).tolist() == [wrapped(x << d, kind) for x, d in both]
    assert integers.shift_right(a, distance).tolist() == [x >> d for x, d in both]


@pytest.mark.parametrize("kind", TYPES)
def test_quotients_towards_zero_and_remainders(kind):
    a, b = pairs(kind)
    defined = (b != 0) & ((a != np.iinfo(kind).min) | (b != kind(-1 if np.iinfo(kind).min else 0)))
    a, b = a[defined], b[defined]
    both = list(zip(a.tolist(), b.tolist(), strict=True))
    wanted = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in both]
    assert integers.quotient(a, b).tolist() == wanted
    assert integers.remainder(a, b).tolist() == [x - q * y for (x, y), q in zip(both, wanted, strict=True)]


@pytest.mark.parametrize("kind", TYPES)
def test_bit_fields(kind):
    a, bits = numbers(kind), np.iinfo(kind).bits
    position = RANDOM.integers(0, bits, len(a)).astype(np.uint32)
    length = RANDOM.integers(0, bits + 1, len(a)).astype(np.uint32)
    got = integers.extract(a, position, length)
    for x, p, n, field in zip(*(values.tolist() for values in (a, position, length, got)), strict=True):
        wanted = (x >> p) % (1 << n)  # Python's shift repeats the sign
        is_negative = np.iinfo(kind).min < 0 < n and wanted >> n - 1
        assert field == wanted - (1 << n if is_negative else 0), (x, p, n)


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_inserted_bit_fields(kind):
    field, a = pairs(kind)
    bits = np.iinfo(kind).bits
    position, length = (RANDOM.integers(0, bits + 1, len(a)).astype(np.uint32) for _ in range(2))
    wanted = []
    for f, x, p, n in zip(field.tolist(), a.tolist(), position.tolist(), length.tolist(), strict=True):
        mask = ((1 << n) - 1 << p) % (1 << bits)
        wanted.append(x & ~mask | f << p & mask)
    assert integers.insert(field, a, position, length).tolist() == wanted


def test_counted_bits():
    for kind in (np.uint32, np.uint64):
        a = numbers(kind)
        assert integers.count_ones(a).tolist() == [x.bit_count() for x in a.tolist()]


def test_permuted_bytes():
    a, b = pairs(np.uint32)
    selectors = numbers(np.uint32)
    wanted = []
    for x, y, s in zip(a.tolist(), b.tolist(), selectors.tolist(), strict=True):
        source = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        chosen = [s >> 4 * n & 15 for n in range(4)]
        bytes_ = [(255 if source[c & 7] & 128 else 0) if c & 8 else source[c & 7] for c in chosen]
        wanted.append(int.from_bytes(bytes(bytes_), "little"))
    assert integers.permute(a, b, selectors).tolist() == wanted


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0xCA, 0xFF])
def test_bitwise_tables(table):
    a, b, c = (numbers(np.uint32) for _ in range(3))
    wanted = [
        sum((table >> (4 * (x >> n & 1) + 2 * (y >> n & 1) + (z >> n & 1)) & 1) << n for n in range(32))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert integers.lookup(a, b, c, table).tolist() == wanted
