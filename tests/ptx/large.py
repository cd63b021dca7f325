"""Kernels on tensors of more than 2^31 elements, of which only the ends are ever touched.

``PYTHONPATH=.:tests python -m ptx.large [80 | 90]`` runs the first and the last CTAs of each launch and compares the
samples at the ends with the reference. What lies between is never written, so it takes no memory.
"""

import sys

import torch

from m3er_fast import reference
from m3er_fast.functional import CheckProjections, check_statistics
from m3er_fast.kernels import loss as kernels
from m3er_fast.operands import LossFactors, LossOptions
from ptx.driver import EmulatedDriver
from ptx.machine import Options

TWO_GIGA = 2**31
SAMPLES = [0, 1, -2, -1]


def _with_ends(x, dim, count=300):
    """Give random values to ``count`` samples at either end."""
    generator = torch.Generator().manual_seed(0)
    for start in (0, x.shape[dim] - count):
        part = x.narrow(dim, start, count)
        part.copy_(torch.randn(part.shape, generator=generator))
    return x


def _loss(logits, **options):
    """Loss and gradient by the launcher, whose arguments are checked: a check would touch every element."""
    target = torch.zeros(logits.shape[1], dtype=torch.int64)
    target[SAMPLES] = torch.arange(len(SAMPLES)) % logits.shape[2]
    options = LossOptions(reduction="none", **options)
    got = kernels.loss_and_gradient(logits, target, LossFactors(), options, with_gradient=True)
    chosen = logits[:, SAMPLES].double().requires_grad_()
    wanted = reference.fusion_loss(chosen, target[SAMPLES], **options._asdict())
    (gradient,) = torch.autograd.grad(wanted.sum(), chosen)
    torch.testing.assert_close(got[0][SAMPLES].double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1][:, SAMPLES].double(), gradient, rtol=8e-3, atol=1e-4)


def narrow_loss():
    _loss(_with_ends(torch.empty(3, TWO_GIGA // 18 + 1000, 6, dtype=torch.bfloat16), 1))


def questions():
    _loss(_with_ends(torch.empty(3, TWO_GIGA // 18 + 1000, 6, dtype=torch.bfloat16), 1), activation="sigmoid")


def strides_beyond_two_giga():
    _loss(_with_ends(torch.empty(2, 6, TWO_GIGA // 6 + 1000, dtype=torch.bfloat16), 2).transpose(1, 2))


def wide_loss():
    _loss(_with_ends(torch.empty(2, TWO_GIGA // 2**18 + 40, 2**17, dtype=torch.bfloat16), 1, count=4))


def statistics_of_the_check():
    batch, dims = TWO_GIGA // 300 + 1000, (300, 3)
    features = [_with_ends(torch.empty(batch, d, dtype=torch.bfloat16), 0) for d in dims]
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    projections = CheckProjections(
        [matrix(d) for d in dims], [matrix(4, 300)], [matrix(4)], [matrix(4, 3)], [matrix(4)],
        [matrix(20, 300), matrix(3, 3)], [matrix(4).abs()], [torch.tensor([0.9, 0.6, 0.3, 0.0])],
    )  # fmt: skip
    got = check_statistics(features, projections, backend="triton")
    exact = CheckProjections(*([x.double() for x in value] for value in projections[:-1]))
    wanted = reference.check_statistics([x[SAMPLES].double() for x in features], exact)
    for one, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(one[SAMPLES].double(), right, rtol=1e-5, atol=1e-5)


CASES = (narrow_loss, questions, strides_beyond_two_giga, wide_loss, statistics_of_the_check)


def main(target):
    driver = EmulatedDriver(target, Options(races=False, ends=4))
    driver.take_the_place_of_a_gpu()
    kernels._MOST_PROGRAMS = 2**40  # a program per block, so that those at the ends are few
    for case in CASES:
        case()
        print(case.__name__, *(driver.take_findings() or ["right"]), sep="\n  ", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 80)
