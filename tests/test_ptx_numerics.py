"""The emulator's arithmetic against exact rationals, bit arithmetic and torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import numerics

# As on a GPU, nothing warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, U32 = np.float32, np.uint32
EXTREMES = np.array(
    [0.0, -0.0, 1.0, -1.0, 2**-126, -(2**-126), 2**-149, 2**-140, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan], F32
)


def random_floats(number, seed):
    """Numbers of every size: random bits, moderate numbers and extremes."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, number, dtype=np.uint64).astype(U32).view(F32)
    moderate = (rng.standard_normal(number) * 2.0 ** rng.integers(-4, 4, number)).astype(F32)
    return np.concatenate([bits, moderate, EXTREMES])


def nearest_float32(exact):
    """A fraction, correctly rounded to float32."""
    if exact == 0:
        return F32(0)
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(size / unit) * unit  # round() of a fraction takes ties to even
    return F32(math.copysign(float(rounded) if rounded < Fraction(2) ** 128 else math.inf, exact))


def fma_cases():
    """Ordinary sums, cancellation, subnormal results, and products beside a tie of float32."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, (3, 3000), dtype=np.uint64).astype(U32).view(F32)
    x[:, :700] = rng.standard_normal((3, 700)) * 2.0 ** rng.integers(-3, 3, (3, 700))
    x[2, :300] = -(x[0, :300] * x[1, :300])
    x[:, 700:1500] = rng.integers(1, 2**12, (3, 800)) * 2.0 ** rng.integers(-80, -60, (3, 800))
    x[:2, 1500:1700] = 1 + 2**-12
    x[2, 1500:1700] = rng.standard_normal(200) * 2.0**-60
    return x[:, np.isfinite(x).all(axis=0)]


def test_fma_is_rounded_once():
    a, b, c = fma_cases()
    got = numerics.fma(a, b, c)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    wanted = np.array([nearest_float32(x) for x in exact])
    np.testing.assert_array_equal(got, wanted)
    assert (got != (a.astype(np.float64) * b + c).astype(F32)).any()  # the cases tell it from rounding twice


def test_fma_of_infinities_and_nan():
    got = numerics.fma(*np.array([[np.inf, 1, 3e38, np.nan], [0, np.inf, 3e38, 1], [1, -np.inf, -np.inf, 1]], F32))
    np.testing.assert_array_equal(got, np.array([np.nan, np.nan, -np.inf, np.nan], F32))


def test_ftz_makes_subnormal_numbers_zero_of_their_sign():
    x = np.array([2**-126, 2**-127, -(2**-149), 0, -0.0, np.nan, -np.inf], F32)
    got = numerics.ftz(x)
    np.testing.assert_array_equal(got, np.array([2**-126, 0, 0, 0, 0, np.nan, -np.inf], F32))
    np.testing.assert_array_equal(np.signbit(got[1:5]), [False, True, False, True])


@pytest.mark.parametrize("nan", [False, True])
def test_minimum_and_maximum(nan):
    a, b = np.array([1, np.nan, 0, -0.0, np.inf], F32), np.array([2, 3, -0.0, 0, np.nan], F32)
    largest, smallest = numerics.maximum(a, b, nan), numerics.minimum(a, b, nan)
    np.testing.assert_array_equal(largest, [2, np.nan, 0, 0, np.nan] if nan else [2, 3, 0, 0, np.inf])
    np.testing.assert_array_equal(smallest, [1, np.nan, 0, 0, np.nan] if nan else [1, 3, 0, 0, np.inf])
    assert not np.signbit(largest[2:4]).any()
    assert np.signbit(smallest[2:4]).all()


# Instruction, exact value in float64, and the documented bound of its error.
APPROXIMATE = {
    "ex2": (np.exp2, lambda x, y: 2.0**-22 * y),
    "lg2": (np.log2, lambda x, y: 2.0**-22 * (1.0 if 0.5 < x < 2 else abs(y))),
    "rcp": (lambda x: 1 / x, lambda x, y: 2.0**-23 * abs(y)),
    "sqrt": (np.sqrt, lambda x, y: 2.0**-23 * y),
    "rsqrt": (lambda x: 1 / np.sqrt(x), lambda x, y: 2.0**-22.4 * y),
    "tanh": (np.tanh, lambda x, y: 2.0**-11 * abs(y)),
}


@pytest.mark.parametrize("name", APPROXIMATE)
@pytest.mark.parametrize("noise", [None, 1])
def test_approximate_instructions_stay_within_their_bounds(name, noise):
    exact, bound = APPROXIMATE[name]
    x = np.concatenate([random_floats(1000, 1), np.linspace(0.5, 2, 301, dtype=F32), np.arange(-130, 130, dtype=F32)])
    flush = () if name == "tanh" else (False,)
    got = getattr(numerics.Approximations(noise), name)(x, *flush)
    again = getattr(numerics.Approximations(noise), name)(x[::-1], *flush)[::-1]
    wanted = exact(x.astype(np.float64))
    np.testing.assert_array_equal(got, again)  # the same for the same input, wherever it stands
    rounded = wanted.astype(F32)
    off = got != rounded
    special = ~np.isfinite(rounded) | (wanted == 0)
    np.testing.assert_array_equal(got[special], rounded[special])
    if noise is None:
        np.testing.assert_array_equal(got, rounded)
        return
    assert off.mean() > 0.1
    for i in np.flatnonzero(off & ~np.isnan(got)):
        assert abs(float(got[i]) - wanted[i]) <= bound(float(x[i]), wanted[i])


@pytest.mark.parametrize("name", ["div_full", "div_approx"])
def test_approximate_quotients_are_within_two_units(name):
    a, b = random_floats(2000, 2), random_floats(2000, 3)
    got = getattr(numerics.Approximations(noise=3), name)(a, b, False)
    exact = a.astype(np.float64) / b
    rounded = exact.astype(F32)
    usual = np.isfinite(exact) & np.isfinite(rounded) & (np.abs(b) <= 2.0**126)
    unit = np.spacing(np.abs(rounded[usual])).astype(np.float64)
    units = np.abs(got[usual] - exact[usual]) / unit
    assert 1 < units.max() <= 2 + 1e-6
    beyond = (np.abs(b) > 2.0**126) & np.isfinite(b) & np.isfinite(a)
    if name == "div_approx":
        assert (got[beyond] == 0).all()


def test_flushing_approximations():
    exact = numerics.Approximations()
    x = np.array([2**-130, -126, -127, -150], F32)
    np.testing.assert_array_equal(exact.ex2(x, True), np.array([1, 2**-126, 0, 0], F32))
    np.testing.assert_array_equal(exact.ex2(x[2:3], False), np.array([2**-127], F32))
    np.testing.assert_array_equal(exact.rcp(x[:1], True), [np.inf])
    np.testing.assert_array_equal(exact.lg2(x[:1], True), [-np.inf])
    assert 0 in {float(numerics.Approximations(seed).ex2(x[1:2], True)[0]) for seed in range(20)}  # a hair low: flushed


def test_documented_special_values_have_no_noise():
    noisy = numerics.Approximations(noise=1)
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan], F32)
    np.testing.assert_array_equal(noisy.ex2(x, True), [1, 1, np.inf, 0, np.nan])
    np.testing.assert_array_equal(noisy.rcp(x, True), [np.inf, -np.inf, 0, 0, np.nan])
    np.testing.assert_array_equal(noisy.sqrt(x, True), [0, 0, np.inf, np.nan, np.nan])


def test_quotients_and_roots_rounded_to_the_nearest():
    rng = np.random.default_rng(4)
    a, b = (rng.integers(1, 2**24, (2, 300)) * 2.0 ** rng.integers(-100, 60, (2, 300))).astype(F32)
    quotient = numerics.div_rn(a, b)
    wanted = [nearest_float32(Fraction(float(x)) / Fraction(float(y))) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(quotient, np.array(wanted))
    root = numerics.sqrt_rn(a)
    for x, r in zip(a, root, strict=True):  # the true root lies within half a unit on both sides
        low, high = (Fraction(float(r)) + sign * Fraction(float(np.spacing(r))) / 2 for sign in (-1, 1))
        assert low**2 <= Fraction(float(x)) <= high**2


# --- conversions ------------------------------------------------------------------------------------------------------


def rounded_to_digits(x, digits, ties):
    """float32 with ``digits`` binary digits, by rationals; the smallest unit is the subnormal numbers'."""
    if not np.isfinite(x) or x == 0:
        return float(x)
    size = abs(Fraction(float(x)))
    exponent = math.frexp(float(x))[1]
    unit = Fraction(2) ** max(exponent - digits, -126 - (digits - 1))
    whole, rest = divmod(size, unit)
    if ties == "away":
        whole += rest >= unit / 2
    elif ties == "even":
        whole += rest > unit / 2 or (rest == unit / 2 and whole % 2)
    value = whole * unit
    return math.copysign(float(value) if value < Fraction(2) ** 128 else math.inf, float(x))


