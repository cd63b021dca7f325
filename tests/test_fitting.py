"""Fitting shard by shard equals fitting at once, for every kind of shards, and after a run that was killed."""

import copy
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpus_fixtures import real_data
from pyarrow import fs, ipc
from scoring_problems import DIMS, edit_shard, make_corpus, with_column

from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.cli import main
from m3er_fast.config import CheckConfig, ProxyConfig, TrainingConfig
from m3er_fast.corpus import CorpusError, convert, read_parquet, write_parquet
from m3er_fast.fitting import fit as fit_module
from m3er_fast.fitting.passes import CountPass, LearnPass, number_groups
from m3er_fast.fitting.training_rows import make_reader
from m3er_fast.scoring import ModelStatistics, fit_statistics
from m3er_fast.shards.plan import plan_shards
from m3er_fast.standardize import Standardizer
from m3er_fast.training import ResumeMismatchError, train

BOUNDED = M3ERConfig(proxy=ProxyConfig(bank="neighbours", max_bank=100))


@pytest.fixture(scope="module")
def corpus():
    """600 utterances, 420 of them for training, with NaN, missing modalities, other scales and missing labels."""
    made = make_corpus(600, missing=0.1)
    rng = np.random.default_rng(0)
    for name, scale in (("text", 100.0), ("audio", 1e-3)):
        made.features[name][:] = scale * (made.features[name] + 7)
        made.features[name][rng.random(made.features[name].shape) < 0.02] = np.nan
    made.features["face"][5:60:9] = np.nan
    made.target[::7] = -100
    made.available[3] = False
    return made


@pytest.fixture
def folder(corpus, tmp_path):
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=64)
    return tmp_path / "corpus"


@pytest.fixture(scope="module")
def fitted(corpus, tmp_path_factory):
    """Statistics of the corpus in ten shards."""
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(corpus, folder, rows_per_shard=64)
    return fit_statistics(folder, BOUNDED)


def fit_at_once(corpus, config):
    part = corpus if corpus.split is None else corpus.subset("train")
    model = M3ERFusion(corpus.input_dims, 3, config)
    return model.fit(part.features, lengths=part.lengths, available=part.available).state_dict()


def assert_close(statistics, state, tolerance=1e-6):
    """Assert that every buffer is equal to rounding, including p-value tables, ranks, bank and counts."""
    assert statistics.state.keys() == {name for name in state if name.split(".")[0] in PARTS}
    for name, value in statistics.state.items():
        assert value.shape == state[name].shape, name
        numbers = value, state[name]
        if "moments" in name:  # the bits of float64 numbers
            numbers = (x.view(torch.float64) for x in numbers)
        torch.testing.assert_close(*numbers, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


PARTS = ("standardizer", "modality_check", "proxy_generator")


# --- the same as at once ---


@pytest.mark.parametrize("rows", [1, 7, 64, 10_000], ids=lambda rows: f"{rows} per shard")
@pytest.mark.parametrize(
    "proxy",
    [ProxyConfig(), ProxyConfig(bank="neighbours"), ProxyConfig(bank="neighbours", max_bank=100)],
    ids=["regression", "neighbours", "fewer neighbours"],
)
def test_shard_by_shard_is_the_fit_of_the_training_split_at_once(rows, proxy, corpus, tmp_path):
    if rows == 1:
        corpus = corpus.select(slice(0, 90))
    config = M3ERConfig(proxy=proxy)
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=rows)
    statistics = fit_statistics(tmp_path / "corpus", config)
    assert_close(statistics, fit_at_once(corpus, config))
    assert statistics.rows == len(corpus.subset("train"))
    assert (statistics.errors, statistics.quarantined) == (0, ())


@pytest.mark.parametrize(
    "config",
    [
        M3ERConfig(check=None, proxy=None),
        M3ERConfig(check=None, proxy=ProxyConfig(bank="neighbours", max_bank=50)),
        M3ERConfig(check=CheckConfig(pooling="mean_std", statistic="correlation"), proxy=None),
        M3ERConfig(proxy=ProxyConfig(bank="neighbours", max_bank=300)),
    ],
    ids=["standardiser", "without check", "without proxies", "larger bank"],
)
def test_settings_decide_what_is_learned(config, corpus, folder):
    assert_close(fit_statistics(folder, config), fit_at_once(corpus, config))


