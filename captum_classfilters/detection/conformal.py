"""Split-conformal p-values: how rarely is a clean image as strange as this one?

n clean images are used for calibration, m images are judged: by their paths, or by the head's input.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from scipy import stats

from captum_classfilters.core.check import number
from captum_classfilters.core.errors import CalibrationError, NotCalibratedError
from captum_classfilters.detection.features import Array


def p_values(scores: Array, calibration: Array) -> Array:
    """Conformal p-values, ``(1 + #{calibration >= score}) / (n + 1)``.

    The p-value of a clean path is at most alpha with probability at most alpha. This holds if the clean paths judged
    later are drawn like those for calibration. Equal scores raise the p-value, so with coarse scores the rate of false
    alarms is lower than alpha.

    Source: Vovk, Gammerman & Shafer 2005, "Algorithmic learning in a random world", eq. 2.20, with a held-out set.

    Args:
        scores: ``(m,)``, larger is stranger.
        calibration: ``(n,)`` scores of clean paths that nothing was fitted on.

    Example:
        >>> p_values(np.array([0.5, 9.0]), np.array([0.0, 1.0, 2.0])).tolist()
        [0.75, 0.25]
    """
    below = np.searchsorted(np.sort(calibration), scores, side="left")
    return (1 + len(calibration) - below) / (len(calibration) + 1)


def goes_off(p: Array, alpha: float) -> Array:
    """Alarms, bool, from p-values of any shape."""
    # a little more than alpha, because in floats 1 - 0.9 is less than 0.1, the smallest p-value of nine paths
    alarms: Array = p <= alpha * (1 + 1e-9)
    return alarms


def false_positive_interval(alpha: float, calibration: int, judged: int, level: float = 0.99) -> tuple[float, float]:
    """Interval ``(low, high)`` of the share of false positives that a calibrated detector gives by chance alone.

    The calibration set is random too, so the number of false positives is beta-binomial, which is wider than binomial.

    Source: Vovk 2012, "Conditional validity of inductive conformal predictors", proposition 2a.

    Args:
        alpha: The rate passed to `Calibrated.calibrate`.
        calibration: n.
        judged: Number of clean paths that were judged.
        level: Coverage of the interval.

    Raises:
        CalibrationError: n is too small for alpha.

    Example:
        >>> low, high = false_positive_interval(0.05, 1000, 1000)
        >>> round(low, 3), round(high, 3)
        (0.027, 0.077)
    """
    check_enough(calibration, alpha)
    allowed = math.floor(alpha * (calibration + 1) + 1e-9)
    spread = stats.betabinom(judged, allowed, calibration + 1 - allowed)
    return float(spread.ppf(0.5 - level / 2)) / judged, float(spread.ppf(0.5 + level / 2)) / judged


def check_enough(count: int, alpha: float) -> None:
    """Refuse a calibration set that cannot give p-values as small as alpha."""
    number(alpha, "alpha", 0, 1, open_ends=True, meaning="the rate of false positives")
    # 1e-9: rounding may make 1 / 0.05 a little more than 20
    if count < (needed := math.ceil(1 / alpha - 1e-9) - 1):
        raise CalibrationError(
            f"a false-positive rate of {alpha:g} needs at least {needed} clean images for calibration, got {count}; "
            "give more, or a larger alpha"
        )


class Calibrated(ABC):
    """A detector with p-values, and with alarms at a given rate, from clean images that it was not fitted on.

    A subclass defines `strangeness`, which is larger for images that are more likely adversarial, or unfamiliar.
    """

    @abstractmethod
    def strangeness(self, X: Any) -> Array:  # noqa: N803
        """``(m,)`` float64."""

    def calibrate(self, X_clean: Any, alpha: float = 0.05) -> Any:  # noqa: N803
        """Set the alarm to go off for a share ``alpha`` of clean images, by images the detector was not fitted on.

        Args:
            X_clean: What `strangeness` takes, of clean images, drawn like those judged later. Do not use the network's
                training images, whose paths and features differ from those of new images. Include all images that
                should raise no alarm, such as misclassified and noisy ones.
            alpha: The rate of false positives.

        Returns:
            Itself.

        Raises:
            CalibrationError: n is below ``1 / alpha - 1``.
        """
        scores = np.sort(self.strangeness(X_clean))
        check_enough(len(scores), alpha)
        self.calibration_scores_, self.alpha_ = scores, alpha
        return self

    def p_value(self, X: Any) -> Array:  # noqa: N803
        """How often a clean image is at least as strange, ``(m,)``; see `p_values`.

        Raises:
            NotCalibratedError: `calibrate` was not called.
        """
        return p_values(self.strangeness(X), self._scores())

    def alarms(self, X: Any, alpha: float | None = None) -> Array:  # noqa: N803
        """Alarms, ``(m,)`` bool: ``p_value(X) <= alpha``.

        Args:
            X: What `strangeness` takes.
            alpha: The rate of false positives; None: the rate passed to `calibrate`.

        Raises:
            NotCalibratedError: `calibrate` was not called.
            CalibrationError: There are too few images for this rate.
        """
        scores = self._scores()
        if alpha is None:
            alpha = self.alpha_
        check_enough(len(scores), alpha)
        return goes_off(self.p_value(X), alpha)

    def _scores(self) -> Array:
        if not hasattr(self, "calibration_scores_"):
            raise NotCalibratedError(
                f"{type(self).__name__} is not calibrated: an alarm needs a rate of false positives; call "
                "calibrate(clean, alpha=0.05) with clean images that it was not fitted on"
            )
        return self.calibration_scores_

    def _forget_calibration(self) -> None:
        """Drop the scores of an earlier `fit`, which do not belong to this one."""
        for name in ("calibration_scores_", "alpha_"):
            self.__dict__.pop(name, None)
