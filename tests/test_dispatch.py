"""Which implementation computes: one choice, from device, dtype, sizes and what is requested."""

import pytest
import torch
from scan_problems import detached, problem

from m3er_fast import functional, reference
from m3er_fast.functional import BackendUnavailableError
from m3er_fast.functional._dispatch import OPERATIONS, backends, choose
from m3er_fast.operands import CheckProjections, LossFactors, LossOptions

LABELS, ONES = torch.zeros(5, dtype=torch.int64), torch.ones(5)


def chosen_loss(backend="auto", *, target=LABELS, factors=None, dtype=torch.float32, **options):
    logits = torch.zeros(2, 5, 3, dtype=dtype)
    arguments = (target, factors or LossFactors(), LossOptions(**options))
    return choose("fusion_loss", backend, logits, *arguments).name


def test_labels_under_softmax_have_a_fast_path_on_the_cpu():
    assert chosen_loss() == "cpu"
    assert chosen_loss(dtype=torch.float64) == "cpu"
    assert chosen_loss(dtype=torch.bfloat16) == "cpu"


@pytest.mark.parametrize(
    "case",
    [
        {"margin": 0.5},
        {"activation": "sigmoid"},
        {"target": torch.zeros(5, 3)},
        {"target": torch.zeros(5, 3, requires_grad=True)},
        {"factors": LossFactors(class_weight=torch.ones(3, requires_grad=True))},
        {"factors": LossFactors(modality_weight=torch.ones(2, requires_grad=True))},
        {"backend": "torch"},
    ],
)
def test_every_other_loss_is_the_references(case):
    assert chosen_loss(**case) == "torch"


def test_a_compiled_loss_is_the_references():
    logits = torch.zeros(2, 5, 3)
    names = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        names.append(choose("fusion_loss", "auto", x, LABELS, LossFactors(), LossOptions()).name)
        return x + 1

    compiled(logits)
    assert names == ["torch"]


@pytest.mark.parametrize("batch", [1, 128])
def test_the_check_has_a_fast_path_for_every_batch_without_a_gradient(batch):
    vector, matrix = torch.zeros(1), torch.ones(1, 1)
    projections = CheckProjections(
        [vector] * 2, [matrix], [vector], [matrix], [vector], [matrix] * 2, [vector], [vector]
    )
    for needs_gradient, name in ((False, "cpu"), (True, "torch")):
        features = [torch.zeros(batch, 1, requires_grad=needs_gradient)] * 2
        assert choose("check_statistics", "auto", features[0], features, projections).name == name
        x, valid = features[0][:, None], torch.ones(batch, 1, dtype=torch.bool)
        assert choose("sequence_statistics", "auto", x, valid).name == name


@pytest.mark.parametrize(
    ("ridge", "dtype", "needs_gradient", "name"),
    [
        (1e-3, torch.float32, False, "cpu"),
        (1e-3, torch.bfloat16, False, "cpu"),
        (0.0, torch.float32, False, "torch"),
        (1e-9, torch.float32, False, "torch"),
        (1e-3, torch.float64, False, "torch"),
        (1e-3, torch.float32, True, "torch"),
    ],
)
def test_local_least_squares(ridge, dtype, needs_gradient, name):
    query, bank = torch.zeros(2, 3, dtype=dtype, requires_grad=needs_gradient), torch.zeros(4, 3, dtype=dtype)
    neighbors = torch.zeros(2, 1, dtype=torch.int64)
    assert choose("local_least_squares", "auto", query, bank, [bank], neighbors, ridge).name == name


def chosen_scan(features, weights):
    tensors = [x for x in (*features, *weights.tensors()) if x is not None]
    trains = any(x.requires_grad for x in tensors)
    return choose("memory_scan", "auto", features[0], features, weights, tensors, trains).name


@pytest.mark.parametrize(
    ("batch", "steps", "trained", "scored"),
    [
        (7, 1, "cpu, few steps", "cpu, few steps"),
        (7, 3, "cpu, few steps", "cpu, few steps"),
        (7, 4, "cpu", "cpu, few steps"),
        (7, 5, "cpu", "cpu"),
        (128, 9, "cpu", "cpu"),
        (129, 9, "cpu", "cpu"),
        (511, 3, "cpu, few steps", "cpu, few steps"),
        (512, 2, "cpu", "cpu"),
        (512, 1, "cpu, few steps", "cpu, few steps"),
        (7, 0, "torch", "torch"),
    ],
)
def test_the_scan_on_the_cpu_is_chosen_by_samples_and_steps(batch, steps, trained, scored):
    features, weights = problem((1, 1), batch, steps, sizes=(1, 1, 1, 1, 1))
    assert chosen_scan(features, weights) == trained
    assert chosen_scan([x.detach() for x in features], detached(weights)) == scored


def test_scans_of_mixed_dtypes_and_odd_gates_are_the_references():
    features, weights = problem((2, 3), 3, 9)
    assert chosen_scan([x.float() for x in features], weights) == "torch"
    halves = [x.bfloat16() for x in features], problem((2, 3), 3, 9, dtype=torch.bfloat16)[1]
    assert chosen_scan(*halves) == "torch"
    odd = weights._replace(retain=weights.retain._replace(first=weights.retain.first[:-1]))
    assert chosen_scan(features, odd) == "torch"


def test_transforms_and_forward_mode_are_the_references():
    names = []

    def loss(x):
        names.append(choose("fusion_loss", "auto", x, LABELS, LossFactors(), LossOptions()).name)
        return x.sum()

    torch.func.grad(loss)(torch.zeros(2, 5, 3))
    with torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(torch.zeros(2, 5, 3), torch.ones(2, 5, 3)))
    assert names == ["torch", "torch"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_the_reference_last_and_it_refuses_nothing(operation):
    last = OPERATIONS[operation][-1]
    assert (last.name, last.device) == ("torch", "any")
    assert last.refusal() is None
    assert backends(operation)[0] == "torch"
    assert hasattr(reference, operation)
    assert hasattr(functional, operation)


def test_an_unknown_back_end_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'triton', got 'cpu'"):
        chosen_loss("cpu")


def test_a_requested_back_end_never_falls_back():
    features, weights = problem((2, 3), 3, 9)
    with pytest.raises(BackendUnavailableError, match=r"memory_scan: backend 'triton' does not work here: it takes"):
        functional.memory_scan(features, torch.full((3,), 9), weights, backend="triton")
