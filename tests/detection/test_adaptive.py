"""Attackers who know of the detector: their steps against a loop written out, and what the detector's weight buys."""

import copy
from itertools import pairwise

import pytest
import torch
from contract import Snapshot
from scipy.stats import spearmanr
from shared import Passing, SmallCNN, seeded
from torch import nn
from torch.nn import functional as F

from captum_classfilters import PathDecoupler
from captum_classfilters.attacks import Normalized
from captum_classfilters.core.errors import LabelError, MergeError, OptionError, ShapeError
from captum_classfilters.detection import AdaptivePGD, PathMatching, PathOutlierDetector, distil

RADIUS, STEPS = 0.05, 6
STEP = RADIUS / 3


def pixels(count=24, seed=1):
    """Each of another mean colour: gates see means."""
    generator = torch.Generator().manual_seed(seed)
    fine, coarse = (torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64) for side in (8, 1))
    return (fine + coarse) / 2


@pytest.fixture(scope="module")
def decoupler():
    """In float64, three classes, 5 + 8 gates; each opens for half of the images, and soon changes its mind."""
    with torch.random.fork_rng():
        model = seeded(SmallCNN(num_classes=3, channels=8), 2).double().eval()
        found = PathDecoupler(model, ["conv1", "conv2"], reduction=1).eval()
    seeded(found.controllers, 3)
    images = pixels(64, seed=9)
    with torch.no_grad():
        for index, controller in enumerate(found.controllers):
            spread = found.gate_logits(images)[1][index].std(0).clamp(min=1e-3) / 1.5
            controller.excite.weight.div_(spread[:, None])
            controller.excite.bias.sub_(found.gate_logits(images)[1][index].median(0).values)
        model.fc.bias -= found(images).mean(0)
        for parameter in model.fc.parameters():
            parameter.mul_(6)
    return found


@pytest.fixture(scope="module")
def labels(decoupler):
    found = decoupler.paths(pixels()).predictions
    assert len(found.unique()) == 3
    return found


@pytest.fixture(scope="module")
def surrogate():
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((13, 5), (5,)))
    return lambda bits: torch.tanh((bits - 0.5) @ first) @ second


def wrong(decoupler, images, labels):
    return decoupler.paths(images).predictions != labels


def by_hand(decoupler, x):
    """Logits, gates and g of the network written out, with the gates of `Passing`."""
    model, gates, found = decoupler.model, [], []

    def gated(controller, maps, response):
        hidden = torch.relu(maps.mean((2, 3)) @ controller.squeeze.weight.T + controller.squeeze.bias)
        found.append(hidden @ controller.excite.weight.T + controller.excite.bias)
        gates.append(Passing.apply(found[-1]))
        return torch.relu(response * gates[-1][:, :, None, None])

    maps = gated(decoupler.controllers[0], x, model.bn1(model.conv1(x)))
    maps = gated(decoupler.controllers[1], maps, model.bn2(model.conv2(maps)))
    return model.fc(maps.mean((2, 3))), torch.cat(gates, 1), torch.cat(found, 1)


def plain_search(decoupler, image, label, loss_of):
    """One image: the step of the smallest loss among those that fool, or among all where none does; and the others."""
    current, tried = image, []
    for step in range(STEPS + 1):
        current = current.detach().requires_grad_()
        logits, gates, g = by_hand(decoupler, current[None])
        loss = loss_of(logits, gates, g)
        if step:
            tried.append((logits.argmax().item() == label, loss.item(), current.detach()))
        (gradient,) = torch.autograd.grad(loss, current)
        moved = current.detach() - STEP * gradient.sign()
        current = torch.min(torch.max(moved, image - RADIUS), image + RADIUS).clamp(0, 1)
    return min(tried, key=lambda each: each[:2])[2], tried


# -- projected gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0, 4.0])
def test_its_steps_follow_the_gradient_through_straight_gates(decoupler, labels, surrogate, weight):
    images = pixels()
    found = AdaptivePGD(decoupler, surrogate, weight=weight).perturb(images, labels, RADIUS, STEP, STEPS)
    fooled, not_last = 0, 0
    for image, label, got in zip(images[:12], labels[:12].tolist(), found, strict=False):

        def loss_of(logits, gates, _, label=label):
            return torch.log_softmax(logits, 1)[0, label] + weight * surrogate(gates)[0]

        expected, tried = plain_search(decoupler, image, label, loss_of)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        fooled += not min(tried, key=lambda each: each[:2])[0]
        not_last += not torch.equal(expected, tried[-1][2])
    # the case holds what is to be compared: some are fooled, some not, and not always best by the last step
    assert 0 < fooled < 12
    assert not_last > 0


