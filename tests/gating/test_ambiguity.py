"""Filter ambiguity: its value at the gate it returns, against other gates, and on networks whose answer is known."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from captum_classfilters import GatePenalty, LabelSensitiveGate, filter_ambiguity
from captum_classfilters.core.errors import EmptyLoaderError, HeadError, LabelError, NonFiniteError, OptionError
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.gating.ambiguity import _search
from captum_classfilters.gating.gate import project


class Given(nn.Module):
    """A head whose inputs are the images themselves."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, features):
        return self.fc(self.flatten(features))


def problem(seed=0, count=60):
    """Noise, weights and labels that know nothing of each other: a gate finds much to do."""
    generator = torch.Generator().manual_seed(seed)
    model = Given(torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator))
    features = torch.randn(count, 6, generator=generator).relu()
    labels = torch.randint(4, (count,), generator=generator)
    return model, features, labels


def batches_of(features, labels, size=16):
    return list(zip(features.split(size), labels.split(size), strict=True))


def phi(model, gate, features, labels, density, sparsity=0.02, kind="abs"):
    """By plain loops in float64: ``(cross-entropy, penalty)``."""
    gate, weight = gate.double().tolist(), model.fc.weight.detach().double().tolist()
    bias, total = model.fc.bias.detach().double().tolist(), 0.0
    for row, label in zip(features.double().tolist(), labels.tolist(), strict=True):
        logits = [
            b + sum(w * x * g for w, x, g in zip(row_of_w, row, gate[label], strict=True))
            for row_of_w, b in zip(weight, bias, strict=True)
        ]
        total += math.log(sum(math.exp(value) for value in logits)) - logits[label]
    excess = sum(map(sum, gate)) - density * len(gate) * len(gate[0])
    distance = abs(excess) if kind == "abs" else max(excess, 0.0)
    return total / len(labels), sparsity * distance


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"penalty": GatePenalty(0.25, 0.1)},
        {"penalty": GatePenalty(0.5, kind="hinge")},
        {"anneal": False},
        {"steps": 1},
    ],
    ids=str,
)
def test_phi_is_that_of_the_gate_that_is_returned(options):
    model, features, labels = problem()
    found = filter_ambiguity(model, batches_of(features, labels), **options)
    gate = found.gate.weight.detach()
    wanted = options.get("penalty", GatePenalty(0.1 + 0.9 / 4))
    entropy, penalty = phi(model, gate, features, labels, wanted.density, found.sparsity, wanted.kind)
    assert found.cross_entropy == pytest.approx(entropy, rel=1e-5)
    assert found.penalty == pytest.approx(penalty, rel=1e-4, abs=1e-6)
    assert found.value == found.cross_entropy + found.penalty
    assert found.gate_density == pytest.approx(float(gate.mean()), rel=1e-6)
    assert (found.density, found.sparsity) == (pytest.approx(wanted.density), wanted.sparsity)
    assert bool((gate >= 0).all())
    assert bool((gate.amax(0) == 1).all())
    assert found.samples == 60
    assert found.gate.counts.tolist() == torch.bincount(labels, minlength=4).tolist()
    assert found.gate.layer == "fc"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sparsity", [0.02, 0.2])
def test_no_gate_at_random_is_better(seed, sparsity):
    model, features, labels = problem(seed)
    found = filter_ambiguity(model, batches_of(features, labels), penalty=GatePenalty(sparsity=sparsity))
    generator, ones = torch.Generator().manual_seed(9), torch.ones(4, 6)
    gates = [ones, LabelSensitiveGate.fixed(4, 6, exclusive=1).weight.detach()]
    for power in (0.5, 1, 4, 20):
        gates += [project(torch.rand(4, 6, generator=generator) ** power, ones) for _ in range(50)]
    # near to what was found, too
    best = found.gate.weight.detach()
    gates += [project(best + 0.02 * torch.randn(4, 6, generator=generator), ones) for _ in range(20)]
    others = [sum(phi(model, gate, features, labels, found.density, sparsity)) for gate in gates]
    assert found.value <= min(others) + 1e-4
    assert found.value < others[0] - 0.1


def own_channels(count=40):
    """Channels 0 to 3 are one class's own and tell it for certain; each is loud for the other classes as well."""
    weight = 30.0 * torch.eye(4)
    labels = torch.arange(count) % 4
    return Given(weight), torch.ones(count, 4), labels


def one_direction(count=40):
    """What tells the classes apart is one direction over all channels, read by every class with its own weight."""
    labels = torch.arange(count) % 4
    features = (labels[:, None] - 1.5) * torch.ones(1, 4)
    weight = 4 * (torch.arange(4.0)[:, None] - 1.5) * torch.ones(1, 4)
    bias = -8 * (torch.arange(4.0) - 1.5) ** 2
    return Given(weight, bias), features, labels


def test_channels_that_are_one_class_s_own_are_found_and_leave_nothing_to_lose():
    model, features, labels = own_channels()
    found = filter_ambiguity(model, batches_of(features, labels), penalty=GatePenalty(0.25))
    torch.testing.assert_close(found.gate.weight.detach(), torch.eye(4), rtol=0, atol=0.02)
    assert found.value < 0.01
    # for all classes open, they tell nothing
    assert phi(model, torch.ones(4, 4), features, labels, 0.25)[0] == pytest.approx(math.log(4))


def test_what_all_classes_share_is_more_ambiguous():
    shared = filter_ambiguity(*shared_batches(), penalty=GatePenalty(0.25))
    model, features, labels = own_channels()
    assert shared.value > filter_ambiguity(model, batches_of(features, labels), penalty=GatePenalty(0.25)).value + 0.1
    model, features, labels = one_direction()
    assert (model(features).argmax(1) == labels).all()


