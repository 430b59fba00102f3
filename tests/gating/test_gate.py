"""The gate: its formulas against plain loops, and its constraint for any input."""

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from captum_classfilters import LabelSensitiveGate
from captum_classfilters.core.errors import DeviceError, FileFormatError, LabelError, OptionError, ShapeError
from captum_classfilters.gating.gate import density_penalty, gated, lost_label, project

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5))


def gate_of(values):
    gate = LabelSensitiveGate(*torch.tensor(values).shape)
    gate.load_state_dict({"weight": torch.tensor(values), "counts": torch.ones(len(values), dtype=torch.int64)})
    return gate


# -- the constraint ----------------------------------------------------------------------------------------------------


@given(arrays.arrays(np.float32, SHAPES, elements=FLOATS), st.integers(0, 9))
def test_projection_keeps_the_constraint_for_every_input(values, seed):
    weight = torch.from_numpy(values)
    previous = LabelSensitiveGate(*values.shape, generator=torch.Generator().manual_seed(seed)).weight.detach()
    found = project(weight, previous)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert bool((found.amax(0) == 1).all())
    for k in range(values.shape[1]):
        column = values[:, k].astype(np.float64)
        positive = [max(value, 0.0) for value in column]
        if all(map(math.isfinite, column)) and max(positive) > 0:
            expected = [value / max(positive) for value in positive]
            np.testing.assert_allclose(found[:, k].numpy(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(found[:, k], previous[:, k])


def test_a_column_of_the_paper_s_algorithm_that_would_break():
    # [.5, -.6] over its largest magnitude ends below 1, zeros end as NaN, a signed maximum below 0 turns signs round
    weight = torch.tensor([[0.5, 0.0, -0.1], [-0.6, 0.0, -0.2]])
    assert project(weight, torch.ones(2, 3)).tolist() == [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]


def test_a_gate_that_is_projected_in_place_goes_back_to_its_last_good_column(gate):
    before = gate.weight.detach().clone()
    with torch.no_grad():
        gate.weight[:, 1] = math.nan
        gate.weight[:, 2] = -1.0
        gate.weight[0, 3] = 7.0
    gate.project_()
    assert torch.equal(gate.weight[:, 1:3], before[:, 1:3])
    assert gate.weight[0, 3].item() == 1.0
    with torch.no_grad():
        gate.weight[:, 3] = 0.0
    # what it goes back to is the column after the last projection, not the first one
    assert gate.project_().weight[0, 3].item() == 1.0


def test_it_begins_as_uniform_noise_over_its_column_maximum():
    gate = LabelSensitiveGate(10, 64, generator=torch.Generator().manual_seed(3))
    noise = torch.rand(10, 64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(gate.weight.detach(), noise / noise.amax(0))
    assert bool((gate.weight.amax(0) == 1).all())
    assert 0.4 < gate.density < 0.7
    torch.manual_seed(5)
    first, second = LabelSensitiveGate(3, 4), LabelSensitiveGate(3, 4)
    assert not torch.equal(first.weight, second.weight)


# -- gating ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3, 2), (5, 6, 4)], ids=str)
def test_each_sample_is_multiplied_by_its_label_s_row(shape, device, assert_close):
    with device.mode:
        features = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device.name)
        labels = torch.tensor([3, 0, 0, 2, 1]).to(device.name)
        weight = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)).to(device.name)
        found = gated(features, labels, weight)
        rows = [weight[label] for label in (3, 0, 0, 2, 1)]
        expected = torch.stack([torch.stack([features[n, k] * rows[n][k] for k in range(6)]) for n in range(5)])
        assert_close(found, expected, rtol=0, atol=0)
        projected = project(weight - 0.5, torch.ones_like(weight))
        assert_close(projected.amax(0), torch.ones(6, device=device.name))


def test_the_module_gates_by_its_own_table(gate):
    features, labels = torch.randn(5, 6, 2, 2), torch.tensor([3, 0, 0, 2, 1])
    assert torch.equal(gate(features, labels), gated(features, labels, gate.weight))


def test_with_gradients_or_without_it_is_the_same_and_features_stay(gate):
    features, labels = torch.randn(5, 6), torch.tensor([3, 0, 0, 2, 1])
    before = features.clone()
    with torch.no_grad():
        found = gate(features, labels)
    assert torch.equal(found, gate(features, labels))
    assert torch.equal(features, before)
    assert bool((gate.weight.amax(0) == 1).all())


def test_a_gate_that_is_set_or_loaded_draws_nothing(gate, tmp_path):
    gate.save(tmp_path / "gate.safetensors")
    before = torch.get_rng_state()
    LabelSensitiveGate.load(tmp_path / "gate.safetensors")
    LabelSensitiveGate.fixed(4, 6, exclusive=1)
    gate.tighten()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_labels_it_is_the_plain_path(gate):
    features = torch.randn(3, 6)
    assert gate(features) is features
    assert gate.counts.tolist() == [0] * 4


