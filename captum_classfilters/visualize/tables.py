"""Pictures of a `ClassFilters` table: its scores, and how much its classes share. C classes, K channels."""

from math import comb

import numpy as np
import torch
from matplotlib.axes import Axes

from captum_classfilters.class_filters import ClassFilters, check_k, one_table
from captum_classfilters.core.check import integer, one_of
from captum_classfilters.core.errors import OptionError
from captum_classfilters.visualize.kit import (
    UNSEEN,
    Bools,
    Floats,
    Ints,
    axes_or_new,
    centred_or_from_zero,
    channel_map,
    colour_bar,
    hatch,
    heat_map,
    longest,
    room,
)

_MARK = "#ff8c00"


def class_filters(
    filters: ClassFilters,
    k: int | None = None,
    *,
    normalise: str | None = "class",
    max_channels: int = 256,
    ax: Axes | None = None,
) -> Axes:
    """Draw a table of scores: classes down, channels across, the channels of one class side by side.

    Channels are grouped by the class for which they are strongest, strongest first. Channels without any score come
    last. Classes without samples are hatched.

    Args:
        filters: The table, ``(C, K)``.
        k: Put a dot on each class's k strongest channels, those of ``filters.top(k)``.
        normalise: ``"class"``: scores that are sums over samples are divided by the number of the class's samples, so
            that classes can be compared; other scores stay. ``"max"``: each class's largest absolute score becomes 1.
            None: scores as they are.
        max_channels: Draw at most this many channels: those that rank highest for any class.
        ax: Where to draw.

    Returns:
        The axes. Colours are centred on 0 where there are negative scores, and begin at 0 otherwise.

    Raises:
        OptionError: k or ``max_channels`` is out of range, ``normalise`` is unknown, or no class has samples.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> votes = torch.tensor([[0.0, 9.0], [8.0, 2.0]], dtype=torch.float64)
        >>> table = ClassFilters(votes, votes, torch.tensor([10, 10]), "histogram", "fc", ("cat", "dog"))
        >>> ax = class_filters(table, k=1)
        >>> ax.images[0].get_array().tolist()
        [[0.9, 0.0], [0.2, 0.8]]
    """
    _check_samples(filters)
    if k is not None:
        check_k(k, filters.num_channels, "k")
    one_of(normalise, "normalise", ("class", "max", None))
    max_channels = integer(max_channels, "max_channels", 1)
    values, label = _values(filters, normalise)
    order, blocks = _blocks(values, _best_ranked(filters, max_channels))
    values = values[:, order]
    ax, image = channel_map(ax, values, filters.class_names, order, blocks, centred_or_from_zero(values))
    if k is not None:
        _mark(ax, filters.mask(k).numpy()[:, order])
    ax.set_xlabel(_about(filters, len(order), k))
    colour_bar(image, ax, label)
    return ax


def overlap(filters: ClassFilters, k: int, *, ax: Axes | None = None) -> Axes:
    """Draw how many of their k strongest channels every two classes share, as Jaccard index.

    A line on the colour bar marks the mean of random sets of k channels.

    Args:
        filters: The table, ``(C, K)``.
        k: How many of each class's strongest channels are compared.
        ax: Where to draw.

    Returns:
        The axes; colours run from 0 to 1. The diagonal, which is always 1, is grey; classes without samples are
        hatched. Up to 20 classes the numbers stand in the cells.

    Raises:
        OptionError: k is not in ``[1, K]``, or no class has samples.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> votes = torch.tensor([[5.0, 9.0, 0.0], [8.0, 7.0, 2.0]], dtype=torch.float64)
        >>> table = ClassFilters(votes, votes, torch.tensor([10, 10]), "histogram", "fc", ("cat", "dog"))
        >>> [text.get_text() for text in overlap(table, 2).texts]
        ['1.00', '1.00']
    """
    _check_samples(filters)
    values = filters.overlap(k).numpy().copy()
    np.fill_diagonal(values, np.nan)
    names, unseen = filters.class_names, ~filters.seen.numpy()
    side, letters = float(np.clip(0.42 * len(values), 2.4, 8.0)), 0.08 * longest(names) + 0.2
    ax = axes_or_new(ax, (side + letters + 1.2, side + letters))
    colours = "Blues", (0.0, 1.0)
    image = heat_map(ax, values, (names, names), colours, square=True, digits="{:.2f}".format, empty=unseen)
    for column in np.flatnonzero(unseen):
        hatch(ax, column - 0.5, -0.5, 1, len(values))
    if bool(unseen.any()):
        ax.set_xlabel(UNSEEN)
    chance = _chance(k, filters.num_channels)
    bar = colour_bar(image, ax, f"Jaccard index of the top {k}\n(line: chance, {chance:.2f})")
    bar.axhline(chance, color="black", linewidth=1.5)
    return ax


