"""A model for batches of one shape: the work that every batch repeats is recorded in CUDA graphs and replayed.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from m3er_fast._validation import check_positive_int
from m3er_fast.inputs import Array, FeatureBatch, Features, prepare_batch

Output = TypeVar("Output")

# A recording can neither compile kernels nor allocate workspaces: the runs before it do.
_WARMUP_RUNS = 3


class Stages(NamedTuple):
    """A model in eval mode, and its steps."""

    model: nn.Module  # (features, lengths, available) -> output
    standardize: Callable[..., Any]  # (features, lengths, available) -> batch
    judge: Callable[[Any], Any]  # batch -> result, with ``effective``
    replace: Callable[[Any, Tensor], Any]  # (batch, effective) -> replaced, with ``features``; may wait for the device
    classify: Callable[[Sequence[Tensor], Tensor], Any]  # (features, lengths) -> answer
    output: Callable[[Any, Any, Any, Any], Any]  # (batch, result, replaced, answer) -> output


def can_record(device: torch.device) -> bool:
    """Return whether a device has CUDA graphs."""
    return device.type == "cuda"


class Recording:
    """A function recorded in a CUDA graph; its tensors must stay at their addresses.

    Args:
        function: called a few times, and then recorded.
        device: the CUDA device of its tensors.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP_RUNS):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = function()

    def replay(self) -> Any:
        """Run the function and return its result, in tensors that the next replay overwrites."""
        self._graph.replay()
        return self._result


class CompiledInference(Generic[Output]):
    """The result of :meth:`m3er_fast.M3ERFusion.compile_for_inference`, called as the model is.

    Args:
        stages: the model and its steps.
        input_dims: feature count d_m of each modality.
        batch_size: B of the batches that are replayed.
        steps: T of these batches.
        device: the model's device.

    Attributes:
        is_recorded: whether there are graphs; False on the CPU.

    Raises:
        ValueError: if ``batch_size`` or ``steps`` is not a positive int.
    """

    def __init__(
        self, stages: Stages, input_dims: Mapping[str, int], batch_size: int, steps: int, device: torch.device
    ) -> None:
        check_positive_int("batch_size", batch_size)
        check_positive_int("steps", steps)
        self._stages, self._input_dims = stages, dict(input_dims)
        self._shape, self._device = (batch_size, steps), device
        self._warned: set[str] = set()
        self.is_recorded = can_record(device)
        if self.is_recorded:
            with torch.no_grad():
                self._record()
        else:
            self._warn(f"there are no CUDA graphs on {device.type}: batches go through the model itself")

    @torch.no_grad()
    def __call__(self, features: Features, lengths: Array | None = None, available: Array | None = None) -> Output:
        """Return the model's output for a batch; arguments as in :meth:`m3er_fast.M3ERFusion.forward`."""
        if not self.is_recorded:
            return self._run_model(features, lengths, available)
        if self._addresses() != self._recorded_addresses:
            self._warn(
                "the model's parameters or buffers have moved since it was recorded: batches go through the model "
                "itself; compile anew"
            )
            return self._run_model(features, lengths, available)
        batch = prepare_batch(features, lengths, available, input_dims=self._input_dims)
        first = batch.features[0]
        shape = tuple(first.shape[:2])
        if shape != self._shape or first.device != self._device or first.dtype != torch.float32:
            self._warn(
                f"recorded for float32 batches of {self._shape} samples and steps on {self._device}, got {first.dtype} "
                f"of {shape} on {first.device}: such batches go through the model itself"
            )
            return self._run_model(features, lengths, available)
        _copy(batch, self._input)
        standardized, result = self._first.replay()
        replaced = self._stages.replace(standardized, result.effective)
        _copy(replaced.features, self._network_input)
        answer = self._second.replay()
        output = self._stages.output(standardized, result, replaced, answer)
        # The next call overwrites these tensors.
        copied: Output = pytree.tree_map_only(Tensor, torch.clone, output)
        return copied

    def _addresses(self) -> list[int]:
        """Addresses of the parameters and buffers that the recordings read."""
        model = self._stages.model
        return [x.data_ptr() for x in (*model.parameters(), *model.buffers())]

    def _record(self) -> None:
        batch_size, steps = self._shape
        self._input = FeatureBatch(
            [torch.zeros(batch_size, steps, dim, device=self._device) for dim in self._input_dims.values()],
            torch.full((batch_size,), steps, dtype=torch.int64, device=self._device),
            torch.ones(batch_size, len(self._input_dims), dtype=torch.bool, device=self._device),
        )

        def judge() -> Any:
            features = dict(zip(self._input_dims, self._input.features, strict=True))
            batch = self._stages.standardize(features, self._input.lengths, self._input.available)
            return batch, self._stages.judge(batch)

        self._recorded_addresses = self._addresses()
        self._first = Recording(judge, self._device)
        standardized, _ = self._first.replay()
        self._network_input = [x.clone() for x in standardized.features]
        self._second = Recording(lambda: self._stages.classify(self._network_input, standardized.lengths), self._device)

    def _run_model(self, features: Features, lengths: Array | None, available: Array | None) -> Output:
        output: Output = self._stages.model(features, lengths, available)
        return output

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"compile_for_inference: {message}", UserWarning, stacklevel=4)


def _copy(source: Any, target: Array) -> None:
    """Copy every tensor of a structure into the tensor at the same place of another."""
    for new, old in zip(pytree.tree_leaves(source), pytree.tree_leaves(target), strict=True):
        if isinstance(old, Tensor):
            old.copy_(new)
