"""Imports point one way: each rule of docs/architecture.md, held by the package and broken by a planted module.

Imports inside functions and for type checkers count as well. The package's own ``__init__``, which re-exports the
public names, stands above all layers; inside the package only ``__version__`` is imported from it.
"""

import ast
import graphlib
import os
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "m3er_fast"

# From top to bottom. A module may import those of its own line and of the lines below.
LAYERS = (
    "cli",
    "demo recordings_demo",
    "ablation _ablation_figures _ablation_table baselines",
    "corpus_evaluation evaluation_page",
    "training evaluation",
    "recordings scoring",
    "fitting",
    "execution shards",
    "corpus corruption metrics _answer_counts plots",
    "export verification",
    "fusion",
    "hub distributed",
    "check proxy network loss temperature cuda_graphs",
    "standardize _check_calibration _combined_score _conformal _cross_fitting _symptoms "
    "_proxy_bank _proxy_basis _proxy_maps _proxy_operator _proxy_regression",
    "_canonical cca moments inputs config",
    "functional",
    "cpu kernels neighbors",
    "reference",
    "operands fitted_module",
    "report_sections",
    "html_page",
    "_layer_weights _settings _validation _warnings atomic_files",
)

# The only module outside each of these that imports it.
CHOSEN_BY = dict.fromkeys(("cpu", "kernels", "neighbors.faiss"), "functional._dispatch")

# Everything of the project that they import.
PROJECT_IMPORTS = {
    "corpus": "corpus atomic_files _validation",
    "cpu": "cpu operands",
    "kernels": "kernels operands reference",
    "plots": "",
}

# Everything that they import besides the project and the standard library.
OTHER_IMPORTS = {"kernels": "torch triton", "kernels.local_lstsq_cupy": "torch cupy cupyx"}


def read_imports(package):
    """Return the names that each module imports: those of the package relative to it, all others after a slash."""
    paths = [Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names]
    modules = {module_name(path.relative_to(package)): path for path in paths if path.suffix == ".py"}

    def relative(name):
        inside = f"{name}.".startswith(f"{package.name}.")
        return name[len(package.name) + 1 :] if inside else f"/{name}"

    imports = {}
    for module, path in modules.items():
        found = imports[module] = set()
        folders = (package.name, *path.relative_to(package).parent.parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(relative(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = folders[: len(folders) - node.level + 1] if node.level else ()
                source = relative(".".join([*start, *filter(None, [node.module])]))
                for alias in node.names:
                    submodule = f"{source}.{alias.name}".lstrip(".")
                    if submodule in modules:
                        found.add(submodule)
                    elif (source, alias.name) != ("", "__version__"):
                        found.add(source)
    return imports


def module_name(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_in(name, parts):
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def project_imports(imports):
    """Yield each module with each name of the project that it imports; the package's own ``__init__`` is left out."""
    for module, names in sorted(imports.items()):
        for name in sorted(names):
            if module and not name.startswith("/"):
                yield module, name


def upward_imports(imports):
    def layer(name):
        return next((number for number, line in enumerate(LAYERS) if is_in(name, line.split())), -1)

    return [f"{module} -> {name}" for module, name in project_imports(imports) if layer(name) < layer(module)]


def modules_without_layer(imports):
    return [name for name in imports if name and sum(is_in(name, line.split()) for line in LAYERS) != 1]


def circles(imports):
    graph = {}
    for module, name in project_imports(imports):
        graph.setdefault(module, set()).add(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def implementations_chosen_elsewhere(imports):
    return [
        f"{module} -> {name}"
        for module, name in project_imports(imports)
        for part, chooser in CHOSEN_BY.items()
        if is_in(name, [part]) and not is_in(module, [part]) and module != chooser
    ]


def imports_beyond_the_allowed(imports):
    found = []
    for module, names in sorted(imports.items()):
        for part, allowed in PROJECT_IMPORTS.items():
            if is_in(module, [part]):
                found += [f"{module} -> {x}" for x in sorted(names) if x[:1] != "/" and not is_in(x, allowed.split())]
        parts = [part for part in OTHER_IMPORTS if is_in(module, [part])]
        if parts:
            allowed = OTHER_IMPORTS[max(parts, key=len)].split()
            others = {name.removeprefix("/").partition(".")[0] for name in names if name.startswith("/")}
            found += [f"{module} -> {x}" for x in sorted(others - set(allowed) - set(sys.stdlib_module_names))]
    return found


RULES = (
    modules_without_layer,
    upward_imports,
    circles,
    implementations_chosen_elsewhere,
    imports_beyond_the_allowed,
)


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule):
    assert rule(read_imports(PACKAGE)) == []


@pytest.mark.parametrize(
    ("rule", "module", "text", "violation"),
    [
        (modules_without_layer, "helpers", "", "helpers"),
        (
            upward_imports,
            "reference.loss",
            "from m3er_fast.functional import loss",
            "reference.loss -> functional",
        ),
        (upward_imports, "inputs", "def f():\n    import m3er_fast.check", "inputs -> check"),
        (upward_imports, "operands", "from m3er_fast import M3ERFusion", "operands -> "),
        (upward_imports, "functional._loss", "from .. import loss", "functional._loss -> loss"),
        (circles, "corpus.base", "from m3er_fast.corpus import audit", "corpus.audit -> corpus.base -> corpus.audit"),
        (
            implementations_chosen_elsewhere,
            "network",
            "from m3er_fast.cpu import loss",
            "network -> cpu.loss",
        ),
        (
            implementations_chosen_elsewhere,
            "functional._neighbors",
            "from m3er_fast.neighbors.faiss import FaissIndex",
            "functional._neighbors -> neighbors.faiss",
        ),
        (imports_beyond_the_allowed, "cpu.loss", "from m3er_fast import reference", "cpu.loss -> reference"),
        (imports_beyond_the_allowed, "corpus.base", "from m3er_fast.inputs import x", "corpus.base -> inputs"),
        (imports_beyond_the_allowed, "plots", "from m3er_fast.metrics import f1", "plots -> metrics"),
        (imports_beyond_the_allowed, "kernels.loss", "import numpy as np", "kernels.loss -> numpy"),
        (imports_beyond_the_allowed, "kernels.loss", "import cupy", "kernels.loss -> cupy"),
    ],
)
def test_a_planted_module_breaks_the_rule(rule, module, text, violation, tmp_path):
    allowed = {
        "": "from m3er_fast.check import ModalityCheck",
        "check": "import torch\nfrom m3er_fast import __version__, functional",
        "corpus.audit": "from m3er_fast.corpus.base import Corpus",
        "corpus.base": "",
        "cpu.loss": "from m3er_fast import operands",
        "functional": "from m3er_fast.functional._dispatch import choose",
        "functional._dispatch": "from m3er_fast.cpu import loss\nfrom m3er_fast.neighbors import faiss",
        "inputs": "",
        "kernels.local_lstsq_cupy": "import math\nimport cupy",
        "loss": "",
        "metrics": "",
        "neighbors.faiss": "import faiss",
        "operands": "",
        "reference": "",
    }
    package = tmp_path / "m3er_fast"
    write_modules(package, allowed)
    assert [broken for rule in RULES for broken in rule(read_imports(package))] == []
    write_modules(package, {module: text})
    assert rule(read_imports(package)) == [violation]


def write_modules(package, texts):
    for module, text in texts.items():
        folder = package.joinpath(*module.split("."))
        is_package = module in ("", "functional", "reference")
        path = folder / "__init__.py" if is_package else folder.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
