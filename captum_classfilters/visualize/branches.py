"""Heat maps of several nodes on photographs, on one scale of colours. `splitting.py` draws the nodes themselves.

N images, P panels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import LayerAttribution, visualization
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.visualize.canvas import SMALL, Floats, axes_or_new, figure_of, longest, room, shortened
from captum_classfilters.visualize.fields import check_pixels

# Where a map is 0 the photograph stays as it is: blue, nothing, red
# 257: an odd number has one in the middle
_SIGNED = LinearSegmentedColormap.from_list(
    "branches", [(0.0, 0.3, 0.9, 1.0), (1.0, 1.0, 1.0, 0.0), (0.9, 0.1, 0.0, 1.0)], N=257
)
# Captum puts the share's outliers beyond the colours; of this share there are none, and 0 itself trips over rounding
_NO_OUTLIERS = 1e-6


def branch_maps(
    images: Tensor,
    maps: Mapping[str, Tensor],
    names: Sequence[str] | None = None,
    *,
    share: str = "row",
    ax: Axes | None = None,
) -> Axes:
    """Draw what the nodes of both branches look at: heat maps on photographs, all of an image on one scale of colours.

    Captum's visualiser brings each map to its own scale, so a faint node looks like a strong one. Here all panels are
    tiles of one picture, drawn by it at once: where a tile is pale, the node is weak. What weak nodes look at is seen
    when they are drawn without the strong ones.

    Source: "An interpretation of the final fully connected layer", figure 5. Differs: one scale, and signs: blue
    is negative, red positive.

    Args:
        images: ``(N, c, H, W)`` in [0, 1], c 1 or 3, not normalised.
        maps: By panel's name, such as ``"+1"`` or ``"-6"``, maps ``(N, 1, h, w)``, as `ALDSplitter.attribute` and the
            Grad-CAMs return them; in any unit, which is the colour bar's. They are brought to ``(H, W)`` bilinearly.
        names: N names of the images, down the left.
        share: ``"row"``: a scale for each image, so that rows cannot be compared; its end, the row's largest absolute
            value, stands at the left. ``"all"``: one for all.
        ax: Where to draw.

    Returns:
        The axes: a row for each image, the photograph first. What a map leaves at 0 is grey as in the photograph.

    Raises:
        ShapeError: Images or maps of other shapes, or images outside [0, 1].
        OptionError: No maps, numbers that are not finite, unknown ``share``, or not N names.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> strong = torch.ones(1, 1, 2, 2)
        >>> ax = branch_maps(torch.rand(1, 3, 4, 4), {"+1": strong, "-1": -0.5 * strong})
        >>> ax.images[1].get_array()[0, [0, 4, 8]].tolist()
        [0.0, 1.0, -0.5]
    """
    _check_images(images, maps, names, share)
    count, _, height, width = images.shape
    shown = [
        LayerAttribution.interpolate(each.detach().double().cpu(), (height, width), interpolate_mode="bilinear")[:, 0]
        for each in maps.values()
    ]
    values = np.stack([np.zeros((count, height, width)), *(each.numpy() for each in shown)], axis=2)
    largest = np.abs(values).max((1, 2, 3))
    if share == "all":
        largest[:] = largest.max()
    columns = len(shown) + 1
    tiles = (values / np.where(largest > 0, largest, 1)[:, None, None, None]).reshape(count * height, columns * width)
    photos = images.detach().double().cpu().permute(0, 2, 3, 1).numpy()
    picture = np.tile(photos, (1, 1, columns, 1)).reshape(count * height, columns * width, -1)

    if ax is None:
        tile = min(1.35, 14 / columns)
        ax = axes_or_new(None, (tile * columns + 1.7, tile * count * height / width + 0.5))
    ax = axes_or_new(ax, (0, 0))
    # Captum divides by the largest value and stops at 0: a column that is taken off again has the scale's end
    tiles, picture = np.pad(tiles, ((0, 0), (0, 1)), constant_values=1.0), np.pad(picture, ((0, 0), (0, 1), (0, 0)))
    visualization.visualize_image_attr(
        tiles[..., None], picture, method="blended_heat_map", sign="all", plt_fig_axis=(figure_of(ax), ax),
        use_pyplot=False, cmap=_SIGNED, alpha_overlay=0.75, outlier_perc=_NO_OUTLIERS,
    )  # fmt: skip
    grey, heat = ax.images[-2:]
    for drawn in (grey, heat):
        drawn.set_data(np.asarray(drawn.get_array())[:, :-1])
    # Captum stretches the picture from its own darkest to its own brightest pixel
    grey.set_clim(0, 255)
    strip = photos.reshape(count * height, width, -1)
    extent = (-0.5, width - 0.5, count * height - 0.5, -0.5)
    ax.imshow(strip if strip.shape[2] == 3 else strip[..., 0], cmap="gray", vmin=0, vmax=1, extent=extent)
    ax.set(xlim=(-0.5, columns * width - 0.5), ylim=(count * height - 0.5, -0.5))
    ax.vlines(np.arange(1, columns) * width - 0.5, *ax.get_ylim(), color="white", linewidth=2.5)
    ax.hlines(np.arange(1, count) * height - 0.5, *ax.get_xlim(), color="white", linewidth=2.5)
    for side in ax.spines.values():
        side.set_visible(False)
    own = share == "row" and count > 1
    _name_tiles(ax, ["image", *map(str, maps)], names, (height, width), largest if own else largest[:0])
    end = 1.0 if own else float(largest[0])
    label = "map, as a share of the row's\nlargest absolute value" if own else "map"
    bar = figure_of(ax).colorbar(heat, ax=ax, pad=0.02, shrink=0.9)
    ticks = [-1, -0.5, 0, 0.5, 1] if end > 0 else [0]
    bar.set_ticks(ticks, labels=[f"{tick * end:.3g}" for tick in ticks], fontsize=SMALL)
    bar.set_label(label, fontsize=SMALL + 1)
    return ax


# -- what is refused ---------------------------------------------------------------------------------------------------


def _check_images(images: Any, maps: Any, names: Any, share: str) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
        got: Any = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"images must be a tensor (N, c, H, W), got {got}; of one image pass image[None]")
    for place, image in enumerate(images):
        check_pixels(image, f"image {place}")
    if not isinstance(maps, Mapping) or not maps:
        got = "none" if isinstance(maps, Mapping) else type(maps).__name__
        raise OptionError(f'maps must be tensors by panel\'s name, at least one, got {got}; pass {{"+1": map}}')
    for name, each in maps.items():
        if not isinstance(each, Tensor) or each.dim() != 4 or each.shape[:2] != (len(images), 1) or not each.numel():
            got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ShapeError(f"map {name!r} must be a tensor ({len(images)}, 1, h, w), one for each image, got {got}")
        if not bool(torch.isfinite(each).all()):
            bad = int((~torch.isfinite(each)).sum())
            raise OptionError(
                f"map {name!r} must be finite, got {bad} numbers that are not; colours have no place for them"
            )
    if share not in ("row", "all"):
        raise OptionError(f'share must be "row" or "all", got {share!r}')
    if names is not None and (isinstance(names, str) or len(names) != len(images)):
        got = repr(names) if isinstance(names, str) else len(names)
        raise OptionError(f"names must be {len(images)}, one for each image, got {got}")


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def _name_tiles(
    ax: Axes, columns: Sequence[str], names: Sequence[str] | None, size: tuple[int, int], ends: Floats
) -> None:
    """Panels along the top, images and their scales' ends down the left."""
    height, width = size
    shown = [shortened(name) for name in columns]
    # 0.8: the layout may take some of the width away later
    fits = 0.8 * room(ax)[0] / len(columns) / (0.6 * longest(columns))
    ax.xaxis.tick_top()
    ax.set_xticks((np.arange(len(columns)) + 0.5) * width - 0.5, shown, fontsize=min(9.0, fits) if fits >= 5 else SMALL)
    ax.tick_params(length=0, labelrotation=0)
    ax.tick_params(axis="x", labelrotation=0 if fits >= 5 else 90)
    rows: list[list[str]] = [[shortened(str(name))] for name in names] if names is not None else [[] for _ in ends]
    for row, end in zip(rows, ends, strict=False):
        row.append(f"± {end:.3g}")
    places = (np.arange(len(rows)) + 0.5) * height - 0.5
    ax.set_yticks(places, ["\n".join(row) for row in rows], fontsize=SMALL + 1)
