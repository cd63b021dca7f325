"""Which loss? The modified, the original and no multiplicative weight, under conditions that change one at a time.

    python -m benchmarks.loss_study [--minutes 4] [--page docs/which_loss.md --figure docs/results/which_loss.png]

trains every setting of ``SETTINGS`` with each of its losses and five seeds. The seed decides the corpus, its labels'
noise, the first weights, the order of batches and dropout, so that the losses of one seed differ in nothing else. The
trainings that benchmarks/results/loss-study.json has are kept: the command goes on where it was, for ``--minutes`` at
most. CMU-MOSI is found in $M3ER_DATA or shared/data, and left out without it.

A training is that of :func:`m3er_fast.training.train`. The validation split chooses the epoch, in two ways: by the
model's own loss, as ``train`` does, and by the fused head's cross entropy, which all losses share. Each of the two
networks decides in three ways, ``RULES``. The score is the unweighted mean of the classes' F1.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import f1_score

from benchmarks.quality import common
from m3er_fast import M3ERConfig, M3ERFusion, functional
from m3er_fast.config import CheckConfig, LossConfig, NetworkConfig, ProxyConfig, TrainingConfig
from m3er_fast.corpus.convert import read
from m3er_fast.corpus.splits import ensure_validation, split_by_group
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.evaluation import corpus_batches, corrupt_corpus
from m3er_fast.fitted_module import eval_mode
from m3er_fast.metrics import mean_std
from m3er_fast.reference import fusion_costs, log_probabilities
from m3er_fast.training.data import MemoryData
from m3er_fast.training.loop import mean_loss, train_epoch
from m3er_fast.training.state import TrainingState

RESULTS = common.ROOT / "benchmarks/results/loss-study.json"
MOSI = "CMU-MOSI"
WEIGHTED = ("original", "modified")
LOSSES: dict[str, dict[str, Any]] = {
    "original": {"variant": "original"},
    "modified": {"variant": "m3er"},
    "unweighted": {"beta": 0.0},
}
RULES = {"fused": "fused head", "sum": "Σ log p", "liu": "Liu's rule"}
CHOICES = ("own", "head")
MARKERS = "<!-- Written by python -m benchmarks.loss_study: begin -->", "<!-- end -->"


class Setting(NamedTuple):
    """What differs from the base setting."""

    loss: Mapping[str, Any] = MappingProxyType({})  # of LossConfig
    label_noise: float = 0.0  # share of the labels of train and validation that are another class's, at random
    corrupted: bool = False  # the paper's noise in modalities of train and validation
    check_in_training: bool = False
    imbalance: float = 2.0
    balance: bool = False
    longer: int = 1  # factor of the epochs
    last_epoch: bool = False  # take the last epoch: nothing keeps the network from learning wrong labels by heart
    mosi: bool = False
    losses: Sequence[str] = WEIGHTED


ALL = tuple(LOSSES)
SETTINGS = {
    "base": Setting(losses=ALL),
    "sigmoid": Setting({"activation": "sigmoid"}, losses=ALL),
    "sigmoid, β 2": Setting({"activation": "sigmoid", "beta": 2.0}),
    "β 0.5": Setting({"beta": 0.5}),
    "β 2": Setting({"beta": 2.0}),
    "not detached": Setting({"detach_weight": False}),
    "label noise 20 %": Setting(label_noise=0.2, losses=ALL),
    "label noise 40 %": Setting(label_noise=0.4, losses=ALL),
    "label noise 40 %, β 2": Setting({"beta": 2.0}, label_noise=0.4),
    "label noise 40 %, sigmoid": Setting({"activation": "sigmoid"}, label_noise=0.4),
    "label noise 40 %, last of twice the epochs": Setting(label_noise=0.4, longer=2, last_epoch=True, losses=ALL),
    "noisy modalities": Setting(corrupted=True, losses=ALL),
    "noisy modalities, check in training": Setting(corrupted=True, check_in_training=True),
    "imbalance 10": Setting(imbalance=10.0),
    "imbalance 10, balanced": Setting(imbalance=10.0, balance=True),
    "head weight 0": Setting({"head_weight": 0.0}),
    "head weight 0, label noise 40 %": Setting({"head_weight": 0.0}, label_noise=0.4),
    "head weight 0.25": Setting({"head_weight": 0.25}),
    "head weight 4": Setting({"head_weight": 4.0}),
    "twice the epochs": Setting(longer=2),
    MOSI: Setting(mosi=True, losses=ALL),
}
"""The base: softmax, β 1, weights detached, head weight 1, right labels, clean modalities, imbalance 2."""


# --- One training ---


class Sizes(NamedTuple):
    """How much is trained."""

    utterances: int = 1600
    epochs: int = 20


def trained(setting: Setting, loss: str, seed: int, sizes: Sizes, data: Path) -> dict[str, Any]:
    """Train once, and return scores by choice of epoch, split and rule."""
    start = time.perf_counter()
    clean = corpus_of(setting, seed, sizes, data)
    model = untrained(setting, loss, seed, sizes, clean)
    spoilt, _ = corrupt_corpus(model, clean, seed)
    given = spoilt if setting.corrupted else clean
    given = with_label_noise(given, setting.label_noise, seed)
    learner = MemoryData(given, seed)
    splits = {"valid": given.subset("valid"), "test": clean.subset("test"), "noisy test": spoilt.subset("test")}
    result: dict[str, Any] = {"epoch": {}, "f1": {}}
    for choice, (epoch, weights) in chosen_epochs(model, learner, setting.last_epoch).items():
        model.network.load_state_dict(weights)
        result["epoch"][choice] = epoch
        result["f1"][choice] = {name: scores(model, split) for name, split in splits.items()}
        if choice == "own":
            wrong = (given.target != clean.target)[clean.split == "train"]
            result["gradient"] = gradient_shares(model, learner.training.corpus, torch.from_numpy(wrong))
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def untrained(setting, loss, seed, sizes, clean):
    """Return a model with its first weights; standardiser, check and proxies are fitted to clean data."""
    learner = MemoryData(clean, seed)
    config = M3ERConfig(
        check=CheckConfig() if setting.check_in_training else None,
        proxy=ProxyConfig() if setting.check_in_training else None,
        check_in_training=setting.check_in_training,
        network=NetworkConfig(dropout=0.0 if setting.mosi else 0.5),
        loss=LossConfig(**(setting.loss | LOSSES[loss])),
        training=TrainingConfig(epochs=setting.longer * sizes.epochs, patience=None, seed=seed),
    )
    if setting.balance:
        config = config.replace(loss=replace(config.loss, class_weight=learner.class_weights()))
    torch.manual_seed(seed)
    model = M3ERFusion(clean.input_dims, len(clean.classes), config, classes=clean.classes)
    learner.fit(model)
    return model


def chosen_epochs(model, learner, last_epoch=False):
    """Train as ``train`` does, and return (epoch, weights) by choice of the epoch."""
    state, least, by_head = TrainingState(model, {}), np.inf, (0, {})
    while not state.finished():
        train_loss = train_epoch(state, learner.training)
        state.record(train_loss, mean_loss(model.ablated(check=False, proxy=False), learner.validation))
        head_loss = head_cross_entropy(model, learner.validation.corpus)
        if head_loss < least:
            weights = {name: value.clone() for name, value in model.network.state_dict().items()}
            least, by_head = head_loss, (state.epoch, weights)
    if last_epoch:
        return dict.fromkeys(CHOICES, (state.epoch, model.network.state_dict()))
    return {"own": (state.best_epoch, state.best), "head": by_head}


def corpus_of(setting, seed, sizes, data):
    """Return the corpus of a setting, with a large test split, so that little of a score's spread is its own."""
    if setting.mosi:
        return ensure_validation(read(data / "mosi_utterance", "utterance-csv"), seed=seed)
    corpus = make_synthetic(sizes.utterances, imbalance=setting.imbalance, seed=seed)
    return split_by_group(corpus, fractions=(0.5, 0.15, 0.35), seed=seed)


