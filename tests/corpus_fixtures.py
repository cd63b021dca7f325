"""Helpers shared by the corpus tests: small corpora, comparison, pickles and real data."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from m3er_fast.corpus import Corpus


def real_data(name):
    """Return a folder of the real data, or skip the test."""
    folder = os.environ.get("M3ER_DATA")
    root = Path(folder) if folder else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (root / name).is_dir():
        pytest.skip(f"needs the real data in shared/data/{name}")
    return root / name


def make_corpus(rows=6, steps=4, dims=(("text", 3), ("audio", 2)), classes=("sad", "happy"), seed=0, **changes):
    """Return a valid corpus of random numbers with two classes, three splits and a group per two rows."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, steps + 1, rows)
    inside = (np.arange(steps) < lengths[:, None])[:, :, None]
    fields = {
        "ids": np.array([f"u{row}" for row in range(rows)], dtype=object),
        "features": {
            name: np.where(inside, rng.standard_normal((rows, steps, dim)), 0).astype(np.float32) for name, dim in dims
        },
        "lengths": lengths.astype(np.int64),
        "available": np.ones((rows, len(dims)), dtype=bool),
        "target": np.arange(rows) % len(classes),
        "classes": classes,
        "split": np.array([("train", "train", "valid", "test")[row % 4] for row in range(rows)], dtype=object),
        "group": np.array([f"v{row // 2}" for row in range(rows)], dtype=object),
    }
    return Corpus(**{**fields, **changes})


def assert_same(first, second):
    """Assert that two corpora are equal, NaN included."""
    assert first.modalities == second.modalities
    assert first.ids.tolist() == second.ids.tolist()
    for name in first.modalities:
        np.testing.assert_array_equal(first.features[name], second.features[name])
    np.testing.assert_array_equal(first.lengths, second.lengths)
    np.testing.assert_array_equal(first.available, second.available)
    assert (first.target is None) == (second.target is None)
    if first.target is not None:
        np.testing.assert_array_equal(first.target, second.target)
        assert first.target.dtype == second.target.dtype
    assert (first.classes, first.task) == (second.classes, second.task)
    for name in ("split", "group"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert (None if ours is None else ours.tolist()) == (None if theirs is None else theirs.tolist())


def write_pickle(path, value, protocol=4):
    """Pickle a value to a file, and return its path."""
    with path.open("wb") as stream:
        pickle.dump(value, stream, protocol=protocol)
    return path


class Hostile:
    """An object whose pickle calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
