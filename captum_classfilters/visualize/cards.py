"""The images behind a channel: `filter_cards`, with photographs, curves of signals and slices of volumes.

N images, K channels, C classes, H x W pixels, h x w positions of the feature map.
"""

from collections.abc import Iterable, Sequence
from numbers import Real
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from captum.attr import LayerAttribution
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from captum_classfilters.class_filters import ClassFilters, check_k, check_table, one_table
from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head_pass import Batch, HeadPass
from captum_classfilters.visualize.images import DIVERGING, as_photograph, blend
from captum_classfilters.visualize.kit import Panels, shortened

# Where a map is 0 the photograph stays as it is, instead of being whitened
_POSITIVE = LinearSegmentedColormap.from_list("activation", [(0.9, 0.35, 0.0, 0.0), (0.9, 0.35, 0.0, 1.0)])
_SHORT = 14  # characters of a name beside which the activation has room
# How a map is enlarged, by how many axes its positions have
_ENLARGED = {1: "linear", 2: "bilinear", 3: "trilinear"}


def filter_cards(
    model: Any,
    filters: ClassFilters,
    class_name: str | int,
    loader: Iterable[Any] | None = None,
    *,
    k: int = 3,
    images: int = 4,
    image_range: tuple[float, float] | None = None,
    ax: Panels | None = None,
) -> Panels:
    """For each of a class's k strongest channels, draw the images of a loader that activate it most.

    One row for each channel, strongest first, named by its score and its weight in the head for the class. The images
    may be of any class: a title says the true class, bold where it is this one, and the activation, the channel's value
    at the head's input. Over the picture, in grey, lies the channel's activation map: orange, and blue below zero, each
    map up to its own maximum. Where the head reads no positions the pictures are without a map, and the title says why.
    Signals are drawn as curves, of volumes the middle slice.

    Args:
        model: The network; borrowed. Or a `HeadPass`; then ``loader`` is left out. Its ``layer``,
            ``additional_forward_args`` and ``show_progress`` are used. Not a cached one, which has no images.
        filters: The table of this model, ``(C, K)``.
        class_name: The class by name or index.
        loader: Any iterable of batches ``(images, labels)``: images ``(N, colours, H, W)``, signals ``(N, c, L)`` or
            volumes ``(N, c, D, H, W)``. It is read once, and at most ``k * images`` of them are kept. Without labels,
            titles say the activation only.
        k: How many channels.
        images: How many images for each.
        image_range: The numbers that are black and white. None: 0 and 255 for integers, 0 and 1 where all pixels lie
            there, otherwise the smallest and largest pixel drawn.
        ax: Where to draw: an array of axes, shape ``(k, images)``.

    Returns:
        The axes, shape ``(k, images)``; those for which the loader has no image are empty.

    Raises:
        OptionError: The class is unknown or has no samples; or k, images, ``image_range`` or ``ax`` is out of range.
        ShapeError: The table is another network's or another layer's, or the inputs are no images.
        HeadError: There is no head.
        EmptyLoaderError: The loader gave no sample.

    Warns:
        NoPositionsWarning: The maps have a single position.

    Example:
        >>> import matplotlib, torch; matplotlib.use("agg")
        >>> from torch import nn
        >>> conv, head = nn.Conv2d(1, 3, 3), nn.Linear(3, 2)
        >>> model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        >>> votes = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 4.0]])
        >>> table = ClassFilters(votes, votes, torch.tensor([4, 4]), "histogram", "4", ("cat", "dog"))
        >>> loader = [(torch.rand(8, 1, 6, 6), torch.arange(8) % 2)]
        >>> filter_cards(model, table, "dog", loader, k=2, images=3).shape
        (2, 3)
    """
    row = _checked_class(filters, class_name)
    k = check_k(k, filters.num_channels, "k")
    images = integer(images, "images", 1)
    _check_cards(image_range, ax, (k, images))
    head_pass = HeadPass.of(model, loader)
    gallery = _Gallery(filters.top(k)[row].tolist(), images)
    weights: list[float] = []
    why = ""
    with head_pass.batches(need_labels=False, need_maps=None, description="filter_cards") as stream:
        for batch in stream:
            if not weights:
                check_table(filters, batch.head)
                weights = batch.head.weight[row, gallery.channels].tolist()
                why = f"no maps: {batch.head.no_map}" if batch.maps is None else ""
            gallery.add(batch)

    cards = [card for line in gallery.cards for card in line]
    depth = cards[0].image.shape[1] if cards[0].image.dim() == 4 else 0
    notes = [f"slice {depth // 2 + 1} of {depth}" if depth else "", why]
    axes = _new_axes(filters, row, gallery.shape, "; ".join(filter(None, notes))) if ax is None else ax
    low, high = _range(cards) if image_range is None else image_range
    signed = any(card.map is not None and bool((card.map < 0).any()) for card in cards)
    for line, drawn, channel, weight in zip(axes, gallery.cards, gallery.channels, weights, strict=True):
        for place, axis in enumerate(line):
            if place < len(drawn):
                _draw_card(axis, drawn[place], low, high, signed)
                _title(axis, drawn[place], filters, row)
            else:
                axis.axis("off")
        line[0].set_ylabel(_about(filters, row, channel, weight), rotation=0, ha="right", va="center", fontsize="small")
    if ax is not None and why:
        axes[-1, 0].set_xlabel(fill(why, 40), fontsize="x-small", loc="left")
    return axes


