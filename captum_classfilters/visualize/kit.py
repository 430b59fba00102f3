"""What the pictures share: axes, colours, readable ticks, heat maps, lines with bands, and checks of their data.

C classes, K channels.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from textwrap import fill
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from captum_classfilters.core.errors import OptionError, ShapeError, printable, quoted

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Panels = npt.NDArray[np.object_]

SMALL = 7  # points: the size of the text that there is much of
_LINE = 1.25  # height of a line of text, in font sizes
_WIDE = 0.65  # width of a character, in font sizes
_LONGEST = 24  # characters of a class name that are shown
_NOTHING = "0.85"  # grey: there is no number here
_MOST_BORDERS = 40  # the lines between more blocks would hide the cells
ANNOTATED = 20  # cells along a side: the numbers in more of them would be too small to read
UNSEEN = "hatched: no samples of the class"

# Paul Tol's "muted": nine colours that stay apart for colour-blind readers; markers and dashes are the second sign
COLOURS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#999933", "#44AA99", "#DDCC77", "#AA4499")
MARKERS = "osD^vP*Xh"
# For and against a class, everywhere: Okabe and Ito's vermilion and blue, which colour-blind readers tell apart
FOR, AGAINST = "#D55E00", "#0072B2"


# -- axes --------------------------------------------------------------------------------------------------------------


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """``ax``, or the axes of a new figure of that size, laid out so that nothing is cut off."""
    if ax is None:
        # constrained layout makes room for colour bars and outside legends; tight layout does not
        return plt.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise OptionError(
            f"ax must be one matplotlib Axes or None, got {type(ax).__name__}; pass one element of an array"
        )
    return ax


def panels_or_new(
    ax: Any, count: int, *, across: int, size: tuple[float, float], margin: float = 0.0, sharey: bool = False
) -> Panels:
    """``(count,)`` axes: those given, or new ones of that size each, in rows of at most ``across``."""
    if ax is not None:
        if not isinstance(ax, np.ndarray) or ax.size != count:
            got = f"{ax.size} axes" if isinstance(ax, np.ndarray) else type(ax).__name__
            raise OptionError(
                f"ax must be an array of {count} axes, got {got}; make them with plt.subplots(1, {count})"
            )
        return np.array([axes_or_new(axis, (0, 0)) for axis in ax.ravel()], dtype=object)
    columns = min(count, across)
    rows = -(-count // columns)
    figsize = (size[0] * columns + margin, size[1] * rows)
    axes = plt.subplots(rows, columns, figsize=figsize, layout="constrained", squeeze=False, sharey=sharey)[1].ravel()
    for spare in axes[count:]:
        spare.axis("off")
    return axes[:count]


def figure_of(ax: Axes) -> Figure | SubFigure:
    """The figure that ``ax`` is on."""
    return cast(Figure | SubFigure, ax.get_figure())


def room(ax: Axes) -> tuple[float, float]:
    """Width and height of ``ax`` in points."""
    extent, dots = ax.get_window_extent(), figure_of(ax).dpi / 72
    return float(extent.width / dots), float(extent.height / dots)


def hide_frame(ax: Axes) -> None:
    """Remove the lines around the axes."""
    for side in ax.spines.values():
        side.set_visible(False)


def grid_behind(ax: Axes, axis: Any = "y", colour: str = "0.9") -> None:
    """A pale grid behind the data."""
    ax.grid(True, axis=axis, color=colour)
    ax.set_axisbelow(True)


# -- text --------------------------------------------------------------------------------------------------------------


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Names down the left, as many as can be read."""
    size = _text_size(names)
    chosen = thinned(len(names), room(ax)[1] / (size * _LINE))
    ax.set_yticks(chosen, [shortened(names[i]) for i in chosen], fontsize=size)


def name_columns(ax: Axes, names: Sequence[str]) -> None:
    """Names along the bottom, as many as can be read: flat where they fit, else upright."""
    size, width = _text_size(names), room(ax)[0]
    # 0.75: the layout, and an aspect of 1, may take some of the width away later
    flat = (longest(names) + 1) * size * _WIDE * len(names) <= 0.75 * width
    chosen = thinned(len(names), width / (size * _LINE))
    ax.set_xticks(chosen, [shortened(names[i]) for i in chosen], fontsize=size, rotation=0 if flat else 90)


def _text_size(names: Sequence[str]) -> float:
    return SMALL if len(names) > 12 else SMALL + 2


def longest(names: Sequence[str]) -> int:
    """Characters of the longest name, as shown."""
    return min(max(map(len, names)), _LONGEST)


def shortened(name: str) -> str:
    """A name of at most 24 characters, as `literal` text."""
    return literal(name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…")


def literal(text: str) -> str:
    r"""Text that matplotlib draws as it stands: a pair of dollars is no formula, a control character no box.

    Example:
        >>> literal("price_$10_$20"), literal(literal("$"))
        ('price_\\$10_\\$20', '\\$')
    """
    lines = (printable(line) for line in text.split("\n"))
    return re.sub(r"(?<!\\)\$", r"\$", "\n".join(lines))


def thinned(count: int, fits: float) -> list[int]:
    """Every n-th of ``count`` ticks, n round (1, 2, 5, 10, ...), so that at most about ``fits`` are left.

    Example:
        >>> thinned(10, 40.0), thinned(1000, 5.0)
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 200, 400, 600, 800])
    """
    wanted = count / max(fits, 1.0)
    step = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power >= wanted)
    return list(range(0, count, step))


