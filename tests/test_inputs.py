"""The single entry of features: accepted and refused input, the messages, and the zeros in padding."""

import re

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.utils.data import DataLoader

from m3er_fast import M3ERFusion
from m3er_fast.inputs import check_input_dims, iterate_batches, prepare_batch
from m3er_fast.scoring import predict

DIMS = {"text": 3, "audio": 2}


def features(batch=4, steps=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, steps, dim, generator=generator).to(dtype) for name, dim in DIMS.items()}


def with_text(value):
    return {**features(), "text": value}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            with_text(torch.zeros(4, 0, 3)),
            "features['text'] has shape (4, 0, 3), wanted (B, T, 3) with T ≥ 1, or (B, 3)",
        ),
        (
            with_text(torch.zeros(4, 5, 7)),
            "features['text'] has shape (4, 5, 7), wanted (B, T, 3) with T ≥ 1, or (B, 3)",
        ),
        (with_text(torch.zeros(4, 7)), "features['text'] has shape (4, 7), wanted (B, T, 3) with T ≥ 1, or (B, 3)"),
        (with_text(torch.zeros(3)), "features['text'] has shape (3,), wanted (B, T, 3)"),
        (with_text(torch.zeros(1, 4, 5, 3)), "features['text'] has shape (1, 4, 5, 3), wanted (B, T, 3)"),
        (
            {**features(), "audio": torch.zeros(6, 5, 2)},
            "features['audio'] has shape (6, 5, 2), but features['text'] has (4, 5, 3): wanted (4, 5, 2)",
        ),
        (
            {**features(), "audio": torch.zeros(4, 9, 2)},
            "features['audio'] has shape (4, 9, 2), but features['text'] has (4, 5, 3): wanted (4, 5, 2)",
        ),
        ({**features(), "smell": torch.zeros(4, 5, 1)}, "unknown modality 'smell'; this model knows ['text', 'audio']"),
        ({"text": None, "audio": None}, "none of the modalities ['text', 'audio'] was given"),
        ({}, "none of the modalities ['text', 'audio'] was given"),
        (with_text("hello"), "features['text'] must be a tensor or a numeric array, got str"),
        (with_text([[1.0, 2.0], [3.0]]), "features['text'] must be a tensor or a numeric array, got list"),
        (
            with_text(np.array([[None] * 3] * 4)),
            "features['text'] must be a tensor or a numeric array, got an array of object",
        ),
        (with_text(torch.zeros(4, 5, 3, dtype=torch.complex64)), "features['text'] must hold real numbers"),
        (with_text(torch.zeros(4, 5, 3, dtype=torch.bool)), "features['text'] must hold real numbers, got torch.bool"),
        (torch.zeros(4, 5, 3), "features must map modality names to tensors, got Tensor"),
    ],
)
def test_bad_features_are_named_with_their_shapes_and_the_ones_wanted(bad, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_batch(bad, input_dims=DIMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": torch.tensor([1, 2])}, "lengths must be integers of shape (4,), got torch.int64 of shape (2,)"),
        ({"lengths": torch.ones(4)}, "lengths must be integers of shape (4,), got torch.float32 of shape (4,)"),
        ({"lengths": [True] * 4}, "lengths must be integers of shape (4,), got torch.bool of shape (4,)"),
        ({"lengths": "four"}, "lengths must be a tensor or a numeric array, got str"),
        ({"lengths": ["1", "2", "3", "4"]}, "lengths must be a tensor or a numeric array, got list"),
        ({"available": "all"}, "available must be a tensor or a numeric array, got str"),
        ({"lengths": [0, 1, 2, 6]}, "lengths must lie in 0..5, got values from 0 to 6"),
        ({"lengths": [-1, 1, 2, 3]}, "lengths must lie in 0..5, got values from -1 to 3"),
        (
            {"available": torch.ones(2, 4, dtype=torch.bool)},
            "available must be booleans of shape (4, 2), got torch.bool of shape (2, 4)",
        ),
        ({"available": torch.ones(4, 2)}, "available must be booleans of shape (4, 2), got torch.float32"),
    ],
)
def test_bad_masks_are_named_with_their_shapes_and_the_ones_wanted(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_batch(features(), **arguments, input_dims=DIMS)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (iter([features()]), {}, "one-shot iterator"),
        ((batch for batch in [features()]), {}, "one-shot iterator"),
        ([features()], {"lengths": [1] * 4}, "must come inside each batch"),
        ([features()], {"available": torch.ones(4, 2, dtype=torch.bool)}, "must come inside each batch"),
        (7, {}, "features must be a mapping or an iterable of batches, got int"),
        ([5], {}, "a batch must be a mapping or (features, lengths, available), got int"),
        (
            [(features(), None, None, None)],
            {},
            "a batch must be a mapping or (features, lengths, available), got tuple",
        ),
        ([(features(), [9] * 4, None)], {}, "lengths must lie in 0..5, got values from 9 to 9"),
        ([(features(), torch.tensor([0, 1, 2, 1]))], {}, "a batch of two may be (features, labels)"),
    ],
)
def test_bad_sources_of_batches_are_refused(source, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(iterate_batches(source, **arguments, input_dims=DIMS))


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({}, "must map modality names to feature counts"),
        ([3, 2], "must map modality names to feature counts"),
        ({"a.b": 3}, "non-empty string without dots, got 'a.b'"),
        ({"": 3}, "non-empty string without dots, got ''"),
        ({5: 3}, "non-empty string without dots, got 5"),
        ({"text": 0}, "input_dims['text'] must be a positive int, got 0"),
        ({"text": 2.0}, "input_dims['text'] must be a positive int, got 2.0"),
        ({"text": True}, "input_dims['text'] must be a positive int, got True"),
    ],
)
def test_bad_input_dims_are_refused(dims, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_input_dims(dims)


def test_input_dims_keep_their_order_and_become_plain_ints():
    checked = check_input_dims({"text": np.int64(3), "audio": 2, "face": 1})
    assert list(checked.items()) == [("text", 3), ("audio", 2), ("face", 1)]
    assert {type(dim) for dim in checked.values()} == {int}


def test_a_batch_comes_back_in_the_order_of_input_dims_with_all_frames_valid():
    given = features()
    batch = prepare_batch(dict(reversed(given.items())), input_dims=DIMS)
    assert all(torch.equal(x, given[name]) for x, name in zip(batch.features, DIMS, strict=True))
    assert batch.lengths.tolist() == [5] * 4
    assert batch.lengths.dtype == torch.int64
    assert bool(batch.available.all())
    assert bool(batch.frame_mask.all())


def test_an_utterance_vector_is_a_sequence_of_one_frame():
    given = {name: x[:, 0] for name, x in features().items()}
    batch = prepare_batch(given, input_dims=DIMS)
    assert [tuple(x.shape) for x in batch.features] == [(4, 1, 3), (4, 1, 2)]
    assert torch.equal(batch.features[0][:, 0], given["text"])


def test_a_missing_key_none_and_available_false_are_the_same():
    given = features()
    off = torch.tensor([[True, False]] * 4)
    batches = [
        prepare_batch({"text": given["text"]}, input_dims=DIMS),
        prepare_batch({"text": given["text"], "audio": None}, input_dims=DIMS),
        prepare_batch(given, available=off, input_dims=DIMS),
        prepare_batch(given, available=off.numpy(), input_dims=DIMS),
    ]
    for batch in batches:
        assert torch.equal(batch.available, off)
        assert torch.equal(batch.features[0], given["text"])
        assert not batch.features[1].any()


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_padding_and_unavailable_modalities_hold_zeros_whatever_the_input(junk):
    given = features()
    lengths = torch.tensor([0, 1, 3, 5])
    available = torch.tensor([[True, True], [True, True], [False, True], [True, False]])
    valid = [(torch.arange(5) < lengths[:, None])[:, :, None] & available[:, m, None, None] for m in range(len(DIMS))]
    dirty = {name: x.where(v, junk) for v, (name, x) in zip(valid, given.items(), strict=True)}
    before = {name: x.clone() for name, x in dirty.items()}
    batch = prepare_batch(dirty, lengths, available, input_dims=DIMS)
    for x, v, original in zip(batch.features, valid, given.values(), strict=True):
        assert torch.equal(x, original.where(v, 0.0))
    assert batch.available.tolist() == [[False, False], [True, True], [False, True], [True, False]]
    for name, x in dirty.items():  # the caller's tensors are as they were
        assert torch.equal(x.nan_to_num(7.0), before[name].nan_to_num(7.0))


@pytest.mark.parametrize("steps_dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_lengths_of_any_integer_type_are_read(steps_dtype):
    batch = prepare_batch(features(), np.array([0, 1, 3, 5], dtype=steps_dtype), input_dims=DIMS)
    assert batch.lengths.tolist() == [0, 1, 3, 5]
    assert batch.lengths.dtype == torch.int64


@pytest.mark.parametrize("change", [lambda x: x[::-1].copy()[::-1], lambda x: x.astype(x.dtype.newbyteorder())])
def test_arrays_that_torch_cannot_share_memory_with_are_read(change):
    arrays = {name: np.arange(x.numel(), dtype=np.float32).reshape(x.shape) for name, x in features().items()}
    lengths, available = np.array([0, 1, 3, 5]), np.array([[True, False], [True, True], [False, True], [True, True]])
    wanted = prepare_batch(arrays, lengths, available, input_dims=DIMS)
    changed = {name: change(x) for name, x in arrays.items()}
    batch = prepare_batch(changed, change(lengths), change(available), input_dims=DIMS)
    for x, y in zip([*batch.features, *batch[1:3]], [*wanted.features, *wanted[1:3]], strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_mixed_dtypes_are_promoted_and_integers_become_floats():
    mixed = {"text": torch.ones(2, 1, 3, dtype=torch.float64), "audio": torch.ones(2, 1, 2, dtype=torch.float16)}
    assert {x.dtype for x in prepare_batch(mixed, input_dims=DIMS).features} == {torch.float64}
    counts = {"text": np.ones((2, 3), dtype=np.int16), "audio": [[1, 2], [3, 4]]}
    batch = prepare_batch(counts, input_dims=DIMS)
    assert {x.dtype for x in batch.features} == {torch.float32}
    assert batch.features[1][:, 0].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_an_empty_batch_is_an_ordinary_one():
    batch = prepare_batch(features(batch=0), torch.zeros(0, dtype=torch.int64), input_dims=DIMS)
    assert [tuple(x.shape) for x in batch.features] == [(0, 5, 3), (0, 5, 2)]
    assert batch.available.shape == (0, 2)
    assert batch.frame_mask.shape == (0, 5)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 4096])
def test_a_mapping_is_cut_into_batches_that_join_to_the_whole(batch_size):
    given = features(batch=10)
    lengths = torch.arange(10) % 6
    whole = prepare_batch(given, lengths, input_dims=DIMS)
    batches = list(iterate_batches(given, lengths, input_dims=DIMS, batch_size=batch_size))
    assert [len(batch.lengths) for batch in batches] == [min(batch_size, 10 - s) for s in range(0, 10, batch_size)]
    assert torch.equal(torch.cat([batch.lengths for batch in batches]), whole.lengths)
    assert torch.equal(torch.cat([batch.available for batch in batches]), whole.available)
    for m in range(len(DIMS)):
        assert torch.equal(torch.cat([batch.features[m] for batch in batches]), whole.features[m])


def test_batches_may_be_mappings_tuples_lists_or_come_from_a_data_loader():
    given = features()
    lengths = torch.tensor([1, 2, 3, 4])
    available = torch.ones(4, 2, dtype=torch.bool)
    source = [given, (given,), (given, lengths, None), [given, lengths, available]]
    wanted_lengths = [[5] * 4, [5] * 4, [1, 2, 3, 4], [1, 2, 3, 4]]
    assert [batch.lengths.tolist() for batch in iterate_batches(source, input_dims=DIMS)] == wanted_lengths
    rows = [({name: x[b] for name, x in given.items()}, int(lengths[b]), available[b]) for b in range(4)]
    loaded = list(iterate_batches(DataLoader(rows, batch_size=2), input_dims=DIMS))
    assert [batch.lengths.tolist() for batch in loaded] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.eye(3).to_sparse(), r"is sparse \(torch.sparse_coo\), wanted a dense tensor: value.to_dense"),
        (torch.eye(3).to_sparse_csr(), r"is sparse \(torch.sparse_csr\)"),
        (sparse.csr_matrix(np.eye(3)), r"is sparse \(a csr_matrix\), wanted a dense array: value.toarray"),
        (torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), "is a nested tensor, wanted a padded one"),
    ],
)
def test_sparse_and_nested_features_say_what_to_do(value, words):
    with pytest.raises(ValueError, match=rf"features\['text'\] {words}"):
        prepare_batch({"text": value}, input_dims={"text": 3})
    model = M3ERFusion({"text": 3, "audio": 2}, 2)
    with pytest.raises(ValueError, match=rf"features\['text'\] {words}"):
        predict(model.ablated(check=False, proxy=False), {"text": value})
