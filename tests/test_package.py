"""The contents of the wheel, the cost of importing, and the public names that the documentation promises."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

import m3er_fast
from m3er_fast import corruption, functional, metrics, reference
from m3er_fast.functional._dispatch import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("triton", "faiss", "cupy", "ray", "pyarrow", "h5py", "matplotlib", "typer", "rich")
FIT = ["features", "lengths", "available"]


def run_python(*arguments, cwd=ROOT, **variables):
    command, environment = [sys.executable, *arguments], {**os.environ, **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def arguments_of(function):
    """Return the positional arguments in their order, and the names of the keyword-only ones, which have none."""
    positional, keyword_only = [], set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keyword_only.add(name)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:  # **options: Unpack[Record]
            (record,) = get_args(get_type_hints(function, include_extras=True)[name])
            keyword_only.update(get_type_hints(record))
        elif name != "self":
            positional.append(name)
    return positional, keyword_only


# --- imports ----------------------------------------------------------------------------------------------------------


# Slow to import, and needed by few functions; scikit-learn imports pandas where it is installed, and that pyarrow.
WAITING = (*OPTIONAL, "sklearn", "pandas", "scipy")
# Two names that are scikit-learn's own, or build on it.
OTHER_NAMES = [name for name in m3er_fast.__all__ if name not in ("CCA", "NotFittedError")]
ALL_BUT_CCA = "from m3er_fast import " + ", ".join(OTHER_NAMES)


@pytest.mark.parametrize(
    ("statement", "unloaded"),
    [("import m3er_fast", (*WAITING, "torch", "numpy")), (ALL_BUT_CCA, WAITING)],
    ids=["the package", "all public names but CCA"],
)
def test_import_loads_only_what_is_needed(statement, unloaded):
    result = run_python("-c", f"{statement}; import sys; print(*sorted(set({unloaded}) & set(sys.modules)))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_cca_loads_no_optional_dependency():
    # scikit-learn imports pandas where it is installed, and pandas imports pyarrow.
    script = "import sys; sys.modules['pandas'] = None; from m3er_fast import CCA; "
    script += f"print(*set({OPTIONAL}) & set(sys.modules))"
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_command_line_describes_itself_without_torch(option):
    script = f"import sys; from m3er_fast.cli import main; main([{option!r}]); print('loaded:', 'torch' in sys.modules)"
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
    assert m3er_fast.__version__ in result.stdout or "Commands:" in result.stdout
    assert result.stdout.splitlines()[-1] == "loaded: False"


def test_an_unfitted_model_raises_the_error_of_scikit_learn():
    """Its class is imported when it is raised, and is the one that callers import."""
    script = (
        "import sys, torch; from m3er_fast import ModalityCheck, ProxyGenerator\n"
        "assert 'sklearn' not in sys.modules\n"
        "features = {'a': torch.ones(1, 1, 2), 'b': torch.ones(1, 1, 2)}\n"
        "calls = (\n"
        "    lambda: ModalityCheck({'a': 2, 'b': 2}).check(features),\n"
        "    lambda: ProxyGenerator({'a': 2, 'b': 2}).proxy(features, torch.ones(1, 2, dtype=torch.bool)),\n"
        ")\n"
        "for call in calls:\n"
        "    try:\n"
        "        call()\n"
        "    except Exception as error:\n"
        "        from sklearn.exceptions import NotFittedError\n"
        "        print(type(error) is NotFittedError)"
    )
    result = run_python("-c", script)
    assert result.stdout.split() == ["True", "True"], result.stderr


OPERATOR_FILES = [path.stem for path in (ROOT / "kernels").glob("[a-z]*.py") if path.stem != "local_lstsq_cupy"]


@pytest.mark.parametrize("name", sorted(OPERATOR_FILES))
def test_a_kernel_file_refuses_its_bare_name(name):
    """A second copy would replace the operators of the first, and calling those again can crash the process."""
    pytest.importorskip("triton")
    found = importlib.util.find_spec("kernels")
    if found is not None and found.origin is not None:
        pytest.skip("another package called kernels is installed, and is found first")
    result = run_python("-c", f"import kernels.{name}")
    assert result.returncode == 1
    assert f"ImportError: import m3er_fast.kernels.{name} instead of kernels.{name}" in result.stderr


def test_another_package_called_kernels_is_found_before_the_folder_of_this_checkout(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the other package'")
    result = run_python(
        "-c", "import kernels; print(kernels.name)", PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)])
    )
    assert result.stdout == "the other package\n", result.stderr


@pytest.mark.parametrize("arguments", [["-c"], ["-m", "timeit", "-n1", "-r1"]], ids=["python -c", "python -m"])
def test_transformers_of_hugging_face_imports_its_trainer_in_this_checkout(arguments):
    """It looks for Hugging Face's package kernels, which need not be installed."""
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install transformers accelerate, with or without kernels")
    script = (
        "from transformers import Trainer; import kernels, sys; print(kernels.__file__, 'm3er_fast' in sys.modules)"
    )
    result = run_python(*arguments, script)
    assert result.returncode == 0, result.stderr
    found = result.stdout.splitlines()[0]
    installed = importlib.util.find_spec("kernels").origin
    assert found == f"{installed} False"
    assert installed is None or not Path(installed).is_relative_to(ROOT / "kernels")


