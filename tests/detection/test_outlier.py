"""`PathOutlierDetector`: what is strange, where the line is drawn, what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from examples import planted
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from captum_classfilters.core import errors
from captum_classfilters.detection import ClassProfiles, PathOutlierDetector


@parametrize_with_checks([PathOutlierDetector(), PathOutlierDetector(contamination=0.1)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_attacked_ones_are_stranger_than_clean_ones():
    clean, _ = planted(90)
    later, attacked = planted(60, seed=1)
    detector = PathOutlierDetector().fit(clean).calibrate(planted(60, seed=2)[0], alpha=0.05)
    strange = np.concatenate([detector.strangeness(later), detector.strangeness(attacked)])
    assert roc_auc_score([0] * 60 + [1] * 60, strange) > 0.99
    assert detector.alarms(attacked).mean() > 0.95
    assert detector.alarms(later).mean() < 0.15


def test_what_the_network_says_is_what_a_path_is_measured_by():
    """The same bits are stranger under another answer: by an array this cannot be seen."""
    clean, _ = planted(90)
    later, _ = planted(30, seed=1)
    said_otherwise = replace(later, predictions=(later.predictions + 1) % 3)
    detector = PathOutlierDetector().fit(clean)
    assert (detector.strangeness(said_otherwise) > detector.strangeness(later)).all()
    by_array = PathOutlierDetector().fit(clean.bits())
    assert np.array_equal(by_array.strangeness(said_otherwise), by_array.strangeness(later))


def test_closer_to_the_wrong_class_is_stranger():
    """From the centre of its class to that of another, the class that the network says stays."""
    clean, _ = planted(300)
    detector = PathOutlierDetector().fit(clean)
    own, other = (clean[clean.predictions == label].bits().double().mean(0) > 0.5 for label in (0, 1))
    differ = (own != other).nonzero()[:, 0]
    walk = own.repeat(len(differ) + 1, 1)
    for step, channel in enumerate(differ):
        walk[step + 1 :, channel] = other[channel]
    codes = torch.from_numpy(np.packbits(walk.numpy(), axis=1, bitorder="little"))
    said = torch.zeros(len(walk), dtype=torch.int64)
    strange = detector.strangeness(replace(clean[: len(walk)], codes=codes, predictions=said, labels=said))
    assert len(differ) > 5
    assert (np.diff(strange) > 0).all()


def test_scores_of_paths_are_minus_the_whole_distance():
    (clean, _), (_, attacked) = planted(40), planted(20, seed=1)
    detector = PathOutlierDetector(smoothing=0.7).fit(clean)
    profiles = ClassProfiles(clean, 0.7)
    expected = -profiles.whole(profiles.distances(attacked))
    np.testing.assert_allclose(detector.score_samples(attacked), expected, rtol=0)
    np.testing.assert_allclose(detector.strangeness(attacked), -expected, rtol=0)
    assert detector.n_features_in_ == 30
    assert detector.offset_ == np.quantile(-profiles.whole(profiles.distances(clean, among=True)), 0.05)


def test_scores_of_arrays_by_loops():
    generator = np.random.default_rng(0)
    X, judged = generator.normal(size=(30, 4)), generator.normal(size=(5, 4))
    X[:, 2] = 7.0  # its deviation is 0
    detector = PathOutlierDetector().fit(X)
    expected = []
    for row in judged:
        total = 0.0
        for column, value in enumerate(row):
            mean = sum(X[:, column]) / 30
            deviation = 1.0 if column == 2 else sum(abs(x - mean) for x in X[:, column]) / 30
            total += abs(value - mean) / deviation
        expected.append(-total / 4)
    np.testing.assert_allclose(detector.score_samples(judged), expected, rtol=1e-12)


@pytest.mark.parametrize(("contamination", "share"), [("auto", 0.05), (0.1, 0.1), (0.5, 0.5)])
@pytest.mark.parametrize("kind", ["paths", "array"])
def test_contamination_is_the_share_of_outliers(contamination, share, kind):
    clean, _ = planted(200)
    X = clean if kind == "paths" else np.random.default_rng(0).normal(size=(200, 5))
    detector = PathOutlierDetector(contamination=contamination).fit(X)
    scores = detector.decision_function(X) + detector.offset_
    np.testing.assert_allclose(scores, detector.score_samples(X), rtol=1e-12)
    assert set(detector.predict(X)) == {-1, 1}
    assert np.array_equal(detector.predict(X) == 1, detector.decision_function(X) >= 0)
    # of paths those in fit are judged by the others, and seem less strange afterwards
    found = (detector.predict(X) == -1).mean()
    assert found == share if kind == "array" else 0 < found <= share
    later = detector.predict(planted(400, seed=3)[0]) if kind == "paths" else None
    assert later is None or abs((later == -1).mean() - share) < 0.1


def test_arrays_and_tensors_give_the_same_answers():
    clean, attacked = planted(40)
    bits = np.asarray(clean)
    fitted = PathOutlierDetector().fit(bits)
    for X in (clean.bits(), bits.astype(float), pd.DataFrame(bits).to_numpy(), clean.bits().float().requires_grad_()):
        other = PathOutlierDetector().fit(X)
        assert other.offset_ == pytest.approx(fitted.offset_)
        mine, expected = other.score_samples(attacked.bits()), fitted.score_samples(np.asarray(attacked))
        np.testing.assert_allclose(mine, expected, rtol=1e-12)
    # an array asks nothing of the network, so paths are taken for their bits
    assert np.array_equal(fitted.predict(attacked), fitted.predict(attacked.bits()))


def test_in_pipelines_and_cloned():
    clean, attacked = planted(60)
    inside = make_pipeline(StandardScaler(), PathOutlierDetector(contamination=0.2)).fit(np.asarray(clean, dtype=float))
    assert (inside.predict(np.asarray(clean, dtype=float)) == -1).sum() == 12
    detector = PathOutlierDetector(contamination=0.2, smoothing=3.0).fit(clean)
    again = clone(detector)
    assert again.get_params() == {"contamination": 0.2, "smoothing": 3.0}
    with pytest.raises(NotFittedError):
        again.predict(attacked)
    assert np.array_equal(again.fit(clean).predict(attacked), detector.predict(attacked))


def test_another_fit_forgets_the_calibration():
    clean, attacked = planted(60)
    detector = PathOutlierDetector().fit(clean).calibrate(planted(30, seed=1)[0])
    assert detector.alarms(attacked).any()
    detector.fit(planted(60, seed=2)[0])
    assert not hasattr(detector, "calibration_scores_")
    assert not hasattr(detector, "alpha_")
    with pytest.raises(errors.NotCalibratedError, match="PathOutlierDetector is not calibrated"):
        detector.alarms(attacked)


def test_another_kind_of_input_starts_anew():
    clean, attacked = planted(60)
    detector = PathOutlierDetector().fit(clean).fit(clean.bits())
    expected = PathOutlierDetector().fit(clean.bits())
    assert np.array_equal(detector.score_samples(attacked), expected.score_samples(attacked))
    detector.fit(pd.DataFrame(np.asarray(clean)).add_prefix("gate ")).fit(clean)
    assert np.array_equal(detector.predict(attacked), PathOutlierDetector().fit(clean).predict(attacked))
    assert not hasattr(detector, "feature_names_in_")


@pytest.mark.parametrize("contamination", [0, 0.6, -0.1, math.nan, "much", True, None])
def test_bad_contamination_is_refused(contamination):
    with pytest.raises(errors.OptionError, match=r'contamination must be in \(0, 0.5\] or "auto", got'):
        PathOutlierDetector(contamination=contamination).fit(planted(9)[0])


@pytest.mark.parametrize("smoothing", [0, -1, math.nan, "2"])
@pytest.mark.parametrize("kind", ["paths", "array"])
def test_bad_smoothing_is_refused(smoothing, kind):
    clean, _ = planted(9)
    with pytest.raises(errors.OptionError, match="smoothing must be a finite number above 0; got"):
        PathOutlierDetector(smoothing=smoothing).fit(clean if kind == "paths" else clean.bits())


@pytest.mark.parametrize(("judged", "error", "message"), [
    (planted(9, fingerprint="0" * 16)[0], errors.MergeError, "of another network than those the detector was fitted"),
    (planted(9, layers=("a", "b", "c"))[0], errors.MergeError, "of other layers"),
    (planted(9)[0].bits(), errors.OptionError, "was fitted on Paths, which hold .* got Tens"),
    (np.zeros((2, 30)), errors.OptionError, "was fitted on Paths"),
], ids=["network", "layers", "tensor", "array"])  # fmt: skip
def test_other_paths_than_those_of_fit_are_refused(judged, error, message):
    detector = PathOutlierDetector().fit(planted(30)[0])
    for ask in (detector.score_samples, detector.predict, detector.strangeness, detector.calibrate):
        with pytest.raises(error, match=message):
            ask(judged)


def test_what_scikit_learn_refuses():
    clean, _ = planted(30)
    with pytest.raises(ValueError, match="contains NaN"):
        PathOutlierDetector().fit(clean.bits().float() / 0)
    with pytest.raises(ValueError, match="X has 3 features, but PathOutlierDetector is expecting 30"):
        PathOutlierDetector().fit(clean.bits()).predict(np.zeros((2, 3)))
    with pytest.raises(errors.OptionError, match="expected Paths of clean images, got none"):
        PathOutlierDetector().fit(clean[:0])
    with pytest.raises(NotFittedError):
        PathOutlierDetector().calibrate(clean)
