"""The memory scan and the network against step-by-step loops built from nn.LSTMCell and nn.Linear."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from m3er_fast import MemoryFusionNetwork, reference
from m3er_fast.functional import BackendUnavailableError, MemoryScanWeights, memory_scan
from m3er_fast.operands import TwoLayers

THREE = {"text": 5, "audio": 3, "face": 4}
FIVE = {"a": 2, "b": 3, "c": 1, "d": 4, "e": 2}
SMALL = {"hidden": 3, "memory": 4, "attention": (5, 6, 7), "fusion": 3, "head": 4}


class StepByStep(nn.Module):
    """The formulas of the memory fusion network, one sample and one step at a time, with separate weights."""

    def __init__(self, dims, hidden, memory, attention, *, feedback):
        super().__init__()
        cells = 2 * hidden * len(dims)
        a, b, g = attention
        self.hidden, self.memory = hidden, memory
        self.cells = nn.ModuleList(nn.LSTMCell(d, hidden) for d in dims)
        self.w1, self.w2 = nn.Linear(cells, a), nn.Linear(a, cells)
        self.w3, self.w4 = nn.Linear(cells, b), nn.Linear(b, memory)
        self.w5, self.w6 = nn.Linear(cells + memory, g), nn.Linear(g, memory)
        self.w7, self.w8 = nn.Linear(cells + memory, g), nn.Linear(g, memory)
        self.back = nn.ModuleList(nn.Linear(2 * hidden, 4 * hidden, bias=False) for _ in dims) if feedback else None

    def forward(self, sequences):
        """Last hidden states (M, h) and memory (u,) of one sample's (T, d_m) sequences, all T steps valid."""
        count, h = len(sequences), self.hidden
        dtype = self.w1.weight.dtype
        states = [(torch.zeros(h, dtype=dtype), torch.zeros(h, dtype=dtype)) for _ in sequences]
        u = torch.zeros(self.memory, dtype=dtype)
        attended = torch.zeros(2 * h * count, dtype=dtype)
        for t in range(sequences[0].shape[0]):
            before = [c for _, c in states]
            states = [self.step(m, sequences[m][t], states[m], attended) for m in range(count)]
            z = torch.cat(before + [c for _, c in states])
            attended = torch.softmax(self.w2(torch.relu(self.w1(z))), dim=0) * z
            candidate = torch.tanh(self.w4(torch.relu(self.w3(attended))))
            context = torch.cat([attended, u])
            retain = torch.sigmoid(self.w6(torch.relu(self.w5(context))))
            update = torch.sigmoid(self.w8(torch.relu(self.w7(context))))
            u = retain * u + update * candidate
        return torch.stack([s for s, _ in states]), u

    def step(self, m, x, state, attended):
        if self.back is None:
            return self.cells[m](x, state)
        h, cell = self.hidden, self.cells[m]
        old = attended[: len(attended) // 2][m * h : (m + 1) * h]
        new = attended[len(attended) // 2 :][m * h : (m + 1) * h]
        gates = cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ state[0] + cell.bias_hh
        gates = gates + self.back[m](torch.cat([old, new]))
        i, f, g, o = gates.split(h)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def weights(self):
        """The same weights in the layout of ``memory_scan``."""

        def layers(first, second):
            return TwoLayers(first.weight, first.bias, second.weight, second.bias)

        return MemoryScanWeights(
            input=[cell.weight_ih for cell in self.cells],
            recurrent=torch.stack([cell.weight_hh for cell in self.cells]),
            bias=torch.stack([cell.bias_ih + cell.bias_hh for cell in self.cells]),
            feedback=None if self.back is None else torch.stack([layer.weight for layer in self.back]),
            attention=layers(self.w1, self.w2),
            candidate=layers(self.w3, self.w4),
            retain=layers(self.w5, self.w6),
            update=layers(self.w7, self.w8),
        )


def step_by_step(dims=(5, 3, 4), *, feedback, dtype=torch.float64, hidden=3, memory=4, attention=(5, 6, 7)):
    torch.manual_seed(0)
    return StepByStep(dims, hidden, memory, attention, feedback=feedback).to(dtype)


def sequences(batch, steps, dims=(5, 3, 4), *, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, steps, d, dtype=dtype, generator=generator) for d in dims]


def named(features, dims=THREE):
    return dict(zip(dims, features, strict=True))


# --- The scan against the loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(5,), (5, 3, 4), (2, 3, 1, 4, 2)])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_scan_equals_the_loop(dims, feedback, dtype, tolerance):
    loop = step_by_step(dims, feedback=feedback, dtype=dtype)
    features = sequences(7, 6, dims, dtype=dtype)
    lengths = torch.tensor([6, 1, 4, 0, 6, 2, 5])
    hidden, memory = memory_scan(features, lengths, loop.weights())
    for b, length in enumerate(lengths.tolist()):
        wanted_hidden, wanted_memory = loop([x[b, :length] for x in features])
        torch.testing.assert_close(hidden[:, b], wanted_hidden, rtol=0, atol=tolerance)
        torch.testing.assert_close(memory[b], wanted_memory, rtol=0, atol=tolerance)


@pytest.mark.parametrize("feedback", [False, True])
def test_scan_equals_the_loop_at_the_sizes_of_the_paper(feedback):
    dims = (30, 7, 11)
    loop = step_by_step(dims, feedback=feedback, dtype=torch.float32, hidden=32, memory=128, attention=(128, 64, 64))
    features = sequences(3, 20, dims, dtype=torch.float32)
    hidden, memory = memory_scan(features, torch.full((3,), 20), loop.weights())
    for b in range(3):
        wanted_hidden, wanted_memory = loop([x[b] for x in features])
        torch.testing.assert_close(hidden[:, b], wanted_hidden, rtol=0, atol=1e-6)
        torch.testing.assert_close(memory[b], wanted_memory, rtol=0, atol=1e-6)


@pytest.mark.parametrize("feedback", [False, True])
def test_gradients_equal_the_loops(feedback):
    loop = step_by_step(feedback=feedback)
    features = sequences(3, 4)
    lengths = torch.tensor([4, 2, 0])
    direction = torch.linspace(-1, 1, 3 * 3 + 4, dtype=torch.float64)

    def gradients(results):
        total = sum(torch.cat([hidden.flatten(), memory]) @ direction for hidden, memory in results)
        return torch.autograd.grad(total, list(loop.parameters()), materialize_grads=True)

    wanted = gradients([loop([x[b, :length] for x in features]) for b, length in enumerate(lengths.tolist())])
    hidden, memory = memory_scan(features, lengths, loop.weights())
    got = gradients([(hidden[:, b], memory[b]) for b in range(3)])
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("feedback", [False, True])
def test_gradcheck(feedback):
    weights = step_by_step((2, 1), feedback=feedback, hidden=2, memory=2, attention=(2, 2, 2)).weights()
    features = [x.requires_grad_() for x in sequences(2, 3, (2, 1))]
    leaves = [w.detach().requires_grad_() for w in (weights.recurrent, weights.bias, *weights.attention)]
    if feedback:
        leaves.append(weights.feedback.detach().requires_grad_())

    def scan(x, y, recurrent, bias, w1, b1, w2, b2, back=None):
        changed = weights._replace(recurrent=recurrent, bias=bias, attention=TwoLayers(w1, b1, w2, b2), feedback=back)
        return memory_scan([x, y], torch.tensor([3, 2]), changed)

    assert torch.autograd.gradcheck(scan, (*features, *leaves))


def test_one_step_of_zero_feedback_is_the_plain_network():
    """At the first step nothing is attended yet, and feedback cannot matter; later it does."""
    weights = step_by_step(feedback=True).weights()
    plain = weights._replace(feedback=None)
    features, lengths = sequences(4, 3), torch.full((4,), 3)
    first = [x[:, :1] for x in features]
    assert torch.equal(*[memory_scan(first, torch.full((4,), 1), w)[1] for w in (weights, plain)])
    later = [memory_scan(features, lengths, w)[0] for w in (weights, plain)]
    assert (later[0] - later[1]).abs().max() > 1e-4


def test_scan_of_an_empty_batch():
    loop = step_by_step(feedback=True)
    hidden, memory = memory_scan(sequences(0, 4), torch.zeros(0, dtype=torch.int64), loop.weights())
    assert hidden.shape == (3, 0, 3)
    assert memory.shape == (0, 4)


def test_the_content_of_padding_never_matters():
    loop = step_by_step(feedback=True)
    features, lengths = sequences(5, 6), torch.tensor([0, 3, 6, 1, 5])
    wanted = memory_scan(features, lengths, loop.weights())
    padding = torch.arange(6) >= lengths[:, None]
    for content in (float("nan"), float("inf"), 1e30):
        got = memory_scan([x.masked_fill(padding[:, :, None], content) for x in features], lengths, loop.weights())
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": sequences(2, 3)[:2]}, r"features: got 2 modalities, wanted 3"),
        ({"features": [*sequences(2, 3)[:2], torch.zeros(2, 3, 9)]}, r"features\[2\] has shape \(2, 3, 9\), wanted"),
        ({"features": [*sequences(2, 3)[:2], torch.zeros(2, 4, 4)]}, r"features\[2\] .*wanted \(2, 3, 4\)"),
        ({"features": [torch.zeros(2, 5), *sequences(2, 3)[1:]]}, r"features\[0\] has shape \(2, 5\)"),
        ({"lengths": torch.tensor([3.0, 1.0])}, r"lengths must be integers, got torch\.float32"),
        ({"lengths": torch.tensor([True, False])}, r"lengths must be integers, got torch\.bool"),
        ({"lengths": torch.tensor([1])}, r"lengths has shape \(1,\), wanted \(2,\)"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0"),
        ({"dropout": float("nan")}, r"dropout must lie in \[0, 1\), got nan"),
        ({"backend": "cudnn"}, r"backend must be one of 'auto', 'torch', 'triton', got 'cudnn'"),
    ],
)
def test_scan_names_bad_arguments(changes, message):
    arguments = {"features": sequences(2, 3), "lengths": torch.tensor([3, 1]), **changes}
    with pytest.raises(ValueError, match=message):
        memory_scan(**arguments, weights=step_by_step(feedback=True).weights())


