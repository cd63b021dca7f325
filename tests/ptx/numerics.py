"""The arithmetic of a GPU's lanes, bit for bit where PTX defines it, within its documented bounds where it does not.

Arrays have one entry per lane. Values are ``float32`` arrays; packed formats are unsigned bits.
"""

import numpy as np

U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
SMALLEST_NORMAL = F32(2.0**-126)


# --- float32, rounded once --------------------------------------------------------------------------------------------


def ftz(x):
    """Subnormal numbers to zero of their sign."""
    x = np.asarray(x, F32)
    small = np.abs(x) < SMALLEST_NORMAL
    return np.where(small, np.copysign(F32(0), x), x) if small.any() else x


def fma(a, b, c):
    """Compute a · b + c, rounded once.

    The product is exact in float64. Their sum is rounded to odd where rounding it to float64 first could change the
    result: at ties of float32, and among its subnormal numbers.
    """
    product = np.multiply(a, b, dtype=F64)
    product, c = np.broadcast_arrays(product, np.asarray(c, F32).astype(F64))
    total = np.asarray(product + c)
    result = np.asarray(total.astype(F32))
    last_digits = total.view(U64) & U64(0x1FFFFFFF)  # those that float32 has no place for
    risky = np.flatnonzero((last_digits == U64(0x10000000)) | (np.abs(total) < 2.0**-125))
    if len(risky):
        result.reshape(-1)[risky] = _sum_to_odd(product.reshape(-1)[risky], c.reshape(-1)[risky]).astype(F32)
    return result


