"""False alarms of the modality check on clean data, and its detection of corrupted data.

    python -m benchmarks.quality.check_quality OUT

measures the generated corpus and, if $M3ER_DATA or shared/data has them, CMU-MOSI and YouTube. It trains no network. It
writes OUT/check_quality.json, its tables as OUT/check_quality.md, and two figures:

* check_calibration.png: the share of clean utterances that lose a modality, over alpha; ``fit`` has not seen them.
* check_roc.png: the same clean utterances against copies in which one modality is corrupted.

A corruption is applied to the valid frames of one modality at a time. Utterances that it leaves as they are do not
count: a sequence of one frame cannot freeze. "Caught" is the share that loses the modality at the default alpha of
0.05; the AUROC compares the p-values of the same utterances, clean and corrupted. All intervals are 99 %: for shares
by Clopper and Pearson, for an AUROC of 0.5 by the variance of the rank sum (Mann and Whitney 1947). They treat
utterances as independent, but utterances of one video are not.

Dimension legend: N utterances, M modalities, T time steps, d features.
"""

import argparse
import itertools
import json
import warnings
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import binomtest
from sklearn.metrics import roc_curve
from sklearn.model_selection import GroupKFold, KFold
from torch import Tensor

from benchmarks.quality import common
from m3er_fast import ModalityCheck, Standardizer
from m3er_fast._symptoms import DETECTORS, SYMPTOMS
from m3er_fast.corpus.convert import read
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.corruption import paper_protocol
from m3er_fast.metrics import auroc
from m3er_fast.standardize import StandardizedBatch

ALPHA = 0.05
ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2)
CONFIDENCE = 0.99
NORMAL_QUANTILE = 2.576  # of CONFIDENCE, two-sided
LONG = 10  # frames, from which on sequences are reported by themselves too
GENERATED = range(5)
PROTOCOL_SEED = 0

CONTESTANTS = {
    "new": {},
    "surprise": {"ignore": tuple(detector.name for detector in DETECTORS)},
    "likelihood": {"ignore": SYMPTOMS},
    "energy": {"statistic": "energy"},
    "correlation": {"statistic": "correlation", "component_weights": None},
}
"""Checks by name: the default, the same without detectors, belonging alone, and the two statistics of the check before
it: the energy, and the paper's correlation."""
CALIBRATED = ("new", "correlation")  # drawn over alpha, and as ROC curves

DETECTORS_OF = {
    "gaussian_noise": ("noise", "faint noise"),
    "coloured_noise": ("noise", "faint noise"),
    "brown_noise": ("noise", "faint noise"),
    "drop_frames": ("lost frames",),
    "drop_words": ("lost frames",),
    "gain": ("gain",),
    "shuffle_frames": ("order",),
}
"""The detectors that were trained on a corruption, or on one much like it."""

MODALITY_LABELS = ("text", "audio", "face or video")  # the corpora name the third one differently
MARKS = ("o", "s", "^")
LINES = ("-", "--", ":")
COLORS = {"new": "#0b3c6f", "correlation": "#e08a1e"}  # dark and light, also in grey


class Recordings(NamedTuple):
    """Clean utterances, and checks that were fitted to others."""

    clean: StandardizedBatch
    groups: np.ndarray | None  # (N,) speakers or recordings
    checks: dict[str, ModalityCheck]

    @property
    def frames(self) -> Tensor:
        """The (N, M) numbers of valid frames."""
        return self.clean.frame_valid.sum(dim=1)

    @property
    def modalities(self) -> list[str]:
        """The names of the M modalities."""
        return list(self.checks["new"].input_dims)


class Evidence(NamedTuple):
    """The verdicts on one modality of some utterances, clean and corrupted."""

    clean: Tensor  # (n,) p-values
    corrupted: Tensor  # (n,) p-values
    caught: Tensor  # (n,) bool
    reason: Tensor  # (n,) int64
    frames: Tensor  # (n,)

    @classmethod
    def joined(cls, parts):
        return cls(*map(torch.cat, zip(*parts, strict=True)))


# --- What is measured ---


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


def left_out(names):
    return f"without {' and '.join(names)}"


