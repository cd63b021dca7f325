"""What works on this machine, as a table on stdout or as a JSON object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from m3er_fast.cli.environment import Finding
from m3er_fast.verification import Verdict

_COLUMNS = ("operation", "implementation", "device", "", "cases", "of tolerance", "ms", "speed")
_FORMAT = "  {:<20} {:<14} {:<7} {:<9} {:>6} {:>13} {:>9} {:>7}"


class EnvironmentDisplay:
    """Findings and verdicts, line by line as they arrive."""

    def __init__(self) -> None:
        self._console = Console(soft_wrap=True, highlight=False)
        self._has_heading = False

    def show_findings(self, findings: Mapping[str, Sequence[Finding]]) -> None:
        """Show what was found under each heading."""
        for heading, lines in findings.items():
            self._console.print(Text(heading, "bold"))
            for name, works, note in lines:
                verdict = Text("works  ", "green") if works else Text("no     ", "yellow")
                self._console.print(Text.assemble(f"  {name:<30}", verdict, note))

    def show_verdict(self, verdict: Verdict) -> None:
        """Show one implementation."""
        if not self._has_heading:
            self._console.print(Text("verified", "bold"))
            self._console.print(_FORMAT.format(*_COLUMNS))
            self._has_heading = True
        names = (verdict.operation, verdict.implementation, verdict.device)
        if verdict.unavailable is not None:
            self._console.print(Text(_FORMAT.format(*names, "not here", "", "", "", "").rstrip(), "yellow"), end="")
            self._console.print(f"  {verdict.unavailable}", markup=False)
            return
        time = "" if verdict.milliseconds is None else f"{verdict.milliseconds:.3g}"
        speed = "" if verdict.speedup is None else f"{verdict.speedup:.2f}"
        share = "" if math.isinf(verdict.share) else f"{verdict.share:.1%}"
        word, style = ("wrong", "red") if verdict.mistakes else ("right", "green")
        line = _FORMAT.format(*names, word, verdict.cases, share, time, speed)
        left_out = f"  {verdict.left_out} cases not reached in time" if verdict.left_out else ""
        self._console.print(Text(line + left_out, style))

    def show_mistakes(self, verdicts: Sequence[Verdict]) -> None:
        """Show every case that is wrong: what came, and what was wanted."""
        for verdict in verdicts:
            for case, place, got, wanted, share in verdict.mistakes:
                times = "" if math.isinf(share) else f", {share:.3g} times what it may be off"
                self._console.print(
                    f"wrong: {verdict.operation} by {verdict.implementation} on {verdict.device}, case {case!r}: "
                    f"{place}: got {got}, wanted {wanted}{times}",
                    markup=False,
                )


def as_object(findings: Mapping[str, Sequence[Finding]], verdicts: Sequence[Verdict] | None) -> dict[str, Any]:
    """The same as an object of JSON, which holds no infinity: null stands for one."""
    found: dict[str, Any] = {heading: [line._asdict() for line in lines] for heading, lines in findings.items()}
    if verdicts is not None:
        found["verified"] = [
            {name: _finite(value) for name, value in verdict._asdict().items() if name != "mistakes"}
            | {"mistakes": [{name: _finite(x) for name, x in m._asdict().items()} for m in verdict.mistakes]}
            for verdict in verdicts
        ]
    return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
