"""Settings that are declared once, as fields of a record, and taken by the functions and classes that use them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)


def setting(default: Any, check: Callable[[str, Any], object], about: str) -> Any:
    """A field of a settings dataclass: its default, how its value is checked, and what it means.

    Args:
        default: the default value.
        check: called with name and value; raises a ValueError that names them.
        about: one or more sentences for the documentation.
    """
    return dataclasses.field(default=default, metadata={"check": check, "about": about})


def check_settings(settings: Any) -> None:
    """Check every field of a settings dataclass.

    Raises:
        ValueError: naming the first field that is out of range.
    """
    for field in dataclasses.fields(settings):
        if "check" in field.metadata:
            field.metadata["check"](field.name, getattr(settings, field.name))


def document_settings(cls: type, kind: type) -> None:
    """Replace ``{settings}``, on a line of its own in a docstring, by the description of a dataclass's fields."""
    indent = " " * 8
    lines = [f"{field.name}: {field.metadata['about']}" for field in dataclasses.fields(kind)]
    described = "\n".join(f"{indent}{line}".replace("\n", f"\n{indent}    ") for line in lines)
    if cls.__doc__ is not None:
        cls.__doc__ = cls.__doc__.replace(f"{indent}{{settings}}", described)


def takes_keywords_of(record: type) -> Callable[[_Function], _Function]:
    """Give a function whose ``**options`` are the fields of a NamedTuple the signature that spells them out."""
    types = get_type_hints(record)
    fields: Any = record
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in fields._field_defaults.items()
    ]

    def with_signature(function: _Function) -> _Function:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        function.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return function

    return with_signature


def takes_settings_of(kind: type) -> Callable[[_Class], _Class]:
    """Give a class whose arguments end in the fields of a settings dataclass their signature and documentation.

    The class's ``__init__`` takes them as ``*settings, **named_settings``. ``{settings}`` in its docstring, on a line
    of its own, becomes the description of the fields.
    """
    types = get_type_hints(kind)
    added = [
        inspect.Parameter(
            field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.default, annotation=types[field.name]
        )
        for field in dataclasses.fields(kind)
    ]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

    def with_signature(cls: _Class) -> _Class:
        initialize: Any = cls.__init__  # type: ignore[misc]
        own = inspect.signature(initialize)
        kept = [p for p in own.parameters.values() if p.kind not in variadic]
        initialize.__signature__ = own.replace(parameters=[*kept, *added])
        document_settings(cls, kind)
        return cls

    return with_signature
