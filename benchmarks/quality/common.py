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


def _scale(x, factor, generator, *, lengths):
    return factor * x


def _shuffle_frames(x, generator, *, lengths):
    valid = torch.arange(x.shape[1]) < lengths[:, None]
    order = torch.rand(valid.shape, generator=generator).masked_fill(~valid, 2.0).argsort(dim=1)
    return x.gather(1, order[:, :, None].expand_as(x))


def corruptions():
    """Return each corruption by name and severity."""
    return {
        ("gaussian_noise", "mild"): partial(corruption.gaussian_noise, snr=10.0),
        ("gaussian_noise", "medium"): partial(corruption.gaussian_noise, snr=1.0),
        ("gaussian_noise", "severe"): partial(corruption.gaussian_noise, snr=0.01),
        ("silence", "severe"): corruption.silence,
        ("freeze", "severe"): corruption.freeze,
        ("drop_frames", "mild"): partial(corruption.drop_frames, probability=0.25),
        ("drop_frames", "medium"): partial(corruption.drop_frames, probability=0.5),
        ("drop_frames", "severe"): partial(corruption.drop_frames, probability=0.75),
        ("clip", "mild"): partial(corruption.clip, limit=1.0),
        ("clip", "medium"): partial(corruption.clip, limit=0.5),
        ("clip", "severe"): partial(corruption.clip, limit=0.25),
        ("gain", "mild"): partial(_scale, factor=1.5),
        ("gain", "medium"): partial(_scale, factor=2.0),
        ("gain", "severe"): partial(_scale, factor=4.0),
        ("shuffle_frames", "severe"): _shuffle_frames,
        ("mismatch", "severe"): corruption.mismatch,
    }


def corruptions_of_accuracy():
    """Return (name, severity, corruption) of each medium severity, or of the only one, and of the paper's noise."""
    table = corruptions()
    return [
        (kind, severity, corrupt)
        for (kind, severity), corrupt in table.items()
        if severity == "medium" or (kind, "medium") not in table or (kind, severity) == PAPERS_NOISE
    ]


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
    """Return a corruption as a table calls it."""
    return DRAWN.get((kind, severity), f"{kind}, {severity}")


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