def test_mean_and_scale_are_those_of_numpy_over_the_finite_values_of_valid_frames(corpus, fitted):
    part = corpus.subset("train")
    inside = np.arange(part.steps) < part.lengths[:, None]
    for m, (name, values) in enumerate(part.features.items()):
        frames = values[inside & part.available[:, m, None]].astype(np.float64)
        finite = np.isfinite(frames)
        frames = frames[2 * finite.sum(axis=1) >= frames.shape[1]]
        np.testing.assert_allclose(fitted.state[f"standardizer.mean_{m}"], np.nanmean(frames, axis=0), rtol=1e-6)
        np.testing.assert_allclose(fitted.state[f"standardizer.scale_{m}"], np.nanstd(frames, axis=0), rtol=1e-6)
        assert int(fitted.state["standardizer.count"][m]) == len(frames), name


def test_correlations_and_energies_are_those_of_numpy(tmp_path):
    """ρ of a pair is Pearson's correlation over its canonical components; here without weights and ridge."""
    made = make_corpus(500, steps=3, missing=0.0)
    made = dataclasses.replace(made, split=None)
    write_parquet(made, tmp_path / "corpus", rows_per_shard=33)
    config = M3ERConfig(check=CheckConfig(component_weights=None, ridge=0.0), proxy=None)
    statistics = fit_statistics(tmp_path / "corpus", config)
    model = statistics.apply(M3ERFusion(DIMS, 3, config)).eval()
    with torch.no_grad():
        output = model(made.features, made.lengths, made.available)
    inside = np.arange(made.steps) < made.lengths[:, None]
    vectors = []
    for values in made.features.values():
        frames = values[inside].astype(np.float64)
        z = (values - frames.mean(axis=0)) / frames.std(axis=0)
        vectors.append((z * inside[..., None]).sum(axis=1) / inside.sum(axis=1)[:, None])
    for m, f in enumerate(vectors):
        centred = f - f.mean(axis=0)
        energy = (centred * np.linalg.solve(np.cov(f.T), centred.T).T).mean(axis=1)
        np.testing.assert_allclose(output.energy[:, m], energy, rtol=1e-4)
    for p, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
        (q, r), (s, _) = np.linalg.qr(centre(vectors[i])), np.linalg.qr(centre(vectors[j]))
        left, _, right = np.linalg.svd(q.T @ s, full_matrices=False)
        # The signs of components are free, and ρ depends on them: the largest entry of the left direction is positive.
        directions = np.linalg.solve(r, left)
        signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(left.shape[1])])
        u, v = q @ left * signs, s @ right.T * signs
        rho = [np.corrcoef(a, b)[0, 1] for a, b in zip(u, v, strict=True)]
        np.testing.assert_allclose(output.correlation[:, p], rho, rtol=0, atol=1e-4)


def centre(values):
    return values - values.mean(axis=0)


def test_the_bank_holds_frames_of_the_training_split_in_their_order(corpus, fitted):
    part = corpus.subset("train")
    batch = Standardizer(DIMS).fit(part.features, lengths=part.lengths, available=part.available)(
        part.features, part.lengths, part.available
    )
    paired = batch.frame_valid.sum(dim=2) >= 2
    whole = torch.cat([x[paired] for x in batch.features], dim=1)
    bank = torch.cat([fitted.state[f"proxy_generator.bank_{m}"] for m in range(3)], dim=1)
    assert bank.shape == (100, 15)
    assert (fitted.frames, int(fitted.state["proxy_generator.frames_seen"])) == (len(whole), len(whole))
    distance, position = torch.cdist(bank.double(), whole.double()).min(dim=1)
    assert distance.max() < 1e-4
    assert bool((position.diff() > 0).all())


