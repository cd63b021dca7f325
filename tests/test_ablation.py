"""The ablation table, corruption, regeneration and examples, each against numbers worked out by other means."""

import json
import math
import re
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from corpus_fixtures import make_corpus
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from m3er_fast import M3ERConfig, M3ERFusion, ModalityCheck, ablation, demo
from m3er_fast.ablation import AblationResult, AblationRow, CheckQuality, corrupt_corpus, examples, regenerate
from m3er_fast.config import CheckConfig, LossConfig, NetworkConfig, ProxyConfig, TrainingConfig
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.corruption import compose, paper_protocol
from m3er_fast.metrics import classification_report
from m3er_fast.training import Prediction, ResumeMismatchError, evaluate, train

DIMS = {"text": 6, "audio": 5, "face": 4}
NETWORK = NetworkConfig(hidden=8, memory=8, attention=(8, 8, 8), fusion=8, head=8)
CORPUS = make_synthetic(120, input_dims=DIMS, num_classes=3, steps=3, latent_dim=3, difficulty=0.3, seed=1)
TEST = CORPUS.subset("test")
# Seeds from 5 on: counting them from 0 would show.
CONFIG = M3ERConfig(
    check=CheckConfig(alpha=0.3),
    proxy=ProxyConfig(bank="neighbours", ridge=1e-2),
    network=NETWORK,
    training=TrainingConfig(epochs=3, batch_size=16, learning_rate=0.02, seed=5),
)
ROWS = [
    (False, "M3ER with the modified loss (the paper's)"),
    (False, "M3ER"),
    (True, "M3ER – modality check step – proxy feature vector"),
    (True, "M3ER – proxy feature vector"),
    (True, "M3ER"),
    (True, "M3ER with the correlation check (the paper's)"),
    (True, "M3ER with the true mask"),
]
FIGURES = {"ablation.png", "figure3.png", "figure7.png"}


def with_seed(seed, **changes):
    return CONFIG.replace(training=replace(CONFIG.training, seed=seed), **changes)


def with_modified_loss(config):
    return config.replace(loss=replace(config.loss, variant="m3er"))


def answers(model, corpus, **options):
    features = {name: torch.from_numpy(values) for name, values in corpus.features.items()}
    return model.predict_proba(features, corpus.lengths, corpus.available, **options).argmax(dim=1).numpy()


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation") / "deep" / "out"
    lines = []
    return ablation.run_ablation(CORPUS, CONFIG, seeds=2, out=out, progress=lines.append), out, lines


@pytest.fixture(scope="module")
def model():
    """A fitted model whose network is untrained: corruption and regeneration use only its steps 0 to 2."""
    torch.manual_seed(0)
    fitted = M3ERFusion(DIMS, 3, CONFIG, classes=CORPUS.classes)
    training = CORPUS.subset("train")
    return fitted.fit(training.features, lengths=training.lengths, available=training.available)


def valid_frames(corpus):
    return np.arange(corpus.steps) < corpus.lengths[:, None]


def standardized(corpus):
    """float64 features of the train split's mean and standard deviation 0 and 1, computed by NumPy."""
    training = CORPUS.subset("train")
    result = {}
    for name, values in corpus.features.items():
        frames = training.features[name][valid_frames(training)].astype(np.float64)
        result[name] = (values.astype(np.float64) - frames.mean(axis=0)) / frames.std(axis=0)
    return result


# --- the table ---


def test_the_rows_are_table_2_s_in_its_order_and_two_further_ones(ablated):
    assert [(row.ineffectual, row.label) for row in ablated[0].rows] == ROWS
    assert {len(row.reports) for row in ablated[0].rows} == {2}


def test_every_row_scores_what_its_label_says(ablated):
    """Each row rebuilt for the second seed from models trained and taken apart here."""
    config = with_seed(6)
    modified = train(CORPUS, with_modified_loss(config)).model
    full = train(CORPUS, config).model
    noisy, truth = corrupt_corpus(full, TEST, 6)
    everything = np.ones_like(truth)
    verdict = evaluate(full, noisy).effective
    training = CORPUS.subset("train")
    paper = ModalityCheck(DIMS, statistic="correlation", component_weights=None, alpha=0.3)
    in_units = {name: torch.from_numpy(values).float() for name, values in standardized(training).items()}
    paper.fit(in_units, lengths=training.lengths, available=training.available)
    units = {name: torch.from_numpy(values).float() for name, values in standardized(noisy).items()}
    without_proxies = full.ablated(proxy=False)
    expected = [
        answers(modified, TEST),
        answers(full, TEST),
        answers(without_proxies, noisy, effective=everything),
        answers(without_proxies, noisy, effective=verdict),
        answers(full, noisy, effective=verdict),
        answers(full, noisy, effective=paper.check(units, noisy.lengths, noisy.available).effective),
        answers(full, noisy, effective=~truth),
    ]
    # Otherwise a mix-up of rows would not show. The last may equal M3ER's if its check is perfect: see the next test.
    assert len({tuple(answer) for answer in expected[:-1]}) == len(ROWS) - 1
    for row, answer in zip(ablated[0].rows, expected, strict=True):
        report = row.reports[1]
        assert report.accuracy == pytest.approx(accuracy_score(TEST.target, answer)), row.label
        f1 = f1_score(TEST.target, answer, average=None, zero_division=0.0)
        assert [scores.f1 for scores in report.per_class] == pytest.approx(f1.tolist()), row.label