def spaced(places: Sequence[float], needed: float, first: Iterable[int] = ()) -> list[int]:
    """Indices of places that stand at least ``needed`` apart: those of ``first`` in its order, then the others.

    Example:
        >>> spaced([0.0, 1.0, 3.0, 4.0], 2.0), spaced([0.0, 1.0, 3.0, 4.0], 2.0, first=[3])
        ([0, 2], [0, 3])
    """
    kept: list[int] = []
    for index in dict.fromkeys([*first, *range(len(places))]):
        if all(abs(places[index] - places[other]) >= needed for other in kept):
            kept.append(index)
    return sorted(kept)


def write_title(ax: Axes, text: str) -> None:
    """A title in as many lines as it needs."""
    # 0.8: the layout may take some of the width away later
    ax.set_title(fill(literal(text), max(20, int(0.8 * room(ax)[0] / 6))), fontsize="medium")


def legend_beside(ax: Axes, handles: Sequence[Any] | None = None) -> Any:
    """A legend to the right, where it hides no data; without ``handles`` it lists whatever has a label."""
    chosen = {} if handles is None else {"handles": handles}
    return ax.legend(
        **chosen, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize="small"
    )


def legend_marker(name: str, colour: str, shape: str) -> Line2D:
    """A marker for a legend."""
    return Line2D(
        [], [], color=colour, marker=shape, linestyle="none", markersize=7, markeredgewidth=1.5, label=literal(name)
    )


# -- heat maps ---------------------------------------------------------------------------------------------------------


def heat_map(
    ax: Axes,
    values: Floats,
    names: tuple[Sequence[str], Sequence[str]],
    colours: tuple[str, tuple[float, float]],
    *,
    square: bool = False,
    digits: Callable[[float], str] | None = None,
    empty: Bools | None = None,
) -> AxesImage:
    """Draw a cell for each number, with names along both sides; NaN is grey.

    Args:
        ax: Where to draw.
        values: ``(rows, columns)``.
        names: Of rows, and of columns.
        colours: Name of a colour map, and its limits.
        square: Cells are square.
        digits: Formats the numbers that are written into the cells, up to 20 along a side.
        empty: Rows to hatch; None: those of NaN.
    """
    cmap, (low, high) = colours
    ax.grid(False)
    image = ax.imshow(
        np.ma.masked_invalid(values), cmap=colormaps[cmap].with_extremes(bad=_NOTHING), vmin=low, vmax=high,
        aspect="equal" if square else "auto", origin="upper", interpolation="nearest",
    )  # fmt: skip
    for row in np.flatnonzero(np.isnan(values).all(1) if empty is None else empty):
        hatch(ax, -0.5, row - 0.5, values.shape[1], 1)
    if digits is not None and max(values.shape) <= ANNOTATED:
        _write_cells(ax, image, [["" if np.isnan(v) else digits(v) for v in line] for line in values])
    name_rows(ax, names[0])
    name_columns(ax, names[1])
    return image


def centred_or_from_zero(values: Floats) -> tuple[str, tuple[float, float]]:
    """A colour map and its limits: centred on 0 where there are negative numbers, from 0 otherwise."""
    largest = float(np.nanmax(np.abs(values))) or 1.0
    return ("RdBu_r", (-largest, largest)) if np.nanmin(values) < 0 else ("Blues", (0.0, largest))


def colour_bar(image: AxesImage, ax: Axes, label: str) -> Axes:
    """A colour bar beside ``ax``, with a label; returns its axes."""
    return figure_of(ax).colorbar(image, ax=ax, label=label, pad=0.02).ax


def hatch(ax: Axes, left: float, bottom: float, width: float, height: float) -> None:
    """Hatch cells, because grey alone could be read as a small number."""
    ax.add_patch(
        Rectangle((left, bottom), width, height, facecolor=_NOTHING, edgecolor="0.5", hatch="////", linewidth=0)
    )


def _write_cells(ax: Axes, image: AxesImage, texts: Sequence[Sequence[str]]) -> None:
    """Write ``texts[row][column]`` into the cells, dark on light and light on dark."""
    shades = cast(Floats, np.asarray(image.to_rgba(np.ma.asarray(image.get_array()))))
    # as the eye weighs red, green and blue (ITU-R BT.601)
    brightness = shades[..., :3] @ np.array([0.299, 0.587, 0.114])
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if text:
                ink = "black" if brightness[row, column] > 0.45 else "white"
                ax.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=ink)


def table_size(classes: int, channels: int, letters: int) -> tuple[float, float]:
    """Inches of a table of classes and channels; ``letters``: of the longest class name."""
    width = float(np.clip(0.13 * channels, 3.5, 9.5)) + 0.08 * letters + 1.4
    return width, float(np.clip(0.26 * classes + 1.2, 3.0, 9.0))


