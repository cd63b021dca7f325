"""The outcome of damaged, hostile and odd corpora, outputs and runs: the fault table of docs/scoring_faults.md."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs, ipc
from score_folder import SUMMARY, contents, counted
from scoring_problems import DIMS, fitted_model, make_corpus, read_scores

from m3er_fast.cli import main
from m3er_fast.corpus import CorpusError, features_from_table, generate_corpus, read_parquet, write_parquet
from m3er_fast.corpus.generate import _make_shard
from m3er_fast.scoring import Scorer, fit_statistics, iter_scores, load_model, score
from m3er_fast.scoring.batching import plan_batches
from m3er_fast.scoring.local import make_scorers
from m3er_fast.shards import page_cache
from m3er_fast.shards.plan import plan_shards
from m3er_fast.shards.prefetch import Prefetch
from m3er_fast.shards.reader import read_windows

SHARD_ROWS = 64
MIB = 2**20


@pytest.fixture(scope="module")
def both():
    return make_corpus(400)


@pytest.fixture(scope="module")
def corpus(both):
    return both.select(slice(200, 400))


@pytest.fixture(scope="module")
def model(both):
    return fitted_model(both.select(slice(0, 200)))


@pytest.fixture(scope="module")
def model_dir(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus_dir(corpus, tmp_path):
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=SHARD_ROWS)
    return tmp_path / "corpus"


def probabilities(table):
    return np.stack([table[name].to_numpy() for name in ("p_angry", "p_happy", "p_neutral")], axis=1)


def assert_only_quarantined(folder, model, name, reason, tmp_path):
    summary = score(folder, model, tmp_path / "out")
    assert [entry.shard for entry in summary.quarantined] == [name]
    assert reason in summary.quarantined[0].reason
    assert summary.rows == 200 - SHARD_ROWS
    assert not (tmp_path / "out" / name).exists()


# --- damaged shards ---


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_a_flipped_bit_in_frames_is_found_by_the_page_checksum(position, corpus_dir, model, tmp_path):
    path = corpus_dir / "part-00001.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(1)
    assert chunk.path_in_schema == "text"
    raw = bytearray(path.read_bytes())
    # Past the page's header, which is shorter than 100 bytes.
    raw[chunk.data_page_offset + 100 + int(position * (chunk.total_compressed_size - 200))] ^= 1
    path.write_bytes(raw)
    assert_only_quarantined(corpus_dir, model, path.name, "CRC", tmp_path)


def test_a_shard_cut_short_is_quarantined(corpus_dir, model, tmp_path):
    path = corpus_dir / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert_only_quarantined(corpus_dir, model, path.name, "not readable", tmp_path)


@pytest.mark.parametrize("layout", ["fixed", "list", "nested"])
def test_frames_of_another_dimension_are_quarantined(layout, corpus_dir, model, tmp_path):
    path = corpus_dir / "part-00001.parquet"
    table = pq.read_table(path)
    frames = {
        "fixed": pa.array([[0.0] * 7] * SHARD_ROWS, pa.list_(pa.float32(), 7)),
        "nested": pa.array([[[0.0] * 7] * 4] * SHARD_ROWS, pa.list_(pa.list_(pa.float32()))),
        "list": pa.FixedSizeBinaryArray.from_buffers(pa.binary(28), SHARD_ROWS, [None, pa.py_buffer(bytes(28 * 64))]),
    }[layout]
    field = pa.field("audio", frames.type, metadata={"features": "7"} if layout == "list" else None)
    pq.write_table(table.set_column(table.column_names.index("audio"), field, frames), path)
    assert_only_quarantined(corpus_dir, model, path.name, "7", tmp_path)


def test_an_all_null_column_is_an_unavailable_modality(corpus, corpus_dir, model, tmp_path):
    path = corpus_dir / "part-00001.parquet"
    table = pq.read_table(path)
    index = table.column_names.index("audio")
    pq.write_table(
        table.set_column(index, table.schema.field("audio"), pa.nulls(len(table), table["audio"].type)), path
    )
    summary = score(corpus_dir, model, tmp_path / "out")
    assert (summary.quarantined, summary.errors) == ((), 0)
    found = pq.read_table(tmp_path / "out" / path.name)
    part = corpus.select(slice(SHARD_ROWS, 2 * SHARD_ROWS))
    expected = model.predict_proba(part.features, part.lengths, part.available & [True, False, True])
    np.testing.assert_allclose(probabilities(found), expected, rtol=0, atol=1e-6)
    assert not found["effective_audio"].to_numpy().any()


def test_a_storm_of_nan_abstains_with_finite_scores(corpus, model, tmp_path):
    stormy = dataclasses.replace(corpus, features={name: x * np.float32(np.nan) for name, x in corpus.features.items()})
    write_parquet(stormy, tmp_path / "corpus")
    summary = score(tmp_path / "corpus", model, tmp_path / "out")
    assert (summary.quarantined, summary.errors) == ((), 0)
    assert read_scores(tmp_path / "out")["abstained"].to_numpy().all()
    assert np.isfinite(probabilities(read_scores(tmp_path / "out"))).all()


def test_duplicate_ids_are_rows_of_their_own_in_order(corpus_dir, model, tmp_path):
    score(corpus_dir, model, tmp_path / "distinct")
    for path in corpus_dir.iterdir():
        table = pq.read_table(path)
        pq.write_table(table.set_column(0, "id", pa.array(["same"] * len(table))), path)
    score(corpus_dir, model, tmp_path / "out")
    found, distinct = read_scores(tmp_path / "out"), read_scores(tmp_path / "distinct")
    assert set(found["id"].to_pylist()) == {"same"}
    assert found.drop_columns(["id"]).equals(distinct.drop_columns(["id"]))


def test_an_empty_shard_among_others_has_empty_scores(corpus, corpus_dir, model, tmp_path):
    path = corpus_dir / "part-00001.parquet"
    pq.write_table(pq.read_schema(path).empty_table(), path)
    summary = score(corpus_dir, model, tmp_path / "out")
    assert (summary.rows, summary.quarantined) == (200 - SHARD_ROWS, ())
    assert pq.read_table(tmp_path / "out" / path.name).num_rows == 0


def make_tiny_shards(folder, corpus, number):
    write_parquet(corpus.select(slice(0, 1)), folder)
    content = (folder / "part-00000.parquet").read_bytes()
    for shard in range(1, number):
        (folder / f"part-{shard:06d}.parquet").write_bytes(content)


@pytest.mark.parametrize("number", [300, pytest.param(10**5, marks=pytest.mark.slow)])
def test_tiny_shards_are_all_scored_with_bounded_threads(number, corpus, model, tmp_path):
    make_tiny_shards(tmp_path / "corpus", corpus, number)
    summary = score(tmp_path / "corpus", model, tmp_path / "out")
    assert (summary.rows, summary.shards) == (number, number)
    assert len(list((tmp_path / "out").glob("*.parquet"))) == number


# --- sizes ---

_PEAK = """
import json, resource, sys
from pathlib import Path
import pyarrow as pa
from m3er_fast.shards.plan import plan_shards
from m3er_fast.shards.reader import read_windows
from m3er_fast.corpus import CorpusError
import pyarrow.compute
plan = plan_shards(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows, error = 0, ""
try:
    for table in read_windows(plan.corpus, plan.shards[0], window_bytes=2**22):
        rows += table.num_rows
except CorpusError as found:
    error = str(found)
print(json.dumps([rows, error, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def read_in_a_process(path):
    """Rows, error and growth of the peak memory in bytes, of reading a shard in a process of its own."""
    found = subprocess.run([sys.executable, "-c", _PEAK, path], capture_output=True, text=True, check=True)
    rows, error, kib = json.loads(found.stdout)
    return rows, error, 1024 * kib


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_one_huge_row_group_is_never_held_whole(suffix, tmp_path):
    rows, width = 20_000, 16_000
    path = tmp_path / f"huge.{suffix}"
    frames = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), rows, [None, pa.py_buffer(np.random.default_rng(0).bytes(rows * width))]
    )
    table = pa.table({"id": pa.array([str(row) for row in range(rows)]), "text": frames})
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
        assert pq.read_metadata(path).num_row_groups == 1
    else:
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    assert path.stat().st_size > 300 * MIB
    found, error, grown = read_in_a_process(path)
    assert (found, error) == (rows, "")
    assert grown < 100 * MIB


def test_a_bomb_of_repeated_frames_is_refused_before_it_is_unpacked(tmp_path):
    rows, width, parts = 2000, 20_000, 60  # 2.4 GB
    part = pa.table({"id": pa.array(["x"] * rows), "text": pa.array([bytes(width)] * rows, pa.binary(width))})
    path = tmp_path / "bomb.parquet"
    with pq.ParquetWriter(path, part.schema, compression="zstd") as writer:
        for _ in range(parts):
            writer.write_table(part)
    assert path.stat().st_size < MIB
    found, error, grown = read_in_a_process(path)
    assert found == 0
    assert "would unpack from" in error
    assert grown < 100 * MIB


@pytest.mark.parametrize("width", [4, 700, 1024, 1025])  # of which the last is more than a header may hold
def test_pages_of_one_row_whose_headers_hold_more_than_the_row_are_no_bomb(width, tmp_path):
    features = np.random.default_rng(0).normal(size=(500, width)).astype(np.float32)
    frames = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * width), 500, [None, pa.py_buffer(features)])
    field = pa.field("text", pa.binary(4 * width), metadata={"features": str(width)})
    ids = pa.array([f"u{row}" for row in range(500)])
    table = pa.Table.from_arrays([ids, frames], schema=pa.schema([pa.field("id", pa.string()), field]))
    pq.write_table(
        table, tmp_path / "a.parquet", write_batch_size=1, data_page_size=1, use_dictionary=False, compression="none"
    )
    plan = plan_shards(tmp_path)
    [read] = read_windows(plan.corpus, plan.shards[0])
    np.testing.assert_array_equal(features_from_table(read).features["text"][:, 0], features)


