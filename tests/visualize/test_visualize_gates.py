"""Pictures of gates: what is drawn is what the gate or the frame says."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from captum_classfilters import metrics
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.gating import LabelSensitiveGate
from captum_classfilters.visualize import cluster_centres, confusion, correlated_share, correlation, gate, similarity

NAMES = ("cat", "dog", "cow")
# owners by column: dog, cat, none, cow (used by others too), cat and dog level, cow
GATE = [[0.2, 1, 0, 0.5, 1, 0], [1, 0, 0, 0.6, 1, 0], [0, 0, 0, 1, 0.3, 1]]
ORDER = [1, 0, 5, 3, 4, 2]


def of(weight, names=NAMES, counts=None):
    """A gate's table."""
    module = LabelSensitiveGate(*np.shape(weight))
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight))
        if counts is not None:
            module.counts.copy_(torch.tensor(counts))
    return module.class_filters(names)


def drawn(ax):
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def texts(labels):
    return [label.get_text() for label in labels]


def hatched(ax):
    return sorted(int(patch.get_y() + 0.5) for patch in ax.patches if patch.get_hatch())


def bar(ax):
    return ax.get_figure().axes[-1].get_ylabel()


def title(ax):
    """A title may be broken into lines."""
    return ax.get_title().replace("\n", " ")


def confusions(names=NAMES, seed=0):
    """A frame as metrics.masked_confusion returns it."""
    generator, size = np.random.default_rng(seed), len(names)
    parts = []
    for masked, control, channels in (("none", 0, 0), (names[1], 0, 4), (names[1], 1, 4), ("cat + cow", 0, 7)):
        shares = generator.dirichlet(np.ones(size), size)
        part = {"class_name": np.repeat(names, size), "predicted": np.tile(names, size), "share": shares.ravel()}
        parts.append(pd.DataFrame(part).assign(masked=masked, control=bool(control), channels=channels))
    return pd.concat(parts, ignore_index=True)


def similarities(names=NAMES, seed=0):
    """A frame as metrics.gate_similarity returns it; of the last class there is no FN."""
    size = len(names)
    part = {"class_name": np.tile(np.repeat(names, size), 2), "gate_row": np.tile(names, 2 * size)}
    values = np.random.default_rng(seed).random(2 * size**2) * 30
    frame = pd.DataFrame(part).assign(outcome=np.repeat(["TP", "FN"], size**2), similarity=values, samples=0)
    frame["samples"] = np.where(frame["outcome"] == "TP", 40, 3)
    frame.loc[(frame["outcome"] == "FN") & (frame["class_name"] == names[-1]), ["similarity", "samples"]] = [np.nan, 0]
    return frame


def clusters(names=NAMES, channels=6, seed=0):
    """A frame as metrics.feature_clusters returns it: clusters in any order."""
    generator = np.random.default_rng(seed)
    order = ["all", *generator.permutation(np.array(names))]
    values = generator.random((len(order), channels)) * 4
    frame = pd.DataFrame(values, columns=[f"channel {i}" for i in range(channels)])
    return frame.assign(
        class_name=order, cosine=[0.91, *[0.5] * len(names)], random=[0.42, *[0.3] * len(names)], ami=0.7
    )


def shares(*names, controls=None, thresholds=(0.0, 0.25, 0.5)):
    """A frame as metrics.correlated_share returns it; every number in it is another."""
    rows = []
    for i, name in enumerate(names):
        for t in thresholds:
            share, chance = 0.6 - t - 0.01 * i, 0.5 - t / 2 - 0.1 * (controls or [0] * len(names))[i]
            rows.append((name, t, share, share - 0.02, share + 0.03, chance, chance - 0.01, chance + 0.015))
    columns = ["correlation", "threshold", "share", "low", "high", "random", "random_low", "random_high"]
    return pd.DataFrame(rows, columns=columns)


def matrix(size, seed=0):
    """A frame as metrics.filter_correlation returns it."""
    frame = pd.DataFrame(np.corrcoef(np.random.default_rng(seed).normal(size=(size, 9))))
    frame.attrs.update(kind="weights", layer="conv2", dimension=9)
    return frame


# -- gate --------------------------------------------------------------------------------------------------------------


