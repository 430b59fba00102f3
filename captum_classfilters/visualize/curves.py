"""Pictures of measurements: accuracy against channels kept or multiplications, shares against thresholds, ROC and AUC.

The frames and scores come from `metrics` and `detection`.
"""

from collections.abc import Mapping, Sequence
from math import log2
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from captum_classfilters.core.check import number
from captum_classfilters.core.errors import OptionError, ShapeError, quoted
from captum_classfilters.visualize.kit import (
    COLOURS,
    MARKERS,
    SMALL,
    Floats,
    axes_or_new,
    check_frame,
    check_unique,
    colour_bar,
    grid_behind,
    hatch,
    heat_map,
    judged_and_control,
    legend_beside,
    legend_marker,
    line_with_band,
    longest,
    numbers,
    room,
    shortened,
    spaced,
)

_DENSE = "dense"
_GREYS = ("0.5", "0.7", "0.2")  # of controls
_BEST = "#D55E00"
_RATES = np.linspace(0.0, 1.0, 1001)
_DASHES = ("-", "--", "-.", ":")  # four, since nine colours and four dashes give 36 lines that differ
_TINY = 5.5  # points: an interval below its number

Run = tuple[Floats, Floats]


def accuracy_curve(curve: pd.DataFrame, *, class_name: str = "all", ax: Axes | None = None) -> Axes:
    """Draw accuracy against k, with intervals, beside the full head and the random control.

    Args:
        curve: What `metrics.accuracy_curve` returns: columns ``filters``, ``k``, ``class_name``, ``accuracy`` (of many
            labels ``balanced_accuracy``), ``low``, ``high``; ``samples``, if there, goes into the title. In
            ``filters``, ``"dense"`` is the full head, drawn as a horizontal line; any other name gets a line. Rows with
            ``control=True`` are the control, in grey; in a frame without that column, those called ``"random"``.
        class_name: Whose rows: a class, or ``"all"``.
        ax: Where to draw. The legend stands to its right, where it hides no data: leave room there, for instance with
            ``layout="constrained"``.

    Returns:
        The axes; k on a logarithmic scale, with a tick at each k.

    Raises:
        OptionError: The frame is not such a frame, the class is unknown or has no samples, or k is below 1.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("dense", 64, 0.9), ("random", 1, 0.1), ("random", 4, 0.3), ("margin", 1, 0.5), ("margin", 4, 0.8)]
        >>> frame = pd.DataFrame(rows, columns=["filters", "k", "accuracy"]).assign(class_name="all")
        >>> frame = frame.assign(control=frame.filters == "random", low=frame.accuracy - 0.05, high=frame.accuracy)
        >>> [text.get_text() for text in accuracy_curve(frame).get_legend().get_texts()]
        ['dense (all channels)', 'margin', 'random (control)']
    """
    many = isinstance(curve, pd.DataFrame) and "balanced_accuracy" in curve.columns
    if many:
        curve = curve.rename(columns={"balanced_accuracy": "accuracy"})
    rows = _rows_of_class(curve, class_name, ["accuracy", "low", "high"])
    judged, control = judged_and_control(rows, "filters")
    dense, lines = judged[judged["filters"] == _DENSE], judged[judged["filters"] != _DENSE]
    ks = sorted({int(k) for k in [*lines["k"], *control["k"]]})
    if ks and ks[0] < 1:
        raise OptionError(f"k must be at least 1, got {ks[0]}; it counts the channels kept")
    ax = axes_or_new(ax, (7.5, 4.2))
    ax.set_xscale("log", base=2)
    if not dense.empty:
        row = dense.iloc[0]
        ax.axhspan(row["low"], row["high"], color="black", alpha=0.08, linewidth=0)
        ax.axhline(row["accuracy"], color="black", linewidth=1.2, label="dense (all channels)")
    for index, name in enumerate(lines["filters"].unique()):
        _line(ax, lines[lines["filters"] == name], ("k", "accuracy"), str(name), index)
    if not control.empty:
        _line(ax, control, ("k", "accuracy"), "random (control)")
    _name_ks(ax, ks)
    ax.set_xlabel("k, channels kept for each class")
    one = "balanced accuracy of this class" if many else "accuracy on samples of this class"
    ax.set_ylabel(one if class_name != "all" else "balanced accuracy" if many else "accuracy")
    who = "all classes" if class_name == "all" else f"class {class_name}"
    samples = f", {int(rows['samples'].max())} samples" if "samples" in rows.columns else ""
    ax.set_title(who + samples, fontsize="medium")
    grid_behind(ax)
    legend_beside(ax)
    return ax


