"""Accuracy of the head when each class keeps its k best channels, for every k and every table in one pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_k, check_table
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head import Head
from captum_classfilters.core.stream import batches
from captum_classfilters.metrics.intervals import mean_interval, wilson, with_all

# The heads of many settings are multiplied at once, up to this many weights
_CELLS = 2**24


def accuracy_curve(
    model: Any,
    filters: ClassFilters | Mapping[Any, ClassFilters],
    loader: Iterable[Any],
    ks: Sequence[int],
    *,
    layer: nn.Module | str | None = None,
    draws: int = 5,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Accuracy when class y's logit is ``sum of W_yj f_j over its top-k channels + b_y``, against k.

    Source: Badola et al. 2022, section 4.2 and figure 1 (``A_d``, ``A_f`` and ``r_A = A_d / A_f``). Differs from the
    paper: all k and all tables in one pass, intervals, and a random control.

    Args:
        model: The network; borrowed, given back as it was.
        filters: A table, or tables by name; one of the random selector is left out, for the control stands for it. A
            class without samples in a table keeps its bias alone.
        loader: Batches ``(inputs, labels)``: images that had no part in making the tables.
        ks: Channels kept for each class, each in ``[1, K]``.
        layer: The head, if it cannot be found.
        draws: Random tables for the control, at least 5.
        seed: Of the control.
        show_progress: A tqdm bar.

    Returns:
        One row for each table, k and class, and for ``class_name == "all"``. ``filters``: the name, ``"dense"`` for the
        full head (k = K), ``"random"`` for the control. ``accuracy``: share classified right (of a class: its recall);
        ``low``, ``high``: Wilson 95 % interval, for the control that of the mean of its draws; ``relative``: accuracy
        over the dense one; ``agreement``: share whose prediction is the dense one; ``samples``.

    Raises:
        OptionError: k out of range, fewer than 5 draws, no table, a name that is taken.
        ShapeError: A table of another network.
    """
    check_draws(draws)
    tables = named_tables(filters, ("dense", "random"))
    if not isinstance(ks, Iterable) or not len(list(ks)):
        raise OptionError(f"ks must be a list of at least one number of channels, got {ks!r}")
    for table in tables.values():
        for k in ks:
            check_k(k, table.num_channels, "k")
    ks = sorted({int(k) for k in ks})
    first = next(iter(tables.values()))
    counter: _Counter | None = None
    with batches(model, loader, layer=layer, show_progress=show_progress, description="accuracy_curve") as stream:
        for batch in stream:
            if counter is None:
                for table in tables.values():
                    check_table(table, batch.head)
                ranks = [_ranks(table) for table in tables.values()]
                generator = torch.Generator().manual_seed(seed)
                ranks += [_random_ranks(batch.head, generator) for _ in range(draws)]
                counter = _Counter(batch.head, ranks, ks)
            counter.add(batch.features, batch.logits, batch.labels)  # type: ignore[arg-type]
    return _frame(counter.counts(), list(tables), ks, draws, first.class_names, first.num_channels)  # type: ignore[union-attr]


class _Counts(NamedTuple):
    samples: Any  # (C,)
    dense: Any  # (C,) right
    right: Any  # (ranks, ks, C)
    agreed: Any  # (ranks, ks, C)


class _Counter:
    """Right and agreeing predictions of each ranking at each k, by class."""

    def __init__(self, head: Head, ranks: list[Tensor], ks: Sequence[int]) -> None:
        self._weight, self._bias = head.weight, head.bias
        device, classes = self._weight.device, head.num_classes
        self._ranks = torch.stack(ranks).to(device)
        self._settings = [(rank, k) for rank in range(len(ranks)) for k in ks]
        self._shape = (len(ranks), len(ks), classes)
        self._step = max(1, _CELLS // self._weight.numel())
        self._right = torch.zeros(len(self._settings), classes, dtype=torch.int64, device=device)
        self._agreed = torch.zeros_like(self._right)
        self._dense = torch.zeros(classes, dtype=torch.int64, device=device)
        self._samples = torch.zeros_like(self._dense)

    def add(self, features: Tensor, logits: Tensor, labels: Tensor) -> None:
        dense = logits.argmax(1)
        self._samples.index_add_(0, labels, torch.ones_like(labels))
        self._dense.index_add_(0, labels, (dense == labels).long())
        features = features.to(self._weight.dtype)
        for start in range(0, len(self._settings), self._step):
            settings = self._settings[start : start + self._step]
            rank = torch.tensor([r for r, _ in settings], device=self._weight.device)
            k = torch.tensor([k for _, k in settings], device=self._weight.device)
            kept = self._weight * (self._ranks[rank] < k[:, None, None])
            small = F.linear(features, kept.flatten(0, 1)).view(len(features), len(settings), -1) + self._bias
            predicted = small.argmax(2)  # (N, settings)
            part = slice(start, start + len(settings))
            self._right[part].T.index_add_(0, labels, (predicted == labels[:, None]).long())
            self._agreed[part].T.index_add_(0, labels, (predicted == dense[:, None]).long())

    def counts(self) -> _Counts:
        right, agreed = (table.view(self._shape).cpu().numpy() for table in (self._right, self._agreed))
        return _Counts(self._samples.cpu().numpy(), self._dense.cpu().numpy(), right, agreed)


def _ranks(filters: ClassFilters) -> Tensor:
    """Each channel's place in its class's ranking, ``(C, K)``; in an unseen class none is ever among the first k."""
    ranking = filters.ranking()
    places = torch.arange(filters.num_channels).expand_as(ranking)
    ranks = torch.empty_like(ranking).scatter_(1, ranking, places)
    return ranks.masked_fill(~filters.seen[:, None], filters.num_channels).int()


def _random_ranks(head: Head, generator: torch.Generator) -> Tensor:
    return torch.rand(head.num_classes, head.num_features, generator=generator).argsort(1).int()


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


def named_tables(filters: Any, taken: Sequence[str]) -> dict[str, ClassFilters]:
    """Tables by name as text, without those of the random selector; a single table goes by its method."""
    if isinstance(filters, ClassFilters):
        filters = {filters.method: filters}
    if not isinstance(filters, Mapping) or not all(isinstance(table, ClassFilters) for table in filters.values()):
        raise OptionError(f"filters must be a ClassFilters or {{name: ClassFilters}}, got {type(filters).__name__}")
    found = {str(name): table for name, table in filters.items() if table.method != "random"}
    if not found:
        raise OptionError("no table was given but the random selector's, for which the control stands; pass another")
    if len({str(name) for name in filters}) < len(filters):
        raise OptionError(f"the names {list(filters)} are not different as text; rename one")
    if len({table.class_names for table in found.values()}) > 1:
        raise OptionError("the tables name their classes differently; pass tables of one data set")
    for name in found:
        if name in taken:
            raise OptionError(f"a table may not be named {name!r}: the result uses that name itself; rename it")
    return found
