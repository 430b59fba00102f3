"""Accuracy against the number of channels kept, one line for each way of choosing them."""

from collections.abc import Sequence
from math import log2

import pandas as pd
from matplotlib.axes import Axes

from captum_classfilters.core.errors import OptionError
from captum_classfilters.visualize.canvas import SMALL, axes_or_new, room
from captum_classfilters.visualize.frames import DENSE, RANDOM, rows_of

# Paul Tol's "muted": nine colours that stay apart for colour-blind readers; markers and dashes are the second sign
COLOURS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#999933", "#44AA99", "#DDCC77", "#AA4499")
MARKERS = "osD^vP*Xh"
_DASHES = ("-", "-.", ":")


def accuracy_curve(curve: pd.DataFrame, *, class_name: str = "all", ax: Axes | None = None) -> Axes:
    """Draw accuracy against k, with intervals, beside the full head and the random control.

    Args:
        curve: What `metrics.accuracy_curve` returns: columns ``filters``, ``k``, ``class_name``, ``accuracy``, ``low``,
            ``high``; ``samples``, if there, goes into the title. In ``filters``, ``"dense"`` is the full head, drawn as
            a horizontal line, and ``"random"`` the control, in grey; any other name gets a line.
        class_name: Whose rows: a class, or ``"all"``.
        ax: Where to draw. The legend stands to its right, where it hides no data: leave room there, for instance with
            ``layout="constrained"``.

    Returns:
        The axes; k on a logarithmic scale, with a tick at each k.

    Raises:
        OptionError: Not such a frame, unknown class, a class without samples, or k below 1.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> rows = [("dense", 64, 0.9), ("random", 1, 0.1), ("random", 4, 0.3), ("margin", 1, 0.5), ("margin", 4, 0.8)]
        >>> frame = pd.DataFrame(rows, columns=["filters", "k", "accuracy"]).assign(class_name="all")
        >>> ax = accuracy_curve(frame.assign(low=frame.accuracy - 0.05, high=frame.accuracy + 0.05))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['dense (all channels)', 'margin', 'random (control)']
    """
    rows = rows_of(curve, class_name, ["accuracy", "low", "high"])
    lines = rows[rows["filters"] != DENSE]
    if not bool((lines["k"] >= 1).all()):
        raise OptionError(f"k must be at least 1, got {lines['k'].min()}; it counts the channels kept")
    ax = axes_or_new(ax, (7.5, 4.2))
    ax.set_xscale("log", base=2)
    _dense(ax, rows[rows["filters"] == DENSE])
    names = [name for name in lines["filters"].unique() if name != RANDOM]
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        marker = MARKERS[index % len(MARKERS)]
        dashes = _DASHES[index // len(COLOURS) % len(_DASHES)]
        _line(ax, lines[lines["filters"] == name], name, colour, marker, dashes, order=3)
    _line(ax, lines[lines["filters"] == RANDOM], "random (control)", "0.5", "", "--", order=2)

    _ticks(ax, sorted({int(k) for k in lines["k"]}))
    ax.set_xlabel("k, channels kept for each class")
    ax.set_ylabel("accuracy" if class_name == "all" else "accuracy on samples of this class")
    ax.set_title(_title(rows, class_name), fontsize="medium")
    ax.grid(True, axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, fontsize="small")
    return ax


def _dense(ax: Axes, rows: pd.DataFrame) -> None:
    if rows.empty:
        return
    row = rows.iloc[0]
    ax.axhspan(row["low"], row["high"], color="black", alpha=0.08, linewidth=0)
    ax.axhline(row["accuracy"], color="black", linewidth=1.2, label="dense (all channels)")


def _line(ax: Axes, rows: pd.DataFrame, name: str, colour: str, marker: str, dashes: str, *, order: int) -> None:
    if rows.empty:
        return
    rows = rows.sort_values("k")
    ax.fill_between(rows["k"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0, zorder=order - 1)
    ax.plot(
        rows["k"], rows["accuracy"], dashes, color=colour, marker=marker, markersize=4, label=name, zorder=order
    )  # fmt: skip


def _ticks(ax: Axes, ks: Sequence[int]) -> None:
    """A tick at each k; a number where it does not run into its neighbour's."""
    ax.set_xticks([], minor=True)
    if not ks:
        ax.set_xticks([])
        return
    span = max(log2(ks[-1] / ks[0]), 1.0)
    points = [log2(k / ks[0]) / span * room(ax)[0] for k in ks]
    needed = SMALL * (len(str(ks[-1])) + 1)
    kept = {ks[-1]}
    last = float(-needed)
    for k, x in zip(ks, points, strict=True):
        if x - last >= needed and points[-1] - x >= needed:
            kept.add(k)
            last = x
    ax.set_xticks(ks, [str(k) if k in kept else "" for k in ks])


def _title(rows: pd.DataFrame, class_name: str) -> str:
    who = "all classes" if class_name == "all" else f"class {class_name}"
    return f"{who}, {int(rows['samples'].max())} samples" if "samples" in rows.columns else who
