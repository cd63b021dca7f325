"""Proxy feature vectors against NumPy and scikit-learn, and with degenerate banks and samples."""

import copy
import functools
import importlib.util
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from device_waits import counted_waits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import NearestNeighbors
from torch import nn

from m3er_fast import ProxyGenerator
from m3er_fast._proxy_bank import choose_frames, rows_on_device
from m3er_fast.inputs import FeatureBatch, prepare_batch
from m3er_fast.neighbors import ExactIndex
from m3er_fast.neighbors.faiss import FaissIndex
from m3er_fast.proxy import count_paired
from m3er_fast.standardize import StandardizedBatch, clean_frames

DIMS = {"text": 7, "audio": 5, "face": 4}
BANKS = ("regression", "neighbours", "basis")
MAP_BANKS = ("regression", "basis")  # folded into maps at fit


def paired(n, dims=DIMS, *, steps=None, seed=0, noise=0.3):
    """Linear views of one latent, with noise; the maps are the same for every seed."""
    maps, rng = np.random.default_rng(99), np.random.default_rng(seed)
    shape = (n,) if steps is None else (n, steps)
    latent = rng.normal(size=(*shape, 3))
    return {
        name: torch.from_numpy(latent @ maps.normal(size=(3, d)) + noise * rng.normal(size=(*shape, d))).float()
        for name, d in dims.items()
    }


def rows_of(features, index):
    return {name: x[index] for name, x in features.items()}


def lost(batch, *modalities):
    effective = torch.ones(batch, len(DIMS), dtype=torch.bool)
    effective[:, list(modalities)] = False
    return effective


def oracle_neighbours(query, source, target, *, k, ridge, affine):
    """Proxies (Q, e) by scikit-learn's exact search and, per query, one dense solve in float64."""
    query, source, target = (np.asarray(x, dtype=np.float64) for x in (query, source, target))
    k = min(k, len(source))
    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(source).kneighbors(query, return_distance=False)
    proxies = [
        oracle_solve(f, source[rows], ridge, affine) @ target[rows] for f, rows in zip(query, neighbours, strict=True)
    ]
    return np.array(proxies).reshape(len(query), target.shape[1])


def oracle_solve(f, rows, ridge, affine):
    """argmin_a ‖f - Σ a_r v_r‖² + λ·tr(G)/K·‖a‖²: least squares on rows augmented by sqrt(λ·tr(G)/K)·I.

    Σ a = 1 is eliminated: a = e_1 + N b, with the columns of N spanning the vectors that sum to 0.
    """
    k = len(rows)
    penalty = np.sqrt(ridge * (rows**2).sum() / k)
    augmented = np.vstack([rows.T, penalty * np.eye(k)])
    wanted = np.concatenate([f, np.zeros(k)])
    if not affine:
        return np.linalg.lstsq(augmented, wanted, rcond=None)[0]
    start = np.eye(k)[0]
    null = scipy.linalg.null_space(np.ones((1, k)))
    return start + null @ np.linalg.lstsq(augmented @ null, wanted - augmented @ start, rcond=None)[0]


def oracle_basis(query, source, target, *, ridge, affine, max_basis=None):
    """Proxies by the explicit solve over the rows that column-pivoted QR chooses."""
    query, source, target = (np.asarray(x, dtype=np.float64) for x in (query, source, target))
    _, triangle, order = scipy.linalg.qr(source.T, mode="economic", pivoting=True)
    pivots = np.abs(np.diag(triangle))
    rank = int(np.sum(pivots > 1e-5 * pivots[0]))
    rows = order[: rank if max_basis is None else min(rank, max_basis)]
    return np.array([oracle_solve(f, source[rows], ridge, affine) @ target[rows] for f in query])


def oracle_regression(query, source, target, ridge=None):
    """Proxies and λ by the hat matrix and the normal equations in float64, cross-validated over the same grid."""
    query, source, target = (np.asarray(x, dtype=np.float64) for x in (query, source, target))
    (n, d), centre, middle = source.shape, source.mean(axis=0), target.mean(axis=0)
    x, y = source - centre, target - middle
    unit = np.trace(x.T @ x) / d * np.eye(d)

    def error(candidate):
        hat = x @ np.linalg.solve(x.T @ x + candidate * unit, x.T)
        return n * np.square(y - hat @ y).sum() / (n - 1 - np.trace(hat)) ** 2

    ridge = min(np.logspace(-10, 6, 129), key=error) if ridge is None else ridge
    return middle + (query - centre) @ np.linalg.solve(x.T @ x + ridge * unit, x.T @ y), ridge


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("k", "ridge"), [(16, 1e-2), (3, 1e-4), (1, 0.1), (500, 1e-2)])
def test_neighbour_proxies_equal_scikit_learn_and_an_explicit_solve(k, ridge, affine):
    train, fresh = paired(200), paired(30, seed=1)
    generator = ProxyGenerator(DIMS, bank="neighbours", k=k, ridge=ridge, affine=affine).fit(train)
    result = generator.proxy(fresh, lost(30, 1, 2))  # only text remains
    for name in ("audio", "face"):
        wanted = oracle_neighbours(fresh["text"], train["text"], train[name], k=k, ridge=ridge, affine=affine)
        np.testing.assert_allclose(result.features[name][:, 0].numpy(), wanted, rtol=1e-4, atol=2e-5)
    assert torch.equal(result.features["text"][:, 0], fresh["text"])
    assert not result.abstained.any()


