"""Intervals of shares and means, at 95 %."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]


def wilson(successes: ArrayLike, samples: ArrayLike, level: float = 0.95) -> tuple[Floats, Floats]:
    """Wilson score interval of a share, without continuity correction.

    Source: Wilson 1927. `scipy.stats.binomtest(...).proportion_ci("wilson")` for whole arrays.

    Args:
        successes: Counts, any shape.
        samples: Trials, same shape or one number; where 0, the interval is NaN.
        level: Coverage.

    Returns:
        ``(low, high)``, shares.

    Example:
        >>> low, high = wilson(9, 10)
        >>> round(float(low), 3), round(float(high), 3)
        (0.596, 0.982)
    """
    n = np.where(np.asarray(samples, float) > 0, samples, np.nan)
    share = np.asarray(successes, float) / n
    z = stats.norm.ppf(0.5 + level / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # what rounding leaves outside by 1e-17
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def with_all(counts: Any) -> Any:
    """Counts of each class, ``(..., C)``, with those of all classes together put in front: ``(..., 1 + C)``."""
    return np.concatenate([counts.sum(-1, keepdims=True), counts], axis=-1)


def mean_interval(draws: ArrayLike, level: float = 0.95) -> tuple[Any, Any, Any]:
    """Mean share over the first axis, the draws of a control, with the Student-t interval of that mean.

    It says how well the draws fix the mean, not how far single draws scatter. Cut to [0, 1].

    Returns:
        ``(mean, low, high)``.
    """
    values = np.asarray(draws, float)
    mean, half = values.mean(0), _half(values, level)
    return mean, np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1)


def draws_interval(draws: ArrayLike) -> tuple[Any, Any, Any]:
    """`mean_interval` of values that are no shares: not cut to [0, 1]."""
    values = np.asarray(draws, float)
    mean, half = values.mean(0), _half(values, 0.95)
    return mean, mean - half, mean + half


def _half(values: Floats, level: float) -> Any:
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    return stats.t.ppf(0.5 + level / 2, len(values) - 1) * error


def shares(hits: ArrayLike, samples: ArrayLike) -> tuple[Any, Any, Any]:
    """Share of hits with its Wilson interval: ``(share, low, high)``; NaN where there are no samples."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.asarray(hits) / np.asarray(samples)
    return share, *wilson(hits, np.broadcast_to(samples, np.shape(hits)))


def chance_shares(hits: ArrayLike, samples: ArrayLike) -> tuple[Any, Any, Any]:
    """Mean share of hits over the draws of a control, the first axis, with its Student-t interval."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return mean_interval(np.asarray(hits) / np.asarray(samples))
