"""Pictures of a head's split: weights against their fit, and the tree of nodes.

Source: "An interpretation of the final fully connected layer", figures 1 to 4. `splitting` fits and splits; here it is
drawn; `images.py` draws what the nodes look at.
"""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from captum_classfilters.core.check import one_of
from captum_classfilters.core.errors import OptionError
from captum_classfilters.splitting import ALDNode, ALDTree
from captum_classfilters.splitting.laplace import AsymmetricLaplace
from captum_classfilters.visualize.kit import (
    SMALL,
    Floats,
    Panels,
    axes_or_new,
    panels_or_new,
    room,
    shortened,
    spaced,
)

_FITTED, _LIKELY, _NORMAL = "black", "#E69F00", "#009E73"  # lines: seen on reds, blues and greys
_BOX = (1.6, 0.68)  # width and height of a node, where stages are 1 apart
_STEP = 0.16  # how much further out the next stage stands

Names = Sequence[str] | None


@overload
def ald_fit(trees: ALDTree, *, kind: str = ..., class_names: Names = ..., ax: Axes | None = ...) -> Axes: ...
@overload
def ald_fit(
    trees: Sequence[ALDTree] | Mapping[Any, ALDTree],
    *,
    kind: str = ...,
    class_names: Names = ...,
    ax: Panels | None = ...,
) -> Panels: ...


def ald_fit(trees: Any, *, kind: str = "rank", class_names: Names = None, ax: Any = None) -> Any:
    """Draw a class's final-layer weights against what was fitted to them; a panel for each class.

    Source: figures 1 to 3. Differs: both sides of a class in one panel, its nodes in colours, and the fit by maximum
    likelihood beside the paper's line.

    Args:
        trees: What `ALDSplitter.split` returns: a tree, or several in a list or dict.
        kind: ``"rank"``: weights in ascending order, exact zeros left out, with the log-linear lines of nodes +1 and
            -1, and with the quantiles of the asymmetric Laplace distribution where the tree has one. The legend says
            the lines' R2, of the logarithms: it is high for anything monotone. ``"density"``: a histogram with the
            density of that distribution beside a normal one of the same mean and deviation; the legend says each one's
            mean log-likelihood of a weight, in nats: higher is better, and the first has three parameters, not two.
        class_names: C names, by class; otherwise numbers.
        ax: Where to draw: one axes for a tree, an array of as many for several.

    Returns:
        The axes, or an array of them, ``(number of trees,)``. Weights have the head's own unit. Panels of one head
        share their scale, if they are new.

    Raises:
        OptionError: There are no trees, ``kind`` is unknown, a class has no name, ``ax`` does not fit, or
            ``kind="density"`` is asked for trees that were split without ``fit="mle"``.

    Example:
        >>> import matplotlib, torch; matplotlib.use("agg")
        >>> from captum_classfilters.splitting.splits import split_weights
        >>> splits = split_weights(torch.tensor([[-3.0, -1.0, 1.0, 2.0, 3.0, 8.0]]), min_size=3)
        >>> ax = ald_fit(ALDTree(splits, 0))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['6 weights, by deepest node', 'log-linear fit, R2 1.00 (-1), 0.97 (+1)']
    """
    one = isinstance(trees, ALDTree)
    chosen = _checked_trees([trees] if one else trees)
    one_of(kind, "kind", ("rank", "density"))
    titles = [_title(tree, class_names) for tree in chosen]
    if kind == "density" and (bare := [tree.target for tree in chosen if tree.laplace is None]):
        raise OptionError(
            f'kind="density" draws a fitted distribution, and class {bare[0]} has none; split with fit="mle"'
        )
    # panels of one head share their scale; rows of 3, as in the paper
    alike = len({(tree.layer, len(tree.weights)) for tree in chosen}) == 1
    panels = (
        np.array([axes_or_new(ax, (5.4, 4.0))])
        if one
        else panels_or_new(ax, len(chosen), across=3, size=(3.7, 3.3), margin=0.4, sharey=alike)
    )
    for axis, tree, title in zip(panels, chosen, titles, strict=True):
        weights = tree.weights.double().numpy()
        weights = np.sort(weights[weights != 0])
        if not len(weights):
            axis.text(0.5, 0.5, "all weights are 0", ha="center", va="center", transform=axis.transAxes, color="0.4")
        elif kind == "rank":
            _draw_ranks(axis, tree, weights)
        else:
            _draw_density(axis, tree, weights)
        dropped = f" ({tree.zeros} of 0 left out)" if tree.zeros else ""
        axis.set_xlabel(
            (f"neurons by weight, ascending{dropped}" if kind == "rank" else f"weight{dropped}"), fontsize="small"
        )
        spec = axis.get_subplotspec()
        if spec is None or spec.is_first_col():
            axis.set_ylabel("weight" if kind == "rank" else "density (1 / weight)", fontsize="small")
        axis.tick_params(labelsize="small")
        axis.set_title(title, fontsize="medium")
    return panels[0] if one else panels


