"""Write the tables of cli_options.md anew from the commands, whose --help says the same.

python docs/cli_options.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from m3er_fast.cli.commands import app

PAGE = Path(__file__).with_name("cli_options.md")
BEGIN = "<!-- Written by docs/cli_options.py: begin -->"
END = "<!-- Written by docs/cli_options.py: end -->"
VALUES = {"<path>": "PATH", "<int>": "N", "<int range>": "N", "<float>": "X", "<str>": "NAME", "<list[str]>": "NAMES"}
IN_THE_LAST_COLUMN = r"\s*\[(?:default: ([^\]]*?)(?:; [^\]]*)?|(required)|\d*<?=?x[<>]=?\d+)\]"


def quoted(text: str) -> str:
    """Mark options in a text as code: elsewhere two hyphens become a dash."""
    return re.sub(r"(?<![\w`])(--[a-z][a-z-]*(?: [A-Z]+)?)", r"`\1`", text)


def cell(text: str) -> str:
    """Escape what would end a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|")


def row(parameter: Any, context: Any) -> str:
    """Return the row of one argument or option: its name and value, what it does, and its default."""
    name, about = parameter.get_help_record(context)
    for kind, value in VALUES.items():
        name = name.replace(kind, value if name.startswith("-") else "").strip()
    notes = [found for match in re.findall(IN_THE_LAST_COLUMN, about) for found in match if found]
    about = quoted(re.sub(IN_THE_LAST_COLUMN, "", about))
    return f"| `{cell(name)}` | {cell(about)} | {cell(', '.join(notes))} |"


def tables() -> str:
    """Return a section per command, in the order of ``--help``: what it does, and a row per option."""
    blocks = []
    for name, command in typer.main.get_command(app).commands.items():
        context = typer.Context(command)
        about = quoted("\n\n".join(" ".join(paragraph.split()) for paragraph in (command.help or "").split("\n\n")))
        rows = [row(parameter, context) for parameter in command.params]
        blocks.append("\n".join([f"## {name}", "", about, "", "| Option | | Default |", "|---|---|---|", *rows]))
    return "\n\n".join(blocks)


def with_tables(page: str) -> str:
    """Return the page with what is between its two markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
