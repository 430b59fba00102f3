"""Localisation against masks and boxes that the loader brings, and the metrics of filters on every device."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from captum_classfilters import HeadPass, InfluentialFeatures, metrics
from captum_classfilters.assets import load_demo_network, load_images
from captum_classfilters.core.errors import HeadError, OptionError, ShapeError
from captum_classfilters.metrics.localisation import box_objects, mask_objects


@pytest.fixture
def task(small_cnn, images):
    """A network, a table, 20 images, and an object in each."""
    model, x, y = small_cnn(), images(20), torch.arange(20) % 4
    filters = InfluentialFeatures(model).attribute([(x, y)], selector="margin")
    corner = torch.randint(0, 4, (20, 2), generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corner, corner + torch.tensor([3, 4])], dim=1).float()
    masks = torch.zeros(20, 8, 8, dtype=torch.bool)
    for n, (left, top, right, bottom) in enumerate(boxes.long().tolist()):
        masks[n, top:bottom, left:right] = True
    return model, filters, (x, y), masks, boxes


def in_batches(parts, size):
    return list(zip(*(torch.split(part, size) for part in parts), strict=True))


def test_masks_and_boxes_are_read_wherever_they_stand(task):
    model, filters, (x, y), masks, boxes = task
    expected = metrics.localisation(model, filters, [(x, y)], 2, silhouette=lambda images: masks)
    assert expected.iou.nunique() > 1
    names = ["filters", "control"]
    loaders = {
        "mask": [
            [(x, y, masks)],
            in_batches((x, y, masks), 7),
            [(x, y, masks[:, None].float())],
            [(x, y, masks.byte(), "where it came from")],
            [{"image": x, "label": y, "mask": masks}],
            [{"image": x, "label": y, "masks": masks.long(), "box": 0 * boxes}],
            [(x, y, {"mask": masks})],
        ],
        "box": [
            [(x, y, boxes)],
            in_batches((x, y, boxes.long()), 7),
            [{"images": x, "labels": y, "boxes": boxes}],
            [{"images": x, "labels": y, "box": boxes, "mask": masks[:3]}],
        ],
    }
    for silhouette, forms in loaders.items():
        for loader in forms:
            frame = metrics.localisation(model, filters, loader, 2, silhouette=silhouette)
            np.testing.assert_allclose(frame.drop(columns=names), expected.drop(columns=names), atol=1e-12)


class Spot(nn.Module):
    """Two channels: the picture itself, and its negative; class 0 wants the one, class 1 the other."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Conv2d(1, 2, 1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.maps.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            self.fc.weight.copy_(torch.eye(2))

    def forward(self, x):
        return self.fc(self.pool(self.maps(x)).flatten(1))


@pytest.fixture
def spots():
    """Four images of a square, and the table of the weights."""
    images = torch.zeros(4, 1, 8, 8)
    for n in range(4):
        images[n, 0, n : n + 3, 2:5] = 1.0
    filters = InfluentialFeatures(Spot()).attribute([(images, torch.tensor([0, 0, 1, 1]))], selector="weight")
    return images, filters


def row(frame, name):
    return frame[frame.filters == name].iloc[0]


def test_a_map_that_is_the_object_and_one_that_is_not(spots):
    images, filters = spots
    for label, expected in ((0, 1.0), (1, 0.0)):
        found = row(metrics.localisation(Spot(), filters, [(images, torch.full((4,), label))], 1), "weight")
        assert (found.pointing, found.iou) == (expected, expected)
        assert found.chance == pytest.approx(9 / 64)
        assert found.chance_iou == pytest.approx(9 / 64 / (2 - 9 / 64))
    # both channels with the same weight cancel out
    loader = [(images, torch.tensor([0, 0, 1, 1]))]
    even = metrics.localisation(Spot(), filters, loader, 1, channel_weights="ones")
    assert row(even, "all channels").iou < 0.5


def test_a_flat_map_scores_what_pointing_by_chance_would(spots):
    _, filters = spots
    images = torch.zeros(2, 1, 8, 8)
    images[:, 0, :4] = 1.0  # the upper half: where a sort of equal values would point
    dead = Spot()
    with torch.no_grad():
        dead.maps.weight.zero_()
    found = row(metrics.localisation(dead, filters, [(images, torch.tensor([0, 0]))], 1), "weight")
    assert found.pointing == pytest.approx(0.5)