def test_a_bomb_of_one_huge_page_is_refused_by_what_its_rows_can_hold(tmp_path):
    path = tmp_path / "bomb.parquet"
    long = pa.array(["x" * (128 * MIB)])
    pq.write_table(pa.table({"id": long, "text": pa.array([bytes(4)], pa.binary(4))}), path, compression="zstd")
    assert path.stat().st_size < MIB
    found, error, grown = read_in_a_process(path)
    assert found == 0
    assert "column 'id' would unpack to" in error
    assert grown < 100 * MIB


def test_one_long_row_does_not_pad_the_others(model, tmp_path):
    long, rows = 20_000, 512
    text = [[0.1] * 6 * (long if row == 7 else 2) for row in range(rows)]
    table = pa.table({"id": [str(row) for row in range(rows)], "text": pa.array(text, pa.list_(pa.float32()))})
    seen = []
    forward = model.forward
    model_copy = make_scorers(model, ["cpu"], 4096, "float32")[0]
    model_copy.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]["text"].shape))
    scores = model_copy.score(table)
    assert forward is not None
    assert scores["error"].null_count == rows
    assert sum(shape[0] for shape in seen) == rows
    assert max(shape[0] * shape[1] for shape in seen) <= long
    assert (1, long, 6) in [tuple(shape) for shape in seen]


