"""A step that fails leaves nothing behind, and bad input is refused with a remedy."""

import copy
import math

import pytest
import torch
from gating_loop import LABELS, assert_states_equal, optimizer_of
from shared import alternating, paper_training
from torch import distributed as dist
from torch import nn

from captum_classfilters import GatePenalty, GateSchedule, LabelSensitiveGate
from captum_classfilters.class_filters import UNKNOWN_LAYER
from captum_classfilters.core.borrow import process_group
from captum_classfilters.core.errors import DeviceError, HeadError, LabelError, NonFiniteError, OptionError, ShapeError

# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loss_that_is_nan_stops_and_leaves_all_as_it_was(epoch, model, gate, images):
    training = paper_training(model, gate)
    for _ in range(2):
        training.loss(images(), LABELS, epoch)
        training.after_step()
    state, table = copy.deepcopy(model.state_dict()), copy.deepcopy(gate.state_dict())
    broken = images()
    broken[2, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=rf"the loss is nan in epoch {epoch}, step 2; no step was taken"):
        training.loss(broken, LABELS, epoch)
    assert_states_equal(model.state_dict(), state)
    assert_states_equal(gate.state_dict(), table)


@pytest.mark.parametrize("broken", ["gate", "network"])
def test_a_step_that_ends_in_nan_is_undone(broken, model, gate, images):
    training = paper_training(model, gate)
    optimizer = optimizer_of(model, gate)
    training.loss(images(), LABELS, 3).backward()
    optimizer.step()
    training.after_step()
    state, table = copy.deepcopy(model.state_dict()), copy.deepcopy(gate.state_dict())
    optimizer.zero_grad()
    training.loss(images(), LABELS, 4).backward()
    spoilt = gate.weight if broken == "gate" else model.conv1.weight
    spoilt.grad.view(-1)[3] = math.inf
    optimizer.step()
    with pytest.raises(NonFiniteError, match=r"NaN or infinite in epoch 4, step 0; both are as before that step"):
        training.after_step()
    assert_states_equal(model.state_dict(), state)
    assert_states_equal(gate.state_dict(), table)
    # and the next step, with a new optimiser, is one as any
    optimizer = optimizer_of(model, gate)
    optimizer.zero_grad()
    training.loss(images(), LABELS, 4).backward()
    optimizer.step()
    training.after_step()
    assert not torch.equal(gate.weight, table["weight"])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"schedule": alternating(period=0)}, "period must be an integer of at least 1; got 0"),
        (lambda: {"schedule": alternating(phase=3)}, r"phase must be an integer in \[0, 2\], below the period; got 3"),
        (
            lambda: {"schedule": alternating(phase=-1)},
            r"phase must be an integer in \[0, 2\], .*; got -1",
        ),
        (lambda: {"schedule": alternating(warmup=-1)}, "warmup must be an integer of at least 0"),
        (lambda: {"schedule": GateSchedule(scheme="both")}, r"scheme must be one of \['joint', 'alternating'\]"),
        (lambda: {"weight": math.nan}, "weight must be a finite number"),
        (lambda: {"ablation": -1}, "ablation must be a finite number of at least 0; got -1"),
        (
            lambda: {"penalty": GatePenalty(density=0.24)},
            r"density must be a number in \[0.25, 1\], for every channel",
        ),
        (lambda: {"penalty": GatePenalty(sparsity=-1.0)}, "sparsity must be a finite number of at least 0"),
        (lambda: {"penalty": GatePenalty(kind="l2")}, r"kind must be one of \['abs', 'hinge'\]"),
    ],
)
def test_bad_options_are_refused(options, message, model, gate):
    with pytest.raises(OptionError, match=message):
        paper_training(model, gate, **options())


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, LabelError, "the gate path needs the true labels"),
        (LABELS[:5], LabelError, r"must have shape \(6,\), got \(5,\)"),
        (LABELS + 1, LabelError, r"must lie in \[0, 4\), got 4"),
        (LABELS + 0.5, LabelError, "must be integers"),
        (LABELS.to("meta"), DeviceError, r"labels are on meta, the gate on cpu; labels.to\('cpu'\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_bad_labels_are_refused(labels, error, message, epoch, model, gate, images):
    with pytest.raises(error, match=message):
        paper_training(model, gate).loss(images(), labels, epoch)


def test_a_gate_of_another_size_or_place_is_refused(model, images):
    with pytest.raises(ShapeError, match=r"the head 'fc' is 4 classes x 6 channels, the gate 4 x 7; make LabelSensi"):
        paper_training(model, LabelSensitiveGate(4, 7)).loss(images(), LABELS, 0)
    with pytest.raises(DeviceError, match=r"the model is on cpu, the gate on meta; gate.to\('cpu'\)"):
        paper_training(model, LabelSensitiveGate(4, 6).to("meta"))
    with pytest.raises(OptionError, match=r"gate must be a LabelSensitiveGate, got Linear"):
        paper_training(model, nn.Linear(4, 6))
    with pytest.raises(OptionError, match=r"must be an nn.Module, got function"):
        paper_training(lambda x: x, LabelSensitiveGate(4, 6))
    with pytest.raises(OptionError, match=r"wrap the model in DistributedDataParallel"):
        paper_training(nn.DataParallel(model), LabelSensitiveGate(4, 6))


def test_wrappers_are_seen_through_compilation(model, gate, tmp_path):
    with pytest.raises(OptionError, match=r"wrap the model in DistributedDataParallel"):
        paper_training(torch.compile(nn.DataParallel(model), backend="eager"), gate)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        compiled = torch.compile(wrapped, backend="eager")
        assert process_group(compiled) is process_group(wrapped) is wrapped.process_group
        assert process_group(model) is None
    finally:
        dist.destroy_process_group()


def test_epochs_are_counted_from_0(model, gate, images):
    with pytest.raises(OptionError, match=r"epoch must be an integer of at least 0; got 1.0"):
        paper_training(model, gate).loss(images(), LABELS, 1.0)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, features):
        logits = self.fc(features)
        return (logits, -logits) if self.training else logits


def test_of_auxiliary_outputs_the_first_is_trained(gate):
    model = Auxiliary()
    expected = paper_training(nn.Sequential(model.fc), gate).loss(torch.ones(6, 6), LABELS, 1)
    gate.layer = UNKNOWN_LAYER  # of another network now
    assert torch.equal(paper_training(model, gate).loss(torch.ones(6, 6), LABELS, 1), expected)


def test_a_model_without_logits_is_refused(gate):
    model = Auxiliary()
    model.forward = lambda features: {"scores": model.fc(features)} if model.training else model.fc(features)
    with pytest.raises(HeadError, match=r"expected a model that returns logits"):
        paper_training(model, gate).loss(torch.ones(6, 6), LABELS, 1)
