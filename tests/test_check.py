"""The modality check: float64 oracles written from the method, and its error rates on data that it has not seen."""

import functools
import inspect
import itertools
import math
import re
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from corpus_fixtures import real_data
from sklearn.exceptions import NotFittedError

from m3er_fast import ModalityCheck, functional
from m3er_fast.check import CheckSample
from m3er_fast.config import CheckConfig
from m3er_fast.corpus import utterance_csv
from m3er_fast.corruption import KINDS, paper_protocol
from m3er_fast.inputs import prepare_batch
from m3er_fast.metrics import auroc
from m3er_fast.standardize import Standardizer, clean_frames

DIMS = {"text": 8, "audio": 6, "face": 5}
PAIRS = [(0, 1), (0, 2), (1, 2)]


def shared_latent(n, dims=DIMS, *, seed=0, steps=None, noise=0.7):
    """Gaussian views of one latent; the maps are the same for every seed, the samples are not."""
    maps = np.random.default_rng(99)
    rng = np.random.default_rng(seed)
    shape = (n,) if steps is None else (n, steps)
    latent = rng.normal(size=(*shape, 4))
    return {
        name: latent @ maps.normal(size=(4, d)) + noise * rng.normal(size=(*shape, d)) + maps.normal(size=d)
        for name, d in dims.items()
    }


def float32(features):
    return {name: torch.from_numpy(x).float() for name, x in features.items()}


def fold_of(n):
    """The fold of each of n training samples: 64 blocks of neighbours, dealt to ten folds with seed 0."""
    return np.random.default_rng(0).permutation(64)[np.arange(n) * 64 // n] % 10


def rows_of(features, index):
    return {name: x[index] for name, x in features.items()}


def same(first, second, tolerance=1e-6):
    assert torch.equal(first.effective, second.effective)
    for name in ("correlation", "energy", "p_value"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=tolerance, atol=tolerance)


def assert_finite(result):
    for value in result:
        assert bool(torch.isfinite(value.float()).all())


# --- the two statistics ---


def oracle_statistics(train, vectors, there=None, *, ridge=1e-3, weighted=True, n_components=100):
    """ρ (B, P), energy (B, M) and log likelihood ratio (B, P) in float64: symmetric inverse square roots, a solve.

    ``there`` (n, M) says which training samples have which modality. Pearson's ρ across components depends on the signs
    of the canonical pairs, which CCA leaves open: the entry of largest magnitude in the first view's direction is
    positive, as ``m3er_fast.cca`` documents.
    """
    there = np.ones((len(train[0]), len(train)), dtype=bool) if there is None else there

    def shrunk(covariance):
        return covariance + ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))

    energy, correlation, likelihood = [], [], []
    for m, f in enumerate(vectors):
        view = train[m][there[:, m]]
        centred = f - view.mean(axis=0)
        covariance = shrunk(np.atleast_2d(np.cov(view.T)))
        energy.append((centred * np.linalg.solve(covariance, centred.T).T).sum(axis=1) / view.shape[1])
    for i, j in itertools.combinations(range(len(train)), 2):
        both = there[:, i] & there[:, j]
        x_mean, y_mean = train[i][both].mean(axis=0), train[j][both].mean(axis=0)
        x, y = train[i][both] - x_mean, train[j][both] - y_mean
        x_root = scipy.linalg.inv(scipy.linalg.sqrtm(shrunk(x.T @ x / (len(x) - 1))).real)
        y_root = scipy.linalg.inv(scipy.linalg.sqrtm(shrunk(y.T @ y / (len(y) - 1))).real)
        left, s, right = np.linalg.svd(x_root @ (x.T @ y / (len(x) - 1)) @ y_root)
        k = min(n_components, len(s))
        x_directions, y_directions = x_root @ left[:, :k], y_root @ right[:k].T
        scale = np.sqrt(s[:k]) if weighted else np.ones(k)
        signs = np.sign([column[np.abs(column).argmax()] for column in x_directions.T])
        u, v = (vectors[i] - x_mean) @ x_directions * signs, (vectors[j] - y_mean) @ y_directions * signs
        correlation.append([np.corrcoef(a, b)[0, 1] for a, b in zip(u * scale, v * scale, strict=True)])
        likelihood.append(oracle_log_likelihood_ratio(u, v, s[:k]))
    return np.array(correlation).T, np.array(energy).T, np.array(likelihood).T


def oracle_log_likelihood_ratio(u, v, canonical):
    """log p(u, v) - log p(u) - log p(v) by SciPy's bivariate normal densities, at unit mean squares of u and of v."""
    u, v = (x / np.sqrt(np.mean(x**2, axis=1, keepdims=True)) for x in (u, v))
    ratio = np.zeros(len(u))
    for c, s in enumerate(canonical):
        joint = scipy.stats.multivariate_normal(cov=[[1.0, s], [s, 1.0]])
        ratio += joint.logpdf(np.stack([u[:, c], v[:, c]], axis=1))
        ratio -= scipy.stats.norm.logpdf(u[:, c]) + scipy.stats.norm.logpdf(v[:, c])
    return ratio


def oracle_calibration(train, there=None):
    """The statistics of every training sample, from the nine folds without it."""
    n = len(train[0])
    fold = fold_of(n)
    statistics = [np.empty((n, k)) for k in (math.comb(len(train), 2), len(train), math.comb(len(train), 2))]
    for f in range(10):
        inside = fold == f
        unseen = oracle_statistics(
            [x[~inside] for x in train], [x[inside] for x in train], None if there is None else there[~inside]
        )
        for whole, values in zip(statistics, unseen, strict=True):
            whole[inside] = values
    return statistics


@pytest.mark.parametrize("weights", ["canonical", None])
@pytest.mark.parametrize("n_components", [100, 3])
def test_correlation_and_energy_equal_the_closed_form(weights, n_components):
    train, fresh = shared_latent(900), shared_latent(50, seed=1)
    check = ModalityCheck(DIMS, component_weights=weights, n_components=n_components).double().fit(train)
    rho, energy, likelihood = oracle_statistics(
        list(train.values()), list(fresh.values()), weighted=weights == "canonical", n_components=n_components
    )
    result = check.check(fresh)
    np.testing.assert_allclose(result.correlation.numpy(), rho, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.energy.numpy(), energy, rtol=1e-9)
    measured = functional.check_statistics([torch.from_numpy(x) for x in fresh.values()], check.projections_)
    np.testing.assert_allclose(measured.likelihood.numpy(), likelihood, rtol=1e-8, atol=1e-8)
    single = ModalityCheck(DIMS, component_weights=weights, n_components=n_components).fit(train).check(float32(fresh))
    np.testing.assert_allclose(single.correlation.numpy(), rho, rtol=0, atol=2e-5)
    np.testing.assert_allclose(single.energy.numpy(), energy, rtol=2e-5)


def test_ridge_equals_the_closed_form():
    train, fresh = shared_latent(900), shared_latent(50, seed=1)
    result = ModalityCheck(DIMS, ridge=0.5).double().fit(train).check(fresh)
    rho, energy, _ = oracle_statistics(list(train.values()), list(fresh.values()), ridge=0.5)
    np.testing.assert_allclose(result.correlation.numpy(), rho, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.energy.numpy(), energy, rtol=1e-9)


