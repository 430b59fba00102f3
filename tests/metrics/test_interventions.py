"""Channels at 0: confusion and recall against scikit-learn on features masked by hand, deletion against a loop."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch import nn

from captum_classfilters import ClassFilters, ClassFiltersError, InfluentialFeatures, metrics
from captum_classfilters.core.control import Control, random_masks
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head import Head
from captum_classfilters.gating.gate import LabelSensitiveGate
from captum_classfilters.metrics.interventions import overwritten_logits

NAMES = ("coat", "bag", "boot", "dress")


class Wide(nn.Module):
    """Six features of sixteen numbers, and a head that uses them all."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(16, 6), nn.Linear(6, 4)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def penultimate(self, x):
        return self.first(x).relu()

    def forward(self, x):
        return self.fc(self.penultimate(x))


@pytest.fixture
def task():
    """A network, its table, 80 samples, the features of those."""
    model, x = Wide(), torch.randn(80, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.penultimate(x)
        # labels that it mostly gets right
        y = torch.where(torch.arange(80) % 3 > 0, model(x).argmax(1), torch.arange(80) % 4)
    filters = InfluentialFeatures(model).attribute([(x, y)], class_names=NAMES, selector="margin")
    return model, filters, (x, y), features


def in_batches(data, size):
    return list(zip(*(torch.split(part, size) for part in data), strict=True))


def by_hand(model, features, y, masked):
    with torch.no_grad():
        predicted = (features.masked_fill(masked, 0) @ model.fc.weight.T + model.fc.bias).argmax(1)
    return confusion_matrix(y, predicted, labels=range(4))


def matrix(frame, masked, control=False, what="count"):
    part = frame[(frame.masked == masked) & (frame.control == control)]
    assert list(part.class_name) == list(np.repeat(NAMES, 4))
    assert list(part.predicted) == list(NAMES) * 4
    return part[what].to_numpy().reshape(4, 4)


@pytest.mark.parametrize("size", [80, 9])
def test_confusion_is_scikit_learns_with_features_masked_by_hand(task, size):
    model, filters, (x, y), features = task
    frame = metrics.masked_confusion(model, filters, in_batches((x, y), size), ["coat", ("coat", 3), 1], k=2)
    mask = filters.mask(2)
    cases = {"none": mask[0] & False, "coat": mask[0], "coat + dress": mask[0] | mask[3], "bag": mask[1]}
    assert list(frame.masked.unique()) == list(cases)
    generator = torch.Generator().manual_seed(0)
    for name, masked in cases.items():
        expected = by_hand(model, features, y, masked)
        np.testing.assert_array_equal(matrix(frame, name), expected)
        shares = expected / expected.sum(1, keepdims=True)
        np.testing.assert_allclose(matrix(frame, name, what="share"), shares)
        low, high = metrics.wilson(expected, expected.sum(1)[:, None].repeat(4, 1))
        np.testing.assert_allclose(matrix(frame, name, what="low"), low)
        np.testing.assert_allclose(matrix(frame, name, what="high"), high)
        assert (frame[frame.masked == name].channels == int(masked.sum())).all()
        if name != "none":
            chance = random_masks((1, 6), int(masked.sum()), 5, generator)
            draws = np.stack([by_hand(model, features, y, other[0]) for other in chance])
            np.testing.assert_allclose(matrix(frame, name, True), draws.mean(0))
            mean, low, high = metrics.mean_interval(draws / draws.sum(2, keepdims=True))
            np.testing.assert_allclose(matrix(frame, name, True, "share"), mean)
            np.testing.assert_allclose(matrix(frame, name, True, "low"), low, atol=1e-12)
            np.testing.assert_allclose(matrix(frame, name, True, "high"), high, atol=1e-12)
    assert len({matrix(frame, name).tobytes() for name in cases}) == 4  # not all alike
    assert not frame[frame.masked == "none"].control.any()


def test_class_masking_is_the_diagonal_of_the_confusion(task, monkeypatch):
    model, filters, (x, y), features = task
    frame = metrics.class_masking(model, filters, in_batches((x, y), 9), k=2)
    assert list(frame.masked) == list(np.repeat(NAMES, 10))
    intact = by_hand(model, features, y, torch.zeros(6, dtype=bool))
    confusion = metrics.masked_confusion(model, filters, [(x, y)], list(NAMES), k=2)
    for name, channels in zip(NAMES, filters.mask(2), strict=True):
        part, drawn = (
            frame[(frame.masked == name) & (frame.control == control)].set_index("class_name")
            for control in (False, True)
        )
        hit = by_hand(model, features, y, channels)
        np.testing.assert_allclose(part.recall[list(NAMES)], hit.diagonal() / hit.sum(1))
        assert part.recall["all"] == pytest.approx(hit.trace() / 80)
        assert part.intact["all"] == pytest.approx(intact.trace() / 80)
        np.testing.assert_allclose(part["drop"], part.intact - part.recall)
        np.testing.assert_allclose((part.low, part.high), metrics.wilson(part.recall * part.samples, part.samples))
        for column, share in (("recall", "share"), ("low", "low"), ("high", "high")):
            chance = matrix(confusion, name, True, share).diagonal()
            np.testing.assert_allclose(drawn[column][list(NAMES)], chance, atol=1e-12)
        assert (drawn.low <= drawn.recall).all()
        assert (drawn.recall <= drawn.high).all()
        np.testing.assert_allclose(drawn["drop"], part.intact - drawn.recall)
        for rows in (part, drawn):
            assert list(rows.samples) == [80, *torch.bincount(y)]
            assert (rows.channels == 2).all()
    assert (frame["drop"].abs() > 0).any()
    monkeypatch.setattr("captum_classfilters.metrics.interventions._CELLS", 80 * 6 * 4)
    sliced = metrics.class_masking(model, filters, [(x, y)], k=2)
    pd.testing.assert_frame_equal(sliced, frame)


def exclusive():
    """Class c is told by channels 2c and 2c + 1; whoever has nothing left is called a boot."""
    gate = LabelSensitiveGate.fixed(4, 9, exclusive=2)
    gate.layer = "1"
    model = nn.Sequential(nn.Identity(), nn.Linear(9, 4))
    with torch.no_grad():
        model[1].weight.copy_(gate.weight)
        model[1].bias.copy_(torch.tensor([0.0, 0.0, 0.1, 0.0]))
    y = torch.arange(4).repeat_interleave(5)
    x = gate.weight.detach()[y].clone()
    x[:, 8] = 0
    return model, gate.class_filters(NAMES), [(x, y)]


def test_a_class_with_its_own_channels_is_lost_alone():
    model, filters, loader = exclusive()
    frame = metrics.class_masking(model, filters, loader, k=2)
    frame = frame[~frame.control]
    own = frame.masked == frame.class_name
    boot = frame.masked == "boot"
    assert (frame[own & ~boot]["drop"] == 1).all()
    assert (frame[~own & (frame.class_name != "all")]["drop"] == 0).all()
    assert (frame.intact == 1).all()
    confusion = metrics.masked_confusion(model, filters, loader, [("coat", "bag")], threshold=0.5)
    np.testing.assert_array_equal(
        matrix(confusion, "coat + bag"), [[0, 0, 5, 0], [0, 0, 5, 0], [0, 0, 5, 0], [0, 0, 0, 5]]
    )
    # two channels of each and the shared one
    assert set(confusion.channels) == {0, 5}


def test_a_class_without_channels_above_the_threshold_stays_in_the_table():
    model, filters, loader = exclusive()
    scores = filters.scores.clone()
    scores[1] *= 0.5
    frame = metrics.class_masking(model, replace(filters, scores=scores), loader, threshold=0.5)
    bag = frame[frame.masked == "bag"]
    assert (bag.channels == 0).all()
    assert (bag["drop"] == 0).all()
    assert (bag.recall == 1).all()
    assert set(bag.control) == {False, True}
    assert (frame[frame.masked != "bag"].channels == 3).all()
    # nor has one that the table has not seen
    unseen = replace(filters, counts=torch.tensor([5, 0, 5, 5]))
    for how in ({"k": 2}, {"threshold": 0.5}):
        confusion = metrics.masked_confusion(model, unseen, loader, ["bag"], **how)
        assert (confusion.channels == 0).all()


def test_a_class_without_images_has_no_share():
    model, filters, [(x, y)] = exclusive()
    frame = metrics.masked_confusion(model, filters, [(x[y > 0], y[y > 0])], ["boot"], k=2)
    assert frame[frame.class_name == "coat"][["share", "low", "high"]].isna().all(axis=None)
    masking = metrics.class_masking(model, filters, [(x[y > 0], y[y > 0])], k=2)
    assert masking[masking.class_name == "coat"].recall.isna().all()


def test_overwritten_logits_stay_on_the_device(device, assert_close):
    with device.mode:
        generator = torch.Generator().manual_seed(0)
        features, values, weight = (torch.randn(size, 6, generator=generator) for size in (5, 5, 4))
        chosen = torch.rand(3, 6, generator=generator) > 0.5
        linear = nn.Linear(6, 4, bias=False, device=device.name).requires_grad_(False)
        linear.weight.copy_(weight.to(device.name))
        features, values, chosen = (part.to(device.name) for part in (features, values, chosen))
        head = Head("fc", linear, None)
        with_zeros = torch.stack([features.masked_fill(row, 0) @ linear.weight.T for row in chosen])
        assert_close(overwritten_logits(features, chosen[:, None], head), with_zeros)
        with_values = torch.where(chosen[0], values, features) @ linear.weight.T
        assert_close(overwritten_logits(features, chosen[0].expand(5, 6), head, values), with_values)


@pytest.mark.parametrize("measure", [metrics.class_masking, metrics.masked_confusion])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got k=None"),
        ({"k": 2, "threshold": 0.5}, "got k=2"),
        ({"k": 7}, r"k must be an integer in \[1, 6\]"),
        ({"threshold": float("nan")}, "threshold must be a finite number"),
    ],
)
def test_channels_that_a_class_cannot_have_are_refused(task, measure, options, message):
    model, filters, data, _ = task
    cases = {"classes": ["coat"]} if measure is metrics.masked_confusion else {}
    with pytest.raises(OptionError, match=message):
        measure(model, filters, [data], **cases, **options)


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        (["cat"], "no class is named 'cat'"),
        (["coat", 0], "got 'coat' twice"),
        ([()], "got ''"),
        ([], "at least one case"),
        ("none", "called 'none'"),
    ],
)
def test_cases_that_cannot_be_are_refused(task, cases, message):
    model, filters, data, _ = task
    if cases == "none":
        filters = replace(filters, class_names=("none", *"abc"))
    with pytest.raises(OptionError, match=message):
        metrics.masked_confusion(model, filters, [data], cases, k=2)


