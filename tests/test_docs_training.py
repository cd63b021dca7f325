"""Every command of docs/training.md runs, in its order, on a small corpus in place of the page's."""

import re
import shlex
from pathlib import Path

from m3er_fast.cli import main
from m3er_fast.corpus import write_parquet
from m3er_fast.corpus.synthetic import make_synthetic

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
DIMS = {"text": 6, "audio": 5, "face": 4}


def console_commands():
    """Return the commands of the page, as words."""
    text = PAGE.read_text(encoding="utf-8")
    script = "".join(re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in script.splitlines()]


def test_every_command_of_the_page_runs_in_order(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    corpus = make_synthetic(120, input_dims=DIMS, num_classes=3, steps=3, latent_dim=3, seed=0)
    write_parquet(corpus, "corpora/generated", rows_per_shard=50)
    commands = [words for words in console_commands() if words[0] != "pip"]
    assert {words[0] for words in commands} == {"m3er-fast"}
    for words in commands:
        if "ray" in words and not request.config.getoption("--slow"):
            continue  # starting Ray takes longer than the rest of the page
        assert main(words[1:]) == 0, shlex.join(words)
