"""Pictures of many calculation paths: do classes differ in theirs, which filters open, and what does that save?

Source: "Interpretable neural network decoupling", figures 3, 4 and 7. `fields.py` draws single paths, and where filters
look. N images, C classes, L layers with K_l channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patheffects import withStroke

from captum_classfilters.core.errors import LabelError, OptionError, ShapeError
from captum_classfilters.decoupling import Paths
from captum_classfilters.visualize.canvas import (
    SMALL,
    Floats,
    Ints,
    axes_or_new,
    longest,
    name_columns,
    room,
    shortened,
)
from captum_classfilters.visualize.maps import channel_map
from captum_classfilters.visualize.tables import UNSEEN

# Petroff 2021, "Accessible color sequences": ten colours that stay apart in a scatter, also for colour-blind readers
POINTS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
_SHAPES = "os^DvPX<p>*h"
_LISTED = len(_SHAPES)  # classes: beyond, a legend is too long, and names stand in the picture
STATES = {"energetic": "#E69F00", "dynamic": "#0072B2", "silent": "0.8"}
_OPENED = {
    "energetic": "energetic (open for every image)",
    "dynamic": "dynamic (open for some)",
    "silent": "silent (for none)",
}


def path_embedding(
    points: Any,
    labels: Any,
    class_names: Sequence[str] | None = None,
    *,
    silhouette: float | None = None,
    method: str = "t-SNE",
    ax: Axes | None = None,
) -> Axes:
    """Draw paths as points of a plane, coloured by class: do classes take different paths?

    Source: figures 3 and 7. Differs from the paper: each class has a shape besides its colour, and no class lies on
    top: points are drawn in random order.

    Args:
        points: From `Paths.embed`, ``(N, 2)``.
        labels: ``(N,)`` indices of classes, or of other groups, such as images and their adversarial twins.
        class_names: C names; None: numbers.
        silhouette: Coefficient in [-1, 1] for the title, of the paths rather than of their points: t-SNE moves apart
            what is not.
        method: What made the points, for the axes' titles.
        ax: Where to draw. The legend stands to its right.

    Returns:
        The axes, with one collection of points, in random order. More than 12 classes
        are named in the picture, at the median of their points, as far as names do not run into each other.

    Raises:
        ShapeError: ``points`` is not ``(N, 2)``, finite, with at least one row.
        LabelError: ``labels`` is not one index of a name for each point.
        OptionError: ``silhouette`` is out of range.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = path_embedding([[0.0, 1.0], [2.0, 3.0]], [1, 0], ["cat", "dog"], silhouette=0.25)
        >>> ax.get_title(), [text.get_text() for text in ax.get_legend().get_texts()]
        ('2 paths, silhouette 0.25', ['cat', 'dog'])
    """
    where, classes, names = _checked_points(points, labels, class_names)
    if silhouette is not None and not -1 <= silhouette <= 1:
        raise OptionError(f"silhouette is a coefficient in [-1, 1], got {silhouette!r}; pass the mean over the paths")
    ax = axes_or_new(ax, (6.5, 5.0))
    order = np.random.default_rng(0).permutation(len(where))
    size = float(np.clip(9000 / len(where), 7, 40))
    cloud = ax.scatter(
        where[order, 0],
        where[order, 1],
        s=size,
        c=[POINTS[c % len(POINTS)] for c in classes[order]],
        linewidths=0.2,
        edgecolors="white",
    )
    # one collection of many shapes: one for each class would put the last class on top of all
    shapes = [MarkerStyle(shape) for shape in _SHAPES]
    outlines = [shape.get_path().transformed(shape.get_transform()) for shape in shapes]
    cloud.set_paths([outlines[c % len(outlines)] for c in classes[order]])
    ax.set_aspect("equal", "datalim")  # distances are alike in both directions
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel(f"{method}, first axis (no unit)")
    ax.set_ylabel(f"{method}, second axis (no unit)")
    ax.set_title(
        f"{len(where)} paths" + ("" if silhouette is None else f", silhouette {silhouette:.2f}"), fontsize="medium"
    )
    present = np.unique(classes)
    if len(present) <= _LISTED:
        legend(ax, [sign(shortened(names[c]), POINTS[c % len(POINTS)], _SHAPES[c % len(_SHAPES)]) for c in present])
    else:
        _name_clouds(ax, where, classes, names)
    return ax


def filter_states(states: pd.DataFrame, *, shares: bool = True, ax: Axes | None = None) -> Axes:
    """Draw how many filters of each layer are open for every image, for some, or for none, as stacked bars.

    Source: figure 4. Differs from the paper: no difference.

    Args:
        states: What `Paths.states` returns: index of layers, columns ``energetic``, ``silent``, ``dynamic``.
        shares: Of the layer's filters; False: how many.
        ax: Where to draw. The legend stands above.

    Returns:
        The axes; of many layers every n-th is named.

    Raises:
        OptionError: Not such a frame.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = filter_states(pd.DataFrame({"energetic": [1], "silent": [0], "dynamic": [3]}, index=["conv1"]))
        >>> [float(bars[0].get_height()) for bars in ax.containers]
        [0.25, 0.75, 0.0]
    """
    counts = _checked_states(states)
    layers = [str(name) for name in states.index]
    heights = counts / counts.sum(1, keepdims=True) if shares else counts
    # the height takes the names in, which stand upright under many bars
    size = float(np.clip(0.2 * len(layers) + 1.0, 4.8, 13.0)), 3.0 + 0.06 * longest(layers)
    ax = axes_or_new(ax, size)
    below = np.zeros(len(layers))
    for (state, colour), height in zip(STATES.items(), heights.T, strict=True):
        ax.bar(range(len(layers)), height, 0.85, below, color=colour, label=_OPENED[state])
        below = below + height
    ax.set_xlim(-0.6, len(layers) - 0.4)
    ax.set_ylim(0, 1 if shares else 1.04 * counts.sum(1).max())
    name_columns(ax, layers)
    ax.set_xlabel("layer")
    ax.set_ylabel("share of the layer's filters" if shares else "filters")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0, frameon=False, fontsize="small")
    return ax


def path_profiles(
    profiles: Any,
    layer: str | int | None = None,
    class_names: Sequence[str] | None = None,
    *,
    order: str | None = "class",
    ax: Axes | None = None,
) -> Axes:
    """Draw which share of each class's images opens each channel of a layer: classes down, channels across.

    Args:
        profiles: `Paths` with labels; or shares of one layer, ``(C, K_l)`` in [0, 1], NaN for a class without images.
        layer: Of `Paths`: a name or an index. Of shares: what to call it.
        class_names: C names; None: numbers.
        order: ``"class"``: a channel stands in the block of the class that opens it most above the others' mean; then
            channels that are alike for all, then silent ones. ``"state"``: energetic, dynamic (most open first),
            silent. None: as they are.
        ax: Where to draw.

    Returns:
        The axes; colours run from 0 to 1. Classes without images are hatched.

    Raises:
        OptionError: There is no such layer; unknown ``order``; no class has images; names do not fit.
        ShapeError: Not shares of that shape.
        LabelError: The paths have no labels.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = path_profiles(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.25]]), "conv1", ["cat", "dog"])
        >>> [text.get_text() for text in ax.get_xticklabels()], ax.images[0].get_array().tolist()
        (['2', '0', '1'], [[1.0, 0.0, 0.0], [0.25, 1.0, 0.0]])
    """
    name = layer if isinstance(layer, str) else f"layer {layer}" if layer is not None else "the layer"
    if isinstance(profiles, Paths):
        index = profiles.index(layer)  # type: ignore[arg-type]
        name = profiles.layers[index]
        profiles = torch.split(profiles.profiles()[0], list(profiles.channels), 1)[index]
    values = numbers(profiles, "profiles", 2, "(C, K_l), of one layer")
    seen = np.asarray(~np.isnan(values).any(1))
    if not bool(seen.any()):
        raise OptionError("no class has images, so there is nothing to draw; show some with labels")
    check_shares(values[seen], "profiles")
    names = _names(class_names, len(values))
    channels, owners = _ordered(values[seen], np.flatnonzero(seen), order)
    values = np.where(seen[:, None], values, np.nan)
    ax = channel_map(
        ax,
        values[:, channels],
        names,
        channels,
        owners,
        "Blues",
        (0.0, 1.0),
        "share of images that open it",
    )
    # matplotlib's default smooths classes into one another where channels are many
    ax.images[0].set_interpolation("nearest")
    about = {"class": ", grouped by the class it is most open for", "state": ": energetic, dynamic, silent", None: ""}[
        order
    ]
    ax.set_xlabel(f"channel of {name}{about}" + ("" if seen.all() else f"\n{UNSEEN}"))
    return ax


def numbers(given: Any, name: str, dims: int, shape: str) -> Floats:
    """Anything array-like as float64 of that many dimensions, not empty."""
    try:
        values = torch.as_tensor(given).detach().cpu().double().numpy()
    except (TypeError, ValueError, RuntimeError):
        raise ShapeError(f"{name} must be numbers of shape {shape}, got {type(given).__name__}") from None
    if values.ndim != dims or not values.size:
        raise ShapeError(f"{name} must have shape {shape}, got {values.shape}")
    return np.asarray(values, np.float64)


def check_shares(values: Floats, name: str) -> None:
    """Refuse what is no share: logits above all."""
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ShapeError(
            f"{name} must be shares in [0, 1], got {values.min():g} to {values.max():g}; of gate logits pass logits > 0"
        )


def _checked_points(points: Any, labels: Any, class_names: Sequence[str] | None) -> tuple[Floats, Ints, list[str]]:
    where = numbers(points, "points", 2, "(N, 2)")
    if where.shape[1] != 2 or not bool(np.isfinite(where).all()):
        raise ShapeError(f"points must be finite, of shape (N, 2), got {where.shape}; pass what Paths.embed returns")
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise LabelError(f"labels must be indices of classes, got {type(labels).__name__}; pass Paths.labels") from None
    if given.shape != (len(where),) or given.is_floating_point():
        raise LabelError(
            f"labels must be ({len(where)},) indices, one for each point, got {given.dtype} of shape "
            f"{tuple(given.shape)}; pass the labels of the same Paths"
        )
    classes = given.cpu().long().numpy()
    names = _names(class_names, int(classes.max()) + 1 if class_names is None else len(class_names))
    if classes.min() < 0 or classes.max() >= len(names):
        raise LabelError(
            f"labels must lie in [0, {len(names)}), got {classes.min()} to {classes.max()}; name all classes"
        )
    return where, classes, names


def _names(given: Sequence[str] | None, count: int) -> list[str]:
    names = [str(name) for name in range(count)] if given is None else [str(name) for name in given]
    if len(names) != count:
        raise OptionError(f"class_names must be {count} names, one for each class, got {len(names)}")
    return names


def _checked_states(states: Any) -> Floats:
    if not isinstance(states, pd.DataFrame):
        raise OptionError(f"states must be the DataFrame that Paths.states returns, got {type(states).__name__}")
    if missing := [state for state in STATES if state not in states.columns]:
        raise OptionError(f"states lacks the columns {missing}, got {list(states.columns)}; pass Paths.states()")
    counts = states[list(STATES)].to_numpy(np.float64)
    if not len(counts) or not bool((counts >= 0).all()) or not bool(counts.sum(1).all()):
        raise OptionError("states must count the filters of at least one layer, none without filters")
    return counts


def sign(name: str, colour: str, shape: str) -> Line2D:
    """A marker for a legend."""
    return Line2D([], [], color=colour, marker=shape, linestyle="none", markersize=7, markeredgewidth=1.5, label=name)


def legend(ax: Axes, signs: Sequence[Any]) -> None:
    """A legend to the right, where it hides no data."""
    ax.legend(
        handles=signs, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize="small"
    )


def _name_clouds(ax: Axes, where: Floats, classes: Ints, names: Sequence[str]) -> None:
    """The name of each class at the median of its points, as far as names do not run into each other."""
    # points for each unit, the same in both directions; 0.85: margins, and what the layout takes later
    points = 0.85 * float(np.min(np.array(room(ax)) / np.maximum(np.ptp(where, axis=0), 1e-12)))
    present = np.unique(classes)
    texts = [shortened(names[each]) for each in present]
    middles = np.stack([np.median(where[classes == each], axis=0) for each in present])
    half = np.array([[0.3 * SMALL * len(text), 0.6 * SMALL] for text in texts])
    # (C, C): which names would touch, each itself too
    touching = (np.abs(middles[:, None] - middles) * points < half[:, None] + half).all(2)
    free = np.ones(len(present), bool)
    for each in np.argsort(touching.sum(1), kind="stable"):
        if free[each]:
            free &= ~touching[each]
            halo = [withStroke(linewidth=2.5, foreground="white")]
            x, y = middles[each]
            ax.text(x, y, texts[each], fontsize=SMALL, ha="center", va="center", path_effects=halo)
    if len(ax.texts) < len(present):
        ax.set_title(f"{ax.get_title()}; {len(ax.texts)} of {len(present)} classes named", fontsize="medium")


def _ordered(values: Floats, seen: Ints, order: str | None) -> tuple[Ints, Ints]:
    """Channels in drawing order, and the block each is in; ``values`` are those of the classes ``seen``."""
    count = values.shape[1]
    if order is None:
        return np.arange(count), np.zeros(0, np.int64)
    silent, mean = ~values.any(0), values.mean(0)
    if order == "state":
        block = np.where((values == 1).all(0), 0, np.where(silent, 2, 1))
        rank = -mean
    elif order == "class":
        others = (values.sum(0) - values) / max(len(values) - 1, 1)
        above = values - others
        # behind all classes: what is open alike for each, then what is never open
        block = np.where(silent, seen[-1] + 2, np.where(above.max(0) <= 1e-9, seen[-1] + 1, seen[above.argmax(0)]))
        rank = -above.max(0)
    else:
        raise OptionError(f'order must be "class", "state" or None, got {order!r}')
    channels = np.lexsort((rank, block))
    return channels, block[channels]
