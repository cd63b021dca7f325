"""Integer instructions that NumPy has not: shifts past the end, bit fields, high halves of products, bytes, tables."""

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S8, S16, S32, S64 = np.int8, np.int16, np.int32, np.int64


def shift_left(a, distance):
    """Shift left; a distance of all bits or more gives zero."""
    bits = a.dtype.itemsize * 8
    return np.where(distance < bits, a << np.minimum(distance, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a, distance):
    """Shift right, with the sign of a signed number; a distance of all bits or more leaves the sign."""
    last = a.dtype.itemsize * 8 - 1
    shifted = a >> np.minimum(distance, last).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(distance <= last, shifted, a.dtype.type(0))


def extract(a, position, length):
    """A bit field, with its sign if ``a`` is signed; bits beyond the number repeat its sign, or are zero."""
    bits = a.dtype.itemsize * 8
    position, length = (np.minimum(np.asarray(x, U32) & U32(0xFF), bits).astype(S64) for x in (position, length))
    if a.dtype.kind == "u":
        return shift_right(a, position) & ~shift_left(~np.zeros_like(a), length)
    end = np.minimum(position + length, bits)
    moved = shift_left(a, bits - end)
    return np.where(length == 0, a.dtype.type(0), shift_right(moved, np.minimum(bits - end + position, bits)))


def insert(field, a, position, length):
    """``a`` with the low bits of ``field`` in place of a bit field."""
    bits = a.dtype.itemsize * 8
    position, length = (np.minimum(np.asarray(x, U32) & U32(0xFF), bits).astype(S64) for x in (position, length))
    mask = shift_left(~shift_left(~np.zeros_like(a), length), position)
    return a & ~mask | shift_left(field, position) & mask


def high_product(a, b):
    """The high half of a product of 32 or 64 bits."""
    kind = a.dtype.kind
    if a.dtype.itemsize == 4:
        wide = U64 if kind == "u" else S64
        return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)
    low, half = U64(0xFFFFFFFF), U64(32)
    ua, ub = a.view(U64), b.view(U64)
    a0, a1, b0, b1 = ua & low, ua >> half, ub & low, ub >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    high = a1 * b1 + (middle >> half) + (a0 * b1 + (middle & low) >> half)
    if kind == "u":
        return high
    return (high - np.where(a < 0, ub, U64(0)) - np.where(b < 0, ua, U64(0))).view(S64)


def quotient(a, b):
    """Quotient towards zero; of a division by zero, all ones."""
    return np.where(b == 0, ~np.zeros_like(a), _truncated(a, np.where(b == 0, a.dtype.type(1), b)))


def remainder(a, b):
    """Remainder with the sign of ``a``; of a division by zero, ``a``."""
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, a.dtype.type(1), b)))


def _truncated(a, b):
    whole = a // b
    return whole + ((whole < 0) & (whole * b != a)).astype(a.dtype) if a.dtype.kind == "i" else whole


def count_ones(a):
    """How many bits are set."""
    return np.unpackbits(a.view(U8).reshape(len(a), -1), axis=1).sum(axis=1, dtype=U32)


def permute(a, b, selectors):
    """Bytes of ``a`` and ``b``, chosen by four selectors of four bits; the highest bit spreads the byte's sign."""
    both = b.astype(U64) << U64(32) | a
    result = np.zeros(np.shape(both), U32)
    for place in range(4):
        selector = np.asarray(selectors, U32) >> U32(4 * place)
        byte = (both >> ((selector & U32(7)) * U32(8)).astype(U64)).astype(U8)
        spread = np.where(byte & U8(0x80), U8(0xFF), U8(0))
        result |= np.where(selector & U32(8), spread, byte).astype(U32) << U32(8 * place)
    return result


def lookup(a, b, c, table):
    """Any bitwise function of three numbers: bit ``4 a + 2 b + c`` of the table."""
    result = np.zeros(np.shape(a), np.asarray(a).dtype)
    for row in range(8):
        if table >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result
