"""Grad-CAM++ on a borrowed model: it is given back as it was, and bad input is refused in words."""

import sys

import pytest
import torch
from captum.attr import NoiseTunnel
from contract import Snapshot
from maps_by_hand import CLASSES
from shared import seeded
from torch import nn

from captum_classfilters import LayerGradCamPlusPlus
from captum_classfilters.core import captum_compat
from captum_classfilters.core.errors import (
    HeadError,
    LabelError,
    LayerError,
    NonFiniteError,
    OptionError,
    ShapeError,
)

pytestmark = pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.ZeroMapWarning")

# -- the model is borrowed ---------------------------------------------------------------------------------------------


class Tripwire(nn.Module):
    """Armed, it raises."""

    error: BaseException | None = None

    def forward(self, tensor):
        if self.error is not None:
            raise self.error
        return tensor


def noop(*args):
    return None


def used(small_cnn, images, error=None):
    """In the middle of its owner's training: mixed modes, frozen parts, gradients, hooks of its own."""
    model = small_cnn()
    model.pool = nn.Sequential(model.pool, Tripwire())
    model.train()
    model.bn1.eval()
    model.dropout.eval()
    model.conv1.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    model(images()).square().sum().backward()
    model.conv2.register_forward_hook(noop)
    model.fc.register_forward_pre_hook(noop)
    model.fc.register_full_backward_hook(noop)
    model.pool[1].error = error
    return model


SCENARIOS = {
    "success": (1, None, None),
    "success of a given weight": (1, None, None),
    "bad target": (99, None, LabelError),
    "exception in the model": (1, ZeroDivisionError(), ZeroDivisionError),
    "KeyboardInterrupt": (1, KeyboardInterrupt(), KeyboardInterrupt),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("cls", CLASSES)
def test_the_model_is_given_back(small_cnn, images, cls, scenario, grad):
    target, error, raised = SCENARIOS[scenario]
    model = used(small_cnn, images, error)
    inputs = images(3)
    options = {"channel_weights": "head"} if "weight" in scenario else {}
    with torch.set_grad_enabled(grad):
        before = Snapshot.of(model)
        if raised is None:
            cls(model, "relu").attribute(inputs, target, **options)
        else:
            with pytest.raises(raised):
                cls(model, "relu").attribute(inputs, target, **options)
        Snapshot.of(model).assert_same(before)
    assert not inputs.requires_grad
    assert inputs.grad is None


@pytest.mark.parametrize("cls", CLASSES)
def test_the_model_runs_in_eval_mode_whatever_its_modes(small_cnn, images, cls):
    model, inputs = small_cnn(), images(3)
    expected = cls(model, "relu").attribute(inputs, 1)
    model.train()
    assert torch.equal(cls(model, "relu").attribute(inputs, 1), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_parameters_and_no_grad(small_cnn, images, cls):
    model, inputs = small_cnn(), images(3)
    expected = cls(model, "relu").attribute(inputs, 1)
    model.requires_grad_(False)
    assert torch.equal(cls(model, "relu").attribute(inputs, 1), expected)
    with torch.no_grad():
        assert torch.equal(cls(model, "relu").attribute(inputs, 1), expected)
    with (
        torch.inference_mode(),
        pytest.raises(OptionError, match=r"gradients are needed, which torch.inference_mode\(\) forbids; call it out"),
    ):
        cls(model, "relu").attribute(inputs, 1)


@pytest.mark.parametrize("cls", CLASSES)
def test_inputs_that_require_gradients(small_cnn, images, cls):
    model, inputs = small_cnn(), images(3)
    expected = cls(model, "relu").attribute(inputs, 1)
    inputs.requires_grad_()
    found = cls(model, "relu").attribute(inputs, 1)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert inputs.requires_grad
    assert inputs.grad is None


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DataParallel of a compiled one": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "forward": lambda model: model.forward,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("cls", CLASSES)
def test_wrapped_models(small_cnn, images, cls, wrapper):
    model, inputs = small_cnn(), images(3)
    expected = cls(model, "relu").attribute(inputs, [1, 2, 3])
    wrapped = WRAPPERS[wrapper](model)
    wrapped(inputs)  # compiled without hooks, if at all
    model.train()
    found = cls(wrapped, "relu").attribute(inputs, [1, 2, 3])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        cls(wrapped, model.relu).attribute(inputs, 1, channel_weights="head").mean((1, 2, 3)) + model.fc.bias[1],
        model.eval()(inputs)[:, 1],
    )


def without_autograd(forward, layer, inputs, target, args, **options):
    """In place of Captum's function on a fake device, which has no autograd: activations for gradients."""
    options.pop("grad_kwargs")
    maps = captum_compat.layer_outputs(forward, inputs, layer, args, **options)
    return maps, maps


@pytest.mark.parametrize("cls", CLASSES)
def test_device(device, small_cnn, images, assert_close, cls, monkeypatch):
    inputs, targets = images(3), [1, 0, 2]
    more = {} if cls is LayerGradCamPlusPlus else {"generator": torch.Generator(), "stdevs": 0.0}
    expected = {
        name: cls(small_cnn(), "relu").attribute(inputs, targets, **call, **more) for name, call in CALLS.items()
    }
    if device.name == "cuda" and not torch.cuda.is_available():
        monkeypatch.setattr(sys.modules[cls.__module__], "layer_gradients", without_autograd)
    with device.mode:
        model = small_cnn(device=device.name)
        for name, call in CALLS.items():
            found = cls(model, "relu").attribute(inputs.to(device.name), targets, **call, **more)
            assert_close(found, expected[name].to(device.name), rtol=1e-3, atol=1e-4)


CALLS = {
    "plain": {},
    "channels": {"channels": [1, 2, 3, 4]},
    "for each": {"channels": torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1]]).bool()},
    "head": {"channel_weights": "head"},
    "given": {"channel_weights": torch.arange(6.0)},
    "parts": {"attr_dim_summation": False, "against": True},
}