# --- output ---


def mounted(options):
    """Run the command line in a mount namespace of its own; skips where that is not permitted."""
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this user may not mount")

    def run(folder, corpus, model, *more):
        command = [sys.executable, "-m", "m3er_fast.cli", "score", corpus, "--model", model, "--out", folder / "scores"]
        script = f'mount -t tmpfs {options} tmpfs "$0" && "$@"; code=$?; ls -A "$0/scores" 2>/dev/null; exit $code'
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", script, folder, *command, *more],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[1],
        )

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_is_exit_code_5_with_the_finished_shards_intact(corpus_dir, model_dir, tmp_path):
    run = mounted("-o size=28k")
    (tmp_path / "mount").mkdir()
    found = run(tmp_path / "mount", corpus_dir, model_dir)
    if "mount:" in found.stderr:
        pytest.skip("this user may not mount")
    assert found.returncode == 5, found.stderr
    assert found.stderr.startswith("m3er-fast: error: disk full")
    names = found.stdout.split()
    assert "part-00000.parquet" in names
    assert "_SUCCESS" not in names
    assert not [name for name in names if name.endswith(".partial")]


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_read_only_output_is_exit_code_2_in_one_line(corpus_dir, model_dir, tmp_path):
    run = mounted("-o ro")
    (tmp_path / "mount").mkdir()
    found = run(tmp_path / "mount", corpus_dir, model_dir)
    if "mount:" in found.stderr:
        pytest.skip("this user may not mount")
    assert found.returncode == 2, found.stderr
    assert found.stderr.count("\n") == 1
    assert "Read-only file system" in found.stderr


