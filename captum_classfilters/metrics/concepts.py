"""Do filters stand for concepts? The receptive field of each filter against masks of concepts that the loader brings.

One filter at a time; what several do together, and covering a concept: `occlusion.py`. Loaders give batches
``(images, masks)``: images ``(N, c, H, W)``, all of one size; masks a list of one ``{concept: (H, W)}`` for each image,
or stacked, ``{concept: (N, H, W)}``. Masks are bool, or 0 and 1. Where the key is missing, or the mask is None or has
no pixel, the image does not have the concept. N images, K filters of a layer, T concepts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import EmptyLoaderError, OptionError, ShapeError
from captum_classfilters.core.stream import refuse_iterator
from captum_classfilters.metrics.accuracy import check_draws
from captum_classfilters.metrics.fields import (
    CELLS,
    Layers,
    MapReader,
    activation_thresholds,
    check_images,
    field_iou,
    network_of,
    passed,
    receptive_fields,
)
from captum_classfilters.metrics.intervals import draws_interval, mean_interval, wilson

Thresholds = Mapping[str, Tensor]


def concept_scores(
    model: Any,
    loader: Iterable[Any],
    layers: Layers = None,
    *,
    thresholds: Thresholds | None = None,
    quantile: float = 0.005,
    iou: float = 0.01,
    min_images: int = 1,
    draws: int = 5,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Interpretability of every filter: on which share of a concept's images its receptive field meets the concept.

    Source: "Interpretable neural network decoupling", section 4.2: P_ft is the mean over the images that have concept t
    of 1[IoU > .01], the score max_t P_ft. Differs: the control. In draw d every image is judged by the masks of the
    image d places before it in the loader, so shuffle a loader that is sorted; the best of many concepts is high by
    chance alone, and more so for concepts with few images.

    Args:
        model: The network, or a `PathDecoupler`; borrowed. To compare both, read the network at ``unit.site`` of the
            decoupler's units: there its maps are behind the norm too.
        loader: Batches ``(images, masks)``, as said at the head of this module; read two or three times.
        layers: As for `activation_thresholds`.
        thresholds: From `activation_thresholds`; None: of this loader.
        quantile: Share of responses above the threshold, where ``thresholds`` is None.
        iou: What the IoU must exceed.
        min_images: Concepts of fewer images are left out.
        draws: Draws of the control, at least 5; of fewer than 6 images one less than these.
        show_progress: A tqdm bar.

    Returns:
        One row for each filter: ``layer``, ``filter``, ``concept`` (the best; the first by name of equals, missing
        where the score is 0), ``score``, ``low`` and ``high`` (Wilson over that concept's images, as if it had not been
        chosen), ``images`` (how many have that concept), ``random`` (the score by other images' masks, mean over
        draws). `layer_scores` gives their means.

    Raises:
        OptionError: An argument out of range; no concept with enough images; fewer than two images.
        LayerError, ShapeError, EmptyLoaderError, NonFiniteError: As for `activation_thresholds`.
    """
    if not 0 <= iou < 1:
        raise OptionError(f"iou must lie in [0, 1), got {iou!r}")
    survey = surveyed(loader, draws)
    names = [name for name, count in survey.counts.items() if count >= min_images]
    if not names:
        most = max(survey.counts.values())
        raise OptionError(f"no concept has min_images={min_images} images; the most that one has is {most}")
    rows = [list(survey.counts).index(name) for name in names]
    counts = np.array([survey.counts[name] for name in names])
    frames = []
    for layer, tally in tallied(model, loader, layers, survey, thresholds, quantile, iou, show_progress).items():
        hits = tally.hits[:, rows].cpu().numpy()  # (1 + draws, T, K)
        share = hits / counts[:, None]
        best = share[0].argmax(0)
        score = share[0].max(0)
        low, high = wilson(hits[0, best, np.arange(len(best))], counts[best])
        concept = np.where(score > 0, np.array(names, object)[best], None)
        columns = {"concept": concept, "score": score, "low": low, "high": high, "images": counts[best]}
        random = share[1:].max(1).mean(0)
        frames.append(pd.DataFrame({"layer": layer, "filter": range(len(score)), **columns, "random": random}))
    return pd.concat(frames, ignore_index=True)