def test_kernels_import_inside_the_package_without_triton():
    result = run_python("-c", "import m3er_fast.kernels as k, sys; print(k.__name__, 'triton' in sys.modules)")
    assert result.stdout.split() == ["m3er_fast.kernels", "False"], result.stderr


# --- public names -----------------------------------------------------------------------------------------------------


def test_public_names_are_found_where_they_are_defined():
    """In a fresh interpreter, in which none of them is loaded yet."""
    script = (
        "import m3er_fast, pickle, types\n"
        "assert set(m3er_fast.__all__) <= set(dir(m3er_fast))\n"
        "for name in m3er_fast.__all__:\n"
        "    value = getattr(m3er_fast, name)\n"
        "    if isinstance(value, types.ModuleType):\n"
        "        assert value.__name__ == f'm3er_fast.{name}'\n"
        "    else:\n"
        "        assert value.__name__ == name and pickle.loads(pickle.dumps(value)) is value\n"
        "from m3er_fast import *\n"
        "assert CCA is m3er_fast.CCA is m3er_fast.cca.CCA and metrics is m3er_fast.metrics\n"
        "print('found')"
    )
    result = run_python("-c", script)
    assert result.stdout == "found\n", result.stderr


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="module 'm3er_fast' has no attribute 'Fusion'"):
        m3er_fast.Fusion  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Fusion'"):
        exec("from m3er_fast import Fusion")


def test_public_names():
    assert set(m3er_fast.__all__) >= {
        *("M3ERFusion", "M3ERConfig", "M3EROutput", "ModalityCheck", "CheckResult", "ProxyGenerator"),
        *("MemoryFusionNetwork", "MultiplicativeFusionLoss", "CCA", "Standardizer", "functional", "reference"),
    }
    assert m3er_fast.__version__


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in (m3er_fast, functional) for name in module.__all__],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_public_names_and_their_methods_are_documented(module, name):
    value = getattr(module, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for attribute, method in vars(value).items():
            if callable(method) and not attribute.startswith("_"):
                assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute}"


