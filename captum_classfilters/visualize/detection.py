"""Pictures of detectors of adversarial images: ROC curves, paths of attacked images, attack against attack.

Source: "Interpretable neural network decoupling", section 4.4. `detection` makes paths and detectors; here they are
drawn. N images, L layers with K_l channels.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from captum_classfilters.core.errors import OptionError, ShapeError, quoted
from captum_classfilters.decoupling import Paths
from captum_classfilters.visualize.canvas import (
    SMALL,
    Floats,
    Ints,
    axes_or_new,
    hatch,
    longest,
    room,
    shortened,
)
from captum_classfilters.visualize.curves import COLOURS
from captum_classfilters.visualize.maps import channel_map, class_map
from captum_classfilters.visualize.paths import legend, numbers
from captum_classfilters.visualize.tables import table_size

_GRID = np.linspace(0.0, 1.0, 1001)
_DASHES = ("-", "--", "-.", ":")  # four, since nine colours and four dashes give 36 lines that differ
_BETWEEN = "#E69F00"  # layers: seen on dark and on light blue
_WRAPPED = 6  # groups: of so few, long names go on in a second line
_TINY = 5.5  # points: an interval below its number

Run = tuple[Floats, Floats]


def roc(
    curves: Mapping[str, Sequence[tuple[Any, Any]]], *, false_positive_rate: float | None = None, ax: Axes | None = None
) -> Axes:
    """Draw ROC curves of detectors, with bands over runs: how many attacks are found at which price in false alarms?

    Runs are averaged at equal false-positive rates, as a detector is used that was calibrated to one; the area under
    the mean curve is then the mean AUC.

    Source: Fawcett 2006, "An introduction to ROC analysis", section 8.1, "Vertical averaging". Differs: at 1001 rates,
    with the standard deviation. The decoupling paper gives AUC alone (table 4).

    Args:
        curves: By name, a list of runs, for instance one for each seed: pairs ``(y, scores)``, ``(N,)`` each; y is 1
            for adversarial and 0 for clean, and larger scores are more likely adversarial, as ``strangeness`` of
            detectors. N may differ between runs.
        false_positive_rate: In (0, 1): where to draw a vertical line.
        ax: Where to draw. The legend stands to its right.

    Returns:
        The axes: a line for each name; of several runs it is their mean, in a band of one standard deviation (of a
        sample: n - 1) to each side, cut off at 0 and 1. The legend says the AUC, with its standard deviation.

    Raises:
        OptionError: No curves, no runs, y other than 0 and 1 or of one class, scores that are not finite.
        ShapeError: y or scores are not ``(N,)``, or of different lengths.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = roc({"forest": [([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])]})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['forest: 0.750', 'random: 0.500']
    """
    checked = _checked_curves(curves)
    rate = false_positive_rate
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1):
        raise OptionError(f"false_positive_rate must lie between 0 and 1, got {rate!r}; pass a share, such as 0.05")
    several = any(len(runs) > 1 for runs in checked.values())
    about = "AUC, of several runs mean ± 1 sd\n(band: mean ± 1 sd of the curves)" if several else "AUC"
    labels = [_label(name, runs) for name, runs in checked.items()]
    # the legend takes its width, the square the rest
    ax = axes_or_new(ax, (5.4 + 0.082 * max(map(len, [*labels, *about.split("\n"), "false-positive rate"])), 4.4))
    lines = [
        _curve(ax, runs, label, index) for index, (runs, label) in enumerate(zip(checked.values(), labels, strict=True))
    ]
    lines += ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=1, label="random: 0.500")
    if rate is not None:
        label = f"false-positive rate {rate:g}"
        lines.append(ax.axvline(rate, color="black", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1, label=label))
    # a little more than 0 to 1: lines run along the edges
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="false-positive rate", ylabel="true-positive rate")
    ax.set_aspect("equal")
    ax.grid(True, color="0.92")
    ax.set_axisbelow(True)
    legend(ax, lines)
    box: Any = ax.get_legend()
    box.set_title(about, prop={"size": "small"})
    box.set_alignment("left")
    return ax


def integral_paths(
    groups: Mapping[str, Paths],
    layer: str | int | None = None,
    *,
    channels: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw which share of each group's images opens each channel: do attacked images take the paths of either class?

    Beside each group stands the mean over channels of how far its share is from the first group's, in [0, 1]: of
    groups of one image their Hamming distance, as a share. Groups of few images differ by chance alone; two halves of
    the first group, drawn as two groups, say by how much.

    Source: figure 7, the integral calculation paths (of all layers) of "dog", "truck" and "dog -> truck". Differs from
    the paper: shares of each channel instead of points of t-SNE, which `path_embedding` draws.

    Args:
        groups: `Paths` by name, of one network, such as those of two classes and of images of one attacked so that the
            network says the other.
        layer: One layer, by name or index. None: all, side by side.
        channels: Of each layer only so many: those whose shares lie furthest apart. None: all; of more channels than
            the picture has pixels across, some are not seen.
        ax: Where to draw; in a figure with ``layout="constrained"``, since distances stand beside it.

    Returns:
        The axes: groups down, channels across, lines between layers; in each layer those first that the first group
        opens most, of equals the second's, and so on. Colours run from 0 to 1. The distance is that over all channels
        of the layers drawn.

    Raises:
        OptionError: No groups, a group without images, no such layer, ``channels`` below 1.
        MergeError: Groups of different networks, or not `Paths`.

    Example:
        >>> import matplotlib, torch; matplotlib.use("agg")
        >>> codes, zeros = torch.tensor([[1], [3], [2], [2]], dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
        >>> paths = Paths(codes, zeros, None, ("conv1",), (2,), num_classes=2, fingerprint="", costs=None)
        >>> ax = integral_paths({"dog": paths[:2], "dog -> truck": paths[2:]})
        >>> ax.images[0].get_array().tolist()
        [[1.0, 0.5], [0.0, 1.0]]
        >>> [text.get_text() for text in ax.child_axes[0].get_yticklabels()]
        ['0.000 (2)', '0.750 (2)']
    """
    first = _checked_groups(groups)
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
        raise OptionError(f"channels must be an integer of at least 1, or None, got {channels!r}")
    chosen = range(len(first.layers)) if layer is None else [first.index(layer)]
    shares = [np.stack([paths.rates()[place].numpy() for paths in groups.values()]) for place in chosen]
    distances = [float(np.abs(row).mean()) for row in np.concatenate([each - each[0] for each in shares], axis=1)]
    orders = [_ordered(each, channels) for each in shares]
    values = np.concatenate([each[:, order] for each, order in zip(shares, orders, strict=True)], axis=1)
    ends = np.cumsum([len(order) for order in orders]) - 0.5

    names = [str(name) for name in groups]
    if ax is None:
        width, height = table_size(len(names), values.shape[1], longest(names))
        # beside the table of `path_profiles` there are the distances, below it the layers' names
        ax = axes_or_new(None, (width + 1.2, height + (0.08 * longest(first.layers) if layer is None else 0.2)))
    label = "share of images that open it"
    whole = np.zeros(0, np.int64)  # its borders are too pale between layers that end alike
    ax = channel_map(ax, values, names, np.concatenate(orders), whole, "Blues", (0.0, 1.0), label)
    ax.vlines(ends[:-1], -0.5, len(names) - 0.5, color=_BETWEEN, linewidth=0.8)
    ax.set_ylabel("")
    if len(names) <= _WRAPPED:
        ax.set_yticks(range(len(names)), [fill(name, 24, max_lines=2, placeholder="…") for name in names])
    leader = shortened(names[0])
    about = f"channel of {first.layers[chosen[0]]}" if layer is not None else "layer, input first, and its channels"
    about += f", those most open for {leader} first"
    if channels is not None and channels < max(each.shape[1] for each in shares):
        about += f"\nat most {channels} of a layer: those whose shares lie furthest apart"
    ax.set_xlabel(about)
    if layer is None:
        _name_layers(ax, first.layers, ends)
    # the rows that have a name
    rows = [int(row) for row in ax.get_yticks()]
    beside = ax.secondary_yaxis("right")
    counts = [len(paths) for paths in groups.values()]
    beside.set_yticks(rows, [f"{distances[row]:.3f} ({counts[row]})" for row in rows], fontsize=SMALL)
    beside.set_ylabel(f"mean difference to\n{leader} (images)", fontsize=SMALL + 1)
    return ax


