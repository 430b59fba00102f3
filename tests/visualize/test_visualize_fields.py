"""Pictures of single paths and of receptive fields: what is drawn is what the gates and fields say."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgba
from path_bits import drawn, legend, paths_of, random, texts

from captum_classfilters import visualize
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.metrics import Occlusion, field_iou, receptive_fields


@pytest.fixture
def paths():
    """60 images of 4 classes, the last without any; layers of 5 and 12 channels, of which 0 is open and 1 closed."""
    bits = random(60, 17) > 0.5
    bits[:, [0, 5]], bits[:, [1, 6]] = True, False
    return paths_of(bits, torch.arange(60) % 3, (5, 12), 4)


# -- gate_strip --------------------------------------------------------------------------------------------------------


def test_one_path_is_its_gates_layer_by_layer(paths):
    ax = visualize.gate_strip(paths[7], order=None, equal=False)
    bits = paths.bits()[7].double().numpy()
    np.testing.assert_array_equal(drawn(ax)[0, :5], bits[:5])
    assert np.isnan(drawn(ax)[0, 5:]).all()
    np.testing.assert_array_equal(drawn(ax)[1], bits[5:])
    assert ax.images[0].get_clim() == (0, 1)
    assert texts(ax.get_yticklabels()) == ["conv1 (5)", "conv2 (12)"]
    assert legend(ax) == ["open", "closed"]


def test_groups_stand_one_above_the_other_channel_above_itself(paths, inside):
    groups = {"a": paths[paths.labels == 0], "b": paths[paths.labels == 1]}
    ax = visualize.gate_strip(groups)
    for place, (strip, width) in enumerate(zip(("conv1", "conv2"), (5, 12), strict=True)):
        columns = np.searchsorted(np.arange(12) * width // 12, np.arange(width))  # the first cell of each channel
        pairs = np.stack([drawn(ax, group)[3 * place + group, columns] for group in (0, 1)], 1)
        rates = np.stack([each.bits(strip).double().mean(0).numpy() for each in groups.values()], 1)
        np.testing.assert_allclose(sorted(pairs.tolist()), sorted(rates.tolist()))
        assert (np.diff(pairs[:, 0]) <= 0).all()
    everything = np.stack([drawn(ax, 0), drawn(ax, 1)])
    assert (np.isnan(everything).sum(0)[[0, 1, 3, 4]] == 1).all()  # a row is one group's
    assert np.isnan(everything[:, 2]).all()  # between layers there is nothing
    assert legend(ax) == ["a", "b"]
    assert ax.get_xlabel() == "channels of the layer, most open for a first"
    inside(ax)


def test_equal_layers_fill_the_width_with_cells_of_one_channel_each():
    strips = [[0.0, 0.5, 1.0], np.linspace(0, 1, 12), [True]]
    table = drawn(visualize.gate_strip(strips, order=None))
    np.testing.assert_array_equal(table[0], np.repeat(strips[0], 4))
    np.testing.assert_allclose(table[1], strips[1])
    assert (table[2] == 1).all()


def test_shares_get_a_bar_with_each_groups_colours(paths):
    ax = visualize.gate_strip({"a": paths[:30], "b": paths[30:], "c": paths})
    bar = ax.get_figure().axes[1]
    assert bar.get_xlabel() == "share of the images that open the channel"
    assert [image.get_cmap() for image in bar.images] == [image.get_cmap() for image in ax.images]
    assert len({to_hex(image.get_cmap()(1.0)) for image in ax.images}) == 3
    assert len({to_hex(image.get_cmap()(0.0)) for image in ax.images}) == 1
    assert to_rgba("white") != ax.images[0].get_cmap()(0.0)  # closed is not nothing
    assert bar.get_xlim() == (0, 1)


@pytest.mark.parametrize(("layers", "width", "groups"), [(60, 64, 3), (2, 1000, 6), (1, 1, 1)])
def test_strips_of_odd_sizes_can_be_read(layers, width, groups, inside, apart):
    made = {f"group {g}": [random(width, seed=g + layer) for layer in range(layers)] for g in range(groups)}
    ax = visualize.gate_strip(made, [f"stage{layer}.a.rather.long.name.of.a.conv" for layer in range(layers)])
    inside(ax)
    apart(ax.get_yticklabels())
    label, bar = ax.xaxis.label.get_window_extent(), ax.get_figure().axes[1].get_window_extent()
    assert label.y0 >= bar.y1


def test_groups_that_cannot_be_compared_are_refused(paths):
    good = [[1.0, 0.0]]
    with pytest.raises(OptionError, match="groups must be 1 to 6, got 7; draw some of them"):
        visualize.gate_strip(dict.fromkeys("abcdefg", good))
    with pytest.raises(OptionError, match="must be 1 to 6, got 0"):
        visualize.gate_strip({})
    with pytest.raises(OptionError, match="group 'a' has no images"):
        visualize.gate_strip({"a": paths[:0]})
    with pytest.raises(ShapeError, match="same layers, got 1 with 2 channels in 'a' and 2 with 17 in 'b'"):
        visualize.gate_strip({"a": good, "b": paths})
    with pytest.raises(ShapeError, match=r"a layer of group 'open' must have shape \(K_l,\), got \(1, 2\)"):
        visualize.gate_strip([good])
    with pytest.raises(ShapeError, match=r"must be shares in \[0, 1\], got -1 to 4"):
        visualize.gate_strip([[-1.0, 4.0]])
    with pytest.raises(ShapeError, match=r"must be Paths, or a list .*, got Tensor"):
        visualize.gate_strip({"a": torch.zeros(3)})
    with pytest.raises(OptionError, match="layers must be 1 names, got 2"):
        visualize.gate_strip(good, ["a", "b"])
    with pytest.raises(OptionError, match=r"order must be one of \['open', None\], got 'class'"):
        visualize.gate_strip(good, order="class")
    assert plt.get_fignums() == []


# -- switched_off ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scene():
    """An image, a region and three fields: the region itself, half of it and the rest of a row, none."""
    region = torch.zeros(6, 8, dtype=torch.bool)
    region[1:3, 2:6] = True
    half = torch.zeros_like(region)
    half[1, 4:] = True
    return random(3, 6, 8), region, torch.stack([region, half, torch.zeros_like(region)])


def lines_of(axis):
    return [lines for lines in axis.collections if isinstance(lines, LineCollection)]


def test_panels_are_image_cover_fields_and_their_union(scene, inside):
    image, region, fields = scene
    axes = visualize.switched_off(image, region, fields, names=["conv5, 7", "conv5, 9", "conv4, 1"])
    assert [axis.get_title() for axis in axes] == [
        "image", "region covered", "conv5, 7\nIoU 1.00", "conv5, 9\nIoU 0.20", "conv4, 1\nno field",
        "merged (3 filters)\nIoU 0.80",
    ]  # fmt: skip
    pixels = image.permute(1, 2, 0).numpy()
    for axis in (axes[0], *axes[2:]):
        np.testing.assert_allclose(axis.images[0].get_array(), pixels)
    covered = np.asarray(axes[1].images[0].get_array())
    np.testing.assert_allclose(covered[~region], pixels[~region], rtol=1e-6)
    np.testing.assert_allclose(covered[region], np.tile(pixels[~region].mean(0), (8, 1)), rtol=1e-5)
    for axis, field in zip(axes[2:], [*fields, fields.any(0)], strict=True):
        np.testing.assert_array_equal(np.asarray(axis.images[1].get_array())[..., 3] > 0, field)
    inside(axes[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_outline_is_where_a_mask_ends(seed):
    region = random(7, 5, seed=seed) > 0.5
    axis = visualize.switched_off(random(1, 7, 5), region, region[None][:0])[0]
    below, above = lines_of(axis)
    assert len(below.get_segments()) == len(above.get_segments())
    padded = np.pad(region.numpy(), 1)
    ends = {
        frozenset({(x - 1.5, y - 0.5), (x - 0.5, y - 0.5)})
        for y in range(8) for x in range(1, 7) if padded[y, x] != padded[y + 1, x]
    } | {
        frozenset({(x - 0.5, y - 1.5), (x - 0.5, y - 0.5)})
        for y in range(1, 9) for x in range(6) if padded[y, x] != padded[y, x + 1]
    }  # fmt: skip
    assert {frozenset(map(tuple, segment)) for segment in above.get_segments()} == ends


def test_what_the_caller_gives_is_drawn_instead(scene):
    image, region, fields = scene
    black, merged = torch.where(region, 0.0, image), torch.ones_like(region)
    axes = visualize.switched_off(image, region, fields[:1], ious=[0.123], covered=black, merged=merged)
    np.testing.assert_allclose(axes[1].images[0].get_array(), black.permute(1, 2, 0))
    assert axes[2].get_title() == "filter 0\nIoU 0.12"
    assert axes[3].get_title() == f"merged (all filters)\nIoU {8 / 48:.2f}"


def test_many_fields_go_into_rows_and_given_axes_are_used(scene, inside):
    image, region, fields = scene
    axes = visualize.switched_off(image[:1], region, fields[[0] * 7])
    assert axes.shape == (10,)
    assert len(axes[0].get_figure().axes) == 12
    assert [axis.axison for axis in axes[0].get_figure().axes] == [True] * 10 + [False] * 2
    inside(axes[0])
    own = plt.subplots(2, 2)[1]
    assert list(visualize.switched_off(image, region, fields[:1], ax=own)) == list(own.ravel())
    with pytest.raises(OptionError, match=r"ax must be an array of 4 axes, got 3 axes; make them with plt.subplots\(1"):
        visualize.switched_off(image, region, fields[:1], ax=own.ravel()[:3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.zeros(4, 6, 8)}, ShapeError, r"\(c, H, W\) of 1 or 3 colours, got \(4, 6, 8\)"),
        ({"image": torch.full((3, 6, 8), 2.0)}, ShapeError, r"in \[0, 1\], got 2 to 2; undo the normalisation"),
        ({"region": torch.zeros(6, 8)}, ShapeError, "region must be bool .* got torch.float32"),
        ({"region": torch.zeros(3, 8, dtype=torch.bool)}, ShapeError, r"\(H, W\) = \(6, 8\), got .*resize it"),
        ({"fields": torch.zeros(6, 8, dtype=torch.bool)}, ShapeError, r"fields must be bool of shape \(F, H, W\)"),
        ({"covered": torch.zeros(1, 6, 8)}, ShapeError, r"shape of the image, \(3, 6, 8\), got \(1, 6, 8\)"),
        ({"names": ["a"]}, OptionError, "names must be 3, one for each field, got 1"),
        ({"ious": [0.1]}, OptionError, "ious must be 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(scene, change, error, message):
    with pytest.raises(error, match=message):
        visualize.switched_off(**dict(zip(("image", "region", "fields"), scene, strict=True)) | change)
    assert plt.get_fignums() == []


# -- occlusion ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def covered():
    """What `metrics.occlusion` returns for two images and layers of 3 and 4 filters, by hand."""
    before = tuple(torch.tensor(rows, dtype=torch.bool) for rows in ([[1, 1, 1], [0, 1, 1]], [[1, 1, 0, 1]] * 2))
    after = tuple(torch.tensor(rows, dtype=torch.bool) for rows in ([[0, 1, 0], [0, 1, 1]], [[0, 0, 0, 1]] * 2))
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 2:6, 2:6] = True
    maps = random(2, 3, 8, 8), random(2, 4, 4, 4, seed=1)
    cuts = torch.full((3,), 0.6), torch.full((4,), 0.7)
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    return Occlusion(("one", "two"), masks, before, after, nothing[None].long(), maps, cuts, nothing, nothing[None])


@pytest.mark.parametrize(("index", "layers", "count"), [(0, None, 4), (0, ["one"], 2), (1, ["one"], 0), (1, None, 2)])
def test_the_best_filters_of_an_occlusion_are_those_of_its_table(covered, index, layers, count):
    axes = visualize.occlusion(covered, random(3, 8, 8), index, layers)
    table = covered.table(layers).query("image == @index")
    assert len(table) == count
    expected = [f"{row.layer}, {row.filter}\nIoU {row.iou:.2f}" for row in table.itertuples()][:3]
    assert [axis.get_title() for axis in axes[2:-1]] == expected
    for axis, row in zip(axes[2:-1], table.itertuples(), strict=False):
        place = covered.layers.index(row.layer)
        maps, cut = covered.maps[place][index, row.filter], covered.thresholds[place][row.filter]
        field = receptive_fields(maps[None, None], cut[None], (8, 8))[0, 0]
        np.testing.assert_array_equal(np.asarray(axis.images[1].get_array())[..., 3] > 0, field)
    merged = covered.merged(layers)[index]
    np.testing.assert_array_equal(np.asarray(axes[-1].images[1].get_array())[..., 3] > 0, merged)
    words = f"({'all' if count > 3 else count} filters)"
    iou = float(field_iou(merged[None, None], covered.masks[index][None, None]))
    assert axes[-1].get_title() == f"merged {words}\n" + (f"IoU {iou:.2f}" if count else "no field")


def test_an_occlusion_that_does_not_fit_is_refused(covered):
    image = random(3, 8, 8)
    with pytest.raises(OptionError, match=r"result must be what metrics\.occlusion returns, got dict"):
        visualize.occlusion({}, image)
    with pytest.raises(OptionError, match=r"index must be an integer in \[0, 1\], which counts the covered"):
        visualize.occlusion(covered, image, 2)
    with pytest.raises(OptionError, match="k must be an integer of at least 1; got 0"):
        visualize.occlusion(covered, image, k=0)
    with pytest.raises(OptionError, match="there is no layer 'three' in this result; there are one, two"):
        visualize.occlusion(covered, image, layers=["three"])
    with pytest.raises(ShapeError, match="region must be bool"):
        visualize.occlusion(covered, random(3, 9, 8))
