"""Accuracy of the head when each class keeps its k best channels, for every k and every table in one pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_k, check_table, named_tables, names_of
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import batches
from captum_classfilters.heads.decompose import check_refit
from captum_classfilters.heads.moments import HeadMoments, check_moments
from captum_classfilters.heads.refits import Refitter
from captum_classfilters.metrics.intervals import mean_interval, wilson, with_all

# The heads of many settings are multiplied at once, up to this many weights
_CELLS = 2**24


def accuracy_curve(
    model: Any,
    filters: ClassFilters | Mapping[Any, ClassFilters] | None,
    loader: Iterable[Any],
    ks: Sequence[int],
    *,
    refit: str | None = None,
    moments: HeadMoments | None = None,
    layer: nn.Module | str | None = None,
    additional_forward_args: Any = None,
    class_names: Sequence[str] | None = None,
    draws: int = 5,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Accuracy when class y's logit is ``sum of W_yj f_j over its top-k channels + b_y``, against k.

    Source: Badola et al. 2022, section 4.2 and figure 1 (``A_d``, ``A_f`` and ``r_A = A_d / A_f``). Differs from the
    paper: all k and all tables in one pass, intervals, and a random control; refits.

    Args:
        model: The network; borrowed, given back as it was.
        filters: A table, or tables by name; one of the random selector is left out, for the control stands for it. A
            class without samples in a table keeps its bias alone, in the control as well. None with ``refit="omp"``.
        loader: Batches ``(inputs, labels)``: images that had no part in making the tables or moments.
        ks: Channels kept for each class, each in ``[1, K]``.
        refit: As for `heads.decompose`: ``"least_squares"`` refits every table's weights, those of the control, too;
            ``"omp"`` chooses its own channels, and the control is refitted by least squares.
        moments: `HeadMoments`, for the refits.
        layer: The head, if it cannot be found.
        additional_forward_args: Passed on to every forward pass.
        class_names: With ``refit="omp"``, where no table names the classes; otherwise numbers.
        draws: Random tables for the control, at least 5.
        seed: Of the control.
        show_progress: A tqdm bar.

    Returns:
        One row for each table, k and class, and for ``class_name == "all"``. ``filters``: the name, ``"dense"`` for the
        full head (k = K), ``"random"`` for the control, ``"omp"``. ``accuracy``: share classified right (of a class:
        its recall); ``low``, ``high``: Wilson 95 % interval, of the mean of its draws for the control; ``relative``:
        accuracy over the dense one; ``agreement``: share whose prediction is the dense one; ``samples``.

    Raises:
        OptionError: k out of range, fewer than 5 draws, no table, a name that is taken, too few samples for a refit.
        ShapeError: A table or moments of another network.
    """
    check_draws(draws)
    check_refit(refit, filters, moments)
    tables = {} if refit == "omp" else named_tables(filters, ("dense", "random", "omp"))
    if tables and class_names is not None:
        raise OptionError('the tables name the classes; class_names= is for refit="omp", which has none')
    ks = list(ks) if isinstance(ks, Iterable) else ks
    if not isinstance(ks, list) or not ks:
        raise OptionError(f"ks must be a list of at least one number of channels, got {ks!r}")
    channels = next((table.num_channels for table in tables.values()), getattr(moments, "num_features", 0))
    for k in ks:
        check_k(k, channels, "k")
    ks = sorted({int(k) for k in ks})
    counter: _Counter | None = None
    with batches(
        model,
        loader,
        layer=layer,
        forward_args=additional_forward_args,
        show_progress=show_progress,
        description="accuracy_curve",
    ) as stream:
        for batch in stream:
            if counter is None:
                classes = _class_names(class_names, tables, batch.head.num_classes)
                refitter = _refitter(batch.head, moments)
                rankings = _rankings(batch.head, tables, refitter if refit == "omp" else None, max(ks), draws, seed)
                heads = [_small(batch.head, ranking, k, refitter) for ranking in rankings for k in ks]
                counter = _Counter(batch.head, heads, (len(rankings), len(ks)))
            counter.add(batch.features, batch.logits, batch.labels)  # type: ignore[arg-type]
    return _frame(counter.counts(), list(tables) or ["omp"], ks, draws, classes, channels)  # type: ignore[union-attr]


class _Small(NamedTuple):
    """A head that reads k features for each class."""

    indices: Tensor  # (C, k)
    weight: Tensor  # (C, k)
    bias: Tensor  # (C,)


def _class_names(given: Sequence[str] | None, tables: Mapping[str, ClassFilters], classes: int) -> Sequence[str]:
    if tables:
        return next(iter(tables.values())).class_names
    return names_of(given, classes)


def _refitter(head: Head, moments: HeadMoments | None) -> Refitter | None:
    if moments is None:
        return None
    return Refitter(check_moments(moments, head.name, head.num_features), head.weight, head.bias)


