"""Shared by the scripts that measure quality: the folder of real data, the corruptions, and the file of results."""

import json
import os
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from m3er_fast import corruption

ROOT = Path(__file__).resolve().parents[2]


def add_data_argument(parser):
    """Add ``--data``, the folder of real data, with the same default as in the tests."""
    default = os.environ.get("M3ER_DATA") or ROOT.parent / "shared" / "data"
    parser.add_argument(
        "--data", type=Path, default=Path(default), help="folder of real data (default: $M3ER_DATA, or shared/data)"
    )


# --- Corruptions ---


def corruptions():
    """Return each corruption by name and severity."""
    return {
        (kind, severity): corrupt
        for kind, severities in corruption.SEVERITIES.items()
        for severity, corrupt in severities._asdict().items()
    }


def with_groups(corrupt, groups):
    """Return a corruption that knows the speakers or recordings (B,) of its samples, if it goes by them."""
    return partial(corrupt, groups=groups) if groups is not None and corruption.takes_groups(corrupt) else corrupt


def corruptions_of_accuracy():
    """Return (name, severity, corruption) of each medium severity, and of what takes a modality away altogether."""
    return [(*key, corrupt) for key, corrupt in corruptions().items() if key[1] == "medium" or key in DESTRUCTIVE]


class Wanted(NamedTuple):
    """The share of long utterances that the check is meant to catch."""

    share: float
    modality: str | None = None


WANTED = {
    ("freeze", "severe"): Wanted(1.0),
    ("silence", "severe"): Wanted(1.0),
    ("gaussian_noise", "medium"): Wanted(0.98),
    ("gaussian_noise", "severe"): Wanted(0.98),
    ("gaussian_noise", "mild"): Wanted(0.9, "audio"),
    ("drop_frames", "medium"): Wanted(0.95),
}
SWAPPED = ("mismatch", "severe")
PAPERS_NOISE = ("gaussian_noise", "severe")
DESTRUCTIVE = {PAPERS_NOISE, ("silence", "severe"), ("freeze", "severe"), SWAPPED}
DRAWN = {
    ("gaussian_noise", "mild"): "noise, SNR 10",
    ("gaussian_noise", "medium"): "noise, SNR 1",
    ("freeze", "severe"): "frozen",
    ("drop_frames", "medium"): "half of the frames lost",
    ("mismatch", "severe"): "another utterance's",
}
"""Corruptions that have a column of their own in the figure of ROC curves, and their titles."""


BEFORE = {
    ("gaussian_noise", "severe"): "noise, SNR 0.01",
    ("gaussian_noise", "medium"): "noise, SNR 1",
    SWAPPED: "another utterance's",
}
"""What docs/results/check_before.json calls the corruptions that it has."""


def described(kind, severity):
    """Return a corruption as a table calls it, with its setting."""
    if (kind, severity) in DRAWN:
        return DRAWN[kind, severity]
    values = getattr(corruptions()[kind, severity], "keywords", {})  # of a partial
    setting = ", ".join(f"{name} {value:g}" for name, value in values.items())
    return kind.replace("_", " ") + (f", {setting.replace('snr', 'SNR')}" if setting else "")


# --- Results ---


def write_results(path, settings, *, indent=1, **results):
    """Write results as JSON beside the settings and versions that they depend on; create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "commit": commit(), **settings}
    path.write_text(json.dumps({"settings": about, **results}, indent=indent) + "\n")


def commit():
    """Return the commit that is measured, with "+" if files of it were changed since."""
    head, changes = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    return f"{head}+" if changes else head or "unknown"
