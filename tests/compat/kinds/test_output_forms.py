"""What models return, in every form; Hugging Face classifiers end to end; images in another form than the model's."""

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn

from captum_classfilters import (
    ALDSplitter,
    GateSchedule,
    HeadMoments,
    HeadPass,
    InfluentialFeatures,
    LabelSensitiveGate,
    LabelSensitiveTraining,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    PathDecoupler,
    WithOutput,
    attacks,
    compare,
    decompose,
    explain_confusion,
    metrics,
    recover,
    visualize,
)
from captum_classfilters.comparison import aggregate
from captum_classfilters.core.errors import ClassFiltersError, HeadError, OptionError, ShapeError

transformers = pytest.importorskip("transformers")
NAMES = ("ant", "bee", "cat", "dog")
IDS = dict(enumerate(NAMES))
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(8, 3, 32, 32, generator=GENERATOR)
LABELS = torch.arange(8) % 4
LOADER = [{"pixel_values": IMAGES[:5], "labels": LABELS[:5]}, {"pixel_values": IMAGES[5:], "labels": LABELS[5:]}]


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label=IDS,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**sizes, layer_type="basic", id2label=IDS)
    )


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, id2label=IDS)
    return transformers.ConvNextForImageClassification(config)


# the network, the end of the name of its last map's layer, and its head's input by hand
FACES = {
    "ViT": (vit, "layernorm_before", lambda m, x: m.vit(x).last_hidden_state[:, 0]),
    "ResNet": (resnet, "encoder.stages.1", lambda m, x: m.resnet(x).pooler_output.flatten(1)),
    "ConvNeXt": (convnext, "encoder.stages.1", lambda m, x: m.convnext(x).pooler_output),
}


@pytest.fixture(scope="module", params=FACES)
def face(request):
    make, ending, features = FACES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # no layer scale that is next to nothing
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    layer = [name for name, _ in model.named_modules() if name.endswith(ending)][-1]
    return model, layer, features


@pytest.fixture(scope="module")
def table(face):
    return InfluentialFeatures(face[0]).attribute(LOADER, selector="contribution")


@torch.no_grad()
def by_hand(face):
    """Features, weights and logits, from the network's own parts."""
    model, _, features_of = face
    head = model.classifier[-1] if isinstance(model.classifier, nn.Sequential) else model.classifier
    features = features_of(model, IMAGES)
    return features, head.weight, model(IMAGES).logits


def test_a_table_of_a_face(face, table):
    features, weight, _ = by_hand(face)
    expected = torch.zeros(4, features.shape[1]).index_add(0, LABELS, weight[LABELS] * features).double()
    torch.testing.assert_close(table.scores, expected, rtol=1e-4, atol=1e-5)
    assert table.class_names == NAMES


def test_tensors_explained(face, table):
    features, weight, logits = by_hand(face)
    contributions = InfluentialFeatures(face[0]).attribute(IMAGES, LABELS)
    torch.testing.assert_close(contributions, weight[LABELS] * features, rtol=1e-4, atol=1e-5)
    chosen = InfluentialFeatures(face[0]).explain(IMAGES, "bee", table, 3)
    assert chosen.shape[:2] == (8, 1)
    confusion = explain_confusion(face[0], IMAGES, 1, torch.tensor([0, 2, 3, 0, 2, 3, 0, 2]))
    expected = (logits.gather(1, confusion.predicted[:, None])[:, 0] - logits[:, 1]).double()
    torch.testing.assert_close(confusion.difference.double(), expected, rtol=1e-4, atol=1e-5)
    assert ALDSplitter(face[0]).attribute(IMAGES, 1, stage=1, min_size=2).shape[0] == 8


