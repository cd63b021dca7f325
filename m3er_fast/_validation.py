"""The checks of single arguments, each with its one error message."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from torch import Tensor


def near_names(name: str, names: Iterable[str]) -> str:
    """Return ", did you mean …?" with the names that ``name`` may stand for, or nothing if it resembles none.

    A name resembles another by its letters, by its beginning, or by the first letters of its words.
    """
    wanted = name.strip("-_").casefold()

    def resembles(other: str) -> bool:
        plain = other.strip("-_").casefold()
        initials = "".join(word[:1] for word in plain.replace("_", "-").split("-"))
        begins = min(len(plain), len(wanted)) > 1 and (plain.startswith(wanted) or wanted.startswith(plain))
        return begins or (len(wanted) > 1 and wanted == initials)

    known = list(names)
    found = [other for other in known if resembles(other)]
    close = difflib.get_close_matches(wanted, [other.strip("-_").casefold() for other in known], n=3, cutoff=0.6)
    found += [other for other in known if other.strip("-_").casefold() in close and other not in found]
    return f", did you mean {' or '.join(found[:3])}?" if found else ""


def can_look_at(x: Tensor) -> bool:
    """Whether values of ``x`` may decide what is computed: no device is waited for, and nothing traces the tensors."""
    import torch

    return x.is_cpu and not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def is_positive_int(value: Any) -> bool:
    """Whether ``value`` is an int of 1 or more; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_positive_int(name: str, value: Any, *, or_else: str = "") -> None:
    """Raise a ValueError unless ``value`` is an int of 1 or more; ``or_else`` names what else would have done."""
    if not is_positive_int(value):
        raise ValueError(f"{name} must be a positive int{or_else}, got {value!r}")


def check_boolean(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise a ValueError unless ``value`` is one of a ``Literal`` type or a sequence."""
    allowed = get_args(choices) or tuple(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, exclusive: bool = False) -> None:
    """Raise a ValueError unless ``value`` is a finite number from ``low`` to ``high``, or strictly between them."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (exclusive and value in (low, high)):
        if math.isinf(high):
            wanted = f"{'>' if exclusive else '≥'} {low:g}"
        else:
            wanted = f"in ({low:g}, {high:g})" if exclusive else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number {wanted}, got {value!r}")


def check_vector(name: str, value: Tensor | None, size: int) -> None:
    """Raise a ValueError unless ``value`` is None or of shape (size,)."""
    if value is not None and value.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, wanted ({size},)")


def check_matrix(name: str, value: Tensor) -> None:
    """Raise a ValueError unless ``value`` is a floating matrix with a column or more."""
    if value.ndim != 2 or not value.shape[1] or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a floating matrix with at least one column, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def check_device(whose: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError unless the others, where there are any, are on the device of ``tensor``."""
    for name, value in others.items():
        if value is not None and value.device != tensor.device:
            raise ValueError(f"{name} is on {value.device}, wanted {tensor.device}, where {whose} are")


def not_fitted(message: str) -> Exception:
    """Return scikit-learn's ``NotFittedError``; importing scikit-learn takes as long as torch, so it waits for this."""
    from sklearn.exceptions import NotFittedError

    error: Exception = NotFittedError(message)
    return error
