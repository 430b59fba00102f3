"""The equations of familiarity: class means, shrunk covariances, and each score as a sum over channels.

Nothing here sees a model or a loader; `familiarity.py` does. NumPy, float64.
N samples, K features, C classes. Larger scores are less familiar.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import linalg
from scipy.special import logsumexp

from captum_classfilters.core.errors import NonFiniteError
from captum_classfilters.detection.features import Array


class Terms(NamedTuple):
    """A score as a sum over channels: ``slope * features + offset``, summed over K, plus ``constant``."""

    slope: Array  # (N, K)
    offset: Array  # (N, K)
    constant: Array  # (N,)
    usual: Array | None  # (N, K), the features of what the sample is compared with


class Gaussian(NamedTuple):
    """A mean for each class and one covariance, as the factor that whitens: ``precision = factor @ factor.T``."""

    means: Array  # (C, K); NaN for a class without samples
    factor: Array  # (K, K)
    shrinkage: float

    def distances(self, features: Array) -> Array:
        """Squared Mahalanobis distances to every class, ``(N, C)``; infinite to a class without samples.

        Source: Lee et al. 2018, "A simple unified framework for detecting out-of-distribution samples and adversarial
        attacks", eq. 2, on the head's input alone.
        """
        # about the overall mean: far from the origin the squares below would cancel
        centre = np.nanmean(self.means, axis=0)
        whitened, means = (features - centre) @ self.factor, (self.means - centre) @ self.factor
        squares = (whitened**2).sum(1)[:, None] - 2 * whitened @ means.T + (means**2).sum(1)
        return np.where(np.isnan(squares), np.inf, np.maximum(squares, 0.0))

    def terms(self, features: Array, classes: Array) -> Terms:
        """The squared distance to one class of each sample, channel by channel: ``d_k (P d)_k``."""
        means = self.means[classes]
        slope = (features - means) @ self.factor @ self.factor.T
        return Terms(slope, -means * slope, np.zeros(len(features)), means)


def oas_shrinkage(covariance: Array, count: int) -> float:
    """How much of a covariance is replaced by a multiple of the identity, from its trace and its norm.

    Source: Chen et al. 2010, "Shrinkage algorithms for MMSE covariance estimation", eq. 23, as scikit-learn's ``OAS``
    has it.

    Args:
        covariance: ``(K, K)``, of ``count`` samples.
        count: Samples behind it.

    Example:
        >>> oas_shrinkage(np.eye(3), 100)
        1.0
    """
    channels = len(covariance)
    square, mean = float((covariance**2).mean()), float(np.trace(covariance)) / channels
    above = square + mean**2
    below = (count + 1) * (square - mean**2 / channels)
    return 1.0 if below <= 1e-12 * above else min(above / below, 1.0)


def gaussian(means: Array, covariance: Array, count: int, shrinkage: float | None) -> Gaussian:
    """Class means with one shrunk covariance.

    Args:
        means: ``(C, K)``.
        covariance: ``(K, K)``.
        count: Samples behind it.
        shrinkage: Share of the identity, in [0, 1]; None: `oas_shrinkage`.

    Raises:
        NonFiniteError: The covariance has no inverse with this shrinkage.
    """
    share = oas_shrinkage(covariance, count) if shrinkage is None else shrinkage
    channels = len(covariance)
    if not np.trace(covariance) > 0:
        raise NonFiniteError(
            f"expected features that vary, got the same features for all {count} samples of each class; look at the "
            "layer before the head"
        )
    shrunk = (1 - share) * covariance + share * np.trace(covariance) / channels * np.eye(channels)
    values, vectors = linalg.eigh(shrunk)
    if not values[0] > 1e-12 * values[-1]:
        raise NonFiniteError(
            f"expected features whose covariance has an inverse, got eigenvalues from {values[0]:.3g} to "
            f"{values[-1]:.3g} with shrinkage {share:.3g} and {count} samples; pass shrinkage=None or a larger number"
        )
    return Gaussian(means, vectors / np.sqrt(values), share)


class Diagonal(NamedTuple):
    """A mean and a variance for each class and channel; NaN for a class without samples."""

    means: Array  # (C, K)
    variances: Array  # (C, K)

    def distances(self, features: Array) -> Array:
        """``sum_k (f - mean)^2 / variance + log variance``, twice the negative log-likelihood: ``(N, C)``."""
        scale = 1 / self.variances
        quadratic = features**2 @ scale.T - 2 * features @ (self.means * scale).T + (self.means**2 * scale).sum(1)
        distances = quadratic + np.log(self.variances).sum(1)
        return np.where(np.isnan(distances), np.inf, distances)

    def terms(self, features: Array, classes: Array) -> Terms:
        """The distance to one class of each sample, channel by channel."""
        means, variances = self.means[classes], self.variances[classes]
        slope = (features - means) / variances
        return Terms(slope, -means * slope + np.log(variances), np.zeros(len(features)), means)


def diagonal(counts: Array, total: Array, squares: Array, floor: float = 0.01) -> Diagonal:
    """Means and variances of each class.

    A variance is at least ``floor`` times that of all samples together: a channel that is 0 in all of a class's few
    samples is not certain to be 0 for ever. A channel that never varies counts nothing.

    Args:
        counts: Samples of each class, ``(C,)``.
        total: Sums of the features of each class, ``(C, K)``.
        squares: Sums of their squares, ``(C, K)``.
        floor: Share of the overall variance.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        means = total / counts[:, None]
        variances = squares / counts[:, None] - means**2
    everyone = squares.sum(0) / counts.sum() - (total.sum(0) / counts.sum()) ** 2
    # a channel that never varies: any positive number, since all its samples lie on the mean
    least = np.where(everyone > 0, floor * everyone, 1.0)
    return Diagonal(means, np.maximum(variances, least))


