"""Standardizer: statistics against a NumPy float64 oracle, and the rules for input that is not clean."""

import copy
import math
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from m3er_fast import standardize
from m3er_fast.inputs import prepare_batch
from m3er_fast.standardize import Standardizer, clean_frames

DIMS = {"text": 4, "audio": 3, "face": 2}
NAN, INF = float("nan"), float("inf")


def random_corpus(n=60, steps=5, seed=0, dtype=np.float32, dirt=0.15):
    """Features with NaN and inf among them, lengths from 0 to T, and modalities that are missing here and there."""
    rng = np.random.default_rng(seed)
    features = {}
    for name, dim in DIMS.items():
        x = rng.normal(size=(n, steps, dim)) * rng.uniform(0.1, 50, size=dim) + rng.normal(size=dim) * 10
        dirty = rng.random(x.shape)
        x[dirty < dirt] = NAN
        x[dirty < dirt / 3] = INF
        x[dirty < dirt / 6] = -INF
        features[name] = x.astype(dtype)
    return features, rng.integers(0, steps + 1, size=n), rng.random((n, len(DIMS))) < 0.8


def oracle(features, lengths, available):
    """Per modality the mean, scale and number of valid frames, sample by sample and frame by frame."""
    result = []
    for m, name in enumerate(DIMS):
        frames = [
            frame.astype(np.float64)
            for x, length, present in zip(features[name], lengths, available[:, m], strict=True)
            if present
            for frame in x[:length]
            if np.isfinite(frame).sum() * 2 >= frame.size
        ]
        rows = np.array(frames).reshape(-1, DIMS[name])
        rows[~np.isfinite(rows)] = NAN
        result.append((np.nanmean(rows, axis=0), np.nanstd(rows, axis=0), len(rows)))
    return result


def statistics(standardizer):
    return [
        (getattr(standardizer, f"mean_{m}"), getattr(standardizer, f"scale_{m}"), int(standardizer.count[m]))
        for m in range(len(standardizer.input_dims))
    ]


def assert_statistics(standardizer, expected, tolerance=1e-6):
    for (mean, scale, count), (want_mean, want_scale, want_count) in zip(
        statistics(standardizer), expected, strict=True
    ):
        np.testing.assert_allclose(mean.numpy(), want_mean, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(scale.numpy(), want_scale, rtol=tolerance)
        assert count == want_count


def batches_of(features, lengths, available, cuts):
    pieces = np.split(np.arange(len(lengths)), cuts)
    return [({name: x[p] for name, x in features.items()}, lengths[p], available[p]) for p in pieces]


def equal_batches(first, second):
    for a, b in zip(first.features, second.features, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name in ("lengths", "available", "frame_valid"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.fixture(scope="module")
def fitted():
    return Standardizer(DIMS).fit([random_corpus()])


# --- learned statistics ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_equal_the_oracle(dtype):
    corpus = random_corpus(n=400, dtype=dtype)
    assert_statistics(Standardizer(DIMS).fit([corpus]), oracle(*corpus))


@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 57], [20, 20, 40], [0, 60]], ids=str)
def test_one_go_streamed_and_merged_in_any_order_agree(cuts):
    corpus = random_corpus()
    batches = batches_of(*corpus, cuts)
    streamed = Standardizer(DIMS)
    for batch in batches:
        assert streamed.partial_fit([batch]) is streamed
    results = [Standardizer(DIMS).fit([corpus]), Standardizer(DIMS).fit(batches), streamed]
    for ordered in (batches, batches[::-1]):
        merged = Standardizer(DIMS)
        for batch in ordered:
            assert merged.merge(Standardizer(DIMS).fit([batch])) is merged
        results.append(merged)
    for standardizer in results:
        assert_statistics(standardizer, oracle(*corpus))


