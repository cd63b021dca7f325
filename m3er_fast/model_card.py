"""The text of a model's card: what it was fitted to, how it did, and what it is not for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m3er_fast.fusion import M3ERFusion

_UNTOLD = "Not told by who saved this model."

_LIMITS = """\
- The classes are emotions as annotators *perceived* them. What a person feels is not measured, and not to be
  inferred.
- It holds for recordings, features, languages and people like those it was trained on. How its errors are spread over
  groups of people was not measured here: measure it before use.
- The modality check recognises noise, silence and mismatch that training data make recognisable; at most about a share
  α of clean utterances like the training data loses a modality. Proxies are estimates from training frames.
- Where no modality was effective the output says `abstained`, and the prediction should be discarded.
- The proxy bank holds standardised feature frames of the training data. Sharing this model shares them.
- Not for decisions about individuals, such as in hiring, policing, education, insurance or health, nor for watching
  people who have not consented."""


def describe(model: M3ERFusion, data: str | None, metrics: str | None) -> str:
    """The card's Markdown, without its metadata."""
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

{data or _UNTOLD}

| Modality | Features a frame | Valid frames it was fitted to |
|---|---:|---:|
{modalities}

{_state_of_steps(model)}

## Metrics

{metrics or _UNTOLD}

## Limits

{_LIMITS}
"""


def _state_of_steps(model: M3ERFusion) -> str:
    check, proxies = model.modality_check, model.proxy_generator
    if check is None:
        checked = "It has no modality check"
    elif check.is_fitted:
        checked = f"Modality check: {check.config.statistic}, α = {check.config.alpha:g}"
    else:
        checked = "Its modality check is not fitted"
    if proxies is None:
        return f"{checked}; no proxies: an ineffectual modality becomes its training mean."
    fitted = f"a bank of {proxies.config.bank}" if proxies.is_fitted else "not fitted"
    return f"{checked}. Proxies: {fitted}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _variable(name: str) -> str:
    return name if name.isidentifier() else "..."
