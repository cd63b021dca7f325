"""The command that measures how good a model is: evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m3er_fast.cli.options import CorpusArgument, ThreadsOption, use_threads
from m3er_fast.cli.progress import ProgressDisplay
from m3er_fast.cli.tables import print_markdown


def evaluate(
    corpus: CorpusArgument,
    model: Annotated[Path, typer.Option(metavar="RUN", help="Folder that train wrote, with the model.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the scores as JSON, page and figure.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME,...", help="Splits to score.  [default: all]")] = None,
    corruption: Annotated[
        str,
        typer.Option(metavar="NAME,...", help="Corruptions to score under, such as freeze or gain:mild; all, or none."),
    ] = "all",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the corruptions.")] = 0,
    threads: ThreadsOption = 1,
) -> None:
    """Measure how good a model is on a labelled corpus.

    Prints F1, MA, accuracy and calibration error by split, class and group, clean and with corrupted modalities.
    """
    from m3er_fast.corpus import read_parquet
    from m3er_fast.corpus_evaluation import evaluate_corpus
    from m3er_fast.corruption import KINDS, PAPER_CORRUPTION, named
    from m3er_fast.scoring import load_model

    every = [PAPER_CORRUPTION, *(name for name in KINDS if name != PAPER_CORRUPTION)]
    kinds = {"all": every, "none": []}.get(corruption, [name.strip() for name in corruption.split(",")])
    for name in kinds:
        try:
            named(name, argument="NAME")
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--corruption") from error
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written to is an error now
    use_threads(threads)
    with ProgressDisplay("evaluate") as display:
        result = evaluate_corpus(
            load_model(model),
            read_parquet(corpus),
            corruptions=kinds,
            splits=None if split is None else [name.strip() for name in split.split(",")],
            seed=seed,
            progress=display.say,
        )
    print_markdown(result.to_markdown())
    if out is not None:
        result.write(out)
        print(f"\nScores, page and figure: {out}")
