"""Which epochs are gated, what their loss is, and that it works in a loop of one's own."""

import copy

import pytest
import torch
from contract import Snapshot
from gating_loop import LABELS, optimizer_of
from shared import alternating, paper_training
from torch import nn
from torch.nn import functional as F

from captum_classfilters import GatePenalty, GateSchedule, LabelSensitiveGate, LabelSensitiveTraining
from captum_classfilters.core.errors import LabelError


def by_hand(model, gate, images, labels, density=0.25, sparsity=0.02, weight=1.0):
    """Lines 4 and 5 of Algorithm 1."""
    features = copy.deepcopy(model).penultimate(images)
    rows = torch.stack([gate.weight[y] for y in labels.tolist()])
    logits = F.linear(features * rows, model.fc.weight, model.fc.bias)
    distance = abs(sum(sum(row) for row in gate.weight) - density * 24)
    return weight * (F.cross_entropy(logits, labels) + sparsity * distance)


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "gated"),
    [
        ({}, [1, 4, 7, 10]),
        ({"period": 2, "phase": 0}, [0, 2, 4, 6, 8, 10]),
        ({"warmup": 5}, [7, 10]),
        ({"scheme": "joint", "warmup": 9}, [9, 10, 11]),
        ({"period": 1, "phase": 0}, list(range(12))),
    ],
    ids=str,
)
def test_gated_epochs(options, gated, model, gate):
    training = paper_training(model, gate, schedule=GateSchedule(**{"scheme": "alternating"} | options))
    assert [epoch for epoch in range(12) if training.gates(epoch)] == gated


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_gated_epoch_minimises_algorithm_1_s_cost(weight, model, gate, images):
    training = paper_training(model, gate, penalty=GatePenalty(0.25, 0.05), weight=weight)
    expected = by_hand(model, gate, images(), LABELS, sparsity=0.05, weight=weight)
    wanted = torch.autograd.grad(expected, [gate.weight, model.fc.weight])
    found = training.loss(images(), LABELS, epoch=1)
    torch.testing.assert_close(found, expected)
    found.backward()
    torch.testing.assert_close(gate.weight.grad, wanted[0])
    torch.testing.assert_close(model.fc.weight.grad, wanted[1])
    assert float(model.conv1.weight.grad.abs().sum()) > 0


def test_a_plain_epoch_is_the_network_s_own_bit_for_bit_whatever_the_gate_is_told(model, gate, images):
    twin = copy.deepcopy(model)
    expected = F.cross_entropy(twin(images()), LABELS)
    expected.backward()
    with torch.no_grad():
        gate.weight.mul_(0.1)
    gate(torch.ones(6, 6), LABELS.roll(2))
    found = paper_training(model, gate).loss(images(), LABELS, epoch=0)
    found.backward()
    assert torch.equal(found, expected)
    assert gate.weight.grad is None
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    assert torch.equal(model.bn2.running_mean, twin.bn2.running_mean)


def test_labels_of_the_gate_do_not_reach_the_plain_path(model, gate, images):
    model.eval()
    before = model(images())
    training = paper_training(model, gate)
    for labels in (LABELS, LABELS.roll(1), torch.zeros_like(LABELS)):
        with torch.no_grad():
            training.loss(images(), labels, epoch=1)
        assert torch.equal(model(images()), before)


def test_the_joint_scheme_is_eq_3_from_one_forward_pass(model, gate, images):
    runs = []
    model.conv1.register_forward_hook(lambda *_: runs.append(1))
    plain = F.cross_entropy(copy.deepcopy(model)(images()), LABELS)
    expected = plain + by_hand(model, gate, images(), LABELS, weight=0.5)
    wanted = torch.autograd.grad(by_hand(model, gate, images(), LABELS, weight=0.5), gate.weight)[0]
    training = paper_training(model, gate, schedule=GateSchedule(scheme="joint"), penalty=GatePenalty(0.25), weight=0.5)
    training.loss(images(), LABELS, epoch=0)
    runs.clear()
    found = training.loss(images(), LABELS, epoch=0)
    assert len(runs) == 1
    torch.testing.assert_close(found.detach(), expected.detach())
    found.backward()
    torch.testing.assert_close(gate.weight.grad, wanted)


