"""Heat maps of classes and channels: what the pictures of gates share.

Reads their frames, puts channels into blocks of classes, draws. `gates.py` says what is drawn. C classes, K channels.
"""

from collections.abc import Callable, Sequence
from textwrap import fill

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.core.errors import OptionError, ShapeError, quoted
from captum_classfilters.gating import LabelSensitiveGate
from captum_classfilters.metrics.gates import as_gate
from captum_classfilters.visualize.canvas import (
    SMALL,
    Floats,
    Ints,
    axes_or_new,
    colour_bar,
    hatch,
    heat_map,
    longest,
    name_columns,
    name_rows,
    room,
    shortened,
    write_cells,
)
from captum_classfilters.visualize.tables import ANNOTATED, BORDERS, table_size

# -- what is drawn -----------------------------------------------------------------------------------------------------


def checked(frame: pd.DataFrame, maker: str, columns: Sequence[str]) -> pd.DataFrame:
    """Refuse what is not the frame of that metric."""
    if not isinstance(frame, pd.DataFrame):
        raise OptionError(f"frame must be the DataFrame that metrics.{maker} returns, got {type(frame).__name__}")
    if missing := [column for column in columns if column not in frame.columns]:
        got = quoted(frame.columns, 15)
        raise OptionError(f"frame lacks the columns {missing}, got {got}; pass the frame that metrics.{maker} returns")
    if frame.empty:
        raise OptionError(f"frame has no rows; pass the frame that metrics.{maker} returns")
    return frame


def refuse_repeated(rows: pd.DataFrame, keys: list[str]) -> None:
    """Refuse two runs in one frame: a cell has one number."""
    repeated = rows[rows.duplicated(keys)]
    if not repeated.empty:
        cell = ", ".join(f"{key} {str(repeated.iloc[0][key])!r}" for key in keys)
        raise OptionError(f"frame has several rows of {cell}; draw one run at a time")


def pivot(rows: pd.DataFrame, across: str, value: str) -> tuple[Floats, list[str], list[str]]:
    """A value for each class and column, NaN where there is none, and the names of both in the frame's order."""
    refuse_repeated(rows, ["class_name", across])
    names, columns = list(rows["class_name"].unique()), list(rows[across].unique())
    table = rows.pivot(index="class_name", columns=across, values=value).reindex(index=names, columns=columns)
    return table.to_numpy(np.float64), [str(name) for name in names], [str(name) for name in columns]


def as_table(given: LabelSensitiveGate | ClassFilters, name: str) -> ClassFilters:
    """The table of a gate, or a table as it is."""
    if isinstance(given, LabelSensitiveGate):
        return given.class_filters()
    if not isinstance(given, ClassFilters):
        raise OptionError(
            f"{name} must be a LabelSensitiveGate or a ClassFilters, got {type(given).__name__}; "
            "of a dict of them, pass one"
        )
    return given


def unseen(filters: ClassFilters) -> npt.NDArray[np.bool_]:
    """``(C,)``: classes without samples; none where no class has any, as in a gate before its training."""
    seen: npt.NDArray[np.bool_] = filters.seen.numpy()
    return ~seen & seen.any()


def in_order_of(
    order: LabelSensitiveGate | ClassFilters | None, channels: int
) -> tuple[Ints, Ints, ClassFilters | None]:
    """`grouped` of a gate or table for a frame of that many channels, and the table; None: channels as they are."""
    if order is None:
        return np.arange(channels), np.zeros(0, np.int64), None
    filters = as_table(order, "order")
    if filters.num_channels != channels:
        raise ShapeError(
            f"order has {filters.num_channels} channels, the frame {channels}; pass the gate or table of that network"
        )
    return *grouped(filters), filters


def grouped(filters: ClassFilters) -> tuple[Ints, Ints]:
    """Channels in drawing order, and whose block each is in: a class, C for channels of several, C + 1 for nobody's."""
    table = as_gate(filters.scores).numpy()
    table[unseen(filters)] = 0
    largest = table.max(0)
    level = (table == largest).sum(0)
    owner = np.where(largest <= 0, len(table) + 1, np.where(level > 1, len(table), table.argmax(0)))
    order = np.lexsort((table.sum(0), owner))  # stable: of equals the lower channel comes first
    return order, owner[order]


def scale(values: Floats) -> tuple[str, tuple[float, float]]:
    """Colours and their limits for numbers that may be below 0."""
    largest = float(np.nanmax(np.abs(values))) or 1.0
    return ("RdBu_r", (-largest, largest)) if np.nanmin(values) < 0 else ("Blues", (0.0, largest))


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def channel_map(
    ax: Axes | None,
    values: Floats,
    names: Sequence[str],
    channels: Ints,
    owners: Ints,
    cmap: str,
    limits: tuple[float, float],
    label: str,
) -> Axes:
    """Classes down, channels across; rows of NaN are hatched."""
    ax = axes_or_new(ax, table_size(len(values), len(channels), longest(names)))
    image = heat_map(ax, values, cmap, *limits)
    _hatch_empty(ax, values)
    borders(ax, owners)
    name_rows(ax, names)
    name_columns(ax, [str(channel) for channel in channels])
    ax.set_ylabel("class")
    colour_bar(image, ax, label)
    return ax


def class_map(
    ax: Axes | None,
    values: Floats,
    names: Sequence[str],
    across: Sequence[str],
    cmap: str,
    limits: tuple[float, float],
    label: str,
    digits: Callable[[float], str],
) -> Axes:
    """Classes down and across, with numbers where there is room; rows of NaN are hatched."""
    side, letters = float(np.clip(0.42 * len(values), 3.0, 8.0)), 0.08 * longest([*names, *across]) + 0.2
    ax = axes_or_new(ax, (side + letters + 1.5, side + letters + 1.3))
    image = heat_map(ax, values, cmap, *limits, aspect="equal")
    _hatch_empty(ax, values)
    if max(values.shape) <= ANNOTATED:
        write_cells(ax, image, [["" if np.isnan(v) else digits(v) for v in line] for line in values], SMALL)
    name_rows(ax, names)
    name_columns(ax, across)
    colour_bar(image, ax, label)
    return ax


def write_title(ax: Axes, text: str) -> None:
    """A title in as many lines as it needs."""
    # 0.8: the layout may take some of the width away later
    ax.set_title(fill(text, max(20, int(0.8 * room(ax)[0] / 6))), fontsize="medium")


def _hatch_empty(ax: Axes, values: Floats) -> None:
    for row in np.flatnonzero(np.isnan(values).all(1)):
        hatch(ax, -0.5, row - 0.5, values.shape[1], 1)


def borders(ax: Axes, owners: Ints, both: bool = False) -> None:
    """Lines between blocks; of very many they would hide the cells."""
    places = np.flatnonzero(np.diff(owners)) + 0.5
    if len(places) < BORDERS:
        for place in places:
            ax.axvline(place, color="0.6", linewidth=0.5)
            if both:
                ax.axhline(place, color="0.6", linewidth=0.5)


def name_blocks(ax: Axes, owners: Ints, classes: Sequence[str]) -> None:
    """Names down the left, each beside the middle of its block, where it does not run into the one above."""
    names, height = [*classes, "shared", "no class"], room(ax)[1] / len(owners)
    places: list[float] = []
    texts = []
    for owner in np.unique(owners):
        place = float(np.flatnonzero(owners == owner).mean())
        if not places or (place - places[-1]) * height >= 1.3 * SMALL:
            places.append(place)
            texts.append(shortened(names[owner]))
    ax.set_yticks(places, texts, fontsize=SMALL)
