"""The mutual information score against scikit-learn's estimates one by one, and where it is known."""

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif
from torch import nn

from captum_classfilters import HeadPass, metrics
from captum_classfilters.core.errors import LabelError, OptionError
from captum_classfilters.metrics.information import _Sample


def in_batches(data, size):
    return list(zip(*(torch.split(part, size) for part in data), strict=True))


@pytest.fixture
def task():
    """The head's input is the input; channel 0 tells class 0, channel 1 tells nothing, channel 2 a bit of class 2."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(150) % 3
    x = torch.rand(150, 3, generator=generator)
    x[:, 0] += 2.0 * (y == 0)
    x[:, 2] += 0.6 * (y == 2)
    return nn.Sequential(nn.Identity(), nn.Linear(3, 3)), (x, y)


def test_the_score_is_the_mean_of_each_channels_largest(task):
    model, (x, y) = task
    both = metrics.mutual_information(HeadPass(model, in_batches((x, y), 7), class_names=["a", "b", "c"]))
    frame, control = both[~both.control], both[both.control].reset_index()
    expected = np.array(
        [mutual_info_classif(x.numpy(), (y == c).numpy(), discrete_features=False, random_state=0) for c in range(3)]
    )
    assert list(frame.channel) == ["all", 0, 1, 2]
    np.testing.assert_allclose(frame.mi[1:], expected.max(0))
    assert list(frame.class_name[[1, 3]]) == ["a", "c"]
    score = frame.iloc[0]
    assert score.mi == pytest.approx(expected.max(0).mean())
    assert score.low <= score.mi <= score.high
    assert score.samples == 150
    assert frame.low[1:].isna().all()
    # all that can be known of class 0 is its entropy
    assert frame.mi[1] == pytest.approx(np.log(3) - 2 / 3 * np.log(2), abs=0.02)
    assert frame.mi[2] < 0.1
    assert frame.mi[1] > frame.mi[3] > control.mi[3] + 0.05


def test_the_control_has_labels_permuted(task):
    model, data = task
    frame = metrics.mutual_information(model, [data], draws=3)
    control = frame[frame.control].reset_index()
    assert control.channel.tolist() == ["all", 0, 1, 2]
    assert control.class_name.fillna("").tolist() == ["all", "", "", ""]
    assert (control.mi < 0.1).all()
    assert control.mi[0] == pytest.approx(control.mi[1:].mean())
    assert control.low[0] <= control.mi[0] <= control.high[0]
    other = metrics.mutual_information(model, [data], draws=3, seed=1)
    assert (other.mi != frame.mi)[frame.control].any()
    np.testing.assert_allclose(other.mi[~frame.control], frame.mi[~frame.control], atol=1e-6)


def test_the_interval_is_of_means_over_channels(task):
    _, (_, y) = task
    # of many channels half tell everything and half nothing; two classes, so that there are fewer estimates
    x = torch.rand(60, 40, generator=torch.Generator().manual_seed(1))
    y = (y[:60] == 0).long()
    x[:, ::2] += 5.0 * y[:, None]
    model = nn.Sequential(nn.Identity(), nn.Linear(40, 2))
    frame = metrics.mutual_information(model, [(x, y)])
    frame = frame[~frame.control]
    half = 1.96 * frame.mi[1:].std(ddof=0) / 40**0.5
    score = frame.iloc[0]
    assert (score.low, score.high) == pytest.approx((score.mi - half, score.mi + half), abs=0.02)


def test_a_sample_is_the_same_for_every_batch_size_and_bounds_what_is_kept(task):
    model, data = task
    frames = [metrics.mutual_information(model, in_batches(data, size), max_samples=60) for size in (4, 50, 150)]
    assert (frames[0].samples == 60).all()
    for frame in frames[1:]:
        np.testing.assert_array_equal(frame.mi, frames[0].mi)
    whole = metrics.mutual_information(model, [data], max_samples=150)
    np.testing.assert_array_equal(whole.mi, metrics.mutual_information(model, [data]).mi)
    sample, numbers, seen = _Sample(10, 0), np.arange(1000.0)[:, None], []
    for part in np.split(numbers, 100):
        sample.add(part, part[:, 0])
        seen.append(sum(len(features) for features, _, _ in sample._parts))
    assert max(seen) <= 20
    assert len(np.unique(sample.labels)) == 10
    assert (np.diff(sample.labels) > 0).all()
    # not the first, not the last, but any
    means = []
    for seed in range(100):
        one = _Sample(10, seed)
        one.add(numbers, numbers[:, 0])
        means.append(one.labels.mean())
    assert np.mean(means) == pytest.approx(499.5, abs=4 * 288.7 / 1000**0.5)


def test_classes_without_samples_are_left_out(task):
    model, (x, y) = task
    frame = metrics.mutual_information(HeadPass(model, [(x[y > 0], y[y > 0])], class_names=["a", "b", "c"]))
    assert set(frame.class_name.dropna()) <= {"all", "b", "c"}
    with pytest.raises(OptionError, match="samples of 1; pass a loader with more"):
        metrics.mutual_information(model, [(x[y == 0], y[y == 0])])


def test_information_refuses_what_it_cannot_use(task):
    model, data = task
    for name, value in (("n_neighbors", 0), ("draws", 0), ("max_samples", 1), ("draws", True), ("draws", None)):
        with pytest.raises(OptionError, match=f"{name} must be an integer of at least"):
            metrics.mutual_information(model, [data], **{name: value})
    for names, message in (("ab", "class_names must be 3, one for each class; got 2"), ("abb", "must be unique")):
        with pytest.raises(OptionError, match=message):
            metrics.mutual_information(HeadPass(model, [data], class_names=list(names)))
    with pytest.raises(LabelError, match="has no labels"):
        metrics.mutual_information(model, [data[0]])
