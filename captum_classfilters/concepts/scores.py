"""Do filters stand for concepts? The receptive field of each filter is compared with masks of concepts.

This file judges single filters; `occlusion.py` judges several together. Loaders give batches ``(images, masks)``, or
mappings with these keys. Images are ``(N, c, H, W)``, all of one size. Masks are a list with ``{concept: (H, W)}`` for
each image, or stacked, ``{concept: (N, H, W)}``; they are bool, or 0 and 1. An image does not have a concept if its key
is missing, or its mask is None or has no pixel. N images, K filters of a layer, T concepts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.concepts.fields import (
    CELLS,
    Layers,
    MapReader,
    Thresholds,
    check_thresholds,
    field_iou,
    image_batches,
    network_of,
    receptive_fields,
    thresholds_of,
)
from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.check import integer
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.intervals import draws_interval, mean_interval, wilson
from captum_classfilters.core.stream import Samples, refuse_iterator
from captum_classfilters.core.wide import home


def concept_scores(
    model: Any,
    loader: Iterable[Any],
    layers: Layers = None,
    *,
    thresholds: Thresholds | float = 0.005,
    iou: float = 0.01,
    min_images: int = 1,
    control: Control = Control(),
    show_progress: bool = False,
) -> pd.DataFrame:
    """Interpretability of every filter: on which share of a concept's images its receptive field meets the concept.

    Source: "Interpretable neural network decoupling", section 4.2: P_ft is the mean of 1[IoU > .01] over the images
    that have concept t, and the score is max_t P_ft. Differs: the control. In draw d every image is judged by the masks
    of the image d places before it in the loader, so shuffle a loader that is sorted. The best of many concepts scores
    high by chance alone, above all if concepts have few images.

    Args:
        model: The network, or a `PathDecoupler`; borrowed. To compare both, read the network at ``unit.site`` of the
            decoupler's units, where its maps are behind the norm too.
        loader: Batches ``(images, masks)``, see the docstring of this module; read two or three times.
        layers: As for `activation_thresholds`.
        thresholds: From `activation_thresholds`, or its ``quantile``; then they are computed from this loader.
        iou: What the IoU must exceed, in [0, 1).
        min_images: Concepts with fewer images are left out.
        control: Only its ``draws`` count; nothing is drawn by seed. N images allow at most N - 1 draws.
        show_progress: Show a tqdm bar.

    Returns:
        Two rows for each filter. With ``control`` False: ``layer``, ``filter``, ``concept`` (the best; the first by
        name if several are equal; missing if the score is 0), ``score``, ``low`` and ``high`` (Wilson over that
        concept's images; the choice of the concept is not accounted for), ``images`` (how many have that concept). The
        rows with ``control`` True follow: the mean ``score`` over draws with other images' masks, its Student-t
        interval over draws (NaN for one draw), no concept, and the number of ``images`` in the loader. `layer_scores`
        averages these rows.

    Raises:
        OptionError: An argument is out of range, no concept has enough images, or there are fewer than two images.
        LayerError, ShapeError, EmptyLoaderError, NonFiniteError: As for `activation_thresholds`.
    """
    if not 0 <= iou < 1:
        raise OptionError(f"iou must lie in [0, 1), got {iou!r}")
    min_images = integer(min_images, "min_images", 1)
    survey = surveyed(loader, control)
    names = [name for name, count in survey.counts.items() if count >= min_images]
    if not names:
        most = max(survey.counts.values())
        raise OptionError(f"no concept has min_images={min_images} images; the most that one has is {most}")
    concepts = [list(survey.counts).index(name) for name in names]
    counts = np.array([survey.counts[name] for name in names])
    thresholds = thresholds_of(thresholds, model, loader, layers, survey.samples, show_progress)
    frames, controls = [], []
    for layer, tally in tallied(model, loader, layers, survey, thresholds, iou, show_progress).items():
        hits = tally.hits[:, concepts].cpu().numpy()  # (1 + draws, T, K)
        share = hits / counts[:, None]
        best, score = share[0].argmax(0), share[0].max(0)
        low, high = wilson(hits[0, best, np.arange(len(best))], counts[best])
        place = {"layer": layer, "filter": range(len(score)), "control": False}
        concept = np.where(score > 0, np.array(names, object)[best], None)
        values = {"concept": concept, "score": score, "low": low, "high": high, "images": counts[best]}
        frames.append(pd.DataFrame(place | values))
        score, low, high = _over_draws(share[1:].max(1))
        values = {"concept": None, "score": score, "low": low, "high": high, "images": survey.samples}
        controls.append(pd.DataFrame(place | {"control": True} | values))
    return pd.concat([*frames, *controls], ignore_index=True)


def layer_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean of `concept_scores` over the filters of each layer.

    Source: "Interpretable neural network decoupling", table 1. Differs: control and intervals. The intervals are
    Student-t over filters, as if these were independent; they say nothing about other images.

    Args:
        scores: From `concept_scores`.

    Returns:
        Two rows for each layer, the second with ``control`` True: ``layer``, ``control``, ``filters``; ``score``,
        ``low``, ``high``. In the first also ``gain``, ``gain_low``, ``gain_high``: the score less that of the control,
        filter by filter; NaN in the control. Intervals of a single filter are NaN.
    """
    rows = []
    for layer, group in scores.groupby("layer", sort=False):
        score, chance = (group.score[group.control == side].to_numpy() for side in (False, True))
        for control, values in ((False, score), (True, chance)):
            mean, low, high = _over_draws(values)
            rows.append({"layer": layer, "control": control, "filters": len(values)})
            rows[-1] |= {"score": float(mean), "low": float(low), "high": float(high)}
            if not control:
                mean, low, high = _over_draws(score - chance, draws_interval)
                rows[-1] |= {"gain": float(mean), "gain_low": float(low), "gain_high": float(high)}
    return pd.DataFrame(rows)


def _over_draws(values: Any, interval: Any = mean_interval) -> Any:
    """Mean over the first axis with its interval, which is NaN for a single value."""
    return interval(values) if len(values) > 1 else (values[0], *2 * (np.full_like(values[0], np.nan),))


def collate_concepts(samples: Sequence[tuple[Any, Any]]) -> tuple[Tensor, list[Any]]:
    """Make a batch of samples ``(image, {concept: mask})``; pass it to a ``DataLoader`` as ``collate_fn``.

    Example:
        >>> samples = [(torch.zeros(3, 2, 2), {"eye": torch.ones(2, 2)}), (torch.ones(3, 2, 2), {})]
        >>> images, masks = collate_concepts(samples)
        >>> images.shape, [list(concepts) for concepts in masks]
        (torch.Size([2, 3, 2, 2]), [['eye'], []])
    """
    images, masks = zip(*samples, strict=True)
    return torch.stack(images), list(masks)


class Survey(NamedTuple):
    """What a first pass over a loader, without the model, finds."""

    samples: int
    size: tuple[int, int]
    counts: dict[str, int]  # how many images have each concept, in the order of names
    draws: int  # of the control, at most the number of images minus one


class ConceptBatch(NamedTuple):
    """Images and their masks, padded to the same number for each image."""

    images: Tensor  # (N, c, H, W)
    masks: Tensor  # (N, M, H, W) bool
    slots: Tensor  # (N, M) int64: the concept's index; T means no mask


class Tally(NamedTuple):
    """Sums over a loader for one layer: first with an image's own masks, then for each draw of the control."""

    hits: Tensor  # (1 + draws, T, K) int64: number of images on which the IoU exceeds ``iou``
    highest: Tensor  # (1 + draws, T) float64: max over images and filters of the IoU
    total: Tensor  # (1 + draws, T) float64: sum over images of the max over filters


def surveyed(loader: Iterable[Any], control: Control) -> Survey:
    """Count images and concepts; refuse a loader that does not fit."""
    refuse_iterator(loader, "the loader")
    samples, counts = 0, Counter[str]()
    for batch in image_batches(loader):
        samples += batch.size
        for masks in _masks_by_image(batch):
            counts.update(masks.keys())
    height, width = batch.inputs[0].shape[2:]
    if not counts:
        raise OptionError("no image has a concept: expected a mask with a pixel; see help(concepts.scores)")
    if samples < 2:
        raise OptionError("the control judges an image by another's masks: expected at least 2 images, got 1")
    if not all(isinstance(name, str) for name in counts):
        raise OptionError(f"concepts must have names, got {next(n for n in counts if not isinstance(n, str))!r}")
    return Survey(
        samples, (height, width), {name: counts[name] for name in sorted(counts)}, min(control.draws, samples - 1)
    )


def concept_batches(loader: Iterable[Any], survey: Survey, show_progress: bool, text: str) -> Iterator[ConceptBatch]:
    """The loader's batches with padded masks."""
    slot_of = {name: slot for slot, name in enumerate(survey.counts)}
    counts = Counter[str]()
    for batch in image_batches(loader, show_progress, text):
        masks_by_image = _masks_by_image(batch)
        most = max(map(len, masks_by_image))
        masks = torch.zeros(batch.size, most, *batch.inputs[0].shape[2:], dtype=torch.bool)
        slots = torch.full((batch.size, most), len(slot_of))
        for n, concepts in enumerate(masks_by_image):
            counts.update(concepts.keys())
            for m, (name, mask) in enumerate(concepts.items()):
                masks[n, m], slots[n, m] = mask, slot_of.get(name, len(slot_of))
        yield ConceptBatch(batch.inputs[0], masks, slots)
    if counts != survey.counts:
        raise OptionError("the loader gave other masks when read again; it must give the same each time")


def tallied(
    model: Any,
    loader: Iterable[Any],
    layers: Layers,
    survey: Survey,
    thresholds: Thresholds,
    iou: float,
    show_progress: bool,
) -> dict[str, Tally]:
    """In one pass sum, for each layer, the IoU of every filter's field with masks of the image and of other images."""
    concepts, groups = len(survey.counts), 1 + survey.draws
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    with borrowed(network_of(model)) as borrow:
        reader = MapReader(model, layers, borrow)
        check_thresholds(thresholds, reader.layers)
        stream = concept_batches(loader, survey, show_progress, "concepts")
        for images, masks, slots in _with_others(stream, survey):
            masks, rows = masks.to(reader.device), slots.flatten().to(home(reader.device))
            for name, maps in reader.maps(images).items():
                if name not in sums:
                    cells = groups * (concepts + 1)
                    place = home(maps.device)
                    integers = torch.zeros(cells, maps.shape[1], dtype=torch.int64, device=place)
                    sums[name] = (integers, *torch.zeros(2, cells, dtype=torch.float64, device=place))
                ious = _overlaps(maps, thresholds[name].to(maps.device), masks, survey.size)
                ious = ious.transpose(1, 2).flatten(0, 1)  # (N M, K)
                hits, highest, total = sums[name]
                hits.index_add_(0, rows, (ious > iou).long())
                highest.scatter_reduce_(0, rows, ious.amax(1), "amax")
                total.index_add_(0, rows, ious.amax(1))
    # the last slot of each group stands for no mask
    return {
        name: Tally(*(part.reshape(groups, concepts + 1, *part.shape[1:])[:, :-1] for part in parts))
        for name, parts in sums.items()
    }


def _overlaps(maps: Tensor, thresholds: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """``(N, K, M)`` float64, some filters at a time; a mask without a pixel gives 0."""
    some = max(1, CELLS // (len(maps) * size[0] * size[1]))
    parts = [
        field_iou(receptive_fields(maps[:, start : start + some], thresholds[start : start + some], size), masks)
        for start in range(0, maps.shape[1], some)
    ]
    return torch.cat(parts, 1).nan_to_num(0.0)


def _with_others(stream: Iterable[ConceptBatch], survey: Survey) -> Iterator[ConceptBatch]:
    """Each image with its own masks, followed by the masks of the images 1, 2, ... places before it.

    The first images come again at the end, with the masks of the last images.
    """
    draws, nothing = survey.draws, len(survey.counts)
    before = first = None
    for batch in stream:
        if before is None or first is None:
            no_slots = batch.slots.new_full((draws, 0), nothing)
            before = batch.masks.new_zeros(draws, 0, *survey.size), no_slots
            first = batch.images[:0], batch.masks[:0], batch.slots[:0]
        joined = _joined(before, (batch.masks, batch.slots), nothing)
        yield _grouped(batch.images, *joined, draws, nothing)
        before = joined[0][-draws:], joined[1][-draws:]
        if (missing := draws - len(first[0])) > 0:
            both = _joined(first[1:], (batch.masks[:missing], batch.slots[:missing]), nothing)
            first = torch.cat([first[0], batch.images[:missing]]), *both
    if before is not None and first is not None:
        # their own masks were counted before
        again = _joined(before, (first[1], torch.full_like(first[2], nothing)), nothing)
        yield _grouped(first[0], *again, draws, nothing)


def _joined(one: Any, other: Any, nothing: int) -> tuple[Tensor, Tensor]:
    most = max(one[1].shape[1], other[1].shape[1])
    masks = [F.pad(masks, (0, 0, 0, 0, 0, most - masks.shape[1])) for masks, _ in (one, other)]
    slots = [F.pad(slots, (0, most - slots.shape[1]), value=nothing) for _, slots in (one, other)]
    return torch.cat(masks), torch.cat(slots)


def _grouped(images: Tensor, masks: Tensor, slots: Tensor, draws: int, nothing: int) -> ConceptBatch:
    """Regroup the masks of these images and of the ``draws`` images before: own masks, then those d places before."""
    starts = [draws - shift for shift in range(draws + 1)]
    shifted = [masks[start : start + len(images)] for start in starts]
    groups = [slots[start : start + len(images)] + d * (nothing + 1) for d, start in enumerate(starts)]
    return ConceptBatch(images, torch.cat(shifted, 1), torch.cat(groups, 1))


def _masks_by_image(batch: Samples) -> list[dict[str, Tensor]]:
    """For each image, the masks that have a pixel."""
    images, extras, place = batch.inputs[0], batch.extras, batch.place
    if isinstance(extras, Mapping):
        extras = [extras[key] for key in ("mask", "masks") if key in extras]
    masks = next(iter(extras), None)
    if masks is None:
        raise ShapeError(
            f"batch {place} has no masks; expected (images, masks): a tensor (N, c, H, W) and a list of one "
            "{concept: (H, W) mask} for each image, or {concept: (N, H, W) masks}; collate_fn=collate_concepts makes "
            "such batches of samples (image, {concept: mask})"
        )
    if isinstance(masks, Mapping):
        masks = _by_image(masks, batch.size, place)
    if not isinstance(masks, list | tuple) or not all(isinstance(concepts, Mapping) for concepts in masks):
        raise ShapeError(
            f"the masks of batch {place} must be a list of one {{concept: mask}} for each image, or "
            f"{{concept: (N, H, W)}}, got {type(masks).__name__}"
        )
    if len(masks) != batch.size:
        raise ShapeError(f"batch {place} has {batch.size} images and masks of {len(masks)}; give {{}} for one without")
    size = tuple(images.shape[2:])
    masks_by_image: list[dict[str, Tensor]] = [{} for _ in masks]
    for kept, concepts in zip(masks_by_image, masks, strict=True):
        for name, value in concepts.items():
            if value is not None and bool((mask := _mask(value, name, size, place)).any()):
                kept[name] = mask
    return masks_by_image


def _by_image(stacks: Mapping[Any, Any], size: int, index: int) -> list[dict[Any, Any]]:
    """Stacked masks, ``{concept: (N, H, W)}``, as one ``{concept: (H, W)}`` for each image."""
    stacks = {name: stack for name, stack in stacks.items() if stack is not None}
    for name, stack in stacks.items():
        if len(stack) != size:
            raise ShapeError(
                f"the masks of {name!r} in batch {index} are {len(stack)}, for {size} images; stack one for each, "
                "without a pixel where the image does not have the concept"
            )
    return [{name: stack[n] for name, stack in stacks.items()} for n in range(size)]


def _mask(value: Any, name: Any, size: tuple[int, ...], index: int) -> Tensor:
    mask = torch.as_tensor(value)
    if tuple(mask.shape) != size:
        raise ShapeError(
            f"the mask of {name!r} in batch {index} must have the image's size {size}, got {tuple(mask.shape)}; resize "
            "and crop masks with their images (masks by nearest neighbour)"
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ShapeError(
            f"the mask of {name!r} in batch {index} must be bool, or 0 and 1, got {mask.dtype}; pass mask > 0"
        )
    return mask.bool()
