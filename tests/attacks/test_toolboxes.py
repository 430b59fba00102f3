"""Attacks of ART and Foolbox behind one door each: what they find, and what they leave as it was."""

import sys
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from captum.robust import FGSM
from contract import Snapshot
from shared import seeded
from torch import nn

from captum_classfilters.attacks import ARTAttack, FoolboxAttack
from captum_classfilters.core.errors import LabelError, OptionError, ShapeError

pytest.importorskip("art")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports what scipy has moved
    foolbox = pytest.importorskip("foolbox")

LOSS = nn.CrossEntropyLoss(reduction="none")


def network(classes=4):
    """Each pixel has a gradient; wrong in train mode, where half of the features are dropped."""
    layers = OrderedDict(
        conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), tanh=nn.Tanh(), dropout=nn.Dropout(0.5),
        flatten=nn.Flatten(), head=nn.Linear(4 * 36, classes),
    )  # fmt: skip
    model = seeded(nn.Sequential(layers), 2).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)
        model.head.bias -= model(pixels(64)).mean(0)
    return model


def pixels(count=6, dtype=torch.float32):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def seen(model, images):
    with torch.no_grad():
        return model(images).argmax(1)


def by_captum(model, images, labels, epsilon):
    given = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSS(model(given), labels).sum(), given)
    assert gradient.abs().min() > 1e-6  # below, Captum changes nothing
    return FGSM(model, LOSS, 0.0, 1.0).perturb(given, epsilon, labels)


def fast(**options):
    return foolbox.attacks.LinfFastGradientAttack(random_start=False, **options)


# Each attack of both, cheap and not in vain
BOTH = {
    "art": lambda model: ARTAttack(model, "FastGradientMethod", num_classes=4, eps=0.1),
    "foolbox": lambda model: lambda images, labels: FoolboxAttack(model, fast())(images, labels, 0.1),
}
both = pytest.mark.parametrize("attack", BOTH.values(), ids=BOTH.keys())


# -- what they find ----------------------------------------------------------------------------------------------------


@both
def test_the_fast_gradient_is_captums(attack):
    model, images = network(), pixels()
    labels = seen(model, images)
    assert len(labels.unique()) > 1
    found = attack(model)(images, labels)
    torch.testing.assert_close(found, by_captum(model, images, labels, 0.1))
    assert (seen(model, found) != labels).any()


@pytest.mark.parametrize("classes", [2, 4])
def test_arts_carlini_and_wagner_fool_with_a_small_change(classes):
    model, images = network(classes), pixels()
    labels = seen(model, images)
    options = {"max_iter": 6, "binary_search_steps": 2, "initial_const": 5.0, "learning_rate": 0.1}
    found = ARTAttack(model, "CarliniL2Method", num_classes=classes, **options)(images, labels)
    assert (seen(model, found) != labels).all()
    distance = (found - images).flatten(1).norm(dim=1)
    # of two random images: about 5.6
    assert 0 < distance.max() < 1.5
    assert found.min() >= 0
    assert found.max() <= 1
    once = ARTAttack(model, "CarliniL2Method", num_classes=classes, max_iter=1, binary_search_steps=1)
    assert not torch.equal(once(images, labels), found)


def test_art_takes_a_class_and_attacks_without_gradients():
    from art.attacks.evasion import SquareAttack

    model, images = network(2), pixels()
    labels = seen(model, images)
    found = ARTAttack(model, SquareAttack, num_classes=2, max_iter=20, eps=0.3)(images, labels)
    assert (seen(model, found) != labels).any()
    assert (found - images).abs().max() <= 0.3 + 1e-6


def test_foolboxs_projected_gradient_keeps_to_epsilon():
    model, images = network(), pixels()
    labels = seen(model, images)
    attack = FoolboxAttack(model, foolbox.attacks.LinfPGD(steps=4, rel_stepsize=0.5, random_start=False))
    changes = [(attack(images, labels, epsilon) - images).abs().max().item() for epsilon in (0.02, 0.1)]
    assert changes == pytest.approx([0.02, 0.1], rel=1e-4)
    assert (seen(model, attack(images, labels, 0.1)) != labels).all()