def test_under_captum_s_noise_tunnel(small_cnn, images):
    model, inputs = small_cnn(), images(3)
    method = LayerGradCamPlusPlus(model, model.relu)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        smooth = NoiseTunnel(method).attribute(inputs, nt_type="smoothgrad", nt_samples=3, stdevs=1e-6, target=1)
    torch.testing.assert_close(smooth, method.attribute(inputs, 1), rtol=1e-4, atol=1e-4)


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD_CHANNELS = [
    ([6], OptionError, r"channels must lie in \[0, 6\), the channels of the layer; got 6"),
    ([-1], OptionError, r"channels must lie in \[0, 6\).*got -1"),
    ([[0], [1], [-1]], OptionError, "got -1"),
    ([], OptionError, "channels are empty: there is nothing to show"),
    (torch.zeros(6, dtype=torch.bool), OptionError, "channels are empty"),
    (torch.tensor([[1], [2], [-1]]), OptionError, "channels are empty"),
    ([[0], [], [1]], OptionError, "channels are empty"),
    ([0.5, 1], OptionError, "channels must be a sequence of indices, or a mask; got torch.float32"),
    (3, OptionError, r"channels must be a sequence of indices, or a mask; got torch.int64 of shape \(\)"),
    (True, OptionError, "channels must be a sequence of indices, or a mask; got torch.bool"),
    ("all", OptionError, "channels must be indices or a mask, got str"),
    ([None], OptionError, "channels must be indices or a mask, got list"),
    (
        torch.ones(5, dtype=torch.bool),
        ShapeError,
        "a mask of channels must have 6 entries, one for each .*; got 5",
    ),
    (torch.ones(3, 5, dtype=torch.bool), ShapeError, "a mask of channels must have 6 entries"),
    (torch.zeros(1, 1, 1, dtype=torch.long), ShapeError, "channels of one sample must be 1-D"),
    (torch.tensor([[1], [2]]), ShapeError, "must be 3 rows, one for each; got 2. For the same channels in all"),
    ([[1], [2]], ShapeError, "must be 3 rows, one for each; got 2"),
    (torch.ones(2, 6, dtype=torch.bool), ShapeError, "must be 3 rows, one for each; got 2"),
]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("channels", "error", "message"), BAD_CHANNELS, ids=lambda value: repr(value)[:40])
def test_wrong_channels_are_refused(small_cnn, images, cls, channels, error, message):
    with pytest.raises(error, match=message):
        cls(small_cnn(), "relu").attribute(images(3), 1, channels=channels)


BAD_WEIGHTS = [
    ("all", OptionError, 'channel_weights must be None .*"ones", "head", or a floating tensor.*got \'all\''),
    (torch.arange(6), OptionError, "channel_weights must be .*got torch.int64"),
    ([1.0] * 6, OptionError, "channel_weights must be"),
    (torch.ones(5), ShapeError, r"channel_weights must have shape \(6,\) or \(3, 6\), got \(5,\): the layer has 6"),
    (torch.ones(2, 6), ShapeError, r"got \(2, 6\)"),
    (torch.ones(1, 3, 6), ShapeError, r"got \(1, 3, 6\)"),
    (torch.tensor([1.0, torch.nan, 1, 1, 1, 1]), NonFiniteError, "channel_weights must be finite, got NaN or infinity"),
]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("given", "error", "message"), BAD_WEIGHTS, ids=lambda value: repr(value)[:40])
def test_wrong_channel_weights_are_refused(small_cnn, images, cls, given, error, message):
    with pytest.raises(error, match=message):
        cls(small_cnn(), "relu").attribute(images(3), 1, channel_weights=given)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (None, OptionError, "the model gives 4 outputs: pass target=, the class, or one for each sample"),
        (4, LabelError, r"target must lie in \[0, 4\), got 4"),
        (-1, LabelError, r"target must lie in \[0, 4\), got -1"),
        ([0, 1, 4], LabelError, "got 4"),
        (torch.tensor([0, 1]), LabelError, "target must be an int or 3 of them, one for each sample; got shape"),
        ([0, 1], LabelError, "target must be an int or 3 of them"),
        (1.5, LabelError, "target must be integers, got torch.float32; pass class indices"),
        ([0.5, 1, 2], LabelError, "target must be integers, got torch.float32"),
        (True, LabelError, "target must be integers, got torch.bool"),
        ("coat", LabelError, r"got the name 'coat'; use class_names.index\('coat'\)"),
        ([None, 1, 2], LabelError, r"target must be a class index, or one for each sample; got \[None, 1, 2\]"),
    ],
    ids=repr,
)
def test_wrong_targets_are_refused(small_cnn, images, cls, target, error, message):
    with pytest.raises(error, match=message):
        cls(small_cnn(), "relu").attribute(images(3), target)


