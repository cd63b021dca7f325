"""Scoring in several threads gives the bytes of one thread, in the same order."""

import itertools
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest
import torch
from score_folder import contents
from scoring_problems import fitted_model, make_corpus, scoring_job

from m3er_fast.corpus import CorpusError, write_parquet
from m3er_fast.execution import threads as threads_module
from m3er_fast.execution.threads import map_in_order
from m3er_fast.scoring import Scorer, iter_scores, score
from m3er_fast.scoring import scorer as scorer_module
from m3er_fast.scoring import shard as shard_module
from m3er_fast.scoring.shard import ShardResult


@pytest.fixture(params=[2, 5])
def threads(request):
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


@pytest.fixture
def small_tables(monkeypatch):
    monkeypatch.setattr(scorer_module, "WINDOW_BYTES", 2**11)


@pytest.fixture(scope="module")
def model():
    return fitted_model(make_corpus(200, missing=0.1))


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    """Three shards, each of several small tables."""
    folder = tmp_path_factory.mktemp("corpus")
    corpus = make_corpus(150, missing=0.1, seed=1)
    write_parquet(corpus, folder, rows_per_shard=60)
    return folder


def ids_of(folder):
    return pq.read_table(folder, columns=["id"])["id"].to_pylist()


# --- what is left ---


def test_any_number_of_threads_leaves_the_bytes_of_one(threads, small_tables, model, corpus_dir, tmp_path):
    seen = []
    score(corpus_dir, model, tmp_path / "many", batch_frames=40, progress=seen.append)
    assert len(seen) > 3 + 2 * 3  # after each shard, and after each of its tables
    torch.set_num_threads(1)
    score(corpus_dir, model, tmp_path / "one", batch_frames=40)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_several_devices_share_the_threads(threads, small_tables, model, corpus_dir, tmp_path):
    computing = set()
    handle = model.register_forward_pre_hook(
        lambda *_: computing.add((threading.current_thread(), torch.get_num_threads()))
    )
    try:
        score(corpus_dir, model, tmp_path / "two", devices=["cpu", "cpu"], batch_frames=40)
    finally:
        handle.remove()
    score(corpus_dir, model, tmp_path / "one", batch_frames=40)
    assert {number for _, number in computing} == {1}
    assert len(computing) <= threads
    assert torch.get_num_threads() == threads
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_tables_are_scored_at_a_time_each_by_one_thread(threads, small_tables, model, corpus_dir, tmp_path):
    seen, together = [], threading.Barrier(threads)

    def forward(module, arguments):
        seen.append((threading.current_thread(), torch.get_num_threads()))
        if len(seen) <= threads:
            together.wait(timeout=30)  # broken if the first are not scored at a time

    handle = model.register_forward_pre_hook(forward)
    try:
        score(corpus_dir, model, tmp_path / "out", batch_frames=40)
    finally:
        handle.remove()
    assert {number for _, number in seen} == {1}
    assert len({thread for thread, _ in seen}) == threads
    assert not any(thread.is_alive() for thread, _ in seen)


def test_the_number_of_threads_is_afterwards_what_it_was(threads, model, corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path / "out", batch_frames=40)
    assert torch.get_num_threads() == threads
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [threads]


def test_scores_can_be_iterated_over_in_order(threads, small_tables, model, corpus_dir, tmp_path):
    tables = list(iter_scores(corpus_dir, model, batch_frames=40))
    assert len(tables) > 2 * 3
    assert list(itertools.chain.from_iterable(table["id"].to_pylist() for table in tables)) == ids_of(corpus_dir)


def test_a_shard_is_out_of_the_page_cache_before_its_result_is_yielded(model, corpus_dir, tmp_path, monkeypatch):
    scorer, dropped = Scorer(model, batch_frames=40), []
    monkeypatch.setattr(shard_module, "drop_from_page_cache", dropped.append)
    job = scoring_job(corpus_dir, tmp_path / "out", scorer.signature, keep_cached=False)
    job.output.begin(resume=False)
    results = shard_module.score_shards(job, job.plan.shards[:1], scorer)
    next(result for result in results if isinstance(result, ShardResult))
    results.close()  # as a Ray worker does
    assert dropped == list(job.plan.shards[:1])