def test_a_scan_requested_by_name_never_falls_back():  # no kernel supports hidden size 3
    with pytest.raises(BackendUnavailableError, match=r"memory_scan.*triton"):
        memory_scan(sequences(2, 3), torch.tensor([3, 1]), step_by_step(feedback=True).weights(), backend="triton")


# --- The network ------------------------------------------------------------------------------------------------------


def network(dims=THREE, classes=6, **options):
    torch.manual_seed(0)
    return MemoryFusionNetwork(dims, classes, **(SMALL | options))


def transplant(model, *, feedback):
    """A step-by-step loop with the weights of ``model``."""
    dims = tuple(model.input_dims.values())
    hidden = model.lstms[0].hidden_size
    memory = model.candidate[1].out_features
    attention = tuple(part[0].out_features for part in (model.attention, model.candidate, model.retain))
    loop = StepByStep(dims, hidden, memory, attention, feedback=feedback).to(model.head[0].weight.dtype)
    pairs = [(loop.cells, model.lstms), ((loop.w1, loop.w2), model.attention), ((loop.w3, loop.w4), model.candidate)]
    pairs += [((loop.w5, loop.w6), model.retain), ((loop.w7, loop.w8), model.update)]
    if feedback:
        pairs.append((loop.back, model.feedback))
    for theirs, ours in pairs:
        for a, b in zip(theirs, ours, strict=True):
            a.load_state_dict(b.state_dict())
    return loop


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("dims", [{"only": 4}, THREE, FIVE])
def test_network_equals_the_formulas(dims, feedback):
    model = network(dims, feedback=feedback).double().eval()
    loop = transplant(model, feedback=feedback)
    features = sequences(5, 4, dims.values())
    lengths = [4, 1, 3, 2, 4]
    out = model(named(features, dims), lengths)
    for b, length in enumerate(lengths):
        hidden, u = loop([x[b, :length] for x in features])
        e = torch.ones(3, dtype=torch.float64)
        for h, layer in zip(hidden, model.fusion, strict=True):
            e = e * (layer.weight @ h + layer.bias)
        fused = torch.cat([e, u])
        torch.testing.assert_close(out.fused[b], fused, rtol=0, atol=1e-12)
        logits = model.head[1](torch.relu(model.head[0](fused)))
        torch.testing.assert_close(out.logits[b], logits, rtol=0, atol=1e-12)
        for m, layer in enumerate(model.modality_heads):
            torch.testing.assert_close(out.modality_logits[m, b], layer(hidden[m]), rtol=0, atol=1e-12)


