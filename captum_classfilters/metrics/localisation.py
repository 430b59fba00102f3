"""Do a class's channels look at the object? Their map is compared with its mask, its box, or its silhouette."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters.class_filters import ClassFilters, check_k, check_table, named_tables
from captum_classfilters.core.check import one_of
from captum_classfilters.core.control import Control, random_masks
from captum_classfilters.core.errors import HeadError, OptionError, ShapeError
from captum_classfilters.core.head_pass import Batch, HeadPass, weighed
from captum_classfilters.core.intervals import mean_interval, wilson

# Keys by which a loader may give the objects
_KEYS = {"mask": ("mask", "masks"), "box": ("box", "boxes")}


def foreground(images: Tensor, threshold: float = 0.1) -> Tensor:
    """The silhouette of an object on black: pixels brighter than a share of the image's brightest.

    Images are in [0, 1] or bytes; in normalised images black is not 0.

    Args:
        images: ``(N, colours, H, W)``.
        threshold: Share of each image's maximum.

    Returns:
        ``(N, H, W)`` bool.

    Raises:
        OptionError: A pixel is negative.
    """
    if bool((images < 0).any()):
        raise OptionError(
            "foreground is for objects on black, but pixels are negative (normalised images); pass silhouette=, a "
            "function from such images to (N, H, W) bool"
        )
    grey = images.float().mean(1)
    return grey > threshold * grey.amax((1, 2), keepdim=True)


def localisation(
    model: Any,
    filters: ClassFilters | Mapping[Any, ClassFilters],
    loader: Iterable[Any] | None = None,
    k: int = 5,
    *,
    silhouette: Callable[[Tensor], Tensor] | str = foreground,
    channel_weights: str = "head",
    layer: nn.Module | str | None = None,
    control: Control = Control(),
) -> pd.DataFrame:
    """Pointing game and IoU of the map of a class's k channels, of random channels and of all channels.

    Badola et al. 2022 (second version) claim that these filters correspond better to the object. Pointing game: Zhang
    et al. 2018. The map is that of `InfluentialFeatures.explain` for the true class, upsampled bilinearly.

    Args:
        model: The network; borrowed. Or a `HeadPass`; then ``loader`` and ``layer`` are left out.
        filters: A table, or tables by name. A table of the random selector is left out: the control replaces it.
        loader: Batches ``(images, labels)``; with masks or boxes ``(images, labels, masks)``, or mappings.
        k: Channels of each class, in ``[1, K]``.
        silhouette: What the object is. A function: images ``(N, colours, H, W)`` to objects ``(N, H, W)`` bool.
            ``"mask"``: each batch has ``(N, H, W)`` or ``(N, 1, H, W)``, bool or 0 and 1, behind the labels or by
            the key mask or masks. ``"box"``: it has ``(N, 4)``, x1, y1, x2, y2 in pixels as in torchvision, behind
            the labels or by the key box or boxes; a pixel is inside if its centre is.
        channel_weights: ``"head"``: each channel times its weight for the class; ``"ones"``: the plain sum.
        layer: The head, if it cannot be found.
        control: Random sets of k channels.

    Returns:
        One row for each table and one for ``"all channels"``; one for ``"random"`` with ``control`` True. ``filters``,
        ``control``; ``pointing``, the share of images whose map is largest inside the object, with Wilson's interval
        (for the control Student-t over draws); ``iou`` of the object and equally many highest pixels of the map, with a
        normal interval; ``chance``: pointing of a blind guess, which is the object's share of the image;
        ``chance_iou``: IoU of a blind guess; ``samples``.

    Raises:
        HeadError: There is no feature map behind the head.
        OptionError, ShapeError: k, a table, a silhouette, masks or boxes do not fit.
    """
    head_pass = HeadPass.of(model, loader, layer)
    tables = named_tables(filters, ("random", "all channels"))
    one_of(channel_weights, "channel_weights", ("head", "ones"))
    if not callable(silhouette) and silhouette not in tuple(_KEYS):
        raise OptionError(f'silhouette must be a function of images, "mask" or "box", got {silhouette!r}')
    for table in tables.values():
        k = check_k(k, table.num_channels, "k")
    masks = {name: table.mask(k) for name, table in tables.items()}
    shape = tuple(next(iter(masks.values())).shape)
    draws = random_masks(shape, k, control.draws, control.generator())
    masks |= {f"random {draw}": mask for draw, mask in enumerate(draws)}
    masks["all channels"] = torch.ones(shape, dtype=torch.bool)
    scores: dict[str, list[Any]] = {name: [] for name in masks}
    areas: list[Any] = []
    with head_pass.batches(need_maps=True, description="localisation") as stream:
        for batch in stream:
            for table in tables.values():
                check_table(table, batch.head)
            if batch.maps.dim() != 4:  # type: ignore[union-attr]
                raise HeadError(
                    f"the map behind the head {batch.head.name} is no map of images, (N, K, h, w), but "
                    f"{tuple(batch.maps.shape)}; localisation compares it with silhouettes"  # type: ignore[union-attr]
                )
            if batch.maps[0, 0].numel() == 1:  # type: ignore[index]
                raise HeadError(
                    f"the map behind the head {batch.head.name} has a single position, so it cannot show a place; "
                    "pass larger images or another layer="
                )
            _check_seen(tables, batch.labels)  # type: ignore[arg-type]
            objects = _objects(silhouette, batch).to(batch.features.device)
            # every map hits an image that is all object, and no map hits one without object
            usable = objects.flatten(1).any(1) & ~objects.flatten(1).all(1)
            objects, labels, maps = objects[usable], batch.labels[usable], batch.maps[usable]  # type: ignore[index]
            areas.append(objects.flatten(1).double().mean(1).cpu().numpy())
            weights = batch.head.weight[labels]
            if channel_weights == "ones":
                weights = torch.ones_like(weights)
            for name, mask in masks.items():
                kept = (weights * mask.to(labels.device)[labels]).to(maps.dtype)
                class_maps = weighed(maps, kept).float()
                class_maps = LayerAttribution.interpolate(class_maps, tuple(objects.shape[1:]), "bilinear").squeeze(1)
                scores[name].append(_score(class_maps, objects).cpu().numpy())
    if not sum(map(len, areas)):
        raise OptionError("this silhouette gives no image both an object and a background; pass another silhouette=")
    by_name = {name: np.concatenate(parts) for name, parts in scores.items()}
    return _frame(by_name, np.concatenate(areas), list(tables), control.draws)


def _check_seen(filters: Mapping[str, ClassFilters], labels: Tensor) -> None:
    for name, table in filters.items():
        missing = [table.class_names[y] for y in torch.unique(labels).tolist() if not table.seen[y]]
        if missing:
            raise OptionError(
                f"table {name!r} has no samples of {missing}, so it has no channels for them; leave these images out"
            )


def _objects(silhouette: Callable[[Tensor], Tensor] | str, batch: Batch) -> Tensor:
    images = batch.inputs[0]
    shape = (len(images), *images.shape[2:])
    if isinstance(silhouette, str):
        regions = _regions(silhouette, batch.extras).to(images.device)
        return mask_objects(regions, shape) if silhouette == "mask" else box_objects(regions, shape)
    objects = silhouette(images)
    if objects.shape != shape or objects.dtype != torch.bool:
        raise ShapeError(
            f"silhouette must give bool of shape {shape}, got {objects.dtype} of shape {tuple(objects.shape)}"
        )
    return objects


def _regions(kind: str, extras: Any) -> Tensor:
    """What a batch holds besides images and labels, by its key or first behind the labels."""
    part = extras if isinstance(extras, Mapping) else next(iter(extras), None)
    if isinstance(part, Mapping):
        part = next((part[key] for key in _KEYS[kind] if key in part), None)
    if not isinstance(part, Tensor):
        got = "nothing" if part is None else type(part).__name__
        raise OptionError(
            f'silhouette="{kind}" needs a tensor in every batch, as (images, labels, {kind}) or by one of the keys '
            f"{list(_KEYS[kind])}, got {got}; add it to the loader's batches, or pass a function of images"
        )
    return part


def mask_objects(masks: Tensor, shape: Sequence[int]) -> Tensor:
    """Masks as objects.

    Args:
        masks: ``(N, H, W)`` or ``(N, 1, H, W)``, bool or 0 and 1.
        shape: ``(N, H, W)``.

    Returns:
        ``(N, H, W)`` bool.

    Raises:
        ShapeError: The shape differs, or there are other numbers than 0 and 1.
    """
    objects = masks.squeeze(1) if masks.dim() == 4 else masks
    if objects.shape != tuple(shape):
        raise ShapeError(
            f"masks must have the images' shape {tuple(shape)}, or {(shape[0], 1, *shape[1:])}, got "
            f"{tuple(masks.shape)}; resize and crop them with the images"
        )
    if objects.dtype != torch.bool and not bool(((objects == 0) | (objects == 1)).all()):
        raise ShapeError(
            f"masks must be bool, or 0 and 1, got {masks.dtype} up to {float(masks.max()):.4g}; pass masks > 0"
        )
    return objects.bool()


def box_objects(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Boxes as objects: the pixels whose centres are inside.

    Args:
        boxes: ``(N, 4)``: x1, y1, x2, y2 in pixels; column j of an image reaches from x = j to j + 1.
        shape: ``(N, H, W)``.

    Returns:
        ``(N, H, W)`` bool.

    Raises:
        ShapeError: The shape differs, or the numbers are no boxes in pixels.

    Example:
        >>> box_objects(torch.tensor([[1.0, 0.0, 3.0, 1.0]]), (1, 2, 3)).int().tolist()
        [[[0, 1, 1], [0, 0, 0]]]
    """
    if boxes.shape != (shape[0], 4):
        raise ShapeError(
            f"boxes must have shape {(shape[0], 4)}, x1, y1, x2, y2 for each image, got {tuple(boxes.shape)}; for "
            "several objects pass a mask"
        )
    left, top, right, bottom = boxes.double().T[:, :, None]
    # NaN is neither larger nor smaller
    if not bool(((left < right) & (top < bottom)).all()):
        raise ShapeError(
            "boxes must have x1 < x2 and y1 < y2, got one that has not; if they are x, y, width, height, use "
            "torchvision.ops.box_convert"
        )
    fractional = bool((boxes != boxes.round()).any())
    if max(shape[1:]) > 1 and fractional and not bool((boxes > 1).any()):
        raise ShapeError(
            f"boxes must be in pixels, got no number above {float(boxes.max()):.4g}; if they are shares of the image, "
            f"multiply by its width {shape[2]} and height {shape[1]}"
        )
    y, x = (torch.arange(size, device=boxes.device) + 0.5 for size in shape[1:])
    across, down = (left <= x) & (x < right), (top <= y) & (y < bottom)
    inside: Tensor = down[:, :, None] & across[:, None, :]
    return inside


