"""The whole model: its output, what must not change it, training, and saving."""

import copy
import json
import pickle
import re
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from process_group import run_ranks
from safetensors.torch import load_file, save_file
from sklearn.exceptions import NotFittedError
from torch import nn

from m3er_fast import M3ERConfig, M3ERFusion, ModalityCheck, hub
from m3er_fast.config import CheckConfig, LossConfig, NetworkConfig, ProxyConfig

DIMS = {"text": 8, "audio": 6, "face": 5}  # not in alphabetical order
CLASSES = 3
FIELDS = (
    "logits",
    "modality_logits",
    "fused",
    "effective",
    "correlation",
    "energy",
    "p_value",
    "abstained",
    "available",
    "reason",
    "probabilities",
)


def sequences(n, *, steps=4, seed=0, dims=DIMS):
    """Linear views of one latent, each in its own units; the maps are the same for every seed."""
    maps, rng = np.random.default_rng(99), np.random.default_rng(seed)
    latent = rng.normal(size=(n, steps, 4))
    return {
        name: torch.from_numpy(
            5.0 * (latent @ maps.normal(size=(4, d)) + 0.5 * rng.normal(size=(n, steps, d))) + maps.normal(size=d)
        ).float()
        for name, d in dims.items()
    }


def build(config=None, *, dims=DIMS, seed=0, **options):
    torch.manual_seed(seed)
    return M3ERFusion(dims, CLASSES, config, **options)


@pytest.fixture(scope="module")
def model():
    return build().fit(sequences(600)).eval()


def rows_of(features, index):
    return {name: x[index] for name, x in features.items()}


def take(output, index):
    """The output of some samples."""
    return output._replace(
        **{name: v[:, index] if name == "modality_logits" else v[index] for name, v in output._asdict().items()}
    )


def assert_same(first, second, tolerance=1e-6):
    for name in FIELDS:
        a, b = getattr(first, name), getattr(second, name)
        if tolerance == 0 or a.dtype == torch.bool:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def assert_finite(output):
    for name in FIELDS:
        assert bool(torch.isfinite(getattr(output, name).float()).all()), name


# --- Output ---


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_every_field_has_its_shape_and_dtype(model, batch, mode):
    model = copy.deepcopy(model).train(mode == "train")
    output = model(sequences(batch))
    assert output._fields == FIELDS
    shapes = {name: tuple(value.shape) for name, value in output._asdict().items()}
    assert shapes == {
        "logits": (batch, 3),
        "modality_logits": (3, batch, 3),
        "fused": (batch, 160),
        "effective": (batch, 3),
        "correlation": (batch, 3),
        "energy": (batch, 3),
        "p_value": (batch, 3),
        "abstained": (batch,),
        "available": (batch, 3),
        "reason": (batch, 3),
        "probabilities": (batch, 3),
    }
    assert output.reason.dtype == torch.int64
    masks = {"effective", "abstained", "available"}
    assert {n for n, value in output._asdict().items() if value.dtype == torch.bool} == masks
    assert {value.dtype for value in output if value.is_floating_point()} == {torch.float32}
    assert_finite(output)
    loss = model.loss(output, torch.zeros(batch, dtype=torch.int64))
    assert loss.shape == ()
    assert bool(torch.isfinite(loss))
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_an_unfitted_model_classifies_in_train_mode_only_unless_it_has_no_check():
    features = sequences(4)
    assert_finite(build().train()(features))
    with pytest.raises(NotFittedError, match=r"call model\.fit\(features\) with clean training data"):
        build().eval()(features)
    with pytest.raises(NotFittedError):
        build().predict_proba(features)
    plain = build(M3ERConfig(check=None)).eval()(features)
    assert_finite(plain)
    assert bool(plain.effective.all())


def test_an_unfitted_model_without_check_is_the_bare_network():
    features = sequences(4)
    model = build(M3ERConfig(check=None)).eval()
    wanted = model.network(features)
    output = model(features)
    assert torch.equal(output.logits, wanted.logits)
    assert torch.equal(output.modality_logits, wanted.modality_logits)


def test_the_check_is_off_in_train_mode_unless_configured(model):
    features = sequences(20, seed=1)
    features["audio"] = 1e4 * torch.ones_like(features["audio"])
    training = copy.deepcopy(model).train()(features)
    assert bool(training.effective.all())
    assert not training.correlation.any()
    assert not training.energy.any()
    assert bool((training.p_value == 1).all())
    configured = build(M3ERConfig(check_in_training=True)).fit(sequences(600)).train()(features)
    assert_same(configured, model(features))
    assert not configured.effective[:, 1].any()


