"""The tables of the pages on results are those of the files in docs/results."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the scripts that measure draw figures")
from benchmarks.report import results

WITH_TABLES = [path for path in results.PAGES if results.PART.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", WITH_TABLES, ids=lambda path: path.name)
def test_tables_of_a_page_are_those_of_the_files(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("benchmarks.report.results: ") == 2 * len(results.PART.findall(text))
    assert text == results.with_tables(text), "run python -m benchmarks.report.results"


def test_every_table_is_on_a_page():
    shown = {part[1] for path in WITH_TABLES for part in results.PART.findall(path.read_text(encoding="utf-8"))}
    assert shown == set(results.TABLES)


def test_a_table_that_does_not_exist_is_refused():
    lines = [f"<!-- Written by python -m benchmarks.report.results: nothing, {edge} -->" for edge in ("begin", "end")]
    with pytest.raises(KeyError, match="nothing"):
        results.with_tables("\n".join(lines))


def row(label, bad, accuracies):
    return {"label": label, "ineffectual": bad, "seeds": [{"accuracy": accuracy} for accuracy in accuracies]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    rows = [
        row("M3ER", False, [0.8, 0.7]),
        row("M3ER", True, [0.7, 0.7]),
        row(results.NEITHER, True, [0.5, 0.6]),
        row(results.NO_PROXY, True, [0.8, 0.7]),
        row(results.MODIFIED, False, [0.9, 0.5]),
    ]
    found = {
        "rows": rows,
        "baselines": [row("Logistic regression", False, [0.9]), row("Logistic regression", True, [0.4])],
        "checks": [
            {"check": "combined", "auroc": {"a": 1.0}},
            {"check": "correlation", "auroc": {"a": 0.5, "b": None}},
        ],
        "proxy_errors": {"a": 0.5, "b": 1.25},
    }
    for name in results.CORPORA.values():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    monkeypatch.setattr(results, "RESULTS", tmp_path)


def cells(table):
    return {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in table.splitlines()[2:]}


def test_accuracies_are_mean_and_deviation_of_the_seeds(files):
    table = cells(results.everything(["CMU-MOSI"]))
    assert table["M3ER"] == [f"75.0% ± {100 * np.std([0.8, 0.7], ddof=1):.1f}%", "70.0% ± 0.0%"]
    assert table["Logistic regression"] == ["90.0%", "40.0%"]
    assert results.ORACLE not in table


def test_a_claim_holds_if_the_difference_of_the_seeds_exceeds_its_deviation(files):
    check, proxies, both, loss, areas, errors = cells(results.claims()).values()
    assert check[0] == f"yes (+20.0 ± {np.std([30, 10], ddof=1):.1f})"
    assert proxies[0] == f"within the noise (−5.0 ± {np.std([-10, 0], ddof=1):.1f})"
    assert both[0] == f"yes (+15.0 ± {np.std([20, 10], ddof=1):.1f})"
    assert loss[0] == f"within the noise (−5.0 ± {np.std([10, -20], ddof=1):.1f})"
    assert (areas[0], errors[0]) == ("0.50 to 0.50", "50% to 125%")
    assert len({len(row) for row in (check, proxies, both, loss, areas, errors)}) == 1


def test_a_claim_that_is_turned_round_is_denied(files):
    assert re.match(r"no \(−15\.0 ± 7\.1\)", results.difference("generated", results.NEITHER, "M3ER", True))