def test_a_basis_spans_what_that_of_all_at_once_spans(tmp_path):
    """Three latent dimensions with hardly any noise: every basis must have their span, though of other rows."""
    made = make_corpus(400, steps=3, latent_dim=3, missing=0.0)
    rng = np.random.default_rng(1)
    latent = rng.normal(size=(400, 3, 3))
    features = {name: (latent @ rng.normal(size=(3, d))).astype(np.float32) for name, d in DIMS.items()}
    made = dataclasses.replace(made, features=features, split=None)
    write_parquet(made, tmp_path / "corpus", rows_per_shard=37)
    config = M3ERConfig(check=None, proxy=ProxyConfig(bank="basis", ridge=0.0))
    state, once = fit_statistics(tmp_path / "corpus", config).state, fit_at_once(made, config)
    for name in ("map_0_1", "map_2_0", "map_1_2"):
        expected = once[f"proxy_generator.{name}"]
        torch.testing.assert_close(state[f"proxy_generator.{name}"], expected, rtol=0, atol=1e-3)


def test_real_data_by_shards_are_the_fit_at_once(tmp_path):
    corpus = convert(real_data("mosi_utterance"), "utterance-csv", tmp_path / "whole")
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=len(corpus) // 7)
    torch.manual_seed(0)
    part, model = corpus.subset("train"), M3ERFusion(corpus.input_dims, 3, BOUNDED).eval()
    once = copy.deepcopy(model).fit(part.features, lengths=part.lengths, available=part.available)
    by_shards = fit_statistics(tmp_path / "corpus", BOUNDED).apply(model)
    with torch.no_grad():  # collinear features leave the matrices undetermined, but not the results
        found, wanted = (each(corpus.features, corpus.lengths, corpus.available) for each in (by_shards, once))
    for name, value in found._asdict().items():
        torch.testing.assert_close(
            value, getattr(wanted, name), rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not found.effective.all()


# --- parts merge ---


@pytest.mark.parametrize("groups", [1, 3, 10])
def test_how_shards_are_grouped_changes_no_more_than_rounding(groups, folder, fitted, monkeypatch):
    monkeypatch.setattr(fit_module, "MOST_GROUPS", groups)
    assert_close(fit_statistics(folder, BOUNDED), fitted.state)


def test_moments_of_parts_merge_in_any_order_to_rounding(folder):
    plan = plan_shards(folder)
    reader = make_reader(plan, None)
    counted = [CountPass(reader)([shard]) for shard in plan.shards]
    forwards, backwards = Standardizer(DIMS), Standardizer(DIMS)
    for part in counted:
        forwards.merge(part.standardizer)
    for part in reversed(counted):
        backwards.merge(part.standardizer)
    torch.testing.assert_close(forwards.get_extra_state(), backwards.get_extra_state(), rtol=1e-12, atol=1e-9)

    rows, frames = sum(part.rows for part in counted), sum(part.frames for part in counted)
    learn = LearnPass(reader, forwards, CheckConfig(), None, rows, frames)
    parts = [learn(group).check for group in number_groups(counted)]
    orders = [parts, parts[::-1], parts[3:] + parts[:3]]
    merged = []
    for order in orders:
        whole = order[0]
        for part in order[1:]:
            whole = whole.merge(part)
        merged.append(whole)
    for other in merged[1:]:
        assert other.moments.keys() == merged[0].moments.keys()
        for f, moments in other.moments.items():
            first = merged[0].moments[f]
            for mine, theirs in zip((*moments.own, *moments.joint), (*first.own, *first.joint), strict=True):
                assert mine.count == theirs.count
                np.testing.assert_allclose(mine.mean, theirs.mean, rtol=0, atol=1e-12)
                np.testing.assert_allclose(mine.covariance, theirs.covariance, rtol=1e-9, atol=1e-12)


def test_what_the_second_pass_learns_does_not_grow_with_the_corpus(tmp_path):
    sizes = []
    for rows in (5000, 20_000):
        rng = np.random.default_rng(0)
        made = make_corpus(rows, input_dims={"a": 3, "b": 2}, num_classes=2, steps=1, latent_dim=2, missing=0.0)
        made = dataclasses.replace(made, split=None, group=None, ids=rng.permutation(rows).astype(str).astype(object))
        write_parquet(made, tmp_path / str(rows), rows_per_shard=rows // 20)
        plan = plan_shards(tmp_path / str(rows))
        reader = make_reader(plan, None)
        counted = CountPass(reader)(plan.shards)
        proxy = ProxyConfig(bank="neighbours", max_bank=500)
        learn = LearnPass(reader, counted.standardizer, CheckConfig(), proxy, counted.rows, counted.frames)
        [group] = number_groups([counted])
        sizes.append(len(pickle.dumps(learn(group))))
    assert sizes[1] < 1.02 * sizes[0]


# --- corpora that are not as one would wish ---


def test_a_shard_without_a_column_is_one_without_the_modality(corpus, folder):
    path = folder / "part-00004.parquet"
    edit_shard(path, lambda table: table.drop_columns(["audio"]))
    changed = read_parquet(folder)
    assert not changed.available[256:320, 1].any()
    assert_close(fit_statistics(folder, BOUNDED), fit_at_once(changed, BOUNDED))


def test_labels_are_not_looked_at(folder, fitted):
    for path in folder.iterdir():
        edit_shard(path, lambda table: table.drop_columns(["label"]))
    assert_close(fit_statistics(folder, BOUNDED), fitted.state, tolerance=0)


def test_without_splits_everything_is_learned_from(corpus, tmp_path):
    corpus = dataclasses.replace(corpus, split=None)
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=64)
    statistics = fit_statistics(tmp_path / "corpus", BOUNDED)
    assert statistics.rows == 600
    assert_close(statistics, fit_at_once(corpus, BOUNDED))


def test_an_empty_shard_changes_nothing(folder, fitted):
    table = pq.read_table(folder / "part-00002.parquet")
    pq.write_table(table.slice(0, 0), folder / "part-00001a.parquet")
    statistics = fit_statistics(folder, BOUNDED)
    assert statistics.quarantined == ()
    assert_close(statistics, fitted.state)


def test_nested_lists_and_arrow_files_on_another_filesystem_teach_the_same(corpus, fitted):
    memory = fs._MockFileSystem() if hasattr(fs, "_MockFileSystem") else pytest.skip("no filesystem in memory")
    memory.create_dir("corpus")
    for start in range(0, 600, 64):
        part = corpus.select(slice(start, start + 64))
        columns = {"id": pa.array(part.ids.tolist()), "length": pa.array(part.lengths.astype(np.int32))}
        for m, (name, values) in enumerate(part.features.items()):
            rows = [
                frames if there else None for frames, there in zip(values.tolist(), part.available[:, m], strict=True)
            ]
            columns[name] = pa.array(rows, pa.list_(pa.list_(pa.float32())))
        columns["split"] = pa.array(part.split.tolist()).dictionary_encode()
        table = pa.table(columns)
        with memory.open_output_stream(f"corpus/{start:05d}.{'arrow' if start % 128 else 'parquet'}") as file:
            if start % 128:
                with ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
            else:
                pq.write_table(table, file)
    assert_close(fit_statistics((memory, "corpus"), BOUNDED), fitted.state)


@pytest.mark.parametrize("damage", ["cut short", "flipped bit", "another dimension", "unknown modality"])
@pytest.mark.parametrize("shard", [0, 4])
def test_a_shard_that_cannot_be_read_is_listed_and_the_others_are_learned_from(damage, shard, corpus, folder):
    path = folder / f"part-{shard:05d}.parquet"
    raw = bytearray(path.read_bytes())
    if damage == "cut short":
        path.write_bytes(raw[:-100])
    elif damage == "flipped bit":
        chunk = pq.read_metadata(path).row_group(0).column(1)
        raw[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
        path.write_bytes(raw)
    else:
        name = "audio" if damage == "another dimension" else "smell"
        edit_shard(path, lambda table: with_nested_column(table, name, [[[0.0] * 9] * 4] * 64))
    if damage == "unknown modality":
        statistics = fit_statistics(folder, BOUNDED, input_dims=DIMS)
    else:
        statistics = fit_statistics(folder, BOUNDED)
    assert [entry.shard for entry in statistics.quarantined] == [path.name]
    keep = np.ones(600, dtype=bool)
    keep[64 * shard : 64 * shard + 64] = False
    assert_close(statistics, fit_at_once(corpus.select(keep), BOUNDED))


def with_nested_column(table, name, values):
    column = pa.array(values, pa.list_(pa.list_(pa.float32())))
    table = table.drop_columns([name]) if name in table.column_names else table
    return table.append_column(name, column)


def test_rows_that_cannot_be_read_are_left_out_and_counted(corpus, folder):
    def spoil(table):
        lengths = table["length"].to_pylist()
        lengths[0] = lengths[1] = -1
        return with_column(table, "length", pa.array(lengths, pa.int32()))

    edit_shard(folder / "part-00003.parquet", spoil)
    statistics = fit_statistics(folder, BOUNDED)
    spoiled = [row for row in (192, 193) if corpus.split[row] == "train"]
    assert statistics.errors == len(spoiled) > 0
    assert statistics.quarantined == ()
    assert_close(statistics, fit_at_once(corpus.select(np.setdiff1d(np.arange(600), spoiled)), BOUNDED))


@pytest.mark.parametrize(
    "replacement",
    [lambda table: table.slice(0, 20), lambda table: pa.concat_tables([table, table]), None],
    ids=["fewer rows", "more rows", "damaged"],
)
@pytest.mark.parametrize("shard", ["part-00004.parquet", "part-00006.parquet"])
def test_a_corpus_that_changes_between_the_passes_is_an_error(replacement, shard, folder):
    def change(progress):
        if progress.done == 10 and replacement is None:  # the first pass has ended
            (folder / shard).write_bytes(b"PAR1")
        elif progress.done == 10:
            edit_shard(folder / shard, replacement)

    with pytest.raises(CorpusError, match="the corpus has changed while it was read"):
        fit_statistics(folder, BOUNDED, progress=change)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: [path.write_bytes(b"PAR1") for path in folder.iterdir()], "none of its 10 shards can be read"),
        (
            lambda folder: edit_shard(folder / "part-00002.parquet", lambda table: table.drop_columns(["split"])),
            "only some of the shards have splits",
        ),
        (
            lambda folder: [edit_shard(path, lambda t: t.drop_columns(["audio", "face"])) for path in folder.iterdir()],
            "two modalities or more, got {'text': 6}",
        ),
        (
            lambda folder: [
                edit_shard(path, lambda t: with_column(t, "split", pa.array(["test"] * len(t))))
                for path in folder.iterdir()
            ],
            "no training utterance to fit to",
        ),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no .parquet"),
    ],
    ids=["damaged", "splits", "one modality", "nothing to train with", "no shard"],
)
def test_a_corpus_that_cannot_be_fitted_to_is_named(spoil, message, folder):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        fit_statistics(folder, BOUNDED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "dask"}, "engine must be one of 'local', 'ray', got 'dask'"),
        ({"workers": 2}, "address and workers are for engine 'ray'"),
        ({"input_dims": {"text": 0, "audio": 5}}, "input_dims"),
    ],
)
def test_bad_arguments_are_named(arguments, message, folder):
    with pytest.raises(ValueError, match=message):
        fit_statistics(folder, BOUNDED, **arguments)


