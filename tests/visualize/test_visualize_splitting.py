"""Pictures of a split head: lines, boxes and colours are those of the tree and of the maps."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import visualization
from matplotlib.patches import FancyBboxPatch
from path_bits import legend, random, texts
from scipy import stats

from captum_classfilters import visualize
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.splitting import ALDTree
from captum_classfilters.splitting.splits import split_weights


def trees_of(weights, **options):
    splits = split_weights(torch.as_tensor(np.asarray(weights)), **{"fit": "mle", **options})
    return [ALDTree(splits, row) for row in range(len(splits.weights))]


def skewed(rows=1, size=400, seed=0):
    """Weights with a heavier positive side."""
    draws = np.random.default_rng(seed).exponential(size=(2, rows, size))
    return draws[0] - 0.6 * draws[1]


def deep(sign=1):
    """A tree of 9 stages on one side, and nothing on the other."""
    return trees_of([sign * np.linspace(1, 3, 256)], fit="loglinear", min_size=2)[0]


# -- ald_fit, ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_threshold", ["zero", "mean"])
def test_points_are_sorted_weights_and_lines_the_fit_of_both_sides(first_threshold, inside):
    weights = skewed()
    weights[0, :7] = 0
    (tree,) = trees_of(weights, first_threshold=first_threshold)
    ax = visualize.ald_fit(tree)
    ordered = np.sort(weights[weights != 0])
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), np.stack([np.arange(393), ordered], 1))
    below, above = [line for line in ax.lines if line.get_color() == "black"]
    first = tree.first_threshold
    for line, name, sign, start in ((below, "-1", -1, 0), (above, "+1", 1, 393 - tree.nodes["+1"].size)):
        away = sign * (ordered - first)
        away = np.sort(away[away > 0])
        x, y = line.get_data()
        node = tree.nodes[name]
        slope, intercept = np.polyfit(np.arange(node.size) / node.size, np.log(away), 1)
        expected = np.exp(slope * np.arange(node.size) / node.size + intercept)
        np.testing.assert_allclose(sign * (y - first), expected, rtol=1e-6)
        # over the ranks of its own side, the outermost weight at the edge
        assert sorted(x) == list(range(start, start + node.size))
        assert x[-1] == (0 if sign < 0 else 392)
    r2 = f"{tree.nodes['-1'].r2:.2f} (-1), {tree.nodes['+1'].r2:.2f} (+1)"
    assert legend(ax)[:2] == ["393 weights, by deepest node", f"log-linear fit, R2 {r2}"]
    assert ax.get_xlabel() == "neurons by weight, ascending (7 of 0 left out)"
    assert (ax.get_ylabel(), ax.get_title()) == ("weight", "class 0")
    inside(ax)


def test_the_third_line_is_the_quantile_function_of_the_distribution():
    weights = skewed()
    (tree,) = trees_of(weights)
    ax = visualize.ald_fit(tree)
    (line,) = [line for line in ax.lines if line.get_label().startswith("asymmetric Laplace")]
    location, rate, asymmetry = (part[0] for part in tree.laplace)
    levels = (np.arange(400) + 0.5) / 400
    expected = stats.laplace_asymmetric(asymmetry, loc=location, scale=1 / rate).ppf(levels)
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(tree.laplace.cdf(line.get_ydata()[None])[0], levels, rtol=1e-9)
    (bare,) = trees_of(weights, fit="loglinear")
    assert not any("Laplace" in text for text in legend(visualize.ald_fit(bare)))


def test_colours_and_borders_are_those_of_the_nodes(apart):
    weights = skewed()[0]
    (tree,) = trees_of([weights])
    ax = visualize.ald_fit(tree)
    ordered = np.argsort(weights)
    colours = {}
    for name in tree.nodes:
        inner = set(tree.channels(name).tolist())
        outer = f"{name[0]}{int(name[1:]) + 1}"
        if outer in tree.nodes:
            inner -= set(tree.channels(outer).tolist())
        own = ax.collections[0].get_facecolors()[np.isin(ordered, list(inner))]
        assert len(np.unique(own, axis=0)) == 1
        colours[name] = own[0]
    assert len({tuple(colour) for colour in colours.values()}) == len(tree.nodes) >= 6
    for name, (red, _, blue, _) in colours.items():
        assert (red > blue) == (name[0] == "+")
    borders = sorted(
        line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2
    )
    sizes = [
        node.size if node.name[0] == "-" else 400 - node.size for node in tree.nodes.values() if node.name[1:] != "1"
    ]
    assert borders == sorted(size - 0.5 for size in sizes)
    ax.get_figure().draw_without_rendering()
    above = ax.child_axes[0]
    named = dict(zip(texts(above.get_xticklabels()), above.get_xticks(), strict=True))
    # the terminal ones are named, whatever else has room
    assert {f"+{tree.depth('positive')}", f"-{tree.depth('negative')}"} <= set(named)
    assert named["+1"] == (400 - tree.nodes["+1"].size + 400 - tree.nodes["+2"].size - 1) / 2
    apart(sorted(above.get_xticklabels(), key=lambda label: label.get_position()[0]))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_legend_stands_where_the_weights_are_not(sign, inside):
    (tree,) = trees_of([sign * np.exp(np.linspace(0, 12, 256))], fit="loglinear")
    ax = visualize.ald_fit(tree)
    inside(ax)
    assert len([line for line in ax.lines if line.get_color() == "black"]) == 1
    box = ax.get_legend().get_window_extent()
    points = ax.transData.transform(ax.collections[0].get_offsets())
    assert not any(box.contains(*point) for point in points)


def test_several_trees_have_a_panel_each_and_one_scale(inside):
    trees = trees_of(skewed(4))
    names = [f"a class of a rather long name, {index}" for index in range(4)]
    panels = visualize.ald_fit(dict(enumerate(trees)), class_names=names)
    assert panels.shape == (4,)
    assert [ax.get_title() for ax in panels] == [f"{name[:23]}…" for name in names]
    assert len({ax.get_ylim() for ax in panels}) == 1
    assert [ax.get_ylabel() for ax in panels] == ["weight", "", "", "weight"]
    assert len([ax for ax in panels[0].get_figure().axes if ax.axison]) == 4
    inside(panels[0])
    for ax, tree in zip(panels, trees, strict=True):
        np.testing.assert_array_equal(ax.collections[0].get_offsets()[:, 1], np.sort(tree.weights))
    # of different heads they are drawn each on its own scale
    other = trees_of(50 * skewed(1, 300))[0]
    assert len({ax.get_ylim() for ax in visualize.ald_fit([trees[0], other])}) == 2
    given = plt.subplots(1, 2, layout="constrained")[1]
    assert (visualize.ald_fit(trees[:2], ax=given) == given).all()
    assert visualize.ald_fit(trees[0], ax=given[0]) is given[0]


@pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.DegenerateFitWarning")
@pytest.mark.parametrize("kind", ["rank", "density"])
@pytest.mark.parametrize("row", [[0.0] * 30, [0.5] * 30, [-0.5] * 30, [0.0] * 29 + [1.0], [0.0] * 28 + [1.0, -2.0]])
def test_weights_to_which_nothing_can_be_fitted_are_drawn_all_the_same(kind, row, inside):
    (tree,) = trees_of([row])
    ax = visualize.ald_fit(tree, kind=kind)
    inside(ax)
    if not any(row):
        assert texts(ax.texts) == ["all weights are 0"]
    if kind == "rank":
        check_tree(visualize.ald_tree(tree))


# -- ald_fit, densities ------------------------------------------------------------------------------------------------


def test_densities_stand_beside_a_histogram_of_area_one(inside):
    weights = skewed(seed=2)
    (tree,) = trees_of(weights)
    ax = visualize.ald_fit(tree, kind="density")
    heights, edges, _ = ax.patches[0].get_data()
    assert (heights * np.diff(edges)).sum() == pytest.approx(1)
    assert (edges[0], edges[-1]) == (weights.min(), weights.max())
    location, rate, asymmetry = (part[0] for part in tree.laplace)
    laplace = stats.laplace_asymmetric(asymmetry, loc=location, scale=1 / rate)
    normal = stats.norm(weights.mean(), weights.std())
    for line, name, density in zip(ax.lines, ("asymmetric Laplace", "normal"), (laplace, normal), strict=True):
        x, y = line.get_data()
        np.testing.assert_allclose(y, density.pdf(x), rtol=1e-9)
        assert line.get_label() == f"{name}: {density.logpdf(weights).mean():.3f}"
    assert location in ax.lines[0].get_xdata()
    assert "log-likelihood" in ax.get_legend().get_title().get_text()
    inside(ax)
    # above everything that is drawn
    box = ax.get_legend().get_window_extent()
    for line in ax.lines:
        assert not any(box.contains(*point) for point in ax.transData.transform(line.get_xydata()))


# -- ald_tree ----------------------------------------------------------------------------------------------------------


def boxes_of(ax):
    """The text of each box, with the box."""
    patches = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    inside = [text for text in ax.texts if "stop here" not in text.get_text()]
    assert len(patches) == len(inside)
    return {text.get_text(): (text, patch) for text, patch in zip(inside, patches, strict=True)}


def check_tree(ax):
    """Text lies in its box, and boxes lie apart."""
    ax.get_figure().draw_without_rendering()
    extents = []
    for text, patch in boxes_of(ax).values():
        outer, inner = patch.get_window_extent(), text.get_window_extent()
        assert outer.x0 <= inner.x0 <= inner.x1 <= outer.x1
        assert outer.y0 <= inner.y0 <= inner.y1 <= outer.y1
        extents.append(outer)
    extents += [text.get_window_extent() for text in ax.texts if "stop here" in text.get_text()]
    assert not any(one.overlaps(other) for place, one in enumerate(extents) for other in extents[:place])


@pytest.mark.parametrize("first_threshold", ["zero", "mean"])
def test_boxes_say_size_and_border_of_each_node(first_threshold, inside):
    weights = skewed()
    weights[0, 0] = 0
    (tree,) = trees_of(weights, first_threshold=first_threshold)
    ax = visualize.ald_tree(tree, class_names=["golden retriever"])
    inside(ax)
    check_tree(ax)
    root, *others = boxes_of(ax)
    assert root == f"golden retriever\n400 weights, parted at {tree.first_threshold:.3g}\n1 of them 0, dropped"
    assert len(others) == len(tree.nodes)
    for shown in others:
        name = shown.split(":")[0]
        inner = weights[0, tree.channels(name)]
        outermost = {
            f"+{tree.depth('positive')}": "most discriminative",
            f"-{tree.depth('negative')}": "most confusing",
        }
        assert shown.split("\n")[0] == f"{name}: {len(inner)} neurons"
        border = float(shown.split("\n")[1].split()[-1])
        sign = 1 if name[0] == "+" else -1
        assert border == pytest.approx(tree.first_threshold + sign * tree.nodes[name].threshold, rel=1e-3)
        assert (sign * inner > sign * border - 1e-3 * abs(border)).all()
        assert shown.split("\n")[2:] == ([outermost[name]] if name in outermost else [])
        text, patch = boxes_of(ax)[shown]
        assert (text.get_position()[0] > 0) == (name[0] == "+")
        assert (patch.get_linewidth() > 2) == (name in outermost)
    stopped = [int(text.get_text().split()[0]) for text in ax.texts if "stop here" in text.get_text()]
    ends = sum(len(tree.terminal(branch)) for branch in ("positive", "negative"))
    assert sum(stopped) + ends == sum(weights[0] != 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_nine_stages_and_an_empty_side_can_be_read(sign, inside):
    tree = deep(sign)
    ax = visualize.ald_tree(tree)
    inside(ax)
    check_tree(ax)
    shown = boxes_of(ax)
    assert len(shown) == 11
    assert f"no {'negative' if sign > 0 else 'positive'} weights" in shown
    assert min(text.get_fontsize() for text in ax.texts) >= 6


def test_a_tree_of_depth_one_is_terminal_at_once(inside):
    (tree,) = trees_of([np.linspace(-1, 1, 21)])
    ax = visualize.ald_tree(tree)
    inside(ax)
    check_tree(ax)
    assert [text.split("\n")[-1] for text in boxes_of(ax)][1:] == ["most confusing", "most discriminative"]


def test_in_small_axes_letters_are_smaller():
    (tree,) = trees_of(skewed())
    ax = plt.subplots(figsize=(4, 3))[1]
    assert visualize.ald_tree(tree, ax=ax) is ax
    check_tree(ax)


# -- branch_maps -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scene():
    """Two photographs, the second a dark one, and maps of either sign, of which the second image's are weak."""
    images = random(2, 3, 8, 12) * torch.tensor([1.0, 0.3]).view(2, 1, 1, 1)
    strength = torch.tensor([8.0, 0.5]).view(2, 1, 1, 1)
    maps = {
        "+1": random(2, 1, 4, 6, seed=1),
        "+2": 0.25 * random(2, 1, 2, 3, seed=2),
        "-1": -random(2, 1, 4, 6, seed=3),
    }
    return images, {name: strength * each for name, each in maps.items()}


