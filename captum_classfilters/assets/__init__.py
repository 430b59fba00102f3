"""Networks and images small enough to ship, and their loading. Real ones: ``NOTICE.md`` beside this file says whose.

`networks.py` holds the architecture. The recipes in ``tutorials/recipes`` made the files.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from captum_classfilters.assets.networks import SmallAlexNet, SmallInception, SmallResNet, SmallVGG
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.files import read, write

_HERE = Path(__file__).parent
# the kind was named when there was one architecture
_NETWORK, _NETWORK_VERSION = "SmallResNet", 1
_ARCHITECTURES = {kind.__name__: kind for kind in (SmallResNet, SmallAlexNet, SmallVGG, SmallInception)}
Network: TypeAlias = SmallResNet | SmallAlexNet | SmallVGG | SmallInception
_IMAGES, _IMAGES_VERSION = "ImageSample", 1
SEEDS = (0, 1, 2)
# Which trainings of which network and method ship
SHIPPED = {
    ("resnet20", "std"): SEEDS,
    ("resnet20", "lsg"): SEEDS,
    ("resnet20", "fixed-gate"): (0,),
    ("resnet20", "decoupled"): (0, 1),
    ("resnet20", "decoupled-r0"): (0,),
    ("vgg", "decoupled"): (0,),
    ("inception", "decoupled"): (0,),
}
# Those of ResNet-20 with nothing or a gate before the head
METHODS = {method: SHIPPED["resnet20", method] for method in ("std", "lsg", "fixed-gate")}


class ImageSample(NamedTuple):
    """Images as bytes and their labels."""

    images: Tensor  # (N, 1, H, W) uint8: 28x28 for Fashion-MNIST, 32x32 for kanji
    labels: Tensor  # (N,) int64
    class_names: tuple[str, ...]

    def batches(self, size: int = 250) -> list[tuple[Tensor, Tensor]]:
        """A loader: ``(images, labels)``, images in [0, 1] as the networks here take them."""
        return [
            (images.float() / 255, labels)
            for images, labels in zip(torch.split(self.images, size), torch.split(self.labels, size), strict=True)
        ]


def load_demo_network(seed: int = 0, method: str = "std", network: str = "resnet20") -> tuple[Network, dict[str, Any]]:
    """A network trained on Fashion-MNIST, and how: ``(model, meta)``; eval mode, on the CPU.

    Args:
        seed: Which of the trainings: 0, 1 or 2 for ``"std"`` and ``"lsg"``, 0 for the others; see ``SHIPPED``.
        method: ``"std"``, or ``"lsg"``: trained with a gate, which `gate_file` has; or ``"fixed-gate"``: with one that
            was set by hand; ``"decoupled"``: with gates for each image, whose controllers `paths_file` has, and with
            half of the channels to be open; ``"decoupled-r0"``: with as few as there may be.
        network: ``"resnet20"``; or, decoupled only, ``"vgg"`` and ``"inception"``.

    Example:
        >>> model, meta = load_demo_network()
        >>> meta["test_accuracy"] > 0.93
        True
    """
    return load_network(_HERE / f"{_run(seed, method, network, of_network=True)}.safetensors")


def gate_file(seed: int = 0, method: str = "lsg") -> Path:
    """The gate that a network of `load_demo_network` was trained with, for ``LabelSensitiveGate.load``.

    Example:
        >>> gate_file().name
        'gate_lsg_s0.safetensors'
    """
    if method not in ("lsg", "fixed-gate"):
        raise OptionError(f'networks of method "{method}" were trained without a gate; ask for "lsg" or "fixed-gate"')
    return _HERE / f"gate_{_run(seed, method)}.safetensors"


def paths_file(seed: int = 0, method: str = "decoupled", network: str = "resnet20") -> Path:
    """The controllers that a network of `load_demo_network` was trained with: ``PathDecoupler(model).load(file)``.

    Example:
        >>> paths_file().name
        'paths_resnet20_decoupled_s0.safetensors'
    """
    if not method.startswith("decoupled"):
        raise OptionError(f'networks of method "{method}" have no calculation paths; ask for "decoupled"')
    return _HERE / f"paths_{_run(seed, method, network, of_network=True)}.safetensors"


def _run(seed: int, method: str, network: str = "resnet20", of_network: bool = False) -> str:
    """How a training is called in file names."""
    if network not in (names := sorted({name for name, _ in SHIPPED})):
        raise OptionError(f"network must be one of {names}, got {network!r}")
    if method not in (methods := [way for name, way in SHIPPED if name == network]):
        raise OptionError(f"method must be one of {methods}, got {method!r}")
    seeds = SHIPPED[network, method]
    if seed not in seeds:
        raise OptionError(f"seed must be one of {list(seeds)}, got {seed!r}; these are the networks that ship")
    run = f"s{seed}" if method == "std" else f"{method.replace('-', '_')}_s{seed}"
    return f"{network}_{run}" if of_network else run


def load_images(split: str = "test") -> ImageSample:
    """1,000 images of Fashion-MNIST, 100 of each class.

    Args:
        split: ``"train"``: some of those that the networks were trained on, for filters, refits and thresholds;
            ``"test"``: some of those that they never saw, for judging.

    Example:
        >>> load_images("test").images.shape
        torch.Size([1000, 1, 28, 28])
    """
    return _read_images("fashion_mnist_sample.safetensors", split)


def load_kanji_network() -> tuple[SmallResNet, dict[str, Any]]:
    """A ResNet-14 that reads 1,000 kanji in typefaces it never saw, K = 192: ``(model, meta)``; eval mode, on the CPU.

    Example:
        >>> model, meta = load_kanji_network()
        >>> model.fc
        Linear(in_features=192, out_features=1000, bias=True)
    """
    return cast("tuple[SmallResNet, dict[str, Any]]", load_network(_HERE / "kanji_resnet14.safetensors"))


def load_kanji_images(split: str = "test") -> ImageSample:
    """250 degraded images of printed kanji: five of each of 50 of the network's 1,000 classes.

    Args:
        split: ``"train"``: of typefaces that the network was trained on; ``"test"``: of foundries that it never saw.
            Both hold the same classes.

    Example:
        >>> load_kanji_images("test").images.shape
        torch.Size([250, 1, 32, 32])
    """
    return _read_images("kanji_sample.safetensors", split)


def _read_images(name: str, split: str) -> ImageSample:
    if split not in ("train", "test"):
        raise OptionError(f'split must be "train" or "test", got {split!r}')
    tensors, meta = read(_HERE / name, kind=_IMAGES, version=_IMAGES_VERSION)
    return ImageSample(tensors[f"{split}_images"], tensors[f"{split}_labels"], tuple(meta["class_names"]))


def save_images(path: str | os.PathLike[str], train: ImageSample, test: ImageSample) -> None:
    """Save what `load_images` and `load_kanji_images` read."""
    tensors = {
        f"{split}_{what}": getattr(sample, what)
        for split, sample in (("train", train), ("test", test))
        for what in ("images", "labels")
    }
    write(path, tensors, kind=_IMAGES, version=_IMAGES_VERSION, meta={"class_names": list(train.class_names)})


def save_network(model: Network, path: str | os.PathLike[str], meta: dict[str, Any]) -> None:
    """Save a network with what is needed to build it again; ``meta`` says how it was trained."""
    config = {
        "architecture": type(model).__name__,
        "num_classes": model.fc.out_features,
        "mean": model.normalise.mean.flatten().tolist(),
        "std": model.normalise.std.flatten().tolist(),
        **model.config(),
    }
    about = {**meta, "config": config}
    write(path, model.state_dict(), kind=_NETWORK, version=_NETWORK_VERSION, meta=about)


def load_network(path: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """Load what `save_network` saved: ``(model, meta)``, in eval mode, on the CPU."""
    tensors, meta = read(path, kind=_NETWORK, version=_NETWORK_VERSION)
    config = dict(meta["config"])
    model = _ARCHITECTURES[config.pop("architecture", "SmallResNet")](**config)
    model.load_state_dict(tensors)
    return model.eval(), meta
