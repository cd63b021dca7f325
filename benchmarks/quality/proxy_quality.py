"""Errors of proxies and their effect on accuracy, over kinds of bank and settings, beside simpler ways to fill in.

    python -m benchmarks.quality.proxy_quality OUT

trains the default network on the generated corpus and, if $M3ER_DATA or shared/data has them, on CMU-MOSI and YouTube
(split anew), with five seeds. It corrupts the test split by the paper's protocol, fills in the corrupted modalities
(the true mask is given) in each of the compared ways, and writes OUT/proxy_quality.json, .md and .png.

Errors are ‖filled - original‖ / ‖original‖ over all corrupted frames, in standardised features.

Dimension legend: M modalities, B samples, T steps, d_m features of modality m.
"""

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.cluster import kmeans_plusplus

from benchmarks.quality import common
from m3er_fast import M3ERConfig, ProxyGenerator
from m3er_fast.corpus.convert import read
from m3er_fast.corpus.splits import split_by_group
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.corruption import paper_protocol
from m3er_fast.training import train

NEIGHBOURS = (1, 4, 8, 16, 32, 64)
RIDGES = (1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0)
RIDGES_OF_REGRESSION = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
SHARES = (1 / 16, 1 / 4, 1.0)
HAS_FAISS = importlib.util.find_spec("faiss") is not None


def corpora(root):
    """Return each corpus and the settings of its network, by name."""
    config = M3ERConfig()

    def settings(epochs, dropout=0.0):
        return config.replace(
            training=replace(config.training, epochs=epochs), network=replace(config.network, dropout=dropout)
        )

    found = {"generated": (make_synthetic(), settings(20, 0.5))}
    if (root / "mosi_utterance").is_dir():
        found["CMU-MOSI"] = (read(root / "mosi_utterance", "utterance-csv"), settings(10))
    if (root / "youtube_sequences").is_dir():
        found["YouTube"] = (split_by_group(read(root / "youtube_sequences", "mfn-h5")), settings(100))
    return found


# --- Ways to fill in a lost modality: from a standardised batch and the effective mask to M features ---


def zeros_of_raw_features(model, batch, effective):
    """Fill in zeros of raw features, as a pipeline does that writes 0 for missing ones."""
    lost = ~effective & effective.any(dim=1, keepdim=True)
    inside = torch.arange(batch.features[0].shape[1]) < batch.lengths[:, None]
    filled = []
    for m, x in enumerate(batch.features):
        zero = -getattr(model.standardizer, f"mean_{m}") / getattr(model.standardizer, f"scale_{m}")
        here = (lost[:, m, None] & inside)[:, :, None]
        filled.append(torch.where(here, zero.to(x).clamp(-1e4, 1e4), torch.where(lost[:, m, None, None], 0.0, x)))
    return filled


def means(_model, batch, effective):
    """Fill in the training mean: zeros in standardised features."""
    lost = ~effective & effective.any(dim=1, keepdim=True)
    return [torch.where(lost[:, m, None, None], 0.0, x) for m, x in enumerate(batch.features)]


class Proxies:
    """A fitted proxy generator."""

    def __init__(self, dims, training, **settings):
        self.generator = ProxyGenerator(dims, **settings).fit_batches(lambda: [training])

    def __call__(self, _model, batch, effective):
        return self.generator.proxy_batch(batch, effective).features


def reduced_by_kmeans(dims, training, size):
    """Return proxies whose bank keeps the frames that k-means++ seeding picks, all modalities side by side."""
    fill = Proxies(dims, training, bank="neighbours")
    generator = fill.generator
    banks = [generator.learned(f"bank_{m}") for m in range(len(dims))]
    _, chosen = kmeans_plusplus(torch.cat(banks, dim=1).numpy(), size, random_state=0)
    chosen = torch.from_numpy(np.sort(chosen))
    generator.register_learned(
        **{f"bank_{m}": bank[chosen] for m, bank in enumerate(banks)}, bank_valid=generator.bank_valid[chosen]
    )
    return fill


def ways(dims, training):
    """Return the ways to fill in, by group and label."""

    def neighbours(**settings):
        return Proxies(dims, training, bank="neighbours", **settings)

    of_neighbours = neighbours()
    frames = of_neighbours.generator.bank_valid.shape[0]
    groups = {
        "baselines": {"zero filling": zeros_of_raw_features, "mean filling": means},
        "kind": {
            "regression": Proxies(dims, training, bank="regression"),
            "neighbours": of_neighbours,
            "neighbours, affine": neighbours(affine=True),
            **({"neighbours, faiss-ivf": neighbours(engine="faiss-ivf")} if HAS_FAISS else {}),
            "basis": Proxies(dims, training, bank="basis"),
        },
        "k": {str(k): neighbours(k=k) for k in NEIGHBOURS},
        "k, ridge 0.01": {str(k): neighbours(k=k, ridge=0.01) for k in NEIGHBOURS},
        "ridge": {f"{ridge:g}": neighbours(ridge=ridge) for ridge in RIDGES},
        "ridge of a regression": {
            f"{ridge:g}": Proxies(dims, training, bank="regression", ridge=ridge) for ridge in RIDGES_OF_REGRESSION
        },
        "bank": {},
        "bank by k-means++": {},
    }
    for share in SHARES:
        size = max(1, round(share * frames))
        groups["bank"][str(size)] = neighbours(max_bank=size)
        if share < 1 and size <= 3000:  # k-means++ passes over the bank once per row that it picks
            groups["bank by k-means++"][str(size)] = reduced_by_kmeans(dims, training, size)
    return groups