def test_the_model_is_standardise_check_proxy_network(model):
    features = sequences(30, seed=1)
    features["text"][:10] = 300.0 * torch.randn(10, 4, 8, generator=torch.Generator().manual_seed(0))
    z = dict(zip(DIMS, model.standardizer(features).features, strict=True))
    verdict = model.modality_check.check(z)
    assert not verdict.effective[:10, 0].any()
    assert verdict.effective[10:].float().mean() > 0.8
    replaced, abstained = model.proxy_generator.proxy(z, verdict.effective)
    wanted = model.network(replaced)
    output = model(features)
    for name in ("logits", "modality_logits", "fused"):
        torch.testing.assert_close(getattr(output, name), getattr(wanted, name), rtol=1e-6, atol=1e-6)
    for name in ("effective", "correlation", "energy", "p_value"):
        assert torch.equal(getattr(output, name), getattr(verdict, name))
    assert torch.equal(output.abstained, abstained)


# --- Invariance of a sample's result ---


def test_a_sample_does_not_depend_on_its_batch(model):
    features, lengths = sequences(40, seed=1), torch.from_numpy(np.random.default_rng(0).integers(0, 5, size=40))
    features["face"][::3] *= 30.0
    available = torch.from_numpy(np.random.default_rng(1).random((40, 3)) < 0.8)
    whole = model(features, lengths, available)
    order = torch.from_numpy(np.random.default_rng(2).permutation(40))
    for index in (order, torch.arange(3, 9), torch.tensor([17])):
        assert_same(model(rows_of(features, index), lengths[index], available[index]), take(whole, index))


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30, -7.0])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_content_and_length_of_padding_change_nothing(model, junk, mode):
    model = copy.deepcopy(model).train(mode == "train")
    features, lengths = sequences(12, seed=1), torch.tensor([0, 1, 2, 3, 4, 4] * 2)
    wanted = model(features, lengths)
    longer = {name: torch.cat([x, torch.full((12, 3, x.shape[2]), junk)], dim=1) for name, x in features.items()}
    for x in longer.values():
        x[torch.arange(7) >= lengths[:, None]] = junk
    assert_same(model(longer, lengths), wanted)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("junk", [float("nan"), 1e30])
def test_none_a_missing_key_and_available_false_are_the_same(model, mode, junk):
    model = copy.deepcopy(model).train(mode == "train")
    features, lengths = sequences(12, seed=1), torch.tensor([1, 2, 3, 4] * 3)
    mask = torch.tensor([[True, False, True]]).expand(12, -1)
    wanted = model({**features, "audio": None}, lengths)
    assert wanted.available.tolist() == mask.tolist()
    without = {name: features[name] for name in ("face", "text")}
    assert_same(model(without, lengths), wanted)
    assert_same(model({**features, "audio": torch.full_like(features["audio"], junk)}, lengths, mask), wanted)


def test_fitting_ignores_padding_and_unavailable_modalities():
    train, lengths = sequences(300), torch.from_numpy(np.random.default_rng(0).integers(1, 5, size=300))
    available = torch.from_numpy(np.random.default_rng(1).random((300, 3)) < 0.8)
    clean = build().fit(train, lengths=lengths, available=available)
    for m, x in enumerate(train.values()):
        x[torch.arange(4) >= lengths[:, None]] = float("nan")
        x[~available[:, m]] = 1e30
    dirty = build().fit(train, lengths=lengths, available=available)
    for name, value in clean.state_dict().items():
        assert torch.equal(value, dirty.state_dict()[name]), name


def test_one_frame_may_come_without_its_time_axis(model):
    features = sequences(9, steps=1, seed=1)
    assert_same(model({name: x[:, 0] for name, x in features.items()}), model(features), tolerance=0)


def test_arrays_and_tensors_are_the_same(model):
    features = sequences(9, seed=1)
    lengths = np.array([1, 2, 3, 4, 4, 3, 2, 1, 0])
    arrays = {name: x.numpy() for name, x in features.items()}
    assert_same(model(arrays, lengths), model(features, torch.from_numpy(lengths)), tolerance=0)


def test_a_modality_absent_from_training_is_unavailable():
    train = sequences(300)
    model = build().fit({**train, "face": None}).eval()
    features = sequences(12, seed=1)
    wanted = model({**features, "face": None})
    assert not wanted.available[:, 2].any()
    assert_same(model(features), wanted)
    assert_same(model({**features, "face": torch.full((12, 4, 5), 1e30)}), wanted)
    assert_same(model.train()(features), model({**features, "face": None}))


