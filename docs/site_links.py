"""Sphinx extension: link public names in the inline code of the Markdown pages to their entries in the reference.

On GitHub a link out of ``docs/``, such as to ``../m3er_fast/check.py``, opens the file. The site does not contain that
file, and shows the link's text alone.
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
    """A transform that turns inline code naming a documented object into a link to it."""

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
            link = make_refnode(
                self.app.builder, self.env.docname, entry.docname, entry.node_id, literal.deepcopy(), full
            )
            literal.replace_self(link)


def link_to_source(app: Sphinx, _docname: str, source: list[str]) -> None:
    """Reduce links that leave docs/ to their text."""
    del app

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        return text if (ROOT / target).exists() else match[0]

    # A backtick always begins code: two readings of each would take time exponential in their number.
    source[0] = re.sub(r"\[((?:[^\[\]`]|`[^`]*`)+)\]\(\.\./([\w./-]+)\)", replace, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the transform and the filter of links."""
    app.connect("source-read", link_to_source)
    app.add_post_transform(NameLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
