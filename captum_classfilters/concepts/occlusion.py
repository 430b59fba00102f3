"""What does a network miss when a region is covered? The filters that switch off, and where they looked together.

This needs a `PathDecoupler`, whose filters are open or closed for each image. `concept_representation` does it for
every concept of a loader; `scores.py` describes that loader. N images, L layers with K_l filters.
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
from captum_classfilters.core.wide import home, wide
from captum_classfilters.decoupling import PathDecoupler


@dataclass(frozen=True, eq=False)
class Occlusion:
    """Which filters were open on images, and closed after a region of each image was covered.

    Attributes:
        layers: Names of the gated convolutions.
        masks: ``(N, H, W)`` bool, the regions.
        before: For each layer ``(N, K_l)`` bool: open on the image.
        after: The same with the region covered.
        elsewhere: ``(draws, N, L)`` int64: how many switch off when a region of the same shape elsewhere is covered.
        maps: For each layer ``(N, K_l, h, w)``, of the uncovered images.
        thresholds: For each layer ``(K_l,)``.
        merged_iou: ``(N, L)`` float64: IoU of the region and the merged receptive field; 0 where none switches off.
        random_iou: ``(draws, N, L)`` float64: the same for equally many random open filters.
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

        ``iou`` compares the filter's receptive field on the uncovered image with the region.
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
        """Two rows for each image and layer: first the effects of the covered region, then those of the controls.

        Returns:
            ``image``, ``layer``, ``control``; ``open``: number of open filters; ``switched_off``: how many of them
            close; ``iou`` of the region and their merged receptive field. Where ``control`` is True, values are means
            over draws: ``switched_off`` for a region of the same shape elsewhere, with its Student-t interval ``low``,
            ``high`` (NaN in the other rows), and ``iou`` for equally many random open filters.
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
        names = self.layers if layers is None else [layers] if isinstance(layers, str) else layers
        if unknown := [name for name in names if name not in self.layers]:
            raise OptionError(f"there is no layer {unknown[0]!r} in this result; there are {', '.join(self.layers)}")
        return [self.layers.index(name) for name in names]


def occlude(images: Tensor, masks: Tensor, value: str | float | Sequence[float] = "mean") -> Tensor:
    """Images with a region covered.

    Source: "Interpretable neural network decoupling", section 4.2, which covers with black blocks. Differs: the default
    is the mean colour of the rest, because a black block looks more like an object.

    Args:
        images: ``(N, c, H, W)`` floating.
        masks: ``(N, H, W)`` bool; True is covered.
        value: ``"mean"``: mean colour of each image's uncovered pixels (of all pixels if all are covered);
            ``"black"``: 0, for images in [0, 1]; a number, or one for each colour.

    Returns:
        A new tensor like ``images``.

    Raises:
        ShapeError: Images or masks do not have these shapes.
        OptionError: ``value`` is unknown, or it is ``"black"`` and a pixel is negative.

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
        return wide(torch.where(used, images, 0)).sum((2, 3), keepdim=True) / wide(count)
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
    """Move each region to a random place of least overlap with itself; what leaves the image enters on the other side.

    Args:
        masks: ``(N, H, W)`` bool.
        generator: A generator on the CPU; None: torch's own.

    Returns:
        Regions of the same shape and size, ``(N, H, W)`` bool.

    Example:
        >>> elsewhere(torch.tensor([[[True, False]]])).tolist()
        [[[False, True]]]
    """
    device, masks = masks.device, masks.to(home(masks.device))
    count, height, width = masks.shape
    spectrum = torch.fft.rfft2(masks.double())
    # how many pixels a mask shares with itself, for each shift
    shared = torch.fft.irfft2(spectrum.abs() ** 2, s=(height, width)).round().flatten(1)
    keys = torch.rand(count, height * width, generator=generator).to(masks.device)
    chosen = torch.where(shared == shared.amin(1, keepdim=True), keys, -1.0).argmax(1)
    down, right = (chosen // width)[:, None], (chosen % width)[:, None]
    rows = (torch.arange(height, device=masks.device) - down) % height
    columns = (torch.arange(width, device=masks.device) - right) % width
    moved = masks[torch.arange(count, device=masks.device)[:, None, None], rows[:, :, None], columns[:, None]]
    return moved.to(device)


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
    """Cover a region of each image, and report which filters switch off and where they looked.

    Source: "Interpretable neural network decoupling", section 4.2, semantic concept analysis and fig. 6. Differs: two
    controls, a region of the same shape elsewhere and equally many random open filters.

    Args:
        decoupler: A `PathDecoupler`; borrowed.
        images: ``(N, c, H, W)`` floating.
        masks: ``(N, H, W)`` bool: the regions; each has a pixel.
        layers: Gated convolutions, names or modules; None: all.
        value: What covers the region; see `occlude`.
        thresholds: From `activation_thresholds` of many images, or its ``quantile``; then they are computed from these
            images.
        control: Draws of each control, and their seed.

    Raises:
        OptionError: ``decoupler`` is no `PathDecoupler`, a region has no pixel, or an argument is out of range.
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
    """`occlusion` with thresholds and a generator, for one batch of a loader."""
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
    """How well one filter outlines each concept, and how well the filters do that switch off together.

    Source: "Interpretable neural network decoupling", section 4.2 and fig. 5. Single filters: the maximum IoU over
    images and filters. Multiple filters: the concept is covered, the fields of the filters that switch off are merged,
    and the IoU is averaged over images. Differs: a maximum and a mean over images cannot be compared, so both are given
    for both. There are controls, because merged fields of many filters have a high IoU by chance.

    Args:
        model: A `PathDecoupler`; or a plain network, which gives the columns of single filters only; borrowed.
        loader: As for `concept_scores`; read up to four times.
        layers: As for `activation_thresholds`.
        thresholds: From `activation_thresholds`, or its ``quantile``; then they are computed from this loader.
        value: What covers the concept; see `occlude`.
        control: Draws of each control; the seed counts only for the controls of multiple filters.
        show_progress: Show a tqdm bar.

    Returns:
        Two rows for each layer and concept, those with ``control`` True last: ``layer``, ``concept``, ``control``,
        ``images`` (how many have it); ``single_max`` (the paper's), ``single_mean`` (of the best filter on each image).
        For a decoupler also ``multiple_max``, ``multiple_mean`` (the paper's) with ``low`` and ``high`` (normal, over
        images); ``switched_off``, mean number of filters; ``none``, share of images on which no filter switches off and
        the IoU is 0. Control rows hold means over draws: in the columns of single filters with other images' masks, as
        in `concept_scores`; in ``multiple_mean``, ``low`` and ``high`` with equally many random open filters; in
        ``switched_off`` with a region of the same shape elsewhere. ``multiple_max`` and ``none`` are NaN there.

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
        # an image can have several masks; each step covers as many as the batch has images
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
    """``(images, filters, fields)`` of the chosen filters, in parts; fields are ``(M, H, W)``."""
    images, filters = chosen.nonzero(as_tuple=True)
    some = max(1, CELLS // (size[0] * size[1]))
    for start in range(0, len(images), some):
        image, channel = images[start : start + some], filters[start : start + some]
        yield image, channel, receptive_fields(maps[image, channel][None], thresholds[channel], size)[0]


def _merged(maps: Tensor, thresholds: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
    """Union of the fields of the chosen filters, ``(N, H, W)`` bool."""
    counts = torch.zeros(len(maps), *size, dtype=torch.int32, device=maps.device)
    for images, _, fields in _picked(maps, thresholds, chosen, size):
        counts.index_add_(0, images, fields.int())
    return counts > 0


def _random_open(opened: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Random open filters of each image, ``(N, K)`` bool; ``counts`` ``(N,)`` says how many."""
    keys = torch.where(opened, torch.rand(opened.shape, generator=generator).to(opened.device), -1.0)
    return keys.argsort(1, descending=True).argsort(1) < counts[:, None]
