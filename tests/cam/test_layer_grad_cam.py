"""`LayerGradCamPlusPlus`: the arguments of Captum's ``LayerGradCam``, chosen channels, borrowed models, bad input."""

import copy
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from captum.attr import LayerGradCam
from maps_by_hand import CLASSES, by_loop, close, gradient_and_map, heat, of_class
from shared import seeded
from torch import nn

from captum_classfilters import LayerGradCamPlusPlus
from captum_classfilters.core.errors import (
    OptionError,
    ZeroMapWarning,
)

# -- the map -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layer", ["bn1", "bn2", "relu"])
def test_the_map_is_the_definition_s(small_cnn, images, layer, count):
    """Of the first normalisation activations have both signs; behind the second there is an in-place ReLU."""
    model, inputs = small_cnn(), images(count)
    parts = by_loop(model, model.get_submodule(layer), inputs, of_class(2))
    found = heat(model, inputs, 2, layer)
    assert found.shape == (count, 1, *parts.shape[2:])
    assert not found.requires_grad
    close(found, parts.sum(1, keepdim=True))
    assert (parts < 0).any() == (layer != "relu" and layer != "bn2")


def test_a_batch_is_image_by_image(small_cnn, images):
    model, inputs, targets = small_cnn(), images(3), [0, 2, 3]
    one_by_one = [heat(model, inputs[i : i + 1], target) for i, target in enumerate(targets)]
    torch.testing.assert_close(heat(model, inputs, targets), torch.cat(one_by_one), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "target",
    [
        torch.tensor([1, 0, 3]),
        [1, 0, 3],
        torch.tensor([1, 0, 3], dtype=torch.int32),
        np.array([1, 0, 3]),
        [np.int64(1), torch.tensor(0), 3],
        [(1,), (0,), (3,)],
    ],
    ids=str,
)
def test_targets_for_each_sample(small_cnn, images, target):
    model, inputs = small_cnn(), images(3)
    close(heat(model, inputs, target), by_loop(model, model.relu, inputs, of_class(1, 0, 3)).sum(1, keepdim=True))


@pytest.mark.parametrize("target", [2, torch.tensor(2), torch.tensor([2]), np.int64(2), [2], (2,)], ids=repr)
def test_one_target_for_all(small_cnn, images, target):
    model, inputs = small_cnn(), images(3)
    close(heat(model, inputs, target), by_loop(model, model.relu, inputs, of_class(2)).sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("target", "chosen"),
    [((1, 0), lambda z: z[:, 1, 0]), ([(1, 0), (3, 1), (0, 0)], lambda z: z[[0, 1, 2], [1, 3, 0], [0, 1, 0]])],
)
def test_outputs_of_more_axes_are_picked_by_tuples(small_cnn, images, target, chosen):
    model, inputs = small_cnn(), images(3)

    def two_heads(pictures):
        logits = model(pictures)
        return torch.stack([logits, logits.flip(1) * 2], 2)

    found = LayerGradCamPlusPlus(two_heads, model.relu).attribute(inputs, target)
    close(found, by_loop(two_heads, model.relu, inputs, chosen).sum(1, keepdim=True))


def test_an_output_of_one_number_needs_no_target(small_cnn, images):
    model, inputs = small_cnn(num_classes=1), images(3)
    expected = by_loop(model, model.relu, inputs, lambda z: z[:, 0]).sum(1, keepdim=True)
    close(heat(model, inputs, None), expected)
    plain = LayerGradCamPlusPlus(lambda pictures: model(pictures)[:, 0], model.relu)
    close(plain.attribute(inputs), expected)


