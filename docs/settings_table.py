"""Write the tables of settings in settings.md anew from m3er_fast/config.py, where each setting is declared.

python docs/settings_table.py
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from m3er_fast import M3ERConfig

PAGE = Path(__file__).with_name("settings.md")
BEGIN = "<!-- Written by docs/settings_table.py -->"
END = "<!-- End of the settings -->"


def markdown(about: str) -> str:
    """Turn the description of a setting from reStructuredText into one line of Markdown."""
    line = re.sub(r":\w+:`(?:m3er_fast\.)?([\w.]+)`", r"`\1`", " ".join(about.split())).replace("``", "`")
    return re.sub(r"docs/(\w+)\.md", lambda page: f"[{page[1].replace('_', ' ').capitalize()}]({page[1]}.md)", line)


def tables() -> str:
    """Return one table per part of the settings, each below a heading."""
    parts = [(part.name, getattr(M3ERConfig(), part.name)) for part in dataclasses.fields(M3ERConfig)]
    blocks = []
    for name, part in parts:
        if dataclasses.is_dataclass(part):
            rows = [
                f"| `{field.name}` | `{getattr(part, field.name)!r}` | {markdown(field.metadata['about'])} |"
                for field in dataclasses.fields(part)
            ]
            blocks.append("\n".join([f"## {name}", "", "| Field | Default | |", "|---|---|---|", *rows]))
    return "\n\n".join(blocks)


def with_tables(page: str) -> str:
    """Return the page with the tables between its two markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
