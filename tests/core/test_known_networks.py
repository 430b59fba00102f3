"""Heads and maps of known architectures: 12 of torchvision, 8 families of timm, and with -m slow the whole zoos."""

import pytest
import timm
import torch
import torchvision
from reading import assert_linear, built, random_images, read, tm, tv

from captum_classfilters import InfluentialFeatures, LayerGradCamPlusPlus, decompose
from captum_classfilters.core.errors import HeadError

TABLE = {
    # network: how it is made, image size, head, K, the map's name, layout and exactness
    "resnet18": (tv("resnet18"), 64, "fc", 512, ("layer4", "NCHW", True)),
    "densenet121": (tv("densenet121"), 64, "classifier", 1024, ("features", "NCHW", True)),
    "mobilenet_v2": (tv("mobilenet_v2"), 64, "classifier.1", 1280, ("features", "NCHW", True)),
    "mobilenet_v3_small": (tv("mobilenet_v3_small"), 64, "classifier.3", 1024, None),
    "efficientnet_b0": (tv("efficientnet_b0"), 64, "classifier.1", 1280, ("features", "NCHW", True)),
    "convnext_tiny": (tv("convnext_tiny"), 64, "classifier.2", 768, ("features", "NCHW", True)),
    "swin_t": (tv("swin_t"), 64, "head", 768, ("permute", "NCHW", True)),
    "vit_b_16, two layers of it": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 12, 768, 3072, num_classes=10),
        32,
        "heads.head",
        768,
        ("encoder", "NLC", False),
    ),
    "vgg11": (tv("vgg11", init_weights=False), 32, "classifier.6", 4096, None),
    "googlenet": (
        tv("googlenet", init_weights=False, aux_logits=False),
        64,
        "fc",
        1024,
        ("inception5b", "NCHW", True),
    ),
    "shufflenet_v2_x0_5": (tv("shufflenet_v2_x0_5"), 64, "fc", 1024, ("conv5", "NCHW", True)),
    "regnet_y_400mf": (tv("regnet_y_400mf"), 64, "fc", 440, ("trunk_output", "NCHW", True)),
    "timm resnet10t": (tm("resnet10t"), 64, "fc", 512, ("layer4", "NCHW", True)),
    "timm resnetv2_50x1_bit, a 1x1 convolution": (
        tm("resnetv2_50x1_bit"),
        64,
        "head.fc",
        2048,
        ("norm", "NCHW", True),
    ),
    "timm dla46_c, a 1x1 convolution": (tm("dla46_c"), 64, "fc", 256, ("level5", "NCHW", True)),
    "timm convnext_atto": (tm("convnext_atto"), 64, "head.fc", 320, ("norm_pre", "NCHW", True)),
    "timm vit_tiny of averaged tokens": (
        tm("vit_tiny_patch16_224", img_size=64, class_token=False, global_pool="avg", fc_norm=False),
        64,
        "head",
        192,
        ("norm", "NLC", True),
    ),
    "timm swin_tiny": (
        tm("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
        64,
        "head.fc",
        768,
        ("norm", "NHWC", True),
    ),
    "timm efficientnet_lite0": (tm("efficientnet_lite0"), 64, "classifier", 1280, ("bn2", "NCHW", True)),
    "timm densenet121": (tm("densenet121"), 64, "classifier", 1024, ("features", "NCHW", True)),
    "timm mixer_s32": (tm("mixer_s32_224", img_size=64), 64, "head", 512, ("norm", "NLC", True)),
}


@pytest.mark.parametrize("network", TABLE)
def test_head_and_map_of_known_networks(network):
    make, size, name, features, expected_map = TABLE[network]
    model, images = built(make, size)
    with torch.no_grad():
        logits = model(images)
    batch = read(model, images, need_maps=expected_map is not None)
    head = batch.head
    assert (head.name, head.num_features, head.num_classes) == (name, features, 10)
    assert_linear(batch, logits)
    torch.testing.assert_close(batch.logits, logits)
    if expected_map is None:
        assert head.feature_map is None
        return
    found = head.feature_map
    assert (found.name, found.layout.name, found.exact) == expected_map
    assert found.module is model.get_submodule(found.name)
    assert batch.maps.shape[:2] == (2, features)
    assert batch.maps[0, 0].numel() > 1
    gap = (batch.maps.mean((2, 3)) - batch.features).abs().max() / batch.features.abs().max()
    assert (gap < 1e-4) == found.exact


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_squeezenet_is_refused(name):
    model, images = built(tv(name), 64)
    with pytest.raises(HeadError, match=r"an activation stands between classifier\.1 and the model's output"):
        read(model, images)
    # nor does layer= help: a ReLU stands between the convolution and the average
    with pytest.raises(HeadError, match=r"an activation stands between classifier\.1 and the model's output"):
        read(model, images, layer="classifier.1")