def ald_tree(tree: ALDTree, *, class_names: Names = None, ax: Axes | None = None) -> Axes:
    """Draw how a class's weights are split: all on top, the negative side down the left, the positive down the right.

    Source: figure 4. Differs: the boxes say how many neurons a node has, beyond which weight they lie (in the head's
    own unit), and which nodes are terminal.

    Args:
        tree: What `ALDSplitter.split` returns for a class.
        class_names: C names, by class; otherwise numbers.
        ax: Where to draw; text becomes smaller where there is little room.

    Returns:
        The axes. Beside each line stands how many neurons of a node are not in the next. Terminal nodes have a thick
        edge: the most discriminative neurons, and the most confusing ones.

    Raises:
        OptionError: The argument is no tree, or its class has no name.

    Example:
        >>> import matplotlib, torch; matplotlib.use("agg")
        >>> from captum_classfilters.splitting.splits import split_weights
        >>> splits = split_weights(torch.tensor([[-3.0, -1.0, 1.0, 2.0, 3.0, 8.0]]), min_size=3)
        >>> print(ald_tree(ALDTree(splits, 0)).texts[0].get_text())
        class 0
        6 weights, parted at 0
    """
    (tree,) = _checked_trees([tree])
    nodes, title = tree.nodes, _title(tree, class_names)
    sides = {sign: [node for name, node in nodes.items() if name[0] == sign] for sign in "-+"}
    depth = max(1, *map(len, sides.values()))
    wide = 1 + _BOX[0] / 2 + _STEP * (depth - 1) + 0.05
    # a new figure is filled by the tree; of given axes the layout may still take some
    inches = (2.6 * wide, 0.84 * (depth + 1))
    new, ax = ax is None, axes_or_new(ax, inches)
    ax.set(xlim=(-wide, wide), ylim=(-depth - 0.45, 0.45))
    ax.axis("off")
    width, height = (70 * inches[0], 70 * inches[1]) if new else room(ax)
    # points of a unit; a box holds 3 lines of 24 characters
    across, down = width / (2 * wide), height / (depth + 0.9)
    size = float(np.clip(min(0.9 * _BOX[0] * across / (24 * 0.6), 0.85 * _BOX[1] * down / (3 * 1.3)), 3, 9))
    lines = [title, f"{len(tree.weights)} weights, parted at {tree.first_threshold:.3g}"]
    _box(ax, (0, 0), [*lines, f"{tree.zeros} of them 0, dropped"] if tree.zeros else lines, size, "0.93", False)
    for sign, side in sides.items():
        where, word = (1, "positive") if sign == "+" else (-1, "negative")
        places = [(where * (1 + _STEP * stage), -stage - 1.0) for stage in range(max(1, len(side)))]
        for (x0, y0), (x1, y1) in zip([(0.0, 0.0), *places], places, strict=False):
            ax.plot([x0, x1], [y0, y1], color="0.4", linewidth=1.2, zorder=1)
        if not side:
            _box(ax, places[0], [f"no {word} weights"], size, "white", False, dashes="--")
            continue
        for stage, (node, place, shade) in enumerate(zip(side, places, _shades(sign, len(side)), strict=True)):
            beyond = f"weight {'>' if sign == '+' else '<'} {_border(tree, node):.4g}"
            words = [f"{node.name}: {node.size} neuron{'s'[: node.size != 1]}", beyond]
            last = node is side[-1]
            mark = "most discriminative" if sign == "+" else "most confusing"
            # half as strong: black letters stand on it
            pale = tuple(0.5 + 0.5 * part for part in shade[:3])
            _box(ax, place, [*words, mark] if last else words, size, pale, last)
            if not last:
                left = node.size - side[stage + 1].size
                at = (place[0] + where * (_STEP / 2 + 0.06), place[1] - 0.5)
                ax.text(
                    *at, f"{left} stop here", ha="left" if where > 0 else "right", va="center", fontsize=0.85 * size
                )
    return ax