# --- what goes wrong ---


def test_a_table_that_fails_sends_its_shard_to_quarantine_and_no_other(
    threads, small_tables, model, corpus_dir, tmp_path, monkeypatch
):
    usual, bad = Scorer.score, ids_of(corpus_dir)[80]

    def fail(self, table, **options):
        if bad in table["id"].to_pylist():
            raise CorpusError("of this table")
        return usual(self, table, **options)

    monkeypatch.setattr(Scorer, "score", fail)
    summary = score(corpus_dir, model, tmp_path / "out", batch_frames=40)
    assert [entry.shard for entry in summary.quarantined] == ["part-00001.parquet"]
    assert "of this table" in summary.quarantined[0].reason
    assert summary.rows == 60 + 30
    assert not (tmp_path / "out" / "part-00001.parquet").exists()
    with pytest.raises(CorpusError, match=r"part-00001.*of this table"):
        list(iter_scores(corpus_dir, model, batch_frames=40))


def test_a_model_in_training_mode_is_in_eval_mode_for_all_threads_until_the_last_is_done(
    threads, small_tables, model, corpus_dir, tmp_path
):
    score(corpus_dir, model, tmp_path / "eval", batch_frames=40)
    modes = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.train()
    try:
        score(corpus_dir, model, tmp_path / "train", batch_frames=40)
        assert model.training
    finally:
        model.eval()
        handle.remove()
    assert modes
    assert not any(modes)
    assert contents(tmp_path / "train") == contents(tmp_path / "eval")


def test_a_canceled_table_stops_before_its_next_batch(model, corpus_dir):
    table = pq.read_table(corpus_dir / "part-00000.parquet")
    scorer, asked = Scorer(model, batch_frames=40), []

    def is_canceled():
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(CancelledError):
        scorer.score(table, is_canceled=is_canceled)
    assert len(asked) == 3


# --- the map ---


def test_results_come_in_the_order_of_the_items_however_long_each_takes(threads):
    def late(item, is_canceled):
        time.sleep(0.02 if item % 3 == 0 else 0)
        return -item

    assert list(map_in_order(late, range(20), threads)) == [-item for item in range(20)]


@pytest.mark.parametrize("count", [None, 1, 3])
def test_few_items_are_taken_before_their_results_are(count):
    taken = []
    results = map_in_order(lambda item, _: item, (taken.append(i) or i for i in range(50)), count)
    for index in range(10):
        assert next(results) == index
        assert len(taken) <= index + 1 + (count or 0)
    results.close()
    assert len(taken) < 20


@pytest.mark.parametrize("count", [None, 1, 3])
def test_an_exception_comes_where_its_result_would_have(count):
    def fail(item, is_canceled):
        if item == 4:
            raise ValueError("fourth")
        return item

    results = map_in_order(fail, range(10), count)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="fourth"):
        next(results)
    assert list(results) == []


def test_closing_cancels_running_calls_and_waits_for_them():
    ended = []

    def patient(item, is_canceled):
        while item and not is_canceled():
            time.sleep(0.001)
        ended.append(item)
        return item

    results = map_in_order(patient, range(10), 2)
    assert next(results) == 0
    results.close()
    assert set(ended) <= {0, 1, 2, 3}
    assert not any(thread.name.startswith("m3er-score") for thread in threading.enumerate())


def test_a_thread_that_cannot_be_started_is_an_error_and_leaves_none_waiting(threads, monkeypatch):
    class Exhausted(ThreadPoolExecutor):
        def submit(self, *arguments):
            if len(self._threads) == 1:
                raise RuntimeError("can't start new thread")
            return super().submit(*arguments)

    monkeypatch.setattr(threads_module, "ThreadPoolExecutor", Exhausted)
    with pytest.raises(RuntimeError, match="can't start"):
        next(map_in_order(lambda item, _: item, range(3), threads))
    assert torch.get_num_threads() == threads
    assert not any(thread.name.startswith("m3er-score") for thread in threading.enumerate())
