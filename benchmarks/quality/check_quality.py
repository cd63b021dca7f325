"""False alarms of the modality check on clean data, and its detection of corrupted data.

    python -m benchmarks.quality.check_quality OUT

measures the generated corpus and, if $M3ER_DATA or shared/data has them, CMU-MOSI and YouTube. It trains no network. It
writes OUT/check_quality.json and two figures:

* check_calibration.png: the share of clean utterances that lose a modality, over alpha; ``fit`` has not seen them.
* check_roc.png: the same clean utterances against copies in which one modality is corrupted.

The 95 % intervals follow Clopper and Pearson. They treat utterances as independent, but utterances of one video
are not.
"""

import argparse
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.metrics import roc_curve
from sklearn.model_selection import GroupKFold, KFold

from benchmarks.quality import common
from m3er_fast import ModalityCheck, Standardizer
from m3er_fast.corpus.convert import read
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.corruption import gaussian_noise, mismatch
from m3er_fast.metrics import auroc

ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2)
STATISTICS = {"combined": {}, "correlation": {"component_weights": None}}  # the default, and the paper's
GENERATED = range(5)
CORRUPTIONS = {
    "noise, SNR 0.01": lambda x, generator, lengths: gaussian_noise(x, 0.01, generator, lengths=lengths),
    "noise, SNR 1": lambda x, generator, lengths: gaussian_noise(x, 1.0, generator, lengths=lengths),
    "another utterance's": lambda x, generator, lengths: mismatch(x, generator, lengths=lengths),
}
COLORS = ("#0072B2", "#E69F00", "#009E73")
MODALITY_LABELS = ("text", "audio", "face or video")  # the corpora name the third one differently


def held_out(root):
    """Return pairs of clean training and held-out corpora, by name."""
    generated = (make_synthetic(seed=seed) for seed in GENERATED)
    cases = {"generated": [(corpus.subset("train"), corpus.subset("test")) for corpus in generated]}
    if (root / "mosi_utterance").is_dir():
        corpus = read(root / "mosi_utterance", "utterance-csv")
        train = corpus.subset("train")
        cases["CMU-MOSI, training videos"] = folds(train)
        cases["CMU-MOSI, test videos"] = [(train, corpus.subset("test"))]
    if (root / "youtube_sequences").is_dir():
        cases["YouTube"] = folds(read(root / "youtube_sequences", "mfn-h5"))
    return cases


def folds(corpus):
    """Hold out each fifth once: whole groups, or successive utterances where the corpus names no groups."""
    splitter = KFold(5) if corpus.group is None else GroupKFold(5)
    parts = splitter.split(np.arange(len(corpus)), groups=corpus.group)
    return [(corpus.select(fit), corpus.select(rest)) for fit, rest in parts]


def standardized(train, test):
    scale = Standardizer(train.input_dims).fit(train.features, train.lengths, train.available)
    return [scale(part.features, part.lengths, part.available) for part in (train, test)]


def fitted_check(train, dims, **settings):
    with warnings.catch_warnings():  # few calibration samples: their effect is measured here
        warnings.simplefilter("ignore", UserWarning)
        return ModalityCheck(dims, **settings).fit_batches(lambda: [train])


def calibration(pairs):
    """Return [flagged, clean utterances] over all pairs, by statistic, modality and alpha."""
    counts = {}
    for train, test in pairs:
        clean_train, clean = standardized(train, test)
        for statistic, settings in STATISTICS.items():
            for alpha in ALPHAS:
                check = fitted_check(clean_train, train.input_dims, statistic=statistic, alpha=alpha, **settings)
                effective = check.check_batch(clean).effective
                for m, name in enumerate(train.input_dims):
                    cell = counts.setdefault(statistic, {}).setdefault(name, {}).setdefault(str(alpha), [0, 0])
                    there = clean.available[:, m]
                    cell[0] += int((there & ~effective[:, m]).sum())
                    cell[1] += int(there.sum())
    return counts


def by_group(train, test, alpha=0.05):
    """Return [utterances that lost a modality, utterances] by group, at the default settings."""
    clean_train, clean = standardized(train, test)
    effective = fitted_check(clean_train, train.input_dims, alpha=alpha).check_batch(clean).effective
    lost = (clean.available & ~effective).any(dim=1).numpy()
    return {
        str(group): [int(lost[test.group == group].sum()), int((test.group == group).sum())]
        for group in np.unique(test.group)
    }


def recognition(pairs):
    """Return AUROC and curve over all pairs by corruption, statistic and modality, each modality corrupted alone."""
    odd = {}
    for train, test in pairs:
        clean_train, clean = standardized(train, test)
        for statistic, settings in STATISTICS.items():
            check = fitted_check(clean_train, train.input_dims, statistic=statistic, **settings)
            before = check.check_batch(clean).p_value
            for (corruption, corrupt), (m, name) in product(CORRUPTIONS.items(), enumerate(train.input_dims)):
                rows = clean.available[:, m]
                if rows.sum() < 2:
                    continue
                features = list(clean.features)
                features[m] = features[m].clone()
                # Only utterances that have the modality: swapped with one that lacks it, it would be lost, not wrong.
                features[m][rows] = corrupt(features[m][rows], torch.Generator().manual_seed(m), clean.lengths[rows])
                after = check.check_batch(clean._replace(features=features)).p_value
                outcome = odd.setdefault(corruption, {}).setdefault(statistic, {}).setdefault(name, ([], []))
                outcome[0].append(-before[rows, m])
                outcome[1].append(-after[rows, m])
    return {
        corruption: {
            statistic: {name: curve(*map(torch.cat, found[name])) for name in pairs[0][0].input_dims if name in found}
            for statistic, found in statistics.items()
        }
        for corruption, statistics in odd.items()
    }