# -- what is refused ---------------------------------------------------------------------------------------------------


def _checked_trees(trees: Any) -> list[ALDTree]:
    chosen = list(trees.values()) if isinstance(trees, Mapping) else trees
    if not isinstance(chosen, Sequence) or isinstance(chosen, str):
        raise OptionError(f"trees must be an ALDTree or several, got {type(trees).__name__}; see ALDSplitter.split")
    wrong = [type(tree).__name__ for tree in chosen if not isinstance(tree, ALDTree)]
    if wrong or not chosen:
        got = wrong[0] if wrong else "none"
        raise OptionError(f"expected an ALDTree, got {got}; pass what ALDSplitter.split(target) returns")
    return list(chosen)


def _title(tree: ALDTree, class_names: Names) -> str:
    if class_names is None:
        return f"class {tree.target}"
    if isinstance(class_names, str) or len(class_names) <= tree.target:
        got = repr(class_names) if isinstance(class_names, str) else f"{len(class_names)}"
        raise OptionError(
            f"class_names must be names of all classes, by class: got {got}, and the tree is of class {tree.target}"
        )
    return shortened(str(class_names[tree.target]))


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def _draw_ranks(ax: Axes, tree: ALDTree, weights: Floats) -> None:
    nodes, total = tree.nodes, len(weights)
    colours = np.full((total, 4), (0.5, 0.5, 0.5, 1.0))  # of what lies on the first threshold itself
    names: dict[str, float] = {}
    r2 = []
    for sign in "-+":
        side = [node for name, node in nodes.items() if name[0] == sign]
        sizes = [*(node.size for node in side), 0]
        for node, shade, size, following in zip(side, _shades(sign, len(side)), sizes, sizes[1:], strict=False):
            span = slice(total - size, total - following) if sign == "+" else slice(following, size)
            colours[span] = shade
            names[node.name] = (span.start + span.stop - 1) / 2
            if node is not side[0]:
                border = total - size - 0.5 if sign == "+" else size - 0.5
                ax.axvline(border, color="0.8", linewidth=0.7, linestyle="--", zorder=0)
        if side and np.isfinite(side[0].slope):
            places = np.arange(sizes[0])
            away = np.exp(side[0].slope * places / sizes[0] + side[0].intercept)
            x, y = (total - sizes[0] + places, away) if sign == "+" else (sizes[0] - 1 - places, -away)
            ax.plot(x, tree.first_threshold + y, color=_FITTED, linewidth=1.3, zorder=4)
            r2.append(f"{side[0].r2:.2f} ({side[0].name})" if np.isfinite(side[0].r2) else f"none ({side[0].name})")
    ax.scatter(np.arange(total), weights, s=7, c=colours, linewidths=0, zorder=3)
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=".", color="0.4", label=f"{total} weights, by deepest node")
    ]
    if r2:
        handles.append(Line2D([], [], color=_FITTED, label=f"log-linear fit, R2 {', '.join(r2)}"))
    if _usable(tree.laplace):
        level = _quantiles(tree.laplace, (np.arange(total) + 0.5) / total)
        label = "asymmetric Laplace, max. likelihood"
        handles += ax.plot(np.arange(total), level, color=_LIKELY, linewidth=1.5, linestyle="--", zorder=5, label=label)
    # the corner from which the curve stays further away
    above, below = weights[-1] - weights[int(0.6 * total)], weights[int(0.4 * total)] - weights[0]
    corner: Any = "upper left" if above >= below else "lower right"
    ax.legend(handles=handles, loc=corner, fontsize=SMALL, frameon=False)
    _name_nodes(ax, names, total)