def test_channels_stand_in_blocks_own_ones_first_then_shared_then_nobodys():
    ax = gate(of(GATE))
    np.testing.assert_allclose(drawn(ax), np.array(GATE)[:, ORDER], rtol=1e-6)
    assert texts(ax.get_xticklabels()) == [str(channel) for channel in ORDER]
    assert texts(ax.get_yticklabels()) == list(NAMES)
    assert [line.get_xdata()[0] for line in ax.lines] == [0.5, 1.5, 3.5, 4.5]
    assert ax.images[0].get_clim() == (0.0, 1.0)
    assert bar(ax) == "gate"


def test_without_order_channels_are_as_they_are():
    ax = gate(of(GATE), order=None)
    np.testing.assert_allclose(drawn(ax), GATE, rtol=1e-6)
    assert texts(ax.get_xticklabels()) == list("012345")
    assert not ax.lines
    assert "grouped" not in ax.get_xlabel()


def test_a_gate_is_drawn_as_its_table():
    module = LabelSensitiveGate(4, 9, generator=torch.Generator().manual_seed(0))
    module.layer = "fc"
    one, other = gate(module), gate(module.class_filters())
    np.testing.assert_array_equal(drawn(one), drawn(other))
    assert texts(one.get_yticklabels()) == list("0123")
    assert one.get_xlabel() == "channel of fc, grouped by the class it works for most"


def test_the_title_is_the_metrics_density(table):
    for filters in (of(GATE), table([[4, 0, 2], [8, 1, 0]])):
        density = metrics.density(filters).set_index(["filters", "class_name"])["density"].xs("all", level=1).iloc[0]
        assert gate(filters).get_title() == f"density {density:.3f}"


def test_any_table_is_read_as_a_gate(table):
    ax = gate(table([[4, 0, -2], [8, 1, 0]]), order=None)
    np.testing.assert_allclose(drawn(ax), [[0.5, 0, 0], [1, 1, 0]])
    assert bar(ax) == "histogram, read as a gate"


def test_classes_without_samples_are_hatched_and_own_no_channel():
    ax = gate(of(GATE, counts=[5, 0, 5]))
    assert hatched(ax) == [1]
    assert np.isnan(drawn(ax)[1]).all()
    assert texts(ax.get_xticklabels()) == ["0", "1", "4", "5", "3", "2"]  # 0 and 4 are the cat's now
    assert "hatched: no samples" in ax.get_xlabel()
    assert hatched(gate(of(GATE))) == []  # an untrained gate


def test_an_unknown_order_and_what_is_no_gate_are_refused():
    with pytest.raises(OptionError, match="order must be \"class\" or None, got 'row'"):
        gate(of(GATE), order="row")
    with pytest.raises(OptionError, match="gate_or_filters must be a LabelSensitiveGate or a ClassFilters, got dict"):
        gate({"a": of(GATE)})
    assert plt.get_fignums() == []


# -- confusion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masked", "control", "name"),
    [
        ("none", False, "all channels"),
        ("dog", False, "channels of dog at 0 (4)"),
        ("dog", True, "4 random channels at 0, for dog"),
        ("cat + cow", False, "channels of cat + cow at 0 (7)"),
    ],
)
def test_confusion_is_the_case_of_the_frame(masked, control, name):
    frame = confusions()
    ax = confusion(frame, masked, control=control)
    rows = frame[(frame["masked"] == masked) & (frame["control"] == control)]
    np.testing.assert_allclose(drawn(ax), rows["share"].to_numpy().reshape(3, 3))
    assert texts(ax.texts) == [f"{share:.2f}" for share in rows["share"] if share >= 0.005]
    assert texts(ax.get_xticklabels()) == texts(ax.get_yticklabels()) == list(NAMES)
    assert ax.images[0].get_clim() == (0.0, 1.0)
    assert title(ax) == name
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("true class", "predicted class")
    assert bar(ax) == "share of the true class" + (", mean over draws" if control else "")


def test_rows_may_come_in_any_order_and_go_to_their_cells():
    frame = confusions()
    ax = confusion(frame.sample(frac=1, random_state=1), "dog")
    cells = frame[(frame["masked"] == "dog") & ~frame["control"]].set_index(["class_name", "predicted"])["share"]
    for row, name in enumerate(texts(ax.get_yticklabels())):
        for column, predicted in enumerate(texts(ax.get_xticklabels())):
            assert drawn(ax)[row, column] == cells[name, predicted]


