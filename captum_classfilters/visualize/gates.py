"""Pictures of a gate and of what it does to a network: figures 3 to 5 and 7 to 9 of its paper.

Source: "Training interpretable CNNs towards class-specific filters". `metrics` makes the frames; here they are drawn.
C classes, K channels.
"""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.core.errors import OptionError, quoted
from captum_classfilters.gating import LabelSensitiveGate
from captum_classfilters.metrics.gates import as_gate
from captum_classfilters.visualize.canvas import (
    axes_or_new,
    colour_bar,
    heat_map,
    longest,
    name_columns,
    name_rows,
)
from captum_classfilters.visualize.curves import COLOURS, MARKERS
from captum_classfilters.visualize.maps import (
    as_table,
    borders,
    channel_map,
    checked,
    class_map,
    grouped,
    in_order_of,
    name_blocks,
    pivot,
    refuse_repeated,
    scale,
    unseen,
    write_title,
)
from captum_classfilters.visualize.tables import UNSEEN

_MASKED = "#D55E00"
_GREYS = ("0.45", "0.7", "0.2")


def gate(
    gate_or_filters: LabelSensitiveGate | ClassFilters, *, order: str | None = "class", ax: Axes | None = None
) -> Axes:
    """Draw a gate: classes down, channels across, those of one class side by side.

    Source: figures 3 and 8. Differs from the paper: channels are grouped, so that the blocks show.

    Args:
        gate_or_filters: A gate, or its ``class_filters(class_names)``; any other table is read as a gate, as
            `metrics.density` does.
        order: ``"class"``: a channel stands in the block of the class it works for most, first those that work for the
            fewest others; behind all blocks channels for which several classes are level, then those that work for
            none. None: as they are.
        ax: Where to draw.

    Returns:
        The axes; colours run from 0 to 1. The title says the density, as `metrics.density`. Classes without samples
        are hatched, unless no class has any: a gate that was not trained is drawn as it is.

    Raises:
        OptionError: Not a gate or a table, or unknown ``order``.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = gate(LabelSensitiveGate.fixed(num_classes=2, num_channels=5, exclusive=2))
        >>> ax.get_title()
        'density 0.600'
    """
    filters = as_table(gate_or_filters, "gate_or_filters")
    if order not in ("class", None):
        raise OptionError(f'order must be "class" or None, got {order!r}')
    values = as_gate(filters.scores).numpy()
    density = float(values.mean())
    values = np.where(unseen(filters)[:, None], np.nan, values)
    channels, owners = grouped(filters) if order else (np.arange(filters.num_channels), np.zeros(0, np.int64))

    what = "gate" if filters.method == "gate" else f"{filters.method}, read as a gate"
    shown = values[:, channels]
    ax = channel_map(ax, shown, filters.class_names, channels, owners, "Blues", (0.0, 1.0), what)
    layer = f" of {filters.layer}" if filters.layer != "unknown" else ""
    about = f"channel{layer}" + (", grouped by the class it works for most" if order else "")
    ax.set_xlabel(f"{about}\n{UNSEEN}" if bool(unseen(filters).any()) else about)
    write_title(ax, f"density {density:.3f}")
    return ax