class Scaled(nn.Module):
    """Takes further arguments: a number for each sample, a flag, a name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pictures, scale, flag=False, name=None):
        logits = self.inner(pictures * scale.view(-1, 1, 1, 1))
        return logits**3 if flag and name == "cubed" else logits


@pytest.mark.parametrize("cls", CLASSES)
def test_further_arguments_of_the_forward(small_cnn, images, cls):
    model, inputs, scale = Scaled(small_cnn()), images(3), torch.tensor([0.5, 1.0, 2.0])
    options = {} if cls is LayerGradCamPlusPlus else {"n_samples": 2, "stdevs": 0.0, "internal_batch_size": 2}
    method = cls(model, model.inner.relu)
    close(
        method.attribute(inputs, 1, scale, **options),
        by_loop(lambda x: model(x, scale), model.inner.relu, inputs, of_class(1)).sum(1, keepdim=True),
    )
    close(
        method.attribute(inputs, [1, 2, 3], (scale, True, "cubed"), **options),
        by_loop(lambda x: model(x, scale, True, "cubed"), model.inner.relu, inputs, of_class(1, 2, 3)).sum(1, True),
    )


def test_the_layer_s_input_in_place_of_its_output(small_cnn, images):
    model, inputs = small_cnn(), images(3)
    found = heat(model, inputs, layer="pool", attribute_to_layer_input=True)
    torch.testing.assert_close(found, heat(model, inputs, layer="relu"), rtol=1e-5, atol=1e-6)
    before = heat(model, inputs, layer="relu", attribute_to_layer_input=True)
    torch.testing.assert_close(before, heat(model, inputs, layer="bn2"), rtol=1e-5, atol=1e-6)


def test_relu_and_summation(small_cnn, images):
    model, inputs = small_cnn(), images(3)
    parts = heat(model, inputs, layer="bn1", attr_dim_summation=False)
    close(parts, by_loop(model, model.bn1, inputs, of_class(1)))
    whole = heat(model, inputs, layer="bn1")
    torch.testing.assert_close(parts.sum(1, keepdim=True), whole, rtol=1e-4, atol=1e-5)
    assert (whole < 0).any()
    torch.testing.assert_close(heat(model, inputs, layer="bn1", relu_attributions=True), whole.relu())
    positive = heat(model, inputs, layer="bn1", relu_attributions=True, attr_dim_summation=False)
    torch.testing.assert_close(positive, parts.relu())


def test_options_of_grad_are_passed_on(small_cnn, images):
    model, inputs = small_cnn(), images(2)
    plain = heat(model, inputs)
    found = heat(model, inputs, grad_kwargs={"create_graph": True})
    torch.testing.assert_close(found, plain)
    assert not found.requires_grad
    with pytest.raises(TypeError, match="nonsense"):
        heat(model, inputs, grad_kwargs={"nonsense": True})


def test_the_arguments_of_captum_s_layer_grad_cam_come_in_its_order(small_cnn, images):
    theirs = list(inspect.signature(LayerGradCam.attribute).parameters.values())
    for cls in CLASSES:
        ours = list(inspect.signature(cls.attribute).parameters.values())
        assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    method = LayerGradCamPlusPlus(small_cnn(), "relu")
    assert method.has_convergence_delta() is False
    assert method.multiplies_by_inputs is False


# -- channels ----------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.ZeroMapWarning")

ALL_SAME = {
    "indices": torch.tensor([4, 1]),
    "int32": torch.tensor([4, 1], dtype=torch.int32),
    "list": [1, 4],
    "tuple": (1, 4),
    "numpy": np.array([1, 4]),
    "numbers of numpy": [np.int64(1), np.int64(4)],
    "repeated": [1, 4, 4],
    "mask": torch.tensor([False, True, False, False, True, False]),
    "list mask": [False, True, False, False, True, False],
}
EACH = {
    "padded": torch.tensor([[1, 4, -1], [0, -1, -1], [5, 2, 3]]),
    "mask": torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1]], dtype=torch.bool),
    "list": [torch.tensor([4, 1]), torch.tensor([0]), torch.tensor([2, 3, 5])],
    "lists": [range(1, 5, 3), [0], (2, 3, 5)],
    "mixed": ([1, 4], np.array([0]), torch.tensor([0, 0, 1, 1, 0, 1], dtype=torch.bool)),
}


@pytest.mark.parametrize("form", ALL_SAME)
def test_channels_for_all_samples(small_cnn, images, form):
    model, inputs = small_cnn(), images(3)
    parts = heat(model, inputs, attr_dim_summation=False)
    found = heat(model, inputs, channels=ALL_SAME[form], attr_dim_summation=False)
    chosen = torch.zeros(6, dtype=torch.bool).index_fill_(0, torch.tensor([1, 4]), True)
    assert torch.equal(found, parts * chosen.view(1, 6, 1, 1))
    assert torch.equal(heat(model, inputs, channels=ALL_SAME[form]), found.sum(1, keepdim=True))


@pytest.mark.parametrize("form", EACH)
def test_channels_for_each_sample(small_cnn, images, form):
    model, inputs = small_cnn(), images(3)
    parts = heat(model, inputs, attr_dim_summation=False, channel_weights="ones")
    found = heat(model, inputs, channels=EACH[form], attr_dim_summation=False, channel_weights="ones")
    assert torch.equal(found, parts * EACH["mask"].view(3, 6, 1, 1))


def test_a_partition_of_the_channels_sums_to_the_whole(small_cnn, images):
    model, inputs = small_cnn(), images(3)
    parts = [heat(model, inputs, channels=some) for some in ([0, 5], [1], [2, 3, 4])]
    torch.testing.assert_close(sum(parts), heat(model, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error::captum_classfilters.core.errors.ZeroMapWarning")
def test_channels_with_negative_gradients_only_are_said(small_cnn, images):
    model, inputs = small_cnn(), images(3)
    with torch.no_grad():
        model.fc.weight[1] = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    with pytest.warns(
        ZeroMapWarning, match=r"none in 3 of 3 samples.*against=True.*channel_weights=\"ones\""
    ) as caught:
        found = LayerGradCamPlusPlus(model, "relu").attribute(inputs, 1, channels=[2, 3])
    assert caught[0].filename == __file__
    assert len(caught) == 1
    assert not found.any()
    with pytest.warns(ZeroMapWarning, match="none in 1 of 3 samples"):
        heat(model, inputs, channels=[[0], [2], [5]])
    assert heat(model, inputs, channels=[2, 3], against=True).any()
    assert heat(model, inputs, channels=[2, 3], channel_weights="ones").any()
    heat(model, inputs, channels=[2, 0])


class Negated(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pictures):
        return -self.inner(pictures)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("weights", ["ones", "head", torch.ones(6)])
def test_against_and_weights_of_one_s_own_exclude_each_other(small_cnn, images, weights, cls):
    with pytest.raises(OptionError, match="pass only one"):
        cls(small_cnn(), "relu").attribute(images(2), 1, against=True, channel_weights=weights)


class Wrapped(nn.Module):
    """Gives its logits in another form."""

    def __init__(self, inner, form):
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, x):
        return self.form(self.inner(x))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("form", [
    lambda logits: SimpleNamespace(logits=logits), lambda logits: {"logits": logits}, lambda logits: (logits, logits),
], ids=["attribute", "mapping", "tuple"])  # fmt: skip
def test_logits_are_read_from_whatever_the_model_returns_them_in(small_cnn, images, form, cls):
    model = small_cnn()
    expected = cls(model, model.relu).attribute(images(), target=1)
    assert torch.equal(cls(Wrapped(model, form), model.relu).attribute(images(), target=1), expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_against_is_the_map_of_the_negated_model(small_cnn, images, cls):
    model, inputs = small_cnn(), images(3)
    against = cls(model, "relu").attribute(inputs, 1, against=True)
    negated = cls(Negated(model), "inner.relu").attribute(inputs, 1)
    torch.testing.assert_close(against, negated)
    assert not torch.allclose(against, cls(model, "relu").attribute(inputs, 1), rtol=1e-2)


@pytest.mark.parametrize("cls", CLASSES)
def test_given_weights_take_the_place_of_grad_cam_s(small_cnn, images, cls):
    model, inputs = small_cnn(), images(3)
    _, maps = gradient_and_map(model, model.relu, inputs, of_class(1))
    method = cls(model, "relu")
    own, each = torch.arange(6.0) - 2, torch.arange(18.0).reshape(3, 6) - 7
    close(method.attribute(inputs, 1, channel_weights="ones"), maps.sum(1, keepdim=True))
    close(method.attribute(inputs, 1, channel_weights=own), (own.view(1, 6, 1, 1) * maps).sum(1, keepdim=True))
    close(method.attribute(inputs, 1, channel_weights=each), (each.view(3, 6, 1, 1) * maps).sum(1, keepdim=True))
    chosen = method.attribute(inputs, 1, channel_weights=own, channels=[5])
    close(chosen, own[5] * maps[:, 5:])


@pytest.mark.parametrize("cls", CLASSES)
def test_the_head_s_weights_average_to_the_logit(small_cnn, images, cls):
    model, inputs, targets = small_cnn(), images(3), [3, 0, 1]
    with torch.no_grad():
        logits = of_class(*targets)(model(inputs))
    for target in (targets, torch.tensor(targets)):
        found = cls(model, "relu").attribute(inputs, target, channel_weights="head")
        torch.testing.assert_close(found.mean((1, 2, 3)) + model.fc.bias.detach()[targets], logits)
    scaled = Scaled(model)
    scale = torch.tensor([0.5, 1.0, 2.0])
    found = cls(scaled, "inner.relu").attribute(inputs, 2, scale, channel_weights="head")
    torch.testing.assert_close(found.mean((1, 2, 3)) + model.fc.bias.detach()[2], scaled(inputs, scale).detach()[:, 2])


# -- numbers that are hard ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_vanishing_gradients_give_the_map_of_alpha_one_half(small_cnn, images, cls):
    """Their squares and cubes are 0 in float32."""
    model, inputs = small_cnn(), images(3)
    with torch.no_grad():
        model.fc.weight *= 1e-20
    gradient, maps = gradient_and_map(model, model.relu, inputs, of_class(1))
    assert 0 < float(gradient.abs().max()) < 1e-20
    expected = ((gradient.relu() / 2).sum((2, 3), keepdim=True) * maps).sum(1, keepdim=True)
    found = cls(model, "relu").attribute(inputs, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    close(found, by_loop(model, model.relu, inputs, of_class(1)).sum(1, keepdim=True))


@pytest.mark.filterwarnings("error::captum_classfilters.core.errors.ZeroMapWarning")
@pytest.mark.parametrize("cls", CLASSES)
def test_no_activation_is_a_map_of_zeros(small_cnn, images, cls):
    model, inputs = small_cnn(), images(2)
    with torch.no_grad():
        model.bn2.weight.zero_()
        model.bn2.bias.fill_(-1.0)
    found = cls(model, "relu").attribute(inputs, 1)
    assert torch.equal(found, torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("cls", CLASSES)
def test_bfloat16(small_cnn, images, cls):
    model, inputs = small_cnn(), images(3)
    expected = cls(model, "relu").attribute(inputs, 1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cls(model, "conv2").attribute(inputs, 1)
    assert mixed.dtype == torch.bfloat16
    half = cls(copy.deepcopy(model).bfloat16(), "relu").attribute(inputs.bfloat16(), 1)
    assert half.dtype == torch.bfloat16
    atol = 0.1 * float(expected.abs().max())
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=atol)
    plain = cls(model, "conv2").attribute(inputs, 1)
    torch.testing.assert_close(mixed.float(), plain, rtol=0.1, atol=0.1 * float(plain.abs().max()))


@pytest.mark.parametrize("cls", CLASSES)
def test_many_positions_do_not_stall_in_bfloat16(cls):
    """3,136 equal parts: a sum in bfloat16 would stop at 256 of them."""
    model = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1)).bfloat16()
    nn.init.constant_(model[3].weight, 1.0)
    images = torch.ones(1, 1, 56, 56, dtype=torch.bfloat16)
    found = cls(model, "0").attribute(images, 1, **({} if cls is LayerGradCamPlusPlus else {"stdevs": 0.0}))
    g = float(torch.tensor(1 / 3136, dtype=torch.bfloat16))
    expected = 3136 * g / (2 + 3136 * g)
    torch.testing.assert_close(found.float(), torch.full((1, 1, 56, 56), expected), rtol=1e-2, atol=0)


@pytest.mark.parametrize("cls", CLASSES)
def test_channels_last(small_cnn, images, cls):
    model, inputs = small_cnn(), images(3)
    expected = cls(model, "relu").attribute(inputs, 1)
    model = model.to(memory_format=torch.channels_last)
    found = cls(model, "relu").attribute(inputs.to(memory_format=torch.channels_last), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# -- other networks ----------------------------------------------------------------------------------------------------


def test_a_convolution_of_signals():
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3))
    seeded(model, 0).eval()
    signals = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    expected = by_loop(model, model[1], signals, of_class(2))
    close(heat(model, signals, 2, "1", attr_dim_summation=False), expected)
    assert heat(model, signals, 2, "1").shape == (3, 1, 6)


def test_swin(images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [2, 4], [4, 4], num_classes=9).eval()

    def channels_first(tensor):
        return tensor.permute(0, 3, 1, 2)

    inputs = images(2, size=64)
    method = LayerGradCamPlusPlus(model, model.features, reshape=channels_first)
    parts = by_loop(model, model.features, inputs, of_class(7), as_maps=channels_first)
    assert parts.shape == (2, 24, 8, 8)
    close(method.attribute(inputs, 7), parts.sum(1, keepdim=True), rtol=1e-3)
    close(method.attribute(inputs, 7, channels=[1, 20]), parts[:, [1, 20]].sum(1, keepdim=True), rtol=1e-3)


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_vision_transformer(images, pooling):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5, global_pool=pooling, class_token=True
        ).eval()
        nn.init.normal_(model.head.weight)

    def without_class_token(tensor):
        return tensor[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    inputs, layer = images(2, size=64), model.blocks[-1].norm1
    parts = by_loop(model, layer, inputs, of_class(3), as_maps=without_class_token)
    found = LayerGradCamPlusPlus(model, layer, reshape=without_class_token).attribute(inputs, 3)
    assert found.shape == (2, 1, 4, 4)
    close(found, parts.sum(1, keepdim=True), rtol=1e-3)
