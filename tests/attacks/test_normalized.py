"""`Normalized`: pixels in front of a network that takes normalised images."""

import copy

import pytest
import torch
from captum.robust import FGSM
from shared import SmallCNN, seeded
from torch import nn
from torchvision.transforms import Normalize

from captum_classfilters import PathDecoupler
from captum_classfilters.attacks import Normalized
from captum_classfilters.core.errors import OptionError

MEAN, STD = (0.48, 0.45, 0.4), (0.2, 0.25, 0.3)


def pixels(count=4):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_it_is_the_network_of_what_torchvision_normalises(small_cnn):
    model, images = small_cnn(), pixels()
    network = Normalized(model, MEAN, STD)
    torch.testing.assert_close(network.normalize(images), Normalize(MEAN, STD)(images))
    torch.testing.assert_close(network(images), model(Normalize(MEAN, STD)(images)))
    assert not torch.allclose(network(images), model(images))


@pytest.mark.parametrize("values", [((0.5,), (0.25,)), (0.5, 0.25), (torch.tensor(0.5), torch.tensor([0.25]))])
def test_one_number_is_for_one_colour(values):
    images = pixels()[:, :1]
    assert torch.equal(Normalized(nn.Identity(), *values)(images), (images - 0.5) / 0.25)


def test_further_arguments_go_to_the_model():
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x * scale

    images = pixels()
    torch.testing.assert_close(Normalized(Scaled(), MEAN, STD)(images, 3.0), 3 * Normalize(MEAN, STD)(images))


def test_an_attack_on_pixels_sees_the_gradient_of_pixels():
    # the least colour has the largest gradient: it is what is divided by the least
    weights = torch.tensor([3.0, -2.0, 5.0])

    def network(images):
        return (images.sum((2, 3)) * weights).sum(1, keepdim=True) * torch.tensor([[0.0, 1e-2]])

    class Model(nn.Module):
        forward = staticmethod(network)

    images = pixels().requires_grad_()
    wrapped = Normalized(Model(), MEAN, STD)
    (gradient,) = torch.autograd.grad(wrapped(images)[:, 1].sum(), images)
    expected = (weights * 1e-2 / torch.tensor(STD)).view(1, 3, 1, 1).expand_as(images)
    torch.testing.assert_close(gradient, expected)
    attack = FGSM(wrapped, nn.CrossEntropyLoss(reduction="none"), 0.0, 1.0)
    found = attack.perturb(images.detach().requires_grad_(), 0.05, torch.ones(4, dtype=torch.int64))
    # against class 1: down where its weight is positive; in pixels, in each colour by the same
    torch.testing.assert_close(found, (images - 0.05 * weights.sign().view(1, 3, 1, 1)).clamp(0, 1))


def test_the_state_dict_is_the_models(small_cnn):
    model = small_cnn()
    network = Normalized(model, MEAN, STD)
    assert list(network.state_dict()) == [f"model.{key}" for key in model.state_dict()]
    other = Normalized(small_cnn(seed=5), [0.1] * 3, [2.0] * 3)
    other.load_state_dict(network.state_dict())
    # weights came, what stands before them did not
    assert torch.equal(other.model(pixels()), model(pixels()))
    assert torch.equal(other.normalize(pixels()), (pixels() - 0.1) / 2.0)


@pytest.mark.parametrize("before", [True, False], ids=["a model in float64", "moved later"])
def test_it_goes_where_the_model_is(small_cnn, before):
    model = small_cnn()
    network = Normalized(model.double(), MEAN, STD) if before else Normalized(model, MEAN, STD).double()
    found = network(pixels().double())
    assert found.dtype == network.mean.dtype == network.std.dtype == torch.float64
    torch.testing.assert_close(found, model(Normalize(MEAN, STD)(pixels().double())), rtol=1e-6, atol=1e-6)
    meta = network.to("meta")
    assert meta(pixels().double().to("meta")).device.type == "meta"
    assert Normalized(small_cnn(device="meta"), MEAN, STD).std.device.type == "meta"


def test_a_copy_is_its_own(small_cnn):
    network = Normalized(small_cnn(), MEAN, STD)
    twin = copy.deepcopy(network)
    twin.mean.add_(1.0)
    torch.testing.assert_close(network.normalize(pixels()), Normalize(MEAN, STD)(pixels()))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (MEAN, STD[:2]),
        ((0.5,), STD),
        ((), ()),
        (MEAN, (0.2, 0.0, 0.3)),
        (MEAN, (0.2, -0.25, 0.3)),
        (MEAN, (0.2, float("nan"), 0.3)),
    ],
)
def test_it_refuses_what_is_not_one_number_for_each_colour(mean, std):
    with pytest.raises(OptionError, match="mean and std must be one number for each colour, std above 0, got"):
        Normalized(nn.Identity(), mean, std)


def test_around_a_decoupler_it_is_gated():
    decoupler = PathDecoupler(seeded(SmallCNN(), 0), ["conv1", "conv2"], reduction=1).eval()
    seeded(decoupler.controllers, 1)
    network, images = Normalized(decoupler, MEAN, STD), pixels()
    normalised = Normalize(MEAN, STD)(images)
    torch.testing.assert_close(network(images), decoupler(normalised))
    assert not torch.allclose(network(images), decoupler.model(normalised))
    _, gates = decoupler.gates(normalised)
    with decoupler.frozen(tuple(1 - gate for gate in gates)):
        assert not torch.allclose(network(images), decoupler.forward(normalised) + 1)
        torch.testing.assert_close(network(images), decoupler(normalised))
    network.train()
    assert decoupler.training
    assert decoupler.model.bn1.training
