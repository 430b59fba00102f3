"""Pictures of single calculation paths: layer by layer, and on the image where filters look that a cover switches off.

Source: "Interpretable neural network decoupling", figures 1 and 6. `paths.py` draws those of many images.
L layers with K_l channels, F filters, H x W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import Patch
from torch import Tensor

from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.decoupling import Paths
from captum_classfilters.metrics.fields import field_iou, receptive_fields
from captum_classfilters.metrics.occlusion import Occlusion, occlude
from captum_classfilters.visualize.canvas import SMALL, Floats, axes_or_new, figure_of, room, shortened, thinned
from captum_classfilters.visualize.paths import check_shares, legend, numbers

_FIELD, _REGION = "#FF9D00", "#5BC8FF"
# Dark ones: from pale grey, closed, to these, open
_GROUPS = ("#0072B2", "#C44601", "#117733", "#882255", "#5B4A00", "#332288")
_CLOSED = "0.92"


def gate_strip(
    groups: Any,
    layers: Sequence[str] | None = None,
    *,
    order: str | None = "open",
    equal: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw calculation paths layer by layer: a strip for each layer, a cell for each channel, coloured where it opens.

    Of several images or classes the strips stand one above the other in each layer, each in its colour.

    Source: figure 1, where each colour is one path. Differs from the paper: measured gates instead of a drawing.

    Args:
        groups: By name, at most 6: `Paths`, of one image or of many, of which the share that opens each channel is
            drawn; or for each layer ``(K_l,)``, bool or shares in [0, 1]. One of these alone needs no name.
        layers: L names; None: those of `Paths`, or numbers.
        order: ``"open"``: in each layer the first group's most open channels come first, of equals the second's, and
            so on, so that a channel stands above itself. None: as they are.
        equal: Each layer fills the width, whatever its number of channels, which stands behind its name. False: all
            cells are equally wide, narrow layers end early.
        ax: Where to draw.

    Returns:
        The axes, one image for each group; rows of other groups and what lies beyond a layer are masked.

    Raises:
        OptionError: No groups or too many, unknown ``order``, or names that do not fit.
        ShapeError: Groups of different layers, or not shares.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = gate_strip({"cat": [[True, False, True]], "dog": [[False, False, True]]}, ["conv1"])
        >>> [image.get_array().tolist() for image in ax.images]
        [[[1.0, 1.0, 0.0], [None, None, None]], [[None, None, None], [1.0, 0.0, 0.0]]]
    """
    if order not in ("open", None):
        raise OptionError(f'order must be "open" or None, got {order!r}')
    shares, known = _checked_groups(groups)
    if layers is None:
        layers = known or [str(index) for index in range(len(next(iter(shares.values()))))]
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
        own = np.full_like(table, np.nan)
        own[place::period] = table[place::period]
        maps.append(
            LinearSegmentedColormap.from_list(colour, [to_rgb(_CLOSED), to_rgb(colour)]).with_extremes(bad="#0000")
        )
        # matplotlib's default smooths rows into one another where columns are many
        ax.imshow(np.ma.masked_invalid(own), maps[-1], aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    _name_strips(ax, layers, widths, period, len(shares))
    first = next(iter(shares)) if len(shares) > 1 else None
    about = "" if order is None else ", the most open first" if first is None else f", most open for {first} first"
    ax.set_xlabel(f"channels of the layer{about}")
    ax.set_ylabel("layer, input first")
    whole = all(bool(np.isin(strip, (0, 1)).all()) for strips in shares.values() for strip in strips)
    _explain_strips(ax, list(shares), maps, whole)
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
    ax: npt.NDArray[np.object_] | None = None,
) -> npt.NDArray[np.object_]:
    """Draw an image, the image with a region covered, and where the filters looked that switch off.

    Source: figure 6. Differs from the paper: the region is outlined in all panels, so that IoU can be seen.

    Args:
        image: ``(c, H, W)`` in [0, 1], c 1 or 3.
        region: ``(H, W)`` bool: what is covered.
        fields: ``(F, H, W)`` bool: receptive fields on the uncovered image; F may be 0.
        names: F names of filters; None: numbers in this order.
        ious: F, of each field and the region; None: computed.
        covered: ``(c, H, W)`` as the network saw it; None: the region in the mean colour of the rest, as
            `metrics.occlude` does by default.
        merged: ``(H, W)`` bool: union of the fields of all filters that switch off; None: of these.
        ax: Where to draw: an array of ``F + 3`` axes.

    Returns:
        The axes, shape ``(F + 3,)``: image, covered image, a field each, merged field. Empty ones are off.

    Raises:
        ShapeError: Tensors of other shapes, or an image outside [0, 1].
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
    names = _fitting(names, "names", count) or [f"filter {index}" for index in range(count)]
    values = _fitting(ious, "ious", count) or [_iou(field, region) for field in fields]
    covered = occlude(image[None].float(), region[None])[0] if covered is None else covered
    check_pixels(covered, "covered", image.shape)

    axes = _panels(ax, count + 3, size)
    outline = _edges(region)
    for axis, picture in zip(axes, [image, covered, *[image] * (count + 1)], strict=True):
        axis.imshow(_pixels(picture), cmap="gray", vmin=0, vmax=1)
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
    ax: npt.NDArray[np.object_] | None = None,
) -> npt.NDArray[np.object_]:
    """Draw `switched_off` of one image that `metrics.occlusion` covered: the k filters of highest IoU.

    Source: figure 6, which takes the three best filters of the last three layers.

    Args:
        result: What `metrics.occlusion` returns.
        image: That image, ``(c, H, W)``, in [0, 1]: not normalised.
        index: Which of the result's images it is.
        layers: Some of ``result.layers``; None: all.
        k: How many filters, at most; the merged field is that of all that switch off in these layers.
        covered: As the network saw it; None: as `metrics.occlude` covers by default.
        ax: Where to draw: an array of axes, ``k + 3``, or fewer where fewer switch off.

    Returns:
        The axes.

    Raises:
        OptionError: Not such a result, unknown layer, an image it does not have, or k below 1.
        ShapeError: The image is of another size.
    """
    if not isinstance(result, Occlusion):
        raise OptionError(f"result must be what metrics.occlusion returns, got {type(result).__name__}")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(result.masks):
        raise OptionError(f"index must be in [0, {len(result.masks)}), got {index!r}; it counts the images covered")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise OptionError(f"k must be an integer of at least 1, got {k!r}")
    region = result.masks[index].cpu()
    names, fields = [], [region[None][:0]]
    for place, layer in enumerate(result.layers):
        chosen = result.switched_off[place][index]
        if layer in (result.layers if layers is None else layers) and bool(chosen.any()):
            maps, cuts = result.maps[place][index, chosen][None], result.thresholds[place][chosen]
            fields.append(receptive_fields(maps, cuts, region.shape)[0].cpu())
            names += [f"{layer}, {each}" for each in chosen.nonzero().flatten().tolist()]
    if unknown := [name for name in layers or () if name not in result.layers]:
        raise OptionError(f"there is no layer {unknown[0]!r} in this result; there are {', '.join(result.layers)}")
    every = torch.cat(fields)
    values = field_iou(every[:, None], region.expand(len(every), 1, *region.shape)).flatten()
    best = values.nan_to_num().argsort(descending=True, stable=True)[:k]
    return switched_off(
        image, region, every[best], names=[names[each] for each in best.tolist()], ious=values[best].tolist(),
        covered=covered, merged=every.any(0) if len(every) > k else None, ax=ax,
    )  # fmt: skip


# -- what is refused ---------------------------------------------------------------------------------------------------


def _checked_groups(groups: Any) -> tuple[dict[str, list[Floats]], list[str] | None]:
    """For each group the shares of each layer; and the names of layers, if `Paths` say them."""
    named = dict(groups) if isinstance(groups, Mapping) else {"open": groups}
    if not 1 <= len(named) <= len(_GROUPS):
        raise OptionError(f"groups must be 1 to {len(_GROUPS)}, got {len(named)}; draw some of them")
    shares: dict[str, list[Floats]] = {}
    known = None
    for name, strips in named.items():
        if isinstance(strips, Paths):
            if not len(strips):
                raise OptionError(f"group {name!r} has no images; choose another")
            known, strips = known or list(strips.layers), strips.rates()
        if isinstance(strips, str) or not isinstance(strips, Sequence) or not len(strips):
            got = type(strips).__name__
            raise ShapeError(f"group {name!r} must be Paths, or a list of (K_l,), one for each layer, got {got}")
        shares[str(name)] = [numbers(strip, f"a layer of group {name!r}", 1, "(K_l,)") for strip in strips]
        for strip in shares[str(name)]:
            check_shares(strip, f"a layer of group {name!r}")
    return shares, known


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


def _fitting(given: Sequence[Any] | None, name: str, count: int) -> list[Any] | None:
    if given is None:
        return None
    if len(given) != count:
        raise OptionError(f"{name} must be {count}, one for each field, got {len(given)}")
    return list(given)


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def _name_strips(ax: Axes, layers: Sequence[str], widths: Sequence[int], period: int, groups: int) -> None:
    chosen = thinned(len(layers), room(ax)[1] / (SMALL * 1.25))
    texts = [f"{shortened(str(layers[index]))} ({widths[index]})" for index in chosen]
    ax.set_yticks([index * period + (groups - 1) / 2 for index in chosen], texts, fontsize=SMALL)
    ax.set_xticks([])
    for side in ax.spines.values():
        side.set_visible(False)


def _explain_strips(ax: Axes, names: Sequence[str], maps: Sequence[Any], whole: bool) -> None:
    """A legend; for shares also a colour bar, which shows each group's colours over the same 0 to 1."""
    opened = [Patch(color=colours(1.0), label=shortened(name)) for name, colours in zip(names, maps, strict=True)]
    if whole:
        legend(ax, [*opened, Patch(color=_CLOSED, label="closed")])
        return
    if len(names) > 1:
        legend(ax, opened)
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


def _panels(ax: Any, count: int, size: tuple[int, int]) -> npt.NDArray[np.object_]:
    """``(count,)`` axes: those given, or new ones in rows of at most 6."""
    if ax is not None:
        if not isinstance(ax, np.ndarray) or ax.size != count:
            got = f"{ax.size} axes" if isinstance(ax, np.ndarray) else type(ax).__name__
            raise OptionError(
                f"ax must be an array of {count} axes, got {got}; make them with plt.subplots(1, {count})"
            )
        return ax.ravel()
    columns = min(count, 6)
    rows = -(-count // columns)
    # room for the titles and the words below
    height = float(np.clip(1.8 * size[0] / size[1], 0.8, 4.0)) + 0.7
    axes = plt.subplots(rows, columns, figsize=(1.95 * columns, height * rows), layout="constrained", squeeze=False)[1]
    for spare in axes.ravel()[count:]:
        spare.axis("off")
    return axes.ravel()[:count]


def _pixels(image: Tensor) -> Floats:
    # HWC only here, at matplotlib's door
    return np.asarray(image.detach().cpu().double().permute(1, 2, 0).squeeze(2 if len(image) == 1 else ()))


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
