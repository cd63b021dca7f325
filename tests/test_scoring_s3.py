"""Corpora and scores on an object store: moto's, in this process, through Arrow's own S3 client."""

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from score_folder import SUMMARY, contents
from scoring_problems import fitted_model, make_corpus

from m3er_fast.cli import main
from m3er_fast.corpus import write_parquet
from m3er_fast.scoring import ModelStatistics, fit_statistics, score
from m3er_fast.shards.plan import locate

server = pytest.importorskip("moto.server", reason="needs moto[s3], flask and flask-cors")
if not hasattr(fs, "S3FileSystem"):
    pytest.skip("this pyarrow is built without S3", allow_module_level=True)

SHARD_ROWS = 16
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
_NUMBERS = itertools.count()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(port):
    running = server.ThreadedMotoServer("127.0.0.1", port=port, verbose=False)
    running.start()
    return running


@pytest.fixture(scope="module")
def store():
    """A server of its own; what it listens to."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        patch.setattr(logging.getLogger("werkzeug"), "level", logging.ERROR)  # it logs every request
        port = free_port()
        running = start(port)
        yield f"127.0.0.1:{port}"
        running.stop()


@pytest.fixture
def bucket(store):
    """An empty bucket: a function that gives the URI of what lies in it."""
    name = f"bucket-{next(_NUMBERS)}"
    options = f"endpoint_override={store}&scheme=http"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://{name}?{options}&allow_bucket_creation=true")
    filesystem.create_dir(name)
    return lambda path: f"s3://{name}/{path}?{options}"


@pytest.fixture(scope="module")
def both():
    return make_corpus(200 + 6 * SHARD_ROWS, missing=0.1)


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
    """Six shards on this machine."""
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(both.select(slice(200, None)), folder, rows_per_shard=SHARD_ROWS)
    return folder


@pytest.fixture(scope="module")
def local(corpus_dir, model, tmp_path_factory):
    """The folder of a run that uses no store."""
    folder = tmp_path_factory.mktemp("local")
    score(corpus_dir, model, folder)
    return folder


@pytest.fixture
def corpus(corpus_dir, bucket):
    """URI of the same shards on the store."""
    copy(str(corpus_dir), bucket("corpus"))
    return bucket("corpus")


def copy(source, to):
    (here, path), (there, other) = locate(source), locate(to)
    fs.copy_files(path, other, source_filesystem=here, destination_filesystem=there)


def fetched(uri, folder):
    """The files of a folder on the store, on this machine."""
    folder.mkdir()
    copy(uri, str(folder))
    return folder


def names(uri):
    filesystem, path = locate(uri)
    return {file.base_name for file in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))}


def has_scores(uri):
    return any(name.startswith("part-") for name in names(uri))


def delete(uri, *files):
    filesystem, path = locate(uri)
    for name in files:
        filesystem.delete_file(f"{path}/{name}")


def write(uri, content):
    filesystem, path = locate(uri)
    with filesystem.open_output_stream(path) as file:
        file.write(content)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_scores_of_a_store_are_the_bytes_of_local_ones(engine, corpus, bucket, model, local, tmp_path):
    summary = score(corpus, model, bucket("out"), engine=engine, workers=1 if engine == "ray" else None)
    assert (summary.rows, summary.errors, summary.quarantined) == (6 * SHARD_ROWS, 0, ())
    found = fetched(bucket("out"), tmp_path / "found")
    assert contents(found) == contents(local)
    assert {path.name for path in found.iterdir()} == {*contents(local), *SUMMARY}


def test_the_command_says_where_scores_are_but_no_key(corpus, bucket, model_dir, capsys):
    out = bucket("out").replace("s3://", "s3://key:secret@")
    assert main(["score", corpus, "--model", str(model_dir), "--out", out]) == 0
    printed = capsys.readouterr()
    assert f"see {locate(out)}/_summary.html" in printed.out
    assert str(locate(out)).startswith("s3://bucket-")
    assert "secret" not in printed.out + printed.err
    assert main(["score", corpus, "--model", str(model_dir), "--out", out]) == 2
    printed = capsys.readouterr()
    assert f"{locate(out)} is not empty" in printed.err
    assert "secret" not in printed.out + printed.err


def test_what_is_missing_is_scored_on_resume_and_what_is_there_is_not(corpus, bucket, model, local, tmp_path):
    score(corpus, model, bucket("out"))
    delete(bucket("out"), "_SUCCESS", "part-00001.parquet", "part-00004.parquet")
    write(bucket("out/.part-00001.parquet.0.partial"), b"PAR1")
    summary = score(corpus, model, bucket("out"), resume=True)
    assert (summary.rows, summary.resumed) == (6 * SHARD_ROWS, 4)
    assert contents(fetched(bucket("out"), tmp_path / "found")) == contents(local)


def test_a_run_killed_on_a_store_is_resumed_to_the_same_bytes(corpus, bucket, model_dir, local, tmp_path):
    root = str(Path(__file__).parents[1])
    arguments = ["score", corpus, "--model", str(model_dir), "--out", bucket("out"), "--resume"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    run = subprocess.Popen([sys.executable, "-m", "m3er_fast.cli", *arguments], env=environment)
    deadline = time.monotonic() + 60
    while not has_scores(bucket("out")) and time.monotonic() < deadline:
        time.sleep(0.005)
    run.kill()
    run.wait()
    assert has_scores(bucket("out"))
    assert main(arguments) == 0
    assert contents(fetched(bucket("out"), tmp_path / "found")) == contents(local)


def test_a_damaged_object_is_put_in_quarantine_and_scored_when_it_is_mended(
    corpus, corpus_dir, bucket, model_dir, local, tmp_path
):
    write(bucket("corpus/part-00002.parquet"), b"PAR1")
    arguments = ["score", corpus, "--model", str(model_dir), "--out", bucket("out")]
    assert main(arguments) == 3
    filesystem, path = locate(bucket("out/_quarantine.json"))
    with filesystem.open_input_file(path) as file:
        assert [entry["shard"] for entry in json.loads(file.read())] == ["part-00002.parquet"]
    copy(str(corpus_dir), corpus)
    assert main([*arguments, "--resume"]) == 0
    found = contents(fetched(bucket("out"), tmp_path / "found"))
    del found["_manifest.json"]  # the shard had another checksum when the run began
    assert found.items() <= contents(local).items()


def test_a_changed_object_is_refused_on_resume(corpus, corpus_dir, bucket, model_dir, capsys):
    arguments = ["score", corpus, "--model", str(model_dir), "--out", bucket("out")]
    assert main(arguments) == 0
    write(bucket("corpus/part-00002.parquet"), (corpus_dir / "part-00001.parquet").read_bytes())
    assert main([*arguments, "--resume"]) == 4
    assert "part-00002.parquet has changed" in capsys.readouterr().err


def test_statistics_are_learned_from_a_store_as_from_files(corpus, corpus_dir, tmp_path):
    assert main(["fit-stats", corpus, "--out", str(tmp_path / "stats.safetensors")]) == 0
    wanted, found = fit_statistics(corpus_dir), ModelStatistics.load(tmp_path / "stats.safetensors")
    assert found.state.keys() == wanted.state.keys()
    for name, value in wanted.state.items():
        assert torch.equal(found.state[name], value), name


@pytest.mark.parametrize(("option", "trouble"), [("corpus", "bucket"), ("out", "bucket"), ("out", "server")])
def test_a_store_that_cannot_be_used_is_one_line_and_exit_code_2(
    option, trouble, store, corpus, bucket, model_dir, capsys
):
    at = store if trouble == "bucket" else "127.0.0.1:1"  # where nothing listens
    named = {"corpus": corpus, "out": bucket("out"), option: f"s3://missing/x?endpoint_override={at}&scheme=http"}
    assert main(["score", named["corpus"], "--model", str(model_dir), "--out", named["out"]]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("m3er-fast: error: ")
    assert "missing" in error[0]


def test_an_output_that_is_lost_on_the_way_ends_the_run_and_what_is_finished_stays(
    corpus_dir, model, local, tmp_path, monkeypatch
):
    """A store of its own goes away after two shards; when it is back, the run is resumed."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    running = start(port)
    out = f"s3://lost/out?endpoint_override=127.0.0.1:{port}&scheme=http&allow_bucket_creation=true"
    stopped = threading.Event()

    def stop(progress):
        if progress.done == 2 and not stopped.is_set():
            stopped.set()
            running.stop()

    with pytest.raises(OSError, match=r"(?i)aws error|connect"):
        score(corpus_dir, model, out, progress=stop)
    assert stopped.is_set()
    again = start(port)  # moto keeps its objects in this process
    try:
        assert "_SUCCESS" not in names(out)
        summary = score(corpus_dir, model, out, resume=True)
        assert summary.resumed >= 2
        assert contents(fetched(out, tmp_path / "found")) == contents(local)
    finally:
        again.stop()