def fitted(train, test):
    """Return the held-out utterances with every contestant, fitted to the training utterances."""
    dims = train.input_dims
    scale = Standardizer(dims).fit(train.features, lengths=train.lengths, available=train.available)
    clean_train, clean = (scale(part.features, part.lengths, part.available) for part in (train, test))
    settings = CONTESTANTS | {left_out(names): {"ignore": names} for names in DETECTORS_OF.values()}
    with warnings.catch_warnings():  # few calibration samples: their effect is measured here
        warnings.simplefilter("ignore", UserWarning)
        sample = ModalityCheck(dims).collect([clean_train], total=len(train))
        checks = {name: ModalityCheck(dims, **given).fit_collected(sample) for name, given in settings.items()}
    return Recordings(clean, test.group, checks)


def at_alpha(check, alpha):
    """Return the same fitted check at another alpha."""
    other = ModalityCheck(check.input_dims, **vars(replace(check.config, alpha=alpha)))
    other.load_state_dict(check.state_dict())
    return other


def false_alarms(parts):
    """Return [flagged, clean utterances] at the default alpha, by contestant, length of utterances and modality."""
    counts = {}
    for part in parts:
        there = part.clean.available
        lengths = {"all": there, "long": there & (part.frames >= LONG)}
        for (name, check), (which, rows) in itertools.product(part.checks.items(), lengths.items()):
            lost = rows & ~check.check_batch(part.clean).effective
            cells = counts.setdefault(name, {}).setdefault(which, {})
            for m, modality in enumerate(part.modalities):
                cell = cells.setdefault(modality, [0, 0])
                cell[0] += int(lost[:, m].sum())
                cell[1] += int(rows[:, m].sum())
    return counts


def calibration(parts):
    """Return [flagged, clean utterances] by contestant, modality and alpha."""
    counts = {}
    for part, name, alpha in itertools.product(parts, CALIBRATED, ALPHAS):
        effective = at_alpha(part.checks[name], alpha).check_batch(part.clean).effective
        for m, modality in enumerate(part.modalities):
            cell = counts.setdefault(name, {}).setdefault(modality, {}).setdefault(str(alpha), [0, 0])
            there = part.clean.available[:, m]
            cell[0] += int((there & ~effective[:, m]).sum())
            cell[1] += int(there.sum())
    return counts


def by_group(part):
    """Return [utterances that lost a modality, utterances] by group, at the default settings."""
    groups = part.groups
    effective = part.checks["new"].check_batch(part.clean).effective
    lost = (part.clean.available & ~effective).any(dim=1).numpy()
    return {str(group): [int(lost[groups == group].sum()), int((groups == group).sum())] for group in np.unique(groups)}


def corrupted(batch, m, corrupt, groups=None):
    """Return the batch with the valid frames of modality m corrupted, and (N,) bool, where that changed something.

    The corruption sees the valid frames alone, one after the other.
    """
    rows = batch.available[:, m]
    clean, valid = batch.features[m][rows], batch.frame_valid[rows, :, m]
    places = (~valid).int().argsort(dim=1, stable=True)[:, :, None].expand_as(clean)
    generator = torch.Generator().manual_seed(m)
    corrupt = common.with_groups(corrupt, None if groups is None else groups[rows.numpy()])
    spoilt = corrupt(clean.gather(1, places), generator=generator, lengths=valid.sum(dim=1))
    features = list(batch.features)
    features[m] = features[m].clone()
    features[m][rows] = torch.zeros_like(clean).scatter(1, places, spoilt).where(valid[:, :, None], clean)
    return batch._replace(features=features), (features[m] != batch.features[m]).flatten(1).any(dim=1)


def evidence(parts):
    """Return the evidence by corruption, severity, contestant and modality; each modality is corrupted alone."""
    found = defaultdict(list)
    for part in parts:
        before = {name: check.check_batch(part.clean).p_value for name, check in part.checks.items()}
        for (kind, severity), corrupt in common.corruptions().items():
            contestants = [*CONTESTANTS, *([left_out(DETECTORS_OF[kind])] if kind in DETECTORS_OF else [])]
            for m, modality in enumerate(part.modalities):
                if part.clean.available[:, m].sum() < 2:
                    continue
                batch, changed = corrupted(part.clean, m, corrupt, part.groups)
                for name in contestants:
                    after = part.checks[name].check_batch(batch)
                    found[kind, severity, name, modality].append(
                        Evidence(
                            before[name][changed, m],
                            after.p_value[changed, m],
                            ~after.effective[changed, m],
                            after.reason[changed, m],
                            part.frames[changed, m],
                        )
                    )
    return {key: Evidence.joined(values) for key, values in found.items()}


