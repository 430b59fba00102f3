"""Pictures of calculation paths: which channels open for which images and classes, layer by layer.

Source: "Interpretable neural network decoupling", figures 1, 3, 4 and 7. `images.py` draws where filters look.
N images, C classes, L layers with K_l channels.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from captum_classfilters.core.check import integer, one_of
from captum_classfilters.core.errors import LabelError, OptionError, ShapeError
from captum_classfilters.decoupling import Paths
from captum_classfilters.visualize.kit import (
    SMALL,
    UNSEEN,
    Floats,
    Ints,
    axes_or_new,
    channel_map,
    check_frame,
    check_shares,
    colour_bar,
    figure_of,
    hide_frame,
    legend_beside,
    legend_marker,
    longest,
    name_columns,
    names_or_numbers,
    numbers,
    room,
    shortened,
    spaced,
    table_size,
    thinned,
)

# Petroff 2021, "Accessible color sequences": ten colours that stay apart in a scatter, also for colour-blind readers
POINTS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
_SHAPES = "os^DvPX<p>*h"
_LISTED = len(_SHAPES)  # a legend of more classes is too long; their names are written into the picture
STATES = {"energetic": "#E69F00", "dynamic": "#0072B2", "silent": "0.8"}
_OPENED = {
    "energetic": "energetic (open for every image)",
    "dynamic": "dynamic (open for some)",
    "silent": "silent (for none)",
}
# Dark colours: a closed channel is pale grey, an open one has these
_GROUPS = ("#0072B2", "#C44601", "#117733", "#882255", "#5B4A00", "#332288")
_CLOSED = "0.92"
_BETWEEN = "#E69F00"  # layers: seen on dark and on light blue
_WRAPPED = 6  # groups: of so few, long names go on in a second line
_OPENS = "share of images that open it"


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

    Source: figures 3 and 7. Differs from the paper: each class has a shape besides its colour, and points are drawn in
    random order, so that no class lies on top.

    Args:
        points: From `Paths.embed`, ``(N, 2)``.
        labels: ``(N,)`` indices of classes, or of other groups, such as images and their adversarial twins.
        class_names: C names; None: numbers.
        silhouette: Coefficient in [-1, 1] for the title. Compute it from the paths rather than from their points:
            t-SNE also moves points apart that are not.
        method: What made the points, for the axes' titles.
        ax: Where to draw. The legend stands to its right.

    Returns:
        The axes, with one collection of points, in random order. More than 12 classes are named in the picture, at the
        median of their points, as far as names do not run into each other.

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
    colours = [POINTS[label % len(POINTS)] for label in classes[order]]
    cloud = ax.scatter(where[order, 0], where[order, 1], s=size, c=colours, linewidths=0.2, edgecolors="white")
    # one collection of many shapes: one for each class would put the last class on top of all
    shapes = [MarkerStyle(shape) for shape in _SHAPES]
    outlines = [shape.get_path().transformed(shape.get_transform()) for shape in shapes]
    cloud.set_paths([outlines[c % len(outlines)] for c in classes[order]])
    ax.set_aspect("equal", "datalim")  # distances are alike in both directions
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel(f"{method}, first axis (no unit)")
    ax.set_ylabel(f"{method}, second axis (no unit)")
    note = "" if silhouette is None else f", silhouette {silhouette:.2f}"
    ax.set_title(f"{len(where)} paths{note}", fontsize="medium")
    present = np.unique(classes)
    if len(present) <= _LISTED:
        signs = ((shortened(names[c]), POINTS[c % len(POINTS)], _SHAPES[c % len(_SHAPES)]) for c in present)
        legend_beside(ax, [legend_marker(*sign) for sign in signs])
    else:
        _name_clouds(ax, where, classes, names)
    return ax


def filter_states(states: pd.DataFrame, *, shares: bool = True, ax: Axes | None = None) -> Axes:
    """Draw how many filters of each layer are open for every image, for some, or for none, as stacked bars.

    Source: figure 4. Differs from the paper: no difference.

    Args:
        states: What `Paths.states` returns: index of layers, columns ``energetic``, ``silent``, ``dynamic``.
        shares: Draw shares of the layer's filters; False: how many filters.
        ax: Where to draw. The legend stands above.

    Returns:
        The axes; of many layers every n-th is named.

    Raises:
        OptionError: The frame is not such a frame.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = filter_states(pd.DataFrame({"energetic": [1], "silent": [0], "dynamic": [3]}, index=["conv1"]))
        >>> [float(bars[0].get_height()) for bars in ax.containers]
        [0.25, 0.75, 0.0]
    """
    counts = _checked_states(states)
    layers = [str(name) for name in states.index]
    heights = counts / counts.sum(1, keepdims=True) if shares else counts
    # the height makes room for names, which are upright under many bars
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
        order: ``"class"``: a channel stands in the block of the class that opens it most above the others' mean; behind
            them stand channels that are alike for all classes, then silent ones. ``"state"``: energetic, dynamic (most
            open first), silent channels. None: channels as they are.
        ax: Where to draw.

    Returns:
        The axes; colours run from 0 to 1. Classes without images are hatched.

    Raises:
        OptionError: There is no such layer, ``order`` is unknown, no class has images, or names do not fit.
        ShapeError: The profiles are not shares of that shape.
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
        raise OptionError("no class has images, so there is nothing to draw; pass paths of images with labels")
    check_shares(values[seen], "profiles")
    names = names_or_numbers(class_names, len(values))
    channels, blocks = _ordered(values[seen], np.flatnonzero(seen), order)
    values = np.where(seen[:, None], values, np.nan)[:, channels]
    ax, image = channel_map(ax, values, names, channels, blocks, ("Blues", (0.0, 1.0)))
    colour_bar(image, ax, _OPENS)
    orders = {"class": ", grouped by the class it is most open for", "state": ": energetic, dynamic, silent", None: ""}
    ax.set_xlabel(f"channel of {name}{orders[order]}" + ("" if seen.all() else f"\n{UNSEEN}"))
    return ax


def gate_strip(
    groups: Any,
    layers: Sequence[str] | None = None,
    *,
    order: str | None = "open",
    equal: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw calculation paths layer by layer: a strip for each layer, a cell for each channel, coloured where it opens.

    The strips of several images or classes stand one above the other in each layer, each in its colour.

    Source: figure 1, where each colour is one path. Differs from the paper: measured gates instead of a drawing.

    Args:
        groups: By name, at most 6: `Paths` of one image or of many, whose share that opens each channel is drawn; or a
            list with ``(K_l,)`` for each layer, bool or shares in [0, 1]. A single group needs no name.
        layers: L names; None: those of `Paths`, or numbers.
        order: ``"open"``: in each layer the first group's most open channels come first, of equals the second's, and
            so on, so that a channel stands above itself. None: channels as they are.
        equal: Each layer fills the width, whatever its number of channels, which stands behind its name. False: all
            cells are equally wide, and narrow layers end early.
        ax: Where to draw.

    Returns:
        The axes, one image for each group; rows of other groups and what lies beyond a layer are masked.

    Raises:
        OptionError: There are no groups or too many, ``order`` is unknown, or names do not fit.
        ShapeError: The groups have different layers, or are not shares.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = gate_strip({"cat": [[True, False, True]], "dog": [[False, False, True]]}, ["conv1"])
        >>> [image.get_array().tolist() for image in ax.images]
        [[[1.0, 1.0, 0.0], [None, None, None]], [[None, None, None], [1.0, 0.0, 0.0]]]
    """
    one_of(order, "order", ("open", None))
    shares, names = _checked_shares(groups)
    if layers is None:
        layers = names or [str(index) for index in range(len(next(iter(shares.values()))))]
    widths = _check_alike(shares, layers)
    gap = int(len(shares) > 1)
    period, widest = len(shares) + gap, max(widths)
    table = np.full((period * len(layers) - gap, widest), np.nan)
    for place, width in enumerate(widths):
        rows = np.stack([strips[place] for strips in shares.values()])
        if order:
            rows = rows[:, np.lexsort(-rows[::-1])]
        cells = np.arange(widest) * width // widest if equal else np.arange(width)
        table[place * period : place * period + len(rows), : len(cells)] = rows[:, cells]

    size = float(np.clip(0.06 * widest + 2, 6.0, 10.0)), float(np.clip(0.13 * len(table) + 2, 3.2, 11.0))
    ax = axes_or_new(ax, size)
    maps = []
    for place, colour in enumerate(_GROUPS[: len(shares)]):
        rows = np.full_like(table, np.nan)
        rows[place::period] = table[place::period]
        maps.append(
            LinearSegmentedColormap.from_list(colour, [to_rgb(_CLOSED), to_rgb(colour)]).with_extremes(bad="#0000")
        )
        # matplotlib's default smooths rows into one another where columns are many
        ax.imshow(np.ma.masked_invalid(rows), maps[-1], aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    _name_strips(ax, layers, widths, period, len(shares))
    first = next(iter(shares)) if len(shares) > 1 else None
    about = "" if order is None else ", the most open first" if first is None else f", most open for {first} first"
    ax.set_xlabel(f"channels of the layer{about}")
    ax.set_ylabel("layer, input first")
    whole = all(bool(np.isin(strip, (0, 1)).all()) for strips in shares.values() for strip in strips)
    _explain_strips(ax, list(shares), maps, whole)
    return ax


def integral_paths(
    groups: Mapping[str, Paths],
    layer: str | int | None = None,
    *,
    channels: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw which share of each group's images opens each channel, for example of attacked images and of both classes.

    Beside each group stands its mean difference to the first group: the mean over channels of the absolute difference
    of shares, in [0, 1]. For groups of one image this is their Hamming distance, as a share. Groups of few images
    differ by chance alone; two halves of the first group, drawn as two groups, show by how much.

    Source: figure 7, the integral calculation paths (of all layers) of "dog", "truck" and "dog -> truck". Differs from
    the paper: shares of each channel instead of points of t-SNE, which `path_embedding` draws.

    Args:
        groups: `Paths` by name, of one network, such as those of two classes and of images of one attacked so that the
            network says the other.
        layer: One layer, by name or index. None: all, side by side.
        channels: Draw at most so many of each layer: those whose shares lie furthest apart. None: all; of more channels
            than the picture has pixels across, some are not seen.
        ax: Where to draw; in a figure with ``layout="constrained"``, since distances stand beside it.

    Returns:
        The axes: groups down, channels across, lines between layers; in each layer those first that the first group
        opens most, of equals the second's, and so on. Colours run from 0 to 1. The distance is that over all channels
        of the layers drawn.

    Raises:
        OptionError: There are no groups, a group has no images, there is no such layer, or ``channels`` is below 1.
        MergeError: The groups are of different networks.

    Example:
        >>> import matplotlib, torch; matplotlib.use("agg")
        >>> codes, zeros = torch.tensor([[1], [3], [2], [2]], dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
        >>> paths = Paths(codes, zeros, None, ("conv1",), (2,), num_classes=2, fingerprint="", costs=None)
        >>> ax = integral_paths({"dog": paths[:2], "dog -> truck": paths[2:]})
        >>> ax.images[0].get_array().tolist()
        [[1.0, 0.5], [0.0, 1.0]]
        >>> [text.get_text() for text in ax.child_axes[0].get_yticklabels()]
        ['0.000 (2)', '0.750 (2)']
    """
    first = _checked_groups(groups)
    if channels is not None:
        channels = integer(channels, "channels", 1)
    chosen = range(len(first.layers)) if layer is None else [first.index(layer)]
    shares = [np.stack([paths.rates()[place].numpy() for paths in groups.values()]) for place in chosen]
    distances = np.abs(np.concatenate([table - table[0] for table in shares], axis=1)).mean(1)
    orders = [_by_first_group(table, channels) for table in shares]
    values = np.concatenate([table[:, order] for table, order in zip(shares, orders, strict=True)], axis=1)
    ends = np.cumsum([len(order) for order in orders]) - 0.5

    names = [str(name) for name in groups]
    width, height = table_size(len(names), values.shape[1], longest(names))
    # beside the table of `path_profiles` there are the distances, below it the layers' names
    ax = axes_or_new(ax, (width + 1.2, height + (0.08 * longest(first.layers) if layer is None else 0.2)))
    no_blocks = np.zeros(0, np.int64)  # their borders are too pale between layers that end alike
    ax, image = channel_map(ax, values, names, np.concatenate(orders), no_blocks, ("Blues", (0.0, 1.0)))
    colour_bar(image, ax, _OPENS)
    ax.vlines(ends[:-1], -0.5, len(names) - 0.5, color=_BETWEEN, linewidth=0.8)
    ax.set_ylabel("")
    if len(names) <= _WRAPPED:
        ax.set_yticks(range(len(names)), [fill(name, 24, max_lines=2, placeholder="…") for name in names])
    leader = shortened(names[0])
    about = f"channel of {first.layers[chosen[0]]}" if layer is not None else "layer, input first, and its channels"
    about += f", those most open for {leader} first"
    if channels is not None and channels < max(table.shape[1] for table in shares):
        about += f"\nat most {channels} of a layer: those whose shares lie furthest apart"
    ax.set_xlabel(about)
    if layer is None:
        _name_layers(ax, first.layers, ends)
    # the rows that have a name
    rows = [int(row) for row in ax.get_yticks()]
    beside = ax.secondary_yaxis("right")
    counts = [len(paths) for paths in groups.values()]
    beside.set_yticks(rows, [f"{distances[row]:.3f} ({counts[row]})" for row in rows], fontsize=SMALL)
    beside.set_ylabel(f"mean difference to\n{leader} (images)", fontsize=SMALL + 1)
    return ax


# -- what is refused ---------------------------------------------------------------------------------------------------


def _checked_points(points: Any, labels: Any, class_names: Sequence[str] | None) -> tuple[Floats, Ints, list[str]]:
    where = numbers(points, "points", 2, "(N, 2)")
    if where.shape[1] != 2 or not bool(np.isfinite(where).all()):
        raise ShapeError(f"points must be finite, of shape (N, 2), got {where.shape}; pass what Paths.embed returns")
    try:
        indices = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise LabelError(f"labels must be indices of classes, got {type(labels).__name__}; pass Paths.labels") from None
    if indices.shape != (len(where),) or indices.is_floating_point():
        raise LabelError(
            f"labels must be ({len(where)},) indices, one for each point, got {indices.dtype} of shape "
            f"{tuple(indices.shape)}; pass the labels of the same Paths"
        )
    classes = indices.cpu().long().numpy()
    names = names_or_numbers(class_names, int(classes.max()) + 1 if class_names is None else len(class_names))
    if classes.min() < 0 or classes.max() >= len(names):
        raise LabelError(
            f"labels must lie in [0, {len(names)}), got {classes.min()} to {classes.max()}; name all classes"
        )
    return where, classes, names


def _checked_states(states: Any) -> Floats:
    counts = check_frame(states, list(STATES), "Paths.states", "states")[list(STATES)].to_numpy(np.float64)
    if not bool((counts >= 0).all()) or not bool(counts.sum(1).all()):
        raise OptionError("states must count the filters of each layer, and no layer may be without filters")
    return counts


def _checked_shares(groups: Any) -> tuple[dict[str, list[Floats]], list[str] | None]:
    """The shares of each layer, for each group; and the names of layers, if `Paths` say them."""
    by_name = dict(groups) if isinstance(groups, Mapping) else {"open": groups}
    if not 1 <= len(by_name) <= len(_GROUPS):
        raise OptionError(f"groups must be 1 to {len(_GROUPS)}, got {len(by_name)}; draw some of them")
    shares: dict[str, list[Floats]] = {}
    layers = None
    for name, strips in by_name.items():
        if isinstance(strips, Paths):
            if not len(strips):
                raise OptionError(f"group {name!r} has no images; choose another")
            layers, strips = layers or list(strips.layers), strips.rates()
        if isinstance(strips, str) or not isinstance(strips, Sequence) or not len(strips):
            got = type(strips).__name__
            raise ShapeError(f"group {name!r} must be Paths, or a list of (K_l,), one for each layer, got {got}")
        shares[str(name)] = [numbers(strip, f"a layer of group {name!r}", 1, "(K_l,)") for strip in strips]
        for strip in shares[str(name)]:
            check_shares(strip, f"a layer of group {name!r}")
    return shares, layers


def _check_alike(shares: Mapping[str, list[Floats]], layers: Sequence[str]) -> list[int]:
    """Channels of each layer, which are the same in all groups."""
    widths = {name: [len(strip) for strip in strips] for name, strips in shares.items()}
    first, *others = widths
    for other in others:
        if widths[other] != widths[first]:
            raise ShapeError(
                f"groups must be of the same layers, got {len(widths[first])} with {sum(widths[first])} channels in "
                f"{first!r} and {len(widths[other])} with {sum(widths[other])} in {other!r}; take both from one network"
            )
    if len(layers) != len(widths[first]):
        raise OptionError(f"layers must be {len(widths[first])} names, got {len(layers)}")
    return widths[first]


def _checked_groups(groups: Any) -> Paths:
    """The first group; refuse groups of different networks."""
    if not isinstance(groups, Mapping) or not groups:
        got = "none" if isinstance(groups, Mapping) else type(groups).__name__
        raise OptionError(f"groups must be Paths by name, at least one, got {got}; pass {{name: paths}}")
    for name, paths in groups.items():
        if not isinstance(paths, Paths) or not len(paths):
            got = "none of any image" if isinstance(paths, Paths) else type(paths).__name__
            raise OptionError(f"group {name!r} must be Paths of at least one image, got {got}")
    first: Paths = next(iter(groups.values()))
    for paths in groups.values():
        first._check_same_network(paths)
    return first


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def _name_clouds(ax: Axes, where: Floats, classes: Ints, names: Sequence[str]) -> None:
    """The name of each class at the median of its points, as far as names do not run into each other."""
    # points for each unit, the same in both directions; 0.85: margins, and what the layout takes later
    points = 0.85 * float(np.min(np.array(room(ax)) / np.maximum(np.ptp(where, axis=0), 1e-12)))
    present = np.unique(classes)
    texts = [shortened(names[label]) for label in present]
    middles = np.stack([np.median(where[classes == label], axis=0) for label in present])
    half = np.array([[0.3 * SMALL * len(text), 0.6 * SMALL] for text in texts])
    # (C, C): which names would touch, each itself too
    touching = (np.abs(middles[:, None] - middles) * points < half[:, None] + half).all(2)
    free = np.ones(len(present), bool)
    for index in np.argsort(touching.sum(1), kind="stable"):
        if free[index]:
            free &= ~touching[index]
            halo = [withStroke(linewidth=2.5, foreground="white")]
            x, y = middles[index]
            ax.text(x, y, texts[index], fontsize=SMALL, ha="center", va="center", path_effects=halo)
    if len(ax.texts) < len(present):
        ax.set_title(f"{ax.get_title()}; {len(ax.texts)} of {len(present)} classes named", fontsize="medium")


def _ordered(values: Floats, seen: Ints, order: str | None) -> tuple[Ints, Ints]:
    """Channels in drawing order, and the block each is in; ``values`` are those of the classes ``seen``."""
    one_of(order, "order", ("class", "state", None))
    count = values.shape[1]
    if order is None:
        return np.arange(count), np.zeros(0, np.int64)
    silent, mean = ~values.any(0), values.mean(0)
    if order == "state":
        block = np.where((values == 1).all(0), 0, np.where(silent, 2, 1))
        rank = -mean
    else:
        others = (values.sum(0) - values) / max(len(values) - 1, 1)
        above = values - others
        # behind all classes come channels that are open equally for each, then those that are never open
        block = np.where(silent, seen[-1] + 2, np.where(above.max(0) <= 1e-9, seen[-1] + 1, seen[above.argmax(0)]))
        rank = -above.max(0)
    channels = np.lexsort((rank, block))
    return channels, block[channels]


def _name_strips(ax: Axes, layers: Sequence[str], widths: Sequence[int], period: int, groups: int) -> None:
    chosen = thinned(len(layers), room(ax)[1] / (SMALL * 1.25))
    texts = [f"{shortened(str(layers[index]))} ({widths[index]})" for index in chosen]
    ax.set_yticks([index * period + (groups - 1) / 2 for index in chosen], texts, fontsize=SMALL)
    ax.set_xticks([])
    hide_frame(ax)


def _explain_strips(ax: Axes, names: Sequence[str], maps: Sequence[Any], whole: bool) -> None:
    """A legend; for shares also a colour bar, which shows each group's colours over the same 0 to 1."""
    opened = [Patch(color=colours(1.0), label=shortened(name)) for name, colours in zip(names, maps, strict=True)]
    if whole:
        legend_beside(ax, [*opened, Patch(color=_CLOSED, label="closed")])
        return
    if len(names) > 1:
        legend_beside(ax, opened)
    width, height = room(ax)
    thick = float(np.clip(9 * len(maps), 12, 30))  # points
    bar = figure_of(ax).colorbar(
        ScalarMappable(cmap=maps[0]), ax=ax, location="bottom", pad=0.02, fraction=1.2 * thick / height,
        aspect=0.7 * width / thick, label="share of the images that open the channel",
    )  # fmt: skip
    for place, colours in enumerate(maps):
        low, high = 1 - (place + 1) / len(maps), 1 - place / len(maps)
        bar.ax.imshow(np.linspace(0, 1, 256)[None], colours, extent=(0, 1, low, high), aspect="auto", zorder=3)
    bar.ax.set_ylim(0, 1)


def _by_first_group(shares: Floats, most: int | None) -> Ints:
    """Channels of a layer in drawing order: of ``(groups, K_l)`` at most so many, those furthest apart."""
    kept = np.sort(np.argsort(-np.ptp(shares, axis=0), kind="stable")[:most])
    return np.asarray(kept[np.lexsort(-shares[::-1, kept])], np.int64)


def _name_layers(ax: Axes, layers: Sequence[str], ends: Floats) -> None:
    """Names along the bottom, each below the middle of its block, where it does not run into the one before."""
    middles = [(left + right) / 2 for left, right in pairwise([-0.5, *ends])]
    # 0.75: the layout may take some of the width away later
    points = 0.75 * room(ax)[0] / (ends[-1] + 0.5)
    places = spaced(middles, 1.3 * SMALL / points)
    texts = [shortened(layers[place]) for place in places]
    ax.set_xticks([middles[place] for place in places], texts, fontsize=SMALL, rotation=90)
