"""Saving and loading a model, on disk and on the Hugging Face Hub, and its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from m3er_fast._validation import near_names
from m3er_fast.atomic_files import replacing
from m3er_fast.check import ModalityCheck
from m3er_fast.config import Bank, M3ERConfig
from m3er_fast.fitted_module import LastingModule
from m3er_fast.proxy import ProxyGenerator
from m3er_fast.standardize import Standardizer
from m3er_fast.temperature import TemperatureScaling

_WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"


class HubModel(LastingModule, ModelHubMixin):
    """A model that ``save_pretrained`` and ``push_to_hub`` write as safetensors and JSON; nothing is pickled."""

    input_dims: dict[str, int]
    num_classes: int
    classes: tuple[str, ...]
    extraction: dict[str, Any] | None
    config: M3ERConfig
    standardizer: Standardizer
    calibration: TemperatureScaling
    modality_check: ModalityCheck | None
    proxy_generator: ProxyGenerator | None

    def _save_pretrained(self, save_directory: Path) -> None:
        from m3er_fast import __version__

        description = {
            "library": "m3er-fast",
            "version": __version__,
            "input_dims": self.input_dims,
            "num_classes": self.num_classes,
            "classes": self.classes,
            **({} if self.extraction is None else {"extraction": self.extraction}),
            "config": self.config.to_dict(),
        }
        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        with replacing(save_directory / _WEIGHTS_FILE) as partial:
            save_file(state, partial)
        with replacing(save_directory / _CONFIG_FILE) as partial:
            partial.write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a model from a folder, or from the Hub.

        Args:
            pretrained_model_name_or_path: a folder that ``save_pretrained`` wrote, or "owner/name" on the Hub. A name
                that looks like a path is looked for on this machine only.
            options: as :class:`huggingface_hub.ModelHubMixin` takes them, ``map_location``, and arguments of the model
                that replace the saved ones.

        Raises:
            ValueError: if there is no such folder, with near names, or it holds no such model.
        """
        path = Path(pretrained_model_name_or_path).expanduser()
        if not path.is_dir() and _looks_local(pretrained_model_name_or_path):
            raise ValueError(_explain_missing(path))
        is_local = path.is_dir()
        model: Self = super().from_pretrained(str(path) if is_local else str(pretrained_model_name_or_path), **options)
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state as :meth:`torch.nn.Module.load_state_dict` does.

        Raises:
            RuntimeError: if it does not fit the model; of other modalities, naming the first.
        """
        _check_modalities(self.input_dims, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def generate_model_card(self, *, data: str | None = None, metrics: str | None = None, **_kwargs: Any) -> ModelCard:
        """Return the README.md that ``save_pretrained`` writes beside the weights, unless the folder has one.

        Args:
            data: Markdown about the training data; with None the card says that it is not stated.
            metrics: Markdown, such as ``ClassificationReport.to_markdown()``; None likewise.

        Example:
            >>> model.save_pretrained("my-model", model_card_kwargs={"data": "CMU-MOSI, train split."})
        """
        return ModelCard(f"---\n{self._hub_mixin_info.model_card_data}\n---\n\n{_describe(self, data, metrics)}")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        **model_kwargs: Any,
    ) -> Self:
        for name in ("proxies", "resume_download"):  # added by the mixin of huggingface-hub before 1.0
            model_kwargs.pop(name, None)
        missing = [name for name in ("input_dims", "num_classes") if name not in model_kwargs]
        if missing:
            raise ValueError(f"{model_id} is not an m3er-fast model: its {_CONFIG_FILE} is missing or lacks {missing}")
        if isinstance(model_kwargs.get("config"), Mapping):
            model_kwargs["config"] = M3ERConfig.from_dict(model_kwargs["config"])
        model = cls(**model_kwargs)
        path = Path(model_id) / _WEIGHTS_FILE
        if not Path(model_id).is_dir():
            path = Path(
                hf_hub_download(
                    repo_id=model_id,
                    filename=_WEIGHTS_FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        if not path.is_file():
            raise ValueError(f"{model_id} is not an m3er-fast model: it has no {_WEIGHTS_FILE}")
        try:
            model.load_state_dict(load_file(path, device=map_location), strict=True)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} does not fit its {_CONFIG_FILE}: {reason}") from error
        return model.to(map_location).eval()


def _looks_local(name: str | Path) -> bool:
    """Return whether a name cannot be, or hardly is, "owner/name" of the Hub."""
    text = str(name)
    if isinstance(name, Path) or text.count("/") != 1 or text[:1] in ("/", ".", "~") or "\\" in text:
        return True
    return Path(text).exists() or Path(text).parent.is_dir()


def _explain_missing(path: Path) -> str:
    if path.exists():
        return f"{path} is a file, wanted the folder that save_pretrained wrote"
    beside = path.parent
    names = sorted(other.name for other in beside.iterdir() if other.is_dir()) if beside.is_dir() else []
    return f"{path}: no such folder{near_names(path.name, names)}"


def _check_modalities(input_dims: Mapping[str, int], state: Mapping[str, Any]) -> None:
    """Raise a RuntimeError if a state is of other modalities than the model."""
    count = state.get("standardizer.count")
    if count is not None and count.numel() != len(input_dims):
        raise RuntimeError(
            f"the state has {count.numel()} modalities, but the model {len(input_dims)}: {[*input_dims]}"
        )
    for m, (name, dim) in enumerate(input_dims.items()):
        mean = state.get(f"standardizer.mean_{m}")
        if mean is not None and mean.numel() != dim:
            raise RuntimeError(
                f"the state has {mean.numel()} features where the model has modality {name!r} with {dim}; the model's "
                f"modalities are {dict(input_dims)}, in this order"
            )


# --- Model card ---

_NOT_STATED = "Not stated when this model was saved."

_LIMITS = """\
- The classes are emotions as annotators *perceived* them. The model does not measure what a person feels; do not infer
  it.
