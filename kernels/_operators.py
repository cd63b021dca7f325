"""Registration of the kernels' operators, and their schemas from the records in :mod:`m3er_fast.operands`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_origin, get_type_hints

import torch
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


def operator(name: str, *, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that registers a function as the operator ``m3er_fast::name``, which mutates no argument.

    Raises:
        ImportError: if the function's file was imported from the checkout under the bare name ``kernels``. Torch would
            replace the operators of its first copy without a word, and calling those again can crash the process.
    """

    def register(function: Callable[..., Any]) -> Any:
        if not function.__module__.startswith("m3er_fast."):
            raise ImportError(
                f"import m3er_fast.{function.__module__} instead of {function.__module__}: "
                "a second copy of the file would register every operator twice"
            )
        return torch.library.custom_op(f"m3er_fast::{name}", function, mutates_args=(), schema=schema)

    return register


def schema_of(record: type) -> str:
    """Return a NamedTuple's fields as the arguments of an operator's schema: "Tensor? available, float beta"."""
    return ", ".join(f"{_schema_type(hint)} {name}" for name, hint in get_type_hints(record).items())


def _schema_type(hint: Any) -> str:
    return "str" if get_origin(hint) is Literal else _SCHEMA_TYPES[hint]