def test_one_step_is_the_sign_of_that_gradient_and_not_of_the_frozen_path(decoupler, labels, surrogate):
    images = pixels().requires_grad_()
    found = AdaptivePGD(decoupler, surrogate, weight=4.0).perturb(images, labels, 0.5, 0.01, 1)

    def moved(logits, gates):
        loss = -F.cross_entropy(logits, labels, reduction="sum") + 4.0 * surrogate(gates).sum()
        return (images - 0.01 * torch.autograd.grad(loss, images)[0].sign()).clamp(0, 1)

    torch.testing.assert_close(found, moved(*by_hand(decoupler, images)[:2]))
    with decoupler.frozen(decoupler.gates(images)[1]):
        frozen = moved(*(decoupler(images), torch.zeros(24, 13, dtype=torch.float64)))
    assert ((found - frozen).abs() > 1e-3).double().mean() > 0.1


def test_a_step_is_against_the_network_until_it_errs_and_then_against_the_detector(decoupler, surrogate):
    images = pixels().requires_grad_()
    labels = decoupler.paths(images).predictions
    labels[::2] = (labels[::2] + 1) % 3  # these are seen wrong as they are
    found = AdaptivePGD(decoupler, surrogate).perturb(images, labels, 0.5, 0.01, 1)
    logits, gates = by_hand(decoupler, images)[:2]
    network = torch.autograd.grad(-F.cross_entropy(logits, labels, reduction="sum"), images, retain_graph=True)[0]
    detector = torch.autograd.grad(surrogate(gates).sum(), images)[0]
    expected = network.clone()
    expected[::2] = detector[::2]
    torch.testing.assert_close(found, (images - 0.01 * expected.sign()).clamp(0, 1))
    assert not torch.equal(network[::2].sign(), detector[::2].sign())


def test_it_stays_within_radius_and_bounds(decoupler, labels, surrogate):
    images = pixels().clamp(0.2, 0.7)
    kept = images.clone()
    attack = AdaptivePGD(decoupler, surrogate, bounds=(0.2, 0.7))
    found = attack.perturb(images, labels, RADIUS, STEP, STEPS)
    assert (found.shape, found.dtype, found.requires_grad) == (images.shape, images.dtype, False)
    assert (found.min(), found.max()) == (0.2, 0.7)
    assert (found - images).abs().max() == pytest.approx(RADIUS)
    assert torch.equal(images, kept)


def test_without_weight_there_is_no_surrogate(decoupler, labels, surrogate):
    arguments = pixels(), labels, RADIUS, STEP, STEPS
    alone = AdaptivePGD(decoupler).perturb(*arguments)
    assert torch.equal(AdaptivePGD(decoupler, surrogate, weight=0.0).perturb(*arguments), alone)
    assert torch.equal(AdaptivePGD(decoupler, None, weight=9.0).perturb(*arguments), alone)
    assert not torch.equal(AdaptivePGD(decoupler, surrogate).perturb(*arguments), alone)


def test_more_weight_looks_less_adversarial(decoupler, surrogate):
    images = pixels(48)
    labels = decoupler.paths(images).predictions

    def after(weight):
        attack = AdaptivePGD(decoupler, surrogate, weight=weight)
        paths = decoupler.paths(attack.perturb(images, labels, 2 * RADIUS, STEP, 12))
        return paths.predictions != labels, surrogate(paths.bits().double())

    fooled, looks = after(0.0)
    for weight in (0.3, 1.0):
        others, less = after(weight)
        # the same images: a heavier weight fools fewer, and not any fewer
        both = fooled & others
        assert both.sum() >= 6
        assert less[both].mean() < looks[both].mean() - 0.3


def test_once_fooled_stays_fooled(decoupler, labels, surrogate):
    # a surrogate this heavy leads back to where the network is right
    attack = AdaptivePGD(decoupler, surrogate, weight=5.0)
    fooled = [wrong(decoupler, attack.perturb(pixels(), labels, RADIUS, STEP, steps), labels) for steps in range(1, 9)]
    assert not fooled[0].all()
    for before, after in pairwise(fooled):
        assert not (before & ~after).any()
    assert fooled[-1].sum() > fooled[0].sum()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((RADIUS, STEP, 0), "step_num must be an integer of at least 1; got 0"),
        ((0.0, STEP, 1), "radius must be a finite number above 0; got 0.0"),
        ((RADIUS, -1.0, 1), "step_size must be a finite number above 0; got -1.0"),
    ],
)
def test_sizes_out_of_range_are_refused(decoupler, labels, sizes, message):
    with pytest.raises(OptionError, match=message):
        AdaptivePGD(decoupler).perturb(pixels(), labels, *sizes)