def test_the_true_mask_is_not_the_check_s():
    config = with_seed(8, check=CheckConfig(statistic="correlation"))
    rows = ablation.run_ablation(CORPUS, config, seeds=1).rows
    full = train(CORPUS, config).model
    noisy, truth = corrupt_corpus(full, TEST, 8)
    found, known = (accuracy_score(TEST.target, answers(full, noisy, effective=e)) for e in (None, ~truth))
    assert found != known
    assert [rows[4].reports[0].accuracy, rows[6].reports[0].accuracy] == pytest.approx([found, known])


def test_the_quality_of_both_checks_agrees_with_scikit_learn(ablated):
    assert [check.check for check in ablated[0].checks] == ["combined", "correlation"]
    scores = {"auroc": [], "detected": [], "false_alarms": []}
    for seed in (5, 6):
        full = train(CORPUS, with_seed(seed)).model
        noisy, truth = corrupt_corpus(full, TEST, seed)
        prediction = evaluate(full, noisy)
        columns = range(len(DIMS))
        scores["auroc"].append([roc_auc_score(truth[:, m], -prediction.p_value[:, m]) for m in columns])
        scores["detected"].append([(~prediction.effective[truth[:, m], m]).mean() for m in columns])
        scores["false_alarms"].append([(~prediction.effective[~truth[:, m], m]).mean() for m in columns])
    for name, values in scores.items():
        found = getattr(ablated[0].checks[0], name)
        assert list(found) == list(DIMS)
        assert list(found.values()) == pytest.approx(np.mean(values, axis=0).tolist())


def test_the_proxy_errors_are_those_of_the_first_seed_on_the_clean_test_split(ablated):
    first = train(CORPUS, with_seed(5)).model
    assert ablated[0].proxy_errors == regenerate(first, TEST)[0]


def test_progress_names_every_seed(ablated):
    assert [line.split(":")[0] for line in ablated[2]] == ["seed 1 of 2"] * 3 + ["seed 2 of 2"] * 3


def test_the_epochs_of_all_trainings_are_counted_and_one_that_stops_early_counts_in_full():
    config = with_seed(5).replace(training=replace(CONFIG.training, epochs=12, patience=1, learning_rate=0.5))
    counted = []
    ablation.run_ablation(CORPUS, config, seeds=1, baselines=False, moved=lambda *numbers: counted.append(numbers))
    lengths = [len(train(CORPUS, one).history["train_loss"]) for one in (with_modified_loss(config), config)]
    assert lengths[0] < 12
    assert counted == [(n, 24) for n in (*range(1, lengths[0] + 1), *range(13, 13 + lengths[1]))]


