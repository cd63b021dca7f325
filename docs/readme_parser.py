"""The parser with which the site's index includes README.md: its links begin at the root of the repository."""

from __future__ import annotations

from docutils import nodes
from myst_parser.sphinx_ import Parser as MystParser


class Parser(MystParser):
    """Markdown of a file beside ``docs/``, included by a page in it; docutils asks for this name."""

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the text with its links relative to ``docs/``."""
        super().parse(inputstring.replace("](docs/", "]("), document)
