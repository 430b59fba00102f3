"""`ALDSplitter`: heads of many networks, read without running them; what the neurons of a node look at."""

import copy
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from contract import any_filters
from torch import nn

from captum_classfilters import ALDSplitter, ClassFilters, LayerGradCamPlusPlus, decompose
from captum_classfilters.assets import load_demo_network
from captum_classfilters.core.errors import HeadError, LabelError, NonFiniteError, OptionError
from captum_classfilters.splitting import ald_splitter
from captum_classfilters.splitting.splits import split_weights

BRANCHES = ("positive", "negative")


class NeverRuns(nn.Module):
    """Its forward raises."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 40, 3)
        self.head = nn.Linear(40, 5)

    def forward(self, images):
        raise AssertionError("the model was run")


def with_head(weights, module=None):
    model = NeverRuns()
    model.head = nn.Linear(weights.shape[1], weights.shape[0]) if module is None else module
    if module is None:
        with torch.no_grad():
            model.head.weight.copy_(weights)
    return model


def weights_of(seed=0, rows=5, size=40):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return load_demo_network()[0]


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


# -- split -------------------------------------------------------------------------------------------------------------


def test_weights_alone_are_read():
    splitter = ALDSplitter(NeverRuns())
    assert len(splitter.split(min_size=10)) == 5
    splitter.splits(fit="mle")
    splitter.class_filters()


def test_one_class_several_and_all():
    weights = weights_of()
    splitter = ALDSplitter(with_head(weights))
    expected = str(splitter.split(3))
    assert splitter.split(3).target == 3
    assert torch.equal(splitter.split(3).weights, weights[3])
    for one in (np.int64(3), torch.tensor(3)):
        assert str(splitter.split(one)) == expected
    for several in ([3, 0], (3, 0), np.array([3, 0]), torch.tensor([3, 0]), iter([3, 0]), [3, 0, 3]):
        found = splitter.split(several)
        assert list(found) == [3, 0]
        assert str(found[3]) == expected
        assert found[0].target == 0
    assert list(splitter.split()) == list(splitter.split(None)) == [0, 1, 2, 3, 4]
    assert str(splitter.split()[3]) == expected
    assert splitter.split(3, min_size=4).min_size == 4
    assert splitter.split(3, first_threshold="mean").first_threshold == pytest.approx(float(weights[3].mean()))
    assert splitter.split(3, fit="mle").laplace.rate.shape == (1,)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (5, LabelError, r"target must lie in \[0, 5\), got 5"),
        (-1, LabelError, r"target must lie in \[0, 5\), got -1"),
        ([0, 7], LabelError, "got 7"),
        ([], OptionError, "target is empty; pass a class, several, or None for all"),
        (1.5, LabelError, "target must be integers, got torch.float32"),
        (True, LabelError, "target must be integers, got torch.bool"),
        ("coat", LabelError, "target must be a class index"),
        ([[0, 1]], LabelError, "target must be an int or 1 of them"),
    ],
    ids=repr,
)
def test_wrong_classes_are_refused(target, error, message):
    with pytest.raises(error, match=message):
        ALDSplitter(NeverRuns()).split(target)


def test_wrong_options_are_refused():
    splitter = ALDSplitter(NeverRuns())
    with pytest.raises(OptionError, match="the head has 40 features, fewer than min_size=41, so nothing"):
        splitter.split(0, min_size=41)
    with pytest.raises(OptionError, match="fit must be one of"):
        splitter.split(0, fit="kde")
    for call in (splitter.class_filters, splitter.split(0).terminal):
        with pytest.raises(OptionError, match='branch must be "positive" or "negative", got \'both\''):
            call("both")


# -- heads -------------------------------------------------------------------------------------------------------------

NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=7), "fc"),
    "vgg11": (lambda: torchvision.models.vgg11(num_classes=7), "classifier.6"),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=7), "classifier.1"),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(num_classes=7), "classifier.1"),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(num_classes=7), "classifier.2"),
    "googlenet": (lambda: torchvision.models.googlenet(num_classes=7, init_weights=False, aux_logits=False), "fc"),
    "timm resnet10t": (lambda: timm.create_model("resnet10t", num_classes=7), "fc"),
    "timm mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=7), "classifier"),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=1), "head"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_head_is_the_known_classifier(name):
    make, expected = NETWORKS[name]
    with torch.device("meta"):  # no time for weights
        model = make()
    head = model.get_submodule(expected)
    size = min(head.in_features, 96)
    small = nn.Linear(size, 7)
    parent, _, child = expected.rpartition(".")
    setattr(model.get_submodule(parent), child, small)  # torch 2.4 has no set_submodule
    splits = ALDSplitter(model).splits()
    assert splits.layer == expected
    assert torch.equal(splits.weights, small.weight)


def test_the_layer_by_name_or_as_a_module(small_cnn):
    model = small_cnn()
    model.projection = nn.Linear(6, 30)
    assert ALDSplitter(model).splits(min_size=2).layer == "fc"  # a pass of noise shows it
    for layer in ("fc", model.fc):
        splits = ALDSplitter(model, layer).splits(min_size=2)
        assert splits.layer == "fc"
        assert torch.equal(splits.weights, model.fc.weight)
    assert torch.equal(ALDSplitter(lambda x: model(x), model.fc).splits(min_size=2).weights, model.fc.weight)
    with pytest.raises(HeadError, match=r"the model has no layer 'fcc'; did you mean one of \['fc'\]"):
        ALDSplitter(model, "fcc")
    with pytest.raises(HeadError, match=r"layer must be an nn.Linear or a 1x1 convolution without groups, got Conv2d"):
        ALDSplitter(model, "conv1")
    with pytest.raises(HeadError, match=r"a bare function does not show its layers: pass layer= with the nn.Linear"):
        ALDSplitter(lambda x: model(x))


def test_a_head_that_makes_no_logits_is_refused_when_it_runs(small_cnn):
    model = small_cnn()
    model.projection = nn.Linear(6, 30)
    inputs = torch.rand(2, 3, 8, 8)
    with pytest.raises(HeadError, match="layer projection must run once in a forward pass; it ran 0 times"):
        ALDSplitter(model, "projection").attribute(inputs, 0, min_size=2)
    assert ALDSplitter(model, "fc").attribute(inputs, 0, min_size=2).shape == (2, 1, 4, 4)


def test_a_convolution_as_head():
    model = with_head(torch.zeros(2, 2), nn.Conv2d(40, 5, 1))
    splits = ALDSplitter(model).splits()
    assert torch.equal(splits.weights, model.head.weight.flatten(1))


def test_a_decomposed_head_has_zeros_that_are_dropped(small_cnn):
    model = small_cnn()
    small = decompose(model, any_filters(model), 3, backend="gather")
    tree = ALDSplitter(small).split(0, min_size=2)
    kept = any_filters(model).mask(3)[0]
    assert (tree.layer, tree.zeros) == ("fc", 3)
    assert torch.equal(tree.weights, model.fc.weight[0] * kept)
    assert sum(tree.nodes[name].size for name in ("+1", "-1") if name in tree.nodes) == 3
    by_name = ALDSplitter(small, "fc").split(0, min_size=2)
    assert str(by_name) == str(tree)
    with pytest.raises(HeadError, match="its head has been decomposed"):
        ALDSplitter(small).attribute(torch.rand(2, 3, 8, 8), 0, min_size=2)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning")
def test_a_sparse_head():
    weights = weights_of() * (weights_of(1) > 0)
    model = with_head(weights)
    model.head.weight = nn.Parameter(weights.to_sparse_csr(), requires_grad=False)
    splits = ALDSplitter(model).splits()
    assert torch.equal(splits.weights, weights)
    assert splits.zeros.tolist() == (weights == 0).sum(1).tolist()


@pytest.mark.parametrize("layer", [None, "head"])
def test_a_quantised_head_is_refused(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(NeverRuns(), {nn.Linear})
    with pytest.raises(HeadError, match="is quantised, its weights cannot be read; use the network before"):
        ALDSplitter(model, layer)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value):
    weights = weights_of()
    weights[2, 7] = weights[4, 0] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity in layer head, classes 2, 4; load a whole checkpoint"):
        ALDSplitter(with_head(weights))


def test_weights_without_numbers_are_refused():
    with torch.device("meta"):
        model = NeverRuns()
    with pytest.raises(OptionError, match="layer head has no weights yet, it is on the meta device; load them first"):
        ALDSplitter(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precision(dtype):
    model = NeverRuns().to(dtype)
    splits = ALDSplitter(model).splits()
    assert splits.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(splits.weights, model.head.weight.to(splits.weights.dtype))


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", BRANCHES)
def test_scores_are_1_on_terminal_channels_alone(tmp_path, branch):
    weights = weights_of(size=120)
    weights[3] = weights[3].abs() * (1 if branch == "negative" else -1)
    splitter = ALDSplitter(with_head(weights))
    filters = splitter.class_filters(branch, class_names=[*"abcde"], min_size=10)
    assert filters.counts.tolist() == [1, 1, 1, 0, 1]
    assert not filters.scores[3].any()
    assert (filters.method, filters.layer, filters.class_names) == (f"ald_{branch}", "head", tuple("abcde"))
    torch.testing.assert_close(filters.mass, weights.double().abs())
    for known, tree in splitter.split(min_size=10).items():
        terminal = tree.terminal(branch)
        assert (filters.scores[known] == 1).nonzero()[:, 0].tolist() == sorted(terminal.tolist())
        depth, sign = tree.depth(branch), "+" if branch == "positive" else "-"
        for stage in range(1, depth + 1):
            inside = tree.channels(f"{sign}{stage}")
            assert (filters.scores[known, inside] >= stage / depth).all()
            assert int((filters.scores[known] >= stage / depth - 1e-12).sum()) == len(inside)
        if depth:
            assert filters.top(1)[known].item() in terminal
    filters.save(tmp_path / "table.safetensors")
    loaded = ClassFilters.load(tmp_path / "table.safetensors")
    assert torch.equal(loaded.scores, filters.scores)
    assert loaded.meta == filters.meta
    assert loaded.meta["min_size"] == 10


# -- the map -----------------------------------------------------------------------------------------------------------


def features_and_maps(network, images):
    kept = []
    handle = network.fc.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    maps = network.layer3.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    with torch.no_grad():
        network(images)
    handle.remove()
    maps.remove()
    return kept[1], kept[0]


@pytest.mark.parametrize("stage", [1, 2, None])
@pytest.mark.parametrize("branch", BRANCHES)
def test_the_map_averages_to_what_the_neurons_add(network, images, branch, stage):
    targets = [2, 9, 2, 0]
    splitter = ALDSplitter(network)
    found = splitter.attribute(images, targets, branch=branch, stage=stage, min_size=10)
    features, maps = features_and_maps(network, images)
    assert found.shape == (4, 1, 7, 7)
    ones = splitter.attribute(images, targets, branch=branch, stage=stage, min_size=10, channel_weights="ones")
    sign = "+" if branch == "positive" else "-"
    for n, target in enumerate(targets):
        tree = splitter.split(target, min_size=10)
        neurons = tree.channels(f"{sign}{stage}") if stage else tree.terminal(branch)
        expected = (network.fc.weight.detach()[target, neurons] * features[n, neurons]).sum()
        torch.testing.assert_close(found[n].mean(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ones[n, 0], maps[n, neurons].sum(0), rtol=1e-4, atol=1e-5)
    if stage is None:
        terminal = [splitter.split(target, min_size=10).terminal(branch) for target in targets]
        cam = LayerGradCamPlusPlus(network, "layer3").attribute(
            images, targets, channels=terminal, channel_weights="head"
        )
        torch.testing.assert_close(found, cam, rtol=1e-4, atol=1e-5)


def test_both_sides_add_up_to_the_logit(network, images):
    splitter = ALDSplitter(network)
    sides = [splitter.attribute(images, 4, branch=branch, stage=1).mean((1, 2, 3)) for branch in BRANCHES]
    with torch.no_grad():
        torch.testing.assert_close(sum(sides) + network.fc.bias[4], network(images)[:, 4], rtol=1e-4, atol=1e-4)


def test_maps_of_a_class_without_a_side_are_refused(small_cnn):
    model = small_cnn()
    with torch.no_grad():
        model.fc.weight[1] = model.fc.weight[1].abs()
        model.fc.weight[2] = 0.25
    splitter, inputs = ALDSplitter(model), torch.rand(2, 3, 8, 8)
    assert splitter.split(1, min_size=2).terminal("negative").tolist() == []
    with pytest.raises(OptionError, match=r"class 1 has no negative weights; see print\(splitter.split\(1\)\)"):
        splitter.attribute(inputs, [0, 1], branch="negative", min_size=2)
    with pytest.raises(OptionError, match="class 1 has no negative weights"):
        splitter.attribute(inputs, 1, branch="negative", stage=1, min_size=2)
    with pytest.raises(OptionError, match="class 2 has 1 stages on the positive side, so no stage 2"):
        splitter.attribute(inputs, 2, stage=2, min_size=2)
    constant = splitter.split(2, min_size=2)
    assert list(constant.nodes) == ["+1"]
    assert constant.terminal("positive").tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 10}, LabelError, r"target must lie in \[0, 10\), got 10"),
        ({"target": [1, 2]}, LabelError, "target must be an int or 4 of them"),
        ({"target": None}, LabelError, "target must be a class index, or one for each sample; got None"),
        ({"target": "coat"}, LabelError, "got the name 'coat'"),
        ({"stage": 0}, OptionError, "stage must be an integer of at least 1, or None for the last; got 0"),
        ({"stage": True}, OptionError, "stage must be an integer of at least 1"),
        ({"stage": 1.0}, OptionError, "stage must be an integer of at least 1"),
        ({"stage": 99}, OptionError, r"class 1 has \d stages on the positive side, so no stage 99"),
        ({"branch": "both"}, OptionError, 'branch must be "positive" or "negative", got \'both\''),
        ({"channel_weights": "all"}, OptionError, r"channel_weights must be one of .*got 'all'"),
        ({"min_size": 99}, OptionError, "the head has 64 features, fewer than min_size=99"),
    ],
    ids=str,
)
def test_wrong_arguments_of_attribute_are_refused(network, images, options, error, message):
    with pytest.raises(error, match=message):
        ALDSplitter(network).attribute(images, **{"target": 1, **options})


def test_no_map_behind_the_head_is_said():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(HeadError, match="there is no feature map of 48 channels behind the head"):
        ALDSplitter(model).attribute(torch.rand(2, 3, 4, 4), 1)


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pictures, scale):
        return self.inner(pictures * scale)


def test_further_arguments_of_the_forward(network, images):
    expected = ALDSplitter(network).attribute(images * 0.5, 1)
    found = ALDSplitter(Scaled(network)).attribute(images, 1, 0.5)
    torch.testing.assert_close(found, expected)


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "forward": lambda model: model.forward,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(small_cnn, wrapper):
    model, inputs = small_cnn(), torch.rand(2, 3, 8, 8)
    expected = ALDSplitter(model).attribute(inputs, [0, 3], min_size=2)
    wrapped = WRAPPERS[wrapper](model)
    splitter = ALDSplitter(wrapped)
    assert splitter.splits(min_size=2).layer == "fc"
    torch.testing.assert_close(splitter.attribute(inputs, [0, 3], min_size=2), expected)


def test_bfloat16(network, images):
    half = copy.deepcopy(network).bfloat16()
    found = ALDSplitter(half).attribute(images, 3, stage=1)
    expected = ALDSplitter(network).attribute(images, 3, stage=1)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_device(device, small_cnn, assert_close, monkeypatch):
    inputs = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    on_cpu = ALDSplitter(small_cnn())
    expected = on_cpu.attribute(inputs, [0, 1, 3], min_size=2, stage=1)
    if device.name == "cuda" and not torch.cuda.is_available():
        # a fake tensor has no weights to sort
        chosen = on_cpu._chosen(torch.tensor([0, 1, 3]), "positive", 1, {"min_size": 2})
        monkeypatch.setattr(ald_splitter, "head_weights", lambda *_: ("fc", small_cnn().fc.weight.detach(), None))
        monkeypatch.setattr(ALDSplitter, "_chosen", lambda *_: chosen)
    with device.mode:
        splitter = ALDSplitter(small_cnn(device=device.name))
        found = splitter.attribute(inputs.to(device.name), [0, 1, 3], min_size=2, stage=1)
        assert_close(found, expected.to(device.name), rtol=1e-4, atol=1e-5)


def test_the_numbers_of_a_real_head_are_those_of_its_matrix(network):
    splits, plain = ALDSplitter(network).splits(fit="mle"), split_weights(network.fc.weight.detach(), fit="mle")
    for branch in BRANCHES:
        for found, expected in zip(splits.side(branch), plain.side(branch), strict=True):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(splits.likelihood, plain.likelihood)
