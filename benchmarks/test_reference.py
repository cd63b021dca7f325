"""Throughput of the plain PyTorch path on this machine, beside the libraries it is compared with.

Run with ``pytest benchmarks --benchmark-only``; sizes are those of the goals for two CPU cores. Nothing is asserted
about time: the report is read, and ratios within one run are what counts.
"""

import numpy as np
import pytest
import torch

from m3er_fast import CCA, M3ERConfig, M3ERFusion


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.benchmark(group="CCA fit, n=20000, 300 x 74, k=30")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cca(benchmark, dtype):
    x, y = draw(20000, 300).numpy().astype(dtype), draw(20000, 74).numpy().astype(dtype)
    assert benchmark(CCA(n_components=30).fit, x, y).n_components_ == 30


@pytest.mark.benchmark(group="network, T=20, d=300/74/36")
@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("step", ["forward", "training step"])
def test_network(benchmark, batch, step):
    dims = {"text": 300, "audio": 74, "face": 36}
    model = M3ERFusion(dims, 6, M3ERConfig(check=None))
    features = {name: draw(batch, 20, dim) for name, dim in dims.items()}
    target = torch.arange(batch) % 6

    def forward():
        with torch.no_grad():
            return model(features).logits

    def train():
        loss = model.loss(model(features), target)
        return torch.autograd.grad(loss, list(model.parameters()))[0]

    assert benchmark(forward if step == "forward" else train).isfinite().all()
