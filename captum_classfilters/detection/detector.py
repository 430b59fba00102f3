"""`PathDetector`: any scikit-learn classifier, told clean paths from adversarial ones.

N paths, K channels in all.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from captum_classfilters.core.errors import OptionError
from captum_classfilters.decoupling import Paths
from captum_classfilters.detection import saved
from captum_classfilters.detection.conformal import Calibrated
from captum_classfilters.detection.profiles import Array, ClassProfiles
from captum_classfilters.detection.tables import PathTable, as_array, check_features


def _has(name: str) -> Any:
    """Whether the classifier inside has a method, fitted or not."""

    def check(detector: "PathDetector") -> bool:
        # by name: an ensemble without members is false
        inside = detector.estimator_ if hasattr(detector, "estimator_") else detector._inside()
        getattr(inside, name)  # its AttributeError says more than False
        return True

    return check


class PathDetector(Calibrated, ClassifierMixin, BaseEstimator):
    """Tells adversarial images from clean ones by their calculation paths.

    A scikit-learn classifier like any other: it takes arrays and tensors ``(N, K)``, and `Paths`, goes into pipelines,
    ``GridSearchCV`` and ``cross_val_score`` (with ``groups``: see `stack_pairs`). `predict` is the classifier's own;
    `calibrate` adds alarms at a given rate of false positives.

    **It sees attacks like those it has learnt from.** An attacker who knows of it can avoid it; see `AdaptivePGD`.

    Source: "Interpretable neural network decoupling", section 4.4, table 4: random forest, AdaBoost, gradient boosting
    on bits.

    Args:
        estimator: Any scikit-learn classifier of two classes, cloned; None: a random forest of 100 trees, which
            ``random_state`` seeds.
        features: What is read off `Paths`: ``"bits"`` as in the paper; ``"logits"`` of the gates, which must have been
            collected; ``"profiles"``: how far the path is from those of clean images that the network says the same of,
            layer by layer; or several in a tuple. Arrays are taken as they are.
        profiles: Of clean images, for ``features="profiles"``: ``ClassProfiles(decoupler.paths(loader))``. Not of those
            in `fit`: twins of what the profiles are made of lie near them, and a detector would learn that.
        random_state: Of the forest that None stands for.

    Attributes:
        classes_: The two labels; the second is adversarial.
        estimator_: The fitted classifier.
        n_features_in_: Columns.

    Example:
        >>> clean, attacked = np.eye(6), 1 - np.eye(6)
        >>> detector = PathDetector(random_state=0).fit(np.vstack([clean, attacked]), [0] * 6 + [1] * 6)
        >>> detector.predict([[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1]]).tolist()
        [0, 1]
        >>> bool(detector.calibrate(clean, alpha=0.2).is_adversarial(attacked).all())
        True
    """

    classes_: Array
    estimator_: Any
    table_: PathTable | None

    def __init__(
        self,
        estimator: Any = None,
        *,
        features: str | Sequence[str] = "bits",
        profiles: ClassProfiles | None = None,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.features = features
        self.profiles = profiles
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "PathDetector":  # noqa: N803
        """Learn from paths and their labels.

        Args:
            X: ``(N, K)`` array, tensor or `Paths`, as `stack_pairs` gives them.
            y: ``(N,)`` two labels; the greater one is adversarial.

        Raises:
            OptionError: Unknown ``features``, or such as an array has not.
            ValueError: What scikit-learn refuses: NaN, a single class, more than two.
        """
        self._forget_calibration()
        names = check_features(self.features)
        if isinstance(X, Paths):
            _, y = validate_data(self, np.zeros((len(X), 1)), y)
        else:
            X, y = validate_data(self, as_array(X), y)
            if names != ("bits",):
                raise OptionError(f"features={self.features!r} are read off Paths; got {type(X).__name__}: give those")
        check_classification_targets(y)
        if (kind := type_of_target(y)) != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(
                f"expected paths of two classes, clean and adversarial, got only 1 class: {self.classes_[0]!r}; clean "
                "paths alone are for PathOutlierDetector"
            )
        self.table_ = PathTable(names, X, self.profiles) if isinstance(X, Paths) else None
        values = X if self.table_ is None else self.table_.read(X)
        self.n_features_in_ = values.shape[1]
        self.estimator_ = self._inside().fit(values, y)
        return self

    def predict(self, X: Any) -> Array:  # noqa: N803
        """The classifier's own answer, ``(N,)`` of `classes_`."""
        return np.asarray(self._ask("predict", X))

    @available_if(_has("predict_proba"))
    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """The classifier's own, ``(N, 2)``: clean, adversarial."""
        return np.asarray(self._ask("predict_proba", X))

    @available_if(_has("decision_function"))
    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """The classifier's own, ``(N,)``."""
        return np.asarray(self._ask("decision_function", X))

    def strangeness(self, X: Any) -> Array:  # noqa: N803
        """The probability of being adversarial, or the decision function where there is none: ``(N,)``."""
        if hasattr(self, "predict_proba"):
            return np.asarray(self.predict_proba(X)[:, 1], float)
        return np.asarray(self.decision_function(X), float)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, calibration and all, with skops: nothing in the file runs when it is read."""
        saved.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trusted: Sequence[str] = ()) -> "PathDetector":
        """Read what `save` wrote.

        Args:
            path: The file.
            trusted: Types that you expect in it, by full name, beyond those that skops and this package trust. Of
                forests and AdaBoost that is ``"sklearn.tree._tree.Tree"``: nothing runs when it is read, but a tree
                that was tampered with can read outside its memory when it predicts. Trust whom the file is from.

        Raises:
            FileFormatError: The file is broken, of something else, or has types that are not trusted.
        """
        found: PathDetector = saved.load(cls, path, trusted)
        return found

    def _inside(self) -> Any:
        if self.estimator is not None:
            return clone(self.estimator)
        return RandomForestClassifier(random_state=self.random_state)

    def _ask(self, method: str, X: Any) -> Any:  # noqa: N803
        check_is_fitted(self)
        return getattr(self.estimator_, method)(self._values(X))

    def _values(self, X: Any) -> Any:  # noqa: N803
        if self.table_ is None:
            return validate_data(self, as_array(X), reset=False)
        if isinstance(X, Paths):
            return self.table_.read(X)
        if self.table_.features != ("bits",):
            raise OptionError(f"this detector reads {self.table_.features} off Paths, got {type(X).__name__}")
        return validate_data(self, as_array(X), reset=False)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        if self.estimator is not None:
            tags.non_deterministic = get_tags(self.estimator).non_deterministic
        return tags
