"""Every map of this package in Captum's visualiser; those of zeros, which it refuses, in `visualize.branch_maps`."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, visualization
from gated_models import KINDS, TARGETS, table

from captum_classfilters import (
    ALDSplitter,
    InfluentialFeatures,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    explain_confusion,
    metrics,
    visualize,
)


def confusion(gated):
    return explain_confusion(gated.plain, gated.inputs, true=TARGETS, predicted=(TARGETS + 1) % 4)


MAPS = {
    "explain": lambda g: InfluentialFeatures(g.plain).explain(g.inputs, TARGETS, table(), 2),
    "explain, ones": lambda g: InfluentialFeatures(g.plain).explain(
        g.inputs, TARGETS, table(), 2, channel_weights="ones"
    ),
    "ALDSplitter": lambda g: ALDSplitter(g.plain).attribute(g.inputs, TARGETS, stage=1, min_size=2),
    "ALDSplitter, negative": lambda g: ALDSplitter(g.plain).attribute(
        g.inputs, 3, branch="negative", stage=1, min_size=2
    ),
    "Grad-CAM++": lambda g: LayerGradCamPlusPlus(g.model, g.conv).attribute(g.inputs, TARGETS),
    "Grad-CAM++ without a slope above 0": lambda g: LayerGradCamPlusPlus(g.model, g.conv).attribute(g.inputs, 1),
    "Grad-CAM++ against": lambda g: LayerGradCamPlusPlus(g.model, g.conv).attribute(
        g.inputs, 3, against=True, relu_attributions=True
    ),
    "Smooth Grad-CAM++": lambda g: LayerSmoothGradCamPlusPlus(g.model, g.conv).attribute(g.inputs, 2),
    "head's weights": lambda g: LayerSmoothGradCamPlusPlus(g.plain, "relu2").attribute(
        g.inputs, TARGETS, channel_weights="head"
    ),
    "won by": lambda g: confusion(g).won_by,
    "lost by": lambda g: confusion(g).lost_by,
    "receptive fields": lambda g: metrics.receptive_fields(
        g.plain.maps(g.inputs).detach(), torch.full((6,), 0.2), (8, 8)
    )[:, 2:3].float(),
}
# these are all of one kind by nature
ONE_SIDED = {"Grad-CAM++ without a slope above 0": 0, "Grad-CAM++ against": 1, "won by": 1, "lost by": -1,
             "explain, ones": 1, "ALDSplitter": 1, "ALDSplitter, negative": -1, "receptive fields": 1}  # fmt: skip
# of the negative side Captum draws sizes
SIGNS = {"all": lambda m: m, "positive": lambda m: m.clip(0), "negative": lambda m: (-m).clip(0),
         "absolute_value": np.abs}  # fmt: skip
SIDES = ("whole", "above 0", "below 0", "zeros")


def side_of(heat, side):
    return {"whole": heat, "above 0": heat.clip(0), "below 0": heat.clip(None, 0), "zeros": 0 * heat}[side]


def at_the_door(heat, image):
    """Brought to the image's size, ``(H, W, 1)``; the brightest of six images' maps."""
    heat = LayerAttribution.interpolate(heat, (8, 8), "bilinear").detach().cpu()
    best = int(heat.abs().amax((1, 2, 3)).argmax())
    return heat[best].permute(1, 2, 0).numpy(), image[best].sigmoid().cpu().permute(1, 2, 0).numpy()


@pytest.mark.filterwarnings("ignore:Attempting to normalize by value approximately 0")  # of faint maps: Captum's word
@pytest.mark.parametrize("name", MAPS)
def test_captum_draws_every_map_of_either_sign(real_device, name):
    gated = KINDS["decoupler"]().to(real_device)
    found = MAPS[name](gated)
    assert found.shape[:2] == (6, 1)
    assert found.device.type == real_device
    heat, image = at_the_door(found, gated.inputs)
    if name in ONE_SIDED:
        assert set(np.sign(heat).astype(int).flat) <= {0, ONE_SIDED[name]}
    assert name == "Grad-CAM++ without a slope above 0" or np.abs(heat).max() > 1e-4
    for side in SIDES:
        one = side_of(heat, side)
        for sign, signed in SIGNS.items():
            expected = signed(one)
            if not expected.any():
                # nothing to bring to a scale: so it is with every attribution, and with every one-sided one
                with pytest.raises(AssertionError, match="Cannot normalize by scale factor = 0"):
                    visualization.visualize_image_attr(one, image, "heat_map", sign, use_pyplot=False)
                continue
            _, ax = visualization.visualize_image_attr(
                one, image, "heat_map", sign, use_pyplot=False, outlier_perc=1e-6
            )
            drawn = np.asarray(ax.images[0].get_array())
            np.testing.assert_allclose(drawn, expected[..., 0] / np.abs(expected).max(), rtol=1e-4, atol=1e-6)


KINDS_OF_PICTURE = ["original_image", "heat_map", "blended_heat_map", "masked_image", "alpha_scaling"]


@pytest.mark.parametrize("name", [name for name in MAPS if ONE_SIDED.get(name) != 0])
def test_captum_draws_them_in_every_way_at_once(name):
    gated = KINDS["decoupler"]()
    heat, image = at_the_door(MAPS[name](gated), gated.inputs)
    sign = "positive" if heat.max() > 0 else "negative"
    figure, axes = visualization.visualize_image_attr_multiple(
        heat, image, KINDS_OF_PICTURE, ["all", "all", sign, "absolute_value", sign], use_pyplot=False,
        outlier_perc=1e-6,
    )  # fmt: skip
    assert len(axes) == 5
    np.testing.assert_allclose(axes[1].images[0].get_array(), heat[..., 0] / np.abs(heat).max(), rtol=1e-4, atol=1e-6)
    figure.canvas.draw()


@pytest.mark.parametrize("name", MAPS)
def test_the_package_draws_those_of_zeros_and_of_one_side_too(name):
    gated = KINDS["decoupler"]()
    heat, images = MAPS[name](gated).detach(), gated.inputs.sigmoid()
    sides = {"whole": heat, "above 0": heat.clamp(min=0), "below 0": heat.clamp(max=0), "zeros": heat * 0}
    ax = visualize.branch_maps(images, sides)
    tiles = np.asarray(ax.images[1].get_array()).reshape(6, 8, 5, 8)
    plt.close("all")
    large = torch.stack([LayerAttribution.interpolate(each, (8, 8), "bilinear")[:, 0] for each in sides.values()], 2)
    largest = large.abs().amax((1, 2, 3)).clamp(min=1e-30)[:, None, None, None]
    np.testing.assert_allclose(tiles[:, :, 1:], large / largest, rtol=1e-3, atol=1e-4)
