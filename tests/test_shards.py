"""Shards as other programs write them: the same statistics and scores as from this project's own layout."""

import resource
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc
from scoring_problems import DIMS, edit_shard, fitted_model, make_corpus, read_scores, with_column

from m3er_fast.corpus import CorpusError, features_from_table, read_parquet, write_parquet
from m3er_fast.scoring import fit_statistics, iter_scores, score
from m3er_fast.shards.plan import plan_shards
from m3er_fast.shards.reader import read_groups, read_windows

CORPUS = make_corpus(200, steps=4)


@pytest.fixture(scope="module")
def model():
    return fitted_model(CORPUS)


@pytest.fixture
def folder(tmp_path):
    write_parquet(CORPUS, tmp_path / "corpus", rows_per_shard=64)
    return tmp_path / "corpus"


def scores(folder, model):
    return pa.concat_tables(list(iter_scores(folder, model, batch_frames=10**4)))


def equal_scores(found, wanted):
    return found.drop_columns(["id"]).equals(wanted.drop_columns(["id"]))


def not_utf_8(rows, bad):
    """A column of strings, of which one is not UTF-8."""
    text = pa.array([b"tr\xe4in" if row == bad else b"train" for row in range(rows)], pa.binary())
    return pa.Array.from_buffers(pa.string(), rows, text.buffers())


# --- splits ---


@pytest.mark.parametrize("name", ["training", "TRAIN", " Train"])
def test_the_training_split_under_any_of_its_names_gives_the_same_statistics(folder, name):
    wanted = fit_statistics(folder)
    for path in folder.iterdir():
        edit_shard(
            path,
            lambda table: with_column(
                table,
                "split",
                pa.array(
                    [{"train": name, "valid": "DEV", "test": "eval"}[split] for split in table["split"].to_pylist()]
                ),
            ),
        )
    found = fit_statistics(folder)
    assert found.rows == wanted.rows == int((CORPUS.split == "train").sum())
    assert found.digest == wanted.digest
    assert read_parquet(folder).split.tolist() == CORPUS.split.tolist()


@pytest.mark.parametrize("value", ["holdout", None, ""])
def test_a_shard_with_another_split_is_left_out_and_named(folder, value):
    first = sorted(folder.iterdir())[0]
    edit_shard(first, lambda table: with_column(table, "split", pa.array([value] + ["train"] * (len(table) - 1))))
    (left_out,) = fit_statistics(folder).quarantined
    assert left_out.shard == first.name
    assert ("is null in row 0" if value is None else f"column 'split': {value!r} is not a split") in left_out.reason
    with pytest.raises(CorpusError, match=r"part-00000\.parquet: column 'split'"):
        read_parquet(folder)


# --- text that is not UTF-8 ---


def test_a_split_that_is_not_utf_8_costs_its_shard_and_names_the_row(folder):
    edit_shard(folder / "part-00001.parquet", lambda table: with_column(table, "split", not_utf_8(len(table), 7)))
    (left_out,) = fit_statistics(folder).quarantined
    assert left_out.reason.startswith("part-00001.parquet: column 'split' in row 7 is not UTF-8")


def test_a_group_that_is_not_utf_8_is_one_error_with_the_shard_and_the_column(folder):
    edit_shard(folder / "part-00001.parquet", lambda table: with_column(table, "group", not_utf_8(len(table), 7)))
    plan = plan_shards(folder)
    with pytest.raises(CorpusError, match=r"^part-00001\.parquet: column 'group' is not readable: UnicodeDecodeError"):
        list(read_groups(plan.corpus, plan.shards[1]))
    assert fit_statistics(folder).quarantined == ()  # it needs no groups


def test_a_column_name_that_is_not_utf_8_costs_its_shard(folder, model, tmp_path):
    path = folder / "part-00001.parquet"
    edit_shard(path, lambda table: table.append_column("namename", pa.nulls(len(table))))
    path.write_bytes(path.read_bytes().replace(b"namename", b"n\xe4mename"))
    (left_out,) = fit_statistics(folder).quarantined
    assert left_out.shard == path.name
    summary = score(folder, model, tmp_path / "out")
    assert [entry.shard for entry in summary.quarantined] == [path.name]
    assert summary.rows == 200 - 64


