"""Pictures on photographs: maps of several nodes, receptive fields on a covered image.

Captum's visualiser lays maps over photographs; here they get one scale of colours and keep the photograph's brightness.
N images, K channels, C classes, F filters, H x W pixels, h x w positions of the feature map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import LayerAttribution, visualization
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.image import AxesImage
from torch import Tensor

from captum_classfilters.concepts import Occlusion, field_iou, occlude, receptive_fields
from captum_classfilters.core.check import integer, one_of
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.visualize.kit import (
    SMALL,
    Floats,
    Panels,
    axes_or_new,
    figure_of,
    hide_frame,
    longest,
    panels_or_new,
    room,
    shortened,
)

DIVERGING = LinearSegmentedColormap.from_list(
    "signed activation", [(0.0, 0.35, 0.9, 1.0), (1.0, 1.0, 1.0, 0.0), (0.9, 0.35, 0.0, 1.0)]
)
# 257: an odd number of colours has one in the middle
_BRANCHES = LinearSegmentedColormap.from_list(
    "branches", [(0.0, 0.3, 0.9, 1.0), (1.0, 1.0, 1.0, 0.0), (0.9, 0.1, 0.0, 1.0)], N=257
)
# Captum puts this share of a map, in percent, beyond the colours; 0 itself trips over rounding
_NO_OUTLIERS = 1e-6
_FIELD, _REGION = "#FF9D00", "#5BC8FF"


def branch_maps(
    images: Tensor,
    maps: Mapping[str, Tensor],
    names: Sequence[str] | None = None,
    *,
    share: str = "row",
    ax: Axes | None = None,
) -> Axes:
    """Draw what the nodes of both branches look at: heat maps on photographs, all of an image on one scale of colours.

    Captum's visualiser brings each map to its own scale, so that a faint node looks like a strong one. Here all panels
    are tiles of one picture, which it draws at once: where a tile is pale, the node is weak. Draw weak nodes without
    the strong ones to see what they look at.

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
        ShapeError: Images or maps have other shapes, or images lie outside [0, 1].
        OptionError: There are no maps, numbers are not finite, ``share`` is unknown, or there are not N names.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> strong = torch.ones(1, 1, 2, 2)
        >>> ax = branch_maps(torch.rand(1, 3, 4, 4), {"+1": strong, "-1": -0.5 * strong})
        >>> ax.images[1].get_array()[0, [0, 4, 8]].tolist()
        [0.0, 1.0, -0.5]
    """
    _check_maps(images, maps, names, share)
    count, _, height, width = images.shape
    shown = [
        LayerAttribution.interpolate(node.detach().cpu().double(), (height, width), interpolate_mode="bilinear")[:, 0]
        for node in maps.values()
    ]
    values = np.stack([np.zeros((count, height, width)), *(node.numpy() for node in shown)], axis=2)
    largest = np.abs(values).max((1, 2, 3))
    if share == "all":
        largest[:] = largest.max()
    columns = len(shown) + 1
    tiles = (values / np.where(largest > 0, largest, 1)[:, None, None, None]).reshape(count * height, columns * width)
    strip = np.concatenate([as_photograph(image) for image in images])
    tile = min(1.35, 14 / columns)
    ax = axes_or_new(ax, (tile * columns + 1.7, tile * count * height / width + 0.5))
    # Captum divides by the largest value and stops at 0: a column that is taken off again has the scale's end
    tiles = np.pad(tiles, ((0, 0), (0, 1)), constant_values=1.0)
    picture = np.pad(np.tile(strip, (1, columns, 1)), ((0, 0), (0, 1), (0, 0)))
    grey, heat = blend(ax, tiles, picture, _BRANCHES, outliers=_NO_OUTLIERS)
    for drawn in (grey, heat):
        drawn.set_data(np.asarray(drawn.get_array())[:, :-1])
    extent = (-0.5, width - 0.5, count * height - 0.5, -0.5)
    ax.imshow(strip if strip.shape[2] == 3 else strip[..., 0], cmap="gray", vmin=0, vmax=1, extent=extent)
    ax.set(xlim=(-0.5, columns * width - 0.5), ylim=(count * height - 0.5, -0.5))
    ax.vlines(np.arange(1, columns) * width - 0.5, *ax.get_ylim(), color="white", linewidth=2.5)
    ax.hlines(np.arange(1, count) * height - 0.5, *ax.get_xlim(), color="white", linewidth=2.5)
    hide_frame(ax)
    scales = share == "row" and count > 1  # a row has its own
    _name_tiles(ax, ["image", *map(str, maps)], names, (height, width), largest if scales else largest[:0])
    end = 1.0 if scales else float(largest[0])
    label = "map, as a share of the row's\nlargest absolute value" if scales else "map"
    bar = figure_of(ax).colorbar(heat, ax=ax, pad=0.02, shrink=0.9)
    ticks = [-1, -0.5, 0, 0.5, 1] if end > 0 else [0]
    bar.set_ticks(ticks, labels=[f"{tick * end:.3g}" for tick in ticks], fontsize=SMALL)
    bar.set_label(label, fontsize=SMALL + 1)
    return ax


def switched_off(
    image: Tensor,
    region: Tensor,
    fields: Tensor,
    *,
    names: Sequence[str] | None = None,
    ious: Sequence[float] | None = None,
    covered: Tensor | None = None,
    merged: Tensor | None = None,
    ax: Panels | None = None,
) -> Panels:
    """Draw an image, the image with a region covered, and where the filters looked that switch off.

    `occlusion` draws this of what `metrics.occlusion` returns.

    Source: "Interpretable neural network decoupling", figure 6. Differs from the paper: the region is outlined in all
    panels, so that IoU can be seen.

    Args:
        image: ``(c, H, W)`` in [0, 1], c 1 or 3.
        region: ``(H, W)`` bool: what is covered.
        fields: ``(F, H, W)`` bool: receptive fields on the uncovered image; F may be 0.
        names: F names of filters; None: numbers in this order.
        ious: IoU of each of the F fields and the region; None: computed.
        covered: The image as the network saw it, ``(c, H, W)``; None: the region has the mean colour of the rest, as
            `metrics.occlude` does by default.
        merged: ``(H, W)`` bool: union of the fields of all filters that switch off; None: union of ``fields``.
        ax: Where to draw: an array of ``F + 3`` axes.

    Returns:
        The axes, shape ``(F + 3,)``: the image, the covered image, one for each field, the merged field.

    Raises:
        ShapeError: Tensors have other shapes, or an image lies outside [0, 1].
        OptionError: ``names``, ``ious`` or ``ax`` do not fit.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> region = torch.zeros(4, 4, dtype=torch.bool).index_fill_(0, torch.tensor([0]), True)
        >>> axes = switched_off(torch.rand(3, 4, 4), region, region[None], names=["filter 7"])
        >>> [ax.get_title() for ax in axes]
        ['image', 'region covered', 'filter 7\\nIoU 1.00', 'merged (1 filter)\\nIoU 1.00']
    """
    check_pixels(image, "image")
    size = (image.shape[1], image.shape[2])
    _check_mask(region, size, "region", "(H, W)")
    _check_mask(fields, size, "fields", "(F, H, W)")
    count = len(fields)
    if merged is None:
        merged, merging = fields.any(0) if count else torch.zeros_like(region), f" ({count} filter{'s'[: count != 1]})"
    else:
        _check_mask(merged, size, "merged", "(H, W)")
        merging = " (all filters)"
    names = _one_for_each(names, "names", count) or [f"filter {index}" for index in range(count)]
    values = _one_for_each(ious, "ious", count) or [_iou(field, region) for field in fields]
    covered = occlude(image[None].float(), region[None])[0] if covered is None else covered
    check_pixels(covered, "covered", image.shape)

    # room for the titles and the words below
    height = float(np.clip(1.8 * size[0] / size[1], 0.8, 4.0)) + 0.7
    axes = panels_or_new(ax, count + 3, across=6, size=(1.95, height))
    outline = _edges(region)
    for axis, picture in zip(axes, [image, covered, *[image] * (count + 1)], strict=True):
        axis.imshow(as_photograph(picture), cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
    titles = ["image", "region covered"]
    for axis, name, field, value in zip(
        axes[2:], [*names, f"merged{merging}"], [*fields, merged], [*values, _iou(merged, region)], strict=True
    ):
        mask = field.cpu().numpy()
        axis.imshow(np.where(mask[..., None], (*to_rgb(_FIELD), 0.45), 0.0))
        _draw_outline(axis, _edges(field), _FIELD)
        titles.append(f"{shortened(str(name))}\n" + ("no field" if not mask.any() else f"IoU {value:.2f}"))
    for axis, title in zip(axes, titles, strict=True):
        _draw_outline(axis, outline, _REGION)
        axis.set_title(title, fontsize="small")
    axes[0].set_xlabel("blue: the region", fontsize="small")
    axes[2].set_xlabel("orange: receptive field", fontsize="small")
    return axes


def occlusion(
    result: Occlusion,
    image: Tensor,
    index: int = 0,
    layers: Sequence[str] | None = None,
    *,
    k: int = 3,
    covered: Tensor | None = None,
    ax: Panels | None = None,
) -> Panels:
    """Draw `switched_off` of one image that `metrics.occlusion` covered: the k filters of highest IoU.

    Source: "Interpretable neural network decoupling", figure 6, with the three best filters of the last three layers.

    Args:
        result: What `metrics.occlusion` returns.
        image: That image, ``(c, H, W)``, in [0, 1]: not normalised.
        index: Which of the result's images it is.
        layers: Some of ``result.layers``; None: all.
        k: How many filters, at most. The merged field is that of all filters that switch off in these layers.
        covered: The image as the network saw it; None: covered as `metrics.occlude` does by default.
        ax: Where to draw: an array of ``k + 3`` axes, or of fewer where fewer filters switch off.

    Returns:
        The axes.

    Raises:
        OptionError: The result is not such a result, has no such layer or image, or k is below 1.
        ShapeError: The image is of another size.
    """
    if not isinstance(result, Occlusion):
        raise OptionError(f"result must be what metrics.occlusion returns, got {type(result).__name__}")
    index = integer(index, "index", 0, len(result.masks) - 1, meaning="which counts the covered images")
    k = integer(k, "k", 1)
    region = result.masks[index].cpu()
    names, fields = [], [region[None][:0]]
    for place, layer in enumerate(result.layers):
        chosen = result.switched_off[place][index]
        if layer in (result.layers if layers is None else layers) and bool(chosen.any()):
            maps, cuts = result.maps[place][index, chosen][None], result.thresholds[place][chosen]
            fields.append(receptive_fields(maps, cuts, region.shape)[0].cpu())
            names += [f"{layer}, {channel}" for channel in chosen.nonzero().flatten().tolist()]
    if unknown := [name for name in layers or () if name not in result.layers]:
        raise OptionError(f"there is no layer {unknown[0]!r} in this result; there are {', '.join(result.layers)}")
    all_fields = torch.cat(fields)
    ious = field_iou(all_fields[:, None], region.expand(len(all_fields), 1, *region.shape)).flatten()
    best = ious.nan_to_num().argsort(descending=True, stable=True)[:k]
    merged = all_fields.any(0) if len(all_fields) > k else None
    best_names = [names[place] for place in best.tolist()]
    return switched_off(
        image,
        region,
        all_fields[best],
        names=best_names,
        ious=ious[best].tolist(),
        covered=covered,
        merged=merged,
        ax=ax,
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


def _check_maps(images: Any, maps: Any, names: Any, share: str) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
        got: Any = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"images must be a tensor (N, c, H, W), got {got}; of one image pass image[None]")
    for place, image in enumerate(images):
        check_pixels(image, f"image {place}")
    if not isinstance(maps, Mapping) or not maps:
        got = "none" if isinstance(maps, Mapping) else type(maps).__name__
        raise OptionError(f'maps must be tensors by panel\'s name, at least one, got {got}; pass {{"+1": map}}')
    for name, node in maps.items():
        if not isinstance(node, Tensor) or node.dim() != 4 or node.shape[:2] != (len(images), 1) or not node.numel():
            got = tuple(node.shape) if isinstance(node, Tensor) else type(node).__name__
            raise ShapeError(f"map {name!r} must be a tensor ({len(images)}, 1, h, w), one for each image, got {got}")
        if not bool(torch.isfinite(node).all()):
            bad = int((~torch.isfinite(node)).sum())
            raise OptionError(
                f"map {name!r} must be finite, got {bad} numbers that are not; colours have no place for them"
            )
    one_of(share, "share", ("row", "all"))
    if names is not None and (isinstance(names, str) or len(names) != len(images)):
        got = repr(names) if isinstance(names, str) else len(names)
        raise OptionError(f"names must be {len(images)}, one for each image, got {got}")


def check_pixels(image: Any, name: str, shape: Any = None) -> None:
    """Refuse what is no picture in [0, 1], or not of the shape of another."""
    if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] not in (1, 3):
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ShapeError(f"{name} must be a tensor (c, H, W) of 1 or 3 colours, got {got}; pass one image")
    if shape is not None and image.shape != shape:
        raise ShapeError(f"{name} must have the shape of the image, {tuple(shape)}, got {tuple(image.shape)}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise ShapeError(
            f"{name} must lie in [0, 1], got {low:g} to {high:g}; undo the normalisation, or divide by 255"
        )


def _check_mask(mask: Any, size: tuple[int, int], name: str, shape: str) -> None:
    dims = shape.count(",") + 1
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != dims or mask.shape[-2:] != size:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(
            f"{name} must be bool of shape {shape} with (H, W) = {size}, got {got}; resize it to the image"
        )


def _one_for_each(values: Sequence[Any] | None, name: str, count: int) -> list[Any] | None:
    if values is None:
        return None
    if len(values) != count:
        raise OptionError(f"{name} must be {count}, one for each field, got {len(values)}")
    return list(values)


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def blend(
    ax: Axes, heat: Floats, picture: Floats, cmap: Any, sign: str = "all", outliers: float = 2
) -> list[AxesImage]:
    """A map over a grey photograph, by Captum's visualiser; returns the photograph and the map."""
    visualization.visualize_image_attr(
        heat[..., None], picture, method="blended_heat_map", sign=sign, plt_fig_axis=(figure_of(ax), ax),
        use_pyplot=False, cmap=cmap, alpha_overlay=0.75, outlier_perc=outliers,
    )  # fmt: skip
    grey, overlay = ax.images[-2:]
    # Captum stretches a picture from its own darkest to its own brightest pixel: a dark one would look bright
    grey.set_clim(0, 255)
    return [grey, overlay]


