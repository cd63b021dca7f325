"""Sphinx extension: the signature of a class is the one of its own ``__init__``.

autodoc asks ``__new__`` first, and a mixin's, such as that of huggingface_hub's models, hides every argument behind
``*args, **kwargs``. A protocol is not called at all, and has no signature.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature


def own_signature(
    _app: Sphinx, what: str, _name: str, of: Any, _options: Any, shown: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Return the signature to show in place of one that says nothing, or None to keep what autodoc has found."""
    if what != "class" or shown is None or not shown.startswith("(*args"):
        return None
    if getattr(of, "_is_protocol", False):
        return "", returns
    own = signature(of.__init__, bound_method=True)
    return stringify_signature(own, show_return_annotation=False, unqualified_typehints=True), returns


def setup(app: Sphinx) -> dict[str, Any]:
    """Listen to the signatures that autodoc finds."""
    app.connect("autodoc-process-signature", own_signature)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