def _score(maps: Tensor, objects: Tensor) -> Tensor:
    """``(N, 2)``: whether the largest value is inside the object, and the IoU of equally large areas."""
    flat, inside = maps.flatten(1), objects.flatten(1)
    order = flat.sort(dim=1, descending=True, stable=True).indices
    # of several equal maxima one is pointed at by chance, so their share inside counts
    highest = flat == flat.amax(1, keepdim=True)
    pointed = (highest & inside).sum(1) / highest.sum(1)
    size = inside.sum(1)
    first = torch.arange(flat.shape[1], device=flat.device) < size[:, None]
    shared = (inside.gather(1, order) & first).sum(1)
    return torch.stack([pointed.double(), shared / (2 * size - shared)], dim=1)


def _frame(scores: Mapping[str, Any], areas: Any, names: list[str], draws: int) -> pd.DataFrame:
    samples, rows = len(areas), []
    for name in [*names, "all channels"]:
        pointed, iou = scores[name].T
        low, high = wilson(pointed.sum(), samples)
        half = 1.96 * iou.std(ddof=1) / np.sqrt(samples) if samples > 1 else np.nan
        interval = iou.mean(), iou.mean() - half, iou.mean() + half
        rows.append((name, False, pointed.mean(), float(low), float(high), *interval))
    control = np.stack([scores[f"random {draw}"].mean(0) for draw in range(draws)])
    (pointing, iou), (low, iou_low), (high, iou_high) = mean_interval(control)
    rows.append(("random", True, pointing, low, high, iou, iou_low, iou_high))
    columns = ["filters", "control", "pointing", "low", "high", "iou", "iou_low", "iou_high"]
    blind = float((areas / (2 - areas)).mean())
    return pd.DataFrame(rows, columns=columns).assign(chance=float(areas.mean()), chance_iou=blind, samples=samples)
