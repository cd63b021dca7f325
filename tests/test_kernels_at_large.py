"""Kernels under conditions that only a GPU has: more than 2^31 elements, other streams, CUDA graphs, other devices.

The tests of large tensors also run with few samples, on any device.
"""

import pytest
import torch

from m3er_fast import M3ERConfig, M3ERFusion, MemoryFusionNetwork, reference
from m3er_fast.functional import CheckProjections, check_statistics, class_costs, fusion_loss, memory_scan

pytest.importorskip("triton")

TWO_GIGA = 2**31
LARGE = (pytest.mark.gpu, pytest.mark.large)


def random_logits(device, *shape, dtype=torch.bfloat16):
    """Random values drawn in place, without a second tensor of this size."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=torch.Generator(device).manual_seed(0))


def at_the_ends(batch):
    """Samples at the start, in the middle and at the end."""
    return sorted({b for start in (0, batch // 2, batch - 3) for b in range(max(start, 0), start + 3) if b < batch})


def assert_ends_equal_reference(logits, **options):
    """Loss and gradient of some samples, which do not depend on the others."""
    batch, classes = logits.shape[1:]
    samples = at_the_ends(batch)
    target = torch.arange(batch, device=logits.device) % classes
    logits.requires_grad_()
    loss = fusion_loss(logits, target, reduction="none", backend="triton", **options)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    chosen = logits.detach()[:, samples].double().cpu().requires_grad_()
    wanted = reference.fusion_loss(chosen, target[samples].cpu(), reduction="none", **options)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), chosen)
    torch.testing.assert_close(loss[samples].detach().cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[:, samples].cpu().double(), wanted_gradient, rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("modalities", "batch", "classes"),
    [
        (3, 260, 6),
        (2, 9, 300),
        pytest.param(3, TWO_GIGA // 18 + 1000, 6, marks=LARGE),
        pytest.param(2, TWO_GIGA // 2**18 + 40, 2**17, marks=LARGE),
    ],
)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_losses_of_any_number_of_elements(device, modalities, batch, classes, activation):
    logits = random_logits(device, modalities, batch, classes)
    assert_ends_equal_reference(logits, activation=activation)


@pytest.mark.parametrize("batch", [260, pytest.param(TWO_GIGA // 6 + 1000, marks=LARGE)])
def test_costs_of_any_number_of_elements(device, batch):
    logits = random_logits(device, 2, batch, 6)
    samples = at_the_ends(batch)
    got = class_costs(logits, backend="triton")[samples].cpu().double()
    wanted = reference.class_costs(logits[:, samples].double().cpu())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [260, pytest.param(TWO_GIGA // 6 + 1000, marks=LARGE)])
def test_strides_that_pass_two_giga(device, batch):
    """Logits (M, B, C) that lie in memory as (M, C, B)."""
    logits = random_logits(device, 2, 6, batch).transpose(1, 2)
    assert_ends_equal_reference(logits)


@pytest.mark.parametrize("batch", [130, pytest.param(TWO_GIGA // 300 + 1000, marks=LARGE)])
def test_statistics_of_any_number_of_elements(device, batch):
    features = [random_logits(device, batch, d) for d in (300, 3)]
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device)

    projections = CheckProjections(
        [matrix(300), matrix(3)], [matrix(4, 300)], [matrix(4)], [matrix(4, 3)], [matrix(4)], [matrix(20, 300)] * 1
        + [matrix(3, 3)],
        [matrix(4).abs()], [torch.tensor([0.9, 0.6, 0.3, 0.0], device=device)],
    )  # fmt: skip
    samples = at_the_ends(batch)
    got = check_statistics(features, projections, backend="triton")
    exact = CheckProjections(*([x.double().cpu() for x in value] for value in projections[:-1]))
    wanted = reference.check_statistics([x[samples].double().cpu() for x in features], exact)
    for one, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(one[samples].cpu().double(), right, rtol=1e-5, atol=1e-5)


# --- streams, graphs, devices -----------------------------------------------------------------------------------------


def small_problem(device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20_000, 6, generator=generator).to(device).requires_grad_()
    return logits, torch.arange(20_000, device=device) % 6


def step(logits, target):
    return torch.autograd.grad(fusion_loss(logits, target, backend="triton"), logits)[0]


@pytest.mark.gpu
def test_kernels_run_on_the_current_stream(device):
    """On a stream that is busy first, results are right only if the kernels wait in that stream."""
    logits, target = small_problem(device)
    wanted = step(logits, target)
    late = torch.zeros_like(logits, requires_grad=True)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            late.copy_(logits)
        got = step(late, target)
    torch.cuda.current_stream(device).wait_stream(stream)
    assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_a_training_step_in_a_cuda_graph(device):
    logits, target = small_problem(device)
    static = logits.detach().clone().requires_grad_()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step(static, target)  # compiled before capture
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step(static, target)
    for sign in (1.0, -1.0):
        with torch.no_grad():
            static.copy_(sign * logits)
        graph.replay()
        assert torch.equal(gradient, step(static.detach().clone().requires_grad_(), target))


@pytest.mark.gpu
def test_the_check_in_a_cuda_graph(device):
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape):
        return torch.randn(shape, generator=generator).to(device)

    features = [matrix(500, 40), matrix(500, 21)]
    projections = CheckProjections(
        [matrix(40), matrix(21)], [matrix(5, 40)], [matrix(5)], [matrix(5, 21)], [matrix(5)],
        [matrix(40, 40), matrix(21, 21)],
    )  # fmt: skip
    wanted = check_statistics(features, projections, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = check_statistics(features, projections, backend="triton")
    for value in got:
        value.fill_(torch.nan)
    graph.replay()
    for one, right in zip(got, wanted, strict=True):
        assert torch.equal(one, right)


@pytest.mark.gpu
def test_a_training_step_of_the_scan_in_a_cuda_graph(device):
    network = MemoryFusionNetwork({"a": 30, "b": 7}, 2, dropout=0.0).to(device)
    weights = network.scan_weights()
    features = [torch.randn(40, 12, d, device=device) for d in (30, 7)]
    lengths = torch.arange(40, device=device) % 14
    parameters = [*weights.input, weights.recurrent]

    def train():
        hidden, memory = memory_scan(features, lengths, weights, backend="triton")
        return torch.autograd.grad(hidden.square().sum() + memory.sum(), parameters, retain_graph=True)

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        train()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = train()
    for sign in (1.0, -1.0):
        for x in features:
            x.mul_(sign)
        graph.replay()
        for one, right in zip(got, train(), strict=True):
            torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [35, pytest.param(2**19, marks=LARGE)])
def test_a_scan_of_any_number_of_elements(device, batch):
    """At 2^19 samples with 12 steps the gates of four modalities are more than 2^31 numbers."""
    network = MemoryFusionNetwork(dict.fromkeys("abcd", 2), 2, hidden=32 if batch > 35 else 16, memory=16,
                                  attention=(16, 16, 16)).to(device)  # fmt: skip
    steps = 12 if batch > 35 else 3
    features = [random_logits(device, batch, steps, 2, dtype=torch.float32) for _ in range(4)]
    lengths = torch.full((batch,), steps, device=device)
    weights = network.scan_weights()
    samples = at_the_ends(batch)
    with torch.no_grad():
        got = memory_scan(features, lengths, weights, backend="triton")
        wanted = reference.memory_scan([x[samples] for x in features], lengths[samples], weights)
    torch.testing.assert_close(got[0][:, samples], wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1][samples], wanted[1], rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_need_not_be_the_current_one():
    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
        logits, target = small_problem(device)
        with torch.cuda.device(1 - device.index):
            got = step(logits, target)
        assert got.device == device
        assert torch.equal(got, step(logits, target))


@pytest.mark.gpu
def test_by_default_the_device_is_not_waited_for(device, monkeypatch):
    logits, target = small_problem(device)
    step(logits, target)
    monkeypatch.delenv("M3ER_DEBUG", raising=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setenv("M3ER_DEBUG", "1")
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.5"):
        fusion_loss(logits, target + 1)


@pytest.mark.gpu
def test_a_whole_model_trains_on_the_gpu_as_on_the_cpu(device):
    """With every default: "auto" chooses kernels on the GPU, and the reference or fast paths on the CPU."""
    losses = []
    for where in (device, torch.device("cpu")):
        generator = torch.Generator().manual_seed(0)
        features = {name: torch.randn(64, 5, d, generator=generator).to(where) for name, d in (("a", 6), ("b", 4))}
        target = (features["a"].mean(dim=(1, 2)) > 0).long()
        torch.manual_seed(0)
        model = M3ERFusion({"a": 6, "b": 4}, 2, M3ERConfig())
        model.fit({name: x.cpu() for name, x in features.items()})
        model.to(where).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        curve = []
        for _ in range(20):
            loss = model.loss(model(features), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        effective = model.eval()(features).effective.cpu()
        losses.append((curve, effective))
    (on_gpu, gpu_mask), (on_cpu, cpu_mask) = losses
    assert max(abs(a - b) for a, b in zip(on_gpu, on_cpu, strict=True)) < 1e-3
    assert torch.equal(gpu_mask, cpu_mask)
