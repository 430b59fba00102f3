"""Transformers and channels last: every public call, each against a few lines that say the layout themselves."""

from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pytest
import timm
import torch
import torchvision
from captum.attr import LayerActivation
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from captum_classfilters import (
    ALDSplitter,
    HeadPass,
    InfluentialFeatures,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    aggregate,
    compare,
    decompose,
    explain_confusion,
    metrics,
)
from captum_classfilters.core.errors import HeadError, LayerError, NoPositionsWarning, ShapeError, ZeroMapWarning
from captum_classfilters.visualize import filter_cards

transformers = pytest.importorskip("transformers")
VIT = {"img_size": (16, 32), "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
HF = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}
SQUARE = {"image_size": 32, "patch_size": 8}


def tm(name, **options):
    return timm.create_model(name, num_classes=3, **options)


def channels_last(t):
    return t.permute(0, 3, 1, 2)


def tokens(height, width, others=0):
    return lambda t: t[:, others:].transpose(1, 2).unflatten(2, (height, width))


def as_it_is(t):
    return t


class Kind(NamedTuple):
    make: Any
    size: tuple[int, int]
    head: str
    behind: str  # the map behind the head
    maps: Any  # its output as (N, K, h, w), by hand
    reading: str  # "mean", "norm of the mean", "token"
    layer: str  # for Grad-CAM++
    layer_maps: Any


KINDS = {
    "timm ViT": Kind(
        lambda: tm("vit_tiny_patch16_224", **VIT), (16, 32), "head", "norm", tokens(2, 4, 1), "token",
        "blocks.1.norm1", tokens(2, 4, 1),
    ),
    "timm ViT with registers": Kind(
        lambda: tm("vit_tiny_patch16_224", **VIT, reg_tokens=3), (16, 32), "head", "norm", tokens(2, 4, 4), "token",
        "blocks.0", tokens(2, 4, 4),
    ),
    "timm ViT, averaged": Kind(
        lambda: tm("vit_tiny_patch16_224", **VIT, global_pool="avg"), (16, 32), "head", "norm", tokens(2, 4, 1),
        "norm of the mean", "blocks.1", tokens(2, 4, 1),
    ),
    "timm DeiT": Kind(
        lambda: tm("deit_tiny_patch16_224", **VIT), (16, 32), "head", "norm", tokens(2, 4, 1), "token",
        "blocks.1.norm1", tokens(2, 4, 1),
    ),
    "timm Swin": Kind(
        lambda: tm("swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=6, depths=(1, 1),
                   num_heads=(2, 2)),
        (32, 32), "head.fc", "norm", channels_last, "mean", "layers.1", channels_last,
    ),
    "timm ConvNeXt": Kind(
        lambda: tm("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 6, 8, 12)), (64, 96), "head.fc", "norm_pre", as_it_is,
        "norm of the mean", "stages.3", as_it_is,
    ),
    "torchvision ViT": Kind(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 12, 16, num_classes=3), (32, 32), "heads.head",
        "encoder", tokens(4, 4, 1), "token", "encoder.layers.encoder_layer_1.ln_1", tokens(4, 4, 1),
    ),
    "torchvision Swin": Kind(
        lambda: torchvision.models.SwinTransformer([4, 4], 6, [1, 1], [2, 2], [2, 2], num_classes=3), (32, 48), "head",
        "permute", as_it_is, "mean", "features", channels_last,
    ),
    "torchvision ConvNeXt": Kind(
        lambda: ConvNeXt([CNBlockConfig(6, 12, 1), CNBlockConfig(12, None, 1)], num_classes=3), (32, 48),
        "classifier.2", "features", as_it_is, "norm of the mean", "features.3", as_it_is,
    ),
    "Hugging Face ViT": Kind(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF, **SQUARE)), (32, 32), "classifier",
        "vit.layernorm", tokens(4, 4, 1), "token", "vit.embeddings", tokens(4, 4, 1),
    ),
    "Hugging Face Swin": Kind(
        lambda: transformers.SwinForImageClassification(transformers.SwinConfig(
            embed_dim=6, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4, num_labels=3)),
        (32, 32), "classifier", "swin.layernorm", tokens(4, 4), "mean", "swin.layernorm", tokens(4, 4),
    ),
    "Hugging Face ConvNeXt": Kind(
        lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(
            hidden_sizes=[4, 6, 8, 12], depths=[1] * 4, num_labels=3)),
        (64, 96), "classifier", "convnext.encoder.stages.3", as_it_is, "norm of the mean", "convnext.encoder.stages.3",
        as_it_is,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """The kind, its network with random weights, images and labels, and what module outputs are by hand."""
    kind = KINDS[request.param]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = kind.make().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    x = torch.rand(6, 3, *kind.size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    outputs = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: outputs.update({name: (args, out)})
        )
        for name in (kind.head, kind.behind, kind.layer)
    ]
    with torch.no_grad():
        logits = model(x)
    for hook in hooks:
        hook.remove()
    return kind, model, x, torch.arange(6) % 3, outputs, getattr(logits, "logits", logits)


