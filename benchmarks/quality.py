"""What the scripts that measure quality, not time, share: where real data are, and how results are written."""

import json
import os
import platform
from pathlib import Path

import torch


def add_data_argument(parser):
    """``--data``, the folder of real data: where the tests look for it too, if nothing else is said."""
    default = os.environ.get("M3ER_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument(
        "--data", type=Path, default=Path(default), help="the folder of real data; default: $M3ER_DATA, or shared/data"
    )


def write_results(path, settings, *, indent=1, **results):
    """Write results as JSON beside the settings and versions that gave them; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), **settings}
    path.write_text(json.dumps({"settings": about, **results}, indent=indent) + "\n")
