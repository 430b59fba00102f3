"""Small networks and real images that ship for the demo, the tutorials and the tests; ``NOTICE.md`` has their sources.

`networks.py` holds the architectures. ``tutorials/recipes/make_networks.py`` trained the networks; it can train any
network that a published figure needs, and `load_network` reads it.
"""

import math
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from captum_classfilters.assets.networks import SmallAlexNet, SmallInception, SmallResNet, SmallVGG
from captum_classfilters.core.check import integer, number, one_of
from captum_classfilters.core.errors import OptionError, quoted
from captum_classfilters.core.files import checked_tensor, contents, read, texts, write

_HERE = Path(__file__).parent
# All architectures are saved under this kind, which is named after the first.
_NETWORK, _NETWORK_VERSION = "SmallResNet", 1
_ARCHITECTURES = {kind.__name__: kind for kind in (SmallResNet, SmallAlexNet, SmallVGG, SmallInception)}
Network: TypeAlias = SmallResNet | SmallAlexNet | SmallVGG | SmallInception
_IMAGES, _IMAGES_VERSION = "ImageSample", 2
SEEDS = (0, 1, 2)
# Which trainings of ResNet-20 ship, by method.
SHIPPED = {"std": SEEDS, "lsg": (0,), "fixed-gate": (0,), "decoupled": (0,)}


class ImageSample(NamedTuple):
    """Images as bytes and their labels."""

    images: Tensor  # (N, 1, 28, 28) uint8
    labels: Tensor  # (N,) int64
    class_names: tuple[str, ...]

    def batches(self, size: int = 250) -> list[tuple[Tensor, Tensor]]:
        """A loader: ``(images, labels)``, images in [0, 1] as the networks here take them."""
        return [
            (images.float() / 255, labels)
            for images, labels in zip(torch.split(self.images, size), torch.split(self.labels, size), strict=True)
        ]


def load_demo_network(seed: int = 0, method: str = "std") -> tuple[SmallResNet, dict[str, Any]]:
    """A ResNet-20 trained on Fashion-MNIST, ``(model, meta)``, in eval mode, on the CPU.

    Args:
        seed: Seed of the training: 0, 1 or 2 for ``"std"``, 0 for the others; see ``SHIPPED``.
        method: ``"std"``: trained as usual; ``"lsg"``: trained with a gate, see `gate_file`; ``"fixed-gate"``: trained
            with a gate that was set by hand; ``"decoupled"``: with gates for each image, see `paths_file`, and half of
            the channels open on average.

    Raises:
        OptionError: This training does not ship. The message has the command that makes it.

    Example:
        >>> model, meta = load_demo_network()
        >>> meta["test_accuracy"] > 0.93
        True
    """
    name = network_name(seed, method)
    _check_shipped(seed, method, name)
    return cast("tuple[SmallResNet, dict[str, Any]]", load_network(_HERE / f"{name}.safetensors"))


def gate_file(seed: int = 0, method: str = "lsg") -> Path:
    """The gate that a network of `load_demo_network` was trained with, for ``LabelSensitiveGate.load``.

    Example:
        >>> gate_file().name
        'gate_lsg_s0.safetensors'
    """
    if method not in ("lsg", "fixed-gate"):
        raise OptionError(f'networks of method "{method}" were trained without a gate; ask for "lsg" or "fixed-gate"')
    name = network_name(seed, method)
    _check_shipped(seed, method, name)
    return _HERE / f"{name.replace('resnet20', 'gate')}.safetensors"


def paths_file(seed: int = 0) -> Path:
    """The controllers of the decoupled network of `load_demo_network`: ``PathDecoupler(model).load(file)``.

    Example:
        >>> paths_file().name
        'paths_resnet20_decoupled_s0.safetensors'
    """
    name = network_name(seed, "decoupled")
    _check_shipped(seed, "decoupled", name)
    return _HERE / f"paths_{name}.safetensors"


def network_name(seed: int, method: str = "std", network: str = "resnet20") -> str:
    """The name of a training in file names, here and in ``tutorials/recipes/make_networks.py``.

    Example:
        >>> network_name(1, "fixed-gate")
        'resnet20_fixed_gate_s1'
    """
    return "_".join([network, *([] if method == "std" else [method.replace("-", "_")]), f"s{seed}"])


