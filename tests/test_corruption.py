"""The corruptions change valid frames as documented, and nothing else."""

from functools import partial

import pytest
import torch
from scipy.stats import binom

from m3er_fast.corruption import (
    KINDS,
    clip,
    corrupt,
    drop_frames,
    freeze,
    gaussian_noise,
    mismatch,
    paper_protocol,
    silence,
)

EVERY_KIND = sorted(KINDS)
NOT_A_NUMBER = float("nan")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(batch=6, steps=5, dim=4, seed=0, dtype=torch.float64):
    return torch.randn(batch, steps, dim, generator=rng(seed), dtype=dtype)


def three_modalities(batch, steps=2):
    return {name: sample(batch, steps, dim, seed=dim) for name, dim in (("text", 5), ("audio", 3), ("face", 4))}


# --- every corruption -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shape_and_dtype_are_kept_and_the_input_is_not_modified(kind, shape, dtype):
    x = torch.randn(shape, generator=rng(), dtype=torch.float64).to(dtype)
    before = x.clone()
    result = KINDS[kind](x, generator=rng(1))
    assert result.shape == x.shape
    assert result.dtype == dtype
    assert result.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_padding_is_left_untouched_whatever_it_holds(kind):
    lengths = torch.tensor([5, 3, 1, 0, 2, 4])
    padding = torch.arange(5) >= lengths[:, None]
    clean = sample()
    poisoned = clean.masked_fill(padding[:, :, None], NOT_A_NUMBER)
    result = KINDS[kind](poisoned, generator=rng(1), lengths=lengths)
    expected = KINDS[kind](clean.masked_fill(padding[:, :, None], 7e5), generator=rng(1), lengths=lengths)
    assert result[padding].isnan().all()
    assert torch.equal(expected[padding], torch.full_like(expected[padding], 7e5))
    assert torch.equal(result[~padding], expected[~padding])


@pytest.mark.parametrize("kind", sorted(set(EVERY_KIND) - {"silence", "clip"}))
def test_the_same_seed_repeats_and_another_seed_differs(kind):
    x = sample(batch=20)
    assert torch.equal(KINDS[kind](x, generator=rng(3)), KINDS[kind](x, generator=rng(3)))
    assert not torch.equal(KINDS[kind](x, generator=rng(3)), KINDS[kind](x, generator=rng(4)))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_an_empty_batch_stays_empty(kind):
    assert KINDS[kind](torch.zeros(0, 5, 4), generator=rng()).shape == (0, 5, 4)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(
    ("x", "lengths", "message"),
    [
        ([[1.0]], None, "floating tensor"),
        (torch.zeros(3, 4, dtype=torch.int64), None, "floating tensor"),
        (torch.zeros(3), None, "floating tensor"),
        (torch.zeros(3, 0, 4), None, "T and d ≥ 1"),
        (torch.zeros(2, 3, 4), [1, 4], "lengths must lie in 0..3"),
        (torch.zeros(2, 3, 4), [1, 2, 3], "lengths must be integers of shape"),
    ],
)
def test_bad_input_is_one_clear_error(kind, x, lengths, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind](x, generator=rng(), lengths=lengths)


# --- each corruption --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 1e30])
def test_noise_has_the_power_ratio_asked_for_in_every_sample(snr, scale):
    # 20 000 entries per sample: the noise power has a relative standard deviation of sqrt(2 / 20 000) = 0.01.
    x = scale * (sample(8, 100, 200) + torch.arange(8.0)[:, None, None])
    noise = gaussian_noise(x, snr, rng(1)) - x
    measured = x.square().mean(dim=(1, 2)) / noise.square().mean(dim=(1, 2))
    torch.testing.assert_close(measured, torch.full_like(measured, snr), rtol=0.06, atol=0)


def test_noise_is_white():
    noise = gaussian_noise(torch.ones(1, 40_000, 2, dtype=torch.float64), 1.0, rng(1))[0] - 1
    assert abs(noise.mean()) < 5 / 80_000**0.5
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 5 / 40_000**0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / 80_000**0.5


