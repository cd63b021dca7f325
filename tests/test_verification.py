"""``m3er-fast info --verify``: what is right passes, and what is wrong is named."""

import json
import math
import subprocess
import sys

import pytest
import torch

from m3er_fast import reference
from m3er_fast.cli.main import main
from m3er_fast.functional import _dispatch
from m3er_fast.verification import VERIFIED, backend_names, run, verify
from m3er_fast.verification.comparison import largest_difference

BY_NAME = {operation.name: operation for operation in VERIFIED}


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """What is timed is called as often as it must be."""
    monkeypatch.setattr(run, "_TIMED_SECONDS", 0.0)
    monkeypatch.setattr(run, "_FEWEST_TIMED", 1)


def only(monkeypatch, operation, *implementations):
    """Verify one operation, by some of its implementations."""
    monkeypatch.setattr(run, "VERIFIED", (BY_NAME[operation],))
    if implementations:
        kept = tuple(entry for entry in _dispatch.OPERATIONS[operation] if entry.name in implementations)
        monkeypatch.setitem(_dispatch.OPERATIONS, operation, kept)


def plant(monkeypatch, operation, name, wrong):
    """Let an implementation compute what ``wrong`` makes of it."""
    planted = tuple(
        entry._replace(load=lambda load=entry.load: wrong(load())) if entry.name == name else entry
        for entry in _dispatch.OPERATIONS[operation]
    )
    monkeypatch.setitem(_dispatch.OPERATIONS, operation, planted)


@pytest.mark.parametrize("operation", [*BY_NAME])
def test_everything_is_right_on_this_machine(operation, monkeypatch):
    # In the interpreter, the scan's kernels take as long as all others together.
    only(
        monkeypatch, operation, *(["cpu", "cpu, few steps", "operator", "torch"] if operation == "memory_scan" else [])
    )
    verdicts = list(verify(600))
    assert [verdict.mistakes for verdict in verdicts] == [()] * len(verdicts)
    for verdict in verdicts:
        assert verdict.operation == operation
        assert 0.0 <= verdict.share <= 1.0
        assert verdict.left_out == 0
        assert (verdict.cases == 0) == (verdict.unavailable is not None)
    assert {"torch", *backend_names(operation)} <= {verdict.implementation for verdict in verdicts}
    [eager] = [verdict for verdict in verdicts if verdict.implementation == "torch" and verdict.device == "cpu"]
    assert eager.cases == len(list(BY_NAME[operation].cases()))
    assert eager.speedup == 1.0


@pytest.mark.slow
def test_the_scans_kernels_are_right_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    only(monkeypatch, "memory_scan", "triton", "torch")
    verdicts = [verdict for verdict in verify(600) if verdict.implementation == "triton"]
    assert [(verdict.mistakes, verdict.cases, verdict.milliseconds) for verdict in verdicts] == [((), 17, None)]


@pytest.mark.gpu
def test_everything_is_right_on_the_gpu():
    verdicts = [verdict for verdict in verify(300) if verdict.device != "cpu"]
    assert [verdict.mistakes for verdict in verdicts] == [()] * len(verdicts)
    assert {verdict.operation for verdict in verdicts if verdict.cases} == {*BY_NAME}


def test_every_operation_of_the_dispatcher_is_verified():
    assert {*_dispatch.OPERATIONS, "nearest_neighbors"} == {*BY_NAME}


@pytest.mark.parametrize("operation", [*BY_NAME])
def test_the_cases_hold_what_is_hard(operation):
    names = " ".join(case.name for case in BY_NAME[operation].cases())
    for hard in ("float64", "bfloat16", "float16", "no sample|no query", "one", "1e30|1e15|NaN"):
        assert any(word in names for word in hard.split("|"))


# --- planted mistakes ---


def off_by_a_little(compute):
    return lambda *arguments, **options: compute(*arguments, **options) * (1 + 1e-4)


def wrong_gradient(compute):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, incoming):
            return incoming * 0.99

    return lambda logits, *arguments: compute(Wrong.apply(logits), *arguments)


def no_number(compute):
    return lambda *arguments: compute(*arguments) * math.nan


def too_many(compute):
    return lambda *arguments: compute(*arguments).expand(2, *compute(*arguments).shape)


def broken(compute):
    def fails(*_):
        raise RuntimeError("misaligned\naddress")

    return fails


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        (off_by_a_little, "loss: got "),
        (wrong_gradient, "gradient["),
        (no_number, "loss: got nan, wanted "),
        (too_many, "loss: got shape (2,), wanted shape ()"),
        (broken, "RuntimeError: got misaligned address, wanted a result"),
    ],
)
def test_a_wrong_implementation_is_named_with_its_case(wrong, place, monkeypatch, capsys):
    only(monkeypatch, "fusion_loss", "cpu", "torch")
    plant(monkeypatch, "fusion_loss", "cpu", wrong)
    assert main(["info", "--verify"]) == 1
    out, error = capsys.readouterr()
    assert error == ""
    assert f"wrong: fusion_loss by cpu on cpu, case 'one sample': {place}" in out
    verdicts = {line.split()[1]: line.split()[3] for line in out.splitlines() if line.startswith("  fusion_loss ")}
    assert verdicts == {"torch": "right", "cpu": "wrong"}


