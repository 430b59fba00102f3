"""`HeadMoments`: mean and second moments of the head's input, all that a closed-form refit needs of the data.

K features, C classes. State is O(K^2 + C K), whatever the number of samples.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.core.check import integer
from captum_classfilters.core.class_sums import class_correlation
from captum_classfilters.core.errors import EmptyLoaderError, MergeError, OptionError, ShapeError
from captum_classfilters.core.files import checked_tensor, contents, read, text, write
from captum_classfilters.core.head import Head, head_facts
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.core.ranks import Ranks, group_of, sum_over

_KIND, _VERSIONS = "HeadMoments", (2, 1)
_BY_CLASS = ("class_counts", "class_totals")


@dataclass(frozen=True, eq=False)
class HeadMoments:
    """Sums of the head's input features and of their products.

    Attributes:
        total: ``(K,)`` float64, sum of ``f``.
        second: ``(K, K)`` float64, sum of ``f f^T``.
        count: Samples behind them.
        layer: Name of the head.
        about: What is unusual of the head, as `Head.about` tells it.
        class_counts: ``(C,)`` int64, samples of each class; None without labels.
        class_totals: ``(C, K)`` float64, sum of ``f`` over the samples of each class; None without labels.

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
    class_counts: Tensor | None = None
    class_totals: Tensor | None = None

    def __post_init__(self) -> None:
        channels = len(self.total) if self.total.dim() == 1 else -1
        if self.second.shape != (channels, channels):
            raise ShapeError(
                f"total must have shape (K,) and second (K, K), got {tuple(self.total.shape)} and "
                f"{tuple(self.second.shape)}"
            )
        counts, totals = self.class_counts, self.class_totals
        if (counts is None) != (totals is None) or (
            counts is not None and totals is not None and totals.shape != (len(counts), channels)
        ):
            shapes = [None if part is None else tuple(part.shape) for part in (counts, totals)]
            raise ShapeError(
                f"class_counts and class_totals must have shapes (C,) and (C, {channels}), or both be None; got "
                f"{shapes[0]} and {shapes[1]}"
            )

    def __repr__(self) -> str:
        classes = "" if self.class_counts is None else f", {len(self.class_counts)} classes"
        return f"HeadMoments({self.num_features} features of {self.layer!r}, {self.count} samples{classes})"

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

    @property
    def class_means(self) -> Tensor:
        """``(C, K)`` float64; NaN for a class without samples."""
        counts, totals = self._by_class()
        return totals / counts.double().masked_fill(counts == 0, torch.nan)[:, None]

    @property
    def pooled(self) -> Tensor:
        """``(K, K)`` float64: covariance of the features around the mean of their own class."""
        counts, totals = self._by_class()
        return (self.second - (totals / counts.clamp(min=1)[:, None]).T @ totals) / self.count

    @property
    def class_covariance(self) -> Tensor:
        """``(C, K)`` float64: covariance of being of each class, 0 or 1, with each feature."""
        counts, totals = self._by_class()
        return totals / self.count - torch.outer(counts.double() / self.count, self.mean)

    @property
    def class_correlation(self) -> Tensor:
        """``(C, K)`` float64 in [-1, 1]: the same as correlation; 0 where either is constant."""
        counts, totals = self._by_class()
        squares = (self.second.diagonal() / len(counts)).expand_as(totals)
        return class_correlation(counts, totals, squares)

    def _by_class(self) -> tuple[Tensor, Tensor]:
        if self.class_counts is None or self.class_totals is None:
            raise OptionError(
                "these moments were collected without labels; "
                "use HeadMoments.collect(model, loader, by_class=True) with a loader of (inputs, labels)"
            )
        return self.class_counts, self.class_totals

    @classmethod
    def collect(
        cls,
        model: Any,
        loader: Iterable[Any] | None = None,
        *,
        layer: nn.Module | str | None = None,
        by_class: bool = False,
        distributed: Ranks = None,
    ) -> "HeadMoments":
        """One pass over a loader; labels are needed only for ``by_class``.

        Args:
            model: The network, borrowed; or a `HeadPass`.
            loader: Batches of inputs, or ``(inputs, labels)``: images on which the smaller head will not be judged.
                Left out with a `HeadPass`.
            layer: The head, if it cannot be found; left out with a `HeadPass`.
            by_class: Also keep the means of each class, for refits that learn from labels.
            distributed: As for `InfluentialFeatures.attribute`.

        Raises:
            HeadError, ShapeError, EmptyLoaderError, NonFiniteError: The head or a batch cannot be read.
            MergeError: The ranks' sums do not belong together.

        Whatever ends the pass early carries the sums of the batches before it as ``error.partial_result``.
        """
        group = group_of(distributed)
        sums, head_pass = _Sums(by_class), HeadPass.of(model, loader, layer)
        try:
            with head_pass.batches(need_labels=True if by_class else None, description="HeadMoments") as stream:
                for batch in stream:
                    sums.add(batch.features, batch.head, batch.labels)
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
            if _num_classes(part) != _num_classes(first):
                raise MergeError(
                    f"{first} and {part} do not have the same classes; collect all with by_class=True, or none"
                )
        names = ("total", "second") if first.class_counts is None else ("total", "second", *_BY_CLASS)
        sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in names}
        count = sum(p.count for p in parts)
        return HeadMoments(**sums, count=count, layer=first.layer, about=first.about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; whole or not at all."""
        meta = {"count": self.count, "layer": self.layer, "about": dict(self.about)}
        # without classes a file is as it always was: older versions read it
        version = 1 if self.class_counts is None else 2
        write(path, self._tensors(), kind=_KIND, version=version, meta=meta)

    def _tensors(self) -> dict[str, Tensor]:
        names = ("total", "second") if self.class_counts is None else ("total", "second", *_BY_CLASS)
        return {name: getattr(self, name) for name in names}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadMoments":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            FileFormatError: Broken, truncated, foreign, or of another schema version.
        """
        tensors, about = read(path, kind=_KIND, version=_VERSIONS)
        with contents(path, "whole moments"):
            channels = tensors["total"].shape[-1]
            total = checked_tensor(tensors, "total", torch.float64, channels)
            second = checked_tensor(tensors, "second", torch.float64, channels, channels)
            count, layer = integer(about["count"], "count", 1, 2**62), text(about["layer"], "layer")
            if set(tensors) not in ({"total", "second"}, {"total", "second", *_BY_CLASS}):
                raise ValueError(f"expected total and second, and those by class or not; got {sorted(tensors)}")
            by_class: list[Tensor] = []
            if "class_counts" in tensors:
                classes = tensors["class_counts"].shape[-1]
                by_class.append(checked_tensor(tensors, "class_counts", torch.int64, classes))
                by_class.append(checked_tensor(tensors, "class_totals", torch.float64, classes, channels))
            return cls(total, second, count, layer, head_facts(about.get("about", {})), *by_class)


def _num_classes(moments: HeadMoments) -> int | None:
    return None if moments.class_counts is None else len(moments.class_counts)


class _Sums:
    """The running sums of one pass, on the model's device."""

    def __init__(self, by_class: bool) -> None:
        self._by_class = by_class
        self._state: tuple[Tensor, Tensor, int, dict[str, Tensor]] | None = None
        self._layer = ""
        self._about: dict[str, Any] = {}

    def add(self, features: Tensor, head: Head, labels: Tensor | None) -> None:
        self._layer, self._about = head.name, head.about()
        features = features.double()
        total, second, count = features.sum(0), features.T @ features, len(features)
        classes: dict[str, Tensor] = {}
        if self._by_class and labels is not None:
            # the sums of the classes as a product: the same in every run, which index_add_ on a GPU is not
            own = torch.zeros(head.num_classes, count, dtype=torch.float64, device=features.device)
            own[labels, torch.arange(count, device=labels.device)] = 1.0
            classes = {"class_counts": labels.bincount(minlength=head.num_classes), "class_totals": own @ features}
        if self._state is not None:
            # in place: K x K is large, and an interrupted addition is made good by assigning all at once
            classes = {name: self._state[3][name] + part for name, part in classes.items()}
            total, second, count = self._state[0] + total, second.add_(self._state[1]), self._state[2] + count
        self._state = (total, second, count, classes)

    def moments(self) -> HeadMoments | None:
        if self._state is None:
            return None
        total, second, count, classes = self._state
        on_cpu = {name: part.cpu() for name, part in classes.items()}
        return HeadMoments(total.cpu(), second.cpu(), count, self._layer, self._about, **on_cpu)


def _all_ranks(mine: HeadMoments | None, group: Any, model: Any) -> HeadMoments:
    tensors = about = None
    if mine is not None:
        tensors = {**mine._tensors(), "count": torch.tensor(mine.count)}
        about = (mine.layer, dict(mine.about))
    try:
        sums, (layer, facts) = sum_over(group, tensors, about, network=model)
    except MergeError as error:
        error.partial_result = mine  # type: ignore[attr-defined]
        raise
    count = int(sums.pop("count"))
    return HeadMoments(**sums, count=count, layer=layer, about=facts)


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
