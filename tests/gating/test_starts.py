"""What a gate is before its first gated epoch: a table of what the network does, from one pass over the loader."""

import copy

import pytest
import torch
from contract import Snapshot
from shared import alternating, paper_training

from captum_classfilters import (
    ClassFilters,
    GatePenalty,
    GateSchedule,
    InfluentialFeatures,
    LabelSensitiveGate,
    filter_ambiguity,
)
from captum_classfilters.core.errors import EmptyLoaderError, IdleChannelWarning, OptionError
from captum_classfilters.gating.label_sensitive import STARTS

# small random networks have channels that speak for no class
pytestmark = pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.IdleChannelWarning")
LABELS = torch.arange(24) % 4


def new_gate(seed=0):
    return LabelSensitiveGate(4, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def loader(images):
    return list(zip(images(24).split(7), LABELS.split(7), strict=True))


def by_hand(model, loader, start):
    """Class means in a loop over samples, in float64."""
    model = copy.deepcopy(model).eval()
    sums, counts = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4)
    for images, labels in loader:
        for features, label in zip(model.penultimate(images).detach(), labels.tolist(), strict=True):
            sums[label] += features.double()
            counts[label] += 1
    table = sums / counts[:, None]
    if start == "contribution":
        table = table * model.fc.weight.detach().double()
    largest = table.amax(0)
    return torch.where(largest > 0, table.clamp(min=0) / largest, 1.0).float()


@pytest.mark.parametrize("start", ["contribution", "mean_activation"])
def test_the_start_is_the_class_means_of_the_network_at_that_time(start, model, loader):
    gate = new_gate()
    training = paper_training(model, gate, schedule=alternating(start=start))
    assert not training.before_epoch(0, loader)  # a plain epoch
    with torch.no_grad():
        model.fc.weight.mul_(-1)  # a step of the plain epoch
    before = Snapshot.of(model)
    assert training.before_epoch(1, loader)
    Snapshot.of(model).assert_same(before)
    torch.testing.assert_close(gate.weight.detach(), by_hand(model, loader, start), rtol=1e-5, atol=1e-6)
    assert not training.before_epoch(4, loader)  # it was started


