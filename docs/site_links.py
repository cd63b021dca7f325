"""Sphinx extension: the Markdown pages' links to source files, and their names of functions, lead into the reference.

On GitHub a link to ``../m3er_fast/check.py`` opens the file. On the site it leads to that file's highlighted source, and
inline code that is a public name, such as ``functional.memory_scan``, to its entry in the reference.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parents[1]


class NameLinks(SphinxPostTransform):
    """Inline code that names a documented object becomes a link to it."""

    default_priority = 200

    def run(self, **_kwargs: Any) -> None:
        """Look every literal of the page up among the documented objects."""
        objects = self.env.domains.python_domain.objects
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, nodes.reference | addnodes.pending_xref):
                continue
            name = re.sub(r"\(.*\)$", "", literal.astext())
            candidates = (name, f"m3er_fast.{name}")
            full = next((candidate for candidate in candidates if candidate in objects), None)
            if full is None:
                continue
            entry = objects[full]
            try:
                link = make_refnode(
                    self.app.builder, self.env.docname, entry.docname, entry.node_id, literal.deepcopy(), full
                )
            except Exception:  # noqa: BLE001, S112  # a builder without addresses
                continue
            literal.replace_self(link)


def link_to_source(app: Sphinx, _docname: str, source: list[str]) -> None:
    """Links that leave docs/ for a Python file go to its page of the highlighted source; others to plain text."""
    del app

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        return text if (ROOT / target).exists() else match[0]

    source[0] = re.sub(r"\[((?:[^\[\]]|`[^`]*`)+)\]\(\.\./([\w./-]+)\)", replace, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register both."""
    app.connect("source-read", link_to_source)
    app.add_post_transform(NameLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
