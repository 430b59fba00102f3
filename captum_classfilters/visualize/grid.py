"""How much do k1, what a sample votes for, and k2, what a class keeps, matter? A heat map of both."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from captum_classfilters.core.errors import OptionError
from captum_classfilters.visualize.canvas import (
    SMALL,
    Floats,
    axes_or_new,
    colour_bar,
    heat_map,
    name_columns,
    name_rows,
    write_cells,
)
from captum_classfilters.visualize.frames import DENSE, RANDOM, rows_of

ANNOTATED = 20  # cells along a side: beyond, the numbers are too small to read
_BEST = "#D55E00"


def k_grid(curve: pd.DataFrame, *, value: str = "accuracy", class_name: str = "all", ax: Axes | None = None) -> Axes:
    """Draw a number against k1 (down) and k2 (across), with the best cell framed.

    Source: Badola et al. 2022, "Decomposing the Deep", figure 1. Differs from the paper: no difference in what is
    drawn; ``value="relative"`` is its ratio r_A.

    Args:
        curve: What `metrics.accuracy_curve` returns for tables named after their k1, ``{"1": ..., "2": ...}``; its
            ``k`` is k2. The rows ``"dense"`` and ``"random"`` are left out.
        value: The column to draw.
        class_name: Whose rows: a class, or ``"all"``.
        ax: Where to draw.

    Returns:
        The axes. Combinations that were not measured are grey. Of equally good cells the one with the fewest channels,
        k2, is framed, then the one with the smallest k1. Chosen on test data, the best cell looks better than it is:
        choose on a split of the training data.

    Raises:
        OptionError: Not such a frame, names that are no numbers, unknown value or class, or a class without samples.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("1", 1, 0.5), ("1", 2, 0.6), ("2", 1, 0.4), ("2", 2, 0.75), ("random", 1, 0.1)]
        >>> frame = pd.DataFrame(rows, columns=["filters", "k", "accuracy"]).assign(class_name="all")
        >>> [text.get_text() for text in k_grid(frame).texts]
        ['0.500', '0.600', '0.400', '0.750']
    """
    rows = rows_of(curve, class_name, [value], without=(DENSE, RANDOM))
    if not is_numeric_dtype(rows[value]) or is_bool_dtype(rows[value]):
        raise OptionError(f"value must name a column of numbers, got {value!r}, whose dtype is {rows[value].dtype}")
    k1s = {name: _number(name) for name in rows["filters"].unique()}
    names = sorted(k1s, key=k1s.__getitem__)
    table = rows.pivot(index="filters", columns="k", values=value).loc[names]
    values = table.to_numpy(dtype=np.float64)

    ax = axes_or_new(ax, _size(*values.shape))
    image = heat_map(ax, values, "cividis", float(np.nanmin(values)), float(np.nanmax(values)))
    if max(values.shape) <= ANNOTATED:
        write_cells(ax, image, [["" if np.isnan(v) else f"{v:.3f}" for v in line] for line in values], SMALL)
    row, column = _best(values)
    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=_BEST, linewidth=2.5, clip_on=False))
    name_rows(ax, names)
    name_columns(ax, [str(k) for k in table.columns])
    ax.set_ylabel("k1, channels each sample votes for")
    ax.set_xlabel("k2, channels kept for each class")
    ax.set_title(
        f"best {value} {values[row, column]:.3f} at k1 = {names[row]}, k2 = {table.columns[column]}", fontsize="medium"
    )
    colour_bar(image, ax, value if class_name == "all" else f"{value} of class {class_name}")
    return ax


def _number(name: object) -> float:
    try:
        return float(str(name))
    except ValueError:
        raise OptionError(
            f'filters must be named after their k1, such as "5"; got {name!r}. Other selectors belong in accuracy_curve'
        ) from None


def _best(values: Floats) -> tuple[int, int]:
    best = np.argwhere(values == np.nanmax(values))
    row, column = best[np.lexsort((best[:, 0], best[:, 1]))[0]]
    return int(row), int(column)


def _size(rows: int, columns: int) -> tuple[float, float]:
    return float(np.clip(0.45 * columns + 2.2, 4.5, 11.0)), float(np.clip(0.3 * rows + 1.4, 3.0, 8.0))