def test_tables_that_do_not_fit_are_refused(task):
    model, filters, data, _ = task
    with pytest.raises(OptionError, match="filters must be a ClassFilters"):
        metrics.class_masking(model, {"a": filters}, [data], k=2)
    other = ClassFilters(filters.scores[:, :5], filters.mass[:, :5], filters.counts, "margin", "fc", NAMES)
    with pytest.raises(ShapeError, match="4 classes x 5 channels"):
        metrics.class_masking(model, other, [data], k=2)


def test_a_gate_itself_is_refused_with_a_remedy_and_its_table_goes_by_its_shape(small_cnn, images):
    gate, loader = LabelSensitiveGate.fixed(4, 6, exclusive=1), [(images(8), torch.arange(8) % 4)]
    with pytest.raises(OptionError, match=r"got LabelSensitiveGate; pass its table, .class_filters\(\)"):
        metrics.class_masking(small_cnn(), gate, loader, threshold=0.5)
    # never trained, so of no layer: the shape decides
    assert metrics.class_masking(small_cnn(), gate.class_filters(), loader, threshold=0.5).channels.max() == 3


# -- deletion, channel after channel -----------------------------------------------------------------------------------


def table_of(scores, **changes):
    given = torch.as_tensor(scores, dtype=torch.float64)
    counts = torch.ones(len(given), dtype=torch.int64)
    names = tuple("abcd"[: len(given)])
    return replace(ClassFilters(given, given.abs(), counts, "mine", "fc", names), **changes)


