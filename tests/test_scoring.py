import copy
import dataclasses
import errno
import gc
import hashlib
import json
import signal
import subprocess
import sys
import traceback

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpus_fixtures import real_data
from score_folder import SUMMARY, contents
from scoring_problems import DIMS, edit_shard, fitted_model, make_corpus, probabilities, read_scores, with_column
from sklearn.exceptions import NotFittedError

from m3er_fast import M3ERConfig, M3ERFusion, ModalityCheck, __version__
from m3er_fast.config import LossConfig, TrainingConfig
from m3er_fast.corpus import CorpusError, convert, read_table, write_parquet
from m3er_fast.metrics import classification_report
from m3er_fast.scoring import OutputMismatchError, Scorer, load_model, model_signature, score
from m3er_fast.shards.plan import locate
from m3er_fast.training import evaluate, train

SHARD_ROWS = 64


@pytest.fixture(scope="module")
def corpora():
    """One to fit to and one to score, of 200 utterances each."""
    both = make_corpus(400, missing=0.1)
    both.available[205] = False
    return both.select(slice(0, 200)), both.select(slice(200, 400))


@pytest.fixture(scope="module")
def training(corpora):
    return corpora[0]


@pytest.fixture(scope="module")
def corpus(corpora):
    return corpora[1]


@pytest.fixture(scope="module")
def model(training):
    return fitted_model(training)


@pytest.fixture(scope="module")
def corpus_dir(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(corpus, folder, rows_per_shard=SHARD_ROWS)
    return folder


@pytest.fixture
def own_corpus_dir(corpus, tmp_path):
    """A copy that a test may damage."""
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=SHARD_ROWS)
    return tmp_path / "corpus"


def matrix(table, prefix, names):
    return np.stack([table[f"{prefix}_{name}"].to_numpy() for name in names], axis=1)


# --- what is written ---


def test_scores_equal_the_model_in_every_column(corpus, model, tmp_path):
    write_parquet(corpus, tmp_path / "corpus")
    score(tmp_path / "corpus", model, tmp_path / "out")
    table = read_scores(tmp_path / "out")
    arguments = corpus.features, corpus.lengths, corpus.available
    expected = model.predict_proba(*arguments).numpy()
    with torch.no_grad():
        output = model(*arguments)
    # Batched by length, the model rounds otherwise than on all rows at once.
    np.testing.assert_allclose(probabilities(table, corpus), expected, rtol=0, atol=1e-6)
    assert table["prediction"].to_pylist() == [corpus.classes[c] for c in expected.argmax(axis=1)]
    np.testing.assert_array_equal(matrix(table, "effective", DIMS), output.effective.numpy())
    np.testing.assert_allclose(matrix(table, "p_value", DIMS), output.p_value.numpy(), rtol=0, atol=1e-6)
    expected_reasons = [[ModalityCheck.reasons[n] if n else None for n in row] for row in output.reason.tolist()]
    assert [list(row) for row in zip(*(table[f"reason_{name}"].to_pylist() for name in DIMS), strict=True)] == (
        expected_reasons
    )
    assert table["error"].null_count == len(corpus)
    np.testing.assert_array_equal(table["abstained"].to_numpy(), output.abstained.numpy())
    assert output.abstained.any()
    assert not output.abstained.all()
    assert not output.effective.all()


def test_columns_and_metadata_are_those_documented(model, corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path)
    schema = pq.read_schema(tmp_path / "part-00000.parquet")
    assert schema.names == [
        "id",
        "prediction",
        *("p_angry", "p_happy", "p_neutral"),
        *("effective_text", "effective_audio", "effective_face"),
        *("p_value_text", "p_value_audio", "p_value_face"),
        *("reason_text", "reason_audio", "reason_face"),
        "abstained",
        "label",
        "error",
    ]
    numbers, verdicts, texts = [pa.float32()] * 3, [pa.bool_()] * 3, [pa.string()] * 3
    assert schema.types == [*texts[:2], *numbers, *verdicts, *numbers, *texts, pa.bool_(), pa.string(), pa.string()]
    assert schema.metadata[b"m3er_fast.signature"].decode() == model_signature(model)
    assert schema.metadata[b"m3er_fast.version"].decode() == __version__
    assert json.loads(schema.metadata[b"m3er_fast.columns"]) == {
        "classes": ["angry", "happy", "neutral"],
        "modalities": ["text", "audio", "face"],
    }
    assert schema.metadata[b"m3er_fast.task"] == b"single"
    assert json.loads(schema.metadata[b"m3er_fast.calibration"]) == {"activation": "softmax", "temperature": 1.0}


