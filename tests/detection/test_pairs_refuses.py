"""What `adversarial_paths` and `stack_pairs` refuse: attacks, loaders, networks, parts that do not fit."""

import pytest
import torch
from captum.robust import FGSM, PGD
from examples import attack_on, inverted, planted
from torch import nn

from captum_classfilters.attacks import Attack, Normalized
from captum_classfilters.core import errors
from captum_classfilters.detection import adversarial_paths
from captum_classfilters.detection.pairs import stack_pairs


@pytest.mark.parametrize(("attack", "options", "error", "message"), [
    (lambda x, y: x[:, :, :4], {}, errors.ShapeError, r"of shape \(32, 3, 8, 8\), got \(32, 3, 4, 8\)"),
    (lambda x, y: None, {}, errors.ShapeError, r"must give images of shape .* got NoneType"),
    (lambda x, y: (x * 255).byte(), {}, errors.ShapeError, "from the attack must be floats of .* got torch.uint8"),
    (lambda x, y: x.to("meta"), {}, errors.DeviceError, "gave images on meta, expected cpu"),
    (lambda x, y: x / 0, {}, errors.NonFiniteError, "gave NaN or infinite pixels"),
    (lambda x, y: x + 0.5, {}, errors.OptionError, r"images from the attack must lie in \[0.0, 1.0\]"),
    (inverted, {"epsilon": 0.1}, errors.OptionError, r"changed a pixel by 0\.\d+, more than epsilon=0\.1"),
    (inverted, {"steps": 3}, errors.OptionError, r"the attack has no argument 'steps'; it has \['images', 'labels'\]"),
    ("FGSM", {}, errors.OptionError, "a function .* got str"),
    (inverted, {"epsilon": 0.0}, errors.OptionError, "epsilon must be a finite number above 0, or None, .* got 0.0"),
    (inverted, {"bounds": (1.0, 0.0)}, errors.OptionError, r"the first below the second, got \(1.0, 0.0\)"),
    (FGSM, {"epsilon": 0.1}, errors.OptionError, "expected an attack that was made, as PGD"),
    (nn.Identity(), {}, errors.OptionError, "expected an attack that was made, as PGD"),
    (inverted, {"epsilon": "2/255"}, errors.OptionError, "epsilon must be a finite number .* got '2/255'"),
    (inverted, {"labels": None}, errors.OptionError, "labels cannot be passed, because the attack takes"),
])  # fmt: skip
def test_bad_attacks_are_refused(decoupler, data, attack, options, error, message):
    with pytest.raises(error, match=message):
        adversarial_paths(decoupler, [data], Attack(attack, **options))


@pytest.mark.parametrize("max_pairs", [0, True, 2.5])
def test_a_number_of_pairs_is_a_whole_number(decoupler, data, max_pairs):
    with pytest.raises(errors.OptionError, match=f"max_pairs must be .*at least 1, or None, for all; got {max_pairs}"):
        adversarial_paths(decoupler, [data], inverted, max_pairs=max_pairs)


def test_a_function_stands_for_an_attack_without_an_epsilon(decoupler, data):
    with pytest.raises(errors.ShapeError, match=r"of shape \(32, 3, 8, 8\), got \(32, 3, 4, 8\)"):
        adversarial_paths(decoupler, [data], lambda x, y: x[:, :, :4])
    with pytest.raises(errors.OptionError, match=r"a function .* got str"):
        adversarial_paths(decoupler, [data], "FGSM")


def test_what_captums_attacks_need_is_asked_for(decoupler, data):
    with pytest.raises(errors.OptionError, match="FGSM needs to know how much a pixel may change; pass epsilon="):
        adversarial_paths(decoupler, [data], attack_on(decoupler))
    with pytest.raises(errors.OptionError, match="FGSM has no argument 'step_num'; it has"):
        adversarial_paths(decoupler, [data], Attack(attack_on(decoupler), epsilon=0.1, step_num=3))
    beyond = FGSM(decoupler, nn.CrossEntropyLoss(reduction="none"))  # without bounds
    with pytest.raises(errors.OptionError, match=r"images from FGSM must lie in .*make the attack with these bounds"):
        adversarial_paths(decoupler, [data], Attack(beyond, epsilon=0.3))


