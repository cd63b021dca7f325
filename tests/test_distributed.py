"""Several processes with one fitted state: broadcast, fitted to shares, and the recipe of docs/drop_in_deploy.md."""

import contextlib
import copy
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from process_group import run_ranks

from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.config import CheckConfig, ProxyConfig
from m3er_fast.distributed import data_parallel

DIMS = {"text": 6, "audio": 4, "face": 3}
BANKS = ("regression", "neighbours", "basis")
SHARES = (slice(0, 90), slice(90, 240))
RECIPE = Path(__file__).parents[1] / "docs" / "drop_in_deploy.md"


def sequences(rows=slice(0, 240)):
    generator = np.random.default_rng(0)
    latent = generator.normal(size=(240, 3, 4))
    return {
        name: torch.from_numpy(latent @ generator.normal(size=(4, d)) + generator.normal(size=(240, 3, d))).float()[
            rows
        ]
        for name, d in DIMS.items()
    }


def availability(rows=slice(0, 240)):
    return torch.from_numpy(np.random.default_rng(1).random((240, 3)) < 0.9)[rows]


def build(bank="regression", **check):
    torch.manual_seed(0)
    proxy = ProxyConfig(bank=bank, ridge=1e-3, max_bank=200 if bank == "neighbours" else None)
    return M3ERFusion(DIMS, 3, M3ERConfig(check=CheckConfig(**check), proxy=proxy))


