"""README.md and docs/ are true: their code runs, their commands parse, their links lead somewhere."""

import ast
import dataclasses
import json
import pydoc
import re
import runpy
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer

import m3er_fast
from m3er_fast import M3ERConfig, M3ERFusion, config, functional
from m3er_fast.ablation import AblationResult, CheckQuality
from m3er_fast.cli.commands import app
from m3er_fast.corpus import FORMATS, AuditReport, ModalityAudit
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.corpus_evaluation import Condition, CorpusEvaluation, GroupScores, SplitScores
from m3er_fast.metrics import ClassificationReport, ClassScores, Reliability
from m3er_fast.scoring import Scorer
from m3er_fast.training import train

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
OPTIONAL = ("datasets", "pandas", "polars", "wandb")  # a block that imports one that is not installed is left out
COMMON_OPTIONS = {"--debug", "--help", "--version"}


class Block(NamedTuple):
    language: str
    line: int
    text: str


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(text):
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], text[: match.start()].count("\n") + 2, match[2]) for match in found]


def prose(text):
    """Return the text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", prose(text))


def console_commands(text):
    """Return every command of the console blocks, as words."""
    script = "\n".join(block.text for block in blocks(text) if block.language == "console").replace("\\\n", " ")
    return [shlex.split(part) for line in script.splitlines() for part in line.split("&&") if part.strip()]


def section(text, heading):
    """Return the text below a second-level heading, up to the next one."""
    return re.split(r"^## ", text.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def options(command):
    return {name for option in COMMANDS[command].params for name in (*option.opts, *option.secondary_opts)}


def fields(*kinds):
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def page_id(path):
    return path.name


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_python_blocks_run_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    namespace, missing = {}, set()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(path.read_text(encoding="utf-8")):
            needed = {name for name in OPTIONAL if re.search(rf"^(import|from) {name}\b", block.text, re.MULTILINE)}
            absent = {name for name in needed if find_spec(name) is None}
            missing |= absent
            if block.language == "python" and not absent:
                exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)
    if missing:
        pytest.skip(f"some blocks need {', '.join(sorted(missing))}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page_id)
def test_notebooks_run_and_are_kept_with_what_they_show(path, tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with torch.random.fork_rng(), matplotlib.rc_context({"backend": "agg"}):
        for number, cell in enumerate(cells, 1):
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
        namespace["plt"].close("all")


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_blocks_are_of_a_language_that_is_checked_or_plain(path):
    text = path.read_text(encoding="utf-8")
    assert {block.language for block in blocks(text)} <= {"python", "console", "text", "json", "yaml"}
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(text))


@pytest.mark.parametrize("module", [m3er_fast, functional], ids=lambda module: module.__name__)
def test_every_public_name_is_used_in_a_snippet_of_the_python_pages(module):
    used = set()
    for block in blocks(page("python.md") + page("python_steps.md")):
        for node in ast.walk(ast.parse(block.text if block.language == "python" else "")):
            used |= {getattr(node, attribute, None) for attribute in ("id", "attr")}
    assert set(module.__all__) - used == set()


# --- command line -----------------------------------------------------------------------------------------------------


def test_cli_page_has_a_section_for_each_command():
    assert sorted(re.findall(r"^## m3er-fast (.+)$", page("cli.md"), re.MULTILINE)) == sorted(COMMANDS)


def test_tables_of_options_are_what_the_commands_declare():
    script = runpy.run_path(str(ROOT / "docs" / "cli_options.py"))
    assert page("cli_options.md") == script["with_tables"](page("cli_options.md")), "run python docs/cli_options.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_of_options_have_every_option(command):
    rows = re.findall(r"^\| `(--.*?)` \| ", section(page("cli_options.md"), command), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"--[a-z-]+", row)}
    assert listed == {name for name in options(command) if name.startswith("--")}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_of_console_blocks_parse(path):
    for words in console_commands(path.read_text(encoding="utf-8")):
        if Path(words[0]).name == "m3er-fast":
            command, *arguments = words[1:]
            COMMANDS[command].make_context(command, [word for word in arguments if word != "--debug"])


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_and_options_in_the_text_exist(path):
    for code in inline_code(path.read_text(encoding="utf-8")):
        if re.match(r"(\S*/)?m3er-fast [a-z]", code):
            command, *arguments = shlex.split(code)[1:]
            assert command in COMMANDS, code
            assert {word for word in arguments if word.startswith("--")} <= options(command) | COMMON_OPTIONS, code


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_files_in_the_text_exist(path):
    named = re.findall(r"(?<![\w/])(?:benchmarks|m3er_fast|tests|\.ci)/[\w/.-]*\w", path.read_text(encoding="utf-8"))
    given_by_the_reader = {"benchmarks/results/NAME.json", "benchmarks/results/my-gpu.json"}
    assert [name for name in {*named} - given_by_the_reader if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_modules_that_are_run_exist(path):
    modules = re.findall(r"python -m (benchmarks[\w.]*)", path.read_text(encoding="utf-8"))
    files = [ROOT / module.replace(".", "/") for module in modules]
    runnable = [file.with_suffix(".py").is_file() or (file / "__main__.py").is_file() for file in files]
    assert [module for module, found in zip(modules, runnable, strict=True) if not found] == []


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_tests_in_the_text_exist(path):
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    named = {code for code in inline_code(path.read_text(encoding="utf-8")) if re.fullmatch(r"test_\w+", code)}
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_exit_codes_are_those_of_the_command_line():
    from m3er_fast import cli

    listed = re.findall(r"^\| (\d+) \|", section(page("cli.md"), "Exit codes"), re.MULTILINE)
    codes = (cli.COMPLETE, cli.INTERNAL, cli.USAGE, cli.QUARANTINED, cli.MISMATCH, cli.DISK_FULL, cli.INTERRUPTED)
    assert [int(code) for code in listed] == [*codes, cli.OUTPUT_CLOSED]


# --- files and settings -----------------------------------------------------------------------------------------------


def test_formats_page_has_a_section_for_each_format():
    text = page("formats.md")
    assert [name for name in FORMATS if f"\n## {name}\n" not in text] == []


def test_columns_of_scores_are_listed():
    model = M3ERFusion({"text": 2, "audio": 2}, 2, M3ERConfig(check=None), classes=("a", "b"))
    columns = set()
    scores = Scorer(model)
    for name in {
        *scores.schema.names,
        *(n for task in ("single", "multi") for n in scores.columns.schema({}, task).names),
    }:
        name = "label_<class>" if name.startswith("label_") else name
        for instance, pattern in (("_text", "_<modality>"), ("_audio", "_<modality>"), ("p_a", "p_<class>")):
            name = name.replace(instance, pattern) if name.endswith(instance) else name
        columns.add("p_<class>" if name == "p_b" else name)
    listed = re.findall(r"^\| `([^`]+)` \| \w+ \|", section(page("cli_files.md"), "score"), re.MULTILINE)
    assert set(listed) == columns


def test_fields_of_history_are_listed(tmp_path):
    corpus = make_synthetic(60, input_dims={"text": 3, "audio": 2}, steps=2)
    settings = M3ERConfig(check=None, training=config.TrainingConfig(epochs=1))
    history = train(corpus, settings, out=tmp_path).history
    text = section(page("cli_files.md"), "train")
    files = [path.name for path in tmp_path.iterdir()]
    assert [name for name in (*history, *files) if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("ablate", set(AblationResult((), (), {}, (), {}).to_dict())),
        ("ablate", fields(CheckQuality, ClassificationReport, ClassScores, Reliability)),
        ("evaluate", fields(CorpusEvaluation, Condition, SplitScores, GroupScores)),
        ("audit", fields(AuditReport, ModalityAudit)),
    ],
    ids=["table.json", "reports", "evaluation.json", "audit"],
)
def test_fields_of_json_are_listed(command, names):
    text = section(page("cli_files.md"), command)
    assert {name for name in names if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("part", ["check", "proxy", "network", "loss", "training"])
def test_settings_are_listed_with_their_defaults(part):
    text = page("settings.md").split(f"\n## {part}\n", 1)[1].split("\n##", 1)[0]
    listed = {name: ast.literal_eval(value) for name, value in re.findall(r"^\| `(\w+)` \| `(.+?)` \|", text, re.M)}
    assert listed == vars(getattr(M3ERConfig(), part))


def test_tables_of_settings_are_what_the_settings_declare():
    script = runpy.run_path(str(ROOT / "docs" / "settings_table.py"))
    assert page("settings.md") == script["with_tables"](page("settings.md")), "run python docs/settings_table.py"


def test_architecture_page_names_every_file_of_the_package():
    files = [path for path in (ROOT / "m3er_fast").rglob("*.py") if "kernels" not in path.parts]
    assert {path.name for path in files if f"`{path.name}`" not in page("architecture.md")} == set()


def test_figure_of_the_index_is_the_one_of_its_notebook():
    script = runpy.run_path(str(ROOT / "docs" / "index_figure.py"))
    assert script["FIGURE"].read_bytes() == script["figure_of"](script["NOTEBOOK"]), "run python docs/index_figure.py"


# --- installation -----------------------------------------------------------------------------------------------------


def test_the_two_commands_of_the_readme_install_what_they_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    commands = console_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    installs = [words for words in commands if words[:2] == [".venv/bin/pip", "install"]]
    assert [words[2:4] for words in installs] == [["-c", "constraints.txt"]] * 2
    assert (ROOT / "constraints.txt").is_file()
    named = [re.fullmatch(r"\.\[(.+)\]", words[-1])[1].split(",") for words in installs]
    assert [name for names in named for name in names if name not in extras] == []
    assert [".venv/bin/m3er-fast", "demo"] in commands
    assert [".venv/bin/pytest"] in commands
    assert "m3er-fast" in project["scripts"]

    def requirements(extra):
        for line in extras[extra]:
            own = re.match(r"m3er-fast\[(.+)\]", line)
            yield from (name for inner in own[1].split(",") for name in requirements(inner)) if own else [line]

    installed = [{re.match(r"[\w-]+", line)[0] for name in names for line in requirements(name)} for names in named]
    assert installed[0] >= {"pyarrow", "typer", "rich", "matplotlib"}
    assert installed[1] >= installed[0] | {"pytest", "ruff", "mypy", "pre-commit"}


def test_extras_in_the_text_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    named = {
        name.strip() for match in re.findall(r"(?:'\.|m3er-fast)\[([\w, -]+)\]", text) for name in match.split(",")
    }
    assert named <= set(extras)
    assert named


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def test_readme_links_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT) for path in (*PAGES[1:], *NOTEBOOKS)]
    assert [str(path) for path in pages if f"]({path})" not in readme] == []


def test_functions_of_the_method_page_exist():
    names = [name for name in inline_code(section(page("method.md"), "In code")) if "." in name or name[0].isupper()]
    assert len(names) > 10
    assert [name for name in names if pydoc.locate(f"m3er_fast.{name.removeprefix('m3er_fast.')}") is None] == []
