"""A layer that the user names is believed only where it makes the model's logits, by value."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_classfilters import (
    ALDSplitter,
    AuxiliaryHead,
    HeadPass,
    InfluentialFeatures,
    decompose,
    explain_confusion,
    metrics,
)
from captum_classfilters.core.errors import HeadError


def cnn(classes=4, head=None, seed=0):
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*trunk, head or nn.Linear(8, classes)).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(2)]


class Cosine(nn.Linear):
    """A head that looks like a linear layer and is none."""

    def forward(self, features):
        return 8 * F.linear(F.normalize(features), F.normalize(self.weight))


class Behind(nn.Module):
    """A network with something behind it."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = cnn(), change

    def forward(self, images):
        return self.change(self.net(images))


class Second(nn.Module):
    """A second head that is no part of what the model returns, and a decoder that is defined last."""

    def __init__(self):
        super().__init__()
        self.trunk = cnn()[:4]
        self.fc, self.aux, self.decoder = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 192)

    def forward(self, images):
        features = self.trunk(images)
        self.aux(features)
        self.decoder(features)
        return self.fc(features)


def lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(cnn(), peft.LoraConfig(target_modules=["4"], r=2, init_lora_weights=False)).eval()


CALLS = {
    "HeadPass": lambda model, layer: HeadPass(model, batches(), layer=layer).head,
    "attribute": lambda model, layer: InfluentialFeatures(model, layer).attribute(batches()),
    "explain": lambda model, layer: InfluentialFeatures(model, layer).attribute(batches()[0][0], 0),
    "explain_confusion": lambda model, layer: explain_confusion(model, batches()[0][0], 0, 1, layer=layer),
    "accuracy_curve": lambda model, layer: metrics.accuracy_curve(
        HeadPass(model, batches(), layer=layer), InfluentialFeatures(cnn()).attribute(batches()), ks=[1]
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("make", "layer", "words"),
    [
        (lora, "base_model.model.4.base_layer", "the logits are made by 'base_model.model.4': name that one"),
        (lora, "base_model.model.4.lora_B.default", "the logits are made by 'base_model.model.4'"),
        (lambda: cnn(head=Cosine(8, 4)), "4", "Cosine, is no linear function of its input"),
        (lambda: cnn(head=Cosine(8, 4)), None, "Cosine, makes the model's output and is no linear function"),
        (lambda: Behind(lambda z: z[:, [1, 2, 3, 0]]).eval(), "net.4", "which is not what the model returns"),
        (lambda: Behind(torch.relu).eval(), "net.4", "which is not what the model returns"),
        (lambda: Second().eval(), "aux", "the logits are made by 'fc'"),
        (lambda: Second().eval(), "decoder", r"gives \(8, 192\), which is not what the model returns"),
    ],
    ids=["LoRA base", "LoRA B", "cosine", "cosine found", "reordered", "ReLU behind", "second head", "decoder"],
)
def test_a_layer_that_does_not_make_the_logits_is_refused_everywhere(make, layer, words, call):
    with pytest.raises(HeadError, match=words):
        CALLS[call](make(), layer)


def test_an_auxiliary_head_is_looked_at_on_purpose_and_labelled():
    model = Second().eval()
    head = HeadPass(model, batches(), layer=AuxiliaryHead("aux")).head
    assert repr(head) == "Head('aux', 8 features, 4 classes, auxiliary)"
    filters = InfluentialFeatures(model, AuxiliaryHead("aux")).attribute(batches(), selector="contribution")
    assert filters.meta["auxiliary_head"] is True
    features = torch.cat([model.trunk(images) for images, _ in batches()]).detach()
    labels = torch.cat([labels for _, labels in batches()])
    sums = torch.stack([features[labels == label].sum(0) for label in range(4)])
    torch.testing.assert_close(filters.scores.float(), sums * model.aux.weight.detach(), rtol=1e-4, atol=1e-5)


def test_the_remedy_for_an_adapter_works():
    model = lora()
    for layer in (None, "base_model.model.4"):
        head_pass = HeadPass(model, batches(), layer=layer)
        filters = InfluentialFeatures(model, layer).attribute(batches())
        curve = metrics.accuracy_curve(head_pass, filters, ks=[8])
        assert curve.query("filters == 'histogram' and class_name == 'all'").accuracy.item() == curve.accuracy[0]
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches())
        assert curve.accuracy[0] == right / 16


