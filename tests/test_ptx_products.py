"""The emulator's tensor cores against float64, with the layout of registers as PTX documents it."""

import numpy as np
import pytest
from ptx import numerics, products

# As on a GPU, nothing warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, U32 = np.float32, np.uint32
WARPS = 3
# Kind, K of one instruction, leading digits of an input.
SHAPES = [("tf32", 4, 11), ("tf32", 8, 11), ("bf16", 8, 8), ("bf16", 16, 8), ("f16", 8, 11), ("f16", 16, 11)]


def cut(x, digits):
    """float32 that is exact in ``digits`` binary digits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(mantissa * 2.0**digits), exponent - digits).astype(F32)


def random_matrices(rng, kind, k, columns=8):
    digits = {"tf32": 11, "bf16": 8, "f16": 11}[kind]
    a, b = (cut(rng.standard_normal(shape), digits) for shape in ((WARPS, 16, k), (WARPS, k, columns)))
    return a, b, rng.standard_normal((WARPS, 16, columns)).astype(F32)


def registers(matrix, kind, transposed=False):
    """Registers of a matrix [W, rows, K]: lane by lane, by the tables of the PTX manual.

    A (and B transposed) in parts of 8 rows by 4 (tf32) or 8 columns: first down the rows, then along K.
    """
    if transposed:
        matrix = matrix.swapaxes(1, 2)
    per_register = 1 if kind == "tf32" else 2
    width = 4 * per_register
    result = []
    for first in range(0, matrix.shape[2], width):
        for half in range(0, matrix.shape[1], 8):
            register = np.zeros((WARPS, 32), U32)
            for lane in range(32):
                group, thread = divmod(lane, 4)
                column = first + per_register * thread
                for i in range(per_register):
                    x = np.ascontiguousarray(matrix[:, half + group, column + i])
                    bits = {
                        "tf32": lambda x: x.view(U32),
                        "bf16": lambda x: x.view(U32) >> U32(16),
                        "f16": lambda x: x.astype(np.float16).view(np.uint16).astype(U32),
                    }[kind](x)
                    register[:, lane] |= bits << U32(16 * i)
            result.append(register.reshape(-1))
    return result


def accumulator(matrix):
    """Registers of C or D [W, 16, N]: columns 2t and 2t + 1 of rows g and g + 8, for every 8 columns."""
    result = []
    for first in range(0, matrix.shape[2], 8):
        for half in (0, 8):
            for odd in (0, 1):
                register = np.zeros((WARPS, 32), F32)
                for lane in range(32):
                    register[:, lane] = matrix[:, half + lane // 4, first + 2 * (lane % 4) + odd]
                result.append(register.reshape(-1).view(U32))
    return result


def bound(a, b, c, sums):
    """What ``sums`` sums in 24 digits may lose: a unit each of the largest partial sum."""
    return sums * 2.0**-23 * (np.abs(a.astype(np.float64)) @ np.abs(b) + np.abs(c))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("kind", "k", "digits"), SHAPES)
def test_mma_agrees_with_float64(kind, k, digits, exact):
    a, b, c = random_matrices(np.random.default_rng(k), kind, k)
    got = products.mma(registers(a, kind), registers(b, kind, transposed=True), accumulator(c), kind, exact)
    wanted = a.astype(np.float64) @ b + c
    limit = np.abs(wanted) * 2.0**-24 if exact else bound(a, b, c, 17)
    for x, y, tolerance in zip(
        got, accumulator(wanted.astype(F32)), accumulator(limit.astype(F32)), strict=True
    ):  # the oracle, rounded, is within half a unit itself
        error = np.abs(x.view(F32).astype(np.float64) - y.view(F32))
        assert (error <= 2 * tolerance.view(F32)).all()


def test_tensor_cores_cut_off_where_float64_rounds():
    rng = np.random.default_rng(0)
    a, b, c = (np.abs(x) for x in random_matrices(rng, "tf32", 8))
    arguments = registers(a, "tf32"), registers(b, "tf32", transposed=True), accumulator(c), "tf32"
    wanted = np.stack(accumulator((a.astype(np.float64) @ b + c).astype(F32))).view(F32)
    got = np.stack(products.mma(*arguments)).view(F32)
    assert (got <= wanted).all()
    assert (got < wanted).mean() > 0.2
    np.testing.assert_array_equal(np.stack(products.mma(*arguments, exact=True)).view(F32), wanted)


def test_terms_far_below_the_largest_are_lost():
    a, b, c = np.zeros((WARPS, 16, 8), F32), np.zeros((WARPS, 8, 8), F32), np.zeros((WARPS, 16, 8), F32)
    a[:, 0, :3] = [1, 2**-24, 2**-25]  # of 24 digits and a guard digit, 2^-24 is the last
    b[:, :3, 0] = 1
    c[:, 0, 0] = -1
    (first, *_) = products.mma(registers(a, "tf32"), registers(b, "tf32", transposed=True), accumulator(c), "tf32")
    assert first.view(F32)[0] == 2.0**-24
    (first, *_) = products.mma(
        registers(a, "tf32"), registers(b, "tf32", transposed=True), accumulator(c), "tf32", exact=True
    )
    assert first.view(F32)[0] == F32(2.0**-24 + 2.0**-25)


@pytest.mark.parametrize("extreme", [np.nan, np.inf, -np.inf, 3e38])
def test_extremes_pass_through(extreme):
    a, b, c = random_matrices(np.random.default_rng(1), "tf32", 8)
    a[:, 2, 3], b[:, 3, 5] = extreme, 4
    got = products.mma(registers(a, "tf32"), registers(b, "tf32", transposed=True), accumulator(c), "tf32")
    wanted = accumulator((a.astype(np.float64) @ b + c).astype(F32))
    place = 2 * 4 + 2  # row 2, columns 4 and 5
    np.testing.assert_array_equal(got[1].view(F32)[place], wanted[1].view(F32)[place])
    assert not np.isfinite(got[1].view(F32)[place])


def test_digits_of_tf32_beyond_the_tenth_are_ignored():
    a, b, c = random_matrices(np.random.default_rng(2), "tf32", 8)
    clean = products.mma(registers(a, "tf32"), registers(b, "tf32", transposed=True), accumulator(c), "tf32")
    dirty = [x | U32(0x1FFF) for x in registers(a, "tf32")]
    np.testing.assert_array_equal(
        products.mma(dirty, registers(b, "tf32", transposed=True), accumulator(c), "tf32"), clean
    )


@pytest.mark.parametrize("from_memory", [False, True])
@pytest.mark.parametrize(("kind", "k"), [("tf32", 8), ("bf16", 16), ("f16", 16)])
def test_wgmma_agrees_with_float64(kind, k, from_memory):
    a, b, c = random_matrices(np.random.default_rng(3), kind, k, columns=24)
    got = products.wgmma(a if from_memory else registers(a, kind), b, accumulator(c), kind)
    wanted, limit = a.astype(np.float64) @ b + c, bound(a, b, c, 17)
    assert len(got) == 12
    for x, y, tolerance in zip(got, accumulator(wanted.astype(F32)), accumulator(limit.astype(F32)), strict=True):
        assert (np.abs(x.view(F32).astype(np.float64) - y.view(F32)) <= 2 * tolerance.view(F32)).all()


def test_inputs_are_read_as_torch_reads_them():
    import torch

    x = torch.randn(100)
    np.testing.assert_array_equal(
        products.values(x.bfloat16().view(torch.uint16).numpy(), "bf16"), x.bfloat16().float().numpy()
    )
    np.testing.assert_array_equal(products.values(x.half().view(torch.uint16).numpy(), "f16"), x.half().float().numpy())
    assert numerics.to_tf32(x.numpy().view(U32), "rz").view(F32).tolist() == cut(x.numpy(), 11).tolist()