def auc_matrix(
    frame: pd.DataFrame, *, low: pd.DataFrame | None = None, high: pd.DataFrame | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how well a detector that was trained on one attack tells another: AUC, attack by attack.

    Args:
        frame: AUC in [0, 1]: index the attack trained on, columns the attack judged on; NaN where there is none.
        low: Lower ends of intervals, of the same rows and columns. None: no intervals.
        high: Upper ends.
        ax: Where to draw.

    Returns:
        The axes. Colours run from 0 to 1 about 0.5, chance, which is white: red is better, blue is worse. Up to 20
        attacks the numbers stand in the cells, intervals below them. Cells without a number are hatched.

    Raises:
        OptionError: Not such frames, without any number, numbers out of range, or not between ``low`` and ``high``.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> frame = pd.DataFrame([[0.98, 0.7], [0.55, float("nan")]], ["FGSM", "PGD"], ["FGSM", "PGD"])
        >>> [text.get_text() for text in auc_matrix(frame).texts]
        ['0.98', '0.70', '0.55']
    """
    values = _checked_aucs(frame, "frame")
    interval = _checked_interval(frame, low, high)
    rows, columns = [str(name) for name in frame.index], [str(name) for name in frame.columns]
    if ax is None:
        # inches of a cell: wide enough for an interval
        cell, letters = 0.6 if interval is not None else 0.42, 0.08 * longest([*rows, *columns]) + 0.2
        width, height = (float(np.clip(cell * count, 1.5, 12.0)) for count in (len(columns), len(rows)))
        ax = axes_or_new(None, (width + letters + 1.5, max(height, 2.0) + letters + 1.0))
    ax = class_map(ax, values, rows, columns, "RdBu_r", (0.0, 1.0), "AUC (0.5: chance)", lambda value: f"{value:.2f}")
    empty = np.isnan(values)
    # whole rows are hatched already
    for row, column in np.argwhere(empty & ~empty.all(1, keepdims=True)):
        hatch(ax, column - 0.5, row - 0.5, 1, 1)
    if interval is not None:
        _write_intervals(ax, *interval)
    ax.set_ylabel("trained on")
    ax.set_xlabel("judged on\nhatched: not measured" if empty.any() else "judged on")
    return ax


# -- what is refused ---------------------------------------------------------------------------------------------------


def _checked_curves(curves: Any) -> dict[str, list[Run]]:
    if not isinstance(curves, Mapping) or not curves:
        got = "none" if isinstance(curves, Mapping) else type(curves).__name__
        raise OptionError(f"curves must be runs by name, at least one, got {got}; pass {{name: [(y, scores)]}}")
    checked = {}
    for name, runs in curves.items():
        if isinstance(runs, str) or not isinstance(runs, Sequence) or not len(runs):
            got = "none" if isinstance(runs, Sequence) and not len(runs) else type(runs).__name__
            raise OptionError(f"runs of {name!r} must be a list of pairs (y, scores), at least one, got {got}")
        checked[str(name)] = [_checked_run(run, f"run {place} of {name!r}") for place, run in enumerate(runs)]
    return checked


def _checked_run(run: Any, what: str) -> Run:
    if not isinstance(run, (tuple, list)) or len(run) != 2:
        raise OptionError(
            f"{what} must be a pair (y, scores), got {type(run).__name__}; put a single run into a list, [(y, scores)]"
        )
    y, scores = (
        # torch reads no Series, and warns of arrays that are read-only
        numbers(np.array(each) if isinstance(each, (pd.Series, np.ndarray)) else each, f"{name} in {what}", 1, "(N,)")
        for name, each in zip(("y", "scores"), run, strict=True)
    )
    if len(y) != len(scores):
        raise ShapeError(
            f"y and scores in {what} must be of the same images, got {len(y)} and {len(scores)}; pass a score for each"
        )
    found = np.unique(y).tolist()
    if found != [0, 1]:
        raise OptionError(
            f"y in {what} must hold 0 (clean) and 1 (adversarial), both, got {quoted(found, 5)}; without images of both"
            " there is no ROC curve"
        )
    if not bool(np.isfinite(scores).all()):
        raise OptionError(f"scores in {what} must be finite, got {int((~np.isfinite(scores)).sum())} that are not")
    return y, scores


def _checked_groups(groups: Any) -> Paths:
    """Refuse groups of different networks; the first one otherwise."""
    if not isinstance(groups, Mapping) or not groups:
        got = "none" if isinstance(groups, Mapping) else type(groups).__name__
        raise OptionError(f"groups must be Paths by name, at least one, got {got}; pass {{name: paths}}")
    for name, paths in groups.items():
        if not isinstance(paths, Paths) or not len(paths):
            got = "none of any image" if isinstance(paths, Paths) else type(paths).__name__
            raise OptionError(f"group {name!r} must be Paths of at least one image, got {got}")
    found: list[Paths] = list(groups.values())
    for paths in found[1:]:
        found[0]._check_same_network(paths)
    return found[0]


def _checked_aucs(frame: Any, name: str) -> Floats:
    if not isinstance(frame, pd.DataFrame):
        raise OptionError(f"{name} must be a DataFrame, attacks down and across, got {type(frame).__name__}")
    if not frame.size or not all(pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes):
        kinds = quoted(map(str, frame.dtypes.unique()))
        raise OptionError(f"{name} must hold numbers, at least one, got shape {frame.shape} of {kinds or 'nothing'}")
    values = frame.to_numpy(np.float64)
    if np.isnan(values).all():
        raise OptionError(f"{name} has only NaN, so there is nothing to draw")
    if not bool(((values >= 0) & (values <= 1) | np.isnan(values)).all()):
        raise OptionError(
            f"{name} must be AUC in [0, 1], got {np.nanmin(values):g} to {np.nanmax(values):g}; shares, not percent"
        )
    return values


def _checked_interval(frame: pd.DataFrame, low: Any, high: Any) -> tuple[Floats, Floats] | None:
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise OptionError(f"low and high are the two ends of intervals, got only {'low' if high is None else 'high'}")
    ends = []
    for name, end in (("low", low), ("high", high)):
        ends.append(_checked_aucs(end, name))
        if not (end.index.equals(frame.index) and end.columns.equals(frame.columns)):
            raise OptionError(f"{name} must have the rows and columns of frame; pass {name}.reindex_like(frame)")
    values = frame.to_numpy(np.float64)
    wrong = (ends[0] > values) | (ends[1] < values)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise OptionError(
            f"frame must lie between low and high, got {values[row, column]:g} and [{ends[0][row, column]:g}, "
            f"{ends[1][row, column]:g}] in row {frame.index[row]!r}, column {frame.columns[column]!r}"
        )
    return ends[0], ends[1]


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def _label(name: str, runs: Sequence[Run]) -> str:
    from sklearn.metrics import roc_auc_score

    areas = np.array([roc_auc_score(*run) for run in runs])
    spread = f" ± {areas.std(ddof=1):.3f} ({len(runs)} runs)" if len(runs) > 1 else ""
    return f"{shortened(name)}: {areas.mean():.3f}{spread}"


def _curve(ax: Axes, runs: Sequence[Run], label: str, index: int) -> Any:
    """The mean curve of some runs, and its band; returns the line."""
    from sklearn.metrics import roc_curve

    # where a curve rises at one rate, np.interp takes its upper end
    heights = np.stack([np.interp(_GRID, *roc_curve(*run)[:2]) for run in runs])
    colour, mean = COLOURS[index % len(COLOURS)], heights.mean(0)
    if len(runs) > 1:
        spread = heights.std(0, ddof=1)
        low, high = np.clip([mean - spread, mean + spread], 0, 1)
        ax.fill_between(_GRID, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
    dashes = _DASHES[index % len(_DASHES)]
    return ax.plot([0, *_GRID], [0, *mean], dashes, color=colour, linewidth=1.5, label=label, zorder=3)[0]


def _ordered(shares: Floats, most: int | None) -> Ints:
    """Channels of a layer in drawing order: of ``(groups, K_l)`` at most so many, those furthest apart."""
    kept = np.sort(np.argsort(-np.ptp(shares, axis=0), kind="stable")[:most])
    return np.asarray(kept[np.lexsort(-shares[::-1, kept])], np.int64)


def _name_layers(ax: Axes, layers: Sequence[str], ends: Floats) -> None:
    """Names along the bottom, each below the middle of its block, where it does not run into the one before."""
    middles = [(left + right) / 2 for left, right in pairwise([-0.5, *ends])]
    # 0.75: the layout may take some of the width away later
    points = 0.75 * room(ax)[0] / (ends[-1] + 0.5)
    places: list[int] = []
    for place, middle in enumerate(middles):
        if not places or (middle - middles[places[-1]]) * points >= 1.3 * SMALL:
            places.append(place)
    texts = [shortened(layers[place]) for place in places]
    ax.set_xticks([middles[place] for place in places], texts, fontsize=SMALL, rotation=90)


def _write_intervals(ax: Axes, low: Floats, high: Floats) -> None:
    """Small, below the numbers that stand in the cells."""
    for text in list(ax.texts):
        column, row = (round(place) for place in text.get_position())
        ends = low[row, column], high[row, column]
        if not np.isnan(ends).any():
            text.set_verticalalignment("bottom")
            below = f"{ends[0]:.2f} to {ends[1]:.2f}"
            ax.text(column, row, below, ha="center", va="top", fontsize=_TINY, color=text.get_color())
