"""How well logits tell the samples that have a label from those that have not, for networks of many labels.

Average precision goes by the order of a class's logits, balanced accuracy by their sign. Intervals are bootstrap ones
over samples. N samples, C classes, B resamples.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_classfilters.core.intervals import Floats, mean_interval

RESAMPLES = 200
# How many weights of resamples are held at once
_CELLS = 2**23


def average_precision(scores: Floats, labels: NDArray[np.bool_], weights: Floats) -> Floats:
    """`sklearn.metrics.average_precision_score` of one class, for many weightings of the samples at once.

    Args:
        scores: ``(N,)``.
        labels: Which samples have the label, ``(N,)``.
        weights: How often each sample counts, ``(B, N)``.

    Returns:
        ``(B,)`` in [0, 1]; NaN where no sample has the label.

    Example:
        >>> labels = np.array([True, False, True])
        >>> average_precision(np.array([0.9, 0.8, 0.1]), labels, np.ones((1, 3))).round(3).tolist()
        [0.833]
    """
    order = np.argsort(-scores, kind="stable")
    # equal scores are one threshold
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    ordered = weights[:, order]
    hits = np.cumsum(ordered * labels[order], 1)[:, last]
    count = np.cumsum(ordered, 1)[:, last]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(count > 0, hits / count, 0)
        recall = hits / hits[:, -1:]
    result: Floats = (np.diff(recall, axis=1, prepend=0) * precision).sum(1)
    return result


def balanced_accuracy(positive: NDArray[np.bool_], labels: NDArray[np.bool_], weights: Floats) -> Floats:
    """`sklearn.metrics.balanced_accuracy_score` of each class: mean of the shares of both sides that are told right.

    Args:
        positive: Which samples the network gives the label, ``(N, C)``.
        labels: Which have it, ``(N, C)``.
        weights: As for `average_precision`.

    Returns:
        ``(B, C)`` in [0, 1]; NaN where all samples have the label, or none.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (weights @ (positive & labels)) / (weights @ labels)
        left = (weights @ (~positive & ~labels)) / (weights @ ~labels)
    result: Floats = (found + left) / 2
    return result


class Quality(NamedTuple):
    """Average precision and balanced accuracy, each ``(B, 1 + C)``: the mean over classes, then each class."""

    precision: Floats
    accuracy: Floats


def quality(logits: Tensor, labels: Tensor, resamples: int = 0, seed: int = 0) -> Quality:
    """Both numbers of the samples as they are (row 0), and of ``resamples`` draws with replacement.

    Args:
        logits: ``(N, C)``.
        labels: ``(N, C)`` bool.
        resamples: B - 1.
        seed: Seed of the draws.
    """
    scores, has = logits.double().cpu().numpy(), labels.cpu().numpy()
    count = len(scores)
    generator = np.random.default_rng(seed)
    parts: list[tuple[Floats, Floats]] = []
    for start in range(0, resamples + 1, step := max(1, _CELLS // max(1, count))):
        rows = min(step, resamples + 1 - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=rows).astype(np.float64)
        if start == 0:
            weights[0] = 1
        columns = [average_precision(scores[:, c], has[:, c], weights) for c in range(scores.shape[1])]
        parts.append((np.stack(columns, 1), balanced_accuracy(scores > 0, has, weights)))
    return Quality(*(_with_mean(np.concatenate(part)) for part in zip(*parts, strict=True)))


def bootstrapped(values: Floats) -> tuple[Any, Any, Any]:
    """The value of row 0 and the central 95 % of the other rows."""
    known = ~np.isnan(values).all(0)
    low, high = np.full((2, values.shape[1]), np.nan)
    low[known], high[known] = np.nanquantile(values[1:][:, known], [0.025, 0.975], axis=0)
    return values[0], low, high


def over_draws(values: list[Floats]) -> tuple[Any, Any, Any]:
    """Mean over the draws of a control, ``(1 + C,)`` each, with its Student-t interval."""
    return mean_interval(np.stack(values))


def _with_mean(values: Floats) -> Floats:
    """``(B, C)`` with the mean over the classes that have a value put in front."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0).sum(1) / known.sum(1)
    return np.concatenate([mean[:, None], values], 1)