@pytest.mark.parametrize("scheme", ["alternating", "joint"])
@pytest.mark.parametrize(("epoch", "step"), [(1, 0), (1, 1), (4, 2)])
def test_the_ablated_path_loses_the_own_label_and_keeps_others(epoch, step, scheme, model, gate, images):
    options = {"schedule": GateSchedule(scheme=scheme), "penalty": GatePenalty(0.25), "weight": 0.5}
    features = copy.deepcopy(model).penultimate(images())
    loss = 0.0
    for row, label in zip(features, LABELS.tolist(), strict=True):
        # of the three other classes one, in turn
        other = (label + 1 + (epoch * 1_000_003 + step) % 3) % 4
        without_own, without_other = (model.fc(row * (1 - gate.weight[y])).softmax(0)[label] for y in (label, other))
        loss = loss - (1 - without_own).log() / 6 - without_other.log() / 6
    found = []
    for weight in (0.0, 2.0):
        training = LabelSensitiveTraining(copy.deepcopy(model), gate, ablation=weight, **options)
        with torch.no_grad():
            training.loss(images(), LABELS, epoch)
        gate.weight.requires_grad_(False)  # a step that moves nothing
        for _ in range(step):
            training.after_step()
        gate.weight.requires_grad_(True)
        found.append(training.loss(images(), LABELS, epoch))
    torch.testing.assert_close(found[1] - found[0], 0.5 * 2.0 * loss, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(loss, gate.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(found[1] - found[0], gate.weight)[0], wanted, rtol=1e-3, atol=1e-5)


def test_ablation_makes_a_class_depend_on_the_channels_of_its_gate():
    """Two channels say the same of each class; only one of them is in its gate. In the end only that one speaks."""
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    sign = 1.0 - 2 * labels
    inputs = torch.stack([sign, sign], 1) + 0.1 * torch.randn(64, 2)
    rates = {}
    for ablation in (0.0, 1.0):
        model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
            model[0].bias.zero_()
            model[2].weight.copy_(torch.tensor([[1.0, 1, -1, -1], [-1, -1, 1, 1]]))
            model[2].bias.zero_()
        model[0].requires_grad_(False)  # channels stay what they are
        gate = LabelSensitiveGate.fixed(2, 4, exclusive=1)
        gate.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]]))
        training = LabelSensitiveTraining(model, gate, ablation=ablation)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(150):
            optimizer.zero_grad()
            training.loss(inputs, labels, 0).backward()
            optimizer.step()
            training.after_step()
        with torch.no_grad():
            without = model[2](model[:2](inputs) * (1 - gate.weight[labels])).argmax(1)
            assert bool((model(inputs).argmax(1) == labels).all())
        rates[ablation] = float((without == labels).double().mean())
    assert rates[0.0] > 0.9
    assert rates[1.0] < 0.1


def test_a_fixed_gate_has_no_penalty_and_no_gradient(model, images):
    gate = LabelSensitiveGate.fixed(4, 6, exclusive=1)
    training = paper_training(model, gate, penalty=GatePenalty(0.25))
    found = training.loss(images(), LABELS, epoch=1)
    torch.testing.assert_close(found, by_hand(model, gate, images(), LABELS, sparsity=0.0))
    found.backward()
    training.after_step()
    assert gate.weight.grad is None
    assert torch.equal(gate.weight, LabelSensitiveGate.fixed(4, 6, exclusive=1).weight)


class ConvHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, images):
        return self.head(self.conv(images).relu()).mean((2, 3))


class TokenHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        return self.head(self.conv(images).relu().flatten(2).mT).mean(1)


