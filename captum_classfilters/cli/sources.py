"""Where images come from: folders of classes, and the data sets that have a name. Nothing is decoded here.

A wrong path or layout is refused with what was expected, what there is, and what to do.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from captum_classfilters.core.errors import FileFormatError, OptionError, quoted

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class Source(NamedTuple):
    """Images that are still files or arrays of bytes, and their classes."""

    about: str
    class_names: tuple[str, ...]
    images: Sequence[Any]  # paths, or uint8 arrays (H, W) or (H, W, 3)
    labels: Sequence[int]
    channels: int  # 1 where all are grey
    size: int  # the side that networks for such images usually take
    whole: bool = False  # images of that size already: nothing is cut off


def open_source(text: str, split: str | None, *, judging: bool = False) -> Source:
    """Find the images that DATA names.

    Args:
        text: A folder, or ``name:ROOT``.
        split: Which part; None: of a named data set the training images, or those to judge by.
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


def in_order_of(source: Source, path: Path | None) -> Source:
    """The classes that a file lists, one a line, in the network's order; those without a folder have no images."""
    if path is None:
        return source
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    names = tuple(name for name in names if name)
    unknown = [name for name in source.class_names if name not in names]
    if unknown:
        raise OptionError(
            f"{path} lists {len(names)} classes, but not {quoted(unknown, 5)} of {source.about}; name the folders as "
            "the list does, one name a line"
        )
    place = [names.index(name) for name in source.class_names]
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
    for label, folder in enumerate(folders):
        found = _images(folder, deep=True)
        images += found
        labels += [label] * len(found)
    if not images:
        raise OptionError(
            f"no image in the class folders of {root} ({_listed(folders)}); expected files ending in "
            f"{', '.join(EXTENSIONS)}"
        )
    _refuse_splits(root, folders)
    # resolved: however it is written, the same folder is called the same
    return Source(f"folder {root.resolve()}", tuple(folder.name for folder in folders), images, labels, 3, 224)


def _refuse_splits(root: Path, folders: list[Path]) -> None:
    """``pets/train/cat/1.jpg`` given as ``pets``: the classes would be train and val."""
    if {folder.name for folder in folders} <= {"train", "val", "valid", "validation", "test"} and not any(
        _images(folder, deep=False) for folder in folders
    ):
        name = folders[0].name
        raise OptionError(
            f"the folders in {root} are splits ({_listed(folders)}), not classes; expected one folder per class: "
            f"pass {root / name}, or --split {name}"
        )


def _check_root(root: Path) -> None:
    if root.is_file():
        raise OptionError(f"{root} is a file; expected a folder with one folder of images for each class")
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {root}; expected one with a folder of images for each class, or "
            f"{', '.join(f'{name}:ROOT' for name in _NAMED)}"
        )


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    # "._cat.jpg": what macOS leaves behind is no image
    return sorted(path for path in found if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))


def _example(root: Path) -> str:
    return _images(root, deep=False)[0].name


def _listed(folders: Sequence[Path]) -> str:
    return quoted([folder.name for folder in folders], most=5) or "none"


# -- data sets with a name ---------------------------------------------------------------------------------------------


def _fashion_mnist(root: Path, split: str) -> Source:
    """Torchvision's folder, or one of the plain files, such as the Debian package dataset-fashion-mnist makes."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _idx(root, f"{prefix}-images-idx3-ubyte", header=16)
    labels = _idx(root, f"{prefix}-labels-idx1-ubyte", header=8)
    if not len(labels) or len(images) != 784 * len(labels):
        raise FileFormatError(f"the images and labels of {split} in {root} are not equally many; copy them anew")
    return Source(
        f"Fashion-MNIST, {split}", FASHION_CLASSES, images.reshape(-1, 28, 28), labels.tolist(), 1, 28, whole=True
    )


def _idx(root: Path, name: str, header: int) -> Any:
    import numpy as np

    for folder in (root, root / "FashionMNIST" / "raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if not path.is_file():
                continue
            try:
                content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            except (EOFError, gzip.BadGzipFile) as error:
                raise FileFormatError(f"{path} is not a whole gzip file ({error}); copy it anew") from error
            return np.frombuffer(content, np.uint8, offset=min(header, len(content)))
    raise FileNotFoundError(
        f"no {name} or {name}.gz in {root} or {root}/FashionMNIST/raw; put the four files of "
        "https://github.com/zalandoresearch/fashion-mnist there (Debian: apt install dataset-fashion-mnist, then "
        "fashion_mnist:/usr/share/datasets/fashion-mnist)"
    )


def _cifar10(root: Path, split: str) -> Source:
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(root, train=split == "train", download=False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no whole CIFAR-10 in {root}; expected {root}/cifar-10-batches-py: unpack cifar-10-python.tar.gz of "
            "https://www.cs.toronto.edu/~kriz/cifar.html there"
        ) from error
    return Source(f"CIFAR-10, {split}", tuple(found.classes), found.data, found.targets, 3, 32, whole=True)


def _imagenet(root: Path, split: str) -> Source:
    from torchvision.datasets import ImageNet

    # asked first: torchvision would start to unpack archives
    if not (root / split).is_dir() or not (root / "meta.bin").is_file():
        raise FileNotFoundError(
            f"no ImageNet in {root}; expected {root}/{split} and {root}/meta.bin, as torchvision.datasets.ImageNet "
            f"unpacks them. Without meta.bin pass the folder {root / split} itself: its folders are the classes"
        )
    found = ImageNet(root, split)
    paths, labels = [Path(path) for path, _ in found.samples], [label for _, label in found.samples]
    return Source(f"ImageNet, {split}", _synonyms(found.classes), paths, labels, 3, 224)


def _synonyms(classes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Unique names: there are two cranes."""
    plain = [", ".join(names) for names in classes]
    return tuple(f"{name} ({index})" if plain.count(name) > 1 else name for index, name in enumerate(plain))


_NAMED = {
    "fashion_mnist": (("train", "test"), _fashion_mnist),
    "cifar10": (("train", "test"), _cifar10),
    "imagenet": (("train", "val"), _imagenet),
}