@pytest.mark.parametrize("max_basis", [None, 2])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [1e-2, 1e-4])
def test_the_folded_basis_map_equals_the_solve_over_the_rows_that_qr_chooses(ridge, affine, max_basis):
    train, fresh = paired(300), paired(30, seed=1)
    generator = ProxyGenerator(DIMS, bank="basis", ridge=ridge, affine=affine, max_basis=max_basis).fit(train)
    result = generator.proxy(fresh, lost(30, 1, 2))
    for name in ("audio", "face"):
        wanted = oracle_basis(
            fresh["text"], train["text"], train[name], ridge=ridge, affine=affine, max_basis=max_basis
        )
        np.testing.assert_allclose(result.features[name][:, 0].numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ridge", [None, 0.0, 1e-3, 10.0])
@pytest.mark.parametrize("n", [9, 20, 300])
def test_a_regression_equals_its_normal_equations_with_the_ridge_of_cross_validation(n, ridge):
    train, fresh = ({name: x + 5.0 for name, x in paired(size, seed=size).items()} for size in (n, 30))
    generator = ProxyGenerator(DIMS, bank="regression", ridge=ridge).fit(train)
    for source, given in enumerate(DIMS):
        result = generator.proxy({given: fresh[given]}, lost(30, *({0, 1, 2} - {source}))).features
        for target, name in enumerate(DIMS):
            if name != given:
                wanted, chosen = oracle_regression(fresh[given], train[given], train[name], ridge)
                np.testing.assert_allclose(result[name][:, 0].numpy(), wanted, rtol=1e-5, atol=1e-5)
                assert generator.ridge[source, target] == pytest.approx(chosen)


def test_cross_validation_predicts_as_well_as_leaving_out_each_frame_does():
    """scikit-learn's RidgeCV leaves out each frame in turn; GCV is that error with the leverages averaged."""
    dims = {"text": 30, "audio": 5}
    train, fresh = paired(60, dims, noise=3.0), paired(2000, dims, seed=1, noise=3.0)
    generator = ProxyGenerator(dims, bank="regression").fit(train)
    proxy = generator.proxy(fresh, torch.tensor([[True, False]] * 2000)).features["audio"][:, 0].numpy()
    unit = train["text"].var(dim=0, correction=0).mean().item() * 60
    left_out = RidgeCV(alphas=unit * np.logspace(-3, 6, 73)).fit(train["text"].numpy(), train["audio"].numpy())
    unpenalised, _ = oracle_regression(fresh["text"], train["text"], train["audio"], ridge=0.0)
    ours, theirs, worse = (
        np.square(answer - fresh["audio"].numpy()).sum()
        for answer in (proxy, left_out.predict(fresh["text"].numpy()), unpenalised)
    )
    assert ours < 1.02 * theirs
    assert ours < 0.9 * worse


def test_unrelated_modalities_get_almost_their_means():
    rng = np.random.default_rng(0)
    train = {name: torch.from_numpy(rng.normal(size=(100, d)) + 2.0).float() for name, d in DIMS.items()}
    proxy = ProxyGenerator(DIMS, bank="regression").fit(train).proxy(train, lost(100, 0)).features["text"]
    assert (proxy[:, 0] - train["text"].mean(dim=0)).norm() < 0.3 * (train["text"] - train["text"].mean(dim=0)).norm()


def test_a_regression_of_one_frame_or_a_constant_source_gives_the_mean():
    one, fresh = paired(1), paired(6, seed=1)
    result = ProxyGenerator(DIMS, bank="regression").fit(one).proxy(fresh, lost(6, 1)).features["audio"][:, 0]
    torch.testing.assert_close(result, one["audio"].expand(6, -1))
    train = {**paired(50), "text": torch.full((50, 7), 3.0)}
    generator = ProxyGenerator(DIMS, bank="regression").fit(train)
    result = generator.proxy({"text": fresh["text"]}, lost(6, 1, 2)).features["audio"][:, 0]
    torch.testing.assert_close(result, train["audio"].mean(dim=0).expand(6, -1))


@pytest.mark.parametrize("bank", BANKS)
def test_several_sources_are_averaged(bank):
    train, fresh = paired(200), paired(20, seed=1)
    generator = ProxyGenerator(DIMS, bank=bank).fit(train)
    alone = [
        generator.proxy({name: fresh[name]}, torch.tensor([[name == n for n in DIMS]] * 20)).features["face"]
        for name in ("text", "audio")
    ]
    both = generator.proxy(fresh, lost(20, 2)).features["face"]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    assert (alone[0] - alone[1]).abs().max() > 0.01


@pytest.mark.parametrize("bank", BANKS)
def test_sequences_get_one_proxy_per_valid_frame_and_zeros_in_padding(bank):
    train, fresh = paired(60, steps=4), paired(5, steps=6, seed=1)
    lengths = torch.tensor([0, 1, 3, 6, 2])
    generator = ProxyGenerator(DIMS, bank=bank).fit(train)
    dirty = {name: x.clone() for name, x in fresh.items()}
    for b, length in enumerate(lengths):
        dirty["text"][b, length:] = float("nan")
    result = generator.proxy(dirty, lost(5, 1), lengths)
    for b, length in enumerate(lengths):
        assert not result.features["audio"][b, length:].any()
        if length:
            frames = rows_of(fresh, (b, slice(length)))
            by_frame = generator.proxy(frames, lost(int(length), 1)).features["audio"][:, 0]
            torch.testing.assert_close(result.features["audio"][b, :length], by_frame, rtol=1e-5, atol=1e-6)
    assert result.abstained.tolist() == [True, False, False, False, False]


def test_a_frame_that_is_invalid_in_one_source_takes_the_other():
    train, fresh = paired(200, steps=2), paired(8, steps=3, seed=1)
    generator = ProxyGenerator(DIMS).fit(train)
    broken = {name: x.clone() for name, x in fresh.items()}
    broken["text"][:, 1, :5] = float("nan")  # 5 of 7: the frame is invalid
    result = generator.proxy(broken, lost(8, 2)).features["face"]
    whole = generator.proxy(fresh, lost(8, 2)).features["face"]
    from_audio = generator.proxy({"audio": fresh["audio"]}, lost(8, 0, 2)).features["face"]
    torch.testing.assert_close(result[:, [0, 2]], whole[:, [0, 2]])
    torch.testing.assert_close(result[:, 1], from_audio[:, 1])
    broken["audio"][:, 1] = float("inf")
    nothing = generator.proxy(broken, lost(8, 2)).features["face"]
    assert not nothing[:, 1].any()
    torch.testing.assert_close(nothing[:, [0, 2]], whole[:, [0, 2]])


@pytest.mark.parametrize("bank", BANKS)
def test_linear_low_noise_data_is_regenerated_to_one_hundredth_of_a_percent(bank):
    train, fresh = paired(2000, noise=1e-6), paired(200, seed=1, noise=1e-6)
    generator = ProxyGenerator(DIMS, bank=bank, ridge=1e-8).fit(train)
    for m, name in enumerate(DIMS):
        proxies = generator.proxy(fresh, lost(200, m)).features[name][:, 0]
        error = (proxies - fresh[name]).norm(dim=1) / fresh[name].norm(dim=1)
        assert error.max() < 1e-4


def test_the_numerical_rank_does_not_fall_with_the_number_of_frames():
    # One direction of 0.4% of the frames' size, which only the last row shows: 2·10^5 frames must not hide it.
    rng = np.random.default_rng(0)
    source = np.zeros((200_000, 2))
    source[:, 0] = rng.uniform(0.5, 1.0, size=200_000)
    source[-1, 1] = 4e-3
    train = {"a": torch.from_numpy(source).float(), "b": torch.from_numpy(source[:, 1:] * 250).float()}
    generator = ProxyGenerator({"a": 2, "b": 1}, bank="basis", ridge=0.0).fit(train)
    query = {"a": torch.tensor([[0.0, 4e-3]])}
    proxy = generator.proxy(query, torch.tensor([[True, False]])).features["b"]
    torch.testing.assert_close(proxy.item(), 1.0, rtol=1e-4, atol=0)


# --- What stays as it is ---


@pytest.mark.parametrize("bank", BANKS)
def test_effective_modalities_and_abstained_samples_are_untouched_bit_for_bit(bank):
    fresh = paired(40, steps=3, seed=1)
    effective = torch.from_numpy(np.random.default_rng(0).random((40, 3)) < 0.4)
    effective[0], effective[1] = False, True
    before = {name: x.clone() for name, x in fresh.items()}
    result = ProxyGenerator(DIMS, bank=bank).fit(paired(200)).proxy(fresh, effective)
    assert torch.equal(result.abstained, ~effective.any(dim=1))
    for m, name in enumerate(DIMS):
        kept = effective[:, m] | result.abstained
        assert torch.equal(result.features[name][kept], before[name][kept])
        assert bool((result.features[name][~kept] != before[name][~kept]).any(dim=(1, 2)).all())
        assert torch.equal(fresh[name], before[name])  # the caller's tensors are not written to


def test_unavailable_modalities_are_regenerated_and_never_trusted():
    fresh = paired(10, seed=1)
    generator = ProxyGenerator(DIMS).fit(paired(200))
    wanted = generator.proxy(fresh, lost(10, 1)).features
    everything = torch.ones(10, 3, dtype=torch.bool)
    for given, available in [({**fresh, "audio": None}, None), (fresh, lost(10, 1))]:
        got = generator.proxy(given, everything, available=available).features
        assert all(torch.equal(got[name], wanted[name]) for name in DIMS)


@pytest.mark.parametrize("bank", BANKS)
def test_results_do_not_depend_on_the_batch(bank):
    fresh = paired(50, steps=2, seed=1)
    effective = torch.from_numpy(np.random.default_rng(0).random((50, 3)) < 0.5)
    generator = ProxyGenerator(DIMS, bank=bank).fit(paired(300))
    whole = generator.proxy(fresh, effective).features
    order = torch.from_numpy(np.random.default_rng(1).permutation(50))
    for index in (order, torch.arange(7), torch.tensor([33])):
        part = generator.proxy(rows_of(fresh, index), effective[index]).features
        for name in DIMS:
            torch.testing.assert_close(part[name], whole[name][index], rtol=1e-6, atol=1e-6)


def test_more_frames_than_are_solved_at_once_give_the_same():
    fresh = paired(50, steps=50, seed=1)
    generator = ProxyGenerator(DIMS, bank="neighbours", k=4).fit(paired(100))
    whole = generator.proxy(fresh, lost(50, 0)).features["text"]
    halves = [generator.proxy(rows_of(fresh, s), lost(25, 0)).features["text"] for s in (slice(25), slice(25, 50))]
    torch.testing.assert_close(whole, torch.cat(halves), rtol=1e-6, atol=1e-6)


# --- Degenerate banks ---


@pytest.mark.parametrize(
    ("bank", "affine"),
    [("regression", False), ("neighbours", False), ("neighbours", True), ("basis", False), ("basis", True)],
)
@pytest.mark.parametrize("ridge", [0.0, 1e-2, None])
@pytest.mark.parametrize("case", ["duplicated", "one row", "one row twice", "collinear", "constant", "huge", "tiny"])
def test_degenerate_banks_give_finite_proxies(case, ridge, affine, bank):
    train = {
        "duplicated": lambda: {name: x.repeat(20, 1) for name, x in paired(5).items()},
        "one row": lambda: paired(1),
        "one row twice": lambda: {name: x.repeat(2, 1) for name, x in paired(1).items()},
        "collinear": lambda: {name: torch.linspace(-1, 1, 50)[:, None] * x[0] for name, x in paired(50).items()},
        "constant": lambda: {name: torch.zeros_like(x) for name, x in paired(50).items()},
        "huge": lambda: {name: 1e12 * x for name, x in paired(50).items()},
        "tiny": lambda: {name: 1e-12 * x for name, x in paired(50).items()},
    }[case]()
    result = ProxyGenerator(DIMS, bank=bank, ridge=ridge, affine=affine).fit(train).proxy(paired(9, seed=1), lost(9, 1))
    assert bool(torch.isfinite(result.features["audio"]).all())


def test_a_regression_of_huge_numbers_on_tiny_ones_stays_finite_for_standardised_features():
    train = {name: x * (1e37 if name == "audio" else 1e-37) for name, x in paired(50).items()}
    fresh = {name: x.clamp(-1, 1) * 1e4 for name, x in paired(9, seed=1).items()}
    result = ProxyGenerator(DIMS, bank="regression").fit(train).proxy(fresh, lost(9, 1)).features["audio"]
    assert bool(torch.isfinite(result).all())
    assert result.abs().max() > 1e30


def test_one_bank_row_is_its_partner_times_the_projection():
    train, fresh = paired(1), paired(6, seed=1)
    generator = ProxyGenerator(DIMS, bank="neighbours", ridge=0.0).fit(train)
    result = generator.proxy(fresh, lost(6, 1, 2)).features["face"][:, 0]
    v, w = train["text"][0].double(), train["face"][0].double()
    wanted = (fresh["text"].double() @ v / (v @ v))[:, None] * w
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-6)
    generator = ProxyGenerator(DIMS, bank="neighbours", affine=True).fit(train)
    constrained = generator.proxy(fresh, lost(6, 1, 2)).features["face"][:, 0]
    torch.testing.assert_close(constrained, train["face"].expand(6, -1))  # the one coefficient is 1


