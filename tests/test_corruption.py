"""The corruptions change valid frames as documented, and nothing else."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binom

from m3er_fast.corruption import (
    KINDS,
    SEVERITIES,
    another_speaker,
    clip,
    coloured_noise,
    compose,
    corrupt,
    drop_frames,
    drop_words,
    freeze,
    freeze_from,
    gain,
    gaussian_noise,
    hold_frames,
    mismatch,
    named,
    offset,
    paper_protocol,
    shuffle_frames,
    silence,
    takes_groups,
    time_shift,
    wrong_face,
    wrong_words,
)

EVERY_KIND = sorted(KINDS)
DETERMINISTIC = {"silence", "clip", "gain", "freeze_from"}
# These change the values of entries, each in its place; all others move, repeat, replace or zero frames.
IN_PLACE = ["gaussian_noise", "coloured_noise", "brown_noise", "offset", "gain", "clip"]
FROM_OTHER_SAMPLES = ["mismatch", "another_speaker", "wrong_face", "wrong_words"]
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


@pytest.mark.parametrize("kind", sorted(set(EVERY_KIND) - DETERMINISTIC))
def test_the_same_seed_repeats_and_another_seed_differs(kind):
    x = sample(batch=20)
    assert torch.equal(KINDS[kind](x, generator=rng(3)), KINDS[kind](x, generator=rng(3)))
    assert not torch.equal(KINDS[kind](x, generator=rng(3)), KINDS[kind](x, generator=rng(4)))


@pytest.mark.parametrize("kind", sorted(DETERMINISTIC))
def test_a_corruption_that_draws_nothing_leaves_the_generator_as_it_is(kind):
    generator = rng(3)
    KINDS[kind](sample(), generator=generator)
    assert torch.equal(generator.get_state(), rng(3).get_state())


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("shape", [(0, 5, 4), (0, 4)])
def test_an_empty_batch_stays_empty(kind, shape):
    assert KINDS[kind](torch.zeros(shape), generator=rng()).shape == shape


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_batch_without_a_valid_frame_is_unchanged(kind):
    x = sample()
    assert torch.equal(KINDS[kind](x, generator=rng(), lengths=[0] * 6), x)


@pytest.mark.parametrize("kind", sorted(set(EVERY_KIND) - {"mismatch"}))
@pytest.mark.parametrize("shape", [(1, 5, 4), (1, 1, 4), (1, 4)])
def test_a_batch_of_one_is_corrupted_by_itself_or_unchanged(kind, shape):
    x = torch.randn(shape, generator=rng())
    result = KINDS[kind](x, generator=rng(1))
    assert result.isfinite().all()
    if kind in ("another_speaker", "wrong_face"):
        assert torch.equal(result, x)
    if kind in FROM_OTHER_SAMPLES and len(shape) == 3:
        assert all(any(torch.equal(frame, own) for own in x[0]) for frame in result[0])


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_an_utterance_vector_is_a_sequence_of_one_frame(kind):
    x = sample(8, 1, 4)
    assert torch.equal(KINDS[kind](x[:, 0], generator=rng(1)), KINDS[kind](x, generator=rng(1))[:, 0])


@pytest.mark.parametrize("kind", ["freeze", "freeze_from", "hold_frames", "shuffle_frames", "time_shift"])
def test_one_frame_cannot_be_repeated_or_reordered(kind):
    x = sample(6, 3, 4)
    assert torch.equal(KINDS[kind](x, generator=rng(1), lengths=[1] * 6), x)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_changes_values_leaves_nan_in_its_place(kind):
    x = sample(4, 20, 3, dtype=torch.float32)
    x[::2, 3:5, 1] = NOT_A_NUMBER
    result = KINDS[kind](x, generator=rng(1))
    assert torch.equal(result.isnan(), x.isnan())
    assert (result != x)[~x.isnan()].any()


@pytest.mark.parametrize("kind", sorted(set(EVERY_KIND) - set(IN_PLACE)))
def test_what_moves_frames_moves_their_nan_with_them(kind):
    x = sample(6, 20, 3)
    x[::2, 3:5, 1] = NOT_A_NUMBER
    known = {str(frame.tolist()) for frame in x.flatten(0, 1)} | {str([0.0] * 3)}
    assert {str(frame.tolist()) for frame in KINDS[kind](x, generator=rng(1)).flatten(0, 1)} <= known


@pytest.mark.parametrize("kind", sorted(set(EVERY_KIND) - set(FROM_OTHER_SAMPLES)))
def test_a_sample_is_corrupted_whatever_is_in_the_other_samples(kind):
    x, other = sample(6, 12, 4), sample(6, 12, 4, seed=1)
    other[2] = x[2]
    result, among_others = (KINDS[kind](batch, generator=rng(1), lengths=[9] * 6) for batch in (x, other))
    # To rounding: a reduction over another batch may add in another order.
    torch.testing.assert_close(result[2], among_others[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", sorted(SEVERITIES))
def test_a_harsher_severity_is_farther_from_the_original(kind):
    x = sample(200, 30, 4).cumsum(dim=1) / 4  # neighbouring frames alike, as in recordings
    distances = [float((one(x, generator=rng(1)) - x).square().mean()) for one in SEVERITIES[kind]]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_every_kind_has_three_severities_and_its_default_is_the_severe_one():
    x = sample()
    assert set(SEVERITIES) == set(KINDS) - {"freeze_from"}
    for kind, severities in SEVERITIES.items():
        assert severities._fields == ("mild", "medium", "severe")
        assert torch.equal(severities.severe(x, generator=rng(1)), KINDS[kind](x, generator=rng(1)))


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


def spectrum_slope(noise):
    """The slope of log power over log frequency at frequencies of up to a tenth of the rate, noise (samples, T)."""
    power = (np.abs(np.fft.rfft(noise, axis=1)) ** 2).mean(axis=0)
    frequency = np.fft.rfftfreq(noise.shape[1])
    low = (frequency > 2 / noise.shape[1]) & (frequency < 0.1)
    return np.polyfit(np.log(frequency[low]), np.log(power[low]), 1)[0]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_coloured_noise_has_the_spectrum_that_its_exponent_says(exponent):
    x = sample(40, 1000, 10)
    noise = (coloured_noise(x, 1.0, exponent, rng(1)) - x).transpose(1, 2).flatten(0, 1).numpy()
    assert spectrum_slope(noise) == pytest.approx(-exponent, abs=0.08)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("snr", [0.01, 1.0, 10.0])
def test_coloured_noise_has_exactly_the_power_ratio_asked_for_in_every_sample(snr, exponent):
    lengths = torch.tensor([1, 2, 10, 30, 30])
    x = sample(5, 30, 3) * torch.tensor([1e-6, 1.0, 1e6, 1.0, 1e20])[:, None, None]
    x[3, :5, 0] = NOT_A_NUMBER
    noisy = coloured_noise(x, snr, exponent, rng(1), lengths=lengths).numpy()
    for clean, found, length in zip(x.numpy(), noisy, lengths.tolist(), strict=True):
        signal, noise = clean[:length], (found - clean)[:length]
        assert np.nanmean(signal**2) / np.nanmean(noise**2) == pytest.approx(snr, rel=1e-6)


def test_brown_noise_is_the_running_sum_of_white_noise_and_pink_noise_is_integrated_half_as_often():
    x = torch.zeros(1, 50, 1, dtype=torch.float64)
    white, pink, brown = (coloured_noise(x, 1.0, exponent, rng(1))[0, :, 0].numpy() for exponent in (0.0, 1.0, 2.0))
    assert np.corrcoef(np.cumsum(white), brown)[0, 1] == pytest.approx(1)
    kernel = np.cumprod(np.r_[1.0, (np.arange(1, 50) - 0.5) / np.arange(1, 50)])
    assert np.corrcoef(np.convolve(white, kernel)[:50], pink)[0, 1] == pytest.approx(1)
    assert np.corrcoef(np.convolve(pink, kernel)[:50], brown)[0, 1] == pytest.approx(1)


def test_coloured_noise_of_a_silent_sample_has_unit_power_over_the_ratio():
    noise = coloured_noise(torch.zeros(3, 40, 5), 0.25, 1.0, rng(1))
    torch.testing.assert_close(noise.square().mean(dim=(1, 2)), torch.full((3,), 4.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coloured_noise(sample(), 0.0, 1.0, rng()), "snr must be a finite number > 0"),
        (lambda: coloured_noise(sample(), 1.0, 2.5, rng()), r"exponent must be a finite number in \[0, 2\]"),
        (lambda: offset(sample(), 0.0, rng()), "size must be a finite number > 0"),
        (lambda: gain(sample(), -1.0), "factor must be a finite number > 0"),
        (lambda: freeze_from(sample(), 1.5), r"fraction must be a finite number in \[0, 1\]"),
        (lambda: silence(sample(), fraction=-0.5), r"fraction must be a finite number in \[0, 1\]"),
        (lambda: mismatch(sample(), rng(), fraction=2.0), r"fraction must be a finite number in \[0, 1\]"),
        (lambda: time_shift(sample(), 0, rng()), "steps must be a positive int, got 0"),
        (lambda: time_shift(sample(), 1.5, rng()), "steps must be a positive int, got 1.5"),
        (lambda: hold_frames(sample(), 1.1, rng()), r"probability must be a finite number in \[0, 1\]"),
        (lambda: shuffle_frames(sample(), 1.1, rng()), r"probability must be a finite number in \[0, 1\]"),
        (lambda: drop_words(sample(), 1.1, rng()), r"probability must be a finite number in \[0, 1\]"),
        (lambda: wrong_words(sample(), 1.1, rng()), r"probability must be a finite number in \[0, 1\]"),
        (lambda: wrong_face(sample(), rng(), groups=["a"]), r"groups must be strings or integers of shape \(6,\)"),
        (lambda: another_speaker(sample(), rng(), groups=[0.5] * 6), "groups must be .*, got float64"),
    ],
)
def test_a_severity_out_of_range_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_offset_moves_every_feature_by_its_size_in_every_frame_up_or_down():
    x = sample(100, 5, 8)
    moved = (offset(x, 0.7, rng(1)) - x).numpy()
    np.testing.assert_allclose(np.abs(moved), 0.7, rtol=1e-12)
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1], moved.shape), rtol=1e-12)
    low, high = binom.interval(0.99, 800, 0.5)
    assert low <= (moved[:, 0] > 0).sum() <= high


def test_gain_multiplies_the_amplitude():
    assert torch.equal(gain(sample(), 2.5), 2.5 * sample())


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, [0, 0, 0, 0, 0]),
        (0.5, [0, 1, 2, 2, 2]),
        (0.75, [0, 1, 2, 3, 3]),
        (0.99, [0, 1, 2, 3, 3]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_freeze_from_holds_the_frame_of_the_moment_to_the_end(fraction, expected):
    x = torch.arange(7.0).view(1, 7, 1)
    assert freeze_from(x, fraction, lengths=[5])[0, :, 0].tolist() == [*expected, 5, 6]


@pytest.mark.parametrize(
    ("fraction", "first", "of_one"), [(0.0, 0, 0), (0.5, 2, 0), (0.75, 3, 0), (0.99, 4, 0), (1.0, 5, 1)]
)
def test_silence_and_another_sample_s_frames_begin_after_a_share_of_the_sequence(fraction, first, of_one):
    x = torch.ones(2, 7, 3)
    result = silence(x, fraction=fraction, lengths=[5, 1])
    assert (result[:, :, 0] == 0).nonzero().tolist() == [[0, t] for t in range(first, 5)] + [[1, 0]] * (1 - of_one)
    x = torch.arange(14.0).view(2, 7, 1)
    swapped = mismatch(x, rng(), fraction=fraction, lengths=[5, 5])[:, :, 0].tolist()
    mine, yours = x[:, :, 0].tolist()
    assert swapped[0] == [*mine[:first], *yours[first:5], *mine[5:]]
    assert swapped[1] == [*yours[:first], *mine[first:5], *yours[5:]]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_hold_frames_repeats_the_last_good_frame_at_the_given_rate(probability):
    x = sample(200, 11, 3)
    result = hold_frames(x, probability, rng(1))
    repeated = (result[:, 1:] == result[:, :-1]).all(dim=2).numpy()
    low, high = binom.interval(0.99, 2000, probability) if 0 < probability < 1 else (2000 * probability,) * 2
    assert low <= repeated.sum() <= high
    for clean, found, held in zip(x, result, repeated, strict=True):
        last = clean[0]
        for t in range(11):
            last = last if t and held[t - 1] else clean[t]
            assert torch.equal(found[t], last)


def test_hold_frames_loses_the_frames_that_drop_frames_loses_but_the_first():
    x = sample(50, 10, 3)
    dropped = (drop_frames(x, 0.5, rng(1)) == 0).all(dim=2)
    held = (hold_frames(x, 0.5, rng(1)) != x).any(dim=2)
    assert torch.equal(held[:, 1:], dropped[:, 1:])
    assert not held[:, 0].any()


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_shuffle_frames_permutes_the_valid_frames_chosen(probability):
    x = torch.arange(20.0).expand(400, 20)[:, :, None].contiguous()
    result = shuffle_frames(x, probability, rng(1), lengths=[15] * 400)[:, :, 0]
    assert torch.equal(result.sort(dim=1).values, x[:, :, 0])
    assert torch.equal(result[:, 15:], x[:, 15:, 0])
    # Of n frames chosen, one on average comes back to its place.
    stays = float((result[:, :15] == x[:, :15, 0]).sum(dim=1).double().mean())
    assert stays == pytest.approx(15 * (1 - probability) + (probability > 0), abs=0.3)


def test_shuffle_frames_can_put_every_frame_everywhere():
    x = torch.arange(4.0).expand(2400, 4)[:, :, None].contiguous()
    orders = [tuple(order) for order in shuffle_frames(x, 1.0, rng(1))[:, :, 0].int().tolist()]
    counts = [orders.count(order) for order in set(orders)]
    low, high = binom.interval(0.9999, 2400, 1 / 24)
    assert len(counts) == 24
    assert low <= min(counts) <= max(counts) <= high


def test_time_shift_is_late_or_early_by_its_steps_and_holds_the_edge():
    x = torch.arange(7.0).expand(200, 7)[:, :, None].contiguous()
    result = time_shift(x, 2, rng(1), lengths=[5] * 200)[:, :, 0].tolist()
    late, early = [0, 0, 0, 1, 2, 5, 6], [2, 3, 4, 4, 4, 5, 6]
    assert all(order in (late, early) for order in result)
    low, high = binom.interval(0.99, 200, 0.5)
    assert low <= result.count(late) <= high


def test_a_shift_beyond_the_sequence_holds_its_first_or_last_frame():
    x = torch.arange(5.0).expand(20, 5)[:, :, None].contiguous()
    result = time_shift(x, 9, rng(1), lengths=[3] * 20)[:, :, 0].tolist()
    assert {tuple(order) for order in result} == {(0, 0, 0, 3, 4), (2, 2, 2, 3, 4)}


WORDS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])  # a sequence of four words


def words_of(x):
    """The number of each word of (B, T, d): runs of equal frames, by NumPy."""
    return np.cumsum(np.r_["1", np.zeros((len(x), 1), bool), (np.diff(x.numpy(), axis=1) != 0).any(axis=2)], axis=1)


def test_drop_words_loses_whole_words_at_the_given_rate():
    x = sample(500, 4, 3)[:, WORDS]
    lost = (drop_words(x, 0.3, rng(1)) == 0).all(dim=2).numpy()
    number = words_of(x)
    rates = np.stack([np.where(number == word, lost, np.nan) for word in range(4)])
    low, high = binom.interval(0.999, 500, 0.3)
    for word in rates:
        share = np.nanmean(word, axis=1)
        assert set(share.tolist()) == {0.0, 1.0}  # all of a word or nothing
        assert low <= share.sum() <= high
    kept = torch.from_numpy(~lost)
    assert torch.equal(drop_words(x, 0.3, rng(1))[kept], x[kept])


def test_wrong_words_are_other_frames_of_the_batch_one_for_each_word():
    x = torch.arange(2000.0).view(500, 4, 1)[:, WORDS]
    result = wrong_words(x, 0.3, rng(1), lengths=[9] * 500)
    wrong = (result != x)[:, :, 0].numpy()
    number = words_of(x)
    assert not wrong[:, 9].any()
    start = np.searchsorted(WORDS.numpy(), WORDS.numpy())
    assert torch.equal(result[:, :9], result[:, start[:9]])  # one frame for each word
    assert np.isin(result.numpy(), x.numpy()).all()
    low, high = binom.interval(0.999, 2000, 0.3)
    assert low <= sum(len(np.unique(number[row, wrong[row]])) for row in range(500)) <= high
    # Replacements are drawn from all frames: long words, of four frames, twice as often as those of two (cut to one).
    drawn = result.numpy()[:, :, 0].astype(int)[wrong] % 4
    counts = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(counts, np.array([3, 1, 4, 1]) / 9, atol=0.06)


def test_a_word_is_never_replaced_by_itself():
    x = torch.arange(3.0)[:, None]
    for seed in range(30):
        result = wrong_words(x, 1.0, rng(seed))
        assert (result != x).all()
        assert torch.isin(result, x).all()


def test_frames_that_differ_are_words_of_their_own():
    x = sample(300, 10, 3)
    lost = (drop_words(x, 0.5, rng(1)) == 0).all(dim=2)
    low, high = binom.interval(0.99, 3000, 0.5)
    assert low <= int(lost.sum()) <= high
    assert torch.equal(lost, (drop_frames(x, 0.5, rng(1)) == 0).all(dim=2))


GROUPS = ["ann", "bob", "ann", "eve", "bob", "ann", "bob", "eve", "ann", "dan"]


@pytest.mark.parametrize("groups", [GROUPS, np.array(GROUPS), [ord(name[0]) for name in GROUPS]])
def test_another_speaker_is_of_another_group_and_a_wrong_face_of_the_same(groups):
    x = torch.arange(10.0)[:, None]
    name = np.array(GROUPS)
    received = {function: set() for function in (another_speaker, wrong_face)}
    for seed in range(400):
        for function, pairs in received.items():
            pairs |= set(enumerate(function(x, rng(seed), groups=groups)[:, 0].int().tolist()))
    others = {(i, j) for i in range(10) for j in range(10) if name[i] != name[j]}
    own = {(i, j) for i in range(10) for j in range(10) if name[i] == name[j] and i != j}
    assert received[another_speaker] == others
    assert received[wrong_face] == own | {(9, 9)}  # Dan has one utterance: unchanged


def test_donors_are_drawn_uniformly():
    x = torch.arange(10.0)[:, None]
    drawn = np.array([another_speaker(x, rng(seed), groups=GROUPS)[1, 0] for seed in range(2100)], int)
    counts = np.bincount(drawn, minlength=10)
    low, high = binom.interval(0.9999, 2100, 1 / 7)
    assert counts[[1, 4, 6]].tolist() == [0, 0, 0]
    assert all(low <= count <= high for count in np.delete(counts, [1, 4, 6]))


@pytest.mark.parametrize("function", [another_speaker, wrong_face])
def test_without_groups_the_donor_is_any_other_sample(function):
    x = torch.arange(4.0)[:, None]
    pairs = {pair for seed in range(200) for pair in enumerate(function(x, rng(seed))[:, 0].int().tolist())}
    assert pairs == {(i, j) for i in range(4) for j in range(4) if i != j}


@pytest.mark.parametrize(
    ("function", "groups"), [(another_speaker, ["ann"] * 4), (wrong_face, ["ann", "bob", "eve", "dan"])]
)
def test_a_sample_without_a_possible_donor_is_unchanged(function, groups):
    x = sample(4, 5, 3)
    assert torch.equal(function(x, rng(), groups=groups), x)


@pytest.mark.parametrize("function", [another_speaker, wrong_face])
def test_a_sample_without_frames_is_never_a_donor_and_a_shorter_donor_repeats(function):
    x = torch.arange(9.0).view(3, 3, 1)
    groups = ["ann"] * 3 if function is wrong_face else ["ann", "bob", "eve"]
    for seed in range(10):
        result = function(x, rng(seed), groups=groups, lengths=[3, 0, 2])[:, :, 0].tolist()
        assert result == [[6.0, 7.0, 6.0], [3.0, 4.0, 5.0], [0.0, 1.0, 8.0]]


# --- names and compositions -------------------------------------------------------------------------------------------


def test_a_corruption_is_found_by_name_and_by_name_and_severity():
    x = sample()
    assert named("freeze") is KINDS["freeze"]
    assert named("gain:mild") is SEVERITIES["gain"].mild
    features = {"a": x, "b": x}
    found, wanted = (corrupt(features, 0, kind=kind)[0] for kind in ("gain:mild", partial(gain, factor=1.5)))
    assert all(torch.equal(found[name], wanted[name]) for name in features)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hum", "kind must be one of 'another_speaker', .*, got 'hum'"),
        ("hum:mild", "kind must be one of .*, got 'hum'"),
        ("gain:", "the severity of kind must be one of 'mild', 'medium', 'severe', got ''"),
        ("gain:harsh", "the severity of kind must be one of 'mild', 'medium', 'severe', got 'harsh'"),
        (3, "kind must be one of .*, got 3"),
    ],
)
def test_an_unknown_name_or_severity_is_one_clear_error(name, message):
    with pytest.raises(ValueError, match=message):
        named(name)


def test_a_composition_applies_its_parts_in_turn_from_one_generator():
    x, lengths, generator = sample(4, 20, 5), [20, 10, 3, 0], rng(1)
    both = compose("gaussian_noise:medium", partial(drop_frames, probability=0.5))
    expected = gaussian_noise(x, 1.0, generator, lengths=lengths)
    expected = drop_frames(expected, 0.5, generator, lengths=lengths)
    assert torch.equal(both(x, generator=rng(1), lengths=lengths), expected)
    nested = compose(compose("gaussian_noise:medium"), partial(drop_frames, probability=0.5))
    assert torch.equal(nested(x, generator=rng(1), lengths=lengths), expected)
    assert torch.equal(compose()(x, generator=rng(1)), x)


@pytest.mark.parametrize("first", EVERY_KIND)
def test_every_two_kinds_compose(first):
    x, lengths = sample(6, 9, 3), [9, 5, 3, 0, 1, 2]
    padding = torch.arange(9) >= torch.tensor(lengths)[:, None]
    for second in EVERY_KIND:
        result = compose(first, second)(x, generator=rng(1), lengths=lengths)
        assert result.isfinite().all()
        assert torch.equal(result[padding], x[padding])


def test_groups_reach_the_kinds_that_use_them_and_no_other():
    assert {kind for kind in EVERY_KIND if takes_groups(KINDS[kind])} == {"another_speaker", "wrong_face"}
    assert takes_groups(compose("gain", compose("wrong_face")))
    assert not takes_groups(compose("gain", "mismatch"))
    x, name = torch.arange(10.0)[:, None], np.array(GROUPS)
    for kind in ("wrong_face", compose("freeze", "wrong_face")):
        corrupted, truth = corrupt({"a": x, "b": x}, 0, kind=kind, probability=1.0, groups=GROUPS)
        for m, values in enumerate(corrupted.values()):
            received = values[:, 0].int().numpy()
            assert (name[received] == name).all()
            assert ((received != np.arange(10)) == (truth[:, m].numpy() & (name != "dan"))).all()
    corrupted, truth = corrupt({"a": x, "b": x}, 0, kind="silence", groups=GROUPS)
    assert torch.equal(corrupted["a"] == 0, truth[:, :1] | (x == 0))


def test_groups_follow_the_samples_that_have_the_modality():
    available = torch.ones(10, 2, dtype=torch.bool)
    available[:5, 1] = False
    x, name = torch.arange(10.0)[:, None], np.array(GROUPS)
    for seed in range(20):
        corrupted, _ = corrupt(
            {"a": x, "b": x}, seed, kind="wrong_face", probability=1.0, available=available, groups=GROUPS
        )
        received = corrupted["b"][:, 0].int().numpy()
        assert (name[received] == name).all()
        assert (received[5:] >= 5).all()


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
        # By chance nothing changes if all four frames are kept, or come back to their places in one of 4! orders.
        share = {"drop_frames": 1 / 4**4, "drop_words": 1 / 4**4, "wrong_words": 1 / 4**4, "hold_frames": 1 / 4**3}
        share["shuffle_frames"] = 1 / 24
        unchanged = int((truth[:, m] & ~changed).sum())
        assert unchanged <= binom.ppf(0.999, int(truth[:, m].sum()), share.get(kind, 0))


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
