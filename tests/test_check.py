"""The modality check against float64 oracles written from the method, and its promises on data it has not seen."""

import itertools
import math
import re
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.exceptions import NotFittedError

from m3er_fast import ModalityCheck, functional

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


def calibration_mask(n, alpha=0.05):
    """Which of n training samples calibrate: the documented share, chosen with seed 0."""
    size = min(4096, max(n // 5, min(n // 2, math.ceil(8 / alpha))))
    mask = np.zeros(n, dtype=bool)
    mask[np.random.default_rng(0).permutation(n)[:size]] = True
    return mask


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


def oracle_statistics(train, vectors, *, ridge=1e-3, weighted=True, n_components=100):
    """ρ (B, P) and energy (B, M) in float64: symmetric inverse square roots, np.corrcoef, and a solve.

    Pearson's ρ across components depends on the signs of the canonical pairs, which CCA leaves open: the entry of
    largest magnitude in the first view's direction is positive, as ``m3er_fast.cca`` documents.
    """

    def shrunk(covariance):
        return covariance + ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))

    energy, correlation = [], []
    for view, f in zip(train, vectors, strict=True):
        centred = f - view.mean(axis=0)
        covariance = shrunk(np.atleast_2d(np.cov(view.T)))
        energy.append((centred * np.linalg.solve(covariance, centred.T).T).sum(axis=1) / view.shape[1])
    for i in range(len(train)):
        for j in range(i + 1, len(train)):
            x, y = train[i] - train[i].mean(axis=0), train[j] - train[j].mean(axis=0)
            x_root = scipy.linalg.inv(scipy.linalg.sqrtm(shrunk(x.T @ x / (len(x) - 1))).real)
            y_root = scipy.linalg.inv(scipy.linalg.sqrtm(shrunk(y.T @ y / (len(x) - 1))).real)
            left, s, right = np.linalg.svd(x_root @ (x.T @ y / (len(x) - 1)) @ y_root)
            k = min(n_components, len(s))
            x_directions, y_directions = x_root @ left[:, :k], y_root @ right[:k].T
            scale = np.sqrt(s[:k]) if weighted else np.ones(k)
            signs = np.sign([column[np.abs(column).argmax()] for column in x_directions.T])
            u = (vectors[i] - train[i].mean(axis=0)) @ x_directions * scale * signs
            v = (vectors[j] - train[j].mean(axis=0)) @ y_directions * scale * signs
            correlation.append([np.corrcoef(a, b)[0, 1] for a, b in zip(u, v, strict=True)])
    return np.array(correlation).T, np.array(energy).T


@pytest.mark.parametrize("weights", ["canonical", None])
@pytest.mark.parametrize("n_components", [100, 3])
def test_correlation_and_energy_equal_the_closed_form(weights, n_components):
    train, fresh = shared_latent(900), shared_latent(50, seed=1)
    check = ModalityCheck(DIMS, component_weights=weights, n_components=n_components).double().fit(train)
    fitted = [x[~calibration_mask(900)] for x in train.values()]
    rho, energy = oracle_statistics(
        fitted, list(fresh.values()), weighted=weights == "canonical", n_components=n_components
    )
    result = check.check(fresh)
    np.testing.assert_allclose(result.correlation.numpy(), rho, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.energy.numpy(), energy, rtol=1e-9)
    single = ModalityCheck(DIMS, component_weights=weights, n_components=n_components).fit(train).check(float32(fresh))
    np.testing.assert_allclose(single.correlation.numpy(), rho, rtol=0, atol=2e-5)
    np.testing.assert_allclose(single.energy.numpy(), energy, rtol=2e-5)


def test_ridge_is_taken_as_given():
    train, fresh = shared_latent(900), shared_latent(50, seed=1)
    result = ModalityCheck(DIMS, ridge=0.5).double().fit(train).check(fresh)
    fitted = [x[~calibration_mask(900)] for x in train.values()]
    rho, energy = oracle_statistics(fitted, list(fresh.values()), ridge=0.5)
    np.testing.assert_allclose(result.correlation.numpy(), rho, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.energy.numpy(), energy, rtol=1e-9)