def test_noise_power_is_measured_on_valid_finite_entries_only():
    x = torch.full((1, 400, 50), 2.0, dtype=torch.float64)
    x[0, 200:] = 1e9
    x[0, :3, 0] = torch.tensor([NOT_A_NUMBER, torch.inf, -torch.inf])
    result = gaussian_noise(x, 0.25, rng(1), lengths=[200])[0, :200]
    assert torch.equal(result.isfinite(), x[0, :200].isfinite())
    noise = (result - 2)[result.isfinite()]
    assert noise.square().mean().item() == pytest.approx(4 / 0.25, rel=0.06)


@pytest.mark.parametrize("fill", [0.0, NOT_A_NUMBER])
def test_a_sample_without_power_gets_noise_relative_to_unit_power(fill):
    x = torch.full((1, 200, 100), fill, dtype=torch.float64)
    x[0, :, 50:] = 0.0
    noise = gaussian_noise(x, 0.25, rng(1))[0, :, 50:]
    assert noise.square().mean().item() == pytest.approx(4.0, rel=0.09)


@pytest.mark.parametrize("snr", [0.0, -1.0, NOT_A_NUMBER, float("inf")])
def test_an_snr_that_is_not_positive_and_finite_is_refused(snr):
    with pytest.raises(ValueError, match="snr must be a finite number > 0"):
        gaussian_noise(sample(), snr, rng())


def test_silence_zeroes_every_valid_frame():
    result = silence(sample(2, 3, 4), lengths=[3, 1])
    assert torch.count_nonzero(result[0]) == 0
    assert torch.count_nonzero(result[1, :1]) == 0
    assert torch.equal(result[1, 1:], sample(2, 3, 4)[1, 1:])


def test_freeze_repeats_one_valid_frame_and_every_valid_frame_can_be_it():
    x = sample(1, 5, 4).expand(400, 5, 4)
    result = freeze(x, rng(1), lengths=torch.full((400,), 3))
    frozen = (result[:, :1] == x).all(dim=2)
    assert torch.equal(frozen.sum(dim=1), torch.ones(400, dtype=torch.int64))
    assert torch.equal(result[:, :3], result[:, :1].expand(-1, 3, -1))
    counts = frozen.sum(dim=0).tolist()
    low, high = binom.interval(0.999, 400, 1 / 3)
    assert all(low <= count <= high for count in counts[:3])
    assert counts[3:] == [0, 0]


@pytest.mark.parametrize("x", [sample(3, 1, 4), sample(3, 1, 4)[:, 0]])
def test_freezing_a_single_frame_changes_nothing(x):
    assert torch.equal(freeze(x, rng()), x)


def test_clip_saturates_at_the_limit_times_the_root_mean_square_of_the_sample():
    x = torch.tensor([[[3.0, -4.0]], [[30.0, NOT_A_NUMBER]], [[0.0, 0.0]], [[1.0, torch.inf]]], dtype=torch.float64)
    result = clip(x, 0.5)
    half = 0.5 * (12.5**0.5)
    expected = torch.tensor([[[half, -half]], [[15.0, NOT_A_NUMBER]], [[0.0, 0.0]], [[0.5, 0.5]]], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=0, equal_nan=True)
    assert torch.equal(clip(sample(), 100.0), sample())


@pytest.mark.parametrize("limit", [0.0, -1.0, NOT_A_NUMBER, float("inf")])
def test_a_clip_limit_that_is_not_positive_and_finite_is_refused(limit):
    with pytest.raises(ValueError, match="limit must be a finite number > 0"):
        clip(sample(), limit)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_drop_frames_loses_whole_frames_at_the_given_rate(probability):
    x = sample(200, 10, 3)
    result = drop_frames(x, probability, rng(1))
    dropped = (result == 0).all(dim=2)
    assert torch.equal(result, x.masked_fill(dropped[:, :, None], 0.0))
    low, high = binom.interval(0.99, 2000, probability) if 0 < probability < 1 else (2000 * probability,) * 2
    assert low <= int(dropped.sum()) <= high