def tiles_of(ax, columns=4):
    """The numbers behind the colours, ``(rows, columns, H, W)``."""
    heat = np.asarray(ax.images[1].get_array())
    height, width = 8, heat.shape[1] // columns
    return heat.reshape(-1, height, columns, width).swapaxes(1, 2)


def resized(maps):
    return np.stack(
        [torch.nn.functional.interpolate(each.double(), (8, 12), mode="bilinear")[:, 0] for each in maps.values()], 1
    )


def test_all_tiles_of_an_image_have_one_scale(scene, inside):
    images, maps = scene
    ax = visualize.branch_maps(images, maps, ["cat", "dog"])
    inside(ax)
    expected = resized(maps)
    largest = np.abs(expected).max((1, 2, 3))
    assert (tiles_of(ax)[:, 0] == 0).all()
    np.testing.assert_allclose(tiles_of(ax)[:, 1:], expected / largest[:, None, None, None], rtol=1e-9)
    assert ax.images[1].get_clim() == (-1, 1)
    assert texts(ax.get_xticklabels()) == ["image", "+1", "+2", "-1"]
    assert texts(ax.get_yticklabels()) == [f"cat\n± {largest[0]:.3g}", f"dog\n± {largest[1]:.3g}"]
    assert list(ax.get_xticks()) == [5.5, 17.5, 29.5, 41.5]
    bar = ax.get_figure().axes[1]
    assert "share of the row's" in bar.get_ylabel()
    assert texts(bar.get_yticklabels()) == ["-1", "-0.5", "0", "0.5", "1"]


