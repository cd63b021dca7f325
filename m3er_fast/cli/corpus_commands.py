"""The commands that make and examine a corpus: convert, generate and audit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3er_fast.cli.options import CorpusArgument, split_sizes
from m3er_fast.cli.progress import ProgressDisplay
from m3er_fast.corpus import FORMATS, Corpus, read_parquet

if TYPE_CHECKING:
    from m3er_fast.fusion import M3ERFusion


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="File or folder to read.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")],
    out: Annotated[Path, typer.Option(metavar="CORPUS", help="Folder to write the corpus to.")],
    resplit: Annotated[bool, typer.Option("--resplit", help="Split anew and ignore the splits of the source.")] = False,
) -> None:
    """Convert a published feature file to a Parquet corpus.

    A source without splits is split 7:1:2, and no video or speaker is in two of them.
    """
    from m3er_fast.corpus import convert

    corpus = convert(source, format, out, resplit=resplit)
    dims = ", ".join(f"{name} {dim}" for name, dim in corpus.input_dims.items())
    print(f"{out}: {len(corpus)} utterances of at most {corpus.steps} frames ({split_sizes(corpus)}); features: {dims}")


def generate(
    out: Annotated[Path, typer.Option(metavar="CORPUS", help="Folder to write the corpus to.")],
    utterances: Annotated[int, typer.Option(min=1, help="Utterances in all shards.")] = 100_000,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Utterances per shard.")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Frames of the padded time axis.")] = 20,
    features: Annotated[str, typer.Option(metavar="NAME=D,...", help="Features of each modality.")] = (
        "text=300,audio=74,face=36"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random values.")] = 0,
) -> None:
    """Generate an unlabelled corpus of any size.

    It serves to measure the scoring speed of a machine. Generating needs memory for one shard.
    """
    from m3er_fast.corpus import generate_corpus

    dims = {}
    for part in features.split(","):
        name, _, number = part.partition("=")
        if not name.strip() or not number.strip().isdecimal() or not int(number):
            raise typer.BadParameter(f"{part!r} is not NAME=D", param_hint="--features")
        dims[name.strip()] = int(number)
    with ProgressDisplay("generate", "shards") as display:
        paths = generate_corpus(
            out,
            utterances=utterances,
            rows_per_shard=rows_per_shard,
            input_dims=dims,
            steps=steps,
            seed=seed,
            progress=display.update,
        )
    print(f"{out}: {utterances} utterances in {len(paths)} shards")


def audit(
    corpus: CorpusArgument,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Also report the share of each modality that this model's check calls ineffectual."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Report what is wrong with a corpus.

    Examines lengths, non-finite, constant or missing modalities, labels, splits that share a group, and duplicates.
    With a model, the report is about the model's modalities only.
    """
    from m3er_fast.corpus import audit_corpus
    from m3er_fast.scoring import load_model

    judge = None if model is None else load_model(model)
    data = read_parquet(corpus, input_dims=None if judge is None else judge.input_dims)
    report = audit_corpus(data)
    shares = {} if judge is None else _ineffectual_shares(judge, data)
    if as_json:
        print(json.dumps({**report.to_dict(), "ineffectual": shares} if judge else report.to_dict(), indent=2))
        return
    print(report.to_text())
    for name, share in shares.items():
        verdict = "never available" if share is None else f"{share:.1%} of what is available looks ineffectual"
        print(f"{name}: {verdict}")


def _ineffectual_shares(model: M3ERFusion, corpus: Corpus) -> dict[str, float | None]:
    """Return the share of each modality's available utterances that the model's check calls ineffectual.

    The share is None where the modality is never available.
    """
    from m3er_fast.training import evaluate

    if not len(corpus):
        return dict.fromkeys(model.input_dims)
    effective = evaluate(model, replace(corpus, target=None)).effective
    return {
        name: float((~effective[present, m]).mean()) if (present := corpus.available[:, m]).any() else None
        for m, name in enumerate(model.input_dims)
    }
