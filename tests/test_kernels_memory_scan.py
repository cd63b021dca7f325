"""The memory scan's kernels, forward and backward, against the reference in float64."""

import pytest
import scan_problems
import torch
from scan_problems import each, leaves

from m3er_fast import MemoryFusionNetwork, reference
from m3er_fast.functional import BackendUnavailableError, memory_scan

pytest.importorskip("triton")

# Hidden, memory, attention, candidate and gates.
SMALL = (16, 32, 16, 24, 16)
PAPER = (32, 128, 128, 64, 64)


def problem(device, dims=(3, 5, 2), batch=5, steps=4, *, sizes=SMALL, dtype=torch.float32, feedback=True):
    """Features and weights as ``dtype`` holds them; lengths from -1 to one above T."""
    features, weights = scan_problems.problem(
        dims, batch, steps, sizes=sizes, dtype=dtype, device=device, feedback=feedback, unit_gain=True
    )
    return features, torch.arange(batch, device=device) * 3 % (steps + 3) - 1, weights


def exact(x):
    return x.detach().cpu().double().requires_grad_()


def assert_equals_reference(features, lengths, weights, *, forward=1e-5, gradient=1e-4, scan=reference.memory_scan):
    """Results with and without a graph, and every gradient; ``gradient`` relative to the largest of a tensor."""
    results = memory_scan(features, lengths, weights, backend="triton")
    with torch.no_grad():
        again = memory_scan(features, lengths, weights, backend="triton")
    right = [exact(x) for x in features], each(exact, weights)
    wanted = scan(right[0], lengths.cpu(), right[1])
    for got, same, want in zip(results, again, wanted, strict=True):
        assert got.dtype == features[0].dtype
        assert torch.equal(got, same)
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=forward)
    incoming = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(features[0].dtype) for x in wanted]
    found = torch.autograd.grad(results, leaves(features, weights), [x.to(lengths.device) for x in incoming])
    gradients = torch.autograd.grad(wanted, leaves(*right), [x.double() for x in incoming])
    for got, want in zip(found, gradients, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=gradient * want.abs().max().item() + 1e-12)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("dims", [(3,), (2, 3), (3, 5, 2), (4, 1, 3, 2), (2, 3, 1, 4, 2)])
def test_equals_the_reference(device, dims, feedback):
    assert_equals_reference(*problem(device, dims, feedback=feedback))


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 5), (17, 3), (33, 1)])
def test_odd_sizes(device, batch, steps):
    assert_equals_reference(*problem(device, (3, 2), batch, steps))


@pytest.mark.parametrize("sizes", [PAPER, (48, 16, 80, 7, 96), (64, 96, 32, 16, 160)])
def test_sizes_of_the_layers(device, sizes):
    assert_equals_reference(*problem(device, (30, 7, 11), 3, 3, sizes=sizes))