@pytest.mark.parametrize(
    ("names", "masked", "marked"),
    [
        (NAMES, "none", set()),
        (NAMES, "cat + cow", {"cat", "cow"}),
        (("cat", "cat + dog", "dog"), "cat + dog", {"cat + dog"}),  # longest name first
        (("a + b", "a", "none of them"), "none of them + a", {"none of them", "a"}),
    ],
)
def test_masked_classes_stand_out(names, masked, marked):
    frame = confusions(names)
    frame = frame[frame["masked"] == "none"].assign(masked=masked)
    ax = confusion(frame, masked)
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert {label.get_text() for label in labels if label.get_fontweight() == "bold"} == marked
    (triangles,) = ax.lines
    assert {names[int(row)] for row in triangles.get_ydata()} == marked
    assert ax.get_ylim() == (2.5, -0.5)


def test_small_shares_have_no_number_and_classes_without_samples_are_hatched():
    frame = confusions().query("masked == 'none'").assign(share=[0.9951, 0.0049, 0, 0.006, 0.9, 0.094] + [np.nan] * 3)
    ax = confusion(frame)
    assert texts(ax.texts) == ["1.00", "0.01", "0.90", "0.09"]
    assert hatched(ax) == [2]
    assert "hatched: no samples" in ax.get_xlabel()
    assert "hatched" not in confusion(confusions()).get_xlabel()


def test_confusion_refuses_what_is_not_there():
    frame = confusions()
    with pytest.raises(OptionError, match=r"masked must be one of 'none', 'dog', 'cat \+ cow', got 'horse'"):
        confusion(frame, "horse")
    with pytest.raises(OptionError, match="case 'none' has no rows with control=True"):
        confusion(frame, control=True)
    with pytest.raises(OptionError, match="several rows of class_name 'cat', predicted 'cat'; draw one run"):
        confusion(pd.concat([frame, frame]))
    assert plt.get_fignums() == []


# -- similarity --------------------------------------------------------------------------------------------------------


def test_similarity_is_the_outcome_of_the_frame_in_colours_of_both():
    frame = similarities()
    for outcome, name in (("TP", "TP: recognised, 120 images"), ("FN", "FN: taken for another class, 6 images")):
        rows = frame[frame["outcome"] == outcome]
        ax = similarity(frame, outcome)
        np.testing.assert_allclose(drawn(ax), rows["similarity"].to_numpy().reshape(3, 3))
        assert ax.images[0].get_clim() == (0.0, frame["similarity"].max())
        assert texts(ax.texts) == [f"{value:.1f}" for value in rows["similarity"].dropna()]
        assert title(ax) == name
        assert texts(ax.get_yticklabels()) == list(NAMES)
        assert hatched(ax) == ([] if outcome == "TP" else [2])
        assert ("hatched: no FN of the class" in ax.get_xlabel()) == (outcome == "FN")


@pytest.mark.parametrize(("factor", "digits"), [(0.01, 3), (0.1, 2), (1, 1), (100, 0)])
def test_similarities_have_as_many_digits_as_their_size_needs(factor, digits):
    frame = similarities().assign(similarity=lambda f: f["similarity"] * factor)
    assert texts(similarity(frame).texts)[0] == f"{frame['similarity'][0]:.{digits}f}"


def test_similarities_below_zero_centre_the_colours():
    frame = similarities()
    frame.loc[0, "similarity"] = -50.0
    image = similarity(frame, "FN").images[0]
    assert image.get_clim() == (-50.0, 50.0)
    np.testing.assert_allclose(image.cmap(0.5)[:3], 0.97, atol=0.02)