def _sum_to_odd(a, b):
    """Sums in float64, rounded to the neighbour with an odd last digit where they are not exact."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    bits = total.view(np.int64)
    inexact_and_even = (error != 0) & ((bits & 1) == 0)
    away_from_zero = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where(inexact_and_even, away_from_zero, 0)).view(F64)


def maximum(a, b, nan=False):
    """The larger number; where one is NaN, the other one, or NaN if ``nan``. -0 is less than +0."""
    result = np.maximum(a, b) if nan else np.fmax(a, b)
    return np.where((result == 0) & (np.asarray(a) == b), np.where(np.signbit(a), b, a), result).astype(F32)


def minimum(a, b, nan=False):
    """The smaller number; where one is NaN, the other one, or NaN if ``nan``. -0 is less than +0."""
    result = np.minimum(a, b) if nan else np.fmin(a, b)
    return np.where((result == 0) & (np.asarray(a) == b), np.where(np.signbit(a), a, b), result).astype(F32)


def rcp_rn(x):
    return np.divide(F32(1), x, dtype=F32)


def sqrt_rn(x):
    return np.sqrt(x, dtype=F32)


def div_rn(a, b):
    return np.divide(a, b, dtype=F32)


# --- approximate instructions -----------------------------------------------------------------------------------------


class Approximations:
    """Instructions that PTX defines by a bound on their error.

    Without noise, a result is the exact value, rounded. With it, the result is any float32 within the documented bound,
    drawn by a hash of the exact value and the seed: the same for the same input, as in hardware. Inputs for which
    the documentation lists the result (zero, infinity, NaN) give that result.
    """

    def __init__(self, noise=None):
        self.noise = noise

    def ex2(self, x, is_ftz):
        x = self._input(x, is_ftz)
        exact = np.exp2(x.astype(F64))
        return self._result(exact, 2.0**-22 * exact, is_ftz, exempt=x == 0)

    def lg2(self, x, is_ftz):
        x = self._input(x, is_ftz)
        exact = np.log2(x.astype(F64))
        bound = 2.0**-22 * np.where((x > 0.5) & (x < 2), 1.0, np.abs(exact))
        return self._result(exact, bound, is_ftz)

    def sin(self, x, is_ftz):
        x = self._input(x, is_ftz)
        return self._result(np.sin(x.astype(F64)), self._angle_bound(x), is_ftz, exempt=x == 0)

    def cos(self, x, is_ftz):
        x = self._input(x, is_ftz)
        return self._result(np.cos(x.astype(F64)), self._angle_bound(x), is_ftz, exempt=x == 0)

    @staticmethod
    def _angle_bound(x):
        return np.where(np.abs(x) <= 2 * np.pi, 2.0**-20.5, 2.0**-14.7)

    def tanh(self, x):
        exact = np.tanh(np.asarray(x, F32).astype(F64))
        return self._result(exact, 2.0**-11 * np.abs(exact), False)

    def rcp(self, x, is_ftz):
        exact = 1.0 / self._input(x, is_ftz).astype(F64)
        return self._result(exact, 2.0**-23 * np.abs(exact), is_ftz)

    def sqrt(self, x, is_ftz):
        exact = np.sqrt(self._input(x, is_ftz).astype(F64))
        return self._result(exact, 2.0**-23 * exact, is_ftz)

    def rsqrt(self, x, is_ftz):
        exact = 1.0 / np.sqrt(self._input(x, is_ftz).astype(F64))
        return self._result(exact, 2.0**-22.4 * np.abs(exact), is_ftz)

    def div_full(self, a, b, is_ftz):
        """Two units in the last place, at all sizes."""
        exact = np.divide(self._input(a, is_ftz), self._input(b, is_ftz), dtype=F64)
        return self._result(exact, 2 * _unit(exact), is_ftz)

    def div_approx(self, a, b, is_ftz):
        """Two units in the last place; zero (or NaN, of an infinite a) where |b| exceeds 2^126."""
        b = self._input(b, is_ftz)
        result = self.div_full(a, b, is_ftz)
        beyond = (np.abs(b) > F32(2.0**126)) & np.isfinite(b)
        return np.where(beyond, self._input(a, is_ftz) * np.copysign(F32(0), b), result)

    @staticmethod
    def _input(x, is_ftz):
        return ftz(x) if is_ftz else np.asarray(x, F32)

    def _result(self, exact, bound, is_ftz, exempt=False):
        """Exact float64 values as float32, off by at most ``bound``."""
        exact = np.asarray(exact)
        nearest = exact.astype(F32)
        if self.noise is not None:
            off = exact + bound * _hashed_uniform(exact, self.noise)
            drawn = off.astype(F32)
            # Rounding may have crossed the bound; the neighbour towards the exact value, or its rounding, is inside.
            drawn = np.where(np.abs(drawn - exact) > bound, np.nextafter(drawn, nearest), drawn)
            outside = ~(np.abs(drawn - exact) <= bound)
            nearest = np.where(exempt | outside | (exact == 0) | ~np.isfinite(nearest), nearest, drawn)
        return ftz(nearest) if is_ftz else nearest


def _unit(x):
    """Unit in the last place of float32 at x."""
    exponent = np.frexp(x)[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, -126) - 23)


def _hashed_uniform(x, seed):
    """Numbers in [-1, 1) that depend on the bits of x and on the seed alone."""
    h = (np.asarray(x, F64).view(U64) ^ U64(seed * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)) * U64(0x9E3779B97F4A7C15)
    h ^= h >> U64(29)
    h *= U64(0xBF58476D1CE4E5B9)
    h ^= h >> U64(32)
    return (h >> U64(11)).astype(F64) / 2.0**52 - 1.0


# --- conversions ------------------------------------------------------------------------------------------------------

_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_tf32(bits, rounding="rna"):
    """float32 bits with 10 digits after the point: the nearest, ties away from zero (rna) or to even (rn), or cut."""
    bits = np.asarray(bits, U32)
    dropped = U32(0x1FFF)
    if rounding == "rz":
        return bits & ~dropped
    half = U32(0x1000) if rounding == "rna" else U32(0x0FFF) + (bits >> U32(13) & U32(1))
    magnitude = bits & U32(0x7FFFFFFF)
    rounded = np.where(magnitude < U32(0x7F800000), bits + half & ~dropped, bits)
    return np.where(magnitude > U32(0x7F800000), U32(0x7FFFE000), rounded).astype(U32)


def to_bf16(x, rounding="rn"):
    """bf16 bits of float32."""
    bits = np.asarray(x, F32).view(U32)
    if rounding == "rn":
        bits = np.where(np.isfinite(x), bits + U32(0x7FFF) + (bits >> U32(16) & U32(1)), bits)
    return np.where(np.isnan(x), U16(0x7FFF), (bits >> U32(16)).astype(U16))


def from_bf16(bits):
    return (np.asarray(bits, U16).astype(U32) << U32(16)).view(F32)


def to_f16(x, rounding="rn"):
    """fp16 bits of float32."""
    x = np.asarray(x, F32)
    result = x.astype(F16)
    if rounding == "rz":
        outward = np.isfinite(x) & (np.abs(result.astype(F32)) > np.abs(x))
        result = np.where(outward, np.nextafter(result, F16(0)), result)
    return np.where(np.isnan(x), U16(0x7FFF), result.view(U16))


def from_f16(bits):
    return np.asarray(bits, U16).view(F16).astype(F32)


def pack(low, high):
    """Two 16-bit halves as 32 bits."""
    return np.asarray(low, U16).astype(U32) | np.asarray(high, U16).astype(U32) << U32(16)


def to_integer(x, dtype, rounding="rzi"):
    """Integers of floats, at the ends of the range where they are outside of it; 0 for NaN."""
    whole = _INTEGRAL[rounding](np.asarray(x).astype(F64))
    ends = np.iinfo(dtype)
    # The upper end of 64 bits is no float64, so both ends are set rather than converted.
    inside = np.where((whole >= ends.min) & (whole < float(ends.max)), whole, 0).astype(dtype)
    return np.where(whole >= float(ends.max), dtype(ends.max), np.where(whole < ends.min, dtype(ends.min), inside))


def from_integer(x, dtype, rounding="rn"):
    """Floats of integers."""
    x = np.asarray(x)
    result = x.astype(dtype)
    if rounding == "rz":
        # The last digit of 64-bit integers is beyond float64: compare as integers, which holds below the upper end.
        ends = np.iinfo(x.dtype)
        inside = result < dtype(ends.max)
        back = np.where(inside, result, 0).astype(x.dtype)
        outward = ~inside | np.where(x < 0, back < x, back > x)
        result = np.where(outward, np.nextafter(result, dtype(0)), result)
    return result


def integral(x, rounding="rni"):
    """float32 to whole numbers in float32."""
    return _INTEGRAL[rounding](np.asarray(x, F32))