def test_check_statistics_of_the_raw_vectors_and_the_projections_are_those_of_the_check():
    train, fresh = float32(shared_latent(400, steps=4)), float32(shared_latent(30, seed=1, steps=4))
    check = ModalityCheck(DIMS).fit(train)
    correlation, energy = functional.gate_statistics([x.mean(dim=1) for x in fresh.values()], check.projections_)
    result = check.check(fresh)
    torch.testing.assert_close(result.correlation, correlation, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.energy, energy, rtol=1e-5, atol=1e-6)


def test_utterance_vectors_are_means_over_the_valid_frames():
    train = float32(shared_latent(400))
    check = ModalityCheck(DIMS).fit(train)
    sequences = float32(shared_latent(6, seed=1, steps=5))
    lengths = torch.tensor([5, 1, 2, 3, 4, 5])
    means = {name: torch.stack([x[b, : lengths[b]].mean(dim=0) for b in range(6)]) for name, x in sequences.items()}
    same(check.check(sequences, lengths), check.check(means), tolerance=1e-5)


def test_pooling_mean_std_puts_the_standard_deviation_over_frames_beside_the_mean():
    train, fresh = shared_latent(600, steps=6), shared_latent(20, seed=1, steps=6)
    lengths = np.random.default_rng(2).integers(1, 7, size=20)
    check = ModalityCheck(DIMS, pooling="mean_std").double().fit(train)
    fitted = [np.hstack([x.mean(axis=1), x.std(axis=1)]) for x in train.values()]
    vectors = [
        np.stack([np.hstack([s[:k].mean(axis=0), s[:k].std(axis=0)]) for s, k in zip(x, lengths, strict=True)])
        for x in fresh.values()
    ]
    rho, energy, _ = oracle_statistics(fitted, vectors)
    result = check.check(fresh, lengths)
    np.testing.assert_allclose(result.correlation.numpy(), rho, rtol=0, atol=1e-8)
    np.testing.assert_allclose(result.energy.numpy(), energy, rtol=1e-8)


def test_half_precision_frames_are_summed_in_single_precision():
    train = float32({name: 1000.0 * x for name, x in shared_latent(400).items()})
    check = ModalityCheck(DIMS).fit(train)
    frame = {name: x[:4].half() for name, x in train.items()}
    long = {name: x[:, None].expand(-1, 300, -1) for name, x in frame.items()}  # sums of 10^6, float16 ends at 65504
    same(check.check(long), check.check({name: x.float() for name, x in frame.items()}), tolerance=1e-4)


# --- calibration and conformal p-values ---


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("n", [7, 300, 5000], ids=["fewer than folds", "all", "more than are scored"])
def test_each_calibration_sample_is_scored_by_the_folds_without_it(n, missing):
    dims = {"a": 2, "b": 3}
    train = shared_latent(n, dims)
    there = random_mask(n, 2, 5) if missing and n > 7 else np.ones((n, 2), dtype=bool)
    check = ModalityCheck(dims, alpha=0.5).double().fit(train, available=there)
    rho, energy, _ = oracle_calibration(list(train.values()), there)
    scored = np.zeros(n, dtype=bool)
    scored[np.random.default_rng(0).choice(n, min(n, 4096), replace=False)] = True

    def check_scores(scores, count, wanted):
        assert int(count) == len(wanted)
        np.testing.assert_allclose(scores[: len(wanted)].numpy(), np.sort(wanted), rtol=1e-7, atol=1e-9)

    check_scores(check.pair_scores[0], check.pair_count[0], rho[scored & there.all(axis=1), 0])
    for m in range(2):
        check_scores(check.energy_scores[m], check.energy_count[m], energy[scored & there[:, m], m])


def oracle_energy_p_value(calibration, energy):
    """Twice the smaller of the shares of calibration samples with as much as half, or as little as twice the energy."""
    high = np.sum(calibration >= energy / 2)
    low = np.sum(calibration <= 2 * energy)
    high += calibration.max() / (energy / 2) if energy / 2 > calibration.max() else 1
    low += 2 * energy / calibration.min() if 2 * energy < calibration.min() else 1
    return min(1.0, 2 * min(high, low) / (len(calibration) + 1))


def oracle_pair_p_value(own, own_there, rho, m, others, rule):
    """p-value of modality m of one sample with values ``rho`` of its pairs, against ``others``, by counting."""
    if not others:
        return 1.0
    column = {frozenset(pair): p for p, pair in enumerate(itertools.combinations(range(own_there.shape[1]), 2))}

    def ranks(rho, j):
        """Share of the calibration samples with both modalities that correlate no better than each row of ``rho``."""
        p, both = column[frozenset((m, j))], own_there[:, [m, j]].all(axis=1)
        return (own[both, p] <= rho[:, p, None]).mean(axis=1)

    reduce = np.max if rule == "all" else np.min
    alike = own[own_there[:, [m, *others]].all(axis=1)]
    scores = reduce([ranks(np.vstack([alike, rho]), j) for j in others], axis=0)
    return np.mean(scores <= scores[-1])


def oracle_edges(excess):
    """Near and far edges of what the calibration samples show, 5 % and 5 % of 18 tails of it outside."""
    far = 0.05 / 18  # twice six surprises, five detectors and not belonging
    above = [np.quantile(excess, 1 - share, method="higher") for share in (0.05, far)]
    below = [-np.quantile(excess, share, method="lower") for share in (0.05, far)]
    return np.maximum(above, 0.05), np.maximum(below, 0.05)


def oracle_surprise(excess, edges):
    """log p in units of log(0.05/18): 0 at the median, linear to the near and to the far edge, and beyond."""
    near, far = edges[0] if excess > 0 else edges[1]
    if abs(excess) >= far:
        return abs(excess) / far
    return np.interp(abs(excess), [0, near, far], [0, np.log(0.05) / np.log(0.05 / 18), 1])


def oracle_median(values):
    return np.quantile(values, 0.5, method="inverted_cdf")