# -- filter_cards: what is collected -----------------------------------------------------------------------------------


class Card(NamedTuple):
    """An image that activates a channel."""

    activation: float  # the head's input: the map, pooled
    image: Tensor  # (colours, H, W), of a signal (c, L), of a volume (c, D, H, W); on the CPU
    map: Tensor | None  # (*positions), float32, on the CPU; None where the head reads no positions
    label: int | None  # true class


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
    image, activations = pixels[index].detach().to("cpu", copy=True), None
    if batch.maps is not None:
        activations = batch.maps[index, channel].detach().float().to("cpu", copy=True)
    return Card(value, image, activations, label)


def _images(batch: Batch) -> Tensor:
    """The pictures of a batch with an axis for colours, which images of one colour may lack."""
    axes = None if batch.maps is None else batch.maps.dim()
    shapes = []
    for value in batch.inputs:
        if not isinstance(value, Tensor):
            continue
        shapes.append(tuple(value.shape))
        if value.dim() + 1 == axes:
            value = value.unsqueeze(1)
        if value.dim() == axes or (axes is None and value.dim() in (3, 4, 5)):
            return value
    raise ShapeError(
        "expected images (N, colours, H, W), signals (N, c, L) or volumes (N, c, D, H, W) among the inputs, got "
        f"{shapes}; there is nothing to draw"
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


def _checked_class(filters: ClassFilters, class_name: str | int) -> int:
    row = one_table(filters).index(class_name)
    if not bool(filters.seen[row]):
        raise OptionError(
            f"class {filters.class_names[row]!r} has no samples in the table, so no channels of its own; choose another"
        )
    return row


def _check_cards(image_range: Any, ax: Any, shape: tuple[int, int]) -> None:
    if image_range is not None:
        pair = isinstance(image_range, Sequence) and len(image_range) == 2
        if not pair or not all(isinstance(v, Real) for v in image_range) or not image_range[0] < image_range[1]:
            raise OptionError(
                f"image_range must be two numbers, black below white, such as (0, 1); got {image_range!r}"
            )
    if ax is not None and (getattr(ax, "shape", None) != shape or not all(isinstance(a, Axes) for a in ax.flat)):
        got = getattr(ax, "shape", type(ax).__name__)
        raise OptionError(
            f"ax must be an array of {shape[0]} x {shape[1]} axes, got {got}; "
            f"plt.subplots({shape[0]}, {shape[1]}, squeeze=False)[1] is one"
        )


# -- how it is drawn ---------------------------------------------------------------------------------------------------


def _new_axes(filters: ClassFilters, row: int, shape: tuple[int, int], note: str) -> Panels:
    rows, columns = shape
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.7 * columns + 1.6, 1.9 * rows + 0.6), layout="constrained", squeeze=False
    )
    name = shortened(filters.class_names[row])
    title = f"{name}: top {rows} of the {filters.method} table, and the images that activate them most"
    wide = int(figure.get_figwidth() * 72 / 6)
    figure.suptitle("\n".join([fill(title, wide), *([fill(note, wide)] if note else [])]), fontsize="medium")
    return axes


def _range(cards: list[Card]) -> tuple[float, float]:
    if not cards[0].image.is_floating_point():
        return 0.0, 255.0
    low, high = min(float(card.image.min()) for card in cards), max(float(card.image.max()) for card in cards)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _draw_card(ax: Axes, card: Card, low: float, high: float, signed: bool) -> None:
    image, heat = card.image, None
    if card.map is not None:
        size, mode = tuple(image.shape[1:]), _ENLARGED[image.dim() - 1]
        spread = LayerAttribution.interpolate(card.map.double()[None, None], size, mode)[0, 0]
        largest = float(spread.abs().max())
        # brought to 1 first, small activations do not look like none: Captum divides by a number close to the largest
        heat = (spread / largest).numpy() if largest > 0 else None
    if image.dim() == 4:
        middle = image.shape[1] // 2
        image, heat = image[:, middle], None if heat is None or not heat[middle].any() else heat[middle]
    cmap = DIVERGING if signed else _POSITIVE
    if image.dim() == 2:
        ax.plot(image.double().numpy().T, color="0.25", linewidth=0.8)
        ax.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(low, high))
        if heat is not None:
            extent = (-0.5, image.shape[1] - 0.5, low, high)
            ax.imshow(heat[None], cmap=cmap, vmin=-1 if signed else 0, vmax=1, aspect="auto", extent=extent, zorder=0)
    else:
        picture = as_photograph(((image.double() - low) / (high - low)).clamp(0, 1))
        if heat is not None:
            blend(ax, heat, picture, cmap, "all" if signed else "positive")
        elif card.map is None and picture.shape[2] == 3:
            ax.imshow(picture)
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
