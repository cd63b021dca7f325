"""Shared by the scripts that measure quality: the folder of real data and the file of results."""

import json
import os
import platform
from pathlib import Path

import torch


def add_data_argument(parser):
    """Add ``--data``, the folder of real data, with the same default as in the tests."""
    default = os.environ.get("M3ER_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    parser.add_argument(
        "--data", type=Path, default=Path(default), help="folder of real data (default: $M3ER_DATA, or shared/data)"
    )


def write_results(path, settings, *, indent=1, **results):
    """Write results as JSON beside the settings and versions that they depend on; create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), **settings}
    path.write_text(json.dumps({"settings": about, **results}, indent=indent) + "\n")
