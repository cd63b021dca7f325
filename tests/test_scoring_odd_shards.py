"""Shards with odd or hostile columns, ids and row groups, and threads that cannot be started."""

import copy
import json
import os
import struct
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import ipc
from scoring_problems import fitted_model, make_corpus, with_column

from m3er_fast.cli import main
from m3er_fast.corpus import CorpusError
from m3er_fast.corpus.parquet import FrameColumn, decode_rows
from m3er_fast.execution.threads import map_in_order, torch_threads
from m3er_fast.scoring import Scorer, iter_scores, score
from m3er_fast.shards.plan import locate, plan_shards
from m3er_fast.shards.prefetch import Prefetch
from m3er_fast.shards.reader import read_groups, read_windows

DIMS = {"text": 6, "audio": 5}
STEPS, ROWS = 4, 30
MIB = 2**20


@pytest.fixture(scope="module")
def model():
    return fitted_model(make_corpus(200, input_dims=DIMS, steps=STEPS))


def make_table(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    columns = {"id": pa.array([f"u{row}" for row in range(rows)])}
    for name, dim in DIMS.items():
        values = pa.array(rng.normal(size=rows * STEPS * dim).astype(np.float32))
        columns[name] = pa.FixedSizeListArray.from_arrays(values, STEPS * dim)
    return pa.table(columns)


def write(table, path):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def with_two_lengths(table):
    lengths = pa.array([1] * len(table), pa.int32())
    return table.append_column("length", lengths).append_column("length", lengths)


def nested(table):
    """The table with each frame in a list of its own, whose type gives the number of features."""
    for name, dim in DIMS.items():
        frames = pa.FixedSizeListArray.from_arrays(table[name].combine_chunks().flatten(), dim)
        table = with_column(table, name, pa.FixedSizeListArray.from_arrays(frames, STEPS))
    return table


def with_features(table, features):
    field = table.schema.field("text").with_metadata({"features": features})
    return table.set_column(table.column_names.index("text"), field, table["text"])


# --- columns ---


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda table: table.append_column("id", table["id"]), "there are 2 columns 'id'"),
        (lambda table: table.append_column("text", table["text"]), "there are 2 columns 'text'"),
        (with_two_lengths, "there are 2 columns 'length'"),
        (
            lambda table: with_features(table, "7"),
            "column 'text' has 7 features per frame, but the model (input_dims) takes 6",
        ),
    ],
    ids=["two ids", "two texts", "two lengths", "other features"],
)
def test_a_shard_of_odd_columns_is_quarantined_and_the_others_are_scored(spoil, reason, suffix, model, tmp_path):
    for shard, table in enumerate((make_table(), spoil(make_table()), make_table())):
        write(table, tmp_path / "corpus" / f"{shard}.{suffix}")
    summary = score(tmp_path / "corpus", model, tmp_path / "out")
    assert [entry.shard for entry in summary.quarantined] == [f"1.{suffix}"]
    assert reason in summary.quarantined[0].reason
    assert summary.rows == 2 * ROWS


def test_a_feature_count_of_thousands_of_digits_is_none(model, tmp_path):
    write(with_features(make_table(), "9" * 5000), tmp_path / "corpus" / "0.parquet")
    assert score(tmp_path / "corpus", model, tmp_path / "out").rows == ROWS


def test_two_columns_of_groups_are_an_error():
    table = make_table().append_column("group", pa.nulls(ROWS, pa.string())).append_column("group", pa.nulls(ROWS))
    with pytest.raises(CorpusError, match="there are 2 columns 'group'"):
        list(groups_of(table))


def groups_of(table):
    from pyarrow import fs

    memory = fs._MockFileSystem()
    with memory.open_output_stream("0.parquet") as file:
        pq.write_table(table, file)
    plan = plan_shards((memory, "0.parquet"))
    return read_groups(plan.corpus, plan.shards[0])


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_frames_in_fixed_lists_of_fixed_lists_are_those_of_flat_ones(suffix, model, tmp_path):
    table = make_table()
    for name, written in (("flat", table), ("nested", nested(table)), ("empty", nested(table).slice(0, 0))):
        write(written, tmp_path / name / f"0.{suffix}")
    [wanted], [found] = (list(iter_scores(tmp_path / name, model)) for name in ("flat", "nested"))
    assert found.equals(wanted)
    assert score(tmp_path / "empty", model, tmp_path / "out").quarantined == ()


