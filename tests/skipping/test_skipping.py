"""`PathDecoupler.skipping`: the outputs of the masked network, on networks of every make, and really for less work."""

import copy
import functools
import threading

import pytest
import torch
import torchvision
from contract import Snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import convnext as convnexts
from torchvision.models import efficientnet as efficient
from torchvision.models import resnet as resnets

from captum_classfilters import PathDecoupler
from captum_classfilters.assets.networks import SmallInception, SmallResNet, SmallVGG
from captum_classfilters.core.errors import MergeError, OptionError
from captum_classfilters.decoupling.costs import Costs
from captum_classfilters.skipping import skip_conv
from captum_classfilters.skipping.network import Format
from captum_classfilters.skipping.skip_conv import CostModel, SkipConv


def vgg(*widths):
    """Convolutions without batch norm; "M" pools."""
    features = torchvision.models.vgg.make_layers(list(widths))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-2], 10))


def small(kind, *args, **options):
    return lambda: kind(*args, mean=(0.5,) * 3, std=(0.25,) * 3, **options)


def known(name, **options):
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def efficientnet():
    rows = [(1, 3, 1, 16, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 1)]
    return efficient.EfficientNet([efficient.MBConvConfig(*row) for row in rows], dropout=0.2, num_classes=10)


# one of each make of block, as short as it can be
NETWORKS = {
    "SmallResNet": small(SmallResNet, 8),
    "SmallVGG": small(SmallVGG),
    "SmallInception": small(SmallInception),
    "resnet, basic": lambda: resnets.ResNet(resnets.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "resnet, bottleneck": lambda: resnets.ResNet(resnets.Bottleneck, [1, 2, 1, 1], num_classes=10, width_per_group=16),
    "densenet": lambda: torchvision.models.DenseNet(16, (2, 3, 2), 32, num_classes=10),
    "mobilenet": lambda: torchvision.models.MobileNetV2(10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
    "efficientnet": efficientnet,
    "convnext": lambda: convnexts.ConvNeXt(
        [convnexts.CNBlockConfig(32, 64, 1), convnexts.CNBlockConfig(64, None, 2)], num_classes=10
    ),
    "squeezenet": known("squeezenet1_1", num_classes=10),
    "shufflenet": lambda: torchvision.models.ShuffleNetV2([2, 2, 2], [24, 32, 64, 96, 128], num_classes=10),
    "vgg": lambda: vgg(64, "M", 128, "M", 128, 128, "M"),
}
WHOLE = {
    "resnet18": known("resnet18"),
    "resnet50": known("resnet50"),
    "googlenet": known("googlenet", init_weights=False, aux_logits=False),
    "densenet121": known("densenet121"),
    "mobilenet_v2": known("mobilenet_v2"),
    "efficientnet_b0": known("efficientnet_b0"),
    "convnext_tiny": known("convnext_tiny"),
    "squeezenet1_0": known("squeezenet1_0"),
    "shufflenet_v2_x0_5": known("shufflenet_v2_x0_5"),
    "vgg11": lambda: vgg(*torchvision.models.vgg.cfgs["A"]),
}
# maps times a scale, and gates on a norm that stays: there not all that is closed is skipped
SKIPS_LESS = ("efficientnet", "efficientnet_b0", "convnext", "convnext_tiny")


def lively(make, seed=0):
    """Weights that keep signals alive, norms that are not neutral; made without torch's own slow ones."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in ("weight", "layer_scale", "running_var") and (value.dim() == 1 or name == "layer_scale"):
                value.data.uniform_(0.5, 1.5, generator=generator)
            elif name in ("mean", "std"):
                value.data.fill_(0.3)
            elif value.is_floating_point():
                spread = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1
                value.data.normal_(0, spread, generator=generator)
            else:
                value.data.zero_()
    return model.eval().requires_grad_(False)


def split(model, *inputs, seed=0, **options):
    """A decoupler whose every gate is open for some of these images and closed for others, well off zero for all."""
    generator = torch.Generator().manual_seed(seed)
    decoupler = PathDecoupler(model, generator=generator, **options).eval().requires_grad_(False)

    def set_apart(controller, args):
        weight, bias = controller.excite.weight, controller.excite.bias
        weight.normal_(generator=generator)
        bias.zero_()
        values = controller.logits(args[0]).sort(0).values
        # not the outermost gaps, which part one image from all others
        gaps, below = values.diff(dim=0)[1:-1].max(0)
        # where all are alike it is open or closed for all
        apart = gaps > 1e-3 * values.abs().amax(0)
        scale = torch.where(apart, 1 / gaps, 0)
        weight.mul_(scale[:, None])
        middle = -scale * (values.gather(0, below[None] + 1)[0] + gaps / 2)
        bias.copy_(torch.where(apart, middle, torch.rand(bias.shape, generator=generator) - 0.5))

    handles = [controller.register_forward_pre_hook(set_apart) for controller in decoupler.controllers]
    decoupler(*inputs)
    for handle in handles:
        handle.remove()
    for gate in decoupler.gate_logits(*inputs)[1]:
        # folding cannot turn one over
        assert bool((gate.abs() > 1e-4).all())
    return decoupler


def images(count=8, size=32, seed=1, dims=2):
    """Each of another mean colour: gates see means."""
    generator = torch.Generator().manual_seed(seed)
    tints = torch.randn(count, 3, *[1] * dims, generator=generator)
    return torch.randn(count, 3, *[size] * dims, generator=generator) + tints


def assert_same(found, expected, rtol=1e-5):
    """As near as ``rtol`` of the largest; and not for being nothing."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(error) <= rtol


@functools.cache
def shared(name):
    """A decoupler for tests that change nothing of it, and its images."""
    return split(lively(NETWORKS[name]), images(8, 16)), images(8, 16)


@pytest.fixture(scope="module", params=[*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in WHOLE)])
def network(request):
    """``(name, decoupler, its skipping network, images)``."""
    decoupler = split(lively((NETWORKS | WHOLE)[request.param]), images())
    return request.param, decoupler, decoupler.skipping(measured=False), images()


# -- on whole networks -------------------------------------------------------------------------------------------------


def test_outputs_are_those_of_the_masked_network(network):
    _, decoupler, skipping, x = network
    expected = decoupler(x)
    # gates matter, and so do images
    scale = expected.abs().max()
    assert (expected - decoupler.model(x)).abs().max() > 1e-2 * scale
    assert (expected - expected.mean(0)).abs().max() > 1e-2 * scale
    for rows in ([0], [3], [2, 1], [7, 6, 5, 0, 3], range(8)):
        assert_same(skipping(x[list(rows)]), expected[list(rows)])


def rounded(gates, counts):
    """Open up to the next multiple of 8, of 16 where there are 64 filters or more; the first closed ones are added."""
    found = []
    for gate, count in zip(gates, counts, strict=True):
        step = 16 if count >= 64 else 8
        opened = int(gate.sum())
        wanted = min(-(-max(opened, 1) // step) * step, count)
        extra = (~gate[0]).nonzero().flatten()[: wanted - opened]
        found.append(gate.index_fill(1, extra, True))
    return found


def test_what_runs_is_what_is_open(network):
    name, decoupler, skipping, x = network
    paths = decoupler.paths([x[:1]])
    with FlopCounterMode(display=False) as counter:
        skipping(x[:1])
    found, opened = counter.get_total_flops() // 2, int(paths.macs())
    controllers, costs = paths.costs.controllers, paths.costs
    assert controllers == sum(c.squeeze.weight.numel() + c.excite.weight.numel() for c in decoupler.controllers)
    assert opened <= found < costs.dense + controllers
    if name in SKIPS_LESS:
        return
    # sums are whole again; depthwise, an open output takes its input whether that is open or not
    convs = [
        conv._replace(inputs=["all", conv.in_channels]) if conv.groups > 1 or conv.inputs[0] == "or" else conv
        for conv in costs.convs
    ]
    at_most = Costs(tuple(convs), costs.other, controllers).of(rounded(paths.gates(), decoupler.channels))
    assert found == int(at_most)
    if name in ("SmallVGG", "resnet, basic", "vgg", "resnet18", "vgg11"):
        assert found < 0.6 * costs.dense


class Convolutions(TorchDispatchMode):
    """How many run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def convolutions(skipping, x):
    with Convolutions() as mode:
        skipping(x)
    return mode.count


@pytest.mark.parametrize("name", ["SmallResNet", "SmallInception"])
def test_images_with_one_path_run_together(name):
    decoupler, x = shared(name)
    skipping = decoupler.skipping(measured=False)
    gates = torch.cat(decoupler.gates(x)[1], 1)
    other = max(range(1, 8), key=lambda row: int((gates[row] != gates[0]).sum()))
    one, two = convolutions(skipping, x[:1]), convolutions(skipping, x[[0, other]])
    assert convolutions(skipping, x[[0, 0, 0]]) == one
    assert one < two <= 2 * one
    assert convolutions(skipping, x[[other, 0, 0, other, 0, 0]]) == two
    order = torch.tensor([4, 0, 7, 7, 2, 0])
    assert_same(skipping(x[order]), skipping(x)[order])


@pytest.fixture
def fast(monkeypatch):
    """Times that mean nothing, in no time."""
    monkeypatch.setattr(skip_conv, "_REPEATS", 1)
    monkeypatch.setattr(skip_conv, "_BETWEEN", 1)


@pytest.mark.parametrize("name", ["SmallResNet", "SmallInception"])
def test_whatever_the_clock_says_outputs_are_the_same(name, fast):
    decoupler, x = shared(name)
    skipping = decoupler.skipping(x, measured=True)
    layers = skipping.layers()
    assert set(layers) >= set(decoupler.layers)
    assert all(isinstance(layer.costs, CostModel) for layer in layers.values())
    formats = [part for part in skipping.network.modules() if isinstance(part, Format) and not part.leads_in]
    assert formats
    expected = decoupler(x)
    for costs in (None, CostModel(0, 0, 1, 0, 0, 0), CostModel(1, 1, 0, 0, 0, 1e-9)):
        for layer in layers.values() if costs else ():
            layer.prefers_dense, layer.costs = False, costs
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for part in formats:
                part.memory_format = memory_format
            for count in (1, 6, 6, 6):
                assert_same(skipping(x[:count]), expected[:count])


# -- pruning -----------------------------------------------------------------------------------------------------------


def resnet(x, **options):
    return split(lively(small(SmallResNet, 8, 5, widths=(6, 9, 20))), x, **options)


def test_filters_that_never_open_are_pruned():
    x = images(6, 8)
    decoupler = resnet(x)
    excite = decoupler.controllers[2].excite
    excite.weight[:4] = -excite.weight[:4].abs()
    excite.bias[:4] = -excite.bias[:4].abs()
    excite.weight[1, 0], excite.bias[2] = 1e-9, 1e-9  # these might
    excite.bias[3] = 0
    skipping = decoupler.skipping(measured=False)
    layer = skipping.layers()[decoupler.layers[2]]
    alike = int(((excite.weight <= 0).all(1) & (excite.bias <= 0)).sum())
    assert alike >= 2
    assert len(layer.weight) == 9 - alike
    assert layer.live.tolist()[:2] == [1, 2]
    assert_same(skipping(x), decoupler(x))


def test_filters_closed_on_all_given_paths_are_pruned(fast):
    x = images(6, 8)
    decoupler = resnet(x)
    paths = decoupler.paths([x[:3]])
    for measured in (False, True):
        skipping = decoupler.skipping(x[:3], paths=paths, measured=measured)
        for index, name in enumerate(decoupler.layers):
            ever = int(paths.bits(index).any(0).sum())
            assert len(skipping.layers()[name].weight) == max(ever, 1)
        assert_same(skipping(x[:3]), decoupler(x[:3]))
        assert_same(skipping(x[[2, 0]]), decoupler(x[[2, 0]]))
    assert any(layer.live is not None for layer in skipping.layers().values())


def test_paths_of_another_network_are_refused():
    x = images(6, 8)
    decoupler, other = resnet(x), resnet(x, seed=1)
    wider = split(lively(small(SmallResNet, 8, 5)), x)
    for stranger in (other, wider):
        with pytest.raises(MergeError, match=r"are of another network's controllers; collect them with this decoupler"):
            decoupler.skipping(measured=False, paths=stranger.paths([x]))
    # nor are those from before the controllers changed
    paths = decoupler.paths([x])
    decoupler.controllers[0].excite.bias.add_(1)
    with pytest.raises(MergeError):
        decoupler.skipping(measured=False, paths=paths)


# -- manners -----------------------------------------------------------------------------------------------------------


def test_neither_knows_of_the_other(fast):
    x = images(6, 8)
    decoupler = resnet(x)
    decoupler.train()
    decoupler.model.layer1.eval()
    decoupler.model.conv1.register_forward_hook(lambda *_: None)
    before = Snapshot.of(decoupler)
    skipping = decoupler.skipping(x)
    found = skipping(x)
    Snapshot.of(decoupler).assert_same(before)
    for parameter in [*decoupler.parameters(), *decoupler.buffers()]:
        parameter.zero_()
    assert torch.equal(skipping(x), found)
    twin = copy.deepcopy(skipping)
    for value in skipping.state_dict().values():
        value.zero_()
    assert_same(twin(x), found)


def test_it_stays_in_eval_mode():
    skipping = resnet(images(6, 8)).skipping(measured=False)
    with pytest.raises(OptionError, match=r"train the PathDecoupler and make skipping\(\) anew"):
        skipping.train()
    assert skipping.eval() is skipping
    assert not any(module.training for module in skipping.modules())


def test_it_keeps_no_graph():
    x = images(6, 8).requires_grad_()
    skipping = resnet(x.detach()).skipping(measured=False)
    expected = skipping(x)
    assert not expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            for _ in range(3):
                assert torch.equal(skipping(x), expected)
                assert_same(skipping(x[:1]), expected[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_follows_the_dtype_of_the_model(dtype, fast):
    x = images(6, 8).to(dtype)
    model = lively(small(SmallResNet, 8, 5, widths=(6, 9, 20))).to(dtype)
    decoupler = split(model, x)
    for skipping in (decoupler.skipping(measured=False), decoupler.skipping(x)):
        for count in (1, 6):
            for given in (x[:count], x[:count].contiguous(memory_format=torch.channels_last)):
                assert_same(skipping(given), decoupler(given), rtol=0.05 if dtype == torch.bfloat16 else 1e-13)


@pytest.mark.parametrize("kind", ["SmallResNet", "SmallInception"])
def test_under_autocast_it_is_near_the_masked_network_under_autocast(kind):
    decoupler, x = shared(kind)
    skipping = decoupler.skipping(measured=False)
    with torch.autocast("cpu", torch.bfloat16):
        for count in (1, 6):
            assert_same(skipping(x[:count]), decoupler(x[:count]), rtol=0.05)
    assert_same(skipping(x), decoupler(x))


def test_threads_see_only_their_own_images():
    x = images(6, 8)
    decoupler = resnet(x)
    skipping, expected = decoupler.skipping(measured=False), decoupler(x)
    found, together = {}, threading.Barrier(2)

    def work(rows):
        together.wait()
        found[tuple(rows)] = [skipping(x[rows]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(rows,)) for rows in ([0, 1, 2], [5, 3])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for rows, outputs in found.items():
        for output in outputs:
            assert_same(output, expected[list(rows)])


def test_it_follows_the_device_of_the_model(device, assert_close, monkeypatch):
    x = images(6, 8)
    decoupler = resnet(x)
    expected = decoupler(x)
    if device.name == "cuda" and not torch.cuda.is_available():
        # a device without values has no paths to tell apart: all channels are computed
        skipping = decoupler.skipping(measured=False)
        for layer in skipping.layers().values():
            layer.prefers_dense = True
        with device.mode:
            moved(skipping, device.name)
            found = skipping(x.to(device.name))
            assert_close(found, expected.to(device.name))
        return
    skipping = decoupler.to(device.name).skipping(x.to(device.name))
    assert_close(skipping(x.to(device.name)).cpu(), expected, rtol=1e-3, atol=1e-3)


def moved(module, device):
    """``module.to``, where torch refuses to move parameters: on a fake device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().to(device), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(part, name, buffer.to(device))
        if isinstance(part, SkipConv):
            part._gather()
