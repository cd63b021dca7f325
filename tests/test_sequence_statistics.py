"""The statistics of feature sequences, by the reference and on the CPU, against NumPy in float64."""

import math

import numpy as np
import pytest
import torch
from sequence_problems import assert_equals_oracle, problem

from m3er_fast import reference
from m3er_fast.cpu import sequence_statistics as cpu
from m3er_fast.functional import sequence_statistics
from m3er_fast.functional._dispatch import choose

MOMENTS = ("mean", "variance", "change")


def compute_by_reference(x, valid):
    return sequence_statistics(x, valid, backend="torch")


@pytest.fixture(params=["reference", "cpu", "cpu, blocks of few samples"])
def compute(request, monkeypatch):
    if request.param == "reference":
        return compute_by_reference
    if request.param != "cpu":
        monkeypatch.setattr(cpu, "BLOCK_NUMBERS", 140)
    return sequence_statistics


def test_auto_is_the_fast_path_of_the_cpu():
    x, valid = problem(0)
    assert choose("sequence_statistics", "auto", x, valid).name == "cpu"
    assert choose("sequence_statistics", "torch", x, valid).load() is reference.sequence_statistics


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "sizes", [(5, 9, 7), (1, 1, 1), (3, 1, 4), (2, 2, 1), (4, 30, 1), (70, 3, 2), (6, 2, 300), (9, 40, 33)]
)
def test_sequence_statistics_equal_numpy(compute, seed, sizes):
    x, valid = problem(seed, *sizes)
    assert_equals_oracle(compute(x, valid), x, valid)


def test_every_frame_valid(compute):
    x, valid = problem(1)
    assert_equals_oracle(compute(x, valid | True), x, valid | True)


def test_padding_at_the_end_and_at_the_beginning(compute):
    x, _ = problem(2, 10, 9)
    for valid in (torch.arange(9) < torch.arange(10)[:, None], torch.arange(9) >= torch.arange(10)[:, None]):
        assert_equals_oracle(compute(x, valid), x, valid)


def test_float64_keeps_its_digits(compute):
    x, valid = problem(3, dtype=torch.float64)
    found = compute(x, valid)
    assert found.mean.dtype == found.variance.dtype == found.change.dtype == torch.float64
    assert_equals_oracle(found, x, valid, rtol=1e-14, atol=1e-28)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(compute, dtype):
    x, valid = problem(4, dtype=dtype)
    found = compute(x, valid)
    for got, wanted in zip(found, compute(x.float(), valid), strict=True):
        assert torch.equal(got, wanted)
    assert_equals_oracle(found, x, valid)


def test_small_changes_keep_their_digits_beside_a_large_offset(compute):
    """In float32 the mean of the squares, 10^8, has an error of 8; the variance here is 10^-4 to 10^-2."""
    x, valid = problem(5, 8, 50)
    x = 1e4 + x * torch.logspace(-2, -1, 7)
    assert_equals_oracle(compute(x, valid), x, valid, rtol=1e-5)


def test_a_first_frame_far_from_the_others_costs_few_digits(compute):
    x, valid = problem(6, 8, 50)
    x[torch.arange(8), valid.int().argmax(dim=1)] += 1e4
    assert_equals_oracle(compute(x, valid), x, valid, rtol=1e-4)


@pytest.mark.parametrize("value", [0.1, 1e4 / 3, -7e-20])
def test_a_frozen_sequence_has_no_variance_and_no_change(compute, value):
    _, valid = problem(7, 6, 30, 5)
    frame = value * (1.0 + torch.arange(30.0).view(6, 1, 5) / 7)
    found = compute(frame.expand(6, 30, 5), valid)
    assert not found.variance.any()
    assert not found.change.any()
    assert torch.equal(found.repeated, found.pairs)
    wanted = frame[:, 0].where(valid.any(dim=1)[:, None], 0.0)
    torch.testing.assert_close(found.mean, wanted, rtol=2e-7, atol=0)


def test_frames_repeat_only_if_all_features_do(compute):
    x = torch.ones(1, 4, 3)
    x[0, 1, 2] = 1.0 + 2**-23
    x[0, 2:] = x[0, 1]
    found = compute(x, torch.ones(1, 4, dtype=torch.bool))
    assert (found.repeated.item(), found.pairs.item()) == (2, 3)


def test_a_difference_whose_square_vanishes_is_no_repetition(compute):
    x = torch.tensor([0.0, 1e-30, 1e-30, 2e-30]).view(1, 4, 1)
    found = compute(x, torch.ones(1, 4, dtype=torch.bool))
    assert found.repeated.item() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_frames_that_are_not_valid_have_no_say_whatever_they_hold(compute, value):
    x, valid = problem(8)
    wanted = compute(x, valid)
    for got, expected in zip(compute(x.masked_fill(~valid[:, :, None], value), valid), wanted, strict=True):
        assert torch.equal(got, expected)


def test_a_sample_without_valid_frames_has_zeros(compute):
    x, _ = problem(9, offset=3.0)
    for got in compute(x, torch.zeros(5, 9, dtype=torch.bool)):
        assert not got.any()


