"""The commands that make and examine a corpus: convert, generate and audit."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

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
    classes: Annotated[
        int | None, typer.Option(min=1, max=16, help="Classes of the labels.  [default: no labels, no splits]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random values.")] = 0,
) -> None:
    """Generate a corpus of any size.

    It serves to measure the speed of a machine. Generating needs memory for one shard.
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
            num_classes=classes,
            seed=seed,
            progress=display.update,
        )
    print(f"{out}: {utterances} utterances in {len(paths)} shards")


def audit(
    corpus: CorpusArgument,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Also report the share of each modality that this model's check calls ineffectual, and why.",
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
    judged = {} if judge is None else _judge_modalities(judge, data)
    if as_json:
        found = {
            "ineffectual": {name: share for name, (share, _) in judged.items()},
            "ineffectual_reason": {name: reason for name, (_, reason) in judged.items()},
        }
        print(json.dumps({**report.to_dict(), **(found if judge else {})}, indent=2))
        return
    print(report.to_text())
    for name, (share, reason) in judged.items():
        verdict = "never available" if share is None else f"{share:.1%} of what is available looks ineffectual"
        print(f"{name}: {verdict}{f', most often: {reason}' if reason else ''}")


class _Judged(NamedTuple):
    """The verdicts of a model's check on one modality of a corpus."""

    share: float | None  # of the available utterances that look ineffectual; None where it is never available
    reason: str | None  # the most frequent one; None where nothing looks ineffectual, or the model has no check


def _judge_modalities(model: M3ERFusion, corpus: Corpus) -> dict[str, _Judged]:
    """Return what the model's check says of each modality."""
    from m3er_fast.check import ModalityCheck
    from m3er_fast.training import evaluate

    if not len(corpus):
        return dict.fromkeys(model.input_dims, _Judged(None, None))
    prediction = evaluate(model, replace(corpus, target=None))
    judged = {}
    for m, name in enumerate(model.input_dims):
        present = corpus.available[:, m]
        reasons = Counter(ModalityCheck.reasons[n] for n in prediction.reason[present, m].tolist() if n)
        share = float((~prediction.effective[present, m]).mean()) if present.any() else None
        judged[name] = _Judged(share, max(reasons, key=lambda reason: (reasons[reason], reason), default=None))
    return judged