def test_similarity_refuses_what_is_not_there():
    frame = similarities()
    with pytest.raises(OptionError, match="outcome must be one of 'TP', 'FN', got 'FP'"):
        similarity(frame, "FP")
    frame.loc[frame["outcome"] == "FN", "similarity"] = np.nan
    with pytest.raises(OptionError, match="no images of outcome 'FN'"):
        similarity(frame, "FN")
    assert plt.get_fignums() == []


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
    for line, columns in zip(
        ax.lines, [["share", "low", "high"]] * 2 + [["random", "random_low", "random_high"]], strict=True
    ):
        name = line.get_label() if columns[0] == "share" else "weights"
        rows = frame[frame["correlation"] == name]
        np.testing.assert_array_equal(line.get_xdata(), rows["threshold"])
        np.testing.assert_array_equal(line.get_ydata(), rows[columns[0]])
        corners = bands(ax)[tuple(np.round(to_rgb(line.get_color()), 3))]
        for t, low, high in zip(rows["threshold"], rows[columns[1]], rows[columns[2]], strict=True):
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
    np.testing.assert_array_equal(dashed[1].get_ydata(), frame[frame["correlation"] == "b"]["random"])


def test_repeated_thresholds_are_refused():
    with pytest.raises(OptionError, match=r"several rows of correlation 'a', threshold '0\.0'"):
        correlated_share(shares("a", "a"))


# -- cluster_centres ---------------------------------------------------------------------------------------------------


def centres(frame, names):
    return frame.set_index("class_name").loc[names].filter(like="channel").to_numpy()


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


# -- all of them -------------------------------------------------------------------------------------------------------

FRAMES = {
    confusion: confusions,
    similarity: similarities,
    correlated_share: lambda: shares("weights"),
    cluster_centres: clusters,
}
PICTURES = {gate: lambda: of(GATE), correlation: lambda: matrix(6), **FRAMES}


@pytest.mark.parametrize("draw", PICTURES)
def test_a_given_ax_is_used_and_no_figure_made(draw):
    figure, axes = plt.subplots(1, 2)
    assert draw(PICTURES[draw](), ax=axes[1]) is axes[1]
    assert plt.get_fignums() == [figure.number]
    assert not axes[0].images
    assert not axes[0].lines
    with pytest.raises(OptionError, match="one matplotlib Axes or None, got ndarray; pass one element"):
        draw(PICTURES[draw](), ax=axes)


@pytest.mark.parametrize("draw", FRAMES)
def test_what_is_not_the_metrics_frame_is_refused(draw):
    frame = FRAMES[draw]()
    with pytest.raises(OptionError, match=r"the DataFrame that metrics\.\w+ returns, got dict"):
        draw({})
    with pytest.raises(OptionError, match=rf"lacks the columns \['{frame.columns[0]}'\].*pass the frame that metrics"):
        draw(frame.drop(columns=frame.columns[0]))
    with pytest.raises(OptionError, match="frame has no rows"):
        draw(frame.iloc[:0])
    assert plt.get_fignums() == []


@pytest.mark.parametrize(("classes", "channels"), [(2, 3), (10, 64), (100, 512), (1000, 192)])
def test_nothing_is_cut_off_and_labels_stay_apart(inside, apart, classes, channels):
    names = [f"n{i:04d} a class with a rather long name" for i in range(classes)]
    weight = torch.rand(classes, channels, generator=torch.Generator().manual_seed(0)).pow(30).tolist()
    filters, two = of(weight, names), f"{names[0]} + {names[1]}"
    confused = confusions(names).query("masked == 'none'").assign(masked=two, channels=12)
    pictures = [
        gate(filters), confusion(confused, two), similarity(similarities(names), "FN"),
        correlation(matrix(channels)), correlation(matrix(channels), order=filters),
        cluster_centres(clusters(names, channels), order=filters),
    ]  # fmt: skip
    for ax in pictures:
        inside(ax)
        apart(ax.get_xticklabels())
        apart(ax.get_yticklabels())
        assert len(ax.texts) <= 400


def test_the_legend_stands_beside_the_data(inside):
    ax = correlated_share(shares("weights of a long name", "activations of it", controls=[0, 1]))
    inside(ax)
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


def test_ten_classes_and_64_channels_are_all_labelled():
    names = [f"class {i}" for i in range(10)]
    filters = of(torch.rand(10, 64).tolist(), names)
    assert len(gate(filters).get_xticklabels()) == len(correlation(matrix(64)).get_yticklabels()) == 64
    assert len(gate(filters).get_yticklabels()) == len(confusion(confusions(names)).get_xticklabels()) == 10
