"""Deletion and insertion of channels, against a loop over images."""

import dataclasses

import numpy as np
import pytest
import torch

from captum_classfilters import ClassFilters, ClassFiltersError, metrics


def table_of(scores, **changes):
    given = torch.as_tensor(scores, dtype=torch.float64)
    counts = torch.ones(len(given), dtype=torch.int64)
    names = tuple("abcd"[: len(given)])
    return dataclasses.replace(ClassFilters(given, given.abs(), counts, "mine", "fc", names), **changes)


@pytest.fixture
def case(small_cnn):
    model = small_cnn(num_classes=4, channels=6)
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(40, 3, 12, 12, generator=generator), torch.randint(4, (40,), generator=generator)
    scores = torch.rand(4, 6, generator=generator)
    return model, [(images[:15], labels[:15]), (images[15:], labels[15:])], images, labels, table_of(scores)


def by_hand(model, images, labels, table, sizes, steps):
    """``(N, 2, steps + 1)``, in float64, image by image."""
    model = model.double()
    found = np.zeros((len(images), 2, steps + 1))
    for row, (image, label) in enumerate(zip(images.double(), labels.tolist(), strict=True)):
        with torch.no_grad():
            features = model.penultimate(image[None])[0]
            for step in range(steps + 1):
                count = int(np.floor(sizes[label] * step / steps + 0.5))
                chosen = table.ranking()[label, :count]
                inside = torch.zeros(6, dtype=torch.bool)
                inside[chosen] = True
                for kind, mask in enumerate((~inside, inside)):
                    found[row, kind, step] = model.fc(features * mask).softmax(0)[label]
    model.float()
    return found


@pytest.mark.parametrize("sizes", [4, [1, 6, 3, 5]])
def test_curve_and_area_agree_with_a_loop(case, sizes):
    model, loader, images, labels, table = case
    frame = metrics.channel_deletion(model, {"mine": table}, loader, torch.as_tensor(sizes), steps=5)
    each = np.broadcast_to(sizes, 4)
    expected = by_hand(model, images, labels, table, each, 5)
    for kind, name in enumerate(("deletion", "insertion")):
        rows = frame[(frame.filters == "mine") & (frame.kind == name)]
        curve = expected[:, kind]
        np.testing.assert_allclose(rows.probability, curve.mean(0), atol=1e-6)
        half = 1.959964 * curve.std(0, ddof=1) / np.sqrt(40)
        np.testing.assert_allclose(rows.high - rows.probability, half, atol=1e-6)
        area = (curve[:, :-1] + curve[:, 1:]).sum(1) * 0.1
        np.testing.assert_allclose(rows.auc, area.mean(), atol=1e-6)
        np.testing.assert_allclose(rows.auc - rows.auc_low, 1.959964 * area.std(ddof=1) / np.sqrt(40), atol=1e-6)
        counts = np.floor(each[labels][:, None] * np.arange(6) / 5 + 0.5)
        np.testing.assert_allclose(rows.channels, counts.mean(0))
        assert (rows.samples == 40).all()


def test_random_is_the_mean_over_rankings_drawn_at_random(case):
    model, loader, *_, table = case
    frame = metrics.channel_deletion(model, table, loader, 6, draws=30)
    random = frame[(frame.filters == "random") & (frame.kind == "deletion")].reset_index()
    assert (random.auc_low < random.auc).all()
    again = metrics.channel_deletion(model, table, loader, 6, draws=30)
    assert frame.equals(again)
    other = metrics.channel_deletion(model, table, loader, 6, draws=30, seed=1)
    found = other[(other.filters == "random") & (other.kind == "deletion")].reset_index()
    assert found.auc[0] != random.auc[0]
    assert random.auc_low[0] < found.auc_high[0]
    assert found.auc_low[0] < random.auc_high[0]
    # all are deleted at the last step, whatever the ranking
    assert random.high[10] - random.low[10] < 1e-9


def test_a_class_of_size_0_is_left_out(case):
    model, loader, images, labels, table = case
    frame = metrics.channel_deletion(model, table, loader, torch.tensor([0, 3, 3, 3]), steps=3)
    assert (frame.samples == int((labels != 0).sum())).all()
    expected = by_hand(model, images[labels != 0], labels[labels != 0], table, [0, 3, 3, 3], 3)
    own = frame[(frame.filters == "mine") & (frame.kind == "insertion")]
    np.testing.assert_allclose(own.probability, expected[:, 1].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        (7, {}, r"\[0, 6\]"),
        (0, {}, "not all be 0"),
        (-1, {}, r"\[0, 6\]"),
        (2.5, {}, "integers"),
        (torch.tensor([1, 2]), {}, "4 of them"),
        (3, {"steps": 0}, "at least 1"),
        (3, {"draws": 1}, "at least 5"),
    ],
)
def test_what_cannot_be_is_refused(case, sizes, options, words):
    model, loader, *_, table = case
    with pytest.raises(ClassFiltersError, match=words):
        metrics.channel_deletion(model, table, loader, sizes, **options)


def test_a_table_of_another_network_is_refused(case):
    model, loader, *_ = case
    with pytest.raises(ClassFiltersError, match="the table is"):
        metrics.channel_deletion(model, table_of(torch.rand(4, 9)), loader, 2)


def test_a_loader_of_left_out_classes_is_an_error(case):
    model, _, images, labels, table = case
    only = [(images[labels == 0], labels[labels == 0])]
    with pytest.raises(ClassFiltersError, match="no image is of a class"):
        metrics.channel_deletion(model, table, only, torch.tensor([0, 2, 2, 2]))