def _check_samples(filters: ClassFilters) -> None:
    one_table(filters)
    if not bool(filters.seen.any()):
        raise OptionError(f"no class of this table has samples, so there is nothing to draw: {filters!r}")


def _values(filters: ClassFilters, normalise: str | None) -> tuple[Floats, str]:
    """Numbers to draw, ``(C, K)``, unseen classes NaN; and what they are."""
    values, label = filters.scores.double(), f"score ({filters.method})"
    if normalise == "class" and filters.merge_rule == "sum":
        values, label = values / filters.counts.clamp(min=1)[:, None], f"score per sample ({filters.method})"
    elif normalise == "max":
        largest = values.abs().amax(1, keepdim=True)
        values = values / torch.where(largest > 0, largest, 1.0)
        label = f"score / largest of the class ({filters.method})"
    return values.masked_fill(~filters.seen[:, None], torch.nan).numpy(), label


def _best_ranked(filters: ClassFilters, most: int) -> Ints:
    """Indices of the channels to draw: all, or those with the best rank in any class."""
    ranking = filters.ranking()[filters.seen]
    places = torch.empty_like(ranking)
    places.scatter_(1, ranking, torch.arange(ranking.shape[1]).expand_as(ranking))
    return places.amin(0).sort(stable=True).indices[:most].sort().values.numpy()


def _blocks(values: Floats, kept: Ints) -> tuple[Ints, Ints]:
    """Channels in drawing order, and the class whose block each is in; C for channels without any score."""
    scores = np.where(np.isnan(values[:, kept]), -np.inf, values[:, kept])
    empty = np.nan_to_num(values[:, kept]).any(0) == 0
    owner = np.where(empty, len(values), scores.argmax(0))
    order = np.lexsort((kept, -scores.max(0), owner))
    return kept[order], owner[order]


def _chance(k: int, channels: int) -> float:
    """Expected Jaccard index of two random sets of k out of K: shared channels are hypergeometric."""
    ways = ((s, comb(k, s) * comb(channels - k, k - s)) for s in range(max(0, 2 * k - channels), k + 1))
    total = comb(channels, k)
    # whole numbers are divided last, because they do not fit in a float
    return sum(s / (2 * k - s) * (count / total) for s, count in ways)


def _mark(ax: Axes, chosen: Bools) -> None:
    rows, columns = np.nonzero(chosen)
    width, height = room(ax)
    cell = min(width / chosen.shape[1], height / chosen.shape[0])
    # in points: half a cell, but large enough to be seen in a table of many
    size = float(np.clip(0.5 * cell, 1.5, 6.0))
    ax.scatter(columns, rows, s=size**2, c=_MARK, edgecolors="black", linewidths=0.5 if size > 3 else 0.0)


def _about(filters: ClassFilters, shown: int, k: int | None) -> str:
    lines = [f"channel of {filters.layer}, grouped by the class it is strongest for"]
    if shown < filters.num_channels:
        lines.append(f"{shown} of {filters.num_channels} channels: those ranked highest by any class")
    notes = [f"dot: among the class's top {k}"] if k is not None else []
    notes += [UNSEEN] if not bool(filters.seen.all()) else []
    return "\n".join([*lines, *(["; ".join(notes)] if notes else [])])