def test_default_sizes_are_the_papers():
    model = MemoryFusionNetwork(THREE, 6)
    out = model(named(sequences(2, 3, dtype=torch.float32)))
    assert out.fused.shape == (2, 160)
    assert out.logits.shape == (2, 6)
    assert out.modality_logits.shape == (3, 2, 6)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim == 2}
    assert shapes["lstms.0.weight_ih"] == (128, 5)
    assert shapes["attention.0.weight"] == (128, 192)
    assert shapes["attention.1.weight"] == (192, 128)
    assert shapes["candidate.0.weight"] == (64, 192)
    assert shapes["candidate.1.weight"] == (128, 64)
    assert shapes["retain.0.weight"] == shapes["update.0.weight"] == (64, 192 + 128)
    assert shapes["feedback.0.weight"] == (128, 64)
    assert shapes["head.0.weight"] == (64, 160)


@pytest.mark.parametrize("feedback", [False, True])
def test_padding_and_batch_never_change_a_sample(feedback):
    model = network(feedback=feedback).eval()
    features = sequences(6, 7, dtype=torch.float32)
    lengths = torch.tensor([7, 3, 0, 1, 5, 7])
    padding = (torch.arange(7) >= lengths[:, None])[:, :, None]
    out = model(named(features), lengths)
    poisoned = model(named([x.masked_fill(padding, float("nan")) for x in features]), lengths)
    for ours, theirs in zip(poisoned, out, strict=True):
        assert torch.equal(ours, theirs)
    for b, length in enumerate(lengths.tolist()):
        # T is at least 1: the sample without frames keeps one frame of padding.
        alone = model(named([x[b : b + 1, : max(length, 1)] for x in features]), lengths[b : b + 1])
        torch.testing.assert_close(alone.logits[0], out.logits[b], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone.fused[0], out.fused[b], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone.modality_logits[:, 0], out.modality_logits[:, b], rtol=0, atol=1e-6)


