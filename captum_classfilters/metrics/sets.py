"""Compare sets of channels: those of different classes, and those of one class from other samples.

The control is always two random sets of k channels.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from captum_classfilters.class_filters import ClassFilters, check_k, names_of
from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.influential.running_sums import Options, Tables
from captum_classfilters.influential.selectors import STATIC


def overlap(filters: ClassFilters | Mapping[str, ClassFilters], k: int) -> pd.DataFrame:
    """Jaccard index of the top-k channels of every pair of classes, and of random sets.

    Args:
        filters: A table, or tables by name.
        k: Channels of each class, in ``[1, K]``.

    Returns:
        One row for each table and pair: ``filters``, ``control`` (False), ``class_a``, ``class_b``, ``jaccard`` (NaN
        where a class has no samples), ``shared`` channels, ``low``, ``high`` (NaN). For each number of channels K one
        row with ``control`` True and ``filters`` ``"random"``: ``jaccard`` and ``shared`` are means of two random sets
        of k channels, ``low`` and ``high`` the central 95 % of their index.

    Raises:
        OptionError: k is out of range.
    """
    tables = {filters.method: filters} if isinstance(filters, ClassFilters) else {str(n): t for n, t in filters.items()}
    frames = []
    for name, table in tables.items():
        jaccard = table.overlap(k).numpy()
        pairs = list(combinations(range(table.num_classes), 2))
        first, second = (np.array(side, int) for side in zip(*pairs, strict=True)) if pairs else (np.zeros(0, int),) * 2
        of_pairs = jaccard[first, second]
        names = np.array(table.class_names)
        frames.append(
            pd.DataFrame(
                {
                    "filters": name,
                    "control": False,
                    "class_a": names[first],
                    "class_b": names[second],
                    "jaccard": of_pairs,
                    "low": np.nan,
                    "high": np.nan,
                    "shared": 2 * k * of_pairs / (1 + of_pairs),
                }
            )
        )
    for channels in sorted({table.num_channels for table in tables.values()}):
        mean, low, high = random_jaccard(k, channels)
        row = {"jaccard": mean, "low": low, "high": high, "shared": k**2 / channels}
        frames.append(pd.DataFrame([{"filters": "random", "control": True, "class_a": "", "class_b": "", **row}]))
    return pd.concat(frames, ignore_index=True)


def stability(
    model: Any,
    loader: Iterable[Any] | None = None,
    k: int = 5,
    *,
    selectors: Sequence[str] = ("histogram",),
    k1: int | float | None = None,
    importance: str = "abs",
    draws: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of a class's top-k set stays when the samples are drawn again.

    It is a Poisson bootstrap: in each replicate a sample counts as often as a Poisson(1) draw says. All replicates are
    made in one pass, and ``draws`` tables are held in memory.

    Args:
        model: The network; borrowed. Or a `HeadPass`; then ``loader`` is left out.
        loader: Batches ``(inputs, labels)``.
        k: Channels of each class, in ``[1, K]``.
        selectors: Selectors to test; ``weight`` and ``random`` look at no samples and are refused.
        k1: As in `InfluentialFeatures`.
        importance: As in `InfluentialFeatures`.
        draws: Bootstrap replicates, at least 5.
        seed: Seed of the replicates.

    Returns:
        One row for each selector and class, and for ``"all"``: ``filters``, ``control`` (False), ``class_name``,
        ``jaccard``, the mean index of a replicate's set and the set of all samples; ``low``, ``high``: the replicates'
        central 95 %; ``samples``. One row with ``control`` True, ``filters`` ``"random"``, class ``"all"``: the index
        of two random sets.

    Raises:
        OptionError: k or an option is out of range.
    """
    head_pass = HeadPass.of(model, loader)
    draws = integer(draws, "draws", 5)
    options = Options.checked(selectors, [k1], importance, "target", seed)
    static = [name for name in options.names if name in STATIC]
    if static:
        raise OptionError(f"selectors {static} look at no samples, so they cannot be tested; leave them out")
    generator = torch.Generator().manual_seed(seed)
    whole: Tables | None = None
    replicates: list[Tables] = []
    with head_pass.batches(description="stability") as stream:
        for batch in stream:
            if whole is None:
                check_k(k, batch.head.num_features)
                names = names_of(head_pass.class_names, batch.head.num_classes, head_pass.loader, head_pass.model)
                whole, *replicates = (Tables(batch.head, options) for _ in range(draws + 1))
            rows: tuple[Tensor, ...] = (batch.features, batch.logits, batch.labels)  # type: ignore[assignment]
            whole.add(*rows)
            for tables in replicates:
                times = torch.poisson(torch.ones(len(rows[0])), generator=generator).long()
                again = torch.repeat_interleave(torch.arange(len(times)), times).to(rows[0].device)
                if len(again):
                    tables.add(*(part[again] for part in rows))
    reference, others = whole.filters(names, {}), [tables.filters(names, {}) for tables in replicates]  # type: ignore[union-attr]
    frames = [_stability(key[0], table, [other[key] for other in others], k) for key, table in reference.items()]
    samples = int(next(iter(reference.values())).counts.sum())
    mean, low, high = random_jaccard(k, next(iter(reference.values())).num_channels)
    row = {"jaccard": mean, "low": low, "high": high, "samples": samples}
    frames.append(pd.DataFrame([{"filters": "random", "control": True, "class_name": "all", **row}]))
    return pd.concat(frames, ignore_index=True)


def _stability(name: str, whole: ClassFilters, replicates: Sequence[ClassFilters], k: int) -> pd.DataFrame:
    chosen = whole.mask(k)
    shared = torch.stack([(other.mask(k) & chosen).sum(1) for other in replicates]).double()
    # a class without samples in a replicate shares no channel there
    jaccard = (shared / (2 * k - shared)).masked_fill(~whole.seen, torch.nan).numpy()
    jaccard = np.concatenate([np.nanmean(jaccard, axis=1, keepdims=True), jaccard], axis=1)
    low, high = np.quantile(jaccard, [0.025, 0.975], axis=0)
    return pd.DataFrame(
        {
            "filters": name,
            "control": False,
            "class_name": ["all", *whole.class_names],
            "jaccard": jaccard.mean(0),
            "low": low,
            "high": high,
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