def shared_batches():
    model, features, labels = one_direction()
    return model, batches_of(features, labels)


# -- the search --------------------------------------------------------------------------------------------------------


def test_without_annealing_the_gate_stays_near_its_constant():
    model, features, labels = problem()
    loader = batches_of(features, labels)
    # of a hinge with slope from the start, all entries fall together; with annealing the data chooses first
    steep = GatePenalty(sparsity=5.0)
    slow = filter_ambiguity(model, loader, penalty=steep)
    fast = filter_ambiguity(model, loader, penalty=steep, anneal=False)

    def spread(found):
        gate = found.gate.weight.detach()
        return float(torch.minimum(gate, 1 - gate).mean())

    assert spread(fast) > spread(slow)
    assert fast.value > slow.value
    # nothing to anneal
    first, second = (
        filter_ambiguity(model, loader, penalty=GatePenalty(sparsity=0.0), anneal=way) for way in (True, False)
    )
    assert torch.equal(first.gate.weight, second.gate.weight)
    assert first.penalty == 0.0


def test_it_is_the_same_each_time_and_for_every_batch_size_and_draws_nothing():
    model, features, labels = problem()
    state = torch.get_rng_state()
    first, *others = (filter_ambiguity(model, batches_of(features, labels, size)) for size in (16, 16, 7, 60, 1))
    for other in others:
        assert torch.equal(first.gate.weight, other.gate.weight)
        assert first.value == other.value
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_pass_stands_for_model_and_loader():
    model, features, labels = problem()
    loader = batches_of(features, labels)
    found = filter_ambiguity(HeadPass(model, loader).cached(), steps=5)
    assert torch.equal(found.gate.weight, filter_ambiguity(model, loader, steps=5).gate.weight)


def test_rows_that_are_gated_at_a_time_do_not_change_it(monkeypatch):
    model, features, labels = problem()
    whole = filter_ambiguity(model, batches_of(features, labels), steps=30)
    monkeypatch.setattr(sys.modules["captum_classfilters.gating.ambiguity"], "_ROWS", 7)
    parts = filter_ambiguity(model, batches_of(features, labels), steps=30)
    assert parts.value == pytest.approx(whole.value, rel=1e-4)
    torch.testing.assert_close(parts.gate.weight, whole.gate.weight, rtol=1e-2, atol=1e-2)


def test_more_steps_end_lower():
    model, features, labels = problem()
    values = [filter_ambiguity(model, batches_of(features, labels), steps=steps).value for steps in (1, 20, 300)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[2] + 0.05


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_searches_where_gradients_are_off(around, small_cnn, images):
    model, loader = small_cnn(), [(images(), torch.tensor([0, 3, 1, 2, 2, 0]))]
    expected = filter_ambiguity(model, loader, steps=20)
    with around():
        found = filter_ambiguity(model, loader, steps=20)
    assert found.value == expected.value
    assert torch.equal(found.gate.weight, expected.gate.weight)


def test_the_search_stays_on_the_model_s_device(device, assert_close, monkeypatch):
    with device.mode:
        if device.name == "cuda" and not torch.cuda.is_available():
            # autograd cannot go back through tensors that are not there
            monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
        model, features, labels = problem()
        head = SimpleNamespace(weight=model.fc.weight.detach().to(device.name), bias=torch.zeros(4, device=device.name))
        weight, parts = _search(
            features.to(device.name), labels.to(device.name), head, 0.3, GatePenalty(), steps=3, lr=0.1, anneal=True
        )
        assert_close(weight.amax(0), torch.ones(6, device=device.name))
        assert all(map(math.isfinite, parts))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"steps": 0}, "steps must be an integer of at least 1; got 0"),
        (lambda: {"steps": 1.5}, "steps must be an integer of at least 1; got 1.5"),
        (lambda: {"lr": -1.0}, "lr must be a finite number of at least 0; got -1.0"),
        (
            lambda: {"penalty": GatePenalty(sparsity=math.nan)},
            "sparsity must be a finite number of at least 0",
        ),
        (lambda: {"penalty": GatePenalty(kind="l2")}, r"kind must be one of \['abs', 'hinge'\], got 'l2'"),
        (
            lambda: {"penalty": GatePenalty(density=0.2)},
            r"density must be a number in \[0.25, 1\], .*got 0.2",
        ),
    ],
)
def test_bad_options_are_refused_before_the_second_batch(options, message):
    model, features, labels = problem()
    loader = iter(batches_of(features, labels))
    with pytest.raises(OptionError, match=message):
        filter_ambiguity(model, loader, **options())
    assert len(list(loader)) >= 3


def test_bad_loaders_and_models_are_refused():
    model, features, labels = problem()
    cases = [
        (model, [], EmptyLoaderError, "the loader gave no sample"),
        (model, [features], LabelError, "no labels"),
        (model, [(features, labels + 1)], LabelError, r"must lie in \[0, 4\), got 4"),
        (model, [(features * math.nan, labels)], NonFiniteError, "expected finite features"),
        (nn.Sequential(nn.Flatten()), [(features, labels)], HeadError, "head"),
    ]
    for network, loader, error, message in cases:
        with pytest.raises(error, match=message):
            filter_ambiguity(network, loader)


def test_a_search_that_finds_no_number_says_so():
    model, features, labels = problem()
    with torch.no_grad():
        model.fc.weight.mul_(1e30)
    with pytest.raises(NonFiniteError, match="expected finite logits"):
        filter_ambiguity(model, batches_of(features * 1e30, labels), steps=3)