class CombinedOracle:
    """The combined check of utterances of one frame, whose only symptoms are the level and not belonging."""

    def __init__(self, calibration, there, rule, power, alpha=0.05):
        _, energy, self.likelihood = calibration
        # Half of 0.05 for a comparison that finds half of the swapped modalities, else one tail of 18.
        self.share = np.where(power >= 0.5, 0.025, 0.05 / 18)
        self.there, self.rule, self.alpha = there, rule, alpha
        level, fold = np.log(energy), fold_of(len(there))
        self.own, self.combined, self.center, self.edges = [], [], [], []
        for m in range(there.shape[1]):
            own, combined = [], []
            for b in np.flatnonzero(there[:, m]):
                unseen = level[there[:, m] & (fold != fold[b]), m]
                center = oracle_median(unseen)
                own.append(oracle_surprise(level[b, m] - center, oracle_edges(unseen - center)))
                others = [j for j in np.flatnonzero(there[b]) if j != m]
                combined.append(max(own[-1], self.not_belonging(self.likelihood[b], m, others)))
            self.own.append(np.array(own))
            self.combined.append(np.array(combined))
            self.center.append(oracle_median(level[there[:, m], m]))
            self.edges.append(oracle_edges(level[there[:, m], m] - self.center[-1]))

    def not_belonging(self, likelihood, m, others):
        p_value = oracle_pair_p_value(self.likelihood, self.there, likelihood, m, others, self.rule)
        return np.log(p_value) / np.log(self.share[m])

    @staticmethod
    def rank(score, known):
        beyond = known.max() / score if score > known.max() else 1
        return (np.sum(known >= score) + beyond) / (len(known) + 1)

    def judge(self, energy, likelihood, there):
        """p-values (M,) and reasons (M,) of one sample."""
        excess = np.log(energy) - self.center
        excess = np.sign(excess) * np.maximum(np.abs(excess) - np.log(2), 0)
        own = [oracle_surprise(excess[m], self.edges[m]) for m in range(len(there))]
        trusted = [there[m] and self.rank(own[m], self.own[m]) >= self.alpha for m in range(len(there))]
        p_value, reason = np.zeros(len(there)), np.full(len(there), "none", dtype=object)
        for m in np.flatnonzero(there):
            foreign = self.not_belonging(likelihood, m, [j for j in np.flatnonzero(trusted) if j != m])
            p_value[m] = self.rank(max(own[m], foreign), self.combined[m])
            if p_value[m] < self.alpha:
                level = "too loud" if excess[m] > 0 else "too quiet"
                reason[m] = "does not belong" if foreign > own[m] else level
        return p_value, reason


def oracle_p_values(calibration, calibration_there, rho, energy, available, *, rule, statistic):
    """(B, M) p-values by counting, one sample at a time, with the correlation or the energy by itself."""
    own_rho, own_energy, _ = calibration
    result = np.zeros(available.shape)
    for b, there in enumerate(available):
        for m in np.flatnonzero(there):
            others = [j for j in np.flatnonzero(there) if j != m]
            result[b, m] = (
                oracle_energy_p_value(own_energy[calibration_there[:, m], m], energy[b, m])
                if statistic == "energy"
                else oracle_pair_p_value(own_rho, calibration_there, rho[b], m, others, rule)
            )
    return result


def oracle_power(train, there, rule, alpha=0.05):
    """(M,) share of samples in which the correlation rejects a modality that comes from the sample half a fold away."""
    own, _, _ = oracle_calibration(train, there)
    fold = fold_of(len(there))
    found = [[] for _ in train]
    for f, (m, alarms) in itertools.product(range(10), enumerate(found)):
        inside = fold == f
        swap = np.arange(inside.sum()) - inside.sum() // 2  # negative indices count from the end
        vectors, available = [x[inside] for x in train], there[inside]
        vectors[m] = vectors[m][swap]
        available[:, m] = available[swap, m]
        rho, _, _ = oracle_statistics([x[~inside] for x in train], vectors, there[~inside])
        for b in np.flatnonzero(available[:, m]):
            others = [j for j in np.flatnonzero(available[b]) if j != m]
            alarms.append(oracle_pair_p_value(own, there, rho[b], m, others, rule) < alpha)
    return np.array([np.mean(alarms) for alarms in found])


def random_mask(n, modalities, seed):
    return np.random.default_rng(seed).random((n, modalities)) < 0.7


def partly_related(n, *, seed=0):
    """Audio and face have much in common, text has little with either."""
    features = shared_latent(n, seed=seed, noise=0.2)
    features["text"] += 2.5 * np.random.default_rng(1000 + seed).normal(size=features["text"].shape)
    return features


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("rule", ["all", "any"])
def test_correlation_power_is_the_share_of_swapped_modalities_that_are_found(rule, missing):
    train = partly_related(330)  # folds of odd and of even size
    there = random_mask(330, 3, 5) if missing else np.ones((330, 3), dtype=bool)
    check = ModalityCheck(DIMS, rule=rule, statistic="correlation").double().fit(train, available=there)
    wanted = oracle_power(list(train.values()), there, rule)
    assert 0 < wanted[0] < 0.5 < wanted[1:].max() < 1
    np.testing.assert_allclose(check.correlation_power_.numpy(), wanted, rtol=1e-6)


def faulty(train):
    """Fresh samples, some of them with noisy audio, loud text, a silent face or the audio of others."""
    fresh = partly_related(60, seed=1)
    fresh["audio"][:20] += 3 * np.random.default_rng(0).normal(size=(20, 6))
    fresh["text"][10:15] *= 50.0
    fresh["face"][20:40] = train["face"].mean(axis=0) + 0.05 * np.random.default_rng(1).normal(size=(20, 5))
    fresh["audio"][40:] = fresh["audio"][:39:-1].copy()
    return fresh


@pytest.mark.parametrize("missing_in_training", [False, True])
@pytest.mark.parametrize("statistic", ["correlation", "energy"])
@pytest.mark.parametrize("rule", ["all", "any"])
def test_p_values_are_counts_over_the_calibration_samples(rule, statistic, missing_in_training):
    train = partly_related(300)
    fresh = faulty(train)
    there = random_mask(300, 3, 5) if missing_in_training else np.ones((300, 3), dtype=bool)
    check = ModalityCheck(DIMS, rule=rule, statistic=statistic).double().fit(train, available=there)
    calibration = oracle_calibration(list(train.values()), there)
    rho, energy, _ = oracle_statistics(list(train.values()), list(fresh.values()), there)
    for available in (np.ones((60, 3), dtype=bool), random_mask(60, 3, 6)):
        result = check.check(fresh, available=available)
        wanted = oracle_p_values(calibration, there, rho, energy, available, rule=rule, statistic=statistic)
        np.testing.assert_allclose(result.p_value.numpy(), wanted, rtol=1e-6)
        assert np.array_equal(result.effective.numpy(), available & (wanted >= 0.05))
        assert 0 < result.effective.sum() < available.sum()


@pytest.mark.parametrize("missing_in_training", [False, True])
@pytest.mark.parametrize("rule", ["all", "any"])
def test_the_combined_check_ranks_the_largest_surprise(rule, missing_in_training):
    train = partly_related(300)
    fresh = faulty(train)
    there = random_mask(300, 3, 5) if missing_in_training else np.ones((300, 3), dtype=bool)
    check = ModalityCheck(DIMS, rule=rule).double().fit(train, available=there)
    power = check.correlation_power_.numpy()
    assert power.min() < 0.5 < power.max()
    oracle = CombinedOracle(oracle_calibration(list(train.values()), there), there, rule, power)
    _, energy, likelihood = oracle_statistics(list(train.values()), list(fresh.values()), there)
    for available in (np.ones((60, 3), dtype=bool), random_mask(60, 3, 6)):
        result = check.check(fresh, available=available)
        p_value, reason = zip(*map(oracle.judge, energy, likelihood, available), strict=True)
        np.testing.assert_allclose(result.p_value.numpy(), np.array(p_value), rtol=1e-6)
        assert np.array_equal(result.effective.numpy(), available & (np.array(p_value) >= 0.05))
        assert np.array_equal(np.array(check.reasons)[result.reason.numpy()], np.array(reason))
        assert {"none", "too loud", "too quiet", "does not belong"} == set(np.array(reason).flat)