@pytest.mark.parametrize(("rounding", "ties"), [("rna", "away"), ("rn", "even"), ("rz", "none")])
def test_tf32_keeps_eleven_digits(rounding, ties):
    x = random_floats(500, 5)
    halfway = (x.view(U32) & U32(0xFFFFE000) | U32(0x1000)).view(F32)
    x = np.concatenate([x, halfway])
    x = x[~np.isnan(x)]
    got = numerics.to_tf32(x.view(U32), rounding).view(F32)
    np.testing.assert_array_equal(got, np.array([rounded_to_digits(v, 11, ties) for v in x], np.float64).astype(F32))
    assert np.isnan(numerics.to_tf32(np.array([np.nan], F32).view(U32), rounding).view(F32)).all()


def test_bf16_and_f16_agree_with_torch():
    x = random_floats(3000, 6)
    halfway = (x.view(U32) & U32(0xFFFF0000) | U32(0x8000)).view(F32)
    x = np.concatenate([x, halfway, np.linspace(-7e4, 7e4, 999, dtype=F32)])
    for to, back, dtype in (
        (numerics.to_bf16, numerics.from_bf16, torch.bfloat16),
        (numerics.to_f16, numerics.from_f16, torch.float16),
    ):
        got = back(to(x))
        np.testing.assert_array_equal(got, torch.from_numpy(x).to(dtype).float().numpy())
        assert (to(np.array([np.nan], F32)) == 0x7FFF).all()


