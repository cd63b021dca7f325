"""The temperature of the fused head: the best one by an independent minimiser, and where its probabilities show."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax
from test_fusion import build, sequences

from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.config import LossConfig, ProxyConfig, TrainingConfig
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.temperature import HIGHEST, LOWEST, TemperatureScaling, fit_temperature
from m3er_fast.training import evaluate, train


def draw(samples=400, classes=4, scale=5.0, seed=0):
    """Logits, and labels drawn from their softmax; the logits are then made ``scale`` times as large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(samples, classes))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((samples, 1))).sum(axis=1).clip(max=classes - 1)
    return logits * scale, labels


def best_temperature(likelihood, logits, target, unknown):
    """The best T of all labels and one more, which is spread evenly, by Brent's method in NumPy."""
    n = len(logits)

    def cost(log_t):
        scaled = logits / math.exp(log_t)
        return (n * likelihood(scaled, target) + likelihood(scaled, np.full_like(logits, unknown))) / (n + 1)

    bounds = math.log(LOWEST), math.log(HIGHEST)
    return math.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x)


def softmax_likelihood(logits, target):
    return -(target * log_softmax(logits, axis=1)).sum(axis=1).mean()


def sigmoid_likelihood(logits, target):
    return -(target * log_expit(logits) + (1 - target) * log_expit(-logits)).mean()


# --- Fitting ---


@pytest.mark.parametrize("samples", [1, 3, 400])
@pytest.mark.parametrize("scale", [0.3, 1.0, 8.0])
def test_labels_get_the_temperature_of_the_greatest_likelihood(samples, scale):
    logits, labels = draw(samples, scale=scale)
    found = fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found == pytest.approx(best_temperature(softmax_likelihood, logits, np.eye(4)[labels], 1 / 4), rel=1e-4)


def test_distributions_get_the_temperature_of_the_greatest_likelihood():
    logits, _ = draw()
    target = (softmax(logits / 3, axis=1) + np.random.default_rng(1).dirichlet(np.ones(4), len(logits))) / 2
    found = fit_temperature(torch.from_numpy(logits), torch.from_numpy(target))
    assert found == pytest.approx(best_temperature(softmax_likelihood, logits, target, 1 / 4), rel=1e-4)


def test_questions_get_the_temperature_of_the_greatest_likelihood_without_those_ignored():
    logits, _ = draw()
    target = (np.random.default_rng(1).random(logits.shape) < expit(logits / 3)).astype(np.int64)
    asked = np.random.default_rng(2).random(logits.shape) < 0.8
    found = fit_temperature(torch.from_numpy(logits), torch.from_numpy(np.where(asked, target, -100)), "sigmoid")
    wanted = best_temperature(sigmoid_likelihood, logits[asked], target[asked].astype(float), 1 / 2)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found == pytest.approx(3, rel=0.2)  # it was drawn so
    by_label = fit_temperature(torch.from_numpy(logits), torch.from_numpy(target.argmax(axis=1)), "sigmoid")
    one_hot = torch.eye(4)[target.argmax(axis=1)]
    assert by_label == fit_temperature(torch.from_numpy(logits), one_hot, "sigmoid")


def test_many_labels_give_back_the_scale_that_they_were_drawn_with():
    logits, labels = draw(samples=20_000, scale=7.0)
    assert fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels)) == pytest.approx(7, rel=0.03)


def test_ignored_labels_take_no_part():
    logits, labels = draw()
    kept = np.arange(400) % 3 > 0
    found = fit_temperature(torch.from_numpy(logits), torch.from_numpy(np.where(kept, labels, -100)))
    assert found == fit_temperature(torch.from_numpy(logits[kept]), torch.from_numpy(labels[kept]))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "logits",
    [
        [[9.0, 0.0, 0.0]] * 5,  # all right
        [[0.0, 9.0, 0.0]] * 5,  # all wrong
        [[1e30, 0.0, -1e30]] * 2,
        [[1e-30, 0.0, 0.0]],
        [[0.0, 0.0, 0.0]] * 3,
        [[0.1, 0.0, 0.0]],
    ],
)
def test_one_class_few_samples_and_extreme_logits_give_a_temperature_in_range(logits, dtype, activation):
    logits = torch.tensor(logits, dtype=dtype)
    found = fit_temperature(logits, torch.zeros(len(logits), dtype=torch.int64), activation)
    assert LOWEST * 0.999 <= found <= HIGHEST * 1.001
    assert bool((logits.double() / found).isfinite().all())