def correlated_share(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the share of filter pairs with a correlation above each threshold, with intervals, beside the control.

    Source: "Training interpretable CNNs towards class-specific filters", figure 7e. Differs from the paper: intervals
    and the control, dashed; no pair of a filter with itself.

    Args:
        frame: What `metrics.correlated_share` returns.
        ax: Where to draw. The legend stands to its right, where it hides no data: leave room there, for instance with
            ``layout="constrained"``.

    Returns:
        The axes. Correlations with the same control share its line; where controls differ, the legend says whose.

    Raises:
        OptionError: The frame is not such a frame, or has several rows for one correlation and threshold.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> frame = pd.DataFrame({"correlation": "weights", "threshold": [0.0, 0.5, 0.0], "share": [0.6, 0.1, 0.2]})
        >>> ax = correlated_share(frame.assign(low=0.0, high=0.7, control=[False, False, True]))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['weights', 'random (control)']
    """
    columns = ["correlation", "threshold", "share", "low", "high"]
    check_frame(frame, columns, "metrics.correlated_share")
    judged, control = judged_and_control(frame, "correlation")
    for rows in (judged, control):
        check_unique(rows, ["correlation", "threshold"])
    ax = axes_or_new(ax, (7.5, 4.2))
    for index, name in enumerate(judged["correlation"].unique()):
        _line(ax, judged[judged["correlation"] == name], ("threshold", "share"), str(name), index)
    # correlations of vectors of one length have one control
    owners: dict[bytes, list[str]] = {}
    controls = {str(name): control[control["correlation"] == name] for name in control["correlation"].unique()}
    for name, rows in controls.items():
        values = rows.sort_values("threshold")[["threshold", "share"]].to_numpy(np.float64)
        owners.setdefault(values.tobytes(), []).append(name)
    for index, names in enumerate(owners.values()):
        whose = f" of {', '.join(names)}" if len(owners) > 1 else ""
        label = fill(f"random (control){whose}", 32)
        _line(ax, controls[names[0]], ("threshold", "share"), label, grey=_GREYS[index % len(_GREYS)])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("threshold")
    ax.set_ylabel("share of filter pairs with a correlation above")
    grid_behind(ax)
    legend_beside(ax)
    return ax


def k_grid(curve: pd.DataFrame, *, value: str = "accuracy", class_name: str = "all", ax: Axes | None = None) -> Axes:
    """Draw a number against k1 (down) and k2 (across), with the best cell framed.

    k1 is how many channels each sample votes for, k2 how many each class keeps.

    Source: Badola et al. 2022, "Decomposing the Deep", figure 1. No difference; ``value="relative"`` is its ratio r_A.

    Args:
        curve: What `metrics.accuracy_curve` returns for tables named after their k1, ``{"1": ..., "2": ...}``; its
            ``k`` is k2. The rows ``"dense"`` and the control are left out.
        value: The column to draw.
        class_name: Whose rows: a class, or ``"all"``.
        ax: Where to draw.

    Returns:
        The axes. Combinations that were not measured are grey. Of equally good cells the one with the fewest channels,
        k2, is framed, then the one with the smallest k1. A best cell chosen on test data looks better than it is:
        choose on a split of the training data.

    Raises:
        OptionError: The frame is not such a frame, its names are no numbers, the value or the class is unknown, or the
            class has no samples.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("1", 1, 0.5), ("1", 2, 0.6), ("2", 1, 0.4), ("2", 2, 0.75), ("random", 1, 0.1)]
        >>> frame = pd.DataFrame(rows, columns=["filters", "k", "accuracy"]).assign(class_name="all")
        >>> [text.get_text() for text in k_grid(frame).texts]
        ['0.500', '0.600', '0.400', '0.750']
    """
    rows = _rows_of_class(curve, class_name, [value], tables_only=True)
    if not is_numeric_dtype(rows[value]) or is_bool_dtype(rows[value]):
        raise OptionError(f"value must name a column of numbers, got {value!r}, whose dtype is {rows[value].dtype}")
    k1s = {name: _k1(name) for name in rows["filters"].unique()}
    names = sorted(k1s, key=k1s.__getitem__)
    table = rows.pivot(index="filters", columns="k", values=value).loc[names]
    values = table.to_numpy(dtype=np.float64)

    height, width = (float(count) for count in values.shape)
    size = float(np.clip(0.45 * width + 2.2, 4.5, 11.0)), float(np.clip(0.3 * height + 1.4, 3.0, 8.0))
    ax = axes_or_new(ax, size)
    colours = "cividis", (float(np.nanmin(values)), float(np.nanmax(values)))
    image = heat_map(ax, values, (names, [str(k) for k in table.columns]), colours, digits="{:.3f}".format)
    best = np.argwhere(values == np.nanmax(values))
    row, column = best[np.lexsort((best[:, 0], best[:, 1]))[0]]
    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=_BEST, linewidth=2.5, clip_on=False))
    ax.set_ylabel("k1, channels each sample votes for")
    ax.set_xlabel("k2, channels kept for each class")
    where = f"k1 = {names[row]}, k2 = {table.columns[column]}"
    ax.set_title(f"best {value} {values[row, column]:.3f} at {where}", fontsize="medium")
    colour_bar(image, ax, value if class_name == "all" else f"{value} of class {class_name}")
    return ax


def macs_accuracy(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw accuracy, with its interval, against multiplications, to show what saving them costs.

    Args:
        frame: One row for each network, method and setting: columns ``network``, ``method``, ``macs``, a share of the
            dense network's, ``accuracy``, ``low`` and ``high`` in [0, 1], NaN where there is no interval. The method
            ``"dense"`` is drawn in black, with a line across.
        ax: Where to draw. The legend stands to its right.

    Returns:
        The axes: a colour for each method, a shape for each network; settings of one method are joined.

    Raises:
        OptionError: The frame is not such a frame, or its numbers are out of range.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("r20", "dense", 1.0, 0.92, 0.91, 0.93), ("r20", "paths", 0.5, 0.91, 0.9, 0.92)]
        >>> frame = pd.DataFrame(rows, columns=["network", "method", "macs", "accuracy", "low", "high"])
        >>> [text.get_text() for text in macs_accuracy(frame).get_legend().get_texts()]
        ['paths', 'dense']
    """
    _check_costs(frame)
    ax = axes_or_new(ax, (7.5, 4.2))
    methods = [method for method in frame["method"].unique() if method != _DENSE]
    networks = list(frame["network"].unique())
    colours = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(methods)} | {_DENSE: "black"}
    shapes = {network: MARKERS[index % len(MARKERS)] for index, network in enumerate(networks)}
    for (network, method), points in frame.groupby(["network", "method"], sort=False):
        points = points.sort_values("macs")
        reach = [points["accuracy"] - points["low"], points["high"] - points["accuracy"]]
        ax.errorbar(
            points["macs"], points["accuracy"], np.nan_to_num(np.stack(reach)), color=colours[method],
            marker=shapes[network], markersize=6, linewidth=1, capsize=3, linestyle="-" if method != _DENSE else "none",
        )  # fmt: skip
        if method == _DENSE:
            ax.axhline(points["accuracy"].iloc[0], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xlim(0, 1.05 * max(1.0, float(frame["macs"].max())))
    ax.set_xlabel("MACs, share of the dense network's")
    ax.set_ylabel("accuracy")
    grid_behind(ax)
    listed = [*methods, *([_DENSE] if bool((frame["method"] == _DENSE).any()) else [])]
    shape = shapes[networks[0]] if len(networks) == 1 else "_"
    handles = [legend_marker(str(method), colours[method], shape) for method in listed]
    if len(networks) > 1:
        handles += [legend_marker(str(network), "0.5", shapes[network]) for network in networks]
    legend_beside(ax, handles)
    return ax


def roc(
    curves: Mapping[str, Sequence[tuple[Any, Any]]], *, false_positive_rate: float | None = None, ax: Axes | None = None
) -> Axes:
    """Draw ROC curves of detectors, with bands over runs.

    Runs are averaged at equal false-positive rates, since a detector is calibrated to one of them. The area under the
    mean curve is then the mean AUC.

    Source: Fawcett 2006, "An introduction to ROC analysis", section 8.1, "Vertical averaging". Differs: at 1001 rates,
    with the standard deviation. The decoupling paper gives AUC alone (table 4).

    Args:
        curves: By name, a list of runs, for instance one for each seed: pairs ``(y, scores)``, ``(N,)`` each; y is 1
            for adversarial and 0 for clean, and larger scores are more likely adversarial, as ``strangeness`` of
            detectors. N may differ between runs.
        false_positive_rate: In (0, 1): where to draw a vertical line.
        ax: Where to draw. The legend stands to its right.

    Returns:
        The axes: a line for each name. The line of several runs is their mean, in a band of one standard deviation (of
        a sample: n - 1) to each side, cut off at 0 and 1. The legend says the AUC, with its standard deviation.

    Raises:
        OptionError: There are no curves or no runs, y is not 0 and 1 with both of them, or scores are not finite.
        ShapeError: y or scores are not ``(N,)``, or are of different lengths.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = roc({"forest": [([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])]})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['forest: 0.750', 'random: 0.500']
    """
    runs_by_name = _checked_curves(curves)
    rate = false_positive_rate
    if rate is not None:
        rate = number(rate, "false_positive_rate", 0, 1, open_ends=True, meaning="a share, such as 0.05")
    several = any(len(runs) > 1 for runs in runs_by_name.values())
    about = "AUC, of several runs mean ± 1 sd\n(band: mean ± 1 sd of the curves)" if several else "AUC"
    labels = [_label(name, runs) for name, runs in runs_by_name.items()]
    # the legend takes its width, the square the rest
    ax = axes_or_new(ax, (5.4 + 0.082 * max(map(len, [*labels, *about.split("\n"), "false-positive rate"])), 4.4))
    lines = [_roc_line(ax, *pair, index) for index, pair in enumerate(zip(runs_by_name.values(), labels, strict=True))]
    lines += ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=1, label="random: 0.500")
    if rate is not None:
        label = f"false-positive rate {rate:g}"
        lines.append(ax.axvline(rate, color="black", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1, label=label))
    # a little more than 0 to 1: lines run along the edges
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="false-positive rate", ylabel="true-positive rate")
    ax.set_aspect("equal")
    grid_behind(ax, "both", "0.92")
    box = legend_beside(ax, lines)
    box.set_title(about, prop={"size": "small"})
    box.set_alignment("left")
    return ax


