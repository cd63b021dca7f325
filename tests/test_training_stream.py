"""Training on a corpus that is streamed from shards: the same curve as in memory, and resumed at any batch."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import DIMS, NETWORK, assert_same_result, assert_same_weights, settings

from m3er_fast.corpus import CorpusError, read_parquet, write_parquet
from m3er_fast.corpus.parquet import write_shard
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.evaluation import corrupt_corpus, evaluate
from m3er_fast.scoring import fit_statistics
from m3er_fast.training import ResumeMismatchError, StreamedCorpus, class_weights, fits_into_memory, train
from m3er_fast.training.data import MemorySplit
from m3er_fast.training.state import TrainingState
from m3er_fast.training.stream import StreamedSplit

SHARD_ROWS = 30


def make_corpus():
    """200 utterances of several lengths, some without a label, a modality or any frame."""
    corpus = make_synthetic(200, input_dims=DIMS, num_classes=3, steps=4, latent_dim=3, difficulty=0.2, seed=1)
    rows = np.arange(len(corpus))
    available = corpus.available.copy()
    available[rows % 9 == 0, 1] = False
    lengths = np.minimum(corpus.lengths, 1 + rows % 4)
    lengths[rows % 41 == 0] = 0
    return replace(corpus, target=np.where(rows % 7 == 0, -100, corpus.target), available=available, lengths=lengths)


CORPUS = make_corpus()
DROPOUT = replace(NETWORK, dropout=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("streamed") / "corpus"
    write_parquet(CORPUS, path, rows_per_shard=SHARD_ROWS)
    return path


@pytest.fixture(scope="module")
def statistics(folder):
    return fit_statistics(folder, settings(full=True))


def numbers_of(split):
    """Return a feature of every labelled utterance of a split: no two have the same."""
    part = CORPUS.subset(split)
    return part.features["text"][part.labelled & (part.lengths > 0), 0, 0].tolist()


def numbers_in(batches):
    return [x for batch in batches for x in batch.features["text"][batch.lengths > 0, 0, 0].tolist()]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- batches ---


def expected_batch(ids):
    rows = [CORPUS.ids.tolist().index(name) for name in ids]
    return CORPUS.select(rows)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("buffer", [1, 16, 45, 10_000])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_in_order_the_batches_are_those_in_memory(folder, size, buffer, split):
    corpus = StreamedCorpus(folder, buffer=buffer)
    streamed = {"train": corpus.training, "valid": corpus.validation, "test": corpus.test}[split]
    held = MemorySplit(CORPUS.subset(split))
    assert streamed.rows == held.rows
    for found, wanted in zip(streamed.in_order(size), held.in_order(size), strict=True):
        assert found.features.keys() == wanted.features.keys()
        frames = torch.arange(wanted.features["text"].shape[1]) < wanted.lengths[:, None]
        for m, (name, values) in enumerate(wanted.features.items()):
            there = (frames & wanted.available[:, m, None])[:, :, None]
            assert found.features[name].shape == values.shape
            assert torch.equal(found.features[name].where(there, 0.0), values.where(there, 0.0))
        for name in ("lengths", "available", "target"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("buffer", [1, 16, 45, 10_000])
def test_every_epoch_holds_every_labelled_utterance_once_in_an_order_of_its_own(folder, size, buffer):
    split = StreamedCorpus(folder, buffer=buffer).training
    orders = [[numbers_in([batch]) for batch in split.shuffled(size, generator(seed))] for seed in (0, 1, 0)]
    for order in orders:
        assert sorted(x for batch in order for x in batch) == sorted(numbers_of("train"))
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]


def test_an_epoch_mixes_the_utterances_of_a_block_and_the_shards(folder):
    """The first batch of many epochs holds utterances of every part of the corpus, and of several shards at a time."""
    split, place = StreamedCorpus(folder, buffer=60).training, {x: n for n, x in enumerate(numbers_of("train"))}
    firsts = [numbers_in([next(iter(split.shuffled(12, generator(seed))))]) for seed in range(40)]
    seen = {place[x] for first in firsts for x in first}
    assert len(seen) > 0.9 * len(place)  # 480 draws of 120
    assert np.mean([np.ptp([place[x] for x in first]) for first in firsts]) > 25  # a shard has 18


@pytest.mark.parametrize("buffer", [1, 16, 45, 10_000])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_an_epoch_goes_on_at_any_batch(folder, size, buffer):
    split = StreamedCorpus(folder, buffer=buffer).training
    whole = list(split.shuffled(size, generator()))
    for start in range(0, len(whole) + 1, max(1, len(whole) // 5)):
        rest = list(split.shuffled(size, generator(), start=start))
        assert numbers_in(rest) == numbers_in(whole[start:])
        assert [len(batch.lengths) for batch in rest] == [len(batch.lengths) for batch in whole[start:]]


def test_what_is_drawn_from_the_generator_does_not_depend_on_the_start(folder):
    split = StreamedCorpus(folder).training
    states = []
    for start in (0, 3):
        order = generator()
        split.shuffled(16, order, start=start)
        states.append(order.get_state())
    assert torch.equal(*states)


# --- training ---


class InThatOrder(MemorySplit):
    """A split in memory whose order is that of a streamed one."""

    def __init__(self, corpus, streamed):
        super().__init__(corpus)
        self.streamed = streamed
        first = {x: row for row, x in enumerate(corpus.features["text"][:, 0, 0].tolist())}
        self.row_of = first

    def shuffled(self, size, order, start=0):
        assert start == 0
        rows = []
        for batch in self.streamed.shuffled(size, order):
            rows += [self.row_of[x] for x in batch.features["text"][:, 0, 0].tolist()]
        return self._batches(np.array(rows), size)


@pytest.mark.parametrize("buffer", [32, 10_000])
def test_streamed_and_in_memory_give_the_same_curve_on_the_same_order(folder, statistics, monkeypatch, buffer):
    config = settings(full=True, epochs=3, network=DROPOUT, balance_classes=True)
    corpus = StreamedCorpus(folder, buffer=buffer)
    found = train(corpus, config, statistics=statistics)
    plain = MemorySplit

    def in_that_order(part):
        return InThatOrder(part, corpus.training) if (part.split == "train").all() else plain(part)

    monkeypatch.setattr("m3er_fast.training.data.MemorySplit", in_that_order)
    expected = train(read_parquet(folder), config, statistics=statistics)
    assert found.history["train_loss"] == expected.history["train_loss"]
    assert found.history["valid_loss"] == expected.history["valid_loss"]
    assert_same_weights(found.model, expected.model)


def test_streamed_training_fits_what_training_in_memory_fits(folder):
    found, expected = (train(corpus, settings(full=True, epochs=1)) for corpus in (StreamedCorpus(folder), CORPUS))
    theirs = expected.model.state_dict()
    for name, value in found.model.state_dict().items():
        if not name.startswith(("network.", "calibration.")):  # which are learned, from other orders
            ours, other = (x.view(torch.float64) if "moments_" in name else x for x in (value, theirs[name]))
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5, msg=name)


def test_class_weights_are_those_of_the_corpus_in_memory(folder):
    assert StreamedCorpus(folder).class_weights() == pytest.approx(class_weights(CORPUS.subset("train")))


def test_the_scores_are_those_of_the_labelled_utterances(folder, statistics):
    corpus = StreamedCorpus(folder)
    model = train(corpus, settings(full=True, epochs=2), statistics=statistics).model
    for split, part in (("valid", corpus.validation), ("test", corpus.test)):
        expected = evaluate(model, CORPUS.subset(split)).report
        assert corpus.report(model, split=part).to_markdown() == expected.to_markdown()


def test_a_streamed_split_is_scored_with_a_corruption_too(folder, statistics):
    """One batch holds the whole split, so that the seed corrupts as in memory, where all have a label."""
    corpus = StreamedCorpus(folder)
    model = train(corpus, settings(full=True, epochs=2), statistics=statistics).model
    part = CORPUS.subset("test")
    corrupted, _ = corrupt_corpus(model, part.select(part.labelled), seed=0)
    found = corpus.report(model, split=corpus.test, corruption="gaussian_noise")
    assert found.accuracy == evaluate(model, corrupted).report.accuracy


# --- resuming ---


class Killed(BaseException):
    """An exception that no handler of ``Exception`` catches, as a kill."""


CONFIG = settings(full=True, epochs=2, network=DROPOUT)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("saves", [1, 5, 9, 12, 17])
def test_killed_within_an_epoch_and_resumed_equals_uninterrupted(
    folder, statistics, tmp_path, monkeypatch, saves, streamed
):
    """A checkpoint after every batch, of which an epoch has eight, and after every epoch."""
    corpus = StreamedCorpus(folder, buffer=48) if streamed else CORPUS
    options = {"statistics": statistics, "checkpoint_seconds": 0}
    save, saved, batches = TrainingState.save, [], []

    def save_and_stop(state, path):
        save(state, path)
        saved.append(state.position.batches)
        if len(saved) == saves:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", save_and_stop)
        with pytest.raises(Killed):
            train(corpus, CONFIG, out=tmp_path / "run", **options)
    kind = StreamedSplit if streamed else MemorySplit
    shuffled = kind.shuffled
    with monkeypatch.context() as patch:
        patch.setattr(kind, "shuffled", lambda *a, **k: batches.append(k["start"]) or shuffled(*a, **k))
        found = train(corpus, CONFIG, out=tmp_path / "run", **options)
    assert batches[:1] == ([saved[-1]] if len(batches) else [])
    expected = train(corpus, CONFIG, out=tmp_path / "whole", statistics=statistics)
    assert_same_result(found, expected)
    for name in ("history.json", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_killed_by_the_system_within_an_epoch_and_resumed_equals_uninterrupted(folder, statistics, tmp_path):
    statistics.save(tmp_path / "statistics")
    script = f"""
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads({torch.get_num_threads()})
from test_training_stream import CONFIG, StreamedCorpus, TrainingState, train
from m3er_fast.scoring import ModelStatistics
save, saved = TrainingState.save, []
def save_and_die(state, path):
    save(state, path)
    saved.append(state.position.batches)
    if len(saved) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingState.save = save_and_die
