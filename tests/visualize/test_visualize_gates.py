"""Pictures of gates: what is drawn is what the gate or the frame says."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from gate_frames import (
    GATE,
    NAMES,
    ORDER,
    bar,
    clusters,
    confusions,
    drawn,
    hatched,
    matrix,
    of,
    shares,
    similarities,
    texts,
    title,
)

from captum_classfilters import metrics
from captum_classfilters.core.errors import OptionError
from captum_classfilters.gating import LabelSensitiveGate
from captum_classfilters.visualize import cluster_centres, confusion, correlated_share, correlation, gate, similarity

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
    with pytest.raises(OptionError, match=r"order must be one of \['class', None\], got 'row'"):
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


@pytest.mark.parametrize(("classes", "channels"), [(2, 3), (10, 64), (120, 100)])
def test_nothing_is_cut_off_and_labels_stay_apart(inside, apart, classes, channels):
    names = [f"n{i:04d} a class with a rather long name" for i in range(classes)]
    weight = torch.rand(classes, channels, generator=torch.Generator().manual_seed(0)).pow(30).tolist()
    filters, two = of(weight, names), f"{names[0]} + {names[1]}"
    confused = confusions(names).query("masked == 'none'").assign(masked=two, channels=12)
    pictures = [
        gate(filters), confusion(confused, two), similarity(similarities(names), "FN"),
        correlation(matrix(channels), order=filters), cluster_centres(clusters(names, channels), order=filters),
    ]  # fmt: skip
    pictures += [correlation(matrix(channels))] if channels == 64 else []
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