@pytest.mark.parametrize("probability", [-0.1, 1.1, NOT_A_NUMBER])
def test_a_probability_outside_0_to_1_is_refused(probability):
    for call in (
        lambda: drop_frames(sample(), probability, rng()),
        lambda: corrupt({"text": sample()}, 0, probability=probability),
        lambda: paper_protocol({"text": sample()}, 0, probability=probability),
    ):
        with pytest.raises(ValueError, match=r"probability must be a finite number in \[0, 1\]"):
            call()


@pytest.mark.parametrize("batch", [2, 3, 10])
@pytest.mark.parametrize("seed", range(20))
def test_mismatch_permutes_the_batch_and_no_sample_keeps_its_own(batch, seed):
    donors = mismatch(torch.arange(float(batch))[:, None], rng(seed))[:, 0]
    assert (donors != torch.arange(float(batch))).all()
    assert torch.equal(donors.sort().values, torch.arange(float(batch)))


def test_a_shorter_donor_repeats_and_an_empty_one_is_silence():
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[10.0], [20.0], [99.0]]])
    result = mismatch(x, rng(), lengths=[3, 2])
    assert result[:, :, 0].tolist() == [[10.0, 20.0, 10.0], [1.0, 2.0, 99.0]]
    assert mismatch(x, rng(), lengths=[3, 0])[:, :, 0].tolist() == [[0.0, 0.0, 0.0], [10.0, 20.0, 99.0]]


def test_mismatch_of_a_single_sample_is_refused():
    with pytest.raises(
        ValueError, match="mismatch needs a batch of 2 samples or more, to exchange the modality, got 1"
    ):
        mismatch(sample(batch=1), rng())


# --- corrupt and paper_protocol ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_corrupt_changes_exactly_what_truth_marks(kind):
    features = three_modalities(300, steps=4)
    before = {name: x.clone() for name, x in features.items()}
    corrupted, truth = corrupt(features, 0, kind=kind)
    assert list(corrupted) == ["text", "audio", "face"]
    assert truth.dtype == torch.bool
    assert 0 < int(truth.sum()) < truth.numel()
    for m, name in enumerate(features):
        assert torch.equal(features[name], before[name])
        changed = (corrupted[name] != features[name]).flatten(1).any(dim=1)
        assert not (changed & ~truth[:, m]).any()
        # Freezing or dropping frames may by chance change nothing; four frames all kept: 0.25^4 of the dropped.
        assert int((truth[:, m] & ~changed).sum()) <= (5 if kind == "drop_frames" else 0)


def test_truth_does_not_depend_on_the_kind():
    truths = [corrupt(three_modalities(50), 3, kind=kind)[1] for kind in EVERY_KIND]
    assert all(torch.equal(truth, truths[0]) for truth in truths)


@pytest.mark.parametrize("probability", [0.25, 0.75])
def test_the_share_of_corrupted_samples_and_modalities_is_as_stated(probability):
    n = 20_000
    _, truth = paper_protocol(three_modalities(n, steps=1), 0, probability=probability)
    count = truth.sum(dim=1)
    assert int(count.max()) == 2
    low, high = binom.interval(0.99, n, probability)
    assert low <= int((count > 0).sum()) <= high
    # One or two of three, equally likely; so each modality is hit in half of the hit samples.
    low, high = binom.interval(0.99, n, probability / 2)
    assert low <= int((count == 1).sum()) <= high
    assert all(low <= int(hits) <= high for hits in truth.sum(dim=0))


@pytest.mark.parametrize(("probability", "hit"), [(0.0, 0), (1.0, 500)])
def test_the_extreme_probabilities_are_exact(probability, hit):
    _, truth = paper_protocol(three_modalities(500), 0, probability=probability)
    assert int(truth.any(dim=1).sum()) == hit


