"""The detectors: `PathDetector` learns from clean and adversarial paths, `PathOutlierDetector` from clean ones alone.

Both are saved by skops: a file names its types, and only trusted types are loaded.
N paths, K channels in all layers together.
"""

import io
import os
import zipfile
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, OutlierMixin, clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from captum_classfilters._version import __version__
from captum_classfilters.core.check import number
from captum_classfilters.core.errors import FileFormatError, OptionError, brief
from captum_classfilters.core.files import replacing
from captum_classfilters.decoupling import Paths
from captum_classfilters.detection.conformal import Calibrated
from captum_classfilters.detection.features import Array, ClassProfiles, PathTable, as_array, check_features

# In version 2 the detectors' classes moved into this file
_KIND, _VERSION = "captum_classfilters detector", 2
_ROOM = "captum_classfilters.detection"
# Bytes that a file may hold beyond its size: detectors are not packed, but sparse arrays in them are
_UNPACKED = 2**26
# our types, which hold only numbers and names; skops itself trusts types of scikit-learn and numpy
_TRUSTED = (
    f"{_ROOM}.detectors.PathDetector",
    f"{_ROOM}.detectors.PathOutlierDetector",
    f"{_ROOM}.features.ClassProfiles",
    f"{_ROOM}.features.PathTable",
    f"{_ROOM}.familiarity.FamiliarityDetector",
    f"{_ROOM}.gaussians.Diagonal",
    f"{_ROOM}.gaussians.Gaussian",
    f"{_ROOM}.gaussians.Residual",
)


def _has(name: str) -> Any:
    """Whether the classifier inside has a method, fitted or not."""

    def check(detector: "PathDetector") -> bool:
        # not by truth value, because an ensemble without members is false
        inside = detector.estimator_ if hasattr(detector, "estimator_") else detector._inside()
        getattr(inside, name)  # its AttributeError says more than False
        return True

    return check


