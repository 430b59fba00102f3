"""Graphs that a rewriter can get wrong: changes in place, hooks of the user's, norms with an activation in them."""

import pytest
import timm
import torch
from torch import nn

from captum_classfilters import PathDecoupler
from captum_classfilters.core.errors import HardGatesWarning, MergeError, OptionError
from captum_classfilters.decoupling import Paths


class _Net(nn.Module):
    """Three convolutions; ``change`` is done to the maps of the second, which is gated."""

    def __init__(self, change):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)
        self.change = change

    def forward(self, images):
        maps = self.b(self.a(images))
        self.change(maps)
        return self.fc(self.c(maps).mean((2, 3)))


CHANGES = {
    "mul_": lambda maps: maps.mul_(2),
    "add_": lambda maps: maps.add_(1),
    "hardtanh_": lambda maps: nn.functional.hardtanh_(maps, 0.1, 0.3),
    "inplace argument": lambda maps: nn.functional.relu(maps, inplace=True),
}


def _gated(model, layers=None):
    """Half of the gates open, none of them near zero."""
    torch.manual_seed(0)
    decoupler = PathDecoupler(model, layers).eval()
    with torch.no_grad():
        for controller in decoupler.controllers:
            controller.excite.bias.fill_(1)
            controller.excite.bias[::2] = -1
            controller.excite.weight.mul_(0.01)
    return decoupler


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_reaches_all_who_use_the_maps_later(change):
    torch.manual_seed(1)
    decoupler, images = _gated(_Net(change), ["b"]), torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(decoupler.skipping(images, measured=False)(images), decoupler(images))


def test_hooks_of_the_users_on_convolutions_are_called():
    torch.manual_seed(1)
    model = _Net(lambda maps: None)
    model.c.register_forward_hook(lambda module, args, output: output * 3)
    decoupler, images = _gated(model, ["b"]), torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(decoupler.skipping(images, measured=False)(images), decoupler(images))


@pytest.mark.parametrize("name", ["regnetx_002", "mobilenetv3_small_100"])
def test_norms_with_an_activation_are_folded_and_their_convolutions_skip(name):
    torch.manual_seed(0)
    decoupler = _gated(timm.create_model(name, pretrained=False, num_classes=5).eval())
    images = torch.randn(2, 3, 64, 64)
    fast = decoupler.skipping(images, measured=False)
    assert len(fast.layers()) > len(decoupler.units) / 3
    with torch.no_grad():
        torch.testing.assert_close(fast(images), decoupler(images), rtol=1e-4, atol=1e-5)


def test_frozen_paths_of_two_decouplers_hold_side_by_side():
    first, second = (_gated(_Net(lambda maps: None), ["b"]) for _ in range(2))
    images = torch.randn(2, 3, 9, 9)
    gates = (torch.ones(1, 16),)
    with torch.no_grad(), first.frozen(gates):
        alone = first(images)
        with second.frozen((torch.zeros(1, 16),)):
            assert torch.equal(first(images), alone)
        with pytest.raises(OptionError, match="collect paths outside"):
            first.paths([images])


def test_paths_of_images_of_another_size_are_not_merged():
    decoupler = _gated(_Net(lambda maps: None), ["b"])
    with pytest.raises(MergeError, match="images of another size"):
        Paths.merge(decoupler.paths([torch.randn(2, 3, 9, 9)]), decoupler.paths([torch.randn(2, 3, 12, 12)]))


def test_a_loss_with_gradients_in_eval_mode_is_warned_of():
    decoupler = _gated(_Net(lambda maps: None), ["b"])
    with pytest.warns(HardGatesWarning, match="nothing trains the controllers"):
        decoupler.loss(torch.randn(2, 3, 9, 9), torch.tensor([0, 1]))
