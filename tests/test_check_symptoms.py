"""The symptoms of sequences: what the combined check finds in frames and calls it, and on what it must not depend."""

import functools
import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from m3er_fast import ModalityCheck
from m3er_fast._symptoms import DETECTORS, SURPRISES, SYMPTOMS, DetectorSums, SymptomModel, draw
from m3er_fast.check import CheckSample
from m3er_fast.inputs import prepare_batch
from m3er_fast.operands import SequenceStatistics
from m3er_fast.standardize import clean_frames

DIMS = {"text": 8, "audio": 6, "face": 5}
STEPS = 30
AUDIO = 1


def sequences(n, *, seed, steps=STEPS, shortest=2):
    """Views of a latent that moves slowly, with their lengths."""
    maps, rng = np.random.default_rng(99), np.random.default_rng(seed)
    latent = np.empty((n, steps, 4))
    latent[:, 0] = rng.normal(size=(n, 4))
    for t in range(1, steps):
        latent[:, t] = 0.9 * latent[:, t - 1] + np.sqrt(1 - 0.9**2) * rng.normal(size=(n, 4))
    features = {
        name: torch.from_numpy(latent @ maps.normal(size=(4, d)) + 0.3 * rng.normal(size=(n, steps, d))).float()
        for name, d in DIMS.items()
    }
    return features, torch.from_numpy(rng.integers(shortest, steps + 1, size=n))


@pytest.fixture(scope="module")
def check():
    return ModalityCheck(DIMS).fit([(*sequences(2000, seed=0), None)])


@pytest.fixture(scope="module")
def fresh():
    """Utterances of ten or more frames."""
    return sequences(1000, seed=1, shortest=10)


def with_audio(features, change):
    return {**features, "audio": change(features["audio"])}


def hold_first(x):
    return x[:, :1].expand_as(x)


def add_noise(snr):
    def add(x):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        return x + noise * x.square().mean(dim=(1, 2), keepdim=True).div(snr).sqrt()

    return add


def lose_frames(x):
    kept = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(6)) < 0.5
    return x * kept[:, :, None]


def shuffle(x):
    return x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(7))]


