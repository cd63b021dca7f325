"""Random problems of the memory scan, shared by the tests of its implementations."""

import torch

from m3er_fast.operands import MemoryScanWeights, TwoLayers

# Length 0, a negative one, one above T, and ties.
ODD_LENGTHS = torch.tensor([9, 1, 12, 0, 9, 2, -3])


def problem(
    dims=(3, 5, 2),
    batch=7,
    steps=9,
    *,
    feedback=True,
    dtype=torch.float64,
    device="cpu",
    sizes=(3, 4, 5, 6, 7),
    seed=0,
    unit_gain=False,
):
    """Features and weights, all of which need gradients.

    With ``unit_gain`` a layer's weights shrink with the number of its inputs, so that large layers do not saturate.
    """
    generator = torch.Generator().manual_seed(seed)
    h, u, a, b, g = sizes
    modalities, cells = len(dims), 2 * h * len(dims)

    def draw(*shape, scale=0.4):
        value = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return value.to(device, dtype).requires_grad_()

    def weight(*shape, scale=0.4):
        return draw(*shape, scale=shape[-1] ** -0.5 if unit_gain else scale)

    def layers(size, inner, out):
        return TwoLayers(weight(inner, size), draw(inner), weight(out, inner), draw(out))

    weights = MemoryScanWeights(
        input=[weight(4 * h, d) for d in dims],
        recurrent=weight(modalities, 4 * h, h),
        bias=draw(modalities, 4 * h),
        feedback=weight(modalities, 4 * h, 2 * h, scale=2.0) if feedback else None,
        attention=layers(cells, a, cells),
        candidate=layers(cells, b, u),
        retain=layers(cells + u, g, u),
        update=layers(cells + u, g, u),
    )
    return [draw(batch, steps, d, scale=1.0) for d in dims], weights


def leaves(features, weights):
    return [*features, *(x for x in weights.tensors() if x is not None)]


def each(convert, weights):
    """The weights with every tensor converted."""
    return MemoryScanWeights.of(len(weights.input), [x if x is None else convert(x) for x in weights.tensors()])


def detached(weights):
    return each(torch.Tensor.detach, weights)