@pytest.mark.parametrize("value", [1e25, 3e38, math.inf, math.nan])
def test_moments_that_overflow_are_finite_and_disturb_no_other_sample(compute, value):
    x, valid = problem(10)
    wanted = compute(x, valid)
    x[4] = value * torch.tensor([1.0, -1.0]).repeat(32)[:63].view(9, 7)
    found = compute(x, valid)
    for name in MOMENTS:
        got, expected = getattr(found, name), getattr(wanted, name)
        assert got.isfinite().all()
        torch.testing.assert_close(got[:4], expected[:4], rtol=1e-6, atol=1e-7)
    assert (found.variance[4] > 1e38).all()
    assert (found.change[4] > 1e38).all()


def test_a_common_offset_changes_nothing_but_the_mean(compute):
    """Exactly, where the sum has no rounding error."""
    rng = np.random.default_rng(11)
    x = torch.from_numpy(rng.integers(-64, 64, size=(5, 12, 7)) / 16).float()
    valid = torch.from_numpy(rng.random((5, 12)) < 0.8)
    plain, shifted = compute(x, valid), compute(x + 1024, valid)
    for name in ("variance", "change", "repeated", "pairs"):
        assert torch.equal(getattr(plain, name), getattr(shifted, name))
    torch.testing.assert_close(shifted.mean - 1024, plain.mean, rtol=0, atol=1e-4)


def test_a_sample_does_not_depend_on_the_others_or_on_padding(compute):
    x, valid = problem(12, 40, 9, 36)
    together = compute(x, valid)
    padded = compute(torch.nn.functional.pad(x, (0, 0, 0, 4)), torch.nn.functional.pad(valid, (0, 4)))
    for b in range(40):
        alone = compute(x[b : b + 1], valid[b : b + 1])
        for got, everyone, wanted in zip(together, padded, alone, strict=True):
            torch.testing.assert_close(got[b], wanted[0], rtol=5e-7, atol=1e-7)
            torch.testing.assert_close(everyone[b], wanted[0], rtol=5e-7, atol=1e-7)


def test_any_strides(compute):
    x, valid = problem(13)
    wanted = compute(x, valid)
    wide = torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, :7]
    steps = x.repeat_interleave(2, dim=1)[:, ::2]
    columns = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    odd_valid = valid.T.contiguous().T
    for strided in (wide, steps, columns):
        for got, expected in zip(compute(strided, odd_valid), wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_no_sample(compute, steps):
    found = compute(torch.zeros(0, steps, 3), torch.zeros(0, steps, dtype=torch.bool))
    assert [tuple(value.shape) for value in found] == [(0, 3), (0, 3), (0, 3), (0,), (0,)]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_results_share_no_memory_with_the_frames(compute, steps):
    x, valid = problem(14, steps=steps)
    before = x.clone()
    for value in compute(x, valid | True):
        value.add_(1)
    assert torch.equal(x, before)


def test_autocast_changes_nothing(compute):
    x, valid = problem(15)
    wanted = compute(x, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, expected in zip(compute(x, valid), wanted, strict=True):
            assert torch.equal(got, expected)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_a_gradient_is_the_references():
    x, valid = problem(16)
    x.requires_grad_()
    assert choose("sequence_statistics", "auto", x, valid).name == "torch"
    with torch.no_grad():
        assert choose("sequence_statistics", "auto", x, valid).name == "cpu"
    assert sequence_statistics(x, valid).variance.requires_grad


def test_gradients_of_the_moments_are_those_of_finite_differences():
    x, valid = problem(17, 4, 6, 3, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: sequence_statistics(x, valid)[:3], (x.requires_grad_(),))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_frames_that_are_not_valid_get_a_gradient_of_zero(value):
    x, valid = problem(18)
    x = x.masked_fill(~valid[:, :, None], value).requires_grad_()
    mean, variance, change, *_ = sequence_statistics(x, valid)
    (gradient,) = torch.autograd.grad(mean.sum() + variance.sum() + change.sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[~valid].any()
    assert gradient[valid].any()


def test_compiles_in_one_graph():
    x, valid = problem(19)
    compiled = torch.compile(sequence_statistics, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(x, valid), sequence_statistics(x, valid), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x must be floating of shape \(B, T, d\) with T, d ≥ 1, got .*float32 of \(3, 4\)"),
        ({"x": torch.zeros(3, 4, 2).int()}, r"x must be floating .*got torch.int32"),
        ({"x": torch.zeros(3, 0, 2)}, r"x must be floating .*T, d ≥ 1, got .* of \(3, 0, 2\)"),
        ({"x": torch.zeros(3, 4, 0)}, r"x must be floating .*T, d ≥ 1, got .* of \(3, 4, 0\)"),
        (
            {"valid": torch.zeros(3, 5, dtype=torch.bool)},
            r"valid must be bool of shape \(3, 4\), got .*bool of \(3, 5\)",
        ),
        ({"valid": torch.zeros(3, 4)}, r"valid must be bool of shape \(3, 4\), got torch.float32"),
        ({"valid": torch.zeros(3, 4, dtype=torch.bool, device="meta")}, r"valid is on meta"),
        ({"backend": "cuda"}, r"backend must be one of 'auto', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"x": torch.zeros(3, 4, 2), "valid": torch.ones(3, 4, dtype=torch.bool), **changes}
    with pytest.raises(ValueError, match=message):
        sequence_statistics(**arguments)
