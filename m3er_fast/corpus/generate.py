"""A generated corpus of any size, written shard by shard: for measurements and for trials of long runs.

Dimension legend: N utterances per shard, T time steps, d features, q latent dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from m3er_fast._validation import check_positive_int
from m3er_fast.atomic_files import replacing
from m3er_fast.corpus.base import SPLITS, Corpus
from m3er_fast.corpus.parquet import new_folder, write_shard

SCALE_DIMS = {"text": 300, "audio": 74, "face": 36}
_LATENT = 16
_VIDEO_ROWS = 16


def generate_corpus(
    out: str | Path,
    *,
    utterances: int,
    rows_per_shard: int = 8192,
    input_dims: Mapping[str, int] | None = None,
    steps: int = 20,
    num_classes: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a corpus, with one shard in memory at a time.

    Frames are linear views of latents that the modalities share, plus noise. Lengths are uniform in ⌈T/2⌉..T. Each
    modality of an utterance is noise alone with probability 1/20, for the check to find. A label is the number of the
    largest of the first C latents, each summed over the utterance. A shard depends only on the seed, its number and the
    sizes: the same arguments give the same bytes.

    Args:
        out: a folder, created if need be.
        utterances: number of utterances in all shards.
        rows_per_shard: utterances per shard.
        input_dims: features of each modality; None means text 300, audio 74, face 36.
        steps: number T of frames.
        num_classes: C, at most 16, for labels, and for splits by video: 80 % train, 10 % valid, 10 % test. None writes
            neither.
        seed: seeds all random numbers.
        progress: called with the number of shards written and the number of all shards.

    Raises:
        ValueError: if a number is not a positive int, or there are more classes than latents.
        CorpusError: if ``out`` is a file or holds a corpus already.
        OSError: if it cannot be written to, for example for lack of space.
    """
    for name, value in (("utterances", utterances), ("rows_per_shard", rows_per_shard), ("steps", steps)):
        check_positive_int(name, value)
    if num_classes is not None:
        check_positive_int("num_classes", num_classes)
        if num_classes > _LATENT:
            raise ValueError(f"num_classes must be at most {_LATENT}, got {num_classes}")
    folder = new_folder(out)
    dims = dict(SCALE_DIMS if input_dims is None else input_dims)
    shards = -(-utterances // rows_per_shard)
    paths = []
    for shard in range(shards):
        path = folder / f"part-{shard:05d}.parquet"
        paths.append(path)
        first = shard * rows_per_shard
        with replacing(path) as partial:
            rows = min(rows_per_shard, utterances - first)
            write_shard(_make_shard(first, rows, dims, steps, seed, num_classes), partial)
        if progress is not None:
            progress(shard + 1, shards)
    return paths


def _make_shard(
    first: int, rows: int, dims: Mapping[str, int], steps: int, seed: int, num_classes: int | None = None
) -> Corpus:
    generator = np.random.default_rng((seed, first))
    views = np.random.default_rng(seed)  # the same for all shards
    latent = generator.standard_normal((rows, steps, _LATENT), dtype=np.float32)
    lengths = generator.integers(-(-steps // 2), steps + 1, rows)
    padding = np.arange(steps) >= lengths[:, None]
    features = {}
    for name, dim in dims.items():
        view = views.standard_normal((_LATENT, dim), dtype=np.float32) / np.float32(_LATENT**0.5)
        values = generator.standard_normal((rows, steps, dim), dtype=np.float32)
        signal = generator.random(rows) >= 0.05
        values *= np.float32(0.5)
        values += (latent * signal[:, None, None].astype(np.float32)) @ view
        values[padding] = 0
        features[name] = values
    videos = np.arange(first, first + rows) // _VIDEO_ROWS
    target = split = None
    if num_classes is not None:
        target = latent[:, :, :num_classes].sum(axis=1, where=~padding[:, :, None]).argmax(axis=1)
        split = _split_videos(videos, seed)
    return Corpus(
        ids=np.array([f"utterance-{row:09d}" for row in range(first, first + rows)], dtype=object),
        features=features,
        lengths=lengths.astype(np.int64),
        available=np.ones((rows, len(dims)), dtype=bool),
        target=target,
        classes=tuple(f"class_{number}" for number in range(num_classes or 0)),
        split=split,
        group=np.array([f"video-{video:08d}" for video in videos], dtype=object),
    )


def _split_videos(videos: np.ndarray, seed: int) -> np.ndarray:
    """Return the split (N,) of each utterance, which follows from the number of its video alone."""
    names, utterances = np.unique(videos, return_inverse=True)
    drawn = np.array([np.random.default_rng((seed, 0, video)).random() for video in names.tolist()])
    split: np.ndarray = np.array(SPLITS, dtype=object)[np.digitize(drawn, (0.8, 0.9))[utterances]]
    return split