def summary(verdicts):
    """Return utterances, the share caught and the AUROC, of all utterances and of long ones."""
    cells = {}
    for which, fewest in (("all", 0), ("long", LONG)):
        rows = verdicts.frames >= fewest
        count = int(rows.sum())
        if not count:
            continue
        reasons = Counter(ModalityCheck.reasons[n] for n in verdicts.reason[rows & verdicts.caught].tolist())
        cells[which] = {
            "utterances": count,
            "caught": int(verdicts.caught[rows].sum()),
            "auroc": round(area(verdicts.clean[rows], verdicts.corrupted[rows]), 4),
            "reasons": dict(reasons.most_common()),
        }
    return cells


def area(clean, spoilt):
    """Return the AUROC of p-values: the chance that a corrupted utterance has the smaller one."""
    odd = -torch.cat([clean, spoilt]).double().numpy()
    return auroc(odd, np.arange(len(odd)) >= len(clean))


def nested(cells):
    """Return dictionaries in dictionaries of cells by tuples."""
    whole = {}
    for keys, cell in cells.items():
        inner = whole
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = cell
    return whole


def curve(verdicts):
    """Return an ROC curve of at most a hundred points."""
    odd = -torch.cat([verdicts.clean, verdicts.corrupted]).double().numpy()
    points = np.stack(roc_curve(np.arange(len(odd)) >= len(verdicts.clean), odd)[:2])
    kept = np.unique(np.linspace(0, points.shape[1] - 1, 100).astype(int))
    return points[:, kept].round(4).tolist()


def protocol(parts):
    """Return [caught, corrupted, false alarms, others, AUROC] of the paper's protocol, by contestant and modality."""
    verdicts = defaultdict(list)
    for part in parts:
        batch = part.clean
        features = dict(zip(part.modalities, batch.features, strict=True))
        noisy, truth = paper_protocol(features, PROTOCOL_SEED, lengths=batch.lengths, available=batch.available)
        batch = batch._replace(features=list(noisy.values()))
        for name, (m, modality) in itertools.product(CONTESTANTS, enumerate(part.modalities)):
            rows = batch.available[:, m]
            result = part.checks[name].check_batch(batch)
            verdicts[name, modality].append((result.p_value[rows, m], ~result.effective[rows, m], truth[rows, m]))
    cells = {}
    for key, columns in verdicts.items():
        p_value, lost, truth = map(torch.cat, zip(*columns, strict=True))
        caught, alarms = int((lost & truth).sum()), int((lost & ~truth).sum())
        both = bool(truth.any()) and not bool(truth.all())
        value = round(area(p_value[~truth], p_value[truth]), 4) if both else None
        cells[key] = [caught, int(truth.sum()), alarms, int((~truth).sum()), value]
    return nested(cells)


# --- Goals ---


def interval(flagged, total):
    limits = binomtest(flagged, total).proportion_ci(CONFIDENCE, method="exact")
    return limits.low, limits.high


def half_width(utterances):
    """Return the half interval of an AUROC of 0.5 between as many clean as corrupted utterances."""
    return NORMAL_QUANTILE * ((2 * utterances + 1) / (12 * utterances**2)) ** 0.5