@pytest.mark.parametrize("offset", [1e6, -1e6])
def test_large_offset_in_float32_costs_no_accuracy(offset):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5000, 3)) + offset).astype(np.float32)
    x[:, 2] = offset + 1
    standardizer = Standardizer({"a": 3}).fit([{"a": part} for part in np.split(x, 10)])
    exact = x.astype(np.float64)
    np.testing.assert_allclose(standardizer.mean_0, exact.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(standardizer.scale_0, [*exact.std(axis=0)[:2], 1.0], rtol=1e-6)
    z = standardizer({"a": x}).features[0]
    assert (z[:, 0, :2].mean(dim=0).abs() < 0.04).all()  # half of float32's spacing at 1e6
    torch.testing.assert_close(z.std(dim=0, correction=0)[0, :2], torch.ones(2), rtol=1e-4, atol=0)
    assert not z[:, 0, 2].any()


@pytest.mark.parametrize("constant", [0.0, 0.1, 3e38, 1e-42, 1e6 + 1])
def test_constant_feature_gets_scale_one_and_standardises_to_zero(constant):
    x = torch.full((300, 2, 1), constant)
    standardizer = Standardizer({"a": 1}).fit([{"a": x[:7]}, {"a": x[7:]}])
    assert standardizer.scale_0.item() == 1.0
    assert not standardizer({"a": x}).features[0].any()


def test_jitter_of_float32_rounding_counts_as_constant():
    steps = torch.tensor([1e6]).nextafter(torch.tensor(INF))
    x = torch.cat([torch.full((10,), 1e6), steps.expand(10)])[:, None]
    assert Standardizer({"a": 1}).fit({"a": x}).scale_0.item() == 1.0


def test_small_spread_around_zero_is_no_constant():
    x = torch.tensor([[-1e-30], [1e-30]])
    standardizer = Standardizer({"a": 1}).fit({"a": x})
    torch.testing.assert_close(standardizer({"a": x}).features[0].flatten(), torch.tensor([-1.0, 1.0]))


def test_modality_or_feature_never_seen_keeps_mean_zero_and_scale_one():
    features = {"text": torch.randn(20, 4) + 5, "audio": torch.full((20, 3), NAN)}
    features["text"][:, 1] = INF
    standardizer = Standardizer(DIMS).fit(features)
    assert standardizer.count.tolist() == [20, 0, 0]
    assert (standardizer.mean_0[1].item(), standardizer.scale_0[1].item()) == (0.0, 1.0)
    for mean, scale, _ in statistics(standardizer)[1:]:
        assert not mean.any()
        assert (scale == 1).all()


def test_unfitted_standardizer_only_cleans():
    x = torch.tensor([[[1.0, NAN, 3.0]], [[NAN, INF, 3.0]]])
    batch = Standardizer({"a": 3})({"a": x})
    assert batch.features[0].tolist() == [[[1.0, 0.0, 3.0]], [[0.0, 0.0, 0.0]]]
    assert batch.available.tolist() == [[True], [False]]


def test_fit_forgets_earlier_data():
    corpus = random_corpus()
    again = Standardizer(DIMS).fit([random_corpus(seed=1)]).fit([corpus])
    assert_statistics(again, oracle(*corpus))


def test_fit_of_no_samples_learns_nothing(fitted):
    empty = {name: torch.empty(0, 3, dim) for name, dim in DIMS.items()}
    standardizer = Standardizer(DIMS).fit(empty)
    assert standardizer.count.tolist() == [0, 0, 0]
    before = [(m.clone(), s.clone(), c) for m, s, c in statistics(fitted)]
    assert_statistics(copy.deepcopy(fitted).partial_fit(empty), before, tolerance=1e-7)


def test_failed_fit_leaves_the_statistics_unchanged():
    corpus = random_corpus()
    standardizer = Standardizer(DIMS).fit([corpus])
    for method in (standardizer.fit, standardizer.partial_fit):
        with pytest.raises(ValueError, match=r"features\['text'\] has shape \(2, 9\)"):
            method([{"text": torch.ones(5, 4)}, {"text": torch.ones(2, 9)}])
    assert_statistics(standardizer, oracle(*corpus))
    more = random_corpus(seed=1)
    both = [np.concatenate(pair) for pair in zip(corpus[1:], more[1:], strict=True)]
    joined = {name: np.concatenate([corpus[0][name], more[0][name]]) for name in DIMS}
    assert_statistics(standardizer.partial_fit([more]), oracle(joined, *both))


# --- standardised batches ---


def test_output_equals_the_oracle(fitted):
    features, lengths, available = random_corpus(seed=2)
    batch = fitted(features, lengths, available)
    for m, (name, dim) in enumerate(DIMS.items()):
        mean, scale, _ = (np.asarray(v, dtype=np.float64) for v in oracle(*random_corpus())[m])
        expected = np.zeros(features[name].shape)
        valid = np.zeros(features[name].shape[:2], dtype=bool)
        for b, x in enumerate(features[name]):
            for t in range(lengths[b] if available[b, m] else 0):
                finite = np.isfinite(x[t])
                valid[b, t] = finite.sum() >= dim / 2
                if valid[b, t]:
                    expected[b, t] = np.where(finite, (x[t] - mean) / scale, 0.0)
        np.testing.assert_allclose(batch.features[m].numpy(), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(batch.frame_valid[:, :, m], valid)
        np.testing.assert_array_equal(batch.available[:, m], valid.any(axis=1))
    np.testing.assert_array_equal(batch.lengths, lengths)


def test_training_data_come_out_with_mean_zero_and_variance_one(fitted):
    features, lengths, available = random_corpus(dirt=0.0)
    standardizer = Standardizer(DIMS).fit(features, lengths=lengths, available=available)
    batch = standardizer(features, lengths, available)
    for m, z in enumerate(batch.features):
        valid = z[batch.frame_valid[:, :, m]]
        torch.testing.assert_close(valid.mean(dim=0), torch.zeros(z.shape[-1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(valid.std(dim=0, correction=0), torch.ones(z.shape[-1]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("frame", "valid"),
    [
        ([1.0, 1.0, 1.0, 1.0], True),
        ([NAN, 1.0, 1.0, 1.0], True),
        ([NAN, INF, 1.0, 1.0], True),
        ([NAN, INF, -INF, 1.0], False),
        ([NAN, NAN, NAN, NAN], False),
    ],
)
def test_frame_is_invalid_with_more_than_half_of_its_entries_not_finite(fitted, frame, valid):
    batch = fitted({"text": torch.tensor([frame])})
    assert batch.frame_valid.tolist() == [[[valid, False, False]]]
    assert batch.available.tolist() == [[valid, False, False]]
    finite = torch.isfinite(torch.tensor(frame))
    z = batch.features[0][0, 0]
    assert ((z != 0) == (finite & valid)).all()


def test_half_of_an_odd_number_of_entries_is_counted_exactly():
    standardizer = Standardizer({"one": 1, "three": 3})
    batch = standardizer({"one": torch.tensor([[NAN], [1.0]]), "three": torch.tensor([[NAN, 1, 1], [NAN, NAN, 1]])})
    assert batch.frame_valid[:, 0].tolist() == [[False, True], [True, False]]


def test_invalid_frame_inside_a_sequence_is_zero_and_its_neighbours_are_not(fitted):
    x = torch.randn(2, 3, 4)
    dirty = x.clone()
    dirty[0, 1] = NAN
    clean, batch = fitted({"text": x}), fitted({"text": dirty})
    assert batch.frame_valid[0, :, 0].tolist() == [True, False, True]
    assert not batch.features[0][0, 1].any()
    torch.testing.assert_close(batch.features[0][0, ::2], clean.features[0][0, ::2], rtol=0, atol=0)
    torch.testing.assert_close(batch.features[0][1], clean.features[0][1], rtol=0, atol=0)
    assert batch.available[:, 0].all()


@pytest.mark.parametrize("garbage", [0.0, NAN, INF, 1e30, -3e38])
def test_padding_and_unavailable_modalities_never_change_a_result(fitted, garbage):
    features, lengths, available = random_corpus()
    filled = {}
    for m, (name, x) in enumerate(features.items()):
        hidden = (np.arange(x.shape[1]) >= lengths[:, None]) | ~available[:, m, None]
        filled[name] = np.where(hidden[:, :, None], np.float32(garbage), x)
    equal_batches(fitted(filled, lengths, available), fitted(features, lengths, available))
    again = Standardizer(DIMS).fit(filled, lengths=lengths, available=available)
    for (mean, scale, count), (want_mean, want_scale, want_count) in zip(
        statistics(again), statistics(fitted), strict=True
    ):
        assert torch.equal(mean, want_mean)
        assert torch.equal(scale, want_scale)
        assert count == want_count


def test_longer_padding_never_changes_a_result(fitted):
    features, lengths, available = random_corpus()
    padded = {name: np.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=NAN) for name, x in features.items()}
    short, long = fitted(features, lengths, available), fitted(padded, lengths, available)
    for a, b in zip(short.features, long.features, strict=True):
        torch.testing.assert_close(b[:, :5], a, rtol=0, atol=0)
        assert not b[:, 5:].any()
    assert not long.frame_valid[:, 5:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_clean_samples_come_out_bit_for_bit_as_they_do_beside_one_that_is_not_clean(fitted, dtype):
    generator = torch.Generator().manual_seed(4)
    features = {name: 10 * torch.randn(6, 5, dim, generator=generator).to(dtype) for name, dim in DIMS.items()}
    lengths = torch.tensor([5, 3, 0, 5, 1, 5])
    available = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [False, True, True], [True] * 3, [True] * 3])
    for beside in (NAN, -INF, 3e38):
        if beside == 3e38 and dtype == torch.float16:
            continue
        dirty = {name: x.clone() for name, x in features.items()}
        dirty["audio"][5, 4, 1] = beside
        for arguments in ((), (lengths,), (lengths, available)):
            clean, mixed = fitted(features, *arguments), fitted(dirty, *arguments)
            assert all(torch.equal(a[:5], b[:5]) for a, b in zip(clean.features, mixed.features, strict=True))
            for name in ("lengths", "available", "frame_valid"):
                assert torch.equal(getattr(clean, name), getattr(mixed, name))


def test_none_missing_key_and_available_false_are_one_thing(fitted):
    features = {name: torch.randn(6, 3, dim) for name, dim in DIMS.items()}
    available = torch.tensor([True, False, True]).expand(6, 3)
    masked = fitted(features, available=available)
    equal_batches(fitted({**features, "audio": None}), masked)
    equal_batches(fitted({"text": features["text"], "face": features["face"]}), masked)
    assert masked.available[0].tolist() == [True, False, True]
    assert not masked.frame_valid[:, :, 1].any()
    fits = [
        Standardizer(DIMS).fit({**features, "audio": None}),
        Standardizer(DIMS).fit(features, available=available),
    ]
    assert torch.equal(fits[0].get_extra_state(), fits[1].get_extra_state())


def test_sample_without_a_finite_entry_is_unavailable_and_zero(fitted):
    batch = fitted({name: torch.full((2, 3, dim), NAN) for name, dim in DIMS.items()})
    assert not batch.available.any()
    assert not batch.frame_valid.any()
    assert all(not z.any() for z in batch.features)
    assert batch.lengths.tolist() == [3, 3]


def test_sample_of_length_zero_is_unavailable(fitted):
    batch = fitted({"text": torch.randn(2, 3, 4)}, lengths=torch.tensor([0, 2]))
    assert batch.available[:, 0].tolist() == [False, True]


@pytest.mark.parametrize("shape", [(0, 3), (0, 1), (1, 1), (4, 1)], ids=str)
def test_empty_and_single_step_batches_keep_their_shapes(fitted, shape):
    batch = fitted({name: torch.randn(*shape, dim) for name, dim in DIMS.items()})
    assert [tuple(z.shape) for z in batch.features] == [(*shape, dim) for dim in DIMS.values()]
    assert batch.available.shape == (shape[0], 3)
    assert batch.frame_valid.shape == (*shape, 3)
    if shape[1] == 1:
        flat = fitted({name: torch.zeros(shape[0], dim) for name, dim in DIMS.items()})
        assert flat.features[0].shape == batch.features[0].shape


@pytest.mark.parametrize("value", [3e38, -3e38, 1e30])
def test_huge_finite_values_stay_finite_even_when_squared(fitted, value):
    z = fitted({"text": torch.tensor([[value, 0.0, 0.0, 0.0]])}).features[0]
    assert z[0, 0, 0].item() == np.sign(value) * 1e4
    assert torch.isfinite(z.square().sum())


@pytest.mark.parametrize("part", [2, 2**24])
@pytest.mark.parametrize("odd", [None, 9e3, 9.999e3, 1.1e4, -1.1e4, 3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("level", [0.0, 9e3])  # with the second the sum of squares decides nothing
def test_the_usual_case_is_told_from_all_others(monkeypatch, level, odd, part):
    monkeypatch.setattr(standardize, "_PART", part)
    x = torch.full((2, 3, 2), level)
    if odd is not None:
        x[1, 2, 0] = odd
    batch = Standardizer({"a": 2})({"a": x})
    assert batch.is_complete == (odd is None or abs(odd) <= 1e4)
    assert batch.frame_valid.all()  # half of a frame is enough
    assert torch.equal(batch.features[0], x.nan_to_num(0.0, 0.0, 0.0).clamp(-1e4, 1e4))


@pytest.mark.parametrize(
    "more", [{"lengths": [2, 2]}, {"available": [[True, True], [True, True]]}, {"features": {"b": None}}], ids=str
)
def test_what_is_said_of_a_batch_is_looked_at(more):
    features = {"a": torch.ones(2, 2, 1), "b": torch.ones(2, 2, 1)} | more.pop("features", {})
    assert not Standardizer({"a": 1, "b": 1})(features, **more).is_complete


def test_fit_to_the_extremes_of_float32_gives_no_nan():
    x = torch.tensor([[3e38, 1.0], [-3e38, 2.0], [3e38, 3.0]])
    standardizer = Standardizer({"a": 2}).fit({"a": x})
    assert torch.isfinite(standardizer.mean_0).all()
    assert torch.isfinite(standardizer.scale_0).all()
    expected = (x.double() - x.double().mean(dim=0)) / x.double().std(dim=0, correction=0)
    torch.testing.assert_close(standardizer({"a": x.double()}).features[0][:, 0], expected, rtol=1e-6, atol=1e-6)
    # In float32 the difference to the mean overflows, and what the bound makes of it is finite.
    assert standardizer({"a": x}).features[0][1, 0, 0].item() == -1e4


def test_float64_value_beyond_float32_counts_as_not_finite():
    x = torch.tensor([[1e300, 1.0], [2.0, 3.0], [4.0, 5.0]], dtype=torch.float64)
    standardizer = Standardizer({"a": 2}).fit({"a": x})
    torch.testing.assert_close(standardizer.mean_0, torch.tensor([3.0, 3.0]))
    assert standardizer({"a": x}).features[0][0, 0, 0].item() == 0.0


@pytest.mark.parametrize(
    ("dtype", "wanted", "tolerance"),
    [
        (torch.float16, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-6),
        (torch.float32, torch.float32, 1e-6),
        (torch.float64, torch.float64, 1e-6),
        (torch.int64, torch.float32, 1e-6),
    ],
)
def test_every_input_dtype_comes_out_as_float32_or_wider(fitted, dtype, wanted, tolerance):
    x = (torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    z = fitted({"text": x}).features[0]
    assert z.dtype == wanted
    expected = (x.double() - fitted.mean_0.double()) / fitted.scale_0.double()
    torch.testing.assert_close(z.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_infinity_of_a_short_dtype_is_not_finite(dtype):
    batch = Standardizer({"a": 2})({"a": torch.tensor([[INF, 1.0], [-INF, NAN]], dtype=dtype)})
    assert batch.features[0][:, 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert batch.available.tolist() == [[True], [False]]


def test_caller_tensors_are_left_as_they_are(fitted):
    features, lengths, available = random_corpus()
    before = copy.deepcopy(features)
    tensors = {name: torch.from_numpy(x) for name, x in features.items()}
    fitted(tensors, lengths, available)
    fitted(tensors)
    copy.deepcopy(fitted).partial_fit(tensors)
    for name, x in features.items():
        np.testing.assert_array_equal(x, before[name])


def test_gradient_is_that_of_the_scaling_and_zero_where_nothing_passed(fitted):
    x = torch.tensor([[1.0, NAN, 1e38, INF]], requires_grad=True)
    fitted({"text": x}).features[0].sum().backward()
    expected = torch.stack([1 / fitted.scale_0[0], *torch.zeros(3)])
    torch.testing.assert_close(x.grad[0], expected)


def test_standardize_of_a_checked_batch_is_forward(fitted):
    features, lengths, available = random_corpus()
    checked = prepare_batch(features, lengths, available, input_dims=DIMS)
    equal_batches(fitted.standardize(checked), fitted(features, lengths, available))


def test_clean_frames_is_standardize_without_the_scaling():
    batch = prepare_batch(*random_corpus(), input_dims=DIMS)
    equal_batches(clean_frames(batch), Standardizer(DIMS).standardize(batch))  # an unfitted one scales by 1


def test_standardize_compiles_as_one_graph(fitted):
    compiled = torch.compile(fitted.standardize, backend="eager", fullgraph=True)
    batch = prepare_batch(*random_corpus(), input_dims=DIMS)
    equal_batches(compiled(batch), fitted.standardize(batch))


# --- saved state ---


@pytest.mark.parametrize("way", ["state_dict", "safetensors", "pickle", "deepcopy"])
def test_restored_standardizer_equals_the_saved_one_and_goes_on(way):
    corpus, more = random_corpus(), random_corpus(seed=1)
    saved = Standardizer(DIMS).fit([corpus])
    if way == "state_dict":
        restored = Standardizer(DIMS)
        restored.load_state_dict(saved.state_dict(), strict=True)
    elif way == "safetensors":
        restored = Standardizer(DIMS)
        restored.load_state_dict(safetensors.torch.load(safetensors.torch.save(saved.state_dict())), strict=True)
    else:
        restored = pickle.loads(pickle.dumps(saved)) if way == "pickle" else copy.deepcopy(saved)
    equal_batches(restored(*more), saved(*more))
    saved.partial_fit([more])
    assert_statistics(restored, oracle(*corpus))
    restored.partial_fit([more])
    assert torch.equal(restored.get_extra_state(), saved.get_extra_state())
    assert torch.equal(restored.scale_1, saved.scale_1)


def test_state_dict_has_readable_names():
    names = ["mean_0", "scale_0", "mean_1", "scale_1", "count", "_extra_state"]
    assert list(Standardizer({"a": 1, "b": 2}).state_dict()) == names


def test_state_of_other_features_is_refused(fitted):
    with pytest.raises(ValueError, match=r"the state has shape \(3, 9\), wanted \(3, 10\)"):
        Standardizer({**DIMS, "face": 3}).load_state_dict(fitted.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for mean_0"):
        Standardizer({"text": 3, "audio": 4, "face": 2}).load_state_dict(fitted.state_dict())
    partial = {name: value for name, value in fitted.state_dict().items() if name != "scale_1"}
    with pytest.raises(RuntimeError, match=r"Missing key.*scale_1"):
        Standardizer(DIMS).load_state_dict(partial)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrower_module_keeps_its_statistics(dtype):
    corpus = random_corpus()
    standardizer = Standardizer(DIMS).fit([corpus]).to(dtype)
    assert_statistics(standardizer, oracle(*corpus))
    assert standardizer.mean_0.dtype == torch.float32
    inside = torch.nn.Sequential(Standardizer(DIMS), torch.nn.Linear(2, 2)).to(dtype)
    assert inside[0].scale_0.dtype == torch.float32
    assert inside[1].weight.dtype == dtype


def test_double_module_learns_and_standardises_in_float64():
    corpus = random_corpus(dtype=np.float64)
    standardizer = Standardizer(DIMS).double().fit([corpus])
    assert_statistics(standardizer, oracle(*corpus), tolerance=1e-13)
    assert standardizer({"text": torch.randn(2, 4)}).features[0].dtype == torch.float64
    assert standardizer.float().mean_0.dtype == torch.float32


# --- errors ---


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Standardizer({"text": 4}), "cannot merge a Standardizer of {'text': 4} into one of"),
        (Standardizer(dict(reversed(DIMS.items()))), "cannot merge a Standardizer of {'face': 2"),
        ({"text": 4}, "other must be a Standardizer, got dict"),
    ],
)
def test_merge_refuses_other_modalities(other, message):
    with pytest.raises(ValueError, match=message):
        Standardizer(DIMS).merge(other)


@pytest.mark.parametrize("method", ["forward", "fit", "partial_fit"])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"text": torch.ones(2, 3)}, r"features\['text'\] has shape \(2, 3\), wanted \(B, T, 4\)"),
        ({"smell": torch.ones(2, 3)}, "unknown modality 'smell'"),
        ({"text": torch.ones(2, 0, 4)}, "T ≥ 1"),
        ({}, "none of the modalities"),
    ],
)
def test_bad_features_are_refused(method, features, message):
    with pytest.raises(ValueError, match=message):
        getattr(Standardizer(DIMS), method)(features)


def test_bad_input_dims_are_refused():
    with pytest.raises(ValueError, match="must be a positive int, got 0"):
        Standardizer({"text": 0})
