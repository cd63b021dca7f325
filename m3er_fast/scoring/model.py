"""Loading a model, and what tells one from another: every score carries the signature of the model that made it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from m3er_fast.fusion import M3ERFusion


def load_model(path: str | Path) -> M3ERFusion:
    """Load a model from a local folder: what training wrote, or any ``save_pretrained`` made. In eval mode.

    Raises:
        ValueError: there is no such folder, or it holds no model that can be read. Nothing is looked up elsewhere.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, wanted one that training or save_pretrained wrote")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no model: it has no {name}")
    try:
        return M3ERFusion.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes the parsers of JSON and safetensors say
        raise ValueError(f"{folder} holds no model that can be read: {error}") from error


def model_signature(model: M3ERFusion) -> str:
    """SHA-256, in hexadecimal, of everything that a model's scores depend on.

    Hashed are the modalities in order, the class names, the configuration (canonical JSON) and, in the order of their
    names, all parameters and buffers with dtype, shape and bytes. The device does not count, and a model that was
    saved and loaded again has the signature that it had.
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