def test_progress_counts_both_passes(folder):
    seen = []
    fit_statistics(folder, BOUNDED, progress=seen.append)
    assert [(entry.done, entry.groups) for entry in seen] == [(n + 1, 20) for n in range(20)]
    assert [seen[9].rows, seen[-1].rows] == [420, 840]


def test_a_bank_that_grows_with_the_corpus_is_never_a_surprise(folder, monkeypatch):
    assert fit_statistics(folder).proxy == ProxyConfig()
    monkeypatch.setattr(fit_module, "LARGE_BANK_BYTES", 1000)
    with pytest.warns(UserWarning, match="the bank will hold all 1264 frames"):
        fit_statistics(folder, M3ERConfig(proxy=ProxyConfig(bank="neighbours")))


# --- the file ---


def test_a_file_holds_what_was_learned(fitted, tmp_path):
    fitted.save(tmp_path / "statistics")
    loaded = ModelStatistics.load(tmp_path / "statistics")
    assert_close(loaded, fitted.state, tolerance=0)
    assert dataclasses.replace(loaded, state={}) == dataclasses.replace(fitted, state={})
    assert loaded.digest == fitted.digest
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]


def test_the_digest_tells_apart_whatever_a_model_takes(fitted):
    state = {**fitted.state, "standardizer.mean_1": fitted.state["standardizer.mean_1"] + 1e-6}
    others = [
        dataclasses.replace(fitted, state=state),
        dataclasses.replace(fitted, check=CheckConfig(alpha=0.06)),
        dataclasses.replace(fitted, input_dims={"text": 6, "face": 4, "audio": 5}),
    ]
    assert len({entry.digest for entry in (fitted, *others)}) == 4
    assert dataclasses.replace(fitted, rows=1).digest == fitted.digest


