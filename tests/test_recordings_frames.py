"""Means of frames within spans, beside a loop over frames and spans."""

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from m3er_fast.recordings.frames import Frames, means_within

TIMES = st.floats(-5, 5, allow_subnormal=False).map(lambda value: round(value, 1))  # many are equal


def looped(frames, spans):
    rows = []
    for start, end in spans:
        inside = [
            row.astype(np.float64)
            for time, row in zip(frames.times, frames.values, strict=True)
            if start <= time < end and np.isfinite(row).all()
        ]
        rows.append(np.mean(inside, axis=0) if inside else np.full(frames.values.shape[1], np.nan))
    return np.array(rows).reshape(len(spans), frames.values.shape[1])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_means_are_those_of_a_loop(data):
    number, dimension = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 3))
    times = np.array(data.draw(st.lists(TIMES, min_size=number, max_size=number)), dtype=np.float64)
    elements = st.sampled_from([0.0, 1.0, -2.5, 1e-3, 7e30, np.nan, np.inf]) | st.floats(-10, 10, width=32)
    values = data.draw(arrays.arrays(np.float32, (number, dimension), elements=elements))
    spans = np.array(data.draw(st.lists(st.tuples(TIMES, TIMES), max_size=8)), dtype=np.float64).reshape(-1, 2)
    frames = Frames(times, values)
    found = means_within(frames, spans)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, looped(frames, spans), rtol=1e-6, atol=1e-12)


def test_order_of_frames_does_not_matter():
    generator = np.random.default_rng(0)
    times, values = generator.random(50) * 5, generator.standard_normal((50, 4)).astype(np.float32)
    spans = generator.random((9, 2)).cumsum(axis=1)
    order = generator.permutation(50)
    found = means_within(Frames(times[order], values[order]), spans)
    np.testing.assert_allclose(found, means_within(Frames(times, values), spans), rtol=1e-6)


def test_small_values_after_a_huge_one_are_not_lost():
    values = np.array([[1e30], [1.0], [3.0]], dtype=np.float32)
    found = means_within(Frames(np.arange(3.0), values), np.array([[0, 1], [1, 3]]))
    np.testing.assert_allclose(found, [[1e30], [2.0]], rtol=1e-6)


def test_no_frame_is_nan_and_never_zero():
    nothing = Frames(np.empty(0), np.empty((0, 2), np.float32))
    assert np.isnan(means_within(nothing, np.array([[0.0, 1.0]]))).all()
    lost = Frames(np.array([0.5]), np.array([[np.nan, 1.0]], np.float32))
    assert np.isnan(means_within(lost, np.array([[0.0, 1.0]]))).all()
    assert means_within(lost, np.empty((0, 2))).shape == (0, 2)


@pytest.mark.parametrize(
    ("times", "values", "message"),
    [
        (np.zeros(2), np.zeros((3, 1), np.float32), r"got \(2,\) and \(3, 1\)"),
        (np.zeros(2), np.zeros(2, np.float32), r"got \(2,\) and \(2,\)"),
        (np.array([np.nan]), np.zeros((1, 1), np.float32), "times must be finite"),
    ],
)
def test_bad_frames_are_named(times, values, message):
    with pytest.raises(ValueError, match=message):
        Frames(times, values)