def test_a_surrogate_of_logits_reads_them_through_a_sigmoid(decoupler, labels, surrogate):
    seen = []

    def noted(values):
        seen.append(values.detach())
        return surrogate(values)

    AdaptivePGD(decoupler, noted, reads="logits").perturb(pixels(), labels, RADIUS, STEP, 1)
    with torch.no_grad():
        _, logits = decoupler.gate_logits(pixels())
    assert torch.allclose(seen[0], torch.cat(logits, 1).sigmoid())
    with pytest.raises(OptionError, match=r"reads must be one of \['bits', 'logits'\], got 'both'"):
        AdaptivePGD(decoupler, surrogate, reads="both")


def test_around_a_normalised_network_pixels_are_what_changes(decoupler, labels, surrogate):
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    pixel_images = pixels() * std.view(1, 3, 1, 1) + mean.view(1, 3, 1, 1)
    network = Normalized(decoupler, mean, std)
    found = AdaptivePGD(network, surrogate, weight=1.0, bounds=(0.0, 3.0)).perturb(pixel_images, labels, 0.02, 0.01, 1)
    shift = found - pixel_images
    # in each colour by the same, and up or down as it is without
    assert torch.allclose(shift.abs(), torch.tensor(0.01).double())
    plain = AdaptivePGD(decoupler, surrogate, weight=1.0, bounds=(-9, 9))
    direction = plain.perturb(network.normalize(pixel_images), labels, 0.02, 0.01, 1) - network.normalize(pixel_images)
    assert torch.equal(shift.sign(), direction.sign())


# -- towards another path ----------------------------------------------------------------------------------------------


def test_path_matching_comes_nearer_to_the_path_it_aims_at(decoupler, labels):
    images, clean = pixels(), decoupler.paths(pixels(40, seed=5))
    found = PathMatching(decoupler, clean).perturb(images, labels, 2 * RADIUS, STEP, 12)
    assert (found - images).abs().max() <= 2 * RADIUS + 1e-9
    own, bits = decoupler.paths(images).bits(), clean.bits()
    aims = []
    for row, label in zip(own, labels, strict=True):
        other = (clean.predictions != label).nonzero()[:, 0]
        aims.append(other[(bits[other] != row).sum(1).argmin()].item())
    before = (own != bits[aims]).double().sum(1)
    after = (decoupler.paths(found).bits() != bits[aims]).double().sum(1)
    assert (after < before).double().mean() > 0.5
    assert after.mean() < 0.7 * before.mean()

    # one step, by hand: the class and the path of the nearest image of another class
    images.requires_grad_()
    logits, _, g = by_hand(decoupler, images)
    goal = F.cross_entropy(logits, clean.predictions[aims], reduction="sum")
    goal = goal + 10.0 / 13 * F.binary_cross_entropy_with_logits(g, bits[aims].double(), reduction="sum")
    expected = (images - STEP * torch.autograd.grad(goal, images)[0].sign()).clamp(0, 1)
    torch.testing.assert_close(PathMatching(decoupler, clean).perturb(images, labels, 1.0, STEP, 1), expected)


def test_path_matching_takes_pixels_of_a_normalised_network(decoupler, labels):
    network = Normalized(decoupler, [0.0] * 3, [2.0] * 3)
    clean = decoupler.paths(pixels(40, seed=5))
    found = PathMatching(network, clean, bounds=(0.0, 2.0)).perturb(2 * pixels(), labels, 2 * RADIUS, 2 * STEP, 4)
    torch.testing.assert_close(found / 2, PathMatching(decoupler, clean).perturb(pixels(), labels, RADIUS, STEP, 4))


# -- the surrogate -----------------------------------------------------------------------------------------------------


