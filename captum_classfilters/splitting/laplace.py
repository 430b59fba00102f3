"""The asymmetric Laplace distribution, fitted to every row of a table at once.

C rows (classes), K numbers in each (the weights of a class). Arrays are numpy's: it sorts rows of float32 thirty times
as fast as torch does on a CPU. `splits.py` has the other fit, the paper's, along which rows are split.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Rows that are looked at together: their tables stay in the cache
_NUMBERS = 2**17
# A side without spread gets this share of the other's, so that the parameters stay finite: in the likelihood it is lost
_TINY = 1e-30


class AsymmetricLaplace(NamedTuple):
    """Parameters of C distributions, ``(C,)`` each; NaN for a row without two different numbers.

    Density: ``lambda / (kappa + 1 / kappa) * exp(-lambda * kappa * (x - m))`` above ``m``, ``exp(lambda / kappa *
    (x - m))`` below (the paper's eq. 4). scipy's ``laplace_asymmetric(kappa, loc=m, scale=1 / lambda)``.
    """

    location: Floats  # m
    rate: Floats  # lambda, in 1 / weight
    asymmetry: Floats  # kappa, without a unit

    def logpdf(self, values: Floats) -> Floats:
        """Logarithm of the density at ``values``, ``(C, ...)``."""
        m, rate, kappa = (_column(part, values) for part in self)
        away = values - m
        return np.log(rate / (kappa + 1 / kappa)) + away * np.where(away >= 0, -rate * kappa, rate / kappa)

    def cdf(self, values: Floats) -> Floats:
        """Probability of a number up to ``values``, ``(C, ...)``."""
        m, rate, kappa = (_column(part, values) for part in self)
        away = values - m
        # of each side only its own half: the other's exponential would overflow
        below = kappa**2 / (1 + kappa**2) * np.exp(rate / kappa * np.minimum(away, 0))
        above = 1 - np.exp(-rate * kappa * np.maximum(away, 0)) / (1 + kappa**2)
        return np.where(away >= 0, above, below)

    def sample(self, size: int, generator: np.random.Generator) -> Floats:
        """``(C, size)`` draws: the difference of two exponential numbers, as in the paper's section II."""
        m, rate, kappa = (part[:, None] for part in self)
        draws = generator.standard_exponential((2, len(m), size))
        # in place: these tables are what a bootstrap spends its time on
        draws[0] /= rate * kappa
        draws[1] *= kappa / rate
        draws[0] -= draws[1]
        sample: Floats = draws[0]
        sample += m
        return sample


def fit_mle(ordered: Floats) -> tuple[AsymmetricLaplace, Floats]:
    """Fit each row by maximum likelihood, exactly.

    For a given ``m`` the rest has a closed form: with ``a`` and ``b`` the mean distances above and below ``m`` over all
    numbers, ``kappa**4 = b / a``, ``1 / lambda = kappa * a + b / kappa``, and the log-likelihood of a number is
    ``-2 log(sqrt(a) + sqrt(b)) - 1`` (Kotz, Kozubowski and Podgorski 2001, section 3.5). Between two of the numbers
    that is convex in ``m``, so the best ``m`` is one of them, and all are tried. The paper has slope and intercept in
    place of lambda and kappa: those change when all weights are scaled, and these scale with them.

    Args:
        ordered: ``(C, K)``, each row ascending; exact zeros are dropped.

    Returns:
        The parameters, and each row's log-likelihood, ``(C,)``.
    """
    rows = max(1, _NUMBERS // ordered.shape[1])
    parts = [_fit(ordered[start : start + rows]) for start in range(0, len(ordered), rows)]
    location, rate, asymmetry, likelihood = map(np.concatenate, zip(*parts, strict=True))
    return AsymmetricLaplace(location, rate, asymmetry), likelihood


def _fit(ordered: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    rows, size = ordered.shape
    zero = ordered == 0
    zeros = zero.sum(1)
    # around a number in the middle: sums of many alike numbers would lose their differences
    pivot = ordered[:, size // 2].copy()
    values = ordered - pivot[:, None]
    below_count = np.broadcast_to(np.arange(size, dtype=np.float64), values.shape)
    if zeros.any():
        values[zero] = 0
        below_count = below_count - np.where(ordered > 0, zeros[:, None], 0)
    count = (size - zeros).astype(np.float64)
    sums = values.cumsum(1)
    below = below_count * values
    below -= sums
    below += values
    above = sums[:, -1:] - sums
    above -= (count[:, None] - 1 - below_count) * values
    # rounding leaves what is 0 a little below it
    np.maximum(above, 0, out=above)
    np.maximum(below, 0, out=below)
    spread = np.sqrt(above)
    spread += np.sqrt(below)
    if zeros.any():
        spread[zero] = np.inf
    best = spread.argmin(1)
    pick = np.arange(rows), best
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = above[pick] / count, below[pick] / count
        a, b = np.maximum(a, _TINY * b), np.maximum(b, _TINY * a)
        kappa = (b / a) ** 0.25
        rate = 1 / (kappa * a + b / kappa)
        likelihood = -count * (2 * np.log(np.sqrt(a) + np.sqrt(b)) + 1)
    alike = ~(np.isfinite(rate) & np.isfinite(likelihood))
    # the number itself: added to the pivot again it would be another in its last digit, on the wrong side of itself
    location = np.where(alike, np.nan, ordered[pick])
    return location, np.where(alike, np.nan, rate), np.where(alike, np.nan, kappa), np.where(alike, np.nan, likelihood)


def ks_distance(ordered: Floats, fitted: AsymmetricLaplace) -> Floats:
    """Kolmogorov and Smirnov's distance of each row, ``(C, K)`` ascending and without zeros, from its fit, ``(C,)``."""
    expected = fitted.cdf(ordered)
    steps = np.arange(ordered.shape[1] + 1) / ordered.shape[1]
    above = (steps[1:] - expected).max(1)
    distance: Floats = np.maximum(above, (expected - steps[:-1]).max(1))
    return distance


def _column(parameter: Floats, values: Floats) -> Floats:
    return parameter.reshape(-1, *[1] * (values.ndim - 1))
