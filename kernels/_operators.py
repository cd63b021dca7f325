"""Schemas of operators whose arguments are the fields of the records in :mod:`m3er_fast.operands`."""

from __future__ import annotations

from typing import Any, Literal, get_origin, get_type_hints

from torch import Tensor

from m3er_fast.operands import TwoLayers

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    TwoLayers: "Tensor[]",
    bool: "bool",
    int: "SymInt",
    float: "float",
    float | None: "float?",
}


def schema_of(record: type) -> str:
    """Return a NamedTuple's fields as the arguments of an operator's schema: "Tensor? available, float beta"."""
    return ", ".join(f"{_schema_type(hint)} {name}" for name, hint in get_type_hints(record).items())


def _schema_type(hint: Any) -> str:
    return "str" if get_origin(hint) is Literal else _SCHEMA_TYPES[hint]
