"""The records that the layers share: order of weights and pairs, and settings that are spelled once."""

import dataclasses
import inspect
import math
import re
from typing import get_args, get_type_hints

import pytest
import torch

import m3er_fast
from m3er_fast import _validation, config, functional
from m3er_fast.operands import LossKeywords, LossOptions, MemoryScanWeights, TwoLayers, modality_pairs, side_by_side


def weights(modalities=3, feedback=True):
    """Weights whose tensors are all different numbers."""
    number = iter(range(100))

    def draw():
        return torch.tensor(float(next(number)))

    return MemoryScanWeights(
        [draw() for _ in range(modalities)],
        draw(),
        draw(),
        draw() if feedback else None,
        *(TwoLayers(*(draw() for _ in range(4))) for _ in range(4)),
    )


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("modalities", [1, 2, 5])
def test_weights_are_the_same_after_being_a_list_of_tensors(modalities, feedback):
    given = weights(modalities, feedback)
    found = MemoryScanWeights.of(modalities, given.tensors())
    assert found._fields == given._fields
    assert found.input == given.input
    assert found[1:] == given[1:]
    assert all(isinstance(layers, TwoLayers) for layers in found.layers)


def test_every_tensor_of_the_weights_is_listed_once_and_an_absent_feedback_as_none():
    assert [x if x is None else int(x) for x in weights(2).tensors()] == list(range(21))
    assert weights(2, feedback=False).tensors().count(None) == 1


def test_pairs_come_in_the_order_of_the_results():
    assert modality_pairs(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert modality_pairs(1) == []


def test_states_side_by_side():
    state = torch.arange(12).view(2, 3, 2)  # two modalities, three samples
    assert side_by_side(state).tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_two_layers_are_two_linear_maps_with_a_relu_between():
    layers = TwoLayers(torch.tensor([[1.0, -1.0]]), torch.tensor([0.5]), torch.tensor([[2.0]]), torch.tensor([-1.0]))
    assert layers(torch.tensor([[3.0, 1.0], [0.0, 2.0]])).tolist() == [[4.0], [-1.0]]


def test_the_loss_keywords_are_the_fields_of_the_options():
    assert get_type_hints(LossKeywords) == get_type_hints(LossOptions)


@pytest.mark.parametrize("taker", [functional.fusion_loss, m3er_fast.MultiplicativeFusionLoss])
def test_signatures_spell_out_every_option_of_the_loss(taker):
    parameters = inspect.signature(taker).parameters
    for name, default in LossOptions._field_defaults.items():
        assert parameters[name].default == default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_an_unknown_option_of_the_loss_is_a_type_error():
    with pytest.raises(TypeError, match="gamma"):
        functional.fusion_loss(torch.zeros(1, 1, 2), torch.tensor([0]), gamma=1.0)
    with pytest.raises(TypeError, match="gamma"):
        m3er_fast.MultiplicativeFusionLoss(gamma=1.0)


STEPS = {
    m3er_fast.ModalityCheck: config.CheckConfig,
    m3er_fast.ProxyGenerator: config.ProxyConfig,
    m3er_fast.MemoryFusionNetwork: config.NetworkConfig,
}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_step_shows_the_settings_of_its_config_with_defaults_and_meaning(step):
    parameters = inspect.signature(step).parameters
    described = inspect.getdoc(step)
    for field in dataclasses.fields(STEPS[step]):
        assert parameters[field.name].default == field.default
        assert f"{field.name}: " in described
    assert "{settings}" not in described


@pytest.mark.parametrize("kind", [*STEPS.values(), config.LossConfig, config.TrainingConfig])
def test_every_setting_is_checked_and_described(kind):
    for field in dataclasses.fields(kind):
        assert callable(field.metadata["check"])
        assert f"{field.name}: {field.metadata['about']}".split("\n", 1)[0] in inspect.getdoc(kind)


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (_validation.check_positive_int, (0,), "x must be a positive int, got 0"),
        (_validation.check_positive_int, (True,), "x must be a positive int, got True"),
        (_validation.check_boolean, (1,), "x must be True or False, got 1"),
        (_validation.check_choice, ("c", ("a", "b")), "x must be one of 'a', 'b', got 'c'"),
        (_validation.check_number, (-1.0, 0.0), "x must be a finite number ≥ 0, got -1.0"),
        (_validation.check_number, (math.nan, 0.0), "x must be a finite number ≥ 0, got nan"),
        (_validation.check_number, (2.0, -1.0, 1.0), "x must be a finite number in [-1, 1], got 2.0"),
        (_validation.check_vector, (torch.zeros(2), 3), "x has shape (2,), wanted (3,)"),
        (_validation.check_matrix, (torch.zeros(2),), "x must be a floating matrix with at least one column"),
    ],
)
def test_a_bad_argument_is_named_with_what_came_and_what_was_wanted(check, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check("x", *arguments)


def test_exclusive_bounds_are_refused_themselves():
    with pytest.raises(ValueError, match=r"x must be a finite number > 0, got 0\.0"):
        _validation.check_number("x", 0.0, 0.0, exclusive=True)
    with pytest.raises(ValueError, match=r"x must be a finite number in \(0, 1\), got 1\.0"):
        _validation.check_number("x", 1.0, 0.0, 1.0, exclusive=True)
    _validation.check_number("x", 0.5, 0.0, 1.0, exclusive=True)


def test_choices_may_be_a_literal_type():
    for choice in get_args(config.Statistic):
        _validation.check_choice("statistic", choice, config.Statistic)
    with pytest.raises(ValueError, match="statistic must be one of 'correlation', 'energy', 'combined', got 'x'"):
        _validation.check_choice("statistic", "x", config.Statistic)
