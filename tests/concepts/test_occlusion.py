"""Covering regions: what is covered, what switches off, and the representation of concepts by several filters."""

import numpy as np
import pandas as pd
import pytest
import torch
from squares import COLOURS, SIDE, Colours, in_batches, painted, square

from captum_classfilters import PathDecoupler, concepts
from captum_classfilters.concepts.occlusion import elsewhere
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import LayerError, OptionError, ShapeError


@pytest.fixture
def by_hand():
    """A decoupler whose filter k of ``conv`` is open where the mean of colour k exceeds a threshold."""

    def make(threshold=0.01, device="cpu"):
        decoupler = PathDecoupler(Colours(), ["conv"], reduction=1)
        with torch.no_grad():
            controller = decoupler.controllers[0]
            for layer, bias in ((controller.squeeze, 0.0), (controller.excite, -threshold)):
                layer.weight.copy_(torch.eye(3))
                layer.bias.fill_(bias)
        return decoupler.eval().to(device)

    return make


@pytest.fixture
def scene():
    """Two images, each with a red and a green square, and one with a blue as well."""
    masks = [
        {"red": square(0, 0), "green": square(8, 8)},
        {"red": square(4, 8), "green": square(12, 0), "blue": square(12, 12)},
    ]
    return painted(masks), masks


HALF = {"conv": torch.full((3,), 0.5)}


def regions(masks, name):
    return torch.stack([each[name] for each in masks])


@pytest.mark.parametrize(("value", "expected"), [("mean", None), ("black", 0), (0.25, 0.25), ([0.1, 0.2, 0.3], None)])
def test_the_region_is_covered_and_nothing_else(scene, value, expected):
    images, masks = scene
    red = regions(masks, "red")
    before = images.clone()
    covered = concepts.occlude(images, red, value)
    assert torch.equal(images, before)
    for n in range(2):
        for c in range(3):
            outside = ~red[n].numpy()
            np.testing.assert_array_equal(covered[n, c].numpy()[outside], images[n, c].numpy()[outside])
            want = {None: images[n, c].numpy()[outside].mean() if value == "mean" else None}.get(expected, expected)
            want = value[c] if isinstance(value, list) else want
            np.testing.assert_allclose(covered[n, c].numpy()[~outside], want, rtol=1e-6, atol=1e-9)