def test_ids_order_and_shard_names_are_those_of_the_corpus(corpus, model, corpus_dir, tmp_path):
    summary = score(corpus_dir, model, tmp_path)
    names = [f"part-{shard:05d}.parquet" for shard in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_SUCCESS", "_manifest.json", *sorted(SUMMARY), *names]
    assert read_scores(tmp_path)["id"].to_pylist() == corpus.ids.tolist()
    assert (summary.rows, summary.shards, summary.resumed, summary.quarantined) == (200, 4, 0, ())


def test_manifest_names_version_model_and_input_shards(model, corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path)
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    assert manifest["signature"] == model_signature(model)
    assert manifest["version"] == __version__
    assert manifest["settings"] == {
        "batch_frames": Scorer(model).batch_frames,
        "dtype": "float32",
        "checksum": "sampled",
    }
    found = [(shard["name"], shard["bytes"]) for shard in manifest["shards"]]
    assert found == [(path.name, path.stat().st_size) for path in sorted(corpus_dir.iterdir())]
    assert len({shard["checksum"] for shard in manifest["shards"]}) == 4


@pytest.mark.parametrize("batch_frames", [1, 7, 64])
def test_batches_change_probabilities_by_rounding_only(batch_frames, corpus, model, corpus_dir, tmp_path):
    table = read_table(corpus_dir / "part-00000.parquet")
    whole = Scorer(model).score(table)
    parts = Scorer(model, batch_frames=batch_frames).score(table)
    np.testing.assert_allclose(probabilities(parts, corpus), probabilities(whole, corpus), rtol=0, atol=1e-6)
    others = [name for name in whole.column_names if not name.startswith("p_")]
    assert parts.select(others).equals(whole.select(others))


def test_progress_counts_shards_and_rows(model, corpus_dir, tmp_path):
    steps = []
    score(corpus_dir, model, tmp_path, progress=steps.append)
    finished = {step.done: step.rows for step in steps}  # the last step of each number
    assert finished[4] == 200
    assert [step.rows for step in steps] == sorted(step.rows for step in steps)
    assert {step.shards for step in steps} == {4}
    assert steps[-1].seconds_left == 0
    assert steps[-1].rate > 0


# --- what is read ---


def test_labels_splits_and_groups_are_not_needed(corpus, model, corpus_dir, own_corpus_dir, tmp_path):
    for path in own_corpus_dir.iterdir():
        edit_shard(path, lambda table: table.drop_columns(["label", "split", "group"]).replace_schema_metadata(None))
    score(own_corpus_dir, model, tmp_path / "out")
    score(corpus_dir, model, tmp_path / "labelled")
    labelled = read_scores(tmp_path / "labelled")
    assert labelled["label"].to_pylist() == [corpus.classes[label] for label in corpus.target]
    assert read_scores(tmp_path / "out").equals(labelled.drop_columns(["label"]))


def test_shards_may_differ_in_their_number_of_frames(corpus, model, tmp_path):
    short = dataclasses.replace(
        corpus,
        features={name: x[:, :3].copy() for name, x in corpus.features.items()},
        lengths=corpus.lengths.clip(max=3),
    )
    write_parquet(corpus.select(slice(0, 50)), tmp_path / "a")
    write_parquet(short.select(slice(50, 200)), tmp_path / "b")
    (tmp_path / "b" / "part-00000.parquet").rename(tmp_path / "a" / "part-00001.parquet")
    score(tmp_path / "a", model, tmp_path / "out")
    found = probabilities(read_scores(tmp_path / "out"), corpus)
    for whole, rows in ((corpus, slice(0, 50)), (short, slice(50, 200))):
        part = whole.select(rows)
        expected = model.predict_proba(part.features, part.lengths, part.available).numpy()
        np.testing.assert_allclose(found[rows], expected, rtol=0, atol=1e-6)  # of other batches


def test_a_modality_without_a_column_is_unavailable(corpus, model, own_corpus_dir, tmp_path):
    for path in own_corpus_dir.iterdir():
        edit_shard(path, lambda table: table.drop_columns(["face"]))
    score(own_corpus_dir, model, tmp_path / "out")
    table = read_scores(tmp_path / "out")
    features = {name: corpus.features[name] for name in ("text", "audio")}
    expected = model.predict_proba(features, corpus.lengths, corpus.available & [True, True, False])
    np.testing.assert_allclose(probabilities(table, corpus), expected, rtol=0, atol=1e-6)
    assert not table["effective_face"].to_numpy().any()
    assert not table["p_value_face"].to_numpy().any()
    assert table["reason_face"].null_count == len(corpus)


def test_what_was_rejected_has_a_reason_and_nothing_else_has(corpus, training, tmp_path):
    features = {name: x.copy() for name, x in corpus.features.items()}
    features["audio"][::2] *= 100
    write_parquet(dataclasses.replace(corpus, features=features), tmp_path / "corpus")
    score(tmp_path / "corpus", fitted_model(training), tmp_path / "out")
    table = read_scores(tmp_path / "out")
    for m, name in enumerate(DIMS):
        rejected = ~table[f"effective_{name}"].to_numpy() & corpus.available[:, m]
        np.testing.assert_array_equal(table[f"reason_{name}"].is_valid().to_numpy(), rejected)
    audio = [reason for reason in table["reason_audio"].to_pylist()[::2] if reason]
    assert len(audio) > 50
    assert set(audio) <= {"too loud", "noisy"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_storm_of_bad_values_gives_finite_scores(value, corpus, model, tmp_path):
    stormy = dataclasses.replace(corpus, features={name: x * 0 + value for name, x in corpus.features.items()})
    write_parquet(stormy, tmp_path / "corpus")
    score(tmp_path / "corpus", model, tmp_path / "out")
    found = probabilities(read_scores(tmp_path / "out"), corpus)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_rows_without_any_modality_abstain(corpus, model, tmp_path):
    empty = dataclasses.replace(corpus, available=np.zeros_like(corpus.available))
    write_parquet(empty, tmp_path / "corpus")
    score(tmp_path / "corpus", model, tmp_path / "out")
    table = read_scores(tmp_path / "out")
    assert table["abstained"].to_numpy().all()
    assert np.isfinite(probabilities(table, corpus)).all()


def test_an_empty_shard_gives_an_empty_shard_of_the_same_columns(corpus, model, tmp_path):
    write_parquet(corpus.select(slice(0, 0)), tmp_path / "corpus")
    summary = score(tmp_path / "corpus", model, tmp_path / "out")
    assert (summary.rows, summary.shards) == (0, 1)
    assert read_scores(tmp_path / "out").schema.equals(Scorer(model).schema_with("single"))
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_single_file_is_a_corpus(model, corpus_dir, tmp_path):
    assert score(corpus_dir / "part-00003.parquet", model, tmp_path).rows == 8


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_no_corpus_is_one_error_naming_the_path(name, model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=name):
        score(tmp_path / name, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sigmoid_probabilities_are_independent_answers(corpus, training, corpus_dir, tmp_path):
    model = fitted_model(training, M3ERConfig(loss=LossConfig(activation="sigmoid")))
    score(corpus_dir, model, tmp_path)
    found = probabilities(read_scores(tmp_path), corpus)
    expected = model.predict_proba(corpus.features, corpus.lengths, corpus.available)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert (abs(found.sum(axis=1) - 1) > 0.1).any()


def test_a_model_without_a_check_needs_no_fit(corpus, corpus_dir, tmp_path):
    model = M3ERFusion(DIMS, 3, M3ERConfig(check=None, proxy=None), classes=corpus.classes)
    score(corpus_dir, model, tmp_path)
    np.testing.assert_array_equal(matrix(read_scores(tmp_path), "effective", DIMS), corpus.available)


# --- a model that does not fit ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "dask"}, "engine must be one of 'local', 'ray', got 'dask'"),
        ({"workers": 2}, "address and workers are for engine 'ray', got None and 2"),
        ({"address": "auto"}, "address and workers are for engine 'ray', got 'auto' and None"),
        ({"devices": []}, r"devices must be a list of one or more, such as \['cpu'\], or None, got \[\]"),
        ({"devices": "cpu"}, r"devices must be a list of one or more, such as \['cpu'\], or None, got 'cpu'"),
        ({"checksum": "none"}, "checksum must be one of 'sampled', 'full', got 'none'"),
        ({"dtype": "float16"}, "dtype must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"batch_frames": 0}, "batch_frames must be a positive int or 'auto', got 0"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(arguments, message, model, corpus_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        score(corpus_dir, model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_unknown_modalities_are_refused_by_name_before_anything_is_written(training, corpus_dir, tmp_path):
    part = dataclasses.replace(
        training, features={n: training.features[n] for n in ("text", "audio")}, available=training.available[:, :2]
    )
    with pytest.raises(CorpusError, match=r"\['face'\].*\['text', 'audio'\]"):
        score(corpus_dir, fitted_model(part), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_feature_count_in_all_shards_is_refused_before_anything_is_written(corpus_dir, tmp_path):
    other = make_corpus(200, input_dims={**DIMS, "audio": 7})
    with pytest.raises(CorpusError, match=r"'audio' has 5 features per frame, but the model .* takes 7"):
        score(corpus_dir, fitted_model(other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfitted_model_is_refused_before_anything_is_written(corpus_dir, tmp_path):
    with pytest.raises(NotFittedError, match="not fitted"):
        score(corpus_dir, M3ERFusion(DIMS, 3), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch_frames", [0, -1, 2.0, True, "many"])
def test_batch_frames_must_be_a_positive_int_or_auto(batch_frames, model):
    with pytest.raises(ValueError, match="batch_frames must be a positive int or 'auto'"):
        Scorer(model, batch_frames=batch_frames)


@pytest.mark.parametrize(("dtype", "message"), [("float16", "must be one of 'float32', "), ("bfloat16", "is for CUDA")])
def test_only_dtypes_that_are_fast_here_are_taken(dtype, message, model):
    with pytest.raises(ValueError, match=message):
        Scorer(model, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_scores_on_cuda_are_those_of_the_cpu_to_rounding(dtype, tolerance, corpus, model, corpus_dir):
    table = read_table(corpus_dir / "part-00000.parquet")
    expected = Scorer(model).score(table)
    found = Scorer(copy.deepcopy(model).to("cuda"), dtype=dtype).score(table)
    assert found.schema.names == expected.schema.names
    np.testing.assert_allclose(probabilities(found, corpus), probabilities(expected, corpus), rtol=0, atol=tolerance)


def test_a_class_named_like_a_p_value_column_is_refused(training):
    renamed = dataclasses.replace(training, classes=("a", "value_text", "c"))
    with pytest.raises(ValueError, match="value_text"):
        Scorer(fitted_model(renamed))


def test_scoring_leaves_the_mode_of_the_model_alone_and_does_not_depend_on_it(training, corpus_dir):
    table, model = read_table(corpus_dir / "part-00000.parquet"), fitted_model(training)
    expected = Scorer(model).score(table)
    assert Scorer(model.train()).score(table).equals(expected)
    assert model.training
    assert model.network.training


# --- resuming ---


class Killed(BaseException):
    pass


def kill_after(shards):
    def progress(step):
        if step.done == shards:
            raise Killed

    return progress


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_interrupted_and_resumed_gives_the_bytes_of_an_uninterrupted_run(shards, model, corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path / "whole")
    with pytest.raises(Killed):
        score(corpus_dir, model, tmp_path / "out", progress=kill_after(shards))
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    summary = score(corpus_dir, model, tmp_path / "out", resume=True)
    assert (summary.resumed, summary.rows) == (shards, 200)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_outright_and_resumed_gives_the_same_bytes(model, corpus_dir, tmp_path):
    model.save_pretrained(tmp_path / "model")
    program = (
        "import os, sys; from m3er_fast.scoring import load_model, score; corpus, model, out = sys.argv[1:];"
        "score(corpus, load_model(model), out, progress=lambda step: step.done == 2 and os.kill(os.getpid(), 9))"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, corpus_dir, tmp_path / "model", tmp_path / "out"], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 2
    assert score(corpus_dir, load_model(tmp_path / "model"), tmp_path / "out", resume=True).resumed == 2
    score(corpus_dir, model, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_only_missing_shards_are_scored_again(model, corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path)
    before = contents(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    (tmp_path / "part-00001.parquet").unlink()
    (tmp_path / "_SUCCESS").unlink()
    summary = score(corpus_dir, model, tmp_path, resume=True)
    assert summary.resumed == 3
    assert contents(tmp_path) == before
    unchanged = [path.name for path in tmp_path.glob("*.parquet") if times[path.name] == path.stat().st_mtime_ns]
    assert sorted(unchanged) == ["part-00000.parquet", "part-00002.parquet", "part-00003.parquet"]


def test_scores_that_are_not_whole_are_made_again(model, corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path)
    before = contents(tmp_path)
    (tmp_path / "part-00001.parquet").write_bytes(before["part-00001.parquet"][:-20])
    (tmp_path / "part-00002.parquet.partial").write_bytes(b"what a killed run left")
    assert score(corpus_dir, model, tmp_path, resume=True).resumed == 3
    assert contents(tmp_path) == before


@pytest.mark.parametrize("exists", [True, False])
def test_resuming_in_an_empty_or_missing_folder_just_starts(exists, model, corpus_dir, tmp_path):
    if exists:
        (tmp_path / "out").mkdir()
    summary = score(corpus_dir, model, tmp_path / "out", resume=True)
    assert (summary.resumed, summary.rows) == (0, 200)


def test_without_resume_a_folder_that_holds_anything_is_refused_untouched(model, corpus_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        score(corpus_dir, model, tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_file_as_output_is_refused(model, corpus_dir, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        score(corpus_dir, model, tmp_path / "out")


def test_a_changed_model_is_refused_on_resume(training, model, corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OutputMismatchError, match="another model"):
        score(corpus_dir, fitted_model(training, seed=1), tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_scores_without_a_column_are_those_of_another_version_and_refused_on_resume(model, corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path)
    for path in tmp_path.glob("*.parquet"):
        edit_shard(path, lambda table: table.drop_columns(["reason_text"]))
    with pytest.raises(OutputMismatchError, match=r"another version of m3er-fast: .* no column 'reason_text'; name "):
        score(corpus_dir, model, tmp_path, resume=True)


def test_another_corpus_is_refused_on_resume(model, corpus_dir, own_corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path / "out")
    (own_corpus_dir / "part-00003.parquet").unlink()
    with pytest.raises(OutputMismatchError, match="another corpus"):
        score(own_corpus_dir, model, tmp_path / "out", resume=True)


def test_a_byte_that_changes_amid_a_shard_is_refused_on_resume_with_full_checksums(model, tmp_path):
    made = make_corpus(2000)
    [path] = write_parquet(made, tmp_path / "corpus")
    chunk = pq.read_metadata(path).row_group(0).column(1)
    assert path.stat().st_size > 3 * 2**16
    kinds = ("sampled", "full")
    for kind in kinds:
        score(tmp_path / "corpus", model, tmp_path / kind, checksum=kind)
    sums = [json.loads((tmp_path / kind / "_manifest.json").read_text())["shards"][0]["checksum"] for kind in kinds]
    raw = bytearray(path.read_bytes())
    assert sums[1] == hashlib.blake2b(str(len(raw)).encode() + raw, digest_size=16).hexdigest() != sums[0]
    raw[len(raw) // 2] ^= 1
    assert chunk.data_page_offset < len(raw) // 2
    path.write_bytes(raw)
    assert score(tmp_path / "corpus", model, tmp_path / "sampled", resume=True).resumed == 1  # it cannot tell
    with pytest.raises(OutputMismatchError, match=r"part-00000\.parquet has changed since"):
        score(tmp_path / "corpus", model, tmp_path / "full", resume=True, checksum="full")
    with pytest.raises(OutputMismatchError, match=r"another setting.*'full'.*'sampled'"):
        score(tmp_path / "corpus", model, tmp_path / "full", resume=True)
    with pytest.raises(ValueError, match="checksum must be one of 'sampled', 'full', got 'md5'"):
        score(tmp_path / "corpus", model, tmp_path / "other", checksum="md5")


def test_a_folder_with_the_names_of_earlier_versions_is_resumed(model, corpus_dir, tmp_path):
    out = tmp_path / "out"
    score(corpus_dir, model, out)
    wanted = contents(out)
    for name in ("_manifest.json", *SUMMARY):
        (out / name).rename(out / name.removeprefix("_"))
    (out / "_SUCCESS").unlink()
    (out / "part-00001.parquet").unlink()
    assert score(corpus_dir, model, out, resume=True).resumed == len(list(corpus_dir.iterdir())) - 1
    assert contents(out) == wanted
    (out / "_manifest.json").rename(out / "manifest.json")
    (out / "manifest.json").write_bytes(b"{")
    with pytest.raises(OutputMismatchError, match=r"/manifest\.json is not a manifest"):
        score(corpus_dir, model, out, resume=True)


def test_a_folder_of_scores_is_one_data_set(model, corpus_dir, tmp_path):
    score(corpus_dir, model, tmp_path / "out")
    assert pq.read_table(tmp_path / "out").equals(read_scores(tmp_path / "out"))
    assert all(path.name.startswith("_") or path.suffix == ".parquet" for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("manifest", [None, b"{", b"[]", b'{"signature": 1}', b"\xff\xfe"])
def test_a_folder_that_no_run_made_is_refused_on_resume(manifest, model, corpus_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "_manifest.json").write_bytes(manifest)
    with pytest.raises(OutputMismatchError, match=str(tmp_path)):
        score(corpus_dir, model, tmp_path, resume=True)


# --- bad shards, full disks ---


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def ids_of_fractions(table):
    return with_column(table, "id", pa.array([0.5] * len(table)))


def null_id(table):
    return with_column(table, "id", pa.array([None, *table["id"].to_pylist()[1:]], pa.string()))


def id_that_is_no_text(table):
    raw = pa.array([b"\xff\xfe", *(name.encode() for name in table["id"].to_pylist()[1:])], pa.binary())
    return with_column(table, "id", pa.Array.from_buffers(pa.string(), len(raw), raw.buffers()))


def other_feature_count(table):
    values = pa.array([[0.0] * 7] * len(table), pa.list_(pa.float32(), 7))
    return with_column(table, "audio", values)


def text_for_frames(table):
    return with_column(table, "audio", pa.array(["loud"] * len(table)))


def frames_beyond_the_end(table):
    return with_column(table, "length", pa.array([99] * len(table), pa.int32()))


def unknown_modality(table):
    return table.append_column("smell", table["face"])


DAMAGE = {
    "truncated": truncate,
    "empty file": lambda path: path.write_bytes(b""),
    "not Parquet": lambda path: path.write_bytes(b"PAR1" + b"\0" * 5000),
    **{
        edit.__name__: lambda path, edit=edit: edit_shard(path, edit)
        for edit in (
            ids_of_fractions,
            other_feature_count,
            text_for_frames,
            unknown_modality,
        )
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("shard", [0, 2])
def test_a_bad_shard_is_quarantined_with_its_reason_and_the_others_are_scored(
    damage, shard, corpus, model, own_corpus_dir, tmp_path
):
    bad = own_corpus_dir / f"part-{shard:05d}.parquet"
    DAMAGE[damage](bad)
    summary = score(own_corpus_dir, model, tmp_path / "out")
    assert [entry.shard for entry in summary.quarantined] == [bad.name]
    listed = json.loads((tmp_path / "out" / "_quarantine.json").read_text())
    assert listed == [{"shard": bad.name, "reason": summary.quarantined[0].reason}]
    assert listed[0]["reason"]
    assert "\n" not in listed[0]["reason"]
    expected = np.delete(corpus.ids, slice(SHARD_ROWS * shard, SHARD_ROWS * (shard + 1)))
    assert read_scores(tmp_path / "out")["id"].to_pylist() == expected.tolist()
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_corpus_of_unreadable_shards_is_quarantined_whole(model, own_corpus_dir, tmp_path):
    for path in own_corpus_dir.iterdir():
        truncate(path)
    assert len(score(own_corpus_dir, model, tmp_path / "out").quarantined) == 4


def test_a_repaired_shard_leaves_quarantine_on_resume(model, corpus_dir, own_corpus_dir, tmp_path):
    bad = own_corpus_dir / "part-00001.parquet"
    good = bad.read_bytes()
    bad.write_bytes(bytes(len(good)))
    assert score(own_corpus_dir, model, tmp_path / "out").quarantined
    bad.write_bytes(good)
    summary = score(own_corpus_dir, model, tmp_path / "out", resume=True)
    assert (summary.resumed, summary.quarantined) == (3, ())
    score(corpus_dir, model, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("edit", [null_id, id_that_is_no_text, frames_beyond_the_end])
def test_a_bad_row_says_why_and_the_other_rows_have_their_scores(edit, corpus, model, own_corpus_dir, tmp_path):
    path = own_corpus_dir / "part-00002.parquet"
    score(path, model, tmp_path / "clean")
    rows = slice(0, SHARD_ROWS if edit is frames_beyond_the_end else 1)
    edit_shard(path, edit)
    summary = score(own_corpus_dir, model, tmp_path / "out")
    bad = rows.stop
    assert (summary.errors, summary.rows, summary.quarantined) == (bad, 200, ())
    table, clean = (pq.read_table(tmp_path / name / path.name) for name in ("out", "clean"))
    assert table["error"].null_count == SHARD_ROWS - bad
    assert table["error"][0].as_py().startswith("column ")
    for name in table.column_names[1:-1]:
        assert table[name].slice(0, bad).null_count == bad
        assert table[name].slice(bad).null_count == clean[name].slice(bad).null_count
        assert name.startswith("reason_") or table[name].null_count == bad
    others = table.slice(bad)
    assert others["id"].equals(clean["id"].slice(bad))
    np.testing.assert_allclose(probabilities(others, corpus), probabilities(clean, corpus)[bad:], rtol=0, atol=1e-6)
    assert score(own_corpus_dir, model, tmp_path / "out", resume=True).errors == bad


def test_a_full_disk_stops_with_finished_shards_intact_and_nothing_half_written(
    model, corpus_dir, tmp_path, monkeypatch
):
    write, calls = pq.ParquetWriter.write_table, []

    def fill_up(writer, table, *arguments, **options):
        calls.append(table)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, table, *arguments, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fill_up)
    with pytest.raises(OSError, match="No space"):
        score(corpus_dir, model, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["_manifest.json", "part-00000.parquet", "part-00001.parquet"]
    monkeypatch.undo()
    assert score(corpus_dir, model, tmp_path / "out", resume=True).resumed == 2
    score(corpus_dir, model, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("step", ["write_table", "close"])
def test_an_interrupt_of_a_writer_leaves_nothing_half_written_and_no_error_behind(
    model, corpus_dir, tmp_path, monkeypatch, step
):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(pq.ParquetWriter, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            score(corpus_dir, model, tmp_path / "out")
    gc.collect()
    assert not unraisable
    assert sorted(contents(tmp_path / "out")) == ["_manifest.json"]


# --- models ---


def test_signature_survives_saving_and_does_not_depend_on_mode(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert model_signature(loaded) == model_signature(model) == model_signature(loaded.train())


def change_weight(model):
    with torch.no_grad():
        next(model.network.parameters()).view(-1)[0] += 1e-6


def change_buffer(model):
    model.modality_check.learned("energy_scores").view(-1)[0] += 1e-6


def change_config(model):
    model.config = model.config.replace(check_in_training=True)


def change_classes(model):
    model.classes = model.classes[::-1]


def change_order(model):
    model.input_dims = dict(reversed(model.input_dims.items()))


@pytest.mark.parametrize("change", [change_weight, change_buffer, change_config, change_classes, change_order])
def test_signature_changes_with_everything_that_scores_depend_on(change, training):
    model = fitted_model(training)
    before = model_signature(model)
    change(model)
    assert model_signature(model) != before


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff" * 200])
def test_an_unreadable_model_is_one_error_naming_the_folder(file, content, model, tmp_path):
    model.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path} holds no model"):
        load_model(tmp_path)


def test_a_missing_model_folder_is_never_looked_up_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M3ERFusion, "from_pretrained", lambda *a, **k: pytest.fail("looked up elsewhere"))
    with pytest.raises(ValueError, match="someone/model: no such folder"):
        load_model("someone/model")


def test_importing_the_package_and_scoring_loads_no_optional_dependency():
    # Where pandas is installed scikit-learn imports it, and it imports pyarrow.
    program = (
        "import sys; sys.modules['pandas'] = None;"
        "import m3er_fast, m3er_fast.scoring, m3er_fast.cli, m3er_fast.training;"
        "sys.exit(str([n for n in ('pyarrow', 'typer', 'rich', 'h5py', 'matplotlib', 'faiss') if n in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == "[]"


# --- real data ---


@pytest.mark.parametrize(
    ("name", "kind", "resplit"),
    [("mosi_utterance", "utterance-csv", False), ("youtube_sequences", "mfn-h5", True)],
    ids=["mosi", "youtube"],
)
def test_scores_of_real_data_have_the_metrics_of_evaluation_in_training(name, kind, resplit, tmp_path):
    if kind == "mfn-h5":
        pytest.importorskip("h5py")
    corpus = convert(real_data(name), kind, tmp_path / "whole", resplit=resplit)
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=50)
    config = M3ERConfig(training=TrainingConfig(epochs=2))
    expected = evaluate(train(corpus, config, out=tmp_path / "run").model, corpus.subset("test")).report
    score(tmp_path / "corpus", load_model(tmp_path / "run"), tmp_path / "out")
    table = read_scores(tmp_path / "out")
    assert table["id"].to_pylist() == corpus.ids.tolist()
    test = corpus.split == "test"
    report = classification_report(probabilities(table, corpus)[test], corpus.target[test], corpus.classes)
    assert report.overall == expected.overall
    assert report.per_class == expected.per_class
    np.testing.assert_array_equal(report.confusion, expected.confusion)


@pytest.mark.parametrize(
    "uri",
    ["s3://key:sec/ret@bucket/x", "s3://key:secret@buc ket/x", "s4://key:secret@bucket/x", "hdfs://u:secret@h:x/y"],
)
def test_a_uri_that_cannot_be_used_is_told_without_its_keys(uri):
    with pytest.raises(ValueError, match=r"no filesystem for this URI: .*@") as found:
        locate(uri)
    text = "".join(traceback.format_exception(found.value))
    assert not any(word in text for word in ("secret", "sec/ret", "key:"))
