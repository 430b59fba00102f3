"""Fit and recursive split of a whole head: numbers for all classes at once, in tables.

Every node of the recursion is the upper end of a sorted side, so its sums are differences of running sums and no class
needs a loop of its own. `ald_tree.py` shows one class of these tables. C classes, K weights in each, T stages of the
deepest tree.
"""

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_classfilters.core.check import integer, one_of
from captum_classfilters.core.errors import DegenerateFitWarning, NonFiniteError, OptionError, ShapeError, quoted
from captum_classfilters.splitting.laplace import AsymmetricLaplace, Floats, fit_mle

Ints = npt.NDArray[np.int64]

# Rows that are split together: their tables stay in the cache
_NUMBERS = 2**19

FITS = ("loglinear", "mle")
FIRST = ("zero", "mean")
BRANCHES = ("positive", "negative")


class Side(NamedTuple):
    """The nodes of one side, ``(C, T)`` each; where a class has fewer stages ``size`` is 0 and the rest NaN.

    Values are distances from the first threshold, so they are above 0 on both sides.
    """

    size: Ints  # neurons in the node
    threshold: Floats  # the node has what lies above it
    mean: Floats
    slope: Floats  # a of log(value) = a * x + b, x = i / size, i = 0 .. size - 1
    intercept: Floats  # b
    r2: Floats  # of that line, in log space


@dataclass(frozen=True, eq=False)
class Splits:
    """The splits of C classes.

    Attributes:
        weights: ``(C, K)``.
        targets: ``(C,)``, which classes these are.
        first: ``(C,)`` float64, the first threshold: 0, or the row's mean.
        zeros: ``(C,)``, weights that are exactly 0 and were dropped.
        positive: The nodes of what lies above the first threshold.
        negative: The nodes of what lies below it.
        laplace: The fit by maximum likelihood; None where it was not asked for.
        likelihood: ``(C,)``, its log-likelihood.
        min_size: A node with fewer neurons is not split.
        layer: Name of the head.
    """

    weights: Tensor
    targets: tuple[int, ...]
    first: Floats
    zeros: Ints
    positive: Side
    negative: Side
    laplace: AsymmetricLaplace | None
    likelihood: Floats | None
    min_size: int
    layer: str

    def side(self, branch: str) -> Side:
        """The nodes of a branch."""
        if branch not in BRANCHES:
            raise OptionError(f'branch must be "positive" or "negative", got {branch!r}')
        return self.positive if branch == "positive" else self.negative

    def distances(self, branch: str) -> Tensor:
        """``(C, K)`` float64: how far each weight lies beyond the first threshold, on the branch's side positive."""
        away = self.weights.double() - torch.from_numpy(self.first)[:, None]
        # exact zeros belong to neither branch, wherever the threshold is
        away = away if branch == "positive" else -away
        return away.masked_fill(self.weights == 0, -torch.inf)

    def depths(self, branch: str) -> Tensor:
        """``(C,)`` int64: stages of the branch; 0 where it is empty."""
        return torch.from_numpy((self.side(branch).size > 0).sum(1))

    def stages(self, branch: str) -> Tensor:
        """``(C, K)`` int64: the deepest stage that holds each neuron; 0: it is not in the branch."""
        away, side = self.distances(branch), self.side(branch)
        deepest = torch.zeros(away.shape, dtype=torch.int64)
        for stage in range(side.size.shape[1]):
            # NaN, where a class has no such stage, is below nothing
            deepest += away > torch.from_numpy(side.threshold[:, stage])[:, None]
        return deepest

    def deviations(self) -> Tensor:
        """``(C, K)`` float64: how far the logarithm of each weight lies from its side's line; 0 for exact zeros.

        Source: the paper's section VI, which proposes to prune what deviates and leaves the measure open.
        """
        deviation = torch.zeros(self.weights.shape, dtype=torch.float64)
        for branch in BRANCHES:
            away, side = self.distances(branch), self.side(branch)
            inside = away > 0
            order = away.argsort(1).argsort(1)
            size = inside.sum(1, keepdim=True)
            place = (order - (away.shape[1] - size)).double() / size
            slope, intercept = (torch.from_numpy(column[:, :1]) for column in (side.slope, side.intercept))
            line = slope.nan_to_num(0) * place + intercept
            logs = torch.where(inside, away, 1.0).log()
            deviation = torch.where(inside, (logs - line.nan_to_num(0)).abs(), deviation)
        return deviation