def goals(alarms, found):
    """Return [goal, corpus, what was measured, wanted, value, met] of every goal and case.

    Shares caught are wanted of long utterances. A share without a detector, and false alarms, may differ from what is
    wanted within the interval.
    """
    rows = []

    def judge(goal, case, what, wanted, value, met):
        rows.append([goal, case, what, wanted, round(value, 4), bool(met)])

    for case, kinds in found.items():
        length = "all" if case.startswith("CMU-MOSI") else "long"
        for kind, severities in kinds.items():
            for severity, names in severities.items():
                name = common.described(kind, severity)
                for modality, cells in names["new"].items():
                    if length not in cells:
                        continue
                    cell, what = cells[length], f"{name} ({modality})"
                    share = cell["caught"] / cell["utterances"]
                    wanted = common.WANTED.get((kind, severity))
                    if wanted is not None and length == "long" and (wanted.modality in (None, modality)):
                        judge(f"caught: {name}", case, modality, wanted.share, share, share >= wanted.share)
                    least = 0.5 - half_width(cell["utterances"])
                    judge("AUROC not below chance", case, what, round(least, 4), cell["auroc"], cell["auroc"] >= least)
                    if case == "generated" and (kind, severity) == common.SWAPPED:
                        judge("swapped", case, what, 0.95, cells["all"]["auroc"], cells["all"]["auroc"] >= 0.95)
                    if kind in DETECTORS_OF:
                        unseen = names[left_out(DETECTORS_OF[kind])][modality][length]
                        alone = names["surprise"][modality][length]
                        wanted, share = (one["caught"] / one["utterances"] for one in (alone, unseen))
                        most = interval(unseen["caught"], unseen["utterances"])[1]
                        judge("left out, as surprise alone", case, what, round(wanted, 4), share, most >= wanted)
    for case, names in alarms.items():
        for which, modality in itertools.product(("all", "long"), names["new"]["all"]):
            flagged, total = names["new"][which][modality]
            if total:
                share, least = flagged / total, interval(flagged, total)[0]
                judge("false alarms", case, f"{which}, {modality}", ALPHA, share, least <= ALPHA)
    return rows


# --- Tables ---


def cell(found, which):
    """Return a cell of a table, "caught / AUROC"."""
    if which not in (found or {}):
        return "–"
    one = found[which]
    return f"{one['caught'] / one['utterances']:.0%} / {one['auroc']:.2f}".replace("%", " %")


def table(header, rows):
    return ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1), *rows, ""]


def alarms_table(alarms):
    """Return the table of false alarms, a row per corpus and length."""
    rows = []
    for case, names in alarms.items():
        for which, label in (("all", "all"), ("long", f"{LONG} frames or more")):
            counts = names["new"][which]
            if not any(total for _, total in counts.values()):
                continue
            shares = []
            for flagged, total in counts.values():
                low, high = interval(flagged, total) if total else (0.0, 1.0)
                text = f"{flagged / max(total, 1):.1%} ({low:.1%} to {high:.1%}), n = {total}".replace("%", " %")
                shares.append(text if total else "–")
            rows.append(f"| {case}, {label} | {' | '.join(shares)} |")
    return table(("Share flagged at α = 0.05", *MODALITY_LABELS), rows)


def detections_table(kinds, modalities):
    """Return the table of one corpus: a row per corruption and severity."""
    lengths = [
        which
        for which in ("all", "long")
        if any(which in one for names in kinds.values() for each in names.values() for one in each["new"].values())
    ]
    header = ["Corruption"]
    header += [f"{name}{'' if which == 'all' else f', {LONG} frames'}" for which in lengths for name in modalities]
    rows = []
    for kind, severities in kinds.items():
        before = None
        for severity, names in severities.items():
            columns = [cell(names["new"].get(name), which) for which in lengths for name in modalities]
            if columns == before and lengths == ["all"]:
                continue  # of vectors, whose one frame no fraction divides
            before = columns
            reasons = sum((Counter(one["all"]["reasons"]) for one in names["new"].values()), Counter())
            most = ", ".join(reason for reason, _ in reasons.most_common(2)) or "–"
            rows.append(f"| {common.described(kind, severity)} | {' | '.join(columns)} | {most} |")
    return table([*header, "Reason given most"], rows)


def auroc_before(case, kind, severity):
    """Return the AUROC of the check before this one, the mean of the modalities, where it was measured."""
    known = json.loads((common.ROOT / "docs" / "results" / "check_before.json").read_text())["auroc"]
    values = known.get(case, {}).get(common.BEFORE.get((kind, severity)), {}).values()
    return f"{np.mean(list(values)):.2f}" if values else "–"


