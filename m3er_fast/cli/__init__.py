"""The command line, ``m3er-fast``: :func:`main` and its exit codes."""

from m3er_fast.cli.exit_codes import (
    COMPLETE,
    DISK_FULL,
    INTERNAL,
    INTERRUPTED,
    MISMATCH,
    OUTPUT_CLOSED,
    QUARANTINED,
    USAGE,
)
from m3er_fast.cli.main import main

__all__ = [
    "COMPLETE",
    "DISK_FULL",
    "INTERNAL",
    "INTERRUPTED",
    "MISMATCH",
    "OUTPUT_CLOSED",
    "QUARANTINED",
    "USAGE",
    "main",
]