def layer_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean of `concept_scores` over the filters of each layer.

    Source: "Interpretable neural network decoupling", table 1. Differs: control and intervals. These are Student-t over
    filters, as if they were independent: they tell nothing of other images.

    Args:
        scores: From `concept_scores`.

    Returns:
        One row for each layer: ``filters``; ``score``, ``random`` and ``gain``, the difference filter by filter, each
        with ``_low`` and ``_high`` (of ``score`` just these); NaN for a single filter.
    """
    rows = []
    for layer, group in scores.groupby("layer", sort=False):
        row: dict[str, Any] = {"layer": layer, "filters": len(group)}
        parts = {"": group.score, "random_": group.random, "gain_": group.score - group.random}
        for prefix, values in parts.items():
            mean, low, high = float(values.mean()), np.nan, np.nan
            if len(values) > 1:
                _, low, high = (draws_interval if prefix == "gain_" else mean_interval)(values)
            row |= {prefix.rstrip("_") or "score": mean, f"{prefix}low": low, f"{prefix}high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def collate_concepts(samples: Sequence[tuple[Any, Any]]) -> tuple[Tensor, list[Any]]:
    """Batches of samples ``(image, {concept: mask})``, as a ``DataLoader``'s ``collate_fn``.

    Example:
        >>> samples = [(torch.zeros(3, 2, 2), {"eye": torch.ones(2, 2)}), (torch.ones(3, 2, 2), {})]
        >>> images, masks = collate_concepts(samples)
        >>> images.shape, [list(each) for each in masks]
        (torch.Size([2, 3, 2, 2]), [['eye'], []])
    """
    images, masks = zip(*samples, strict=True)
    return torch.stack(images), list(masks)


class Survey(NamedTuple):
    """What a first look at a loader, without running the model, says of it."""

    samples: int
    size: tuple[int, int]
    counts: dict[str, int]  # by concept, in order of their names: images that have it
    draws: int  # of the control: one less than the images, if there are few


class ConceptBatch(NamedTuple):
    """Images and their masks, padded to the same number for each image."""

    images: Tensor  # (N, c, H, W)
    masks: Tensor  # (N, M, H, W) bool
    slots: Tensor  # (N, M) int64: which concept; the last, one past these, is for no mask


class Tally(NamedTuple):
    """Sums over a loader for one layer: first with an image's own masks, then by draw of the control."""

    hits: Tensor  # (1 + draws, T, K) int64: images on which the IoU exceeds what was asked
    highest: Tensor  # (1 + draws, T) float64: max over images and filters of the IoU
    total: Tensor  # (1 + draws, T) float64: sum over images of the max over filters


def surveyed(loader: Iterable[Any], draws: int) -> Survey:
    """Count images and concepts, and refuse what is not as expected."""
    refuse_iterator(loader, "the loader")
    check_draws(draws)
    samples, size, counts = 0, None, Counter[str]()
    for index, raw in enumerate(passed(loader, False, "")):
        images, masks = _unpacked(raw, index)
        size = check_images(images, size, index)
        samples += len(images)
        for each in masks:
            counts.update(each.keys())
    if size is None or not samples:
        raise EmptyLoaderError("the loader gave no image; expected at least one batch")
    if not counts:
        raise OptionError("no image has a concept: expected a mask with a pixel; see the head of metrics.concepts")
    if samples < 2:
        raise OptionError("the control judges an image by another's masks: expected at least 2 images, got 1")
    if not all(isinstance(name, str) for name in counts):
        raise OptionError(f"concepts must have names, got {next(n for n in counts if not isinstance(n, str))!r}")
    return Survey(samples, size, {name: counts[name] for name in sorted(counts)}, min(draws, samples - 1))


def concept_batches(loader: Iterable[Any], survey: Survey, show_progress: bool, text: str) -> Iterator[ConceptBatch]:
    """The loader's batches with padded masks."""
    slot_of = {name: slot for slot, name in enumerate(survey.counts)}
    seen = Counter[str]()
    for index, raw in enumerate(passed(loader, show_progress, text)):
        images, given = _unpacked(raw, index)
        check_images(images, survey.size, index)
        most = max(map(len, given), default=0)
        masks = torch.zeros(len(images), most, *survey.size, dtype=torch.bool)
        slots = torch.full((len(images), most), len(slot_of))
        for n, each in enumerate(given):
            seen.update(each.keys())
            for m, (name, mask) in enumerate(each.items()):
                masks[n, m], slots[n, m] = mask, slot_of.get(name, len(slot_of))
        if len(images):
            yield ConceptBatch(images, masks, slots)
    if seen != survey.counts:
        raise OptionError("the loader gave other masks when read again; it must give the same each time")