# Fault: what it does, the reason that most of the samples caught must be given, and the least share caught.
FAULTS = {
    "frozen": (hold_first, "frozen", 1.0),
    "silence": (torch.zeros_like, "too quiet", 1.0),
    "noise, SNR 1": (add_noise(1.0), "noisy", 0.98),
    "noise, SNR 10": (add_noise(10.0), "noisy", 0.7),
    "half of the frames": (lose_frames, "frames lost", 0.95),
    "sixteen times the power": (lambda x: 4.0 * x, "too loud", 0.98),
    "shuffled": (shuffle, "out of order", 0.95),
    "another utterance's": (lambda x: x.roll(1, 0), "does not belong", 0.85),
}
DETECTOR_NAMES = tuple(detector.name for detector in DETECTORS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(check, fresh, fault):
    change, reason, share = FAULTS[fault]
    features, lengths = fresh
    result = check.check(with_audio(features, change), lengths)
    caught = ~result.effective[:, AUDIO]
    assert caught.float().mean() >= share
    named = result.reason[caught, AUDIO] == check.reasons.index(reason)
    assert named.float().mean() > 0.5
    assert bool((result.reason[result.effective] == 0).all())
    assert bool((result.reason[~result.effective] > 0).all())


@pytest.mark.parametrize("fault", ["frozen", "silence", "noise, SNR 1", "half of the frames"])
def test_surprise_alone_finds_faults_that_training_never_showed(fresh, fault):
    untaught = ModalityCheck(DIMS, ignore=DETECTOR_NAMES).fit([(*sequences(2000, seed=0), None)])
    change, _, share = FAULTS[fault]
    features, lengths = fresh
    result = untaught.check(with_audio(features, change), lengths)
    assert (~result.effective[:, AUDIO]).float().mean() >= share


@pytest.mark.parametrize("shortest", [1, 10])
def test_fresh_clean_sequences_raise_no_more_than_alpha_false_alarms(check, shortest):
    result = check.check(*sequences(4000, seed=2, shortest=shortest))
    highest = scipy.stats.betabinom.interval(0.99, 4000, 100, 1901)[1]  # 2000 calibration samples, alpha = 0.05
    assert (~result.effective).sum(dim=0).max() <= highest


def test_an_ignored_symptom_does_not_count(fresh):
    deaf = ModalityCheck(DIMS, ignore=(*SYMPTOMS[1:], "belonging")).fit([(*sequences(2000, seed=0), None)])
    features, lengths = fresh
    result = deaf.check(with_audio(features, shuffle), torch.full_like(lengths, STEPS))  # the means are the same
    whole = deaf.check(features, torch.full_like(lengths, STEPS))
    torch.testing.assert_close(result.p_value, whole.p_value, rtol=0, atol=1e-3)  # two ranks of 2000
    with pytest.raises(ValueError, match=r"ignore.*'colour'"):
        ModalityCheck(DIMS, ignore=("colour",))


def test_symptoms_of_sequences_say_nothing_of_one_frame(check):
    features, _ = sequences(200, seed=3, steps=1, shortest=1)
    vectors = {name: x[:, 0] for name, x in features.items()}
    result = check.check(features)
    for first, second in zip(result, check.check(vectors), strict=True):
        assert torch.equal(first, second)
    possible = {"none", "too quiet", "too loud", "does not belong"}
    assert {check.reasons[number] for number in result.reason.unique().tolist()} <= possible


def test_verdicts_depend_neither_on_the_batch_nor_on_the_padding(check, fresh):
    features, lengths = fresh
    whole = check.check(features, lengths)
    padded = {name: torch.nn.functional.pad(x, (0, 0, 0, 7), value=float("nan")) for name, x in features.items()}
    for rows in (slice(0, 1), slice(3, 90)):
        part = check.check({name: x[rows] for name, x in padded.items()}, lengths[rows])
        torch.testing.assert_close(part.p_value, whole.p_value[rows], rtol=1e-4, atol=1e-5)
        assert torch.equal(part.reason, whole.reason[rows])


@pytest.mark.parametrize("cuts", [[0, 130, 131, 400, 500], [0, 0, 250, 500, 500]], ids=str)
def test_collected_parts_of_other_padding_give_the_result_of_fit(cuts):
    features, lengths = sequences(500, seed=0)
    whole = ModalityCheck(DIMS).fit(features, lengths=lengths)
    parts = []
    for a, b in itertools.pairwise(cuts):
        longest = max(lengths[a:b].tolist(), default=1)
        part = {name: x[a:b, :longest] for name, x in features.items()}
        batch = clean_frames(prepare_batch(part, lengths[a:b], input_dims=DIMS))
        parts.append(ModalityCheck(DIMS).collect([batch], total=500, start=a))
    collected = ModalityCheck(DIMS).fit_collected(functools.reduce(CheckSample.merge, parts))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(collected.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [2, 15])
def test_few_sequences_teach_no_detector_and_judge_finitely(samples):
    with pytest.warns(UserWarning, match="too few"):
        few = ModalityCheck(DIMS).fit([(*sequences(samples, seed=0), None)])
    assert not few.detector_weight_1.any()
    assert all(bool(value.float().isfinite().all()) for value in few.check(*sequences(30, seed=1)))


def test_detectors_that_do_not_find_their_own_corruption_are_not_used():
    rng = np.random.default_rng(0)
    features = {"smooth": torch.from_numpy(np.cumsum(rng.normal(size=(300, STEPS, 6)), axis=1)).float()}
    features["white"] = torch.from_numpy(rng.normal(size=(300, STEPS, 5))).float()  # in any order the same
    check = ModalityCheck({"smooth": 6, "white": 5}).fit(features)
    order = SYMPTOMS.index("order")
    assert bool(check.symptom_above[0, order].isfinite().all())
    assert not bool(check.symptom_above[1, order].isfinite().any())


def test_constant_and_missing_modalities_judge_finitely(fresh):
    features, lengths = sequences(300, seed=0)
    constant = ModalityCheck(DIMS).fit({**with_audio(features, torch.ones_like), "face": None}, lengths=lengths)
    result = constant.check(*fresh)
    assert all(bool(value.float().isfinite().all()) for value in result)


def test_a_modality_that_never_changed_in_training_is_good_as_long_as_it_does_not(fresh):
    features, lengths = sequences(300, seed=0)
    still = {name: x[:, :1].expand_as(x) for name, x in features.items()}
    check = ModalityCheck(DIMS).fit({**features, "face": still["face"]}, lengths=lengths)
    features, lengths = fresh
    result = check.check({**features, "face": features["face"][:, :1].expand(-1, STEPS, -1)}, lengths)
    assert (~result.effective[:, 2]).float().mean() <= 0.1
    assert not check.check(features, lengths).effective[:, 2].any()


# --- the numbers themselves ---


def test_surprises_equal_their_formulas_in_numpy():
    rng = np.random.default_rng(0)
    x, square = rng.normal(size=(40, 12, 7)), rng.uniform(0.5, 2.0, size=7)
    mean, variance = x.mean(axis=1), x.var(axis=1)
    change = np.mean(np.diff(x, axis=1) ** 2, axis=1)
    repeated, energy = rng.integers(0, 12, size=40), rng.uniform(0.1, 5.0, size=40)
    ratio = change / square
    power = np.mean((variance + mean**2) / square, axis=1)
    wanted = {
        "level": np.log(energy),
        "power": np.log(power + 1e-6),
        "change": np.log(ratio.mean(axis=1) + 1e-6),
        "roughness": np.log(ratio.mean(axis=1) + 1e-3) - np.log(power + 1e-3),
        "evenness": np.log(scipy.stats.gmean(ratio + 1e-3, axis=1) / np.mean(ratio + 1e-3, axis=1)),
        "repeated frames": repeated / 11,
    }
    nothing = torch.zeros(len(DETECTORS), 14, dtype=torch.float64)
    model = SymptomModel(torch.from_numpy(square), torch.zeros(14).double(), torch.ones(14).double(), nothing)
    found = SequenceStatistics(*map(torch.from_numpy, (mean, variance, change, repeated)), pairs=torch.full((40,), 11))
    measured = model.measure(torch.from_numpy(energy), torch.from_numpy(mean), found)
    assert tuple(wanted) == tuple(surprise.name for surprise in SURPRISES)
    np.testing.assert_allclose(measured[:, : len(wanted)].numpy(), np.stack([*wanted.values()], axis=1), rtol=1e-12)


def test_detectors_are_ridge_discriminants_of_unit_variance():
    rng = np.random.default_rng(1)
    clean = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    faulty = clean[:, None] + rng.normal(size=(200, len(DETECTORS), 6)) + np.arange(6)
    features = torch.from_numpy(np.concatenate([clean[:, None], faulty], axis=1))
    covariance = np.cov(clean.T, ddof=0)
    covariance += 0.1 * np.trace(covariance) / 6 * np.eye(6)
    difference = faulty.mean(axis=0) - clean.mean(axis=0)
    wanted = np.linalg.solve(covariance, difference.T).T
    wanted /= np.sqrt(np.einsum("cf,cf->c", wanted @ covariance, wanted))[:, None]
    np.testing.assert_allclose(DetectorSums.of(features).solve().numpy(), wanted, rtol=1e-9)
    rest = DetectorSums.of(features).minus(DetectorSums.of(features[:50]))
    np.testing.assert_allclose(rest.solve().numpy(), DetectorSums.of(features[50:]).solve().numpy(), rtol=1e-8)


def test_random_numbers_depend_on_the_seed_and_not_on_the_padding():
    short, long = draw([3, 4], 20, [5, 3]), draw([9, 4, 3], 33, [5, 3])
    for first, second in zip(short, long, strict=True):
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other[[2, 1], :20])
            assert not torch.equal(one[0], one[1])
