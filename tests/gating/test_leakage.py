"""gate_leakage: what the label alone gives, and that no figure of it is called accuracy."""

import dataclasses
import inspect

import pytest
import torch
from torch.nn import functional as F

from captum_classfilters import ClassFilters, LabelSensitiveGate, metrics
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.metrics import gate_leakage


def batches(images, count=60):
    generator = torch.Generator().manual_seed(5)
    return [(images(count, seed=3), torch.randint(4, (count,), generator=generator))]


def matched(model):
    """Weights and gate belong together: each class has channels of its own, and votes with nothing else."""
    gate = LabelSensitiveGate.fixed(4, 6, exclusive=1)
    gate.weight.data[:, 4:] = 0
    gate.layer = "fc"
    with torch.no_grad():
        model.fc.weight.copy_(gate.weight)
        model.fc.bias.zero_()
    return gate.class_filters()


def cell(frame, features, gate, column="label_recovered"):
    return frame[(frame.features == features) & (frame.gate == gate)][column].item()


def test_each_figure_is_the_share_answered_with_the_told_label(small_cnn, images):
    model, loader = small_cnn(), batches(images)
    gate = LabelSensitiveGate(4, 6, generator=torch.Generator().manual_seed(1))
    gate.layer, (x, y) = "fc", loader[0]
    gate.counts += 1
    found = gate_leakage(model, gate.class_filters(), loader)
    with torch.no_grad():
        features = model.penultimate(x)
    plain = sum(
        int(F.linear(f, model.fc.weight, model.fc.bias).argmax()) == int(label)
        for f, label in zip(features, y, strict=True)
    )
    gated = sum(
        int(F.linear(f * gate.weight[label], model.fc.weight, model.fc.bias).argmax()) == int(label)
        for f, label in zip(features, y, strict=True)
    )
    assert cell(found, "own", "none") == pytest.approx(plain / 60)
    assert cell(found, "own", "own") == pytest.approx(gated / 60)
    low, high = metrics.wilson(gated, 60)
    assert (cell(found, "own", "own", "low"), cell(found, "own", "own", "high")) == pytest.approx(
        (float(low), float(high))
    )
    assert set(found.samples) == {60}
    assert set(found.chance) == {0.25}
    assert list(found.gate) == ["none", "own", "random"] * 3
    assert list(found.control) == [False, False, True] * 3


def test_on_a_matched_head_the_label_alone_gives_everything(small_cnn, images):
    model = small_cnn()
    filters = matched(model)
    found = gate_leakage(model, filters, batches(images))
    # the gate lets through only the channel that votes for what it was told; random gates mostly others
    assert cell(found, "noise", "own") > 0.95
    assert cell(found, "other classes", "own") > 0.9
    assert cell(found, "noise", "none") < 0.5
    assert cell(found, "other classes", "none") < 0.5
    assert cell(found, "noise", "random") < 0.6


def test_labels_that_are_told_of_other_images_are_never_their_own(small_cnn, images):
    """A network that is always right never answers with another label."""
    model, (x, _) = small_cnn(), batches(images)[0]
    with torch.no_grad():
        answers = model(x).argmax(1)
    table = ClassFilters(
        torch.ones(4, 6).double(), torch.ones(4, 6).double(), torch.ones(4).long(), "gate", "fc", tuple("abcd")
    )
    found = gate_leakage(model, table, [(x, answers)])
    assert cell(found, "own", "own") == 1
    assert cell(found, "other classes", "own") == 0
    assert cell(found, "other classes", "none") == 0


def test_no_gate_no_effect_and_the_draws_are_the_seed_s(small_cnn, images):
    model, gate = small_cnn(), LabelSensitiveGate(4, 6, generator=torch.Generator().manual_seed(1))
    gate.layer = "fc"
    first, again, other = (
        gate_leakage(model, gate.class_filters(), batches(images), control=Control(seed=s)) for s in (0, 0, 1)
    )
    assert first.equals(again)
    assert not first.equals(other)


def test_any_table_is_read_as_a_gate_and_labels_told_do_not_depend_on_batches(small_cnn, images):
    model, (x, y) = small_cnn(), batches(images)[0]
    filters = matched(model)
    votes = dataclasses.replace(filters, scores=filters.scores * 7 - 2)
    split = list(zip(x.split(7), y.split(7), strict=True))
    whole, parts = (gate_leakage(model, filters, loader) for loader in ([(x, y)], split))
    shown = whole.features != "noise"
    assert whole[shown].equals(parts[shown])
    assert gate_leakage(model, votes, [(x, y)]).equals(whole)


def test_bad_input_is_refused(small_cnn, images):
    gate = LabelSensitiveGate(4, 7)
    gate.layer = "fc"
    with pytest.raises(ShapeError, match="4 classes x 7 channels"):
        gate_leakage(small_cnn(), gate.class_filters(), batches(images))
    with pytest.raises(OptionError, match=r"got LabelSensitiveGate; pass its table, .class_filters\(\)"):
        gate_leakage(small_cnn(), gate, batches(images))


def test_nothing_that_a_gate_scores_is_called_accuracy(small_cnn, images):
    model = small_cnn()
    found = gate_leakage(model, matched(model), batches(images))
    assert not [column for column in found.columns if "accuracy" in column]
    # of all functions, the one whose gate is told the label
    reads_it = [
        name
        for name, function in inspect.getmembers(metrics, inspect.isfunction)
        if "reads the true label" in (function.__doc__ or "")
    ]
    assert reads_it == ["gate_leakage"]