def test_padding_of_nan_leaves_gradients_alone():
    gradients = []
    for content in (0.0, float("nan")):
        model = network()
        features, lengths = sequences(4, 5, dtype=torch.float32), torch.tensor([5, 2, 0, 3])
        padding = (torch.arange(5) >= lengths[:, None])[:, :, None]
        model(named([x.masked_fill(padding, content) for x in features]), lengths).logits.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_missing_is_the_same_as_none_as_unavailable_and_as_zeros():
    model = network().eval()
    text, _, face = sequences(4, 3, dtype=torch.float32)
    available = torch.tensor([True, False, True]).expand(4, -1)
    garbage = torch.full((4, 3, 3), float("nan"))
    outputs = [
        model({"text": text, "face": face}),
        model({"text": text, "audio": None, "face": face}),
        model({"text": text, "audio": garbage, "face": face}, available=available),
        model({"text": text, "audio": torch.zeros(4, 3, 3), "face": face}),
    ]
    for first, second in itertools.pairwise(outputs):
        for ours, theirs in zip(first, second, strict=True):
            assert torch.equal(ours, theirs)


def test_utterance_vectors_are_sequences_of_one_step():
    model = network().eval()
    features = sequences(4, 1, dtype=torch.float32)
    flat = model(named([x[:, 0] for x in features]))
    assert torch.equal(flat.logits, model(named(features)).logits)


def test_an_empty_batch_has_empty_outputs():
    out = network()(named(sequences(0, 3, dtype=torch.float32)))
    assert out.logits.shape == (0, 6)
    assert out.modality_logits.shape == (3, 0, 6)
    assert out.fused.shape == (0, 7)


def test_order_of_the_mapping_does_not_matter():
    model = network().eval()
    features = named(sequences(3, 2, dtype=torch.float32))
    assert torch.equal(model(dict(reversed(features.items()))).logits, model(features).logits)