def test_foolboxs_carlini_and_wagner_look_for_a_small_change():
    model, images = network(), pixels()
    labels = seen(model, images)
    attack = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=3, steps=20, stepsize=0.1, initial_const=1.0)
    found = FoolboxAttack(model, attack)(images, labels)
    assert (seen(model, found) != labels).all()
    assert 0 < (found - images).flatten(1).norm(dim=1).max() < 1.5


@both
def test_a_function_is_a_network_too(attack):
    model, images = network(), pixels()
    labels = seen(model, images)
    expected = attack(model)(images, labels)
    assert torch.equal(attack(lambda x: model(x))(images, labels), expected)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_go_to_the_network_s_dtype_and_come_back_in_their_own(attack, dtype):
    model, images = network(), pixels(dtype=dtype)
    labels = seen(model, images.float())
    found = attack(model)(images, labels)
    assert found.dtype == dtype
    expected = by_captum(model, images.float(), labels, 0.1)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("bounds", [(-1.0, 3.0), (0.2, 0.6)])
def test_other_bounds(bounds):
    model = network()
    images = pixels() * (bounds[1] - bounds[0]) + bounds[0]
    labels = seen(model, images)
    for found in (
        ARTAttack(model, "FastGradientMethod", bounds, num_classes=4, eps=0.3)(images, labels),
        FoolboxAttack(model, fast(), bounds)(images, labels, 0.3),
    ):
        torch.testing.assert_close(found.aminmax(), bounds_of(bounds))
        assert (found - images).abs().max() == pytest.approx(0.3, rel=1e-4)


def bounds_of(bounds):
    return torch.return_types.aminmax([torch.tensor(bound) for bound in bounds])


@both
def test_what_rounding_left_outside_the_bounds_is_no_error(attack):
    model, images = network(), pixels()
    images[:, :, 0], images[:, :, 1] = -5e-7, 1 + 5e-7
    found = attack(model)(images, seen(model, images))
    assert found.min() >= 0
    assert found.max() <= 1


# -- what they leave ---------------------------------------------------------------------------------------------------


@both
def test_the_model_is_given_back(attack):
    model, images = network().train(), pixels()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    # a caller's own gradients, in the middle of accumulating
    model.head.weight.grad = torch.ones_like(model.head.weight)
    labels, kept = seen(network(), images), images.clone()
    before = Snapshot.of(model)
    found = attack(model)(images, labels)
    Snapshot.of(model).assert_same(before)
    assert torch.equal(images, kept)
    assert not found.requires_grad
    # in eval mode meanwhile: as if it had been there before
    assert torch.equal(found, attack(network())(images, labels))


@both
def test_the_model_is_given_back_after_an_error(attack):
    model, images = network().train(), pixels()
    calls = []

    def interrupt(module, args):
        calls.append(module.training)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    before, state = Snapshot.of(model), np.random.get_state()[1].copy()
    with pytest.raises(KeyboardInterrupt):
        attack(model)(images, torch.zeros(6, dtype=torch.int64))
    Snapshot.of(model).assert_same(before)
    assert (np.random.get_state()[1] == state).all()
    assert calls == [False, False]
    handle.remove()


