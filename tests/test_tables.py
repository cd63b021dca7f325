"""Tables as pandas, polars and Hugging Face datasets write them, with these packages; see docs/tables.md."""

import numpy as np
import pytest
from scoring_problems import fitted_model, make_corpus

from m3er_fast.corpus import read_parquet
from m3er_fast.scoring import iter_scores

DIMS = {"text": 6, "audio": 5}
CORPUS = make_corpus(60, input_dims=DIMS)
FRAMES = {name: values.tolist() for name, values in CORPUS.features.items()}
NAMES = ["Joy", "sad", None, " joy"] * 15
TARGET = [0, 1, -100, 0] * 15


@pytest.fixture(scope="module")
def model():
    return fitted_model(CORPUS)


def of_pandas(path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"id": range(60), **FRAMES, "label": NAMES}).to_parquet(path)


def of_pandas_with_categories(path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": range(60), **FRAMES, "label": NAMES}).convert_dtypes()
    frame["label"] = frame["label"].str.strip().str.lower().astype("category")
    frame.to_parquet(path, compression="zstd")


def of_polars(path):
    polars = pytest.importorskip("polars")
    polars.DataFrame({"id": range(60), **FRAMES, "label": NAMES}).write_parquet(path)


def of_polars_with_arrays(path):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"id": range(60), **FRAMES, "label": NAMES})
    kinds = [polars.col(name).cast(polars.Array(polars.Float32, (4, dim))) for name, dim in DIMS.items()]
    label = polars.col("label").str.strip_chars().str.to_lowercase().cast(polars.Enum(["sad", "joy"]))
    frame.with_columns(*kinds, label).write_parquet(path)


def of_datasets(path):
    datasets = pytest.importorskip("datasets")
    kinds = {name: datasets.Array2D((4, dim), "float32") for name, dim in DIMS.items()}
    features = datasets.Features({"id": datasets.Value("int64"), **kinds, "label": datasets.Value("string")})
    data = {"id": range(60), **FRAMES, "label": NAMES}
    datasets.Dataset.from_dict(data, features=features).to_parquet(str(path))


WRITERS = (of_pandas, of_pandas_with_categories, of_polars, of_polars_with_arrays, of_datasets)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_tables_are_read_and_scored_as_the_corpus_that_they_hold(write, model, tmp_path):
    write(tmp_path / "table.parquet")
    found = read_parquet(tmp_path / "table.parquet")
    assert found.ids.tolist() == [str(row) for row in range(60)]
    assert (found.classes, found.target.tolist()) == (("joy", "sad"), TARGET)
    for name, values in CORPUS.features.items():
        np.testing.assert_array_equal(found.features[name], values)
    (scores,) = iter_scores(tmp_path, model)
    assert scores["error"].null_count == 60
    assert scores["id"].to_pylist() == found.ids.tolist()


def test_arrow_files_of_polars_are_scored_as_its_parquet_files(model, tmp_path):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"id": [f"u{row}" for row in range(60)], **FRAMES, "label": NAMES})
    for name in ("arrow", "parquet"):
        (tmp_path / name).mkdir()
    frame.write_ipc(tmp_path / "arrow" / "table.arrow")
    frame.write_parquet(tmp_path / "parquet" / "table.parquet")
    (found,), (wanted,) = (list(iter_scores(tmp_path / name, model)) for name in ("arrow", "parquet"))
    assert found.equals(wanted)


def test_a_table_of_pandas_without_rows_is_a_shard_without_rows(model, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": range(60), **FRAMES, "label": NAMES})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.iloc[:0].to_parquet(tmp_path / "b.parquet")
    pandas.DataFrame(columns=frame.columns, dtype=float).to_parquet(tmp_path / "c.parquet")
    assert len(read_parquet(tmp_path)) == 60
    assert sum(len(table) for table in iter_scores(tmp_path, model)) == 60


def test_lists_of_class_labels_are_answers(tmp_path):
    datasets = pytest.importorskip("datasets")
    label = datasets.Sequence(datasets.ClassLabel(names=["joy", "Anger", "fear"]))
    features = datasets.Features({"text": datasets.Sequence(datasets.Value("float32")), "label": label})
    data = {"text": [[1.0, 2.0]] * 3, "label": [[2, 0], [], None]}
    datasets.Dataset.from_dict(data, features=features).to_parquet(str(tmp_path / "table.parquet"))
    corpus = read_parquet(tmp_path / "table.parquet")
    assert (corpus.task, corpus.classes) == ("multi", ("joy", "Anger", "fear"))
    np.testing.assert_array_equal(corpus.target, [[1, 0, 1], [0, 0, 0], [np.nan] * 3])