def confusion(frame: pd.DataFrame, masked: str = "none", *, control: bool = False, ax: Axes | None = None) -> Axes:
    """Draw a confusion matrix with the channels of some classes at 0; the names of these classes stand out.

    Source: figure 4. Differs from the paper: shares in the cells; the control can be drawn too.

    Args:
        frame: What `metrics.masked_confusion` returns.
        masked: Which case: ``"none"``, a class, or classes such as ``"coat + bag"``.
        control: With as many random channels at 0 instead.
        ax: Where to draw.

    Returns:
        The axes: true class down, predicted across, colours from 0 to 1. Up to 20 classes, shares that do not round to
        0 stand in the cells. Triangles point at the rows of masked classes. Classes without samples are hatched.

    Raises:
        OptionError: Not such a frame, ``masked`` is none of its cases, or has no control, as ``"none"``.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("cat", "cat", 0.9), ("cat", "dog", 0.1), ("dog", "cat", 1.0), ("dog", "dog", 0.0)]
        >>> frame = pd.DataFrame(rows, columns=["class_name", "predicted", "share"])
        >>> ax = confusion(frame.assign(masked="dog", control=False, channels=3), "dog")
        >>> ax.get_title(), [text.get_text() for text in ax.texts]
        ('channels of dog at 0 (3)', ['0.90', '0.10', '1.00'])
    """
    columns = ["masked", "control", "channels", "class_name", "predicted", "share"]
    rows = checked(frame, "masked_confusion", columns)
    of_case = rows[rows["masked"] == masked]
    if of_case.empty:
        raise OptionError(f"masked must be one of {quoted(rows['masked'].unique())}, got {masked!r}")
    of_case = of_case[of_case["control"] == control]
    if of_case.empty:
        raise OptionError(
            f"case {masked!r} has no rows with control={control}; where nothing is masked there is no control"
        )
    values, names, across = pivot(of_case, "predicted", "share")
    label = "share of the true class" + (", mean over draws" if control else "")
    ax = class_map(
        ax, values, names, across, "Blues", (0.0, 1.0), label, lambda v: f"{v:.2f}" if v >= 0.005 else ""
    )  # fmt: skip
    _mark(ax, set() if masked == "none" else _members(masked, names), names, across)
    ax.set_ylabel("true class")
    ax.set_xlabel(f"predicted class\n{UNSEEN}" if np.isnan(values).all(1).any() else "predicted class")
    count = int(of_case["channels"].iloc[0])
    case = f"{count} random channels at 0, for {masked}" if control else f"channels of {masked} at 0 ({count})"
    write_title(ax, "all channels" if masked == "none" else case)
    return ax


def similarity(frame: pd.DataFrame, outcome: str = "TP", ax: Axes | None = None) -> Axes:
    """Draw the average inner product of each class's features and each row of the gate.

    Source: figure 5. Differs from the paper: classes keep their order.

    Args:
        frame: What `metrics.gate_similarity` returns.
        outcome: ``"TP"``: images recognised; ``"FN"``: those taken for another class.
        ax: Where to draw.

    Returns:
        The axes: class of the images down, row of the gate across. All outcomes of a frame have the same colours, which
        begin at 0, or are centred on it where there are negative numbers. Classes without such images are hatched.

    Raises:
        OptionError: Not such a frame, an unknown outcome, or one without images.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("cat", "cat", 4.0), ("cat", "dog", 1.0), ("dog", "cat", 0.0), ("dog", "dog", 3.0)]
        >>> frame = pd.DataFrame(rows, columns=["class_name", "gate_row", "similarity"])
        >>> ax = similarity(frame.assign(outcome="TP", samples=50))
        >>> ax.get_title()
        'TP: recognised, 100 images'
    """
    columns = ["outcome", "class_name", "gate_row", "similarity", "samples"]
    rows = checked(frame, "gate_similarity", columns)
    of_outcome = rows[rows["outcome"] == outcome]
    if of_outcome.empty:
        raise OptionError(f"outcome must be one of {quoted(rows['outcome'].unique())}, got {outcome!r}")
    values, names, across = pivot(of_outcome, "gate_row", "similarity")
    if np.isnan(values).all():
        raise OptionError(f"the frame has no images of outcome {outcome!r}, so there is nothing to draw")
    cmap, limits = scale(rows["similarity"].to_numpy(np.float64))
    digits = int(np.clip(2 - np.floor(np.log10(limits[1])), 0, 3))
    ax = class_map(ax, values, names, across, cmap, limits, "mean inner product", lambda v: f"{v:.{digits}f}")
    ax.set_ylabel("class of the images")
    note = f"\nhatched: no {outcome} of the class" if np.isnan(values).all(1).any() else ""
    ax.set_xlabel(f"row of the gate{note}")
    images = int(of_outcome.drop_duplicates("class_name")["samples"].sum())
    meaning = {"TP": ": recognised", "FN": ": taken for another class"}.get(outcome, "")
    write_title(ax, f"{outcome}{meaning}, {images} images")
    return ax


