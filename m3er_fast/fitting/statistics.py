"""What a model learns from a corpus beside its network's weights, as a value of its own that can be kept in a file.

The file is safetensors: the buffers of standardiser, check and proxies, named as in the model's ``state_dict``, and in
the metadata what they were learned with and from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from m3er_fast.atomic_files import replacing
from m3er_fast.config import CheckConfig, M3ERConfig, ProxyConfig
from m3er_fast.fusion import M3ERFusion
from m3er_fast.inputs import check_input_dims
from m3er_fast.shards.plan import QuarantinedShard

_PARTS = ("standardizer", "modality_check", "proxy_generator")
_KEY = "m3er_fast.statistics"


@dataclass(frozen=True)
class ModelStatistics:
    """What :func:`fit_statistics` learned: a model's standardiser, modality check and proxies."""

    input_dims: dict[str, int]
    check: CheckConfig | None  # the settings that they were learned with
    proxy: ProxyConfig | None
    state: dict[str, Tensor]  # as those parts have it in the model's state_dict
    rows: int  # utterances learned from
    frames: int  # of them, frames with two valid modalities or more, which the bank was chosen from
    errors: int = 0  # utterances that were left out because they cannot be read
    quarantined: tuple[QuarantinedShard, ...] = ()  # shards that were left out because they cannot be read

    def apply(self, model: M3ERFusion) -> M3ERFusion:
        """Put them in place of what the model's ``fit`` learned, and return the model; its network stays as it is.

        Do so before the network is trained: it learns what standardised features look like.

        Raises:
            ValueError: the model has other modalities, or other settings of check or proxies.
        """
        if list(model.input_dims.items()) != list(self.input_dims.items()):
            raise ValueError(
                f"the statistics are of {self.input_dims}, but the model has {model.input_dims}: "
                "wanted the same modalities in the same order"
            )
        for part in ("check", "proxy"):
            if getattr(model.config, part) != getattr(self, part):
                raise ValueError(
                    f"the statistics were fitted with {part} = {getattr(self, part)}, "
                    f"but the model has {getattr(model.config, part)}"
                )
        parts = nn.ModuleDict({name: part for name in _PARTS if (part := getattr(model, name)) is not None})
        try:
            parts.load_state_dict(self.state, strict=True)
        except RuntimeError as error:
            raise ValueError(f"the statistics do not fit the model: {' '.join(str(error).split())}") from error
        return model

    @property
    def digest(self) -> str:
        """BLAKE2 of everything that a model takes from them."""
        about = [list(self.input_dims.items()), *map(_plain, (self.check, self.proxy))]
        digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
        for name, value in sorted(self.state.items()):
            digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write them to a file, which gets its name when it is whole and on the disk.

        Raises:
            OSError: it cannot be written. What had this name before is then unharmed.
        """
        from safetensors.torch import save

        from m3er_fast import __version__

        about = {
            "version": __version__,
            "input_dims": self.input_dims,
            "check": _plain(self.check),
            "proxy": _plain(self.proxy),
            "rows": self.rows,
            "frames": self.frames,
            "errors": self.errors,
            "quarantined": [entry._asdict() for entry in self.quarantined],
        }
        state = {name: value.detach().cpu().contiguous() for name, value in self.state.items()}
        with replacing(Path(path)) as partial:
            partial.write_bytes(save(state, metadata={_KEY: json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> ModelStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: there is no such file, or it holds nothing of the kind.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file, wanted one that fit-stats wrote")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[_KEY])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            config = M3ERConfig.from_dict({"check": about["check"], "proxy": about["proxy"]})
            return cls(
                input_dims=check_input_dims(about["input_dims"]),
                check=config.check,
                proxy=config.proxy,
                state=state,
                rows=int(about["rows"]),
                frames=int(about["frames"]),
                errors=int(about["errors"]),
                quarantined=tuple(QuarantinedShard(**entry) for entry in about["quarantined"]),
            )
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no statistics that can be read: {error}") from error


def _plain(config: CheckConfig | ProxyConfig | None) -> dict[str, object] | None:
    return None if config is None else dataclasses.asdict(config)