def test_the_result_is_written_as_json_and_markdown(ablated):
    result, out, _ = ablated
    assert {path.name for path in out.iterdir()} == {"table.md", "table.json"} | FIGURES
    assert (out / "table.md").read_text(encoding="utf-8") == result.to_markdown() + "\n"
    written = json.loads((out / "table.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict(), allow_nan=False))
    for row, kept in zip(result.rows, written["rows"], strict=True):
        assert (kept["ineffectual"], kept["label"]) == (row.ineffectual, row.label)
        assert [seed["accuracy"] for seed in kept["seeds"]] == [report.accuracy for report in row.reports]
    assert written["proxy_errors"] == result.proxy_errors
    assert written["checks"] == [asdict(check) for check in result.checks]
    assert written["corruption"] == "gaussian_noise"
    assert written["settings"]["seeds"] == 2
    assert written["settings"]["utterances"] == {part: len(CORPUS.subset(part)) for part in ("train", "valid", "test")}
    assert M3ERConfig.from_dict(written["settings"]["config"]) == CONFIG
    for name in FIGURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


# --- interrupted and resumed ---


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(KeyboardInterrupt):
    pass


def stopping(line):
    """A progress that stops at this line."""
    seen = []

    def progress(text):
        seen.append(text)
        if len(seen) == line:
            raise Stop

    return progress


@pytest.mark.parametrize(
    ("line", "done"), [(1, None), (2, "1 of 4 trainings are finished"), (5, "3 of 4 trainings are finished")]
)
def test_an_ablation_interrupted_between_trainings_and_resumed_is_the_same_to_the_byte(ablated, tmp_path, line, done):
    said = []
    with pytest.raises(Stop):
        ablation.run_ablation(CORPUS, CONFIG, seeds=2, out=tmp_path, progress=stopping(line), resumed=said.append)
    assert {path.name for path in tmp_path.iterdir()} == {"unfinished"}
    ablation.run_ablation(CORPUS, CONFIG, seeds=2, out=tmp_path, resumed=said.append)
    assert bytes_of(tmp_path) == bytes_of(ablated[1])
    assert said == ([] if done is None else [done])


def test_an_ablation_interrupted_in_a_training_and_resumed_is_the_same_to_the_byte(ablated, tmp_path, monkeypatch):
    from m3er_fast.training.state import TrainingState

    save, saved = TrainingState.save, []

    def save_and_stop(self, path):
        save(self, path)
        saved.append(path)
        if len(saved) == CONFIG.training.epochs + 1:  # in the second training
            raise Stop

    monkeypatch.setattr(TrainingState, "save", save_and_stop)
    with pytest.raises(Stop):
        ablation.run_ablation(CORPUS, CONFIG, seeds=2, out=tmp_path)
    ablation.run_ablation(CORPUS, CONFIG, seeds=2, out=tmp_path)
    assert len(saved) == 4 * CONFIG.training.epochs  # no epoch was trained twice
    assert bytes_of(tmp_path) == bytes_of(ablated[1])


def test_an_ablation_interrupted_while_it_draws_and_resumed_is_the_same_to_the_byte(ablated, tmp_path, monkeypatch):
    def stop(*_arguments):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "draw_ablation", stop)
        with pytest.raises(Stop):
            ablation.run_ablation(CORPUS, CONFIG, seeds=2, out=tmp_path)
    ablation.run_ablation(CORPUS, CONFIG, seeds=2, out=tmp_path)
    assert bytes_of(tmp_path) == bytes_of(ablated[1])


def test_another_ablation_is_not_resumed_but_can_be_begun_anew(tmp_path):
    with pytest.raises(Stop):
        ablation.run_ablation(CORPUS, CONFIG, seeds=1, out=tmp_path, progress=stopping(2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = with_seed(5, loss=replace(CONFIG.loss, beta=2.0))
    with pytest.raises(ResumeMismatchError, match=r"differs: loss\.beta = 1\.0, now 2\.0\. Give another folder"):
        ablation.run_ablation(CORPUS, other, seeds=1, out=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    said = []
    ablation.run_ablation(CORPUS, other, seeds=1, out=tmp_path, resume=False, resumed=said.append)
    assert said == []
    assert not (tmp_path / "unfinished").exists()


def cells_of(table):
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.split("\n")]


def table_of(targets, *, classes=("sad", "a|b"), modalities=("te|xt", "audio")):
    """Two classes, answers [0, 0, 1, 1] in every row, a report for each target."""
    certain = np.eye(2)[[0, 0, 1, 1]]
    reports = tuple(classification_report(certain, np.array(target), classes) for target in targets)
    return AblationResult(
        rows=(AblationRow(False, "first", reports), AblationRow(True, "second", reports)),
        checks=(
            CheckQuality(
                "combined",
                auroc={modalities[0]: 0.98765, modalities[1]: None},
                detected={modalities[0]: 0.5, modalities[1]: None},
                false_alarms={modalities[0]: 0.0, modalities[1]: 0.0316},
            ),
        ),
        proxy_errors={modalities[0]: 0.12345},
        classes=classes,
        settings={},
    )


def test_the_markdown_holds_hand_computed_means_and_deviations():
    result = table_of([[0, 0, 1, 1], [0, 1, 1, 1]])
    tables = result.to_markdown().split("\n\n")
    assert result.overview().split("\n\n") == [tables[0], *tables[2:]]
    overall, scores, checks, proxies = (cells_of(table) for table in tables)
    for table in (overall, scores, checks, proxies):
        assert {len(cells) for cells in table} == {len(table[0])}
        assert all(re.fullmatch(r"---:?", cell) for cell in table[1])
    assert overall[0] == ["Ineffectual modalities?", "Experiment", "Overall F1", "Overall MA", "Accuracy"]
    assert scores[0][2:] == ["sad F1", "sad MA", r"a\|b F1", r"a\|b MA"]
    # F1 of sad is 1 and 2/3, of a|b 1 and 4/5; all else is 1 and 3/4. Half the difference times √2 is the deviation.
    expected = ["0.867 ± 0.189", "87.5% ± 17.7%", "87.5% ± 17.7%"]
    assert overall[2:] == [["No", "first", *expected], ["Yes", "second", *expected]]
    expected = ["0.833 ± 0.236", "87.5% ± 17.7%", "0.900 ± 0.141", "87.5% ± 17.7%"]
    assert scores[2:] == [["No", "first", *expected], ["Yes", "second", *expected]]
    assert checks[2:] == [
        ["combined", r"te\|xt", "0.988", "50.0%", "0.0%"],
        ["combined", "audio", "–", "–", "3.2%"],
    ]
    assert proxies[2:] == [[r"te\|xt", "12.35%"]]


def test_the_table_names_a_corruption_that_is_not_the_paper_s():
    paper = table_of([[0, 0, 1, 1]])
    frozen = replace(paper, corruption="freeze")
    assert frozen.to_dict()["corruption"] == "freeze"
    assert frozen.to_markdown() == paper.to_markdown().replace("| Yes |", "| Yes: freeze |")
    assert "| Yes: freeze | second |" in frozen.to_markdown()


def test_a_single_seed_has_no_deviation():
    table = table_of([[0, 0, 1, 1]])
    assert "±" not in table.to_markdown()
    assert table.rows[0].overall("f1") == (1.0, None)


@pytest.mark.parametrize(
    ("metric", "mean", "deviation"),
    [
        ("f1", 13 / 15, math.sqrt(2) * 2 / 15),
        ("mean_accuracy", 7 / 8, math.sqrt(2) / 8),
        ("accuracy", 7 / 8, math.sqrt(2) / 8),
        ("balanced_accuracy", 11 / 12, math.sqrt(2) / 12),
    ],
)
def test_overall_scores_are_hand_computed(metric, mean, deviation):
    row = table_of([[0, 0, 1, 1], [0, 1, 1, 1]]).rows[0]
    assert row.overall(metric) == pytest.approx((mean, deviation))


def test_the_paper_s_settings_give_the_rows_with_the_combined_check_beside_the_paper_s():
    paper = M3ERConfig.paper()
    paper = paper.replace(network=NETWORK, training=replace(paper.training, epochs=2))
    result = ablation.run_ablation(CORPUS, paper, seeds=1)
    assert [(row.ineffectual, row.label) for row in result.rows] == [
        (False, "Original multiplicative fusion (Liu et al. 2018)"),
        *ROWS[1:5],
        (True, "M3ER with the combined check"),
        ROWS[6],
    ]
    assert [check.check for check in result.checks] == ["correlation", "combined"]
    assert result.checks[1].detected["text"] > 0.9
    assert "±" not in result.to_markdown()


def test_another_corruption_changes_the_rows_with_ineffectual_modalities_alone(ablated, tmp_path):
    result = ablation.run_ablation(CORPUS, with_seed(6), seeds=1, corruption="silence", out=tmp_path)
    assert [(row.ineffectual, row.label) for row in result.rows] == ROWS
    assert result.corruption == "silence"
    assert "| Yes: silence | M3ER |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "table.json").read_text())["corruption"] == "silence"
    for found, paper in zip(result.rows[:2], ablated[0].rows[:2], strict=True):
        assert found.reports[0] == paper.reports[1]
    full = train(CORPUS, with_seed(6)).model
    silent, truth = corrupt_corpus(full, TEST, 6, corruption="silence")
    for row, effective in ((result.rows[4], None), (result.rows[6], ~truth)):
        answer = answers(full, silent, effective=effective)
        assert row.reports[0].accuracy == pytest.approx(accuracy_score(TEST.target, answer))


@pytest.mark.parametrize("task", ["multi", "distribution"])
def test_every_task_can_be_ablated(task, tmp_path):
    corpus = make_synthetic(60, input_dims=DIMS, num_classes=3, steps=2, latent_dim=3, task=task)
    activation = "sigmoid" if task == "multi" else "softmax"
    config = with_seed(0, loss=LossConfig(activation=activation))
    result = ablation.run_ablation(corpus, config, seeds=1, out=tmp_path)
    assert {row.reports[0].task for row in result.rows} == {task}
    assert np.isfinite([row.overall("f1")[0] for row in result.rows]).all()


def test_modalities_that_hold_nothing_are_no_false_alarms():
    features = {name: values.copy() for name, values in CORPUS.features.items()}
    features["text"][::2] = np.nan
    available = CORPUS.available.copy()
    available[CORPUS.split == "train", 2] = False
    corpus = replace(CORPUS, features=features, available=available)
    result = ablation.run_ablation(corpus, CONFIG, seeds=1)
    assert np.isfinite([row.overall("f1")[0] for row in result.rows]).all()
    quality = result.checks[0]
    assert quality.false_alarms["text"] < 0.5
    assert quality.auroc["face"] is quality.detected["face"] is quality.false_alarms["face"] is None


def test_without_a_validation_split_all_seeds_share_the_one_carved_from_train():
    corpus = replace(CORPUS, split=np.where(CORPUS.split == "valid", "train", CORPUS.split))
    result = ablation.run_ablation(corpus, CONFIG, seeds=1)
    assert result.settings["utterances"]["valid"] > 0
    assert sum(result.settings["utterances"].values()) == len(corpus)


def test_without_matplotlib_the_figures_alone_are_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "m3er_fast.plots", None)
    monkeypatch.delattr("m3er_fast.plots", raising=False)  # an import done before leaves the name in the package
    ablation.run_ablation(CORPUS, CONFIG, seeds=1, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.json"}


@pytest.mark.parametrize(
    ("corpus", "config", "seeds", "message"),
    [
        (CORPUS, CONFIG.replace(check=None), 1, "config must have both the check and the proxies"),
        (CORPUS, CONFIG.replace(proxy=None), 1, "config must have both the check and the proxies"),
        (CORPUS, CONFIG, 0, "seeds must be a positive int, got 0"),
        (replace(CORPUS, split=None), CONFIG, 1, "this corpus has no splits"),
        (CORPUS.select(CORPUS.split != "test"), CONFIG, 1, "the corpus has no test split to score"),
        (replace(CORPUS, target=None), CONFIG, 1, "the test split has no labels to score"),
        (
            replace(CORPUS, target=np.where(CORPUS.split == "test", -100, CORPUS.target)),
            CONFIG,
            1,
            "the test split has no labels to score",
        ),
    ],
)
def test_invalid_arguments_are_an_error_before_any_training(monkeypatch, corpus, config, seeds, message):
    monkeypatch.setattr(ablation, "train", lambda *_, **__: pytest.fail("trained for nothing"))
    with pytest.raises(ValueError, match=message):
        ablation.run_ablation(corpus, config, seeds=seeds)


@pytest.mark.parametrize(
    ("corpus", "corruption", "message"),
    [
        (CORPUS, "hum", "corruption must be one of .*, got 'hum'"),
        (CORPUS, "gain:harsh", "the severity of corruption must be one of 'mild', 'medium', 'severe', got 'harsh'"),
        (
            replace(CORPUS, group=None),
            "wrong_face",
            "corruption 'wrong_face' needs a corpus with groups, but this one has none",
        ),
    ],
)
def test_a_corruption_that_cannot_be_done_is_an_error_before_any_training(monkeypatch, corpus, corruption, message):
    monkeypatch.setattr(ablation, "train", lambda *_, **__: pytest.fail("trained for nothing"))
    with pytest.raises(ValueError, match=message):
        ablation.run_ablation(corpus, CONFIG, seeds=1, corruption=corruption)


def test_a_folder_that_cannot_be_written_is_an_error_before_any_training(monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, "train", lambda *_, **__: pytest.fail("trained for nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        ablation.run_ablation(CORPUS, CONFIG, out=tmp_path / "file")


# --- corruption ---


def test_corruption_leaves_everything_else_bit_for_bit(model):
    rng = np.random.default_rng(0)
    available = rng.random(CORPUS.available.shape) < 0.8
    features = {name: values.copy() for name, values in CORPUS.features.items()}
    features["audio"][::3, 0, 0] = np.nan
    features["face"][1::3, 1] = -np.inf
    corpus = replace(CORPUS, features=features, available=available)
    kept = {name: values.copy() for name, values in features.items()}
    noisy, truth = corrupt_corpus(model, corpus, 3)
    assert truth.any()
    assert not (truth & ~available).any()
    assert (truth.sum(axis=1) < available.sum(axis=1).clip(min=1)).all()
    np.testing.assert_array_equal(noisy.available, available)
    np.testing.assert_array_equal(noisy.target, corpus.target)
    padding = ~valid_frames(corpus)
    for m, name in enumerate(DIMS):
        np.testing.assert_array_equal(corpus.features[name], kept[name])
        np.testing.assert_array_equal(noisy.features[name][~truth[:, m]], kept[name][~truth[:, m]])
        assert (noisy.features[name][padding] == 0).all()
        entire = np.isfinite(kept[name]).all(axis=2) & ~padding
        hit = entire & truth[:, m, None]
        assert (noisy.features[name][hit] != kept[name][hit]).any(axis=1).all()
        assert noisy.features[name].dtype == np.float32


def test_the_noise_has_a_hundred_times_the_power_of_the_standardised_signal(model):
    noisy, truth = corrupt_corpus(model, CORPUS, 0)
    before, after, valid = standardized(CORPUS), standardized(noisy), valid_frames(CORPUS)
    for m, name in enumerate(DIMS):
        ratios = []
        for row in np.flatnonzero(truth[:, m]):
            signal, noise = before[name][row, valid[row]], (after[name] - before[name])[row, valid[row]]
            ratios.append((noise**2).mean() / (signal**2).mean())
        assert np.mean(ratios) == pytest.approx(100, rel=0.15)
        assert min(ratios) > 10


def test_the_seed_decides_the_corruption(model):
    first, again, other = (corrupt_corpus(model, TEST, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[1] != other[1]).any()
    for name in DIMS:
        np.testing.assert_array_equal(first[0].features[name], again[0].features[name])


def test_by_default_the_corruption_is_the_paper_s_protocol(model):
    batch = model.standardize(TEST.features, TEST.lengths, TEST.available)
    features = dict(zip(DIMS, batch.features, strict=True))
    noisy, truth = paper_protocol(features, 3, lengths=batch.lengths, available=batch.available)
    corrupted, found = corrupt_corpus(model, TEST, 3)
    np.testing.assert_array_equal(found, truth.numpy())
    raw = model.standardizer.unstandardize([noisy[name] for name in DIMS])
    for m, name in enumerate(DIMS):
        hit = valid_frames(TEST) & found[:, m, None]
        np.testing.assert_array_equal(corrupted.features[name][hit], raw[m].numpy()[hit])


@pytest.mark.parametrize(
    ("corruption", "silent"), [("silence", True), ("freeze", False), (compose("freeze", "silence"), True)]
)
def test_any_corruption_hits_the_same_modalities_of_a_corpus(model, corruption, silent):
    corrupted, truth = corrupt_corpus(model, CORPUS, 2, corruption=corruption)
    np.testing.assert_array_equal(truth, corrupt_corpus(model, CORPUS, 2)[1])
    for m, (name, found) in enumerate(standardized(corrupted).items()):
        assert truth[:, m].any()
        for row in np.flatnonzero(truth[:, m]):
            frames = found[row, : CORPUS.lengths[row]]
            np.testing.assert_allclose(frames, 0 if silent else np.broadcast_to(frames[0], frames.shape), atol=1e-5)
        np.testing.assert_array_equal(corrupted.features[name][~truth[:, m]], CORPUS.features[name][~truth[:, m]])


def test_donors_are_chosen_by_the_groups_of_the_corpus(model):
    numbers = np.arange(len(CORPUS), dtype=np.float32)
    marked = {name: np.broadcast_to(numbers[:, None, None], x.shape).copy() for name, x in CORPUS.features.items()}
    corpus = replace(CORPUS, features=marked)
    for corruption, same in (("wrong_face", True), ("another_speaker", False)):
        swapped, truth = corrupt_corpus(model, corpus, 0, corruption=corruption)
        for m, name in enumerate(DIMS):
            donor = swapped.features[name][:, 0, 0].round().astype(int)
            hit = truth[:, m]
            assert (donor[~hit] == numbers[~hit]).all()
            assert (donor[hit] != numbers[hit]).all()
            assert ((corpus.group[donor] == corpus.group)[hit] == same).all()
    with pytest.raises(ValueError, match="needs a corpus with groups, but this one has none"):
        corrupt_corpus(model, replace(CORPUS, group=None), 0, corruption="another_speaker")


def test_a_corpus_in_another_order_than_the_model_is_an_error(model):
    features = {name: CORPUS.features[name] for name in ("face", "audio", "text")}
    corpus = replace(CORPUS, features=features, available=CORPUS.available[:, ::-1])
    for function in (lambda: corrupt_corpus(model, corpus, 0), lambda: regenerate(model, corpus)):
        with pytest.raises(ValueError, match="wanted the same, in the same order"):
            function()


# --- regeneration ---


def numpy_proxies(corpus, lost):
    """Proxies of the valid frames of one modality, by the formula of step 2 in float64, and the frames themselves."""
    training, valid = CORPUS.subset("train"), valid_frames(corpus)
    bank = {name: values[valid_frames(training)] for name, values in standardized(training).items()}
    frames = {name: values[valid] for name, values in standardized(corpus).items()}
    proxies = []
    for row in range(len(frames[lost])):
        parts = []
        for source in DIMS:
            if source == lost:
                continue
            f = frames[source][row]
            near = np.argsort(((bank[source] - f) ** 2).sum(axis=1))[:16]
            v = bank[source][near]
            gram = v @ v.T
            a = np.linalg.solve(gram + 1e-2 * np.trace(gram) / 16 * np.eye(16), v @ f)
            parts.append(a @ bank[lost][near])
        proxies.append(np.mean(parts, axis=0))
    return np.array(proxies), frames[lost]


def test_regeneration_errors_equal_those_of_a_numpy_computation(model):
    errors, frames = regenerate(model, TEST)
    assert list(errors) == list(frames) == list(DIMS)
    for name in DIMS:
        proxies, originals = numpy_proxies(TEST, name)
        distances = np.linalg.norm(proxies - originals, axis=1)
        assert errors[name] == pytest.approx(distances.mean() / np.linalg.norm(originals, axis=1).mean(), rel=1e-4)
        shown = frames[name]
        middle = np.argsort(distances)[len(distances) // 2]
        np.testing.assert_allclose(shown.original, originals[middle], atol=1e-5)
        np.testing.assert_allclose(shown.proxy, proxies[middle], atol=1e-3)
        power = np.square(shown.corrupted - shown.original).mean() / np.square(shown.original).mean()
        assert 20 < power < 500  # 100 on average


def test_the_seed_decides_the_noise_that_figure_7_shows_and_nothing_else(model):
    (errors, first), (same_errors, second) = regenerate(model, TEST), regenerate(model, TEST, seed=1)
    assert errors == same_errors
    np.testing.assert_array_equal(first["text"].proxy, second["text"].proxy)
    assert (first["text"].corrupted != second["text"].corrupted).all()


@pytest.mark.parametrize("present", [[], ["text"]])
def test_nothing_is_regenerated_without_another_modality(model, present):
    available = np.array([[name in present for name in DIMS]] * len(TEST))
    assert regenerate(model, replace(TEST, available=available)) == ({}, {})


def test_an_empty_corpus_has_nothing_to_regenerate(model):
    assert regenerate(model, TEST.select(np.zeros(len(TEST), dtype=bool))) == ({}, {})


def test_a_model_without_proxies_cannot_regenerate(model):
    with pytest.raises(ValueError, match="the model has no proxies to look at"):
        regenerate(model.ablated(proxy=False), TEST)


def test_linearly_related_modalities_are_regenerated_to_the_slides_hundredth_of_a_percent(tmp_path):
    path = tmp_path / "figure7.png"
    errors = demo.draw_linear_proxies(path)
    assert set(errors) == {"text", "audio", "face"}
    assert 0 < max(errors.values()) < 1e-4
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("proxy", [ProxyConfig(), ProxyConfig(bank="basis", ridge=1e-12)], ids=["regression", "basis"])
def test_maps_of_linearly_related_modalities_regenerate_them_as_well(proxy):
    corpus = make_synthetic(
        60, input_dims=DIMS, steps=2, latent_dim=3, correlation=1.0, nonlinearity=0.0, noise=1e-6, seed=2
    )
    config = M3ERConfig(check=None, proxy=proxy, network=NETWORK)
    linear = M3ERFusion(DIMS, 4, config).fit(corpus.features, lengths=corpus.lengths, available=corpus.available)
    assert max(regenerate(linear, corpus)[0].values()) < 1e-4


# --- examples of Figures 3 and 4 ---


def example_inputs(*, task="single", target, probabilities, own=None, effective=None, truth=None, available=None):
    rows, classes = np.shape(probabilities)
    kind = np.int64 if task == "single" else np.float32
    corpus = make_corpus(
        rows,
        dims=(("text", 3), ("audio", 2), ("face", 2)),
        classes=tuple("abcd"[:classes]),
        target=np.array(target, kind),
        task=task,
    )
    nothing, everything = np.zeros((rows, 3), dtype=bool), np.ones((rows, 3), dtype=bool)
    prediction = Prediction(
        probabilities=np.array(probabilities, np.float32),
        modality_probabilities=np.full((3, rows, classes), 0.5, np.float32) if own is None else own,
        effective=everything if effective is None else effective,
        p_value=np.ones((rows, 3), np.float32),
        reason=np.zeros((rows, 3), np.int64),
        abstained=np.zeros(rows, dtype=bool),
        available=everything if available is None else available,
        report=None,
    )
    return corpus, nothing if truth is None else truth, prediction


def model_with(**loss):
    return SimpleNamespace(config=M3ERConfig(loss=LossConfig(**loss)))


def test_the_right_answer_of_median_confidence_is_shown_for_each_class():
    corpus, truth, prediction = example_inputs(
        target=[0, 0, 1, 1, -100, 2, 0, 0],
        probabilities=[
            *([0.6, 0.4, 0], [0.9, 0.1, 0], [0.2, 0.8, 0], [0.9, 0.1, 0], [1, 0, 0], [0.5, 0.3, 0.2]),
            *([0.99, 0.01, 0], [0.1, 0.9, 0]),
        ],
    )
    chosen = examples(model_with(), corpus, truth, prediction)
    assert [(example["label"], example["id"]) for example in chosen] == [("a", "u1"), ("b", "u2")]  # c: never right
    assert chosen[0]["classes"] == ("a", "b", "c")
    assert chosen[0]["modalities"] == ("text", "audio", "face")
    np.testing.assert_array_equal(chosen[0]["fused"], prediction.probabilities[1])


def test_an_example_with_an_ineffectual_modality_that_was_found_is_preferred():
    effective, truth = np.ones((6, 3), dtype=bool), np.zeros((6, 3), dtype=bool)
    truth[[0, 1, 2, 5], 1] = True
    effective[[1, 2, 3, 5], 1] = False  # u0's was missed, u3's is a false alarm
    corpus, truth, prediction = example_inputs(
        target=[0] * 6,
        probabilities=[[0.75, 0.25], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.77, 0.23], [0.97, 0.03]],
        effective=effective,
        truth=truth,
    )
    (chosen,) = examples(model_with(), corpus, truth, prediction)
    assert chosen["id"] == "u2"
    assert chosen["effective"].tolist() == [True, False, True]


P = np.array([0.9, 0.4, 0.25])  # probability of class a from text, audio and face


@pytest.mark.parametrize(
    ("loss", "present", "weights"),
    [
        ({"beta": 1.0}, [1, 1, 1], P**0.5),
        ({"beta": 3.0}, [1, 1, 1], P**1.5),
        ({"beta": 0.0}, [1, 1, 1], [1, 1, 1]),
        ({"beta": 1.0}, [1, 0, 1], [0.9, 0, 0.25]),
        ({"beta": 1.0}, [0, 1, 0], [0, 1, 0]),
        ({"variant": "original"}, [1, 1, 1], np.sqrt([0.6 * 0.75, 0.1 * 0.75, 0.1 * 0.6])),
        ({"variant": "original"}, [1, 0, 1], [0.75, 0, 0.1]),
        ({"variant": "m3er_cross"}, [1, 1, 1], np.sqrt([0.4 * 0.25, 0.9 * 0.25, 0.9 * 0.4])),
        ({"activation": "sigmoid"}, [1, 1, 1], P**0.5),
    ],
)
def test_the_weights_of_an_example_are_hand_computed(loss, present, weights):
    own = np.stack([P, 1 - P], axis=1)[:, None].astype(np.float32)
    corpus, truth, prediction = example_inputs(
        target=[0], probabilities=[[0.7, 0.3]], own=own, available=np.array([present], dtype=bool)
    )
    (chosen,) = examples(model_with(**{"variant": "m3er", **loss}), corpus, truth, prediction)
    np.testing.assert_allclose(chosen["weights"], weights, rtol=1e-6)
    np.testing.assert_array_equal(chosen["probabilities"], own[:, 0])


@pytest.mark.parametrize("variant", ["original", "m3er", "m3er_cross"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_probabilities_rounded_to_zero_and_one_give_finite_weights(variant, beta):
    own = np.array([[[1, 0]], [[0, 1]], [[1, 0]]], np.float32)
    corpus, truth, prediction = example_inputs(target=[0], probabilities=[[1, 0]], own=own)
    (chosen,) = examples(model_with(variant=variant, beta=beta), corpus, truth, prediction)
    expected = {"original": [0, 0, 0], "m3er": [1, 0, 1], "m3er_cross": [0, 1, 0]}[variant] if beta else [1, 1, 1]
    np.testing.assert_allclose(chosen["weights"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "target"),
    [
        ("distribution", [[0.6, 0.4], [0.3, 0.7], [0.8, 0.2]]),
        ("multi", [[1, 1], [0, 1], [0, 0]]),  # u2 shows nothing, so it is no right answer of a
    ],
)
def test_examples_of_the_other_tasks_are_of_classes_that_the_target_shows(task, target):
    corpus, truth, prediction = example_inputs(
        task=task, target=target, probabilities=[[0.6, 0.4], [0.4, 0.6], [0.9, 0.1]]
    )
    chosen = examples(model_with(), corpus, truth, prediction)
    first = "u2" if task == "distribution" else "u0"
    assert [(example["label"], example["id"]) for example in chosen] == [("a", first), ("b", "u1")]


def test_without_labels_there_are_no_examples():
    corpus, truth, prediction = example_inputs(target=[0], probabilities=[[1, 0]])
    assert examples(model_with(), replace(corpus, target=None), truth, prediction) == []


# --- the demo ---


def test_the_demo_writes_corpus_model_scores_tables_and_figures(tmp_path, monkeypatch):
    def small(*args, **options):
        return make_synthetic(*args, **options) if args else CORPUS

    def one_seed(corpus, config, **options):
        return ablation.run_ablation(corpus, config.replace(network=NETWORK), seeds=1, **options)

    monkeypatch.setattr(demo, "make_synthetic", small)
    monkeypatch.setattr(demo, "run_ablation", one_seed)
    lines = []
    out = tmp_path / "deep" / "demo"
    result = demo.run_demo(out, progress=lines.append)
    assert [(row.ineffectual, row.label) for row in result.rows] == ROWS
    assert {path.name for path in out.iterdir()} == {
        *("corpus", "model", "scores", "table.md", "table.json", "figure7_linear.png"),
        *FIGURES,
    }
    assert {"model.safetensors", "history.json"} <= {path.name for path in (out / "model").iterdir()}
    assert list((out / "corpus").glob("*.parquet"))
    assert list((out / "scores").glob("*.parquet"))
    assert lines[0].startswith("generating")


@pytest.mark.parametrize("line", [2, 3, 4])
def test_a_demo_interrupted_and_resumed_is_the_same_to_the_byte(tmp_path, monkeypatch, line):
    def small(*args, **options):
        return make_synthetic(*args, **options) if args else CORPUS

    def one_seed(corpus, config, **options):
        return ablation.run_ablation(corpus, config.replace(network=NETWORK), seeds=1, **options)

    monkeypatch.setattr(demo, "make_synthetic", small)
    monkeypatch.setattr(demo, "run_ablation", one_seed)
    demo.run_demo(tmp_path / "once")
    with pytest.raises(Stop):
        demo.run_demo(tmp_path / "twice", progress=stopping(line))
    demo.run_demo(tmp_path / "twice")
    files = {path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "twice") for path in (tmp_path / "twice").rglob("*") if path.is_file()}
    for file in files:
        if "summary" not in file.name:  # the scores' summaries say how long scoring took
            assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file


def test_the_demo_leaves_an_interrupted_ablation_and_what_is_beside_it_alone(tmp_path):
    with pytest.raises(Stop):
        ablation.run_ablation(CORPUS, CONFIG, seeds=1, out=tmp_path, progress=stopping(1))
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ValueError, match="is not empty"):
        demo.run_demo(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"unfinished", "corpus"}


@pytest.mark.parametrize("content", ["file", "folder"])
def test_the_demo_refuses_a_folder_that_holds_something(tmp_path, content):
    (tmp_path / "something").touch() if content == "file" else (tmp_path / "something").mkdir()
    with pytest.raises(ValueError, match="is not empty: give another folder with --out, or remove it"):
        demo.run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
