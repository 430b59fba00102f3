"""Receptive fields, thresholds and interpretability scores, on squares of colours whose answers are known."""

import itertools

import numpy as np
import pytest
import torch
from squares import Colours, in_batches, numpy_upsample, painted, square
from torch import nn
from torch.utils.data import DataLoader

from captum_classfilters import PathDecoupler, concepts, metrics
from captum_classfilters.core.errors import EmptyLoaderError, LayerError, NonFiniteError, OptionError, ShapeError


@pytest.fixture
def squares():
    """Eight images: a red square in each, a green one in half of them; none touches that of another image."""
    places = [(4 * (n // 4), 4 * (n % 4)) for n in range(8)]
    masks = [{"red": square(*place)} for place in places]
    for n in range(0, 8, 2):
        masks[n]["green"] = square(8 + places[n][0], places[n][1])
    return painted(masks), masks


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [(9, 14), (3, 5), (10, 4)])
def test_fields_are_enlarged_maps_above_their_filters_threshold(seed, size):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 3, 3, 5, generator=generator)
    thresholds = torch.tensor([-0.3, 0.1, 0.6])
    found = concepts.receptive_fields(maps, thresholds, size)
    assert found.shape == (2, 3, *size)
    assert found.dtype == torch.bool
    for n in range(2):
        for k in range(3):
            large = numpy_upsample(maps[n, k].double().numpy(), *size)
            np.testing.assert_array_equal(found[n, k].numpy(), large > float(thresholds[k]))
    assert 0 < found.float().mean() < 1


def test_a_value_at_the_threshold_is_not_above_it():
    maps = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    for values in (maps, maps.half()):
        fields = concepts.receptive_fields(values, torch.tensor([2.0]), (1, 3))
        assert fields.flatten().tolist() == [False, False, True]


@pytest.mark.parametrize("autocast", [False, True])
def test_iou_counts_pixels(autocast):
    generator = torch.Generator().manual_seed(0)
    fields = torch.rand(3, 4, 60, 70, generator=generator) < 0.4
    masks = torch.rand(3, 2, 60, 70, generator=generator) < 0.5
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = concepts.field_iou(fields, masks)
    for n in range(3):
        for k in range(4):
            for t in range(2):
                a, b = fields[n, k].numpy(), masks[n, t].numpy()
                assert found[n, k, t].item() == pytest.approx((a & b).sum() / (a | b).sum(), rel=1e-12)
    empty = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert torch.isnan(concepts.field_iou(empty, empty)).all()
    assert concepts.field_iou(empty, ~empty).item() == 0


def test_fields_and_iou_on_every_device(device, assert_close):
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.randn(2, 3, 4, 4, generator=generator), torch.rand(2, 2, 8, 8, generator=generator) < 0.5
    expected = concepts.receptive_fields(maps, torch.zeros(3), (8, 8))
    with device.mode:
        fields = concepts.receptive_fields(maps.to(device.name), torch.zeros(3, device=device.name), (8, 8))
        assert_close(fields, expected.to(device.name))
        iou = concepts.field_iou(fields, masks.to(device.name))
        assert_close(iou, concepts.field_iou(expected, masks).to(device.name))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("quantile", [0.005, 0.1, 0.37])
def test_thresholds_are_numpys_quantile_of_all_responses(small_cnn, images, quantile, batch_size):
    model, x = small_cnn(), images(16)
    found = concepts.activation_thresholds(model, list(x.split(batch_size)), ["bn1", "conv2"], quantile=quantile)
    with torch.no_grad():
        expected = {"bn1": model.bn1(model.conv1(x))}
        expected["conv2"] = model.conv2(expected["bn1"].relu())
    assert list(found) == ["bn1", "conv2"]
    for name, maps in expected.items():
        values = maps.relu().transpose(0, 1).flatten(1).numpy()
        wanted = np.quantile(values, 1 - quantile, axis=1, method="inverted_cdf")
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-5, atol=1e-6)
        above = (torch.from_numpy(values) > found[name][:, None]).sum(1)
        # float32 of batches of other sizes may move the value that is the threshold itself
        assert (above <= int(quantile * values.shape[1]) + 1).all()


