"""Gated units of architectures of torchvision: which convolutions they are, what open and closed gates do."""

import re
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import nn

from captum_classfilters import PathDecoupler
from captum_classfilters.core.calls import calls_of
from captum_classfilters.decoupling.units import find_units


class Known(NamedTuple):
    """What is written down for a network: units with their sites, and the names of the convolutions left free."""

    size: int
    count: int
    first: tuple[str, str]
    last: tuple[str, str]
    free: str  # a pattern
    on_conv: str = "none"  # a pattern: the units that are masked on the convolution itself


SQUEEZE_EXCITATION = r"features\.\d+(\.\d+)?\.block\.\d\.fc[12]"
KNOWN = {
    "resnet18": Known(
        64, 15, ("layer1.0.conv1", "layer1.0.bn1"), ("layer4.1.conv1", "layer4.1.bn1"),
        r"conv1|layer4\.1\.conv2|layer[234]\.0\.downsample\.0",
    ),
    "resnet50": Known(
        64, 47, ("layer1.0.conv1", "layer1.0.bn1"), ("layer4.2.conv2", "layer4.2.bn2"),
        r"conv1|layer4\.2\.conv3|layer[1234]\.0\.downsample\.0",
    ),
    "vgg11": Known(
        32, 6, ("features.3", "features.3"), ("features.16", "features.16"), r"features\.(0|18)", on_conv=".*"
    ),
    "vgg11_bn": Known(32, 6, ("features.4", "features.5"), ("features.22", "features.23"), r"features\.(0|25)"),
    "googlenet": Known(
        64, 55, ("conv2.conv", "conv2.bn"), ("inception5b.branch3.1.conv", "inception5b.branch3.1.bn"),
        r"conv1\.conv|inception5b\.branch4\.1\.conv|aux[12]\.conv\.conv",
    ),
    "inception_v3": Known(
        75, 92, ("Conv2d_2a_3x3.conv", "Conv2d_2a_3x3.bn"),
        ("Mixed_7c.branch3x3dbl_3b.conv", "Mixed_7c.branch3x3dbl_3b.bn"),
        r"Conv2d_1a_3x3\.conv|Mixed_7c\.branch_pool\.conv|AuxLogits\.conv[01]\.conv",
    ),
    "densenet121": Known(
        64, 118, ("features.denseblock1.denselayer1.conv1", "features.denseblock1.denselayer1.norm2"),
        ("features.denseblock4.denselayer16.conv1", "features.denseblock4.denselayer16.norm2"),
        r"features\.conv0|features\.denseblock4\.denselayer16\.conv2",
        # those go into a concatenation, and the norm behind it is of other layers' channels too
        on_conv=r"features\.denseblock\d\.denselayer\d+\.conv2|features\.transition\d\.conv",
    ),
    "mobilenet_v2": Known(
        64, 50, ("features.1.conv.0.0", "features.1.conv.0.1"), ("features.17.conv.2", "features.17.conv.3"),
        r"features\.(0|18)\.0",
    ),
    "mobilenet_v3_small": Known(
        64, 32, ("features.1.block.0.0", "features.1.block.0.1"), ("features.11.block.3.0", "features.11.block.3.1"),
        r"features\.(0|12)\.0|" + SQUEEZE_EXCITATION,
    ),
    "efficientnet_b0": Known(
        64, 47, ("features.1.0.block.0.0", "features.1.0.block.0.1"),
        ("features.7.0.block.3.0", "features.7.0.block.3.1"), r"features\.[08]\.0|" + SQUEEZE_EXCITATION,
    ),
    "convnext_tiny": Known(
        # a permutation stands between the depthwise convolution and its norm
        64, 20, ("features.1.0.block.0", "features.1.0.block.0"), ("features.7.1.block.0", "features.7.1.block.0"),
        r"features\.0\.0|features\.7\.2\.block\.0", on_conv=".*",
    ),
}  # fmt: skip


def built(name):
    """In eval mode, with ten classes and weights from a local seed that keep the size of what goes through."""
    quiet = {"init_weights": False} if name in ("googlenet", "inception_v3", "vgg11", "vgg11_bn") else {}
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None, num_classes=10, **quiet)
        if name.startswith("vgg"):
            model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dim() > 1:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
            elif value.is_floating_point():
                centre = 1.0 if key.endswith(("running_var", "weight")) else 0.0
                value.uniform_(centre - 0.3, centre + 0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=list(KNOWN))
def network(request):
    """Name, model and two images; a model is made once for its tests."""
    size = KNOWN[request.param].size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return request.param, built(request.param), images