def contestants_table(case, kinds, modalities):
    """Return the table of the contestants of one corpus: a row per corruption and severity, means of the modalities."""

    def mean(cells):
        cells = [cells[name]["all"] for name in modalities if name in (cells or {})]
        if not cells:
            return "–"
        caught = np.mean([one["caught"] / one["utterances"] for one in cells])
        return f"{caught:.0%} / {np.mean([one['auroc'] for one in cells]):.2f}".replace("%", " %")

    rows = []
    for kind, severities in kinds.items():
        for severity, names in severities.items():
            if severity != "medium" and (kind, severity) not in {*common.DRAWN, common.PAPERS_NOISE}:
                continue
            unseen = names.get(left_out(DETECTORS_OF.get(kind, ())))
            columns = [mean(names[name]) for name in ("new", "surprise")]
            columns += [mean(unseen), *(mean(names[name]) for name in ("likelihood", "energy", "correlation"))]
            columns.append(auroc_before(case, kind, severity))
            rows.append(f"| {common.described(kind, severity)} | {' | '.join(columns)} |")
    header = ("Corruption", "new", "surprise alone", "left out", "likelihood ratio alone", "energy", "correlation")
    header = (*header, "before: AUROC")
    return table(header, rows)


def protocol_table(results):
    rows = []
    for case, names in results.items():
        for name, modalities in names.items():
            columns = []
            for caught, bad, alarms, good, value in modalities.values():
                shares = (caught / bad, alarms / good) if bad and good else ()
                text = f"{shares[0]:.1%}, {shares[1]:.1%}, {value:.3f}".replace("%", " %") if shares else "–"
                columns.append(text)
            rows.append(f"| {case}: {name} | {' | '.join(columns)} |")
    return table(("Caught, false alarms, AUROC", *MODALITY_LABELS), rows)


def to_markdown(alarms, found, of_protocol, verdicts):
    lines = ["## False alarms", "", *alarms_table(alarms)]
    for case, kinds in found.items():
        modalities = list(alarms[case]["new"]["all"])
        lines += [f"## {case}: caught / AUROC", "", *detections_table(kinds, modalities)]
        lines += [f"## {case}: contestants", "", *contestants_table(case, kinds, modalities)]
    lines += ["## The paper's protocol", "", *protocol_table(of_protocol), "## Goals", "", *goals_table(verdicts)]
    return "\n".join(lines)


def goals_table(verdicts):
    """Return a row per goal and corpus: how often it is met, and what is furthest from it."""
    groups = defaultdict(list)
    for row in verdicts:
        groups[row[0], row[1]].append(row)
    rows = []
    for (goal, case), judged in groups.items():
        missed = sorted((row for row in judged if not row[-1]), key=lambda row: abs(row[4] - row[3]), reverse=True)
        furthest = "; ".join(f"{what}: {value:.2f}, wanted {wanted:.2f}" for _, _, what, wanted, value, _ in missed[:3])
        rows.append(f"| {goal} | {case} | {len(judged) - len(missed)} of {len(judged)} | {furthest or '–'} |")
    return ["| Goal | Corpus | Met | Furthest from it |", "|---|---|---:|---|", *rows, ""]


# --- Figures ---


def draw_calibration(results, path):
    figure = Figure(figsize=(11, 5.6), dpi=130, layout="constrained")
    grid = figure.subplots(len(CALIBRATED), len(results), sharex=True, sharey=True, squeeze=False)
    for column, (case, counts) in zip(grid.T, results.items(), strict=True):
        for axes, (name, modalities) in zip(column, counts.items(), strict=True):
            axes.plot(ALPHAS, ALPHAS, color="0.5", linewidth=1, linestyle="--", label="the share α")
            for m, (modality, cells) in enumerate(modalities.items()):
                shares, lows, highs, places = [], [], [], []
                for alpha in ALPHAS:
                    flagged, total = cells[str(alpha)]
                    if not total:
                        continue
                    low, high = interval(flagged, total)
                    shares.append(flagged / total)
                    lows.append(flagged / total - low)
                    highs.append(high - flagged / total)
                    places.append(alpha * 1.1 ** (m - 1))  # side by side
                axes.errorbar(
                    *(places, shares, (lows, highs)),
                    color=("black", "#0072B2", "#C77B00")[m % 3],
                    marker=MARKS[m % 3],
                    markerfacecolor="white" if m == 1 else None,
                    ms=5,
                    linestyle=LINES[m % 3],
                    lw=1,
                    capsize=2,
                    label=modality,
                )
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=0.005, linscale=0.4)
            axes.set_ylim(bottom=-0.0005)
            axes.set_xticks(ALPHAS, [f"{alpha:g}" for alpha in ALPHAS])
            axes.set_yticks((0, *ALPHAS, 0.5), ["0", *(f"{alpha:g}" for alpha in ALPHAS), "0.5"])
            axes.minorticks_off()
            axes.grid(color="0.92")
            sizes = sorted({cells["0.05"][1] for cells in modalities.values()} - {0})
            count = f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}"
            label = "combined" if name == "new" else "correlation (the paper's)"
            axes.set_title(f"{case}\n{label}, {count}", fontsize=9, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("α")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of clean utterances\nthat lose the modality")
    handles, _ = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, ["the share α", *MODALITY_LABELS], loc="outside upper center", ncols=4)
    figure.savefig(path, metadata={"Software": None})


