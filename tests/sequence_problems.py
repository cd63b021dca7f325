"""Feature sequences and their statistics in NumPy, for the tests of every implementation."""

import numpy as np
import torch


def problem(seed, batch=5, steps=9, features=7, *, offset=0.0, dtype=torch.float32):
    """Sequences with holes anywhere; the first sample has no valid frame, and the second has one."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(offset + rng.normal(size=(batch, steps, features))).to(dtype)
    valid = torch.from_numpy(rng.random((batch, steps)) < 0.7)
    valid[:1] = False
    valid[1:2] = torch.arange(steps) == steps // 2
    if batch > 2:
        x[2, steps // 2 :] = x[2, steps // 2]  # frames that repeat
    return x, valid


def oracle(x, valid):
    """Mean, variance, change, repeated frames and pairs, in float64, one sample and one frame after the other."""
    x, valid = x.detach().double().cpu().numpy(), valid.cpu().numpy()
    batch, steps, features = x.shape
    mean, variance, change = (np.zeros((batch, features)) for _ in range(3))
    repeated, pairs = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)
    for b in range(batch):
        frames = x[b, valid[b]]
        if len(frames):
            mean[b] = frames.mean(axis=0)
            variance[b] = frames.var(axis=0)
        for t in range(1, steps):
            if valid[b, t - 1] and valid[b, t]:
                pairs[b] += 1
                repeated[b] += (x[b, t] == x[b, t - 1]).all()
                change[b] += (x[b, t] - x[b, t - 1]) ** 2 / 2
        change[b] /= max(pairs[b], 1)
    return mean, variance, change, repeated, pairs


def assert_equals_oracle(found, x, valid, *, rtol=1e-5, atol=1e-12):
    """Moments within ``rtol``, a mean within ``rtol`` of the largest number; counts exactly."""
    mean, variance, change, repeated, pairs = oracle(x, valid)
    largest = np.abs(np.where(valid.cpu()[:, :, None], x.detach().double().cpu(), 0.0)).max(initial=0.0)
    np.testing.assert_allclose(found.mean.detach().cpu(), mean, rtol=0, atol=rtol * max(largest, 1e-30))
    np.testing.assert_allclose(found.variance.detach().cpu(), variance, rtol=rtol, atol=atol)
    np.testing.assert_allclose(found.change.detach().cpu(), change, rtol=rtol, atol=atol)
    np.testing.assert_array_equal(found.repeated.cpu(), repeated)
    np.testing.assert_array_equal(found.pairs.cpu(), pairs)
    assert found.repeated.dtype == found.pairs.dtype == torch.int64