def test_a_share_too_small_for_one_response_still_leaves_one(images, small_cnn):
    x = images(1)
    found = concepts.activation_thresholds(small_cnn(), [x], ["bn2"], quantile=1e-6)["bn2"]
    model = small_cnn()
    with torch.no_grad():
        maps = model.bn2(model.conv2(model.bn1(model.conv1(x)).relu())).relu()
    np.testing.assert_allclose(found, np.sort(maps[0].flatten(1).numpy())[:, -2], rtol=1e-5)


def test_scores_of_squares_are_known(squares):
    images, masks = squares
    # of 8 x 8 x 8 responses of a filter, 4 of each square are 1: 32 red, 16 green, no blue; the 20th is 1, 1, 0

    def scores(share):
        frame = concepts.concept_scores(
            Colours().eval(), in_batches(images, masks, 3), ["conv"], thresholds=share, iou=0.3
        )
        assert frame.columns.tolist() == [
            "layer", "filter", "control", "concept", "score", "low", "high", "images",
        ]  # fmt: skip
        assert frame["filter"].tolist() == [0, 1, 2] * 2
        assert frame.control.tolist() == [False] * 3 + [True] * 3
        return frame[~frame.control], frame[frame.control]

    frame, _ = scores(16 / 512)
    # red: the 17th response is 1, and none is above
    assert frame.score.tolist() == [0.0, 1.0, 0.0]
    assert frame.concept.fillna("").tolist() == ["", "green", ""]
    low, high = metrics.wilson(4, 4)
    assert (frame.low[1], frame.high[1], frame.images[1]) == (float(low), float(high), 4)
    frame, control = scores(40 / 512)
    assert frame.concept.fillna("").tolist() == ["red", "green", ""]
    assert frame.score.tolist() == [1.0, 1.0, 0.0]
    # no square meets that of another image
    assert control[["score", "low", "high"]].eq(0).all(axis=None)
    assert control.concept.isna().all()
    assert (control.images == 8).all()


DRAWS = 5


def by_loops(model, images, masks, threshold):
    """IoU ``(draw, filter, image, concept)`` by loops in float64; draw d has the masks d images before; NaN: none."""
    names = sorted({name for each in masks for name in each})
    with torch.no_grad():
        maps = model.bn1(model.conv1(images)).relu().double().numpy()
    ious = np.full((DRAWS + 1, maps.shape[1], len(images), len(names)), np.nan)
    for n, k in np.ndindex(len(images), maps.shape[1]):
        field = numpy_upsample(maps[n, k], *images.shape[2:]) > threshold[k]
        for d, (t, name) in itertools.product(range(DRAWS + 1), enumerate(names)):
            mask = masks[(n - d) % len(images)].get(name)
            if mask is not None:
                ious[d, k, n, t] = (field & mask.numpy()).sum() / (field | mask.numpy()).sum()
    return names, ious


@pytest.fixture
def random_task(small_cnn, images):
    x = images(7)
    generator = torch.Generator().manual_seed(3)
    names = ("eye", "wheel", "cup")
    masks = []
    for n in range(7):
        shown = [names[0], *names[1:][: n % 3]] if n % 4 else [names[2]]
        masks.append({name: torch.rand(8, 8, generator=generator) < 0.3 for name in shown})
    return small_cnn(), x, masks


def test_scores_and_control_are_those_of_a_loop(random_task):
    model, x, masks = random_task
    thresholds = concepts.activation_thresholds(model, [x], ["bn1"], quantile=0.2)
    names, ious = by_loops(model, x, masks, thresholds["bn1"].double().numpy())
    counts = np.array([sum(name in each for each in masks) for name in names])
    shares = (ious > 0.13).sum(2) / counts  # (draw, filter, concept)
    chance = shares[1:].max(2)
    expected = [names[t] if share.max() > 0 else "" for t, share in zip(shares[0].argmax(1), shares[0], strict=True)]
    assert len(set(shares[0].max(1))) > 1
    assert len(set(chance.mean(0))) > 1
    highest, total = np.nanmax(ious, (1, 2)), np.nan_to_num(ious).max(1).sum(1)  # (draw, concept)
    for batch_size in (1, 2, 4, 7):
        loader = in_batches(x, masks, batch_size)
        both = concepts.concept_scores(model, loader, ["bn1"], thresholds=thresholds, iou=0.13)
        frame, control = (both[both.control == side] for side in (False, True))
        np.testing.assert_allclose(frame.score, shares[0].max(1))
        assert frame.concept.fillna("").tolist() == expected
        np.testing.assert_allclose(control[["score", "low", "high"]].T, metrics.mean_interval(chance))
        assert concepts.concept_scores(model, loader, ["bn1"], thresholds=0.2, iou=0.13).equals(both)
        both = concepts.concept_representation(model, loader, ["bn1"], thresholds=thresholds)
        for side, draws in ((False, slice(0, 1)), (True, slice(1, None))):
            single = both[both.control == side]
            assert single.concept.tolist() == names
            assert single.images.tolist() == counts.tolist()
            np.testing.assert_allclose(single.single_max, highest[draws].mean(0))
            np.testing.assert_allclose(single.single_mean, (total[draws] / counts).mean(0))
        assert "multiple_mean" not in both


