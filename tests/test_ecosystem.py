"""The model among torch's own tools and inside other libraries."""

import copy
import pickle

import pytest
import torch

from m3er_fast import M3ERConfig, M3ERFusion, MemoryFusionNetwork, ModalityCheck, ProxyGenerator, Standardizer
from m3er_fast.config import CheckConfig, NetworkConfig, ProxyConfig

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