def test_never_all_available_modalities_and_never_an_unavailable_one():
    n = 4000
    available = torch.rand(n, 3, generator=rng(5)) < 0.6
    lengths = torch.randint(0, 3, (n,), generator=rng(6))
    features = {name: x.masked_fill(~available[:, m, None, None], NOT_A_NUMBER) for m, (name, x) in
                enumerate(three_modalities(n).items())}  # fmt: skip
    corrupted, truth = paper_protocol(features, 0, probability=1.0, lengths=lengths, available=available)
    usable = available & (lengths > 0)[:, None]
    assert not (truth & ~usable).any()
    assert torch.equal(truth.any(dim=1), usable.sum(dim=1) >= 2)
    assert (truth.sum(dim=1) <= (usable.sum(dim=1) - 1).clamp(min=0)).all()
    for m, name in enumerate(features):
        torch.testing.assert_close(
            corrupted[name][~usable[:, m]], features[name][~usable[:, m]], rtol=0, atol=0, equal_nan=True
        )
        assert corrupted[name][usable[:, m]].isfinite().all()


def test_an_unavailable_modality_is_never_a_donor():
    x = torch.arange(100.0)[:, None]
    available = torch.stack([torch.ones(100, dtype=torch.bool), torch.arange(100) < 20], dim=1)
    corrupted, truth = corrupt({"a": x, "b": x}, 0, kind="mismatch", probability=1.0, available=available)
    assert int(truth[:20, 1].sum()) > 5
    assert (corrupted["b"][:20] < 20).all()


def test_the_paper_protocol_is_noise_at_one_hundredth_of_the_signal():
    features = {name: sample(40, 50, 40, seed=seed) * (seed + 1) for seed, name in enumerate(("text", "audio"))}
    corrupted, truth = paper_protocol(features, 0)
    for m, name in enumerate(features):
        x, noisy = features[name][truth[:, m]], corrupted[name][truth[:, m]]
        ratio = x.square().mean(dim=(1, 2)) / (noisy - x).square().mean(dim=(1, 2))
        assert len(ratio) > 5
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.01), rtol=0.2, atol=0)


def test_a_seed_fixes_the_result_and_another_seed_changes_it():
    features = three_modalities(60)
    first, again, other = (paper_protocol(features, seed) for seed in (1, 1, 2))
    assert torch.equal(first[1], again[1])
    assert all(torch.equal(first[0][name], again[0][name]) for name in features)
    assert not torch.equal(first[1], other[1])


def test_a_callable_kind_receives_samples_generator_and_lengths():
    features, lengths = three_modalities(40, steps=3), torch.arange(40) % 4
    severe = corrupt(features, 0, kind=partial(drop_frames, probability=1.0), lengths=lengths)
    silent = corrupt(features, 0, kind="silence", lengths=lengths)
    assert all(torch.equal(severe[0][name], silent[0][name]) for name in features)


def test_corruptions_compose():
    x = sample(4, 20, 5)
    result = drop_frames(gaussian_noise(x, 0.01, rng(1)), 0.5, rng(2))
    dropped = (result == 0).all(dim=2)
    assert torch.equal(result[~dropped], gaussian_noise(x, 0.01, rng(1))[~dropped])
    assert dropped.any()


def test_one_modality_or_no_sample_leaves_everything_clean():
    alone, truth = paper_protocol({"text": sample()}, 0, probability=1.0)
    assert not truth.any()
    assert torch.equal(alone["text"], sample())
    empty, truth = paper_protocol(three_modalities(0), 0)
    assert truth.shape == (0, 3)
    assert empty["text"].shape == (0, 2, 5)


@pytest.mark.parametrize(
    ("features", "keywords", "message"),
    [
        ({}, {}, "features must map at least one modality"),
        ({"text": None}, {}, r"features\['text'\] must be a floating tensor"),
        ({"text": sample(3), "audio": sample(2)}, {}, r"features\['audio'\] has shape \(2, 5, 4\)"),
        ({"text": sample(3)}, {"kind": "hum"}, "kind must be one of .*'hum'"),
        ({"text": sample(3)}, {"available": torch.ones(3, 2, dtype=torch.bool)}, "available must be booleans"),
        ({"text": sample(3)}, {"lengths": [6, 1, 1]}, "lengths must lie in 0..5"),
    ],
)
def test_corrupt_names_the_invalid_argument(features, keywords, message):
    with pytest.raises(ValueError, match=message):
        corrupt(features, 0, **keywords)
