"""`filter_cards`: the right images, the right maps, however the loader is cut."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_classfilters.core.errors import EmptyLoaderError, OptionError, ShapeError
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.visualize import cards as drawing
from captum_classfilters.visualize import filter_cards

NAMES = ("cat", "dog", "a class with a very long name")
SCORES = [[1, 3, 2, 0], [4, 0, 1, 2], [0, 0, 5, 1]]


class Bytes(nn.Module):
    def forward(self, images):
        return images.float() / 255


def network(colours=1, activation=None, first=None, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(colours, 4, 3), activation or nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    if activation is None:
        with torch.no_grad():
            layers[0].bias += 0.4  # so that the channels fire
    return nn.Sequential(*([first] if first else []), *layers)


def pictures(count=12, colours=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, colours, 8, 8, generator=generator), torch.arange(count) % 3


def cut(images, labels, size):
    return list(zip(images.split(size), labels.split(size), strict=True))


def reference(model, images, channel, count):
    """By hand: which images activate the channel most, how much, and their maps."""
    with torch.no_grad():
        maps = model[:-3](images)[:, channel]
    activation = maps.mean((1, 2))
    best = sorted(range(len(images)), key=lambda i: (-float(activation[i]), i))[:count]
    return best, activation[best], maps[best]


def clipped(spread):
    """As Captum's documentation says: the largest values, which hold 2 % of the total, become 1."""
    total, running = spread.sum(dtype=np.float64), 0.0
    for value in np.sort(spread.ravel()):
        running += float(value)
        if running >= 0.98 * total:
            return np.clip(spread / value, 0, 1)
    raise AssertionError


def titles(axes):
    return [[ax.get_title() for ax in line] for line in axes]


@pytest.mark.parametrize(("size", "colours"), [(1, 1), (5, 3), (12, 1)])
def test_each_row_shows_the_images_that_activate_its_channel_most(table, inside, size, colours):
    model, (images, labels) = network(colours), pictures(colours=colours)
    filters = table(SCORES, layer="4", names=NAMES)
    axes = filter_cards(model, filters, "dog", cut(images, labels, size), k=2, images=3)
    assert axes.shape == (2, 3)
    for line, channel, rate in zip(axes, [0, 3], ["0.4", "0.2"], strict=True):
        best, activation, maps = reference(model, images, channel, 3)
        weight = model[-1].weight[1, channel].item()
        assert line[0].get_ylabel() == f"channel {channel}\nscore {rate} per sample\nweight {weight:+.2f}"
        for ax, index, value, channel_map in zip(line, best, activation.tolist(), maps, strict=True):
            name = NAMES[labels[index]]
            shown = name if len(name) <= 24 else f"{name[:23]}…"
            assert ax.get_title().split() == [*shown.split(), f"{value:#.3g}"]
            assert ax.title.get_fontweight() == ("bold" if name == "dog" else "normal")
            grey, overlay = ax.images
            np.testing.assert_allclose(grey.get_array(), images[index].mean(0) * 255, atol=1)
            assert grey.get_clim() == (0, 255)
            spread = F.interpolate(channel_map[None, None], (8, 8), mode="bilinear")[0, 0].numpy()
            assert (spread > 0).mean() > 0.5  # a dead map would prove nothing
            np.testing.assert_allclose(overlay.get_array(), clipped(spread), rtol=1e-4)
    inside(axes[0, 0])


def test_ties_go_to_the_earlier_image_whatever_the_batches(table):
    model = network()
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    images, labels = image.expand(6, 1, 8, 8), torch.tensor([2, 0, 1, 1, 0, 2])
    filters = table(SCORES, layer="4", names=NAMES)
    for size in (1, 2, 6):
        axes = filter_cards(model, filters, 0, cut(images, labels, size), k=1, images=2)
        assert [ax.get_title().split()[0] for ax in axes[0]] == ["a", "cat"]


def test_the_pass_keeps_no_more_than_it_shows(table, monkeypatch):
    kept = []

    class Spy(drawing._Gallery):
        def add(self, batch):
            super().add(batch)
            kept.append([card for line in self.cards for card in line])

    monkeypatch.setattr(drawing, "_Gallery", Spy)
    images, labels = pictures(60)
    filter_cards(network(), table(SCORES, layer="4", names=NAMES), "cat", cut(images, labels, 10), k=2, images=3)
    assert [len(now) for now in kept] == [6] * 6
    for card in kept[-1]:
        for tensor in (card.image, card.map):
            # a view would keep its whole batch
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_loader_that_can_be_read_once_is_read_once(table):
    images, labels = pictures()
    stream = iter(cut(images, labels, 4))
    once = filter_cards(network(), table(SCORES, layer="4", names=NAMES), "cat", stream, k=1)
    again = filter_cards(network(), table(SCORES, layer="4", names=NAMES), "cat", cut(images, labels, 4), k=1)
    assert titles(once) == titles(again)


