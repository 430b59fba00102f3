"""From images to the batches a network takes: preprocessing, and what becomes of images that cannot be read."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from captum_classfilters.cli.sources import Source
from captum_classfilters.core.errors import FileFormatError, OptionError

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the network sees it."""

    channels: int
    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __str__(self) -> str:
        colours = "grey" if self.channels == 1 else "RGB"
        numbers = ["(" + ", ".join(f"{x:g}" for x in values) + ")" for values in (self.mean, self.std)]
        plain = set(self.mean) == {0.0} and set(self.std) == {1.0}
        scaled = "pixels in [0, 1]" if plain else f"pixels in [0, 1] minus {numbers[0]} over {numbers[1]}"
        return f"{colours}, shorter side to {self.resize}, centre {self.crop} x {self.crop}, {scaled}"

    def facts(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The same as torchvision's and timm's own for their published weights."""
        steps = [
            v2.Resize(self.resize, v2.InterpolationMode(self.interpolation), antialias=True),
            v2.CenterCrop(self.crop),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(self.mean), list(self.std)),
        ]
        return v2.Compose(steps)  # type: ignore[no-any-return]


def choose_preprocessing(
    source: Source, published: Preprocessing | None, model: torch.nn.Module, options: Any
) -> Preprocessing:
    """The weights' own where they were published, what is usual otherwise; options go first."""
    channels = published.channels if published else _channels(model, source)
    mean, std = _IMAGENET if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
    size = options.image_size or (published.crop if published else source.size)
    # 256 for 224, as is usual; small images are taken whole
    larger = size if source.whole and not published else math.floor(size * 8 / 7)
    if published:
        mean, std = published.mean, published.std
        larger = round(published.resize * size / published.crop)
    chosen = options.resize or larger
    if chosen < size:
        raise OptionError(f"--resize must be at least the image size, {size}, got {chosen}; the crop is cut out of it")
    return Preprocessing(
        channels,
        chosen,
        size,
        _numbers("--mean", options.mean, mean),
        _numbers("--std", options.std, std),
        published.interpolation if published else "bilinear",
    )


def _channels(model: torch.nn.Module, source: Source) -> int:
    """Those that the first convolution takes; without one, those of the images."""
    first = next((module for module in model.modules() if isinstance(module, torch.nn.Conv2d)), None)
    channels = source.channels if first is None else first.in_channels
    if channels not in (1, 3):
        raise OptionError(f"the network takes {channels} channels; images can be read as 1 (grey) or 3 (RGB)")
    return channels


def _numbers(name: str, given: Sequence[float] | None, usual: tuple[float, ...]) -> tuple[float, ...]:
    if given is None:
        return usual
    if len(given) not in (1, len(usual)):
        raise OptionError(f"{name} must be 1 or {len(usual)} numbers, one for each channel; got {len(given)}")
    return tuple(given) * (len(usual) if len(given) == 1 else 1)


class Loader:
    """Batches ``(images, labels)`` of a source, read anew in each pass; images that cannot be read are left out.

    Args:
        source: The images.
        preprocessing: What is done to each.
        batch_size: Images in a batch.
        workers: Processes that read.
        strict: Refuse an unreadable image.

    Attributes:
        skipped: What could not be read, and why.
    """

    def __init__(self, source: Source, preprocessing: Preprocessing, batch_size: int, workers: int, strict: bool):
        self._images = _Images(source, preprocessing)
        self._strict = strict
        self._loader: DataLoader[Any] = DataLoader(
            self._images, batch_size, num_workers=workers, collate_fn=_collate, pin_memory=torch.cuda.is_available()
        )
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        empty = True
        for images, labels, unreadable in self._loader:
            for name, why in unreadable:
                if self._strict:
                    raise FileFormatError(
                        f"{name} could not be read ({why}); mend or remove it, or leave --strict out to skip it"
                    )
                self.skipped[name] = why
            if len(labels):
                empty = False
                yield images, labels
        if empty:
            name, why = next(iter(self.skipped.items()))
            raise FileFormatError(f"none of the {len(self._images)} images could be read; the first: {name} ({why})")

    def skipped_words(self) -> str:
        """How many were skipped, and the first of them."""
        count = len(self.skipped)
        shown = ", ".join(list(self.skipped)[:3]) + (", ..." if count > 3 else "")
        images = "1 image" if count == 1 else f"{count} images"
        return f"{images} could not be read and {'was' if count == 1 else 'were'} skipped: {shown}"


class _Images(Dataset[Any]):
    """One image and its label; or, of an image that cannot be read, its name and what is wrong with it."""

    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self._source, self._transform = source, preprocessing.transform()
        self._mode = "L" if preprocessing.channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self._source.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | tuple[str, str]:
        found = self._source.images[index]
        try:
            image = self._decoded(found)
        except Exception as error:  # a broken file can raise anything
            name = found if isinstance(found, Path) else f"image {index} of {self._source.about}"
            return str(name), str(error) or type(error).__name__
        return self._transform(image), self._source.labels[index]

    def _decoded(self, found: Any) -> Image.Image:
        if not isinstance(found, Path):
            return Image.fromarray(found).convert(self._mode)
        with Image.open(found) as file:
            return file.convert(self._mode)


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Readable images as a batch, and the others beside it: worker processes share nothing else with the main one."""
    readable = [item for item in items if isinstance(item[0], Tensor)]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
    return images, labels, [item for item in items if not isinstance(item[0], Tensor)]