def _check_shipped(seed: int, method: str, name: str) -> None:
    if method not in SHIPPED:
        raise OptionError(f"method must be one of {list(SHIPPED)}, got {method!r}")
    if seed not in SHIPPED[method]:
        raise OptionError(
            f"seed must be one of {list(SHIPPED[method])} for method {method!r}, got {seed!r}; no other network ships. "
            f"Train it by python tutorials/recipes/make_networks.py {name} --to networks, "
            f'and read it by assets.load_network("networks/{name}.safetensors")'
        )


def load_images(split: str = "test") -> ImageSample:
    """1,000 images of Fashion-MNIST, 100 of each class.

    Args:
        split: ``"train"``: images that the networks were trained on, for filters, refits and thresholds; ``"test"``:
            images that they never saw, for judging.

    Example:
        >>> load_images("test").images.shape
        torch.Size([1000, 1, 28, 28])
    """
    if split not in ("train", "test"):
        raise OptionError(f'split must be "train" or "test", got {split!r}')
    path = _HERE / "fashion_mnist_sample.safetensors"
    tensors, meta = read(path, kind=_IMAGES, version=_IMAGES_VERSION)
    with contents(path, "images of this package"):
        names, packed = texts(meta["class_names"], "class_names"), tensors[f"{split}_images"]
        count = len(tensors[f"{split}_labels"])
        labels = checked_tensor(tensors, f"{split}_labels", torch.int64, count)
        checked_tensor(tensors, f"{split}_images", torch.uint8, len(packed))
        shape = [integer(size, "image_shape", 1, 2**16) for size in meta["image_shape"]]
        if len(shape) != 3 or not count or bool((labels >= len(names)).any()):
            raise ValueError("expected images of three axes, and a name for each label")
        size = count * math.prod(shape)
        # a few bytes can unpack to gigabytes: never more than the header announces
        unpacker = zlib.decompressobj()
        try:
            pixels = unpacker.decompress(packed.numpy().tobytes(), size)
            more = unpacker.decompress(unpacker.unconsumed_tail, 1)
        except zlib.error as error:
            raise ValueError(f"the pixels cannot be unpacked: {error}") from error
        if len(pixels) != size or more or not unpacker.eof:
            raise ValueError(f"expected {size} pixels")
        images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(count, *shape)
        return ImageSample(images, labels, names)


def save_images(path: str | os.PathLike[str], train: ImageSample, test: ImageSample) -> None:
    """Save images for `load_images`; pixels are compressed without loss."""
    tensors = {}
    for split, sample in (("train", train), ("test", test)):
        packed = zlib.compress(sample.images.contiguous().numpy().tobytes(), 9)
        tensors[f"{split}_images"] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        tensors[f"{split}_labels"] = sample.labels
    meta = {"class_names": list(train.class_names), "image_shape": list(train.images.shape[1:])}
    write(path, tensors, kind=_IMAGES, version=_IMAGES_VERSION, meta=meta)


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
    """Load what `save_network` and the recipes saved: ``(model, meta)``, in eval mode, on the CPU.

    Raises:
        FileNotFoundError, FileFormatError: There is no such file, or it holds no network of this package.
    """
    tensors, meta = read(path, kind=_NETWORK, version=_NETWORK_VERSION)
    with contents(path, "a whole network"):
        config = dict(meta["config"])
        architecture = one_of(config.pop("architecture", "SmallResNet"), "architecture", list(_ARCHITECTURES))
        for name, value in config.items():
            _check_config(name, value, most=len(tensors))
        # the meta device: shapes are compared before any memory is taken for them
        with torch.device("meta"):
            model = _ARCHITECTURES[architecture](**config)
        expected = model.state_dict()
        if expected.keys() != tensors.keys():
            raise ValueError(f"it lacks or adds {quoted(sorted(expected.keys() ^ tensors.keys()), 3)}")
        for name, value in expected.items():
            checked_tensor(tensors, name, None if value.is_floating_point() else value.dtype, *value.shape)
            tensors[name] = tensors[name].to(value.dtype)
        model.load_state_dict(tensors, assign=True)
    return model.eval(), meta


def _check_config(name: str, value: Any, most: int) -> None:
    """What a file says of a network; every number in a list and every layer stands for a tensor that the file has."""
    if isinstance(value, list):
        integer(len(value), f"the length of {name}", 1, most)
        for entry in value:
            _check_config(name, entry, most)
    elif name in ("mean", "std"):
        number(value, name)
    else:
        integer(value, name, 1, most if name == "depth" else 2**20)
