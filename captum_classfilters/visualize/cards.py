"""The images behind a class's channels: what does each of them answer to, and where does it look?

One pass keeps the few images that activate each channel most (`_Gallery`); Captum's visualiser draws them.
N samples, K channels, C classes, H x W pixels, h x w positions of the feature map.
"""

from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from captum.attr import LayerAttribution, visualization
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn

from captum_classfilters.class_filters import ClassFilters, check_k
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head_pass import Batch, batches
from captum_classfilters.visualize.canvas import Floats, figure_of, shortened

# Where there is no activation the picture stays as it is, instead of being whitened by the map's zero
_POSITIVE = LinearSegmentedColormap.from_list("activation", [(0.9, 0.35, 0.0, 0.0), (0.9, 0.35, 0.0, 1.0)])
_SIGNED = LinearSegmentedColormap.from_list(
    "signed activation", [(0.0, 0.35, 0.9, 1.0), (1.0, 1.0, 1.0, 0.0), (0.9, 0.35, 0.0, 1.0)]
)


_SHORT = 14  # characters of a name beside which the activation has room


class Card(NamedTuple):
    """An image that activates a channel."""

    activation: float  # the head's input: the map, pooled
    image: Tensor  # (colours, H, W), on the CPU
    map: Tensor  # (h, w), float32, on the CPU
    label: int | None  # true class


def filter_cards(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any],
    class_name: str | int,
    *,
    k: int = 3,
    images: int = 4,
    image_range: tuple[float, float] | None = None,
    layer: nn.Module | str | None = None,
    forward_args: Any = None,
    show_progress: bool = False,
    ax: npt.NDArray[np.object_] | None = None,
) -> npt.NDArray[np.object_]:
    """For each of a class's k strongest channels, draw the images of a loader that activate it most.

    One row for each channel, strongest first, named by its score and its weight in the head for the class. The images
    may be of any class: a title says the true one, bold where it is this class, and the activation, the channel's value
    at the head's input. Over the picture, in grey, lies the channel's activation map: orange, and blue below zero, each
    map up to its own maximum.

    Args:
        model: An ``nn.Module``, or a function, then with ``layer``.
        filters: The table of this model, ``(C, K)``.
        loader: Any iterable of batches ``(images, labels)``, images ``(N, colours, H, W)``; read once, of which at most
            ``k * images`` images are kept. Without labels, titles say the activation only.
        class_name: The class by name or index.
        k: How many channels.
        images: How many images for each.
        image_range: The numbers that are black and white. None: 0 and 255 for integers, 0 and 1 where all pixels lie
            there, otherwise the smallest and largest pixel drawn.
        layer: The head, if it cannot be found.
        forward_args: Further arguments of the model's forward.
        show_progress: A tqdm bar.
        ax: Where to draw: an array of axes, shape ``(k, images)``.

    Returns:
        The axes, shape ``(k, images)``; those for which the loader has no image are empty.

    Raises:
        OptionError: Unknown class, a class without samples, k, images, ``image_range`` or ``ax`` not as they should be.
        ShapeError: The table is another network's, or the inputs are no images.
        HeadError: No head, or no feature map behind it.
        EmptyLoaderError, LabelError, NonFiniteError: As their messages say.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import torch
        >>> conv, head = nn.Conv2d(1, 3, 3), nn.Linear(3, 2)
        >>> model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        >>> votes = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 4.0]])
        >>> table = ClassFilters(votes, votes, torch.tensor([4, 4]), "histogram", "4", ("cat", "dog"))
        >>> loader = [(torch.rand(8, 1, 6, 6), torch.arange(8) % 2)]
        >>> filter_cards(model, table, loader, "dog", k=2, images=3).shape
        (2, 3)
    """
    row = _checked_class(filters, class_name, k)
    _check_options(images, image_range, ax, k)
    gallery = _Gallery(filters.top(k)[row].tolist(), images)
    weights: list[float] = []
    with batches(
        model, loader, layer=layer, need_labels=False, need_maps=True, forward_args=forward_args,
        show_progress=show_progress, description="filter_cards",
    ) as stream:  # fmt: skip
        for batch in stream:
            if not weights:
                _check_batch(filters, batch)
                weights = batch.head.weight[row, gallery.channels].tolist()
            gallery.add(batch)

    axes = _new_axes(filters, row, gallery.shape) if ax is None else ax
    cards = [card for line in gallery.cards for card in line]
    low, high = _range(cards) if image_range is None else image_range
    signed = any(bool((card.map < 0).any()) for card in cards)
    for line, drawn, channel, weight in zip(axes, gallery.cards, gallery.channels, weights, strict=True):
        for place, axis in enumerate(line):
            if place < len(drawn):
                _draw(axis, drawn[place], low, high, signed)
                _title(axis, drawn[place], filters, row)
            else:
                axis.axis("off")
        line[0].set_ylabel(_about(filters, row, channel, weight), rotation=0, ha="right", va="center", fontsize="small")
    return axes


class _Gallery:
    """The best images of each channel so far; not more are kept, however many pass by."""

    def __init__(self, channels: list[int], images: int) -> None:
        self.channels, self.shape = channels, (len(channels), images)
        self.cards: list[list[Card]] = [[] for _ in channels]

    def add(self, batch: Batch) -> None:
        count = self.shape[1]
        # stable: of equal activations the earlier image stays, however the loader is cut into batches
        values, order = batch.features[:, self.channels].float().sort(dim=0, descending=True, stable=True)
        values, order = values[:count].cpu(), order[:count].cpu()
        pixels = _images(batch)
        for place, channel in enumerate(self.channels):
            cards = self.cards[place]
            for value, index in zip(values[:, place].tolist(), order[:, place].tolist(), strict=True):
                if len(cards) < count or value > cards[-1].activation:
                    cards.append(_card(batch, pixels, value, index, channel))
                    cards.sort(key=lambda card: -card.activation)
                    del cards[count:]


