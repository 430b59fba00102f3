"""Images: where they come from, and the batches that a network takes of them.

First come folders of classes and data sets with a name; a wrong path or layout is refused with what was expected, what
there is, and what to do. Then come preprocessing, and a loader that skips, counts and names unreadable images.
"""

import gzip
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from captum_classfilters.class_filters import check_names
from captum_classfilters.core.errors import FileFormatError, OptionError, printable, quoted

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

# Pixels along a side, and in all after the shorter side was resized: more take gigabytes for one image
_LARGEST_SIDE, _MOST_PIXELS = 8192, 100_000_000

# Bytes of the longest file of Fashion-MNIST, with its header: 60,000 images of 28 x 28
_LONGEST_IDX = 60_000 * 784 + 16

# Mean and standard deviation that networks for ImageNet usually take
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Source(NamedTuple):
    """Images, not decoded yet, and their classes."""

    about: str
    class_names: tuple[str, ...]
    images: Sequence[Any]  # paths, or uint8 arrays (H, W) or (H, W, 3)
    labels: Sequence[int]
    channels: int  # 1 where all are grey
    size: int  # the side that networks for such images usually take
    whole: bool = False  # images of that size already: nothing is cut off
    left_out: Mapping[str, str] = MappingProxyType({})  # files that are not read, and why

    def name(self, index: int) -> str:
        """The path of an image, or its place in the data set."""
        image_or_path = self.images[index]
        return str(image_or_path) if isinstance(image_or_path, Path) else f"image {index} of {self.about}"


def open_source(text: str, split: str | None, *, judging: bool = False) -> Source:
    """Find the images that DATA names.

    Args:
        text: A folder, or ``name:ROOT``.
        split: Which part of it. None: a folder as it is; the training images of a named data set, or its test images
            where ``judging``.
        judging: Whether these are images to judge by.
    """
    name, colon, root = text.partition(":")
    if name in _NAMED and not (name == text and Path(text).is_dir()):
        if not colon or not root:
            raise OptionError(f"{name} needs the folder it is in, {name}:ROOT; got {text!r}")
        splits, read = _NAMED[name]
        split = split or splits[judging]
        if split not in splits:
            raise OptionError(f"{name} has the splits {' and '.join(splits)}, got {split!r}")
        return read(Path(root).expanduser(), split)
    return _folder(Path(text).expanduser(), split)


def open_unlabelled(text: str, class_names: tuple[str, ...]) -> Source:
    """Images whose classes do not matter: all that lie in a folder, at any depth; or the test images of ``name:ROOT``.

    Args:
        text: A folder, or ``name:ROOT``.
        class_names: The network's classes.
    """
    if text.partition(":")[0] in _NAMED and not Path(text).is_dir():
        source = open_source(text, None, judging=True)
        return source._replace(class_names=class_names, labels=[0] * len(source.labels))
    root = Path(text).expanduser()
    _check_root(root, "images")
    left_out: dict[str, str] = {}
    images = _images(root, deep=True, left_out=left_out)
    if not images:
        raise OptionError(f"no image in {root}; expected files ending in {', '.join(EXTENSIONS)}")
    return Source(f"folder {root.resolve()}", class_names, images, [0] * len(images), 3, 224, left_out=left_out)


def first_of_each(source: Source, most: int | None) -> Source:
    """At most the first images of each class, in their order."""
    if most is None:
        return source
    kept, counts = [], [0] * len(source.class_names)
    for index, label in enumerate(source.labels):
        counts[label] += 1
        if counts[label] <= most:
            kept.append(index)
    return source._replace(images=[source.images[i] for i in kept], labels=[source.labels[i] for i in kept])


def interleaved(source: Source) -> Source:
    """The first image of each class, then the second of each, and so on: a pass that ends early saw all classes."""
    seen = [0] * len(source.class_names)
    ranks = []
    for label in source.labels:
        ranks.append(seen[label])
        seen[label] += 1
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return source._replace(images=[source.images[i] for i in order], labels=[source.labels[i] for i in order])


def in_order_of(source: Source, path: Path | None) -> Source:
    """The source with the classes that a file lists, one a line, in the network's order; some may have no images."""
    if path is None:
        return source
    # utf-8-sig: editors on Windows put a mark before the first name; surrogateescape: as folder names are read
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    lines = [printable(line.strip()) for line in lines]
    listed = tuple(line for line in lines if line)
    # a folder's name may begin or end with blanks, which a line of the file may lack
    folders = {name.strip(): name for name in source.class_names}
    names = tuple(folders.get(name, name) for name in listed)
    check_names(names)
    position = {name: index for index, name in enumerate(names)}
    unknown = [name for name in source.class_names if name not in position]
    if unknown:
        raise OptionError(
            f"{path} lists {len(names)} classes, but not {quoted(unknown, 5)} of {source.about}; name the folders as "
            "the list does, one name a line"
        )
    place = [position[name] for name in source.class_names]
    return source._replace(class_names=names, labels=[place[label] for label in source.labels])