def test_the_tile_for_many_samples(device, monkeypatch):
    from m3er_fast.kernels import memory_scan as kernels

    monkeypatch.setattr(kernels, "MOST_FOR_LATENCY", 0)
    assert_equals_reference(*problem(device, (3, 2), 35, 3, sizes=(32, 64, 64, 16, 32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device, dtype):
    assert_equals_reference(*problem(device, dtype=dtype, sizes=PAPER, steps=3), forward=2e-2, gradient=2e-2)


def test_memory_orders(device):
    features, lengths, weights = problem(device)
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in features]
    alike = [x.detach()[:1].expand(5, -1, -1).requires_grad_() for x in features]
    wide = [torch.cat([x.detach(), x.detach()], 2)[:, :, ::2].requires_grad_() for x in features]
    transposed = each(lambda x: x.detach().mT.contiguous().mT.requires_grad_() if x.ndim > 1 else x, weights)
    for x in (turned, alike, wide):
        assert not all(one.is_contiguous() for one in x)
        assert_equals_reference(x, lengths, transposed)


def test_the_values_of_padding_never_matter(device):
    features, lengths, weights = problem(device)
    padding = (torch.arange(4, device=device) >= lengths[:, None])[:, :, None]
    wanted = memory_scan(features, lengths, weights, backend="triton")
    held = [x.detach().masked_fill(padding, float("nan")).requires_grad_() for x in features]
    got = memory_scan(held, lengths, weights, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    gradients = [torch.autograd.grad(sum(x.sum() for x in y), leaves(x, weights)) for x, y in
                 ((held, got), (features, wanted))]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("batch", "steps"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_scan(device, batch, steps):
    features, lengths, weights = problem(device, batch=batch, steps=steps)
    results = memory_scan(features, lengths, weights, backend="triton")
    assert [x.shape for x in results] == [(3, batch, 16), (batch, 32)]
    gradients = torch.autograd.grad(sum(x.sum() for x in results), leaves(features, weights))
    assert not any(x.any() for x in (*results, *gradients))


def test_gradients_where_they_are_wanted_and_twice(device):
    features, lengths, weights = problem(device)
    fixed = [features[0].detach(), features[1], features[2].detach()]
    total = memory_scan(fixed, lengths, weights, backend="triton")[1].sum()
    first = torch.autograd.grad(total, [features[1], weights.bias], retain_graph=True)
    second = torch.autograd.grad(total, [features[1], weights.bias])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    total = memory_scan(features, lengths, weights, backend="triton")[1].sum()
    whole = torch.autograd.grad(total, [features[1], weights.bias])
    assert all(torch.equal(a, b) for a, b in zip(first, whole, strict=True))


# --- dropout ----------------------------------------------------------------------------------------------------------


def masks(device, seed, frames, widths, dropout):
    """The kernels' factors, unit by unit, for the inner layers of attention, û and both γ."""
    from m3er_fast.kernels import memory_scan as kernels

    results = []
    for layer, width in enumerate(widths):
        ones = torch.ones(frames, width, device=device)
        kernels.relu_dropout_(ones, seed, dropout, layer)
        results.append(ones.cpu().double())
    return results


def scan_with_masks(features, lengths, weights, attention, candidate, gates):
    """The reference with these masks in place of its own; frames are ordered by step."""
    steps, batch = features[0].shape[1], features[0].shape[0]
    size = gates.shape[1] // 2
    order = []
    for t in range(steps):
        rows = slice(t * batch, (t + 1) * batch)
        order += [attention[rows], candidate[rows], gates[rows, :size], gates[rows, size:]]
    drawn = iter(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: x * next(drawn))
        return reference.memory_scan(features, lengths, weights, dropout=0.5)


def test_dropout_is_the_same_in_the_backward_pass(device, monkeypatch):
    features, lengths, weights = problem(device)
    seed = torch.tensor([123456789012345], device=device)
    drawn = masks(device, seed, 20, (16, 24, 32), 0.4)
    for mask in drawn:
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: seed)
    results = memory_scan(features, lengths, weights, dropout=0.4, backend="triton")
    right = [exact(x) for x in features], each(exact, weights)
    wanted = scan_with_masks(right[0], lengths.cpu(), right[1], *drawn)
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-5)
    found = torch.autograd.grad(sum(x.sum() for x in results), leaves(features, weights))
    gradients = torch.autograd.grad(sum(x.sum() for x in wanted), leaves(*right))
    for got, want in zip(found, gradients, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-4 * want.abs().max().item())


def test_dropout_drops_its_share_and_follows_torchs_seed(device):
    seed = torch.tensor([7], device=device)
    for mask in masks(device, seed, 128, (64, 64, 64), 0.3):
        share = (mask == 0).double().mean().item()
        assert abs(share - 0.3) < 0.02  # four standard deviations
    features, lengths, weights = problem(device)
    runs = []
    for number in (1, 1, 2):
        torch.manual_seed(number)
        runs.append(memory_scan(features, lengths, weights, dropout=0.5, backend="triton")[1])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [False, True])
def test_opcheck(device, feedback):
    from m3er_fast.kernels import memory_scan as kernels

    features, _, weights = problem(device, (3, 2), 3, 2, feedback=feedback)
    lengths = torch.full((3,), 2, device=device)  # the activations of frames that are not valid may be anything
    arguments = [list(x) if isinstance(x, tuple) else x for x in weights]
    torch.library.opcheck(kernels.memory_scan_op, (features, lengths, *arguments, 0.0, None, True))
    seed = torch.tensor([5], device=device)
    torch.library.opcheck(kernels.memory_scan_op, (features, lengths, *arguments, 0.25, seed, True))


