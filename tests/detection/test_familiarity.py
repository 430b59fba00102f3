"""Familiarity of images: every score against an independent computation, alarms at the promised rate, channels."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist, mahalanobis
from sklearn.covariance import OAS, EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import check_estimator
from torch import nn
from torch.nn import functional as F

from captum_classfilters import HeadPass
from captum_classfilters.core.errors import CalibrationError, LabelError, MergeError, NonFiniteError, OptionError
from captum_classfilters.detection import FamiliarityDetector, explain_alarm
from captum_classfilters.detection.conformal import false_positive_interval
from captum_classfilters.detection.familiarity import METHODS

SUMS = ("mahalanobis", "relative_mahalanobis", "class_gaussian", "nearest_neighbours", "max_logit")
CLASSES, CHANNELS = 4, 6


def network(seed=0, head=None):
    torch.manual_seed(seed)
    head = head or nn.Linear(CHANNELS, CLASSES)
    conv = nn.Conv2d(3, CHANNELS, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def loader(count=200, seed=0, shift=0.0, classes=CLASSES, size=50):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 8, 8, generator=generator) * (1 + shift) + shift
    labels = torch.arange(count) % classes
    # classes differ by colour
    images[:, 0] += 0.3 * labels[:, None, None]
    return list(zip(images.split(size), labels.split(size), strict=True))


def features_of(model, batches):
    with torch.no_grad():
        features = torch.cat([model[:4](images) for images, _ in batches]).double().numpy()
    logits = features @ model[4].weight.detach().double().numpy().T + model[4].bias.detach().double().numpy()
    return features, logits, torch.cat([labels for _, labels in batches]).numpy()


def independent(method, train, new, against="nearest"):
    """Each score from its definition, image by image; scipy and scikit-learn do the counting."""
    features, _, labels = train
    images, logits = new[:2]
    means = np.stack([features[labels == label].mean(0) for label in range(CLASSES)])
    if method in ("mahalanobis", "relative_mahalanobis"):
        inside = OAS(assume_centered=True).fit(features - means[labels])
        table = cdist(images, means, lambda u, v: mahalanobis(u, v, inside.precision_) ** 2)
        if method == "relative_mahalanobis":
            whole = OAS().fit(features)
            table = table - whole.mahalanobis(images)[:, None]
    elif method == "class_gaussian":
        least = 0.01 * features.var(0)
        spread = [np.sqrt(np.maximum(features[labels == label].var(0), least)) for label in range(CLASSES)]
        table = np.stack(
            [
                -2 * stats.norm(means[label], spread[label]).logpdf(images).sum(1) - CHANNELS * np.log(2 * np.pi)
                for label in range(CLASSES)
            ],
            axis=1,
        )
    elif method == "nearest_neighbours":
        unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (features, images)]
        return NearestNeighbors(n_neighbors=5).fit(unit[0]).kneighbors(unit[1])[0][:, -1] ** 2
    elif method == "vim":
        weight = np.stack([new[3](row[None])[0] for row in np.eye(CHANNELS)], axis=1)
        bias = new[3](np.zeros((1, CHANNELS)))[0]
        weight = weight - bias[:, None]
        origin = -np.linalg.pinv(weight) @ bias
        outside = np.linalg.svd(features - origin)[2][CHANNELS // 2 :]
        lengths = [np.linalg.norm((part - origin) @ outside.T, axis=1) for part in (features, images)]
        scale = (features @ weight.T + bias).max(1).mean() / lengths[0].mean()
        return scale * lengths[1] - torch.logsumexp(torch.from_numpy(logits), 1).numpy()
    else:
        if method == "react":
            logits = new[3](np.clip(images, None, np.percentile(features, 90)))
        logits = torch.from_numpy(logits)
        return {
            "react": lambda: -torch.logsumexp(logits, 1),
            "energy": lambda: -torch.logsumexp(logits, 1),
            "max_logit": lambda: -logits.max(1).values,
            "max_softmax": lambda: -F.softmax(logits, 1).max(1).values,
        }[method]().numpy()
    if against == "predicted":
        return table[np.arange(len(images)), logits.argmax(1)]
    return table.min(1)


@pytest.mark.parametrize("against", ["nearest", "predicted"])
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_definition(method, against):
    model = network()
    train, new = loader(), loader(30, seed=1, shift=0.1, size=7)
    detector = FamiliarityDetector(method, against=against, neighbours=5).fit(HeadPass(model, train))
    weight, bias = (value.detach().double().numpy() for value in model[4].parameters())
    expected = independent(
        method, features_of(model, train), (*features_of(model, new), lambda f: f @ weight.T + bias), against
    )
    strange = detector.strangeness(HeadPass(model, new))
    np.testing.assert_allclose(strange, expected, rtol=1e-3 if method == "nearest_neighbours" else 1e-4, atol=1e-6)
    np.testing.assert_allclose(detector.score_samples(HeadPass(model, [images for images, _ in new])), -strange)


@pytest.mark.parametrize("method", METHODS[:4])
def test_bare_features_give_what_the_network_gives(method):
    model, train, new = network(), loader(), loader(20, seed=1)
    features, _, labels = features_of(model, train)
    options = {"neighbours": 5, "random_state": 1}
    by_network = FamiliarityDetector(method, **options).fit(HeadPass(model, train))
    by_features = FamiliarityDetector(method, **options).fit(torch.from_numpy(features), labels)
    np.testing.assert_allclose(
        by_features.strangeness(features_of(model, new)[0]), by_network.strangeness(HeadPass(model, new)), rtol=1e-5
    )
    assert by_features.offset_ == pytest.approx(by_network.offset_, rel=1e-5)


@pytest.mark.parametrize("method", ["mahalanobis", "class_gaussian", "nearest_neighbours"])
@pytest.mark.filterwarnings("ignore:Skipping check")
def test_scikit_learn_accepts_it(method):
    check_estimator(FamiliarityDetector(method, neighbours=1))


@pytest.mark.parametrize("method", SUMS)
def test_contributions_sum_to_the_score_and_maps_to_the_contributions(method):
    model, train, new = network(), loader(), loader(5, seed=1)
    detector = FamiliarityDetector(method, neighbours=5).fit(HeadPass(model, train))
    alarm = explain_alarm(detector, model, new[0][0])
    strange = detector.strangeness(HeadPass(model, new))
    np.testing.assert_allclose(alarm.strangeness, strange, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(alarm.table.groupby("sample").contribution.sum(), strange, rtol=1e-5, atol=1e-9)
    channels = alarm.table[alarm.table.channel >= 0].groupby("sample").contribution.sum()
    np.testing.assert_allclose(alarm.map.double().sum((1, 2, 3)), channels, rtol=1e-4, atol=1e-5)


def test_the_channel_that_was_moved_raises_the_alarm():
    model, train = network(), loader()
    features, _, labels = features_of(model, train)
    detector = FamiliarityDetector("class_gaussian").fit(features, labels)
    detector.fingerprint_ = None
    strange = features[:1].copy()
    strange[0, 3] += 10 * features[:, 3].std()
    terms, _ = detector.terms(detector_values(strange))
    contribution = terms.slope * strange + terms.offset
    assert contribution[0].argmax() == 3


def detector_values(features):
    from captum_classfilters.detection.familiarity import HeadValues

    return HeadValues.bare(features)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_alarms_go_off_for_the_promised_share_of_clean_images(method, seed):
    generator = np.random.default_rng(seed)
    model = network(seed)
    train = loader(400, seed=10 + seed)
    detector = FamiliarityDetector(method).fit(HeadPass(model, train))
    clean = loader(1500, seed=20 + seed, size=500)
    images, labels = (torch.cat(part) for part in zip(*clean, strict=True))
    order = torch.from_numpy(generator.permutation(len(images)))
    first, second = ([(images[part], labels[part])] for part in order.split(750))
    detector.calibrate(HeadPass(model, first), alpha=0.1)
    low, high = false_positive_interval(0.1, 750, 750, level=0.9999)
    assert low <= detector.alarms(HeadPass(model, second)).mean() <= high


@pytest.mark.parametrize("method", METHODS)
def test_files_bring_back_the_detector_and_its_calibration(method, tmp_path):
    pytest.importorskip("skops")
    model, train = network(), loader()
    detector = FamiliarityDetector(method, neighbours=3).fit(HeadPass(model, train))
    detector.calibrate(HeadPass(model, loader(60, seed=2)), alpha=0.1)
    detector.save(tmp_path / "detector.skops")
    again = FamiliarityDetector.load(tmp_path / "detector.skops")
    new = HeadPass(model, loader(20, seed=3))
    np.testing.assert_array_equal(again.p_value(new), detector.p_value(new))
    np.testing.assert_array_equal(again.predict(new), detector.predict(new))


def test_fewer_samples_than_channels_are_shrunk_and_a_class_without_samples_is_left_out():
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(10, 30)), np.arange(10) % 2
    detector = FamiliarityDetector().fit(features, labels)
    assert 0 < detector.shrinkage_ <= 1
    assert np.isfinite(detector.strangeness(generator.normal(size=(5, 30)))).all()
    model, unseen = network(), [(images, labels % 2) for images, labels in loader()]
    detector = FamiliarityDetector(against="predicted").fit(HeadPass(model, unseen))
    assert detector.counts_.tolist() == [100, 100, 0, 0]
    assert np.isfinite(detector.strangeness(HeadPass(model, loader(20, seed=1)))).all()
    assert detector.evidence(HeadPass(model, unseen)).shape == (200, CLASSES + 2)


def test_without_labels_the_predictions_stand_in():
    model, train = network(), loader()
    detector = FamiliarityDetector(label_source="prediction").fit(HeadPass(model, [images for images, _ in train]))
    features, logits, _ = features_of(model, train)
    expected = FamiliarityDetector().fit(features, logits.argmax(1))
    new = HeadPass(model, loader(20, seed=1))
    np.testing.assert_allclose(
        detector.strangeness(new), expected.strangeness(features_of(model, loader(20, seed=1))[0]), rtol=1e-4
    )


def test_only_so_many_images_are_kept_and_the_memory_does_not_grow(monkeypatch):
    from captum_classfilters.detection import familiarity

    monkeypatch.setattr(familiarity, "_NEAREST_OF", 50)
    model, train = network(), loader(200, size=30)
    detector = FamiliarityDetector("nearest_neighbours", neighbours=5).fit(HeadPass(model, train))
    assert detector.neighbours_.shape == (50, CHANNELS)
    unit = features_of(model, train)[0]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    rows = [int(np.abs(unit - row).sum(1).argmin()) for row in detector.neighbours_]
    assert len(set(rows)) == 50
    assert max(rows) > 100
    assert np.abs(unit[rows] - detector.neighbours_).max() < 1e-6


BARE = np.random.default_rng(0).normal(size=(20, 3))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: FamiliarityDetector("euclid").fit(BARE), OptionError, "method must be one of"),
        (lambda: FamiliarityDetector("energy").fit(BARE), OptionError, "pass a HeadPass"),
        (lambda: FamiliarityDetector(against="predicted").fit(BARE), OptionError, 'against="nearest"'),
        (lambda: FamiliarityDetector("relative_mahalanobis").fit(BARE), OptionError, "one class only"),
        (lambda: FamiliarityDetector("nearest_neighbours").fit(BARE), OptionError, "pass a smaller number"),
        (lambda: FamiliarityDetector(shrinkage=2).fit(BARE), OptionError, "shrinkage"),
        (lambda: FamiliarityDetector(shrinkage=0).fit(BARE[:3]), NonFiniteError, "shrinkage=None"),
        (lambda: FamiliarityDetector().fit(np.ones((5, 3))), NonFiniteError, "features that vary"),
        (lambda: FamiliarityDetector().fit(BARE, [0, 1]), LabelError, "one class for each row"),
        (lambda: FamiliarityDetector().fit(BARE).calibrate(BARE[:5], 0.05), CalibrationError, "at least 19"),
        (lambda: FamiliarityDetector("energy").fit(HeadPass(network(), loader())).predict(BARE), OptionError, "logits"),
        (lambda: FamiliarityDetector("energy").fit(HeadPass(network(), loader())).evidence(BARE), OptionError, "means"),
        (
            lambda: FamiliarityDetector().fit(HeadPass(network(), loader())).predict(HeadPass(network(1), loader())),
            MergeError,
            "fit a detector on this network",
        ),
        (
            lambda: explain_alarm(
                FamiliarityDetector("energy").fit(HeadPass(network(), loader())), network(), loader()[0][0]
            ),
            OptionError,
            "no sum over channels",
        ),
    ],
)
def test_refusals_say_what_to_do(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_covariance_without_shrinkage_is_the_empirical_one():
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(200, 5)), np.arange(200) % 2
    means = np.stack([features[labels == label].mean(0) for label in (0, 1)])
    inside = EmpiricalCovariance(assume_centered=True).fit(features - means[labels])
    new = generator.normal(size=(10, 5))
    expected = np.stack([inside.mahalanobis(new - mean) for mean in means]).min(0)
    np.testing.assert_allclose(FamiliarityDetector(shrinkage=0).fit(features, labels).strangeness(new), expected)