def test_one_scale_for_all_images_keeps_the_weak_ones_pale(scene):
    images, maps = scene
    ax = visualize.branch_maps(images, maps, share="all")
    expected, largest = resized(maps), np.abs(resized(maps)).max()
    np.testing.assert_allclose(tiles_of(ax)[:, 1:], expected / largest, rtol=1e-9)
    assert np.abs(tiles_of(ax)[1]).max() < 0.1
    bar = ax.get_figure().axes[1]
    assert texts(bar.get_yticklabels()) == [f"{part * largest:.3g}" for part in (-1, -0.5, 0, 0.5, 1)]
    assert bar.get_ylabel() == "map"
    assert texts(ax.get_yticklabels()) == []


def test_blue_is_negative_red_positive_and_zero_leaves_the_photograph(scene):
    ax = visualize.branch_maps(*scene)
    low, middle, high = ax.images[1].to_rgba(np.array([-1.0, 0.0, 1.0]))
    assert low[2] - low[0] > 0.5 < high[0] - high[2]
    assert middle[3] == 0 < 0.7 < low[3] == high[3]
    grey, photographs = ax.images[0], ax.images[2]
    np.testing.assert_allclose(photographs.get_array(), scene[0].permute(0, 2, 3, 1).reshape(16, 12, 3), rtol=1e-6)
    assert tuple(photographs.get_extent()) == (-0.5, 11.5, 15.5, -0.5)
    # a dark photograph stays dark
    assert grey.get_clim() == (0, 255)
    np.testing.assert_allclose(grey.get_array()[:8, 12:24], 255 * scene[0][0].mean(0), atol=1)
    np.testing.assert_allclose(grey.get_array()[8:, 36:], 255 * scene[0][1].mean(0), atol=1)