# -- a folder of classes -----------------------------------------------------------------------------------------------


def _folder(root: Path, split: str | None) -> Source:
    _check_root(root)
    if split is not None:
        if not (root / split).is_dir():
            raise OptionError(f"{root} has no folder {split!r} for that split; there are: {_listed(_folders(root))}")
        root = root / split
    folders = _folders(root)
    if not folders:
        if _images(root, deep=False):
            raise OptionError(
                f"images lie directly in {root}; expected one folder per class, such as {root}/cat/{_example(root)}"
            )
        raise OptionError(f"{root} is empty; expected one folder of images for each class, such as {root}/cat/1.jpg")
    images: list[Path] = []
    labels: list[int] = []
    left_out: dict[str, str] = {}
    for label, folder in enumerate(folders):
        files = _images(folder, deep=True, left_out=left_out)
        images += files
        labels += [label] * len(files)
    if not images:
        raise OptionError(
            f"no image in the class folders of {root} ({_listed(folders)}); expected files ending in "
            f"{', '.join(EXTENSIONS)}"
        )
    _refuse_splits(root, folders)
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path not in folders:
            left_out[str(path)] = "hidden" if path.name.startswith(".") else "not in a class folder"
    # resolved: a folder has one name, however the path is written
    return Source(
        f"folder {root.resolve()}",
        tuple(printable(folder.name) for folder in folders), images, labels, 3, 224, left_out=left_out,
    )  # fmt: skip


_SPLIT_WORDS = frozenset(
    ("train", "training", "trn", "val", "valid", "validation", "dev", "eval", "test", "testing", "tst", "holdout")
)
_BESIDE_SPLIT = frozenset(("set", "data", "dataset", "images", "imgs", "split", "part", "fold"))


def _is_split(name: str) -> bool:
    """Whether a folder is called as part of a data set is: ``Train``, ``training_set``, ``test2017``."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    joined = re.sub(r"(set|data|images)$", "", "".join(words))
    is_split = any(word in _SPLIT_WORDS for word in words) and set(words) <= _SPLIT_WORDS | _BESIDE_SPLIT
    return is_split or joined in _SPLIT_WORDS


def _refuse_splits(root: Path, folders: list[Path]) -> None:
    """``pets/train/cat/1.jpg`` given as ``pets``: the classes would be train and val."""
    if all(_is_split(folder.name) for folder in folders) and not any(_images(folder, deep=False) for folder in folders):
        name = folders[0].name
        raise OptionError(
            f"the folders in {root} are splits ({_listed(folders)}), not classes; expected one folder per class: "
            f"pass {root / name}, or --split {name}"
        )


def _check_root(root: Path, content: str = "a folder of images for each class") -> None:
    if root.is_file():
        raise OptionError(f"{root} is a file; expected a folder with {content}")
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {root}; expected one with {content}, or {', '.join(f'{name}:ROOT' for name in _NAMED)}"
        )


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path, deep: bool, left_out: dict[str, str] | None = None) -> list[Path]:
    """The images in a folder, sorted; other files are put into ``left_out``, with the reason."""
    images: list[Path] = []
    seen: set[tuple[int, int]] = set()
    # followed: torchvision's ImageFolder follows links, too
    for place, inner, names in os.walk(folder, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:
            inner.clear()  # a link to a folder above it
            continue
        seen.add((here.st_dev, here.st_ino))
        hidden = [name for name in inner if name.startswith(".")]
        if not deep:
            inner.clear()
        # ".ipynb_checkpoints" holds copies of images, "._cat.jpg" is what macOS leaves behind
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        reasons = dict.fromkeys(hidden, "hidden folder")
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                reasons[name] = "hidden file"
            elif path.suffix.lower() not in EXTENSIONS:
                reasons[name] = f"no image; those end in {', '.join(EXTENSIONS)}"
            elif path.exists() and not path.is_file():
                reasons[name] = "not a regular file"
            else:
                images.append(path)
        if left_out is not None:
            left_out.update({str(Path(place, name)): why for name, why in reasons.items()})
    return sorted(images)


def _example(root: Path) -> str:
    return _images(root, deep=False)[0].name


def _listed(folders: Sequence[Path]) -> str:
    return quoted([folder.name for folder in folders], most=5) or "none"


# -- data sets with a name ---------------------------------------------------------------------------------------------


def _fashion_mnist(root: Path, split: str) -> Source:
    """Torchvision's folder, or one of the plain files, as the Debian package dataset-fashion-mnist installs it."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _idx(root, f"{prefix}-images-idx3-ubyte", header=16)
    labels = _idx(root, f"{prefix}-labels-idx1-ubyte", header=8)
    if not len(labels) or len(images) != 784 * len(labels):
        raise FileFormatError(f"{root} has unequal numbers of images and labels for {split}; copy the files anew")
    return Source(
        f"Fashion-MNIST, {split}", FASHION_CLASSES, images.reshape(-1, 28, 28), labels.tolist(), 1, 28, whole=True
    )