def with_label_noise(corpus, share, seed):
    """Replace a share of the labels outside of the test split by another class each, drawn at random."""
    random = np.random.default_rng([seed, 1])
    classes, n = len(corpus.classes), len(corpus)
    hit = (random.random(n) < share) & (corpus.split != "test")
    other = (corpus.target + random.integers(1, classes, n)) % classes
    return replace(corpus, target=np.where(hit, other, corpus.target))


def outputs(model, corpus):
    """Return the model's output for a whole corpus, in eval mode."""
    (batch,) = corpus_batches(corpus, np.arange(len(corpus)), len(corpus))
    with eval_mode(model), torch.no_grad():
        return model(batch.features, batch.lengths, batch.available)


def head_cross_entropy(model, corpus):
    """Return the fused head's part of the model's loss, without check and proxies as in training's validation."""
    logits = outputs(model.ablated(check=False, proxy=False), corpus).logits
    target = torch.from_numpy(corpus.target)
    options = {"activation": model.config.loss.activation, "class_weight": model.criterion.class_weight}
    return functional.fusion_loss(logits[None], target, **options).item()


def decisions(model, corpus):
    """Return (N,) classes by rule."""
    output, settings = outputs(model, corpus), model.config.loss
    log_p, log_not_p = log_probabilities(output.modality_logits, output.available, settings.activation)

    def cheapest(variant, beta):
        options = {"detach_weight": False, "modality_weight": None, "available": output.available}
        return fusion_costs(log_p, log_not_p, variant=variant, beta=beta, **options).argmin(dim=1)

    return {
        "fused": output.logits.argmax(dim=1),
        "sum": cheapest("original", 0.0),  # no weights
        "liu": cheapest("original", settings.beta or 1.0),
    }