@pytest.fixture
def ranked(small_cnn):
    model = small_cnn(num_classes=4, channels=6)
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(40, 3, 12, 12, generator=generator), torch.randint(4, (40,), generator=generator)
    scores = torch.rand(4, 6, generator=generator)
    return model, [(images[:15], labels[:15]), (images[15:], labels[15:])], images, labels, table_of(scores)


def curves_by_hand(model, images, labels, table, sizes, steps):
    """``(N, 2, steps + 1)``, in float64, image by image."""
    model = model.double()
    found = np.zeros((len(images), 2, steps + 1))
    for row, (image, label) in enumerate(zip(images.double(), labels.tolist(), strict=True)):
        with torch.no_grad():
            features = model.penultimate(image[None])[0]
            for step in range(steps + 1):
                count = int(np.floor(sizes[label] * step / steps + 0.5))
                chosen = table.ranking()[label, :count]
                inside = torch.zeros(6, dtype=torch.bool)
                inside[chosen] = True
                for kind, mask in enumerate((~inside, inside)):
                    found[row, kind, step] = model.fc(features * mask).softmax(0)[label]
    model.float()
    return found


@pytest.mark.parametrize("sizes", [4, [1, 6, 3, 5]])
def test_curve_and_area_agree_with_a_loop(ranked, sizes):
    model, loader, images, labels, table = ranked
    frame = metrics.channel_deletion(model, {"mine": table}, loader, torch.as_tensor(sizes), steps=5)
    each = np.broadcast_to(sizes, 4)
    expected = curves_by_hand(model, images, labels, table, each, 5)
    for kind, name in enumerate(("deletion", "insertion")):
        rows = frame[(frame.filters == "mine") & (frame.kind == name)]
        curve = expected[:, kind]
        np.testing.assert_allclose(rows.probability, curve.mean(0), atol=1e-6)
        half = 1.959964 * curve.std(0, ddof=1) / np.sqrt(40)
        np.testing.assert_allclose(rows.high - rows.probability, half, atol=1e-6)
        area = (curve[:, :-1] + curve[:, 1:]).sum(1) * 0.1
        np.testing.assert_allclose(rows.auc, area.mean(), atol=1e-6)
        np.testing.assert_allclose(rows.auc - rows.auc_low, 1.959964 * area.std(ddof=1) / np.sqrt(40), atol=1e-6)
        counts = np.floor(each[labels][:, None] * np.arange(6) / 5 + 0.5)
        np.testing.assert_allclose(rows.channels, counts.mean(0))
        assert (rows.samples == 40).all()