def test_a_peak_does_not_bleach_the_rest():
    even = torch.full((1, 1, 60, 60), 0.8)
    even[..., 30, 30] = 1
    ax = visualize.branch_maps(random(1, 3, 60, 60), {f"+{index}": even for index in range(4)})
    heat = np.asarray(ax.images[1].get_array())[:, 60:]
    assert heat.max() == 1
    assert np.median(heat) == pytest.approx(0.8)


def test_what_captums_own_grid_draws_of_these_tiles_is_the_same(scene):
    images, maps = scene
    ax = visualize.branch_maps(images[:1], {name: each[:1] for name, each in maps.items()})
    wide = np.concatenate([np.zeros((8, 12)), *resized(maps)[0]], axis=1)
    picture = np.tile(images[0].permute(1, 2, 0).numpy(), (1, 4, 1))
    _, axis = visualization.visualize_image_attr_multiple(
        wide[..., None], picture, ["blended_heat_map"], ["all"], use_pyplot=False, outlier_perc=1e-6
    )
    np.testing.assert_allclose(ax.images[1].get_array(), axis.images[1].get_array(), rtol=1e-9)
    np.testing.assert_array_equal(ax.images[0].get_array(), axis.images[0].get_array())


@pytest.mark.parametrize("factor", [0.0, 1e-12, 1e9, -1.0])
def test_maps_of_zeros_of_one_sign_and_of_any_size_are_drawn(factor, inside):
    maps = {"+1": factor * random(1, 1, 3, 3), "-1": torch.zeros(1, 1, 1, 1)}
    ax = visualize.branch_maps(random(1, 1, 8, 8), maps)
    inside(ax)
    heat = tiles_of(ax, 3)
    assert np.abs(heat).max() == pytest.approx(float(factor != 0))
    assert (np.sign(heat[0, 1]) == np.sign(factor)).all()
    labels = [float(text) for text in texts(ax.get_figure().axes[1].get_yticklabels())]
    if factor == 0:
        assert labels == [0]
    else:
        assert labels[-1] == pytest.approx(abs(resized_one(maps["+1"])).max(), rel=1e-2)