def auc_matrix(
    frame: pd.DataFrame, *, low: pd.DataFrame | None = None, high: pd.DataFrame | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how well a detector that was trained on one attack detects another, as AUC.

    Args:
        frame: AUC in [0, 1]: the index is the attack trained on, columns are the attack judged on; NaN where there is
            none.
        low: Lower ends of intervals, of the same rows and columns. None: no intervals.
        high: Upper ends.
        ax: Where to draw.

    Returns:
        The axes. Colours run from 0 to 1 about 0.5, chance, which is white: red is better, blue is worse. Up to 20
        attacks the numbers stand in the cells, intervals below them. Cells without a number are hatched.

    Raises:
        OptionError: The frames are no such frames, have no number at all, numbers out of range, or numbers that do not
            lie between ``low`` and ``high``.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> frame = pd.DataFrame([[0.98, 0.7], [0.55, float("nan")]], ["FGSM", "PGD"], ["FGSM", "PGD"])
        >>> [text.get_text() for text in auc_matrix(frame).texts]
        ['0.98', '0.70', '0.55']
    """
    values = _checked_aucs(frame, "frame")
    interval = _checked_interval(frame, low, high)
    rows, columns = [str(name) for name in frame.index], [str(name) for name in frame.columns]
    # inches of a cell: wide enough for an interval
    cell, letters = 0.6 if interval is not None else 0.42, 0.08 * longest([*rows, *columns]) + 0.2
    width, height = (float(np.clip(cell * count, 1.5, 12.0)) for count in (len(columns), len(rows)))
    ax = axes_or_new(ax, (width + letters + 1.5, max(height, 2.0) + letters + 1.0))
    image = heat_map(ax, values, (rows, columns), ("RdBu_r", (0.0, 1.0)), square=True, digits="{:.2f}".format)
    colour_bar(image, ax, "AUC (0.5: chance)")
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


def _rows_of_class(
    curve: pd.DataFrame, class_name: str, columns: Sequence[str], tables_only: bool = False
) -> pd.DataFrame:
    """The rows of one class, or of ``"all"``, if they have a number in the first of ``columns``."""
    curve = check_frame(curve, ["filters", "k", "class_name", *columns], "metrics.accuracy_curve", "curve")
    rows = curve[curve["class_name"] == class_name]
    if rows.empty:
        class_names = quoted(curve["class_name"].unique())
        raise OptionError(f"curve has no rows of class {class_name!r}; its classes are: {class_names}")
    if tables_only:
        rows = judged_and_control(rows, "filters")[0]
        rows = rows[rows["filters"] != _DENSE]
        if rows.empty:
            raise OptionError("curve has only rows of the full head and of the control; measure some tables besides")
    if bool(rows[columns[0]].isna().all()):
        raise OptionError(f"class {class_name!r} has no {columns[0]}: it had no samples; choose another class")
    check_unique(rows[rows["filters"] != _DENSE], ["filters", "k"], "curve")
    return rows


def _k1(name: object) -> float:
    try:
        return float(str(name))
    except ValueError:
        raise OptionError(
            f'filters must be named after their k1, such as "5"; got {name!r}. Other selectors belong in accuracy_curve'
        ) from None


def _check_costs(frame: Any) -> None:
    check_frame(frame, ["network", "method", "macs", "accuracy", "low", "high"], "your measurement")
    if not bool(frame["macs"].between(0, 2).all()):
        raise OptionError(
            f"macs must be shares of the dense network's, in [0, 2], got {frame['macs'].min():g} to "
            f"{frame['macs'].max():g}; divide them by those of the dense network"
        )
    low, accuracy, high = (frame[column].astype(float) for column in ("low", "accuracy", "high"))
    fits = accuracy.between(0, 1) & ~(low > accuracy) & ~(high < accuracy)
    if not bool(fits.all()):
        row = frame[~fits].iloc[0]
        raise OptionError(
            f"accuracy must lie in [0, 1] and between low and high, got {row['accuracy']:g}, {row['low']:g} and "
            f"{row['high']:g} of {row['network']}, {row['method']}; shares, not percent"
        )
    check_unique(frame, ["network", "method", "macs"])


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
        numbers(np.array(part) if isinstance(part, (pd.Series, np.ndarray)) else part, f"{name} in {what}", 1, "(N,)")
        for name, part in zip(("y", "scores"), run, strict=True)
    )
    if len(y) != len(scores):
        raise ShapeError(
            f"y and scores in {what} must be of the same images, got {len(y)} and {len(scores)}; pass a score for each"
        )
    kinds = np.unique(y).tolist()
    if kinds != [0, 1]:
        raise OptionError(
            f"y in {what} must hold 0 (clean) and 1 (adversarial), both, got {quoted(kinds, 5)}; "
            "without images of both there is no ROC curve"
        )
    if not bool(np.isfinite(scores).all()):
        raise OptionError(f"scores in {what} must be finite, got {int((~np.isfinite(scores)).sum())} that are not")
    return y, scores


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


def _line(
    ax: Axes, rows: pd.DataFrame, columns: tuple[str, str], label: str, index: int | None = None, grey: str = _GREYS[0]
) -> None:
    """The line of one column against another with its interval: the index-th that is judged, or a control, in grey."""
    rows = rows.sort_values(columns[0])
    x, y, band = rows[columns[0]], rows[columns[1]], (rows["low"], rows["high"])
    if index is None:
        line_with_band(ax, x, y, band, colour=grey, label=label, order=2, linestyle="--")
        return
    dashes = ("-", "-.", ":")[index // len(COLOURS) % 3]
    line_with_band(
        ax, x, y, band, colour=COLOURS[index % len(COLOURS)], label=label, linestyle=dashes,
        marker=MARKERS[index % len(MARKERS)], markersize=4,
    )  # fmt: skip


def _name_ks(ax: Axes, ks: Sequence[int]) -> None:
    """A tick at each k; a number where it does not run into its neighbour's, the last one in any case."""
    ax.set_xticks([], minor=True)
    if not ks:
        ax.set_xticks([])
        return
    span = max(log2(ks[-1] / ks[0]), 1.0)
    points = [log2(k / ks[0]) / span * room(ax)[0] for k in ks]
    kept = spaced(points, SMALL * (len(str(ks[-1])) + 1), first=[len(ks) - 1])
    ax.set_xticks(ks, [str(k) if index in kept else "" for index, k in enumerate(ks)])


def _label(name: str, runs: Sequence[Run]) -> str:
    from sklearn.metrics import roc_auc_score

    areas = np.array([roc_auc_score(*run) for run in runs])
    spread = f" ± {areas.std(ddof=1):.3f} ({len(runs)} runs)" if len(runs) > 1 else ""
    return f"{shortened(name)}: {areas.mean():.3f}{spread}"


def _roc_line(ax: Axes, runs: Sequence[Run], label: str, index: int) -> Any:
    """The mean curve of some runs, and its band; returns the line."""
    from sklearn.metrics import roc_curve

    # where a curve rises at one rate, np.interp takes its upper end; all curves begin at 0
    heights = np.stack([[0, *np.interp(_RATES, *roc_curve(*run)[:2])] for run in runs])
    mean, band = heights.mean(0), None
    if len(runs) > 1:
        spread = heights.std(0, ddof=1)
        band = np.clip(mean - spread, 0, 1), np.clip(mean + spread, 0, 1)
    return line_with_band(
        ax, [0, *_RATES], mean, band, colour=COLOURS[index % len(COLOURS)], label=label, linewidth=1.5,
        linestyle=_DASHES[index % len(_DASHES)],
    )  # fmt: skip


def _write_intervals(ax: Axes, low: Floats, high: Floats) -> None:
    """Small, below the numbers that stand in the cells."""
    for text in list(ax.texts):
        column, row = (round(place) for place in text.get_position())
        ends = low[row, column], high[row, column]
        if not np.isnan(ends).any():
            text.set_verticalalignment("bottom")
            below = f"{ends[0]:.2f} to {ends[1]:.2f}"
            ax.text(column, row, below, ha="center", va="top", fontsize=_TINY, color=text.get_color())
