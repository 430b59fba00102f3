"""Signals and volumes: every public call on 1-D and 3-D networks, each against a few lines that know the network."""

import copy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import LayerActivation
from shared import seeded
from torch import nn

from captum_classfilters import (
    ALDSplitter,
    HeadMoments,
    HeadPass,
    InfluentialFeatures,
    LabelSensitiveGate,
    LabelSensitiveTraining,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    aggregate,
    compare,
    decompose,
    explain_confusion,
    metrics,
    recover,
)
from captum_classfilters.core.errors import HeadError, LayerError
from captum_classfilters.visualize import filter_cards

SIZES = {1: (24,), 2: (6, 8), 3: (5, 6, 7)}


class Network(nn.Module):
    """A convolution, ReLU, and a head behind the average, or a 1x1 convolution before it."""

    def __init__(self, axes, head):
        super().__init__()
        conv = getattr(nn, f"Conv{axes}d")
        self.conv, self.relu, self.axes = conv(2, 6, 3), nn.ReLU(), axes
        self.head = nn.Linear(6, 3) if head == "linear" else conv(6, 3, 1)

    def forward(self, x):
        maps = self.relu(self.conv(x))
        if isinstance(self.head, nn.Linear):
            return self.head(maps.flatten(2).mean(2))
        return self.head(maps).flatten(2).mean(2)


@pytest.fixture(params=[(1, "linear"), (1, "convolution"), (3, "linear"), (3, "convolution")], ids=str)
def case(request):
    """Network, inputs, labels, the map behind the head, the head's weight ``(C, K)``."""
    axes, head = request.param
    model = seeded(Network(axes, head), 0).eval()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(9, 2, *SIZES[axes], generator=generator), torch.arange(9) % 3
    with torch.no_grad():
        maps = model.relu(model.conv(x))
    return model, x, y, maps, model.head.weight.detach().flatten(1)


def weighed(maps, weights):
    """The maps of all channels times a weight for each sample and channel, summed over channels, by a loop."""
    return torch.stack([
        sum(weight * channel for weight, channel in zip(row, sample, strict=True))[None]
        for row, sample in zip(weights, maps, strict=True)
    ])  # fmt: skip


def test_the_head_and_its_map(case):
    model, x, y, maps, weight = case
    with HeadPass(model, [(x, y)]).batches(need_maps=True) as stream:
        batch = next(stream)
    assert (batch.head.name, batch.head.feature_map.name, batch.head.feature_map.exact) == ("head", "relu", True)
    assert torch.equal(batch.maps, maps)
    torch.testing.assert_close(batch.features, maps.flatten(2).mean(2))
    torch.testing.assert_close(batch.features @ weight.T + batch.head.bias, model(x).detach())


def test_tables_explanations_and_confusion(case):
    model, x, y, maps, weight = case
    features = maps.flatten(2).mean(2)
    table = InfluentialFeatures(model).attribute([(x, y)], selector="contribution")
    scores = torch.stack([(features * weight[y])[y == c].double().sum(0) for c in range(3)])
    torch.testing.assert_close(table.scores, scores, rtol=1e-4, atol=1e-6)
    chosen = (weight[1] * table.mask(2)[1]).expand(9, 6)
    torch.testing.assert_close(InfluentialFeatures(model).explain(x, 1, table, 2), weighed(maps, chosen))
    found = explain_confusion(model, x, 0, 1)
    difference = (weight[1] - weight[0]).expand(9, 6)
    per_position = weighed(maps, difference) / maps[0, 0].numel()
    torch.testing.assert_close(found.won_by + found.lost_by, per_position)
    assert found.adds_up
    positive = (weight[2] * (weight[2] > 0)).expand(9, 6)
    ald = ALDSplitter(model).attribute(x, 2, stage=1, min_size=2)
    torch.testing.assert_close(ald, weighed(maps, positive))
    of_layer = aggregate(LayerActivation(model, model.relu), [(x, y)], classes=3)
    sums = torch.stack([maps.flatten(2).sum(2)[y == c].double().sum(0) for c in range(3)])
    torch.testing.assert_close(of_layer.scores, sums, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [LayerGradCamPlusPlus, LayerSmoothGradCamPlusPlus])
def test_class_activation_maps(case, cls):
    model, x, y, maps, weight = case
    found = cls(model, "relu").attribute(x, y)
    # the gradient is the same at all positions, w / P: alpha is D2 / (2 D2 + sum(A) D3), of Grad-CAM++'s equation 19
    gradient = (weight[y] / maps[0, 0].numel()).double()
    alpha = gradient**2 / (2 * gradient**2 + (maps.double().flatten(2).sum(2) * gradient**3).relu())
    weights = (alpha * gradient.relu() * maps[0, 0].numel()).float()
    torch.testing.assert_close(found, weighed(maps, weights), rtol=1e-3, atol=1e-6)
    head = cls(model, "relu").attribute(x, y, channel_weights="head")
    torch.testing.assert_close(head, weighed(maps, weight[y]))


@pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.IdleChannelWarning")
def test_smaller_heads_gates_and_a_comparison(case):
    model, x, y, maps, weight = case
    table = InfluentialFeatures(model).attribute([(x, y)])
    moments = HeadMoments.collect(model, [(x, y)])
    features = maps.flatten(2).mean(2).double()
    torch.testing.assert_close(moments.mean, features.mean(0))
    small = decompose(model, table, 2)
    kept = weight * table.mask(2)
    expected = features.float() @ kept.T + model.head.bias.detach()
    torch.testing.assert_close(small(x).detach(), expected, rtol=1e-4, atol=1e-5)
    dense = decompose(model, table, 2, backend="dense")
    torch.testing.assert_close(dense(x).detach(), expected, rtol=1e-4, atol=1e-5)
    trained = recover(dense, [(x, y)], 1, lr=0.01)
    zero = [(a == 0).sum().item() for a in (parameter for parameter in trained.parameters() if parameter.dim() > 1)]
    assert zero == [(p == 0).sum().item() for p in dense.parameters() if p.dim() > 1]
    twin = copy.deepcopy(model)
    gate = LabelSensitiveGate(3, 6, generator=torch.Generator().manual_seed(0))
    history = LabelSensitiveTraining(twin, gate).fit([(x, y)], 3)
    assert len(history) == 3
    assert gate.layer == "head"
    frame = compare(model, [(x, y)], [(x, y)], ks=[2])
    assert set(frame["k"].dropna()) == {2}


def test_cards_of_curves_and_middle_slices(case):
    model, x, y, maps, _ = case
    table = InfluentialFeatures(model).attribute([(x, y)])
    axes = filter_cards(model, table, 1, [(x, y)], k=2, images=3)
    channel = int(table.top(1)[1, 0])
    best = maps.flatten(2).mean(2)[:, channel].argsort(descending=True)[:3].tolist()
    for ax, image in zip(axes[0], best, strict=True):
        if x.dim() == 3:
            for line, curve in zip(ax.lines, x[image], strict=True):
                np.testing.assert_allclose(line.get_ydata(), curve.double().numpy())
            heat = np.interp(np.clip((np.arange(24) + 0.5) * 22 / 24 - 0.5, 0, 21), np.arange(22), maps[image, channel])
            np.testing.assert_allclose(ax.images[0].get_array()[0], heat / heat.max(), atol=1e-6)
        else:
            grey = ax.images[0].get_array()
            middle = x[image, :, 2].double().mean(0)
            assert np.corrcoef(grey.ravel(), middle.ravel())[0, 1] > 0.999
    title = axes[0, 0].figure.get_suptitle()
    assert ("slice 3 of 5" in title) == (x.dim() == 5)
    plt.close("all")


def test_what_needs_images_says_so(case):
    model, x, y, *_ = case
    table = InfluentialFeatures(model).attribute([(x, y)])
    with pytest.raises(HeadError, match="is no map of images"):
        metrics.localisation(HeadPass(model, [(x, y)]), table, k=2, silhouette=lambda t: t[:, 0] > 0)
    with pytest.raises((LayerError, ValueError), match="images must be a tensor"):
        metrics.activation_thresholds(model, [(x, y)], ["relu"])


def test_cards_without_a_map_say_why(images):
    """Two layers behind the average, as in VGG: the head reads no positions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ).eval()
    x, y = images(9).sigmoid(), torch.arange(9) % 3
    table = InfluentialFeatures(model).attribute([(x, y)])
    axes = filter_cards(model, table, 0, [(x, y)], k=2, images=2)
    title = " ".join(axes[0, 0].figure.get_suptitle().split())
    assert "no maps: layer 3 stands between the head and the last map, and mixes channels" in title
    with torch.no_grad():
        features = model[:5](x)
    best = features[:, int(table.top(1)[0, 0])].argsort(descending=True, stable=True)[:2]
    for ax, image in zip(axes[0], best.tolist(), strict=True):
        assert len(ax.images) == 1
        np.testing.assert_allclose(ax.images[0].get_array(), x[image].permute(1, 2, 0), atol=1e-6)
    own = plt.subplots(1, 1, squeeze=False)[1]
    filter_cards(model, table, 0, [(x, y)], k=1, images=1, ax=own)
    assert own[0, 0].get_xlabel().startswith("no maps: layer 3 stands between")
    plt.close("all")
