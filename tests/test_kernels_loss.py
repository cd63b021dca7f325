"""The fast paths of the fusion loss, on the GPU and on the CPU, against the reference in float64 under autograd."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from loss_problems import problem

from m3er_fast import M3ERConfig, M3ERFusion, MultiplicativeFusionLoss, reference
from m3er_fast.functional import BackendUnavailableError, class_costs, fusion_loss
from m3er_fast.operands import LossFactors, LossOptions

pytest.importorskip("triton")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

VARIANTS = ("original", "m3er", "m3er_cross")
# Relative to the largest value; half precision rounds the gradient once.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["triton", "auto"])
def backend(request):
    """The kernel, and on the CPU also the path that "auto" takes there."""
    return request.param


def on(device, value, dtype=torch.float32):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def assert_equals_reference(device, logits, target, dtype=torch.float32, backend="triton", incoming=None, **options):
    """Loss and gradient of the fast path beside those of float64, for logits as ``dtype`` holds them."""
    x = logits.to(device, dtype).requires_grad_()
    exact = x.detach().double().cpu().requires_grad_()
    wanted = reference.fusion_loss(exact, target, **options)
    moved = {name: on(device, value) for name, value in options.items()}
    got = fusion_loss(x, on(device, target), backend=backend, **moved)
    assert got.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    incoming = torch.rand(wanted.shape, generator=generator).double() + 0.5 if incoming is None else incoming
    (gradient,) = torch.autograd.grad(got, x, incoming.to(device, torch.float32))
    (exact_gradient,) = torch.autograd.grad(wanted, exact, incoming)
    assert gradient.dtype == dtype
    largest = max(wanted.detach().abs().max().item() if wanted.numel() else 0.0, 1e-6)
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=3e-6, atol=3e-6 * largest)
    largest = max(exact_gradient.abs().max().item() if gradient.numel() else 0.0, 1e-12)
    torch.testing.assert_close(
        gradient.cpu().double(), exact_gradient, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * largest
    )


@pytest.mark.parametrize(
    "kind",
    [("softmax", "hard"), ("softmax", "soft"), ("sigmoid", "hard"), ("sigmoid", "soft"), ("sigmoid", "answer")],
)
@hypothesis.settings(max_examples=16, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    modalities=st.integers(1, 8),
    batch=st.sampled_from([0, 1, 5, 130]),
    classes=st.sampled_from([1, 2, 3, 6, 7, 16, 17, 50]),
    dtype=st.sampled_from(list(TOLERANCE)),
    weighted=st.booleans(),
    masked=st.booleans(),
    launches=st.sampled_from(["one program", "own weights", "weights first"]),
    options=st.fixed_dictionaries(
        {
            "variant": st.sampled_from(VARIANTS),
            "beta": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
            "detach_weight": st.booleans(),
            "margin": st.sampled_from([None, None, 0.3]),
            "reduction": st.sampled_from(["none", "mean", "sum"]),
        }
    ),
)
def test_every_option_and_shape(
    device, seed, modalities, batch, classes, kind, dtype, weighted, masked, launches, options
):
    from m3er_fast.kernels import loss as kernels

    logits, target, factors = problem(
        seed, modalities, batch, classes, *kind, weighted=weighted, masked=masked, scale=3.0
    )
    options |= {"activation": kind[0], **factors}
    with pytest.MonkeyPatch.context() as patch:
        if launches != "one program":
            patch.setattr(kernels, "SOLO_SAMPLES", 0)
        if launches == "weights first":
            patch.setattr(kernels, "OWN_LABEL_READS", 0)
        for backend in ("triton", "auto"):
            assert_equals_reference(device, logits, target, dtype, backend, **options)


@pytest.mark.parametrize("batch", [2048, 2051])  # blocks of 1024 labels, of 128 in a launch of their own
@pytest.mark.parametrize("weights_first", [False, True])
def test_every_label_counts_in_a_mean(device, monkeypatch, batch, weights_first):
    from m3er_fast.kernels import loss as kernels

    if weights_first:
        monkeypatch.setattr(kernels, "OWN_LABEL_READS", 0)
    logits, target, options = problem(4, 2, batch, 3, "softmax", "hard", weighted=True, masked=False)
    assert_equals_reference(device, logits, target, **options)


@pytest.mark.parametrize("target_kind", ["hard", "soft"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_of_many_classes(device, variant, target_kind):
    logits, target, options = problem(1, 2, 3, 5000, "softmax", target_kind, weighted=True, masked=True)
    assert_equals_reference(device, logits, target, variant=variant, detach_weight=False, **options)


def test_memory_orders_need_no_copy(device, backend):
    logits, target, options = problem(2, 3, 40, 6, "softmax", "hard", weighted=False, masked=True)
    for order in itertools.permutations(range(3)):
        back = [order.index(d) for d in range(3)]
        strided = logits.permute(order).contiguous().permute(back)
        assert_equals_reference(device, strided, target, backend=backend, **options)
    wide = torch.zeros(3, 40, 12, dtype=torch.float64)
    wide[:, :, ::2] = logits
    assert_equals_reference(device, wide[:, :, ::2], target, backend=backend, **options)
    same = logits[:1].expand(3, -1, -1)
    for activation in ("softmax", "sigmoid"):
        assert_equals_reference(device, same, target, backend=backend, activation=activation)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("magnitude", [90.0, 1e4, 3e38])
def test_finite_and_equal_at_extreme_logits(device, backend, variant, activation, magnitude):
    signs = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=6)))
    logits = (signs * magnitude).reshape(-1, 2, 3).transpose(0, 1)
    target = torch.arange(logits.shape[1]) % 3
    for detach_weight, margin in itertools.product([True, False], [None, 0.1]):
        options = {"variant": variant, "activation": activation, "detach_weight": detach_weight, "margin": margin}
        x, exact = (logits.to(where).requires_grad_() for where in (device, "cpu"))
        got = fusion_loss(x, target.to(device), backend=backend, reduction="none", **options)
        wanted = reference.fusion_loss(exact, target, reduction="none", **options)
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-30)
        gradients = [torch.autograd.grad(loss.sum(), y)[0].cpu() for loss, y in ((got, x), (wanted, exact))]
        assert torch.isfinite(gradients[0]).all()
        torch.testing.assert_close(*gradients, rtol=3e-5, atol=1e-30)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("off", [-1, 1])
def test_equal_costs_are_a_tie_within_the_hardwares_rounding(device, monkeypatch, off):
    """A sample whose cost equals that of another class is not ahead by any margin: its loss is not zero."""
    if device.type != "cpu":
        pytest.skip("only the interpreter's 2^x can be replaced")
    # Class 0 costs 1·BOUND, and class 1 half of 2·BOUND: the half is 2^x of a logarithm.
    logits = torch.tensor([[[-3e38, 0.0, 0.0]], [[3e38, -3e38, -3e38]]])
    target = torch.tensor([0])
    options = {"variant": "m3er_cross", "margin": 0.1, "reduction": "none"}
    wanted = reference.fusion_loss(logits, target, **options)
    assert wanted > 1e37
    exact = np.exp2

    def off_by_its_bound(x):
        power = exact(x)
        return np.where(power == 1, power, power * np.float32(1 + off * 2.0**-22.5))

    monkeypatch.setattr(np, "exp2", off_by_its_bound)
    torch.testing.assert_close(fusion_loss(logits, target, backend="triton", **options), wanted, rtol=1e-5, atol=0)


def test_nan_stays_with_its_sample(device, backend):
    for activation, target_kind in (("softmax", "hard"), ("softmax", "soft"), ("sigmoid", "soft")):
        logits, target, _ = problem(3, 3, 6, 20, activation, target_kind, weighted=False, masked=False)
        target = target.abs() if target_kind == "soft" else target.clamp(min=0)
        clean = fusion_loss(
            on(device, logits), on(device, target), backend=backend, activation=activation, reduction="none"
        )
        logits[1, 2] = torch.nan
        got = fusion_loss(
            on(device, logits), on(device, target), backend=backend, activation=activation, reduction="none"
        )
        assert got[2].isnan().all()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("place", [0, 3, 6, 599])
def test_one_nan_is_enough(device, place):
    """In any block of classes, and whether or not the target has a share of its class."""
    logits, target, _ = problem(15, 2, 3, 600, "softmax", "soft", weighted=False, masked=False)
    target[:, place] = 0.0
    logits[1, 2, place] = torch.nan
    x = on(device, logits)
    for loss in (
        fusion_loss(x, on(device, target), backend="triton", reduction="none"),
        fusion_loss(x, torch.full((3,), 7, device=device), margin=1e3, backend="triton", reduction="none"),
        fusion_loss(x, torch.full((3,), 7, device=device), backend="triton", reduction="none"),
        class_costs(x, backend="triton").sum(dim=1),
    ):
        assert loss[:2].isfinite().all()
        assert loss[2].isnan()


def test_the_logits_of_an_ignored_sample_change_nothing(device, backend):
    logits, _, _ = problem(16, 3, 5, 6, "softmax", "hard", weighted=False, masked=False)
    target = torch.tensor([1, 2, -100, 3, -100], device=device)
    logits[:, 2], logits[0, 4, 1] = torch.nan, torch.inf
    for activation, margin in itertools.product(("softmax", "sigmoid"), (None, 0.1)):
        x = on(device, logits).requires_grad_()
        loss = fusion_loss(x, target, activation=activation, margin=margin, backend=backend)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert not gradient[:, [2, 4]].any()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_infinite_logits_are_held_at_the_bound(device, backend, dtype):
    logits, _, _ = problem(17, 2, 6, 5, "softmax", "hard", weighted=False, masked=False)
    logits[0, 1, 2], logits[0, 2, 1], logits[1, 3, 4] = torch.inf, -torch.inf, -torch.inf
    target = torch.tensor([0, 1, 1, 4, 2, 3])
    for activation, reduction in itertools.product(("softmax", "sigmoid"), ("none", "mean")):
        x, exact = (logits.to(where, dtype).requires_grad_() for where in (device, "cpu"))
        options = {"activation": activation, "reduction": reduction}
        got = fusion_loss(x, target.to(device), backend=backend, **options)
        wanted = reference.fusion_loss(exact, target, **options)
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(loss.sum(), y)[0].cpu() for loss, y in ((got, x), (wanted, exact))]
        torch.testing.assert_close(*gradients, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_logits_of_an_unavailable_modality_change_nothing(device, backend):
    for activation, target_kind in (("softmax", "hard"), ("softmax", "soft"), ("sigmoid", "soft")):
        logits, target, options = problem(4, 3, 9, 6, activation, target_kind, weighted=False, masked=True)
        options["activation"] = activation
        results = []
        for held in (0.0, torch.nan, torch.inf, 3e38):
            x = on(device, logits.masked_fill(~options["available"].T[:, :, None], held)).requires_grad_()
            moved = {name: on(device, value) for name, value in options.items()}
            loss = fusion_loss(x, on(device, target), backend=backend, **moved)
            results.append((loss, torch.autograd.grad(loss, x)[0]))
        for loss, gradient in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(gradient, results[0][1])


@pytest.mark.usefixtures("poisoned_outputs")
def test_every_element_of_the_outputs_is_written(device):
    for kind, classes in (("hard", 6), ("hard", 40), ("soft", 6)):
        for activation in ("softmax", "sigmoid"):
            logits, target, options = problem(5, 3, 131, classes, activation, kind, weighted=True, masked=True)
            for reduction in ("none", "mean"):
                assert_equals_reference(device, logits, target, activation=activation, reduction=reduction, **options)
    assert class_costs(on(device, logits), backend="triton").isfinite().all()


def test_class_costs_and_their_gradient(device):
    for seed, (modalities, batch, classes) in enumerate([(3, 20, 6), (1, 4, 1), (8, 5, 40), (2, 0, 5), (2, 3, 700)]):
        logits, _, options = problem(seed, modalities, batch, classes, "softmax", "hard", weighted=True, masked=True)
        options = {"modality_weight": options["modality_weight"], "available": options["available"], "beta": 1.4}
        x = on(device, logits).requires_grad_()
        exact = x.detach().double().cpu().requires_grad_()
        got = class_costs(x, backend="triton", **{name: on(device, value) for name, value in options.items()})
        wanted = reference.class_costs(exact, **options)
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=3e-6, atol=1e-6)
        direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed)).double()
        (gradient,) = torch.autograd.grad(got, x, direction.to(device, torch.float32))
        (exact_gradient,) = torch.autograd.grad(wanted, exact, direction)
        torch.testing.assert_close(gradient.cpu().double(), exact_gradient, rtol=3e-6, atol=3e-6)


def test_backward_twice_and_what_it_returned_before(device, backend):
    logits, target, _ = problem(6, 3, 9, 6, "softmax", "hard", weighted=False, masked=False)
    x = on(device, logits).requires_grad_()
    loss = fusion_loss(x, on(device, target), backend=backend)
    (first,) = torch.autograd.grad(loss, x, torch.tensor(3.0, device=device), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x, torch.tensor(5.0, device=device))
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, kept * (5 / 3))
    once = fusion_loss(x, on(device, target), backend=backend)
    (last,) = torch.autograd.grad(once, x, torch.tensor(3.0, device=device))
    torch.testing.assert_close(last, kept, rtol=1e-6, atol=0)


def test_second_derivative(device, backend):
    """A penalty on the gradient: the gradient itself is differentiated."""
    logits, target, options = problem(13, 3, 9, 6, "softmax", "hard", weighted=True, masked=True)
    found = []
    for x, where, chosen in ((on(device, logits), device, backend), (logits.clone(), "cpu", "torch")):
        x.requires_grad_()
        moved = {name: on(where, value, x.dtype) for name, value in options.items()}
        loss = fusion_loss(x, target.to(where), backend=chosen, detach_weight=False, **moved)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), x)[0].cpu().double())
    assert found[1].abs().max() > 1e-4
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_no_gradient_is_made_for_logits_that_want_none(device, backend):
    logits, target, _ = problem(6, 3, 9, 6, "softmax", "hard", weighted=False, masked=False)
    loss = fusion_loss(on(device, logits), on(device, target), backend=backend)
    assert not loss.requires_grad
    with torch.no_grad():
        quiet = fusion_loss(on(device, logits).requires_grad_(), on(device, target), backend=backend)
    assert not quiet.requires_grad
    assert torch.equal(loss, quiet)


def test_transforms_are_the_references(device):
    """Gradients and Hessians of samples one by one, by torch.func, and forward-mode derivatives."""
    logits, target, _ = problem(7, 3, 5, 4, "softmax", "hard", weighted=False, masked=False)
    x, y, exact = on(device, logits), on(device, target.clamp(min=0)), logits

    def loss(x, y, ignored=-100):
        return fusion_loss(x[:, None], y[None], detach_weight=False, ignore_index=ignored)

    one_by_one = torch.func.vmap(torch.func.grad(loss), in_dims=(1, 0), out_dims=1)(x, y)
    exact.requires_grad_()
    wanted = torch.autograd.grad(reference.fusion_loss(exact, y.cpu(), detach_weight=False, reduction="sum"), exact)[0]
    torch.testing.assert_close(one_by_one.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    hessian = torch.func.hessian(lambda x: loss(x, y[0]))(x[:, 0])
    assert hessian.shape == (3, 4, 3, 4)
    assert hessian.abs().max() > 1e-3
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    _, slope = torch.func.jvp(lambda x: fusion_loss(x, y, detach_weight=False, reduction="sum"), (x,), (direction,))
    torch.testing.assert_close(slope.cpu().double(), (wanted * direction.cpu()).sum(), rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendUnavailableError, match=r"backend 'triton' does not work here.*torch\.func"):
        torch.func.grad(lambda x: fusion_loss(x, y, backend="triton"))(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        moved = torch.autograd.forward_ad.unpack_dual(fusion_loss(dual, y, detach_weight=False, reduction="sum"))
        torch.testing.assert_close(moved.tangent, slope, rtol=1e-5, atol=1e-6)
        with pytest.raises(BackendUnavailableError, match="no forward-mode derivative"):
            fusion_loss(dual, y, backend="triton")


def test_batched_gradients(device, backend):
    logits, target, _ = problem(7, 3, 5, 4, "softmax", "hard", weighted=False, masked=False)
    x = on(device, logits).requires_grad_()
    loss = fusion_loss(x, on(device, target), backend=backend)
    factors = torch.tensor([1.0, -2.0], device=device)
    both = torch.autograd.grad(loss, x, factors, is_grads_batched=True, retain_graph=True)[0]
    (once,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(both, torch.stack([once, -2 * once]))


def test_gradients_of_weights_and_shares_are_the_references(device):
    logits, target, options = problem(14, 3, 9, 6, "softmax", "soft", weighted=True, masked=True)
    given = {"target": target, **{name: options[name] for name in ("class_weight", "modality_weight")}}
    found = []
    for where, chosen, dtype in ((device, "auto", torch.float32), ("cpu", "torch", torch.float64)):
        tensors = {name: value.to(where, dtype).requires_grad_() for name, value in given.items()}
        loss = fusion_loss(logits.to(where, dtype), available=options["available"].to(where), backend=chosen, **tensors)
        found.append([g.cpu().double() for g in torch.autograd.grad(loss, list(tensors.values()))])
    for got, wanted in zip(*found, strict=True):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(BackendUnavailableError, match="gradient of the logits only"):
        fusion_loss(on(device, logits), on(device, target).requires_grad_(), backend="triton")
    weight = torch.ones(3, device=device, requires_grad=True)
    assert torch.autograd.grad(class_costs(on(device, logits), modality_weight=weight).sum(), weight)[0].all()


def test_opcheck(device):
    from m3er_fast.kernels import loss as kernels

    for reduction, dtype in (("mean", torch.float32), ("none", torch.float16)):
        logits, target, given = problem(8, 3, 6, 5, "softmax", "hard", weighted=True, masked=True)
        x = logits.to(device, dtype).requires_grad_()
        factors = LossFactors(**{name: on(device, value) for name, value in given.items()})
        options = LossOptions(variant="original", detach_weight=False, reduction=reduction)
        torch.library.opcheck(kernels.fusion_loss_op, (x, on(device, target), *factors, *options, True))
        costs = (factors.modality_weight, factors.available, 1.0)
        torch.library.opcheck(kernels.class_costs_op, (x, *costs))
        incoming = torch.rand(6, 5, device=device)
        torch.library.opcheck(kernels.class_costs_backward_op, (incoming, x.detach(), *costs))


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_whole_models_compile_in_one_graph(device, backend):
    """With the kernel, and on the CPU with the reference that the compiler fuses itself."""
    logits, target, _ = problem(9, 3, 8, 6, "softmax", "hard", weighted=False, masked=False)
    target = on(device, target)
    layer = torch.nn.Linear(6, 6).to(device)
    loss = MultiplicativeFusionLoss(backend=backend, variant="original")

    def model(x):
        return loss(layer(x), target) + class_costs(layer(x), backend=backend).mean()

    x = on(device, logits)
    wanted = torch.autograd.grad(model(x), list(layer.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    got = torch.autograd.grad(compiled(x), list(layer.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_export(device):
    class Model(torch.nn.Module):
        def forward(self, x, target):
            return fusion_loss(x, target, backend="triton")

    logits, target, _ = problem(10, 3, 8, 6, "softmax", "hard", weighted=False, masked=False)
    inputs = (on(device, logits), on(device, target))
    program = torch.export.export(Model(), inputs)
    assert "m3er_fast.fusion_loss" in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(device, dtype):
    logits, target, _ = problem(11, 3, 8, 6, "softmax", "hard", weighted=False, masked=False)
    x, y = on(device, logits), on(device, target)
    plain = fusion_loss(x, y, backend="triton")
    with torch.autocast(device.type, dtype=dtype):
        assert torch.equal(fusion_loss(x, y, backend="triton"), plain)


def test_equal_inputs_give_equal_bits(device, backend):
    logits, target, _ = problem(12, 3, 300, 6, "softmax", "hard", weighted=False, masked=False)
    x, y = on(device, logits).requires_grad_(), on(device, target)
    runs = []
    for _ in range(2):
        loss = fusion_loss(x, y, backend=backend)
        runs.append((loss, *torch.autograd.grad(loss, x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_training_follows_the_same_curve(device):
    """A hundred steps of a whole model, with the plain loss and with the fused one."""
    curves = {}
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(24, 3, dim, generator=generator).to(device) for name, dim in (("a", 5), ("b", 4))}
    target = (features["a"].mean(dim=(1, 2)) > 0).long()
    for backend in ("torch", "auto", "triton"):
        torch.manual_seed(0)
        model = M3ERFusion({"a": 5, "b": 4}, 2, M3ERConfig(check=None)).to(device)
        loss_of = MultiplicativeFusionLoss(backend=backend)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        curve = []
        for _ in range(100):
            out = model(features)
            loss = loss_of(out.modality_logits, target) + torch.nn.functional.cross_entropy(out.logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves[backend] = curve
    assert curves["torch"][-1] < 0.5 * curves["torch"][0]
    for backend in ("auto", "triton"):
        assert max(abs(a - b) for a, b in zip(curves["torch"], curves[backend], strict=True)) < 1e-4


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.float64), r"fusion_loss: backend 'triton'.*float32, got torch.float64"),
        (torch.zeros(9, 3, 4), r"fusion_loss: backend 'triton'.*up to 8 modalities, got 9"),
    ],
)
def test_arguments_that_the_kernel_refuses(device, logits, message):
    target = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(BackendUnavailableError, match=message):
        fusion_loss(logits.to(device), target, backend="triton")
    assert fusion_loss(logits.to(device), target).isfinite()


def test_tensors_on_another_device_are_named():
    logits, target = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target is on meta, wanted cpu"):
        fusion_loss(logits, target.to("meta"))
    with pytest.raises(ValueError, match=r"class_weight is on meta, wanted cpu"):
        fusion_loss(logits, target, class_weight=torch.ones(4, device="meta"))


def test_labels_are_looked_at_where_asked_for(monkeypatch):
    """Reading labels from another device would wait for it: that is done with M3ER_DEBUG=1 only."""
    monkeypatch.delenv("M3ER_DEBUG", raising=False)
    logits, labels = torch.zeros(2, 3, 4), torch.tensor([0, 7, 1])

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda")

    assert fusion_loss(logits.to("meta"), labels.to("meta")).is_meta  # which has no values
    monkeypatch.setenv("M3ER_DEBUG", "1")
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.3 or -100, got values from 0 to 7"):
        fusion_loss(logits.as_subclass(Elsewhere), labels.as_subclass(Elsewhere))


def test_an_unseen_label_out_of_range_shows(device):
    from m3er_fast.kernels import loss as kernels

    factors = LossFactors(class_weight=torch.ones(4, device=device))
    logits, target = torch.zeros(2, 3, 4, device=device), torch.tensor([0, 7, -3], device=device)
    for activation in ("softmax", "sigmoid"):
        options = LossOptions(activation=activation, reduction="none")
        loss = kernels.fusion_loss(logits, target, factors, options)
        assert loss[0].isfinite().all()
        assert loss[1:].isnan().all()
    ahead = torch.tensor([90.0, 0.0, 0.0, 0.0], device=device).expand(2, 3, 4)
    for activation in ("softmax", "sigmoid"):  # a margin forgives no such label
        options = LossOptions(activation=activation, reduction="none", margin=0.0)
        loss, _ = kernels.loss_and_gradient(ahead, target, factors, options, with_gradient=False)
        assert loss[1:].isnan().all()


def test_without_the_interpreter_cpu_tensors_are_refused_and_triton_is_not_imported():
    code = (
        "import sys, torch, m3er_fast\n"
        "from m3er_fast.functional import BackendUnavailableError, fusion_loss\n"
        "x, y = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64)\n"
        "fusion_loss(x, y)\n"
        "assert 'triton' not in sys.modules and 'm3er_fast.kernels' not in sys.modules\n"
        "try:\n    fusion_loss(x, y, backend='triton')\n"
        "except BackendUnavailableError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=False
    )
    assert "fusion_loss: backend 'triton' does not work here: Triton kernels need CUDA tensors" in done.stdout, done
