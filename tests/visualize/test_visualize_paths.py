"""Pictures of many paths: what is drawn is what the paths, states and shares say."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex, to_rgba
from path_bits import drawn, legend, paths_of, random, texts

from captum_classfilters import visualize
from captum_classfilters.core.errors import LabelError, OptionError, ShapeError
from captum_classfilters.visualize.calculation_paths import POINTS, STATES


@pytest.fixture
def paths():
    """60 images of 4 classes, the last without any; layers of 5 and 12 channels, of which 0 is open and 1 closed."""
    bits = random(60, 17) > 0.5
    bits[:, [0, 5]], bits[:, [1, 6]] = True, False
    return paths_of(bits, torch.arange(60) % 3, (5, 12), 4)


# -- path_embedding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 10, 12, 30])
def test_each_point_has_the_colour_and_the_shape_of_its_class(classes):
    points, labels = random(90, 2), torch.arange(90) % classes
    (cloud,) = visualize.path_embedding(points, labels).collections
    found = {tuple(np.round(place, 6)): index for index, place in enumerate(np.asarray(cloud.get_offsets()))}
    assert len(found) == 90
    outlines = {}
    for point, label in zip(points.tolist(), labels.tolist(), strict=True):
        index = found[tuple(np.round(point, 6))]
        assert to_hex(cloud.get_facecolors()[index]) == POINTS[label % len(POINTS)]
        outlines.setdefault(label, set()).add(cloud.get_paths()[index].vertices.tobytes())
    # a class is one shape, and no two classes share both colour and shape
    assert all(len(shapes) == 1 for shapes in outlines.values())
    assert len({(label % len(POINTS), *shapes) for label, shapes in outlines.items()}) == classes


def test_the_legend_lists_the_classes_that_are_there_in_their_colours(inside):
    ax = visualize.path_embedding(random(20, 2), torch.arange(20) % 2 * 2, ["cat", "dog", "cow"])
    assert legend(ax) == ["cat", "cow"]
    assert [handle.get_color() for handle in ax.get_legend().legend_handles] == [POINTS[0], POINTS[2]]
    assert ax.get_aspect() == 1.0
    inside(ax)


def test_no_class_lies_on_top_of_another():
    (cloud,) = visualize.path_embedding(torch.zeros(200, 2), torch.arange(200) // 100).collections
    colours = [to_hex(colour) for colour in cloud.get_facecolors()]
    assert {POINTS[0], POINTS[1]} == set(colours[:20]) == set(colours[-20:])


def test_the_title_says_the_callers_silhouette():
    points, labels = [[0.0, 1.0], [2.0, 3.0]], [0, 1]
    assert visualize.path_embedding(points, labels).get_title() == "2 paths"
    ax = visualize.path_embedding(np.array(points), np.array(labels), silhouette=-0.125, method="UMAP")
    assert ax.get_title() == "2 paths, silhouette -0.12"
    assert ax.get_xlabel() == "UMAP, first axis (no unit)"


def test_many_classes_are_named_at_their_medians_without_overlap(inside):
    middles = 40 * random(100, 2)
    labels = torch.arange(1000) % 100
    points = middles[labels] + 0.1 * random(1000, 2, seed=1)
    names = [f"number {index}" for index in range(100)]
    ax = visualize.path_embedding(points, labels, names)
    assert ax.get_legend() is None
    inside(ax)
    assert 20 <= len(ax.texts) < 100
    assert ax.get_title() == f"1000 paths; {len(ax.texts)} of 100 classes named"
    for text in ax.texts:
        own = points[labels == names.index(text.get_text())].numpy()
        np.testing.assert_allclose(text.get_position(), np.median(own, axis=0), rtol=1e-5)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])


@pytest.mark.parametrize(
    ("points", "labels", "options", "error", "message"),
    [
        (torch.zeros(3, 3), [0, 0, 0], {}, ShapeError, r"points must be finite, of shape \(N, 2\), got \(3, 3\)"),
        (torch.full((1, 2), torch.nan), [0], {}, ShapeError, "points must be finite"),
        (torch.zeros(0, 2), [], {}, ShapeError, r"must have shape \(N, 2\), got \(0, 2\)"),
        ("points", [0], {}, ShapeError, "must be numbers of shape .* got str"),
        (torch.zeros(2, 2), [0], {}, LabelError, r"labels must be \(2,\) indices, .* pass the labels of the same"),
        (torch.zeros(2, 2), [0.0, 1.0], {}, LabelError, "got torch.float32"),
        (torch.zeros(2, 2), None, {}, LabelError, "got NoneType; pass Paths.labels"),
        (torch.zeros(2, 2), [0, 2], {"class_names": ["a", "b"]}, LabelError, r"in \[0, 2\), got 0 to 2"),
        (torch.zeros(2, 2), [0, -1], {}, LabelError, "got -1 to 0"),
        (torch.zeros(2, 2), [0, 1], {"silhouette": 1.5}, OptionError, r"in \[-1, 1\], got 1.5"),
    ],
)
def test_points_and_labels_that_do_not_fit_are_refused(points, labels, options, error, message):
    with pytest.raises(error, match=message):
        visualize.path_embedding(points, labels, **options)
    assert plt.get_fignums() == []


# -- filter_states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [True, False])
def test_bars_are_the_counts_of_states_one_upon_the_other(paths, shares):
    states = paths.states()
    ax = visualize.filter_states(states, shares=shares)
    whole = states["channels"].to_numpy() if shares else 1
    below = np.zeros(2)
    for bars, (state, colour) in zip(ax.containers, STATES.items(), strict=True):
        np.testing.assert_allclose([bar.get_height() for bar in bars], states[state] / whole)
        np.testing.assert_allclose([bar.get_y() for bar in bars], below)
        assert all(bar.get_facecolor() == to_rgba(colour) for bar in bars)
        below += [bar.get_height() for bar in bars]
    np.testing.assert_allclose(below, 1 if shares else states["channels"])
    assert ax.get_ylim() == pytest.approx((0, 1 if shares else 1.04 * 12))
    assert texts(ax.get_xticklabels()) == ["conv1", "conv2"]
    assert [text.split()[0] for text in legend(ax)] == ["energetic", "dynamic", "silent"]
    assert ax.get_ylabel() == ("share of the layer's filters" if shares else "filters")


@pytest.mark.parametrize("layers", [1, 20, 60])
def test_names_of_all_layers_can_be_read(layers, inside, apart):
    names = [f"inception{index // 6}.branch{index % 6}.conv" for index in range(layers)]
    ax = visualize.filter_states(pd.DataFrame(dict.fromkeys(STATES, 5), index=names))
    inside(ax)
    assert texts(ax.get_xticklabels()) == names
    if layers > 1:
        apart(ax.get_xticklabels())


def test_what_are_no_states_is_refused(paths):
    states = paths.states()
    with pytest.raises(OptionError, match=r"states must be the DataFrame that Paths\.states returns, got Paths"):
        visualize.filter_states(paths)
    with pytest.raises(OptionError, match=r"lacks the columns \['silent'\].*Paths.states"):
        visualize.filter_states(states.drop(columns="silent"))
    with pytest.raises(OptionError, match="states has no rows"):
        visualize.filter_states(states[:0])
    with pytest.raises(OptionError, match="no layer may be without filters"):
        visualize.filter_states(states * 0)


# -- path_profiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["class", "state", None])
def test_the_heat_map_is_the_profiles(paths, order, inside):
    ax = visualize.path_profiles(paths, "conv2", list("abcd"), order=order)
    expected = paths.profiles()[0][:, 5:].numpy()
    channels = [int(text) for text in texts(ax.get_xticklabels())]
    assert sorted(channels) == list(range(12))
    np.testing.assert_allclose(drawn(ax), expected[:, channels])
    assert np.isnan(drawn(ax)[3]).all()
    assert [patch.get_xy() for patch in ax.patches] == [(-0.5, 2.5)]
    assert ax.images[0].get_clim() == (0, 1)
    assert ax.images[0].get_interpolation() == "nearest"
    assert texts(ax.get_yticklabels()) == list("abcd")
    assert ax.get_xlabel().startswith("channel of conv2")
    assert "hatched" in ax.get_xlabel()
    assert ax.get_figure().axes[1].get_ylabel() == "share of images that open it"
    inside(ax)


def test_channels_are_grouped_by_class_then_alike_then_silent():
    shares = [[0.0, 1.0, 0.2, 0.6, 0.0, 0.5], [0.0, 1.0, 0.9, 0.1, 0.3, 0.5]]
    ax = visualize.path_profiles(torch.tensor(shares), "c")
    assert texts(ax.get_xticklabels()) == ["3", "2", "4", "1", "5", "0"]
    assert [line.get_xdata()[0] for line in ax.lines] == [0.5, 2.5, 4.5]


def test_channels_are_grouped_by_state():
    shares = [[0.0, 1.0, 0.2, 1.0], [0.0, 1.0, 0.9, 0.5], [torch.nan] * 4]
    ax = visualize.path_profiles(torch.tensor(shares), order="state")
    assert texts(ax.get_xticklabels()) == ["1", "3", "2", "0"]
    assert [line.get_xdata()[0] for line in ax.lines] == [0.5, 2.5]


def test_a_layer_may_be_named_or_counted(paths):
    one, other, last = (visualize.path_profiles(paths, layer) for layer in ("conv2", 1, -1))
    np.testing.assert_array_equal(drawn(one), drawn(other))
    np.testing.assert_array_equal(drawn(one), drawn(last))
    assert one.get_xlabel() == last.get_xlabel()


def test_profiles_that_cannot_be_drawn_are_refused(paths):
    nobody = paths_of(torch.zeros(3, 2), [0, 0, 1], (2,), 2)
    for layer in (None, "conv3", 2, True):
        with pytest.raises(OptionError, match="layer must be one of 'conv1', 'conv2', or its index, got"):
            visualize.path_profiles(paths, layer)
    with pytest.raises(LabelError, match="profiles need labels"):
        visualize.path_profiles(paths_of(torch.zeros(3, 2), None, (2,), 2), 0)
    with pytest.raises(ShapeError, match=r"in \[0, 1\], got -3 to 2; of gate logits pass logits > 0"):
        visualize.path_profiles(torch.tensor([[-3.0, 2.0]]))
    with pytest.raises(ShapeError, match=r"must have shape \(C, K_l\), of one layer, got \(3,\)"):
        visualize.path_profiles(torch.zeros(3))
    with pytest.raises(OptionError, match="no class has images"):
        visualize.path_profiles(torch.full((2, 3), torch.nan))
    with pytest.raises(OptionError, match=r"order must be one of \['class', 'state', None\], got 'row'"):
        visualize.path_profiles(nobody, 0, order="row")
    with pytest.raises(OptionError, match="class_names must be 2 names, one for each class, got 1"):
        visualize.path_profiles(nobody, 0, ["a"])
    assert plt.get_fignums() == []


# -- macs_accuracy -----------------------------------------------------------------------------------------------------


def costs(networks=("r20", "vgg")):
    rows = []
    for index, network in enumerate(networks):
        top = 0.9 + 0.02 * index
        rows.append((network, "dense", 1.0, top, top - 0.01, top + 0.01))
        rows += [(network, "paths", m, top - 0.1 * m, top - 0.1 * m - 0.02, top - 0.1 * m + 0.01) for m in (0.6, 0.3)]
        rows.append((network, "pruned", 0.5, 0.8, np.nan, np.nan))
    return pd.DataFrame(rows, columns=["network", "method", "macs", "accuracy", "low", "high"])


def test_points_and_error_bars_are_the_rows(inside):
    frame = costs()
    ax = visualize.macs_accuracy(frame)
    assert len(ax.containers) == 6
    groups = frame.groupby(["network", "method"], sort=False)
    for drawn_group, (_, rows) in zip(ax.containers, groups, strict=True):
        line, _, (bars,) = drawn_group
        rows = rows.sort_values("macs")
        np.testing.assert_allclose(line.get_xydata(), rows[["macs", "accuracy"]])
        for segment, row in zip(bars.get_segments(), rows.itertuples(), strict=True):
            ends = [row.accuracy] * 2 if np.isnan(row.low) else [row.low, row.high]
            np.testing.assert_allclose(segment, [[row.macs, ends[0]], [row.macs, ends[1]]])
    assert ax.get_xlabel() == "MACs, share of the dense network's"
    assert ax.get_xlim() == pytest.approx((0, 1.05))
    inside(ax)


def test_methods_are_colours_and_networks_shapes():
    ax = visualize.macs_accuracy(costs())
    lines = [container[0] for container in ax.containers]
    assert [line.get_color() for line in lines[:3]] == [line.get_color() for line in lines[3:]]
    assert len({line.get_color() for line in lines}) == 3
    assert lines[0].get_color() == "black"
    assert len({line.get_marker() for line in lines[:3]}) == len({line.get_marker() for line in lines[3:]}) == 1
    assert lines[0].get_marker() != lines[3].get_marker()
    assert legend(ax) == ["paths", "pruned", "dense", "r20", "vgg"]
    assert legend(visualize.macs_accuracy(costs(["r20"]))) == ["paths", "pruned", "dense"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.to_dict(), "must be the DataFrame that your measurement returns, got dict"),
        (lambda frame: frame.drop(columns=["low", "macs"]), r"lacks the columns \['macs', 'low'\], got 'network'"),
        (lambda frame: frame[:0], "no rows"),
        (lambda frame: frame.assign(macs=4e7), r"shares of the dense network's, .* got 4e\+07 .* divide them"),
        (
            lambda frame: frame.assign(accuracy=91.0),
            "accuracy must lie in .* got 91, .* of r20, dense; shares, not per",
        ),
        (lambda frame: frame.assign(high=0.1), "between low and high"),
        (lambda frame: pd.concat([frame, frame]), "several rows of network 'r20', method 'dense', macs '1.0'"),
    ],
)
def test_frames_that_say_something_else_are_refused(change, message):
    with pytest.raises(OptionError, match=message):
        visualize.macs_accuracy(change(costs()))
    assert plt.get_fignums() == []


def test_pictures_are_drawn_on_the_axes_that_are_given(paths):
    for draw in (
        lambda ax: visualize.path_embedding(torch.zeros(2, 2), [0, 1], ax=ax),
        lambda ax: visualize.filter_states(paths.states(), ax=ax),
        lambda ax: visualize.path_profiles(paths, 0, ax=ax),
        lambda ax: visualize.gate_strip(paths, ax=ax),
        lambda ax: visualize.macs_accuracy(costs(), ax=ax),
    ):
        ax = plt.subplots(layout="constrained")[1]
        assert draw(ax) is ax
        with pytest.raises(OptionError, match="ax must be one matplotlib Axes or None, got ndarray"):
            draw(np.array([ax]))
