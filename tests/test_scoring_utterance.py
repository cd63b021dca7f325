"""The scores of one utterance equal those that `score` writes for the row; bad input is one clear error."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from scoring_problems import DIMS, fitted_model, make_corpus
from sklearn.exceptions import NotFittedError

from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.config import LossConfig
from m3er_fast.corpus import read_table, write_parquet
from m3er_fast.scoring import Scorer, predict
from m3er_fast.scoring.scorer import MOST_FRAMES


@pytest.fixture(scope="module")
def both():
    return make_corpus(260, steps=5, missing=0.2)


@pytest.fixture(scope="module")
def training(both):
    return both.select(slice(0, 200))


@pytest.fixture(scope="module")
def model(training):
    return fitted_model(training)


@pytest.fixture(scope="module")
def corpus(both):
    """Sixty utterances, among them one without a modality, one without frames, one of NaN and one of infinities."""
    part = both.select(slice(200, 260))
    features = {name: x.copy() for name, x in part.features.items()}
    available, lengths = part.available.copy(), part.lengths.copy()
    available[0] = False
    available[1:5] = True
    lengths[1] = 0
    features["text"][2] = np.nan
    features["audio"][3, 0] = np.inf
    features["face"][4] = 100.0
    return dataclasses.replace(part, features=features, available=available, lengths=lengths)


def utterance(corpus, row):
    """Return the arrays (1, T, d) of one row without padding; None for an unavailable modality."""
    return {
        name: x[row : row + 1, : corpus.lengths[row]] if corpus.available[row, m] else None
        for m, (name, x) in enumerate(corpus.features.items())
    }


def frames(**changes):
    return {name: np.ones((1, 3, dim), np.float32) for name, dim in DIMS.items()} | changes


# --- the same as score ---


@pytest.mark.parametrize(
    "config",
    [
        M3ERConfig(),
        M3ERConfig(loss=LossConfig(activation="sigmoid")),
        M3ERConfig(check=None, proxy=None),
    ],
    ids=["default", "sigmoid", "no check"],
)
def test_every_value_equals_what_score_writes_for_the_row(config, training, corpus, tmp_path):
    model = fitted_model(training, config)
    write_parquet(corpus, tmp_path)
    # Each row by itself: in a batch of several the model rounds otherwise.
    rows = Scorer(model, batch_frames=1).score(read_table(tmp_path / "part-00000.parquet")).to_pylist()
    for row, expected in enumerate(rows):
        if not corpus.available[row].any():
            assert expected["abstained"]
            continue
        found = predict(model, utterance(corpus, row))
        assert found.prediction == expected["prediction"]
        assert found.abstained == expected["abstained"]
        assert list(found.probabilities) == list(corpus.classes)
        assert {f"p_{name}": p for name, p in found.probabilities.items()} == {
            f"p_{name}": expected[f"p_{name}"] for name in corpus.classes
        }
        for field in ("effective", "p_value", "reason"):
            values = getattr(found, field)
            assert list(values) == list(DIMS)
            assert values == {name: expected[f"{field}_{name}"] for name in DIMS}
    assert any(row["abstained"] for row in rows[1:])
    assert not all(row["effective_face"] for row in rows)
    assert rows[4]["reason_face"] == ("frozen" if config.check else None)


def test_an_utterance_without_frames_abstains(model):
    found = predict(model, {name: np.zeros((1, 0, dim)) for name, dim in DIMS.items()})
    assert found.abstained
    assert not any(found.effective.values())
    assert sum(found.probabilities.values()) == pytest.approx(1)


def test_of_equal_probabilities_the_first_class_is_predicted(training):
    model = fitted_model(training)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.zero_()
    found = predict(model, frames())
    assert len(set(found.probabilities.values())) == 1
    assert found.prediction == training.classes[0]


# --- what is taken ---


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.tolist(),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(">f4"),
        lambda x: x[:, ::-1].copy()[:, ::-1],
        lambda x: torch.from_numpy(x).double().requires_grad_(),
        lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    ],
    ids=["lists", "float64", "big endian", "reversed", "tensor with gradient", "read-only"],
)
def test_whatever_holds_the_numbers_the_scores_are_the_same(convert, corpus, model, recwarn):
    given = utterance(corpus, int(np.flatnonzero(corpus.available.all(axis=1))[-1]))
    assert predict(model, {name: convert(x) for name, x in given.items()}) == predict(model, given)
    assert not recwarn.list


def test_a_vector_is_one_frame_and_integers_are_numbers(model):
    vectors = {name: np.arange(dim) for name, dim in DIMS.items()}
    assert predict(model, vectors) == predict(model, {name: x[None, None].astype(float) for name, x in vectors.items()})
    assert predict(model, vectors) == predict(model, {name: x[None] for name, x in vectors.items()})


def test_what_predict_takes_the_model_reads_alike(model, corpus):
    given = utterance(corpus, int(np.flatnonzero(corpus.available.all(axis=1))[-1]))
    frame = {name: x[:, 0] for name, x in given.items()}  # (1, d)
    for features in (given, frame):
        wanted = model.predict_proba(features)
        assert wanted.shape == (1, 3)
        np.testing.assert_array_equal([*predict(model, features).probabilities.values()], wanted[0].tolist())


def test_missing_and_none_are_the_same(model):
    assert predict(model, frames(audio=None)) == predict(model, {n: x for n, x in frames().items() if n != "audio"})
    assert predict(model, frames(audio=None)).p_value["audio"] == 0


def test_each_module_keeps_its_mode_and_features_are_left_alone(training):
    model = fitted_model(training).train()
    model.network.eval()
    before, given = [module.training for module in model.modules()], frames()
    found = predict(model, given)
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2
    assert found == predict(model.eval(), frames())
    assert all((given[name] == 1).all() for name in DIMS)


# --- bad input ---


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([1, 2], "features must map modality names to arrays, got list"),
        (
            frames(smell=np.ones((1, 3, 2))),
            "features: unknown modality 'smell'; this model knows ['text', 'audio', 'face']",
        ),
        ({}, "features: none of the modalities ['text', 'audio', 'face'] was given"),
        ({"text": None}, "features: none of the modalities ['text', 'audio', 'face'] was given"),
        (frames(audio=np.ones((1, 3, 7))), "features['audio'] has shape (1, 3, 7), wanted (1, T, 5), or (5,) for a"),
        (frames(audio=np.ones((2, 3, 5))), "features['audio'] has shape (2, 3, 5), wanted (1, T, 5), or (5,) for a"),
        (frames(audio=np.ones((3, 7))), "features['audio'] has shape (3, 7), wanted (1, T, 5), or (5,) for a"),
        (frames(audio=np.ones((1, 7))), "features['audio'] has shape (1, 7), wanted (1, T, 5), or (5,) for a"),
        (frames(audio=np.ones(7)), "features['audio'] has shape (7,), wanted (1, T, 5), or (5,) for a single frame"),
        (
            frames(audio=np.ones((3, 5))),
            "features['audio'] has shape (3, 5), which the model reads as 3 utterances of one frame; wanted (1, T, 5)",
        ),
        (frames(audio=3.0), "features['audio'] has shape (), wanted (1, T, 5), or (5,) for a single frame"),
        (
            frames(face=np.ones((1, 4, 4))),
            "features['face'] has 4 frames, but features['text'] has 3: wanted equally many",
        ),
        (frames(text="loud"), "features['text'] must hold real numbers, got <U4"),
        (frames(text=[[1, 2], [3]]), "features['text'] is not an array of numbers: "),
        (frames(text=np.ones((1, 3, 6)) * 1j), "features['text'] must hold real numbers, got complex128"),
        (frames(text=torch.ones(1, 3, 6, dtype=torch.bool)), "features['text'] must hold real numbers, got torch.bool"),
        (frames(text=[[None] * 6]), "features['text'] must hold real numbers, got object"),
        (
            {"text": np.zeros((1, MOST_FRAMES + 1, 6), np.float32)},
            f"features['text'] has {MOST_FRAMES + 1} frames, wanted at most {MOST_FRAMES}",
        ),
    ],
)
def test_bad_input_is_one_line_naming_the_argument(features, message, model):
    with pytest.raises(ValueError) as found:  # noqa: PT011
        predict(model, features)
    assert str(found.value).startswith(message)
    assert "\n" not in str(found.value)


def test_an_unfitted_check_is_an_error_that_keeps_the_mode():
    model = M3ERFusion(DIMS, 3).train()
    with pytest.raises(NotFittedError, match="not fitted"):
        predict(model, frames())
    assert model.training


def test_no_arrow_is_needed():
    program = (
        "import sys; sys.modules.update(pyarrow=None, pandas=None)\n"
        "import torch\n"
        "from m3er_fast import M3ERConfig, M3ERFusion\n"
        "from m3er_fast.scoring import predict\n"
        "model = M3ERFusion({'text': 2, 'audio': 3}, 2, M3ERConfig(check=None))\n"
        "print(predict(model, {'text': torch.ones(1, 4, 2), 'audio': torch.ones(1, 4, 3)}).abstained)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "False", found.stderr