def resized_one(each):
    return torch.nn.functional.interpolate(each.double(), (8, 8), mode="bilinear").numpy()


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (1, 17), (6, 3)])
def test_few_and_many_tiles_can_be_read(count, panels, inside, apart):
    maps = {f"+{index} of {count} neurons": random(count, 1, 2, 2) for index in range(panels)}
    ax = visualize.branch_maps(random(count, 3, 20, 20), maps, [f"an image of a long name, {i}" for i in range(count)])
    inside(ax)
    apart(ax.get_xticklabels())
    if count > 1:
        apart(ax.get_yticklabels())
    assert min(label.get_fontsize() for label in ax.get_xticklabels()) >= 5
    # labels stand over their tiles
    for label, place in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True):
        box = label.get_window_extent()
        assert (box.x0 + box.x1) / 2 == pytest.approx(ax.transData.transform((place, 0))[0], abs=2)


def test_maps_are_drawn_on_the_axes_that_are_given(scene):
    ax = plt.subplots(layout="constrained")[1]
    assert visualize.branch_maps(*scene, ax=ax) is ax
    images, maps = scene
    grown = {name: each.clone().requires_grad_() for name, each in maps.items()}
    np.testing.assert_array_equal(tiles_of(visualize.branch_maps(images, grown)), tiles_of(ax))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tree: visualize.ald_fit([]), "expected an ALDTree, got none; pass what ALDSplitter.split"),
        (lambda tree: visualize.ald_fit([tree, 7]), "expected an ALDTree, got int"),
        (lambda tree: visualize.ald_fit(torch.zeros(3)), "trees must be an ALDTree or several, got Tensor"),
        (lambda tree: visualize.ald_fit(tree, kind="qq"), r"kind must be one of \['rank', 'density'\], got 'qq'"),
        (lambda tree: visualize.ald_fit(tree, kind="density"), 'class 0 has none; split with fit="mle"'),
        (lambda tree: visualize.ald_fit(tree, class_names=[]), "by class: got 0, and the tree is of class 0"),
        (lambda tree: visualize.ald_fit(tree, class_names="cat"), "by class: got 'cat'"),
        (lambda tree: visualize.ald_fit([tree], ax=plt), r"array of 1 axes, got module; .* plt.subplots\(1, 1\)"),
        (lambda tree: visualize.ald_fit([tree], ax=np.array([1, 2])), "array of 1 axes, got 2 axes"),
        (lambda tree: visualize.ald_fit(tree, ax=np.array([1])), "ax must be one matplotlib Axes or None, got ndarray"),
        (lambda tree: visualize.ald_tree([tree]), "expected an ALDTree, got list"),
        (lambda tree: visualize.ald_tree(tree, class_names=()), "by class: got 0"),
        (lambda tree: visualize.ald_tree(tree, ax=1), "ax must be one matplotlib Axes or None, got int"),
    ],
)
def test_trees_that_cannot_be_drawn_are_refused(call, message):
    (tree,) = trees_of(skewed(), fit="loglinear")
    with pytest.raises(OptionError, match=message):
        call(tree)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.rand(3, 8, 8)}, ShapeError, r"got \(3, 8, 8\); of one image pass image\[None\]"),
        ({"images": torch.rand(0, 3, 8, 8)}, ShapeError, r"got \(0, 3, 8, 8\)"),
        ({"images": [1]}, ShapeError, "got list"),
        ({"images": 255 * torch.ones(1, 3, 8, 8)}, ShapeError, r"image 0 must lie in \[0, 1\], got 255 to 255; undo"),
        ({"images": torch.rand(1, 4, 8, 8)}, ShapeError, "image 0 must be a tensor .* 1 or 3 colours"),
        ({"maps": {}}, OptionError, 'at least one, got none; pass {"\\+1": map}'),
        ({"maps": torch.rand(1, 1, 2, 2)}, OptionError, "at least one, got Tensor"),
        ({"maps": {"+1": torch.rand(2, 1, 2, 2)}}, ShapeError, r"map '\+1' must .*\(1, 1, h, w\).* got \(2, 1, 2, 2\)"),
        ({"maps": {"+1": torch.rand(1, 3, 2, 2)}}, ShapeError, r"got \(1, 3, 2, 2\)"),
        ({"maps": {"+1": np.zeros((1, 1, 2, 2))}}, ShapeError, "got ndarray"),
        ({"maps": {"+1": torch.full((1, 1, 2, 2), torch.nan)}}, OptionError, "be finite, got 4 numbers that are not"),
        ({"names": ["a", "b"]}, OptionError, "names must be 1, one for each image, got 2"),
        ({"names": "a"}, OptionError, "names must be 1, .* got 'a'"),
        ({"share": "panel"}, OptionError, r"share must be one of \['row', 'all'\], got 'panel'"),
        ({"ax": np.zeros(1)}, OptionError, "ax must be one matplotlib Axes or None, got ndarray"),
    ],
)  # fmt: skip
def test_maps_that_cannot_be_drawn_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        visualize.branch_maps(**{"images": torch.rand(1, 3, 8, 8), "maps": {"+1": torch.rand(1, 1, 2, 2)}, **change})
    assert plt.get_fignums() == []