# --- layouts ---


def as_lists(table, kind):
    """The table with nested lists of float64, as pandas and pyarrow infer them."""
    corpus = CORPUS.select(np.isin(CORPUS.ids, table["id"].to_pylist()))
    for name, value in corpus.features.items():
        table = with_column(table, name, pa.array(value.tolist(), pa.list_(pa.list_(kind))))
    return table


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()], ids=str)
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_lists_in_a_dictionary_are_scored_as_any_others(folder, model, kind, compression):
    wanted = scores(folder, model)
    for path in folder.iterdir():
        pq.write_table(as_lists(pq.read_table(path), kind), path, compression=compression)
        chunk = pq.read_metadata(path).row_group(0).column(1)
        assert any("DICTIONARY" in encoding for encoding in chunk.encodings)
    assert scores(folder, model).equals(wanted)


def test_decimals_are_numbers():
    table = pa.table({"text": pa.array([[Decimal("1.25"), Decimal("-3")], None])})
    np.testing.assert_array_equal(features_from_table(table).features["text"][:, 0], [[1.25, -3], [0, 0]])


def test_a_dictionary_of_float64_takes_more_bytes_than_its_values_and_is_no_bomb(tmp_path):
    x = np.random.default_rng(0).standard_normal((20, 20, 300))
    pq.write_table(pa.table({"id": [str(row) for row in range(20)], "text": x.tolist()}), tmp_path / "x.parquet")
    chunk = pq.read_metadata(tmp_path / "x.parquet").row_group(0).column(1)
    assert chunk.total_uncompressed_size > 1.1 * x.nbytes  # each value once, and its number in the dictionary
    plan = plan_shards(tmp_path)
    (table,) = read_windows(plan.corpus, plan.shards[0])
    assert table["text"].to_pylist() == x.tolist()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.string_view(), pa.large_string(), None], ids=str)
def test_ids_of_any_plain_type_and_row_numbers_where_there_are_none(tmp_path, folder, model, kind, suffix):
    wanted = scores(folder, model)
    table = pa.concat_tables([pq.read_table(path) for path in sorted(folder.iterdir())])
    numbers = pa.array(range(200)).cast(pa.string())
    table = table.drop_columns("id") if kind is None else with_column(table, "id", numbers.cast(kind))
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / f"data.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=50)
    else:
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=50)
    found = scores(tmp_path / "other", model)
    assert equal_scores(found.drop_columns(["error"]), wanted.drop_columns(["error"]))
    prefix = "data:" if kind is None else ""
    assert found["id"].to_pylist() == [f"{prefix}{row}" for row in range(200)]
    plan = plan_shards(tmp_path / "other")
    windows = list(read_windows(plan.corpus, plan.shards[0], window_bytes=10**4))
    assert len(windows) > 1
    assert pa.concat_tables(windows)["id"].cast(pa.string()).to_pylist() == found["id"].to_pylist()


@pytest.mark.parametrize("kind", [pa.null(), pa.float64(), pa.list_(pa.null())], ids=str)
def test_an_empty_shard_may_have_columns_of_any_type(folder, model, tmp_path, kind):
    wanted, fitted = scores(folder, model), fit_statistics(folder)
    empty = pa.table({name: pa.array([], kind) for name in ("id", *DIMS, "split") if name not in ("id", "split")})
    empty = empty.add_column(0, "id", pa.array([], pa.null())).append_column("split", pa.array([], pa.null()))
    pq.write_table(empty, folder / "part-empty.parquet")
    assert scores(folder, model).equals(wanted)
    found = fit_statistics(folder)
    assert (found.digest, found.quarantined) == (fitted.digest, ())
    assert len(read_parquet(folder)) == 200