def test_two_images_leave_one_draw_without_an_interval():
    masks = [{"red": square(0, 0)}, {"red": square(8, 8)}]
    frame = concepts.concept_scores(Colours().eval(), [(painted(masks), masks)], ["conv"])
    assert frame[frame.control].score.tolist() == [0.0] * 3
    assert frame[frame.control][["low", "high"]].isna().all(axis=None)


def test_concepts_of_few_images_can_be_left_out(random_task):
    model, x, masks = random_task
    masks = [{**each, "rare": torch.ones(8, 8)} if n == 0 else each for n, each in enumerate(masks)]
    frame = concepts.concept_scores(model, [(x, masks)], ["bn1"], thresholds=0.3, iou=0.2)
    assert (frame.concept == "rare").any()
    frame = concepts.concept_scores(model, [(x, masks)], ["bn1"], thresholds=0.3, iou=0.2, min_images=2)
    assert not (frame.concept == "rare").any()


def test_masks_are_read_however_they_come(random_task):
    model, x, masks = random_task
    expected = concepts.concept_scores(model, [(x, masks)], ["bn1"])
    names = {name for each in masks for name in each}
    stacked = {name: torch.stack([each.get(name, torch.zeros(8, 8)).float() for each in masks]) for name in names}
    samples = [(image, {name: each.get(name) for name in names}) for image, each in zip(x, masks, strict=True)]
    loaders = [
        [(x, stacked)],
        [(x, stacked | {"nowhere": None}, "labels")],
        [{"image": x, "masks": stacked, "label": "labels"}],
        [[x[:0], []], [x, [{name: mask.numpy() for name, mask in each.items()} for each in masks]]],
        DataLoader(samples, batch_size=3, collate_fn=concepts.collate_concepts),
    ]
    for loader in loaders:
        assert concepts.concept_scores(model, loader, ["bn1"]).equals(expected)


def test_means_of_layers_have_the_intervals_of_scipy(random_task):
    from scipy import stats

    model, x, masks = random_task
    scores = concepts.concept_scores(model, [(x, masks)], ["bn1", "bn2"], iou=0.1)
    frame = concepts.layer_scores(scores).set_index("layer")
    assert frame.index.tolist() == ["bn1", "bn1", "bn2", "bn2"]
    assert frame.control.tolist() == [False, True] * 2
    assert frame.filters.tolist() == [5, 5, 6, 6]
    score, chance = (scores[(scores.layer == "bn2") & (scores.control == side)].score for side in (False, True))
    gain = score.to_numpy() - chance.to_numpy()

    def interval(values):
        return stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))

    row, control = (frame[frame.control == side].loc["bn2"] for side in (False, True))
    for result, values in ((row, score), (control, chance)):
        assert result.score == pytest.approx(values.mean())
        assert (result.low, result.high) == pytest.approx(np.clip(interval(values), 0, 1))
    assert row.gain == pytest.approx(gain.mean())
    assert (row.gain_low, row.gain_high) == pytest.approx(interval(gain))
    assert control[["gain", "gain_low", "gain_high"]].isna().all()
    alone = concepts.layer_scores(scores[(scores.layer == "bn1") & (scores["filter"] == 0)])
    assert alone.filters.tolist() == [1, 1]
    assert alone[["low", "high", "gain_low"]].isna().all(axis=None)


