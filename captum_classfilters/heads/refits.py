"""Closed-form refits of a head that keeps few features: no SGD, only moments of its input.

Each class's new weights are those whose logit comes nearest to the full head's, in the mean square over the data; or,
with moments by class, nearest to 1 for the class's own samples and 0 for all others.
C classes, K features, k of them kept for each class.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.class_filters import check_k
from captum_classfilters.core.errors import OptionError
from captum_classfilters.heads.moments import HeadMoments

# A channel whose variance, given the others, is a smaller share than this of its own cannot be told from them
_SINGULAR = 1e-10
# What is then added to the diagonal of their correlation matrix
_RIDGE = 1e-8
# Less than this share of the mean square, or of what was lacking at first, is rounding
_ROUNDING = 1e-12
# Classes are solved together, up to this many matrix cells
_CELLS = 2**24


class Refit(NamedTuple):
    """New weights for the kept features."""

    indices: Tensor  # (C, k) int64, which features
    weight: Tensor  # (C, k) float64
    bias: Tensor  # (C,) float64
    explained: Tensor  # (C,) float64: share of the full logit's variance
    ridge: Tensor  # (C,) float64: what was added to the diagonal of the correlation matrix; 0 where nothing was


class Refitter:
    """A head and the moments of its input; computes once what every refit of the head needs.

    Args:
        moments: Moments of the head's input.
        weight: ``(C, K)``, the full head's.
        bias: ``(C,)``.
    """

    def __init__(self, moments: HeadMoments, weight: Tensor, bias: Tensor) -> None:
        device = weight.device
        self._moments, self._weight = moments, weight.double()
        self._covariance, self._mean = moments.covariance.to(device), moments.mean.to(device)
        self._scale = _scale(moments).to(device)
        # covariance of each full logit with each feature, and each full logit's mean
        self._cross = self._weight @ self._covariance
        self._mean_logit = bias.double() + self._weight @ self._mean

    def fit(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights ``(C, k)``, biases ``(C,)`` and ridges ``(C,)`` of least squares on the features ``(C, k)``."""
        _check_count(self._moments, indices.shape[1])
        indices = indices.to(self._weight.device)
        step = max(1, _CELLS // indices.shape[1] ** 2)
        parts = torch.split(torch.arange(len(indices)), step)
        solved = [_solve(self._covariance, self._cross[part], self._scale, indices[part]) for part in parts]
        fitted, ridge = (torch.cat(blocks) for blocks in zip(*solved, strict=True))
        return fitted, self._mean_logit - (self._mean[indices] * fitted).sum(1), ridge

    def pursue(self, k: int) -> Tensor:
        """Features of orthogonal matching pursuit, ``(C, k)``, in the order chosen."""
        check_k(k, self._moments.num_features, "k")
        _check_count(self._moments, k)
        usable = self._scale > 0
        correlation = self._covariance / torch.outer(self._scale, self._scale)
        correlation = correlation.masked_fill(~(usable[:, None] & usable), 0)
        goal = self._goal(correlation)
        step = max(1, _CELLS // k**2)
        return torch.cat([_pursue(correlation, part, usable, k) for part in torch.split(goal, step)])

    def _goal(self, correlation: Tensor) -> Tensor:
        """Covariance of each full logit with each scaled feature, ``(C, K)``."""
        return (self._weight * self._scale) @ correlation

    def refit(self, indices: Tensor) -> Refit:
        """`fit`, and how much of the full logits it explains."""
        indices = indices.to(self._weight.device)
        fitted, bias, ridge = self.fit(indices)
        missing = self._weight.scatter_add(1, indices, -fitted)
        lost = (missing @ self._covariance * missing).sum(1)
        variance = (self._cross * self._weight).sum(1)
        # a logit that never varies is fully explained
        deviation = self._moments.second.diagonal().to(self._weight.device).sqrt()
        varies = variance > _ROUNDING * (self._weight.abs() @ deviation).square()
        return Refit(indices, fitted, bias, torch.where(varies, 1 - lost / variance, 1.0), ridge)


class DiscriminantRefitter(Refitter):
    """Least squares of being of each class, 0 or 1, on the class's own features.

    For each class the ``w``, ``b`` that minimise ``E (sum over j in J of w_j f_j + b - [y is the class])^2``. The
    direction is that of Fisher's discriminant of the class against all others, ``pooled covariance^-1 (mean of the
    class - mean of the others)`` (Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, exercise 4.2);
    the length and bias of least squares make the outputs of classes that read different features comparable.

    Args:
        moments: Moments by class.
        device: Where to compute.
    """

    def __init__(self, moments: HeadMoments, device: torch.device) -> None:
        self._moments, self._cross = moments, moments.class_covariance.to(device)
        # `refit` has no full logit to explain here; `fit` and `pursue` ask this only for its device
        self._weight = self._cross
        self._covariance, self._mean = moments.covariance.to(device), moments.mean.to(device)
        self._scale = _scale(moments).to(device)
        counts: Tensor = moments.class_counts  # type: ignore[assignment]
        self._mean_logit = (counts.double() / moments.count).to(device)

    def _goal(self, correlation: Tensor) -> Tensor:
        usable = self._scale > 0
        return torch.where(usable, self._cross / self._scale.where(usable, 1.0), 0.0)


def least_squares(moments: HeadMoments, weight: Tensor, bias: Tensor, indices: Tensor) -> Refit:
    """Weights on given features that come nearest to the full head's logits.

    For each class the ``w``, ``b`` that minimise ``E (sum over j in J of w_j f_j + b - W f - b_full)^2``: the normal
    equations ``Cov[J, J] w = Cov[J, :] W``, in float64 and scaled to unit variance. Not in the papers, which
    retrain with SGD.

    Args:
        moments: Moments of the head's input.
        weight: ``(C, K)``, the full head's.
        bias: ``(C,)``.
        indices: ``(C, k)``, the features kept for each class, different in each row.

    Returns:
        The `Refit`. A feature that is constant over these samples gets weight 0. Where features follow from one
        another, a ridge of 1e-8 on their correlation matrix shares the weight out, and ``ridge`` says for which
        classes.

    Raises:
        OptionError: Fewer samples than unknowns.
    """
    return Refitter(moments, weight, bias).refit(indices)


def omp(moments: HeadMoments, weight: Tensor, bias: Tensor, k: int) -> Refit:
    """Selection and refit together: orthogonal matching pursuit of each class's full logit.

    Step by step each class takes the feature that correlates most with what its refitted logit still lacks. Source:
    Pati, Rezaiifar, Krishnaprasad 1993; computed from second moments as in Rubinstein, Zibulevsky, Elad 2008. Features
    are scaled to unit variance for the choice.

    Args:
        moments: Moments of the head's input.
        weight: ``(C, K)``, the full head's.
        bias: ``(C,)``.
        k: Features for each class, in ``[1, K]``.

    Returns:
        The `Refit`; ``indices`` in the order chosen. Features that no longer help, because nothing is lacking or they
        are constant, are taken last.

    Raises:
        OptionError: k out of range, or fewer samples than unknowns.
    """
    refitter = Refitter(moments, weight, bias)
    return refitter.refit(refitter.pursue(k))


def _pursue(correlation: Tensor, goal: Tensor, usable: Tensor, k: int) -> Tensor:
    """Features in the order chosen, ``(C, k)``; everything scaled to unit variance."""
    chosen = torch.empty(len(goal), 0, dtype=torch.int64, device=goal.device)
    lacking, enough = goal, _ROUNDING * goal.abs().amax(1, keepdim=True)
    for _ in range(k):
        strength = lacking.abs()
        strength = strength.masked_fill(~usable | (strength <= enough), 0.0).scatter(1, chosen, -1.0)
        chosen = torch.cat([chosen, strength.argmax(1, keepdim=True)], 1)
        fitted, _ = _solve(correlation, goal, torch.ones_like(goal[0]), chosen)
        # each class's weighted sum of its rows of the correlation matrix, without gathering them
        lacking = goal - F.embedding_bag(chosen, correlation, per_sample_weights=fitted, mode="sum")
    return chosen


def _solve(covariance: Tensor, cross: Tensor, scale: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Normal equations on each row's features: weights ``(C, k)`` and the ridge each row needed ``(C,)``."""
    deviation = scale[indices]
    constant = deviation == 0
    deviation = deviation.masked_fill(constant, 1.0)
    gram = covariance[indices[:, :, None], indices[:, None, :]] / (deviation[:, :, None] * deviation[:, None, :])
    gram = gram.masked_fill(constant[:, :, None] | constant[:, None, :], 0.0)
    gram.diagonal(dim1=1, dim2=2).fill_(1.0)
    goal = (cross.gather(1, indices) / deviation).masked_fill(constant, 0.0).unsqueeze(2)
    factor, failed = torch.linalg.cholesky_ex(gram)
    # squares on the diagonal: the share of each feature's variance that the ones before it do not explain
    left = factor.diagonal(dim1=1, dim2=2).square().amin(1)
    singular = (failed > 0) | ~(left > _SINGULAR)
    ridge = torch.where(singular, _RIDGE, 0.0).double()
    if bool(singular.any()):
        gram[singular] += _RIDGE * torch.eye(indices.shape[1], dtype=gram.dtype, device=gram.device)
        factor[singular] = torch.linalg.cholesky(gram[singular])
    fitted = torch.cholesky_solve(goal, factor).squeeze(2) / deviation
    return fitted.masked_fill(constant, 0.0), ridge


def _scale(moments: HeadMoments) -> Tensor:
    """Deviation of each feature; 0 where all that varies is rounding."""
    variance = moments.covariance.diagonal()
    return variance.where(variance > _ROUNDING * moments.second.diagonal() / moments.count, 0.0).sqrt()


def _check_count(moments: HeadMoments, k: int) -> None:
    if moments.count <= k:
        raise OptionError(
            f"a refit of {k} weights and a bias for each class needs at least {k + 1} samples, better ten times as "
            f"many; the moments hold {moments.count}: collect more"
        )