# --- Degenerate input ---


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    holes=st.lists(
        st.tuples(
            st.sampled_from(list(DIMS)),
            st.integers(0, 5),
            st.one_of(st.integers(0, 3), st.just(slice(None))),
            st.one_of(st.integers(0, 4), st.just(slice(None))),
            st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -3e38]),
        ),
        max_size=12,
    ),
    training=st.booleans(),
)
def test_output_is_finite_for_input_that_is_not(model, holes, training):
    features = sequences(6, seed=1)
    for name, sample, step, feature, value in holes:
        features[name][sample, step, feature] = value
    candidate = copy.deepcopy(model).train(training)
    output = candidate(features)
    assert_finite(output)
    untouched = [b for b in range(6) if b not in {hole[1] for hole in holes}]
    assert_same(take(output, untouched), take(candidate(sequences(6, seed=1)), untouched))
    loss = candidate.loss(output, torch.tensor([0, 1, 2, 0, 1, 2]))
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in candidate.parameters())


@pytest.mark.parametrize("how", ["mask", "length", "nan"])
def test_a_sample_without_any_modality_abstains(model, how):
    features, lengths, available = sequences(4, seed=1), torch.full((4,), 4), torch.ones(4, 3, dtype=torch.bool)
    if how == "mask":
        available[2] = False
    elif how == "length":
        lengths[2] = 0
    else:
        for x in features.values():
            x[2] = float("nan")
    output = model(features, lengths, available)
    assert_finite(output)
    assert output.abstained.tolist() == [False, False, True, False]
    for name in ("effective", "available", "correlation", "energy", "p_value"):
        assert not getattr(output, name)[2].any()
    probability = model.predict_proba(features, lengths, available)
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("proxy", [None, ProxyConfig(), ProxyConfig(bank="neighbours"), ProxyConfig(bank="basis")])
def test_one_row_of_training_data_is_enough_to_run(proxy):
    model = build(M3ERConfig(proxy=proxy))
    with pytest.warns(UserWarning, match="too few"):
        model.fit(sequences(1))
    assert_finite(model.eval()(sequences(5, seed=1)))


def test_constant_and_duplicated_features_are_ordinary_input():
    def deficient(features):
        audio = features["audio"].clone()
        audio[..., 1], audio[..., 2] = audio[..., 0], 3.0
        return {**features, "audio": audio, "face": torch.full_like(features["face"], -2.0)}

    for bank in ("regression", "neighbours", "basis"):
        model = build(M3ERConfig(proxy=ProxyConfig(bank=bank))).fit(deficient(sequences(300))).eval()
        assert_finite(model(deficient(sequences(20, seed=1))))
        assert_finite(model(sequences(20, seed=1)))