def test_a_closed_filter_looks_nowhere(squares):
    images, masks = squares
    decoupler = PathDecoupler(Colours(), ["conv"]).eval()
    loader = in_batches(images, masks, 4)
    thresholds = {"conv": torch.full((3,), 0.5)}
    with decoupler.frozen((torch.ones(1, 3),)):
        opened = concepts.concept_scores(decoupler, loader, thresholds=thresholds)
    with decoupler.frozen((torch.tensor([[0.0, 1, 1]]),)):
        closed = concepts.concept_scores(decoupler, loader, thresholds=thresholds)
        cut = concepts.activation_thresholds(decoupler, loader)
    assert opened.layer.unique().tolist() == ["conv"]
    assert opened[~opened.control].score.tolist() == [1, 1, 0]
    assert closed[~closed.control].score.tolist() == [0, 1, 0]
    assert cut["conv"][0] == 0
    plain = concepts.concept_scores(
        decoupler.model, loader, [unit.site for unit in decoupler.units], thresholds=thresholds
    )
    assert plain.equals(opened)


class AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, images):
        maps = self.conv(images)
        maps += 100
        return maps.mean((2, 3))


def test_maps_are_read_before_an_operation_in_place(images):
    found = concepts.activation_thresholds(AddsInPlace(), [images()], ["conv"])
    assert (found["conv"] < 50).all()


def test_below_zero_is_nothing():
    model = Colours().eval()
    masks = [{"red": square(0, 0)}] * 2
    # -1 in the square, -2 elsewhere
    frame = concepts.concept_scores(model, [(painted(masks) - 2, masks)], ["conv"], thresholds=0.3)
    assert frame.score.tolist() == [0] * 6


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_given_back(random_task, training):
    model, x, masks = random_task
    model.train(training)
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    concepts.concept_scores(model, [(x, masks)], ["bn1"])
    with pytest.raises(NonFiniteError, match="maps of layer bn1"):
        concepts.concept_scores(model, [(x * torch.nan, masks)], ["bn1"])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_half_and_double_models_take_float_images(random_task):
    model, x, masks = random_task
    expected = concepts.concept_scores(model, [(x, masks)], ["bn1"])
    assert concepts.concept_scores(model.double(), [(x, masks)], ["bn1"]).score.equals(expected.score)
    assert len(concepts.concept_scores(model.bfloat16(), [(x, masks)], ["bn1"])) == 10


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (None, "say whose maps are to be read"),
        ("bn1", r"must be a list of names or modules, got str"),
        ([], "layers= is empty"),
        (["bn9"], r"expected a layer of the model, got 'bn9'; there are conv1, bn1"),
        ([nn.Conv2d(1, 1, 1)], "got a Conv2d"),
        (["fc"], r"layer fc must give maps \(N, K, h, w\), got \(7, 4\)"),
        (["relu"], "layer relu runs more than once"),
        (["unused"], "unused did not run"),
    ],
)
def test_a_layer_that_cannot_be_read_is_refused(random_task, layers, message):
    model, x, masks = random_task
    model.unused = nn.Conv2d(1, 1, 1)
    with pytest.raises(LayerError, match=message):
        concepts.concept_scores(SharedReLU(model) if layers == ["relu"] else model, [(x, masks)], layers)


def test_a_layer_is_a_name_or_a_module_and_of_a_decoupler_a_gated_one(random_task):
    model, x, masks = random_task
    assert concepts.concept_scores(model, [(x, masks)], [model.bn1]).layer.unique().tolist() == ["bn1"]
    with pytest.raises(LayerError, match="expected a gated convolution of the decoupler, got 'conv1'"):
        concepts.concept_scores(PathDecoupler(model, ["conv2"]), [(x, masks)], ["conv1"])


