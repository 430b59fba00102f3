"""`PathOutlierDetector`: fitted on clean paths alone, since nobody has tomorrow's attack.

N paths, K channels in all.
"""

import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from captum_classfilters.core.errors import OptionError
from captum_classfilters.decoupling import Paths
from captum_classfilters.detection import saved
from captum_classfilters.detection.conformal import Calibrated
from captum_classfilters.detection.profiles import Array, ClassProfiles
from captum_classfilters.detection.tables import as_array


class PathOutlierDetector(Calibrated, OutlierMixin, BaseEstimator):
    """How far a path lies from those of clean images that the network says the same of.

    With `Paths` the distance is that of `ClassProfiles`, over all channels, to the class the network says. An array
    does not say which class that is: all rows are of one, and the distance is the mean over columns of ``|x - mean|``,
    in units of that column's mean deviation.

    Follows scikit-learn's outlier detectors: `predict` gives 1 for clean and -1 for outliers, `score_samples` is
    larger for what is clean; `calibrate` adds alarms at a given rate of false positives.

    Args:
        contamination: The share of paths seen in `fit` that `predict` calls outliers, in (0, 0.5]; ``"auto"``: .05.
        smoothing: See `ClassProfiles`.

    Attributes:
        offset_: ``decision_function = score_samples - offset_``; what lies below 0 is an outlier.
        n_features_in_: Columns.
    """

    profiles_: ClassProfiles | None
    offset_: float
    mean_: Array
    scale_: Array

    def __init__(self, *, contamination: float | str = "auto", smoothing: float = 2.0) -> None:
        self.contamination = contamination
        self.smoothing = smoothing

    def fit(self, X: Any, y: Any = None) -> "PathOutlierDetector":  # noqa: N803
        """Learn what clean paths look like.

        Args:
            X: ``(N, K)`` array, tensor or `Paths` of clean images.
            y: Ignored.

        Raises:
            OptionError: ``contamination`` or ``smoothing`` out of range.
            ValueError: What scikit-learn refuses, as NaN.
        """
        self._forget_calibration()
        share = self._share()
        if not isinstance(self.smoothing, Real) or not self.smoothing > 0:
            raise OptionError(f"smoothing must be above 0, got {self.smoothing!r}")
        self.profiles_ = None
        if isinstance(X, Paths):
            self.profiles_ = ClassProfiles(X, self.smoothing)
            validate_data(self, np.asarray(X))
            scores = -self.profiles_.whole(self.profiles_.distances(X, among=True))
        else:
            values = validate_data(self, as_array(X), dtype=float)
            self.mean_ = values.mean(0)
            deviation = np.abs(values - self.mean_).mean(0)
            self.scale_ = np.where(deviation > 0, deviation, 1.0)
            scores = self._of_array(values)
        self.offset_ = float(np.quantile(scores, share))
        return self

    def score_samples(self, X: Any) -> Array:  # noqa: N803
        """Minus the distance, ``(N,)``: larger is more like clean."""
        check_is_fitted(self)
        if self.profiles_ is None:
            return self._of_array(validate_data(self, as_array(X), dtype=float, reset=False))
        if not isinstance(X, Paths):
            raise OptionError(
                f"this detector was fitted on Paths, of which it asks what the network says; got {type(X).__name__}: "
                "give Paths, or fit it on arrays"
            )
        return np.negative(self.profiles_.whole(self.profiles_.distances(X)))

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """``score_samples - offset_``, ``(N,)``."""
        return np.asarray(self.score_samples(X) - self.offset_)

    def predict(self, X: Any) -> Array:  # noqa: N803
        """1 for clean, -1 for outliers, ``(N,)``."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def strangeness(self, X: Any) -> Array:  # noqa: N803
        """The distance, ``(N,)``."""
        return np.negative(self.score_samples(X))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, calibration and all, with skops: nothing in the file runs when it is read."""
        saved.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trusted: Sequence[str] = ()) -> "PathOutlierDetector":
        """Read what `save` wrote; see `PathDetector.load`."""
        found: PathOutlierDetector = saved.load(cls, path, trusted)
        return found

    def _share(self) -> float:
        share = 0.05 if self.contamination == "auto" else self.contamination
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 0.5:
            raise OptionError(f'contamination must be in (0, 0.5] or "auto", got {self.contamination!r}')
        return float(share)

    def _of_array(self, values: Array) -> Array:
        scores: Array = -(np.abs(values - self.mean_) / self.scale_).mean(1)
        return scores
