"""Reliability of proxies against NumPy and scikit-learn, and what weighing and refusing by it do."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from test_proxy import DIMS, lost, oracle_solve, paired, rows_of

from m3er_fast import M3ERConfig, M3ERFusion, ProxyGenerator
from m3er_fast.config import ProxyConfig
from m3er_fast.reliability import fit_reliability, reliability_of, signs_of

TEXT, AUDIO, FACE = range(3)


def generator(features=None, reliability="report", **settings):
    made = ProxyGenerator(DIMS, reliability=reliability, **settings)
    return made.fit(paired(200) if features is None else features)


# --- the arithmetic ---


def test_signs_are_residual_and_distance_beside_the_norm():
    query = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [1e-20, 0.0]])
    rebuilt = torch.tensor([[3.0, 3.0], [0.0, 0.0], [-9.0, 0.0], [1.0, 0.0]])
    nearest = torch.tensor([2.25, 1.0, 0.0, 0.0])
    wanted = torch.tensor([[1.0, 0.2, 0.3], [1.0, 2.0, 2.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    torch.testing.assert_close(signs_of(query, rebuilt, nearest), wanted)


def test_weights_are_the_least_squares_of_scaled_proxies():
    rng = np.random.default_rng(0)
    signs = np.concatenate([np.ones((50, 1)), rng.random((50, 2))], axis=1)
    proxies, originals = rng.normal(size=(50, 4)), rng.normal(size=(50, 4))
    rows = (signs[:, None, :] * proxies[:, :, None]).reshape(-1, 3)
    wanted = np.linalg.lstsq(rows, originals.ravel(), rcond=None)[0]
    parts = [
        tuple(torch.from_numpy(x[part]) for x in (signs, proxies, originals)) for part in (slice(0, 20), slice(20, 50))
    ]
    np.testing.assert_allclose(fit_reliability(parts).numpy(), wanted, rtol=1e-9)


def test_without_any_pair_and_with_signs_that_do_not_vary_weights_are_finite():
    assert torch.equal(fit_reliability([]), torch.zeros(3, dtype=torch.float64))
    signs, proxies = torch.tensor([[1.0, 0.5, 0.0]]).repeat(9, 1), torch.ones(9, 2)
    weights = fit_reliability([(signs, proxies, 0.25 * proxies)])
    torch.testing.assert_close(reliability_of(signs, weights), torch.full((9,), 0.25))


def test_reliability_is_held_between_zero_and_one():
    signs = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert reliability_of(signs, torch.tensor([0.5, -2.0, 2.0])).tolist() == [0.5, 0.0, 1.0]


# --- calibration ---


def oracle_weights(source, target, k, ridge):
    """Four blocks, each regenerated from the other three: scikit-learn's neighbours, a dense solve, least squares."""
    source, target = (np.asarray(x, dtype=np.float64) for x in (source, target))
    block = np.arange(len(source)) * 4 // len(source)
    rows, wanted = [], []
    for held in range(4):
        bank, partners = source[block != held], target[block != held]
        distance, near = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank).kneighbors(source[block == held])
        for f, w, d, n in zip(source[block == held], target[block == held], distance, near, strict=True):
            a = oracle_solve(f, bank[n], ridge, affine=False)
            size = np.linalg.norm(f)
            signs = np.array([1.0, min(2, np.linalg.norm(f - a @ bank[n]) / size), min(2, d[0] / size)])
            rows.append(np.outer(a @ partners[n], signs))
            wanted.append(w)
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0]


def test_calibration_equals_a_float64_oracle():
    features = paired(60, noise=1.0)
    learned = generator(features, k=5, ridge=0.1).reliability_weights
    for i, source in enumerate(features.values()):
        for m, target in enumerate(features.values()):
            wanted = np.zeros(3) if i == m else oracle_weights(source, target, 5, 0.1)
            np.testing.assert_allclose(learned[i, m].numpy(), wanted, rtol=2e-3, atol=2e-3)


def test_a_small_memory_budget_calibrates_alike():
    features = paired(300, noise=1.0)
    whole, pieces = generator(features), generator(features, memory_budget=2**16)
    torch.testing.assert_close(whole.reliability_weights, pieces.reliability_weights, rtol=1e-4, atol=1e-4)


def test_related_modalities_are_reliable_and_unrelated_ones_are_not():
    related = paired(400, noise=0.05)
    unrelated = {**related, "audio": torch.randn(400, DIMS["audio"], generator=torch.Generator().manual_seed(5))}
    fresh = paired(100, seed=1, noise=0.05)
    good = generator(related).reliability(fresh, lost(100, AUDIO))[:, AUDIO]
    bad = generator(unrelated).reliability(fresh, lost(100, AUDIO, FACE))
    assert good.min() > 0.9
    assert bad[:, AUDIO].max() < 0.5
    assert bad[:, FACE].min() > 0.9


