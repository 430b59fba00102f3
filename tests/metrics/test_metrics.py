"""Every metric against an answer worked out another way, on the trained network and real images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from captum_classfilters import HeadPass, InfluentialFeatures, metrics
from captum_classfilters.assets import load_demo_network, load_images
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.metrics.sets import random_jaccard


@pytest.fixture(scope="module")
def model():
    return load_demo_network()[0]


@pytest.fixture(scope="module")
def test_images():
    """40 images of each class."""
    sample = load_images("test")
    chosen = torch.cat([(sample.labels == label).nonzero().flatten()[:40] for label in range(10)]).sort().values
    return sample._replace(images=sample.images[chosen], labels=sample.labels[chosen])


@pytest.fixture(scope="module")
def tables(model):
    sample = load_images("train")
    return InfluentialFeatures(model).attribute(
        sample.batches()[:2], selector=["histogram", "margin", "random"], class_names=sample.class_names
    )


@pytest.fixture(scope="module")
def features(model, test_images):
    with torch.no_grad():
        return nn.Sequential(*list(model.children())[:-1], nn.Flatten())(test_images.images.float() / 255)


@pytest.fixture(scope="module")
def judged(model, test_images):
    """The network over the test images, run once for all tests here."""
    return HeadPass(model, test_images.batches()).cached()


@pytest.fixture(scope="module")
def curve(judged, tables):
    return metrics.accuracy_curve(judged, tables, ks=[5, 1, 64])


def row(frame, **wanted):
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


# -- intervals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "samples"), [(0, 10), (9, 10), (10, 10), (9262, 10000), (1, 3)])
def test_wilson_is_scipys(successes, samples):
    expected = stats.binomtest(successes, samples).proportion_ci(method="wilson")
    np.testing.assert_allclose(metrics.wilson(successes, samples), (expected.low, expected.high), atol=1e-12)
    assert np.isnan(metrics.wilson(0, 0)[0])


def test_mean_interval_is_scipys():
    draws = np.array([0.2, 0.3, 0.25, 0.4, 0.31])
    expected = stats.t.interval(0.95, 4, loc=draws.mean(), scale=stats.sem(draws))
    np.testing.assert_allclose(metrics.mean_interval(draws), (draws.mean(), *expected))


# -- accuracy against k ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "k"), [("histogram", 1), ("histogram", 5), ("margin", 5)])
def test_accuracy_is_that_of_the_head_with_other_weights_zeroed(model, tables, test_images, features, curve, name, k):
    weight = torch.zeros_like(model.fc.weight)
    for y, channels in enumerate(tables[name].top(k).tolist()):
        weight[y, channels] = model.fc.weight.detach()[y, channels]
    predicted = (features @ weight.T + model.fc.bias.detach()).argmax(1)
    dense = (features @ model.fc.weight.T + model.fc.bias).argmax(1)
    right = predicted == test_images.labels
    found = row(curve, filters=name, k=k, class_name="all")
    assert found.accuracy == pytest.approx(float(right.float().mean()))
    assert found.agreement == pytest.approx(float((predicted == dense).float().mean()))
    assert found.relative == pytest.approx(found.accuracy / row(curve, filters="dense", class_name="all").accuracy)
    coat = row(curve, filters=name, k=k, class_name="coat")
    assert coat.accuracy == pytest.approx(float(right[test_images.labels == 4].float().mean()))
    assert coat.samples == 40
    np.testing.assert_allclose((coat.low, coat.high), metrics.wilson(right[test_images.labels == 4].sum(), 40))


def test_all_channels_are_the_dense_head(curve):
    dense, whole = (
        row(curve, filters="dense", class_name="all"),
        row(curve, filters="histogram", k=64, class_name="all"),
    )
    assert dense.k == 64
    assert whole.accuracy == dense.accuracy
    assert whole.agreement == 1


def test_few_influential_channels_beat_as_many_random_ones_on_real_images(curve):
    own, chance = (row(curve, filters=name, k=5, class_name="all") for name in ("histogram", "random"))
    assert own.low > chance.high + 0.2


def test_a_control_is_always_there_and_scatters(judged, tables, curve):
    control = curve[curve.control]
    assert set(control.filters) == {"random"}
    assert set(curve[~curve.control].filters) == {"dense", "histogram", "margin"}
    assert set(control.k) == {1, 5, 64}
    at_5 = row(control, k=5, class_name="all")
    assert at_5.low < at_5.accuracy < at_5.high
    again = metrics.accuracy_curve(judged, tables, ks=[5], control=Control(6, seed=1))
    assert row(again, filters="random", class_name="all").accuracy != at_5.accuracy


def test_a_single_table_goes_by_its_method(model, tables, test_images):
    frame = metrics.accuracy_curve(model, tables["margin"], test_images.batches()[:1], np.arange(1, 3))
    assert set(frame.filters) == {"dense", "margin", "random"}
    assert frame[["low", "high"]].stack().between(0, 1).all()


def test_relative_accuracy_to_nothing_is_nan(model, tables, test_images):
    bags = test_images.labels == 8
    never = [
        (torch.zeros(3, 1, 28, 28), torch.full((3,), 4)),
        (test_images.images[bags] / 255.0, torch.full((40,), 8)),
    ]
    frame = metrics.accuracy_curve(model, tables["histogram"], never, [1])
    assert row(frame, filters="dense", class_name="coat").accuracy == 0
    assert np.isnan(row(frame, filters="histogram", class_name="coat").relative)


def test_many_settings_are_counted_in_slices(judged, tables, curve, monkeypatch):
    monkeypatch.setattr("captum_classfilters.metrics.accuracy._CELLS", 640 * 4)
    sliced = metrics.accuracy_curve(judged, tables, ks=[5, 1, 64])
    np.testing.assert_allclose(sliced.accuracy, curve.accuracy, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "ks", "error", "message"),
    [
        (dict, [65], OptionError, r"each of ks must be an integer in \[1, 64\], the number of channels; got 65"),
        (dict, 5, OptionError, r"ks must be a list of integers, such as \[1, 3, 5\]; got 5"),
        (dict, [], OptionError, "ks must be a list of at least one integer"),
        (lambda own: [own["votes"]], [5], OptionError, "got list"),
        (lambda own: {1: own["votes"], "1": own["margin"]}, [5], OptionError, "not different as text"),
        (
            lambda own: {**own, "margin": replace(own["margin"], class_names=tuple("abcdefghij"))},
            [5],
            OptionError,
            "name their classes differently",
        ),
        (lambda own: {"x": replace(own["votes"], method="random")}, [5], OptionError, "no table was given"),
        (lambda own: {"dense": own["votes"]}, [5], OptionError, "may not be named 'dense'"),
        (
            lambda own: {"short": replace(own["votes"], scores=torch.rand(10, 9), mass=torch.rand(10, 9))},
            [5],
            ShapeError,
            r"the table is 10 classes x 9 channels of .* the head 'fc' is 10 x 64",
        ),
    ],
)
def test_curves_refuse_what_they_cannot_use(judged, tables, make, ks, error, message):
    own = {"votes": tables["histogram"], "margin": tables["margin"]}
    with pytest.raises(error, match=message):
        metrics.accuracy_curve(judged, make(own), ks=ks)


# -- the "essential" test ----------------------------------------------------------------------------------------------


def test_zeroing_is_the_full_head_without_those_features(judged, model, tables, test_images, features):
    frame = metrics.class_ablation(judged, tables["histogram"], modes=["zero", "mean"])
    chosen = tables["histogram"].mask(5)[test_images.labels]
    means = tables["histogram"].mass.sum(0).float() / 500

    def recall(values):
        right = (values @ model.fc.weight.T + model.fc.bias).argmax(1) == test_images.labels
        return [float(right.float().mean()), float(right[test_images.labels == 6].float().mean())]

    for mode, channels, values in (
        ("intact", "none", features),
        ("zero", "influential", features.masked_fill(chosen, 0)),
        ("zero", "rest", features.masked_fill(~chosen, 0)),
        ("mean", "influential", torch.where(chosen, means, features)),
    ):
        found = [row(frame, mode=mode, channels=channels, class_name=name).accuracy for name in ("all", "shirt")]
        assert found == pytest.approx(recall(values))
    intact = row(frame, mode="intact", class_name="all")
    hit = row(frame, mode="zero", channels="influential", class_name="all")
    assert hit["drop"] == pytest.approx(intact.accuracy - hit.accuracy)


def test_noise_on_its_own_channels_hurts_a_class_more_than_on_random_ones(judged, tables):
    frame = metrics.class_ablation(judged, tables["histogram"], modes=["noise"])
    own, chance = (row(frame, channels=name, class_name="all") for name in ("influential", "random"))
    assert own.high < chance.low
    assert set(frame.channels) == {"none", "influential", "random", "rest"}


def test_a_class_the_table_has_not_seen_is_left_out_of_the_test(judged, tables):
    counts = tables["histogram"].counts.clone()
    counts[4] = 0
    partial = replace(tables["histogram"], counts=counts)
    frame = metrics.class_ablation(judged, partial, modes="zero")
    whole = metrics.class_ablation(judged, tables["histogram"], modes=["zero"])
    assert np.isnan(row(frame, class_name="coat", channels="influential").accuracy)
    assert row(frame, class_name="all", channels="influential").samples == 360
    same = {"class_name": "shirt", "channels": "influential"}
    assert row(frame, **same).accuracy == row(whole, **same).accuracy


def test_ablation_takes_a_model_with_autocast_inside(model, tables, test_images):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    renamed = replace(tables["histogram"], layer="model.fc")
    frame = metrics.class_ablation(Inside(), renamed, test_images.batches()[:1], 5, modes=["zero"])
    plain = metrics.class_ablation(model, tables["histogram"], test_images.batches()[:1], 5, modes=["zero"])
    np.testing.assert_allclose(frame.accuracy, plain.accuracy, atol=0.2)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda table: table, {"modes": ["shuffle"]}, OptionError, "modes must be some of"),
        (lambda table: table, {"k": 65}, OptionError, r"k must be an integer in \[1, 64\]"),
        (lambda table: table, {"means": torch.zeros(3)}, ShapeError, r"means must be a tensor of shape \(64,\)"),
        (lambda table: {"votes": table}, {}, OptionError, r"of \['votes'\] pass one"),
        (lambda table: replace(table, layer="2"), {}, ShapeError, "64 channels of layer '2', the head 'fc' is 10 x 64"),
    ],
)
def test_ablation_refuses_what_it_cannot_do(judged, tables, make, options, error, message):
    with pytest.raises(error, match=message):
        metrics.class_ablation(judged, make(tables["histogram"]), **options)


def test_means_of_features_that_can_be_negative_must_be_given(tables, test_images):
    torch.manual_seed(0)
    signed = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.Linear(64, 10))
    loader, renamed = test_images.batches()[:1], replace(tables["histogram"], layer="2")
    with pytest.raises(OptionError, match="features of layer '2' can be negative"):
        metrics.class_ablation(signed, renamed, loader, 5, modes=["mean"])
    frame = metrics.class_ablation(signed, renamed, loader, 5, modes=["mean"], means=torch.zeros(64))
    zero = metrics.class_ablation(signed, renamed, loader, 5, modes=["zero"])
    np.testing.assert_allclose(frame.accuracy, zero.accuracy)


# -- sets --------------------------------------------------------------------------------------------------------------


def test_overlap_lists_each_pair_with_what_chance_gives(tables):
    frame = metrics.overlap({"votes": tables["histogram"], "margin": tables["margin"]}, 5)
    assert (~frame.control).sum() == 2 * 45
    pair = row(frame, filters="votes", class_a="pullover", class_b="coat")
    a, b = (set(tables["histogram"].top(5)[i].tolist()) for i in (2, 4))
    assert pair.jaccard == pytest.approx(len(a & b) / len(a | b))
    assert pair.shared == pytest.approx(len(a & b))
    (chance,) = frame[frame.control].itertuples()
    assert (chance.jaccard, chance.low, chance.high) == pytest.approx(random_jaccard(5, 64))


@pytest.mark.parametrize(("k", "channels"), [(1, 10), (5, 64), (8, 12)])
def test_random_jaccard_is_what_a_simulation_finds(k, channels):
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(4000):
        a, b = (set(generator.permutation(channels)[:k].tolist()) for _ in range(2))
        draws.append(len(a & b) / len(a | b))
    mean, low, high = random_jaccard(k, channels)
    assert mean == pytest.approx(np.mean(draws), abs=4 * np.std(draws) / 4000**0.5)
    assert low <= np.mean(draws) <= high
    assert np.mean((np.array(draws) >= low) & (np.array(draws) <= high)) >= 0.95


def test_stability_is_one_when_nothing_can_change_and_lower_when_samples_are_few(model):
    sample = load_images("train")
    few = [(sample.images[:100].float() / 255, sample.labels[:100])]
    all_channels = metrics.stability(model, few, 64, draws=5)
    assert row(all_channels[~all_channels.control], class_name="all").jaccard == 1
    scarce = metrics.stability(HeadPass(model, few, class_names=sample.class_names), k=5, draws=20, seed=3)
    plenty = metrics.stability(model, sample.batches()[:2], 5, draws=20, seed=3)
    scarce, chance = scarce[~scarce.control], scarce[scarce.control]
    plenty = plenty[~plenty.control]
    found = row(scarce, class_name="all")
    assert found.low < found.jaccard < row(plenty, class_name="all").jaccard < 1
    assert found.jaccard > chance.jaccard.item()
    assert found.samples == 100
    assert set(scarce.class_name) == {"all", *sample.class_names}


def test_stability_refuses_what_has_no_samples(model):
    with pytest.raises(OptionError, match=r"selectors \['weight'\] look at no samples"):
        metrics.stability(model, [], 5, selectors=["weight"])
    with pytest.raises(OptionError, match="draws must be an integer of at least 5"):
        metrics.stability(model, [], 5, draws=1)