@pytest.mark.parametrize("network", [ConvHead, TokenHead])
def test_a_feature_map_before_the_head_is_gated_channel_by_channel(network, gate, images):
    torch.manual_seed(0)
    model = network()
    maps = model.conv(images()).relu()
    rows = gate.weight.detach()[LABELS]
    weight = model.head.weight.flatten(1)
    logits = torch.einsum("nkhw,nk,ck->nc", maps, rows, weight) / maps[0, 0].numel() + model.head.bias
    for scheme, plain in (("alternating", 0.0), ("joint", F.cross_entropy(model(images()), LABELS))):
        training = paper_training(
            model, gate, schedule=GateSchedule(scheme=scheme), penalty=GatePenalty(0.25, sparsity=0.0)
        )
        torch.testing.assert_close(training.loss(images(), LABELS, 1), plain + F.cross_entropy(logits, LABELS))


# -- in the user's own loop --------------------------------------------------------------------------------------------


def train(model, gate, batches, epochs=3, micro=1, scheme="alternating", **options):
    training = paper_training(model, gate, schedule=GateSchedule(scheme=scheme), penalty=GatePenalty(0.25))
    optimizer = optimizer_of(model, gate, **options)
    for epoch in range(epochs):
        for inputs, labels in batches:
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(micro), labels.chunk(micro), strict=True):
                (training.loss(x, y, epoch) / micro).backward()
            optimizer.step()
            training.after_step()
    return training


def test_the_gate_keeps_its_constraint_step_by_step_and_becomes_sparse(model, gate, images):
    training = paper_training(
        model, gate, schedule=alternating(period=1, phase=0), penalty=GatePenalty(0.25, sparsity=0.1)
    )
    optimizer = optimizer_of(model, gate, momentum=0.9, weight_decay=1e-2)
    densities = [gate.density]
    for _ in range(200):
        optimizer.zero_grad()
        training.loss(images(), LABELS, 0).backward()
        optimizer.step()
        training.after_step()
        assert bool((gate.weight.amax(0) == 1).all())
        assert bool(((gate.weight >= 0) & (gate.weight <= 1)).all())
        densities.append(gate.density)
    assert densities[0] > 0.5
    assert densities[-1] == pytest.approx(0.25, abs=0.05)
    assert gate.class_filters().layer == "fc"
    assert gate.counts.tolist() == [400, 200, 400, 200]


def test_accumulated_gradients_are_those_of_the_whole_batch(model, gate, images):
    model.eval()  # batch norm sees a half otherwise
    twin, other = copy.deepcopy(model), copy.deepcopy(gate)
    batches = [(images(), LABELS), (images(seed=2), LABELS.roll(1))]
    train(model, gate, batches, momentum=0.9)
    train(twin, other, batches, micro=2, momentum=0.9)
    torch.testing.assert_close(gate.weight, other.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.conv1.weight, twin.conv1.weight, rtol=1e-4, atol=1e-5)
    assert not torch.equal(gate.weight, LabelSensitiveGate(4, 6, generator=torch.Generator().manual_seed(0)).weight)


def test_gradients_can_be_clipped_and_the_gate_stays_in_its_place(model, gate, images):
    training = paper_training(model, gate, penalty=GatePenalty(0.25, sparsity=1e3))
    training.loss(images(), LABELS, 1).backward()
    assert float(nn.utils.clip_grad_norm_([*model.parameters(), gate.weight], 1e-3)) > 1
    optimizer_of(model, gate).step()
    training.after_step()
    assert float((gate.weight.detach() - gate.weight.detach().clamp(0, 1)).abs().max()) == 0


