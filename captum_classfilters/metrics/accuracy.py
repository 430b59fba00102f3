"""Accuracy of the head when each class keeps its k best channels, for every k and every table in one pass."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_table, named_tables, names_of
from captum_classfilters.core.check import integers
from captum_classfilters.core.control import Control
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import Batch, HeadPass
from captum_classfilters.core.intervals import chance_shares, shares, with_all
from captum_classfilters.core.many_labels import ManyScores
from captum_classfilters.heads.moments import HeadMoments
from captum_classfilters.heads.refitting import Fitter, RefitOptions, as_moments, fitter, refit_options

# How many weights of sparse heads are multiplied at once
_CELLS = 2**24


def accuracy_curve(
    model: Any,
    filters: ClassFilters | Mapping[Any, ClassFilters] | None,
    loader: Iterable[Any] | None = None,
    ks: Sequence[int] = (1, 3, 5, 10),
    *,
    refit: str | RefitOptions | None = None,
    moments: HeadMoments | HeadPass | None = None,
    layer: nn.Module | str | None = None,
    control: Control = Control(),
) -> pd.DataFrame:
    """Accuracy when class y's logit is ``sum of W_yj f_j over its top-k channels + b_y``, against k.

    Source: Badola et al. 2022, section 4.2 and figure 1 (``A_d``, ``A_f`` and ``r_A = A_d / A_f``). Differs from the
    paper: all k and all tables share one pass; there are intervals, a random control, and refits.

    Args:
        model: The network; borrowed, given back as it was. Or a `HeadPass`; then ``loader`` is left out.
        filters: A table, or tables by name. A table of the random selector is left out: the control replaces it. A
            class without samples in a table keeps its bias alone, in the control as well. None with a refit that
            chooses its own channels: ``"omp"``, or one from labels.
        loader: Batches ``(inputs, labels)`` of images that were not used to make the tables or moments.
        ks: Numbers of channels kept for each class, in ``[1, K]``.
        refit: As for `heads.decompose`. The weights of every table and of the control are refitted alike; ``"omp"``
            chooses its own channels, and the control is refitted by least squares. With shared channels the control
            reads any.
        moments: `HeadMoments` or a `HeadPass`, for the refits, as for `heads.decompose`.
        layer: The head, if it cannot be found.
        control: Random tables.

    Returns:
        One row for each table, k and class, and for ``class_name == "all"``. ``filters``: the name, ``"dense"`` for the
        full head (k = K), the refit's where it chose, or ``"random"`` for the control, whose rows have ``control``
        True. ``accuracy``: share of samples classified correctly (for a class: its recall); ``low``, ``high``: Wilson
        95 % interval, for the control of the mean over its draws; ``relative``: accuracy divided by the accuracy of the
        full head; ``agreement``: share of samples for which the full head predicts the same class; ``samples``. With a
        refit's own choice no table names the classes; their names are those of the `HeadPass`, or numbers.

        Of many labels, ``(N, C)`` rows of 0 and 1, in the place of ``accuracy``: ``average_precision`` of the class's
        logits, ``ap_low``, ``ap_high``; ``balanced_accuracy`` of their signs, ``low``, ``high``: bootstrap 95 %
        intervals over samples, for the control Student-t over its draws. ``"all"``: means over the classes that some
        samples have and some have not. ``relative``: average precision divided by that of the full head;
        ``agreement``: share of samples whose logit has the sign that the full head gives; ``samples``: those that
        have the label. N x K features are kept.

    Raises:
        OptionError: k is out of range, there is no table, a name is taken, or a refit has too few samples.
        ShapeError: A table or the moments belong to another network.
    """
    head_pass = HeadPass.of(model, loader, layer)
    options = refit_options(refit, filters, moments)
    moments = None if options is None else as_moments(options, moments)
    chosen = options is not None and filters is None
    tables = {} if chosen else named_tables(filters, ("dense", "random", "omp"))
    owner = moments.head if isinstance(moments, HeadPass) else moments
    channels = next((table.num_channels for table in tables.values()), getattr(owner, "num_features", 0))
    ks = integers(ks, "ks", 1, channels, meaning="the number of channels")
    names = next((table.class_names for table in tables.values()), None)
    with head_pass.batches(description="accuracy_curve", many_labels=True) as stream:
        many, batches = ManyScores.read(stream, control.seed)
        first = next(batches, None) if many is None else None
        head: Head = (many or first).head  # type: ignore[union-attr]
        if names is None:
            names = names_of(head_pass.class_names, head.num_classes, head_pass.loader, head_pass.model)
        counts = KeepCounts(head, tables, ks, control, options, moments)
        if many is not None:
            return counts.frame_of_many(many, names)
        for batch in chain([first], batches):
            counts.add(batch)  # type: ignore[arg-type]
    return counts.frame(names)


class KeepCounts:
    """Counts of correct predictions, and of those that agree with the full head, with k channels for each class.

    Args:
        head: The head.
        tables: Tables by name; none with a refit that chooses its own channels.
        ks: Numbers of channels kept for each class, in rising order.
        control: Random tables.
        refit: As for `accuracy_curve`.
        moments: As for `accuracy_curve`.
    """

    def __init__(
        self,
        head: Head,
        tables: Mapping[str, ClassFilters],
        ks: Sequence[int],
        control: Control,
        refit: RefitOptions | None = None,
        moments: HeadMoments | HeadPass | None = None,
    ) -> None:
        self._names, self._ks, self._draws = list(tables) or [_name_of(refit)], ks, control.draws
        self._size, self._weight = (head.num_classes, head.num_features), head.weight
        refitter = None if refit is None else fitter(refit, moments, head)
        rankings = _rankings(head, tables, control)
        self._heads = [] if tables or refitter is None else _own_choice(head, refit, refitter, ks)
        self._heads += [_small(head, ranking, k, refitter) for ranking in rankings for k in ks]
        device, classes = self._weight.device, head.num_classes
        self._step = max(1, _CELLS // self._weight.numel())
        self._right = torch.zeros(len(self._heads), classes, dtype=torch.int64, device=device)
        self._agreed = torch.zeros_like(self._right)
        self._dense = torch.zeros(classes, dtype=torch.int64, device=device)
        self._samples = torch.zeros_like(self._dense)
        # few heads are spread out once; many would not fit into memory and are spread out for every batch
        self._together = self._spread(self._heads) if len(self._heads) <= self._step else None

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        labels: Tensor = batch.labels  # type: ignore[assignment]
        dense = batch.logits.argmax(1)
        self._samples.index_add_(0, labels, torch.ones_like(labels))
        self._dense.index_add_(0, labels, (dense == labels).long())
        features = batch.features.to(self._weight.dtype)
        for start in range(0, len(self._heads), self._step):
            heads = self._heads[start : start + self._step]
            weight, bias = self._together or self._spread(heads)
            predicted = F.linear(features, weight, bias).view(len(features), len(heads), -1).argmax(2)
            part = slice(start, start + len(heads))
            self._right[part].T.index_add_(0, labels, (predicted == labels[:, None]).long())
            self._agreed[part].T.index_add_(0, labels, (predicted == dense[:, None]).long())

    def _spread(self, heads: list["_Small"]) -> tuple[Tensor, Tensor]:
        """Concatenate the dense weights and biases of several heads."""
        weight = self._weight.new_zeros(len(heads), *self._size)
        for dense, small in zip(weight, heads, strict=True):
            dense.scatter_(1, small.indices, small.weight)
        return weight.flatten(0, 1), torch.cat([small.bias for small in heads])

    def frame(self, class_names: Sequence[str]) -> pd.DataFrame:
        """The frame that `accuracy_curve` returns."""
        shape = (-1, len(self._ks), self._size[0])
        right, agreed = (with_all(counts.view(shape).cpu().numpy()) for counts in (self._right, self._agreed))
        samples, dense = (with_all(counts.cpu().numpy()) for counts in (self._samples, self._dense))
        # the relative accuracy is NaN, not infinity, where the full head classifies nothing correctly
        dense_share = np.where(dense > 0, shares(dense, samples)[0], np.nan)

        def rows(name: str, k: int, interval: tuple[Any, Any, Any], agreement: Any) -> pd.DataFrame:
            accuracy, low, high = interval
            return pd.DataFrame(
                {
                    "filters": name,
                    "control": name == "random",
                    "k": k,
                    "class_name": ["all", *class_names],
                    "accuracy": accuracy,
                    "low": low,
                    "high": high,
                    "relative": accuracy / dense_share,
                    "agreement": agreement,
                    "samples": samples,
                }
            )

        parts = [rows("dense", self._size[1], shares(dense, samples), np.ones(len(samples)))]
        for index, name in enumerate(self._names):
            for place, k in enumerate(self._ks):
                agreement = shares(agreed[index, place], samples)[0]
                parts.append(rows(name, k, shares(right[index, place], samples), agreement))
        for place, k in enumerate(self._ks):
            drawn = slice(len(self._names), None)
            agreement = shares(agreed[drawn, place], samples)[0].mean(0)
            parts.append(rows("random", k, chance_shares(right[drawn, place], samples), agreement))
        return pd.concat(parts, ignore_index=True)

    def frame_of_many(self, scores: ManyScores, class_names: Sequence[str]) -> pd.DataFrame:
        """The frame that `accuracy_curve` returns of many labels."""
        features, dense = scores.features, scores.logits
        heads: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        for index, small in enumerate(self._heads):
            table, place = divmod(index, len(self._ks))
            name = self._names[table] if table < len(self._names) else "random"
            heads.setdefault((name, self._ks[place]), []).append(self._spread([small]))
        whole = scores.columns(dense)

        def rows(name: str, k: int, columns: dict[str, Any], agreement: Any) -> pd.DataFrame:
            return pd.DataFrame(
                {
                    "filters": name,
                    "control": name == "random",
                    "k": k,
                    "class_name": ["all", *class_names],
                    **columns,
                    "relative": columns["average_precision"] / whole["average_precision"],
                    "agreement": agreement,
                    "samples": scores.samples,
                }
            )

        parts = [rows("dense", features.shape[1], whole, 1.0)]
        for (name, k), small_heads in heads.items():
            logits = [F.linear(features.to(weight.dtype), weight, bias) for weight, bias in small_heads]
            columns = scores.chance_columns(logits) if name == "random" else scores.columns(logits[0])
            same = torch.stack([((few > 0) == (dense > 0)).double().mean(0) for few in logits]).mean(0).cpu().numpy()
            parts.append(rows(name, k, columns, np.append(same.mean(), same)))
        return pd.concat(parts, ignore_index=True)


class _Small(NamedTuple):
    """A head that reads k features for each class."""

    indices: Tensor  # (C, k)
    weight: Tensor  # (C, k)
    bias: Tensor  # (C,)


def _name_of(refit: RefitOptions | None) -> str:
    return "omp" if refit is None else refit.name


def _rankings(head: Head, tables: Mapping[str, ClassFilters], control: Control) -> list[tuple[Tensor, Tensor]]:
    """For every table and draw: channels of each class, best first, ``(C, K)``, and which classes have samples."""
    for table in tables.values():
        check_table(table, head)
    everyone = torch.ones(head.num_classes, dtype=torch.bool)
    rankings = [(table.ranking(), table.seen) for table in tables.values()]
    seen = torch.stack([seen for _, seen in rankings]).any(0) if rankings else everyone
    rankings += [(ranking, seen) for ranking in control.rankings(head.weight.shape)]
    return [(ranking.to(head.weight.device), seen.to(head.weight.device)) for ranking, seen in rankings]


def _own_choice(head: Head, refit: Any, made: Fitter, ks: Sequence[int]) -> list["_Small"]:
    """Heads of the refit's own choice, for all ks."""
    everyone = torch.ones(head.num_classes, dtype=torch.bool, device=head.weight.device)
    if refit.shared is not None:
        # which channels are shared depends on k
        return [_small(head, (made.pursue(k).to(everyone.device), everyone), k, made) for k in ks]
    ranking = made.pursue(max(ks)).to(everyone.device)
    return [_small(head, (ranking, everyone), k, made) for k in ks]


def _small(head: Head, ranking: tuple[Tensor, Tensor], k: int, refitter: Fitter | None) -> _Small:
    indices, seen = ranking[0][:, :k], ranking[1]
    weight, bias = head.weight.gather(1, indices), head.bias
    if refitter is not None:
        fitted, shifted, _ = refitter.fit(indices)
        weight, bias = fitted.to(weight), torch.where(seen, shifted.to(bias), bias)
    return _Small(indices, weight * seen[:, None], bias)
