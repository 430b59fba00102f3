"""Do a class's chosen channels matter more than others? Deletion and insertion, on channels in place of pixels."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_table, named_tables
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head_pass import batches
from captum_classfilters.metrics.accuracy import check_draws
from captum_classfilters.metrics.intervals import Floats, draws_interval

KINDS = ("deletion", "insertion")


def channel_deletion(
    model: Any,
    filters: ClassFilters | Mapping[str, ClassFilters],
    loader: Iterable[Any],
    sizes: int | Tensor,
    *,
    steps: int = 10,
    layer: nn.Module | str | None = None,
    draws: int = 5,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Probability of the true class while its channels are set to 0 one after another, or alone are not.

    Source: Petsiuk et al. 2018, "RISE", section 4.2: deletion and insertion; there of pixels, here of the head's input
    channels, strongest first, each class its own. Differs: as many steps for each class, up to a set of ``sizes``
    channels; a random control.

    Args:
        model: The network; borrowed.
        filters: A table, or tables by name: whose ranking is followed.
        loader: Batches ``(inputs, labels)``.
        sizes: How many channels of each class, an int or ``(C,)`` int64; such as the size of a terminal node, the same
            for all tables, so that none has more to delete. A class of size 0 is left out.
        steps: Points of the curve behind the first, evenly spaced in the share of the set.
        layer: The head, if it cannot be found.
        draws: Random rankings, at least 5.
        seed: Of these.
        show_progress: A tqdm bar.

    Returns:
        One row for each table (and ``"random"``), kind (``"deletion"``, ``"insertion"``) and step: ``filters``,
        ``kind``, ``share`` of the set, ``channels`` (mean over images), ``probability`` of the true class, ``low``,
        ``high``; ``auc``, ``auc_low``, ``auc_high``: area under the curve, the same in all rows of a curve. Means over
        images with normal 95 % intervals; of the control, over draws with Student's t. ``samples``. Deletion: the
        lower, the more the channels matter; insertion: the higher.

    Raises:
        OptionError: sizes, steps or draws out of range.
        ShapeError: A table of another network.
    """
    check_draws(draws)
    tables = named_tables(filters, ["random"])
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps must be an integer of at least 1, got {steps!r}")
    first = next(iter(tables.values()))
    counts = _sizes(sizes, first)
    generator = torch.Generator().manual_seed(seed)
    chance = [torch.rand(first.scores.shape, generator=generator).argsort(1) for _ in range(draws)]
    places = {name: [_place(table.ranking())] for name, table in tables.items()}
    places["random"] = [_place(ranking) for ranking in chance]
    sums = {
        name: torch.zeros(len(several), 2, len(KINDS), steps + 2, dtype=torch.float64)
        for name, several in places.items()
    }
    samples = 0
    taken = torch.zeros(steps + 1, dtype=torch.float64)
    with batches(model, loader, layer=layer, show_progress=show_progress, description="channel_deletion") as stream:
        for batch in stream:
            for table in tables.values():
                check_table(table, batch.head)
            if not samples:
                device = batch.head.weight.device
                counts, places = counts.to(device), {n: [p.to(device) for p in each] for n, each in places.items()}
            own = counts[batch.labels]
            asked, own = own > 0, own[own > 0]
            labels: Tensor = batch.labels[asked]  # type: ignore[index]
            features = batch.features[asked].to(batch.head.weight.dtype)
            taken += torch.stack([_taken(own, step, steps).double().sum() for step in range(steps + 1)]).cpu()
            samples += len(labels)
            for name, several in places.items():
                for row, place in enumerate(several):
                    ranks = place[labels]
                    curve = _curve(features, labels, ranks, own, steps, batch.head.weight, batch.head.bias)
                    sums[name][row] += torch.stack([curve.sum(0), (curve**2).sum(0)]).cpu()
    if not samples:
        raise OptionError("no image is of a class with a size above 0; give sizes of the classes in the loader")
    frames = [_frame(name, found.numpy(), taken.numpy() / samples, samples) for name, found in sums.items()]
    return pd.concat(frames, ignore_index=True)


def _sizes(sizes: Any, table: ClassFilters) -> Tensor:
    given = torch.as_tensor(sizes)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise OptionError(f"sizes must be integers, channels of each class; got {given.dtype}")
    if given.dim() and given.shape != (table.num_classes,):
        raise ShapeError(f"sizes must be an int or {table.num_classes} of them, got shape {tuple(given.shape)}")
    given = given.cpu().long().expand(table.num_classes)
    if int(given.min()) < 0 or int(given.max()) > table.num_channels or not bool(given.any()):
        raise OptionError(
            f"sizes must lie in [0, {table.num_channels}], and not all be 0; got {int(given.min())} to "
            f"{int(given.max())}"
        )
    return given


def _place(ranking: Tensor) -> Tensor:
    """At which place of the ranking each channel stands, ``(C, K)``."""
    return ranking.argsort(1)


def _taken(sizes: Tensor, step: int, steps: int) -> Tensor:
    """How many channels are taken at a step, for each image; all of the set at the last."""
    return (sizes * step + steps // 2) // steps


def _curve(
    features: Tensor, labels: Tensor, ranks: Tensor, sizes: Tensor, steps: int, weight: Tensor, bias: Tensor
) -> Tensor:
    """Probability of each image's class at each step, and the area below, ``(N, 2, steps + 2)`` float64."""
    found = []
    for step in range(steps + 1):
        inside = ranks < _taken(sizes, step, steps)[:, None]
        for mask in (~inside, inside):
            logits = F.linear(features * mask, weight, bias)
            found.append(logits.double().softmax(1).gather(1, labels[:, None])[:, 0])
    points = torch.stack(found, 1).view(len(labels), steps + 1, len(KINDS)).transpose(1, 2)
    return torch.cat([points, torch.trapezoid(points, dx=1 / steps, dim=2)[..., None]], 2)


def _frame(name: str, sums: Floats, channels: Floats, samples: int) -> pd.DataFrame:
    """``sums``: over images, of values and their squares, ``(draws, 2, kinds, steps + 2)``; one draw is no control."""
    value, low, high = _interval(sums, samples)
    steps = len(channels) - 1
    frames = [
        pd.DataFrame(
            {
                "filters": name,
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


def _interval(sums: Floats, samples: int) -> tuple[Any, Any, Any]:
    """Mean over images with its interval; of several draws, mean over draws with theirs."""
    means = sums / samples
    if len(sums) > 1:
        return draws_interval(means[:, 0])
    mean, squares = means[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(np.maximum(squares - mean**2, 0) / (samples - 1))
    half = stats.norm.ppf(0.975) * error
    return mean, mean - half, mean + half