@pytest.mark.parametrize("what", ["nothing", "a folder", "text", "cut short", "a model"])
def test_a_file_that_holds_no_statistics_is_exit_code_2_in_one_line(what, fitted, folder, tmp_path, capsys):
    path = tmp_path / "file"
    if what == "a folder":
        path.mkdir()
    elif what == "text":
        path.write_text("statistics")
    elif what == "cut short":
        fitted.save(path)
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "a model":
        M3ERFusion(DIMS, 3).save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "model.safetensors"
    assert main(["train", str(folder), "--out", str(tmp_path / "run"), "--stats", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert not (tmp_path / "run").exists()


def test_a_model_takes_them_in_place_of_fit_and_keeps_its_network(fitted, corpus):
    torch.manual_seed(0)
    model = M3ERFusion(DIMS, 3, BOUNDED)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    assert fitted.apply(model) is model
    state = model.state_dict()
    assert_close(fitted, state, tolerance=0)
    assert all(torch.equal(value, model.network.state_dict()[name]) for name, value in before.items())
    assert torch.isfinite(model.predict_proba(corpus.features, corpus.lengths, corpus.available)).all()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: M3ERFusion({**DIMS, "face": 3}, 3, BOUNDED), "the model has .*'face': 3.*same modalities"),
        (lambda: M3ERFusion(dict(reversed(DIMS.items())), 3, BOUNDED), "in the same order"),
        (lambda: M3ERFusion(DIMS, 3, BOUNDED.replace(check=None)), "fitted with check = .*but the model has None"),
        (lambda: M3ERFusion(DIMS, 3), "fitted with proxy = .*max_bank=100.*max_bank=None"),
    ],
    ids=["dimension", "order", "check", "proxy"],
)
def test_a_model_that_they_do_not_fit_is_refused(model, message, fitted):
    with pytest.raises(ValueError, match=message):
        fitted.apply(model())


