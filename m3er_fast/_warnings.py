"""Warnings that point at the line outside this package that led to them."""

from __future__ import annotations

import sys
import warnings


def warn_user(message: str) -> None:
    """Issue a UserWarning at the first caller outside this package."""
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