@pytest.mark.parametrize("around", ["forward", "loop"])
def test_under_autocast_it_learns_as_without(around, model, gate, images):
    twin, other = copy.deepcopy(model), copy.deepcopy(gate)
    training = paper_training(model, gate, penalty=GatePenalty(0.25))
    optimizer = optimizer_of(model, gate)
    low = torch.autocast("cpu", torch.bfloat16)
    for epoch in range(3):
        if around == "loop":
            with low:
                optimizer.zero_grad()
                training.loss(images(), LABELS, epoch).backward()
                optimizer.step()
                training.after_step()
        else:
            optimizer.zero_grad()
            with low:
                loss = training.loss(images(), LABELS, epoch)
            loss.backward()
            optimizer.step()
            training.after_step()
    train(twin, other, [(images(), LABELS)])
    torch.testing.assert_close(gate.weight, other.weight, rtol=0.1, atol=0.02)
    torch.testing.assert_close(model.fc.weight, twin.fc.weight, rtol=0.1, atol=0.02)


def test_a_compiled_model_is_gated_too(model, gate, images):
    model.eval()  # in train mode running statistics would move between the two
    expected = by_hand(model, gate, images(), LABELS)
    compiled = torch.compile(model, backend="eager")
    training = paper_training(compiled, gate, penalty=GatePenalty(0.25))
    plain = F.cross_entropy(copy.deepcopy(model)(images()), LABELS)
    torch.testing.assert_close(training.loss(images(), LABELS, 0), plain)
    torch.testing.assert_close(training.loss(images(), LABELS, 1), expected)


@pytest.mark.parametrize("scheme", ["alternating", "joint"])
@pytest.mark.parametrize("ending", ["success", "bad labels", "exception", "interrupt"])
def test_the_model_is_given_back(scheme, ending, model, gate, images):
    training = paper_training(model, gate, schedule=GateSchedule(scheme=scheme))
    model.bn1.eval()
    if ending in ("exception", "interrupt"):
        error = {"exception": RuntimeError("in the head"), "interrupt": KeyboardInterrupt()}[ending]
        training.loss(images(), LABELS, 1)

        def stop(*_):
            raise error

        model.relu.register_forward_hook(stop)
    before = Snapshot.of(model)
    counts = gate.counts.clone()
    if ending == "success":
        with torch.no_grad():
            training.loss(images(), LABELS, 1)
        # a training pass: running statistics have moved, nothing else
        now = Snapshot.of(model)
        assert [key for (key, a), (_, b) in zip(now.state, before.state, strict=True) if not torch.equal(a, b)] == [
            "bn2.running_mean", "bn2.running_var", "bn2.num_batches_tracked",
        ]  # fmt: skip
        before = before._replace(state=now.state)
    else:
        labels = torch.full((6,), 4) if ending == "bad labels" else LABELS
        with pytest.raises((LabelError, RuntimeError, KeyboardInterrupt)):
            training.loss(images(), labels, 1)
        assert torch.equal(gate.counts, counts)
    Snapshot.of(model).assert_same(before)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_plain_epoch_does_not_move_the_gate_whatever_the_optimiser_keeps(kind, model, gate, images):
    training = paper_training(model, gate)
    groups = [{"params": model.parameters()}, gate.parameter_group(0.1)]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9) if kind == "sgd" else torch.optim.Adam(groups, lr=0.01)
    for epoch, moves in ((1, True), (2, False)):
        for _ in range(3):
            before = gate.weight.detach().clone()
            # the gate is not the model's: what is left of its gradient would be taken again
            model.zero_grad()
            training.loss(images(), LABELS, epoch).backward()
            optimizer.step()
            training.after_step()
            assert torch.equal(gate.weight, before) is not moves
            assert bool((gate.weight.amax(0) == 1).all())


def test_under_adam_the_gate_has_no_momentum(gate):
    optimizer = torch.optim.Adam([gate.parameter_group(0.1)])
    gate.weight.grad = torch.ones_like(gate.weight)
    optimizer.step()
    assert torch.equal(optimizer.state[gate.weight]["exp_avg"], gate.weight.grad)


def test_judging_is_not_counted_as_training(model, gate, images):
    training = paper_training(model, gate)
    with torch.no_grad():
        training.loss(images(), LABELS, 1)
    assert gate.counts.tolist() == [0] * 4
    training.loss(images(), LABELS, 1)
    assert gate.counts.tolist() == [2, 1, 2, 1]