def test_a_state_that_lacks_something_is_refused(fitted):
    state = {name: value for name, value in fitted.state.items() if name != "modality_check.left_0"}
    with pytest.raises(ValueError, match=r"do not fit the model: .*left_0"):
        dataclasses.replace(fitted, state=state).apply(M3ERFusion(DIMS, 3, BOUNDED))


# --- training with them ---


def test_training_takes_statistics_and_its_settings_from_them(corpus, fitted, tmp_path, monkeypatch):
    short = M3ERConfig(training=TrainingConfig(epochs=2))
    monkeypatch.setattr("m3er_fast.training.run.M3ERConfig", lambda: short)
    result = train(corpus, statistics=fitted, out=tmp_path / "run")
    assert_close(fitted, result.model.state_dict(), tolerance=0)
    assert (result.model.config.check, result.model.config.proxy) == (fitted.check, fitted.proxy)
    assert "fitted separately, to 420 utterances" in (tmp_path / "run" / "README.md").read_text()
    assert train(corpus, statistics=fitted, out=tmp_path / "run").history == result.history
    for other in (None, dataclasses.replace(fitted, state={**fitted.state, "standardizer.mean_0": torch.zeros(6)})):
        with pytest.raises(ResumeMismatchError, match="other statistics"):
            train(corpus, result.model.config, statistics=other, out=tmp_path / "run")


