"""The multiplicative fusion loss against its formula written naively from probabilities, torch's losses and mpmath."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_problems import problem

from m3er_fast import MultiplicativeFusionLoss, reference
from m3er_fast.cpu import loss as cpu_loss
from m3er_fast.functional import BackendUnavailableError, class_costs, fusion_loss

VARIANTS = ("original", "m3er", "m3er_cross")
ACTIVATIONS = ("softmax", "sigmoid")
TARGETS = ("hard", "soft")
REDUCTIONS = ("none", "mean", "sum")


# --- the formula, written naively -------------------------------------------------------------------------------------


def naive_costs(probabilities, factors, variant, beta, detach_weight):
    """-Σ_m v_m w_m log p_m over the modalities listed, from their probabilities."""
    gamma = beta / (len(probabilities) - 1) if len(probabilities) > 1 else 0.0
    cost = 0.0
    for m, p in enumerate(probabilities):
        others = [q for j, q in enumerate(probabilities) if j != m]
        if variant == "m3er":
            weight = p**gamma
        else:
            weight = math.prod([(1 - q if variant == "original" else q) ** gamma for q in others], start=p**0)
        if detach_weight:
            weight = weight.detach()
        cost = cost - factors[m] * weight * p.log()
    return cost


def naive_loss(
    logits,
    target,
    *,
    variant="m3er",
    beta=1.0,
    detach_weight=True,
    activation="softmax",
    class_weight=None,
    modality_weight=None,
    available=None,
    margin=None,
    ignore_index=-100,
    reduction="mean",
):
    """The loss one sample and one class at a time, in float64."""
    modalities, batch, classes = logits.shape
    class_weight = torch.ones(classes).double() if class_weight is None else class_weight
    factors = torch.ones(modalities).double() if modality_weight is None else modality_weight
    losses, divisor = [], 0.0
    for b in range(batch):
        chosen = [m for m in range(modalities) if available is None or available[b, m]]
        args = ([factors[m] for m in chosen], variant, beta, detach_weight)
        zero = 0.0 * logits[0, b].nan_to_num(0.0, 0.0, 0.0)
        if activation == "softmax":
            cost = zero + naive_costs([logits[m, b].softmax(0) for m in chosen], *args)
            if target.is_floating_point():
                share, divides = target[b], 1.0
            elif target[b] == ignore_index:
                share, divides = torch.zeros(classes).double(), 0.0
            else:
                share, divides = F.one_hot(target[b], classes).double(), float(class_weight[target[b]])
            y = int(share.argmax())
            own, *others = [cost[y].item()] + [cost[c].item() for c in range(classes) if c != y]
            learned = margin is not None and all(own + margin < other for other in others)
            losses.append(0.0 * zero.sum() if learned else (share * class_weight * cost).sum())
            divisor += divides
            continue
        yes = zero + naive_costs([logits[m, b].sigmoid() for m in chosen], *args)
        no = zero + naive_costs([1 - logits[m, b].sigmoid() for m in chosen], *args)
        row = []
        for c in range(classes):
            if target.ndim == 1:
                ignored, t = target[b] == ignore_index, float(target[b] == c)
            else:
                ignored, t = target[b, c] == ignore_index, float(target[b, c])
            right, wrong = (yes[c], no[c]) if t >= 0.5 else (no[c], yes[c])
            learned = margin is not None and right.item() + margin < wrong.item()
            loss = 0.0 * zero[c] if ignored or learned else class_weight[c] * (t * yes[c] + (1 - t) * no[c])
            row.append(loss)
            divisor += float(not ignored)
        losses.append(torch.stack(row))
    empty = logits[0, :, 0] if activation == "softmax" else logits[0]
    losses = torch.stack(losses) if losses else empty
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (divisor or 1.0)


def assert_equals_formula(logits, target, **options):
    ours, naive = (x.clone().requires_grad_() for x in (logits, logits))
    got, wanted = fusion_loss(ours, target, **options), naive_loss(naive, target, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    direction = torch.linspace(0.5, 1.5, got.numel(), dtype=torch.float64).reshape(got.shape)
    got_gradient, wanted_gradient = (
        torch.autograd.grad(loss, x, direction)[0] for loss, x in ((got, ours), (wanted, naive))
    )
    torch.testing.assert_close(got_gradient, wanted_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("detach_weight", [True, False])
@pytest.mark.parametrize("target_kind", TARGETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_the_formula(variant, activation, target_kind, detach_weight):
    logits, target, options = problem(0, 3, 7, 4, activation, target_kind)
    options |= {"variant": variant, "activation": activation, "detach_weight": detach_weight, "beta": 1.3}
    for reduction, margin in itertools.product(REDUCTIONS, (None, 0.0, 0.4)):
        assert_equals_formula(logits, target, reduction=reduction, margin=margin, **options)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    modalities=st.integers(1, 8),
    batch=st.sampled_from([0, 1, 3, 5]),
    classes=st.one_of(st.integers(1, 6), st.sampled_from([17, 50])),
    activation=st.sampled_from(ACTIVATIONS),
    target_kind=st.sampled_from(TARGETS),
    weighted=st.booleans(),
    masked=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "variant": st.sampled_from(VARIANTS),
            "beta": st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
            "detach_weight": st.booleans(),
            "margin": st.sampled_from([None, 0.0, 0.7]),
            "reduction": st.sampled_from(REDUCTIONS),
        }
    ),
)
def test_every_shape_and_option_equals_the_formula(
    seed, modalities, batch, classes, activation, target_kind, weighted, masked, options
):
    logits, target, weights = problem(
        seed, modalities, batch, classes, activation, target_kind, weighted=weighted, masked=masked
    )
    if classes == 1 and activation == "softmax":  # log(1 - p) of the certain class: no formula to compare with
        loss = fusion_loss(logits, target, **weights, **options)
        assert torch.equal(loss, torch.zeros_like(loss))
        return
    assert_equals_formula(logits, target, activation=activation, **weights, **options)


def test_yes_no_answers_may_be_ignored_one_by_one():
    logits, _, options = problem(5, 3, 4, 3, "sigmoid", "soft")
    target = torch.tensor([[1, 0, 9], [9, 9, 9], [0, 0, 1], [1, 9, 0]])
    for reduction in REDUCTIONS:
        assert_equals_formula(
            logits, target, activation="sigmoid", ignore_index=9, reduction=reduction, margin=0.2, **options
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, activation):
    logits, target, options = problem(1, 3, 2, 4, activation, "soft", masked=False)
    options |= {"variant": variant, "activation": activation, "detach_weight": False, "beta": 1.7}
    assert torch.autograd.gradcheck(lambda x: fusion_loss(x, target, **options), logits.requires_grad_())


# --- numbers worked out by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        # p = 0.8 and 0.5: -log p = 0.2231435513 and 0.6931471806
        ("original", 0.5 * 0.2231435513 + 0.2 * 0.6931471806),
        ("m3er", 0.8 * 0.2231435513 + 0.5 * 0.6931471806),
        ("m3er_cross", 0.5 * 0.2231435513 + 0.8 * 0.6931471806),
    ],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_modalities_by_hand(variant, expected, activation):
    odds = torch.tensor([4.0, 1.0], dtype=torch.float64).log()  # p = 0.8 and 0.5
    logits = torch.stack([odds, torch.zeros(2)], dim=1)[:, None, :] if activation == "softmax" else odds[:, None, None]
    loss = fusion_loss(logits, torch.tensor([0]), variant=variant, activation=activation)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


def test_margin_stops_a_learned_sample_only():
    # One modality: costs are -log p. The gap of the first sample is log(0.8 / 0.2) = 1.386..., of the second 0,
    # which no margin lets go: a tie is not learned yet.
    logits = torch.tensor([[[4.0, 1.0], [1.0, 1.0]]]).log()
    target = torch.tensor([0, 0])
    for margin, kept in ((None, True), (0.0, False), (1.3, False), (1.4, True)):
        losses = fusion_loss(logits, target, margin=margin, reduction="none")
        expected = [0.2231435513 if kept else 0.0, 0.6931471806]
        np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-6)


# --- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [1e4, 3e38])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_finite_at_extreme_logits(variant, activation, magnitude):
    signs = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=6)))  # 729 samples of 2 modalities × 3 classes
    values = (signs * magnitude).reshape(-1, 2, 3).transpose(0, 1).repeat(4, 1, 1)  # 8 modalities
    for detach_weight, beta in itertools.product([True, False], [0.0, 0.5, 2.0]):
        logits = values.clone().requires_grad_()
        target = torch.arange(logits.shape[1]) % 3
        loss = fusion_loss(
            logits, target, variant=variant, activation=activation, detach_weight=detach_weight, beta=beta
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("beyond", [3e38, math.inf])
def test_a_logit_beyond_the_bound_counts_as_the_bound_and_has_no_gradient(beyond, backend):
    """The bound is a 32nd of float32's range. A NaN of another sample in the batch changes nothing."""
    bound = torch.finfo(torch.float32).max / 32
    logits = torch.tensor([[[beyond, 0.0], [math.nan, 0.0]], [[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    loss = fusion_loss(logits, torch.tensor([1, 1]), beta=0.0, reduction="none", backend=backend)
    assert loss[0].item() == pytest.approx(bound, rel=1e-6)
    assert loss[1].isnan()
    (gradient,) = torch.autograd.grad(loss[0], logits)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([[0.0, -1.0], [0.5, -0.5]]))


def exact_logs(logits, activation):
    """Log p and log(1 - p) of the first two classes to 60 digits, of the logits as float32 holds them."""
    with mpmath.workdps(60):
        x = [mpmath.mpf(float(value)) for value in logits]
        if activation == "sigmoid":
            pairs = [(1 / (1 + mpmath.exp(-v)), 1 / (1 + mpmath.exp(v))) for v in x]
        else:
            powers = [mpmath.exp(v - max(x)) for v in x]
            total = mpmath.fsum(powers)
            pairs = [(p / total, mpmath.fsum(powers[:i] + powers[i + 1 :]) / total) for i, p in enumerate(powers[:2])]
        return np.array([[float(mpmath.log(value)) for value in pair] for pair in pairs]).T


@pytest.mark.parametrize("x", [-300.0, -85.0, -16.5, -1.0, -1e-3, 0.0, 1e-6, 0.7, 3.0, 9.25, 16.5, 30.0, 85.0, 300.0])
@pytest.mark.parametrize("others", [1, 4, 49, 999])
def test_log_p_and_log_not_p_are_exact_in_float32(x, others):
    """As p → 0 and p → 1 alike, and with many classes, where even the likeliest is unlikely."""
    logits = torch.zeros(others + 1)
    logits[0] = x
    got = np.stack([log[0, 0, :2].double().numpy() for log in reference.log_probabilities(logits[None, None])])
    np.testing.assert_allclose(got, exact_logs(logits, "softmax"), rtol=1e-6, atol=1.2e-38)
    pair = logits[:2]
    got = np.stack(
        [log[0, 0].double().numpy() for log in reference.log_probabilities(pair[None, None], None, "sigmoid")]
    )
    np.testing.assert_allclose(got, exact_logs(pair, "sigmoid"), rtol=1e-6, atol=1.2e-38)


@pytest.mark.parametrize("x", [-80.0, -12.0, 0.5, 12.0, 30.0, 80.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_losses_are_exact_as_p_tends_to_0_and_1(variant, x):
    p, q = (mpmath.mpf(1) / (1 + mpmath.exp(-mpmath.mpf(v))) for v in (x, 0.5))
    np_, nq = (1 / (1 + mpmath.exp(mpmath.mpf(v))) for v in (x, 0.5))
    weights = {"original": (nq, np_), "m3er": (p, q), "m3er_cross": (q, p)}[variant]
    wanted = -weights[0] * mpmath.log(p) - weights[1] * mpmath.log(q)
    logits = torch.tensor([[[x, 0.0]], [[0.5, 0.0]]])
    got = fusion_loss(logits, torch.tensor([0]), variant=variant)
    # The weight is the exponential of a logarithm of up to 80, which float32 holds to 80·2^-24.
    assert got.item() == pytest.approx(float(wanted), rel=1e-6 + max(0, -x) * 2**-24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_equals_float32_of_the_rounded_logits(dtype, activation):
    logits, target, options = problem(2, 3, 5, 6, activation, "hard")
    half = logits.to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    losses = [fusion_loss(x, target, activation=activation, detach_weight=False, **options) for x in (half, single)]
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (half, single), strict=True)]
    assert torch.equal(gradients[0], gradients[1].to(dtype))


# --- the fast path beside the reference -------------------------------------------------------------------------------


def loss_and_gradients(compute, logits, target, **options):
    """The loss, and the first and second derivatives of the logits along fixed directions."""
    x = logits.detach().requires_grad_()  # strides and all
    loss = compute(x, target, **options)
    direction = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (first,) = torch.autograd.grad(loss, x, direction, create_graph=True)
    turn = torch.linspace(-1.0, 1.0, x.numel(), dtype=torch.float64).reshape(x.shape).to(x.dtype)
    (second,) = torch.autograd.grad((first * turn).sum(), x, allow_unused=True)
    (plain,) = torch.autograd.grad(compute(x, target, **options), x, direction)
    return loss, plain, first, second


@pytest.mark.parametrize("scale", [2.0, 25.0, 60.0, 300.0])
@pytest.mark.parametrize("detach_weight", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_on_the_cpu_equal_the_reference(variant, detach_weight, scale):
    """Near, beyond and far beyond logits whose exponentials are taken as they are; all that a batch may leave out."""
    for seed, (modalities, classes) in enumerate([(1, 3), (2, 2), (3, 4), (3, 6), (8, 3), (3, 40)]):
        for weighted, masked, ignoring in [(False, False, False), (True, False, True), (True, True, True)]:
            logits, target, factors = problem(
                seed, modalities, 9, classes, "softmax", "hard",
                weighted=weighted, masked=masked, ignoring=ignoring, scale=scale,
            )  # fmt: skip
            for dtype, reduction in itertools.product((torch.float32, torch.float64), REDUCTIONS):
                options = {"variant": variant, "detach_weight": detach_weight, "reduction": reduction, "beta": 1.3}
                x = logits.to(dtype)
                ours = loss_and_gradients(fusion_loss, x, target, **options, **factors)
                wanted = loss_and_gradients(reference.fusion_loss, x, target, **options, **factors)
                # The exponential of a logarithm of some hundreds has lost as many units in the last place.
                # autograd takes 1 - p of the reference as a difference.
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(ours, wanted, rtol=eps * (50 + 4 * scale), atol=eps * 40)


ODD_LOGITS = {
    "NaN": lambda x: x.index_fill(1, torch.tensor([2]), math.nan),
    "inf": lambda x: x.index_fill(2, torch.tensor([1]), math.inf),
    "-inf": lambda x: x.index_fill(2, torch.tensor([1]), -math.inf),
    "1e30": lambda x: x * 1e30,
    "all beyond the bound": lambda x: torch.full_like(x, 2e37),
    "some beyond the bound": lambda x: x.index_fill(2, torch.tensor([0]), 3e38),
    "a common offset": lambda x: x + 1e4,
    "a certain answer": lambda x: x.index_fill(2, torch.tensor([1]), 95.0),
    "one sample": lambda x: x[:, :1],
    "two classes": lambda x: x[:, :, :2],
    "no contiguous classes": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "the same of every modality": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("odd", ODD_LOGITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_odd_logits_on_the_cpu_equal_the_reference(variant, odd):
    x = ODD_LOGITS[odd](torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)))
    target = torch.tensor([0, 1, 1, 0, 1, 0, 1])[: x.shape[1]]
    for detach_weight, beta, reduction in itertools.product((True, False), (0.0, 1.0), ("none", "mean")):
        options = {"variant": variant, "detach_weight": detach_weight, "beta": beta, "reduction": reduction}
        ours, wanted = (
            loss_and_gradients(compute, x, target, **options)[:3] for compute in (fusion_loss, reference.fusion_loss)
        )
        torch.testing.assert_close(ours, wanted, rtol=3e-6, atol=1e-7, equal_nan=True)


def test_a_repeated_backward_pass_gives_the_gradient_again():
    logits, target, _ = problem(0, 3, 7, 4, "softmax", "hard", weighted=False, masked=False)
    loss = 2.0 * fusion_loss(logits.requires_grad_(), target)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, second)
    many = torch.autograd.grad(loss, logits, torch.tensor([1.0, -3.0]).double(), is_grads_batched=True)[0]
    torch.testing.assert_close(many, torch.stack([first, -3.0 * first]), rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


def test_a_gradient_is_the_callers_own():
    """What a caller does to one gradient changes no later one."""
    logits, target, _ = problem(0, 3, 7, 4, "softmax", "hard", weighted=False, masked=False)
    x = logits.requires_grad_()
    gradients = [torch.autograd.grad(fusion_loss(x, target), x)[0] for _ in range(2)]
    wanted = gradients[1].clone()
    gradients[0].fill_(math.nan)
    assert torch.equal(gradients[1], wanted)
    assert torch.equal(torch.autograd.grad(fusion_loss(x, target), x)[0], wanted)


# --- agreement with torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target_kind", TARGETS)
def test_one_modality_under_softmax_is_cross_entropy(variant, reduction, target_kind):
    logits, target, _ = problem(3, 1, 9, 5, "softmax", target_kind)
    weight = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = fusion_loss(logits, target, variant=variant, class_weight=weight, reduction=reduction)
    torch.testing.assert_close(
        got, F.cross_entropy(logits[0], target, weight=weight, reduction=reduction), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_modality_under_sigmoid_is_binary_cross_entropy(variant, reduction):
    logits, target, _ = problem(3, 1, 9, 5, "sigmoid", "soft")
    weight = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = fusion_loss(logits, target, variant=variant, activation="sigmoid", class_weight=weight, reduction=reduction)
    wanted = F.binary_cross_entropy_with_logits(logits[0], target, weight=weight, reduction=reduction)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_beta_zero_is_the_sum_of_cross_entropies(variant):
    logits, target, _ = problem(4, 4, 9, 5, "softmax", "hard")
    got = fusion_loss(logits, target, variant=variant, beta=0.0)
    wanted = sum(F.cross_entropy(x, target) for x in logits)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_label_under_sigmoid_answers_every_question():
    logits, target, options = problem(6, 3, 7, 4, "sigmoid", "hard", ignoring=False)
    answers = F.one_hot(target, 4)
    by_label = fusion_loss(logits, target, activation="sigmoid", **options)
    assert torch.equal(by_label, fusion_loss(logits, answers, activation="sigmoid", **options))
    assert torch.equal(by_label, fusion_loss(logits, answers.bool(), activation="sigmoid", **options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type(activation, dtype):
    logits, target, _ = problem(6, 3, 7, 4, activation, "hard", ignoring=False)
    got = fusion_loss(logits, target.to(dtype), activation=activation)
    assert torch.equal(got, fusion_loss(logits, target, activation=activation))


def test_a_byte_label_is_not_taken_for_the_ignored_one():
    logits = torch.zeros(1, 1, 200)
    assert fusion_loss(logits, torch.tensor([156], dtype=torch.uint8)).item() == pytest.approx(math.log(200), rel=1e-6)


# --- availability, emptiness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_an_unavailable_modality_holds_changes_nothing(variant, activation, garbage):
    logits, target, options = problem(7, 3, 9, 4, activation, "hard")
    hidden = ~options["available"].T[:, :, None]
    results = []
    for held in (0.0, garbage):
        x = logits.masked_fill(hidden, held).requires_grad_()
        loss = fusion_loss(x, target, variant=variant, activation=activation, detach_weight=False, **options)
        results.append((loss, torch.autograd.grad(loss, x)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[1][1].masked_select(hidden).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_unavailable_is_the_same_as_left_out(variant):
    logits, target, _ = problem(8, 4, 5, 3, "softmax", "hard")
    available = torch.tensor([True, False, True, True]).expand(5, -1)
    got = fusion_loss(logits, target, variant=variant, beta=2.0, available=available)
    left_out = fusion_loss(logits[[0, 2, 3]], target, variant=variant, beta=2.0)
    torch.testing.assert_close(got, left_out, rtol=1e-14, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ["no samples", "all ignored", "nothing available", "zero class weights"])
def test_nothing_to_learn_is_a_mean_of_zero_with_zero_gradients(activation, case):
    batch = 0 if case == "no samples" else 3
    logits = torch.randn(2, batch, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = fusion_loss(
        logits,
        torch.full((batch,), -100 if case == "all ignored" else 1),
        activation=activation,
        available=torch.zeros(batch, 2, dtype=torch.bool) if case == "nothing available" else None,
        class_weight=torch.zeros(4) if case == "zero class weights" else None,
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("detach_weight", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_class_is_certain(variant, detach_weight):
    logits = torch.tensor([[[3.0]], [[-1e4]]], requires_grad=True)
    loss = fusion_loss(logits, torch.tensor([0]), variant=variant, detach_weight=detach_weight)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, logits)[0].any()


# --- what method and documentation claim ------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 6, 30])
@pytest.mark.parametrize("modalities", [2, 3, 5])
def test_undetached_weights_lead_away_from_the_truth_below_their_turning_point(modalities, classes, beta):
    """-p^γ log p falls as p falls below e^(-1/γ); with the weight detached the gradient always leads to the truth."""

    def slope(detach_weight):
        logits = torch.zeros(modalities, 1, classes, dtype=torch.float64, requires_grad=True)
        loss = fusion_loss(logits, torch.tensor([0]), beta=beta, detach_weight=detach_weight)
        return torch.autograd.grad(loss, logits)[0][:, 0, 0]

    gamma = beta / (modalities - 1)
    turned = 1 / classes < math.exp(-1 / gamma)
    assert (slope(False) > 0).all() if turned else (slope(False) < 0).all()
    assert (slope(True) < 0).all()


def test_six_class_start_is_beyond_the_turning_point_for_beta_two():
    logits = torch.zeros(3, 1, 6, requires_grad=True)
    away = torch.autograd.grad(fusion_loss(logits, torch.tensor([0]), beta=2.0, detach_weight=False), logits)[0]
    towards = torch.autograd.grad(fusion_loss(logits, torch.tensor([0]), beta=2.0), logits)[0]
    # γ = 1: d(-p log p)/dx = -(log p + 1) p (1 - p), and -p (1 - p) / p · p with the weight p held.
    assert away[0, 0, 0].item() == pytest.approx((math.log(6) - 1) * 5 / 36, rel=1e-6)
    assert towards[0, 0, 0].item() == pytest.approx(-5 / 36, rel=1e-6)


def test_class_costs_equal_the_formula():
    for seed in range(10):
        logits, _, options = problem(seed, 2 + seed % 3, 5, 6, "softmax", "hard")
        del options["class_weight"]
        got = class_costs(logits, beta=1.5, **options)
        for y in range(6):
            wanted = naive_loss(logits, torch.full((5,), y), variant="original", beta=1.5, reduction="none", **options)
            torch.testing.assert_close(got[:, y], wanted, rtol=1e-10, atol=1e-10)


def test_class_costs_of_one_modality_decide_as_its_probabilities():
    logits, _, _ = problem(1, 1, 20, 6, "softmax", "hard")
    assert torch.equal(class_costs(logits).argmin(dim=1), logits[0].argmax(dim=1))


@pytest.mark.parametrize("variant", ["m3er", "m3er_cross"])
def test_class_costs_refuses_variants_without_a_decision_rule(variant):
    with pytest.raises(ValueError, match=rf"variant '{variant}'.*'original'"):
        class_costs(torch.zeros(2, 3, 4), variant=variant)


# --- refusals ---------------------------------------------------------------------------------------------------------

LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3, 4)}, r"logits .*\(M, B, C\).*\(3, 4\)"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int64)}, r"logits .*int64.*\(2, 3, 4\)"),
        ({"logits": torch.zeros(0, 3, 4)}, r"logits .*\(0, 3, 4\)"),
        ({"logits": torch.zeros(2, 3, 0)}, r"logits .*\(2, 3, 0\)"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"target has shape \(4,\), wanted \(3,\)"),
        ({"target": torch.zeros(3, 5)}, r"target has shape \(3, 5\), wanted .*\(3, 4\)"),
        ({"target": torch.zeros(3)}, r"target of shape \(3,\).*integer labels.*float32"),
        ({"target": torch.zeros(3, dtype=torch.bool)}, r"target of shape \(3,\).*integer labels.*bool"),
        ({"target": torch.zeros(3, 4, dtype=torch.int64)}, r"target of shape \(3, 4\).*distribution.*int64"),
        ({"target": torch.tensor([0, 4, 1])}, r"target must lie in 0\.\.3 or -100, got values from 0 to 4"),
        ({"target": torch.tensor([0, -1, 1])}, r"target must lie in 0\.\.3 or -100, got values from -1 to 1"),
        ({"target": torch.full((3, 4), -0.1)}, r"target must lie in 0\.\.1, got"),
        ({"target": torch.full((3, 4), math.nan)}, r"target must lie in 0\.\.1, got values from nan"),
        ({"target": torch.full((3, 4), 2), "activation": "sigmoid"}, r"target must lie in 0\.\.1 or -100"),
        ({"variant": "liu"}, r"variant must be one of 'original', 'm3er', 'm3er_cross', got 'liu'"),
        ({"activation": "tanh"}, r"activation must be one of 'softmax', 'sigmoid', got 'tanh'"),
        ({"reduction": "batchmean"}, r"reduction must be one of 'none', 'mean', 'sum', got 'batchmean'"),
        ({"beta": -1.0}, r"beta must be a finite number ≥ 0, got -1\.0"),
        ({"beta": math.nan}, r"beta must be a finite number ≥ 0, got nan"),
        ({"beta": "1"}, r"beta must be a finite number ≥ 0, got '1'"),
        ({"margin": -0.5}, r"margin must be a finite number ≥ 0, got -0\.5"),
        ({"class_weight": torch.ones(5)}, r"class_weight has shape \(5,\), wanted \(4,\)"),
        ({"modality_weight": torch.ones(4)}, r"modality_weight has shape \(4,\), wanted \(2,\)"),
        ({"available": torch.ones(2, 3, dtype=torch.bool)}, r"available .*bool of shape \(3, 2\).*\(2, 3\)"),
        ({"available": torch.ones(3, 2)}, r"available .*bool of shape \(3, 2\), got torch.float32"),
        ({"backend": "cuda"}, r"backend must be one of 'auto', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"logits": torch.zeros(2, 3, 4), "target": LABELS, **changes}
    with pytest.raises(ValueError, match=message):
        fusion_loss(arguments.pop("logits"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize("wrong", [-1, 6])
@pytest.mark.parametrize("with_class_weight", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e4, math.nan])  # of logits; the last two are computed otherwise
@pytest.mark.parametrize("batch", [1, 9, 50_000])
def test_labels_out_of_range_are_named_whatever_computes(batch, scale, with_class_weight, wrong):
    logits = scale * torch.randn(3, batch, 6, generator=torch.Generator().manual_seed(batch))
    target = torch.zeros(batch, dtype=torch.int64)
    target[batch // 2] = wrong
    weight = torch.ones(6) if with_class_weight else None
    low, high = sorted([wrong, wrong if batch == 1 else 0])
    for x in (logits, logits.clone().requires_grad_()):
        with pytest.raises(ValueError, match=f"target must lie in 0..5 or -100, got values from {low} to {high}"):
            fusion_loss(x, target, class_weight=weight)


@pytest.mark.parametrize("batch", [1, 13])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("more", [{}, {"reduction": "none"}, {"detach_weight": False}], ids=str)
def test_many_samples_are_computed_as_few_are(monkeypatch, batch, variant, scale, more):
    logits, target, factors = problem(3, 3, batch, 4, "softmax", "hard", scale=scale)
    found = {}
    for many in (1, 1000):
        monkeypatch.setattr(cpu_loss, "MANY_ROWS", many)
        for strides in ("rows", "columns"):
            x = (logits if strides == "rows" else logits.mT.contiguous().mT).clone().requires_grad_()
            loss = fusion_loss(x, target, variant=variant, **factors, **more)
            found[many, strides] = loss.detach(), *torch.autograd.grad(loss.sum(), x)
    x = logits.clone().requires_grad_()
    loss = fusion_loss(x, target, variant=variant, backend="torch", **factors, **more)
    wanted = loss.detach(), *torch.autograd.grad(loss.sum(), x)
    for got in found.values():
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


def test_a_backend_asked_for_by_name_never_falls_back():
    with pytest.raises(BackendUnavailableError, match=r"fusion_loss.*triton"):
        fusion_loss(torch.zeros(2, 3, 4, dtype=torch.float64), LABELS, backend="triton")
    with pytest.raises(BackendUnavailableError, match=r"class_costs.*triton"):
        class_costs(torch.zeros(2, 3, 4, dtype=torch.float64), backend="triton")


# --- the module -------------------------------------------------------------------------------------------------------


def test_module_equals_the_function():
    logits, target, options = problem(9, 3, 7, 4, "softmax", "hard")
    settings = {"variant": "original", "beta": 2.0, "margin": 0.1, "reduction": "none", "detach_weight": False}
    wanted = fusion_loss(logits, target, **settings, **options)
    assert torch.equal(MultiplicativeFusionLoss(**settings, **options)(logits, target), wanted)
    available = options.pop("available")
    module = MultiplicativeFusionLoss(**settings, **options, available=torch.ones_like(available))
    assert torch.equal(module(logits, target, available=available), wanted)


def test_module_weights_follow_its_dtype_and_stay_out_of_checkpoints():
    module = MultiplicativeFusionLoss(class_weight=torch.ones(4), modality_weight=torch.ones(2)).to(torch.float64)
    assert module.class_weight.dtype == module.modality_weight.dtype == torch.float64
    assert not module.state_dict()
    assert not list(module.parameters())
    assert "variant='m3er'" in repr(module)