class Residual(NamedTuple):
    """The directions in which training features hardly vary, and how much a residual there counts beside the logits."""

    origin: Array  # (K,): the features whose logits are all 0, as nearly as there are such
    basis: Array  # (K, R)
    scale: float

    def score(self, features: Array, logits: Array) -> Array:
        """``scale * |residual| - log sum exp(logits)``, ``(N,)``."""
        length = np.linalg.norm((features - self.origin) @ self.basis, axis=1)
        return np.asarray(self.scale * length + energy(logits))


def residual(weight: Array, bias: Array, mean: Array, covariance: Array, kept: tuple[Array, Array]) -> Residual:
    """The residual space of virtual-logit matching: all but the K / 2 directions of largest second moment.

    Source: Wang et al. 2022, "ViM: out-of-distribution with virtual-logit matching", section 4. No difference, except
    that the scale comes from kept training images.

    Args:
        weight: Of the head, ``(C, K)``.
        bias: ``(C,)``.
        mean: Of the training features, ``(K,)``.
        covariance: ``(K, K)``.
        kept: Features and logits of some training images.
    """
    origin = -np.linalg.pinv(weight) @ bias
    off = mean - origin
    vectors = linalg.eigh(covariance + np.outer(off, off))[1]
    basis = vectors[:, : len(mean) - len(mean) // 2]
    features, logits = kept
    length = np.linalg.norm((features - origin) @ basis, axis=1)
    return Residual(origin, basis, float(logits.max(1).mean() / max(length.mean(), 1e-300)))


def energy(logits: Array) -> Array:
    """``-log sum exp(logits)``, ``(N,)``.

    Source: Liu et al. 2020, "Energy-based out-of-distribution detection", eq. 3, temperature 1.
    """
    values: Any = -logsumexp(logits, axis=1)
    return np.asarray(values)


def largest_softmax(logits: Array) -> Array:
    """Minus the largest softmax probability, ``(N,)``.

    Source: Hendrycks & Gimpel 2017, "A baseline for detecting misclassified and out-of-distribution examples".
    """
    return np.asarray(-np.exp(logits.max(1) - logsumexp(logits, axis=1)))


def normalised(features: Array) -> Array:
    """Features of length 1; zeros stay zeros."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(np.divide(features, length, out=np.zeros_like(features), where=length > 0))
