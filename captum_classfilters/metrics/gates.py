"""How dense is a gate, do features point along it, and do they cluster as it says?

For `LabelSensitiveGate.class_filters()`; any other table is read as a gate by dividing each channel's scores by their
largest, negative ones as 0. N samples, C classes, K channels.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_table, named_tables, one_table
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head_pass import batches
from captum_classfilters.metrics.accuracy import check_draws
from captum_classfilters.metrics.intervals import draws_interval, mean_interval, wilson


def density(
    filters: ClassFilters | Mapping[Any, ClassFilters],
    *,
    threshold: float = 0.5,
    draws: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of a table is in use: the mean of the gate, and how many channels are one class's own.

    Source: "Training interpretable CNNs towards class-specific filters", table 1, ``L1 norm`` (a mean over C and K),
    and section 4.4 (filters that a class monopolises). Differs: any table, read as a gate; a control and intervals.

    Args:
        filters: A table, or tables by name, all of one shape; one of the random selector is left out, for the control
            stands for it. A class without samples counts with what the table says.
        threshold: A channel is used by the classes with more than this.
        draws: Random gates for the control, at least 5.
        seed: Of these.

    Returns:
        One row for each table and class, and for ``"all"``, the control as ``filters == "random"``: uniform noise, each
        channel divided by its largest. ``density``, ``low``, ``high`` (Student-t over channels; over draws for the
        control); ``exclusive``: channels that this class alone uses; ``shared``: that it uses with others, both means
        over draws for the control; ``channels``: K.

    Raises:
        OptionError: The threshold is not in [0, 1), fewer than 5 draws, or no table.
        ShapeError: Tables of different shapes.
    """
    check_draws(draws)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
        raise OptionError(
            f"threshold must lie in [0, 1), as shares of each channel's largest score do; got {threshold!r}"
        )
    tables = named_tables(filters, ("random",))
    shapes = {name: tuple(table.scores.shape) for name, table in tables.items()}
    if len(set(shapes.values())) > 1:
        raise ShapeError(
            f"the tables must have one shape, for they share a control; got {shapes}; pass them one by one"
        )
    names = ["all", *next(iter(tables.values())).class_names]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(draws, *next(iter(shapes.values())), generator=generator, dtype=torch.float64)
    frames = []
    for name, table in [*tables.items(), ("random", None)]:
        gates = as_gate(noise if table is None else table.scores[None]).numpy()
        rows = np.concatenate([gates.mean(1, keepdims=True), gates], axis=1)  # (draws or 1, 1 + C, K)
        mean, low, high = mean_interval(rows[0].T) if table is not None else mean_interval(rows.mean(2))
        used = gates > threshold
        alone = used & (used.sum(1, keepdims=True) == 1)
        exclusive, shared = (_with_any(part) for part in (alone, used & ~alone))
        frames.append(
            pd.DataFrame(
                {
                    "filters": name,
                    "class_name": names,
                    "density": mean,
                    "low": low,
                    "high": high,
                    "exclusive": exclusive,
                    "shared": shared,
                    "channels": gates.shape[2],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def gate_similarity(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any],
    *,
    layer: nn.Module | str | None = None,
    draws: int = 20,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Average inner product of a class's features and each row of the gate, of images recognised and not.

    Source: "Training interpretable CNNs towards class-specific filters", section 4.2, figure 5 and appendix B:
    ``S_y^c = mean of <a, G_c>`` over images of class y. Differs: any table, read as a gate; a control and intervals.

    Args:
        model: The network; borrowed, and run without a gate.
        filters: The table whose rows are compared.
        loader: Batches ``(inputs, labels)``.
        layer: The head, if it cannot be found.
        draws: Gates with their channels shuffled, at least 5.
        seed: Of these.
        show_progress: A tqdm bar.

    Returns:
        One row for each outcome, class and row of the gate: ``outcome`` (``"TP"``: classified as what it is, ``"FN"``:
        as another class), ``class_name`` (y), ``gate_row`` (c), ``similarity`` (NaN without samples), ``low``, ``high``
        (normal interval), ``random``, ``random_low``, ``random_high``: with channels shuffled alike in all rows
        (Student-t over draws); ``samples``.

    Raises:
        OptionError: Fewer than 5 draws.
        ShapeError: A table of another network.
    """
    one_table(filters)
    check_draws(draws)
    size = filters.num_classes
    gate = as_gate(filters.scores)
    similarities, features = GroupMoments(2 * size), GroupMoments(2 * size)
    with batches(model, loader, layer=layer, show_progress=show_progress, description="gate_similarity") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            labels: Tensor = batch.labels  # type: ignore[assignment]
            groups = labels + size * (batch.logits.argmax(1) != labels).long()
            rows = gate.to(batch.features.device)
            similarities.add(batch.features.double() @ rows.T, groups)
            features.add(batch.features, groups)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(gate.shape[1], generator=generator) for _ in range(draws)]
    # the mean of a product with a row is the product of the mean
    chance = [features.mean.cpu() @ gate[:, order].T for order in orders]
    count = similarities.count.cpu().numpy()
    found = similarities.mean.cpu().numpy()
    half = 1.96 * similarities.error().cpu().numpy()
    random, random_low, random_high = draws_interval(torch.stack(chance))
    names = np.array(filters.class_names)
    return pd.DataFrame(
        {
            "outcome": np.repeat(["TP", "FN"], size * size),
            "class_name": np.tile(np.repeat(names, size), 2),
            "gate_row": np.tile(names, 2 * size),
            "similarity": found.ravel(),
            "low": (found - half).ravel(),
            "high": (found + half).ravel(),
            "random": random.ravel(),
            "random_low": random_low.ravel(),
            "random_high": random_high.ravel(),
            "samples": np.repeat(count.astype(int), size),
        }
    )


def feature_clusters(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any],
    *,
    n_init: int = 10,
    layer: nn.Module | str | None = None,
    draws: int = 20,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """K-means of the features into as many clusters as there are classes: do the centres look like rows of the gate?

    Source: "Training interpretable CNNs towards class-specific filters", appendix D and figure 9. Differs: the likeness
    has numbers, with a control, where the paper shows a picture. Each centre is matched to one row of the gate, so that
    the sum of their cosines is largest. K-means needs all features at once: N x K float32 numbers are kept, alone among
    the metrics but for `mutual_information`.

    Args:
        model: The network; borrowed, and run without a gate.
        filters: The table whose rows the centres are matched to, read as a gate.
        loader: Batches ``(inputs, labels)``.
        n_init: Starts of k-means, of which the best counts.
        layer: The head, if it cannot be found.
        draws: Gates with their channels shuffled, and shuffled labels, at least 5.
        seed: Of k-means and of these.
        show_progress: A tqdm bar.

    Returns:
        One row for all clusters, ``"all"``, and one for each: ``cluster``, ``class_name`` (matched), ``cosine`` of
        centre and row; ``random``, ``random_low``, ``random_high``: matched to rows with their channels shuffled alike
        (Student-t over draws); ``purity``: the share of the cluster's most frequent class, ``low``, ``high`` (Wilson);
        ``random_purity``: with labels shuffled; ``ami``: adjusted mutual information of clusters and labels (0 is
        chance), in the first row; ``samples``; then the centre as ``"channel 0"``, ``"channel 1"`` and so on, in the
        first row the mean of all features.

    Raises:
        OptionError: n_init or draws out of range, or fewer samples than classes.
        ShapeError: A table of another network.
    """
    one_table(filters)
    check_draws(draws)
    if isinstance(n_init, bool) or not isinstance(n_init, int) or n_init < 1:
        raise OptionError(f"n_init must be an integer of at least 1, got {n_init!r}")
    kept, known = [], []
    with batches(model, loader, layer=layer, show_progress=show_progress, description="feature_clusters") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            kept.append(batch.features.float().cpu().numpy())
            known.append(batch.labels.cpu().numpy())  # type: ignore[union-attr]
    features, labels = np.concatenate(kept), np.concatenate(known)
    size = filters.num_classes
    if len(features) < size:
        raise OptionError(f"{size} clusters need at least as many samples, got {len(features)}; pass more images")
    means = KMeans(size, n_init=n_init, random_state=seed).fit(features)
    centres, cluster = means.cluster_centers_.astype(float), means.labels_
    gate = as_gate(filters.scores).numpy()
    matched, cosine = match(centres, gate)
    generator = np.random.default_rng(seed)
    chance = np.stack([match(centres, gate[:, generator.permutation(gate.shape[1])])[1] for _ in range(draws)])
    most, samples = _most(cluster, labels, size)
    shuffled = np.mean([_most(cluster, generator.permutation(labels), size)[0] for _ in range(draws)], axis=0)
    low, high = wilson(most, samples)
    random, random_low, random_high = draws_interval(np.column_stack([chance.mean(1), chance]))
    frame = pd.DataFrame(
        {
            "cluster": ["all", *range(size)],
            "class_name": ["all", *np.array(filters.class_names)[matched]],
            "cosine": [cosine.mean(), *cosine],
            "random": random,
            "random_low": random_low,
            "random_high": random_high,
            "purity": most / samples,
            "low": low,
            "high": high,
            "random_purity": shuffled / samples,
            "ami": [adjusted_mutual_info_score(labels, cluster), *[np.nan] * size],
            "samples": samples,
        }
    )
    rows = np.concatenate([features.mean(0, dtype=float)[None], centres])
    return frame.join(pd.DataFrame(rows, columns=[f"channel {channel}" for channel in range(rows.shape[1])]))


def as_gate(scores: Tensor) -> Tensor:
    """Read any table as a gate: negatives 0, every channel divided by its largest. A gate stays as it is.

    Args:
        scores: ``(..., C, K)``.

    Returns:
        The same shape, in [0, 1]; a channel with nothing above 0 is 0.
    """
    positive = scores.double().clamp(min=0)
    largest = positive.amax(-2, keepdim=True)
    return positive / torch.where(largest > 0, largest, 1)


def match(centres: Any, gate: Any) -> tuple[Any, Any]:
    """Which row of the gate each centre is, so that the sum of cosines is largest, and those cosines.

    Args:
        centres: ``(C, K)``.
        gate: ``(C, K)``; a row of zeros has cosine 0.

    Returns:
        ``(rows, cosines)``, each ``(C,)``.
    """
    unit = [table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-30) for table in (centres, gate)]
    cosines = unit[0] @ unit[1].T
    rows = linear_sum_assignment(cosines, maximize=True)[1]
    return rows, cosines[np.arange(len(rows)), rows]


class GroupMoments:
    """Running count, mean and squared deviations of values in groups, float64; large means do not destroy them.

    Source: Chan, Golub and LeVeque 1979, the merging of two parts.

    Args:
        groups: R.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self.count: Tensor = torch.zeros(groups, dtype=torch.float64)
        self._mean = self._squares = torch.zeros(groups, 1, dtype=torch.float64)

    def add(self, values: Tensor, groups: Tensor) -> None:
        """Take a batch in: values ``(N, K)``, the group of each row ``(N,)``."""
        values = values.detach().double()
        members = F.one_hot(groups, self._groups).double()
        count, before = members.sum(0), self.count.to(values.device)
        mean = members.T @ values / count.clamp(min=1)[:, None]
        squares = members.T @ (values - mean[groups]).square()
        whole = before + count
        apart = mean - self._mean.to(values.device)
        share = (count / whole.clamp(min=1))[:, None]
        self._squares = self._squares.to(values.device) + squares + apart.square() * before[:, None] * share
        self._mean = self._mean.to(values.device) + apart * share
        self.count = whole

    @property
    def mean(self) -> Tensor:
        """``(R, K)``; NaN for a group without samples."""
        return self._mean.masked_fill(self.count[:, None] == 0, torch.nan)

    def error(self) -> Tensor:
        """Standard error of the mean, ``(R, K)``; NaN for a group of fewer than two."""
        count = self.count[:, None]
        return (self._squares / (count - 1) / count).sqrt().masked_fill(count < 2, torch.nan)


def _with_any(flags: Any) -> Any:
    """Channels of each class, mean over tables ``(T, C, K)``, with those of any class in front: ``(1 + C,)``."""
    every = np.concatenate([flags.any(1, keepdims=True), flags], axis=1)
    return every.sum(2).mean(0)


def _most(cluster: Any, labels: Any, size: int) -> tuple[Any, Any]:
    """Samples of each cluster's most frequent class, and its samples; in front those of all clusters."""
    table = np.bincount(cluster * size + labels, minlength=size * size).reshape(size, size)
    most, samples = table.max(1), table.sum(1)
    return np.concatenate([[most.sum()], most]), np.concatenate([[samples.sum()], samples])
