"""The Parquet corpus: a written corpus is read back, and so are the layouts of other programs."""

import itertools
import json

import numpy as np
import pytest
from corpus_fixtures import assert_same, make_corpus, real_data

from m3er_fast.corpus import (
    FORMATS,
    CorpusError,
    Format,
    concatenate,
    convert,
    describe_formats,
    features_from_table,
    read,
    read_parquet,
    read_table,
    shard_paths,
    split_by_group,
    write_parquet,
)
from m3er_fast.corpus.parquet import decode_rows

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write_table(path, columns, metadata=None):
    """Write one file; columns: name -> array or (array, field metadata)."""
    fields, arrays = [], []
    for name, value in columns.items():
        array, about = value if isinstance(value, tuple) else (value, None)
        fields.append(pa.field(name, array.type, metadata=about))
        arrays.append(array)
    pq.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=metadata)), path)
    return path


TARGETS = {
    "single": {},
    "unlabelled rows": {"target": np.array([0, -100, 1, -100, 1, 0, 0])},
    "multi": {"target": np.eye(2, dtype=np.float32)[[0, 1, 1, 0, 0, 1, 0]], "task": "multi"},
    "distribution": {"target": np.full((7, 2), 0.5, np.float32), "task": "distribution"},
    "unlabelled rows of answers": {
        "target": np.where(np.arange(7)[:, None] % 3 == 0, np.nan, 1).astype(np.float32).repeat(2, axis=1),
        "task": "multi",
    },
    "no target": {"target": None},
    "no split": {"split": None},
    "no group": {"group": None},
    "odd names": {"classes": ('ä, "b"', "")},
}


