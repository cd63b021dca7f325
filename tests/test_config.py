"""The configuration: JSON round trip, refusal of every bad value, and the numbers of the paper."""

import dataclasses
import json
import math

import pytest

from m3er_fast import M3ERConfig
from m3er_fast.config import CheckConfig, LossConfig, NetworkConfig, ProxyConfig, TrainingConfig

UNUSUAL = M3ERConfig(
    check=CheckConfig(n_components=7, statistic="energy", rule="any", threshold=[0.1, -0.2, 0.3], pooling="mean_std"),
    proxy=ProxyConfig(bank="basis", affine=True, max_bank=1000, max_basis=9, engine="faiss"),
    network=NetworkConfig(hidden=3, attention=[1, 2, 3], dropout=0.25, feedback=False, recompute=5),
    loss=LossConfig(
        variant="original", activation="sigmoid", class_weight=[1, 2.5], modality_weight=(0.5, 1, 0), margin=0.1
    ),
    training=TrainingConfig(patience=None, gradient_norm=None, balance_classes=True, seed=3),
    check_in_training=True,
)
BARE = M3ERConfig(check=None, proxy=None)


@pytest.mark.parametrize("config", [M3ERConfig(), M3ERConfig.paper(), UNUSUAL, BARE], ids=lambda c: "")
def test_json_round_trip(config):
    back = M3ERConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert back == config
    assert hash(back) == hash(config)


def test_sequences_become_tuples_of_floats():
    assert UNUSUAL.network.attention == (1, 2, 3)
    assert UNUSUAL.check.threshold == (0.1, -0.2, 0.3)
    assert UNUSUAL.loss.class_weight == (1.0, 2.5)
    assert all(type(value) is float for value in UNUSUAL.loss.class_weight + UNUSUAL.loss.modality_weight)


def test_a_ridge_that_was_not_given_is_a_number_but_for_a_regression():
    assert ProxyConfig().ridge is None
    assert [ProxyConfig(bank=bank).ridge for bank in ("regression", "neighbours", "basis")] == [None, 0.3, 0.3]
    assert dataclasses.replace(ProxyConfig(), bank="neighbours") == ProxyConfig(bank="neighbours", ridge=0.3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("k", 3), ("affine", True), ("max_bank", 9), ("max_basis", 9), ("engine", "torch"), ("bank_on_host", True)],
)
def test_settings_of_other_banks_are_refused_for_a_regression(name, value):
    wanted = rf"{name} must be left at .* with bank='regression', got {value!r}: it is a setting of other banks"
    with pytest.raises(ValueError, match=wanted):
        ProxyConfig(**{name: value})
    for bank in ("neighbours", "basis"):
        assert getattr(ProxyConfig(bank=bank, **{name: value}), name) == value


def test_missing_fields_get_their_defaults():
    assert M3ERConfig.from_dict({}) == M3ERConfig()
    assert M3ERConfig.from_dict({"network": {"hidden": 8}}) == M3ERConfig(network=NetworkConfig(hidden=8))


def test_configurations_are_frozen_and_replaced():
    config = M3ERConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.check_in_training = True
    changed = config.replace(check=None)
    assert changed.check is None
    assert config.check == CheckConfig()
    assert changed.network == config.network


def test_paper_has_the_numbers_of_the_slides():
    paper = M3ERConfig.paper()
    assert paper.check.n_components == 100
    assert (paper.network.hidden, paper.network.memory, paper.network.fusion, paper.network.head) == (32, 128, 32, 64)
    assert paper.network.feedback
    training = paper.training
    assert (training.batch_size, training.learning_rate, training.epochs) == (256, 0.01, 500)
    # Not numbers, but said there too: the correlation alone judges, a basis of the training data makes the proxies,
    # the modified loss asks a yes/no question per class, and nothing stops early.
    assert paper.check.statistic == "correlation"
    assert paper.check.component_weights is None
    assert paper.proxy.bank == "basis"
    assert (paper.loss.variant, paper.loss.activation) == ("m3er", "sigmoid")
    assert training.patience is None
    assert training.gradient_norm is None