def test_a_surrogate_says_what_the_detector_says(decoupler):
    paths, others = decoupler.paths(pixels(300, seed=6)), decoupler.paths(pixels(100, seed=7))
    detector = PathOutlierDetector().fit(paths)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = distil(detector, paths, lr=1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    for some in (paths, others):
        assert spearmanr(found(some.bits().float()), detector.strangeness(some)).statistic > 0.8
    # in standard deviations from the mean
    said = torch.as_tensor(detector.strangeness(paths))
    assert (found(paths.bits().float()) - (said - said.mean()) / said.std()).abs().mean() < 0.3
    torch.manual_seed(6)
    first, again, other = (distil(detector, paths, epochs=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_a_surrogate_may_read_logits_and_says_what_it_lacks(decoupler):
    paths = decoupler.paths(pixels(100, seed=6))
    detector = PathOutlierDetector().fit(paths)
    kept = decoupler.paths([pixels(100, seed=6)], logits=True)
    found = distil(detector, kept, reads="logits", lr=1e-2, epochs=300)
    assert spearmanr(found(kept.logits.sigmoid()), detector.strangeness(kept)).statistic > 0.7
    with pytest.raises(OptionError, match=r"the surrogate gives all paths the same score.*lower lr, got 30.0"):
        distil(detector, paths, lr=30.0)
    for given, reads in ((paths, "logits"), (paths[:1], "bits")):
        with pytest.raises(OptionError, match=f"at least two paths, for reads='{reads}' with logits"):
            distil(detector, given, reads=reads)


# -- what they leave, what they refuse ---------------------------------------------------------------------------------


def test_the_network_is_given_back(decoupler, labels):
    network = copy.deepcopy(decoupler).train()
    network.model.bn1.eval()
    clean = decoupler.paths(pixels(40, seed=5))
    before = Snapshot.of(network)
    found = AdaptivePGD(network).perturb(pixels(), labels, RADIUS, STEP, 2)
    PathMatching(network, clean).perturb(pixels(), labels, RADIUS, STEP, 1)
    Snapshot.of(network).assert_same(before)
    # in eval mode meanwhile
    assert torch.equal(found, AdaptivePGD(decoupler).perturb(pixels(), labels, RADIUS, STEP, 2))

    def interrupt(bits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AdaptivePGD(network, interrupt).perturb(pixels(), labels, RADIUS, STEP, 2)
    Snapshot.of(network).assert_same(before)
    with torch.no_grad():
        assert torch.equal(AdaptivePGD(network).perturb(pixels(), labels, RADIUS, STEP, 2), found)


def test_bad_arguments_are_refused(decoupler):
    clean = decoupler.paths(pixels(40, seed=5))
    for network in (decoupler.model, Normalized(nn.Identity(), 0.5, 1.0)):
        with pytest.raises(OptionError, match=r"expected a PathDecoupler, or Normalized around one, got (Sm|Id)"):
            AdaptivePGD(network)
    for weight in (-1.0, float("nan")):
        with pytest.raises(OptionError, match="weight must be a finite number of at least 0"):
            AdaptivePGD(decoupler, weight=weight)
        with pytest.raises(OptionError, match="weight must be a finite number of at least 0"):
            PathMatching(decoupler, clean, weight=weight)
    with pytest.raises(OptionError, match="the first below the second, got"):
        AdaptivePGD(decoupler, bounds=(2.0, 1.0))
    with pytest.raises(LabelError, match="clean paths of at least two classes"):
        PathMatching(decoupler, clean[clean.predictions == clean.predictions[0]])
    other = copy.deepcopy(decoupler)
    other.controllers[0].squeeze.bias.data += 0.1
    with pytest.raises(MergeError, match="another network"):
        PathMatching(other, clean).perturb(pixels(), torch.zeros(24, dtype=torch.int64), RADIUS, STEP, 1)


@pytest.mark.parametrize("matching", [False, True])
def test_bad_images_are_refused(decoupler, labels, matching):
    attack = PathMatching(decoupler, decoupler.paths(pixels(40, seed=5))) if matching else AdaptivePGD(decoupler)
    arguments = RADIUS, STEP, 1
    with pytest.raises(OptionError, match=r"images must lie in \[0.0, 1.0\]"):
        attack.perturb(pixels() * torch.nan, labels, *arguments)
    with pytest.raises(ShapeError, match="images must be floats"):
        attack.perturb(pixels().byte(), labels, *arguments)
    with pytest.raises(LabelError, match=r"labels must have shape \(24,\)"):
        attack.perturb(pixels(), labels[:2], *arguments)
    with pytest.raises(LabelError, match=r"labels must lie in \[0, 3\), got 3"):
        attack.perturb(pixels(), labels * 0 + 3, *arguments)
    with decoupler.frozen(decoupler.gates(pixels(1))[1]), pytest.raises(OptionError, match="frozen"):
        attack.perturb(pixels(), labels, *arguments)
    assert attack.perturb(pixels()[:0], labels[:0], *arguments).shape == (0, 3, 8, 8)
