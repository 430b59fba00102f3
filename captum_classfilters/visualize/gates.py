"""Pictures of a gate and of what it does to a network: figures 3 to 5 and 7 to 9 of its paper.

Source: "Training interpretable CNNs towards class-specific filters". `metrics` makes the frames; here they are drawn.
C classes, K channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.core.check import one_of
from captum_classfilters.core.errors import OptionError, ShapeError, quoted
from captum_classfilters.gating import LabelSensitiveGate
from captum_classfilters.gating.measures import as_gate
from captum_classfilters.visualize.kit import (
    SMALL,
    UNSEEN,
    Bools,
    Floats,
    Ints,
    axes_or_new,
    borders,
    centred_or_from_zero,
    channel_map,
    check_frame,
    check_unique,
    colour_bar,
    heat_map,
    judged_and_control,
    longest,
    pivot,
    room,
    shortened,
    spaced,
    square_size,
    write_title,
)

_MASKED = "#D55E00"
_GROUPED = ", grouped by the class it works for most"


def gate(
    gate_or_filters: LabelSensitiveGate | ClassFilters, *, order: str | None = "class", ax: Axes | None = None
) -> Axes:
    """Draw a gate: classes down, channels across, those of one class side by side.

    Source: figures 3 and 8. Differs from the paper: channels are grouped, so that the blocks show.

    Args:
        gate_or_filters: A gate, or its ``class_filters(class_names)``; any other table is read as a gate, as
            `metrics.density` does.
        order: ``"class"``: a channel stands in the block of the class it works for most, first those that work for the
            fewest others. Behind all blocks stand the channels for which several classes are level, then those that
            work for no class. None: channels as they are.
        ax: Where to draw.

    Returns:
        The axes; colours run from 0 to 1. The title says the density, as `metrics.density`. Classes without samples
        are hatched, unless no class has any: a gate that was not trained is drawn as it is.

    Raises:
        OptionError: The argument is no gate or table, or ``order`` is unknown.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = gate(LabelSensitiveGate.fixed(num_classes=2, num_channels=5, exclusive=2))
        >>> ax.get_title()
        'density 0.600'
    """
    filters = _as_table(gate_or_filters, "gate_or_filters")
    one_of(order, "order", ("class", None))
    values = as_gate(filters.scores).numpy()
    density, unseen = float(values.mean()), _unseen(filters)
    channels, blocks = _grouped(filters) if order else (np.arange(filters.num_channels), np.zeros(0, np.int64))
    values = np.where(unseen[:, None], np.nan, values)[:, channels]
    ax, image = channel_map(ax, values, filters.class_names, channels, blocks, ("Blues", (0.0, 1.0)))
    layer = f" of {filters.layer}" if filters.layer != "unknown" else ""
    ax.set_xlabel(f"channel{layer}" + (_GROUPED if order else "") + (f"\n{UNSEEN}" if unseen.any() else ""))
    colour_bar(image, ax, "gate" if filters.method == "gate" else f"{filters.method}, read as a gate")
    write_title(ax, f"density {density:.3f}")
    return ax


def confusion(frame: pd.DataFrame, masked: str = "none", *, control: bool = False, ax: Axes | None = None) -> Axes:
    """Draw a confusion matrix with the channels of some classes at 0; the names of these classes stand out.

    Source: figure 4. Differs from the paper: the cells hold shares, and the control can be drawn too.

    Args:
        frame: What `metrics.masked_confusion` returns.
        masked: Which case: ``"none"``, a class, or classes such as ``"coat + bag"``.
        control: Draw the control instead: as many random channels at 0.
        ax: Where to draw.

    Returns:
        The axes: true class down, predicted across, colours from 0 to 1. Up to 20 classes, shares that do not round to
        0 stand in the cells. Triangles point at the rows of masked classes. Classes without samples are hatched.

    Raises:
        OptionError: The frame is not such a frame, ``masked`` is none of its cases, or has no control, as ``"none"``.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("cat", "cat", 0.9), ("cat", "dog", 0.1), ("dog", "cat", 1.0), ("dog", "dog", 0.0)]
        >>> frame = pd.DataFrame(rows, columns=["class_name", "predicted", "share"])
        >>> ax = confusion(frame.assign(masked="dog", control=False, channels=3), "dog")
        >>> ax.get_title(), [text.get_text() for text in ax.texts]
        ('channels of dog at 0 (3)', ['0.90', '0.10', '1.00'])
    """
    columns = ["masked", "control", "channels", "class_name", "predicted", "share"]
    check_frame(frame, columns, "metrics.masked_confusion")
    if masked not in set(frame["masked"]):
        raise OptionError(f"masked must be one of {quoted(frame['masked'].unique())}, got {masked!r}")
    rows = judged_and_control(frame[frame["masked"] == masked])[control]
    if rows.empty:
        raise OptionError(
            f"case {masked!r} has no rows with control={control}; where nothing is masked there is no control"
        )
    values, names = pivot(rows, "predicted", "share")
    ax = axes_or_new(ax, square_size(len(values), [*names[0], *names[1]]))
    colours = "Blues", (0.0, 1.0)
    image = heat_map(ax, values, names, colours, square=True, digits=lambda v: f"{v:.2f}" if v >= 0.005 else "")
    colour_bar(image, ax, "share of the true class" + (", mean over draws" if control else ""))
    _mark(ax, set() if masked == "none" else _members(masked, names[0]), names)
    ax.set_ylabel("true class")
    ax.set_xlabel(f"predicted class\n{UNSEEN}" if np.isnan(values).all(1).any() else "predicted class")
    count = int(rows["channels"].iloc[0])
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
        OptionError: The frame is not such a frame, or the outcome is unknown or has no images.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("cat", "cat", 4.0), ("cat", "dog", 1.0), ("dog", "cat", 0.0), ("dog", "dog", 3.0)]
        >>> frame = pd.DataFrame(rows, columns=["class_name", "gate_row", "similarity"])
        >>> ax = similarity(frame.assign(outcome="TP", samples=50))
        >>> ax.get_title()
        'TP: recognised, 100 images'
    """
    columns = ["outcome", "class_name", "gate_row", "similarity", "samples"]
    check_frame(frame, columns, "metrics.gate_similarity")
    judged, _ = judged_and_control(frame)
    rows = judged[judged["outcome"] == outcome]
    if rows.empty:
        raise OptionError(f"outcome must be one of {quoted(judged['outcome'].unique())}, got {outcome!r}")
    values, names = pivot(rows, "gate_row", "similarity")
    if np.isnan(values).all():
        raise OptionError(f"the frame has no images of outcome {outcome!r}, so there is nothing to draw")
    colours = centred_or_from_zero(judged["similarity"].to_numpy(np.float64))
    digits = int(np.clip(2 - np.floor(np.log10(colours[1][1])), 0, 3))
    ax = axes_or_new(ax, square_size(len(values), [*names[0], *names[1]]))
    image = heat_map(ax, values, names, colours, square=True, digits=lambda v: f"{v:.{digits}f}")
    colour_bar(image, ax, "mean inner product")
    ax.set_ylabel("class of the images")
    note = f"\nhatched: no {outcome} of the class" if np.isnan(values).all(1).any() else ""
    ax.set_xlabel(f"row of the gate{note}")
    images = int(rows.drop_duplicates("class_name")["samples"].sum())
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
        order: Channels are grouped by their class in this gate or table, as `gate` does, and the blocks are named
            after the classes. None: channels as they are.
        ax: Where to draw.

    Returns:
        The axes; colours run from -1 to 1. The title says the mean size off the diagonal.

    Raises:
        OptionError: The frame is not such a frame, or ``order`` is no gate or table.
        ShapeError: ``order`` has another number of channels.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> correlation(pd.DataFrame([[1.0, -0.4], [-0.4, 1.0]])).get_title().replace("\\n", " ")
        'correlation of filters, mean size off the diagonal 0.400'
    """
    values = _checked_correlation(frame)
    channels, blocks, filters = _in_order_of(order, len(values))
    off = np.abs(values[~np.eye(len(values), dtype=bool)])
    side = float(np.clip(0.14 * len(values), 3.5, 9.0))
    letters = 0.08 * longest(filters.class_names) if filters is not None else 0.0
    ax = axes_or_new(ax, (side + letters + 1.4, side + 1.3))
    names = [str(frame.columns[channel]) for channel in channels]
    colours = "RdBu_r", (-1.0, 1.0)
    image = heat_map(ax, values[np.ix_(channels, channels)], (names, names), colours, square=True)
    borders(ax, blocks, both=True)
    if filters is not None:
        _name_blocks(ax, blocks, filters.class_names)
    ax.set_ylabel("channel" if filters is None else "class whose channels these are")
    ax.set_xlabel("channel" + ("" if filters is None else _GROUPED))
    about = f"correlation of {frame.attrs.get('kind', 'filters')}"
    about += f" of {frame.attrs['layer']}" if "layer" in frame.attrs else ""
    write_title(ax, f"{about}, mean size off the diagonal {off.mean():.3f}")
    colour_bar(image, ax, "correlation")
    return ax


def cluster_centres(
    frame: pd.DataFrame, *, order: LabelSensitiveGate | ClassFilters | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the centres of the features' clusters, each in the row of the class that it was matched to.

    Source: figure 9.

    Args:
        frame: What `metrics.feature_clusters` returns.
        order: Classes are in the order of this gate or table, and channels are grouped by their class in it, as `gate`
            does: a gate that clusters follow looks like this picture. None: classes by name, channels as they are.
        ax: Where to draw.

    Returns:
        The axes; colours begin at 0, or are centred on it where there are negative features. The title says the
        average cosine of centres and rows of the gate, and that of the control.

    Raises:
        OptionError: The frame is not such a frame or holds several runs, or ``order`` is no gate or table, or has
            other classes.
        ShapeError: ``order`` has another number of channels.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> frame = pd.DataFrame({"class_name": ["all", "dog", "cat"], "channel 0": [1, 0, 2], "channel 1": [2, 3, 1]})
        >>> ax = cluster_centres(frame.assign(cosine=0.9, ami=0.8, control=False))
        >>> ax.images[0].get_array().tolist()
        [[2.0, 1.0], [0.0, 3.0]]
    """
    check_frame(frame, ["class_name", "cosine", "ami", "channel 0"], "metrics.feature_clusters")
    judged, control = judged_and_control(frame)
    check_unique(judged, ["class_name"])
    whole, rows = judged[judged["class_name"] == "all"], judged[judged["class_name"] != "all"].set_index("class_name")
    if whole.empty or rows.empty:
        raise OptionError(
            'frame must hold the row "all" and one for each cluster, as metrics.feature_clusters gives it'
        )
    columns = [name for name in rows.columns if str(name).startswith("channel ")]
    channels, blocks, filters = _in_order_of(order, len(columns))
    class_names = [str(name) for name in rows.index]
    if filters is None:
        # numbers as numbers: "2" before "10"
        names = sorted(class_names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    else:
        names = list(filters.class_names)
        if set(names) != set(class_names):
            raise OptionError(
                f"order must have the classes of the frame, {quoted(class_names)}; got {quoted(names)}; "
                "of a gate pass gate.class_filters(class_names)"
            )
    values = rows.loc[names, columns].to_numpy(np.float64)[:, channels]
    ax, image = channel_map(ax, values, names, channels, blocks, centred_or_from_zero(values))
    colour_bar(image, ax, "mean feature of the cluster")
    ax.set_ylabel("class that the cluster was matched to")
    ax.set_xlabel("channel" + ("" if filters is None else _GROUPED))
    shuffled = control.loc[control["class_name"] == "all", "cosine"]
    chance = "" if shuffled.empty else f", shuffled {shuffled.iloc[0]:.2f}"
    cosine, ami = (float(whole[name].iloc[0]) for name in ("cosine", "ami"))
    write_title(ax, f"cosine with the gate {cosine:.2f}{chance}; AMI with the classes {ami:.2f}")
    return ax


# -- what is drawn -----------------------------------------------------------------------------------------------------


def _checked_correlation(frame: Any) -> Floats:
    maker = "the K x K DataFrame that metrics.filter_correlation returns"
    if not isinstance(frame, pd.DataFrame):
        raise OptionError(f"frame must be {maker}, got {type(frame).__name__}")
    numeric = all(pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes)
    if frame.shape[0] != frame.shape[1] or len(frame) < 2 or not numeric:
        kind = "" if numeric else ", not all of them numbers"
        raise OptionError(f"frame must be {maker}, K at least 2; got shape {frame.shape}{kind}")
    return frame.to_numpy(np.float64)


def _as_table(gate_or_filters: LabelSensitiveGate | ClassFilters, name: str) -> ClassFilters:
    """The table of a gate, or a table as it is."""
    if isinstance(gate_or_filters, LabelSensitiveGate):
        return gate_or_filters.class_filters()
    if not isinstance(gate_or_filters, ClassFilters):
        raise OptionError(
            f"{name} must be a LabelSensitiveGate or a ClassFilters, got {type(gate_or_filters).__name__}; "
            "of a dict of them, pass one"
        )
    return gate_or_filters


def _unseen(filters: ClassFilters) -> Bools:
    """``(C,)``: classes without samples; none where no class has any, as in a gate before its training."""
    seen: Bools = filters.seen.numpy()
    return ~seen & seen.any()


def _in_order_of(
    order: LabelSensitiveGate | ClassFilters | None, channels: int
) -> tuple[Ints, Ints, ClassFilters | None]:
    """`_grouped` of a gate or table for a frame of that many channels, and the table; None: channels as they are."""
    if order is None:
        return np.arange(channels), np.zeros(0, np.int64), None
    filters = _as_table(order, "order")
    if filters.num_channels != channels:
        raise ShapeError(
            f"order has {filters.num_channels} channels, the frame {channels}; pass the gate or table of that network"
        )
    return *_grouped(filters), filters


def _grouped(filters: ClassFilters) -> tuple[Ints, Ints]:
    """Channels in drawing order, and whose block each is in: a class, C for channels of several, C + 1 for nobody's."""
    table = as_gate(filters.scores).numpy()
    table[_unseen(filters)] = 0
    largest = table.max(0)
    level = (table == largest).sum(0)
    owner = np.where(largest <= 0, len(table) + 1, np.where(level > 1, len(table), table.argmax(0)))
    order = np.lexsort((table.sum(0), owner))  # stable: of equals the lower channel comes first
    return order, owner[order]


def _members(masked: str, names: Sequence[str]) -> set[str]:
    """The classes of a case such as "coat + bag"; a name may itself hold a plus."""
    members, rest = set(), masked
    while rest:
        fitting = [name for name in names if f"{rest} + ".startswith(f"{name} + ")]
        if not fitting:
            break
        members.add(max(fitting, key=len))
        rest = rest[len(max(fitting, key=len)) + len(" + ") :]
    return members


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def _mark(ax: Axes, marked: set[str], names: tuple[Sequence[str], Sequence[str]]) -> None:
    """Names in colour, where there was room for them, and a triangle at each row, where there may be no name."""
    for ticks, labels, texts in (
        (ax.get_yticks(), ax.get_yticklabels(), names[0]), (ax.get_xticks(), ax.get_xticklabels(), names[1])
    ):  # fmt: skip
        for tick, label in zip(ticks, labels, strict=True):
            if texts[int(tick)] in marked:
                label.set(color=_MASKED, fontweight="bold")
    rows = [row for row, name in enumerate(names[0]) if name in marked]
    side = ax.get_yaxis_transform()
    ax.plot([1.012] * len(rows), rows, "<", color=_MASKED, markersize=4, transform=side, clip_on=False)


def _name_blocks(ax: Axes, blocks: Ints, class_names: Sequence[str]) -> None:
    """Names down the left, each beside the middle of its block, where it does not run into the one above."""
    owners = np.unique(blocks)
    middles = [float(np.flatnonzero(blocks == owner).mean()) for owner in owners]
    kept = spaced(middles, 1.3 * SMALL * len(blocks) / room(ax)[1])
    names = [*class_names, "shared", "no class"]
    texts = [shortened(names[owners[index]]) for index in kept]
    ax.set_yticks([middles[index] for index in kept], texts, fontsize=SMALL)
