"""The whole model as one program, for torch.export and for ONNX: check and proxies included, for batches of any size.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.fx.experimental._config as shapes_config
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from m3er_fast.atomic_files import replacing
from m3er_fast.fusion import M3ERFusion, M3EROutput

__all__ = ["export_onnx", "export_program"]

# The name of a program's result in the files of torch.export.save.
pytree._register_namedtuple(M3EROutput, serialized_type_name="m3er_fast.M3EROutput")


def export_program(model: M3ERFusion) -> ExportedProgram:
    """Return the model as a program of torch.export.

    The program is called as :meth:`m3er_fast.M3ERFusion.forward` is, by ``program.module()``, with every argument: a
    dict of one (B, T, d_m) tensor per modality, in the model's order, ``lengths`` (B,) int64 and ``available`` (B, M)
    bool, for any B and T from 1 on. A modality that is missing is a tensor of any content, NaN too, that is not
    ``available``. Features are float32, or float64 if the model is. Lengths beyond 0..T are clamped, without an error.
    Results have no gradients. ``torch.export.save`` writes such a program; a process that loads it imports
    ``m3er_fast.export`` first, which makes the type of its result known.

    Args:
        model: fitted and in eval mode. Proxies of a bank of neighbours cannot be exported.

    Raises:
        ValueError: if the model is in train mode, or its proxies cannot be exported.
        NotFittedError: if a step of the model is not fitted.
    """
    if model.training:
        raise ValueError("export: the model is in train mode, wanted eval mode: call eval() first")
    # Whatever is done with the program later, torch differentiates no loop over an open number of steps.
    model = copy.deepcopy(model).requires_grad_(False)
    parameter = next(model.parameters())
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    samples, steps = 2, 3
    features = {
        name: torch.zeros(samples, steps, dim, dtype=dtype, device=parameter.device)
        for name, dim in model.input_dims.items()
    }
    lengths = torch.full((samples,), steps, device=parameter.device)
    available = torch.ones(samples, len(features), dtype=torch.bool, device=parameter.device)
    batch, time = Dim("batch", min=1), Dim("steps", min=1)
    sizes = ({name: {0: batch, 1: time} for name in features}, {0: batch}, {0: batch})
    # Else sizes of 1 would be other programs, because torch broadcasts them.
    with torch.no_grad(), shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(model, (features, lengths, available), dynamic_shapes=sizes)


def export_onnx(model: M3ERFusion, path: str | Path) -> None:
    """Write the model as an ONNX file.

    Its inputs are those of :func:`export_program`, all of them required: ``features_<modality>`` for each modality,
    ``lengths`` and ``available``. Its outputs are the fields of :class:`m3er_fast.M3EROutput`, in order; ``available``
    is called ``usable`` there, because no output may have the name of an input.

    Args:
        model: fitted and in eval mode, on any device; proxies of a bank of neighbours cannot be exported.
        path: the file; an existing one is replaced.

    Raises:
        ImportError: if onnx or onnxscript is not installed.
        ValueError: as :func:`export_program` does.
        NotFittedError: if a step of the model is not fitted.
        OSError: if the file cannot be written.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise ImportError("writing ONNX files needs onnx and onnxscript: pip install 'm3er-fast[onnx]'")
    # Beside CUDA tensors the program would hold kernels, which ONNX does not know.
    program = export_program(copy.deepcopy(model).cpu())
    names = ["usable" if name == "available" else name for name in M3EROutput._fields]
    with replacing(Path(path)) as partial:
        torch.onnx.export(program, (), partial, output_names=names, dynamo=True, external_data=False, verbose=False)
