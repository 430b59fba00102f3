"""What the pictures share: whose axes to draw on, which ticks can be read, colours, text in cells.

Nothing here knows what is drawn; `tables.py`, `curves.py`, `grid.py` and `cards.py` do.
"""

from collections.abc import Sequence
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from captum_classfilters.core.errors import OptionError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SMALL = 7  # points: the size of the text that there is much of
_LINE = 1.25  # height of a line of text, in font sizes
_WIDE = 0.65  # width of a character, in font sizes
_LONGEST = 24  # characters of a class name that are shown
NOTHING = "0.85"  # grey: there is no number here


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """``ax``, or the axes of a new figure of that size, laid out so that nothing is cut off."""
    if ax is None:
        # constrained layout knows of colour bars and of legends outside; tight layout does not
        return plt.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise OptionError(
            f"ax must be one matplotlib Axes or None, got {type(ax).__name__}; pass one element of an array"
        )
    return ax


def figure_of(ax: Axes) -> Figure | SubFigure:
    """The figure that ``ax`` is on."""
    return cast(Figure | SubFigure, ax.get_figure())


def heat_map(ax: Axes, values: Floats, cmap: str, low: float, high: float, aspect: Any = "auto") -> AxesImage:
    """Draw ``values``, one cell for each; NaN is grey."""
    ax.grid(False)
    colours = colormaps[cmap].with_extremes(bad=NOTHING)
    shown = np.ma.masked_invalid(values)
    return ax.imshow(shown, cmap=colours, vmin=low, vmax=high, aspect=aspect, origin="upper", interpolation="nearest")


def colour_bar(image: AxesImage, ax: Axes, label: str) -> Axes:
    """A colour bar beside ``ax``, with a label; returns its axes."""
    return figure_of(ax).colorbar(image, ax=ax, label=label, pad=0.02).ax


def hatch(ax: Axes, left: float, bottom: float, width: float, height: float) -> None:
    """Strike cells out: grey alone could be read as a small number."""
    ax.add_patch(
        Rectangle((left, bottom), width, height, facecolor=NOTHING, edgecolor="0.5", hatch="////", linewidth=0)
    )


def write_cells(ax: Axes, image: AxesImage, texts: Sequence[Sequence[str]], size: float = SMALL) -> None:
    """Write ``texts[row][column]`` into the cells of a heat map, dark on light and light on dark."""
    shades = cast(Floats, np.asarray(image.to_rgba(np.ma.asarray(image.get_array()))))
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if text:
                ink = "black" if _brightness(shades[row, column]) > 0.45 else "white"
                ax.text(column, row, text, ha="center", va="center", fontsize=size, color=ink)


def _brightness(rgba: Floats) -> float:
    # as the eye weighs red, green and blue (ITU-R BT.601)
    return float(rgba[:3] @ np.array([0.299, 0.587, 0.114]))


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


def longest(names: Sequence[str]) -> int:
    """Characters of the longest name, as shown."""
    return min(max(map(len, names)), _LONGEST)


def _text_size(names: Sequence[str]) -> float:
    return SMALL if len(names) > 12 else SMALL + 2


def room(ax: Axes) -> tuple[float, float]:
    """Width and height of ``ax`` in points."""
    extent, dots = ax.get_window_extent(), figure_of(ax).dpi / 72
    return float(extent.width / dots), float(extent.height / dots)


def thinned(count: int, fits: float) -> list[int]:
    """Every n-th of ``count`` ticks, n round (1, 2, 5, 10, ...), so that at most about ``fits`` are left.

    Example:
        >>> thinned(10, 40.0), thinned(1000, 5.0)
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 200, 400, 600, 800])
    """
    wanted = count / max(fits, 1.0)
    step = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power >= wanted)
    return list(range(0, count, step))


def shortened(name: str) -> str:
    """A name of at most 24 characters."""
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