def test_units_of_a_million_with_an_offset_change_nothing_but_rounding():
    def rescaled(features):
        return {name: (1e6 * x.double() + 3e7).float() for name, x in features.items()}

    fresh = sequences(50, seed=1)
    fresh["text"][:10] *= 40.0
    plain = build().fit(sequences(600)).eval()(fresh)
    scaled = build().fit(rescaled(sequences(600))).eval()(rescaled(fresh))
    assert not plain.effective[:10, 0].any()
    assert torch.equal(plain.effective, scaled.effective)
    torch.testing.assert_close(plain.logits, scaled.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("modalities", [2, 5])
def test_any_number_of_modalities_works(modalities):
    dims = {f"m{i}": 3 + i for i in range(modalities)}
    model = build(dims=dims).fit(sequences(300, dims=dims)).eval()
    features = sequences(8, dims=dims, seed=1)
    features["m1"] *= 100.0
    output = model(features)
    assert_finite(output)
    assert output.modality_logits.shape == (modalities, 8, 3)
    assert not output.effective[:, 1].any()


# --- External verdicts and ablation ---


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_given_verdict_replaces_the_check(model, mode):
    model = copy.deepcopy(model).train(mode == "train")
    features = sequences(10, seed=1)
    verdict = torch.ones(10, 3, dtype=torch.bool)
    verdict[:5, 1] = False
    output = model(features, effective=verdict)
    assert torch.equal(output.effective, verdict)
    z = dict(zip(DIMS, model.standardizer(features).features, strict=True))
    wanted = model.network(model.proxy_generator.proxy(z, verdict).features)
    torch.testing.assert_close(output.logits, wanted.logits, rtol=1e-6, atol=1e-6)
    missing = model({**features, "text": None}, effective=verdict)
    assert not missing.effective[:, 0].any()  # an unavailable modality cannot be effective
    assert bool(model(features, effective=torch.zeros_like(verdict)).abstained.all())
    with pytest.raises(ValueError, match=re.escape("effective must be booleans of shape (10, 3), got torch.int64")):
        model(features, effective=verdict.long())


def test_ablating_shares_the_weights_and_leaves_the_model_as_it_was(model):
    features = sequences(30, seed=1)
    features["audio"] *= 50.0
    wanted = model(features)
    assert not wanted.effective[:, 1].any()
    keys = list(model.state_dict())
    unchecked, unproxied, bare = (
        model.ablated(check=False),
        model.ablated(proxy=False),
        model.ablated(check=False, proxy=False),
    )
    for ablated in (unchecked, unproxied, bare):
        assert all(a is b for a, b in zip(ablated.parameters(), model.parameters(), strict=True))
        assert_finite(ablated(features))
    assert bool(unchecked(features).effective.all())
    assert torch.equal(unchecked(features).logits, bare(features).logits)  # with all effective nothing is regenerated
    z = dict(zip(DIMS, model.standardizer(features).features, strict=True))
    torch.testing.assert_close(bare(features).logits, model.network(z).logits)
    kept = wanted.effective | wanted.abstained[:, None]
    zeroed = [x.where(kept[:, m, None, None], 0.0) for m, x in enumerate(z.values())]
    zeroed = dict(zip(DIMS, zeroed, strict=True))
    torch.testing.assert_close(unproxied(features).logits, model.network(zeroed).logits)
    assert (unproxied.config.check, unproxied.config.proxy) == (model.config.check, None)
    assert (bare.config.check, bare.config.proxy) == (None, None)
    assert list(model.state_dict()) == keys
    assert model.config == M3ERConfig()
    assert_same(model(features), wanted, tolerance=0)


def test_another_check_may_replace_the_models_own(model):
    features = sequences(30, seed=1)
    z = dict(zip(DIMS, model.standardizer(sequences(600)).features, strict=True))
    other = ModalityCheck(DIMS, statistic="energy", alpha=0.3).fit(z)
    output = model.ablated(check=other)(features)
    z = dict(zip(DIMS, model.standardizer(features).features, strict=True))
    assert torch.equal(output.effective, other.check(z).effective)
    assert model.modality_check is not other


def test_a_failed_save_leaves_the_earlier_weights(model, tmp_path, monkeypatch):
    def full(_, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_ablated_models_can_be_saved(model, tmp_path):
    features = sequences(10, seed=1)
    model.ablated(check=False).save_pretrained(tmp_path)
    assert_same(M3ERFusion.from_pretrained(tmp_path)(features), model.ablated(check=False)(features), tolerance=0)


def test_probabilities_sum_to_one_and_the_mode_stays(model):
    features = sequences(10, seed=1)
    model = copy.deepcopy(model)
    wanted = model.eval()(features).logits.softmax(dim=1)
    for training in (True, False):
        model.train(training)
        probability = model.predict_proba(features)
        assert model.training is training
        assert all(module.training is training for module in model.modules())
        assert not probability.requires_grad
        torch.testing.assert_close(probability, wanted)
        torch.testing.assert_close(probability.sum(dim=1), torch.ones(10))
    with pytest.raises(ValueError, match="unknown modality"):
        model.train().predict_proba({"smell": torch.zeros(1, 1)})
    assert model.training
    output = model.eval()(features)
    torch.testing.assert_close(model.modality_probabilities(output), output.modality_logits.softmax(dim=2))


def test_predict_proba_leaves_every_module_in_its_own_mode(model):
    model = copy.deepcopy(model).train()
    model.network.lstms.eval()
    modes = [module.training for module in model.modules()]
    model.predict_proba(sequences(3))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="unknown modality"):
        model.predict_proba({"smell": torch.zeros(1, 1)})
    assert [module.training for module in model.modules()] == modes


def test_yes_no_probabilities_are_independent():
    model = build(M3ERConfig(check=None, loss=LossConfig(activation="sigmoid")))
    features = sequences(10)
    torch.testing.assert_close(model.predict_proba(features), model.eval()(features).logits.sigmoid())


# --- Loss ---


def oracle_fusion_loss(log_p, target, beta):
    """-Σ_y t_y Σ_m p_m(y)^γ log p_m(y) with the weight detached, γ = β/(M - 1); (B,)."""
    weight = log_p.detach().exp() ** (beta / (log_p.shape[0] - 1))
    return (target * -(weight * log_p).sum(dim=0)).sum(dim=-1)


@pytest.mark.parametrize("target", ["labels", "distributions"])
@pytest.mark.parametrize("class_weight", [None, (0.5, 1.0, 3.0)])
def test_the_loss_is_the_fusion_loss_plus_the_weighted_cross_entropy(target, class_weight):
    loss = LossConfig("m3er", beta=1.5, head_weight=0.3, class_weight=class_weight)
    config = M3ERConfig(check=None, loss=loss)
    model = build(config).double().train()
    output = model({name: x.double() for name, x in sequences(7).items()})
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    weight = torch.ones(3) if class_weight is None else torch.tensor(class_weight)
    weight = weight.double()
    log_p = output.modality_logits.log_softmax(dim=2)
    if target == "labels":
        given_target = labels
        costs = oracle_fusion_loss(log_p, weight * F.one_hot(labels, 3), 1.5)
        fusion = costs.sum() / weight[labels].sum()
        head = F.cross_entropy(output.logits, labels, weight)
    else:
        given_target = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)).double()
        given_target = given_target / given_target.sum(dim=1, keepdim=True)
        fusion = oracle_fusion_loss(log_p, weight * given_target, 1.5).mean()
        head = F.cross_entropy(output.logits, given_target, weight)
    torch.testing.assert_close(model.loss(output, given_target), fusion + 0.3 * head, rtol=1e-12, atol=0)


