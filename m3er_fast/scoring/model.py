"""Loading a model, and the signature of a model, which all of its scores carry."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from m3er_fast.fusion import M3ERFusion


def load_model(path: str | Path) -> M3ERFusion:
    """Load a model, in eval mode, from a local folder that training or ``save_pretrained`` wrote.

    Nothing is looked up elsewhere.

    Raises:
        ValueError: there is no such folder, or it holds no readable model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, wanted one that training or save_pretrained wrote")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no model: it has no {name}")
    try:
        return M3ERFusion.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the parsers of JSON and safetensors raise anything for a damaged file
        raise ValueError(f"{folder} holds no model that can be read: {error}") from error


def model_signature(model: M3ERFusion) -> str:
    """Return the SHA-256, in hexadecimal, of everything that a model's scores depend on.

    It covers the modalities in order, the class names, the configuration (canonical JSON) and all parameters and
    buffers in the order of their names, each with dtype, shape and bytes. It does not depend on the device, and a model
    keeps its signature when it is saved and loaded again.
    """
    description = {
        "input_dims": list(model.input_dims.items()),
        "classes": model.classes,
        "config": model.config.to_dict(),
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