def message_of(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def as_one_of_two(rank, folder):
    """Everything that two processes are needed for; what is found is judged by the tests."""
    found = {"broadcast": {}, "shares": {}}
    for bank in BANKS:
        for fitted_on in ((0,), (0, 1)):
            model = build(bank)
            if rank in fitted_on:
                model.fit(sequences(SHARES[rank]), available=availability(SHARES[rank]))
            found["broadcast"][bank, fitted_on] = model.broadcast_fitted(src=fitted_on[-1]).state_dict()
        model = build(bank).fit_distributed(sequences(SHARES[rank]), available=availability(SHARES[rank]))
        found["shares"][bank] = model.state_dict()
    double = build().double().fit_distributed({name: x.double() for name, x in sequences(SHARES[rank]).items()})
    found["double"] = double.state_dict()
    without = M3ERFusion(DIMS, 3, M3ERConfig(check=None, proxy=None))
    found["without"] = without.fit_distributed(sequences(SHARES[rank])).state_dict()

    model = build()
    if rank == 0:
        model.fit(sequences())
    found["fitted on one"] = message_of(lambda: data_parallel(model))
    parallel = data_parallel(model.broadcast_fitted())
    model.loss(parallel(sequences(slice(4 * rank, 4 * rank + 4))), torch.arange(4) % 3).backward()
    found["gradients"] = [parameter.grad for parameter in model.parameters()]

    found["other settings"] = message_of(build(alpha=0.05 + 0.05 * rank).broadcast_fitted)
    found["other bank"] = message_of(build(BANKS[rank]).broadcast_fitted)
    found["no check"] = message_of(
        (M3ERFusion(DIMS, 3, M3ERConfig(check=None)) if rank else M3ERFusion(DIMS, 3)).broadcast_fitted
    )
    found["other precision"] = message_of((build().double() if rank else build()).broadcast_fitted)
    found["no such rank"] = message_of(lambda: build().broadcast_fitted(src=2))
    spoilt = {**sequences(), "text": torch.zeros(240, 3, 7)} if rank else sequences()
    found["spoilt share"] = message_of(lambda: build().fit_distributed(spoilt))
    nothing = {name: x[:0] for name, x in sequences().items()}
    found["no sample"] = message_of(lambda: build().fit_distributed(nothing))
    found["one share is empty"] = build().fit_distributed(nothing if rank else sequences()).state_dict()
    found["recipe"] = run_recipe()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(as_one_of_two, 2, tmp_path_factory.mktemp("two"))


def is_fitted_state(name):
    return not name.startswith("network.")


def assert_same_fitted(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for name in filter(is_fitted_state, wanted):
        torch.testing.assert_close(found[name], wanted[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("fitted_on", [(0,), (0, 1)], ids=str)
@pytest.mark.parametrize("bank", BANKS)
def test_broadcast_gives_the_fitted_state_of_one_rank_to_all(two, bank, fitted_on):
    share = SHARES[fitted_on[-1]]
    wanted = build(bank).fit(sequences(share), available=availability(share)).state_dict()
    for found in two:
        assert_same_fitted(found["broadcast"][bank, fitted_on], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("bank", BANKS)
def test_shares_are_fitted_as_all_of_the_data(two, bank):
    shares = two[0]["shares"][bank]
    assert_same_fitted(two[1]["shares"][bank], shares, rtol=0, atol=0)
    model = build(bank).fit(sequences(), available=availability()).eval()
    merged = copy.deepcopy(model)
    merged.load_state_dict(shares)
    lost = {**sequences(slice(0, 40)), "face": torch.zeros(40, 3, 3)}
    found, wanted = ({**m(lost)._asdict(), "state": m.state_dict()} for m in (merged, model))
    for name in ("effective", "correlation", "energy", "p_value", "reason"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)
    if bank != "basis":  # whose rows are chosen in other rounds
        torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)
    if bank == "neighbours":
        assert_same_fitted(found["state"], wanted["state"], rtol=1e-4, atol=1e-4)


def test_shares_are_fitted_in_double_precision(two):
    wanted = build().double().fit({name: x.double() for name, x in sequences().items()}).state_dict()
    for name in ("standardizer.mean_0", "modality_check.whitener_0", "proxy_generator.map_0_1"):
        torch.testing.assert_close(two[1]["double"][name].abs(), wanted[name].abs(), rtol=1e-9, atol=1e-9)


def test_a_model_without_check_and_proxies_and_a_rank_without_samples_are_fitted(two):
    wanted = build().fit(sequences()).state_dict()
    for found in two:
        assert torch.equal(found["without"]["standardizer.count"], wanted["standardizer.count"])
        assert_same_fitted(found["one share is empty"], wanted, rtol=0, atol=0)


def test_gradients_of_two_ranks_are_those_of_their_samples_together(two):
    model = build().fit(sequences())
    model.loss(model(sequences(slice(0, 8))), torch.arange(8) % 4 % 3).backward()
    for parameter, ours, theirs in zip(model.parameters(), two[0]["gradients"], two[1]["gradients"], strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "fitted on one",
            r"DifferentRanksError: data_parallel: modality_check.\S+ has shape \(.*\) on rank 0, but \(0,\) on rank 1: "
            r"the ranks are fitted differently. Call broadcast_fitted\(\) of the M3ERFusion on every rank first",
        ),
        (
            "other settings",
            "DifferentRanksError: broadcast_fitted: check.alpha is 0.05 on rank 0, but 0.1 on rank 1: .*",
        ),
        (
            "other bank",
            "DifferentRanksError: broadcast_fitted: proxy.bank is regression on rank 0, but neighbours on.*",
        ),
        ("no check", r"\S+ broadcast_fitted: check is used on rank 0, but unused on rank 1: .*"),
        (
            "other precision",
            "DifferentRanksError: broadcast_fitted: dtype of .* is torch.float32 on rank 0, but .*64.*",
        ),
        ("no such rank", "ValueError: src must be a rank from 0 to 1, got 2"),
        ("no sample", "(ValueError: features: no sample to fit.*|OtherRankError: rank 0 has failed: ValueError: .*)"),
    ],
)
def test_ranks_that_differ_raise_one_error_everywhere(two, case, message):
    for found in two:
        assert re.fullmatch(message, found[case]), found[case]


def test_what_fails_on_one_rank_is_said_on_the_others(two):
    assert two[1]["spoilt share"].startswith("ValueError: features['text'] has shape (240, 3, 7)")
    assert two[0]["spoilt share"] == f"OtherRankError: rank 1 has failed: {two[1]['spoilt share']}"


@pytest.mark.parametrize("call", [build().broadcast_fitted, lambda: build().fit_distributed(sequences())])
def test_without_a_process_group_the_error_says_how_to_make_one(call):
    with pytest.raises(RuntimeError, match=r"there is no process group: start the processes with torchrun"):
        call()


# --- the recipe ---


def run_recipe():
    """Run the page's code from the model to DDP in this process of a group, which stands in for the page's own."""
    text = RECIPE.read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    model = found[0]
    [recipe] = [block for block in found if "broadcast_fitted" in block]
    recipe, count = re.subn(r"^(meeting = .*|distributed\.(init|destroy)_process_group.*)\n", "", recipe, flags=re.M)
    assert count == 3
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for code in (model, recipe):
            exec(compile(code, str(RECIPE), "exec"), namespace)
    model = namespace["model"]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"gradients": gradients, "state": model.state_dict(), "rows": len(namespace["mine"])}


def test_the_recipe_of_the_page_runs_in_two_processes(two):
    first, second = (found["recipe"] for found in two)
    assert first["rows"] == second["rows"] == 150
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    assert first["state"]["fusion.modality_check.center_0"].shape == (16,)
    for name, value in first["gradients"].items():
        assert value is not None, name
        assert torch.equal(value, second["gradients"][name]), name
