"""`FamiliarityDetector`: alarms for images unlike those that a network was trained on, from its head's input alone.

`gaussians.py` holds the equations; `conformal.py` turns scores into alarms at a given rate.
N samples, K features, C classes.
"""

import os
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from captum_classfilters.core.check import integer, number, one_of
from captum_classfilters.core.errors import LabelError, MergeError, OptionError
from captum_classfilters.core.fingerprint import fingerprint
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import Batch, HeadPass
from captum_classfilters.detection.conformal import Calibrated
from captum_classfilters.detection.detectors import load_detector, save_detector
from captum_classfilters.detection.features import Array, as_array
from captum_classfilters.detection.gaussians import (
    Terms,
    diagonal,
    energy,
    gaussian,
    largest_softmax,
    normalised,
    residual,
)

METHODS = (
    "mahalanobis",
    "relative_mahalanobis",
    "class_gaussian",
    "nearest_neighbours",
    "vim",
    "react",
    "energy",
    "max_logit",
    "max_softmax",
)
_NEAREST_OF = 10_000  # training images that are kept, at most
_NEED_LOGITS = ("vim", "react", "energy", "max_logit", "max_softmax")
# Methods whose score is a sum over channels
SUMS = ("mahalanobis", "relative_mahalanobis", "class_gaussian", "nearest_neighbours", "max_logit")


class HeadValues(NamedTuple):
    """What is read of some samples."""

    features: Array  # (N, K) float64
    logits: Array  # (N, C) float64; (N, 0) for bare features

    @classmethod
    def of(cls, batch: Batch) -> "HeadValues":
        """What a batch of a `HeadPass` gave."""
        return cls(_numpy(batch.features), _numpy(batch.logits))

    @classmethod
    def bare(cls, features: Array) -> "HeadValues":
        """Features without a network."""
        return cls(features, np.empty((len(features), 0)))


