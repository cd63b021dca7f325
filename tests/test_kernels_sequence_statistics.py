"""The kernel of the statistics of feature sequences against NumPy in float64."""

import math

import pytest
import torch
from sequence_problems import assert_equals_oracle, problem

from m3er_fast.functional import BackendUnavailableError, sequence_statistics

pytest.importorskip("triton")

SIZES = [(5, 9, 7), (1, 1, 1), (3, 1, 4), (2, 2, 1), (4, 30, 1), (70, 3, 2), (6, 4, 300), (5, 12, 33), (2, 3, 1025)]


def compute(device, x, valid):
    return sequence_statistics(x.to(device), valid.to(device), backend="triton")


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_equals_numpy(device, sizes, dtype):
    x, valid = problem(0, *sizes, dtype=dtype)
    for used in (valid, valid | True):
        found = compute(device, x, used)
        assert found.mean.dtype == found.variance.dtype == found.change.dtype == torch.float32
        assert_equals_oracle(found, x, used)


@pytest.mark.parametrize("features", [300, 4096])
def test_as_many_features_as_the_kernel_takes(device, features):
    x, valid = problem(1, 3, 3, features)
    assert_equals_oracle(compute(device, x, valid), x, valid)


def test_more_features_than_the_kernel_takes(device):
    x, valid = (value.to(device) for value in problem(2, 3, 3, 4097))
    with pytest.raises(BackendUnavailableError, match="up to 4096 features, got 4097"):
        sequence_statistics(x, valid, backend="triton")
    assert_equals_oracle(sequence_statistics(x, valid), x, valid)


def test_small_changes_keep_their_digits_beside_a_large_offset(device):
    x, valid = problem(3, 8, 50)
    x = 1e4 + x * torch.logspace(-2, -1, 7)
    assert_equals_oracle(compute(device, x, valid), x, valid)


@pytest.mark.parametrize("value", [0.1, 1e4 / 3, -7e-20])
def test_a_frozen_sequence_has_no_variance_and_no_change(device, value):
    _, valid = problem(4, 6, 20, 5)
    frame = value * (1.0 + torch.arange(30.0).view(6, 1, 5) / 7)
    found = compute(device, frame.expand(6, 20, 5).contiguous(), valid)
    assert not found.variance.any()
    assert not found.change.any()
    assert torch.equal(found.repeated, found.pairs)


def test_a_difference_whose_square_vanishes_is_no_repetition(device):
    x = torch.tensor([0.0, 1e-30, 1e-30, 2e-30]).view(1, 4, 1)
    assert compute(device, x, torch.ones(1, 4, dtype=torch.bool)).repeated.item() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_frames_that_are_not_valid_have_no_say_whatever_they_hold(device, value):
    x, valid = problem(5)
    wanted = compute(device, x, valid)
    for got, expected in zip(compute(device, x.masked_fill(~valid[:, :, None], value), valid), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [1e25, 3e38, math.inf, math.nan])
def test_moments_that_overflow_are_finite_and_disturb_no_other_sample(device, value):
    x, valid = problem(6)
    wanted = compute(device, x, valid)
    x[4] = value * torch.tensor([1.0, -1.0]).repeat(32)[:63].view(9, 7)
    found = compute(device, x, valid)
    for got, expected in zip(found[:3], wanted[:3], strict=True):
        assert got.isfinite().all()
        assert torch.equal(got[:4], expected[:4])
    assert (found.variance[4] > 1e38).all()
    assert (found.change[4] > 1e38).all()


def test_a_sample_does_not_depend_on_the_others_or_on_padding(device):
    x, valid = problem(7, 9, 9, 36)
    together = compute(device, x, valid)
    padded = compute(device, torch.nn.functional.pad(x, (0, 0, 0, 4)), torch.nn.functional.pad(valid, (0, 4)))
    for b in range(9):
        for got, everyone, wanted in zip(
            together, padded, compute(device, x[b : b + 1], valid[b : b + 1]), strict=True
        ):
            assert torch.equal(got[b], wanted[0])
            assert torch.equal(everyone[b], wanted[0])


def test_any_strides(device):
    x, valid = (value.to(device) for value in problem(8))
    wanted = compute(device, x, valid)
    wide = torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, :7]
    steps = x.repeat_interleave(2, dim=1)[:, ::2]
    columns = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for strided in (wide, steps, columns, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for got, expected in zip(compute(device, strided, valid.T.contiguous().T), wanted, strict=True):
            assert torch.equal(got, expected)


def test_no_sample(device):
    found = compute(device, torch.zeros(0, 4, 3), torch.zeros(0, 4, dtype=torch.bool))
    assert [tuple(value.shape) for value in found] == [(0, 3), (0, 3), (0, 3), (0,), (0,)]


@pytest.mark.usefixtures("poisoned_outputs")
def test_every_element_of_the_outputs_is_written(device):
    x, valid = problem(9, 6, 5, 33)
    assert_equals_oracle(compute(device, x, valid), x, valid)


def test_opcheck(device):
    from m3er_fast.kernels import sequence_statistics as kernels

    torch.library.opcheck(kernels.sequence_statistics_op, tuple(value.to(device) for value in problem(10)))


def test_compiles_in_one_graph_and_exports(device):
    x, valid = (value.to(device) for value in problem(11))

    class Moments(torch.nn.Module):
        def forward(self, x, valid):
            return sequence_statistics(x.sin(), valid, backend="triton")

    wanted = Moments()(x, valid)
    compiled = torch.compile(Moments(), fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    exported = torch.export.export(Moments(), (x, valid)).module()
    for got, again, expected in zip(compiled(x, valid), exported(x, valid), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_is_the_torch_path(device):
    x, valid = (value.to(device) for value in problem(12))
    x.requires_grad_()
    with pytest.raises(BackendUnavailableError, match=r"sequence_statistics: backend 'triton' .*it has no gradient"):
        sequence_statistics(x, valid, backend="triton")
    (gradient,) = torch.autograd.grad(sequence_statistics(x, valid).change.sum(), x)
    assert gradient.any()
    with torch.no_grad():
        assert sequence_statistics(x, valid, backend="triton").mean.isfinite().all()


def test_float64_is_refused(device):
    x, valid = (value.to(device) for value in problem(13, dtype=torch.float64))
    with pytest.raises(BackendUnavailableError, match=r"it computes float16, bfloat16 and float32, got torch.float64"):
        sequence_statistics(x, valid, backend="triton")