class Two(nn.Module):
    """A layer that gives two tensors."""

    def forward(self, tensor):
        return tensor, tensor * 2


class WithTwo(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.two = inner, Two()

    def forward(self, pictures):
        first, second = self.two(pictures)
        return self.inner(first) + self.inner(second)


@pytest.mark.parametrize("cls", CLASSES)
def test_wrong_layers_are_refused(small_cnn, images, cls):
    model, inputs = small_cnn(), images(3)
    with pytest.raises(LayerError, match=r"the model has no layer 'rel'; did you mean one of \['relu'"):
        cls(model, "rel")
    with pytest.raises(LayerError, match="layer ReLU is not a module of this model; pass one that is, or its name"):
        cls(model, nn.ReLU())
    with pytest.raises(LayerError, match="layer='relu' is a name, but the model is a bare function: pass the module"):
        cls(lambda pictures: model(pictures), "relu")
    with pytest.raises(OptionError, match="layer must be a module or its dotted name, got int"):
        cls(model, 3)
    with pytest.raises(
        ShapeError, match=r"must have positions, \(N, K, h, w\), got \(3, 4\); pass the layer of a conv"
    ):
        cls(model, "fc").attribute(inputs, 1)
    with pytest.raises(LayerError, match="must be one tensor, got 2; choose another layer"):
        cls(WithTwo(model), "two").attribute(inputs, 1)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("reshape", "error", "message"),
    [
        ("permute", OptionError, "reshape must be a function of the layer's output, got str"),
        (lambda t: t.flatten(1), ShapeError, r"got \(3, 96\); it is what reshape= gave"),
        (lambda t: None, ShapeError, "got NoneType; it is what reshape= gave"),
        (lambda t: t.flatten(0, 1).unflatten(0, (-1, 1)), ShapeError, "reshape must keep the 3 samples, it gave 18"),
    ],
)
def test_a_wrong_reshape_is_refused(small_cnn, images, cls, reshape, error, message):
    with pytest.raises(error, match=message):
        cls(small_cnn(), "relu", reshape=reshape).attribute(images(3), 1)


@pytest.mark.parametrize("cls", CLASSES)
def test_head_weights_need_the_map_that_the_head_reads(small_cnn, images, cls):
    with pytest.raises(ShapeError, match=r"are of the 6 features that the head reads.*5 channels"):
        cls(small_cnn(), "conv1").attribute(images(3), 1, channel_weights="head")
    model = small_cnn()
    with pytest.raises(HeadError):
        cls(lambda pictures: model(pictures), model.relu).attribute(images(3), 1, channel_weights="head")


@pytest.mark.parametrize("cls", CLASSES)
def test_as_many_channels_are_not_the_head_s(small_cnn, images, cls):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = seeded(nn.Sequential(*model, nn.Linear(6, 4)), 0).eval()
    with pytest.raises(ShapeError, match="not the average of this layer's 6 channels"):
        cls(model, "1").attribute(images(2), 1, channel_weights="head")
    assert cls(model, "2").attribute(images(2), 1, channel_weights="head").shape == (2, 1, 8, 8)


@pytest.mark.parametrize("cls", CLASSES)
def test_tokens_without_reshape_are_refused(images, cls):
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 4)).eval()
    with pytest.raises(
        ShapeError, match=r"layer 1 gives \(2, 3, 5\), tokens that lie in no grid that is known; pass reshape="
    ):
        cls(model, "1").attribute(images(2), 1)
    assert cls(model, "1", reshape=lambda tokens: tokens).attribute(images(2), 1).shape == (2, 1, 5)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("given", [[[1.0]], None, (), torch.zeros(0, 3, 8, 8), torch.tensor(1.0)])
def test_inputs_are_tensors_of_samples(small_cnn, cls, given):
    with pytest.raises(ShapeError, match="inputs must"):
        cls(small_cnn(), "relu").attribute(given, 1)


@pytest.mark.parametrize("cls", CLASSES)
def test_images_with_nan_are_refused(small_cnn, images, cls):
    with pytest.raises(NonFiniteError, match="NaN or infinity in the map"):
        cls(small_cnn(), "relu").attribute(images(2) * torch.nan, 1)