def test_gate_statistics_on_the_raw_vectors_with_projections_are_the_check():
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
    fitted = [np.hstack([x.mean(axis=1), x.std(axis=1)])[~calibration_mask(600)] for x in train.values()]
    vectors = [
        np.stack([np.hstack([s[:k].mean(axis=0), s[:k].std(axis=0)]) for s, k in zip(x, lengths, strict=True)])
        for x in fresh.values()
    ]
    rho, energy = oracle_statistics(fitted, vectors)
    result = check.check(fresh, lengths)
    np.testing.assert_allclose(result.correlation.numpy(), rho, rtol=0, atol=1e-8)
    np.testing.assert_allclose(result.energy.numpy(), energy, rtol=1e-8)


def test_half_precision_frames_are_summed_in_single_precision():
    train = float32({name: 1000.0 * x for name, x in shared_latent(400).items()})
    check = ModalityCheck(DIMS).fit(train)
    frame = {name: x[:4].half() for name, x in train.items()}
    long = {name: x[:, None].expand(-1, 300, -1) for name, x in frame.items()}  # sums of 10^6, float16 ends at 65504
    same(check.check(long), check.check({name: x.float() for name, x in frame.items()}), tolerance=1e-4)


# --- conformal p-values ---


def oracle_p_values(calibration, calibration_available, rho, energy, available, *, rule, statistic, pairs=PAIRS):
    """(B, M) p-values by counting, one sample at a time."""
    cal_rho, cal_energy = calibration
    modalities = available.shape[1]
    column = {pair: p for p, pair in enumerate(pairs)} | {pair[::-1]: p for p, pair in enumerate(pairs)}
    reduce = max if rule == "all" else min

    def rank(value, m, j):
        both = calibration_available[:, m] & calibration_available[:, j]
        return np.mean(cal_rho[both, column[m, j]] <= value)

    result = np.zeros(available.shape)
    for b, there in enumerate(available):
        for m in np.flatnonzero(there):
            others = [j for j in range(modalities) if there[j] and j != m]
            by_correlation = 1.0
            if others:
                score = reduce(rank(rho[b, column[m, j]], m, j) for j in others)
                alike = calibration_available[:, [m, *others]].all(axis=1)
                scores = [reduce(rank(row[column[m, j]], m, j) for j in others) for row in cal_rho[alike]]
                by_correlation = (1 + np.sum(np.array(scores) <= score)) / (1 + len(scores))
            values = cal_energy[calibration_available[:, m], m]
            tail = min(1 + np.sum(values <= energy[b, m]), 1 + np.sum(values >= energy[b, m]))
            by_energy = min(1.0, 2 * tail / (1 + len(values)))
            result[b, m] = {
                "correlation": by_correlation,
                "energy": by_energy,
                "combined": min(1.0, 2 * min(by_correlation, by_energy)),
            }[statistic]
    return result


def random_mask(n, modalities, seed):
    return np.random.default_rng(seed).random((n, modalities)) < 0.7


@pytest.mark.parametrize("missing_in_training", [False, True])
@pytest.mark.parametrize("statistic", ["correlation", "energy", "combined"])
@pytest.mark.parametrize("rule", ["all", "any"])
def test_p_values_are_counts_over_the_calibration_samples(rule, statistic, missing_in_training):
    train, fresh = float32(shared_latent(300)), float32(shared_latent(40, seed=1))
    fresh["audio"][:10] = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)) * 3
    there = random_mask(300, 3, 5) if missing_in_training else np.ones((300, 3), dtype=bool)
    check = ModalityCheck(DIMS, rule=rule, statistic=statistic).fit(train, available=there)
    held_out = calibration_mask(300)
    calibration = check.check(rows_of(train, held_out), available=there[held_out])
    for available in (np.ones((40, 3), dtype=bool), random_mask(40, 3, 6)):
        result = check.check(fresh, available=available)
        wanted = oracle_p_values(
            (calibration.correlation.numpy(), calibration.energy.numpy()),
            there[held_out],
            result.correlation.numpy(),
            result.energy.numpy(),
            available,
            rule=rule,
            statistic=statistic,
        )
        np.testing.assert_allclose(result.p_value.numpy(), wanted, rtol=1e-6)
        assert np.array_equal(result.effective.numpy(), available & (wanted >= 0.05))


