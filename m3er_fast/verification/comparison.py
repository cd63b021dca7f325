"""How far a result is from what was wanted, as a share of what it may be off."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """The element of an output that uses up most of its tolerance."""

    share: float  # 1 is as far off as is allowed; inf: another shape, or no number where one was wanted
    place: str  # such as "loss[3]"
    got: str
    wanted: str


def largest_difference(name: str, got: Tensor, wanted: Tensor, tolerance: Tensor | float) -> Difference:
    """Compare an output with the wanted one.

    NaN equals NaN, and an infinity itself. Integers and booleans must be equal, as must all where the tolerance is 0.

    Args:
        name: what the output is called.
        got: of any floating or integer dtype.
        wanted: of the same shape.
        tolerance: largest absolute error, of all or of each element.
    """
    if got.shape != wanted.shape:
        return Difference(torch.inf, name, f"shape {tuple(got.shape)}", f"shape {tuple(wanted.shape)}")
    if got.is_floating_point() != wanted.is_floating_point():
        return Difference(torch.inf, name, str(got.dtype), "integers" if got.is_floating_point() else "numbers")
    if not got.numel():
        return Difference(0.0, name, "nothing", "nothing")
    found, right = got.detach().cpu().double(), wanted.detach().cpu().double()
    alike = (found == right) | (found.isnan() & right.isnan())
    share = ((found - right).abs() / torch.as_tensor(tolerance, dtype=torch.float64)).nan_to_num(torch.inf, torch.inf)
    share = share.masked_fill(alike, 0.0)
    worst = int(share.argmax())
    index = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(worst), share.shape))
    place = f"{name}[{index}]" if index else name
    return Difference(
        float(share.flatten()[worst]), place, *(f"{float(x.flatten()[worst]):.9g}" for x in (found, right))
    )
