"""Pictures of correlations and of clusters: what is drawn is what the frame says."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from gate_frames import (
    GATE,
    NAMES,
    ORDER,
    clusters,
    drawn,
    matrix,
    of,
    shares,
    texts,
    title,
)
from matplotlib.colors import to_rgb

from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.visualize import cluster_centres, correlated_share, correlation

# -- correlation -------------------------------------------------------------------------------------------------------


def test_correlation_is_the_matrix_from_minus_one_to_one():
    frame = matrix(6)
    ax = correlation(frame)
    np.testing.assert_allclose(drawn(ax), frame)
    image = ax.images[0]
    assert image.get_clim() == (-1.0, 1.0)
    np.testing.assert_allclose(image.cmap(0.5)[:3], 0.97, atol=0.02)
    assert texts(ax.get_xticklabels()) == texts(ax.get_yticklabels()) == list("012345")
    off = np.abs(frame.to_numpy()[np.triu_indices(6, 1)]).mean()
    assert title(ax) == f"correlation of weights of conv2, mean size off the diagonal {off:.3f}"
    assert not ax.lines


def test_correlation_in_the_order_of_a_gate_has_its_blocks_and_their_names():
    frame = matrix(6)
    ax = correlation(frame, order=of(GATE))
    np.testing.assert_allclose(drawn(ax), frame.to_numpy()[np.ix_(ORDER, ORDER)])
    assert texts(ax.get_xticklabels()) == [str(channel) for channel in ORDER]
    named = dict(zip(texts(ax.get_yticklabels()), ax.get_yticks(), strict=True))
    assert named == {"cat": 0, "dog": 1, "cow": 2.5, "shared": 4, "no class": 5}
    assert sorted(line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1) == [0.5, 1.5, 3.5, 4.5]
    assert sorted(line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1) == [0.5, 1.5, 3.5, 4.5]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.eye(3), "K x K DataFrame that metrics.filter_correlation returns, got ndarray"),
        (pd.DataFrame(np.eye(3)[:2]), r"got shape \(2, 3\)"),
        (pd.DataFrame([[1.0]]), r"K at least 2; got shape \(1, 1\)"),
        (pd.DataFrame([["a", 1], [1, 1]]), r"got shape \(2, 2\), not all of them numbers"),
    ],
)
def test_what_is_no_correlation_is_refused(frame, message):
    with pytest.raises(OptionError, match=message):
        correlation(frame)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "draw", [lambda **kw: correlation(matrix(5), **kw), lambda **kw: cluster_centres(clusters(channels=5), **kw)]
)
def test_an_order_of_another_network_is_refused(draw):
    with pytest.raises(ShapeError, match="order has 6 channels, the frame 5"):
        draw(order=of(GATE))
    with pytest.raises(OptionError, match="order must be a LabelSensitiveGate or a ClassFilters, got str"):
        draw(order="class")
    assert plt.get_fignums() == []


# -- correlated_share --------------------------------------------------------------------------------------------------


def bands(ax):
    """Corners of the bands, by colour."""
    return {tuple(np.round(b.get_facecolor()[0][:3], 3)): b.get_paths()[0].vertices for b in ax.collections}


def test_lines_bands_and_the_control_are_the_rows():
    frame = shares("weights", "activations")
    ax = correlated_share(frame.sample(frac=1, random_state=0).sort_values("correlation", ascending=False))
    assert texts(ax.get_legend().get_texts()) == ["weights", "activations", "random (control)"]
    for line, name, control in zip(ax.lines, ["weights", "activations", "weights"], [False, False, True], strict=True):
        rows = frame[(frame["correlation"] == name) & (frame["control"] == control)]
        np.testing.assert_array_equal(line.get_xdata(), rows["threshold"])
        np.testing.assert_array_equal(line.get_ydata(), rows["share"])
        corners = bands(ax)[tuple(np.round(to_rgb(line.get_color()), 3))]
        for t, low, high in zip(rows["threshold"], rows["low"], rows["high"], strict=True):
            found = corners[corners[:, 0] == t, 1]
            assert (found.min(), found.max()) == (low, high)
    assert [line.get_linestyle() for line in ax.lines] == ["-", "-", "--"]
    assert ax.get_ylim()[0] == 0


def test_controls_that_differ_are_drawn_apart_and_named():
    frame = shares("a", "b", "c", controls=[0, 1, 0])
    ax = correlated_share(frame)
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [line.get_label() for line in dashed] == ["random (control) of a, c", "random (control) of b"]
    assert len({line.get_color() for line in dashed}) == 2
    np.testing.assert_array_equal(dashed[1].get_ydata(), frame.query("correlation == 'b' and control")["share"])


def test_repeated_thresholds_are_refused():
    with pytest.raises(OptionError, match=r"several rows of correlation 'a', threshold '0\.0'"):
        correlated_share(shares("a", "a"))


# -- cluster_centres ---------------------------------------------------------------------------------------------------


def centres(frame, names):
    return frame[~frame["control"]].set_index("class_name").loc[names].filter(like="channel").to_numpy()


def test_centres_stand_in_the_rows_of_their_classes():
    frame = clusters()
    ax = cluster_centres(frame, order=of(GATE))
    np.testing.assert_allclose(drawn(ax), centres(frame, list(NAMES))[:, ORDER])
    assert texts(ax.get_yticklabels()) == list(NAMES)
    assert texts(ax.get_xticklabels()) == [str(channel) for channel in ORDER]
    assert ax.images[0].get_clim() == (0.0, drawn(ax).max())
    assert title(ax) == "cosine with the gate 0.91, shuffled 0.42; AMI with the classes 0.70"
    alone = cluster_centres(frame)
    np.testing.assert_allclose(drawn(alone), centres(frame, sorted(NAMES)))
    assert texts(alone.get_yticklabels()) == sorted(NAMES)
    assert not alone.lines
    assert "shuffled" not in cluster_centres(frame[~frame["control"]]).get_title()


def test_numbered_classes_are_in_the_order_of_numbers():
    names = [str(i) for i in range(12)]
    assert texts(cluster_centres(clusters(names)).get_yticklabels()) == names


def test_features_below_zero_centre_the_colours():
    frame = clusters()
    frame.loc[2, "channel 3"] = -9.0
    assert cluster_centres(frame).images[0].get_clim() == (-9.0, 9.0)


def test_cluster_centres_refuses_what_does_not_fit():
    frame = clusters()
    with pytest.raises(OptionError, match=r"order must have the classes of the frame.*pass gate\.class_filters"):
        cluster_centres(frame, order=of(GATE, names=("0", "1", "2")))
    with pytest.raises(OptionError, match="several rows of class_name 'all'"):
        cluster_centres(pd.concat([frame, frame]))
    with pytest.raises(OptionError, match='must hold the row "all"'):
        cluster_centres(frame.iloc[1:])
    assert plt.get_fignums() == []