def scores(model, corpus):
    """Return the F1 of each rule."""
    return {
        rule: round(float(f1_score(corpus.target, classes, average="macro")), 4)
        for rule, classes in decisions(model, corpus).items()
    }


def gradient_shares(model, corpus, wrong_label):
    """Return which training answers the fusion loss learns from.

    Returns:
        The shares of the modalities' answers that are not the given label ("missed"), and of answers to a wrong label
        ("mislabelled"), each with the share of the gradient Σ |∂loss/∂logit| that falls on them.
    """
    output = outputs(model, corpus)
    logits, target = output.modality_logits.requires_grad_(), torch.from_numpy(corpus.target)
    (gradient,) = torch.autograd.grad(model.criterion(logits, target, output.available), logits)
    size = gradient.abs().sum(dim=2)  # (M, N)
    masks = {"missed": logits.argmax(dim=2) != target, "mislabelled": wrong_label.expand(len(size), -1)}
    return {
        name: {"answers": round(mask.float().mean().item(), 4), "gradient": round(share.item(), 4)}
        for name, mask in masks.items()
        for share in [size[mask].sum() / size.sum()]
    }


# --- All trainings ---


def study(path, settings, seeds, sizes, data, minutes=np.inf, say=print):
    """Train what the file lacks, writing it after every training, and return all runs."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {(run["setting"], run["loss"], run["seed"]) for run in runs}
    end = time.monotonic() + 60 * minutes
    known = {name: one for name, one in settings.items() if not one.mosi or (data / "mosi_utterance").is_dir()}
    wanted = [(seed, name, loss) for seed in range(seeds) for name, setting in known.items() for loss in setting.losses]
    for seed, name, loss in wanted:
        if (name, loss, seed) in done:
            continue
        if time.monotonic() > end:
            say(f"stopped after {minutes} minutes: run the same command again")
            break
        run = {"setting": name, "loss": loss, "seed": seed} | trained(settings[name], loss, seed, sizes, data)
        runs.append(run)
        write(path, runs, sizes)
        say(f"{name}, {loss}, seed {seed}: F1 {run['f1']['own']['test']['fused']:.3f}, {run['seconds']} s")
    return runs


def write(path, runs, sizes):
    """Write settings and runs, one run per line."""
    about = {"commit": common.commit(), "torch": torch.__version__, "python": platform.python_version()}
    lines = ",\n".join(json.dumps(run) for run in runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{"settings": {json.dumps(about | sizes._asdict())}, "runs": [\n{lines}\n]}}\n')
    partial.replace(path)


# --- Table and figure ---


def values(runs, setting, loss, choice="own", split="test", rule="fused"):
    """Return the F1 of each seed, (S,), by seed."""
    found = {
        run["seed"]: run["f1"][choice][split][rule] for run in runs if run["setting"] == setting and run["loss"] == loss
    }
    return np.array([found[seed] for seed in sorted(found)])


def differences(runs, setting, first, second, **which):
    """Return the paired differences first − second, (S,), by seed."""
    return values(runs, setting, first, **which) - values(runs, setting, second, **which)


def mean_error(pairs):
    """Return mean and standard error, None for a single value."""
    mean, deviation = mean_std(pairs)
    return mean, None if deviation is None else deviation / np.sqrt(len(pairs))


def trains_head(setting):
    """Return whether the fused head of a setting has learned anything."""
    return SETTINGS[setting].loss.get("head_weight", 1.0) > 0


def shown(pair, sign=False):
    mean, spread = pair
    return f"{mean:+.3f}" * sign + f"{mean:.3f}" * (not sign) + ("" if spread is None else f" ± {spread:.3f}")


def row(*cells):
    return f"| {' | '.join(cells)} |"


def complete(runs):
    """Return the runs of the seeds that every setting and loss of the results has."""
    groups: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        groups.setdefault((run["setting"], run["loss"]), set()).add(run["seed"])
    common_seeds = set.intersection(*groups.values())
    return [run for run in runs if run["seed"] in common_seeds]


def tables(runs):
    """Return the lines of all tables."""
    found = {name: [loss for loss in LOSSES if len(values(runs, name, loss))] for name in SETTINGS}
    found = {name: losses for name, losses in found.items() if losses}
    return [
        *loss_table(runs, found),
        *difference_table(runs, found),
        *rule_table(runs, found, "test"),
        *rule_table(runs, found, "noisy test"),
        *epoch_table(runs, found),
        *gradient_table(runs, found),
    ]


def loss_table(runs, found):
    """Fused head: each loss's F1."""
    lines = ["**F1 of the fused head**, test split, mean ± standard deviation over seeds:", ""]
    lines += [row("Setting", *LOSSES, *(f"{loss}, noisy test" for loss in LOSSES)), "|---" + "|---:" * 6 + "|"]
    for name in filter(trains_head, found):
        cells = [
            shown(mean_std(values(runs, name, loss, split=split))) if loss in found[name] else ""
            for split in ("test", "noisy test")
            for loss in LOSSES
        ]
        lines.append(row(name, *cells))
    return lines