def test_columns_that_are_no_features_are_left_alone(folder, model):
    wanted = scores(folder, model)
    for path in folder.iterdir():
        edit_shard(
            path,
            lambda table: table.append_column("tags", pa.array([["a", "b"]] * len(table))).append_column(
                "about", pa.array([{"a": [1.0]}] * len(table))
            ),
        )
    assert scores(folder, model).equals(wanted)
    assert fit_statistics(folder).quarantined == ()


# --- folders ---


def test_hidden_files_beside_the_shards_are_not_read(folder, model):
    wanted = scores(folder, model)
    for name in ("._part-00000.parquet", "_metadata.parquet", ".part-00000.arrow", "_x=1"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert [shard.name for shard in plan_shards(folder).shards] == [f"part-{number:05d}.parquet" for number in range(4)]
    assert scores(folder, model).equals(wanted)


def test_folders_of_hive_are_scored_and_give_splits_and_groups(tmp_path, folder, model):
    table = pa.concat_tables([pq.read_table(path) for path in sorted(folder.iterdir())])
    hive = tmp_path / "hive"
    for split in ("train", "valid", "test"):
        part = table.filter(pa.array(np.array(table["split"].to_pylist()) == split))
        (hive / f"split={split}" / "group=g%3D1").mkdir(parents=True)
        part = part.drop_columns(["split", "group"])
        pq.write_table(part, hive / f"split={split}" / "group=g%3D1" / "data.parquet")
    found = read_parquet(hive)
    assert dict(zip(found.ids, found.split, strict=True)) == dict(zip(CORPUS.ids, CORPUS.split, strict=True))
    assert set(found.group) == {"g=1"}
    assert fit_statistics(hive).rows == int((CORPUS.split == "train").sum())
    summary = score(hive, model, tmp_path / "out")
    assert (summary.rows, summary.quarantined) == (200, ())
    names = [f"split={split}-group=g%3D1-data.parquet" for split in ("test", "train", "valid")]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == names
    by_id = {row["id"]: row for row in read_scores(tmp_path / "out").to_pylist()}
    assert {row["id"]: row["prediction"] for row in scores(folder, model).to_pylist()} == {
        name: row["prediction"] for name, row in by_id.items()
    }
    plan = plan_shards(hive)
    ((groups, numbers),) = read_groups(plan.corpus, plan.shards[0])
    assert groups == ["g=1"]
    assert not numbers.any()


# --- bounds ---


def varint(number):
    """A number as Thrift's compact protocol writes it, zigzag included."""
    number, out = number << 1, b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def test_a_page_header_that_lies_takes_no_more_memory_than_the_file(tmp_path):
    ids = pa.array([f"utterance-{row}-" + "x" * 100 for row in range(20)])
    frames = pa.array(np.ones((20, 2, 3)).tolist(), pa.list_(pa.list_(pa.float32())))
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": ids, "text": frames}), path, use_dictionary=False, compression="none")
    content, chunk = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0).column(0)
    pages = sum(4 + len(value) for value in ids.to_pylist()) + 6  # values with lengths, and levels
    length = chunk.total_compressed_size - pages  # of the header, which holds statistics that can be cut

    def header(padding):
        sizes = b"\x15\x00" + (b"\x15" + varint(2**31 - 1)) * 2  # a data page that unpacks, and is stored, in 2 GiB
        statistics = b"\x1c\x18" + bytes([padding & 127 | 128, padding >> 7]) + b"y" * padding
        return sizes + b"\x2c" + b"".join(b"\x15" + varint(n) for n in (20, 0, 3, 3)) + statistics + b"\0\0\0"

    lie = header(length - len(header(128)) + 128)
    assert len(lie) == length
    content[chunk.data_page_offset : chunk.data_page_offset + length] = lie
    path.write_bytes(content)
    plan = plan_shards(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorpusError, match="not readable: Unexpected end of stream: Page was smaller"):
        list(read_windows(plan.corpus, plan.shards[0]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10
