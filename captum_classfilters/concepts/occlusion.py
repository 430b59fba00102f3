"""What a network misses when a region is covered: the filters that switch off, and where they looked together.

Needs a `PathDecoupler`, whose filters are open or closed for each image. `concept_representation` does it for every
concept that a loader brings; `scores.py` has that loader's contract. N images, L layers with K_l filters.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from captum_classfilters.concepts.fields import (
    CELLS,
    Layers,
    MapReader,
    Thresholds,
    check_thresholds,
    field_iou,
    receptive_fields,
    thresholds_of,
)
from captum_classfilters.concepts.scores import concept_batches, surveyed, tallied
from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.intervals import draws_interval
from captum_classfilters.decoupling import PathDecoupler


@dataclass(frozen=True, eq=False)
class Occlusion:
    """Which filters were open on images and closed where a region of these was covered.

    Attributes:
        layers: Names of the gated convolutions looked at.
        masks: ``(N, H, W)`` bool, the regions.
        before: For each layer ``(N, K_l)`` bool: open on the image.
        after: The same with the region covered.
        elsewhere: ``(draws, N, L)`` int64: how many switch off when an equal region elsewhere is covered.
        maps: For each layer ``(N, K_l, h, w)``, of the uncovered images.
        thresholds: For each layer ``(K_l,)``.
        merged_iou: ``(N, L)`` float64: IoU of the region and the merged receptive field; 0 where none switches off.
        random_iou: ``(draws, N, L)`` float64: the same for as many random filters that were open.
    """

    layers: tuple[str, ...]
    masks: Tensor
    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    elsewhere: Tensor
    maps: tuple[Tensor, ...]
    thresholds: tuple[Tensor, ...]
    merged_iou: Tensor
    random_iou: Tensor

    @property
    def switched_off(self) -> tuple[Tensor, ...]:
        """For each layer ``(N, K_l)`` bool: open before and closed after."""
        return tuple(before & ~after for before, after in zip(self.before, self.after, strict=True))

    def merged(self, layers: Sequence[str] | None = None) -> Tensor:
        """Union of the receptive fields of the filters that switch off, ``(N, H, W)`` bool.

        Args:
            layers: Some of `layers`; None: all.

        Raises:
            OptionError: There is no such layer.
        """
        fields = torch.zeros_like(self.masks)
        for index in self._indices(layers):
            fields |= _merged(self.maps[index], self.thresholds[index], self.switched_off[index], self._size)
        return fields

    def table(self, layers: Sequence[str] | None = None) -> pd.DataFrame:
        """One row for each filter that switched off: ``image``, ``layer``, ``filter``, ``iou``; best first by image.

        ``iou``: of the filter's receptive field on the uncovered image and the region.
        """
        rows: list[tuple[int, str, int, float]] = []
        for index in self._indices(layers):
            chosen = self.switched_off[index]
            for images, filters, fields in _picked(self.maps[index], self.thresholds[index], chosen, self._size):
                iou = field_iou(fields[:, None], self.masks[images][:, None]).flatten()
                names = [self.layers[index]] * len(iou)
                rows += zip(images.tolist(), names, filters.tolist(), iou.tolist(), strict=True)
        frame = pd.DataFrame(rows, columns=["image", "layer", "filter", "iou"])
        return frame.sort_values(["image", "iou"], ascending=[True, False], kind="stable", ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """Two rows for each image and layer: what the covered region did, and behind these rows what its controls did.

        Returns:
            ``image``, ``layer``, ``control``; ``open``: filters that are open on the image; ``switched_off``: how many
            of them close; ``iou``: of the region and the merged receptive field of those. Where ``control`` is True,
            ``switched_off`` is that of an equal region elsewhere, mean over draws, with ``low`` and ``high``
            (Student-t; NaN in the other rows, which count), and ``iou`` is that of as many random open filters, mean
            over draws.
        """
        opened, off = (torch.stack([part.sum(1) for part in parts], 1) for parts in (self.before, self.switched_off))
        mean, low, high = draws_interval(self.elsewhere.cpu().double())
        images, layers = len(self.masks), len(self.layers)
        nan = np.full((images, layers), np.nan)
        rows = {
            False: {"switched_off": off, "low": nan, "high": nan, "iou": self.merged_iou},
            True: {"switched_off": mean, "low": low, "high": high, "iou": self.random_iou.mean(0)},
        }
        frames = []
        for control, columns in rows.items():
            place = {"image": np.repeat(np.arange(images), layers), "layer": self.layers * images, "control": control}
            values = {name: torch.as_tensor(part).cpu().ravel() for name, part in ({"open": opened} | columns).items()}
            frames.append(pd.DataFrame(place | {name: np.asarray(part) for name, part in values.items()}))
        return pd.concat(frames, ignore_index=True)

    @property
    def _size(self) -> tuple[int, int]:
        return self.masks.shape[1], self.masks.shape[2]

    def _indices(self, layers: Sequence[str] | None) -> list[int]:
        asked = self.layers if layers is None else [layers] if isinstance(layers, str) else layers
        if unknown := [name for name in asked if name not in self.layers]:
            raise OptionError(f"there is no layer {unknown[0]!r} in this result; there are {', '.join(self.layers)}")
        return [self.layers.index(name) for name in asked]


def occlude(images: Tensor, masks: Tensor, value: str | float | Sequence[float] = "mean") -> Tensor:
    """Images with a region covered.

    Source: "Interpretable neural network decoupling", section 4.2, which covers with black blocks. Differs: by default
    with the mean colour of what is not covered, which is less of an object than a black block.

    Args:
        images: ``(N, c, H, W)`` floating.
        masks: ``(N, H, W)`` bool, True is covered.
        value: ``"mean"``: of each image's uncovered pixels, by colour (of all, where all are covered); ``"black"``: 0,
            for images in [0, 1]; a number, or one for each colour.

    Returns:
        A new tensor like ``images``.

    Raises:
        ShapeError: Images or masks are not as above.
        OptionError: Another ``value``; ``"black"`` and a pixel is negative.

    Example:
        >>> occlude(torch.tensor([[[[1.0, 2.0, 6.0]]]]), torch.tensor([[[False, False, True]]])).tolist()
        [[[[1.0, 2.0, 1.5]]]]
    """
    _check(images, masks)
    masks = masks.to(images.device)[:, None]
    return torch.where(masks, _cover(images, masks, value).to(images), images)


def _check(images: Tensor, masks: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ShapeError(
            f"images must be (N, c, H, W) floating, got {images.dtype} of shape {tuple(images.shape)}; pass what "
            "the model takes"
        )
    if masks.dtype != torch.bool or masks.shape != (len(images), *images.shape[2:]):
        expected = (len(images), *images.shape[2:])
        raise ShapeError(
            f"masks must be bool of shape {expected}, one for each image in its size, got {masks.dtype} of shape "
            f"{tuple(masks.shape)}; resize and crop them with the images"
        )


def _cover(images: Tensor, masks: Tensor, value: Any) -> Tensor:
    if isinstance(value, str) and value == "mean":
        used = ~masks | masks.all(3, keepdim=True).all(2, keepdim=True)
        count = used.sum((2, 3), keepdim=True)
        return torch.where(used, images, 0).sum((2, 3), keepdim=True, dtype=torch.float64) / count
    if isinstance(value, str) and value == "black":
        if bool((images < 0).any()):
            raise OptionError(
                "black is 0 only for images in [0, 1], but pixels are negative (normalised images); pass value= with "
                "-mean / std of each colour"
            )
        return images.new_zeros(())
    try:
        cover = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        cover = torch.zeros(0)
    if cover.shape not in ((), images.shape[1:2]):
        raise OptionError(
            f'value must be "mean", "black", a number, or one for each of {images.shape[1]} colours, got {value!r}'
        )
    return cover.reshape(-1, 1, 1)


def elsewhere(masks: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each region moved to a random place, round the edges, where it overlaps with itself as little as can be.

    Args:
        masks: ``(N, H, W)`` bool.
        generator: A generator on the CPU; None: torch's own.

    Returns:
        Regions of the same shape and size, ``(N, H, W)`` bool.

    Example:
        >>> elsewhere(torch.tensor([[[True, False]]])).tolist()
        [[[False, True]]]
    """
    count, height, width = masks.shape
    spectrum = torch.fft.rfft2(masks.double())
    # how many pixels a mask shares with itself, by shift
    shared = torch.fft.irfft2(spectrum.abs() ** 2, s=(height, width)).round().flatten(1)
    keys = torch.rand(count, height * width, generator=generator).to(masks.device)
    chosen = torch.where(shared == shared.amin(1, keepdim=True), keys, -1.0).argmax(1)
    down, right = (chosen // width)[:, None], (chosen % width)[:, None]
    rows = (torch.arange(height, device=masks.device) - down) % height
    columns = (torch.arange(width, device=masks.device) - right) % width
    return masks[torch.arange(count, device=masks.device)[:, None, None], rows[:, :, None], columns[:, None]]


def occlusion(
    decoupler: PathDecoupler,
    images: Tensor,
    masks: Tensor,
    layers: Layers = None,
    *,
    value: str | float | Sequence[float] = "mean",
    thresholds: Thresholds | float = 0.005,
    control: Control = Control(),
) -> Occlusion:
    """Cover a region of each image: which filters switch off, and where did they look?

    Source: "Interpretable neural network decoupling", section 4.2, semantic concept analysis and fig. 6. Differs: two
    controls, a region of the same shape elsewhere and as many random open filters.

    Args:
        decoupler: A `PathDecoupler`; borrowed.
        images: ``(N, c, H, W)`` floating.
        masks: ``(N, H, W)`` bool: the regions, none without a pixel.
        layers: Gated convolutions, names or modules; None: all.
        value: What covers; see `occlude`.
        thresholds: From `activation_thresholds` of many images, or its ``quantile``, and it is taken from these images.
        control: Draws of each control, and their seed.

    Raises:
        OptionError: ``decoupler`` is none, a region has no pixel, or an argument is out of range.
        LayerError: A layer is not gated.
        ShapeError, NonFiniteError: Images, masks or maps are not as expected.
    """
    _check(images, masks)
    thresholds = thresholds_of(thresholds, _decoupler(decoupler), [images], layers, len(images), False)
    return cover_and_compare(decoupler, images, masks, layers, value, thresholds, control.draws, control.generator())


def cover_and_compare(
    decoupler: Any, images: Tensor, masks: Tensor, layers: Layers, value: Any, thresholds: Thresholds, draws: int,
    generator: torch.Generator,
) -> Occlusion:  # fmt: skip
    """`occlusion` with thresholds and a generator, for a loader's batches."""
    covered = occlude(images, masks, value)
    if not bool(masks.flatten(1).any(1).all()):
        raise OptionError("a mask has no pixel: expected a region in each image; leave images without the concept out")
    with borrowed(_decoupler(decoupler)) as borrow:
        reader = MapReader(decoupler, layers, borrow)
        check_thresholds(thresholds, reader.layers)
        maps, gates = reader.read(images)
        before = {name: gate > 0 for name, gate in gates.items()}

        def still_open(covered: Tensor) -> dict[str, Tensor]:
            return {name: gate > 0 for name, gate in reader.gates(covered).items()}

        after = still_open(covered)
        others = [still_open(occlude(images, elsewhere(masks, generator), value)) for _ in range(draws)]
    cuts = {name: thresholds[name].to(reader.device) for name in reader.layers}
    regions, size = masks.to(reader.device), (masks.shape[1], masks.shape[2])

    def iou(name: str, chosen: Tensor) -> Tensor:
        fields = _merged(maps[name], cuts[name], chosen, size)
        return field_iou(fields[:, None], regions[:, None]).flatten()

    off = {name: before[name] & ~after[name] for name in reader.layers}
    random = [
        torch.stack([iou(name, _random_open(before[name], off[name].sum(1), generator)) for name in reader.layers], 1)
        for _ in range(draws)
    ]
    counts = [torch.stack([(before[name] & ~other[name]).sum(1) for name in reader.layers], 1) for other in others]
    return Occlusion(
        layers=reader.layers,
        masks=regions,
        before=tuple(before.values()),
        after=tuple(after.values()),
        elsewhere=torch.stack(counts),
        maps=tuple(maps.values()),
        thresholds=tuple(cuts.values()),
        merged_iou=torch.stack([iou(name, off[name]) for name in reader.layers], 1),
        random_iou=torch.stack(random),
    )


def concept_representation(
    model: Any,
    loader: Iterable[Any],
    layers: Layers = None,
    *,
    thresholds: Thresholds | float = 0.005,
    value: str | float | Sequence[float] = "mean",
    control: Control = Control(),
    show_progress: bool = False,
) -> pd.DataFrame:
    """How well one filter, and how well those that switch off together, outline each concept.

    Source: "Interpretable neural network decoupling", section 4.2 and fig. 5. Single filter: max over images and
    filters of the IoU. Multiple: the concept is covered, and the fields of the filters that switch off are merged; mean
    over images of the IoU. Differs: a maximum over images and a mean over them do not compare, so both are given for
    both. There are controls, without which many filters merged would look good for their number.

    Args:
        model: A `PathDecoupler`, or a plain network, then of single filters only; borrowed.
        loader: As for `concept_scores`; read up to four times.
        layers: As for `activation_thresholds`.
        thresholds: From `activation_thresholds`, or its ``quantile``, and it is taken from this loader.
        value: What covers; see `occlude`.
        control: Draws of each control; the seed is that of the controls of several filters.
        show_progress: Show a tqdm bar.

    Returns:
        Two rows for each layer and concept, all those with ``control`` True behind the others: ``layer``, ``concept``,
        ``control``, ``images`` that have it; ``single_max`` (the paper's), ``single_mean`` (over images, of the best
        filter on each). Of a decoupler also ``multiple_max``, ``multiple_mean`` (the paper's) with ``low`` and ``high``
        (normal, over images); ``switched_off``, mean count of filters; ``none``, share of images on which none switches
        off and the IoU is 0. A control row has in the columns of single filters what other images' masks give, as in
        `concept_scores`; in ``multiple_mean``, ``low`` and ``high`` what as many random open filters give; in
        ``switched_off`` what covering an equal region elsewhere gives. All are means over draws; ``multiple_max`` and
        ``none`` have no control and are NaN there.

    Raises:
        OptionError, LayerError, ShapeError, EmptyLoaderError, NonFiniteError: As for `concept_scores`.
    """
    survey = surveyed(loader, control)
    thresholds = thresholds_of(thresholds, model, loader, layers, survey.samples, show_progress)
    tallies = tallied(model, loader, layers, survey, thresholds, 0.0, show_progress)
    names, counts = list(survey.counts), np.array(list(survey.counts.values()))
    frames: dict[bool, list[pd.DataFrame]] = {False: [], True: []}
    for layer, tally in tallies.items():
        highest, mean = tally.highest.cpu().numpy(), tally.total.cpu().numpy() / counts
        for side, rows in frames.items():
            draws = slice(1, None) if side else slice(0, 1)
            columns = {"single_max": highest[draws].mean(0), "single_mean": mean[draws].mean(0)}
            rows.append(pd.DataFrame({"layer": layer, "concept": names, "control": side, "images": counts, **columns}))
    single = pd.concat([*frames[False], *frames[True]], ignore_index=True)
    if not isinstance(unwrap(model), PathDecoupler):
        return single
    generator = control.generator()
    parts = []
    for batch in concept_batches(loader, survey, show_progress, "occlusion"):
        images, places = (batch.slots < len(names)).nonzero(as_tuple=True)
        # an image can have several masks: as many at a time as the batch has images
        for start in range(0, len(images), len(batch.images)):
            image, place = (index[start : start + len(batch.images)] for index in (images, places))
            covered = batch.images[image], batch.masks[image, place]
            result = cover_and_compare(model, *covered, layers, value, thresholds, control.draws, generator).summary()
            slots = batch.slots[image, place].numpy()
            parts.append(result.assign(concept=np.array(names)[slots[result.image]]))
    keys = ["layer", "concept", "control"]
    return single.merge(_of_concepts(pd.concat(parts), keys), on=keys, validate="one_to_one")


def _of_concepts(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Means over images of `Occlusion.summary`, for each concept."""
    rows = rows.assign(none=(rows.switched_off == 0).astype(float))
    groups = rows.groupby(keys)
    mean = groups.iou.mean()
    half: Any = 1.96 * groups.iou.std() / np.sqrt(groups.iou.count())
    columns = {"multiple_max": groups.iou.max(), "multiple_mean": mean, "low": mean - half, "high": mean + half}
    columns |= {"switched_off": groups.switched_off.mean(), "none": groups.none.mean()}
    frame = pd.DataFrame(columns).reset_index()
    frame.loc[frame.control, ["multiple_max", "none"]] = np.nan
    return frame


def _decoupler(model: Any) -> PathDecoupler:
    inner = unwrap(model)
    if not isinstance(inner, PathDecoupler):
        raise OptionError(f"expected a PathDecoupler, got {type(model).__name__}; only its filters switch off")
    return inner


def _picked(
    maps: Tensor, thresholds: Tensor, chosen: Tensor, size: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``(images, filters, fields)`` of those chosen, fields ``(M, H, W)``, some at a time."""
    images, filters = chosen.nonzero(as_tuple=True)
    some = max(1, CELLS // (size[0] * size[1]))
    for start in range(0, len(images), some):
        image, channel = images[start : start + some], filters[start : start + some]
        yield image, channel, receptive_fields(maps[image, channel][None], thresholds[channel], size)[0]


def _merged(maps: Tensor, thresholds: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
    """Union of the fields of those chosen, ``(N, H, W)`` bool."""
    counts = torch.zeros(len(maps), *size, dtype=torch.int32, device=maps.device)
    for images, _, fields in _picked(maps, thresholds, chosen, size):
        counts.index_add_(0, images, fields.int())
    return counts > 0


def _random_open(opened: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """As many as ``counts`` ``(N,)`` of the open filters of each image, ``(N, K)`` bool."""
    keys = torch.where(opened, torch.rand(opened.shape, generator=generator).to(opened.device), -1.0)
    return keys.argsort(1, descending=True).argsort(1) < counts[:, None]