@pytest.mark.parametrize(
    "kind", [pa.null(), pa.list_(pa.null()), pa.list_(pa.list_(pa.null())), pa.list_(pa.float32())], ids=str
)
def test_a_column_of_nulls_is_an_unavailable_modality_whatever_its_type(kind, model, tmp_path):
    table = make_table()
    write(with_column(table, "audio", pa.nulls(ROWS, kind)), tmp_path / "nulls" / "0.parquet")
    write(table.drop_columns("audio"), tmp_path / "without" / "0.parquet")
    [found], [wanted] = (list(iter_scores(tmp_path / name, model)) for name in ("nulls", "without"))
    assert found.equals(wanted)
    assert not any(found["effective_audio"].to_pylist())


def test_a_length_beyond_int64_is_not_reported_as_negative():
    lengths = pa.array([2**63 + 1] + [1] * (ROWS - 1), pa.uint64())
    rows = decode_rows(make_table().append_column("length", lengths), DIMS)
    assert set(rows.problems) == {0}
    assert "-" not in rows.problems[0]
    assert "but its length is 9223372036854775807" in rows.problems[0]


# --- ids ---


def with_ids_of_a_dictionary(table, length):
    ids = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(table), np.int32)), pa.array(["x" * length]))
    return with_column(table, "id", ids)


@pytest.mark.parametrize(("suffix", "length"), [("parquet", 60_000), ("arrow", 60_000), ("arrow", 200_000)])
def test_one_long_id_that_is_repeated_is_refused_before_it_is_unpacked(suffix, length, tmp_path):
    path = tmp_path / "corpus" / f"0.{suffix}"
    write(with_ids_of_a_dictionary(make_table(2000), length), path)
    assert path.stat().st_size < MIB
    plan = plan_shards(tmp_path / "corpus")
    before = pa.total_allocated_bytes()
    with pytest.raises(CorpusError, match=r"column 'id' (would unpack to|holds a string of)"):
        list(read_windows(plan.corpus, plan.shards[0]))
    assert pa.total_allocated_bytes() - before < MIB


def test_ids_of_a_dictionary_are_ordinary(model, tmp_path):
    table = make_table()
    write(table, tmp_path / "plain" / "0.arrow")
    write(with_column(table, "id", table["id"].dictionary_encode()), tmp_path / "coded" / "0.arrow")
    [wanted], [found] = (list(iter_scores(tmp_path / name, model)) for name in ("plain", "coded"))
    assert found.equals(wanted)


def test_an_ipc_file_of_which_only_the_dictionary_is_compressed_is_quarantined(model, tmp_path):
    path = tmp_path / "corpus" / "0.arrow"
    path.parent.mkdir()
    table = with_ids_of_a_dictionary(make_table(), 5 * MIB)
    with ipc.new_file(path, table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table)
    path.write_bytes(without_compression_of_batches(path.read_bytes()))
    allocated = pa.total_allocated_bytes()
    summary = score(tmp_path / "corpus", model, tmp_path / "out")
    assert "compressed Arrow IPC" in summary.quarantined[0].reason
    assert pa.total_allocated_bytes() - allocated < MIB


def without_compression_of_batches(content):
    """Return an IPC file whose record batches, but not its dictionaries, claim to be uncompressed."""
    raw, position, changed = bytearray(content), 8, 0

    def field(table, number):
        vtable = table - struct.unpack_from("<i", raw, table)[0]
        held = 4 + 2 * number < struct.unpack_from("<H", raw, vtable)[0]
        return vtable + 4 + 2 * number if held else None

    while size := struct.unpack_from("<i", raw, position + 4)[0]:
        start = position + 8
        message = start + struct.unpack_from("<I", raw, start)[0]
        kind, header, body = (
            message + struct.unpack_from("<H", raw, entry)[0] if (entry := field(message, number)) else None
            for number in (1, 2, 3)
        )
        if raw[kind] == 3:  # a batch of records
            batch = header + struct.unpack_from("<I", raw, header)[0]
            struct.pack_into("<H", raw, field(batch, 3), 0)
            changed += 1
        position = start + size + (struct.unpack_from("<q", raw, body)[0] if body else 0)
    assert changed == 1
    return bytes(raw)


# --- row groups, files and folders ---