def test_a_correlation_with_power_finds_a_mismatch_of_ordinary_energy():
    train, fresh = (float32(shared_latent(n, seed=seed, noise=0.1)) for seed, n in enumerate((2000, 1000)))
    mismatched = {**fresh, "audio": fresh["audio"].roll(1, 0)}
    combined, by_energy = (ModalityCheck(DIMS, statistic=s).fit(train) for s in ("combined", "energy"))
    assert combined.correlation_power_.min() > 0.9
    assert combined.check(mismatched).effective[:, 1].float().mean() < 0.1
    assert combined.check(fresh).effective[:, 1].float().mean() > 0.93
    assert by_energy.check(mismatched).effective[:, 1].float().mean() > 0.98


def test_a_modality_that_is_never_there_has_no_correlation_power():
    check = ModalityCheck(DIMS).fit({**float32(shared_latent(400, noise=0.1)), "face": None})
    assert check.correlation_power_[2] == 0
    assert check.correlation_power_[:2].min() > 0.5


@pytest.mark.parametrize("dims", [{"a": 5, "b": 4}, DIMS], ids=["two modalities", "three"])
def test_rule_all_is_the_exact_conformal_p_value_of_ranking_all_n_plus_1_samples_together(dims):
    train, fresh = shared_latent(200, dims), shared_latent(60, dims, seed=1, noise=1.2)
    result = ModalityCheck(dims, statistic="correlation").double().fit(train).check(fresh)
    own, _, _ = oracle_calibration(list(train.values()))
    pairs = list(itertools.combinations(range(len(dims)), 2))
    for b, row in enumerate(result.correlation.numpy()):
        ranks = scipy.stats.rankdata(np.vstack([own, row]), axis=0)
        for m in range(len(dims)):
            score = ranks[:, [p for p, pair in enumerate(pairs) if m in pair]].max(axis=1)
            np.testing.assert_allclose(result.p_value[b, m], np.mean(score <= score[-1]), rtol=1e-6)


def test_energies_beyond_the_calibration_samples_are_ordered_by_how_far_they_are():
    train = shared_latent(300)
    check = ModalityCheck(DIMS, statistic="energy").double().fit(train)
    center, direction = check.center_0.numpy(), np.random.default_rng(0).normal(size=8)
    scale = np.array([1e4, 1e3, 1e2, 1e-2, 1e-3, 1e-4])
    p_value = check.check({"text": center + scale[:, None] * direction}).p_value[:, 0].numpy()
    assert p_value.max() < 1 / 301
    np.testing.assert_allclose(p_value[1:3] / p_value[:2], 100.0, rtol=1e-6)  # energy goes with the square of the scale
    np.testing.assert_allclose(p_value[3:5] / p_value[4:], 100.0, rtol=1e-6)
    assert check.check({"text": center[None]}).p_value[0, 0] == 0.0


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_calibration_sample_of_exactly_half_or_twice_the_energy_counts_as_no_less_odd(factor):
    check = ModalityCheck(DIMS, statistic="energy").fit(float32(shared_latent(100)))
    fresh = rows_of(float32(shared_latent(1, seed=1)), slice(1))
    check.energy_scores[:] = factor * check.check(fresh).energy.T
    assert check.check(fresh).p_value.tolist() == [[1.0] * 3]


# --- error rates on clean and on bad data ---


def false_alarm_interval(calibration, samples, share):
    """99% interval of the number of false alarms among fresh samples, when p < share raises one.

    The calibration set is a sample too. If the p-values below the share are those of r of the n + 1 ranks, the chance
    of a false alarm, given the calibration set, is the sum of r spacings of n uniform variables: Beta(r, n + 1 - r).
    The count is therefore beta-binomial, wider than the binomial interval of the share, its limit for n to infinity.
    For rule "all" with three modalities this is an approximation, because the ranks come from the same n samples; so it
    is with cross-fitting, because a fold's projections know a tenth less than the final ones do.
    """
    ranks = math.ceil(share * (calibration + 1)) - 1
    return scipy.stats.betabinom.interval(0.99, samples, ranks, calibration + 1 - ranks)


@pytest.fixture(scope="module")
def clean():
    """Training data of which 4096 samples calibrate, and 10 000 fresh samples."""
    return float32(shared_latent(20480)), float32(shared_latent(10_000, seed=1))


@pytest.mark.parametrize("rule", ["all", "any"])
@pytest.mark.parametrize(("statistic", "least"), [("correlation", 0.8), ("energy", 0.0), ("combined", 0.25)])
def test_false_alarms_on_fresh_clean_data_are_alpha_or_somewhat_fewer(clean, statistic, least, rule):
    # The level is judged with leniency, alone or as one symptom of the combined check.
    train, fresh = clean
    alpha, n, samples = 0.05, 4096, 10_000
    check = ModalityCheck(DIMS, statistic=statistic, alpha=alpha, rule=rule).fit(train)
    assert check.energy_count.tolist() == [n] * 3
    assert check.correlation_power_.min() > 0.5
    low = false_alarm_interval(n, samples, least * alpha)[0] if least else 0
    _, high = false_alarm_interval(n, samples, alpha)
    for alarms in (~check.check(fresh).effective).sum(dim=0).tolist():
        assert low <= alarms <= high


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_false_alarms_follow_alpha(clean, alpha):
    train, fresh = clean
    check = ModalityCheck({"text": 8, "audio": 6}, statistic="correlation", alpha=alpha)
    check.fit({name: train[name] for name in ("text", "audio")})
    low, high = false_alarm_interval(4096, 10_000, alpha)
    alarms = (~check.check({name: fresh[name] for name in ("text", "audio")}).effective).sum(dim=0).tolist()
    assert alarms[0] == alarms[1]  # two modalities share their only correlation
    assert low <= alarms[0] <= high