def square_size(count: int, names: Sequence[str]) -> tuple[float, float]:
    """Inches of a table with as many rows as columns."""
    side = float(np.clip(0.42 * count, 3.0, 8.0)) + 0.08 * longest(names) + 0.2
    return side + 1.5, side + 1.3


def channel_map(
    ax: Axes | None,
    values: Floats,
    names: Sequence[str],
    channels: Ints,
    blocks: Ints,
    colours: tuple[str, tuple[float, float]],
) -> tuple[Axes, AxesImage]:
    """Classes down and channels across, with lines between blocks of channels; rows of NaN are hatched."""
    ax = axes_or_new(ax, table_size(len(values), len(channels), longest(names)))
    image = heat_map(ax, values, (names, [str(channel) for channel in channels]), colours)
    borders(ax, blocks)
    ax.set_ylabel("class")
    return ax, image


def borders(ax: Axes, blocks: Ints, both: bool = False) -> None:
    """Lines between blocks, unless they are so many that they would hide the cells."""
    places = np.flatnonzero(np.diff(blocks)) + 0.5
    if len(places) < _MOST_BORDERS:
        for place in places:
            ax.axvline(place, color="0.6", linewidth=0.5)
            if both:
                ax.axhline(place, color="0.6", linewidth=0.5)


# -- lines -------------------------------------------------------------------------------------------------------------


def line_with_band(
    ax: Axes, x: Any, y: Any, band: tuple[Any, Any] | None, *, colour: str, label: str, order: int = 3, **style: Any
) -> Line2D:
    """A line, with its interval as a pale band behind it."""
    if band is not None:
        ax.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0, zorder=order - 1)
    return ax.plot(x, y, color=colour, label=literal(label), zorder=order, **style)[0]


# -- what is drawn -----------------------------------------------------------------------------------------------------


def check_frame(frame: Any, columns: Sequence[str], maker: str, name: str = "frame") -> pd.DataFrame:
    """The frame, if it is one that ``maker`` returns."""
    if not isinstance(frame, pd.DataFrame):
        raise OptionError(f"{name} must be the DataFrame that {maker} returns, got {type(frame).__name__}")
    if missing := [column for column in columns if column not in frame.columns]:
        got = quoted(frame.columns, 15)
        raise OptionError(f"{name} lacks the columns {missing}, got {got}; pass the frame that {maker} returns")
    if frame.empty:
        raise OptionError(f"{name} has no rows; pass the frame that {maker} returns")
    return frame


def check_unique(rows: pd.DataFrame, keys: list[str], name: str = "frame") -> None:
    """Refuse a frame with two runs, because a cell or a point has one number."""
    repeated = rows[rows.duplicated(keys)]
    if not repeated.empty:
        cell = ", ".join(f"{key} {str(repeated.iloc[0][key])!r}" for key in keys)
        raise OptionError(f"{name} has several rows of {cell}; draw one run at a time")


def judged_and_control(frame: pd.DataFrame, names: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows that are judged, and the rows of their random control.

    Args:
        frame: With a bool column ``control``; without it, rows called ``"random"`` are the control.
        names: The column that names tables or methods.
    """
    if "control" in frame.columns:
        is_control = frame["control"].astype(bool)
    else:
        is_control = frame[names] == "random" if names is not None else pd.Series(False, index=frame.index)
    return frame[~is_control], frame[is_control]


def pivot(rows: pd.DataFrame, across: str, value: str) -> tuple[Floats, tuple[list[str], list[str]]]:
    """A value for each class and column, NaN where there is none, and the names of both in the frame's order."""
    check_unique(rows, ["class_name", across])
    names, columns = list(rows["class_name"].unique()), list(rows[across].unique())
    table = rows.pivot(index="class_name", columns=across, values=value).reindex(index=names, columns=columns)
    return table.to_numpy(np.float64), ([str(name) for name in names], [str(name) for name in columns])


def numbers(values: Any, name: str, dims: int, shape: str) -> Floats:
    """Anything array-like as float64 of that many dimensions, not empty."""
    try:
        array = torch.as_tensor(values).detach().cpu().double().numpy()
    except (TypeError, ValueError, RuntimeError):
        raise ShapeError(f"{name} must be numbers of shape {shape}, got {type(values).__name__}") from None
    if array.ndim != dims or not array.size:
        raise ShapeError(f"{name} must have shape {shape}, got {array.shape}")
    return np.asarray(array, np.float64)


def check_shares(values: Floats, name: str) -> None:
    """Refuse values that are no shares, such as logits."""
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ShapeError(
            f"{name} must be shares in [0, 1], got {values.min():g} to {values.max():g}; of gate logits pass logits > 0"
        )


def names_or_numbers(names: Sequence[str] | None, count: int) -> list[str]:
    """As many class names as classes; None: their numbers."""
    class_names = list(map(str, range(count) if names is None else names))
    if len(class_names) != count:
        raise OptionError(f"class_names must be {count} names, one for each class, got {len(class_names)}")
    return class_names