@pytest.mark.parametrize("by_label", [False, True])
def test_the_loss_of_yes_no_questions_is_binary(by_label):
    config = M3ERConfig(check=None, loss=LossConfig("m3er", activation="sigmoid", class_weight=(0.5, 1.0, 3.0)))
    model = build(config).double().train()
    output = model({name: x.double() for name, x in sequences(7).items()})
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    answers = F.one_hot(labels, 3).double() if by_label else torch.rand(7, 3, dtype=torch.float64)
    weight = torch.tensor([0.5, 1.0, 3.0]).double()
    yes, no = F.logsigmoid(output.modality_logits), F.logsigmoid(-output.modality_logits)
    per_question = torch.stack([yes, no], dim=-1)
    fusion = oracle_fusion_loss(per_question, torch.stack([answers, 1 - answers], dim=-1), 1.0)
    head = F.binary_cross_entropy_with_logits(output.logits, answers, weight)
    got = model.loss(output, labels if by_label else answers)
    torch.testing.assert_close(got, (weight * fusion).mean() + head, rtol=1e-12, atol=0)


def test_unavailable_modalities_take_no_part_in_the_loss():
    model = build(M3ERConfig(check=None, loss=LossConfig(head_weight=0.0))).double().train()
    output = model({"text": sequences(7)["text"].double()})
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    torch.testing.assert_close(model.loss(output, labels), F.cross_entropy(output.modality_logits[0], labels))


def test_an_ignored_label_has_no_loss():
    model = build(M3ERConfig(check=None)).train()
    output = model(sequences(4))
    part = output._replace(
        logits=output.logits[:3], modality_logits=output.modality_logits[:, :3], available=output.available[:3]
    )
    wanted = model.loss(part, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(model.loss(output, torch.tensor([0, 1, 2, -100])), wanted)
    assert model.loss(output, torch.full((4,), -100)).item() == 0.0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 1, 3, 0]), "target must lie in 0..2 or -100, got values from 0 to 3"),
        (torch.tensor([0, 1, -1, 0]), "target must lie in 0..2 or -100, got values from -1 to 1"),
        (torch.tensor([0, 1]), "target has shape (2,), wanted (4,) labels or (4, 3)"),
        (torch.zeros(4, 2), "target has shape (4, 2), wanted (4,) labels or (4, 3)"),
        (torch.zeros(4), "target of shape (4,) must hold integer labels, got torch.float32"),
        (torch.zeros(4, 3, dtype=torch.int64), "must be a floating distribution, got torch.int64"),
        (torch.full((4, 3), float("nan")), "target must lie in 0..1"),
    ],
)
def test_bad_targets_are_explained_in_one_line(target, message):
    model = build().train()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        model.loss(model(sequences(4)), target)
    assert "\n" not in str(caught.value)


# --- Training ---


@pytest.mark.parametrize("feedback", [True, False])
def test_gradients_reach_every_parameter(feedback):
    model = build(M3ERConfig(network=NetworkConfig(feedback=feedback))).train()
    model.loss(model(sequences(16)), torch.arange(16) % 3).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert bool(parameter.grad.any()), name


def test_a_few_steps_learn_to_tell_two_samples_apart():
    model = build(M3ERConfig(check=None)).train()
    features, target = sequences(12), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(model(features), target).backward()
        optimizer.step()
    assert torch.equal(model.predict_proba(features).argmax(dim=1), target)


