"""What paths cost: accuracy against multiplications."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from captum_classfilters.core.errors import OptionError, quoted
from captum_classfilters.visualize.canvas import axes_or_new
from captum_classfilters.visualize.curves import COLOURS, MARKERS
from captum_classfilters.visualize.maps import refuse_repeated
from captum_classfilters.visualize.paths import legend, sign

_DENSE = "dense"


def macs_accuracy(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw accuracy, with its interval, against multiplications: what does each way of saving them cost?

    Args:
        frame: One row for each network, method and setting: columns ``network``, ``method``, ``macs``, a share of the
            dense network's, ``accuracy``, ``low`` and ``high`` in [0, 1], NaN where there is no interval. The method
            ``"dense"`` is drawn in black, with a line across.
        ax: Where to draw. The legend stands to its right.

    Returns:
        The axes: a colour for each method, a shape for each network; settings of one method are joined.

    Raises:
        OptionError: Not such a frame, or numbers out of range.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("r20", "dense", 1.0, 0.92, 0.91, 0.93), ("r20", "paths", 0.5, 0.91, 0.9, 0.92)]
        >>> frame = pd.DataFrame(rows, columns=["network", "method", "macs", "accuracy", "low", "high"])
        >>> [text.get_text() for text in macs_accuracy(frame).get_legend().get_texts()]
        ['paths', 'dense']
    """
    rows = _checked_costs(frame)
    ax = axes_or_new(ax, (7.5, 4.2))
    methods = [method for method in rows["method"].unique() if method != _DENSE]
    networks = list(rows["network"].unique())
    colours = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(methods)} | {_DENSE: "black"}
    shapes = {network: MARKERS[index % len(MARKERS)] for index, network in enumerate(networks)}
    for (network, method), points in rows.groupby(["network", "method"], sort=False):
        points = points.sort_values("macs")
        reach = [points["accuracy"] - points["low"], points["high"] - points["accuracy"]]
        ax.errorbar(
            points["macs"], points["accuracy"], np.nan_to_num(np.stack(reach)), color=colours[method],
            marker=shapes[network], markersize=6, linewidth=1, capsize=3, linestyle="-" if method != _DENSE else "none",
        )  # fmt: skip
        if method == _DENSE:
            ax.axhline(points["accuracy"].iloc[0], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xlim(0, 1.05 * max(1.0, float(rows["macs"].max())))
    ax.set_xlabel("MACs, share of the dense network's")
    ax.set_ylabel("accuracy")
    ax.grid(True, axis="y", color="0.9")
    ax.set_axisbelow(True)
    listed = [*methods, *([_DENSE] if bool((rows["method"] == _DENSE).any()) else [])]
    only = shapes[networks[0]] if len(networks) == 1 else "_"
    signs = [sign(str(method), colours[method], only) for method in listed]
    if len(networks) > 1:
        signs += [sign(str(network), "0.5", shapes[network]) for network in networks]
    legend(ax, signs)
    return ax


# -- what is refused ---------------------------------------------------------------------------------------------------


def _checked_costs(frame: Any) -> pd.DataFrame:
    if not isinstance(frame, pd.DataFrame):
        raise OptionError(f"frame must be a DataFrame, got {type(frame).__name__}")
    needed = ["network", "method", "macs", "accuracy", "low", "high"]
    if missing := [column for column in needed if column not in frame.columns]:
        raise OptionError(f"frame lacks the columns {missing}, got {quoted(frame.columns, 15)}; name them so")
    if frame.empty:
        raise OptionError("frame has no rows; measure a network at least")
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
    refuse_repeated(frame, ["network", "method", "macs"])
    return frame


# -- how it is drawn ---------------------------------------------------------------------------------------------------
