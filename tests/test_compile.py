"""torch.compile takes the whole model in eval mode as one graph, which serves any number of samples and steps."""

import copy
import functools
import pickle

import pytest
import torch
from test_export import CASES, assert_same, batch
from test_fusion import build, sequences
from torch._dynamo.testing import CompileCounterWithBackend

from m3er_fast import M3ERConfig
from m3er_fast._proxy_operator import replace_lost
from m3er_fast.config import CheckConfig, ProxyConfig

# Torch compiles sizes of 1 apart, because it broadcasts them.
LARGER = {name: case for name, case in CASES.items() if not name.startswith("one s")}


@functools.cache
def fitted(bank, **check):
    config = M3ERConfig(proxy=ProxyConfig(bank=bank), check=CheckConfig(**check))
    return build(config).fit(sequences(300)).eval()


def compiled(model, backend="aot_eager"):
    """The model, compiled anew in one graph, and a counter of its graphs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def marked(inputs):
    """Inputs whose numbers of samples and steps are left open."""
    features, lengths, available = inputs
    for x in (*features.values(), lengths, available):
        torch._dynamo.mark_dynamic(x, 0)
    for x in features.values():
        torch._dynamo.mark_dynamic(x, 1)
    return inputs


@pytest.mark.parametrize("bank", ["regression", "neighbours"])
def test_one_graph_answers_as_the_model_does_for_any_size(bank):
    model = fitted(bank)
    answer, counter = compiled(model)
    with torch.no_grad():
        answer(*marked(batch(6, 4)))
        for case in LARGER.values():
            inputs = case()
            assert_same(answer(*inputs), model(*inputs))
    assert counter.frame_count == 1


def test_a_bank_that_learns_anew_needs_no_other_graph():
    model = copy.deepcopy(fitted("neighbours"))
    generator = model.proxy_generator
    inputs = batch(6, 4, available=[[True, False, True]] * 6)
    features, lengths, available = inputs
    effective = torch.tensor([[True, False, True]] * 6)
    answer, counter = compiled(generator, "eager")
    with torch.no_grad():
        for seed in (1, 2):
            generator.fit(sequences(50, seed=seed))
            got, wanted = (f(features, effective, lengths, available).features for f in (answer, generator))
            for name, x in wanted.items():
                torch.testing.assert_close(got[name], x, msg=name)
    assert counter.frame_count == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_generator_has_its_own_place_in_a_graph(copied):
    original = fitted("neighbours").proxy_generator
    assert copied(original)._number != original._number


def test_operators_keep_the_rules_of_torch():
    model = fitted("neighbours")
    features, lengths, available = batch(5, 4, lengths=[4, 4, 3, 1, 0], available=[[True, False, True]] * 5)
    with torch.no_grad():
        standardized = model.standardize(features, lengths, available)
        effective = standardized.available
        lost = ~effective & effective.any(dim=1, keepdim=True)
        # Their strides are of a transposed batch: what an operator returns must not depend on them.
        transposed = [x.mT.contiguous().mT for x in standardized.features]
        for given in (standardized.features, transposed):
            batch_of = standardized._replace(features=given)[:4]
            torch.library.opcheck(replace_lost, (*batch_of, effective, lost, model.proxy_generator._number))
            weights = [None if x is None else x.detach() for x in model.network.scan_weights().tensors()]
            torch.library.opcheck(torch.ops.m3er_fast.cpu_memory_scan, (given, standardized.lengths, weights, 0.0))


def test_gradients_in_eval_mode_are_those_of_the_model():
    model = fitted("regression")
    (features, lengths, available), grads = batch(4, 3), []
    for answer in (model, compiled(model)[0]):
        given = {name: x.clone().requires_grad_() for name, x in features.items()}
        answer(given, lengths, available).logits.square().sum().backward()
        grads.append([x.grad for x in given.values()])
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_training_step_is_one_graph():
    model = build(M3ERConfig()).train()
    model.network.dropout = 0.0
    features, lengths, available = batch(4, 3, lengths=[3, 3, 2, 0])
    target = torch.tensor([0, 2, 1, 0])

    def loss(features, lengths, available, target):
        return model.loss(model(features, lengths, available), target)

    answer, counter = compiled(loss)
    grads = []
    for function in (loss, answer):
        model.zero_grad()
        function(features, lengths, available, target).backward()
        grads.append([x.grad.clone() for x in model.parameters() if x.grad is not None])
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "model",
    [
        lambda: fitted("regression"),
        lambda: fitted("neighbours"),
        lambda: fitted("basis", statistic="correlation"),
        lambda: fitted("regression", threshold=0.1, pooling="mean_std"),
    ],
)
def test_inductor_answers_as_the_model_does(model, context):
    model = model()
    answer, counter = compiled(model, "inductor")
    with context():
        answer(*marked(batch(6, 4)))
        for case in CASES.values():
            inputs = case()
            assert_same(answer(*inputs), model(*inputs))
    assert counter.frame_count == 4  # of many samples and steps, of one sample, of one step, and of one of both