def test_the_same_seed_gives_the_same_model_to_the_last_bit():
    outputs = []
    for _ in range(2):
        proxy = ProxyConfig(bank="neighbours", max_bank=50)
        model = build(M3ERConfig(network=NetworkConfig(dropout=0.3), proxy=proxy)).fit(sequences(200))
        model.train()
        model.loss(model(sequences(16)), torch.arange(16) % 3).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        outputs.append(model.eval()(sequences(16, seed=1)))
    assert_same(*outputs, tolerance=0)


def test_fitting_leaves_the_weights_alone_and_streams():
    model = build()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    train, lengths = sequences(200), torch.from_numpy(np.random.default_rng(0).integers(1, 5, size=200))
    model.fit(train, lengths=lengths)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    batches = [(rows_of(train, slice(s, s + 64)), lengths[s : s + 64], None) for s in range(0, 200, 64)]
    streamed = build().fit(batches)
    fresh = sequences(20, seed=1)
    assert_same(model.eval()(fresh), streamed.eval()(fresh), tolerance=1e-4)
    with pytest.raises(ValueError, match="one-shot iterator"):
        build().fit(iter(batches))


def train_one_step(rank, _):
    """The gradients and learned buffers after one step on this rank's half of the batch."""
    model = build(seed=rank).fit(sequences(100, seed=rank)).train()  # the ranks begin with different models
    parallel = nn.parallel.DistributedDataParallel(model)
    half = slice(rank * 4, rank * 4 + 4)
    output = parallel(rows_of(sequences(8, seed=5), half))
    model.loss(output, (torch.arange(8) % 3)[half]).backward()
    return {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


def test_two_processes_train_as_one_and_share_buffers(tmp_path):
    (gradients, buffers), (their_gradients, their_buffers) = run_ranks(train_one_step, 2, tmp_path)
    alone = build(seed=0).fit(sequences(100, seed=0)).train()
    alone.loss(alone(sequences(8, seed=5)), torch.arange(8) % 3).backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(gradients[name], their_gradients[name])
    assert {
        "proxy_generator.map_0_1",
        "proxy_generator.moments_0_1",
        "modality_check.energy_scores",
        "standardizer.count",
    } <= buffers.keys()
    for name, buffer in alone.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert torch.equal(their_buffers[name], buffer), name


# --- Copies and precision ---


def test_copies_and_pickles_are_the_same_model(model):
    features = sequences(10, seed=1)
    wanted = model(features)
    twin = copy.deepcopy(model)
    assert_same(twin(features), wanted, tolerance=0)
    assert_same(pickle.loads(pickle.dumps(model))(features), wanted, tolerance=0)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    twin.modality_check.energy_scores.zero_()
    assert_same(model(features), wanted, tolerance=0)


def test_double_precision_runs_through_and_half_keeps_the_verdict(model):
    features = sequences(50, seed=1)
    features["face"][:10] *= 50.0
    wanted = model(features)
    double = copy.deepcopy(model).to(torch.float64)({name: x.double() for name, x in features.items()})
    assert {v.dtype for v in double if v.is_floating_point()} == {torch.float64}
    assert torch.equal(double.effective, wanted.effective)
    torch.testing.assert_close(double.logits.float(), wanted.logits, rtol=1e-4, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        narrow = copy.deepcopy(model).to(dtype)(features)
        assert narrow.logits.dtype == dtype
        assert_finite(narrow)
        for name in ("effective", "correlation", "energy", "p_value", "abstained"):
            assert torch.equal(getattr(narrow, name), getattr(wanted, name))


@pytest.mark.parametrize("steps", [4, 12])
def test_a_whole_training_step_under_autocast_has_the_gradients_of_single_precision(steps):
    """Once by the reference (4 steps) and once by the rearranged scan (12); one modality is noise, one is missing."""
    model = build(seed=3).fit(sequences(600, steps=steps)).train()
    features = sequences(32, steps=steps, seed=1)
    features["face"][:8] *= 50.0
    features["audio"][8:12] = float("nan")
    # One class prevails: with balanced classes the head's gradients cancel, and mostly rounding remains.
    target = (torch.arange(32) % 4 == 0).long()

    def gradients(**autocast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            output = model(features)
            loss = model.loss(output, target)
        assert output.logits.dtype == (torch.float32 if autocast else torch.bfloat16)
        assert loss.dtype == torch.float32
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    wanted, found = gradients(enabled=False), gradients()
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        # bfloat16 keeps eight bits, and errors add up over the steps; a missing term would differ by far more.
        assert (grad - wanted[name]).norm() < 0.1 * wanted[name].norm(), name
    before = [p.detach().clone() for p in model.parameters()]
    torch.optim.Adam(model.parameters()).step()
    assert all(
        bool(p.isfinite().all()) and not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
    )


# --- Saving ---


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local folder must not need the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("m3er_fast.hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "config",
    [
        None,
        M3ERConfig(check=None),
        M3ERConfig(proxy=None),
        M3ERConfig(proxy=ProxyConfig(bank="neighbours")),
        M3ERConfig(proxy=ProxyConfig(bank="basis")),
        M3ERConfig(check=CheckConfig(threshold=(0.1, 0.2, 0.3), statistic="correlation")),
        M3ERConfig.paper(),
    ],
    ids=["default", "no check", "no proxy", "neighbours", "basis", "threshold per pair", "paper"],
)
def test_a_saved_model_comes_back_the_same_without_pickle_or_network(config, tmp_path):
    names = ("calm", "angry", "glad")
    model = build(config, classes=names).fit(sequences(200)).eval()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "model.safetensors", "README.md"}
    loaded = M3ERFusion.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.classes == names
    assert list(loaded.input_dims.items()) == list(DIMS.items())
    features = sequences(20, seed=1)
    features["audio"][:5] *= 60.0
    assert_same(loaded(features), model(features), tolerance=0)
    assert_same(M3ERFusion.from_pretrained(str(tmp_path))(features), model(features), tolerance=0)


@pytest.mark.usefixtures("no_network")
def test_the_card_states_data_metrics_and_limits(tmp_path):
    model = build(classes=("calm", "angry", "glad")).fit(sequences(200))
    model.save_pretrained(tmp_path, model_card_kwargs={"data": "Two hundred drawn utterances.", "metrics": "F1 0.5."})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "m3er-fast"
    assert card.data.license == "mit"
    parts = dict(part.split("\n", 1) for part in card.text.split("\n## ")[1:])
    assert list(parts) == ["Data", "Metrics", "Limits"]
    assert "Two hundred drawn utterances." in parts["Data"]
    for name, dim, frames in zip(DIMS, DIMS.values(), model.standardizer.count.tolist(), strict=True):
        assert f"| {name} | {dim} | {frames} |" in parts["Data"]
    assert "α = 0.05" in parts["Data"]
    assert parts["Metrics"].strip() == "F1 0.5."
    assert "perceived" in parts["Limits"]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("bank", "holds"), [("regression", False), ("neighbours", True), ("basis", True), (None, False)]
)
def test_the_card_says_whether_the_model_holds_frames(bank, holds, tmp_path):
    proxy = None if bank is None else ProxyConfig(bank=bank)
    build(M3ERConfig(proxy=proxy)).fit(sequences(200)).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("Sharing this model shares them" in text) == holds
    assert ("holds no frame of the training data" in text) != holds


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("bank", ["neighbours", "basis"])
def test_a_model_that_was_saved_before_there_were_regressions_comes_back_with_its_own_bank(bank, tmp_path):
    model = build(M3ERConfig(proxy=ProxyConfig(bank=bank))).fit(sequences(200)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    description["config"]["proxy"] = {
        "bank": bank,
        "k": 16,
        "ridge": 0.3,
        "affine": False,
        "max_bank": None,
        "max_basis": None,
        "engine": "auto",
        "memory_budget": 268435456,
        "bank_on_host": False,
    }
    path.write_text(json.dumps(description))
    loaded = M3ERFusion.from_pretrained(tmp_path)
    assert loaded.config == model.config
    features = sequences(20, seed=1)
    features["audio"][:5] *= 60.0
    assert_same(loaded(features), model(features), tolerance=0)


@pytest.mark.usefixtures("no_network")
def test_a_card_invents_nothing(tmp_path):
    build().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.count("Not stated when this model was saved.") == 2
    assert "Its modality check is not fitted" in text
    assert "More Information Needed" not in text


@pytest.mark.usefixtures("no_network")
def test_an_existing_card_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("my own\n")
    build().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own\n"


@pytest.mark.usefixtures("no_network")
def test_an_unfitted_model_comes_back_unfitted(tmp_path):
    build().save_pretrained(tmp_path)
    loaded = M3ERFusion.from_pretrained(tmp_path)
    with pytest.raises(NotFittedError):
        loaded(sequences(2))
    loaded.fit(sequences(200))
    assert_finite(loaded(sequences(2)))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_a_bank_of_any_size_loads(tmp_path, rows):
    model = build(M3ERConfig(proxy=ProxyConfig(bank="neighbours", max_bank=rows))).fit(sequences(200)).eval()
    model.save_pretrained(tmp_path)
    assert M3ERFusion.from_pretrained(tmp_path).proxy_generator.bank_0.shape == (rows, 8)


@pytest.mark.usefixtures("no_network")
def test_settings_may_be_replaced_at_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = M3ERConfig(check=CheckConfig(alpha=0.3))
    loaded = M3ERFusion.from_pretrained(tmp_path, config=config)
    assert loaded.config == config
    features = sequences(200, seed=1)
    assert loaded(features).effective.sum() < model(features).effective.sum()
    assert M3ERFusion.from_pretrained(tmp_path, config=config.to_dict()).config == config


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "key",
    [
        "network.lstms.0.weight_ih",
        "proxy_generator.map_1_0",
        "proxy_generator.moments_1_2",
        "modality_check.energy_scores",
        "standardizer.mean_0",
        "standardizer._extra_state",
    ],
)
def test_weights_that_lack_a_key_or_have_one_too_many_are_refused(model, tmp_path, key):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}  # not a view of what is overwritten
    lacking = {name: value for name, value in state.items() if name != key}
    save_file(lacking, path)
    with pytest.raises(ValueError, match=f"Missing key.*{re.escape(key)}") as caught:
        M3ERFusion.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    save_file({**state, "surplus": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"Unexpected key.*surplus"):
        M3ERFusion.from_pretrained(tmp_path)
    save_file({**state, "network.head.0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="size mismatch"):
        M3ERFusion.from_pretrained(tmp_path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{}", "lacks ['input_dims', 'num_classes']"),
        ("model.safetensors", None, "it has no model.safetensors"),
        ("model.safetensors", b"", "model.safetensors cannot be read"),
        ("model.safetensors", b"\x80\x04junk that is no safetensors file", "model.safetensors cannot be read"),
    ],
)
def test_a_folder_without_a_model_is_explained_in_one_line(model, tmp_path, file, content, message):
    model.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        M3ERFusion.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_an_unknown_setting_in_the_file_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["config"]["check"]["sharpness"] = 3
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="CheckConfig has no field 'sharpness'"):
        M3ERFusion.from_pretrained(tmp_path)


# --- Errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_dims": {"text": 3}}, "fusion needs two modalities or more, got {'text': 3}"),
        ({"input_dims": {"text": 3, "audio": 0}}, "input_dims['audio'] must be a positive int, got 0"),
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ({"num_classes": 2.0}, "num_classes must be a positive int, got 2.0"),
        ({"classes": ("a", "b")}, "classes must be 3 different names, got ('a', 'b')"),
        ({"classes": (0, 1, 2)}, "classes must be 3 different names, got (0, 1, 2)"),
        ({"classes": "abc"}, "classes must be 3 different names, got 'abc'"),
        ({"classes": ("a", "b", "a")}, "classes must be 3 different names, got ('a', 'b', 'a')"),
        ({"config": {"check": None}}, "config must be an M3ERConfig, got dict"),
        ({"config": M3ERConfig(loss=LossConfig(class_weight=(1.0,)))}, "loss.class_weight has 1 values, wanted 3"),
        (
            {"config": M3ERConfig(loss=LossConfig(modality_weight=(1.0,)))},
            "loss.modality_weight has 1 values, wanted 3",
        ),
        ({"config": M3ERConfig(check=CheckConfig(threshold=(0.1,)))}, "threshold has 1 values, wanted one for 3 pairs"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        M3ERFusion(**{"input_dims": DIMS, "num_classes": 3, **arguments})


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"text": torch.zeros(2, 0, 8)},
            "features['text'] has shape (2, 0, 8), wanted (B, T, 8) with T ≥ 1, or (B, 8)",
        ),
        (
            {"text": torch.zeros(2, 3, 9)},
            "features['text'] has shape (2, 3, 9), wanted (B, T, 8) with T ≥ 1, or (B, 8)",
        ),
        (
            {"text": torch.zeros(2, 3, 8), "face": torch.zeros(4, 3, 5)},
            "features['face'] has shape (4, 3, 5), but features['text'] has (2, 3, 8): wanted (2, 3, 5)",
        ),
        ({"smell": torch.zeros(2, 3, 9)}, "unknown modality 'smell'; this model knows ['text', 'audio', 'face']"),
        ({"text": None}, "none of the modalities ['text', 'audio', 'face'] was given"),
    ],
)
def test_bad_features_are_named(model, features, message):
    for call in (model, model.predict_proba, model.fit):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(features)


def test_no_training_sample_is_an_error():
    with pytest.raises(ValueError, match="no sample to fit"):
        build().fit(sequences(0))