def difference_table(runs, found):
    """Paired differences, by split, rule and choice of the epoch."""
    columns = {
        "validation": ("original", {"split": "valid"}),
        "test": ("original", {}),
        "test, Σ log p": ("original", {"rule": "sum"}),
        "test, epoch by the head": ("original", {"choice": "head"}),
        "modified − unweighted, test": ("unweighted", {}),
    }
    lines = ["", "**Modified − original**, paired by seed, mean ± standard error; the fused head if not said:", ""]
    lines += [row("Setting", *columns), "|---" + "|---:" * 5 + "|"]
    rows = {
        name: [
            differences(runs, name, "modified", other, **options)
            if other in losses and (trains_head(name) or "rule" in options)
            else None
            for other, options in columns.values()
        ]
        for name, losses in found.items()
    }
    whole = zip(*rows.values(), strict=True)  # by column
    rows["mean of these settings"] = [np.mean([one for one in column if one is not None], axis=0) for column in whole]
    for name, cells in rows.items():
        lines.append(row(name, *("" if pairs is None else shown(mean_error(pairs), sign=True) for pairs in cells)))
    return lines


def rule_table(runs, found, split):
    """How the same networks decide by each rule."""
    columns = [(loss, rule) for loss in WEIGHTED for rule in RULES]
    lines = ["", f"**Three decisions of the same networks**, {split} split, mean ± standard deviation:", ""]
    lines += [row("Setting", *(f"{loss}: {RULES[rule]}" for loss, rule in columns)), "|---" + "|---:" * 6 + "|"]
    for name in found:
        cells = [
            shown(mean_std(values(runs, name, loss, split=split, rule=rule)))
            if trains_head(name) or rule != "fused"
            else ""
            for loss, rule in columns
        ]
        lines.append(row(name, *cells))
    return lines


