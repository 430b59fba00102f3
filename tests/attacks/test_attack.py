"""`Attack`: one way to call attacks that are called in several, and nothing taken from them unseen."""

import functools
import warnings

import numpy as np
import pytest
import torch
from captum.robust import FGSM, PGD, Perturbation
from torch import nn

from captum_classfilters.attacks import Attack, LocalSearch
from captum_classfilters.core.errors import DeviceError, NonFiniteError, OptionError, ShapeError

LABELS = torch.tensor([0, 3, 1])
LOSS = nn.CrossEntropyLoss(reduction="none")


def pixels(dtype=torch.float32, count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def steep():
    """Logits with a gradient in every pixel."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def gives(found):
    """An attack that always gives the same."""
    return lambda images, labels: found


# -- how it is called --------------------------------------------------------------------------------------------------


def test_captums_fgsm_gets_epsilon_and_target():
    model, images = steep(), pixels()
    given = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSS(model(given), LABELS).sum(), given)
    assert gradient.abs().min() > 1e-6  # below, Captum changes nothing
    found = Attack(FGSM(model, LOSS, 0.0, 1.0), 2 / 255)(images, LABELS)
    torch.testing.assert_close(found, (images + 2 / 255 * gradient.sign()).clamp(0, 1))
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("options", "steps", "size"),
    [
        ({}, 10, 2.5 * 0.04 / 10),
        ({"step_num": 4}, 4, 2.5 * 0.04 / 4),
        ({"step_size": 0.03}, 10, 0.03),
        ({"step_num": 3, "step_size": 0.01, "norm": "Linf"}, 3, 0.01),
    ],
)
def test_captums_pgd_gets_radius_and_steps(options, steps, size):
    model, images = steep(), pixels()
    expected = images.clone()
    for _ in range(steps):
        expected.requires_grad_()
        (gradient,) = torch.autograd.grad(LOSS(model(expected), LABELS).sum(), expected)
        moved = expected.detach() + size * gradient.sign()
        expected = torch.min(torch.max(moved, images - 0.04), images + 0.04).clamp(0, 1)
    found = Attack(PGD(model, LOSS, 0.0, 1.0), 0.04, **options)(images, LABELS)
    torch.testing.assert_close(found, expected)


def test_without_epsilon_the_size_may_be_among_the_options():
    model, images = steep(), pixels()
    found = Attack(PGD(model, LOSS, 0.0, 1.0), radius=0.04, step_size=0.01, step_num=10)(images, LABELS)
    assert torch.equal(found, Attack(PGD(model, LOSS, 0.0, 1.0), 0.04)(images, LABELS))


def test_attacks_of_this_package_get_labels():
    model, images = steep(), pixels()
    labels = model(images).argmax(1)
    found = Attack(LocalSearch(model, rounds=2))(images, labels)
    assert torch.equal(found, LocalSearch(model, rounds=2)(images, labels))
    assert not torch.equal(found, images)


@pytest.mark.parametrize("name", ["target", "labels", "label", "y"])
def test_labels_go_by_the_name_that_the_attack_has_for_them(name):
    class Asked(Perturbation):
        """Labels do not stand second."""

        exec(f"def perturb(self, inputs, norm=2, *, {name}): self.got = norm, {name}; return inputs")

    attack, images = Asked(), pixels()
    Attack(attack)(images, LABELS)
    assert attack.got == (2, LABELS)


@pytest.mark.parametrize("name", ["epsilon", "radius", "eps"])
@pytest.mark.parametrize("default", ["", "=0.5"])
def test_epsilon_goes_by_the_name_that_the_attack_has_for_it(name, default):
    got, names = [], {}
    exec(f"def attack(images, truth, {name}{default}): got.append({name}); return images", {"got": got}, names)
    Attack(names["attack"], 0.25)(pixels(), LABELS)
    assert got == [0.25]
    if default:
        Attack(names["attack"])(pixels(), LABELS)
        assert got == [0.25, 0.5]
        if name != "epsilon":  # which is the budget's own name
            Attack(names["attack"], 0.25, **{name: 0.75})(pixels(), LABELS)
            assert got == [0.25, 0.5, 0.75]
    else:
        with pytest.raises(OptionError, match=r"needs to know how much a pixel may change; pass epsilon=, as 2 / 255"):
            Attack(names["attack"])


def test_a_function_of_images_and_labels_gets_nothing_else():
    got = []

    def attack(images, truth):
        got.append((images.clone(), truth))
        return images

    images = pixels()
    Attack(attack, 0.1)(images, LABELS)
    assert torch.equal(got[0][0], images)
    assert got[0][1] is LABELS


def test_what_takes_any_option_gets_all_of_them():
    got = []

    def attack(images, labels, **others):
        got.append((labels, others))
        return images

    Attack(attack, 0.1, depth=3, step_num=2)(pixels(), LABELS)
    # it may have no argument for epsilon: none is made up
    assert got == [(LABELS, {"depth": 3, "step_num": 2})]


def test_a_partial_and_an_object_that_can_be_called_are_attacks():
    def attack(scale, images, labels):
        return images * scale

    class Halving:
        def __call__(self, images, labels):
            return images / 2

    images = pixels()
    for call in (functools.partial(attack, 0.5), Halving()):
        assert torch.equal(Attack(call)(images, LABELS), images / 2)


def test_what_the_attack_gets_is_its_own_to_write_into_or_to_make_an_array_of():
    def attack(images, labels):
        images += 0.0
        return torch.from_numpy(images.numpy() * np.float32(0.5)).requires_grad_()

    given = pixels().requires_grad_()
    found = Attack(attack)(given, LABELS)
    assert torch.equal(found, given.detach() * 0.5)
    assert not found.requires_grad


def test_captum_is_quiet_and_other_warnings_are_not():
    images = pixels()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Attack(PGD(steep(), LOSS, 0.0, 1.0), 0.04)(images, LABELS)
        assert not caught
        Attack(lambda images, labels: warnings.warn("mine", UserWarning, stacklevel=1) or images)(images, LABELS)
    assert [str(each.message) for each in caught] == ["mine"]


# -- refused when it is made -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "epsilon", "options", "message"),
    [
        (FGSM(steep()), 0.1, {"radius": 1}, r"FGSM has no argument 'radius'; it has \['inputs', 'epsilon', 'target'"),
        (lambda images, labels: images, None, {"depth": 1}, r"the attack has no argument 'depth'; it has \['images'"),
        (FGSM(steep()), None, {}, "FGSM needs to know how much a pixel may change; pass epsilon="),
        (PGD(steep()), None, {"step_num": 2, "step_size": 0.1}, "PGD needs to know how much"),
        ("FGSM", 0.1, {}, "must be a captum.robust.Perturbation or a function .* got str"),
        (
            FGSM(steep()),
            0.0,
            {},
            "epsilon must be a finite number above 0, or None, which leaves it to the",
        ),
        (FGSM(steep()), -0.1, {}, "epsilon must be a finite number above 0, or None, .* got -0.1"),
        (FGSM(steep()), float("nan"), {}, "epsilon must be a finite number above 0, or None, .* got nan"),
    ],
)
def test_it_refuses_what_is_no_attack_and_options_that_it_does_not_have(call, epsilon, options, message):
    with pytest.raises(OptionError, match=message):
        Attack(call, epsilon, **options)


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (pixels()[:2], ShapeError, r"the attack must give images of shape \(3, 3, 8, 8\), got \(2, 3, 8, 8\)"),
        (pixels()[..., 0], ShapeError, r"got \(3, 3, 8\)"),
        ((pixels(), True), ShapeError, "got tuple"),
        (pixels().numpy(), ShapeError, "got ndarray"),
        (pixels().to("meta"), DeviceError, "the attack gave images on meta, expected cpu; move them there"),
        ((pixels() * 255).byte(), ShapeError, "images from the attack must be floats .* got torch.uint8"),
        (pixels() + 1, OptionError, r"images from the attack must lie in \[0.0, 1.0\], got values from 1.* to "),
        (pixels() - 0.01, OptionError, "got values from -0.0"),
        (pixels().index_fill(3, torch.tensor([4]), torch.inf), NonFiniteError, "NaN or infinite pixels"),
    ],
)
def test_it_refuses_what_are_no_images_like_the_given_ones(found, error, message):
    with pytest.raises(error, match=message):
        Attack(gives(found))(pixels(), LABELS)


def test_nan_is_explained_by_captums_default_loss():
    # Captum takes the logarithm of what the model gives: of negative logits that is NaN, and through a norm so are
    # the pixels
    def attack(images, labels):
        images = images.requires_grad_()
        loss = -model(images).log().gather(1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(loss, images)
        return images + 0.1 * gradient / gradient.norm() * loss

    model = steep()
    assert (model(pixels()).gather(1, LABELS[:, None]) < 0).any()
    message = r'the attack gave NaN .* pass loss_func=torch.nn.CrossEntropyLoss\(reduction="none"\)'
    with pytest.raises(NonFiniteError, match=message):
        Attack(attack)(pixels(), LABELS)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-120.0, 150.0)])
def test_rounding_is_not_out_of_bounds_nor_more_than_epsilon(bounds):
    images = pixels() * (bounds[1] - bounds[0]) + bounds[0]
    images[0], images[1] = bounds
    largest = max(map(abs, bounds))
    # float32 has 24 bits; a sum of three terms loses about one of them
    above = torch.full_like(images, bounds[1]) + 1e-7 * largest
    assert torch.equal(Attack(gives(above), bounds=bounds)(images, LABELS), above)
    with pytest.raises(OptionError, match="must lie in"):
        Attack(gives(above + 1e-5 * largest), bounds=bounds)(images, LABELS)
    inside = images.clamp(bounds[0] / 2 + 0.2, bounds[1] - 0.2)
    rounded = inside + 0.1 + 2e-7 * largest
    assert torch.equal(Attack(gives(rounded), 0.1, bounds)(inside, LABELS), rounded)


@pytest.mark.parametrize("excess", [1.02, 3.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_pixel_changed_by_more_than_epsilon_is_refused(excess, sign):
    images = pixels() / 2 + 0.25
    changed = images + 0.01
    changed[2, 1, 7, 0] = images[2, 1, 7, 0] + sign * 0.01 * excess
    with pytest.raises(OptionError, match=r"changed a pixel by 0.0\d+, more than epsilon=0.01; pass the epsilon"):
        Attack(gives(changed), 0.01)(images, LABELS)
    assert torch.equal(Attack(gives(changed))(images, LABELS), changed)


def test_in_double_precision_a_tiny_epsilon_is_compared_in_double_precision():
    images = pixels(torch.float64) / 2 + 0.25
    # float32 is off by 3e-8 at such pixels
    allowed, refused = images + 1e-7, images + 1.2e-7
    assert torch.equal(Attack(gives(allowed), 1e-7)(images, LABELS), allowed)
    with pytest.raises(OptionError, match="more than epsilon=1e-07"):
        Attack(gives(refused), 1e-7)(images, LABELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    images = pixels(dtype)
    found = Attack(FGSM(steep().to(dtype), LOSS, 0.0, 1.0), 8 / 255)(images, LABELS)
    assert found.dtype == dtype
    change = (found.float() - images.float()).abs()
    # a change, and rounded to the eight or eleven bits of the format
    assert 0.9 * 8 / 255 < change.max() < 8 / 255 + torch.finfo(dtype).eps
    with pytest.raises(OptionError, match="more than epsilon"):
        Attack(gives(1 - images), 8 / 255)(images, LABELS)


def test_what_comes_in_another_precision_is_given_back_in_that_of_the_images():
    images = pixels()
    found = Attack(lambda images, labels: images.double() / 2)(images, LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, images / 2)


def test_given_images_stay_as_they_are_though_an_attack_writes_into_its_own():
    def attack(images, labels):
        with torch.no_grad():
            return images.mul_(0.5)

    images = pixels()
    kept = images.clone()
    found = Attack(attack)(images, LABELS)
    assert torch.equal(images, kept)
    assert torch.equal(found, kept / 2)
    assert not images.requires_grad
    # and the change is measured from what was given, not from what was written into
    with pytest.raises(OptionError, match="more than epsilon"):
        Attack(attack, 0.01)(images, LABELS)


def test_no_images_are_no_error():
    assert Attack(lambda images, labels: images, 0.1)(pixels(count=0), LABELS[:0]).shape == (0, 3, 8, 8)