class FamiliarityDetector(Calibrated, OutlierMixin, BaseEstimator):
    """Measures how familiar images are to a network: are its head's features like those of the training images?

    It needs no training and no change of the network. Give it a `HeadPass`, which names the network and the images, or
    features ``(N, K)`` as arrays or tensors. It follows scikit-learn's outlier detectors: `score_samples` is larger for
    familiar images, `predict` gives 1 for familiar ones and -1 for others. `calibrate` adds alarms at a promised rate
    of false alarms, from clean images that had no part in training the network or in `fit`.

    Source: the papers named in the list. All read the input of the last layer, as in their penultimate-layer forms.

    Args:
        method: The score.

            - ``"mahalanobis"``: squared Mahalanobis distance to a class mean, with one covariance (Lee et al. 2018).
            - ``"relative_mahalanobis"``: the same minus the distance to all training images as one Gaussian
              (Ren et al. 2021).
            - ``"class_gaussian"``: minus the log-likelihood of a Gaussian of each class with independent channels.
            - ``"nearest_neighbours"``: squared distance of the normalised features to the k-th nearest of up to 10,000
              training images (Sun et al. 2022).
            - ``"vim"``: length of the features outside of the half of all directions in which training images vary
              most, beside the energy (Wang et al. 2022).
            - ``"react"``: energy of the logits after features above a percentile were clipped (Sun et al. 2021).
            - ``"energy"`` (Liu et al. 2020), ``"max_logit"`` (Hendrycks et al. 2022), ``"max_softmax"`` (Hendrycks and
              Gimpel 2017): of the logits, nothing is learnt but the threshold.
        against: For the Gaussian scores, which class a sample is compared with: ``"nearest"`` of all classes, as in the
            papers, or the ``"predicted"`` one.
        label_source: Where classes of the training images come from: ``"label"``, or ``"prediction"`` of the network.
        shrinkage: Share of the identity in the covariance, in [0, 1]; None: chosen from the data (OAS), so that the
            covariance has an inverse also with fewer samples than channels.
        neighbours: The k of the nearest neighbours.
        percentile: Of all feature values of the training images, where ReAct clips.
        contamination: Share of training images that `predict` calls outliers, in (0, 0.5]; ``"auto"``: .05.
        random_state: Seed for which training images are kept for the threshold, the neighbours and the percentile.

    Attributes:
        offset_: ``decision_function = score_samples - offset_``.
        counts_: Training samples of each class, ``(C,)``.
        shrinkage_: The share of the identity that was taken; None for methods without a covariance.
        fingerprint_: Of the head; None for bare features.
        n_features_in_: K.

    Example:
        >>> from captum_classfilters import HeadPass
        >>> from captum_classfilters.assets import load_demo_network, load_images
        >>> model, train, test = load_demo_network()[0], load_images("train"), load_images("test")
        >>> detector = FamiliarityDetector().fit(HeadPass(model, train.batches()))
        >>> detector = detector.calibrate(HeadPass(model, test.batches()[:2]), alpha=0.05)
        >>> noise = torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        >>> bool(detector.alarms(HeadPass(model, [noise])).mean() > 0.9)
        True
    """

    offset_: float
    counts_: Array
    shrinkage_: float | None
    fingerprint_: str | None
    neighbours_: Array
    n_features_in_: int

    def __init__(
        self,
        method: str = "mahalanobis",
        *,
        against: str = "nearest",
        label_source: str = "label",
        shrinkage: float | None = None,
        neighbours: int = 50,
        percentile: float = 90.0,
        contamination: float | str = "auto",
        random_state: int = 0,
    ) -> None:
        self.method = method
        self.against = against
        self.label_source = label_source
        self.shrinkage = shrinkage
        self.neighbours = neighbours
        self.percentile = percentile
        self.contamination = contamination
        self.random_state = random_state

    # -- learning ------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> "FamiliarityDetector":  # noqa: N803
        """Learn what familiar images look like.

        Args:
            X: A `HeadPass` over training images, which is read once; or features, ``(N, K)``, for the methods that need
                no logits.
            y: Classes of bare features, ``(N,)``; None: all are of one class. A `HeadPass` brings its own.

        Raises:
            OptionError: An option is out of range, or bare features are given to a method that needs logits.
            LabelError: Labels are missing, and ``label_source="label"``.
            NonFiniteError: The covariance has no inverse.
            ValueError: scikit-learn refuses the features, for example NaN.
        """
        self._forget_calibration()
        self._check_options()
        if isinstance(X, HeadPass):
            if y is not None:
                raise OptionError("a HeadPass brings its own labels; leave y out")
            sums, kept = self._of_network(X)
        else:
            sums, kept = self._of_features(X, y)
        self.n_features_in_ = kept.features.shape[1]
        self._learn(sums, kept)
        self.offset_ = float(np.quantile(-self.score_values(kept), self._share()))
        return self

    def _of_network(self, head_pass: HeadPass) -> tuple["_Sums", HeadValues]:
        from_labels = self.label_source == "label"
        sums: _Sums | None = None
        kept = _Reservoir(self.random_state)
        with head_pass.batches(need_labels=from_labels or None, description="FamiliarityDetector") as stream:
            for batch in stream:
                if sums is None:
                    sums = _Sums(batch.head.num_classes)
                    self.fingerprint_ = _fingerprint(batch.head)
                    self.weight_, self.bias_ = _numpy(batch.head.weight), _numpy(batch.head.bias)
                classes = batch.labels if from_labels and batch.labels is not None else batch.logits.argmax(1)
                sums.add(batch.features, classes)
                kept.add(HeadValues.of(batch))
        # a pass without a batch has raised
        return sums, kept.values()  # type: ignore[return-value]

    def _of_features(self, X: Any, y: Any) -> tuple["_Sums", HeadValues]:  # noqa: N803
        if self.method in _NEED_LOGITS:
            raise OptionError(
                f"method={self.method!r} reads the logits, and bare features have none; pass a HeadPass, or take one "
                f"of {', '.join(name for name in METHODS if name not in _NEED_LOGITS)}"
            )
        if self.against == "predicted":
            raise OptionError(
                'against="predicted" needs the class that the network predicts, which bare features do not tell; pass '
                'a HeadPass, or against="nearest"'
            )
        values = validate_data(self, as_array(X), dtype=float, copy=True, ensure_min_samples=2)
        classes = np.zeros(len(values), int)
        if y is not None:
            y = np.asarray(as_array(y))
            if y.shape != (len(values),):
                raise LabelError(f"y must hold one class for each row, ({len(values)},), got {y.shape}")
            classes = np.unique(y, return_inverse=True)[1]
        self.fingerprint_ = None
        sums = _Sums(int(classes.max()) + 1)
        sums.add(torch.from_numpy(values), torch.from_numpy(classes))
        kept = _Reservoir(self.random_state)
        kept.add(HeadValues.bare(values))
        return sums, kept.values()

    def _learn(self, sums: "_Sums", kept: HeadValues) -> None:
        counts, total, squares, second = sums.numpy()
        count = int(counts.sum())
        self.counts_, self.shrinkage_ = counts, None
        if self.method in ("mahalanobis", "relative_mahalanobis"):
            if self.method == "relative_mahalanobis" and (counts > 0).sum() < 2:
                raise OptionError(
                    "the relative distance compares classes with all images together, and there is one class only; "
                    'take method="mahalanobis"'
                )
            with np.errstate(invalid="ignore"):
                means = total / counts[:, None]
            overall = total.sum(0, keepdims=True) / count
            everything = second / count - overall.T @ overall
            between = (np.sqrt(counts)[:, None] * np.nan_to_num(means - overall)) / np.sqrt(count)
            self.classes_gaussian_ = gaussian(means, everything - between.T @ between, count, self.shrinkage)
            self.shrinkage_ = self.classes_gaussian_.shrinkage
            if self.method == "relative_mahalanobis":
                self.whole_gaussian_ = gaussian(overall, everything, count, self.shrinkage)
        elif self.method == "class_gaussian":
            self.diagonal_ = diagonal(counts, total, squares)
        elif self.method == "nearest_neighbours":
            self.neighbours_ = normalised(kept.features).astype(np.float32)
            if self.neighbours > len(self.neighbours_):
                raise OptionError(
                    f"neighbours={self.neighbours}, but there are only {len(self.neighbours_)} training images to "
                    "take neighbours from; pass a smaller number"
                )
        elif self.method == "vim":
            mean = total.sum(0) / count
            covariance = second / count - np.outer(mean, mean)
            self.residual_ = residual(self.weight_, self.bias_, mean, covariance, kept)
        elif self.method == "react":
            self.threshold_ = float(np.percentile(kept.features, self.percentile))

    def _check_options(self) -> None:
        one_of(self.method, "method", METHODS)
        one_of(self.against, "against", ("nearest", "predicted"))
        one_of(self.label_source, "label_source", ("label", "prediction"))
        if self.shrinkage is not None:
            number(self.shrinkage, "shrinkage", 0, 1)
        integer(self.neighbours, "neighbours", 1)
        number(self.percentile, "percentile", 0, 100)
        self._share()

    def _share(self) -> float:
        share = 0.05 if self.contamination == "auto" else self.contamination
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 0.5:
            raise OptionError(f'contamination must be in (0, 0.5] or "auto", got {self.contamination!r}')
        return float(share)

    # -- scoring -------------------------------------------------------------------------------------------------------

    def score_samples(self, X: Any) -> Array:  # noqa: N803
        """Larger for familiar images, ``(N,)``: minus `strangeness`."""
        return np.negative(self.strangeness(X))

    def strangeness(self, X: Any) -> Array:  # noqa: N803
        """The method's score, ``(N,)``, larger for less familiar images.

        Args:
            X: A `HeadPass` of the same network, which is read once; or features, ``(N, K)``.

        Raises:
            MergeError: The `HeadPass` is of another network.
        """
        return np.concatenate([self.score_values(values) for values in self._blocks(X)])

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """``score_samples - offset_``, ``(N,)``; below 0: an outlier."""
        return np.asarray(self.score_samples(X) - self.offset_)

    def predict(self, X: Any) -> Array:  # noqa: N803
        """1 for familiar images, -1 for others, ``(N,)``; `alarms` keeps a promised rate of false alarms instead."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def evidence(self, X: Any) -> Array:  # noqa: N803
        """What each class has to say: the logits beside the distances to the class means, ``(N, 2 C)``.

        It is input for a classifier that learns from examples of attacks, such as `PathDetector` on arrays.

        Raises:
            OptionError: The method has no class means.
        """
        check_is_fitted(self)
        if self.method not in ("mahalanobis", "relative_mahalanobis", "class_gaussian"):
            raise OptionError(
                f'method={self.method!r} has no class means; take "mahalanobis", "relative_mahalanobis" or '
                '"class_gaussian"'
            )
        rows = []
        for values in self._blocks(X):
            distances = self._class_distances(values.features)[:, self.counts_ > 0]
            rows.append(np.hstack([values.logits, distances]))
        return np.concatenate(rows)

    def _blocks(self, X: Any) -> Iterator[HeadValues]:  # noqa: N803
        check_is_fitted(self)
        if not isinstance(X, HeadPass):
            if self.method in _NEED_LOGITS or self.against == "predicted":
                raise OptionError(
                    f"this detector reads the network's logits, which bare features do not hold, got "
                    f"{type(X).__name__}; pass a HeadPass"
                )
            yield HeadValues.bare(validate_data(self, as_array(X), dtype=float, reset=False))
            return
        with X.batches(need_labels=None, description="FamiliarityDetector") as stream:
            for batch in stream:
                self.check_network(batch.head)
                yield HeadValues.of(batch)

    def check_network(self, head: Head) -> None:
        """Refuse a head that the detector was not fitted on.

        Raises:
            MergeError: It is of another network, or has other weights.
        """
        if self.fingerprint_ is None and head.num_features == self.n_features_in_:
            return
        if (mine := _fingerprint(head)) != self.fingerprint_:
            raise MergeError(
                f"this network's head {head.name!r} is not the one that the detector was fitted on (fingerprints "
                f"{mine} and {self.fingerprint_}); fit a detector on this network"
            )

    def _class_distances(self, features: Array) -> Array:
        table: Array = (self.diagonal_ if self.method == "class_gaussian" else self.classes_gaussian_).distances(
            features
        )
        return table

    def compared_with(self, values: HeadValues) -> Array:
        """The class that each sample is compared with, ``(N,)``: the nearest, or the predicted one.

        An image that is predicted as a class without training images is compared with the nearest class.
        """
        nearest = self._class_distances(values.features).argmin(1)
        if self.against == "nearest":
            return np.asarray(nearest)
        predicted = values.logits.argmax(1)
        return np.asarray(np.where(self.counts_[predicted] > 0, predicted, nearest))

    def score_values(self, values: HeadValues) -> Array:
        """`strangeness` of what was read already, ``(N,)``."""
        features, logits = values
        if self.method in ("mahalanobis", "relative_mahalanobis", "class_gaussian"):
            distances = self._class_distances(features)[np.arange(len(features)), self.compared_with(values)]
            if self.method == "relative_mahalanobis":
                return np.asarray(distances - self.whole_gaussian_.distances(features)[:, 0])
            return np.asarray(distances)
        if self.method == "nearest_neighbours":
            return self._neighbours_of(features)[0]
        if self.method == "vim":
            return self.residual_.score(features, logits)
        if self.method == "react":
            logits = np.minimum(features, self.threshold_) @ self.weight_.T + self.bias_
        if self.method == "max_logit":
            return np.asarray(-logits.max(1))
        return largest_softmax(logits) if self.method == "max_softmax" else energy(logits)

    def _neighbours_of(self, features: Array) -> tuple[Array, Array]:
        """Squared distance to the k-th neighbour, and which one it is."""
        # of vectors of length 1, the nearest have the largest products
        products = normalised(features).astype(np.float32) @ self.neighbours_.T
        place = products.shape[1] - self.neighbours
        which = np.argpartition(products, place, axis=1)[:, place]
        difference = normalised(features) - self.neighbours_[which]
        return (difference**2).sum(1), which

    # -- which channels raise the alarm --------------------------------------------------------------------------------

    def terms(self, values: HeadValues) -> tuple[Terms, Array]:
        """The score as a sum over channels, and what each sample is compared with: a class, or a training image.

        Raises:
            OptionError: The score is no sum over channels.
        """
        features = values.features
        if self.method not in SUMS:
            raise OptionError(
                f"method={self.method!r} joins the logits of all classes, so its score is no sum over channels; for "
                f"that take one of {', '.join(SUMS)}"
            )
        if self.method == "max_logit":
            classes = values.logits.argmax(1)
            slope = -self.weight_[classes]
            return Terms(slope, np.zeros_like(slope), -self.bias_[classes], None), classes
        if self.method == "nearest_neighbours":
            which = self._neighbours_of(features)[1]
            unit, other = normalised(features), self.neighbours_[which].astype(float)
            length = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-300)
            slope, offset = (unit - other) / length, -other * (unit - other)
            return Terms(slope, offset, np.zeros(len(features)), other * length), which
        classes = self.compared_with(values)
        table = self.diagonal_ if self.method == "class_gaussian" else self.classes_gaussian_
        terms = table.terms(features, classes)
        if self.method == "relative_mahalanobis":
            whole = self.whole_gaussian_.terms(features, np.zeros(len(features), int))
            terms = terms._replace(slope=terms.slope - whole.slope, offset=terms.offset - whole.offset)
        return terms, classes

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the detector and its calibration with skops: nothing in the file runs when it is read."""
        save_detector(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trusted: Sequence[str] = ()) -> "FamiliarityDetector":
        """Read what `save` wrote; see `PathDetector.load`."""
        detector: FamiliarityDetector = load_detector(cls, path, trusted)
        return detector