# --- the command line ---


def test_the_command_line_fits_and_trains(folder, fitted, tmp_path, capsys):
    (tmp_path / "settings.json").write_text(json.dumps({"proxy": {"bank": "neighbours", "max_bank": 100}}))
    file = tmp_path / "new" / "statistics"
    arguments = ["--config", str(tmp_path / "settings.json")]
    assert main(["fit-stats", str(folder), "--out", str(file), *arguments]) == 0
    assert capsys.readouterr().out == f"{file}: learned from 420 utterances with {fitted.frames} paired frames\n"
    assert ModelStatistics.load(file).digest == fitted.digest
    train_it = ["train", str(folder), "--out", str(tmp_path / "run"), "--epochs", "1", "--stats", str(file)]
    assert main(train_it) == 0
    assert M3ERFusion.from_pretrained(tmp_path / "run").config.proxy.max_bank == 100
    assert main([*train_it, "--paper", "--no-resume"]) == 2
    assert "the statistics were fitted with" in capsys.readouterr().err


def test_what_is_left_out_is_named_with_exit_code_3_and_the_file_is_there(folder, tmp_path, capsys):
    (folder / "part-00004.parquet").write_bytes(b"PAR1")
    assert main(["fit-stats", str(folder), "--out", str(tmp_path / "file")]) == 3
    # On a busy machine there are lines of progress too.
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m3er-fast:")]
    assert line.startswith("m3er-fast: part-00004.parquet was left out: not readable")
    assert [entry.shard for entry in ModelStatistics.load(tmp_path / "file").quarantined] == ["part-00004.parquet"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "dask"],
        ["--workers", "2"],
        ["--config", "nowhere.json"],
        ["--out", "."],
        ["--paper", "--config", "x"],
    ],
    ids=" ".join,
)
def test_bad_options_are_exit_code_2_in_one_line(arguments, folder, tmp_path, capsys):
    assert main(["fit-stats", str(folder), "--out", str(tmp_path / "file"), *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "file").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="writes to /proc")
def test_where_nothing_can_be_written_is_exit_code_2_before_anything_is_read(tmp_path, capsys):
    assert main(["fit-stats", str(tmp_path / "missing"), "--out", "/proc/statistics"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "/proc" in line


def test_a_full_disk_is_exit_code_5_and_leaves_the_former_file(folder, fitted, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    fitted.save(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    assert main(["fit-stats", str(folder), "--out", str(tmp_path / "file")]) == 5
    assert "disk full" in capsys.readouterr().err
    assert (tmp_path / "file").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "file"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("moment", ["the first pass", "the second pass", "writing"])
def test_a_killed_run_leaves_no_file_and_a_second_one_writes_it(moment, folder, fitted, tmp_path):
    script = f"""
import os, signal, sys
from m3er_fast import M3ERConfig
from m3er_fast.config import ProxyConfig
from m3er_fast.scoring import fit_statistics

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(state):
    if state.done == {{"the first pass": 4, "the second pass": 14}}.get({moment!r}):
        die()

if {moment!r} == "writing":
    os.fsync = die
config = M3ERConfig(proxy=ProxyConfig(bank="neighbours", max_bank=100))
fit_statistics({str(folder)!r}, config, progress=progress).save({str(tmp_path / "file")!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "file").exists()
    fit_statistics(folder, BOUNDED).save(tmp_path / "file")
    assert ModelStatistics.load(tmp_path / "file").digest == fitted.digest
