"""The documentation site: the Markdown pages of this folder, and a reference made from the docstrings.

Pages that are also read on GitHub are Markdown. Pages of the site alone (its index, the reference) are
reStructuredText. Neither building nor reading the site needs the network.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import m3er_fast

project = "m3er-fast"
author = "the m3er-fast authors"
copyright = "2026, the m3er-fast authors"  # Sphinx's name for it
version = release = m3er_fast.__version__

extensions = [
    "myst_nb",  # Markdown by myst_parser, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "signatures",
    "site_links",
]
exclude_patterns = ["_build", "results/*"]

# Markdown as GitHub reads it: links to headings by their text, tables, no other syntax.
myst_heading_anchors = 3

# Notebooks are committed with their outputs, which GitHub shows too; a test runs their code.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {
    name: name for name in ("Array", "Features", "FeatureSource")
}  # by name, not what they stand for
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"m3er-fast {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False