def split_weights(
    weights: Tensor,
    *,
    targets: tuple[int, ...] | None = None,
    fit: str = "loglinear",
    first_threshold: str = "zero",
    min_size: int = 20,
    layer: str = "unknown",
) -> Splits:
    """Fit and split every row.

    Source: "An interpretation of the final fully connected layer", Algorithm 1 and section IV. Differs as
    `split_sides` and `laplace.fit_mle` say.

    Args:
        weights: ``(C, K)`` float32 or float64 on the CPU, finite.
        targets: Which classes the rows are; otherwise 0 to C - 1.
        fit: ``"loglinear"``: slope and intercept of each node. ``"mle"``: besides, location, rate and asymmetry of each
            row's asymmetric Laplace distribution.
        first_threshold: ``"zero"`` (the paper) or ``"mean"`` of the row (the published code); distances are from it.
        min_size: A node with fewer neurons is not split any more.
        layer: Name of the head.

    Raises:
        OptionError: An option is out of range, or no row could be split.
        ShapeError: There is not one row for each class.
        NonFiniteError: NaN or infinity among the weights.

    Warns:
        DegenerateFitWarning: Rows of alike numbers, to which no distribution can be fitted.
    """
    _check(weights, fit, first_threshold, min_size)
    # sorted as they are: float32 takes half the time
    ordered = np.sort(weights.detach().numpy(), axis=1).astype(np.float64)
    # NaN is sorted to the end
    if not np.isfinite(ordered[:, [0, -1]]).all():
        raise NonFiniteError("weights must be finite, got NaN or infinity; load a whole checkpoint")
    zeros = (ordered == 0).sum(1)
    if first_threshold == "mean":
        first = ordered.sum(1) / np.maximum(ordered.shape[1] - zeros, 1)
        away = ordered - first[:, None]
        # what is dropped must not come back as a distance
        away[ordered == 0] = 0
        away = np.sort(away, axis=1) if zeros.any() else away
    else:
        first, away = np.zeros(len(ordered)), ordered
    laplace, likelihood = fit_mle(ordered) if fit == "mle" else (None, None)
    classes = tuple(range(len(weights))) if targets is None else targets
    if laplace is not None and np.isnan(laplace.location).any():
        rows = [classes[row] for row in np.flatnonzero(np.isnan(laplace.location))]
        warnings.warn(
            f"classes {quoted(rows)} have no two different weights, so no distribution can be fitted: its parameters "
            'are NaN; fit="loglinear" needs none',
            DegenerateFitWarning,
            stacklevel=4,  # past `ALDSplitter.split`, to its caller
        )
    return Splits(
        weights, classes, first, zeros, *split_sides(away, min_size), laplace, likelihood, int(min_size), layer
    )


def _check(weights: Tensor, fit: Any, first_threshold: Any, min_size: Any) -> None:
    one_of(fit, "fit", FITS)
    one_of(first_threshold, "first_threshold", FIRST)
    integer(min_size, "min_size", 2)
    if weights.dim() != 2 or not len(weights):
        raise ShapeError(f"weights must have shape (C, K), one row for each class; got {tuple(weights.shape)}")
    if weights.shape[1] < int(min_size):
        raise OptionError(
            f"the head has {weights.shape[1]} features, fewer than min_size={min_size}, so nothing would be split; "
            "pass a smaller min_size"
        )


# -- the recursion ----------------------------------------------------------------------------------------------------