def test_the_map_behind_the_head_is_found_and_its_layout_proved(case):
    kind, model, x, y, outputs, logits = case
    with HeadPass(model, [(x, y)]).batches(need_maps=True) as stream:
        batch = next(stream)
    assert (batch.head.name, batch.head.feature_map.name) == (kind.head, kind.behind)
    torch.testing.assert_close(batch.features, outputs[kind.head][0][0])
    torch.testing.assert_close(batch.logits, logits)
    by_hand = kind.maps(outputs[kind.behind][1])
    assert batch.maps.shape == by_hand.shape
    if kind.reading == "norm of the mean":
        # the LayerNorm behind the average, at each position with the average's deviation
        torch.testing.assert_close(batch.maps.mean((2, 3)), batch.features, rtol=1e-4, atol=1e-5)
        again = (by_hand - by_hand.mean(1, keepdim=True)) / by_hand.mean((2, 3)).std(1, correction=0)[
            :, None, None, None
        ]
        torch.testing.assert_close(batch.maps, again, rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(batch.maps, by_hand)
        if kind.reading == "mean":
            torch.testing.assert_close(batch.maps.mean((2, 3)), batch.features)
    assert batch.head.feature_map.exact == (kind.reading != "token")


def test_tables_maps_confusion_and_smaller_heads(case):
    kind, model, x, y, outputs, logits = case
    weight = model.get_submodule(kind.head).weight.detach()
    with HeadPass(model, [(x, y)]).batches(need_maps=True) as stream:
        maps = next(stream).maps
    features = outputs[kind.head][0][0]
    table = InfluentialFeatures(model).attribute([(x[:4], y[:4]), (x[4:], y[4:])], selector="contribution")
    assert table.layer == kind.head
    scores = torch.stack([(features * weight[y])[y == c].double().sum(0) for c in range(3)])
    torch.testing.assert_close(table.scores, scores, rtol=1e-4, atol=1e-5)
    chosen = table.mask(3)[1] * weight[1]
    by_hand = (maps * chosen[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(InfluentialFeatures(model).explain(x, 1, table, 3), by_hand, rtol=1e-4, atol=1e-5)
    positive = weight[2] > 0
    split = (maps * (weight[2] * positive)[:, None, None]).sum(1, keepdim=True)
    found = ALDSplitter(model).attribute(x, 2, stage=1, min_size=2)
    torch.testing.assert_close(found, split, rtol=1e-4, atol=1e-5)
    confusion = explain_confusion(model, x, 0, 1)
    both = (confusion.won_by + confusion.lost_by)[:, 0]
    difference = (weight[1] - weight[0])[:, None, None] / maps[0, 0].numel()
    torch.testing.assert_close(both, (maps * difference).sum(1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(confusion.difference.float(), logits[:, 1] - logits[:, 0], rtol=1e-3, atol=1e-4)
    assert confusion.adds_up == (kind.reading != "token")
    if confusion.adds_up:
        torch.testing.assert_close(both.sum((1, 2)), confusion.difference.float(), rtol=1e-3, atol=1e-4)
    small = decompose(model, table, table.num_channels)
    again = small(x)
    torch.testing.assert_close(getattr(again, "logits", again), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", [LayerGradCamPlusPlus, LayerSmoothGradCamPlusPlus])
def test_class_activation_maps_need_no_reshape(case, cls):
    kind, model, x, _, outputs, _ = case
    found = cls(model, kind.layer).attribute(x, 1)
    assert found.shape == (6, 1, *kind.layer_maps(outputs[kind.layer][1]).shape[2:])
    assert torch.equal(found, cls(model, kind.layer, reshape=kind.layer_maps).attribute(x, 1))
    ones = cls(model, kind.layer).attribute(x, 1, channel_weights="ones")
    torch.testing.assert_close(ones, kind.layer_maps(outputs[kind.layer][1]).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    # the same through a function, of which only the layer is known
    if "tokens" not in kind.layer_maps.__qualname__:
        of_function = cls(lambda images: model(images), model.get_submodule(kind.layer)).attribute(x, 1)
        assert torch.equal(of_function, found)


def test_attributions_of_others_are_summed_over_positions(case):
    kind, model, x, y, outputs, _ = case
    found = aggregate(LayerActivation(model, model.get_submodule(kind.layer)), [(x, y)], classes=3)
    output = outputs[kind.layer][1]
    values = output.sum((2, 3)) if kind.layer_maps is as_it_is else output.flatten(1, -2).sum(1)
    scores = torch.stack([values[y == c].double().sum(0) for c in range(3)])
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-4)


def test_thresholds_and_cards(case):
    kind, model, x, y, outputs, _ = case
    found = metrics.activation_thresholds(model, [(x, y)], [kind.layer], quantile=0.25)[kind.layer]
    maps = kind.layer_maps(outputs[kind.layer][1]).relu().transpose(0, 1).flatten(1)
    above = int(0.25 * maps.shape[1] + 1e-9)
    assert torch.equal(found, maps.sort(1, descending=True).values[:, above])
    table = InfluentialFeatures(model).attribute([(x, y)])
    axes = filter_cards(model, table, 0, [(x, y)], k=2, images=2)
    best = outputs[kind.head][0][0][:, table.top(2)[0]].topk(2, dim=0).values.T
    for line, values in zip(axes, best, strict=True):
        assert [ax.get_title().split()[-1] for ax in line] == [f"{float(v):#.3g}" for v in values]
    plt.close("all")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_layout_that_nothing_tells_is_refused_and_the_remedy_works(images):
    vit = tm("vit_tiny_patch16_224", **VIT).eval()
    vit.patch_embed = nn.Sequential(nn.Unfold(8, stride=8), Transposed(), nn.Linear(192, 12))
    x = images(2, size=16)
    odd = torch.cat([x, x], 3)
    # without a convolution the image's size says it
    assert LayerGradCamPlusPlus(vit, "blocks.0").attribute(odd, 1).shape == (2, 1, 2, 4)
    lost = LayerGradCamPlusPlus(vit, "blocks.0.attn.q_norm")
    with pytest.raises(ShapeError, match=r"blocks.0.attn.q_norm gives .*pass reshape="):
        lost.attribute(odd, 1)
    config = transformers.SwinConfig(
        embed_dim=6, depths=[1], num_heads=[2], window_size=2, image_size=32, patch_size=4, num_labels=3
    )
    encoder = transformers.SwinForImageClassification(config).eval()
    with pytest.raises(
        LayerError, match="the layer must give tensors, got SwinEncoderOutput; choose one of the layers"
    ):
        LayerGradCamPlusPlus(encoder, "swin.encoder").attribute(images(2, size=32), 1)


class Patches(nn.Module):
    """A transformer whose tokens are put together in another way than is usual."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.patch = kind, nn.Conv2d(3, 8, 8, 8)
        self.first = nn.Parameter(torch.linspace(-1, 1, 8).view(1, 1, 8))
        self.mix, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        maps = self.patch(x)
        tokens = (maps.transpose(2, 3) if self.kind == "columns" else maps).flatten(2).transpose(1, 2)
        if self.kind == "class token last":
            tokens = torch.cat([tokens, self.first.expand(len(x), -1, -1)], 1)
        mixed = self.mix(tokens)
        tokens = self.norm(mixed + mixed.mean(1, keepdim=True))
        return self.head(tokens[:, -1] if self.kind == "class token last" else tokens.mean(1))


def test_a_class_token_behind_the_others_is_found_by_its_values(images):
    model, x = Patches("class token last").eval(), torch.cat([images(4, size=16)] * 2, 3)
    table = InfluentialFeatures(model).attribute([(x, torch.arange(4) % 3)])
    with torch.no_grad():
        mixed = model.mix(torch.cat([model.patch(x).flatten(2).transpose(1, 2), model.first.expand(4, -1, -1)], 1))
        maps = model.norm(mixed + mixed.mean(1, keepdim=True))[:, :-1].transpose(1, 2).unflatten(2, (2, 4))
    weights = (model.head.weight[1].detach() * table.mask(2)[1])[:, None, None]
    by_hand = (maps * weights).sum(1, keepdim=True)
    torch.testing.assert_close(InfluentialFeatures(model).explain(x, 1, table, 2), by_hand)
    ones = LayerGradCamPlusPlus(model, "norm").attribute(x, 1, channel_weights="ones")
    torch.testing.assert_close(ones, maps.sum(1, keepdim=True))


def test_tokens_in_another_order_and_windows_are_refused(images):
    model, x = Patches("columns").eval(), torch.cat([images(4, size=16)] * 2, 3)
    table = InfluentialFeatures(model).attribute([(x, torch.arange(4) % 3)])
    with pytest.raises(HeadError, match=r"the tokens of norm, \(8, 8\), lie in no grid that is known"):
        InfluentialFeatures(model).explain(x, 1, table, 2)
    with pytest.raises(ShapeError, match=r"layer norm gives \(4, 8, 8\), tokens that lie in no grid .* pass reshape="):
        LayerGradCamPlusPlus(model, "norm").attribute(x, 1)
    kind = KINDS["timm Swin"]
    with pytest.raises(LayerError, match="attn gives 32 rows for 2 samples, as layers do that run on windows"):
        LayerGradCamPlusPlus(kind.make().eval(), "layers.0.blocks.0.attn").attribute(images(2, size=32), 1)


class Transposed(nn.Module):
    def forward(self, t):
        return t.transpose(1, 2)


def test_the_last_norm_before_a_class_token_has_no_gradient_at_positions(images):
    model = tm("vit_tiny_patch16_224", **VIT).eval()
    x = torch.cat([images(2, size=16)] * 2, 3)
    with pytest.warns(ZeroMapWarning, match="Where the head reads a class token alone, choose a layer before"):
        found = LayerGradCamPlusPlus(model, "norm").attribute(x, 1)
    assert not found.any()


def test_a_head_that_reads_no_positions_says_which_layer_stands_between(images):
    model = tm("vit_tiny_patch16_224", **VIT, global_pool="map", class_token=False).eval()
    x, y = torch.cat([images(4, size=16)] * 2, 3), torch.arange(4) % 3
    table = InfluentialFeatures(model).attribute([(x, y)])
    with pytest.raises(HeadError, match="layer attn_pool stands between the head and the last map, and mixes channels"):
        InfluentialFeatures(model).explain(x, 1, table, 3)


def test_one_position_is_a_warning_that_names_the_last_layer_with_positions(images):
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    x, y = images(4, size=32), torch.arange(4) % 3
    table = InfluentialFeatures(model).attribute([(x, y)])
    told = r"no position is left at this layer: .* layer3 \(2 x 2\)"
    for call in (
        lambda: InfluentialFeatures(model).explain(x, 1, table, 3),
        lambda: ALDSplitter(model).attribute(x, 1),
        lambda: explain_confusion(model, x[:1], 0, 1),
        lambda: filter_cards(model, table, 0, [(x, y)], k=1, images=1),
    ):
        with pytest.warns(NoPositionsWarning, match=told):
            call()
    with pytest.warns(NoPositionsWarning, match="layer layer4 gives .*the last one with positions is layer3"):
        assert LayerGradCamPlusPlus(model, "layer4").attribute(x, 1).shape == (4, 1, 1, 1)
    plt.close("all")


def test_a_comparison_takes_an_attribution_of_channels_last(images):
    kind = KINDS["timm Swin"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.make().eval()
    x, y = images(9, size=32), torch.arange(9) % 3
    result = compare(model, [(x, y)], [(x, y)], ks=[2], attributions={"activation": LayerActivation(model, model.norm)})
    assert "activation" in set(result["method"])