def _card(batch: Batch, pixels: Tensor, value: float, index: int, channel: int) -> Card:
    label = None if batch.labels is None else int(batch.labels[index])
    # copies: a slice of a batch would keep all of it
    image, activations = pixels[index].detach().to("cpu", copy=True), batch.maps[index, channel]  # type: ignore[index]
    return Card(value, image, activations.detach().float().to("cpu", copy=True), label)


def _images(batch: Batch) -> Tensor:
    found = next((value for value in batch.inputs if isinstance(value, Tensor) and value.dim() == 4), None)
    if found is None:
        shapes = [tuple(value.shape) for value in batch.inputs if isinstance(value, Tensor)]
        raise ShapeError(f"expected images of shape (N, colours, H, W) among the inputs, got {shapes}; nothing to draw")
    return found


# -- what is refused ---------------------------------------------------------------------------------------------------


def _checked_class(filters: ClassFilters, class_name: str | int, k: int) -> int:
    if not isinstance(filters, ClassFilters):
        raise OptionError(f"filters must be a ClassFilters, got {type(filters).__name__}; of a dict of them, pass one")
    row = filters.index(class_name)
    check_k(k, filters.num_channels, "k")
    if not bool(filters.seen[row]):
        raise OptionError(
            f"class {filters.class_names[row]!r} has no samples in the table, so no channels of its own; choose another"
        )
    return row


def _check_options(images: Any, image_range: Any, ax: Any, k: int) -> None:
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise OptionError(f"images must be an integer of at least 1, got {images!r}")
    if image_range is not None:
        pair = isinstance(image_range, Sequence) and len(image_range) == 2
        if not pair or not all(isinstance(v, int | float) for v in image_range) or not image_range[0] < image_range[1]:
            raise OptionError(
                f"image_range must be two numbers, black below white, such as (0, 1); got {image_range!r}"
            )
    if ax is not None and (getattr(ax, "shape", None) != (k, images) or not all(isinstance(a, Axes) for a in ax.flat)):
        got = getattr(ax, "shape", type(ax).__name__)
        raise OptionError(
            f"ax must be an array of {k} x {images} axes, got {got}; "
            f"plt.subplots({k}, {images}, squeeze=False)[1] is one"
        )


def _check_batch(filters: ClassFilters, batch: Batch) -> None:
    head = batch.head
    if filters.scores.shape != head.weight.shape:
        raise ShapeError(
            f"the table is {filters.num_classes} classes x {filters.num_channels} channels of {filters.layer!r}, the "
            f"head {head.name!r} is {head.num_classes} x {head.num_features}; use the table made with this model"
        )


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def _new_axes(filters: ClassFilters, row: int, shape: tuple[int, int]) -> npt.NDArray[np.object_]:
    rows, columns = shape
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.7 * columns + 1.6, 1.9 * rows + 0.6), layout="constrained", squeeze=False
    )
    name = shortened(filters.class_names[row])
    title = f"{name}: top {rows} of the {filters.method} table, and the images that activate them most"
    figure.suptitle(fill(title, int(figure.get_figwidth() * 72 / 6)), fontsize="medium")
    return axes


def _range(cards: list[Card]) -> tuple[float, float]:
    if not cards[0].image.is_floating_point():
        return 0.0, 255.0
    low, high = min(float(card.image.min()) for card in cards), max(float(card.image.max()) for card in cards)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _draw(ax: Axes, card: Card, low: float, high: float, signed: bool) -> None:
    picture: Floats = ((card.image.double() - low) / (high - low)).clamp(0, 1).permute(1, 2, 0).numpy()
    size = (int(picture.shape[0]), int(picture.shape[1]))
    spread = LayerAttribution.interpolate(card.map[None, None], size, "bilinear")[0, 0].double().numpy()
    largest = float(np.abs(spread).max())
    if largest > 0:
        # Captum divides by a number close to the largest: brought to 1 first, small activations do not look like none
        visualization.visualize_image_attr(
            (spread / largest)[..., None], picture, method="blended_heat_map", sign="all" if signed else "positive",
            plt_fig_axis=(figure_of(ax), ax), use_pyplot=False, cmap=_SIGNED if signed else _POSITIVE,
            alpha_overlay=0.75,
        )  # fmt: skip
        # Captum stretches each picture from its own darkest to its own brightest pixel: a dark image would look bright
        ax.images[-2].set_clim(0, 255)
    else:
        # Captum's visualiser asserts that some attribution is not zero (its issues 481 and 959)
        ax.imshow(picture.mean(2) * 255, cmap="gray", vmin=0, vmax=255)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)


def _title(ax: Axes, card: Card, filters: ClassFilters, row: int) -> None:
    name = "" if card.label is None else shortened(filters.class_names[card.label])
    separator = "\n" if len(name) > _SHORT else "  "
    text = f"{name}{separator}{card.activation:#.3g}".strip()
    ax.set_title(text, fontsize="small", fontweight="bold" if card.label == row else "normal")


def _about(filters: ClassFilters, row: int, channel: int, weight: float) -> str:
    score = float(filters.scores[row, channel])
    if filters.merge_rule == "sum":
        return f"channel {channel}\nscore {score / int(filters.counts[row]):.3g} per sample\nweight {weight:+.2f}"
    return f"channel {channel}\nscore {score:.3g}\nweight {weight:+.2f}"
