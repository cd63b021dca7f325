"""Every command of the pages on training runs, in its order, on a small corpus in place of the page's."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import yaml

from m3er_fast import M3ERConfig
from m3er_fast.cli import main
from m3er_fast.config import TrainingConfig
from m3er_fast.corpus import write_parquet
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.training import SearchSpace, train

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("training.md", "training_scale.md")
DIMS = {"text": 6, "audio": 5, "face": 4}


def blocks(language, page="training.md"):
    """Return a page's blocks of a language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def console_commands(page):
    """Return the commands of a page, as words."""
    script = "".join(blocks("console", page)).replace("\\\n", " ")
    return [shlex.split(line) for line in script.splitlines()]


def test_weights_and_biases_gets_the_losses_in_five_lines(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, set(values))), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda project: run))
    block = next(text for text in blocks("python") if "import wandb" in text)
    assert len([line for line in block.splitlines() if line]) == 5
    corpus = make_synthetic(60, input_dims=DIMS, num_classes=3, steps=3, latent_dim=3)
    exec(block, {"train": train, "corpus": corpus, "M3ERConfig": M3ERConfig, "TrainingConfig": TrainingConfig})
    assert logged == [(1, {"train", "valid"}), (2, {"train", "valid"})]


def test_the_search_space_of_the_page_is_one():
    (block,) = blocks("yaml")
    space = SearchSpace(yaml.safe_load(block), M3ERConfig())
    assert M3ERConfig().with_settings(space.draw(1, 0)) != M3ERConfig()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs_in_order(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    corpus = make_synthetic(120, input_dims=DIMS, num_classes=3, steps=3, latent_dim=3, seed=0)
    write_parquet(corpus, "corpora/generated", rows_per_shard=50)
    commands = [words for words in console_commands(page) if words[0] != "pip"]
    assert {words[0] for words in commands} == {"m3er-fast"}
    for words in commands:
        if {"ray", "tune", "runs/tuned"} & set(words) and not request.config.getoption("--slow"):
            continue  # starting Ray takes longer than the rest of the page
        assert main(words[1:]) == 0, shlex.join(words)
