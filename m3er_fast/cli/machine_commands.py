"""The commands about this machine: bench and info."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from m3er_fast.cli.exit_codes import INTERNAL
from m3er_fast.cli.options import usable_devices


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAMES]...", help="Operations, such as fusion_loss.  [default: all]")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to measure: cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(metavar="JSON", help="File for the run, in pytest-benchmark's format.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="File for the roofline.")] = None,
    benchmarks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder benchmarks of a checkout.  [default: the one beside this package]"
        ),
    ] = None,
) -> None:
    """Measure the throughput of operations beside other libraries.

    Needs a checkout of the project, since the wheel has no benchmarks. Every result is shown as soon as it is
    available, in a table on a terminal and as a line elsewhere. All benchmarks take a quarter of an hour on two cores.
    """
    from m3er_fast.cli.bench import BenchmarkResult, benchmark_files, run_benchmarks
    from m3er_fast.cli.bench_display import BenchmarkDisplay

    files = benchmark_files(benchmarks)
    unknown = [name for name in names or () if name not in files]
    if unknown:
        raise typer.BadParameter(
            f"no benchmark is called {', '.join(unknown)}; there are {', '.join(files)}", param_hint="NAMES"
        )
    [chosen] = usable_devices(device)[:1]
    left_out: Counter[str] = Counter()

    def show(result: BenchmarkResult) -> None:
        if result.left_out:
            left_out.update(result.cells)
        else:
            display.add(result)

    with BenchmarkDisplay.for_stdout() as display:
        number = run_benchmarks(
            [files[name] for name in names or files],
            device=chosen,
            out=out,
            plot=plot,
            show=show,
            progress=display.update,
        )
    print()
    for reason, results in left_out.items():
        print(f"{results} left out: {reason}")
    written = "".join(f", {path}" for path in (out, plot) if path is not None)
    print(f"{number} results{written}")


def info(
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every back end with its definition, within a minute.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what works on this machine.

    Lists versions, devices, packages and back ends. Each is tried, and a failure is shown with its reason. With
    --verify every implementation is also run on small hard inputs, compared with the reference in float64, and timed.
    The exit code is then 1 if any is wrong.
    """
    from m3er_fast.cli.environment import describe_environment, try_backends
    from m3er_fast.cli.environment_display import EnvironmentDisplay, as_object
    from m3er_fast.verification import Verdict
    from m3er_fast.verification import verify as verdicts_of_this_machine

    display = None if as_json else EnvironmentDisplay()
    findings, verdicts = describe_environment(), list[Verdict]()
    if not verify:
        findings["backends"] = try_backends()
    if display:
        display.show_findings(findings)
    for verdict in verdicts_of_this_machine() if verify else ():
        verdicts.append(verdict)
        if display:
            display.show_verdict(verdict)
    if display:
        display.show_mistakes(verdicts)
    else:
        print(json.dumps(as_object(findings, verdicts if verify else None), indent=1, allow_nan=False))
    if any(verdict.mistakes for verdict in verdicts):
        raise typer.Exit(INTERNAL)
