"""What does a network call images when the channels of a class are taken away? The plain network, some channels at 0.

Unlike `class_ablation`, which overwrites each image's own class's channels, the same channels are 0 for all images.
"""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_k, check_table, one_table
from captum_classfilters.core.control import random_masks
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head_pass import Batch, batches
from captum_classfilters.metrics.accuracy import check_draws
from captum_classfilters.metrics.intervals import mean_interval, wilson, with_all

# Features of many sets of channels are multiplied at once, up to this many numbers
_CELLS = 2**24


def masked_confusion(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any],
    classes: Sequence[Any],
    *,
    k: int | None = None,
    threshold: float | None = None,
    layer: nn.Module | str | None = None,
    draws: int = 5,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Confusion matrix of the plain network when the channels of some classes are 0 for all images.

    Source: "Training interpretable CNNs towards class-specific filters", section 4.2 and figure 4. Differs: intervals,
    and a control of as many random channels; all cases in one pass.

    Args:
        model: The network; borrowed.
        filters: Whose channels a class has.
        loader: Batches ``(inputs, labels)``.
        classes: Cases, each a class (name or index) or a tuple of classes whose channels are masked together.
        k: A class's channels are its top k; or
        threshold: all whose score is higher (for a gate .5, and then there may be none). One of the two must be given.
            A class without samples in the table has no channels.
        layer: The head, if it cannot be found.
        draws: Random sets of as many channels for each case, at least 5.
        seed: Of these.
        show_progress: A tqdm bar.

    Returns:
        One row for each case, true and predicted class: ``masked`` (``"none"`` comes first, then such as ``"coat"`` or
        ``"coat + bag"``), ``control`` (True for random channels), ``channels`` that are 0, ``class_name`` (true),
        ``predicted``, ``count`` (of the control: mean over draws), ``share`` of the true class's images, NaN where it
        has none, ``low``, ``high`` (Wilson; Student-t over draws for the control).

    Raises:
        OptionError: k, threshold or draws out of range, both or neither given; an unknown or repeated case.
        ShapeError: A table of another network.
    """
    owned = _owned(filters, k, threshold, draws)
    cases = _cases(filters, classes)
    own = torch.stack([owned[list(rows)].any(0) for rows in cases.values()])
    sets = _Sets(own, draws, seed)
    size = filters.num_classes
    counts = torch.zeros(1 + len(sets.masks), size * size, dtype=torch.int64)
    with batches(model, loader, layer=layer, show_progress=show_progress, description="masked_confusion") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            for rows, predicted in _predictions(batch, sets):
                counts[rows] += _tally(batch.labels * size + predicted, size * size)  # type: ignore[operator]
    confusion = counts.view(-1, size, size).numpy()
    parts = [_confusion_frame("none", 0, confusion[0], filters.class_names)]
    for case, (name, channels) in enumerate(zip(cases, own.sum(1).tolist(), strict=True)):
        parts.append(_confusion_frame(name, channels, confusion[sets.own(case)], filters.class_names))
        parts.append(_confusion_frame(name, channels, confusion[sets.random(case)], filters.class_names))
    return pd.concat(parts, ignore_index=True)


def class_masking(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any],
    *,
    k: int | None = None,
    threshold: float | None = None,
    layer: nn.Module | str | None = None,
    draws: int = 5,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Recall of every class when the channels of each class in turn are 0 for all images.

    If filters are class-specific, the class itself is lost and the others stay. Source: as for `masked_confusion`,
    for all classes, each alone.

    Args:
        model: The network; borrowed.
        filters: Whose channels a class has.
        loader: Batches ``(inputs, labels)``.
        k: As for `masked_confusion`.
        threshold: As for `masked_confusion`.
        layer: The head, if it cannot be found.
        draws: Random sets of as many channels for each class, at least 5.
        seed: Of these.
        show_progress: A tqdm bar.

    Returns:
        One row for each masked class and each class whose images are looked at, and for ``"all"``: ``masked``,
        ``channels`` that are 0 (a class may have none above the threshold: 0, and nothing happens), ``class_name``,
        ``recall``, ``low``, ``high`` (Wilson), ``intact`` (recall with all channels), ``drop`` from it; ``random``,
        ``random_low``, ``random_high``: recall with as many random channels at 0 (Student-t over draws); ``samples``.

    Raises:
        OptionError: k, threshold or draws out of range, both or neither given.
        ShapeError: A table of another network.
    """
    owned = _owned(filters, k, threshold, draws)
    sets = _Sets(owned, draws, seed)
    size = filters.num_classes
    right, samples = torch.zeros(1 + len(sets.masks), size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    with batches(model, loader, layer=layer, show_progress=show_progress, description="class_masking") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            labels: Tensor = batch.labels  # type: ignore[assignment]
            samples += _tally(labels[None], size)[0]
            for rows, predicted in _predictions(batch, sets):
                # a wrong one goes to a column that is not kept
                right[rows] += _tally(torch.where(predicted == labels, labels, size), size + 1)[:, :size]
    hits, total = with_all(right.numpy()), with_all(samples.numpy())
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hits / total
    frames = []
    for case, (name, channels) in enumerate(zip(filters.class_names, owned.sum(1).tolist(), strict=True)):
        found = sets.own(case)
        low, high = wilson(hits[found], total)
        random, random_low, random_high = mean_interval(recall[sets.random(case)])
        frames.append(
            pd.DataFrame(
                {
                    "masked": name,
                    "channels": channels,
                    "class_name": ["all", *filters.class_names],
                    "recall": recall[found],
                    "low": low,
                    "high": high,
                    "intact": recall[0],
                    "drop": recall[0] - recall[found],
                    "random": random,
                    "random_low": random_low,
                    "random_high": random_high,
                    "samples": total,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def masked_logits(features: Tensor, masked: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The head's output when sets of channels are 0.

    Args:
        features: Head input, ``(N, K)``.
        masked: Sets of channels, ``(S, K)`` bool.
        weight: ``(C, K)``.
        bias: ``(C,)``.

    Returns:
        ``(S, N, C)``.
    """
    return F.linear(features.to(weight.dtype) * ~masked[:, None], weight, bias)


class _Sets:
    """Sets of channels to mask, row after row: of each case its own, then its random ones; row 0 of results is none."""

    def __init__(self, own: Tensor, draws: int, seed: int) -> None:
        self._step = 1 + draws
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for mask in own:
            chance = random_masks((1, len(mask)), int(mask.sum()), draws, generator)
            rows += [mask[None], *chance]
        self.masks = torch.cat(rows)  # (S, K) bool

    def own(self, case: int) -> int:
        return 1 + case * self._step

    def random(self, case: int) -> slice:
        return slice(2 + case * self._step, 1 + (case + 1) * self._step)


def _predictions(batch: Batch, sets: _Sets) -> Iterator[tuple[slice, Tensor]]:
    """Predicted classes, ``(rows, N)``, in slices: first of the intact network, then with each set masked."""
    yield slice(0, 1), batch.logits.argmax(1)[None]
    weight, bias = batch.head.weight, batch.head.bias
    masks = sets.masks.to(weight.device)
    step = max(1, _CELLS // (len(batch.features) * max(weight.shape)))
    for start in range(0, len(masks), step):
        part = masks[start : start + step]
        logits = masked_logits(batch.features, part, weight, bias)
        yield slice(1 + start, 1 + start + len(part)), logits.argmax(2)


def _tally(values: Tensor, size: int) -> Tensor:
    """How often each number below ``size`` stands in each row: ``(R, N)`` to ``(R, size)``, on the CPU."""
    rows = torch.arange(len(values), device=values.device)[:, None] * size
    return torch.bincount((rows + values).flatten(), minlength=len(values) * size).view(-1, size).cpu()


def _owned(filters: ClassFilters, k: int | None, threshold: float | None, draws: int) -> Tensor:
    """Channels of each class, ``(C, K)`` bool."""
    one_table(filters)
    check_draws(draws)
    if (k is None) == (threshold is None):
        raise OptionError(
            f"a class's channels are its top k=, or all with a score above threshold=; pass one of the two, "
            f"got k={k!r} and threshold={threshold!r}"
        )
    if threshold is None:
        check_k(k, filters.num_channels, "k")
        return filters.mask(k)  # type: ignore[arg-type]
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not np.isfinite(threshold):
        raise OptionError(f"threshold must be a finite number, of the scale of the table's scores; got {threshold!r}")
    return (filters.scores > float(threshold)) & filters.seen[:, None]


def _cases(filters: ClassFilters, classes: Any) -> dict[str, tuple[int, ...]]:
    """Rows of the table by the name of the case."""
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        classes = [classes]
    cases: dict[str, tuple[int, ...]] = {}
    for case in classes:
        several = case if isinstance(case, tuple | list) else (case,)
        rows = tuple(dict.fromkeys(filters.index(name) for name in several))
        name = " + ".join(filters.class_names[row] for row in rows)
        if not rows or name == "none" or name in cases:
            raise OptionError(
                f"classes must be different cases, each a class or a tuple of classes, none by the name 'none'; "
                f"got {name!r}{' twice' if name in cases else ''}"
            )
        cases[name] = rows
    if not cases:
        raise OptionError('classes must name at least one case to mask, such as ["coat", ("coat", "bag")]; got none')
    return cases


def _confusion_frame(masked: str, channels: int, counts: Any, names: Sequence[str]) -> pd.DataFrame:
    """``counts`` are (C, C), or (draws, C, C) of the control."""
    control, size = counts.ndim == 3, len(names)
    total = counts.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = counts / total
    share, low, high = (
        mean_interval(shares) if control else (shares, *wilson(counts, np.broadcast_to(total, counts.shape)))
    )
    return pd.DataFrame(
        {
            "masked": masked,
            "control": control,
            "channels": channels,
            "class_name": np.repeat(names, size),
            "predicted": np.tile(names, size),
            "count": (counts.mean(0) if control else counts.astype(float)).ravel(),
            "share": share.ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
        }
    )