# -- the whole zoos ----------------------------------------------------------------------------------------------------


def zoo_model(name):
    """What torchvision calls ``name``, without the slow initialisation of weights and without auxiliary heads."""
    if name in ("googlenet", "inception_v3"):
        return tv(name, init_weights=False, aux_logits=False)
    return tv(name)


def everything(model, images, logits):
    """The head, a table, maps, a smaller head and a class activation map, each against a few lines."""
    batch = read(model, images, need_maps=None)
    assert_linear(batch, logits)
    behind, weight = batch.head.feature_map, batch.head.weight
    table = InfluentialFeatures(model).attribute([(images, torch.arange(2))], selector="contribution")
    scores = (weight[:2] * batch.features).double()
    torch.testing.assert_close(table.scores[:2], scores, rtol=1e-3, atol=1e-4 * float(scores.abs().max()))
    same = decompose(model, table, table.num_channels, unseen="dense")
    with torch.no_grad():
        again = same(images)
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-3 * float(logits.abs().max()))
    if behind is None:
        with pytest.raises(HeadError, match=f"no feature map of {batch.head.num_features} channels behind the head"):
            InfluentialFeatures(model).explain(images, 1, table, 5)
        assert batch.head.no_map
        return
    heat = InfluentialFeatures(model).explain(images, 1, table, 5)
    assert heat.shape == (2, 1, *batch.maps.shape[2:])
    by_hand = (batch.maps * (weight[1] * table.mask(5)[1])[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(heat, by_hand, rtol=1e-3, atol=1e-4 * float(by_hand.abs().max()))
    if behind.pooling == "mean":
        part = (batch.features * weight[1] * table.mask(5)[1]).sum(1)
        torch.testing.assert_close(heat.mean((1, 2, 3)), part, rtol=1e-2, atol=1e-3 * float(part.abs().max()))
    cam = LayerGradCamPlusPlus(model, behind.name).attribute(images, 1, channel_weights="ones")
    assert cam.shape == heat.shape
    if behind.pooling == "mean" and behind.norm is None and not behind.relu:
        torch.testing.assert_close(cam, batch.maps.sum(1, keepdim=True), rtol=1e-3, atol=1e-3 * float(cam.abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_classifier_of_torchvision(name):
    model, images = built(zoo_model(name), 224)
    if name.startswith("squeezenet"):
        with pytest.raises(HeadError, match="an activation stands between"):
            read(model, images)
        return
    with torch.no_grad():
        logits = model(images)
    everything(model, images, logits)


TIMM = (
    "resnetv2_50x1_bit dla34 dpn48b convnextv2_atto vit_tiny_patch16_224 swinv2_tiny_window8_256 efficientnet_lite0 "
    "regnetx_002 mobilenetv3_small_050 mobilenetv4_conv_small ghostnet_100 hrnet_w18_small vgg11 xception41 test_nfnet "
    "cspresnet50 legacy_seresnet18 pit_ti_224 deit_tiny_patch16_224 poolformer_s12 mobilevit_xxs edgenext_xx_small "
    "efficientvit_b0 fastvit_t8 gmlp_s16_224 resmlp_12_224 rexnet_100 inception_next_atto mambaout_femto starnet_s1 "
    "hgnetv2_b0 inception_v3 coatnet_nano_rw_224 focalnet_tiny_srf davit_tiny pvt_v2_b0 mvitv2_tiny twins_pcpvt_small "
    "hiera_tiny_224 levit_128s efficientformer_l1 efficientformerv2_s0 repvit_m0_9"
)
# Averaged heads of two tokens, or of two branches; VOLO adds to the class token's logits the largest of the patches'
TIMM_REFUSED = "deit_tiny_distilled_patch16_224 crossvit_tiny_240 volo_d1_224"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM.split())
def test_families_of_timm(name):
    model, images = built(tm(name), timm.get_pretrained_cfg(name).input_size[-1])
    with torch.no_grad():
        logits = model(images)
    everything(model, images, logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_REFUSED.split())
def test_families_of_timm_without_a_linear_head(name):
    model, images = tm(name)().eval(), random_images(2, timm.get_pretrained_cfg(name).input_size[-1])
    with pytest.raises(HeadError, match=r"is not the output of an nn\.Linear.*head.*layer="):
        read(model, images)
