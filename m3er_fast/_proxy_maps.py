"""Banks that are folded when they are learned, into one affine map for each ordered pair of modalities.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, b samples that have lost it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from m3er_fast._proxy_bank import rows_within
from m3er_fast._validation import can_look_at
from m3er_fast.config import ProxyConfig
from m3er_fast.fitted_module import FittedModule
from m3er_fast.standardize import StandardizedBatch


class MapBank:
    """The kinds of bank in which a proxy is an affine map of its source: p_{m|i} = map_i_m @ f_i + bias_i_m.

    These learned buffers belong to the proxy generator: for each ordered pair (i, m), ``map_i_m`` (d_m, d_i) and
    ``bias_i_m`` (d_m,), both without rows if no training frame held both modalities.
    """

    is_traceable = True
    needs_total = False
    first_buffer = "map_0_1"
    host_buffers: Sequence[str] = ()

    def __init__(self, config: ProxyConfig, dims: Sequence[int]) -> None:
        self._config, self._dims = config, list(dims)
        self._pairs = list(permutations(range(len(dims)), 2))

    def replace_lost(
        self, generator: FittedModule, batch: StandardizedBatch, effective: Tensor, lost: Tensor
    ) -> list[Tensor]:
        """Return M tensors (B, T, d_m): the batch's features, with proxies where ``lost`` (B, M).

        On the CPU, the samples that have lost a modality are picked. On other devices, and where the call is traced,
        every sample gets proxies, and a mask chooses: no shape depends on values, and nothing waits for the device.
        """
        usable = effective[:, None] & batch.frame_valid
        replace = self._replace_picked if can_look_at(lost) else self._replace_masked
        return [replace(generator, batch.features, usable, lost[:, m], m) for m in range(len(batch.features))]

    def _replace_picked(
        self, generator: FittedModule, features: Sequence[Tensor], usable: Tensor, lost: Tensor, target: int
    ) -> Tensor:
        original, sources = features[target], self._sources(generator, target)
        picked = torch.from_numpy(np.flatnonzero(lost.numpy()))
        if not len(picked):
            return original
        replaced = original.clone()
        widths = 2 * self._dims[target] + max((self._dims[i] for i in sources), default=0)
        size = rows_within(self._config.memory_budget, 8 * widths * original.shape[1])
        for part in torch.split(picked, size):
            frames = {i: features[i].index_select(0, part) for i in sources}
            proxies = self._mean_of_sources(generator, frames, usable.index_select(0, part), target)
            replaced.index_copy_(0, part, proxies.to(original.dtype))
        return replaced

    def _replace_masked(
        self, generator: FittedModule, features: Sequence[Tensor], usable: Tensor, lost: Tensor, target: int
    ) -> Tensor:
        frames = {i: features[i] for i in self._sources(generator, target)}
        proxies = self._mean_of_sources(generator, frames, usable, target)
        return torch.where(lost[:, None, None], proxies.to(features[target].dtype), features[target])

    def _sources(self, generator: FittedModule, target: int) -> list[int]:
        """Return the modalities that were seen beside the target."""
        return [i for i, m in self._pairs if m == target and generator.learned(f"map_{i}_{m}").shape[0]]

    def _mean_of_sources(
        self, generator: FittedModule, frames: Mapping[int, Tensor], usable: Tensor, target: int
    ) -> Tensor:
        """Return proxies (b, T, d_target), the means over each frame's sources; zeros for a frame without any.

        Args:
            generator: holds the learned buffers.
            frames: (b, T, d_i) by modality, those that were seen beside the target.
            usable: (b, T, M) bool, the modalities to regenerate a frame from.
            target: the lost modality.
        """
        shape = (*usable.shape[:2], self._dims[target])
        if not frames:
            return generator.learned(self.first_buffer).new_zeros(shape)
        maps, biases = ([generator.learned(f"{name}_{i}_{target}") for i in frames] for name in ("map", "bias"))
        valid = usable[:, :, list(frames)]
        # Sources are weighted before the products, which then add up: no pass over the proxies but theirs.
        weights = valid.to(maps[0].dtype) / valid.sum(dim=2, keepdim=True).clamp(min=1)
        total = weights.flatten(0, 1) @ torch.stack(biases)
        for k, (x, matrix) in enumerate(zip(frames.values(), maps, strict=True)):
            weighted = x.to(matrix.dtype) * weights[:, :, k, None]
            total.addmm_(weighted.flatten(0, 1), matrix.mT)
        return total.view(shape)
