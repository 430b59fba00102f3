"""Pictures of detectors: what is drawn is what the scores, paths and numbers say."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from path_bits import drawn, legend, paths_of, random, texts
from scipy.integrate import trapezoid

from captum_classfilters import visualize
from captum_classfilters.core.errors import MergeError, OptionError, ShapeError
from captum_classfilters.visualize.kit import COLOURS

# -- roc ---------------------------------------------------------------------------------------------------------------


def run_of(seed, clean=40, adversarial=25, ties=False):
    """0 and 1, mixed, and scores that tell them apart somewhat."""
    y = (random(clean + adversarial, seed=seed) > 0.6).long()
    scores = random(len(y), seed=seed + 100) + 0.3 * y
    return y.numpy(), (scores.mul(5).round() if ties else scores).numpy()


def area(y, scores):
    """The chance that an adversarial image scores above a clean one, half of it if they are level."""
    above = scores[y == 1][:, None] - scores[y == 0]
    return ((above > 0) + 0.5 * (above == 0)).mean()


def height(y, scores, rate):
    """The highest true-positive rate at that false-positive rate, where two thresholds may be mixed at random."""
    cuts = [np.inf, *np.unique(scores)[::-1]]
    points = [((scores[y == 0] >= cut).mean(), (scores[y == 1] >= cut).mean()) for cut in cuts]
    (x0, y0), right = max(p for p in points if p[0] <= rate), [p for p in points if p[0] > rate]
    if not right or x0 == rate:
        return y0
    x1, y1 = min(right)
    return y0 + (y1 - y0) * (rate - x0) / (x1 - x0)


@pytest.mark.parametrize("ties", [False, True])
def test_a_curve_is_the_mean_over_runs_at_equal_rates_and_its_band_a_deviation(ties, inside):
    runs = [run_of(seed, ties=ties) for seed in range(4)]
    ax = visualize.roc({"forest": runs})
    x, y = ax.lines[0].get_data()
    assert (x[0], y[0]) == (0, 0)
    assert (x[1], x[-1], y[-1]) == (0, 1, 1)
    band = ax.collections[0].get_paths()[0].vertices
    # not at a clean image's own rate, where rounding decides on which side of a step a grid point lies
    for place in range(8, len(x), 97):
        heights = [height(*run, x[place]) for run in runs]
        assert y[place] == pytest.approx(np.mean(heights), abs=1e-9)
        drawn_band = band[np.isclose(band[:, 0], x[place], rtol=0, atol=1e-9), 1]
        mean, spread = np.mean(heights), np.sqrt(np.sum((heights - np.mean(heights)) ** 2) / 3)
        expected = np.clip([mean - spread, mean + spread], 0, 1)
        np.testing.assert_allclose([drawn_band.min(), drawn_band.max()], expected, atol=1e-9)
    inside(ax)


def test_the_legend_says_auc_with_its_deviation_of_several_runs(inside):
    runs = [run_of(seed) for seed in range(3)]
    areas = [area(*run) for run in runs]
    ax = visualize.roc({"forest": runs, "one run": [runs[1]]})
    several = f"{np.mean(areas):.3f} ± {np.std(areas, ddof=1):.3f}"
    assert legend(ax) == [f"forest: {several} (3 runs)", f"one run: {areas[1]:.3f}", "random: 0.500"]
    assert "mean ± 1 sd" in ax.get_legend().get_title().get_text()
    assert len(ax.collections) == 1
    assert visualize.roc({"one run": [runs[1]]}).get_legend().get_title().get_text() == "AUC"
    inside(ax)


def test_the_area_below_a_mean_curve_is_the_mean_auc():
    runs = [run_of(seed) for seed in range(5)]
    x, y = visualize.roc({"forest": runs}).lines[0].get_data()
    assert trapezoid(y, x) == pytest.approx(np.mean([area(*run) for run in runs]), abs=2e-3)


@pytest.mark.parametrize(("sign", "expected"), [(1, 1), (-1, 0)])
def test_perfect_scores_stand_at_the_top_and_inverted_ones_at_the_bottom(sign, expected):
    y = np.repeat([0, 1], 30)
    ax = visualize.roc({"forest": [(y, sign * y)]})
    np.testing.assert_array_equal(ax.lines[0].get_ydata()[1:-1], expected)
    assert legend(ax)[0] == f"forest: {expected:.3f}"


def test_chance_and_the_chosen_rate_are_lines():
    ax = visualize.roc({"forest": [run_of(0)]}, false_positive_rate=0.05)
    _, chance, rate = ax.lines
    np.testing.assert_array_equal(chance.get_xydata(), [[0, 0], [1, 1]])
    assert list(rate.get_xdata()) == [0.05, 0.05]
    assert legend(ax)[1:] == ["random: 0.500", "false-positive rate 0.05"]
    assert len(visualize.roc({"forest": [run_of(0)]}).lines) == 2
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("false-positive rate", "true-positive rate")
    assert ax.get_aspect() == 1
    assert ax.get_xlim() == ax.get_ylim() == (-0.01, 1.01)


def test_thirty_six_curves_look_different_and_the_legend_has_room(inside):
    ax = visualize.roc({f"attack number {index} of very many": [run_of(index)] * 2 for index in range(12)})
    inside(ax)
    assert all(text.endswith("(2 runs)") for text in legend(ax)[:12])
    ax = visualize.roc({str(index): [run_of(0)] for index in range(36)}, ax=plt.subplots()[1])
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines[:36]}) == 36
    assert [line.get_color() for line in ax.lines[:9]] == list(COLOURS)
    assert [line.get_color() for line in ax.get_legend().legend_handles[:9]] == list(COLOURS)


def test_scores_may_be_arrays_tensors_series_and_lists_of_different_lengths():
    y, scores = run_of(3)
    y.flags.writeable = False  # as of a file that is mapped into memory
    shuffled = pd.Series(y, index=range(len(y), 0, -1)), pd.Series(scores, index=range(7, len(y) + 7))
    kinds = [(y, scores), (torch.tensor(y.copy()), torch.tensor(scores)), (y.tolist(), scores.tolist()), shuffled]
    lines = visualize.roc({str(index): [kind] for index, kind in enumerate([*kinds, (y == 1, scores)])}).lines
    assert len({line.get_ydata().tobytes() for line in lines[:5]}) == 1
    assert legend(visualize.roc({"forest": [run_of(0), run_of(1, clean=9)]}))[0].endswith("(2 runs)")


@pytest.mark.parametrize(
    ("curves", "error", "message"),
    [
        ({}, OptionError, r"at least one, got none; pass \{name: \[\(y, scores\)\]\}"),
        ([([0, 1], [0, 1])], OptionError, "curves must be runs by name, at least one, got list"),
        ({"a": []}, OptionError, "runs of 'a' must be a list of pairs .* got none"),
        ({"a": ([0, 1, 1], [0, 1, 2])}, OptionError, r"run 0 of 'a' must be a pair \(y, scores\), got list; put a"),
        ({"a": [([0, 1], [0, 1]), np.zeros((2, 2))]}, OptionError, "run 1 of 'a' must be a pair .* got ndarray"),
        ({"a": [([0, 1, 1], [0, 1])]}, ShapeError, "of the same images, got 3 and 2; pass a score for each"),
        ({"a": [([], [])]}, ShapeError, r"y in run 0 of 'a' must have shape \(N,\), got \(0,\)"),
        ({"a": [([0, 1], [[0.1, 0.9], [0.9, 0.1]])]}, ShapeError, r"scores in run 0 .* \(N,\), got \(2, 2\)"),
        ({"a": [([1, 1], [0, 1])]}, OptionError, r"both, got 1.0; without images of both"),
        ({"a": [([1, 2], [0, 1])]}, OptionError, r"0 \(clean\) and 1 \(adversarial\), both, got 1.0, 2.0"),
        ({"a": [([0, np.nan, 1], [0, 1, 2])]}, OptionError, r"got 0.0, 1.0, nan"),
        ({"a": [([0, 1, 1], [0, np.nan, np.inf])]}, OptionError, "scores in run 0 of 'a' must be finite, got 2 that"),
    ],
)
def test_runs_without_a_curve_are_refused(curves, error, message):
    with pytest.raises(error, match=message):
        visualize.roc(curves)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("rate", [0, 1, 5, True, "5%", np.nan])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(OptionError, match=r"must be a number between 0 and 1, a share, such as 0\.05; got"):
        visualize.roc({"forest": [run_of(0)]}, false_positive_rate=rate)


# -- integral_paths ----------------------------------------------------------------------------------------------------

LAYERS = (5, 12, 7)


@pytest.fixture
def groups():
    """Images of three groups, of which each opens other channels."""
    rates = random(3, sum(LAYERS), seed=5)
    bits = [random(count, sum(LAYERS), seed=count) < rate for count, rate in zip((40, 30, 20), rates, strict=True)]
    names = ["dog", "truck", "dog -> truck (attacked)"]
    return {name: paths_of(bit, None, LAYERS, 2) for name, bit in zip(names, bits, strict=True)}


def shares_of(groups, layer=None):
    return np.stack([paths.bits(layer).numpy().mean(0) for paths in groups.values()])


def beside(ax):
    return texts(ax.child_axes[0].get_yticklabels())


def test_in_each_layer_channels_stand_by_the_first_groups_share(groups, inside):
    ax = visualize.integral_paths(groups)
    shares, values = shares_of(groups), drawn(ax)
    for left, right in ((0, 5), (5, 17), (17, 24)):
        columns = values[:, left:right]
        assert (np.diff(columns[0]) <= 0).all()
        # the same channels in all rows: whole columns are moved
        assert sorted(map(tuple, columns.T)) == sorted(map(tuple, shares[:, left:right].T))
    assert ax.images[0].get_clim() == (0, 1)
    assert ax.images[0].get_interpolation() == "nearest"
    assert texts(ax.get_yticklabels()) == list(groups)
    assert [segment[0][0] for segment in ax.collections[0].get_segments()] == [4.5, 16.5]
    assert texts(ax.get_xticklabels()) == ["conv1", "conv2", "conv3"]
    assert list(ax.get_xticks()) == [2, 10.5, 20]
    assert "most open for dog first" in ax.get_xlabel()
    assert ax.get_figure().axes[1].get_ylabel() == "share of images that open it"
    inside(ax)


def test_beside_each_group_stands_its_mean_difference_to_the_first(groups):
    shares = shares_of(groups)
    away = np.abs(shares - shares[0]).mean(1)
    expected = [f"{value:.3f} ({count})" for value, count in zip(away, (40, 30, 20), strict=True)]
    ax = visualize.integral_paths(groups)
    assert beside(ax) == expected
    # of all channels, whichever are drawn
    assert beside(visualize.integral_paths(groups, channels=1)) == expected
    assert ax.child_axes[0].get_ylabel() == "mean difference to\ndog (images)"
    assert list(ax.child_axes[0].get_yticks()) == list(ax.get_yticks()) == [0, 1, 2]


def test_of_single_images_the_difference_is_their_hamming_distance():
    one, other = paths_of(random(1, 20) > 0.5, None, (20,), 2), paths_of(random(1, 20, seed=1) > 0.5, None, (20,), 2)
    share = one.distances(other).item() / 20
    assert 0 < share < 1
    assert beside(visualize.integral_paths({"a": one, "b": other})) == ["0.000 (1)", f"{share:.3f} (1)"]


def test_one_layer_names_its_channels(groups, inside):
    ax = visualize.integral_paths(groups, "conv2")
    shares = shares_of(groups, "conv2")
    order = [int(text) for text in texts(ax.get_xticklabels())]
    assert order == sorted(range(12), key=lambda channel: tuple(-shares[:, channel]))
    np.testing.assert_allclose(drawn(ax), shares[:, order])
    assert beside(ax)[1] == f"{np.abs(shares[1] - shares[0]).mean():.3f} (30)"
    assert ax.get_xlabel() == "channel of conv2, those most open for dog first"
    inside(ax)
    np.testing.assert_array_equal(drawn(ax), drawn(visualize.integral_paths(groups, -2)))


def test_of_equal_shares_the_second_group_decides():
    groups = {"a": [[1, 1, 0, 1, 0]], "b": [[0, 1, 1, 0, 0]], "c": [[0, 0, 0, 1, 0]]}
    paths = {name: paths_of(bits, None, (5,), 2) for name, bits in groups.items()}
    assert texts(visualize.integral_paths(paths, 0).get_xticklabels()) == ["1", "3", "0", "2", "4"]


def test_few_channels_are_those_furthest_apart(groups, inside):
    ax = visualize.integral_paths(groups, channels=6)
    shares, left = shares_of(groups), 0
    for start, width in ((0, 5), (5, 12), (17, 7)):
        layer = shares[:, start : start + width]
        apart = np.sort(layer.max(0) - layer.min(0))[-6:]
        shown = drawn(ax)[:, left : left + len(apart)]
        np.testing.assert_allclose(np.sort(shown.max(0) - shown.min(0)), apart)
        left += len(apart)
    assert drawn(ax).shape == (3, left) == (3, 17)
    assert ax.get_xlabel().endswith("at most 6 of a layer: those whose shares lie furthest apart")
    inside(ax)
    assert "at most" not in visualize.integral_paths(groups, channels=12).get_xlabel()


@pytest.mark.parametrize("layers", [(16,) * 6 + (32,) * 6 + (64,) * 5, (16, 64, 192) * 15])
def test_many_layers_and_long_names_can_be_read(layers, inside, apart):
    paths = paths_of(random(6, sum(layers)) > 0.5, None, layers, 2)
    long = {f"ankle boot -> sneaker (attack {index})": paths[index : index + 1] for index in range(3)}
    ax = visualize.integral_paths(long)
    inside(ax)
    apart(ax.get_xticklabels())
    # whole, in two lines
    assert [text.replace("\n", " ") for text in texts(ax.get_yticklabels())] == list(long)
    named = texts(ax.get_xticklabels())
    assert len(named) == 17 if len(layers) == 17 else 20 < len(named) < 45
    ends = np.cumsum([0, *layers]) - 0.5
    for name, place in zip(named, ax.get_xticks(), strict=True):
        index = int(name.removeprefix("conv")) - 1
        assert place == (ends[index] + ends[index + 1]) / 2


def test_many_groups_with_long_names_can_be_read(groups, inside, apart):
    ax = visualize.integral_paths({f"{i} of many groups with a long name": groups["dog"] for i in range(12)}, 0)
    inside(ax)
    apart(ax.get_yticklabels())
    assert len(beside(ax)) == len(ax.get_yticks())


def test_groups_that_cannot_be_compared_are_refused(groups):
    other = paths_of(random(4, 24) > 0.5, None, (12, 12), 2)
    foreign = paths_of(random(4, 24) > 0.5, None, LAYERS, 2)
    object.__setattr__(foreign, "fingerprint", "g")
    for wrong, message in ((other, "of other layers"), (foreign, "another network .* same decoupler")):
        with pytest.raises(MergeError, match=message):
            visualize.integral_paths({**groups, "other": wrong})
    with pytest.raises(OptionError, match=r"group 'none' must be Paths of at least one image, got none of any image"):
        visualize.integral_paths({**groups, "none": other[:0]})
    with pytest.raises(OptionError, match="group 'bits' must be Paths of at least one image, got Tensor"):
        visualize.integral_paths({"bits": torch.zeros(2, 24)})
    with pytest.raises(OptionError, match=r"got Paths; pass \{name: paths\}"):
        visualize.integral_paths(other)
    with pytest.raises(OptionError, match="layer must be one of 'conv1', 'conv2', 'conv3', or its index, got 3"):
        visualize.integral_paths(groups, 3)
    for count in (0, 2.0, True):
        with pytest.raises(OptionError, match="channels must be an integer of at least 1; got"):
            visualize.integral_paths(groups, channels=count)
    assert plt.get_fignums() == []


# -- auc_matrix --------------------------------------------------------------------------------------------------------


def aucs(rows=3, columns=4):
    index, across = [f"row {index}" for index in range(rows)], [f"column {index}" for index in range(columns)]
    return pd.DataFrame(random(rows, columns, seed=2).double().numpy(), index, across)


def test_cells_are_the_numbers_and_half_is_neutral(inside):
    frame = aucs()
    frame.iloc[0, 0] = 0.5
    ax = visualize.auc_matrix(frame)
    np.testing.assert_array_equal(drawn(ax), frame)
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (column, row): f"{frame.iloc[row, column]:.2f}" for row in range(3) for column in range(4)
    }
    assert ax.images[0].get_clim() == (0, 1)
    low, half, high = ax.images[0].to_rgba(np.array([0.1, 0.5, 0.9]))
    assert np.ptp(half[:3]) < 0.01
    assert min(low[2] - low[0], high[0] - high[2]) > 0.3
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("trained on", "judged on")
    assert texts(ax.get_yticklabels()) == list(frame.index)
    assert texts(ax.get_xticklabels()) == list(frame.columns)
    assert "chance" in ax.get_figure().axes[1].get_ylabel()
    inside(ax)


def test_text_stands_out_from_its_cell():
    frame = pd.DataFrame(np.linspace(0, 1, 21).reshape(3, 7))
    ax = visualize.auc_matrix(frame, low=frame, high=frame)
    assert len(ax.texts) == 42
    for text in ax.texts:
        column, row = text.get_position()
        light = ax.images[0].to_rgba(frame.iloc[row, column])[:3] @ np.array([0.299, 0.587, 0.114])
        assert abs(light - (text.get_color() == "white")) > 0.4, (text.get_text(), light)


def test_cells_without_a_number_are_hatched_and_blank():
    frame = aucs()
    frame.iloc[0, 2] = frame.iloc[1, :] = np.nan
    ax = visualize.auc_matrix(frame)
    hatched = {(*patch.get_xy(), patch.get_width()) for patch in ax.patches if patch.get_hatch()}
    assert hatched == {(1.5, -0.5, 1), (-0.5, 0.5, 4)}
    assert len(ax.texts) == 12 - 5
    assert "hatched: not measured" in ax.get_xlabel()


def test_intervals_stand_below_their_numbers(inside):
    frame = aucs(8, 8)
    low, high = frame * 0.9, frame + 0.1 * (1 - frame)
    frame.iloc[1, 1] = low.iloc[2, 2] = np.nan
    ax = visualize.auc_matrix(frame, low=low, high=high)
    inside(ax)
    numbers, intervals = ax.texts[:63], ax.texts[63:]
    cells = [(row, column) for row in range(8) for column in range(8) if (row, column) not in ((1, 1), (2, 2))]
    expected = {(column, row): f"{low.iat[row, column]:.2f} to {high.iat[row, column]:.2f}" for row, column in cells}
    assert {text.get_position(): text.get_text() for text in intervals} == expected
    places = {text.get_position(): text for text in numbers}
    for text in intervals:
        above, box = places[text.get_position()], text.get_window_extent()
        assert above.get_color() == text.get_color()
        assert above.get_fontsize() > text.get_fontsize()
        assert box.y1 <= above.get_window_extent().y0 + 2
        assert box.width < 0.8 * ax.get_window_extent().width / 8


@pytest.mark.parametrize("shape", [(1, 1), (2, 12), (12, 2), (21, 3)])
def test_frames_of_any_shape_can_be_read(shape, inside, apart):
    frame = aucs(*shape).rename(columns=lambda name: f"{name}, a very long name")
    frame.index = [f"{name}, of an attack of a toolbox" for name in frame.index]
    ax = visualize.auc_matrix(frame)
    inside(ax)
    apart(ax.get_xticklabels())
    apart(ax.get_yticklabels())
    assert len(ax.texts) == (0 if shape == (21, 3) else np.prod(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: {"frame": frame.to_numpy()}, "frame must be a DataFrame, attacks down and across, got ndarray"),
        (lambda frame: {"frame": frame[:0]}, r"numbers, at least one, got shape \(0, 4\)"),
        (lambda frame: {"frame": frame.astype(object)}, r"numbers, at least one, got shape \(3, 4\) of 'object'"),
        (lambda frame: {"frame": frame * np.nan}, "only NaN, so there is nothing to draw"),
        (lambda frame: {"frame": 0 * frame + 97}, "AUC in .* got 97 to 97; shares, not percent"),
        (lambda frame: {"frame": frame, "low": frame}, "two ends of intervals, got only low"),
        (lambda frame: {"frame": frame - 1, "high": frame}, r"AUC in \[0, 1\], got -"),
        (lambda frame: {"frame": frame, "high": frame}, "two ends of intervals, got only high"),
        (
            lambda frame: {"frame": frame, "low": frame, "high": frame[::-1]},
            r"high must have the rows and columns of frame; pass high.reindex_like\(frame\)",
        ),
        (
            lambda frame: {"frame": 0 * frame + 0.5, "low": 0 * frame + 0.6, "high": 0 * frame + 0.7},
            r"between low and high, got 0.5 and \[0.6, 0.7\] in row 'row 0', column 'column 0'",
        ),
        (lambda frame: {"frame": frame, "low": 0 * frame, "high": frame * 0.9}, "frame must lie between low and high"),
    ],
)
def test_frames_that_say_something_else_are_refused(change, message):
    with pytest.raises(OptionError, match=message):
        visualize.auc_matrix(**change(aucs()))
    assert plt.get_fignums() == []


def test_pictures_are_drawn_on_the_axes_that_are_given(groups):
    for draw in (
        lambda ax: visualize.roc({"forest": [run_of(0)]}, ax=ax),
        lambda ax: visualize.integral_paths(groups, ax=ax),
        lambda ax: visualize.auc_matrix(aucs(), ax=ax),
    ):
        ax = plt.subplots(layout="constrained")[1]
        assert draw(ax) is ax
        with pytest.raises(OptionError, match="ax must be one matplotlib Axes or None, got ndarray"):
            draw(np.array([ax]))