@pytest.mark.parametrize(
    "make",
    [lora, lambda: Second().eval()],
    ids=["LoRA", "second head and decoder"],
)
def test_the_splitter_reads_the_head_that_makes_the_logits(make):
    model = make()
    images = batches()[0][0]
    head = HeadPass(model, batches()).head
    splits = ALDSplitter(model).splits(min_size=2)
    assert splits.layer == head.name
    torch.testing.assert_close(splits.weights, head.weight)
    with torch.no_grad():
        trunk = model.trunk(images) if isinstance(model, Second) else nn.Sequential(*model.base_model.model[:4])(images)
        torch.testing.assert_close(F.linear(trunk, head.weight, head.bias), model(images), rtol=1e-4, atol=1e-5)


def test_where_nothing_can_be_run_a_second_head_is_refused_by_name():
    class Odd(Second):
        def forward(self, images, more):
            return super().forward(images)

    model = Odd()
    del model.decoder
    with pytest.raises(HeadError, match="several layers could be the head: aux, fc; pass layer="):
        ALDSplitter(model)
    assert ALDSplitter(model, "fc").splits(min_size=2).layer == "fc"


@pytest.mark.parametrize("precision", ["autocast", "accelerate", "module"])
def test_logits_in_half_precision_that_are_cast_are_recognised(precision):
    model = cnn()
    if precision == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        assert HeadPass(model, batches()).head.name == "4"
        assert decompose(model, InfluentialFeatures(model).attribute(batches()), 8)(batches()[0][0]).shape == (8, 4)
    elif precision == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert HeadPass(Behind(lambda z: z.float()).eval(), batches()).head.name == "net.4"
            assert HeadPass(Behind(lambda z: z.float()).eval(), batches(), layer="net.4").head.name == "net.4"
    else:
        model = Behind(lambda z: z.float()).bfloat16().eval()
        assert HeadPass(model, batches()).head.name == "net.4"


# -- aliases and wrappers ----------------------------------------------------------------------------------------------


class Wrap(nn.Module):
    """One module under two names, as in many wrappers for feature extraction."""

    def __init__(self):
        super().__init__()
        net = cnn()
        self.features, self.classifier = nn.Sequential(*net.children()), net[4]

    def forward(self, images):
        return self.features(images)


@pytest.mark.parametrize("layer", [None, "features.4", "classifier"])
def test_every_name_of_a_module_works(layer):
    model = Wrap().eval()
    filters = InfluentialFeatures(model, layer).attribute(batches())
    expected = InfluentialFeatures(cnn()).attribute(batches())
    assert torch.equal(filters.scores, expected.scores)
    for name in (None, "features.4", "classifier"):
        small = decompose(model, filters, 2, layer=name)
        torch.testing.assert_close(small(batches()[0][0]), decompose(cnn(), expected, 2)(batches()[0][0]))
    assert metrics.accuracy_curve(HeadPass(model, batches(), layer=layer), filters, ks=[2]).shape[0] > 0


@pytest.mark.parametrize("wrapper", ["AveragedModel", "DataParallel", "compile", "Fabric"])
def test_a_wrapped_model_has_the_names_of_the_one_inside(wrapper):
    plain = cnn()
    model = {
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(plain),
        "DataParallel": lambda: nn.DataParallel(plain),
        "compile": lambda: torch.compile(plain, backend="eager"),
        "Fabric": lambda: _FabricModule(plain),
    }[wrapper]()
    filters = InfluentialFeatures(model).attribute(batches())
    assert filters.layer == "4"
    images = batches()[0][0]
    for network in (plain, model):
        torch.testing.assert_close(decompose(network, filters, 8)(images), plain(images))
    assert HeadPass(model, batches(), layer="4").head.name == "4"


class _FabricModule(nn.Module):
    """As Lightning's Fabric wraps: the same module under two names."""

    def __init__(self, module):
        super().__init__()
        self._forward_module, self._original_module = module, module

    def forward(self, *args):
        return self._forward_module(*args)
