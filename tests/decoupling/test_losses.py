"""The losses of eqs. 9 to 12 against plain loops, their bounds, and what the first says of mutual information."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from captum_classfilters.decoupling import DecouplingOptions
from captum_classfilters.decoupling.controller import (
    DIRECTIONS,
    budget_loss,
    distillation_loss,
    divergence_loss,
    mutual_information_loss,
    sparsity_loss,
)

SEEDS = [0, 1, 2]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gates_of(seed, count=7, channels=5):
    """Soft rows and hard rows, as in training."""
    gates = torch.rand(count, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gates[::2] = gates[::2].round()
    return gates


def labels_of(seed, count=7, classes=4):
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def combined(entropy, rows, **weights):
    """Eq. 12 of losses of layers."""
    return DecouplingOptions.paper(**weights).combine(entropy, None, [tuple(row) for row in rows], torch.zeros(()))


def softmax(row):
    shifted = [math.exp(value - max(row)) for value in row]
    return [value / sum(shifted) for value in shifted]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# -- against loops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_mutual_information_is_eq_9_of_a_loop(seed):
    gates, weight, labels = gates_of(seed), drawn(4, 5, seed=seed + 10), labels_of(seed)
    terms = []
    for row, label in zip(gates.tolist(), labels.tolist(), strict=True):
        scores = [sum(w * z for w, z in zip(line, row, strict=True)) for line in weight.tolist()]
        terms.append(-math.log(softmax(scores)[label]))
    assert mutual_information_loss(gates, weight, labels).item() == pytest.approx(sum(terms) / 7, rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_divergence_is_eq_10_of_a_loop_in_both_directions(seed):
    gates, response = gates_of(seed), drawn(7, 5, seed=seed + 10).relu() * 3
    pairs = [(softmax(z), softmax(y)) for z, y in zip(gates.tolist(), response.tolist(), strict=True)]
    forwards, backwards = sum(kl(z, y) for z, y in pairs) / 7, sum(kl(y, z) for z, y in pairs) / 7
    assert abs(forwards - backwards) > 0.01
    assert divergence_loss(gates, response).item() == pytest.approx(forwards, rel=1e-12)
    assert divergence_loss(gates, response, "z_y").item() == pytest.approx(forwards, rel=1e-12)
    assert divergence_loss(gates, response, "y_z").item() == pytest.approx(backwards, rel=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_sparsity_is_eq_11_of_a_loop(seed, rate):
    gates = gates_of(seed)
    expected = sum(abs(sum(row) - rate * 5) for row in gates.tolist()) / 7
    assert sparsity_loss(gates, rate).item() == pytest.approx(expected, rel=1e-12)
    if not rate:
        assert sparsity_loss(gates).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 2.0, 0.003), (0.0, 0.0, 0.0)], ids=str)
def test_eq_12_sums_over_layers_and_weighs(weights):
    rows = drawn(3, 4, seed=4).abs()
    entropy = torch.tensor(0.7, dtype=torch.float64)
    names = ("information", "divergence", "sparsity")
    found = combined(entropy, rows, **dict(zip(names, weights, strict=True)))
    sums = [sum(row[part] for row in rows.tolist()) for part in range(3)]
    assert [float(part) for part in found[2:5]] == pytest.approx(sums)
    assert float(found.cross_entropy) == 0.7
    assert float(found.total) == pytest.approx(0.7 + sum(w * s for w, s in zip(weights, sums, strict=True)))
    torch.testing.assert_close(found.per_layer, rows)
    assert float(found.mean_mutual_information) == pytest.approx(sums[0] / 3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_budget_counts_the_gates_of_all_layers_together(seed, rate):
    gates = [gates_of(seed), gates_of(seed + 20, channels=3)]
    opened = [sum(a) + sum(b) for a, b in zip(*(gate.tolist() for gate in gates), strict=True)]
    expected = sum(abs(value - rate * 8) for value in opened) / 7
    assert budget_loss(gates, rate).item() == pytest.approx(expected, rel=1e-12)
    # all of one layer and none of the other is half of all
    halves = [torch.ones(2, 4), torch.zeros(2, 4)]
    assert budget_loss(halves, 0.5).item() == 0.0
    assert float(sparsity_loss(halves[0], 0.5) + sparsity_loss(halves[1], 0.5)) == 4.0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_the_divergence_of_a_loop(temperature):
    logits, teacher = drawn(7, 4, seed=1), drawn(7, 4, seed=2) * 3
    pairs = zip((teacher / temperature).tolist(), (logits / temperature).tolist(), strict=True)
    expected = sum(kl(softmax(p), softmax(q)) for p, q in pairs) / 7 * temperature**2
    assert distillation_loss(logits, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)
    assert distillation_loss(logits, logits, temperature).item() == pytest.approx(0, abs=1e-12)


def test_layers_count_by_their_depth():
    information, divergence = DecouplingOptions(depth=2).layer_weights(3).T.tolist()
    assert information == pytest.approx([1 / 14, 4 / 14, 9 / 14])
    assert divergence == pytest.approx([1 / 3] * 3)
    assert DecouplingOptions(depth=0).layer_weights(4)[:, 0].tolist() == pytest.approx([0.25] * 4)
    assert DecouplingOptions.paper().layer_weights(3).tolist() == [[1.0, 1.0]] * 3


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences():
    # away from whole sums, where eq. 11 has a corner
    gates = (gates_of(0) * 0.9 + 0.03).requires_grad_(True)
    weight, response = drawn(4, 5, seed=1).requires_grad_(True), drawn(7, 5, seed=2).requires_grad_(True)
    labels = labels_of(0)
    assert gradcheck(lambda z, w: mutual_information_loss(z, w, labels), (gates, weight))
    for direction in DIRECTIONS:
        assert gradcheck(lambda z, y, direction=direction: divergence_loss(z, y, direction), (gates, response))
    for rate in (0.0, 0.5, 1.0):
        assert gradcheck(lambda z, rate=rate: sparsity_loss(z, rate), (gates,))


def test_the_total_carries_gradients_to_every_part_and_the_table_none():
    entropy = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    parts = drawn(2, 4, seed=3).requires_grad_(True)
    found = combined(entropy, parts, information=0.5, divergence=2.0, sparsity=0.25)
    found.total.backward()
    assert entropy.grad.item() == 1.0
    assert parts.grad.tolist() == [[0.5, 2.0, 0.25, 0.0]] * 2
    assert not found.per_layer.requires_grad
    assert all(part.requires_grad for part in found[:5])
    assert found.distillation.item() == 0.0


def test_layers_of_another_precision_are_counted_in_that_of_the_cross_entropy():
    entropy = torch.tensor(1.0)
    rows = [tuple(torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)]
    found = combined(entropy, rows, information=1.0, divergence=1.0, sparsity=1.0)
    assert {part.dtype for part in found} == {torch.float32}
    assert found.total.item() == 13.0


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_a_reader_that_reads_nothing_pays_the_logarithm_of_the_classes(classes):
    gates, labels = gates_of(0), labels_of(1, classes=classes)
    weight = torch.zeros(classes, 5, dtype=torch.float64)
    assert mutual_information_loss(gates, weight, labels).item() == pytest.approx(math.log(classes))
    closed = torch.zeros_like(gates)
    assert mutual_information_loss(closed, drawn(classes, 5), labels).item() == pytest.approx(math.log(classes))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_divergence_is_zero_for_the_same_distribution_and_above_for_others(seed, direction):
    gates = gates_of(seed)
    # a softmax does not see what is added to a whole row
    same = gates + drawn(7, 1, seed=seed) * 5
    assert divergence_loss(gates, same, direction).item() == pytest.approx(0.0, abs=1e-12)
    moved = same.clone()
    moved[3, 2] += 0.05
    assert divergence_loss(gates, moved, direction).item() > 1e-6
    assert divergence_loss(gates, drawn(7, 5, seed=seed), direction).item() > 0.01


def test_divergence_stays_finite_for_responses_that_are_far_apart():
    gates = gates_of(0).float()
    response = torch.zeros(7, 5)
    response[:, 0] = 1e4
    for direction in DIRECTIONS:
        assert math.isfinite(divergence_loss(gates, response, direction).item())


def test_sparsity_is_zero_where_exactly_the_target_is_open():
    gates = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    assert sparsity_loss(gates, 0.5).item() == 0.0
    # one too many and one too few do not make up for each other
    gates = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert sparsity_loss(gates, 0.5).item() == 1.0
    assert sparsity_loss(torch.zeros(3, 4)).item() == 0.0
    assert sparsity_loss(torch.ones(3, 4), 1.0).item() == 0.0


# -- mutual information ------------------------------------------------------------------------------------------------


def information(gates, labels):
    """``I(a; z)`` of a table of equally likely pairs, in nats, by its definition."""
    pairs = [(tuple(row), label) for row, label in zip(gates.tolist(), labels.tolist(), strict=True)]
    total = 0.0
    for pair in set(pairs):
        joint = pairs.count(pair) / len(pairs)
        z = sum(row == pair[0] for row, _ in pairs) / len(pairs)
        a = sum(label == pair[1] for _, label in pairs) / len(pairs)
        total += joint * math.log(joint / (z * a))
    return total


def entropy_of(labels):
    shares = [labels.tolist().count(label) / len(labels) for label in set(labels.tolist())]
    return -sum(share * math.log(share) for share in shares)


def best_loss(gates, labels, classes):
    weight = torch.zeros(classes, gates.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimiser.zero_grad()
        loss = mutual_information_loss(gates, weight, labels)
        loss.backward()
        return loss

    optimiser.step(closure)
    return closure().item()


@pytest.mark.parametrize("seed", range(4))
def test_entropy_less_the_loss_bounds_mutual_information_below(seed):
    gates, labels = gates_of(seed, 40, 2).round(), labels_of(seed, 40, 3)
    labels = torch.where(gates[:, 0] > 0, labels, 0)  # so that the gates do say something
    exact, bound = information(gates, labels), entropy_of(labels) - best_loss(gates, labels, 3)
    assert exact > 0.05
    assert bound <= exact + 1e-9
    # and any other reader's bound is lower
    for other in range(5):
        weight = drawn(3, 2, seed=other)
        assert entropy_of(labels) - mutual_information_loss(gates, weight, labels).item() <= bound + 1e-6


def test_the_bound_is_reached_where_a_linear_reader_can_say_all():
    # one gate for each of three states of z: any posterior is linear in them
    states = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 0])
    gates = torch.nn.functional.one_hot(states).double()
    exact = information(gates, labels)
    assert 0.3 < exact < entropy_of(labels)
    assert entropy_of(labels) - best_loss(gates, labels, 3) == pytest.approx(exact, abs=1e-6)
    # and where gates know the class, it is the whole entropy
    gates = torch.nn.functional.one_hot(labels).double()
    assert mutual_information_loss(gates, 40 * torch.eye(3).double(), labels).item() == pytest.approx(0, abs=1e-12)
    assert information(gates, labels) == pytest.approx(entropy_of(labels))