def test_dropout_acts_in_training_only_and_follows_the_seed():
    features = named(sequences(8, 3, dtype=torch.float32))
    model = network(dropout=0.5)

    def training_logits(seed):
        torch.manual_seed(seed)
        return model.train()(features).logits

    assert torch.equal(training_logits(1), training_logits(1))
    assert not torch.equal(training_logits(1), training_logits(2))
    without = network(dropout=0.0)
    assert torch.equal(model.eval()(features).logits, without.eval()(features).logits)
    assert torch.equal(without.train()(features).logits, without.eval()(features).logits)


def test_scan_drops_hidden_units_with_the_probability_given():
    """A scan of one step from zero cells: û = tanh(b4 + W4 relu(b3)) up to dropout, and u = γ2 û."""
    weights = step_by_step((1,), feedback=False, hidden=1, memory=1, attention=(1, 2000, 1)).weights()
    zero = [torch.zeros_like(w) for w in weights.candidate]
    candidate = TwoLayers(zero[0], torch.ones(2000).double(), torch.full((1, 2000), 1e-6).double(), zero[3])
    open_gate = TwoLayers(*[torch.zeros_like(w) for w in weights.update[:3]], torch.full((1,), 40.0).double())
    weights = weights._replace(candidate=candidate, update=open_gate)
    torch.manual_seed(0)
    memory = reference.memory_scan([torch.zeros(50, 1, 1).double()], torch.ones(50), weights, dropout=0.3)[1]
    # 2000 units of 1e-6, each kept with probability 0.7 and then worth 1/0.7.
    kept = memory[:, 0].atanh() / 1e-6 * 0.7
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert kept.mean().item() == pytest.approx(1400, abs=4 * (2000 * 0.3 * 0.7 / 50) ** 0.5)


def test_gradients_reach_every_parameter():
    model = network(dropout=0.1)
    out = model(named(sequences(16, 4, dtype=torch.float32)))
    (out.logits.square().sum() + out.modality_logits.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_float64_input_is_computed_in_the_models_precision():
    model = network().eval()
    features = sequences(3, 2)
    out = model(named(features))
    assert out.logits.dtype == torch.float32
    assert torch.equal(out.logits, model(named([x.float() for x in features])).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ({"num_classes": 2.0}, r"num_classes must be a positive int, got 2\.0"),
        ({"input_dims": {}}, "input_dims must map"),
        ({"input_dims": {"text": 0}}, r"input_dims\['text'\] must be a positive int, got 0"),
        ({"hidden": 0}, "hidden must be a positive int, got 0"),
        ({"attention": (1, 2)}, r"attention must be three layer sizes, got \(1, 2\)"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0"),
    ],
)
def test_network_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemoryFusionNetwork(**({"input_dims": THREE, "num_classes": 6} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": {"smell": torch.zeros(2, 3, 5)}}, r"unknown modality 'smell'"),
        ({"features": {}}, r"none of the modalities"),
        ({"features": {"text": torch.zeros(2, 3, 9)}}, r"features\['text'\] has shape \(2, 3, 9\), wanted \(B, T, 5\)"),
        ({"features": {"text": torch.zeros(2, 0, 5)}}, r"features\['text'\] has shape \(2, 0, 5\).*T ≥ 1"),
        (
            {"features": {"text": torch.zeros(2, 3, 5), "face": torch.zeros(2, 4, 4)}},
            r"features\['face'\] has shape \(2, 4, 4\).*wanted \(2, 3, 4\)",
        ),
        ({"features": {"text": torch.zeros(2, 3, 5)}, "lengths": [3, 4]}, r"lengths must lie in 0\.\.3.* 3 to 4"),
        ({"features": {"text": torch.zeros(2, 3, 5)}, "lengths": [3]}, r"lengths must be integers of shape \(2,\)"),
        (
            {"features": {"text": torch.zeros(2, 3, 5)}, "available": torch.ones(2, 3)},
            r"available must be booleans of shape \(2, 3\), got torch.float32",
        ),
    ],
)
def test_network_names_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        network()(**arguments)


# --- Layers that were changed after they were made --------------------------------------------------------------------


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    return "weight_orig"


def weight_normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older of the two
        nn.utils.weight_norm(layer)
    return "weight_v"


def parametrised(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return "parametrizations.weight.original"


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


RECURRENT = ["attention.0", "attention.1", "candidate.0", "retain.1", "update.0", "feedback.1"]


@pytest.mark.parametrize("change", [pruned, weight_normed, parametrised])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_changed_weight_acts_and_trains_the_parameter_behind_it(change, name):
    torch.manual_seed(0)
    network = MemoryFusionNetwork(THREE, 2, **SMALL).double()
    features = named(sequences(5, 4))
    layer = network.get_submodule(name)
    parameter = layer.get_parameter(change(layer))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    plain = MemoryFusionNetwork(THREE, 2, **SMALL).double()
    for _ in range(3):  # each step changes the parameter: the weight must follow
        other = {key: value for key, value in network.state_dict().items() if not key.startswith(f"{name}.")}
        with torch.no_grad():
            layer(torch.zeros(1, layer.in_features, dtype=torch.float64))  # torch's own call sets ``weight``
            effective = {f"{name}.weight": layer.weight.clone()}
            if layer.bias is not None:
                effective[f"{name}.bias"] = layer.bias
        plain.load_state_dict(other | effective)
        logits = network(features).logits
        torch.testing.assert_close(logits, plain(features).logits, rtol=0, atol=1e-12)
        before = parameter.detach().clone()
        optimizer.zero_grad()
        logits.square().sum().backward()
        optimizer.step()
        assert not torch.equal(parameter, before)


def test_a_pruned_lstm_trains_the_weights_that_are_left():
    torch.manual_seed(0)
    network = MemoryFusionNetwork(THREE, 2, **SMALL).double()
    prune.random_unstructured(network.lstms[0], "weight_ih", 0.5)
    for _ in range(2):
        network.zero_grad()
        network(named(sequences(5, 4))).logits.square().sum().backward()
        gradient = network.lstms[0].weight_ih_orig.grad
        mask = network.lstms[0].weight_ih_mask == 1
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).any()


class LowRank(nn.Module):
    """As adapters such as LoRA wrap a layer; like theirs, it shows the weight of the layer inside."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + x.sum()


def quantised(layer):
    """The layer as torch's ``quantize_dynamic`` leaves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves quantisation elsewhere
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})[0]


