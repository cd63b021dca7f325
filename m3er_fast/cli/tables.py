"""Tables of results on stdout: drawn to the terminal's width there, Markdown elsewhere."""

from __future__ import annotations

import sys


def is_terminal() -> bool:
    """Return whether stdout is a terminal; rich's own test would take FORCE_COLOR for one."""
    return sys.stdout.isatty()


def print_markdown(text: str) -> None:
    """Print Markdown: as tables that fold to the width of a terminal, or as it is where stdout is none."""
    if not is_terminal():
        print(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
