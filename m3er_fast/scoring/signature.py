"""What tells one model from another: every score carries the signature of the model that made it."""

from __future__ import annotations

import hashlib
import json

import torch

from m3er_fast.fusion import M3ERFusion


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