def test_before_pooling_or_after_is_the_same(gate):
    maps, labels = torch.randn(5, 6, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(gate(maps, labels).mean((2, 3)), gate(maps.mean((2, 3)), labels))


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.rand(2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda f, w: gated(f, labels, w), (features, weight))
    for kind in ("abs", "hinge"):
        assert torch.autograd.gradcheck(lambda w, kind=kind: density_penalty(w, 0.2, kind), (weight,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_follows_the_dtype_of_the_features(gate, dtype):
    found = gate(torch.ones(2, 6, dtype=dtype), torch.tensor([1, 2]))
    assert found.dtype == dtype
    assert torch.equal(found, gate.weight[[1, 2]].to(dtype))


def test_it_counts_what_it_was_trained_on(gate):
    for labels in ([0, 0, 3], [1, 3, 3]):
        gate(torch.ones(3, 6), torch.tensor(labels))
    gate.eval()(torch.ones(1, 6), torch.tensor([2]))
    assert gate.counts.tolist() == [2, 1, 0, 3]
    filters = gate.class_filters(tuple("abcd"))
    assert filters.counts.tolist() == [2, 1, 0, 3]
    assert filters.top(2)[2].tolist() == [-1, -1]


# -- penalty, tightening, the fixed gate -------------------------------------------------------------------------------


def test_penalty_is_the_distance_of_the_sum_from_its_target():
    gate = gate_of([[1.0, 0.5], [0.25, 1.0], [0.0, 0.0], [0.0, 0.25]])
    assert gate.penalty(0.25).item() == pytest.approx(abs(3.0 - 0.25 * 8))
    assert gate.penalty(0.5).item() == pytest.approx(abs(3.0 - 0.5 * 8))
    assert gate.penalty(0.5, "hinge").item() == 0.0
    assert gate.penalty(0.25, "hinge").item() == pytest.approx(1.0)


def test_tightening_makes_own_channels_own_and_all_others_shared():
    gate = LabelSensitiveGate(5, 40, generator=torch.Generator().manual_seed(2))
    gate.layer = "fc"
    before = gate.weight.detach().clone()
    tight = gate.tighten(0.9)
    for k in range(40):
        related = [c for c in range(5) if before[c, k] >= 0.9]
        expected = [float(c == related[0]) for c in range(5)] if len(related) == 1 else [1.0] * 5
        assert tight.weight[:, k].tolist() == expected
    assert 0 < int(tight.exclusive().sum()) < 40
    assert not tight.weight.requires_grad
    assert tight.layer == "fc"
    assert torch.equal(gate.weight, before)
    assert gate.weight.requires_grad


def test_the_fixed_gate_of_the_paper():
    gate = LabelSensitiveGate.fixed(10, 64)
    assert gate.weight.sum(1).tolist() == [10.0] * 10
    assert gate.exclusive().sum(1).tolist() == [6] * 10
    assert bool((gate.weight[:, 60:] == 1).all())
    assert gate.class_filters().top(6)[3].tolist() == [18, 19, 20, 21, 22, 23]
    assert not gate.weight.requires_grad
    assert gate.project_().weight.sum(1).tolist() == [10.0] * 10
    assert bool((LabelSensitiveGate.fixed(3, 4, exclusive=0).weight == 1).all())


# -- as a table, in files ----------------------------------------------------------------------------------------------


def test_the_table_is_the_gate(gate):
    filters = gate.class_filters(tuple("abcd"))
    torch.testing.assert_close(filters.scores, gate.weight.detach().double(), rtol=0, atol=0)
    assert (filters.method, filters.layer, filters.class_names) == ("gate", "unknown", tuple("abcd"))
    gate.counts += 1
    assert torch.equal(gate.class_filters().top(1)[:3], gate.weight.detach().topk(1).indices[:3])
    with torch.no_grad():
        gate.weight[0, 0] = 0.123
    assert float(filters.scores[0, 0]) != pytest.approx(0.123)


def test_saved_and_loaded(gate, tmp_path):
    gate(torch.ones(3, 6), torch.tensor([0, 1, 1]))
    gate.layer = "head.fc"
    gate.save(tmp_path / "gate.safetensors")
    again = LabelSensitiveGate.load(tmp_path / "gate.safetensors")
    assert torch.equal(again.weight, gate.weight)
    assert torch.equal(again.counts, gate.counts)
    assert (again.layer, again.weight.requires_grad) == ("head.fc", True)
    tight = gate.tighten(0.9)
    tight.save(tmp_path / "tight.safetensors")
    assert not LabelSensitiveGate.load(tmp_path / "tight.safetensors").weight.requires_grad
    gate.class_filters().save(tmp_path / "table.safetensors")
    with pytest.raises(FileFormatError, match=r"holds a ClassFilters; expected a LabelSensitiveGate"):
        LabelSensitiveGate.load(tmp_path / "table.safetensors")


def test_a_loaded_gate_falls_back_to_what_was_loaded(gate):
    other = LabelSensitiveGate(4, 6, generator=torch.Generator().manual_seed(9))
    other.load_state_dict(gate.state_dict())
    with torch.no_grad():
        other.weight.fill_(math.nan)
    assert torch.equal(other.project_().weight, gate.weight)


def test_a_checkpoint_of_another_size_is_refused_and_nothing_lost(gate):
    before = gate.weight.detach().clone()
    with pytest.raises(ShapeError, match=r"this gate is 4 classes x 6 channels, the checkpoint's 4 x 7; make"):
        gate.load_state_dict(LabelSensitiveGate(4, 7).state_dict())
    assert torch.equal(gate.weight, before)
    # inside of a larger module, too
    outer = nn.ModuleDict({"gate": gate})
    with pytest.raises(ShapeError, match=r"the checkpoint's 3 x 6"):
        outer.load_state_dict(nn.ModuleDict({"gate": LabelSensitiveGate(3, 6)}).state_dict())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g(torch.ones(2, 5), torch.tensor([0, 1])), ShapeError, r"\(N, 6\) or \(N, 6, H, W\), got \(2, 5\)"),
        (lambda g: g(torch.ones(2, 6), torch.tensor([0, 4])), LabelError, r"must lie in \[0, 4\), got 4; the head"),
        (lambda g: g(torch.ones(2, 6), torch.tensor([0, -1])), LabelError, "got -1"),
        (lambda g: g(torch.ones(2, 6), torch.tensor([0, 1, 2])), LabelError, r"must have shape \(2,\), got \(3,\);"),
        (lambda g: g(torch.ones(2, 6), torch.ones(2, 4)), LabelError, "one class for each sample here"),
        (lambda g: g(torch.ones(2, 6), torch.tensor([0.0, 0.5])), LabelError, "got torch.float32 with fractions"),
        (lambda g: g(torch.ones(2, 6), torch.zeros(2).long().to("meta")), DeviceError, "labels are on meta, the gate"),
        (lambda g: g(torch.ones(2, 6, device="meta"), torch.tensor([0, 1])), DeviceError, "features are on meta"),
        (lambda g: g.check_labels(None, 2), LabelError, "the gate path needs the true labels, got None"),
        (lambda g: g.penalty(0.24), OptionError, r"density must be a number in \[0.25, 1\], .*got 0.24"),
        (lambda g: g.penalty(1.5), OptionError, "got 1.5"),
        (lambda g: g.penalty(math.nan), OptionError, "got nan"),
        (lambda g: g.penalty(0.3, "square"), OptionError, r"kind must be one of \['abs', 'hinge'\], got 'square'"),
        (lambda g: g.tighten(0.0), OptionError, r"threshold must lie in \(0, 1\], got 0.0"),
        (lambda g: g.exclusive(1.1), OptionError, "got 1.1"),
        (lambda g: g.class_filters(tuple("abc")), OptionError, "class_names must be 4, one for each class; got 3"),
        (lambda g: g.class_filters(tuple("aabc")), OptionError, "must be unique"),
        (lambda g: LabelSensitiveGate(0, 6), OptionError, "num_classes must be an integer of at least 1; got 0"),
        (lambda g: LabelSensitiveGate(4, 6.0), OptionError, "num_channels must be an integer"),
        (lambda g: LabelSensitiveGate.fixed(10, 50), OptionError, "need 60, but there are 50; lower exclusive to at m"),
        (lambda g: LabelSensitiveGate.fixed(4, 6, exclusive=-1), OptionError, "exclusive must be an integer of at l"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_remedy(gate, call, error, message):
    with pytest.raises(error, match=message):
        call(gate)
    assert gate.counts.tolist() == [0] * 4


def test_no_samples_are_no_error(gate):
    assert gate(torch.ones(0, 6), torch.zeros(0, dtype=torch.int64)).shape == (0, 6)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_lost_label_is_what_the_label_s_probability_leaves(classes):
    logits = torch.randn(5, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1]) + (classes > 2) * torch.tensor([0, 1, 2, 3, 0])
    odds = logits.softmax(1) if classes > 1 else torch.cat([1 - logits.sigmoid(), logits.sigmoid()], 1)
    expected = sum(-math.log(1 - float(odds[n, y])) for n, y in enumerate(labels.tolist())) / 5
    assert lost_label(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    # a label that is certain costs its margin, not infinity
    sure = torch.full((1, max(classes, 2)), -100.0)
    sure[0, 0] = 100.0
    assert lost_label(sure, torch.tensor([0])).item() == pytest.approx(200.0, abs=math.log(3) + 1e-3)