class _Sums:
    """Sums by class over one pass, float64, on the model's device."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._state: tuple[Tensor, ...] = ()

    def add(self, features: Tensor, classes: Tensor) -> None:
        features = features.detach().double()
        members = torch.nn.functional.one_hot(classes, self._classes).to(features)
        sums = (members.sum(0), members.T @ features, members.T @ features**2, features.T @ features)
        # one assignment: whatever interrupts this, the sums are those of whole batches
        self._state = tuple(old + new for old, new in zip(self._state, sums, strict=True)) if self._state else sums

    def numpy(self) -> tuple[Array, ...]:
        """Counts ``(C,)``, totals ``(C, K)``, squares ``(C, K)``, second moments ``(K, K)``."""
        return tuple(_numpy(value) for value in self._state)


class _Reservoir:
    """Some of the samples of a pass, each with the same chance."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._keys: Array = np.empty(0)
        self._parts: list[HeadValues] = []

    def add(self, values: HeadValues) -> None:
        keys = np.concatenate([self._keys, self._random.random(len(values.features))])
        kept = np.argpartition(keys, _NEAREST_OF)[:_NEAREST_OF] if len(keys) > _NEAREST_OF else slice(None)
        self._keys = keys[kept]
        features, logits = (np.concatenate(parts)[kept] for parts in zip(*self._parts, values, strict=True))
        self._parts = [HeadValues(features, logits)]

    def values(self) -> HeadValues:
        """Asked for after the first batch."""
        return self._parts[0]


def _numpy(value: Tensor) -> Array:
    array: Array = value.detach().cpu().double().numpy()
    return array


def _fingerprint(head: Head) -> str:
    return fingerprint(head.module, (head.name, head.num_classes, head.num_features), [head.weight, head.bias])
