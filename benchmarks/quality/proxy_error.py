"""Error of proxies as a function of the relation between the modalities.

    python -m benchmarks.quality.proxy_error OUT

generates corpora whose modalities share more and more (``correlation`` of ``make_synthetic``), linearly and
nonlinearly, almost without noise and with it, and regenerates each modality of the test split from the others. It
trains no network. It writes OUT/proxy_error.json and .png.

The error is mean ‖proxy - original‖ / mean ‖original‖ over valid frames, in standardised features. The training mean
has an error of 1.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.quality import common
from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.ablation import regenerate
from m3er_fast.config import ProxyConfig
from m3er_fast.corpus.synthetic import make_synthetic

CORRELATIONS = (0.0, 0.25, 0.5, 0.7, 0.85, 0.95, 0.99, 0.999, 1.0)
RELATIONS = {
    "linear, noise 1e-6": {"nonlinearity": 0.0, "noise": 1e-6},
    "linear, noise 0.5": {"nonlinearity": 0.0, "noise": 0.5},
    "nonlinear, noise 1e-6": {"nonlinearity": 0.3, "noise": 1e-6},
    "nonlinear, noise 0.5 (the defaults)": {"nonlinearity": 0.3, "noise": 0.5},
}
RIDGES = {"ridge 0.3 (the default)": 0.3, "ridge 1e-10": 1e-10}
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
SLIDES_ERROR = 1e-4  # "within 0.01 % of the original", as the paper's slides say


def error(relation, correlation, ridge, seed):
    """Return the mean error over modalities."""
    corpus = make_synthetic(500, correlation=correlation, seed=seed, **relation)
    config = M3ERConfig(check=None, proxy=ProxyConfig(bank="neighbours", ridge=ridge))
    model = M3ERFusion(corpus.input_dims, len(corpus.classes), config)
    training = corpus.subset("train")
    model.fit(training.features, lengths=training.lengths, available=training.available)
    return float(np.mean(list(regenerate(model, corpus.subset("test"))[0].values())))


def draw(results, path):
    figure = Figure(figsize=(9.5, 4), dpi=130, layout="constrained")
    for axes, (label, relations) in zip(figure.subplots(1, len(RIDGES), sharey=True), results.items(), strict=True):
        for color, (relation, errors) in zip(COLORS, relations.items(), strict=True):
            means = [np.mean(errors[str(r)]) for r in CORRELATIONS]
            axes.plot(range(len(CORRELATIONS)), means, "o-", color=color, ms=4, label=relation)
            spread = np.array([errors[str(r)] for r in CORRELATIONS])
            axes.fill_between(range(len(CORRELATIONS)), spread.min(1), spread.max(1), color=color, alpha=0.2, lw=0)
        axes.axhline(1.0, color="0.5", linestyle=":", linewidth=1)
        axes.axhline(SLIDES_ERROR, color="0.5", linestyle="--", linewidth=1)
        axes.annotate("the training mean", (0, 1.0), (0, 3), textcoords="offset points", fontsize=8, color="0.35")
        axes.annotate(
            "the slides' 0.01 %", (0, SLIDES_ERROR), (0, 3), textcoords="offset points", fontsize=8, color="0.35"
        )
        axes.set_yscale("log")
        axes.set_xticks(range(len(CORRELATIONS)), [f"{r:g}" for r in CORRELATIONS], fontsize=8)
        axes.set_xlabel("correlation of the latents")
        axes.set_title(label, fontsize=9, loc="left")
        axes.grid(axis="y", color="0.92")
    figure.axes[0].set_ylabel("relative L2 error of the proxies")
    figure.axes[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 0.4))
    figure.savefig(path, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    results = {
        label: {
            name: {str(r): [error(relation, r, ridge, seed) for seed in range(options.seeds)] for r in CORRELATIONS}
            for name, relation in RELATIONS.items()
        }
        for label, ridge in RIDGES.items()
    }
    common.write_results(options.out / "proxy_error.json", {"seeds": options.seeds}, results=results)
    draw(results, options.out / "proxy_error.png")


if __name__ == "__main__":
    main()
