"""Sets of channels compared: classes with each other, and a selection with itself on other samples.

The control is the same everywhere: two sets of k channels drawn at random.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn

from captum_classfilters.class_filters import ClassFilters, check_k
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.stream import batches
from captum_classfilters.influential.tables import Tables, check_options


def overlap(filters: ClassFilters | Mapping[str, ClassFilters], k: int) -> pd.DataFrame:
    """Jaccard index of each two classes' top-k channels, beside what chance gives.

    Args:
        filters: A table, or tables by name.
        k: Channels of each class, in ``[1, K]``.

    Returns:
        One row for each table and pair: ``filters``, ``class_a``, ``class_b``, ``jaccard`` (NaN where a class has no
        samples), ``shared`` channels; ``random``, ``random_low``, ``random_high``: mean and central 95 % for two random
        sets of k channels.

    Raises:
        OptionError: k out of range.
    """
    tables = {filters.method: filters} if isinstance(filters, ClassFilters) else {str(n): t for n, t in filters.items()}
    frames = []
    for name, table in tables.items():
        jaccard = table.overlap(k).numpy()
        pairs = list(combinations(range(table.num_classes), 2))
        first, second = (np.array(side, int) for side in zip(*pairs, strict=True)) if pairs else (np.zeros(0, int),) * 2
        found = jaccard[first, second]
        names = np.array(table.class_names)
        mean, low, high = random_jaccard(k, table.num_channels)
        frames.append(
            pd.DataFrame(
                {
                    "filters": name,
                    "class_a": names[first],
                    "class_b": names[second],
                    "jaccard": found,
                    "shared": 2 * k * found / (1 + found),
                    "random": mean,
                    "random_low": low,
                    "random_high": high,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def stability(
    model: Any,
    loader: Iterable[Any],
    k: int,
    *,
    selectors: Sequence[str] = ("histogram",),
    k1: int | float | None = None,
    importance: str = "abs",
    layer: nn.Module | str | None = None,
    draws: int = 20,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    show_progress: bool = False,
) -> pd.DataFrame:
    """How much of a class's top-k set survives when the samples are drawn anew.

    A Poisson bootstrap: in each replicate every sample counts 0, 1, 2, ... times, by a Poisson(1) draw, so that all
    replicates are made in the one pass; state is ``draws`` tables.

    Args:
        model: The network; borrowed.
        loader: Batches ``(inputs, labels)``.
        k: Channels of each class, in ``[1, K]``.
        selectors: Which to test; those without samples (weight, random) have nothing to test.
        k1: As in `InfluentialFeatures`.
        importance: As in `InfluentialFeatures`.
        layer: The head, if it cannot be found.
        draws: Bootstrap replicates, at least 5.
        seed: Of the draws.
        class_names: C names; otherwise numbers.
        show_progress: A tqdm bar.

    Returns:
        One row for each selector and class, and for ``"all"``: ``jaccard``, the mean index of a replicate's set and the
        set of all samples; ``low``, ``high``: the replicates' central 95 %; ``random``: the index of two random sets;
        ``samples``.

    Raises:
        OptionError: k or an option out of range.
    """
    if draws < 5:
        raise OptionError(f"draws must be at least 5, got {draws}")
    selectors = [selectors] if isinstance(selectors, str) else list(selectors)
    static = [name for name in selectors if name in ("weight", "random")]
    if static:
        raise OptionError(f"selectors {static} look at no samples, so there is nothing to draw anew; leave them out")
    check_options(selectors, [k1], importance, "target")
    generator = torch.Generator().manual_seed(seed)
    whole: Tables | None = None
    replicates: list[Tables] = []
    with batches(model, loader, layer=layer, show_progress=show_progress, description="stability") as stream:
        for batch in stream:
            if whole is None:
                check_k(k, batch.head.num_features, "k")
                whole, *replicates = (Tables(batch.head, selectors, [k1], importance, seed) for _ in range(draws + 1))
            found: tuple[Tensor, ...] = (batch.features, batch.logits, batch.labels)  # type: ignore[assignment]
            whole.add(*found)
            for table in replicates:
                times = torch.poisson(torch.ones(len(found[0])), generator=generator).long()
                again = torch.repeat_interleave(torch.arange(len(times)), times).to(found[0].device)
                if len(again):
                    table.add(*(part[again] for part in found))
    head = whole.head  # type: ignore[union-attr]
    names = tuple(class_names) if class_names is not None else tuple(map(str, range(head.num_classes)))
    reference, others = whole.filters(names, {}), [table.filters(names, {}) for table in replicates]  # type: ignore[union-attr]
    return pd.concat(
        [_stability(key[0], table, [other[key] for other in others], k) for key, table in reference.items()],
        ignore_index=True,
    )


def _stability(name: str, whole: ClassFilters, replicates: Sequence[ClassFilters], k: int) -> pd.DataFrame:
    chosen = whole.mask(k)
    shared = torch.stack([(other.mask(k) & chosen).sum(1) for other in replicates]).double()
    # a class that a replicate missed altogether shares nothing
    jaccard = (shared / (2 * k - shared)).masked_fill(~whole.seen, torch.nan).numpy()
    jaccard = np.concatenate([np.nanmean(jaccard, axis=1, keepdims=True), jaccard], axis=1)
    low, high = np.quantile(jaccard, [0.025, 0.975], axis=0)
    return pd.DataFrame(
        {
            "filters": name,
            "class_name": ["all", *whole.class_names],
            "jaccard": jaccard.mean(0),
            "low": low,
            "high": high,
            "random": random_jaccard(k, whole.num_channels)[0],
            "samples": [int(whole.counts.sum()), *whole.counts.tolist()],
        }
    )


def random_jaccard(k: int, channels: int) -> tuple[float, float, float]:
    """Jaccard index of two random sets of k out of K channels: ``(mean, low, high)``, the central 95 %.

    The size of their intersection is hypergeometric.

    Example:
        >>> random_jaccard(64, 64)
        (1.0, 1.0, 1.0)
    """
    law = stats.hypergeom(channels, k, k)
    sizes = np.arange(k + 1)
    mean = float((law.pmf(sizes) * sizes / (2 * k - sizes)).sum())
    low, high = (float(size / (2 * k - size)) for size in law.ppf([0.025, 0.975]))
    return mean, low, high


def random_masks(shape: Sequence[int], k: int, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The control: k random channels of each class, ``(C, K)`` bool, as ``"random 0"``, ``"random 1"`` and so on."""
    masks = {}
    for draw in range(draws):
        chosen = torch.rand(tuple(shape), generator=generator).argsort(1)[:, :k]
        masks[f"random {draw}"] = torch.zeros(tuple(shape), dtype=torch.bool).scatter_(1, chosen, True)
    return masks