def curve(clean, corrupted):
    """Return AUROC and an ROC curve of at most a hundred points, as :func:`draw_recognition` takes them."""
    odd = torch.cat([clean, corrupted]).double().numpy()
    spoilt = np.arange(len(odd)) >= len(clean)
    points = np.stack(roc_curve(spoilt, odd)[:2])
    kept = np.unique(np.linspace(0, points.shape[1] - 1, 100).astype(int))
    return {"auroc": auroc(odd, spoilt), "utterances": len(clean), "curve": points[:, kept].round(4).tolist()}


# --- Figures ----------------------------------------------------------------------------------------------------------


def interval(flagged, total):
    limits = binomtest(flagged, total).proportion_ci(0.95, method="exact")
    return limits.low, limits.high


def draw_calibration(results, path):
    figure = Figure(figsize=(11, 5.6), dpi=130, layout="constrained")
    grid = figure.subplots(len(STATISTICS), len(results), sharex=True, sharey=True, squeeze=False)
    for column, (case, counts) in zip(grid.T, results.items(), strict=True):
        for axes, (statistic, modalities) in zip(column, counts.items(), strict=True):
            axes.plot(ALPHAS, ALPHAS, color="0.4", linewidth=1, linestyle="--", label="the share α")
            for m, (name, cells) in enumerate(modalities.items()):
                shares, lows, highs, places = [], [], [], []
                for alpha in ALPHAS:
                    flagged, total = cells[str(alpha)]
                    if not total:
                        continue
                    low, high = interval(flagged, total)
                    shares.append(flagged / total)
                    lows.append(flagged / total - low)
                    highs.append(high - flagged / total)
                    places.append(alpha * 1.07 ** (m - 1))  # side by side
                axes.errorbar(
                    places, shares, (lows, highs), color=COLORS[m % 3], marker="o", ms=4, lw=1, capsize=2, label=name
                )
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=0.005, linscale=0.4)
            axes.set_xticks(ALPHAS, [f"{alpha:g}" for alpha in ALPHAS])
            axes.set_yticks((0, *ALPHAS, 0.5), ["0", *(f"{alpha:g}" for alpha in ALPHAS), "0.5"])
            axes.minorticks_off()
            axes.grid(color="0.92")
            sizes = sorted({cells["0.05"][1] for cells in modalities.values()} - {0})
            count = f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}"
            axes.set_title(f"{case}\n{statistic}, {count}", fontsize=9, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("α")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of clean utterances\nthat lose the modality")
    handles, _ = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, ["the share α", *MODALITY_LABELS], loc="outside upper center", ncols=4)
    figure.savefig(path, metadata={"Software": None})


def draw_recognition(results, path):
    figure = Figure(figsize=(9.5, 3.1 * len(results)), dpi=130, layout="constrained")
    grid = figure.subplots(len(results), len(CORRUPTIONS), sharex=True, sharey=True, squeeze=False)
    for row, (case, corruptions) in zip(grid, results.items(), strict=True):
        for axes, (corruption, statistics) in zip(row, corruptions.items(), strict=True):
            axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
            for statistic, modalities in statistics.items():
                for m, one in enumerate(modalities.values()):
                    axes.plot(
                        *one["curve"],
                        color=COLORS[m % 3],
                        linestyle="-" if statistic == "combined" else "--",
                        linewidth=1.5,
                        label=f"{MODALITY_LABELS[m]}, {statistic}",
                    )
            axes.set_title(f"{case}: {corruption}", fontsize=9, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("share of clean utterances flagged")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of corrupted utterances found")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    common.add_data_argument(parser)
    options = parser.parse_args()
    cases = held_out(options.data)
    flagged, found, groups = {}, {}, {}
    for case, pairs in cases.items():
        print(case, flush=True)
        flagged[case] = calibration(pairs)
        if case != "CMU-MOSI, training videos":
            found[case] = recognition(pairs)
        if case.startswith("CMU-MOSI"):
            groups[case] = {name: count for pair in pairs for name, count in by_group(*pair).items()}
    results = {"calibration": flagged, "lost a modality, by video": groups, "recognition": found}
    # On one line, because half of it is points of curves.
    common.write_results(options.out / "check_quality.json", {"alphas": ALPHAS}, indent=None, **results)
    draw_calibration(flagged, options.out / "check_calibration.png")
    draw_recognition(found, options.out / "check_roc.png")


if __name__ == "__main__":
    main()