def test_a_box_that_is_the_object_and_one_that_is_not(spots):
    images, filters = spots
    there, elsewhere = torch.tensor([[2.0, 0, 5, 3]]), torch.tensor([[5.0, 5, 8, 8]])
    for boxes, score in ((there, 1), (elsewhere, 0)):
        loader = [(images[:1], torch.tensor([0]), boxes)]
        found = metrics.localisation(Spot(), filters, loader, 1, silhouette="box").iloc[0]
        assert (found.pointing, found.iou, found.chance) == (score, score, 9 / 64)


def test_real_images_have_their_controls():
    model, _ = load_demo_network()
    sample = load_images("test")
    loader = sample.batches(100)[:2]
    tables = InfluentialFeatures(model).attribute(loader, selector=["histogram", "margin", "random"])
    frame = metrics.localisation(model, tables, loader, 5)
    assert list(frame.filters) == ["histogram", "margin", "all channels", "random"]
    assert list(frame.control) == [False] * 3 + [True]
    assert (frame.low <= frame.pointing).all()
    assert (frame.pointing <= frame.high).all()
    assert row(frame, "margin").pointing > row(frame, "margin").chance


def test_a_head_pass_stands_for_model_and_loader(task):
    model, filters, (x, y), masks, _ = task
    expected = metrics.localisation(model, filters, [(x, y, masks)], 2, silhouette="mask")
    head_pass = HeadPass(model, in_batches((x, y, masks), 7))
    found = metrics.localisation(head_pass, filters, k=2, silhouette="mask")
    pd.testing.assert_frame_equal(found, expected)


def test_foreground_is_what_is_not_black():
    images = torch.zeros(1, 3, 2, 2)
    images[0, :, 0, 1] = 0.8
    images[0, :, 1, 0] = 0.05
    assert metrics.foreground(images).tolist() == [[[False, True], [False, False]]]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_box_holds_the_pixels_whose_centres_it_holds(seed):
    corners = torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(seed)) * 12 - 1
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1)
    found = box_objects(boxes, (6, 7, 9))
    for n, y, x in product(range(6), range(7), range(9)):
        left, top, right, bottom = boxes[n].tolist()
        assert found[n, y, x] == (left <= x + 0.5 < right and top <= y + 0.5 < bottom)
    assert 0 < found.float().mean() < 1


def test_objects_stay_on_the_device(device, assert_close):
    with device.mode:
        boxes = torch.tensor([[0.0, 0, 2, 1], [1, 0, 3, 2]]).to(device.name)
        expected = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 1, 1]]]).bool().to(device.name)
        assert_close(box_objects(boxes, (2, 2, 3)), expected)
        assert_close(mask_objects(expected[:, None].float(), (2, 2, 3)), expected)


