import dataclasses
import errno
import importlib.metadata
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from m3er_fast import M3ERConfig, M3ERFusion, __version__, scoring
from m3er_fast.cli import environment, main
from m3er_fast.cli.progress import ProgressDisplay
from m3er_fast.corpus import write_parquet
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.functional._dispatch import OPERATIONS, backends
from m3er_fast.neighbors import NeighborEngine

COMMANDS = [
    "demo",
    "convert",
    "extract",
    "train",
    "tune",
    "score",
    "predict",
    "fit-stats",
    "generate",
    "ablate",
    "audit",
    "bench",
    "info",
]
DIMS = {"text": 6, "audio": 5, "face": 4}


@pytest.fixture(scope="module")
def corpus():
    return make_synthetic(200, input_dims=DIMS, num_classes=3, steps=3, latent_dim=4)


@pytest.fixture(scope="module")
def corpus_dir(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(corpus, folder, rows_per_shard=64)
    return folder


@pytest.fixture(scope="module")
def model_dir(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(corpus, folder)
    return folder


def save_model(corpus, folder, seed=0):
    torch.manual_seed(seed)
    model = M3ERFusion(corpus.input_dims, len(corpus.classes), classes=corpus.classes)
    model.fit(corpus.features, lengths=corpus.lengths, available=corpus.available).save_pretrained(folder)


@pytest.fixture
def run(capsys):
    """A function that runs the command line in this process and returns exit code, stdout and stderr."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def assert_one_line(error, *words):
    assert error.startswith("m3er-fast: error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    for word in words:
        assert word in error


# --- help, version, usage ---


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, run):
    code, out, error = run(command, "--help")
    assert (code, error) == (0, "")
    assert f"Usage: m3er-fast {command}" in out


def test_help_lists_every_command_the_exit_codes_and_debug(run):
    code, out, _ = run("--help")
    assert code == 0
    for word in (*COMMANDS, "130 interrupted", "--debug", "--version"):
        assert word in out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", ["--out"]),
        ("convert", ["--format", "--out", "mfn-h5", "utterance-csv", "csd", "mmsa-pkl", "mult-pkl", "iemocap-pkl"]),
        ("train", ["--out", "--config", "--paper", "--seed", "--epochs", "--no-resume"]),
        ("score", ["--model", "--out", "--engine", "--resume", "--batch-frames"]),
        ("ablate", ["--out", "--seeds", "--config", "--corruption"]),
        ("audit", ["--model"]),
    ],
)
def test_help_names_the_options(command, options, run):
    _, out, _ = run(command, "--help")
    for option in options:
        assert option in out


def test_version(run):
    assert run("--version") == (0, f"m3er-fast {__version__}\n", "")


def test_the_console_entry_point_exits_with_the_code_of_main():
    program = "import sys; from m3er_fast.cli import main; sys.exit(main())"
    found = subprocess.run(
        [sys.executable, "-c", program, "score"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert_one_line(found.stderr, "CORPUS", "m3er-fast score --help")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing command", "m3er-fast --help"]),
        (["scor"], ["scor"]),
        (["score"], ["CORPUS"]),
        (["score", "x", "--out", "y"], ["--model"]),
        (["train", "x", "--out", "y", "--epoch", "3"], ["--epoch"]),
        (["train", "x", "--out", "y", "--epochs", "three"], ["--epochs", "integer"]),
        (["train", "nowhere", "--out", "y"], ["nowhere"]),
        (["convert", "nowhere", "--format", "xml", "--out", "y"], ["xml", "mfn-h5"]),
        (["convert", "nowhere", "--format", "csd", "--out", "y"], ["nowhere"]),
        (["ablate", "x", "--out", "y", "--seeds", "0"], ["--seeds"]),
        (["ablate", "x", "--out", "y", "--corruption", "hum"], ["--corruption", "gaussian_noise", "hum"]),
        (["ablate", "x", "--out", "y", "--corruption", "gain:harsh"], ["--corruption", "mild", "harsh"]),
        (["audit", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert_one_line(error, *words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--address", "auto"], ["address", "engine 'ray'"]),
        (["--engine", "dask"], ["dask"]),
        (["--batch-frames", "0"], ["--batch-frames", "auto"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--model", "nowhere"], ["nowhere: no such folder"]),
    ],
)
def test_bad_score_options_are_one_line_and_exit_code_2(options, words, run, corpus_dir, model_dir, tmp_path):
    code, out, error = run("score", corpus_dir, "--model", model_dir, "--out", tmp_path / "out", *options)
    assert (code, out) == (2, "")
    assert_one_line(error, *words)
    assert not (tmp_path / "out").exists()


def test_without_typer_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["info"]) == 2
    assert_one_line(capsys.readouterr().err, "pip install 'm3er-fast[score]'")


# --- other errors ---


@pytest.fixture
def failing(monkeypatch, corpus_dir, model_dir, tmp_path):
    """Make score fail, and return the arguments to run it with."""

    def failing(failure):
        def score(*_args, **_options):
            if isinstance(failure, BaseException):
                raise failure
            failure()

        monkeypatch.setattr(scoring, "score", score)
        return ["score", corpus_dir, "--model", model_dir, "--out", tmp_path / "out"]

    return failing


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeError("the sky\nfell"), 1, ["RuntimeError: the sky fell", "--debug"]),
        (KeyError("x"), 1, ["KeyError"]),
        (OSError(errno.EIO, "Input/output error"), 1, ["Input/output error"]),
        (ValueError("threshold must be small"), 2, ["threshold must be small"]),
        (ImportError("needs h5py: pip install 'm3er-fast[hdf5]'"), 2, ["m3er-fast[hdf5]"]),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, ["Permission denied: 'out'"]),
        (OSError(errno.EROFS, "Read-only file system"), 2, ["Read-only"]),
        (OSError("Bucket 'x' not found."), 2, ["error: Bucket 'x' not found."]),
        (scoring.OutputMismatchError("out holds scores made with another model"), 4, ["another model"]),
        (OSError(errno.ENOSPC, "No space left on device"), 5, ["disk full"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 5, ["disk full"]),
        (Exception("I/O error: No space left on device (os error 28)"), 5, ["disk full"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_are_one_line_and_their_exit_code(error, code, words, failing, run):
    found, out, line = run(*failing(error))
    assert (found, out) == (code, "")
    assert_one_line(line, *words)


def test_a_full_disk_behind_another_error_is_still_a_full_disk(failing, run):
    error = RuntimeError("unexpected pos 640")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert run(*failing(error))[0] == 5


@pytest.mark.parametrize("first", [True, False])
def test_debug_anywhere_shows_the_traceback(first, failing, run):
    arguments = failing(RuntimeError("the sky fell"))
    code, _, error = run(*(["--debug", *arguments] if first else [*arguments, "--debug"]))
    assert code == 1
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("m3er-fast: error: RuntimeError: the sky fell")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_interrupt_with_130_and_handlers_are_restored(number, failing, run, request):
    # A test suite that a script runs in the background inherits a Ctrl-C that is ignored.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))
    before = signal.getsignal(signal.SIGTERM)

    def wait():
        os.kill(os.getpid(), number)
        time.sleep(10)

    code, _, error = run(*failing(wait))
    assert code == 130
    assert_one_line(error, "interrupted")
    assert signal.getsignal(signal.SIGTERM) is before


def test_warnings_are_one_line_each(failing, run):
    _, _, error = run(*failing(lambda: warnings.warn("few\nsamples", UserWarning, stacklevel=1)))
    assert error.splitlines()[0] == "m3er-fast: warning: few samples"


# --- score ---


def test_score_writes_scores_and_prints_their_number(corpus, corpus_dir, model_dir, tmp_path, run):
    code, out, error = run("score", corpus_dir, "--model", model_dir, "--out", tmp_path / "out")
    assert (code, error) == (0, "")
    assert "200 utterances in 4 shards" in out
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert table["id"].to_pylist() == corpus.ids[:64].tolist()


def test_score_refuses_resumes_and_refuses_another_model(corpus, corpus_dir, model_dir, tmp_path, run):
    arguments = ["score", corpus_dir, "--model", model_dir, "--out", tmp_path / "out"]
    assert run(*arguments, "--resume")[0] == 0
    code, _, error = run(*arguments)
    assert code == 2
    assert_one_line(error, "is not empty")
    code, out, _ = run(*arguments, "--resume")
    assert code == 0
    assert "4 of them by an earlier run" in out
    save_model(corpus, tmp_path / "other", seed=1)
    code, _, error = run("score", corpus_dir, "--model", tmp_path / "other", "--out", tmp_path / "out", "--resume")
    assert code == 4
    assert_one_line(error, "another model")


def test_score_with_a_bad_shard_finishes_with_exit_code_3(corpus, model_dir, tmp_path, run):
    for path in write_parquet(corpus, tmp_path / "corpus", rows_per_shard=64)[1:2]:
        path.write_bytes(b"damaged")
    code, out, error = run("score", tmp_path / "corpus", "--model", model_dir, "--out", tmp_path / "out")
    assert code == 3
    assert "136 utterances in 3 shards" in out
    assert error.count("\n") == 1
    assert "part-00001.parquet" in error
    assert "_quarantine.json" in error


def test_score_of_a_corpus_with_an_unknown_modality_names_both_sides(corpus, corpus_dir, tmp_path, run):
    part = dataclasses.replace(
        corpus, features={n: corpus.features[n] for n in ("text", "audio")}, available=corpus.available[:, :2]
    )
    save_model(part, tmp_path / "model")
    code, _, error = run("score", corpus_dir, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert code == 2
    assert_one_line(error, "['face']", "['text', 'audio']")


# --- convert, audit, info ---


def test_convert_writes_a_corpus_that_scores(tmp_path, run):
    rng = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    for split, rows in (("train", 30), ("test", 10)):
        labels = rng.integers(0, 2, rows)
        for name, dim in (("text", 3), ("audio", 2)):
            table = np.column_stack([rng.standard_normal((rows, dim)), labels])
            np.savetxt(tmp_path / "source" / f"{name}_{split}.csv", table, delimiter=",", fmt=["%.5f"] * dim + ["%d"])
    code, out, error = run("convert", tmp_path / "source", "--format", "utterance-csv", "--out", tmp_path / "corpus")
    assert (code, error) == (0, "")
    assert "40 utterances" in out
    assert "text 3, audio 2" in out
    assert run("audit", tmp_path / "corpus")[0] == 0


def test_convert_refuses_a_folder_that_holds_a_corpus(corpus_dir, tmp_path, run):
    np.savetxt(tmp_path / "text_train.csv", [[0.5, 1]], delimiter=",", fmt=["%.1f", "%d"])
    np.savetxt(tmp_path / "audio_train.csv", [[0.5, 1]], delimiter=",", fmt=["%.1f", "%d"])
    code, _, error = run("convert", tmp_path, "--format", "utterance-csv", "--out", corpus_dir)
    assert code == 2
    assert_one_line(error, str(corpus_dir))


def test_audit_reports_and_prints_json(corpus_dir, run):
    code, out, _ = run("audit", corpus_dir)
    assert code == 0
    assert "200 utterances" in out
    assert "ineffectual" not in out
    code, out, _ = run("audit", corpus_dir, "--json")
    assert code == 0
    assert json.loads(out)["utterances"] == 200


def test_audit_with_a_model_finds_the_modality_that_is_noise(corpus, model_dir, tmp_path, run):
    rng = np.random.default_rng(0)
    noise = (10 * rng.standard_normal(corpus.features["audio"].shape)).astype(np.float32)
    absent = corpus.available.copy()
    absent[:, 2] = False
    noisy = dataclasses.replace(corpus, features={**corpus.features, "audio": noise}, available=absent)
    write_parquet(noisy, tmp_path / "corpus")
    code, out, _ = run("audit", tmp_path / "corpus", "--model", model_dir, "--json")
    assert code == 0
    shares = json.loads(out)["ineffectual"]
    assert shares["audio"] > 0.95
    assert shares["text"] < 0.15
    assert shares["face"] is None
    reasons = json.loads(out)["ineffectual_reason"]
    assert reasons["audio"] in ("too loud", "noisy")
    assert reasons["face"] is None
    _, out, _ = run("audit", tmp_path / "corpus", "--model", model_dir)
    assert "face: never available" in out
    assert f"looks ineffectual, most often: {reasons['audio']}" in out


def test_audit_reports_an_empty_corpus(corpus, model_dir, tmp_path, run):
    write_parquet(corpus.select(slice(0, 0)), tmp_path / "corpus")
    code, out, error = run("audit", tmp_path / "corpus", "--model", model_dir)
    assert (code, error) == (0, "")
    assert "the corpus is empty" in out


def test_info_shows_what_works_and_the_reason_for_the_rest(run):
    code, out, error = run("info")
    assert (code, error) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["m3er-fast", "works", __version__] in lines
    assert ["fusion_loss", "torch", "works"] in [line[:3] for line in lines]
    for name in ("cpu", "triton", "faiss", "cupy", "pyarrow", "h5py", "matplotlib", "ray"):
        assert f"\n  {name} " in out
    if not torch.cuda.is_available():
        assert ["cuda", "no", "torch"] in [line[:3] for line in lines]


def test_info_tries_every_back_end_of_every_operation():
    tried = [finding.name for finding in environment.try_backends()]
    dispatched = [f"{operation} {name}" for operation in OPERATIONS for name in backends(operation)]
    searches = [f"nearest_neighbors {engine}" for engine in get_args(NeighborEngine) if engine != "auto"]
    assert sorted(tried) == sorted(dispatched + searches)


def findings(monkeypatch, package, load, distributions):
    def import_module(name):
        if name == package:
            return load()
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {package: distributions})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(importlib, "import_module", import_module)
    return {finding.name: finding for finding in environment.describe_environment()["packages"]}


def test_info_reports_a_faiss_that_does_not_load(monkeypatch):
    def load():
        raise RuntimeError("libcublas.so is missing")

    found = findings(monkeypatch, "faiss", load, ["faiss-gpu"])["faiss"]
    assert not found.works
    assert "faiss-gpu 1.0 does not load: libcublas.so is missing" in found.note


def test_info_reports_two_faiss_in_one_folder(monkeypatch):
    found = findings(monkeypatch, "faiss", lambda: types.ModuleType("faiss"), ["faiss-gpu", "faiss-cpu"])["faiss"]
    assert not found.works
    assert "faiss-cpu 1.0, faiss-gpu 1.0 share one folder" in found.note


def test_info_reports_a_cupy_without_a_device(monkeypatch):
    def count():
        raise RuntimeError("cudaErrorNoDevice")

    runtime = types.SimpleNamespace(getDeviceCount=count)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    found = findings(monkeypatch, "cupy", lambda: cupy, ["cupy-cuda13x"])["cupy"]
    assert not found.works
    assert "cudaErrorNoDevice" in found.note


# --- train ---


def test_train_writes_a_model_that_scores_and_resuming_it_changes_nothing(corpus_dir, tmp_path, run):
    arguments = ["train", corpus_dir, "--out", tmp_path / "run", "--epochs", "2"]
    code, out, _ = run(*arguments)
    assert code == 0
    assert "best of 2 epochs" in out
    assert "On the test split" in out
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert run(*arguments)[0] == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert run("score", corpus_dir, "--model", tmp_path / "run", "--out", tmp_path / "scores")[0] == 0
    code, _, error = run(*arguments, "--seed", "1")
    assert code == 4
    assert_one_line(error, str(tmp_path / "run"), "training.seed = 0, now 1", "--no-resume")
    assert run(*arguments, "--seed", "1", "--no-resume")[0] == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != weights


def test_train_streams_a_corpus_that_is_asked_to_be_or_outgrows_memory(corpus_dir, tmp_path, run, monkeypatch):
    code, out, _ = run("train", corpus_dir, "--out", tmp_path / "a", "--epochs", "1", "--stream", "--buffer", "32")
    assert code == 0
    assert "it is streamed" not in out
    assert "On the test split" in out
    monkeypatch.setattr("m3er_fast.training.stream.memory_bytes", lambda: 1000)
    code, out, _ = run("train", corpus_dir, "--out", tmp_path / "b", "--epochs", "1")
    assert code == 0
    assert f"{corpus_dir} outgrows the memory of this machine: it is streamed" in out
    readings = []
    for name in ("a", "b"):
        fingerprint = json.loads((tmp_path / name / "history.json").read_text())["fingerprint"]
        readings.append((fingerprint["reading"], fingerprint["buffer"]))
    assert readings[0] == ("streamed", 32)
    assert readings[1][0] == "streamed"
    assert readings[1][1] > 200  # the whole corpus
    code, _, error = run("train", corpus_dir, "--out", tmp_path / "c", "--no-stream", "--buffer", "32")
    assert code == 2
    assert_one_line(error, "--buffer", "the corpus is not streamed: give --stream too")


def test_train_takes_a_device_and_a_precision(corpus_dir, tmp_path, run):
    options = ("--device", "cpu", "--precision", "bfloat16", "--epochs", "1")
    assert run("train", corpus_dir, "--out", tmp_path / "a", *options)[0] == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())["config"]
    assert config["training"]["precision"] == "bfloat16"
    for option, value in (("--device", "tpu"), ("--precision", "float16")):
        for command in ("train", "ablate"):
            code, _, error = run(command, corpus_dir, "--out", tmp_path / command, option, value)
            assert code == 2
            assert_one_line(error, option.strip("-"), repr(value))


def test_train_prints_which_splits_it_makes(corpus, tmp_path, run):
    write_parquet(dataclasses.replace(corpus, split=None), tmp_path / "none")
    _, out, _ = run("train", tmp_path / "none", "--out", tmp_path / "a", "--epochs", "1")
    assert "has no splits: split by group, train 1" in out
    split = np.where(corpus.split == "valid", "train", corpus.split)
    write_parquet(dataclasses.replace(corpus, split=split), tmp_path / "two")
    _, out, _ = run("train", tmp_path / "two", "--out", tmp_path / "b", "--epochs", "1")
    assert "has no validation split: one is taken from train, by group" in out


@pytest.fixture
def trained_with(monkeypatch):
    """The configurations that train is called with; nothing is trained."""
    import m3er_fast.training

    seen = []

    def stop(data, config, **_options):
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr(m3er_fast.training, "train", stop)
    return seen


def test_train_takes_settings_from_a_file_a_run_the_paper_and_options(
    trained_with, corpus_dir, model_dir, tmp_path, run
):
    config = M3ERConfig(check_in_training=True)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    arguments = ["train", corpus_dir, "--out", tmp_path / "run"]
    run(*arguments, "--config", tmp_path / "config.json")
    run(*arguments, "--config", model_dir / "config.json")
    run(*arguments, "--paper")
    run(*arguments, "--seed", 3, "--epochs", 4, "--batch-size", 5, "--learning-rate", 0.5)
    changes = {"seed": 3, "epochs": 4, "batch_size": 5, "learning_rate": 0.5}
    expected = M3ERConfig().replace(training=dataclasses.replace(M3ERConfig().training, **changes))
    assert trained_with == [config, M3ERConfig(), M3ERConfig.paper(), expected]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["config.json is not JSON"]),
        ("[1]", ["config.json must hold an object", "list"]),
        ('{"chekc": {}}', ["config.json", "chekc"]),
        ('{"training": {"epochs": 0}}', ["epochs", "0"]),
        ('{"library": "m3er-fast"}', ["config.json"]),
        (None, ["config.json"]),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(content, words, corpus_dir, tmp_path, run):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, _, error = run("train", corpus_dir, "--out", tmp_path / "run", "--config", tmp_path / "config.json")
    assert code == 2
    assert_one_line(error, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "name"), [("--epochs", "epochs"), ("--batch-size", "batch_size")])
def test_settings_out_of_range_are_one_line_and_exit_code_2(option, name, corpus_dir, tmp_path, run):
    code, _, error = run("train", corpus_dir, "--out", tmp_path / "run", option, "0")
    assert code == 2
    assert_one_line(error, name)


def test_config_and_paper_exclude_each_other(corpus_dir, model_dir, tmp_path, run):
    code, _, error = run(
        "train", corpus_dir, "--out", tmp_path / "run", "--paper", "--config", model_dir / "config.json"
    )
    assert code == 2
    assert_one_line(error, "--config and --paper")


# --- ablate and demo ---


class FakeResult:
    def to_markdown(self):
        return "| row | F1 |"


def test_ablate_passes_its_options_and_prints_the_table(monkeypatch, corpus_dir, tmp_path, run):
    calls, with_baselines = [], []

    def run_ablation(data, config, *, seeds, out, corruption, baselines, resume, device, progress, moved, resumed):
        assert (resume, device) == (True, "auto")
        with_baselines.append(baselines)
        calls.append((len(data), config.training.epochs, seeds, out, corruption))
        return FakeResult()

    monkeypatch.setitem(sys.modules, "m3er_fast.ablation", types.SimpleNamespace(run_ablation=run_ablation))
    code, out, error = run("ablate", corpus_dir, "--out", tmp_path, "--seeds", "2", "--epochs", "7")
    assert (code, error) == (0, "")
    assert "| row | F1 |" in out
    assert str(tmp_path) in out
    assert calls == [(200, 7, 2, tmp_path, "gaussian_noise")]
    assert run("ablate", corpus_dir, "--out", tmp_path, "--corruption", "gain:mild", "--no-baselines")[0] == 0
    assert calls[1][-1] == "gain:mild"
    assert with_baselines == [True, False]


def test_demo_goes_to_runs_demo_and_prints_the_table(monkeypatch, run):
    calls = []

    def run_demo(out, *, progress, moved, resumed):
        calls.append(out)
        return FakeResult()

    monkeypatch.setitem(sys.modules, "m3er_fast.demo", types.SimpleNamespace(run_demo=run_demo))
    code, out, error = run("demo")
    assert (code, error) == (0, "")
    assert "| row | F1 |" in out
    assert calls == [Path("runs/demo")]


# --- progress ---


def test_progress_is_log_lines_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressDisplay("score", "shards", log_seconds=0) as display:
        display.update(1, 4, "64 utterances")
        display.say("writing")
    out, error = capsys.readouterr()
    assert out == ""
    first, second = error.splitlines()
    assert first.startswith("score: 1 of 4 shards, ")
    assert first.endswith(" s left, 64 utterances")
    assert second == "score: writing"
    assert "\r" not in error
    assert "\x1b" not in error


def test_log_lines_are_at_least_log_seconds_apart(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("m3er_fast.cli.progress.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with ProgressDisplay("train", log_seconds=10) as display:
        for step in range(20):
            display.say(f"step {step}")
    steps = [int(line.split()[-1]) for line in capsys.readouterr().err.splitlines()]
    assert len(steps) == 6
    assert all(later - earlier == 3 for earlier, later in itertools.pairwise(steps))


def test_on_a_terminal_progress_is_a_bar_that_leaves_nothing_behind(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressDisplay("score", "shards") as display:
        display.update(3, 4, "192 utterances")
    written = terminal.getvalue()
    assert "score" in written
    assert "3/4" in written
    assert "192 utterances" in written
    assert written.endswith("\x1b[2K")