def test_measures(face, table):
    features, _, logits = by_hand(face)
    curve = metrics.accuracy_curve(face[0], table, LOADER, [2]).set_index(["filters", "class_name"]).accuracy
    assert curve["dense", "all"] == (logits.argmax(1) == LABELS).double().mean()
    small = decompose(face[0], table, 2, backend="dense")
    assert curve["contribution", "all"] == (small(IMAGES).logits.argmax(1) == LABELS).double().mean()
    torch.testing.assert_close(
        HeadMoments.collect(face[0], LOADER).total, features.double().sum(0), rtol=1e-5, atol=1e-5
    )
    assert set(compare(face[0], LOADER, LOADER, ks=[2]).samples) == {8}
    assert visualize.filter_cards(face[0], table, "bee", LOADER, k=2).size


def test_maps(face):
    model, layer, _ = face
    for cam in (LayerGradCamPlusPlus, LayerSmoothGradCamPlusPlus):
        assert cam(model, layer).attribute(IMAGES, 1).dim() == 4
    summed = aggregate(LayerGradCamPlusPlus(model, layer), LOADER, attr_dim_summation=False)
    assert summed.class_names == NAMES
    captums = aggregate(LayerGradientXActivation(WithOutput(model), model.get_submodule(layer)), LOADER)
    assert captums.counts.tolist() == [2] * 4


@pytest.mark.parametrize("face", ["ResNet", "ConvNeXt"], indirect=True)
def test_captums_attributions_beside_the_methods(face):
    model, _, _ = face
    behind = HeadPass(model, LOADER).head.feature_map.module
    attributions = {"gradient x activation": LayerGradientXActivation(WithOutput(model), behind)}
    for network in (model, WithOutput(model)):
        frame = compare(network, LOADER, LOADER, ks=[2], attributions=attributions)
        assert "gradient x activation" in set(frame.method)


def test_training_and_attacks(face):
    model = face[0]
    trained = recover(model, LOADER, lr=1e-2)
    loss = [nn.functional.cross_entropy(net(IMAGES).logits, LABELS).item() for net in (model, trained)]
    assert loss[1] < loss[0]
    with torch.random.fork_rng():
        fitted = LabelSensitiveTraining(
            recover(model, LOADER), LabelSensitiveGate(4, 16), schedule=GateSchedule(start="noise")
        ).fit(LOADER, 1)
    assert len(fitted) == 1
    right = model(IMAGES).logits.argmax(1)
    changed = attacks.LocalSearch(model, rounds=1)(IMAGES[:1], right[:1])
    assert changed.shape == IMAGES[:1].shape


def test_paths():
    torch.manual_seed(0)
    model = resnet().eval()
    with pytest.raises(ClassFiltersError, match="pass example_input="):
        PathDecoupler(model)
    decoupler = PathDecoupler(model, example_input=IMAGES[:1])
    paths = decoupler.paths(LOADER)
    assert torch.equal(paths.labels, LABELS)
    assert bool(torch.isfinite(decoupler.train().loss(IMAGES, LABELS).total))


# -- forms of outputs --------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A small network, and what it makes of its logits."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8, 4)
        self.form = form

    def forward(self, images):
        return self.form(self.fc(self.conv2(self.conv1(images).relu()).relu().mean((2, 3))))


class Output:
    def __init__(self, logits):
        self.logits = logits


READ = {
    "tensor": lambda z: z,
    "object": Output,
    "mapping": lambda z: {"loss": z.sum(), "logits": z},
    "tuple": lambda z: (z, z.exp()),
    "list": lambda z: [z, None],
}
ODD = {
    "another key": (lambda z: {"scores": z, "logits_of_others": -z}, lambda out: out["scores"]),
    "the second": (lambda z: (None, z), lambda out: out[1]),
    "an object": (lambda z: type("Odd", (), {"scores": z})(), lambda out: out.scores),
    "another axis": (lambda z: z.T, lambda out: out.T),
    "with a temperature": (lambda z: {"logits": -z}, lambda out: -out["logits"]),
}
PAIRS = [(IMAGES[:5, :, :8, :8], LABELS[:5]), (IMAGES[5:, :, :8, :8], LABELS[5:])]
SMALL = IMAGES[:, :, :8, :8]