# --- killed, interrupted ---


def start_scoring(corpus, model, out, *more, threads=1):
    return subprocess.Popen(
        [sys.executable, "-m", "m3er_fast.cli", "score", corpus, "--model", model, "--out", out, *more],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_leaves_the_bytes_of_an_uninterrupted_run(
    kills, corpus, model, model_dir, tmp_path
):
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=2)
    score(tmp_path / "corpus", load_model(model_dir), tmp_path / "whole")
    moments, killed = random.Random(0), 0
    for attempt in range(10 * kills):
        if killed == kills:
            break
        out = tmp_path / f"out-{attempt // 5}"
        run = start_scoring(tmp_path / "corpus", model_dir, out, "--resume", threads=1 + attempt % 2)
        deadline = time.monotonic() + 60
        while not (out / "_manifest.json").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.4))
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            killed += 1
        run.communicate()
    assert killed == kills
    for out in tmp_path.glob("out-*"):
        score(tmp_path / "corpus", load_model(model_dir), out, resume=True)
        assert contents(out) == contents(tmp_path / "whole")
        assert counted(out) == counted(tmp_path / "whole")
        assert read_scores(out)["id"].to_pylist() == corpus.ids.tolist()


@pytest.mark.parametrize(("number", "threads"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interrupt_is_exit_code_130_and_leaves_nothing_half_written(
    number, threads, corpus, model_dir, tmp_path, request
):
    # A shell that starts tests in the background has them ignore SIGINT, and what is ignored a new process inherits.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))
    make_tiny_shards(tmp_path / "corpus", corpus, 2000)
    out = tmp_path / "out"
    run = start_scoring(tmp_path / "corpus", model_dir, out, threads=threads)
    deadline = time.monotonic() + 60
    while not list(out.glob("part-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130, error
    assert error.decode().strip().endswith("m3er-fast: error: interrupted: the same command with --resume goes on")
    assert not list(out.glob(".*.partial"))
    assert not (out / "_SUCCESS").exists()


def test_a_changed_model_is_exit_code_4(corpus_dir, model, model_dir, tmp_path):
    assert main(["score", str(corpus_dir), "--model", str(model_dir), "--out", str(tmp_path / "out")]) == 0
    other = make_scorers(model, ["cpu"], 64, "float32")[0].model
    with torch.no_grad():
        next(other.network.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    before = contents(tmp_path / "out")
    arguments = ["score", str(corpus_dir), "--model", str(tmp_path / "other"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--resume"]) == 4
    assert contents(tmp_path / "out") == before


def test_an_unreadable_model_is_exit_code_2_before_anything_is_written(corpus_dir, model_dir, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\xff" * 100)
    arguments = ["score", str(corpus_dir), "--model", str(tmp_path / "bad"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert not (tmp_path / "out").exists()


def test_a_shard_that_changed_after_it_was_scored_is_exit_code_4(corpus, corpus_dir, model_dir, tmp_path):
    arguments = ["score", str(corpus_dir), "--model", str(model_dir), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    write_parquet(corpus.select(slice(100, 164)), tmp_path / "new")
    (tmp_path / "new" / "part-00000.parquet").replace(corpus_dir / "part-00001.parquet")
    assert main([*arguments, "--resume"]) == 4


def test_other_settings_are_refused_on_resume_and_auto_takes_those_of_the_first_run(corpus_dir, model_dir, tmp_path):
    arguments = ["score", str(corpus_dir), "--model", str(model_dir), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--batch-frames", "100"]) == 0
    assert main([*arguments, "--batch-frames", "200", "--resume"]) == 4
    (tmp_path / "out" / "part-00001.parquet").unlink()
    assert main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["settings"]["batch_frames"] == 100


# --- memory ---


def test_a_batch_that_does_not_fit_into_memory_is_halved_until_it_does(corpus, model, corpus_dir):
    table = pq.read_table(corpus_dir / "part-00000.parquet")
    expected = Scorer(model).score(table)
    scorer = make_scorers(model, ["cpu"], 10_000, "float32")[0]
    sizes = []

    def refuse(_, inputs):
        sizes.append(len(inputs[1]))
        if len(inputs[1]) > 10:
            raise torch.OutOfMemoryError("too much")

    scorer.model.register_forward_pre_hook(refuse)
    scores = scorer.score(table)
    assert scores["error"].null_count == SHARD_ROWS
    np.testing.assert_allclose(probabilities(scores), probabilities(expected), rtol=0, atol=1e-6)
    assert scorer.batch_frames < 64
    sizes.clear()
    scorer.score(table)
    assert max(sizes) <= 20  # learned, and not tried anew with every batch


def test_a_row_that_breaks_the_model_has_the_error_and_the_others_their_scores(model, corpus_dir):
    table = pq.read_table(corpus_dir / "part-00000.parquet")
    expected = Scorer(model).score(table)
    scorer = make_scorers(model, ["cpu"], 10_000, "float32")[0]
    victim = torch.frombuffer(bytearray(table["text"][5].as_py()), dtype=torch.float32)[:6]

    def break_on_it(_, inputs):
        if (inputs[0]["text"][:, 0] == victim).all(dim=1).any():
            raise RuntimeError("no\nway")

    scorer.model.register_forward_pre_hook(break_on_it)
    scores = scorer.score(table)
    assert [(row, error) for row, error in enumerate(scores["error"].to_pylist()) if error] == [
        (5, "RuntimeError: no way")
    ]
    kept = np.delete(np.arange(SHARD_ROWS), 5)
    np.testing.assert_allclose(probabilities(scores.take(kept)), probabilities(expected.take(kept)), rtol=0, atol=1e-6)


# --- layouts, filesystems, devices ---


@pytest.mark.parametrize("layout", ["nested", "list", "fixed", "tensor", "float16", "arrow"])
def test_every_layout_has_the_scores_of_the_fast_one(layout, corpus, corpus_dir, model, tmp_path):
    score(corpus_dir, model, tmp_path / "fast")
    (tmp_path / "other").mkdir()
    if layout == "float16":  # halves that float16 holds exactly, in both
        rounded = {name: np.round(x * 8) / 8 for name, x in corpus.features.items()}
        rounded = {name: x.astype(np.float32) for name, x in rounded.items()}
        write_parquet(dataclasses.replace(corpus, features=rounded), tmp_path / "rounded", rows_per_shard=SHARD_ROWS)
        corpus_dir = tmp_path / "rounded"
        score(corpus_dir, model, tmp_path / "fast16")
    for path in corpus_dir.glob("*.parquet"):
        table = pq.read_table(path)
        for name, dim in DIMS.items():
            frames = np.stack([np.frombuffer(row.as_py(), "<f4") for row in table[name]]) if layout != "arrow" else None
            if frames is None:
                continue
            column = {
                "nested": lambda x, d: pa.array(
                    [row.reshape(-1, d).tolist() for row in x], pa.list_(pa.list_(pa.float32()))
                ),
                "list": lambda x, d: pa.array(list(x), pa.list_(pa.float32())),
                "fixed": lambda x, d: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
                "tensor": lambda x, d: pa.ExtensionArray.from_storage(
                    pa.fixed_shape_tensor(pa.float32(), (x.shape[1] // d, d)),
                    pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
                ),
                "float16": lambda x, d: pa.array([row.astype("<f2").tobytes() for row in x], pa.binary(2 * x.shape[1])),
            }[layout](frames, dim)
            metadata = {"features": str(dim), **({"dtype": "float16"} if layout == "float16" else {})}
            field = pa.field(name, column.type, metadata=metadata)
            table = table.set_column(table.column_names.index(name), field, column)
        if layout == "arrow":
            with ipc.new_file(tmp_path / "other" / f"{path.stem}.arrow", table.schema) as writer:
                writer.write_table(table)
        else:
            pq.write_table(table, tmp_path / "other" / path.name)
    summary = score(tmp_path / "other", model, tmp_path / "out")
    assert (summary.quarantined, summary.errors) == ((), 0)
    wanted = read_scores(tmp_path / ("fast16" if layout == "float16" else "fast"))
    assert read_scores(tmp_path / "out").equals(wanted)


def test_compressed_ipc_is_quarantined_because_only_its_data_say_what_it_unpacks_to(corpus_dir, model, tmp_path):
    (tmp_path / "other").mkdir()
    for path in corpus_dir.glob("*.parquet"):
        table = pq.read_table(path)
        compression = "zstd" if path.stem == "part-00001" else None
        options = ipc.IpcWriteOptions(compression=compression)
        with ipc.new_file(tmp_path / "other" / f"{path.stem}.arrow", table.schema, options=options) as writer:
            writer.write_table(table)
    summary = score(tmp_path / "other", model, tmp_path / "out")
    assert [entry.shard for entry in summary.quarantined] == ["part-00001.arrow"]
    assert "compressed Arrow IPC" in summary.quarantined[0].reason


@pytest.mark.parametrize("damage", ["cut", "offsets"])
def test_damaged_ipc_is_quarantined(damage, corpus_dir, model, tmp_path):
    (tmp_path / "other").mkdir()
    for path in corpus_dir.glob("*.parquet"):
        table = pq.read_table(path)
        text = pa.array([np.frombuffer(row.as_py(), "<f4") for row in table["text"]], pa.list_(pa.float32()))
        table = table.set_column(table.column_names.index("text"), "text", text)
        with ipc.new_file(tmp_path / "other" / f"{path.stem}.arrow", table.schema) as writer:
            writer.write_table(table)
    bad = tmp_path / "other" / "part-00002.arrow"
    raw = bad.read_bytes()
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    else:
        offsets = (24 * np.arange(SHARD_ROWS + 1, dtype=np.int32)).tobytes()
        assert raw.count(offsets) == 1
        wild = (24 * np.arange(SHARD_ROWS + 1, dtype=np.int32) + 2**30).tobytes()
        raw = raw.replace(offsets, wild)
    bad.write_bytes(raw)
    assert [entry.shard for entry in score(tmp_path / "other", model, tmp_path / "out").quarantined] == [bad.name]


def test_any_arrow_filesystem_gives_the_bytes_of_the_local_one(corpus_dir, model, tmp_path):
    score(corpus_dir, model, tmp_path / "local")
    memory = fs._MockFileSystem()
    memory.create_dir("in")
    for path in corpus_dir.iterdir():
        with memory.open_output_stream(f"in/{path.name}") as file:
            file.write(path.read_bytes())
    score((memory, "in"), model, (memory, "out"))
    assert score((memory, "in"), model, (memory, "out"), resume=True).resumed == 4
    files = [file for file in memory.get_file_info(fs.FileSelector("out")) if file.is_file]
    found = {f.base_name: memory.open_input_stream(f.path).read() for f in files if f.base_name not in SUMMARY}
    assert found == contents(tmp_path / "local")
    inside = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    score((inside, "corpus"), model, (inside, "subtree"))
    assert contents(tmp_path / "subtree") == contents(tmp_path / "local")
    score(corpus_dir.as_uri(), model, (tmp_path / "uri").as_uri())
    assert contents(tmp_path / "uri") == contents(tmp_path / "local")


def test_several_devices_leave_the_bytes_of_one(corpus_dir, model, tmp_path):
    score(corpus_dir, model, tmp_path / "one")
    score(corpus_dir, model, tmp_path / "three", devices=["cpu", "cpu", "cpu"])
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_one_thread_is_the_one_that_calls_and_several_scorers_have_one_each(corpus_dir, model, tmp_path, monkeypatch):
    computing, score_table = [], Scorer.score

    def noted(scorer, table, **options):
        computing.append((threading.current_thread(), scorer))
        return score_table(scorer, table, **options)

    monkeypatch.setattr(Scorer, "score", noted)
    score(corpus_dir, model, tmp_path / "one")
    assert {thread for thread, _ in computing} == {threading.current_thread()}
    computing.clear()
    score(corpus_dir, model, tmp_path / "two", devices=["cpu", "cpu"])
    assert threading.current_thread() not in {thread for thread, _ in computing}
    assert len(set(computing)) == len({scorer for _, scorer in computing})


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told")
@pytest.mark.parametrize(("memory", "is_dropped"), [(2.1, False), (1.9, True)])
def test_only_a_corpus_of_more_than_half_the_memory_is_dropped_from_the_page_cache(
    memory, is_dropped, corpus_dir, model, tmp_path, monkeypatch
):
    dropped = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, *_: dropped.append(Path(f"/proc/self/fd/{file}").readlink().name)
    )
    names = sorted(path.name for path in corpus_dir.glob("*.parquet"))
    size = sum((corpus_dir / name).stat().st_size for name in names)
    monkeypatch.setattr(page_cache, "memory_bytes", lambda: memory * size)
    (corpus_dir / names[0]).write_bytes(bytes((corpus_dir / names[0]).stat().st_size))  # one in quarantine
    score(corpus_dir, model, tmp_path / "out")
    assert dropped == (names if is_dropped else [])
    dropped.clear()
    fit_statistics(corpus_dir)
    assert dropped == (2 * names[1:] if is_dropped else [])


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
def test_what_a_scorer_raises_stops_the_run(devices, corpus_dir, model, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise AssertionError("a defect")

    monkeypatch.setattr(Scorer, "score", fail)
    with pytest.raises(AssertionError, match="a defect"):
        score(corpus_dir, model, tmp_path / "out", devices=devices)
    assert sorted(contents(tmp_path / "out")) == ["_manifest.json"]


def test_iter_scores_yields_what_score_writes_and_raises_for_a_bad_shard(corpus_dir, model, tmp_path):
    score(corpus_dir, model, tmp_path / "out")
    assert pa.concat_tables(iter_scores(corpus_dir, model)).equals(read_scores(tmp_path / "out"))
    (corpus_dir / "part-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match="part-00002"):
        list(iter_scores(corpus_dir, model))


# --- parts ---


@pytest.mark.parametrize("frames", [1, 10, 64, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_batches_hold_every_row_once_and_about_the_frames_wanted(frames, seed):
    lengths = np.random.default_rng(seed).integers(0, 30, 200)
    batches = plan_batches(lengths, frames)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    for batch in batches:
        longest = max(1, lengths[batch].max())
        assert (len(batch) - 1) * longest < frames or len(batch) == 1
    assert plan_batches(lengths[:0], frames) == []


def test_windows_are_bounded_by_bytes_whatever_the_row_groups(tmp_path):
    generate_corpus(tmp_path / "corpus", utterances=500, input_dims={"text": 10, "audio": 6}, steps=4)
    plan = plan_shards(tmp_path / "corpus")
    row = 4 * 4 * 16
    windows = list(read_windows(plan.corpus, plan.shards[0], window_bytes=60 * (row + 8)))
    assert [table.num_rows for table in windows] == [60] * 8 + [20]


def test_a_window_comes_in_pieces_that_arrow_reuses_and_holds_every_row_once(tmp_path):
    generate_corpus(tmp_path / "corpus", utterances=1000, input_dims={"text": 1500, "audio": 6}, steps=4)
    plan = plan_shards(tmp_path / "corpus")
    first, *_, last = windows = list(read_windows(plan.corpus, plan.shards[0], window_bytes=2**24))
    assert first["text"].num_chunks == 2
    assert max(chunk.nbytes for table in windows for chunk in table["text"].chunks) <= 2**23
    assert sum(table.nbytes for table in windows) > 2**24 > last.nbytes
    ids, features, *_ = features_from_table(pa.concat_tables(windows))
    written = read_parquet(tmp_path / "corpus")
    assert ids.tolist() == written.ids.tolist()
    np.testing.assert_array_equal(features["text"], written.features["text"])


def test_prefetch_passes_items_on_in_order_and_then_the_exception():
    def source():
        yield from range(5)
        raise ValueError("end")

    found = []
    with Prefetch(source(), depth=2) as ahead:
        found.extend(next(ahead) for _ in range(5))
        with pytest.raises(ValueError, match="end"):
            next(ahead)
    assert found == [0, 1, 2, 3, 4]


def test_prefetch_reads_no_further_than_its_depth_and_closes_its_source():
    read, closed = [], []

    def source():
        try:
            for item in range(100):
                read.append(item)
                yield item
        finally:
            closed.append(True)

    with Prefetch(source(), depth=2) as ahead:
        assert next(ahead) == 0
        time.sleep(0.2)
        assert len(read) <= 5
    assert closed == [True]


# --- generated corpora ---


def test_a_generated_corpus_does_not_depend_on_the_shards_before(tmp_path):
    options = {"rows_per_shard": 100, "input_dims": {"text": 5, "audio": 3}, "steps": 4}
    generate_corpus(tmp_path / "a", utterances=250, **options)
    generate_corpus(tmp_path / "b", utterances=250, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    again = _make_shard(100, 100, options["input_dims"], 4, 0)
    table = pq.read_table(tmp_path / "a" / "part-00001.parquet")
    assert table["id"].to_pylist() == again.ids.tolist()
    assert table["text"][3].as_py() == again.features["text"][3].tobytes()
    assert pq.read_table(tmp_path / "a" / "part-00002.parquet").num_rows == 50
    with pytest.raises(CorpusError, match="holds a corpus already"):
        generate_corpus(tmp_path / "a", utterances=250)
    with pytest.raises(ValueError, match="utterances must be a positive int, got 0"):
        generate_corpus(tmp_path / "c", utterances=0)


def test_a_generated_corpus_may_have_labels_and_splits_that_share_no_video(tmp_path):
    options = {"utterances": 3000, "rows_per_shard": 1001, "input_dims": {"text": 40, "audio": 30}, "steps": 4}
    generate_corpus(tmp_path / "plain", **options)
    generate_corpus(tmp_path / "labelled", num_classes=3, **options)
    plain, labelled = read_parquet(tmp_path / "plain"), read_parquet(tmp_path / "labelled")
    assert (plain.target, plain.split) == (None, None)
    for name, values in plain.features.items():
        np.testing.assert_array_equal(labelled.features[name], values)
    assert labelled.classes == ("class_0", "class_1", "class_2")
    np.testing.assert_allclose(np.bincount(labelled.target) / 3000, 1 / 3, atol=0.04)
    shares = [(labelled.split == split).mean() for split in ("train", "valid", "test")]
    np.testing.assert_allclose(shares, (0.8, 0.1, 0.1), atol=0.05)  # of 188 videos
    groups = [set(labelled.subset(split).group) for split in ("train", "valid", "test")]
    assert len(set.union(*groups)) == sum(map(len, groups))
    # The labels can be learned: a linear rule of the mean frame tells them.
    mean = labelled.features["text"].sum(axis=1) / labelled.lengths[:, None]
    weights = np.linalg.lstsq(mean, np.eye(3)[labelled.target], rcond=None)[0]
    assert ((mean @ weights).argmax(axis=1) == labelled.target).mean() > 0.7
    for number in (0, 17):
        with pytest.raises(ValueError, match=f"num_classes must be .*, got {number}"):
            generate_corpus(tmp_path / "c", utterances=1, num_classes=number)
