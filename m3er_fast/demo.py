"""The whole method on a generated corpus, which takes a few minutes on two cores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from m3er_fast.ablation import UNFINISHED, AblationResult, draw_proxies, regenerate, run_ablation
from m3er_fast.config import M3ERConfig, NetworkConfig, ProxyConfig
from m3er_fast.corpus.parquet import write_parquet
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring import score
from m3er_fast.training import train


def run_demo(
    out: Path,
    *,
    progress: Callable[[str], None] | None = None,
    moved: Callable[[int, int], None] | None = None,
    resumed: Callable[[str], None] | None = None,
) -> AblationResult:
    """Generate a corpus of moderate correlation, train, score, and write Table 2 and the figures into ``out``.

    ``out`` receives the corpus (corpus/), a trained model with its history (model/), the model's scores for the corpus
    (scores/), Table 2 over five seeds (table.md, table.json), its bars (ablation.png), Figures 3 (figure3.png) and 7
    (figure7.png), and Figure 7 for modalities that are linear maps of each other (figure7_linear.png).

    After an interruption the same call goes on where it was, to the same results.

    Args:
        out: a folder that is empty, does not exist yet, or holds an interrupted demo.
        progress: called with a line of text at every stage.
        moved: see :func:`m3er_fast.ablation.run_ablation`.
        resumed: called once, with a line of text, if an earlier call was interrupted.

    Raises:
        ResumeMismatchError: if the interrupted demo was one of another version.
        ValueError: if ``out`` holds anything else.
    """
    mark = out / UNFINISHED / "demo"  # the first file to come and the last to go: what is beside it is of a demo
    if out.exists() and any(out.iterdir()) and not mark.is_file():
        raise ValueError(f"{out} is not empty: give another folder with --out, or remove it")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    report_progress = progress or (lambda line: None)
    report_progress("generating 2000 utterances")
    corpus = make_synthetic(seed=0)
    shutil.rmtree(out / "corpus", ignore_errors=True)  # it may be written in part; the next one is the same
    write_parquet(corpus, out / "corpus")
    config = M3ERConfig(network=NetworkConfig(dropout=0.5))
    config = config.replace(training=replace(config.training, epochs=20))
    report_progress("training a model and scoring the corpus with it")
    model = train(corpus, config, out=out / "model").model
    score(out / "corpus", model, out / "scores", resume=True)
    report_progress("regenerating linearly related modalities")
    draw_linear_proxies(out / "figure7_linear.png")
    return run_ablation(corpus, config, out=out, progress=progress, moved=moved, resumed=resumed)


def draw_linear_proxies(path: Path) -> dict[str, float]:
    """Draw Figure 7 in the setting in which its 0.01 % can be reached: linear, nearly noiseless relations.

    Without matplotlib, nothing is drawn.

    Returns:
        The relative L2 error of each modality's proxy.
    """
    corpus = make_synthetic(500, correlation=1.0, nonlinearity=0.0, noise=1e-6, seed=0)
    config = M3ERConfig(check=None, proxy=ProxyConfig(ridge=1e-10))
    model = M3ERFusion(corpus.input_dims, len(corpus.classes), config, classes=corpus.classes)
    training = corpus.subset("train")
    model.fit(training.features, lengths=training.lengths, available=training.available)
    errors, frames = regenerate(model, corpus.subset("test"))
    draw_proxies(errors, frames, path)
    return errors