def recordings(count, size, *, seed):
    """Samples whose vectors are mostly their recording's, recording after recording; 70 features in all."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(
            np.repeat(rng.normal(size=(count, d)), size, axis=0) + 0.3 * rng.normal(size=(count * size, d))
        ).float()
        for name, d in {"a": 40, "b": 30}.items()
    }


@pytest.mark.parametrize("statistic", ["correlation", "combined"])
def test_new_recordings_raise_no_more_than_alpha_false_alarms(statistic):
    # 128 recordings hardly determine 70 features: projections fit the recordings they were learned from best.
    train, new = recordings(128, 16, seed=0), recordings(400, 5, seed=1)
    shuffled = rows_of(train, np.random.default_rng(2).permutation(2048))  # every fold knows every recording
    contiguous, random = (
        (~ModalityCheck({"a": 40, "b": 30}, statistic=statistic).fit(data).check(new).effective).float().mean(dim=0)
        for data in (train, shuffled)
    )
    assert contiguous.max() <= 0.05
    assert random.min() > 3 * 0.05


def with_noise(features, modality, *, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {**features, modality: KINDS["gaussian_noise"](features[modality], generator=generator)}  # SNR 0.01


@pytest.mark.parametrize("statistic", ["energy", "combined"])
@pytest.mark.parametrize("modality", DIMS)
def test_noise_of_snr_one_hundredth_is_found_in_99_percent(clean, modality, statistic):
    train, fresh = clean
    effective = ModalityCheck(DIMS, statistic=statistic).fit(train).check(with_noise(fresh, modality)).effective
    m = list(DIMS).index(modality)
    assert effective[:, m].float().mean() <= 0.01
    alarms = (~effective).sum(dim=0)[[j for j in range(3) if j != m]]
    assert alarms.max() <= false_alarm_interval(4096, 10_000, 0.05)[1]


@pytest.mark.parametrize("rule", ["all", "any"])
def test_a_modality_with_the_energy_of_noise_is_no_longer_compared_with(clean, rule):
    train, fresh = clean
    noisy, without = with_noise(fresh, "audio"), {**fresh, "audio": None}
    _, high = false_alarm_interval(4096, 10_000, 0.05)
    good = [0, 2]
    by_correlation = ModalityCheck(DIMS, statistic="correlation", rule=rule).fit(train)
    assert (~by_correlation.check(noisy).effective[:, good]).sum(dim=0).min() > 1.25 * high
    combined = ModalityCheck(DIMS, rule=rule).fit(train)
    p_value = combined.check(noisy).p_value
    assert (p_value[:, good] < 0.05).sum(dim=0).max() <= high
    bad = ~ModalityCheck(DIMS, statistic="energy").fit(train).check(noisy).effective[:, 1]
    assert bad.float().mean() > 0.99
    assert torch.equal(p_value[bad][:, good], combined.check(without).p_value[bad][:, good])


def test_the_p_value_ranks_noise_above_clean_modalities(clean):
    train, fresh = clean
    noisy, truth = paper_protocol(fresh, 0)
    p_value = ModalityCheck(DIMS).fit(train).check(noisy).p_value
    for m in range(3):
        assert auroc(-p_value[:, m].numpy(), truth[:, m].numpy()) >= 0.999


def test_one_bad_modality_discredits_the_others_only_under_rule_any(clean):
    train, fresh = clean
    mismatched = {**rows_of(fresh, slice(2000)), "audio": fresh["audio"][2000:4000]}
    kept = {
        rule: ModalityCheck(DIMS, statistic="correlation", rule=rule).fit(train).check(mismatched).effective
        for rule in ("all", "any")
    }
    assert kept["all"][:, [0, 2]].float().mean() > 0.9
    assert kept["any"][:, [0, 2]].float().mean() < kept["all"][:, [0, 2]].float().mean() - 0.2


def at_level(features, modality, energy, center):
    """The modality with so many times its energy."""
    return {**features, modality: center + math.sqrt(energy) * (features[modality] - center)}


@pytest.mark.parametrize("statistic", ["energy", "combined"])
def test_silence_has_too_little_energy(clean, statistic):
    train, fresh = clean
    check = ModalityCheck(DIMS, statistic=statistic).fit(train)
    silent = check.check(at_level(fresh, "face", 0.0, train["face"].mean(dim=0)))
    assert not silent.effective[:, 2].any()
    assert bool((silent.reason[:, 2] == check.reasons.index("too quiet")).all())
    assert silent.energy[:, 2].max() < 1e-6
    assert (~silent.effective).sum(dim=0)[:2].max() <= false_alarm_interval(4096, 10_000, 0.05)[1]


@pytest.mark.parametrize("statistic", ["energy", "combined"])
def test_half_and_twice_the_energy_are_no_alarm_but_a_tenth_and_ten_times_are(statistic):
    dims = {"text": 60, "audio": 50, "face": 40}
    train, fresh = float32(shared_latent(4096, dims)), float32(shared_latent(5000, dims, seed=1))
    check, center = ModalityCheck(dims, statistic=statistic).fit(train), train["face"].mean(dim=0)
    clean = check.check(fresh)
    # At half or twice the energy one side tests it as it is, at alpha/2, and the other is out of reach.
    alarms = {"energy": 0.5 * 0.05, "combined": 0.05}[statistic]
    for factor in (0.5, 2.0):
        result = check.check(at_level(fresh, "face", factor, center))
        torch.testing.assert_close(result.energy[:, 2], factor * clean.energy[:, 2], rtol=1e-3, atol=1e-5)
        assert (~result.effective[:, 2]).sum() <= false_alarm_interval(4096, 5000, alarms)[1]
    for factor in (0.1, 10.0):
        result = check.check(at_level(fresh, "face", factor, center))
        assert not result.effective[:, 2].any()
        assert (~result.effective[:, :2]).sum(dim=0).max() <= false_alarm_interval(4096, 5000, 0.05)[1]


def test_a_few_samples_recognise_gross_noise():
    check = ModalityCheck(DIMS)
    with pytest.warns(UserWarning, match="too few"):
        check.fit(float32(shared_latent(20)))
    fresh = float32(shared_latent(500, seed=1))
    fresh["audio"] += 100 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    effective = check.check(fresh).effective.float().mean(dim=0)
    assert effective[1] <= 0.01
    assert effective[[0, 2]].min() >= 1 - 2 / 21


def test_real_utterances_and_noise_are_separated():
    corpus = utterance_csv.read(real_data("mosi_utterance"))
    dims = {name: x.shape[2] for name, x in corpus.features.items()}
    standardizer = Standardizer(dims)

    def standardized(split):
        rows = corpus.split == split
        batch = standardizer(rows_of(corpus.features, rows), corpus.lengths[rows], corpus.available[rows])
        return dict(zip(dims, batch.features, strict=True))

    standardizer.fit(rows_of(corpus.features, corpus.split == "train"))
    check, test = ModalityCheck(dims).fit(standardized("train")), standardized("test")
    assert check.correlation_power_.max() < 0.5  # its modalities are too weakly related to vouch for one another
    area, detected, alarms = [], [], []
    for seed in range(5):
        noisy, truth = paper_protocol(test, seed)
        result = check.check(noisy)
        area.append([auroc(-result.p_value[:, m].numpy(), truth[:, m].numpy()) for m in range(3)])
        lost = ~result.effective
        detected.append([lost[truth[:, m], m].float().mean().item() for m in range(3)])
        alarms.append([lost[~truth[:, m], m].float().mean().item() for m in range(3)])
    assert np.mean(area, axis=0).min() >= 0.99
    assert np.mean(detected, axis=0).min() >= 0.99
    assert np.mean(alarms, axis=0).max() <= 0.07
    assert np.mean(alarms) <= 0.07


# --- the paper's threshold ---


@pytest.mark.parametrize("rule", ["all", "any"])
@pytest.mark.parametrize("threshold", [0.3, (0.1, 0.5, 0.9)])
def test_threshold_compares_the_correlation_itself(rule, threshold):
    train, fresh = float32(shared_latent(400)), float32(shared_latent(200, seed=1, noise=1.5))
    available = random_mask(200, 3, 4)
    check = ModalityCheck(DIMS, statistic="correlation", threshold=threshold, rule=rule).fit(train)
    result = check.check(fresh, available=available)
    tau = np.broadcast_to(threshold, 3)
    wanted = available.copy()
    for b in range(200):
        for m in np.flatnonzero(available[b]):
            others = [p for p, pair in enumerate(PAIRS) if m in pair and available[b, list(pair)].all()]
            passed = [float(result.correlation[b, p]) >= tau[p] for p in others]
            wanted[b, m] = not passed or (any(passed) if rule == "all" else all(passed))
    assert 0 < wanted.sum() < available.sum()
    assert np.array_equal(result.effective.numpy(), wanted)
    by_itself = ModalityCheck(DIMS, ignore=("belonging",)).fit(train).check(fresh, available=available)
    assert 0 < by_itself.effective.sum() < available.sum()
    trusted = check.check(fresh, available=by_itself.effective)  # modalities that are odd are not compared with
    combined = ModalityCheck(DIMS, statistic="combined", threshold=threshold, rule=rule).fit(train)
    both = combined.check(fresh, available=available)
    assert torch.equal(both.effective, trusted.effective)
    assert torch.equal(both.p_value, by_itself.p_value)


def test_undefined_correlation_is_below_every_threshold():
    train = float32(shared_latent(400))
    check = ModalityCheck(DIMS, statistic="correlation", threshold=-1.0).fit(train)
    fresh = {"text": check.center_0[None], "audio": train["audio"][:1]}  # the projected text does not vary
    result = check.check(fresh)
    assert result.correlation[0].tolist() == [0.0, 0.0, 0.0]
    assert result.effective.tolist() == [[False, False, False]]


# --- training data with missing or constant modalities ---


def test_a_pair_never_seen_together_is_no_evidence():
    train = float32(shared_latent(600))
    there = np.ones((600, 3), dtype=bool)
    there[:300, 0] = False
    there[300:, 1] = False
    check = ModalityCheck(DIMS, statistic="correlation").fit(train, available=there)
    fresh = float32(shared_latent(20, seed=1))
    result = check.check({"text": fresh["text"], "audio": fresh["audio"]})
    assert_finite(result)
    assert not result.correlation.any()
    assert result.p_value.tolist() == [[1.0, 1.0, 0.0]] * 20
    assert result.effective.tolist() == [[True, True, False]] * 20
    whole = check.check(fresh)
    without_audio = check.check({"text": fresh["text"], "face": fresh["face"]})
    torch.testing.assert_close(whole.p_value[:, 0], without_audio.p_value[:, 0])  # audio is no evidence about text
    assert whole.p_value.min() < 0.5


@pytest.mark.parametrize("statistic", ["correlation", "energy", "combined"])
def test_a_modality_never_seen_is_not_judged(statistic):
    train, fresh = float32(shared_latent(400)), float32(shared_latent(20, seed=1))
    check = ModalityCheck(DIMS, statistic=statistic).fit({**train, "face": None})
    result = check.check(fresh)
    assert_finite(result)
    assert result.p_value[:, 2].tolist() == [1.0] * 20
    assert bool(result.effective[:, 2].all())
    two = ModalityCheck({"text": 8, "audio": 6}, statistic=statistic).fit({n: train[n] for n in ("text", "audio")})
    alone = two.check({name: fresh[name] for name in ("text", "audio")})
    torch.testing.assert_close(result.p_value[:, :2], alone.p_value)


@pytest.mark.parametrize("statistic", ["correlation", "energy", "combined"])
def test_a_constant_modality_is_no_evidence(statistic):
    train, fresh = float32(shared_latent(400)), float32(shared_latent(20, seed=1))
    train["face"][:], fresh["face"][:] = 3.0, 3.0
    result = ModalityCheck(DIMS, statistic=statistic).fit(train).check(fresh)
    assert_finite(result)
    assert not result.correlation[:, 1:].any()
    assert not result.energy[:, 2].any()
    assert bool(result.effective[:, 2].all())


def test_one_feature_has_no_correlation_over_components_but_an_energy():
    dims = {"text": 8, "pitch": 1}
    train = float32(shared_latent(400, dims))
    check = ModalityCheck(dims).fit(train)
    fresh = rows_of(float32(shared_latent(20, dims, seed=1)), slice(20))
    fresh["pitch"][0] += 100.0
    result = check.check(fresh)
    assert_finite(result)
    assert not result.correlation.any()
    assert not result.effective[0, 1]
    assert result.effective.float().mean() > 0.8


def test_a_pair_whose_correlation_is_undefined_hides_no_other():
    dims = {"text": 8, "audio": 6, "pitch": 1}
    train, fresh = float32(shared_latent(400, dims)), float32(shared_latent(30, dims, seed=1))
    check = ModalityCheck(dims, statistic="correlation").fit(train)
    whole, without_pitch = check.check(fresh), check.check({**fresh, "pitch": None})
    assert torch.equal(whole.p_value[:, :2], without_pitch.p_value[:, :2])
    assert whole.p_value[:, :2].min() < 0.5
    assert whole.p_value[:, 2].tolist() == [1.0] * 30


def test_fewer_samples_than_features_is_ordinary_input():
    dims = {"text": 150, "audio": 120, "face": 30}
    check = ModalityCheck(dims).fit(float32(shared_latent(100, dims)))
    assert [check.learned(f"left_{p}").shape[0] for p in range(3)] == [99, 30, 30]
    fresh = float32(shared_latent(20, dims, seed=1))
    fresh["audio"] = fresh["audio"] + 50 * torch.randn(20, 120, generator=torch.Generator().manual_seed(0))
    result = check.check(fresh)
    assert_finite(result)
    assert not result.effective[:, 1].any()


@pytest.mark.parametrize("samples", [1, 2])
def test_samples_that_no_other_fold_can_score_judge_nothing(samples):
    check = ModalityCheck(DIMS)
    with pytest.warns(UserWarning, match="0 calibration samples .*: no modality can be judged ineffectual") as caught:
        check.fit(rows_of(float32(shared_latent(10)), slice(samples)))
    assert caught[0].filename == __file__  # it points at the caller of fit
    result = check.check(float32(shared_latent(20, seed=1)))
    assert_finite(result)
    assert bool(result.effective.all())


def test_a_modality_seen_in_one_fold_only_is_not_judged():
    train, there = float32(shared_latent(640)), np.ones((640, 3), dtype=bool)
    there[10:, 2] = False  # the face is there in one block
    check = ModalityCheck(DIMS).fit(train, available=there)
    assert check.energy_count.tolist() == [640, 640, 0]
    result = check.check(float32(shared_latent(100, seed=1)))
    assert_finite(result)
    assert result.p_value[:, 2].tolist() == [1.0] * 100
    assert result.effective.float().mean() > 0.9


def fit_warning(check, samples, available=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check.fit(float32(shared_latent(samples)), available=available)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("statistic", ["energy", "combined"])
def test_the_warning_comes_exactly_when_more_than_alpha_of_clean_samples_may_be_lost(statistic):
    # A sample with more or less energy than all n calibration samples has, each with a chance of 1/(n + 1), may have
    # any p-value: 2/40 is within alpha.
    assert fit_warning(ModalityCheck(DIMS, statistic=statistic), 39) == []
    assert fit_warning(ModalityCheck(DIMS, statistic=statistic), 38) == [
        "38 calibration samples are too few for alpha=0.05: up to 0.051 of clean samples may lose a modality"
    ]
    there = np.ones((400, 3), dtype=bool)
    there[38:, 1] = False  # the modality with the fewest counts
    assert fit_warning(ModalityCheck(DIMS, statistic=statistic), 400, there)[0].startswith("38 calibration samples")
    there[:, 1] = False  # one that is never there is not judged at all
    assert not any("calibration" in text for text in fit_warning(ModalityCheck(DIMS, statistic=statistic), 400, there))


def test_the_correlation_check_warns_exactly_when_it_can_judge_nothing():
    # Its smallest p-value is 1/(n + 1), which must be below alpha; a threshold needs no calibration.
    assert fit_warning(ModalityCheck(DIMS, statistic="correlation"), 20) == []
    assert fit_warning(ModalityCheck(DIMS, statistic="correlation"), 19) == [
        "19 calibration samples are too few for alpha=0.05: no modality can be judged ineffectual"
    ]
    assert fit_warning(ModalityCheck(DIMS, statistic="correlation", threshold=0.3), 19) == []


def test_two_modalities_reach_the_smallest_p_value():
    dims = {"a": 5, "b": 4}
    check = ModalityCheck(dims, statistic="correlation").fit(float32(shared_latent(200, dims)))
    left, right = check.left_0, check.right_0
    opposed = {"a": check.center_0[None] + torch.linalg.pinv(left)[:, :1].T, "b": check.center_1[None]}
    opposed["b"] = opposed["b"] - (torch.linalg.pinv(right) @ left @ torch.linalg.pinv(left)[:, :1]).T
    result = check.check(opposed)
    assert result.correlation.item() < check.pair_scores.min()
    torch.testing.assert_close(result.p_value, torch.full((1, 2), 1 / 201))


def test_no_sample_is_an_error():
    with pytest.raises(ValueError, match="no sample to fit the modality check to"):
        ModalityCheck(DIMS).fit({name: torch.zeros(0, d) for name, d in DIMS.items()})
    with pytest.raises(ValueError, match="no sample to fit the modality check to"):
        ModalityCheck(DIMS).fit([])


# --- samples with missing modalities ---


@pytest.mark.parametrize("statistic", ["correlation", "energy", "combined"])
def test_unavailable_modalities_are_not_effective_and_all_zeros(statistic):
    check = ModalityCheck(DIMS, statistic=statistic).fit(float32(shared_latent(400)))
    available = np.array(list(np.ndindex(2, 2, 2)), dtype=bool)
    result = check.check(float32(shared_latent(8, seed=1)), available=available)
    assert_finite(result)
    assert not result.effective.numpy()[~available].any()
    assert not result.p_value.numpy()[~available].any()
    assert not result.energy.numpy()[~available].any()
    for p, (i, j) in enumerate(PAIRS):
        assert np.array_equal(result.correlation[:, p].numpy() != 0, available[:, i] & available[:, j])


def test_a_lone_modality_stays_unless_its_energy_is_odd():
    check = ModalityCheck(DIMS).fit(float32(shared_latent(400)))
    lone = float32(shared_latent(200, seed=1))["text"]
    assert check.check({"text": lone}).effective[:, 0].float().mean() > 0.9
    assert not check.check({"text": lone + 1e3}).effective.any()
    by_correlation = ModalityCheck(DIMS, statistic="correlation").fit(float32(shared_latent(400)))
    assert bool(by_correlation.check({"text": lone + 1e3}).effective[:, 0].all())


def test_a_modality_missing_as_none_as_a_key_or_by_the_mask_is_the_same():
    check = ModalityCheck(DIMS).fit(float32(shared_latent(400)))
    fresh = float32(shared_latent(30, seed=1))
    mask = torch.tensor([[True, False, True]]).expand(30, -1)
    by_mask = check.check(fresh, available=mask)
    same(by_mask, check.check({**fresh, "audio": None}))
    same(by_mask, check.check({name: fresh[name] for name in ("text", "face")}))
    nan = {**fresh, "audio": torch.full((30, 6), float("nan"))}
    same(by_mask, check.check(nan))
    same(by_mask, check.check(nan, available=mask))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_values_that_are_not_finite_or_absurd_give_finite_results(value):
    train = float32(shared_latent(400, steps=3))
    train["audio"][::7, 1, 2] = float("nan")
    check = ModalityCheck(DIMS).fit(train)
    fresh = float32(shared_latent(20, seed=1, steps=3))
    clean = check.check(fresh)
    fresh["text"][::2, 0, 3] = value
    fresh["face"][1] = value
    result = check.check(fresh)
    assert_finite(result)
    untouched = torch.arange(3, 20, 2)
    same(type(clean)(*(v[untouched] for v in clean)), type(result)(*(v[untouched] for v in result)))
    assert not result.effective[1, 2]


def test_an_empty_batch_gives_empty_results():
    check = ModalityCheck(DIMS).fit(float32(shared_latent(400)))
    result = check.check({name: torch.zeros(0, 4, d) for name, d in DIMS.items()})
    assert [tuple(value.shape) for value in result] == [(0, 3)] * 5


@pytest.mark.parametrize("modalities", [2, 3, 5])
def test_any_number_of_modalities_works(modalities):
    dims = {f"m{i}": 4 + i for i in range(modalities)}
    check = ModalityCheck(dims).fit(float32(shared_latent(800, dims)))
    fresh = float32(shared_latent(300, dims, seed=1))
    fresh["m1"] = fresh["m1"] + 20 * torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    result = check.check(fresh)
    assert result.correlation.shape == (300, modalities * (modalities - 1) // 2)
    assert result.effective[:, 1].float().mean() < 0.01
    good = [m for m in range(modalities) if m != 1]
    assert result.effective[:, good].float().mean() > 0.85


# --- state ---


def test_streamed_batches_give_the_result_of_one_mapping():
    train = float32(shared_latent(500, steps=3))
    there, lengths = random_mask(500, 3, 7), np.random.default_rng(8).integers(0, 4, size=500)
    whole = ModalityCheck(DIMS).fit(train, lengths=lengths, available=there)
    cuts = [0, 1, 2, 130, 131, 400, 500]
    batches = [(rows_of(train, slice(a, b)), lengths[a:b], there[a:b]) for a, b in itertools.pairwise(cuts)]
    streamed = ModalityCheck(DIMS).fit(batches)
    # The same samples calibrate; the float64 moments are merged in other steps, hence 1e-6 rather than bit equality.
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(streamed.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    fresh = float32(shared_latent(50, seed=1))
    same(whole.check(fresh), streamed.check(fresh), tolerance=1e-5)


@pytest.mark.parametrize("cuts", [[0, 500], [0, 130, 131, 400, 500], [0, 0, 250, 500, 500]], ids=str)
def test_collected_parts_merged_in_order_give_the_result_of_fit(cuts):
    train, there = float32(shared_latent(500)), random_mask(500, 3, 7)
    whole = ModalityCheck(DIMS).fit(train, available=there)
    parts = [
        ModalityCheck(DIMS).collect(
            [clean_frames(prepare_batch(rows_of(train, slice(a, b)), available=there[a:b], input_dims=DIMS))],
            total=500,
            start=a,
        )
        for a, b in itertools.pairwise(cuts)
    ]
    collected = ModalityCheck(DIMS).fit_collected(functools.reduce(CheckSample.merge, parts))
    tolerance = 0 if len(cuts) == 2 else 1e-5  # moments that are merged in other steps round otherwise
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(collected.state_dict()[name], value, rtol=tolerance, atol=0.1 * tolerance)


def test_merging_leaves_both_parts_as_they_are():
    train = float32(shared_latent(200))
    first, second = (
        ModalityCheck(DIMS).collect(
            [clean_frames(prepare_batch(rows_of(train, slice(a, a + 100)), input_dims=DIMS))], total=200, start=a
        )
        for a in (0, 100)
    )
    states = [ModalityCheck(DIMS).fit_collected(first.merge(second)).state_dict() for _ in range(2)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_learned_state_has_these_names_in_this_order():
    of_pairs = ("left", "left_bias", "right", "right_bias", "weight", "canonical")
    names = [f"{name}_{m}" for name in ("center", "whitener") for m in range(3)]
    names += [f"{name}_{p}" for p in range(3) for name in of_pairs]
    names += ["pair_scores", "pair_count", "rank_scores", "rank_count", "energy_scores", "energy_count"]
    names += [f"likelihood_{name}" for name in ("pair_scores", "pair_count", "rank_scores", "rank_count")]
    names += [
        f"{name}_{m}" for name in ("square", "detector_center", "detector_scale", "detector_weight") for m in range(3)
    ]
    names += ["symptom_center", "symptom_above", "symptom_below"]
    names += ["own_scores", "own_count", "combined_scores", "combined_count"]
    assert list(ModalityCheck(DIMS).state_dict()) == [*names, "correlation_power_"]


def test_a_state_goes_into_an_unfitted_module_and_lacks_nothing():
    fitted = ModalityCheck(DIMS).fit(float32(shared_latent(400)))
    fresh = float32(shared_latent(30, seed=1))
    loaded = ModalityCheck(DIMS)
    assert not loaded.is_fitted
    loaded.load_state_dict(fitted.state_dict(), strict=True)
    assert loaded.is_fitted
    for first, second in zip(fitted.check(fresh), loaded.check(fresh), strict=True):
        assert torch.equal(first, second)
    for name in fitted.state_dict():
        lacking = {key: value for key, value in fitted.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=re.escape(name)):
            ModalityCheck(DIMS).load_state_dict(lacking)


def test_a_second_fit_forgets_the_first():
    other = ModalityCheck(DIMS).fit(float32(shared_latent(333, seed=4)))
    refitted = other.fit(float32(shared_latent(400)))
    once = ModalityCheck(DIMS).fit(float32(shared_latent(400)))
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in refitted.state_dict().items())


def test_fitting_changes_neither_the_data_nor_the_global_random_state():
    train = float32(shared_latent(400))
    before = {name: x.clone() for name, x in train.items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ModalityCheck(DIMS).fit(train)
    assert all(torch.equal(before[name], x) for name, x in train.items())
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002


def test_double_widens_and_half_keeps_the_verdicts():
    train, fresh = float32(shared_latent(400)), float32(shared_latent(200, seed=1))
    single = ModalityCheck(DIMS).fit(train)
    wanted = single.check(fresh)
    widened = ModalityCheck(DIMS).fit(train).double()
    result = widened.check({name: x.double() for name, x in fresh.items()})
    assert result.energy.dtype == torch.float64
    torch.testing.assert_close(result.energy.float(), wanted.energy, rtol=1e-5, atol=1e-5)
    for narrow in (ModalityCheck.half, ModalityCheck.bfloat16):
        narrowed = narrow(ModalityCheck(DIMS).fit(train))
        for first, second in zip(narrowed.check(fresh), wanted, strict=True):
            assert torch.equal(first, second)


# --- settings and errors ---


def test_settings_are_taken_by_position_and_by_name_and_shown_in_the_signature():
    parameters = inspect.signature(ModalityCheck).parameters
    assert list(parameters) == ["input_dims", *vars(CheckConfig())]
    assert all(parameters[name].default == value for name, value in vars(CheckConfig()).items())
    by_position = ModalityCheck(DIMS, 3, "energy", "any", 0.1, None, None, "mean_std", 0.5)
    by_name = ModalityCheck(
        DIMS,
        n_components=3,
        statistic="energy",
        rule="any",
        alpha=0.1,
        threshold=None,
        component_weights=None,
        pooling="mean_std",
        ridge=0.5,
    )
    assert by_position.config == by_name.config == CheckConfig(3, "energy", "any", 0.1, None, None, "mean_std", 0.5)
    with pytest.raises(TypeError, match="components"):
        ModalityCheck(DIMS, components=3)


def test_an_unfitted_check_raises():
    check = ModalityCheck(DIMS)
    with pytest.raises(NotFittedError, match="call fit with clean training data first"):
        check.check(float32(shared_latent(3)))
    assert not hasattr(check, "projections_")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_dims": {"text": 3}}, "needs two or more, got {'text': 3}"),
        ({"n_components": 0}, "n_components must be a positive int, got 0"),
        ({"statistic": "both"}, "statistic must be one of 'correlation', 'energy', 'combined', got 'both'"),
        ({"rule": "some"}, "rule must be one of 'all', 'any', got 'some'"),
        ({"alpha": 0.0}, "alpha must be a finite number in (0, 1), got 0.0"),
        ({"alpha": float("nan")}, "alpha must be a finite number in (0, 1), got nan"),
        ({"threshold": 1.5}, "threshold must be a finite number in [-1, 1], got 1.5"),
        ({"threshold": (0.1, 0.2)}, "threshold has 2 values, wanted one for 3 pairs"),
        ({"component_weights": "sqrt"}, "component_weights must be one of 'canonical', None, got 'sqrt'"),
        ({"pooling": "max"}, "pooling must be one of 'mean', 'mean_std', got 'max'"),
        ({"ridge": -1.0}, "ridge must be a finite number ≥ 0, got -1.0"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModalityCheck(**{"input_dims": DIMS, **arguments})


def test_bad_features_are_named():
    check = ModalityCheck(DIMS).fit(float32(shared_latent(400)))
    with pytest.raises(ValueError, match=re.escape("features['audio'] has shape (4, 7), wanted (B, T, 6)")):
        check.check({"audio": torch.zeros(4, 7)})
