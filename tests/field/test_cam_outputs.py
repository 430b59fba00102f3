"""Odd outputs, layers and dtypes: the Grad-CAMs answer as for the plain network, or say what is wrong."""

import pytest
import torch
from shared import seeded
from torch import nn

from captum_classfilters import (
    ALDSplitter,
    InfluentialFeatures,
    LabelSensitiveGate,
    LabelSensitiveTraining,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    PathDecoupler,
)
from captum_classfilters.core.errors import LayerError, OptionError, ShapeError

CLASSES = (LayerGradCamPlusPlus, LayerSmoothGradCamPlusPlus)


class Output(dict):
    """As Hugging Face's: entries are attributes, too."""

    __getattr__ = dict.__getitem__


class Wrapped(nn.Module):
    """A network whose output another function makes of the logits."""

    def __init__(self, model, output):
        super().__init__()
        self.model, self.output, self.unused = model, output, nn.Conv2d(3, 4, 1)

    def forward(self, images):
        return self.output(self.model(images))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "output",
    [
        lambda t: {"logits": t},
        lambda t: Output(logits=t, hidden_states=None),
        lambda t: (t, t * 0),
        lambda t: t[:, :, None, None],
    ],
    ids=["dict", "object", "tuple", "1 x 1 positions"],
)
def test_outputs_in_other_forms_give_the_same_map(small_cnn, images, cls, output):
    model, x = small_cnn(), images(3)
    expected = cls(model, "conv2").attribute(x, [0, 3, 1])
    assert torch.equal(cls(Wrapped(model, output), "model.conv2").attribute(x, [0, 3, 1]), expected)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("output", "layer", "error", "message"),
    [
        (None, "unused", LayerError, "layer unused did not run in this forward pass; choose one that does"),
        (lambda t: t[:, :, None, None].expand(-1, -1, 2, 3), "model.conv2", ShapeError,
         r"one score for each class, \(N, C\), got \(\d, 4, 2, 3\); pass target=\(class, row, column\)"),
        (lambda t: t.detach(), "model.conv2", LayerError, "no gradient with respect to layer model.conv2: .*no_grad"),
        (lambda t: (t * 0).detach() + torch.ones(4, requires_grad=True), "model.conv2", LayerError, "no gradient"),
        (lambda t: {"scores": t}, "model.conv2", ValueError, "expected a model that returns logits"),
    ],
    ids=["unused layer", "positions", "no_grad", "another path", "no logits"],
)  # fmt: skip
def test_what_has_no_map_says_why(small_cnn, images, cls, output, layer, error, message):
    model = Wrapped(small_cnn(), output or (lambda t: t))
    with pytest.raises(error, match=message):
        cls(model, layer).attribute(images(2), 1)


@pytest.mark.parametrize("cls", CLASSES)
def test_remedies_work(small_cnn, images, cls):
    """Those that the messages above name."""
    plain, x = small_cnn(), images(2)
    model = Wrapped(plain, lambda t: t.detach())
    with torch.no_grad():
        maps = plain.relu(plain.bn2(plain.conv2(plain.bn1(plain.conv1(x)).relu())))
    ones = cls(model, "model.relu").attribute(x, 1, channel_weights="ones")
    torch.testing.assert_close(ones, maps.sum(1, keepdim=True))
    head = cls(model, "model.relu").attribute(x, 1, channel_weights="head")
    by_hand = (maps * plain.fc.weight[1].detach()[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(head, by_hand)
    places = Wrapped(plain, lambda t: t[:, :, None, None].expand(-1, -1, 2, 3))
    expected = cls(plain, "conv2").attribute(x, 1)
    torch.testing.assert_close(cls(places, "model.conv2").attribute(x, (1, 0, 2)), expected)


class Frozen(nn.Module):
    """A frozen backbone: the map is made without gradients, the head has them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        with torch.no_grad():
            features = self.model.penultimate(images)
        return self.model.fc(features)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_backbone_under_no_grad_is_said_in_words(small_cnn, images, cls):
    with pytest.raises(LayerError, match=r"no gradient with respect to layer model\.conv2"):
        cls(Frozen(small_cnn()), "model.conv2").attribute(images(2), 1)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_follow_the_dtype_of_the_model(small_cnn, images, cls, dtype):
    model, x = small_cnn().to(dtype), images(3)
    found = cls(model, "conv2").attribute(x, 1)
    assert found.dtype == dtype
    assert torch.equal(found, cls(model, "conv2").attribute(x.to(dtype), 1)) or cls is LayerSmoothGradCamPlusPlus
    assert ALDSplitter(model).attribute(x, 1, min_size=2).dtype == dtype
    assert InfluentialFeatures(model).attribute(x, target=1).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_decoupler_s_images_follow_its_model(images, dtype):
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3)]
    model = seeded(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)), 0).to(dtype).eval()
    x, y = images(4), torch.arange(4)
    generator = torch.Generator().manual_seed(0)
    decoupler = PathDecoupler(model, generator=generator, example_input=x[:1]).eval()
    assert torch.equal(decoupler(x), decoupler(x.to(dtype)))
    _, gates = decoupler.gates(x)
    assert torch.equal(torch.cat(gates, 1) > 0, decoupler.paths([(x, y)]).bits())
    assert decoupler.costs(x[:1]).dense > 0
    torch.testing.assert_close(decoupler.skipping(x, measured=False)(x), decoupler(x), rtol=3e-2, atol=3e-2)
    loss = decoupler.train().loss(x, y).total
    loss.backward()
    assert torch.isfinite(loss)
    with pytest.raises(OptionError, match="costs depend on the size of images, got none"):
        decoupler.costs()


def test_a_gated_loss_takes_images_of_another_dtype(small_cnn, images):
    model, gate = small_cnn().double(), LabelSensitiveGate(4, 6, generator=torch.Generator().manual_seed(0))
    gate.is_noise = False
    x, y = images(4), torch.arange(4)
    training = LabelSensitiveTraining(model, gate)
    assert torch.equal(training.loss(x, y, 0), training.loss(x.double(), y, 0))
