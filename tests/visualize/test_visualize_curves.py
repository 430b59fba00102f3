"""`accuracy_curve` and `k_grid`: lines, bands and cells are the frame's numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from captum_classfilters.core.errors import OptionError
from captum_classfilters.visualize import accuracy_curve, k_grid

KS = [1, 2, 4, 8, 16]


def frame(*names, ks=KS, classes=("all", "cat")):
    """A frame as metrics.accuracy_curve returns it; every number in it is another."""
    rows = []
    for class_name in classes:
        for name in names:
            for k in [64] if name == "dense" else ks:
                accuracy = 0.9 - 0.5 / k - 0.01 * len(rows) / 100
                rows.append((name, k, class_name, accuracy, accuracy - 0.02, accuracy + 0.03, 1.0, 0.8, 500))
    columns = ["filters", "k", "class_name", "accuracy", "low", "high", "relative", "agreement", "samples"]
    return pd.DataFrame(rows, columns=columns)


def of(curve, name, class_name="all"):
    return curve[(curve["filters"] == name) & (curve["class_name"] == class_name)]


def line(ax, label):
    return next(one for one in ax.lines if one.get_label() == label)


@pytest.mark.parametrize("class_name", ["all", "cat"])
def test_lines_and_bands_are_the_rows_of_the_class(class_name):
    curve = frame("dense", "histogram", "random", "margin").sample(frac=1, random_state=0)
    ax = accuracy_curve(curve, class_name=class_name)
    bands = {tuple(np.round(to_rgb(b.get_facecolor()[0][:3]), 3)): b for b in ax.collections}
    for name, label in [("histogram", "histogram"), ("margin", "margin"), ("random", "random (control)")]:
        rows, one = of(curve, name, class_name).sort_values("k"), line(ax, label)
        np.testing.assert_array_equal(one.get_xdata(), rows["k"])
        np.testing.assert_array_equal(one.get_ydata(), rows["accuracy"])
        corners = bands[tuple(np.round(to_rgb(one.get_color()), 3))].get_paths()[0].vertices
        for k, low, high in zip(rows["k"], rows["low"], rows["high"], strict=True):
            found = corners[corners[:, 0] == k, 1]
            assert found.min() == pytest.approx(low)
            assert found.max() == pytest.approx(high)
    dense = of(curve, "dense", class_name).iloc[0]
    assert set(line(ax, "dense (all channels)").get_ydata()) == {dense["accuracy"]}
    span = ax.patches[0]
    assert (span.get_y(), span.get_y() + span.get_height()) == pytest.approx((dense["low"], dense["high"]))
    assert ax.get_title() == ("all classes, 500 samples" if class_name == "all" else "class cat, 500 samples")


def test_random_is_grey_and_dashed_and_last():
    ax = accuracy_curve(frame("random", "histogram", "dense"))
    control = line(ax, "random (control)")
    assert (control.get_linestyle(), control.get_color()) == ("--", "0.5")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["dense (all channels)", "histogram", "random (control)"]


def test_nine_selectors_differ_in_colour_and_in_marker_and_more_in_dashes():
    names = [f"selector {i}" for i in range(12)]
    lines = accuracy_curve(frame(*names)).lines
    assert len({one.get_color() for one in lines[:9]}) == 9
    assert len({one.get_marker() for one in lines[:9]}) == 9
    assert len({(one.get_color(), one.get_linestyle()) for one in lines}) == 12


@pytest.mark.parametrize("names", [["a"], [f"a selector with a long name {i}" for i in range(9)]])
def test_the_legend_stands_beside_the_data_and_nothing_is_cut_off(inside, names):
    ax = accuracy_curve(frame("dense", *names, "random"))
    inside(ax)
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


@pytest.mark.parametrize("ks", [KS, list(range(1, 65)), [1, 3, 50, 51, 2048], [7]])
def test_ticks_stand_at_the_ks_and_their_numbers_stay_apart(apart, inside, ks):
    ax = accuracy_curve(frame("histogram", ks=ks))
    inside(ax)
    assert list(ax.get_xticks()) == ks
    labels = [label for label in ax.get_xticklabels() if label.get_text()]
    apart(labels)
    assert labels[-1].get_text() == str(ks[-1])
    assert all(label.get_text() == str(k) for k, label in zip(ks, ax.get_xticklabels(), strict=True) if label in labels)
    assert len(ax.get_xticks(minor=True)) == 0
    assert ax.get_xscale() == "log"


def test_a_frame_of_the_full_head_alone_is_drawn(inside):
    ax = accuracy_curve(frame("dense"))
    inside(ax)
    assert len(ax.lines) == 1


def grid_frame(k1s=("16", "2", "1", "dense", "random"), ks=(1, 2, 4)):
    return frame(*k1s, ks=ks)


def test_the_grid_is_sorted_by_number_and_leaves_dense_and_random_out():
    curve = grid_frame()
    ax = k_grid(curve)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2", "16"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4"]
    expected = np.array([of(curve, k1)["accuracy"] for k1 in ("1", "2", "16")])
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert [text.get_text() for text in ax.texts] == [f"{v:.3f}" for v in expected.flatten()]
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}
    assert cells[2, 0] == f"{expected[2, 0]:.3f}"


def framed(ax):
    (box,) = ax.patches
    return box.get_y() + 0.5, box.get_x() + 0.5


def test_the_best_cell_is_framed_and_of_equals_the_one_with_fewest_channels():
    curve = grid_frame()
    curve["accuracy"] = 0.5
    assert framed(k_grid(curve)) == (0, 0)
    at = (curve["filters"] == "16") & (curve["k"] == 2) & (curve["class_name"] == "all")
    curve.loc[at, "accuracy"] = 0.75
    ax = k_grid(curve)
    assert framed(ax) == (2, 1)
    assert ax.get_title() == "best accuracy 0.750 at k1 = 16, k2 = 2"
    also = (curve["filters"] == "1") & (curve["k"] == 4) & (curve["class_name"] == "all")
    curve.loc[also, "accuracy"] = 0.75
    assert framed(k_grid(curve)) == (2, 1)
    # better, but of other rows
    curve.loc[curve["filters"].isin(["dense", "random"]) | (curve["class_name"] == "cat"), "accuracy"] = 0.99
    assert framed(k_grid(curve)) == (2, 1)


def test_what_was_not_measured_is_grey_and_has_no_number():
    curve = grid_frame()
    ax = k_grid(curve[(curve["filters"] != "2") | (curve["k"] != 4)])
    assert len(ax.texts) == 8
    assert np.ma.getmaskarray(ax.images[0].get_array()).tolist() == [[False] * 3, [False, False, True], [False] * 3]


def test_another_value_and_class_are_drawn(inside):
    curve = grid_frame(k1s=("0.5", "0.9"))
    curve["agreement"] = np.linspace(0.1, 0.7, len(curve))
    ax = k_grid(curve, value="agreement", class_name="cat")
    np.testing.assert_allclose(ax.images[0].get_array()[1], of(curve, "0.9", "cat")["agreement"])
    assert ax.get_figure().axes[-1].get_ylabel() == "agreement of class cat"
    inside(ax)


@pytest.mark.parametrize("size", [1, 8, 30])
def test_grids_fit_on_their_page(inside, apart, size):
    ax = k_grid(frame(*map(str, range(1, size + 1)), ks=list(range(100, 100 + size))))
    inside(ax)
    apart(ax.get_xticklabels())
    apart(ax.get_yticklabels())
    assert len(ax.texts) == (size * size if size <= 20 else 0)


@pytest.mark.parametrize("draw", [accuracy_curve, k_grid])
def test_a_given_ax_is_used_and_no_figure_made(draw):
    figure, axes = plt.subplots(2)
    assert draw(frame("1", "2"), ax=axes[0]) is axes[0]
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(OptionError, match="one matplotlib Axes or None, got ndarray"):
        draw(frame("1", "2"), ax=axes)


@pytest.mark.parametrize("draw", [accuracy_curve, k_grid])
def test_the_frame_is_not_changed(draw):
    curve = frame("1", "2", "random", "dense")
    before = curve.copy()
    draw(curve)
    pd.testing.assert_frame_equal(curve, before)


@pytest.mark.parametrize("draw", [accuracy_curve, k_grid])
@pytest.mark.parametrize(
    ("change", "class_name", "message"),
    [
        (lambda c: c.to_dict(), "all", "must be the DataFrame that metrics.accuracy_curve returns, got dict"),
        (lambda c: c.drop(columns="accuracy"), "all", r"lacks the columns \['accuracy'\], got 'filters', 'k'"),
        (lambda c: c.drop(columns=["k", "filters"]), "all", r"lacks the columns \['filters', 'k'\]"),
        (lambda c: c, "dog", "no rows of class 'dog'; its classes are: 'all', 'cat'"),
        (lambda c: c.iloc[:0], "all", "curve has no rows; pass the frame that metrics.accuracy_curve returns"),
        (lambda c: c.assign(accuracy=np.nan), "cat", "class 'cat' has no accuracy: it had no samples"),
        (
            lambda c: pd.concat([c, c.assign(accuracy=0.123)]),
            "all",
            "several rows of filters '1', k '1'; draw one run at a time",
        ),
    ],
)
def test_frames_that_are_not_right_are_refused(draw, change, class_name, message):
    with pytest.raises(OptionError, match=message):
        draw(change(frame("1", "2")), class_name=class_name)
    assert plt.get_fignums() == []


def test_accuracy_curve_refuses_k_below_one():
    with pytest.raises(OptionError, match="k must be at least 1, got 0"):
        accuracy_curve(frame("histogram").replace({"k": {1: 0}}))


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (["histogram"], "accuracy", "must be named after their k1, such as \"5\"; got 'histogram'"),
        (["dense", "random"], "accuracy", "only rows of the full head and of the control; measure some tables"),
        (["1"], "precision", r"lacks the columns \['precision'\]"),
        (["1"], "filters", "value must name a column of numbers, got 'filters'"),
    ],
)
def test_k_grid_refuses(names, value, message):
    with pytest.raises(OptionError, match=message):
        k_grid(frame(*names, classes=("all",)), value=value)
    assert plt.get_fignums() == []


def test_k_grid_refuses_a_class_of_which_only_the_full_head_is_known():
    curve = frame("1", "dense")
    curve.loc[curve["filters"] == "1", "accuracy"] = np.nan
    with pytest.raises(OptionError, match="has no accuracy"):
        k_grid(curve)
