"""The equations of Grad-CAM++ against loops from their definition, and against the true derivatives of exp(S)."""

import pytest
import torch
from torch import nn

from captum_classfilters import LayerGradCamPlusPlus
from captum_classfilters.cam.grad_cam_plus_plus import pixel_alphas, weights_of


def alphas_by_loop(second, third, activations):
    """Eq. 19, position by position."""
    found = torch.zeros_like(second)
    for n in range(second.shape[0]):
        for k in range(second.shape[1]):
            total = sum(activations[n, k].flatten().tolist())
            for place in torch.cartesian_prod(*map(torch.arange, second.shape[2:])).reshape(-1, second.dim() - 2):
                at = (n, k, *place.tolist())
                denominator = 2 * float(second[at]) + max(0.0, total * float(third[at]))
                found[at] = float(second[at]) / denominator if denominator != 0 else 0.0
    return found


def weights_by_loop(first, second, third, activations):
    """Eq. 10, channel by channel."""
    alphas = alphas_by_loop(second, third, activations)
    found = torch.zeros(first.shape[:2], dtype=torch.float64)
    for n in range(first.shape[0]):
        for k in range(first.shape[1]):
            pairs = zip(alphas[n, k].flatten().tolist(), first[n, k].flatten().tolist(), strict=True)
            found[n, k] = sum(alpha * max(slope, 0.0) for alpha, slope in pairs)
    return found


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPES = [(2, 3, 4, 5), (1, 2, 7), (2, 2, 3, 2, 2)]


@pytest.mark.parametrize("sign", ["positive activations", "any activations"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_those_of_the_loop(seed, shape, sign):
    gradients, activations = numbers(seed, *shape), numbers(seed + 10, *shape)
    gradients[0, 0, 0] = 0
    activations = activations.relu() if sign == "positive activations" else activations
    second, third = gradients**2, gradients**3
    expected = alphas_by_loop(second, third, activations)
    torch.testing.assert_close(pixel_alphas(second, third, activations), expected, rtol=1e-12, atol=0)
    found = weights_of(gradients, second, third, activations)
    torch.testing.assert_close(found, weights_by_loop(gradients, second, third, activations), rtol=1e-12, atol=1e-15)
    assert (found >= 0).all()


def test_a_denominator_cannot_vanish_and_alpha_is_bounded():
    # by eq. 19 as it stands: 2 * 1 + (-2) * 1 = 0
    gradients, activations = torch.ones(1, 1, 2, dtype=torch.float64), -torch.ones(1, 1, 2, dtype=torch.float64)
    assert pixel_alphas(gradients**2, gradients**3, activations).tolist() == [[[0.5, 0.5]]]
    # means over noise: the mean of the cubes may be below 0 where that of the gradients is above
    second, third = numbers(1, 2, 3, 50).abs(), numbers(2, 2, 3, 50)
    found = pixel_alphas(second, third, numbers(3, 2, 3, 50))
    assert 0 <= found.min() <= found.max() <= 0.5
    assert (weights_of(numbers(4, 2, 3, 50), second, third, numbers(3, 2, 3, 50)) >= 0).all()


def test_small_gradients_count_as_large_ones_do():
    activations = numbers(0, 1, 1, 3).abs()
    gradients = torch.full((1, 1, 3), 1e-60, dtype=torch.float64)
    torch.testing.assert_close(
        pixel_alphas(gradients**2, gradients**3, activations), torch.full_like(gradients, 0.5), rtol=1e-12, atol=0
    )


def test_the_sum_of_activations_is_taken_in_float64():
    # in float32 it is 0
    activations = torch.tensor([[[1e8, 1.0, -1e8]]])
    gradients = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    assert pixel_alphas(gradients**2, gradients**3, activations).flatten().tolist() == [1 / 3, 0.0, 0.0]


# -- the true derivatives ----------------------------------------------------------------------------------------------


class Layered(nn.Module):
    """A layer, and behind it what is given."""

    def __init__(self, behind):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
        self.behind = behind

    def forward(self, images):
        return self.behind(self.layer(images))


def made(kind):
    """Linear behind the layer, or only piece by piece: then the gradients differ from position to position."""
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    behind = nn.Sequential(*pooled) if kind == "linear" else nn.Sequential(nn.Conv2d(3, 3, 2), nn.ReLU(), *pooled)
    model = Layered(behind).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def derivatives(model, maps, target):
    """First, second and third derivative of exp(S) with respect to one position at a time; exp(S) of each sample."""
    found = [torch.zeros_like(maps) for _ in range(3)]
    scores = model.behind(maps)[:, target].exp().detach()
    for place in torch.cartesian_prod(*map(torch.arange, maps.shape)).tolist():
        at = tuple(place)
        number = maps[at].clone().requires_grad_()
        moved = maps.clone()
        moved[at] = number
        value = model.behind(moved[at[0]][None])[0, target].exp()
        for order in range(3):
            (value,) = torch.autograd.grad(value, number, create_graph=True)
            found[order][at] = value.detach()
    return found, scores


@pytest.mark.parametrize("kind", ["linear", "piecewise linear"])
def test_the_map_is_that_of_the_true_derivatives(kind):
    model, images, target = made(kind), numbers(5, 2, 2, 5, 5), 2
    with torch.no_grad():
        maps = model.layer(images)
    (first, second, third), scores = derivatives(model, maps, target)
    total = maps.sum((2, 3), keepdim=True)
    denominator = 2 * second + total * third
    alpha = torch.where(denominator == 0, 0.0, second / torch.where(denominator == 0, 1.0, denominator))
    weights = (alpha * first.relu()).sum((2, 3))
    assert (weights > 0).any()
    assert len(first[0].unique()) > (3 if kind == "linear" else 8) - 1
    # eq. 10 has the derivative of exp(S) where ours has that of S: a factor exp(S), the same for all channels
    expected = (weights[..., None, None] * maps).sum(1, keepdim=True) / scores.view(-1, 1, 1, 1)
    found = LayerGradCamPlusPlus(model, "layer").attribute(images, target=target)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
