"""The command line at terminals that lack characters, in closed pipes, and for words that it does not know."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from m3er_fast._validation import near_names
from m3er_fast.cli import COMPLETE, INTERRUPTED, OUTPUT_CLOSED, USAGE, main

ROOT = Path(__file__).parents[1]
# What an ablation prints, without the ablation.
PRINTS = """
import sys, types
class Result:
    def to_markdown(self):
        return "| M3ER \\u2013 proxy | 0.5 \\xb1 0.1 |\\n" * {lines}
def run_ablation(data, config, **_options):
    return Result()
sys.modules["m3er_fast.ablation"] = types.SimpleNamespace(run_ablation=run_ablation)
"""
MAIN = "import sys; from m3er_fast.cli import main; sys.exit(main())"


def start(*arguments, lines=1, **environment):
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PRINTS.format(lines=lines) + MAIN, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    from m3er_fast.corpus import write_parquet
    from m3er_fast.corpus.synthetic import make_synthetic

    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(make_synthetic(40, input_dims={"text": 3, "audio": 2}, num_classes=2, steps=2), folder)
    return folder


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=["ascii", "C", "latin-1"],
)
def test_characters_that_the_terminal_lacks_are_replaced(environment, corpus_dir, tmp_path):
    process = start("ablate", corpus_dir, "--out", tmp_path / "out", **environment)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (COMPLETE, b"")
    plus_minus = b"\xb1" if "latin-1" in environment.values() else b"?"
    assert b"| M3ER ? proxy | 0.5 " + plus_minus + b" 0.1 |" in out


def test_an_error_of_characters_that_the_terminal_lacks_is_one_line(tmp_path):
    process = start("audit", tmp_path / "köln", PYTHONIOENCODING="ascii")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (USAGE, b"")
    assert error.endswith(b"k?ln: no such file or folder\n")


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_tables_fold_to_the_width_of_a_terminal():
    import pty

    table = "| Experiment | Overall F1 |\\n|---|---:|\\n| " + "a long name " * 10 + "| 0.5 |"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", f"from m3er_fast.cli.tables import print_markdown; print_markdown('{table}')"],
        stdout=theirs,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "40", "TERM": "xterm"},
    )
    assert process.wait(timeout=60) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", os.read(ours, 10_000).decode())
    os.close(ours)
    os.close(theirs)
    assert "Overall F1" in shown
    assert "|" not in shown
    assert max(map(len, shown.splitlines())) <= 40


def test_streams_are_left_as_they_were(capsys):
    before = sys.stdout.errors
    assert main(["--version"]) == COMPLETE
    assert sys.stdout.errors == before


@pytest.mark.parametrize("closed", ["stdout", "both"])
@pytest.mark.parametrize(
    ("arguments", "lines"), [(["ablate"], 1), (["ablate"], 10_000), (["info"], 1), (["--help"], 1), (["scor"], 1)]
)
def test_a_closed_pipe_ends_quietly(closed, arguments, lines, corpus_dir, tmp_path):
    if arguments == ["scor"] and closed == "stdout":
        closed = "both"  # it prints to stderr alone
    if arguments == ["ablate"]:
        arguments = ["ablate", corpus_dir, "--out", tmp_path / "out"]
    process = start(*arguments, lines=lines)
    process.stdout.close()
    if closed == "both":
        process.stderr.close()
        assert process.wait(timeout=60) == OUTPUT_CLOSED
    else:
        error = process.stderr.read()
        assert (process.wait(timeout=60), [line for line in error.splitlines() if b"clustering" not in line]) == (
            OUTPUT_CLOSED,
            [],
        )


def test_a_broken_pipe_elsewhere_is_an_error(monkeypatch, tmp_path, capsys):
    import m3er_fast.corpus

    def lost(*_arguments, **_options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(m3er_fast.corpus, "convert", lost)
    assert main(["convert", str(tmp_path), "--format", "csd", "--out", str(tmp_path / "out")]) == 1
    assert "BrokenPipeError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "function", "arguments", "way_on"),
    [
        ("training", "train", ["train", "CORPUS", "--out", "OUT"], "the same command goes on"),
        (
            "training",
            "train",
            ["train", "CORPUS", "--out", "OUT", "--no-resume"],
            "the same command without --no-resume goes on",
        ),
        ("ablation", "run_ablation", ["ablate", "CORPUS", "--out", "OUT"], "the same command goes on"),
        ("demo", "run_demo", ["demo", "--out", "OUT"], "the same command goes on"),
        ("scoring", "score", ["score", "CORPUS", "--model", "MODEL", "--out", "OUT"], "the same command with --resume"),
    ],
)
def test_an_interrupt_says_how_to_go_on(module, function, arguments, way_on, corpus_dir, tmp_path, monkeypatch, capsys):
    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"m3er_fast.{module}"), function, stop)
    monkeypatch.setattr(importlib.import_module("m3er_fast.scoring"), "load_model", lambda path: None)
    places = {"CORPUS": corpus_dir, "OUT": tmp_path / "out", "MODEL": tmp_path}
    assert main([str(places.get(word, word)) for word in arguments]) == INTERRUPTED
    assert capsys.readouterr().err.startswith(f"m3er-fast: error: interrupted: {way_on}")


def test_a_resumed_training_says_from_where(corpus_dir, tmp_path, monkeypatch, capsys):
    state = importlib.import_module("m3er_fast.training.state").TrainingState
    save = state.save

    def save_and_stop(self, path):
        save(self, path)
        raise KeyboardInterrupt

    arguments = ["train", str(corpus_dir), "--out", str(tmp_path / "run"), "--epochs", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(state, "save", save_and_stop)
        assert main(arguments) == INTERRUPTED
    capsys.readouterr()
    assert main(arguments) == COMPLETE
    assert f"train: {tmp_path / 'run'} goes on after epoch 1\n" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["-h"], ["train", "-h"], ["score", "-h"]])
def test_h_is_help(arguments, capsys):
    assert main(arguments) == COMPLETE
    assert capsys.readouterr().out.startswith("Usage: m3er-fast")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "x", "--lr", "1"],
            "No such option: --lr, did you mean --learning-rate? (see m3er-fast train --help)",
        ),
        (["train", "x", "--epoch", "1"], "No such option: --epoch, did you mean --epochs? (see"),
        (["train", "x", "--output", "y"], "No such option: --output, did you mean --out? (see"),
        (["train", "x", "--bs", "1"], "No such option: --bs, did you mean --batch-size? (see"),
        (["score", "x", "--model-dir", "y"], "No such option: --model-dir, did you mean --model? (see"),
        (["convert", "x", "--formt", "csd"], "No such option: --formt, did you mean --format? (see"),
        (["train", "x", "--zzz"], "No such option: --zzz (see m3er-fast train --help)"),
    ],
)
def test_an_option_that_does_not_exist_has_near_names(arguments, message, capsys):
    assert main(arguments) == USAGE
    assert capsys.readouterr().err.startswith(f"m3er-fast: error: {message}")


@pytest.mark.parametrize(
    ("name", "names", "wanted"),
    [
        ("lr", ["lead", "learning_rate"], ", did you mean learning_rate?"),
        ("chekc", ["check", "proxy"], ", did you mean check?"),
        ("check", ["check"], ", did you mean check?"),
        ("x", ["xylophone"], ""),
        ("", ["a"], ""),
        ("a", [], ""),
    ],
)
def test_near_names(name, names, wanted):
    assert near_names(name, names) == wanted