class SharedReLU(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.conv, self.relu = model.conv1, nn.ReLU()

    def forward(self, images):
        return self.relu(self.relu(self.conv(images)))


BAD_LOADERS = {
    "no masks": (lambda x, m: [x], ShapeError, r"batch 0 has no masks; expected \(images, masks\).*collate_concepts"),
    "a tensor": (lambda x, m: [(x, x)], ShapeError, "must be a list of one {concept: mask} for each image"),
    "too few": (lambda x, m: [(x, m[:3])], ShapeError, "has 7 images and masks of 3; give {}"),
    "too few in a stack": (
        lambda x, m: [(x, {"eye": torch.zeros(3, 8, 8)})],
        ShapeError,
        "masks of 'eye' in batch 0 are 3, for 7 images",
    ),
    "another size": (
        lambda x, m: [(x, [{name: mask[:4] for name, mask in each.items()} for each in m])],
        ShapeError,
        r"must have the image's size \(8, 8\), got \(4, 8\); resize",
    ),
    "bytes": (
        lambda x, m: [(x, [{"eye": torch.full((8, 8), 255)}] * 7)],
        ShapeError,
        "must be bool, or 0 and 1, got torch.int64",
    ),
    "two sizes": (
        lambda x, m: [(x, m), (x[:, :, :4, :4], [{}] * 7)],
        ShapeError,
        r"one size, got \(4, 4\) in batch 1 after \(8, 8\)",
    ),
    "one image": (lambda x, m: [(x[0], m)], ShapeError, r"must be a tensor \(N, c, H, W\), got \(3, 8, 8\)"),
    "no concept": (lambda x, m: [(x, [{}] * 7)], OptionError, "no image has a concept"),
    "no name": (lambda x, m: [(x, [{3: torch.ones(8, 8)}] * 7)], OptionError, "concepts must have names, got 3"),
    "one sample": (lambda x, m: [(x[:1], m[:1])], OptionError, "expected at least 2 images, got 1"),
    "empty": (lambda x, m: [], EmptyLoaderError, "the loader gave no"),
    "an iterator": (lambda x, m: iter([(x, m)]), EmptyLoaderError, "can be read only once"),
    "no loader": (lambda x, m: 3, OptionError, "expected a DataLoader or a.* of batches, got int"),
    "less when read again": (lambda x, m: Forgetful(x, m), OptionError, "must give the same each time"),
}


@pytest.mark.parametrize("case", BAD_LOADERS)
def test_bad_loaders_are_refused(random_task, case):
    model, x, masks = random_task
    make, error, message = BAD_LOADERS[case]
    with pytest.raises(error, match=message):
        concepts.concept_scores(model, make(x, masks), ["bn1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iou": 1.0}, r"iou must lie in \[0, 1\)"),
        ({"thresholds": 0}, "thresholds must be a number between 0 and 1, a share of the responses.*; got 0"),
        ({"thresholds": None}, "thresholds must be a number between 0 and 1"),
        ({"thresholds": {}}, "thresholds have no layer 'bn1'"),
        ({"min_images": 0}, "min_images must be an integer of at least 1"),
        ({"min_images": 100}, "min_images=100 images; the most that one has is"),
    ],
)
def test_bad_options_are_refused(random_task, options, message):
    model, x, masks = random_task
    with pytest.raises(OptionError, match=message):
        concepts.concept_scores(model, [(x, masks)], ["bn1"], **options)


def test_bad_calls_of_the_parts_are_refused(random_task):
    model, x, masks = random_task
    with pytest.raises(OptionError, match="quantile must be a number between 0 and 1, a share of the responses; got 0"):
        concepts.activation_thresholds(model, [x], ["bn1"], quantile=0)
    with pytest.raises(OptionError, match="got function"):
        concepts.activation_thresholds(lambda x: x, [x], ["bn1"])
    with pytest.raises(OptionError, match="gave 7 images, and 3 when read again"):
        concepts.activation_thresholds(model, Forgetful(x, masks), ["bn1"])
    with pytest.raises(ShapeError, match="pass the thresholds of these filters"):
        concepts.receptive_fields(torch.zeros(1, 2, 3, 3), torch.zeros(3), (4, 4))
    with pytest.raises(ShapeError, match="those of the same images"):
        concepts.field_iou(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))


class Forgetful:
    """A loader that gives less when it is read again."""

    def __init__(self, x, masks):
        self.parts = [[(x, masks)], [(x[:3], masks[:3])]]

    def __iter__(self):
        return iter(self.parts.pop(0) if len(self.parts) > 1 else self.parts[0])


def test_an_iou_at_the_limit_does_not_exceed_it():
    masks = [{"red": square(0, 0), "green": square(8, 8)}, {"red": square(4, 4), "green": square(12, 8)}]
    both = [{"both": each["red"] | each["green"]} for each in masks]
    thresholds = {"conv": torch.full((3,), 0.5)}
    for iou, expected in ((0.5, 0.0), (0.49, 1.0)):
        loader = [(painted(masks), both)]
        frame = concepts.concept_scores(Colours().eval(), loader, ["conv"], thresholds=thresholds, iou=iou)
        assert frame[~frame.control].score.tolist() == [expected, expected, 0.0]
