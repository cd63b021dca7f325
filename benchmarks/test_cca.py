"""Fitting a CCA, which is computed on the CPU in float64."""

import numpy as np
import pytest
import torch

from m3er_fast import CCA


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.benchmark(group="CCA fit, n=20000, 300 x 74, k=30")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cca(benchmark, dtype):
    x, y = draw(20000, 300).numpy().astype(dtype), draw(20000, 74).numpy().astype(dtype)
    assert benchmark(CCA(n_components=30).fit, x, y).n_components_ == 30
