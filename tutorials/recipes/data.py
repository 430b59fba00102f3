"""Data sets as two tensors each: images as uint8 (N, colours, H, W), labels as int64 (N,).

Small images fit in memory as bytes; a recipe augments whole batches of them at once.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class Split(NamedTuple):
    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]


def load(name: str, root: str | Path = "data", download: bool = True) -> Data:
    """Load ``fashion_mnist``, ``cifar10``, ``cifar100``, or a folder.

    A folder holds either the four idx files of an MNIST-like set, or ``train/<class>/`` and ``test/<class>/``
    with pictures, which are resized to 32x32.
    """
    if name == "fashion_mnist":
        if DEBIAN_FASHION_MNIST.is_dir():
            return _idx_folder(DEBIAN_FASHION_MNIST, "fashion_mnist", FASHION_CLASSES)
        return _torchvision("FashionMNIST", name, root, download)
    if name == "cifar10":
        return _torchvision("CIFAR10", name, root, download)
    if name == "cifar100":
        return _torchvision("CIFAR100", name, root, download)
    folder = Path(name)
    if (folder / "train-images-idx3-ubyte.gz").is_file():
        return _idx_folder(folder, folder.name)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return _picture_folder(folder)
    raise SystemExit(
        f"--data {name}: expected fashion_mnist, cifar10, cifar100, or a folder with the four idx files "
        "(train-images-idx3-ubyte.gz, ...) or with train/<class>/ and test/<class>/"
    )


def without(data: Data, names: Sequence[str]) -> Data:
    """The same data without some classes; the others are numbered anew, in their order."""
    if unknown := set(names) - set(data.class_names):
        raise SystemExit(f"--without {' '.join(sorted(unknown))}: the classes are {', '.join(data.class_names)}")
    kept = [index for index, name in enumerate(data.class_names) if name not in names]
    number = torch.full((len(data.class_names),), -1)
    number[kept] = torch.arange(len(kept))

    def part(split: Split) -> Split:
        rows = number[split.labels] >= 0
        return Split(split.images[rows], number[split.labels[rows]])

    class_names = tuple(data.class_names[index] for index in kept)
    return Data(f"{data.name} without {', '.join(names)}", part(data.train), part(data.test), class_names)


def held_back(data: Data, count: int, seed: int = 0) -> Data:
    """Training images in the place of test images, drawn at random: for choices that must not see test images."""
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(seed))
    train, test = (Split(*(part[rows] for part in data.train)) for rows in (order[count:], order[:count]))
    return data._replace(train=train, test=test)


def _idx(path: Path, header: int) -> Tensor:
    with gzip.open(path) as stream:
        return torch.from_numpy(np.frombuffer(stream.read(), np.uint8, offset=header).copy())


def _idx_folder(folder: Path, name: str, class_names: tuple[str, ...] = ()) -> Data:
    splits = []
    for prefix in ("train", "t10k"):
        labels = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8).long()
        images = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16)
        side = int((len(images) // len(labels)) ** 0.5)
        splits.append(Split(images.view(len(labels), 1, side, side), labels))
    names = class_names or tuple(str(index) for index in range(int(splits[0].labels.max()) + 1))
    return Data(name, *splits, names)


def _torchvision(kind: str, name: str, root: str | Path, download: bool) -> Data:
    import torchvision

    splits = []
    for train in (True, False):
        found = getattr(torchvision.datasets, kind)(root, train=train, download=download)
        images = torch.as_tensor(found.data)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.as_tensor(found.targets).long()))
    names = FASHION_CLASSES if name == "fashion_mnist" else tuple(found.classes)
    return Data(name, *splits, names)


def _picture_folder(folder: Path) -> Data:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    resize = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()])
    splits, names = [], ()
    for part in ("train", "test"):
        found = ImageFolder(folder / part, resize)
        names = names or tuple(found.classes)
        if tuple(found.classes) != names:
            raise SystemExit(f"{folder}: train/ and test/ hold different classes")
        images, labels = zip(*found, strict=True)
        splits.append(Split(torch.stack(images), torch.tensor(labels)))
    return Data(folder.name, *splits, names)