def split_sides(ordered: Floats, min_size: int) -> tuple[Side, Side]:
    """The positive and the negative side of rows of distances, ``(C, K)``, each row ascending.

    Source: the paper's Algorithm 1 (fit) and section IV (split). Differs: ``x`` has as many points as there are weights
    (the paper's list has one more); exact zeros belong to neither side (their logarithm stops the published code).
    """
    rows = max(1, _NUMBERS // ordered.shape[1])
    blocks = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
    above = _joined([_above(block, min_size) for block in blocks])
    return above, _joined([_below(block, min_size) for block in blocks])


def _above(ordered: Floats, min_size: int) -> Side:
    inside = ordered > 0
    return _split(ordered[inside], inside.sum(1), min_size)


def _below(ordered: Floats, min_size: int) -> Side:
    inside = ordered < 0
    # turned round as a whole, rows ascend again, the last row first
    side = _split(-ordered[inside][::-1], inside.sum(1)[::-1], min_size)
    return Side(*(column[::-1] for column in side))  # type: ignore[arg-type]  # one generator of two kinds


def _joined(parts: list[Side]) -> Side:
    """Blocks of classes, each as deep as its deepest tree, in one table."""
    depth = max(part.size.shape[1] for part in parts)
    columns = []
    for column in zip(*parts, strict=True):
        nothing = 0 if column[0].dtype == np.int64 else np.nan
        columns.append(
            np.concatenate([np.pad(c, ((0, 0), (0, depth - c.shape[1])), constant_values=nothing) for c in column])
        )
    return Side(*columns)


def _split(values: Floats, lengths: Ints, min_size: int) -> Side:
    """Stages of numbers above 0: row after row, each ascending, and how many there are in each."""
    ends = lengths.cumsum()
    first = ends - lengths
    starts, thresholds, means = [first], [np.zeros(len(lengths))], []
    while True:
        start = starts[-1]
        size = ends - start
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.where(size > 0, _segments(values, start, ends) / size, np.nan)
        means.append(mean)
        following = np.where(size >= min_size, _first_above(values, start, ends, mean), ends)
        # alike numbers have no upper part, whichever way their mean was rounded
        following = np.where(following == start, ends, following)
        if (following == ends).all():
            break
        starts.append(following)
        thresholds.append(mean)
    bounds, sizes = np.stack(starts, 1), np.stack([ends - start for start in starts], 1)
    line = _fit_lines(values, first, bounds, ends)
    none = sizes == 0
    columns = [np.stack(thresholds, 1), np.stack(means, 1), *line]
    return Side(sizes, *(np.where(none, np.nan, column) for column in columns))


def _segments(numbers: Floats, start: Ints, end: Ints) -> Floats:
    """Sums of ``numbers[start:end]`` for each row; each on its own, so that no other row's numbers round it."""
    if not len(numbers):
        return np.zeros(len(start))
    edges = np.stack([start, end], 1).ravel()
    # no edge may stand behind the last number; it is cut off at the end of the last row
    cut = np.minimum(edges, len(numbers) - 1)
    sums = np.add.reduceat(numbers, cut)[::2]
    sums += np.where((end == len(numbers)) & (start < end - 1), numbers[-1], 0.0)
    return np.where(start < end, sums, 0.0)


def _first_above(values: Floats, start: Ints, end: Ints, threshold: Floats) -> Ints:
    """First position in ``[start, end)`` whose number is above the threshold, by bisection in all rows at once."""
    low, high = start.copy(), end.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        above = values[np.minimum(middle, len(values) - 1)] > threshold
        low, high = np.where(open_ & ~above, middle + 1, low), np.where(open_ & above, middle, high)
    return low


def _fit_lines(values: Floats, first: Ints, bounds: Ints, ends: Ints) -> tuple[Floats, Floats, Floats]:
    """Least squares of ``log(value)`` on ``i / size`` in each node: slope, intercept and R2, ``(C, T)`` each."""
    if not len(values):
        nothing = np.full(bounds.shape, np.nan)
        return nothing, nothing, nothing
    logs = np.log(values)
    # from the side's largest: nodes of nearly alike numbers keep the digits in which they differ
    top = logs[np.maximum(ends - 1, 0)]
    logs -= np.repeat(top, ends - first)
    ranks = np.arange(len(values), dtype=np.float64) - np.repeat(first, ends - first)
    size = (ends[:, None] - bounds).astype(np.float64)
    sum_y = _sums(logs, bounds, ends)
    ranks *= logs
    sum_ry = _sums(ranks, bounds, ends)
    logs *= logs
    sum_yy = _sums(logs, bounds, ends)
    with np.errstate(invalid="ignore", divide="ignore"):
        # ranks count from the side's start; in a node they count from the node's
        sum_xy = (sum_ry - (bounds - first[:, None]) * sum_y) / size
        sxx = (size**2 - 1) / (12 * size)
        sxy = sum_xy - (size - 1) / (2 * size) * sum_y
        syy = sum_yy - sum_y**2 / size
        low, high = values[np.minimum(bounds, len(values) - 1)], values[np.maximum(ends - 1, 0)]
        slope = np.where(low == high[:, None], 0.0, sxy / sxx)
        slope[size < 2] = np.nan
        intercept = top[:, None] + sum_y / size - slope * (size - 1) / (2 * size)
        # a line through alike numbers explains nothing, for there is nothing to explain
        r2 = np.where((low == high[:, None]) | (size < 2), np.nan, sxy**2 / (sxx * syy))
    return slope, intercept, r2


def _sums(numbers: Floats, bounds: Ints, ends: Ints) -> Floats:
    """Sums of ``numbers[bound:end]`` for each bound of each row, ``(C, T)``."""
    # each number is added once, between two bounds; behind the last bound of a row comes the next row's first
    edges = np.minimum(bounds, len(numbers) - 1).ravel()
    pieces = np.add.reduceat(numbers, edges).reshape(bounds.shape)
    following = np.concatenate([bounds.ravel()[1:], ends[-1:]]).reshape(bounds.shape)
    pieces[following <= bounds] = 0
    return pieces[:, ::-1].cumsum(1)[:, ::-1]