CALLS = {
    "InfluentialFeatures": lambda m: InfluentialFeatures(m).attribute(PAIRS).scores,
    "tensors": lambda m: InfluentialFeatures(m).attribute(SMALL, 1),
    "explain_confusion": lambda m: explain_confusion(m, SMALL, LABELS, (LABELS + 1) % 4).difference,
    "ALDSplitter": lambda m: ALDSplitter(m).attribute(SMALL, 1, stage=1, min_size=2),
    "Grad-CAM++": lambda m: LayerGradCamPlusPlus(m, layer(m, "conv2")).attribute(SMALL, 1),
    "SmoothGrad-CAM++": lambda m: LayerSmoothGradCamPlusPlus(m, layer(m, "conv2")).attribute(
        SMALL, 1, generator=torch.Generator().manual_seed(0)
    ),
    "PathDecoupler": lambda m: decoupled(m).paths(PAIRS).bits(),
    "loss": lambda m: decoupled(m).train().loss(SMALL, LABELS).total.detach(),
    "training": lambda m: torch.tensor(
        [
            row["loss"]
            for row in LabelSensitiveTraining(m, noise_gate(), schedule=GateSchedule(start="noise")).fit(PAIRS, 1)
        ]
    ),
    "recover": lambda m: next(recover(m, PAIRS).parameters()).detach(),
    "attack": lambda m: attacks.LocalSearch(m, rounds=2)(SMALL, LABELS),
    "compare": lambda m: torch.from_numpy(
        compare(m, PAIRS, PAIRS, ks=[2])[["keep", "drop_own", "agreement"]].to_numpy().copy()
    ),
    "accuracy": lambda m: torch.from_numpy(
        metrics.accuracy_curve(m, InfluentialFeatures(m).attribute(PAIRS), PAIRS, [2]).accuracy.to_numpy().copy()
    ),
    "decompose": lambda m: decompose(m, InfluentialFeatures(m).attribute(PAIRS), 2)(SMALL),
    "aggregate": lambda m: summed(LayerGradCamPlusPlus(m, layer(m, "conv2"))).scores,
}


def summed(attribution):
    return aggregate(attribution, PAIRS, attr_dim_summation=False)


def layer(model, name):
    return f"model.{name}" if isinstance(model, WithOutput) else name


def noise_gate():
    return LabelSensitiveGate(4, 8, generator=torch.Generator().manual_seed(0))


def decoupled(model):
    torch.manual_seed(0)
    return PathDecoupler(model, [layer(model, "conv1"), layer(model, "conv2")], example_input=SMALL[:1], num_classes=4)


def logits_in(value, form):
    """The logits of a small network's answer, where a call gives the network's own answer."""
    if isinstance(value, torch.Tensor):
        return value
    return (
        value[0] if isinstance(value, (tuple, list)) else value["logits"] if isinstance(value, dict) else value.logits
    )


@pytest.mark.parametrize("call", CALLS)
def test_every_call_reads_every_form(call):
    expected = CALLS[call](Returns(READ["tensor"]))
    for name, form in READ.items():
        result = logits_in(CALLS[call](Returns(form)), form)
        torch.testing.assert_close(result, expected, msg=lambda text, name=name: f"{name}: {text}")
    for name, (form, output) in ODD.items():
        result = CALLS[call](WithOutput(Returns(form), output=output))
        torch.testing.assert_close(result, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ODD)
def test_output_in_a_head_pass_keeps_the_layers_names(kind):
    form, output = ODD[kind]
    model, plain = Returns(form), Returns(READ["tensor"])
    table = InfluentialFeatures(model, output=output).attribute(PAIRS)
    expected = InfluentialFeatures(plain).attribute(PAIRS)
    assert table.layer == expected.layer == "fc"
    torch.testing.assert_close(table.scores, expected.scores)
    explained = InfluentialFeatures(model, output=output).explain(SMALL, 1, table, 2)
    torch.testing.assert_close(explained, InfluentialFeatures(plain).explain(SMALL, 1, expected, 2))
    head_pass = HeadPass(model, PAIRS, output=output)
    assert metrics.accuracy_curve(head_pass, table, ks=[2]).equals(metrics.accuracy_curve(plain, expected, PAIRS, [2]))
    one, other = compare(head_pass, test_loader=PAIRS, ks=[2]), compare(plain, PAIRS, PAIRS, ks=[2])
    assert one.drop(columns="passes").equals(other.drop(columns="passes"))