def _draw_density(ax: Axes, tree: ALDTree, weights: Floats) -> None:
    count = len(np.histogram_bin_edges(weights, "fd")) - 1
    edges = np.histogram_bin_edges(weights, int(np.clip(count, 8, 80)))
    heights = np.histogram(weights, edges, density=True)[0]
    bars = ax.stairs(heights, edges, fill=True, color="0.8", label=f"{len(weights)} weights")
    handles: list[Any] = []
    top = float(heights.max())
    if _usable(tree.laplace):
        fitted: Any = tree.laplace
        mean, spread = float(weights.mean()), float(weights.std())
        x = np.unique([*np.linspace(edges[0], edges[-1], 500), *fitted.location])

        def normal(at: Floats) -> Floats:
            logs: Floats = -0.5 * ((at - mean) / spread) ** 2 - np.log(spread * np.sqrt(2 * np.pi))
            return logs

        for name, logs, colour, dashes in (
            ("asymmetric Laplace", lambda at: fitted.logpdf(at[None])[0], _LIKELY, "-"),
            ("normal", normal, _NORMAL, "--"),
        ):
            label, y = f"{name}: {logs(weights).mean():.3f}", np.exp(logs(x))
            handles += ax.plot(x, y, color=colour, linestyle=dashes, linewidth=1.6, label=label)
            top = max(top, float(y.max()))
    else:
        handles.append(Line2D([], [], linestyle="", label="alike: nothing to fit"))
    # above the data
    ax.set_ylim(0, 1.45 * top)
    box = ax.legend(
        handles=[*handles, bars], loc="upper left", fontsize=SMALL, frameon=False, title="mean log-likelihood (nats)"
    )
    box.get_title().set_fontsize(SMALL)


def _quantiles(fitted: Any, levels: Floats) -> Floats:
    """The weights below which these shares of the distribution lie: its `cdf`, inverted."""
    m, rate, kappa = (float(part[0]) for part in fitted)
    peak = kappa**2 / (1 + kappa**2)
    below = kappa / rate * np.log(np.minimum(levels, peak) / peak)
    above = -np.log(np.minimum((1 - levels) * (1 + kappa**2), 1)) / (rate * kappa)
    return m + np.where(levels < peak, below, above)


def _usable(fitted: AsymmetricLaplace | None) -> bool:
    return fitted is not None and bool(np.isfinite(fitted).all())


def _shades(sign: str, count: int) -> Floats:
    """Colours of a side's nodes, the terminal one darkest; ``(count, 4)``."""
    return np.asarray(colormaps["Reds" if sign == "+" else "Blues"](np.linspace(0.95, 0.35, count)[::-1]))


def _border(tree: ALDTree, node: ALDNode) -> float:
    return tree.first_threshold + (node.threshold if node.name[0] == "+" else -node.threshold)


def _name_nodes(ax: Axes, names: Mapping[str, float], total: int) -> None:
    """Nodes along the top, terminal ones first, as far as they do not run into each other."""
    # points of a rank; the layout may take some of the width away later
    points = 0.75 * room(ax)[0] / (1.1 * total)
    nodes, places = list(names), list(names.values())
    terminal_first = sorted(
        range(len(nodes)), key=lambda i: (nodes[i][0] + str(int(nodes[i][1:]) + 1) in names, int(nodes[i][1:]))
    )
    kept = spaced(places, 2.0 * SMALL / points, first=terminal_first)
    above = ax.secondary_xaxis("top")
    above.set_ticks([places[i] for i in kept], [nodes[i] for i in kept], fontsize=SMALL)
    above.tick_params(length=2, pad=1)


def _box(
    ax: Axes, place: tuple[float, float], lines: Sequence[str], size: float, colour: Any, last: bool, dashes: str = "-"
) -> None:
    left, bottom = place[0] - _BOX[0] / 2, place[1] - _BOX[1] / 2
    ax.add_patch(
        FancyBboxPatch(
            (left + 0.05, bottom + 0.05), _BOX[0] - 0.1, _BOX[1] - 0.1, boxstyle="round,pad=0.05", facecolor=colour,
            edgecolor="black" if last else "0.4", linewidth=2.2 if last else 0.9, linestyle=dashes, zorder=2,
        )
    )  # fmt: skip
    ax.text(*place, "\n".join(lines), ha="center", va="center", fontsize=size, zorder=3)