def test_art_draws_from_the_seed_and_from_nothing_else(capfd):
    from art.attacks.evasion import FastGradientMethod

    class Noisy(FastGradientMethod):
        """Draws from both global states, as several of ART's do."""

        def generate(self, x, y=None):
            return (x * 0 + np.random.rand(*x.shape) / 2 + torch.rand(x.shape).numpy() / 2).astype(np.float32)

    model, images, labels = network(), pixels(2), torch.tensor([0, 1])
    np.random.seed(7)
    torch.manual_seed(7)
    first = ARTAttack(model, Noisy, num_classes=4)(images, labels)
    after = (np.random.rand(), torch.rand(1))
    np.random.seed(8)
    torch.manual_seed(8)
    assert torch.equal(ARTAttack(model, Noisy, num_classes=4)(images, labels), first)
    assert not torch.equal(ARTAttack(model, Noisy, num_classes=4, seed=1)(images, labels), first)
    np.random.seed(7)
    torch.manual_seed(7)
    assert after == (np.random.rand(), torch.rand(1))
    # no bars
    ARTAttack(model, "CarliniL2Method", num_classes=4, max_iter=1, binary_search_steps=1)(images, labels)
    assert capfd.readouterr() == ("", "")


# -- refused -----------------------------------------------------------------------------------------------------------


@both
def test_no_images_are_no_error_and_bad_ones_are_refused(attack):
    model, images, labels = network(), pixels(2), torch.tensor([0, 1])
    assert attack(model)(images[:0], labels[:0]).shape == (0, 3, 8, 8)
    with pytest.raises(OptionError, match=r"images must lie in \[0.0, 1.0\], got values from 2"):
        attack(model)(images + 2, labels)
    with pytest.raises(ShapeError, match="images must be floats"):
        attack(model)(images.byte(), labels)
    with pytest.raises(LabelError, match=r"labels must have shape \(2,\), got \(1,\)"):
        attack(model)(images, labels[:1])
    with pytest.raises(LabelError, match=r"labels must lie in \[0, 4\), got 4"):
        attack(model)(images, labels + 3)
    with pytest.raises(ShapeError, match=r"the model must give logits of shape \(1, C\)"):
        attack(nn.Identity())(images, labels)


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        ("NoSuchMethod", {}, "attack must be of art.attacks.evasion, as \"CarliniL2Method\", got 'NoSuchMethod'"),
        (3, {}, "attack must be of art.attacks.evasion, .* got 3"),
        ("FastGradientMethod", {"steps": 3}, r"FastGradientMethod has no option 'steps'; it has \['norm', 'eps'"),
        ("FastGradientMethod", {"num_classes": 1}, "num_classes must be an integer of at least 2; got 1"),
        ("FastGradientMethod", {"seed": -1}, "seed must be an integer of at least 0"),
        ("FastGradientMethod", {"bounds": (0.0, 0.0)}, "the first below the second, got"),
    ],
)
def test_art_refuses(attack, options, message):
    with pytest.raises(OptionError, match=message):
        ARTAttack(network(), attack, **{"num_classes": 4} | options)


def test_art_refuses_another_number_of_classes():
    attack = ARTAttack(network(), "FastGradientMethod", num_classes=5)
    with pytest.raises(OptionError, match="the model gives 4 classes, got num_classes=5"):
        attack(pixels(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("attack", ["LinfPGD", type(fast()), FGSM(network())], ids=["name", "class", "Captum's"])
def test_foolbox_refuses(attack):
    with pytest.raises(OptionError, match=r"attack must be one of foolbox.attacks, made, as LinfPGD\(\), got"):
        FoolboxAttack(network(), attack)
    with pytest.raises(OptionError, match="the first below the second, got"):
        FoolboxAttack(network(), fast(), (1.0, 1.0))
    with pytest.raises(OptionError, match="LinfFastGradientAttack needs to know how large a change may be; pass eps"):
        FoolboxAttack(network(), fast())(pixels(2), torch.tensor([0, 1]))


def test_without_the_packages_they_say_what_to_install(monkeypatch):
    attack = fast()
    monkeypatch.setitem(sys.modules, "art.attacks", None)
    monkeypatch.setitem(sys.modules, "foolbox", None)
    for call in (
        lambda: ARTAttack(network(), "FastGradientMethod", num_classes=4),
        lambda: FoolboxAttack(network(), attack),
    ):
        with pytest.raises(OptionError, match=r"could not be loaded .*; install it: pip install 'captum-class"):
            call()
