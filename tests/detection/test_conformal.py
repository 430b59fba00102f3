"""Conformal p-values, alarms at a given rate, and how far that rate scatters."""

import math

import numpy as np
import pytest
from examples import planted
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from captum_classfilters.core import errors
from captum_classfilters.detection import PathOutlierDetector
from captum_classfilters.detection.conformal import Calibrated, check_enough, false_positive_interval, p_values

# few values: many are equal
SCORES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.1, 0.5, 3.0, 1e9]), max_size=25)


class Given(Calibrated):
    """Its input is how strange it is."""

    def strangeness(self, X):  # noqa: N803
        return np.asarray(X, float)


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES)
def test_p_values_count_what_is_at_least_as_strange(scores, calibration):
    naive = []
    for score in scores:
        count = 1
        for other in calibration:
            if other >= score:
                count += 1
        naive.append(count / (len(calibration) + 1))
    found = p_values(np.array(scores), np.array(calibration))
    assert found.tolist() == naive
    assert not len(found) or 0 < found.min() <= found.max() <= 1


def test_equal_scores_count_against_the_alarm():
    assert p_values(np.array([1.0, 1.0 + 1e-12]), np.ones(9)).tolist() == [1.0, 0.1]


def test_what_is_stranger_has_no_larger_p_value():
    generator = np.random.default_rng(0)
    found = p_values(np.sort(generator.normal(size=200)), generator.normal(size=50))
    assert (np.diff(found) <= 0).all()
    assert found[0] > 0.9
    assert found[-1] < 0.1


def test_clean_ones_are_alarms_as_often_as_was_asked_for():
    """Over many draws of both sets: the number of alarms of all is that of a beta-binomial for each."""
    generator, alpha, n, m, draws = np.random.default_rng(0), 0.1, 99, 200, 400
    counts = []
    for _ in range(draws):
        detector = Given().calibrate(generator.normal(size=n), alpha=alpha)
        counts.append(int(detector.alarms(generator.normal(size=m)).sum()))
    # known mean and variance, of sums of 400: three in a thousand lie outside by chance, and this seed is not one
    expected = stats.betabinom(m, 10, 90)
    assert abs(np.mean(counts) - m * alpha) < 3 * expected.std() / draws**0.5
    assert 0.8 < np.var(counts) / expected.var() < 1.2
    # a binomial would scatter less by far: the calibration set is a draw as well
    assert np.var(counts) > 2 * m * alpha * (1 - alpha)
    low, high = false_positive_interval(alpha, n, m)
    inside = np.mean([low <= count / m <= high for count in counts])
    assert 0.97 < inside <= 1


def test_the_rate_of_a_detector_lies_in_the_interval():
    clean, _ = planted(1200)
    detector = PathOutlierDetector().fit(clean[:300]).calibrate(clean[300:600], alpha=0.05)
    low, high = false_positive_interval(0.05, 300, 600)
    assert low <= detector.alarms(clean[600:]).mean() <= high


@pytest.mark.parametrize(("alpha", "n", "m", "level"), [
    (0.05, 19, 50, 0.99), (0.05, 200, 300, 0.99), (0.1, 99, 1000, 0.9), (0.013, 1000, 77, 0.95), (0.29, 99, 200, 0.99),
])  # fmt: skip
def test_the_interval_is_that_of_a_beta_binomial(alpha, n, m, level):
    # of how many there may be among n + 1; by fractions, since 0.29 * 100 is 28.999999999999996
    allowed = int(round(alpha * 1000) * (n + 1) // 1000)
    chance = [
        math.comb(m, k)
        * math.exp(
            math.lgamma(k + allowed)
            + math.lgamma(m - k + n + 1 - allowed)
            - math.lgamma(m + n + 1)
            + math.lgamma(n + 1)
            - math.lgamma(allowed)
            - math.lgamma(n + 1 - allowed)
        )
        for k in range(m + 1)
    ]
    sums = np.cumsum(chance)
    assert sums[-1] == pytest.approx(1)
    low, high = (int(np.argmax(sums >= tail)) for tail in (0.5 - level / 2, 0.5 + level / 2))
    assert false_positive_interval(alpha, n, m, level) == (low / m, high / m)


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.5, 1), (0.03, 33), (0.3, 3)])
def test_too_few_clean_ones_are_told_how_many_it_takes(alpha, needed):
    strange = np.full(3, 1e6)
    for call in (
        lambda: check_enough(needed - 1, alpha),
        lambda: Given().calibrate(np.arange(needed - 1), alpha),
        lambda: Given().calibrate(np.arange(needed), alpha).alarms(strange, alpha * 0.7),
        lambda: false_positive_interval(alpha, needed - 1, 100),
    ):
        with pytest.raises(errors.CalibrationError, match=r"needs at least .* clean images for calibration, got"):
            call()
    with pytest.raises(errors.CalibrationError, match=f"rate of {alpha:g} needs at least {needed} clean images"):
        check_enough(needed - 1, alpha)
    # as few as these are enough for an alarm
    assert Given().calibrate(np.arange(needed), alpha).alarms(strange).all()


def test_a_rate_that_is_computed_gives_alarms_too():
    """1 - 0.9 is a little less than 0.1, the smallest p-value that nine give."""
    assert Given().calibrate(np.arange(9), 1 - 0.9).alarms([100.0]).all()


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, math.nan, True, "0.05", None, 5])
def test_rates_are_between_0_and_1(alpha):
    detector = Given().calibrate(np.arange(100))
    for call in (lambda: detector.calibrate(np.arange(100), alpha), lambda: false_positive_interval(alpha, 100, 100)):
        with pytest.raises(errors.OptionError, match="alpha must be a number between 0 and 1, the rate of"):
            call()
    if alpha is not None:  # there it stands for that of calibrate
        with pytest.raises(errors.OptionError, match="between 0 and 1, the rate of false positives"):
            detector.alarms([1.0], alpha)
    assert detector.alpha_ == 0.05


def test_calibration_is_kept_and_another_rate_may_be_asked_for():
    detector = Given()
    for ask in (detector.p_value, detector.alarms):
        with pytest.raises(errors.NotCalibratedError, match=r"Given is not calibrated: .* call calibrate\(clean"):
            ask([1.0])
    assert detector.calibrate([3, 1, 0, 2, *range(4, 99)], alpha=0.05) is detector
    assert detector.calibration_scores_.tolist() == list(range(99))
    assert detector.p_value([97.5, 98.5, -1]).tolist() == [0.02, 0.01, 1.0]
    judged = [93.5, 94.5, 97.5, 98.5]
    assert detector.alarms(judged).tolist() == [False, True, True, True]
    assert detector.alarms(judged, alpha=0.02).tolist() == [False, False, True, True]
    assert detector.alarms(judged, alpha=0.01).tolist() == [False, False, False, True]
    with pytest.raises(errors.CalibrationError, match=r"rate of 0\.005 needs at least 199 clean images .* got 99"):
        detector.alarms(judged, alpha=0.005)
    assert detector.calibrate(np.zeros(9), alpha=0.2).alarms(judged).all()