def test_what_is_not_read_says_so_and_the_remedy_works():
    model = Returns(ODD["an object"][0])
    with pytest.raises(HeadError, match=r"got Odd. .*WithOutput\(model, output="):
        recover(model, PAIRS)
    assert recover(WithOutput(model, output=lambda out: out.scores), PAIRS) is not None
    with pytest.raises(HeadError, match="output= must give the tensor of logits"):
        InfluentialFeatures(WithOutput(model, output=lambda out: out)).attribute(PAIRS)
    with pytest.raises(OptionError, match="output must be a function"):
        InfluentialFeatures(model, output="scores")
    with pytest.raises(OptionError, match=r"must be an nn\.Module"):
        WithOutput(lambda x: x)


# -- images in another form --------------------------------------------------------------------------------------------

WRONG = {
    "bytes": ((SMALL * 255).to(torch.uint8), r"got torch.uint8 .*images.float\(\) / 255", lambda x: x.float() / 255),
    "one image": (SMALL[0], r"a single image; pass images\[None\]", lambda x: x[None]),
    "one image, colours last": (
        SMALL[0].permute(1, 2, 0), r"a single image; pass images\.permute\(2, 0, 1\)\[None\]",
        lambda x: x.permute(2, 0, 1)[None]),
    "colours last": (SMALL.permute(0, 2, 3, 1), r"\(N, H, W, colours\); pass images\.permute\(0, 3, 1, 2\)",
                     lambda x: x.permute(0, 3, 1, 2)),
}  # fmt: skip
DOORS = {
    "attribute": lambda m, x: InfluentialFeatures(m).attribute(x, 1),
    "explain": lambda m, x: InfluentialFeatures(m).explain(x, 1, InfluentialFeatures(m).attribute(PAIRS), 2),
    "explain_confusion": lambda m, x: explain_confusion(m, x, 1, 2),
    "ALDSplitter": lambda m, x: ALDSplitter(m).attribute(x, 1, stage=1, min_size=2),
    "Grad-CAM++": lambda m, x: LayerGradCamPlusPlus(m, "conv2").attribute(x, 1),
    "PathDecoupler": lambda m, x: decoupled(m)(x),
    "paths": lambda m, x: decoupled(m).paths([x]),
    "loader": lambda m, x: HeadMoments.collect(m, [x]),
    "recover": lambda m, x: recover(m, [(x, torch.zeros(len(x), dtype=torch.long))]),
    "aggregate": lambda m, x: aggregate(
        LayerGradientXActivation(m, m.conv2), [(x, torch.zeros(len(x), dtype=torch.long))], classes=4
    ),
}


@pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.UnseenClassWarning")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", WRONG)
def test_images_in_another_form_are_refused_in_words(kind, door):
    images, message, remedy = WRONG[kind]
    model = Returns(READ["tensor"])
    with pytest.raises(ShapeError, match=message):
        DOORS[door](model, images)
    assert DOORS[door](model, remedy(images)) is not None


def test_what_a_model_takes_is_not_refused():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Returns(READ["tensor"])

        def forward(self, images):
            return self.inner(images.permute(0, 3, 1, 2).float() / 255)

    images = (SMALL * 255).to(torch.uint8).permute(0, 2, 3, 1)
    result = InfluentialFeatures(Scales()).attribute(images, 1)
    expected = InfluentialFeatures(Scales().inner).attribute(images.permute(0, 3, 1, 2).float() / 255, 1)
    torch.testing.assert_close(result, expected)