def test_a_region_that_is_all_gets_the_mean_of_all():
    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    covered = concepts.occlude(images, torch.ones(1, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(covered, images.mean((2, 3), keepdim=True).expand_as(images))


def test_what_covers_is_checked(scene):
    images, masks = scene
    red = regions(masks, "red")
    for value in ("white", [1.0, 2.0], None, torch.zeros(3, 1)):
        with pytest.raises(OptionError, match='value must be "mean", "black", a number, or one for each of 3 colours'):
            concepts.occlude(images, red, value)
    with pytest.raises(OptionError, match=r"black is 0 only for images in \[0, 1\]"):
        concepts.occlude(images - 0.5, red, "black")
    for bad in (red[:1], red.float(), red[:, :4], red[:, None]):
        with pytest.raises(ShapeError, match=r"masks must be bool of shape \(2, 16, 16\)"):
            concepts.occlude(images, bad)
    with pytest.raises(ShapeError, match=r"must be \(N, c, H, W\) floating, got torch.uint8"):
        concepts.occlude(images.byte(), red)


@pytest.mark.parametrize("seed", range(4))
def test_elsewhere_is_the_same_region_and_apart_if_it_can_be(seed):
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.rand(3, 9, 14, generator=generator) < 0.06
    blobs[:, 2, 3] = True
    moved = elsewhere(blobs, generator)
    shifts = [(a, b) for a in range(9) for b in range(14)]
    for mask, found in zip(blobs, moved, strict=True):
        rolled = [torch.roll(mask, shift, (0, 1)) for shift in shifts]
        assert any(torch.equal(found, each) for each in rolled)
        assert int((found & mask).sum()) == min(int((each & mask).sum()) for each in rolled)
    again = elsewhere(blobs, torch.Generator().manual_seed(seed + 100))
    assert not torch.equal(moved, again)
    everything = torch.ones(1, 3, 4, dtype=torch.bool)
    assert elsewhere(everything).all()


def test_elsewhere_goes_everywhere():
    corner = square(0, 0)[None]
    generator = torch.Generator().manual_seed(0)
    reached = torch.stack([elsewhere(corner, generator)[0] for _ in range(300)]).any(0)
    assert reached.double().mean() > 0.9
    assert not reached[0:1, 0:1].all()


def test_covering_and_moving_on_every_device(device, assert_close, scene):
    images, masks = scene
    red = regions(masks, "red")
    with device.mode:
        where = images.to(device.name), red.to(device.name)
        assert_close(concepts.occlude(*where), concepts.occlude(images, red).to(device.name))
        moved = elsewhere(where[1], torch.Generator().manual_seed(0))
        assert_close(moved, elsewhere(red, torch.Generator().manual_seed(0)).to(device.name))


@pytest.mark.parametrize("colour", [0, 1])
def test_covering_a_square_switches_off_its_filter_alone(by_hand, scene, colour):
    images, masks = scene
    decoupler = by_hand()
    found = concepts.occlusion(decoupler, images, regions(masks, COLOURS[colour]), thresholds=HALF, value="black")
    assert found.layers == ("conv",)
    assert found.before[0].tolist() == [[True, True, False], [True, True, True]]
    expected = found.before[0].clone()
    expected[:, colour] = False
    assert torch.equal(found.after[0], expected)
    assert torch.equal(found.switched_off[0], found.before[0] & ~expected)
    # the enlarged map is .5 or less outside the square, and above it in all of it
    assert torch.equal(found.merged(), regions(masks, COLOURS[colour]))
    assert found.table().to_dict("list") == {
        "image": [0, 1],
        "layer": ["conv", "conv"],
        "filter": [colour, colour],
        "iou": [1.0, 1.0],
    }
    assert found.merged_iou.tolist() == [[1.0], [1.0]]
    summary = found.summary()
    assert summary.columns.tolist() == [
        "image", "layer", "control", "open", "switched_off", "low", "high", "iou",
    ]  # fmt: skip
    assert summary.control.tolist() == [False, False, True, True]
    summary, control = summary[~summary.control], summary[summary.control]
    assert summary.open.tolist() == control.open.tolist() == [2, 3]
    assert summary.switched_off.tolist() == summary.iou.tolist() == [1, 1]
    assert summary[["low", "high"]].isna().all(axis=None)
    # a region elsewhere never covers all of a square here but by chance, and part of it leaves the filter open
    assert (control.switched_off <= 0.6).all()
    assert control.switched_off.tolist() == found.elsewhere.double().mean(0).flatten().tolist()
    assert (control.low <= control.switched_off).all()
    assert (control.switched_off <= control.high).all()
    # one of the open filters at random: 1 if it is this one, else 0
    assert set(found.random_iou.unique().tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(control.iou, found.random_iou.mean(0).flatten())


def test_a_region_elsewhere_that_would_switch_a_filter_off_is_counted(by_hand):
    # half of the image is red: a region that is the other half covers it when it moves
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, :8] = True
    images = torch.zeros(1, 3, SIDE, SIDE)
    images[:, 0, 8:] = 1
    found = concepts.occlusion(by_hand(), images, mask, thresholds=HALF, value="black")
    assert found.summary().switched_off.tolist() == [0, 1]
    assert found.elsewhere.flatten().tolist() == [1] * 5
    assert found.table().empty
    assert found.table().columns.tolist() == ["image", "layer", "filter", "iou"]
    assert found.merged_iou.tolist() == [[0.0]]
    assert not found.merged().any()
    assert not found.random_iou.any()


def test_merged_fields_are_a_union_and_random_filters_are_as_many(by_hand, scene):
    images, masks = scene
    both = torch.stack([each["red"] | each["green"] for each in masks])
    found = concepts.occlusion(by_hand(), images, both, thresholds=HALF, value="black", control=Control(draws=40))
    assert found.switched_off[0].sum(1).tolist() == [2, 2]
    assert torch.equal(found.merged(["conv"]), both)
    assert found.table().iou.tolist() == [0.5] * 4
    # image 0 has just two open filters; image 1 has three, of which blue is no part of the region
    assert set(found.random_iou[:, 0].flatten().tolist()) == {1.0}
    assert {round(value, 6) for value in found.random_iou[:, 1].flatten().tolist()} == {1.0, round(1 / 3, 6)}


def test_the_table_is_sorted_and_layers_can_be_picked(small_cnn, images):
    decoupler = PathDecoupler(small_cnn(), ["conv1", "conv2"], generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for controller in decoupler.controllers:
            controller.excite.bias.fill_(-0.1)
    x, masks = images(12), torch.zeros(12, 8, 8, dtype=torch.bool)
    masks[:, 2:7, 1:6] = True
    found = concepts.occlusion(decoupler, x, masks, thresholds=0.1)
    for index, name in enumerate(("conv1", "conv2")):
        with torch.no_grad():
            before = decoupler.gates(x)[1][index] > 0
            after = decoupler.gates(concepts.occlude(x, masks))[1][index] > 0
        assert torch.equal(found.switched_off[index], before & ~after)
        single = concepts.occlusion(decoupler, x, masks, [name], thresholds=0.1)
        assert torch.equal(single.merged(), found.merged([name]))
        pd.testing.assert_frame_equal(single.table(), found.table([name]))
    table = found.table()
    assert len(table) == sum(int(each.sum()) for each in found.switched_off)
    assert len(table) > 5
    assert table.image.is_monotonic_increasing
    assert all(group.iou.is_monotonic_decreasing for _, group in table.groupby("image"))
    assert torch.equal(found.merged(), found.merged("conv1") | found.merged("conv2"))
    for n, k in ((row.image, row.filter) for row in table[table.layer == "conv2"].itertuples()):
        maps, cut = found.maps[1][n : n + 1, k : k + 1], found.thresholds[1][k : k + 1]
        iou = concepts.field_iou(concepts.receptive_fields(maps, cut, (8, 8)), masks[n : n + 1, None])
        row = table[(table.image == n) & (table["filter"] == k) & (table.layer == "conv2")]
        assert row.iou.item() == iou.item()
    thresholds = concepts.activation_thresholds(decoupler, [x], quantile=0.1)
    assert torch.equal(found.thresholds[1], thresholds["conv2"])
    with pytest.raises(OptionError, match="no layer 'conv9' in this result; there are conv1, conv2"):
        found.merged(["conv9"])


def test_the_seed_decides_the_controls_and_the_decoupler_is_given_back(by_hand, scene):
    images, masks = scene
    decoupler = by_hand().train()
    red = regions(masks, "red")

    def controls(seed):
        found = concepts.occlusion(decoupler, images, red, thresholds=HALF, control=Control(seed=seed))
        return found.random_iou.tolist()

    state = torch.get_rng_state()
    assert controls(0) == controls(0)
    assert len({str(controls(seed)) for seed in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in decoupler.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoupler.modules())


BAD_CALLS = {
    "no decoupler": (lambda d, i, r: (Colours(), i, r), {}, OptionError, "expected a PathDecoupler, got Colours"),
    "no pixel": (lambda d, i, r: (d, i, r & False), {}, OptionError, "a mask has no pixel"),
    "one mask": (lambda d, i, r: (d, i, r[:1]), {}, ShapeError, "masks must be bool"),
    "not gated": (lambda d, i, r: (d, i, r, ["last"]), {}, LayerError, "expected a gated convolution"),
    "thresholds": (lambda d, i, r: (d, i, r), {"thresholds": {"last": 0}}, OptionError, "have no layer 'conv'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(by_hand, scene, case):
    images, masks = scene
    arguments, options, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        concepts.occlusion(*arguments(by_hand(), images, regions(masks, "red")), **options)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_representation_of_squares_is_known(by_hand, scene, batch_size):
    images, masks = scene
    loader = in_batches(images, masks, batch_size)
    both = concepts.concept_representation(by_hand(), loader, thresholds=HALF, value="black")
    frame, control = (both[both.control == side] for side in (False, True))
    assert frame.layer.tolist() == ["conv"] * 3
    assert frame.concept.tolist() == ["blue", "green", "red"]
    assert frame.images.tolist() == [1, 2, 2]
    assert frame.single_max.tolist() == [1, 1, 1]
    assert frame.single_mean.tolist() == [1, 1, 1]
    # no square of another image lies where one of this does
    assert control.single_mean.tolist() == [0, 0, 0]
    assert frame.multiple_max.tolist() == frame.multiple_mean.tolist() == [1, 1, 1]
    assert frame.switched_off.tolist() == [1, 1, 1]
    assert frame.none.tolist() == [0, 0, 0]
    assert frame.low[1:].tolist() == frame.high[1:].tolist() == [1, 1]
    assert np.isnan(frame.low[0])
    assert ((control.multiple_mean >= 0) & (control.multiple_mean < 1)).all()
    assert (control.switched_off <= 0.6).all()
    assert control[["multiple_max", "none"]].isna().all(axis=None)
    assert control.concept.tolist() == frame.concept.tolist()


def test_representation_is_the_mean_of_occlusions(small_cnn, images):
    decoupler = PathDecoupler(small_cnn(), ["conv1", "conv2"], generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for controller in decoupler.controllers:
            controller.excite.bias.fill_(-0.1)
    x = images(6)
    generator = torch.Generator().manual_seed(0)
    eye, cup = (torch.rand(6, 8, 8, generator=generator) < 0.5 for _ in range(2))
    masks = [{"eye": eye[n], "cup": cup[n]} if n % 2 else {"cup": cup[n]} for n in range(6)]
    thresholds = concepts.activation_thresholds(decoupler, [x], quantile=0.2)
    frame = concepts.concept_representation(decoupler, in_batches(x, masks, 4), thresholds=thresholds, value=2.0)
    control = frame[frame.control].set_index(["layer", "concept"])
    frame = frame[~frame.control].set_index(["layer", "concept"])
    for name, rows, regions in (("eye", [1, 3, 5], eye), ("cup", list(range(6)), cup)):
        found = concepts.occlusion(decoupler, x[rows], regions[rows], thresholds=thresholds, value=2.0)
        for index, layer in enumerate(found.layers):
            row, iou = frame.loc[(layer, name)], found.merged_iou[:, index]
            assert row.multiple_mean == pytest.approx(iou.mean().item())
            assert row.multiple_max == pytest.approx(iou.max().item())
            off = found.switched_off[index].sum(1).double()
            assert row.switched_off == pytest.approx(off.mean().item())
            assert row.none == pytest.approx((off == 0).double().mean().item())
            half = 1.96 * iou.std() / len(iou) ** 0.5
            assert (row.low, row.high) == pytest.approx(((iou.mean() - half).item(), (iou.mean() + half).item()))
    assert frame.multiple_mean.nunique() > 2
    assert control.switched_off.max() > 0
    assert control.multiple_mean.nunique() > 2


def test_photographs_with_boxes(monkeypatch, small_cnn):
    pytest.importorskip("skimage")
    pytest.importorskip("foolbox")
    from pathlib import Path

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tutorials" / "recipes")
    import photo_concepts

    names, images, masks = photo_concepts.load(56)
    assert images.shape == (10, 3, 56, 56)
    assert len(names) == len(masks) == 10
    assert 0 <= images.min() < 0.05
    assert 0.95 < images.max() <= 1
    shares = [mask.double().mean().item() for each in masks for mask in each.values()]
    assert min(shares) > 0.001
    assert max(shares) < 0.5
    assert all(torch.tensor(box).diff().numel() and 0 <= box[0] < box[2] <= 224 and 0 <= box[1] < box[3] <= 224
               for each in photo_concepts.BOXES.values() for boxes in each.values() for box in boxes)  # fmt: skip
    # the coffee's cup is brighter than its table, the cat's eyes are greener than its nose is
    cat = images[names.index("chelsea.png")]
    eyes, nose = (masks[names.index("chelsea.png")][concept] for concept in ("eye", "nose"))
    assert (cat[1] - cat[0])[eyes].mean() > (cat[1] - cat[0])[nose].mean()
    loader = photo_concepts.batches(56, 4, (0.5,) * 3, (0.25,) * 3)
    frame = concepts.concept_scores(small_cnn(), loader, ["bn2"])
    assert set(frame.concept.dropna()) <= {"head", "eye", "nose", "wheel", "window", "cup"}
    decoupler = PathDecoupler(small_cnn(), ["conv2"])
    assert len(concepts.concept_representation(decoupler, loader)) == 12


def test_fields_that_overlap_are_merged(by_hand):
    mask = square(4, 4)
    yellow = painted([{"red": mask, "green": mask}])
    found = concepts.occlusion(by_hand(), yellow, mask[None], thresholds=HALF, value="black")
    assert found.switched_off[0].tolist() == [[True, True, False]]
    assert torch.equal(found.merged(), mask[None])