def draw_recognition(results, modalities, path):
    columns = list(common.DRAWN)
    figure = Figure(figsize=(2.6 * len(columns), 2.7 * len(results)), dpi=130, layout="constrained")
    grid = figure.subplots(len(results), len(columns), sharex=True, sharey=True, squeeze=False)
    for line, (case, curves) in zip(grid, results.items(), strict=True):
        for axes, (kind, severity) in zip(line, columns, strict=True):
            axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
            axes.set_title(f"{case.partition(',')[0]}: {common.described(kind, severity)}", fontsize=8, loc="left")
            names = curves.get(kind, {}).get(severity)
            if names is None:
                axes.text(0.5, 0.45, "does not change\none frame", ha="center", fontsize=8, color="0.4")
                continue
            for name in reversed(CALIBRATED):
                for modality, points in names[name].items():
                    line = LINES[modalities[case].index(modality)]
                    axes.plot(*points, color=COLORS[name], linestyle=line, lw=1.8 if name == "new" else 1.3)
    for axes in grid[-1]:
        axes.set_xlabel("clean utterances flagged", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("corrupted ones found", fontsize=8)
    handles = [
        *(Line2D([], [], color="0.2", linestyle=LINES[m], label=label) for m, label in enumerate(MODALITY_LABELS)),
        Line2D([], [], color=COLORS["new"], lw=3, label="combined check"),
        Line2D([], [], color=COLORS["correlation"], lw=3, label="the paper's correlation"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    figure.savefig(path, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    common.add_data_argument(parser)
    options = parser.parse_args()
    alarms, calibrated, groups, found, curves, of_protocol = {}, {}, {}, {}, {}, {}
    for case, pairs in held_out(options.data).items():
        print(case, flush=True)
        parts = [fitted(*pair) for pair in pairs]
        alarms[case], calibrated[case] = false_alarms(parts), calibration(parts)
        if case.startswith("CMU-MOSI"):
            groups[case] = {group: count for part in parts for group, count in by_group(part).items()}
        if case == "CMU-MOSI, training videos":
            continue
        of_protocol[case] = protocol(parts)
        seen = evidence(parts)
        found[case] = nested({key: summary(verdicts) for key, verdicts in seen.items() if len(verdicts.frames)})
        curves[case] = nested(
            {
                key: curve(verdicts)
                for key, verdicts in seen.items()
                if key[:2] in common.DRAWN and key[2] in CALIBRATED and len(verdicts.frames)
            }
        )
    verdicts = goals(alarms, found)
    results = {
        "false alarms": alarms,
        "calibration": calibrated,
        "lost a modality, by video": groups,
        "detections": found,
        "paper's protocol": of_protocol,
        "goals": verdicts,
        "curves": curves,
    }
    settings = {"alphas": ALPHAS, "confidence": CONFIDENCE, "long": LONG, "contestants": CONTESTANTS}
    # On one line, because most of it is numbers.
    common.write_results(options.out / "check_quality.json", settings, indent=None, **results)
    text = to_markdown(alarms, found, of_protocol, verdicts)
    (options.out / "check_quality.md").write_text(text, encoding="utf-8")
    draw_calibration(calibrated, options.out / "check_calibration.png")
    modalities = {case: list(names["new"]["all"]) for case, names in alarms.items()}
    draw_recognition(curves, modalities, options.out / "check_roc.png")


if __name__ == "__main__":
    main()