@pytest.mark.parametrize("dead", [0.0, -1.0])
def test_a_channel_that_never_fires_is_drawn_without_a_map(table, dead):
    model, (images, labels) = network(), pictures()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = dead
    axes = filter_cards(model, table(SCORES, layer="4", names=NAMES), "cat", cut(images, labels, 5), k=1, images=2)
    for ax, image in zip(axes[0], images, strict=False):
        assert len(ax.images) == 1
        np.testing.assert_allclose(ax.images[0].get_array(), image[0] * 255, rtol=1e-5)
        assert ax.images[0].get_clim() == (0, 255)
    assert axes[0, 0].get_title() == "cat  0.00"


def test_a_faint_map_is_drawn_like_any_other(table):
    model, (images, labels) = network(), pictures()
    with torch.no_grad():
        model[0].weight *= 1e-9
        model[0].bias *= 1e-9
    axes = filter_cards(model, table(SCORES, layer="4", names=NAMES), "cat", cut(images, labels, 5), k=3)
    fired = [ax for ax in axes.flat if len(ax.images) == 2]
    assert fired
    assert all(ax.images[1].get_array().max() == pytest.approx(1) for ax in fired)


def test_maps_below_zero_are_drawn_with_both_signs(table):
    model, (images, labels) = network(activation=nn.SiLU()), pictures()
    axes = filter_cards(model, table(SCORES, layer="4", names=NAMES), "cat", cut(images, labels, 5), k=4, images=1)
    drawn = np.stack([ax.images[1].get_array() for ax in axes.flat])
    assert axes[0, 0].images[1].get_clim() == (-1, 1)
    assert drawn.min() < 0
    colours = axes[0, 0].images[1].cmap
    assert colours(0.5)[3] < 0.02  # zero leaves the picture as it is
    assert colours(0.0)[2] > colours(0.0)[0]
    assert colours(1.0)[0] > colours(1.0)[2]


@pytest.mark.parametrize(
    ("scale", "shift", "image_range", "black_and_white"),
    [(1.0, 0.0, None, (0, 1)), (0.2, 0.1, None, (0, 1)), (4.0, -2.0, None, None), (4.0, -2.0, (-2.0, 2.0), (-2, 2))],
)
def test_pixels_are_scaled_by_the_range(table, scale, shift, image_range, black_and_white):
    model, (images, labels) = network(), pictures(3)
    images = images * scale + shift
    axes = filter_cards(
        model, table(SCORES, layer="4", names=NAMES), "dog", [(images, labels)], k=1, images=3, image_range=image_range
    )
    best, _, _ = reference(model, images, 0, 3)
    low, high = black_and_white or (float(images.min()), float(images.max()))
    for ax, index in zip(axes[0], best, strict=True):
        expected = (images[index, 0] - low) / (high - low) * 255
        np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1)


def test_bytes_run_from_0_to_255(table):
    images, labels = pictures()
    images = (images * 100).to(torch.uint8)
    axes = filter_cards(
        network(first=Bytes()), table(SCORES, layer="5", names=NAMES), "dog", [(images, labels)], k=1, images=1
    )
    (ax,) = axes[0]
    assert any(np.allclose(ax.images[0].get_array(), image[0], atol=1) for image in images)


def test_without_labels_titles_say_the_activation(table):
    images, _ = pictures()
    axes = filter_cards(network(), table(SCORES, layer="4", names=NAMES), "dog", [images], k=1, images=2)
    assert all(float(ax.get_title()) > 0 for ax in axes[0])


def test_too_few_images_leave_empty_axes(table, inside):
    images, labels = pictures(2)
    axes = filter_cards(network(), table(SCORES, layer="4", names=NAMES), "dog", [(images, labels)], k=2, images=3)
    assert [[ax.axison for ax in line] for line in axes] == [[True, True, False]] * 2
    inside(axes[0, 0])


@pytest.mark.parametrize(("k", "images"), [(1, 1), (2, 6)])
def test_pages_fit_with_long_class_names(table, inside, k, images):
    pixels, labels = pictures()
    filters = table(SCORES, layer="4", names=NAMES)
    axes = filter_cards(network(), filters, NAMES[2], [(pixels, torch.full_like(labels, 2))], k=k, images=images)
    inside(axes[0, 0])
    boxes = [ax.title.get_window_extent() for ax in axes[0]]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_a_head_pass_stands_for_model_and_loader(table):
    filters, model = table(SCORES, layer="4", names=NAMES), network()
    axes = filter_cards(HeadPass(model, [pictures()], layer="4"), filters, "dog", k=1, images=2)
    assert titles(axes) == titles(filter_cards(model, filters, "dog", [pictures()], k=1, images=2))