def test_random_is_the_mean_over_rankings_drawn_at_random(ranked):
    model, loader, *_, table = ranked
    frame = metrics.channel_deletion(model, table, loader, 6, control=Control(30))
    assert (frame.control == (frame.filters == "random")).all()
    random = frame[frame.control & (frame.kind == "deletion")].reset_index()
    assert (random.auc_low < random.auc).all()
    again = metrics.channel_deletion(model, table, loader, 6, control=Control(30))
    assert frame.equals(again)
    other = metrics.channel_deletion(model, table, loader, 6, control=Control(30, seed=1))
    found = other[other.control & (other.kind == "deletion")].reset_index()
    assert found.auc[0] != random.auc[0]
    assert random.auc_low[0] < found.auc_high[0]
    assert found.auc_low[0] < random.auc_high[0]
    # all are deleted at the last step, whatever the ranking
    assert random.high[10] - random.low[10] < 1e-9


def test_a_class_of_size_0_is_left_out(ranked):
    model, loader, images, labels, table = ranked
    frame = metrics.channel_deletion(model, table, loader, torch.tensor([0, 3, 3, 3]), steps=3)
    assert (frame.samples == int((labels != 0).sum())).all()
    expected = curves_by_hand(model, images[labels != 0], labels[labels != 0], table, [0, 3, 3, 3], 3)
    own = frame[(frame.filters == "mine") & (frame.kind == "insertion")]
    np.testing.assert_allclose(own.probability, expected[:, 1].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        (7, {}, r"\[0, 6\]"),
        (0, {}, "not all be 0"),
        (-1, {}, r"\[0, 6\]"),
        (2.5, {}, "integers"),
        (torch.tensor([1, 2]), {}, "4 of them"),
        (3, {"steps": 0}, "at least 1"),
    ],
)
def test_sizes_and_steps_that_cannot_be_are_refused(ranked, sizes, options, words):
    model, loader, *_, table = ranked
    with pytest.raises(ClassFiltersError, match=words):
        metrics.channel_deletion(model, table, loader, sizes, **options)


def test_a_table_of_another_network_is_refused(ranked):
    model, loader, *_ = ranked
    with pytest.raises(ClassFiltersError, match="the table is"):
        metrics.channel_deletion(model, table_of(torch.rand(4, 9)), loader, 2)


def test_a_loader_of_left_out_classes_is_an_error(ranked):
    model, _, images, labels, table = ranked
    only = [(images[labels == 0], labels[labels == 0])]
    with pytest.raises(ClassFiltersError, match="no class in the loader has a size"):
        metrics.channel_deletion(model, table, only, torch.tensor([0, 2, 2, 2]))