def tallied(
    model: Any,
    loader: Iterable[Any],
    layers: Layers,
    survey: Survey,
    thresholds: Thresholds | None,
    quantile: float,
    iou: float,
    show_progress: bool,
) -> dict[str, Tally]:
    """One pass: the IoU of every filter's field and every mask, own and others', summed up by layer."""
    if thresholds is None:
        thresholds = activation_thresholds(model, loader, layers, quantile=quantile, show_progress=show_progress)
    concepts, groups = len(survey.counts), 1 + survey.draws
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    with borrowed(network_of(model)) as borrow:
        reader = MapReader(model, layers, borrow)
        check_thresholds(thresholds, reader.layers)
        stream = concept_batches(loader, survey, show_progress, "concepts")
        for images, masks, slots in _with_others(stream, survey):
            masks, rows = masks.to(reader.device), slots.flatten().to(reader.device)
            for name, maps in reader.maps(images).items():
                if name not in sums:
                    cells = groups * (concepts + 1)
                    integers = torch.zeros(cells, maps.shape[1], dtype=torch.int64, device=maps.device)
                    sums[name] = (integers, *torch.zeros(2, cells, dtype=torch.float64, device=maps.device))
                found = _overlaps(maps, thresholds[name].to(maps.device), masks, survey.size)
                found = found.transpose(1, 2).flatten(0, 1)  # (N M, K)
                hits, highest, total = sums[name]
                hits.index_add_(0, rows, (found > iou).long())
                highest.scatter_reduce_(0, rows, found.amax(1), "amax")
                total.index_add_(0, rows, found.amax(1))
    # the last slot of each group was for no mask
    return {
        name: Tally(*(each.reshape(groups, concepts + 1, *each.shape[1:])[:, :-1] for each in parts))
        for name, parts in sums.items()
    }


def _overlaps(maps: Tensor, thresholds: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """``(N, K, M)`` float64, some filters at a time; a mask without a pixel gives 0."""
    some = max(1, CELLS // (len(maps) * size[0] * size[1]))
    found = [
        field_iou(receptive_fields(maps[:, start : start + some], thresholds[start : start + some], size), masks)
        for start in range(0, maps.shape[1], some)
    ]
    return torch.cat(found, 1).nan_to_num(0.0)


def _with_others(stream: Iterable[ConceptBatch], survey: Survey) -> Iterator[ConceptBatch]:
    """Each image with its own masks and, in groups of slots behind, with those of images 1, 2, ... places before it.

    The first images come once more at the end, to meet the masks of the last.
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
    """Masks of ``draws`` images before and of these, cut into own ones and those d places before."""
    starts = [draws - shift for shift in range(draws + 1)]
    own = [masks[start : start + len(images)] for start in starts]
    groups = [slots[start : start + len(images)] + d * (nothing + 1) for d, start in enumerate(starts)]
    return ConceptBatch(images, torch.cat(own, 1), torch.cat(groups, 1))


def check_thresholds(thresholds: Thresholds, layers: Sequence[str]) -> None:
    """Refuse thresholds that lack a layer."""
    if missing := [name for name in layers if name not in thresholds]:
        raise OptionError(
            f"thresholds have no layer {missing[0]!r}; pass activation_thresholds(model, loader, layers) of these"
        )


def _unpacked(raw: Any, index: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images, and for each its masks that have a pixel."""
    if not isinstance(raw, list | tuple) or len(raw) < 2 or not isinstance(raw[0], Tensor):
        raise ShapeError(
            f"batch {index} is {type(raw).__name__}; expected (images, masks): a tensor (N, c, H, W) and a list of one "
            "{concept: (H, W) mask} for each image, or {concept: (N, H, W) masks}; collate_fn=collate_concepts makes "
            "such of samples (image, {concept: mask})"
        )
    images, given = raw[0], raw[1]
    check_images(images, None, index)
    if isinstance(given, Mapping):
        given = {name: masks for name, masks in given.items() if masks is not None}
        for name, masks in given.items():
            if len(masks) != len(images):
                raise ShapeError(
                    f"the masks of {name!r} in batch {index} are {len(masks)}, for {len(images)} images; stack one for "
                    "each, without a pixel where the image does not have the concept"
                )
        given = [{name: masks[n] for name, masks in given.items()} for n in range(len(images))]
    if not isinstance(given, list | tuple) or not all(isinstance(each, Mapping) for each in given):
        raise ShapeError(
            f"the masks of batch {index} must be a list of one {{concept: mask}} for each image, or "
            f"{{concept: (N, H, W)}}, got {type(given).__name__}"
        )
    if len(given) != len(images):
        raise ShapeError(f"batch {index} has {len(images)} images and masks of {len(given)}; give {{}} for one without")
    size = tuple(images.shape[2:])
    found: list[dict[str, Tensor]] = [{} for _ in given]
    for each, masks in zip(found, given, strict=True):
        for name, value in masks.items():
            if value is not None and bool((mask := _mask(value, name, size, index)).any()):
                each[name] = mask
    return images, found


def _mask(given: Any, name: Any, size: tuple[int, ...], index: int) -> Tensor:
    mask = torch.as_tensor(given)
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