def test_scores_that_are_no_sums_are_not_divided(table):
    axes = filter_cards(network(), table(SCORES, layer="4", names=NAMES, merge="same"), "dog", [pictures()], k=1)
    assert axes[0, 0].get_ylabel().split("\n")[1] == "score 4"


def test_given_axes_are_used_and_no_figure_made(table):
    figure, axes = plt.subplots(2, 3)
    filters = table(SCORES, layer="4", names=NAMES)
    axes[0, 0].imshow(np.eye(3), vmin=0, vmax=7)
    assert filter_cards(network(), filters, "dog", [pictures()], k=2, images=3, ax=axes) is axes
    assert plt.get_fignums() == [figure.number]
    assert axes[0, 0].images[0].get_clim() == (0, 7)  # what was there is left alone
    assert all(ax.images for ax in axes.flat)


def test_the_model_is_given_back(table):
    model = network().train()
    model[1].eval()
    filter_cards(model, table(SCORES, layer="4", names=NAMES), "dog", [pictures()])
    assert model.training
    assert not model[1].training
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("class_name", "arguments", "message"),
    [
        ("horse", {}, "no class is named 'horse'; the names are: cat, dog"),
        (7, {}, r"a class must be an integer in \[0, 2\], its index, or a name; got 7"),
        ("cat", {}, "class 'cat' has no samples in the table"),
        ("dog", {"k": 0}, r"k must be an integer in \[1, 4\]"),
        ("dog", {"k": 5}, r"k must be an integer in \[1, 4\]"),
        ("dog", {"images": 0}, "images must be an integer of at least 1; got 0"),
        ("dog", {"images": True}, "images must be an integer of at least 1; got True"),
        ("dog", {"image_range": (1, 0)}, r"image_range must be two numbers, black below white.*got \(1, 0\)"),
        ("dog", {"image_range": 255}, "image_range must be two numbers"),
        ("dog", {"image_range": "ab"}, "image_range must be two numbers"),
        ("dog", {"ax": np.empty((3, 3), object)}, r"array of 3 x 4 axes, got \(3, 3\)"),
        ("dog", {"ax": np.empty((3, 4), object)}, "array of 3 x 4 axes"),
        ("dog", {"ax": 5}, "array of 3 x 4 axes, got int"),
    ],
)
def test_filter_cards_refuses_before_any_work(table, class_name, arguments, message):
    def untouched():
        pytest.fail("the loader was read")
        yield

    filters = table(SCORES, [0, 10, 10], names=NAMES, layer="4")
    with pytest.raises(OptionError, match=message):
        filter_cards(network(), filters, class_name, untouched(), **arguments)
    assert plt.get_fignums() == []


def test_what_does_not_fit_together_is_refused(table):
    with pytest.raises(OptionError, match="must be a ClassFilters, got dict"):
        filter_cards(network(), {}, "dog", [pictures()])
    with pytest.raises(ShapeError, match=r"the table is 3 classes x 5 channels of layer 'fc', the head '4' is 3 x 4"):
        filter_cards(network(), table(torch.rand(3, 5), names=NAMES), "dog", [pictures()])
    # a shape that fits by chance
    with pytest.raises(ShapeError, match="3 classes x 4 channels of layer 'fc', the head '4'"):
        filter_cards(network(), table(SCORES, names=NAMES), "dog", [pictures()])
    with pytest.raises(OptionError, match="a HeadPass has its own loader"):
        filter_cards(HeadPass(network(), [pictures()]), table(SCORES, layer="4", names=NAMES), "dog", [pictures()])
    with pytest.raises(EmptyLoaderError):
        filter_cards(network(), table(SCORES, layer="4", names=NAMES), "dog", [])
    flat = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ShapeError, match="there is nothing to draw"):
        filter_cards(flat, table(SCORES, layer="2", names=NAMES), "dog", [(torch.rand(5, 6), torch.arange(5) % 3)])
    assert plt.get_fignums() == []


def test_inputs_that_are_no_images_are_refused(table):
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *network())
    with pytest.raises(
        ShapeError, match=r"expected images \(N, colours, H, W\), .* among the inputs, got \[\(5, 64\)\]"
    ):
        filter_cards(model, table(SCORES, layer="5", names=NAMES), "dog", [(torch.rand(5, 64), torch.arange(5) % 3)])