@pytest.mark.parametrize(("loader", "error", "message"), [
    (lambda x, y: [], errors.EmptyLoaderError, "the loader gave no sample"),
    (lambda x, y: [(x[:0], y[:0])], errors.EmptyLoaderError, "the loader gave no sample"),
    (lambda x, y: [x], errors.LabelError, "batch 0 has no labels"),
    (lambda x, y: (x, y), errors.LabelError, "batch 0 has no labels"),
    (lambda x, y: 3, errors.OptionError, "got int"),
    (lambda x, y: [(x, y), (x, y[:3])], errors.LabelError, r"must have shape \(40,\), got \(3,\) in batch 1"),
    (lambda x, y: [(x, y + 4)], errors.LabelError, r"must lie in \[0, 4\)"),
    (lambda x, y: [(x, y), (x * 255, y)], errors.OptionError, r"images of batch 1 must lie in \[0.0, 1.0\]"),
    (lambda x, y: [(x - 1e-4, y), (x - 0.5, y)], errors.OptionError, "images of batch . must lie in"),
    (lambda x, y: [(x * torch.nan, y)], errors.OptionError, "got values from nan to nan"),
    (lambda x, y: [(x, y), (x[..., :6], y)], errors.ShapeError, "batch 1 has inputs of size"),
    (lambda x, y: [(x.flatten(1), y)], errors.ShapeError, "images of batch 0 must be floats of shape"),
])  # fmt: skip
def test_bad_loaders_are_refused(decoupler, data, loader, error, message):
    with pytest.raises(error, match=message):
        adversarial_paths(decoupler, loader(*data), inverted)


def test_rounding_at_the_bounds_is_allowed(decoupler, data):
    images, labels = data
    pairs = adversarial_paths(
        decoupler, [(images.clamp(0.2, 0.8) / 0.6 - 1 / 3 + 5e-7, labels)], lambda x, y: (1 - x) * (1 + 5e-7)
    )
    assert pairs.tried > 0


@pytest.mark.parametrize("model", [nn.Identity(), "model", Normalized(nn.Identity(), [0.5], [0.5])], ids=str)
def test_other_networks_are_refused(model, data):
    with pytest.raises(errors.OptionError, match="expected a PathDecoupler, or Normalized"):
        adversarial_paths(model, [data], inverted)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda a, b: stack_pairs(a, b[:5]), errors.OptionError, "the same images in the same order, got 12, 5"),
    (lambda a, b: stack_pairs(a, b, a[:3]), errors.OptionError, "in the same order, got 12, 12, 3"),
    (lambda a, b: stack_pairs(a, b, groups=[1, 2]), errors.OptionError, r"groups must have shape \(12,\), .* \(2,\)"),
    (lambda a, b: stack_pairs(a, planted(12, fingerprint="0" * 16)[1]), errors.MergeError, "another network"),
])  # fmt: skip
def test_what_are_no_twins_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*planted(12))


def test_an_attack_on_the_network_behind_normalisation_is_refused(decoupler, data):
    network = Normalized(decoupler, [0.5] * 3, [0.25] * 3)
    for behind in (decoupler, decoupler.model):
        with pytest.raises(errors.OptionError, match="the attack was made on the network without Normalized"):
            adversarial_paths(network, [data], Attack(attack_on(behind), epsilon=0.1))


def test_a_targeted_attack_is_not_what_this_measures(decoupler, data):
    with pytest.raises(errors.OptionError, match="targeted cannot be passed, because the attack takes"):
        adversarial_paths(decoupler, [data], Attack(attack_on(decoupler), epsilon=0.1, targeted=True))


def test_a_size_under_the_attacks_own_name_is_checked_as_well(decoupler, data):
    def overdone(images, labels, eps=0.0):
        return (images + 0.2).clamp(0, 1)

    with pytest.raises(errors.OptionError, match=r"changed a pixel by 0\.2, more than epsilon=0\.1"):
        adversarial_paths(decoupler, [data], Attack(overdone, eps=0.1))


def test_paths_of_other_classes_are_no_twins():
    clean, attacked = planted(12)
    with pytest.raises(errors.OptionError, match="these are not twins: their true classes differ"):
        stack_pairs(clean, attacked[torch.arange(11, -1, -1)])


@pytest.mark.parametrize("kind", [FGSM, PGD])
def test_captums_default_loss_on_logits_is_refused(decoupler, data, kind):
    with pytest.raises(errors.OptionError, match="was made without loss_func and takes the logarithm"):
        adversarial_paths(decoupler, [data], Attack(kind(decoupler, lower_bound=0, upper_bound=1), epsilon=0.1))
