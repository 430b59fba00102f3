"""Overwrite some channels of the head's input, and count what the full head still classifies correctly.

`overwritten_logits` does it. `class_ablation` overwrites the channels of each image's own class; `masked_confusion` and
`class_masking` overwrite the same channels of all images; `channel_deletion` overwrites one channel after another.
N samples, C classes, K channels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_k, check_table, named_tables, one_table
from captum_classfilters.core.check import integer, number, some_of
from captum_classfilters.core.control import Control, random_masks
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import Batch, HeadPass
from captum_classfilters.core.intervals import Floats, chance_shares, draws_interval, shares, with_all
from captum_classfilters.core.many_labels import ManyScores
from captum_classfilters.metrics.many_interventions import ablation_of_many, masking_of_many

MODES = ("noise", "zero", "mean")
KINDS = ("deletion", "insertion")
# How many numbers of changed features are multiplied at once
_CELLS = 2**24


def overwritten_logits(features: Tensor, chosen: Tensor, head: Head, values: Tensor | None = None) -> Tensor:
    """The head's output when other values are written into chosen channels.

    Args:
        features: Head input, ``(N, K)``.
        chosen: The chosen channels, bool, ``(N, K)``, or ``(S, 1, K)`` for S sets.
        head: The head.
        values: The values to write, ``(N, K)``; None: zeros.

    Returns:
        ``(N, C)``, or ``(S, N, C)``.
    """
    features = features.to(head.weight.dtype)
    changed = features * ~chosen if values is None else torch.where(chosen, values, features)
    return F.linear(changed, head.weight, head.bias)


def count_by_class(flags: Tensor, labels: Tensor, classes: int) -> Any:
    """How many samples of each class are flagged: ``(..., N)`` bool to ``(..., C)``, on the CPU."""
    rows = flags.reshape(-1, flags.shape[-1])
    # samples that are not flagged are counted in an extra column, which is dropped
    columns = torch.where(rows, labels, classes) + torch.arange(len(rows), device=rows.device)[:, None] * (classes + 1)
    counts = torch.bincount(columns.flatten(), minlength=len(rows) * (classes + 1)).view(len(rows), classes + 1)
    return counts[:, :classes].reshape(*flags.shape[:-1], classes).cpu().numpy()


# -- over each image's own class's channels ------------------------------------------------------------------------


def class_ablation(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any] | None = None,
    k: int = 5,
    *,
    modes: Sequence[str] = MODES,
    means: Tensor | None = None,
    layer: nn.Module | str | None = None,
    control: Control = Control(),
) -> pd.DataFrame:
    """Recall of each class when its own channels, random channels, or all its other channels are overwritten.

    Source: the "essential" test of the code published with Badola et al. 2022, which replaces influential features by
    N(0, 1), then the others. Differs: also zeros and means, a random control of the same size, intervals.

    Args:
        model: The network; borrowed. Or a `HeadPass`; then ``loader`` is left out.
        filters: The table whose top-k channels are the influential ones.
        loader: Batches ``(inputs, labels)``.
        k: Channels of each class, in ``[1, K]``.
        modes: What is written: ``"noise"`` N(0, 1), ``"zero"``, ``"mean"``.
        means: ``(K,)`` for ``"mean"``; None: the mean features of the samples behind ``filters``, which its mass
            gives as long as no feature is negative.
        layer: The head, if it cannot be found.
        control: Random sets of k channels for each class; its seed is also the seed of the noise.

    Returns:
        One row for each class (and ``"all"``), ``mode`` and ``channels``: ``"none"`` (mode ``"intact"``),
        ``"influential"``, ``"rest"`` (all but the influential) and ``"random"`` (k channels drawn from all; ``control``
        is True). ``accuracy`` (recall), ``low``, ``high`` (Wilson; Student-t over draws for the control), ``drop``
        (intact accuracy minus this one), ``samples``.

        Of many labels: average precision and balanced accuracy with the columns of `accuracy_curve`, each class judged
        on all samples by its own logit; ``drop`` is that of the average precision.

    Raises:
        OptionError: k or modes is out of range; ``"mean"`` without ``means``, and a feature is negative.
        ShapeError: A table belongs to another network.
    """
    head_pass = HeadPass.of(model, loader, layer)
    k = check_k(k, one_table(filters).num_channels)
    modes = some_of(modes, "modes", MODES)
    if means is not None and (not isinstance(means, Tensor) or means.shape != (filters.num_channels,)):
        raise ShapeError(
            f"means must be a tensor of shape ({filters.num_channels},), one for each channel; got {means!r}"
        )
    size, generator = filters.num_classes, control.generator()
    influential = filters.mask(k)
    chance = random_masks(influential.shape, k, control.draws, generator)
    # influential, the rest, and each draw of the control
    sets = torch.stack([influential, ~influential, *chance])
    right = {mode: np.zeros((len(sets), size), int) for mode in modes}
    intact, samples = np.zeros(size, int), np.zeros(size, int)
    with head_pass.batches(description="class_ablation", many_labels=True) as stream:
        many, batches = ManyScores.read(stream, control.seed)
        for batch in batches:
            check_table(filters, batch.head)
            # a class without samples in the table has no channels to overwrite
            seen = filters.seen.to(batch.features.device)[batch.labels]
            labels: Tensor = batch.labels[seen]  # type: ignore[index]
            features = batch.features[seen].to(batch.head.weight.dtype)
            samples += count_by_class(torch.ones_like(labels, dtype=torch.bool), labels, size)
            intact += count_by_class(batch.logits[seen].argmax(1) == labels, labels, size)
            for mode in modes:
                values = _written(mode, features, batch.head.name, filters, means, generator)
                for row, chosen in enumerate(sets):
                    logits = overwritten_logits(features, chosen.to(labels.device)[labels], batch.head, values)
                    right[mode][row] += count_by_class(logits.argmax(1) == labels, labels, size)
    if many is not None:
        check_table(filters, many.head)
        writing = {mode: _written(mode, many.features, many.head.name, filters, means, generator) for mode in modes}
        return ablation_of_many(many, filters, sets, writing)
    total = with_all(samples)
    whole = shares(with_all(intact), total)
    parts = [("intact", "none", False, *whole)]
    for mode in modes:
        hits = with_all(right[mode])
        parts.append((mode, "influential", False, *shares(hits[0], total)))
        parts.append((mode, "rest", False, *shares(hits[1], total)))
        parts.append((mode, "random", True, *chance_shares(hits[2:], total)))
    frames = [
        pd.DataFrame(
            {
                "class_name": ["all", *filters.class_names],
                "mode": mode,
                "channels": channels,
                "control": is_control,
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "drop": whole[0] - accuracy,
                "samples": total,
            }
        )
        for mode, channels, is_control, accuracy, low, high in parts
    ]
    return pd.concat(frames, ignore_index=True)


def _written(
    mode: str,
    features: Tensor,
    layer: str,
    filters: ClassFilters,
    means: Tensor | None,
    generator: torch.Generator,
) -> Tensor | None:
    """The values to write, ``(N, K)``; None: zeros."""
    if mode == "zero":
        return None
    if mode == "noise":
        return torch.randn(features.shape, generator=generator).to(features)
    if means is None:
        if bool((features < 0).any()):
            raise OptionError(
                f"features of layer {layer!r} can be negative, so the table's mass is not their sum; pass means= (the "
                "mean of each feature over training images), or leave the mode 'mean' out"
            )
        means = filters.mass.sum(0) / filters.counts.sum()
    return means.to(features).expand_as(features)


# -- over the same channels of all images --------------------------------------------------------------------------


def masked_confusion(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any] | None = None,
    classes: Sequence[Any] = (),
    *,
    k: int | None = None,
    threshold: float | None = None,
    layer: nn.Module | str | None = None,
    control: Control = Control(),
) -> pd.DataFrame:
    """Confusion matrix of the plain network when the channels of some classes are 0 for all images.

    Source: "Training interpretable CNNs towards class-specific filters", section 4.2 and figure 4. Differs: intervals,
    a control of equally many random channels, and all cases in one pass.

    Args:
        model: The network; borrowed. Or a `HeadPass`; then ``loader`` is left out.
        filters: The table that gives the channels of a class.
        loader: Batches ``(inputs, labels)``.
        classes: Cases: a case is a class (name or index), or a tuple of classes whose channels are masked together.
        k: The channels of a class are its top k. Pass either ``k`` or ``threshold``.
        threshold: The channels of a class are all whose score exceeds this (for a gate .5); there may be none. A class
            without samples in the table has no channels.
        layer: The head, if it cannot be found.
        control: For each case, random sets of equally many channels.

    Returns:
        One row for each case, true and predicted class: ``masked`` (first ``"none"``, then for example ``"coat"`` or
        ``"coat + bag"``), ``control`` (True for random channels), ``channels`` (number of those that are 0),
        ``class_name`` (true), ``predicted``, ``count`` (for the control: mean over draws), ``share`` of the true
        class's images, NaN where it has none, ``low``, ``high`` (Wilson; Student-t over draws for the control).

    Raises:
        OptionError: k or threshold is out of range, both or neither is given, or a case is unknown or repeated.
        ShapeError: A table belongs to another network.
    """
    head_pass = HeadPass.of(model, loader, layer)
    channels_of = _channels_of(filters, k, threshold)
    cases = _cases(filters, classes)
    sets = _CaseSets(torch.stack([channels_of[list(rows)].any(0) for rows in cases.values()]), control)
    size = filters.num_classes
    counts = np.zeros((1 + len(sets.masks), size, size), int)
    with head_pass.batches(description="masked_confusion") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            labels: Tensor = batch.labels  # type: ignore[assignment]
            for rows, predicted in _predictions(batch, sets.masks):
                everyone = torch.ones_like(predicted, dtype=torch.bool)
                pairs = count_by_class(everyone, labels * size + predicted, size * size)
                counts[rows] += pairs.reshape(-1, size, size)
    parts = [_confusion_frame("none", 0, counts[0], filters.class_names)]
    for case, (name, channels) in enumerate(zip(cases, sets.sizes, strict=True)):
        parts.append(_confusion_frame(name, channels, counts[sets.of_case(case)], filters.class_names))
        parts.append(_confusion_frame(name, channels, counts[sets.chance(case)], filters.class_names))
    return pd.concat(parts, ignore_index=True)


def class_masking(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any] | None = None,
    *,
    k: int | None = None,
    threshold: float | None = None,
    layer: nn.Module | str | None = None,
    control: Control = Control(),
) -> pd.DataFrame:
    """Recall of every class when the channels of one class after another are 0 for all images.

    If filters are class-specific, only the recall of the masked class falls. Source: as for `masked_confusion`.

    Args:
        model: The network; borrowed. Or a `HeadPass`; then ``loader`` is left out.
        filters: The table that gives the channels of a class.
        loader: Batches ``(inputs, labels)``.
        k: As for `masked_confusion`.
        threshold: As for `masked_confusion`.
        layer: The head, if it cannot be found.
        control: For each class, random sets of equally many channels.

    Returns:
        Two rows for each masked class and each class of images (and ``"all"``): ``masked``, ``control`` (False: the
        class's channels; True: equally many random ones), ``channels`` (number of those that are 0; it is 0 for a class
        with none above the threshold), ``class_name``, ``recall``, ``low``, ``high`` (Wilson; Student-t over draws for
        the control), ``intact`` (recall with all channels), ``drop`` (intact minus recall), ``samples``.

        Of many labels: average precision and balanced accuracy with the columns of `accuracy_curve`, each class judged
        on all samples by its own logit; ``intact`` and ``drop`` are those of the average precision.

    Raises:
        OptionError: k or threshold is out of range, or both or neither is given.
        ShapeError: A table belongs to another network.
    """
    head_pass = HeadPass.of(model, loader, layer)
    sets = _CaseSets(_channels_of(filters, k, threshold), control)
    size = filters.num_classes
    right, samples = np.zeros((1 + len(sets.masks), size), int), np.zeros(size, int)
    with head_pass.batches(description="class_masking", many_labels=True) as stream:
        many, batches = ManyScores.read(stream, control.seed)
        for batch in batches:
            check_table(filters, batch.head)
            labels: Tensor = batch.labels  # type: ignore[assignment]
            samples += count_by_class(torch.ones_like(labels, dtype=torch.bool), labels, size)
            for rows, predicted in _predictions(batch, sets.masks):
                right[rows] += count_by_class(predicted == labels, labels, size)
    if many is not None:
        check_table(filters, many.head)
        cases = [sets.masks[sets.of_case(case) - 1 : sets.of_case(case) + control.draws] for case in range(size)]
        return masking_of_many(many, filters, cases)
    hits, total = with_all(right), with_all(samples)
    intact = shares(hits[0], total)[0]
    frames = []
    for case, (name, channels) in enumerate(zip(filters.class_names, sets.sizes, strict=True)):
        judged, chance = shares(hits[sets.of_case(case)], total), chance_shares(hits[sets.chance(case)], total)
        for is_control, (recall, low, high) in ((False, judged), (True, chance)):
            frames.append(
                pd.DataFrame(
                    {
                        "masked": name,
                        "control": is_control,
                        "channels": channels,
                        "class_name": ["all", *filters.class_names],
                        "recall": recall,
                        "low": low,
                        "high": high,
                        "intact": intact,
                        "drop": intact - recall,
                        "samples": total,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


class _CaseSets:
    """Sets of channels to mask: for each case its channels, then its random sets. Row 0 of results masks nothing."""

    def __init__(self, channels_of_cases: Tensor, control: Control) -> None:
        self._step = 1 + control.draws
        self.sizes: list[int] = channels_of_cases.sum(1).tolist()
        generator = control.generator()
        rows = []
        for mask, size in zip(channels_of_cases, self.sizes, strict=True):
            rows += [mask[None], *random_masks((1, len(mask)), size, control.draws, generator)]
        self.masks = torch.cat(rows)  # (S, K) bool

    def of_case(self, case: int) -> int:
        return 1 + case * self._step

    def chance(self, case: int) -> slice:
        return slice(2 + case * self._step, 1 + (case + 1) * self._step)


def _predictions(batch: Batch, masks: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of results and their predicted classes, ``(rows, N)``: first intact, then with each set masked."""
    yield slice(0, 1), batch.logits.argmax(1)[None]
    masks = masks.to(batch.features.device)
    step = max(1, _CELLS // (len(batch.features) * max(batch.head.weight.shape)))
    for start in range(0, len(masks), step):
        part = masks[start : start + step]
        logits = overwritten_logits(batch.features, part[:, None], batch.head)
        yield slice(1 + start, 1 + start + len(part)), logits.argmax(2)


def _channels_of(filters: ClassFilters, k: int | None, threshold: float | None) -> Tensor:
    """Channels of each class, ``(C, K)`` bool."""
    one_table(filters)
    if (k is None) == (threshold is None):
        raise OptionError(
            f"expected k= (the top k channels of a class) or threshold= (all with a higher score), got k={k!r} and "
            f"threshold={threshold!r}; pass one of the two"
        )
    if k is not None:
        return filters.mask(k)
    threshold = number(threshold, "threshold", meaning="of the scale of the table's scores")
    return (filters.scores > threshold) & filters.seen[:, None]


def _cases(filters: ClassFilters, classes: Any) -> dict[str, tuple[int, ...]]:
    """Rows of the table by the name of the case."""
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        classes = [classes]
    cases: dict[str, tuple[int, ...]] = {}
    for case in classes:
        members = case if isinstance(case, tuple | list) else (case,)
        rows = tuple(dict.fromkeys(filters.index(member) for member in members))
        name = " + ".join(filters.class_names[row] for row in rows)
        if not rows or name == "none" or name in cases:
            raise OptionError(
                "classes must be different cases, and a case is a class or a tuple of classes; no class may be called "
                f"'none'; got {name!r}{' twice' if name in cases else ''}"
            )
        cases[name] = rows
    if not cases:
        raise OptionError('classes must name at least one case to mask, such as ["coat", ("coat", "bag")]; got none')
    return cases


def _confusion_frame(masked: str, channels: int, counts: Any, names: Sequence[str]) -> pd.DataFrame:
    """The frame of one case; ``counts`` are (C, C), or (draws, C, C) for the control."""
    is_control, size = counts.ndim == 3, len(names)
    total = counts.sum(-1, keepdims=True)
    share, low, high = chance_shares(counts, total) if is_control else shares(counts, total)
    return pd.DataFrame(
        {
            "masked": masked,
            "control": is_control,
            "channels": channels,
            "class_name": np.repeat(names, size),
            "predicted": np.tile(names, size),
            "count": (counts.mean(0) if is_control else counts.astype(float)).ravel(),
            "share": share.ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
        }
    )


# -- one channel after another -------------------------------------------------------------------------------------


def channel_deletion(
    model: Any,
    filters: ClassFilters | Mapping[str, ClassFilters],
    loader: Iterable[Any] | None = None,
    sizes: int | Tensor = 5,
    *,
    steps: int = 10,
    layer: nn.Module | str | None = None,
    control: Control = Control(),
) -> pd.DataFrame:
    """Probability of the true class while its channels are deleted, or inserted, one after another.

    Source: Petsiuk et al. 2018, "RISE", section 4.2, which deletes and inserts pixels. Here they are channels of the
    head's input, in the ranking of the image's class, strongest first. Differs: the same number of steps for each
    class, up to ``sizes`` channels; a random control.

    Args:
        model: The network; borrowed. Or a `HeadPass`; then ``loader`` is left out.
        filters: A table, or tables by name, whose rankings are followed.
        loader: Batches ``(inputs, labels)``.
        sizes: How many channels of each class to delete, an int or ``(C,)`` int64; for example the size of a terminal
            node. It is the same for all tables. A class of size 0 is left out.
        steps: Points of the curve after the first, evenly spaced.
        layer: The head, if it cannot be found.
        control: Random rankings.

    Returns:
        One row for each table (and the control, ``"random"``), kind (``"deletion"``, ``"insertion"``) and step:
        ``filters``, ``control``, ``kind``, ``share`` of ``sizes``, ``channels`` (mean over images), ``probability`` of
        the true class, ``low``, ``high``; ``auc``, ``auc_low``, ``auc_high``: area under the curve, the same in all
        rows of a curve; ``samples``. Values are means over images with normal 95 % intervals; for the control, means
        over draws with Student-t intervals. The more the channels matter, the lower deletion and the higher insertion.

    Raises:
        OptionError: sizes or steps is out of range.
        ShapeError: A table belongs to another network.
    """
    head_pass = HeadPass.of(model, loader, layer)
    tables = named_tables(filters, ["random"])
    steps = integer(steps, "steps", 1)
    first = next(iter(tables.values()))
    set_sizes = _sizes(sizes, first)
    # the place of each channel in the ranking, (C, K)
    places = {name: [table.ranking().argsort(1)] for name, table in tables.items()}
    places["random"] = [ranking.argsort(1) for ranking in control.rankings(first.scores.shape)]
    sums = {
        name: torch.zeros(len(of_name), 2, len(KINDS), steps + 2, dtype=torch.float64)
        for name, of_name in places.items()
    }
    samples = 0
    taken = torch.zeros(steps + 1, dtype=torch.float64)
    with head_pass.batches(description="channel_deletion") as stream:
        for batch in stream:
            for table in tables.values():
                check_table(table, batch.head)
            device = batch.features.device
            image_sizes = set_sizes.to(device)[batch.labels]
            kept = image_sizes > 0
            image_sizes, labels = image_sizes[kept], batch.labels[kept]  # type: ignore[index]
            features = batch.features[kept]
            taken += torch.stack([_taken(image_sizes, step, steps).double().sum() for step in range(steps + 1)]).cpu()
            samples += len(labels)
            for name, of_name in places.items():
                for row, place in enumerate(of_name):
                    curve = _deletion_curve(features, labels, place.to(device)[labels], image_sizes, steps, batch.head)
                    sums[name][row] += torch.stack([curve.sum(0), (curve**2).sum(0)]).cpu()
    if not samples:
        raise OptionError("no class in the loader has a size above 0; pass sizes above 0 for classes in the loader")
    channels = taken.numpy() / samples
    frames = [_deletion_frame(name, table.numpy(), channels, samples) for name, table in sums.items()]
    return pd.concat(frames, ignore_index=True)


def _sizes(sizes: Any, table: ClassFilters) -> Tensor:
    values = torch.as_tensor(sizes)
    if values.is_floating_point() or values.dtype == torch.bool:
        raise OptionError(f"sizes must be integers, the number of channels of each class; got {values.dtype}")
    if values.dim() and values.shape != (table.num_classes,):
        raise ShapeError(f"sizes must be an int or {table.num_classes} of them, got shape {tuple(values.shape)}")
    values = values.cpu().long().expand(table.num_classes)
    if int(values.min()) < 0 or int(values.max()) > table.num_channels or not bool(values.any()):
        raise OptionError(
            f"sizes must lie in [0, {table.num_channels}], and not all be 0; got {int(values.min())} to "
            f"{int(values.max())}"
        )
    return values


def _taken(sizes: Tensor, step: int, steps: int) -> Tensor:
    """How many channels of each image are taken at a step; at the last step all of ``sizes``."""
    return (sizes * step + steps // 2) // steps


def _deletion_curve(features: Tensor, labels: Tensor, ranks: Tensor, sizes: Tensor, steps: int, head: Head) -> Tensor:
    """Probability of each image's class at each step, then the area under them, ``(N, 2, steps + 2)`` float64."""
    probabilities = []
    for step in range(steps + 1):
        inside = ranks < _taken(sizes, step, steps)[:, None]
        for deleted in (inside, ~inside):
            logits = overwritten_logits(features, deleted, head)
            probabilities.append(logits.double().softmax(1).gather(1, labels[:, None])[:, 0])
    points = torch.stack(probabilities, 1).view(len(labels), steps + 1, len(KINDS)).transpose(1, 2)
    return torch.cat([points, torch.trapezoid(points, dx=1 / steps, dim=2)[..., None]], 2)


def _deletion_frame(name: str, sums: Floats, channels: Floats, samples: int) -> pd.DataFrame:
    """``sums`` over images, of values and of squares, are ``(draws, 2, kinds, steps + 2)``; tables have one draw."""
    value, low, high = _mean_interval(sums, samples)
    steps = len(channels) - 1
    frames = [
        pd.DataFrame(
            {
                "filters": name,
                "control": name == "random",
                "kind": kind,
                "share": np.arange(steps + 1) / steps,
                "channels": channels,
                "probability": value[which, :-1],
                "low": low[which, :-1],
                "high": high[which, :-1],
                "auc": value[which, -1],
                "auc_low": low[which, -1],
                "auc_high": high[which, -1],
                "samples": samples,
            }
        )
        for which, kind in enumerate(KINDS)
    ]
    return pd.concat(frames, ignore_index=True)


def _mean_interval(sums: Floats, samples: int) -> tuple[Any, Any, Any]:
    """Mean and interval over images, or over draws if there are several."""
    means = sums / samples
    if len(sums) > 1:
        return draws_interval(means[:, 0])
    mean, squares = means[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(np.maximum(squares - mean**2, 0) / (samples - 1))
    half = stats.norm.ppf(0.975) * error
    return mean, mean - half, mean + half


class DropCounts:
    """How many images are still classified correctly without channels of their own class, and of another class.

    Args:
        head: The head.
        tables: Tables whose rankings are judged, by name.
        ks: Numbers of channels that are set to 0.
        control: Random rankings.
    """

    def __init__(self, head: Head, tables: Mapping[str, ClassFilters], ks: Sequence[int], control: Control) -> None:
        self._head, self._ks, self._names = head, ks, list(tables)
        self._generator = control.generator()
        rankings = [table.ranking() for table in tables.values()]
        rankings += [torch.rand(head.weight.shape, generator=self._generator).argsort(1) for _ in range(control.draws)]
        self._places = [ranking.argsort(1).to(head.weight.device) for ranking in rankings]
        self._right = np.zeros((len(rankings), len(ks), 2), int)
        self.samples = 0

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        labels: Tensor = batch.labels  # type: ignore[assignment]
        classes = self._head.num_classes
        self.samples += len(labels)
        # drawn on the CPU, so that every device gets the same
        steps = torch.randint(1, max(classes, 2), (len(labels),), generator=self._generator)
        others = (labels + steps.to(labels.device)) % classes
        for row, place in enumerate(self._places):
            for column, whose in enumerate((labels, others)):
                ranks = place[whose]
                for at, k in enumerate(self._ks):
                    logits = overwritten_logits(batch.features, ranks < k, self._head)
                    self._right[row, at, column] += int((logits.argmax(1) == labels).sum())

    def columns(self, name: str | None, k: int) -> dict[str, float]:
        """``drop_own`` and ``drop_other`` with their intervals; of the control if ``name`` is None."""
        at = list(self._ks).index(k)
        if name is None:
            values = chance_shares(self._right[len(self._names) :, at], self.samples)
        else:
            values = shares(self._right[self._names.index(name), at], self.samples)
        columns: dict[str, float] = {}
        for column, kind in enumerate(("drop_own", "drop_other")):
            share, low, high = (float(value[column]) for value in values)
            columns |= {kind: share, f"{kind}_low": low, f"{kind}_high": high}
        return columns