def correlation(
    frame: pd.DataFrame, *, order: LabelSensitiveGate | ClassFilters | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the correlation of each two filters.

    Source: figure 7 a to d.

    Args:
        frame: What `metrics.filter_correlation` returns.
        order: Channels are grouped by their class in this gate or table, as `gate` does, and the blocks named after
            the classes. None: as they are.
        ax: Where to draw.

    Returns:
        The axes; colours run from -1 to 1. The title says the mean size off the diagonal.

    Raises:
        OptionError: Not such a frame, or ``order`` is no gate or table.
        ShapeError: ``order`` has another number of channels.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> correlation(pd.DataFrame([[1.0, -0.4], [-0.4, 1.0]])).get_title().replace("\\n", " ")
        'correlation of filters, mean size off the diagonal 0.400'
    """
    made = "the K x K DataFrame that metrics.filter_correlation returns"
    if not isinstance(frame, pd.DataFrame):
        raise OptionError(f"frame must be {made}, got {type(frame).__name__}")
    numeric = all(pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes)
    if frame.shape[0] != frame.shape[1] or len(frame) < 2 or not numeric:
        kind = "" if numeric else ", not all of them numbers"
        raise OptionError(f"frame must be {made}, K at least 2; got shape {frame.shape}{kind}")
    values = frame.to_numpy(np.float64)
    channels, owners, filters = in_order_of(order, len(values))
    off = np.abs(values[~np.eye(len(values), dtype=bool)])

    side = float(np.clip(0.14 * len(values), 3.5, 9.0))
    letters = 0.08 * longest(filters.class_names) if filters is not None else 0.0
    ax = axes_or_new(ax, (side + letters + 1.4, side + 1.3))
    image = heat_map(ax, values[np.ix_(channels, channels)], "RdBu_r", -1.0, 1.0, aspect="equal")
    labels = [str(frame.columns[channel]) for channel in channels]
    name_columns(ax, labels)
    borders(ax, owners, both=True)
    if filters is None:
        name_rows(ax, labels)
    else:
        name_blocks(ax, owners, filters.class_names)
    ax.set_ylabel("channel" if filters is None else "class whose channels these are")
    ax.set_xlabel("channel" if filters is None else "channel, grouped by the class it works for most")
    where = f" of {frame.attrs['layer']}" if "layer" in frame.attrs else ""
    write_title(
        ax,
        f"correlation of {frame.attrs.get('kind', 'filters')}{where}, mean size off the diagonal {off.mean():.3f}",
    )
    colour_bar(image, ax, "correlation")
    return ax


def correlated_share(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the share of filter pairs with a correlation above each threshold, with intervals, beside the control.

    Source: figure 7e. Differs from the paper: intervals and the control, dashed; no pair of a filter with itself.

    Args:
        frame: What `metrics.correlated_share` returns.
        ax: Where to draw. The legend stands to its right, where it hides no data: leave room there, for instance with
            ``layout="constrained"``.

    Returns:
        The axes. Correlations with the same control share its line; where controls differ, the legend says whose.

    Raises:
        OptionError: Not such a frame, or several rows for one correlation and threshold.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> frame = pd.DataFrame({"correlation": "weights", "threshold": [0.0, 0.5], "share": [0.6, 0.1]})
        >>> ax = correlated_share(frame.assign(low=0.0, high=0.7, random=0.2, random_low=0.1, random_high=0.3))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['weights', 'random (control)']
    """
    columns = ["correlation", "threshold", "share", "low", "high", "random", "random_low", "random_high"]
    rows = checked(frame, "correlated_share", columns).sort_values("threshold")
    refuse_repeated(rows, ["correlation", "threshold"])
    names = list(frame["correlation"].unique())
    parts = {name: rows[rows["correlation"] == name] for name in names}
    controls: dict[bytes, list[str]] = {}
    for name, part in parts.items():
        controls.setdefault(part[["threshold", "random"]].to_numpy(np.float64).tobytes(), []).append(name)

    ax = axes_or_new(ax, (7.5, 4.2))
    for i, (name, part) in enumerate(parts.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        ax.fill_between(part["threshold"], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0, zorder=2)
        ax.plot(
            part["threshold"], part["share"], color=colour, marker=marker, markersize=4, label=str(name), zorder=4
        )  # fmt: skip
    for i, owners in enumerate(controls.values()):
        part, grey = parts[owners[0]], _GREYS[i % len(_GREYS)]
        ax.fill_between(
            part["threshold"], part["random_low"], part["random_high"], color=grey, alpha=0.2, linewidth=0, zorder=1
        )  # fmt: skip
        whose = f" of {', '.join(map(str, owners))}" if len(controls) > 1 else ""
        label = fill(f"random (control){whose}", 32)
        ax.plot(part["threshold"], part["random"], "--", color=grey, label=label, zorder=3)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("threshold")
    ax.set_ylabel("share of filter pairs with a correlation above")
    ax.grid(True, axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, fontsize="small")
    return ax


def cluster_centres(
    frame: pd.DataFrame, *, order: LabelSensitiveGate | ClassFilters | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the centres of the features' clusters, each in the row of the class that it was matched to.

    Source: figure 9.

    Args:
        frame: What `metrics.feature_clusters` returns.
        order: Classes are in the order of this gate or table, channels grouped by their class in it, as `gate` does:
            a gate that clusters follow looks like this picture. None: classes by name, channels as they are.
        ax: Where to draw.

    Returns:
        The axes; colours begin at 0, or are centred on it where there are negative features. The title says the
        average cosine of centres and rows of the gate, and that of the control.

    Raises:
        OptionError: Not such a frame, frames of several runs, or ``order`` is no gate or table, or has other classes.
        ShapeError: ``order`` has another number of channels.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> frame = pd.DataFrame({"class_name": ["all", "dog", "cat"], "channel 0": [1, 0, 2], "channel 1": [2, 3, 1]})
        >>> ax = cluster_centres(frame.assign(cosine=0.9, random=0.6, ami=0.8))
        >>> ax.images[0].get_array().tolist()
        [[2.0, 1.0], [0.0, 3.0]]
    """
    rows = checked(frame, "feature_clusters", ["class_name", "cosine", "random", "ami", "channel 0"])
    refuse_repeated(rows, ["class_name"])
    whole, rows = rows[rows["class_name"] == "all"], rows[rows["class_name"] != "all"].set_index("class_name")
    if whole.empty or rows.empty:
        raise OptionError(
            'frame must hold the row "all" and one for each cluster, as metrics.feature_clusters gives it'
        )
    centres = [name for name in rows.columns if str(name).startswith("channel ")]
    channels, owners, filters = in_order_of(order, len(centres))
    known = [str(name) for name in rows.index]
    # numbers as numbers: "2" before "10"
    names = sorted(known, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    if filters is not None:
        if set(filters.class_names) != set(known):
            raise OptionError(
                f"order must have the classes of the frame, {quoted(known)}; got {quoted(filters.class_names)}; "
                "of a gate pass gate.class_filters(class_names)"
            )
        names = list(filters.class_names)
    values = rows.loc[names, centres].to_numpy(np.float64)[:, channels]
    cmap, limits = scale(values)
    ax = channel_map(ax, values, names, channels, owners, cmap, limits, "mean feature of the cluster")
    ax.set_ylabel("class that the cluster was matched to")
    ax.set_xlabel("channel" if filters is None else "channel, grouped by the class it works for most")
    about = whole.iloc[0]
    write_title(
        ax,
        f"cosine with the gate {about['cosine']:.2f}, shuffled {about['random']:.2f}; "
        f"AMI with the classes {about['ami']:.2f}",
    )
    return ax


def _members(masked: str, names: Sequence[str]) -> set[str]:
    """The classes of a case such as "coat + bag"; a name may itself hold a plus."""
    found, rest = set(), masked
    while rest:
        fitting = [name for name in names if f"{rest} + ".startswith(f"{name} + ")]
        if not fitting:
            break
        found.add(max(fitting, key=len))
        rest = rest[len(max(fitting, key=len)) + len(" + ") :]
    return found


def _mark(ax: Axes, marked: set[str], names: Sequence[str], across: Sequence[str]) -> None:
    """Names in colour, where there was room for them, and a triangle at each row, where there may be no name."""
    for ticks, labels, of in (
        (ax.get_yticks(), ax.get_yticklabels(), names), (ax.get_xticks(), ax.get_xticklabels(), across)
    ):  # fmt: skip
        for tick, text in zip(ticks, labels, strict=True):
            if of[int(tick)] in marked:
                text.set(color=_MASKED, fontweight="bold")
    rows = [row for row, name in enumerate(names) if name in marked]
    side = ax.get_yaxis_transform()
    ax.plot([1.012] * len(rows), rows, "<", color=_MASKED, markersize=4, transform=side, clip_on=False)