@pytest.mark.parametrize("dims", [{"a": 5, "b": 4}, DIMS], ids=["two modalities", "three"])
def test_rule_all_is_the_exact_conformal_p_value_of_ranking_all_n_plus_1_samples_together(dims):
    train, fresh = float32(shared_latent(200, dims)), float32(shared_latent(60, dims, seed=1, noise=1.2))
    check = ModalityCheck(dims, statistic="correlation").fit(train)
    own = check.check(rows_of(train, calibration_mask(200))).correlation.numpy()
    result = check.check(fresh)
    column = {(0, 1): 0} if len(dims) == 2 else {(0, 1): 0, (0, 2): 1, (1, 2): 2}
    for b, row in enumerate(result.correlation.numpy()):
        ranks = scipy.stats.rankdata(np.vstack([own, row]), axis=0)
        for m in range(len(dims)):
            score = ranks[:, [p for pair, p in column.items() if m in pair]].max(axis=1)
            np.testing.assert_allclose(result.p_value[b, m], np.mean(score <= score[-1]), rtol=1e-6)


def test_calibration_samples_do_not_shape_the_projections():
    train = float32(shared_latent(300))
    held_out = torch.from_numpy(calibration_mask(300))
    check = ModalityCheck(DIMS).fit(train)
    train["text"][held_out] *= 100.0
    changed = ModalityCheck(DIMS).fit(train)
    for first, second in zip(check.projections_, changed.projections_, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(check.energy_scores, changed.energy_scores)


# --- what it promises on clean and on bad data ---


def false_alarm_interval(calibration, samples, rejecting_ranks):
    """99% interval of the number of false alarms among fresh samples, for a p-value from n calibration samples.

    The calibration set is a sample too. If the p-values below alpha are those of r of the n + 1 ranks, the chance of a
    false alarm, given the calibration set, is the sum of r spacings of n uniform variables: Beta(r, n + 1 - r). The
    count is therefore beta-binomial, wider than the binomial interval of alpha, which is its limit for n to infinity.
    For rule "all" with three modalities this is an approximation, because the ranks come from the same n samples.
    """
    return scipy.stats.betabinom.interval(0.99, samples, rejecting_ranks, calibration + 1 - rejecting_ranks)


@pytest.fixture(scope="module")
def clean():
    """Training data of which 4096 samples calibrate, and 10 000 fresh samples."""
    return float32(shared_latent(20480)), float32(shared_latent(10_000, seed=1))


@pytest.mark.parametrize("rule", ["all", "any"])
@pytest.mark.parametrize("statistic", ["correlation", "energy", "combined"])
def test_false_alarms_on_fresh_clean_data_are_alpha(clean, statistic, rule):
    train, fresh = clean
    alpha, n, samples = 0.05, 4096, 10_000
    check = ModalityCheck(DIMS, statistic=statistic, alpha=alpha, rule=rule).fit(train)
    assert check.energy_count.tolist() == [n] * 3
    both_tails = 2 * (math.ceil(alpha * (n + 1) / 2) - 1)
    rejecting = both_tails if statistic == "energy" else math.ceil(alpha * (n + 1)) - 1
    low, high = false_alarm_interval(n, samples, rejecting)
    for alarms in (~check.check(fresh).effective).sum(dim=0).tolist():
        assert alarms <= high
        assert statistic == "combined" or alarms >= low


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_false_alarms_follow_alpha(clean, alpha):
    train, fresh = clean
    check = ModalityCheck({"text": 8, "audio": 6}, statistic="correlation", alpha=alpha)
    check.fit({name: train[name] for name in ("text", "audio")})
    low, high = false_alarm_interval(4096, 10_000, math.ceil(alpha * 4097) - 1)
    alarms = (~check.check({name: fresh[name] for name in ("text", "audio")}).effective).sum(dim=0).tolist()
    assert alarms[0] == alarms[1]  # two modalities share their only correlation
    assert low <= alarms[0] <= high


@pytest.mark.parametrize("statistic", ["energy", "combined"])
@pytest.mark.parametrize("modality", DIMS)
def test_noise_of_snr_one_hundredth_is_found_in_99_percent(clean, modality, statistic):
    train, fresh = clean
    x = fresh[modality][:2000]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    noise *= (100.0 * x.square().mean(dim=1, keepdim=True)).sqrt()
    noisy = {**rows_of(fresh, slice(2000)), modality: x + noise}
    effective = ModalityCheck(DIMS, statistic=statistic).fit(train).check(noisy).effective
    m = list(DIMS).index(modality)
    assert effective[:, m].float().mean() <= 0.01
    others = [j for j in range(3) if j != m]
    assert effective[:, others].float().mean(dim=0).min() >= 0.9  # under rule "all" the good ones stay


def test_one_bad_modality_condemns_the_others_only_under_rule_any(clean):
    train, fresh = clean
    mismatched = {**rows_of(fresh, slice(2000)), "audio": fresh["audio"][2000:4000]}
    kept = {
        rule: ModalityCheck(DIMS, statistic="correlation", rule=rule).fit(train).check(mismatched).effective
        for rule in ("all", "any")
    }
    assert kept["all"][:, [0, 2]].float().mean() > 0.9
    assert kept["any"][:, [0, 2]].float().mean() < kept["all"][:, [0, 2]].float().mean() - 0.2


def test_silence_has_too_little_energy(clean):
    train, fresh = clean
    centred = {name: x - train[name].mean(dim=0) for name, x in rows_of(fresh, slice(100)).items()}
    check = ModalityCheck(DIMS, statistic="energy").fit({name: x - x.mean(dim=0) for name, x in train.items()})
    centred["face"] = torch.zeros(100, 5)
    result = check.check(centred)
    assert not result.effective[:, 2].any()
    assert result.energy[:, 2].max() < 1e-3
    assert result.effective[:, :2].float().mean() > 0.85


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
    combined = ModalityCheck(DIMS, statistic="combined", threshold=threshold, rule=rule).fit(train)
    energy = ModalityCheck(DIMS, statistic="energy").fit(train)
    odd = energy.check(fresh, available=available)
    assert torch.equal(combined.check(fresh, available=available).effective, result.effective & odd.effective)
    assert torch.equal(combined.check(fresh, available=available).p_value, odd.p_value)


def test_undefined_correlation_is_below_every_threshold():
    train = float32(shared_latent(400))
    check = ModalityCheck(DIMS, statistic="correlation", threshold=-1.0).fit(train)
    fresh = {"text": check.center_0[None], "audio": train["audio"][:1]}  # the projected text does not vary
    result = check.check(fresh)
    assert result.correlation[0].tolist() == [0.0, 0.0, 0.0]
    assert result.effective.tolist() == [[False, False, False]]


# --- training data that lacks something ---


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
    torch.testing.assert_close(whole.p_value[:, 0], without_audio.p_value[:, 0])  # audio says nothing of text
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
    check = ModalityCheck(dims).fit(float32(shared_latent(200, dims)))  # 100 shape the projections, 100 calibrate
    assert [check.learned(f"left_{p}").shape[0] for p in range(3)] == [99, 30, 30]
    fresh = float32(shared_latent(20, dims, seed=1))
    fresh["audio"] = fresh["audio"] + 50 * torch.randn(20, 120, generator=torch.Generator().manual_seed(0))
    result = check.check(fresh)
    assert_finite(result)
    assert not result.effective[:, 1].any()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_few_samples_warn_and_judge_nothing(samples):
    train = rows_of(float32(shared_latent(10)), slice(samples))
    check = ModalityCheck(DIMS)
    with pytest.warns(UserWarning, match="too few for alpha=0.05") as caught:
        check.fit(train)
    assert caught[0].filename == __file__  # it points at the caller of fit
    result = check.check(float32(shared_latent(20, seed=1)))
    assert_finite(result)
    assert bool(result.effective.all())


@pytest.mark.parametrize(("statistic", "enough"), [("correlation", 20), ("energy", 40), ("combined", 40)])
def test_the_warning_comes_exactly_when_no_modality_can_be_judged_ineffectual(statistic, enough):
    # p ≥ 1/(n + 1) for the correlation, twice that for the two-sided energy and for Bonferroni: below 0.05 from n = 20
    # and n = 40. Half of so few samples calibrate.
    worst = {name: torch.full((1, d), 1e4) for name, d in DIMS.items()}
    worst["audio"] = -worst["audio"]
    for n in (enough - 1, enough):
        check = ModalityCheck(DIMS, statistic=statistic)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check.fit(float32(shared_latent(2 * n)))
        assert int(check.energy_count[0]) == n
        assert bool(caught) == (n < enough)
        if caught:
            assert bool(check.check(worst).effective.all())
        elif statistic != "correlation":
            assert not check.check(worst).effective.any()


def test_two_modalities_reach_the_smallest_p_value():
    dims = {"a": 5, "b": 4}
    check = ModalityCheck(dims, statistic="correlation").fit(float32(shared_latent(200, dims)))
    left, right = check.left_0, check.right_0
    opposed = {"a": check.center_0[None] + torch.linalg.pinv(left)[:, :1].T, "b": check.center_1[None]}
    opposed["b"] = opposed["b"] - (torch.linalg.pinv(right) @ left @ torch.linalg.pinv(left)[:, :1]).T
    result = check.check(opposed)
    assert result.correlation.item() < check.pair_scores.min()
    torch.testing.assert_close(result.p_value, torch.full((1, 2), 1 / 101))


def test_no_sample_is_an_error():
    with pytest.raises(ValueError, match="no sample to fit the modality check to"):
        ModalityCheck(DIMS).fit({name: torch.zeros(0, d) for name, d in DIMS.items()})
    with pytest.raises(ValueError, match="no sample to fit the modality check to"):
        ModalityCheck(DIMS).fit([])


# --- samples that lack something ---


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
    assert [tuple(value.shape) for value in result] == [(0, 3)] * 4


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


def test_streamed_batches_give_what_one_mapping_gives():
    train = float32(shared_latent(500, steps=3))
    there, lengths = random_mask(500, 3, 7), np.random.default_rng(8).integers(0, 4, size=500)
    whole = ModalityCheck(DIMS).fit(train, lengths, there)
    cuts = [0, 1, 2, 130, 131, 400, 500]
    batches = [(rows_of(train, slice(a, b)), lengths[a:b], there[a:b]) for a, b in itertools.pairwise(cuts)]
    streamed = ModalityCheck(DIMS).fit(batches)
    # The same samples calibrate; the float64 moments are merged in other steps, hence 1e-6 rather than bit equality.
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(streamed.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    fresh = float32(shared_latent(50, seed=1))
    same(whole.check(fresh), streamed.check(fresh), tolerance=1e-5)


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


# --- errors ---


def test_an_unfitted_check_says_so():
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
        ({"alpha": 0.0}, "alpha must be a finite number in (0.0, 1.0), got 0.0"),
        ({"alpha": float("nan")}, "alpha must be a finite number in (0.0, 1.0), got nan"),
        ({"threshold": 1.5}, "threshold must be a finite number in [-1.0, 1.0], got 1.5"),
        ({"threshold": (0.1, 0.2)}, "threshold has 2 values, wanted one for 3 pairs"),
        ({"component_weights": "sqrt"}, "component_weights must be 'canonical' or None, got 'sqrt'"),
        ({"pooling": "max"}, "pooling must be one of 'mean', 'mean_std', got 'max'"),
        ({"ridge": -1.0}, "ridge must be a finite number in [0.0, inf], got -1.0"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModalityCheck(**{"input_dims": DIMS, **arguments})


def test_bad_features_are_named():
    check = ModalityCheck(DIMS).fit(float32(shared_latent(400)))
    with pytest.raises(ValueError, match=re.escape("features['audio'] has shape (4, 7), wanted (B, T, 6)")):
        check.check({"audio": torch.zeros(4, 7)})
