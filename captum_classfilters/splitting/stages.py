"""Log-linear fit and recursive split of every class's weights, all classes at once.

Every node of the recursion is the upper end of a sorted side, so its sums are differences of running sums and no class
needs a loop of its own. C classes, K weights in each, T stages of the deepest tree.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


# Rows that are split together: their tables stay in the cache
_NUMBERS = 2**19


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
