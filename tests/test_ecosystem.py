"""The model among torch's own tools and inside other libraries."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from sklearn.exceptions import NotFittedError

from m3er_fast import M3ERConfig, M3ERFusion, MemoryFusionNetwork, ModalityCheck, ProxyGenerator, Standardizer
from m3er_fast.config import CheckConfig, LossConfig, NetworkConfig, ProxyConfig
from m3er_fast.fitted_module import size_learned

DIMS = {"text": 5, "audio": 3}
CLASSES = 2


def sequences(n, *, seed=0, dims=DIMS):
    """Two linear views of one latent, with a little noise."""
    maps, generator = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 4, 3, generator=generator)
    return {
        name: latent @ torch.randn(3, d, generator=maps) + 0.1 * torch.randn(n, 4, d, generator=generator)
        for name, d in dims.items()
    }


def small(bank="neighbours", **changes):
    torch.manual_seed(0)
    network = NetworkConfig(hidden=4, memory=4, attention=(4, 4, 4), fusion=4, head=4)
    config = M3ERConfig(network=network, check=CheckConfig(statistic="energy"), proxy=ProxyConfig(bank=bank))
    return M3ERFusion(DIMS, CLASSES, config.replace(**changes))


# --- torch.inference_mode ---


def made_and_fitted(model, _folder):
    return small(model.config.proxy.bank).fit(sequences(60))


def loaded(model, _folder):
    other = small(model.config.proxy.bank).fit(sequences(40, seed=3))
    other.load_state_dict(model.state_dict())
    return other


def loaded_unfitted(model, _folder):
    other = small(model.config.proxy.bank)
    other.load_state_dict(model.state_dict())
    return other


def copied(model, _folder):
    return copy.deepcopy(model)


def widened(model, _folder):
    return copy.deepcopy(model).double()


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return M3ERFusion.from_pretrained(folder)


def refitted(model, _folder):
    return copy.deepcopy(model).fit(sequences(60))


MAKERS = [made_and_fitted, loaded, loaded_unfitted, copied, widened, saved_and_loaded, refitted]


@pytest.mark.parametrize("bank", ["neighbours", "basis"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_model_made_in_inference_mode_works_there_and_elsewhere(make, bank, tmp_path):
    model = small(bank).fit(sequences(60)).eval()
    lost = {"text": sequences(6, seed=1)["text"]}  # the audio has to be regenerated
    wanted = model(lost).logits.detach()
    with torch.inference_mode():
        made = make(model, tmp_path).eval()
        torch.testing.assert_close(made(lost).logits, wanted, check_dtype=False, rtol=1e-4, atol=1e-5)
    tensors = {**dict(made.named_parameters()), **dict(made.named_buffers()), "sums": made.standardizer._sums}
    assert [name for name, value in tensors.items() if value.is_inference()] == []
    torch.testing.assert_close(made(lost).logits, wanted, check_dtype=False, rtol=1e-4, atol=1e-5)
    made.loss(made(lost), torch.zeros(6, dtype=torch.int64)).backward()  # through check and proxies
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_a_model_unpickled_in_inference_mode_answers_and_follows_a_load():
    model = small().fit(sequences(60)).eval()
    lost = {"text": sequences(6, seed=1)["text"]}
    other = small().fit({name: 3 * x for name, x in sequences(60, seed=4).items()}).eval()
    wanted = model(lost).logits.detach()
    with torch.inference_mode():
        made = pickle.loads(pickle.dumps(other))
        torch.testing.assert_close(made(lost).logits, other(lost).logits)
        made.load_state_dict(model.state_dict())
        torch.testing.assert_close(made(lost).logits, wanted)


@pytest.mark.parametrize("kind", [Standardizer, ModalityCheck, ProxyGenerator])
def test_a_step_fitted_in_inference_mode_has_ordinary_tensors(kind):
    with torch.inference_mode():
        step = kind(DIMS).fit(sequences(60)).double()
        copies = [copy.deepcopy(step), kind(DIMS)]
        copies[1].load_state_dict(step.state_dict())
    for made in (step, *copies):
        assert [name for name, value in made.named_buffers() if value.is_inference()] == []


def test_a_network_made_in_inference_mode_trains():
    with torch.inference_mode():
        network = copy.deepcopy(MemoryFusionNetwork(DIMS, CLASSES)).double()
    network(sequences(3)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.lstms.parameters())


def test_gradients_stay_on_or_off_where_a_model_is_copied_or_moved():
    with torch.no_grad():
        copy.deepcopy(small()).double().fit(sequences(60))
        assert not torch.is_grad_enabled()
    copy.deepcopy(small()).double()
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        copy.deepcopy(small()).double()
        assert torch.is_inference_mode_enabled()


# --- What is said of a mistake ---


def test_an_unfitted_model_names_the_two_ways_out():
    model = small().eval()
    with pytest.raises(NotFittedError, match=r"modality check is not fitted: call model\.fit\(features\).*ablated\("):
        model(sequences(3))
    assert model.ablated(check=False, proxy=False)(sequences(3)).logits.shape == (3, CLASSES)
    with pytest.raises(NotFittedError, match="proxy generator is not fitted"):
        model({"text": sequences(3)["text"]}, effective=torch.tensor([[True, False]] * 3))


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, torch.clone])
def test_labels_may_be_a_list_or_an_array(convert):
    model = small().train()
    output, labels = model(sequences(4)), torch.tensor([0, 1, 1, -100])
    assert torch.equal(model.loss(output, convert(labels)), model.loss(output, labels))
    logits = output.modality_logits
    assert torch.equal(model.criterion(logits, convert(labels)), model.criterion(logits, labels))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, o: m.loss(o.logits, [0, 1]),
            "loss: output must be what the model returned, an M3EROutput",
        ),
        (lambda m, o: m.loss(o, ["a", "b"]), "target must be a tensor, an array or a list of labels"),
        (
            lambda m, o: m.loss(o, None),
            "target must be a tensor, an array or a list of labels or probab",
        ),
        (lambda m, o: m.criterion(o, [0, 1]), r"logits must be a tensor of shape \(M, B, C\), got M3EROutput"),
        (lambda m, o: M3ERFusion(DIMS, 2, {}), r"config must be an M3ERConfig, got dict: M3ERConfig\.from_dict"),
        (lambda m, o: M3ERFusion(DIMS, 1), "num_classes = 1: a softmax over one class is always 1"),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(call, message):
    model = small().train()
    output = model(sequences(2))
    with pytest.raises(ValueError, match=f"^{message}") as found:
        call(model, output)
    assert "\n" not in str(found.value)


def test_one_yes_no_question_is_a_model():
    config = M3ERConfig(loss=LossConfig(activation="sigmoid"))
    assert M3ERFusion(DIMS, 1, config).train()(sequences(2)).logits.shape == (2, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-modle", "my-modle: no such folder, did you mean my-model?"),
        ("./nowhere", "nowhere: no such folder"),
        ("runs/my-modle", "runs/my-modle: no such folder, did you mean my-model?"),
        ("a/b/c", "a/b/c: no such folder"),
        (
            "my-model/model.safetensors",
            "my-model/model.safetensors is a file, wanted the folder that save",
        ),
    ],
)
def test_a_folder_that_is_not_there_is_looked_for_on_this_machine_alone(name, message, tmp_path, monkeypatch):
    def connect(*_arguments, **_options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", connect)
    monkeypatch.chdir(tmp_path)
    for folder in ("my-model", "runs/my-model"):
        small().save_pretrained(tmp_path / folder)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        M3ERFusion.from_pretrained(name)
    M3ERFusion.from_pretrained("runs/my-model")


def test_a_name_of_the_hub_is_asked_for_there(tmp_path, monkeypatch):
    class AskedError(Exception):
        pass

    def connect(*_arguments, **_options):
        raise AskedError

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", connect)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AskedError):
        M3ERFusion.from_pretrained("owner/name")


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"text": 5, "audio": 4}, "the state has 4 features where the model has modality 'audio' with 3; the model's"),
        ({"text": 5, "audio": 3, "face": 2}, "the state has 3 modalities, but the model 2: ['text', 'audio']"),
    ],
)
def test_a_state_of_other_modalities_names_the_first(dims, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        small().load_state_dict(M3ERFusion(dims, CLASSES).state_dict())


def test_names_at_the_top():
    import sklearn.exceptions

    import m3er_fast
    from m3er_fast import config

    assert m3er_fast.NotFittedError is sklearn.exceptions.NotFittedError
    for name in ("CheckConfig", "ProxyConfig", "NetworkConfig", "LossConfig", "TrainingConfig"):
        assert getattr(m3er_fast, name) is getattr(config, name)


@pytest.mark.parametrize("bank", ["neighbours", "basis", "regression"])
def test_an_averaged_model_with_its_buffers_answers_as_the_model_does(bank):
    model, features = small(bank).fit(sequences(60)).eval(), {"text": sequences(6, seed=1)["text"]}
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    for (name, got), wanted in zip(averaged.module.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(averaged(features).logits, model(features).logits)


# --- Sizes before a load ---


def test_a_distributed_checkpoint_loads_into_an_unfitted_model_whose_sizes_are_set(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    model, features = small().fit(sequences(60)).eval(), sequences(6, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed here
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
        unfitted = small().eval()
        found = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
        sizes = {name.removeprefix("model."): entry.size for name, entry in found.items() if hasattr(entry, "size")}
        size_learned(unfitted, sizes)
        state = {"model": unfitted.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
    unfitted.load_state_dict(state["model"])
    assert torch.equal(unfitted(features).logits, model(features).logits)


def test_sizes_are_taken_from_a_state_under_the_name_of_a_module_inside():
    class Outer(torch.nn.Module):
        def __init__(self, fusion):
            super().__init__()
            self.fusion = fusion

    fitted, unfitted = Outer(small().fit(sequences(60))), Outer(small())
    size_learned(unfitted, fitted.state_dict())
    buffers = {name: value.shape for name, value in fitted.named_buffers()}
    assert {name: value.shape for name, value in unfitted.named_buffers()} == buffers