def test_reliability_ranks_proxies_by_the_error_they_make():
    # A source that is noisy in half of the frames, in the training data too.
    def half_noisy(n, seed):
        features = paired(n, seed=seed, noise=0.05)
        noise = 4 * torch.randn(n // 2, DIMS["text"], generator=torch.Generator().manual_seed(seed))
        features["text"][::2] += noise
        return features

    fresh = half_noisy(200, 1)
    reliability = generator(half_noisy(400, 0)).reliability(fresh, lost(200, AUDIO, FACE))
    noisy, clean = reliability[::2, AUDIO], reliability[1::2, AUDIO]
    assert noisy.median() < clean.median() - 0.1


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_a_bank_too_small_to_be_tried_on_itself_gives_finite_reliability(rows):
    made = generator(paired(rows), k=3)
    reliability = made.reliability(paired(5), lost(5, FACE))
    assert bool(torch.isfinite(made.reliability_weights).all())
    assert bool(((reliability >= 0) & (reliability <= 1)).all())
    if rows < 2:
        assert not reliability[:, FACE].any()


def test_merging_calibrates_anew():
    features = paired(120, noise=1.0)
    halves = [rows_of(features, slice(0, 60)), rows_of(features, slice(60, 120))]
    merged = generator(halves[0]).merge(generator(halves[1]))
    assert torch.equal(merged.reliability_weights, generator(features).reliability_weights)


# --- what comes out ---


def test_reliability_is_one_for_what_is_effective_and_zero_where_nothing_is_known():
    features, effective = paired(6), lost(6, FACE)
    effective[4:] = False  # abstained
    reliability = generator().reliability(features, effective)
    assert torch.equal(reliability[:4, :FACE], torch.ones(4, 2))
    assert bool((reliability[:4, FACE] > 0).all())
    assert torch.equal(reliability[4:], torch.zeros(2, 3))


def test_reporting_leaves_proxies_as_they_are_and_weighing_multiplies_them():
    fresh, effective = paired(20, seed=1), lost(20, AUDIO, FACE)  # one source: one factor a proxy
    plain, reporting, weighing = (generator(paired(200, noise=1.0), r) for r in ("off", "report", "weigh"))
    factor = reporting.reliability(fresh, effective)
    assert torch.equal(weighing.reliability(fresh, effective), factor)
    wanted, same, weighed = (made.proxy(fresh, effective).features for made in (plain, reporting, weighing))
    for m, name in enumerate(DIMS):
        torch.testing.assert_close(same[name], wanted[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weighed[name], factor[:, m, None, None] * wanted[name], rtol=1e-5, atol=1e-6)


def test_what_is_not_estimated_is_not_given():
    with pytest.raises(
        ValueError, match="reliability is not estimated: make this ProxyGenerator with reliability='rep"
    ):
        generator(reliability="off").reliability(paired(5), lost(5, FACE))


def test_a_modality_of_several_frames_has_their_mean_and_padding_none():
    made, steps = generator(paired(200, noise=1.0)), paired(4, seed=1)
    together = {name: x[None] for name, x in steps.items()}
    each = made.reliability(steps, lost(4, FACE))[:, FACE]
    padded = {name: torch.nn.functional.pad(x, (0, 0, 0, 3), value=9.0) for name, x in together.items()}
    for features, lengths in ((together, None), (padded, torch.tensor([4]))):
        reliability = made.reliability(features, lost(1, FACE), lengths)[0, FACE]
        torch.testing.assert_close(reliability, each.mean())


def test_several_sources_are_averaged():
    made, fresh = generator(paired(200, noise=1.0)), paired(20, seed=1)
    both, text, audio = (
        made.reliability(fresh, lost(20, *gone))[:, FACE] for gone in ((FACE,), (AUDIO, FACE), (TEXT, FACE))
    )
    torch.testing.assert_close(both, (text + audio) / 2)


def test_what_is_refused_is_left_out_and_said_to_be():
    fresh, effective = paired(50, seed=1, noise=1.0), lost(50, AUDIO)
    effective[40:] = True
    reporting = generator(paired(200, noise=1.0))
    reported, reliability = reporting.proxy(fresh, effective), reporting.reliability(fresh, effective)[:, AUDIO]
    limit = float(reliability[:40].median())
    refusing = generator(paired(200, noise=1.0), min_reliability=limit).proxy(fresh, effective)
    refused = reliability < limit
    assert 0 < refused.sum() < 40
    assert torch.equal(refusing.abstained, refused)
    assert torch.equal(refusing.features["audio"][~refused], reported.features["audio"][~refused])
    assert not refusing.features["audio"][refused].any()
    assert torch.equal(refusing.features["text"], reported.features["text"])


def test_a_modality_that_training_never_saw_is_no_reason_to_abstain():
    made = generator({name: x for name, x in paired(100).items() if name != "face"}, min_reliability=0.01)
    fresh = {name: x for name, x in paired(5).items() if name != "face"}
    assert not made.reliability(fresh, lost(5))[:, FACE].any()
    assert not made.proxy(fresh, lost(5)).abstained.any()


def test_the_model_says_how_far_its_proxies_can_be_trusted(tmp_path):
    features = paired(200, noise=1.0)
    config = M3ERConfig(proxy=ProxyConfig(reliability="weigh", min_reliability=0.2))
    model = M3ERFusion(DIMS, 3, config).fit(features).eval()
    effective = lost(200, FACE)
    output = model(features, effective=effective)
    standard = dict(zip(DIMS, model.standardize(features).features, strict=True))
    assert torch.equal(output.reliability, model.proxy_generator.reliability(standard, effective))
    assert torch.equal(output.abstained, model.proxy_generator.proxy(standard, effective).abstained)
    model.save_pretrained(tmp_path)
    again = M3ERFusion.from_pretrained(tmp_path)(features, effective=effective)
    assert torch.equal(again.reliability, output.reliability)
    plain = M3ERFusion(DIMS, 3).fit(features).eval()(features, effective=effective)
    assert torch.equal(plain.reliability, effective.float())
    assert torch.equal(model.train()(features).reliability, torch.ones(200, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reliability": "yes"}, "reliability must be one of 'off', 'report', 'weigh', got 'yes'"),
        ({"reliability": "report", "bank": "basis"}, "reliability 'report' needs bank 'neighbours', got bank 'basis'"),
        ({"min_reliability": 0.5}, "min_reliability needs reliability 'report' or 'weigh', got 'off'"),
        ({"reliability": "report", "min_reliability": 2.0}, r"min_reliability must be a finite number in \[0.0, 1.0\]"),
    ],
)
def test_settings_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProxyGenerator(DIMS, **arguments)