@pytest.mark.parametrize("rows_per_shard", [1, 3, 100])
@pytest.mark.parametrize("changes", TARGETS.values(), ids=TARGETS)
def test_a_written_corpus_is_read_back(tmp_path, changes, rows_per_shard):
    corpus = make_corpus(rows=7, **changes)
    paths = write_parquet(corpus, tmp_path / "c", rows_per_shard=rows_per_shard)
    assert [path.name for path in paths] == [f"part-{shard:05d}.parquet" for shard in range(-(-7 // rows_per_shard))]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [path.name for path in paths]
    assert_same(read_parquet(tmp_path / "c"), corpus)


def test_unavailable_modalities_are_null_and_non_finite_values_stay(tmp_path):
    corpus = make_corpus(rows=7)
    corpus.available[2, 0] = corpus.available[5, 1] = False
    corpus.features["audio"][0, 0] = [np.nan, -np.inf]
    write_parquet(corpus, tmp_path, rows_per_shard=4)
    restored = read_parquet(tmp_path)
    np.testing.assert_array_equal(restored.available, corpus.available)
    np.testing.assert_array_equal(restored.features["audio"][0, 0], [np.nan, -np.inf])
    assert not restored.features["text"][2].any()
    assert read_table(tmp_path / "part-00000.parquet")["text"].null_count == 1


def test_missing_labels_are_null(tmp_path):
    (path,) = write_parquet(make_corpus(target=np.array([0, -100, 1, 0, 1, 0])), tmp_path)
    assert read_table(path)["label"].to_pylist() == [0, None, 1, 0, 1, 0]


def test_the_layout_is_plain_fixed_size_binary(tmp_path):
    corpus = make_corpus(rows=3, steps=4)
    (path,) = write_parquet(corpus, tmp_path)
    with pq.ParquetFile(path) as file:
        field = file.schema_arrow.field("text")
        assert field.type == pa.binary(4 * 3 * 4)
        assert field.metadata[b"features"] == b"3"
        assert field.metadata[b"frames"] == b"4"
        assert field.metadata[b"dtype"] == b"float32"
        assert file.schema_arrow.field("length").type == pa.int32()
        assert json.loads(file.schema_arrow.metadata[b"m3er_fast.classes"]) == ["sad", "happy"]
        column = file.metadata.row_group(0).column(1)
        assert column.compression == "UNCOMPRESSED"
        assert not column.has_dictionary_page
        assert "PLAIN" in column.encodings
    raw = read_table(path)["text"][1].as_py()
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4").reshape(4, 3), corpus.features["text"][1])


def test_an_empty_corpus_survives(tmp_path):
    empty = make_corpus().select(slice(0, 0))
    write_parquet(empty, tmp_path)
    restored = read_parquet(tmp_path)
    assert len(restored) == 0
    assert restored.input_dims == empty.input_dims
    assert restored.classes == empty.classes


def test_only_some_splits_can_be_read(tmp_path):
    corpus = make_corpus(rows=8)
    write_parquet(corpus, tmp_path, rows_per_shard=3)
    assert_same(read_parquet(tmp_path, splits=["valid", "test"]), corpus.select(corpus.split != "train"))


def test_input_dims_choose_modalities_and_their_order(tmp_path):
    corpus = make_corpus(rows=4)
    write_parquet(corpus, tmp_path)
    restored = read_parquet(tmp_path, input_dims={"face": 5, "audio": 2})
    assert restored.input_dims == {"face": 5, "audio": 2}
    assert restored.available.tolist() == [[False, True]] * 4
    np.testing.assert_array_equal(restored.features["audio"], corpus.features["audio"])


FRAMES = [[[1.0, 2, 3], [4, 5, 6]], [[7.0, 8, 9]], None]  # T = 2 and 1; the third row has none
FLAT = [None if row is None else [x for frame in row for x in frame] for row in FRAMES]
PADDED = [[1.0, 2, 3, 4, 5, 6], [7.0, 8, 9, 0, 0, 0], None]
HALVES = [row and [np.float16(x) for x in row] for row in PADDED]  # older pyarrow takes no other number for them
COUNT = {"features": "3"}


def tensor(rows, shape, kind):
    storage = pa.array(rows, pa.list_(kind, int(np.prod(shape))))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(kind, shape), storage)


def packed(rows, dtype):
    width = 6 * np.dtype(dtype).itemsize
    return pa.array([None if row is None else np.array(row, dtype).tobytes() for row in rows], pa.binary(width))


LAYOUTS = {
    "binary float32": (packed(PADDED, "<f4"), {**COUNT, "dtype": "float32"}),
    "binary float16": (packed(PADDED, "<f2"), {**COUNT, "dtype": "float16"}),
    "binary float64": (packed(PADDED, "<f8"), {**COUNT, "dtype": "float64"}),
    "binary without dtype": (packed(PADDED, "<f4"), COUNT),
    "fixed_size_list": (pa.array(PADDED, pa.list_(pa.float32(), 6)), COUNT),
    "fixed_size_list float16": (
        pa.array(HALVES, pa.list_(pa.float16(), 6)),
        COUNT,
    ),
    "list": (pa.array(FLAT, pa.list_(pa.float32())), COUNT),
    "list float64": (pa.array(FLAT, pa.list_(pa.float64())), COUNT),
    "list int64": (pa.array([r and [int(x) for x in r] for r in FLAT], pa.list_(pa.int64())), COUNT),
    "large_list": (pa.array(FLAT, pa.large_list(pa.float32())), COUNT),
    "list of lists": (pa.array(FRAMES, pa.list_(pa.list_(pa.float32()))), None),
    "list of fixed lists": (pa.array(FRAMES, pa.list_(pa.list_(pa.float32(), 3))), None),
    "tensor": (tensor(PADDED, (2, 3), pa.float32()), None),
    "tensor float64": (tensor(PADDED, (2, 3), pa.float64()), None),
}


def skip_null_of_fixed_size(column):
    storage = getattr(column.type, "storage_type", column.type)
    if pa.types.is_fixed_size_list(storage) and column.null_count and int(pa.__version__.split(".")[0]) < 26:
        pytest.skip("pyarrow before 26 cannot read a fixed-size list that is null")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_frames(tmp_path, layout):
    skip_null_of_fixed_size(layout[0])
    ids = pa.array(["a", "b", "c"])
    path = write_table(tmp_path / "x.parquet", {"id": ids, "m": layout, "length": pa.array([2, 1, 0], pa.int32())})
    for source in (path, tmp_path):
        corpus = read_parquet(source)
        assert corpus.input_dims == {"m": 3}
        assert corpus.lengths.tolist() == [2, 1, 0]
        assert corpus.available.tolist() == [[True], [True], [False]]
        expected = [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
        np.testing.assert_array_equal(corpus.features["m"], np.array(expected, np.float32))
        assert corpus.target is None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_column_of_several_chunks_gives_any_of_its_rows(layout):
    array, metadata = layout
    schema = pa.schema([pa.field("id", pa.string()), pa.field("m", array.type, metadata=metadata)])
    whole = pa.Table.from_arrays([pa.array(["a", "b", "c"]), array], schema=schema)
    table = pa.concat_tables([whole.slice(0, 2), whole.slice(0, 0), whole.slice(1, 2), whole, whole.slice(0, 0)])
    row_of = np.array([0, 1, 1, 2, 0, 1, 2])
    assert table["m"].num_chunks > 3
    column = decode_rows(table, {"m": 3}).columns["m"]
    chosen = ([0, 1, 2, 2, 3, 4, 5, 6], [1, 3, 6], [4, 5], [0, 2])
    expected = np.array([[[1, 2, 3], [4, 5, 6], [0, 0, 0]], [[7, 8, 9], [0, 0, 0], [0, 0, 0]], np.zeros((3, 3))])
    for rows, steps in itertools.product(map(np.array, chosen), (1, 2, 3)):
        np.testing.assert_array_equal(column.padded(rows, steps), expected[row_of[rows], :steps])
    assert column.padded(np.zeros(0, int), 2).shape == (0, 2, 3)
    np.testing.assert_array_equal(column.present, row_of < 2)


def test_features_that_a_model_does_not_take_are_named_with_both_counts(tmp_path):
    write_parquet(make_corpus(), tmp_path)
    with pytest.raises(
        CorpusError, match=r"column 'audio' has 2 features per frame, but the model \(input_dims\) takes 3"
    ):
        read_parquet(tmp_path, input_dims={"face": 5, "audio": 3})


def test_a_flat_column_takes_its_feature_count_from_input_dims(tmp_path):
    path = write_table(tmp_path / "x.parquet", {"id": pa.array(["a", "b", "c"]), "m": LAYOUTS["list"][0]})
    with pytest.raises(CorpusError, match=r"x\.parquet: column 'm' has no feature count .*input_dims must give it"):
        read_parquet(path)
    assert read_parquet(path, input_dims={"m": 3}).lengths.tolist() == [2, 1, 0]
    assert read_parquet(path, input_dims={"m": 1}).lengths.tolist() == [6, 3, 0]


def test_modalities_of_different_layout_share_one_time_axis(tmp_path):
    columns = {
        "id": pa.array(["a", "b", "c"]),
        "transcript": pa.array(["hello", "you", "there"]),
        "m": LAYOUTS["list"],
        "n": (pa.array([[1.0, 2, 3, 4], [5.0, 6, 7, 8], [9.0, 1, 2, 3]], pa.list_(pa.float32(), 4)), {"features": "1"}),
        "length": pa.array([2, 1, 3], pa.int64()),
    }
    corpus = read_parquet(write_table(tmp_path / "x.parquet", columns))
    assert corpus.input_dims == {"m": 3, "n": 1}
    assert corpus.steps == 4
    assert corpus.lengths.tolist() == [2, 1, 3]


def test_null_values_in_a_frame_are_nan(tmp_path):
    rows = pa.array([[1.0, None]], pa.list_(pa.float32()))
    corpus = read_parquet(write_table(tmp_path / "x.parquet", {"id": pa.array(["a"]), "m": (rows, {"features": "2"})}))
    np.testing.assert_array_equal(corpus.features["m"][0, 0], [1, np.nan])


def test_labels_without_metadata_are_named_and_typed(tmp_path):
    frames = (pa.array([[1.0], [2.0]], pa.list_(pa.float32())), {"features": "1"})
    ids = pa.array(["a", "b"])

    def labelled(label, **metadata):
        path = write_table(tmp_path / "x.parquet", {"id": ids, "m": frames, "label": label}, metadata or None)
        return read_parquet(path)

    corpus = labelled(pa.array([2, None], pa.uint8()))
    assert (corpus.task, corpus.classes) == ("single", ("class_0", "class_1", "class_2"))
    assert corpus.target.tolist() == [2, -100]
    assert labelled(pa.array([[0.25, 0.75], [1.0, 0.0]])).task == "distribution"
    assert labelled(pa.array([[1.0, 1.0], [1.0, 0.0]])).task == "multi"
    with pytest.raises(CorpusError, match=r"x\.parquet: target of 'b' is 5, wanted a class in 0..1"):
        labelled(pa.array([0, 5]), **{"m3er_fast.classes": '["x", "y"]'})
    with pytest.raises(CorpusError, match=r"x\.parquet: column 'label' has 1 values for 'b', wanted 2"):
        labelled(pa.array([[0.5, 0.5], [1.0]]))
    with pytest.raises(CorpusError, match=r"x\.parquet: column 'label' holds timestamp"):
        labelled(pa.array([0, 1], pa.timestamp("s")))
    with pytest.raises(CorpusError, match=r"'m3er_fast\.classes' is not a JSON list"):
        labelled(pa.array([0, 0]), **{"m3er_fast.classes": "{"})


FRAMES = (pa.array([[1.0], [2.0], [3.0]], pa.list_(pa.float32())), {"features": "1"})


@pytest.mark.parametrize(
    ("label", "target"),
    [
        (pa.array(["Sad ", "happy", None]), [1, 0, -100]),
        (pa.array(["sad", "HAPPY", "nan"], pa.large_string()), [1, 0, -100]),
        (pa.array(["sad", "happy", " "], pa.string_view()), [1, 0, -100]),
        (pa.array(["sad", "happy", None]).dictionary_encode(), [1, 0, -100]),
        (pa.array([b"sad", b"happy", None]), [1, 0, -100]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_labels_that_are_names_are_the_classes(tmp_path, label, target):
    corpus = read_parquet(write_table(tmp_path / "x.parquet", {"m": FRAMES, "label": label}))
    assert corpus.classes == ("happy", "sad")
    assert corpus.target.tolist() == target


@pytest.mark.parametrize(
    ("label", "target"),
    [
        (pa.array([1.0, 0.0, None]), [1, 0, -100]),
        (pa.array([1.0, 0.0, np.nan], pa.float32()), [1, 0, -100]),
        (pa.array([True, False, None]), [1, 0, -100]),
        (pa.array([1, 0, None], pa.int8()), [1, 0, -100]),
        (pa.nulls(3), None),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_labels_that_are_numbers_with_nulls(tmp_path, label, target):
    corpus = read_parquet(write_table(tmp_path / "x.parquet", {"m": FRAMES, "label": label}))
    assert (None if corpus.target is None else corpus.target.tolist()) == target
    assert corpus.classes == (() if target is None else ("class_0", "class_1"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (pa.array([1.0, 0.5, 0]), "column 'label' is 0.5 for 'x:1', wanted a class"),
        (pa.array([1.0, np.inf, 0]), "column 'label' is inf for 'x:1', wanted a class"),
        (pa.array([0, 2**40, 0]), "column 'label' is 1099511627776 for 'x:1', wanted a class"),
        (pa.array([0, 2**63, 0], pa.uint64()), "not readable"),
        (pa.array([["b"], ["a"], []]), None),
    ],
)
def test_numbers_that_are_no_classes_are_named(tmp_path, label, message):
    with pytest.raises(CorpusError, match=message or "column 'label' holds list") as caught:
        read_parquet(write_table(tmp_path / "x.parquet", {"m": FRAMES, "label": label}))
    assert "x.parquet" in str(caught.value)


@pytest.mark.parametrize("missing", [None, [0.0, None], [np.nan, 1.0]])
@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
def test_a_row_of_answers_that_is_null_or_holds_a_null_has_no_label(tmp_path, missing, kind):
    label = pa.array([[0, 1], missing, [1, 1]], pa.list_(kind))
    corpus = read_parquet(write_table(tmp_path / "x.parquet", {"m": FRAMES, "label": label}))
    np.testing.assert_array_equal(corpus.target, [[0, 1], [np.nan, np.nan], [1, 1]])
    assert corpus.task == "multi"


def test_answers_may_be_integers_or_truth_values(tmp_path):
    for label in (pa.array([[0, 1], [1, 1], [0, 0]]), pa.array([[False, True], [True, True], [False, False]])):
        corpus = read_parquet(write_table(tmp_path / "x.parquet", {"m": FRAMES, "label": label}))
        assert corpus.target.tolist() == [[0, 1], [1, 1], [0, 0]]


def test_shards_with_names_of_some_classes_agree_on_all(tmp_path):
    for file, label in (("a", ["sad", None, "Joy"]), ("b", ["anger"] * 3), ("c", [None] * 3)):
        write_table(tmp_path / f"{file}.parquet", {"m": FRAMES, "label": pa.array(label)})
    corpus = read_parquet(tmp_path)
    assert corpus.classes == ("anger", "joy", "sad")
    assert corpus.target.tolist() == [2, -100, 1, 0, 0, 0, -100, -100, -100]
    assert corpus.ids.tolist() == [f"{file}:{row}" for file in "abc" for row in range(3)]


def test_names_that_the_metadata_do_not_declare_are_refused(tmp_path):
    columns = {"m": FRAMES, "label": pa.array(["Sad", "joy", None])}
    path = write_table(tmp_path / "x.parquet", columns, {"m3er_fast.classes": '["Joy", "Sad"]'})
    assert read_parquet(path).target.tolist() == [1, 0, -100]
    path = write_table(tmp_path / "x.parquet", columns, {"m3er_fast.classes": '["Joy", "Rage"]'})
    with pytest.raises(CorpusError, match="column 'label' is 'sad' for 'x:0', wanted one of Joy, Rage"):
        read_parquet(path)


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.string_view(), pa.large_string(), pa.binary()])
def test_ids_of_any_plain_type_become_strings(tmp_path, kind):
    ids = pa.array([1, 2, 3]).cast(pa.string()).cast(kind)
    assert read_parquet(write_table(tmp_path / "x.parquet", {"id": ids, "m": FRAMES})).ids.tolist() == ["1", "2", "3"]


@pytest.mark.parametrize("column", ["group", "split", "id"])
def test_text_that_is_not_utf_8_is_one_error_with_file_column_and_row(tmp_path, column):
    text = pa.array([b"train", b"tr\xe4in", b"train"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, text.buffers())
    path = write_table(tmp_path / "x.parquet", {"m": FRAMES, column: text})
    with pytest.raises(CorpusError, match=rf"x\.parquet: column '{column}' in row 1 is not UTF-8"):
        read_parquet(path)


def test_a_column_name_that_is_not_utf_8_is_one_error_with_the_file(tmp_path):
    path = write_table(tmp_path / "x.parquet", {"m": FRAMES, "namename": pa.array([1, 2, 3])})
    path.write_bytes(path.read_bytes().replace(b"namename", b"n\xe4mename"[:8]))
    with pytest.raises(CorpusError, match=r"x\.parquet: not readable as Parquet: UnicodeDecodeError: .utf-8."):
        read_parquet(path)


def test_columns_that_are_no_features_are_left_alone(tmp_path):
    extra = {
        "tags": pa.array([["a"], [], None]),
        "struct": pa.array([{"a": [1.0]}] * 3),
        "structs": pa.array([[{"a": 1.0}]] * 3),
        "flags": pa.array([[True], [False], []]),
        "dates": pa.array([[0]] * 3, pa.list_(pa.timestamp("s"))),
        "text": pa.array(["a", "b", "c"]),
    }
    assert read_parquet(write_table(tmp_path / "x.parquet", {"m": FRAMES, **extra})).modalities == ("m",)


def test_flat_lists_of_one_width_without_a_count_are_one_frame_each(tmp_path):
    flat = pa.array([[1.0, 2, 3], None, [4, 5, 6]])
    corpus = read_parquet(write_table(tmp_path / "x.parquet", {"m": flat}))
    assert corpus.input_dims == {"m": 3}
    assert corpus.lengths.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(corpus.features["m"][:, 0], [[1, 2, 3], [0, 0, 0], [4, 5, 6]])
    fixed = pa.array([[1.0, 2], [3, 4], [5, 6]], pa.list_(pa.float64(), 2))
    assert read_parquet(write_table(tmp_path / "x.parquet", {"m": fixed})).features["m"].shape == (3, 1, 2)


@pytest.mark.parametrize("kind", [pa.null(), pa.float64(), pa.list_(pa.null()), pa.string()])
def test_a_shard_without_rows_may_have_columns_of_any_type(tmp_path, kind):
    write_table(tmp_path / "a.parquet", {"m": pa.array([], kind)})
    write_table(tmp_path / "b.parquet", {"m": FRAMES, "label": pa.array(["sad"] * 3)})
    corpus = read_parquet(tmp_path)
    assert corpus.ids.tolist() == ["b:0", "b:1", "b:2"]
    assert len(read_parquet(tmp_path, input_dims={"m": 1})) == 3


def test_hidden_files_beside_the_data_are_not_read(tmp_path):
    paths = write_parquet(make_corpus(), tmp_path)
    for name in ("._part-00000.parquet", "_metadata.parquet", ".part-00000.parquet"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert shard_paths(tmp_path) == paths
    assert_same(read_parquet(tmp_path), make_corpus())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "._part-00000.parquet").write_bytes(b"")
    assert len(write_parquet(make_corpus(), tmp_path / "out")) == 1


def test_folders_of_hive_give_split_group_and_label(tmp_path):
    for row, (split, group, label) in enumerate((("dev", "a%2Fb", "sad"), ("train", "c", "joy"))):
        folder = tmp_path / f"split={split}" / f"group={group}" / f"label={label}"
        folder.mkdir(parents=True)
        write_table(folder / "x.parquet", {"id": pa.array([str(row)]), "m": (FRAMES[0][:1], FRAMES[1])})
    (tmp_path / "other").mkdir()
    write_table(tmp_path / "other" / "y.parquet", {"m": FRAMES})
    (tmp_path / ".split=test").mkdir()
    corpus = read_parquet(tmp_path)
    assert corpus.split.tolist() == ["valid", "train"]
    assert corpus.group.tolist() == ["a/b", "c"]
    assert corpus.classes == ("joy", "sad")
    assert corpus.target.tolist() == [1, 0]


def test_shards_without_class_names_agree_on_the_largest_label(tmp_path):
    frames = (pa.array([[1.0]], pa.list_(pa.float32())), {"features": "1"})
    for name, label in (("a", 0), ("b", 2), ("c", 1)):
        columns = {"id": pa.array([name]), "m": frames, "label": pa.array([label])}
        write_table(tmp_path / f"{name}.parquet", columns)
    corpus = read_parquet(tmp_path)
    assert corpus.classes == ("class_0", "class_1", "class_2")
    assert corpus.target.tolist() == [0, 2, 1]


IDS, LENGTHS = pa.array(["a", "b", "c"]), pa.array([2, 1, 0], pa.int32())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": IDS}, "no column holds frames of any modality; the columns are id"),
        ({"id": pa.array([1.0, 2, 3]), "m": LAYOUTS["list"]}, "column 'id' holds double, wanted string"),
        ({"id": pa.array(["a", None, "c"]), "m": LAYOUTS["list"]}, "column 'id' is null in row 1"),
        ({"id": pa.array(["a", "a", "c"]), "m": LAYOUTS["list"]}, "'a' occurs 2 times"),
        (
            {"id": IDS, "m": (LAYOUTS["list"][0], {"features": "2"})},
            "column 'm': 'b' has 3 values, not a multiple of 2",
        ),
        ({"id": IDS, "m": (LAYOUTS["tensor"][0], {"features": "2"})}, r"conflicting feature counts: \[2, 3\]"),
        ({"id": IDS, "m": (packed(PADDED, "<f4"), {**COUNT, "dtype": "int8"})}, "column 'm' holds 'int8'"),
        (
            {"id": IDS, "m": (pa.array([b"abc"] * 3, pa.binary(3)), COUNT)},
            "column 'm' has 3 bytes per row, not a multiple of 4",
        ),
        (
            {"id": IDS, "m": pa.array([[[1.0]], [[1.0], [1.0, 2.0]], None])},
            r"column 'm': 'b' has frames of \[1, 2\] features",
        ),
        (
            {"id": IDS, "m": (pa.array([["x"], [], []]), COUNT)},
            "column 'm' holds list<.*string.*>, wanted lists of floats",
        ),
        (
            {"id": IDS, "m": LAYOUTS["list"], "length": pa.array([2, 2, 0])},
            "'m': 'b' has 1 frames, but its length is 2",
        ),
        (
            {"id": IDS, "m": LAYOUTS["list"], "length": pa.array([2, 1, 9])},
            "'length' is 9 for 'c', but no row has more",
        ),
        ({"id": IDS, "m": LAYOUTS["list"], "length": pa.array([2, -1, 0])}, "column 'length' is -1 for 'b'"),
        (
            {"id": IDS, "m": LAYOUTS["list"], "length": pa.array([2, None, 0])},
            "column 'length' is null for 'b'",
        ),
        ({"id": IDS, "m": LAYOUTS["list"], "length": pa.array([2.0, 1, 0])}, "column 'length' holds double"),
        (
            {"id": IDS, "m": LAYOUTS["list"], "split": pa.array(["train", "dew", "test"])},
            "column 'split': 'dew' is not a",
        ),
    ],
)
def test_wrong_schemas_give_one_line_that_names_file_and_column(tmp_path, columns, message):
    skip_null_of_fixed_size(columns["m"][0] if isinstance(columns.get("m"), tuple) else pa.array([]))
    path = write_table(tmp_path / "x.parquet", columns)
    with pytest.raises(CorpusError, match=message) as caught:
        read_parquet(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_cannot_be_the_wanted_modality_is_named(tmp_path):
    path = write_table(tmp_path / "x.parquet", {"id": IDS, "m": pa.array(["x", "y", "z"])})
    with pytest.raises(CorpusError, match="column 'm' holds string, wanted fixed-size binary or lists of floats"):
        read_parquet(path, input_dims={"m": 3})
    with pytest.raises(CorpusError, match="no column holds frames of text or audio"):
        read_parquet(path, input_dims={"text": 3, "audio": 2})


@pytest.mark.parametrize("content", [b"", b"PAR1", b"junk" * 100, None])
def test_broken_files_are_named(tmp_path, content):
    (path,) = write_parquet(make_corpus(), tmp_path)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(CorpusError, match=r"part-00000\.parquet: not readable as Parquet") as caught:
        read_parquet(tmp_path)
    assert "\n" not in str(caught.value)


def test_absent_sources_are_named(tmp_path):
    with pytest.raises(CorpusError, match=r"holds no \.parquet file"):
        shard_paths(tmp_path)
    with pytest.raises(CorpusError, match="no such file or folder"):
        shard_paths(tmp_path / "absent")
    with pytest.raises(CorpusError, match="no such file"):
        read_table(tmp_path / "absent.parquet")


def test_a_split_cannot_be_chosen_where_there_are_none(tmp_path):
    write_parquet(make_corpus(split=None), tmp_path)
    with pytest.raises(CorpusError, match="there is no column 'split' to take train from"):
        read_parquet(tmp_path, splits=["train"])
    with pytest.raises(ValueError, match="splits: 'dew' is not a split, wanted train/training"):
        read_parquet(tmp_path, splits=["dew"])


def test_writing_refuses_an_occupied_folder_and_reserved_names(tmp_path):
    write_parquet(make_corpus(), tmp_path / "c")
    with pytest.raises(CorpusError, match="holds a corpus already"):
        write_parquet(make_corpus(), tmp_path / "c")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CorpusError, match="is a file, wanted a folder"):
        write_parquet(make_corpus(), tmp_path / "file")
    with pytest.raises(CorpusError, match="a modality cannot be called 'label'"):
        write_parquet(make_corpus(dims=(("label", 1),)), tmp_path / "d")
    with pytest.raises(ValueError, match="rows_per_shard must be a positive int, got 0"):
        write_parquet(make_corpus(), tmp_path / "d", rows_per_shard=0)


def test_an_interrupted_write_leaves_no_corpus(tmp_path, monkeypatch):
    write, calls = pq.write_table, []

    def write_once(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        write(*arguments, **keywords)

    monkeypatch.setattr(pq, "write_table", write_once)
    with pytest.raises(OSError, match="No space left"):
        write_parquet(make_corpus(rows=6), tmp_path, rows_per_shard=3)
    with pytest.raises(CorpusError, match=r"holds no \.parquet file"):
        read_parquet(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    write_parquet(make_corpus(rows=6), tmp_path, rows_per_shard=3)
    assert_same(read_parquet(tmp_path), make_corpus(rows=6))


def test_features_from_a_table_ignore_labels(tmp_path):
    corpus = make_corpus(rows=5)
    (path,) = write_parquet(corpus, tmp_path)
    table = read_table(path, ["id", "text", "audio", "length", "absent"])
    assert table.column_names == ["id", "text", "audio", "length"]
    ids, features, lengths, available = features_from_table(table.slice(1, 3))
    assert ids.tolist() == ["u1", "u2", "u3"]
    np.testing.assert_array_equal(features["text"], corpus.features["text"][1:4])
    assert features["text"].flags.writeable
    np.testing.assert_array_equal(lengths, corpus.lengths[1:4])
    assert available.all()


def test_convert_splits_a_source_without_splits_by_group(tmp_path, monkeypatch):
    corpus = make_corpus(rows=20, split=None)
    monkeypatch.setitem(FORMATS, "csd", Format(lambda path: corpus, "nothing"))
    assert_same(convert("anywhere", "csd", tmp_path / "c"), split_by_group(corpus))
    assert_same(read_parquet(tmp_path / "c"), split_by_group(corpus))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_described_and_names_a_source_that_it_cannot_read(tmp_path, name):
    if name == "csd":
        pytest.importorskip("h5py")
    assert f"{name} ({FORMATS[name].about})" in describe_formats()
    with pytest.raises(CorpusError, match="absent"):
        read(tmp_path / "absent", name)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"format must be one of mfn-h5, utterance-csv, csd, mmsa-pkl, .*got 'csv'"):
        read("anywhere", "csv")


@pytest.mark.parametrize(("name", "kind"), [("mosi_utterance", "utterance-csv"), ("youtube_sequences", "mfn-h5")])
def test_real_data_survive_conversion(tmp_path, name, kind):
    corpus = convert(real_data(name), kind, tmp_path / "c")
    assert_same(read_parquet(tmp_path / "c"), concatenate([corpus]))