def test_bf16_and_f16_towards_zero():
    x = random_floats(500, 7)
    x = x[np.isfinite(x)]
    small = numerics.from_f16(numerics.to_f16(x, "rz"))
    wide = numerics.from_bf16(numerics.to_bf16(x, "rz"))
    np.testing.assert_array_equal(wide, np.array([rounded_to_digits(v, 8, "none") for v in x], np.float64).astype(F32))
    assert (np.abs(small) <= np.abs(x)).all()
    assert np.isfinite(small).all()
    assert small[np.abs(x) > 65504].size
    assert (np.abs(small[np.abs(x) > 65504]) == 65504).all()


def test_halves_are_packed_low_first():
    low, high = np.array([0x1234], np.uint16), np.array([0xABCD], np.uint16)
    assert numerics.pack(low, high).tolist() == [0xABCD1234]


WHOLE = {"rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil, "rni": round}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("rounding", WHOLE)
def test_integers_of_floats_saturate(dtype, rounding):
    x = np.concatenate([random_floats(100, 8), np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 2.0**31, 2.0**63], F32)])
    ends = np.iinfo(dtype)

    def expected(value):
        if math.isnan(value):
            return 0
        if math.isinf(value):
            return ends.max if value > 0 else ends.min
        return min(max(WHOLE[rounding](value), ends.min), ends.max)

    got = numerics.to_integer(x, dtype, rounding)
    assert got.dtype == dtype
    assert got.tolist() == [expected(float(value)) for value in x]


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_floats_of_integers(dtype):
    ends = np.iinfo(dtype)
    rng = np.random.default_rng(9)
    x = rng.integers(ends.min, ends.max, 300, dtype=dtype)
    x = np.concatenate([x, x >> dtype(5), np.array([ends.min, ends.max, 0, 1], dtype)])
    nearest = numerics.from_integer(x, F32)
    np.testing.assert_array_equal(nearest, np.array([nearest_float32(Fraction(int(v))) for v in x]))
    cut = numerics.from_integer(x, F32, "rz")
    for value, result in zip(x.tolist(), cut.tolist(), strict=True):
        assert abs(result) <= abs(value)
        assert abs(value) < np.nextafter(F32(abs(result)), F32(np.inf)).item() or value == 0


def test_whole_numbers_in_float32():
    x = np.array([0.5, 1.5, -0.5, -1.2, 2.7], F32)
    assert numerics.integral(x, "rni").tolist() == [0, 2, 0, -1, 3]
    assert numerics.integral(x, "rmi").tolist() == [0, 1, -1, -2, 2]