NOT_POSITIVE_INTS = [0, -1, 2.0, True, "3"]
NOT_BOOLEANS = [0, "false", None]
NOT_NONNEGATIVE = [-0.1, math.inf, math.nan, "1", True]


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (CheckConfig, "n_components", NOT_POSITIVE_INTS),
        (CheckConfig, "statistic", ["cosine", None]),
        (CheckConfig, "rule", ["most"]),
        (CheckConfig, "pooling", ["max"]),
        (CheckConfig, "component_weights", ["uniform"]),
        (CheckConfig, "alpha", [0.0, 1.0, -0.1, math.nan, "0.05"]),
        (CheckConfig, "ridge", NOT_NONNEGATIVE),
        (CheckConfig, "ignore", ["gain", 1, None, [1]]),
        (CheckConfig, "threshold", [1.1, -1.1, math.nan, "0.5", [0.1, 2.0]]),
        (ProxyConfig, "bank", ["rows"]),
        (ProxyConfig, "engine", ["annoy"]),
        (ProxyConfig, "k", NOT_POSITIVE_INTS),
        (ProxyConfig, "ridge", NOT_NONNEGATIVE),
        (ProxyConfig, "affine", NOT_BOOLEANS),
        (ProxyConfig, "max_bank", NOT_POSITIVE_INTS),
        (ProxyConfig, "max_basis", NOT_POSITIVE_INTS),
        (ProxyConfig, "memory_budget", NOT_POSITIVE_INTS),
        (ProxyConfig, "bank_on_host", NOT_BOOLEANS),
        (NetworkConfig, "hidden", NOT_POSITIVE_INTS),
        (NetworkConfig, "memory", NOT_POSITIVE_INTS),
        (NetworkConfig, "fusion", NOT_POSITIVE_INTS),
        (NetworkConfig, "head", NOT_POSITIVE_INTS),
        (NetworkConfig, "attention", [(1, 2), (1, 2, 3, 4), 128, (1, 2, 0), "abc"]),
        (NetworkConfig, "dropout", [1.0, -0.1, math.nan, "0.5"]),
        (NetworkConfig, "feedback", NOT_BOOLEANS),
        (NetworkConfig, "recompute", [0, -1, 1.5, True, "5"]),
        (LossConfig, "variant", ["liu"]),
        (LossConfig, "activation", ["relu"]),
        (LossConfig, "beta", NOT_NONNEGATIVE),
        (LossConfig, "head_weight", NOT_NONNEGATIVE),
        (LossConfig, "margin", NOT_NONNEGATIVE),
        (LossConfig, "detach_weight", NOT_BOOLEANS),
        (LossConfig, "class_weight", [[-1.0, 1.0], [math.nan], 2.0, ["a"], "ab"]),
        (LossConfig, "modality_weight", [[-1.0, 1.0], [math.inf], 2.0]),
        (TrainingConfig, "epochs", NOT_POSITIVE_INTS),
        (TrainingConfig, "batch_size", NOT_POSITIVE_INTS),
        (TrainingConfig, "learning_rate", [0.0, *NOT_NONNEGATIVE]),
        (TrainingConfig, "weight_decay", NOT_NONNEGATIVE),
        (TrainingConfig, "schedule", ["linear", "", None, 1]),
        (TrainingConfig, "warmup_epochs", NOT_NONNEGATIVE),
        (TrainingConfig, "patience", NOT_POSITIVE_INTS),
        (TrainingConfig, "gradient_norm", [0.0, *NOT_NONNEGATIVE]),
        (TrainingConfig, "balance_classes", NOT_BOOLEANS),
        (TrainingConfig, "calibrate", NOT_BOOLEANS),
        (TrainingConfig, "seed", [1.5, "0", True, None, -1, 2**32]),
        (TrainingConfig, "precision", ["float16", "", None, 32]),
        (M3ERConfig, "check", [ProxyConfig(), "combined"]),
        (M3ERConfig, "proxy", [CheckConfig()]),
        (M3ERConfig, "network", [None, 32]),
        (M3ERConfig, "loss", [None]),
        (M3ERConfig, "training", [None]),
        (M3ERConfig, "check_in_training", NOT_BOOLEANS),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_bad_values_are_named(kind, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must "):
            kind(**{name: value})


def test_every_field_has_its_refusals_tested():
    """A new field comes with validation: the table above must name it."""
    table = next(m for m in test_bad_values_are_named.pytestmark if m.name == "parametrize").args[1]
    tested = {(kind, name) for kind, name, _ in table}
    for kind in (CheckConfig, ProxyConfig, NetworkConfig, LossConfig, TrainingConfig, M3ERConfig):
        for field in dataclasses.fields(kind):
            assert (kind, field.name) in tested, f"{kind.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chek": {}}, r"M3ERConfig has no field 'chek'; it has check, proxy"),
        ({"network": {"hiden": 3}}, r"NetworkConfig has no field 'hiden'; it has hidden, memory"),
        ({"training": {"lr": 0.1}}, r"TrainingConfig has no field 'lr'"),
        ({"network": {"hidden": 0}}, r"hidden must be a positive int, got 0"),
        ({"network": None}, r"network must be a NetworkConfig, got None"),
        ({"loss": 3}, r"loss must be a LossConfig, got 3"),
    ],
)
def test_from_dict_names_what_it_does_not_know(values, message):
    with pytest.raises(ValueError, match=message):
        M3ERConfig.from_dict(values)


# --- settings by dotted names ---


def test_settings_change_by_dotted_names():
    changed = M3ERConfig().with_settings(
        {"loss.beta": 2, "training.patience": None, "network.attention": [1, 2, 3], "check_in_training": True}
    )
    expected = M3ERConfig(
        loss=LossConfig(beta=2.0),
        training=TrainingConfig(patience=None),
        network=NetworkConfig(attention=(1, 2, 3)),
        check_in_training=True,
    )
    assert changed == expected
    assert M3ERConfig().with_settings({"check": None}).check is None
    assert BARE.with_settings({"check.alpha": 0.1}).check == CheckConfig(alpha=0.1)
    assert UNUSUAL.with_settings({}) == UNUSUAL


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss.betta", 2, r"there is no setting 'loss.betta', did you mean loss.beta\?"),
        ("beta", 2, r"there is no setting 'beta', did you mean loss.beta\?"),
        ("ridge", 2, r"did you mean check.ridge or proxy.ridge\?"),
        ("zzz", 2, "there is no setting 'zzz'$"),
        ("loss.beta", "two", "beta must be a finite number ≥ 0, got 'two'"),
        ("loss", 2, "loss must be a LossConfig, got 2"),
    ],
)
def test_a_setting_that_does_not_exist_or_fit_is_an_error(name, value, message):
    with pytest.raises(ValueError, match=message):
        M3ERConfig().with_settings({name: value})


def test_a_warm_up_is_shorter_than_the_training():
    with pytest.raises(ValueError, match="warmup_epochs must be less than epochs = 3, got 3"):
        TrainingConfig(epochs=3, warmup_epochs=3)