LOSS = [
    *("variant", "beta", "detach_weight", "activation", "class_weight", "modality_weight", "available"),
    *("margin", "ignore_index", "reduction", "backend"),
]
CHECK = ["n_components", "statistic", "rule", "alpha", "threshold", "component_weights", "pooling", "ridge"]
PROXY = ["bank", "k", "ridge", "affine", "max_bank", "max_basis", "engine"]
NETWORK = ["hidden", "memory", "attention", "fusion", "head", "dropout", "feedback"]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (functional.fusion_loss, ["logits", "target", *LOSS]),
        (functional.class_costs, ["logits", "variant", "beta", "modality_weight", "available", "backend"]),
        (functional.check_statistics, ["features", "projections", "backend"]),
        (functional.sequence_statistics, ["x", "valid", "backend"]),
        (functional.nearest_neighbors, ["query", "bank", "k", "engine"]),
        (
            functional.local_least_squares,
            ["query", "bank", "targets", "neighbors", "ridge", "affine", "backend"],
        ),
        (m3er_fast.M3ERFusion, ["input_dims", "num_classes", "config"]),
        (m3er_fast.M3ERFusion.fit, FIT),
        (m3er_fast.M3ERFusion.forward, FIT),
        (m3er_fast.M3ERFusion.predict_proba, FIT),
        (m3er_fast.M3ERFusion.loss, ["output", "target"]),
        (m3er_fast.CCA, ["n_components", "ridge"]),
        (m3er_fast.CCA.fit, ["X", "Y"]),
        (m3er_fast.CCA.transform, ["X", "Y"]),
        (m3er_fast.ModalityCheck, ["input_dims", *CHECK]),
        (m3er_fast.ModalityCheck.fit, FIT),
        (m3er_fast.ModalityCheck.check, FIT),
        (m3er_fast.ProxyGenerator, ["input_dims", *PROXY]),
        (m3er_fast.ProxyGenerator.fit, FIT[:2]),
        (m3er_fast.ProxyGenerator.proxy, ["features", "effective", "lengths"]),
        (m3er_fast.MemoryFusionNetwork, ["input_dims", "num_classes", *NETWORK]),
        (m3er_fast.MultiplicativeFusionLoss, LOSS),
        (corruption.gaussian_noise, ["x", "snr", "generator"]),
        (corruption.paper_protocol, ["features", "seed"]),
        (metrics.classification_report, ["probabilities", "target", "classes"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures_begin_as_documented(function, wanted):
    """Positional arguments by name and order, keyword-only ones by name; further arguments may follow."""
    positional, keyword_only = arguments_of(function)
    assert wanted[: len(positional)] == positional[: len(wanted)]
    assert set(wanted[len(positional) :]) <= keyword_only


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (
            functional.fusion_loss,
            {"variant": "m3er", "beta": 1.0, "detach_weight": True, "activation": "softmax", "ignore_index": -100}
            | {"margin": None, "reduction": "mean", "backend": "auto"},
        ),
        (functional.class_costs, {"variant": "original", "beta": 1.0}),
        (functional.nearest_neighbors, {"engine": "auto"}),
        (functional.local_least_squares, {"ridge": 1e-3, "affine": False, "backend": "auto"}),
        (m3er_fast.CCA, {"n_components": 100, "ridge": 1e-3}),
        (
            m3er_fast.ModalityCheck,
            {"n_components": 100, "statistic": "combined", "rule": "all", "alpha": 0.05, "threshold": None}
            | {"component_weights": "canonical", "pooling": "mean", "ridge": 1e-3},
        ),
        (
            m3er_fast.ProxyGenerator,
            {"bank": "regression", "k": 16, "ridge": None, "affine": False, "max_bank": None, "max_basis": None},
        ),
        (
            m3er_fast.MemoryFusionNetwork,
            {"hidden": 32, "memory": 128, "attention": (128, 64, 64), "fusion": 32, "head": 64, "dropout": 0.0}
            | {"feedback": True},
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_defaults_are_the_documented_ones(function, wanted):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in wanted} == wanted


def test_module_and_function_of_the_loss_share_their_defaults():
    function, module = (
        inspect.signature(f).parameters for f in (functional.fusion_loss, m3er_fast.MultiplicativeFusionLoss)
    )
    assert {name: module[name].default for name in LOSS} == {name: function[name].default for name in LOSS}


def test_options_of_the_functions_are_keyword_only():
    for function in (functional.fusion_loss, functional.class_costs, functional.local_least_squares):
        for name, parameter in inspect.signature(function).parameters.items():
            has_default = parameter.default is not inspect.Parameter.empty
            assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == has_default, name


@pytest.mark.parametrize(
    ("result", "fields"),
    [
        (
            m3er_fast.M3EROutput,
            ["logits", "modality_logits", "fused", "effective", "correlation", "energy", "p_value", "abstained"],
        ),
        (m3er_fast.CheckResult, ["effective", "correlation", "energy", "p_value", "reason"]),
    ],
)
def test_results_begin_with_the_documented_fields(result, fields):
    assert list(result.__annotations__)[: len(fields)] == fields


@pytest.mark.parametrize("name", [*OPERATIONS, "nearest_neighbors"])
def test_every_operation_has_a_reference(name):
    """With the same arguments, except those that choose an implementation, its memory or a variant without one."""
    choices = {"backend", "engine", "recompute"} | ({"variant"} if name == "class_costs" else set())
    positional, keyword_only = arguments_of(getattr(functional, name))
    assert arguments_of(getattr(reference, name)) == (positional, keyword_only - choices)


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source_files():
    """The project's files as git lists them: tracked ones, and new ones that are not ignored."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git does not list the project's files here: {error}")
    return sorted({name for name in listed if (ROOT / name).is_symlink() or (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def wheel_files(source_files, tmp_path_factory):
    """The names in a wheel built from a copy of the project's files."""
    pytest.importorskip("setuptools", minversion="77", reason="a wheel is built by setuptools 77 or later")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in source_files:
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    # The build back end's hook, which pip calls; this works without pip.
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    result = run_python("-c", build, cwd=copy)
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_exactly_the_kernels_of_the_repository(source_files, wheel_files):
    shipped = {name.removeprefix("m3er_fast/") for name in wheel_files if name.startswith("m3er_fast/kernels/")}
    assert shipped == {name for name in source_files if name.startswith("kernels/") and name.endswith(".py")}
    assert shipped


def test_wheel_holds_every_module_of_the_package(source_files, wheel_files):
    modules = {name for name in source_files if name.startswith("m3er_fast/") and name.endswith(".py")}
    assert modules <= set(wheel_files)
    assert "m3er_fast/py.typed" in wheel_files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_files)


def test_wheel_installs_nothing_but_the_package(wheel_files):
    tops = {name.split("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"m3er_fast"}


# --- files beside the code -------------------------------------------------------------------------------------------


def test_citation_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)  # also required by the schema
    assert (citation["version"], citation["license"]) == (m3er_fast.__version__, "MIT")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [paper["url"] for paper in citation["references"] if paper["url"] not in readme] == []


def test_changelog_has_this_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert m3er_fast.__version__ in headings[0]
