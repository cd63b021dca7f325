"""Helpers shared by the corpus tests: small corpora, comparison, pickles and real data."""

import json
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


# --- Files in their published structure ---


def mmsa_fold(rows=2, steps=4, audio_steps=4, seed=0, **changes):
    """Return one split of an MMSA pickle."""
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, 3, steps), np.float32)
    fold = {
        "raw_text": np.array(["a b"] * rows, dtype=object),
        "text": rng.standard_normal((rows, steps, 6)).astype(np.float32),
        "text_bert": mask,
        "audio": rng.standard_normal((rows, audio_steps, 3)),
        "vision": rng.standard_normal((rows, audio_steps, 2)),
        "id": [f"vid{seed}$_${row}" for row in range(rows)],
        "annotations": ["Positive", "Negative"][:rows],
        "classification_labels": np.array([2.0, 0.0][:rows]),
        "regression_labels": np.array([1.5, -0.5][:rows]),
    }
    return {name: value for name, value in {**fold, **changes}.items() if value is not None}


def mult_fold(labels, rows=2, steps=4, audio_steps=4, seed=0, **changes):
    """Return one split of a MulT pickle."""
    rng = np.random.default_rng(seed)
    text, audio = rng.standard_normal((rows, steps, 3)), rng.standard_normal((rows, audio_steps, 2))
    vision = rng.standard_normal((rows, audio_steps, 1))
    return {"text": text, "audio": audio, "vision": vision, "labels": np.asarray(labels, np.float32), **changes}


def iemocap_members(variant=9):
    """Return the tuple of an IEMOCAP pickle of the conversation-emotion field, with as many members as its variant."""
    rng = np.random.default_rng(0)
    turns = {"Ses01F_a": 2, "Ses02M_b": 1, "Ses05F_c": 3, "unused": 1}
    labels = {"Ses01F_a": [0, 5], "Ses02M_b": [2], "Ses05F_c": [1, 3, 4], "unused": [0]}

    def vectors(dim):
        return {name: [rng.standard_normal(dim).astype(np.float32) for _ in range(n)] for name, n in turns.items()}

    ids = {name: [f"{name}_F{turn:03d}" for turn in range(n)] for name, n in turns.items()}
    speakers = {name: ["M"] * n for name, n in turns.items()}
    sentences = {name: ["hello"] * n for name, n in turns.items()}
    train, test = {"Ses02M_b", "Ses01F_a"}, {"Ses05F_c"}
    layers = [vectors(4) for _ in range(4)]
    return {
        9: (ids, speakers, labels, vectors(4), vectors(3), vectors(2), sentences, train, test),
        10: (speakers, labels, *layers, sentences, ["Ses01F_a"], ["Ses05F_c"], ["Ses02M_b"]),
        12: (ids, speakers, labels, *layers, vectors(3), vectors(2), sentences, ["Ses02M_b", "Ses01F_a"], ["Ses05F_c"]),
    }[variant]


def save_csd(folder, file, root, entries, metadata=()):
    """Write one .csd file; entries: id -> (features, intervals)."""
    import h5py

    with h5py.File(folder / f"{file}.csd", "w") as opened:
        for name, (features, intervals) in entries.items():
            opened[f"{root}/data/{name}/features"] = features
            opened[f"{root}/data/{name}/intervals"] = np.asarray(intervals, float)
        group = opened.require_group(f"{root}/metadata")
        for key, value in dict(metadata).items():
            group.create_dataset(key, data=[json.dumps(value)], dtype=h5py.string_dtype())