def test_right_answers_alone_leave_a_model_as_unsure_as_their_number_says():
    """Of n right answers and one of which nothing is known, a share of (n + 1/2) / (n + 1) is right."""
    for n in (1, 10, 1000):
        found = fit_temperature(torch.tensor([[30.0, 0.0]] * n), torch.zeros(n, dtype=torch.int64))
        assert float(expit(30.0 / found)) == pytest.approx((n + 0.5) / (n + 1), rel=1e-9)


@pytest.mark.parametrize("labels", [[], [-100, -100]])
def test_without_labels_the_temperature_is_one(labels):
    assert fit_temperature(torch.ones(len(labels), 3), torch.tensor(labels, dtype=torch.int64)) == 1.0


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.tensor([[torch.nan, 0.0]]), torch.tensor([0]), "logits must be finite"),
        (torch.tensor([[torch.inf, 0.0]]), torch.tensor([0]), "logits must be finite"),
        (torch.zeros(2, 2), torch.tensor([0]), r"target has shape \(1,\)"),
        (torch.zeros(1, 2), torch.tensor([2]), r"target must lie in 0\.\.1"),
        (torch.zeros(1, 2), torch.tensor([[torch.nan, 0.0]]), r"target must lie in 0\.\.1"),
        (torch.zeros(1, 2), torch.tensor([0.5]), "must hold integer labels"),
    ],
)
def test_bad_input_is_refused(logits, target, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, target)


# --- In the model ---


@pytest.fixture(scope="module")
def model():
    model = build(M3ERConfig(proxy=ProxyConfig(bank="regression"))).fit(sequences(300)).eval()
    model.calibration.temperature.fill_(2.5)
    return model


def test_probabilities_are_calibrated_and_nothing_else_changes(model):
    features = sequences(7)
    plain = copy.deepcopy(model)
    plain.calibration.temperature.fill_(1.0)
    output, before = model(features), plain(features)
    for name in set(output._fields) - {"probabilities"}:
        assert torch.equal(getattr(output, name), getattr(before, name)), name
    wanted = softmax(output.logits.detach().double().numpy() / 2.5, axis=1)
    for found in (output.probabilities, model.probabilities(output), model.predict_proba(features)):
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-5)
    uncalibrated = model.predict_proba(features, calibrate=False)
    assert torch.equal(uncalibrated, plain.predict_proba(features))
    assert torch.equal(uncalibrated, model.probabilities(output, calibrate=False))
    assert torch.equal(output.probabilities.argmax(dim=1), output.logits.argmax(dim=1))
    assert model.loss(output, torch.zeros(7, dtype=torch.int64)) == plain.loss(
        before, torch.zeros(7, dtype=torch.int64)
    )
    assert torch.equal(model.modality_probabilities(output), plain.modality_probabilities(before))


def test_answers_to_questions_stay_on_their_side_of_a_half():
    model = build(M3ERConfig(check=None, loss=LossConfig(activation="sigmoid"))).eval()
    model.calibration.temperature.fill_(40.0)
    output = model(sequences(50))
    assert torch.equal(output.probabilities >= 0.5, output.logits >= 0)
    np.testing.assert_allclose(
        output.probabilities.detach().numpy(), expit(output.logits.detach().numpy() / 40), rtol=1e-5
    )


