"""The benchmarks' textbook equals the reference, in values and gradients, with the weights of a fitted model."""

from typing import get_args

import numpy as np
import pytest
import torch

from benchmarks.speed import textbook
from benchmarks.speed.textbook_weights import textbook_check, textbook_model, textbook_names, textbook_network
from m3er_fast import CCA, M3ERFusion, MemoryFusionNetwork, ModalityCheck, reference
from m3er_fast.operands import Variant

DIMS = {"text": 12, "audio": 7, "face": 5}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found, wanted):
    for textbook_part, reference_part in zip(found, wanted, strict=True):
        torch.testing.assert_close(textbook_part, reference_part, **CLOSE)


@pytest.mark.parametrize("variant", get_args(Variant))
@pytest.mark.parametrize("detach_weight", [True, False])
@pytest.mark.parametrize(("modalities", "batch", "classes"), [(3, 17, 6), (2, 5, 2), (4, 1, 8)])
def test_the_loss_and_its_gradient(variant, detach_weight, modalities, batch, classes):
    logits = (2 * draw(modalities, batch, classes)).requires_grad_()
    target = torch.arange(batch) % classes
    options = {"variant": variant, "beta": 1.5, "detach_weight": detach_weight}
    found, wanted = (module.fusion_loss(logits, target, **options) for module in (textbook, reference))
    torch.testing.assert_close(found, wanted, **CLOSE)
    same(torch.autograd.grad(found, logits), torch.autograd.grad(wanted, logits))


def test_the_statistics_of_the_check_and_their_gradients():
    latent = draw(400, 4)
    features = {name: latent @ draw(4, d, seed=d) + draw(400, d, seed=20 + d) for name, d in DIMS.items()}
    check = ModalityCheck(DIMS, n_components=4).double().fit(features)
    statistics = textbook_check(features, 4, torch.float64)
    x = [draw(9, d, seed=40 + d).requires_grad_() for d in DIMS.values()]
    found, wanted = statistics(x), reference.check_statistics(x, check.projections_)
    same(found, wanted)
    factors = [draw(*part.shape, seed=60) for part in found]
    same(
        *(
            torch.autograd.grad(sum((f * part).sum() for f, part in zip(factors, parts, strict=True)), x)
            for parts in (found, wanted)
        )
    )


@pytest.mark.parametrize("steps", [1, 2, 13])
def test_the_statistics_of_sequences_and_their_gradients(steps):
    x = draw(6, steps, 5)
    x[1, steps // 2 :] = x[1, steps // 2]  # repeated frames
    x.requires_grad_()
    found = textbook.sequence_statistics(x)
    wanted = reference.sequence_statistics(x, torch.ones(6, steps, dtype=torch.bool))
    same(found, wanted[:4])
    factors = [draw(6, 5, seed=seed) for seed in range(3)]
    same(
        *(
            torch.autograd.grad(sum((f * part).sum() for f, part in zip(factors, parts[:3], strict=True)), x)
            for parts in (found, wanted)
        )
    )


def test_proxies_by_local_least_squares_and_their_gradients():
    query, bank, target = (
        draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(((8, 12), (50, 12), (50, 7)))
    )
    near = torch.stack([torch.randperm(50, generator=torch.Generator().manual_seed(row))[:6] for row in range(8)])
    found = textbook.local_least_squares(query, bank, target, near, 1e-3)
    wanted = reference.local_least_squares(query, bank, target, near, ridge=1e-3)[0]
    torch.testing.assert_close(found, wanted, **CLOSE)
    factor = draw(8, 7, seed=9)
    inputs = (query, bank, target)
    same(torch.autograd.grad((factor * found).sum(), inputs), torch.autograd.grad((factor * wanted).sum(), inputs))


def test_the_nearest_rows():
    query, bank = draw(10, 12), draw(60, 12, seed=1)
    distance, row = textbook.nearest(query, bank, 5)
    every = np.linalg.norm(query.numpy()[:, None] - bank.numpy()[None], axis=2)
    assert row.tolist() == np.argsort(every, axis=1)[:, :5].tolist()
    np.testing.assert_allclose(distance.numpy(), np.sort(every, axis=1)[:, :5])


def test_the_canonical_correlations_and_their_directions():
    latent = draw(300, 3)
    x, y = (latent @ draw(3, d, seed=d) + draw(300, d, seed=30 + d) for d in (12, 7))
    cca = CCA(n_components=3, ridge=0.0).fit(x, y)
    left, right, correlations = textbook.cca(x, y, 3)
    np.testing.assert_allclose(correlations.numpy(), cca.correlations_, rtol=1e-10)
    for found, wanted in ((left, cca.x_rotations_), (right, cca.y_rotations_)):  # each direction up to its sign
        np.testing.assert_allclose(np.abs(found.numpy()), np.abs(wanted), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize(("batch", "steps"), [(5, 4), (1, 1)])
def test_the_network_and_the_gradients_of_its_weights(feedback, batch, steps):
    torch.manual_seed(0)
    network = MemoryFusionNetwork(DIMS, 6, feedback=feedback).double()
    written = textbook_network(network)
    features = [draw(batch, steps, d, seed=d) for d in DIMS.values()]
    # Step by step, as the reference computes.
    hidden, memory = reference.memory_scan(features, torch.full((batch,), steps), network.scan_weights())
    states, last = written.scan(features)
    same([torch.stack(states), last], [hidden, memory])
    wanted, found = network(dict(zip(DIMS, features, strict=True))), written(features)
    same(found, (wanted.logits, wanted.modality_logits))
    factors = [draw(*part.shape, seed=7) for part in found]

    def gradients(module, parts):
        names, values = zip(*module.named_parameters(), strict=True)
        total = sum((f * part).sum() for f, part in zip(factors, parts, strict=True))
        return dict(zip(names, torch.autograd.grad(total, values), strict=True))

    ours = textbook_names(gradients(network, (wanted.logits, wanted.modality_logits)))
    theirs = gradients(written, found)
    assert ours.keys() == theirs.keys()
    same(theirs.values(), ours.values())


def test_the_model_and_its_training_loss():
    torch.manual_seed(0)
    features = {name: 5 + 3 * draw(40, 6, d, seed=d) for name, d in DIMS.items()}
    model = M3ERFusion(DIMS, 6).double().fit(features).train()
    written = textbook_model(model)
    target = torch.arange(40) % 6
    output = model(features)
    same(written(list(features.values())), (output.logits, output.modality_logits))
    torch.testing.assert_close(written.loss(list(features.values()), target), model.loss(output, target), **CLOSE)


def test_ten_steps_of_adam_train_both_models_alike():
    torch.manual_seed(0)
    features = {name: draw(40, 6, d, seed=d) for name, d in DIMS.items()}
    model = M3ERFusion(DIMS, 6).double().fit(features).train()
    written = textbook_model(model)
    target = torch.arange(40) % 6
    optimizers = [torch.optim.Adam(module.parameters()) for module in (model, written)]
    for _ in range(10):
        losses = model.loss(model(features), target), written.loss(list(features.values()), target)
        torch.testing.assert_close(*losses, rtol=1e-7, atol=1e-9)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