class PathDetector(Calibrated, ClassifierMixin, BaseEstimator):
    """Tells adversarial images from clean ones by their calculation paths.

    It is a scikit-learn classifier, takes arrays and tensors ``(N, K)`` and `Paths`, and works in pipelines,
    ``GridSearchCV`` and ``cross_val_score`` (with ``groups``: see `PathPairs.stack`). `predict` calls the classifier
    inside; `calibrate` adds alarms at a given rate of false positives.

    **It detects attacks like those that it was trained on.** An attacker who knows of it can avoid it; see
    `AdaptivePGD`.

    Source: "Interpretable neural network decoupling", section 4.4, table 4: random forest, AdaBoost, gradient boosting
    on bits.

    Args:
        estimator: Any scikit-learn classifier of two classes, cloned; None: a random forest of 100 trees, which
            ``random_state`` seeds.
        features: What is read from `Paths`: ``"bits"`` as in the paper; ``"logits"`` of the gates, which must have been
            collected; ``"profiles"``: distances of the path, layer by layer, from paths of clean images of the
            predicted class; or several in a tuple. Arrays are taken as they are.
        profiles: Profiles of clean images, for ``features="profiles"``: ``ClassProfiles(decoupler.paths(loader))``. Use
            other images than those in `fit`: the paths behind the profiles lie nearer to them than new paths do, and a
            detector would learn that.
        random_state: Seed of the default forest.

    Attributes:
        classes_: The two labels; the second is adversarial.
        estimator_: The fitted classifier.
        n_features_in_: Number of columns.

    Example:
        >>> clean, attacked = np.eye(6), 1 - np.eye(6)
        >>> detector = PathDetector(random_state=0).fit(np.vstack([clean, attacked]), [0] * 6 + [1] * 6)
        >>> detector.predict([[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1]]).tolist()
        [0, 1]
        >>> bool(detector.calibrate(clean, alpha=0.2).alarms(attacked).all())
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
            OptionError: A feature is unknown, or it needs `Paths` and ``X`` is an array.
            ValueError: scikit-learn refuses the input: NaN, a single class, more than two.
        """
        self._forget_calibration()
        names = check_features(self.features)
        if isinstance(X, Paths):
            _, y = validate_data(self, np.zeros((len(X), 1)), y)
        else:
            X, y = validate_data(self, as_array(X), y)
            if names != ("bits",):
                raise OptionError(f"features={self.features!r} are read off Paths, got {type(X).__name__}; pass Paths")
        check_classification_targets(y)
        if (kind := type_of_target(y)) != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(
                f"expected paths of two classes, clean and adversarial, got only 1 class: {self.classes_[0]!r}; for "
                "clean paths alone use PathOutlierDetector"
            )
        self.table_ = PathTable(names, X, self.profiles) if isinstance(X, Paths) else None
        values = X if self.table_ is None else self.table_.read(X)
        self.n_features_in_ = values.shape[1]
        self.estimator_ = self._inside().fit(values, y)
        return self

    def predict(self, X: Any) -> Array:  # noqa: N803
        """The classifier's predictions, ``(N,)``, values of `classes_`."""
        return np.asarray(self._ask("predict", X))

    @available_if(_has("predict_proba"))
    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """The classifier's probabilities, ``(N, 2)``: clean, adversarial."""
        return np.asarray(self._ask("predict_proba", X))

    @available_if(_has("decision_function"))
    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """The classifier's decision function, ``(N,)``."""
        return np.asarray(self._ask("decision_function", X))

    def strangeness(self, X: Any) -> Array:  # noqa: N803
        """The probability of being adversarial, or the decision function where there is none: ``(N,)``."""
        if hasattr(self, "predict_proba"):
            return np.asarray(self.predict_proba(X)[:, 1], float)
        return np.asarray(self.decision_function(X), float)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the detector and its calibration with skops: nothing in the file runs when it is read."""
        save_detector(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trusted: Sequence[str] = ()) -> "PathDetector":
        """Read what `save` wrote.

        Args:
            path: The file.
            trusted: Full names of types that you expect in the file and that skops and this package do not trust.
                Without them the error names those that the file needs. Forests and AdaBoost need
                ``["sklearn.tree._tree.Tree"]``. Loading runs no code, but a manipulated tree can read outside its
                memory when it predicts; trust it only in files of people whom you trust.

        Raises:
            FileFormatError: The file is broken, holds something else, or holds types that are not trusted.
        """
        detector: PathDetector = load_detector(cls, path, trusted)
        return detector

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
            features = self.table_.features
            raise OptionError(f"this detector reads {features} off Paths, got {type(X).__name__}; pass Paths")
        return validate_data(self, as_array(X), reset=False)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        if self.estimator is not None:
            tags.non_deterministic = get_tags(self.estimator).non_deterministic
        return tags


class PathOutlierDetector(Calibrated, OutlierMixin, BaseEstimator):
    """Measures how far a path lies from those of clean images of its predicted class; fitted on clean paths alone.

    With `Paths` the distance is that of `ClassProfiles`, over all channels, to the predicted class. An array has no
    predicted classes: all rows count as one class, and the distance is the mean over columns of ``|x - mean|``, in
    units of that column's mean deviation.

    It follows scikit-learn's outlier detectors: `predict` gives 1 for clean and -1 for outliers, `score_samples` is
    larger for clean paths; `calibrate` adds alarms at a given rate of false positives.

    Args:
        contamination: Share of the paths in `fit` that `predict` calls outliers, in (0, 0.5]; ``"auto"``: .05.
        smoothing: See `ClassProfiles`.

    Attributes:
        offset_: ``decision_function = score_samples - offset_``; values below 0 are outliers.
        n_features_in_: Number of columns.
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
            OptionError: ``contamination`` or ``smoothing`` is out of range.
            ValueError: scikit-learn refuses the input, for example NaN.
        """
        self._forget_calibration()
        share = self._share()
        number(self.smoothing, "smoothing", 0, open_ends=True)
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
        """Minus the distance, ``(N,)``; larger for clean paths."""
        check_is_fitted(self)
        if self.profiles_ is None:
            return self._of_array(validate_data(self, as_array(X), dtype=float, reset=False))
        if not isinstance(X, Paths):
            raise OptionError(
                f"this detector was fitted on Paths, which hold the class that the network says, got "
                f"{type(X).__name__}; pass Paths, or fit it on arrays"
            )
        return np.negative(self.profiles_.whole(self.profiles_.distances(X)))

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """``score_samples - offset_``, ``(N,)``."""
        return np.asarray(self.score_samples(X) - self.offset_)

    def predict(self, X: Any) -> Array:  # noqa: N803
        """1 for clean, -1 for outliers, ``(N,)``."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def strangeness(self, X: Any) -> Array:  # noqa: N803
        """The distance, ``(N,)``; larger for outliers."""
        return np.negative(self.score_samples(X))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the detector and its calibration with skops: nothing in the file runs when it is read."""
        save_detector(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trusted: Sequence[str] = ()) -> "PathOutlierDetector":
        """Read what `save` wrote; see `PathDetector.load`."""
        detector: PathOutlierDetector = load_detector(cls, path, trusted)
        return detector

    def _share(self) -> float:
        share = 0.05 if self.contamination == "auto" else self.contamination
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 0.5:
            raise OptionError(f'contamination must be in (0, 0.5] or "auto", got {self.contamination!r}')
        return float(share)

    def _of_array(self, values: Array) -> Array:
        scores: Array = -(np.abs(values - self.mean_) / self.scale_).mean(1)
        return scores


def save_detector(detector: Any, path: str | os.PathLike[str]) -> None:
    """Write a detector; see `PathDetector.save`."""
    skops = _skops()
    content = {"kind": _KIND, "version": _VERSION, "package": __version__, "detector": detector}
    with replacing(path) as beside:
        skops.dump(content, beside)


def load_detector(kind: type, path: str | os.PathLike[str], trusted: Sequence[str]) -> Any:
    """Read a detector; see `PathDetector.load`."""
    skops = _skops()
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}")
    if not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise FileFormatError(f"{path} is {what}, not a file; give the name of a file that {kind.__name__}.save wrote")
    if isinstance(trusted, str) or not isinstance(trusted, Iterable):
        raise OptionError(
            f"trusted must be a list of full names of types, got {trusted!r}. Call load(path) without it: what the "
            "file needs, if anything, is then named; there is no way to trust whatever a file holds"
        )
    allowed = {*_TRUSTED, *trusted}
    try:
        _check_size(path)
        if strangers := sorted(set(skops.get_untrusted_types(file=path)) - allowed):
            if any(name.startswith(f"{_ROOM}.") for name in strangers):
                raise FileFormatError(
                    f"{path} was written by another version of this package, whose detectors lay elsewhere "
                    f"({brief(', '.join(strangers))}); fit the detector and save it again"
                )
            raise FileFormatError(
                f"{path} holds types that are not trusted: {brief(', '.join(strangers))}; {_remedy(strangers)}"
            )
        content = skops.load(path, trusted=sorted(allowed))
    except FileFormatError:
        raise
    # a broken file can raise any kind of error
    except Exception as error:
        raise FileFormatError(f"{path} is broken, or no file of a detector ({brief(error)}); save it again") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise FileFormatError(f"{path} holds no detector; expected what {kind.__name__}.save wrote")
    if content.get("version") != _VERSION:
        raise FileFormatError(
            f"{path} has schema version {brief(content.get('version'))}, this package reads {_VERSION}; use the "
            f"package that wrote it ({brief(content.get('package'))})"
        )
    if not isinstance(detector := content.get("detector"), kind):
        raise FileFormatError(f"{path} holds a {type(detector).__name__}, expected a {kind.__name__}")
    return detector


def _check_size(path: str | os.PathLike[str]) -> None:
    """Refuse an archive that is much larger in memory than on the disk, before it is unpacked."""
    left = os.path.getsize(path) + _UNPACKED
    with zipfile.ZipFile(path) as archive:
        left -= sum(entry.file_size for entry in archive.infolist())
        # sparse arrays are archives of their own, and small enough to look into once the outer sizes fit
        for entry in archive.infolist() if left >= 0 else ():
            if entry.filename.endswith(".npz"):
                with zipfile.ZipFile(io.BytesIO(archive.read(entry))) as inner:
                    left -= sum(array.file_size for array in inner.infolist())
    if left < 0:
        raise FileFormatError(
            f"{path} unpacks to far more than its {os.path.getsize(path)} bytes, which no detector does; do not trust "
            "it, and take the file that save wrote, as it was"
        )


def _remedy(strangers: list[str]) -> str:
    # only names of these libraries are written out to be copied: a hostile file could name anything
    if all(name.startswith(("sklearn.", "numpy.", "scipy.")) for name in strangers):
        return f"if you know who wrote the file, load it with load(path, trusted={brief(strangers, 1000)})"
    return "if you know where the file comes from and expect them, pass trusted=[...] with their names"


def _skops() -> Any:
    try:
        from skops import io
    except ImportError as error:
        raise OptionError(
            f"saving and loading detectors needs skops, which could not be loaded ({error}); install it: "
            "pip install 'captum-classfilters[persist]'"
        ) from error
    return io