@pytest.mark.parametrize(
    ("replace", "name"), [*itertools.product([LowRank, quantised], RECURRENT), (quantised, "lstms.1")]
)
def test_a_replaced_layer_is_refused_by_name(replace, name):
    network = MemoryFusionNetwork(THREE, 2, **SMALL)
    layers, number = name.split(".")
    layer = network.get_submodule(name)
    getattr(network, layers)[int(number)] = replace(layer)
    kind = type(layer).__name__
    with pytest.raises(ValueError, match=rf"^layer {name} is a .*wanted a plain {kind}: its weights are read"):
        network(named(sequences(2, 3, dtype=torch.float32)))


def test_a_layer_whose_forward_was_replaced_is_refused_by_name():
    network = MemoryFusionNetwork(THREE, 2, **SMALL)
    network.update[1].forward = lambda x: x
    with pytest.raises(ValueError, match=r"^layer update\.1 is a Linear with another forward"):
        network(named(sequences(2, 3, dtype=torch.float32)))


def test_heads_may_be_quantised():
    torch.manual_seed(0)
    network = MemoryFusionNetwork(THREE, 2).eval()
    features = named(sequences(4, 3, dtype=torch.float32))
    wanted = network(features).logits
    for name in ("fusion.0", "head.0", "head.1", "modality_heads.2"):
        layers, number = name.split(".")
        getattr(network, layers)[int(number)] = quantised(network.get_submodule(name))
    torch.testing.assert_close(network(features).logits, wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_are_not_called_are_a_warning(register):
    network = MemoryFusionNetwork(THREE, 2, **SMALL)
    getattr(network.retain[0], register)(lambda *_: None)
    with pytest.warns(UserWarning, match=r"^layer retain\.0 has hooks that are not called"):
        network(named(sequences(2, 3, dtype=torch.float32)))
