"""Localisation against masks and boxes that the loader brings, and the metrics of filters on every device."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from captum_classfilters import InfluentialFeatures, metrics
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head_pass import batches
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
    for silhouette, given in loaders.items():
        for loader in given:
            frame = metrics.localisation(model, filters, loader, 2, silhouette=silhouette)
            np.testing.assert_allclose(frame.drop(columns="filters"), expected.drop(columns="filters"), atol=1e-12)


def test_a_mask_that_is_the_map_is_found():
    class Spot(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.fc = nn.Conv2d(1, 2, 1, bias=False), nn.Linear(2, 2, bias=False)
            with torch.no_grad():
                self.maps.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
                self.fc.weight.copy_(torch.eye(2))

        def forward(self, x):
            return self.fc(self.maps(x).mean((2, 3)))

    x = torch.zeros(2, 1, 8, 8)
    x[:, 0, 2:5, 1:4] = 1
    y = torch.tensor([0, 0])
    filters = InfluentialFeatures(Spot()).attribute([(x, torch.tensor([0, 1]))], selector="weight")
    there, elsewhere = torch.tensor([[1.0, 2, 4, 5]] * 2), torch.tensor([[5.0, 5, 8, 8]] * 2)
    for boxes, score in ((there, 1), (elsewhere, 0)):
        found = metrics.localisation(Spot(), filters, [(x, y, boxes)], 1, silhouette="box").iloc[0]
        assert (found.pointing, found.iou, found.chance) == (score, score, 9 / 64)


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


def test_objects_that_do_not_fit_are_refused(task):
    model, filters, (x, y), masks, boxes = task

    def score(silhouette, *parts):
        return metrics.localisation(model, filters, [(x, y, *parts)], 2, silhouette=silhouette)

    for kind in ("mask", "box"):
        with pytest.raises(OptionError, match=f'silhouette="{kind}" needs a tensor in every batch.*got no such thing'):
            score(kind)
        with pytest.raises(OptionError, match="got str"):
            score(kind, "an object")
    with pytest.raises(OptionError, match=r"keys \['mask', 'masks'\], got no such thing"):
        metrics.localisation(model, filters, [{"image": x, "label": y, "box": boxes}], 2, silhouette="mask")
    with pytest.raises(OptionError, match="must be a function of images"):
        score("boxes", boxes)
    with pytest.raises(ShapeError, match=r"masks must have shape \(20, 8, 8\).*got \(20, 4, 4\); resize"):
        score("mask", masks[:, ::2, ::2])
    with pytest.raises(ShapeError, match=r"got torch\.uint8 up to 255; pass masks > 0"):
        score("mask", masks.byte() * 255)
    with pytest.raises(ShapeError, match=r"boxes must have shape \(20, 4\).*got \(20, 2, 4\)"):
        score("box", boxes[:, None].repeat(1, 2, 1))
    for wrong in (boxes[:, [2, 1, 0, 3]], boxes[:, [0, 3, 2, 1]], boxes * float("nan")):
        with pytest.raises(ShapeError, match="must have x1 < x2 and y1 < y2"):
            score("box", wrong)
    with pytest.raises(ShapeError, match=r"must be in pixels, got none above .*multiply by its width 8 and height 8"):
        score("box", boxes / 8)
    with pytest.raises(OptionError, match="no image has an object"):
        score("mask", masks & False)


def test_the_stream_gives_what_else_a_batch_had(small_cnn, images):
    x, y = images(2), torch.tensor([0, 1])
    given = {"image": x, "label": y, "name": "a"}
    for raw, expected in (((x, y), ()), ([x, y, 1, "b"], (1, "b")), (given, given), (x, ())):
        with batches(small_cnn(), [raw], need_labels=False) as stream:
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
