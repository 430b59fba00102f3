"""Sums by class: whole batches whatever interrupts them, and the correlation that follows from them."""

import numpy as np
import pytest
import torch

from captum_classfilters import ClassFilters, InfluentialFeatures
from captum_classfilters.core import class_sums
from captum_classfilters.core.class_sums import ClassSums, class_correlation
from captum_classfilters.core.errors import OptionError


def draw(seed, samples=60, classes=3, channels=4):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, channels, generator=generator, dtype=torch.float64)
    return features, torch.randint(classes, (samples,), generator=generator)


def totals(features, labels, classes=3):
    members = torch.nn.functional.one_hot(labels, classes).double()
    return members.sum(0).long(), members.T @ features, members.T @ features**2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_correlation_is_numpys_with_the_class_indicator(seed):
    features, labels = draw(seed)
    found = class_correlation(*totals(features, labels))
    for channel in range(4):
        for label in range(3):
            expected = np.corrcoef(features[:, channel].numpy(), (labels == label).double().numpy())[0, 1]
            assert found[label, channel].item() == pytest.approx(expected, abs=1e-9)


def test_a_channel_that_never_varies_and_a_class_without_samples_have_no_correlation():
    features, labels = draw(0)
    features[:, 2] = 0.1
    found = class_correlation(*totals(features, labels.clamp(max=1)))
    assert found[:, 2].tolist() == [0, 0, 0]
    assert found[2].tolist() == [0, 0, 0, 0]
    assert class_correlation(torch.zeros(3, dtype=torch.int64), *2 * [torch.zeros(3, 4)]).tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_addition_leaves_whole_batches(at, monkeypatch):
    """Ctrl-C while the at-th quantity of the second batch is rounded: the first batch stands, nothing of the second."""
    sums = ClassSums(2, 1, ["first", "second"], torch.device("cpu"))
    rows = {"first": torch.ones(3, 1), "second": torch.full((3, 1), 2.0)}
    labels = torch.tensor([0, 1, 1])
    sums.add(labels, rows)
    calls = []

    def interrupted(values):
        calls.append(values)
        if len(calls) == at:
            raise KeyboardInterrupt
        return values.double()

    monkeypatch.setattr(class_sums, "to_grid", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sums.add(labels, rows)
    assert (sums.counts.tolist(), sums["first"].tolist(), sums["second"].tolist()) == ([1, 2], [[1], [2]], [[2], [4]])


def test_selector_correlation_merges_saves_and_needs_labels(small_cnn, images, tmp_path):
    model, pictures = small_cnn(), images(24)
    labels = torch.arange(24) // 2 % 4
    method = InfluentialFeatures(model)
    whole = method.attribute([(pictures, labels)], selector="correlation")
    with torch.no_grad():
        features = model.penultimate(pictures).double()
    for channel in range(6):
        if features[:, channel].std() == 0:
            assert whole.scores[:, channel].tolist() == [0] * 4
            continue
        for label in range(4):
            expected = np.corrcoef(features[:, channel].numpy(), (labels == label).double().numpy())[0, 1]
            assert whole.scores[label, channel].item() == pytest.approx(expected, abs=1e-6)
    parts = [method.attribute([(pictures[i::2], labels[i::2])], selector="correlation") for i in range(1, 2)]
    rest = whole.without(parts[0])
    merged = ClassFilters.merge(rest, parts[0])
    torch.testing.assert_close(merged.scores, whole.scores, rtol=0, atol=1e-12)
    assert not torch.equal(parts[0].scores, whole.scores)
    whole.save(tmp_path / "table.safetensors")
    again = ClassFilters.load(tmp_path / "table.safetensors")
    assert torch.equal(again.scores, whole.scores)
    assert torch.equal(ClassFilters.merge(again, again).sums["total"], 2 * whole.sums["total"])
    with pytest.raises(OptionError, match=r"\['correlation'\] tell classes apart by true labels"):
        method.attribute([pictures], selector="correlation", label_source="prediction")