def test_units_are_those_written_down(network):
    name, model, _ = network
    known, units = KNOWN[name], find_units(model)
    convs = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    gated = [unit.conv for unit in units]
    free = [conv for conv in convs if conv not in gated]
    print(f"{name}: {len(units)} of {len(convs)} convolutions, {units[0]} to {units[-1]}; free: {free}")
    assert (len(units), units[0], units[-1]) == (known.count, known.first, known.last)
    assert free == [conv for conv in convs if re.fullmatch(known.free, conv)]
    for unit in units:
        if re.fullmatch(known.on_conv, unit.conv):
            assert unit.site == unit.conv
        else:
            assert isinstance(model.get_submodule(unit.site), nn.BatchNorm2d)
            assert unit.site.rpartition(".")[0] == unit.conv.rpartition(".")[0]


def test_found_by_running_they_are_the_same(network):
    _, model, images = network
    assert find_units(model, calls=calls_of(model, images)) == find_units(model)


def test_open_gates_leave_every_bit_of_the_output(network):
    _, model, images = network
    decoupler = PathDecoupler(model, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for controller in decoupler.controllers:
            controller.excite.weight.zero_()
            controller.excite.bias.fill_(1e3)
        expected = model(images)
        found, gates = decoupler.gates(images)
    assert torch.isfinite(expected).all()
    assert not torch.allclose(expected[0], expected[1], rtol=1e-3)
    assert torch.equal(found, expected)
    assert all(bool((gate == 1).all()) for gate in gates)
    assert not decoupler.training


CLOSED = {
    "resnet18": [("layer2.0.conv1", "layer2.0.bn1", 7), ("layer3.0.conv2", "layer3.0.bn2", 200)],
    "vgg11": [("features.6", "features.6", 3)],
    "googlenet": [("inception5a.branch2.1.conv", "inception5a.branch2.1.bn", 8)],
    "densenet121": [
        ("features.denseblock1.denselayer2.conv1", "features.denseblock1.denselayer2.norm2", 5),
        ("features.denseblock2.denselayer3.conv2", "features.denseblock2.denselayer3.conv2", 31),
    ],
    "mobilenet_v2": [("features.3.conv.1.0", "features.3.conv.1.1", 17)],
    "convnext_tiny": [("features.3.1.block.0", "features.3.1.block.0", 100)],
}


@pytest.fixture(scope="module", params=list(CLOSED))
def closable(request):
    """A model, its decoupler, an image, and the places to close."""
    model = built(request.param)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    return PathDecoupler(model), images, CLOSED[request.param]


def test_a_closed_channel_is_zero_and_all_else_is_as_a_hand_written_mask_makes_it(closable):
    decoupler, images, places = closable
    model = decoupler.model
    for conv, site, channel in places:
        open_maps, plain = masked_by_hand(model, site, None, images)
        hand_maps, expected = masked_by_hand(model, site, channel, images)
        gates = [torch.ones(1, channels) for channels in decoupler.channels]
        gates[decoupler.layers.index(conv)][0, channel] = 0
        with torch.no_grad(), decoupler.frozen(tuple(gates)), noting_last(model, site) as seen:
            found = decoupler(images)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, plain, rtol=1e-6)
        others = [index for index in range(open_maps.shape[1]) if index != channel]
        assert not seen[0][:, channel].any()
        assert open_maps[:, channel].any()
        assert torch.equal(seen[0][:, others], open_maps[:, others])
        assert torch.equal(seen[0], hand_maps)


def masked_by_hand(model, site, channel, images):
    """The maps of a module, one channel of them closed by an ordinary hook, and what the model gives then."""
    seen = []

    def mask(module, args, output):
        output = output.clone()
        if channel is not None:
            output[:, channel] = 0
        seen.append(output.clone())  # what follows may work in place
        return output

    handle = model.get_submodule(site).register_forward_hook(mask)
    with torch.no_grad():
        output = model(images)
    handle.remove()
    return seen[0], output


class noting_last:  # noqa: N801
    """Notes what a module gives after all hooks that stand on it when the model's forward begins."""

    def __init__(self, model, site):
        self.site, self.seen, self.handles = model.get_submodule(site), [], []
        self.handles.append(model.register_forward_pre_hook(self.late))

    def late(self, module, args):
        self.handles.append(self.site.register_forward_hook(self.note))

    def note(self, module, args, output):
        self.seen.append(output.clone())

    def __enter__(self):
        return self.seen

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
