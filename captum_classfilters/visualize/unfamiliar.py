"""Pictures of unfamiliar images: where the alarm comes from, and which channels raise it.

N images, K channels, h x w positions of the feature map.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from captum.attr import LayerAttribution
from matplotlib.axes import Axes
from torch import Tensor

from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.detection import Alarm
from captum_classfilters.visualize.images import DIVERGING, as_photograph, check_pixels
from captum_classfilters.visualize.kit import SMALL, Panels, hide_frame, shortened

_MORE, _LESS = "#E65900", "#0059E6"  # the ends of the colours of a map


def unfamiliar(
    images: Tensor,
    alarm: Alarm,
    titles: Sequence[str] | None = None,
    *,
    k: int = 5,
    ax: Panels | None = None,
) -> Panels:
    """Draw images with what makes them unfamiliar: the image, where, and the k channels that add most.

    Orange adds to the strangeness, blue takes away. Maps of all images have one scale, and so have the bars.

    Args:
        images: ``(N, c, H, W)`` in [0, 1], c 1 or 3, not normalised: those that `explain_alarm` was given, as pictures.
        alarm: What `detection.explain_alarm` returns.
        titles: N titles.
        k: How many channels.
        ax: Where to draw: an array of axes, shape ``(N, 3)``.

    Returns:
        The axes, shape ``(N, 3)``.

    Raises:
        ShapeError: Images are of another number than the alarm's, or lie outside [0, 1].
        OptionError: There are not N titles, k is below 1, or ``ax`` has another shape.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import torch
        >>> from captum_classfilters import HeadPass
        >>> from captum_classfilters.assets import load_demo_network, load_images
        >>> from captum_classfilters.detection import FamiliarityDetector, explain_alarm
        >>> model, train = load_demo_network()[0], load_images("train")
        >>> detector = FamiliarityDetector().fit(HeadPass(model, train.batches()))
        >>> noise = torch.rand(2, 1, 28, 28)
        >>> unfamiliar(noise, explain_alarm(detector, model, noise)).shape
        (2, 3)
    """
    count = len(alarm.strangeness)
    k = integer(k, "k", 1)
    for image in images:
        check_pixels(image, "images")
    if len(images) != count:
        raise ShapeError(f"the alarm is of {count} images, got {len(images)}; pass the images it was made from")
    if titles is not None and len(titles) != count:
        raise OptionError(f"titles must name the {count} images, got {len(titles)}")
    if ax is None:
        ax = plt.subplots(count, 3, figsize=(6.4, 1.6 * count + 0.3), layout="constrained", squeeze=False)[1]
    elif not isinstance(ax, np.ndarray) or ax.shape != (count, 3):
        raise OptionError(f"ax must be an array of axes of shape ({count}, 3); make it with plt.subplots({count}, 3)")
    height, width = images.shape[2:]
    maps = None
    if alarm.map is not None:
        maps = LayerAttribution.interpolate(alarm.map.double().cpu(), (height, width), "bilinear")[:, 0].numpy()
    largest = float(np.abs(maps).max()) if maps is not None else 0.0
    table = alarm.table[alarm.table.channel >= 0]
    furthest = float(table.contribution.abs().max()) or 1.0
    for index, line in enumerate(ax):
        photograph = as_photograph(images[index])
        line[0].imshow(photograph, cmap="gray", vmin=0, vmax=1)
        line[1].imshow(photograph.mean(2), cmap="gray", vmin=0, vmax=1)
        if maps is None:
            line[1].set_xlabel("no map: the features are\nnot an average of positions", fontsize=SMALL)
        elif largest > 0:
            line[1].imshow(maps[index], cmap=DIVERGING, vmin=-largest, vmax=largest)
        for axis in line[:2]:
            hide_frame(axis)
            axis.set(xticks=[], yticks=[])
        if titles is not None:
            line[0].set_title(titles[index], fontsize=SMALL, loc="left")
        _bars(line[2], table[table["sample"] == index].head(k), furthest)
    ax[0, 1].set_title("where", fontsize=SMALL)
    ax[0, 2].set_title("what each channel adds", fontsize=SMALL)
    ax[-1, 2].set_xlabel("part of the strangeness", fontsize=SMALL)
    return ax


def _bars(ax: Axes, rows: object, furthest: float) -> None:
    frame = rows.iloc[::-1]  # type: ignore[attr-defined]
    colours = [_MORE if value >= 0 else _LESS for value in frame.contribution]
    ax.barh(np.arange(len(frame)), frame.contribution, color=colours, height=0.7)
    ax.set_yticks(np.arange(len(frame)), [shortened(f"channel {channel}") for channel in frame.channel], fontsize=SMALL)
    ax.tick_params(axis="x", labelsize=SMALL)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set_xlim(min(0.0, 1.05 * float(frame.contribution.min())), 1.05 * furthest)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