def test_an_utterance_of_too_many_frames_says_so(model, tmp_path):
    frames = [[0.1] * 6 * (2**16 + 1 if row == 3 else 2) for row in range(8)]
    text = pa.array(frames, pa.list_(pa.float32()))
    table = pa.table({"id": [str(row) for row in range(8)], "text": text})
    write(with_features(table, "6"), tmp_path / "corpus" / "0.parquet")
    summary = score(tmp_path / "corpus", model, tmp_path / "out")
    assert (summary.rows, summary.errors) == (8, 1)
    error = pq.read_table(tmp_path / "out" / "0.parquet")["error"].to_pylist()
    assert [bool(said) for said in error] == [row == 3 for row in range(8)]
    assert "65537 frames, more than 65536" in error[3]


@pytest.mark.parametrize("wide", ["frames", "id"])
def test_rows_too_wide_to_be_utterances_are_quarantined(wide, model, tmp_path):
    table = make_table(2)
    if wide == "frames":
        frames = pa.array([bytes(16 * MIB + 8)] * 2, pa.binary(16 * MIB + 8))
        field = pa.field("text", frames.type, metadata={"features": "6"})
        table = pa.table([table["id"], frames], schema=pa.schema([table.schema.field("id"), field]))
    else:
        table = with_column(table, "id", pa.array(["x" * (64 * 2**10 + 1), "y"]))
    write(table, tmp_path / "corpus" / "0.parquet")
    [entry] = score(tmp_path / "corpus", model, tmp_path / "out").quarantined
    assert ("more than the 16777216" if wide == "frames" else "more than the 65536 allowed") in entry.reason


def test_windows_are_bounded_where_long_rows_stand_together(tmp_path):
    lengths = np.repeat([1, 400], [40_000, 300])
    offsets = np.concatenate([[0], np.cumsum(lengths * 6)]).astype(np.int32)
    values = pa.array(np.random.default_rng(0).normal(size=offsets[-1]).astype(np.float32))
    ids = pa.array(np.arange(len(lengths)).astype(str))
    table = pa.table({"id": ids, "text": pa.ListArray.from_arrays(pa.array(offsets), values)})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=40_000, use_dictionary=False, compression="none")
    plan = plan_shards(tmp_path)
    windows = list(read_windows(plan.corpus, plan.shards[0], window_bytes=MIB))
    assert max(window["text"].nbytes for window in windows) < 2 * MIB
    assert pa.concat_tables(windows)["text"].combine_chunks().equals(table["text"].combine_chunks())


