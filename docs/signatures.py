"""Sphinx extension: the signature of a class is the one of its own ``__init__``, and types have their names.

autodoc asks ``__new__`` first, and a mixin's, such as that of huggingface_hub's models, hides every argument behind
``*args, **kwargs``. A protocol is not called at all, and has no signature. In a union, Sphinx writes the name of a type
alias as what holds it while annotations are evaluated.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature


def own_signature(
    _app: Sphinx, what: str, _name: str, of: Any, _options: Any, shown: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Return the signature to show, or None where there is none."""
    if shown is None:
        return None
    if what == "class" and shown.startswith("(*args"):
        if getattr(of, "_is_protocol", False):
            return "", returns
        own = signature(of.__init__, bound_method=True)
        shown = stringify_signature(own, show_return_annotation=False, unqualified_typehints=True)
    return re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", shown), returns


def setup(app: Sphinx) -> dict[str, Any]:
    """Listen to the signatures that autodoc finds."""
    app.connect("autodoc-process-signature", own_signature)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
