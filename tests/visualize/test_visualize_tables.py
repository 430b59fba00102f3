"""`class_filters` and `overlap`: what is drawn is what the table says."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from captum_classfilters.core.errors import OptionError
from captum_classfilters.visualize import class_filters, overlap
from captum_classfilters.visualize.kit import thinned

BLOCKS = [[0, 9, 0, 2, 0], [8, 0, 0, 1, 0], [0, 4, 0, 6, 7]]  # channel 2 is dead


def drawn(ax):
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def columns(ax):
    """Which channel stands in which column, by the labels."""
    return [int(label.get_text()) for label in ax.get_xticklabels()]


def hatched(ax):
    boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    return [(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in boxes]


def marked(ax):
    return {(int(y), int(x)) for x, y in ax.collections[-1].get_offsets()}


def test_channels_stand_in_the_block_of_their_class_strongest_first_and_dead_ones_last(table):
    ax = class_filters(table(BLOCKS))
    assert columns(ax) == [1, 0, 4, 3, 2]
    np.testing.assert_allclose(drawn(ax), np.array(BLOCKS)[:, [1, 0, 4, 3, 2]] / 10)
    assert [line.get_xdata()[0] for line in ax.lines] == [0.5, 1.5, 3.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["class 0", "class 1", "class 2"]


def test_sums_become_rates_of_each_class_and_other_scores_stay(table):
    counts = [2, 10, 5]
    of = dict(zip(("sum", "same", "none"), [np.array(counts)[:, None], 1, 1], strict=True))
    for merge, divisor in of.items():
        ax = class_filters(table(BLOCKS, counts, merge=merge))
        np.testing.assert_allclose(drawn(ax), (np.array(BLOCKS) / divisor)[:, columns(ax)])
    ax = class_filters(table(BLOCKS, counts), normalise=None)
    np.testing.assert_allclose(drawn(ax), np.array(BLOCKS)[:, columns(ax)])
    ax = class_filters(table([*BLOCKS, [0] * 5], [*counts, 1]), normalise="max")
    np.testing.assert_allclose(np.nanmax(drawn(ax), axis=1), [1, 1, 1, 0])


def test_colours_begin_at_zero_or_are_centred_on_it(table):
    assert class_filters(table(BLOCKS)).images[0].get_clim() == (0.0, 0.9)
    image = class_filters(table([[-8, 2], [4, 0]])).images[0]
    assert image.get_clim() == (-0.8, 0.8)
    np.testing.assert_allclose(image.cmap(0.5)[:3], 0.97, atol=0.02)  # zero is white
    assert class_filters(table([[0, 0], [0, 0]])).images[0].get_clim() == (0.0, 1.0)


@pytest.mark.parametrize("scores", [BLOCKS, [[-5, -2, -1, -9, 0], [3, 2, 1, 0, -1], [1, 1, 1, 1, 1]]])
def test_dots_are_the_top_k(table, scores):
    filters = table(scores)
    ax = class_filters(filters, k=2)
    order = columns(ax)
    expected = {(c, order.index(j)) for c in range(3) for j in filters.top(2)[c].tolist()}
    assert marked(ax) == expected
    assert not class_filters(filters).collections


def test_classes_without_samples_are_hatched_unmarked_and_named(table):
    ax = class_filters(table(BLOCKS, [10, 0, 10], merge="same"), k=1)
    assert np.isnan(drawn(ax)[1]).all()
    assert not np.isnan(drawn(ax)[[0, 2]]).any()
    assert hatched(ax) == [(-0.5, 0.5, 5, 1)]
    assert {row for row, _ in marked(ax)} == {0, 2}
    assert columns(ax)[-2:] == [0, 2]  # only the unseen class uses channel 0
    assert "hatched: no samples" in ax.get_xlabel()
    assert "hatched" not in class_filters(table(BLOCKS)).get_xlabel()


def test_of_many_channels_the_best_ranked_are_drawn(table):
    generator = torch.Generator().manual_seed(0)
    filters = table(torch.rand(4, 60, generator=generator))
    ax = class_filters(filters, k=2, max_channels=8)
    # two channels of four classes, all different with this seed
    assert sorted(columns(ax)) == sorted(filters.top(2).flatten().tolist())
    assert "8 of 60 channels" in ax.get_xlabel()
    assert len(marked(ax)) == 8


@pytest.mark.parametrize(("classes", "channels"), [(2, 3), (10, 64), (300, 500)])
def test_nothing_is_cut_off_and_labels_stay_apart(table, inside, apart, classes, channels):
    generator = torch.Generator().manual_seed(0)
    names = [f"n{i:04d} a class with a rather long name" for i in range(classes)]
    filters = table(torch.rand(classes, channels, generator=generator), [0, *[10] * (classes - 1)], names=names)
    for ax in (class_filters(filters, k=2), overlap(filters, 2)):
        inside(ax)
        apart(ax.get_xticklabels())
        apart(ax.get_yticklabels())


def test_ten_classes_and_64_channels_are_all_labelled(table):
    ax = class_filters(table(torch.rand(10, 64)))
    assert len(ax.get_xticklabels()) == 64
    assert len(ax.get_yticklabels()) == 10


def test_thinned_labels_name_their_own_row_and_column(table):
    filters = table(torch.rand(1000, 300, generator=torch.Generator().manual_seed(0)))
    ax = class_filters(filters)
    for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        assert label.get_text() == f"class {tick}"
    shown = drawn(ax)
    for tick, channel in zip(ax.get_xticks(), columns(ax), strict=True):
        np.testing.assert_allclose(shown[:, tick], filters.scores[:, channel] / 10)
    assert thinned(1000, 55) == list(range(0, 1000, 20))


def test_overlap_is_the_jaccard_index_with_a_grey_diagonal(table):
    generator = torch.Generator().manual_seed(3)
    filters = table(torch.rand(5, 12, generator=generator))
    ax = overlap(filters, 4)
    sets = [set(row) for row in filters.top(4).tolist()]
    expected = np.full((5, 5), np.nan)
    for a, b in combinations(range(5), 2):
        expected[a, b] = expected[b, a] = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
    np.testing.assert_allclose(drawn(ax), expected)
    assert ax.images[0].get_clim() == (0.0, 1.0)
    grey = ax.images[0].to_rgba(ax.images[0].get_array())[0, 0]
    np.testing.assert_allclose(grey, to_rgba("0.85"))
    written = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}
    assert written == {(a, b): f"{expected[a, b]:.2f}" for a in range(5) for b in range(5) if a != b}


def test_overlap_hatches_unseen_classes_and_writes_nothing_there(table):
    ax = overlap(table(BLOCKS, [10, 0, 10]), 2)
    assert set(hatched(ax)) == {(-0.5, 0.5, 3, 1), (0.5, -0.5, 1, 3)}
    assert len(ax.texts) == 2
    assert "hatched: no samples" in ax.get_xlabel()


def test_overlap_of_many_classes_has_no_numbers_and_text_can_be_read(table):
    assert len(overlap(table(torch.rand(20, 9)), 3).texts) == 20 * 19
    assert len(overlap(table(torch.rand(21, 9)), 3).texts) == 0
    same = overlap(table([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]]), 2)
    assert {text.get_color() for text in same.texts} == {"white"}  # on dark blue
    differ = overlap(table([[1.0, 0.0], [0.0, 1.0]]), 1)
    assert {text.get_color() for text in differ.texts} == {"black"}


@pytest.mark.parametrize(("k", "channels"), [(1, 4), (3, 8), (6, 8), (8, 8)])
def test_the_line_on_the_colour_bar_is_the_mean_over_random_sets(table, k, channels):
    ax = overlap(table(torch.rand(3, channels)), k)
    bar = ax.get_figure().axes[-1]
    fixed = set(range(k))
    pairs = [len(fixed & set(other)) / len(fixed | set(other)) for other in combinations(range(channels), k)]
    assert bar.lines[-1].get_ydata()[0] == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("draw", [class_filters, lambda f, **kw: overlap(f, 1, **kw)])
def test_a_given_ax_is_used_and_no_figure_made(table, draw):
    figure, axes = plt.subplots(1, 2)
    assert draw(table(BLOCKS), ax=axes[1]) is axes[1]
    assert plt.get_fignums() == [figure.number]
    assert not axes[0].images
    with pytest.raises(OptionError, match="one matplotlib Axes or None, got ndarray; pass one element"):
        draw(table(BLOCKS), ax=axes)


@pytest.mark.parametrize("style", ["ggplot", "dark_background"])
def test_a_users_style_puts_no_grid_over_the_cells(table, style):
    with plt.style.context(style):
        ax = class_filters(table(BLOCKS))
        assert not any(line.get_visible() for line in ax.get_xgridlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must be an integer in \[1, 5\]"),
        ({"k": 6}, r"k must be an integer in \[1, 5\]"),
        ({"normalise": "row"}, r"normalise must be one of \['class', 'max', None\], got 'row'"),
        ({"max_channels": 0}, "max_channels must be an integer of at least 1; got 0"),
        ({"max_channels": 2.5}, "max_channels must be an integer of at least 1; got 2.5"),
    ],
)
def test_class_filters_refuses(table, arguments, message):
    with pytest.raises(OptionError, match=message):
        class_filters(table(BLOCKS), **arguments)
    assert plt.get_fignums() == []


def test_what_is_no_table_or_has_no_samples_is_refused(table):
    for draw in (class_filters, lambda filters: overlap(filters, 1)):
        with pytest.raises(OptionError, match="must be a ClassFilters, got dict"):
            draw({"histogram": table(BLOCKS)})
        with pytest.raises(OptionError, match="no class of this table has samples"):
            draw(table(BLOCKS, [0, 0, 0]))
    with pytest.raises(OptionError, match="k must be an integer"):
        overlap(table(BLOCKS), 9)
    assert plt.get_fignums() == []