def test_duplicated_rows_count_once_without_ridge():
    train, fresh = paired(12), paired(6, seed=1)
    once = ProxyGenerator(DIMS, bank="neighbours", k=12, ridge=0.0).fit(train)
    often = ProxyGenerator(DIMS, bank="neighbours", k=36, ridge=0.0).fit(
        {name: x.repeat(3, 1) for name, x in train.items()}
    )
    for m, name in enumerate(DIMS):
        torch.testing.assert_close(
            often.proxy(fresh, lost(6, m)).features[name],
            once.proxy(fresh, lost(6, m)).features[name],
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("bank", BANKS)
def test_an_empty_bank_gives_zeros(bank):
    for source in ([], {name: torch.zeros(0, d) for name, d in DIMS.items()}, {"text": paired(9)["text"]}):
        generator = ProxyGenerator(DIMS, bank=bank).fit(source)
        assert generator.is_fitted
        result = generator.proxy(paired(5, seed=1), lost(5, 1, 2))
        assert not result.features["audio"].any()
        assert not result.features["face"].any()
        assert not result.abstained.any()


@pytest.mark.parametrize("bank", BANKS)
def test_a_source_never_paired_with_the_lost_modality_does_not_count_in_the_mean(bank):
    train = paired(200)
    available = torch.ones(200, 3, dtype=torch.bool)
    available[:100, 0] = False  # text and face are never together
    available[100:, 2] = False
    generator = ProxyGenerator(DIMS, bank=bank).fit(train, available=available)
    fresh = paired(10, seed=1)
    from_both = generator.proxy(fresh, lost(10, 2)).features["face"]
    from_audio = generator.proxy({"audio": fresh["audio"]}, lost(10, 0, 2)).features["face"]
    assert torch.equal(from_both, from_audio)
    assert from_audio.abs().max() > 0.1
    assert not generator.proxy({"text": fresh["text"]}, lost(10, 1, 2)).features["face"].any()


@pytest.mark.parametrize("bank", BANKS)
def test_only_frames_with_both_modalities_are_learned_from(bank):
    train = paired(100, steps=2)
    dirty = {name: x.clone() for name, x in train.items()}
    dirty["text"][::3, 0] = float("nan")
    lengths = torch.full((100,), 2)
    lengths[1::3] = 1
    dirty["audio"][1::3, 1] = 1e30  # padding
    settings = {"bank": bank, "ridge": 1e-3, **({"k": 200} if bank == "neighbours" else {})}
    generator = ProxyGenerator(DIMS, **settings).fit(dirty, lengths=lengths)
    kept = torch.ones(100, 2, dtype=torch.bool)
    kept[::3, 0], kept[1::3, 1] = False, False
    clean = ProxyGenerator(DIMS, **settings).fit(rows_of(train, kept))
    fresh = paired(10, seed=1)
    torch.testing.assert_close(
        generator.proxy(fresh, lost(10, 1, 2)).features["face"],
        clean.proxy(fresh, lost(10, 1, 2)).features["face"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_max_bank_is_a_seeded_uniform_choice_that_the_cut_into_batches_does_not_change():
    train = paired(400, steps=3)
    lengths = torch.from_numpy(np.random.default_rng(0).integers(0, 4, size=400))
    whole = ProxyGenerator(DIMS, bank="neighbours", max_bank=100).fit(train, lengths=lengths)
    assert whole.bank_0.shape == (100, 7)
    for size in (1, 7, 150):
        batches = [(rows_of(train, slice(s, s + size)), lengths[s : s + size], None) for s in range(0, 400, size)]
        cut = ProxyGenerator(DIMS, bank="neighbours", max_bank=100).fit(batches)
        assert all(torch.equal(value, cut.state_dict()[name]) for name, value in whole.state_dict().items())
    frames = train["text"][torch.arange(3) < lengths[:, None]]
    position = (whole.bank_0[:, None] == frames).all(dim=2).nonzero()[:, 1]
    assert bool((position.diff() > 0).all())  # in the order of the data, none twice
    # 99.9% interval of the mean of 100 uniform positions; a bank of the first or last rows is far outside.
    assert abs(position.float().mean() / len(frames) - 0.5) < 3.29 / np.sqrt(12 * 100)
    same_rows = torch.cdist(whole.bank_1, train["audio"].flatten(0, 1)).amin(dim=1)
    assert same_rows.max() < 1e-2


def test_the_choice_of_a_bank_is_uniform_without_a_pattern():
    """20 000 of a million numbers: equally dense everywhere, with gaps as by chance."""
    total, limit = 1_000_000, 20_000
    chosen = choose_frames(total, limit)
    assert len(np.unique(chosen)) == limit
    assert (chosen.min() >= 0, chosen.max() < total) == (True, True)
    # Without replacement the counts vary less, by the share of numbers not chosen.
    counts = np.bincount(chosen * 100 // total, minlength=100)
    chi_square = ((counts - limit / 100) ** 2 / (limit / 100)).sum() / (1 - limit / total)
    assert 0.001 < scipy.stats.chi2.sf(chi_square, 99) < 0.999
    last_digit = np.bincount(chosen % 10, minlength=10)
    assert scipy.stats.chisquare(last_digit).pvalue > 0.001
    gaps = np.minimum(np.diff(chosen), 200) // 20
    edges = 1 - (1 - limit / total) ** (np.arange(0, 201, 20) - 1)
    expected = np.append(np.diff(np.maximum(edges, 0)), 1 - edges[-1]) * len(gaps)
    assert scipy.stats.chisquare(np.bincount(gaps, minlength=11), expected).pvalue > 0.001


def parts_of(batch, *bounds):
    """A cleaned batch, cut at these samples."""
    return [
        StandardizedBatch([x[begin:end] for x in batch.features], *(x[begin:end] for x in batch[1:4]))
        for begin, end in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        *({"bank": "neighbours", "max_bank": size} for size in (None, 1, 40, 10_000)),
        {"bank": "basis", "ridge": 1e-8},
        {"bank": "regression"},
        {"bank": "regression", "ridge": 1e-3},
    ],
)
def test_collected_parts_fit_as_all_of_the_data_does(settings):
    available = torch.from_numpy(np.random.default_rng(0).random((60, 3)) > 0.3)
    batch = clean_frames(prepare_batch(paired(60, steps=2, noise=1e-6), None, available, input_dims=DIMS))
    total = count_paired(batch)
    assert total == int(2 * (available.sum(dim=1) >= 2).sum())
    collected, start = [], 0
    for part in parts_of(batch, 0, 1, 20, 20, 60):
        stop = start + count_paired(part)
        collected.append(ProxyGenerator(DIMS, **settings).collect([part], total=total, start=start, stop=stop))
        start = stop
    one_by_one = functools.reduce(lambda first, second: first.merge(second), collected)
    as_a_tree = collected[0].merge(collected[1]).merge(collected[2].merge(collected[3]))
    whole = ProxyGenerator(DIMS, **settings).fit(paired(60, steps=2, noise=1e-6), available=available)
    for merged in (one_by_one, as_a_tree):
        generator = ProxyGenerator(DIMS, **settings).fit_collected(merged)
        if settings["bank"] == "neighbours":
            state = generator.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
            continue
        fresh = paired(9, seed=1, noise=1e-6)
        tolerance = 1e-3 if settings["bank"] == "basis" else 1e-6  # other rows of the same span may win
        for m, name in enumerate(DIMS):
            got, wanted = (each.proxy(fresh, lost(9, m)).features[name] for each in (generator, whole))
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("settings", [{}, {"affine": True}, {"max_basis": 2}])
def test_merged_parts_fit_as_merged_generators_of_a_basis_do(settings):
    batch = clean_frames(prepare_batch(paired(60), input_dims=DIMS))
    parts = parts_of(batch, 0, 10, 25, 60)
    collected = [ProxyGenerator(DIMS, bank="basis", **settings).collect([part], total=None) for part in parts]
    fitted = [ProxyGenerator(DIMS, bank="basis", **settings).fit_batches(lambda part=part: [part]) for part in parts]
    together = ProxyGenerator(DIMS, bank="basis", **settings)
    together.fit_collected(functools.reduce(lambda first, second: first.merge(second), collected))
    wanted = functools.reduce(ProxyGenerator.merge, fitted).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in together.state_dict().items())


@pytest.mark.parametrize("bank", BANKS)
def test_merging_collected_parts_leaves_them_as_they_were(bank):
    batch = clean_frames(prepare_batch(paired(60), input_dims=DIMS))
    generator = ProxyGenerator(DIMS, bank=bank)
    first, second = (
        generator.collect([part], total=60, start=start, stop=start + 30)
        for start, part in zip((0, 30), parts_of(batch, 0, 30, 60), strict=True)
    )
    before = ProxyGenerator(DIMS, bank=bank).fit_collected(first).state_dict()
    first.merge(second)
    after = ProxyGenerator(DIMS, bank=bank).fit_collected(first).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_merging_many_collected_parts_copies_no_frame():
    batch = clean_frames(prepare_batch(paired(60), input_dims=DIMS))
    parts = [
        ProxyGenerator(DIMS, bank="neighbours").collect([part], total=60, start=start, stop=start + 1)
        for start, part in enumerate(parts_of(batch, *range(61)))
    ]
    merged = functools.reduce(lambda first, second: first.merge(second), parts)
    assert merged.seen == 60
    for piece, part in zip(merged.pieces, parts, strict=True):
        assert piece.features[0].data_ptr() == part.pieces[0].features[0].data_ptr()


@pytest.mark.parametrize("bank", BANKS)
def test_a_consolidated_part_is_one_piece_that_fits_the_same(bank):
    batch = clean_frames(prepare_batch(paired(60), input_dims=DIMS))
    generator = ProxyGenerator(DIMS, bank=bank)
    first, second = (
        generator.collect([part], total=60, start=start, stop=start + 30)
        for start, part in zip((0, 30), parts_of(batch, 0, 30, 60), strict=True)
    )
    merged = first.merge(second)
    wanted = ProxyGenerator(DIMS, bank=bank).fit_collected(merged).state_dict()
    got = ProxyGenerator(DIMS, bank=bank).fit_collected(merged.consolidated()).state_dict()
    assert all(torch.equal(value, got[name]) for name, value in wanted.items())
    assert bank != "neighbours" or len(merged.consolidated().pieces) == 1


@pytest.mark.parametrize("bank", BANKS)
def test_other_data_than_announced_is_refused(bank):
    batch = clean_frames(prepare_batch(paired(9), input_dims=DIMS))
    for total in (8, 10):
        with pytest.raises(ValueError, match=f"features gave {total} frames when read first, 9 when read again"):
            ProxyGenerator(DIMS, bank=bank).collect([batch], total=total)


def test_a_bank_of_neighbours_needs_the_number_of_frames():
    batch = clean_frames(prepare_batch(paired(9), input_dims=DIMS))
    with pytest.raises(ValueError, match="total: a bank of neighbours needs the number of frames"):
        ProxyGenerator(DIMS, bank="neighbours").collect([batch], total=None)


def test_a_pair_whose_frames_were_all_zeros_stays_known_when_parts_are_merged():
    zeros = clean_frames(prepare_batch({name: torch.zeros(4, d) for name, d in DIMS.items()}, input_dims=DIMS))
    generator = ProxyGenerator(DIMS, bank="basis")
    merged = generator.collect([zeros], total=4).merge(generator.collect([zeros], total=4))
    assert generator.fit_collected(merged).map_0_1.shape == (5, 7)


def test_frames_of_a_single_modality_are_not_in_the_bank():
    available = torch.ones(60, 3, dtype=torch.bool)
    available[::2, 1:] = False
    assert torch.equal(
        ProxyGenerator(DIMS, bank="neighbours", max_bank=30).fit(paired(60), available=available).bank_0,
        paired(60)["text"][1::2],
    )


def test_max_bank_larger_than_the_data_keeps_all():
    assert torch.equal(
        ProxyGenerator(DIMS, bank="neighbours", max_bank=1000).fit(paired(30)).bank_0, paired(30)["text"]
    )


# --- Degenerate input ---


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_give_finite_proxies(bank, value):
    train = paired(200, steps=2)
    train["audio"][::5, 0, 1] = value
    fresh = paired(10, steps=3, seed=1)
    generator = ProxyGenerator(DIMS, bank=bank).fit(train)
    clean = generator.proxy(fresh, lost(10, 2)).features["face"]
    fresh["text"][0, 0, 0] = value
    fresh["audio"][1] = value
    result = generator.proxy(fresh, lost(10, 2))
    assert all(bool(torch.isfinite(x).all()) for x in result.features.values())
    torch.testing.assert_close(result.features["face"][2:], clean[2:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize(("batch", "steps"), [(0, 1), (0, 5), (1, 1)])
def test_empty_and_single_batches_keep_their_shapes(bank, batch, steps):
    generator = ProxyGenerator(DIMS, bank=bank).fit(paired(50))
    result = generator.proxy(paired(batch, steps=steps), lost(batch, 1))
    assert [tuple(x.shape) for x in result.features.values()] == [(batch, steps, d) for d in DIMS.values()]
    assert result.abstained.shape == (batch,)


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_proxies_have_the_dtype_of_the_features(bank, dtype):
    generator = ProxyGenerator(DIMS, bank=bank).fit(paired(50))
    result = generator.proxy({name: x.to(dtype) for name, x in paired(5, seed=1).items()}, lost(5, 1))
    assert {x.dtype for x in result.features.values()} == {dtype}


def test_a_generator_in_double_precision_learns_in_it():
    train = {name: x.double() * np.pi for name, x in paired(60).items()}
    fresh = {name: x.double() * np.pi for name, x in paired(9, seed=1).items()}
    oracles = {
        "neighbours": functools.partial(oracle_neighbours, k=16, ridge=0.3, affine=False),
        "basis": functools.partial(oracle_basis, ridge=0.3, affine=False),
        "regression": lambda *frames: oracle_regression(*frames)[0],
    }
    for bank, oracle in oracles.items():
        result = ProxyGenerator(DIMS, bank=bank).double().fit(train).proxy(fresh, lost(9, 1, 2)).features["face"][:, 0]
        wanted = oracle(fresh["text"], train["text"], train["face"])
        np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-9, atol=1e-10)


# --- Streaming and merging ---


@pytest.mark.parametrize("bank", BANKS)
def test_merged_and_partial_fits_answer_like_one_fit(bank):
    train, fresh = paired(200), paired(20, seed=1)
    first, second = rows_of(train, slice(80)), rows_of(train, slice(80, 200))
    whole = ProxyGenerator(DIMS, bank=bank, ridge=1e-3).fit(train)
    merged = ProxyGenerator(DIMS, bank=bank, ridge=1e-3).fit(first)
    merged.merge(ProxyGenerator(DIMS, bank=bank, ridge=1e-3).fit(second))
    partial = ProxyGenerator(DIMS, bank=bank, ridge=1e-3).partial_fit(first).partial_fit(second)
    for m, name in enumerate(DIMS):
        wanted = whole.proxy(fresh, lost(20, m)).features[name]
        for generator in (merged, partial):
            got = generator.proxy(fresh, lost(20, m)).features[name]
            if bank != "basis":
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
            else:  # other rows of the same span may win: as good a basis, not the same
                assert (got - fresh[name][:, None]).norm() < 1.3 * (wanted - fresh[name][:, None]).norm()


def test_a_regression_goes_on_from_a_loaded_state_in_every_precision_and_holds_no_frame():
    train, fresh = paired(200), paired(20, seed=1)
    whole = ProxyGenerator(DIMS, bank="regression").fit(train)
    for narrowed in (nn.Module.float, nn.Module.half, lambda generator: generator.double().float()):
        fitted = narrowed(ProxyGenerator(DIMS, bank="regression").fit(rows_of(train, slice(80))))
        loaded = ProxyGenerator(DIMS, bank="regression")
        loaded.load_state_dict(fitted.state_dict())
        loaded.partial_fit(rows_of(train, slice(80, 200)))
        torch.testing.assert_close(
            loaded.proxy(fresh, lost(20, 1)).features["audio"],
            whole.proxy(fresh, lost(20, 1)).features["audio"],
            rtol=1e-6,
            atol=1e-6,
        )
    frames = {value for x in train.values() for value in x.double().flatten().tolist()}
    for name, value in whole.state_dict().items():
        numbers = value.view(torch.float64) if name.startswith("moments") else value.double()
        assert not frames & set(numbers.flatten().tolist()), name


def test_a_basis_chosen_in_rounds_spans_the_same(monkeypatch):
    monkeypatch.setattr("m3er_fast._proxy_basis._ROUND_FRAMES", 50)
    train, fresh = paired(700, noise=1e-6), paired(50, seed=1, noise=1e-6)
    batches = [rows_of(train, slice(begin, begin + 90)) for begin in range(0, 700, 90)]
    generator = ProxyGenerator(DIMS, bank="basis", ridge=1e-8).fit(batches)
    for m, name in enumerate(DIMS):
        proxies = generator.proxy(fresh, lost(50, m)).features[name][:, 0]
        assert ((proxies - fresh[name]).norm(dim=1) / fresh[name].norm(dim=1)).max() < 1e-3


def test_a_merged_reservoir_is_a_uniform_choice_from_all_that_was_seen():
    shares = []
    for seed in range(60):
        generators = [
            ProxyGenerator({"a": 1, "b": 1}, bank="neighbours", max_bank=30).fit({"a": x, "b": x})
            for x in (torch.full((300 + seed, 1), 1.0), torch.full((100, 1), 2.0))
        ]
        merged = generators[0].merge(generators[1])
        assert merged.bank_0.shape == (30, 1)
        assert int(merged.frames_seen) == 400 + seed
        shares.append((merged.bank_0 == 2).double().mean().item() - 100 / (400 + seed))
    # 30 draws each, 60 times: the standard error of the mean is below 0.0105.
    assert abs(np.mean(shares)) < 4 * 0.0105
    assert np.std(shares) > 0.02


def test_generators_that_cannot_be_merged_are_named():
    fitted = ProxyGenerator(DIMS).fit(paired(9))
    for other in ({"ridge": 0.25}, {"bank": "neighbours", "ridge": 0.25}):
        with pytest.raises(ValueError, match=r"merge: other has .*ridge=0.25"):
            fitted.merge(ProxyGenerator(DIMS, **other).fit(paired(9)))
    with pytest.raises(NotFittedError):
        fitted.merge(ProxyGenerator(DIMS))


def test_a_source_that_changes_between_readings_is_named():
    class Growing:
        size = 10

        def __iter__(self):
            self.size += 1
            yield paired(self.size)

    with pytest.raises(ValueError, match="features gave 11 frames when read first, 12 when read again"):
        ProxyGenerator(DIMS, bank="neighbours").fit(Growing())


# --- Searches, memory, devices ---


def test_each_frame_is_searched_once_per_source_and_only_where_something_is_lost(monkeypatch):
    fresh = paired(20, steps=3, seed=1)
    lengths = torch.full((20,), 2)
    generator = ProxyGenerator(DIMS, bank="neighbours").fit(paired(100))
    effective = torch.ones(20, 3, dtype=torch.bool)
    effective[4:9, 1:] = False  # only text remains: 5 samples of 2 frames, two targets
    effective[9, 0] = False  # audio and face remain
    effective[10] = False  # nothing remains
    searched = []
    search = ExactIndex.search

    def counting(self, query, k):
        searched.append((query.shape[1], query.shape[0]))
        return search(self, query, k)

    monkeypatch.setattr(ExactIndex, "search", counting)
    generator.proxy(fresh, effective, lengths)
    assert sorted(searched) == sorted([(7, 10), (5, 2), (4, 2)])
    searched.clear()
    generator.proxy(fresh, torch.ones(20, 3, dtype=torch.bool), lengths)
    assert searched == []


def test_the_host_waits_for_the_device_once(monkeypatch):
    """The operations that would wait for a GPU: reading numbers, and shapes that depend on values."""
    fresh = paired(20, steps=3, seed=1)
    generator = ProxyGenerator(DIMS, bank="neighbours").fit(paired(100))
    batch = clean_frames(prepare_batch(fresh, input_dims=DIMS))
    generator.proxy_batch(batch, lost(20, 1))  # the first batch builds the indices
    # The CPU's search and solver look at values, which is free there; a GPU's do not.
    monkeypatch.setattr(ExactIndex, "search", lambda self, query, k: (None, torch.arange(k).expand(query.shape[0], -1)))
    monkeypatch.setattr(
        "m3er_fast.functional.unchecked.local_least_squares",
        lambda query, bank, targets, near, **_: ([query.new_zeros(len(query), t.shape[1]) for t in targets], None),
    )
    with counted_waits(monkeypatch) as waits:
        generator.proxy_batch(batch, lost(20, 1))
    assert waits == ["tolist"]


@pytest.mark.parametrize("bank", MAP_BANKS)
def test_maps_need_no_values_where_samples_are_not_picked(bank, monkeypatch):
    """What runs on a GPU, and what is traced, waits for nothing and answers as the samples picked on the CPU do."""
    fresh = paired(40, steps=3, seed=1)
    fresh["text"][3, 1], fresh["audio"][5] = float("nan"), float("nan")
    lengths = torch.arange(40) % 4
    generator = ProxyGenerator(DIMS, bank=bank).fit(paired(100))
    batch = clean_frames(prepare_batch(fresh, lengths, input_dims=DIMS))
    effective = torch.from_numpy(np.random.default_rng(0).random((40, 3)) < 0.5) & batch.available
    picked = generator.proxy_batch(batch, effective)
    with monkeypatch.context() as patch, counted_waits(monkeypatch) as waits:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        masked = generator.proxy_batch(batch, effective)
    assert waits == []
    for one, other in zip(masked.features, picked.features, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bank", MAP_BANKS)
def test_maps_are_traced_without_breaks_for_any_batch(bank):
    generator = ProxyGenerator(DIMS, bank=bank).fit(paired(100))

    def answer(text, audio, face, effective):
        batch = clean_frames(FeatureBatch([text, audio, face], *all_of(text)))
        return generator.proxy_batch(batch, effective).features

    def all_of(x):
        return torch.full((x.shape[0],), x.shape[1]), torch.ones(x.shape[0], 3, dtype=torch.bool)

    compiled = torch.compile(answer, fullgraph=True, dynamic=True, backend="eager")
    for size in (5, 9):
        given = (*paired(size, steps=4, seed=size).values(), lost(size, 1))
        for got, wanted in zip(compiled(*given), answer(*given), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bank", BANKS)
def test_the_memory_budget_does_not_change_the_result(bank):
    fresh = paired(12, steps=3, seed=1)
    whole, tight = (ProxyGenerator(DIMS, bank=bank, **o).fit(paired(200)) for o in ({}, {"memory_budget": 2000}))
    for m, name in enumerate(DIMS):
        torch.testing.assert_close(
            tight.proxy(fresh, lost(12, m)).features[name],
            whole.proxy(fresh, lost(12, m)).features[name],
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of a process")
def test_fitting_holds_one_bank_and_answering_keeps_to_the_budget():
    script = """
import torch
from m3er_fast import ProxyGenerator
torch.set_num_threads(1)
def peak():  # not ru_maxrss, which a child process inherits
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
class Stream:
    def __iter__(self):
        for i in range(40):
            g = torch.Generator().manual_seed(i)
            yield {"a": torch.randn(1500, 200, generator=g), "b": torch.randn(1500, 100, generator=g)}
budget = 32 * 2**20
def effective(n):
    return torch.tensor([[True, False]]).expand(n, -1)
generator = ProxyGenerator({"a": 200, "b": 100}, bank="neighbours", memory_budget=budget)
few = {"a": torch.randn(99, 200), "b": torch.randn(99, 100)}
ProxyGenerator({"a": 200, "b": 100}, bank="neighbours").fit(few).proxy(few, effective(99))  # libraries are set up once
before = peak()
generator.fit(Stream())
fitted = peak()
queries = {"a": torch.randn(5000, 200), "b": torch.randn(5000, 100)}
ready = peak()
generator.proxy(queries, effective(5000))
print(fitted - before, peak() - ready)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fitting, answering = map(int, done.stdout.split())
    bank = 60_000 * 300 * 4
    assert 0.9 * bank < fitting < 1.3 * bank
    # Beside the budget: the results, the cleaned features, and the sums over several sources.
    assert answering < 32 * 2**20 + 4 * 5000 * 300 * 4


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
@pytest.mark.parametrize("engine", ["faiss", "faiss-ivf", "faiss-hnsw"])
def test_engines_are_built_once_and_their_recall_is_kept_with_the_state(engine, monkeypatch):
    monkeypatch.setattr("m3er_fast.neighbors.faiss._LEAST_PROBED", 4)  # of 77 lists: some neighbours are missed
    built = []
    initialize = FaissIndex.__init__
    monkeypatch.setattr(FaissIndex, "__init__", lambda self, *a, **k: built.append(1) or initialize(self, *a, **k))
    train, fresh = paired(3000), paired(30, seed=1)
    exact = ProxyGenerator(DIMS, bank="neighbours").fit(train)
    generator = ProxyGenerator(DIMS, bank="neighbours", engine=engine).fit(train)
    assert bool((generator.recall > 0.7).all())
    assert bool((generator.recall < 1).any()) or engine != "faiss-ivf"
    assert bool((generator.recall == 1).all()) or engine != "faiss"
    got, wanted = (g.proxy(fresh, lost(30, 1)).features["audio"] for g in (generator, exact))
    assert (got - wanted).norm() < 0.2 * wanted.norm()
    generator.proxy(fresh, lost(30, 2))
    assert len(built) == len(DIMS)
    loaded = ProxyGenerator(DIMS, bank="neighbours", engine=engine)
    loaded.load_state_dict(generator.state_dict())
    assert torch.equal(loaded.recall, generator.recall)
    copied = copy.deepcopy(generator)
    assert torch.equal(copied.proxy(fresh, lost(30, 1)).features["audio"], got) or engine != "faiss"


def test_a_state_loaded_later_replaces_the_searched_bank():
    train, other, fresh = paired(60), paired(60, seed=5), paired(9, seed=1)
    generator = ProxyGenerator(DIMS, bank="neighbours").fit(train)
    before = generator.proxy(fresh, lost(9, 1)).features["audio"]
    generator.load_state_dict(
        ProxyGenerator(DIMS, bank="neighbours").fit(other).state_dict()
    )  # of the same size: written in place
    after = generator.proxy(fresh, lost(9, 1)).features["audio"]
    assert not torch.allclose(before, after)
    assert torch.equal(
        after, ProxyGenerator(DIMS, bank="neighbours").fit(other).proxy(fresh, lost(9, 1)).features["audio"]
    )


def test_a_bank_on_the_host_stays_there_and_answers_alike():
    train, fresh = paired(60), paired(9, seed=1)
    kept = ProxyGenerator(DIMS, bank="neighbours", bank_on_host=True).fit(train).to("meta")
    assert {kept.learned(f"bank_{m}").device.type for m in range(3)} == {"cpu"}
    assert kept.bank_valid.device.type == "cpu"
    assert kept.recall.device.type == "meta"
    assert ProxyGenerator(DIMS, bank="neighbours", bank_on_host=True).fit(train).double().bank_0.dtype == torch.float64
    assert ProxyGenerator(DIMS, bank="neighbours", bank_on_host=True).fit(train).half().bank_0.dtype == torch.float32
    host, plain = (ProxyGenerator(DIMS, bank="neighbours", bank_on_host=x).fit(train) for x in (True, False))
    assert torch.equal(*(g.proxy(fresh, lost(9, 1)).features["audio"] for g in (host, plain)))


def test_only_the_neighbours_rows_of_a_bank_on_another_device_move():
    bank, partner, near = torch.randn(50, 3), torch.randn(50, 2), torch.tensor([[4, 9], [9, 33]])
    moved, (partners,), places = rows_on_device(torch.device("meta"), bank, [partner], near)
    assert moved.shape == (3, 3)
    assert partners.shape == (3, 2)
    assert places.shape == near.shape


# --- State and errors ---


@pytest.mark.parametrize("bank", BANKS)
def test_a_state_with_a_bank_of_another_size_loads_and_must_be_complete(bank):
    fitted, other = ProxyGenerator(DIMS, bank=bank).fit(paired(80)), ProxyGenerator(DIMS, bank=bank).fit(paired(9))
    fresh = paired(10, seed=1)
    wanted = fitted.proxy(fresh, lost(10, 0)).features["text"]
    for loaded in (ProxyGenerator(DIMS, bank=bank), other):
        loaded.load_state_dict(fitted.state_dict(), strict=True)
        assert loaded.is_fitted
        assert torch.equal(loaded.proxy(fresh, lost(10, 0)).features["text"], wanted)
    for name in fitted.state_dict():
        lacking = {key: value for key, value in fitted.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=re.escape(name)):
            ProxyGenerator(DIMS, bank=bank).load_state_dict(lacking)


@pytest.mark.parametrize("bank", BANKS)
def test_an_unfitted_generator_is_an_error(bank):
    generator = ProxyGenerator(DIMS, bank=bank)
    assert not generator.is_fitted
    with pytest.raises(NotFittedError, match="call fit with clean training data first"):
        generator.proxy(paired(3), lost(3, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_dims": {"text": 3}}, "proxies need two modalities or more, got {'text': 3}"),
        ({"bank": "rows"}, "bank must be one of 'regression', 'neighbours', 'basis', got 'rows'"),
        ({"k": 0}, "k must be a positive int, got 0"),
        ({"ridge": -0.1}, "ridge must be a finite number ≥ 0, got -0.1"),
        ({"ridge": float("nan")}, "ridge must be a finite number ≥ 0, got nan"),
        ({"max_bank": 0}, "max_bank must be a positive int, got 0"),
        ({"max_basis": 1.5}, "max_basis must be a positive int, got 1.5"),
        ({"memory_budget": 0}, "memory_budget must be a positive int, got 0"),
        ({"bank_on_host": 1}, "bank_on_host must be True or False, got 1"),
        (
            {"bank": "regression", "max_bank": 9},
            "max_bank must be left at None with bank='regression', got 9: it is a setting of other banks",
        ),
        (
            {"bank": "regression", "affine": True},
            "affine must be left at False with bank='regression', got True: it is a setting of other banks",
        ),
        ({"engine": "annoy"}, "engine must be one of 'auto', 'torch', 'faiss', 'faiss-ivf', 'faiss-hnsw', got 'annoy'"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ProxyGenerator(**{"input_dims": DIMS, **arguments})


@pytest.mark.parametrize(
    ("effective", "message"),
    [
        (
            torch.ones(5, 2, dtype=torch.bool),
            "effective must be booleans of shape (5, 3), got torch.bool of shape (5, 2)",
        ),
        (torch.ones(5, 3), "effective must be booleans of shape (5, 3), got torch.float32 of shape (5, 3)"),
    ],
)
def test_a_bad_verdict_is_named(effective, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ProxyGenerator(DIMS).fit(paired(20)).proxy(paired(5), effective)


def test_bad_features_are_named():
    generator = ProxyGenerator(DIMS).fit(paired(20))
    with pytest.raises(
        ValueError, match=re.escape("features['text'] has shape (5, 0, 7), wanted (B, T, 7) with T ≥ 1")
    ):
        generator.proxy({"text": torch.zeros(5, 0, 7)}, lost(5, 1))
    with pytest.raises(ValueError, match=re.escape("lengths must lie in 0..1, got values from 2 to 2")):
        generator.proxy(paired(5), lost(5, 1), torch.full((5,), 2))
