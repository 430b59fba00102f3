"""`Paths`: which channels every image of a loader opened, one bit for each. `PathDecoupler.paths` reads them.

N images, C classes, L layers with K_l channels, K in all.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import LabelError, MergeError, OptionError, quoted
from captum_classfilters.core.files import checked_tensor, contents, read, text, texts, write
from captum_classfilters.decoupling.costs import MOST_CHANNELS, Costs

if TYPE_CHECKING:
    import pandas as pd


_KIND, _VERSION = "Paths", 1
_STORED = ("codes", "predictions", "labels", "logits")
_MOST_CLASSES = 2**24
STATES = ("energetic", "silent", "dynamic")


@dataclass(frozen=True, eq=False)
class Paths:
    """The calculation paths of N images.

    Source: "Interpretable neural network decoupling", section 4.2: a path is all gates of one image, layer by layer.

    Attributes:
        codes: ``(N, ceil(K / 8))`` uint8: the gates of all layers in a row, eight to a byte, the first lowest.
        predictions: ``(N,)`` int64, what the gated network said.
        labels: ``(N,)`` int64; None where the loader gave none.
        layers: Names of the gated convolutions.
        channels: K_l of each.
        num_classes: C.
        fingerprint: Of network and controllers: paths of others do not go with these.
        costs: What convolutions cost, for `macs`.
        logits: g of eq. 2, ``(N, K)`` float32, if it was asked for.
    """

    codes: Tensor
    predictions: Tensor
    labels: Tensor | None
    layers: tuple[str, ...]
    channels: tuple[int, ...]
    num_classes: int
    fingerprint: str
    costs: Costs
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        return (
            f"Paths({len(self)} images, {len(self.layers)} layers, {sum(self.channels)} channels, "
            f"{self.bits().float().mean():.0%} open)"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``, the shape of `bits`: with it, and `__array__`, scikit-learn takes this for a table of bits."""
        return len(self), sum(self.channels)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """The bits, ``(N, K)`` uint8."""
        if copy is False:
            raise ValueError("paths are packed: an array of their bits is always a copy")
        return self.bits().numpy().astype(np.uint8 if dtype is None else dtype)

    def __getitem__(self, rows: Any) -> "Paths":
        """Some of the images: a slice, an index, indices or a boolean mask."""
        if isinstance(rows, tuple) and len(rows) == 2 and rows[1] is Ellipsis:  # as scikit-learn asks
            rows = rows[0]
        if isinstance(rows, Integral):
            index = range(len(self))[int(rows)]  # IndexError where there is none, which ends a loop over the images
            rows = slice(index, index + 1)
        picked: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows] for name in _STORED
        }
        return replace(self, **picked)

    def bits(self, layer: str | int | None = None) -> Tensor:
        """The gates, ``(N, K)`` bool; of one layer ``(N, K_l)``."""
        unpacked = np.unpackbits(self.codes.numpy(), axis=1, count=sum(self.channels), bitorder="little")
        everything = torch.from_numpy(unpacked).bool()
        return everything if layer is None else everything[:, self._columns(layer)]

    def gates(self) -> tuple[Tensor, ...]:
        """``(N, K_l)`` bool for each layer, as `PathDecoupler.gates` gives them."""
        return tuple(torch.split(self.bits(), list(self.channels), 1))

    def rates(self) -> tuple[Tensor, ...]:
        """For each layer the share of images that open each channel, ``(K_l,)`` float64."""
        return tuple(gate.double().mean(0) for gate in self.gates())

    def states(self) -> "pd.DataFrame":
        """How many filters of each layer are energetic (open for every image), silent (for none) or dynamic.

        Source: "Interpretable neural network decoupling", section 4.2, fig. 4. Which are which depends on the images:
        the more there are, the more are dynamic.

        Returns:
            One row for each layer: the three counts, ``channels``, and ``open``, the mean share of open ones.
        """
        import pandas as pd

        rows = []
        for name, rate in zip(self.layers, self.rates(), strict=True):
            energetic, silent = int((rate == 1).sum()), int((rate == 0).sum())
            rows.append((name, energetic, silent, len(rate) - energetic - silent, len(rate), float(rate.mean())))
        return pd.DataFrame(rows, columns=["layer", *STATES, "channels", "open"]).set_index("layer")

    def macs(self, *, controllers: bool = True) -> Tensor:
        """Multiplications of each image's path, ``(N,)`` int64; ``costs.dense`` is the network's without gates."""
        return self.costs.of(self.gates(), controllers=controllers)

    def distances(self, other: "Paths | None" = None) -> Tensor:
        """Hamming distances between paths, ``(N, M)`` int32: of these to each other, or to ``other``'s."""
        if other is not None:
            self._check_same_network(other)
        mine = self.bits().float()
        theirs = mine if other is None else other.bits().float()
        # of open gates: mine + theirs - 2 shared; float32 is exact below 2**24
        shared = mine @ theirs.T
        return (mine.sum(1)[:, None] + theirs.sum(1) - 2 * shared).round().int()

    def profiles(self) -> tuple[Tensor, Tensor]:
        """For each class the share of its images that open each channel: ``((C, K) float64, (C,) counts)``.

        A class without images is NaN.
        """
        labels = self._need_labels("profiles")
        members = torch.nn.functional.one_hot(labels, self.num_classes).double()
        counts = members.sum(0)
        return (members.T @ self.bits().double()) / counts[:, None], counts.long()

    def class_filters(self, layer: str | int, class_names: Sequence[str] = ()) -> ClassFilters:
        """Which filters of a layer work for which class: how much oftener its images open them than others' do.

        The score of class c and filter k is the share of c's images that open k, less the mean of that share over the
        other classes seen; the share itself breaks ties. 1 is a filter for this class alone.

        Args:
            layer: A name of `layers`, or its index.
            class_names: C names; by default numbers.

        Raises:
            OptionError: There is no such layer; fewer than two classes have images.
        """
        profiles, counts = self.profiles()
        share = profiles[:, self._columns(layer)]
        seen = counts > 0
        if seen.sum() < 2:
            raise OptionError(f"expected images of at least two classes, got {int(seen.sum())}; show some of another")
        share = torch.where(seen[:, None], share, 0.0)
        others = (share.sum(0) - share) / (seen.sum() - 1)
        scores = torch.where(seen[:, None], share - others, 0.0)
        names = tuple(class_names) or tuple(str(index) for index in range(self.num_classes))
        name = self.layers[self.index(layer)]
        return ClassFilters(scores, share, counts, "paths", name, names, merge_rule="none")

    def embed(self, *, components: int = 300, perplexity: float = 30.0, seed: int = 0) -> Tensor:
        """Paths as points of a plane, ``(N, 2)`` float32: PCA, then t-SNE, both of scikit-learn.

        Source: "Interpretable neural network decoupling", section 4.2, fig. 3. No difference. Quadratic in N: some
        thousands of images are enough.

        Raises:
            OptionError: There are fewer images than ``perplexity`` asks for; ``components`` is less than 1.
        """
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE

        if len(self) <= perplexity:
            raise OptionError(f"perplexity must be less than the number of images, {len(self)}, got {perplexity}")
        if components < 1:
            raise OptionError(f"components must be at least 1, got {components!r}")
        bits = self.bits().float().numpy()
        reduced = PCA(min(components, *bits.shape), random_state=seed).fit_transform(bits)
        return torch.from_numpy(TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced))

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of each image, by name."""
        stored = {name: getattr(self, name) for name in _STORED}
        return {name: value for name, value in stored.items() if value is not None}

    def meta(self) -> dict[str, Any]:
        """What is stored of the network, as JSON can hold it."""
        return {
            "layers": list(self.layers), "channels": list(self.channels), "num_classes": self.num_classes,
            "fingerprint": self.fingerprint, "costs": self.costs.as_json(),
        }  # fmt: skip

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Paths":
        """What `tensors` and `meta` gave."""
        return cls(
            tensors["codes"], tensors["predictions"], tensors.get("labels"), tuple(meta["layers"]),
            tuple(meta["channels"]), meta["num_classes"], meta["fingerprint"], Costs.from_json(meta["costs"]),
            tensors.get("logits"),
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write safetensors with a JSON header."""
        write(path, self.tensors(), kind=_KIND, version=_VERSION, meta=self.meta())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Paths":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, FileFormatError: There is no such file, or it is none of these.
        """
        tensors, meta = read(path, kind=_KIND, version=_VERSION)
        with contents(path, "whole paths"):
            return cls.checked(tensors, meta)

    @classmethod
    def checked(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Paths":
        """As `of`, for what a file says: nothing is made before sizes and types are known to fit.

        Raises:
            OptionError, ValueError, TypeError, LookupError: They do not.
        """
        layers = texts(meta["layers"], "layers")
        channels = [integer(value, "channels", 1, MOST_CHANNELS) for value in meta["channels"]]
        width, classes = sum(channels), integer(meta["num_classes"], "num_classes", 1, _MOST_CLASSES)
        if not layers or len(set(layers)) != len(layers) or len(channels) != len(layers) or width > MOST_CHANNELS:
            raise ValueError(f"{len(layers)} layers, {len(channels)} numbers of channels, {width} channels in all")
        text(meta["fingerprint"], "fingerprint")
        images = len(tensors["codes"])
        checked_tensor(tensors, "codes", torch.uint8, images, -(-width // 8))
        for name in ("predictions", "labels"):
            if name in tensors or name == "predictions":
                values = checked_tensor(tensors, name, torch.int64, images)
                if bool((values >= classes).any()):
                    raise ValueError(f"{name} must lie below the number of classes, {classes}")
        if "logits" in tensors:
            checked_tensor(tensors, "logits", torch.float32, images, width)
        paths = cls.of(tensors, meta)
        paths.costs.check(channels)
        return paths

    @staticmethod
    def merge(*parts: "Paths") -> "Paths":
        """The images of all parts, in their order.

        Raises:
            MergeError: No parts, parts of different networks, or of which some have labels or logits and some not.
        """
        if not parts:
            raise MergeError("merge needs at least one part, got none")
        first = parts[0]
        merged: dict[str, Any] = {}
        for part in parts[1:]:
            first._check_same_network(part)
            if part.costs != first.costs:
                raise MergeError("these paths are of images of another size, which cost another number of MACs")
        for name in _STORED:
            values = [getattr(part, name) for part in parts]
            missing = sum(value is None for value in values)
            if missing not in (0, len(parts)):
                raise MergeError(f"{missing} of {len(parts)} parts have no {name}; collect all with or all without")
            merged[name] = None if missing else torch.cat(values)
        return replace(first, **merged)

    def _check_same_network(self, other: "Paths") -> None:
        if not isinstance(other, Paths):
            raise MergeError(f"expected Paths, got {type(other).__name__}")
        if self.layers != other.layers or self.channels != other.channels:
            raise MergeError("these paths are of other layers; collect both with the same decoupler")
        if self.fingerprint != other.fingerprint:
            raise MergeError(
                f"these paths are of another network or other controllers (fingerprints {self.fingerprint} and "
                f"{other.fingerprint}); collect both with the same decoupler"
            )

    def index(self, layer: str | int) -> int:
        """Which of `layers` a name or a number, also one from the end, stands for.

        Raises:
            OptionError: None.
        """
        if isinstance(layer, str) and layer in self.layers:
            return self.layers.index(layer)
        if isinstance(layer, int) and not isinstance(layer, bool) and -len(self.layers) <= layer < len(self.layers):
            return layer % len(self.layers)
        raise OptionError(f"layer must be one of {quoted(self.layers, 5)}, or its index, got {layer!r}")

    def _columns(self, layer: str | int) -> slice:
        ends = list(accumulate(self.channels))
        index = self.index(layer)
        return slice(ends[index] - self.channels[index], ends[index])

    def _need_labels(self, what: str) -> Tensor:
        if self.labels is None:
            raise LabelError(f"{what} need labels, and the loader gave none; pass batches of (inputs, labels)")
        return self.labels