- Expect it to work only on recordings, features, languages and people like those it was trained on. How its errors
  differ between groups of people was not measured here: measure it before use.
- The modality check recognises noise, silence, a wrong level, frozen, lost or shuffled frames, and modalities that do
  not belong together, as far as the training data make them recognisable. In utterances of one frame it knows only the
  level and the agreement with other modalities. A share of about α of clean utterances like the training data, or less,
  loses a modality; of another microphone, camera or language it may be more. Proxies are estimates from training
  data.
- Where no modality was effective, the output has `abstained` set: discard the prediction.
- {frames}
- Do not use it for decisions about individuals, for example in hiring, policing, education, insurance or health, or to
  watch people who have not consented."""


def _describe(model: HubModel, data: str | None, metrics: str | None) -> str:
    """Return the card's Markdown, without its metadata."""
    from m3er_fast import __version__

    frames = dict(zip(model.input_dims, model.standardizer.count.tolist(), strict=True))
    modalities = "\n".join(
        f"| {_cell(name)} | {dim} | {frames[name] or 'none'} |" for name, dim in model.input_dims.items()
    )
    return f"""\
# M3ER: emotions from {", ".join(model.input_dims)}

Classifies feature sequences of {len(model.input_dims)} modalities into {model.num_classes} classes:
{", ".join(model.classes)}. A modality that is missing or ineffectual is regenerated from the others (Mittal et al.,
[arXiv 1911.05659](https://arxiv.org/abs/1911.05659)). Saved by m3er-fast {__version__}, an independent implementation.

```python
from m3er_fast import M3ERFusion

model = M3ERFusion.from_pretrained("path/or/name")
probabilities = model.predict_proba({{{", ".join(f'"{name}": {_variable(name)}' for name in model.input_dims)}}})
```

## Data

{data or _NOT_STATED}

| Modality | Features per frame | Valid frames fitted to |
|---|---:|---:|
{modalities}

{_describe_steps(model)}

## Metrics

{metrics or _NOT_STATED}

## Limits

{_LIMITS.format(frames=_describe_frames(model.proxy_generator))}
"""


_KINDS: dict[Bank, str] = {
    "regression": "ridge regressions of each modality on each other",
    "neighbours": "a bank of neighbours",
    "basis": "a bank of a basis",
}


def _describe_steps(model: HubModel) -> str:
    """Return what the check, the proxies and the probabilities rest on."""
    calibrated = (
        "Its probabilities are calibrated: the fused head's logits are divided by "
        f"{model.calibration.temperature.item():.3g}."
        if model.calibration.is_fitted
        else "Its probabilities are not calibrated."
    )
    return f"{_describe_check_and_proxies(model)} {calibrated}"


def _describe_check_and_proxies(model: HubModel) -> str:
    check, proxies = model.modality_check, model.proxy_generator
    if check is None:
        checked = "It has no modality check"
    elif check.is_fitted:
        checked = f"Modality check: {check.config.statistic}, α = {check.config.alpha:g}"
    else:
        checked = "Its modality check is not fitted"
    if proxies is None:
        return f"{checked}; no proxies: an ineffectual modality becomes its training mean."
    fitted = _KINDS[proxies.config.bank] if proxies.is_fitted else "not fitted"
    return f"{checked}. Proxies: {fitted}."


def _describe_frames(proxies: ProxyGenerator | None) -> str:
    if proxies is None or not proxies.keeps_frames:
        return "It holds no frame of the training data, but their means and covariances, and scores of its utterances."
    return "The proxy bank holds standardised feature frames of the training data. Sharing this model shares them."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _variable(name: str) -> str:
    return name if name.isidentifier() else "..."
