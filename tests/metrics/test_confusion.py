"""Explained confusions: sums that are exact, and maps that add up."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from captum_classfilters import ClassFiltersError, explain_confusion


@pytest.fixture
def case(small_cnn):
    model = small_cnn(num_classes=4, channels=6)
    images = torch.randn(9, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(images)
    return model, images, logits


def test_contributions_sum_to_the_difference_of_the_logits(case):
    model, images, logits = case
    predicted = logits.argmax(1)
    true = (predicted + 1) % 4
    found = explain_confusion(model, images, true)
    rows = torch.arange(9)
    difference = (logits[rows, predicted] - logits[rows, true]).double()
    torch.testing.assert_close(found.difference, difference, atol=1e-5, rtol=0)
    sums = found.table.groupby("sample").contribution.sum().to_numpy()
    np.testing.assert_allclose(sums, found.difference, atol=1e-12)
    assert torch.equal(found.predicted, predicted)
    assert (found.difference > 0).all()
    table = found.table[found.table["sample"] == 4]
    assert table.contribution.is_monotonic_decreasing
    assert sorted(table.channel) == [-1, 0, 1, 2, 3, 4, 5]
    with torch.no_grad():
        features = model.penultimate(images)
    one = table[table.channel == 2].iloc[0]
    weights = model.fc.weight.detach()
    assert one.feature == pytest.approx(features[4, 2].item())
    assert one.weight_predicted == pytest.approx(weights[predicted[4], 2].item())
    assert one.weight_true == pytest.approx(weights[true[4], 2].item())
    assert one.contribution == pytest.approx((one.weight_predicted - one.weight_true) * one.feature)
    bias = table[table.channel == -1].iloc[0]
    assert bias.contribution == pytest.approx((model.fc.bias[predicted[4]] - model.fc.bias[true[4]]).item())


def test_maps_and_bias_add_up_to_the_difference(case):
    model, images, _ = case
    found = explain_confusion(model, images, 0, 3)
    assert found.won_by.shape == found.lost_by.shape == (9, 1, 8, 8)
    bias = found.table[found.table.channel == -1].set_index("sample").contribution.to_numpy()
    total = (found.won_by + found.lost_by).double().sum((1, 2, 3)).numpy() + bias
    np.testing.assert_allclose(total, found.difference, atol=1e-5)
    # behind a ReLU: what speaks for the one is never below 0, for the other never above
    assert (found.won_by >= 0).all()
    assert (found.lost_by <= 0).all()
    rows = found.table[(found.table["sample"] == 2) & (found.table.channel >= 0)]
    assert found.won_by[2].sum().item() == pytest.approx(rows.contribution.clip(lower=0).sum(), abs=1e-5)


def test_half_precision_has_its_maps(case):
    model, images, _ = case
    found = explain_confusion(copy.deepcopy(model).bfloat16(), images, 0, 3)
    whole = explain_confusion(model, images, 0, 3)
    torch.testing.assert_close(found.won_by, whole.won_by, atol=0.02 * float(whole.won_by.max()), rtol=0.1)


def test_of_a_maximum_the_whole_contribution_is_where_it_is():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(5, 3)).eval()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = explain_confusion(model, images, 0, 2)
    maps, weight = model[:2](images).detach(), model[4].weight.detach()
    won, lost = torch.zeros(2, 2, 1, 6, 6)
    for image in range(2):
        for channel in range(5):
            value, place = maps[image, channel].flatten().max(0)
            adds = (weight[2, channel] - weight[0, channel]) * value
            won[image].view(-1)[place] += adds.clamp(min=0)
            lost[image].view(-1)[place] += adds.clamp(max=0)
    torch.testing.assert_close(found.won_by, won)
    torch.testing.assert_close(found.lost_by, lost)
    assert found.adds_up
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(found.difference.float(), logits[:, 2] - logits[:, 0])


def test_a_head_behind_no_map_has_a_table_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    found = explain_confusion(model, torch.randn(4, 3, 2, 2), [0, 0, 1, 1], [1, 2, 2, 0])
    assert found.won_by is None
    assert len(found.table) == 4 * 9


@pytest.mark.parametrize(
    ("true", "predicted", "words"),
    [
        (1, 1, "sample 0 is of class 1"),
        (9, None, r"\[0, 4\), got 9"),
        ([0, 1], None, "9 of them"),
        ("cat", None, "class index"),
        (0, 1.5, "integers"),
    ],
)
def test_what_cannot_be_is_refused(case, true, predicted, words):
    model, images, _ = case
    with pytest.raises(ClassFiltersError, match=words):
        explain_confusion(model, images, true, predicted)


def test_a_right_prediction_is_no_confusion(case):
    model, images, logits = case
    with pytest.raises(ClassFiltersError, match="nothing was confused"):
        explain_confusion(model, images, logits.argmax(1))
