"""The Ray runner leaves the bytes of the local one, even if workers or the driver die."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpus_fixtures import real_data
from pyarrow import fs
from score_folder import contents, counted
from scoring_problems import fitted_model, make_corpus, probabilities, read_scores, with_column

from m3er_fast import M3ERConfig
from m3er_fast.cli import main
from m3er_fast.config import ProxyConfig
from m3er_fast.corpus import convert, write_parquet
from m3er_fast.execution.ray_pool import ray_map
from m3er_fast.metrics import classification_report
from m3er_fast.scoring import OutputMismatchError, fit_statistics, load_model, score
from m3er_fast.training import evaluate

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'm3er-fast[ray]'")

from ray_traps import (  # noqa: E402  (fsspec comes with other packages, Ray's skip is clearer)
    TrappedFiles,
    held_while_others_begin,
    is_in_the_main_thread,
    slow_first,
)

SHARD_ROWS, SHARDS, MANY = 20, 10, 300
TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Let workers import from this folder, and remove Ray's files; their path is short, since some are sockets."""
    folder = tempfile.mkdtemp(prefix="m3er")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_TMPDIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def connected(environment):
    """Ray on this machine with room for two workers."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=2 * torch.get_num_threads(),
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def both():
    return make_corpus(200 + SHARD_ROWS * SHARDS, missing=0.1)


@pytest.fixture(scope="module")
def model(both):
    return fitted_model(both.select(slice(0, 200)))


@pytest.fixture(scope="module")
def model_dir(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus_dir(both, tmp_path_factory):
    """Ten shards, one of which cannot be read; another has a row that cannot be scored."""
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(both.select(slice(200, None)), folder, rows_per_shard=SHARD_ROWS)
    (folder / "part-00003.parquet").write_bytes(b"PAR1")
    path = folder / "part-00006.parquet"
    table = pq.read_table(path)
    ids = table["id"].to_pylist()
    ids[7] = None
    pq.write_table(with_column(table, "id", pa.array(ids, pa.string())), path)
    return folder


@pytest.fixture(scope="module")
def local(corpus_dir, model, tmp_path_factory):
    """Folder and summary of a local run."""
    folder = tmp_path_factory.mktemp("local")
    return folder, score(corpus_dir, model, folder)


@pytest.fixture(scope="module")
def on_ray(connected, corpus_dir, model, tmp_path_factory):
    """Folder, summary and progress of a run of two workers."""
    folder, seen = tmp_path_factory.mktemp("ray"), []
    return folder, score(corpus_dir, model, folder, engine="ray", workers=2, progress=seen.append), seen


def copy_unfinished(folder, to, missing):
    shutil.copytree(folder, to)
    for name in ("_SUCCESS", *missing):
        (to / name).unlink()


@pytest.fixture
def trapped(tmp_path):
    """A filesystem, and a function that lays traps in it."""
    traps = tmp_path / "traps"
    traps.mkdir()
    filesystem = fs.PyFileSystem(fs.FSSpecHandler(TrappedFiles(traps=str(traps), driver=os.getpid())))

    def lay(kind, *shards):
        for shard in shards:
            (traps / f"part-{shard:05d}").write_text(kind)

    return filesystem, lay


# --- the same as the local runner ---


def test_ray_leaves_the_bytes_of_the_local_runner_quarantine_and_row_errors_among_them(local, on_ray):
    assert contents(on_ray[0]) == contents(local[0])
    assert counted(on_ray[0]) == counted(local[0])
    assert json.loads((on_ray[0] / "_quarantine.json").read_text())[0]["shard"] == "part-00003.parquet"
    assert local[1].errors == 1
    assert dataclasses.replace(on_ray[1], seconds=local[1].seconds) == local[1]


def test_progress_counts_every_shard_and_row(local, on_ray):
    seen = on_ray[2]
    assert [progress.done for progress in seen] == list(range(1, SHARDS + 1))
    assert seen[-1].rows == local[1].rows == SHARD_ROWS * (SHARDS - 1)
    assert seen[-1].seconds_left == 0


def test_ray_resumes_a_local_run(connected, corpus_dir, model, local, tmp_path):
    copy_unfinished(local[0], tmp_path / "out", ["part-00002.parquet", "part-00009.parquet"])
    summary = score(corpus_dir, model, tmp_path / "out", engine="ray", workers=1, resume=True)
    assert summary.resumed == SHARDS - 3  # the one in quarantine is tried again
    assert contents(tmp_path / "out") == contents(local[0])


def test_the_local_runner_resumes_a_run_of_ray(corpus_dir, model, local, on_ray, tmp_path):
    copy_unfinished(on_ray[0], tmp_path / "out", ["part-00002.parquet", "part-00009.parquet"])
    assert score(corpus_dir, model, tmp_path / "out", resume=True).resumed == SHARDS - 3
    assert contents(tmp_path / "out") == contents(local[0])


def test_a_changed_model_is_refused(corpus_dir, model_dir, on_ray, tmp_path):
    copy_unfinished(on_ray[0], tmp_path / "out", ["part-00002.parquet"])
    before = contents(tmp_path / "out")
    other = load_model(model_dir)
    with torch.no_grad():
        next(other.network.parameters()).add_(1e-3)
    with pytest.raises(OutputMismatchError, match="another model"):
        score(corpus_dir, other, tmp_path / "out", engine="ray", resume=True)
    assert contents(tmp_path / "out") == before


def test_real_data_have_the_metrics_of_evaluation_in_training(connected, tmp_path):
    corpus = convert(real_data("mosi_utterance"), "utterance-csv", tmp_path / "whole")
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=len(corpus) // 3)
    model = fitted_model(corpus.subset("train"))
    score(tmp_path / "corpus", model, tmp_path / "local")
    score(tmp_path / "corpus", model, tmp_path / "out", engine="ray", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    table = read_scores(tmp_path / "out")
    assert table["id"].to_pylist() == corpus.ids.tolist()
    found = classification_report(probabilities(table, corpus), corpus.target, corpus.classes)
    expected = evaluate(model, corpus).report
    assert (found.overall, found.per_class) == (expected.overall, expected.per_class)
    np.testing.assert_array_equal(found.confusion, expected.confusion)


@pytest.mark.parametrize("proxy", [ProxyConfig(), ProxyConfig(bank="neighbours", max_bank=100)], ids=lambda p: p.bank)
def test_ray_learns_the_statistics_that_one_process_learns_to_the_last_bit(proxy, connected, corpus_dir):
    """Part 3 cannot be read, and in part 6 a row cannot."""
    config = M3ERConfig(proxy=proxy)
    seen = []
    local = fit_statistics(corpus_dir, config)
    found = fit_statistics(corpus_dir, config, engine="ray", workers=2, progress=seen.append)
    assert found.state.keys() == local.state.keys()
    assert all(torch.equal(value, local.state[name]) for name, value in found.state.items())
    assert dataclasses.replace(found, state={}) == dataclasses.replace(local, state={})
    assert [entry.shard for entry in found.quarantined] == ["part-00003.parquet"]
    assert (seen[-1].done, seen[-1].groups) == (20, 20)


# --- workers that are lost, and what they raise ---


def test_a_shard_that_loses_every_worker_is_quarantined_and_those_that_lose_one_are_scored(
    connected, trapped, corpus_dir, model, local, tmp_path
):
    filesystem, lay = trapped
    lay("kill", 1)
    lay("kill once", 4)
    lay("leave once", 7)
    out = tmp_path / "out"
    summary = score((filesystem, str(corpus_dir)), model, (filesystem, str(out)), engine="ray", workers=2)
    lost, unreadable = summary.quarantined
    assert (lost.shard, unreadable.shard) == ("part-00001.parquet", "part-00003.parquet")
    assert "its worker was lost 3 times" in lost.reason
    expected = contents(local[0])
    del expected["part-00001.parquet"], expected["_quarantine.json"]
    found = contents(out)
    assert json.loads(found.pop("_quarantine.json")) == [entry._asdict() for entry in summary.quarantined]
    assert found == expected


def test_a_full_disk_in_a_worker_is_raised_here_and_leaves_nothing_half_written(
    connected, trapped, corpus_dir, model, local, tmp_path
):
    filesystem, lay = trapped
    lay("full", 5)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left on device"):
        score(corpus_dir, model, (filesystem, str(out)), engine="ray", workers=2)
    found, expected = contents(out), contents(local[0])
    assert "_SUCCESS" not in found
    found.pop("_quarantine.json", None)
    assert found
    assert found == {name: expected[name] for name in found}


def test_what_progress_raises_ends_the_workers(connected, corpus_dir, model, local, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(corpus_dir, model, tmp_path / "out", engine="ray", workers=1, progress=interrupt)
    found, expected = contents(tmp_path / "out"), contents(local[0])
    found.pop("_quarantine.json", None)
    assert found == {name: expected[name] for name in found}
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ray_map_is_in_order_and_begins_again_what_lost_its_worker(connected, tmp_path):
    tasks = [(number, str(tmp_path / "mark")) for number in range(8)]
    assert list(ray_map(slow_first, tasks, workers=2)) == [2 * number for number in range(8)]
    assert (tmp_path / "mark").exists()


def test_a_worker_computes_in_its_main_thread(connected):
    assert list(ray_map(is_in_the_main_thread, range(3), workers=1)) == [True] * 3


def test_ray_map_begins_few_tasks_before_it_is_their_turn(connected, tmp_path):
    """While the first task lasts, two workers may begin the seven after it."""
    tasks = [(number, str(tmp_path)) for number in range(40)]
    begun_before_the_first_ended, *others = ray_map(held_while_others_begin, tasks, workers=2)
    assert begun_before_the_first_ended == 2 * 4
    assert others == [None] * 39


class Unwelcome:
    """A function that no worker can unpickle."""

    def __reduce__(self):
        return eval, ("1 / 0",)

    def __call__(self, task):
        return task


def test_workers_that_cannot_be_started_are_an_error_after_a_few_attempts(connected):
    with pytest.raises(RuntimeError, match=r"no worker can be started: .*division by zero"):
        list(ray_map(Unwelcome(), [1], workers=1))


def test_a_cluster_without_room_causes_a_warning(connected, monkeypatch):
    monkeypatch.setattr("m3er_fast.execution.ray_pool.WARN_AFTER_S", 0.2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="a machine with 1000 CPUs"):
            list(ray_map(slow_first, [(1, "")], workers=1))


# --- the command line ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--address", "127.0.0.1:1"], "nothing listens at '127.0.0.1:1'"),
        (["--workers", "0"], "--workers"),
        (["--device", "cpu,cpu"], "has one device"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(options, words, corpus_dir, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["score", str(corpus_dir), "--model", str(model_dir), "--out", str(out), "--engine", "ray"]
    assert main([*arguments, *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_machine_without_a_cluster_is_said_before_anything_is_written(
    corpus_dir, model_dir, tmp_path, capsys, monkeypatch
):
    """Ray's exception is simulated: "auto" would find any Ray on this machine, whoever started it."""

    def init(**_):
        raise ConnectionError("could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    arguments = ["score", str(corpus_dir), "--model", str(model_dir), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--engine", "ray", "--address", "auto"]) == 2
    error = capsys.readouterr().err
    assert "no usable Ray cluster answers at 'auto': could not find any" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named_before_anything_is_written(
    corpus_dir, model_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["score", str(corpus_dir), "--model", str(model_dir), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--engine", "ray"]) == 2
    assert "pip install 'm3er-fast[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def many_dir(both, tmp_path_factory):
    """A corpus of so many shards that a run can be interrupted in the middle."""
    folder = tmp_path_factory.mktemp("many")
    write_parquet(both.select(slice(200, 202)), folder, rows_per_shard=2)
    content = (folder / "part-00000.parquet").read_bytes()
    for shard in range(1, MANY):
        (folder / f"part-{shard:05d}.parquet").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def many_scores(many_dir, model_dir, tmp_path_factory):
    """The scores of an uninterrupted local run."""
    folder = tmp_path_factory.mktemp("many-scores")
    score(many_dir, load_model(model_dir), folder)
    return contents(folder)


def start_scoring(corpus, model, out, *more, mark="", **environment):
    command = [sys.executable, "-m", "m3er_fast.cli", "score", corpus, "--model", model, "--out", out]
    return subprocess.Popen(
        [*command, "--engine", "ray", *more],
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "M3ER_TEST_RUN": mark, **environment},
    )


def wait_for_scores(out, run, number=1):
    deadline = time.monotonic() + 120
    while len(list(out.glob("part-*"))) < number and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def processes_of(mark):
    """Return the ids of a run's process and of all processes that it has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"M3ER_TEST_RUN={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupt_is_exit_code_130_and_leaves_no_process_and_nothing_half_written(
    number, many_dir, model_dir, tmp_path
):
    out, mark = tmp_path / "out", uuid.uuid4().hex
    run = start_scoring(many_dir, model_dir, out, "--workers", "1", mark=mark)
    wait_for_scores(out, run)
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130, error
    # On a busy machine there are lines of progress too.
    assert [line for line in error.decode().splitlines() if not line.startswith("score: ")] == [
        "m3er-fast: error: interrupted: the same command with --resume goes on"
    ]
    assert not list(out.glob(".*"))
    assert not (out / "_SUCCESS").exists()
    deadline = time.monotonic() + 20
    while processes_of(mark):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_driver_is_resumed_to_the_bytes_of_an_uninterrupted_run(
    kills, many_dir, many_scores, model_dir, tmp_path
):
    out, moments = tmp_path / "out", random.Random(0)
    for kill in range(kills):
        run = start_scoring(many_dir, model_dir, out, "--workers", "2", "--resume")
        wait_for_scores(out, run, 1 + 50 * kill)
        time.sleep(moments.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL
    assert not (out / "_SUCCESS").exists()
    score(many_dir, load_model(model_dir), out, resume=True)
    assert contents(out) == many_scores


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_killed_at_five_random_moments_lose_no_row(many_dir, many_scores, model_dir, tmp_path):
    out, mark, moments = tmp_path / "out", uuid.uuid4().hex, random.Random(0)
    run = start_scoring(many_dir, model_dir, out, "--workers", "2", mark=mark)
    for kill in range(5):
        wait_for_scores(out, run, 1 + 50 * kill)
        time.sleep(moments.uniform(0, 0.1))
        workers = [process for process in processes_of(mark) if b"_Worker" in command_of(process)]
        os.kill(moments.choice(workers), signal.SIGKILL)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 0, error
    assert contents(out) == many_scores


def command_of(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_a_machine_of_a_cluster_that_is_lost_takes_no_row_with_it(many_dir, many_scores, model_dir, tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    try:
        machine = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        out = tmp_path / "out"
        run = start_scoring(many_dir, model_dir, out, "--address", cluster.address)  # one worker per machine
        wait_for_scores(out, run, 50)
        cluster.remove_node(machine, allow_graceful=False)
        _, error = run.communicate(timeout=120)
    finally:
        cluster.shutdown()
    assert run.returncode == 0, error
    assert contents(out) == many_scores