BAD_OBJECTS = {
    "no mask": ("mask", lambda m, b: (), OptionError, 'silhouette="mask" needs a tensor in every.*got nothing'),
    "no box": ("box", lambda m, b: (), OptionError, 'silhouette="box" needs a tensor in every batch.*got nothing'),
    "a mask in words": ("mask", lambda m, b: ("an object",), OptionError, "got str"),
    "a box in words": ("box", lambda m, b: ("an object",), OptionError, "got str"),
    "another word": ("boxes", lambda m, b: (b,), OptionError, "must be a function of images"),
    "small masks": (
        "mask", lambda m, b: (m[:, ::2, ::2],), ShapeError, r"images' shape \(20, 8, 8\).*got \(20, 4, 4\); resize",
    ),
    "bytes": ("mask", lambda m, b: (m.byte() * 255,), ShapeError, r"got torch\.uint8 up to 255; pass masks > 0"),
    "two boxes": (
        "box", lambda m, b: (b[:, None].repeat(1, 2, 1),), ShapeError, r"have shape \(20, 4\).*got \(20, 2, 4\)",
    ),
    "left of right": ("box", lambda m, b: (b[:, [2, 1, 0, 3]],), ShapeError, "must have x1 < x2 and y1 < y2"),
    "upside down": ("box", lambda m, b: (b[:, [0, 3, 2, 1]],), ShapeError, "must have x1 < x2 and y1 < y2"),
    "NaN": ("box", lambda m, b: (b * float("nan"),), ShapeError, "must have x1 < x2 and y1 < y2"),
    "shares": ("box", lambda m, b: (b / 8,), ShapeError, r"in pixels, got no number above .*its width 8 and height 8"),
    "no object": ("mask", lambda m, b: (m & False,), OptionError, "gives no image both an object and a background"),
    "negative": (metrics.foreground, lambda m, b: (), OptionError, "pixels are negative"),
    "no bool": (lambda images: images, lambda m, b: (), ShapeError, "silhouette must give bool of shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OBJECTS)
def test_objects_that_do_not_fit_are_refused(task, case):
    model, filters, (x, y), masks, boxes = task
    silhouette, parts, error, message = BAD_OBJECTS[case]
    with pytest.raises(error, match=message):
        metrics.localisation(model, filters, [(x - 1, y, *parts(masks, boxes))], 2, silhouette=silhouette)


def test_what_does_not_fit_otherwise_is_refused(task, spots):
    model, filters, (x, y), masks, boxes = task
    loader = [(x, y, masks)]
    with pytest.raises(OptionError, match=r"keys \['mask', 'masks'\], got nothing"):
        metrics.localisation(model, filters, [{"image": x, "label": y, "box": boxes}], 2, silhouette="mask")
    with pytest.raises(OptionError, match="channel_weights"):
        metrics.localisation(model, filters, loader, 2, channel_weights="all", silhouette="mask")
    with pytest.raises(OptionError, match=r"k must be an integer in \[1, 6\]"):
        metrics.localisation(model, filters, loader, 7, silhouette="mask")
    counts = filters.counts.clone()
    counts[3] = 0
    with pytest.raises(OptionError, match=r"table 'margin' has no samples of \['3'\]"):
        metrics.localisation(model, replace(filters, counts=counts), loader, 2, silhouette="mask")
    with pytest.raises(HeadError, match="has a single position"):
        metrics.localisation(Spot(), spots[1], [(torch.ones(2, 1, 1, 1), torch.tensor([0, 1]))], 1)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 4))
    with pytest.raises(HeadError, match="no feature map"):
        metrics.localisation(flat, filters, loader, 2)


def test_the_stream_gives_what_else_a_batch_had(small_cnn, images):
    x, y = images(2), torch.tensor([0, 1])
    given = {"image": x, "label": y, "name": "a"}
    for raw, expected in (((x, y), ()), ([x, y, 1, "b"], (1, "b")), (given, given), (x, ())):
        with HeadPass(small_cnn(), [raw]).batches(need_labels=False) as stream:
            assert [batch.extras for batch in stream] == [expected]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_metrics_follow_the_model(small_cnn, images, where):
    """Whole functions, which end in numbers, so not on a fake device: on a GPU as on the CPU."""
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x, y = images(40), torch.arange(40) % 4
    names = tuple("abcd")
    filters = InfluentialFeatures(small_cnn()).attribute([(x, y)], selector="margin", class_names=names)
    calls = {
        "weights": lambda model: metrics.filter_correlation(model, [x]),
        "activations": lambda model: metrics.filter_correlation(model, [x[:9], x[9:]], kind="activations"),
        "inter": lambda model: metrics.inter_class_correlation(model, [(x, y)], 2).drop(columns="kind"),
        "confusion": lambda model: metrics.masked_confusion(model, filters, [(x, y)], ["a"], k=2)["share"],
        "masking": lambda model: metrics.class_masking(model, filters, [(x, y)], k=2)["recall"],
        "similarity": lambda model: metrics.gate_similarity(model, filters, [(x, y)])["similarity"],
        "clusters": lambda model: metrics.feature_clusters(model, filters, [(x, y)], n_init=1)["cosine"],
        "information": lambda model: metrics.mutual_information(model, [(x, y)])["mi"],
        "box": lambda model: metrics.localisation(
            model, filters, [(x, y, torch.tensor([[1, 2, 5, 6]] * 40))], 2, silhouette="box"
        )["iou"],
    }
    with torch.backends.cudnn.flags(enabled=False):
        for name, call in calls.items():
            found, expected = call(small_cnn(device=where)), call(small_cnn())
            np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=2e-2, err_msg=name)
