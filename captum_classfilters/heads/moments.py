"""`HeadMoments`: mean and second moments of the head's input, all that a closed-form refit needs of the data.

K features. State is O(K^2), whatever the number of samples.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import EmptyLoaderError, MergeError, OptionError, ShapeError
from captum_classfilters.core.files import checked_tensor, contents, read, text, write
from captum_classfilters.core.head import Head, head_facts
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.core.ranks import Ranks, group_of, sum_over

_KIND, _VERSION = "HeadMoments", 1


@dataclass(frozen=True, eq=False)
class HeadMoments:
    """Sums of the head's input features and of their products.

    Attributes:
        total: ``(K,)`` float64, sum of ``f``.
        second: ``(K, K)`` float64, sum of ``f f^T``.
        count: Samples behind them.
        layer: Name of the head.
        about: What is unusual of the head, as `Head.about` tells it.

    Raises:
        ShapeError: The shapes do not agree.

    Example:
        >>> features = torch.rand(100, 3, dtype=torch.float64)
        >>> moments = HeadMoments(features.sum(0), features.T @ features, 100, "fc")
        >>> torch.allclose(moments.covariance, features.T.cov(correction=0))
        True
    """

    total: Tensor
    second: Tensor
    count: int
    layer: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        channels = len(self.total) if self.total.dim() == 1 else -1
        if self.second.shape != (channels, channels):
            raise ShapeError(
                f"total must have shape (K,) and second (K, K), got {tuple(self.total.shape)} and "
                f"{tuple(self.second.shape)}"
            )

    def __repr__(self) -> str:
        return f"HeadMoments({self.num_features} features of {self.layer!r}, {self.count} samples)"

    @property
    def num_features(self) -> int:
        """K."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """``(K,)`` float64."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """``(K, K)`` float64, divided by the number of samples."""
        return self.second / self.count - torch.outer(self.mean, self.mean)

    @classmethod
    def collect(
        cls,
        model: Any,
        loader: Iterable[Any] | None = None,
        *,
        layer: nn.Module | str | None = None,
        distributed: Ranks = None,
    ) -> "HeadMoments":
        """One pass over a loader; labels are not needed.

        Args:
            model: The network, borrowed; or a `HeadPass`.
            loader: Batches of inputs, or ``(inputs, labels)``: images on which the smaller head will not be judged.
                Left out with a `HeadPass`.
            layer: The head, if it cannot be found; left out with a `HeadPass`.
            distributed: As for `InfluentialFeatures.attribute`.

        Raises:
            HeadError, ShapeError, EmptyLoaderError, NonFiniteError: The head or a batch cannot be read.
            MergeError: The ranks' sums do not belong together.

        Whatever ends the pass early carries the sums of the batches before it as ``error.partial_result``.
        """
        group = group_of(distributed)
        sums, head_pass = _Sums(), HeadPass.of(model, loader, layer)
        try:
            with head_pass.batches(need_labels=None, description="HeadMoments") as stream:
                for batch in stream:
                    sums.add(batch.features, batch.head)
        except EmptyLoaderError:
            if group is None:
                raise
        except BaseException as error:
            if (partial := sums.moments()) is not None:
                error.partial_result = partial  # type: ignore[attr-defined]
            raise
        mine = sums.moments()
        return mine if group is None else _all_ranks(mine, group, head_pass.model)  # type: ignore[return-value]

    @staticmethod
    def merge(*parts: "HeadMoments") -> "HeadMoments":
        """Put moments of disjoint shards together: the same as one pass over all of them, up to rounding (1e-12).

        Raises:
            MergeError: No parts, or parts of different layers or numbers of features.
        """
        if not parts or not all(isinstance(part, HeadMoments) for part in parts):
            raise MergeError(
                f"merge takes moments one by one, merge(*parts); got {[type(p).__name__ for p in parts] or 'none'}"
            )
        first = parts[0]
        for part in parts[1:]:
            if (part.layer, part.num_features) != (first.layer, first.num_features):
                raise MergeError(f"{first} and {part} are of different networks; merge moments of one")
        total, second = sum(p.total for p in parts), sum(p.second for p in parts)
        count = sum(p.count for p in parts)
        return HeadMoments(total, second, count, first.layer, first.about)  # type: ignore[arg-type]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; whole or not at all."""
        tensors = {"total": self.total, "second": self.second}
        meta = {"count": self.count, "layer": self.layer, "about": dict(self.about)}
        write(path, tensors, kind=_KIND, version=_VERSION, meta=meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadMoments":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            FileFormatError: Broken, truncated, foreign, or of another schema version.
        """
        tensors, about = read(path, kind=_KIND, version=_VERSION, tensors=("total", "second"))
        with contents(path, "whole moments"):
            channels = tensors["total"].shape[-1]
            total = checked_tensor(tensors, "total", torch.float64, channels)
            second = checked_tensor(tensors, "second", torch.float64, channels, channels)
            count, layer = integer(about["count"], "count", 1, 2**62), text(about["layer"], "layer")
            return cls(total, second, count, layer, head_facts(about.get("about", {})))


class _Sums:
    """The running sums of one pass, on the model's device."""

    def __init__(self) -> None:
        self._state: tuple[Tensor, Tensor, int] | None = None
        self._layer = ""
        self._about: dict[str, Any] = {}

    def add(self, features: Tensor, head: Head) -> None:
        self._layer, self._about = head.name, head.about()
        features = features.double()
        total, second, count = features.sum(0), features.T @ features, len(features)
        if self._state is not None:
            # in place: K x K is large, and an interrupted addition is made good by assigning all three at once
            total, second, count = self._state[0] + total, second.add_(self._state[1]), self._state[2] + count
        self._state = (total, second, count)

    def moments(self) -> HeadMoments | None:
        if self._state is None:
            return None
        total, second, count = self._state
        return HeadMoments(total.cpu(), second.cpu(), count, self._layer, self._about)


def _all_ranks(mine: HeadMoments | None, group: Any, model: Any) -> HeadMoments:
    tensors = about = None
    if mine is not None:
        tensors = {"total": mine.total, "second": mine.second, "count": torch.tensor(mine.count)}
        about = (mine.layer, dict(mine.about))
    try:
        sums, (layer, facts) = sum_over(group, tensors, about, network=model)
    except MergeError as error:
        error.partial_result = mine  # type: ignore[attr-defined]
        raise
    return HeadMoments(sums["total"], sums["second"], int(sums["count"]), layer, facts)


def check_moments(moments: Any, layer: str, channels: int) -> HeadMoments:
    """Refuse what is not the moments of this head."""
    if not isinstance(moments, HeadMoments):
        raise OptionError(f"a refit needs moments=HeadMoments.collect(model, loader), got {type(moments).__name__}")
    if (moments.layer, moments.num_features) != (layer, channels):
        raise ShapeError(
            f"the moments are of {moments.num_features} features of layer {moments.layer!r}, the head {layer!r} has "
            f"{channels}; collect them with this model"
        )
    return moments
