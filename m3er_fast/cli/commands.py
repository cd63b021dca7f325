"""The application that holds all commands; :mod:`m3er_fast.cli.main` runs it. Needs typer and rich.

Results go to stdout, progress and warnings to stderr.
"""

from __future__ import annotations

from typing import Annotated

import typer

from m3er_fast.cli.corpus_commands import audit, convert, generate
from m3er_fast.cli.evaluation_commands import evaluate
from m3er_fast.cli.machine_commands import bench, info
from m3er_fast.cli.recording_commands import extract, predict
from m3er_fast.cli.scoring_commands import score
from m3er_fast.cli.training_commands import ablate, demo, fit_stats, train, tune

# Plain help: rich's boxes break option names over lines on a narrow terminal.
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from m3er_fast import __version__

        print(f"m3er-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Multimodal emotion recognition that survives a lost modality (M3ER).

    Exit codes: 0 complete; 1 internal error; 2 usage or configuration; 3 finished, with something quarantined; 4 the
    run to resume does not match; 5 disk full; 130 interrupted; 141 nobody reads the output any more.
    """


# In the order of --help.
for _command in (
    demo,
    convert,
    extract,
    train,
    tune,
    evaluate,
    score,
    predict,
    fit_stats,
    generate,
    ablate,
    audit,
    bench,
    info,
):
    app.command()(_command)
