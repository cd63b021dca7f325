"""The statistics that a model learns from a corpus in addition to its network's weights, as a value and as a file.

The file is safetensors. It holds the buffers of standardiser, check and proxies, named as in the model's
``state_dict``, and in the metadata the settings and the size of the corpus that they were fitted with.
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
    """The result of :func:`fit_statistics`: the state of a model's standardiser, modality check and proxies."""

    input_dims: dict[str, int]
    check: CheckConfig | None  # settings that they were fitted with
    proxy: ProxyConfig | None
    state: dict[str, Tensor]  # entries of the model's state_dict
    rows: int  # utterances that they were fitted to
    frames: int  # frames with two valid modalities or more, from which the bank was chosen
    errors: int = 0  # utterances left out because they cannot be read
    quarantined: tuple[QuarantinedShard, ...] = ()  # shards left out because they cannot be read

    def apply(self, model: M3ERFusion) -> M3ERFusion:
        """Set the model's standardiser, check and proxies to this state, and return the model.

        The network is not changed. Apply the statistics before it is trained, since it is trained on standardised
        features.

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
        """BLAKE2 of everything that :meth:`apply` uses."""
        settings = [list(self.input_dims.items()), *map(_plain, (self.check, self.proxy))]
        digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
        for name, value in sorted(self.state.items()):
            digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the statistics to a file, which gets its name when it is complete and on the disk.

        Raises:
            OSError: it cannot be written. An earlier file of this name is then unchanged.
        """
        from safetensors.torch import save

        from m3er_fast import __version__

        metadata = {
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
            partial.write_bytes(save(state, metadata={_KEY: json.dumps(metadata)}))

    @classmethod
    def load(cls, path: str | Path) -> ModelStatistics:
        """Read the file that :meth:`save` wrote.

        Raises:
            ValueError: there is no such file, or it holds no statistics.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file, wanted one that fit-stats wrote")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})[_KEY])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (file is not a mapping)
            config = M3ERConfig.from_dict({"check": metadata["check"], "proxy": metadata["proxy"]})
            return cls(
                input_dims=check_input_dims(metadata["input_dims"]),
                check=config.check,
                proxy=config.proxy,
                state=state,
                rows=int(metadata["rows"]),
                frames=int(metadata["frames"]),
                errors=int(metadata["errors"]),
                quarantined=tuple(QuarantinedShard(**entry) for entry in metadata["quarantined"]),
            )
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no statistics that can be read: {error}") from error


def _plain(config: CheckConfig | ProxyConfig | None) -> dict[str, object] | None:
    return None if config is None else dataclasses.asdict(config)