def test_compiles_in_one_graph(device):
    features, lengths, weights = problem(device, (3, 2), 3, 2)

    def step(first, second):
        hidden, memory = memory_scan([first.sin(), second], lengths, weights, backend="triton")
        return hidden.square().sum() + memory.sum()

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    arguments = leaves(features, weights)
    for got, want in zip(
        torch.autograd.grad(compiled(*features), arguments),
        torch.autograd.grad(step(*features), arguments),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_the_references(device):
    features, lengths, weights = problem(device, (3, 2), 3, 2)
    arguments = leaves(features, weights)
    second = []
    for backend in ("triton", "torch"):
        hidden, memory = memory_scan(features, lengths, weights, backend=backend)
        first = torch.autograd.grad(hidden.square().sum() + memory.sum(), arguments, create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in first), arguments))
    for got, want in zip(*second, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    total = memory_scan(features, lengths, weights, dropout=0.5, backend="triton")[1].sum()
    with pytest.raises(RuntimeError, match="no second derivative with dropout: use backend 'torch'"):
        torch.autograd.grad(total, arguments, create_graph=True, allow_unused=True)


def test_autocast_leaves_the_precision_alone(device):
    features, lengths, weights = problem(device)
    wanted = memory_scan(features, lengths, weights, backend="triton")
    with torch.autocast(device.type, torch.bfloat16):
        got = memory_scan(features, lengths, weights, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_refusal_names_its_reason_and_auto_computes_all_the_same(device):
    features, lengths, weights = problem(device, (3, 2), 3, 2)
    odd = problem(device, (3, 2), 3, 2, sizes=(3, 32, 16, 24, 16))
    narrow = weights._replace(update=problem(device, (3, 2), 3, 2, sizes=(16, 32, 16, 24, 32))[2].update)
    mixed = [features[0].double(), features[1]]
    double = [exact(x).to(device) for x in features], lengths, each(lambda x: x.detach().double(), weights)
    for arguments, message in (
        (odd, "multiples of 16, got 3 for hidden"),
        ((features, lengths, narrow), "γ of one size, got 16 and 32"),
        ((mixed, lengths, weights), "of one type, got torch.float32, torch.float64"),
        (double, "float16, bfloat16 and float32, got torch.float64"),
    ):
        with pytest.raises(
            BackendUnavailableError, match=f"memory_scan: backend 'triton' does not work here.*{message}"
        ):
            memory_scan(*arguments, backend="triton")
    for arguments in (odd, (features, lengths, narrow), double):
        for got, want in zip(memory_scan(*arguments), reference.memory_scan(*arguments), strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(BackendUnavailableError, match=r"knows no transforms of torch\.func"):
        torch.func.grad(lambda x: memory_scan([x, features[1]], lengths, weights, backend="triton")[1].sum())(
            features[0]
        )


def test_auto_takes_it_on_a_gpu(device, monkeypatch):
    if device.type == "cuda":
        monkeypatch.setattr(reference, "memory_scan", None)
    network = MemoryFusionNetwork({"a": 5, "b": 3}, 2, dropout=0.1).to(device)
    features = {name: torch.randn(3, 9, d, device=device) for name, d in (("a", 5), ("b", 3))}
    network(features).logits.sum().backward()
    assert all(x.grad.isfinite().all() for x in network.scan_weights().input)


@pytest.mark.parametrize("recompute", [2, 5])
def test_activations_can_be_computed_again(device, recompute):
    def scan(*given):
        return memory_scan(*given, backend="triton", recompute=recompute)

    features, lengths, weights = problem(device)
    hidden, memory = scan(features, lengths, weights)
    expected = memory_scan(features, lengths, weights, backend="torch")
    for got, want in zip((hidden, memory), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    arguments = leaves(features, weights)
    grads = torch.autograd.grad(hidden.square().sum() + memory.sum(), arguments)
    wanted = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), arguments)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