def measure(corpus, config, seeds, say):
    """Return accuracies and errors of every way to fill in, a list over seeds, by group and label."""
    results = {}
    corpus = corpus if corpus.split is not None else split_by_group(corpus)
    for seed in range(seeds):
        say(f"  seed {seed + 1} of {seeds}")
        for group, label, row in measure_once(corpus, config, seed):
            lists = results.setdefault(group, {}).setdefault(label, {key: [] for key in row})
            for key, value in row.items():
                lists[key].append(value)
    return results


def measure_once(corpus, config, seed):
    """Yield group, label and measurements of every way to fill in, for a network trained with one seed."""
    model = train(corpus, config.replace(training=replace(config.training, seed=seed))).model.eval()
    batches = {}
    for split in ("train", "test"):
        part = corpus.subset(split)
        batches[split] = model.standardize(part.features, part.lengths, part.available)
    clean, target = batches["test"], torch.as_tensor(corpus.subset("test").target)
    names = list(corpus.features)
    noisy, truth = paper_protocol(
        dict(zip(names, clean.features, strict=True)), seed, lengths=clean.lengths, available=clean.available
    )
    corrupted = clean._replace(features=[noisy[name] for name in names])
    effective = clean.available & ~truth
    hit = [(truth[:, m] & effective.any(dim=1))[:, None] & clean.frame_valid[:, :, m] for m in range(len(names))]
    groups = ways(corpus.input_dims, batches["train"])
    groups["baselines"] |= {"clean": lambda *_: clean.features, "as it came": lambda *_: corrupted.features}
    for group, fillers in groups.items():
        for label, fill in fillers.items():
            with torch.no_grad():
                filled = fill(model, corrupted, effective)
                answer = model.network.classify(filled, clean.lengths)[0].argmax(dim=1)
            difference = sum(
                float((x - y)[h].square().sum()) for x, y, h in zip(filled, clean.features, hit, strict=True)
            )
            original = sum(float(y[h].square().sum()) for y, h in zip(clean.features, hit, strict=True))
            accuracy = float((answer == target).double().mean())
            yield group, label, {"accuracy": accuracy, "error": (difference / original) ** 0.5}


def mean_and_deviation(values):
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def to_markdown(results):
    lines = [
        "| Corpus | | | Relative L2 error | Accuracy | Accuracy less mean filling |",
        "|---|---|---|---:|---:|---:|",
    ]
    for corpus, groups in results.items():
        baseline = np.array(groups["baselines"]["mean filling"]["accuracy"])
        for group, rows in groups.items():
            for label, row in rows.items():
                error, accuracy = mean_and_deviation(row["error"]), mean_and_deviation(row["accuracy"])
                gain = mean_and_deviation(np.array(row["accuracy"]) - baseline)
                lines.append(
                    f"| {corpus} | {group} | {label} | {error[0]:.1%} | {accuracy[0]:.1%} ± {accuracy[1]:.1%} "
                    f"| {100 * gain[0]:+.1f} ± {100 * gain[1]:.1f} points |"
                )
    return "\n".join(lines) + "\n"


def draw(results, path):
    panels = {
        "ridge of a regression": "ridge λ of a regression",
        "k": "neighbours K",
        "ridge": "ridge λ of neighbours",
        "bank": "frames in a bank of neighbours",
    }
    figure = Figure(figsize=(13, 6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(panels), sharey="row")
    for color, (corpus, groups) in zip(("C0", "C1", "C2"), results.items(), strict=False):
        for column, (group, label) in enumerate(panels.items()):
            positions = [float(x) for x in groups[group]]
            for row, key in enumerate(("error", "accuracy")):
                values = [np.mean(entry[key]) for entry in groups[group].values()]
                ax = axes[row, column]
                ax.plot(positions, values, "o-", color=color, label=corpus)
                ax.axhline(np.mean(groups["baselines"]["mean filling"][key]), color=color, ls=":", lw=1)
                ax.axhline(np.mean(groups["kind"]["regression"][key]), color=color, ls="--", lw=1)
                ax.set_xscale("log")
                if row:
                    ax.set_xlabel(label)
    axes[0, 0].set_ylabel("relative L2 error")
    axes[1, 0].set_ylabel("accuracy")
    axes[0, -1].legend(
        title="proxies (solid)\nmean filling (dotted)\nregression, cross-validated (dashed)",
        fontsize=8,
        title_fontsize=8,
        loc="upper right",
    )
    figure.savefig(path, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=("generated", "CMU-MOSI", "YouTube"))
    common.add_data_argument(parser)
    options = parser.parse_args()
    results = {}
    for name, (corpus, config) in corpora(options.data).items():
        if options.only in (None, name):
            print(name, flush=True)
            results[name] = measure(corpus, config, options.seeds, lambda line: print(line, flush=True))
    common.write_results(options.out / "proxy_quality.json", {"seeds": options.seeds}, results=results)
    (options.out / "proxy_quality.md").write_text(to_markdown(results), encoding="utf-8")
    draw(results, options.out / "proxy_quality.png")


if __name__ == "__main__":
    main()
