"""Every figure has the right size, bytes and labels; input that cannot be drawn is refused by name."""

import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra m3er-fast[plot]")

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from m3er_fast.plots import (  # noqa: E402
    Example,
    Timeline,
    plot_ablation,
    plot_examples,
    plot_history,
    plot_proxies,
    plot_timeline,
)

HISTORY = {"train_loss": [1.5, 1.1, 0.9, 0.7], "valid_loss": [1.6, 1.2, 1.1, 1.3], "best_epoch": 3}
ROWS = [("without proxies", 0.634, 0.011), ("full M3ER", 0.761, 0.008), ("true mask", 0.765, None)]
GROUPS = {"Clean": ROWS[1:2], "With ineffectual modalities": ROWS}
NAMES = ("text", "audio", "face", "physiology", "gaze")
NOT_A_NUMBER = float("nan")


@pytest.fixture
def figure_of(tmp_path, monkeypatch):
    """A function that calls a plot function and returns the figure that it saved."""
    saved, savefig = [], Figure.savefig

    def record(figure, *arguments, **options):
        saved.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)

    def call(plot, *arguments, **options):
        plot(*arguments, tmp_path / "figure.png", **options)
        return saved[-1]

    return call


def png_size(path):
    """Return width and height in pixels from the file's header."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def proxies(dims, error=0.000012, scale=1.0):
    rng = np.random.default_rng(0)
    original = {name: scale * rng.normal(size=dim) for name, dim in dims.items()}
    corrupted = {name: values + 10 * scale * rng.normal(size=values.shape) for name, values in original.items()}
    regenerated = {name: values * (1 + error) for name, values in original.items()}
    return original, corrupted, regenerated, dict.fromkeys(dims, error)


def example(index=1, M=3, C=4, **changes):
    rng = np.random.default_rng(index)
    names = tuple(f"class {c}" for c in range(C))
    values = {
        "id": f"video[{index}]",
        "label": names[index],
        "classes": names,
        "modalities": NAMES[:M],
        "probabilities": rng.dirichlet(np.ones(C), size=M),
        "fused": np.where(np.arange(C) == index, 0.7, 0.3 / (C - 1)),
        "effective": np.arange(M) != 1,
        "weights": rng.uniform(size=M),
    }
    return Example(**{**values, **changes})


def draw(kind, path):
    """Draw the figure of that name from ordinary input."""
    match kind:
        case "history":
            plot_history(HISTORY, path)
        case "proxies":
            plot_proxies(*proxies({"text": 300, "audio": 74, "face": 36}), path)
        case "examples":
            plot_examples([example(c) for c in range(4)], path)
        case "ablation":
            plot_ablation(GROUPS, path, metric="Overall F1")


# --- every figure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size"),
    [("history", (1050, 600)), ("proxies", (1800, 1020)), ("examples", (1440, 948)), ("ablation", (1200, 444))],
)
def test_the_file_has_the_expected_size_and_the_same_bytes_every_time_whatever_the_users_settings(tmp_path, kind, size):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    draw(kind, first)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.facecolor": "red", "savefig.dpi": 10}):
        draw(kind, second)
    assert png_size(first) == size
    assert first.read_bytes() == second.read_bytes()
    assert b"tEXt" not in first.read_bytes()  # neither a date nor the version of matplotlib


def test_no_pyplot_and_no_global_setting_is_touched(tmp_path):
    code = (
        "import sys, matplotlib; from pathlib import Path; from m3er_fast.plots import plot_history\n"
        "before = matplotlib.rcParams.copy()\n"
        "plot_history({'train_loss': [1.0], 'valid_loss': [1.0], 'best_epoch': 1}, Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "history.png")], check=True)


def test_without_matplotlib_the_import_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    monkeypatch.delitem(sys.modules, "m3er_fast.plots")
    with pytest.raises(ImportError, match=r"pip install 'm3er-fast\[plot\]'"):
        import m3er_fast.plots  # noqa: F401


# --- history ----------------------------------------------------------------------------------------------------------


def test_history_shows_both_losses_from_epoch_one_and_marks_the_best(figure_of):
    axes = figure_of(plot_history, HISTORY).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
    for label, name in (("training", "train_loss"), ("validation", "valid_loss")):
        assert lines[label].get_xdata().tolist() == [1, 2, 3, 4]
        assert lines[label].get_ydata().tolist() == HISTORY[name]
    assert lines["best: 1.1 at epoch 3"].get_xydata().tolist() == [[3.0, 1.1]]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["training", "validation", "best: 1.1 at epoch 3"]


@pytest.mark.parametrize("epochs", [1, 500])
def test_history_of_any_length_is_drawn(tmp_path, epochs):
    loss = np.linspace(2.0, 1.0, epochs).tolist()
    plot_history({"train_loss": loss, "valid_loss": loss, "best_epoch": epochs}, tmp_path / "history.png")
    assert png_size(tmp_path / "history.png") == (1050, 600)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_loss": [], "valid_loss": []}, r"history\['train_loss'\] must have shape \(at least 1,\), got \(0,\)"),
        ({"valid_loss": [1.0]}, r"history\['valid_loss'\] must have shape \(4,\), got \(1,\)"),
        ({"valid_loss": [1.0, NOT_A_NUMBER, 1.0, 1.0]}, r"history\['valid_loss'\] must be finite"),
        ({"train_loss": ["a", 1, 1, 1]}, r"history\['train_loss'\] must be an array of numbers"),
        ({"best_epoch": 0}, r"history\['best_epoch'\] must be an epoch from 1 to 4, got 0"),
        ({"best_epoch": 5}, r"history\['best_epoch'\] must be an epoch from 1 to 4, got 5"),
        ({"best_epoch": 2.0}, r"history\['best_epoch'\] must be an epoch from 1 to 4, got 2.0"),
    ],
)
def test_history_refuses_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        plot_history({**HISTORY, **change}, tmp_path / "history.png")
    assert not (tmp_path / "history.png").exists()


def test_history_without_an_entry_says_which(tmp_path):
    with pytest.raises(ValueError, match="lacks valid_loss, best_epoch"):
        plot_history({"train_loss": [1.0]}, tmp_path / "history.png")


# --- Figure 7 ---------------------------------------------------------------------------------------------------------


def test_each_modality_is_drawn_with_and_without_noise_in_the_slides_colours(figure_of):
    original, corrupted, regenerated, errors = proxies({"text": 300, "face": 36})
    axes = figure_of(plot_proxies, original, corrupted, regenerated, errors).axes
    assert len(axes) == 4
    for name, wide, close in (("text", *axes[:2]), ("face", *axes[2:])):
        assert wide.get_ylabel() == f"{name}\nstandardised value"
        order = np.argsort(original[name])
        drawn = {line.get_label(): line for line in wide.get_lines()}
        assert np.array_equal(drawn["original"].get_ydata(), original[name][order])
        assert np.array_equal(drawn["ineffectual (noise added)"].get_ydata(), corrupted[name][order])
        assert np.array_equal(drawn["regenerated"].get_ydata(), regenerated[name][order])
        assert [line.get_label() for line in close.get_lines()] == ["original", "regenerated"]
        low, high = close.get_ylim()
        # Its own scale: the features fill most of the panel, though the noise is ten times as large.
        assert np.ptp(original[name]) > 0.8 * (high - low)
        for label, channel in (("original", 2), ("ineffectual (noise added)", 0), ("regenerated", 1)):
            color = drawn[label].get_color().lstrip("#")
            assert int(np.argmax(list(bytes.fromhex(color)))) == channel  # red, green or blue


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (0.000012, "0.0012 %"),
        (0.0833, "8.3 %"),
        (0.0999, "10 %"),
        (0.834, "83 %"),
        (1.304, "130 %"),
        (0.0, "0 %"),
        (1e-8, "1e-06 %"),
    ],
)
def test_the_error_is_printed_as_a_percentage_with_two_digits(figure_of, error, text):
    figure = figure_of(plot_proxies, *proxies({"text": 5}, error))
    assert figure.axes[1].get_title(loc="left").endswith(f"relative L2 error {text}")


@pytest.mark.parametrize(
    ("dims", "height", "scale"),
    [((300, 74), 720, 1e30), ((300, 74), 720, 0.0), ((300, 74, 36, 1, 2), 1620, 1.0)],
)
def test_figure_7_of_two_to_five_modalities_any_size_and_scale(tmp_path, dims, height, scale):
    path = tmp_path / "proxies.png"
    plot_proxies(*proxies(dict(zip(NAMES, dims, strict=False)), scale=scale), path)
    assert png_size(path) == (1800, height)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (0, {}, "original must hold at least one modality"),
        (1, {"face": [1.0, 2.0]}, r"corrupted must hold the modalities of original, \['text'\], got \['face'\]"),
        (3, {}, r"errors must hold the modalities of original, \['text'\], got \[\]"),
        (0, {"text": [[1.0, 2.0]]}, r"original\['text'\] must have shape \(at least 1,\), got \(1, 2\)"),
        (0, {"text": []}, r"original\['text'\] must have shape \(at least 1,\), got \(0,\)"),
        (1, {"text": [1.0, np.inf]}, r"corrupted\['text'\] must be finite"),
        (2, {"text": [1.0]}, r"regenerated\['text'\] must have shape \(2,\), got \(1,\)"),
        (3, {"text": -0.1}, r"errors\['text'\] must not be negative, got -0.1"),
        (3, {"text": NOT_A_NUMBER}, r"errors\['text'\] must be finite"),
        (3, {"text": [0.1, 0.2]}, r"errors\['text'\] must have shape \(\), got \(2,\)"),
    ],
)
def test_figure_7_refuses_by_name(tmp_path, argument, value, message):
    arguments = list(proxies({"text": 2}))
    arguments[argument] = value
    with pytest.raises(ValueError, match=message):
        plot_proxies(*arguments, tmp_path / "proxies.png")


# --- Figures 3 and 4 --------------------------------------------------------------------------------------------------


def widths(axes):
    return [bar.get_width() for bar in axes.patches]


def test_an_example_shows_what_each_modality_said_the_verdicts_and_the_weights(figure_of):
    sample = example()
    figure = figure_of(plot_examples, [sample])
    (band,) = figure.subfigs
    text, audio, face, fused, weight = band.axes
    assert band.get_suptitle() == "class 1, predicted class 1: video[1]"
    for m, axes in enumerate((text, audio, face)):
        assert widths(axes) == pytest.approx(sample.probabilities[m])
        verdict = "ineffectual" if m == 1 else "effective"
        assert axes.get_title(loc="left") == f"{sample.modalities[m]}\n{verdict}"
        assert all(bool(bar.get_hatch()) == (m == 1) for bar in axes.patches)
    assert widths(fused) == pytest.approx(sample.fused)
    assert widths(weight) == pytest.approx(sample.weights)
    assert [bool(bar.get_hatch()) for bar in weight.patches] == [False, True, False]
    assert [label.get_text() for label in text.get_yticklabels()] == list(sample.classes)
    assert [label.get_text() for label in weight.get_yticklabels()] == list(sample.modalities)
    assert [note.get_text() for note in fused.texts] == ["0.10", "0.70", "0.10", "0.10"]


def test_a_wrong_prediction_is_shown_as_it_is(figure_of):
    figure = figure_of(plot_examples, [example(fused=np.array([0.9, 0.1, 0.0, 0.0]))])
    assert figure.subfigs[0].get_suptitle() == "class 1, predicted class 0: video[1]"


def test_weights_of_all_examples_share_one_scale(figure_of):
    figure = figure_of(plot_examples, [example(0, weights=np.array([4.0, 1.0, 0.0])), example(1)])
    for band in figure.subfigs:
        assert band.axes[-1].get_xlim() == pytest.approx((0.0, 5.2))


@pytest.mark.parametrize(("modalities", "classes", "size"), [(2, 2, (1200, 372)), (5, 7, (1920, 2194))])
def test_examples_with_long_names_fit_into_the_picture(figure_of, tmp_path, modalities, classes, size):
    names = tuple(f"a class with a very long name, number {c}" for c in range(classes))
    samples = [
        replace(example(c, modalities, classes), classes=names, label=names[c], id="$x_" * 40) for c in range(classes)
    ]
    figure = figure_of(plot_examples, samples)
    assert png_size(tmp_path / "figure.png") == size
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        assert box.width == 0 or (box.x0 >= 0 and box.x1 <= size[0]), text.get_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "other"}, "label must be one of the classes .*, got 'other'"),
        ({"modalities": ()}, "modalities must hold at least one name"),
        ({"probabilities": np.full((4, 3), 0.25)}, r"probabilities must have shape \(3, 4\), got \(4, 3\)"),
        ({"probabilities": np.full((3, 4), NOT_A_NUMBER)}, "probabilities must be finite"),
        ({"fused": np.full(3, 0.25)}, r"fused must have shape \(4,\), got \(3,\)"),
        ({"fused": np.array([-0.5, 1.5, 0, 0])}, r"fused must lie in 0..1, got values from -0.5 to 1.5"),
        ({"weights": np.ones(4)}, r"weights must have shape \(3,\), got \(4,\)"),
        ({"weights": np.array([1.0, -1.0, 0.0])}, "weights must not be negative"),
        ({"effective": np.ones(3)}, r"effective must be booleans of shape \(3,\), got float64"),
        (
            {"effective": np.ones(4, dtype=bool)},
            r"effective must be booleans of shape \(3,\), got bool of shape \(4,\)",
        ),
    ],
)
def test_an_example_refuses_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        example(**changes)


def test_examples_must_be_some_and_of_one_model(tmp_path):
    with pytest.raises(ValueError, match="at least one example"):
        plot_examples([], tmp_path / "examples.png")
    with pytest.raises(ValueError, match="examples must share their modalities and classes"):
        plot_examples([example(M=3), example(M=2)], tmp_path / "examples.png")


# --- ablation ---------------------------------------------------------------------------------------------------------


def test_ablation_bars_stand_in_groups_of_one_colour_with_whiskers_where_there_is_a_deviation(figure_of):
    axes = figure_of(plot_ablation, GROUPS, metric="Overall F1").axes[0]
    assert widths(axes) == [0.761, 0.634, 0.761, 0.765]
    assert axes.yaxis_inverted()  # the first row at the top
    assert [label.get_text() for label in axes.get_yticklabels()] == ["full M3ER", *(label for label, _, _ in ROWS)]
    first, *others = [bar.get_facecolor() for bar in axes.patches]
    assert first != others[0]
    assert set(others) == {others[0]}
    notes = [note.get_text() for note in axes.texts]
    assert notes[:3] == ["Clean", "0.761 ± 0.008", "With ineffectual modalities"]
    assert notes[3:] == ["0.634 ± 0.011", "0.761 ± 0.008", "0.765"]
    assert axes.get_xlabel() == "Overall F1"
    assert axes.get_xlim()[0] == 0.0
    whiskers = [
        segment[:, 0].tolist()
        for bars in axes.containers
        if hasattr(bars, "has_xerr")
        for segment in bars.lines[2][0].get_segments()
    ]
    assert whiskers[1:] == [pytest.approx([0.623, 0.645]), pytest.approx([0.753, 0.769])]


def test_long_ablation_labels_are_wrapped_and_nothing_is_lost(figure_of):
    label = "full M3ER given the true corruption mask, which is what a perfect check would give"
    shown = figure_of(plot_ablation, {"": [(label, 0.7, None)]}, metric="MA").axes[0].get_yticklabels()[0].get_text()
    assert shown.replace("\n", " ") == label
    assert max(map(len, shown.split("\n"))) <= 45


@pytest.mark.parametrize("row", [("zero", 0.0, None), ("negative", -0.5, 0.1), ("no spread", 0.5, 0.0)])
def test_one_row_of_any_sign_is_drawn(tmp_path, row):
    plot_ablation({"all": [row]}, tmp_path / "ablation.png", metric="score")
    assert png_size(tmp_path / "ablation.png") == (1200, 228)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "groups must hold at least one row each, got {'all': \\[\\]}"),
        ([("a", NOT_A_NUMBER, None)], "the means of groups must be finite"),
        ([("a", 0.5, NOT_A_NUMBER)], "the standard deviations of groups must be finite"),
        ([("a", 0.5, -0.1)], "the standard deviations of groups must not be negative, got -0.1"),
    ],
)
def test_ablation_refuses_by_name(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        plot_ablation({"all": rows}, tmp_path / "ablation.png", metric="score")


def timeline(rows=3, classes=2, **changes):
    generator = np.random.default_rng(0)
    values = {
        "title": "talk $1.mp4",
        "spans": np.stack([np.arange(rows), np.arange(rows) + 1], axis=1).astype(float),
        "classes": tuple(f"class {c}" for c in range(classes)),
        "probabilities": generator.dirichlet(np.ones(classes), rows),
        "modalities": ("text", "audio"),
        "trusted": np.array([[1, 0], [np.nan, 1], [np.nan, np.nan]] * rows)[:rows],
        "abstained": np.array([False, False, True] * rows)[:rows],
        "level": np.array([[0.5, 1.5], [0.1, 0.2]]),
        "pictures": [(1.0, np.zeros((9, 16, 3), np.uint8))],
    }
    return Timeline(**{**values, **changes})


def look(patch):
    return patch.get_facecolor(), patch.get_edgecolor(), patch.get_hatch()


def test_timeline_shows_probabilities_and_what_was_trusted(figure_of):
    figure = figure_of(plot_timeline, timeline())
    pictures, level, stack, bands = figure.axes
    heights = np.array([[bar.get_height() for bar in group] for group in stack.containers])
    np.testing.assert_allclose(heights, timeline().probabilities.T)
    assert [text.get_text() for text in stack.texts] == ["abstained"]
    assert [text.get_text() for text in bands.get_yticklabels()] == ["text", "audio"]
    drawn = {(round(bar.get_y() + 0.35), float(bar.get_x())): look(bar) for bar in bands.patches}
    trusted, other, unavailable = [look(patch) for patch in bands.get_legend().get_patches()]
    assert len({trusted, other, unavailable}) == 3
    assert drawn == {
        (0, 0): trusted, (1, 0): other, (0, 1): unavailable, (1, 1): trusted, (0, 2): unavailable, (1, 2): unavailable
    }  # fmt: skip
    assert [text.get_text() for text in bands.get_legend().get_texts()] == ["trusted", "not trusted", "unavailable"]
    assert len(pictures.images) == 1
    assert level.get_ylabel() == "sound"


def test_timeline_without_sound_and_pictures_and_with_many_classes(figure_of):
    figure = figure_of(plot_timeline, timeline(1, 20, level=np.empty((2, 0)), pictures=()))
    assert len(figure.axes) == 2
    styles = {(bar.get_facecolor(), bar.get_hatch()) for group in figure.axes[0].containers for bar in group}
    assert len(styles) >= 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spans": np.zeros((3, 3))}, "spans"),
        ({"probabilities": np.zeros((2, 2))}, "probabilities"),
        ({"trusted": np.zeros((3, 3))}, r"trusted must be of shape \(3, 2\) with N ≥ 1, got \(3, 3\)"),
    ],
)
def test_bad_timelines_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        plot_timeline(timeline(**changes), tmp_path / "a.png")