def _rankings(
    head: Head, tables: Mapping[str, ClassFilters], pursuer: Refitter | None, most: int, draws: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Channels of each class, best first, ``(C, K)``, of every table and every draw; and which classes have any."""
    for table in tables.values():
        check_table(table, head)
    everyone = torch.ones(head.num_classes, dtype=torch.bool)
    found = [(table.ranking(), table.seen) for table in tables.values()]
    if pursuer is not None:
        found.append((pursuer.pursue(most), everyone))
    seen = torch.stack([seen for _, seen in found]).any(0)
    generator = torch.Generator().manual_seed(seed)
    size = (head.num_classes, head.num_features)
    found += [(torch.rand(size, generator=generator).argsort(1), seen) for _ in range(draws)]
    return [(ranking.to(head.weight.device), seen.to(head.weight.device)) for ranking, seen in found]


def _small(head: Head, ranking: tuple[Tensor, Tensor], k: int, refitter: Refitter | None) -> _Small:
    indices, seen = ranking[0][:, :k], ranking[1]
    weight, bias = head.weight.gather(1, indices), head.bias
    if refitter is not None:
        fitted, shifted, _ = refitter.fit(indices)
        weight, bias = fitted.to(weight.dtype), torch.where(seen, shifted.to(bias.dtype), bias)
    return _Small(indices, weight * seen[:, None], bias)


class _Counts(NamedTuple):
    samples: Any  # (C,)
    dense: Any  # (C,) right
    right: Any  # (ranks, ks, C)
    agreed: Any  # (ranks, ks, C)


class _Counter:
    """Right and agreeing predictions of each head, by class."""

    def __init__(self, head: Head, heads: list[_Small], shape: tuple[int, ...]) -> None:
        self._size, self._like, self._heads = (head.num_classes, head.num_features), head.weight, heads
        device, classes = self._like.device, head.num_classes
        self._shape = (*shape, classes)
        self._step = max(1, _CELLS // self._like.numel())
        self._right = torch.zeros(len(heads), classes, dtype=torch.int64, device=device)
        self._agreed = torch.zeros_like(self._right)
        self._dense = torch.zeros(classes, dtype=torch.int64, device=device)
        self._samples = torch.zeros_like(self._dense)
        # few heads stay as they are, many are spread out anew for every batch
        self._together = self._spread(heads) if len(heads) <= self._step else None

    def add(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        dense = logits.argmax(1)
        self._samples.index_add_(0, labels, torch.ones_like(labels))
        self._dense.index_add_(0, labels, (dense == labels).long())
        features = features.to(self._like.dtype)
        for start in range(0, len(self._heads), self._step):
            heads = self._heads[start : start + self._step]
            weight, bias = self._together or self._spread(heads)
            predicted = F.linear(features, weight, bias).view(len(features), len(heads), -1).argmax(2)
            part = slice(start, start + len(heads))
            self._right[part].T.index_add_(0, labels, (predicted == labels[:, None]).long())
            self._agreed[part].T.index_add_(0, labels, (predicted == dense[:, None]).long())

    def _spread(self, heads: list[_Small]) -> tuple[Tensor, Tensor]:
        """Dense weights and biases of several heads, one after another."""
        weight = self._like.new_zeros(len(heads), *self._size)
        for dense, small in zip(weight, heads, strict=True):
            dense.scatter_(1, small.indices, small.weight)
        return weight.flatten(0, 1), torch.cat([small.bias for small in heads])

    def counts(self) -> _Counts:
        right, agreed = (table.view(self._shape).cpu().numpy() for table in (self._right, self._agreed))
        return _Counts(self._samples.cpu().numpy(), self._dense.cpu().numpy(), right, agreed)


def _frame(
    counts: _Counts, names: list[str], ks: Sequence[int], draws: int, class_names: Sequence[str], channels: int
) -> pd.DataFrame:
    """A row for all classes together and one for each."""
    samples, dense, right, agreed = map(with_all, counts)
    groups = ["all", *class_names]

    def rows(name: str, k: int, accuracy: Any, low: Any, high: Any, agreement: Any) -> pd.DataFrame:
        with np.errstate(invalid="ignore", divide="ignore"):
            # NaN, not infinity, where the full head gets nothing right
            relative = accuracy / np.where(dense > 0, dense / samples, np.nan)
        return pd.DataFrame(
            {
                "filters": name,
                "k": k,
                "class_name": groups,
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "relative": relative,
                "agreement": agreement,
                "samples": samples,
            }
        )

    with np.errstate(invalid="ignore", divide="ignore"):
        shares, agreements, dense_share = right / samples, agreed / samples, dense / samples
    parts = [rows("dense", channels, dense_share, *wilson(dense, samples), np.ones(len(groups)))]
    for index, name in enumerate(names):
        for place, k in enumerate(ks):
            interval = wilson(right[index, place], samples)
            parts.append(rows(name, k, shares[index, place], *interval, agreements[index, place]))
    for place, k in enumerate(ks):
        control = mean_interval(shares[-draws:, place])
        parts.append(rows("random", k, *control, agreements[-draws:, place].mean(0)))
    return pd.concat(parts, ignore_index=True)


def check_draws(draws: int) -> None:
    """A control of fewer than 5 draws says too little."""
    if draws < 5:
        raise OptionError(f"draws must be at least 5, got {draws}; fewer say too little of what chance does")