@pytest.mark.parametrize(
    ("operation", "name", "result"),
    [
        ("check_statistics", "cpu", 2),
        ("sequence_statistics", "cpu", 1),
        ("local_least_squares", "cpu", 1),
        ("memory_scan", "cpu, few steps", 0),
    ],
)
def test_every_result_is_compared(operation, name, result, monkeypatch):
    """One of several results is off in the last sample."""

    def wrong(compute):
        def changed(*arguments, **options):
            right = compute(*arguments, **options)
            results = list(right)
            if results[result].numel():
                results[result] = results[result].clone()
                results[result].view(-1)[-1] += 1e-2
            return right._make(results) if hasattr(right, "_make") else tuple(results)

        return changed

    only(monkeypatch, operation, name, "torch")
    plant(monkeypatch, operation, name, wrong)
    verdicts = {verdict.implementation: verdict for verdict in verify(600)}
    assert len(verdicts[name].mistakes) > 2
    assert verdicts["torch"].mistakes == ()


def test_a_search_that_misses_neighbors_is_wrong(monkeypatch):
    pytest.importorskip("faiss")
    only(monkeypatch, "nearest_neighbors")
    right = run._search_by

    def wrong(engine):
        def search(query, bank, k):
            distances, rows = right(engine)(query, bank, k)
            return distances, rows.roll(1, dims=0)

        return search if engine == "faiss" else right(engine)

    monkeypatch.setattr(run, "_search_by", wrong)
    places = {verdict.implementation: {m.place.split("[")[0] for m in verdict.mistakes} for verdict in verify(600)}
    assert places.pop("faiss") == {"distances of the rows"}
    assert set(map(len, places.values())) == {0}


# --- what is not available, and what takes too long ---


def test_what_is_not_available_is_listed_with_its_reason_and_is_no_failure(monkeypatch, capsys):
    refusal = "cupy is not installed: pip install 'm3er-fast[gpu]'"
    only(monkeypatch, "local_least_squares", "cupy", "torch")
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: None)
    assert main(["info", "--verify"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if " cupy " in line and "least" in line]
    assert line.split(maxsplit=5)[3:5] == ["not", "here"]
    assert line.endswith(refusal)


def test_cases_for_which_there_is_no_time_are_counted(monkeypatch):
    only(monkeypatch, "class_costs", "torch")
    [verdict] = verify(-1.0)
    assert (verdict.cases, verdict.left_out) == (0, len(list(BY_NAME["class_costs"].cases())))
    assert verdict.unavailable == "there was no time left"


# --- output ---


def test_json_holds_versions_verdicts_and_mistakes(monkeypatch, capsys):
    only(monkeypatch, "fusion_loss", "cpu", "torch")
    plant(monkeypatch, "fusion_loss", "cpu", no_number)
    assert main(["info", "--verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {entry["name"] for entry in found["versions"]} == {"m3er-fast", "python", "torch"}
    torch_verdict, cpu_verdict = found["verified"]
    assert torch_verdict["implementation"] == "torch"
    assert torch_verdict["mistakes"] == []
    assert torch_verdict["milliseconds"] > 0
    assert cpu_verdict["share"] is None  # infinitely far off
    assert cpu_verdict["mistakes"][0]["case"] == "one sample"
    assert "verified" not in json.loads(run_info("--json"))


def run_info(*options):
    command = [sys.executable, "-m", "m3er_fast.cli", "info", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


# --- the comparison ---


@pytest.mark.parametrize(
    ("got", "wanted", "share", "place"),
    [
        ([1.0, 2.0], [1.0, 2.5], 5.0, "x[1]"),
        ([math.nan, math.inf], [math.nan, math.inf], 0.0, "x[0]"),
        ([math.nan, 0.0], [0.0, 0.0], math.inf, "x[0]"),
        ([0.0, 0.0], [0.0, math.nan], math.inf, "x[1]"),
        ([0.0, math.inf], [0.0, -math.inf], math.inf, "x[1]"),
        ([], [], 0.0, "x"),
    ],
)
def test_the_largest_difference(got, wanted, share, place):
    found = largest_difference("x", torch.tensor(got), torch.tensor(wanted).double(), 0.1)
    assert found.share == pytest.approx(share)
    assert found.place == place


def test_a_tolerance_of_each_element_and_of_zero():
    got, wanted = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.5]])
    assert largest_difference("x", got, wanted, torch.tensor([[1.0, 0.25]])) == (2.0, "x[0, 1]", "2", "2.5")
    assert largest_difference("x", torch.tensor([3, 4]), torch.tensor([3, 5]), 0.0) == (math.inf, "x[1]", "4", "5")
    assert largest_difference("x", torch.tensor([3, 4]), torch.tensor([3, 4]), 0.0).share == 0.0


def test_other_shapes_and_kinds_of_numbers_are_wrong():
    assert largest_difference("x", torch.ones(2), torch.ones(1, 2), 1.0).share == math.inf
    assert largest_difference("x", torch.ones(2).long(), torch.ones(2), 1.0).share == math.inf


def test_the_definition_is_the_reference_in_float64():
    operation = BY_NAME["class_costs"]
    assert operation.definition is reference.class_costs
    inputs = run.in_float64(next(iter(operation.cases())).inputs)
    assert inputs["logits"].dtype == torch.float64