def test_a_relative_path_is_that_of_the_folder_where_the_run_began(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert locate("corpus").path == str(tmp_path / "corpus")


@pytest.mark.skipif(os.name == "nt", reason="names there are Unicode")
def test_a_file_name_that_is_no_utf_8_is_named(model, tmp_path):
    write(make_table(), tmp_path / "corpus" / "0.parquet")
    try:
        (tmp_path / "corpus" / os.fsdecode(b"\xff.parquet")).touch()
    except OSError:
        pytest.skip("this filesystem takes no such name")
    with pytest.raises(CorpusError, match=r"corpus: holds a file whose name is not UTF-8: .*xff"):
        score(tmp_path / "corpus", model, tmp_path / "out")


# --- memory and threads ---


def test_a_batch_that_cannot_be_staged_is_halved_until_it_can(model, monkeypatch):
    scorer = Scorer(model)
    table, seen = make_table(), []
    wanted = scorer.score(table)
    padded = FrameColumn.padded

    def full(column, rows, steps, out):
        seen.append(len(rows))
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.60 GiB")
        return padded(column, rows, steps, out)

    monkeypatch.setattr(FrameColumn, "padded", full)
    found = scorer.score(table)
    assert min(seen) <= 4 < max(seen)
    # Sums over a batch round with its size.
    rounded = [field.name for field in wanted.schema if pa.types.is_floating(field.type)]
    assert found.drop_columns(rounded).equals(wanted.drop_columns(rounded))
    for name in rounded:
        np.testing.assert_allclose(found[name].to_numpy(), wanted[name].to_numpy(), atol=1e-6)


def test_a_row_that_cannot_be_staged_says_so_and_the_others_have_their_scores(model, monkeypatch):
    scorer = Scorer(model)
    padded = FrameColumn.padded

    def full(column, rows, steps, out):
        if 7 in rows:
            raise MemoryError("no memory for it")
        return padded(column, rows, steps, out)

    monkeypatch.setattr(FrameColumn, "padded", full)
    scores = scorer.score(make_table())
    assert scores["error"].to_pylist() == [None] * 7 + ["MemoryError: no memory for it"] + [None] * (ROWS - 8)
    assert scores["prediction"].null_count == 1


def test_what_else_is_raised_while_a_batch_is_staged_ends_the_run(model, monkeypatch):
    scorer = Scorer(model)

    def broken(*_, **__):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(FrameColumn, "padded", broken)
    with pytest.raises(RuntimeError, match="the device is lost"):
        scorer.score(make_table())


def test_a_device_that_scoring_does_not_know_is_refused(model):
    with pytest.raises(ValueError, match="scoring runs on cpu and cuda, got a model on meta"):
        Scorer(copy.deepcopy(model).to("meta"))


def test_where_a_scorers_thread_cannot_be_started_the_others_write_no_more(model, tmp_path, monkeypatch):
    for shard in range(60):
        write(make_table(), tmp_path / "corpus" / f"{shard:02}.parquet")
    start, started = threading.Thread.start, []

    def fail(thread):
        if thread.name == "m3er-score":
            if started:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        score(tmp_path / "corpus", model, tmp_path / "out", devices=["cpu", "cpu"])
    assert not started[0].is_alive()
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_an_interrupt_while_a_prefetch_starts_ends_its_thread(monkeypatch):
    start, threads = threading.Thread.start, []

    def interrupted(thread):
        start(thread)
        threads.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Prefetch(iter(int, 1))
    threads[0].join(timeout=10)
    assert not threads[0].is_alive()


def test_threads_that_ask_for_the_first_time_take_no_number_that_is_changed_for_a_moment():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = []

        def work():
            found.append(torch_threads())
            list(map_in_order(lambda item, _: item, range(2), 2))

        for _ in range(100):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert set(found) == {3}
    finally:
        torch.set_num_threads(before)


def test_many_bad_shards_are_listed_in_order_and_often_enough(model, tmp_path, monkeypatch):
    for shard in range(40):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{shard:02}.parquet").write_bytes(b"PAR1")
    write(make_table(), tmp_path / "corpus" / "99.parquet")
    from m3er_fast.scoring.output import OutputFolder

    written, plain = [], OutputFolder.quarantine
    monkeypatch.setattr(
        OutputFolder, "quarantine", lambda folder, entries: written.append(len(entries)) or plain(folder, entries)
    )
    summary = score(tmp_path / "corpus", model, tmp_path / "out")
    assert [entry.shard for entry in summary.quarantined] == [f"{shard:02}.parquet" for shard in range(40)]
    assert written[0] == 1  # at once: a run may be long
    assert written[-1] == 40
    assert len(written) < 20


def test_an_interrupted_run_leaves_the_whole_list_of_bad_shards(model, tmp_path):
    (tmp_path / "corpus").mkdir()
    for shard in range(5):
        (tmp_path / "corpus" / f"{shard}.parquet").write_bytes(b"PAR1")
    write(make_table(), tmp_path / "corpus" / "5.parquet")

    def interrupt(progress):
        if progress.rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "corpus", model, tmp_path / "out", progress=interrupt)
    listed = json.loads((tmp_path / "out" / "_quarantine.json").read_text())
    assert [entry["shard"] for entry in listed] == [f"{shard}.parquet" for shard in range(5)]
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_empty_utterances_that_cannot_be_staged_count_as_one_frame_each(model, monkeypatch):
    scorer = Scorer(model, batch_frames=64)
    table = make_table().append_column("length", pa.array([0] * ROWS, pa.int32()))
    padded = FrameColumn.padded

    def full(column, rows, steps, out):
        if len(rows) > 16:
            raise MemoryError
        return padded(column, rows, steps, out)

    monkeypatch.setattr(FrameColumn, "padded", full)
    assert scorer.score(table)["error"].null_count == ROWS
    assert scorer.batch_frames == ROWS // 2


@pytest.mark.parametrize("name", ["text", "split"])
def test_a_shard_of_two_columns_is_left_out_of_statistics(name, tmp_path, capsys):
    table = nested(make_table(400)).append_column("split", pa.array(["train"] * 400))
    write(table, tmp_path / "corpus" / "0.parquet")
    write(table.append_column(name, table[name]), tmp_path / "corpus" / "1.parquet")
    assert main(["fit-stats", str(tmp_path / "corpus"), "--out", str(tmp_path / "stats")]) == 3
    assert "1.parquet was left out" in capsys.readouterr().err
