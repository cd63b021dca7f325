"""The effect of each setting of the generated corpus, measured in NumPy and scikit-learn."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from m3er_fast.corpus.synthetic import make_synthetic

MODALITIES = ["text", "audio", "face"]


def valid_frames(corpus, modality):
    """(F, d_m) float64, standardised."""
    frames = corpus.features[modality][np.arange(corpus.steps) < corpus.lengths[:, None]].astype(np.float64)
    return (frames - frames.mean(axis=0)) / frames.std(axis=0)


def utterance_means(corpus, modalities=MODALITIES):
    return np.hstack([corpus.features[name].sum(axis=1) / corpus.lengths[:, None] for name in modalities])


def canonical_correlations(x, y):
    bases = [np.linalg.qr(view - view.mean(axis=0))[0] for view in (x, y)]
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


def accuracy(corpus, modalities=MODALITIES):
    train, test = corpus.subset("train"), corpus.subset("test")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    classifier.fit(utterance_means(train, modalities), train.target)
    return classifier.score(utterance_means(test, modalities), test.target)


def targets_and_features(corpus):
    return [corpus.target, corpus.lengths, corpus.available, *corpus.features.values()]


# --- the defaults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_defaults_are_of_moderate_difficulty_and_correlation(seed):
    corpus = make_synthetic(seed=seed)
    assert corpus.classes == ("angry", "happy", "neutral", "sad")
    every = accuracy(corpus)
    alone = [accuracy(corpus, [name]) for name in MODALITIES]
    assert 0.8 <= every <= 0.92
    assert all(0.5 <= one <= every - 0.1 for one in alone)
    correlations = canonical_correlations(utterance_means(corpus, ["text"]), utterance_means(corpus, ["audio"]))
    # Eight latent dimensions are related; nothing else is.
    assert ((correlations[:8] > 0.5) & (correlations[:8] < 0.9)).all()
    assert (correlations[8:] < 0.35).all()


def test_splits_are_7_1_2_and_share_no_group():
    corpus = make_synthetic(1000)
    shares = [np.mean(corpus.split == split) for split in ("train", "valid", "test")]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.02)
    groups = [set(corpus.group[corpus.split == split]) for split in ("train", "valid", "test")]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 100


def test_the_same_seed_repeats_and_another_seed_differs():
    first, again, other = (make_synthetic(50, missing=0.2, seed=seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, targets_and_features(first), targets_and_features(again)))
    assert np.array_equal(first.split, again.split)
    assert np.array_equal(first.group, again.group)
    assert not any(map(np.array_equal, targets_and_features(first), targets_and_features(other)))


# --- the relation between modalities ----------------------------------------------------------------------------------

LINEAR_LOW_NOISE = {"correlation": 1.0, "nonlinearity": 0.0, "noise": 1e-6}


@pytest.mark.parametrize(("source", "destination"), list(itertools.permutations(MODALITIES, 2)))
def test_linear_low_noise_modalities_are_linear_maps_of_each_other_to_1e_4(source, destination):
    corpus = make_synthetic(400, **LINEAR_LOW_NOISE)
    x, y = valid_frames(corpus, source), valid_frames(corpus, destination)
    bank, queries = slice(0, 2000), slice(2000, 2100)
    global_map = np.linalg.lstsq(x[bank], y[bank], rcond=None)[0]
    # The minimum-norm combination of 16 neighbouring frames (twice the latent dimension), applied to the other view.
    distance = np.linalg.norm(x[queries, None] - x[None, bank], axis=2)
    nearest = distance.argsort(axis=1)[:, :16]
    local = np.stack(
        [
            np.linalg.lstsq(x[rows].T, query, rcond=1e-5)[0] @ y[rows]
            for rows, query in zip(nearest, x[queries], strict=True)
        ]
    )
    for proxy in (x[queries] @ global_map, local):
        assert np.linalg.norm(proxy - y[queries]) < 1e-4 * np.linalg.norm(y[queries])


def test_the_correlation_setting_is_the_correlation_of_the_latents():
    # Within one class (the classes together, far apart) and without noise, CCA finds the latents of equal correlation.
    measured = []
    for correlation in (0.0, 0.3, 0.7, 1.0):
        corpus = make_synthetic(
            4000, steps=1, difficulty=1e6, correlation=correlation, nonlinearity=0.0, noise=0.0, latent_dim=4,
            input_dims={"text": 4, "audio": 4},
        )  # fmt: skip
        measured.append(canonical_correlations(utterance_means(corpus, ["text"]), utterance_means(corpus, ["audio"])))
    np.testing.assert_allclose(np.transpose(measured), np.tile([0.0, 0.3, 0.7, 1.0], (4, 1)), atol=0.06)


def test_without_correlation_the_class_still_relates_modalities():
    corpus = make_synthetic(4000, correlation=0.0, difficulty=0.25)
    correlations = canonical_correlations(utterance_means(corpus, ["text"]), utterance_means(corpus, ["audio"]))
    assert (correlations[:3] > 0.7).all()  # four class means span three dimensions
    assert (correlations[3:] < 0.3).all()


def test_nonlinearity_makes_linear_maps_fail():
    errors = []
    for nonlinearity in (0.0, 0.3, 0.6, 1.0):
        corpus = make_synthetic(500, correlation=1.0, nonlinearity=nonlinearity, noise=0.0)
        x, y = valid_frames(corpus, "text"), valid_frames(corpus, "audio")
        errors.append(np.linalg.norm(x @ np.linalg.lstsq(x, y, rcond=None)[0] - y) / np.linalg.norm(y))
    assert errors[0] < 1e-5
    assert (np.diff(errors) > 0.05).all()


def test_noise_is_white_and_of_the_standard_deviation_asked_for():
    clean, noisy, noisier = (make_synthetic(500, variable_lengths=False, noise=noise) for noise in (0.0, 0.5, 1.0))
    for name in MODALITIES:
        noise = (noisy.features[name] - clean.features[name]).astype(np.float64).reshape(-1, clean.input_dims[name])
        np.testing.assert_allclose(
            noise.T @ noise / len(noise), 0.25 * np.eye(noise.shape[1]), atol=0.25 * 5 / 5000**0.5 * 2
        )
        np.testing.assert_allclose(
            noisier.features[name] - clean.features[name], 2 * noise.reshape(500, 10, -1), atol=1e-5
        )


@pytest.mark.parametrize(
    ("knob", "value"),
    [("difficulty", 3.0), ("correlation", 0.2), ("nonlinearity", 0.9), ("noise", 2.0), ("missing", 0.5)],
)
def test_a_setting_changes_neither_labels_nor_lengths(knob, value):
    before, after = make_synthetic(100), make_synthetic(100, **{knob: value})
    assert np.array_equal(before.target, after.target)
    assert np.array_equal(before.lengths, after.lengths)
    assert not np.array_equal(before.features["text"], after.features["text"])


def test_difficulty_lowers_accuracy_down_to_chance():
    scores = [accuracy(make_synthetic(difficulty=difficulty, imbalance=1.0)) for difficulty in (0.4, 1.0, 2.0, 1e3)]
    assert scores[0] > 0.97
    assert (np.diff(scores) < -0.08).all()
    assert abs(scores[-1] - 0.25) < 0.08


def test_frames_are_stationary_of_unit_variance_and_smooth_in_time():
    corpus = make_synthetic(2000, noise=0.0, difficulty=1e6, nonlinearity=0.0, variable_lengths=False)
    x = corpus.features["text"].astype(np.float64)
    np.testing.assert_allclose((x**2).mean(axis=(0, 2)), np.ones(10), atol=0.05)
    lagged = [(x[:, 0] * x[:, lag]).mean() / (x[:, 0] ** 2).mean() for lag in (1, 2, 9)]
    # Half of the variance is constant; the other half has a correlation of 0.8 per frame.
    np.testing.assert_allclose(lagged, [0.5 + 0.5 * 0.8**lag for lag in (1, 2, 9)], atol=0.03)


# --- lengths, availability, labels ------------------------------------------------------------------------------------


def test_lengths_vary_over_the_upper_half_and_padding_is_zero():
    corpus = make_synthetic(1000, steps=7)
    assert set(corpus.lengths) == {4, 5, 6, 7}
    padding = np.arange(7) >= corpus.lengths[:, None]
    for x in corpus.features.values():
        assert x.dtype == np.float32
        assert not x[padding].any()
        assert x[~padding].all()
    assert (make_synthetic(50, steps=7, variable_lengths=False).lengths == 7).all()
    assert (make_synthetic(50, steps=1).lengths == 1).all()


def test_missing_modalities_are_marked_and_zero_and_one_always_stays():
    corpus = make_synthetic(3000, missing=0.4)
    assert corpus.available.any(axis=1).all()
    # Missing with chance 0.4, but for the share 0.4³ of utterances that would lose all and keep one.
    low, high = binom.interval(0.999, 3000, 0.4 - 0.4**3 / 3)
    for m, x in enumerate(corpus.features.values()):
        assert low <= (~corpus.available[:, m]).sum() <= high
        assert np.array_equal(x.any(axis=(1, 2)), corpus.available[:, m])
    assert make_synthetic(100).available.all()


@pytest.mark.parametrize(("imbalance", "expected"), [(1.0, [1, 1, 1]), (4.0, [4, 2, 1])])
def test_imbalance_is_the_ratio_of_the_first_class_to_the_last(imbalance, expected):
    target = make_synthetic(6000, steps=1, num_classes=3, imbalance=imbalance).target
    shares = np.array(expected) / sum(expected)
    low, high = binom.interval(0.999, 6000, shares)
    counts = np.bincount(target)
    assert (low <= counts).all()
    assert (counts <= high).all()


def test_multi_label_answers_have_the_stated_rates_and_are_learnable():
    corpus = make_synthetic(4000, task="multi", imbalance=4.0, num_classes=3)
    assert set(np.unique(corpus.target)) == {0.0, 1.0}
    low, high = binom.interval(0.999, 4000, [0.5, 0.25, 0.125])
    counts = corpus.target.sum(axis=0)
    assert (low <= counts).all()
    assert (counts <= high).all()
    train, test = corpus.subset("train"), corpus.subset("test")
    for c in range(3):
        classifier = LogisticRegression(C=0.1, max_iter=500).fit(utterance_means(train), train.target[:, c])
        majority = max(test.target[:, c].mean(), 1 - test.target[:, c].mean())
        assert classifier.score(utterance_means(test), test.target[:, c]) > majority + 0.02


def test_distribution_targets_sum_to_one_and_are_learnable():
    corpus = make_synthetic(task="distribution", imbalance=1.0)
    np.testing.assert_allclose(corpus.target.sum(axis=1), 1, atol=1e-6)
    assert 0.5 < corpus.target.max(axis=1).mean() < 0.9
    train, test = corpus.subset("train"), corpus.subset("test")
    classifier = LogisticRegression(C=0.1, max_iter=500).fit(utterance_means(train), train.target.argmax(axis=1))
    assert classifier.score(utterance_means(test), test.target.argmax(axis=1)) > 0.45


def test_groups_have_nearly_equal_sizes():
    _, counts = np.unique(make_synthetic(103, groups=10).group, return_counts=True)
    assert sorted(counts) == [10] * 7 + [11] * 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 3},
        {"n": 50, "input_dims": {"text": 1}},
        {"n": 50, "latent_dim": 40},
        {"n": 50, "num_classes": 9, "latent_dim": 2},
        {"n": 50, "imbalance": 1e6, "task": "distribution"},
        {"n": 50, "steps": 1, "task": "multi"},
    ],
)
def test_small_and_lopsided_settings_are_finite(arguments):
    corpus = make_synthetic(**arguments)
    assert all(np.isfinite(x).all() for x in corpus.features.values())
    assert np.isfinite(corpus.target).all()
    assert len(corpus.classes) == len(set(corpus.classes)) == arguments.get("num_classes", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2}, "n must be at least 3, got 2"),
        ({"input_dims": {}}, "input_dims must be one or more modalities"),
        ({"input_dims": {"text": 0}}, "input_dims must be"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"steps": 0}, "steps must be a positive int"),
        ({"latent_dim": 0}, "latent_dim must be a positive int"),
        ({"difficulty": 0.0}, "difficulty must be a finite number > 0"),
        ({"correlation": 1.1}, r"correlation must be a finite number in \[0, 1\], got 1.1"),
        ({"nonlinearity": -0.1}, "nonlinearity must be a finite number in"),
        ({"noise": float("nan")}, "noise must be a finite number ≥ 0"),
        ({"imbalance": 0.5}, "imbalance must be a finite number ≥ 1"),
        ({"missing": 1.0}, "missing must be in"),
        ({"groups": 2}, r"groups must be in 3\.\.2000, got 2"),
        ({"task": "ranking"}, "task must be one of"),
    ],
)
def test_a_setting_out_of_range_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic(**arguments)
