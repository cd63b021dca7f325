"""Batches of one shape through recorded graphs: on a GPU CUDA's, elsewhere a stand-in that runs the function again."""

import warnings

import pytest
import torch
from device_waits import counted_waits
from sklearn.exceptions import NotFittedError
from test_fusion import FIELDS, assert_same, build, rows_of, sequences
from torch.utils import _pytree as pytree

from m3er_fast import M3ERConfig, _proxy_maps, cuda_graphs, fusion, standardize
from m3er_fast.config import CheckConfig, ProxyConfig
from m3er_fast.functional._dispatch import OPERATIONS
from m3er_fast.neighbors import ExactIndex

CONFIGS = {
    "default": M3ERConfig(),
    "threshold": M3ERConfig(check=CheckConfig(statistic="correlation", threshold=0.1)),
    "neighbours": M3ERConfig(proxy=ProxyConfig(bank="neighbours")),
    "basis": M3ERConfig(proxy=ProxyConfig(bank="basis")),
    "no proxies": M3ERConfig(proxy=None),
    "no check": M3ERConfig(check=None),
}


class Rerun:
    """A stand-in for a CUDA graph: the same function of the same tensors, its result where the first one was."""

    def __init__(self, function, device):
        self.function, self.result = function, pytree.tree_map_only(torch.Tensor, torch.clone, function())

    def replay(self):
        for old, new in zip(pytree.tree_leaves(self.result), pytree.tree_leaves(self.function()), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
            else:
                assert old == new  # a graph would not compute it again
        return self.result


@pytest.fixture
def recording(monkeypatch, device):
    if device.type == "cpu":
        monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
        monkeypatch.setattr(cuda_graphs, "Recording", Rerun)
    return device


def fitted(config=None, device="cpu"):
    return build(config).fit(sequences(300)).eval().to(device)


def batch_on(device, n=6, seed=1):
    features = sequences(n, seed=seed)
    features["audio"][: n // 2] *= 40.0
    return {name: x.to(device) for name, x in features.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_recorded_model_answers_as_the_model_does(recording, config):
    model = fitted(config, recording)
    compiled = model.compile_for_inference(6, steps=4)
    assert compiled.is_recorded
    for seed in (1, 2):
        features = batch_on(recording, seed=seed)
        assert_same(compiled(features), model(features), tolerance=1e-5)
        lengths = torch.tensor([4, 3, 2, 1, 0, 4], device=recording)
        available = torch.ones(6, 3, dtype=torch.bool, device=recording)
        available[1, 0] = False
        assert_same(compiled(features, lengths, available), model(features, lengths, available), tolerance=1e-5)
        assert_same(compiled({**features, "face": None}), model({**features, "face": None}), tolerance=1e-5)


def test_an_output_is_not_overwritten_by_the_next(recording):
    compiled = fitted(device=recording).compile_for_inference(6, steps=4)
    first = compiled(batch_on(recording))
    kept = {name: getattr(first, name).clone() for name in FIELDS}
    compiled(batch_on(recording, seed=2))
    for name, value in kept.items():
        assert torch.equal(getattr(first, name), value), name
    assert not first.logits.requires_grad


def test_weights_that_change_in_place_are_seen(recording):
    model = fitted(device=recording)
    compiled = model.compile_for_inference(6, steps=4)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1.5)
    features = batch_on(recording)
    assert_same(compiled(features), model(features), tolerance=1e-5)


def test_a_model_that_was_fitted_anew_is_not_replayed(recording):
    model = fitted(device=recording)
    compiled = model.compile_for_inference(6, steps=4)
    model.fit({name: 2.0 * x.to(recording) for name, x in sequences(200, seed=9).items()})
    features = batch_on(recording)
    with pytest.warns(UserWarning, match="parameters or buffers have moved since it was recorded"):
        assert_same(compiled(features), model(features), tolerance=1e-6)


def test_another_shape_or_precision_goes_through_the_model_and_warns_once(recording):
    model = fitted(device=recording)
    compiled = model.compile_for_inference(6, steps=4)
    features = batch_on(recording)
    others = [rows_of(features, slice(0, 5)), {name: x.double() for name, x in features.items()}]
    for other in others:
        with pytest.warns(
            UserWarning, match=r"recorded for float32 batches of \(6, 4\) samples and steps on .* got"
        ) as w:
            assert_same(compiled(other), model(other), tolerance=1e-6)
        assert w[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled(other)
    assert_same(compiled(features), model(features), tolerance=1e-5)


def test_on_the_cpu_it_warns_and_answers():
    model = fitted()
    with pytest.warns(UserWarning, match="there are no CUDA graphs on cpu: batches go through the model itself") as w:
        compiled = model.compile_for_inference(6, steps=4)
    assert w[0].filename == __file__
    assert not compiled.is_recorded
    features = batch_on("cpu")
    with torch.no_grad():  # where nothing is trained other paths may be faster, which round otherwise
        assert_same(compiled(features), model(features), tolerance=0)
    assert not compiled(features).logits.requires_grad


def test_models_and_sizes_that_cannot_be_compiled_are_named():
    with pytest.raises(ValueError, match="the model is in train mode, wanted eval mode"):
        build().fit(sequences(100)).compile_for_inference(6)
    with pytest.raises(NotFittedError):
        build().eval().compile_for_inference(6)
    for arguments, message in (((0,), "batch_size"), ((True,), "batch_size"), ((6, 0), "steps"), ((6, 2.0), "steps")):
        with pytest.raises(ValueError, match=f"^{message} must be a positive int, got"):
            fitted().compile_for_inference(*arguments)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_whole_model_waits_for_the_device_once_at_most(config, monkeypatch):
    """A GPU is waited for by numbers that go to Python, shapes that depend on values, and tensors made of lists."""
    model = fitted(config)
    features = batch_on("cpu")
    model(features)  # the index is made ahead
    # Implementations for the CPU look at values, which is free there. Those for any device stand in for them, and
    # constants for the search and the solution.
    for operation, implementations in OPERATIONS.items():
        monkeypatch.setitem(OPERATIONS, operation, implementations[-1:])
    monkeypatch.setattr(
        ExactIndex,
        "search",
        lambda self, query, k: (query.new_ones(len(query), k), torch.arange(k).expand(len(query), -1)),
    )
    monkeypatch.setitem(
        OPERATIONS,
        "local_least_squares",
        (
            OPERATIONS["local_least_squares"][-1]._replace(
                load=lambda: (
                    lambda query, bank, targets, neighbors, *_, **options: (
                        [query.new_zeros(len(query), target.shape[1]) for target in targets],
                        None,
                    )
                )
            ),
        ),
    )
    for module in (fusion, standardize, _proxy_maps):
        monkeypatch.setattr(module, "can_look_at", lambda x: False)
    with torch.no_grad(), counted_waits(monkeypatch) as waits:
        model(features)
    searches = config.proxy is not None and config.proxy.bank == "neighbours"
    assert waits == (["tolist"] if searches else [])