folder, out, statistics = sys.argv[1:]
corpus = StreamedCorpus(folder, buffer=48)
train(corpus, CONFIG, statistics=ModelStatistics.load(statistics), out=Path(out), checkpoint_seconds=0)
"""
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    process = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "run"), str(tmp_path / "statistics")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    corpus = StreamedCorpus(folder, buffer=48)
    found = train(corpus, CONFIG, statistics=statistics, out=tmp_path / "run")
    assert_same_result(found, train(corpus, CONFIG, statistics=statistics))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: StreamedCorpus(folder, buffer=49), "buffer = 48, now 49"),
        (lambda folder: CORPUS, "reading = streamed, now in memory"),
    ],
)
def test_a_run_of_another_stream_is_not_resumed(folder, statistics, tmp_path, change, message):
    train(StreamedCorpus(folder, buffer=48), CONFIG, statistics=statistics, out=tmp_path)
    with pytest.raises(ResumeMismatchError, match=message):
        train(change(folder), CONFIG, statistics=statistics, out=tmp_path)


def test_a_shard_that_was_written_anew_is_another_corpus(folder, statistics, tmp_path):
    corpus = tmp_path / "corpus"
    write_parquet(CORPUS, corpus, rows_per_shard=SHARD_ROWS)
    train(StreamedCorpus(corpus), CONFIG, statistics=statistics, out=tmp_path / "run")
    write_shard(CORPUS.select(slice(0, SHARD_ROWS - 1)), corpus / "part-00000.parquet")
    with pytest.raises(ResumeMismatchError, match="other shards"):
        train(StreamedCorpus(corpus), CONFIG, statistics=statistics, out=tmp_path / "run")


# --- corpora that cannot be streamed ---


def written(corpus, folder, **options):
    write_parquet(corpus, folder, rows_per_shard=SHARD_ROWS, **options)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": None}, "there is no column 'split', which a corpus that is streamed needs"),
        ({"target": None}, "the corpus has no labels"),
        (
            {"split": np.where(CORPUS.split == "valid", "test", CORPUS.split)},
            "the valid split has no labelled utterance",
        ),
        ({"target": np.full(len(CORPUS), -100)}, "the train split has no labelled utterance"),
    ],
)
def test_a_corpus_without_what_training_needs_is_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        StreamedCorpus(written(replace(CORPUS, **changes), tmp_path / "corpus"))


@pytest.mark.parametrize("buffer", [0, -1, 1.5, "many"])
def test_a_buffer_is_a_positive_int(folder, buffer):
    with pytest.raises(ValueError, match=f"^buffer must be a positive int, got {buffer!r}$"):
        StreamedCorpus(folder, buffer=buffer)


def test_shards_of_other_classes_are_an_error(tmp_path):
    path = written(CORPUS, tmp_path / "corpus")
    write_shard(replace(CORPUS.select(slice(0, 9)), classes=("x", "y", "z")), path / "part-00001.parquet")
    with pytest.raises(CorpusError, match=r"part-00001.parquet has the classes \('x', 'y', 'z'\), but other shards"):
        StreamedCorpus(path)


def test_a_corpus_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = written(CORPUS, tmp_path / "corpus")
    corpus = StreamedCorpus(path)
    write_shard(CORPUS.select(slice(0, 9)), path / "part-00001.parquet")
    with pytest.raises(CorpusError, match=r"part-00001.parquet: the corpus has changed while it was read"):
        list(corpus.training.in_order(16))


def test_a_corpus_fits_if_memory_holds_its_files_thrice(folder, monkeypatch):
    size = sum(path.stat().st_size for path in folder.iterdir())
    for memory, fits in ((3 * size + 1, True), (3 * size, False)):
        monkeypatch.setattr("m3er_fast.training.stream.memory_bytes", lambda memory=memory: memory)
        assert fits_into_memory(folder) == fits
