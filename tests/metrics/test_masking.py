"""Confusion and recall with channels at 0, against scikit-learn on features masked by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum_classfilters.metrics.masking import masked_logits
from sklearn.metrics import confusion_matrix
from torch import nn

from captum_classfilters import ClassFilters, InfluentialFeatures, metrics
from captum_classfilters.core.control import random_masks
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.gating.gate import LabelSensitiveGate

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
    assert list(frame.masked) == list(np.repeat(NAMES, 5))
    intact = by_hand(model, features, y, torch.zeros(6, dtype=bool))
    confusion = metrics.masked_confusion(model, filters, [(x, y)], list(NAMES), k=2)
    for name, channels in zip(NAMES, filters.mask(2), strict=True):
        part = frame[frame.masked == name].set_index("class_name")
        hit = by_hand(model, features, y, channels)
        np.testing.assert_allclose(part.recall[list(NAMES)], hit.diagonal() / hit.sum(1))
        assert part.recall["all"] == pytest.approx(hit.trace() / 80)
        assert part.intact["all"] == pytest.approx(intact.trace() / 80)
        np.testing.assert_allclose(part["drop"], part.intact - part.recall)
        np.testing.assert_allclose((part.low, part.high), metrics.wilson(part.recall * part.samples, part.samples))
        chance = matrix(confusion, name, True, "share").diagonal()
        np.testing.assert_allclose(part.random[list(NAMES)], chance)
        assert (part.random_low <= part.random).all()
        assert (part.random <= part.random_high).all()
        assert list(part.samples) == [80, *torch.bincount(y)]
    assert (frame["drop"].abs() > 0).any()
    monkeypatch.setattr("captum_classfilters.metrics.masking._CELLS", 80 * 6 * 4)
    sliced = metrics.class_masking(model, filters, [(x, y)], k=2)
    np.testing.assert_allclose(
        sliced.drop(columns=["masked", "class_name"]), frame.drop(columns=["masked", "class_name"])
    )


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
    assert (bag.random == 1).all()
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


def test_masked_logits_stay_on_the_device(device, assert_close):
    with device.mode:
        generator = torch.Generator().manual_seed(0)
        features, weight = (torch.randn(size, 6, generator=generator) for size in (5, 4))
        masked = torch.rand(3, 6, generator=generator) > 0.5
        expected = torch.stack([features.masked_fill(row, 0) @ weight.T for row in masked])
        found = masked_logits(*(part.to(device.name) for part in (features, masked, weight, torch.zeros(4))))
        assert_close(found, expected.to(device.name))


def test_masking_refuses_what_it_cannot_do(task):
    model, filters, data, _ = task
    for given in ({}, {"k": 2, "threshold": 0.5}):
        with pytest.raises(OptionError, match="pass one of the two, got k="):
            metrics.class_masking(model, filters, [data], **given)
    with pytest.raises(OptionError, match=r"k must be an integer in \[1, 6\]"):
        metrics.class_masking(model, filters, [data], k=7)
    with pytest.raises(OptionError, match="threshold must be a finite number"):
        metrics.class_masking(model, filters, [data], threshold=float("nan"))
    with pytest.raises(OptionError, match="draws must be at least 5"):
        metrics.masked_confusion(model, filters, [data], ["coat"], k=2, draws=1)
    with pytest.raises(OptionError, match="no class is named 'cat'"):
        metrics.masked_confusion(model, filters, [data], ["cat"], k=2)
    with pytest.raises(OptionError, match="got 'coat' twice"):
        metrics.masked_confusion(model, filters, [data], ["coat", 0], k=2)
    with pytest.raises(OptionError, match="got ''"):
        metrics.masked_confusion(model, filters, [data], [()], k=2)
    with pytest.raises(OptionError, match="at least one case"):
        metrics.masked_confusion(model, filters, [data], [], k=2)
    with pytest.raises(OptionError, match="by the name 'none'"):
        metrics.masked_confusion(model, replace(filters, class_names=("none", *"abc")), [data], "none", k=2)
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