def epoch_table(runs, found):
    """What the choice of the epoch does to the fused head."""
    names = {"own": "the model's own loss", "head": "the fused head's cross entropy"}
    columns = [(loss, choice) for loss in WEIGHTED for choice in CHOICES]
    lines = [
        "",
        "**Epoch chosen by the validation split's …**, F1 of the fused head on the test split (mean epoch):",
        "",
    ]
    lines += [row("Setting", *(f"{loss}: {names[choice]}" for loss, choice in columns)), "|---" + "|---:" * 4 + "|"]
    for name in filter(trains_head, found):
        cells = []
        for loss, choice in columns:
            epochs = [run["epoch"][choice] for run in runs if (run["setting"], run["loss"]) == (name, loss)]
            cells.append(f"{shown(mean_std(values(runs, name, loss, choice=choice)))} ({np.mean(epochs):.0f})")
        lines.append(row(name, *cells))
    return lines


def gradient_table(runs, found):
    """Which answers the fusion loss learns from."""
    lines = ["", "**Where the fusion loss's gradient falls**, training split, mean over seeds:", ""]
    lines += [row("Setting", "Answers", "Loss", "Share of answers", "Share of gradient"), "|---|---|---|---:|---:|"]
    for name, kind in (("base", "missed"), ("label noise 40 %", "missed"), ("label noise 40 %", "mislabelled")):
        for loss in found.get(name, ()):
            shares = [run["gradient"][kind] for run in runs if (run["setting"], run["loss"]) == (name, loss)]
            means = {part: 100 * np.mean([share[part] for share in shares]) for part in ("answers", "gradient")}
            lines.append(row(name, kind, loss, *(f"{mean:.0f} %" for mean in means.values())))
    return lines


def draw(runs, path):
    """Draw the paired differences of every setting, by the fused head and by Σ log p."""
    names = [name for name in SETTINGS if len(values(runs, name, "modified"))][::-1]
    figure = Figure(figsize=(9.5, 0.8 + 0.24 * len(names)), dpi=130, layout="constrained")
    for axes, rule in zip(figure.subplots(1, 2, sharey=True), ("fused", "sum"), strict=True):
        for place, name in enumerate(names):
            if rule == "fused" and not trains_head(name):
                continue
            pairs = differences(runs, name, "modified", "original", rule=rule)
            axes.plot(pairs, np.full(len(pairs), place), "o", color="0.65", ms=3, label="one seed")
            mean, error = mean_error(pairs)
            axes.errorbar(
                mean, place, xerr=error, fmt="s", color="#0072B2", ms=5, capsize=3, label="mean, standard error"
            )
        axes.axvline(0, color="0.4", lw=1)
        axes.set_title(f"decided by the {RULES[rule]}" if rule == "fused" else f"decided by {RULES[rule]}", fontsize=10)
        axes.set_xlabel("F1, modified − original loss")
        axes.grid(axis="x", color="0.92")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles[:: len(handles) - 1],
        labels[:: len(labels) - 1],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    figure.axes[0].set_yticks(range(len(names)), names, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def write_page(path, lines):
    """Replace what is between the page's two markers."""
    begin, end = MARKERS
    before, found_begin, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{path} lacks the lines {begin!r} and {end!r}")
    path.write_text("\n".join([before + begin, "", *lines, "", end + after]), encoding="utf-8")


def main():
    """Train, and write table and figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_study", description=__doc__.partition("\n")[0])
    common.add_data_argument(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON of all runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=np.inf, help="begin no training after this time")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    parser.add_argument("--figure", type=Path, help="draw the differences into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = complete(study(options.out, SETTINGS, options.seeds, Sizes(), options.data, options.minutes))
    if options.page:
        write_page(options.page, tables(runs))
    if options.figure:
        draw(runs, options.figure)


if __name__ == "__main__":
    main()