def _idx(root: Path, name: str, header: int) -> Any:
    for folder in (root, root / "FashionMNIST" / "raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if not path.is_file():
                continue
            try:
                with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                    content = file.read(_LONGEST_IDX + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise FileFormatError(f"{path} is not a whole gzip file ({error}); copy it anew") from error
            if len(content) > _LONGEST_IDX:
                raise FileFormatError(f"{path} holds more than the images of Fashion-MNIST; copy it anew")
            return np.frombuffer(content, np.uint8, offset=min(header, len(content)))
    raise FileNotFoundError(
        f"no {name} or {name}.gz in {root} or {root}/FashionMNIST/raw; put the four files of "
        "https://github.com/zalandoresearch/fashion-mnist there (Debian: apt install dataset-fashion-mnist, then "
        "fashion_mnist:/usr/share/datasets/fashion-mnist)"
    )


def _cifar10(root: Path, split: str) -> Source:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(root, train=split == "train", download=False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no whole CIFAR-10 in {root}; expected {root}/cifar-10-batches-py: unpack cifar-10-python.tar.gz of "
            "https://www.cs.toronto.edu/~kriz/cifar.html there"
        ) from error
    return Source(f"CIFAR-10, {split}", tuple(data.classes), data.data, data.targets, 3, 32, whole=True)


def _imagenet(root: Path, split: str) -> Source:
    from torchvision.datasets import ImageNet

    # asked first: torchvision would start to unpack archives
    if not (root / split).is_dir() or not (root / "meta.bin").is_file():
        raise FileNotFoundError(
            f"no ImageNet in {root}; expected {root}/{split} and {root}/meta.bin, as torchvision.datasets.ImageNet "
            f"unpacks them. Without meta.bin pass the folder {root / split} itself: its folders are the classes"
        )
    data = ImageNet(root, split)
    paths, labels = [Path(path) for path, _ in data.samples], [label for _, label in data.samples]
    return Source(f"ImageNet, {split}", _synonyms(data.classes), paths, labels, 3, 224)


def _synonyms(classes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Unique names: ImageNet has two classes called crane."""
    plain = [", ".join(names) for names in classes]
    times = Counter(plain)
    return tuple(f"{name} ({index})" if times[name] > 1 else name for index, name in enumerate(plain))


_NAMED = {
    "fashion_mnist": (("train", "test"), _fashion_mnist),
    "cifar10": (("train", "test"), _cifar10),
    "imagenet": (("train", "val"), _imagenet),
}


# -- preprocessing and batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the network sees it."""

    channels: int
    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    exif: bool = False  # turned upright as the camera noted; ImageFolder does not

    def __str__(self) -> str:
        colours = "grey" if self.channels == 1 else "RGB"
        numbers = ["(" + ", ".join(f"{x:g}" for x in values) + ")" for values in (self.mean, self.std)]
        plain = set(self.mean) == {0.0} and set(self.std) == {1.0}
        turned = "turned as EXIF says" if self.exif else "EXIF rotation ignored"
        scaled = "pixels in [0, 1]" if plain else f"pixels in [0, 1] minus {numbers[0]} over {numbers[1]}"
        return f"{colours}, {turned}, shorter side to {self.resize}, centre {self.crop} x {self.crop}, {scaled}"

    def facts(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)

    def pixels(self, images: Tensor) -> Tensor:
        """Preprocessed images ``(N, colours, H, W)`` as pictures in [0, 1]."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

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
    """The preprocessing of published weights, else the usual one; options of the command line come first."""
    channels = published.channels if published else _channels(model, source)
    mean, std = _IMAGENET if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
    size = options.image_size or (published.crop if published else source.size)
    # 256 for 224, as usual; small images are taken whole
    larger = size if source.whole and not published else math.floor(size * 8 / 7)
    if published:
        mean, std = published.mean, published.std
        larger = published.resize * size // published.crop
    chosen = options.resize or larger
    if max(chosen, size) > _LARGEST_SIDE:
        raise OptionError(
            f"--resize and --image-size may be at most {_LARGEST_SIDE} pixels, got {max(chosen, size)}; pass the size "
            "that the network was trained with"
        )
    if chosen < size:
        raise OptionError(f"--resize must be at least the image size, {size}, got {chosen}; the crop is cut out of it")
    return Preprocessing(
        channels,
        chosen,
        size,
        _numbers("--mean", options.mean, mean),
        _numbers("--std", options.std, std),
        published.interpolation if published else "bilinear",
        options.exif,
    )


def _channels(model: torch.nn.Module, source: Source) -> int:
    """The channels that the first convolution takes; without a convolution, those of the images."""
    first = next((module for module in model.modules() if isinstance(module, torch.nn.Conv2d)), None)
    channels = source.channels if first is None else first.in_channels
    if channels not in (1, 3):
        raise OptionError(f"the network takes {channels} channels; images can be read as 1 (grey) or 3 (RGB)")
    return channels


def _numbers(name: str, numbers: Sequence[float] | None, usual: tuple[float, ...]) -> tuple[float, ...]:
    if numbers is None:
        return usual
    if len(numbers) not in (1, len(usual)):
        raise OptionError(f"{name} must be 1 or {len(usual)} numbers, one for each channel; got {len(numbers)}")
    return tuple(numbers) * (len(usual) if len(numbers) == 1 else 1)


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
        left_out: Files that are not read at all, and why.
        labels: Those of the batch that was read last.
    """

    def __init__(self, source: Source, preprocessing: Preprocessing, batch_size: int, workers: int, strict: bool):
        self._images, self._source = _Images(source, preprocessing), source
        self.left_out = source.left_out
        self._strict = strict
        self._loader: DataLoader[Any] = DataLoader(
            self._images,
            min(batch_size, max(1, len(self._images))),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
        )
        self.skipped: dict[str, str] = {}
        self.labels: Tensor | None = None

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
                self.labels = labels
                yield images, labels
        if empty:
            name, why = next(iter(self.skipped.items()))
            raise FileFormatError(f"none of the {len(self._images)} images could be read; the first: {name} ({why})")

    def names_read(self) -> list[str]:
        """Names of the images that the last pass gave, in order."""
        names = map(self._source.name, range(len(self._images)))
        return [name for name in names if name not in self.skipped]

    def left_out_words(self) -> str:
        """How many files are not read, and the first of them."""
        shown = ", ".join(f"{name} ({why.partition(';')[0]})" for name, why in list(self.left_out.items())[:3])
        count = len(self.left_out)
        return f"{count} file{'s' * (count > 1)} left out: {shown}{', ...' * (count > 3)}"

    def skipped_words(self) -> str:
        """How many were skipped, and the first of them."""
        count = len(self.skipped)
        shown = ", ".join(list(self.skipped)[:3]) + (", ..." if count > 3 else "")
        images = "1 image" if count == 1 else f"{count} images"
        return f"{images} could not be read and {'was' if count == 1 else 'were'} skipped: {shown}"


class _Images(Dataset[Any]):
    """One image and its label; for an image that cannot be read, its name and the reason."""

    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self._source, self._transform = source, preprocessing.transform()
        self._mode = "L" if preprocessing.channels == 1 else "RGB"
        self._resize, self._exif = preprocessing.resize, preprocessing.exif

    def __len__(self) -> int:
        return len(self._source.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | tuple[str, str]:
        try:
            return self._transform(self._decoded(self._source.images[index])), self._source.labels[index]
        except Exception as error:  # a broken file can raise anything
            return self._source.name(index), str(error) or type(error).__name__

    def _decoded(self, image_or_path: Any) -> Image.Image:
        if not isinstance(image_or_path, Path):
            return Image.fromarray(image_or_path).convert(self._mode)
        # asked first: opening a pipe waits for ever
        if not image_or_path.is_file():
            raise FileFormatError("no regular file")
        with Image.open(image_or_path) as file:
            shorter, longer = sorted(file.size)
            if longer * self._resize**2 > _MOST_PIXELS * shorter:
                raise FileFormatError(
                    f"{file.size[0]} x {file.size[1]} pixels are too narrow: with the shorter side at {self._resize} "
                    f"the image would have more than {_MOST_PIXELS} pixels"
                )
            image = _eight_bits(file)
            if self._exif:
                image = ImageOps.exif_transpose(image)
            return image.convert(self._mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits: Pillow's own conversion cuts everything above 255 off."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        pixels = np.asarray(image).astype(np.int64)
        grey = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
        grey.info, grey._exif = image.info, image.getexif()
        return grey
    if image.mode in ("I", "F"):
        raise FileFormatError(f"pixels of mode {image.mode} have no known range; save the image with 8 or 16 bits")
    return image


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Readable images as a batch, and the others beside it: worker processes pass on nothing else."""
    readable = [item for item in items if isinstance(item[0], Tensor)]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
    return images, labels, [item for item in items if not isinstance(item[0], Tensor)]
