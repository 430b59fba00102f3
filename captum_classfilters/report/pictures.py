"""Small copies of images for the page: pixels as a person would see them, at most 80 along a side, as WebP.

N images, H x W pixels.
"""

import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.core.errors import ShapeError

Pixels = Callable[[Tensor], Tensor]

# Smaller pictures are kept without loss and drawn with square pixels
LOSSLESS = 40
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images_of(inputs: Iterable[Any]) -> Tensor | None:
    """The images among a network's inputs as ``(N, 1 or 3, H, W)``; None where there are none."""
    for value in inputs:
        if not isinstance(value, Tensor) or value.dim() not in (3, 4) or min(value.shape[-2:]) < 1:
            continue
        if value.dim() == 4 and value.shape[1] in (1, 3):
            return value
        if value.dim() == 4 and value.shape[3] in (1, 3):
            return value.permute(0, 3, 1, 2)
        if value.dim() == 3 and min(value.shape[1:]) > 7:
            return value[:, None]
    return None


def guessed_pixels(images: Tensor) -> tuple[Pixels, str]:
    """How to bring images to [0, 1], read from the first batch, and what was guessed, in words."""
    if not images.is_floating_point():
        return (lambda batch: batch.float() / 255), ""
    flat = images.detach().float().transpose(0, 1).flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    if float(low.min()) >= -1e-3 and float(high.max()) <= 1 + 1e-3:
        return (lambda batch: batch), ""
    if float(low.min()) >= 0 and 1.5 < float(high.max()) <= 255:
        return (lambda batch: batch / 255), ""
    if float(low.min()) >= -1.001 and float(high.max()) <= 1.001:
        return (lambda batch: (batch + 1) / 2), "Pixels from -1 to 1 are shown from black to white."
    if len(flat) == 3:
        mean, std = (torch.tensor(part, device=flat.device) for part in _IMAGENET)
        if bool((low >= -mean / std - 1e-2).all() and (high <= (1 - mean) / std + 1e-2).all()):
            return _undone(mean, std), (
                "The colours are shown as before the usual normalisation of ImageNet, because the numbers lie in its "
                "range. If another one was used, pass options=ReportOptions(pixels=...)."
            )
    width = (high - low).clamp(min=1e-6)
    return _undone(low, width), (
        "The numbers in the images have no known range: each colour is stretched from the smallest to the largest "
        "number of the first batch. Pass options=ReportOptions(pixels=...) to undo your normalisation."
    )


def _undone(shift: Tensor, scale: Tensor) -> Pixels:
    """Undo a normalisation of each colour."""
    return lambda batch: batch * scale.to(batch.device)[:, None, None] + shift.to(batch.device)[:, None, None]


class Pictures:
    """Small copies of the images that are still wanted, by their place in the loader.

    Args:
        side: Most pixels along a side.
        pixels: Brings images to [0, 1]; None: guessed from the first batch.
    """

    def __init__(self, side: int, pixels: Pixels | None) -> None:
        self._side, self._pixels = side, pixels
        self.note = ""
        self._copies: dict[int, np.ndarray[Any, Any]] = {}

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, place: int) -> bool:
        return place in self._copies

    def shape(self, place: int) -> tuple[int, int]:
        """Height and width of a copy."""
        height, width = self._copies[place].shape[:2]
        return height, width

    def take(self, images: Tensor, first: int, wanted: set[int]) -> None:
        """Keep those of a batch that are wanted, and drop what is wanted no longer.

        Args:
            images: ``(N, 1 or 3, H, W)``.
            first: Place of the batch's first image in the loader.
            wanted: Places of all images that are to be kept.
        """
        for place in self._copies.keys() - wanted:
            del self._copies[place]
        fresh = sorted(place for place in wanted if first <= place < first + len(images))
        if not fresh:
            return
        chosen = images[torch.tensor(fresh, device=images.device) - first].detach()
        small = self._small(self.unit(chosen))
        # all pixels of the batch leave the device together
        for place, copy in zip(fresh, small.cpu().numpy(), strict=True):
            self._copies[place] = copy

    def unit(self, images: Tensor) -> Tensor:
        """Images in [0, 1]."""
        if self._pixels is None:
            self._pixels, self.note = guessed_pixels(images)
        shown = self._pixels(images)
        if not isinstance(shown, Tensor) or shown.dim() != 4 or shown.shape[1] not in (1, 3):
            got = tuple(shown.shape) if isinstance(shown, Tensor) else type(shown).__name__
            raise ShapeError(
                f"pixels= must give images (N, 1 or 3, H, W) in [0, 1], got {got}; undo normalisation only"
            )
        return shown.float().nan_to_num().clamp(0, 1)

    def _small(self, images: Tensor) -> Tensor:
        """``(N, h, w)`` or ``(N, h, w, 3)`` uint8."""
        longest = max(images.shape[2:])
        if longest > self._side:
            size = [max(1, round(length * self._side / longest)) for length in images.shape[2:]]
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
        bytes_ = (images * 255).round().byte()
        return bytes_[:, 0] if bytes_.shape[1] == 1 else bytes_.permute(0, 2, 3, 1)

    def encoded(self, place: int, quality: int) -> bytes:
        """An image as WebP."""
        copy = self._copies[place]
        stream = io.BytesIO()
        lossless = max(copy.shape[:2]) <= LOSSLESS
        Image.fromarray(copy).save(stream, "WEBP", quality=quality, lossless=lossless, method=3)
        return stream.getvalue()