def as_photograph(image: Tensor) -> Floats:
    """``(c, H, W)`` in [0, 1] as matplotlib takes it, ``(H, W, c)``."""
    # HWC only here, at matplotlib's door
    return np.asarray(image.detach().cpu().double().permute(1, 2, 0))


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


def _iou(field: Tensor, region: Tensor) -> float:
    return float(field_iou(field[None, None].cpu(), region[None, None].cpu()))


def _edges(mask: Tensor) -> Floats:
    """The sides of pixels between inside and outside of a mask, ``(M, 2, 2)`` points (x, y)."""
    inside = np.pad(mask.cpu().numpy().astype(np.int8), 1)
    # from the pixel above or left to its neighbour
    rows, columns = np.nonzero(np.diff(inside, axis=0))
    level = np.stack([np.stack([columns - 1.5, rows - 0.5], 1), np.stack([columns - 0.5, rows - 0.5], 1)], 1)
    rows, columns = np.nonzero(np.diff(inside, axis=1))
    upright = np.stack([np.stack([columns - 0.5, rows - 1.5], 1), np.stack([columns - 0.5, rows - 0.5], 1)], 1)
    return np.concatenate([level, upright])


def _draw_outline(axis: Axes, edges: Floats, colour: str) -> None:
    # dark below light: seen on any picture; clipped it would be half as wide along the picture's own edge
    for shade, width in (("black", 3.0), (colour, 1.6)):
        lines = LineCollection(list(edges), colors=shade, linewidths=width, capstyle="projecting", clip_on=False)
        axis.add_collection(lines, autolim=False)