@pytest.mark.parametrize("scheme", ["alternating", "joint"])
@pytest.mark.parametrize("start", STARTS)
def test_fit_starts_it_before_the_first_gated_epoch(start, scheme, model, loader):
    gate = new_gate()
    schedule = GateSchedule(period=2, phase=1, warmup=1, scheme=scheme, start=start)
    training = paper_training(model, gate, schedule=schedule)
    seen = {}
    plain = training.before_epoch

    def watched(epoch, batches):
        started = plain(epoch, batches)
        seen[epoch] = (started, gate.weight.detach().clone(), by_hand(model, loader, start))
        return started

    training.before_epoch = watched
    training.fit(loader, 3, lr=0.05)
    assert [seen[epoch][0] for epoch in range(3)] == [False, True, False]
    assert torch.equal(seen[0][1], new_gate().weight)
    expected = {"noise": new_gate().weight.detach(), "constant": torch.ones(4, 6)}.get(start, seen[1][2])
    torch.testing.assert_close(seen[1][1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "gate",
    [
        LabelSensitiveGate.fixed(4, 6, exclusive=1),
        pytest.param("loaded", id="loaded"),
        pytest.param("state", id="state"),
        pytest.param("filters", id="from filters"),
        pytest.param("searched", id="searched"),
    ],
    ids=["fixed", "loaded", "state", "from filters", "searched"],
)
def test_a_gate_that_is_no_noise_stays_as_it_is(gate, model, loader, tmp_path):
    if gate == "loaded":
        new_gate(3).save(tmp_path / "gate.safetensors")
        gate = LabelSensitiveGate.load(tmp_path / "gate.safetensors")
    elif gate == "state":
        gate, state = new_gate(), new_gate(3).state_dict()
        gate.load_state_dict(state)
    elif gate == "searched":
        gate = filter_ambiguity(model, loader, penalty=GatePenalty(0.4), steps=2).gate
    elif gate == "filters":
        gate = LabelSensitiveGate.from_filters(InfluentialFeatures(model).attribute(loader))
    before = gate.weight.detach().clone()
    assert not paper_training(model, gate).before_epoch(1, loader)
    assert torch.equal(gate.weight, before)


def test_a_run_that_was_killed_after_the_start_does_not_start_again(model, loader, tmp_path):
    torch.manual_seed(0)
    whole, once = copy.deepcopy(model), new_gate()
    paper_training(whole, once).fit(loader, 3)
    for epochs in (1, 2, 3):
        torch.manual_seed(0)
        again, gate = copy.deepcopy(model), new_gate()
        training = paper_training(again, gate)
        starts = []
        inner = training._class_table
        training._class_table = lambda *args, inner=inner, starts=starts: starts.append(1) or inner(*args)
        training.fit(loader, epochs, checkpoint=tmp_path / "checkpoint.pt")
        # before epoch 1: by the run that trains it
        assert len(starts) == (epochs == 2)
    assert gate.density == pytest.approx(once.density, abs=0.05)


def test_a_table_of_any_method_is_a_start():
    table = torch.tensor([[2.0, -1.0, 0.0], [1.0, 3.0, -2.0]], dtype=torch.float64)
    filters = ClassFilters(table, table, torch.tensor([5, 5]), "contribution", "head", ("cat", "dog"))
    with pytest.warns(IdleChannelWarning, match="1 of 3 channels have no positive score"):
        gate = LabelSensitiveGate.from_filters(filters)
    assert gate.weight.tolist() == [[1.0, 0.0, 1.0], [0.5, 1.0, 1.0]]
    assert gate.layer == "head"
    assert gate.weight.requires_grad
    assert gate.class_filters(("cat", "dog")).seen.all()


def test_the_start_has_the_rank_order_of_contribution(model, loader):
    filters = InfluentialFeatures(model.eval()).attribute(loader, selector="contribution")
    gate, other = new_gate(), LabelSensitiveGate.from_filters(filters)
    paper_training(model, gate, schedule=alternating(phase=0)).before_epoch(0, loader)
    torch.testing.assert_close(gate.weight, other.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda model, loader: LabelSensitiveGate.from_filters(model), OptionError, "expected ClassFilters"),
        (
            lambda model, loader: LabelSensitiveGate.from_filters(
                ClassFilters(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([5, 0]), "gate", "fc", ("cat", "dog"))
            ),
            OptionError,
            "no samples of class 'dog'",
        ),
        (
            lambda model, loader: paper_training(
                model, LabelSensitiveGate.from_filters(other_layer(model, loader))
            ).loss(*loader[0], 1),
            OptionError,
            "the gate is of layer 'conv1', the head of this network is 'fc'",
        ),
        (
            lambda model, loader: paper_training(model, new_gate()).loss(*loader[0], 1),
            OptionError,
            "before_epoch",
        ),
        (
            lambda model, loader: paper_training(model, new_gate()).before_epoch(1, iter(loader)),
            EmptyLoaderError,
            "read only once",
        ),
        (
            lambda model, loader: paper_training(model, new_gate()).before_epoch(
                1, [(images, labels % 3) for images, labels in loader]
            ),
            OptionError,
            r'no sample of class 3 in the loader.*start="noise"',
        ),
        (lambda model, loader: alternating(start="zeros"), OptionError, "start must be one of"),
    ],
)
def test_refusals_say_what_to_do(call, error, words, model, loader):
    with pytest.raises(error, match=words):
        call(model, loader)


def other_layer(model, loader):
    filters = InfluentialFeatures(model).attribute(loader)
    return ClassFilters(filters.scores, filters.mass, filters.counts, "histogram", "conv1", filters.class_names)


def test_a_loop_of_one_s_own_starts_the_gate(model, loader):
    gate = new_gate()
    training = paper_training(model, gate)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, gate.parameter_group(lr=0.1)], lr=0.1)
    for epoch in range(2):
        training.before_epoch(epoch, loader)
        for images, labels in loader:
            optimizer.zero_grad()
            training.loss(images, labels, epoch).backward()
            optimizer.step()
            training.after_step()
    assert not gate.is_noise