def test_probabilities_are_differentiable_and_the_temperature_is_no_parameter(model):
    output = copy.deepcopy(model)(sequences(4))
    (gradient,) = torch.autograd.grad(output.probabilities[:, 0].sum(), output.logits)
    p = output.probabilities.detach()
    np.testing.assert_allclose(gradient[:, 0].numpy(), (p[:, 0] * (1 - p[:, 0]) / 2.5).numpy(), rtol=1e-4)
    assert "calibration.temperature" not in dict(model.named_parameters())


def test_a_model_keeps_its_temperature_when_it_is_saved_copied_and_cast(model, tmp_path):
    model.save_pretrained(tmp_path)
    for kept in (M3ERFusion.from_pretrained(tmp_path), copy.deepcopy(model), model.ablated(check=False)):
        assert kept.calibration.temperature.item() == 2.5
    other = build(M3ERConfig(proxy=ProxyConfig(bank="regression")))
    other.load_state_dict(model.state_dict())
    assert other.calibration.temperature.item() == 2.5
    narrow = copy.deepcopy(model)
    narrow.calibration.temperature.fill_(1.0 + 2**-12)
    assert narrow.bfloat16().calibration.temperature.item() == 1.0 + 2**-12
    with torch.inference_mode():
        moved = copy.deepcopy(model).to("cpu")
    assert not moved.calibration.temperature.is_inference()
    assert "divided by 2.5" in (tmp_path / "README.md").read_text()


def test_a_state_of_an_earlier_version_loads_without_a_temperature(model):
    state = {name: value for name, value in model.state_dict().items() if name != "calibration.temperature"}
    other = torch.nn.ModuleDict({"inner": copy.deepcopy(model)})
    other.load_state_dict({f"inner.{name}": value for name, value in state.items()})
    assert other["inner"].calibration.temperature.item() == 1.0


@pytest.mark.parametrize("value", [[1.0, 2.0], 0.0, -1.0, math.nan, math.inf])
def test_a_state_with_an_impossible_temperature_is_refused(value):
    with pytest.raises(RuntimeError, match="temperature must be one positive number"):
        TemperatureScaling().load_state_dict({"temperature": torch.tensor(value)})


def test_a_compiled_model_and_its_exports_give_calibrated_probabilities(model):
    from m3er_fast.export import export_program

    features = sequences(5)
    lengths, available = torch.full((5,), features["text"].shape[1]), torch.ones(5, 3, dtype=torch.bool)
    wanted = softmax(model(features).logits.detach().double().numpy() / 2.5, axis=1)
    program = export_program(model).module()
    found = program(features, lengths, available).probabilities
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-6)
    with pytest.warns(UserWarning, match="no CUDA graphs"):
        recorded = model.compile_for_inference(5, features["text"].shape[1])
    np.testing.assert_allclose(recorded(features).probabilities.numpy(), wanted, rtol=1e-5)


# --- After training ---


def test_training_fits_the_temperature_to_the_validation_split_as_users_see_it():
    corpus = make_synthetic(300, steps=3, seed=0)
    config = M3ERConfig(training=TrainingConfig(epochs=6, patience=None, learning_rate=0.01))
    result = train(corpus, config)
    plain = train(corpus, config.replace(training=TrainingConfig(**{**vars(config.training), "calibrate": False})))
    assert plain.model.calibration.temperature.item() == 1.0
    assert plain.history["valid_loss"] == result.history["valid_loss"]
    valid = corpus.subset("valid")
    with torch.no_grad():
        logits = plain.model(valid.features, valid.lengths, valid.available).logits.double().numpy()
    wanted = best_temperature(softmax_likelihood, logits, np.eye(4)[valid.target], 1 / 4)
    assert result.model.calibration.temperature.item() == pytest.approx(wanted, rel=1e-3)
    before, after = (evaluate(one, valid) for one in (plain.model, result.model))
    assert after.report.before_calibration == before.report.calibration
    assert after.report.accuracy == before.report.accuracy
    assert before.report.before_calibration is None
